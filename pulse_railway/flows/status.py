"""`status`: the baseline, each deployment with its state, age and sessions, and what is wrong."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection
from typing import Any

from pulse_railway import contract, router_commands
from pulse_railway.advice import pasteable
from pulse_railway.errors import Failure
from pulse_railway.flows import baseline
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.services import left_empty, scaled
from pulse_railway.stack import Service, Stack, joined, ownership, require_baseline
from pulse_railway.waiting import FAILED_STATES


def status(api: Api, stack: Stack) -> dict[str, Any]:
    """All that is known, also where the router does not answer. `problems` says in words what is
    wrong, each with the command that mends it."""
    state, silence = None, None
    if stack.router:
        try:
            state = router_commands.read_state(api, stack, pauses=(1.0,))
        except Failure as failure:
            silence = str(failure)
    known = {r["deployment_id"]: r for r in state["deployments"]} if state else {}
    copies = [u for u in stack.unowned.values() if u.related and u.kind == "copy"]
    copied = [s for s in stack.others if s.name in {u.name for u in copies}]
    ids = {str(s.deployment_id): s for s in (*copied, *stack.backends)}
    rows = []
    for name in sorted(
        {*known, *ids}, key=lambda n: ids[n].created_at if n in ids else "", reverse=True
    ):
        record, service = known.get(name, {}), ids.get(name)
        unrecorded = "unregistered" if state else "unknown"
        if service and service.name in stack.unowned:
            unrecorded = "copied"
        rows.append(
            {
                "deployment_id": name,
                "state": record.get("state") or unrecorded,
                "service": service.name if service else None,
                "railway": service.status if service else "GONE",
                "age_seconds": round(service.age) if service else None,
                "drain_started_at": record.get("drain_started_at"),
                "sessions": record.get("sessions"),
                "weight": record.get("weight"),
                "rolled_back": bool(record.get("rejected_at")),
                "about": record.get("about") or {},
            }
        )
    has_address = stack.router and stack.router.domains
    found = [pasteable(problem) for problem in problems(stack, state, silence)]
    found += of_regions(api, stack)
    return {
        "address": stack.address if has_address else None,
        "active": state["active"] if state else None,
        "canary": state["canary"] if state else None,
        "maintenance": state["maintenance"] if state else None,
        "lock": state["lock"] if state else None,
        "last_promoted": stack.last_promoted,
        "baseline": [
            {
                "service": s.name,
                "railway": s.status,
                "version": s.variables.get(contract.RUNTIME_VERSION),
            }
            for s in stack.baseline
        ],
        "missing": [] if stack.no_such_router else stack.missing,
        "deployments": rows,
        "copied": [pasteable(u.words()) for u in copies],
        "routers": state["routers"] if state else [],
        "problem": found[0] if found else None,
        "problems": found,
    }


# what comes of a key that is not understood
OF_KEYS = {
    ":maintenance": "the site is closed, until `pulse-railway maintenance off`",
    ":owner": "it is ignored: `pulse-railway ensure` writes it anew",
    ":removed": "it is ignored, and the next removal writes it anew",
    ":deploy:lock": "it is ignored, and the next deploy writes it anew",
    ":promoted": "it is ignored, and the next promotion writes it anew",
}


def of_memories(state: dict[str, Any], stack: Stack) -> list[str]:
    """What the routing state lacks, and where it is not what Railway says was promoted last."""
    active, last = state["active"], stack.last_promoted
    found = []
    if state["lost"] and last and stack.backend(last) is None:
        run = "`pulse-railway restore --deployment-id ...` with one that runs"
        if active:
            run = f"`pulse-railway restore --deployment-id {active}` makes that final"
        found.append(
            f"{last} was promoted last, and its service is gone: {active or 'none'} is active;"
            f" {run}"
        )
    elif state["lost"]:
        is_now = f", and {active} is active" if active else ""
        found.append(
            f"the routing state is lost, or an older one: {last} was promoted last{is_now}."
            " Routers and janitor mend it by themselves; `pulse-railway restore` does it now"
        )
    elif not active and stack.backends:
        found.append(
            "no deployment is active: run `pulse-railway promote --deployment-id ...`, or"
            " `pulse-railway restore --deployment-id ...` where one was active before"
        )
    known_ids = {r["deployment_id"] for r in state["deployments"]}
    if active and active not in known_ids and stack.backend(active):
        found.append(f"the record of {active} is lost: `pulse-railway restore` makes it anew")
    deploying = float((state.get("lock") or {}).get("until") or 0) > time.time()
    if active and not state["lost"] and not deploying:
        found += [
            f"{s.deployment_id} runs without a record, and its tabs are sent to {active}: unless it"
            " is being deployed, `pulse-railway restore` makes its record anew, and `pulse-railway"
            f" delete --deployment-id {s.deployment_id}` removes it"
            for s in stack.backends
            if s.deployment_id not in {active, *known_ids} and s.age > JUST_MADE_SECONDS
        ]
    for problem in state.get("problems") or []:
        named = (n for n in known_ids if str(problem).startswith(f"{n}: "))
        name = next(named, active)
        if name != active and contract.DEPLOYMENT_ID_PATTERN.fullmatch(name):
            run = f"it is kept until `pulse-railway delete --deployment-id {name}`"
        elif name != active:
            key = shlex.quote(f"{stack.redis_prefix}:deployment:{name}")
            run = f"it is ignored. `redis-cli DEL {key}` in {stack.names.redis} removes it"
        elif str(problem).startswith(f"{name}: "):
            run = "it is ignored, and goes with that deployment"
        else:
            key = str(problem).split()[0]
            run = OF_KEYS.get(key, "it is ignored, and the next change writes it anew")
        found.append(f"in the routing state, {problem}: {run}")
    return found


def of_active(state: dict[str, Any]) -> list[str]:
    """Users have nothing of an active version that is silent, whatever Railway says of it."""
    return [
        f"the active deployment {name} does not answer: `pulse-railway logs --deployment-id {name}`"
        f" tells why, `pulse-railway redeploy --deployment-id {name}` starts it anew,"
        " `pulse-railway rollback` goes back"
        for record in state["deployments"]
        if (name := record["deployment_id"]) == state["active"]
        and "sessions" in record
        and record["sessions"] is None
    ]


def of_sharing(state: dict[str, Any], stack: Stack) -> list[str]:
    """Routers of several stacks on a state that does not say whose it is."""
    others = {str(r["identity"]) for r in state["routers"] if r.get("identity")} - {stack.stamp}
    if state.get("owner") or not others:
        return []
    return [
        f"the routing state does not say whose it is, and routers of other stacks serve it too"
        f" ({joined(others)}, as environment and router): what one stack promotes, all serve."
        " `pulse-railway ensure --owns-state` makes it this stack's, if it is; for the others"
        " `pulse-railway scaffold` with another --redis-prefix"
    ]


REDIS_IS_SILENT = "the router's Redis does not answer"  # as control.py says it
REPORTED_SECONDS = 15.0  # in which a router has said that it serves a new state


def of_routers(state: dict[str, Any], stack: Stack) -> list[str]:
    """Routers that serve an older state than the one that is there, or that ended without a word:
    what they reported last stays for two minutes."""
    epoch, name = state.get("epoch"), stack.names.router
    return [
        f"the router {router['router']} said {router['age']:.0f} s ago that it serves an older"
        " routing state: if it has ended, this is over in two minutes; else `pulse-railway logs"
        f" --service {name}` tells why, and `railway restart --service {name}` starts it anew"
        for router in state["routers"]
        if isinstance(epoch, int)
        and isinstance(router.get("epoch"), int)
        and router["epoch"] < epoch
        and float(router.get("age") or 0) > REPORTED_SECONDS
    ] + [
        f"{key} stands where routers report, and no router has written it: it is ignored."
        f" `redis-cli DEL {shlex.quote(key)}` in {stack.names.redis} removes it"
        for key in state.get("reports_without_lease") or []
    ]


DEAD_DEPLOY_SECONDS = 3600.0
JUST_MADE_SECONDS = 60.0  # in which a service may not have been there yet
BAKE_GRACE = 60.0  # seconds after its end that a bake may still be judged


def of_record(record: dict[str, Any], stack: Stack) -> list[str]:
    """What is wrong with one deployment that is not simply active or draining."""
    name = record["deployment_id"]
    found = []
    age = time.time() - float(record.get("registered_at") or time.time())
    left = record["state"] == "pending" and not record.get("held") and age > DEAD_DEPLOY_SECONDS
    if left and name != stack.last_promoted:  # else the state is an older one
        found.append(
            f"{name} has been pending for {age / 3600:.1f} h, and runs: its deploy did not get"
            f" to its end; `pulse-railway promote --deployment-id {name}`, or `pulse-railway delete"
            f" --deployment-id {name}`"
        )
    until = (record.get("bake") or {}).get("until")
    weight = record.get("weight")
    if until and time.time() > float(until) + BAKE_GRACE:
        share = "" if weight is None else f" --weight {weight:g}"
        found.append(
            f"the bake of {name} was cut off: it stays as it is, unwatched. `pulse-railway"
            f" rollback` goes back, `pulse-railway promote --deployment-id {name}{share}` keeps it"
        )
    service = stack.backend(name)
    ended = service.status if service and service.status in FAILED_STATES else None
    if ended and weight is not None:
        found.append(f"the canary {name} is {ended} on Railway: `pulse-railway rollback` ends it")
    elif ended and record["state"] in ("draining", "pending"):
        found.append(
            f"{name} is {ended} on Railway, and serves no tab: `pulse-railway"
            f" redeploy --deployment-id {name}` starts it anew, `pulse-railway delete"
            f" --deployment-id {name}` removes it"
        )
    # the services were read before the records, and a deletion takes the service first
    old = time.time() - float(record.get("registered_at") or 0) > JUST_MADE_SECONDS
    missing = service is None and old and not record.get("retiring_at")
    if missing and record["state"] in ("draining", "pending"):
        found.append(
            f"the service of {name} was deleted on Railway: the janitor takes it out,"
            f" `pulse-railway delete --deployment-id {name}` does it now"
        )
    return found


# Railway's of November 2026; of others it is asked
REGIONS = {"us-west2", "us-east4-eqdc4a", "europe-west4-drams3a", "asia-southeast1-eqsg3a"}


def of_regions(api: Api, stack: Stack) -> list[str]:
    """Baseline services that are to run in a region that Railway does not have."""
    doubtful = [s for s in stack.baseline if s.regions.keys() - REGIONS]
    if not doubtful:
        return []
    try:
        answer = api.call(documents.REGIONS, project=stack.target.project_id)["regions"]
    except GraphqlError:  # what is not known is no fault
        return []
    there = {str(region["name"]) for region in answer}
    said = [in_no_region(service, there) for service in doubtful] if there else []
    return [line for line in said if line]


def in_no_region(service: Service, there: Collection[str]) -> str | None:
    bad = sorted(service.regions.keys() - there)
    if not bad:
        return None
    good = next((r for r in (*service.regions, "us-west2") if r in there), min(there))
    count = service.regions.get(good, 0) + sum(service.regions[r] for r in bad)
    leaves = " ".join(f"{region}=0" for region in bad)
    return (
        f"{service.name} is to run in {joined(bad)}, and Railway has no such region: `railway scale"
        f" {leaves} {good}={count} --service {service.name}` moves it ({joined(there)})"
    )


def by_other_hands(stack: Stack, state: dict[str, Any] | None) -> list[str]:
    """What somebody has changed on Railway so that the stack does not work as it should."""
    found = []
    for service, wanted in (
        (stack.router, baseline.ROUTER_SETTINGS),
        (stack.janitor, baseline.JANITOR_SETTINGS),
    ):
        if service is None or not service.variables.get(contract.RUNTIME_VERSION):
            continue  # an earlier version's, which `ensure` takes over
        changed = [
            name for name in wanted if service.settings.get(name, wanted[name]) != wanted[name]
        ]
        if service is stack.janitor and not service.settings.get("cronSchedule", True):
            changed.append("cronSchedule")
        if service is stack.router and service.settings.get("numReplicas") == 0:
            changed.append("numReplicas")
        if changed:
            found.append(
                f"{', '.join(changed)} of {service.name} was changed on Railway: `pulse-railway"
                " ensure` sets it as it has to be"
            )
    found += [
        f"an `ensure` that writes to {s.name} is under way, or was cut off: then `pulse-railway"
        " ensure` ends it"
        for s in (stack.router, stack.janitor)
        if s and s.variables.get(contract.UNDEPLOYED)
    ]
    if stack.redis and stack.redis.settings.get("numReplicas") == 0:
        found.append(
            f"{stack.redis.name} has a replica in no region: `railway scale REGION=1 --service"
            f" {stack.redis.name}` gives it one"
        )
    found += [
        f"{s.name} was stopped on Railway: `railway redeploy --service {s.name}` starts it"
        for s in (stack.router, stack.redis)
        if s and s.stopped and s.status not in FAILED_STATES
    ]
    served = {r["deployment_id"] for r in state["deployments"]} if state else set()
    for service in stack.backends:
        name, replicas = service.deployment_id, service.settings.get("numReplicas")
        if replicas not in (None, 1):
            wanted_in = scaled(service.regions or {"REGION": 1}, 1)
            assigned = " ".join(f"{region}={count}" for region, count in wanted_in.items())
            found.append(
                f"{name} has {replicas} replicas, and a tab's state is in one of them:"
                f" `railway scale {assigned} --service {service.name}` leaves one"
            )
        if name in served and service.stopped and service.status not in FAILED_STATES:
            found.append(
                f"{name} was stopped on Railway: `pulse-railway redeploy --deployment-id {name}`"
                f" starts it, `pulse-railway delete --deployment-id {name}` removes it"
            )
    return found


def problems(stack: Stack, state: dict[str, Any] | None, silence: str | None) -> list[str]:
    """What is wrong, the most urgent first.

    Args:
        state: the router's answer, None where there is none; `silence` says why.
    """
    found = []
    try:
        require_baseline(stack)
    except Failure as failure:
        found.append(str(failure))
    found += [
        f"{s.name} is {s.status} on Railway: see `pulse-railway logs --service {s.name}`"
        + (
            "; `pulse-railway ensure` deploys it anew"
            if s in (stack.router, stack.janitor)
            else f"; `railway redeploy --service {s.name}` starts it anew"
        )
        for s in stack.baseline
        if s.status in FAILED_STATES
    ]
    found += by_other_hands(stack, state)
    found += [left_empty(s.name, s.deployment_id) for s in stack.empty]
    found += [u.words() for u in stack.unowned.values() if u.can_be_restored]
    if silence and REDIS_IS_SILENT in silence:
        found.append(
            f"Redis does not answer: the routers serve what they know, and nothing can be promoted."
            f" `pulse-railway logs --service {stack.names.redis}` tells why; restart it on Railway"
        )
    elif silence:
        found.append(
            f"the router does not answer: {silence}. See `pulse-railway logs --service"
            f" {stack.names.router}`"
        )
    if state is None or stack.copied_from:  # of a copy, `ensure` comes before all else
        return found
    if (owner := state.get("owner")) not in (None, stack.stamp):
        return [*found, ownership.foreign_words(owner)]
    active = state["active"]
    found += of_sharing(state, stack)
    found += of_memories(state, stack)
    found += of_active(state)
    found += of_routers(state, stack)
    for record in state["deployments"]:
        found += of_record(record, stack)
    if not active:
        return found
    service = stack.backend(active)
    if service is None:
        found.append(
            f"the active deployment {active} has no service: `pulse-railway rollback` goes back,"
            " `pulse-railway promote --deployment-id ...` takes another one, or deploy"
        )
    elif service.status in FAILED_STATES:
        found.append(
            f"the active deployment {active} is {service.status} on Railway: see `pulse-railway"
            " logs`; `pulse-railway rollback` goes back, `pulse-railway redeploy` starts it anew"
        )
    return found
