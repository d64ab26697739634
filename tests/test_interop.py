"""pulse-railway 0.3.13, as published, on the local Railway: a client that we did not write.

It sets up a stack and deploys; our `ensure` takes the stack over without a restart of a backend;
its command line is used afterwards as before, and our janitor cleans up after both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer
from pulse_railway import contract
from tests import older
from tests.conftest import TINY, Project
from tests.net import eventually


def old(project: Project, *arguments: str, cwd: Path = TINY) -> Any:
    """A verb of the published command line; the JSON it prints."""
    done = published(project, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def published(
    project: Project, *arguments: str, cwd: Path = TINY
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*peer.command(), *arguments],
        cwd=cwd,
        env={**project.env, "HOME": peer.home_with_key(project.railway.root)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.timeout(480)  # 0.3.13 waits long between its looks
def test_a_stack_of_0_3_13_is_taken_over(project: Project, tmp_path: Path) -> None:
    peer.provide_images(project.railway.root)
    app = peer.write_app(TINY, tmp_path / "app")
    target = ("--project-id", project.id, "--environment-id", project.environment)
    made = old(project, "ensure", "main.py", *target, cwd=app)
    assert made["router"]["created"] is True
    first = old(project, "deploy", "main.py", "--deployment-id", "old-1", *target, cwd=app)
    old(project, "deploy", "main.py", "--deployment-id", "old-2", *target, cwd=app)
    assert first["deployment_id"] == "old-1"
    before = dict(project.records)
    assert before["old-1"]["state"] == "draining"
    assert "address" not in before["old-1"]
    # without an id it looks for `pulse-router-janitor`, a name it does not set up itself
    delete = ("delete", "--service", "pulse-router", *target, "--redis-service", "pulse-redis")
    refused = published(project, *delete, "--deployment-id", "old-1")
    assert refused.returncode != 0
    pids = stats(project)["pids"]
    meta = project.stage.get(f"https://{domain(project)}/_pulse/meta")
    assert meta.json()["deployment_id"] == "old-2"

    # ours takes over, and nobody notices
    done = project.ok("ensure", "main.py", "--plan")
    assert any("image" in line for line in done["planned"])
    done = project.ok("ensure", "main.py")
    assert done["changed"]
    assert project.ok("ensure", "main.py")["changed"] == []
    token = project.env["RAILWAY_API_TOKEN"]
    assert tokens(project) == (contract.NO_TOKEN, token)
    after = stats(project)["pids"]
    assert {k: after[k] for k in ("old-1", "old-2", "pulse-redis")} == {
        k: pids[k] for k in ("old-1", "old-2", "pulse-redis")
    }
    assert after["pulse-router"] != pids["pulse-router"]
    assert project.records == before  # no drain is lost
    for name in ("old-1", "old-2"):
        assert project.get("/_pulse/meta", pulse_deployment=name)["deployment_id"] == name
    assert project.get("/_pulse/meta")["deployment_id"] == "old-2"

    # and goes on with it
    ours = project.deploy("new-1")
    assert project.records["old-2"]["state"] == "draining"
    assert project.get("/_pulse/meta")["deployment_id"] == ours
    project.stage.run_janitor()
    eventually(lambda: "old-1" not in project.services, 20)

    # the old one still works in the stack that is ours now
    redone = old(project, "redeploy", "--deployment-id", "new-1", *target)
    assert redone["deployment_id"] == "new-1"
    assert project.get("/_pulse/meta")["deployment_id"] == "new-1"
    old(project, "deploy", "main.py", "--deployment-id", "old-3", *target, cwd=app)
    assert project.get("/_pulse/meta")["deployment_id"] == "old-3"
    assert project.records["new-1"]["state"] == "draining"
    said = published(project, *delete, "--deployment-id", "new-1")
    assert said.stderr.splitlines()[-1] == refused.stderr.splitlines()[-1]

    # and what it has left is seen, and cleaned up by ours
    status = project.ok("status")
    assert status["active"] == "old-3"
    rows = {row["deployment_id"]: row["state"] for row in status["deployments"]}
    assert rows == {"old-3": "active", "new-1": "draining"}
    assert project.variables("pulse-router")["PULSE_RAILWAY_ACTIVE"] == "new-1"
    project.stage.run_janitor()  # which notes what 0.3.13 has promoted, and deletes nothing then
    active = "PULSE_RAILWAY_ACTIVE"
    eventually(lambda: project.variables("pulse-router")[active] == "old-3", 20)
    assert "new-1" in project.services

    def cleaned() -> bool:
        project.stage.run_janitor()  # which Railway skips while the last run is alive
        time.sleep(2)
        return project.services & set(rows) == {"old-3"}

    eventually(cleaned, 60)
    eventually(lambda: set(project.records) == {"old-3"})
    noted = project.variables("pulse-router")
    promoted = json.loads(project.state["promoted"])
    assert (promoted["deployment_id"], repr(promoted["at"])) == (
        "old-3",
        noted["PULSE_RAILWAY_ACTIVE_AT"],
    )
    assert project.ok("status")["problems"] == []
    redone = old(project, "redeploy", "--deployment-id", "old-3", *target)
    assert redone["backend_status"] == "SUCCESS"
    assert project.get("/_pulse/meta")["deployment_id"] == "old-3"

    # down again, and up: 0.3.13 gives both the token that it runs with
    old(project, "ensure", "main.py", *target, cwd=app)
    assert tokens(project) == (token, token)
    project.ok("ensure", "main.py")
    assert tokens(project) == (contract.NO_TOKEN, token)
    assert project.get("/_pulse/meta")["deployment_id"] == "old-3"


def tokens(project: Project) -> tuple[str, str]:
    """Return RAILWAY_TOKEN of router and janitor."""
    names = ("pulse-router", "pulse-janitor")
    router, janitor = (project.variables(name)[contract.RAILWAY_TOKEN] for name in names)
    return router, janitor


def test_its_other_verbs_work_in_a_stack_that_was_taken_over(
    new_project: Callable[[], Project], tmp_path: Path
) -> None:
    """`delete` and `remove`, which take the janitor for one that is named after the router. The
    stack has names of its own, and is found by its router: before, "the baseline is partial,
    delete edge-router, memory ..."."""
    project = new_project()
    peer.provide_images(project.railway.root)
    app = peer.write_app(TINY, tmp_path / "app")
    text = (app / "main.py").read_text()
    names = {"router": "edge-router", "redis": "memory", "janitor": "edge-router-janitor"}
    named = "".join(f"    {role}_service='{name}',\n" for role, name in names.items())
    assert "RailwayPlugin(\n" in text
    (app / "main.py").write_text(text.replace("RailwayPlugin(\n", f"RailwayPlugin(\n{named}", 1))
    target = ("--project-id", project.id, "--environment-id", project.environment)
    redis = ("--service", "edge-router", *target, "--redis-service", "memory")
    old(project, "ensure", "main.py", *target, cwd=app)
    for name in ("old-1", "old-2"):
        old(project, "deploy", "main.py", "--deployment-id", name, *target, cwd=app)
    stable = {*names.values(), "edge-env"}
    assert project.services == {*stable, "old-1", "old-2"}
    project.ok("ensure", "main.py")
    project.deploy("new-1")
    assert project.services == {*stable, "old-1", "old-2", "new-1"}
    assert project.ok("status")["active"] == "new-1"

    refused = published(project, "delete", *redis, "--deployment-id", "new-1")
    assert refused.returncode != 0
    assert "cannot delete active deployment" in refused.stderr
    deleted = published(project, "delete", *redis, "--deployment-id", "old-1")
    assert deleted.returncode == 0, deleted.stderr
    removed = published(project, "remove", *redis, "--deployment-name", "old-2")
    assert (removed.returncode, removed.stdout.strip()) == (0, "old-2"), removed.stderr
    assert not project.services & {"old-1", "old-2"}
    (row,) = project.ok("status")["deployments"]
    assert (row["deployment_id"], row["state"]) == ("new-1", "active")


def test_the_version_before_shares_a_stack_with_this_one(
    new_project: Callable[[], Project], tmp_path: Path
) -> None:
    """Up, down and up again; each command line beside routers and janitors of the other version."""
    project = new_project()
    folder = older.unpack(tmp_path / "older")
    image = ("--runtime-image", older.provide_image(project.railway.root, folder))

    def before(*arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pulse_railway", *arguments, "--json"],
            cwd=TINY,
            env={**project.env, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def active() -> str:
        found = project.get("/_pulse/meta")["deployment_id"]
        assert found == project.active
        return str(found)

    window = ("--rollback-window-seconds", "900")
    before("ensure", "main.py", *window, *image)
    before("deploy", "main.py", "--deployment-id", "a")
    # this command line in the stack of the version before
    assert project.ok("status")["problems"] == []
    project.deploy("b")
    assert project.ok("rollback")["deployment_id"] == "a"
    assert "promoted" not in project.state
    assert active() == "a"

    project.ok("ensure", "main.py", *window)
    assert active() == "a"
    assert project.ok("status")["problems"] == []
    # the one before in the stack of this one
    before("deploy", "main.py", "--deployment-id", "c")
    assert json.loads(project.state["promoted"])["deployment_id"] == active() == "c"
    assert before("status")["active"] == "c"
    assert before("rollback")["deployment_id"] == active() == "a"
    assert project.ok("status")["problems"] == []

    before("ensure", "main.py", *window, *image)
    before("promote", "--deployment-id", "c")
    assert active() == "c"
    project.stage.run_janitor()

    project.ok("ensure", "main.py", *window)
    assert active() == "c"
    project.stage.run_janitor()
    eventually(lambda: json.loads(project.state["promoted"])["deployment_id"] == "c", 20)
    at = "PULSE_RAILWAY_ACTIVE_AT"
    eventually(
        lambda: (
            project.variables("pulse-router")[at]
            == repr(json.loads(project.state["promoted"])["at"])
        )
    )
    assert project.ok("status")["problems"] == []
    assert {"a", "c"} <= project.services
    assert project.ok("rollback")["deployment_id"] == active() == "a"


def stats(project: Project) -> Any:
    return project.railway.local("stats")


def domain(project: Project) -> str:
    raw = json.loads((project.railway.root / "state.json").read_text())
    router = next(
        s for s in raw["services"] if s["project_id"] == project.id and s["name"] == "pulse-router"
    )
    return str(router["instances"][0]["domains"][0]["domain"])
