"""The Railway token: the janitor alone has it, and its kind is looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse_railway import contract
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure
from pulse_railway.flows import baseline
from pulse_railway.flows.baseline import LOGIN_IS_NOT_DURABLE, NO_PROJECT_TOKEN
from pulse_railway.flows.doctor import WRONG_TOKEN
from pulse_railway.output import Output
from pulse_railway.railway.tokens import Token
from pulse_railway.stack import Service, Stack, require_baseline
from tests.conftest import Project, play

TOKEN = contract.RAILWAY_TOKEN
# without the commands, to which a verb adds its flags
WARNED, REFUSED = (text.partition("`")[0] for text in (NO_PROJECT_TOKEN, WRONG_TOKEN))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("base")
def test_the_token_of_a_stack(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def tokens(project: Project) -> tuple[str, str]:
    """Return the variable of router and janitor."""
    names = ("pulse-router", "pulse-janitor")
    router, janitor = (project.variables(name)[TOKEN] for name in names)
    return router, janitor


def project_token(project: Project, environment: str | None = None) -> str:
    values = {"projectId": project.id, "environmentId": environment or project.environment}
    document = "mutation ($i: ProjectTokenCreateInput!) { projectTokenCreate(input: $i) }"
    created = project.railway.graphql(document, i={**values, "name": "ci"})
    return str(created["projectTokenCreate"])


def login(folder: Path, project: Project) -> dict[str, str]:
    """Return the variables by which a verb has a Railway CLI login, and nothing else."""
    (folder / ".railway").mkdir(exist_ok=True)
    user = {"accessToken": project.env["RAILWAY_API_TOKEN"]}
    (folder / ".railway" / "config.json").write_text(json.dumps({"user": user}))
    return {"RAILWAY_API_TOKEN": "", "HOME": str(folder)}


def checked(project: Project) -> list[tuple[str, str]]:
    """Return what `doctor` says of the janitor's token."""
    checks = project.run("doctor", "main.py", "--json").json["checks"]
    return [(c["verdict"], c["said"]) for c in checks if c["name"] == "the janitor's token"]


def step_01_the_router_has_none(base: Project) -> None:
    """It held the token in its variables and its process, and never read it."""
    account = base.env["RAILWAY_API_TOKEN"]
    assert tokens(base) == (contract.NO_TOKEN, account)
    process = base.railway.local("stats")["pids"]["pulse-router"]
    environ = Path(f"/proc/{process}/environ").read_bytes()
    assert environ
    assert account.encode() not in environ
    assert base.ok("ensure", "main.py")["changed"] == []
    assert base.janitor()["exit"] == 0


def step_02_an_accounts_token_is_warned_about(base: Project) -> None:
    assert WARNED in base.run("ensure", "main.py").err
    assert [verdict for verdict, said in checked(base) if WARNED in said] == ["warning"]


def step_03_a_projects_token_is_kept(base: Project) -> None:
    token = project_token(base)
    base.ok("ensure", "main.py", RAILWAY_TOKEN=token, RAILWAY_API_TOKEN="")
    assert tokens(base) == (contract.NO_TOKEN, token)
    assert checked(base) == [("good", "a project token of this environment")]
    again = base.run("ensure", "main.py")  # with the account's
    assert (again.code, WARNED in again.err) == (0, False)
    assert tokens(base) == (contract.NO_TOKEN, token)
    assert base.janitor()["exit"] == 0


def step_04_doctor_asks_with_it(base: Project) -> None:
    kept = base.variables("pulse-janitor")[TOKEN]
    copy = base.duplicate("beside")
    for wrong in ("nonsense", project_token(base, copy.environment)):
        base.stage.set_variables("pulse-janitor", {TOKEN: wrong})
        assert [verdict for verdict, said in checked(base) if REFUSED in said] == ["bad"]
    base.stage.set_variables("pulse-janitor", {TOKEN: kept})
    copy.delete_environment()


def step_05_an_earlier_stacks_token_is_moved(base: Project, tmp_path: Path) -> None:
    """Also with a login, which cannot be written."""
    kept = base.variables("pulse-janitor")[TOKEN]
    base.stage.set_variables("pulse-router", {TOKEN: kept})
    said = "pulse-router has RAILWAY_TOKEN, which it does not need"
    assert any(said in details for _, details in checked(base))
    changed = base.ok("ensure", "main.py", **login(tmp_path, base))["changed"]
    line = f"pulse-router: RAILWAY_TOKEN (secret) -> {contract.NO_TOKEN}"
    assert [x for x in changed if "TOKEN" in x] == [line]
    assert tokens(base) == (contract.NO_TOKEN, kept)


def step_06_the_placeholder_is_not_passed_on(base: Project, tmp_path: Path) -> None:
    base.stage.set_variables("pulse-janitor", {TOKEN: contract.NO_TOKEN})
    refused = base.run("deploy", "main.py")
    assert "pulse-janitor lacks RAILWAY_TOKEN: run" in refused.error
    refused = base.run("ensure", "main.py", **login(tmp_path, base))
    assert LOGIN_IS_NOT_DURABLE in refused.error
    base.ok("ensure", "main.py")
    assert tokens(base) == (contract.NO_TOKEN, base.env["RAILWAY_API_TOKEN"])


VALUES = st.sampled_from([None, "", contract.NO_TOKEN, "of-project", "of-account", "revoked"])


@given(
    VALUES, VALUES, st.sampled_from(["login", "RAILWAY_API_TOKEN", "RAILWAY_TOKEN"]), st.booleans()
)
def test_what_is_written_is_a_token(
    on_router: str | None, on_janitor: str | None, source: Any, made: bool
) -> None:
    """Whatever is there, the janitor gets no placeholder, and the router nothing else."""

    def service(name: str, token: str | None) -> Service:
        variables = {} if token is None else {TOKEN: token}
        variables |= {contract.TOKEN_MADE: "1"} if made else {}
        variables |= {contract.REDIS_URL: "redis://h", contract.INTERNAL_TOKEN: "i"}
        return Service(name, "", name, "", None, {}, [], None, None, variables)

    names = Names()
    services = {
        names.router: service(names.router, on_router),
        names.janitor: service(names.janitor, on_janitor),
    }
    stack = Stack(Target("p", "e"), names, services)
    api = Mock(token=Token("own-token", source))
    api.scope.return_value = {"environmentId": "e"} if source == "RAILWAY_TOKEN" else None
    api.environment_of.side_effect = lambda token: "e" if token == "of-project" else None
    api.call.return_value = {"projectTokenCreate": "made", "projectTokens": {"edges": []}}
    output = Mock(spec=Output)
    present = [x for x in (on_janitor, on_router) if x not in (None, "", contract.NO_TOKEN)]
    if source == "login" and not (made or present):
        with pytest.raises(Failure, match="a Railway CLI login is not written"):
            baseline.runtime_token(api, stack, False, output)
        return
    token = baseline.runtime_token(api, stack, False, output)
    assert token not in (None, "", contract.NO_TOKEN)
    options = Mock(redis_url=None, app=None, notify=None, redis_prefix=None, runtime_image="i")
    options.cron = options.drain_ttl = options.rollback_window = None
    options.keep = options.router_replicas = None
    router, janitor = baseline.desired(stack, options, token, "i")
    assert router.variables[TOKEN] == contract.NO_TOKEN
    assert janitor.variables[TOKEN] == token
    if present and present[0] == "of-project":
        assert token == ("own-token" if source == "RAILWAY_TOKEN" else "of-project")


def test_a_janitor_with_the_placeholder_is_refused() -> None:
    values = dict.fromkeys((contract.REDIS_URL, contract.INTERNAL_TOKEN, TOKEN), "x")
    values |= {contract.RUNTIME_VERSION: "1"}
    names = Names()
    services = {
        name: Service(name, "", name, "", None, {}, ["d"], None, None, dict(values))
        for name in (names.router, names.env, names.redis, names.janitor)
    }
    services[names.router].variables.pop(TOKEN)  # which only 0.3.x needs
    stack = Stack(Target("p", "e"), names, services)
    require_baseline(stack)
    services[names.janitor].variables[TOKEN] = contract.NO_TOKEN
    with pytest.raises(Failure, match="pulse-janitor lacks RAILWAY_TOKEN"):
        require_baseline(stack)
