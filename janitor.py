#!/usr/bin/env python3
# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "aiohappyeyeballs>=2.6",
#   "httptools>=0.6.4",
#   "httpx>=0.28.1",
#   "redis>=6.4",
#   "starlette>=0.50",
#   "uvicorn>=0.35,<1",
#   "uvloop>=0.21; sys_platform != 'win32'",
# ]
# ///
"""The janitor: removes deployments that nobody uses any more. Railway runs it on a cron schedule.

    python janitor.py [run]

Each run asks every draining deployment for its number of sessions:

- No sessions: the service is deleted. The deployment that was active last stays for the rollback
  window.
- The drain TTL is over: its tabs are told to reload, then the service is deleted.
- No answer: the deployment stays until the drain TTL is over.

A failed deploy is removed after an hour, if its deployment on Railway failed, crashed or never
started, its address cannot be reached, and it was never promoted. A run never touches the active
deployment, a deployment that has changed since the run read it, a service that neither the routing
state names nor a deploy of this stack created, or a service of another owner. In a copy of an
environment, or if the routing state belongs to another stack, a run does nothing.

The record is retired first. When every router has reported that it serves the retirement, the
Railway service is deleted. The record is deleted last, so the next run completes a run that was
killed at any point.

If the routing state is lost, or older than the last promotion that Railway knows of (the router
service's variable PULSE_RAILWAY_ACTIVE), a run repairs the state and deletes nothing.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # SystemExit releases the run's lock
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

import argparse
import base64
import contextlib
import functools
import json
import logging
import math
import os
import re
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import httpx
import redis

import control
import ownership
import router
from router import Json, Promotion, Record, Routing

API_URL = "https://backboard.railway.com/graphql/v2"
LOCK_SECONDS = 60  # lease of the run's lock, renewed during the run
CALL_SECONDS = 60  # until one answer of Railway's API is complete
NOTIFY_AGAIN_SECONDS = 3600  # while new visitors get the fallback
DEAD_DEPLOY_SECONDS = 3600  # a younger deploy may still be under way
# statuses of a Railway deployment that does not run
NEVER_RAN = (None, "FAILED", "CRASHED", "REMOVED", "SKIPPED")
GONE_SECONDS = 60  # the service of a younger record may not be listed by Railway yet
MAINTENANCE = "PULSE_RAILWAY_MAINTENANCE"  # on the router service: since when maintenance is on
MAINTENANCE_OFF = "PULSE_RAILWAY_MAINTENANCE_OFF"  # when maintenance ended last
ABOUT = "PULSE_RAILWAY_ABOUT"  # on a backend: its commit, author and message
RUN = "PULSE_RAILWAY_DEPLOY_RUN"  # on a backend: the `deploy` run that created it
INSTANCES = "PULSE_RAILWAY_INSTANCES"  # on a backend: how many processes it runs
PREVIEW = "PULSE_RAILWAY_PREVIEW"  # on a preview's backend: the SHA-256 of its key
INTERNAL_TOKEN = "PULSE_RAILWAY_INTERNAL_TOKEN"
RELOAD_GRACE_SECONDS = 3.0
NOTIFY = "PULSE_RAILWAY_NOTIFY_URL"
OWNS_STATE = "PULSE_RAILWAY_OWNS_STATE"  # on the router service: 1 if set by `ensure --owns-state`
OTHER_STACK = "its service belongs to another stack"
# {"nonce": ..., "words": [...], "caller": who waits, "confirmed": the run that may carry it out};
# an earlier CLI's has no caller, and "until", seconds since 1970
CONTROL = "PULSE_RAILWAY_CONTROL"
# the answer of that control command; before, {"ready": its nonce, "run": ...} asks its caller
CONTROL_ANSWER = "PULSE_RAILWAY_CONTROL_ANSWER"
CONFIRM_SECONDS = 12.0  # until the caller of a command has confirmed that it waits
CONFIRM_POLL = 0.7
ANSWER_BYTES = 16 * 1024  # with a variable of 128 KB Linux starts no process
EARLIER_ANSWER_BYTES = 100 * 1024  # to a caller that cannot unpack one

SERVICES = """
query Services($project: String!, $environment: String!) {
  environment(id: $environment, projectId: $project) {
    config
    serviceInstances {
      edges { node { serviceId serviceName createdAt numReplicas latestDeployment { status } } }
    }
  }
}
"""

VARIABLES = """
query Variables($project: String!, $environment: String!, $service: String!) {
  variables(
    projectId: $project, environmentId: $environment, serviceId: $service, unrendered: true
  )
}
"""

log = logging.getLogger("pulse.janitor")


class GraphqlError(RuntimeError):
    """Railway's API has refused a valid document. The message is Railway's."""


class Contradiction(Exception):
    """The routing state and Railway's services contradict each other, so nothing is deleted.

    The message says which command resolves the contradiction.
    """


@dataclass(frozen=True)
class Backend:
    """A backend service on Railway."""

    id: str
    name: str
    deployment: str
    age: float  # seconds
    status: str | None = None  # of the latest deployment on Railway
    ours: bool = False  # `deploy` created it: it has the variable RUN
    stamped: bool = True  # it has the variable PULSE_RAILWAY_STACK
    replicas: int = 1
    about: Mapping[str, Any] | None = None  # commit, author and message, by the variable ABOUT
    preview: str | None = None  # by the variable PREVIEW; "" if its value is invalid
    instances: int = 1  # how many processes it runs, by the variable INSTANCES

    def record(self) -> Record:
        """Return a record with no more than what Railway shows of the service."""
        record = Record(
            self.deployment,
            service_name=self.name,
            service_id=self.id,
            registered_at=time.time() - self.age,
            about=self.about,
            state="" if self.preview is None else "pending",
            pinned=self.preview is not None,
            preview=self.preview,
        )
        if self.instances == 1 or record.url is None:
            return record
        return replace(record, instances=router.instances_at(record.url, self.instances))


@dataclass(frozen=True)
class Inventory:
    """The services of this stack on Railway, and the variables that its runs depend on."""

    backends: list[Backend]  # of this stack only
    router_id: str | None = None
    promoted: Promotion | None = None  # the last promotion, by the router service's variables
    closed: float | None = None  # since when maintenance is on, by the same
    opened: float | None = None  # when the last maintenance ended, by the same
    janitor_id: str | None = None
    request: str = ""  # the janitor service's PULSE_RAILWAY_CONTROL
    answer: str = ""  # the janitor service's PULSE_RAILWAY_CONTROL_ANSWER
    others: Mapping[str, str] = field(default_factory=dict)  # deployment -> why it is left alone
    foreign: Set[str] = frozenset()  # those of `others` that are certainly not this stack's
    identity: str | None = None  # this stack's stamp
    stamped: bool = False  # the router service has this stamp
    owns_state: bool = False  # an ownerless state belongs to this stack, whatever its contents


@dataclass
class Report:
    """What a run did. `main` prints it as one line of JSON."""

    deleted: list[str] = field(default_factory=list)
    # deleted, but the empty service remains on Railway
    left_empty: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)  # deleted, since the drain TTL was over
    kept: dict[str, str] = field(default_factory=dict)  # deployment -> reason
    failed: dict[str, str] = field(default_factory=dict)  # deployment -> error
    fallback: str | None = None  # new visitors get it, since the active one is down
    restored: str | None = None  # the active deployment of a state that was rebuilt
    claimed: str | None = None  # the owner that this run wrote into the routing state
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Retention:
    """How long draining deployments are kept."""

    drain_ttl: float = 86_400.0  # seconds
    rollback_window: float = 0.0  # seconds; keeps the deployment that was active last
    keep: int = 0  # number of formerly active deployments that stay until the drain TTL

    def rollback_targets(self, routing: Routing, running: Collection[str]) -> set[str]:
        """Return the deployments that are kept for `rollback` after their last tab has closed.

        These are the deployment that was active last, during the rollback window, and the last
        `keep` deployments.

        Args:
            running: ids of the deployments that have a service. Only these are returned.
        """
        drained = [
            (r.drain_started_at, r.deployment_id)
            for r in routing.records.values()
            if r.state == "draining" and r.drain_started_at and not (r.rejected_at or r.retiring_at)
            if r.deployment_id in running
        ]
        drained.sort(reverse=True)
        kept = drained[: self.keep]
        if drained and routing.now - drained[0][0] < self.rollback_window:
            kept = [drained[0], *kept]
        return {name for _, name in kept}


class Railway:
    """The janitor's calls to Railway's API.

    RAILWAY_TOKEN may be a project token or an account token, which need different headers.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.project = env["RAILWAY_PROJECT_ID"]
        self.environment = env["RAILWAY_ENVIRONMENT_ID"]
        self.token = env["RAILWAY_TOKEN"].strip()
        self.router = env.get("PULSE_RAILWAY_SERVICE") or "pulse-router"
        self.janitor = env.get("PULSE_RAILWAY_JANITOR_SERVICE") or "pulse-janitor"
        self.url = env.get("PULSE_RAILWAY_API_URL") or API_URL
        self.client = httpx.Client(timeout=30)
        self.headers = {"Project-Access-Token": self.token}
        self.token_kind_known = False
        self.identity = ownership.identity(env)
        self.deletion = ownership.Deletion(
            lambda document, **variables: self.call(document, **variables),
            GraphqlError,
            self.project,
            self.environment,
            lambda: "Project-Access-Token" in self.headers,
        )

    def call(self, document: str, **variables: Any) -> dict[str, Any]:
        """Send one request and return its data. An HTTP failure is retried twice.

        Raises httpx.HTTPError, GraphqlError, and RuntimeError for an invalid answer.
        """
        for attempt in range(3):
            try:
                body = self.ask({"query": document, "variables": variables})
                break
            except httpx.HTTPError as error:
                if attempt == 2:
                    raise
                log.warning("Railway: %s; trying again", type(error).__name__)
                time.sleep(2**attempt)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            answer = {}
        errors, data = answer.get("errors"), answer.get("data")
        if isinstance(errors, list) and errors:
            message = "; ".join(str(e.get("message") if isinstance(e, dict) else e) for e in errors)
            unknown = not self.token_kind_known and "Project-Access-Token" in self.headers
            if unknown and "not authorized" in message.lower():
                self.headers = {"Authorization": f"Bearer {self.token}"}
                return self.call(document, **variables)
            if not self.token_kind_known and "not authorized" in message.lower():
                message = (
                    f"its RAILWAY_TOKEN does not open this environment: run `pulse-railway ensure`"
                    f" with one that does ({message})"
                )
            raise GraphqlError(message)
        if errors or not data or not isinstance(data, dict):
            raise RuntimeError("Railway's answer is not one of its API")
        self.token_kind_known = True
        return data

    def ask(self, request: Json) -> bytes:
        """Return the body of one answer. Raises httpx.HTTPError, also after CALL_SECONDS."""
        deadline, body = time.monotonic() + CALL_SECONDS, b""
        with self.client.stream("POST", self.url, json=request, headers=self.headers) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("Railway's answer does not end")
        return body

    def inspect(self, routing: Routing | None = None) -> Inventory:
        """Return the backends of this stack, and what the variables of its router and janitor say.

        Raises Contradiction in a copy of an environment.

        Args:
            routing: the routing state; its records name the backends that have no stamp.
        """
        data = self.call(SERVICES, project=self.project, environment=self.environment)
        config = data["environment"]["config"]
        nodes = [edge["node"] for edge in data["environment"]["serviceInstances"]["edges"]]
        for node in nodes:
            counts = list(ownership.replicas(config, node["serviceId"]).values())
            if counts and None not in counts:
                node["numReplicas"] = sum(count or 0 for count in counts)
        if not nodes:
            return Inventory([], identity=str(self.identity) if self.identity else None)
        parameters = ", ".join(f"$s{i}: String!" for i in range(len(nodes)))
        fields = "\n".join(
            f"  s{i}: variables(projectId: $project, environmentId: $environment,"
            f" serviceId: $s{i}, unrendered: true)"
            for i in range(len(nodes))
        )
        variables = self.call(
            f"query Variables($project: String!, $environment: String!, {parameters}) "
            f"{{\n{fields}\n}}",
            project=self.project,
            environment=self.environment,
            **{f"s{i}": node["serviceId"] for i, node in enumerate(nodes)},
        )
        services = {
            node["serviceId"]: ownership.ServiceVariables(
                node["serviceId"], node["serviceName"], variables[f"s{i}"]
            )
            for i, node in enumerate(nodes)
        }
        by_name = {service.name: service for service in services.values()}
        janitor = by_name.get(self.janitor)
        own_router = services.get(self.identity.router_id) if self.identity else None
        own_router = own_router or by_name.get(self.router)
        router_variables: Mapping[str, str] = own_router.variables if own_router else {}
        if own_router and all(name.startswith("RAILWAY_") for name in router_variables):
            raise RuntimeError(
                f"Railway shows no variables of {own_router.name}, which cannot be right: the next"
                " run asks again"
            )
        if own_router and own_router.stamp and own_router.stamp.environment_id != self.environment:
            words = ownership.copy_words(own_router.stamp.environment_id)
            raise control.StateError(words, "owner")
        router_id = own_router.id if own_router else None
        stamp = (own_router.stamp if own_router else None) or self.identity
        if own_router and (stamp is None or stamp.router_id != own_router.id):
            stamp = ownership.Stamp(self.environment, own_router.id)
        backends, others, foreign = self.backends(
            nodes, services, router_id or "", routing or Routing()
        )
        janitor_variables: Mapping[str, str] = janitor.variables if janitor else {}
        return Inventory(
            backends,
            router_id,
            router.promotion_from_env(router_variables),
            time_in(router_variables, MAINTENANCE),
            time_in(router_variables, MAINTENANCE_OFF),
            janitor.id if janitor else None,
            janitor_variables.get(CONTROL) or "",
            janitor_variables.get(CONTROL_ANSWER) or "",
            others,
            foreign,
            str(stamp) if stamp else None,
            own_router is not None and own_router.stamp == stamp,
            router_variables.get(OWNS_STATE) == "1"
            or ownership.is_managed(router_variables.get(ownership.REDIS_URL, "")),
        )

    def backends(
        self,
        nodes: list[dict[str, Any]],
        services: Mapping[str, ownership.ServiceVariables],
        router_id: str,
        routing: Routing,
    ) -> tuple[list[Backend], dict[str, str], set[str]]:
        """Return the backends of this stack, for each other backend why it is left alone, and those
        of the others that are certainly not this stack's.

        Args:
            nodes: Railway's service instances.
            services: the same services with their variables, by id.
            router_id: of this stack's router; empty if there is none.
            routing: the routing state; its records name the backends that have no stamp.
        """
        backends = [
            backend(node, services[node["serviceId"]])
            for node in nodes
            if services[node["serviceId"]].is_backend and not services[node["serviceId"]].is_empty
        ]
        named = {router_id: {b.id for b in backends if routing_names(routing, b)}}
        every = list(services.values())
        owners = ownership.owners(self.environment, every, named)
        own_router = services.get(router_id) or ownership.ServiceVariables("", self.router, {})
        names = ownership.names_of(own_router, every)
        own_backends, others, foreign = [], {}, set()
        for candidate in backends:
            owner, service = owners[candidate.id], services[candidate.id]
            if owner == ownership.Owner("stack", router_id):
                own_backends.append(candidate)
            else:
                unowned = ownership.unowned(service, owner, own_router, names, every)
                others[candidate.deployment] = unowned.words() if unowned else OTHER_STACK
                if not (unowned and unowned.related):
                    foreign.add(candidate.deployment)
        for candidate in own_backends:
            others.pop(candidate.deployment, None)
        return own_backends, others, foreign

    def variables(self, service_id: str) -> dict[str, str]:
        """Return a service's variables, with references not resolved."""
        answer = self.call(
            VARIABLES, project=self.project, environment=self.environment, service=service_id
        )
        return dict(answer["variables"])

    def set_variables(self, service_id: str, values: dict[str, str]) -> None:
        """Set variables of a service without a new deployment of it."""
        self.call(
            ownership.SET_VARIABLES,
            input={
                "projectId": self.project,
                "environmentId": self.environment,
                "serviceId": service_id,
                "variables": values,
                "skipDeploys": True,
            },
        )

    def delete(self, service: Backend) -> bool:
        """Delete a service. False: Railway did not delete it, and it is empty now."""
        return self.deletion.delete(service.id)


def backend(node: dict[str, Any], service: ownership.ServiceVariables) -> Backend:
    """Return a backend as the janitor sees it, from Railway's service instance (`node`)."""
    preview = service.variables.get(PREVIEW)
    return Backend(
        service.id,
        service.name,
        service.variables[ownership.DEPLOYMENT_ID],
        time.time() - datetime.fromisoformat(node["createdAt"]).timestamp(),
        (node["latestDeployment"] or {}).get("status"),
        ours=bool(service.variables.get(RUN) or preview),
        stamped=bool(service.variables.get(ownership.STACK)),
        replicas=1 if node["numReplicas"] is None else node["numReplicas"],
        about=router.or_none(router.json_object, service.variables.get(ABOUT) or "") or None,
        preview=router.or_none(router.a_key_hash, preview) or "" if preview else None,
        instances=router.or_none(router.instance_count, service.variables.get(INSTANCES) or "1")
        or 1,
    )


def routing_names(routing: Routing, service: Backend) -> bool:
    """Does the routing state name this service, in a record or in a tombstone?"""
    name = service.deployment
    record = routing.record_of_active() if name == routing.active else routing.records.get(name)
    if record is None:
        tombstone = routing.tombstones.get(name)
        return tombstone is not None and tombstone.service_id == service.id
    if record.service_id:
        return record.service_id == service.id
    return record.service_name in (None, service.name)


def time_in(variables: Mapping[str, str], name: str) -> float | None:
    """Return the time in a variable, in seconds since 1970; None if it is unset or invalid."""
    value = variables.get(name) or ""
    return float(value) if re.fullmatch(r"[0-9]{1,11}(\.[0-9]+)?", value) else None


@contextlib.contextmanager
def run_lock(store: router.RedisStore) -> Iterator[bool]:
    """Hold the lock of janitor runs, and renew its lease until the run ends.

    Yields False if another run holds the lock.
    """
    key = f"{store.prefix}{control.JANITOR_LOCK}"
    token = control.OUR_LOCK_PREFIX + secrets.token_hex(8)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LOCK_SECONDS / 4):
            with contextlib.suppress(redis.RedisError):
                if store.client.get(key) == token:
                    store.client.expire(key, LOCK_SECONDS)

    try:  # begins before the lock is taken, since a signal can arrive right after that
        locked = control.take_lock(store, token, LOCK_SECONDS)
        if locked:
            threading.Thread(target=renew, daemon=True).start()
        yield locked
    finally:
        done.set()
        control.release_run_lock(store, token)


def clean_up(
    store: router.RedisStore,
    railway: Railway,
    routing: Routing,
    inventory: Inventory,
    token: str,
    retention: Retention,
) -> Report:
    """Carry out one run and return its report.

    Raises Contradiction, and the exceptions of Railway's API and Redis while the state is repaired.

    Args:
        routing: the routing state, read before the inventory.
        inventory: what Railway shows.
        token: for the internal endpoints of the backends.
    """
    report = Report(problems=list(routing.problems))
    routing = claim_unowned(store, routing, inventory, report)
    stamp_backends(railway, routing, inventory)
    release_previews(railway, routing, inventory)
    if mend(store, railway, routing, inventory, report):
        return report  # the next run judges by the repaired state
    refuse_contradiction(routing, inventory)
    by_id = {service.deployment: service for service in inventory.backends}
    rollback_targets = retention.rollback_targets(routing, by_id.keys())
    run = Run(store, railway, routing, inventory, token, report)
    for name, record in routing.records.items():
        service = by_id.get(name)
        if name in inventory.others:
            continue
        with run.isolate_failure(name):
            verdict = run.judge(record, service, retention.drain_ttl)
            if verdict == "stray":  # 0.3.x could be killed between its two writes
                step = functools.partial(control.mark_draining, deployment_id=name, judged=record)
                store.apply(step)
                verdict = "keep: was active beside the active deployment, draining from now on"
            if verdict == "drained" and name in rollback_targets:
                verdict = "keep: for a rollback"
            if verdict in ("drained", "expired") and name == run.fallback:
                verdict = f"keep: {control.fallback_words(routing, name)}"
            if not verdict.startswith("keep"):
                run.remove(name, record, service, verdict)
            elif verdict != "keep: active":
                report.kept[name] = verdict.removeprefix("keep: ")
    for service in inventory.backends:
        if service.deployment not in routing.records:
            with run.isolate_failure(service.deployment):
                run.handle_unregistered(service)
    for name, why in inventory.others.items():
        if name in routing.records or why != OTHER_STACK:
            report.kept[name] = why
    report.fallback = run.fallback
    return report


def claim_unowned(
    store: router.RedisStore, routing: Routing, inventory: Inventory, report: Report
) -> Routing:
    """Write this stack as the owner of a routing state without one, and return the state.

    The router must have its stamp, and no other stack may use the state: the state is empty, its
    Redis is in this environment, or a person has assigned it to this stack (`owns_state`).
    """
    identity = inventory.identity
    if identity is None or not inventory.stamped or router.OWNER in routing.keys:
        return routing

    def step(routing: Routing) -> Routing:
        if router.OWNER in routing.keys or not (control.is_bare(routing) or inventory.owns_state):
            return routing
        return control.set_owner(routing, identity)

    owner = store.apply(step).owner
    report.claimed = identity if owner == identity else None
    return replace(routing, owner=owner)


def stamp_backends(railway: Railway, routing: Routing, inventory: Inventory) -> None:
    """Set PULSE_RAILWAY_STACK on the backends that this stack's routing state names."""
    if not inventory.stamped or inventory.identity is None or routing.owner != inventory.identity:
        return
    for service in inventory.backends:
        if not service.stamped and routing_names(routing, service):
            railway.set_variables(service.id, {ownership.STACK: inventory.identity})


def release_previews(railway: Railway, routing: Routing, inventory: Inventory) -> None:
    """Remove the hash from the services of previews that were promoted, since an earlier version of
    `promote` leaves it: a record that is lost would be restored as a preview's."""
    for service in inventory.backends:
        record = routing.records.get(service.deployment)
        if service.preview is not None and record and not record.is_preview:
            railway.set_variables(service.id, {PREVIEW: "", RUN: secrets.token_hex(8)})


def mend(
    store: router.RedisStore,
    railway: Railway,
    routing: Routing,
    inventory: Inventory,
    report: Report,
) -> bool:
    """Bring the store and Railway's variables to the later promotion of the two.

    Returns whether the two named different deployments, or the state was lost.
    """
    last, healed = inventory.promoted, False
    if not inventory.backends and routing.active is None:
        return False
    if routing.active is None or control.is_lost(routing, last):
        routing = control.wait_for_healing(store, last)
        if routing.active is None or control.is_older_than(routing, last):
            report.restored = rebuild_from_railway(store, routing, inventory, report)
            return True
        healed = True
    if routing.promoted_by_other:  # such a promotion has no time: it gets the present
        active = routing.active

        def add_time(routing: Routing) -> Routing:
            if routing.active != active or not routing.promoted_by_other:
                return routing
            return replace(routing, promoted=Promotion(active, router.next_time(routing)))

        routing = store.apply(add_time)
    differs = last is not None and last.deployment_id != routing.active
    if inventory.router_id and routing.active and routing.promotion != last:
        at = routing.promotion.at if routing.promotion else 0.0
        values = {
            router.LAST_PROMOTED_VARIABLE: routing.active,
            router.LAST_PROMOTED_AT_VARIABLE: repr(at) if at else "",
        }
        railway.set_variables(inventory.router_id, values)
    mend_maintenance(store, railway, routing, inventory)
    return differs or healed


def rebuild_from_railway(
    store: router.RedisStore, routing: Routing, inventory: Inventory, report: Report
) -> str | None:
    """Rebuild a lost routing state, or make the deployment active that was promoted last.

    Returns the deployment that is active then; None if the state was left as it is. Raises
    Contradiction if no active deployment is known.
    """
    last = inventory.promoted
    if last is None or last.deployment_id not in {s.deployment for s in inventory.backends}:
        if routing.active is None:
            raise Contradiction(
                "there are deployments but none is active: run `pulse-railway restore"
                " --deployment-id ...` with the one to make active"
            )
        gone = last.deployment_id if last else "what was active"
        report.problems.append(
            f"{gone} was promoted last and has no service: {routing.active} stays active;"
            f" `pulse-railway restore --deployment-id {routing.active}` makes that final"
        )
        return None
    step = functools.partial(
        control.rebuild_records,
        running=[service.record() for service in inventory.backends],
        active=last.deployment_id,
        at=last.at,
        closed=inventory.closed,
    )
    store.apply(control.with_history(step, "restore", last.deployment_id, by="janitor"))
    log.warning("the routing state was lost, or an older one: restored from Railway")
    return last.deployment_id


def mend_maintenance(
    store: router.RedisStore, railway: Railway, routing: Routing, inventory: Inventory
) -> None:
    """Make the router service's variables and the routing state agree about maintenance.

    The later switch wins. If the state has none, maintenance is on again where the variables say so
    and the history has no later end of it.
    """
    if inventory.router_id is None or (routing.maintenance is None and inventory.closed is None):
        return
    switches = [e for e in routing.history if str(e["what"]).startswith("maintenance ")]
    ended = bool(switches) and switches[-1]["what"] == "maintenance off"
    if routing.maintenance:
        since = routing.maintenance.since
        if inventory.opened and 0 < since < inventory.opened:  # the state is older than that

            def reopen(routing: Routing) -> Routing:
                unchanged = routing.maintenance and routing.maintenance.since == since
                return replace(routing, maintenance=None) if unchanged else routing

            store.apply(control.with_history(reopen, "maintenance off", "", by="janitor"))
        elif inventory.closed is None:
            railway.set_variables(
                inventory.router_id, {MAINTENANCE: repr(since), MAINTENANCE_OFF: ""}
            )
    elif ended and float(switches[-1]["at"]) >= (inventory.closed or 0.0):
        at = repr(float(switches[-1]["at"]))
        railway.set_variables(inventory.router_id, {MAINTENANCE: "", MAINTENANCE_OFF: at})
    else:
        closed = router.Maintenance(inventory.closed or 0.0)
        store.apply(lambda routing: replace(routing, maintenance=routing.maintenance or closed))


def refuse_contradiction(routing: Routing, inventory: Inventory) -> None:
    """Raise Contradiction if the routing state and the services cannot both be right."""
    service_names: dict[str, str] = {}
    for service in inventory.backends:
        other = service_names.setdefault(service.deployment, service.name)
        if other != service.name:
            raise Contradiction(
                f"deployment {service.deployment} is on two services, {other} and {service.name}:"
                " delete the wrong one on Railway"
            )
    known = {*service_names, *(inventory.others.keys() - inventory.foreign)}
    if routing.active and routing.active not in known:
        raise Contradiction(
            f"the active deployment {routing.active} has no service: promote another with"
            " `pulse-railway promote`, or deploy"
        )


@dataclass
class Run:
    """One run: what it judges deployments by, and the changes that it makes.

    `routers_behind`: a router did not report in time, so the run waits for none any more.
    """

    store: router.RedisStore
    railway: Railway
    routing: Routing
    inventory: Inventory
    token: str
    report: Report
    routers_behind: bool = False

    @functools.cached_property
    def fallback(self) -> str | None:
        """The deployment that new visitors get, or would get, in place of the active one."""
        return control.needed_fallback(control.reports(self.store), self.routing)

    @contextlib.contextmanager
    def isolate_failure(self, name: str) -> Iterator[None]:
        """Report a failure at one deployment, so that the run continues with the others."""
        try:
            yield
        except (control.StateError, RuntimeError, httpx.HTTPError) as error:
            message = str(error) if not isinstance(error, httpx.HTTPError) else type(error).__name__
            self.report.failed[name] = message
            log.error("%s: %s", name, message)

    def judge(self, record: Record, service: Backend | None, drain_ttl: float) -> str:
        """Return the verdict on a deployment.

        `keep: <reason>`; `stray` (its record says active, and another one is); or why it is
        removed: `drained`, `expired`, `gone` (its service was deleted on Railway), `dead` (its
        deploy failed).

        Args:
            service: its service; None if Railway lists none.
            drain_ttl: seconds.
        """
        now, name = self.routing.now, record.deployment_id
        if name == self.routing.active:
            return "keep: active"
        if record.retiring_at:
            return "drained"  # an earlier run, or `delete`, was interrupted
        expires = record.state == "draining" and record.drain_started_at is not None
        if expires and now - (record.drain_started_at or now) >= drain_ttl:
            return "expired"
        if record.ignored or record.state not in ("active", "pending", "draining"):
            problem = ", ".join(record.ignored) or f"state {record.state!r}"
            return f"keep: not understood ({problem}): `pulse-railway delete` removes it"
        if record.state == "active":
            return "stray"
        # A service is created before its record, and the records were read before the services. So
        # this service was deleted on Railway by hand: its tabs reload instead of getting 502.
        if service is None and now - (record.registered_at or 0) > GONE_SECONDS:
            reachability = router.look(record)
            if reachability == "unreachable":
                return "gone"
            return f"keep: {reachability}, but Railway does not list it"
        if record.state == "pending":
            return self.judge_pending(record, service)
        count = control.sessions(record, self.token)
        if count is None:
            return "keep: not answering"
        if count:
            return f"keep: {count} sessions"
        if service and service.replicas != 1:
            return f"keep: {service.replicas} replicas, of which one has reported no session"
        under_way = self.under_way(name)
        return f"keep: {under_way} requests under way" if under_way else "drained"

    def judge_pending(self, record: Record, service: Backend | None) -> str:
        """Return the verdict on a pending deployment, as `judge` does."""
        if record.is_preview:
            return "keep: a preview"
        if record.pinned:
            return "keep: pinned"
        age = service.age if service else 0.0
        if record.registered_at:
            age = self.routing.now - record.registered_at
        if age <= DEAD_DEPLOY_SECONDS:
            return "keep: being deployed"
        if self.may_run(record, service):
            return "keep: pending, and it runs or was promoted before: promote or delete it"
        return "dead"

    def may_run(self, record: Record, service: Backend | None) -> bool:
        """May a deployment run that does not answer? False only if it certainly does not."""
        name = record.deployment_id
        promoted = (
            record.promoted_at is not None
            or (self.inventory.promoted and self.inventory.promoted.deployment_id == name)
            or self.was_promoted(name)
        )
        runs = service is not None and service.status not in NEVER_RAN
        return promoted or runs or router.look(record) != "unreachable"

    def was_promoted(self, name: str, within: float = math.inf) -> bool:
        """Does the history have a promotion of this deployment in the last `within` seconds?"""
        return any(
            entry.get("deployment_id") == name
            and entry["what"] in ("promote", "rollback", "restore")
            and self.routing.now - entry["at"] < within
            for entry in self.routing.history
        )

    def under_way(self, name: str) -> int:
        """Return its number of requests and sockets, by the last reports of the routers."""
        return control.Served(control.reports(self.store), []).under_way(name, 0)

    def handle_unregistered(self, service: Backend) -> None:
        """Adopt a service without a record if it may run, else remove it.

        Its deploy failed before the registration, or Redis has lost its record. For an hour nothing
        is done, since its deploy may be under way, unless it was promoted already.
        """
        name, record = service.deployment, service.record()
        if name == self.routing.active:
            self.store.apply(functools.partial(control.adopt_orphan, record=record))
            return
        if not service.ours:
            self.report.kept[name] = (
                "no record names its service, and no deploy of this stack created it"
            )
            return
        if service.age <= DEAD_DEPLOY_SECONDS and not self.was_promoted(name, service.age):
            return
        tombstone = self.routing.tombstones.get(name)
        removed = tombstone is not None and tombstone.service_id == service.id
        if removed or not self.may_run(record, service):
            self.remove(name, None, service, "dead")
        else:
            self.store.apply(functools.partial(control.adopt_orphan, record=record))
            role = "draining" if service.preview is None else "a preview, as it was,"
            self.report.kept[name] = f"no record named it: {role} from now on"

    def remove(self, name: str, judged: Record | None, service: Backend | None, why: str) -> None:
        """Delete a deployment whose record has not changed since it was judged.

        The record is retired first, so that the deployment cannot be promoted meanwhile. When every
        router serves the retirement, the tabs are told to reload.

        Args:
            judged: the record that the verdict is about; None if there was none.
            why: the verdict, for the history.
        """
        try:
            service_id = service.id if service else None
            routing = self.store.apply(
                lambda state: control.retire_if_unchanged(state, name, judged, service_id)
            )
        except control.StateError as error:  # promoted, rolled back to, or drained again
            self.report.kept[name] = str(error)
            return
        since = control.retired_for(routing, name)
        timeout = 0.0 if self.routers_behind else control.REPORT_WAIT
        served = control.wait_for_routers(self.store, routing.epoch, since, True, timeout)
        if served.behind:
            self.routers_behind = True
            self.report.kept[name] = f"{', '.join(served.behind)} may still route to it"
            return
        under_way = served.under_way(name, routing.epoch)
        if under_way and why != "expired":
            self.report.kept[name] = f"{under_way} requests under way"
            return
        if service:
            if judged and control.reload_tabs(judged, self.token):
                time.sleep(RELOAD_GRACE_SECONDS)
            if not self.railway.delete(service):
                self.report.left_empty.append(name)
        step = functools.partial(control.delete_record, deployment_id=name)
        self.store.apply(control.with_history(step, "remove", name, by="janitor", why=why))
        self.report.deleted.append(name)
        if why == "expired":
            self.report.expired.append(name)


def answer_request(
    store: router.RedisStore, railway: Railway, inventory: Inventory, env: Mapping[str, str]
) -> Json | None:
    """Carry out the control command in the janitor's variable, and write its answer beside it.

    Returns the answer; None if there was no command, or if it was withdrawn.
    """
    janitor_id, request = inventory.janitor_id, request_in(inventory.request)
    if janitor_id is None or request is None:
        return None
    confirm = functools.partial(await_confirmation, store, railway, janitor_id)
    answer = carry_out_request(inventory, env, confirm)
    if answer:
        text = answer_text(answer, request.caller)
        railway.set_variables(janitor_id, {CONTROL_ANSWER: text})
    return answer


@dataclass(frozen=True)
class Request:
    """A control command that waits for an answer."""

    nonce: str
    words: list[str]
    until: float  # seconds since 1970 by its caller's clock; an earlier CLI's is over then
    caller: str | None  # None: an earlier CLI, which confirms nothing
    confirmed: str | None = None  # the run of the janitor that may carry it out

    @property
    def refusal(self) -> Json:
        return {"ok": False, "command": self.words[0], "nonce": self.nonce}


def request_in(text: str) -> Request | None:
    """Parse a control command in the janitor's variable; None if there is none."""
    try:
        request = router.from_json(text or "null")
        words = [str(word) for word in request["words"]]
        until = float(request["until"])
        caller, confirmed = request.get("caller"), request.get("confirmed")
        return Request(str(request["nonce"]), words, until, caller, confirmed) if words else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def carry_out_request(
    inventory: Inventory,
    env: Mapping[str, str],
    confirm: Callable[[Request], float | None] = lambda _: math.inf,
) -> Json | None:
    """Carry out the control command in the janitor's variable, and return its answer.

    Returns None if there is no command, or if it was answered already. A command that changes
    something is refused if nobody waits for it any longer.

    Args:
        confirm: asks the caller, and returns until when the command may be carried out, by the
            store's clock; None if the caller has gone.
    """
    request = request_in(inventory.request)
    answered = router.or_none(router.json_object, inventory.answer) or {}
    if request is None or answered.get("nonce") == request.nonce:
        return None
    words = [*request.words, "--nonce", request.nonce]
    if request.words[0] not in control.READ_ONLY:
        if request.caller is None and (late := time.time() - request.until) > 0:
            why = (
                f"the command's time was over {late:.0f} s before it was read: is this machine's"
                " clock right? Nothing was changed"
            )
            return {**request.refusal, "reason": "late", "error": why}
        until = confirm(request) if request.caller else math.inf
        if until is None:
            why = "nobody waited for the command any longer: nothing was changed"
            return {**request.refusal, "reason": "gone", "error": why}
        words += [f"--until={until!r}"] if until < math.inf else []
    try:
        return control.carry_out(words, env)
    except SystemExit:
        message = "the janitor runs another version of pulse-railway: run `pulse-railway ensure`"
        return {**request.refusal, "reason": "version", "error": message}


def await_confirmation(
    store: router.RedisStore, railway: Railway, janitor_id: str, request: Request
) -> float | None:
    """Ask a command's caller, by the janitor's variables, whether it still waits.

    A caller that was killed cannot withdraw its command. Returns until when the command may be
    carried out, by the store's clock; None without a confirmation that names this run.
    """
    run = secrets.token_hex(4)
    railway.set_variables(
        janitor_id, {CONTROL_ANSWER: text_of({"ready": request.nonce, "run": run})}
    )
    deadline = time.monotonic() + CONFIRM_SECONDS
    while time.monotonic() < deadline:
        time.sleep(CONFIRM_POLL)
        present = request_in(railway.variables(janitor_id).get(CONTROL) or "")
        if present is None or present.nonce != request.nonce:  # withdrawn
            return None
        if present.confirmed == run:
            seconds, microseconds = store.client.time()
            return float(seconds) + microseconds / 1e6 + CONFIRM_SECONDS
    return None


def text_of(value: Json) -> str:
    """Return JSON for a variable, in which `$` begins a reference."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace").decode().replace("$", "\\u0024")


def answer_text(answer: Json, caller: str | None) -> str:
    """Return an answer as a variable of at most ANSWER_BYTES bytes.

    Of a longer history the oldest entries are left out; `cut` says so. Another answer is packed, if
    its caller can unpack it.
    """
    limit = ANSWER_BYTES if caller else EARLIER_ANSWER_BYTES

    def fits(text: str) -> bool:
        return len(text.encode()) <= limit

    if fits(text := text_of(answer)):
        return text
    entries = answer.get("history") or []
    for left_out in range(1, len(entries) + 1):
        cut = f"the oldest {left_out} of {len(entries)} entries are left out: --control ssh has all"
        if fits(text := text_of({**answer, "history": entries[left_out:], "cut": cut})):
            return text
    names = ("ok", "command", "nonce", "version")
    few = {name: answer[name] for name in names if name in answer}
    packed = base64.b64encode(zlib.compress(text_of(answer).encode())).decode()
    if caller and fits(text := text_of({**few, "packed": packed})):
        return text
    error = (
        f"the answer to `{answer.get('command')}` is too long for the janitor: pass --control ssh"
    )
    return text_of({**few, "ok": False, "reason": "long", "error": error})


def notify(env: dict[str, str], report: Report) -> None:
    """Send a notification if deployments with open tabs were removed, and if new visitors get
    another version than the active one."""
    if not env.get(NOTIFY):
        return
    events = []
    if report.expired:
        names = ", ".join(report.expired)
        text = (
            f"the drain time of {names} was over: its tabs were told to reload, and it was removed"
        )
        events.append(("forced removal", text, report.expired))
    if report.fallback:
        text = f"the active deployment cannot be connected to: new visitors get {report.fallback}"
        events.append(("fallback", text, [report.fallback]))
    for event, text, ids in events:
        body = {"text": text, "event": event, "by": "janitor", "deployments": ids}
        try:
            httpx.post(env[NOTIFY], json=body, timeout=10).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # its message has the URL, a secret
            log.warning("the notification to %s failed: %s", NOTIFY, type(error).__name__)


def options(argv: list[str]) -> dict[str, str]:
    """Return the variables that the flags set. On Railway `ensure` has set them all.

    The flags are those of 0.3.x; some of them have no effect any more.
    """
    parser = argparse.ArgumentParser(
        prog="pulse-railway janitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=["run"], default="run")
    flags = {
        "--project-id": "RAILWAY_PROJECT_ID",
        "--environment-id": "RAILWAY_ENVIRONMENT_ID",
        "--token": "RAILWAY_TOKEN",
        "--redis-url": "REDIS_URL",
        "--redis-prefix": "PULSE_RAILWAY_REDIS_PREFIX",
        "--drain-ttl-seconds": "PULSE_RAILWAY_DRAIN_TTL_SECONDS",
        "--service": "PULSE_RAILWAY_SERVICE",
        "--service-prefix": "PULSE_RAILWAY_SERVICE_PREFIX",
        "--janitor-service": "PULSE_RAILWAY_JANITOR_SERVICE",
        "--redis-service": "PULSE_RAILWAY_REDIS_SERVICE",
    }
    for flag, variable in flags.items():
        parser.add_argument(flag, dest=variable, metavar="VALUE", help=f"default: ${variable}")
    values = vars(parser.parse_args(argv))
    return {name: values[name] for name in flags.values() if values[name] is not None}


def main(argv: list[str]) -> int:
    """Carry out one run, or the control command that is requested. Returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    env = {**os.environ, **options(argv)}
    if not any(env.get(name) for name in control.RAILWAY_RUNTIME):
        print("run this inside the janitor service on Railway", file=sys.stderr)
        return 1
    needed = ("RAILWAY_PROJECT_ID", "RAILWAY_ENVIRONMENT_ID", "RAILWAY_TOKEN", "REDIS_URL")
    if missing := [name for name in needed if not env.get(name)]:
        print(f"missing {', '.join(missing)}: run `pulse-railway ensure`", file=sys.stderr)
        return 1
    if problem := in_another_service(env):
        print(problem, file=sys.stderr)
        return 1
    if copy := ownership.copy_refusal(env):
        print(f"refused: {copy}", file=sys.stderr)
        return 1
    base = router.store_from_env(env)
    assert isinstance(base, router.RedisStore)
    store = control.OwnedStore(base.url, base.prefix, ownership.name(env), base.ttl)
    token = env.get(INTERNAL_TOKEN, "")
    retention = Retention(
        router.number_from_env("PULSE_RAILWAY_DRAIN_TTL_SECONDS", 86_400.0, env=env),
        router.number_from_env("PULSE_RAILWAY_ROLLBACK_WINDOW_SECONDS", 900.0, env=env),
        int(router.number_from_env("PULSE_RAILWAY_KEEP", 0.0, env=env)),
    )
    railway = Railway(env)
    foreign = True
    try:
        before = store.read()
        foreign = is_foreign(before, store.me)
        if store.me is None or foreign:  # Railway's variables are newer
            store.me = railway.inspect().identity
        foreign = is_foreign(before, store.me)
        with contextlib.nullcontext(False) if foreign else run_lock(store) as locked:
            routing = store.read()
            inventory = railway.inspect(routing)
            store.me = inventory.identity
            env = {**env, **({ownership.STACK: inventory.identity} if inventory.identity else {})}
            if answer := answer_request(store, railway, inventory, env):  # also without the lock
                print(json.dumps({"carried_out": answer.get("command"), "ok": answer["ok"]}))
                return 0
            foreign = is_foreign(routing, store.me)
            if foreign:
                raise control.StateError(ownership.foreign_words(str(routing.owner)), "owner")
            if not locked:
                print(json.dumps({"skipped": "another run holds the lock"}))
                return 0
            control.keep_while_routers_report(store, routing)
            report = clean_up(store, railway, routing, inventory, token, retention)
        key = f"{store.prefix}:notified:{report.fallback}"
        again = report.fallback and not store.client.set(key, "1", nx=True, ex=NOTIFY_AGAIN_SECONDS)
        notify(env, replace(report, fallback=None) if again else report)
    except (Contradiction, control.StateError, RuntimeError) as error:
        problem = f"refused: {error}"
        foreign = foreign or getattr(error, "reason", None) == "owner"
    except httpx.HTTPError as error:
        problem = f"gave up: {type(error).__name__}; the next run goes on"
    except redis.RedisError as error:
        problem = f"gave up, Redis: {router.redis_cause(error)}; the next run goes on"
    else:
        print(json.dumps(vars(report)))
        failed = f"not removed: {', '.join(report.failed)}" if report.failed else None
        note_run(store, failed)
        return 1 if failed else 0
    print(problem, file=sys.stderr)
    if not foreign:
        note_run(store, problem)
    return 1


def is_foreign(routing: Routing, me: str | None) -> bool:
    """Is the state another owner's? A container without an identity owns none."""
    return routing.owner not in (None, me)


def note_run(store: router.RedisStore, why: str | None) -> None:
    """Leave the outcome of this run for `status`.

    Args:
        why: the reason if it has failed.
    """
    with contextlib.suppress(redis.RedisError):
        before = control.janitor_run(store) or {}
        run: Json = {"at": control.store_time(store), "failed": 0}
        if why:
            run |= {"failed": before.get("failed", 0) + 1, "why": why}
        store.client.set(store.prefix + control.JANITOR_RUN, json.dumps(run), ex=store.ttl)


def in_another_service(env: Mapping[str, str]) -> str:
    """Return the error message for a run in another service than the janitor's; else "".

    Other services lack the limits that `ensure` sets on the janitor, so that a run there would
    delete what `--keep` keeps.
    """
    service = env.get("RAILWAY_SERVICE_NAME")
    janitor = env.get("PULSE_RAILWAY_JANITOR_SERVICE") or "pulse-janitor"
    if service in (None, janitor):
        return ""
    return (
        f"this is {service}: the janitor runs in its own service, {janitor}. Wait for its cron"
        ' schedule, or use "Run now" of that service on Railway\'s dashboard'
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
