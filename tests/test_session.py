"""RailwaySessionStore on a real Redis: 0.3.x's keys and values, and sessions that end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pulse as ps
import pytest

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
    asyncio.run(use(store, lambda s: s.save("sid", {})))
    assert 990 < redis_server.client.ttl(KEY) <= 1000
    redis_server.client.expire(KEY, 5)
    asyncio.run(use(store, lambda s: s.get("sid")))
    assert 990 < redis_server.client.ttl(KEY) <= 1000
    chosen = RailwaySessionStore(redis_server.url, ttl=50)
    plugin.on_startup(ps.App(routes=[], session_store=chosen))
    assert chosen.ttl == 50


def test_a_store_without_an_address_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULSE_RAILWAY_REDIS_URL", raising=False)
    with pytest.raises(RuntimeError, match="PULSE_RAILWAY_REDIS_URL"):
        asyncio.run(use(RailwaySessionStore(), lambda s: s.init()))
    assert "secret" not in repr(RailwaySessionStore("redis://:secret@host"))
