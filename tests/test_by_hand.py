"""Services of a stack that were deleted on Railway, and the command that restores them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import contract
from pulse_railway.app.plugin import RailwayPlugin
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure
from pulse_railway.flows.baseline import require_named
from pulse_railway.stack import (
    Service,
    Stack,
    can_create_missing,
    find_stack,
    lost_with_missing,
    missing_name,
    partial,
    require_router,
)
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
    # the app does not name edge-router, which may thus be another stack's
    assert "is its stack, `pulse-railway ensure" in edge.run("scaffold", "main.py").error
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
    edge.deploy("third", "--message", "pay ${{edge-env.API_KEY}}")
    assert edge.variables("edge-third")["API_KEY"] == "${{edge-env.API_KEY}}"
    assert edge.ok("status")["problems"] == []


def killed_runs(edge: Project) -> int:
    """Repair with runs that are killed after one write each; return how many were."""
    runs = 0
    while killed(edge, "ensure", "main.py", "--repair", "--rollback-window-seconds", "0"):
        runs += 1
        assert runs < 20
    return runs


def step_03_killed_after_each_write(edge: Project) -> None:
    remove(edge, "edge-env", "edge-janitor")
    assert "edge-env, edge-janitor of this stack are missing" in edge.ok("status")["problem"]
    check_verbs_that_need_the_router_alone(edge)
    before = running(edge)
    assert 3 < killed_runs(edge) < 15
    again = ensure(edge, "--json")
    assert again.json["changed"] == []
    assert "edge-env has no API_KEY, which third refers to" in again.err  # also after the kill
    assert running(edge, "edge-janitor") == before
    edge.stage.set_variables("edge-env", {"API_KEY": "k"})
    assert edge.ok("status")["problems"] == []
    eventually(lambda: edge.janitor("edge-janitor")["exit"] == 0)


def check_verbs_that_need_the_router_alone(edge: Project) -> None:
    """They were once refused, in the outage in which they are needed."""
    for verb in ("maintenance on", "maintenance off", "history", "rollback"):
        done = edge.run(*verb.split())
        assert done.code == 0, done.err
        assert "warning: edge-env, edge-janitor of this stack are missing" in done.err
    assert edge.ok("promote", "--deployment-id", "third")["active"]
    assert edge.ok("delete", "--deployment-id", "second", "--yes")["deleted"]
    assert "nothing is lost" in edge.run("restore").error
    lost = "third refers to edge-env.API_KEY, which is not set"
    assert lost in edge.run("redeploy").error
    assert "are missing" in edge.run("deploy", "main.py").error
    no_way = edge.run("history", "--control", "job").error
    assert "edge-janitor is missing, and the command was not sent" in no_way


def step_04_the_router(edge: Project) -> None:
    """The message has once advised to delete all services, with the sessions in Redis."""
    before, old = running(edge, "edge-router"), edge.variables("edge-router")
    state = routing(edge)
    remove(edge, "edge-router")
    status = edge.ok("status")
    assert status["missing"] == ["edge-router"]
    said = "edge-router of this stack is missing: `pulse-railway ensure --repair` creates it again"
    began = time.monotonic()  # it once asked the missing router for half a minute
    assert "there is no router that says which" in edge.run("logs").error
    assert time.monotonic() - began < 10
    assert said in status["problem"]
    assert "it gets a new address" in status["problem"]
    assert "delete" not in status["problem"]
    assert said.replace("--repair`", "--repair --app main.py`") in ensure(edge).error
    assert edge.janitor("edge-janitor")["deleted"] == []
    done = ensure(edge, "--repair")
    assert done.code == 0, done.err
    new, router = edge.variables("edge-router"), edge.stage.services()["edge-router"]
    same = ("REDIS_URL", "RAILWAY_TOKEN", contract.INTERNAL_TOKEN, contract.REDIS_PREFIX)
    assert [new[name] for name in same] == [old[name] for name in same]
    stamp = f"{edge.environment}/{router['serviceId']}"
    assert {edge.variables(name)[contract.STACK] for name in edge.services} == {stamp}
    assert routing(edge) == state
    assert running(edge, "edge-router") == before
    assert edge.get("/_pulse/meta")["deployment_id"] == "third"
    assert ensure_changes(edge) == []
    assert edge.janitor("edge-janitor")["exit"] == 0
    assert edge.variables("edge-router")[contract.LAST_PROMOTED] == "third"
    assert edge.ok("status")["problems"] == []


def routing(project: Project) -> Any:
    """Return the deployments' states, and the history."""
    rows = project.ok("status")["deployments"]
    return {r["deployment_id"]: r["state"] for r in rows}, project.ok("history")


def ensure_changes(project: Project) -> Any:
    return project.ok("ensure", "main.py")["changed"]


def step_05_the_router_and_env_killed_after_each_write(edge: Project) -> None:
    remove(edge, "edge-router", "edge-env")
    assert "edge-env, edge-router of this stack are missing" in edge.ok("status")["problem"]
    assert 4 < killed_runs(edge) < 20
    assert ensure_changes(edge) == []
    edge.stage.set_variables("edge-env", {"API_KEY": "k"})
    assert edge.janitor("edge-janitor")["exit"] == 0
    assert edge.ok("status")["problems"] == []
    assert edge.get("/_pulse/meta")["deployment_id"] == "third"


def step_06_redis(edge: Project) -> None:
    """It was once restored only by the deletion of all other services."""
    before, router = running(edge, *RUNTIME), edge.variables("edge-router")
    address = edge.ok("status")["address"]
    rows = edge.ok("status")["deployments"]
    remove(edge, "edge-redis")
    problem = edge.ok("status")["problem"]
    assert problem.startswith("edge-redis of this stack is missing: `pulse-railway ensure --rep")
    assert "the sessions and the routing state in edge-redis are lost" in problem
    assert "delete" not in problem
    done = ensure(edge, "--repair")
    assert done.code == 0, done.err
    assert edge.variables("edge-router") == router
    assert running(edge, *RUNTIME) == before
    assert edge.ok("status")["address"] == address
    assert edge.janitor("edge-janitor")["restored"] == "third"
    restored = {row["deployment_id"]: row["about"] for row in edge.ok("status")["deployments"]}
    assert restored == {row["deployment_id"]: row["about"] for row in rows}
    assert restored["third"]["message"] == "pay ${{edge-env.API_KEY}}"
    assert edge.get("/_pulse/meta")["deployment_id"] == "third"
    assert ensure_changes(edge) == []
    eventually(lambda: edge.ok("status")["problems"] == [], 20)


RUNTIME = ("edge-router", "edge-redis", "edge-janitor")


def step_07_beside_a_copy_of_the_environment(edge: Project) -> None:
    """Names are taken by the copy: the services are added to this environment again. The message
    has once advised a deletion that ended in a refusal."""
    check_that_a_copy_without_some_services_is_taken_over(edge)
    ids = {name: at["serviceId"] for name, at in edge.stage.services().items()}
    state, gone = routing(edge), ("edge-router", "edge-janitor", "edge-env")
    for name in gone:
        remove(edge, name)
        done = ensure(edge, "--repair")
        assert done.code == 0, done.err
        assert edge.stage.services()[name]["serviceId"] == ids[name]
    assert routing(edge) == state
    assert edge.get("/_pulse/meta")["deployment_id"] == "third"
    assert ensure_changes(edge) == []
    edge.stage.set_variables("edge-env", {"API_KEY": "k"})
    assert edge.janitor("edge-janitor")["exit"] == 0
    assert edge.ok("status")["problems"] == []
    remove(edge, "edge-redis")  # Railway does not show what it was in the copy
    problem = edge.ok("status")["problem"]
    assert "other environments of the project have it: import it from one of them" in problem
    assert "Delete nothing" in problem
    assert "Delete nothing" in ensure(edge, "--repair").error


def step_08_railways_own_file_in_a_folder_above(edge: Project, tmp_path: Path) -> None:
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


def check_that_a_copy_without_some_services_is_taken_over(edge: Project) -> None:
    """`status` has once advised `ensure`, and `ensure` refused."""
    for name, gone in (("one", ["edge-janitor", "edge-env"]), ("two", ["edge-router"])):
        copy = edge.duplicate(name)
        remove(copy, *gone)
        status = copy.ok("status")
        assert status["missing"]
        assert "pulse-railway ensure`, which makes a stack of its own" in status["problem"]
        plan = copy.ok("ensure", "main.py", "--plan")["planned"]
        assert [f"{missing}: create" for missing in sorted(gone)] == sorted(plan[: len(gone)])
        if name == "two":
            check_two_runs_at_once(copy)
        assert ensure(copy).code == 0
        router = copy.stage.services()["edge-router"]["serviceId"]
        own = ("edge-router", "edge-env", "edge-redis", "edge-janitor")
        stamps = {copy.variables(service)[contract.STACK] for service in own}
        assert stamps == {f"{copy.environment}/{router}"}
        assert copy.ok("status")["problems"] == []
        original, internal = edge.variables("edge-router"), contract.INTERNAL_TOKEN
        assert copy.variables("edge-router")[internal] != original[internal]


# an `ensure` during which another one runs, after the first has made a token
WITH_ANOTHER = """
import subprocess, sys
from pulse_railway import cli
from pulse_railway.railway.api import Api
call = Api.call
def called(self, document, **variables):
    answer = call(self, document, **variables)
    if "projectTokenCreate" in document:
        subprocess.run([sys.executable, "-m", "pulse_railway", *sys.argv[1:]], check=True)
    return answer
Api.call = called
cli.main(sys.argv[1:])
"""


def check_two_runs_at_once(copy: Project) -> None:
    """The second run deletes the first one's token, which the first has once left in use."""
    command = [sys.executable, "-c", WITH_ANOTHER, "ensure", "main.py"]
    command += ["--rollback-window-seconds", "0"]
    first = subprocess.run(
        command, env=copy.env, cwd=TINY, capture_output=True, text=True, timeout=120
    )
    assert "another `ensure` ran at the same time" in first.stderr, first.stderr
    assert first.returncode == 1


# -- without a Railway -----------------------------------------------------------------------------


def a_stack(without: str, **of_router: str) -> Stack:
    names = ("pulse-router", "pulse-env", "pulse-redis", "pulse-janitor")
    services = {n: Service(n, "", n, "", None, {}, [], None, None) for n in names if n != without}
    for service in services.values():
        service.variables = {contract.STACK: "e/pulse-router"}
    services["pulse-router"].variables |= of_router
    return Stack(Target("p", "e"), Names(), services)


def test_without_router_and_redis_nothing_says_what_was_active() -> None:
    stack = a_stack("pulse-redis")
    backend = Service("v1", "", "v1", "", None, {}, [], None, None)
    backend.variables = {contract.STACK: "e/pulse-router", "PULSE_DEPLOYMENT_ID": "v1"}
    stack.services["v1"] = backend
    assert "within five minutes" in lost_with_missing(stack)[0]
    del stack.services["pulse-router"]
    command = "`pulse-railway restore --deployment-id ...` makes one of these active: v1"
    assert command in lost_with_missing(stack)[1]


def test_services_are_created_again_only_for_a_stack_that_is_known() -> None:
    assert can_create_missing(a_stack("pulse-janitor"))
    assert can_create_missing(a_stack("pulse-env"))
    assert not can_create_missing(a_stack(""))
    assert not can_create_missing(a_stack("pulse-redis"))  # the router does not name it
    url = {contract.REDIS_URL: "${{pulse-redis.REDIS_URL}}"}
    assert can_create_missing(a_stack("pulse-redis", **url))
    assert not can_create_missing(a_stack("pulse-redis", **{contract.REDIS_URL: "redis://h"}))
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


def test_a_deleted_router_counts_before_another_stacks() -> None:
    """A verb without --service has once worked on the other stack."""
    url = {contract.REDIS_URL: "redis://h", contract.REDIS_PREFIX: "p"}
    janitor = {contract.JANITOR_SERVICE: "pulse-janitor", contract.ROUTER_SERVICE: "pulse-router"}
    services = {
        "shop-router": {contract.STACK: "e/shop-router", **url},
        "pulse-janitor": {contract.STACK: "e/lost", **janitor, **url},
        "pulse-env": {contract.STACK: "e/lost"},
        "one": {contract.STACK: "e/lost", contract.DEPLOYMENT_ID: "one"},
        "sold": {contract.STACK: "e/shop-router", contract.DEPLOYMENT_ID: "sold"},
    }
    every = {n: Service(n, "", n, "", None, {}, [], None, None, v) for n, v in services.items()}
    stack = find_stack(Stack(Target("p", "e"), Names(), every))
    assert set(stack.services) == {"pulse-janitor", "pulse-env", "one"}
    assert (stack.missing, stack.redis_prefix) == (["pulse-router"], "p")
    assert not can_create_missing(stack), "the janitor has no tokens"
    every["pulse-janitor"].variables |= {contract.RAILWAY_TOKEN: "t", contract.INTERNAL_TOKEN: "i"}
    assert can_create_missing(find_stack(Stack(Target("p", "e"), Names(), every)))
    other = find_stack(Stack(Target("p", "e"), Names("shop-router", asked=True), every))
    assert set(other.services) == {"shop-router", "sold"}


@pytest.mark.parametrize("environment", ["e", "copied"])
def test_what_is_left_of_a_deleted_stack_keeps_verbs_from_the_other(environment: str) -> None:
    """`maintenance on` of an app whose router and janitor were deleted closed the other's site."""
    url = {contract.REDIS_URL: "redis://h", contract.REDIS_PREFIX: "p"}
    services = {
        "blog-router": {contract.STACK: f"{environment}/blog-router", **url},
        "blog-env": {contract.STACK: f"{environment}/blog-router"},
        "post": {contract.STACK: f"{environment}/blog-router", contract.DEPLOYMENT_ID: "post"},
        "pulse-env": {contract.STACK: f"{environment}/lost"},
        "one": {contract.STACK: f"{environment}/lost", contract.DEPLOYMENT_ID: "one"},
    }

    def found(names: Names, *without: str, **changed: dict[str, str]) -> Stack:
        values = {n: v | changed.get(n, {}) for n, v in services.items() if n not in without}
        every = {n: Service(n, "", n, "", None, {}, [], None, None, v) for n, v in values.items()}
        return find_stack(Stack(Target("p", "e"), names, every))

    for names in (Names(), Names(asked=True)):
        for gone in ((), ("pulse-env",), ("one",)):
            stack = found(names, *gone)
            assert (stack.router, stack.no_such_router) == (None, "blog-router")
            with pytest.raises(Failure, match="no router is called pulse-router; there is: blog-"):
                require_router(stack)
    with pytest.raises(Failure, match="Another stack's router was deleted"):
        require_named(found(Names(), "pulse-env"))  # nothing says that a new stack is meant
    require_named(found(Names(asked=True), "pulse-env"))
    # without such leftovers, or with those that are this stack's to take over, the only one counts
    assert found(Names(), "pulse-env", "one").router
    assert found(Names(), "pulse-env", one={"TOKEN": "${{blog-router.TOKEN}}"}).router
    assert found(Names(), "pulse-env", one={contract.REMOVED: "1"}).router
    assert not found(Names(asked=True), "pulse-env", "one").router


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        ({}, False),
        ({"router_service": "pulse-router"}, True),
        ({"router_service": "edge"}, True),
        ({"service_prefix": "x"}, True),
    ],
)
def test_an_app_that_names_its_router(plugin: dict[str, Any], named: bool) -> None:
    assert RailwayPlugin(**plugin).router_is_named == named


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
