"""Fixtures: a Redis, a router process, a local Railway. All real, all ended with the test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from examples import demo
from pulse_railway.local.supervisor import free_port, redis_executable

ROOT = Path(__file__).parent.parent


class Process:
    """A server under test: started, waited for, ended by its process id."""

    def __init__(self, command: list[str], port: int, env: dict[str, str] | None = None) -> None:
        self.port = port
        self.log = tempfile.TemporaryFile()
        self.popen = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def wait(self, seconds: float = 20) -> Process:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.popen.poll() is None, self.output()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"nothing listens on {self.port}: {self.output()}")

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.popen.poll() is None:
            try:
                os.killpg(self.popen.pid, number)
                self.popen.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()
        return self.popen.returncode

    @property
    def rss(self) -> int:
        """Resident memory in bytes."""
        pages = Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu(self) -> float:
        """CPU seconds used so far."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Redis:
    """A redis-server that a test may stop and start again, on the same port."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: Process | None = None
        self.start()

    def start(self) -> None:
        command = [redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--dir", tempfile.gettempdir()]
        self.process = Process(command, self.port).wait()

    def stop(self) -> None:
        if self.process:
            self.process.stop(signal.SIGKILL)
            self.process = None

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, decode_responses=True)

    def deployment(self, name: str, address: str | None, state: str = "active", **more: Any) -> None:
        """Write a record as section 3 of the design says, and announce it."""
        record = {
            "deployment_id": name,
            "state": state,
            "service_name": name,
            "drain_started_at": None,
            **more,
        }
        if address:
            record["address"] = address
        client = self.client
        client.set(f"pulse:railway:deployment:{name}", json.dumps(record))
        if state == "active":
            client.set("pulse:railway:active", name)
        client.publish("pulse:railway:events", name)


@pytest.fixture
def redis_server() -> Iterator[Redis]:
    server = Redis()
    yield server
    server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """`start(command, port, env)`: a process that ends with the test."""
    processes: list[Process] = []

    def begin(command: list[str], port: int, env: dict[str, str] | None = None) -> Process:
        process = Process(command, port, env)
        processes.append(process)
        return process.wait()

    yield begin
    for process in processes:
        process.stop(signal.SIGKILL)


@pytest.fixture
def run_router(start: Callable[..., Process]) -> Callable[..., Process]:
    """`run_router(redis, NAME=value, ...)`: router.py with REDIS_URL and PORT, as in its image."""

    def begin(server: Redis | None, **env: str) -> Process:
        port = free_port()
        given = {"PORT": str(port), "HOST": "127.0.0.1", **env}
        if server:
            given["REDIS_URL"] = server.url
        return start([sys.executable, str(ROOT / "router.py")], port, given)

    return begin


@pytest.fixture(scope="session")
def railway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[demo.Stage]:
    """A local Railway for tests that leave its first project as they found it: empty."""
    root = tmp_path_factory.mktemp("railway").resolve()
    with demo.stage(root) as stage:
        yield stage
    assert not demo.processes_of(root), "the local Railway left processes behind"


class Verb:
    """A finished command line."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The `error: ...` line, of which there is one and no traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        return lines[0]


def pulse_railway(
    *arguments: str, env: dict[str, str], cwd: Path = ROOT, timeout: float = 240
) -> Verb:
    """`pulse-railway <arguments>` as its own process."""
    command = [sys.executable, "-m", "pulse_railway", *arguments]
    done = subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    return Verb(done)
