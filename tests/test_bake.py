"""The bake's verdict, and its behavior without an answer or after another promotion.

test_bake_counts.py checks what routers count, test_life.py runs a bake on real routers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import control
import router
from benchmarks import bake as simulation
from pulse_railway import config, options, router_commands, runtime_image
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows import bake
from pulse_railway.flows.bake import Client, Count, Sample, limited, verdict
from pulse_railway.output import Output
from pulse_railway.stack import Service, Stack
from tests.test_unreliable_ssh import Recorder

BUCKETS = len(runtime_image.load("router").BUCKETS) + 1
NONE = Count()
FEW, LONELY = "too few requests to judge", "too few visitors"


def sample(requests: int, failed: int = 0, slow: int = 0, visitors: int = 100) -> Sample:
    """Return a sample of visitors none of whom comes often."""
    return Sample(requests, {"5xx": failed}, slow, visitors)


# -- the verdict -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (sample(0), sample(1000), FEW),
        (sample(29, 29), sample(1000), FEW),
        (sample(30), sample(1000), "well"),
        (sample(30, 30), sample(1000), "worse"),
        (sample(1000, 1), sample(1000), "well"),  # a single failure is not significant
        (sample(1000, 60), sample(1000, 20), "worse"),
        (sample(1000, 60), sample(1000, 60), "well"),  # as bad as the other
        (sample(1000, 600), sample(1000, 900), "well"),  # better than the other
        (sample(100, 2), sample(0), "well"),  # nothing to compare with: 5 % is allowed
        (sample(100, 50), sample(0), "worse"),
        (sample(100, 50), sample(29, 29), "well"),  # few, but they fail too
        (sample(100, 50, visitors=4), sample(1000), LONELY),
        (sample(100, 50), sample(1000, 900, visitors=4), "well"),
        (sample(100, 50), sample(1000, visitors=4), "worse"),
    ],
)
def test_verdict(new: Sample, old: Sample, expected: str) -> None:
    assert verdict(new, old, NONE) == expected


def test_history_counts_only_where_the_old_version_has_too_few_requests() -> None:
    """Yesterday's outage does not excuse a bad version; today's does."""
    bad, outage_before = sample(1000, 300), Count(5000, 2500)
    assert verdict(bad, sample(1000), outage_before) == "worse"
    assert verdict(bad, sample(10), outage_before) == "worse"  # anybody can have caused it
    assert verdict(sample(1000, 30), sample(10), outage_before) == "well"
    assert verdict(sample(1000, 30), sample(10), Count(5000, 0)) == "worse"
    assert verdict(bad, sample(1000, 300), Count(5000, 0)) == "well"  # both fail alike
    assert verdict(bad, sample(10), Count(5000, 0)) == "worse"


def test_slow_requests_are_judged_where_asked_for() -> None:
    for slow, old, expected in (
        (5, sample(1000), "well"),  # 99 % are not slow
        (60, sample(1000), "slow"),
        (60, sample(1000, 0, 60), "well"),  # as slow as the other
        (60, sample(0), "slow"),
    ):
        assert verdict(sample(1000, 0, slow), old, NONE, slow=True) == expected
        assert verdict(sample(1000, 0, slow), old, NONE) == "well"


def test_a_latency_needs_a_bake(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"deployment_id": "a", "bake_latency_ms": 300}
    with pytest.raises(Failure, match="--bake-latency-ms needs --bake"):
        options.parse_promote(flags, Output())
    parsed = options.parse_promote({**flags, "bake": 60}, Output())
    assert (parsed.bake, parsed.bake_latency_ms) == (60, 300)
    options.parse_promote({**flags, "bake": 0}, Output())  # one that invoke.yaml has is left out
    words: list[str] = []
    answer = {"promoted": None}
    monkeypatch.undo()
    monkeypatch.setattr(router_commands, "send_command", lambda *w, **_: words.extend(w) or answer)
    api: Any = None
    router_commands.send_promote(api, stage.stack, "a", "a", bake=60, bake_latency_ms=300)
    assert words[-4:] == ["--bake", "60", "--bake-latency-ms", "300"]
    parsed_words = control.control_parser().parse_args(words[2:])
    step = control.step_of(parsed_words)
    record = router.Record("a", service_name="a", registered_at=1.0)
    state = router.Routing(now=5.0, active="old", records={"a": record})
    assert step(state).records["a"].bake == router.Bake(65.0, 5.0, "old", 300.0)


def often(requests: int, failed: int, rest: Sample) -> Sample:
    """Return a sample with a client who has so many more requests, among listed ones."""
    clients = (Client(requests, failed, 0), *(Client(8, 0, 0) for _ in range(4)))
    return Sample(rest.requests + requests + 32, {"5xx": rest.failed + failed}, 0, 50, (), clients)


def test_one_client_counts_a_fifth_and_decides_nothing() -> None:
    attacked = often(40, 40, sample(68))
    counted = limited(attacked)
    total = sum(client.requests for client in counted)
    assert max(client.requests for client in counted[:-1]) == pytest.approx(total / 5)
    assert verdict(attacked, sample(1000), Count(5000, 0)) == "well"
    # without it 100 requests are left, and of these 30 failed
    assert verdict(often(4000, 0, sample(68, 30)), sample(1000), NONE) == "worse"
    # another one does not have the old version look bad
    assert verdict(sample(1000, 200), often(4000, 4000, sample(100)), NONE) == "worse"


@given(st.lists(st.integers(1, 1000), min_size=5, max_size=30))
def test_no_client_counts_more_than_a_fifth(requests: list[int]) -> None:
    clients = sorted(requests)[-10:]
    given_sample = Sample(
        sum(requests), {}, 0, len(requests), (), tuple(Client(n, n, 0) for n in clients)
    )
    counted = limited(given_sample)
    total = sum(client.requests for client in counted)
    assert all(client.requests <= total / 5 + 1e-6 for client in counted[:-1])
    assert all(client.failed <= client.requests + 1e-6 for client in counted)
    assert counted[-1].requests == sum(requests) - sum(clients)


@given(st.integers(30, 5000), st.integers(30, 5000), st.floats(0, 1))
def test_a_share_like_the_old_versions_is_never_worse(new: int, old: int, share: float) -> None:
    old_failed = -int(-old * share // 1)
    assert verdict(sample(new, int(new * share)), sample(old, old_failed), NONE) != "worse"


def test_verdicts_are_rarely_wrong() -> None:
    """docs/operating.md has the table of a thousand runs: `python -m benchmarks.bake`."""
    for kind, counts in simulation.verdicts(150):
        assert simulation.wrong(kind, counts) <= 0.08, (kind.what, counts)


# -- counting ----------------------------------------------------------------------------------


def reported(requests: int, failed: int = 0, slow: int = 0, who: str = "") -> dict[str, Any]:
    """Return what a router writes of a deployment: visitors who come once, or one, `who`."""
    names = [who] if who else [f"{n:012x}" for n in range(6)]
    each = [requests, failed, slow] if who else [1, 0, 0]
    addresses = dict.fromkeys(names, each) if requests else {}
    seconds = [requests - failed, *[0] * (BUCKETS - 1)]
    return {
        "requests": requests,
        "failed": {"5xx": failed},
        "slow": slow,
        "visitors": len(addresses) if who else requests,
        "seconds": seconds,
        "addresses": addresses,
    }


def test_samples_of_routers_are_summed() -> None:
    one, other = reported(10, 2, 1, "a"), reported(5, 1, 0, "a")
    both = bake.sample(control.sum_of_samples(one, other))
    assert (both.requests, both.failed, both.slow, both.visitors) == (15, 3, 1, 1)
    assert both.clients == (Client(15, 3, 1),)
    apart = bake.sample(control.sum_of_samples(one, reported(5, 1, 0, "b")))
    assert (apart.visitors, len(apart.clients)) == (2, 2)
    assert str(both) == (
        "15 requests of 1 visitor, 20.0% failed (3 answered 5xx), 1 slow, 95 % within 0.005 s"
    )
    assert str(Sample()) == "0 requests of 0 visitors, none failed"


INVALID = [1, [], None, {}, reported(5) | {"requests": -5}, reported(5) | {"failed": {"x": "y"}},
           reported(5) | {"addresses": {"a": [1]}}, reported(5) | {"seconds": [0.5]},
           reported(5) | {"visitors": True}]  # fmt: skip


@pytest.mark.parametrize("broken", INVALID)
def test_an_invalid_sample_is_not_counted(broken: Any) -> None:
    """An invalid key in Redis has once ended a bake with a traceback."""
    assert bake.sample(broken).requests == 0
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        control.sum_of_samples(reported(1), broken)


@pytest.mark.parametrize("tally", [1, [], [1, 2, 3], [[1], "x", {}], [[-5] * 10, 0, []], None])
def test_an_invalid_tally_is_not_counted(tally: Any) -> None:
    good = [[0, 0, 90, 0, 0, 10, 0, 0, 0, 0], 3, [100, *[0] * 14]]
    routers = [{"tallies": {"old": t}} for t in (good, tally, good)] + [{"tallies": None}, {}]
    assert bake.history(routers, "old") == Count(206, 26)


# -- failures ----------------------------------------------------------------------------------


ROUTER = {"router": "r", "age": 3.0}


class Stage:
    """A router with prepared answers, which records the commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[dict[str, Any] | BaseException] = []  # one a poll; the last one stays
        self.commands: list[str] = []
        self.lines: list[str] = []
        self.on_promote: Callable[[], None] = lambda: None
        self.now, self.asked = 0.0, list[float]()  # seconds; times of the looks
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)
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

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def state(self, *_: Any) -> Any:
        self.asked.append(self.now)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return {"active": "new", "canary": None, "routers": [ROUTER], **answer}

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


def answers(*samples: dict[str, Any]) -> list[Any]:
    old = reported(1000)
    return [
        {"bake": {"deployment_id": "new", "samples": {"new": new, "old": old}}} for new in samples
    ]


def test_a_router_that_does_not_answer_changes_nothing(stage: Stage) -> None:
    stage.answers = [Failure("the router is away"), *answers(reported(0), reported(50))]
    assert stage.bake(20)["verdict"] == "well"
    assert "the bake goes on without a look: the router is away" in stage.lines
    assert stage.commands == ["baked new"]


def test_a_bake_that_is_not_seen_at_its_end_is_not_well(stage: Stage) -> None:
    """One more look is taken; a look before the end, or without a router's report, is none."""
    away, well = Failure("the router is away"), answers(reported(50))[0]
    silent = well | {"routers": [{"router": "r", "age": 61.0}]}
    for last in (away, silent, well | {"routers": []}):
        stage.commands.clear()
        stage.answers = [well, last]
        with pytest.raises(Failure, match="it is not known whether new does well"):
            stage.bake(1)
        assert stage.commands == []
        assert "the bake was failed: new stays as it is" in stage.lines[-1]
        stage.answers = [well, last, well]
        stage.bake(0)
        assert stage.bake(0)["verdict"] == "well"


def test_a_bake_is_well_only_with_a_look_at_its_end(stage: Stage) -> None:
    """A thousand bakes whose looks fail at random."""
    rng, seen = random.Random(1), set()
    well = answers(reported(50))[0]
    for _ in range(1000):
        fails = [rng.random() < 0.6 for _ in range(12)]
        stage.now, stage.asked = 0.0, []
        stage.answers = [Failure("away") if f else well for f in fails]
        try:
            result = stage.bake(40)["verdict"]
        except Failure:
            result = "not known"
        # the last two looks are those at the end, or the one
        at_end = [when for when in stage.asked if when >= 40]
        failed = fails[: len(stage.asked)]
        assert result == ("not known" if failed[-1] else "well")
        assert len(at_end) in ((2,) if failed[-1] else (1, 2))
        seen.add(result)
    assert seen == {"well", "not known"}


def test_too_few_visitors_are_said(stage: Stage) -> None:
    stage.answers = answers(reported(100, 100, 0, "one"))
    result = stage.bake()
    assert (result["verdict"], result["new"]["visitors"]) == (LONELY, 1)
    assert any(f"({LONELY})" in line for line in stage.lines)
    said = bake.summary("new is active", "new", result)
    assert said == f"new is active; its bake: {LONELY}"
    stage.answers = answers(reported(7))
    assert stage.bake()["verdict"] == FEW
    assert (
        "7 requests of 7 visitors, 0.0% failed, 95 % within 0.005 s; old: 1000" in stage.lines[-1]
    )


def test_a_router_of_another_version_is_told(stage: Stage) -> None:
    """It counts no visitors, and a bake of another deployment is not this one's."""
    other = {"bake": {"deployment_id": "other", "samples": {"new": reported(100, 100)}}}
    none = "counts no visitors for a bake"
    for answer, words in (
        ({}, none),
        ({"bake": None}, none),
        ({"bake": 7}, none),
        (other, "the routers count the visitors of other, which bakes too"),
    ):
        stage.lines.clear()
        stage.answers = [answer]
        assert stage.bake(20)["verdict"] == FEW
        assert sum(words in line for line in stage.lines) == 1


def test_another_promotion_ends_the_bake(stage: Stage) -> None:
    stage.answers = [*answers(reported(0)), {"active": "third"}]
    result = stage.bake(1)
    assert result["verdict"] == "over: third took its place"
    assert bake.is_over(result)
    said = bake.summary("new is active", "new", result)
    assert said == "the bake of new is over: third took its place"
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
    stage.answers = answers(reported(0), reported(60, 60))
    with pytest.raises(
        bake.RolledBack, match=r"new did worse, and old is active again: 60 requests"
    ):
        stage.bake(60)
    assert stage.commands == ["promote old", "store old"]
    canary = {"canary": {"deployment_id": "new", "weight": 10}}
    stage.commands.clear()
    stage.answers = [{**answer, **canary} for answer in answers(reported(0), reported(60, 60))]
    with pytest.raises(bake.RolledBack, match="new did worse and is no canary any more"):
        stage.bake(60, canary=True)
    assert stage.commands == ["withdraw new"]


def test_a_rollback_that_is_not_possible(stage: Stage) -> None:
    def refuse() -> None:
        raise Refused("third is active", "active")

    stage.on_promote, stage.answers = refuse, answers(reported(0), reported(60, 60))
    with pytest.raises(Failure, match=r"new did worse \(.*\), but nothing was done: third is"):
        stage.bake(60)
    assert stage.commands == ["promote old"]
    stage.commands.clear()
    del stage.stack.services["prod-old"]
    stage.answers = answers(reported(0), reported(60, 60))
    with pytest.raises(Failure, match=r"but old is gone: new stays active"):
        stage.bake(60)
    assert stage.commands == []


def test_counts_that_redis_has_lost_are_no_verdict(stage: Stage) -> None:
    stage.answers = answers(reported(180, 2), reported(60), reported(90))
    with pytest.raises(Failure, match="Redis has lost what the routers had counted: it is not"):
        stage.bake(20)
    assert stage.commands == []
    stage.answers = answers(reported(180, 2), reported(60, 40))  # but a bad one stays bad
    with pytest.raises(bake.RolledBack):
        stage.bake(60)


def test_another_bake_of_the_same_version_ends_this_one(stage: Stage) -> None:
    one, other = answers(reported(50), reported(0))
    for since, answer in ((5.0, one), (9.0, other)):
        answer["bake"]["since"] = since
    stage.answers = [one, other]
    assert stage.bake(20)["verdict"] == "over: another bake of it has begun"
    assert stage.commands == []  # the other one ends by itself
