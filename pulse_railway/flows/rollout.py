"""A canary in steps: more of the new visitors after each bake, and the promotion after the last.

The record says which steps there are; its weight, which one it is at. So another run can take a
rollout up (`promote --continue`) that was cut off: it bakes the present step anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pulse_railway import router_commands
from pulse_railway.errors import Failure
from pulse_railway.flows.bake import bake, is_over
from pulse_railway.flows.reachability import store_last_promoted, wait_until_active
from pulse_railway.options import DeployOptions, RollbackOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import Moves, Promotion
from pulse_railway.stack import Stack, find_backend


@dataclass(frozen=True)
class Steps:
    weights: tuple[float, ...]  # percent of new visitors, growing
    bake: int  # seconds for each
    latency_ms: int | None = None  # milliseconds after which a request counts as slow

    def stored(self) -> dict[str, Any]:
        """Return the steps as a record has them."""
        return {"weights": list(self.weights), "bake": self.bake, "latency_ms": self.latency_ms}

    def from_weight(self, weight: float) -> tuple[float, ...]:
        """Return the weights that are left for a canary with this one."""
        return tuple(w for w in self.weights if w >= weight)


def parse_steps(found: Any) -> Steps | None:
    """Return the steps that a record has; None if they are none, or not valid."""
    try:
        weights = tuple(float(weight) for weight in found["weights"])
        seconds, latency = int(found["bake"]), found.get("latency_ms")
        steps = Steps(weights, seconds, None if latency is None else int(latency))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return None
    in_range = all(0 <= weight <= 100 for weight in weights) and seconds > 0
    grows = all(a < b for a, b in itertools.pairwise(weights))
    return steps if weights and in_range and grows else None


def moves_of(options: RollbackOptions | DeployOptions) -> Moves | None:
    if options.move_after is None:
        return None
    return Moves(options.move_after, options.move_idle)


def require_moves(stack: Stack, state: dict[str, Any], moves: Moves | None) -> None:
    """Raise Failure for a router whose version does not move tabs over as asked."""
    if moves is None:
        return
    known = state.get("moves")
    if not known or (moves.idle and not (isinstance(known, list) and "idle" in known)):
        tabs = "no idle tabs" if known else "no tabs"
        flags = "--move-idle" if known else "--move, --move-after and --move-idle"
        raise Failure(
            f"{stack.names.router} is of an earlier version, which moves {tabs} over: run"
            f" `pulse-railway ensure`, or leave {flags} out"
        )


def require_steps(stack: Stack, state: dict[str, Any]) -> None:
    """Raise Failure for a router whose version does not keep a canary's steps."""
    if not state.get("steps"):
        raise Failure(
            f"{stack.names.router} is of an earlier version, without steps: run `pulse-railway"
            " ensure`, or give --canary one percentage"
        )


def roll_out(
    api: Api,
    stack: Stack,
    deployment_id: str,
    service_name: str,
    old: str,
    steps: Steps,
    output: Output,
    *,
    weights: tuple[float, ...],
    began: Callable[[], None] = lambda: None,
    renew: str | None = None,
    why: str | None = None,
    moves: Moves | None = None,
) -> tuple[dict[str, Any], Promotion | None]:
    """Give a deployment each of `weights`, with a bake, and promote it.

    Returns the last bake's result, and the promotion; no promotion where another one has ended the
    bake. Raises RolledBack if the deployment does worse than `old`, and Failure at a step that
    cannot be judged, at which it stays.

    Args:
        old: the deployment that is active.
        began: called after each weight was given.
        renew: HOLDER@SECONDS, as for `send_promote`.
        moves: of the promotion, as for `send_promote`.
    """
    slow = steps.latency_ms is not None
    baking: dict[str, Any] = {}
    for weight in weights:
        with output.step(f"give it {weight:g} % of new visitors"):
            router_commands.send_promote(
                api,
                stack,
                deployment_id,
                service_name,
                weight=weight,
                bake=steps.bake,
                bake_latency_ms=steps.latency_ms,
                steps=steps.stored(),
                instead_of=old,
                why=why,
                renew=renew,
                warn=output.warn,
            )
            began()
        baking = bake(api, stack, deployment_id, old, steps.bake, output, True, slow)
        if is_over(baking):
            return baking, None
        if baking["verdict"] != "well":
            raise Failure(
                f"{deployment_id} stays at {weight:g} % of the new visitors: {baking['verdict']}."
                " `pulse-railway promote --continue` watches this step again and goes on,"
                f" `pulse-railway promote --deployment-id {deployment_id}` promotes it now"
            )
    with output.step("promote it"):
        promotion = router_commands.send_promote(
            api,
            stack,
            deployment_id,
            service_name,
            instead_of=old,
            moves=moves,
            why=why,
            warn=output.warn,
        )
        store_last_promoted(api, stack, deployment_id, promotion, output)
    with output.step("reach it without affinity"):
        wait_until_active(api, stack, deployment_id, output)
    return baking, promotion


def take_up(
    api: Api,
    stack: Stack,
    deployment_id: str | None,
    why: str | None,
    output: Output,
    moves: Moves | None = None,
) -> dict[str, Any]:
    """Take up the steps of the present canary, and return the result of `promote`.

    Raises Failure if there is none, it has no steps, or it is not `deployment_id`.
    """
    with output.step("ask the router which step it is at"):
        state = router_commands.read_state(api, stack)
    require_moves(stack, state, moves)
    canary, old = state["canary"], state["active"]
    if not canary or not old:
        raise Failure("there is no canary whose steps could go on: `pulse-railway status` shows it")
    name, weight = str(canary["deployment_id"]), float(canary["weight"])
    if deployment_id not in (None, name):
        raise Failure(f"the canary is {name}, not {deployment_id}")
    record: dict[str, Any] = next(
        (r for r in state["deployments"] if r["deployment_id"] == name), {}
    )
    steps = parse_steps(record.get("steps"))
    if steps is None:
        raise Failure(
            f"{name} is a canary without steps: `pulse-railway promote --deployment-id {name}`"
            " promotes it"
        )
    left = steps.from_weight(weight)
    output.info(f"{name} is at {weight:g} %; {', '.join(f'{w:g} %' for w in left)} and all follow")
    service_name = find_backend(stack, name).name
    baking, promotion = roll_out(
        api,
        stack,
        name,
        service_name,
        old,
        steps,
        output,
        weights=left,
        why=why,
        moves=moves,
    )
    active = not is_over(baking)
    return {
        "deployment_id": name,
        "active": active,
        "weight": None if active else weight,
        "address": stack.address,
        "drains": promotion.drains if promotion else None,
        "bake": baking or None,
    }
