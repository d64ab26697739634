"""Deployments of several processes, by verbs on a local Railway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pulse_railway import contract, options, router_commands
from pulse_railway.app.plugin import RailwayPlugin, RailwayPluginError
from pulse_railway.errors import Failure
from pulse_railway.flows import deploy, instances
from pulse_railway.output import Output
from tests.conftest import BASE, TINY, Project, play
from tests.test_doctor import run_doctor
from tests.test_requirements import flags
from tests.users import LiveSite


@pytest.fixture(scope="module")
def site(base: Project) -> LiveSite:
    return LiveSite(base)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_instances_from_deploy_to_rollback(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def instance_at(project: Project, name: str) -> tuple[str, int]:
    """Return the deployment and the process that answer for an affinity."""
    meta = project.get("/_pulse/meta", pulse_deployment=name)
    return meta["deployment_id"], meta["instance"]


def step_01_a_deployment_of_two_processes(site: LiveSite) -> None:
    project = site.project
    done = project.ok("deploy", "main.py", "--deployment-id", "two", "--instances", "2")
    assert done["instances"] == 2
    assert project.variables("two")["PULSE_RAILWAY_INSTANCES"] == "2"
    address = project.records["two"]["address"]
    assert project.records["two"]["instances"] == {"2": {"address": address[:-1] + "1"}}
    assert (project.row("two")["instances"], project.row("first")["instances"]) == (2, 1)
    assert "2 processes" in project.run("status").out
    assert [instance_at(project, name) for name in ("two", "two.2")] == [("two", 1), ("two", 2)]


def step_02_what_keeps_the_number(site: LiveSite) -> None:
    project = site.project
    before = project.records["two"]["instances"]
    assert project.run("redeploy", "--deployment-id", "two").code == 0
    assert instance_at(project, "two.2") == ("two", 2)
    site.lose_everything()
    assert project.ok("restore")["active"] == "two"
    assert project.records["two"]["instances"] == before
    project.redis.delete("pulse:railway:deployment:two")
    project.redis.delete("pulse:railway:store")
    project.janitor()
    assert project.records["two"]["instances"] == before
    project.ok("rollback")
    assert project.active == "first"
    assert instance_at(project, "two.2") == ("two", 2)
    assert project.ok("promote", "--deployment-id", "two")
    assert project.records["two"]["instances"] == before


def step_03_an_app_that_is_too_old(site: LiveSite) -> None:
    project = site.project
    words = ["deploy", "main.py", "--deployment-id", "old", "--instances", "2"]
    error = project.run(*words, "--env", "TINY_OLD=1").error
    assert "old runs 1 process instead of 2: its image needs this version" in error
    assert "old" not in project.records
    assert project.services == BASE | {"first", "two"}


# -- without a stack -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["0", "x", "-1", "65", "1.5"])
def test_another_number_is_one_line(number: str) -> None:
    expected = f"--instances takes a whole number from 1 to 64, not '{number}'"
    with pytest.raises(Failure) as failed:
        options.parse_deploy(flags(instances=number), Output())
    assert str(failed.value) == expected


@pytest.mark.parametrize("number", [0, "x", -1, 65, 1.5, None, True])
def test_the_plugin_takes_the_same(number: Any) -> None:
    with pytest.raises(RailwayPluginError, match="instances takes a whole number from 1 to 64"):
        RailwayPlugin(instances=number)
    assert RailwayPlugin(instances=64).instances == 64


def test_an_earlier_router_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    stack: Any = SimpleNamespace(names=SimpleNamespace(router="pulse-router"))

    def check(count: int) -> None:
        given = SimpleNamespace(canary=None, move_after=None, promote=True, instances=count)
        plan: Any = SimpleNamespace(options=given, steps=None, preview_key=None)
        state = {"active": "a"}
        monkeypatch.setattr(router_commands, "read_state", lambda *_: asked.append(1) or state)
        nothing: Any = None
        deploy.check_router(nothing, stack, plan, nothing)

    with pytest.raises(Failure, match="pulse-router is of an earlier version, without instances"):
        check(2)
    assert len(asked) == 1
    check(1)  # any router has one
    assert len(asked) == 1, "nothing depends on its state"


def test_more_processes_than_there_are_cores_or_memory_for() -> None:
    assert [instances.size_warning(count) for count in (1, 2, 8)] == [None] * 3
    nine, thirty = str(instances.size_warning(9)), str(instances.size_warning(30))
    assert "9 instances keep 9 cores busy and take about 1.4 GB" in nine
    assert "Hobby 8 vCPU and 8 GB" in nine
    assert "Pro" not in nine
    assert "Pro 24 vCPU and 24 GB" in thirty
    assert instances.size_warning(2, vcpus=2, memory_gb=1) is None
    assert instances.size_warning(9, vcpus=16) is None
    assert "limited to 1 vCPU" in str(instances.size_warning(2, vcpus=1))
    assert "limited to 0.2 GB" in str(instances.size_warning(2, memory_gb=0.2))
    assert instances.size_warning(1, vcpus=0.5, memory_gb=0.1) is None


def test_doctor_says_what_several_processes_mean(base: Project) -> None:
    _, found = run_doctor(base, "main.py", "--instances", "2", cwd=TINY)
    verdict, said = found["its processes"]
    assert verdict == "warning"
    for word in ("2 instances", "module-level state", "scheduler", contract.INSTANCE):
        assert word in said
    assert "its processes" not in run_doctor(base, "main.py", cwd=TINY)[1]
