"""`pulse-railway serve` with several processes of a real Pulse app, each beside a React server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.instances import environment_of_backend
from pulse_railway import contract
from pulse_railway.app import serve
from pulse_railway.local.supervisor import free_port
from tests.net import eventually

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
SITE = {
    "main.py": """
import asyncio, os
import pulse as ps
from pulse_railway import RailwayPlugin
if os.environ.get("FAILS") == os.environ["PORT"] and not os.path.exists("works"):
    raise RuntimeError("it cannot start")
app = ps.App(routes=[], plugins=[RailwayPlugin()], session_store=ps.InMemorySessionStore(),
             server_address="https://x.example")

@app.fastapi.get("/api/who")
async def who():
    return {"port": os.environ["PORT"], "pid": os.getpid()}

@app.fastapi.get("/api/sleep")
async def sleep():
    import time
    time.sleep(6)

@app.fastapi.get("/api/tabs")
async def tabs(count: int):
    class Tab:
        connected = True
    app.render_sessions.clear()
    app.render_sessions.update({str(n): Tab() for n in range(count)})

async def reload():
    return len(app.render_sessions)
app.reload_connected_clients = reload
""",
    "web/build/server/index.js": "",
    # asks the address that a build has, as Pulse's layout does
    "web/node_modules/@react-router/serve/dist/cli.js": """
const first = process.env.FIRST;
require("http").createServer(async (_, to) => {
  const from = [`http://127.0.0.1:${first}/api/who`, new URL(`http://localhost:${first}/api/who`),
                new Request(`http://127.0.0.1:${first}/api/who`)];
  const answers = await Promise.all(from.map((url) => fetch(url).then((a) => a.json())));
  let wrong = "";
  try { await fetch("no address"); } catch (error) { wrong = error.name; }
  to.end(JSON.stringify({ rendered: answers.map((a) => a.port), wrong, pid: process.pid,
                          ssr: process.env.PULSE_SSR_BACKEND_URL ?? null }));
}).listen(Number(process.env.PORT), "127.0.0.1");
""",
}
TOKEN = {contract.INTERNAL_TOKEN_HEADER: "secret-token"}
Start = Callable[..., "Container"]


class Container:
    def __init__(
        self, folder: Path, count: str, env: dict[str, Any], files: dict[str, str] = SITE
    ) -> None:
        self.port = consecutive_ports(4)
        self.folder = folder
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if "FAILS" in env:
            env["FAILS"] = str(self.port + int(env["FAILS"]) - 1)
        self.log = open(folder / "log", "w+b")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "pulse_railway", "serve"],
            cwd=folder,
            env={
                **environment_of_backend("prod-1", "secret-token", count, self.port),
                "FIRST": str(self.port),
                **env,
            },
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def get(self, number: int, path: str, **more: Any) -> Any:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port + number - 1}{path}", timeout=10, **more)
        except httpx.HTTPError:
            return httpx.Response(599, json={})

    def up(self, number: int) -> bool:
        return bool(self.get(number, "/_pulse/health").status_code == 200)

    def renders(self, number: int) -> bool:
        return bool(self.get(number, "/").status_code == 200)

    @property
    def output(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def end(self) -> int:
        """Stop it as Railway does; return its exit status."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        below = serve.descendants(self.popen.pid)
        self.log.close()
        assert not below
        return self.popen.wait()


def consecutive_ports(count: int) -> int:
    while True:
        ports = [free_port() for _ in range(count)]
        if ports == list(range(ports[0], ports[0] + count)):
            return ports[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Container] = []

    def begin(count: str = "2", **env: Any) -> Container:
        running.append(Container(tmp_path, count, env))
        return running[-1]

    yield begin
    for container in running:
        container.end()


def test_each_process_renders_its_own_pages_and_the_first_speaks_for_all(start: Start) -> None:
    site = start("3")
    for number in (2, 3, 1):  # the health check, which asks the first, passes when all are up
        eventually(partial(site.up, number), 90)
        assert number != 1 or (site.up(2) and site.up(3)), site.output
    servers = set()
    for number in (1, 2, 3):
        port = str(site.port + number - 1)
        eventually(partial(site.renders, number), 30)
        page = site.get(number, "/").json()
        assert page["rendered"] == [port] * 3
        assert (page["wrong"], page["ssr"]) == ("TypeError", f"http://127.0.0.1:{port}")
        servers.add(page["pid"])
        meta = site.get(number, contract.META_PATH).json()
        assert (meta["deployment_id"], meta["instance"], meta["instances"]) == ("prod-1", number, 3)
        site.get(number, f"/api/tabs?count={number}")
    assert len(servers) == 3

    def sessions(number: int) -> Any:
        return site.get(number, contract.SESSIONS_PATH, headers=TOKEN)

    assert [sessions(n).json()["render_session_count"] for n in (1, 2, 3)] == [6, 2, 3]
    assert sessions(1).json()["drainable"] is False
    reload = f"http://127.0.0.1:{site.port}{contract.RELOAD_PATH}"
    told = httpx.post(reload, headers=TOKEN).json()
    assert (told["connected_render_count"], told["reloaded_socket_count"]) == (6, 6)
    assert sessions(1).status_code == 200
    assert site.get(1, contract.SESSIONS_PATH).status_code == 403
    # a process that is silent, or gone: its tabs are not known
    third = site.get(3, "/api/who").json()["pid"]
    os.kill(third, signal.SIGSTOP)
    assert sessions(1).status_code == 503
    os.kill(third, signal.SIGKILL)
    assert sessions(1).status_code == 503
    eventually(lambda: sessions(1).status_code == 200, 30)  # it was started again
    assert sessions(1).json()["render_session_count"] == 3
    assert "of instance 3 has ended with status -9: it starts again in 1 s" in site.output
    # React's server alone
    os.kill(site.get(2, "/").json()["pid"], signal.SIGKILL)
    second = site.get(2, "/api/who").json()["pid"]
    eventually(lambda: site.get(2, "/").status_code == 200, 30)
    assert site.get(2, "/api/who").json()["pid"] == second
    assert site.get(2, "/").json()["rendered"] == [str(site.port + 1)] * 3
    assert site.end() == 0


def test_all_processes_at_once_are_the_containers_end(start: Start) -> None:
    site = start("2")
    eventually(lambda: site.up(1), 90)
    pids = [site.get(number, "/api/who").json()["pid"] for number in (1, 2)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert site.popen.wait(20) == 137


@pytest.mark.parametrize("which", [1, 2])
def test_a_process_that_does_not_come_up_ends_the_container(start: Start, which: int) -> None:
    site = start("2", FAILS=which)
    assert site.popen.wait(90) == 1
    assert "it cannot start" in site.output


@pytest.mark.parametrize("count", ["0", "x", "-1", "65", "1.5"])
def test_another_number_is_one_line(start: Start, count: str) -> None:
    site = start(count)
    assert site.popen.wait(20) == 1
    expected = f"PULSE_RAILWAY_INSTANCES takes a whole number from 1 to 64, not '{count}'"
    assert site.output == f"error: {expected}\n"


def test_pauses_grow_and_begin_anew_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    child = serve.Child({"args": ["x"]}, 0, 2)
    pauses = []
    for _ in range(7):
        child.started_at = now[0]
        child.ended(1)
        pauses.append((child.due or 0.0) - now[0])
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    child.started_at = now[0]
    now[0] += 61
    child.ended(1)
    assert child.due == now[0] + 1


def test_commands_of_an_instance_differ_in_ports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8000")
    web = {"args": ["node", "cli.js"], "env": {"PORT": "5173", "NODE_OPTIONS": "--trace-warnings"}}
    env = {"PORT": "8000", "PULSE_PORT": "8000", "OTHER": "8000"}
    server = {
        "args": ["python", "-m", "uvicorn", "main:app", "--host", "", "--port", "8000", "--x"],
        "env": {**env, "PULSE_REACT_SERVER_ADDRESS": "http://localhost:5173"},
    }
    first = serve.commands_of_instance([web, server], 1, 2, 5173)
    assert [c["args"] for c in first] == [web["args"], server["args"]]
    own = {name: value for name, value in first[1]["env"].items() if name in server["env"]}
    assert own == server["env"]
    assert first[0]["env"]["NODE_OPTIONS"] == "--trace-warnings"
    web2, server2 = serve.commands_of_instance([web, server], 2, 2, 5999)
    assert server2["args"][-2:] == ["8001", "--x"]
    assert server2["env"] | {"NODE_OPTIONS": ""} == {
        **env,
        "PORT": "8001",
        "PULSE_PORT": "8001",
        "PULSE_REACT_SERVER_ADDRESS": "http://localhost:5999",
        "PULSE_RAILWAY_INSTANCE": "2",
        "PULSE_RAILWAY_INSTANCES": "2",
        "PULSE_SSR_BACKEND_URL": "http://127.0.0.1:8001",
        "PULSE_DISABLE_CODEGEN": "1",
        "NODE_OPTIONS": "",
    }
    assert web2["env"]["PORT"] == "5999"
    assert web2["env"]["NODE_OPTIONS"] == f'--trace-warnings --require "{serve.SSR_SCRIPT}"'
    assert json.dumps(web["env"]) == '{"PORT": "5173", "NODE_OPTIONS": "--trace-warnings"}'
