#!/usr/bin/env python3
# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "aiohappyeyeballs>=2.6",
#   "httptools>=0.6.4",
#   "redis>=6.4",
#   "starlette>=0.50",
#   "uvicorn>=0.35,<1",
#   "uvloop>=0.21; sys_platform != 'win32'",
# ]
# ///
"""The router: all requests of a Pulse app pass through it.

    python router.py    serve on HOST (default: IPv4 and IPv6) and PORT (8000)

`Client` parses and checks a request's head; `route` picks a deployment from the in-memory `Table`;
an `Exchange` copies the answer from a pooled `Upstream` connection to the client's, in the
callbacks of the two connections, without a task. If the request must wait, for a connection or for
the lookup of an unknown deployment, `handle` is its task. A WebSocket handshake takes the same
path; after the backend's 101, `join` makes the two connections a tunnel of bytes. uvicorn provides
the server, its lifespan and its signals, Starlette the router's own answers. HTTP/1.1 is
implemented here since ASGI loses what a proxy must keep: see docs/architecture.md."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # the kernel ignores signals that process 1 has no handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until uvicorn's handler is set
    sys.modules["router"] = sys.modules[__name__]  # other files import this module by that name

import asyncio
import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import heapq
import hmac
import http.client
import ipaddress
import json
import logging
import math
import posixpath
import re
import resource
import secrets
import select
import socket
import ssl
import struct
import time
import traceback
import urllib.parse
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import httptools
import redis.asyncio
import redis.backoff
import redis.retry
import uvicorn
from aiohappyeyeballs import start_connection
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    import telemetry
    import tracing
    from sqlite_store import SqliteStore

    type Store = RedisStore | SqliteStore
    type Then = Callable[[Exchange], None]
    # where a bake has counted a request: the failures by kind, the entry of its address
    type Seen = tuple[collections.Counter[str], list[int]]

VERSION = "0.4.0"  # of the package

# == Names shared with pulse_railway/contract.py; a test holds the two together =================

AFFINITY_QUERY = "pulse_deployment"
AFFINITY_HEADER = "x-pulse-deployment"
SELECTED_HEADER = "x-pulse-selected-deployment"
CLIENT_LOADER_HEADER = "x-pulse-client-loader"
CLIENT_LOADER_LOCATION_HEADER = "x-pulse-client-loader-location"
RELOAD_QUERY = "pulse_reload_on_stale_affinity"
STALE_HEADER = "x-pulse-stale-affinity"
INTERNAL_PREFIX = "/_pulse/internal"
INTERNAL_TOKEN_HEADER = "x-pulse-railway-internal-token"
HEALTH_PATH = "/_pulse/health"
VISITOR_COOKIE = "pulse_railway_visitor"
PREVIEW_QUERY = "pulse_preview"
PREVIEW_HEADER = "x-pulse-preview"
PREVIEW_COOKIE = "__Host-pulse_preview"  # the prefix: no other host can set it (RFC 6265bis)
ROUTER_HEALTH_PATH = "/healthz"
META_PATH = "/_pulse/meta"
MOVE_PATH = "/_pulse/railway/move"
DEFAULT_PORT = 8000
DEFAULT_REDIS_PREFIX = "pulse:railway"
DEPLOYMENT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
LAST_PROMOTED_VARIABLE = "PULSE_RAILWAY_ACTIVE"  # on Railway: id of the deployment promoted last
LAST_PROMOTED_AT_VARIABLE = "PULSE_RAILWAY_ACTIVE_AT"

REPORT_LEASE = 120  # seconds that a router's report lasts
BAKE_TTL = 6 * 3600  # seconds after a router's last report about a bake
SCAN_COUNT = 1000  # keys per step of Redis' SCAN
SERVICE_PREFIX = os.environ.get("PULSE_RAILWAY_SERVICE_PREFIX", "")

log = logging.getLogger("pulse.router")

# == Limits =====================================================================================


def number_from_env(variable: str, default: Any, kind: type = float, env: Any = os.environ) -> Any:
    """Return a variable's value: seconds, or for int a whole number from 1. Raises SystemExit."""
    text = env.get(variable)
    if text and kind is int and not re.fullmatch(r"0*[1-9]\d{0,8}", text, re.ASCII):
        raise SystemExit(f"{variable} takes a whole number from 1, not {text!r}")
    if text and kind is float and not re.fullmatch(r"\d{1,9}(\.\d*)?", text, re.ASCII):
        raise SystemExit(f"{variable} takes a number of seconds, not {text!r}")
    return kind(text) if text else default


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of time and size. Railway's edge: heads of 32 KB, 15 minutes a request, 60 s idle."""

    # a client's connection
    connections: int = 1 << 30  # clients and tunnels; `serve` bounds them by the descriptors
    descriptors_kept: int = 64  # for the store, the listening socket, files
    head_bytes: int = 64 * 1024
    header_count: int = 512
    head_seconds: float = 30.0  # until a request's head is complete
    framing_bytes: int = 16 * 1024  # chunk extensions and trailers, beyond 16 bytes a chunk
    pipelined_requests: int = 64  # that wait for earlier answers
    body_ahead_bytes: int = 64 * 1024  # read ahead of the backend
    body_stall_seconds: float = 60.0  # until the next piece of a body
    write_stall_seconds: float = 300.0  # until the client takes the next piece of its answer
    keep_alive_seconds: float = 75.0  # of an idle connection: the edge closes first
    idle_close_grace_seconds: float = 0.5  # at shutdown, since a request may be in transit
    linger_pause_seconds: float = 5.0  # between two pieces of a dropped upload
    linger_seconds: float = 30.0  # for a dropped upload as a whole
    # a backend's connection
    connect_seconds: float = 5.0
    resolved_seconds: float = 5.0  # that an address is cached
    resolver_threads: int = 64  # parallel lookups; a lookup can take many seconds
    response_seconds: float = 900.0  # until an answer begins, and between two pieces of it
    handshake_seconds: float = 30.0  # until a WebSocket handshake is answered
    answer_head_bytes: int = 256 * 1024
    continue_seconds: float = 1.0  # then a backend that ignores `Expect` gets the body
    upstream_idle_seconds: float = 4.0  # uvicorn closes idle connections after 5 s
    unsafe_idle_seconds: float = 1.0  # the same for requests that may not be repeated
    idle_upstreams: int = 256  # idle connections per deployment
    backend_seconds: float = 5.0  # until the app's internal endpoints answer
    # a tunnel
    half_closed_seconds: float = 60.0  # of silence in a half-closed tunnel
    flush_seconds: float = 30.0  # to write the rest after the other end was lost
    busy_share: float = 0.5  # of the connections, for one deployment's requests
    hung_seconds: float = 10.0  # a page that takes longer counts as failed until it is answered
    gave_up_seconds: float = 1.0  # a client that leaves later, without an answer, gave up
    canary_seconds: float = 10.0  # until the active one answers for a silent canary
    short_tunnel_seconds: float = 1.0  # a backend that closes a tunnel sooner has failed
    # the active deployment cannot be connected to
    breaker_connect_seconds: float = 1.5  # until its fallback gets the request
    breaker_probe_seconds: float = 1.0  # between two attempts to connect
    breaker_close_seconds: float = 5.0  # of successful attempts until it gets new visitors again
    instance_pause_seconds: float = 2.0  # without new visitors, for a process that refuses them
    # assets that only some deployments have
    hedge_delay_seconds: float = 0.2  # between two hedged requests
    hedge_timeout_seconds: float = 1.5  # until a hedged request is answered
    hedges: int = 4  # hedged requests at once, for one request
    miss_bytes: int = 64 * 1024  # a longer answer that is not passed on costs its connection
    absent_seconds: float = 10.0  # that it is cached that no deployment has an asset
    ejection_seconds: float = 30.0  # without requests for assets, after no answer
    readmission_seconds: float = 1.0  # between two attempts with an ejected one
    asset_location_seconds: float = 300.0  # that an asset's deployment is cached
    asset_locations: int = 2000
    asset_location_path_bytes: int = 512  # longer paths are not cached
    # the routing state
    start_seconds: float = 2.0  # for the first load; then requests get 503
    redis_seconds: float = 3.0
    refresh_seconds: float = 15.0  # between two reads; 0.3.x announces no keys
    lookup_seconds: float = 1.0  # between two lookups of unknown ids
    missing_seconds: float = 90.0  # until a deployment without a record is kept or dropped
    parallel_looks: int = 3  # requests to them at once; the loop has at least five threads
    provisional_seconds: float = 1.0  # between two attempts without a state
    scan_share: float = 0.02  # of the time, for scans of all keys
    scan_step_seconds: float = 90.0  # between two steps of a slow scan
    report_seconds: float = 10.0  # between two reports while counters change
    report_idle_seconds: float = 45.0
    watch_grace_seconds: float = 120.0  # after a bake that nobody has ended
    # the process
    restarts: int = 3  # of a background task in `restart_seconds`, then the process ends
    restart_seconds: float = 60.0
    shutdown_seconds: float = 25.0
    tunnel_drain_seconds: float = 15.0  # of it, in which tunnels are closed one by one
    quiet_seconds: float = 0.5  # since a tunnel's last data, when it is closed

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Limits:
        """Return the limits, some of them from the environment. Raises SystemExit."""
        variables = {
            "half_closed_seconds": "PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS",
            "response_seconds": "PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT",
            "shutdown_seconds": "PULSE_RAILWAY_ROUTER_SHUTDOWN_SECONDS",
        }
        default = cls()
        own = {n: number_from_env(v, getattr(default, n), env=env) for n, v in variables.items()}
        return replace(default, **own)


DEFAULT_LIMITS = Limits()

# == The routing state: what the store holds, as types ==========================================
# The steps that change it are in control.py.

State = dict[str, str]  # store key without the prefix -> value, as it is stored
Change = dict[str, str | None]  # None deletes the key
type Step = Callable[[Routing], Routing]
Json = dict[str, Any]

ACTIVE, PROMOTED, EPOCH, STORE_ID = ":active", ":promoted", ":epoch", ":store"
TOMBSTONES, PROCESSED, HISTORY = ":removed", ":answers", ":history"
MAINTENANCE, DEPLOY_LOCK, OWNER = ":maintenance", ":deploy:lock", ":owner"
STAMP = re.compile(r"[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}")  # as ownership.parse takes it
RECORD, REPORT, BAKE = ":deployment:", ":router:", ":bake:"  # prefixes of keys
PREVIEW = ":preview:"  # of the records of previews: an older router does not know it
RECORDS = (RECORD, PREVIEW)
TOMBSTONE_TTL = max(7 * 86_400.0, number_from_env("PULSE_RAILWAY_DRAIN_TTL_SECONDS", 0.0))
TOMBSTONES_AT_MOST = 1000
CLOCKS_MAY_DIFFER = 86_400.0  # a promotion later than that is invalid
PROCESSED_TTL = 3600.0
HISTORY_AT_MOST = 100
DEPTH_AT_MOST = 50  # of JSON


def from_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError, also for a nesting that could cause RecursionError later."""
    try:
        level = [value := json.loads(text)]
    except RecursionError:
        raise ValueError from None
    for _ in range(DEPTH_AT_MOST):
        inner = [x.values() if isinstance(x, dict) else x for x in level if type(x) in (dict, list)]
        level = [x for values in inner for x in values]
        if not level:
            return value
    raise ValueError


def json_object(text: str | bytes | None) -> Json:
    """Parse a stored JSON object. Raises ValueError for anything else."""
    return cast(Json, an_object(from_json(text or "{}")))


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


# Checks of a field's value: each returns the value or raises ValueError.


def a_text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 512 or not value.isprintable():
        raise ValueError
    return value


def a_number(most: float, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ValueError
    return float(value)


def a_day_at_most(value: Any) -> float:
    """Return a number of seconds. Times further in the future are invalid (`Routing`)."""
    return a_number(CLOCKS_MAY_DIFFER, value)


def an_instance(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError
    return value


def a_key_hash(value: Any) -> str:
    """Check that a value is a SHA-256 in hexadecimal digits."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError
    return value


a_time, a_percentage = partial(a_number, 1e11), partial(a_number, 100)  # seconds since 1970
a_flag, an_object, a_page = (partial(an_instance, kind) for kind in (bool, dict, str))


def an_address(value: Any) -> str:
    """Check that a value is a base URL that can be connected to."""
    url = urllib.parse.urlsplit(a_text(value))
    if url.scheme != "http" or not url.hostname or url.port == 0:
        raise ValueError
    url.hostname.encode("idna")  # UnicodeError, a ValueError, for an invalid host name
    return str(value).rstrip("/")


INSTANCES_AT_MOST = 64  # processes of a deployment
INSTANCE_NUMBER = re.compile(r"[2-9]|[1-5][0-9]|6[0-4]")  # the first process has none


def the_instances(value: Any) -> Json:
    """Check that a value is {"2": {"address": ...}, ...}: the processes beside the first one."""
    for number, instance in an_object(value).items():
        if not INSTANCE_NUMBER.fullmatch(number):
            raise ValueError
        an_address(an_object(instance).get("address"))
    return cast(Json, value)


def instance_count(text: str) -> int:
    """Return a number of processes. Raises ValueError."""
    if text != "1" and not INSTANCE_NUMBER.fullmatch(text):
        raise ValueError
    return int(text)


def instances_at(address: str, count: int) -> Json:
    """Return the instances of a deployment with `count` processes: a process listens on the port
    behind the one before it."""
    url = urllib.parse.urlsplit(an_address(address))
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else url.hostname
    port = (url.port or 80) - 1
    return {str(k): {"address": f"http://{host}:{port + k}"} for k in range(2, count + 1)}


def or_none(parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except ValueError:
        return None


def stored(parser: Callable[[Any], Any], default: Any = None, key: str = "") -> Any:
    """Return a field of a record, with its check and its name in the store if it differs."""
    return field(default=default, metadata={"parser": parser, "key": key})


# Fields that no step of ours removes: if one is missing, 0.3.x's janitor has rewritten the record.
LASTING = tuple("address service_id registered_at promoted_at canary_at about instances".split())
UNREADABLE = ("record",)  # what is ignored where nothing of a record is understood
HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)


@dataclass(frozen=True)
class Bake:
    """A deployment is watched: routers count what its visitors get (`Watch`)."""

    until: float
    since: float = 0.0  # 0: begun by an earlier version; nothing is counted
    old: str | None = None  # the deployment that it is compared with
    latency_ms: float | None = None  # a request whose answer begins later is slow


def a_bake(value: Any) -> Bake:
    found = an_object(value)
    old, latency = found.get("old"), found.get("latency_ms")
    return Bake(
        a_time(found.get("until")),
        a_time(found.get("since", 0.0)),
        None if old is None else a_text(old),
        None if latency is None else a_number(1e9, latency),
    )


@dataclass(frozen=True)
class Record:
    """A deployment as the store has it. Times are seconds since 1970 by the store's clock."""

    deployment_id: str
    state: str = stored(a_text, "")  # pending, active, draining; other states are kept
    service_name: str | None = stored(a_text)
    address: str | None = stored(an_address)
    service_id: str | None = stored(a_text)
    registered_at: float | None = stored(a_time)
    promoted_at: float | None = stored(a_time)
    drain_started_at: float | None = stored(a_time)
    moving_at: float | None = stored(a_time)  # while it drains: from then on its tabs move over
    move_idle: float | None = stored(a_day_at_most)  # those too that were idle for so many seconds
    rejected_at: float | None = stored(a_time)  # rolled back from, or an aborted canary
    canary_at: float | None = stored(a_time)  # when its weight was set or removed
    retiring_at: float | None = stored(a_time)  # retired: neither routed to nor promoted
    bake_ended_at: float | None = stored(a_time)
    pinned: bool = stored(a_flag, False, "held")  # stays pending on purpose
    weight: float | None = stored(a_percentage)  # percent of new visitors; set on the canary
    bake: Bake | None = stored(a_bake)  # noqa: RUF009
    # of a canary: {weights, bake, latency_ms}, the weights that it gets one after another
    steps: Mapping[str, Any] | None = stored(an_object)
    about: Mapping[str, Any] | None = stored(an_object)  # commit, message, author
    instances: Mapping[str, Any] | None = stored(the_instances)  # the processes beside the first
    # of a preview: the SHA-256 of its key; "" if it is invalid, so that no key opens the preview
    preview: str | None = stored(a_key_hash)
    raw: Json = field(default_factory=dict)  # as stored, with unknown fields
    ignored: tuple[str, ...] = ()  # names of invalid fields

    @property
    def url(self) -> str | None:
        """The backend's base URL. 0.3.x wrote no address, so it follows from the service name."""
        if self.address is None and self.service_name and HOST_NAME.fullmatch(self.service_name):
            return f"http://{self.service_name}.railway.internal:{DEFAULT_PORT}"
        return self.address

    @property
    def is_canary(self) -> bool:
        return self.weight is not None and self.state == "pending" and self.retiring_at is None

    @property
    def is_preview(self) -> bool:
        return self.preview is not None

    @property
    def key(self) -> str:
        """The store's key of this record."""
        return (PREVIEW if self.is_preview else RECORD) + self.deployment_id

    @property
    def changed_at(self) -> float:
        """The latest time at which the record was changed. `moving_at` can be still to come."""
        times = (name for name in FIELDS if name.endswith("_at") and name != "moving_at")
        return max(getattr(self, name) or 0.0 for name in times)

    def as_active(self) -> Record:
        """Return the record of the active deployment: without what it has only as another."""
        return replace(
            self.without_drain(),
            state="active",
            weight=None,
            steps=None,
            preview=None,
        )

    def without_drain(self) -> Record:
        return replace(self, drain_started_at=None, moving_at=None, move_idle=None)

    def as_draining(
        self, since: float, move_after: float | None = None, move_idle: float | None = None
    ) -> Record:
        """Return the record of a deployment that drains.

        Args:
            move_after: seconds after which its tabs move over; None: they stay.
            move_idle: seconds for which a tab is not used until it moves over without its user.
        """
        return replace(
            self,
            state="draining",
            drain_started_at=since,
            moving_at=None if move_after is None else since + move_after,
            move_idle=None if move_after is None else move_idle,
            weight=None,
            bake=None,
            steps=None,
        )

    def json(self) -> Json:
        """Return the record as 0.3.x stores it, plus our fields. An ignored field is unchanged."""
        stored_record = {**self.raw, "deployment_id": self.deployment_id}
        for name, stored_field in FIELDS.items():
            value = getattr(self, stored_field.name)
            if isinstance(value, Bake):
                value = {key: part for key, part in vars(value).items() if part}
            if not (value is None or value is False or value == ""):
                stored_record[name] = value
            elif name not in self.ignored:
                stored_record.pop(name, None)
        stored_record.setdefault("state", "pending")
        stored_record.setdefault("service_name", self.deployment_id)
        stored_record.setdefault("drain_started_at", None)
        return stored_record


# name in the store -> field of Record
FIELDS = {f.metadata["key"] or f.name: f for f in fields(Record) if f.metadata}


def parse_record(deployment_id: str, text: str, latest: float = math.inf) -> Record:
    """Return a record. Its `ignored` names invalid fields, such as times after `latest`."""
    raw = or_none(json_object, text)
    if raw is None:
        return Record(deployment_id, ignored=UNREADABLE)
    values: Json = {}
    ignored = []
    if (named := raw.get("deployment_id")) not in (None, deployment_id):
        ignored.append("deployment_id")
        if isinstance(named, str) and DEPLOYMENT_ID.fullmatch(named):  # a copy of another record
            return Record(deployment_id, ignored=UNREADABLE)
    for name, stored_field in FIELDS.items():
        if raw.get(name) is not None:
            value = or_none(stored_field.metadata["parser"], raw[name])
            if value is None or (name.endswith("_at") and value > latest):
                ignored.append(name)
            else:
                values[stored_field.name] = value
    return Record(deployment_id, **values, raw=raw, ignored=tuple(ignored))


@dataclass(frozen=True)
class Promotion:
    deployment_id: str
    at: float  # seconds since 1970 by the store's clock; 0: not known


@dataclass(frozen=True)
class Tombstone:
    at: float
    service_id: str | None = None

    def covers(self, record: Record) -> bool:
        """Is this the removed deployment's record? The id may be reused on a new service."""
        return self.service_id == record.service_id and (record.registered_at or 0.0) <= self.at


@dataclass(frozen=True)
class Maintenance:
    """Maintenance is on: all visitors get a page."""

    since: float
    page: str | None = None  # HTML
    retry_after: int = 30  # seconds
    by: str | None = None


@dataclass(frozen=True)
class DeployLock:
    holder: str
    by: str | None
    since: float
    until: float


@dataclass(frozen=True)
class Routing:
    """The whole routing state. A step is a pure function from one state to the next."""

    now: float = field(default=0.0, compare=False)  # by the store's clock
    active: str | None = field(default=None, metadata={"key": ACTIVE})  # a deployment id
    promoted: Promotion | None = field(default=None, metadata={"key": PROMOTED})  # the last
    epoch: int = field(default=0, metadata={"key": EPOCH})  # raised by each change of ours
    # identifies the contents: if it differs or is missing, the store has lost data
    store_id: str | None = field(default=None, metadata={"key": STORE_ID})
    records: Mapping[str, Record] = field(default_factory=dict)  # newest registration first
    # removed deployments; nonces of commands with the time when they were carried out
    tombstones: Mapping[str, Tombstone] = field(default_factory=dict, metadata={"key": TOMBSTONES})
    processed: Mapping[str, float] = field(default_factory=dict, metadata={"key": PROCESSED})
    # changes with author and reason, the oldest first
    history: tuple[Json, ...] = field(default=(), metadata={"key": HISTORY})
    maintenance: Maintenance | None = field(default=None, metadata={"key": MAINTENANCE})
    lock: DeployLock | None = field(default=None, metadata={"key": DEPLOY_LOCK})
    owner: str | None = field(default=None, metadata={"key": OWNER})  # None: no owner
    problems: tuple[str, ...] = ()  # one message per ignored value
    keys: frozenset[str] = frozenset()  # the keys of FIXED in the store

    @property
    def canary(self) -> Record | None:
        """The deployment that gets a share of the new visitors beside the active one."""
        canaries = (r for r in self.records.values() if r.is_canary)
        return next((r for r in canaries if r.deployment_id != self.active), None)

    @property
    def baking(self) -> Record | None:
        """The deployment whose visitors routers count: the canary, or the active one."""
        for record in (self.canary, self.records.get(self.active or "")):
            if record and record.bake and record.bake.since:
                return record
        return None

    @property
    def promoted_by_other(self) -> bool:
        """Was the active deployment promoted by 0.3.x or an earlier version of ours, after what
        PROMOTED says? They do not write it. Without a store id, the store had lost its data."""
        if self.promoted:
            return self.active not in (None, self.promoted.deployment_id)
        return self.active is not None and self.store_id is None

    @property
    def promotion(self) -> Promotion | None:
        """The promotion that made `active` active."""
        at = self.promoted.at if self.promoted else math.inf if self.promoted_by_other else 0.0
        return Promotion(self.active, at) if self.active else None

    @property
    def fallback(self) -> Record | None:
        """The deployment for new visitors while the active one cannot be connected to. None after a
        restore: the records may not show what was active before."""
        switches = ("promote", "rollback", "restore")
        last = [entry["what"] for entry in self.history if entry["what"] in switches][-1:]
        return None if last == ["restore"] else self.former_active

    @property
    def former_active(self) -> Record | None:
        """The deployment that was active before, and was not rolled back from."""
        active = self.record_of_active()
        if active is None:
            return None
        since = active.registered_at or 0.0
        before = (
            record
            for record in self.records.values()
            if record.promoted_at and (record.registered_at or 0.0) < since
            if record.state == "draining" and not (record.rejected_at or record.retiring_at)
        )
        return max(before, key=lambda record: record.promoted_at or 0.0, default=None)

    def record_of_active(self) -> Record | None:
        """The active record. If it is lost or has no address, its service name is the id."""
        if self.active is None:
            return None
        record = self.records.get(self.active) or Record(self.active, "active")
        return record if record.url else replace(record, service_name=SERVICE_PREFIX + self.active)

    def has_removed(self, record: Record) -> bool:
        tombstone = self.tombstones.get(record.deployment_id)
        return tombstone is not None and tombstone.covers(record)

    def is_foreign(self, me: str | None) -> bool:
        """Does the state have another owner than `me`, which is None outside Railway?"""
        return me is not None and self.owner not in (None, me)


FIXED = {f.metadata["key"]: f.name for f in fields(Routing) if f.metadata}  # key -> attribute


def parse(state: State, now: float) -> Routing:
    """Return the routing state. Invalid values are ignored, left as stored, and in `problems`."""
    problems: list[str] = []
    latest = now + CLOCKS_MAY_DIFFER  # a later time would win over all promotions to come

    def read(key: str, parser: Callable[[Json], Any]) -> Any:
        if key not in state:
            return None
        try:
            return parser(json_object(state[key]))
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{key} is not understood")
            return None

    def checked(key: str, value: Any, good: Callable[[Any], Any], why: str = "") -> Any:
        if value is None or good(value):
            return value
        problems.append(f"{key} {why or 'is not understood'}")
        return None

    records = {}
    for key, text in state.items():
        if key.startswith(RECORDS):
            prefix = RECORD if key.startswith(RECORD) else PREVIEW
            name = key.removeprefix(prefix)
            if prefix == PREVIEW and RECORD + name in state:
                continue  # promoted by an earlier version
            record = parse_record(name, text, latest)
            preview = (record.preview or "") if prefix == PREVIEW else None  # the key decides
            records[name] = replace(record, preview=preview)
            if record.ignored:
                problems.append(f"{name}: {', '.join(record.ignored)} not understood")
            elif not record.url or not DEPLOYMENT_ID.fullmatch(name):
                problems.append(f"{name}: no address follows from its record")
    active = state.get(ACTIVE) or None
    own = records.get(active or "")
    if own and own.retiring_at:  # no step retires the active deployment
        records[own.deployment_id] = replace(own, retiring_at=None)
        problems.append(f"{active}: retiring_at, although it is active")
    if own and own.is_preview:
        records[own.deployment_id] = replace(records[own.deployment_id], preview=None)
    newest = sorted(records.values(), key=lambda r: (r.registered_at or 0, r.deployment_id))
    epoch = checked(EPOCH, state.get(EPOCH), re.compile(r"[0-9]{1,15}").fullmatch)
    active = checked(ACTIVE, active, DEPLOYMENT_ID.fullmatch, "is no deployment id")
    owner = checked(OWNER, state.get(OWNER), STAMP.fullmatch)
    promoted = read(PROMOTED, lambda f: Promotion(a_text(f["deployment_id"]), a_time(f["at"])))
    promoted = checked(PROMOTED, promoted, lambda p: p.at <= latest, "is in the future")
    tombstones = read(TOMBSTONES, _tombstones) or {}
    in_future = [name for name, tombstone in tombstones.items() if tombstone.at > latest]
    problems += [f"{TOMBSTONES} of {name} is in the future" for name in in_future]
    closed = read(MAINTENANCE, _maintenance)
    if closed is None and MAINTENANCE in state:  # an invalid value still closes the site
        closed = Maintenance(now)
    return Routing(
        now,
        active,
        promoted,
        int(epoch or 0),
        state.get(STORE_ID),
        {record.deployment_id: record for record in reversed(newest)},
        {name: tombstone for name, tombstone in tombstones.items() if name not in in_future},
        read(PROCESSED, lambda f: {k: v.at for k, v in _tombstones(f).items()}) or {},
        _history(state, latest, problems),
        closed,
        read(DEPLOY_LOCK, _lock),
        owner,
        tuple(problems),
        frozenset(state.keys() & FIXED.keys()),
    )


def _tombstones(entries: Json) -> dict[str, Tombstone]:
    tombstones = {}
    for name, entry in entries.items():
        with contextlib.suppress(ValueError):
            at = a_time(an_object(entry).get("at"))
            tombstones[name] = Tombstone(at, or_none(a_text, entry.get("service_id")))
    return tombstones


def _maintenance(entry: Json) -> Maintenance:
    page, by = or_none(a_page, entry.get("page")), or_none(a_text, entry.get("by"))
    since, again = or_none(a_time, entry.get("since")), or_none(a_time, entry.get("retry_after"))
    return Maintenance(since or 0.0, page or None, int(again or 30), by)


def _lock(entry: Json) -> DeployLock:
    by, since = or_none(a_text, entry.get("by")), a_time(entry["since"])
    return DeployLock(a_text(entry["holder"]), by, since, a_time(entry["until"]))


def _history(state: State, latest: float, problems: list[str]) -> tuple[Json, ...]:
    history = or_none(from_json, state.get(HISTORY) or "[]")
    if not isinstance(history, list):
        problems.append(f"{HISTORY} is not understood")
        return ()
    entries = (entry for entry in history if isinstance(entry, dict))
    named = (entry for entry in entries if or_none(a_text, entry.get("what")))
    known_time = partial(a_number, latest)
    return tuple(entry for entry in named if or_none(known_time, entry.get("at")) is not None)


def changes(old: Routing, new: Routing) -> Change:
    """Return what must be written to bring a store from the state `old` to `new`. Together with the
    store's id, a promotion by 0.3.x gets a time: without both, it is the latest (`promotion`)."""
    change: Change = {}

    def put(key: str, text: Callable[[Any], str] = lambda value: compact(vars(value))) -> None:
        before, after = getattr(old, FIXED[key]), getattr(new, FIXED[key])
        if before != after:
            change[key] = text(after) if after else None

    if new.tombstones != old.tombstones:
        live = [(k, v) for k, v in new.tombstones.items() if new.now - v.at < TOMBSTONE_TTL]
        live = sorted(live, key=lambda pair: pair[1].at)[-TOMBSTONES_AT_MOST:]
        change[TOMBSTONES] = compact({k: vars(v) for k, v in live})
    if new.processed != old.processed:
        fresh = {k: {"at": at} for k, at in new.processed.items() if new.now - at < PROCESSED_TTL}
        change[PROCESSED] = compact(fresh)
    put(HISTORY, lambda history: compact(history[-HISTORY_AT_MOST:]))
    for key in (ACTIVE, STORE_ID, OWNER):
        put(key, str)
    for key in (PROMOTED, MAINTENANCE, DEPLOY_LOCK):
        put(key)
    for name in old.records.keys() | new.records.keys():
        before, after = old.records.get(name), new.records.get(name)
        if after == before:
            continue
        if before and (after is None or after.key != before.key):
            change[before.key] = None
        if after:
            change[after.key] = compact(after.json())
    if change:
        if new.store_id is None and change.keys() != {OWNER}:  # an owner alone is no data
            change[STORE_ID] = secrets.token_hex(8)
        last = old.promotion
        if STORE_ID in change and last and last.at == math.inf and new.active == old.active:
            promotion = new.promoted or replace(last, at=next_time(new))
            change[PROMOTED] = compact(vars(promotion))
        change[EPOCH] = str(max(old.epoch, new.epoch) + 1)
    return change


# -- repair of lost data -----------------------------------------------------------------------


def repaired(store: Routing, known: Routing, new_id: str, alive: Collection[str] = ()) -> Routing:
    """Return the state that the store should have, given the state that a router knows. Idempotent.

    The deployment promoted last is active, whatever the epochs. A store with another id, no id or a
    lower epoch has lost data: everything that is known is restored. In any other store, keys and
    fields are restored that are missing although no writer of ours has raised the epoch. A missing
    record may have been deleted by 0.3.x: it is restored if it is the active one's or in `alive`,
    the deployments that still answer. Nothing known of another owner's state is restored. `new_id`
    is for a store without an id, and for an earlier copy."""
    other = bool(store.owner and known.owner) and store.owner != known.owner
    if known.store_id is None or other:  # nothing is known yet
        store_id = store.store_id or (new_id if store.active else None)
        return replace(store, store_id=store_id)
    lost = store.store_id != known.store_id or store.epoch < known.epoch
    # an earlier version of ours raises no epoch, but writes the nonce of each command
    untouched = store.epoch == known.epoch and all(
        key not in store.keys or getattr(store, FIXED[key]) == getattr(known, FIXED[key])
        for key in (PROCESSED, HISTORY)
    )
    new = _recovered(store, known) if lost else _completed(store, known, untouched)
    if store.store_id is None or (lost and store.store_id == known.store_id):
        new = replace(new, store_id=new_id)  # so that other routers restore what they know
    if OWNER not in store.keys:  # no step of ours removes it
        new = replace(new, owner=known.owner)
    last, in_store = known.promotion, store.promotion
    if last and (in_store is None or in_store.at < last.at):
        new = replace(new, active=last.deployment_id, promoted=known.promoted)
    elif (
        known.active not in (None, store.active)
        and (store.promoted_by_other or store.promoted is None)
        and (lost or store.promoted == known.promoted)
    ):  # a promotion by 0.3.x, just seen: it gets a time
        new = replace(new, promoted=Promotion(str(store.active), next_time(store, known)))
    records = dict(new.records)
    for name, record in known.records.items():
        returns = name in alive or name == new.active
        if returns and name not in records and not new.has_removed(record):
            records[name] = record
    if lost or new.active != store.active:
        records = _with_one_active(records, new, {known.active, store.active})
    return replace(new, records=records)


def next_time(*routings: Routing) -> float:
    """Return the time of a promotion now: the store's, and later than all earlier ones."""
    times = [routing.promoted.at for routing in routings if routing.promoted]
    return max([routings[0].now, *(at + 0.001 for at in times)])


def _completed(store: Routing, known: Routing, untouched: bool) -> Routing:
    """Return a state with lost keys and fields restored. `untouched`: nobody raised the epoch."""
    lost = [key for key in FIXED if key not in store.keys and key in known.keys]
    if not untouched:
        lost = [PROMOTED] if PROMOTED in lost and store.active == known.active else []
    restored = {FIXED[key]: getattr(known, FIXED[key]) for key in lost}
    records = {
        name: _filled(record, known.records.get(name), untouched)
        for name, record in store.records.items()
    }
    return replace(store, **restored, records=records)


def _filled(record: Record, known: Record | None, untouched: bool) -> Record:
    """Return a record with the fields restored that an older writer has dropped. After a promotion
    or drain by 0.3.x, the fields of the former state are not restored."""
    if known is None or record.service_id not in (None, known.service_id):
        return record  # not known, or the id is on another service
    if record.ignored == UNREADABLE:
        return known
    names: tuple[str, ...] = LASTING
    if untouched and record.state == known.state:
        names = (*LASTING, *"rejected_at retiring_at moving_at move_idle weight bake held".split())
    attributes = [FIELDS[name].name for name in names if name not in record.ignored]
    values = {name: getattr(record, name) for name in attributes}
    lost = [n for n, value in values.items() if value is None or value is False]  # 0 is a weight
    return replace(record, **{name: getattr(known, name) for name in lost})


def _recovered(store: Routing, known: Routing) -> Routing:
    """Return the state for an empty store, another store, or an earlier copy: all that is known is
    restored. Of a record that both have, the version that was changed last is kept."""
    earlier = store.store_id == known.store_id and EPOCH in store.keys  # else only a key was lost
    tombstones = dict(store.tombstones)
    for name, tombstone in known.tombstones.items():
        tombstones[name] = max(tombstone, tombstones.get(name, tombstone), key=lambda t: t.at)
    records = dict(store.records)
    for name, record in known.records.items():
        in_store = records.get(name)
        if in_store is None:  # a removal in progress continues
            if record.retiring_at or name not in tombstones or not tombstones[name].covers(record):
                records[name] = record
        elif (record.changed_at, earlier) > (in_store.changed_at, False):
            records[name] = replace(record, raw={**in_store.raw, **record.raw})
    for name, tombstone in list(tombstones.items()):
        buried = records.get(name)
        if buried is None or buried.retiring_at:
            continue
        if tombstone.covers(buried):
            del records[name]  # removed after the store's earlier copy was made
        else:
            del tombstones[name]  # the id is reused on a new service
    noted = {compact(entry): entry for entry in (*known.history, *store.history)}
    history = tuple(sorted(noted.values(), key=lambda e: float(e["at"])))[-HISTORY_AT_MOST:]
    closed = known.maintenance if earlier else store.maintenance or known.maintenance
    switches = [e["what"] for e in history if str(e["what"]).startswith("maintenance ")]
    if switches:  # the last switch in the history decides
        on = switches[-1] == "maintenance on"
        closed = (store.maintenance or known.maintenance) if on else None
    return replace(
        store,
        epoch=max(store.epoch, known.epoch),
        records=records,
        tombstones=tombstones,
        processed={**known.processed, **store.processed},
        history=history,
        maintenance=closed,
        lock=max(store.lock, known.lock, key=lambda lock: lock.until if lock else 0.0),
    )


def _with_one_active(
    records: Mapping[str, Record], routing: Routing, before: Collection[str | None]
) -> dict[str, Record]:
    """Return the records with one active deployment and one canary. `before`: formerly active."""
    new_records = dict(records)
    for name, record in records.items():
        if name == routing.active:
            new_records[name] = replace(record.as_active(), retiring_at=None)
        elif record.state == "active" and name in before:
            new_records[name] = record.as_draining(routing.now)
    canaries = sorted((r for r in new_records.values() if r.is_canary), key=lambda r: r.changed_at)
    for record in canaries[:-1]:
        new_records[record.deployment_id] = replace(record, weight=None, bake=None, steps=None)
    return new_records


# == The stores =================================================================================
# Each step is one transaction: a process that is killed leaves the old state or the new one.


# redis-py takes more, but none of it means what its author has meant
REDIS_URL = re.compile(
    r"rediss?://([^@/?#\s]*@)?(\[[0-9a-f:.]+\]|[^@:/?#\[\]\s]+)(:[0-9]{1,5})?(/[0-9]*)?(\?[^#\s]*)?",
    re.IGNORECASE,
)


def redis_problem(url: str) -> str | None:
    """Return what is wrong with a Redis address, without any part of it: it has a password."""
    scheme, found, rest = url.partition("://")
    if url[:1] in "\"'" or url[-1:] in "\"'":
        return "it is in quotes, which belong to no address"
    if "sentinel" in scheme:
        return "Sentinel is not supported: give the primary's address"
    if not found or scheme.lower() not in ("redis", "rediss"):
        return "it must begin with redis:// or rediss://"
    if rest.rpartition("@")[2][:1] in ("", ":", "/", "?"):
        return "it names no host"
    match = REDIS_URL.fullmatch(url)
    if match and int((match[3] or ":0")[1:]) < 65536:
        return None
    if "@" in rest:
        return (
            "a character of its password must be percent-encoded (`#` is %23, `/` %2F, `?` %3F,"
            " `@` %40), or its port is no number"
        )
    return "it must be redis://[user:password@]host[:port][/number]"


# what redis-py raises, the most special first
REDIS_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (redis.AuthenticationError, "it refuses the password"),
    (redis.exceptions.NoPermissionError, "its user may not do this"),
    (redis.ReadOnlyError, "it is a read-only replica"),
    (redis.exceptions.OutOfMemoryError, "it is full"),
    (redis.BusyLoadingError, "it is still loading its data"),
    (ssl.SSLCertVerificationError, "its certificate is not trusted"),
    (ssl.SSLError, "TLS is spoken on one side only"),
    (socket.gaierror, "its name is not known"),
    (ConnectionRefusedError, "it refuses connections"),
)


def redis_cause(error: BaseException) -> str:
    """Return why Redis could not be used, without its message, which can have its address."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and len(causes) < 9:
        causes.append(cause)
    for kind, words in REDIS_CAUSES:
        if any(isinstance(cause, kind) for cause in causes):
            return words
    return type(error).__name__


class RedisStore:
    """The routing state in Redis under `prefix`. Keys that it writes expire after `ttl` seconds."""

    def __init__(
        self, url: str, prefix: str, ttl: int | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.url, self.prefix, self.ttl = url, prefix, ttl
        self.options: Json = {
            "decode_responses": True,
            "encoding_errors": "replace",  # a value that is no UTF-8 is invalid, not an error
            "socket_timeout": limits.redis_seconds,
            "socket_connect_timeout": limits.redis_seconds,
        }
        self.client = redis.Redis.from_url(
            url,
            # a dead connection is made again, once; a timeout is not retried
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1, (redis.ConnectionError,)),
            **self.options,
        )
        self.pattern = f"{prefix}:[dp]*:*"  # of RECORDS, and a few other keys
        self.fixed = [prefix + key for key in FIXED]

    def read(self, transaction: Any = None) -> Routing:
        """Return the state. In a transaction, a concurrent write makes EXEC fail (WATCH)."""
        client = transaction or self.client
        found = self.client.scan_iter(self.pattern, count=SCAN_COUNT)
        keys = [*self.fixed, *filter(self.is_record, found)]
        if transaction:
            transaction.watch(*keys)
        now, values = client.time(), client.mget(keys)
        return parse(self.state(keys, values), now[0] + now[1] / 1e6)

    def apply(self, step: Step) -> Routing:
        """Carry out a step in a transaction and return the new state. If the step raises, nothing
        is written. A change raises the epoch and is announced to the routers."""

        def attempt(pipe: Any) -> Routing:
            before = self.read(pipe)
            after = step(before)
            change = changes(before, after)
            pipe.multi()
            for key, value in change.items():
                if value is None:
                    pipe.delete(self.prefix + key)
                else:
                    pipe.set(self.prefix + key, value, ex=self.ttl)
            if change:
                pipe.publish(f"{self.prefix}:events", json.dumps(sorted(change)))
            return written(after, change)

        # repeated if another client has written meanwhile
        client = cast(Any, self.client)
        return cast(Routing, client.transaction(attempt, *self.fixed, value_from_callable=True))

    def announce(self) -> None:
        """Ask every router to read the whole state."""
        self.client.publish(f"{self.prefix}:events", "[]")

    def is_record(self, key: str) -> bool:
        """Is this the key of a record?"""
        return key.startswith((self.prefix + RECORD, self.prefix + PREVIEW))

    def disconnect(self) -> None:
        self.client.connection_pool.disconnect()

    async def follow(self, table: Table) -> None:
        """Keep the table up to date with the store, and report what this router serves."""
        client = redis.asyncio.Redis.from_url(self.url, **self.options)
        async with client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe(f"{self.prefix}:events")
            await Follower(self, client, table).run(pubsub)

    def state(self, keys: list[str], values: list[Any]) -> State:
        pairs = zip(keys, values, strict=True)
        return {k.removeprefix(self.prefix): v for k, v in pairs if v is not None}


class Follower:
    """A router's connection to the store. The state is read in one MGET (the fixed keys, and the
    records that are known, announced or looked up): at the start, on every announcement, when the
    table asks, and every `refresh_seconds`. Sessions may be in the same Redis, so all keys are
    scanned only at the start and after an announcement without names; otherwise one step of SCAN
    follows every `scan_step_seconds`."""

    def __init__(self, store: RedisStore, client: redis.asyncio.Redis, table: Table) -> None:
        self.store, self.client, self.table, self.limits = store, client, table, table.limits
        self.keys: set[str] = set()  # of records that were announced or scanned
        self.next_read = self.next_scan = self.next_step = 0.0
        self.scan_all, self.cursor = True, 0
        self.next_report = self.report_by = 0.0  # report_by: also without changes
        self.reported: Json = {}
        self.reported_watch = ""

    async def run(self, pubsub: redis.asyncio.client.PubSub) -> None:
        listener, event = asyncio.create_task(self.listen(pubsub)), self.table.refresh_event
        listener.add_done_callback(lambda _: event.set())
        try:
            while not listener.done():
                event.clear()
                if self.table.pending_lookups or time.monotonic() >= self.next_read:
                    await self.read()
                await self.report()
                pause = min(self.next_read, self.next_report) - time.monotonic()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), max(pause, 0.0))
            listener.result()  # raises if the connection was lost
        except asyncio.CancelledError:
            with contextlib.suppress(redis.RedisError, OSError, TimeoutError):
                if not self.table.other_owner:
                    await self.report_watch()
                    await self.client.delete(self.store.prefix + REPORT + METRICS.name)
            raise
        finally:
            listener.cancel()

    async def listen(self, pubsub: redis.asyncio.client.PubSub) -> None:
        while True:
            message = await pubsub.get_message(timeout=self.limits.refresh_seconds)
            if not message:
                continue
            try:
                names = [str(name) for name in from_json(message["data"])]
                self.keys |= {self.store.prefix + n for n in names if n.startswith(RECORDS)}
                self.scan_all = self.scan_all or not names
            except (ValueError, TypeError):  # 0.3.x's announcements name no keys
                self.scan_all = True
            self.next_read = 0.0
            self.table.refresh_event.set()

    async def read(self) -> None:
        table, lookups = self.table, set(self.table.pending_lookups)
        self.next_read = time.monotonic() + self.limits.refresh_seconds
        await self.scan()
        known = {RECORD + name for name in {*table.routing.records, *lookups}}
        previews = (r.deployment_id for r in table.routing.records.values() if r.is_preview)
        known |= {PREVIEW + name for name in {*previews, *lookups}}
        known = {self.store.prefix + key for key in known}
        keys, self.keys = [*self.store.fixed, *(known | self.keys)], set()
        routing = await self.read_keys(keys)
        if await table.repair(self.store, routing):
            routing = await self.read_keys(keys)
        table.note_missing(routing)
        table.load(routing)
        table.pending_lookups -= lookups

    async def scan(self) -> None:
        """Look for records that were not announced: in all keys of Redis if `scan_all` is set and
        its share of the time allows it, else among the next few."""
        began = time.monotonic()
        if self.scan_all and began >= self.next_scan:
            self.scan_all = False
            scan = self.client.scan_iter(self.store.pattern, count=SCAN_COUNT)
            self.keys |= {key async for key in scan if self.store.is_record(key)}
            took = time.monotonic() - began
            self.next_scan = began + took + took / self.limits.scan_share
        elif began >= self.next_step:
            self.cursor, names = await self.client.scan(self.cursor, self.store.pattern, SCAN_COUNT)
            self.keys |= {str(key) for key in names if self.store.is_record(str(key))}
        else:
            return
        self.next_step = began + self.limits.scan_step_seconds

    async def read_keys(self, keys: list[str]) -> Routing:
        state = self.store.state(keys, await self.client.mget(keys))
        active = state.get(ACTIVE)
        if active and RECORD + active not in state:
            key = self.store.prefix + RECORD + active
            state |= self.store.state([key], await self.client.mget([key]))
        return parse(state, time.time())

    async def report(self) -> None:
        """Report what this router serves: a new epoch at once, new counts at intervals."""
        now, table, epoch = time.monotonic(), self.table, self.table.routing.epoch
        fallback = table.fallback_in_use and table.fallback_in_use.id
        news = (epoch, fallback) != (self.reported.get("epoch"), self.reported.get("fallback"))
        if not (table.other_owner or news) and now < self.next_report:
            return
        self.next_report = now + self.limits.report_seconds
        if table.other_owner:
            if self.reported:
                await self.client.delete(self.store.prefix + REPORT + METRICS.name)
            self.reported = {}
            return
        served = {"active": table.routing.active, "epoch": epoch, "since": table.since}
        if fallback:
            served["fallback"] = fallback
        report = {"version": runtime_version(), "identity": table.me} | served | METRICS.counters()
        if report != self.reported or now >= self.report_by:  # uptime and tasks alone are no change
            self.reported, self.report_by = report, now + self.limits.report_idle_seconds
            uptime, tasks = round(time.time() - METRICS.started_at), len(asyncio.all_tasks())
            text = compact({**report, "uptime_seconds": uptime, "tasks": tasks})
            await self.client.set(self.store.prefix + REPORT + METRICS.name, text, ex=REPORT_LEASE)
        await self.report_watch()
        if table.watch and now > table.watch.ends:
            table.watch = None

    async def report_watch(self) -> None:
        """Write what this router has counted in a bake. It stays when this router has ended."""
        watch = self.table.watch
        if watch is None or (text := compact(watch.json())) == self.reported_watch:
            return
        key = self.store.prefix + watch.key
        await self.client.hset(key, METRICS.name, text)
        await self.client.expire(key, BAKE_TTL)
        self.reported_watch = text


def written(after: Routing, change: Change) -> Routing:
    """Return the state of the store after a step whose change was written."""
    if not change:
        return after
    promoted = change.get(PROMOTED)
    return replace(
        after,
        epoch=int(str(change[EPOCH])),
        store_id=change.get(STORE_ID) or after.store_id,
        promoted=Promotion(**json.loads(promoted)) if promoted else after.promoted,
    )


def store_from_env(env: Mapping[str, str], limits: Limits = DEFAULT_LIMITS) -> Store:
    """Return the store that REDIS_URL names, or PULSE_KV_* outside Railway. Raises SystemExit."""
    prefix = (env.get("PULSE_RAILWAY_REDIS_PREFIX") or DEFAULT_REDIS_PREFIX).rstrip(":")
    kind = env.get("PULSE_KV_KIND") or "redis"
    if kind == "sqlite":
        if not env.get("PULSE_KV_PATH"):
            raise SystemExit("PULSE_KV_KIND=sqlite needs PULSE_KV_PATH, the file to use")
        from sqlite_store import SqliteStore

        return SqliteStore(env["PULSE_KV_PATH"], prefix)
    url = env.get("PULSE_KV_URL") or env.get("REDIS_URL")
    if kind != "redis" or not url:
        raise SystemExit("set REDIS_URL, or PULSE_KV_KIND=sqlite and PULSE_KV_PATH")
    if problem := redis_problem(url):
        raise SystemExit(f"the Redis address is wrong: {problem}")
    ttl = number_from_env("PULSE_RAILWAY_KEY_TTL_SECONDS", None, int, env)
    return RedisStore(url, prefix, ttl, limits)


def promotion_from_env(env: Mapping[str, str]) -> Promotion | None:
    """Return the last promotion by Railway's variables, which are as old as the container."""
    name = env.get(LAST_PROMOTED_VARIABLE) or ""
    if not DEPLOYMENT_ID.fullmatch(name):
        return None
    at = or_none(lambda text: a_time(float(text)), env.get(LAST_PROMOTED_AT_VARIABLE) or 0) or 0.0
    return Promotion(name, at if at < time.time() + CLOCKS_MAY_DIFFER else 0.0)


# == The routing table: the state as the data plane uses it =====================================


@dataclass(slots=True)
class Deployment:
    """A backend: its address, and the idle connections to it. Of a deployment with several
    processes it is the first one, which knows them all; the others share its tally."""

    id: str
    state: str
    host: str
    port: int
    header: bytes
    tally: Tally = field(default_factory=lambda: Tally())
    idle: collections.deque[Upstream] = field(default_factory=collections.deque)
    ejected_until: float = 0.0  # monotonic; until then it gets no hedged requests
    live: bool = True  # in the table
    busy: int = 0  # requests that wait in `forward`
    key_hash: str | None = None  # of a preview
    trial: asyncio.Future[str] | None = None  # of an ejected deployment: does it answer again?
    tried_at: float = 0.0
    affinity: bytes = b""  # names this process: the id, or `<id>.<k>`
    processes: list[Deployment] = field(default_factory=list, repr=False, compare=False)  # if many
    of: Deployment | None = field(default=None, repr=False, compare=False)  # the first process
    sockets: int = 0  # open ones
    refused_until: float = 0.0  # monotonic; until then it gets no new visitors
    moving_at: float | None = None  # from then on its tabs move over to the active deployment
    move_idle: float | None = None  # as in `Record`

    def __post_init__(self) -> None:
        self.affinity = self.affinity or self.id.encode()

    @property
    def first(self) -> Deployment:
        """The deployment: its first process."""
        return self.of or self

    @property
    def all(self) -> list[Deployment]:
        """All processes of this deployment, whose first process this is."""
        return self.processes or [self]

    @property
    def netloc(self) -> str:
        """Host and port as in a URL (RFC 3986 section 3.2.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass
class Missing:
    """A record that is missing in the store although no step of ours has removed it."""

    since: float  # monotonic
    answers: bool = False  # did its backend answer the last time?
    failing_since: float | None = None  # monotonic; no connection since then


class Table:
    """All known deployments, in memory. Requests use it without waiting for the store."""

    def __init__(self, env: Mapping[str, str], limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits, self.last_promoted = limits, promotion_from_env(env)
        self.me = self.copy = None  # this stack's stamp; the error message in a copied environment
        if env.get("RAILWAY_ENVIRONMENT_ID"):
            import ownership

            self.me, self.copy = ownership.name(env), ownership.copy_refusal(env)
        self.other_owner: str | None = None  # the store's owner, if it is another stack
        self.deployments: dict[bytes, Deployment] = {}
        self.previews: dict[bytes, Deployment] = {}  # in `deployments` none of them is
        self.further: dict[bytes, Deployment] = {}  # `<id>.<k>`: processes beside the first ones
        self.processes: dict[bytes, Deployment] = {}  # all of them, the previews' too
        self.active: Deployment | None = None
        self.canary: Deployment | None = None
        self.weight = 0.0  # percent of new visitors that get the canary
        self.closed: Maintenance | None = None
        self.routing = Routing()  # the last state that was loaded
        self.since = 0.0  # when this epoch was first served, in seconds since 1970
        self.loaded = False
        self.loaded_at = 0.0  # monotonic, of the last load
        self.provisional = False  # `active` comes from Railway's variable, without a state
        self.missing: dict[str, Missing] = {}
        self.looking: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()  # set at every load, and replaced
        self.refresh_event = asyncio.Event()  # asks for a load
        self.pending_lookups: set[str] = set()  # ids to look up at the next load
        self.looked_at = 0.0
        # path -> the deployment that had it, and until when that is cached (monotonic)
        self.asset_locations: dict[bytes, tuple[str, float]] = {}
        self.absent: dict[bytes, float] = {}  # assets that no deployment has; until when
        self.fallback: Deployment | None = None  # see Routing.fallback
        self.down: Deployment | None = None  # the active one, while the fallback gets its visitors
        self.watch: Watch | None = None  # while a deployment bakes
        self.baked = ""  # key of the last `watch`: one that is over does not begin again
        self.watches: dict[str, Watch] = {}  # the last few, by key

    @property
    def lost(self) -> bool:
        """Has the store lost its data, which this router does not know either?"""
        return self.loaded and self.routing.active is None and self.last_promoted is not None

    @property
    def empty(self) -> bool:
        """Is nothing deployed, or is the state lost? A router cannot always distinguish them."""
        only_previews = all(record.is_preview for record in self.routing.records.values())
        return self.lost or (self.routing.active is None and only_previews)

    @property
    def backends(self) -> list[Deployment]:
        """All processes of all deployments."""
        entries = [*self.deployments.values(), *self.previews.values()]
        return [process for entry in entries for process in entry.all]

    def health(self) -> Response:
        """Return the answer of /healthz: 503 only while nothing can be served. A store without any
        deployment yet is healthy, and so is a copy, which answers with its error message."""
        ready = bool(self.copy) or self.active is not None or (self.loaded and not self.lost)
        answer: Json = {"ok": ready}
        if self.copy:
            answer["detail"] = self.copy
        if self.provisional:
            answer["without_state"] = True
        age = time.monotonic() - self.loaded_at
        if self.loaded and age > 3 * self.limits.refresh_seconds:
            answer["stale_seconds"] = round(age)
        return JSONResponse(answer, 200 if ready else 503, NO_STORE)

    # -- the state in the store ----------------------------------------------------------------

    def foreign_owner(self, state: Routing) -> str | None:
        """Return the store's owner if it is another stack; then the state is served, not written.
        A store that has lost its owner's key still has that owner."""
        owner = state.owner or self.other_owner
        return owner if self.me is not None and owner != self.me else None

    def must_keep_known(self, state: Routing) -> bool:
        """Must the known state be kept? It must if the store has contents of another owner now, or
        if a state of another owner is lost, since only that owner's routers restore it."""
        was, is_now = self.routing.is_foreign(self.me), state.is_foreign(self.me)
        replaced = is_now and not was and state.store_id != self.routing.store_id
        return replaced or ((was or is_now) and state.active is None)

    async def repair(self, store: Store, state: Routing) -> bool:
        """Write back what the store has lost, and return whether anything was lost. Another active
        deployment in the store is not replaced by one that cannot be connected to."""
        known, loop = self.routing, asyncio.get_running_loop()
        since = time.monotonic() - self.limits.missing_seconds  # missing for long enough
        alive = {name for name, m in self.missing.items() if m.answers and m.since <= since}
        new_id = secrets.token_hex(8)
        if self.foreign_owner(state) or not changes(state, repaired(state, known, new_id, alive)):
            return False
        ours, other = known.record_of_active(), state.record_of_active()
        refused = None
        if ours and other and ours.deployment_id != other.deployment_id:
            if await loop.run_in_executor(None, look, ours, self.limits) == "unreachable":
                known = replace(known, active=None, promoted=None)
            elif other.deployment_id not in state.records:  # it may not exist
                at_other = await loop.run_in_executor(None, look, other, self.limits)
                refused = other.deployment_id if at_other == "unreachable" else None
        if known.active and (state.store_id, state.active) != (known.store_id, known.active):
            log.error("the store has lost data: writing back what this router knows")

        def step(store: Routing) -> Routing:
            if self.foreign_owner(store):
                return store
            if refused and store.active == refused:
                store = replace(store, active=known.active)
            return repaired(store, known, new_id, alive)

        try:
            await loop.run_in_executor(None, store.apply, step)
        finally:
            store.disconnect()
        return True

    def note_missing(self, state: Routing) -> None:
        """Keep deployments whose records no step of ours has removed, and send them requests."""
        lost = {k: r for k, r in self.routing.records.items() if k not in state.records}
        unexplained = [record for record in lost.values() if not state.has_removed(record)]
        before, now = self.missing, time.monotonic()
        ids = [record.deployment_id for record in unexplained]
        self.missing = {name: before.get(name, Missing(now)) for name in ids}
        if unexplained and (self.looking is None or self.looking.done()):
            self.looking = asyncio.create_task(self.look_at(unexplained))

    async def look_at(self, records: list[Record]) -> None:
        """Ask a few at a time, so that silent ones do not take all threads from `repair`."""
        loop, gate = asyncio.get_running_loop(), asyncio.Semaphore(self.limits.parallel_looks)

        async def look_once(record: Record) -> None:
            async with gate:
                at_address = await loop.run_in_executor(None, look, record, self.limits)
            if missing := self.missing.get(record.deployment_id):
                missing.answers = at_address == "answers"
                failing_since = missing.failing_since or time.monotonic()
                missing.failing_since = failing_since if at_address == "unreachable" else None

        await asyncio.gather(*map(look_once, records))

    def load(self, state: Routing) -> None:
        """Use a state that was read, with the records that are missing in it."""
        self.loaded_at = now = time.monotonic()
        other = self.foreign_owner(state)
        if other != self.other_owner:
            change = f"of {other}: it is served, nothing is written" if other else "no longer so"
            log.error("another stack's routing state: %s", change)
            self.other_owner = other
        if self.active and not self.provisional and self.must_keep_known(state):
            state = self.routing
        kept = {
            name: self.routing.records[name]
            for name, m in self.missing.items()
            if name in self.routing.records
            and (m.failing_since is None or now - m.failing_since < self.limits.missing_seconds)
        }
        routing = replace(state, records={**state.records, **kept})
        if routing != self.routing or not self.loaded:
            if routing.epoch != self.routing.epoch or not self.loaded:
                self.since = round(time.time(), 3)
            for problem in set(routing.problems) - set(self.routing.problems):
                log.error("routing state: %s", problem)
            self.routing, self.loaded = routing, True
            self.take_over(routing)
        self.changed.set()
        self.changed = asyncio.Event()

    def take_over(self, routing: Routing) -> None:
        """Make the table's entries those of a state."""
        known: dict[bytes, Deployment] = {}
        previews: dict[bytes, Deployment] = {}
        records = dict(routing.records)
        if active := routing.record_of_active():
            records[active.deployment_id] = active
        for name, record in records.items():
            # a retired one has no entry, so that its tabs reload instead of getting 502
            entry = None if record.retiring_at else self._entry(record)
            if entry:
                (previews if record.is_preview else known)[name.encode()] = entry
        self.provisional = self.provisional and routing.active is None
        if self.provisional and self.active:
            known.setdefault(self.active.id.encode(), self.active)
        else:
            self.active = known.get((routing.active or "").encode())
        present = known | previews
        former = self.processes
        live: dict[bytes, Deployment] = {}
        for entry in present.values():
            live |= {process.affinity: process for process in entry.all}
        for process in former.values():
            if live.get(process.affinity) is not process:
                process.live = False
                close_idle(process)
            if process.id.encode() not in present:
                METRICS.tallies.pop(process.id, None)
        self.processes = live
        self.further = {
            process.affinity: process for entry in known.values() for process in entry.processes[1:]
        }
        self.deployments, self.previews, self.absent = known, previews, {}
        before = routing.fallback if FALLBACK else None
        self.fallback = known.get(before.deployment_id.encode()) if before else None
        canary = routing.canary
        self.canary = known.get(canary.deployment_id.encode()) if canary else None
        self.weight = (canary.weight if canary else None) or 0.0
        self.closed = routing.maintenance
        baking = routing.baking
        if baking is None or baking.bake is None:
            self.watch = None
        elif self.baked != bake_key(baking):
            # one that is taken up again, after a canary's, goes on with its counts
            self.baked = bake_key(baking)
            self.watch = self.watches.get(self.baked) or Watch(baking, self.limits)
            self.watches = {**dict([*self.watches.items()][-3:]), self.baked: self.watch}

    def _entry(self, record: Record) -> Deployment | None:
        """Return a record's entry, with those of its further processes."""
        name = record.deployment_id
        if not DEPLOYMENT_ID.fullmatch(name) or not record.url:
            return None
        first = self._process(record, name, record.url)
        further = sorted((record.instances or {}).items(), key=lambda item: int(item[0]))
        processes = [self._process(record, f"{name}.{k}", i["address"]) for k, i in further]
        for process in processes:
            process.of = first
        first.processes = [first, *processes] if processes else []
        return first

    def _process(self, record: Record, affinity: str, address: str) -> Deployment:
        """Return a process' entry: the present one if the address is the same, or a new one."""
        name, url = record.deployment_id, urllib.parse.urlsplit(address)
        host, port = str(url.hostname), url.port or 80
        old = self.processes.get(affinity.encode())
        if old is None or (old.host, old.port) != (host, port):
            tally = METRICS.tallies.setdefault(name, Tally())
            old = Deployment(name, record.state, host, port, b"", tally)
            old.affinity = affinity.encode()
        # the id alone: clients and earlier versions of `deploy` compare it with the id
        old.header = f"{SELECTED_HEADER}: {name}\r\n".encode()
        old.state, old.key_hash = record.state, record.preview
        old.moving_at = record.moving_at if record.state == "draining" else None
        old.move_idle = record.move_idle
        return old

    async def serve_without_state(self) -> None:
        """Without a state, serve the deployment of Railway's variable if it answers."""
        loop = asyncio.get_running_loop()
        while True:
            if self.last_promoted and self.active is None and (self.lost or not self.loaded):
                record = Record(self.last_promoted.deployment_id, "active")
                record = replace(record, service_name=SERVICE_PREFIX + record.deployment_id)
                at_address = await loop.run_in_executor(None, look, record, self.limits)
                if at_address == "answers" and self.active is None:
                    log.error("no routing state: serving %s, as Railway says", record.deployment_id)
                    self.active, self.provisional = self._entry(record), True
                    self.deployments = {record.deployment_id.encode(): cast(Any, self.active)}
                    self.processes = dict(self.deployments)
                    if os.environ.get("PULSE_RAILWAY_MAINTENANCE"):
                        self.closed = Maintenance(0.0)
            await asyncio.sleep(self.limits.provisional_seconds)

    # -- for requests --------------------------------------------------------------------------

    async def find(self, affinity_id: bytes) -> Deployment | None:
        """Return the process of an affinity. An unknown one causes a read of the store, but
        rarely."""
        known = self.process(affinity_id)
        text, dot, number = affinity_id.decode("latin-1").partition(".")
        if known or not DEPLOYMENT_ID.fullmatch(text):
            return known
        if dot and not INSTANCE_NUMBER.fullmatch(number):
            return None
        now = asyncio.get_running_loop().time()
        if now - self.looked_at >= self.limits.lookup_seconds:
            self.looked_at = now
            self.pending_lookups = {text}
            self.refresh_event.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while text in self.pending_lookups:  # by this request or by another
                    await self.changed.wait()
        return self.process(affinity_id)

    def process(self, affinity_id: bytes) -> Deployment | None:
        """Return the process that an affinity names, if it is known: `<id>`, or `<id>.<k>`."""
        return self.deployments.get(affinity_id) or self.further.get(affinity_id)

    def others(self, first: Deployment, path: bytes) -> list[Deployment]:
        """Return the deployments to ask for what `first` lacks: the one that had this path lately,
        then the newest. Ejected ones (`ejected_until`) are left out."""
        now = time.monotonic()
        location, until = self.asset_locations.get(path, ("", 0.0))
        entries = (d for d in self.deployments.values() if d is not first.first)
        others = [d for d in entries if d.ejected_until < now]
        return sorted(others, key=lambda d: d.id != location) if until > now else others

    def cache_asset_location(self, path: bytes, deployment: Deployment) -> None:
        until = time.monotonic() + self.limits.asset_location_seconds
        self.cache_by_path(self.asset_locations, path, (deployment.id, until))

    def cache_absent(self, path: bytes) -> None:
        self.cache_by_path(self.absent, path, time.monotonic() + self.limits.absent_seconds)

    def cache_by_path(self, cache: dict[bytes, Any], path: bytes, value: Any) -> None:
        if len(path) <= self.limits.asset_location_path_bytes:
            cache[path] = value
            while len(cache) > self.limits.asset_locations:
                del cache[next(iter(cache))]

    async def readmit(self, deployment: Deployment) -> bool:
        """Return whether an ejected deployment answers again. It is asked once a second, for all
        requests that wait."""
        now, limits = time.monotonic(), self.limits
        late = now - deployment.tried_at > limits.readmission_seconds
        if deployment.trial is None or (deployment.trial.done() and late):
            record = Record(deployment.id, address=f"http://{deployment.netloc}")
            brief = replace(limits, backend_seconds=limits.hedge_timeout_seconds)
            loop, threads = asyncio.get_running_loop(), RESOLVER.threads
            deployment.trial = loop.run_in_executor(threads, look, record, brief)
            deployment.tried_at = now
        answers = await asyncio.shield(deployment.trial) == "answers"
        deployment.ejected_until = 0.0 if answers else deployment.ejected_until
        return answers

    @property
    def fallback_in_use(self) -> Deployment | None:
        return self.fallback if self.down and self.down is self.active else None

    def give_up(self, active: Deployment) -> None:
        """Send new visitors to the fallback, from now on."""
        if self.down is not active:
            log.error("%s cannot be connected to: new visitors get another version", active.id)
            self.down = active
            self.refresh_event.set()  # so that it is reported at once

    async def accepts(self, deployment: Deployment) -> bool:
        """Does one of a deployment's processes accept a connection?"""

        async def accepts(process: Deployment) -> bool:
            with contextlib.suppress(UpstreamError):
                upstream = await connect(process, self.limits.breaker_connect_seconds)
                upstream.transport.close()
                process.refused_until = 0.0
                return True
            process.refused_until = time.monotonic() + self.limits.instance_pause_seconds
            return False

        return any(await asyncio.gather(*map(accepts, deployment.all)))

    async def watch_active(self) -> None:
        """Send new visitors back to the active deployment when it can be connected to again."""
        limits, since = self.limits, None
        while True:
            await asyncio.sleep(limits.breaker_probe_seconds)
            down, now = self.down, time.monotonic()
            if down is None or down is not self.active:
                self.down = since = None
                continue
            if not await self.accepts(down):
                since = None
                continue
            since = since or now
            if now - since >= limits.breaker_close_seconds:
                log.warning("%s can be connected to again", down.id)
                self.down = since = None

    async def follow(self, store: Store) -> None:
        pause = 0.1
        while True:
            began = time.monotonic()
            try:
                await store.follow(self)
            except (redis.RedisError, OSError, TimeoutError) as error:
                log.error("routing state unreadable (%s); trying again", redis_cause(error))
            pause = 0.1 if time.monotonic() - began > 10 else min(pause * 2, 2.0)
            await asyncio.sleep(pause)


TABLE = Table(os.environ)  # `serve` makes another, with its limits
ACCESS_LOG: telemetry.AccessLog | None = None  # if a variable asks for it
TRACER: tracing.Tracer | None = None  # as well
# prefixes of the variables that load telemetry.py
TELEMETRY = ("PULSE_RAILWAY_ACCESS_LOG", "PULSE_RAILWAY_METRICS_PORT", "OTEL_")

# == Counters: for `control status`, the bake of a new version, and the exported metrics ========
# Plain lists, since every request updates them. BUCKETS are OpenTelemetry's, in seconds.

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
METHODS = frozenset(b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH".split())


@dataclass(slots=True)
class Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


@dataclass(slots=True)
class Tally:
    """Counts of outcomes of one deployment's requests."""

    # by method and status // 100; unknown methods are OpenTelemetry's _OTHER
    answers: collections.defaultdict[tuple[bytes, int], Histogram] = field(
        default_factory=lambda: collections.defaultdict(Histogram)
    )
    first_byte: Histogram = field(default_factory=Histogram)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)  # by kind
    failed: int = 0  # errors without an answer in `answers`
    broken: list[int] = field(default_factory=lambda: [0] * 10)  # by class: answers that failed
    tunnels: int = 0  # number of opened tunnels
    moved: int = 0  # client loaders that were told to load the active deployment's page
    moved_idle: int = 0  # idle tabs that were told to
    idle_move_at: float = 0.0  # monotonic; when the last of them was

    def answered(self, method: bytes, status: int, seconds: float) -> None:
        self.answers[method if method in METHODS else b"_OTHER", status // 100].add(seconds)

    def summary(self) -> tuple[list[int], int, list[int]]:
        """Return whole answers by status class, other failures, answers by bucket of duration."""
        classes = [0] * 10
        for (_, status), histogram in self.answers.items():
            classes[status] += sum(histogram.counts)
        failed = self.failed + sum(self.broken)
        classes = [count - broken for count, broken in zip(classes, self.broken, strict=True)]
        buckets = [h.counts for h in self.answers.values()] or [Histogram().counts]
        return classes, failed, [sum(column) for column in zip(*buckets, strict=True)]


@dataclass(slots=True)
class Metrics:
    name: str = ""
    started_at: float = field(default_factory=time.time)
    requests: int = 0
    errors: int = 0  # answers by the router itself for failed backends
    stale: int = 0
    rejected: int = 0  # connections, at the limit
    tunnels_opened: int = 0
    tunnels_open: int = 0
    own: Tally = field(default_factory=Tally)  # the router's own answers
    tallies: dict[str, Tally] = field(default_factory=dict)  # by deployment
    # good answers and failures by deployment, at the last count with more good ones
    last_good: dict[str, tuple[int, int]] = field(default_factory=dict)

    def failing(self, tallies: Mapping[str, tuple[list[int], int, list[int]]]) -> dict[str, int]:
        """Return the failures in a row by deployment: those since the last count, of one each few
        seconds, with a good answer."""
        rows, last = {}, self.last_good
        self.last_good = {}
        for name, (classes, failed, _) in tallies.items():
            good, bad = sum(classes[:5]), sum(classes[5:]) + failed
            before = last.get(name, (0, 0))
            self.last_good[name] = before if good == before[0] else (good, bad)
            rows[name] = bad - self.last_good[name][1]
        return {name: row for name, row in rows.items() if row > 0}

    def counters(self) -> Json:
        in_use = requests_under_way() + [end.deployment for end in TunnelEnd.open]
        tallies = {name: tally.summary() for name, tally in self.tallies.items()}
        return {
            "router": self.name,
            "requests": self.requests,
            "errors": self.errors,
            "stale": self.stale,
            "moved": {name: t.moved for name, t in self.tallies.items() if t.moved},
            "moved_idle": {n: t.moved_idle for n, t in self.tallies.items() if t.moved_idle},
            "turned_away": self.rejected,
            "clients": len(Client.instances),
            "pooled": idle_connections(),
            "tunnels_open": self.tunnels_open,
            "tunnels_opened": self.tunnels_opened,
            "requests_per_deployment": {name: sum(t[0]) for name, t in tallies.items()},
            "tallies": {name: t for name, t in tallies.items() if t[1] or any(t[0])},
            "failing": self.failing(tallies),
            "in_flight": collections.Counter(in_use),  # a download without a tab counts, too
            # open sockets of the processes of deployments that have several
            "instances": {
                affinity.decode(): process.sockets
                for affinity, process in TABLE.processes.items()
                if process.first.processes
            },
        }


METRICS = Metrics()


@dataclass(slots=True)
class Sample:
    """What visitors of one deployment got during a bake, by client address and in total."""

    by_address: dict[bytes, list[int]] = field(default_factory=dict)  # requests, failed, slow
    failed: collections.Counter[str] = field(default_factory=collections.Counter)  # by kind
    first_byte: Histogram = field(default_factory=Histogram)

    def entry(self, address: bytes, may_begin: bool) -> list[int] | None:
        """Return an address' counts; None if it does not count.

        Args:
            may_begin: an address that has none yet begins to count.
        """
        entry = self.by_address.get(address)
        if entry is None and may_begin and len(self.by_address) < ADDRESSES:
            entry = self.by_address[address] = [0, 0, 0]
        return entry

    def json(self, key: bytes, hung: collections.Counter[bytes]) -> Json:
        """Return the totals, and the addresses that count most, hashed with `key`: enough to limit
        their share, and to know whether there are five.

        Args:
            hung: requests by address that wait for an answer, which have failed until one comes.
        """
        entries = {
            address: [requests + hung[address], failed + hung[address], slow + hung[address]]
            for address, (requests, failed, slow) in self.by_address.items()
        }
        most = {
            address: entry
            for column in range(3)
            for address, entry in heapq.nlargest(
                ADDRESSES_REPORTED, entries.items(), key=lambda item: item[1][column]
            )
        }
        sums = [sum(column) for column in zip(*entries.values(), strict=True)]
        requests, _, slow = sums or (0, 0, 0)
        return {
            "requests": requests,
            "failed": {**self.failed, "hung": hung.total()} if hung else self.failed,
            "slow": slow,
            "visitors": len(entries),
            "seconds": self.first_byte.counts,
            "addresses": {
                hashlib.blake2b(address, digest_size=6, key=key).hexdigest(): entry
                for address, entry in most.items()
            },
        }


def bake_key(record: Record) -> str:
    """Return the store's key of what routers count in a deployment's bake: a hash by router."""
    since = record.bake.since if record.bake else 0.0
    return f"{BAKE}{record.deployment_id}:{since * 1000:.0f}"


class Watch:
    """Counts what visitors of a baking deployment get, and those of the one before it.

    Requests without affinity count, and those with one of an address that had a request without it
    at this router: a stranger who names the new deployment does not. All visitors of the old
    deployment came to it before the bake, so that they always count."""

    def __init__(self, record: Record, limits: Limits) -> None:
        bake = cast(Bake, record.bake)
        self.new, self.key = record.deployment_id, bake_key(record)
        self.samples = {name: Sample() for name in (record.deployment_id, bake.old) if name}
        self.slow = bake.latency_ms / 1000 if bake.latency_ms else math.inf  # seconds
        # a duration, since the clocks of store and router may differ
        self.ends = time.monotonic() + bake.until - bake.since + limits.watch_grace_seconds
        self.hung_seconds = limits.hung_seconds

    def json(self) -> Json:
        key, hung = self.key.encode(), self.hung()
        return {name: sample.json(key, hung[name]) for name, sample in self.samples.items()}

    def hung(self) -> dict[str, collections.Counter[bytes]]:
        """Return how many pages each version's visitors wait for, by address. What else waits may
        be meant to (long polling)."""
        found = {name: collections.Counter[bytes]() for name in self.samples}
        before = time.monotonic() - self.hung_seconds
        for client in Client.instances:
            exchange = client.exchange
            if exchange and exchange.state is WAITING and exchange.began < before:
                request, name = exchange.request, exchange.upstream.deployment.id
                sample = self.samples.get(name)
                if sample and navigates(request):
                    address = visitor_address(request)
                    if sample.entry(address, not request.affinity_id or name != self.new):
                        found[name][address] += 1
        return found

    def count(
        self, request: Request, deployment: Deployment, failure: str, took: float
    ) -> Seen | None:
        """Count a request, and return where, if it counts; `failure` is empty for none."""
        sample = self.samples.get(deployment.id)
        if sample is None or request.path in NO_VISITOR or request.values(INTERNAL_TOKEN_FIELD):
            return None
        may_begin = not request.affinity_id or deployment.id != self.new
        entry = sample.entry(visitor_address(request), may_begin)
        if entry is None:
            return None
        entry[0] += 1
        entry[2] += took > self.slow
        if failure:
            entry[1] += 1
            sample.failed[failure] += 1
        else:
            sample.first_byte.add(took)
        return sample.failed, entry


ADDRESSES = 1000  # in a sample: a visitor beyond them does not count
ADDRESSES_REPORTED = 5  # with most requests, failures, slow ones
NO_VISITOR = frozenset((META_PATH.encode(), HEALTH_PATH.encode()))  # deploy and janitor ask


def visitor_address(request: Request) -> bytes:
    return network_of(client_address(request)[:64])


@lru_cache(1024)
def network_of(address: bytes) -> bytes:
    """Return a client's address, of IPv6 its /64: a client has all of it."""
    try:
        ip = ipaddress.ip_address(address.decode("latin-1"))
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return ip.ipv4_mapped.packed if ip.ipv4_mapped else ip.packed[:8]
    return ip.packed


# == The backend's side of a connection =========================================================


def requests_under_way() -> list[str]:
    """Return the deployment id of each request in progress."""
    exchanges = (client.exchange for client in Client.instances)
    return [e.upstream.deployment.id for e in exchanges if e and not e.state.finished]


NO_CONNECTION = "the deployment refuses connections"


class UpstreamError(Exception):
    """The backend did not answer. The client gets `status` and `detail`."""

    def __init__(self, status: int, detail: str, kind: str, *, sent: bool = False) -> None:
        super().__init__(detail)
        self.status, self.detail, self.kind = status, detail, kind
        self.sent = sent  # the backend may have seen the request


class Upstream(asyncio.Protocol):
    """A connection to a backend. It passes what it reads to its `Exchange`."""

    __slots__ = ("again", "deployment", "exchange", "idle_since", "transport")

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.exchange: Exchange | None = None
        self.again = False  # pooled, and its request may be repeated if the connection is dead
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.feed(data)
        else:  # an answer without a request
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc:  # A write failed on a reset connection, but an early answer may still be readable.
            with contextlib.suppress(OSError):
                fd = self.transport.get_extra_info("socket").fileno()
                while self.exchange and (data := os.read(fd, 65536)):
                    self.exchange.feed(data)
        if self.exchange is not None:
            self.exchange.upstream_lost(exc)
        else:
            with contextlib.suppress(ValueError):
                self.deployment.idle.remove(self)

    def pause_writing(self) -> None:
        if self.exchange and self.exchange.writable:
            self.exchange.writable.clear()

    def resume_writing(self) -> None:
        if self.exchange and self.exchange.writable:
            self.exchange.writable.set()


def reset(transport: asyncio.Transport) -> None:
    """Close a connection with a TCP reset, so that the peer sees an abort."""
    if (sock := transport.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def close_idle(deployment: Deployment) -> None:
    while deployment.idle:
        deployment.idle.pop().transport.close()


def idle_connections() -> int:
    return sum(len(deployment.idle) for deployment in TABLE.backends)


class Resolver:
    """Resolves host names by Python's resolver in threads. A name has one lookup at a time, so
    that a slow one takes one thread. Addresses are cached for `resolved_seconds`."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.known: dict[tuple[str, int], tuple[float, list[Any]]] = {}
        self.asking: dict[tuple[str, int], asyncio.Future[list[Any]]] = {}
        self.threads = concurrent.futures.ThreadPoolExecutor(limits.resolver_threads, "resolver")

    async def addresses(self, host: str, port: int) -> tuple[list[Any], bool]:
        """Return all addresses of a name, and whether they were cached. Raises OSError."""
        key = host, port
        until, cached = self.known.get(key, (0.0, []))
        if time.monotonic() < until:
            return cached, True
        if key not in self.asking:
            # not loop.getaddrinfo: uvloop's own bypasses Python's socket module
            ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
            lookup = asyncio.get_running_loop().run_in_executor(self.threads, ask)
            self.asking[key] = lookup
            lookup.add_done_callback(partial(self.remember, key))
        return await asyncio.shield(self.asking[key]), False

    def remember(self, key: tuple[str, int], lookup: asyncio.Future[list[Any]]) -> None:
        del self.asking[key]
        if not (lookup.cancelled() or lookup.exception()):
            now = time.monotonic()
            self.known = {k: v for k, v in self.known.items() if v[0] > now}
            self.known[key] = now + self.limits.resolved_seconds, lookup.result()


RESOLVER = Resolver()


# too few descriptors, ports or memory in this process
OWN_WANT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL)


async def connect(deployment: Deployment, timeout: float) -> Upstream:
    """Open a new connection. All addresses of the name are tried, 250 ms after one another (RFC
    8305), so that a dead IPv6 address costs little. Raises UpstreamError: 502 if the backend
    refuses the connection, 504 if it does not answer within `timeout` seconds, 503 if this router
    cannot open one."""
    clients, limit = len(Client.instances) + len(TunnelEnd.open), TABLE.limits.connections
    if clients > limit // 2 and clients + idle_connections() > limit:
        for other in TABLE.backends:
            close_idle(other)  # their descriptors are needed for this connection
    host, port = deployment.host, deployment.port
    create = asyncio.get_running_loop().create_connection
    try:
        async with asyncio.timeout(timeout):
            if ":" in host or host.replace(".", "").isdigit():  # an address
                return (await create(lambda: Upstream(deployment), host, port))[1]
            while True:
                addresses, was_cached = await RESOLVER.addresses(host, port)
                try:
                    sock = await start_connection(addresses, happy_eyeballs_delay=0.25)
                    return (await create(lambda: Upstream(deployment), sock=sock))[1]
                except OSError:
                    RESOLVER.known.pop((host, port), None)
                    if not was_cached:
                        raise  # a cached address may be outdated: look the name up again
    except TimeoutError:
        RESOLVER.known.pop((host, port), None)
        raise UpstreamError(504, "the deployment does not answer", "connect_timeout") from None
    except OSError as error:
        if error.errno in OWN_WANT:
            raise UpstreamError(503, "the router cannot open a connection", "own") from None
        raise UpstreamError(502, NO_CONNECTION, "refused") from None


# == The states of a client's connection and of an exchange ======================================
# An event that is not in a state's row is a bug of the router: KeyError.

ClientEvent = Literal["head", "handshake", "end", "early", "bad head", "refused", "101", "close"]
ExchangeEvent = Literal["head", "end", "101", "missing", "client gone", "reset", "lost", "timeout"]


class ClientState(Enum):
    """The state of a client's connection: of its reading side, since several requests can wait.
    `parses`: data go to the parser; `may_answer`: a request may be begun and its answer written;
    `may_read`: the socket may be read, if the requests allow it (`Client.update_reading`)."""

    # what it is; parses, may_answer, may_read
    HEAD = "between two requests, or in a head", True, True, True
    BODY = "in the body of a request", True, True, True
    HANDSHAKE = "after a handshake: further data belong to the tunnel", False, True, False
    REFUSED = "after an invalid request: earlier answers are still written", False, True, False
    LINGERING = "answered; the rest of the upload is read and dropped", True, False, True
    DROPPING = "answered; data are dropped without parsing", False, False, True
    TUNNEL = "the connection belongs to a tunnel", False, False, False
    CLOSED = "closed, or closing", False, False, False

    def __init__(self, about: str, parses: bool, may_answer: bool, may_read: bool) -> None:
        self.about = about
        self.parses, self.may_answer, self.may_read = parses, may_answer, may_read
        self.after: dict[ClientEvent, ClientState] = {}


class ExchangeState(Enum):
    """The state of an exchange. States without a following state are its outcomes."""

    WAITING = "the request is sent, or being sent"
    ANSWERING = "the answer's head has gone to the client"
    OK = "the answer is complete"
    SWITCHED = "the two connections are a tunnel"
    MISSING = "the deployment lacks the asset; its answer was dropped"
    GONE = "the client has closed its connection"
    BROKEN = "the answer broke off after its head"
    RESET = "the pooled connection was dead: sent again on another"
    LOST = "the connection was lost before an answer"
    TIMED_OUT = "no answer in time"

    after: dict[ExchangeEvent, ExchangeState]  # what may happen, and the state after it
    finished: bool


HEAD, BODY, HANDSHAKE, REFUSED, LINGERING, DROPPING, TUNNEL, CLOSED = ClientState
WAITING, ANSWERING, OK, SWITCHED, MISSING, GONE, BROKEN, RESET, LOST, TIMED_OUT = ExchangeState

# event -> state before -> state after
CLIENT: dict[ClientEvent, dict[ClientState, ClientState]] = {
    "head": {HEAD: BODY},
    "handshake": {HEAD: HANDSHAKE},
    # HEAD: a request that is parsed again without its upgrade; CLOSED: a dropped request
    "end": {HEAD: HEAD, BODY: HEAD, HANDSHAKE: HANDSHAKE, LINGERING: CLOSED, CLOSED: CLOSED},
    "early": {BODY: LINGERING},  # the answer was complete before the request
    "bad head": {HEAD: REFUSED},  # behind a request that is not answered yet
    "refused": {HEAD: DROPPING, BODY: DROPPING},  # too many clients; a bad body, before any answer
    "101": {HANDSHAKE: TUNNEL},
    "close": {state: CLOSED for state in ClientState if state is not TUNNEL},
}
EXCHANGE: dict[ExchangeEvent, dict[ExchangeState, ExchangeState]] = {
    "head": {WAITING: ANSWERING},
    "end": {ANSWERING: OK},
    "101": {WAITING: SWITCHED},
    "missing": {WAITING: MISSING},  # a hedged answer that says: not here
    "client gone": {WAITING: GONE, ANSWERING: GONE},
    "reset": {WAITING: RESET},  # of a pooled connection, for a request that may be repeated
    "lost": {WAITING: LOST, ANSWERING: BROKEN},  # of any other, or an invalid answer
    "timeout": {WAITING: TIMED_OUT},
}
for _state in ClientState:
    _state.after = {event: steps[_state] for event, steps in CLIENT.items() if _state in steps}
for _stage in ExchangeState:
    _stage.after = {event: steps[_stage] for event, steps in EXCHANGE.items() if _stage in steps}
    _stage.finished = not _stage.after

# == The client's side of a connection ==========================================================


def client_limit(configured: int | None, limits: Limits) -> int:
    """Raise the process's limit of descriptors as far as allowed, and return how many clients may
    be connected at once: half of the descriptors, or `configured` if that is fewer."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # above the kernel's own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = (soft - limits.descriptors_kept) // 2 if soft != resource.RLIM_INFINITY else 1 << 30
    return max(8, min(room, configured or room))


CHUNKED = b"transfer-encoding: chunked\r\n"
VARY = f"vary: {AFFINITY_HEADER}\r\n".encode()
# RFC 9110 section 7.6.1: for one connection only. The header `Connection` names more, ...
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    b" transfer-encoding upgrade".split()
)
USUAL_CONNECTION = frozenset((b"keep-alive", b"close", b"upgrade", b"keep-alive, upgrade"))
# ... but not what the edge has set, the app relies on, or frames the message (CVE-2024-45410)
KEPT = re.compile(
    rb"cookie|authorization|host|forwarded|x-real-ip|x-request-start|trace(parent|state)"
    rb"|(content|x-forwarded|x-railway|x-pulse)-.*"
)
# what the loops over headers look at
CHECKED_HEADERS = frozenset(
    b"host x-forwarded-host content-length transfer-encoding expect connection".split()
)
LONGEST_CHECKED = 2000  # bytes of their lines, since a check costs up to 10 times as much as a copy
ANSWER_HEADERS = HOP_BY_HOP | {b"content-length", b"content-type", b"x-pulse-selected-deployment"}
FORWARDED = frozenset(b"host x-forwarded-for x-forwarded-proto x-forwarded-host x-real-ip".split())
INTERNAL_TOKEN_FIELD = INTERNAL_TOKEN_HEADER.encode()
REQUEST_HEADERS = HOP_BY_HOP | FORWARDED | {INTERNAL_TOKEN_FIELD}
# RFC 3986 section 3.2; an app may take anything else for a part of its URL (CVE-2026-48710)
HOST = re.compile(rb"(?:[a-z0-9._~!$&'()*+,;=-]++|%[0-9a-f]{2})*+(?::[0-9]*)?", re.I)
LITERAL = re.compile(
    rb"\[(?:([0-9a-f:.]+)|v[0-9a-f]+\.[a-z0-9._~!$&'()*+,;=:-]+)\](:[0-9]*)?", re.I
)


def is_host(value: bytes) -> bool:
    """Is this a host with an optional port?"""
    if HOST.fullmatch(value):
        return True
    literal = LITERAL.fullmatch(value)
    try:
        return bool(
            literal and (not literal[1] or socket.inet_pton(socket.AF_INET6, literal[1].decode()))
        )
    except OSError:
        return False


def without_named(lines: list[bytes], connection: bytes) -> list[bytes]:
    """Drop the headers that values of the field `Connection` name."""
    named = set(map(bytes.strip, connection.lower().split(b",")))

    def is_dropped(line: bytes) -> bool:
        name = line.partition(b":")[0].lower()
        return name in named and not KEPT.fullmatch(name)

    return [line for line in lines if not is_dropped(line)]


# of Cache-Control: a directive, whose argument may be quoted; those that `private` replaces; all
DIRECTIVE = re.compile(rb'(?:[^,"]+|"(?:[^"\\]+|\\.)*"?)+', re.DOTALL)
FOR_SHARED = re.compile(rb"(?:public|private|s-maxage)(?![\w-]).*", re.IGNORECASE | re.DOTALL)
ANY = re.compile(rb".*", re.DOTALL)


def with_cache_control(
    lines: list[bytes], directive: bytes, dropped: re.Pattern[bytes]
) -> list[bytes]:
    """Add a directive to the header lines of an answer, in place of those that are `dropped`. All
    are in one line then, since a cache may read only one (RFC 9111 section 5.2)."""
    kept, directives = [], []
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() == b"cache-control":
            parts = [part.strip() for part in DIRECTIVE.findall(value)]
            directives += [part for part in parts if part and not dropped.fullmatch(part)]
        else:
            kept.append(line)
    # the new one first, where no quote that is not closed can hide it
    return [*kept, b"cache-control: " + b", ".join([directive, *directives]) + b"\r\n"]


NO_STORE = {"cache-control": "no-store"}  # on the router's own answers


def error_response(status: int, detail: str = "", **headers: str) -> Response:
    """Return the router's own answer in place of an app's; no cache may keep it."""
    fields = NO_STORE | {name.replace("_", "-"): value for name, value in headers.items()}
    detail = detail or http.HTTPStatus(status).phrase.lower()
    return JSONResponse({"detail": detail}, status, fields)


class BadRequest(Exception):
    """A request head that this router refuses."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status


class Request:
    """A request. A connection can have several at once: the head of a pipelined request is parsed
    while the request before it is answered."""

    more_body = True  # the body is not complete yet
    gone = False  # the client has gone, or the body is invalid
    begun = False  # a byte of the answer was written
    answered = False
    by_visitor = False  # the visitor's id chose the deployment
    balanced = False  # the visitor's id was drawn for the process with fewer sockets
    tried = 0  # processes that could not be connected to
    counted = False  # an answer of the router's own was counted and logged
    unsure = False  # a deployment that was asked for an asset gave no clear answer
    visitor = b""  # id of a visitor who gets a cookie: in a canary, or for one of many processes
    affinity_id = b""  # the deployment that the request names
    span: tracing.Span | None = None  # if the request is traced
    # of one that had to wait: when it came, and when the present deployment was chosen (monotonic)
    received = since = 0.0
    body: bytes | bytearray = b""  # received and not taken yet
    arrived: asyncio.Event | None = None  # set when data arrive, and at every end: for `read`

    def __init__(self, client: Client, method: bytes, version: str, keep_alive: bool) -> None:
        self.client, self.method, self.version = client, method, version
        self.keep_alive, self.has_body = keep_alive, client.has_body
        self.url, self.fields = client.url, client.fields  # as received
        self.handshake = client.state is HANDSHAKE
        self.expects_continue = client.expects_continue
        path, _, query = self.url.partition(b"?")
        if not path.startswith(b"/") or b"#" in self.url:
            # absolute-form (RFC 9112 section 3.2.2), `*`, or a fragment, which is ignored
            parsed = httptools.parse_url(self.url)
            path, query = parsed.path or b"/", parsed.query or b""
        self.path, self.query = path, query

    def values(self, field: bytes) -> list[bytes]:
        """Return the values of a header field, by its name in lower case."""
        return [value for _, name, value in self.fields if name == field]

    async def read(self) -> bytes:
        """Return the next piece of the body; empty at its end, and if no answer is needed."""
        client = self.client
        if self.expects_continue and not client.transport.is_closing():
            self.expects_continue = False
            client.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while self.more_body and not (self.body or self.gone or self.answered):
            client.update_reading()
            self.arrived = asyncio.Event()
            await self.arrived.wait()
        if self.gone or self.answered:
            return b""
        piece, self.body = bytes(self.body), b""
        return piece

    def wake_reader(self) -> None:
        if self.arrived:
            self.arrived.set()


class Client(asyncio.Protocol):
    """A client's connection: its requests are parsed, checked, and answered one after the other.

    uvicorn's server creates it, counts it in `connections`, and calls `shutdown`. ASGI is not used
    between client and backend: its cycle and task take a third of the time of a small request."""

    instances: ClassVar[set[Client]] = set()  # all open ones, for close_overdue

    # initial values of a connection
    state = HEAD
    chunked = head_in_read = ending = reading_paused = False
    host = b""  # of the last request
    early = b""  # data received after a handshake
    head_size = framing = 0  # framing: bytes of chunk headers and trailers
    chunks = body_bytes = 0  # of the last read
    head_since = lingers_since = stalled_since = 0.0  # stalled: the client stopped reading

    def __init__(self, *, server_state: Any, **_: Any) -> None:
        self.connections, self.tasks = server_state.connections, server_state.tasks
        self.loop = asyncio.get_running_loop()
        self.parser: Any = self.new_parser()
        self.arriving: Request | None = None  # the request being read, or read last
        self.waiting: collections.deque[Request] = collections.deque()  # not begun yet
        self.request: Request | None = None  # being answered
        self.exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]).encode() if peer else b""
        self.touched = time.monotonic()  # when data were last received, or an answer written
        self.connections.add(self)
        Client.instances.add(self)
        if (open_now := len(Client.instances) + len(TunnelEnd.open)) > TABLE.limits.connections:
            self.reject(open_now)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        Client.instances.discard(self)
        self.happens("close")
        self.parser = None  # the two hold each other
        self.waiting.clear()
        for request in (self.request, self.arriving):
            if request:
                request.gone = True
                request.wake_reader()
        if self.exchange:
            self.exchange.end("client gone")

    def happens(self, event: ClientEvent) -> None:  # frequent events assign `state` in place
        self.state = self.state.after[event]

    def new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # else it fails at data after a request with `connection: close`
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    # -- reading -------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self.touched = time.monotonic()
        state = self.state
        if not state.parses:
            if state is HANDSHAKE:
                self.early += data
            return
        if state is HEAD:
            if not self.head_size:
                self.head_since = self.touched
            self.head_size += len(data)
        elif self.chunked:
            self.chunks, self.body_bytes, self.head_in_read = 0, 0, False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            if self.state is HANDSHAKE:
                self.early = rest
            else:
                head = self.head_without_upgrade()
                self.parser = self.new_parser()
                self.data_received(head + rest)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self.refuse(cause.status if isinstance(cause, BadRequest) else 400)
        else:
            if self.state is not HEAD and self.chunked and not self.head_in_read:
                self.check_framing(len(data))
            elif self.state is HEAD and self.head_size > TABLE.limits.head_bytes:
                self.refuse(431)
        if self.waiting:
            self.begin()
        if self.waiting or self.state is not HEAD:
            self.update_reading()

    def begin(self) -> None:
        """Route the next waiting request, with the part of its body that was received, unless an
        earlier one is being answered or the client does not take earlier answers."""
        if self.state.may_answer and not (self.request or self.stalled_since):
            self.request = self.waiting.popleft()
            self.route(self.request)

    def route(self, request: Request) -> None:  # telemetry.py overrides it
        route(request)

    def refuse(self, status: int) -> None:
        """Answer an invalid request after the earlier answers, and close the connection."""
        arriving = self.arriving
        if self.state is BODY and arriving:
            self.abort_request(arriving, status)
        elif self.state is HEAD and arriving and not arriving.answered:
            arriving.keep_alive = False
            self.happens("bad head")
        else:
            if self.state is HEAD:  # else the request was answered, and its rest is dropped
                METRICS.requests += 1
                if self.send_response(error_response(status)):
                    METRICS.own.answered(b"", status, time.monotonic() - self.touched)
                    if ACCESS_LOG is not None:
                        ACCESS_LOG.refused(status, time.monotonic() - self.head_since)
            self.close()

    def abort_request(self, arriving: Request, status: int) -> None:
        """End a request with an invalid body: the backend must not take it as complete."""
        arriving.gone = True
        arriving.wake_reader()
        alone = len(self.waiting) + (self.request is not None) == 1
        begun = arriving.begun or self.exchange is not None
        if self.exchange and self.exchange.request is arriving:
            self.exchange.end("client gone")
        self.waiting.clear()
        if begun or not alone:
            self.close()
        else:
            response = error_response(status)
            sent = self.send_response(response)
            took = time.monotonic() - self.touched
            self.count_own(arriving, response if sent else None, None, took)
            self.linger("refused")

    def reject(self, open_now: int) -> None:
        """Answer with 503 near the limit of descriptors: each client may need one for a backend."""
        METRICS.rejected += 1
        if open_now > TABLE.limits.connections * 1.05 + 16:  # too few descriptors even for a 503
            self.transport.abort()
            return
        self.send_response(error_response(503, "too many connections"))
        self.linger("refused")

    def check_framing(self, received: int) -> None:
        """Limit a chunked body's chunk headers, extensions and trailers. 16 bytes per chunk are
        allowed, and as many bytes as the body has."""
        extra = received - 2 * self.body_bytes - 16 * self.chunks
        self.framing = max(0, self.framing + extra)
        if self.framing > TABLE.limits.framing_bytes:
            self.refuse(431)

    # called by the parser

    def on_message_begin(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes, bytes]] = []  # name as sent, in lower case, value
        self.expects_continue = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is not HEAD:
            # A trailer. It is dropped, since merged into the headers it could contradict what was
            # checked before, such as the host or the affinity (RFC 9110 section 6.5.1).
            self.framing += len(name) + len(value) + 4
            if self.framing > TABLE.limits.framing_bytes:
                raise BadRequest("trailers too large", 431)
            return
        self.fields.append((name, name.lower(), value))

    def on_chunk_header(self) -> None:
        self.chunks += 1

    def on_headers_complete(self) -> None:
        if self.state is not HEAD:
            return  # after an upload that was answered early
        if self.head_size > TABLE.limits.head_bytes:  # may include data behind the head
            size = sum(len(name) + len(value) + 4 for name, _, value in self.fields)
            if len(self.url) + size > TABLE.limits.head_bytes:
                raise BadRequest("head too large", 431)
        self.head_size, self.framing, self.head_in_read = 0, 0, True
        parser = self.parser
        method, version = parser.get_method(), parser.get_http_version()
        self.check_head(method, version)
        behind = self.request or self.waiting
        if behind and len(self.waiting) >= TABLE.limits.pipelined_requests:
            raise BadRequest("too many requests at once")
        if handshake := parser.should_upgrade():
            protocols = [value.lower() for _, name, value in self.fields if name == b"upgrade"]
            if method != b"GET" or self.has_body or protocols[-1:] != [b"websocket"]:
                return  # no WebSocket (RFC 6455 section 4.1): parsed again as a plain request
            if behind:
                raise BadRequest("a handshake behind a request")
        self.state = self.state.after["handshake" if handshake else "head"]
        last = version == "1.0" or handshake or self.ending  # data behind a handshake: unchecked
        keep_alive = not last and parser.should_keep_alive()
        self.arriving = Request(self, method, version, keep_alive)
        self.waiting.append(self.arriving)

    def check_head(self, method: bytes, version: str) -> None:
        """Refuse heads that allow request smuggling (RFC 9112 sections 3.2, 5 and 6.3). llhttp has
        already refused bare CR and LF, invalid names, and chunked before another coding."""
        if len(self.fields) > TABLE.limits.header_count:
            raise BadRequest("too many headers", 431)
        lengths = hosts = checked = 0
        self.chunked = self.has_body = False
        for _, name, value in self.fields:
            if name not in CHECKED_HEADERS:
                continue
            checked += len(name) + len(value)
            if checked > LONGEST_CHECKED:
                raise BadRequest("headers that must be checked are too large", 431)
            if name == b"host":
                hosts += 1
                if value != self.host and not is_host(value):
                    raise BadRequest("not a host")
                self.host = value
            elif name == b"content-length":
                lengths += 1
                if not value.isdigit():
                    raise BadRequest("content-length is not a number")
                self.has_body = bool(value.strip(b"0"))
            elif name == b"transfer-encoding":
                if self.chunked or value.lower() != b"chunked":
                    raise BadRequest("only one transfer coding, chunked, is understood")
                self.chunked = self.has_body = True
            elif name == b"expect":
                self.expects_continue = value.lower() == b"100-continue"
            elif name == b"connection" or value == self.host:
                continue
            elif not all(is_host(host.strip()) for host in value.split(b",")):
                raise BadRequest("not a host")
        if lengths > 1 or (self.chunked and (lengths or version == "1.0")):
            raise BadRequest("conflicting message lengths, or HTTP/1.0 with a transfer coding")
        if method == b"CONNECT":
            raise BadRequest("this is no forward proxy")
        if version not in ("1.0", "1.1"):  # the parser accepts HTTP/0.9 and HTTP/2.0, too
            raise BadRequest("HTTP/1.0 or HTTP/1.1, please", 505)
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise BadRequest("one host header, please")

    def head_without_upgrade(self) -> bytes:
        """Return the head that was read, without its upgrade. A server may ignore an upgrade (RFC
        9110 section 7.8), but the parser would not read the body."""
        version = self.parser.get_http_version().encode()
        head = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        for name, lower, value in self.fields:
            if lower != b"upgrade":
                head.append(name + b": " + value + b"\r\n")
        return b"".join([*head, b"\r\n"])

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        arriving = self.arriving
        if self.state is BODY and arriving:
            arriving.body = arriving.body or bytearray()  # grows in place, unlike bytes
            arriving.body += body
            arriving.wake_reader()

    def on_message_complete(self) -> None:
        self.head_size = 0
        if self.state is LINGERING:
            self.transport.close()
        elif self.arriving:
            self.arriving.more_body = False
            self.arriving.wake_reader()
        self.state = self.state.after["end"]

    # -- answering -----------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a request that must wait as a task. The server cancels it at the shutdown limit."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.worked)

    def worked(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a request failed in the router itself", exc_info=error)
            self.transport.abort()

    def answer(self, request: Request, response: Response, tried: Deployment | None = None) -> None:
        """Send the router's own answer, or one in place of a deployment that gave none."""
        sent = self.send_response(response, request)
        now = time.monotonic()
        took, self.touched = now - self.touched, now
        if not request.counted:  # else an invalid body was answered
            self.count_own(request, response if sent else None, tried, took)
        self.finish(request)

    def count_own(
        self, request: Request, response: Response | None, tried: Deployment | None, took: float
    ) -> None:
        """Count and log an answer of the router's own; None: its client has gone before it."""
        tally, name = (tried.tally, tried.id) if tried else (METRICS.own, None)
        status, size, request.counted = 0, 0, True
        if response:
            status = response.status_code
            size = 0 if request.method == b"HEAD" else len(response.body)
            tally.answered(request.method, status, took)
        if ACCESS_LOG is not None:
            ended = "complete" if response else "client_gone"
            ACCESS_LOG.answered(request, status, name, size, took, ended)
        if request.span is not None:
            request.span.end(status, name)

    def send_response(self, response: Response, request: Request | None = None) -> bool:
        """Write the router's own answer if the state allows it; without a request the last one.
        Returns whether it was written."""
        if not self.state.may_answer or self.transport.is_closing():
            return False
        status = http.HTTPStatus(response.status_code)
        head = b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode())
        lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        if request is None or request.more_body or not request.keep_alive:
            lines.append(b"connection: close\r\n")
        body = b"" if request and request.method == b"HEAD" else bytes(response.body)
        self.transport.write(b"".join([head, *lines, b"\r\n", body]))
        return True

    def finish(self, request: Request, close: bool = False) -> None:
        """After an answer, begin the next request or close the connection."""
        request.answered, self.request = True, None
        request.wake_reader()
        if not self.state.may_answer:
            return
        if request.more_body:
            self.linger("early")
        elif close or not request.keep_alive:
            self.close()
        elif not self.transport.is_closing():
            if self.waiting:
                self.begin()
            if self.reading_paused:
                self.update_reading()

    def close(self) -> None:
        """Close the connection after its buffer is written."""
        self.happens("close")
        self.transport.close()

    def update_reading(self) -> None:
        """Pause or resume the socket by the state and its requests. One request is parsed ahead of
        its turn; a body is read ahead of the backend by at most `body_ahead_bytes`."""
        state, arriving = self.state, self.arriving
        if state is CLOSED or state is TUNNEL:
            return
        may_read = state.may_read and not self.waiting
        if state is BODY and arriving and len(arriving.body) > TABLE.limits.body_ahead_bytes:
            may_read = False
        if may_read is self.reading_paused:
            self.reading_paused = not may_read
            (self.transport.resume_reading if may_read else self.transport.pause_reading)()

    def pause_writing(self) -> None:
        self.stalled_since = time.monotonic()

    def resume_writing(self) -> None:
        self.stalled_since = 0.0
        if self.exchange and not self.exchange.upstream.transport.is_closing():
            self.exchange.upstream.transport.resume_reading()
        if self.waiting:
            self.begin()
            self.update_reading()

    def shutdown(self) -> None:
        """Close the connection after the answers in progress, since the server ends. An idle one is
        closed after `idle_close_grace_seconds`, since a request may be in transit."""
        self.ending = True
        if self.arriving:
            self.arriving.keep_alive = False
        self.loop.call_later(TABLE.limits.idle_close_grace_seconds, self.close_if_idle)

    def close_if_idle(self) -> None:
        if self.state.may_answer and (self.arriving is None or self.arriving.answered):
            self.close()

    def linger(self, why: ClientEvent) -> None:
        """Read and drop the rest of an upload that was answered early: a close would reset the
        connection, and the client would lose the answer (RFC 9112 section 9.6)."""
        self.happens(why)
        self.touched = self.lingers_since = time.monotonic()
        self.update_reading()
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()  # so that the client sees the end at once

    def check_time(self, now: float) -> None:
        """End the connection's state if its limit of time is over."""
        limits, transport, arriving = TABLE.limits, self.transport, self.arriving
        idle, closing = now - self.touched, transport.is_closing()
        if self.reading_paused and has_hung_up(transport):
            transport.abort()  # nothing else sees it while the connection is not read
            return
        stalled = now - self.stalled_since if self.stalled_since else 0.0
        if self.state in (LINGERING, DROPPING):
            lasted = now - self.lingers_since
            if idle > limits.linger_pause_seconds or lasted > limits.linger_seconds:
                transport.abort()
        elif stalled > (limits.flush_seconds if closing else limits.write_stall_seconds):
            transport.abort()
        elif arriving is None or arriving.answered:
            if self.head_size and self.state is HEAD:
                if now - self.head_since > limits.head_seconds:
                    self.refuse(408)
            elif idle > (limits.keep_alive_seconds if arriving else limits.head_seconds):
                (transport.abort if closing else self.close)()
        elif arriving.more_body and not self.reading_paused and idle > limits.body_stall_seconds:
            transport.abort()
        elif self.exchange:
            self.exchange.check_time()


HANG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)  # the last: Linux


def has_hung_up(transport: asyncio.Transport) -> bool:
    """Has the other side closed its connection? Also where it is not read."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), HANG_UP)
    return any(events & HANG_UP for _, events in poll.poll(0))


async def close_overdue() -> None:
    """Close connections over their limits of time, every second."""
    limits = TABLE.limits
    while True:
        await asyncio.sleep(1.0)
        now = time.monotonic()
        for client in list(Client.instances):
            client.check_time(now)
        for end in list(TunnelEnd.open):
            end.check_time(now, limits)
        for deployment in TABLE.backends:
            pool, oldest = deployment.idle, now - limits.upstream_idle_seconds
            while pool and pool[0].idle_since < oldest:
                pool.popleft().transport.close()


# == A request and its answer ===================================================================


class Exchange:
    """Copies an answer from an upstream to a client, in pieces as they arrive.

    All code runs in the callbacks of the two connections. `then` is called when they are detached.
    A client that reads slowly pauses the upstream, so that memory is bounded."""

    # initial values of an exchange
    state = WAITING
    writable: asyncio.Event | None = None  # for the task that sends the body
    go_ahead: asyncio.Event | None = None
    reason = tail = b""  # tail: data behind a 101
    why = "the deployment closed the connection without an answer"
    status = bytes_out = head_size = 0
    answered_at = heard = 0.0  # times of the answer's head; of the last data, or the end
    chunked = until_close = close = False
    keep = True
    hedge = missed = False  # hedge: a missing asset is not passed on; missed: this is one

    def __init__(self, request: Request, upstream: Upstream, then: Then, began: float) -> None:
        client = self.client = request.client
        self.request, self.upstream, self.then = request, upstream, then
        self.began, self.parser = began, httptools.HttpResponseParser(self)
        self.fields: list[tuple[bytes, bytes]] = []
        self.out: list[bytes] = []
        self.head_only = request.method == b"HEAD"
        self.version_10 = request.version == "1.0"
        upstream.exchange = self
        if client.exchange is None:
            client.exchange = self  # else this is a hedged request; the one with an answer sets it

    # -- from the upstream ---------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        why = ""
        self.heard = time.monotonic()
        if self.state is WAITING:
            self.head_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.request.handshake and self.state is WAITING:
                self.upstream.transport.pause_reading()
                self.tail = data[upgrade.args[0] :]
                self.end("101")
                return
            why = "the backend switched protocols unasked"
        except httptools.HttpParserError:
            why = "the backend's answer is not HTTP"
        if self.state is WAITING and self.missed:
            if self.head_size > TABLE.limits.miss_bytes:  # too much to read for a connection
                self.keep = False
                self.happens("missing")
        elif self.state is WAITING and self.head_size > TABLE.limits.answer_head_bytes:
            why = "the backend's answer has too large a head"
        if why:
            self.broken(why)
        self.flush()

    # called by the parser

    def on_message_begin(self) -> None:
        self.fields = []
        if self.state.finished:
            self.keep = False  # a second answer, without a request

    def on_status(self, status: bytes) -> None:
        self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is WAITING:  # else a trailer
            self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        """The head of an answer is complete: make the client's."""
        if self.state is not WAITING:
            return
        parser, request = self.parser, self.request
        status = self.status = parser.get_status_code()
        reason, self.reason = self.reason, b""
        if status == 101:
            return
        if status < 200:
            self.informational(status, reason)
            return
        if self.hedge:
            self.missed = is_miss(request.path, status, self.fields)
            request.unsure |= status >= 500
            if self.missed or request.begun or request.gone:  # another hedged request was faster
                self.missed, self.keep = True, parser.should_keep_alive()
                if self.head_only:
                    self.happens("missing")
                return
            self.client.exchange = self
        deployment, length, page = self.upstream.deployment, False, False
        named = coding = b""
        out = [b"HTTP/1.1 %d %b\r\n" % (status, reason)]
        append = out.append
        for name, value in self.fields:
            lower = name.lower()
            if lower in ANSWER_HEADERS:
                if lower == b"content-length":
                    length = True
                elif lower == b"content-type":
                    page = is_page(value)
                elif lower != b"x-pulse-selected-deployment":  # hop by hop
                    if lower == b"transfer-encoding":
                        coding += value.lower() + b", "
                    elif lower == b"connection" and value.lower() not in USUAL_CONNECTION:
                        named += b"," + value
                    continue
                elif deployment.header:
                    continue
            append(name + b": " + value + b"\r\n")
        if named:
            out[1:] = without_named(out[1:], named)
        if header := deployment.header:  # else this is the local Railway's edge
            private = deployment.key_hash is not None  # a preview's, for those with its key
            asset = request.path.startswith(ASSET_PREFIXES)
            if asset and lacks_asset(request.path, status, page):
                append(header)  # a version that is down, or not there yet, may have it
                out[:] = with_cache_control(out, b"no-store", ANY)
                private = False
            elif asset and not page:  # the same everywhere
                append(header)
            else:
                append(header + VARY)
                # another one may get another answer
                private = private or request.by_visitor or bool(page and request.visitor)
            if private:
                out[:] = with_cache_control(out, b"private", FOR_SHARED)
            if page:  # affinity.js reads the document's deployment from it
                timing = b'server-timing: pulse;desc="%b"\r\n'
                append(timing % deployment.affinity)
                if request.visitor:
                    append(visitor_cookie(request))
        empty = self.head_only or status in (204, 304)
        inner = coding and coding.removesuffix(b"chunked, ")  # such as gzip: passed on as it is
        self.until_close = not (length or empty or inner != coding)
        self.keep = parser.should_keep_alive() and not self.until_close
        if not (length or empty) or (coding and self.head_only):
            if not self.version_10:
                self.chunked = not empty
                append(b"transfer-encoding: %bchunked\r\n" % inner)
            elif inner:
                raise ValueError  # HTTP/1.0 has no transfer codings: `feed` answers 502
            else:
                self.close = not empty  # only the end of the connection can end this body
        if not request.keep_alive or self.close:
            self.close = True
            append(b"connection: close\r\n")
        append(b"\r\n")
        self.out = out
        self.answered_at = self.heard
        self.state = self.state.after["head"]
        request.begun, request.expects_continue = True, False
        if self.go_ahead:
            self.go_ahead.set()
        if self.head_only:
            self.happens("end")

    def informational(self, status: int, reason: bytes) -> None:
        if status == 100:
            if self.go_ahead:
                self.go_ahead.set()  # `Request.read` sends the client's 100
        elif not (self.version_10 or self.hedge):  # another's answer may be on its way
            head = [b"HTTP/1.1 %d %b\r\n" % (status, reason)]
            head += [n + b": " + v + b"\r\n" for n, v in self.fields if n.lower() not in HOP_BY_HOP]
            self.client.transport.write(b"".join([*head, b"\r\n"]))

    def on_body(self, chunk: bytes) -> None:
        if self.state is not ANSWERING:
            self.keep = self.keep and self.state is WAITING  # a miss, else an answer's surplus
            return
        self.bytes_out += len(chunk)
        if self.chunked:
            self.out += (b"%x\r\n" % len(chunk), chunk, b"\r\n")
        else:
            self.out.append(chunk)

    def on_message_complete(self) -> None:
        if self.missed and self.state is WAITING:
            self.happens("missing")
        if self.state is not ANSWERING:
            return
        if self.chunked:
            self.out.append(b"0\r\n\r\n")  # trailers are dropped
        self.state = self.state.after["end"]

    def flush(self) -> None:
        """Write all output of one read at once."""
        out = self.out
        if out:
            self.out = []
            self.client.transport.write(out[0] if len(out) == 1 else b"".join(out))
            self.client.touched = self.heard
            upstream = self.upstream.transport
            if self.client.stalled_since and not (self.state.finished or upstream.is_closing()):
                upstream.pause_reading()
        if self.state.finished:
            self.return_to_pool()

    def upstream_lost(self, error: Exception | None) -> None:
        if self.state is WAITING:
            lost: ExchangeEvent = "reset" if self.upstream.again else "lost"
            self.end("missing" if self.missed else lost)
        elif self.until_close and error is None:  # a reset may have cut it off
            self.heard = time.monotonic()
            self.on_message_complete()
            self.flush()
        else:
            self.broken("the backend broke its answer off")

    def broken(self, why: str) -> None:
        """End a partial answer so that the client does not take it as complete."""
        self.keep = False
        if self.state is ANSWERING:
            log.warning("%s: %s", self.upstream.deployment.id, why)
            self.upstream.deployment.tally.errors["broken_off"] += 1
            self.flush()
            if self.version_10:  # only a reset distinguishes it from a complete answer
                reset(self.client.transport)
            else:
                self.client.close()
        else:
            self.why = why
        self.end("lost")

    def check_time(self) -> None:
        """End an exchange whose backend does not begin its answer, or falls silent in it."""
        limits = TABLE.limits
        limit = limits.handshake_seconds if self.request.handshake else limits.response_seconds
        if self.state is WAITING and may_leave_canary(self.request, self.upstream.deployment):
            limit = min(limit, limits.canary_seconds)
        since = self.began if self.state is WAITING else self.heard
        if self.state.finished or time.monotonic() - since <= limit:
            return
        if self.state is WAITING:
            self.give_up()
        elif not self.client.stalled_since:  # else the client is slow
            self.broken("the backend fell silent in its answer")

    def give_up(self) -> None:
        if self.state is WAITING:
            self.end("timeout")

    # -- the end -------------------------------------------------------------------------------

    def happens(self, event: ExchangeEvent) -> None:
        self.state = self.state.after[event]

    def end(self, event: ExchangeEvent) -> None:
        """End without a complete answer, unless the exchange has ended already."""
        if not self.state.finished:
            self.happens(event)
            self.heard, self.keep = time.monotonic(), False
            self.return_to_pool()

    def return_to_pool(self) -> None:
        """Detach the two connections. The upstream's returns to the pool or is closed, except in a
        tunnel."""
        upstream, client = self.upstream, self.client
        if upstream.exchange is not self:
            return
        upstream.exchange = None
        if client.exchange is self:
            client.exchange = None
        del self.parser  # the two hold each other
        if self.go_ahead:
            self.go_ahead.set()
        if self.writable:
            self.writable.set()
        sending = self.request.more_body or self.request.body
        deployment = upstream.deployment
        reusable = self.keep and not (sending or upstream.transport.is_closing())
        if reusable and deployment.live and len(deployment.idle) < TABLE.limits.idle_upstreams:
            upstream.idle_since = self.heard
            deployment.idle.append(upstream)
        elif self.state is not SWITCHED:
            upstream.transport.abort()
        self.then(self)

    # -- to the upstream -----------------------------------------------------------------------

    def send(self, head: list[bytes]) -> asyncio.Task[None] | None:
        """Send the request: at once if it is complete, else its body by the returned task."""
        request, write = self.request, self.upstream.transport.write
        chunked = head[-2] == CHUNKED
        if request.more_body or len(request.body) > TABLE.limits.body_ahead_bytes:
            if request.expects_continue:
                self.go_ahead = asyncio.Event()
            self.writable = asyncio.Event()
            self.writable.set()
            write(b"".join(head))
            return self.client.loop.create_task(self.send_body(chunked))
        if request.body:
            body, request.body = bytes(request.body), b""
            head = [*head, b"%x\r\n%b\r\n" % (len(body), body) if chunked else body]
        write(b"".join([*head, b"0\r\n\r\n"] if chunked else head))
        return None

    async def send_body(self, chunked: bool) -> None:
        """Copy the body as it arrives, at the pace of the backend."""
        request, write = self.request, self.upstream.transport.write
        if self.go_ahead:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.go_ahead.wait(), TABLE.limits.continue_seconds)
            if self.state is not WAITING:
                return
        while not self.state.finished and (piece := await request.read()):
            if self.state.finished or self.status >= 400:  # refused: the rest is not wanted
                self.keep = False
                return
            write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if self.writable:
                await self.writable.wait()
        if chunked and not (self.state.finished or request.more_body or request.gone):
            write(b"0\r\n\r\n")


def request_head(request: Request, deployment: Deployment) -> list[bytes]:
    """Return the request's head for the backend: the client's lines, byte for byte and in order,
    without hop-by-hop headers, plus the forwarding headers that the edge has not set."""
    url = request.url
    if not url.startswith(b"/"):  # absolute-form and `*`
        has_query = b"?" in url.partition(b"#")[0]
        if request.method == b"OPTIONS" and re.fullmatch(rb"\w+://[^/?#]*", url):
            url = b"*"  # RFC 9112 section 3.2.4
        else:
            url = request.path + (b"?" + request.query if has_query else b"")
    out = [request.method, b" ", url, b" HTTP/1.1\r\n"]
    seen: dict[bytes, bytes] = {}
    named, coded = b"", False
    for name, lower, value in request.fields:
        if lower in REQUEST_HEADERS:
            if lower in FORWARDED:
                seen[lower] = value  # of repeated ones the last: the edge's
            else:  # hop by hop, or the internal token
                if lower == b"connection" and value.lower() not in USUAL_CONNECTION:
                    named += b"," + value
                elif lower == b"transfer-encoding":
                    coded = True
                if lower != INTERNAL_TOKEN_FIELD or deployment.header:  # an edge passes it on
                    continue
        out.append(name + b": " + value + b"\r\n")
    if named:
        out[4:] = without_named(out[4:], named)
    if b"host" not in seen:  # HTTP/1.0
        out.append(f"host: {deployment.netloc}\r\n".encode())
    elif b"x-forwarded-host" not in seen:
        out.append(b"x-forwarded-host: " + seen[b"host"] + b"\r\n")
    before, visitor = seen.get(b"x-forwarded-for", b""), seen.get(b"x-real-ip", b"")
    if not before and (visitor or request.client.peer):
        out.append(b"x-forwarded-for: " + (visitor or request.client.peer) + b"\r\n")
    elif visitor and before.rpartition(b",")[2].strip() != visitor:  # the client sent it
        out[4:] = [line for line in out[4:] if line[:16].lower() != b"x-forwarded-for:"]
        addresses = b", ".join([*request.values(b"x-forwarded-for"), visitor])
        out.append(b"x-forwarded-for: " + addresses + b"\r\n")
    if b"x-forwarded-proto" not in seen:
        out.append(b"x-forwarded-proto: http\r\n")
    if coded:
        out.append(CHUNKED)
    if request.handshake:
        out.append(b"connection: Upgrade\r\nupgrade: websocket\r\n")
    out.append(b"\r\n")
    return out if request.span is None else request.span.replace_parent(out, deployment.id)


SAFE_TO_REPEAT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))


def repeatable(request: Request) -> bool:
    """May a request be sent again if a pooled connection was dead (RFC 9110 section 9.2.2)?"""
    return request.method in SAFE_TO_REPEAT and not request.has_body


def from_pool(request: Request, deployment: Deployment, now: float) -> Upstream | None:
    """Return the idle connection that was used last, if it has not been idle for too long."""
    pool, limits = deployment.idle, TABLE.limits
    again = repeatable(request)
    max_idle = limits.upstream_idle_seconds if again else limits.unsafe_idle_seconds
    while pool and not request.handshake:
        upstream = pool.pop()
        if now - upstream.idle_since > max_idle:
            pool.append(upstream)
            break
        if not upstream.transport.is_closing():
            upstream.again = again
            return upstream
    return None


async def forward(
    request: Request, target: Deployment, hedge: bool, timeout: float = 0, fresh: bool = False
) -> ExchangeState:
    """Send a request to a deployment, on a pooled connection unless `fresh`, and its answer to the
    client. Returns the outcome. Raises UpstreamError if nothing was sent to the client."""
    limits = TABLE.limits
    share = limits.connections * limits.busy_share  # one that hangs must not stop the others
    if target.busy >= share and len(TABLE.backends) > 1:
        raise UpstreamError(503, "the deployment has too many requests in progress", "busy")
    target.busy += 1
    try:
        upstream = None if fresh else from_pool(request, target, time.monotonic())
        upstream = upstream or await connect(target, timeout or connect_seconds(request, target))
        if request.gone:
            upstream.transport.abort()
            count_gone(request, target)
            if not request.counted:
                took = time.monotonic() - request.received
                request.client.count_own(request, None, target, took)
            return GONE
        exchange = await exchanged(request, upstream, hedge, timeout)
    finally:
        target.busy -= 1
    if exchange.state is RESET:
        return await forward(request, target, hedge, timeout, fresh=True)
    return record_outcome(exchange)


def connect_seconds(request: Request, target: Deployment) -> float:
    """Return how long a connection may take: less if another process could have the request."""
    limits = TABLE.limits
    deployment = target.first
    other = deployment.processes or (deployment is TABLE.active and TABLE.fallback)
    brief = other and not request.affinity_id
    return limits.breaker_connect_seconds if brief else limits.connect_seconds


async def exchanged(request: Request, upstream: Upstream, hedge: bool, timeout: float) -> Exchange:
    """Carry out an exchange. A `timeout` in seconds is for a hedged request."""
    done = asyncio.Event()
    began = time.monotonic() if hedge else request.since
    exchange = Exchange(request, upstream, lambda _: done.set(), began)
    exchange.hedge = hedge
    body_task = exchange.send(request_head(request, upstream.deployment))
    response_timer = request.client.loop.call_later(timeout, exchange.give_up) if timeout else None
    try:
        await done.wait()
    except asyncio.CancelledError:
        exchange.end("client gone")
        raise
    finally:
        if body_task:
            body_task.cancel()
        if response_timer:
            response_timer.cancel()
    return exchange


ENDED = {BROKEN: "broken_off", GONE: "client_gone"}  # in the access log


def record_outcome(exchange: Exchange) -> ExchangeState:
    """Count an ended exchange, and go on as its outcome says. Returns and raises as `forward`."""
    request, deployment, outcome = exchange.request, exchange.upstream.deployment, exchange.state
    took, status, seen = exchange.heard - exchange.began, exchange.status, None
    if outcome is not OK:
        if outcome is LOST:
            raise UpstreamError(502, exchange.why, "lost", sent=True)
        if outcome is TIMED_OUT:
            raise UpstreamError(504, "the deployment did not answer in time", "timeout", sent=True)
        if outcome is MISSING:
            return outcome  # another deployment, or a request to this one, answers
        if outcome is GONE and not exchange.answered_at:
            status = 0  # at most a 1xx has come
    if status:
        tally, first_byte = deployment.tally, took
        tally.answered(request.method, status, took)
        if exchange.answered_at:
            first_byte = exchange.answered_at - exchange.began
            tally.first_byte.add(first_byte)
        if outcome is BROKEN:
            tally.broken[status // 100] += 1
        if TABLE.watch is not None:
            failure = "broken_off" if outcome is BROKEN else "5xx" if status >= 500 else ""
            seen = TABLE.watch.count(request, deployment, failure, first_byte)
    else:
        count_gone(request, deployment)
    if ACCESS_LOG is not None:
        ended = ENDED.get(outcome, "complete")
        took = exchange.heard - (request.received or exchange.began)
        ACCESS_LOG.answered(request, status, deployment.id, exchange.bytes_out, took, ended)
    if request.span is not None:
        request.span.end(status, deployment.id)
    if outcome is OK:
        request.client.finish(request, exchange.close)
    elif outcome is SWITCHED:
        join(request.client, exchange, seen)
    return outcome


def count_gone(request: Request, deployment: Deployment) -> None:
    """Count a client that has left before an answer, if it waited for one for long enough."""
    waited = time.monotonic() - request.client.touched  # since its last byte
    if waited >= TABLE.limits.gave_up_seconds and not request.more_body:
        count_failure(request, deployment, "gave_up", waited)


# == WebSockets: tunnels of bytes ===============================================================


class TunnelEnd(asyncio.Protocol):
    """One end of a tunnel: it writes what it reads to the other end. The tunnel ends when both ends
    have sent EOF, a connection is lost, or only one has sent EOF and the other is silent for
    `half_closed_seconds`. Then buffers are written for at most `flush_seconds`."""

    __slots__ = ("ended", "lost", "opened", "peer", "process", "seen", "since", "transport")
    open: ClassVar[set[TunnelEnd]] = set()  # the clients' ends, until both connections are gone

    def __init__(self, transport: asyncio.Transport, process: Deployment) -> None:
        self.transport, self.process = transport, process
        self.peer: TunnelEnd = self
        self.ended = self.lost = False  # EOF was received; the connection was lost
        self.since = time.monotonic()  # the time of the last data
        self.opened = 0.0  # of a young tunnel's backend's end: monotonic
        self.seen: Seen | None = None

    @property
    def deployment(self) -> str:
        """The deployment's id."""
        return self.process.id

    def data_received(self, data: bytes) -> None:
        self.peer.transport.write(data)
        self.since = time.monotonic()
        if self.peer.opened and ends_with_close(data):
            self.peer.opened = 0.0  # the client leaves: a backend then closes first

    def eof_received(self) -> bool:
        peer = self.peer
        self.ended, self.since = True, time.monotonic()
        if self.opened:
            self.count_if_short()
        if peer.ended or peer.lost or not peer.transport.can_write_eof():
            # No other code closes a connection with both halves ended, and a tunnel would keep its
            # two descriptors.
            peer.transport.close()
            return False  # asyncio closes this one
        if not peer.transport.is_closing():
            peer.transport.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        peer = self.peer
        self.lost = True
        if self.opened:
            self.count_if_short()
        if peer.lost:
            TunnelEnd.open.discard(self)
            TunnelEnd.open.discard(peer)
            METRICS.tunnels_open -= 1
            self.process.sockets -= 1
        elif exc is None:
            peer.since = time.monotonic()
            peer.transport.close()
        else:
            reset(peer.transport)

    def count_if_short(self) -> None:
        """Count a backend's end that closes at once after its 101, before the client has."""
        lasted, self.opened = time.monotonic() - self.opened, 0.0
        if lasted > TABLE.limits.short_tunnel_seconds or self.peer.ended or self.peer.lost:
            return
        if tally := METRICS.tallies.get(self.deployment):
            tally.broken[1] += 1
            tally.errors["short_socket"] += 1
        if self.seen:
            failed, entry = self.seen
            entry[1] += 1
            failed["short_socket"] += 1

    def pause_writing(self) -> None:
        if not self.peer.ended:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.peer.ended and not self.peer.transport.is_closing():
            self.peer.transport.resume_reading()

    @property
    def last_data(self) -> float:
        """The time of the last data in either direction, monotonic."""
        return max(self.since, self.peer.since)

    def check_time(self, now: float, limits: Limits) -> None:
        near, far = self, self.peer
        if far.opened and now - far.opened > limits.short_tunnel_seconds:
            far.opened = 0.0
        limit = limits.flush_seconds if near.lost or far.lost else limits.half_closed_seconds
        ending = near.lost or far.lost or near.ended or far.ended
        if ending and now - near.last_data > limit:
            near.transport.abort()
            far.transport.abort()


CLOSE_TICK = 0.1  # seconds


async def close_tunnels(limits: Limits) -> None:
    """Close all tunnels at shutdown, one by one over `tunnel_drain_seconds`, so that not all tabs
    connect again at once. Each is closed when no data passes; the rest at the end."""
    end = time.monotonic() + min(limits.tunnel_drain_seconds, limits.shutdown_seconds - 1)
    while tunnels := [tunnel for tunnel in TunnelEnd.open if not tunnel.transport.is_closing()]:
        now = time.monotonic()
        quiet = [t for t in tunnels if t.last_data < now - limits.quiet_seconds or now >= end]
        quiet.sort(key=lambda tunnel: tunnel.last_data)
        ticks = max((end - now) / CLOSE_TICK, 1.0)
        for tunnel in quiet[: math.ceil(len(tunnels) / ticks)]:
            tunnel.transport.close()
        await asyncio.sleep(CLOSE_TICK)


def ends_with_close(data: bytes) -> bool:
    """Does what a client has sent end with a Close frame, which is masked (RFC 6455 section 5)?"""
    start = max(len(data) - 131, 0)
    while (start := data.find(b"\x88", start)) >= 0:
        if data[start + 1 : start + 2] == bytes((0x80 | max(len(data) - start - 6, 0) & 0x7F,)):
            return True
        start += 1
    return False


def join(client: Client, exchange: Exchange, seen: Seen | None) -> None:
    """Pass a backend's 101 on, and make the two connections a tunnel."""
    upstream = exchange.upstream
    head = [b"HTTP/1.1 101 Switching Protocols\r\n"]
    head += [n + b": " + v + b"\r\n" for n, v in exchange.fields]
    head += [upstream.deployment.header, b"\r\n", exchange.tail]
    exchange.request.begun = exchange.request.answered = True
    client.connections.discard(client)
    Client.instances.discard(client)
    if client.transport.is_closing() or upstream.transport.is_closing():
        client.close()  # one end was closed meanwhile
        upstream.transport.close()
        return
    client.happens("101")
    process = upstream.deployment
    near, far = TunnelEnd(client.transport, process), TunnelEnd(upstream.transport, process)
    near.peer, far.peer = far, near
    far.opened, far.seen = time.monotonic(), seen
    near.transport.write(b"".join(head))
    if client.early:
        far.transport.write(client.early)
    for end in (near, far):
        end.transport.set_protocol(end)
        end.transport.resume_reading()
    METRICS.tunnels_open += 1
    METRICS.tunnels_opened += 1
    process.tally.tunnels += 1
    process.sockets += 1
    TunnelEnd.open.add(near)


# == Which deployment gets a request ============================================================

AFFINITY_PARAMETER, PREVIEW_PARAMETER = (
    re.compile(b"&" + name.encode() + rb"=([^&]*)") for name in (AFFINITY_QUERY, PREVIEW_QUERY)
)
QUERY_RELOAD = re.compile(rb"(?:^|&)" + RELOAD_QUERY.encode() + rb"=1(?:&|$)")
SUSPECT_PATH = re.compile(rb"_pulse|//|/\.|[%\\;]", re.IGNORECASE)
OWN_HEALTH_PATH = ROUTER_HEALTH_PATH.encode()
_PREFIXES = os.environ.get("PULSE_RAILWAY_ASSET_PREFIXES", "/assets/").encode().split(b",")
ASSET_PREFIXES = tuple(filter(None, _PREFIXES))


LONGEST_AFFINITY = 300  # bytes: what is longer is no id, however it is encoded


def query_field(parameter: re.Pattern[bytes], query: bytes) -> bytes | None:
    """Return the first value of a query's parameter, as it is; None if the query lacks it."""
    match = parameter.search(b"&" + query)
    return match[1] if match else None


def affinity(request: Request) -> bytes:
    """Return the deployment id in a request, from the query or else the header, or nothing."""
    if request.query and (value := query_field(AFFINITY_PARAMETER, request.query)):
        return urllib.parse.unquote_to_bytes(value[:LONGEST_AFFINITY])
    values = request.values(b"x-pulse-deployment")
    return values[0].strip() if values else b""


def without_affinity(url: bytes) -> str | None:
    """Return a URL without the deployment and the preview's key in its query, to redirect to: only
    a path that no browser takes for another host's."""
    path, _, query = url.partition(b"?")
    kept = b"&" + query
    for parameter in (AFFINITY_PARAMETER, PREVIEW_PARAMETER):
        kept = parameter.sub(b"", kept)
    kept = kept[1:]
    if kept == query or not re.fullmatch(rb"/(?![/\\])[\x21-\x7e]*", path) or b"\\" in path:
        return None
    return (path + (b"?" + kept if kept else b"")).decode("latin-1")


def is_internal(raw: bytes) -> bool:
    """Is a path below INTERNAL_PREFIX, in any encoding that a backend could decode?"""
    if not SUSPECT_PATH.search(raw):
        return False
    if len(raw) > 1000 and sum(map(raw.count, (b"%", b"/", b"\\", b";"))) > 1000:  # no app's
        return True  # since normalizing it would take milliseconds
    path = raw.decode("latin-1")
    for _ in range(5):  # servers on the path may decode it more than once
        path, before = urllib.parse.unquote(path), path
        if path == before:
            break
    parts = [part.split(";")[0].strip() for part in path.lower().replace("\\", "/").split("/")]
    path = posixpath.normpath("/".join(["", *parts])).lstrip("/")
    return f"/{path}/".startswith(INTERNAL_PREFIX + "/")


def local_location(value: str, host: str) -> str | None:
    """Return a redirect target if it is on this host. The client sends it in the header
    `x-pulse-client-loader-location`, and an open redirect would help phishing."""
    same_host = rf"(https?://{re.escape(host)}(?![^/?#])|/(?!/))[^\x00-\x20\x7f\\]*"
    return value if host and re.fullmatch(same_host, value, re.IGNORECASE) else None


def route(request: Request) -> None:
    """Forward a request at once if nothing must be waited for, else in a task."""
    METRICS.requests += 1
    client, path, table = request.client, request.path, TABLE
    if path == OWN_HEALTH_PATH:
        client.answer(request, table.health())
        return
    if TRACER is not None:
        TRACER.begin(request)
    if table.copy:
        client.answer(request, error_response(503, table.copy, retry_after="30"))
        return
    if is_internal(path):
        client.answer(request, error_response(404))
        return
    if table.closed and not bypasses_maintenance(request):
        closed = table.closed
        detail, after = "maintenance", closed.retry_after
        client.answer(request, unavailable(request, 503, detail, after, closed.page))
        return
    request.affinity_id = name = affinity(request)
    target = None
    # not `in`: of bytes that takes three times as long
    query = request.query
    if query and query.find(PREVIEW_LINK) >= 0 and (response := follow_preview_link(request)):
        client.answer(request, response)
        return
    if table.previews and (target := preview_of(request)):
        request.affinity_id = target.affinity  # so that no other version stands in for it
    if target is None:
        if name:
            target = table.deployments.get(name) or table.further.get(name)
            if target and target.moving_at is not None and (answer := move(request, target)):
                client.answer(request, answer)
                return
        else:
            target = pick_default(request)
    simple = target and not request.more_body and not may_hedge(request)
    if target and simple and (upstream := from_pool(request, target, client.touched)):
        exchange = Exchange(request, upstream, on_done, client.touched)
        exchange.send(request_head(request, target))
    else:
        request.received = request.since = client.touched
        client.spawn(handle(request, target))


def on_done(exchange: Exchange) -> None:
    """Go on after an exchange that `route` began without a task."""
    request = exchange.request
    if exchange.state is RESET:
        request.received = request.since = exchange.began
        request.client.spawn(handle(request, exchange.upstream.deployment, fresh=True))
        return
    try:
        record_outcome(exchange)
    except UpstreamError as error:
        target = exchange.upstream.deployment
        if other := substitute(request, target, error):
            count_failure(request, target, error.kind)
            request.client.spawn(handle(request, other))
        else:
            answer_for(request, target, error)


# -- previews: reachable with a key only -------------------------------------------------------

PREVIEW_LINK = PREVIEW_QUERY.encode() + b"="
PREVIEW_FIELD = PREVIEW_HEADER.encode()
PREVIEW_KEY = re.compile(rb"([a-z0-9][a-z0-9-]{0,23})\.([A-Za-z0-9_-]{43})")  # <id>.<256 bits>
COOKIE_START = PREVIEW_COOKIE.encode() + b"="
IN_COOKIE = re.compile(rb"(?:^|;) *" + PREVIEW_COOKIE.encode() + rb"=([a-z0-9-]+\.[\w-]+) *(?:;|$)")
NO_HASH = "-" * 64  # of no key


def open_preview(text: bytes) -> Deployment | None:
    """Return the preview that `<id>.<key>` opens. It takes as long for an id that is none."""
    match = PREVIEW_KEY.fullmatch(text)
    if match is None:
        return None
    preview = TABLE.previews.get(match[1])
    expected = (preview.key_hash if preview else None) or NO_HASH
    same = hmac.compare_digest(hashlib.sha256(match[2]).hexdigest(), expected)
    return preview if same else None


def preview_of(request: Request) -> Deployment | None:
    """Return the preview that a request gets: by its key, in the header or else the cookie, or by
    the internal token. A request with affinity gets no other deployment than that one."""
    name = request.affinity_id
    if TABLE.process(name):
        return None
    named = TABLE.processes.get(name)
    if name and is_trusted(request):
        return named
    key = in_cookie = None  # the first of each
    for _, lower, value in request.fields:
        if lower == PREVIEW_FIELD:
            key = value.strip() if key is None else key
        elif lower == b"cookie" and in_cookie is None:
            match = IN_COOKIE.search(value) if value.find(COOKIE_START) >= 0 else None
            in_cookie = match[1] if match else None
    key = in_cookie if key is None else key
    preview = open_preview(key) if key else None
    if preview is None:
        return None
    if name:
        return named if named and named.first is preview else None
    return pick_process(request, preview) if preview.processes else preview


def follow_preview_link(request: Request) -> Response | None:
    """Answer a link with a preview's key: it becomes a cookie, and leaves the address. A link
    without a key ends the preview. A wrong key is answered as an unknown id is. None: no link."""
    key = query_field(PREVIEW_PARAMETER, request.query)
    if key is None:
        return None
    target = without_affinity(request.url)
    opens = open_preview(key) is not None
    if not target or request.method not in (b"GET", b"HEAD") or not (opens or key == b""):
        request.affinity_id = b"-"
        return stale_response(request)
    cookie = f"{PREVIEW_COOKIE}={key.decode()}; Path=/; Secure; HttpOnly; SameSite=Lax"
    headers = {"location": target, "set-cookie": cookie + ("" if opens else "; Max-Age=0")}
    return Response(None, 302, NO_STORE | headers | {"referrer-policy": "no-referrer"})


# -- without affinity: the active deployment, or the canary ------------------------------------


def pick_default(request: Request) -> Deployment | None:
    """Return the deployment of a request without affinity. During a canary the visitor's id
    decides, in all routers alike: a page, its assets, `fetch` calls and socket get the same."""
    table, target = TABLE, TABLE.active
    if table.canary is not None:
        request.by_visitor = True
        if in_canary_bucket(visitor_of(request), table.canary.id, table.weight):
            target = table.canary
    if target is not None and target is table.down and may_use_fallback(request):
        count_failure(request, target, "refused")
        target = table.fallback
    return pick_process(request, target) if target and target.processes else target


def pick_process(request: Request, deployment: Deployment) -> Deployment:
    """Return the process of a request without affinity: its visitor's, so that a page, its assets
    and the next tab of a browser get the same. A browser's first page draws two ids at random, and
    gets the one whose process has fewer sockets (the power of two choices): a hash of address and
    user agent would put an office on one process."""
    visitor = request.visitor or visitor_of(request)
    if not request.visitor or request.balanced:
        return process_of(visitor, deployment)
    request.balanced = True
    ids = [draw_visitor(deployment, visitor) for _ in range(2)]
    drawn = [(process_of(new, deployment), new) for new in ids]
    process, request.visitor = min(drawn, key=lambda pair: pair[0].sockets)
    return process


def process_of(visitor: bytes, deployment: Deployment) -> Deployment:
    """Return a visitor's process, by rendezvous hashing: if it has refused a connection lately, the
    one with the next highest hash."""
    processes = deployment.processes
    process = processes[highest_hash(visitor, deployment.affinity, len(processes))]
    if process.refused_until:  # 0 for most
        now = time.monotonic()
        accepting = [k for k, p in enumerate(processes) if p.refused_until <= now]
        if accepting:
            process = processes[
                max(accepting, key=partial(process_hash, visitor, deployment.affinity))
            ]
    return process


@lru_cache(4096)  # a page is followed by its assets
def highest_hash(visitor: bytes, name: bytes, count: int) -> int:
    return max(range(count), key=partial(process_hash, visitor, name))


def process_hash(visitor: bytes, name: bytes, index: int) -> bytes:
    return hashlib.blake2b(visitor, digest_size=8, key=b"%b.%d" % (name, index)).digest()


DRAWS = 1000  # of ids, until one is in the wanted part of a canary


def draw_visitor(deployment: Deployment, visitor: bytes) -> bytes:
    """Return a random id for a visitor's cookie. In a canary it is one that is drawn to the same
    deployment as `visitor`, the id by address and user agent."""
    canary, weight = TABLE.canary, TABLE.weight
    for _ in range(DRAWS):
        new = secrets.token_hex(8).encode()
        if canary is None or in_canary_bucket(new, canary.id, weight) is (deployment is canary):
            return new
    return visitor


def may_use_fallback(request: Request) -> bool:
    """May another version answer for the active one? Not if the request asks about that one."""
    about_active = bypasses_maintenance(request) or request.path == META_PATH.encode()
    return TABLE.fallback is not None and not about_active


def count_failure(request: Request, deployment: Deployment, kind: str, took: float = 0.0) -> None:
    """Count a request that got no answer of this deployment's: of another one's, or none."""
    deployment.tally.failed += 1
    deployment.tally.errors[kind] += 1
    if TABLE.watch is not None and kind != "own":
        TABLE.watch.count(request, deployment, kind, took)


def in_canary_bucket(visitor: bytes, deployment_id: str, weight: float) -> bool:
    """Is a visitor among the `weight` percent with the canary? It stays so at larger weights."""
    digest = hashlib.blake2b(visitor, digest_size=8, key=deployment_id.encode()).digest()
    return int.from_bytes(digest) < weight / 100 * (1 << 64)


VISITOR = re.compile(rb"(?:^|;) *" + VISITOR_COOKIE.encode() + rb"=([0-9a-f]{16})(?:;|$)")


def visitor_of(request: Request) -> bytes:
    """Return a visitor's id, from our cookie, or else from client address and user agent: it is the
    new cookie's. An app's session cookie would come too late for the first page's assets."""
    agent = b""
    for _, name, value in request.fields:
        if name == b"cookie":
            if match := VISITOR.search(value):
                return match[1]
        elif name == b"user-agent":
            agent = value
    visitor = visitor_hash(client_address(request) + b"\n" + agent)
    if navigates(request):  # not another site's POST, which comes without the cookie (SameSite)
        request.visitor = visitor
    return visitor


@lru_cache(1024)  # as for `network_of`
def visitor_hash(client: bytes) -> bytes:
    return hashlib.blake2b(client, digest_size=8).hexdigest().encode()


def client_address(request: Request) -> bytes:
    """Return a client's address, as Railway's edge or another proxy gives it."""
    address = forwarded = b""
    for _, name, value in request.fields:
        if name == b"x-real-ip":  # set by Railway's edge
            address = value
        elif name == b"x-forwarded-for":
            forwarded = value.partition(b",")[0].strip()
    return address or forwarded or request.client.peer


def navigates(request: Request) -> bool:
    """Does a person open a page with a request that may be repeated?"""
    return request.method in (b"GET", b"HEAD") and wants_page(request)


def wants_page(request: Request) -> bool:
    """Is the answer shown as a page (Fetch Metadata, or else `Accept`)?"""
    if request.handshake:
        return False
    mode, accepts = None, False
    for _, name, value in request.fields:  # one loop: a visitor's id needs this of every request
        if name == b"sec-fetch-mode":
            mode = value if mode is None else b""  # given twice, it says nothing
        elif name == b"accept" and b"text/html" in value:
            accepts = True
    return accepts if mode is None else mode == b"navigate"


def visitor_cookie(request: Request) -> bytes:
    """Return the header line of a visitor's cookie; only for a page, which caches do not share."""
    schemes = [value.strip().lower() for value in request.values(b"x-forwarded-proto")]
    secure = b"; Secure" if b"https" in schemes else b""
    cookie = b"set-cookie: %b=%b; Path=/; Max-Age=2592000; HttpOnly; SameSite=Lax%b\r\n"
    return cookie % (VISITOR_COOKIE.encode(), request.visitor, secure)


def is_page(media_type: bytes) -> bool:
    return media_type[:9].lower() == b"text/html"


# -- maintenance -------------------------------------------------------------------------------

PAGE = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<title>{0}</title><style>body{{font:18px system-ui;margin:20vh auto;max-width:32em;"
    "padding:0 1em;text-align:center}}</style><h1>{0}</h1><p>{1}"
)
BACK_SOON = PAGE.format("Back soon", "We are working on it. This page tries again by itself.")
NOT_SENT = PAGE.format(
    "Not sent",
    "This page is of an earlier version. Go back, copy what you entered, and load the page again.",
)
INTERNAL_TOKEN = os.environ.get("PULSE_RAILWAY_INTERNAL_TOKEN", "").encode()
FALLBACK = os.environ.get("PULSE_RAILWAY_ROUTER_FALLBACK", "on") != "off"


def unavailable(
    request: Request, status: int, detail: str, retry_after: int = 5, page: str | None = None
) -> Response:
    """Return the answer while nothing can be served, for people a page that tries again."""
    if not navigates(request):
        return error_response(status, detail, retry_after=str(retry_after))
    again = f"<meta http-equiv=refresh content={retry_after}>{BACK_SOON}"
    headers = NO_STORE | {"retry-after": str(retry_after)}
    text = (page or again).encode(errors="replace")
    return Response(text, status, headers, "text/html; charset=utf-8")


def bypasses_maintenance(request: Request) -> bool:
    """Does a request reach the app during maintenance? The health check does, and a request with
    the internal token, by which `deploy` checks a new version."""
    return is_trusted(request) or request.path == HEALTH_PATH.encode()


def is_trusted(request: Request) -> bool:
    """Has a request the internal token?"""
    tokens = request.values(INTERNAL_TOKEN_FIELD)
    return bool(INTERNAL_TOKEN) and any(hmac.compare_digest(v, INTERNAL_TOKEN) for v in tokens)


# -- requests that must wait -------------------------------------------------------------------


async def handle(request: Request, target: Deployment | None, *, fresh: bool = False) -> None:
    """Answer a request that must wait for a lookup, a connection or other deployments."""
    if target is None and request.affinity_id:
        target = await TABLE.find(request.affinity_id) or preview_of(request)
    reloads = request.handshake and QUERY_RELOAD.search(request.query)
    if target is None and reloads and not TABLE.provisional:  # no stale answers without a state
        METRICS.stale += 1
        target = TABLE.active  # it tells the tab to reload
    if target is None:
        request.client.answer(request, stale_response(request))
        return
    failed: list[tuple[Deployment, UpstreamError]] = []
    other: Deployment | None = target
    while other:
        try:
            await answer_by(request, other, fresh)
            break
        except UpstreamError as error:
            before, other, fresh = other, substitute(request, other, error), False
            if other and other.first is before.first:  # the deployment may still answer
                before.tally.errors[error.kind] += 1
            else:
                failed.append((before, error))
            request.since = time.monotonic()
    else:  # the error of the last one that the request was meant for
        meant = [item for item in failed if item[0].first is not TABLE.fallback]
        if not meant and TABLE.active and not request.affinity_id:  # counted by pick_default
            refused = UpstreamError(502, NO_CONNECTION, "refused")
            request.client.answer(request, unavailable_by(request, TABLE.active, refused))
        else:
            blamed = (meant or failed)[-1]
            failed.remove(blamed)
            answer_for(request, *blamed)
    for deployment, lost in failed:
        count_failure(request, deployment, lost.kind)


def substitute(request: Request, target: Deployment, error: UpstreamError) -> Deployment | None:
    """Return what answers in place of a process that failed, if anything: another process of the
    same deployment, the active deployment for the canary, the fallback for an active one that
    cannot be connected to."""
    active, deployment = TABLE.active, target.first
    if request.affinity_id or request.begun:
        return None
    unreachable = error.kind in ("refused", "connect_timeout")
    if unreachable and deployment.processes:
        now = time.monotonic()
        if target.refused_until <= now:
            log.warning("%s cannot be connected to", target.affinity.decode())
        target.refused_until = now + TABLE.limits.instance_pause_seconds
        request.tried += 1
        # their host is the same: one that is silent seldom leaves the others reachable
        at_most = len(deployment.processes) if error.kind == "refused" else 2
        if request.tried < at_most and any(p.refused_until <= now for p in deployment.processes):
            return pick_process(request, deployment)
    if deployment is TABLE.fallback:
        return None
    other: Deployment | None = None
    if deployment is not active:
        again = error.kind in ("lost", "timeout") and repeatable(request)
        other = active if again or not error.sent else None
    elif unreachable and may_use_fallback(request):
        TABLE.give_up(deployment)
        other = TABLE.fallback
    return pick_process(request, other) if other and other.processes else other


def may_leave_canary(request: Request, target: Deployment) -> bool:
    """May the active deployment answer a new visitor whom the canary leaves without an answer?"""
    drawn = target.first is TABLE.canary and not request.affinity_id
    return drawn and TABLE.active is not None and repeatable(request)


async def answer_by(request: Request, target: Deployment, fresh: bool = False) -> None:
    """Answer from a deployment; a missing asset from others. Raises as `forward`."""
    if not may_hedge(request) or TABLE.absent.get(request.url, 0.0) > time.monotonic():
        await forward(request, target, hedge=False, fresh=fresh)
        return
    try:
        outcome = await forward(request, target, hedge=True, fresh=fresh)
    except UpstreamError as error:
        if not await fetch_from_others(request, target):
            raise
        count_failure(request, target, error.kind)
        return
    if outcome is MISSING:
        failed = request.unsure  # the answer was a 5xx
        if not await fetch_from_others(request, target):
            await forward(request, target, hedge=False)
        elif failed:
            count_failure(request, target, "5xx")


def answer_for(request: Request, target: Deployment, error: UpstreamError) -> None:
    """Answer with 502 or 504 in place of a backend."""
    METRICS.errors += 1
    target.tally.errors[error.kind] += 1
    if TABLE.watch is not None and error.kind != "own":
        took = time.monotonic() - request.client.touched
        TABLE.watch.count(request, target, error.kind, took)
    request.client.answer(request, unavailable_by(request, target, error), target)


def unavailable_by(request: Request, target: Deployment, error: UpstreamError) -> Response:
    response = unavailable(request, error.status, error.detail)
    response.raw_headers.append((SELECTED_HEADER.encode(), target.id.encode()))
    return response


def may_hedge(request: Request) -> bool:
    """May other deployments answer a request if the chosen one lacks the asset?"""
    if request.affinity_id or len(TABLE.deployments) < 2:
        return False
    if request.method not in (b"GET", b"HEAD") or request.has_body:
        return False
    return request.path.startswith(ASSET_PREFIXES) or request.path.endswith(DISCOVERY_PATH)


async def fetch_from_others(request: Request, first: Deployment) -> bool:
    """Get an asset that `first` lacks from another deployment, and return whether one has it. Those
    that are ejected are asked last, if they answer again."""
    path, table = request.url, TABLE
    if await ask_others(request, table.others(first, path)):
        return True
    now = time.monotonic()
    entries = (d for d in table.deployments.values() if d is not first.first)
    ejected = [d for d in entries if d.ejected_until > now]
    back = await asyncio.gather(*map(table.readmit, ejected))
    returned = [other for other, answers in zip(ejected, back, strict=True) if answers]
    if returned and await ask_others(request, returned):
        return True
    if not request.unsure and len(returned) == len(ejected) and not request.gone:
        table.cache_absent(path)
    return request.gone


async def ask_others(request: Request, others: list[Deployment]) -> bool:
    """Send hedged requests: to the next deployment when one lacks the asset, or after
    `hedge_delay_seconds`, `hedges` at once. The first that has it answers. Returns if one has."""
    loop, limits, waiting = request.client.loop, TABLE.limits, collections.deque(others)
    asking: dict[asyncio.Task[ExchangeState], Deployment] = {}
    try:
        while asking or (waiting and not request.gone):
            if waiting and not request.begun and len(asking) < limits.hedges:
                other = waiting.popleft()
                hedged = forward(request, other, True, limits.hedge_timeout_seconds)
                asking[loop.create_task(hedged)] = other
            pause, when = limits.hedge_delay_seconds if waiting else None, asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait(asking, timeout=pause, return_when=when)
            for task in done:
                other = asking.pop(task)
                try:
                    if task.result() is not MISSING:
                        TABLE.cache_asset_location(request.url, other)
                        return True
                except UpstreamError:  # down or frozen: other assets of a page must not wait
                    request.unsure = True
                    other.ejected_until = time.monotonic() + limits.ejection_seconds
        return False
    finally:
        for task in asking:
            task.cancel()


CLIENT_LOADER_FIELD = CLIENT_LOADER_HEADER.encode()
MOVE_FIELD = MOVE_PATH.encode()
IDLE_PARAMETER = re.compile(rb"&idle=([0-9]{1,9})(?:&|$)")
IDLE_MOVE_PAUSE = 0.2  # seconds between two tabs that load their page anew


def move(request: Request, target: Deployment) -> Response | None:
    """Return the answer that moves a tab over from a deployment whose tabs move; None for a request
    that goes to the deployment."""
    table = TABLE
    # not onto a fallback, which may be this very deployment
    if table.active in (None, target.first, table.down) or table.provisional:
        return None
    if time.time() < (target.moving_at or 0.0):
        return None
    if request.path == MOVE_FIELD and target.move_idle is not None:
        return JSONResponse({"move": moves_idle(request, target)}, 200, headers=NO_STORE)
    return stale_response(request, target) if moves_over(request, target) else None


def moves_idle(request: Request, target: Deployment) -> bool:
    """Does a tab go over that asks so, since nobody uses it (affinity.js)? Not all at once, which
    would be more than the active deployment can render."""
    idle, now, tally = query_field(IDLE_PARAMETER, request.query), time.monotonic(), target.tally
    if idle is None or int(idle) < (target.move_idle or 0.0):
        return False
    if now - tally.idle_move_at < IDLE_MOVE_PAUSE:
        return False  # it asks again
    tally.idle_move_at = now
    tally.moved_idle += 1
    return True


def moves_over(request: Request, target: Deployment) -> bool:
    """Does a tab go over to the active deployment with this request?

    It does when its user goes to another page: Pulse's client loader then asks for that page from
    the open one, which the browser names in `Referer` (RFC 9110 section 10.1.3). While the path
    stays the same, as for a state in the query, the page is in use.
    """
    if request.values(CLIENT_LOADER_FIELD) != [b"1"]:
        return False
    headers = lower_headers(request)
    location = headers.get(CLIENT_LOADER_LOCATION_HEADER)
    if location is None:  # of a Pulse that takes the stale answer
        return True
    host, page = host_of(headers), headers.get("referer") or ""
    if not local_location(location, host) or not local_location(page, host):
        return False
    return path_of(location) != path_of(page)


def path_of(url: str) -> str:
    """Return the path of a URL that `local_location` takes, without a slash at its end."""
    return re.sub(r"(?i)^https?://[^/?#]*|[?#].*", "", url).rstrip("/")


def lower_headers(request: Request) -> Headers:
    return Headers(raw=[(lower, value) for _, lower, value in request.fields])


def host_of(headers: Headers) -> str:
    """Return the host that the browser asked for."""
    return headers.get("x-forwarded-host") or headers.get("host") or ""


def stale_response(request: Request, moves_from: Deployment | None = None) -> Response:
    """Return the answer to a request whose deployment is not known, or from which it moves over."""
    if not TABLE.loaded or TABLE.empty or TABLE.provisional:
        why = "nothing is deployed, or the routing state is lost"
        why = why if TABLE.loaded else "not loaded yet"
        return unavailable(request, 503, why, 1)
    if not request.affinity_id or TABLE.active is None:
        return error_response(404, "deployment not found")
    if moves_from:
        moves_from.tally.moved += 1
    else:
        METRICS.stale += 1
    if navigates(request) and (target := without_affinity(request.url)):
        return Response(None, 302, NO_STORE | {"location": target})
    headers = lower_headers(request)
    location = headers.get(CLIENT_LOADER_LOCATION_HEADER)
    if headers.get(CLIENT_LOADER_HEADER) == "1" and location:
        target = local_location(location, host_of(headers))
        if target:
            return Response(None, 302, NO_STORE | {"location": target})
    answer = NO_STORE | {STALE_HEADER: "1", "vary": AFFINITY_HEADER}
    if origin := headers.get("origin"):
        answer["access-control-allow-origin"] = origin
        answer["access-control-expose-headers"] = STALE_HEADER
        answer["vary"] = f"Origin, {AFFINITY_HEADER}"
        if origin.partition("://")[2] in (headers.get("host"), headers.get("x-forwarded-host")):
            answer["access-control-allow-credentials"] = "true"
    methods = headers.get("access-control-request-method")
    if request.method == b"OPTIONS" and methods:
        answer["access-control-allow-methods"] = methods
        if names := headers.get("access-control-request-headers"):
            answer["access-control-allow-headers"] = names
        return Response(status_code=204, headers=answer)
    if wants_page(request) and not navigates(request):  # a form
        return Response(NOT_SENT, 409, answer, "text/html; charset=utf-8")
    return JSONResponse({"detail": "stale affinity"}, 409, headers=answer)


DISCOVERY_PATH = b"/__manifest"  # React Router's request for a build's routes


def is_miss(path: bytes, status: int, fields: list[tuple[bytes, bytes]]) -> bool:
    """Does an answer mean that the deployment lacks the asset or the routes? For an asset: a 404,
    or a page in place of a file, as from an app with a catch-all route. For routes: a 204 with a
    reload header, as from another build. For both: a 5xx."""
    if status >= 500:
        return True
    if not path.startswith(ASSET_PREFIXES):
        return status == 204 and any(n.lower() == b"x-remix-reload-document" for n, _ in fields)
    page = any(name.lower() == b"content-type" and is_page(value) for name, value in fields)
    return lacks_asset(path, status, page)


def lacks_asset(path: bytes, status: int, page: bool) -> bool:
    """Does an answer for an asset say that there is none, or is it a page in place of a file?"""
    return status == 404 or (page and status == 200 and not path.endswith((b".html", b".htm")))


# == Serving ====================================================================================


async def supervise(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Restart a background task when it ends. After `restarts` in `restart_seconds` (Limits) the
    process shuts down with status 1."""
    limits = TABLE.limits
    ends: collections.deque[float] = collections.deque(maxlen=limits.restarts)
    while True:
        why = "it returned"
        try:
            await work()
        except Exception as error:
            # Not its message, which can have a secret: a Redis error's has the URL.
            frames = "".join(traceback.format_tb(error.__traceback__))
            why = f"{type(error).__name__}\n{frames}"
        log.error("the task `%s` has ended, and starts again: %s", name, why)
        ends.append(time.monotonic())
        if len(ends) == limits.restarts and ends[-1] - ends[0] < limits.restart_seconds:
            log.critical("the task `%s` cannot be kept running: this router ends", name)
            app.state.failed = app.state.server.should_exit = True
            return
        await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    host = os.environ.get("RAILWAY_REPLICA_ID") or socket.gethostname()
    METRICS.name = f"{host}-{secrets.token_hex(3)}"  # new at each start, as are the counts
    store = store_from_env(os.environ, TABLE.limits)
    work = {
        "routing state": partial(TABLE.follow, store),
        "without state": TABLE.serve_without_state,
        "active deployment": TABLE.watch_active,
        "timeouts": close_overdue,
        **app.state.telemetry,
    }
    if TABLE.copy:  # the store may belong to another environment
        del work["routing state"], work["without state"]
        log.error(TABLE.copy)
        TABLE.changed.set()
    tasks = [asyncio.create_task(supervise(*item)) for item in work.items()]
    try:
        with contextlib.suppress(TimeoutError):  # connections wait in the backlog meanwhile
            await asyncio.wait_for(TABLE.changed.wait(), TABLE.limits.start_seconds)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for end in list(TunnelEnd.open):
            end.transport.close()


app = Starlette(lifespan=lifespan)
app.state.telemetry = {}  # telemetry's background tasks


def listen(host: str | None, port: int) -> socket.socket:
    """Return a listening socket; without a host, on IPv4 and IPv6. Raises SystemExit."""
    create = partial(socket.create_server, backlog=2048)
    if not host and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError, OverflowError):
            return create(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    try:
        return create((host or "", port), family=family)
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else "no such port"
        raise SystemExit(f"port {port} cannot be listened on: {why}") from None


class Server(uvicorn.Server):
    """uvicorn's server, with a shutdown that closes tunnels, too."""

    async def _wait_tasks_to_complete(self) -> None:
        await asyncio.gather(self._wait_for_requests(), close_tunnels(TABLE.limits))

    async def _wait_for_requests(self) -> None:
        while (self.server_state.connections or self.server_state.tasks) and not self.force_exit:
            await asyncio.sleep(0.05)


def serve(limits: Limits) -> None:
    global ACCESS_LOG, RESOLVER, TABLE, TRACER
    port = number_from_env("PORT", DEFAULT_PORT, int)
    store_from_env(os.environ)  # raises for a missing variable before the port is opened
    configured = number_from_env("PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT", None, int)
    limits = replace(limits, connections=client_limit(configured, limits))
    RESOLVER, TABLE = Resolver(limits), Table(os.environ, limits)
    if os.environ.get("PULSE_RAILWAY_ROUTER_WORKERS"):
        log.warning("PULSE_RAILWAY_ROUTER_WORKERS has no effect: give the service replicas")
    sock = listen(os.environ.get("HOST"), port)
    # An invalid variable of telemetry is logged in one line.
    if any(value and name.startswith(TELEMETRY) for name, value in os.environ.items()):
        import telemetry

        ACCESS_LOG, TRACER, app.state.telemetry = telemetry.start(os.environ)
    config = uvicorn.Config(app, http=Client, ws="none", loop="uvloop", log_level="warning")
    config.lifespan, config.timeout_graceful_shutdown = "on", int(limits.shutdown_seconds)
    app.state.failed, app.state.server = False, Server(config)
    app.state.server.run(sockets=[sock])
    if app.state.failed:
        raise SystemExit(1)


# == The app's internal endpoints: for the metrics, the control commands and the janitor ========


def connection_to(record: Record, limits: Limits = DEFAULT_LIMITS) -> http.client.HTTPConnection:
    """Return an HTTP connection. Raises ValueError for a record without an address."""
    url = urllib.parse.urlsplit(record.url or "")
    if not url.hostname:
        raise ValueError
    return http.client.HTTPConnection(url.hostname, url.port or 80, timeout=limits.backend_seconds)


def look(record: Record, limits: Limits = DEFAULT_LIMITS) -> str:
    """Return what is at a deployment's address: `answers`, `other` (another deployment answers),
    `silent` (it accepts connections only), `unreachable` (no such name, or no connection)."""
    try:
        connection = connection_to(record, limits)
        connection.connect()
    except (OSError, ValueError):
        return "unreachable"
    with contextlib.closing(connection):
        try:
            connection.request("GET", META_PATH)
            body = connection.getresponse().read(limits.answer_head_bytes)
        except (OSError, http.client.HTTPException):
            return "silent"
    deployment_id = (or_none(json_object, body) or {}).get("deployment_id")
    return "answers" if deployment_id in (None, record.deployment_id) else "other"


SCRIPTS = (
    "router.py control.py janitor.py telemetry.py tracing.py sqlite_store.py ownership.py".split()
)


@cache
def runtime_version() -> str:
    """Return this version with a digest of the image's files, as `ensure` notes it."""
    folder, digest = os.path.dirname(os.path.realpath(__file__)), hashlib.sha256()
    try:
        for name in ("Dockerfile.router", *SCRIPTS, "runtime.lock"):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(file.read())
    except OSError:
        return VERSION
    return f"{VERSION}+{digest.hexdigest()[:12]}"


def main(argv: list[str], limits: Limits | None = None) -> int:
    """Serve until a signal ends the process. `limits` replace those of the environment."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    serve(limits or Limits.from_env(os.environ))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
