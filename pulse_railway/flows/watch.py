"""`status --watch`: what `status` says, again and again, with what went on in between."""

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

LENGTH = 20  # looks that are remembered
INSPECT_EVERY = 60.0  # seconds between two questions to Railway; the router is asked every time


@dataclass
class Series:
    """One deployment's last looks, the newest last. None: nobody answered."""

    requests: deque[float | None] = field(default_factory=lambda: deque(maxlen=LENGTH))  # a second
    errors: deque[float | None] = field(default_factory=lambda: deque(maxlen=LENGTH))  # a second
    sessions: deque[float | None] = field(default_factory=lambda: deque(maxlen=LENGTH))


@dataclass
class History:
    """The routers count from their start; here it becomes what happened between two looks."""

    at: float | None = None
    last: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)

    def look(self, result: dict[str, Any], now: float) -> None:
        """Take up one result of `status`, seen at `now` (seconds, monotonic)."""
        seen = {
            (name, router["router"]): (found.requests, found.failed)
            for router in result["routers"]
            for name, tally in (router.get("tallies") or {}).items()
            for found in (count(tally),)
        }
        passed = now - self.at if self.at is not None else None
        answered = bool(result["routers"])
        for row in result["deployments"]:
            name = row["deployment_id"]
            series = self.series.setdefault(name, Series())
            series.sessions.append(row["sessions"])
            requests = errors = 0
            for key, (total, failed) in seen.items():
                if key[0] != name:
                    continue
                before = self.last.get(key, (0, 0))
                if before[0] > total:  # a router that was restarted begins at 0
                    before = (0, 0)
                requests += total - before[0]
                errors += max(failed - before[1], 0)
            known = passed and answered
            series.requests.append(requests / passed if known and passed else None)
            series.errors.append(errors / passed if known and passed else None)
        listed = {row["deployment_id"] for row in result["deployments"]}
        self.series = {name: s for name, s in self.series.items() if name in listed}
        if answered:
            self.last, self.at = seen, now


def watch(api: Api, stack: Stack, every: float) -> Iterator[tuple[dict[str, Any], History]]:
    """A result of `status` every so many seconds, for ever."""
    history, inspected = History(), time.monotonic()
    while True:
        began, silence = time.monotonic(), None
        if began - inspected >= INSPECT_EVERY:
            inspected = began
            try:
                stack = inspect(api, stack.target, stack.names)
            except Failure as failure:  # a watch outlives it
                silence = f"Railway does not answer: {failure}"
        result = status(api, stack)
        if silence:
            result["problems"].insert(0, silence)
        history.look(result, time.monotonic())
        yield result, history
        time.sleep(max(every - (time.monotonic() - began), 0.1))
