"""Is a deployment reached through the router's public address?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from pulse_railway import contract
from pulse_railway.config import Target
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.output import Output
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, trust
from pulse_railway.router_commands import Promotion, read_active, send_probe
from pulse_railway.services import write_variables
from pulse_railway.stack import Stack, read_variables
from pulse_railway.waiting import POLL_SECONDS

ROUTED_TIMEOUT = 180.0  # seconds
PAGE_TIMEOUT = 120.0  # seconds
EDGE_TIMEOUT = 20.0  # seconds of nothing but the edge's own answers
AGREEING = 3  # answers in a row, where connections may fail in part


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


@dataclass
class Looks:
    """What came of asking the public address again and again."""

    last: str = "no answer"
    router_answered: bool = False  # at least once: not only the edge, or nobody
    edge_answered: bool = False
    agreeing: int = 0  # good answers in a row

    def note(self, answer: httpx.Response | None, good: bool, said: str) -> None:
        self.last = said
        self.agreeing = self.agreeing + 1 if good else 0
        if answer is not None:
            if from_router(answer):
                self.router_answered = True
            else:
                self.edge_answered = True


def from_router(answer: httpx.Response) -> bool:
    """Does this answer come from our router? The edge has pages of its own, for what it cannot
    reach and for its own bad days."""
    if contract.SELECTED_HEADER in answer.headers or contract.STALE_HEADER in answer.headers:
        return True
    try:
        return "detail" in answer.json()
    except (ValueError, TypeError):
        return False


def wait_until_routed(
    api: Api,
    stack: Stack,
    deployment_id: str,
    output: Output,
    *,
    by_affinity: bool,
    timeout: float = ROUTED_TIMEOUT,
) -> None:
    """Ask `/_pulse/meta` through the public address until this deployment has answered AGREEING
    times in a row, each time on a connection of its own.

    Where Railway's edge answers in place of the router, or nobody does, the deployment is asked
    from inside instead, and the user is told. Raises Failure where that does not help either.
    """
    url = httpx.URL(stack.address + contract.META_PATH)
    if by_affinity:
        url = url.copy_merge_params({contract.AFFINITY_QUERY: deployment_id})

    def good(answer: httpx.Response) -> tuple[bool, str]:
        try:
            named = answer.json().get("deployment_id") if answer.status_code == 200 else None
        except (ValueError, AttributeError):
            named = None
        said = f"status {answer.status_code}" if named is None else f"deployment {named}"
        return named == deployment_id and contract.SELECTED_HEADER in answer.headers, said

    def inside() -> str | None:
        found = send_probe(api, stack, deployment_id)
        if found.get("at") != "answers":
            return f"{deployment_id} is {found.get('at')} inside, too"
        if behind := found.get("behind"):
            return f"the router {', '.join(behind)} does not serve the routing state yet"
        if not by_affinity and found.get("active") != deployment_id:
            return f"{found.get('active')} is active"
        return None

    what = f"reaching {deployment_id} through the router"
    _wait(stack, url, {}, good, inside, what, timeout, AGREEING, output)


def _wait(
    stack: Stack,
    url: httpx.URL,
    headers: dict[str, str],
    good: Callable[[httpx.Response], tuple[bool, str]],
    inside: Callable[[], str | None],
    what: str,
    timeout: float,
    agreeing: int,
    output: Output,
) -> None:
    """Ask until there were so many good answers in a row.

    Args:
        good: is this answer good, and what is said of it?
        inside: asks from inside the private network; why that is not good, None where it is.
    """
    looks, began, pause = Looks(), time.monotonic(), 0.5
    headers = {**in_maintenance_too(stack), **headers}
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(timeout=30, headers=headers, limits=limits, verify=trust()) as client:
        while True:
            try:
                answer = client.get(url)
                looks.note(answer, *good(answer))
            except httpx.HTTPError as error:
                looks.note(None, False, type(error).__name__)
            if looks.agreeing >= agreeing:
                return
            if looks.agreeing:
                continue
            passed = time.monotonic() - began
            only_edge = looks.edge_answered and not looks.router_answered
            if passed > timeout or (only_edge and (stack.edge_failed or passed > EDGE_TIMEOUT)):
                break
            time.sleep(pause)
            pause = min(pause * 2, POLL_SECONDS)
    seen = f"{what} took longer than {passed:.0f} s; {url.copy_with(query=None)} gave {looks.last}"
    if looks.router_answered:
        raise Failure(seen)
    try:
        wrong = inside()
    except Failure as failure:
        raise Failure(f"{seen}, and from inside it cannot be asked: {failure}") from None
    if wrong:
        raise Failure(f"{seen}; {wrong}")
    stack.edge_failed = looks.edge_answered
    fault = "Railway's edge answers in place of the router" if looks.edge_answered else "no answer"
    output.warn(
        f"{fault} at {stack.address} ({looks.last}): the deployment answers inside, so this goes"
        " on. Users may not reach the app: see Railway's status page, and your network"
    )


def in_maintenance_too(stack: Stack) -> dict[str, str]:
    """The header with which the router lets us through to the app at all times."""
    token = stack.router.variables.get(contract.INTERNAL_TOKEN) if stack.router else None
    return {contract.INTERNAL_TOKEN_HEADER: token} if token and "${{" not in token else {}


def wait_until_rendered(
    api: Api, stack: Stack, deployment_id: str, path: str, output: Output
) -> None:
    """Ask this deployment for a page through the public address, until it is no server error.
    A redirect or a 404 is the app's own answer."""
    url = httpx.URL(stack.address + path).copy_merge_params(
        {contract.AFFINITY_QUERY: deployment_id}
    )

    def good(answer: httpx.Response) -> tuple[bool, str]:
        ours = answer.headers.get(contract.SELECTED_HEADER) == deployment_id
        return ours and answer.status_code < 500, f"status {answer.status_code}"

    def inside() -> str | None:
        status = send_probe(api, stack, deployment_id, path).get("status")
        return None if type(status) is int and status < 500 else f"inside it gave {status}"

    try:
        what, accept = f"the page {path}", {"accept": "text/html"}
        _wait(stack, url, accept, good, inside, what, PAGE_TIMEOUT, 1, output)
    except Failure as failure:
        raise Failure(
            f"{failure}. Python's server answers, React's beside it may not: is the web app built"
            " into the image?"
        ) from None


def wait_until_active(api: Api, stack: Stack, deployment_id: str, output: Output) -> None:
    """Wait until the public address answers from this deployment.

    Raises Failure where another run has promoted another deployment meanwhile.
    """
    try:
        wait_until_routed(api, stack, deployment_id, output, by_affinity=False, timeout=4.0)
    except Failure:
        active = read_active(api, stack)
        if active != deployment_id:
            raise Failure(
                f"{active} was promoted after {deployment_id}, which drains now: another deploy"
                " ran at the same time"
            ) from None
        wait_until_routed(api, stack, deployment_id, output, by_affinity=False)


def remember_active(
    api: Api, stack: Stack, deployment_id: str, promoted: Promotion | None, output: Output
) -> None:
    """Note on the router's service what was promoted last and when, where Redis cannot lose it. A
    later promotion that is noted there stays. The janitor notes it too: a failure is no reason to
    fail."""
    assert stack.router is not None
    try:
        read_variables(api, Stack(stack.target, stack.names, {stack.router.name: stack.router}))
        noted = Promotion("", number_or_zero(stack.router.variables.get(contract.LAST_PROMOTED_AT)))
        if promoted and noted.at > promoted.at:
            return
        value = {
            contract.LAST_PROMOTED: deployment_id,
            contract.LAST_PROMOTED_AT: repr(promoted.at) if promoted else "",
        }
        write_variables(api, stack.target, stack.router.id, value)
    except Failure as failure:
        output.warn(f"{contract.LAST_PROMOTED} could not be written: {failure}; the janitor will")


def number_or_zero(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
