"""Stacks with other settings than the default: external Redis, published images, other names."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import contract
from pulse_railway.config import Names, Target, Where
from pulse_railway.flows.baseline import Configured, configured
from pulse_railway.local.supervisor import free_port
from pulse_railway.options import BaselineOptions
from pulse_railway.stack import Service, Stack
from tests.conftest import BASE, ROOT, TINY, Project, Redis
from tests.net import ask, eventually, listens

DOCKER = """#!/bin/sh
# Replaces docker, whose daemon does not run here: records its arguments and environment.
[ "$*" = "buildx version" ] && exit
printf '%s\\n' "$*" >> "$DOCKER_LOG"
env | sort >> "$DOCKER_LOG.env"
while [ $# -gt 1 ]; do
    [ "$1" = -t ] && image=$2
    [ "$1" = --metadata-file ] && metadata=$2
    shift
done
[ -n "$DOCKER_FAILS" ] && { echo "ERROR: failed to solve"; exit 17; }
echo "#1 building $image"
echo '{"containerimage.digest": "sha256:'"$(printf '%064d' 7)"'"}' > "$metadata"
"""


@pytest.fixture
def docker(tmp_path: Path) -> dict[str, str]:
    """The folder of a `docker` that records its arguments, and its file."""
    folder = tmp_path / "docker-bin"
    folder.mkdir()
    script = folder / "docker"
    script.write_text(DOCKER)
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return {"folder": str(folder), "DOCKER_LOG": str(tmp_path / "docker.log")}


def with_docker(project: Project, docker: dict[str, str]) -> dict[str, str]:
    path = docker["folder"] + os.pathsep + project.env["PATH"]
    return {"PATH": path, "DOCKER_LOG": docker["DOCKER_LOG"]}


def test_external_redis(new_project: Callable[[], Project]) -> None:
    server = Redis()
    try:
        project = new_project()
        url = server.url + "/3"
        project.ok("ensure", "main.py", "--redis-url", url)
        assert project.services == {"pulse-router", "pulse-env", "pulse-janitor"}
        assert project.variables("pulse-router")["REDIS_URL"] == url
        assert project.ok("ensure", "main.py", "--redis-url", url)["changed"] == []
        assert project.ok("ensure", "main.py")["changed"] == []
        project.deploy("one")
        refused = project.run("ensure", "main.py", "--redis-url", server.url + "/4")
        assert refused.code == 1
        assert "another Redis" in refused.error
        assert url not in refused.err
    finally:
        server.stop()


def test_a_projects_redis_cannot_be_replaced_by_an_external_one(
    new_project: Callable[[], Project],
) -> None:
    project = new_project()
    project.ok("ensure", "main.py")
    refused = project.run("ensure", "main.py", "--redis-url", "redis://elsewhere:6379")
    assert (refused.code, "another Redis" in refused.error) == (1, True)
    raw = project.variables("pulse-router")["REDIS_URL"]
    assert raw == "${{pulse-redis.REDIS_URL}}"  # a reference, so the password stays on Railway


PATCH = """
mutation Move($environment: String!, $patch: EnvironmentConfig!) {
  environmentPatchCommit(environmentId: $environment, patch: $patch)
}
"""


def instances(project: Project) -> dict[str, dict[str, Any]]:
    """Return each service's instance in the local Railway's state."""
    state = json.loads((project.railway.root / "state.json").read_text())
    return {
        s["name"]: next(i for i in s["instances"] if i["environment_id"] == project.environment)
        for s in state["services"]
        if s["project_id"] == project.id
    }


def test_ensure_restores_groups_and_managed_settings(new_project: Callable[[], Project]) -> None:
    """All services are in the router's group on Railway's canvas. A second `ensure` has once reset
    what the flags of the first had set."""
    project = new_project()
    flags = ["--keep", "2", "--drain-ttl-seconds", "7200"]
    flags += ["--janitor-cron-schedule", "*/10 * * * *"]
    project.ok("ensure", "main.py", *flags)
    project.deploy("one")
    before = instances(project)
    assert set(before) == {*BASE, "one"}
    groups = {instance["group_id"] for instance in before.values()}
    assert len(groups) == 1
    assert groups != {None}
    assert before["pulse-janitor"]["settings"]["cronSchedule"] == "*/10 * * * *"
    assert before["pulse-router"]["settings"]["healthcheckPath"] == "/healthz"
    assert before["one"]["settings"]["healthcheckPath"] == "/_pulse/health"
    assert project.ok("ensure", "main.py")["changed"] == []

    ids = {name: instance["service_id"] for name, instance in before.items()}
    moved = {ids[name]: {"groupId": None} for name in ("pulse-redis", "one")}
    changed = {ids["pulse-janitor"]: {"deploy": {"cronSchedule": "0 * * * *"}}}
    patch = {"services": {**moved, **changed}}
    project.railway.graphql(PATCH, environment=project.environment, patch=patch)
    assert instances(project)["one"]["group_id"] is None
    changes = project.ok("ensure", "main.py")["changed"]
    assert len(changes) == 4, changes  # with the janitor's deployment
    after = instances(project)
    assert {instance["group_id"] for instance in after.values()} == groups
    assert after["pulse-janitor"]["settings"]["cronSchedule"] == "*/10 * * * *"
    assert project.active == "one"
    changes = project.ok("ensure", "main.py", "--keep", "3", "--plan")["planned"]
    assert "pulse-janitor: PULSE_RAILWAY_KEEP 2 -> 3" in changes
    assert not [line for line in changes if "DRAIN_TTL" in line or "cronSchedule" in line]


def service(name: str, settings: dict[str, Any], **variables: str) -> Service:
    return Service(name, "", name, "", None, settings, [], None, None, variables)


def test_what_a_stack_was_set_up_with_is_kept() -> None:
    options = BaselineOptions(Where(), Names())
    empty = Stack(Target("p", "e"), Names(), {})
    defaults = Configured("*/5 * * * *", 86_400, 900, 0, 1)
    assert configured(empty, options) == defaults
    # of an earlier version: without records
    router = service("pulse-router", {"numReplicas": 3}, PULSE_RAILWAY_DRAIN_TTL_SECONDS="60")
    janitor = service("pulse-janitor", {"cronSchedule": "0 * * * *"}, PULSE_RAILWAY_KEEP="4")
    stack = Stack(Target("p", "e"), Names(), {"pulse-router": router, "pulse-janitor": janitor})
    assert configured(stack, options) == Configured("0 * * * *", 60, 900, 4, 3)
    given = replace(options, cron="*/6 * * * *", keep=0, router_replicas=2)
    assert configured(stack, given) == Configured("*/6 * * * *", 60, 900, 0, 2)
    # what was set up counts before settings that were changed by hand
    router.variables |= configured(stack, given).records
    assert configured(stack, options) == Configured("*/6 * * * *", 60, 900, 0, 2)
    del stack.services["pulse-janitor"]  # deleted by hand
    assert configured(stack, options) == Configured("*/6 * * * *", 60, 900, 0, 2)
    router.variables |= {contract.CRON: "* * * * *", contract.KEEP: "all"}
    assert configured(stack, options) == Configured("*/5 * * * *", 60, 900, 0, 2)


DEPLOY = """
mutation Deploy($service: String!, $environment: String!) {
  serviceInstanceDeployV2(serviceId: $service, environmentId: $environment)
}
"""


def test_metrics_on_the_private_network(new_project: Callable[[], Project]) -> None:
    """A variable of the router's service enables them after a redeploy; `ensure` keeps it."""
    project, port = new_project(), free_port()
    project.ok("ensure", "main.py")
    project.deploy("one")
    variables = {"PULSE_RAILWAY_METRICS_PORT": str(port), "PULSE_RAILWAY_ACCESS_LOG": "1"}
    project.stage.set_variables("pulse-router", variables)
    service = project.stage.services()["pulse-router"]["serviceId"]
    project.railway.graphql(DEPLOY, service=service, environment=project.environment)
    eventually(lambda: listens(port), 30)
    eventually(lambda: project.get("/_pulse/meta")["deployment_id"] == "one")
    counted = 'pulse_router_sessions{deployment="one"} 0'
    eventually(lambda: counted in ask(port, "/metrics").body.decode())
    active = 'pulse_router_deployments{state="active"} 1'
    eventually(lambda: active in ask(port, "/metrics").body.decode())
    assert project.ok("ensure", "main.py")["changed"] == []
    assert project.variables("pulse-router").items() >= variables.items()
    log = project.run("logs", "--service", "pulse-router").out
    assert "GET /_pulse/meta 200" in log


def test_service_prefix(new_project: Callable[[], Project], tmp_path: Path) -> None:
    import shutil

    app = tmp_path / "app"
    shutil.copytree(TINY, app)
    text = (app / "main.py").read_text()
    (app / "main.py").write_text(
        text.replace("RailwayPlugin(\n", "RailwayPlugin(\n    service_prefix='shop',\n")
    )
    (app / ".railway").mkdir()
    (app / ".railway" / "railway.py").write_text("import railway_sdk\n")
    project = new_project()
    first = project.run("ensure", "main.py", cwd=app)
    assert first.code == 0
    assert "the next `railway config apply` deletes" in " ".join(first.err.split())
    assert project.services == {"shop-router", "shop-env", "shop-redis", "shop-janitor"}
    verb = project.run("deploy", "main.py", "--deployment-id", "one", "--json", cwd=app)
    assert verb.code == 0, verb.err
    assert verb.json["service_name"] == "shop-one"
    assert project.run("status", "--service-prefix", "shop", "--json").json["active"] == "one"


def test_image_mode(new_project: Callable[[], Project], docker: dict[str, str]) -> None:
    project = new_project()
    env = with_docker(project, docker)
    project.ok("ensure", "main.py")
    images = project.railway.root / "images.json"
    known = {"registry.example/team/app:img-1": {"cwd": str(TINY)}}
    images.write_text(json.dumps(known))
    verb = project.run(
        "deploy",
        "main.py",
        "--deployment-id",
        "img-1",
        "--image-repository",
        "registry.example/team/app",
        "--build-arg",
        "TOKEN=very-secret-argument",
        "--json",
        **env,
    )
    assert verb.code == 0, verb.err
    assert verb.json["image"] == "registry.example/team/app:img-1"
    assert verb.json["digest"] == f"sha256:{7:064d}"
    command = Path(docker["DOCKER_LOG"]).read_text()
    assert command.startswith("buildx build --push --platform linux/amd64")
    assert f"-f {TINY / 'Dockerfile'}" in command
    assert "--build-arg PULSE_APP_FILE --build-arg PULSE_SERVER_ADDRESS" in command
    assert "very-secret-argument" not in command
    environment = Path(docker["DOCKER_LOG"] + ".env").read_text()
    assert "TOKEN=very-secret-argument" in environment
    assert "PULSE_APP_FILE=main.py" in environment
    assert project.get("/_pulse/meta")["deployment_id"] == "img-1"
    # a build that fails creates nothing
    verb = project.run(
        "deploy",
        "main.py",
        "--deployment-id",
        "img-2",
        "--image-repository",
        "registry.example/team/app",
        **env,
        DOCKER_FAILS="1",
    )
    assert verb.code == 1
    assert "failed to solve" in verb.err
    assert "img-2" not in project.services
    # an image that was not pushed fails, and its service is removed
    verb = project.run(
        "deploy",
        "main.py",
        "--deployment-id",
        "img-3",
        "--image-repository",
        "registry.example/team/app",
        **env,
    )
    assert verb.code == 1
    assert "image not found" in verb.err
    assert "img-3" not in project.services


def test_a_published_runtime_image(
    new_project: Callable[[], Project], docker: dict[str, str]
) -> None:
    project = new_project()
    pushed = project.run(
        "image",
        "--repository",
        "registry.example/team/pulse-railway",
        "--tag",
        "t1",
        "--json",
        **with_docker(project, docker),
    )
    assert pushed.code == 0, pushed.err
    reference = pushed.json["image"]
    assert reference == "registry.example/team/pulse-railway:t1"
    assert f"-f {ROOT / 'Dockerfile.router'} {ROOT}" in Path(docker["DOCKER_LOG"]).read_text()
    (project.railway.root / "images.json").write_text(json.dumps({reference: {"cwd": str(ROOT)}}))
    project.ok("ensure", "main.py", "--runtime-image", reference)
    assert project.ok("ensure", "main.py", "--runtime-image", reference)["changed"] == []
    project.deploy("one")
    changed = project.ok("ensure", "main.py")["changed"]  # back to the packaged sources
    assert any("built from pulse-railway's sources" in line for line in changed)
    assert project.get("/_pulse/meta")["deployment_id"] == "one"


def test_no_secret_is_shown(new_project: Callable[[], Project], tmp_path: Path) -> None:
    """No secret is in a verb's output, a log, or a subprocess's arguments."""
    project = new_project()
    log = tmp_path / "arguments.log"
    real = Path(project.railway.root) / "bin" / "railway"
    folder = tmp_path / "spy-bin"
    folder.mkdir()
    spy = folder / "railway"
    spy.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\nexec {real} "$@"\n')
    spy.chmod(0o755)
    env = {"PATH": str(folder) + os.pathsep + project.env["PATH"]}
    outputs = []

    def run(*arguments: str) -> None:
        verb = project.run(*arguments, **env)
        outputs.append(verb.out + verb.err)
        assert verb.code == 0, verb.err

    run("ensure", "main.py", "--token", project.env["RAILWAY_API_TOKEN"])
    project.stage.set_variables("pulse-env", {"DATABASE_URL": "postgres://u:marked-secret-1@h/d"})
    run("ensure", "main.py", "--plan", "--json", "--drain-ttl-seconds", "77")
    run("deploy", "main.py", "--deployment-id", "a", "--env", "KEY=marked-secret-2", "--json")
    run("deploy", "main.py", "--deployment-id", "b", "--build-arg", "ARG=marked-secret-3")
    run("status", "--json")
    run("status")
    run("rollback")
    run("promote", "--deployment-id", "b")
    run("redeploy", "--json")
    run("logs", "--build")
    run("logs", "--service", "pulse-router")
    run("logs", "--service", "pulse-janitor")
    run("delete", "--deployment-id", "a", "--json")
    project.faults({"match": "environment", "error": f"bad {project.env['RAILWAY_API_TOKEN']}"})
    failed = project.run("status", **env)
    project.faults()
    outputs.append(failed.out + failed.err)
    router = project.variables("pulse-router")
    password = project.variables("pulse-redis")["REDIS_PASSWORD"]
    secrets = [
        project.env["RAILWAY_API_TOKEN"],
        router["PULSE_RAILWAY_INTERNAL_TOKEN"],
        password,
        "marked-secret-1",
        "marked-secret-2",
        "marked-secret-3",
    ]
    everything = "\n".join(outputs) + log.read_text()
    ids = {s["serviceId"] for s in project.stage.services().values()}
    state = json.loads((project.railway.root / "state.json").read_text())
    for deployment in state["deployments"]:
        if deployment["service_id"] in ids:
            for path in (project.railway.root / "logs").glob(f"{deployment['id']}.*"):
                everything += path.read_text()
    for secret in secrets:
        assert secret not in everything
    assert "ssh" in log.read_text()


def test_list_is_fast_and_help_has_no_escapes(project: Project) -> None:
    began = time.monotonic()
    verb = project.run("--list")
    assert verb.code == 0
    assert time.monotonic() - began < 1.0  # 0.2 s alone; the machine is shared
    for name in ("deploy", "ensure", "rollback", "janitor.run"):
        assert name in verb.out
    help_run = project.run("deploy", "--help")
    assert "--image-repository" in help_run.out
    assert "\x1b" not in help_run.out


def test_a_login_creates_no_baseline_and_can_update_one(
    base: Project, new_project: Callable[[], Project], tmp_path: Path
) -> None:
    """The login expires within an hour, after which the janitor would have no token."""
    login = {"user": {"accessToken": base.env["RAILWAY_API_TOKEN"]}}
    folder = tmp_path / ".railway"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(login))
    env = {"RAILWAY_API_TOKEN": "", "HOME": str(tmp_path)}
    empty = new_project()
    refused = empty.run("ensure", "main.py", **env)
    assert refused.code == 1
    assert "a Railway CLI login is not written into the janitor" in refused.error
    assert empty.services == set()
    kept = base.ok("ensure", "main.py", **env)
    assert kept["changed"] == []
    assert base.variables("pulse-janitor")["RAILWAY_TOKEN"] == base.env["RAILWAY_API_TOKEN"]
