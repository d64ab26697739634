"""`promote` and `rollback`: make another running deployment active, or the canary."""

from __future__ import annotations

from typing import Any

from pulse_railway import router_commands
from pulse_railway.errors import Failure
from pulse_railway.flows import images
from pulse_railway.flows.bake import bake, is_over
from pulse_railway.flows.preview import is_preview, release
from pulse_railway.flows.reachability import (
    store_last_promoted,
    wait_until_active,
    wait_until_reachable,
)
from pulse_railway.flows.remove import evict
from pulse_railway.flows.rollout import moves_of, require_moves, take_up
from pulse_railway.flows.signals import interruptible
from pulse_railway.options import PromoteOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import Moves
from pulse_railway.stack import Stack, find_backend, joined, require_complete_answer


def promote(api: Api, stack: Stack, options: PromoteOptions, output: Output) -> dict[str, Any]:
    """Make a running deployment the active one, or the canary; with `--bake`, then watch it."""
    moves = moves_of(options) if options.weight is None else None  # a canary drains nobody
    if options.continue_:
        require_complete_answer(stack)
        with interruptible():
            name, why = options.deployment_id, options.message
            return take_up(api, stack, name, why, output, moves)
    deployment_id = str(options.deployment_id)
    require_complete_answer(stack)
    if moves is not None:
        with output.step("ask the router whether it moves tabs over"):
            require_moves(stack, router_commands.read_state(api, stack), moves)
    if stack.backend(deployment_id) is None and not stack.unowned_backend(deployment_id):
        refuse_gone(api, stack, deployment_id)
    find_backend(stack, deployment_id)
    previous = None
    if options.bake:
        with output.step("ask the router which deployment is active"):
            previous = router_commands.read_active(api, stack)
    # without another active version a rollback is not possible
    bake_seconds = options.bake if previous and previous != deployment_id else 0
    result = check_and_promote(
        api,
        stack,
        deployment_id,
        output,
        weight=options.weight,
        bake=bake_seconds,
        bake_latency_ms=options.bake_latency_ms,
        moves=moves,
        why=options.message,
        force=options.force,
    )
    if bake_seconds and previous:
        canary = options.weight is not None
        with interruptible():
            slow = options.bake_latency_ms is not None
            result["bake"] = baking = bake(
                api, stack, deployment_id, previous, bake_seconds, output, canary, slow
            )
        result["active"] = result["active"] and not is_over(baking)
    if options.evict:
        result |= {"evicted": evict(api, stack, deployment_id, output), "drains": None}
    return result


def check_and_promote(
    api: Api,
    stack: Stack,
    deployment_id: str,
    output: Output,
    *,
    weight: float | None = None,
    bake: int = 0,
    bake_latency_ms: int | None = None,
    moves: Moves | None = None,
    why: str | None = None,
    instead_of: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Promote a deployment after a check that it answers through the router.

    Args:
        weight: percent of new visitors, for a canary; None makes the deployment active.
        bake: seconds.
        bake_latency_ms: milliseconds after which a request counts as slow in it.
        moves: when the tabs of the version that drains move over; None: they stay.
        instead_of: in a rollback, the deployment that is active.
        force: skip the check.
    """
    service = find_backend(stack, deployment_id)
    if force:
        output.warn(f"{deployment_id} is promoted whether it answers or not, as asked")
    else:
        with output.step(f"reach {deployment_id} through the router"):
            check_answers(api, stack, deployment_id, output)
    share = "" if weight is None else f" for {weight:g} % of new visitors"
    with output.step(f"promote {deployment_id}{share}"):
        promoted = router_commands.send_promote(
            api,
            stack,
            deployment_id,
            service.name,
            weight=weight,
            bake=bake,
            bake_latency_ms=bake_latency_ms,
            moves=moves,
            why=why,
            instead_of=instead_of,
            rolls_back=bool(instead_of),
            warn=output.warn,
        )
        release(api, stack, service, output)
        if weight is None:
            store_last_promoted(api, stack, deployment_id, promoted, output)
    if weight is None and not force:
        with output.step("reach it without affinity"):
            wait_until_active(api, stack, deployment_id, output)
    return {
        "deployment_id": deployment_id,
        "active": weight is None,
        "weight": weight,
        "address": stack.address,
        "drains": promoted.drains if promoted else None,
    }


def last_one_gone(api: Api, stack: Stack, active: str | None) -> str:
    """Return which deployment was active before and is gone, and how it is brought up again."""
    for name, facts in reversed(images.facts_of(api, stack).items()):
        if name != active and not stack.backend(name):
            return f". {name} was the last one: {images.again(name, facts)}"
    return ": deploy that version again"


def refuse_gone(api: Api, stack: Stack, deployment_id: str) -> None:
    """Raise Failure if the history names a deployment, with how it is brought up again."""
    if stack.router is None:
        return
    if facts := images.facts_of(api, stack).get(deployment_id):
        raise Failure(f"{deployment_id} is gone: {images.again(deployment_id, facts)}")


class Silent(Failure):
    """A deployment does not answer, so that it was not promoted."""


def check_answers(api: Api, stack: Stack, deployment_id: str, output: Output) -> None:
    """Raise Silent if users would get errors.

    The router does not route to a deployment whose record is lost; the promotion restores the
    record, so this is only a warning.
    """
    try:
        closed = is_preview(find_backend(stack, deployment_id))
        wait_until_reachable(
            api, stack, deployment_id, output, by_affinity=True, preview=closed, timeout=20.0
        )
    except Failure as failure:
        known = {r["deployment_id"] for r in router_commands.read_state(api, stack)["deployments"]}
        if deployment_id not in known:
            output.warn(f"the router's record of {deployment_id} is lost: this restores it")
            return
        raise Silent(
            f"{deployment_id} does not answer now, and nothing was changed: {failure}."
            f" `pulse-railway logs --deployment-id {deployment_id}` shows why;"
            f" `pulse-railway promote --deployment-id {deployment_id} --force` promotes it anyway"
        ) from None


def rollback_target(state: dict[str, Any], stack: Stack) -> str | None:
    """Return the deployment that was active last, was not rolled back from, and still runs."""
    return next(iter(rollback_targets(state, stack)), None)


def rollback_targets(state: dict[str, Any], stack: Stack) -> list[str]:
    """Return the deployments that a rollback can go back to, the last active one first."""
    previous = [
        (float(record.get("drain_started_at") or 0), str(record["deployment_id"]))
        for record in state["deployments"]
        if record.get("state") == "draining"
        and not record.get("retiring_at")
        and not record.get("rejected_at")
        and stack.backend(record["deployment_id"])
    ]
    return [name for _, name in sorted(previous, reverse=True)]


def rollback(
    api: Api,
    stack: Stack,
    output: Output,
    why: str | None = None,
    moves: Moves | None = None,
) -> dict[str, Any]:
    """End the canary if there is one; else promote the last active deployment that still answers.

    A deployment that was rolled back is not promoted: a second rollback goes one version further.
    """
    require_complete_answer(stack)
    with output.step("ask the router which deployment was active before"):
        state = router_commands.read_state(api, stack)
    if state["lost"] or (not state["active"] and stack.backends):
        raise Failure(
            "the routing state is lost, or an older one, and with it what was active before: run"
            " `pulse-railway restore`, then this again"
        )
    require_moves(stack, state, moves)
    if canary := state["canary"]:
        name = canary["deployment_id"]
        with output.step(f"end the canary {name}"):
            router_commands.send_abort_canary(api, stack, name, why, output.warn, moves)
        return {"deployment_id": state["active"], "ended": name, "address": stack.address}
    silent = None
    for name in rollback_targets(state, stack):
        if silent:
            output.warn(f"{silent}; {name} is the one before it")
        try:
            return check_and_promote(
                api,
                stack,
                name,
                output,
                moves=moves,
                why=why,
                instead_of=state["active"],
            )
        except Silent as failure:
            silent = failure
    if silent is None:
        rejected = [
            r["deployment_id"]
            for r in state["deployments"]
            if r.get("rejected_at") and stack.backend(r["deployment_id"])
        ]
        command = "`pulse-railway promote --deployment-id ...`"
        hint = f"; {command} takes {joined(rejected)}, rolled back from" if rejected else ""
        raise Failure(
            "no earlier deployment to go back to runs any more"
            f"{last_one_gone(api, stack, state['active'])}{hint}"
        )
    raise silent
