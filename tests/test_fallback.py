"""New visitors while the active deployment cannot be connected to: they get the one before it."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import control
import router
from tests.conftest import Process, Redis
from tests.net import Answer, Backend, Connection, ask, eventually, ok, read_answer

Run = Callable[..., Process]
BRIEF = {
    "breaker_connect_seconds": 1.0,
    "breaker_probe_seconds": 0.1,
    "breaker_close_seconds": 0.4,
    "report_seconds": 0.1,
}
HISTORY = ":history"


class Stage:
    """Two versions behind a router: `old` was active before `new`."""

    def __init__(self, redis: Redis, run_router: Run) -> None:
        self.redis, self.run_router = redis, run_router
        self.old, self.new = Backend(ok(b"old")), Backend(ok(b"new"))
        self.router: Process

    def record(self, name: str, backend: Backend, state: str, at: int, **fields: Any) -> None:
        times = {"registered_at": at, "promoted_at": at + 0.5} | fields
        self.redis.deployment(name, backend.address, state, **times)

    def start(self, limits: dict[str, float] | None = None, **env: str) -> None:
        self.record("old", self.old, "draining", 1)
        self.record("new", self.new, "active", 2)
        self.router = self.run_router(self.redis, {**BRIEF, **(limits or {})}, **env)
        eventually(lambda: self.page().body == b"new")

    def page(self, *lines: str, target: str = "/") -> Answer:
        return ask(self.router.port, target, *lines)

    def report(self) -> dict[str, Any]:
        (report,) = control.reports(router.RedisStore(self.redis.url, "pulse:railway"))
        return report

    def apply(self, step: Callable[[router.Routing], router.Routing]) -> None:
        router.RedisStore(self.redis.url, "pulse:railway").apply(step)


@pytest.fixture
def stage(redis_server: Redis, run_router: Run) -> Iterator[Stage]:
    stage = Stage(redis_server, run_router)
    yield stage
    stage.old.stop()
    stage.new.stop()


def test_new_visitors_get_the_fallback_while_the_active_deployment_is_down(stage: Stage) -> None:
    stage.start()
    stage.new.stop()
    answer = stage.page()
    assert (answer.body, answer.header("x-pulse-selected-deployment")) == (b"old", "old")
    assert ask(stage.router.port, "/", method="POST", body=b"x").body == b"old"
    # who asks about the active one gets its error
    for target in ("/?pulse_deployment=new", "/_pulse/meta", "/_pulse/health"):
        assert stage.page(target=target).status == 502, target
    eventually(lambda: stage.report().get("fallback") == "old")
    eventually(lambda: stage.report()["tallies"]["new"][1] == 2)  # the page and the form
    for _ in range(5):  # each is a failure of the active one, once
        assert stage.page().body == b"old"
    eventually(lambda: stage.report()["tallies"]["new"][1] == 7)
    # it is back for a while
    began = time.monotonic()
    stage.new.start()
    eventually(lambda: stage.page().body == b"new")
    assert time.monotonic() - began > BRIEF["breaker_close_seconds"] / 2
    eventually(lambda: "fallback" not in stage.report())
    log = stage.router.output()
    assert log.count("new cannot be connected to") == log.count("new can be connected to") == 1


def test_a_router_reports_the_fallback_at_once(stage: Stage) -> None:
    """`delete` and `status` go by the report."""
    stage.start({"report_seconds": 30.0})
    stage.new.stop()
    assert stage.page().body == b"old"
    eventually(lambda: stage.report().get("fallback") == "old")


def test_the_fallback_ends_with_the_next_promotion(stage: Stage) -> None:
    stage.start()
    stage.new.stop()
    assert stage.page().body == b"old"
    with Backend(ok(b"newest")) as newest:
        stage.record("newest", newest, "pending", 3)
        stage.apply(lambda routing: control.set_active(routing, "newest", "newest", []))
        eventually(lambda: stage.page().body == b"newest")


def test_every_visitor_is_served_while_the_active_deployment_flaps(stage: Stage) -> None:
    """Up and down ten times: every visitor is served."""
    stage.start({"breaker_close_seconds": 0.1})
    seen = set()
    for turn in range(10):
        (stage.new.start if turn % 2 else stage.new.stop)()
        for _ in range(15):
            answer = stage.page()
            assert answer.status == 200
            seen.add(answer.body)
            time.sleep(0.01)
    eventually(lambda: stage.page().body == b"new")
    assert b"old" in seen


def test_a_connection_that_is_never_answered_delays_only_the_first_visitor(stage: Stage) -> None:
    """A connection that is never answered costs the first visitor a moment, the others nothing."""
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # its queue is full: SYNs are dropped
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(hole.getsockname())
        time.sleep(0.1)
        stage.start()
        stage.new.stop()
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        stage.redis.deployment("new", address, "active", registered_at=2, promoted_at=2.5)
        began = time.monotonic()
        eventually(lambda: b"new" not in stage.page().body)
        assert time.monotonic() - began < router.DEFAULT_LIMITS.connect_seconds
        began = time.monotonic()
        assert [stage.page().body for _ in range(10)] == [b"old"] * 10
        assert time.monotonic() - began < 10 * BRIEF["breaker_connect_seconds"] / 2


def test_there_is_no_second_fallback(stage: Stage) -> None:
    with Backend(ok(b"oldest")) as oldest:
        stage.record("oldest", oldest, "draining", 0)
        stage.start()
        stage.new.stop()
        stage.old.stop()
        for _ in range(3):  # the breaker is open from the second on: the same answer
            answer = stage.page()
            assert (answer.status, answer.header("x-pulse-selected-deployment")) == (502, "new")
            assert answer.json == {"detail": "the deployment refuses connections"}
        assert stage.page(target="/?pulse_deployment=old").header(
            "x-pulse-selected-deployment"
        ) == ("old")
        eventually(lambda: stage.report()["tallies"]["new"][1] == 2)  # given away, counted once


def test_the_fallback_answers_when_canary_and_active_deployment_are_down(stage: Stage) -> None:
    with Backend(ok(b"canary")) as canary:
        stage.record("canary", canary, "pending", 3, weight=100, promoted_at=None)
        stage.record("old", stage.old, "draining", 1)
        stage.record("new", stage.new, "active", 2)
        stage.router = stage.run_router(stage.redis, BRIEF)
        eventually(lambda: stage.page().body == b"canary")
        canary.stop()
        assert stage.page().body == b"new"
        stage.new.stop()
        assert stage.page().body == b"old"


def test_maintenance_wins_over_the_fallback(stage: Stage) -> None:
    stage.start()
    stage.new.stop()
    assert stage.page().body == b"old"
    stage.redis.client.set("pulse:railway:maintenance", '{"since": 1}')
    stage.redis.client.publish("pulse:railway:events", "[]")
    eventually(lambda: stage.page().status == 503)


def test_the_fallback_can_be_turned_off(stage: Stage) -> None:
    stage.start(PULSE_RAILWAY_ROUTER_FALLBACK="off")
    stage.new.stop()
    assert stage.page().status == 502


def test_a_router_without_descriptors_does_not_use_the_fallback(stage: Stage) -> None:
    stage.start()
    pid = stage.router.popen.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with Connection.to(stage.router.port) as c:
        stage.new.stop()  # the pooled connection ends, so that a new one is needed
        stage.new.start()
        eventually(lambda: [stage.report()[key] for key in ("pooled", "clients")] == [0, 1])
        used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        free = min(set(range(1000)) - used)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
        c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = read_answer(c)
        assert (answer.status, answer.json) == (
            503,
            {"detail": "the router cannot open a connection"},
        )
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_answer(c).body == b"new"


def routing(active: str, *records: router.Record, last: str = "promote") -> router.Routing:
    return router.Routing(
        active=active,
        records={record.deployment_id: record for record in records},
        history=({"what": "promote"}, {"what": last}, {"what": "register"}),
    )


def test_the_fallback_is_the_deployment_that_was_active_before() -> None:
    def record(name: str, at: float, state: str = "draining", **fields: Any) -> router.Record:
        return router.Record(name, state, registered_at=at, promoted_at=at, **fields)

    a, b, c = record("a", 1), record("b", 2), record("c", 3, "active")

    def fallback(*others: router.Record, active: str = "c", last: str = "promote") -> str | None:
        found = routing(active, *others, last=last).fallback
        return found.deployment_id if found else None

    assert fallback(a, b, c) == "b"
    assert fallback(a, record("b", 2, rejected_at=4.0), c) == "a"
    assert fallback(a, record("b", 2, retiring_at=4.0), c) == "a"
    assert fallback(a, record("b", 2, "pending", pinned=True), c) == "a"
    # after a rollback from c to b: neither c, which is newer, nor one that was never promoted
    assert fallback(a, record("b", 2, "active"), record("c", 3), active="b") == "a"
    never = router.Record("b", "draining", registered_at=2.0)
    assert fallback(a, never, c) == "a"
    assert fallback(a, b, c, last="restore") is None
    assert fallback(c) is None
