"""`--bake`: watch a new version after its promotion, and roll back if its visitors fare worse.

From the bake's beginning the routers count what the visitors of the new version and of the version
before it get, in total and by client address (router.py's `Watch`). `verdict` compares the two; it
is a function of counts, and `python -m benchmarks.bake` prints how often it is wrong.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pulse_railway import router_commands
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows.reachability import store_last_promoted
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.runtime_image import load
from pulse_railway.stack import Stack

MIN_REQUESTS = 30  # of a version, below which it is not judged
MIN_VISITORS = 5  # client addresses, below which it is not judged
MOST_OF_ONE = 1 / MIN_VISITORS  # of the requests: what one address counts at most
LEFT_OUT = 2  # addresses with most failures: one person has an IPv4 and an IPv6 address
CONFIDENCE = 0.99  # that the new version does worse, required for a rollback
Z = statistics.NormalDist().inv_cdf(CONFIDENCE)  # one-sided
MIN_FAILED = 3  # requests, below which a version does not do worse
DEFAULT_FAILED_SHARE = 0.05  # allowed if the version before has too few in the bake, at most
SLOW_SHARE = 0.01  # of requests beyond --bake-latency-ms, which is a 99 % quantile
POLL_INTERVAL = 10.0  # seconds, at least; each poll is a control command
MAX_POLLS = 20  # in one bake: a long one polls less often
SILENT_SECONDS = 60.0  # a router that reported longer ago is not there any more

Verdict = Literal["too few requests to judge", "too few visitors", "well", "worse", "slow"]


class RolledBack(Failure):
    """The new version did worse, and the version before it is active again."""


# -- counts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """The number of a deployment's requests since its routers started, by outcome."""

    requests: int = 0
    failed: int = 0  # 5xx, or no whole response

    def __add__(self, other: Count) -> Count:
        return Count(self.requests + other.requests, self.failed + other.failed)


def count(tally: Any) -> Count:
    """Return one router's tally of a deployment, from `status`; 0 if the tally is not valid."""
    try:
        classes, failed, seconds = tally
        counts = [*classes, failed, *seconds]
    except (TypeError, ValueError):
        return Count()
    if len(classes) < 6 or not all(type(n) is int and n >= 0 for n in counts):
        return Count()
    return Count(sum(classes) + failed, classes[5] + failed)


def history(routers: list[dict[str, Any]], name: str) -> Count:
    """Return what the routers have counted of a deployment since they started."""
    tallies = ((router.get("tallies") or {}).get(name) for router in routers)
    return sum(map(count, tallies), Count())


@dataclass(frozen=True)
class Client:
    """What the requests from one address got."""

    requests: float
    failed: float
    slow: float

    def times(self, factor: float) -> Client:
        return Client(self.requests * factor, self.failed * factor, self.slow * factor)


@dataclass(frozen=True)
class Sample:
    """What the visitors of one version got during a bake, from all routers."""

    requests: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)  # failures by kind
    slow: int = 0
    visitors: int = 0  # addresses, at least
    seconds: tuple[int, ...] = ()  # answers in each of the router's duration buckets
    clients: tuple[Client, ...] = ()  # those with most requests and failures

    @property
    def failed(self) -> int:
        return sum(self.kinds.values())

    @property
    def enough(self) -> bool:
        counted = sum(client.requests for client in limited(self))
        return self.visitors >= MIN_VISITORS and counted >= MIN_REQUESTS

    def __str__(self) -> str:
        share = f"{self.failed / self.requests:.1%}" if self.requests else "none"
        kinds = ", ".join(f"{n} {KINDS.get(kind, kind)}" for kind, n in self.kinds.items() if n)
        slow = quantile(self.seconds, 0.95)
        tail = f", 95 % within {slow:g} s" if slow else ""
        late = f", {self.slow} slow" if self.slow else ""
        visitors = f"of {self.visitors} visitor{'s' if self.visitors != 1 else ''}"
        why = f" ({kinds})" if kinds else ""
        return f"{self.requests} requests {visitors}, {share} failed{why}{late}{tail}"


KINDS = {
    "5xx": "answered 5xx",
    "gave_up": "left without an answer",
    "hung": "still wait for their page",
    "broken_off": "broke off",
    "short_socket": "sockets closed at once",
    "refused": "refused",
    "connect_timeout": "not connected",
    "timeout": "not answered in time",
    "lost": "lost before an answer",
    "busy": "not sent, since too many waited",
}


def sample(found: Any) -> Sample:
    """Return a version's sample from the router's answer; an empty one if it is not valid."""
    try:
        numbers = [found["requests"], found["slow"], found["visitors"]]
        kinds, seconds = dict(found["failed"]), tuple(found["seconds"])
        clients = tuple(Client(*entry) for entry in found["addresses"].values())
        parts = [n for client in clients for n in (client.requests, client.failed, client.slow)]
    except (TypeError, ValueError, KeyError, AttributeError):
        return Sample()
    if not all(type(n) is int and n >= 0 for n in [*numbers, *kinds.values(), *seconds, *parts]):
        return Sample()
    requests, slow, visitors = numbers
    return Sample(requests, kinds, slow, visitors, seconds, clients)


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


# -- the verdict -------------------------------------------------------------------------------


def limited(sample: Sample) -> list[Client]:
    """Return a sample's clients, the last one for all that are not listed. Each listed one counts
    at most MOST_OF_ONE of all that is counted: a larger one is scaled down."""
    listed = sorted(sample.clients, key=lambda client: client.requests)
    requests = max(sample.requests - sum(client.requests for client in listed), 0)
    failed = max(sample.failed - sum(client.failed for client in listed), 0)
    slow = max(sample.slow - sum(client.slow for client in listed), 0)
    others = Client(requests, min(failed, requests), min(slow, requests))
    below, larger = others.requests + sum(c.requests for c in listed), list[Client]()
    while True:  # limit = MOST_OF_ONE * (below + limit * len(larger))
        limit = MOST_OF_ONE * below / (1 - MOST_OF_ONE * len(larger))
        if not listed or len(larger) == MIN_VISITORS - 1 or listed[-1].requests <= limit:
            return [*listed, *(c.times(min(limit / c.requests, 1.0)) for c in larger), others]
        larger.append(listed.pop())
        below -= larger[-1].requests


def without_worst(sample: Sample, what: Callable[[Client], float]) -> tuple[float, float]:
    """Return the number of requests, and of those that `what` counts, without the listed clients
    that have most of them: no single visitor may decide."""
    *clients, others = limited(sample)
    kept = [*sorted(clients, key=what)[:-LEFT_OUT], others]
    return sum(client.requests for client in kept), sum(map(what, kept))


def bounds(requests: float, failed: float) -> tuple[float, float]:
    """Return Wilson's score interval of the share that failed: each bound holds with CONFIDENCE."""
    n, z = requests, Z
    if n <= 0:
        return 0.0, 1.0
    p = min(failed / n, 1.0)
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def verdict(new: Sample, old: Sample, before: Count, slow: bool = False) -> Verdict:
    """Compare the new version with the old one.

    "worse" if the lower bound of the share of failed requests is above the upper bound of the old
    version's. If the old version has too few in the bake, its share `before` is taken, or that of
    the few if it is larger; `before` excuses at most DEFAULT_FAILED_SHARE, since anybody can have
    made it worse. "slow", if it is to be judged, likewise by slow requests, of which SLOW_SHARE is
    always allowed.
    """
    if new.visitors < MIN_VISITORS and new.requests:
        return "too few visitors"
    if not new.enough:
        return "too few requests to judge"

    usual = DEFAULT_FAILED_SHARE
    if before.requests >= MIN_REQUESTS:
        usual = min(usual, bounds(before.requests, before.failed)[1])
    if exceeds(new, old, lambda client: client.failed, 0.0 if old.enough else usual):
        return "worse"
    if slow and exceeds(new, old, lambda client: client.slow, SLOW_SHARE):
        return "slow"
    return "well"


def exceeds(new: Sample, old: Sample, what: Callable[[Client], float], allowed: float) -> bool:
    """Has the new version more than `allowed` of `what`, a share, and more than the old one has?"""
    requests, bad = without_worst(old, what)
    if old.enough:
        allowed = max(allowed, bounds(requests, bad)[1])
    elif requests:
        allowed = max(allowed, bad / requests)
    requests, bad = without_worst(new, what)
    return bad >= MIN_FAILED and bounds(requests, bad)[0] > allowed


# -- the bake ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What one answer of the router says of a bake."""

    new: Sample = field(default_factory=Sample)
    old: Sample = field(default_factory=Sample)
    before: Count = field(default_factory=Count)  # the old version, since the routers started
    counted: str | None = None  # the deployment whose visitors the routers count
    since: float | None = None  # when the bake began that they count, by the store's clock
    reported: bool = True  # False: no router has reported lately

    def verdict(self, slow: bool) -> Verdict:
        return verdict(self.new, self.old, self.before, slow)


def look(state: dict[str, Any], new: str, old: str) -> Look:
    """Return what `control status` says of the bake of `new`."""
    found = state.get("bake")
    found = found if isinstance(found, dict) else {}
    counted = found.get("deployment_id")
    samples = (counted == new and found.get("samples")) or {}
    ages = [router.get("age") for router in state["routers"]]
    reported = any(type(age) in (int, float) and age < SILENT_SECONDS for age in ages)
    before = history(state["routers"], old)
    since = found.get("since") if counted == new else None
    new_sample, old_sample = sample(samples.get(new)), sample(samples.get(old))
    return Look(new_sample, old_sample, before, counted, since, reported)


def bake(
    api: Api,
    stack: Stack,
    new: str,
    old: str,
    seconds: int,
    output: Output,
    canary: bool,
    slow: bool = False,
) -> dict[str, Any]:
    """Watch `new` as a step, and return the verdict with both deployments' counts.

    An interrupted bake changes nothing, and `status` reports that the bake was cut off.

    Args:
        seconds: the bake's duration.
        canary: `new` is the canary, not the active deployment.
        slow: slow requests are judged, too.

    Raises RolledBack if `new` does worse, and Failure if the routers cannot be asked at the end.
    """
    with told_if_cut_off(new, output), output.step(f"watch it for {seconds} s"):
        began, warned, retried = time.monotonic(), False, False
        last, lost = Look(), False
        interval = max(POLL_INTERVAL, seconds / MAX_POLLS)
        while True:
            passed, seen = time.monotonic() - began, None
            try:
                state = router_commands.read_state(api, stack)
            except Refused:
                raise
            except Failure as failure:  # without the counts there is nothing to judge
                output.warn(f"the bake goes on without a look: {failure}")
            else:
                seen = look(state, new, old)
                current = (
                    (state["canary"] or {}).get("deployment_id") if canary else state["active"]
                )
                if current != new:
                    return _result(seen, new, old, f"over: {current or 'none'} took its place")
                if None not in (seen.since, last.since) and seen.since != last.since:
                    return _result(seen, new, old, "over: another bake of it has begun")
                if seen.counted == new:
                    lost = lost or seen.new.requests < last.new.requests
                    last = seen
                if seen.counted != new and not warned:
                    warned = True
                    output.warn(not_counted(seen))
                judged = seen.verdict(slow)
                counts = f"{seen.new}; {old}: {seen.old}"
                why = "" if judged == "well" else f" ({judged})"
                output.waiting(f"{passed:.0f} of {seconds} s: {counts}{why}")
                if judged in ("worse", "slow"):
                    roll_back(api, stack, new, old, judged, counts, output, canary)
            if passed < seconds:
                time.sleep(min(interval, max(seconds - passed, 0.1)))
                continue
            if lost:
                raise Failure(
                    "Redis has lost what the routers had counted: it is not known whether"
                    f" {new} does well. `pulse-railway promote --bake` watches it anew"
                )
            if seen and seen.reported:
                router_commands.send_finish_bake(api, stack, new)
                return _result(seen, new, old, seen.verdict(slow))
            if retried:
                raise Failure(
                    "the routers could not be asked at the end of the bake: it is not known"
                    f" whether {new} does well. `pulse-railway status` shows what answers"
                )
            retried = True
            time.sleep(POLL_INTERVAL)


@contextlib.contextmanager
def told_if_cut_off(new: str, output: Output) -> Iterator[None]:
    """Say what holds after a bake that has no verdict."""
    try:
        yield
    except RolledBack:
        raise
    except (Failure, Interrupted) as error:
        outcome = "interrupted" if isinstance(error, Interrupted) else "failed"
        output.info(
            f"the bake was {outcome}: {new} stays as it is, unwatched; `pulse-railway rollback`"
            " goes back"
        )
        raise


def not_counted(seen: Look) -> str:
    if seen.counted:
        return f"the routers count the visitors of {seen.counted}, which bakes too"
    return (
        "the router is of another version, and counts no visitors for a bake: `pulse-railway"
        " ensure` brings this one"
    )


def _result(seen: Look, new: str, old: str, verdict: str) -> dict[str, Any]:
    return {
        "verdict": verdict,
        **{
            name: {
                "requests": sample.requests,
                "failed": sample.failed,
                "kinds": dict(sample.kinds),
                "slow": sample.slow,
                "visitors": sample.visitors,
                "p95": quantile(sample.seconds, 0.95),
            }
            for name, sample in ((new, seen.new), (old, seen.old))
        },
    }


def is_over(baking: Mapping[str, Any] | None) -> bool:
    """Has another promotion ended this bake?"""
    return baking is not None and str(baking["verdict"]).startswith("over")


def summary(text: str, deployment_id: str, baking: Mapping[str, Any] | None) -> str:
    """Return a verb's result in words, with what came of the bake."""
    if baking is None:
        return text
    if is_over(baking):
        return f"the bake of {deployment_id} is {baking['verdict']}"
    return f"{text}; its bake: {baking['verdict']}"


def roll_back(
    api: Api,
    stack: Stack,
    new: str,
    old: str,
    judged: str,
    counts: str,
    output: Output,
    canary: bool,
) -> None:
    """Make `old` active again, or end the canary; then raise RolledBack.

    Raises Failure if that is not possible.
    """
    why, did = f"bake: {counts}", "was too slow" if judged == "slow" else "did worse"
    if canary:
        router_commands.send_abort_canary(api, stack, new, why, output.warn)
        raise RolledBack(f"{new} {did} and is no canary any more: {counts}")
    service = stack.backend(old)
    if service is None:
        raise Failure(f"{new} did worse ({counts}), but {old} is gone: {new} stays active")
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
        raise Failure(f"{new} did worse ({counts}), but nothing was done: {refused}") from None
    store_last_promoted(api, stack, old, promoted, output)
    raise RolledBack(f"{new} {did}, and {old} is active again: {counts}")
