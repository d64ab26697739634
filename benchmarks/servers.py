"""The servers that are compared, each a process on core 0; load and backend run on core 1."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from benchmarks import peer as published
from pulse_railway.local.supervisor import free_port, redis_executable

ROOT = Path(__file__).parent.parent
TICK = os.sysconf("SC_CLK_TCK")
CORES = sorted(os.sched_getaffinity(0))


@dataclass
class Server:
    name: str
    pid: int
    port: int
    start_seconds: float

    @property
    def cpu(self) -> float:
        """Return the CPU seconds of the process and its children so far."""
        total = 0
        for pid in (self.pid, *_children(self.pid)):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICK

    @property
    def rss(self) -> int:
        """Return the resident bytes of the process and its children."""
        pids = (self.pid, *_children(self.pid))
        return sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids
        ) * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def pin(core: int) -> None:
    os.sched_setaffinity(0, {CORES[core % len(CORES)]})


def run_load(command: list[str]) -> str:
    """Run a load generator on core 1, and return its output."""
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        preexec_fn=lambda: pin(1),
    ).stdout


@contextlib.contextmanager
def process(
    name: str,
    command: list[str],
    port: int,
    core: int,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
) -> Iterator[Server]:
    """Run a server on a core during a block, which begins when the server listens."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        popen = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: pin(core),
        )
        try:
            while True:
                if popen.poll() is not None or time.monotonic() - began > 30:
                    log.seek(0)
                    raise SystemExit(f"{name} did not start: {log.read().decode()[-2000:]}")
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.01)
            yield Server(name, popen.pid, port, time.monotonic() - began)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()


@contextlib.contextmanager
def backend() -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.backend", str(port)]
    with process("backend", command, port, core=1) as server:
        yield server


@contextlib.contextmanager
def state(backend_port: int, folder: Path) -> Iterator[dict[str, str]]:
    """Run a Redis with one active deployment, `bench-1`; yield the routers' environment."""
    port = free_port()
    command = [redis_executable(), "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    command += ["--dir", str(folder)]  # where no dump.rdb is
    with process("redis", command, port, core=1):
        record = {
            "deployment_id": "bench-1",
            "state": "active",
            "service_name": "bench-1",
            "drain_started_at": None,
            "address": f"http://127.0.0.1:{backend_port}",
        }
        client = redis.Redis(port=port)
        client.set("pulse:railway:deployment:bench-1", json.dumps(record))
        client.set("pulse:railway:active", "bench-1")
        # 0.3.13 connects to a backend by its private name only
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps({"bench-1.railway.internal": {"8000": backend_port}}))
        yield {
            "REDIS_URL": f"redis://127.0.0.1:{port}",
            "RAILWAY_LOCAL_HOSTS": str(hosts),
            "PYTHONPATH": str(ROOT / "pulse_railway/local/site"),
        }


@contextlib.contextmanager
def ours(env: dict[str, str]) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, str(ROOT / "router.py")]
    router_env = {**env, "PORT": str(port), "HOST": "127.0.0.1"}
    with process("pulse-railway 0.4", command, port, 0, router_env) as server:
        yield server


@contextlib.contextmanager
def peer(env: dict[str, str]) -> Iterator[Server]:
    port = free_port()
    command = [str(published.python()), "-m", "uvicorn", "pulse_railway.router:build_app_from_env"]
    command += ["--factory", "--host", "127.0.0.1", "--port", str(port)]
    home = ROOT / ".benchmarks"  # in ROOT Python would import our own package
    with process(f"pulse-railway {published.VERSION}", command, port, 0, env, home) as server:
        yield server


@contextlib.contextmanager
def caddy(backend_port: int, folder: Path) -> Iterator[Server]:
    port = free_port()
    config = folder / "Caddyfile"
    config.write_text(
        "{\n admin off\n auto_https off\n}\n"
        f"http://127.0.0.1:{port} {{\n reverse_proxy 127.0.0.1:{backend_port}\n}}\n"
    )
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(config)]
    env = {"GOMAXPROCS": "1", "HOME": str(folder)}
    with process("Caddy", command, port, 0, env) as server:
        yield server


@contextlib.contextmanager
def nginx(backend_port: int, folder: Path) -> Iterator[Server]:
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"""daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 2048; }}
http {{
  access_log off; client_max_body_size 0; keepalive_requests 1000000000;
  proxy_request_buffering off;
  upstream b {{ server 127.0.0.1:{backend_port}; keepalive 64; }}
  map $http_upgrade $up {{ default upgrade; '' ''; }}
  server {{ listen 127.0.0.1:{port};
    location / {{ proxy_pass http://b; proxy_http_version 1.1; proxy_buffering off;
      proxy_set_header Connection $up; proxy_set_header Upgrade $http_upgrade; }} }}
}}"""
    )
    command = ["nginx", "-c", str(config), "-p", str(folder)]
    with process("nginx", command, port, 0) as server:
        yield server
