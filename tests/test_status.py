"""`status` names what is wrong, and the command that mends it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from pulse_railway import contract
from pulse_railway.config import Names, Target
from pulse_railway.flows.status import problems
from pulse_railway.stack import Service, Stack
from tests.conftest import Project

SET = dict.fromkeys((contract.RAILWAY_TOKEN, contract.REDIS_URL, contract.INTERNAL_TOKEN), "x")


def service(name: str, status: str = "SUCCESS", **variables: str) -> Service:
    at = "2026-01-01T00:00:00Z"
    domains = ["site.example"] if name == "pulse-router" else []
    return Service(f"s-{name}", "", name, at, None, {}, domains, None, status, variables)


def stack(*more: Service, intent: str = "a", without: str = "", broken: str = "") -> Stack:
    base = {contract.RUNTIME_VERSION: "1", contract.INTENT: intent, **SET}
    names = ("pulse-router", "pulse-env", "pulse-redis", "pulse-janitor")
    stable = [service(n, "CRASHED" if n == broken else "SUCCESS", **base) for n in names]
    found = [s for s in (*stable, *more) if s.name != without]
    return Stack(Target("p", "e"), Names(), {s.name: s for s in found})


A = service("a", PULSE_DEPLOYMENT_ID="a")
UP = {"active": "a", "lost": False, "deployments": [], "routers": []}


@pytest.mark.parametrize(
    ("found", "state", "says"),
    [
        (stack(A), UP, []),
        (stack(A), UP | {"active": None, "lost": True}, ["is lost, a was active", "restore`"]),
        (
            stack(A, intent=""),
            UP | {"active": None},
            ["no deployment is active", "promote", "rest"],
        ),
        (stack(intent=""), UP | {"active": None}, []),  # nothing was deployed yet
        (stack(), UP, ["a has no service", "promote another"]),
        (stack(service("a", "CRASHED", PULSE_DEPLOYMENT_ID="a")), UP, ["is CRASHED", "rollback`"]),
        (stack(A, broken="pulse-redis"), UP, ["pulse-redis is CRASHED", "logs --service pulse-r"]),
        (stack(A, without="pulse-janitor"), UP, ["pulse-janitor missing", "scaffold`"]),
        (Stack(Target("p", "e"), Names(), {}), None, ["no baseline", "ensure`"]),
    ],
)
def test_a_problem_is_named_with_its_command(found: Stack, state: Any, says: list[str]) -> None:
    said = problems(found, state, None)
    assert len(said) == bool(says), said
    for words in says:
        assert words in said[0]


def test_a_redis_that_hangs(base: Project) -> None:
    """Before: 33 s, and every deployment was `unregistered`."""
    stats = base.railway.api.replace("/graphql/v2", "/local/stats")
    pid = base.stage.get(stats).json()["pids"]["pulse-redis"]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        found = base.ok("status")
        took = time.monotonic() - began
        shown = base.run("status").out
    finally:
        os.kill(pid, signal.SIGCONT)
    assert took < 20
    assert [row["state"] for row in found["deployments"]] == ["unknown"]
    assert "Redis does not answer (TimeoutError)" in found["problem"]
    assert "pulse-railway logs --service pulse-router" in shown
    assert base.ok("status")["problems"] == []
