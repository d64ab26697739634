"""`restore`: rebuild the routing state where Redis has lost it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pulse_railway import contract, router_commands
from pulse_railway.errors import Failure, Refused
from pulse_railway.flows.reachability import backend_address, remember_active, wait_until_routed
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import write_variables
from pulse_railway.stack import Stack, find_backend, joined, require_believable


def restore(api: Api, stack: Stack, wanted: str | None, output: Output) -> dict[str, Any]:
    """Bring the routing state to what was promoted last, with a record of each deployment that
    runs.

    Args:
        wanted: active then, whatever the store says. Without it, what was promoted last as Railway
            says; where the store is not older, what it says itself, and records alone are lost.
            Never the newest, which may be the version that was rolled back from.

    Raises Failure where nobody knows, or nothing is lost.
    """
    require_believable(stack)
    take_over(api, stack, wanted, output)
    if not stack.backends:
        raise Failure("there are no deployments to restore: run `pulse-railway deploy`")
    with output.step("ask the router what it knows"):
        state = router_commands.read_state(api, stack)
    chosen = wanted or what_was_active(stack, state)
    find_backend(stack, chosen)
    with output.step("find the deployments' addresses"):
        records = [
            {
                "deployment_id": service.deployment_id,
                "service_name": service.name,
                "service_id": service.id,
                "address": backend_address(api, stack.target, service.id),
                "registered_at": datetime.fromisoformat(service.created_at).timestamp(),
                "drain_started_at": None,
            }
            for service in stack.backends
        ]
    with output.step("restore the routing state"):
        # one that an earlier version runs on knows no `--chosen`
        differs = wanted is not None and state["active"] is not None
        try:
            promoted = router_commands.send_restore(api, stack, chosen, records, chosen=differs)
        except Refused as refused:
            if refused.reason != "active" or not state["lost"]:
                raise
            output.say("the routers have written it back meanwhile")
            return {"active": router_commands.read_active(api, stack), "restored": []}
        remember_active(api, stack, chosen, promoted, output)
    with output.step("reach the active deployment"):
        wait_until_routed(api, stack, chosen, output, by_affinity=False)
    return {"active": chosen, "restored": [r["deployment_id"] for r in records]}


def take_over(api: Api, stack: Stack, wanted: str | None, output: Output) -> None:
    """Make deployments this stack's that belong to none: those of its former router, and the one
    that is wanted, where nothing says whose it is."""
    for name, unowned in list(stack.unowned.items()):
        chosen = unowned.kind == "gone" or unowned.deployment_id == wanted
        if not (unowned.can_be_restored and chosen):
            continue
        service = next(s for s in stack.others if s.name == name)
        why = "whose router is gone" if unowned.kind == "gone" else "which is nobody's"
        with output.step(f"take {unowned.deployment_id} over, {why}"):
            write_variables(api, stack.target, service.id, {contract.STACK: str(stack.stamp)})
        stack.services[name] = service
        del stack.unowned[name]


def what_was_active(stack: Stack, state: dict[str, Any]) -> str:
    """What `restore` makes active, if nobody names it."""
    active = state["active"]
    if active and not state["lost"]:
        known = {r["deployment_id"] for r in state["deployments"]}
        if known >= {active, *(s.deployment_id for s in stack.backends)}:
            raise Failure(
                f"{active} is active, and nothing is lost: there is nothing to restore;"
                " --deployment-id makes another one active"
            )
        return str(active)
    return known_active(stack, state)


def known_active(stack: Stack, state: dict[str, Any]) -> str:
    """What was promoted last, as a router or Railway's variable says."""
    there = {str(s.deployment_id) for s in stack.backends}
    if stack.last_promoted in there:
        return str(stack.last_promoted)
    for router in sorted(state["routers"], key=lambda r: -float(r.get("uptime_seconds") or 0)):
        if router.get("active") in there:
            return str(router["active"])
    if stack.last_promoted:
        raise Failure(
            f"{stack.last_promoted} was promoted last, and does not run any more: pass"
            f" --deployment-id with one of {joined(there)}"
        )
    raise Failure(
        "nobody knows which deployment was active: pass --deployment-id with one of"
        f" {joined(there)}"
    )
