"""Project tokens, each of which opens one environment. A project token cannot make others."""

from __future__ import annotations

from typing import Any

from pulse_railway.local.api.access import Caller, need_environment, refuse, refuse_project_token
from pulse_railway.local.api.mutations import mutation
from pulse_railway.local.api.queries import query
from pulse_railway.local.api.views import connection, token_view


@mutation
def projectTokenCreate(caller: Caller, input: dict[str, Any]) -> str:
    refuse_project_token(caller)
    project, environment = need_environment(caller, input["environmentId"])
    if project.id != input["projectId"]:
        raise refuse("Environment not found")
    token = caller.state.new_project_token(project.id, environment.id, input["name"])
    caller.state.tokens.append(token)
    return token.value


@mutation
def projectTokenDelete(caller: Caller, id: str) -> bool:
    refuse_project_token(caller)
    token = next((t for t in caller.state.tokens if t.kind == "project" and t.id == id), None)
    if token is None or token.project_id is None:
        raise refuse("Project Token not found")
    refuse_project_token(caller, token.project_id)
    caller.state.tokens.remove(token)
    return True


@query
def projectTokens(caller: Caller, projectId: str, **_: Any) -> Any:
    refuse_project_token(caller, projectId)
    return connection(
        [token_view(caller, t) for t in caller.state.tokens if t.project_id == projectId]
    )
