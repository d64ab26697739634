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
"""The janitor: removes deployments that nobody uses any more. Railway runs it on a cron.

    python janitor.py [run]

Each run asks every draining deployment how many sessions it holds. None left: the service is
deleted, but for the one that was active last, which stays for a while to roll back to. The drain
TTL over: its tabs are told to reload, then it is deleted. Not answering: it is kept until the TTL.
A deploy that died on the way is removed after an hour: one whose deployment Railway shows as
failed, crashed or never begun, where nothing answers, and that was never promoted. The active
deployment is never touched, nor what has changed since it was judged, nor a service that neither
the routing state names nor a deploy of this stack has made, nor one of another owner.
In a copy of an environment, or where the routing state is another stack's, a run does nothing.

The record is retired first. When every router has said that it serves that, the Railway service is
deleted, and the record goes last, so a run that is killed anywhere is finished by the next one.

Where the routing state is lost, or older than what Railway says was promoted last (the router
service's variable PULSE_RAILWAY_ACTIVE), a run mends that, and deletes nothing.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # ends a run in order: its lock is given back
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

import argparse
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
from collections.abc import Collection, Iterator, Mapping
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
LOCK_SECONDS = 60  # renewed while the run lasts
CALL_SECONDS = 60  # for one answer of Railway's
DEAD_DEPLOY_SECONDS = 3600
NEVER_RAN = (None, "FAILED", "CRASHED", "REMOVED", "SKIPPED")  # of a deployment on Railway
GONE_SECONDS = 60  # a record that is younger may have a service that Railway does not show yet
MAINTENANCE = "PULSE_RAILWAY_MAINTENANCE"  # on the router service: since when the site is closed
MAINTENANCE_OFF = "PULSE_RAILWAY_MAINTENANCE_OFF"  # when it was opened last
RUN = "PULSE_RAILWAY_DEPLOY_RUN"  # on a backend: the run of `deploy` that created it
INTERNAL_TOKEN = "PULSE_RAILWAY_INTERNAL_TOKEN"
RELOAD_GRACE_SECONDS = 3.0
NOTIFY = "PULSE_RAILWAY_NOTIFY_URL"
OWNS_STATE = "PULSE_RAILWAY_OWNS_STATE"  # on the router service: 1, by `ensure --owns-state`
OTHER_STACK = "its service belongs to another stack"
CONTROL = "PULSE_RAILWAY_CONTROL"  # {"nonce": ..., "words": [...], "until": seconds since 1970}
CONTROL_ANSWER = "PULSE_RAILWAY_CONTROL_ANSWER"  # the control command's own answer

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

log = logging.getLogger("pulse.janitor")


class GraphqlError(RuntimeError):
    """Railway's API has understood the document, and says no: its own words."""


class Contradiction(Exception):
    """The state contradicts itself: nothing is deleted, and a person is told what to run."""


@dataclass(frozen=True)
class Service:
    id: str
    name: str
    deployment: str
    age: float  # seconds
    status: str | None = None  # of its latest deployment
    ours: bool = False  # a deploy has made it
    stamped: bool = True  # it says itself whose it is
    replicas: int = 1

    def record(self) -> Record:
        """The record of a deployment of which no more is known than what runs."""
        return Record(
            self.deployment,
            service_name=self.name,
            service_id=self.id,
            registered_at=time.time() - self.age,
        )


@dataclass(frozen=True)
class Inventory:
    """What stands on Railway."""

    backends: list[Service]  # of this stack
    router_id: str | None = None
    promoted: Promotion | None = None  # what was promoted last, as the router service says
    closed: float | None = None  # since when the site is in maintenance, as it says
    opened: float | None = None  # when the last maintenance ended, as it says
    janitor_id: str | None = None
    request: str = ""  # what PULSE_RAILWAY_CONTROL holds
    answer: str = ""
    others: Mapping[str, str] = field(default_factory=dict)  # deployment -> why it is not touched
    identity: str | None = None  # this stack's stamp
    stamped: bool = False  # the router service carries it
    owns_state: bool = False  # a state that nobody owns is this stack's, whatever it holds


@dataclass
class Report:
    """What a run did, printed as one JSON line."""

    deleted: list[str] = field(default_factory=list)
    left_empty: list[str] = field(default_factory=list)  # of those, whose service is still there
    expired: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # what could not be done, and why
    restored: str | None = None
    claimed: str | None = None  # the owner that the routing state has got
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Retention:
    """For how long what is kept."""

    drain_ttl: float = 86_400.0  # seconds
    rollback_window: float = 0.0  # seconds from when it was active that there is a way back to it
    keep: int = 0  # the last so many that were active, until the drain TTL

    def ways_back(self, routing: Routing, there: Collection[str]) -> set[str]:
        """Those that stay although their last tab has gone, so that `rollback` has somewhere to go:
        of those that have a service (`there`) what was active last, for the window, and the last
        `keep`."""
        drained = [
            (r.drain_started_at, r.deployment_id)
            for r in routing.records.values()
            if r.state == "draining" and r.drain_started_at and not (r.rejected_at or r.retiring_at)
            if r.deployment_id in there
        ]
        drained.sort(reverse=True)
        kept = drained[: self.keep]
        if drained and routing.now - drained[0][0] < self.rollback_window:
            kept = [drained[0], *kept]
        return {name for _, name in kept}


class Railway:
    """The calls the janitor makes. The token may be a project's or an account's."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.project = env["RAILWAY_PROJECT_ID"]
        self.environment = env["RAILWAY_ENVIRONMENT_ID"]
        self.token = env["RAILWAY_TOKEN"].strip()
        self.router = env.get("PULSE_RAILWAY_SERVICE") or "pulse-router"
        self.janitor = env.get("PULSE_RAILWAY_JANITOR_SERVICE") or "pulse-janitor"
        self.url = env.get("PULSE_RAILWAY_API_URL") or API_URL
        self.client = httpx.Client(timeout=30)
        self.headers = {"Project-Access-Token": self.token}
        self.token_is_known = False  # is it certain which kind it is?
        self.me = ownership.identity(env)
        self.deletion = ownership.Deletion(
            lambda document, **variables: self.call(document, **variables),
            GraphqlError,
            self.project,
            self.environment,
            lambda: "Project-Access-Token" in self.headers,
        )

    def call(self, document: str, **variables: Any) -> dict[str, Any]:
        """One request, tried up to three times where Railway is busy or away.

        Raises httpx.HTTPError, GraphqlError, or RuntimeError where its answer is not understood.
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
            unknown = not self.token_is_known and "Project-Access-Token" in self.headers
            if unknown and "not authorized" in message.lower():
                self.headers = {"Authorization": f"Bearer {self.token}"}
                return self.call(document, **variables)
            if not self.token_is_known and "not authorized" in message.lower():
                message = (
                    f"its RAILWAY_TOKEN does not open this environment: run `pulse-railway ensure`"
                    f" with one that does ({message})"
                )
            raise GraphqlError(message)
        if errors or not data or not isinstance(data, dict):
            raise RuntimeError("Railway's answer is not one of its API")
        self.token_is_known = True
        return data

    def ask(self, request: Json) -> bytes:
        """One answer of Railway's, whole within CALL_SECONDS. Raises httpx.HTTPError."""
        deadline, body = time.monotonic() + CALL_SECONDS, b""
        with self.client.stream("POST", self.url, json=request, headers=self.headers) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("Railway's answer does not end")
        return body

    def inspect(self, routing: Routing | None = None) -> Inventory:
        """The backends of this stack, and what its router and janitor say. Raises Contradiction in
        a copy of an environment.

        Args:
            routing: the state, which names backends that do not say themselves whose they are.
        """
        data = self.call(SERVICES, project=self.project, environment=self.environment)
        config = data["environment"]["config"]
        nodes = [edge["node"] for edge in data["environment"]["serviceInstances"]["edges"]]
        for node in nodes:
            counts = list(ownership.replicas(config, node["serviceId"]).values())
            if counts and None not in counts:
                node["numReplicas"] = sum(count or 0 for count in counts)
        if not nodes:
            return Inventory([], identity=str(self.me) if self.me else None)
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
            node["serviceId"]: ownership.Service(
                node["serviceId"], node["serviceName"], variables[f"s{i}"]
            )
            for i, node in enumerate(nodes)
        }
        by_name = {service.name: service for service in services.values()}
        janitor = by_name.get(self.janitor)
        own = (services.get(self.me.router_id) if self.me else None) or by_name.get(self.router)
        of_router: Mapping[str, str] = own.variables if own else {}
        if own and all(name.startswith("RAILWAY_") for name in of_router):
            raise RuntimeError(
                f"Railway shows no variables of {own.name}: its answer is not believed, and the"
                " next run asks again"
            )
        if own and own.stamp and own.stamp.environment_id != self.environment:
            raise Contradiction(ownership.copy_words(own.stamp.environment_id))
        router_id = own.id if own else None
        stamp = (own.stamp if own else None) or self.me
        if own and (stamp is None or stamp.router_id != own.id):
            stamp = ownership.Stamp(self.environment, own.id)
        backends, others = self.backends(nodes, services, router_id or "", routing or Routing())
        of_janitor: Mapping[str, str] = janitor.variables if janitor else {}
        return Inventory(
            backends,
            router_id,
            router.promotion_from_env(of_router),
            time_in(of_router, MAINTENANCE),
            time_in(of_router, MAINTENANCE_OFF),
            janitor.id if janitor else None,
            of_janitor.get(CONTROL) or "",
            of_janitor.get(CONTROL_ANSWER) or "",
            others,
            str(stamp) if stamp else None,
            own is not None and own.stamp == stamp,
            of_router.get(OWNS_STATE) == "1"
            or ownership.is_managed(of_router.get(ownership.REDIS_URL, "")),
        )

    def backends(
        self,
        nodes: list[dict[str, Any]],
        services: Mapping[str, ownership.Service],
        router_id: str,
        routing: Routing,
    ) -> tuple[list[Service], dict[str, str]]:
        """The backends of this stack, and of the others why they are not touched."""
        backends = [
            backend(node, services[node["serviceId"]])
            for node in nodes
            if services[node["serviceId"]].is_backend and not services[node["serviceId"]].is_empty
        ]
        named = {router_id: {b.id for b in backends if routing_names(routing, b)}}
        owners = ownership.owners(self.environment, list(services.values()), named)
        own = services.get(router_id) or ownership.Service("", self.router, {})
        names = ownership.names_of(own, list(services.values()))
        mine, others = [], {}
        for found in backends:
            whose, service = owners[found.id], services[found.id]
            if whose == ownership.Owner("stack", router_id):
                mine.append(found)
            else:
                left = ownership.unowned(service, whose, names, router_id)
                others[found.deployment] = left.words() if left else OTHER_STACK
        for found in mine:
            others.pop(found.deployment, None)
        return mine, others

    def remember(self, service_id: str, values: dict[str, str]) -> None:
        """Set variables of a service; nothing is deployed anew."""
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

    def delete(self, service: Service) -> bool:
        """False: it could not be deleted, and nothing of it runs any more."""
        return self.deletion.delete(service.id)


def backend(node: dict[str, Any], service: ownership.Service) -> Service:
    return Service(
        service.id,
        service.name,
        service.variables[ownership.DEPLOYMENT_ID],
        time.time() - datetime.fromisoformat(node["createdAt"]).timestamp(),
        (node["latestDeployment"] or {}).get("status"),
        ours=bool(service.variables.get(RUN)),
        stamped=bool(service.variables.get(ownership.STACK)),
        replicas=1 if node["numReplicas"] is None else node["numReplicas"],
    )


def routing_names(routing: Routing, service: Service) -> bool:
    """Does the routing state name this service: in a record, or as what is being removed?"""
    name = service.deployment
    record = routing.record_of_active() if name == routing.active else routing.records.get(name)
    if record is None:
        grave = routing.tombstones.get(name)
        return grave is not None and grave.service_id == service.id
    if record.service_id:
        return record.service_id == service.id
    return record.service_name in (None, service.name)


def time_in(variables: Mapping[str, str], name: str) -> float | None:
    value = variables.get(name) or ""
    return float(value) if re.fullmatch(r"[0-9]{1,11}(\.[0-9]+)?", value) else None


@contextlib.contextmanager
def run_lock(store: router.RedisStore) -> Iterator[bool]:
    """Hold the janitor's lock; it is renewed until the run ends, so that it cannot expire on it.

    Yields False where another run holds it.
    """
    key = f"{store.prefix}{control.JANITOR_LOCK}"
    token = control.OUR_LOCK_PREFIX + secrets.token_hex(8)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LOCK_SECONDS / 4):
            with contextlib.suppress(redis.RedisError):
                if store.client.get(key) == token:
                    store.client.expire(key, LOCK_SECONDS)

    try:  # from before it is taken: a signal can come as soon as it is
        held = control.take_lock(store, token, LOCK_SECONDS)
        if held:
            threading.Thread(target=renew, daemon=True).start()
        yield held
    finally:
        done.set()
        control.give_back(store, token)


def clean_up(
    store: router.RedisStore,
    railway: Railway,
    routing: Routing,
    found: Inventory,
    token: str,
    retention: Retention,
) -> Report:
    """One run on what was read: the routing state first, then what stands on Railway. Raises
    Contradiction, and whatever Railway or Redis raise while the state is mended."""
    report = Report(problems=list(routing.problems))
    routing = claim_unowned(store, routing, found, report)
    stamp_backends(railway, routing, found)
    if mend(store, railway, routing, found, report):
        return report  # what it means for the others, the next run sees
    check(routing, found)
    by_id = {service.deployment: service for service in found.backends}
    ways_back = retention.ways_back(routing, by_id.keys())
    run = Run(store, railway, routing, found, token, report)
    for name, record in routing.records.items():
        service = by_id.get(name)
        if name in found.others:
            continue
        with run.failing_alone(name):
            verdict = run.judge(record, service, retention.drain_ttl)
            if verdict == "stray":  # of 0.3.x, which could be cut off between two writes
                step = functools.partial(control.mark_draining, deployment_id=name, judged=record)
                store.apply(step)
                verdict = "keep: was active beside the active one, drains from now on"
            if verdict == "drained" and name in ways_back:
                verdict = "keep: a way back"
            if not verdict.startswith("keep"):
                run.remove(name, record, service, verdict)
            elif verdict != "keep: active":
                report.kept[name] = verdict.removeprefix("keep: ")
    for service in found.backends:
        if service.deployment not in routing.records:
            with run.failing_alone(service.deployment):
                run.unregistered(service)
    for name, why in found.others.items():
        if name in routing.records or why != OTHER_STACK:
            report.kept[name] = why
    return report


def claim_unowned(
    store: router.RedisStore, routing: Routing, found: Inventory, report: Report
) -> Routing:
    """Make a routing state that nobody owns this stack's, where its router carries its stamp and
    nobody else can mean that state: it holds nothing, lies in this environment, or was given to
    this stack by a person."""
    me = found.identity
    if me is None or not found.stamped or router.OWNER in routing.keys:
        return routing

    def step(routing: Routing) -> Routing:
        if router.OWNER in routing.keys or not (control.is_bare(routing) or found.owns_state):
            return routing
        return control.set_owner(routing, me)

    owner = store.apply(step).owner
    report.claimed = me if owner == me else None
    return replace(routing, owner=owner)


def stamp_backends(railway: Railway, routing: Routing, found: Inventory) -> None:
    """Write onto the backends that this stack's state names whose they are."""
    if not found.stamped or found.identity is None or routing.owner != found.identity:
        return
    for service in found.backends:
        if not service.stamped and routing_names(routing, service):
            railway.remember(service.id, {ownership.STACK: found.identity})


def mend(
    store: router.RedisStore, railway: Railway, routing: Routing, found: Inventory, report: Report
) -> bool:
    """Bring the store, and what Railway says was promoted last, to the later of the two. Says
    whether there was anything to mend."""
    last, healed = found.promoted, False
    if not found.backends and routing.active is None:
        return False
    if routing.active is None or control.is_lost(routing, last):
        routing = control.wait_for_healing(store, last)
        if routing.active is None or control.is_older_than(routing, last):
            report.restored = rebuild_from_railway(store, routing, found, report)
            return True
        healed = True
    if routing.promoted_by_other:  # it is given the time at which we learn of it
        now = routing.active

        def note(routing: Routing) -> Routing:
            if routing.active != now or not routing.promoted_by_other:
                return routing
            return replace(routing, promoted=Promotion(now, router.next_time(routing)))

        routing = store.apply(note)
    differs = last is not None and last.deployment_id != routing.active
    if found.router_id and routing.active and routing.promotion != last:
        at = routing.promotion.at if routing.promotion else 0.0
        values = {
            router.LAST_PROMOTED_VARIABLE: routing.active,
            router.LAST_PROMOTED_AT_VARIABLE: repr(at) if at else "",
        }
        railway.remember(found.router_id, values)
    mend_maintenance(store, railway, routing, found)
    return differs or healed


def rebuild_from_railway(
    store: router.RedisStore, routing: Routing, found: Inventory, report: Report
) -> str | None:
    """Rebuild the routing state that Redis has lost, or bring it to what was promoted last.

    Returns the deployment that is active then. Raises Contradiction where nobody knows.
    """
    last = found.promoted
    if last is None or last.deployment_id not in {s.deployment for s in found.backends}:
        if routing.active is None:
            raise Contradiction(
                "there are deployments but none is active: run `pulse-railway restore"
                " --deployment-id ...` with the one that is to be"
            )
        gone = last.deployment_id if last else "what was active"
        report.problems.append(
            f"{gone} was promoted last and has no service: {routing.active} stays active;"
            f" `pulse-railway restore --deployment-id {routing.active}` makes that final"
        )
        return None
    step = functools.partial(
        control.rebuild_records,
        running=[service.record() for service in found.backends],
        active=last.deployment_id,
        at=last.at,
        closed=found.closed,
    )
    store.apply(control.with_history(step, "restore", last.deployment_id, by="janitor"))
    log.warning("the routing state was lost, or an older one: restored from Railway")
    return last.deployment_id


def mend_maintenance(
    store: router.RedisStore, railway: Railway, routing: Routing, found: Inventory
) -> None:
    """Keep what the router service says of the maintenance as the state has it. A site that was
    closed, and that nobody has opened, is closed again; one that was opened since, opened."""
    if found.router_id is None or (routing.maintenance is None and found.closed is None):
        return
    switches = [e for e in routing.history if str(e["what"]).startswith("maintenance ")]
    opened = bool(switches) and switches[-1]["what"] == "maintenance off"
    if routing.maintenance:
        since = routing.maintenance.since
        if found.opened and 0 < since < found.opened:  # the state is of before that

            def reopen(routing: Routing) -> Routing:
                still = routing.maintenance and routing.maintenance.since == since
                return replace(routing, maintenance=None) if still else routing

            store.apply(control.with_history(reopen, "maintenance off", "", by="janitor"))
        elif found.closed is None:
            railway.remember(found.router_id, {MAINTENANCE: repr(since), MAINTENANCE_OFF: ""})
    elif opened and float(switches[-1]["at"]) >= (found.closed or 0.0):
        at = repr(float(switches[-1]["at"]))
        railway.remember(found.router_id, {MAINTENANCE: "", MAINTENANCE_OFF: at})
    else:
        closed = router.Maintenance(found.closed or 0.0)
        store.apply(lambda routing: replace(routing, maintenance=routing.maintenance or closed))


def check(routing: Routing, found: Inventory) -> None:
    """Raises Contradiction where the state and the services cannot both be right."""
    names: dict[str, str] = {}
    for service in found.backends:
        other = names.setdefault(service.deployment, service.name)
        if other != service.name:
            raise Contradiction(
                f"deployment {service.deployment} is on two services, {other} and {service.name}:"
                " delete the wrong one on Railway"
            )
    if routing.active and routing.active not in names and routing.active not in found.others:
        raise Contradiction(
            f"the active deployment {routing.active} has no service: promote another with"
            " `pulse-railway promote`, or deploy"
        )


@dataclass
class Run:
    """What the deployments of one run are judged by, and what is done to them."""

    store: router.RedisStore
    railway: Railway
    routing: Routing
    found: Inventory
    token: str
    report: Report
    routers_behind: bool = False

    @contextlib.contextmanager
    def failing_alone(self, name: str) -> Iterator[None]:
        """What fails at one deployment is reported, and the others have their turn."""
        try:
            yield
        except (control.StateError, RuntimeError, httpx.HTTPError) as error:
            words = str(error) if not isinstance(error, httpx.HTTPError) else type(error).__name__
            self.report.failed[name] = words
            log.error("%s: %s", name, words)

    def judge(self, record: Record, service: Service | None, drain_ttl: float) -> str:
        """What is to become of a deployment: `keep: <why>`, `stray`, `drained`, `expired`, `gone`
        or `dead`."""
        now, name = self.routing.now, record.deployment_id
        if name == self.routing.active:
            return "keep: active"
        if record.retiring_at:
            return "drained"  # an earlier run, or `delete`, was cut off
        expires = record.state == "draining" and record.drain_started_at is not None
        if expires and now - (record.drain_started_at or now) >= drain_ttl:
            return "expired"
        if record.ignored or record.state not in ("active", "pending", "draining"):
            what = ", ".join(record.ignored) or f"state {record.state!r}"
            return f"keep: not understood ({what}): `pulse-railway delete` removes it"
        if record.state == "active":
            return "stray"
        # the records were read before the services, and a service is there before its record
        if service is None and now - (record.registered_at or 0) > GONE_SECONDS:
            # deleted on Railway by hand: its tabs are to reload, not to meet 502
            at = router.look(record)
            return "gone" if at == "unreachable" else f"keep: {at}, but Railway does not list it"
        if record.state == "pending":
            return self.judge_pending(record, service)
        count = control.sessions(record, self.token)
        if count is None:
            return "keep: not answering"
        if count:
            return f"keep: {count} sessions"
        if service and service.replicas != 1:
            return f"keep: {service.replicas} replicas, of which one said that it has no session"
        under_way = self.under_way(name)
        return f"keep: {under_way} requests under way" if under_way else "drained"

    def judge_pending(self, record: Record, service: Service | None) -> str:
        if record.pinned:
            return "keep: held"
        age = service.age if service else 0.0
        if record.registered_at:
            age = self.routing.now - record.registered_at
        if age <= DEAD_DEPLOY_SECONDS:
            return "keep: being deployed"
        if self.may_run(record, service):
            return "keep: pending, and it runs or was promoted before: promote or delete it"
        return "dead"

    def may_run(self, record: Record, service: Service | None) -> bool:
        """Silence alone is no death."""
        name = record.deployment_id
        promoted = (
            record.promoted_at is not None
            or (self.found.promoted and self.found.promoted.deployment_id == name)
            or self.was_promoted(name)
        )
        runs = service is not None and service.status not in NEVER_RAN
        return promoted or runs or router.look(record) != "unreachable"

    def was_promoted(self, name: str, lately: float = math.inf) -> bool:
        """Does the history say so, in so many seconds?"""
        return any(
            entry.get("deployment_id") == name
            and entry["what"] in ("promote", "rollback", "restore")
            and self.routing.now - entry["at"] < lately
            for entry in self.routing.history
        )

    def under_way(self, name: str) -> int:
        """Requests and sockets, as the routers last said."""
        return control.Served(control.reports(self.store), []).under_way(name, 0)

    def unregistered(self, service: Service) -> None:
        """A service without a record: its deploy died before it was registered, or Redis has lost
        its record. It is adopted where it may run, else removed; after an hour, since it may be
        on its way, unless it was promoted already."""
        name, record = service.deployment, service.record()
        if name == self.routing.active:
            self.store.apply(functools.partial(control.adopt_orphan, record=record))
            return
        if not service.ours:
            self.report.kept[name] = "no record names its service, and no deploy of this stack did"
            return
        if service.age <= DEAD_DEPLOY_SECONDS and not self.was_promoted(name, service.age):
            return
        grave = self.routing.tombstones.get(name)
        removed = grave is not None and grave.service_id == service.id
        if removed or not self.may_run(record, service):
            self.remove(name, None, service, "dead")
        else:
            self.store.apply(functools.partial(control.adopt_orphan, record=record))
            self.report.kept[name] = "no record named it: draining from now on"

    def remove(self, name: str, judged: Record | None, service: Service | None, why: str) -> None:
        """Delete a deployment, if it still is what was judged. It is retired first, so that nobody
        promotes it meanwhile; when every router serves that, its tabs are told to reload."""
        try:
            service_id = service.id if service else None
            routing = self.store.apply(
                lambda state: control.retire_if_unchanged(state, name, judged, service_id)
            )
        except control.StateError as error:  # promoted, rolled back to, or drained anew
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
        step = functools.partial(control.delete, deployment_id=name)
        self.store.apply(control.with_history(step, "remove", name, by="janitor", why=why))
        self.report.deleted.append(name)
        if why == "expired":
            self.report.expired.append(name)


def carry_out_request(found: Inventory, env: Mapping[str, str]) -> Json | None:
    """Carry out the control command that was left for us, and return its answer.

    None where there is nothing to do: no command, one that was answered, one whose caller waits
    no longer and must not be surprised by it.
    """
    try:
        request = router.from_json(found.request or "null")
        nonce, words = request["nonce"], [str(word) for word in request["words"]]
        answered = (router.from_json(found.answer or "null") or {}).get("nonce")
        if nonce == answered or time.time() > float(request["until"]):
            return None
        name = words[0]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    try:
        return control.carry_out([*words, "--nonce", str(nonce)], env)
    except SystemExit:
        message = "the janitor runs another version of pulse-railway: run `pulse-railway ensure`"
        return {"ok": False, "reason": "version", "error": message, "command": name, "nonce": nonce}


def notify(env: dict[str, str], report: Report) -> None:
    """Tell who wants to know that a deployment was removed under its tabs."""
    if not report.expired or not env.get(NOTIFY):
        return
    names = ", ".join(report.expired)
    text = f"the drain time of {names} was over: its tabs were told to reload, and it was removed"
    body = {"text": text, "event": "forced removal", "by": "janitor", "deployments": report.expired}
    try:
        httpx.post(env[NOTIFY], json=body, timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:  # its text holds the URL, a secret
        log.warning("%s was not told: %s", NOTIFY, type(error).__name__)


def options(argv: list[str]) -> dict[str, str]:
    """The variables that flags set; on Railway `ensure` has set them all. The flags are 0.3.x's,
    of which some name what is no longer needed."""
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
    try:
        before = store.read()
        if store.me is None or is_foreign(before, store.me):  # Railway knows better
            store.me = railway.inspect().identity
        foreign = is_foreign(before, store.me)
        with contextlib.nullcontext(False) if foreign else run_lock(store) as held:
            routing = store.read()
            found = railway.inspect(routing)
            store.me = found.identity
            env = {**env, **({ownership.STACK: found.identity} if found.identity else {})}
            answer = carry_out_request(found, env)  # whoever holds the lock
            if found.janitor_id and answer:
                railway.remember(found.janitor_id, {CONTROL_ANSWER: json.dumps(answer)})
                print(json.dumps({"carried_out": answer.get("command"), "ok": answer["ok"]}))
                return 0
            if is_foreign(routing, store.me):
                raise control.StateError(ownership.foreign_words(str(routing.owner)), "owner")
            if not held:
                print(json.dumps({"skipped": "another run holds the lock"}))
                return 0
            control.keep_while_routers_report(store, routing)
            report = clean_up(store, railway, routing, found, token, retention)
        notify(env, report)
    except (Contradiction, control.StateError, RuntimeError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except (redis.RedisError, httpx.HTTPError) as error:
        # The class only: a Redis error can carry its URL.
        print(f"gave up: {type(error).__name__}; the next run goes on", file=sys.stderr)
        return 1
    print(json.dumps(vars(report)))
    return 1 if report.failed else 0


def is_foreign(routing: Routing, me: str | None) -> bool:
    """Another owner's, and be it that this container does not know its own."""
    return routing.owner not in (None, me)


def in_another_service(env: Mapping[str, str]) -> str:
    """Is this not the janitor's service? Elsewhere the limits that `ensure` has set are missing,
    and what `--keep` keeps would be deleted."""
    here = env.get("RAILWAY_SERVICE_NAME")
    janitor = env.get("PULSE_RAILWAY_JANITOR_SERVICE") or "pulse-janitor"
    if here in (None, janitor):
        return ""
    return (
        f"this is {here}: the janitor runs in its own service. Run it there, with `railway ssh"
        f" --service {janitor} -- pulse-railway janitor run`, or from its page on Railway"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
