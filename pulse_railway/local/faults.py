"""The faults of the local Railway, as `POST /local/faults` sets them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """One fault: which calls fail, and how. The fields' names are the request's JSON."""

    match: str = "*"  # a top-level field of a GraphQL document, `up`, `ssh`, `oauth` or `*` (all)
    nth: int = 1  # the first call that fails, counted from now
    times: int = 1  # the number of calls that fail from there on
    status: int | None = None  # the HTTP status of the answer
    retry_after: float | None = None  # seconds, with `status`
    error: str | None = None  # a GraphQL error, with status 200
    body: str = ""  # an HTML page instead of JSON, with status 200 or `status`
    delay: float = 0.0  # seconds before the answer
    drop: bool = False  # the connection ends without an answer
    after: bool = False  # the call is carried out first
    # for `ssh` only: the relay's answer in place of the command's
    says: str = ""  # on stderr
    prints: str = ""  # on stdout
    exit: int | None = None
    # for a field only: the value that replaces its own, after it was carried out
    gives: Any = ...
    service: str | None = None  # with `gives`: only for the service of this name
    seen: int = field(default=0, compare=False)  # matching calls so far

    @property
    def replaces_answer(self) -> bool:
        """Is the answer of an ssh command lost?"""
        words = self.says or self.prints or self.error or self.status
        return bool(words) or self.drop or self.exit is not None

    def is_due(self, fields: list[str]) -> bool:
        """Count a call with these top-level fields; return whether the fault applies to it."""
        if self.match != "*" and self.match not in fields:
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


@dataclass
class FaultSettings:
    """The body of `POST /local/faults`. A field that a request leaves out gets its default."""

    faults: list[dict[str, Any]] = field(default_factory=list)  # each the fields of a `Fault`
    latency: float = 0.0  # seconds before each GraphQL answer
    crash_at: str | None = None  # a status (BUILDING, DEPLOYING) at which the next deployment fails
    build_seconds: float = 0.0  # how long a build takes
    react_delay: float | str = ""  # seconds until React's server listens, or `never`
    rate_limit: int | None = None  # API calls a minute; further calls get a 429
    ipv6_only: bool = False  # private names resolve to IPv6 alone, as in older environments
    name_delay: float = 0.0  # seconds from a process's start until its private name resolves
    old_gets_requests: bool = False  # the replaced process gets the requests of the overlap
    edge: str = ""  # `html` or `json`: the edge answers every request with a 502 of its own
    keep_files: bool = False  # a restarted container keeps its files
    # Railway's behaviour where its schema and its docs differ: see api.Rules
    every_environment: bool = False
    deletion_patch: str = ""
    copy_uploads: bool = True
    restricted: str = ""
    clock: bool | None = None  # whether cron services run; None leaves that as it is
