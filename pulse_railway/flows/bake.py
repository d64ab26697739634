"""`--bake`: watch a new version after the switch, and go back by itself where it does worse.

The routers count each deployment's answers by status class, its failures and its durations. What
is judged is the share of requests that failed (5xx, or no answer), the new version's from when the
bake began beside that of the one before it.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from pulse_railway import router_commands
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows.reachability import remember_active
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.runtime_image import load
from pulse_railway.stack import Stack

LEAST = 30  # requests of the new version, before which nothing is said of it
CONFIDENCE = 0.99  # that it does worse, before it is rolled back
Z = statistics.NormalDist().inv_cdf(CONFIDENCE)  # one-sided
USUAL = 0.05  # the share that may fail where the one before had too few requests to compare
PAUSE = 10.0  # seconds between two looks; each is a control command, so
MOST_LOOKS = 20  # ... a long bake looks less often


class WentBack(Failure):
    """The new version did worse, and the one before is active again."""


@dataclass(frozen=True)
class Count:
    """What came of a deployment's requests."""

    requests: int = 0
    failed: int = 0  # 5xx, or no answer
    seconds: tuple[int, ...] = ()  # by the router's buckets of duration

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
    """One router's tally of a deployment, as its `status` has it; none where it holds anything but
    counts."""
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
    """The bound of the bucket within which that share of the requests lies; 0 for none, or
    where it is beyond the last bound."""
    total, so_far = sum(buckets), 0
    for bound, number in zip(load("router").BUCKETS, buckets, strict=False):
        so_far += number
        if total and so_far >= share * total:
            return float(bound)
    return 0.0


def bounds(count: Count) -> tuple[float, float]:
    """Wilson's interval of the share that failed: it is below, or above, with CONFIDENCE."""
    n = count.requests
    if not n:
        return 0.0, 1.0
    p, z = count.failed / n, Z
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def verdict(new: Count, old: Count) -> Literal["unknown", "well", "worse"]:
    """Does the new version do worse? It does where the least that its share can be is more than
    the most that the other's can be."""
    if new.requests < LEAST:
        return "unknown"
    usual = bounds(old)[1] if old.requests >= LEAST else USUAL
    return "worse" if bounds(new)[0] > usual else "well"


@dataclass
class Watch:
    """Counts over several routers, each of which may be restarted and then begins at 0."""

    base: dict[tuple[str, str], Count] = field(default_factory=dict)
    last: dict[tuple[str, str], Count] = field(default_factory=dict)

    def look(self, routers: list[dict[str, Any]]) -> None:
        for router in routers:
            for name, tally in (router.get("tallies") or {}).items():
                self.last[name, router["router"]] = count(tally)

    def begin(self, name: str) -> None:
        """What this deployment has been asked so far is not counted."""
        self.base |= {key: seen for key, seen in self.last.items() if key[0] == name}

    def total(self, name: str) -> Count:
        found = Count()
        for key, seen in self.last.items():
            if key[0] == name:
                found += seen - self.base.get(key, Count())
        return found


def bake(
    api: Api, stack: Stack, new: str, old: str, seconds: int, output: Output, canary: bool
) -> dict[str, Any]:
    """Watch `new` for that long, as a step. Returns what was seen; raises WentBack where it did
    worse. Cut off, it leaves everything as it is, and `status` says that nobody watches any more.
    """
    try:
        with output.step(f"watch it for {seconds} s"):
            return _watch(api, stack, new, old, seconds, output, canary)
    except WentBack:
        raise
    except (Failure, Interrupted) as error:
        what = "interrupted" if isinstance(error, Interrupted) else "failed"
        output.say(
            f"the bake was {what}: {new} stays as it is, unwatched; `pulse-railway rollback` goes"
            " back"
        )
        raise


def _watch(
    api: Api, stack: Stack, new: str, old: str, seconds: int, output: Output, canary: bool
) -> dict[str, Any]:
    watch, began, looks = Watch(), time.monotonic(), 0
    pause = max(PAUSE, seconds / MOST_LOOKS)
    while True:
        passed = time.monotonic() - began
        try:
            state = router_commands.read_state(api, stack)
        except Refused:
            raise
        except Failure as failure:  # on no answer nothing is done
            output.warn(f"the bake goes on without a look: {failure}")
            state = None
        if state:
            watch.look(state["routers"])
            if not looks:
                watch.begin(new)
            looks += 1
            still = (state["canary"] or {}).get("deployment_id") if canary else state["active"]
            if still != new:
                return _seen(watch, new, old, f"over: {still or 'none'} took its place")
            of_new, of_old = watch.total(new), watch.total(old)
            output.waiting(f"{passed:.0f} of {seconds} s: {of_new}; {old}: {of_old}")
            if verdict(of_new, of_old) == "worse":
                go_back(api, stack, new, old, f"{of_new}; {old}: {of_old}", output, canary)
        if passed >= seconds:
            break
        time.sleep(min(pause, max(seconds - passed, 0.1)))
    router_commands.send_finish_bake(api, stack, new)
    judged = verdict(watch.total(new), watch.total(old))
    return _seen(watch, new, old, "well" if judged == "well" else "too few requests to judge")


def _seen(watch: Watch, new: str, old: str, verdict: str) -> dict[str, Any]:
    counts = {name: watch.total(name) for name in (new, old)}
    return {
        "verdict": verdict,
        **{
            name: {"requests": c.requests, "failed": c.failed, "p95": quantile(c.seconds, 0.95)}
            for name, c in counts.items()
        },
    }


def go_back(
    api: Api, stack: Stack, new: str, old: str, seen: str, output: Output, canary: bool
) -> None:
    """Leave the new version. Raises WentBack, or Failure where there is no way back."""
    why = f"bake: {seen}"
    if canary:
        router_commands.send_abort_canary(api, stack, new, why, output.warn)
        raise WentBack(f"{new} did worse and is no canary any more: {seen}")
    service = stack.backend(old)
    if service is None:
        raise Failure(f"{new} does worse ({seen}), but {old} is gone: it stays active")
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
        raise Failure(f"{new} does worse ({seen}), but nothing was done: {refused}") from None
    remember_active(api, stack, old, promoted, output)
    raise WentBack(f"{new} did worse, and {old} is active again: {seen}")
