"""Two runs of `ensure` on an empty project, and services of the same name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pulse_railway import contract
from pulse_railway.config import Names, Target
from pulse_railway.flows import baseline
from pulse_railway.output import Output
from pulse_railway.stack import Service, Stack
from tests.conftest import BASE, Project, play
from tests.test_signals import Running


@pytest.fixture(scope="module")
def made(project: Project) -> Project:
    return project


def test_two_of_each(made: Project, request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def names(project: Project) -> list[str]:
    """Return the names of all services, each as often as there are services of it."""
    raw = json.loads((project.railway.root / "state.json").read_text())
    return sorted(s["name"] for s in raw["services"] if s["project_id"] == project.id)


def step_01_at_once(made: Project) -> None:
    """There were two of each service, which no repetition mended."""
    window = ("--rollback-window-seconds", "0")
    runs = [Running(made, "ensure", "main.py", *window) for _ in range(2)]
    ended = [run.end() for run in runs]
    assert [code for code, _ in ended] == [0, 0], ended
    assert names(made) == sorted(BASE)
    assert made.ok("ensure", "main.py", *window)["changed"] == []
    made.deploy("first")
    assert made.ok("status")["problems"] == []


def add_double(project: Project, name: str, variables: dict[str, str]) -> str:
    """Create a service, and give it the name of another one, which Railway's API allows."""
    values: dict[str, Any] = {"projectId": project.id, "environmentId": project.environment}
    values |= {"name": "double", "variables": variables}
    document = "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }"
    service = str(project.railway.graphql(document, i=values)["serviceCreate"]["id"])
    rename = (
        "mutation ($s: String!, $i: ServiceUpdateInput!) {"
        " serviceUpdate(id: $s, input: $i) { id } }"
    )
    project.railway.graphql(rename, s=service, i={"name": name})
    return service


def test_services_that_railway_has_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is taken may get an ending in place of a second service of that name."""

    def service(name: str, run: str) -> Service:
        variables = {contract.UNFINISHED: run}
        return Service(f"{name} of {run}", "", name, "", None, {}, [], None, None, variables)

    services = [service("pulse-router", "a"), service("pulse-janitor", "b")]
    stack = Stack(Target("p", "e"), Names(), {s.name: s for s in services})
    stack.others = [service("pulse-router-x1y2", "b"), service("pulse-janitor-x1y2", "a")]
    deleted: list[str] = []
    monkeypatch.setattr(baseline, "delete_service", lambda _, __, of: bool(deleted.append(of)) or 1)
    monkeypatch.setattr(baseline, "inspect", lambda *_: stack)
    names = ["pulse-router", "pulse-janitor"]
    assert baseline.withdraw_doubles(None, stack, Output(), baseline.renamed(stack, "b", names))  # type: ignore[arg-type]
    assert deleted == ["pulse-router-x1y2 of b"]


def step_02_what_a_killed_one_has_left(made: Project) -> None:
    add_double(made, "pulse-redis", {contract.UNFINISHED: "a run"})
    (problem,) = made.ok("status")["problems"]
    assert "two services named pulse-redis" in problem
    assert "`pulse-railway ensure" in problem
    refused = made.run("deploy", "main.py", "--deployment-id", "second")
    assert "two services named pulse-redis" in refused.error
    done = made.run("ensure", "main.py")
    assert done.code == 0, done.err
    assert "withdraw pulse-redis, which another `ensure` has created, too" in done.err
    assert names(made) == sorted([*BASE, "first"])
    assert made.ok("status")["problems"] == []


def step_03_what_is_not_ours_stays(made: Project) -> None:
    for variables in ({}, {contract.UNFINISHED: "1"}, {"A": "b"}):
        service = add_double(made, "pulse-janitor", variables)
        for verb in (["ensure", "main.py"], ["rollback"]):
            refused = made.run(*verb)
            assert "Rename or delete the one that nothing uses, on Railway" in refused.error
        assert "pulse-janitor" in made.ok("status")["problem"]
        assert names(made) == sorted([*BASE, "first", "pulse-janitor"])
        made.railway.graphql("mutation ($i: String!) { serviceDelete(id: $i) }", i=service)
