"""Which environments a service is in, and how it leaves them."""

from __future__ import annotations

from pulse_railway.local.api.access import Caller, need_environment, refuse
from pulse_railway.local.state import Environment, Instance, Project, Service


def affected_environments(
    caller: Caller, project: Project, environment_id: str | None
) -> list[Environment]:
    """The environments that `serviceCreate`, `serviceInstanceUpdate` or `serviceDelete` acts on.

    The one that is named, as Railway's CLI describes it; by order, and where none is named, all
    that are no forks, as the schema says. Raises what Railway refuses with.
    """
    every = [environment for environment in project.environments if not environment.is_fork]
    if environment_id is None:
        for environment in every:
            need_environment(caller, environment.id)
        return every
    owner, environment = need_environment(caller, environment_id)
    if owner is not project:
        raise refuse("Environment not found")
    return every if caller.rules.every_environment and environment in every else [environment]


def remove_instances(caller: Caller, service: Service, instances: list[Instance]) -> None:
    """Remove instances of a service, and the service with its last one."""
    for instance in instances:
        caller.supervisor.remove(instance)
        service.instances.remove(instance)
    if not service.instances:
        caller.state.services.remove(service)
    for instance in instances:
        caller.supervisor.write_hosts(instance.environment_id)
