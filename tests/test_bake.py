"""The bake's judgement, and what becomes of it where the router is silent or somebody is faster.
On real routers it is played in test_life.py."""

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
from tests.test_rude_ssh import Recorder

# -- the judgement -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (Count(0, 0), Count(1000, 0), "unknown"),
        (Count(29, 29), Count(1000, 0), "unknown"),
        (Count(30, 0), Count(1000, 0), "well"),
        (Count(30, 30), Count(1000, 0), "worse"),
        (Count(1000, 1), Count(1000, 0), "well"),  # one is chance
        (Count(1000, 60), Count(1000, 20), "worse"),
        (Count(1000, 60), Count(1000, 60), "well"),  # as bad as before
        (Count(1000, 600), Count(1000, 900), "well"),  # better than before
        (Count(100, 2), Count(0, 0), "well"),  # nothing to compare: 5 % is taken
        (Count(100, 50), Count(0, 0), "worse"),
        (Count(100, 50), Count(29, 29), "worse"),
    ],
)
def test_who_does_worse(new: Count, old: Count, expected: str) -> None:
    assert verdict(new, old) == expected


@given(st.integers(30, 5000), st.integers(30, 5000), st.floats(0, 1))
def test_as_good_as_the_one_before_is_never_worse(new: int, old: int, share: float) -> None:
    assert verdict(Count(new, int(new * share)), Count(old, -int(-old * share // 1))) != "worse"


def test_the_same_share_is_seldom_taken_for_worse() -> None:
    """One look in a hundred, at most, with two bounds of 99 %."""
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


def test_routers_are_added_up_and_may_be_restarted() -> None:
    totals = Totals()
    totals.update([at("r1", new=tally(10), old=tally(500, 5)), at("r2")])
    totals.reset("new")
    assert totals.total("new") == Count(0, 0, (0,) * BUCKETS)
    totals.update([at("r1", new=tally(30, 2, 1), old=tally(600, 6)), at("r2", new=tally(5))])
    assert (totals.total("new").requests, totals.total("new").failed) == (28, 3)
    assert totals.total("old").requests == 606
    totals.update([at("r1b", new=tally(4))])  # r1 is gone: what it counted was so all the same
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


# -- where it does not go as it should -----------------------------------------------------------


class Stage:
    """What the router says, look by look, and what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.says: list[dict[str, Any] | BaseException] = []
        self.told: list[str] = []
        self.lines: list[str] = []
        self.promotes: Callable[[], None] = lambda: None
        monkeypatch.setattr(bake, "POLL_INTERVAL", 0.0)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(router_commands, "read_state", self.state)
        for name, function in (
            ("withdraw", "send_abort_canary"),
            ("baked", "send_finish_bake"),
            ("promote", "send_promote"),
        ):
            monkeypatch.setattr(router_commands, function, self.note(name))
        monkeypatch.setattr(bake, "store_last_promoted", self.note("remember"))
        env: Any = ["e", "i", "prod-old", "", None, {}, [], None, None, {}]
        self.stack = Stack(config.Target("p", "e"), config.Names(), {"prod-old": Service(*env)})
        self.stack.services["prod-old"].variables["PULSE_DEPLOYMENT_ID"] = "old"

    def state(self, *_: Any) -> Any:
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, BaseException):
            raise said
        return {"active": "new", "canary": None, "routers": [], **said}

    def note(self, name: str) -> Callable[..., None]:
        def call(_: Any, __: Any, deployment: str, *___: Any, **____: Any) -> None:
            self.told.append(f"{name} {deployment}")
            if name == "promote":
                self.promotes()

        return call

    def bake(self, seconds: int = 0, canary: bool = False) -> dict[str, Any]:
        api: Any = None
        output: Output = Recorder(self.lines)
        return bake.bake(api, self.stack, "new", "old", seconds, output, canary)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def looks(*tallies: list[Any]) -> list[Any]:
    return [{"routers": [at("r", new=t, old=tally(1000))]} for t in tallies]


def test_a_router_that_does_not_answer_changes_nothing(stage: Stage) -> None:
    stage.says = [Failure("the router is away"), *looks(tally(0), tally(50))]
    assert stage.bake(1)["verdict"] == "well"
    assert "the bake goes on without a look: the router is away" in stage.lines
    assert stage.told == ["baked new"]
    stage.says = [Failure("the router is away")]
    assert stage.bake()["verdict"] == "too few requests to judge"


def test_somebody_else_is_faster(stage: Stage) -> None:
    stage.says = [*looks(tally(0)), {"active": "third"}]
    assert stage.bake(1)["verdict"] == "over: third took its place"
    stage.says = [{"canary": {"deployment_id": "new", "weight": 10}}, {"canary": None}]
    assert stage.bake(1, canary=True)["verdict"] == "over: none took its place"
    assert stage.told == []


def test_a_bake_that_is_cut_off_leaves_everything(stage: Stage) -> None:
    for error, word in (
        (Interrupted(15), "interrupted"),
        (Refused("the routing state is lost", "lost"), "failed"),
    ):
        stage.lines.clear()
        stage.says = [error]
        with pytest.raises(type(error)):
            stage.bake(1)
        said = f"the bake was {word}: new stays as it is, unwatched; `pulse-railway rollback`"
        assert stage.lines == [f"{said} goes back"]
    assert stage.told == []


def test_it_goes_back(stage: Stage) -> None:
    stage.says = looks(tally(0), tally(0, 60))
    with pytest.raises(
        bake.RolledBack, match=r"new did worse, and old is active again: 60 requests"
    ):
        stage.bake(60)
    assert stage.told == ["promote old", "remember old"]
    canary = {"canary": {"deployment_id": "new", "weight": 10}}
    stage.told.clear()
    stage.says = [{**look, **canary} for look in looks(tally(0), tally(0, 60))]
    with pytest.raises(bake.RolledBack, match="new did worse and is no canary any more"):
        stage.bake(60, canary=True)
    assert stage.told == ["withdraw new"]


def test_there_is_no_way_back(stage: Stage) -> None:
    def refuse() -> None:
        raise Refused("third is active", "active")

    stage.promotes, stage.says = refuse, looks(tally(0), tally(0, 60))
    with pytest.raises(Failure, match=r"new does worse \(.*\), but nothing was done: third is"):
        stage.bake(60)
    assert stage.told == ["promote old"]
    stage.told.clear()
    del stage.stack.services["prod-old"]
    stage.says = looks(tally(0), tally(0, 60))
    with pytest.raises(Failure, match=r"but old is gone: it stays active"):
        stage.bake(60)
    assert stage.told == []


@pytest.mark.parametrize("tally", [1, [], [1, 2, 3], [[1], "x", {}], [[-5] * 10, 0, []], None])
def test_a_tally_that_is_none_is_no_traceback(tally: Any) -> None:
    """Before, one key of Redis that somebody had written ended the bake, which then watched no
    more."""
    good = [[0, 0, 90, 0, 0, 10, 0, 0, 0, 0], 0, [100, *[0] * 14]]
    totals = bake.Totals()
    for seen in (good, tally, good):
        totals.update([{"router": "r", "tallies": {"new": seen}}])
        if seen is good:
            totals.reset("new")
        total = totals.total("new")
        assert (total.requests, total.failed) == (0, 0)
        assert bake.verdict(total, total) == "unknown"
        assert str(total)
