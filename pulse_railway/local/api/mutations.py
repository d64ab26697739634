"""The mutations: MUTATIONS has one resolver for each top-level field."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
    refuse_project_token,
    ssh_key_owner,
)
from pulse_railway.local.api.patch import REGIONS, check_settings
from pulse_railway.local.api.services import affected_environments, remove_instances
from pulse_railway.local.api.views import (
    SETTINGS,
    custom_domain_view,
    deployment_view,
    domain_view,
    gateways_view,
    project_view,
    service_view,
    ssh_key_view,
)
from pulse_railway.local.ssh_keys import fingerprint
from pulse_railway.local.state import DEFAULT_REGION, Environment, Instance, Project, Service

Resolver = Callable[..., Any]
MUTATIONS: dict[str, Resolver] = {}


def mutation(function: Resolver) -> Resolver:
    MUTATIONS[function.__name__] = function
    return function


@mutation
def projectCreate(caller: Caller, input: dict[str, Any]) -> Any:
    refuse_project_token(caller)
    workspace_id = input.get("workspaceId") or caller.state.workspaces[0].id
    name = input.get("name") or "project"
    environment = input.get("defaultEnvironmentName") or "production"
    return project_view(caller, caller.state.add_project(name, workspace_id, environment))


@mutation
def sshPublicKeyCreate(caller: Caller, input: dict[str, Any]) -> Any:
    owner = ssh_key_owner(caller, input.get("workspaceId"))
    try:
        key_id = fingerprint(input["publicKey"])
    except ValueError:
        raise refuse("Invalid SSH public key") from None
    if any(k.fingerprint == key_id for k in caller.state.ssh_keys):
        raise refuse("This SSH key is already registered")
    key = model.SshKey(model.new_id(), input["name"], input["publicKey"].strip(), key_id, owner)
    caller.state.ssh_keys.append(key)
    return ssh_key_view(key)


@mutation
def sshPublicKeyDelete(caller: Caller, id: str) -> bool:
    ssh_key_owner(caller, None)
    caller.state.ssh_keys = [k for k in caller.state.ssh_keys if k.id != id]
    return True


@mutation
def serviceCreate(caller: Caller, input: dict[str, Any]) -> Any:
    project = need_project(caller, input["projectId"])
    name = input.get("name") or f"service-{model.new_id()[:4]}"
    if len(name) > 32:
        raise refuse("Service name must be 32 characters or less")
    if any(s.project_id == project.id and s.name == name for s in caller.state.services):
        raise refuse(f'A service named "{name}" already exists in this project')
    environments = affected_environments(caller, project, input.get("environmentId"))
    service = caller.state.add_service(project, name, environments)
    source = input.get("source") or {}
    for instance in service.instances:
        instance.variables.update(_strings(input.get("variables") or {}))
        instance.image, instance.repo = source.get("image"), source.get("repo")
        if source.get("image"):
            caller.supervisor.deploy(service, instance)
    return service_view(caller, service)


@mutation
def serviceUpdate(caller: Caller, id: str, input: dict[str, Any]) -> Any:
    service = need_service(caller, id)
    service.name = input.get("name") or service.name
    service.icon = input.get("icon") or service.icon
    for instance in service.instances:  # its private name
        caller.supervisor.write_hosts(instance.environment_id)
    return service_view(caller, service)


@mutation
def serviceDelete(caller: Caller, id: str, environmentId: str | None = None) -> bool:
    remove_instances(caller, *_instances(caller, id, environmentId))
    return True


def _instances(
    caller: Caller, service_id: str, environment_id: str | None
) -> tuple[Service, list[Instance]]:
    """Return a service and those of its instances that a change acts on: at least one."""
    service = need_service(caller, service_id)
    project = need_project(caller, service.project_id)
    ids = {environment.id for environment in affected_environments(caller, project, environment_id)}
    instances = [i for i in service.instances if i.environment_id in ids]
    if not instances:
        raise refuse("ServiceInstance not found")
    return service, instances


@mutation
def serviceConnect(caller: Caller, id: str, input: dict[str, Any]) -> Any:
    """Set the source in every environment that the token reaches: the schema has no argument for
    one."""
    service = need_service(caller, id)
    for instance in service.instances:
        if accessible(caller, instance.environment_id):
            instance.image, instance.repo = input.get("image"), input.get("repo")
    return service_view(caller, service)


@mutation
def serviceDisconnect(caller: Caller, id: str) -> Any:
    service = need_service(caller, id)
    for instance in service.instances:
        if accessible(caller, instance.environment_id):
            instance.image = instance.repo = None
    return service_view(caller, service)


@mutation
def serviceInstanceUpdate(
    caller: Caller,
    serviceId: str,
    input: dict[str, Any],
    environmentId: str | None = None,
) -> bool:
    settings = check_settings({k: v for k, v in input.items() if k in SETTINGS})
    service, instances = _instances(caller, serviceId, environmentId)
    for instance in instances:
        instance.settings.update(settings)
        caller.supervisor.spawn(caller.supervisor.scale(service, instance), "scale")
        if "registryCredentials" in input:  # which no query returns
            instance.settings["registryCredentials"] = input["registryCredentials"]
        if input.get("source"):
            instance.image = input["source"].get("image")
            instance.repo = input["source"].get("repo")
        instance.updated_at = model.now()
    return True


# of a replica on Pro; what Railway says beyond it is not known
PLAN_LIMITS = {"cpu": 24, "memoryBytes": 24 * 10**9}


@mutation
def serviceInstanceLimitsUpdate(caller: Caller, input: dict[str, Any]) -> bool:
    """Set limits in the shape that an environment's config has (the CLI's `limitOverride`)."""
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    given = {"cpu": input.get("vCPUs"), "memoryBytes": input.get("memoryGB")}
    if given["memoryBytes"] is not None:
        given["memoryBytes"] = int(given["memoryBytes"] * 10**9)
    limits = {name: value for name, value in given.items() if value is not None}
    for name, value in limits.items():
        if not 0 < value <= PLAN_LIMITS[name]:
            raise refuse(f"{name} is over the limit of your plan")
    before = (instance.settings.get("limitOverride") or {}).get("containers") or {}
    instance.settings["limitOverride"] = {"containers": {**before, **limits}}
    return True


@mutation
def egressGatewayAssociationCreate(caller: Caller, input: dict[str, Any]) -> Any:
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    own = [name for name, at in (instance.settings.get("multiRegionConfig") or {}).items() if at]
    region = input.get("region") or next(iter(own), DEFAULT_REGION)
    if region not in REGIONS:
        raise refuse(f"Region {region} not found")
    instance.egress_regions = sorted({*instance.egress_regions, region})
    return gateways_view(instance)


@mutation
def egressGatewayAssociationsClear(caller: Caller, input: dict[str, Any]) -> bool:
    need_instance(caller, input["serviceId"], input["environmentId"]).egress_regions = []
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
    _, environment = need_environment(caller, input["environmentId"])
    if not input.get("serviceId"):
        if input.get("replace"):
            environment.shared.clear()
        environment.shared.update(values)
        return
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    if input.get("replace"):
        instance.variables.clear()
    instance.variables.update(values)
    history = caller.state.deployments_of(input["serviceId"], input["environmentId"])
    if not input.get("skipDeploys") and any(d.status == "SUCCESS" for d in history):
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
    _, environment = need_environment(caller, input["environmentId"])
    if input.get("serviceId"):
        instance = need_instance(caller, input["serviceId"], input["environmentId"])
        instance.variables.pop(input["name"], None)
    else:
        environment.shared.pop(input["name"], None)
    return True


@mutation
async def serviceDomainCreate(caller: Caller, input: dict[str, Any]) -> Any:
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    service = need_service(caller, input["serviceId"])
    domain = await caller.open_domain(service, instance, input.get("targetPort"))
    return domain_view(service, instance, domain)


@mutation
def serviceDomainDelete(caller: Caller, id: str) -> bool:
    for service in caller.state.services:
        for instance in service.instances:
            for domain in instance.domains:
                if domain.id == id:
                    need_environment(caller, instance.environment_id)
                    instance.domains.remove(domain)
                    return True
    raise refuse("Domain not found")


@mutation
def serviceDomainUpdate(caller: Caller, input: dict[str, Any]) -> bool:
    """Change the target port. Another name would need another certificate and port here."""
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    for domain in instance.domains:
        if domain.id == input["serviceDomainId"]:
            if domain.domain != input["domain"]:
                raise refuse("the local Railway cannot rename a domain")
            domain.target_port = input.get("targetPort")
            return True
    raise refuse("Domain not found")


@mutation
def customDomainCreate(caller: Caller, input: dict[str, Any]) -> Any:
    """Store a custom domain. It is never verified, since no DNS record points to this machine."""
    instance = need_instance(caller, input["serviceId"], input["environmentId"])
    service = need_service(caller, input["serviceId"])
    domain = model.Domain(model.new_id(), input["domain"], 0, input.get("targetPort"))
    instance.custom_domains.append(domain)
    return custom_domain_view(service, instance, domain)


@mutation
def customDomainDelete(caller: Caller, id: str) -> bool:
    for service in caller.state.services:
        for instance in service.instances:
            if any(domain.id == id for domain in instance.custom_domains):
                need_environment(caller, instance.environment_id)
                instance.custom_domains = [d for d in instance.custom_domains if d.id != id]
                return True
    raise refuse("Domain not found")


@mutation
def twoFactorInfoValidate(caller: Caller, input: dict[str, Any]) -> bool:
    raise refuse("Invalid two-factor token")


@mutation
def templateDeployV2(caller: Caller, input: dict[str, Any]) -> Any:
    """Start a workflow that creates a template's services, a moment after the answer as on
    Railway."""
    project, environment = need_environment(caller, input["environmentId"])
    workflow_id = model.new_id()
    caller.state.workflows[workflow_id] = "Running"
    config = input["serializedConfig"]
    caller.supervisor.spawn(_deploy_template(caller, project, environment, config, workflow_id))
    return {"projectId": project.id, "workflowId": workflow_id}


async def _deploy_template(
    caller: Caller,
    project: Project,
    environment: Environment,
    config: dict[str, Any],
    workflow_id: str,
) -> None:
    await asyncio.sleep(0.5)
    for service, instance in model.apply_template(caller.state, project, environment, config):
        if instance.image:
            caller.supervisor.deploy(service, instance)
    caller.state.workflows[workflow_id] = "Complete"
    caller.state.save()


@mutation
def deploymentRedeploy(caller: Caller, id: str, usePreviousImageTag: bool | None = None) -> Any:
    old = need_deployment(caller, id)
    assert old.service_id
    instance = need_instance(caller, old.service_id, old.environment_id)
    service = need_service(caller, old.service_id)
    return deployment_view(caller, caller.supervisor.deploy(service, instance, upload=old.upload))


@mutation
def deploymentRestart(caller: Caller, id: str) -> bool:
    deployment = need_deployment(caller, id)
    instance = need_instance(caller, deployment.service_id, deployment.environment_id)
    service = need_service(caller, deployment.service_id)
    caller.supervisor.restart(service, instance, deployment)
    return True


@mutation
async def deploymentStop(caller: Caller, id: str) -> bool:
    await caller.supervisor.stop_deployment(need_deployment(caller, id))
    return True


@mutation
async def deploymentRemove(caller: Caller, id: str) -> bool:
    await caller.supervisor.stop_deployment(need_deployment(caller, id), remove=True)
    return True


@mutation
def deploymentInstanceExecutionCreate(caller: Caller, input: dict[str, Any]) -> bool:
    """Start a cron service now, as "Run now" on Railway's dashboard."""
    for service in caller.state.services:
        for instance in service.instances:
            if instance.id == input["serviceInstanceId"]:
                need_instance(caller, service.id, instance.environment_id)
                caller.supervisor.spawn(caller.supervisor.run_cron(service, instance), "cron")
                return True
    raise refuse("ServiceInstance not found")
