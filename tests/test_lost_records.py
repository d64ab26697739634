"""Redis has lost a record, holds an invalid one, is empty, or does not answer.

The steps share one local Railway: router, janitor, Redis, backends and verbs are processes.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.conftest import Project, play
from tests.net import eventually
from tests.users import DEPLOY, PREFIX, LiveSite


@pytest.fixture(scope="module")
def site(base: Project) -> LiveSite:
    site = LiveSite(base)
    site.deploy("old")
    base.ok("delete", "--deployment-id", "first")
    site.deploy("new")
    return site


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_running_deployments_outlive_their_records(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def step_01_the_record_of_the_active_version_is_lost(site: LiveSite) -> None:
    """Each verb restores the record, and no visitor gets an error."""
    project = site.project
    message = "the record of new is lost: `pulse-railway restore` restores it"
    with site.visitors() as seen:
        site.delete_record("new")
        assert project.ok("status")["problems"] == [message]
        assert project.ok("promote", "--deployment-id", "new")["active"] is True
        assert project.records["new"]["state"] == "active"
        site.delete_record("new")
        assert project.ok("redeploy")["deployment_id"] == "new"
        site.delete_record("new")
        assert project.ok("restore")["active"] == "new"
        assert project.records["new"]["address"] == "http://new.railway.internal:8000"
        site.delete_record("new")
        project.redis.publish(f"{PREFIX}:events", "[]")  # or in 15 s a router reads by itself
        eventually(lambda: "new" in project.records)
    assert 404 not in seen
    assert seen <= {200, 502}  # 502 during the redeploy

    with site.visitors() as seen:
        site.restart_router()
        site.delete_record("new")
        site.delete_record("old")  # draining; the restarted router does not know it
        site.wait_for_router()
        assert message in project.ok("status")["problems"]
        assert site.visited == "new"
        assert project.ok("restore")["active"] == "new"
        assert project.records["new"]["service_id"]
        assert project.records["old"]["state"] == "draining"
        assert project.records["old"]["about"]["by"]
        site.delete_record("old")
        project.janitor()
        assert project.records["old"]["state"] == "draining"
    assert 404 not in seen
    project.redis.set(f"{PREFIX}:active", "nonsuch")  # a word that is no deployment
    restored = project.run("restore")  # or a router was first
    assert restored.code == 0 or "nothing is lost" in restored.err, restored.err
    eventually(lambda: project.redis.get(f"{PREFIX}:active") == "new")
    site.assert_stable("new")


def step_02_invalid_records(site: LiveSite) -> None:
    """The router goes on, `status` lists the records, and only `delete` removes them."""
    project = site.project
    site.deploy("next", "--no-promote")
    site.deploy("odd", "--no-promote", tabs=0)
    site.change_record("odd", held=False, registered_at="soon", address=5)
    site.change_record("old", registered_at=[])  # drained
    (site.tabs / "old").write_text("0")
    project.redis.set(f"{PREFIX}:deployment:junk", "{{{")
    assert project.ok("promote", "--deployment-id", "next")["active"] is True
    assert site.visited == "next"
    for _ in range(2):
        report = project.janitor()
        assert report["deleted"] == [], report
        assert set(report["kept"]) == {"odd", "old", "junk", "new"}
    fields = {"odd": "address, registered_at", "old": "registered_at", "junk": "record"}
    problems = project.ok("status")["problems"]
    for name, named in fields.items():
        run = f"it is kept until `pulse-railway delete --deployment-id {name}`"
        assert f"in the routing state, {name}: {named} not understood: {run}" in problems
        assert project.ok("delete", "--deployment-id", name)["deleted"] is True
    site.assert_stable("next")


def step_03_a_router_that_starts_while_redis_is_away(site: LiveSite) -> None:
    """The router serves the deployment in its variables, until it has the state from Redis."""
    project = site.project
    router = project.stage.services()["pulse-router"]["serviceId"]
    project.railway.graphql(DEPLOY, s=router, e=project.environment)
    site.wait_for_router()
    process = project.redis_process()
    assert process
    os.kill(process, signal.SIGSTOP)  # no connection is refused, and none is answered
    try:
        site.restart_router()
        site.wait_for_router()
        assert site.visited == "next"
        assert site.health == (200, {"ok": True, "without_state": True})
    finally:
        os.kill(process, signal.SIGCONT)
    eventually(lambda: site.health == (200, {"ok": True}), 20)
    assert site.get(pulse_deployment="new").json()["deployment_id"] == "new"


def step_04_a_closed_site_and_an_emptied_redis(site: LiveSite) -> None:
    """The site is open between the router's restart and the janitor's run: the router has the
    variables of its own deployment, and only the janitor reads the present ones."""
    project = site.project
    project.ok("maintenance", "on")
    assert site.get().status_code == 503
    site.lose_everything()
    assert site.visited == "next"
    assert site.health == (200, {"ok": True, "without_state": True})
    assert "next was promoted last" in project.ok("status")["problem"]
    assert project.janitor()["restored"] == "next"
    eventually(lambda: site.get().status_code == 503)
    assert project.ok("status")["maintenance"]
    project.ok("maintenance", "off")
    assert project.variables("pulse-router")["PULSE_RAILWAY_MAINTENANCE"] == ""
    assert site.get(pulse_deployment="new").json()["deployment_id"] == "new"
    site.assert_stable("next")
