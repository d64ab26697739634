"""pulse-railway 0.3.13, as published, on the local Railway: a client that we did not write.

It sets up a stack and deploys; our `ensure` takes the stack over without a restart of a backend;
it redeploys in the stack that is ours then.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import peer_python
from tests.conftest import TINY, Project
from tests.net import eventually


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`old(project, *arguments)`: the published command line; it knows one API address only, so
    that is changed in the process, and nothing else is."""
    python = peer_python()
    launcher = tmp_path_factory.mktemp("old") / "launch.py"
    launcher.write_text(
        "import os, sys\n"
        "import pulse_railway.constants as c\n"
        "c.RAILWAY_API_ENDPOINT = os.environ['PULSE_RAILWAY_API_URL']\n"
        "import pulse_railway.railway.client as client\n"
        "client.RAILWAY_API_ENDPOINT = c.RAILWAY_API_ENDPOINT\n"
        "client.RailwayGraphQLClient.__init__.__kwdefaults__['endpoint'] = c.RAILWAY_API_ENDPOINT\n"
        "from pulse_railway.cli import main\n"
        "main()\n"
    )

    def run(project: Project, *arguments: str, cwd: Path = TINY) -> str:
        done = subprocess.run(
            [str(python), str(launcher), *arguments],
            cwd=cwd,
            env=project.env,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def images(project: Project) -> None:
    """The published runtime images, which cannot be pulled here: their package, in an environment
    of its own, run with the start commands that 0.3.13 sets."""
    home = str(peer_python().parent)
    known = {name: {"path": [home]} for name in ("pulse-railway-router", "pulse-railway-janitor")}
    (project.railway.root / "images.json").write_text(json.dumps(known))


@pytest.mark.usefixtures("images")
def test_a_stack_of_0_3_13_is_taken_over(
    project: Project, old: Callable[..., Any], tmp_path: Path
) -> None:
    import shutil

    # 0.3.13 has no start_command: its own is used, so the app is a real Pulse app
    app = tmp_path / "app"
    shutil.copytree(TINY, app)
    text = (app / "main.py").read_text()
    text = text.replace('    start_command="python backend.py",\n', "")
    text = text.replace(
        "from pulse_railway import RailwayPlugin, internal_server_address",
        "from pulse_railway.plugin import RailwayPlugin",
    )
    text = text.replace("    internal_server_address=internal_server_address(),\n", "")
    text = text.replace(
        "app = ps.App(",
        "import os\n\napp = ps.App(\n"
        "    server_address=os.environ.get('PULSE_SERVER_ADDRESS'),\n"
        "    session_store=ps.CookieSessionStore(secret='x' * 32),",
    )
    (app / "main.py").write_text(text)

    target = ("--project-id", project.id, "--environment-id", project.environment)
    made = json.loads(old(project, "ensure", "main.py", *target, cwd=app))
    assert made["router"]["created"] is True
    first = json.loads(
        old(project, "deploy", "main.py", "--deployment-id", "old-1", *target, cwd=app)
    )
    json.loads(old(project, "deploy", "main.py", "--deployment-id", "old-2", *target, cwd=app))
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
    redone = json.loads(old(project, "redeploy", "--deployment-id", "new-1", *target))
    assert redone["deployment_id"] == "new-1"
    assert project.get("/_pulse/meta")["deployment_id"] == "new-1"
    json.loads(old(project, "deploy", "main.py", "--deployment-id", "old-3", *target, cwd=app))
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
