"""Redis restarts with an older snapshot: the last promoted deployment becomes active again.

The steps share one local Railway: router, janitor, Redis, backends and verbs are processes.
"""

from __future__ import annotations

import concurrent.futures
import time
from pathlib import Path

import pytest

from tests.conftest import Project, play
from tests.net import eventually
from tests.users import DELETE, LiveSite


@pytest.fixture(scope="module")
def site(base: Project) -> LiveSite:
    site = LiveSite(base)
    site.deploy("good")
    base.ok("delete", "--deployment-id", "first")
    return site


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_the_last_promotion_outlives_an_older_snapshot(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


SNAPSHOTS: dict[str, Path] = {}


def step_01_an_older_snapshot_and_a_router_that_lives(site: LiveSite) -> None:
    """In the snapshot the last promoted version is pending, as old as an unfinished deploy."""
    project = site.project
    site.deploy("new", "--no-promote", tabs=0)
    site.change_record("new", registered_at=time.time() - 4000, held=False)
    SNAPSHOTS["good"] = site.snapshot()
    project.ok("promote", "--deployment-id", "new")
    site.lose(SNAPSHOTS["good"], restart=False)
    found = project.ok("status")
    assert found["active"] == "new" or "new was promoted last" in found["problem"]
    assert project.ok("promote", "--deployment-id", "new")["active"] is True
    assert site.visited == "new"
    site.assert_stable("new")


def step_02_an_older_snapshot_and_a_router_that_restarts(site: LiveSite) -> None:
    """Only Railway's variable has the last promotion."""
    project = site.project
    site.lose(SNAPSHOTS["good"], restart=True)
    assert site.visited == "good"
    assert project.ok("status")["problems"] == [
        "the routing state is lost, or an older one: new was promoted last, and good is active."
        " Routers and janitor restore it by themselves; `pulse-railway restore` does it now"
    ]
    empty = {"match": "variables", "service": "pulse-router", "gives": {}}
    project.faults(empty)  # once: the janitor does not read it as "nothing was promoted"
    assert "Railway shows no variables of pulse-router" in project.janitor()["refused"]
    project.faults()
    assert site.last_promoted[0] == "new"
    site.assert_stable("new")


def step_03_an_older_snapshot_after_a_rollback(site: LiveSite) -> None:
    """The rolled back version, active in the snapshot, does not become active again."""
    project = site.project
    site.deploy("bad")
    SNAPSHOTS["bad"] = site.snapshot()
    project.ok("rollback")
    assert site.visited == "new"
    site.lose(SNAPSHOTS["bad"], restart=False)
    eventually(lambda: "rejected_at" in project.records["bad"])
    assert site.visited == "new"
    site.assert_stable("new")
    site.lose(SNAPSHOTS["bad"], restart=True)
    assert "new was promoted last, and bad is active" in project.ok("status")["problem"]
    assert project.ok("restore")["active"] == "new"
    site.assert_stable("new")


def step_04_the_service_of_what_was_promoted_last_is_gone(site: LiveSite) -> None:
    """The other version stays active, and `restore` makes that final."""
    project = site.project
    snapshot = site.snapshot()
    site.deploy("gone")
    service = project.stage.services()["gone"]["serviceId"]
    project.railway.graphql(DELETE, s=service)
    site.lose(snapshot, restart=False)
    eventually(lambda: site.visited == "new")
    run = "`pulse-railway restore --deployment-id new` makes that final"
    assert (
        f"gone was promoted last, and its service is gone: new is active; {run}"
        in (project.ok("status")["problems"])
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:  # each gives the routers their time
        running = pool.submit(project.janitor)
        refused = project.run("promote", "--deployment-id", "good")
    assert "(gone was promoted last): run `pulse-railway restore`" in refused.error
    report = running.result()
    if "skipped" in report:  # the command held the lock
        report = project.janitor()
    assert (report["deleted"], report["exit"]) == ([], 0)
    assert report["problems"] == [
        f"gone was promoted last and has no service: new stays active; {run}"
    ]
    assert site.last_promoted[0] == "gone"
    assert project.ok("restore", "--deployment-id", "new")["active"] == "new"
    site.change_record("gone", registered_at=time.time() - 100)  # else it may be about to appear
    site.assert_stable("new", removed="gone")
