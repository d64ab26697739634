"""The bake's verdict, and its behavior without an answer or after another promotion.

test_life.py runs it on real routers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse_railway import config, router_commands, runtime_image
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows import bake
from pulse_railway.flows.bake import Count, Totals, verdict
from pulse_railway.output import Output
from pulse_railway.stack import Service, Stack
from tests.test_unreliable_ssh import Recorder

# -- the verdict -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (Count(0, 0), Count(1000, 0), "unknown"),
        (Count(29, 29), Count(1000, 0), "unknown"),
        (Count(30, 0), Count(1000, 0), "well"),
        (Count(30, 30), Count(1000, 0), "worse"),
        (Count(1000, 1), Count(1000, 0), "well"),  # a single failure is not significant
        (Count(1000, 60), Count(1000, 20), "worse"),
        (Count(1000, 60), Count(1000, 60), "well"),  # as bad as before
        (Count(1000, 600), Count(1000, 900), "well"),  # better than before
        (Count(100, 2), Count(0, 0), "well"),  # nothing to compare with: 5 % is allowed
        (Count(100, 50), Count(0, 0), "worse"),
        (Count(100, 50), Count(29, 29), "worse"),
    ],
)
def test_verdict(new: Count, old: Count, expected: str) -> None:
    assert verdict(new, old) == expected


@given(st.integers(30, 5000), st.integers(30, 5000), st.floats(0, 1))
def test_a_share_like_the_old_versions_is_never_worse(new: int, old: int, share: float) -> None:
    assert verdict(Count(new, int(new * share)), Count(old, -int(-old * share // 1))) != "worse"


def test_equal_shares_are_rarely_judged_worse() -> None:
    """At most one verdict in a hundred, since both bounds hold with 99 %."""
    rng, wrong = random.Random(1), 0
    for _ in range(500):
        new, old = (sum(rng.random() < 0.03 for _ in range(300)) for _ in range(2))
        wrong += verdict(Count(300, new), Count(300, old)) == "worse"
    assert wrong <= 5


# -- counting ----------------------------------------------------------------------------------

BUCKETS = len(runtime_image.load("router").BUCKETS) + 1


def tally(good: int, bad: int = 0, failed: int = 0, buckets: int = BUCKETS) -> list[Any]:
    return [[0, 0, good, 0, 0, bad], failed, [good + bad, *[0] * (buckets - 1)]]


def at(router: str, **tallies: list[Any]) -> dict[str, Any]:
    return {"router": router, "tallies": tallies}


def test_counts_of_routers_are_summed_across_a_restart() -> None:
    totals = Totals()
    totals.update([at("r1", new=tally(10), old=tally(500, 5)), at("r2")])
    totals.reset("new")
    assert totals.total("new") == Count(0, 0, (0,) * BUCKETS)
    totals.update([at("r1", new=tally(30, 2, 1), old=tally(600, 6)), at("r2", new=tally(5))])
    assert (totals.total("new").requests, totals.total("new").failed) == (28, 3)
    assert totals.total("old").requests == 606
    totals.update([at("r1b", new=tally(4))])  # r1 has restarted: its counts are kept
    assert totals.total("new").requests == 32
    assert sum(totals.total("new").seconds) == 31  # one had no answer, and so no duration


def test_a_router_of_another_version_counts_without_its_durations() -> None:
    totals = Totals()
    totals.update([at("r1", new=tally(10)), at("r2", new=tally(7, buckets=5))])
    totals.reset("new")
    totals.update([at("r1", new=tally(11)), at("r2", new=tally(9, buckets=5))])
    assert totals.total("new").requests == 3
    assert sum(totals.total("new").seconds) == 1
    assert str(totals.total("new")).startswith("3 requests, 0.0% failed")
    assert str(totals.total("nobody")) == "0 requests, none failed"


# -- failures ----------------------------------------------------------------------------------


class Stage:
    """A router with prepared answers, which records the commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[dict[str, Any] | BaseException] = []  # one a poll; the last one stays
        self.commands: list[str] = []
        self.lines: list[str] = []
        self.on_promote: Callable[[], None] = lambda: None
        monkeypatch.setattr(bake, "POLL_INTERVAL", 0.0)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(router_commands, "read_state", self.state)
        for name, function in (
            ("withdraw", "send_abort_canary"),
            ("baked", "send_finish_bake"),
            ("promote", "send_promote"),
        ):
            monkeypatch.setattr(router_commands, function, self.record(name))
        monkeypatch.setattr(bake, "store_last_promoted", self.record("store"))
        env: Any = ["e", "i", "prod-old", "", None, {}, [], None, None, {}]
        self.stack = Stack(config.Target("p", "e"), config.Names(), {"prod-old": Service(*env)})
        self.stack.services["prod-old"].variables["PULSE_DEPLOYMENT_ID"] = "old"

    def state(self, *_: Any) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return {"active": "new", "canary": None, "routers": [], **answer}

    def record(self, name: str) -> Callable[..., None]:
        def command(_: Any, __: Any, deployment: str, *___: Any, **____: Any) -> None:
            self.commands.append(f"{name} {deployment}")
            if name == "promote":
                self.on_promote()

        return command

    def bake(self, seconds: int = 0, canary: bool = False) -> dict[str, Any]:
        api: Any = None
        output: Output = Recorder(self.lines)
        return bake.bake(api, self.stack, "new", "old", seconds, output, canary)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def answers(*tallies: list[Any]) -> list[Any]:
    return [{"routers": [at("r", new=t, old=tally(1000))]} for t in tallies]


def test_a_router_that_does_not_answer_changes_nothing(stage: Stage) -> None:
    stage.answers = [Failure("the router is away"), *answers(tally(0), tally(50))]
    assert stage.bake(1)["verdict"] == "well"
    assert "the bake goes on without a look: the router is away" in stage.lines
    assert stage.commands == ["baked new"]
    stage.answers = [Failure("the router is away")]
    assert stage.bake()["verdict"] == "too few requests to judge"


def test_another_promotion_ends_the_bake(stage: Stage) -> None:
    stage.answers = [*answers(tally(0)), {"active": "third"}]
    assert stage.bake(1)["verdict"] == "over: third took its place"
    stage.answers = [{"canary": {"deployment_id": "new", "weight": 10}}, {"canary": None}]
    assert stage.bake(1, canary=True)["verdict"] == "over: none took its place"
    assert stage.commands == []


def test_an_interrupted_bake_changes_nothing(stage: Stage) -> None:
    for error, word in (
        (Interrupted(15), "interrupted"),
        (Refused("the routing state is lost", "lost"), "failed"),
    ):
        stage.lines.clear()
        stage.answers = [error]
        with pytest.raises(type(error)):
            stage.bake(1)
        message = f"the bake was {word}: new stays as it is, unwatched; `pulse-railway rollback`"
        assert stage.lines == [f"{message} goes back"]
    assert stage.commands == []


def test_a_worse_version_is_rolled_back(stage: Stage) -> None:
    stage.answers = answers(tally(0), tally(0, 60))
    with pytest.raises(
        bake.RolledBack, match=r"new did worse, and old is active again: 60 requests"
    ):
        stage.bake(60)
    assert stage.commands == ["promote old", "store old"]
    canary = {"canary": {"deployment_id": "new", "weight": 10}}
    stage.commands.clear()
    stage.answers = [{**answer, **canary} for answer in answers(tally(0), tally(0, 60))]
    with pytest.raises(bake.RolledBack, match="new did worse and is no canary any more"):
        stage.bake(60, canary=True)
    assert stage.commands == ["withdraw new"]


def test_a_rollback_that_is_not_possible(stage: Stage) -> None:
    def refuse() -> None:
        raise Refused("third is active", "active")

    stage.on_promote, stage.answers = refuse, answers(tally(0), tally(0, 60))
    with pytest.raises(Failure, match=r"new does worse \(.*\), but nothing was done: third is"):
        stage.bake(60)
    assert stage.commands == ["promote old"]
    stage.commands.clear()
    del stage.stack.services["prod-old"]
    stage.answers = answers(tally(0), tally(0, 60))
    with pytest.raises(Failure, match=r"but old is gone: new stays active"):
        stage.bake(60)
    assert stage.commands == []


@pytest.mark.parametrize("tally", [1, [], [1, 2, 3], [[1], "x", {}], [[-5] * 10, 0, []], None])
def test_an_invalid_tally_is_not_counted(tally: Any) -> None:
    """An invalid key in Redis has once ended a bake with a traceback."""
    good = [[0, 0, 90, 0, 0, 10, 0, 0, 0, 0], 0, [100, *[0] * 14]]
    totals = bake.Totals()
    for reported in (good, tally, good):
        totals.update([{"router": "r", "tallies": {"new": reported}}])
        if reported is good:
            totals.reset("new")
        total = totals.total("new")
        assert (total.requests, total.failed) == (0, 0)
        assert bake.verdict(total, total) == "unknown"
        assert str(total)
