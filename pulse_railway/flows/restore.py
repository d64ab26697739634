"""`restore`: rebuild the routing state where Redis has lost it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pulse_railway import router_commands
from pulse_railway.errors import Failure
from pulse_railway.flows.routed import backend_address, remember_active, wait_until_routed
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.stack import Stack, find_backend, joined


def restore(api: Api, stack: Stack, wanted: str | None, output: Output) -> dict[str, Any]:
    """Bring back what was active: what is asked for, else what a router still knows, else what
    was noted on Railway at the last promotion. Never the newest, which may be the version that
    was rolled back from.

    Raises Failure where nobody knows, or nothing is lost.
    """
    with output.step("ask the router what it knows"):
        state = router_commands.state(api, stack)
        if state["active"]:
            raise Failure(f"{state['active']} is active: there is nothing to restore")
    if not stack.backends:
        raise Failure("there are no deployments to restore: run `pulse-railway deploy`")
    chosen = wanted or known_active(stack, state)
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
        router_commands.restore(api, stack, chosen, records)
        remember_active(api, stack, chosen, output)
    with output.step("reach the active deployment"):
        wait_until_routed(stack, chosen, by_affinity=False)
    return {"active": chosen, "restored": [r["deployment_id"] for r in records]}


def known_active(stack: Stack, state: dict[str, Any]) -> str:
    for router in sorted(state["routers"], key=lambda r: -float(r.get("uptime_seconds") or 0)):
        if router.get("active"):
            return str(router["active"])
    if stack.intent:
        return stack.intent
    there = joined(str(s.deployment_id) for s in stack.backends)
    raise Failure(
        f"nobody knows which deployment was active: pass --deployment-id with one of {there}"
    )
