"""Two versions of two processes each, real Pulse apps behind a real router, from deploy to drain.

Every container is a real `pulse-railway serve`; React's server alone is stood in for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.visitor import Visitor
from pulse_railway import runtime_image
from tests import older
from tests.conftest import ROOT, Process, Redis
from tests.net import eventually
from tests.test_serve_instances import Container

control: Any = runtime_image.load("control")
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
TOKEN = "token"  # 0.3.13's janitor is given this one (older.py)
CHAOS = (ROOT / "tests" / "apps" / "chaos" / "main.py").read_text()
SITE = {
    # the session is in Redis, the tab's counter in its process
    "main.py": CHAOS.replace(
        "session_timeout=5.0", 'session_timeout=3.0, server_address="https://x.example"'
    )
    + """

@app.fastapi.get("/api/who")
async def who():
    return {"pid": os.getpid()}
""",
    "web/build/server/index.js": "",
    "web/node_modules/@react-router/serve/dist/cli.js": """
require("http").createServer((_, to) => {
  to.setHeader("content-type", "text/html");
  to.end("page");
}).listen(Number(process.env.PORT), "127.0.0.1");
""",
}


class Tab(Visitor):
    """A browser's tab: the page's cookie says which process its visitor has."""

    visitor = ""

    def _headers(self) -> dict[str, str]:
        cookies = [super()._headers().get("cookie", ""), self.visitor]
        return {"cookie": "; ".join(filter(None, cookies))}

    async def load(self) -> None:
        """Load the page in the address bar, as after a reload."""
        headers = {"accept": "text/html", **self._headers()}
        async with self._http.get(f"{self.address}/", headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            process = re.findall('pulse;desc="([^"]+)"', answer.headers["server-timing"])
            if "pulse_railway_visitor" in answer.cookies:
                value = answer.cookies["pulse_railway_visitor"].value
                self.visitor = f"pulse_railway_visitor={value}"
        self.directives, self.tab = {}, 0
        await self.open()
        assert [self.affinity] == process  # the socket goes where the page came from
        await self.connect()

    async def goes_on(self) -> bool:
        """Press the button: does the tab have its state still?"""
        before, affinity = self.tab, self.affinity
        with contextlib.suppress(Exception):
            await self.count()
            return self.tab == before + 1 and self.affinity == affinity and not self.reloads
        return False


class Stage:
    def __init__(self, redis: Redis, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.redis, self.folder = redis, folder
        self.containers: dict[str, Container] = {}
        monkeypatch.setenv("REDIS_URL", redis.url)
        monkeypatch.setenv("RAILWAY_SERVICE_ID", "here")
        monkeypatch.delenv("PULSE_RAILWAY_ACTIVE", raising=False)

    def start(self, name: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        env = {
            "PULSE_DEPLOYMENT_ID": name,
            "PULSE_RAILWAY_INTERNAL_TOKEN": TOKEN,
            "PULSE_RAILWAY_REDIS_URL": self.redis.url,
        }
        self.containers[name] = Container(folder, "2", env, SITE)

    def register(self, name: str) -> None:
        container = self.containers[name]
        eventually(lambda: container.up(1) or container.popen.poll() is not None, 90)
        assert container.popen.poll() is None, container.output
        words = ["--service-name", name, "--service-id", f"s-{name}", "--instances", "2"]
        words += ["--address", f"http://127.0.0.1:{container.port}", "--hold"]
        assert self.control("register", "--deployment-id", name, *words) == 0, container.output

    def promote(self, name: str, *words: str) -> None:
        names = ["--active-deployment-id", name, "--active-service-name", name]
        assert self.control("promote", *names, *words) == 0

    def control(self, *words: str) -> int:
        return int(control.control(list(words)))

    @property
    def hosts(self) -> Path:
        """The private network's names, for 0.3.13."""
        path = self.folder / "hosts.json"
        ports = {f"{n}.railway.internal": {"8000": c.port} for n, c in self.containers.items()}
        path.write_text(json.dumps(ports))
        return path

    def run_older_janitor(self) -> list[str]:
        """Run 0.3.13's janitor, and return the deployments whose services it deletes."""
        names = ("service_id", "service_name", "deployment_id")
        found = [dict(zip(names, (f"s-{n}", n, n), strict=True)) for n in self.containers]
        with older.Published(self.redis.url, self.hosts) as process:
            steps = list(process.janitor(lambda: found))
        return [step[1].removeprefix("s-") for step in steps if step[0] == "delete service"]


@pytest.mark.timeout(300)
def test_every_tab_stays_on_its_version_and_process(
    redis_server: Redis,
    run_router: Callable[..., Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(redis_server, tmp_path, monkeypatch)
    try:
        stage.start("a")
        stage.register("a")
        stage.promote("a")
        router = run_router(redis_server, {"refresh_seconds": 1.0})
        address = f"http://127.0.0.1:{router.port}"
        eventually(lambda: httpx.get(f"{address}/_pulse/meta").status_code == 200)
        asyncio.run(play(stage, address))
    finally:
        codes = [container.end() for container in stage.containers.values()]
    assert set(codes) <= {0}


async def play(stage: Stage, address: str) -> None:
    nothing: Any = None
    async with contextlib.AsyncExitStack() as open_tabs:
        tabs: list[Tab] = []

        async def visit(count: int) -> list[Tab]:
            new = []
            for _ in range(count):
                tab = await open_tabs.enter_async_context(Tab(address, nothing))
                await tab.load()
                new.append(tab)
            tabs.extend(new)
            return new

        async def all_go_on(of: list[Tab]) -> None:
            lost = [t.affinity for t, ok in zip(of, await goes_on(of), strict=True) if not ok]
            assert lost == []

        async def goes_on(of: list[Tab]) -> list[bool]:
            return list(await asyncio.gather(*(tab.goes_on() for tab in of)))

        def on(*names: str) -> list[Tab]:
            return [tab for tab in tabs if tab.affinity in names]

        await visit(12)
        assert {tab.affinity for tab in tabs} == {"a", "a.2"}
        await all_go_on(tabs)
        # a canary
        await asyncio.to_thread(stage.start, "b")
        await asyncio.to_thread(stage.register, "b")
        await asyncio.to_thread(stage.promote, "b", "--weight", "50")
        await all_go_on(tabs)
        for _ in range(6):  # a visitor without a cookie is drawn by address and user agent
            for tab in await visit(2):
                assert str(tab.affinity)[0] in "ab"
        await all_go_on(tabs)
        # deployed
        await asyncio.to_thread(stage.promote, "b")
        await visit(12)
        assert {"b", "b.2"} <= {str(tab.affinity) for tab in tabs[-12:]} <= {"b", "b.2"}
        await all_go_on(tabs)
        sessions = {tab.cookie: tab.session for tab in tabs}
        # a process is killed: its tabs alone are told to reload
        pid = stage.containers["b"].get(2, "/api/who").json()["pid"]
        os.kill(pid, signal.SIGKILL)
        hit, others = on("b.2"), [tab for tab in tabs if tab.affinity != "b.2"]
        assert hit
        await all_go_on(others)
        new = await visit(4)
        assert {tab.affinity for tab in new} == {"b"}  # the other process
        await asyncio.to_thread(eventually, lambda: stage.containers["b"].up(2), 30)
        for tab in hit:
            await tab.leave()
            tab.reloads = 0
            await tab.load()
            assert tab.session == sessions[tab.cookie]  # it is in Redis
        assert {tab.affinity for tab in hit} <= {"b", "b.2"}
        await all_go_on(tabs)
        # rolled back: new visitors get the old version, and everybody else stays
        await asyncio.to_thread(stage.promote, "a", "--instead-of", "b", "--rolls-back")
        await all_go_on(tabs)
        new = await visit(6)
        assert {str(tab.affinity)[0] for tab in new} == {"a"}
        # drained: 0.3.13's janitor counts the tabs of both processes
        for tab in on("b"):
            await tab.leave()
            tabs.remove(tab)
        assert on("b.2")
        await asyncio.sleep(6)  # the session timeout
        assert await asyncio.to_thread(stage.run_older_janitor) == []
        await all_go_on(tabs)
        record = stage.redis.client.get("pulse:railway:deployment:a")  # it wrote it anew
        await asyncio.to_thread(
            eventually,
            lambda: "instances" in str(stage.redis.client.get("pulse:railway:deployment:a")),
            20,
        )
        assert record
        await all_go_on(tabs)
        assert {"a", "a.2", "b.2"} == {str(tab.affinity) for tab in tabs}
        for tab in on("b.2"):
            await tab.leave()
            tabs.remove(tab)
        await asyncio.sleep(6)
        assert await asyncio.to_thread(stage.run_older_janitor) == ["b"]
        await all_go_on(tabs)
