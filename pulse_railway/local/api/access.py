"""Permissions: what a token may see and change.

The `need_` functions return an object by its id. They raise what Railway answers if it does not
exist, or the token has no access to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphql import GraphQLError

from pulse_railway.local import state as model
from pulse_railway.local.state import Deployment, Environment, Instance, Project, Service, Token
from pulse_railway.local.supervisor import Supervisor


@dataclass
class Rules:
    """Railway's behaviour where its schema and its docs allow more than one reading.

    every_environment: a change of a service in an environment that is no fork acts on every
        environment that is no fork, as the schema says.
    deletion_patch: `refuse` or `ignore` a patch that deletes a service.
    copy_uploads: a duplicated environment gets the uploads of its services.
    restricted: the id of an environment that no token opens, and that is listed nevertheless
        (`canAccess` is false).
    """

    every_environment: bool = False
    deletion_patch: str = ""
    copy_uploads: bool = True
    restricted: str = ""


@dataclass
class Caller:
    """The context of a call. `token` is None without credentials.

    `open_domain` gives an instance a domain with a target port (None: Railway's choice).
    """

    token: Token | None
    supervisor: Supervisor
    open_domain: Callable[[Service, Instance, int | None], Any]
    rules: Rules = field(default_factory=Rules)

    @property
    def state(self) -> model.State:
        return self.supervisor.state


def refuse(message: str = "Not Authorized") -> GraphQLError:
    """Return the error to raise, with the message of Railway's."""
    return GraphQLError(message)


def visible(caller: Caller, project: Project) -> bool:
    """Does the token reach this project?"""
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


def accessible(caller: Caller, environment_id: str) -> bool:
    """Does the token reach this environment, of a project that it reaches? A project token reaches
    one."""
    token = caller.token
    if token is None or environment_id == caller.rules.restricted:
        return False
    return token.kind != "project" or token.environment_id == environment_id


def need_environment(caller: Caller, environment_id: str) -> tuple[Project, Environment]:
    project_environment = caller.state.environment(environment_id)
    if project_environment is None:
        raise refuse("Environment not found")
    need_project(caller, project_environment[0].id)
    if not accessible(caller, environment_id):
        raise refuse()
    return project_environment


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


def refuse_project_token(caller: Caller, project_id: str | None = None) -> None:
    """Raise unless the token is wider than one environment, and reaches the project, if given."""
    if caller.token is None or caller.token.kind == "project":
        raise refuse()
    if project_id is not None:
        need_project(caller, project_id)


def need_deployment(caller: Caller, deployment_id: str) -> Deployment:
    deployment = caller.state.deployment(deployment_id)
    if deployment is None:
        raise refuse("Deployment not found")
    need_environment(caller, deployment.environment_id)
    return deployment


def ssh_key_owner(caller: Caller, workspace_id: str | None) -> str | None:
    """Return the workspace whose SSH keys a token works with, None for the account's own keys."""
    if caller.token is None or caller.token.kind == "project":
        raise refuse()
    return workspace_id or caller.token.workspace_id
