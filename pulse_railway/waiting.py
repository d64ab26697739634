"""Waits for deployments on Railway, of several services with one polling query."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pulse_railway.config import Target
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api

POLL_SECONDS = 2.0  # between two polls: Railway limits the rate of calls
BUILD_TIMEOUT = 1800.0  # seconds
SUPERSEDED = ("REMOVED", "SKIPPED")
FAILED_STATES = ("FAILED", "CRASHED", "REMOVED", "SKIPPED")


def poll(timeout: float, ask: Callable[[], Any], label: str) -> Any:
    """Call `ask` every two seconds until it returns something other than None, and return that.

    Raises Failure, with the label, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.5
    while True:
        answer = ask()
        if answer is not None:
            return answer
        if time.monotonic() > deadline:
            raise Failure(f"{label} took longer than {timeout:.0f} s")
        time.sleep(pause)
        pause = min(pause * 2, POLL_SECONDS)


def latest(api: Api, target: Target) -> dict[str, dict[str, str]]:
    """Return the latest deployment of every service that has one, by service id."""
    data = api.call(documents.LATEST, project=target.project_id, environment=target.environment_id)
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
    following = dict(deployments)
    behind = dict.fromkeys(services, 0)  # polls with another deployment as the latest

    def ask() -> bool | None:
        newest = latest(api, target)
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

    poll(timeout, ask, f"the deployment of {', '.join(services.values())}")


def was_superseded(api: Api, deployment_id: str) -> bool:
    """Return whether a newer deployment of the same service has replaced one that was starting."""
    data = api.call(documents.BUILD_LOGS, deployment=deployment_id, since=None, limit=1)
    return data["deployment"]["status"] in SUPERSEDED


def wait_for_build(
    api: Api, deployment_id: str, output: Output, timeout: float = BUILD_TIMEOUT
) -> None:
    """Wait for one deployment, at most `timeout` seconds, and show its build log meanwhile.

    Raises Failure with the end of the log if the deployment fails.
    """
    log: list[str] = []
    since: str | None = None
    seen: set[tuple[str, str]] = set()
    last = ""

    def ask() -> bool | None:
        nonlocal since, last
        data = api.call(documents.DEPLOYMENT, deployment=deployment_id, since=since)
        for line in data["buildLogs"]:
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
            output_tail = runtime_tail(api, deployment_id)
            raise Failure(
                f"the build or start ended as {status}; its log ended with\n{tail}{output_tail}"
            )
        if status == "NEEDS_APPROVAL":
            raise Failure("the deployment waits for an approval on Railway: approve it there")
        if status != last:
            last = status
            output.waiting(status.lower())
        return None

    poll(timeout, ask, "the build")


def runtime_tail(api: Api, deployment_id: str) -> str:
    """Return the end of a deployment's runtime log, such as a traceback; "" if it is empty."""
    try:
        data = api.call(documents.RUNTIME_LOGS, deployment=deployment_id, since=None, limit=20)
    except Failure as failure:
        return f"\nits runtime log could not be read: {failure}"
    lines = [f"    {line['message']}" for line in data["deploymentLogs"]]
    return "\n".join(["\nits runtime log ended with", *lines]) if lines else ""


def build_tail(api: Api, deployment_id: str) -> str:
    data = api.call(documents.DEPLOYMENT, deployment=deployment_id, since=None)
    return "\n".join(f"    {line['message']}" for line in data["buildLogs"][-20:])
