"""`promote` and `rollback`: choose another running deployment."""

from __future__ import annotations

from typing import Any

from pulse_railway import control
from pulse_railway.errors import Failure
from pulse_railway.flows.routed import remember_active, wait_until_active, wait_until_routed
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.stack import Stack, find_backend


def promote(api: Api, stack: Stack, deployment_id: str, output: Output) -> dict[str, Any]:
    """Make a running deployment the active one."""
    service = find_backend(stack, deployment_id)
    with output.step(f"reach {deployment_id} through the router"):
        wait_until_routed(stack.address, deployment_id, by_affinity=True, timeout=20.0)
    with output.step(f"promote {deployment_id}"):
        control.promote(api, stack, deployment_id, service.name)
        remember_active(api, stack, deployment_id, output)
    with output.step("reach it without affinity"):
        wait_until_active(api, stack, deployment_id)
    return {"deployment_id": deployment_id, "active": True, "address": stack.address}


def rollback(api: Api, stack: Stack, output: Output) -> dict[str, Any]:
    """Promote the deployment that was active before, while it still runs."""
    with output.step("ask the router which deployment was active before"):
        state = control.state(api, stack)
    previous = [
        record
        for record in state["deployments"]
        if record.get("state") == "draining"
        and not record.get("retiring_at")
        and stack.backend(record["deployment_id"])
    ]
    if not previous:
        raise Failure("no earlier deployment runs any more: deploy the earlier version again")
    previous.sort(key=lambda r: float(r.get("drain_started_at") or 0), reverse=True)
    return promote(api, stack, previous[0]["deployment_id"], output)
