"""`redeploy`: build and start a deployment's service again."""

from __future__ import annotations

from typing import Any

from pulse_railway.errors import Failure
from pulse_railway.flows.preview import is_preview
from pulse_railway.flows.reachability import wait_until_reachable
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import read_active
from pulse_railway.services import deploy_service, write_variables
from pulse_railway.stack import Stack, find_backend, joined, mended_references, unset_references
from pulse_railway.waiting import latest, wait_for_build, was_superseded


def redeploy(api: Api, stack: Stack, deployment_id: str | None, output: Output) -> dict[str, Any]:
    """Build and start a deployment's service again, by default the active one's."""
    if deployment_id is None:
        with output.step("ask the router which deployment is active"):
            deployment_id = read_active(api, stack)
        if deployment_id is None:
            raise Failure("no deployment is active: run `pulse-railway deploy`")
    service = find_backend(stack, deployment_id)
    if values := mended_references(stack, service):
        write_variables(api, stack.target, service.id, values)
        service.variables |= values
    if unset := unset_references(stack, service):
        raise Failure(
            f"{deployment_id} refers to {joined(unset)}, which is not set, and would start without"
            " it: set it there (empty, if the app does not need it), or deploy a new version"
        )
    with output.step(f"redeploy {service.name}"):
        railway_deployment = wait_for_newest(
            api, stack, service.id, deploy_service(api, stack.target, service.id), output
        )
    with output.step("reach it through the router"):
        closed = is_preview(service)
        wait_until_reachable(api, stack, deployment_id, output, by_affinity=True, preview=closed)
    return {
        "deployment_id": deployment_id,
        "backend_service_id": service.id,
        "backend_service_name": service.name,
        "backend_deployment_id": railway_deployment,
        "backend_status": "SUCCESS",
    }


def wait_for_newest(
    api: Api, stack: Stack, service_id: str, deployment: str, output: Output
) -> str:
    """Wait for a service's deployment, or for the one with which another run has replaced it.

    Returns the id of the deployment that runs then. Raises Failure if it does not.
    """
    while True:
        try:
            wait_for_build(api, deployment, output)
            return deployment
        except Failure:
            newest = latest(api, stack.target).get(service_id)
            if not newest or newest["id"] == deployment or not was_superseded(api, deployment):
                raise
            output.info("another run has deployed it since: waiting for that")
            deployment = newest["id"]
