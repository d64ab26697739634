"""Railway's GraphQL API over the local state: who may see what, and what each field answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphql import (
    GraphQLError,
    GraphQLResolveInfo,
    GraphQLSchema,
    build_schema,
    default_field_resolver,
    graphql,
)

from pulse_railway.local import state as model
from pulse_railway.local.state import Deployment, Environment, Instance, Project, Service, Token
from pulse_railway.local.supervisor import Supervisor, free_port

SCHEMA = Path(__file__).with_name("schema.graphql")

# ServiceInstanceUpdateInput's fields that are kept as they are given
SETTINGS = (
    "buildCommand builder cronSchedule dockerfilePath drainingSeconds healthcheckPath"
    " healthcheckTimeout numReplicas overlapSeconds preDeployCommand railwayConfigFile region"
    " restartPolicyMaxRetries restartPolicyType rootDirectory sleepApplication startCommand"
    " watchPatterns"
).split()


@dataclass
class Caller:
    """Who asks, and of what. `token` is None without credentials."""

    token: Token | None
    supervisor: Supervisor
    open_domain: Callable[[Service, Instance, int | None], Any]

    @property
    def state(self) -> model.State:
        return self.supervisor.state


def refuse(message: str = "Not Authorized") -> GraphQLError:
    return GraphQLError(message)


# -- access ------------------------------------------------------------------------------------


def visible(caller: Caller, project: Project) -> bool:
    token = caller.token
    if token is None:
        return False
    match token.kind:
        case "project":
            return token.project_id == project.id
        case "workspace":
            return token.workspace_id == project.workspace_id
        case _:
            return True


def need_project(caller: Caller, project_id: str) -> Project:
    project = caller.state.project(project_id)
    if project is None or not visible(caller, project):
        raise refuse() if caller.token is None or project else refuse("Project not found")
    return project


def need_environment(caller: Caller, environment_id: str) -> tuple[Project, Environment]:
    found = caller.state.environment(environment_id)
    if found is None:
        raise refuse("Environment not found")
    need_project(caller, found[0].id)
    token = caller.token
    if token and token.kind == "project" and token.environment_id != environment_id:
        raise refuse()
    return found


def need_service(caller: Caller, service_id: str) -> Service:
    service = caller.state.service(service_id)
    if service is None:
        raise refuse("Service not found")
    need_project(caller, service.project_id)
    return service


def need_instance(caller: Caller, service_id: str, environment_id: str) -> Instance:
    need_service(caller, service_id)
    need_environment(caller, environment_id)
    instance = caller.state.instance(service_id, environment_id)
    if instance is None:
        raise refuse("ServiceInstance not found")
    return instance


def need_deployment(caller: Caller, deployment_id: str) -> Deployment:
    deployment = caller.state.deployment(deployment_id)
    if deployment is None:
        raise refuse("Deployment not found")
    need_environment(caller, deployment.environment_id)
    return deployment


# -- answers -----------------------------------------------------------------------------------
# Dicts with a `__typename`; lambdas are asked only when the document asks.


def connection(nodes: list[Any]) -> dict[str, Any]:
    return {
        "edges": [{"node": node, "cursor": str(i)} for i, node in enumerate(nodes)],
        "pageInfo": {
            "hasNextPage": False,
            "hasPreviousPage": False,
            "startCursor": None,
            "endCursor": None,
        },
    }


def project_view(caller: Caller, project: Project) -> dict[str, Any]:
    state = caller.state
    environments = [environment_view(caller, project, e) for e in project.environments]
    return {
        "id": project.id,
        "name": project.name,
        "description": project.description,
        "createdAt": project.created_at,
        "updatedAt": project.created_at,
        "workspaceId": project.workspace_id,
        "workspace": lambda *_: workspace_view(caller, project.workspace_id),
        "primaryEnvironmentId": project.environments[0].id,
        "baseEnvironmentId": project.environments[0].id,
        "environments": lambda *_, **__: connection(environments),
        "services": lambda *_, **__: connection(
            [service_view(caller, s) for s in state.services if s.project_id == project.id]
        ),
    }


def workspace_view(caller: Caller, workspace_id: str) -> dict[str, Any]:
    workspace = next(w for w in caller.state.workspaces if w.id == workspace_id)
    projects = [p for p in caller.state.projects if p.workspace_id == workspace_id]
    views = [project_view(caller, p) for p in projects if visible(caller, p)]
    return {
        "id": workspace.id,
        "name": workspace.name,
        # a connection on Workspace, a list on ExternalWorkspace
        "projects": views if workspace.external else lambda *_, **__: connection(views),
    }


def environment_view(caller: Caller, project: Project, environment: Environment) -> dict[str, Any]:
    state = caller.state
    instances = list(state.instances(environment.id))
    return {
        "id": environment.id,
        "name": environment.name,
        "projectId": project.id,
        "createdAt": environment.created_at,
        "updatedAt": environment.created_at,
        "isEphemeral": False,
        "canAccess": True,
        "config": lambda *_, **__: {
            "services": {
                service.id: {
                    "groupId": instance.group_id,
                    "source": {"image": instance.image} if instance.image else {},
                    "isCreated": True,
                }
                for service, instance in instances
            },
            "groups": environment.groups,
            "sharedVariables": {},
        },
        "serviceInstances": lambda *_, **__: connection(
            [instance_view(caller, s, i) for s, i in instances]
        ),
        "deployments": lambda *_, **__: connection(
            [
                deployment_view(caller, d)
                for d in reversed(state.deployments)
                if d.environment_id == environment.id
            ]
        ),
        "variables": lambda *_, **__: connection(
            [
                {
                    "id": f"{i.id}:{name}",
                    "name": name,
                    "serviceId": s.id,
                    "environmentId": environment.id,
                    "isSealed": False,
                    "references": [m[0] for m in model.REFERENCE.finditer(value)],
                    "createdAt": i.created_at,
                    "updatedAt": i.updated_at,
                }
                for s, i in instances
                for name, value in i.variables.items()
            ]
        ),
    }


def service_view(caller: Caller, service: Service) -> dict[str, Any]:
    return {
        "id": service.id,
        "name": service.name,
        "icon": service.icon,
        "projectId": service.project_id,
        "createdAt": service.created_at,
        "updatedAt": service.created_at,
        "project": lambda *_: project_view(caller, need_project(caller, service.project_id)),
        "serviceInstances": lambda *_, **__: connection(
            [instance_view(caller, service, i) for i in service.instances]
        ),
        "deployments": lambda *_, **__: connection(
            [
                deployment_view(caller, d)
                for d in reversed(caller.state.deployments)
                if d.service_id == service.id
            ]
        ),
    }


def instance_view(caller: Caller, service: Service, instance: Instance) -> dict[str, Any]:
    state = caller.state
    deployments = state.deployments_of(service.id, instance.environment_id)
    settings = instance.settings
    return {
        **{name: settings.get(name) for name in SETTINGS},
        "id": instance.id,
        "serviceId": service.id,
        "serviceName": service.name,
        "service": lambda *_: service_view(caller, service),
        "environmentId": instance.environment_id,
        "createdAt": instance.created_at,
        "updatedAt": instance.updated_at,
        "source": {"image": instance.image, "repo": instance.repo}
        if instance.image or instance.repo
        else None,
        "builder": settings.get("builder") or "RAILPACK",
        "numReplicas": settings.get("numReplicas", 1),
        "restartPolicyType": settings.get("restartPolicyType") or "ON_FAILURE",
        "restartPolicyMaxRetries": settings.get("restartPolicyMaxRetries") or 10,
        "watchPatterns": settings.get("watchPatterns") or [],
        "isUpdatable": True,
        "domains": {
            "serviceDomains": [domain_view(service, instance, d) for d in instance.domains],
            "customDomains": [],
        },
        "latestDeployment": deployment_view(caller, deployments[0]) if deployments else None,
        "activeDeployments": [
            deployment_view(caller, d)
            for d in deployments
            if d.status == "SUCCESS" and not d.stopped
        ],
    }


def domain_view(service: Service, instance: Instance, domain: model.Domain) -> dict[str, Any]:
    return {
        "__typename": "ServiceDomain",
        "id": domain.id,
        "domain": domain.domain,
        "targetPort": domain.target_port,
        "serviceId": service.id,
        "environmentId": instance.environment_id,
        "projectId": service.project_id,
        "createdAt": domain.created_at,
        "updatedAt": domain.created_at,
        "suffix": "localhost",
        "syncStatus": "ACTIVE",
    }


def deployment_view(caller: Caller, deployment: Deployment) -> dict[str, Any]:
    state = caller.state
    instance = state.instance(deployment.service_id, deployment.environment_id)
    domain = instance.domains[0].domain if instance and instance.domains else None
    return {
        "id": deployment.id,
        "projectId": deployment.project_id,
        "environmentId": deployment.environment_id,
        "serviceId": deployment.service_id,
        "service": lambda *_: service_view(caller, need_service(caller, deployment.service_id)),
        "status": deployment.status,
        "createdAt": deployment.created_at,
        "updatedAt": deployment.updated_at,
        "statusUpdatedAt": deployment.updated_at,
        "deploymentStopped": deployment.stopped or deployment.status in model.ENDED,
        "staticUrl": domain,
        "url": f"https://{domain}" if domain else None,
        "meta": {"image": deployment.image} if deployment.image else {"cliUpload": True},
        "canRedeploy": True,
        "canRollback": False,
        "snapshotId": deployment.id,
        "suggestAddServiceDomain": False,
        "instances": [
            {"id": deployment.id, "status": "RUNNING" if not deployment.stopped else "STOPPED"}
        ],
    }


# -- queries -----------------------------------------------------------------------------------

Resolver = Callable[..., Any]
QUERIES: dict[str, Resolver] = {}
MUTATIONS: dict[str, Resolver] = {}


def query(function: Resolver) -> Resolver:
    QUERIES[function.__name__] = function
    return function


def mutation(function: Resolver) -> Resolver:
    MUTATIONS[function.__name__] = function
    return function


@query
def projectToken(caller: Caller) -> Any:
    token = caller.token
    if token is None or token.kind != "project":
        raise refuse("Project Token not found")
    assert token.project_id
    assert token.environment_id
    project, environment = need_environment(caller, token.environment_id)
    return {
        "id": token.name,
        "name": token.name,
        "projectId": token.project_id,
        "environmentId": token.environment_id,
        "createdAt": project.created_at,
        "displayToken": "****",
        "project": project_view(caller, project),
        "environment": environment_view(caller, project, environment),
    }


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
    found = [w for w in caller.state.workspaces if ids is None or w.id in ids]
    return {"workspaces": [{"id": w.id, "name": w.name} for w in found]}


@query
def externalWorkspaces(caller: Caller, projectId: str | None = None) -> Any:
    if caller.token is None or caller.token.kind not in ("account", "oauth"):
        raise refuse()
    return [workspace_view(caller, w.id) for w in caller.state.workspaces if w.external]


@query
def projects(caller: Caller, workspaceId: str | None = None, **_: Any) -> Any:
    if caller.token is None or caller.token.kind == "project":
        raise refuse()
    found = [p for p in caller.state.projects if workspaceId in (None, p.workspace_id)]
    return connection([project_view(caller, p) for p in found if visible(caller, p)])


@query
def project(caller: Caller, id: str) -> Any:
    return project_view(caller, need_project(caller, id))


@query
def environments(caller: Caller, projectId: str, **_: Any) -> Any:
    found = need_project(caller, projectId)
    return connection([environment_view(caller, found, e) for e in found.environments])


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
def variables(
    caller: Caller,
    projectId: str,
    environmentId: str,
    serviceId: str | None = None,
    unrendered: bool | None = None,
) -> Any:
    _, where = need_environment(caller, environmentId)
    if serviceId is None:
        return dict(where.shared)
    owner = need_service(caller, serviceId)
    instance = need_instance(caller, serviceId, environmentId)
    if unrendered:
        return {**model.provided(caller.state, owner, instance), **instance.variables}
    return model.rendered(caller.state, owner, instance)


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
    wanted = (input.get("status") or {}).get("in")
    found = [
        d
        for d in reversed(caller.state.deployments)
        if input.get("environmentId") in (None, d.environment_id)
        and input.get("projectId") in (None, d.project_id)
        and input.get("serviceId") in (None, d.service_id)
        and (not wanted or d.status in wanted)
    ]
    return connection([deployment_view(caller, d) for d in found[:first]])


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
        count = min(limit or 100, 5000)
        lines = caller.supervisor.read_logs(deploymentId, kind, count, startDate, filter)
        return [{**line, "attributes": [], "tags": None} for line in lines]

    return resolve


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
        "serializedConfig": model.template(),
        "createdAt": model.now(),
    }


@query
def domains(caller: Caller, projectId: str, environmentId: str, serviceId: str) -> Any:
    return serviceInstance(caller, serviceId, environmentId)["domains"]


# -- mutations ---------------------------------------------------------------------------------


@mutation
def projectCreate(caller: Caller, input: dict[str, Any]) -> Any:
    if caller.token is None or caller.token.kind == "project":
        raise refuse()
    home = input.get("workspaceId") or caller.state.workspaces[0].id
    name = input.get("name") or "project"
    environment = input.get("defaultEnvironmentName") or "production"
    created = caller.state.add_project(name, home, environment)
    return project_view(caller, created)


@mutation
async def projectDelete(caller: Caller, id: str) -> bool:
    found = need_project(caller, id)
    for owned in [s for s in caller.state.services if s.project_id == found.id]:
        await caller.supervisor.remove(owned)
        caller.state.services.remove(owned)
    caller.state.projects.remove(found)
    return True


@mutation
def projectTokenCreate(caller: Caller, input: dict[str, Any]) -> str:
    if caller.token is None or caller.token.kind == "project":
        raise refuse()
    need_environment(caller, input["environmentId"])
    token = caller.state.new_project_token(
        input["projectId"], input["environmentId"], input["name"]
    )
    caller.state.tokens.append(token)
    return token.value


@mutation
def environmentCreate(caller: Caller, input: dict[str, Any]) -> Any:
    owner = need_project(caller, input["projectId"])
    created = Environment(model.new_id(), input["name"])
    owner.environments.append(created)
    for owned in caller.state.services:
        if owned.project_id == owner.id:
            owned.instances.append(Instance(model.new_id(), owned.id, created.id))
    return environment_view(caller, owner, created)


@mutation
def environmentPatchCommit(
    caller: Caller,
    environmentId: str,
    patch: dict[str, Any] | None = None,
    commitMessage: str | None = None,
) -> str:
    need_environment(caller, environmentId)
    for service_id, change in ((patch or {}).get("services") or {}).items():
        instance = need_instance(caller, service_id, environmentId)
        if "groupId" in change:
            instance.group_id = change["groupId"]
    return model.new_id()


@mutation
def serviceCreate(caller: Caller, input: dict[str, Any]) -> Any:
    owner = need_project(caller, input["projectId"])
    name = input.get("name") or f"service-{model.new_id()[:4]}"
    if len(name) > 32:
        raise refuse("Service name must be 32 characters or less")
    if any(s.project_id == owner.id and s.name == name for s in caller.state.services):
        raise refuse(f'A service named "{name}" already exists in this project')
    environment_id = input.get("environmentId")
    if environment_id:
        need_environment(caller, environment_id)
    created = caller.state.add_service(owner, name)
    source = input.get("source") or {}
    for instance in created.instances:
        instance.variables.update(_strings(input.get("variables") or {}))
        instance.image, instance.repo = source.get("image"), source.get("repo")
        if source.get("image") and environment_id in (None, instance.environment_id):
            caller.supervisor.deploy(created, instance)
    return service_view(caller, created)


@mutation
def serviceUpdate(caller: Caller, id: str, input: dict[str, Any]) -> Any:
    found = need_service(caller, id)
    found.name = input.get("name") or found.name
    found.icon = input.get("icon") or found.icon
    return service_view(caller, found)


@mutation
async def serviceDelete(caller: Caller, id: str, environmentId: str | None = None) -> bool:
    found = need_service(caller, id)
    await caller.supervisor.remove(found)
    caller.state.services.remove(found)
    for instance in found.instances:
        caller.supervisor.write_hosts(instance.environment_id)
    return True


@mutation
def serviceConnect(caller: Caller, id: str, input: dict[str, Any]) -> Any:
    found = need_service(caller, id)
    for instance in found.instances:
        instance.repo = input.get("repo")
    return service_view(caller, found)


@mutation
def serviceDisconnect(caller: Caller, id: str) -> Any:
    found = need_service(caller, id)
    for instance in found.instances:
        instance.image = instance.repo = None
    return service_view(caller, found)


@mutation
def serviceInstanceUpdate(
    caller: Caller,
    serviceId: str,
    input: dict[str, Any],
    environmentId: str | None = None,
) -> bool:
    found = need_service(caller, serviceId)
    for instance in found.instances:
        if environmentId in (None, instance.environment_id):
            need_environment(caller, instance.environment_id)
            instance.settings.update({k: v for k, v in input.items() if k in SETTINGS})
            if input.get("source"):
                instance.image = input["source"].get("image")
                instance.repo = input["source"].get("repo")
            instance.updated_at = model.now()
    return True


@mutation
def serviceInstanceDeployV2(
    caller: Caller, serviceId: str, environmentId: str, commitSha: str | None = None
) -> str:
    instance = need_instance(caller, serviceId, environmentId)
    return caller.supervisor.deploy(need_service(caller, serviceId), instance).id


@mutation
def serviceInstanceDeploy(caller: Caller, serviceId: str, environmentId: str, **_: Any) -> bool:
    return bool(serviceInstanceDeployV2(caller, serviceId, environmentId))


@mutation
def serviceInstanceRedeploy(caller: Caller, serviceId: str, environmentId: str) -> bool:
    return bool(serviceInstanceDeployV2(caller, serviceId, environmentId))


def _strings(values: dict[str, Any]) -> dict[str, str]:
    return {str(k): str(v) for k, v in values.items()}


def _set_variables(caller: Caller, input: dict[str, Any], values: dict[str, str]) -> None:
    _, where = need_environment(caller, input["environmentId"])
    if not input.get("serviceId"):
        if input.get("replace"):
            where.shared.clear()
        where.shared.update(values)
        return
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    if input.get("replace"):
        instance.variables.clear()
    instance.variables.update(values)
    deployed = caller.state.deployments_of(input["serviceId"], input["environmentId"])
    if not input.get("skipDeploys") and any(d.status == "SUCCESS" for d in deployed):
        caller.supervisor.deploy(need_service(caller, input["serviceId"]), instance)


@mutation
def variableCollectionUpsert(caller: Caller, input: dict[str, Any]) -> bool:
    _set_variables(caller, input, _strings(input["variables"]))
    return True


@mutation
def variableUpsert(caller: Caller, input: dict[str, Any]) -> bool:
    _set_variables(caller, input, {input["name"]: input["value"]})
    return True


@mutation
def variableDelete(caller: Caller, input: dict[str, Any]) -> bool:
    _, where = need_environment(caller, input["environmentId"])
    if input.get("serviceId"):
        instance = need_instance(caller, input["serviceId"], input["environmentId"])
        instance.variables.pop(input["name"], None)
    else:
        where.shared.pop(input["name"], None)
    return True


@mutation
async def serviceDomainCreate(caller: Caller, input: dict[str, Any]) -> Any:
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    owner = need_service(caller, input["serviceId"])
    created = await caller.open_domain(owner, instance, input.get("targetPort"))
    return domain_view(owner, instance, created)


@mutation
def serviceDomainDelete(caller: Caller, id: str) -> bool:
    for owned in caller.state.services:
        for instance in owned.instances:
            for domain in instance.domains:
                if domain.id == id:
                    need_service(caller, owned.id)
                    instance.domains.remove(domain)
                    return True
    raise refuse("Domain not found")


@mutation
def templateDeployV2(caller: Caller, input: dict[str, Any]) -> Any:
    """Asynchronous, as on Railway: the services appear a moment after the answer."""
    owner = need_project(caller, input["projectId"])
    where = next(e for e in owner.environments if e.id == input["environmentId"])
    caller.supervisor.spawn(_deploy_template(caller, owner, where, input["serializedConfig"]))
    return {"projectId": owner.id, "workflowId": model.new_id()}


async def _deploy_template(
    caller: Caller, owner: Project, where: Environment, config: dict[str, Any]
) -> None:
    await asyncio.sleep(0.5)
    for created, instance in model.apply_template(caller.state, owner, where, config):
        if instance.image:
            caller.supervisor.deploy(created, instance)
    caller.state.save()


@mutation
def deploymentRedeploy(caller: Caller, id: str, usePreviousImageTag: bool | None = None) -> Any:
    old = need_deployment(caller, id)
    assert old.service_id
    instance = need_instance(caller, old.service_id, old.environment_id)
    owner = need_service(caller, old.service_id)
    return deployment_view(caller, caller.supervisor.deploy(owner, instance, upload=old.upload))


@mutation
def deploymentRestart(caller: Caller, id: str) -> bool:
    found = need_deployment(caller, id)
    instance = need_instance(caller, found.service_id, found.environment_id)
    caller.supervisor.restart(need_service(caller, found.service_id), instance, found)
    return True


@mutation
async def deploymentStop(caller: Caller, id: str) -> bool:
    await caller.supervisor.stop_deployment(need_deployment(caller, id))
    return True


@mutation
async def deploymentRemove(caller: Caller, id: str) -> bool:
    found = need_deployment(caller, id)
    await caller.supervisor.stop_deployment(found)
    found.status = "REMOVED"
    return True


@mutation
def deploymentInstanceExecutionCreate(caller: Caller, input: dict[str, Any]) -> bool:
    """Railway's "Run now" on a cron service."""
    for owned in caller.state.services:
        for instance in owned.instances:
            if instance.id == input["serviceInstanceId"]:
                need_instance(caller, owned.id, instance.environment_id)
                caller.supervisor.spawn(caller.supervisor.run_cron(owned, instance), "cron")
                return True
    raise refuse("ServiceInstance not found")


# -- execution ---------------------------------------------------------------------------------


def _resolve(source: Any, info: GraphQLResolveInfo[Caller], **arguments: Any) -> Any:
    table = {"Query": QUERIES, "Mutation": MUTATIONS}.get(info.parent_type.name)
    if table is None:
        return default_field_resolver(source, info, **arguments)
    return table[info.field_name](info.context, **arguments)


def schema() -> GraphQLSchema:
    return build_schema(SCHEMA.read_text())


async def execute(
    compiled: GraphQLSchema, caller: Caller, document: str, values: dict[str, Any] | None
) -> dict[str, Any]:
    """Run a document; the answer as Railway shapes it. Mutations are saved."""
    result = await graphql(
        compiled,
        document,
        context_value=caller,
        variable_values=values,
        field_resolver=_resolve,
    )
    caller.state.save()
    answer: dict[str, Any] = {"data": result.data}
    if result.errors:
        answer["errors"] = [
            {
                "message": error.message,
                "locations": [
                    {"line": place.line, "column": place.column} for place in error.locations or []
                ],
                "path": error.path,
                "extensions": {"code": "INTERNAL_SERVER_ERROR"},
                "traceId": model.new_id()[:8],
            }
            for error in result.errors
        ]
    return answer


__all__ = ["Caller", "execute", "free_port", "schema"]
