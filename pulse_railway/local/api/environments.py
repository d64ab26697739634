"""The mutations that create, duplicate, patch and delete environments."""

from __future__ import annotations

import copy
from typing import Any

from pulse_railway.local import state as model
from pulse_railway.local.api.access import (
    Caller,
    need_environment,
    need_project,
    refuse,
    refuse_project_token,
)
from pulse_railway.local.api.mutations import mutation
from pulse_railway.local.api.patch import apply_patch, config_of
from pulse_railway.local.api.views import environment_view, staged_view
from pulse_railway.local.state import Environment


@mutation
async def environmentCreate(caller: Caller, input: dict[str, Any]) -> Any:
    """Create an empty environment, or a copy of `sourceEnvironmentId`.

    The copy's changes are committed, or with `stageInitialChanges` staged.
    """
    refuse_project_token(caller)
    project = need_project(caller, input["projectId"])
    if any(e.name == input["name"] for e in project.environments):
        raise refuse(f'Environment named "{input["name"]}" already exists')
    source_id = input.get("sourceEnvironmentId")
    source = next((e for e in project.environments if e.id == source_id), None)
    if source_id and source is None:
        raise refuse("Environment not found")
    created = Environment(
        model.new_id(), input["name"], ephemeral=bool(input.get("ephemeral")), copy_of=source_id
    )
    project.environments.append(created)
    if source:
        patch = copy.deepcopy(config_of(caller, source))
        if input.get("stageInitialChanges"):
            created.staged = patch
        else:
            await apply_patch(caller, created, patch, deploys=not input.get("skipInitialDeploys"))
    return environment_view(caller, project, created)


@mutation
async def environmentDelete(caller: Caller, id: str) -> bool:
    project, environment = need_environment(caller, id)
    if len(project.environments) == 1:
        raise refuse("Cannot delete the last environment of a project")
    await delete_environment(caller, environment.id)
    project.environments.remove(environment)
    return True


@mutation
async def projectDelete(caller: Caller, id: str) -> bool:
    refuse_project_token(caller)
    project = need_project(caller, id)
    for environment in project.environments:
        await delete_environment(caller, environment.id)
    caller.state.projects.remove(project)
    return True


async def delete_environment(caller: Caller, environment_id: str) -> None:
    """Delete all that an environment contains, and the tokens that open it."""
    state = caller.state
    await caller.supervisor.remove_environment(environment_id)
    for service, instance in list(state.instances(environment_id)):
        service.instances.remove(instance)
        if not service.instances:
            state.services.remove(service)
    caller.supervisor.delete_unused_uploads()
    state.tokens = [t for t in state.tokens if t.environment_id != environment_id]


@mutation
async def environmentPatchCommit(
    caller: Caller,
    environmentId: str,
    patch: dict[str, Any] | None = None,
    commitMessage: str | None = None,
) -> str:
    _, environment = need_environment(caller, environmentId)
    await apply_patch(caller, environment, patch or {})
    return model.new_id()


@mutation
def environmentStageChanges(
    caller: Caller, environmentId: str, input: dict[str, Any], merge: bool | None = None
) -> Any:
    _, environment = need_environment(caller, environmentId)
    environment.staged = _deep_merge(environment.staged, input) if merge else input
    return staged_view(environment)


@mutation
async def environmentPatchCommitStaged(
    caller: Caller,
    environmentId: str,
    commitMessage: str | None = None,
    skipDeploys: bool | None = None,
) -> str:
    _, environment = need_environment(caller, environmentId)
    await apply_patch(caller, environment, environment.staged, deploys=not skipDeploys)
    environment.staged = {}
    return model.new_id()


def _deep_merge(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{k: _deep_merge(old.get(k), v) for k, v in new.items()}}
