"""`invoke bench`: measures the router, and the published 0.3.13, Caddy and nginx in the same run.

CPU time per request is that of the process (/proc), which a noisy machine affects little. Ratios
are more exact than single figures. Routers run on one core, the load and the backend on another.
"""

from __future__ import annotations

import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import long_running, servers
from benchmarks.servers import Server

GB = 1 << 30
AFFINITY = "/?pulse_deployment=bench-1"


def http(server: Server, path: str, seconds: float) -> tuple[float, float]:
    """Return CPU microseconds a request, and requests a second; by wrk if that is installed."""
    before = server.cpu
    began = time.monotonic()
    if shutil.which("wrk"):
        url = f"http://127.0.0.1:{server.port}{path}"
        command = ["wrk", "-t1", "-c32", f"-d{int(seconds)}", url]
        output = servers.run_load(command)
        match = re.search(r"(\d+) requests in", output)
        assert match is not None
        if "Non-2xx" in output:
            raise SystemExit(output)
        count = int(match[1])
    else:
        count = load("http", server, path, 32, seconds)
    return (server.cpu - before) / count * 1e6, count / (time.monotonic() - began)


def load(kind: str, server: Server, path: str, connections: int, seconds: float) -> int:
    command = [sys.executable, "-m", "benchmarks.load", kind, str(server.port), path]
    command += [str(connections), str(seconds)]
    return int(servers.run_load(command))


def websocket(server: Server, connections: int, seconds: float) -> float:
    """Return CPU microseconds a round trip."""
    before = server.cpu
    count = load("ws", server, "/socket", connections, seconds)
    return (server.cpu - before) / count * 1e6


def socket_bytes(server: Server, count: int = 400) -> float:
    """Return the resident bytes that an open WebSocket adds."""
    warm = long_running.open_websockets(server, 100)
    before = server.rss
    sockets = long_running.open_websockets(server, count)
    time.sleep(0.3)
    added = server.rss - before
    for sock in (*warm, *sockets):
        sock.close()
    return added / count


def download(server: Server, size: int = GB) -> tuple[float, float, float]:
    """Return CPU seconds, bytes of memory added, and seconds to the first byte of a download."""
    memory, peak, cpu = server.rss, 0, server.cpu
    with socket.create_connection(("127.0.0.1", server.port), 60) as sock:
        began = time.monotonic()
        sock.sendall(b"GET /down HTTP/1.1\r\nhost: bench\r\n\r\n")
        got, first, turn = 0, 0.0, 0
        buffer = bytearray(1 << 20)
        while got < size:
            n = sock.recv_into(buffer)
            if not n:
                raise SystemExit(f"{server.name} broke the download off at {got}")
            first = first or time.monotonic() - began
            got += n
            turn += 1
            if turn % 32 == 1:
                peak = max(peak, server.rss)
    return server.cpu - cpu, max(0, peak - memory), first


def upload(server: Server, size: int = GB) -> tuple[float, float]:
    """Return CPU seconds and bytes of memory added of an upload."""
    memory, peak, cpu = server.rss, 0, server.cpu
    block = bytes(1 << 20)
    with socket.create_connection(("127.0.0.1", server.port), 120) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n" % size)
        for turn in range(size // len(block)):
            sock.sendall(block)
            if turn % 32 == 0:
                peak = max(peak, server.rss)
        while b"ok" not in sock.recv(65536):
            peak = max(peak, server.rss)
    return server.cpu - cpu, max(0, peak - memory)


Start = Callable[[], AbstractContextManager[Server]]


def measure(start: Start, quick: bool, *, requests_only: bool) -> dict[str, float]:
    """Return every row of one server.

    Memory is measured on a new process, since an earlier load's free memory would hide the growth.
    """
    seconds = 2.0 if quick else 5.0
    rows: dict[str, float] = {}
    with start() as server:
        rows["start-up, ms"] = server.start_seconds * 1000
        rows["memory at rest, MB"] = server.rss / (1 << 20)
        http(server, "/", 1)  # warm
        rows["small request, CPU us"], rows["small requests a second"] = http(server, "/", seconds)
        rows["with affinity, CPU us"], _ = http(server, AFFINITY, seconds)
        rows["64 KiB, CPU us"], _ = http(server, "/64k", seconds)
        if requests_only:
            return rows
        for count in (1, 32, 500):
            rows[f"WebSocket round trip, {count} open, CPU us"] = websocket(server, count, seconds)
    with start() as server:
        rows["memory a socket, KB"] = socket_bytes(server) / 1024
    with start() as server:
        cpu, memory, first = download(server)
        rows["1 GB down, CPU ms"] = cpu * 1000
        rows["1 GB down, memory MB"] = memory / (1 << 20)
        rows["1 GB down, first byte ms"] = first * 1000
    with start() as server:
        cpu, memory = upload(server)
        rows["1 GB up, CPU ms"] = cpu * 1000
        rows["1 GB up, memory MB"] = memory / (1 << 20)
    return rows


# the router's targets: a ratio to another server in the same run, or a figure
TARGETS = {
    "small request, CPU us": "1/5 of 0.3.13",
    "small request in turns with Caddy: ratio": "0.6",
    "with affinity, CPU us": "1/6 of 0.3.13",
    "64 KiB, CPU us": "1/4 of 0.3.13",
    "WebSocket round trip, 1 open, CPU us": "1/3 of 0.3.13",
    "WebSocket round trip, 32 open, CPU us": "1/3 of 0.3.13",
    "WebSocket round trip, 500 open, CPU us": "1/3 of 0.3.13",
    "memory a socket, KB": "4",
    "open loop, 99 %, ms": "Caddy's",
    "open loop, 99.9 %, ms": "Caddy's",
    "9,500 sockets, 200 deployments: cost ratio": "1.1",
    "... memory a socket, KB": "4",
    "... descriptors more": "0",
    "... memory ratio": "1.1",
    "image: first healthy answer, ms": "500",
    "image: control active, ms": "400",
    "image: MB over its base": "45",
}


def main(argv: list[str]) -> int:
    quick = "--quick" in argv
    results: dict[str, dict[str, float]] = {}
    console = Console()
    with (
        tempfile.TemporaryDirectory() as temporary,
        servers.backend() as backend,
        servers.state(backend.port, Path(temporary)) as env,
    ):
        folder = Path(temporary)
        starts: dict[str, Start] = {
            "pulse-railway 0.4": partial(servers.ours, env),
            "0.3.13": partial(servers.peer, env),
        }
        others: dict[str, Start] = {  # these are compared by requests alone
            "Caddy": partial(servers.caddy, backend.port, folder),
            "nginx": partial(servers.nginx, backend.port, folder),
        }
        starts |= {name: start for name, start in others.items() if shutil.which(name.lower())}
        for name, start in starts.items():
            console.print(f"measuring {name}", style="dim")
            results[name] = measure(start, quick, requests_only=name in others)
        measure_long_running(console, starts, results, env["REDIS_URL"], folder, quick)
    show(console, results)
    return 0


def measure_long_running(
    console: Console,
    starts: dict[str, Start],
    results: dict[str, dict[str, float]],
    store: str,
    folder: Path,
    quick: bool,
) -> None:
    """Add the longer measurements: the tail latency of all servers, the others of our router."""

    def cost(server: Server, seconds: float) -> float:
        return http(server, "/", seconds)[0]

    names = list(starts)
    beside = "Caddy" if "Caddy" in starts else names[0]
    rate = int(results[beside]["small requests a second"] / 2)
    for name, start in starts.items():
        if name == "0.3.13":
            continue  # the rate is beyond its capacity
        console.print(f"measuring {name}: tail at {rate:,} requests a second", style="dim")
        with start() as server:
            http(server, "/", 1)
            for q, value in long_running.tail(server, rate, 4 if quick else 20).items():
                results[name][f"open loop, {q} %, ms"] = value
            if shutil.which("wrk"):
                closed = long_running.tail_at_saturation(server, 2 if quick else 10)
                results[name]["closed loop, 99 %, ms"] = closed
    ours = results[names[0]]
    if beside == "Caddy":
        with starts[names[0]]() as router, starts[beside]() as caddy:
            cost(router, 1.0), cost(caddy, 1.0)
            turns = [cost(router, 2.0) / cost(caddy, 2.0) for _ in range(5)]
        ours["small request in turns with Caddy: ratio"] = statistics.median(turns)
    console.print("measuring our router: scale, endurance, image", style="dim")
    with starts[names[0]]() as server:
        rows = long_running.scale(server, store, cost, 2.0 if quick else 5.0)
        ours["9,500 sockets, 200 deployments: cost ratio"] = rows["cost ratio"]
        ours["... memory a socket, KB"] = rows["memory a socket, KB"]
    with starts[names[0]]() as server:
        requests, sockets = (100_000, 5_000) if quick else (1_000_000, 50_000)
        rows = long_running.endurance(server, cost, requests, sockets)
        ours["endurance: requests"] = rows["requests"]
        ours["... descriptors more"] = rows["descriptors more"]
        ours["... memory ratio"] = rows["memory ratio"]
    for row, value in long_running.image(store, folder).items():
        ours[f"image: {row}"] = value


def show(console: Console, results: dict[str, dict[str, float]]) -> None:
    names = list(results)
    table = Table(title="One core each; lower is better but for requests a second")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("/ 0.3.13", justify="right")
    table.add_column("/ Caddy", justify="right")
    table.add_column("target")
    ours, peer = results[names[0]], results[names[1]]
    caddy = results.get("Caddy", {})
    for row in ours:
        cells = [_cell(results[name].get(row, float("nan"))) for name in names]
        ratios = [
            f"{ours[row] / other[row]:.3f}" if other.get(row) else "" for other in (peer, caddy)
        ]
        table.add_row(row, *cells, *ratios, TARGETS.get(row, ""))
    Console(width=160, file=console.file).print(table)


def _cell(value: float) -> str:
    return "-" if value != value else f"{value:,.{2 if value < 10 else 1}f}"  # NaN: not measured


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
