"""`status` reports each problem with the command that solves it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any, cast
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import control
import router
from pulse_railway import cli, contract, router_commands, verbs
from pulse_railway.config import ControlRoute, Names, Target, Where
from pulse_railway.errors import Uncertain, UsageError
from pulse_railway.flows import deploy, promote
from pulse_railway.flows import logs as flows_logs
from pulse_railway.flows.status import active_problems, problems, record_problems, status
from pulse_railway.flows.watch import LENGTH, History
from pulse_railway.options import LogsOptions
from pulse_railway.output import Output
from pulse_railway.railway import ssh
from pulse_railway.rendering import BARS, show_history, show_status, show_watch, sparkline
from pulse_railway.stack import Service, Stack
from tests.conftest import Project

SET = dict.fromkeys((contract.RAILWAY_TOKEN, contract.REDIS_URL, contract.INTERNAL_TOKEN), "x")


def service(name: str, status: str = "SUCCESS", **variables: str) -> Service:
    at = "2026-01-01T00:00:00Z"
    domains = ["site.example"] if name == "pulse-router" else []
    return Service(f"s-{name}", "", name, at, None, {}, domains, None, status, variables)


def stack(*more: Service, last_promoted: str = "a", without: str = "", broken: str = "") -> Stack:
    base = {contract.RUNTIME_VERSION: "1", contract.LAST_PROMOTED: last_promoted, **SET}
    names = ("pulse-router", "pulse-env", "pulse-redis", "pulse-janitor")
    stable = [service(n, "CRASHED" if n == broken else "SUCCESS", **base) for n in names]
    services = [s for s in (*stable, *more) if s.name != without]
    return Stack(Target("p", "e"), Names(), {s.name: s for s in services})


A = service("a", PULSE_DEPLOYMENT_ID="a")


def scheduled(cron: str) -> Stack:
    read = stack(A)
    assert read.janitor
    settings = {"cronSchedule": cron}
    janitor = replace(read.janitor, settings=settings)
    return replace(read, services=read.services | {janitor.name: janitor})


RECORD = {"deployment_id": "a", "state": "active"}
DRAINING = {"deployment_id": "b", "state": "draining", "drain_started_at": 1.0}
ROUTER = {"router": "r", "age": 1.0, "epoch": 7, "version": "1"}
FAILING = ROUTER | {"failing": {"a": 60}}
UP = {"active": "a", "lost": False, "epoch": 7, "deployments": [RECORD], "routers": [ROUTER]}


def test_only_commands_that_help_are_advised_for_a_silent_active_deployment() -> None:
    b = service("b", PULSE_DEPLOYMENT_ID="b")
    state = {"active": "a", "canary": None, "deployments": [{**RECORD, "sessions": None}, DRAINING]}
    state |= {"routers": []}
    (both,) = active_problems(state, stack(A, b))
    assert "`pulse-railway redeploy --deployment-id a` starts it again" in both
    assert "`pulse-railway rollback` goes back to b" in both
    (gone,) = active_problems(state, stack(b))
    assert gone.endswith("does not answer: `pulse-railway rollback` goes back to b")
    (alone,) = active_problems(state, stack())
    assert alone.endswith("does not answer: `pulse-railway deploy` deploys a new one")
    (canary,) = active_problems({**state, "canary": {"deployment_id": "c"}}, stack(A, b))
    assert "rollback" not in canary  # it would end the canary


@pytest.mark.parametrize(
    ("read", "state", "parts"),
    [
        (stack(A), UP, []),
        (
            stack(A),
            UP | {"active": None, "lost": True},
            ["is lost, or an older one: a was promoted last", "restore`"],
        ),
        (
            stack(A, service("b", PULSE_DEPLOYMENT_ID="b"), last_promoted="b"),
            UP | {"lost": True},
            ["b was promoted last, and a is active", "restore`"],
        ),
        (
            stack(A, last_promoted="gone"),
            UP | {"lost": True},
            ["gone was promoted last, and its service is gone", "restore --deployment-id a`"],
        ),
        (
            stack(replace(A, settings={"numReplicas": 2})),
            UP,
            ["a has 2 replicas", "`railway scale REGION=1 --service a`"],
        ),
        (
            stack(replace(A, settings={"numReplicas": 4}, regions={"east": 1, "west": 3})),
            UP,
            ["a has 4 replicas", "`railway scale east=0 west=1 --service a` leaves one"],
        ),
        (
            replace(
                healthy := stack(A),
                services=healthy.services
                | {"pulse-redis": replace(service("pulse-redis"), settings={"numReplicas": 2})},
            ),
            UP,
            ["pulse-redis has 2 replicas", "`railway scale REGION=1 --service pulse-redis`"],
        ),
        (
            stack(A),
            UP | {"now": 1e9, "lock": {"holder": "r", "since": 1e9 - 900, "until": 1e9 + 60}},
            ["lock is held by somebody, since", "appears to be dead: `pulse-railway unlock` frees"],
        ),
        (
            stack(A),
            UP | {"now": 1e9, "lock": {"holder": "r", "since": 1e9 - 90, "until": 1e9 + 60}},
            [],
        ),
        (
            stack(A, service("b", "REMOVED", PULSE_DEPLOYMENT_ID="b")),
            UP | {"deployments": [RECORD, DRAINING]},
            ["b is REMOVED on Railway, and serves no tab", "redeploy --deployment-id b`"],
        ),
        (
            stack(A),
            UP | {"deployments": [RECORD, DRAINING]},
            ["the service of b was deleted on Railway", "delete --deployment-id b`"],
        ),
        (  # deployed after the services were read
            stack(A),
            UP | {"deployments": [RECORD, DRAINING | {"registered_at": time.time() + 3600}]},
            [],
        ),
        (stack(A), UP | {"deployments": [RECORD, DRAINING | {"retiring_at": 1.0}]}, []),
        (
            stack(replace(A, stopped=True)),
            UP,
            ["a was stopped on Railway", "`pulse-railway redeploy --deployment-id a`"],
        ),
        (stack(A), UP | {"deployments": []}, ["the record of a is lost", "restore`"]),
        (
            stack(A),
            UP | {"active": None},
            ["no deployment is active", "`pulse-railway promote --deployment-id a`"],
        ),
        (
            stack(A),
            UP | {"active": None, "deployments": []},
            ["no deployment is active", "`pulse-railway restore --deployment-id a`"],
        ),
        (
            stack(service("b", PULSE_DEPLOYMENT_ID="b"), last_promoted="a"),
            UP | {"deployments": [DRAINING]},
            ["a has no service", "`pulse-railway promote --deployment-id b` makes b active"],
        ),
        (
            stack(A),
            UP | {"routers": []},
            ["no router has reported", "`railway restart --service pulse-router`"],
        ),
        (
            stack(A),
            UP | {"routers": [ROUTER, ROUTER | {"router": "s", "version": "0"}]},
            ["the router s runs 0, and 1 was deployed", "railway redeploy --service pulse-router"],
        ),
        (
            stack(A),
            UP | {"writes_refused": "command not allowed when used memory > 'maxmemory'."},
            ["Redis refuses writes (command not allowed when", "give it more memory"],
        ),
        (
            stack(A),
            UP | {"writes_refused": "You can't write against a read only replica."},
            ["it is a replica: give `pulse-railway ensure` the primary's --redis-url"],
        ),
        (
            stack(A),
            UP | {"deployments": [RECORD | {"sessions": None, "wrong_token": True}]},
            ["a does not accept the router's internal token", "redeploy --deployment-id a`"],
        ),
        (
            stack(A, service("b", PULSE_DEPLOYMENT_ID="b")),
            UP | {"deployments": [RECORD, DRAINING | {"sessions": None, "wrong_token": True}]},
            ["b does not accept", "until its drain time is over, or PULSE_RAILWAY_INTERNAL_TOKEN"],
        ),
        (stack(A), UP | {"routers": [ROUTER | {"failing": {"a": 19, "b": 90}}]}, []),
        (
            stack(A, service("b", PULSE_DEPLOYMENT_ID="b")),
            UP | {"deployments": [RECORD, DRAINING], "routers": [ROUTER, FAILING, ROUTER]},
            [
                "the last 60 requests to the active deployment a got a 5xx or no answer",
                "logs --deployment-id a`",
                "`pulse-railway rollback` goes back to b",
            ],
        ),
        (stack(A), UP | {"janitor": {"age": 900.0, "failed": 1, "why": "gave up"}}, []),
        (
            stack(A),
            UP | {"janitor": {"age": 9.0, "failed": 3, "why": "refused: Unauthorized"}},
            ["failed 3 times in a row", "refused: Unauthorized", "logs --service pulse-janitor`"],
        ),
        (
            scheduled("*/5 * * * *"),
            UP | {"janitor": {"age": 1500.0, "failed": 0, "why": None}},
            ["the janitor ran 25 minutes ago last", "says every 5", "`pulse-railway ensure`"],
        ),
        (
            scheduled("0 3 * * *"),
            UP | {"janitor": {"age": 80_000.0, "failed": 0, "why": None}},
            [],
        ),
        (
            stack(A),
            UP | {"problems": ["a: address not understood"]},
            ["a: address not understood", "it is ignored, and is removed with that deployment"],
        ),
        (
            stack(A),
            UP | {"problems": [":promoted is not understood"]},
            [":promoted is not understood", "the next promotion replaces it"],
        ),
        (
            stack(A),
            UP | {"problems": [":maintenance is not understood"]},
            [":maintenance is not understood", "the site is closed", "maintenance off`"],
        ),
        (
            stack(A),
            UP | {"problems": [":owner is not understood"]},
            [":owner is not understood", "`pulse-railway ensure` replaces it"],
        ),
        (  # its tabs reload, which was once not reported
            stack(A, service("b", PULSE_DEPLOYMENT_ID="b")),
            UP,
            ["b runs without a record", "`pulse-railway restore`", "delete --deployment-id b`"],
        ),
        (
            stack(A, service("b", PULSE_DEPLOYMENT_ID="b")),
            UP | {"lock": {"until": 1e11}},
            [],
        ),
        (
            stack(A),
            UP | {"routers": [{"router": "r", "identity": "e/s-pulse-router"}] * 2},
            [],
        ),
        (
            stack(A),
            UP | {"routers": [{"router": "r", "identity": i} for i in ("e/s-pulse-router", "o/x")]},
            ["routers of other stacks serve it too (o/x,", "`pulse-railway ensure --owns-state`"],
        ),
        (  # the other router has not yet withdrawn its report
            stack(A),
            UP | {"owner": "e/s-pulse-router", "routers": [{"router": "r", "identity": "o/x"}]},
            [],
        ),
        (
            stack(A),
            UP | {"routers": [{"router": "r1", "epoch": 6, "age": 30}]},
            [
                "the router r1 said 30 s ago that it serves an older",
                "`railway restart --service pulse-router`",
            ],
        ),
        (stack(A), UP | {"routers": [{"router": "r1", "epoch": 6, "age": 3}]}, []),
        (
            stack(A),
            UP
            | {"deployments": [RECORD, {"deployment_id": "UP", "state": "unknown"}]}
            | {"problems": ["UP: no address follows from its record"]},
            ["UP: no address", "`redis-cli DEL pulse:railway:deployment:UP` in pulse-redis"],
        ),
        (
            stack(A),
            UP | {"reports_without_lease": ["p:router:x"]},
            ["p:router:x is where routers report", "`redis-cli DEL p:router:x` in pulse-redis"],
        ),
        (
            stack(A, last_promoted=""),
            UP | {"active": None},
            ["no deployment is active", "promote --deployment-id a`"],
        ),
        (stack(last_promoted=""), UP | {"active": None}, []),  # nothing was deployed yet
        (  # commands for another stack's state were once advised
            stack(A),
            UP | {"owner": "elsewhere/router", "lost": True},
            ["belongs to another stack (elsewhere/router,", "`pulse-railway ensure` says"],
        ),
        (
            replace(stack(A), copied_from="production"),
            UP | {"lost": True, "problems": ["this environment is a copy"]},
            ["a copy of production", "ensure`"],
        ),
        (stack(), UP, ["a has no service", "`pulse-railway deploy` deploys a new one"]),
        (  # before, `rollback`, which takes leave of the one that serves everybody
            stack(A),
            UP | {"active": "nonsuch"},
            ["nonsuch has no service", "`pulse-railway restore` goes back to a"],
        ),
        (stack(service("a", "CRASHED", PULSE_DEPLOYMENT_ID="a")), UP, ["is CRASHED", "rollback`"]),
        (
            stack(A, broken="pulse-redis"),
            UP,
            ["pulse-redis is CRASHED", "logs --service pulse-r", "redeploy --service pulse-redis`"],
        ),
        (stack(A, without="pulse-janitor"), UP, ["pulse-janitor missing", "scaffold`"]),
        (Stack(Target("p", "e"), Names(), {}), None, ["no baseline", "ensure`"]),
    ],
)
def test_a_problem_is_reported_with_its_command(read: Stack, state: Any, parts: list[str]) -> None:
    messages = problems(read, state, None)
    assert len(messages) == bool(parts), messages
    for part in parts:
        assert part in messages[0]


def test_the_advice_after_an_interrupted_bake_keeps_the_canary() -> None:
    """The command in the message has once made the canary active, and kept the record's `bake`."""
    records = {name: router.Record(name, of) for name, of in (("a", "active"), ("c", "pending"))}
    routing = router.Routing(time.time(), "a", records=records)

    def set_weight(bake: float | None) -> dict[str, Any]:
        nonlocal routing
        routing = control.set_canary_weight(routing, "c", "c", 10.0, bake=bake)
        return dict(routing.records["c"].json())

    overdue = set_weight(-120.0)
    messages = record_problems(overdue, stack(A), time.time())
    assert messages[0].endswith("`pulse-railway promote --deployment-id c --weight 10` keeps it")
    assert "bake" not in set_weight(None)
    assert "bake" in set_weight(300.0)
    assert "bake" in set_weight(None), "a bake that is not over is kept"


def test_a_redis_that_hangs(base: Project) -> None:
    """`status` has once taken 33 s, and shown every deployment as `unregistered`."""
    pid = base.railway.local("stats")["pids"]["pulse-redis"]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = base.ok("status")
        took = time.monotonic() - began
        printed = base.run("status").out
    finally:
        os.kill(pid, signal.SIGCONT)
    assert took < 20
    assert [row["state"] for row in answer["deployments"]] == ["unknown"]
    assert "Redis does not answer: the routers serve what they know" in answer["problem"]
    assert "pulse-railway logs --service pulse-redis" in printed
    assert base.ok("status")["problems"] == []


# -- output -----------------------------------------------------------------------------------


def row(name: str, sessions: int | None = 1, state: str = "active") -> dict[str, Any]:
    fields = {
        "railway": "SUCCESS",
        "age_seconds": 5,
        "weight": None,
        "moving_at": None,
        "rolled_back": False,
    }
    fields |= {"sessions": sessions, "instances": 1, "about": {}}
    return {"deployment_id": name, "state": state, **fields}


def result(*rows: dict[str, Any], routers: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    baseline = [{"service": "pulse-redis", "railway": "SUCCESS", "version": None}]
    empty = dict.fromkeys(("address", "canary", "maintenance", "lock"))
    fields = {
        "active": "a",
        "baseline": baseline,
        "missing": [],
        "problems": [],
        "copied": [],
        **empty,
        **more,
    }
    return {**fields, "deployments": list(rows), "routers": routers}


def counted(router: str, good: int, bad: int) -> dict[str, Any]:
    classes = [0, 0, good, 0, 0, bad, 0, 0, 0, 0]
    return {"router": router, "tallies": {"a": [classes, 0, []]}}


def test_rates_are_computed_between_two_polls() -> None:
    history = History()
    history.add(result(row("a"), routers=[counted("r1", 100, 0), counted("r2", 50, 0)]), 0.0)
    assert list(history.series["a"].requests) == [None]
    history.add(result(row("a", 3), routers=[counted("r1", 110, 2), counted("r2", 58, 0)]), 10.0)
    assert history.series["a"].requests[-1] == 2.0
    assert history.series["a"].errors[-1] == pytest.approx(0.2)
    # r2 restarts and counts from 0; then no router answers; then the next rate covers the gap
    history.add(result(row("a"), routers=[counted("r1", 110, 2), counted("r2", 5, 0)]), 15.0)
    assert history.series["a"].requests[-1] == 1.0
    history.add(result(row("a", None), routers=[]), 20.0)
    assert list(history.series["a"].requests)[-1:] == [None]
    history.add(result(row("a"), routers=[counted("r1", 120, 2), counted("r2", 5, 0)]), 25.0)
    assert history.series["a"].requests[-1] == 1.0
    assert list(history.series["a"].sessions) == [1, 3, 1, None, 1]
    history.add(result(row("b"), routers=[]), 30.0)
    assert set(history.series) == {"b"}
    for n in range(100):
        history.add(result(row("b"), routers=[]), 31.0 + n)
    assert len(history.series["b"].sessions) == LENGTH


def test_a_trend_is_drawn_from_zero() -> None:
    assert sparkline([0, 1, 2]) == "▁▅█ 2"
    assert sparkline([5, None, 0]) == "█ ▁ 0"
    assert sparkline([None, None]) == "?"
    assert sparkline([]) == "?"


def test_a_failed_service_is_named_without_color(capsys: pytest.CaptureFixture[str]) -> None:
    """Output to a pipe has no color."""
    shown = result(row("a"), row("b", None, "draining"), routers=[])
    show_status(shown)
    printed = capsys.readouterr().out
    assert "● pulse-redis  up" in printed
    assert "a is active, and nothing is wrong" in printed
    shown["baseline"][0]["railway"] = "CRASHED"
    shown["problems"] = ["pulse-redis is CRASHED on Railway: see `pulse-railway logs ...`"]
    show_status(shown)
    printed = capsys.readouterr().out
    assert "● pulse-redis  CRASHED" in printed
    assert "problem: pulse-redis is CRASHED" in printed
    assert "nothing is wrong" not in printed
    assert "\x1b" not in printed


# -- invalid data in Redis -----------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["commit", "dirty", "author", "by", "message", "x"])
RECORDS = st.dictionaries(
    st.sampled_from([*router.FIELDS, "deployment_id"]), JSON | st.dictionaries(NAMES, JSON)
)
ENTRIES = st.dictionaries(st.sampled_from("deployment_id active weight by why x".split()), JSON)
OTHERS = st.sampled_from([":maintenance", ":deploy:lock", ":promoted", ":epoch", ":removed"])
FACTS = st.dictionaries(st.sampled_from("since until at holder by page retry_after".split()), JSON)
TALLIES = st.dictionaries(st.just("a"), JSON | st.tuples(st.lists(JSON), JSON, st.lists(JSON)))


class MemoryStore:
    """A store with this state."""

    def __init__(self, state: dict[str, str]) -> None:
        self.state = state

    def read(self) -> Any:
        return router.parse(self.state, time.time())


def parsed(command: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return a router's answer as a verb parses it."""
    line = json.dumps({**answer, "command": command, "nonce": "n"})
    answer_or_none = router_commands.parse_answer(line, command, "n")
    assert answer_or_none
    return answer_or_none


@given(
    st.dictionaries(st.sampled_from(["a", "b", "[/b]", "\x1b[2J"]), RECORDS, max_size=2),
    st.lists(ENTRIES | JSON, max_size=3),
    st.dictionaries(OTHERS, FACTS | JSON, max_size=3),
    TALLIES,
)
@example({"a": {"about": {"commit": [1], "by": {}, "message": "[/close] \ud800"}}}, [{}], {}, {})
@example({}, [{"why": "\ud800 [/close]\x1b[2J"}], {}, {"a": [[1], 0, []]})
@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_stored_data_causes_a_traceback(
    monkeypatch: pytest.MonkeyPatch, records: Any, entries: list[Any], others: Any, tallies: Any
) -> None:
    """These have caused tracebacks: a surrogate, a missing field, a commit that is a list, and a
    message with brackets, which was parsed as rich's markup."""
    keys = {f":deployment:{name}": record for name, record in records.items()} | others
    history = [{"at": 5, "what": "promote", **e} if isinstance(e, dict) else e for e in entries]
    store = MemoryStore({k: json.dumps(v) for k, v in {**keys, ":history": history}.items()})
    monkeypatch.setattr(control, "sessions", lambda *_: 1)
    state = parsed("status", control.status_answer(cast(Any, store), "", None))
    state["routers"] = [{"router": "r", "tallies": tallies, **control.checked_report({})}]
    monkeypatch.setattr(router_commands, "read_state", lambda *_, **__: state)
    shown = status(cast(Any, None), stack(A))
    rates = History()
    with open(os.devnull, "w", encoding="utf-8") as null, contextlib.redirect_stdout(null):
        show_status(shown)
        for at in (1.0, 2.0):
            rates.add({**shown, "routers": []}, at)
            rates.add(shown, at + 0.5)
        show_watch([(shown, rates)])
        show_history(parsed("history", {"history": list(store.read().history)})["history"])
        json.dumps(shown)


def test_a_message_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """rich parses `[wip]` as markup, which is not shown, and raises for `[/wip]`."""
    show_history([{"at": 5, "what": "promote", "why": "[wip] [/wip] :smile: [red]x"}])
    assert "[wip] [/wip] :smile: [red]x" in capsys.readouterr().out


def test_a_line_that_cannot_be_encoded_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`logs` prints any line of a service."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    verbs.run_verb(lambda *_: print("\u25cf \ud800", flush=True), "raw_flags", {})
    assert written.getvalue() == b"\\u25cf \\ud800\n"


@pytest.mark.parametrize("depth", [60, 900, 990, 9_000, 99_999])
@pytest.mark.parametrize("shape", ['{"a":', "["])
def test_json_that_is_nested_too_deeply(depth: int, shape: str) -> None:
    """It has caused a traceback of `control`, and from Redis three tracebacks of the router, which
    then ends."""
    text = shape * depth + "0" + {"[": "]"}.get(shape, "}") * depth
    record = f'{{"deployment_id":"a","state":"draining","about":{{"x":{text}}}}}'
    state = {":active": "b", ":deployment:a": record, ":history": f"[{text}]", ":removed": text}
    routing = router.parse(state, 5.0)
    assert routing.records["a"].ignored == ("record",)
    assert len(routing.problems) == 3
    assert router.repaired(routing, routing, "x").records == routing.records
    words = [
        "register",
        "--deployment-id",
        "a",
        "--service-name",
        "a",
        "--about",
        f'{{"x":{text}}}',
    ]
    draining = ["--active-deployment-id", "a", "--active-service-name", "a", "--draining-json"]
    for command in (words, ["promote", *draining, text]):
        with pytest.raises(SystemExit):
            control.control_parser().parse_args(command)


# -- messages without an answer --------------------------------------------------------------------


def test_a_redis_that_is_down_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promotion has once printed nothing for 38 s, and then no advice."""
    printed: list[str] = []
    own = stack(A)
    route = ControlRoute("ssh", None, printed.append, checked=True)
    own = replace(own, target=replace(own.target, control_route=route))

    def by_ssh(_: Any, __: Any, words: list[str]) -> ssh.Outcome:
        answer = {"command": words[0], "nonce": words[-1], "ok": False, "reason": "store"}
        why = "the router's Redis does not answer (TimeoutError)"
        return ssh.Outcome(json.dumps(answer | {"error": why}), "", False)

    monkeypatch.setattr(router_commands, "by_ssh", by_ssh)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(Uncertain) as failure:
        router_commands.send_promote(cast(Any, None), own, "a", "a")
    assert printed == ["the router's Redis does not answer (TimeoutError): asking again for 30 s"]
    assert str(failure.value).endswith(
        "`promote`: the router's Redis does not answer (TimeoutError): see `pulse-railway logs"
        " --service pulse-redis`, and run this again when it is back"
    )


def test_an_empty_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    api = Mock()
    api.call.return_value = {"deploymentLogs": []}
    monkeypatch.setattr(flows_logs, "latest", lambda *_: {"s-a": {"id": "d"}})
    options = LogsOptions(Where(), Names(), deployment_id="a")
    flows_logs.logs(api, stack(A).target, A, options, Output())
    assert capsys.readouterr().err.strip() == "a has said nothing yet"


def test_maintenance_needs_on_or_off() -> None:
    with pytest.raises(UsageError, match=r"^which\? `pulse-railway maintenance on\|off`$"):
        cli.rewrite(["maintenance", "--json"])
    assert cli.rewrite(["maintenance", "on", "--json"]) == ["maintenance", "on", "--json"]


def watching(base: Project, terminal: int | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pulse_railway", "status", "--watch", "--every", "1"],
        env={**base.env, "TERM": "xterm", "COLUMNS": "160", "LINES": "50"},
        stdin=subprocess.DEVNULL,
        stdout=terminal or subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_watching_in_a_pipe(base: Project) -> None:
    active = base.active
    assert active
    process = watching(base)
    assert process.stdout
    try:
        printed = ""
        while printed.count(" is active, and nothing is wrong") < 3:
            line = process.stdout.readline().decode()
            assert line, printed
            printed += line
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    rows = [x for x in printed.splitlines() if x.startswith(active) and " is active" not in x]
    assert len(rows) >= 3
    assert "requests/s" in printed
    assert any(bar in rows[-1] for bar in BARS)
    assert "\x1b" not in printed


def test_watching_on_a_terminal(base: Project) -> None:
    """The picture is redrawn in place, and the cursor is shown again at the end."""
    own_end, its_end = pty.openpty()
    process = watching(base, its_end)
    os.close(its_end)
    printed = b""
    try:
        deadline = time.monotonic() + 60
        while printed.count(b"nothing is wrong") < 3 and time.monotonic() < deadline:
            if select.select([own_end], [], [], 1)[0]:
                printed += os.read(own_end, 1 << 16)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the process has closed its end
            while time.monotonic() < deadline:
                printed += os.read(own_end, 1 << 16)
        assert process.wait(15) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
        os.close(own_end)
    assert b"\x1b[?25l" in printed
    assert printed.rstrip().endswith(b"\x1b[?25h")
    assert b"\x1b[1A\x1b[2K" in printed  # the previous picture is erased


def test_watching_is_not_for_programs(base: Project) -> None:
    assert "call `status --json` repeatedly" in base.run("status", "--watch", "--json").error


# -- what else a bad day asks for ----------------------------------------------------------------


def test_a_rollback_goes_on_where_one_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = [service(name, PULSE_DEPLOYMENT_ID=name) for name in "bcd"]
    drained = [{**DRAINING, "deployment_id": n, "drain_started_at": float(ord(n))} for n in "bcd"]
    state = UP | {"canary": None, "deployments": [RECORD, *drained]}
    monkeypatch.setattr(router_commands, "read_state", lambda *_: state)
    answering = {"b"}
    tried = []

    def check_and_promote(api: Any, stack: Any, name: str, *_: Any, **more: Any) -> dict[str, Any]:
        tried.append(name)
        if name not in answering:
            raise promote.Silent(f"{name} does not answer now, and nothing was changed: 502")
        return {"deployment_id": name}

    monkeypatch.setattr(promote, "check_and_promote", check_and_promote)
    result = promote.rollback(Mock(), stack(A, *versions), Output())
    assert (result["deployment_id"], tried) == ("b", ["d", "c", "b"])
    said = capsys.readouterr().err
    assert "d does not answer now, and nothing was changed: 502; c is the one before it" in said
    answering.clear()
    with pytest.raises(promote.Silent, match="b does not answer now"):
        promote.rollback(Mock(), stack(A, *versions), Output())


def test_a_deploy_beside_many_live_versions_is_warned_of() -> None:
    many = [
        replace(service(f"v{n}", PULSE_DEPLOYMENT_ID=f"v{n}"), created_at=f"2026-01-0{n + 1}")
        for n in range(8)
    ]
    output = Output()
    deploy.warn_of_many(stack(*many[1:]), output)
    assert output.warnings == []
    deploy.warn_of_many(stack(*many, last_promoted="v0"), output)
    (warning,) = output.warnings
    assert warning.startswith("8 versions are live")
    assert "delete --deployment-id v1`" in warning
