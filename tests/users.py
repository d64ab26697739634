"""A deployed app on a local Railway: its visitors, and changes to its state from outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import BASE, Project
from tests.net import eventually

PREFIX = "pulse:railway"
DELETE = "mutation ($s: String!) { serviceDelete(id: $s) }"
DEPLOY = """
mutation ($s: String!, $e: String!) { serviceInstanceDeployV2(serviceId: $s, environmentId: $e) }
"""


class LiveSite:
    """A project's site as visitors see it, with changes that no verb or janitor makes."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.address = str(project.ok("status")["address"])
        # in a file for each deployment: the number of tabs that it reports
        self.tabs = Path(tempfile.mkdtemp(dir=project.railway.root))

    def deploy(self, name: str, *arguments: str, tabs: int = 1) -> None:
        (self.tabs / name).write_text(str(tabs))
        self.project.deploy(name, *arguments, "--env", f"TINY_SESSIONS={self.tabs / name}")

    def get(self, path: str = "/_pulse/meta", **params: str) -> httpx.Response:
        return self.project.stage.get(f"{self.address}{path}", **params)

    @property
    def visited(self) -> str | None:
        """Return the deployment that a new visitor gets."""
        answer = self.get()
        return answer.json()["deployment_id"] if answer.status_code == 200 else None

    @property
    def health(self) -> tuple[int, Any]:
        answer = self.get("/healthz")
        return answer.status_code, answer.json()

    @property
    def last_promoted(self) -> tuple[str | None, float]:
        """Return the deployment that was promoted last, and the time, by Railway's variables."""
        variables = self.project.variables("pulse-router")
        at = float(variables.get("PULSE_RAILWAY_ACTIVE_AT") or 0)
        return variables.get("PULSE_RAILWAY_ACTIVE"), at

    def restart_router(self) -> None:
        """Restart the router; return when the old process has ended. See `wait_for_router`."""
        process = self.project.railway.local("stats")["pids"]["pulse-router"]
        self.project.restart("pulse-router")
        eventually(lambda: not Path(f"/proc/{process}").exists(), 20)

    def wait_for_router(self) -> None:
        eventually(lambda: self.project.latest("pulse-router")["status"] == "SUCCESS", 20)

    def snapshot(self) -> Path:
        """Return a snapshot without routers' reports, older than their two minutes."""
        for key in self.project.redis.scan_iter(f"{PREFIX}:router:*"):
            self.project.redis.delete(key)
        return self.project.snapshot()

    def lose(self, snapshot: Path, *, restart: bool) -> None:
        """Restart Redis with an older snapshot; with `restart` the router too."""
        if restart:  # the old router ends before Redis, and the new one has no memory
            self.restart_router()
        self.project.restore_snapshot(snapshot)
        if restart:
            self.wait_for_router()

    def lose_everything(self) -> None:
        """Empty Redis and restart the routers: only Railway's variables are left."""
        self.restart_router()
        self.project.redis.flushall()
        self.wait_for_router()

    def change_record(self, name: str, **fields: Any) -> None:
        """Change a record in Redis, without an announcement."""
        record = self.project.records[name] | fields
        self.project.redis.set(f"{PREFIX}:deployment:{name}", json.dumps(record))

    def delete_record(self, name: str) -> None:
        """Delete a record just after the routers have read it: they do not notice for a while."""
        self.project.redis.publish(f"{PREFIX}:events", "[]")
        time.sleep(0.3)
        assert self.project.redis.delete(f"{PREFIX}:deployment:{name}") == 1

    def inside(self, service: str, command: str) -> subprocess.CompletedProcess[str]:
        """Run `railway ssh --service <service> -- <command>`."""
        env = self.project.env
        words = ["railway", "ssh", "-i", env["PULSE_RAILWAY_SSH_KEY"], "-s", service, "--", command]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)

    @contextlib.contextmanager
    def visitors(self) -> Iterator[set[int]]:
        """Send a visitor every 50 ms during the block; yield the statuses that they get."""
        seen: set[int] = set()
        over = threading.Event()

        def visit() -> None:
            while not over.wait(0.05):
                with contextlib.suppress(httpx.HTTPError):
                    seen.add(self.get().status_code)

        thread = threading.Thread(target=visit)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()

    def assert_stable(self, name: str, removed: str = "") -> None:
        """Run the janitor three times; assert that `name` is active everywhere, and that nothing
        but `removed` was deleted."""
        before = self.project.services
        reports = [self.project.janitor() for _ in range(3)]
        assert [report["exit"] for report in reports] == [0, 0, 0], reports
        assert {name for report in reports for name in report["deleted"]} <= {removed}
        assert self.project.services == before
        assert self.project.active == name
        states = {k: v["state"] for k, v in self.project.records.items()}
        assert states.pop(name) == "active"
        assert "active" not in states.values()
        assert BASE | {name} | set(states) == before
        promoted = json.loads(self.project.state["promoted"])
        assert (promoted["deployment_id"], promoted["at"]) == (name, self.last_promoted[1])
        assert self.last_promoted[0] == name
        assert self.visited == name
        status = self.project.ok("status")
        assert (status["active"], status["problems"]) == (name, [])
