"""What exists on the local Railway: projects, services, variables, deployments, tokens."""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pulse_railway.local.guard import make_private, write_private

RUNNING = ("INITIALIZING", "QUEUED", "WAITING", "BUILDING", "DEPLOYING")
DEFAULT_REGION = "us-west2"
ENDED = ("FAILED", "CRASHED", "REMOVED", "SKIPPED")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id() -> str:
    return str(uuid.uuid4())


@dataclass
class Environment:
    id: str
    name: str
    created_at: str = field(default_factory=now)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    staged: dict[str, Any] = field(default_factory=dict)  # a patch that waits to be committed
    ephemeral: bool = False  # a pull request's
    copy_of: str | None = None  # the id of the environment that it was duplicated from

    @property
    def is_fork(self) -> bool:
        """Is this a fork in the words of Railway's schema, that is a pull request's environment?

        Railway has made no other forks since January 2024.
        """
        return self.ephemeral and self.copy_of is not None


@dataclass
class Project:
    id: str
    name: str
    workspace_id: str
    environments: list[Environment]
    description: str | None = None
    created_at: str = field(default_factory=now)


@dataclass
class Domain:
    id: str
    domain: str
    port: int  # where the edge listens on this machine
    target_port: int | None
    created_at: str = field(default_factory=now)


@dataclass
class Instance:
    """A service in one environment. `settings` are fields of ServiceInstanceUpdateInput."""

    id: str
    service_id: str
    environment_id: str
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)
    image: str | None = None
    repo: str | None = None
    upload: str | None = None  # the folder of the last upload
    variables: dict[str, str] = field(default_factory=dict)
    domains: list[Domain] = field(default_factory=list)
    group_id: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    volume: bool = False
    custom_domains: list[Domain] = field(default_factory=list)
    egress_regions: list[str] = field(default_factory=list)  # of its static outbound addresses

    @property
    def replica_regions(self) -> list[str]:
        """Return a region for each replica. A volume or a cron schedule allows one replica."""
        placed = [
            region
            for region, at in (self.settings.get("multiRegionConfig") or {}).items()
            for _ in range((at or {}).get("numReplicas") or 0)
        ]
        region = self.settings.get("region") or DEFAULT_REGION
        regions = placed or [region] * (self.settings.get("numReplicas") or 1)
        return regions[:1] if self.volume or self.settings.get("cronSchedule") else regions


@dataclass
class Service:
    id: str
    name: str
    project_id: str
    instances: list[Instance]
    icon: str | None = None
    created_at: str = field(default_factory=now)


@dataclass
class Deployment:
    id: str
    project_id: str
    environment_id: str
    service_id: str
    status: str = "INITIALIZING"
    image: str | None = None
    upload: str | None = None
    stopped: bool = False
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)
    meta: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # rendered when it was created


@dataclass
class Token:
    """An API token. `kind`: account, workspace, project or oauth.

    A project token opens one environment, a workspace token its workspace, the others all.
    """

    value: str
    kind: str
    workspace_id: str | None = None
    project_id: str | None = None
    environment_id: str | None = None
    name: str = ""
    refresh: str | None = None
    expires_at: str | None = None
    id: str = field(default_factory=new_id)
    created_at: str = field(default_factory=now)

    @property
    def expired(self) -> bool:
        return bool(self.expires_at) and datetime.fromisoformat(str(self.expires_at)) < (
            datetime.now(UTC)
        )


@dataclass
class SshKey:
    """A public key, registered with a workspace, or with the account if that is None."""

    id: str
    name: str
    public_key: str
    fingerprint: str
    workspace_id: str | None = None
    created_at: str = field(default_factory=now)


@dataclass
class Workspace:
    id: str
    name: str
    external: bool = False


def _stored_form(deployment: Deployment) -> Deployment:
    """Return a deployment as it is stored: a removed one never starts, so has no variables."""
    return replace(deployment, variables={}) if deployment.status == "REMOVED" else deployment


class State:
    """All that exists, in memory and in `<root>/state.json`. Call `save` after each change.

    Raises Failure if the folder `root` belongs to another user.
    """

    def __init__(self, root: Path) -> None:
        make_private(root)
        self.root = root
        self.workspaces: list[Workspace] = []
        self.projects: list[Project] = []
        self.services: list[Service] = []
        self.deployments: list[Deployment] = []
        self.tokens: list[Token] = []
        self.ssh_keys: list[SshKey] = []
        self.workflows: dict[str, str] = {}  # the status of template deploys by id; not saved
        self.api_port: int | None = None
        self.ssh_port: int | None = None
        if self.path.exists():
            self._load(json.loads(self.path.read_text()))
        else:
            self._create_first_project()

    @property
    def path(self) -> Path:
        return self.root / "state.json"

    def _load(self, data: dict[str, Any]) -> None:
        self.api_port, self.ssh_port = data.get("api_port"), data.get("ssh_port")
        self.ssh_keys = [SshKey(**k) for k in data.get("ssh_keys", [])]
        self.workspaces = [Workspace(**w) for w in data["workspaces"]]
        for raw in data["projects"]:
            environments = [Environment(**e) for e in raw.pop("environments")]
            self.projects.append(Project(environments=environments, **raw))
        for raw in data["services"]:
            instances = []
            for item in raw.pop("instances"):
                domains = [Domain(**d) for d in item.pop("domains")]
                custom = [Domain(**d) for d in item.pop("custom_domains", [])]
                instances.append(Instance(domains=domains, custom_domains=custom, **item))
            self.services.append(Service(instances=instances, **raw))
        for raw in data["deployments"]:
            deployment = Deployment(**raw)
            service = self.service(deployment.service_id)
            instance = self.instance(deployment.service_id, deployment.environment_id)
            if "variables" not in raw and service and instance:  # written by an older version
                deployment.variables = render_variables(self, service, instance)
            self.deployments.append(deployment)
        self.tokens = [Token(**t) for t in data["tokens"]]

    def _create_first_project(self) -> None:
        """Create two workspaces, an empty project in the first, and a token of each kind."""
        home = Workspace(new_id(), "local")
        self.workspaces = [home, Workspace(new_id(), "shared-with-me", external=True)]
        project = self.add_project("pulse-local", home.id)
        self.tokens = [
            Token(secrets.token_urlsafe(24), "account", name="account"),
            Token(secrets.token_urlsafe(24), "workspace", workspace_id=home.id, name="workspace"),
            self.new_project_token(project.id, project.environments[0].id, "project"),
        ]
        self.save()

    def save(self) -> None:
        data = {
            "api_port": self.api_port,
            "ssh_port": self.ssh_port,
            "ssh_keys": self.ssh_keys,
            "workspaces": self.workspaces,
            "projects": self.projects,
            "services": self.services,
            "deployments": [_stored_form(d) for d in self.deployments],
            "tokens": self.tokens,
        }
        # `dumps` is in C, as `dump` is not; `asdict` would copy everything first
        write_private(self.path, json.dumps(data, default=vars))

    # -- looking up ----------------------------------------------------------------------------

    def project(self, project_id: str) -> Project | None:
        return next((p for p in self.projects if p.id == project_id), None)

    def environment(self, environment_id: str) -> tuple[Project, Environment] | None:
        for project in self.projects:
            for environment in project.environments:
                if environment.id == environment_id:
                    return project, environment
        return None

    def service(self, service_id: str) -> Service | None:
        return next((s for s in self.services if s.id == service_id), None)

    def instance(self, service_id: str, environment_id: str) -> Instance | None:
        service = self.service(service_id)
        if service is None:
            return None
        return next((i for i in service.instances if i.environment_id == environment_id), None)

    def instance_by_id(self, instance_id: str) -> Instance | None:
        every = (instance for service in self.services for instance in service.instances)
        return next((i for i in every if i.id == instance_id), None)

    def instances(self, environment_id: str) -> Iterator[tuple[Service, Instance]]:
        for service in self.services:
            for instance in service.instances:
                if instance.environment_id == environment_id:
                    yield service, instance

    def deployment(self, deployment_id: str) -> Deployment | None:
        return next((d for d in self.deployments if d.id == deployment_id), None)

    def deployments_of(self, service_id: str, environment_id: str) -> list[Deployment]:
        """Return a service's deployments in an environment, newest first."""
        return [
            d
            for d in reversed(self.deployments)
            if d.service_id == service_id and d.environment_id == environment_id
        ]

    def token(self, value: str) -> Token | None:
        return next((t for t in self.tokens if secrets.compare_digest(t.value, value)), None)

    # -- changing ------------------------------------------------------------------------------

    def add_project(self, name: str, workspace_id: str, environment: str = "production") -> Project:
        project = Project(new_id(), name, workspace_id, [Environment(new_id(), environment)])
        self.projects.append(project)
        return project

    def new_project_token(self, project_id: str, environment_id: str, name: str) -> Token:
        return Token(
            secrets.token_urlsafe(24),
            "project",
            project_id=project_id,
            environment_id=environment_id,
            name=name,
        )

    def new_oauth_token(self, seconds: int = 3600) -> Token:
        expires = datetime.now(UTC) + timedelta(seconds=seconds)
        return Token(
            secrets.token_urlsafe(24),
            "oauth",
            name="cli login",
            refresh=secrets.token_urlsafe(24),
            expires_at=expires.isoformat(),
        )

    def add_service(
        self, project: Project, name: str, environments: list[Environment] | None = None
    ) -> Service:
        """Create a service with an instance in each of these environments, by default in all."""
        service_id = new_id()
        if environments is None:
            environments = project.environments
        instances = [Instance(new_id(), service_id, e.id) for e in environments]
        service = Service(service_id, name, project.id, instances)
        self.services.append(service)
        return service


# -- variables ---------------------------------------------------------------------------------

REFERENCE = re.compile(r"\$\{\{\s*(?:([^}.\s]+)\.)?([A-Za-z0-9_]+)\s*\}\}")


def railway_variables(state: State, service: Service, instance: Instance) -> dict[str, str]:
    """Return the variables that Railway itself sets (docs.railway.com/reference/variables)."""
    project_environment = state.environment(instance.environment_id)
    assert project_environment is not None
    project, environment = project_environment
    variables = {
        "RAILWAY_PROJECT_ID": project.id,
        "RAILWAY_PROJECT_NAME": project.name,
        "RAILWAY_ENVIRONMENT_ID": environment.id,
        "RAILWAY_ENVIRONMENT_NAME": environment.name,
        "RAILWAY_ENVIRONMENT": environment.name,
        "RAILWAY_SERVICE_ID": service.id,
        "RAILWAY_SERVICE_NAME": service.name,
        "RAILWAY_PRIVATE_DOMAIN": private_domain(service),
    }
    if instance.domains:
        variables["RAILWAY_PUBLIC_DOMAIN"] = instance.domains[0].domain
        variables["RAILWAY_STATIC_URL"] = instance.domains[0].domain
    return variables


def private_domain(service: Service) -> str:
    return f"{service.name}.railway.internal"


def render_variables(state: State, service: Service, instance: Instance) -> dict[str, str]:
    """Return all variables of a service with their references resolved.

    A reference to a variable that does not exist, or to itself, renders as an empty string.
    """

    def value_of(owner: Service, instance: Instance, name: str, seen: tuple[str, ...]) -> str:
        variable = f"{owner.id}.{name}"
        if variable in seen:
            return ""
        raw = {**railway_variables(state, owner, instance), **instance.variables}.get(name, "")

        def resolve(match: re.Match[str]) -> str:
            scope, reference = match.groups()
            if scope is None:
                return value_of(owner, instance, reference, (*seen, variable))
            if scope == "shared":
                environment = state.environment(instance.environment_id)
                return environment[1].shared.get(reference, "") if environment else ""
            for other, other_instance in state.instances(instance.environment_id):
                if other.project_id == owner.project_id and other.name == scope:
                    return value_of(other, other_instance, reference, (*seen, variable))
            return ""

        return REFERENCE.sub(resolve, raw)

    names = {**railway_variables(state, service, instance), **instance.variables}
    return {name: value_of(service, instance, name, ()) for name in names}


# -- the published template --------------------------------------------------------------------

SECRET = re.compile(r"\$\{\{\s*secret\((\d+)\)\s*\}\}")


def baseline_template() -> dict[str, Any]:
    """Return the `serializedConfig` of `template(code: "pulse-baseline")`."""
    group = "3d9d3c8e-5a55-4a0c-9f53-3f2a7f0d6a10"

    def runtime(name: str, image: str) -> dict[str, Any]:
        return {
            "name": name,
            "groupId": group,
            "source": {"image": f"{image}:0.3.13"},
            "deploy": {"startCommand": None},
            "networking": {"serviceDomains": {}, "tcpProxies": {}},
            "variables": {},
        }

    redis = {
        "name": "pulse-redis",
        "groupId": group,
        "source": {"image": "redis:8.2.1"},
        "deploy": {
            "startCommand": '/bin/sh -c "docker-entrypoint.sh redis-server'
            ' --requirepass $REDIS_PASSWORD --save 60 1 --dir /data"'
        },
        "networking": {"serviceDomains": {}, "tcpProxies": {}},
        "volumeMounts": {"data": {"mountPath": "/data"}},
        "variables": {
            "REDIS_PASSWORD": {"defaultValue": "${{ secret(32) }}"},
            "REDISHOST": {"defaultValue": "${{RAILWAY_PRIVATE_DOMAIN}}"},
            "REDISPORT": {"defaultValue": "6379"},
            "REDISUSER": {"defaultValue": "default"},
            "REDIS_URL": {
                "defaultValue": "redis://${{REDISUSER}}:${{REDIS_PASSWORD}}@${{REDISHOST}}"
                ":${{REDISPORT}}"
            },
        },
    }
    return {
        "services": {
            "0d7f0f0e-6f0b-4f0e-8a3e-3a6f2b1c0001": runtime("pulse-router", "pulse-railway-router"),
            "0d7f0f0e-6f0b-4f0e-8a3e-3a6f2b1c0002": runtime(
                "pulse-janitor", "pulse-railway-janitor"
            ),
            "0d7f0f0e-6f0b-4f0e-8a3e-3a6f2b1c0003": redis,
        },
        "groups": {group: {"name": "pulse"}},
    }


def apply_template(
    state: State, project: Project, environment: Environment, config: Any
) -> list[tuple[Service, Instance]]:
    """Create a template's services in an environment from its `serializedConfig`."""
    groups = {old: new_id() for old in config.get("groups") or {}}
    for old, new in groups.items():
        environment.groups[new] = dict(config["groups"][old])
    created = []
    for raw in config.get("services", {}).values():
        service = state.add_service(project, raw["name"], [environment])
        instance = service.instances[0]
        instance.image = (raw.get("source") or {}).get("image")
        old_group = raw.get("groupId")
        if old_group:
            if old_group not in groups:
                groups[old_group] = new_id()
                environment.groups[groups[old_group]] = {"name": "group"}
            instance.group_id = groups[old_group]
        deploy = raw.get("deploy") or {}
        instance.settings = {k: v for k, v in deploy.items() if v is not None}
        instance.volume = bool(raw.get("volumeMounts"))
        for name, spec in (raw.get("variables") or {}).items():
            value = (spec.get("defaultValue") or spec.get("value") or "") if spec else ""
            instance.variables[name] = SECRET.sub(
                lambda m: secrets.token_hex(int(m[1]) // 2), str(value)
            )
        created.append((service, instance))
    return created
