"""An app with users on a local Railway: what they see, and what is done behind everybody's back."""

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
    """What users see of a project, and what can be done to it behind everybody's back."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.address = str(project.ok("status")["address"])
        # the number of tabs that each deployment says it has
        self.tabs = Path(tempfile.mkdtemp(dir=project.railway.root))

    def deploy(self, name: str, *arguments: str, tabs: int = 1) -> None:
        (self.tabs / name).write_text(str(tabs))
        self.project.deploy(name, *arguments, "--env", f"TINY_SESSIONS={self.tabs / name}")

    def get(self, path: str = "/_pulse/meta", **params: str) -> httpx.Response:
        return self.project.stage.get(f"{self.address}{path}", **params)

    @property
    def visited(self) -> str | None:
        """The deployment that a newcomer gets."""
        answer = self.get()
        return answer.json()["deployment_id"] if answer.status_code == 200 else None

    @property
    def health(self) -> tuple[int, Any]:
        answer = self.get("/healthz")
        return answer.status_code, answer.json()

    @property
    def last_promoted(self) -> tuple[str | None, float]:
        """What Railway says was promoted last, and when."""
        found = self.project.variables("pulse-router")
        return found.get("PULSE_RAILWAY_ACTIVE"), float(found.get("PULSE_RAILWAY_ACTIVE_AT") or 0)

    def restart_router(self) -> None:
        """The one that runs has ended then; see `wait_for_router`."""
        stats = self.project.railway.api.replace("/graphql/v2", "/local/stats")
        process = httpx.get(stats).json()["pids"]["pulse-router"]
        self.project.restart("pulse-router")
        eventually(lambda: not Path(f"/proc/{process}").exists(), 20)

    def wait_for_router(self) -> None:
        eventually(lambda: self.project.latest("pulse-router")["status"] == "SUCCESS", 20)

    def snapshot(self) -> Path:
        """An older one, beyond what routers said of themselves: such a report lives two minutes."""
        for key in self.project.redis.scan_iter(f"{PREFIX}:router:*"):
            self.project.redis.delete(key)
        return self.project.snapshot()

    def lose(self, snapshot: Path, *, restart: bool) -> None:
        """Redis comes back with an older snapshot."""
        if restart:  # it ends before Redis does, and remembers nothing
            self.restart_router()
        self.project.restore_snapshot(snapshot)
        if restart:
            self.wait_for_router()

    def lose_everything(self) -> None:
        """Redis is emptied, and the routers restart: nobody but Railway remembers anything."""
        self.restart_router()
        self.project.redis.flushall()
        self.wait_for_router()

    def change_record(self, name: str, **fields: Any) -> None:
        """As somebody else writes it: without an announcement."""
        record = self.project.records[name] | fields
        self.project.redis.set(f"{PREFIX}:deployment:{name}", json.dumps(record))

    def delete_record(self, name: str) -> None:
        """It is gone just after the routers have read the state: for a while none of them knows."""
        self.project.redis.publish(f"{PREFIX}:events", "[]")
        time.sleep(0.3)
        assert self.project.redis.delete(f"{PREFIX}:deployment:{name}") == 1

    def inside(self, service: str, command: str) -> subprocess.CompletedProcess[str]:
        """`railway ssh --service <service> -- <command>`."""
        env = self.project.env
        words = ["railway", "ssh", "-i", env["PULSE_RAILWAY_SSH_KEY"], "-s", service, "--", command]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)

    @contextlib.contextmanager
    def visitors(self) -> Iterator[set[int]]:
        """Visitors come all the while; what status they have got."""
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
        """Three runs of the janitor later this one is active, nothing that lives is deleted, and
        nobody says anything else."""
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
        found = self.project.ok("status")
        assert (found["active"], found["problems"]) == (name, [])
