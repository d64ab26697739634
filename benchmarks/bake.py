"""How often a bake's verdict is wrong: `python -m benchmarks.bake [RUNS]` prints a table.

Visitors come by chance, some of them often; each kind of traffic is judged six times in a bake, as
`deploy --bake` does, until a rollback. No process is started: the verdict is a function of counts.
"""

from __future__ import annotations

import collections
import heapq
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pulse_railway.flows.bake import Client, Count, Sample, verdict

LOOKS = 6  # in a bake
LISTED = 5  # addresses that a router reports, of each sort
GOOD, BAD, OUTAGE = 0.002, 0.2, 0.6  # shares of failed requests


class Visitors:
    """The requests of one version's visitors so far: of each address, how many, and failed."""

    def __init__(self, rng: random.Random, addresses: int) -> None:
        self.rng = rng
        # some come ten times as often as others; requests in one look, at most
        self.often = [rng.choice((1, 2, 4, 10)) for _ in range(addresses)]
        self.counts = [[0, 0] for _ in self.often]

    def come(self, failing: float, share: float = 1.0) -> None:
        """Let time pass until the next look: each request fails with a probability of `failing`."""
        for often, counts in zip(self.often, self.counts, strict=True):
            requests = self.rng.binomialvariate(often, share / 2)
            counts[0] += requests
            counts[1] += self.rng.binomialvariate(requests, failing)

    def sample(self) -> Sample:
        seen = [counts for counts in self.counts if counts[0]]
        most = [
            n
            for column in (0, 1)
            for _, n in heapq.nlargest(
                LISTED, ((counts[column], n) for n, counts in enumerate(seen))
            )
        ]
        return Sample(
            sum(counts[0] for counts in seen),
            {"5xx": sum(counts[1] for counts in seen)},
            visitors=len(seen),
            clients=tuple(Client(seen[n][0], seen[n][1], 0) for n in set(most)),
        )


type Traffic = Callable[[Visitors, Visitors, int], None]  # new, old, and the look's number


def nothing_fails(new: Visitors, old: Visitors, look: int) -> None:
    new.come(GOOD)
    old.come(GOOD)


def both_fail(new: Visitors, old: Visitors, look: int) -> None:
    """From the third look on, a database that both need is away."""
    for version in (new, old):
        version.come(GOOD if look < 2 else OUTAGE)


def only_new_fails(new: Visitors, old: Visitors, look: int) -> None:
    new.come(BAD)
    old.come(GOOD)


def only_old_fails(new: Visitors, old: Visitors, look: int) -> None:
    new.come(GOOD)
    old.come(BAD)


def few_requests(new: Visitors, old: Visitors, look: int) -> None:
    new.come(BAD, 0.02)
    old.come(GOOD, 0.02)


def hostile_to_new(new: Visitors, old: Visitors, look: int) -> None:
    """One client sends two hundred failing requests to the new version between two looks."""
    nothing_fails(new, old, look)
    attack(new)


def hostile_to_old(new: Visitors, old: Visitors, look: int) -> None:
    """The new version fails, and one client has the old one fail, too."""
    only_new_fails(new, old, look)
    attack(old)


def attack(version: Visitors) -> None:
    for counts in version.counts[:2]:  # IPv4 and IPv6
        counts[0] += 100
        counts[1] += 100


@dataclass(frozen=True)
class Kind:
    what: str
    traffic: Traffic
    right: tuple[str, ...]  # verdicts


TOO_FEW = ("too few requests to judge", "too few visitors")
KINDS = (
    Kind("both are well", nothing_fails, ("well",)),
    Kind(f"both fail alike ({OUTAGE:.0%})", both_fail, ("well",)),
    Kind(f"only the new one fails ({BAD:.0%})", only_new_fails, ("worse",)),
    Kind(f"only the old one fails ({BAD:.0%})", only_old_fails, ("well",)),
    Kind("few requests", few_requests, TOO_FEW),
    Kind("one client, with two addresses, has the new one fail", hostile_to_new, ("well",)),
    Kind(f"one client, with two addresses, hides that {BAD:.0%} fail", hostile_to_old, ("worse",)),
)


def run(kind: Kind, rng: random.Random) -> str:
    """Return the verdict of one bake."""
    new, old = Visitors(rng, rng.randint(8, 25)), Visitors(rng, rng.randint(8, 25))
    judged = ""
    for number in range(LOOKS):
        kind.traffic(new, old, number)
        judged = verdict(new.sample(), old.sample(), Count(5000, 10))
        if judged == "worse":
            break
    return judged


def verdicts(runs: int, seed: int = 1) -> Iterator[tuple[Kind, collections.Counter[str]]]:
    """Yield how often each verdict was given, by kind of traffic."""
    for kind in KINDS:
        rng = random.Random(seed)
        yield kind, collections.Counter(run(kind, rng) for _ in range(runs))


def wrong(kind: Kind, counts: collections.Counter[str]) -> float:
    """Return the share of wrong verdicts."""
    return 1 - sum(counts[judged] for judged in kind.right) / counts.total()


def main(runs: int) -> None:
    print(f"| what happens ({runs:,} bakes each) | right | wrong |\n| --- | --- | --- |")
    for kind, counts in verdicts(runs):
        print(f"| {kind.what} | {' or '.join(kind.right)} | {wrong(kind, counts):.1%} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
