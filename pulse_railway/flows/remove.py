"""`delete` and `remove`: take down a deployment that is not active."""

from __future__ import annotations

from typing import Any

from pulse_railway import contract, naming, router_commands
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import delete_service, left_empty
from pulse_railway.stack import Stack, find_backend, joined


def delete(api: Api, stack: Stack, deployment_id: str, output: Output) -> dict[str, Any]:
    """Remove a deployment that is not active: the router retires it, then its service is deleted
    and its record forgotten.

    A service that Railway does not let this token delete is left empty. Cut off anywhere, it can be
    run again; the janitor finishes it too. Raises Failure, and has
    deleted nothing, where the router has not said in an answer that counts that it is retired.
    """
    services = [*stack.backends, *stack.empty]
    service = next((s for s in services if s.deployment_id == deployment_id), None)
    service = service or stack.unowned_backend(deployment_id)
    with output.step(f"claim {deployment_id}"):
        if service is None and not any(
            r["deployment_id"] == deployment_id
            for r in router_commands.read_state(api, stack)["deployments"]
        ):
            find_backend(stack, deployment_id)  # says which there are
        router_commands.send_retire(api, stack, deployment_id, service.id if service else None)
    if service:
        with output.step(f"delete the service {service.name}"):
            if not delete_service(api, stack.target, service.id):
                output.warn(left_empty(service.name, deployment_id))
    with output.step("forget it"):
        router_commands.send_forget(api, stack, deployment_id)
    return {"deployment_id": deployment_id, "deleted": True}


def by_name(stack: Stack, name: str) -> str:
    """The one deployment id that `name` means: itself, or the id generated from that name, which is
    kept whole with its service; where it is not (0.3.x), the id has to be of the form that such a
    name gives."""
    ids = [str(s.deployment_id) for s in stack.backends]
    wanted = name.strip()
    if wanted.lower() in ids:
        return wanted.lower()
    matches = []
    for service in stack.backends:
        known = service.variables.get(contract.NAME)
        made = str(service.deployment_id)
        if known.lower() == wanted.lower() if known else naming.is_made_from(made, wanted):
            matches.append(made)
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise Failure(f"no deployment is named {name}; there are: {joined(ids) or 'none'}")
    raise Failure(
        f"several deployments are named {name}: {joined(matches)}. Pass one of them to"
        " `pulse-railway delete --deployment-id`"
    )
