"""`status`: the baseline, each deployment with its state, age and sessions, and the problems."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from pulse_railway import contract, router_commands
from pulse_railway.advice import pasteable
from pulse_railway.errors import Failure
from pulse_railway.flows import baseline, deploy_lock
from pulse_railway.flows.preview import is_preview
from pulse_railway.flows.promote import rollback_target
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.runtime_image import runtime_version
from pulse_railway.services import REGIONS, empty_service_message, region_of, replicas_by_region
from pulse_railway.stack import (
    Service,
    Stack,
    address_without_secrets,
    double_words,
    joined,
    ownership,
    require_baseline,
)
from pulse_railway.waiting import FAILED_STATES


def status(api: Api, stack: Stack) -> dict[str, Any]:
    """Return the verb's result, also if the router does not answer.

    `problems` has messages, each with the command that solves the problem.
    """
    state, router_error = None, None
    if stack.router:
        try:
            state = router_commands.read_state(api, stack, pauses=(1.0,))
        except Failure as failure:
            router_error = str(failure)
    records = {r["deployment_id"]: r for r in state["deployments"]} if state else {}
    routers = state["routers"] if state else []
    copies = [u for u in stack.unowned.values() if u.related and u.kind == "copy"]
    copied = [s for s in stack.others if s.name in {u.name for u in copies}]
    ids = {str(s.deployment_id): s for s in (*copied, *stack.backends)}
    rows = []
    for name in sorted(
        {*records, *ids}, key=lambda n: ids[n].created_at if n in ids else "", reverse=True
    ):
        record, service = records.get(name, {}), ids.get(name)
        unrecorded = "unregistered" if state else "unknown"
        if service and service.name in stack.unowned:
            unrecorded = "copied"
        rows.append(
            {
                "deployment_id": name,
                "state": "preview" if record.get("preview") else record.get("state") or unrecorded,
                "service": service.name if service else None,
                "railway": service.status if service else "GONE",
                "region": region_of(service) if service else None,
                "age_seconds": round(service.age) if service else None,
                "drain_started_at": record.get("drain_started_at"),
                "moving_at": moving_at(record),
                "moved": sum(moved_by(router, name) for router in routers),
                "moved_idle": sum(moved_by(router, name, "moved_idle") for router in routers),
                "sessions": record.get("sessions"),
                "instances": 1 + len(record.get("instances") or {}),
                "weight": record.get("weight"),
                "rolled_back": bool(record.get("rejected_at")),
                "about": record.get("about") or {},
            }
        )
    url = stack.session_redis_url
    has_address = stack.router and stack.router.domains
    messages = [pasteable(problem) for problem in problems(stack, state, router_error)]
    messages += region_problems(api, stack)
    ours = [
        s for s in (stack.router, stack.janitor) if s and s.variables.get(contract.RUNTIME_VERSION)
    ]
    messages += [pasteable(problem) for s in ours if (problem := version_problem(s))]
    return {
        "address": stack.address if has_address else None,
        "active": state["active"] if state else None,
        "canary": state["canary"] if state else None,
        "maintenance": state["maintenance"] if state else None,
        "lock": present_lock(stack, state) if state else None,
        "last_promoted": stack.last_promoted,
        "session_redis": url and address_without_secrets(url),
        "baseline": [
            {
                "service": s.name,
                "railway": s.status,
                "version": s.variables.get(contract.RUNTIME_VERSION),
                "region": region_of(s),
            }
            for s in stack.baseline
        ],
        "missing": stack.missing,
        "deployments": rows,
        "copied": [pasteable(u.words()) for u in copies],
        "routers": routers,
        "problem": messages[0] if messages else None,
        "problems": messages,
    }


def present_lock(stack: Stack, state: dict[str, Any]) -> dict[str, Any] | None:
    """Return the deploy lock unless its lease is over, with what its holder deploys, for how many
    seconds it still holds, and whether that run appears to be `dead`."""
    lock, now = deploy_lock.with_service(stack, state.get("lock")), time_of(state)
    if lock is None or not lock.get("since") or lock["until"] <= now:
        return None
    lease, dead = round(lock["until"] - now), deploy_lock.appears_dead(stack, state)
    return {**lock, "lease_seconds": lease, "dead": dead}


def lock_problems(state: dict[str, Any], stack: Stack) -> list[str]:
    """Report a deploy lock whose run appears to be dead."""
    lock = present_lock(stack, state)
    if not lock or not lock["dead"]:
        return []
    return [
        f"the deploy lock is held by {deploy_lock.holder_words(lock)}, and that run appears to be"
        " dead: `pulse-railway unlock` frees it, and `pulse-railway deploy --lock-wait 60` takes it"
        " over"
    ]


def moving_at(record: dict[str, Any]) -> float | None:
    """Return when the tabs of a draining deployment begin to move over; None: they stay.

    A router of an earlier version has not checked the field.
    """
    at = record.get("moving_at")
    if record.get("state") != "draining" or isinstance(at, bool) or not isinstance(at, int | float):
        return None
    return at if 0 <= at <= 1e11 else None


def moved_by(report: dict[str, Any], deployment_id: str, key: str = "moved") -> int:
    """Return how many client loaders of a deployment a router has told to move, by its report;
    with the key `moved_idle`, how many idle tabs."""
    moved = report.get(key)
    count = moved.get(deployment_id) if isinstance(moved, dict) else 0
    return max(count, 0) if type(count) is int else 0


# the effect of an invalid value under each key of the routing state
INVALID_KEYS = {
    ":maintenance": "the site is closed, until `pulse-railway maintenance off`",
    ":owner": "it is ignored: `pulse-railway ensure` replaces it",
    ":removed": "it is ignored, and the next removal replaces it",
    ":deploy:lock": "it is ignored, and the next deploy replaces it",
    ":promoted": "it is ignored, and the next promotion replaces it",
}


def state_problems(state: dict[str, Any], stack: Stack) -> list[str]:
    """Report what the routing state has lost, what is invalid in it, and another last promotion
    than Railway's variable has."""
    active, last, records = state["active"], stack.last_promoted, state["deployments"]
    messages = []
    if state["lost"] and last and stack.backend(last) is None:
        remedy = "deploy again"
        if active:
            remedy = f"`pulse-railway restore --deployment-id {active}` makes that final"
        elif other := other_version(state, stack):
            remedy = f"`pulse-railway restore --deployment-id {other}` makes the latest one active"
        messages.append(
            f"{last} was promoted last, and its service is gone: {active or 'none'} is active;"
            f" {remedy}"
        )
    elif state["lost"]:
        now = f", and {active} is active" if active else ""
        messages.append(
            f"the routing state is lost, or an older one: {last} was promoted last{now}."
            " Routers and janitor restore it by themselves; `pulse-railway restore` does it now"
        )
    elif not active and (other := other_version(state, stack)):
        verb = "promote" if any(r["deployment_id"] == other for r in records) else "restore"
        messages.append(
            f"no deployment is active, and nobody is served: `pulse-railway {verb} --deployment-id"
            f" {other}` makes the latest one active"
        )
    recorded = {r["deployment_id"] for r in records}
    if active and active not in recorded and stack.backend(active):
        messages.append(f"the record of {active} is lost: `pulse-railway restore` restores it")
    deploying = float((state.get("lock") or {}).get("until") or 0) > time_of(state)
    if not state.get("previews"):
        messages += [
            f"{s.deployment_id} is a preview, and {stack.names.router} is of an earlier version,"
            " which shows it to nobody: `pulse-railway ensure` updates the router"
            for s in stack.backends
            if is_preview(s) and s.deployment_id not in recorded
        ]
        recorded |= {str(s.deployment_id) for s in stack.backends if is_preview(s)}
    if active and not state["lost"] and not deploying:
        messages += [
            f"{s.deployment_id} runs without a record, and its tabs are sent to {active}: unless it"
            " is being deployed, `pulse-railway restore` restores its record, and `pulse-railway"
            f" delete --deployment-id {s.deployment_id}` removes it"
            for s in stack.backends
            if s.deployment_id not in {active, *recorded} and s.age > NEW_SERVICE_SECONDS
        ]
    for problem in state.get("problems") or []:
        deployments = (n for n in recorded if str(problem).startswith(f"{n}: "))
        name = next(deployments, active)
        if name != active and stack.backend(name) and str(problem).startswith(f"{name}: record "):
            effect = "`pulse-railway restore` restores it"
        elif name != active and contract.DEPLOYMENT_ID_PATTERN.fullmatch(name):
            effect = f"it is kept until `pulse-railway delete --deployment-id {name}`"
        elif name != active:
            key = shlex.quote(f"{stack.redis_prefix}:deployment:{name}")
            effect = f"it is ignored. `redis-cli DEL {key}` in {stack.names.redis} removes it"
        elif str(problem).startswith(f"{name}: "):
            effect = "it is ignored, and is removed with that deployment"
        else:
            key = str(problem).split()[0]
            effect = INVALID_KEYS.get(key, "it is ignored, and the next change replaces it")
        messages.append(f"in the routing state, {problem}: {effect}")
    return messages


def other_version(state: dict[str, Any], stack: Stack) -> str | None:
    """Return what to make active in place of the active one: what `rollback` goes back to, or else
    the latest deployment that runs."""
    running = (
        s.deployment_id
        for s in stack.backends  # newest first
        if s.status not in FAILED_STATES and not s.stopped and s.deployment_id != state["active"]
        if not is_preview(s)
    )
    return rollback_target(state, stack) or next(running, None)


def active_problems(state: dict[str, Any], stack: Stack) -> list[str]:
    """Report an active deployment that does not answer the router, whatever Railway's status is."""
    messages = []
    for record in state["deployments"]:
        name = record["deployment_id"]
        # without a service, another stack's may answer to its name
        if record.get("wrong_token") and stack.backend(name):
            messages.append(wrong_token_message(name, name == state["active"], stack))
            continue
        if name != state["active"] or record.get("sessions", 0) is not None:
            continue
        remedies = []
        if stack.backend(name):
            remedies = [
                f"`pulse-railway logs --deployment-id {name}` shows why",
                f"`pulse-railway redeploy --deployment-id {name}` starts it again",
            ]
        if not state["canary"] and (target := rollback_target(state, stack)):
            remedies.append(f"`pulse-railway rollback` goes back to {target}")
        remedy = ", ".join(remedies) or "`pulse-railway deploy` deploys a new one"
        messages.append(f"the active deployment {name} does not answer: {remedy}")
    messages += [
        failing_message(name, count, state, stack)
        for name in {state["active"], (state.get("canary") or {}).get("deployment_id")} - {None}
        if (count := failures_in_a_row(name, state)) >= FAILING
    ]
    if fallback := state.get("fallback"):  # an older router reports none
        given = f"{state['active']} cannot be connected to: new visitors get {fallback}"
        messages.append(given)
    return messages


FAILING = 20  # requests in a row


def failures_in_a_row(name: str, state: dict[str, Any]) -> int:
    """Return how many requests in a row have failed, at the router where it is the most."""
    counts = [(r.get("failing") or {}).get(name) for r in state["routers"]]
    return max((count for count in counts if type(count) is int), default=0)


def failing_message(name: str, count: int, state: dict[str, Any], stack: Stack) -> str:
    what, remedy = "active deployment", ""
    if name != state["active"]:
        what, remedy = "canary", ", `pulse-railway rollback` ends it"
    elif not state.get("canary") and (target := rollback_target(state, stack)):
        remedy = f", `pulse-railway rollback` goes back to {target}"
    return (
        f"the last {count} requests to the {what} {name} got a 5xx or no answer:"
        f" `pulse-railway logs --deployment-id {name}` shows why{remedy}"
    )


def wrong_token_message(name: str, active: bool, stack: Stack) -> str:
    """Report a deployment with another internal token: somebody has changed the router's."""
    variable = f"{contract.INTERNAL_TOKEN} of {stack.names.router}"
    end = f"until its drain time is over, or {variable} is the one with which it was deployed"
    if active:
        end = f"`pulse-railway redeploy --deployment-id {name}` gives it the present one"
    return (
        f"{name} does not accept the router's internal token, so its tabs are not counted, and"
        f" cannot be told to reload: {end}"
    )


def sharing_problems(state: dict[str, Any], stack: Stack) -> list[str]:
    """Report routers of other stacks that serve the same routing state, if it has no owner."""
    others = {str(r["identity"]) for r in state["routers"] if r.get("identity")} - {stack.stamp}
    if state.get("owner") or not others:
        return []
    return [
        f"the routing state has no owner, and routers of other stacks serve it too"
        f" ({joined(others)}, as environment and router): what one stack promotes, all serve."
        " `pulse-railway ensure --owns-state` makes it this stack's, if it is; for the others"
        " `pulse-railway scaffold` with another --redis-prefix"
    ]


def store_problems(state: dict[str, Any], stack: Stack) -> list[str]:
    """Report a Redis that refuses writes."""
    refusal, name = str(state.get("writes_refused") or ""), stack.names.redis
    if not refusal:
        return []
    remedy = f"`pulse-railway logs --service {name}` shows why"
    if "maxmemory" in refusal:
        remedy = "it is full: give it more memory, or `maxmemory`"
    elif "MISCONF" in refusal:
        remedy = f"its disk is full or cannot be written; {remedy}"
    elif "read only replica" in refusal:
        remedy = "it is a replica: give `pulse-railway ensure` the primary's --redis-url"
    return [
        f"Redis refuses writes ({refusal}), so that nothing can be promoted, and sessions are not"
        f" kept: {remedy}"
    ]


JANITOR_FAILURES = 2  # in a row, after which a run's failure is a problem
STEPS = re.compile(r"\*/(\d+) \* \* \* \*")  # a cron schedule of each so many minutes


def janitor_problems(state: dict[str, Any], stack: Stack) -> list[str]:
    """Report a janitor that fails again and again, or does not run any more."""
    run, name = state.get("janitor"), stack.names.janitor
    if not run or stack.janitor is None or stack.janitor.status in FAILED_STATES:
        return []
    logs = f"`pulse-railway logs --service {name}` shows its runs"
    if run["failed"] >= JANITOR_FAILURES:
        return [
            f"the janitor has failed {run['failed']} times in a row, and removes nothing meanwhile:"
            f" {run['why']}. {logs}"
        ]
    steps = STEPS.fullmatch(str(stack.janitor.settings.get("cronSchedule") or ""))
    if steps and run["age"] > 60 * max(3 * int(steps[1]), 20):
        return [
            f"the janitor ran {run['age'] / 60:.0f} minutes ago last, and its schedule says every"
            f" {steps[1]}: {logs}, `pulse-railway ensure` deploys it again"
        ]
    return []


REDIS_IS_SILENT = "the router's Redis does not answer"  # a message of control.py
REPORT_SECONDS = 15.0  # after which every running router has reported the state that it serves


def router_problems(state: dict[str, Any], stack: Stack) -> list[str]:
    """Report routers that are silent or serve an older state than Redis has, and reports of unknown
    origin.

    A router that was killed is among them: Redis keeps its last report for two minutes.
    """
    epoch, name = state.get("epoch"), stack.names.router
    deployed = stack.router and stack.router.variables.get(contract.RUNTIME_VERSION)
    of_image = stack.router and stack.router.image
    messages = []
    if not state["routers"]:
        messages.append(
            f"no router has reported for two minutes: `pulse-railway logs --service {name}` shows"
            f" why, `railway restart --service {name}` restarts it"
        )
    for router in state["routers"]:
        served, version = router.get("epoch"), router.get("version")
        is_behind = isinstance(epoch, int) and isinstance(served, int) and served < epoch
        if is_behind and float(router.get("age") or 0) > REPORT_SECONDS:
            messages.append(
                f"the router {router['router']} said {router['age']:.0f} s ago that it serves an"
                " older routing state: if it has ended, this is over in two minutes; else"
                f" `pulse-railway logs --service {name}` shows why, and `railway restart --service"
                f" {name}` restarts it"
            )
        if deployed and not of_image and version not in (None, deployed):
            messages.append(
                f"the router {router['router']} runs {version}, and {deployed} was deployed:"
                f" `railway redeploy --service {name}` replaces it"
            )
    messages += [
        f"{key} is where routers report, and no router has written it: it is ignored."
        f" `redis-cli DEL {shlex.quote(key)}` in {stack.names.redis} removes it"
        for key in state.get("reports_without_lease") or []
    ]
    return messages


DEAD_DEPLOY_SECONDS = 3600.0  # after which no deploy is still between register and promote
NEW_SERVICE_SECONDS = 60.0  # in which services and records may not yet agree
BAKE_GRACE = 60.0  # seconds after the end of a bake in which its verdict may come


def time_of(state: dict[str, Any]) -> float:
    """Return the time by the store's clock, by which the state's times are."""
    return float(state.get("now") or time.time())  # an earlier router does not say it


def record_problems(record: dict[str, Any], stack: Stack, now: float) -> list[str]:
    """Report an unfinished deploy or bake, and a record whose service has failed or is gone.

    `now`: by the store's clock.
    """
    name = record["deployment_id"]
    messages = []
    age = now - float(record.get("registered_at") or now)
    pinned = record.get("held")
    unfinished = record["state"] == "pending" and not pinned and age > DEAD_DEPLOY_SECONDS
    if unfinished and name != stack.last_promoted:  # else the state is an older one
        messages.append(
            f"{name} has been pending for {age / 3600:.1f} h, and runs: its deploy did not finish;"
            f" `pulse-railway promote --deployment-id {name}`, or `pulse-railway delete"
            f" --deployment-id {name}`"
        )
    until = (record.get("bake") or {}).get("until")
    weight = record.get("weight")
    if until and now > float(until) + BAKE_GRACE:
        share = "" if weight is None else f" --weight {weight:g}"
        messages.append(
            f"the bake of {name} was cut off: it stays as it is, unwatched. `pulse-railway"
            f" rollback` goes back, `pulse-railway promote --deployment-id {name}{share}` keeps it"
        )
    service = stack.backend(name)
    failed = service.status if service and service.status in FAILED_STATES else None
    if failed and weight is not None:
        messages.append(
            f"the canary {name} is {failed} on Railway: `pulse-railway rollback` ends it"
        )
    elif failed and record["state"] in ("draining", "pending"):
        messages.append(
            f"{name} is {failed} on Railway, and serves no tab: `pulse-railway"
            f" redeploy --deployment-id {name}` starts it again, `pulse-railway delete"
            f" --deployment-id {name}` removes it"
        )
    # the services were read before the records, and a deletion removes the service first
    old = now - float(record.get("registered_at") or 0) > NEW_SERVICE_SECONDS
    missing = service is None and old and not record.get("retiring_at")
    if missing and record["state"] in ("draining", "pending"):
        messages.append(
            f"the service of {name} was deleted on Railway: the janitor removes its record,"
            f" `pulse-railway delete --deployment-id {name}` does it now"
        )
    return messages


def version_problem(service: Service) -> str | None:
    """Return what is to be done if a service runs another version than this one, or than the image
    that it has."""
    deployed, installed = service.variables.get(contract.RUNTIME_VERSION), runtime_version()
    if deployed == installed or (service.image and deployed == service.image):
        return None
    return (
        f"{service.name} runs {deployed or 'an earlier version'}, and this is {installed}:"
        " `pulse-railway ensure` updates it"
    )


def region_problems(api: Api, stack: Stack) -> list[str]:
    """Report baseline services with replicas in a region that Railway does not have."""
    services = [s for s in stack.baseline if s.regions.keys() - REGIONS]
    if not services:
        return []
    try:
        answer = api.call(documents.REGIONS, project=stack.target.project_id)["regions"]
    except GraphqlError:  # without the list there is nothing to report
        return []
    regions = {str(region["name"]) for region in answer}
    messages = [unknown_region(service, regions) for service in services] if regions else []
    return [message for message in messages if message]


def unknown_region(service: Service, regions: Collection[str]) -> str | None:
    unknown = sorted(service.regions.keys() - regions)
    if not unknown:
        return None
    region = next((r for r in (*service.regions, "us-west2") if r in regions), min(regions))
    count = service.regions.get(region, 0) + sum(service.regions[r] for r in unknown)
    cleared = " ".join(f"{name}=0" for name in unknown)
    return (
        f"{service.name} is to run in {joined(unknown)}, and Railway has no such region: `railway"
        f" scale {cleared} {region}={count} --service {service.name}` moves it ({joined(regions)})"
    )


def manual_changes(stack: Stack, state: dict[str, Any] | None) -> list[str]:
    """Report changes made on Railway by hand, with which the stack does not work."""
    messages = []
    for service, required in (
        (stack.router, baseline.ROUTER_SETTINGS),
        (stack.janitor, baseline.JANITOR_SETTINGS),
    ):
        if service is None or not service.variables.get(contract.RUNTIME_VERSION):
            continue  # an earlier version has created it, with other settings
        changed = [
            name for name, value in required.items() if service.settings.get(name, value) != value
        ]
        if service is stack.janitor and not service.settings.get("cronSchedule", True):
            changed.append("cronSchedule")
        if service is stack.router and service.settings.get("numReplicas") == 0:
            changed.append("numReplicas")
        if changed:
            messages.append(
                f"{', '.join(changed)} of {service.name} was changed on Railway: `pulse-railway"
                " ensure` restores it"
            )
    messages += [
        f"an `ensure` that writes to {s.name} is under way, or was cut off: then `pulse-railway"
        " ensure` finishes it"
        for s in (stack.router, stack.janitor)
        if s and s.variables.get(contract.UNDEPLOYED)
    ]
    for service in stack.services.values():
        for variable in filter(service.is_too_long, service.variables):
            size = len(service.variables[variable].encode(errors="replace")) // 1024
            is_ours = variable in (contract.CONTROL, contract.CONTROL_ANSWER)
            is_ours &= service is stack.janitor
            remedy = "`pulse-railway ensure` empties it" if is_ours else "shorten it on Railway"
            messages.append(
                f"{service.name} cannot start with {variable}, which has {size} KB, and Linux takes"
                f" 128: {remedy}"
            )
    if stack.redis and stack.redis.settings.get("numReplicas") == 0:
        messages.append(
            f"{stack.redis.name} has a replica in no region: `railway scale REGION=1 --service"
            f" {stack.redis.name}` gives it one"
        )
    messages += [
        f"{s.name} has {replicas} replicas, {effect}: `{scale_to_one(s)}` leaves one"
        for s, effect in (
            (stack.redis, "each with a routing state of its own"),
            (stack.janitor, "and each run of it is one too many"),
        )
        if s and (replicas := s.settings.get("numReplicas")) not in (None, 0, 1)
    ]
    messages += [
        f"{s.name} was stopped on Railway: `railway redeploy --service {s.name}` starts it"
        for s in (stack.router, stack.redis)
        if s and s.stopped and s.status not in FAILED_STATES
    ]
    recorded = {r["deployment_id"] for r in state["deployments"]} if state else set()
    for service in stack.backends:
        name, replicas = service.deployment_id, service.settings.get("numReplicas")
        if replicas not in (None, 1):
            messages.append(
                f"{name} has {replicas} replicas, and a tab's state is in one of them:"
                f" `{scale_to_one(service)}` leaves one"
            )
        if name in recorded and service.stopped and service.status not in FAILED_STATES:
            messages.append(
                f"{name} was stopped on Railway: `pulse-railway redeploy --deployment-id {name}`"
                f" starts it, `pulse-railway delete --deployment-id {name}` removes it"
            )
    return messages


def scale_to_one(service: Service) -> str:
    """Return the command that leaves one replica of a service."""
    counts = replicas_by_region(service.regions or {"REGION": 1}, 1)
    assigned = " ".join(f"{region}={count}" for region, count in counts.items())
    return f"railway scale {assigned} --service {service.name}"


def problems(stack: Stack, state: dict[str, Any] | None, router_error: str | None) -> list[str]:
    """Return a message for each problem, the most urgent first.

    Args:
        state: the router's answer; None if there is none, for which `router_error` is the reason.
    """
    messages = []
    try:
        require_baseline(replace(stack, doubles=[]))
    except Failure as failure:
        messages.append(str(failure))
    messages += [
        f"{s.name} is {s.status} on Railway: see `pulse-railway logs --service {s.name}`"
        + (
            "; `pulse-railway ensure` deploys it again"
            if s in (stack.router, stack.janitor)
            else f"; `railway redeploy --service {s.name}` starts it again"
        )
        for s in stack.baseline
        if s.status in FAILED_STATES
    ]
    messages += manual_changes(stack, state)
    messages += [double_words(stack, double) for double in stack.doubles]
    messages += [empty_service_message(s.name, s.deployment_id) for s in stack.empty]
    messages += [u.words() for u in stack.unowned.values() if u.can_be_restored]
    if router_error and REDIS_IS_SILENT in router_error:
        messages.append(
            f"Redis does not answer: the routers serve what they know, and nothing can be promoted."
            f" `pulse-railway logs --service {stack.names.redis}` shows why; restart it on Railway"
        )
    elif router_error:
        messages.append(
            f"the router does not answer: {router_error}. See `pulse-railway logs --service"
            f" {stack.names.router}`"
        )
    if state is None or stack.copied_from:  # a copy needs `ensure` first
        return messages
    if (owner := state.get("owner")) not in (None, stack.stamp):
        return [*messages, ownership.foreign_words(owner)]
    active = state["active"]
    messages += store_problems(state, stack)
    messages += sharing_problems(state, stack)
    messages += state_problems(state, stack)
    messages += active_problems(state, stack)
    messages += lock_problems(state, stack)
    messages += router_problems(state, stack)
    messages += janitor_problems(state, stack)
    for record in state["deployments"]:
        messages += record_problems(record, stack, time_of(state))
    if not active:
        return messages
    service = stack.backend(active)
    if service is None:
        last = stack.last_promoted
        remedy = "`pulse-railway deploy` deploys a new one"
        if other := other_version(state, stack):
            remedy = f"`pulse-railway promote --deployment-id {other}` makes {other} active"
        if last != active and last and stack.backend(last):
            remedy = f"`pulse-railway restore` goes back to {last}"
        messages.append(f"the active deployment {active} has no service: {remedy}")
    elif service.status in FAILED_STATES:
        messages.append(
            f"the active deployment {active} is {service.status} on Railway: see `pulse-railway"
            " logs`; `pulse-railway rollback` goes back, `pulse-railway redeploy` starts it again"
        )
    return messages
