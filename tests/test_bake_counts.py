"""What routers count while a deployment bakes: whose requests, and which of them have failed."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import control
import router
from pulse_railway.flows import bake
from tests.conftest import Process, Redis
from tests.net import Backend, Connection, ask, eventually, header, ok

Run = Callable[..., Process]
# far from what a busy machine adds
QUICK = {"report_seconds": 0.1, "gave_up_seconds": 1.0, "short_tunnel_seconds": 5.0}
SOCKET = (
    b"GET /%b HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nx-real-ip: %b\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)


HANGING = threading.Event()  # ends it


def serve(connection: Connection) -> None:
    """Answer by path, as a version with several faults does."""
    while head := connection.head():
        path = head.split(b" ")[1].partition(b"?")[0]
        connection.read(int(header(head, "content-length") or 0))
        if b"upgrade: websocket" in head.lower():
            connection.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n")
            connection.send(b"upgrade: websocket\r\n\r\n")
            if path == b"/leaves":
                frame = connection.read(8)  # the client's Close, which a server answers and closes
                connection.send(b"\x88\x02" + frame[6:])  # its mask is zeros
            elif path != b"/short":
                connection.rest()
            return
        if path == b"/broken":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nten bytes.")
            return
        if path == b"/mute":
            return
        if path == b"/silent":
            connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n")
            connection.rest()
            return
        if path == b"/late":
            time.sleep(2.0)
        if path == b"/hang":
            HANGING.wait(20)
        status = "500 Internal Server Error" if path == b"/500" else "200 OK"
        status = "404 Not Found" if path.startswith(b"/assets/old") else status
        connection.send(ok(b"new", status=status))


class Baking:
    """`new` bakes beside `old`, behind routers that a test starts."""

    def __init__(self, server: Redis, run_router: Run, new: Backend, old: Backend) -> None:
        self.server, self.run_router, self.new, self.old = server, run_router, new, old
        self.store = router.RedisStore(server.url, "pulse:railway")
        server.deployment("old", old.address, registered_at=1, promoted_at=2)
        server.deployment("new", new.address, "pending", registered_at=3)
        self.routers = [self.start()]

    def start(self, limits: dict[str, float] | None = None) -> Process:
        process = self.run_router(
            self.server, QUICK | (limits or {}), PULSE_RAILWAY_INTERNAL_TOKEN="let-me-in"
        )
        eventually(lambda: ask(process.port, "/healthz").status == 200)
        return process

    def promote(self, seconds: float = 60, latency_ms: float | None = None) -> None:
        def step(routing: router.Routing) -> router.Routing:
            return control.set_active(
                routing, "new", "new", [], bake=seconds, bake_latency_ms=latency_ms
            )

        self.store.apply(step)
        eventually(lambda: self.selected(self.routers[0]) == "new")

    def selected(self, process: Process) -> str | None:
        return ask(process.port, "/_pulse/meta").header("x-pulse-selected-deployment")

    def ask(self, target: str, address: str = "10.0.0.1", port: int = 0, *more: str) -> int:
        port = port or self.routers[0].port
        return ask(port, target, f"x-real-ip: {address}", *more).status

    def sample(self, name: str = "new") -> bake.Sample:
        found = control.bake_answer(self.store, self.store.read())
        assert found is not None
        return bake.sample(found["samples"].get(name))

    def counts(self, name: str = "new") -> tuple[int, dict[str, int]]:
        sample = self.sample(name)
        return sample.requests, dict(sample.kinds)

    def tally(self, name: str) -> bake.Count:
        return bake.history(control.reports(self.store), name)


@pytest.fixture
def baking(redis_server: Redis, run_router: Run) -> Iterator[Baking]:
    with Backend(handle=serve) as new, Backend(ok(b"old")) as old:
        yield Baking(redis_server, run_router, new, old)


def test_both_versions_count_from_the_bakes_beginning(baking: Baking) -> None:
    for path in ("/", "/500?pulse_deployment=new", "/500?pulse_deployment=old"):
        baking.ask(path)
    assert control.bake_answer(baking.store, baking.store.read()) is None
    baking.promote()
    found = control.bake_answer(baking.store, baking.store.read())
    assert found
    assert (found["deployment_id"], found["old"]) == ("new", "old")
    assert 59 < found["until"] - found["since"] < 61
    baking.ask("/")
    baking.ask("/500")
    baking.ask("/?pulse_deployment=old")  # a tab of the old version
    eventually(lambda: baking.counts() == (2, {"5xx": 1}))
    eventually(lambda: baking.counts("old") == (1, {}))
    # the next bake begins anew, and without one nothing is counted
    baking.store.apply(lambda routing: control.finish_bake(routing, "new"))
    baking.store.apply(lambda routing: control.set_active(routing, "new", "new", [], bake=60))
    eventually(lambda: baking.ask("/") == 200 and baking.sample().requests > 0)
    assert baking.counts()[1] == {}


def test_a_stranger_who_names_the_new_version_does_not_count(baking: Baking) -> None:
    baking.promote()
    for _ in range(20):
        assert baking.ask("/500?pulse_deployment=new", "10.6.6.6") == 500
    for path in ("/_pulse/meta", "/_pulse/health"):
        baking.ask(path)
    baking.ask("/500", "10.6.6.6", 0, "x-pulse-railway-internal-token: let-me-in")
    assert baking.ask("/", "10.0.0.1") == 200
    # a visitor's tab counts, whose page came without affinity
    assert baking.ask("/500?pulse_deployment=new", "10.0.0.1") == 500
    eventually(lambda: baking.counts() == (2, {"5xx": 1}))
    assert baking.sample().visitors == 1


def test_clients_are_told_apart_by_address(baking: Baking) -> None:
    baking.promote()
    same = ["fd12:0:0:1::1", "fd12::1:0:0:0:2", "10.0.0.9", "::ffff:10.0.0.9", "10.0.0.9"]
    for address in (*same, "fd12::2:0:0:0:1", "no address"):
        baking.ask("/", address)
    eventually(lambda: baking.counts() == (7, {}))
    assert baking.sample().visitors == 4
    key = next(baking.server.client.scan_iter("pulse:railway:bake:*"))
    written = "".join(baking.server.client.hvals(key))  # type: ignore[arg-type]
    assert "10.0.0.9" not in written
    assert 0 < baking.server.client.ttl(key) <= router.BAKE_TTL


def test_each_kind_of_failure_counts_once(baking: Baking) -> None:
    baking.promote(latency_ms=1000)
    port = baking.routers[0].port
    for path in ("/", "/500", "/mute", "/broken", "/broken", "/late"):
        baking.ask(path)
    for path, patience in (("/silent", 2.0), ("/silent", 0.05)):  # the second has not waited
        with Connection.to(port) as connection:
            connection.send(
                f"GET {path} HTTP/1.1\r\nhost: x\r\nx-real-ip: 10.0.0.1\r\n\r\n".encode()
            )
            time.sleep(patience)
    for short in (True, False):
        with Connection.to(port) as tab:
            tab.send(SOCKET % (b"short" if short else b"long", b"10.0.0.1"))
            assert b" 101 " in tab.head()
            if short:
                tab.rest()
    failed = {"5xx": 1, "lost": 1, "broken_off": 2, "gave_up": 1, "short_socket": 1}
    eventually(lambda: baking.counts() == (9, failed))
    assert baking.sample().slow == 2  # the late one, and the one that gave up
    assert sum(baking.sample().seconds) == 4  # the good ones, and the short socket's 101
    # the counters since the start count each once, too
    eventually(lambda: baking.tally("new").failed == 6)
    time.sleep(0.3)
    assert baking.tally("new").failed == 6


def test_broken_answers_are_40_of_40(baking: Baking) -> None:
    for _ in range(40):
        baking.ask("/broken?pulse_deployment=new")
    eventually(lambda: baking.tally("new") == bake.Count(40, 40))


def test_an_asset_of_another_deployment_is_no_404_of_this_one(baking: Baking) -> None:
    baking.promote()
    for n in range(5):
        assert baking.ask(f"/assets/old-{n}.js") == 200
    eventually(lambda: baking.tally("old").requests >= 5)
    reports = control.reports(baking.store)
    assert sum(report["tallies"].get("new", [[0] * 10])[0][4] for report in reports) == 0


def test_visitors_given_away_count_once(baking: Baking) -> None:
    baking.promote()
    baking.new.stop()
    for _ in range(8):
        assert baking.ask("/") == 200  # from the old version
    eventually(lambda: baking.counts() == (8, {"refused": 8}))
    eventually(lambda: baking.tally("new").failed == 8)


def test_sums_hold_over_restarts_of_routers(baking: Baking) -> None:
    """One that is stopped has written all that it has counted; a killed one, its last report."""
    baking.promote()
    seen = [baking.counts()[0]]
    for number in (signal.SIGTERM, signal.SIGKILL):
        late = baking.start({"report_seconds": 600.0} if number == signal.SIGTERM else None)
        eventually(lambda late=late: baking.selected(late) == "new")  # type: ignore[misc]
        for _ in range(10):
            assert baking.ask("/500", "10.0.0.1", late.port) == 500
        if number == signal.SIGKILL:
            eventually(lambda: baking.counts()[0] == 20)
        late.stop(number)
        seen.append(baking.counts()[0])
    baking.ask("/", "10.0.0.1")
    eventually(lambda: baking.counts() == (21, {"5xx": 20}))
    assert seen == [0, 10, 20]
    assert baking.sample().visitors == 1  # the same one, at three routers


def test_the_table_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = router.Watch(
        router.Record("new", bake=router.Bake(60.0, 0.0, "old")), router.DEFAULT_LIMITS
    )
    to: Any = router.Deployment("new", "active", "h", 1, b"")

    class Request:
        path, affinity_id, address = b"/", b"", ""

        def values(self, _: bytes) -> list[bytes]:
            return []

    request: Any = Request()
    for number in range(router.ADDRESSES + 500):
        monkeypatch.setattr(router, "client_address", lambda _, n=number: b"%d" % n)
        counted = watch.count(request, to, "5xx" if number % 2 else "", 0.0)
        assert bool(counted) == (number < router.ADDRESSES)  # one address among the rest decided
    assert len(watch.samples["new"].by_address) == router.ADDRESSES
    sample = watch.json()["new"]
    assert sample["requests"] == router.ADDRESSES
    assert len(sample["addresses"]) <= 3 * router.ADDRESSES_REPORTED
    assert len(json.dumps(sample)) < 1200


def test_a_bake_lasts_its_time_whatever_the_clocks_say() -> None:
    """The store's clock is 90 minutes ahead of the router's, or behind."""
    for now in (time.time() + 5400, time.time() - 5400):
        record = router.Record("new", bake=router.Bake(now + 60, now, "old"))
        left = router.Watch(record, router.DEFAULT_LIMITS).ends - time.monotonic()
        assert 60 < left <= 60 + router.DEFAULT_LIMITS.watch_grace_seconds


def test_what_is_no_sample_in_the_store_is_left_out(baking: Baking) -> None:
    baking.promote()
    baking.ask("/")
    eventually(lambda: baking.counts() == (1, {}))
    (key,) = baking.server.client.scan_iter("pulse:railway:bake:*")
    for text in ("junk", "[]", '{"new": 7}', '{"new": {"requests": -5}}', "1" * 1_000_000):
        baking.server.client.hset(key, "other", text)
        assert baking.counts() == (1, {})
    baking.server.client.set(key, "x")
    assert baking.counts() == (0, {})


def test_a_bake_that_nobody_ends_is_counted_for_its_time(baking: Baking) -> None:
    baking.routers = [baking.start({"watch_grace_seconds": 0.0})]
    baking.promote(0.5)
    port = baking.routers[0].port
    time.sleep(0.8)
    before = baking.counts()[0]
    for _ in range(5):
        assert baking.ask("/", "10.0.0.1", port) == 200
    time.sleep(0.5)
    assert baking.counts()[0] == before


def test_a_bake_of_an_earlier_version_is_not_counted() -> None:
    """Its record does not say when it began."""
    for stored in ({"until": 9e9}, {"until": 9e9, "since": 0}):
        record = router.parse_record("a", json.dumps({"state": "active", "bake": stored}))
        assert record.bake
        assert record.bake.until == 9e9
        assert router.Routing(active="a", records={"a": record}).baking is None
        assert record.json()["bake"] == {"until": 9e9}
    broken = router.parse_record("a", json.dumps({"bake": {"until": 9e9, "since": "x"}}))
    assert (broken.bake, broken.ignored) == (None, ("bake",))


def test_a_page_that_hangs_has_failed_until_it_is_answered(baking: Baking) -> None:
    """Before, a version whose pages all hung was well: only ended requests counted."""
    HANGING.clear()
    baking.routers.append(baking.start({"hung_seconds": 0.2}))
    baking.promote()
    port = baking.routers[1].port
    eventually(lambda: baking.selected(baking.routers[1]) == "new")
    with Connection.to(port) as page, Connection.to(port) as poll:
        line = b"GET /hang HTTP/1.1\r\nhost: x\r\nx-real-ip: 10.0.0.1\r\n"
        page.send(line + b"accept: text/html\r\n\r\n")
        poll.send(line + b"accept: */*\r\n\r\n")  # long polling is meant to wait
        eventually(lambda: baking.counts() == (1, {"hung": 1}))
        HANGING.set()
        assert b" 200 " in page.head()
        assert b" 200 " in poll.head()
    eventually(lambda: baking.counts() == (2, {}))


def test_a_visitor_who_leaves_with_a_close_frame_is_no_failure(baking: Baking) -> None:
    """By RFC 6455 the server then closes first, as one that fails does."""
    baking.promote()
    with Connection.to(baking.routers[0].port) as tab:
        tab.send(SOCKET % (b"leaves", b"10.0.0.1"))
        assert b" 101 " in tab.head()
        tab.send(b"\x88\x82\0\0\0\0\x03\xe9")
        assert tab.rest().startswith(b"\x88")
    baking.ask("/")
    eventually(lambda: baking.counts() == (2, {}))
    assert baking.tally("new").failed == 0


@pytest.mark.parametrize(
    ("data", "close"),
    [
        (b"\x88\x80mask", True),
        (b"\x81\x85maskhello" + b"\x88\x87maskxxGoing"[:13], True),
        (b"\x88\xfdmask" + b"x" * 125, True),
        (b"\x81\x85maskhello", False),
        (b"\x88\x80mask\x81\x85maskhello", False),  # no frame follows a Close
        (b"\x88", False),
        (b"", False),
    ],
)
def test_what_ends_with_a_close_frame(data: bytes, close: bool) -> None:
    assert router.ends_with_close(data) == close


def test_a_bake_goes_on_with_its_counts_after_a_canarys(baking: Baking) -> None:
    """Its router has once begun anew, and written that over what it had counted."""
    baking.promote()
    for _ in range(3):
        baking.ask("/500")
    eventually(lambda: baking.counts() == (3, {"5xx": 3}))
    with Backend(ok(b"canary")) as canary:
        baking.server.deployment("canary", canary.address, "pending", registered_at=4)
        baking.store.apply(
            lambda routing: control.set_canary_weight(routing, "canary", "canary", 0.0, bake=60)
        )
        eventually(
            lambda: (
                (control.bake_answer(baking.store, baking.store.read()) or {}).get("deployment_id")
                == "canary"
            )
        )
        time.sleep(0.3)
        baking.store.apply(lambda routing: control.finish_bake(routing, "canary"))
        eventually(lambda: baking.counts() == (3, {"5xx": 3}))
        time.sleep(0.3)
        baking.ask("/")
        eventually(lambda: baking.counts() == (4, {"5xx": 3}))
