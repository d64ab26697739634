"""`delete` and `remove`: delete a deployment that is not active; `--evict`: all of them."""

from __future__ import annotations

from typing import Any

from pulse_railway import contract, naming, router_commands
from pulse_railway.errors import Failure, Refused
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import delete_service, empty_service_message
from pulse_railway.stack import Service, Stack, find_backend, joined


def delete(
    api: Api, stack: Stack, deployment_id: str, output: Output, force: bool = False
) -> dict[str, Any]:
    """Delete a deployment that is not active: the router retires it, then its service and its
    record are deleted.

    A service that the token may not delete is left empty. After an interruption the verb can be run
    again, or the janitor finishes. Raises Failure, and has deleted nothing, if the router has not
    confirmed that the deployment is retired, or if new visitors get it in place of the active one
    and `force` is not set.
    """
    service = find(api, stack, deployment_id, output)
    return delete_found(api, stack, deployment_id, service, output, force)


def delete_found(
    api: Api,
    stack: Stack,
    deployment_id: str,
    service: Service | None,
    output: Output,
    force: bool = False,
) -> dict[str, Any]:
    """Do the same with the service that `find` has returned."""
    with output.step(f"retire {deployment_id}"):
        service_id = service.id if service else None
        router_commands.send_retire(api, stack, deployment_id, service_id, force)
    if service:
        delete_retired(api, stack, service, output)
    with output.step("delete its record"):
        router_commands.send_forget(api, stack, deployment_id)
    return {"deployment_id": deployment_id, "deleted": True}


def find(api: Api, stack: Stack, deployment_id: str, output: Output) -> Service | None:
    """Return a deployment's service; None if it has only a record. Raises Failure if there is
    neither."""
    services = [*stack.backends, *stack.empty]
    service = next((s for s in services if s.deployment_id == deployment_id), None)
    service = service or stack.unowned_backend(deployment_id)
    if service is None:
        with output.step(f"ask the router for {deployment_id}"):
            records = router_commands.read_state(api, stack)["deployments"]
        if not any(record["deployment_id"] == deployment_id for record in records):
            find_backend(stack, deployment_id)  # raises, with a list of the deployments
    return service


def delete_retired(api: Api, stack: Stack, service: Service, output: Output) -> None:
    """Delete the service of a deployment that the router has retired."""
    with output.step(f"delete the service {service.name}"):
        if not delete_service(api, stack.target, service.id):
            output.warn(empty_service_message(service.name, str(service.deployment_id)))


def evict(api: Api, stack: Stack, kept: str, output: Output) -> list[str]:
    """Delete all deployments but `kept`, which is active, and return their ids.

    All are retired, and their tabs told to reload, before the first service is deleted. Those that
    are held or rolled back are among them. Previews stay, since their keys close them, and so does
    a deploy in progress. Raises Failure if another deployment is active by now, and, after all
    others are deleted, for one that a router may still route to.
    """
    with output.step("ask the router for the other versions"):
        state = router_commands.read_state(api, stack)
        if state["active"] != kept:
            raise Failure(f"{state['active']} is active by now, not {kept}: nothing was evicted")
    names = [
        str(record["deployment_id"])
        for record in state["deployments"]
        if record["deployment_id"] != kept and not record.get("preview")
        if record.get("state") != "pending" or record.get("held") or record.get("retiring_at")
    ]
    services = {str(s.deployment_id): s for s in [*stack.backends, *stack.empty]}
    retired, refusals = [], []
    for name in names:
        with output.step(f"retire {name}"):
            try:
                service_id = services[name].id if name in services else None
                router_commands.send_retire(api, stack, name, service_id, force=True)
                retired.append(name)
            except Refused as refused:
                refusals.append(str(refused))
    for name in retired:
        if name in services:
            delete_retired(api, stack, services[name], output)
        with output.step(f"delete the record of {name}"):
            router_commands.send_forget(api, stack, name, f"{kept} evicts it")
    if refusals:
        raise Failure("; ".join(refusals))
    return retired


def find_by_name(stack: Stack, name: str) -> str:
    """Return the id of the one deployment with this name: the id itself, or `--deployment-name`.

    A service's variable has the whole name, which an id may shorten. 0.3.x sets none: then the id
    has to have the form that is generated from the name. Raises Failure for no match, or several.
    """
    ids = [str(s.deployment_id) for s in stack.backends]
    stripped = name.strip()
    if stripped.lower() in ids:
        return stripped.lower()
    matches = []
    for service in stack.backends:
        own_name = service.variables.get(contract.NAME)
        own_id = str(service.deployment_id)
        if own_name:
            matching = own_name.lower() == stripped.lower()
        else:
            matching = naming.is_made_from(own_id, stripped)
        if matching:
            matches.append(own_id)
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise Failure(f"no deployment is named {name}; there are: {joined(ids) or 'none'}")
    raise Failure(
        f"several deployments are named {name}: {joined(matches)}. Pass one of them to"
        " `pulse-railway delete --deployment-id`"
    )
