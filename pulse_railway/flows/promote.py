"""`promote` and `rollback`: choose another running deployment, or a share of visitors for one."""

from __future__ import annotations

from typing import Any

from pulse_railway import router_commands
from pulse_railway.errors import Failure
from pulse_railway.flows.bake import bake
from pulse_railway.flows.reachability import remember_active, wait_until_active, wait_until_routed
from pulse_railway.flows.signals import interruptible
from pulse_railway.options import PromoteOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.stack import Stack, find_backend, joined, require_believable


def promote(api: Api, stack: Stack, wanted: PromoteOptions, output: Output) -> dict[str, Any]:
    """Make a running deployment the active one, or the canary; then watch it, where asked for."""
    chosen = str(wanted.deployment_id)
    require_believable(stack)
    find_backend(stack, chosen)
    previous = None
    if wanted.bake:
        with output.step("ask the router which deployment is active"):
            previous = router_commands.read_active(api, stack)
    baking = wanted.bake if previous and previous != chosen else 0  # else nothing to go back to
    result = choose(
        api,
        stack,
        chosen,
        output,
        weight=wanted.weight,
        bake=baking,
        why=wanted.message,
        force=wanted.force,
    )
    if baking and previous:
        canary = wanted.weight is not None
        with interruptible():
            result["bake"] = bake(api, stack, chosen, previous, baking, output, canary)
    return result


def choose(
    api: Api,
    stack: Stack,
    deployment_id: str,
    output: Output,
    *,
    weight: float | None = None,
    bake: int = 0,
    why: str | None = None,
    instead_of: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Have the router choose it, when it is reached through the router.

    Args:
        instead_of: the deployment that is rolled back from.
        force: also where it does not answer now.
    """
    service = find_backend(stack, deployment_id)
    if force:
        output.warn(f"{deployment_id} is promoted whether it answers or not, as asked")
    else:
        with output.step(f"reach {deployment_id} through the router"):
            see_that_it_answers(api, stack, deployment_id, output)
    share = "" if weight is None else f" for {weight:g} % of new visitors"
    with output.step(f"promote {deployment_id}{share}"):
        promoted = router_commands.send_promote(
            api,
            stack,
            deployment_id,
            service.name,
            weight=weight,
            bake=bake,
            why=why,
            instead_of=instead_of,
            rolls_back=bool(instead_of),
            warn=output.warn,
        )
        if weight is None:
            remember_active(api, stack, deployment_id, promoted, output)
    if weight is None and not force:
        with output.step("reach it without affinity"):
            wait_until_active(api, stack, deployment_id, output)
    return {
        "deployment_id": deployment_id,
        "active": weight is None,
        "weight": weight,
        "address": stack.address,
    }


def see_that_it_answers(api: Api, stack: Stack, deployment_id: str, output: Output) -> None:
    """Raises Failure where users would get errors. One whose record is lost is not routed to: its
    promotion makes the record anew."""
    try:
        wait_until_routed(api, stack, deployment_id, output, by_affinity=True, timeout=20.0)
    except Failure as failure:
        known = {r["deployment_id"] for r in router_commands.read_state(api, stack)["deployments"]}
        if deployment_id not in known:
            output.warn(f"the router's record of {deployment_id} is lost: this makes it anew")
            return
        raise Failure(
            f"{deployment_id} does not answer now, and nothing was changed: {failure}."
            f" `pulse-railway logs --deployment-id {deployment_id}` tells why; --force promotes it"
            " all the same"
        ) from None


def rollback(api: Api, stack: Stack, output: Output, why: str | None = None) -> dict[str, Any]:
    """End the canary where there is one; else promote the deployment that was active before, while
    it still runs. What is rolled back from is no way back: a second rollback goes further."""
    require_believable(stack)
    with output.step("ask the router which deployment was active before"):
        state = router_commands.read_state(api, stack)
    if state["lost"] or (not state["active"] and stack.backends):
        raise Failure(
            "the routing state is lost, or an older one, and with it what was active before: run"
            " `pulse-railway restore`, then this again"
        )
    if canary := state["canary"]:
        name = canary["deployment_id"]
        with output.step(f"end the canary {name}"):
            router_commands.send_abort_canary(api, stack, name, why, output.warn)
        return {"deployment_id": state["active"], "ended": name, "address": stack.address}
    previous = [
        record
        for record in state["deployments"]
        if record.get("state") == "draining"
        and not record.get("retiring_at")
        and not record.get("rejected_at")
        and stack.backend(record["deployment_id"])
    ]
    if not previous:
        left = [
            r["deployment_id"]
            for r in state["deployments"]
            if r.get("rejected_at") and stack.backend(r["deployment_id"])
        ]
        run = "`pulse-railway promote --deployment-id ...`"
        hint = f"; {run} takes {joined(left)}, rolled back from" if left else ""
        raise Failure(
            f"no earlier deployment to go back to runs any more: deploy that version again{hint}"
        )
    previous.sort(key=lambda r: float(r.get("drain_started_at") or 0), reverse=True)
    chosen = previous[0]["deployment_id"]
    return choose(api, stack, chosen, output, why=why, instead_of=state["active"])
