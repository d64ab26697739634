"""`restore`: rebuild a routing state that Redis has lost."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from pulse_railway import contract, router_commands
from pulse_railway.errors import Failure, Refused
from pulse_railway.flows.instances import as_recorded
from pulse_railway.flows.owner import has_other_owner, take_over_state
from pulse_railway.flows.preview import has_hash, is_preview, release
from pulse_railway.flows.promote import check_answers
from pulse_railway.flows.reachability import (
    backend_address,
    store_last_promoted,
    wait_until_reachable,
)
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import write_variables
from pulse_railway.stack import (
    Service,
    Stack,
    find_backend,
    joined,
    mended_references,
    require_complete_answer,
    unset_references,
)


def restore(api: Api, stack: Stack, deployment_id: str | None, output: Output) -> dict[str, Any]:
    """Write the active deployment, and a record of each running deployment, to the routing state.

    Args:
        deployment_id: the deployment to make active, whatever the state has. With None, the
            deployment that the state has if only records are lost, else the last promotion
            (`known_active`). Never the newest one, which may have been rolled back.

    Raises Failure if the active deployment is not known, or nothing is lost.
    """
    require_complete_answer(stack)
    added = take_over(api, stack, deployment_id, output)
    for service in stack.backends:
        mend_references(api, stack, service, output)
    if deployment_id and (stack.backends or stack.unowned):
        find_backend(stack, deployment_id)
    if not stack.backends:
        raise Failure("there are no deployments to restore: run `pulse-railway deploy`")
    with output.step("ask the router what it knows"):
        state = router_commands.read_state(api, stack)
    taken_over = has_other_owner(stack, state) and take_over_state(api, stack, state, output)
    try:
        active = deployment_id or lost_active(stack, state)
    except Failure:
        if taken_over and state["active"] and not state["lost"]:
            return {"active": state["active"], "restored": []}
        raise
    find_backend(stack, active)
    if deployment_id and not state["lost"] and deployment_id in readable_records(state):
        if deployment_id == state["active"] and not (taken_over or added):
            lost_active(stack, state)  # raises if nothing is lost
        check_answers(api, stack, deployment_id, output)
    # a router of an earlier version would show a preview to everybody
    restored = [
        s
        for s in stack.backends
        if not is_preview(s) or (state.get("previews") and has_hash(s)) or s.deployment_id == active
    ]
    with output.step("find the deployments' addresses"):
        addresses = {s.id: backend_address(api, stack.target, s.id) for s in restored}
        records = [
            {
                "deployment_id": service.deployment_id,
                "service_name": service.name,
                "service_id": service.id,
                "address": addresses[service.id],
                "registered_at": datetime.fromisoformat(service.created_at).timestamp(),
                "drain_started_at": None,
                "about": stored_about(service),
                **as_recorded(addresses[service.id], contract.instances_of(service.variables)),
                **(as_preview(service) if service.deployment_id != active else {}),
            }
            for service in restored
        ]
    with output.step("restore the routing state"):
        # a router of an earlier version has no option `--chosen`, so it is sent only if needed
        names_another = not state["lost"] and active != state["active"]
        chosen = state["active"] is not None and (deployment_id is not None or names_another)
        try:
            promoted = router_commands.send_restore(api, stack, active, records, chosen=chosen)
        except Refused as refused:
            if refused.reason != "active" or not state["lost"]:
                raise
            output.info("the routers have restored it meanwhile")
            return {"active": router_commands.read_active(api, stack), "restored": []}
        store_last_promoted(api, stack, active, promoted, output)
        release(api, stack, find_backend(stack, active), output)
    with output.step("reach the active deployment"):
        wait_until_reachable(api, stack, active, output, by_affinity=False)
    return {"active": active, "restored": [r["deployment_id"] for r in records]}


def as_preview(service: Service) -> dict[str, Any]:
    """Return the fields by which the record of a preview differs; none for another deployment."""
    if not is_preview(service):
        return {}
    return {"state": "pending", "held": True, "preview": service.variables[contract.PREVIEW]}


def stored_about(service: Service) -> dict[str, Any] | None:
    """Return commit, author and message of a deployment, from its service's variable, or None."""
    try:
        about = json.loads(service.variables.get(contract.ABOUT) or "null")
    except (ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def take_over(api: Api, stack: Stack, deployment_id: str | None, output: Output) -> list[str]:
    """Add deployments without a stack to this one: those of its former router, and
    `deployment_id`, if its owner is not known. Returns their services' names."""
    added = []
    for name, unowned in list(stack.unowned.items()):
        of_former_router = unowned.kind == "gone"
        if not unowned.can_be_restored:
            continue
        if not of_former_router and unowned.deployment_id != deployment_id:
            continue
        service = next(s for s in stack.others if s.name == name)
        reason = "whose router is gone" if of_former_router else "which is nobody's"
        with output.step(f"take {unowned.deployment_id} over, {reason}"):
            write_variables(api, stack.target, service.id, {contract.STACK: str(stack.stamp)})
        stack.services[name] = service
        del stack.unowned[name]
        added.append(name)
    return added


def mend_references(api: Api, stack: Stack, service: Service, output: Output) -> None:
    """Let the variables of a deployment of a former stack refer to this one's services.

    The running deployment has the former values until it is deployed again.
    """
    if not (values := mended_references(stack, service)):
        return
    write_variables(api, stack.target, service.id, values)
    service.variables |= values
    name, unset = service.deployment_id, unset_references(stack, service)
    first = f"set {joined(unset)}, to which it refers, then " if unset else ""
    output.warn(
        f"{joined(values)} of {name} referred to services of a former stack, and is this one's from"
        f" the next start on. Until then {name} may not accept this router's token, and its tabs"
        f" are not counted: {first}`pulse-railway redeploy --deployment-id {name}` starts it again,"
        " or deploy a new version"
    )


def readable_records(state: dict[str, Any]) -> set[str]:
    """Return the ids of the deployments whose records can be read."""
    return {
        r["deployment_id"] for r in state["deployments"] if "record" not in r.get("ignored", ())
    }


def lost_active(stack: Stack, state: dict[str, Any]) -> str:
    """Return the deployment that `restore` makes active without `--deployment-id`.

    Raises Failure if nothing is lost.
    """
    active = state["active"]
    recorded = readable_records(state)
    if active and not state["lost"] and (stack.backend(active) or active in recorded):
        if recorded >= {active, *(s.deployment_id for s in stack.backends)}:
            raise Failure(
                f"{active} is active, and nothing is lost: there is nothing to restore;"
                " --deployment-id makes another one active"
            )
        return str(active)
    return known_active(stack, state)


def known_active(stack: Stack, state: dict[str, Any]) -> str:
    """Return the last promotion, of the deployments that run.

    Railway's variable has it, else the router that runs longest. Raises Failure if neither does.
    """
    running = {str(s.deployment_id) for s in stack.backends}
    if stack.last_promoted in running:
        return str(stack.last_promoted)
    for router in sorted(state["routers"], key=lambda r: -float(r.get("uptime_seconds") or 0)):
        if router.get("active") in running:
            return str(router["active"])
    if stack.last_promoted:
        raise Failure(
            f"{stack.last_promoted} was promoted last, and does not run any more: pass"
            f" --deployment-id with one of {joined(running)}"
        )
    raise Failure(
        "it is not known which deployment was active: pass --deployment-id with one of"
        f" {joined(running)}"
    )
