"""A copy of an environment that shares the original's Redis: all its keys expire after its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from pulse_railway import RailwaySessionStore, contract, runtime_image
from tests.conftest import Process, Redis
from tests.net import eventually
from tests.scene import QUICK, Site, up

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")

TTL = 60  # seconds: on a busy machine a copy takes a while


def a_copy(url: str, name: str, ttl: int = TTL) -> dict[str, str]:
    """Return the variables of a copy's router."""
    return {
        "REDIS_URL": url,
        contract.REDIS_PREFIX: f"pulse:railway:{name}",
        contract.KEY_TTL: str(ttl),
        "RAILWAY_ENVIRONMENT_ID": name,
        "RAILWAY_SERVICE_ID": "r",
        contract.STACK: f"{name}/r",
    }


def use_copy(env: dict[str, str], name: str) -> None:
    """Write all keys of a copy, by control commands and a session."""
    for words in (
        f"claim --owner {name}/r",
        "register --deployment-id one --service-name one --address http://127.0.0.1:9",
        "promote --active-deployment-id one --active-service-name one --nonce a1",
        "register --deployment-id two --service-name two --address http://127.0.0.1:9",
        "promote --active-deployment-id two --active-service-name two --nonce a2",
        "retire --deployment-id one --force",
        "delete --deployment-id one",
        "maintenance on",
        "lock --holder h --by me --lease 60",
    ):
        answer = control.carry_out(words.split(), env)
        assert answer["ok"], answer
    asyncio.run(visit({contract.SESSION_SCOPE: name, contract.KEY_TTL: env[contract.KEY_TTL]}, env))


async def visit(env: dict[str, str], stack: dict[str, str]) -> None:
    store = RailwaySessionStore(stack["REDIS_URL"], env=env, ttl=7 * 86_400)
    await store.save("visitor", {"cart": 1})
    assert await store.get("visitor") == {"cart": 1}
    await store.close()


def test_fifty_copies_leave_nothing_beyond_their_ttl(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "HEAL_WAIT", 0.2)
    client = redis_server.client
    redis_server.deployment("first", "http://127.0.0.1:9")
    asyncio.run(visit({}, {"REDIS_URL": redis_server.url}))
    original = {key: client.get(key) for key in client.scan_iter("*")}
    for i in range(50):
        use_copy(a_copy(redis_server.url, f"copy-{i}"), f"copy-{i}")
        own = [key for key in client.scan_iter("*") if f"copy-{i}" in key]
        assert len(own) > 8
        assert all(0 <= client.pttl(key) <= TTL * 1000 for key in own)
    lasting = [key for key in client.scan_iter("*") if not 0 <= client.pttl(key) <= TTL * 1000]
    assert {key: client.get(key) for key in lasting} == original


def test_the_janitor_renews_keys_while_a_router_reports(
    site: Site, run_router: Callable[..., Process]
) -> None:
    """Also keys without an expiry, which 0.3.x writes."""
    env = a_copy(site.server.url, "copy", 60)
    store = router.store_from_env(env)
    client, old = site.server.client, "pulse:railway:copy:deployment:old"
    assert control.carry_out(["claim", "--owner", "copy/r"], env)["ok"]
    client.set(f"{store.prefix}:active", "old")  # as 0.3.x writes
    client.set(old, json.dumps({"deployment_id": "old", "address": site.old.address}))

    def keys() -> list[str]:
        return [k for k in client.scan_iter(f"{store.prefix}:*") if ":router:" not in k]

    def left() -> set[float]:
        return {round(client.pttl(key) / 1000) for key in keys()}

    control.keep_while_routers_report(store, store.read())
    assert -1 in {client.pttl(old), client.pttl(f"{store.prefix}:active")}
    process = up(run_router(site.server, QUICK, **env))
    eventually(lambda: control.reports(store))
    for key in keys():
        client.expire(key, 5)
    control.keep_while_routers_report(store, store.read())
    assert min(left()) > 50
    # keys that the router restores expire, too
    client.delete(f"{store.prefix}:active", f"{store.prefix}:store", f"{store.prefix}:promoted")
    store.announce()
    eventually(lambda: client.get(f"{store.prefix}:active") == "old")
    assert min(left()) > 0
    assert max(left()) <= 60
    process.stop()
    eventually(lambda: not control.reports(store))
    for key in keys():
        client.expire(key, 5)
    control.keep_while_routers_report(store, store.read())
    assert max(left()) <= 5


def test_an_originals_keys_do_not_expire(site: Site, run_router: Callable[..., Process]) -> None:
    site.control("claim", "--owner", "e/one")
    up(run_router(site.server, QUICK))
    eventually(lambda: control.reports(site.store))
    control.keep_while_routers_report(site.store, site.store.read())
    keys = [k for k in site.server.client.scan_iter("*") if ":router:" not in k]
    assert {site.server.client.pttl(key) for key in keys} == {-1}


def test_sessions_of_a_copy_expire() -> None:
    env = {contract.SESSION_SCOPE: "e-copy", contract.KEY_TTL: "3600"}
    store = RailwaySessionStore("redis://x", env=env, prefix="shop:")
    assert (store.prefix, store._ends) == ("shop:e-copy", 3600)
    store.ttl = 60
    assert store._ends == 60
    store.ttl = 7200
    assert store._ends == 3600
    for env in ({}, {contract.KEY_TTL: "3600"}):
        assert RailwaySessionStore("redis://x", env=env).prefix == "pulse:session"
        assert RailwaySessionStore("redis://x", env=env)._ends is None
