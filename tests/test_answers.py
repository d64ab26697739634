"""Wrong or incomplete answers of Railway: nothing is changed on an answer not understood.

The steps share one local Railway: router, janitor, Redis, backends and verbs are processes.
"""

from __future__ import annotations

from typing import Any

import pytest

from pulse_railway.errors import Failure
from pulse_railway.flows import deploy, promote, reachability
from pulse_railway.output import Output
from pulse_railway.stack import inspect
from tests.conftest import Project, play
from tests.net import eventually
from tests.test_failures import InProcess
from tests.users import DEPLOY, LiveSite


@pytest.fixture(scope="module")
def site(base: Project) -> LiveSite:
    """`first` drains; `second` is active, and refers to a variable of pulse-env."""
    site = LiveSite(base)
    base.stage.set_variables("pulse-env", {"SECRET_KEY": "a secret"})
    site.deploy("second")
    return site


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_an_answer_not_understood_changes_nothing(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def everything(project: Project) -> dict[str, Any]:
    """Return the state and variables that a verb can change."""
    state = {
        key: value for key, value in project.state.items() if key not in ("answers", "deploy:lock")
    }
    return {"state": state, **{name: project.variables(name) for name in project.services}}


def empty(service: str | None, times: int = 1) -> dict[str, Any]:
    """Return a fault: Railway answers with no variables of that service, or of any."""
    return {"match": "variables", "service": service, "gives": {}, "times": times}


ENSURE = ["ensure", "main.py"]
DEPLOY_ONE = ["deploy", "main.py", "--deployment-id", "no"]


def step_01_variables_that_read_empty(site: LiveSite) -> None:
    """No verb writes another internal token, nor deploys without the user's variables."""
    project = site.project
    before = everything(project)
    no_router = "Railway shows no variables of pulse-router"
    no_env = "second refers to SECRET_KEY of pulse-env, and Railway shows none of it"
    for service, reason, verbs in (
        ("pulse-router", no_router, [ENSURE, DEPLOY_ONE, ["rollback"]]),
        ("pulse-env", no_env, [DEPLOY_ONE, ["promote", "--deployment-id", "first"]]),
        (None, no_router, [ENSURE]),
    ):
        for verb in verbs:
            project.faults(empty(service, times=1000))
            run = project.run(*verb)
            assert run.code == 1, verb
            assert f"{reason}: its answer is not used, and nothing was changed" in run.error
        assert reason in project.ok("status")["problem"]
    project.faults()
    assert everything(project) == before


def step_02_variables_that_read_empty_once(site: LiveSite) -> None:
    """They are read again."""
    project = site.project
    once = [empty("pulse-router"), empty("pulse-env")]
    token = project.variables("pulse-router")["PULSE_RAILWAY_INTERNAL_TOKEN"]
    project.faults(*once)
    assert project.ok(*ENSURE)["changed"] == []
    project.faults(*once)
    site.deploy("third")
    assert project.variables("third")["SECRET_KEY"] == "${{pulse-env.SECRET_KEY}}"
    project.faults(*once)
    assert project.ok("rollback")["deployment_id"] == "second"
    project.faults()
    assert project.variables("pulse-router")["PULSE_RAILWAY_INTERNAL_TOKEN"] == token


def step_03_the_edge_answers_in_place_of_the_router(
    site: LiveSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The deployment answers in the private network: it is kept, and can be promoted."""
    project = site.project
    here = InProcess(project, monkeypatch)
    monkeypatch.setattr(reachability, "EDGE_TIMEOUT", 0.3)
    api = here.api()
    warning = f"Railway's edge answers in place of the router at {site.address} (status 502)"

    def warned() -> bool:
        return warning in capsys.readouterr().err

    project.faults(edge="json")
    assert site.get().json()["message"] == "Application failed to respond"
    assert here.deploy("fourth")["active"] is True
    assert warned()
    assert project.active == "fourth"
    project.faults(edge="html")
    stack = inspect(api, here.target, here.names)
    assert promote.rollback(api, stack, Output())["deployment_id"] == "second"
    assert warned()
    assert promote.check_and_promote(api, stack, "fourth", Output())["active"] is True
    assert warned()
    project.faults()
    assert site.visited == project.active == "fourth"


def step_04_an_answer_that_is_well_formed_and_odd(
    site: LiveSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deploy is undone, with one line of error."""
    project = site.project
    before, records = project.services, set(project.records)
    for odd, flags in (("serviceCreate", []), ("deployment", ["--no-promote"])):
        project.faults({"match": odd, "gives": {}})
        run = project.run("deploy", "main.py", "--deployment-id", "odd", *flags)
        assert run.code == 1
        lines = [line for line in run.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert "KeyError, which is a fault of pulse-railway" in lines[0]
        assert (project.services, set(project.records)) == (before, records), odd
    project.faults()

    def fails(*_: Any, **__: Any) -> None:
        assert "odd" in project.records
        raise KeyError("status")

    monkeypatch.setattr(deploy, "wait_until_reachable", fails)
    with pytest.raises(KeyError):
        InProcess(project, monkeypatch).deploy("odd", no_promote=True)
    assert (project.services, set(project.records)) == (before, records)
    assert site.visited == "fourth"


def step_05_a_version_that_does_not_answer(site: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    project = site.project
    gone = project.latest("second")["id"]
    project.railway.graphql("mutation ($d: String!) { deploymentRemove(id: $d) }", d=gone)
    here = InProcess(project, monkeypatch)

    def for_a_second(*args: Any, timeout: float = 1.0, **flags: Any) -> None:
        reachability.wait_until_reachable(*args, timeout=1.0, **flags)

    monkeypatch.setattr(promote, "wait_until_reachable", for_a_second)
    api = here.api()
    with pytest.raises(Failure) as failed:
        promote.check_and_promote(api, inspect(api, here.target, here.names), "second", Output())
    assert "second does not answer now, and nothing was changed" in str(failed.value)
    assert "promote --deployment-id second --force` promotes it anyway" in str(failed.value)
    assert project.active == "fourth"
    assert project.ok("promote", "--deployment-id", "second", "--force")["active"] is True
    assert project.active == "second"
    assert site.get().status_code == 502
    assert project.ok("promote", "--deployment-id", "fourth")["active"] is True
    assert site.visited == "fourth"


def step_06_a_router_that_has_failed(site: LiveSite) -> None:
    project = site.project
    router = project.stage.services()["pulse-router"]["serviceId"]
    project.faults(crash_at="DEPLOYING")
    project.railway.graphql(DEPLOY, s=router, e=project.environment)
    eventually(lambda: project.latest("pulse-router")["status"] == "FAILED", 20)
    project.faults()
    assert site.visited == "fourth"
    assert project.ok("status")["problem"] == (
        "pulse-router is FAILED on Railway: see `pulse-railway logs --service pulse-router`;"
        " `pulse-railway ensure` deploys it again"
    )
    assert project.ok("ensure", "main.py")["changed"] == ["pulse-router: deploy"]
    assert project.latest("pulse-router")["status"] == "SUCCESS"
    (problem,) = project.ok("status")["problems"]
    assert problem.startswith("second is REMOVED on Railway"), "of the step before"
    assert site.visited == "fourth"


def step_07_a_service_that_railway_refuses_to_delete(site: LiveSite) -> None:
    """The janitor deletes the others in the same run, and this one in the next."""
    project = site.project
    (site.tabs / "third").write_text("0")
    site.deploy("fifth")
    (site.tabs / "fourth").write_text("0")
    drained = {"first", "third", "fourth"}
    project.faults({"match": "serviceDelete", "error": "Something went wrong"})
    report = project.janitor()
    project.faults()
    (failed,) = report["failed"]
    assert report["failed"][failed] == "Something went wrong"
    assert set(report["deleted"]) == drained - {failed}
    assert report["exit"] == 1
    report = project.janitor()
    assert (report["deleted"], report["failed"], report["exit"]) == ([failed], {}, 0)
    assert not drained & project.services
    assert site.visited == "fifth"


def step_08_a_janitor_in_the_router(site: LiveSite) -> None:
    """The router's service has no replica limit, unlike the janitor's."""
    before = site.project.services
    done = site.inside("pulse-router", "pulse-railway janitor run")
    assert done.returncode == 1
    assert "this is pulse-router: the janitor runs in its own service" in done.stderr
    assert 'or use "Run now" of that service on Railway' in done.stderr
    assert site.project.services == before
