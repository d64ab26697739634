"""A canary in steps: each baked, the last one followed by the promotion; cut off and taken up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import control
import router
from pulse_railway.flows.rollout import Steps, parse_steps
from tests.conftest import TINY, Project
from tests.net import eventually
from tests.test_life import address, record, traffic


@pytest.mark.parametrize(
    "found",
    [
        *(None, {}, [], "x", {"weights": [], "bake": 5}, {"weights": [10], "bake": 0}),
        *({"weights": [20, 10], "bake": 5}, {"weights": [101], "bake": 5}, {"weights": 5}),
        *({"weights": ["x"], "bake": 5}, {"weights": [float("nan")], "bake": 5}),
        {"weights": [10], "bake": float("inf")},
    ],
)
def test_steps_that_are_none(found: Any) -> None:
    assert parse_steps(found) is None


@given(
    st.lists(st.floats(0, 100), min_size=1, unique=True).map(sorted),
    st.integers(1, 10**6),
    st.none() | st.integers(1, 10**6),
)
def test_steps_are_read_as_they_were_written(
    weights: list[float], bake: int, latency: int | None
) -> None:
    steps = Steps(tuple(weights), bake, latency)
    assert parse_steps(json.loads(json.dumps(steps.stored()))) == steps
    assert steps.from_weight(weights[0]) == steps.weights
    assert steps.from_weight(weights[-1]) == (weights[-1],)


def test_a_records_steps_end_with_the_canary() -> None:
    stored = {"weights": [10, 50], "bake": 5}
    records = {n: router.Record(n, "pending", n, f"http://{n}") for n in ("new", "old")}
    state = router.Routing(active="old", records=records, now=100.0)
    canary = control.set_canary_weight(state, "new", "new", 10, steps=stored)
    assert canary.records["new"].steps == stored
    for ended in (
        control.set_active(canary, "new", "new", []),
        control.abort_canary(canary, "new"),
        control.set_canary_weight(canary, "new", "new", 30),
    ):
        assert ended.records["new"].steps is None
    # when it is found to be the active one, and when its state is rebuilt
    healed = router._with_one_active(canary.records, replace(canary, active="new"), ())
    assert healed["new"].steps is None
    rebuilt = control.rebuild_records(canary, list(records.values()), "new", chosen=True)
    assert rebuilt.records["new"].steps is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["deploy", "main.py", "--canary", "10,50"], "--canary with several steps needs --bake"),
        (["deploy", "main.py", "--canary", "50,10", "--bake", "5"], "steps that grow"),
        (["deploy", "main.py", "--canary", "10,x", "--bake", "5"], "a number from 0 to 100"),
        (["deploy", "main.py", "--canary", "10,", "--bake", "5"], "a number from 0 to 100"),
        (["promote", "--continue", "--weight", "5"], "--continue excludes --weight"),
        (["promote", "--continue"], "there is no canary whose steps could go on"),
    ],
)
def test_steps_that_are_refused(base: Project, words: list[str], message: str) -> None:
    assert message in base.run(*words).error


def test_a_rollout_that_is_cut_off_and_taken_up(base: Project) -> None:
    words = ["deploy", "main.py", "--deployment-id", "next", "--canary", "98,100", "--bake", "15"]
    with traffic(base, address(base)):
        process = subprocess.Popen(
            [sys.executable, "-m", "pulse_railway", *words],
            cwd=TINY,
            env=base.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(lambda: (base.ok("status")["canary"] or {}).get("weight") == 98, 90)
        process.kill()
        process.wait()
        canary = base.ok("status")["canary"]
        assert canary["steps"] == {"weights": [98, 100], "bake": 15, "latency_ms": None}
        shown = base.run("status").out
        assert "that is step 1 of 2" in shown
        assert "`pulse-railway promote --continue` takes it up" in shown
        other = base.run("promote", "--continue", "--deployment-id", "first")
        assert "the canary is next, not first" in other.error
        done = base.ok("promote", "--continue")
    assert (done["deployment_id"], done["active"], base.active) == ("next", True, "next")
    assert done["bake"]["verdict"] == "well"
    assert "steps" not in record(base, "next")
    weights = [e.get("weight") for e in base.ok("history")["history"] if e["what"] == "canary"]
    assert weights == ["98 %", "98 %", "100 %"]
    base.run("unlock", "--yes")


def test_a_step_that_cannot_be_judged_is_not_passed(base: Project) -> None:
    """Nobody visits: it stays where it is, and nothing is called done."""
    words = ["deploy", "main.py", "--deployment-id", "quiet", "--canary", "30,70", "--bake", "1"]
    stays = base.run(*words)
    assert stays.code == 1
    assert "quiet stays at 30 % of the new visitors: too few" in stays.error
    status = base.ok("status")
    assert (status["active"], status["canary"]["weight"]) == ("next", 30)
    assert status["lock"] is None
    base.ok("rollback")


def test_a_version_that_does_worse_is_rolled_back_at_its_step(base: Project) -> None:
    words = ["deploy", "main.py", "--deployment-id", "bad", "--canary", "98,100", "--bake", "60"]
    with traffic(base, address(base)):
        worse = base.run(*words, "--env", "TINY_BROKEN=1")
    assert "bad did worse and is no canary any more" in worse.error
    assert (base.active, base.ok("status")["canary"]) == ("next", None)
    assert "steps" not in record(base, "bad")
