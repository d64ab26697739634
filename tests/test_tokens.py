"""Tokens and targets: which token is used, which kind it is, and what it opens."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples import demo
from pulse_railway import config, contract, errors
from pulse_railway.options import where
from pulse_railway.railway import program, tokens
from pulse_railway.railway.api import Api
from tests.conftest import set_faults
from tests.net import Backend, ok


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, railway: demo.Stage) -> None:
    for name in list(os.environ):
        if name.startswith("RAILWAY_") and name != "RAILWAY_SCHEMA":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(contract.API_URL_VARIABLE, railway.api)


def kinds(railway: demo.Stage) -> dict[str, str]:
    state = json.loads((railway.root / "state.json").read_text())
    return {t["kind"]: t["value"] for t in state["tokens"]}


def login(home: Path, name: str = "config.json", **user: Any) -> Path:
    path = home / ".railway" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"user": user, "projects": {"kept": 1}}))
    return path


def oauth(railway: demo.Stage, seconds: int) -> dict[str, str]:
    """A CLI login, from the local Railway: there is no browser here to log in with."""
    return dict(railway.local("login", {"seconds": seconds}))


def test_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(errors.Failure, match="no Railway token"):
        tokens.find_token(None)
    login(tmp_path, accessToken="from-login")
    assert tokens.find_token(None) == tokens.Token("from-login", "login", None)
    monkeypatch.setenv("RAILWAY_API_TOKEN", "from-api")
    assert tokens.find_token(None).value == "from-api"
    monkeypatch.setenv("RAILWAY_TOKEN", "from-token")
    assert tokens.find_token(None).value == "from-token"
    assert tokens.find_token("from-flag").value == "from-flag"
    assert "from" not in repr(tokens.find_token("from-flag")).replace("from flag", "")


def test_login_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    login(tmp_path, token="legacy")
    assert found() == "legacy"
    login(tmp_path, "config-staging.json", accessToken="staging")
    login(tmp_path, "config-dev.json", accessToken="dev")
    for name, expected in (("staging", "staging"), ("dev", "dev"), ("", "legacy")):
        monkeypatch.setenv("RAILWAY_ENV", name)
        assert found() == expected
    monkeypatch.setenv("RAILWAY_ENV", "")
    for broken in ("", "[]", '{"user": null}', '{"user": {}}', "{"):
        (tmp_path / ".railway" / "config.json").write_text(broken)
        assert tokens.login() is None


def found() -> str | None:
    token = tokens.login()
    return token.value if token else None


def test_an_expired_login_is_refreshed_and_written_back(
    railway: demo.Stage, tmp_path: Path
) -> None:
    made = oauth(railway, 3600)
    path = login(
        tmp_path,
        accessToken="expired",
        refreshToken=made["refresh_token"],
        tokenExpiresAt=time.time() - 5,
    )
    fresh = found()
    assert fresh not in (None, "expired")
    kept = json.loads(path.read_text())
    assert kept["user"]["accessToken"] == fresh
    assert kept["user"]["refreshToken"] != made["refresh_token"]
    assert kept["user"]["tokenExpiresAt"] > time.time() + 3000
    assert kept["projects"] == {"kept": 1}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert found() == fresh  # not refreshed again
    api = Api(tokens.find_token(None))
    assert config.find_target(api, where({"project": "pulse-local"})).project_id


@pytest.mark.parametrize("said", [None, "3600", 3600, "an hour", 0, -1, [], 1e300, float("inf")])
def test_a_new_login_is_written_down_whatever_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    """By then the old one is used up: not to write the new one down would log the user out."""
    new = {"access_token": "new", "refresh_token": "next", "expires_in": said}
    path = login(tmp_path, accessToken="old", refreshToken="one", tokenExpiresAt=1)
    with Backend(ok(json.dumps(new).encode())) as railway:
        monkeypatch.setenv("PULSE_RAILWAY_API_URL", f"{railway.address}/graphql/v2")
        assert found() == "new"
    kept = json.loads(path.read_text())["user"]
    assert (kept["accessToken"], kept["refreshToken"]) == ("new", "next")
    assert kept["tokenExpiresAt"] == pytest.approx(time.time() + 3600, abs=5)


def test_a_login_that_cannot_be_refreshed(tmp_path: Path) -> None:
    login(tmp_path, accessToken="x", refreshToken="wrong", tokenExpiresAt=1)
    with pytest.raises(errors.Failure, match="railway login"):
        tokens.login()
    login(tmp_path, accessToken="x", tokenExpiresAt=1)
    with pytest.raises(errors.Failure, match="railway login"):
        tokens.login()


def oauth_calls(railway: demo.Stage) -> int:
    return int(railway.local("stats")["fields"].get("oauth", 0))


def test_a_login_is_refreshed_in_the_middle_of_a_run(railway: demo.Stage, tmp_path: Path) -> None:
    """Before: a login with 66 s left and a build of 70 s ended in "Not Authorized"."""
    made = oauth(railway, 2)
    expires = time.time() + 2 + tokens.EXPIRY_MARGIN
    path = login(
        tmp_path,
        accessToken=made["access_token"],
        refreshToken=made["refresh_token"],
        tokenExpiresAt=expires,
    )
    api = Api(tokens.find_token(None))
    asked = where({"project": "pulse-local"})
    assert config.find_target(api, asked)
    time.sleep(2.5)
    assert config.find_target(api, asked)
    assert api.token.value == json.loads(path.read_text())["user"]["accessToken"]
    assert api.token.value != made["access_token"]


def test_a_blip_is_no_expiry(railway: demo.Stage, tmp_path: Path) -> None:
    """Before: a single 502 of the token endpoint was "has expired"."""
    for times, left, ends in ((2, -5, "fresh"), (3, 30, "kept"), (3, -5, "fails")):
        made = oauth(railway, 3600)
        login(
            tmp_path,
            accessToken=made["access_token"],
            refreshToken=made["refresh_token"],
            tokenExpiresAt=time.time() + left,
        )
        set_faults(railway, faults=[{"match": "oauth", "status": 502, "times": times}])
        try:
            if ends == "fails":
                with pytest.raises(
                    errors.Failure, match=r"refreshing it failed: Railway ans.* 502"
                ):
                    tokens.login()
            else:
                assert (found() == made["access_token"]) == (ends == "kept")
        finally:
            set_faults(railway)
        if ends == "fails":  # nothing was lost: the next run refreshes it
            assert found() not in (None, made["access_token"])


def test_a_refresh_token_is_used_once(railway: demo.Stage, tmp_path: Path) -> None:
    """Several runs at once, under the CLI's lock: using it twice logs the user out."""
    made = oauth(railway, 3600)
    login(
        tmp_path,
        accessToken=made["access_token"],
        refreshToken=made["refresh_token"],
        tokenExpiresAt=time.time() - 5,
    )
    before = oauth_calls(railway)
    program = "from pulse_railway.railway import tokens; print(tokens.login().value)"
    runs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    values = {run.communicate(timeout=60)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0] * 4
    assert len(values) == 1
    assert oauth_calls(railway) == before + 1


def test_a_wrong_token_is_told_as_that(railway: demo.Stage) -> None:
    for asked in ({}, {"project": "pulse-local"}, {"project_id": "x"}):
        with pytest.raises(errors.Failure, match=r"Not Authorized.*token from flag"):
            config.find_target(api_with("wrong", "flag"), where(asked))


def test_a_workspace_that_is_unknown_is_refused_everywhere(railway: demo.Stage) -> None:
    known = kinds(railway)
    project = railway.env["RAILWAY_PROJECT_ID"]
    for kind in ("account", "workspace", "project"):
        for asked in ({"project": "pulse-local"}, {"project_id": project}):
            api = api_with(known[kind])
            assert config.find_target(api, where({**asked, "workspace": "local"}))
            for wrong in ({"workspace": "nowhere"}, {"workspace_id": "nowhere"}):
                with pytest.raises(errors.Failure):
                    config.find_target(api, where({**asked, **wrong}))


def api_with(value: str, source: Any = "RAILWAY_TOKEN") -> Api:
    return Api(tokens.Token(value, source))


def test_each_kind_opens_what_it_should(railway: demo.Stage) -> None:
    project, environment = railway.env["RAILWAY_PROJECT_ID"], railway.env["RAILWAY_ENVIRONMENT_ID"]
    known = kinds(railway)
    here = config.Target(project, environment)
    assert config.find_target(api_with(known["project"]), where({})) == here
    for kind in ("account", "workspace"):
        api = api_with(known[kind])
        assert not api.is_project_token
        assert config.find_target(api, where({"project": "pulse-local"})) == here
        assert config.find_target(api, where({"project_id": project})) == here
        with pytest.raises(errors.Failure, match="which project"):
            config.find_target(api_with(known[kind]), where({}))
    oauth_token = oauth(railway, 3600)["access_token"]
    assert (
        config.find_target(api_with(oauth_token, "login"), where({"project": "pulse-local"}))
        == here
    )


def test_which_kind_is_asked_once(railway: demo.Stage) -> None:
    api = api_with(kinds(railway)["project"])
    for _ in range(3):
        config.find_target(api, where({}))
    assert api.calls == 1


def test_a_project_token_opens_nothing_else(railway: demo.Stage) -> None:
    api = api_with(kinds(railway)["project"])
    for asked in (
        {"project": "other"},
        {"project_id": "other"},
        {"environment": "staging"},
        {"environment_id": "other"},
    ):
        with pytest.raises(errors.Failure, match="project token is for"):
            config.find_target(api, where(asked))
    assert config.find_target(api, where({"project": "pulse-local", "environment": "production"}))


def test_flags_before_plugin_before_environment(
    railway: demo.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plugin:
        project: str | None = "pulse-local"
        environment: str | None = None

    api = api_with(kinds(railway)["account"])
    plugin: Any = Plugin()
    assert config.find_target(api, where({}, plugin))
    with pytest.raises(errors.Failure, match="no project is named other"):
        config.find_target(api, where({"project": "other"}, plugin))
    monkeypatch.setenv("RAILWAY_PROJECT_ID", "not-used")
    assert (
        config.find_target(api, where({}, plugin)).project_id == railway.env["RAILWAY_PROJECT_ID"]
    )
    plugin.environment = "nowhere"
    with pytest.raises(errors.Failure, match="no environment is named nowhere"):
        config.find_target(api, where({}, plugin))
    plugin.project = plugin.environment = None
    with pytest.raises(errors.Failure):
        config.find_target(api, where({}, plugin))


def test_a_name_that_several_have(railway: demo.Stage) -> None:
    create = "mutation C($n: String!) { projectCreate(input: { name: $n }) { id } }"
    ids = [railway.graphql(create, n="twin")["projectCreate"]["id"] for _ in range(2)]
    try:
        api = api_with(kinds(railway)["account"])
        with pytest.raises(errors.Failure, match="several projects are named twin") as failure:
            config.find_target(api, where({"project": "twin"}))
        assert all(i in str(failure.value) for i in ids)
        assert config.find_target(api, where({"project_id": ids[0]})).project_id == ids[0]
        with pytest.raises(errors.Failure):
            config.find_target(api, where({"project": "twin", "workspace": "shared-with-me"}))
    finally:
        for i in ids:
            railway.graphql("mutation D($i: String!) { projectDelete(id: $i) }", i=i)


def test_the_cli_gets_one_variable(railway: demo.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAILWAY_TOKEN", "x")
    monkeypatch.setenv("RAILWAY_API_TOKEN", "y")
    known = kinds(railway)
    env = program.cli_environment(api_with(known["project"]))
    assert env["RAILWAY_TOKEN"] == known["project"]
    assert "RAILWAY_API_TOKEN" not in env
    env = program.cli_environment(api_with(known["account"]))
    assert env["RAILWAY_API_TOKEN"] == known["account"]
    assert "RAILWAY_TOKEN" not in env
