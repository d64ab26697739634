"""Check that a deployment is reached through the router's public address."""

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

RAILWAY_TIMEOUT = 600.0  # seconds: the deployment runs, so an outage is no reason to remove it
REQUEST_PAUSE = 2.0  # seconds, at most, between two requests to the public address
ROUTED_TIMEOUT = 180.0  # seconds
PAGE_TIMEOUT = 120.0  # seconds
EDGE_TIMEOUT = 20.0  # seconds in which only Railway's edge answers
GOOD_ANSWERS = 3  # in a row, since one connection can succeed where another fails


def backend_address(api: Api, target: Target, service_id: str) -> str:
    """Return a backend's URL in the private network, with the domain and port from Railway."""
    rendered = api.call(
        documents.RENDERED,
        patience=RAILWAY_TIMEOUT,
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
class Attempts:
    """The answers of the public address so far."""

    last: str = "no answer"  # a description
    router_answered: bool = False  # at least once
    edge_answered: bool = False
    good_in_a_row: int = 0

    def add(self, answer: httpx.Response | None, good: bool, description: str) -> None:
        self.last = description
        self.good_in_a_row = self.good_in_a_row + 1 if good else 0
        if answer is not None:
            if from_router(answer):
                self.router_answered = True
            else:
                self.edge_answered = True


def from_router(answer: httpx.Response) -> bool:
    """Return whether an answer is the router's, not an error page of Railway's edge."""
    if contract.SELECTED_HEADER in answer.headers or contract.STALE_HEADER in answer.headers:
        return True
    try:
        return "detail" in answer.json()
    except (ValueError, TypeError):
        return False


def wait_until_reachable(
    api: Api,
    stack: Stack,
    deployment_id: str,
    output: Output,
    *,
    by_affinity: bool,
    preview: bool = False,
    timeout: float = ROUTED_TIMEOUT,
) -> None:
    """Request `/_pulse/meta` from the public address until this deployment answers.

    It has to answer GOOD_ANSWERS times in a row, each time on a new connection. If Railway's edge
    answers in place of the router, or nothing answers, a control command asks the deployment in
    the private network, and the user is warned. Raises Failure if that fails, too.

    Args:
        by_affinity: request this deployment by its id; else the active one has to be this one.
        preview: it is one, which the router opens to the internal token.
        timeout: seconds.
    """
    url = httpx.URL(stack.address + contract.META_PATH)
    if by_affinity:
        url = url.copy_merge_params({contract.AFFINITY_QUERY: deployment_id})

    def good(answer: httpx.Response) -> tuple[bool, str]:
        try:
            answering = answer.json().get("deployment_id") if answer.status_code == 200 else None
        except (ValueError, AttributeError):
            answering = None
        status = f"status {answer.status_code}"
        description = status if answering is None else f"deployment {answering}"
        return (
            answering == deployment_id and contract.SELECTED_HEADER in answer.headers,
            description,
        )

    def inside() -> str | None:
        probe = send_probe(api, stack, deployment_id)
        if probe.get("at") != "answers":
            return f"{deployment_id} is {probe.get('at')} inside, too"
        if behind := probe.get("behind"):
            return f"the router {', '.join(behind)} does not serve the routing state yet"
        if not by_affinity and probe.get("active") != deployment_id:
            return f"{probe.get('active')} is active"
        return None

    label = f"reaching {deployment_id} through the router"
    _wait(stack, url, {}, good, inside, label, timeout, GOOD_ANSWERS, preview, output)


def _wait(
    stack: Stack,
    url: httpx.URL,
    headers: dict[str, str],
    good: Callable[[httpx.Response], tuple[bool, str]],
    inside: Callable[[], str | None],
    label: str,
    timeout: float,
    needed: int,
    preview: bool,
    output: Output,
) -> None:
    """Send requests until `needed` good answers have come in a row. Raises Failure.

    Where the router turns strangers away, the request is repeated with the internal token, at the
    address that Railway has given: anybody may answer at a custom domain. Without such an address
    only `inside` is asked.

    Args:
        good: returns whether an answer is good, and its description.
        inside: asks in the private network; returns what is wrong, or None.
        label: what is waited for, for the message.
        timeout: seconds.
    """
    attempts, began, pause = Attempts(), time.monotonic(), 0.5
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(timeout=30, headers=headers, limits=limits, verify=trust()) as client:
        while True:
            try:
                answer = client.get(url)
                closed = why_closed(client, answer, preview)
                if closed and stack.railway_address is None:
                    problem = inside()
                    if problem is None:
                        output.warn(
                            f"{label} was not checked at {stack.address}, since {closed}, and the"
                            " internal token is sent to no custom domain: it answers inside"
                        )
                        return
                    attempts.router_answered, attempts.last = True, problem
                else:
                    if closed:
                        own = httpx.URL(str(stack.railway_address))
                        own = url.copy_with(scheme=own.scheme, netloc=own.netloc)
                        answer = client.get(own, headers=internal_token(stack))
                    attempts.add(answer, *good(answer))
            except httpx.HTTPError as error:
                attempts.add(None, False, type(error).__name__)
            if attempts.good_in_a_row >= needed:
                return
            if attempts.good_in_a_row:
                continue
            passed = time.monotonic() - began
            only_edge = attempts.edge_answered and not attempts.router_answered
            if passed > timeout or (only_edge and (stack.edge_failed or passed > EDGE_TIMEOUT)):
                break
            time.sleep(pause)
            pause = min(pause * 2, REQUEST_PAUSE)
    message = (
        f"{label} took longer than {passed:.0f} s; {url.copy_with(query=None)} gave {attempts.last}"
    )
    if attempts.router_answered:
        raise Failure(message)
    try:
        problem = inside()
    except Failure as failure:
        raise Failure(f"{message}, and from inside it cannot be asked: {failure}") from None
    if problem:
        raise Failure(f"{message}; {problem}")
    stack.edge_failed = by_edge = attempts.edge_answered
    fault = "Railway's edge answers in place of the router" if by_edge else "no answer"
    output.warn(
        f"{fault} at {stack.address} ({attempts.last}): the deployment answers inside, so this goes"
        " on. Users may not reach the app: see Railway's status page, and your network"
    )


def why_closed(client: httpx.Client, answer: httpx.Response, preview: bool) -> str | None:
    """Return why the router turns a stranger away; None if it does not."""
    if contract.SELECTED_HEADER in answer.headers:
        return None
    if preview and answer.status_code == 409 and contract.STALE_HEADER in answer.headers:
        return "it is a preview"
    if answer.status_code == 503 and "html" in answer.headers.get("content-type", ""):
        answer = client.get(  # without the page for people
            answer.url.copy_with(path=contract.META_PATH, query=None), headers={"accept": "*/*"}
        )
    try:
        closed = answer.status_code == 503 and answer.json().get("detail") == "maintenance"
    except (ValueError, AttributeError):
        closed = False
    return "the site is in maintenance" if closed else None


def internal_token(stack: Stack) -> dict[str, str]:
    """Return the header with which the router lets a request pass during maintenance, and to a
    preview."""
    token = stack.router.variables.get(contract.INTERNAL_TOKEN) if stack.router else None
    return {contract.INTERNAL_TOKEN_HEADER: token} if token and "${{" not in token else {}


def wait_until_rendered(
    api: Api, stack: Stack, deployment_id: str, path: str, output: Output, preview: bool = False
) -> None:
    """Request a page of this deployment from the public address until its status is below 500.

    A redirect or a 404 is the app's answer, so the page is rendered. Raises Failure after
    PAGE_TIMEOUT.
    """
    url = httpx.URL(stack.address + path).copy_merge_params(
        {contract.AFFINITY_QUERY: deployment_id}
    )

    def good(answer: httpx.Response) -> tuple[bool, str]:
        selected = answer.headers.get(contract.SELECTED_HEADER) == deployment_id
        return selected and answer.status_code < 500, f"status {answer.status_code}"

    def inside() -> str | None:
        status = send_probe(api, stack, deployment_id, path).get("status")
        return None if type(status) is int and status < 500 else f"inside it gave {status}"

    try:
        label, accept = f"the page {path}", {"accept": "text/html"}
        _wait(stack, url, accept, good, inside, label, PAGE_TIMEOUT, 1, preview, output)
    except Failure as failure:
        raise Failure(
            f"{failure}. Python's server answers, React's beside it may not: is the web app built"
            " into the image?"
        ) from None


def wait_for_instances(
    api: Api, stack: Stack, deployment_id: str, count: int, output: Output, *, preview: bool
) -> None:
    """Request each process of a deployment from the public address until all have answered.

    Raises Failure if one does not, and at once if the app runs another number of them.
    """
    for number in range(1, count + 1):
        name = f"{deployment_id}.{number}" if number > 1 else deployment_id
        url = httpx.URL(stack.address + contract.META_PATH)

        def good(answer: httpx.Response, number: int = number) -> tuple[bool, str]:
            try:
                found = answer.json() if answer.status_code == 200 else {}
                running = found.get("instances", 1) if found else count
            except (ValueError, AttributeError):
                found, running = {}, count
            if running != count and found.get("deployment_id") == deployment_id:
                raise Failure(
                    f"{deployment_id} runs {running} process instead of {count}: its image needs"
                    " this version of pulse-railway or a later one, and `pulse-railway serve` as"
                    " its start command"
                )
            return found.get("instance") == number, f"status {answer.status_code}"

        def inside() -> None:
            return None  # what the edge hides cannot be asked: the health check has passed

        url = url.copy_merge_params({contract.AFFINITY_QUERY: name})
        label = f"instance {name}"
        _wait(stack, url, {}, good, inside, label, ROUTED_TIMEOUT, 1, preview, output)


def wait_until_active(api: Api, stack: Stack, deployment_id: str, output: Output) -> None:
    """Wait until this deployment answers requests without affinity.

    Raises Failure if another run has promoted another deployment since.
    """
    try:
        wait_until_reachable(api, stack, deployment_id, output, by_affinity=False, timeout=4.0)
    except Failure:
        active = read_active(api, stack)
        if active != deployment_id:
            raise Failure(
                f"{active} was promoted after {deployment_id}, which drains now: another deploy"
                " ran at the same time"
            ) from None
        wait_until_reachable(api, stack, deployment_id, output, by_affinity=False)


def store_last_promoted(
    api: Api, stack: Stack, deployment_id: str, promoted: Promotion | None, output: Output
) -> None:
    """Write the last promotion and its time to the router's variables, which outlive Redis's data.

    A later promotion there is kept. A failure is only a warning, since the janitor writes them too.
    """
    assert stack.router is not None
    try:
        read_variables(api, Stack(stack.target, stack.names, {stack.router.name: stack.router}))
        stored_at = number_or_zero(stack.router.variables.get(contract.LAST_PROMOTED_AT))
        if promoted and stored_at > promoted.at:
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
