"""Is a deployment reached through the router's public address?"""

from __future__ import annotations

import httpx

from pulse_railway import contract
from pulse_railway.config import Target
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.output import Output
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import active_deployment
from pulse_railway.services import write_variables
from pulse_railway.stack import Stack
from pulse_railway.waiting import poll

ROUTED_TIMEOUT = 180.0  # seconds
PAGE_TIMEOUT = 120.0  # seconds


def backend_address(api: Api, target: Target, service_id: str) -> str:
    """Where a backend is on the private network: its domain and port, as Railway resolves them."""
    rendered = api.call(
        documents.RENDERED,
        project=target.project_id,
        environment=target.environment_id,
        service=service_id,
    )["variablesForServiceDeployment"]
    keep_secret(rendered.get(contract.INTERNAL_TOKEN), rendered.get(contract.SESSION_REDIS_URL))
    domain = rendered.get("RAILWAY_PRIVATE_DOMAIN")
    if not domain:
        raise Failure("the service has no private domain: is private networking off?")
    return f"http://{domain}:{rendered.get(contract.PORT) or contract.DEFAULT_PORT}"


def wait_until_routed(
    stack: Stack, deployment_id: str, *, by_affinity: bool, timeout: float = ROUTED_TIMEOUT
) -> None:
    """Ask `/_pulse/meta` through the public address until this deployment answers."""
    address = stack.address
    query = {contract.AFFINITY_QUERY: deployment_id} if by_affinity else {}
    last = "no answer"

    def ask() -> bool | None:
        nonlocal last
        try:
            answer = client.get(f"{address}{contract.META_PATH}", params=query)
            last = f"status {answer.status_code}"
            named = answer.json().get("deployment_id") if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            last = type(error).__name__
            return None
        if named is not None:
            last = f"deployment {named}"
        return True if named == deployment_id else None

    with httpx.Client(timeout=10, headers=in_maintenance_too(stack)) as client:
        try:
            poll(timeout, ask, "reaching the deployment through the router")
        except Failure as failure:
            raise Failure(f"{failure}; {address}{contract.META_PATH} gave {last}") from None


def in_maintenance_too(stack: Stack) -> dict[str, str]:
    """The header with which the router lets us through to the app at all times."""
    token = stack.router.variables.get(contract.INTERNAL_TOKEN) if stack.router else None
    return {contract.INTERNAL_TOKEN_HEADER: token} if token and "${{" not in token else {}


def wait_until_rendered(stack: Stack, deployment_id: str, path: str) -> None:
    """Ask this deployment for a page through the public address, until it is no server error.
    A redirect or a 404 is the app's own answer."""
    last = "no answer"
    url = httpx.URL(stack.address + path).copy_merge_params(
        {contract.AFFINITY_QUERY: deployment_id}
    )

    def ask() -> bool | None:
        nonlocal last
        try:
            answer = client.get(url, headers={"accept": "text/html"})
        except httpx.HTTPError as error:
            last = type(error).__name__
            return None
        last = f"status {answer.status_code}"
        ours = answer.headers.get(contract.SELECTED_HEADER) == deployment_id
        return True if ours and answer.status_code < 500 else None

    with httpx.Client(timeout=30, headers=in_maintenance_too(stack)) as client:
        try:
            poll(PAGE_TIMEOUT, ask, f"the page {path}")
        except Failure as failure:
            raise Failure(
                f"{failure} to come up; the last answer was {last}. Python's server answers,"
                " React's beside it may not: is the web app built into the image?"
            ) from None


def wait_until_active(api: Api, stack: Stack, deployment_id: str) -> None:
    """Wait until the public address answers from this deployment.

    Raises Failure where another run has promoted another deployment meanwhile.
    """
    try:
        wait_until_routed(stack, deployment_id, by_affinity=False, timeout=4.0)
    except Failure:
        active = active_deployment(api, stack)
        if active != deployment_id:
            raise Failure(
                f"{active} was promoted after {deployment_id}, which drains now: another deploy"
                " ran at the same time"
            ) from None
        wait_until_routed(stack, deployment_id, by_affinity=False)


def remember_active(api: Api, stack: Stack, deployment_id: str, output: Output) -> None:
    """Note on the router's service which deployment is active, where Redis cannot lose it.
    The janitor notes it too: a failure is no reason to fail."""
    assert stack.router is not None
    try:
        value = {contract.INTENT: deployment_id}
        write_variables(api, stack.target, stack.router.id, value)
    except Failure as failure:
        output.warn(f"{contract.INTENT} could not be written: {failure}; the janitor will")
