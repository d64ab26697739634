"""Services of a stack that were deleted on Railway, and the command that restores them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import contract
from pulse_railway.config import Names, Target
from pulse_railway.stack import Service, Stack, can_create_missing, missing_name, partial
from tests.conftest import TINY, Project, play, zygote
from tests.net import eventually
from tests.test_local_environments import delete

# a verb that kills itself after its n-th mutation
KILLED = """
import os, sys
from pulse_railway import cli
from pulse_railway.railway.api import Api
last, call, writes = int(sys.argv[1]), Api.call, []
def counted(self, document, **variables):
    answer = call(self, document, **variables)
    writes.append(document) if document.lstrip().startswith("mutation") else None
    if len(writes) == last:
        os.kill(os.getpid(), 9)
    return answer
Api.call = counted
cli.main(sys.argv[2:])
"""


def killed(project: Project, *words: str, after: int = 1, **env: str) -> bool:
    """Run a verb that is killed after so many mutations. Returns False if it finished before."""
    command = ["-c", KILLED, str(after), *words]
    done = zygote().run("python", command, {**project.env, **env}, TINY, 120)
    assert done.returncode in (0, -9), done.stderr
    time.sleep(1)  # a template's services appear after the call, and an ensure before adds others
    return done.returncode != 0


def remove(project: Project, *names: str) -> None:
    """Delete services, as on Railway's page."""
    services = project.stage.services()
    for name in names:
        delete(project, services[name]["serviceId"])


def running(project: Project, *but: str) -> dict[str, str]:
    """Return each service's deployment, except of env and `but`."""
    names = project.services - {"edge-env", *but}
    return {name: project.latest(name)["id"] for name in names}


def ensure(project: Project, *words: str) -> Any:
    return project.run("ensure", "main.py", *words)


@pytest.fixture(scope="module")
def edge(project: Project) -> Project:
    """A stack with a prefix in its names, and a variable of the user."""
    project.ok("ensure", "main.py", "--service-prefix", "edge")
    project.stage.set_variables("edge-env", {"API_KEY": "k"})
    project.deploy("first")
    return project


def test_deleted_services_are_created_again(edge: Project, request: Any) -> None:
    play(globals(), request)


def step_01_the_janitor(edge: Project) -> None:
    """The message has once advised to delete the router, and thus its address."""
    before, token = running(edge, "edge-janitor"), edge.variables("edge-router")
    remove(edge, "edge-janitor")
    status = edge.ok("status")
    said = "edge-janitor of this stack is missing: `pulse-railway ensure --repair` creates it again"
    assert (status["problem"], status["missing"]) == (said, ["edge-janitor"])
    with_app = said.replace("--repair`", "--repair --app main.py`")
    assert with_app in edge.run("deploy", "main.py").error
    assert with_app in edge.run("scaffold", "main.py").error
    refused = ensure(edge)  # as the requirements say of a partial baseline
    assert refused.code == 1
    assert with_app in refused.error
    plan = edge.ok("ensure", "main.py", "--repair", "--plan")["planned"]
    assert plan[0] == "edge-janitor: create"
    assert "edge-janitor" not in edge.services
    done = ensure(edge, "--repair")
    assert done.code == 0, done.err
    assert "edge-janitor: create" in done.err
    assert running(edge, "edge-janitor") == before
    assert edge.variables("edge-router") == token
    assert edge.ok("ensure", "main.py")["changed"] == []
    assert edge.ok("status")["problems"] == []
    assert edge.janitor("edge-janitor")["exit"] == 0


def step_02_the_env_service(edge: Project) -> None:
    before, router = running(edge), edge.variables("edge-router")
    remove(edge, "edge-env")
    lost = "the variables of edge-env are lost; deployments refer to API_KEY"
    said = (
        "edge-env of this stack is missing: `pulse-railway ensure --repair` creates it again; "
        + lost
    )
    assert edge.ok("status")["problem"].startswith(said)
    done = ensure(edge, "--repair")
    assert done.code == 0, done.err
    assert f"warning: {lost}" in done.err
    assert "API_KEY" not in edge.variables("edge-env")
    assert (running(edge), edge.variables("edge-router")) == (before, router)
    assert edge.ok("ensure", "main.py")["changed"] == []
    # the new env service is not taken for an incomplete answer of Railway
    assert edge.ok("promote", "--deployment-id", "first")["active"]
    warned = edge.run("deploy", "main.py", "--deployment-id", "second")
    assert "warning: edge-env has no API_KEY, which first refers to" in warned.err
    edge.stage.set_variables("edge-env", {"API_KEY": "k"})
    edge.deploy("third")
    assert edge.variables("edge-third")["API_KEY"] == "${{edge-env.API_KEY}}"
    assert edge.ok("status")["problems"] == []


def step_03_killed_after_each_write(edge: Project) -> None:
    before = running(edge, "edge-janitor")
    remove(edge, "edge-env", "edge-janitor")
    assert "edge-env, edge-janitor of this stack are missing" in edge.ok("status")["problem"]
    runs = 0
    window = ("--rollback-window-seconds", "0")
    while killed(edge, "ensure", "main.py", "--repair", *window):
        runs += 1
        assert runs < 15
    assert runs > 3
    assert edge.ok("ensure", "main.py")["changed"] == []
    assert running(edge, "edge-janitor") == before
    edge.stage.set_variables("edge-env", {"API_KEY": "k"})
    assert edge.ok("status")["problems"] == []
    eventually(lambda: edge.janitor("edge-janitor")["exit"] == 0)


def step_04_the_router(edge: Project) -> None:
    """`ensure` has once created a second baseline, with the default names."""
    remove(edge, "edge-router")
    rest = ("edge-env", "edge-janitor", "edge-redis")
    said = f"{', '.join(rest)} belonged to a router that is gone: delete {', '.join(rest)}"
    run = "`pulse-railway scaffold --service-prefix edge`"
    problem = edge.ok("status")["problem"]
    assert f"{said} on Railway and run {run}" in problem
    assert "all sessions and the routing state; 1 variables of edge-env" in problem
    assert f"{said} on Railway and run `pulse-railway scaffold" in ensure(edge).error
    remove(edge, *rest)
    made = edge.run(
        "scaffold", "main.py", "--service-prefix", "edge", "--rollback-window-seconds", "0"
    )
    assert "third ran under a baseline that is gone" in made.err
    assert "`pulse-railway restore --deployment-id ...`" in edge.ok("status")["problem"]
    assert edge.ok("restore", "--deployment-id", "third")["active"] == "third"
    assert edge.get("/_pulse/meta")["deployment_id"] == "third"


def step_05_railways_own_file_in_a_folder_above(edge: Project, tmp_path: Path) -> None:
    """Its next apply would delete the services that `ensure` creates."""
    folder = tmp_path / "services" / "site"
    shutil.copytree(TINY, folder)
    file = tmp_path / ".railway" / "railway.ts"
    file.parent.mkdir()
    for text, warns in (("export default x", True), ('export const partial = "site"', False)):
        file.write_text(text)
        for verb in (["ensure", "main.py", "--plan"], ["doctor", "main.py"]):
            run = edge.run(*verb, cwd=folder)
            assert (f"{file} lists the whole project" in run.out + run.err) == warns


# -- without a Railway -----------------------------------------------------------------------------


def a_stack(without: str, **of_router: str) -> Stack:
    names = ("pulse-router", "pulse-env", "pulse-redis", "pulse-janitor")
    services = {n: Service(n, "", n, "", None, {}, [], None, None) for n in names if n != without}
    for service in services.values():
        service.variables = {contract.STACK: "e/pulse-router"}
    services["pulse-router"].variables |= of_router
    return Stack(Target("p", "e"), Names(), services)


def test_services_are_created_again_only_for_a_stack_that_is_known() -> None:
    assert can_create_missing(a_stack("pulse-janitor"))
    assert can_create_missing(a_stack("pulse-env"))
    assert not can_create_missing(a_stack(""))
    assert not can_create_missing(a_stack("pulse-redis"))
    assert not can_create_missing(a_stack("pulse-env", **{contract.STACK: ""}))  # 0.3.x's
    unstamped = a_stack("pulse-env")
    unstamped.services["pulse-redis"].variables = {}
    assert not can_create_missing(unstamped)
    renamed = a_stack("pulse-janitor")
    renamed.services["sweeper"] = renamed.services["pulse-env"].__class__(
        "s", "", "sweeper", "", None, {}, [], None, None, {contract.STACK: "e/pulse-router"}
    )
    assert not can_create_missing(renamed)
    assert "If what is missing has another name" in partial(renamed)


@pytest.mark.parametrize(
    ("router", "names", "former", "name"),
    [
        ("pulse-router", Names(), None, "pulse-env"),
        ("edge-router", Names(), None, "edge-env"),
        ("edge-router", Names(), "vars", "vars"),
        ("edge-router", Names(env="own"), "vars", "own"),
        ("edge", Names(), None, "pulse-env"),
    ],
)
def test_the_name_of_a_missing_service(
    router: str, names: Names, former: str | None, name: str
) -> None:
    assert missing_name(router, names, "env", former) == name
