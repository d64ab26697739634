"""Creates, changes, deploys and deletes services."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pulse_railway import contract
from pulse_railway.config import Target
from pulse_railway.errors import Failure
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.stack import SECRET_NAMES, Service, ownership

# Railway's regions in November 2026; its list is asked for only if a service is in another one
REGIONS = {"us-west2", "us-east4-eqdc4a", "europe-west4-drams3a", "asia-southeast1-eqsg3a"}


@dataclass
class Change:
    """The changes to make to one service."""

    service: Service
    variables: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    group_id: str | None = None
    disconnect: bool = False
    domain: bool = False
    deploy: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.variables
            or self.settings
            or self.group_id
            or self.disconnect
            or self.domain
            or self.deploy
        )

    def lines(self) -> list[str]:
        """Return a line for each change, without the values of secrets."""
        name = self.service.name
        lines = []
        for key, value in sorted(self.variables.items()):
            before = self.service.variables.get(key)
            if value == contract.NO_TOKEN:
                lines.append(f"{name}: {key} (secret) -> {value}")
            elif key in SECRET_NAMES:
                lines.append(f"{name}: set {key} (secret)")
            else:
                shown = textwrap.shorten(before or "unset", 200)
                lines.append(f"{name}: {key} {shown} -> {value or 'empty'}")
        for key, value in sorted(self.settings.items()):
            before = self.service.image if key == "source" else self.service.settings.get(key)
            shown = value.get("image") if key == "source" else value
            lines.append(f"{name}: {key} {'unset' if before is None else before} -> {shown}")
        if self.disconnect:
            lines.append(
                f"{name}: image {self.service.image} -> built from pulse-railway's sources"
            )
        if self.group_id:
            lines.append(f"{name}: move into the router's group")
        if self.domain:
            lines.append(f"{name}: create a public address")
        if self.deploy:
            lines.append(f"{name}: deploy")
        return lines


def create_service(
    api: Api,
    target: Target,
    name: str,
    variables: dict[str, str],
    *,
    group_id: str | None,
    settings: dict[str, Any] | None = None,
    image: str | None = None,
    created: Callable[[str], None] = lambda _: None,
) -> str:
    """Create a service with its variables, settings and group, by two calls.

    Returns its id; `created` is called with it after the first call. Raises Uncertain if Railway's
    answer was lost.
    """
    answer = api.call(
        documents.SERVICE_CREATE,
        input={
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "name": name,
            "variables": variables,
        },
    )
    service_id = str(answer["serviceCreate"]["id"])
    created(service_id)
    configure_service(api, target, service_id, settings or {}, group_id, image)
    return service_id


def configure_service(
    api: Api,
    target: Target,
    service_id: str,
    settings: dict[str, Any],
    group_id: str | None,
    image: str | None = None,
) -> None:
    service = Service(service_id, "", "", "", None, {}, [], None, None)
    if image:
        settings = {**settings, "source": {"image": image}}
    write(api, target, [Change(service, settings=settings, group_id=group_id)])


def write(api: Api, target: Target, changes: list[Change]) -> None:
    """Write all changes but deployments, in one document. Repeating it is harmless."""
    values: dict[str, Any] = {"environment": target.environment_id}
    counts = {"variables": 0, "settings": 0, "disconnect": 0}
    groups: dict[str, Any] = {}
    for change in changes:
        variables = {k: v for k, v in change.variables.items() if k != contract.RUNTIME_VERSION}
        if change.disconnect:
            values[f"d{counts['disconnect']}"] = change.service.id
            counts["disconnect"] += 1
        if variables:
            values[f"v{counts['variables']}"] = variable_input(target, change.service.id, variables)
            counts["variables"] += 1
        if change.settings:
            values[f"s{counts['settings']}"] = change.service.id
            values[f"i{counts['settings']}"] = in_regions(change.service, change.settings)
            counts["settings"] += 1
        if change.group_id:
            groups[change.service.id] = {"groupId": change.group_id}
    if groups:
        values["patch"] = {"services": groups}
    if not counts["settings"] and not groups:
        del values["environment"]
    if any(counts.values()) or groups:
        document = documents.configure(patch=bool(groups), **counts)
        api.call(document, repeatable=True, **values)


def in_regions(service: Service, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the replicas by region.

    `numReplicas` alone would move a service to Railway's default region.
    """
    if "numReplicas" not in settings or not service.regions:
        return settings
    regions: dict[str, Any] = {
        region: {"numReplicas": count} if count else None  # None removes a region, as in the CLI
        for region, count in replicas_by_region(service.regions, settings["numReplicas"]).items()
    }
    others = {name: value for name, value in settings.items() if name != "numReplicas"}
    return {**others, "multiRegionConfig": regions}


def region_of(service: Service) -> str | None:
    """Return the region with most of a service's replicas; None if Railway does not say it."""
    regions = service.regions
    return min(regions, key=lambda region: (-regions[region], region)) if regions else None


def replicas_by_region(regions: dict[str, int], replicas: int) -> dict[str, int]:
    """Return `replicas` replicas in the same regions.

    The region with the most takes the difference; if it has too few for that, it gets all.
    """
    largest = min(regions, key=lambda region: (-regions[region], region))
    rest = replicas - sum(regions.values()) + regions[largest]
    if rest > 0:
        return {**regions, largest: rest}
    return {**dict.fromkeys(regions, 0), largest: replicas}


def variable_input(target: Target, service_id: str, variables: dict[str, str]) -> dict[str, Any]:
    return {
        "projectId": target.project_id,
        "environmentId": target.environment_id,
        "serviceId": service_id,
        "variables": variables,
        "skipDeploys": True,
    }


def write_variables(api: Api, target: Target, service_id: str, variables: dict[str, str]) -> None:
    """Write some of a service's variables, without a new deployment."""
    document = documents.configure(variables=1)
    api.call(document, repeatable=True, v0=variable_input(target, service_id, variables))


def create_domain(api: Api, target: Target, service_id: str) -> str:
    data = api.call(
        documents.DOMAIN_CREATE,
        input={
            "environmentId": target.environment_id,
            "serviceId": service_id,
            "targetPort": contract.DEFAULT_PORT,
        },
    )
    return str(data["serviceDomainCreate"]["domain"])


def deploy_service(api: Api, target: Target, service_id: str) -> str:
    """Deploy a service's source; return the deployment's id. A second deployment replaces it."""
    data = api.call(
        documents.SERVICE_DEPLOY,
        service=service_id,
        environment=target.environment_id,
        repeatable=True,
    )
    return str(data["serviceInstanceDeployV2"])


def delete_service(api: Api, target: Target, service_id: str) -> bool:
    """Delete a service in this environment alone (ownership.Deletion).

    A service that does not exist counts as deleted. Returns False if Railway does not let this
    token delete it: its deployments are stopped then. Raises Failure if Railway does not confirm
    it.
    """
    deletion = ownership.Deletion(
        partial(api.call, repeatable=True),
        GraphqlError,
        target.project_id,
        target.environment_id,
        lambda: api.is_project_token,
    )
    try:
        return bool(deletion.delete(service_id))
    except ownership.NotUnderstood as error:
        raise Failure(str(error)) from None


def empty_service_message(name: str, deployment_id: str | None) -> str:
    """Return the message about a service that could not be deleted, and how to delete it."""
    run = "delete it on Railway"
    if deployment_id:
        run = (
            "with an account token (RAILWAY_API_TOKEN) `pulse-railway delete --deployment-id"
            f" {deployment_id}` deletes it"
        )
    return f"{name} is empty, and Railway did not let it be deleted: {run}"


def shell(command: str) -> str:
    """Return a start command in a shell: with a Dockerfile Railway runs it without one."""
    if command.startswith(("sh -c ", "/bin/sh -c ")):
        return command
    return f"sh -c {shlex.quote(command)}"
