"""Deployments of several processes: their records, and which process gets a request."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse_railway import runtime_image
from tests.conftest import Process, Redis
from tests.net import Answer, Backend, Connection, ask, eventually, ok
from tests.scene import Site

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")
Run = Callable[..., Process]
NOW = 1_800_000_000.0
HTML, CHROME = "accept: text/html", "user-agent: Mozilla/5.0"
PAGE = "content-type: text/html; charset=utf-8"
TWO = {"2": {"address": "http://new.railway.internal:8001"}}


def parse(state: dict[str, Any]) -> Any:
    return router.parse(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in state.items()}, NOW
    )


# -- the record ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, {}, TWO, {"64": {"address": "http://h:9", "x": 1}}])
def test_a_record_keeps_its_instances(value: Any) -> None:
    record = router.parse_record("new", json.dumps({"instances": value}))
    assert (record.ignored, record.instances) == ((), value)
    assert record.json().get("instances") == value


@pytest.mark.parametrize(
    "value",
    [
        *(5, "x", [], True, {"2": None}, {"2": {}}, {"2": {"address": 5}}),
        *({number: {"address": "http://h:9"}} for number in ("0", "1", "65", "02", "x", "", "²")),
        {"2": {"address": "https://h:9"}},
        {"2": {"address": "http://h:9"}, "3": {"address": "http://"}},
    ],
)
def test_invalid_instances_are_ignored_kept_and_reported(value: Any) -> None:
    before = parse({":active": "new", ":deployment:new": {"instances": value, "state": "active"}})
    assert before.problems == ("new: instances not understood",)
    record = before.records["new"]
    assert (record.instances, record.json()["instances"]) == (None, value)
    assert record.url == "http://new.railway.internal:8000" or record.service_name is None


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.text() | st.sampled_from(["2", "3", "address"]), x
)))  # fmt: skip
def test_no_value_of_instances_breaks_a_table(value: Any) -> None:
    routing = parse(
        {":active": "new", ":deployment:new": {"address": "http://h:1", "instances": value}}
    )
    table = router.Table({})
    table.take_over(routing)
    assert table.active.host == "h"
    assert len(table.active.all) == 1 + len(routing.records["new"].instances or {})


def test_a_registration_writes_an_address_for_each_process() -> None:
    fields = {"service_name": "new", "service_id": "s", "address": "http://[fd12::1]:8000"}
    routing = control.add_record(parse({":active": "a"}), "new", instances=3, **fields)
    assert json.loads(router.changes(parse({}), routing)[":deployment:new"])["instances"] == {
        "2": {"address": "http://[fd12::1]:8001"},
        "3": {"address": "http://[fd12::1]:8002"},
    }
    again = control.add_record(routing, "new", **fields)
    assert again.records["new"].instances == routing.records["new"].instances
    assert control.add_record(again, "new", instances=1, **fields).records["new"].instances is None
    by_name = control.add_record(parse({}), "new", "new", instances=2)
    assert by_name.records["new"].instances == TWO


@pytest.mark.parametrize("number", ["0", "x", "-1", "65", "1.5", "", "²", "007"])
def test_a_registration_refuses_another_number(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["register", "--deployment-id", "new", "--service-name", "new"]
    with pytest.raises(SystemExit):
        control.control_parser().parse_args([*words, f"--instances={number}"])
    assert "expected a whole number from 1 to 64" in capsys.readouterr().err


def test_instances_come_back_when_an_older_janitor_writes_the_record() -> None:
    """0.3.x's janitor writes the active record with its four fields."""
    fields = {"address": "http://h:1", "instances": TWO, "state": "active", "service_name": "new"}
    full = {":active": "new", ":store": "s", ":epoch": "5", ":deployment:new": fields}
    known = parse(full)
    four = {"deployment_id": "new", "state": "active", "service_name": "new"}
    store = parse({**full, ":deployment:new": {**four, "drain_started_at": None}})
    for step in (lambda r: r, lambda r: control.set_active(r, "new", "new", [])):
        healed = router.repaired(step(store), known, "new-id")
        assert healed.records["new"].instances == TWO
    for lost in ({}, {":active": "new", ":store": "other"}):
        assert router.repaired(parse(lost), known, "x").records["new"].instances == TWO


def test_restore_fills_in_instances() -> None:
    store = parse({":active": "new", ":deployment:new": {"state": "active", "service_id": "s"}})
    running = router.parse_record("new", json.dumps({"service_id": "s", "instances": TWO}))
    rebuilt = control.rebuild_records(store, [running], "new", chosen=True)
    assert rebuilt.records["new"].instances == TWO


@pytest.mark.parametrize(("number", "count"), [("3", 3), ("1", 1), ("x", 1), ("65", 1), ("", 1)])
def test_the_janitor_rebuilds_them_from_the_services_variable(number: str, count: int) -> None:
    variables = {"PULSE_DEPLOYMENT_ID": "new", "PULSE_RAILWAY_INSTANCES": number}
    node = {
        "createdAt": "2026-01-01T00:00:00+00:00",
        "latestDeployment": None,
        "numReplicas": None,
    }
    service = janitor.ownership.ServiceVariables("s", "x-new", variables)
    record = janitor.backend(node, service).record()
    assert len(record.instances or {}) == count - 1
    if count == 3:
        assert record.instances["3"] == {"address": "http://x-new.railway.internal:8002"}


@given(st.binary(min_size=1, max_size=40), st.integers(2, 64))
def test_a_process_that_refuses_moves_its_own_visitors_only(visitor: bytes, count: int) -> None:
    table = router.Table({})
    at = router.instances_at("http://h:1", count)
    table.take_over(
        parse({":active": "n", ":deployment:n": {"address": "http://h:1", "instances": at}})
    )
    chosen = router.process_of(visitor, table.active)
    for process in table.active.processes:
        if process is not chosen:
            process.refused_until = math.inf
    assert router.process_of(visitor, table.active) is chosen
    for process in table.active.processes:
        process.refused_until = 0.0
    chosen.refused_until = math.inf
    assert router.process_of(visitor, table.active) is not chosen
    chosen.refused_until = 1.0  # it is over
    assert router.process_of(visitor, table.active) is chosen


def test_visitors_spread_evenly() -> None:
    for count in (2, 5, 64):
        found = collections.Counter(
            router.highest_hash(f"{n:016x}".encode(), b"new", count) for n in range(count * 400)
        )
        assert len(found) == count
        assert 300 < min(found.values()) <= max(found.values()) < 520


# -- in the router -------------------------------------------------------------------------------


class Stage:
    """`new` is active, with processes; `old` is draining, with two."""

    def __init__(self, redis: Redis, run_router: Run) -> None:
        self.redis, self.run_router = redis, run_router
        self.exit = contextlib.ExitStack()
        self.old = self.version("old", 2)
        self.new: list[Backend] = []
        self.router: Process

    def version(self, name: str, count: int) -> list[Backend]:
        made = [Backend(ok(f"{name}.{k}".encode(), PAGE)) for k in range(1, count + 1)]
        return [self.exit.enter_context(backend) for backend in made]

    def record(self, name: str, backends: list[Backend], state: str, **fields: Any) -> None:
        further = {str(k): {"address": b.address} for k, b in enumerate(backends[1:], 2)}
        more = {"instances": further} if further else {}
        self.redis.deployment(name, backends[0].address, state, **more, **fields)
        self.redis.client.publish("pulse:railway:events", json.dumps([f":deployment:{name}"]))

    def start(self, count: int = 3, limits: dict[str, float] | None = None, **env: str) -> None:
        self.new = self.version("new", count)
        self.record("old", self.old, "draining", registered_at=1, promoted_at=1)
        self.record("new", self.new, "active", registered_at=2, promoted_at=2)
        self.router = self.run_router(self.redis, limits, **env)
        eventually(lambda: self.ask("/").body.startswith(b"new."))

    def ask(self, target: str = "/", *lines: str) -> Answer:
        return ask(self.router.port, target, *lines)

    def body(self, target: str = "/", *lines: str) -> str:
        answer = self.ask(target, *lines)
        return answer.body.decode() if answer.status == 200 else str(answer.status)

    def report(self) -> dict[str, Any]:
        (report,) = control.reports(router.RedisStore(self.redis.url, "pulse:railway"))
        return dict(report)


@pytest.fixture
def stage(redis_server: Redis, run_router: Run) -> Iterator[Stage]:
    stage = Stage(redis_server, run_router)
    yield stage
    stage.exit.close()


def test_affinity_goes_to_its_process(stage: Stage) -> None:
    stage.start()
    expected = {
        "new": "new.1",
        "new.2": "new.2",
        "new.3": "new.3",
        "old": "old.1",
        "old.2": "old.2",
    }
    for name, process in expected.items():
        for _ in range(5):
            assert stage.body(f"/?pulse_deployment={name}") == process
            assert stage.body("/", f"x-pulse-deployment: {name}") == process
    assert stage.body("/?pulse_deployment=new%2e2") == "new.2"  # query encodings differ
    assert stage.body("/?pulse_deployment=old.2", "x-pulse-deployment: new.3") == "old.2"
    answer = stage.ask("/?pulse_deployment=new.3")
    # clients, and `deploy` of earlier versions, compare the header with the bare id
    assert answer.header("x-pulse-selected-deployment") == "new"
    assert 'pulse;desc="new.3"' in str(answer.header("server-timing"))  # affinity.js reads it
    assert 'pulse;desc="new"' in str(stage.ask("/?pulse_deployment=new").header("server-timing"))


@pytest.mark.parametrize("name", ["new.4", "new.1", "new.02", "new.x", "new.", "gone.2", "new.2.2"])
def test_an_unknown_process_is_stale_as_a_deployment_that_is_gone(stage: Stage, name: str) -> None:
    stage.start()
    for affinity in ([f"/?pulse_deployment={name}"], ["/", f"x-pulse-deployment: {name}"]):
        answer = stage.ask(*affinity)
        assert (answer.status, answer.header("x-pulse-stale-affinity")) == (409, "1")
    answer = stage.ask(f"/a?pulse_deployment={name}&b=1", HTML)
    assert (answer.status, answer.header("location")) == (302, "/a?b=1")


def test_a_process_of_a_deployment_just_registered_is_looked_up(stage: Stage) -> None:
    stage.start(limits={"refresh_seconds": 60.0, "lookup_seconds": 0.1})
    late = stage.version("late", 2)
    record = {"deployment_id": "late", "state": "pending", "address": late[0].address}
    instances = {"2": {"address": late[1].address}}
    key = "pulse:railway:deployment:late"
    stage.redis.client.set(key, json.dumps({**record, "instances": instances}))
    eventually(lambda: stage.body("/?pulse_deployment=late.2") == "late.2")


def cookie_of(answer: Answer) -> str:
    match = re.search(r"pulse_railway_visitor=([0-9a-f]{16});", str(answer.header("set-cookie")))
    assert match, answer.head
    return f"cookie: pulse_railway_visitor={match[1]}"


def test_a_browser_stays_on_the_process_of_its_first_page(stage: Stage) -> None:
    """The browsers of one address spread over all processes."""
    stage.start()
    found: collections.Counter[str] = collections.Counter()
    for _ in range(60):
        page = stage.ask("/", HTML, CHROME)
        assert "private" in str(page.header("cache-control"))  # it has a cookie of one visitor
        cookie = cookie_of(page)
        again = [stage.ask(path, cookie, *more) for path, *more in (
            ("/", HTML), ("/assets/a.js",), ("/api", "accept: application/json"),
        )]  # fmt: skip
        assert {answer.body for answer in again} == {page.body}
        assert again[0].header("set-cookie") is None
        found[page.body.decode()] += 1
    assert set(found) == {"new.1", "new.2", "new.3"}
    assert min(found.values()) >= 8


def test_a_first_page_goes_to_the_process_with_fewer_sockets(stage: Stage) -> None:
    stage.start(2)
    with contextlib.ExitStack() as sockets:
        for _ in range(20):
            sockets.enter_context(websocket(stage, "/?pulse_deployment=new"))
        found = collections.Counter(stage.body("/", HTML) for _ in range(60))
        # only where both ids are of the first process does it get the visitor: one in four
        assert found["new.2"] > found["new.1"] * 1.4
        eventually(lambda: stage.report()["instances"].get("new") == 20)
        assert stage.report()["instances"]["new.2"] == 0
    eventually(lambda: stage.report()["instances"]["new"] == 0, 20)


def websocket(stage: Stage, target: str) -> Connection:
    """Open a socket that a backend has accepted."""
    for backend in (*stage.new, *stage.old):
        backend.answer = (
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
        )
    connection = Connection.to(stage.router.port)
    key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
    lines = (
        f"GET {target} HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: websocket\r\n{key}"
    )
    connection.send(f"{lines}\r\n".encode())
    assert b" 101 " in connection.head()
    for k, backend in enumerate(stage.new, 1):
        backend.answer = ok(f"new.{k}".encode(), PAGE)
    for k, backend in enumerate(stage.old, 1):
        backend.answer = ok(f"old.{k}".encode(), PAGE)
    return connection


def test_what_is_no_page_goes_by_address_and_user_agent(stage: Stage) -> None:
    stage.start()
    found = set()
    for n in range(30):
        lines = (f"x-forwarded-for: 10.0.0.{n}", CHROME, "accept: */*")
        bodies = {stage.body("/api", *lines) for _ in range(3)}
        assert len(bodies) == 1
        assert stage.ask("/api", *lines).header("set-cookie") is None
        found |= bodies
    assert found == {"new.1", "new.2", "new.3"}


def test_one_process_sets_no_cookie_and_leaves_caches_alone(stage: Stage) -> None:
    stage.start(1)
    answer = stage.ask("/", HTML)
    assert answer.header("set-cookie") is None
    assert answer.header("cache-control") is None


def test_visitors_of_a_process_that_refuses_get_another(stage: Stage) -> None:
    stage.start(3, {"instance_pause_seconds": 0.6})
    cookies = [f"cookie: pulse_railway_visitor={n:016x}" for n in range(40)]
    before = {cookie: stage.body("/", cookie) for cookie in cookies}
    stage.new[1].stop()
    stage.body("/?pulse_deployment=new.2")  # ends the pooled connections
    after = {cookie: stage.body("/", cookie) for cookie in cookies}
    assert {after[c] for c, process in before.items() if process == "new.2"} == {"new.1", "new.3"}
    assert all(after[c] == process for c, process in before.items() if process != "new.2")
    for _ in range(20):
        assert stage.body("/", HTML) in ("new.1", "new.3")
    assert ask(stage.router.port, "/", cookies[0], method="POST", body=b"x").status == 200
    # a tab has its state there
    assert stage.body("/?pulse_deployment=new.2") == "502"
    assert stage.body("/?pulse_deployment=new.3") == "new.3"
    eventually(
        lambda: stage.report()["tallies"].get("new", [0, 9])[1] <= 2
    )  # no visitor's request failed
    stage.new[1].start()
    eventually(lambda: {c: stage.body("/", c) for c in cookies} == before)


def test_a_process_that_refuses_gets_no_newcomers_for_a_while(stage: Stage) -> None:
    stage.start(2, {"instance_pause_seconds": 60.0})
    stage.new[0].stop()
    for _ in range(20):
        assert stage.body("/", HTML) == "new.2"
    stage.new[0].start()
    connections = stage.new[0].connections
    for _ in range(20):
        assert stage.body("/", HTML) == "new.2"
    assert stage.new[0].connections == connections
    assert stage.body("/?pulse_deployment=new") == "new.1"


def test_the_fallback_is_for_a_deployment_without_any_process(stage: Stage) -> None:
    stage.start(2, {"breaker_probe_seconds": 0.1, "breaker_close_seconds": 0.4})
    for backend in stage.new:
        backend.stop()
    eventually(lambda: stage.body("/", HTML) in ("old.1", "old.2"))
    found = {stage.body("/", HTML) for _ in range(20)}
    assert found == {"old.1", "old.2"}
    eventually(lambda: stage.report().get("fallback") == "old")
    stage.new[1].start()  # the second process alone ends it
    eventually(lambda: stage.body("/", HTML) == "new.2")
    assert {stage.body("/", HTML) for _ in range(10)} == {"new.2"}


def test_a_deployment_without_any_process_and_without_fallback_is_a_502(stage: Stage) -> None:
    stage.start(3, PULSE_RAILWAY_ROUTER_FALLBACK="off")
    for backend in stage.new:
        backend.stop()
    eventually(lambda: stage.body() == "502")
    assert stage.body("/", HTML) == "502"


def test_a_canary_and_the_active_deployment_have_their_processes(stage: Stage) -> None:
    stage.start(2)
    canary = stage.version("canary", 2)
    stage.record("canary", canary, "pending", weight=50, held=True)
    eventually(
        lambda: "canary" in {stage.body("/", f"x-real-ip: 10.9.0.{n}")[:6] for n in range(9)}
    )
    versions: dict[str, set[str]] = {}
    for n in range(60):
        lines = (HTML, CHROME, f"x-real-ip: 10.1.0.{n % 20}")
        page = stage.ask("/", *lines)
        found = page.body.decode()
        versions.setdefault(lines[-1], set()).add(found.partition(".")[0])
        for path in ("/", "/assets/a.js", "/api"):
            assert stage.body(path, cookie_of(page)) == found
    assert {len(found) for found in versions.values()} == {1}  # an address is drawn once
    assert {next(iter(found)) for found in versions.values()} == {"canary", "new"}
    for backend in canary:  # who is drawn to a canary that is down gets the active one
        backend.stop()
    bodies = {stage.body("/", HTML, CHROME, f"x-real-ip: 10.1.0.{n}") for n in range(20)}
    assert bodies == {"new.1", "new.2"}


def test_a_preview_has_processes(stage: Stage) -> None:
    import hashlib

    stage.start(2)
    made = stage.version("pr-1", 2)
    key = "k" * 43
    record = {
        "state": "pending",
        "address": made[0].address,
        "preview": hashlib.sha256(key.encode()).hexdigest(),
        "instances": {"2": {"address": made[1].address}},
    }
    stage.redis.client.set("pulse:railway:preview:pr-1", json.dumps(record))
    stage.redis.client.publish("pulse:railway:events", '[":preview:pr-1"]')
    own = f"cookie: __Host-pulse_preview=pr-1.{key}"
    eventually(lambda: stage.body("/", own).startswith("pr-1"))
    assert {stage.body("/", own, HTML) for _ in range(30)} == {"pr-1.1", "pr-1.2"}
    assert stage.body("/?pulse_deployment=pr-1.2", own) == "pr-1.2"
    assert stage.body("/?pulse_deployment=pr-1", own) == "pr-1.1"
    for name in ("pr-1", "pr-1.2"):
        assert stage.body(f"/?pulse_deployment={name}") == "409"  # without the key
        assert stage.body(f"/?pulse_deployment={name}", f"{own}x") == "409"
    assert stage.body("/?pulse_deployment=new.2", own) == "new.2"


def test_a_deployment_that_goes_takes_its_processes_along(stage: Stage) -> None:
    stage.start(2)
    assert stage.body("/?pulse_deployment=old.2") == "old.2"
    stage.record("old", stage.old, "draining", registered_at=1, retiring_at=5)
    eventually(lambda: stage.body("/?pulse_deployment=old.2") == "409")
    eventually(lambda: all(not backend.open for backend in stage.old))


def test_status_and_metrics_know_the_processes(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", stage.redis.url)
    monkeypatch.setenv("RAILWAY_SERVICE_ID", "here")
    stage.start(2)
    assert control.control(["status"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    (new,) = [d for d in answer["deployments"] if d["deployment_id"] == "new"]
    assert list(new["instances"]) == ["2"]
    assert answer["instances"] == 64


def test_control_registers_instances(site: Site, run_router: Run) -> None:
    with Backend(ok(b"three")) as backend:
        words = ["--deployment-id", "three", "--service-id", "s-3", "--instances", "3"]
        assert site.control("register", *words, backend=backend) == 0
        host, port = "http://127.0.0.1", backend.port
        expected = {str(k): {"address": f"{host}:{port + k - 1}"} for k in (2, 3)}
        assert site.record("three")["instances"] == expected
        site.promote("three")
        assert site.record("three")["instances"] == expected
