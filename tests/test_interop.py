"""pulse-railway 0.3.13, as published, on the local Railway: a client that we did not write.

It sets up a stack and deploys; our `ensure` takes the stack over without a restart of a backend;
it redeploys in the stack that is ours then.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import peer
from tests.conftest import TINY, Project
from tests.net import eventually


def old(project: Project, *arguments: str, cwd: Path = TINY) -> Any:
    """A verb of the published command line; the JSON it prints."""
    done = subprocess.run(
        [*peer.command(), *arguments],
        cwd=cwd,
        env={**project.env, "HOME": peer.home_with_key(project.railway.root)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


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
    pids = stats(project)["pids"]
    meta = project.stage.get(f"https://{domain(project)}/_pulse/meta")
    assert meta.json()["deployment_id"] == "old-2"

    # ours takes over, and nobody notices
    done = project.ok("ensure", "main.py", "--plan")
    assert any("image" in line for line in done["planned"])
    done = project.ok("ensure", "main.py")
    assert done["changed"]
    assert project.ok("ensure", "main.py")["changed"] == []
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
    # (without an id it looks for `pulse-router-janitor`, a name it does not set up itself)
    redone = old(project, "redeploy", "--deployment-id", "new-1", *target)
    assert redone["deployment_id"] == "new-1"
    assert project.get("/_pulse/meta")["deployment_id"] == "new-1"
    old(project, "deploy", "main.py", "--deployment-id", "old-3", *target, cwd=app)
    assert project.get("/_pulse/meta")["deployment_id"] == "old-3"
    assert project.records["new-1"]["state"] == "draining"


def stats(project: Project) -> Any:
    import httpx

    return httpx.get(project.railway.api.replace("/graphql/v2", "/local/stats")).json()


def domain(project: Project) -> str:
    raw = json.loads((project.railway.root / "state.json").read_text())
    router = next(
        s for s in raw["services"] if s["project_id"] == project.id and s["name"] == "pulse-router"
    )
    return str(router["instances"][0]["domains"][0]["domain"])
