#!/usr/bin/env python3
# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "httptools>=0.6.4",
#   "redis>=6.4",
#   "starlette>=0.50",
#   "uvicorn>=0.35,<1",
#   "uvloop>=0.21; sys_platform != 'win32'",
# ]
# ///
"""The router: every request of a Pulse app goes through this file.

    python router.py                     serve on HOST (default: IPv4 and IPv6) and PORT (8000)
    python router.py control <command>   the same as `python control.py <command>`
    python router.py janitor run         the same as `python janitor.py`

How a request travels: `Client` parses and polices its head; `route` picks a deployment out of the
in-memory `Table`; an `Exchange` copies the answer from a pooled `Upstream` connection to the
client's, in the callbacks of the two, without a task. Where something has to be waited for, a
connection or a deployment nobody knows yet, `handle` is the task that does. A WebSocket handshake
goes the same way; once the backend has answered 101, `join` makes the two connections a tunnel of
bytes. uvicorn has the server, its life span and its signals, Starlette the router's own answers.

The file needs nothing but itself and the libraries named above, so that its image, `uv run` and a
laptop run the same. It is long because it is two programs that share the routing state, the proxy
and the control commands, and because ASGI's events cannot carry what a proxy must keep (header
case, reason phrases, 1xx, framing, a connection broken off), so it speaks HTTP/1.1 by itself.
From top to bottom: names and limits; routing state and stores; table; counters; backend's side;
client's side; one request and its answer; tunnels; which deployment; access log; what is exported;
serving; control commands. docs/architecture.md says who may write to what, and who closes it.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # a container's first process is deaf to what it has no handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until there is something to finish

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import hmac
import http
import http.client
import ipaddress
import itertools
import json
import logging
import re
import resource
import secrets
import socket
import sqlite3
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import httptools
import redis
import redis.asyncio
import redis.backoff
import redis.retry
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response


def seconds(variable: str, default: float, env: Mapping[str, str] = os.environ) -> float:
    """A variable that holds seconds. Raises SystemExit for anything else."""
    text = env.get(variable)
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise SystemExit(f"{variable} takes a number of seconds, not {text!r}")
    return value


# ---------------------------------------------------------------------------------------------
# Names shared with pulse_railway/contract.py; a test holds the two together.

AFFINITY_QUERY = "pulse_deployment"
AFFINITY_HEADER = "x-pulse-deployment"
SELECTED_HEADER = "x-pulse-selected-deployment"
CLIENT_LOADER_HEADER = "x-pulse-client-loader"
CLIENT_LOADER_LOCATION_HEADER = "x-pulse-client-loader-location"
RELOAD_QUERY = "pulse_reload_on_stale_affinity"
STALE_HEADER = "x-pulse-stale-affinity"
INTERNAL_PREFIX = "/_pulse/internal"
SESSIONS_PATH = "/_pulse/internal/railway/sessions"
RELOAD_PATH = "/_pulse/internal/railway/reload"
INTERNAL_TOKEN_HEADER = "x-pulse-railway-internal-token"
HEALTH_PATH = "/_pulse/health"
VISITOR_COOKIE = "pulse_railway_visitor"
REQUEST_ID = b"x-railway-request-id"  # set by Railway's edge
ROUTER_HEALTH_PATH = "/healthz"
DEFAULT_PORT = 8000
DEFAULT_REDIS_PREFIX = "pulse:railway"
DEPLOYMENT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
INTENT_VARIABLE = "PULSE_RAILWAY_ACTIVE"  # on Railway: which deployment was promoted last
RAILWAY_RUNTIME = ("RAILWAY_SERVICE_ID", "RAILWAY_REPLICA_ID", "RAILWAY_PRIVATE_DOMAIN")

# Limits, in seconds and bytes. The edge's own: a 32 KB head, 15 minutes a request, 60 s idle.
HEAD_LIMIT = 64 * 1024
HEADER_COUNT_LIMIT = 512
FRAMING_LIMIT = 16 * 1024  # chunk extensions and trailers of one request, beyond 16 bytes a chunk
PIPELINE_LIMIT = 64  # requests on one connection that wait for the answers before theirs
ANSWER_HEAD_LIMIT = 256 * 1024  # of a backend
WRITE_STALL_TIMEOUT = 300.0  # a client takes the next piece of its answer within this
HEAD_TIMEOUT = 30.0  # a client sends its request head within this
BODY_AHEAD = 64 * 1024  # of a body is read before the backend has taken what came before it
BODY_STALL_TIMEOUT = 60.0  # ... and the next piece of its body within this
LAST_CALL = 0.5  # at the end, a request may be on its way on a connection that looks idle
KEEP_ALIVE = 75.0  # idle client connections; longer than the edge's 60 s, so the edge closes first
HALF_CLOSED = seconds("PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS", 60)
FLUSH = 30.0  # for what is still to be written to a tunnel's one end when the other has gone
LINGER = 5.0  # after an early answer, an upload is read and dropped until it pauses for this long
LINGER_AT_MOST = 30.0
CONNECT_TIMEOUT = 5.0
DESCRIPTORS_KEPT = 64  # for the store, the listening socket, files
HANDSHAKE_TIMEOUT = 30.0  # for a backend's answer to a WebSocket handshake
SPARE_TIMEOUT = 1.5  # for another deployment to say whether it has what the one asked lacks
SPARE_PAUSE = 0.2  # then the next one is asked beside it
UNWELL_SECONDS = 30.0  # one that did not say is not asked again for so long
HAD_SECONDS = 300.0  # who had an asset is remembered for
HAD_AT_MOST = 2000  # assets ...
HAD_PATH = 512  # ... with paths of at most so many bytes
RESOLVED_SECONDS = 5.0  # an address is remembered for
RESOLVERS = 64  # names that can be looked up at once; a bad one may take many seconds
RESPONSE_TIMEOUT = seconds("PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT", 900)
UPSTREAM_IDLE = 4.0  # uvicorn backends close idle connections after 5 s
UNSAFE_IDLE = 1.0  # a request that may not be repeated only goes onto a fresher one
UPSTREAM_IDLE_LIMIT = 256  # idle connections kept per deployment
CONTINUE_TIMEOUT = 1.0  # a backend that ignores `Expect: 100-continue` gets the body after this
REDIS_TIMEOUT = 3.0
HEAL_WAIT = 8.0  # a control command waits so long for a router to write lost state back
REFRESH_EVERY = 3.0  # 0.3.x writers announce nothing
REFRESH_AT_MOST_EVERY = 1.0  # for ids nobody knows
SCAN_SHARE = 0.02  # of the time, at most, goes into looking for records that nobody announced
SCAN_COUNT = 1000  # keys a step
START_TIMEOUT = 2.0  # wait so long for the first load before serving 503s
LOG_RATE = 400  # lines of the access log a second; Railway keeps 500 of a replica
LOG_FLUSH = 0.2  # how long a line may wait
LOG_AHEAD = 20_000  # lines that wait for a reader that does not read
TABS_EVERY = 10.0  # at most so often the deployments are asked for their sessions, for the metrics
DESCRIPTORS_EVERY = 10.0  # ... and descriptors are counted
TABS_PATIENCE = 2.0  # ... and a reader of the metrics waits so long for it
LAST_PUSH = 1.0  # for the push at the end
SHUTDOWN_GRACE = seconds("PULSE_RAILWAY_ROUTER_SHUTDOWN_SECONDS", 25)

log = logging.getLogger("pulse.router")


# ---------------------------------------------------------------------------------------------
# The routing state: what is in the store, and the steps that change it.

State = dict[str, str]  # store key without the prefix -> value
Record = dict[str, Any]
Change = dict[str, str | None]  # None deletes the key
Step = Callable[[State], Change]


MARK = ":store"  # which contents the store has: another mark, or none, means that it lost them
REMOVED = ":removed"  # deployment id -> when it was removed, and the Railway service it was on
ANSWERS = ":answers"  # nonce -> when its command was carried out
HISTORY = ":history"  # what was done, by whom and why, the oldest first
MAINTENANCE = ":maintenance"  # since when, and the page that everybody gets
LOCK = ":deploy:lock"  # who deploys, since when, and until when at the latest
FIXED = (":active", MARK, REMOVED, ANSWERS, HISTORY, MAINTENANCE, LOCK)
REMEMBERED = 3600.0  # seconds that a removal and a nonce are remembered
HISTORY_AT_MOST = 100


class StateError(Exception):
    """A control command that would leave the routing state wrong. `reason` is for programs."""

    def __init__(self, message: str, reason: str = "refused") -> None:
        super().__init__(message)
        self.reason = reason


def record_key(deployment_id: str) -> str:
    return f":deployment:{deployment_id}"


def records(state: State) -> list[Record]:
    """Every readable deployment record in `state`, newest registration first."""
    found = []
    for key, value in state.items():
        if not key.startswith(":deployment:"):
            continue
        with contextlib.suppress(ValueError):
            record = json.loads(value)
            if isinstance(record, dict):
                found.append({**record, "deployment_id": key.removeprefix(":deployment:")})
    found.sort(key=lambda r: (r.get("registered_at") or 0, r["deployment_id"]), reverse=True)
    return found


def lost(state: State, intent: str | None) -> bool:
    """Has the store lost its data? `intent` is the deployment that Railway says was active: once
    there is one, the store always names an active one."""
    return bool(intent) and not state.get(":active")


def _object(state: State, key: str) -> Record:
    """A JSON object as it is stored, with the fields we do not know; {} where there is none."""
    with contextlib.suppress(ValueError):
        found = json.loads(state.get(key) or "{}")
        if isinstance(found, dict):
            return found
    return {}


def _record(state: State, deployment_id: str) -> Record:
    return _object(state, record_key(deployment_id))


def _save(record: Record) -> str:
    return json.dumps(record, separators=(",", ":"))


def _remember(state: State, key: str, name: str, **facts: Any) -> str:
    """The object at `key` with one entry more, and without those that are too old."""
    now = time.time()
    kept = {k: v for k, v in _object(state, key).items() if now - v.get("at", 0) < REMEMBERED}
    return _save({**kept, name: {"at": now, **facts}})


def canary(state: State) -> Record | None:
    """The deployment that a share of the new visitors gets, beside the active one."""
    for record in records(state):
        if _is_canary(record):
            return record
    return None


def _is_canary(record: Record) -> bool:
    return (
        isinstance(record.get("weight"), int | float)
        and record.get("state") == "pending"
        and not record.get("retiring_at")
    )


def heal(state: State, known: State) -> Change:
    """Write back what a router knows into a store that has lost its data. What is there stays."""
    active = state.get(":active") or known.get(":active")
    removed = _object(state, REMOVED)
    change: Change = {}
    if active and ":active" not in state:
        change[":active"] = active
    if remembered := {k: v for k, v in _object(known, REMOVED).items() if k not in removed}:
        change[REMOVED] = _save(remembered | removed)
    for key in (HISTORY, MAINTENANCE, LOCK):
        if key in known and key not in state:
            change[key] = known[key]
    for record in records(known):
        name = record["deployment_id"]
        if record_key(name) in state or name in removed:
            continue
        if name == active:
            record["state"] = "active"
        elif record.get("state") == "active":  # another was promoted on the emptied store
            record |= {"state": "draining", "drain_started_at": time.time()}
        change[record_key(name)] = _save(record)
    if MARK not in state and active:
        change[MARK] = secrets.token_hex(8)
    return change


def history(state: State) -> list[Record]:
    """What was done, the oldest first."""
    with contextlib.suppress(ValueError):
        found = json.loads(state.get(HISTORY) or "[]")
        if isinstance(found, list):
            return [entry for entry in found if isinstance(entry, dict)]
    return []


def marked(state: State, change: Change) -> Change:
    """A change of a store that has no mark yet gives it one."""
    return change if MARK in state or not change else {**change, MARK: secrets.token_hex(8)}


# ---------------------------------------------------------------------------------------------
# The stores. Each step is one transaction: a process killed anywhere leaves the old state or the
# new one. `announce` tells the routers.


class RedisStore:
    """State in Redis, under `prefix`."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url, self.prefix = url, prefix
        self.client = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT,
            # a connection that has died meanwhile is made anew; one that hangs is not asked again
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1, (redis.ConnectionError,)),
        )
        self._pattern = f"{prefix}:deployment:*"
        self._fixed = [prefix + key for key in FIXED]

    def read(self) -> State:
        keys = [*self._fixed, *self.client.scan_iter(self._pattern, count=SCAN_COUNT)]
        return self._state(keys, cast(list[Any], self.client.mget(keys)))

    def apply(self, step: Step) -> Change:
        """Run `step` on the state and write what it returns, or nothing if it raises."""
        while True:
            with self.client.pipeline() as pipe:
                pipe.watch(*self._fixed)  # type: ignore[no-untyped-call]
                keys = list(self.client.scan_iter(self._pattern, count=SCAN_COUNT))
                if keys:
                    pipe.watch(*keys)  # type: ignore[no-untyped-call]
                keys = [*self._fixed, *keys]
                state = self._state(keys, cast(list[Any], pipe.mget(keys)))
                change = marked(state, step(state))
                if not change:
                    return {}
                pipe.multi()
                for key, value in change.items():
                    if value is None:
                        pipe.delete(f"{self.prefix}{key}")
                    else:
                        pipe.set(f"{self.prefix}{key}", value)
                pipe.publish(f"{self.prefix}:events", json.dumps(sorted(change)))
                try:
                    pipe.execute()
                except redis.WatchError:
                    continue  # somebody else wrote in between: read again
                return change

    def heal(self, known: State) -> None:
        """Write back what is known, on a connection of its own that does not stay."""
        try:
            self.apply(functools.partial(heal, known=known))
        finally:
            self.client.connection_pool.disconnect()

    def routers(self) -> list[Record]:
        """What each running router last said of itself."""
        keys = list(self.client.scan_iter(f"{self.prefix}:router:*", count=SCAN_COUNT))
        values = cast(list[str | None], self.client.mget(keys)) if keys else []
        return [json.loads(v) for v in values if v]

    async def watch(self, table: Table) -> None:
        """Load the table now, on every announcement, when it asks, and every few seconds.

        Sessions may share this Redis, so going through all of its keys is for now and then: in
        between, only the records that are known, announced or asked for are read.
        """
        client = redis.asyncio.Redis.from_url(
            self.url,
            decode_responses=True,
            socket_timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT,
        )
        loop = asyncio.get_running_loop()
        async with client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe(f"{self.prefix}:events")
            keys: set[str] = set()
            next_scan = 0.0
            heard = kicked = None
            try:
                while True:
                    table.kick.clear()
                    asked = set(table.asked)
                    if (began := time.monotonic()) >= next_scan:
                        scan = client.scan_iter(self._pattern, count=SCAN_COUNT)
                        keys = {key async for key in scan}
                        took = time.monotonic() - began
                        next_scan = began + max(REFRESH_EVERY, took / SCAN_SHARE)
                    keys.update(self.prefix + record_key(name) for name in asked)
                    state = await self._read(client, keys)
                    if table.misses(state):
                        await loop.run_in_executor(None, self.heal, table.raw)
                        keys |= {self.prefix + key for key in table.raw if key not in FIXED}
                        state = await self._read(client, keys)
                        next_scan = 0.0
                    keys = {self.prefix + key for key in state if key not in FIXED}
                    table.load(state)
                    table.asked -= asked
                    if METRICS.name:
                        key = f"{self.prefix}:router:{METRICS.name}"
                        await client.set(key, METRICS.dump(), ex=30)
                    heard = heard or asyncio.create_task(pubsub.get_message(timeout=REFRESH_EVERY))
                    kicked = kicked or asyncio.create_task(table.kick.wait())
                    await asyncio.wait({heard, kicked}, return_when=asyncio.FIRST_COMPLETED)
                    if heard.done():
                        if message := heard.result():  # a lost connection shows here
                            announced = self._announced(message["data"])
                            keys |= announced or set()
                            next_scan = next_scan if announced else 0.0
                        heard = None
                    if kicked.done():
                        kicked = None
            finally:
                for task in (heard, kicked):
                    if task:
                        task.cancel()

    def _announced(self, data: str) -> set[str] | None:
        """The record keys that an announcement names; None where it is not one of `apply`'s."""
        try:
            names = json.loads(data)
        except ValueError:
            return None
        if not isinstance(names, list):
            return None
        return {self.prefix + str(name) for name in names if name not in FIXED}

    async def _read(self, client: redis.asyncio.Redis, records: set[str]) -> State:
        """What is not a record, these records, and the active one's where it is not among them."""
        keys = [*self._fixed, *records]
        state = self._state(keys, await client.mget(keys))
        active = state.get(":active")
        if active and record_key(active) not in state:
            key = self.prefix + record_key(active)
            state |= self._state([key], await client.mget([key]))
        return state

    def _state(self, keys: list[str], values: list[Any]) -> State:
        pairs = zip(keys, values, strict=True)
        return {k.removeprefix(self.prefix): v for k, v in pairs if v is not None}


class LocalStore:
    """State in a SQLite file, for runs without Redis."""

    def __init__(self, path: str, prefix: str) -> None:
        self.prefix = prefix
        self.db = sqlite3.connect(path, isolation_level=None, timeout=5)
        # 0.3.x's table, so that either version reads the other's file
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS pulse_kv"
            " (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires_at REAL)"
        )

    def read(self) -> State:
        rows = self.db.execute(
            "SELECT key, value FROM pulse_kv"
            " WHERE substr(key, 1, ?) = ? AND (expires_at IS NULL OR expires_at > ?)",
            (len(self.prefix) + 1, self.prefix + ":", time.time()),
        )
        return {key.removeprefix(self.prefix): value for key, value in rows}

    def apply(self, step: Step) -> Change:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            state = self.read()
            change = marked(state, step(state))
            for key, value in change.items():
                if value is None:
                    self.db.execute("DELETE FROM pulse_kv WHERE key = ?", (self.prefix + key,))
                else:
                    self.db.execute(
                        "INSERT INTO pulse_kv (key, value) VALUES (?, ?)"
                        " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                        (self.prefix + key, value),
                    )
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")
        return change

    def routers(self) -> list[Record]:
        return []

    async def watch(self, table: Table) -> None:
        while True:
            table.kick.clear()
            state = self.read()
            if table.misses(state):
                self.apply(functools.partial(heal, known=table.raw))
                state = self.read()
            table.load(state)
            table.asked.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(table.kick.wait(), 0.05)


Store = RedisStore | LocalStore


def store_from_env(env: dict[str, str]) -> Store:
    """The store that the environment names: REDIS_URL on Railway, PULSE_KV_* elsewhere."""
    prefix = (env.get("PULSE_RAILWAY_REDIS_PREFIX") or DEFAULT_REDIS_PREFIX).rstrip(":")
    kind = env.get("PULSE_KV_KIND") or "redis"
    if kind == "sqlite":
        if not env.get("PULSE_KV_PATH"):
            raise SystemExit("PULSE_KV_KIND=sqlite needs PULSE_KV_PATH, the file to use")
        return LocalStore(env["PULSE_KV_PATH"], prefix)
    url = env.get("PULSE_KV_URL") or env.get("REDIS_URL")
    if kind != "redis" or not url:
        raise SystemExit("set REDIS_URL, or PULSE_KV_KIND=sqlite and PULSE_KV_PATH")
    return RedisStore(url, prefix)


# ---------------------------------------------------------------------------------------------
# The routing table: the state as the data plane uses it.


@dataclass(slots=True)
class Deployment:
    """One backend: where it is, and the idle connections to it."""

    id: str
    state: str
    host: str
    port: int
    header: bytes
    tally: Tally = field(default_factory=lambda: Tally())
    idle: collections.deque[Upstream] = field(default_factory=collections.deque)
    unwell: float = 0.0  # until then (monotonic) it is not asked for what others lack

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Table:
    """All known deployments, in memory. A request never waits for the store to use it."""

    def __init__(self) -> None:
        self.deployments: dict[bytes, Deployment] = {}
        self.active: Deployment | None = None
        self.canary: Deployment | None = None
        self.weight = 0.0  # percent of the new visitors that the canary gets
        self.maintenance: Maintenance | None = None
        self.loaded = False
        self.loaded_at = 0.0  # monotonic, the last time
        self.lost = False  # the store has lost its data, and so had this router when it started
        self.changed = asyncio.Event()  # set at every load, for those who wait for one
        self.kick = asyncio.Event()  # asks for a load
        self.asked: set[str] = set()  # ids that the next load should look for
        self.asked_at = 0.0
        self.raw: State = {}
        # path -> who had it, and until when we say so
        self.had: dict[bytes, tuple[str, float]] = {}

    @property
    def ready(self) -> bool:
        return self.loaded and not self.lost

    def misses(self, state: State) -> bool:
        """Has the store lost what this table knows? Another mark, or no active one, tells. One
        without a mark gets it, or a loss between two looks could not be told."""
        if state.get(":active") and state.get(MARK) == self.raw.get(MARK, state.get(MARK)):
            return MARK not in state
        if self.active and heal(state, self.raw).keys() - {MARK}:
            log.error("the store has lost its data: writing back what this router knows")
            return True
        return bool(state.get(":active")) and MARK not in state

    def load(self, state: State) -> None:
        self.loaded_at = time.monotonic()
        self.lost = lost(state, os.environ.get(INTENT_VARIABLE))
        if state != self.raw or not self.loaded:
            known: dict[bytes, Deployment] = {}
            for record in records(state):
                # one that is being removed is gone for its tabs: they reload, and meet no 502
                entry = None if record.get("retiring_at") else self._entry(record)
                if entry:
                    known[entry.id.encode()] = entry
            for name, entry in self.deployments.items():
                if known.get(name) is not entry:
                    close_idle(entry)
            METRICS.forget(name.decode() for name in self.deployments.keys() - known.keys())
            self.deployments = known
            self.active = known.get(state.get(":active", "").encode())
            drawn_to = canary(state)
            self.canary = known.get(drawn_to["deployment_id"].encode()) if drawn_to else None
            self.weight = float(drawn_to["weight"]) if drawn_to else 0.0
            self.maintenance = maintenance(state)
            self.raw = state
            self.loaded = True
            METRICS.active = self.active.id if self.active else None
        self.changed.set()
        self.changed = asyncio.Event()

    def _entry(self, record: Record) -> Deployment | None:
        """The table's entry for a record; the one we have where nothing but its state changed."""
        name = record["deployment_id"]
        address = record.get("address") or (
            f"http://{record.get('service_name') or name}.railway.internal:{DEFAULT_PORT}"
        )
        try:
            url = urllib.parse.urlsplit(address)
            host, port = url.hostname, url.port or 80
        except ValueError:
            host = None
        if not DEPLOYMENT_ID.fullmatch(name) or not host:
            log.error("ignoring the record of %r: no usable address", name)
            return None
        old = self.deployments.get(name.encode())
        if old and (old.host, old.port) == (host, port):
            old.state = str(record.get("state"))
            return old
        header = f"{SELECTED_HEADER}: {name}\r\n".encode()
        tally = METRICS.tallies.setdefault(name, Tally())
        return Deployment(name, str(record.get("state")), host, port, header, tally)

    async def find(self, name: bytes) -> Deployment | None:
        """The deployment of that id. An unknown one is worth one refresh, now and then."""
        known = self.deployments.get(name)
        text = name.decode("latin-1")
        if known or not DEPLOYMENT_ID.fullmatch(text):
            return known
        now = asyncio.get_running_loop().time()
        if now - self.asked_at >= REFRESH_AT_MOST_EVERY:
            self.asked_at = now
            self.asked = {text}
            self.kick.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while text in self.asked:  # by this request or by another
                    await self.changed.wait()
        return self.deployments.get(name)

    def others(self, asked: Deployment, path: bytes) -> list[Deployment]:
        """Live deployments besides the one that was asked, newest first, before them the one that
        had this path a while ago. One that did not answer lately is left out."""
        now = time.monotonic()
        had, until = self.had.get(path, ("", 0.0))
        found = [d for d in self.deployments.values() if d is not asked and d.unwell < now]
        return sorted(found, key=lambda d: d.id != had) if until > now else found

    def remember(self, path: bytes, deployment: Deployment) -> None:
        if len(path) > HAD_PATH:
            return
        self.had[path] = deployment.id, time.monotonic() + HAD_SECONDS
        while len(self.had) > HAD_AT_MOST:
            del self.had[next(iter(self.had))]

    async def follow(self, store: Store) -> None:
        """Keep the table as the store says, for as long as the process lives."""
        pause = 0.1
        while True:
            began = time.monotonic()
            try:
                await store.watch(self)
            except (redis.RedisError, sqlite3.Error, OSError, TimeoutError, ValueError) as error:
                # The class only: the message of a Redis error can carry its URL.
                log.error("routing state unreadable (%s); trying again", type(error).__name__)
            pause = 0.1 if time.monotonic() - began > 10 else min(pause * 2, 2.0)
            await asyncio.sleep(pause)


TABLE = Table()


# ---------------------------------------------------------------------------------------------
# Counters, for `control status`, for who watches a new version, and for what is exported. Plain
# lists: they are on the path of every request.

# Seconds: the buckets of OpenTelemetry's http.server.request.duration.
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
    """What came of one deployment's requests."""

    # by method and status // 100; others than the known methods are OpenTelemetry's _OTHER
    answers: dict[tuple[bytes, int], Histogram] = field(default_factory=dict)
    first_byte: Histogram = field(default_factory=Histogram)
    errors: dict[str, int] = field(default_factory=dict)  # by what went wrong
    failed: int = 0  # of these, what is not among the answers: broken off, or another answered
    tunnels: int = 0  # that were opened

    def answered(self, method: bytes, status: int, seconds: float) -> None:
        key = method if method in METHODS else b"_OTHER", status // 100
        histogram = self.answers.get(key)
        if histogram is None:
            histogram = self.answers[key] = Histogram()
        histogram.add(seconds)

    def erred(self, kind: str) -> None:
        self.errors[kind] = self.errors.get(kind, 0) + 1

    def summary(self) -> tuple[list[int], int, list[int]]:
        """Answers by status class, failures without one, answers by bucket of duration."""
        classes = [0] * 10
        for (_, status), histogram in self.answers.items():
            classes[status] += sum(histogram.counts)
        buckets = [h.counts for h in self.answers.values()] or [Histogram().counts]
        return classes, self.failed, [sum(column) for column in zip(*buckets, strict=True)]


@dataclass(slots=True)
class Metrics:
    name: str = ""
    active: str | None = None
    started_at: float = field(default_factory=time.time)
    requests: int = 0
    errors: int = 0  # answers the router made itself because a backend failed
    stale: int = 0
    turned_away: int = 0  # connections, at the limit
    tunnels_opened: int = 0
    tunnels_open: int = 0
    descriptors: int = 0
    descriptors_until: float = 0.0  # monotonic
    own: Tally = field(default_factory=Tally)  # answers of the router's own
    tallies: dict[str, Tally] = field(default_factory=dict)  # by deployment

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.tallies.pop(name, None)

    def dump(self) -> str:
        tallies = {name: tally.summary() for name, tally in self.tallies.items()}
        return json.dumps(
            {
                "router": self.name,
                "active": self.active,
                "uptime_seconds": round(time.time() - self.started_at),
                "requests": self.requests,
                "errors": self.errors,
                "stale": self.stale,
                "turned_away": self.turned_away,
                "clients": len(Client.instances),
                "pooled": idle_connections(),
                "tasks": len(asyncio.all_tasks()),
                "tunnels_open": self.tunnels_open,
                "tunnels_opened": self.tunnels_opened,
                "requests_per_deployment": {name: sum(t[0]) for name, t in tallies.items()},
                "tallies": {name: t for name, t in tallies.items() if t[1] or any(t[0])},
                "in_flight": requests_under_way() + tunnels_by_deployment(),
            }
        )


METRICS = Metrics()


# ---------------------------------------------------------------------------------------------
# The backend's side of a connection.


def requests_under_way() -> collections.Counter[str]:
    """By deployment. A download needs no tab to be in use."""
    return collections.Counter(
        client.exchange.upstream.deployment.id
        for client in Client.instances
        if client.exchange and not client.exchange.finished
    )


def tunnels_by_deployment() -> collections.Counter[str]:
    return collections.Counter(end.deployment for end in TunnelEnd.open)


class UpstreamError(Exception):
    """The backend did not answer. `status` is what the client is told."""

    def __init__(self, status: int, detail: str, *, sent: bool = False) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.sent = sent  # the backend may have seen the request

    @property
    def kind(self) -> str:
        late = "timeout" if self.status == 504 else "lost"
        return late if self.sent else {"timeout": "connect_timeout", "lost": "refused"}[late]


class Upstream(asyncio.Protocol):
    """One connection to a backend. What it brings is for the `Exchange` that holds it."""

    __slots__ = ("deployment", "exchange", "idle_since", "reused", "transport")

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.exchange: Exchange | None = None
        self.reused = False
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.feed(data)
        else:  # an answer that nobody asked for
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.exchange is not None:
            self.exchange.upstream_lost()
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
    """Close a connection with a TCP reset, as the other side's was."""
    if (sock := transport.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def close_idle(deployment: Deployment) -> None:
    while deployment.idle:
        deployment.idle.pop().transport.close()


def idle_connections() -> int:
    return sum(len(deployment.idle) for deployment in TABLE.deployments.values())


def pooled(deployment: Deployment, max_idle: float) -> Upstream | None:
    """The idle connection used last, if it has not been idle for longer than `max_idle` s."""
    now = asyncio.get_running_loop().time()
    while deployment.idle:
        upstream = deployment.idle.pop()
        if upstream.transport.is_closing():
            continue
        if now - upstream.idle_since > max_idle:
            deployment.idle.append(upstream)
            return None
        upstream.reused = True
        return upstream
    return None


Address = tuple[str, int]


class Resolver:
    """Names to addresses, by Python's own resolver in threads: one question at a time for a name,
    so that a bad one holds one thread, and an answer is good for a few seconds."""

    def __init__(self) -> None:
        self.known: dict[Address, tuple[float, list[Address]]] = {}
        self.asking: dict[Address, asyncio.Task[list[Address]]] = {}
        self.threads = concurrent.futures.ThreadPoolExecutor(RESOLVERS, "resolver")

    async def addresses(self, host: str, port: int) -> tuple[list[Address], bool]:
        """All addresses of a name, and whether they were remembered. Raises OSError."""
        if is_literal(host):
            return [(host, port)], False
        key = host, port
        until, found = self.known.get(key, (0.0, []))
        if time.monotonic() < until:
            return list(found), True
        task = self.asking.get(key)
        if task is None:
            task = self.asking[key] = asyncio.get_running_loop().create_task(self._ask(key))
            task.add_done_callback(_look_away)
        return list(await asyncio.shield(task)), False

    async def _ask(self, key: Address) -> list[Address]:
        try:
            # not loop.getaddrinfo: uvloop's own would pass by what Python's resolver is told
            infos = await asyncio.get_running_loop().run_in_executor(
                self.threads, functools.partial(socket.getaddrinfo, *key, type=socket.SOCK_STREAM)
            )
            found = list(dict.fromkeys((str(i[4][0]), int(i[4][1])) for i in infos))
            now = time.monotonic()
            self.known = {k: v for k, v in self.known.items() if v[0] > now}
            self.known[key] = now + RESOLVED_SECONDS, found
            return found
        finally:
            del self.asking[key]

    def forget(self, host: str, port: int) -> None:
        self.known.pop((host, port), None)


def _look_away(task: asyncio.Task[Any]) -> None:
    """Its outcome is for those who wait; nobody may be there any more."""
    if not task.cancelled():
        task.exception()


@functools.lru_cache(maxsize=512)
def is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


RESOLVER = Resolver()


async def connect(deployment: Deployment, patience: float = CONNECT_TIMEOUT) -> Upstream:
    """A new connection. Every address of the name is tried, a later one 250 ms after the one
    before it (RFC 8305), so that a name with a dead IPv6 address costs little.

    Raises UpstreamError: 502 where the backend refuses, 504 where it does not answer in time.
    """
    clients = len(Client.instances) + len(TunnelEnd.open)
    if clients > CONNECTIONS.limit // 2 and clients + idle_connections() > CONNECTIONS.limit:
        for other in TABLE.deployments.values():
            close_idle(other)  # descriptors are short, and this one is needed
    host, port = deployment.host, deployment.port
    try:
        async with asyncio.timeout(patience):
            addresses, remembered = await RESOLVER.addresses(host, port)
            try:
                return await _first_to_connect(deployment, addresses)
            except OSError:
                RESOLVER.forget(host, port)
                if not remembered:
                    raise
            addresses, _ = await RESOLVER.addresses(host, port)  # it may have moved
            return await _first_to_connect(deployment, addresses)
    except TimeoutError:
        RESOLVER.forget(host, port)
        raise UpstreamError(504, "the deployment does not answer") from None
    except OSError:
        raise UpstreamError(502, "the deployment refuses connections") from None


async def _first_to_connect(deployment: Deployment, addresses: list[tuple[Any, Any]]) -> Upstream:
    loop = asyncio.get_running_loop()

    async def attempt(address: tuple[Any, Any]) -> Upstream:
        _, upstream = await loop.create_connection(lambda: Upstream(deployment), *address)
        return upstream

    if len(addresses) == 1:
        return await attempt(addresses[0])
    pending: set[asyncio.Task[Upstream]] = set()
    error: BaseException = OSError("the name has no address")
    try:
        while addresses or pending:
            if addresses:
                pending.add(loop.create_task(attempt(addresses.pop(0))))
            done, pending = await asyncio.wait(
                pending,
                timeout=0.25 if addresses else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            first = None
            for task in done:
                if problem := task.exception():
                    error = problem
                elif first is None:
                    first = task.result()
                else:  # two at once
                    task.result().transport.close()
            if first:
                return first
        raise error
    finally:
        for task in pending:
            task.add_done_callback(_drop_late)
            task.cancel()


def _drop_late(task: asyncio.Task[Upstream]) -> None:
    if not task.cancelled() and not task.exception():
        task.result().transport.close()


# ---------------------------------------------------------------------------------------------
# The client's side of a connection.


@dataclass
class Connections:
    """How many clients may be connected at once; `raise_limit` sets it in each process."""

    limit: int = 1 << 30

    def raise_limit(self, wanted: int | None) -> None:
        """As many descriptors as this process may have, half of them for clients; fewer clients
        where `wanted` says so."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # above the kernel's own limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = (soft - DESCRIPTORS_KEPT) // 2 if soft != resource.RLIM_INFINITY else 1 << 30
        self.limit = max(8, min(room, wanted or room))


CONNECTIONS = Connections()

CHUNKED = b"transfer-encoding: chunked\r\n"

# RFC 9110 section 7.6.1: meant for one connection only. `Connection` itself names more.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


# ... but not what frames or addresses the message
NOT_NAMED_AWAY = frozenset((b"content-length", b"host"))


# ... of a request: what police() looks at
POLICED = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))


def plain(status: int, detail: str = "") -> Response:
    return JSONResponse({"detail": detail or http.HTTPStatus(status).phrase.lower()}, status)


class BadRequest(Exception):
    """A request head that this router will not pass on."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status


class Incoming:
    """One request. Several can be on a connection at once: the head of a pipelined one is
    parsed while the one before it is being answered."""

    more_body = True  # is some of it still to come?
    gone = False  # so is its client, or its body cannot be read
    begun = False  # its answer is
    answered = False
    visitor = b""  # who is told so by a cookie, for the time of a canary

    def __init__(self, client: Client, method: bytes, version: str, keep_alive: bool) -> None:
        self.client = client
        self.method = method
        self.version = version
        self.keep_alive = keep_alive
        self.url = client.url  # the request target as it was sent
        self.fields = client.fields
        self.handshake = client.handshake  # of a WebSocket
        self.expects_continue = client.expects_continue
        self.body = bytearray()  # what has come of it and has not been taken
        self.arrived = asyncio.Event()  # set when more comes, and at every end
        path, _, query = self.url.partition(b"?")
        if not path.startswith(b"/") or b"#" in self.url:
            # absolute-form (RFC 9112 section 3.2.2), `*`, or a fragment, which says nothing here
            parsed = httptools.parse_url(self.url)
            path, query = parsed.path or b"/", parsed.query or b""
        self.path, self.query = path, query

    async def read(self) -> bytes:
        """The next piece of the body; nothing at its end, and where nobody waits for an answer."""
        client = self.client
        if self.expects_continue and not client.transport.is_closing():
            self.expects_continue = False
            client.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while self.more_body and not (self.body or self.gone or self.answered):
            client.resume_reading()
            self.arrived.clear()
            await self.arrived.wait()
        if self.gone or self.answered:
            return b""
        piece, self.body = bytes(self.body), bytearray()
        return piece


class Client(asyncio.Protocol):
    """A client's connection: its requests are parsed, policed, and answered one after the other.

    uvicorn's server makes it, counts it among its `connections`, and calls `shutdown`. Nothing of
    ASGI is between here and a backend: its cycle and task were a third of a small request's cost.
    """

    instances: ClassVar[set[Client]] = set()  # all open ones, for the sweep

    def __init__(self, *, server_state: Any, **_: Any) -> None:
        self.connections, self.tasks = server_state.connections, server_state.tasks
        self.loop = asyncio.get_running_loop()
        self.parser: Any = self.new_parser()  # None: nothing more is read
        self.arriving: Incoming | None = None  # the request that is read now, or was last
        self.waiting: collections.deque[Incoming] = collections.deque()  # not begun yet
        self.request: Incoming | None = None  # being answered, or the last that was
        self.exchange: Exchange | None = None
        self.handshake = False
        self.early = b""  # what a client sent behind its handshake
        self.head_size = 0
        self.in_head = True
        self.chunked = False
        self.head_in_read = False
        self.framing = 0  # bytes of a chunked body that were none of it
        self.chunks = self.body_bytes = 0  # of it, in the last read
        self.ending = False
        self.lingering = False
        self.lingers_since = 0.0
        self.reading_paused = False
        self.stalled_since = 0.0  # when it stopped taking its answer, if it has

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]).encode() if peer else b""
        self.touched = self.loop.time()  # when the client last sent, or was last answered
        self.connections.add(self)
        Client.instances.add(self)
        if (open_now := len(Client.instances) + len(TunnelEnd.open)) > CONNECTIONS.limit:
            self.turn_away(open_now)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        Client.instances.discard(self)
        self.parser = None
        self.waiting.clear()
        for incoming in (self.request, self.arriving):
            if incoming:
                incoming.gone = True
                incoming.arrived.set()
        if self.exchange:
            self.exchange.client_lost()

    @property
    def busy(self) -> bool:
        """Is a request being answered?"""
        return self.request is not None and not self.request.answered

    def new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # or it fails at what follows a request that asks for `connection: close`
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    # -- reading -------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self.touched = self.loop.time()
        if not self.parser:  # refused, or a handshake
            if self.handshake:
                self.early += data
            return
        if self.in_head:
            self.head_size += len(data)
        self.chunks = self.body_bytes = 0
        self.head_in_read = False
        try:
            self.parser.feed_data(data)
            if self.chunked and not self.in_head and not self.head_in_read:
                self.check_framing(len(data))
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            if self.handshake:
                self.parser = None
                self.early = rest
            else:
                head = self.head_without_upgrade()
                self.parser = self.new_parser()
                self.data_received(head + rest)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self.refuse(cause.status if isinstance(cause, BadRequest) else 400)
        except BadRequest as error:
            self.refuse(error.status)
        else:
            if self.in_head and self.head_size > HEAD_LIMIT:
                self.refuse(431)
        if self.waiting and not self.busy:
            self.begin()

    def begin(self) -> None:
        """Send the next request that waits on its way: with as much of its body as has come."""
        self.request = self.waiting.popleft()
        self.route(self.request)

    def route(self, incoming: Incoming) -> None:
        route(incoming)

    def refuse(self, status: int) -> None:
        """Answer a head that cannot be parsed, and hang up."""
        self.parser = None
        arriving = self.arriving
        if arriving and not arriving.answered:
            if arriving.more_body:  # it is the body of this one that is bad
                self.break_off(arriving, status)
            else:
                arriving.keep_alive = False  # the answers before it come first
                self.pause_reading()
            return
        METRICS.requests += 1
        METRICS.own.answered(b"", status, self.loop.time() - self.touched)
        self.say(plain(status))
        self.transport.close()

    def break_off(self, arriving: Incoming, status: int) -> None:
        """End a request whose body cannot be read on: the backend must not take what it has for
        the whole of it."""
        arriving.gone = True
        arriving.arrived.set()
        alone = arriving is self.request or (not self.busy and self.waiting[0] is arriving)
        begun = arriving.begun or self.exchange is not None
        if self.exchange and self.exchange.incoming is arriving:
            self.exchange.client_lost()
        self.waiting.clear()
        if begun or not alone:
            self.transport.close()
        else:
            self.say(plain(status))
            self.linger()

    def turn_away(self, open_now: int) -> None:
        """Near the limit of descriptors, newcomers are told so; those who are there go on. Each
        of them may need a second descriptor, to its backend."""
        METRICS.turned_away += 1
        if open_now > CONNECTIONS.limit * 1.05 + 16:  # no descriptors for politeness either
            self.transport.abort()
            return
        self.parser = None
        self.say(plain(503, "too many connections"))
        self.linger()

    def check_framing(self, received: int) -> None:
        """Bound what a chunked body holds besides its bytes: sizes, extensions, trailers. Some
        is allowed for each chunk, and as much again as the body has."""
        extra = received - 2 * self.body_bytes - 16 * self.chunks
        self.framing = max(0, self.framing + extra)
        if self.framing > FRAMING_LIMIT:
            raise BadRequest("too much around the body", 431)

    # called by the parser

    def on_message_begin(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes, bytes]] = []  # name as written, in lower case, value
        self.expects_continue = False
        self.in_head = True

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head:
            # A trailer: dropped, since merged into the headers it could say anything of what was
            # policed already: a second host, an affinity (RFC 9110 section 6.5.1).
            self.framing += len(name) + len(value) + 4
            if self.framing > FRAMING_LIMIT:
                raise BadRequest("trailers too large", 431)
            return
        self.fields.append((name, name.lower(), value))
        if len(self.fields) > HEADER_COUNT_LIMIT:
            raise BadRequest("too many headers", 431)

    def on_chunk_header(self) -> None:
        self.chunks += 1

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.head_size > HEAD_LIMIT and self.head_bytes() > HEAD_LIMIT:
            raise BadRequest("head too large", 431)
        self.head_size = self.framing = 0
        self.head_in_read = True
        parser = self.parser
        method, version = parser.get_method(), parser.get_http_version()
        self.police(method, version)
        if len(self.waiting) >= PIPELINE_LIMIT:
            raise BadRequest("too many requests at once")
        behind = self.busy or bool(self.waiting)
        if parser.should_upgrade():
            if not self.is_handshake():
                return  # it comes again, as a plain request
            if behind:
                raise BadRequest("a handshake behind a request")
            self.handshake = True
        keep_alive = version != "1.0" and not self.handshake and parser.should_keep_alive()
        keep_alive = keep_alive and not self.ending
        self.arriving = Incoming(self, method, version, keep_alive)
        self.waiting.append(self.arriving)
        if behind or self.handshake:
            self.pause_reading()  # what comes behind a handshake is the tunnel's

    def head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, _, value in self.fields)

    def police(self, method: bytes, version: str) -> None:
        """Refuse what request smugglers use (RFC 9112 sections 3.2, 5 and 6.3).

        llhttp has already refused bare CR and LF, bad names, and chunked not being last.
        """
        lengths = hosts = 0
        coding: bytes | None = None
        for _, name, value in self.fields:
            if name not in POLICED:
                continue
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                lengths += 1
                if not value.isdigit():
                    raise BadRequest("content-length is not a number")
            elif name == b"transfer-encoding":
                if coding is not None or value.lower() != b"chunked":
                    raise BadRequest("only one transfer coding, chunked, is understood")
                coding = value
            elif value.lower() == b"100-continue":
                self.expects_continue = True
        if lengths > 1 or (lengths and coding is not None):
            raise BadRequest("conflicting message lengths")
        if method == b"CONNECT":
            raise BadRequest("this is no forward proxy")
        self.chunked = coding is not None
        if version not in ("1.0", "1.1"):  # the parser takes HTTP/0.9 and HTTP/2.0 for it too
            raise BadRequest("HTTP/1.0 or HTTP/1.1, please", 505)
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise BadRequest("one host header, please")
        if coding is not None and version == "1.0":
            raise BadRequest("HTTP/1.0 has no transfer codings")

    def head_without_upgrade(self) -> bytes:
        """The head that was read, as a request that asks for no upgrade: a server may ignore one
        (RFC 9110 section 7.8), but the parser would not read the body."""
        version = self.parser.get_http_version().encode()
        head = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        for name, lower, value in self.fields:
            if lower != b"upgrade":
                head.append(name + b": " + value + b"\r\n")
        return b"".join([*head, b"\r\n"])

    def is_handshake(self) -> bool:
        """Does it open a WebSocket (RFC 6455 section 4.1)?"""
        wanted = False
        for _, name, value in self.fields:
            if name == b"upgrade":
                wanted = value.lower() == b"websocket"
            elif name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")):
                return False
        return wanted and bool(self.parser.get_method() == b"GET")

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        arriving = self.arriving
        if self.lingering or arriving is None or arriving.answered:
            return
        arriving.body += body
        arriving.arrived.set()
        if len(arriving.body) > BODY_AHEAD:
            self.pause_reading()

    def on_message_complete(self) -> None:
        self.in_head, self.head_size = True, 0
        if self.lingering:
            self.transport.close()
        elif self.arriving and (self.handshake or not self.parser.should_upgrade()):
            self.arriving.more_body = False
            self.arriving.arrived.set()

    # -- answering -----------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what has to wait. The server ends these when its time for an orderly end is over."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.worked)

    def worked(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a request failed in the router itself", exc_info=error)
            self.transport.abort()

    def answer(
        self, incoming: Incoming, response: Response, instead_of: Deployment | None = None
    ) -> None:
        """An answer of the router's own, or in place of a deployment that gave none."""
        if not self.transport.is_closing():
            close = incoming.more_body or not incoming.keep_alive
            self.say(response, close=close, head_only=incoming.method == b"HEAD")
        took = self.loop.time() - self.touched
        tally = instead_of.tally if instead_of else METRICS.own
        tally.answered(incoming.method, response.status_code, took)
        if ACCESS_LOG:
            name = instead_of.id if instead_of else None
            access(incoming, response.status_code, name, len(response.body), took)
        self.finish(incoming)

    def say(self, response: Response, *, close: bool = True, head_only: bool = False) -> None:
        status = http.HTTPStatus(response.status_code)
        head = b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode())
        lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        if close:
            lines.append(b"connection: close\r\n")
        body = b"" if head_only else bytes(response.body)
        self.transport.write(b"".join([head, *lines, b"\r\n", body]))

    def finish(self, incoming: Incoming, close: bool = False) -> None:
        """The answer is written: on to the next request, or the connection ends."""
        incoming.answered = True
        incoming.arrived.set()
        self.touched = self.loop.time()
        if incoming.more_body:
            self.linger()
        elif close or not incoming.keep_alive:
            self.transport.close()
        elif not self.transport.is_closing():
            self.resume_reading()
            if self.waiting:
                self.begin()

    def pause_reading(self) -> None:
        if not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.reading_paused:
            self.reading_paused = False
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.stalled_since = self.loop.time()

    def resume_writing(self) -> None:
        self.stalled_since = 0.0
        if self.exchange:
            self.exchange.client_writable()

    def shutdown(self) -> None:
        """The server ends: this connection does after the answers that are under way, and one
        that waits for a request after a moment: it may have been sent already."""
        self.ending = True
        if self.arriving is None or self.arriving.answered:
            self.loop.call_later(LAST_CALL, self.last_call)
        else:
            self.arriving.keep_alive = False

    def last_call(self) -> None:
        if self.arriving is None or self.arriving.answered:
            self.transport.close()

    def linger(self) -> None:
        """The answer is out but the upload is not in: a close now would reset the connection and
        lose the answer, so read and drop for a while (RFC 9112 section 9.6)."""
        self.lingering = True
        self.touched = self.lingers_since = self.loop.time()
        self.resume_reading()
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()  # the client need not wait for the rest to see the end

    def overdue(self, now: float) -> bool:
        """Is this one still there although it has been given all the time that it gets?"""
        if self.lingering:
            return now - self.touched > LINGER or now - self.lingers_since > LINGER_AT_MOST
        limit = FLUSH if self.transport.is_closing() else WRITE_STALL_TIMEOUT
        return bool(self.stalled_since) and now - self.stalled_since > limit


async def sweep() -> None:
    """Every second, close the connections whose time is up."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(1.0)
        now = loop.time()
        for client in list(Client.instances):
            arriving, idle = client.arriving, now - client.touched
            if client.overdue(now):
                client.transport.abort()
            elif client.lingering:
                continue
            elif arriving is None or arriving.answered:
                if client.head_size and idle > 0 and client.parser is not None:
                    if idle > HEAD_TIMEOUT:
                        client.refuse(408)
                elif idle > (KEEP_ALIVE if arriving else HEAD_TIMEOUT):
                    closing = client.transport.is_closing()
                    (client.transport.abort if closing else client.transport.close)()
            elif arriving.more_body and not client.reading_paused and idle > BODY_STALL_TIMEOUT:
                client.transport.abort()
            elif client.exchange:
                client.exchange.check_time()
        monotonic = time.monotonic()
        for end in list(TunnelEnd.open):
            end.check_time(monotonic)
        for deployment in TABLE.deployments.values():
            while deployment.idle and now - deployment.idle[0].idle_since > UPSTREAM_IDLE:
                deployment.idle.popleft().transport.close()


# ---------------------------------------------------------------------------------------------
# One request and its answer.


class Exchange:
    """Copies one answer from an upstream to a client, chunk by chunk as it comes.

    Everything runs in the callbacks of the two connections, and `then` is called when the two are
    parted. `outcome` says how it ended: ok, switched (a tunnel now), missing (an answer that was
    held back), gone (the client), broken (too late for another answer); where nothing was sent to
    the client: reset (a pooled connection that had died), lost, timeout.

    A client that reads slowly pauses the upstream, so memory stays flat.
    """

    # what an exchange begins with
    spared = False
    writable: asyncio.Event | None = None  # for the task that sends the body
    go_ahead: asyncio.Event | None = None
    reason = tail = b""  # tail: what came behind a 101
    status = bytes_out = head_size = 0
    answered_at = 0.0  # the head of its answer
    heard = 0.0  # the backend, last
    started = finished = chunked = until_close = close = False
    keep = True
    outcome = ""

    def __init__(
        self,
        incoming: Incoming,
        upstream: Upstream,
        then: Callable[[Exchange], None],
        spare: str = "",
    ) -> None:
        client = self.client = incoming.client
        self.incoming, self.upstream, self.then = incoming, upstream, then
        self.parser = httptools.HttpResponseParser(self)
        self.spare = spare  # an answer that says "not here" is swallowed: see `lacking`
        self.began = time.monotonic()  # loop.time() stands still within one turn of the loop
        self.fields: list[tuple[bytes, bytes]] = []
        self.out: list[bytes] = []
        self.head_only = incoming.method == b"HEAD"
        self.version_10 = incoming.version == "1.0"
        upstream.exchange = self
        if client.exchange is None:
            client.exchange = self  # else one of several that are asked; the answer's is the one

    # -- from the upstream ---------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        why = ""
        if self.started:
            self.heard = time.monotonic()
        else:
            self.head_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.incoming.handshake and not self.finished:
                self.upstream.transport.pause_reading()
                self.tail = data[upgrade.args[0] :]
                self.end("switched")
                self.let_go()
                self.then(self)
                return
            why = "the backend switched protocols unasked"
        except httptools.HttpParserError:
            why = "the backend's answer is not HTTP"
        if not self.started and self.head_size > ANSWER_HEAD_LIMIT and not self.finished:
            why = "the backend's answer has too large a head"
        if why and not self.finished:
            self.broken(why)
            return
        if why:  # behind a whole answer
            self.keep = False
        self.flush()

    # called by the parser

    def on_message_begin(self) -> None:
        self.fields = []
        if self.finished:
            self.keep = False  # a second answer, which nobody asked for

    def on_status(self, status: bytes) -> None:
        self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.started:  # else a trailer
            self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        """The head of an answer is in: write the client's."""
        if self.finished:
            return
        parser, incoming = self.parser, self.incoming
        status = self.status = parser.get_status_code()
        reason, self.reason = self.reason, b""
        if status == 101:
            return
        if status < 200:
            self.informational(status, reason)
            return
        if self.spare:
            lacks = lacking(self.spare, incoming.path, status, self.fields)
            if lacks or incoming.begun or incoming.gone:  # or another was first
                self.keep = parser.should_keep_alive()
                self.spared = True
                self.end("missing")
                return
            self.client.exchange = self
        length = coded = False
        drop = HOP_BY_HOP
        version = b"1.1"
        out = [b"HTTP/%b %d %b\r\n" % (version, status, reason)]
        append = out.append
        for name, value in self.fields:
            lower = name.lower()
            if lower in drop:
                if lower == b"transfer-encoding":
                    coded = True
                elif lower == b"connection":
                    named = value.lower()
                    if named not in (b"close", b"keep-alive"):
                        drop = drop | {t.strip() for t in named.split(b",")}
                continue
            if lower == b"content-length":
                length = True
            elif lower == b"x-pulse-selected-deployment" and self.upstream.deployment.header:
                continue
            append(name + b": " + value + b"\r\n")
        if drop is not HOP_BY_HOP:  # Connection may name a header that stood before it
            out[1:] = [line for line in out[1:] if line.partition(b":")[0].lower() not in drop]
        append(self.upstream.deployment.header)
        if incoming.visitor:
            out += visitor_cookie(incoming, self.fields)
        empty = self.head_only or status in (204, 304)
        self.keep = parser.should_keep_alive()
        self.until_close = not (length or coded or empty)
        if self.until_close:
            self.keep = False
        if not length and not empty:
            if self.version_10:
                self.close = True  # nothing but the end of the connection can end this body
            else:
                self.chunked = True
                append(CHUNKED)
        elif coded and self.head_only and not self.version_10:
            append(CHUNKED)
        if not incoming.keep_alive or self.close:
            self.close = True
            append(b"connection: close\r\n")
        append(b"\r\n")
        self.out = out
        self.answered_at = time.monotonic()
        self.started = incoming.begun = True
        incoming.expects_continue = False
        if self.go_ahead:
            self.go_ahead.set()
        if self.head_only:
            self.end("ok")

    def informational(self, status: int, reason: bytes) -> None:
        if status == 100:
            if self.go_ahead:
                self.go_ahead.set()  # reading the body sends the client its own 100
        elif not self.version_10:
            head = [b"HTTP/1.1 %d %b\r\n" % (status, reason)]
            head += [n + b": " + v + b"\r\n" for n, v in self.fields if n.lower() not in HOP_BY_HOP]
            self.client.transport.write(b"".join([*head, b"\r\n"]))

    def on_body(self, chunk: bytes) -> None:
        if self.finished:
            self.keep = False
            return
        self.bytes_out += len(chunk)
        if self.chunked:
            self.out += (b"%x\r\n" % len(chunk), chunk, b"\r\n")
        else:
            self.out.append(chunk)

    def on_message_complete(self) -> None:
        if self.finished or self.status < 200:
            return
        if self.chunked:
            self.out.append(b"0\r\n\r\n")  # trailers, if there were any, end here
        self.end("ok")

    def flush(self) -> None:
        """Write what one read brought, in one go."""
        out = self.out
        if out:
            self.out = []
            self.client.transport.write(out[0] if len(out) == 1 else b"".join(out))
            self.client.touched = self.client.loop.time()
            if self.client.stalled_since and not self.finished:
                self.upstream.transport.pause_reading()
        if self.finished:
            self.release()

    def upstream_lost(self) -> None:
        if self.finished:
            return
        if self.started and self.until_close:
            if self.chunked:
                self.out.append(b"0\r\n\r\n")
            self.end("ok")
            self.flush()
        elif self.started:
            self.broken("the backend broke its answer off")
        else:
            self.end("reset" if self.upstream.reused else "lost")
            self.release()

    def broken(self, why: str) -> None:
        """Too late for another answer: what the client has must not look complete."""
        if self.finished:
            return
        if self.started:
            log.warning("%s: %s", self.upstream.deployment.id, why)
            tally = self.upstream.deployment.tally
            tally.failed += 1
            tally.erred("broken_off")
            self.flush()
            if self.version_10:  # nothing else would tell it from a complete answer
                reset(self.client.transport)
            else:
                self.client.transport.close()
            self.end("broken")
        else:
            self.end("lost")
        self.keep = False
        self.release()

    def check_time(self) -> None:
        """Give up on a backend that does not begin to answer, or falls silent in its answer."""
        limit = HANDSHAKE_TIMEOUT if self.incoming.handshake else RESPONSE_TIMEOUT
        if self.finished or time.monotonic() - (self.heard or self.began) <= limit:
            return
        if not self.started:
            self.give_up()
        elif not self.client.stalled_since:  # else it is the client that is slow
            self.broken("the backend fell silent in its answer")

    def give_up(self) -> None:
        if not self.started and not self.finished:
            self.end("timeout")
            self.keep = False
            self.release()

    # -- from the client -----------------------------------------------------------------------

    def client_lost(self) -> None:
        if not self.finished:
            self.end("gone")
            self.keep = False
            self.release()

    def client_writable(self) -> None:
        if not self.finished and not self.upstream.transport.is_closing():
            self.upstream.transport.resume_reading()

    # -- the end -------------------------------------------------------------------------------

    def end(self, outcome: str) -> None:
        self.finished = True
        self.outcome = outcome

    def let_go(self) -> None:
        self.upstream.exchange = None
        if self.client.exchange is self:
            self.client.exchange = None
        del self.parser  # the two hold each other

    def release(self) -> None:
        """Part the two connections. The upstream goes back to the pool or is closed."""
        upstream, client = self.upstream, self.client
        if upstream.exchange is not self:
            return
        self.let_go()
        if self.go_ahead:
            self.go_ahead.set()
        if self.writable:
            self.writable.set()
        sending = self.incoming.more_body or self.incoming.body
        # the body of an answer that was held back is still on its way
        unread = self.spared and not self.head_only
        pool = upstream.deployment.idle
        if (
            self.keep
            and not sending
            and not unread
            and not upstream.transport.is_closing()
            and len(pool) < UPSTREAM_IDLE_LIMIT
        ):
            upstream.idle_since = client.loop.time()
            pool.append(upstream)
        else:
            upstream.transport.abort()
        self.then(self)

    # -- to the upstream -----------------------------------------------------------------------

    def send(self, head: list[bytes]) -> asyncio.Task[None] | None:
        """Send the request: at once where all of it is here, else its body by a task."""
        incoming, write = self.incoming, self.upstream.transport.write
        chunked = head[-2] == CHUNKED
        if incoming.more_body or len(incoming.body) > BODY_AHEAD:
            if incoming.expects_continue:
                self.go_ahead = asyncio.Event()
            self.writable = asyncio.Event()
            self.writable.set()
            write(b"".join(head))
            return self.client.loop.create_task(self.send_body(chunked))
        if incoming.body:
            body, incoming.body = bytes(incoming.body), bytearray()
            head = [*head, b"%x\r\n%b\r\n" % (len(body), body) if chunked else body]
        write(b"".join([*head, b"0\r\n\r\n"] if chunked else head))
        return None

    async def send_body(self, chunked: bool) -> None:
        """Copy the body as it comes in, at the pace the backend takes it."""
        incoming, write = self.incoming, self.upstream.transport.write
        if self.go_ahead:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.go_ahead.wait(), CONTINUE_TIMEOUT)
            if self.started:
                return
        while not self.finished and (piece := await incoming.read()):
            if self.finished:
                return  # type: ignore[unreachable]  # it changes while we wait
            write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if self.writable:
                await self.writable.wait()
        if chunked and not (self.finished or incoming.more_body or incoming.gone):
            write(b"0\r\n\r\n")


def request_head(incoming: Incoming, deployment: Deployment) -> list[bytes]:
    """The lines of the request for the backend: the client's, byte for byte and in order, less
    the hop-by-hop ones, plus the forwarding headers that the edge has not set."""
    url = incoming.url
    if not url.startswith(b"/"):  # absolute-form and `*`
        asked = b"?" in url.partition(b"#")[0]
        url = incoming.path + (b"?" + incoming.query if asked else b"")
    out = [incoming.method, b" ", url, b" HTTP/1.1\r\n"]
    drop = HOP_BY_HOP
    host = forwarded_for = forwarded_proto = forwarded_host = coded = None
    for name, lower, value in incoming.fields:
        if lower in drop:
            if lower == b"connection":
                named = value.lower()
                if named not in (b"keep-alive", b"close", b"upgrade", b"keep-alive, upgrade"):
                    drop = drop | ({t.strip() for t in named.split(b",")} - NOT_NAMED_AWAY)
            elif lower == b"transfer-encoding":
                coded = True
            continue
        if lower in FORWARDED:
            if lower == b"host":
                host = value
            elif lower == b"x-forwarded-for":
                forwarded_for = value
            elif lower == b"x-forwarded-proto":
                forwarded_proto = value
            else:
                forwarded_host = value
        out.append(name + b": " + value + b"\r\n")
    if drop is not HOP_BY_HOP:  # Connection may name a header that stood before it
        out[4:] = [line for line in out[4:] if line.partition(b":")[0].lower() not in drop]
    if host is None:  # HTTP/1.0
        out.append(b"host: " + deployment.authority.encode() + b"\r\n")
    elif forwarded_host is None:
        out.append(b"x-forwarded-host: " + host + b"\r\n")
    if forwarded_for is None and incoming.client.peer:
        out.append(b"x-forwarded-for: " + incoming.client.peer + b"\r\n")
    if forwarded_proto is None:
        out.append(b"x-forwarded-proto: http\r\n")
    if coded:
        out.append(CHUNKED)
    if incoming.handshake:
        out.append(b"connection: Upgrade\r\nupgrade: websocket\r\n")
    out.append(b"\r\n")
    return out


FORWARDED = frozenset((b"host", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"))
SAFE_TO_REPEAT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))


def repeatable(incoming: Incoming) -> bool:
    """May it be sent once more, where a pooled connection had died (RFC 9110 section 9.2.2)?"""
    return incoming.method in SAFE_TO_REPEAT and not (incoming.more_body or incoming.body)


def from_pool(incoming: Incoming, deployment: Deployment) -> Upstream | None:
    if incoming.handshake:
        return None
    return pooled(deployment, UPSTREAM_IDLE if repeatable(incoming) else UNSAFE_IDLE)


async def forward(
    incoming: Incoming,
    deployment: Deployment,
    spare: str = "",
    patience: float | None = None,
    *,
    fresh: bool = False,
) -> str:
    """Send the client's request to a deployment and its answer back, on a `fresh` connection or a
    pooled one. Returns how it ended, as `Exchange` has it; raises UpstreamError where nothing has
    been sent to the client yet.
    """
    loop = incoming.client.loop
    again = repeatable(incoming)
    upstream = None if fresh else from_pool(incoming, deployment)
    while True:
        if upstream is None:
            upstream = await connect(deployment, patience or CONNECT_TIMEOUT)
        if incoming.gone:
            upstream.transport.abort()
            return "gone"
        done: asyncio.Future[None] = loop.create_future()

        def ended(_: Exchange, done: asyncio.Future[None] = done) -> None:
            if not done.done():
                done.set_result(None)

        exchange = Exchange(incoming, upstream, ended, spare)
        pump = exchange.send(request_head(incoming, deployment))
        hurry = patience and loop.call_later(patience, exchange.give_up)
        try:
            await done
        except asyncio.CancelledError:
            exchange.client_lost()
            raise
        finally:
            if pump:
                pump.cancel()
            if hurry:
                hurry.cancel()
        if not (exchange.outcome == "reset" and again):
            return conclude(exchange)
        upstream = None  # it had died in the pool: once more, on a new connection


def conclude(exchange: Exchange) -> str:
    """Do what is to be done when an exchange has ended. Returns and raises as `forward`."""
    incoming, deployment = exchange.incoming, exchange.upstream.deployment
    outcome = exchange.outcome
    if outcome in ("reset", "lost"):
        detail = "the deployment closed the connection without an answer"
        raise UpstreamError(502, detail, sent=True)
    if outcome == "timeout":
        raise UpstreamError(504, "the deployment did not answer in time", sent=True)
    took = time.monotonic() - exchange.began
    if exchange.status:
        tally = deployment.tally
        tally.answered(incoming.method, exchange.status, took)
        if exchange.started:
            tally.first_byte.add(exchange.answered_at - exchange.began)
    if ACCESS_LOG:
        access(incoming, exchange.status, deployment.id, exchange.bytes_out, took)
    if outcome == "ok":
        incoming.client.finish(incoming, exchange.close)
    elif outcome == "switched":
        join(incoming.client, exchange)
    return outcome


# ---------------------------------------------------------------------------------------------
# WebSockets: a handshake, then bytes.


class TunnelEnd(asyncio.Protocol):
    """One end of a tunnel. What comes in goes out at the other end.

    Each end may say that it has no more to send (a half-close), and the other goes on talking.
    The tunnel is over when both have, when either connection is lost, or when a half-closed one
    has been silent for HALF_CLOSED seconds. What is still to be written then has FLUSH seconds.
    """

    __slots__ = ("deployment", "ended", "lost", "peer", "since", "transport")
    open: ClassVar[set[TunnelEnd]] = set()  # the clients' ends, until both connections are gone

    def __init__(self, transport: asyncio.Transport, deployment: str) -> None:
        self.transport, self.deployment = transport, deployment
        self.peer: TunnelEnd = self
        self.ended = False  # it sends no more
        self.lost = False
        self.since = 0.0  # of a tunnel that is ending: the last sign of life

    def data_received(self, data: bytes) -> None:
        self.peer.transport.write(data)
        if self.peer.ended:
            self.peer.since = time.monotonic()

    def eof_received(self) -> bool:
        peer = self.peer
        self.ended, self.since = True, time.monotonic()
        if peer.ended or peer.lost or not peer.transport.can_write_eof():
            # Nobody else would close a connection whose two halves have ended: before, each
            # tunnel that closed in order kept its two descriptors.
            peer.transport.close()
            return False  # and this one closes
        if not peer.transport.is_closing():
            peer.transport.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        peer = self.peer
        self.lost = True
        if peer.lost:
            TunnelEnd.open.discard(self)
            TunnelEnd.open.discard(peer)
            METRICS.tunnels_open -= 1
        elif exc is None:
            peer.since = time.monotonic()
            peer.transport.close()
        else:
            reset(peer.transport)

    def pause_writing(self) -> None:
        if not self.peer.ended:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.peer.ended and not self.peer.transport.is_closing():
            self.peer.transport.resume_reading()

    def check_time(self, now: float) -> None:
        """End what would otherwise last for ever: see above."""
        near, far = self, self.peer
        if near.lost or far.lost:
            if now - max(near.since, far.since) > FLUSH:
                near.transport.abort()
                far.transport.abort()
        elif (near.ended or far.ended) and now - max(near.since, far.since) > HALF_CLOSED:
            near.transport.abort()
            far.transport.abort()


def join(client: Client, exchange: Exchange) -> None:
    """The backend said 101: pass that on and let the bytes run.

    After any other answer a connection ends: nothing sent behind a handshake that was refused may
    pass the router unread.
    """
    upstream = exchange.upstream
    head = [b"HTTP/1.1 101 Switching Protocols\r\n"]
    head += [n + b": " + v + b"\r\n" for n, v in exchange.fields]
    head += [upstream.deployment.header, b"\r\n", exchange.tail]
    exchange.incoming.begun = exchange.incoming.answered = True
    client.connections.discard(client)
    Client.instances.discard(client)
    if client.transport.is_closing() or upstream.transport.is_closing():
        client.transport.close()  # one end has gone meanwhile
        upstream.transport.close()
        return
    name = upstream.deployment.id
    near, far = TunnelEnd(client.transport, name), TunnelEnd(upstream.transport, name)
    near.peer, far.peer = far, near
    near.transport.write(b"".join(head))
    if client.early:
        far.transport.write(client.early)
    for end in (near, far):
        end.transport.set_protocol(end)
        end.transport.resume_reading()
    METRICS.tunnels_open += 1
    METRICS.tunnels_opened += 1
    upstream.deployment.tally.tunnels += 1
    TunnelEnd.open.add(near)


# ---------------------------------------------------------------------------------------------
# Which deployment gets a request.

QUERY_AFFINITY = re.compile(rb"(?:^|&)" + AFFINITY_QUERY.encode() + rb"=([^&]*)")
QUERY_RELOAD = re.compile(rb"(?:^|&)" + RELOAD_QUERY.encode() + rb"=1(?:&|$)")
SUSPECT_PATH = re.compile(rb"_pulse|//|/\.|[%\\;]", re.IGNORECASE)
OWN_HEALTH_PATH = ROUTER_HEALTH_PATH.encode()
ACCESS_LOG = os.environ.get("PULSE_RAILWAY_ACCESS_LOG", "") not in ("", "0", "false")
ASSET_PREFIXES = tuple(
    p.encode() for p in os.environ.get("PULSE_RAILWAY_ASSET_PREFIXES", "/assets/").split(",") if p
)


def affinity(incoming: Incoming) -> bytes:
    """The deployment id that a request carries, query before header, or nothing."""
    query = incoming.query
    if query and (found := QUERY_AFFINITY.search(query)) and found[1]:
        return urllib.parse.unquote_to_bytes(found[1])
    for _, name, value in incoming.fields:
        if name == b"x-pulse-deployment":
            return value.strip()
    return b""


def is_internal(raw: bytes) -> bool:
    """Is this the internal prefix, in any spelling that a backend could undo?"""
    if not SUSPECT_PATH.search(raw):
        return False
    path = raw.decode("latin-1")
    for _ in range(5):  # decoded more than once on the way
        path, before = urllib.parse.unquote(path), path
        if path == before:
            break
    kept: list[str] = []
    for part in path.replace("\\", "/").split("/"):
        part = part.split(";")[0].strip()
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part.lower())
    return "/".join(["", *kept, ""]).startswith(INTERNAL_PREFIX + "/")


def local_location(value: str, host: str) -> str | None:
    """A redirect target on this host, or None: `x-pulse-client-loader-location` is the client's
    word, and an open redirect would be worth having for a phisher."""
    if re.search(r"[\x00-\x20\x7f\\]", value):
        return None
    url = urllib.parse.urlsplit(value)
    if not url.scheme and not url.netloc:
        return value if value.startswith("/") and not value.startswith("//") else None
    if url.scheme in ("http", "https") and url.netloc.lower() == host.lower():
        return value
    return None


def route(incoming: Incoming) -> None:
    """Send a request on its way: at once where nothing has to be waited for, else in a task."""
    METRICS.requests += 1
    client, path = incoming.client, incoming.path
    if path == OWN_HEALTH_PATH:
        client.answer(incoming, JSONResponse({"ok": TABLE.ready}, 200 if TABLE.ready else 503))
        return
    if is_internal(path):
        client.answer(incoming, plain(404))
        return
    table = TABLE
    if table.maintenance and not passes(incoming):
        client.answer(incoming, table.maintenance.answer(incoming))
        return
    if name := affinity(incoming):
        target = table.deployments.get(name)
    else:
        target = table.active if table.canary is None else chosen(incoming)
    simple = target and not incoming.more_body and not spare_for(incoming, name)
    if target and simple and (upstream := from_pool(incoming, target)):
        exchange = Exchange(incoming, upstream, functools.partial(at_end, name))
        exchange.send(request_head(incoming, target))
    else:
        client.spawn(handle(incoming, name))


def at_end(name: bytes, exchange: Exchange) -> None:
    """What was sent on its way at once has ended."""
    incoming = exchange.incoming
    if exchange.outcome == "reset" and repeatable(incoming):
        incoming.client.spawn(handle(incoming, name, fresh=True))
        return
    target = exchange.upstream.deployment
    try:
        conclude(exchange)
    except UpstreamError as error:
        answer_for(incoming, target, error)


# -- without affinity: the active deployment, or the canary ------------------------------------


def chosen(incoming: Incoming) -> Deployment | None:
    """The deployment of a request that names none. While there is a canary, its visitor is drawn
    for, with the same outcome in every router: a page, its assets, its `fetch` calls and its
    socket all get the same one."""
    if TABLE.canary is None:
        return TABLE.active
    known, visitor = visitor_of(incoming)
    if not known:
        incoming.visitor = visitor
    return TABLE.canary if drawn(visitor, TABLE.canary.id, TABLE.weight) else TABLE.active


def drawn(visitor: bytes, deployment_id: str, weight: float) -> bool:
    """Is this visitor among the `weight` percent that get the canary? Whoever is at one weight is
    at every larger one; another canary draws anew."""
    digest = hashlib.blake2b(visitor, digest_size=8, key=deployment_id.encode()).digest()
    return int.from_bytes(digest) < weight / 100 * (1 << 64)


VISITOR = re.compile(rb"(?:^|;) *" + VISITOR_COOKIE.encode() + rb"=([0-9a-f]{16})(?:;|$)")


def visitor_of(incoming: Incoming) -> tuple[bool, bytes]:
    """Who asks, and whether a cookie of ours said so. Without one, it is client address and user
    agent, which the cookie then fixes: the address may change. An app's own session cookie would
    not do, since it comes with the first page, and the page's assets would be drawn for anew."""
    address = agent = forwarded = b""
    for _, name, value in incoming.fields:
        if name == b"cookie":
            if found := VISITOR.search(value):
                return True, found[1]
        elif name == b"user-agent":
            agent = value
        elif name == b"x-real-ip":  # Railway's edge sets it
            address = value
        elif name == b"x-forwarded-for":
            forwarded = value.partition(b",")[0].strip()
    who = (address or forwarded or incoming.client.peer) + b"\n" + agent
    return False, hashlib.blake2b(who, digest_size=8).hexdigest().encode()


def visitor_cookie(incoming: Incoming, fields: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The header line that gives a visitor its cookie, with a page: other answers may be kept in
    caches that many share."""
    for name, value in fields:
        if name.lower() == b"content-type" and value.strip().lower().startswith(b"text/html"):
            secure = b""
            for _, lower, proto in incoming.fields:
                if lower == b"x-forwarded-proto" and proto.strip().lower() == b"https":
                    secure = b"; Secure"
            cookie = VISITOR_COOKIE.encode() + b"=" + incoming.visitor
            life = b"; Path=/; Max-Age=2592000; HttpOnly; SameSite=Lax"
            return [b"set-cookie: " + cookie + life + secure + b"\r\n"]
    return []


# -- maintenance -------------------------------------------------------------------------------

PAGE = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<title>Back soon</title><style>body{font:18px system-ui;margin:20vh auto;max-width:32em;"
    "padding:0 1em;text-align:center}</style><h1>Back soon</h1><p>We are working on it. This page"
    " tries again by itself."
)
INTERNAL_TOKEN = os.environ.get("PULSE_RAILWAY_INTERNAL_TOKEN", "").encode()


@dataclass(frozen=True)
class Maintenance:
    """What everybody gets while the app is not to be used."""

    page: bytes
    retry_after: int  # seconds

    def answer(self, incoming: Incoming) -> Response:
        headers = {"retry-after": str(self.retry_after), "cache-control": "no-store"}
        for _, name, value in incoming.fields:
            if name == b"accept" and b"text/html" in value:
                return Response(self.page, 503, headers, "text/html; charset=utf-8")
        return JSONResponse({"detail": "maintenance"}, 503, headers)


def maintenance(state: State) -> Maintenance | None:
    if MAINTENANCE not in state:
        return None
    said = _object(state, MAINTENANCE)
    retry_after = int(said.get("retry_after") or 30)
    page = str(said.get("page") or f"<meta http-equiv=refresh content={retry_after}>{PAGE}")
    return Maintenance(page.encode(), retry_after)


def passes(incoming: Incoming) -> bool:
    """Does this get to the app in maintenance too? Its health check does, and who shows the
    internal token: `deploy` looks at the version that it brings up."""
    if incoming.path == HEALTH_PATH.encode():
        return True
    return bool(INTERNAL_TOKEN) and any(
        name == b"x-pulse-railway-internal-token" and hmac.compare_digest(value, INTERNAL_TOKEN)
        for _, name, value in incoming.fields
    )


# -- a request that has to wait ----------------------------------------------------------------


async def handle(incoming: Incoming, name: bytes, *, fresh: bool = False) -> None:
    """Answer a request that something has to be waited for: a name, a connection, another one."""
    target = await TABLE.find(name) if name else chosen(incoming)
    if target is None and incoming.handshake and QUERY_RELOAD.search(incoming.query):
        METRICS.stale += 1
        target = TABLE.active  # which tells the tab to reload
    if target is None:
        incoming.client.answer(incoming, no_target(incoming, name))
        return
    try:
        await answered_by(incoming, target, name, fresh)
    except UpstreamError as error:
        active = TABLE.active
        drawn = not name and target is not active and not incoming.begun
        if drawn and active and (not error.sent or (error.status == 502 and repeatable(incoming))):
            target.tally.failed += 1  # a canary that is down costs no visitor anything
            target.tally.erred(error.kind)
            try:
                await answered_by(incoming, active, name)
            except UpstreamError as also:
                answer_for(incoming, active, also)
        else:
            answer_for(incoming, target, error)


async def answered_by(
    incoming: Incoming, target: Deployment, name: bytes, fresh: bool = False
) -> None:
    """Have a deployment answer, or another one what it lacks. Raises as `forward`."""
    spare = spare_for(incoming, name)
    lacks = await forward(incoming, target, spare, fresh=fresh) == "missing"
    if lacks and not await elsewhere(incoming, target, spare):
        await forward(incoming, target)


def answer_for(incoming: Incoming, target: Deployment, error: UpstreamError) -> None:
    """The answer where a backend gave none."""
    METRICS.errors += 1
    target.tally.erred(error.kind)
    response = plain(error.status, error.detail)
    response.raw_headers.append((SELECTED_HEADER.encode(), target.id.encode()))
    incoming.client.answer(incoming, response, instead_of=target)


def spare_for(incoming: Incoming, name: bytes) -> str:
    """Is this something that another deployment may have where the one asked has not?"""
    if name or len(TABLE.deployments) < 2 or incoming.method not in (b"GET", b"HEAD"):
        return ""
    if incoming.more_body or incoming.body:
        return ""  # it could be sent only once
    if incoming.path.startswith(ASSET_PREFIXES):
        return ASSET
    return DISCOVERY if incoming.path.endswith(DISCOVERY_PATH) else ""


async def elsewhere(incoming: Incoming, asked: Deployment, spare: str) -> bool:
    """Ask the other live deployments for what the one asked lacks: the next one as soon as one
    says no, or beside one that takes its time. The first that has it answers. Did one?"""
    loop, path = incoming.client.loop, incoming.url
    others = collections.deque(TABLE.others(asked, path))
    asking: dict[asyncio.Task[str], Deployment] = {}
    try:
        while asking or (others and not incoming.gone):
            if others and not incoming.begun:
                other = others.popleft()
                asking[loop.create_task(forward(incoming, other, spare, SPARE_TIMEOUT))] = other
            done, _ = await asyncio.wait(
                asking,
                timeout=SPARE_PAUSE if others else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                other = asking.pop(task)
                try:
                    if task.result() != "missing":
                        TABLE.remember(path, other)
                        return True
                except UpstreamError:  # down or frozen: not every asset of a page waits for it
                    other.unwell = time.monotonic() + UNWELL_SECONDS
        return incoming.gone
    finally:
        for task in asking:
            task.cancel()


def no_target(incoming: Incoming, name: bytes) -> Response:
    """What a request gets whose deployment is not known."""
    if not TABLE.ready:
        why = "the routing state is lost" if TABLE.loaded else "not loaded yet"
        return JSONResponse({"detail": why}, 503, headers={"retry-after": "1"})
    if not name or TABLE.active is None:
        return plain(404, "deployment not found")
    METRICS.stale += 1
    headers = Headers(raw=[(lower, value) for _, lower, value in incoming.fields])
    location = headers.get(CLIENT_LOADER_LOCATION_HEADER)
    if headers.get(CLIENT_LOADER_HEADER) == "1" and location:
        host = headers.get("x-forwarded-host") or headers.get("host") or ""
        if target := local_location(location, host):
            return Response(status_code=302, headers={"location": target})
    answer = {STALE_HEADER: "1"}
    if origin := headers.get("origin"):
        answer |= {
            "access-control-allow-origin": origin,
            "access-control-allow-credentials": "true",
            "access-control-expose-headers": STALE_HEADER,
            "vary": "Origin",
        }
    wanted = headers.get("access-control-request-method")
    if incoming.method == b"OPTIONS" and wanted:
        answer["access-control-allow-methods"] = wanted
        if asked := headers.get("access-control-request-headers"):
            answer["access-control-allow-headers"] = asked
        return Response(status_code=204, headers=answer)
    return JSONResponse({"detail": "stale affinity"}, 409, headers=answer)


ASSET, DISCOVERY = "asset", "discovery"
DISCOVERY_PATH = b"/__manifest"


def lacking(spare: str, path: bytes, status: int, fields: list[tuple[bytes, bytes]]) -> bool:
    """Does this answer say that the deployment does not have what was asked for?

    An asset: a 404, or a page in place of a file, which is what an app with a catch-all route
    gives. React Router's route discovery (a question for a build's own routes): a 204 that asks
    for a reload, since the build is another one.
    """
    if spare == DISCOVERY:
        return status == 204 and any(n.lower() == b"x-remix-reload-document" for n, _ in fields)
    if status == 404:
        return True
    if status != 200 or path.endswith((b".html", b".htm")):
        return False
    return any(
        n.lower() == b"content-type" and v.strip().lower().startswith(b"text/html")
        for n, v in fields
    )


# ---------------------------------------------------------------------------------------------
# The access log: JSON lines on stdout, as Railway reads them.


class AccessLog:
    """Lines wait here for a fraction of a second and are written by a thread, so that a slow reader
    holds no request up. Above `rate` lines a second, of which Railway drops what is over 500 of a
    replica, every n-th is written and says so (`sample`); errors always are."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.lines: list[str] = []
        self.seen = self.kept = self.dropped = 0  # in this second, but for `dropped`
        self.sample = 1
        self.idle = threading.Event()  # nothing is being written
        self.idle.set()

    def takes(self, error: bool) -> bool:
        """Is the next line to be written? Asked before it is made."""
        self.seen += 1
        too_many = not error and (self.seen % self.sample or self.kept >= self.rate)
        if too_many or len(self.lines) >= LOG_AHEAD:
            self.dropped += 1
            return False
        return True

    def add(self, line: Record, error: bool) -> None:
        self.kept += 1
        if self.sample > 1 and not error:
            line["sample"] = self.sample
        self.lines.append(json.dumps(line) + "\n")

    def second(self) -> None:
        """The next second begins: how much of it can be written is known from the one before."""
        self.sample = -(-self.seen // self.rate) or 1
        self.seen = self.kept = 0

    def flush(self) -> None:
        if self.lines and self.idle.is_set():
            self.idle.clear()
            text, self.lines = "".join(self.lines), []
            # a daemon, since nobody may read what it writes, and the process has to end
            threading.Thread(target=self.write, args=(text.encode(),), daemon=True).start()

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            while data:
                data = data[os.write(1, data) :]
        self.idle.set()

    async def run(self) -> None:
        try:
            for turn in itertools.count(1):
                await asyncio.sleep(LOG_FLUSH)
                self.flush()
                if turn % round(1 / LOG_FLUSH) == 0:
                    self.second()
        finally:
            for _ in range(2):  # what is being written, and what came meanwhile
                self.idle.wait(0.5)
                self.flush()
            self.idle.wait(0.5)


LOG = AccessLog(LOG_RATE)


def access(incoming: Incoming, status: int, deployment: str | None, size: int, took: float) -> None:
    """Log one answer; status 0 is none, the client had gone. Paths only: a query can carry a
    secret."""
    if not LOG.takes(status >= 500):
        return
    path = urllib.parse.unquote(incoming.path.decode("latin-1"))
    method = incoming.method.decode()
    request_id = next((v for _, lower, v in incoming.fields if lower == REQUEST_ID), b"")
    LOG.add(
        {
            "message": f"{method} {path} {status or 'gone'} {took * 1000:.1f} ms",
            "level": "error" if status >= 500 else "warn" if status >= 400 else "info",
            "requestId": request_id.decode("latin-1") or None,
            "time": round(time.time(), 3),
            "method": method,
            "path": path,
            "status": status,
            "deployment": deployment,
            "bytes": size,
            "seconds": round(took, 6),
        },
        error=status >= 500,
    )


# ---------------------------------------------------------------------------------------------
# What is exported: the same numbers as Prometheus text on a port of their own, and pushed as
# OTLP. The names are OpenTelemetry's where it has one, and Prometheus' rendering of those
# (https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/).

Labels = tuple[tuple[str, str], ...]
Value = float | list[float]  # of a histogram: its counts by bucket, and the sum
Numbers = dict[tuple[str, Labels], Value]


@dataclass(frozen=True)
class Family:
    kind: str  # counter, gauge, histogram
    unit: str
    says: str

    def prometheus(self, name: str) -> str:
        suffix = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        return name.replace(".", "_") + suffix + ("_total" if self.kind == "counter" else "")


FAMILIES = {
    "http.server.request.duration": Family("histogram", "s", "Requests, until their answer ended"),
    "http.server.active_requests": Family("gauge", "{request}", "Requests under way"),
    "pulse.router.first_byte.duration": Family(
        "histogram", "s", "Requests, until their answer began"
    ),
    "pulse.router.upstream.errors": Family("counter", "{error}", "What deployments did wrong"),
    "pulse.router.websockets": Family("gauge", "{connection}", "Open WebSockets"),
    "pulse.router.websockets.opened": Family("counter", "{connection}", "WebSockets opened"),
    "pulse.router.stale": Family(
        "counter", "{request}", "Requests of tabs of a removed deployment"
    ),
    "pulse.router.connections": Family(
        "gauge", "{connection}", "Connected clients, less WebSockets"
    ),
    "pulse.router.connections.refused": Family(
        "counter", "{connection}", "Clients turned away at the limit"
    ),
    "pulse.router.log.dropped": Family("counter", "{line}", "Lines left out of the access log"),
    "pulse.router.table.age": Family("gauge", "s", "Since the routing state was last read"),
    "pulse.router.deployments": Family("gauge", "{deployment}", "Deployments by state"),
    "pulse.router.sessions": Family("gauge", "{session}", "Render sessions of a deployment"),
    "process.cpu.time": Family("counter", "s", "Of the router's processes"),
    "process.memory.usage": Family("gauge", "By", "Resident memory of the router's processes"),
    "process.open_file_descriptor.count": Family("gauge", "{count}", "Open descriptors"),
}


DOTTED = {"http_request_method": "http.request.method", "error_type": "error.type"}  # OTel's own


def numbers(tab_counts: Mapping[str, int]) -> Numbers:
    """What this process has counted."""
    found: Numbers = {}

    def put(family: str, value: Value, **labels: str) -> None:
        found[family, tuple(labels.items())] = value

    def histogram(family: str, values: Histogram, **labels: str) -> None:
        put(family, [*values.counts, round(values.total, 6)], **labels)

    # "-" is no deployment: the router's own answers
    for name, tally in [("-", METRICS.own), *METRICS.tallies.items()]:
        for (method, status), values in tally.answers.items():
            labels = {"http_request_method": method.decode(), "status_class": f"{status}xx"}
            histogram("http.server.request.duration", values, deployment=name, **labels)
        if any(tally.first_byte.counts):
            histogram("pulse.router.first_byte.duration", tally.first_byte, deployment=name)
        for kind, count in tally.errors.items():
            put("pulse.router.upstream.errors", count, deployment=name, error_type=kind)
    under_way, tunnels = requests_under_way(), tunnels_by_deployment()
    for name, tally in METRICS.tallies.items():
        put("http.server.active_requests", under_way[name], deployment=name)
        put("pulse.router.websockets", tunnels[name], deployment=name)
        put("pulse.router.websockets.opened", tally.tunnels, deployment=name)
    put("pulse.router.stale", METRICS.stale)
    put("pulse.router.connections", len(Client.instances))
    put("pulse.router.connections.refused", METRICS.turned_away)
    put("pulse.router.log.dropped", LOG.dropped)
    put("pulse.router.table.age", round(time.monotonic() - TABLE.loaded_at, 3))
    states = collections.Counter(entry.state for entry in TABLE.deployments.values())
    for state in ("pending", "active", "draining"):
        put("pulse.router.deployments", states[state], state=state)
    for name, count in tab_counts.items():
        put("pulse.router.sessions", count, deployment=name)
    put("process.cpu.time", round(time.process_time(), 3))
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
        put("process.memory.usage", int(statm.read().split()[1]) * resource.getpagesize())
        put("process.open_file_descriptor.count", open_descriptors())
    return found


def open_descriptors() -> int:
    """Counting many takes milliseconds, so it is done now and then."""
    if time.monotonic() > METRICS.descriptors_until:
        METRICS.descriptors = len(os.listdir("/proc/self/fd"))
        METRICS.descriptors_until = time.monotonic() + DESCRIPTORS_EVERY
    return METRICS.descriptors


def prometheus(found: Numbers) -> str:
    """Prometheus' text format."""
    lines = []
    for name, family in FAMILIES.items():
        title = family.prometheus(name)
        points = [(labels, v) for (other, labels), v in found.items() if other == name]
        if points:
            lines += [f"# HELP {title} {family.says}", f"# TYPE {title} {family.kind}"]
        for labels, value in points:
            pairs = [f'{label}="{said}"' for label, said in labels]
            braces = "{" + ",".join(pairs) + "}" if pairs else ""
            if not isinstance(value, list):
                lines.append(f"{title}{braces} {value}")
                continue
            *counts, total = value
            for bound, count in zip((*BUCKETS, "+Inf"), itertools.accumulate(counts), strict=True):
                bucket = ",".join([*pairs, f'le="{bound}"'])
                lines.append(f"{title}_bucket{{{bucket}}} {count}")
            lines += [f"{title}_sum{braces} {total}", f"{title}_count{braces} {sum(counts)}"]
    return "\n".join(lines) + "\n"


def otlp(found: Numbers, resource_attributes: Mapping[str, str]) -> Record:
    """An ExportMetricsServiceRequest in OTLP's JSON encoding, in which 64-bit integers are text."""
    now = str(time.time_ns())
    began = str(int(METRICS.started_at * 1e9))

    def attributes(labels: Iterable[tuple[str, str]]) -> list[Record]:
        return [{"key": key, "value": {"stringValue": value}} for key, value in labels]

    def point(labels: Labels, value: Value) -> Record:
        dotted = ((DOTTED.get(key, key), said) for key, said in labels)
        at = {"attributes": attributes(dotted), "startTimeUnixNano": began, "timeUnixNano": now}
        if isinstance(value, list):
            *counts, total = value
            said = {"count": str(sum(counts)), "sum": total, "explicitBounds": list(BUCKETS)}
            return {**at, **said, "bucketCounts": [str(count) for count in counts]}
        return {**at, **({"asDouble": value} if value % 1 else {"asInt": str(int(value))})}

    metrics: list[Record] = []
    for name, family in FAMILIES.items():
        points = [point(labels, v) for (other, labels), v in found.items() if other == name]
        about: Record = {"aggregationTemporality": 2, "dataPoints": points}  # cumulative
        if family.kind == "counter":
            data = {"sum": {**about, "isMonotonic": True}}
        elif family.kind == "histogram":
            data = {"histogram": about}
        else:
            data = {"gauge": {"dataPoints": points}}
        if points:
            metrics.append({"name": name, "unit": family.unit, "description": family.says, **data})
    return {
        "resourceMetrics": [
            {
                "resource": {"attributes": attributes(resource_attributes.items())},
                "scopeMetrics": [{"scope": {"name": "pulse-railway"}, "metrics": metrics}],
            }
        ]
    }


def push_target(env: Mapping[str, str] = os.environ) -> tuple[str, dict[str, str]] | None:
    """Where OTLP is pushed to, and with which headers, by OpenTelemetry's own variables; None for
    nowhere. Raises SystemExit for an address that is none."""
    endpoint = env.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT") or ""
    if not endpoint and (base := env.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        endpoint = base.rstrip("/") + "/v1/metrics"
    if not endpoint:
        return None
    if not re.match(r"https?://[^/]", endpoint):
        raise SystemExit("OTEL_EXPORTER_OTLP_ENDPOINT takes an address with http:// or https://")
    pairs = (env.get("OTEL_EXPORTER_OTLP_HEADERS") or "").split(",")
    headers = {
        name.strip(): urllib.parse.unquote(value.strip())
        for name, mark, value in (pair.partition("=") for pair in pairs)
        if mark
    }
    return endpoint, headers


def about_this_router(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """OTLP's resource attributes."""
    pairs = (pair.partition("=") for pair in (env.get("OTEL_RESOURCE_ATTRIBUTES") or "").split(","))
    said = {name.strip(): urllib.parse.unquote(value) for name, mark, value in pairs if mark}
    name = env.get("OTEL_SERVICE_NAME") or env.get("RAILWAY_SERVICE_NAME") or "pulse-router"
    return {"service.name": name, "service.instance.id": METRICS.name, **said}


class Exporter:
    """Hands out what this router has counted: to whoever scrapes `port`, and by pushing."""

    def __init__(self, port: socket.socket | None) -> None:
        self.port = port
        self.push_to = push_target()
        self.every = seconds("OTEL_METRIC_EXPORT_INTERVAL", 60_000) / 1000
        self.tab_counts: dict[str, int] = {}
        self.tabs_asked = 0.0
        self.asking: asyncio.Task[None] | None = None
        self.unsaid = True  # that the receiver does not answer

    async def count_tabs(self) -> None:
        """Ask the deployments for their sessions, now and then, and wait for it for a moment."""
        now = time.monotonic()
        if now - self.tabs_asked > TABS_EVERY and (self.asking is None or self.asking.done()):
            self.tabs_asked = now
            self.asking = asyncio.get_running_loop().create_task(self.ask_tabs())
        if self.asking:
            await asyncio.wait({self.asking}, timeout=TABS_PATIENCE)

    async def ask_tabs(self) -> None:
        loop, found = asyncio.get_running_loop(), records(TABLE.raw)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            token = INTERNAL_TOKEN.decode("latin-1")
            counts = [loop.run_in_executor(pool, sessions, record, token) for record in found]
            said = zip(found, await asyncio.gather(*counts), strict=True)
        self.tab_counts = {r["deployment_id"]: count for r, count in said if count is not None}

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        server, next_push = None, time.monotonic() + min(self.every, 5.0)
        if self.port:
            state = uvicorn.server.ServerState()  # its connections hold up no end of the router's
            server = await loop.create_server(
                functools.partial(Scraped, server_state=state, exporter=self), sock=self.port
            )
        try:
            while True:
                if self.push_to and time.monotonic() >= next_push:
                    next_push = time.monotonic() + self.every
                    await self.count_tabs()
                    await self.push()
                await asyncio.sleep(1.0)
        finally:
            if self.push_to:  # what the last one did not hold yet
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.push(), LAST_PUSH)
            if server:
                server.close()

    async def push(self) -> None:
        """Send it once. What is lost is in the next one: the counts are cumulative."""
        body = json.dumps(otlp(numbers(self.tab_counts), about_this_router())).encode()
        await asyncio.get_running_loop().run_in_executor(None, self.send, body)

    def send(self, body: bytes) -> None:
        endpoint, headers = cast(tuple[str, dict[str, str]], self.push_to)
        request = urllib.request.Request(
            endpoint, body, {"content-type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=10):
                self.unsaid = True
        except (OSError, ValueError, http.client.HTTPException) as error:
            if self.unsaid:  # once, until it has answered again; its address may hold a secret
                log.error(
                    "metrics cannot be pushed (%s)", getattr(error, "code", type(error).__name__)
                )
            self.unsaid = False


class Scraped(Client):
    """A connection to the port of the metrics: the same limits, another answer."""

    def __init__(self, *, exporter: Exporter, **options: Any) -> None:
        super().__init__(**options)
        self.exporter = exporter

    def route(self, incoming: Incoming) -> None:
        self.spawn(self.scrape(incoming))

    async def scrape(self, incoming: Incoming) -> None:
        # only the private network: the edge says who it is
        from_outside = any(lower == REQUEST_ID for _, lower, _ in incoming.fields)
        if from_outside or incoming.path != b"/metrics":
            response = plain(404)
        elif incoming.method not in (b"GET", b"HEAD"):
            response = plain(405)
        else:
            await self.exporter.count_tabs()
            text = prometheus(numbers(self.exporter.tab_counts))
            response = Response(text, media_type="text/plain; version=0.0.4")
        if not self.transport.is_closing():
            close = incoming.more_body or not incoming.keep_alive
            self.say(response, close=close, head_only=incoming.method == b"HEAD")
        self.finish(incoming)


# ---------------------------------------------------------------------------------------------
# Serving.


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    host = os.environ.get("RAILWAY_REPLICA_ID") or socket.gethostname()
    METRICS.name = f"{host}-{os.getpid()}"
    tasks = [
        asyncio.create_task(TABLE.follow(store_from_env(dict(os.environ)))),
        asyncio.create_task(sweep()),
    ]
    if ACCESS_LOG:
        tasks.append(asyncio.create_task(LOG.run()))
    if exporter := cast(Exporter | None, getattr(app.state, "exporter", None)):
        tasks.append(asyncio.create_task(exporter.run()))
    try:
        with contextlib.suppress(TimeoutError):  # connections wait in the backlog meanwhile
            await asyncio.wait_for(TABLE.changed.wait(), START_TIMEOUT)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for end in list(TunnelEnd.open):
            end.transport.close()


app = Starlette(lifespan=lifespan)


def listen(host: str | None, port: int) -> socket.socket:
    """A listening socket; without a host on IPv4 and IPv6 both, where the machine has both.
    Raises SystemExit where there can be none."""
    if not host and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=2048
            )
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    try:
        return socket.create_server((host or "", port), family=family, backlog=2048)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise SystemExit(f"port {port} cannot be listened on: {why}") from None


class Server(uvicorn.Server):
    """uvicorn's server, whose shutdown does not wait for tunnels: they are closed last."""

    async def _wait_tasks_to_complete(self) -> None:
        while (self.server_state.connections or self.server_state.tasks) and not self.force_exit:
            await asyncio.sleep(0.05)


def serve_one(sock: socket.socket, exporter: Exporter | None) -> None:
    app.state.exporter = exporter
    CONNECTIONS.raise_limit(number("PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT"))
    config = uvicorn.Config(
        app,
        http=Client,
        ws="none",
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(SHUTDOWN_GRACE),
    )
    Server(config).run(sockets=[sock])


def number(variable: str) -> int | None:
    """A variable that holds a whole number from 1. Raises SystemExit for anything else."""
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not int(text):
        raise SystemExit(f"{variable} takes a whole number from 1, not {text!r}")
    return int(text)


def serve() -> None:
    port = number("PORT") or DEFAULT_PORT
    store_from_env(dict(os.environ))  # a missing variable shows before the port is taken
    number("PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT")
    metrics_port = number("PULSE_RAILWAY_METRICS_PORT")
    if metrics_port == port:
        raise SystemExit("PULSE_RAILWAY_METRICS_PORT and PORT must be two ports")
    pushes = push_target() is not None
    sock = listen(os.environ.get("HOST"), port)
    scraped = listen(os.environ.get("HOST"), metrics_port) if metrics_port else None
    if os.environ.get("PULSE_RAILWAY_ROUTER_WORKERS"):
        log.warning(
            "PULSE_RAILWAY_ROUTER_WORKERS has no effect: a router is one process, and more of them"
            " are replicas of its service"
        )
    serve_one(sock, Exporter(scraped) if scraped or pushes else None)


# ---------------------------------------------------------------------------------------------
# The app's internal endpoints, asked by the metrics, the control commands and the janitor.

# Plain HTTP and no proxies: `build_opener` would load every CA certificate, 30 ms each time.
OPENER = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.HTTPHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.HTTPDefaultErrorHandler,
):
    OPENER.add_handler(_handler())


def base_url(record: Record) -> str:
    """Where a deployment's backend is; 0.3.x wrote no address."""
    name = record.get("service_name") or record["deployment_id"]
    return record.get("address") or f"http://{name}.railway.internal:{DEFAULT_PORT}"


def ask_backend(record: Record, path: str, token: str, method: str = "GET") -> Record:
    """Call one of the app's internal endpoints, from inside the private network.

    Raises OSError or ValueError where it does not answer with a JSON object.
    """
    request = urllib.request.Request(
        base_url(record) + path, method=method, headers={INTERNAL_TOKEN_HEADER: token}
    )
    try:
        with OPENER.open(request, timeout=5) as answer:
            found = json.loads(answer.read(ANSWER_HEAD_LIMIT))
    except (http.client.HTTPException, RecursionError) as error:
        raise ValueError from error
    if not isinstance(found, dict):
        raise ValueError
    return found


def sessions(record: Record, token: str) -> int | None:
    """How many render sessions a deployment holds; None where it does not say so in a whole number:
    it is deleted where there are none."""
    try:
        count = ask_backend(record, SESSIONS_PATH, token).get("render_session_count")
    except (OSError, ValueError):
        return None
    return count if type(count) is int and count >= 0 else None


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    match argv:
        case ["control" | "janitor" as name, *rest]:
            script = os.path.join(os.path.dirname(os.path.realpath(__file__)), f"{name}.py")
            os.execv(sys.executable, [sys.executable, script, *rest])
        case []:
            serve()
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
