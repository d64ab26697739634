"""Several runs at once: one deployment ends up active, and no service is orphaned."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.conftest import BASE, Project, Verb
from tests.net import eventually

AT_ONCE = ThreadPoolExecutor(2)


def start(project: Project, *arguments: str) -> Future[Verb]:
    return AT_ONCE.submit(project.run, *arguments, "--json")


@pytest.fixture(autouse=True)
def only_first(base: Project) -> None:
    """Each test begins with `first`, active and alone."""
    if "first" not in base.services:
        base.deploy("first")
    elif base.active != "first":
        base.ok("promote", "--deployment-id", "first")
    for name in sorted(base.services - BASE - {"first"}):
        base.ok("delete", "--deployment-id", name)


def test_two_deploys_at_once(base: Project) -> None:
    base.faults()
    runs = [start(base, "deploy", "main.py", "--deployment-id", f"race-{i}") for i in range(2)]
    for run in runs:
        verb = run.result()
        assert verb.code == 0 or "error:" in verb.err
    states = {k: v["state"] for k, v in base.records.items()}
    assert sorted(states.values()).count("active") == 1
    assert set(states) | BASE == base.services
    winner = base.active
    assert winner is not None
    assert winner.startswith("race-")
    assert all(s == "draining" for k, s in states.items() if k != winner)


def test_the_same_name_twice_at_once(base: Project) -> None:
    runs = [
        start(base, "deploy", "main.py", "--deployment-id", "same", "--no-promote")
        for _ in range(2)
    ]
    codes = [run.result().code for run in runs]
    assert sorted(codes) in ([0, 1], [1, 1])
    assert base.services == BASE | {"first"} | ({"same"} if 0 in codes else set())


def test_a_deploy_during_ensure_and_the_janitor_during_both(base: Project) -> None:
    runs = [
        start(
            base,
            "ensure",
            "main.py",
            *"--rollback-window-seconds 0 --drain-ttl-seconds 999".split(),
        ),
        start(base, "deploy", "main.py", "--deployment-id", "during"),
    ]
    for _ in range(3):
        base.stage.run_janitor()
        time.sleep(1)
    for run in runs:
        verb = run.result()
        assert verb.code == 0, verb.err
    assert base.active == "during"
    assert base.get("/_pulse/meta")["deployment_id"] == "during"
    if "first" in base.services:
        base.stage.run_janitor()
        eventually(lambda: "first" not in base.services, 15)


def test_a_delete_during_a_promote(base: Project) -> None:
    base.deploy("contested", "--no-promote")
    runs = [
        start(base, "promote", "--deployment-id", "contested"),
        start(base, "delete", "--deployment-id", "contested"),
    ]
    for run in runs:
        run.result()
    assert base.active is not None
    if base.active == "contested":  # then the delete was refused
        assert "contested" in base.services
    else:
        assert "contested" not in base.services | set(base.records)
    meta = base.get("/_pulse/meta")
    assert meta["deployment_id"] == base.active
