"""`doctor` with something missing: it runs the other checks, and prints how to correct each.

test_init.py and test_first_deploy.py run it without problems.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import config, contract, options, runtime_image
from pulse_railway.errors import Failure
from pulse_railway.flows import doctor
from pulse_railway.flows.doctor import Checkup
from pulse_railway.stack import Service, Stack
from tests.conftest import TINY, Project
from tests.net import Backend, ok

Results = dict[str, tuple[str, str]]  # a check's name -> verdict, details


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    shutil.copytree(TINY, folder)
    return folder


def run_doctor(project: Project, *words: str, cwd: Path, **env: str) -> tuple[int, Results]:
    """Run the verb, and return its exit status and results."""
    verb = project.run("doctor", *words, "--json", cwd=cwd, **env)
    assert "checks" in (verb.json or {}), verb.err
    return verb.code, {c["name"]: (c["verdict"], c["said"]) for c in verb.json["checks"]}


def test_a_stack_in_order(base: Project, app: Path) -> None:
    code, results = run_doctor(base, "main.py", cwd=app)
    assert code == 0
    assert "bad" not in {verdict for verdict, _ in results.values()}
    assert (
        results["pulse-router"]
        == results["pulse-janitor"]
        == ("good", runtime_image.runtime_version())
    )
    assert results["the router"][1].endswith("first is active")


def test_without_an_app(base: Project, tmp_path: Path) -> None:
    code, results = run_doctor(base, cwd=tmp_path)
    assert code == 1
    assert results["the app"][0] == "bad"
    assert "which app? pass --app" in results["the app"][1]
    for skipped in ("its files and settings", "React's packages"):
        assert results[skipped] == ("skipped", "after the app")
    assert results["the router"][0] == "good"  # this check needs no app


def test_without_a_token(base: Project, app: Path) -> None:
    code, results = run_doctor(base, "main.py", cwd=app, RAILWAY_API_TOKEN="", HOME=str(app))
    assert code == 1
    assert results["the token"][0] == "bad"
    assert "set RAILWAY_API_TOKEN" in results["the token"][1]
    for skipped in ("Railway's CLI", "the project", "the baseline", "the router"):
        assert results[skipped] == ("skipped", "after the token")
    assert results["the app"][0] == "good"


def test_without_a_project(base: Project, app: Path) -> None:
    code, results = run_doctor(base, "main.py", "--project", "nope", cwd=app)
    assert code == 1
    assert "no project is named nope" in results["the project"][1]
    assert results["the baseline"] == results["the router"] == ("skipped", "after the project")


def test_without_railways_cli(base: Project, app: Path) -> None:
    code, results = run_doctor(base, "main.py", cwd=app, PATH="/usr/bin:/bin")
    assert code == 1
    assert results["Railway's CLI"][0] == "bad"
    assert "`railway` is not on PATH" in results["Railway's CLI"][1]
    assert results["the router"] == ("skipped", "after Railway's CLI")


def test_image_mode_by_the_janitor_needs_docker_alone(base: Project, app: Path) -> None:
    words = ["main.py", "--image-repository", "registry.example/x", "--control", "job"]
    _, results = run_doctor(base, *words, cwd=app, PATH="/usr/bin:/bin")
    assert results["docker"][0] == (
        "good" if shutil.which("docker", path="/usr/bin:/bin") else "bad"
    )
    assert "Railway's CLI" not in results


def test_without_railways_api(base: Project, app: Path) -> None:
    code, results = run_doctor(
        base, "main.py", cwd=app, PULSE_RAILWAY_API_URL="http://127.0.0.1:9/x"
    )
    assert code == 1
    assert results["the token"][0] == "bad"
    assert "Railway's API is not reachable" in results["the token"][1]


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"dependencies": null}', None])
def test_a_package_json_without_pulse(base: Project, app: Path, text: str | None) -> None:
    package = app / "web" / "package.json"
    package.unlink(missing_ok=True)
    if text is not None:
        package.write_text(text)
    parsed = options.parse_deploy({"app": "main.py", "context": str(app)}, doctor.Warnings())
    checkup = Checkup()
    doctor.check_react(checkup, parsed)
    assert [check.verdict for check in checkup.checks] == ["warning"]
    assert checkup.checks[0].said == f"{package} names no pulse-ui-client"


def test_a_client_from_a_workspace_and_pages_without_the_script(base: Project, app: Path) -> None:
    web = app / "web"
    (web / "app").mkdir(exist_ok=True)
    (web / "app" / "root.tsx").write_text("<head />")
    client = {"pulse-ui-client": "workspace:*"}  # as in Pulse's own examples
    (web / "package.json").write_text(json.dumps({"dependencies": client}))
    parsed = options.parse_deploy({"app": "main.py", "context": str(app)}, doctor.Warnings())
    checkup = Checkup()
    doctor.check_react(checkup, parsed)
    assert [check.verdict for check in checkup.checks] == ["warning", "warning"]
    assert "does not load /_pulse/railway/affinity.js" in checkup.checks[0].said
    assert "pulse-ui-client is workspace:*" in checkup.checks[1].said


def test_a_clock_that_is_wrong() -> None:
    with Backend(ok(b"{}", f"date: {formatdate(time.time() - 3600, usegmt=True)}")) as railway:
        with pytest.raises(Failure, match=r"this machine's clock is 36\d\d s off: set it"):
            doctor.check_clock(railway.address)
        railway.answer = ok(b"{}", f"date: {formatdate(usegmt=True)}")
        doctor.check_clock(railway.address)
        for lines in ([], ["date: the other day"]):
            railway.answer = ok(b"{}", *lines)
            doctor.check_clock(railway.address)


def test_a_router_of_another_version() -> None:
    args: Any = ["i", "i", "pulse-router", "", None, {}, [], None, None]
    args.append({contract.RUNTIME_VERSION: "another"})
    router = Service(*args)
    installed = {contract.RUNTIME_VERSION: runtime_image.runtime_version()}
    janitor = replace(router, name="pulse-janitor", variables=installed)
    services = {s.name: s for s in (router, janitor)}
    checkup = Checkup()
    doctor.check_versions(checkup, Stack(config.Target("p", "e"), config.Names(), services))
    assert [(c.name, c.verdict) for c in checkup.checks] == [
        ("pulse-router", "warning"),
        ("pulse-janitor", "good"),
    ]
    assert checkup.checks[0].said.startswith("pulse-router runs another, and this is ")
    assert checkup.checks[0].said.endswith("`pulse-railway ensure` updates it")


def test_printed_warnings(base: Project, app: Path) -> None:
    (app / "railway.toml").write_text("")
    (app / ".railway").mkdir()
    (app / ".railway" / "railway.ts").write_text("")
    verb = base.run("doctor", "main.py", cwd=app)
    assert verb.code == 0, verb.err
    assert "! Railway's configuration files: railway.toml has no effect on these" in verb.out
    assert verb.out.count("railway.toml") == 1
    assert 'Add this to it first: export const partial = "site"' in verb.out


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, ""),
        ({"maxmemory": 0, "maxmemory_policy": "allkeys-lru", "save": "60 1"}, ""),
        ({"maxmemory": 100, "maxmemory_policy": "allkeys-lru"}, "is allkeys-lru: it can evict"),
        ({"maxmemory": 100, "maxmemory_policy": "volatile-lru", "used_memory": 20}, ""),
        ({"maxmemory": 2**20, "used_memory": 2**20 - 1}, "99 % of maxmemory are used (1 MB)"),
        ({"save": "", "aof_enabled": 0}, "do not outlive a restart"),
        ({"save": "", "aof_enabled": 1}, ""),
    ],
)
def test_a_redis_that_can_lose_the_state(facts: dict[str, Any], says: str) -> None:
    warnings = doctor.redis_warnings(facts)
    assert len(warnings) == bool(says)
    assert says in "".join(warnings)
