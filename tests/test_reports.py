"""What routers say of themselves, and the control commands that wait until all of them serve a
change."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import Process, Redis
from tests.net import Backend, ask, eventually, ok
from tests.scene import PREFIX, QUICK, Site, control, page, redis_limited, router, up

Run = Callable[..., Process]


def reports(server: Redis) -> dict[str, dict[str, Any]]:
    """By router."""
    client = server.client
    keys = list(client.scan_iter(f"{PREFIX}:router:*"))
    values = client.mget(keys) if keys else []
    return {k.rpartition(":")[2]: json.loads(str(v)) for k, v in zip(keys, values, strict=True)}


def report_of(site: Site) -> tuple[str, dict[str, Any]]:
    """The one router's name, and what it says."""
    eventually(lambda: len(reports(site.server)) == 1)
    return next(iter(reports(site.server).items()))


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    os.killpg(process.popen.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process.popen.pid, signal.SIGCONT)


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The last control command's answer."""
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_report(site: Site, run_router: Run) -> None:
    process = up(run_router(site.server))
    name, found = report_of(site)
    assert found["router"] == name
    assert found["version"] == router.runtime_version()
    assert (found["active"], found["epoch"]) == ("new", site.store.read().epoch)
    assert abs(found["since"] - time.time()) < 5
    assert found["in_flight"] == {}
    assert 100 < site.server.client.ttl(f"{PREFIX}:router:{name}") <= router.REPORT_LEASE
    assert process.stop() == 0
    assert reports(site.server) == {}  # nobody waits for it


def test_a_new_epoch_is_reported_at_once(site: Site, run_router: Run) -> None:
    up(run_router(site.server))
    before = report_of(site)[1]
    time.sleep(0.1)
    began = time.monotonic()
    assert site.promote("old") == 0
    assert time.monotonic() - began < 0.5
    after = report_of(site)[1]
    assert (after["epoch"], after["active"]) == (site.store.read().epoch, "old")
    assert after["since"] > before["since"]


def test_counters_are_reported_soon_and_nothing_else_is(site: Site, run_router: Run) -> None:
    quick = {"report_seconds": 0.5, "report_idle_seconds": 4.0}
    process = up(run_router(site.server, quick))
    name, _ = report_of(site)
    key = f"{PREFIX}:router:{name}"
    client = site.server.client

    def sets() -> int:
        return int(client.info("commandstats").get("cmdstat_set", {}).get("calls", 0))

    time.sleep(1.2)
    before = sets()
    time.sleep(2.4)
    assert sets() - before <= 1  # idle, though time passes
    for n in range(3):
        ask(process.port)
        requests = json.loads(str(client.get(key)))["requests"]
        eventually(lambda r=requests: json.loads(str(client.get(key)))["requests"] > r, 2)  # type: ignore[misc]
        assert n < sets() - before


def test_a_name_is_new_at_each_start(site: Site, run_router: Run) -> None:
    names = set()
    for _ in range(2):
        process = up(run_router(site.server, RAILWAY_REPLICA_ID="replica"))
        name, _ = report_of(site)
        assert name.startswith("replica-")
        names.add(name)
        process.stop()
        eventually(lambda: reports(site.server) == {})
    assert len(names) == 2


def test_an_idle_router_asks_redis_for_little(redis_server: Redis, run_router: Run) -> None:
    """At most 35 commands in five minutes, beside 100,000 keys of others: 10,000 a day. Its times
    are a thirtieth of what they are, so that ten seconds stand for five minutes."""
    faster = 30.0
    names = [f"{name}_seconds" for name in ("refresh", "report", "report_idle", "scan_step")]
    quick = {name: getattr(router.DEFAULT_LIMITS, name) / faster for name in names}
    client = redis_server.client
    client.eval("for i = 1, 100000 do redis.call('SET', 'session:' .. i, '{}') end", 0)

    def commands() -> dict[str, int]:
        found = {n: s["calls"] for n, s in client.info("commandstats").items()}
        return {n: c for n, c in found.items() if n not in ("cmdstat_info", "cmdstat_eval")}

    with Backend(ok(b"a")) as a:
        redis_server.deployment("a", a.address)
        process = up(run_router(redis_server, quick))
        time.sleep(1)
        before = commands()
        time.sleep(300 / faster)
        after = commands()
        made = {name: n - before.get(name, 0) for name, n in after.items()}
        assert sum(made.values()) <= 35, made
        assert sum(made.values()) > 20, "it reads and reports"
        assert page(process) == (200, b"a")


# -- who is waited for ---------------------------------------------------------------------------


def test_a_promotion_waits_until_every_router_serves_it(
    site: Site, run_router: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = [up(run_router(site.server)) for _ in range(3)]
    eventually(lambda: len(reports(site.server)) == 3)
    for name in ("old", "new", "old"):
        assert site.promote(name) == 0
        assert {page(process)[1] for process in processes} == {name.encode()}  # at once
        answer = said(capsys)
        assert answer["behind"] == []
        assert {r["router"] for r in answer["routers"]} == set(reports(site.server))
        epoch = site.store.read().epoch
        assert [r["epoch"] for r in answer["routers"]] == [epoch] * 3
        assert {r["version"] for r in answer["routers"]} == {router.runtime_version()}


def test_a_promotion_names_who_does_not_serve_it(
    site: Site, run_router: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    first = up(run_router(site.server))
    name, _ = report_of(site)
    second = up(run_router(site.server))
    eventually(lambda: len(reports(site.server)) == 2)
    with stopped(first):
        began = time.monotonic()
        assert site.promote("old") == 0
        took = time.monotonic() - began
        assert control.REPORT_WAIT <= took < control.REPORT_WAIT + 1
        assert said(capsys)["behind"] == [name]
        assert page(second) == (200, b"old")
    eventually(lambda: page(first) == (200, b"old"))
    assert site.promote("new") == 0
    assert said(capsys)["behind"] == []


def test_one_that_is_silent_for_a_minute_holds_no_promotion_up(
    site: Site, run_router: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    up(run_router(site.server))
    report_of(site)
    text = json.dumps({"epoch": 1})
    site.server.client.set(f"{PREFIX}:router:silent", text, ex=router.REPORT_LEASE - 61)
    began = time.monotonic()
    assert site.promote("old") == 0
    assert time.monotonic() - began < 1
    assert said(capsys)["behind"] == []
    assert site.control("retire", "--deployment-id", "new") == 0
    assert said(capsys)["behind"] == ["silent"]  # until its lease ends


def test_a_retirement_is_behind_while_a_router_is(
    site: Site, run_router: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    process = up(run_router(site.server))
    name, _ = report_of(site)
    with stopped(process):
        assert site.control("retire", "--deployment-id", "old") == 0
        assert said(capsys)["behind"] == [name]
    eventually(lambda: page(process, "old")[0] == 409)
    assert site.control("retire", "--deployment-id", "old") == 0  # asked again
    assert said(capsys)["behind"] == []


def test_a_router_of_another_version(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """It reports no epoch: a promotion names it and does not wait for it; for a deletion it has
    read the state after 30 s."""
    site.server.client.set(f"{PREFIX}:router:old-one", json.dumps({"requests": 7}), ex=15)
    began = time.monotonic()
    assert site.promote("old") == 0
    assert time.monotonic() - began < 5  # of REPORT_WAIT's ten
    answer = said(capsys)
    assert answer["behind"] == ["old-one"]
    assert answer["routers"][0]["version"] is None
    assert site.control("retire", "--deployment-id", "new") == 0
    assert said(capsys)["behind"] == ["old-one"]
    retired = {**site.record("new"), "retiring_at": time.time() - 31}
    site.server.client.set(f"{PREFIX}:deployment:new", json.dumps(retired))
    assert site.control("retire", "--deployment-id", "new") == 0
    assert said(capsys)["behind"] == []


@pytest.mark.parametrize(
    "text",
    ["[]", "junk", '{"epoch": "1", "in_flight": [7]}', "{}", '{"requests": "x", "tallies": 1}'],
)
def test_a_report_that_is_none_holds_nothing_up(
    site: Site, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    site.server.client.set(f"{PREFIX}:router:odd", text, ex=60)
    assert site.promote("old") == 0
    assert site.control("status") == 0
    assert said(capsys)["ok"] is True


NEVER_ENDING: dict[str, Callable[[Any, str], object]] = {
    "no lease": lambda client, key: client.set(key, '{"epoch": 1}'),
    "a lease of years": lambda client, key: client.set(key, '{"epoch": 1}', ex=10**8),
    "a list": lambda client, key: client.lpush(key, "x"),
}


@pytest.mark.parametrize("damage", NEVER_ENDING)
def test_what_never_ends_is_no_router_and_no_lock(
    site: Site, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Before, deletions waited for it for ever, promotions for 10 to 19 s, and a list was answered
    with "Redis does not answer"."""
    odd, lock = f"{PREFIX}:router:odd", f"{PREFIX}:janitor:lock"
    for key in (odd, lock):
        NEVER_ENDING[damage](site.server.client, key)
    began = time.monotonic()
    assert site.promote("old") == 0
    assert said(capsys)["behind"] == []
    assert site.control("retire", "--deployment-id", "new") == 0
    assert said(capsys)["behind"] == []
    assert time.monotonic() - began < 1
    assert not site.server.client.exists(lock)
    assert site.control("status") == 0
    answer = said(capsys)
    assert (answer["routers"], answer["reports_without_lease"]) == ([], [odd])
    assert site.server.client.exists(odd), "it may be somebody's"


@pytest.mark.parametrize(
    "words",
    [
        ("active",),
        ("status",),
        ("promote", "--active-deployment-id", "old", "--active-service-name", "old"),
        ("retire", "--deployment-id", "old"),
        ("maintenance", "on"),
    ],
)
def test_a_redis_that_hangs_is_waited_for_in_bounds(
    site: Site,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(router, "store_from_env", redis_limited(0.3))
    site.server.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert site.control(*words) == 1
        took = time.monotonic() - began
    finally:
        site.server.signal(signal.SIGCONT)
    assert took < 2
    told = capsys.readouterr()
    assert told.err.strip() == "the router's Redis does not answer (TimeoutError)"
    assert json.loads(told.out.splitlines()[-1])["reason"] == "store"
    assert site.control(*words) == 0  # asked again


def test_it_goes_on_reporting_when_redis_was_away(site: Site, run_router: Run) -> None:
    up(run_router(site.server, QUICK))
    name, _ = report_of(site)
    site.server.stop()
    time.sleep(0.5)
    site.server.start()
    eventually(lambda: set(reports(site.server)) == {name}, 20)
    eventually(lambda: reports(site.server)[name]["active"] == "new")


def test_failures_in_a_row_are_reported(redis_server: Redis, run_router: Run) -> None:
    with Backend(ok(b"no", status="500 No")) as a:
        redis_server.deployment("a", a.address)
        started = run_router(redis_server, {"report_seconds": 0.1})
        store = router.RedisStore(redis_server.url, "pulse:railway")

        def failing() -> Any:
            return [report["failing"] for report in control.reports(store)]

        eventually(lambda: ask(started.port).status == 500)
        for _ in range(29):
            ask(started.port)
        eventually(lambda: failing() == [{"a": 30}])
        a.answer = ok(b"yes")
        ask(started.port)
        eventually(lambda: failing() == [{}])
        a.answer = ok(b"no", status="404 Not Found")
        ask(started.port)
        time.sleep(0.3)  # a count between the two
        a.stop()
        assert ask(started.port).status == 502
        eventually(lambda: failing() == [{"a": 1}])
