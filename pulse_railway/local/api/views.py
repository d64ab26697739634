"""The fields of each GraphQL type, as dicts. A lambda is called only if a document asks for it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pulse_railway.local import state as model
from pulse_railway.local.api.access import (
    Caller,
    accessible,
    need_environment,
    need_project,
    need_service,
    visible,
)
from pulse_railway.local.api.patch import config_of, volume_id
from pulse_railway.local.state import (
    DEFAULT_REGION,
    Deployment,
    Environment,
    Instance,
    Project,
    Service,
    SshKey,
    Token,
)

# the fields of ServiceInstanceUpdateInput that are stored as they are
SETTINGS = (
    "autoInstrumentationEnabled buildCommand builder cronSchedule dockerfilePath drainingSeconds"
    " healthcheckPath healthcheckTimeout ipv6EgressEnabled multiRegionConfig numReplicas"
    " overlapSeconds preDeployCommand railwayConfigFile region restartPolicyMaxRetries"
    " restartPolicyType rootDirectory sleepApplication startCommand tracingEnabled watchPatterns"
).split()


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
    primary = next((e.id for e in project.environments if not e.ephemeral), None)
    return {
        "id": project.id,
        "name": project.name,
        "description": project.description,
        "createdAt": project.created_at,
        "updatedAt": project.created_at,
        "workspaceId": project.workspace_id,
        "workspace": lambda *_: workspace_view(caller, project.workspace_id),
        "primaryEnvironmentId": primary,
        "baseEnvironmentId": primary,
        "environments": lambda *_, **arguments: environments_view(caller, project, **arguments),
        "buckets": lambda *_, **__: connection([]),
        "volumes": lambda *_, **__: connection(
            [
                volume_view(caller, s)
                for s in state.services
                if s.project_id == project.id and any(i.volume for i in s.instances)
            ]
        ),
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
        # by the schema `projects` is a connection in Workspace, a list in ExternalWorkspace
        "projects": views if workspace.external else lambda *_, **__: connection(views),
    }


def environments_view(
    caller: Caller, project: Project, isEphemeral: bool | None = None, **_: Any
) -> dict[str, Any]:
    """Return a project's environments, restricted ones included; to a project token its own."""
    token = caller.token
    own = token.environment_id if token and token.kind == "project" else None
    return connection(
        [
            environment_view(caller, project, e)
            for e in project.environments
            if own in (None, e.id) and isEphemeral in (None, e.ephemeral)
        ]
    )


def token_view(caller: Caller, token: Token) -> dict[str, Any]:
    assert token.environment_id
    project, environment = need_environment(caller, token.environment_id)
    return {
        "id": token.id,
        "name": token.name,
        "projectId": project.id,
        "environmentId": environment.id,
        "createdAt": token.created_at,
        "displayToken": f"****-{token.value[-4:]}",
        "project": lambda *_: project_view(caller, project),
        "environment": lambda *_: environment_view(caller, project, environment),
    }


def environment_view(caller: Caller, project: Project, environment: Environment) -> dict[str, Any]:
    state = caller.state
    instances = list(state.instances(environment.id))
    base = next((e for e in project.environments if e.id == environment.copy_of), None)
    if not environment.is_fork or (base and not accessible(caller, base.id)):
        base = None
    return {
        "id": environment.id,
        "name": environment.name,
        "projectId": project.id,
        "createdAt": environment.created_at,
        "updatedAt": environment.created_at,
        "isEphemeral": environment.ephemeral,
        "canAccess": accessible(caller, environment.id),
        "unmergedChangesCount": len(environment.staged.get("services") or {}),
        "sourceEnvironment": (lambda *_: environment_view(caller, project, base)) if base else None,
        "meta": None,
        "config": lambda *_, **__: config_of(caller, environment),
        "configEtag": lambda *_: config_etag(caller, environment),
        "canvasGroupRefs": {},
        "volumeInstances": lambda *_, **__: connection(
            [volume_instance_view(caller, s, i) for s, i in instances if i.volume]
        ),
        "serviceInstances": lambda *_, **__: connection(
            [
                instance_view(caller, s, i)
                for s, i in instances
                if need_environment(caller, environment.id)
            ]
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
        "templateServiceId": None,
        "projectId": service.project_id,
        "createdAt": service.created_at,
        "updatedAt": service.created_at,
        "autoInstrumentationEnabled": any(
            i.settings.get("autoInstrumentationEnabled") for i in service.instances
        ),
        "tracingEnabled": next(
            (
                i.settings["tracingEnabled"]
                for i in service.instances
                if i.settings.get("tracingEnabled") is not None
            ),
            None,
        ),
        "project": lambda *_: project_view(caller, need_project(caller, service.project_id)),
        "serviceInstances": lambda *_, **__: connection(
            [
                instance_view(caller, service, i)
                for i in service.instances
                if accessible(caller, i.environment_id)
            ]
        ),
        "deployments": lambda *_, **__: connection(
            [
                deployment_view(caller, d)
                for d in reversed(caller.state.deployments)
                if d.service_id == service.id and accessible(caller, d.environment_id)
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
        "autoInstrumentationEnabled": bool(settings.get("autoInstrumentationEnabled")),
        "tracingEnabled": bool(settings.get("tracingEnabled")),  # a project here has no default
        "domains": {
            "serviceDomains": [domain_view(service, instance, d) for d in instance.domains],
            "customDomains": [
                custom_domain_view(service, instance, d) for d in instance.custom_domains
            ],
        },
        "latestDeployment": deployment_view(caller, deployments[0]) if deployments else None,
        "activeDeployments": [
            deployment_view(caller, d)
            for d in deployments
            if d.status == "SUCCESS" and not d.stopped
        ],
    }


def gateways_view(instance: Instance) -> list[dict[str, Any]]:
    """Return static outbound addresses. They are for documentation (RFC 5737): nothing has them."""
    return [
        {"ipv4": f"192.0.2.{number}", "region": region, "zone": None}
        for number, region in enumerate(instance.egress_regions, 1)
    ]


def ssh_key_view(key: SshKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "publicKey": key.public_key,
        "fingerprint": key.fingerprint,
        "createdAt": key.created_at,
        "updatedAt": key.created_at,
        "userId": None if key.workspace_id else "local-user",
        "workspaceId": key.workspace_id,
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


def custom_domain_view(
    service: Service, instance: Instance, domain: model.Domain
) -> dict[str, Any]:
    record = {
        "hostlabel": domain.domain.partition(".")[0],
        "fqdn": domain.domain,
        "recordType": "DNS_RECORD_TYPE_CNAME",
        "requiredValue": f"{service.name}.localhost",
        "currentValue": "",
        "status": "DNS_RECORD_STATUS_REQUIRES_UPDATE",
        "zone": domain.domain.partition(".")[2],
        "purpose": "DNS_RECORD_PURPOSE_TRAFFIC_ROUTE",
    }
    return {
        **domain_view(service, instance, domain),
        "__typename": "CustomDomain",
        "status": {
            "dnsRecords": [record],
            "certificateStatus": "CERTIFICATE_STATUS_TYPE_VALIDATING_OWNERSHIP",
            "certificates": [],
            "verified": False,
        },
    }


def config_etag(caller: Caller, environment: Environment) -> str:
    """Return what changes with every change of an environment's config."""
    config = json.dumps(config_of(caller, environment), sort_keys=True)
    return hashlib.sha256(config.encode()).hexdigest()


def volume_view(caller: Caller, service: Service) -> dict[str, Any]:
    return {
        "id": volume_id(service),
        "name": f"{service.name}-volume",
        "createdAt": service.created_at,
        "projectId": service.project_id,
        "project": lambda *_: project_view(caller, need_project(caller, service.project_id)),
        "volumeInstances": lambda *_, **__: connection(
            [
                volume_instance_view(caller, service, i)
                for i in service.instances
                if i.volume and accessible(caller, i.environment_id)
            ]
        ),
    }


def volume_instance_view(caller: Caller, service: Service, instance: Instance) -> dict[str, Any]:
    environment_id = instance.environment_id
    return {
        "id": f"volume-of-{instance.id}",
        "serviceId": service.id,
        "environmentId": instance.environment_id,
        "mountPath": "/data",
        "currentSizeMB": 0.0,
        "sizeMB": 500,
        "state": "READY",
        "isPendingDeletion": False,
        "createdAt": instance.created_at,
        "externalId": None,
        "region": instance.settings.get("region") or DEFAULT_REGION,
        "volumeId": volume_id(service),
        "volume": lambda *_: volume_view(caller, service),
        "service": lambda *_: service_view(caller, service),
        "environment": lambda *_: environment_view(
            caller, *need_environment(caller, environment_id)
        ),
    }


def staged_view(environment: Environment) -> dict[str, Any]:
    return {
        "id": f"patch-of-{environment.id}",
        "status": "STAGED",
        "patch": lambda *_, **__: environment.staged,
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
        "environment": lambda *_: environment_view(
            caller, *need_environment(caller, deployment.environment_id)
        ),
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
