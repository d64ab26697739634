"""What the janitor decides, deployment by deployment, on a real Redis and a real backend.

Railway alone is stood in for, since its services would have to be an hour old; the verbs' tests run
the janitor on the local Railway.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pulse_railway import runtime_image
from tests.conftest import Redis
from tests.net import Backend, Connection, header, ok

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")


class Railway:
    """The calls of janitor.Railway that a run makes."""

    def __init__(self, *services: Any, intent: str | None = None) -> None:
        self.services = list(services)
        self.intent = intent
        self.deleted: list[str] = []
        self.remembered: list[str] = []

    def inspect(self) -> Any:
        return janitor.Seen(self.services, "id-router", self.intent)

    def remember(self, service_id: str, name: str, value: str) -> None:
        assert (service_id, name) == ("id-router", "PULSE_RAILWAY_ACTIVE")
        self.remembered.append(value)

    def delete(self, service: Any) -> None:
        self.deleted.append(service.deployment)


def service(name: str, age: float = 7200) -> Any:
    return janitor.Service(f"id-{name}", name, name, age)


def sweep(store: Any, railway: Railway, limits: Any) -> Any:
    return janitor.sweep(store, railway, store.read(), railway.inspect(), "token", limits)


class Room:
    """A Redis with an active deployment, and one backend that answers for all."""

    def __init__(self, server: Redis, backend: Backend) -> None:
        self.server, self.backend = server, backend
        self.store = router.RedisStore(server.url, "pulse:railway")
        server.deployment("active", backend.address)

    def sessions(self, count: int) -> None:
        self.backend.answer = ok(json.dumps({"render_session_count": count}).encode())

    def record(self, name: str) -> dict[str, Any] | None:
        raw = self.server.client.get(f"pulse:railway:deployment:{name}")
        return json.loads(str(raw)) if raw else None

    def run(
        self, *services: Any, ttl: float = 86_400, window: float = 0, keep: int = 0
    ) -> tuple[Any, list[str]]:
        railway = Railway(service("active"), *services)
        limits = janitor.Limits(ttl, window, keep)
        return sweep(self.store, railway, limits), railway.deleted


@pytest.fixture
def room(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    with Backend() as backend:
        monkeypatch.setattr(router, "base_url", lambda _: backend.address)
        monkeypatch.setattr(janitor, "RELOAD_GRACE_SECONDS", 0.0)
        yield Room(redis_server, backend)


def test_a_deploy_that_died_before_it_was_registered(room: Room) -> None:
    room.sessions(0)
    _, deleted = room.run(service("young", 60), service("old"))
    assert deleted == ["old"]


def test_a_deployment_whose_record_is_lost_is_not_taken_for_one(room: Room) -> None:
    room.sessions(2)
    report, deleted = room.run(service("lost"))
    assert deleted == []
    assert "2 sessions" in report.kept["lost"]
    record = room.record("lost")
    assert record is not None
    assert (record["state"], record["service_name"]) == ("draining", "lost")
    assert time.time() - record["drain_started_at"] < 5
    room.sessions(0)
    assert room.run(service("lost"))[1] == ["lost"]
    assert room.record("lost") is None


def test_what_runs_and_does_not_answer_is_not_taken_for_dead(room: Room) -> None:
    """Its record is lost, and for a moment it is silent, or nobody here reaches anything."""
    room.backend.answer = ok(b"?", status="500 Internal Server Error")
    silent, crashed = service("silent"), replace(service("crashed"), status="CRASHED")
    silent = replace(silent, status="SUCCESS")
    report, deleted = room.run(silent, crashed)
    assert deleted == ["crashed"]
    assert report.kept["silent"] == "not answering, draining from now on"
    assert (room.record("silent") or {})["state"] == "draining"
    report, deleted = room.run(silent)
    assert (report.kept["silent"], deleted) == ("not answering", [])
    room.sessions(0)
    assert room.run(silent)[1] == ["silent"]


NUMBERS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("0123456789", max_size=3)
)
SAID = st.one_of(
    st.just({"render_session_count": 0}),
    NUMBERS,
    st.lists(NUMBERS, max_size=2),
    st.dictionaries(st.sampled_from(["render_session_count", "count"]), NUMBERS, max_size=2),
)
ODD = [
    b"",
    b"0",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{}",
    b"[" * 99_999,
]


@pytest.mark.parametrize("raw", ODD)
def test_an_answer_that_is_none_is_not_zero(room: Room, raw: bytes) -> None:
    """Before, a backend that answered with what is not HTTP ended every run in a traceback."""

    def handle(c: Connection) -> None:
        c.head()
        c.send(raw if raw.startswith((b"HTTP", b"n")) else ok(raw))

    room.backend.handler = handle
    room.server.deployment("old", room.backend.address, "draining", registered_at=1)
    report, deleted = room.run(service("old"))
    assert (report.kept, deleted) == ({"old": "not answering"}, [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(said=SAID)
def test_only_a_zero_is_zero(room: Room, said: object) -> None:
    room.backend.answer = ok(json.dumps(said).encode())
    room.server.deployment("old", room.backend.address, "draining", registered_at=1)
    _, deleted = room.run(service("old"))
    count = said.get("render_session_count") if isinstance(said, dict) else None
    assert deleted == (["old"] if type(count) is int and count == 0 else [])


def test_pending_deployments(room: Room) -> None:
    room.sessions(0)
    old: dict[str, Any] = {"state": "pending", "registered_at": time.time() - 7200}
    for name, more in (
        ("dead", old),
        ("young", old | {"registered_at": time.time()}),
        ("held", old | {"held": True}),  # as `deploy --no-promote` leaves it
    ):
        room.server.deployment(name, room.backend.address, **more)
    services = [service(name) for name in ("dead", "young", "held")]
    room.sessions(1)
    assert room.run(*services)[1] == []  # somebody looks at it
    room.sessions(0)
    assert room.run(*services)[1] == ["dead"]
    assert room.record("dead") is None


def test_draining_deployments(room: Room) -> None:
    room.server.deployment(
        "old", room.backend.address, "draining", drain_started_at=time.time() - 50
    )
    room.sessions(3)
    assert room.run(service("old"))[1] == []
    room.backend.answer = ok(b"?", status="500 Internal Server Error")
    report, deleted = room.run(service("old"))
    assert (report.kept, deleted) == ({"old": "not answering"}, [])
    room.backend.answer = ok(json.dumps({"reloaded_socket_count": 1}).encode())
    report, deleted = room.run(service("old"), ttl=40)
    assert (report.expired, deleted) == (["old"], ["old"])
    assert room.backend.heads[-1].startswith(b"POST /_pulse/internal/railway/reload ")
    assert header(room.backend.heads[-1], "x-pulse-railway-internal-token") == "token"


def test_contradictions_delete_nothing(room: Room) -> None:
    room.sessions(0)
    twice = [service("twin"), janitor.Service("other", "twin-2", "twin", 7200)]
    railway = Railway(service("active"), *twice)
    with pytest.raises(janitor.Refused, match="on two services"):
        sweep(room.store, railway, janitor.Limits(0))
    railway = Railway(service("other"))
    with pytest.raises(janitor.Refused, match="has no service"):
        sweep(room.store, railway, janitor.Limits(0))
    assert railway.deleted == []


def test_lost_state_is_restored_from_railway(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "HEAL_WAIT", 0.2)
    room.sessions(0)
    room.server.client.flushall()
    for intent in (None, "gone"):  # what nobody knows is not guessed
        railway = Railway(service("active"), service("rolled-back", 60), intent=intent)
        with pytest.raises(janitor.Refused, match=r"none is active.*--deployment-id"):
            sweep(room.store, railway, janitor.Limits(0))
    railway = Railway(service("active"), service("rolled-back", 60), intent="active")
    assert sweep(room.store, railway, janitor.Limits(0)).restored == "active"
    assert railway.deleted == []
    assert room.server.client.get("pulse:railway:active") == "active"
    record = room.record("rolled-back")
    assert record is not None
    assert record["state"] == "draining"


def test_the_active_deployment_is_noted_on_railway(room: Room) -> None:
    for intent, noted in ((None, ["active"]), ("before", ["active"]), ("active", [])):
        railway = Railway(service("active"), intent=intent)
        sweep(room.store, railway, janitor.Limits(60))
        assert railway.remembered == noted


@pytest.mark.parametrize("meanwhile", ["promoted", "drained anew", "forgotten", "emptied"])
def test_what_changed_since_it_was_judged_is_left(
    room: Room, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Before: a deployment that was rolled back to during its tabs' grace was deleted."""
    began = time.time() - 500
    room.server.deployment("old", room.backend.address, "draining", drain_started_at=began)

    def change(_: Any, __: str) -> int:
        client = room.server.client
        if meanwhile == "promoted":
            room.server.deployment("old", room.backend.address, "active")
        elif meanwhile == "drained anew":
            now = time.time()
            room.server.deployment("old", room.backend.address, "draining", drain_started_at=now)
        elif meanwhile == "forgotten":
            client.delete("pulse:railway:deployment:old")
        else:
            client.flushall()
        return 0

    monkeypatch.setattr(router, "sessions", change)
    report, deleted = room.run(service("old"))
    assert deleted == []
    assert "changed meanwhile" in report.kept["old"] or "is active" in report.kept["old"]


def test_the_flags_of_0_3_set_what_ensure_sets() -> None:
    given = janitor.options(
        "run --service r --janitor-service j --project-id p --environment-id e --token t"
        " --service-prefix s --redis-url u --redis-service rs --redis-prefix rp"
        " --drain-ttl-seconds 7".split()
    )
    assert given["RAILWAY_PROJECT_ID"] == "p"
    assert given["REDIS_URL"] == "u"
    assert given["PULSE_RAILWAY_DRAIN_TTL_SECONDS"] == "7"
    assert len(given) == 10
    assert janitor.options([]) == {}


def test_a_deployment_whose_service_is_gone_loses_its_record(room: Room) -> None:
    """Before, its tabs met 502 for a day: somebody had deleted the service on Railway."""
    room.sessions(3)
    long_ago = time.time() - 500
    for name, state, more in (
        ("gone", "draining", {"registered_at": long_ago}),
        ("pending", "pending", {"registered_at": long_ago}),
        ("fresh", "pending", {"registered_at": time.time()}),
    ):
        room.server.deployment(name, room.backend.address, state, **more)
    report, deleted = room.run()
    assert deleted == []  # there is nothing on Railway to delete
    assert sorted(report.deleted) == ["gone", "pending"]
    assert room.record("gone") is None
    assert room.record("fresh")


def test_what_0_3_x_can_leave_behind_drains(room: Room) -> None:
    """Two records that say active, one of which is; a pending one without a time."""
    room.server.deployment("stray", room.backend.address, "active", registered_at=1)
    room.server.deployment("old", room.backend.address, "pending")
    room.server.client.set("pulse:railway:active", "active")
    room.sessions(0)
    report, deleted = room.run(service("stray"), service("old"))
    assert report.kept["stray"].startswith("was active beside the active one")
    assert (room.record("stray") or {})["state"] == "draining"
    assert (report.deleted, deleted) == (["old"], ["old"])
    assert room.run(service("stray"))[1] == ["stray"]


def test_a_download_without_a_tab_is_use(room: Room) -> None:
    room.server.deployment("old", room.backend.address, "draining", registered_at=1)
    room.sessions(0)
    said = json.dumps({"in_flight": {"old": 1, "active": 7}})
    room.server.client.set("pulse:railway:router:r1", said)
    report, deleted = room.run(service("old"))
    assert (report.kept["old"], deleted) == ("1 requests under way", [])
    room.server.client.set("pulse:railway:router:r1", json.dumps({}))
    assert room.run(service("old"))[1] == ["old"]


def test_the_tabs_are_told_whoever_removes_it(room: Room) -> None:
    """Also where the run finishes what another began, and by `delete`."""
    record = {"registered_at": 1, "retiring_at": time.time()}
    room.server.deployment("old", room.backend.address, "draining", **record)
    room.backend.answer = ok(json.dumps({"reloaded_socket_count": 2}).encode())
    assert room.run(service("old"))[1] == ["old"]
    told = [head for head in room.backend.heads if b"/internal/railway/reload" in head]
    assert len(told) == 1
    room.server.deployment("next", room.backend.address, "draining", registered_at=1)
    env = {"REDIS_URL": room.server.url, "PULSE_RAILWAY_INTERNAL_TOKEN": "token"}
    answer = control.carry_out(["retire", "--deployment-id", "next"], env)
    assert (answer["ok"], answer["reloaded"]) == (True, 2)


def test_there_is_a_way_back_for_a_while(room: Room) -> None:
    """Before, on a quiet app the version before was gone in the next run, and `rollback` had
    nowhere to go."""
    room.sessions(0)
    now = time.time()
    for name, ago in (("oldest", 900), ("older", 500), ("last", 100)):
        room.server.deployment(
            name, room.backend.address, "draining", registered_at=1, drain_started_at=now - ago
        )
    all_of_them = [service(n) for n in ("oldest", "older", "last")]
    report, deleted = room.run(*all_of_them, window=200, keep=2)
    assert deleted == ["oldest"]
    assert report.kept == {"older": "a way back", "last": "a way back"}
    assert room.run(*all_of_them[1:], window=200)[1] == ["older"]
    assert room.run(all_of_them[2], window=200)[1] == []
    assert room.run(all_of_them[2], window=50)[1] == ["last"]
    # the drain TTL goes first
    room.server.deployment(
        "last", room.backend.address, "draining", registered_at=1, drain_started_at=now - 100
    )
    assert room.run(all_of_them[2], ttl=60, window=200, keep=5)[1] == ["last"]


def test_a_control_command_is_carried_out_once_and_in_time(room: Room) -> None:
    env = {"REDIS_URL": room.server.url, "RAILWAY_SERVICE_ID": "x"}

    def answer(order: object, before: str = "") -> Any:
        text = order if isinstance(order, str) else json.dumps(order)
        return janitor.answer_to(janitor.Seen([], order=text, answer=before), env)

    order = {"nonce": "n1", "words": ["active"], "until": time.time() + 60}
    said = answer(order)
    assert said == {"ok": True, "deployment_id": "active", "command": "active", "nonce": "n1"}
    assert answer(order, json.dumps(said)) is None  # it was answered
    assert answer({**order, "until": time.time() - 1}) is None  # nobody waits any more
    for nonsense in ("", "{", "[]", "null", "{}", '{"nonce": 1}', {**order, "words": []}):
        assert answer(nonsense) is None
    unknown = answer({**order, "words": ["explode"]})
    assert (unknown["ok"], unknown["nonce"], unknown["command"]) == (False, "n1", "explode")
    words = ["retire", "--deployment-id", "active"]
    assert answer({**order, "words": words})["reason"] == "active"


# -- a run as a whole, whose answers come from somewhere else -------------------------------------


@pytest.fixture
def on_railway(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """`on_railway(answer, NAME=value)`: a run for which Railway has that answer; how it ended, and
    what it said."""
    redis_server.deployment("active", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with Backend() as railway:

        def run(answer: bytes, **env: str) -> tuple[int, str]:
            railway.answer = answer
            given = {
                "RAILWAY_SERVICE_ID": "j",
                "RAILWAY_PROJECT_ID": "p",
                "RAILWAY_ENVIRONMENT_ID": "e",
                "RAILWAY_TOKEN": "secret-token",
                "REDIS_URL": redis_server.url,
                "PULSE_RAILWAY_API_URL": railway.address,
                **env,
            }
            for name, value in given.items():
                monkeypatch.setenv(name, value)
            code = janitor.main([])
            said = capsys.readouterr()
            assert "secret" not in said.out + said.err
            return code, said.out + said.err

        yield run


NOT_RAILWAY = [
    (ok(b"<html>"), "refused: Railway's answer is not one of its API"),
    (ok(b"[]"), "refused: Railway's answer is not one of its API"),
    (ok(b'{"ok": true}'), "refused: Railway's answer is not one of its API"),
    (ok(b'{"data": {}}'), "refused: Railway's answer is not one of its API"),
    (ok(b'{"errors": true, "data": {"environment": 1}}'), "refused: Railway's answer is not"),
    (ok(b'{"errors": [{"message": "no"}]}'), "refused: no\n"),
    (ok(b'{"errors": [{"message": "Not Authorized"}]}'), "refused: Not Authorized\n"),
    (ok(b"{}", status="503 Busy"), "gave up: HTTPStatusError; the next run goes on"),
]


@pytest.mark.parametrize(("answer", "says"), NOT_RAILWAY)
def test_an_answer_that_is_not_understood_ends_the_run(
    on_railway: Callable[..., tuple[int, str]], redis_server: Redis, answer: bytes, says: str
) -> None:
    code, said = on_railway(answer)
    assert (code, says in said) == (1, True), said
    assert not redis_server.client.exists("pulse:railway:janitor:lock")


def test_a_run_that_cannot_begin(
    on_railway: Callable[..., tuple[int, str]], redis_server: Redis
) -> None:
    empty = ok(b'{"data": {"environment": {"serviceInstances": {"edges": []}}}}')
    assert on_railway(empty, REDIS_URL="redis://:secret@127.0.0.1:9")[1].startswith("gave up: Conn")
    code, said = on_railway(empty, RAILWAY_TOKEN="", REDIS_URL="")
    assert (code, said) == (1, "missing RAILWAY_TOKEN, REDIS_URL: run `pulse-railway ensure`\n")
    redis_server.client.set("pulse:railway:janitor:lock", "another", ex=60)
    code, said = on_railway(empty)
    assert (code, json.loads(said)) == (0, {"skipped": "another run holds the lock"})
    assert redis_server.client.get("pulse:railway:janitor:lock") == "another"


@pytest.mark.parametrize("said", [b'{"data": {"serviceDelete": false}}', b'{"data": {"x": 1}}'])
def test_what_railway_does_not_say_it_deleted_keeps_its_record(room: Room, said: bytes) -> None:
    room.sessions(0)
    room.server.deployment("old", room.backend.address, "draining", registered_at=1)
    with Backend(ok(said)) as api:
        env = {"RAILWAY_PROJECT_ID": "p", "RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_TOKEN": "t"}
        railway: Any = Railway(service("active"), service("old"))
        railway.delete = janitor.Railway({**env, "PULSE_RAILWAY_API_URL": api.address}).delete
        with pytest.raises(RuntimeError, match="does not say that it deleted old"):
            sweep(room.store, railway, janitor.Limits(60))
    record = room.record("old")
    assert record is not None
    assert record["retiring_at"]


def test_the_lock_does_not_expire_on_a_long_run(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor, "LOCK_SECONDS", 1)
    store = router.RedisStore(redis_server.url, "pulse:railway")
    with janitor.lock(store) as held:
        assert held
        time.sleep(2.2)
        with janitor.lock(store) as second:
            assert not second
    assert not redis_server.client.exists("pulse:railway:janitor:lock")


def test_who_is_told_of_a_forced_removal(caplog: pytest.LogCaptureFixture) -> None:
    report = janitor.Report(expired=["prod-1", "prod-2"])
    with Backend(handle=told) as listener:
        secret = f"{listener.address}/hooks/T0SECRET"
        janitor.notify({"PULSE_RAILWAY_NOTIFY_URL": secret}, report)
        janitor.notify({"PULSE_RAILWAY_NOTIFY_URL": secret}, janitor.Report())  # nothing to tell
        janitor.notify({}, report)
        assert [body["deployments"] for body in TOLD] == [["prod-1", "prod-2"]]
        assert TOLD[0]["text"].startswith("the drain time of prod-1, prod-2 was over")
    for bad in (secret, "no-address-at-all", "http://[T0SECRET"):
        caplog.clear()
        janitor.notify({"PULSE_RAILWAY_NOTIFY_URL": bad}, report)
        assert "PULSE_RAILWAY_NOTIFY_URL was not told: " in caplog.text
        assert "T0SECRET" not in caplog.text


TOLD: list[dict[str, Any]] = []


def told(connection: Connection) -> None:
    head = connection.head()
    TOLD.append(json.loads(connection.read(int(header(head, "content-length") or 0))))
    connection.send(ok())
