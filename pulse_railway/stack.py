"""What stands on Railway: the services of an environment, read in two documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pulse_railway import contract
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.output import Output
from pulse_railway.railway import cli, documents
from pulse_railway.railway.api import Api

POLL_SECONDS = 2.0  # Railway asks for no more
BUILD_TIMEOUT = 1800.0
FAILED_STATES = ("FAILED", "CRASHED", "REMOVED", "SKIPPED")
SECRET_NAMES = (contract.RAILWAY_TOKEN, contract.REDIS_URL, contract.INTERNAL_TOKEN)


@dataclass
class Service:
    """A service in our environment, as Railway has it."""

    id: str
    instance_id: str
    name: str
    created_at: str
    image: str | None
    settings: dict[str, Any]  # in the words of ServiceInstanceUpdateInput
    domains: list[str]
    group_id: str | None
    status: str | None  # of the latest deployment
    variables: dict[str, str] = field(default_factory=dict)  # references not resolved

    @property
    def deployment_id(self) -> str | None:
        return self.variables.get(contract.DEPLOYMENT_ID)

    @property
    def age(self) -> float:
        return datetime.now(UTC).timestamp() - datetime.fromisoformat(self.created_at).timestamp()


@dataclass
class Stack:
    """Every service of an environment, and which of them are the baseline."""

    target: Target
    names: Names
    services: dict[str, Service]

    @property
    def router(self) -> Service | None:
        return self.services.get(self.names.router)

    @property
    def env(self) -> Service | None:
        return self.services.get(self.names.env)

    @property
    def redis(self) -> Service | None:
        return self.services.get(self.names.redis)

    @property
    def janitor(self) -> Service | None:
        return self.services.get(self.names.janitor)

    @property
    def baseline(self) -> list[Service]:
        return [s for s in (self.router, self.env, self.redis, self.janitor) if s]

    @property
    def external_redis(self) -> bool:
        """Is the Redis one that is not in the project?"""
        router = self.router
        if self.redis is not None or router is None:
            return False
        url = router.variables.get(contract.REDIS_URL, "")
        return bool(url) and f"{self.names.redis}." not in url

    @property
    def missing(self) -> list[str]:
        names = [self.names.router, self.names.env, self.names.janitor]
        if not self.external_redis:
            names.append(self.names.redis)
        return [name for name in names if name not in self.services]

    @property
    def backends(self) -> list[Service]:
        """Deployments, newest first."""
        found = [s for s in self.services.values() if s.deployment_id]
        return sorted(found, key=lambda s: s.created_at, reverse=True)

    def backend(self, deployment_id: str) -> Service | None:
        return next((s for s in self.backends if s.deployment_id == deployment_id), None)

    @property
    def address(self) -> str:
        """The router's public address. Raises Failure where it has none."""
        if self.router is None or not self.router.domains:
            raise Failure(f"{self.names.router} has no public address: run `pulse-railway ensure`")
        return f"https://{self.router.domains[0]}"


_SETTINGS = (
    "numReplicas",
    "healthcheckPath",
    "healthcheckTimeout",
    "overlapSeconds",
    "drainingSeconds",
    "startCommand",
    "cronSchedule",
    "restartPolicyType",
)


def inspect(api: Api, target: Target, names: Names) -> Stack:
    """Read the environment: services and settings in one document, variables in another."""
    stack = read_services(api, target, names)
    read_variables(api, stack)
    return stack


def read_services(api: Api, target: Target, names: Names) -> Stack:
    """The environment's services with their settings, their variables not yet read."""
    where: dict[str, Any] = {"project": target.project_id, "environment": target.environment_id}
    data = api.call(documents.STACK, **where)["environment"]
    config = data["config"].get("services") or {}
    services = {}
    for edge in data["serviceInstances"]["edges"]:
        node = edge["node"]
        domains = node["domains"]
        latest = node["latestDeployment"]
        services[node["serviceName"]] = Service(
            id=node["serviceId"],
            instance_id=node["id"],
            name=node["serviceName"],
            created_at=node["createdAt"],
            image=(node["source"] or {}).get("image"),
            settings={name: node[name] for name in _SETTINGS},
            domains=[d["domain"] for d in (*domains["customDomains"], *domains["serviceDomains"])],
            group_id=(config.get(node["serviceId"]) or {}).get("groupId"),
            status=latest["status"] if latest else None,
        )
    return Stack(target, names, services)


def read_variables(api: Api, stack: Stack) -> None:
    """Fill in the variables of every service, their references not resolved."""
    listed = list(stack.services.values())
    if not listed:
        return
    ids: dict[str, Any] = {f"s{i}": service.id for i, service in enumerate(listed)}
    values = api.call(
        documents.variables_of(len(listed)),
        project=stack.target.project_id,
        environment=stack.target.environment_id,
        **ids,
    )
    for i, service in enumerate(listed):
        service.variables = values[f"v{i}"]
        given = (service.variables.get(name, "") for name in SECRET_NAMES)
        keep_secret(*(value for value in given if "${{" not in value))


def require_baseline(stack: Stack) -> None:
    """Raises Failure where a deploy could not work; repairs nothing."""
    if not stack.baseline:
        raise Failure("there is no baseline in this environment: run `pulse-railway ensure` first")
    if stack.missing:
        raise Failure(
            f"the baseline is partial: {', '.join(stack.missing)} missing. Delete"
            f" {', '.join(s.name for s in stack.baseline)} on Railway and run"
            " `pulse-railway scaffold`"
        )
    router, janitor = stack.router, stack.janitor
    assert router is not None
    assert janitor is not None
    for service in (router, janitor):
        needed = (contract.RAILWAY_TOKEN, contract.REDIS_URL, contract.INTERNAL_TOKEN)
        absent = [name for name in needed if not service.variables.get(name)]
        if absent:
            raise Failure(f"{service.name} lacks {', '.join(absent)}: run `pulse-railway ensure`")
    if not router.variables.get(contract.RUNTIME_VERSION):
        raise Failure(
            f"{router.name} runs an older pulse-railway: run `pulse-railway ensure`, which takes it"
            " over"
        )
    _ = stack.address


# -- waiting -----------------------------------------------------------------------------------


def poll(timeout: float, ask: Callable[[], Any], what: str) -> Any:
    """Ask every two seconds until there is an answer. Raises Failure when the time is up."""
    deadline = time.monotonic() + timeout
    pause = 0.5
    while True:
        answer = ask()
        if answer is not None:
            return answer
        if time.monotonic() > deadline:
            raise Failure(f"{what} took longer than {timeout:.0f} s")
        time.sleep(pause)
        pause = min(pause * 2, POLL_SECONDS)


def latest(api: Api, target: Target) -> dict[str, dict[str, str]]:
    """The latest deployment of every service that has one, by service id."""
    data = api.call(documents.LATEST, project=target.project_id, environment=target.environment_id)
    return {
        node["serviceId"]: node["latestDeployment"]
        for edge in data["environment"]["serviceInstances"]["edges"]
        if (node := edge["node"])["latestDeployment"]
    }


def wait_for_services(
    api: Api,
    target: Target,
    wanted: dict[str, str],
    known: dict[str, str | None],
    output: Output,
    timeout: float = BUILD_TIMEOUT,
) -> None:
    """Wait until the deployments of several services have succeeded, with one polling query.

    Args:
        wanted: service id to name.
        known: service id to the deployment to wait for; None: whatever is the latest.

    Raises Failure naming the service whose deployment failed, with the end of its build log.
    """
    shown: dict[str, str] = {}

    def ask() -> bool | None:
        now = latest(api, target)
        waiting = []
        for service_id, name in wanted.items():
            deployment = now.get(service_id)
            status = deployment["status"] if deployment else "INITIALIZING"
            expected = known.get(service_id)
            if expected and deployment and deployment["id"] != expected:
                status = "QUEUED"  # an older deployment is still the latest
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

    poll(timeout, ask, f"the deployment of {', '.join(wanted.values())}")


def wait_for_build(
    api: Api, deployment_id: str, output: Output, timeout: float = BUILD_TIMEOUT
) -> None:
    """Wait for one deployment, showing its build log as it comes.

    Raises Failure with the end of the log where it does not succeed.
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
            raise Failure(f"the build or start ended as {status}; its log ended with\n{tail}")
        if status == "NEEDS_APPROVAL":
            raise Failure("the deployment waits for an approval on Railway: approve it there")
        if status != last:
            last = status
            output.waiting(status.lower())
        return None

    poll(timeout, ask, "the build")


def build_tail(api: Api, deployment_id: str) -> str:
    data = api.call(documents.DEPLOYMENT, deployment=deployment_id, since=None)
    return "\n".join(f"    {line['message']}" for line in data["buildLogs"][-20:])


# -- the router's control commands -------------------------------------------------------------


def control(api: Api, stack: Stack, *arguments: str) -> dict[str, Any]:
    """Run a control command inside the router service (see railway.cli.control)."""
    return cli.control(
        api,
        project=stack.target.project_id,
        environment=stack.target.environment_id,
        router=stack.names.router,
        arguments=arguments,
    )


def active_deployment(api: Api, stack: Stack) -> str | None:
    found = control(api, stack, "active").get("deployment_id")
    return str(found) if found else None


def joined(items: Iterable[str]) -> str:
    return ", ".join(sorted(items))
