"""The queries: QUERIES has one resolver for each top-level field."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from pulse_railway.local import state as model
from pulse_railway.local.api.access import (
    Caller,
    accessible,
    need_deployment,
    need_environment,
    need_instance,
    need_project,
    need_service,
    refuse,
    ssh_key_owner,
    visible,
)
from pulse_railway.local.api.patch import REGIONS
from pulse_railway.local.api.views import (
    connection,
    deployment_view,
    environment_view,
    environments_view,
    gateways_view,
    instance_view,
    project_view,
    service_view,
    ssh_key_view,
    staged_view,
    token_view,
    workspace_view,
)

MAX_LOG_LINES = 5000  # of an answer
Resolver = Callable[..., Any]
QUERIES: dict[str, Resolver] = {}


def query(function: Resolver) -> Resolver:
    QUERIES[function.__name__] = function
    return function


@query
def projectToken(caller: Caller) -> Any:
    token = caller.token
    if token is None or token.kind != "project":
        raise refuse("Project Token not found")
    return token_view(caller, token)


@query
def me(caller: Caller) -> Any:
    if caller.token is None or caller.token.kind not in ("account", "oauth"):
        raise refuse()
    own = [w for w in caller.state.workspaces if not w.external]
    return {
        "id": "local-user",
        "name": "Local User",
        "email": "local@localhost",
        "username": "local",
        "workspaces": [workspace_view(caller, w.id) for w in own],
    }


@query
def apiToken(caller: Caller) -> Any:
    if caller.token is None or caller.token.kind not in ("account", "workspace"):
        raise refuse()
    ids = [caller.token.workspace_id] if caller.token.workspace_id else None
    workspaces = [w for w in caller.state.workspaces if ids is None or w.id in ids]
    return {"workspaces": [{"id": w.id, "name": w.name} for w in workspaces]}


@query
def sshPublicKeys(caller: Caller, workspaceId: str | None = None, **_: Any) -> Any:
    """Return a workspace's keys to its token, the account's to others; refuse a project token."""
    owner = ssh_key_owner(caller, workspaceId)
    return connection([ssh_key_view(k) for k in caller.state.ssh_keys if k.workspace_id == owner])


@query
def twoFactorInfo(caller: Caller) -> Any:
    if caller.token is None or caller.token.kind not in ("account", "oauth"):
        raise refuse()
    return {"isVerified": False, "hasRecoveryCodes": False}


@query
def regions(caller: Caller, projectId: str | None = None) -> Any:
    return [
        {
            "name": name,
            "region": name,
            "location": location,
            "country": country,
            "deploymentConstraints": None,
        }
        for name, (location, country) in REGIONS.items()
    ]


@query
def environmentStagedChanges(caller: Caller, environmentId: str) -> Any:
    return staged_view(need_environment(caller, environmentId)[1])


@query
def workflowStatus(caller: Caller, workflowId: str) -> Any:
    return {"status": caller.state.workflows.get(workflowId, "NotFound"), "error": None}


@query
def externalWorkspaces(caller: Caller, projectId: str | None = None) -> Any:
    if caller.token is None or caller.token.kind not in ("account", "oauth"):
        raise refuse()
    return [workspace_view(caller, w.id) for w in caller.state.workspaces if w.external]


@query
def projects(caller: Caller, workspaceId: str | None = None, **_: Any) -> Any:
    if caller.token is None or caller.token.kind == "project":
        raise refuse()
    return connection(
        [
            project_view(caller, p)
            for p in caller.state.projects
            if workspaceId in (None, p.workspace_id) and visible(caller, p)
        ]
    )


@query
def project(caller: Caller, id: str) -> Any:
    return project_view(caller, need_project(caller, id))


@query
def environments(caller: Caller, projectId: str, **arguments: Any) -> Any:
    return environments_view(caller, need_project(caller, projectId), **arguments)


@query
def environment(caller: Caller, id: str, projectId: str | None = None) -> Any:
    return environment_view(caller, *need_environment(caller, id))


@query
def service(caller: Caller, id: str) -> Any:
    return service_view(caller, need_service(caller, id))


@query
def serviceInstance(caller: Caller, serviceId: str, environmentId: str) -> Any:
    instance = need_instance(caller, serviceId, environmentId)
    return instance_view(caller, need_service(caller, serviceId), instance)


@query
def serviceInstanceLimitOverride(caller: Caller, serviceId: str, environmentId: str) -> Any:
    return need_instance(caller, serviceId, environmentId).settings.get("limitOverride")


@query
def egressGateways(caller: Caller, serviceId: str, environmentId: str) -> Any:
    return gateways_view(need_instance(caller, serviceId, environmentId))


@query
def variables(
    caller: Caller,
    projectId: str,
    environmentId: str,
    serviceId: str | None = None,
    unrendered: bool | None = None,
) -> Any:
    _, environment = need_environment(caller, environmentId)
    if serviceId is None:
        return dict(environment.shared)
    service = need_service(caller, serviceId)
    instance = need_instance(caller, serviceId, environmentId)
    if unrendered:
        return {**model.railway_variables(caller.state, service, instance), **instance.variables}
    return model.render_variables(caller.state, service, instance)


@query
def variablesForServiceDeployment(
    caller: Caller, projectId: str, environmentId: str, serviceId: str
) -> Any:
    return variables(caller, projectId, environmentId, serviceId)


@query
def deployment(caller: Caller, id: str) -> Any:
    return deployment_view(caller, need_deployment(caller, id))


@query
def deployments(caller: Caller, input: dict[str, Any], first: int | None = None, **_: Any) -> Any:
    if input.get("environmentId"):
        need_environment(caller, input["environmentId"])
    elif input.get("projectId"):
        need_project(caller, input["projectId"])
    else:
        raise refuse("projectId or environmentId is required")
    statuses = (input.get("status") or {}).get("in")
    matching = [
        d
        for d in reversed(caller.state.deployments)
        if accessible(caller, d.environment_id)
        and input.get("environmentId") in (None, d.environment_id)
        and input.get("projectId") in (None, d.project_id)
        and input.get("serviceId") in (None, d.service_id)
        and (not statuses or d.status in statuses)
    ]
    return connection([deployment_view(caller, d) for d in matching[:first]])


def _logs(kind: str) -> Resolver:
    def resolve(
        caller: Caller,
        deploymentId: str,
        limit: int | None = None,
        startDate: str | None = None,
        filter: str | None = None,
        **_: Any,
    ) -> Any:
        need_deployment(caller, deploymentId)
        count = min(limit or 100, MAX_LOG_LINES)
        lines = caller.supervisor.read_logs(deploymentId, kind, count, startDate, filter)
        return [{**line, "attributes": [], "tags": None} for line in lines]

    return resolve


LOG_TERM = re.compile(r'@(\w+):"?([^\s"]+)"?')


@query
def environmentLogs(
    caller: Caller,
    environmentId: str,
    filter: str | None = None,
    beforeDate: str | None = None,
    afterDate: str | None = None,
    anchorDate: str | None = None,
    beforeLimit: int | None = None,
    afterLimit: int | None = None,
) -> Any:
    """Return an environment's log lines by time: of deployments, or of one build by `@snapshot`.

    A filter has terms (`@service:`, `@deployment:`, `@snapshot:`, `@level:`) and a text.
    """
    need_environment(caller, environmentId)
    terms = dict(LOG_TERM.findall(filter or ""))
    if unknown := sorted(set(terms) - {"service", "deployment", "snapshot", "level"}):
        raise refuse(f"the local Railway does not know @{unknown[0]} in a filter")
    words = [w for w in LOG_TERM.sub("", filter or "").split() if w != "AND"]
    text = " ".join(words).strip('"()') or None
    lines = [
        line
        for d in caller.state.deployments
        if d.environment_id == environmentId
        and terms.get("service") in (None, d.service_id)
        and terms.get("deployment") in (None, d.id)
        and terms.get("snapshot") in (None, d.id)  # see deployment_view
        for kind in (("build",) if "snapshot" in terms else ("deploy",))
        for line in caller.supervisor.read_logs(d.id, kind, MAX_LOG_LINES, None, text)
        if terms.get("level") in (None, line["severity"])
    ]
    lines.sort(key=lambda line: line["timestamp"])

    def within(line: dict[str, Any], start: str | None, end: str | None) -> bool:
        at = datetime.fromisoformat(line["timestamp"])
        return (not start or at > datetime.fromisoformat(start)) and (
            not end or at <= datetime.fromisoformat(end)
        )

    before = [line for line in lines if within(line, beforeDate, anchorDate)]
    after = [line for line in lines if anchorDate and within(line, anchorDate, afterDate)]
    count = min(100 if beforeLimit is None else beforeLimit, MAX_LOG_LINES)
    chosen = before[len(before) - min(count, len(before)) :] + after[: afterLimit or 0]
    return [{**line, "attributes": [], "tags": None} for line in chosen]


QUERIES["buildLogs"] = _logs("build")
QUERIES["deploymentLogs"] = _logs("deploy")


@query
def template(caller: Caller, code: str | None = None, **_: Any) -> Any:
    if code != "pulse-baseline":
        raise refuse("Template not found")
    return {
        "id": "local-pulse-baseline",
        "code": code,
        "name": "Pulse baseline",
        "serializedConfig": model.baseline_template(),
        "status": "PUBLISHED",
        "category": "Other",
        "createdAt": model.now(),
    }


@query
def domains(caller: Caller, projectId: str, environmentId: str, serviceId: str) -> Any:
    return serviceInstance(caller, serviceId, environmentId)["domains"]
