"""The environments that a change of a service acts on, and the removal of its instances."""

from __future__ import annotations

from pulse_railway.local.api.access import Caller, need_environment, refuse
from pulse_railway.local.state import Environment, Instance, Project, Service


def affected_environments(
    caller: Caller, project: Project, environment_id: str | None
) -> list[Environment]:
    """Return the environments that `serviceCreate`, `serviceInstanceUpdate` or `serviceDelete`
    acts on.

    With an environment's id that is this environment, as Railway's CLI describes it. Without one,
    or by the rule `every_environment`, those are all that are no forks, as the schema says. Raises
    Railway's error if the token does not reach one of them.
    """
    no_forks = [environment for environment in project.environments if not environment.is_fork]
    if environment_id is None:
        for environment in no_forks:
            need_environment(caller, environment.id)
        return no_forks
    owner, environment = need_environment(caller, environment_id)
    if owner is not project:
        raise refuse("Environment not found")
    if caller.rules.every_environment and environment in no_forks:
        return no_forks
    return [environment]


def remove_instances(caller: Caller, service: Service, instances: list[Instance]) -> None:
    """Remove instances of a service, and the service if none is left."""
    for instance in instances:
        caller.supervisor.remove(instance)
        service.instances.remove(instance)
    if not service.instances:
        caller.state.services.remove(service)
    for instance in instances:
        caller.supervisor.write_hosts(instance.environment_id)
    caller.supervisor.delete_unused_uploads()
