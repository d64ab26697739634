"""RailwaySessionStore on a real Redis: 0.3.x's keys and values, and sessions that end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pulse as ps
import pytest
from pulse.context import PulseContext

from pulse_railway import RailwayPlugin, RailwaySessionStore
from tests.conftest import Redis

KEY = "pulse:session:sid"


async def use(store: RailwaySessionStore, *steps: Any) -> list[Any]:
    """Call the store in one event loop, as an app does, and close it."""
    try:
        return [await step(store) for step in steps]
    finally:
        await store.close()


def test_sessions_are_kept_as_0_3_x_keeps_them(redis_server: Redis) -> None:
    store = RailwaySessionStore(redis_server.url)
    session = {"count": 3, "nested": {"a": [1, 2]}}
    found = asyncio.run(
        use(
            store,
            lambda s: s.get("sid"),
            lambda s: s.create("sid"),
            lambda s: s.save("sid", session),
            lambda s: s.get("sid"),
        )
    )
    assert found == [None, {}, None, session]
    stored = json.loads(str(redis_server.client.get(KEY)))
    assert stored == [[[], [], [], []], session]
    assert redis_server.client.ttl(KEY) == -1  # no plugin, no ttl: 0.3.x's behaviour
    asyncio.run(use(store, lambda s: s.delete("sid")))
    assert redis_server.client.get(KEY) is None


def test_a_session_lives_as_long_as_its_cookie(redis_server: Redis) -> None:
    store = RailwaySessionStore(redis_server.url)
    plugin = RailwayPlugin()
    app = ps.App(
        routes=[],
        plugins=[plugin],
        session_store=store,
        cookie=ps.Cookie("sid", max_age_seconds=1000),
    )
    plugin.on_startup(app)
    asyncio.run(use(store, lambda s: s.save("sid", {"a": 1})))
    assert 990 < redis_server.client.ttl(KEY) <= 1000
    redis_server.client.expire(KEY, 5)
    asyncio.run(use(store, lambda s: s.get("sid")))
    assert 990 < redis_server.client.ttl(KEY) <= 1000
    chosen = RailwaySessionStore(redis_server.url, ttl=50)
    plugin.on_startup(ps.App(routes=[], session_store=chosen))
    assert chosen.ttl == 50


def test_a_visitor_who_leaves_nothing_is_not_kept(redis_server: Redis) -> None:
    """A health check, a robot: each has a session in Pulse, and had a key in Redis for a week."""
    store = RailwaySessionStore(redis_server.url, ttl=50)
    asyncio.run(use(store, lambda s: s.create("sid"), lambda s: s.save("sid", {})))
    assert redis_server.client.keys() == []
    asyncio.run(use(store, lambda s: s.save("sid", {"a": 1}), lambda s: s.save("sid", {})))
    assert stored(redis_server) == {}


def test_a_store_without_an_address_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULSE_RAILWAY_REDIS_URL", raising=False)
    with pytest.raises(RuntimeError, match="PULSE_RAILWAY_REDIS_URL"):
        asyncio.run(use(RailwaySessionStore(), lambda s: s.init()))
    app = ps.App(routes=[], session_store=RailwaySessionStore())
    with pytest.raises(RuntimeError, match="PULSE_RAILWAY_REDIS_URL"):  # Pulse goes on after `init`
        RailwayPlugin().on_startup(app)
    assert "secret" not in repr(RailwaySessionStore("redis://:secret@host"))


@pytest.mark.parametrize("before", [{}, {"count": 1}])
def test_two_requests_at_once_have_one_session(redis_server: Redis, before: dict[str, Any]) -> None:
    """Before, what was written by one tab of a browser did not show in the other, and was lost in
    memory; a request for the page's icon beside it was enough."""

    async def both() -> None:
        first = Version(redis_server)
        await first.store.save("sid", before)
        version = Version(redis_server)
        one, two = await asyncio.gather(version.session("sid"), version.session("sid"))
        await version.change(one, count=2)
        assert dict(two.data) == stored(redis_server) == {"count": 2}
        await version.change(two, drop="count")
        assert dict(one.data) == stored(redis_server) == {}

    asyncio.run(both())


# -- two versions at once ----------------------------------------------------------------------


class Version:
    """A real Pulse app as one deployment has it: what it holds in memory, it saves whole."""

    def __init__(self, redis_server: Redis) -> None:
        self.store = RailwaySessionStore(redis_server.url)
        self.app = ps.App(routes=[], session_store=self.store)
        self.app.cookie.secure = True

    async def session(self, sid: str) -> Any:
        with PulseContext(app=self.app):
            session = await self.app.get_or_create_session(sid)
            await self._saved(session)
            return session

    async def change(self, session: Any, *, drop: str | None = None, **values: Any) -> None:
        """What a tab does to its session; Pulse's own effect saves it."""
        with PulseContext(app=self.app):
            session.data.update(values)
            if drop:
                del session.data[drop]
            await self._saved(session)

    async def open(self, session: Any) -> None:
        """What the plugin does when a page is opened."""
        with PulseContext(app=self.app):
            await self.store.refresh("sid", session.data)
            await self._saved(session)

    async def _saved(self, session: Any) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            if session._effect.is_scheduled:
                await session._effect.wait()

    async def close(self) -> None:
        await self.store.close()


def stored(redis_server: Redis, sid: str = "sid") -> Any:
    return json.loads(str(redis_server.client.get(f"pulse:session:{sid}")))[1]


def test_a_login_is_not_undone_by_an_old_tab(redis_server: Redis) -> None:
    """Before, the old version's next save wrote the session back as it had read it."""

    async def story() -> None:
        old, new = Version(redis_server), Version(redis_server)
        on_old = await old.session("sid")
        await old.change(on_old, cart=["a"], theme="dark")
        on_new = await new.session("sid")
        assert on_new.data["cart"] == ["a"]
        await new.change(on_new, user="ada", drop="theme")
        assert stored(redis_server) == {"cart": ["a"], "user": "ada"}
        await old.change(on_old, cart=["a", "b"])
        assert stored(redis_server) == {"cart": ["a", "b"], "user": "ada"}
        await old.change(on_old, drop="cart")
        assert stored(redis_server) == {"user": "ada"}
        await old.close()
        await new.close()

    asyncio.run(story())


def test_who_comes_back_sees_what_others_have_changed(redis_server: Redis) -> None:
    """After a rollback the older process still held the session: in a chaos run it showed 253
    where another had counted to 258, and wrote 254 over it."""

    async def play() -> None:
        old, new = (RailwaySessionStore(redis_server.url) for _ in range(2))
        await old.save("sid", {"count": 3, "theme": "dark", "gone": 1, "cart": []})
        held = ps.reactive(await old.get("sid") or {})
        assert await new.get("sid")
        await new.save("sid", {"count": 8, "theme": "dark", "user": "ada", "cart": [1]})
        held["theme"] = "light"  # here, and not written yet
        held["cart"] = [2]  # on both: the later one stays
        await old.refresh("sid", held)
        expected = {"count": 8, "theme": "light", "user": "ada", "cart": [2]}
        assert ps.unwrap(held) == expected
        await old.save("sid", ps.unwrap(held))
        assert await new.get("sid") == expected
        redis_server.stop()
        await old.refresh("sid", held)  # nobody waits, nothing is lost
        assert ps.unwrap(held) == expected
        redis_server.start()
        for store in (old, new):
            await store.close()

    asyncio.run(play())


def test_many_saves_at_once_lose_nothing(redis_server: Redis) -> None:
    async def story() -> None:
        stores = [RailwaySessionStore(redis_server.url) for _ in range(4)]
        for store in stores:
            await store.get("sid")
        await asyncio.gather(
            *(
                store.save("sid", {f"{n}": step for step in range(i + 1)})
                for n, store in enumerate(stores)
                for i in range(5)
            )
        )
        for store in stores:
            await store.close()

    asyncio.run(story())
    assert set(stored(redis_server)) == {"0", "1", "2", "3"}


class HeldAnswers:
    """A relay before a Redis. While `hold` is set, the answer to an EXEC waits for `release`."""

    def __init__(self, port: int) -> None:
        self.redis_port = port
        self.hold, self.release = False, asyncio.Event()

    async def __aenter__(self) -> HeldAnswers:
        self.server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def connected(self, reader: Any, writer: Any) -> None:
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self.redis_port)
        held = False

        async def questions() -> None:
            nonlocal held
            while data := await reader.read(65536):
                held = self.hold and b"EXEC" in data
                to_redis.write(data)
            to_redis.close()

        async def answers() -> None:
            while data := await from_redis.read(65536):
                if held:
                    await self.release.wait()
                writer.write(data)
            writer.close()

        await asyncio.gather(questions(), answers())


def test_a_save_that_pulse_cancels_was_carried_out_all_the_same(redis_server: Redis) -> None:
    """Before, it was taken for unsaved: of `busy` on, and off again, `on` stayed for good."""

    async def play() -> None:
        async with HeldAnswers(redis_server.port) as relay:
            store = RailwaySessionStore(relay.url)
            await store.save("sid", {"busy": False, "a": 1})
            relay.hold = True
            cancelled = asyncio.create_task(store.save("sid", {"busy": True, "a": 1}))
            while not stored(redis_server)["busy"]:
                await asyncio.sleep(0.005)
            cancelled.cancel()
            relay.hold = False
            asyncio.get_running_loop().call_later(0.05, relay.release.set)
            await store.save("sid", {"busy": False, "a": 1})
            assert stored(redis_server) == {"busy": False, "a": 1}
            await store.close()

    asyncio.run(play())


def test_who_is_logged_out_stays_so(redis_server: Redis) -> None:
    """Before, the other version's next save brought a deleted session back."""

    async def play() -> None:
        old, new = Version(redis_server), Version(redis_server)
        on_old = await old.session("sid")
        await old.change(on_old, user="ada", cart=["a"])
        on_new = await new.session("sid")
        await new.store.delete("sid")
        await new.change(on_new, page=2)  # what is still open there brings nothing else back
        assert stored(redis_server) == {"page": 2}
        await new.open(on_new)
        assert dict(on_new.data) == {"page": 2}
        await new.change(on_new, drop="page")
        redis_server.client.delete(KEY)
        await old.change(on_old, cart=["a", "b"])
        assert redis_server.client.get(KEY) is None
        await old.open(on_old)
        assert dict(on_old.data) == {}
        await new.change(on_new, user="bob")
        assert stored(redis_server) == {"user": "bob"}
        await old.change(on_old, theme="dark")
        assert stored(redis_server) == {"user": "bob", "theme": "dark"}
        await old.open(on_old)
        assert dict(on_old.data) == {"user": "bob", "theme": "dark"}
        third = Version(redis_server)  # read after all that
        on_third = await third.session("sid")
        await third.change(on_third, drop="theme")
        assert stored(redis_server) == {"user": "bob"}
        assert 3500 < redis_server.client.ttl(f"{KEY}:deleted") <= 3600
        for version in (old, new, third):
            await version.close()

    asyncio.run(play())


def test_a_session_that_redis_lost_is_written_back(redis_server: Redis) -> None:
    """Nobody has deleted it: before, only what was changed next was there again."""

    async def play() -> None:
        version = Version(redis_server)
        session = await version.session("sid")
        await version.change(session, user="ada", cart=["a"])
        redis_server.client.flushall()
        await version.store.refresh("sid", session.data)
        await version.change(session, cart=["b"])
        assert stored(redis_server) == {"user": "ada", "cart": ["b"]}
        await version.close()

    asyncio.run(play())


def test_what_a_tab_holds_is_compared_with_what_it_was_read_as(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, a session pushed out of the remembered ones was written whole."""
    monkeypatch.setattr("pulse_railway.app.session.REMEMBERED", 3)

    async def play() -> None:
        old, new = Version(redis_server), Version(redis_server)
        on_old = await old.session("sid")
        await old.change(on_old, user="ada", cart=["a"])
        for number in range(5):
            await old.store.save(f"other-{number}", {"n": number})
        assert "sid" not in old.store._known
        await new.change(await new.session("sid"), drop="user")
        await old.change(on_old, cart=["a", "b"])
        assert stored(redis_server) == {"cart": ["a", "b"]}
        await old.close()
        await new.close()

    asyncio.run(play())


def test_a_session_of_pulse_s_own_serializer_is_read(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Pulse's, in a format that ours is not."""

    def deserialize(found: Any) -> Any:
        return dict(found["v5"])

    monkeypatch.setattr("pulse_railway.app.session.deserialize", deserialize)
    redis_server.client.set(KEY, '{"v5": [["user", "ada"]]}')

    async def play() -> None:
        version = Version(redis_server)
        session = await version.session("sid")
        assert dict(session.data) == {"user": "ada"}
        await version.change(session, theme="dark")
        await version.close()

    asyncio.run(play())
    assert json.loads(str(redis_server.client.get(KEY))) == [
        [[], [], [], []],
        {"user": "ada", "theme": "dark"},
    ]


def test_an_unknown_wire_format_is_a_new_session(
    redis_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    for odd in ("{", "[1, 2]", '["v9", {"a": 1}]', "null", '[[[0], [], [], []], "text"]'):
        redis_server.client.set(KEY, odd)
        store = RailwaySessionStore(redis_server.url)
        caplog.clear()
        found = asyncio.run(use(store, lambda s: s.get("sid")))
        assert found == [None], odd
        assert len(caplog.records) == 1
        store = RailwaySessionStore(redis_server.url)
        asyncio.run(use(store, lambda s: s.save("sid", {"a": 1})))
        assert stored(redis_server) == {"a": 1}


@pytest.fixture
def lasting(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(folder=tmp_path)
    yield server
    server.stop()


# -- while Redis is away -----------------------------------------------------------------------


def test_a_restart_of_redis_costs_no_error(lasting: Redis) -> None:
    async def story() -> None:
        store = RailwaySessionStore(lasting.url)
        await store.save("sid", {"a": 1})
        lasting.stop()
        lasting.start()
        assert await store.get("sid") == {"a": 1}
        await store.save("sid", {"a": 2})
        await store.close()

    asyncio.run(story())
    assert stored(lasting) == {"a": 2}


def test_what_happens_meanwhile_is_kept_and_written(
    lasting: Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(
        "pulse_railway.app.session.UNKNOWN_TIMEOUT", 0.0
    )  # it has been away for long

    async def story() -> None:
        here, there = (RailwaySessionStore(lasting.url) for _ in range(2))
        await here.save("known", {"a": 1, "b": 1})
        await here.save("other", {"x": 1})
        await there.get("known")
        await there.save("known", {"a": 1, "b": 1, "there": 1})
        lasting.stop()
        began = time.monotonic()
        assert await here.get("known") == {"a": 1, "b": 1}
        await here.save("known", {"a": 2})  # `b` is gone
        assert await here.get("known") == {"a": 2}
        assert await here.get("stranger") is None
        assert await here.create("stranger") == {}
        await here.save("stranger", {"new": True})
        assert await here.get("stranger") == {"new": True}
        await here.delete("other")
        assert await here.get("other") is None
        assert time.monotonic() - began < 1
        lasting.start()
        deadline = time.monotonic() + 10
        while here._unwritten:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        await here.close()
        await there.close()

    asyncio.run(story())
    assert stored(lasting, "known") == {"a": 2, "there": 1}
    assert stored(lasting, "stranger") == {"new": True}
    assert lasting.client.get("pulse:session:other") is None
    said = [record.message for record in caplog.records]
    assert said == [
        "sessions: Redis is away (ConnectionError); they are kept in memory",
        "sessions: Redis is back",
    ]


def test_whom_only_redis_knows_waits_for_it_for_a_few_seconds(lasting: Redis) -> None:
    """In a chaos run three visitors, who came to a new process while Redis stalled, began at 0
    there, and 10 was written over their 53."""

    async def play() -> tuple[Any, float, Any]:
        before, fresh = (RailwaySessionStore(lasting.url) for _ in range(2))
        await before.save("sid", {"count": 53})
        lasting.signal(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(3, lasting.signal, signal.SIGCONT)
        held = await fresh.get("sid")
        lasting.signal(signal.SIGSTOP)
        fresh._away_since = fresh._away_until = 0.0
        began = time.monotonic()
        unknown = [await fresh.get(f"other-{n}") for n in range(5)]  # not each of them so long
        took = time.monotonic() - began
        lasting.signal(signal.SIGCONT)
        for store in (before, fresh):
            await store.close()
        return held, took, unknown

    held, took, unknown = asyncio.run(play())
    assert held == {"count": 53}
    assert unknown == [None] * 5
    assert took < 9


def test_a_frozen_redis_is_not_waited_for(redis_server: Redis) -> None:
    async def story() -> None:
        store = RailwaySessionStore(redis_server.url)
        await store.save("sid", {"a": 1})
        redis_server.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            for _ in range(50):
                assert await store.get("sid") == {"a": 1}
            assert time.monotonic() - began < 3  # one answer was waited for
        finally:
            redis_server.signal(signal.SIGCONT)
        await store.close()

    asyncio.run(story())


def test_no_more_is_kept_than_a_process_can_bear(
    lasting: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pulse_railway.app.session.REMEMBERED", 10)

    async def story() -> None:
        store = RailwaySessionStore(lasting.url)
        for i in range(15):
            await store.save(f"s{i}", {"i": i})
        assert list(store._known) == [f"s{i}" for i in range(5, 15)]
        lasting.stop()
        for i in range(15):
            await store.save(f"t{i}", {"i": i})
        assert list(store._unwritten) == [f"t{i}" for i in range(5, 15)]
        assert store._unwritten.size == sum(len(f"i[[[],[],[],[]],{i}]") for i in range(5, 15))
        lasting.start()
        await store.close()

    asyncio.run(story())
    assert stored(lasting, "t14") == {"i": 14}


def test_the_names_of_0_3_x(redis_server: Redis) -> None:
    import redis.asyncio

    from pulse_railway import RailwayPluginError, RailwayRedisSessionStore

    assert RailwayRedisSessionStore.from_url("redis://x", prefix="p:").prefix == "p"
    assert issubclass(RailwayPluginError, Exception)
    by_env = RailwaySessionStore(env={"PULSE_RAILWAY_REDIS_URL": redis_server.url})

    async def story() -> None:
        client = redis.asyncio.Redis.from_url(redis_server.url, decode_responses=True)
        own = RailwaySessionStore(client=client)
        await own.save("sid", {"a": 1})
        await own.close()
        assert await client.ping()  # it is the app's
        assert await by_env.get("sid") == {"a": 1}
        await by_env.close()
        await client.aclose()

    asyncio.run(story())
