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
"""What changes the routing state: the steps, and the control commands that take them.

    python control.py <command>    active, status, register, promote, ...

A command runs inside the router's container (`railway ssh --service <router> -- "pulse-railway
control ..."`), or the janitor carries it out. It is one transaction on the store; then it waits
until the routers serve what it has written. The types, the parser, the writer and the merge of
two memories are router.py's, since a router heals the store.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import http.client
import json
import logging
import math
import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import redis

import ownership
import router
from router import Json, Promotion, Record, Routing, Step, Tombstone

SESSIONS_PATH = "/_pulse/internal/railway/sessions"
RELOAD_PATH = "/_pulse/internal/railway/reload"
RAILWAY_RUNTIME = ("RAILWAY_SERVICE_ID", "RAILWAY_REPLICA_ID", "RAILWAY_PRIVATE_DOMAIN")
HEAL_WAIT = 8.0  # seconds that a command waits for a router to write lost state back
REPORT_WAIT = 10.0  # seconds that a command waits until every router serves what it has written
REPORT_POLL = 0.05
SILENT_SECONDS = 60.0  # a router that has not reported for so long holds up no promotion
LATE_SECONDS = 3600.0  # in which a command may still arrive that was sent before another
OTHER_VERSION_SECONDS = 30.0  # in which a router that reports no epoch has read the state
JANITOR_LOCK = ":janitor:lock"
OUR_LOCK_PREFIX = "steps-"  # begins a holder's name whose every change is one transaction
COMMAND_LOCK_SECONDS = 30  # longer than a command takes
LEASE_AT_MOST = 3600.0  # seconds: longer than any version's router or janitor asks for
JANITOR_WAIT = 15.0  # seconds that a command waits for an older janitor to end


class StateError(Exception):
    """A control command that would leave the routing state wrong. `reason` is for programs."""

    def __init__(self, message: str, reason: str = "refused") -> None:
        super().__init__(message)
        self.reason = reason


# -- the steps ---------------------------------------------------------------------------------


def with_records(routing: Routing, *records: Record) -> Routing:
    return replace(routing, records={**routing.records, **{r.deployment_id: r for r in records}})


def is_older_than(routing: Routing, last: Promotion | None) -> bool:
    """Is `last`, what Railway says was promoted last, newer than what the store holds?"""
    if last is None or routing.promotion is None:
        return last is not None
    if routing.promotion.at != last.at:
        return routing.promotion.at < last.at
    # an earlier version of our CLI has noted its promotion without the time, or an earlier
    # janitor, late, what it had read before it was rolled back from
    differs = routing.active != last.deployment_id
    left = routing.records.get(last.deployment_id)
    if left and left.rejected_at and left.rejected_at >= last.at:
        return False
    return differs and last.at > 0 and not routing.promoted_by_other


def is_lost(routing: Routing, last: Promotion | None) -> bool:
    """Has the store lost data that a control command would take for never there?"""
    return last is not None and (routing.store_id is None or is_older_than(routing, last))


def refuse_active(routing: Routing, deployment_id: str) -> None:
    if routing.active == deployment_id:
        raise StateError(
            f"{deployment_id} is active: promote or deploy another one first", "active"
        )


def register(
    routing: Routing,
    deployment_id: str,
    service_name: str,
    address: str | None = None,
    pinned: bool = False,
    service_id: str | None = None,
    about: Json | None = None,
) -> Routing:
    """A deployment that runs but is not yet chosen: reachable by affinity only. `pinned`: it is
    meant to stay so, and the janitor does not take it for a deploy that died. `about`: its commit,
    author and message, and who deployed it.

    A command that comes late, when the deployment has been removed already, is refused: it is
    known by its Railway service. The id on a new service starts clean.
    """
    if routing.active == deployment_id:
        raise StateError(
            f"{deployment_id} is the active deployment and cannot be registered anew", "active"
        )
    record = routing.records.get(deployment_id)
    grave = routing.tombstones.get(deployment_id)
    if record and record.retiring_at:
        grave = grave or router.Tombstone(record.retiring_at, record.service_id)
    if grave:
        # 0.3.x names no service: then what comes soon after the removal was sent before it
        late = service_id is None and routing.now - grave.at < LATE_SECONDS
        if late or (service_id and service_id == grave.service_id):
            raise StateError(f"{deployment_id} was removed and cannot be registered", "removed")
        record = None
    record = record or Record(deployment_id)
    new = replace(
        record,
        state="pending",
        service_name=service_name,
        drain_started_at=None,
        registered_at=routing.now,
        pinned=pinned,
        service_id=service_id or record.service_id,
        address=address.rstrip("/") if address else record.address,
        about=about or record.about,
    )
    require_address(new)
    graves = {k: v for k, v in routing.tombstones.items() if k != deployment_id}
    return replace(with_records(routing, new), tombstones=graves)


def require_address(record: Record) -> None:
    if record.url is None:
        raise StateError(
            f"no address follows from the service name {record.service_name!r}, and none is known"
        )


def refuse_unless_active(routing: Routing, expected: str | None) -> None:
    if expected and routing.active != expected:
        raise StateError(f"{routing.active or 'none'} is active by now, not {expected}", "changed")


def promotable(routing: Routing, deployment_id: str, service_id: str | None = None) -> Record:
    """Its record. Raises StateError for one that is unknown or being removed.

    Args:
        service_id: of its service, which runs: a record that is lost is made anew.
    """
    record = routing.records.get(deployment_id)
    if record is None and deployment_id not in routing.tombstones:
        if service_id:
            record = Record(deployment_id, service_id=service_id, registered_at=routing.now)
        elif deployment_id == routing.active:
            record = routing.record_of_active()
    if record is None:
        raise StateError(
            f"{deployment_id} is not registered with the router, or was removed meanwhile: deploy"
            " it again",
            "unknown",
        )
    if record.retiring_at:
        raise StateError(f"{deployment_id} is being removed and cannot be promoted", "removed")
    return record


def set_active(
    routing: Routing,
    deployment_id: str,
    service_name: str,
    draining: list[Json],
    address: str | None = None,
    service_id: str | None = None,
    instead_of: str | None = None,
    rolls_back: bool = False,
    bake: float | None = None,
) -> Routing:
    """Make a deployment active. Only the one that was active drains; pending ones stay pending,
    and a canary that is another one gets no more visitors.

    Args:
        draining: what 0.3.x clients send: it names every other service, so it only tells the
            service name of the deployment that was active.
        instead_of: the deployment that has to be active; where another one is, nothing is done.
        rolls_back: the one that was active is no way back from here on.
        bake: watched for so many seconds; kept with the record until `finish_bake`.
    """
    hints = {item["deployment_id"]: item for item in draining}
    if deployment_id in hints:
        raise StateError(f"{deployment_id} cannot be active and draining")
    refuse_unless_active(routing, instead_of)
    record = replace(
        promotable(routing, deployment_id, service_id),
        state="active",
        service_name=service_name,
        drain_started_at=None,
        weight=None,
        rejected_at=None,
        bake=routing.now + bake if bake else None,
    )
    if address:
        record = replace(record, address=address.rstrip("/"))
    require_address(record)
    promotion = Promotion(deployment_id, router.next_time(routing))
    others = [
        replace(other, weight=None, bake=None, canary_at=routing.now)
        for name, other in routing.records.items()
        if other.weight is not None and name != deployment_id
    ]
    new = with_records(routing, *others, replace(record, promoted_at=promotion.at))
    if routing.active not in (None, deployment_id):
        hint = hints.get(str(routing.active), {})
        old = new.records.get(str(routing.active)) or Record(str(routing.active))
        old = replace(
            old.as_draining(routing.now),
            service_name=old.service_name or hint.get("service_name") or routing.active,
            rejected_at=routing.now if rolls_back else old.rejected_at,
        )
        new = with_records(new, old)
    return replace(new, active=deployment_id, promoted=promotion)


def set_canary_weight(
    routing: Routing,
    deployment_id: str,
    service_name: str,
    weight: float,
    service_id: str | None = None,
    instead_of: str | None = None,
    bake: float | None = None,
) -> Routing:
    """Give a deployment that share of the new visitors, in percent: it is the canary, of which
    there is one. It stays until it is promoted or aborted."""
    if routing.active is None:
        raise StateError("no deployment is active: promote it without a weight", "inactive")
    refuse_unless_active(routing, instead_of)
    refuse_active(routing, deployment_id)
    other = routing.canary
    if other and other.deployment_id != deployment_id:
        raise StateError(
            f"{other.deployment_id} is the canary already, with {other.weight:g} %: promote it, or"
            " `pulse-railway rollback`",
            "canary",
        )
    record = promotable(routing, deployment_id, service_id)
    until = record.bake if record.bake and record.bake > routing.now else None  # else cut off
    record = replace(
        record,
        state="pending",
        service_name=service_name,
        drain_started_at=None,
        rejected_at=None,
        pinned=True,
        weight=weight,
        canary_at=routing.now,
        bake=routing.now + bake if bake else until,
    )
    require_address(record)
    return with_records(routing, record)


def abort_canary(routing: Routing, deployment_id: str) -> Routing:
    """End a canary: nobody new gets it, and it drains."""
    record = routing.records.get(deployment_id)
    if record is None or not record.is_canary:
        raise StateError(f"{deployment_id} is no canary (any more)", "changed")
    record = replace(record.as_draining(routing.now), pinned=False, rejected_at=routing.now)
    return with_records(routing, record)


def finish_bake(routing: Routing, deployment_id: str) -> Routing:
    """The bake of a deployment is over, and it stays."""
    record = routing.records.get(deployment_id)
    if record is None:
        return routing
    return with_records(routing, replace(record, bake=None, bake_ended_at=routing.now))


def set_maintenance(
    routing: Routing, page: str | None, retry_after: int, by: str | None, off: bool = False
) -> Routing:
    """Everybody gets a page that says so, or the app again."""
    if off:
        return replace(routing, maintenance=None)
    since = routing.maintenance.since if routing.maintenance else routing.now
    return replace(routing, maintenance=router.Maintenance(since, page, retry_after, by))


def deploy_lock(routing: Routing, holder: str, by: str | None, lease: float) -> Routing:
    """Hold the deploy lock for `lease` seconds from now; who holds it already holds it for longer.
    Raises StateError where somebody else does."""
    lock, now = routing.lock, routing.now
    mine = lock is not None and lock.holder == holder
    if lock and not mine and lock.until > now:
        since = time.strftime("%H:%M:%S UTC", time.gmtime(lock.since))
        raise StateError(f"{lock.by or 'somebody'} deploys since {since}", "locked")
    since_then = lock.since if lock and mine else now
    return replace(routing, lock=router.DeployLock(holder, by, since_then, now + lease))


def unlock(routing: Routing, holder: str | None) -> Routing:
    """Give the deploy lock back; without a holder, take it from whoever has it."""
    if routing.lock and holder in (None, routing.lock.holder):
        return replace(routing, lock=None)
    return routing


def set_owner(routing: Routing, owner: str, instead_of: str | None = None) -> Routing:
    """Make the state this owner's. Raises StateError where another one has it, who is not the one
    that this is claimed from."""
    if routing.owner not in (None, owner, instead_of):
        raise StateError(f"the routing state is of {routing.owner}, and was not claimed", "owner")
    return replace(routing, owner=owner)


def is_bare(routing: Routing) -> bool:
    """Does the state hold nothing that another stack could mean?"""
    return routing.active is None and not routing.records and router.OWNER not in routing.keys


def claiming_bare(step: Step, me: str | None) -> Step:
    """`step`, which makes a state that is nobody's and holds nothing this owner's."""

    def inner(routing: Routing) -> Routing:
        return step(set_owner(routing, me) if me and is_bare(routing) else routing)

    return inner


def delete(routing: Routing, deployment_id: str) -> Routing:
    """Forget a deployment that is not active. Forgetting an unknown one changes nothing."""
    refuse_active(routing, deployment_id)
    record = routing.records.get(deployment_id)
    if record is None:
        return routing
    records = {k: v for k, v in routing.records.items() if k != deployment_id}
    return add_tombstone(replace(routing, records=records), deployment_id, record.service_id)


def add_tombstone(routing: Routing, deployment_id: str, service_id: str | None) -> Routing:
    grave = Tombstone(routing.now, service_id)
    return replace(routing, tombstones={**routing.tombstones, deployment_id: grave})


def retire(routing: Routing, deployment_id: str, service_id: str | None = None) -> Routing:
    """Take a deployment out of the routing, to be removed: from here on it can be neither
    registered nor promoted."""
    refuse_active(routing, deployment_id)
    record = routing.records.get(deployment_id)
    if record and not record.retiring_at:
        routing = with_records(routing, replace(record, retiring_at=routing.now))
    grave = routing.tombstones.get(deployment_id)
    known = record or grave
    service_id = service_id or (known.service_id if known else None)
    if grave and grave.service_id == service_id:
        return routing
    return add_tombstone(routing, deployment_id, service_id)


def retire_if_unchanged(
    routing: Routing, deployment_id: str, judged: Record | None, service_id: str | None
) -> Routing:
    """Retire a deployment, if its record still is what was judged (None: there was none)."""
    if routing.records.get(deployment_id) != judged:
        raise StateError(f"{deployment_id} has changed meanwhile", "changed")
    return retire(routing, deployment_id, service_id)


def retired_for(routing: Routing, deployment_id: str) -> float:
    """The seconds since a deployment was retired; what had no record then has a tombstone."""
    record, grave = routing.records.get(deployment_id), routing.tombstones.get(deployment_id)
    at = record.retiring_at if record else grave.at if grave else None
    return routing.now - (routing.now if at is None else at)


def mark_draining(routing: Routing, deployment_id: str, judged: Record) -> Routing:
    """A record that says active and is not the active one drains from now on."""
    if routing.records.get(deployment_id) != judged or routing.active == deployment_id:
        return routing
    return with_records(routing, judged.as_draining(routing.now))


def adopt_orphan(routing: Routing, record: Record) -> Routing:
    """A running deployment that has no record drains from now on; the active one gets its own."""
    if record.deployment_id in routing.records:
        return routing
    if routing.active == record.deployment_id:
        return with_records(routing, replace(record, state="active"))
    return with_records(routing, record.as_draining(routing.now))


def rebuild_records(
    routing: Routing,
    running: list[Record],
    active: str,
    chosen: bool = False,
    at: float | None = None,
    closed: float | None = None,
) -> Routing:
    """Rebuild lost state from records that were made of what runs on Railway. What the store knows
    already is left as it is.

    Args:
        active: what is active then; where the store has not lost it, only its record is rebuilt.
        chosen: somebody has named `active`: it is, whatever the store says.
        at: when `active` was promoted, as Railway says.
        closed: since when the site is in maintenance, as Railway says.
    """
    promoted = Promotion(active, at) if at else None
    if not chosen and routing.active and not is_older_than(routing, promoted):
        if not any(lacks(routing, made) for made in running) and routing.active in routing.records:
            raise StateError(f"{routing.active} is active: there is nothing to restore", "active")
        active, promoted = routing.active, routing.promoted
    elif chosen or promoted is None:
        promoted = Promotion(active, router.next_time(routing))
    records = dict(routing.records)
    for made in running:
        name = made.deployment_id
        if name in records:
            records[name] = fill_from(records[name], made)
        elif lacks(routing, made):
            records[name] = made if name == active else made.as_draining(routing.now)
    if active not in records:
        removed = active in routing.tombstones
        why = "is being removed: restore another one" if removed else "does not run on Railway"
        raise StateError(f"{active} {why}", "removed" if removed else "unknown")
    if records[active].retiring_at:
        raise StateError(f"{active} is being removed: restore another one", "removed")
    for name, record in records.items():
        if name == active:
            at = promoted.at if promoted else record.promoted_at
            record = replace(record, state="active", drain_started_at=None, promoted_at=at)
            records[name] = replace(record, weight=None, rejected_at=None, bake=None)
        elif record.state == "active":
            records[name] = record.as_draining(routing.now)
    maintenance = routing.maintenance or (router.Maintenance(closed) if closed else None)
    return replace(
        routing, active=active, promoted=promoted, records=records, maintenance=maintenance
    )


def lacks(routing: Routing, made: Record) -> bool:
    """Has the state lost the record of this one, which runs?"""
    return made.deployment_id not in routing.records and not routing.buries(made)


def fill_from(record: Record, made: Record) -> Record:
    """A record of the store, with what it lacks of one that was made of what runs on Railway."""
    names = ("service_name", "address", "service_id", "registered_at")
    return replace(record, **{n: getattr(made, n) for n in names if getattr(record, n) is None})


# -- around a step -----------------------------------------------------------------------------


def refuse_if_lost(step: Step, last_promoted: Promotion | None) -> Step:
    """`step`, refused where the store has lost its data: it would take what is left for all."""

    def inner(routing: Routing) -> Routing:
        if last_promoted and is_lost(routing, last_promoted):
            raise StateError(
                f"the routing state is lost, or an older one ({last_promoted.deployment_id} was"
                " promoted last): run `pulse-railway restore`",
                "lost",
            )
        return step(routing)

    return inner


def refuse_foreign(routing: Routing, me: str | None) -> Routing:
    """Raises StateError where the state is another owner's. `me` is None outside Railway."""
    if routing.is_foreign(me):
        raise StateError(ownership.foreign_words(str(routing.owner)), "owner")
    return routing


def owned(step: Step, me: str | None) -> Step:
    """`step`, refused where the state is another owner's."""
    return lambda routing: step(refuse_foreign(routing, me))


class OwnedStore(router.RedisStore):
    """The store for the steps of one owner: each is refused where the state is another's."""

    def __init__(self, url: str, prefix: str, me: str | None, ttl: int | None = None) -> None:
        super().__init__(url, prefix, ttl)
        self.me = me

    def apply(self, step: Step) -> Routing:
        return super().apply(owned(step, self.me))


def idempotent(step: Step, nonce: str) -> Step:
    """`step`, carried out once for its nonce: who lost the answer asks again."""

    def inner(routing: Routing) -> Routing:
        if nonce in routing.processed:
            return routing
        new = step(routing)
        return replace(new, processed={**new.processed, nonce: routing.now})

    return inner


def with_history(step: Step, what: str, deployment_id: str, **facts: Any) -> Step:
    """`step`, noted in the history where it changes anything."""

    def inner(routing: Routing) -> Routing:
        new = step(routing)
        if new == routing:
            return routing
        entry = {"at": routing.now, "what": what, "deployment_id": deployment_id}
        entry["active"] = routing.active  # until then
        entry |= {key: str(value)[:300] for key, value in facts.items() if value}
        return replace(new, history=(*new.history, entry)[-router.HISTORY_AT_MOST :])

    return inner


def with_unlock(step: Step, holder: str) -> Step:
    """`step`, and the deploy lock given back, at once."""
    return lambda routing: step(unlock(routing, holder))


# -- the app's internal endpoints ---------------------------------------------------------------


def ask_backend(record: Record, path: str, token: str, method: str = "GET") -> Json:
    """Call one of the app's internal endpoints, from inside the private network.

    Raises OSError or ValueError where it does not answer with a JSON object.
    """
    try:
        status, body = backend_answer(record, path, {router.INTERNAL_TOKEN_HEADER: token}, method)
    except http.client.HTTPException as error:
        raise ValueError from error
    if status != 200:
        raise ValueError
    return router.json_object(body)


def backend_answer(
    record: Record, path: str, headers: Mapping[str, str], method: str = "GET"
) -> tuple[int, bytes]:
    """Status and body. Raises OSError, ValueError, http.client.HTTPException."""
    with contextlib.closing(router.connection_to(record)) as connection:
        connection.request(method, path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(router.DEFAULT_LIMITS.answer_head_bytes)


def sessions(record: Record, token: str) -> int | None:
    """How many render sessions a deployment holds; None where it does not say so in a whole number:
    it is deleted where there are none."""
    try:
        count = ask_backend(record, SESSIONS_PATH, token).get("render_session_count")
    except (OSError, ValueError):
        return None
    return count if type(count) is int and count >= 0 else None


def reload_tabs(record: Record, token: str) -> int:
    """Tell the tabs of a deployment that is about to be deleted to reload: how many were told."""
    with contextlib.suppress(OSError, ValueError):
        path = RELOAD_PATH
        count = ask_backend(record, path, token, method="POST").get("reloaded_socket_count")
        return count if type(count) is int else 0
    return 0


# -- the routers that are to serve it ------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """Who serves an epoch, and who does not yet."""

    reports: list[Json]
    behind: list[str]  # by name

    def under_way(self, deployment_id: str, epoch: int) -> int:
        """Requests and sockets of a deployment, by the reports that were made since."""
        counts = (
            r.get("in_flight", {}).get(deployment_id, 0)
            for r in self.reports
            if router_epoch(r) is None or cast(int, router_epoch(r)) >= epoch
        )
        return sum(count for count in counts if type(count) is int)


def router_epoch(report: Json) -> int | None:
    """The epoch that a router serves; None: it is of another version, and does not say."""
    epoch = report.get("epoch")
    return epoch if type(epoch) is int else None


def reports(store: router.Store) -> list[Json]:
    """What each router last said of itself, with `age`, the seconds since."""
    if not isinstance(store, router.RedisStore):
        return []
    pattern = f"{store.prefix}{router.REPORT}*"
    return read_reports(store, list(store.client.scan_iter(pattern, count=router.SCAN_COUNT)))


def read_reports(store: router.RedisStore, keys: list[str]) -> list[Json]:
    """Those that have a lease: without one a report never ends, and no router has written it."""
    if not keys:
        return []
    with store.client.pipeline(transaction=False) as pipe:
        pipe.mget(keys)  # None for another type, where GET is an error
        for key in keys:
            pipe.pttl(key)
        values, *leases = pipe.execute()
    found = []
    for key, text, left in zip(keys, values, leases, strict=True):
        if text is not None and is_lease(left):
            age = max(router.REPORT_LEASE - left / 1000, 0.0)
            name = key.removeprefix(store.prefix + router.REPORT)
            with contextlib.suppress(ValueError):
                report = {**router.json_object(text), "router": name, "age": round(age, 1)}
                found.append(report | checked_report(report))
    return found


def is_lease(left: int) -> bool:
    """Does a key that has so many milliseconds left, as PTTL says, end in time?"""
    return 0 <= left <= LEASE_AT_MOST * 1000


def reports_without_lease(store: router.Store) -> list[str]:
    """Keys that stand where routers report, and that no router has written: they never end."""
    if not isinstance(store, router.RedisStore):
        return []
    pattern = f"{store.prefix}{router.REPORT}*"
    keys = sorted(store.client.scan_iter(pattern, count=router.SCAN_COUNT))
    gone = -2  # since the scan
    return [k for k in keys if (left := store.client.pttl(k)) != gone and not is_lease(left)]


def checked_report(report: Json) -> Json:
    """What others read in a report, as it has to be, whatever was there."""
    counters = ("requests", "errors", "tunnels_open", "uptime_seconds")
    kept: Json = {n: report[n] if type(report.get(n)) is int else 0 for n in counters}
    for name in ("in_flight", "tallies"):
        kept[name] = report[name] if isinstance(report.get(name), dict) else {}
    return kept


def wait_for_routers(
    store: router.Store, epoch: int, since: float, deletes: bool, timeout: float | None = None
) -> Served:
    """Wait until every router serves this epoch, at most REPORT_WAIT seconds.

    Args:
        since: seconds since the epoch began, for those that do not report one.
        deletes: something is deleted then, so that one that is silent counts until its lease is
            over, and one of another version until it has read the state for sure.
    """
    found = reports(store)
    deadline = time.monotonic() + (REPORT_WAIT if timeout is None else timeout)
    while True:
        behind = [str(r["router"]) for r in found if _is_behind(r, epoch, since, deletes)]
        waited_for = [
            r
            for r in found
            if r["router"] in behind and (router_epoch(r) is not None) and r["age"] < SILENT_SECONDS
        ]
        if not waited_for or time.monotonic() > deadline:
            return Served(found, behind)
        time.sleep(REPORT_POLL)
        assert isinstance(store, router.RedisStore)
        found = read_reports(store, [f"{store.prefix}{router.REPORT}{r['router']}" for r in found])


def _is_behind(report: Json, epoch: int, since: float, deletes: bool) -> bool:
    served = router_epoch(report)
    if served is None:
        return not deletes or since < OTHER_VERSION_SECONDS
    return served < epoch and (deletes or report["age"] < SILENT_SECONDS)


def keep_while_routers_report(store: router.RedisStore, routing: Routing) -> None:
    """Where the keys of a state end by themselves: have them all last as long from when a router
    reported last. Nothing lasts where none has reported lately."""
    ages = [report["age"] for report in reports(store)] if store.ttl else []
    if not ages:
        return
    end = int(routing.now - min(ages)) + cast(int, store.ttl)
    with store.client.pipeline(transaction=False) as pipe:
        for key in [*router.FIXED, *(router.RECORD + name for name in routing.records)]:
            pipe.expireat(store.prefix + key, end)
        pipe.execute()


# -- the commands --------------------------------------------------------------------------------


def status_answer(
    store: router.Store,
    token: str,
    last_promoted: Promotion | None,
    env: Mapping[str, str] | None = None,
) -> Json:
    routing, me = store.read(), ownership.name(env or {})
    problems = list(routing.problems)
    if copy := ownership.copy_refusal(env or {}):
        problems.append(copy)
    elif routing.is_foreign(me):
        problems.append(ownership.foreign_words(str(routing.owner)))
    found = list(routing.records.values())
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # some may not answer
        counts = list(pool.map(lambda record: sessions(record, token), found))
    canary, lock = routing.canary, routing.lock
    closed = routing.maintenance and {**vars(routing.maintenance)}
    if closed:
        del closed["page"]
    return {
        "active": routing.active,
        "promoted": routing.promoted and vars(routing.promoted),
        "canary": canary and {"deployment_id": canary.deployment_id, "weight": canary.weight},
        "maintenance": closed,
        "lock": lock and {"by": lock.by, "since": lock.since, "until": lock.until},
        "lost": is_lost(routing, last_promoted),
        "epoch": routing.epoch,
        "owner": routing.owner,
        "identity": me,
        "copy_of": ownership.copied_from(env or {}),
        "problems": problems,
        "deployments": [
            {**record_answer(r), "sessions": n} for r, n in zip(found, counts, strict=True)
        ],
        "routers": reports(store),
        "reports_without_lease": reports_without_lease(store),
    }


def record_answer(record: Record) -> Json:
    """A record without what could not be understood of it."""
    fields = {k: v for k, v in record.json().items() if k not in record.ignored}
    names = {"deployment_id": record.deployment_id, "state": record.state or "unknown"}
    return {**fields, **names, "ignored": list(record.ignored)}


def probe(store: router.Store, deployment_id: str, path: str | None) -> Json:
    """What is at a deployment's address (`at`: see `router.look`), seen from inside, where the
    public address cannot be asked; and the status of a page of it."""
    routing = store.read()
    record = routing.records.get(deployment_id)
    if deployment_id == routing.active:
        record = routing.record_of_active()
    if record is None:
        raise StateError(f"{deployment_id} is not registered with the router", "unknown")
    served = wait_for_routers(store, routing.epoch, 0.0, deletes=False)
    at = router.look(record) if record.url else "unreachable"
    answer: Json = {"at": at, "active": routing.active, **serving_answer(served)}
    if path and at == "answers":
        answer["status"] = page_status(record, path)
    return answer


def page_status(record: Record, path: str) -> int | None:
    """The status of a page; None where there is no answer."""
    try:
        return backend_answer(record, path, {"accept": "text/html"})[0]
    except (OSError, ValueError, http.client.HTTPException):
        return None


def serving_answer(served: Served) -> Json:
    """Who serves it, for an answer."""
    names = ("router", "version", "epoch", "age")
    routers = [{name: report.get(name) for name in names} for report in served.reports]
    return {"routers": routers, "behind": served.behind}


def valid_id(value: str) -> str:
    if not router.DEPLOYMENT_ID.fullmatch(value):
        raise argparse.ArgumentTypeError("a deployment id is [a-z0-9][a-z0-9-]{0,23}")
    return value


def valid_stamp(value: str) -> str:
    if not ownership.parse(value):
        raise argparse.ArgumentTypeError("an owner is <environment id>/<router service id>")
    return value


def json_object(value: str) -> Json:
    try:
        return router.json_object(value)
    except ValueError:
        raise argparse.ArgumentTypeError("expected a JSON object") from None


def percent(value: str) -> float:
    found = float(value)
    if not 0 <= found <= 100:
        raise argparse.ArgumentTypeError("expected a number from 0 to 100")
    return found


def moment(value: str) -> float:
    """Seconds since 1970, or a length of time in seconds."""
    found = float(value)
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError("expected a number of seconds")
    return found


def some_text(value: str) -> str:
    """What can be stored and shown, whatever a host or a person is called."""
    return "".join(c if c.isprintable() else " " for c in value)[:300]


def draining_list(value: str) -> list[Json]:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = {i["deployment_id"]: i for i in router.from_json(value)}
        for item in found.values():
            router.a_text(item.get("service_name") or "none")
        return list(found.values())
    raise argparse.ArgumentTypeError("expected a JSON list of objects with a deployment_id")


def record_list(value: str) -> list[Record]:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        items = [(i["deployment_id"], json.dumps(i)) for i in router.from_json(value)]
        found = [router.parse_record(valid_id(name), text) for name, text in items]
        if not any(record.ignored for record in found):
            return found
    raise argparse.ArgumentTypeError("expected a JSON list of objects with a deployment_id")


def a_length(value: float) -> float:
    """Of time in seconds, from now on."""
    return router.a_number(1e10, value)


def a_positive_length(value: float) -> float:
    return a_length(value - 1) + 1


# What a router would not understand in the state is not written: these are the parser's own checks.
ACCEPTED: dict[str, Callable[[Any], Any]] = {
    "service_name": router.a_text,
    "active_service_name": router.a_text,
    "service_id": router.a_text,
    "address": router.an_address,
    "holder": router.a_text,
    "bake": a_length,
    "lease": a_length,
    "retry_after": a_positive_length,
    "maintenance_since": router.a_time,
}


def check_arguments(args: argparse.Namespace) -> None:
    """Raises StateError for a value that the routing state cannot hold."""
    for name, accepted in ACCEPTED.items():
        value = getattr(args, name, None)
        try:
            accepted(value) if value is not None else None
        except ValueError:
            flag = name.replace("_", "-")
            raise StateError(f"--{flag} cannot be {value!r}: nothing was changed") from None


def control_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pulse-railway control", description=control.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--nonce", help="comes back in the answer; carried out once")
    common.add_argument("--intent", metavar="ID[@AT]", help="what Railway says was promoted last")
    common.add_argument("--by", type=some_text, help="who asks, for the history")
    common.add_argument("--why", help="for the history")
    common.add_argument("--unlock", metavar="HOLDER", help="give the deploy lock back, too")

    def command(name: str, says: str) -> Callable[..., Any]:
        return commands.add_parser(name, help=says, parents=[common]).add_argument

    command("active", "the active deployment")
    command("status", "everything in the routing state, with session counts")
    command("history", "what was done, by whom and why")
    add = command("probe", "what answers at a deployment's address, and which routers know of it")
    add("--deployment-id", type=valid_id, required=True)
    add("--path", help="a page of it, to see its status")
    add = command("register", "add a pending deployment")
    add("--deployment-id", type=valid_id, required=True)
    add("--service-name", required=True)
    add("--service-id", help="Railway's id of the service")
    add("--address", help="the backend's base URL")
    add("--hold", action="store_true", help="leave it pending until it is promoted")
    add("--about", type=json_object, help="its commit, author, message, as JSON")
    add = command("promote", "make a deployment active, drain the one before")
    add("--active-deployment-id", type=valid_id, required=True)
    add("--active-service-name", required=True)
    add("--service-id", help="Railway's id of its service: a record that is lost is made anew")
    add("--draining-json", type=draining_list, default=[])
    add("--address", help="the backend's base URL")
    add("--weight", type=percent, help="as the canary, for this percentage of new visitors")
    add("--instead-of", type=valid_id, help="only where this one is active")
    add("--rolls-back", action="store_true", help="the one before is no way back from then on")
    add("--bake", type=moment, metavar="SECONDS", help="it is watched for so long")
    add = command("withdraw", "end a canary: it drains")
    add("--deployment-id", type=valid_id, required=True)
    add = command("baked", "a deployment's bake is over, and it stays")
    add("--deployment-id", type=valid_id, required=True)
    add = command("maintenance", "answer everybody with a page, or with the app again")
    add("switch", choices=["on", "off"])
    add("--page", help="HTML")
    add("--retry-after", type=int, default=30, metavar="SECONDS")
    add = command("lock", "hold the deploy lock")
    add("--holder", required=True)
    add("--lease", type=moment, required=True, metavar="SECONDS")
    add = command("unlock", "give the deploy lock back, or take it from whoever has it")
    add("--holder")
    add = command("retire", "take a deployment out of the routing, to be removed")
    add("--deployment-id", type=valid_id, required=True)
    add("--service-id", help="Railway's id of the service")
    add = command("delete", "forget a deployment that is not active")
    add("--deployment-id", type=valid_id, required=True)
    add = command("restore", "rebuild lost state")
    add("--active-deployment-id", type=valid_id, required=True)
    add("--records-json", type=record_list, required=True)
    add("--chosen", action="store_true", help="it is active then, whatever the store says")
    add("--maintenance-since", type=moment, help="the site is closed, as Railway says")
    add = command("claim", "make the routing state this stack's")
    add("--owner", type=valid_stamp, required=True, metavar="ENVIRONMENT/ROUTER")
    add("--instead-of", type=valid_stamp, metavar="ENVIRONMENT/ROUTER", help="whose it is so far")
    return parser


def step_of(args: argparse.Namespace) -> Step:
    """The change that a control command makes, with its entry in the history."""
    name: str = getattr(args, "deployment_id", "")
    noted = {"by": args.by, "why": args.why}
    match args.command:
        case "register":
            return functools.partial(
                register,
                deployment_id=name,
                service_name=args.service_name,
                address=args.address,
                pinned=args.hold,
                service_id=args.service_id,
                about=args.about,
            )
        case "promote":
            name = args.active_deployment_id
            common = {
                "deployment_id": name,
                "service_name": args.active_service_name,
                "service_id": args.service_id,
                "instead_of": args.instead_of,
                "bake": args.bake,
            }
            if args.weight is not None:
                step = functools.partial(set_canary_weight, weight=args.weight, **common)
                return with_history(step, "canary", name, weight=f"{args.weight:g} %", **noted)
            step = functools.partial(
                set_active,
                draining=args.draining_json,
                address=args.address,
                rolls_back=args.rolls_back,
                **common,
            )
            return with_history(step, "rollback" if args.rolls_back else "promote", name, **noted)
        case "withdraw":
            step = functools.partial(abort_canary, deployment_id=name)
            return with_history(step, "rollback", name, **noted)
        case "baked":
            return functools.partial(finish_bake, deployment_id=name)
        case "retire":
            return functools.partial(retire, deployment_id=name, service_id=args.service_id)
        case "delete":
            step = functools.partial(delete, deployment_id=name)
            return with_history(step, "remove", name, **noted)
        case "maintenance":
            step = functools.partial(
                set_maintenance,
                page=args.page,
                retry_after=args.retry_after,
                by=args.by,
                off=args.switch == "off",
            )
            return with_history(step, f"maintenance {args.switch}", "", **noted)
        case "lock":
            return functools.partial(deploy_lock, holder=args.holder, by=args.by, lease=args.lease)
        case "unlock":
            return functools.partial(unlock, holder=args.holder)
        case "claim":
            return functools.partial(set_owner, owner=args.owner, instead_of=args.instead_of)
        case _:
            name = args.active_deployment_id
            step = functools.partial(
                rebuild_records,
                running=args.records_json,
                active=name,
                chosen=args.chosen,
                at=time_of(args.promoted, name),
                closed=args.maintenance_since,
            )
            return with_history(step, "restore", name, **noted)


def time_of(promoted: Promotion | None, deployment_id: str) -> float | None:
    """When a deployment was promoted, as Railway says."""
    return promoted.at if promoted and promoted.deployment_id == deployment_id else None


# What needs no complete state, or is what mends it.
ALLOWED_WHEN_LOST = ("restore", "lock", "unlock", "maintenance", "claim")
READ_ONLY = ("active", "status", "history", "probe")
# What an older janitor would undo, or delete.
EXCLUDES_OLD_JANITORS = ("promote", "restore")
# What the routers are waited for: who gets which deployment changes.
WAITS_FOR_ROUTERS = ("promote", "withdraw", "retire", "maintenance", "restore")


@contextlib.contextmanager
def older_janitors_kept_out(store: router.Store) -> Iterator[None]:
    """Keep janitors of 0.3.x from running meanwhile; one that runs is waited for, at most
    JANITOR_WAIT seconds.

    Their steps are no transactions: what was active when they began they write again, and they
    delete what has been promoted since. No janitor runs while the lock is held. One of ours does
    no harm, and is not waited for.
    """
    if not isinstance(store, router.RedisStore):
        yield
        return
    key, holder = f"{store.prefix}{JANITOR_LOCK}", OUR_LOCK_PREFIX + secrets.token_hex(8)
    deadline = time.monotonic() + JANITOR_WAIT
    while not take_lock(store, holder, COMMAND_LOCK_SECONDS):
        ours = str(store.client.mget([key])[0]).startswith(OUR_LOCK_PREFIX)
        if ours or time.monotonic() > deadline:
            break
        time.sleep(REPORT_POLL)
    try:
        yield
    finally:
        give_back(store, holder)


def take_lock(store: router.RedisStore, holder: str, lease: int) -> bool:
    """Take the janitor's lock for `lease` seconds, where nobody holds it: what is no string, or has
    no lease, is nobody's of any version, and would never end."""
    key = f"{store.prefix}{JANITOR_LOCK}"
    if store.client.set(key, holder, nx=True, ex=lease):
        return True
    if store.client.mget([key]) == [holder]:  # the answer was lost, and it was asked again
        return True
    with store.client.pipeline() as pipe:
        pipe.watch(key)  # type: ignore[no-untyped-call]
        if pipe.type(key) == "string" and is_lease(pipe.pttl(key)):
            return False
        pipe.multi()
        pipe.set(key, holder, ex=lease)
        try:
            return bool(pipe.execute()[0])
        except redis.WatchError:  # somebody else was faster
            return False


def give_back(store: router.RedisStore, holder: str) -> None:
    """Release the janitor's lock, where it still is this holder's."""
    key = f"{store.prefix}{JANITOR_LOCK}"
    with contextlib.suppress(redis.RedisError), store.client.pipeline() as pipe:
        pipe.watch(key)  # type: ignore[no-untyped-call]
        if pipe.get(key) == holder:
            pipe.multi()
            pipe.delete(key)
            pipe.execute()


def change_state(store: router.Store, args: argparse.Namespace, me: str | None = None) -> Routing:
    """Carry a writing command out, once for its nonce, and return what the store holds then. Where
    the store has lost its data, the routers are given time to write it back. Raises StateError."""
    check_arguments(args)
    step = step_of(args)
    if args.command == "claim":  # it does the same when it comes twice, and notes nothing of it
        if me not in (None, args.owner):
            raise StateError(f"this is {me}, and claims nothing for {args.owner}", "owner")
        return store.apply(step)
    if args.command == "lock":  # a deploy's first, where `ensure` did not reach the state
        step = claiming_bare(step, me)
    if args.unlock:
        step = with_unlock(step, args.unlock)
    if args.command not in ALLOWED_WHEN_LOST:
        step = refuse_if_lost(step, args.promoted)
    step = owned(step, me)
    # before another owner's janitor is kept out
    if args.command in EXCLUDES_OLD_JANITORS and me is not None:
        before = store.read()
        if args.nonce not in before.processed:
            refuse_foreign(before, me)
    if args.command == "restore":  # what routers know is more than what Railway shows
        wait_for_healing(store, args.promoted)
    if args.nonce:
        step = idempotent(step, args.nonce)
    apart = older_janitors_kept_out(store) if args.command in EXCLUDES_OLD_JANITORS else None
    with apart or contextlib.nullcontext():
        deadline = time.monotonic() + HEAL_WAIT
        while True:
            try:
                return store.apply(step)
            except StateError as error:
                if error.reason != "lost" or time.monotonic() > deadline:
                    raise
            store.announce()
            time.sleep(0.25)


def wait_for_healing(store: router.Store, last: Promotion | None) -> Routing:
    """The state, when the routers have had the time to write back what they know."""
    deadline = time.monotonic() + HEAL_WAIT
    while True:
        routing = store.read()
        done = routing.active is not None and not is_lost(routing, last)
        if done or time.monotonic() > deadline:
            return routing
        store.announce()
        time.sleep(0.25)


def carry_out(argv: list[str], env: Mapping[str, str]) -> Json:
    """One control command's answer: it has the command's name, the nonce that was given, and the
    version that carried it out. `reason` says why it is not ok: `store` where the store did not
    answer, so that it is not known whether the command ran. Raises SystemExit for arguments that
    it does not know."""
    args = control_parser().parse_args(argv)
    args.promoted = router.promotion_from_env(env)
    if args.intent:
        name, _, at = args.intent.partition("@")
        names = (router.LAST_PROMOTED_VARIABLE, router.LAST_PROMOTED_AT_VARIABLE)
        args.promoted = router.promotion_from_env(dict(zip(names, (name, at), strict=True)))
    token = env.get("PULSE_RAILWAY_INTERNAL_TOKEN", "")
    answer: Json = {}
    copy = ownership.copy_refusal(env)
    try:
        if copy and args.command not in READ_ONLY:
            raise StateError(copy, "copy")
        store = router.store_from_env(env)
        match args.command:
            case "active":
                answer = {"ok": True, "deployment_id": store.read().active}
            case "status":
                answer = {"ok": True, **status_answer(store, token, args.promoted, env)}
            case "history":
                answer = {"ok": True, "history": list(store.read().history)}
            case "probe":
                answer = {"ok": True, **probe(store, args.deployment_id, args.path)}
            case _:
                answer = {"ok": True, **changed(store, args, token, ownership.name(env))}
    except StateError as error:
        answer = {"ok": False, "error": str(error), "reason": error.reason}
    except (redis.RedisError, sqlite3.Error, OSError) as error:
        # The class only: the message of a Redis error can carry its URL.
        message = f"the router's Redis does not answer ({type(error).__name__})"
        answer = {"ok": False, "error": message, "reason": "store"}
    version = router.runtime_version()
    if copy:
        answer["copy_of"] = ownership.copied_from(env)
    return {**answer, "command": args.command, "nonce": args.nonce, "version": version}


def changed(
    store: router.Store, args: argparse.Namespace, token: str, me: str | None = None
) -> Json:
    """Change the state, wait for the routers, and say what the caller needs to know of it."""
    routing = change_state(store, args, me)
    answer: Json = {}
    if args.command == "claim":
        answer["owner"] = routing.owner
    record = routing.records.get(getattr(args, "deployment_id", None) or "")
    if args.command in ("promote", "restore"):
        answer["promoted"] = routing.promoted and vars(routing.promoted)
    if args.command == "maintenance":
        answer["since"] = routing.maintenance and routing.maintenance.since
        answer["at"] = routing.now
    if args.command == "lock":
        answer |= {"active": routing.active, "lost": is_lost(routing, args.promoted)}
    if args.command in WAITS_FOR_ROUTERS:
        deletes = args.command == "retire"
        since = retired_for(routing, args.deployment_id) if deletes else 0.0
        answer |= serving_answer(wait_for_routers(store, routing.epoch, since, deletes))
    if args.command == "retire" and record:
        answer["reloaded"] = reload_tabs(record, token)
    return answer


def control(argv: list[str]) -> int:
    """Run one control command inside the router service. The last line on stdout is its answer, a
    JSON object."""
    control_parser().parse_args(argv)  # help, and what is wrong with it, anywhere
    if not any(os.environ.get(name) for name in RAILWAY_RUNTIME):
        print("run this inside the router service, with `railway ssh`", file=sys.stderr)
        return 1
    answer = carry_out(argv, os.environ)
    if not answer["ok"]:
        print(answer["error"], file=sys.stderr)
    print(json.dumps(answer))
    return 0 if answer["ok"] else 1


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    return control(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
