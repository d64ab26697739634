"""Answers that are not what they seem: whoever does not understand one changes nothing.

The whole local Railway plays it: router, janitor, Redis, backends and verbs are processes.
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
    """`first` drains, `second` is active and takes a variable of pulse-env's."""
    found = LiveSite(base)
    base.stage.set_variables("pulse-env", {"SECRET_KEY": "a secret"})
    found.deploy("second")
    return found


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_what_is_not_understood_is_not_acted_on(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def written(project: Project) -> dict[str, Any]:
    """All that a verb could have changed."""
    state = {
        key: value for key, value in project.state.items() if key not in ("answers", "deploy:lock")
    }
    return {"state": state, **{name: project.variables(name) for name in project.services}}


def empty(service: str | None, times: int = 1) -> dict[str, Any]:
    """Of that service, or of all."""
    return {"match": "variables", "service": service, "gives": {}, "times": times}


ENSURE = ["ensure", "main.py"]
DEPLOY_ONE = ["deploy", "main.py", "--deployment-id", "no"]


def step_01_variables_that_read_empty(site: LiveSite) -> None:
    """Nothing goes on: not with another internal token, nor without the users' variables."""
    project = site.project
    before = written(project)
    of_router = "Railway shows no variables of pulse-router"
    of_env = "second refers to SECRET_KEY of pulse-env, and Railway shows none of it"
    for service, said, verbs in (
        ("pulse-router", of_router, [ENSURE, DEPLOY_ONE, ["rollback"]]),
        ("pulse-env", of_env, [DEPLOY_ONE, ["promote", "--deployment-id", "first"]]),
        (None, of_router, [ENSURE]),
    ):
        for verb in verbs:
            project.faults(empty(service, times=1000))
            run = project.run(*verb)
            assert run.code == 1, verb
            assert f"{said}: its answer is not believed, and nothing was changed" in run.error
        assert said in project.ok("status")["problem"]
    project.faults()
    assert written(project) == before


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
    """Users are served inside all the while: a healthy version is kept, and chosen."""
    project = site.project
    here = InProcess(project, monkeypatch)
    monkeypatch.setattr(reachability, "EDGE_TIMEOUT", 0.3)
    api = here.api()
    said = f"Railway's edge answers in place of the router at {site.address} (status 502)"

    def told() -> bool:
        return said in capsys.readouterr().err

    project.faults(edge="json")
    assert site.get().json()["message"] == "Application failed to respond"
    assert here.deploy("fourth")["active"] is True
    assert told()
    assert project.active == "fourth"
    project.faults(edge="html")
    stack = inspect(api, here.target, here.names)
    assert promote.rollback(api, stack, Output())["deployment_id"] == "second"
    assert told()
    assert promote.check_and_promote(api, stack, "fourth", Output())["active"] is True
    assert told()
    project.faults()
    assert site.visited == project.active == "fourth"


def step_04_an_answer_that_is_well_formed_and_odd(
    site: LiveSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a deploy has made goes, and one line is said."""
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

    monkeypatch.setattr(deploy, "wait_until_routed", fails)
    with pytest.raises(KeyError):
        InProcess(project, monkeypatch).deploy("odd", no_promote=True)
    assert (project.services, set(project.records)) == (before, records)
    assert site.visited == "fourth"


def step_05_a_version_that_does_not_answer(site: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    project = site.project
    gone = project.latest("second")["id"]
    project.railway.graphql("mutation ($d: String!) { deploymentRemove(id: $d) }", d=gone)
    here = InProcess(project, monkeypatch)

    def patiently(*given: Any, timeout: float = 1.0, **more: Any) -> None:
        reachability.wait_until_routed(*given, timeout=1.0, **more)

    monkeypatch.setattr(promote, "wait_until_routed", patiently)
    api = here.api()
    with pytest.raises(Failure) as failed:
        promote.check_and_promote(api, inspect(api, here.target, here.names), "second", Output())
    assert "second does not answer now, and nothing was changed" in str(failed.value)
    assert "--force promotes it anyway" in str(failed.value)
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
    """The others have their turn in the same run, and it has its own in the next."""
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
    """It has not the limits that `ensure` has set on the janitor's own service."""
    before = site.project.services
    done = site.inside("pulse-router", "pulse-railway janitor run")
    assert done.returncode == 1
    assert "this is pulse-router: the janitor runs in its own service" in done.stderr
    assert "railway ssh --service pulse-janitor -- pulse-railway janitor run" in done.stderr
    assert site.project.services == before
