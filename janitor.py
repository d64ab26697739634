#!/usr/bin/env python3
# /// script
# requires-python = ">=3.12"
# dependencies = [
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
Deploys that died on the way are removed after an hour, unless somebody uses them. The active
deployment is never touched, and nothing whose record has changed since it was judged. The record is
claimed first, then the Railway service goes, the record last, so a run that is killed anywhere is
finished by the next one.

Where Redis has lost its data and no router has it either, the routing state is restored from
Railway: the router service's variable PULSE_RAILWAY_ACTIVE says which deployment was active.
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
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import redis

import control
import router

API_URL = "https://backboard.railway.com/graphql/v2"
LOCK_SECONDS = 60  # renewed while the run lasts
DEAD_DEPLOY_SECONDS = 3600
RUNNING = ("SUCCESS", "SLEEPING")
GONE_SECONDS = 60  # a record that is younger may have a service that Railway does not show yet
RELOAD_GRACE_SECONDS = 3.0
NOTIFY = "PULSE_RAILWAY_NOTIFY_URL"
CONTROL = "PULSE_RAILWAY_CONTROL"  # {"nonce": ..., "words": [...], "until": seconds since 1970}
CONTROL_ANSWER = "PULSE_RAILWAY_CONTROL_ANSWER"  # the control command's own answer

SERVICES = """
query Services($project: String!, $environment: String!) {
  environment(id: $environment, projectId: $project) {
    serviceInstances {
      edges { node { serviceId serviceName createdAt latestDeployment { status } } }
    }
  }
}
"""

REMEMBER = """
mutation Remember($input: VariableCollectionUpsertInput!) {
  variableCollectionUpsert(input: $input)
}
"""

DELETE = """
mutation Delete($service: String!, $environment: String!) {
  serviceDelete(id: $service, environmentId: $environment)
}
"""

log = logging.getLogger("pulse.janitor")


class Refused(Exception):
    """The state contradicts itself: nothing is deleted, and a person is told what to run."""


@dataclass(frozen=True)
class Service:
    id: str
    name: str
    deployment: str
    age: float  # seconds
    status: str | None = None  # of its latest deployment


@dataclass(frozen=True)
class Seen:
    """What stands on Railway."""

    backends: list[Service]
    router_id: str | None = None
    intent: str | None = None  # the deployment that was promoted last, as the router service says
    janitor_id: str | None = None
    order: str = ""  # what PULSE_RAILWAY_CONTROL holds
    answer: str = ""


@dataclass
class Report:
    """What a run did, printed as one JSON line."""

    deleted: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    restored: str | None = None


@dataclass(frozen=True)
class Limits:
    """For how long what is kept."""

    drain_ttl: float = 86_400.0  # seconds
    rollback_window: float = 0.0  # seconds from when it was active that there is a way back to it
    keep: int = 0  # the last so many that were active, until the drain TTL

    def ways_back(self, found: list[router.Record]) -> set[str]:
        """Those that stay although their last tab has gone, so that `rollback` has somewhere to go:
        what was active last for the window, and the last `keep`."""
        drained = [
            r
            for r in found
            if r.get("state") == "draining"
            and r.get("drain_started_at")
            and not r.get("rejected_at")  # rolled back from, or a canary that was ended
        ]
        drained.sort(key=lambda r: float(r["drain_started_at"]), reverse=True)
        kept = drained[: self.keep]
        if drained and time.time() - float(drained[0]["drain_started_at"]) < self.rollback_window:
            kept = [drained[0], *kept]
        return {str(r["deployment_id"]) for r in kept}


class Railway:
    """The calls the janitor makes. The token may be a project's or an account's."""

    def __init__(self, env: dict[str, str]) -> None:
        self.project = env["RAILWAY_PROJECT_ID"]
        self.environment = env["RAILWAY_ENVIRONMENT_ID"]
        self.token = env["RAILWAY_TOKEN"].strip()
        self.router = env.get("PULSE_RAILWAY_SERVICE") or "pulse-router"
        self.janitor = env.get("PULSE_RAILWAY_JANITOR_SERVICE") or "pulse-janitor"
        self.url = env.get("PULSE_RAILWAY_API_URL") or API_URL
        self.client = httpx.Client(timeout=30)
        self.headers = {"Project-Access-Token": self.token}

    def call(self, document: str, **variables: Any) -> dict[str, Any]:
        """One request, tried up to three times where Railway is busy or away.

        Raises httpx.HTTPError, or RuntimeError with Railway's own words, or where its answer is
        not understood.
        """
        for attempt in range(3):
            try:
                response = self.client.post(
                    self.url,
                    json={"query": document, "variables": variables},
                    headers=self.headers,
                )
                response.raise_for_status()
                break
            except httpx.HTTPError as error:
                if attempt == 2:
                    raise
                log.warning("Railway: %s; trying again", type(error).__name__)
                time.sleep(2**attempt)
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            answer = {}
        errors, data = answer.get("errors"), answer.get("data")
        if isinstance(errors, list) and errors:
            message = "; ".join(str(e.get("message") if isinstance(e, dict) else e) for e in errors)
            if "not authorized" in message.lower() and "Project-Access-Token" in self.headers:
                self.headers = {"Authorization": f"Bearer {self.token}"}
                return self.call(document, **variables)
            raise RuntimeError(message)
        if errors or not data or not isinstance(data, dict):
            raise RuntimeError("Railway's answer is not one of its API")
        return data

    def inspect(self) -> Seen:
        """Every service of the environment that has a deployment id, and the router's intent."""
        data = self.call(SERVICES, project=self.project, environment=self.environment)
        nodes = [edge["node"] for edge in data["environment"]["serviceInstances"]["edges"]]
        if not nodes:
            return Seen([])
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
        now = time.time()
        backends = [
            Service(
                node["serviceId"],
                node["serviceName"],
                variables[f"s{i}"]["PULSE_DEPLOYMENT_ID"],
                now - datetime.fromisoformat(node["createdAt"]).timestamp(),
                (node["latestDeployment"] or {}).get("status"),
            )
            for i, node in enumerate(nodes)
            if variables[f"s{i}"].get("PULSE_DEPLOYMENT_ID")
        ]
        stable = {
            node["serviceName"]: (node["serviceId"], variables[f"s{i}"])
            for i, node in enumerate(nodes)
        }
        router_id, of_router = stable.get(self.router, (None, {}))
        janitor_id, of_janitor = stable.get(self.janitor, (None, {}))
        return Seen(
            backends,
            router_id,
            of_router.get(router.INTENT_VARIABLE),
            janitor_id,
            of_janitor.get(CONTROL) or "",
            of_janitor.get(CONTROL_ANSWER) or "",
        )

    def remember(self, service_id: str, name: str, value: str) -> None:
        """Set a variable of a service; nothing is deployed anew."""
        self.call(
            REMEMBER,
            input={
                "projectId": self.project,
                "environmentId": self.environment,
                "serviceId": service_id,
                "variables": {name: value},
                "skipDeploys": True,
            },
        )

    def delete(self, service: Service) -> None:
        answer = self.call(DELETE, service=service.id, environment=self.environment)
        if answer.get("serviceDelete") is not True:
            raise RuntimeError(f"Railway does not say that it deleted {service.name}")


@contextlib.contextmanager
def lock(store: router.RedisStore) -> Iterator[bool]:
    """Hold the janitor's lock; it is renewed until the run ends, so that it cannot expire on it.

    Yields False where another run holds it.
    """
    key, token = f"{store.prefix}:janitor:lock", secrets.token_hex(8)
    if not store.client.set(key, token, nx=True, ex=LOCK_SECONDS):
        yield False
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LOCK_SECONDS / 4):
            with contextlib.suppress(redis.RedisError):
                if store.client.get(key) == token:
                    store.client.expire(key, LOCK_SECONDS)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield True
    finally:
        done.set()
        with contextlib.suppress(redis.RedisError), store.client.pipeline() as pipe:
            pipe.watch(key)  # type: ignore[no-untyped-call]
            if pipe.get(key) == token:
                pipe.multi()
                pipe.delete(key)
                pipe.execute()


def check(state: router.State, services: list[Service]) -> None:
    """Raises Refused where the state and the services cannot both be right."""
    active = state.get(":active")
    names: dict[str, str] = {}
    for service in services:
        other = names.setdefault(service.deployment, service.name)
        if other != service.name:
            raise Refused(
                f"deployment {service.deployment} is on two services, {other} and {service.name}:"
                " delete the wrong one on Railway"
            )
    if active and active not in names:
        raise Refused(
            f"the active deployment {active} has no service: promote another with"
            " `pulse-railway promote`, or deploy"
        )


def sweep(
    store: router.RedisStore,
    railway: Railway,
    state: router.State,
    seen: Seen,
    token: str,
    limits: Limits,
) -> Report:
    """One run on what was read: `state` first, then what stands on Railway. Raises Refused, and
    whatever Railway or Redis raise."""
    report = Report()
    if seen.backends and not state.get(":active"):
        report.restored = restore(store, seen)
        return report  # what it means for the others, the next run sees
    check(state, seen.backends)
    by_id = {service.deployment: service for service in seen.backends}
    known = {record["deployment_id"]: record for record in router.records(state)}
    ways_back = limits.ways_back(list(known.values()))
    routers = store.routers()  # goes through all keys of Redis: once a run
    for name, record in known.items():
        stray = record.get("state") == "active" and name != state.get(":active")
        if stray:  # of 0.3.x, which could be cut off between two writes
            store.apply(functools.partial(control.drain, deployment_id=name, judged=record))
            report.kept[name] = "was active beside the active one, drains from now on"
            continue
        verdict = judge(record, by_id.get(name), routers, token, limits.drain_ttl)
        if verdict == "drained" and name in ways_back and not record.get("retiring_at"):
            verdict = "keep: a way back"
        if verdict.startswith("keep"):
            if record.get("state") == "draining":
                report.kept[name] = verdict.removeprefix("keep: ")
            continue
        judged = json.loads(state[router.record_key(name)])
        if remove(store, railway, name, judged, by_id.get(name), report, token, verdict):
            report.deleted.append(name)
            if verdict == "expired":
                report.expired.append(name)
    for service in seen.backends:
        if service.deployment not in known and service.age > DEAD_DEPLOY_SECONDS:
            # its deploy died before it was registered, or Redis has lost its record
            record = {
                "deployment_id": service.deployment,
                "service_name": service.name,
                "service_id": service.id,
            }
            count = router.sessions(record, token)
            silent = count is None and service.status in RUNNING
            if count or silent:
                store.apply(functools.partial(control.adopt, record=record))
                why = "not answering" if silent else f"{count} sessions"
                report.kept[service.deployment] = f"{why}, draining from now on"
            elif remove(store, railway, service.deployment, {}, service, report, token, "dead"):
                report.deleted.append(service.deployment)
    active = store.read().get(":active")
    if seen.router_id and active and active != seen.intent:
        railway.remember(seen.router_id, router.INTENT_VARIABLE, active)
    return report


def answer_to(seen: Seen, env: dict[str, str]) -> router.Record | None:
    """Carry out the control command that was left for us, and return its answer.

    None where there is nothing to do: no command, one that was answered, one whose caller waits
    no longer and must not be surprised by it.
    """
    try:
        order = json.loads(seen.order or "null")
        nonce, words, until = order["nonce"], [str(word) for word in order["words"]], order["until"]
        answered = (json.loads(seen.answer or "null") or {}).get("nonce")
        if nonce == answered or time.time() > float(until):
            return None
        name = words[0]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    try:
        return control.carry_out([*words, "--nonce", str(nonce)], env)
    except SystemExit:
        said = "the janitor runs another version of pulse-railway: run `pulse-railway ensure`"
        return {"ok": False, "reason": "version", "error": said, "command": name, "nonce": nonce}


def restore(store: router.RedisStore, seen: Seen) -> str:
    """Rebuild the routing state that Redis has lost. A router that still has it comes first.

    Returns the deployment that is active. Raises Refused where nobody knows which one was.
    """
    deadline = time.monotonic() + router.HEAL_WAIT
    while time.monotonic() < deadline:
        if active := store.read().get(":active"):
            return active
        time.sleep(0.5)
    if seen.intent not in {service.deployment for service in seen.backends}:
        raise Refused(
            "there are deployments but none is active: run `pulse-railway restore"
            " --deployment-id ...` with the one that is to be"
        )
    wanted = [
        {
            "deployment_id": service.deployment,
            "service_name": service.name,
            "service_id": service.id,
            "registered_at": time.time() - service.age,
        }
        for service in seen.backends
    ]
    store.apply(functools.partial(control.restore, wanted=wanted, active=seen.intent))
    log.warning("Redis had lost the routing state: restored from Railway")
    return str(seen.intent)


def judge(
    record: router.Record,
    service: Service | None,
    routers: list[router.Record],
    token: str,
    drain_ttl: float,
) -> str:
    """What is to become of a deployment: `keep: <why>`, `drained`, `expired`, `gone` or `dead`."""
    now, state = time.time(), record.get("state")
    if record.get("retiring_at"):
        return "drained"  # an earlier run, or `delete`, was cut off
    if state == "active":
        return "keep: active"
    registered = record.get("registered_at")
    # the records were read before the services, and a service is there before its record
    if service is None and now - (registered or 0) > GONE_SECONDS:
        return "gone"  # deleted on Railway by hand: its tabs are to reload, not to meet 502
    if state == "pending":
        if record.get("held"):
            return "keep: held"
        age = now - registered if registered else service.age if service else 0.0
        if age <= DEAD_DEPLOY_SECONDS or router.sessions(record, token):
            return "keep: being deployed"
        return "dead"
    if now - (record.get("drain_started_at") or now) >= drain_ttl:
        return "expired"
    count = router.sessions(record, token)
    if count is None:
        return "keep: not answering"
    if count:
        return f"keep: {count} sessions"
    under_way = sum(r.get("in_flight", {}).get(record["deployment_id"], 0) for r in routers)
    return f"keep: {under_way} requests under way" if under_way else "drained"


def remove(
    store: router.RedisStore,
    railway: Railway,
    name: str,
    judged: router.Record,
    service: Service | None,
    report: Report,
    token: str,
    why: str,
) -> bool:
    """Delete a deployment, if it still is what was judged: it is claimed first, so that nobody
    promotes it meanwhile, then its tabs are told to reload. Says whether it did."""
    try:
        service_id = service.id if service else None
        store.apply(lambda state: control.claim(state, name, judged, service_id))
    except router.StateError as error:  # promoted, rolled back to, or drained anew
        report.kept[name] = str(error)
        return False
    if service:
        if judged and control.reload_tabs(judged, token):
            time.sleep(RELOAD_GRACE_SECONDS)
        railway.delete(service)
    step = functools.partial(control.delete, deployment_id=name)
    store.apply(control.logged(step, "remove", name, by="janitor", why=why))
    return True


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
    given = vars(parser.parse_args(argv))
    return {name: given[name] for name in flags.values() if given[name] is not None}


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    env = {**os.environ, **options(argv)}
    if not any(env.get(name) for name in router.RAILWAY_RUNTIME):
        print("run this inside the janitor service on Railway", file=sys.stderr)
        return 1
    needed = ("RAILWAY_PROJECT_ID", "RAILWAY_ENVIRONMENT_ID", "RAILWAY_TOKEN", "REDIS_URL")
    if missing := [name for name in needed if not env.get(name)]:
        print(f"missing {', '.join(missing)}: run `pulse-railway ensure`", file=sys.stderr)
        return 1
    store = router.store_from_env(env)
    assert isinstance(store, router.RedisStore)
    token = env.get("PULSE_RAILWAY_INTERNAL_TOKEN", "")
    limits = Limits(
        router.seconds("PULSE_RAILWAY_DRAIN_TTL_SECONDS", 86_400, env),
        router.seconds("PULSE_RAILWAY_ROLLBACK_WINDOW_SECONDS", 900, env),
        int(router.seconds("PULSE_RAILWAY_KEEP", 0, env)),
    )
    railway = Railway(env)
    try:
        with lock(store) as held:
            state = store.read()
            seen = railway.inspect()
            if seen.janitor_id and (answer := answer_to(seen, env)):  # whoever holds the lock
                railway.remember(seen.janitor_id, CONTROL_ANSWER, json.dumps(answer))
                print(json.dumps({"carried_out": answer.get("command"), "ok": answer["ok"]}))
                return 0
            if not held:
                print(json.dumps({"skipped": "another run holds the lock"}))
                return 0
            report = sweep(store, railway, state, seen, token, limits)
        notify(env, report)
    except (Refused, router.StateError, RuntimeError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except (redis.RedisError, httpx.HTTPError) as error:
        # The class only: a Redis error can carry its URL.
        print(f"gave up: {type(error).__name__}; the next run goes on", file=sys.stderr)
        return 1
    print(json.dumps(vars(report)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
