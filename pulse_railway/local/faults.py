"""What is to go wrong on the local Railway: the orders of `POST /local/faults`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What is to go wrong, and when. `match` is a top-level field of a document, `up`,
    `ssh`, `oauth` or `*`."""

    match: str = "*"
    nth: int = 1  # the n-th matching call from now
    times: int = 1  # ... and so many from there
    status: int | None = None
    retry_after: float | None = None
    error: str | None = None  # a GraphQL error, with status 200
    delay: float = 0.0
    drop: bool = False  # the connection ends without an answer
    after: bool = False  # the call is carried out first
    # of `ssh` alone: what the relay answers in place of the command
    says: str = ""  # on stderr
    prints: str = ""  # on stdout
    exit: int | None = None
    # of a field alone: what it answers in place of its own, though it was carried out
    gives: Any = ...
    service: str | None = None  # where it is about the service of that name
    seen: int = field(default=0, compare=False)

    @property
    def replaces_answer(self) -> bool:
        """Is the command's own answer lost?"""
        words = self.says or self.prints or self.error or self.status
        return bool(words) or self.drop or self.exit is not None

    def is_due(self, fields: list[str]) -> bool:
        if self.match != "*" and self.match not in fields:
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


@dataclass
class FaultSettings:
    """What `POST /local/faults` takes; what it does not name is as usual again."""

    faults: list[dict[str, Any]] = field(default_factory=list)
    latency: float = 0.0  # seconds, of each GraphQL call
    crash_at: str | None = None  # a status (BUILDING, DEPLOYING) at which the next deployment fails
    build_seconds: float = 0.0
    react_delay: float | str = ""  # seconds until React's server listens, or `never`
    rate_limit: int | None = None  # API calls a minute, over which the answer is 429
    ipv6_only: bool = False  # private names resolve to IPv6 alone, as in older environments
    name_delay: float = 0.0  # seconds from a start until its private name resolves
    old_gets_requests: bool = False  # during the overlap with the process that replaces it
    edge: str = ""  # `html` or `json`: what it answers to everything, a 502 of its own
    keep_files: bool = False  # of a container that is restarted
    # what Railway does where its schema and its docs differ: see api.Rules
    every_environment: bool = False
    deletion_patch: str = ""
    copy_uploads: bool = True
    restricted: str = ""
    clock: bool | None = None  # does the cron run? None: as before
