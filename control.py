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
"""The steps that change the routing state, and the control commands that carry them out.

    python control.py <command>    active, status, register, promote, ...

A command runs inside the router's container (`railway ssh --service <router> -- "pulse-railway
control ..."`), or the janitor carries it out. It is one transaction on the store. Then it waits
until the routers serve the new state. The state's types, parser and writer, and the repair of lost
data, are in router.py, since a router repairs the store.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import heapq
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
from router import Bake, Json, Promotion, Record, Routing, Step, Tombstone

SESSIONS_PATH = "/_pulse/internal/railway/sessions"
RELOAD_PATH = "/_pulse/internal/railway/reload"
FORMER_TOKENS = "PULSE_RAILWAY_FORMER_TOKENS"  # JSON: former internal tokens, and until when
RAILWAY_RUNTIME = ("RAILWAY_SERVICE_ID", "RAILWAY_REPLICA_ID", "RAILWAY_PRIVATE_DOMAIN")
HEAL_WAIT = 8.0  # seconds that a command waits for a router to write lost state back
REPORT_WAIT = 10.0  # seconds that a command waits until every router serves what it has written
REPORT_POLL = 0.05
SILENT_SECONDS = 60.0  # a promotion does not wait for a router without a report for so long
LATE_SECONDS = 3600.0  # a command may arrive so long after it was sent
OTHER_VERSION_SECONDS = 30.0  # until a router that reports no epoch has read the state
JANITOR_LOCK = ":janitor:lock"
JANITOR_RUN = ":janitor:run"  # the outcome of the janitor's last run, for `status`
OUR_LOCK_PREFIX = "steps-"  # of a lock's holder that changes the state by transactions only
COMMAND_LOCK_SECONDS = 30  # more than the duration of a command
LEASE_AT_MOST = 3600.0  # seconds; no version of router or janitor sets a longer one
ADDRESSES_ANSWERED = 15  # of clients with most requests and failures, for a deployment in a bake
JANITOR_WAIT = 15.0  # seconds that a command waits for an older janitor to end


class StateError(Exception):
    """A control command that would leave the routing state wrong is refused.

    `reason` is a word for programs; `facts` are further fields of the answer.
    """

    def __init__(self, message: str, reason: str = "refused", **facts: Any) -> None:
        super().__init__(message)
        self.reason = reason
        self.facts = facts


# -- the steps ---------------------------------------------------------------------------------


def with_records(routing: Routing, *records: Record) -> Routing:
    """Return the state with these records added or replaced."""
    return replace(routing, records={**routing.records, **{r.deployment_id: r for r in records}})


def is_older_than(routing: Routing, last: Promotion | None) -> bool:
    """Is the last promotion that Railway knows of (`last`) newer than the store's?"""
    if last is None or routing.promotion is None:
        return last is not None
    if routing.promotion.at != last.at:
        return routing.promotion.at < last.at
    # Of equal times either can be newer: an earlier version of the CLI wrote its promotion without
    # a time, and an earlier janitor wrote a promotion that was rolled back since it had read it.
    differs = routing.active != last.deployment_id
    record = routing.records.get(last.deployment_id)
    if record and record.rejected_at and record.rejected_at >= last.at:
        return False
    return differs and last.at > 0 and not routing.promoted_by_other


def is_lost(routing: Routing, last: Promotion | None) -> bool:
    """Has the store lost data, so that a control command would decide on a partial state?"""
    return last is not None and (routing.store_id is None or is_older_than(routing, last))


def refuse_active(routing: Routing, deployment_id: str) -> None:
    """Raise StateError if the deployment is active."""
    if routing.active == deployment_id:
        raise StateError(
            f"{deployment_id} is active: promote or deploy another one first", "active"
        )


def add_record(
    routing: Routing,
    deployment_id: str,
    service_name: str,
    address: str | None = None,
    pinned: bool = False,
    service_id: str | None = None,
    about: Json | None = None,
    preview: str | None = None,
    instances: int | None = None,
) -> Routing:
    """Add a pending deployment: it runs, and is reachable by affinity only.

    A command that arrives after the removal of its deployment is refused; the id of the Railway
    service shows that. A deployment id on a new service gets a new record.

    Args:
        pinned: it stays pending on purpose, so that the janitor does not remove it.
        about: its commit, author and message, and who deployed it.
        preview: the hash of the key with which alone it is reachable, until it is promoted.
        instances: the number of its processes, on ports one behind another; None: as known.
    """
    if routing.active == deployment_id:
        raise StateError(
            f"{deployment_id} is the active deployment and cannot be registered again", "active"
        )
    record = routing.records.get(deployment_id)
    tombstone = routing.tombstones.get(deployment_id)
    if record and record.retiring_at:
        tombstone = tombstone or router.Tombstone(record.retiring_at, record.service_id)
    if tombstone:
        # 0.3.x passes no service id: a command soon after the removal was sent before it
        late = service_id is None and routing.now - tombstone.at < LATE_SECONDS
        if late or (service_id and service_id == tombstone.service_id):
            raise StateError(f"{deployment_id} was removed and cannot be registered", "removed")
        record = None
    if record and record.is_preview and not preview and service_id in (None, record.service_id):
        raise StateError(f"{deployment_id} is a preview: promote it, or delete it", "preview")
    record = record or Record(deployment_id)
    new = replace(
        record.without_drain(),
        state="pending",
        service_name=service_name,
        registered_at=routing.now,
        pinned=pinned or preview is not None,
        preview=preview,
        service_id=service_id or record.service_id,
        address=address.rstrip("/") if address else record.address,
        about=about or record.about,
    )
    require_address(new)
    if instances is not None:
        new = replace(new, instances=router.instances_at(str(new.url), instances) or None)
    tombstones = {k: v for k, v in routing.tombstones.items() if k != deployment_id}
    return replace(with_records(routing, new), tombstones=tombstones)


def require_address(record: Record) -> None:
    """Raise StateError for a record without an address."""
    if record.url is None:
        raise StateError(
            f"no address follows from the service name {record.service_name!r}, and none is known"
        )


def refuse_unless_active(routing: Routing, expected: str | None) -> None:
    """Raise StateError if another deployment than `expected` is active."""
    if expected and routing.active != expected:
        raise StateError(f"{routing.active or 'none'} is active by now, not {expected}", "changed")


def promotable(routing: Routing, deployment_id: str, service_id: str | None = None) -> Record:
    """Return the record of a deployment that is to be promoted.

    Raises StateError if the deployment is unknown or being removed.

    Args:
        service_id: of its running service; with it, a lost record is created again.
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
    bake_latency_ms: float | None = None,
    move_after: float | None = None,
    move_idle: float | None = None,
) -> Routing:
    """Make a deployment active; the deployment that was active drains.

    Pending deployments stay pending. Another deployment that is the canary loses its weight.

    Args:
        draining: sent by 0.3.x's clients for every other service; only the service name of the
            deployment that was active is used.
        instead_of: the deployment that must be active now. Raises StateError otherwise.
        rolls_back: the deployment that was active is no target of a rollback from now on.
        bake: seconds for which the deployment is watched; in its record until `finish_bake`.
        bake_latency_ms: milliseconds after which an answer's beginning counts as slow in it.
        move_after: seconds after which the tabs of the deployment that drains move over.
        move_idle: seconds for which a tab was not used that then moves over by itself.
    """
    hints = {item["deployment_id"]: item for item in draining}
    if deployment_id in hints:
        raise StateError(f"{deployment_id} cannot be active and draining")
    refuse_unless_active(routing, instead_of)
    record = replace(
        promotable(routing, deployment_id, service_id).as_active(),
        service_name=service_name,
        rejected_at=None,
        bake=new_bake(routing, bake, bake_latency_ms),
    )
    if address:
        record = replace(record, address=address.rstrip("/"))
    require_address(record)
    promotion = Promotion(deployment_id, router.next_time(routing))
    others = [
        replace(other, weight=None, bake=None, steps=None, canary_at=routing.now)
        for name, other in routing.records.items()
        if other.weight is not None and name != deployment_id
    ]
    new = with_records(routing, *others, replace(record, promoted_at=promotion.at))
    if routing.active not in (None, deployment_id):
        hint = hints.get(str(routing.active), {})
        old = new.records.get(str(routing.active)) or Record(str(routing.active))
        old = replace(
            old.as_draining(routing.now, move_after, move_idle),
            service_name=old.service_name or hint.get("service_name") or routing.active,
            rejected_at=routing.now if rolls_back else old.rejected_at,
        )
        new = with_records(new, old)
    return replace(new, active=deployment_id, promoted=promotion)


def new_bake(routing: Routing, seconds: float | None, latency_ms: float | None) -> Bake | None:
    """Return a bake that begins now, beside the deployment that is active; None for no bake."""
    if not seconds:
        return None
    return Bake(routing.now + seconds, routing.now, routing.active, latency_ms)


def set_canary_weight(
    routing: Routing,
    deployment_id: str,
    service_name: str,
    weight: float,
    service_id: str | None = None,
    instead_of: str | None = None,
    bake: float | None = None,
    bake_latency_ms: float | None = None,
    steps: Json | None = None,
) -> Routing:
    """Make a deployment the canary, which gets `weight` percent of the new visitors.

    There is at most one canary. It stays until it is promoted or aborted. `instead_of`, `bake` and
    `bake_latency_ms` are as in `set_active`; `steps` are those that the caller takes, with this
    weight as one of them.
    """
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
    # a bake whose time is over was interrupted
    present = record.bake if record.bake and record.bake.until > routing.now else None
    record = replace(
        record.without_drain(),
        state="pending",
        service_name=service_name,
        rejected_at=None,
        pinned=True,
        weight=weight,
        steps=steps,
        canary_at=routing.now,
        bake=new_bake(routing, bake, bake_latency_ms) or present,
        preview=None,
    )
    require_address(record)
    return with_records(routing, record)


def abort_canary(
    routing: Routing,
    deployment_id: str,
    move_after: float | None = None,
    move_idle: float | None = None,
) -> Routing:
    """End a canary: new visitors are not routed to it, and it drains. `move_after` and `move_idle`
    as in `set_active`."""
    record = routing.records.get(deployment_id)
    if record is None or not record.is_canary:
        raise StateError(f"{deployment_id} is no canary (any more)", "changed")
    record = record.as_draining(routing.now, move_after, move_idle)
    record = replace(record, pinned=False, rejected_at=routing.now)
    return with_records(routing, record)


def finish_bake(routing: Routing, deployment_id: str) -> Routing:
    """Note that the bake of a deployment is over, and that the deployment stays."""
    record = routing.records.get(deployment_id)
    if record is None:
        return routing
    return with_records(routing, replace(record, bake=None, bake_ended_at=routing.now))


def set_maintenance(
    routing: Routing, page: str | None, retry_after: int, by: str | None, off: bool = False
) -> Routing:
    """Switch maintenance on or off. While it is on, all visitors get a page instead of the app.

    Args:
        page: HTML; None for the router's own page.
        retry_after: seconds, for the header Retry-After.
        by: who asks for it.
    """
    if off:
        return replace(routing, maintenance=None)
    since = routing.maintenance.since if routing.maintenance else routing.now
    return replace(routing, maintenance=router.Maintenance(since, page, retry_after, by))


def deploy_lock(routing: Routing, holder: str, by: str | None, lease: float) -> Routing:
    """Take the deploy lock for `lease` seconds from now, or renew it for its holder.

    Raises StateError while another holder has it, and for a holder that has ended: the command that
    releases a lock can overtake the one that takes it.
    """
    lock, now = routing.lock, routing.now
    renewed = lock is not None and lock.holder == holder
    if holder in ended_runs(routing):
        raise StateError("this run has ended, and its lock was released", "ended")
    if lock and not renewed and lock.until > now:
        since = time.strftime("%H:%M:%S UTC", time.gmtime(lock.since))
        message = f"{lock.by or 'somebody'} deploys since {since}"
        raise StateError(message, "locked", lock=lock_answer(lock), now=now)
    if lock and not renewed:
        routing = with_ended(routing, lock.holder)
    locked_since = lock.since if lock and renewed else now
    return replace(routing, lock=router.DeployLock(holder, by, locked_since, now + lease))


def lock_answer(lock: router.DeployLock) -> Json:
    return {name: getattr(lock, name) for name in ("holder", "by", "since", "until")}


def release_deploy_lock(routing: Routing, holder: str | None) -> Routing:
    """Release the deploy lock of this holder, which cannot take it again; without a holder,
    anybody's."""
    lock = routing.lock
    if holder is None:
        return with_ended(replace(routing, lock=None), lock.holder) if lock else routing
    if lock and lock.holder == holder:
        routing = replace(routing, lock=None)
    return with_ended(routing, holder)


ENDED = "ended:"  # begins the names of ended runs among the nonces, which are forgotten in an hour


ENDED_AGAIN = 1800.0  # seconds after which it is noted anew, before it is forgotten


def with_ended(routing: Routing, holder: str) -> Routing:
    """Note that a run of `deploy` has ended."""
    noted_at = routing.processed.get(ENDED + holder, 0.0)
    if routing.now - noted_at < ENDED_AGAIN:
        return routing
    return replace(routing, processed={**routing.processed, ENDED + holder: routing.now})


def ended_runs(routing: Routing) -> list[str]:
    """Return the runs of `deploy` that have given back the lock, or lost it."""
    return [name.removeprefix(ENDED) for name in routing.processed if name.startswith(ENDED)]


def set_owner(routing: Routing, owner: str, instead_of: str | None = None) -> Routing:
    """Make `owner` the owner of the state.

    Raises StateError if it has another owner than `instead_of`.
    """
    if routing.owner not in (None, owner, instead_of):
        raise StateError(f"the routing state is of {routing.owner}, and was not claimed", "owner")
    return replace(routing, owner=owner)


def is_bare(routing: Routing) -> bool:
    """Is the state empty, so that no other stack can be using it?"""
    return routing.active is None and not routing.records and router.OWNER not in routing.keys


def claiming_bare(step: Step, me: str | None) -> Step:
    """Return `step`, preceded by making `me` the owner of an empty state."""

    def inner(routing: Routing) -> Routing:
        return step(set_owner(routing, me) if me and is_bare(routing) else routing)

    return inner


def delete_record(routing: Routing, deployment_id: str) -> Routing:
    """Delete the record of a deployment that is not active. An unknown one changes nothing."""
    refuse_active(routing, deployment_id)
    record = routing.records.get(deployment_id)
    if record is None:
        return routing
    records = {k: v for k, v in routing.records.items() if k != deployment_id}
    return add_tombstone(replace(routing, records=records), deployment_id, record.service_id)


def add_tombstone(routing: Routing, deployment_id: str, service_id: str | None) -> Routing:
    """Note that a deployment was removed, so that a late command cannot register it."""
    tombstone = Tombstone(routing.now, service_id)
    return replace(routing, tombstones={**routing.tombstones, deployment_id: tombstone})


def retire(routing: Routing, deployment_id: str, service_id: str | None = None) -> Routing:
    """Take a deployment out of the routing before its removal.

    From then on it can be neither registered nor promoted.
    """
    refuse_active(routing, deployment_id)
    record = routing.records.get(deployment_id)
    if record and not record.retiring_at:
        routing = with_records(routing, replace(record, retiring_at=routing.now))
    tombstone = routing.tombstones.get(deployment_id)
    known = record or tombstone
    service_id = service_id or (known.service_id if known else None)
    if tombstone and tombstone.service_id == service_id:
        return routing
    return add_tombstone(routing, deployment_id, service_id)


def retire_if_unchanged(
    routing: Routing, deployment_id: str, judged: Record | None, service_id: str | None
) -> Routing:
    """Retire a deployment. Raises StateError if its record is no longer `judged` (None: none)."""
    if routing.records.get(deployment_id) != judged:
        raise StateError(f"{deployment_id} has changed meanwhile", "changed")
    return retire(routing, deployment_id, service_id)


def retired_for(routing: Routing, deployment_id: str) -> float:
    """Return the seconds since a deployment was retired, by its record or its tombstone."""
    record = routing.records.get(deployment_id)
    tombstone = routing.tombstones.get(deployment_id)
    at = record.retiring_at if record else tombstone.at if tombstone else None
    return routing.now - (routing.now if at is None else at)


def mark_draining(routing: Routing, deployment_id: str, judged: Record) -> Routing:
    """Mark a deployment as draining whose record says active although another one is."""
    if routing.records.get(deployment_id) != judged or routing.active == deployment_id:
        return routing
    return with_records(routing, judged.as_draining(routing.now))


def adopt_orphan(routing: Routing, record: Record) -> Routing:
    """Add the record of a running deployment without one: draining, a preview, or active."""
    if record.deployment_id in routing.records:
        return routing
    if routing.active == record.deployment_id:
        return with_records(routing, replace(record, state="active", preview=None))
    return with_records(routing, as_found(record, routing.now))


def as_found(record: Record, now: float) -> Record:
    """Return the record of a running deployment whose record was lost: draining, or a preview."""
    return record if record.is_preview else record.as_draining(now)


def rebuild_records(
    routing: Routing,
    running: list[Record],
    active: str,
    chosen: bool = False,
    at: float | None = None,
    closed: float | None = None,
) -> Routing:
    """Rebuild lost state from the services that run on Railway. Known fields are kept.

    Raises StateError if nothing is lost, and if `active` does not run or is being removed.

    Args:
        running: a record for each service that runs on Railway.
        active: the deployment to make active. If the store still knows an active deployment, only
            its record is rebuilt, unless `chosen`.
        chosen: a person has named `active`: it becomes active whatever the store says.
        at: when `active` was promoted, in seconds since 1970, by Railway's variable.
        closed: since when maintenance is on, by Railway's variable.
    """
    promoted = Promotion(active, at) if at else None
    if not chosen and routing.active and not is_older_than(routing, promoted):
        if (
            not any(is_unrecorded(routing, rebuilt) for rebuilt in running)
            and routing.active in routing.records
        ):
            raise StateError(f"{routing.active} is active: there is nothing to restore", "active")
        active, promoted = routing.active, routing.promoted
    elif chosen or promoted is None:
        promoted = Promotion(active, router.next_time(routing))
    records = dict(routing.records)
    for rebuilt in running:
        name = rebuilt.deployment_id
        if is_unrecorded(routing, rebuilt):
            records[name] = rebuilt if name == active else as_found(rebuilt, routing.now)
        elif name in records:
            records[name] = fill_from(records[name], rebuilt)
    if active not in records:
        removed = active in routing.tombstones
        why = "is being removed: restore another one" if removed else "does not run on Railway"
        raise StateError(f"{active} {why}", "removed" if removed else "unknown")
    if records[active].retiring_at:
        raise StateError(f"{active} is being removed: restore another one", "removed")
    for name, record in records.items():
        if name == active:
            at = promoted.at if promoted else record.promoted_at
            active_record = replace(record.as_active(), rejected_at=None, bake=None)
            records[name] = replace(active_record, promoted_at=at)
        elif record.state == "active":
            records[name] = record.as_draining(routing.now)
    maintenance = routing.maintenance or (router.Maintenance(closed) if closed else None)
    return replace(
        routing, active=active, promoted=promoted, records=records, maintenance=maintenance
    )


def is_unrecorded(routing: Routing, running: Record) -> bool:
    """Does the state have no record of this running deployment, which was not removed?"""
    record = routing.records.get(running.deployment_id)
    is_lost = record is None or record.ignored == router.UNREADABLE
    return is_lost and not routing.has_removed(running)


def fill_from(record: Record, rebuilt: Record) -> Record:
    """Return a record of the store with its missing fields taken from a rebuilt one."""
    names = ("service_name", "address", "service_id", "registered_at", "instances")
    return replace(record, **{n: getattr(rebuilt, n) for n in names if getattr(record, n) is None})


# -- decorators of a step ----------------------------------------------------------------------


def refuse_if_lost(step: Step, last_promoted: Promotion | None) -> Step:
    """Return `step`, which raises StateError while the store has lost data (see `is_lost`)."""

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
    """Return the state. Raises StateError if another owner has it. `me` is None outside Railway."""
    if routing.is_foreign(me):
        raise StateError(ownership.foreign_words(str(routing.owner)), "owner")
    return routing


def owned(step: Step, me: str | None) -> Step:
    """Return `step`, which raises StateError if the state has another owner."""
    return lambda routing: step(refuse_foreign(routing, me))


class OwnedStore(router.RedisStore):
    """A store whose steps are refused if the state has another owner than `me`."""

    def __init__(self, url: str, prefix: str, me: str | None, ttl: int | None = None) -> None:
        super().__init__(url, prefix, ttl)
        self.me = me

    def apply(self, step: Step) -> Routing:
        return super().apply(owned(step, self.me))


def idempotent(step: Step, nonce: str) -> Step:
    """Return `step`, which is carried out once for its nonce, so that a caller can retry."""

    def inner(routing: Routing) -> Routing:
        if nonce in routing.processed:
            return routing
        new = step(routing)
        return replace(new, processed={**new.processed, nonce: routing.now})

    return inner


def in_time(step: Step, until: float) -> Step:
    """Return `step`, which raises StateError later than `until`, by the store's clock."""

    def inner(routing: Routing) -> Routing:
        if routing.now > until:
            message = "the command came too late: nothing was changed"
            raise StateError(message, "late", clock=routing.now)
        return step(routing)

    return inner


def with_history(step: Step, what: str, deployment_id: str, **facts: Any) -> Step:
    """Return `step` with an entry in the history if it changes the state.

    Args:
        what: the kind of change.
        facts: further fields of the entry, such as `by` and `why`; empty ones are left out.

    The entry says what the deployment was made of, for when its record is gone.
    """

    def inner(routing: Routing) -> Routing:
        new = step(routing)
        if new == routing:
            return routing
        entry = {"at": routing.now, "what": what, "deployment_id": deployment_id}
        entry["active"] = routing.active  # before the step
        record = new.records.get(deployment_id) or routing.records.get(deployment_id)
        about = (record.about if record else None) or {}
        lasting = ("commit", "image", "digest", "instances")
        entry |= {k: str(about[k])[:300] for k in lasting if about.get(k)}
        entry |= {key: str(value)[:300] for key, value in facts.items() if value}
        return replace(new, history=(*new.history, entry)[-router.HISTORY_AT_MOST :])

    return inner


def renewing(step: Step, holder: str, lease: float) -> Step:
    """Return `step`, after which this holder's deploy lock ends in `lease` seconds."""

    def inner(routing: Routing) -> Routing:
        refuse_ended(routing, holder)
        new = step(routing)
        if new.lock is None or new.lock.holder != holder:
            return new
        return replace(new, lock=replace(new.lock, until=routing.now + lease))

    return inner


def with_unlock(step: Step, holder: str) -> Step:
    """Return `step`, with the release of the deploy lock in the same transaction."""

    def inner(routing: Routing) -> Routing:
        refuse_ended(routing, holder)
        return step(release_deploy_lock(routing, holder))

    return inner


def refuse_ended(routing: Routing, holder: str) -> None:
    """Raise StateError for a run of `deploy` that has lost its lock: it would undo the next one's
    promotion."""
    if holder in ended_runs(routing):
        raise StateError(
            "the deploy lock of this run was taken over, or released by `unlock`: deploy again",
            "ended",
        )


# -- the app's internal endpoints --------------------------------------------------------------


class WrongToken(ValueError):
    """A backend has another internal token than the router."""


def ask_backend(record: Record, path: str, token: str, method: str = "GET") -> Json:
    """Call one of the app's internal endpoints in the private network, and return its answer.

    Raises OSError, and ValueError for anything but a JSON object with status 200.
    """
    status, body = 403, b""
    for held in tokens_of(record, token):
        try:
            headers = {router.INTERNAL_TOKEN_HEADER: held}
            status, body = backend_answer(record, path, headers, method)
        except http.client.HTTPException as error:
            raise ValueError from error
        if status != 403:
            break
    if status == 403:
        raise WrongToken
    if status != 200:
        raise ValueError
    return router.json_object(body)


def tokens_of(record: Record, token: str) -> list[str]:
    """Return the tokens that a backend may hold, the likeliest first.

    Its process keeps the one with which it was started, also after `ensure --rotate`.

    Args:
        token: the present one.
    """
    former = router.or_none(router.json_object, os.environ.get(FORMER_TOKENS) or "{}") or {}
    times = {held: until for held, until in former.items() if type(until) in (int, float)}
    older = sorted(times, key=lambda held: times[held])
    since = record.registered_at or 0.0
    at_start = [held for held in older if times[held] > since]
    return list(dict.fromkeys([*at_start, token, *older]))


def backend_answer(
    record: Record, path: str, headers: Mapping[str, str], method: str = "GET"
) -> tuple[int, bytes]:
    """Return status and body of an answer.

    Raises OSError, http.client.HTTPException, and ValueError for a record without an address.
    """
    with contextlib.closing(router.connection_to(record)) as connection:
        connection.request(method, path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(router.DEFAULT_LIMITS.answer_head_bytes)


def sessions(record: Record, token: str) -> int | None:
    """Return the number of a deployment's render sessions; None without a valid answer.

    A deployment with 0 sessions is deleted, so anything but a whole number is None.
    """
    with contextlib.suppress(OSError, ValueError):
        return ask_sessions(record, token)
    return None


def ask_sessions(record: Record, token: str) -> int | None:
    """As `sessions`, but raises what `ask_backend` raises."""
    count = ask_backend(record, SESSIONS_PATH, token).get("render_session_count")
    return count if type(count) is int and count >= 0 else None


def sessions_answer(record: Record, token: str) -> Json:
    """Return the fields of `control status` about a deployment's sessions."""
    try:
        return {"sessions": ask_sessions(record, token)}
    except WrongToken:
        return {"sessions": None, "wrong_token": True}
    except (OSError, ValueError):
        return {"sessions": None}


def reload_tabs(record: Record, token: str) -> int:
    """Tell the open tabs of a deployment to reload, and return how many were told."""
    with contextlib.suppress(OSError, ValueError):
        path = RELOAD_PATH
        count = ask_backend(record, path, token, method="POST").get("reloaded_socket_count")
        return count if type(count) is int else 0
    return 0


# -- waiting for the routers -------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """The routers' reports, and the routers that do not serve an epoch yet."""

    reports: list[Json]
    behind: list[str]  # names of routers

    def under_way(self, deployment_id: str, epoch: int) -> int:
        """Return the number of requests and sockets of a deployment, by reports since `epoch`."""
        counts = (
            r.get("in_flight", {}).get(deployment_id, 0)
            for r in self.reports
            if router_epoch(r) is None or cast(int, router_epoch(r)) >= epoch
        )
        return sum(count for count in counts if type(count) is int)


def router_epoch(report: Json) -> int | None:
    """Return the epoch that a router serves; None for a version that does not report it."""
    epoch = report.get("epoch")
    return epoch if type(epoch) is int else None


def reports(store: router.Store) -> list[Json]:
    """Return the last report of each router, with its `age` in seconds."""
    if not isinstance(store, router.RedisStore):
        return []
    pattern = f"{store.prefix}{router.REPORT}*"
    return read_reports(store, list(store.client.scan_iter(pattern, count=router.SCAN_COUNT)))


def read_reports(store: router.RedisStore, keys: list[str]) -> list[Json]:
    """Return the reports under these keys. A key without a lease was not written by a router."""
    if not keys:
        return []
    with store.client.pipeline(transaction=False) as pipe:
        pipe.mget(keys)  # None for another type, where GET is an error
        for key in keys:
            pipe.pttl(key)
        values, *leases = pipe.execute()
    valid_reports = []
    for key, text, milliseconds in zip(keys, values, leases, strict=True):
        if text is not None and is_lease(milliseconds):
            age = max(router.REPORT_LEASE - milliseconds / 1000, 0.0)
            name = key.removeprefix(store.prefix + router.REPORT)
            with contextlib.suppress(ValueError):
                report = {**router.json_object(text), "router": name, "age": round(age, 1)}
                valid_reports.append(report | checked_report(report))
    return valid_reports


def is_lease(milliseconds: int) -> bool:
    """Is this answer of Redis' PTTL a lease that ends within LEASE_AT_MOST seconds?"""
    return 0 <= milliseconds <= LEASE_AT_MOST * 1000


def reports_without_lease(store: router.Store) -> list[str]:
    """Return the keys of reports that were not written by a router, since they never expire."""
    if not isinstance(store, router.RedisStore):
        return []
    pattern = f"{store.prefix}{router.REPORT}*"
    keys = sorted(store.client.scan_iter(pattern, count=router.SCAN_COUNT))
    expired = -2  # PTTL's answer for a key that has gone since the scan
    return [k for k in keys if (pttl := store.client.pttl(k)) != expired and not is_lease(pttl)]


def checked_report(report: Json) -> Json:
    """Return the fields that are read of a report, with valid types; invalid ones are empty."""
    counters = ("requests", "errors", "tunnels_open", "uptime_seconds")
    checked: Json = {n: report[n] if type(report.get(n)) is int else 0 for n in counters}
    for name in ("in_flight", "tallies", "failing"):
        checked[name] = report[name] if isinstance(report.get(name), dict) else {}
    return checked


def wait_for_routers(
    store: router.Store, epoch: int, since: float, deletes: bool, timeout: float | None = None
) -> Served:
    """Wait until every router serves this epoch, and return their reports.

    Args:
        since: seconds since the epoch began; decides for routers that report no epoch.
        deletes: a service is deleted afterwards. So a silent router counts as behind until its
            report expires, and a router of another version for OTHER_VERSION_SECONDS.
        timeout: seconds; None for REPORT_WAIT.
    """
    router_reports = reports(store)
    deadline = time.monotonic() + (REPORT_WAIT if timeout is None else timeout)
    while True:
        behind = [str(r["router"]) for r in router_reports if _is_behind(r, epoch, since, deletes)]
        waited_for = [
            r
            for r in router_reports
            if r["router"] in behind and (router_epoch(r) is not None) and r["age"] < SILENT_SECONDS
        ]
        if not waited_for or time.monotonic() > deadline:
            return Served(router_reports, behind)
        time.sleep(REPORT_POLL)
        assert isinstance(store, router.RedisStore)
        names = [r["router"] for r in router_reports]
        router_reports = read_reports(store, [f"{store.prefix}{router.REPORT}{n}" for n in names])


def _is_behind(report: Json, epoch: int, since: float, deletes: bool) -> bool:
    """Must `wait_for_routers` count this router as behind? The arguments are the same."""
    served = router_epoch(report)
    if served is None:
        return not deletes or since < OTHER_VERSION_SECONDS
    return served < epoch and (deletes or report["age"] < SILENT_SECONDS)


def keep_while_routers_report(store: router.RedisStore, routing: Routing) -> None:
    """Renew the expiry of all keys of a state with a TTL, counted from the last router report.

    Without a recent report nothing is renewed, so that the state of a deleted copy expires.
    """
    ages = [report["age"] for report in reports(store)] if store.ttl else []
    if not ages:
        return
    end = int(routing.now - min(ages)) + cast(int, store.ttl)
    with store.client.pipeline(transaction=False) as pipe:
        for key in [*router.FIXED, *(record.key for record in routing.records.values())]:
            pipe.expireat(store.prefix + key, end)
        pipe.execute()


# -- the commands ------------------------------------------------------------------------------


def status_answer(
    store: router.Store,
    token: str,
    last_promoted: Promotion | None,
    env: Mapping[str, str] | None = None,
) -> Json:
    """Return what `control status` answers."""
    routing, me = store.read(), ownership.name(env or {})
    problems = list(routing.problems)
    if copy := ownership.copy_refusal(env or {}):
        problems.append(copy)
    elif routing.is_foreign(me):
        problems.append(ownership.foreign_words(str(routing.owner)))
    records, routers = list(routing.records.values()), reports(store)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a silent one takes seconds
        counts = list(pool.map(lambda record: sessions_answer(record, token), records))
    canary, lock = routing.canary, routing.lock
    closed = routing.maintenance and {**vars(routing.maintenance)}
    if closed:
        del closed["page"]
    return {
        "active": routing.active,
        "promoted": routing.promoted and vars(routing.promoted),
        "canary": canary and canary_answer(canary),
        "maintenance": closed,
        "lock": lock and lock_answer(lock),
        "now": routing.now,
        "clock": routing.now,
        "lost": is_lost(routing, last_promoted),
        "epoch": routing.epoch,
        "owner": routing.owner,
        "identity": me,
        "copy_of": ownership.copied_from(env or {}),
        "problems": problems,
        "deployments": [
            {**record_answer(r), **count} for r, count in zip(records, counts, strict=True)
        ],
        "routers": routers,
        "fallback": fallback_in_use(routers, routing),
        "reports_without_lease": reports_without_lease(store),
        "writes_refused": write_refusal(store),
        "redis": redis_facts(store),
        "janitor": janitor_run(store),
        "bake": bake_answer(store, routing),
        "previews": PREVIEWS,
        "instances": router.INSTANCES_AT_MOST,  # that this version of the router knows
        "steps": STEPS,
        "moves": MOVES,
    }


def bake_answer(store: router.Store, routing: Routing) -> Json | None:
    """Return the bake in progress, with what all routers have counted in it by deployment."""
    record = routing.baking
    if record is None or record.bake is None:
        return None
    texts: list[Any] = []
    if isinstance(store, router.RedisStore):
        with contextlib.suppress(redis.ResponseError):  # a key of another type
            texts = cast(list[Any], store.client.hvals(store.prefix + router.bake_key(record)))
    samples: dict[str, Json] = {}
    for text in texts:
        for name, sample in (router.or_none(router.json_object, text) or {}).items():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                samples[name] = sum_of_samples(samples.get(name), sample)
    for sample in samples.values():  # an answer is bounded, however many routers there are
        most = heapq.nlargest(
            ADDRESSES_ANSWERED, sample["addresses"].items(), key=lambda item: sum(item[1])
        )
        sample["addresses"] = dict(most)
    bake = {k: v for k, v in vars(record.bake).items() if v is not None}
    return {**bake, "deployment_id": record.deployment_id, "samples": samples}


def sum_of_samples(one: Json | None, other: Json) -> Json:
    """Return the sum of two routers' samples. Raises ValueError and others for an invalid one."""
    parts = [other] if one is None else [one, other]
    numbers = [n for part in parts for n in (part["requests"], part["slow"], part["visitors"])]
    failed: collections.Counter[str] = collections.Counter()
    addresses: dict[str, list[int]] = {}
    for part in parts:
        failed.update(part["failed"])
        for address, entry in part["addresses"].items():
            before = addresses.get(address, [0, 0, 0])
            addresses[address] = [a + b for a, b in zip(before, entry, strict=True)]
    seconds = [sum(column) for column in zip(*(part["seconds"] for part in parts), strict=True)]
    counts = [*numbers, *seconds, *failed.values(), *(n for e in addresses.values() for n in e)]
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError
    return {
        "requests": sum(part["requests"] for part in parts),
        "failed": dict(failed),
        "slow": sum(part["slow"] for part in parts),
        # one that came to two routers counts once
        "visitors": max(len(addresses), *(part["visitors"] for part in parts)),
        "seconds": seconds,
        "addresses": addresses,
    }


def write_refusal(store: router.Store) -> str | None:
    """Return why Redis refuses writes (it is full, a replica, has no disk); None if it takes them.

    Nothing is written: XX is for a key that exists, and Redis refuses before it looks.
    """
    if not isinstance(store, router.RedisStore):
        return None
    try:
        store.client.set(f"{store.prefix}:none", "", xx=True)
    except redis.ResponseError as error:
        return str(error)[:200]
    return None


def redis_facts(store: router.Store) -> Json:
    """Return what `doctor` looks at: how Redis evicts, how full it is (bytes), and whether its data
    outlive a restart; a fact that it does not tell is None."""
    if not isinstance(store, router.RedisStore):
        return {}
    facts: Json = {}
    with contextlib.suppress(redis.ResponseError):  # a user without INFO
        told = store.client.info("everything")
        names = ("redis_version", "maxmemory_policy", "used_memory", "maxmemory", "aof_enabled")
        facts = {name: told.get(name) for name in names}
    with contextlib.suppress(redis.ResponseError):  # many providers have no CONFIG
        facts["save"] = store.client.config_get("save").get("save")
    return facts


def janitor_run(store: router.Store) -> Json | None:
    """Return the outcome of the janitor's last run, with its `age` in seconds; None if unknown.

    `failed` is the number of runs in a row that have failed, `why` the last one's message.
    """
    if not isinstance(store, router.RedisStore):
        return None
    (text,) = store.client.mget(store.prefix + JANITOR_RUN)  # None for another type
    with contextlib.suppress(ValueError, TypeError, KeyError):
        run = router.json_object(str(text))
        failed, why = run.get("failed"), run.get("why")
        return {
            "age": max(round(store_time(store) - router.a_time(run["at"]), 1), 0.0),
            "failed": failed if type(failed) is int else 0,
            "why": str(why)[:300] if why else None,
        }
    return None


def store_time(store: router.RedisStore) -> float:
    """Return Redis' time, in seconds since 1970."""
    seconds, microseconds = store.client.time()
    return float(seconds) + float(microseconds) / 1e6


def canary_answer(canary: Record) -> Json:
    """Return the canary, with its weight in percent, since when, and its steps if it has some."""
    answer = {"deployment_id": canary.deployment_id, "weight": canary.weight}
    steps = {"steps": canary.steps} if canary.steps else {}
    return answer | {"since": canary.canary_at} | steps


def record_answer(record: Record) -> Json:
    """Return a record as JSON, without its invalid fields."""
    fields = {k: v for k, v in record.json().items() if k not in record.ignored}
    fields |= {"preview": True} if record.is_preview else {}  # the hash is of no use to a caller
    names = {"deployment_id": record.deployment_id, "state": record.state or "unknown"}
    return {**fields, **names, "ignored": list(record.ignored)}


def probe(store: router.Store, deployment_id: str, path: str | None) -> Json:
    """Return what answers at a deployment's address, seen from the private network.

    `at` is the answer of `router.look`; `status` that of the page `path`, if it is given.
    """
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
    """Return the status of a page; None without an answer."""
    try:
        return backend_answer(record, path, {"accept": "text/html"})[0]
    except (OSError, ValueError, http.client.HTTPException):
        return None


def serving_answer(served: Served) -> Json:
    """Return the part of an answer that says which routers serve the state."""
    names = ("router", "version", "epoch", "age")
    routers = [{name: report.get(name) for name in names} for report in served.reports]
    return {"routers": routers, "behind": served.behind}


def valid_id(value: str) -> str:
    if not router.DEPLOYMENT_ID.fullmatch(value):
        raise argparse.ArgumentTypeError("a deployment id is [a-z0-9][a-z0-9-]{0,23}")
    return value


def valid_stamp(value: str) -> str:
    if not ownership.parse_stamp(value):
        raise argparse.ArgumentTypeError("an owner is <environment id>/<router service id>")
    return value


def json_argument(value: str) -> Json:
    try:
        return router.json_object(value)
    except ValueError:
        raise argparse.ArgumentTypeError("expected a JSON object") from None


def percent(value: str) -> float:
    percentage = float(value)
    if not 0 <= percentage <= 100:
        raise argparse.ArgumentTypeError("expected a number from 0 to 100")
    return percentage


def moment(value: str) -> float:
    """Parse seconds since 1970, or a duration in seconds."""
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError("expected a number of seconds")
    return seconds


def renewal(value: str) -> tuple[str, float]:
    """Parse HOLDER@SECONDS."""
    holder, _, lease = value.rpartition("@")
    return router.a_text(holder), a_duration(float(lease))


def instance_count(value: str) -> int:
    try:
        return router.instance_count(value)
    except ValueError:
        most = router.INSTANCES_AT_MOST
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}") from None


def some_text(value: str) -> str:
    """Return a name without control characters, cut to 300 characters."""
    return "".join(c if c.isprintable() else " " for c in value)[:300]


def draining_list(value: str) -> list[Json]:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        items = {i["deployment_id"]: i for i in router.from_json(value)}
        for item in items.values():
            router.a_text(item.get("service_name") or "none")
        return list(items.values())
    raise argparse.ArgumentTypeError("expected a JSON list of objects with a deployment_id")


def record_list(value: str) -> list[Record]:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        items = [(i["deployment_id"], json.dumps(i)) for i in router.from_json(value)]
        records = [router.parse_record(valid_id(name), text) for name, text in items]
        if not any(record.ignored for record in records):
            return records
    raise argparse.ArgumentTypeError("expected a JSON list of objects with a deployment_id")


def a_duration(value: float) -> float:
    """Return a number of seconds. Raises ValueError if it is negative or too large."""
    return router.a_number(1e10, value)


def a_positive_duration(value: float) -> float:
    """Return a number of seconds from 1. Raises ValueError."""
    return a_duration(value - 1) + 1


# The checks of the state's parser: no command writes what a router would ignore.
ACCEPTED: dict[str, Callable[[Any], Any]] = {
    "service_name": router.a_text,
    "active_service_name": router.a_text,
    "service_id": router.a_text,
    "preview": router.a_key_hash,
    "address": router.an_address,
    "holder": router.a_text,
    "bake": a_duration,
    "bake_latency_ms": a_duration,
    "move_after": router.a_day_at_most,
    "move_idle": router.a_day_at_most,
    "lease": a_duration,
    "retry_after": a_positive_duration,
    "maintenance_since": router.a_time,
}


def check_arguments(args: argparse.Namespace) -> None:
    """Raise StateError for a value that the routing state cannot hold."""
    for name, check in ACCEPTED.items():
        value = getattr(args, name, None)
        try:
            check(value) if value is not None else None
        except ValueError:
            flag = name.replace("_", "-")
            raise StateError(f"--{flag} cannot be {value!r}: nothing was changed") from None


@functools.cache
def control_parser() -> argparse.ArgumentParser:
    """Return the parser of all control commands. Their names and flags never change."""
    parser = argparse.ArgumentParser(prog="pulse-railway control", description=control.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--nonce", help="repeated in the answer; a nonce is carried out once")
    common.add_argument(
        "--intent", metavar="ID[@AT]", help="the last promotion, by Railway's variables"
    )
    common.add_argument("--by", type=some_text, help="who asks, for the history")
    common.add_argument("--why", help="for the history")
    common.add_argument("--unlock", metavar="HOLDER", help="release the deploy lock, too")
    common.add_argument(
        "--renew", type=renewal, metavar="HOLDER@SECONDS", help="renew that holder's deploy lock"
    )
    common.add_argument("--until", type=moment, help="refused later, by the store's clock")

    def command(name: str, summary: str) -> Callable[..., Any]:
        return commands.add_parser(name, help=summary, parents=[common]).add_argument

    command("active", "the active deployment")
    command("status", "everything in the routing state, with session counts")
    command("history", "the changes of the routing state, with author and reason")
    add = command(
        "probe", "what answers at a deployment's address, and which routers serve the state"
    )
    add("--deployment-id", type=valid_id, required=True)
    add("--path", help="a page of the app; the answer has its status")
    add = command("register", "add a pending deployment")
    add("--deployment-id", type=valid_id, required=True)
    add("--service-name", required=True)
    add("--service-id", help="Railway's id of the service")
    add("--address", help="the backend's base URL")
    add("--hold", action="store_true", help="leave it pending until it is promoted")
    add("--about", type=json_argument, help="its commit, author, message, as JSON")
    add("--preview", metavar="HASH", help="reachable only with the key of this SHA-256")
    add("--instances", type=instance_count, metavar="NUMBER", help="of its processes")
    add = command("promote", "make a deployment active; the active one drains")
    add("--active-deployment-id", type=valid_id, required=True)
    add("--active-service-name", required=True)
    add("--service-id", help="Railway's id of its service; with it, a lost record is created again")
    add("--draining-json", type=draining_list, default=[])
    add("--address", help="the backend's base URL")
    add("--weight", type=percent, help="as the canary, for this percentage of new visitors")
    add("--instead-of", type=valid_id, help="only if this one is active")
    add(
        "--rolls-back",
        action="store_true",
        help="the active one is no rollback target from then on",
    )
    add("--bake", type=moment, metavar="SECONDS", help="how long it is watched")
    add("--steps", type=json_argument, help="the weights that follow each other, as JSON")
    add("--bake-latency-ms", type=moment, metavar="MS", help="what counts as slow meanwhile")
    moves = "when the tabs of the one that drains move over"
    idle = "and those that were not used for so long"
    add("--move-after", type=moment, metavar="SECONDS", help=moves)
    add("--move-idle", type=moment, metavar="SECONDS", help=idle)
    add = command("withdraw", "end a canary: it drains")
    add("--deployment-id", type=valid_id, required=True)
    add("--move-after", type=moment, metavar="SECONDS", help=moves)
    add("--move-idle", type=moment, metavar="SECONDS", help=idle)
    add = command("baked", "end a deployment's bake; the deployment stays")
    add("--deployment-id", type=valid_id, required=True)
    add = command("maintenance", "switch maintenance on or off")
    add("switch", choices=["on", "off"])
    add("--page", help="HTML")
    add("--retry-after", type=int, default=30, metavar="SECONDS")
    add = command("lock", "take or renew the deploy lock")
    add("--holder", required=True)
    add("--lease", type=moment, required=True, metavar="SECONDS")
    add = command("unlock", "release the deploy lock; without --holder, anybody's")
    add("--holder")
    add = command("retire", "take a deployment out of the routing before its removal")
    add("--deployment-id", type=valid_id, required=True)
    add("--service-id", help="Railway's id of the service")
    add("--force", action="store_true", help="also what new visitors get as the fallback")
    add = command("delete", "delete the record of a deployment that is not active")
    add("--deployment-id", type=valid_id, required=True)
    add = command("restore", "rebuild lost state")
    add("--active-deployment-id", type=valid_id, required=True)
    add("--records-json", type=record_list, required=True)
    add("--chosen", action="store_true", help="make it active whatever the store says")
    add("--maintenance-since", type=moment, help="maintenance is on, by Railway's variables")
    add = command("claim", "make this stack the owner of the routing state")
    add("--owner", type=valid_stamp, required=True, metavar="ENVIRONMENT/ROUTER")
    add("--instead-of", type=valid_stamp, metavar="ENVIRONMENT/ROUTER", help="the present owner")
    return parser


def step_of(args: argparse.Namespace) -> Step:
    """Return the step of a control command, with its entry in the history."""
    name: str = getattr(args, "deployment_id", "")
    noted = {"by": args.by, "why": args.why}
    match args.command:
        case "register":
            step = functools.partial(
                add_record,
                deployment_id=name,
                service_name=args.service_name,
                address=args.address,
                pinned=args.hold,
                service_id=args.service_id,
                about=args.about,
                preview=args.preview,
                instances=args.instances,
            )
            return with_history(step, "preview", name, **noted) if args.preview else step
        case "promote":
            name = args.active_deployment_id
            common = {
                "deployment_id": name,
                "service_name": args.active_service_name,
                "service_id": args.service_id,
                "instead_of": args.instead_of,
                "bake": args.bake,
                "bake_latency_ms": args.bake_latency_ms,
            }
            if args.weight is not None:
                step = functools.partial(
                    set_canary_weight, weight=args.weight, steps=args.steps, **common
                )
                return with_history(step, "canary", name, weight=f"{args.weight:g} %", **noted)
            step = functools.partial(
                set_active,
                draining=args.draining_json,
                address=args.address,
                rolls_back=args.rolls_back,
                move_after=args.move_after,
                move_idle=args.move_idle,
                **common,
            )
            return with_history(step, "rollback" if args.rolls_back else "promote", name, **noted)
        case "withdraw":
            step = functools.partial(
                abort_canary,
                deployment_id=name,
                move_after=args.move_after,
                move_idle=args.move_idle,
            )
            return with_history(step, "rollback", name, **noted)
        case "baked":
            return functools.partial(finish_bake, deployment_id=name)
        case "retire":
            return functools.partial(retire, deployment_id=name, service_id=args.service_id)
        case "delete":
            step = functools.partial(delete_record, deployment_id=name)
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
            return functools.partial(release_deploy_lock, holder=args.holder)
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
    """Return when a deployment was promoted, by Railway's variables; None if not known."""
    return promoted.at if promoted and promoted.deployment_id == deployment_id else None


# These commands need no complete state, or repair it.
ALLOWED_WHEN_LOST = ("restore", "lock", "unlock", "maintenance", "claim")
READ_ONLY = ("active", "status", "history", "probe")
# These commands are undone by a janitor of 0.3.x that runs at the same time.
EXCLUDES_OLD_JANITORS = ("promote", "restore")
# These commands change which visitors get which deployment, so they wait for the routers.
WAITS_FOR_ROUTERS = ("promote", "withdraw", "retire", "maintenance", "restore")
PREVIEWS = True  # in answers: this version has previews
STEPS = True  # in `status`: this version keeps a canary's steps
MOVES = ["page", "idle"]  # in `status`: when this version moves tabs over


@contextlib.contextmanager
def older_janitors_kept_out(store: router.Store) -> Iterator[None]:
    """Keep janitors of 0.3.x from running, by holding the janitor's lock.

    Waits for at most JANITOR_WAIT seconds until such a janitor ends. It uses no transactions: it
    writes the deployment back that was active when it began, and deletes one that was promoted
    since. A janitor of this version does no harm and is not waited for.
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
        release_run_lock(store, holder)


def take_lock(store: router.RedisStore, holder: str, lease: int) -> bool:
    """Take the janitor's lock for `lease` seconds. Returns False if another holder has it.

    A key of another type or without a lease was written by no version; it would never expire, and
    is replaced.
    """
    key = f"{store.prefix}{JANITOR_LOCK}"
    if store.client.set(key, holder, nx=True, ex=lease):
        return True
    if store.client.mget([key]) == [
        holder
    ]:  # the answer to SET was lost, and the client repeated it
        return True
    with store.client.pipeline() as pipe:
        pipe.watch(key)  # type: ignore[no-untyped-call]
        if pipe.type(key) == "string" and is_lease(pipe.pttl(key)):
            return False
        pipe.multi()
        pipe.set(key, holder, ex=lease)
        try:
            return bool(pipe.execute()[0])
        except redis.WatchError:  # another holder was faster
            return False


def release_run_lock(store: router.RedisStore, holder: str) -> None:
    """Release the janitor's lock if this holder still has it."""
    key = f"{store.prefix}{JANITOR_LOCK}"
    with contextlib.suppress(redis.RedisError), store.client.pipeline() as pipe:
        pipe.watch(key)  # type: ignore[no-untyped-call]
        if pipe.get(key) == holder:
            pipe.multi()
            pipe.delete(key)
            pipe.execute()


def change_state(store: router.Store, args: argparse.Namespace, me: str | None = None) -> Routing:
    """Carry out a command that writes, once for its nonce, and return the new state.

    If the store has lost data, waits for at most HEAL_WAIT seconds until a router has written them
    back. Raises StateError.

    Args:
        me: the owner that this container works for; None outside Railway.
    """
    check_arguments(args)
    step = step_of(args)
    if args.until is not None:
        step = in_time(step, args.until)
    if args.command == "claim":  # idempotent by itself, and not in the history
        if me not in (None, args.owner):
            raise StateError(f"this is {me}, and claims nothing for {args.owner}", "owner")
        return store.apply(step)
    if args.command == "lock":  # a deploy's first command; `ensure` may not have reached Redis
        step = claiming_bare(step, me)
    if args.unlock:
        step = with_unlock(step, args.unlock)
    if args.renew:
        step = renewing(step, *args.renew)
    if args.command not in ALLOWED_WHEN_LOST:
        step = refuse_if_lost(step, args.promoted)
    step = owned(step, me)
    # refused here already, so that the janitor of another owner is not kept out
    if args.command in EXCLUDES_OLD_JANITORS and me is not None:
        before = store.read()
        if args.nonce not in before.processed:
            refuse_foreign(before, me)
    if args.command == "restore":  # a router knows more than Railway shows
        wait_for_healing(store, args.promoted)
    if args.nonce:
        step = idempotent(step, args.nonce)
    exclusion = older_janitors_kept_out(store) if args.command in EXCLUDES_OLD_JANITORS else None
    with exclusion or contextlib.nullcontext():
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
    """Wait until a router has written lost data back, and return the state.

    Waits for at most HEAL_WAIT seconds; the state can still be lost then. `last` is the last
    promotion that Railway knows of.
    """
    deadline = time.monotonic() + HEAL_WAIT
    while True:
        routing = store.read()
        complete = routing.active is not None and not is_lost(routing, last)
        if complete or time.monotonic() > deadline:
            return routing
        store.announce()
        time.sleep(0.25)


def carry_out(argv: list[str], env: Mapping[str, str]) -> Json:
    """Carry out a control command and return its answer.

    The answer has the command's name, its nonce and this version; `clock` is the store's time, for
    the next command's `--until`. If it is not ok, it has `error`
    and `reason`; the reason `store` means that Redis did not answer, so it is not known whether the
    command was carried out. Raises SystemExit for invalid arguments.
    """
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
                routing = store.read()
                answer = {"ok": True, "deployment_id": routing.active, "clock": routing.now}
            case "status":
                answer = {"ok": True, **status_answer(store, token, args.promoted, env)}
            case "history":
                routing = store.read()
                answer = {"ok": True, "history": list(routing.history), "clock": routing.now}
            case "probe":
                answer = {"ok": True, **probe(store, args.deployment_id, args.path)}
            case _:
                answer = {"ok": True, **change_answer(store, args, token, ownership.name(env))}
    except StateError as error:
        answer = {"ok": False, "error": str(error), "reason": error.reason, **error.facts}
    except (redis.RedisError, sqlite3.Error, OSError) as error:
        message = f"the router's Redis does not answer ({router.redis_cause(error)})"
        answer = {"ok": False, "error": message, "reason": "store"}
    version = router.runtime_version()
    if copy:
        answer["copy_of"] = ownership.copied_from(env)
    return {**answer, "command": args.command, "nonce": args.nonce, "version": version}


def fallback_in_use(reports: list[Json], routing: Routing) -> str | None:
    """Return the deployment that a router gives to new visitors in place of the active one."""
    fallback = routing.fallback.deployment_id if routing.fallback else None
    return fallback if any(report.get("fallback") == fallback for report in reports) else None


def needed_fallback(reports: list[Json], routing: Routing) -> str | None:
    """Return the deployment that new visitors get, or would get, in place of the active one, since
    that cannot be connected to. After a restore it is the one that `rollback` leads to."""
    former, active = routing.former_active, routing.record_of_active()
    if former is None or active is None:
        return None
    down = fallback_in_use(reports, routing) or router.look(active) == "unreachable"
    return former.deployment_id if down else None


def fallback_words(routing: Routing, fallback: str) -> str:
    """Return the problem for people."""
    return f"{routing.active} cannot be connected to: new visitors get {fallback}"


def change_answer(
    store: router.Store, args: argparse.Namespace, token: str, me: str | None = None
) -> Json:
    """Carry out a command that writes, wait for the routers, and return the answer's fields."""
    if args.command == "retire" and not args.force:
        before = store.read()
        former = before.former_active  # the only one that can be it: the active one is asked then
        is_former = former is not None and former.deployment_id == args.deployment_id
        if is_former and needed_fallback(reports(store), before):
            words = fallback_words(before, args.deployment_id)
            raise StateError(f"{words}. --force removes it all the same", "fallback")
    routing = change_state(store, args, me)
    answer: Json = {"clock": routing.now}
    if args.command == "claim":
        answer["owner"] = routing.owner
    record = routing.records.get(getattr(args, "deployment_id", None) or "")
    if args.command in ("promote", "restore"):
        answer["promoted"] = routing.promoted and vars(routing.promoted)
        records = routing.records.values()
        former = next((r for r in records if r.drain_started_at == routing.now), None)
        if former and args.command == "promote":
            name = former.deployment_id
            answer["drains"] = {"deployment_id": name, "sessions": sessions(former, token)}
    if args.command == "maintenance":
        answer["since"] = routing.maintenance and routing.maintenance.since
        answer["at"] = routing.now
    if args.command == "lock":
        answer |= {"active": routing.active, "lost": is_lost(routing, args.promoted)}
        answer |= {"ended": ended_runs(routing), "now": routing.now, "previews": PREVIEWS}
    if args.command in WAITS_FOR_ROUTERS or getattr(args, "preview", None):
        deletes = args.command == "retire"
        since = retired_for(routing, args.deployment_id) if deletes else 0.0
        answer |= serving_answer(wait_for_routers(store, routing.epoch, since, deletes))
    if args.command == "retire" and record:
        answer["reloaded"] = reload_tabs(record, token)
    return answer


def control(argv: list[str]) -> int:
    """Run a control command inside the router service, and return the exit status.

    The last line on stdout is the answer, a JSON object.
    """
    control_parser().parse_args(argv)  # --help and errors of arguments work outside Railway, too
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
