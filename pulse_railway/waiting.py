"""Waits for deployments on Railway, of several services with one polling query."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pulse_railway.config import Target
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, ApiError

# Railway limits the calls in an hour: a poll is one, and polls get rarer as a build goes on
FIRST_POLLS = 2.0  # seconds to which the pause between two polls doubles
SLOWDOWN = 1.3  # by which each pause is longer from then on
MAX_POLL_PAUSE = 15.0  # seconds
SCARCE_POLL_PAUSE = 60.0  # seconds, if few calls are left
BUILD_TIMEOUT = 1800.0  # seconds
RAILWAY_STATUS = "https://status.railway.com says whether builds are paused"
NOT_BEGUN = ("INITIALIZING", "QUEUED", "WAITING")
WORD_EVERY = 60.0  # seconds in one state after which a word says so
SUPERSEDED = ("REMOVED", "SKIPPED")
FAILED_STATES = ("FAILED", "CRASHED", "REMOVED", "SKIPPED")


class TookTooLong(Failure):
    """What `poll` waited for has not come."""


def poll(
    timeout: float, ask: Callable[[], Any], label: str, is_scarce: Callable[[], bool] = bool
) -> Any:
    """Call `ask`, ever more rarely, until it returns something other than None, and return that.

    Args:
        timeout: seconds.
        label: what is waited for, for the message.
        is_scarce: are there few calls left? Then `ask` is called once a minute.

    Raises TookTooLong, with the label, after the timeout.
    """
    deadline = time.monotonic() + timeout
    pause = 0.5
    while True:
        answer = ask()
        if answer is not None:
            return answer
        left = deadline - time.monotonic()
        if left < 0:
            raise TookTooLong(f"{label} took longer than {timeout:.0f} s")
        time.sleep(min(SCARCE_POLL_PAUSE if is_scarce() else pause, left + 0.5))
        pause = min(pause * (2 if pause < FIRST_POLLS else SLOWDOWN), MAX_POLL_PAUSE)


def latest(api: Api, target: Target, patience: float | None = None) -> dict[str, dict[str, str]]:
    """Return the latest deployment of every service that has one, by service id.

    Args:
        patience: seconds for which an outage of Railway is waited out.
    """
    data = api.call(
        documents.LATEST,
        patience=patience,
        project=target.project_id,
        environment=target.environment_id,
    )
    return {
        node["serviceId"]: node["latestDeployment"]
        for edge in data["environment"]["serviceInstances"]["edges"]
        if (node := edge["node"])["latestDeployment"]
    }


def wait_for_services(
    api: Api,
    target: Target,
    services: dict[str, str],
    deployments: dict[str, str | None],
    output: Output,
    timeout: float = BUILD_TIMEOUT,
) -> None:
    """Wait until the deployments of several services have succeeded, with one polling query.

    Args:
        services: names by service id.
        deployments: deployments to wait for by service id; None: the latest.
        timeout: seconds.

    Raises Failure, with the service's name and the end of its build log, if a deployment fails.
    """
    shown: dict[str, str] = {}
    deadline = time.monotonic() + timeout
    following = dict(deployments)
    behind = dict.fromkeys(services, 0)  # polls with another deployment as the latest

    def ask() -> bool | None:
        newest = latest(api, target, patience=deadline - time.monotonic())
        waiting = []
        for service_id, name in services.items():
            deployment = newest.get(service_id)
            status = deployment["status"] if deployment else "INITIALIZING"
            expected = following.get(service_id)
            if expected and deployment and deployment["id"] != expected:
                status = "QUEUED"  # an older deployment is still the latest
                behind[service_id] += 1
                if behind[service_id] % 5 == 0 and was_superseded(api, expected):
                    output.info(f"another run has deployed {name} since: waiting for that")
                    following[service_id] = None
            if deployment and status in FAILED_STATES:
                tail = build_tail(api, deployment["id"])
                raise Failure(f"the deployment of {name} ended as {status}\n{tail}".rstrip())
            if status != "SUCCESS":
                waiting.append(f"{name} {status.lower()}")
        line = ", ".join(waiting)
        if waiting and shown.get("line") != line:
            shown["line"] = line
            output.waiting(line)
        return None if waiting else True

    label = f"the deployment of {', '.join(services.values())}"
    poll(timeout, ask, label, lambda: api.is_nearly_used_up)


def was_superseded(api: Api, deployment_id: str) -> bool:
    """Return whether a newer deployment of the same service has replaced one that was starting."""
    data = api.call(documents.BUILD_LOGS, deployment=deployment_id, since=None, limit=1)
    return data["deployment"]["status"] in SUPERSEDED


def wait_for_build(api: Api, deployment_id: str, output: Output) -> None:
    """Wait for one deployment, at most BUILD_TIMEOUT, and show its build log meanwhile.

    An outage of Railway's API does not end the build, so it is waited out. The log is left out if
    few API calls are left, or if Railway does not give it.

    Raises Failure with the end of the log if the deployment fails.
    """
    deadline = time.monotonic() + BUILD_TIMEOUT
    with_log = True
    log: list[str] = []
    since: str | None = None
    seen: set[tuple[str, str]] = set()
    last, changed, word = "", 0.0, WORD_EVERY

    def ask() -> bool | None:
        nonlocal since, last, changed, word, with_log
        if with_log and api.is_nearly_used_up:
            with_log = False
            output.info(
                f"{api.remaining} of the {api.limit} API calls are left that Railway allows an"
                " hour: the build is looked at once a minute, without its log"
            )
        patience = deadline - time.monotonic()
        try:
            if with_log:
                data = api.call(
                    documents.DEPLOYMENT, patience=patience, deployment=deployment_id, since=since
                )
            else:
                data = api.call(documents.STATUS, patience=patience, deployment=deployment_id)
        except ApiError as error:
            if not with_log:
                raise
            with_log = False  # the log alone may be what Railway does not give
            output.info(f"the build log cannot be read: {error}")
            return None
        for line in data.get("buildLogs", ()):
            if (key := (line["timestamp"], line["message"])) not in seen:
                seen.add(key)
                since = line["timestamp"]
                log.append(line["message"])
                output.log(line["message"])
        status = data["deployment"]["status"]
        if status == "SUCCESS":
            return True
        if status in FAILED_STATES:
            tail = "\n".join(f"    {line}" for line in log[-20:])
            if not with_log:
                tail = build_tail(api, deployment_id)
            output_tail = runtime_tail(api, deployment_id)
            raise Failure(
                f"the build or start ended as {status}; its log ended with\n{tail}{output_tail}"
            )
        if status == "NEEDS_APPROVAL":
            raise Failure("the deployment waits for an approval on Railway: approve it there")
        now = time.monotonic()
        if status != last:
            last, changed, word = status, now, WORD_EVERY
            output.waiting(status.lower())
        elif now - changed >= word:
            word += WORD_EVERY
            why = f": Railway has not begun it; {RAILWAY_STATUS}" if status in NOT_BEGUN else ""
            output.waiting(f"{status.lower()} for {(now - changed) / 60:.0f} min{why}")
        return None

    try:
        poll(BUILD_TIMEOUT, ask, "the build", lambda: api.is_nearly_used_up)
    except TookTooLong:
        if last not in NOT_BEGUN:
            raise
        raise Failure(
            f"Railway has not begun the build in {BUILD_TIMEOUT / 60:.0f} minutes ({last.lower()}):"
            f" {RAILWAY_STATUS}, and deploy again when it builds"
        ) from None


def runtime_tail(api: Api, deployment_id: str) -> str:
    """Return the end of a deployment's runtime log, such as a traceback; "" if it is empty."""
    try:
        data = api.call(documents.RUNTIME_LOGS, deployment=deployment_id, since=None, limit=20)
    except Failure as failure:
        return f"\nits runtime log could not be read: {failure}"
    lines = [f"    {line['message']}" for line in data["deploymentLogs"]]
    return "\n".join(["\nits runtime log ended with", *lines]) if lines else ""


def build_tail(api: Api, deployment_id: str) -> str:
    """Return the end of a deployment's build log, or why it cannot be read."""
    try:
        data = api.call(documents.DEPLOYMENT, deployment=deployment_id, since=None)
    except Failure as failure:
        return f"    its build log could not be read: {failure}"
    return "\n".join(f"    {line['message']}" for line in data["buildLogs"][-20:])
