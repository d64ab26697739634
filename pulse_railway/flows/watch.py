"""`status --watch`: poll `status`, and compute rates from the routers' counters."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pulse_railway.errors import Failure
from pulse_railway.flows.bake import count
from pulse_railway.flows.status import status
from pulse_railway.railway.api import Api
from pulse_railway.stack import Stack, inspect

LENGTH = 20  # polls in a series
INSPECT_INTERVAL = 60.0  # seconds between two queries to Railway; every poll asks the router


@dataclass
class Series:
    """One deployment's values in the last polls, the newest last. None: no router answered."""

    requests: deque[float | None] = field(default_factory=lambda: deque(maxlen=LENGTH))  # a second
    errors: deque[float | None] = field(default_factory=lambda: deque(maxlen=LENGTH))  # a second
    sessions: deque[float | None] = field(default_factory=lambda: deque(maxlen=LENGTH))


@dataclass
class History:
    """Rates between two polls, from counters that begin at each router's start."""

    at: float | None = None  # of the last poll with an answer: seconds, monotonic
    last: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)

    def add(self, result: dict[str, Any], now: float) -> None:
        """Add a result of `status`, polled at `now` (seconds, monotonic)."""
        counters = {
            (name, router["router"]): (counts.requests, counts.failed)
            for router in result["routers"]
            for name, tally in (router.get("tallies") or {}).items()
            for counts in (count(tally),)
        }
        passed = now - self.at if self.at is not None else None
        answered = bool(result["routers"])
        for row in result["deployments"]:
            name = row["deployment_id"]
            series = self.series.setdefault(name, Series())
            series.sessions.append(row["sessions"])
            requests = errors = 0
            for key, (total, failed) in counters.items():
                if key[0] != name:
                    continue
                before = self.last.get(key, (0, 0))
                if before[0] > total:  # the router has restarted, and counts from 0
                    before = (0, 0)
                requests += total - before[0]
                errors += max(failed - before[1], 0)
            known = passed and answered
            series.requests.append(requests / passed if known and passed else None)
            series.errors.append(errors / passed if known and passed else None)
        listed = {row["deployment_id"] for row in result["deployments"]}
        self.series = {name: s for name, s in self.series.items() if name in listed}
        if answered:
            self.last, self.at = counters, now


def watch(api: Api, stack: Stack, every: float) -> Iterator[tuple[dict[str, Any], History]]:
    """Yield a result of `status`, and the history, every `every` seconds, without end."""
    history, inspected = History(), time.monotonic()
    while True:
        began, railway_error = time.monotonic(), None
        if began - inspected >= INSPECT_INTERVAL:
            inspected = began
            try:
                stack = inspect(api, stack.target, stack.names)
            except Failure as failure:  # the watch goes on with the services read before
                railway_error = f"Railway does not answer: {failure}"
        result = status(api, stack)
        if railway_error:
            result["problems"].insert(0, railway_error)
        history.add(result, time.monotonic())
        yield result, history
        time.sleep(max(every - (time.monotonic() - began), 0.1))
