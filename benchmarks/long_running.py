"""The longer measurements of `invoke bench`: tail latency, scale, endurance, image."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import redis

from benchmarks import environment, servers
from benchmarks.servers import Server
from pulse_railway import runtime_image
from pulse_railway.local.supervisor import free_port

UPGRADE = (
    b"GET /socket HTTP/1.1\r\nhost: bench\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
SOCKETS = 9_500  # two descriptors each: near 20,000, the limit on most machines
DEPLOYMENTS = 200


def open_websockets(server: Server, count: int) -> list[socket.socket]:
    """Open `count` WebSockets."""
    sockets = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", server.port), 10)
        sock.sendall(UPGRADE)
        assert sock.recv(4096).startswith(b"HTTP/1.1 101")
        sockets.append(sock)
    return sockets


def tail(server: Server, rate: int, seconds: float) -> dict[str, float]:
    """Return percentiles of the milliseconds from a request's due time to its answer.

    The rate, in requests a second, does not depend on the answers (open loop).
    """
    command = [sys.executable, "-m", "benchmarks.load", "open", str(server.port), "/"]
    command += [str(rate), str(seconds)]
    output = servers.run_load(command)
    return {k: float(v) for k, v in json.loads(output).items()}


def tail_at_saturation(server: Server, seconds: float) -> float:
    """Return the 99th percentile in milliseconds with 32 busy connections (closed loop)."""
    command = ["wrk", "-t1", "-c32", f"-d{int(seconds)}", "--latency"]
    output = servers.run_load([*command, f"http://127.0.0.1:{server.port}/"])
    match = re.search(r"99%\s+([\d.]+)(us|ms|s)\b", output)
    assert match is not None, output
    return float(match[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[match[2]]


def scale(
    server: Server, store: str, cost: Callable[[Server, float], float], seconds: float
) -> dict[str, float]:
    """Return the ratio of a small request's cost with many sockets and deployments to that without,
    and the memory of a socket.

    The two are measured in turns, since the machine is noisy.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    client = redis.Redis.from_url(store)

    def store_records(count: int) -> None:
        for n in range(count):
            key = f"pulse:railway:deployment:old-{n}"
            client.set(key, json.dumps({"deployment_id": f"old-{n}", "state": "draining"}))
        for n in range(count, DEPLOYMENTS):
            client.delete(f"pulse:railway:deployment:old-{n}")
        client.publish("pulse:railway:events", "bench")
        time.sleep(4)

    cost(server, 1.0)
    without, with_all, memory = [], [], 0.0
    for _ in range(4):
        without.append(cost(server, seconds))
        store_records(DEPLOYMENTS)
        before = server.rss
        sockets = open_websockets(server, SOCKETS)
        time.sleep(1)
        memory = memory or (server.rss - before) / SOCKETS / 1024
        with_all.append(cost(server, seconds))
        for sock in sockets:
            sock.close()
        store_records(0)
    return {"cost ratio": min(with_all) / min(without), "memory a socket, KB": memory}


def endurance(
    server: Server, cost: Callable[[Server, float], float], requests: int, sockets: int
) -> dict[str, float]:
    """Return the growth of descriptors and memory over many requests and sockets.

    The growth counts from the first tenth on, when every pool is warm.
    """

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    def play(share: float) -> None:
        target = played[0] + requests * share
        while played[0] < target:
            began = server.cpu
            each = cost(server, 10.0)
            played[0] += (server.cpu - began) / each * 1e6
        for _ in range(int(sockets * share / 500)):
            for sock in open_websockets(server, 500):
                sock.close()

    def rest() -> tuple[int, int]:
        time.sleep(8)  # until idle connections are closed
        return descriptors(), server.rss

    played = [0.0]
    play(0.1)
    fds, memory = rest()
    play(0.9)
    fds_after, memory_after = rest()
    return {
        "requests": played[0],
        "descriptors more": fds_after - fds,
        "memory ratio": memory_after / memory,
    }


def image(store: str, folder: Path) -> dict[str, float]:
    """Return the size of the packages in the runtime image, and its start times.

    All is compiled, as in the image.
    """
    python = environment.runtime()
    packages = next((python.parent.parent / "lib").glob("python*/site-packages"))
    for script in runtime_image.SCRIPTS:
        shutil.copy(servers.ROOT / script, folder)
    for path in (packages, folder):
        subprocess.run([str(python), "-m", "compileall", "-q", str(path)], check=False)
    own = ("pip", "setuptools", "pip-", "setuptools-")
    size = sum(
        path.stat().st_size
        for path in packages.rglob("*")
        if path.is_file() and not path.relative_to(packages).parts[0].startswith(own)
    )
    port = free_port()
    env = {"REDIS_URL": store, "PORT": str(port), "HOST": "127.0.0.1", "RAILWAY_SERVICE_ID": "x"}
    router = [str(python), "-m", "router"]
    first, control = [], []
    for _ in range(5):
        began = time.monotonic()
        with servers.process("the runtime image's router", router, port, 0, env, folder):
            while not _healthy(port):
                time.sleep(0.01)
            first.append(time.monotonic() - began)
            began = time.monotonic()
            subprocess.run(
                [str(python), "-m", "control", "active"],
                env={**os.environ, **env},
                cwd=folder,
                check=True,
                capture_output=True,
            )
            control.append(time.monotonic() - began)
    return {
        "first healthy answer, ms": min(first) * 1000,
        "control active, ms": min(control) * 1000,
        "MB over its base": size / (1 << 20),
    }


def _healthy(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        return sock.recv(100).startswith(b"HTTP/1.1 200")
    return False
