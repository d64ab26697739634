"""`--bake`: watch a new version after its promotion, and roll back if more of its requests fail.

The routers count each deployment's responses by status class, its failures and its durations. The
bake compares the share of failed requests (5xx, or no response): the new version's, from the start
of the bake, with that of the version before it.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from pulse_railway import router_commands
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows.reachability import store_last_promoted
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.runtime_image import load
from pulse_railway.stack import Stack

MIN_REQUESTS = 30  # of a version, below which its share of failures is not judged
CONFIDENCE = 0.99  # that the new version does worse, required for a rollback
Z = statistics.NormalDist().inv_cdf(CONFIDENCE)  # one-sided
DEFAULT_FAILED_SHARE = 0.05  # allowed if the version before had fewer than MIN_REQUESTS
POLL_INTERVAL = 10.0  # seconds, at least; each poll is a control command
MAX_POLLS = 20  # in one bake: a long one polls less often


class RolledBack(Failure):
    """The new version did worse, and the version before it is active again."""


@dataclass(frozen=True)
class Count:
    """The number of a deployment's requests, by outcome and duration."""

    requests: int = 0
    failed: int = 0  # 5xx, or no response
    seconds: tuple[int, ...] = ()  # requests in each of the router's duration buckets

    def __sub__(self, other: Count) -> Count:
        before = other.seconds or (0,) * len(self.seconds)
        seconds = tuple(max(a - b, 0) for a, b in zip(self.seconds, before, strict=False))
        failed = max(self.failed - other.failed, 0)
        return Count(max(self.requests - other.requests, failed), failed, seconds)

    def __add__(self, other: Count) -> Count:
        if not self.seconds or not other.seconds:
            seconds = self.seconds or other.seconds
        else:
            seconds = tuple(a + b for a, b in zip(self.seconds, other.seconds, strict=False))
        return Count(self.requests + other.requests, self.failed + other.failed, seconds)

    def __str__(self) -> str:
        share = f"{self.failed / self.requests:.1%}" if self.requests else "none"
        slow = quantile(self.seconds, 0.95)
        tail = f", 95 % within {slow:g} s" if slow else ""
        return f"{self.requests} requests, {share} failed{tail}"


def count(tally: Any) -> Count:
    """Return one router's tally of a deployment, from `status`; 0 if the tally is not valid."""
    try:
        classes, failed, seconds = tally
        counts = [*classes, failed, *seconds]
    except (TypeError, ValueError):
        return Count()
    if len(classes) < 6 or not all(type(n) is int and n >= 0 for n in counts):
        return Count()
    if len(seconds) != len(load("router").BUCKETS) + 1:  # a router of another version
        seconds = ()
    return Count(sum(classes) + failed, classes[5] + failed, tuple(seconds))


def quantile(buckets: tuple[int, ...], share: float) -> float:
    """Return the upper bound, in seconds, of the bucket that holds this quantile.

    0 if there are no requests, or if the quantile is beyond the last bound.
    """
    total, so_far = sum(buckets), 0
    for bound, number in zip(load("router").BUCKETS, buckets, strict=False):
        so_far += number
        if total and so_far >= share * total:
            return float(bound)
    return 0.0


def bounds(count: Count) -> tuple[float, float]:
    """Return Wilson's score interval of the share that failed: each bound holds with CONFIDENCE."""
    n = count.requests
    if not n:
        return 0.0, 1.0
    p, z = count.failed / n, Z
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def verdict(new: Count, old: Count) -> Literal["unknown", "well", "worse"]:
    """Compare the shares of failed requests.

    "worse" if the lower bound of the new version's share is above the upper bound of the old one's;
    "unknown" if the new version has had fewer than MIN_REQUESTS.
    """
    if new.requests < MIN_REQUESTS:
        return "unknown"
    allowed = bounds(old)[1] if old.requests >= MIN_REQUESTS else DEFAULT_FAILED_SHARE
    return "worse" if bounds(new)[0] > allowed else "well"


@dataclass
class Totals:
    """Sums of the routers' counts, by deployment and router.

    A router that restarts has a new id and counts from 0, so its earlier counts are kept.
    """

    base: dict[tuple[str, str], Count] = field(default_factory=dict)  # not included in the sum
    last: dict[tuple[str, str], Count] = field(default_factory=dict)

    def update(self, routers: list[dict[str, Any]]) -> None:
        for router in routers:
            for name, tally in (router.get("tallies") or {}).items():
                self.last[name, router["router"]] = count(tally)

    def reset(self, name: str) -> None:
        """Leave out this deployment's requests up to now."""
        self.base |= {key: counted for key, counted in self.last.items() if key[0] == name}

    def total(self, name: str) -> Count:
        total = Count()
        for key, counted in self.last.items():
            if key[0] == name:
                total += counted - self.base.get(key, Count())
        return total


def bake(
    api: Api, stack: Stack, new: str, old: str, seconds: int, output: Output, canary: bool
) -> dict[str, Any]:
    """Watch `new` as a step, and return the verdict with both deployments' counts.

    An interrupted bake changes nothing, and `status` reports that the bake was cut off.

    Args:
        seconds: the bake's duration.
        canary: `new` is the canary, not the active deployment.

    Raises RolledBack if `new` does worse.
    """
    try:
        with output.step(f"watch it for {seconds} s"):
            return _watch(api, stack, new, old, seconds, output, canary)
    except RolledBack:
        raise
    except (Failure, Interrupted) as error:
        outcome = "interrupted" if isinstance(error, Interrupted) else "failed"
        output.info(
            f"the bake was {outcome}: {new} stays as it is, unwatched; `pulse-railway rollback`"
            " goes back"
        )
        raise


def _watch(
    api: Api, stack: Stack, new: str, old: str, seconds: int, output: Output, canary: bool
) -> dict[str, Any]:
    totals, began, polls = Totals(), time.monotonic(), 0
    interval = max(POLL_INTERVAL, seconds / MAX_POLLS)
    while True:
        passed = time.monotonic() - began
        try:
            state = router_commands.read_state(api, stack)
        except Refused:
            raise
        except Failure as failure:  # without the counts there is nothing to judge
            output.warn(f"the bake goes on without a look: {failure}")
            state = None
        if state:
            totals.update(state["routers"])
            if not polls:
                totals.reset(new)
            polls += 1
            current = (state["canary"] or {}).get("deployment_id") if canary else state["active"]
            if current != new:
                return _result(totals, new, old, f"over: {current or 'none'} took its place")
            new_count, old_count = totals.total(new), totals.total(old)
            counts = f"{new_count}; {old}: {old_count}"
            output.waiting(f"{passed:.0f} of {seconds} s: {counts}")
            if verdict(new_count, old_count) == "worse":
                roll_back(api, stack, new, old, counts, output, canary)
        if passed >= seconds:
            break
        time.sleep(min(interval, max(seconds - passed, 0.1)))
    router_commands.send_finish_bake(api, stack, new)
    judged = verdict(totals.total(new), totals.total(old))
    return _result(totals, new, old, "well" if judged == "well" else "too few requests to judge")


def _result(totals: Totals, new: str, old: str, verdict: str) -> dict[str, Any]:
    counts = {name: totals.total(name) for name in (new, old)}
    return {
        "verdict": verdict,
        **{
            name: {"requests": c.requests, "failed": c.failed, "p95": quantile(c.seconds, 0.95)}
            for name, c in counts.items()
        },
    }


def roll_back(
    api: Api, stack: Stack, new: str, old: str, counts: str, output: Output, canary: bool
) -> None:
    """Make `old` active again, or end the canary; then raise RolledBack.

    Raises Failure if that is not possible.
    """
    why = f"bake: {counts}"
    if canary:
        router_commands.send_abort_canary(api, stack, new, why, output.warn)
        raise RolledBack(f"{new} did worse and is no canary any more: {counts}")
    service = stack.backend(old)
    if service is None:
        raise Failure(f"{new} does worse ({counts}), but {old} is gone: {new} stays active")
    try:
        promoted = router_commands.send_promote(
            api,
            stack,
            old,
            service.name,
            instead_of=new,
            rolls_back=True,
            why=why,
            warn=output.warn,
        )
    except Refused as refused:
        raise Failure(f"{new} does worse ({counts}), but nothing was done: {refused}") from None
    store_last_promoted(api, stack, old, promoted, output)
    raise RolledBack(f"{new} did worse, and {old} is active again: {counts}")
