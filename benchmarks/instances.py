"""What several processes of a Pulse app cost, and do: `python -m benchmarks.instances [SECONDS]`.

A real Pulse app, started by `pulse-railway serve` with one process and with two. Its tabs press a
button as fast as it answers. What they take of the two cores the app does not get, so they are raw
sockets that parse nothing, and what opens them is not timed: with 0.43 ms of 2.5 for each event,
two processes could not do more than 1.66 times the events of one. The router's rows are a small
request with one process and with four.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from pulse.serializer import deserialize, serialize

from benchmarks import servers
from benchmarks.router import http
from examples.visitor import ROUTE
from pulse_railway.app import serve
from pulse_railway.local.supervisor import free_port

ROOT = Path(__file__).parents[1]
TABS = 8  # of a process
APP = """
import pulse as ps
from pulse_railway import RailwayPlugin

class Counter(ps.State):
    count: int = 0

    def increment(self) -> None:
        self.count += 1

@ps.component
def home():
    with ps.init():
        counter = Counter()
    rows = [ps.li(key=str(n))[f"row {n} of {counter.count}"] for n in range(10)]
    return ps.div()[ps.h1()[f"counted to {counter.count}"], ps.ul()[rows],
                    ps.button(onClick=counter.increment)["Count"]]

app = ps.App(routes=[ps.Route("/", render=home)], plugins=[RailwayPlugin()],
             session_store=ps.InMemorySessionStore(), server_address="https://x.example")
"""
WEB = """
const server = require("http").createServer((_, to) => to.end("page"));
server.listen(Number(process.env.PORT), "127.0.0.1");
"""


class Site:
    """A container with some processes of the app."""

    popen: subprocess.Popen[bytes]

    def __init__(self, count: int) -> None:
        self.count, self.port = count, free_port(count)

    def pids(self) -> list[int]:
        lines = serve.descendants(self.popen.pid).items()
        return [pid for pid, line in lines if "uvicorn" in line]

    @property
    def cpu(self) -> float:
        """CPU seconds of Python's processes."""
        used = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            used += int(fields[11]) + int(fields[12])
        return used / os.sysconf("SC_CLK_TCK")

    @property
    def megabytes(self) -> float:
        """Memory of a process with React's server beside it: what is shared counts once (PSS)."""
        total = 0
        for pid in serve.descendants(self.popen.pid):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("Pss:") else 0
        return total / 1000 / self.count

    def is_up(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.port}/_pulse/health").status_code == 200
        return False


def environment_of_backend(
    deployment_id: str, internal_token: str, instances: str, port: int
) -> dict[str, str]:
    """Return the environment of a container that runs `pulse-railway serve` from these sources."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PULSE_SECRET": "x",
        "PULSE_APP_FILE": "main.py",
        "PULSE_DEPLOYMENT_ID": deployment_id,
        "PULSE_RAILWAY_INTERNAL_TOKEN": internal_token,
        "PULSE_RAILWAY_INSTANCES": instances,
        "PORT": str(port),
    }


@contextlib.contextmanager
def site(count: int) -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), Site(count)
        web = folder / "web" / "node_modules" / "@react-router" / "serve" / "dist" / "cli.js"
        web.parent.mkdir(parents=True)
        web.write_text(WEB)
        (folder / "main.py").write_text(APP)
        made.popen = subprocess.Popen(
            [sys.executable, "-m", "pulse_railway", "serve"],
            cwd=folder,
            env=environment_of_backend("bench-1", "x", str(count), made.port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            ends = time.monotonic() + 120
            while not made.is_up():
                if time.monotonic() > ends:
                    raise SystemExit("the app did not start")
                time.sleep(0.1)
            yield made
        finally:
            made.popen.terminate()
            made.popen.wait()


def frame_of(text: str) -> bytes:
    """Return a WebSocket frame of a client, with a mask of zeros (RFC 6455 section 5)."""
    data = text.encode()
    assert len(data) < 65536
    length = bytes((0x80 | len(data),)) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2)
    return b"\x81" + length + b"\0\0\0\0" + data


class Tab:
    """Socket.IO over a raw WebSocket (RFC 6455, Engine.IO 4)."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def open(self) -> None:
        address = f"http://127.0.0.1:{self.port}"
        async with httpx.AsyncClient() as client:
            body = {"paths": ["/"], "routeInfo": ROUTE}
            answer = await client.post(f"{address}/_pulse/prerender", json=body)
            page: Any = deserialize(answer.json())
            cookies = "; ".join(f"{k}={v}" for k, v in answer.cookies.items())
        directives = page["directives"]["socketio"]
        query = "&".join(f"{k}={v}" for k, v in directives["query"].items())
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
        self.writer.write(
            f"GET /socket.io/?EIO=4&transport=websocket&{query} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            f"connection: Upgrade\r\nupgrade: websocket\r\n{key}cookie: {cookies}\r\n\r\n".encode()
        )
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert b" 101 " in head, head
        await self.frame()  # Engine.IO's handshake
        auth = {**directives["auth"], "__pulse_page_instance_id": secrets.token_hex(4)}
        self.send("40" + json.dumps(auth))
        await self.frame()
        self.message({"type": "attach", "path": "/", "routeInfo": ROUTE})
        press = {"type": "callback", "path": "/", "callback": "2.onClick", "args": []}
        self.press = frame_of("42" + json.dumps(["message", list(serialize(press))]))

    def message(self, message: dict[str, Any]) -> None:
        self.send("42" + json.dumps(["message", list(serialize(message))]))

    def send(self, text: str) -> None:
        self.writer.write(frame_of(text))

    async def frame(self) -> bytes:
        while True:
            first, length = await self.reader.readexactly(2)
            if length == 126:
                length = int.from_bytes(await self.reader.readexactly(2))
            elif length == 127:
                length = int.from_bytes(await self.reader.readexactly(8))
            data = await self.reader.readexactly(length)
            assert first & 15 in (1, 9), (first, data)
            if data == b"2":  # Engine.IO's ping
                self.send("3")
            elif first & 15 == 1:
                return data

    async def count(self) -> None:
        """Press the button, and wait until the page shows it."""
        self.writer.write(self.press)
        while COUNTED not in await self.frame():
            pass


COUNTED = b"counted to"


class Presses(asyncio.Protocol):
    """In place of an open tab's protocol: presses the button until a time, as soon as the page has
    changed. It parses no frames, and answers no pings, which come every 25 s."""

    def __init__(self, tab: Tab, ends: float) -> None:
        self.press, self.ends, self.transport = tab.press, ends, tab.writer.transport
        self.done, self.rest = 0, b""
        self.over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.transport.set_protocol(self)
        self.transport.write(self.press)

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        if COUNTED not in data:
            self.rest = data[-len(COUNTED) :]
            return
        self.done, self.rest = self.done + 1, b""
        if time.monotonic() < self.ends:
            self.transport.write(self.press)
        elif not self.over.done():
            self.over.set_result(self.done)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or EOFError("the app has closed a socket"))


async def press(site: Site, seconds: float) -> tuple[float, float]:
    """Return how many events a second were answered, and the app's CPU milliseconds for each."""
    ports = range(site.port, site.port + site.count)
    tabs = [Tab(port) for port in ports for _ in range(TABS)]
    for tab in tabs:
        await tab.open()
        await tab.count()
    cpu, began = site.cpu, time.monotonic()
    presses = [Presses(tab, began + seconds) for tab in tabs]
    done = sum(await asyncio.gather(*(p.over for p in presses)))
    cpu, took = site.cpu - cpu, time.monotonic() - began
    for tab in tabs:
        tab.writer.close()
    return done / took, cpu / done * 1000


class Events:
    """Events a second, and CPU milliseconds an event, of each round."""

    def __init__(self, made: Site) -> None:
        self.site = made
        self.rates: list[float] = []
        self.cpu: list[float] = []

    def measure(self, seconds: float) -> None:
        rate, cpu = asyncio.run(press(self.site, seconds))
        self.rates.append(rate)
        self.cpu.append(cpu)


def events(seconds: float, rounds: int = 6) -> tuple[Events, Events, float, float]:
    """Measure one process and two in turns, and the megabytes of a process of each."""
    with site(1) as one, site(2) as two:
        time.sleep(1)
        memory = one.megabytes, two.megabytes
        both = Events(one), Events(two)
        for found in both:
            found.measure(1)
            found.rates.clear()
            found.cpu.clear()
        for _ in range(rounds):
            for found in both:
                found.measure(seconds)
        return *both, *memory


def routed(count: int, seconds: float, folder: Path) -> float:
    """Return the router's CPU microseconds for a small request, to `count` processes."""
    with servers.backend() as backend, servers.state(backend.port, folder) as env:
        import redis

        client = redis.Redis.from_url(env["REDIS_URL"], decode_responses=True)
        (key,) = client.scan_iter("pulse:railway:deployment:*")
        record = json.loads(str(client.get(key)))
        address = f"http://127.0.0.1:{backend.port}"
        record["instances"] = {str(k): {"address": address} for k in range(2, count + 1)}
        client.set(key, json.dumps(record))
        with servers.ours(env) as server:
            http(server, "/", 1)
            return statistics.median(http(server, "/", seconds)[0] for _ in range(3))


def rows(seconds: float) -> dict[str, float]:
    one, two, megabytes, megabytes_of_two = events(seconds / 3)
    # the best of all rounds: what else this machine does only slows a round down
    rate, rate_of_two, cpu, cpu_of_two = max(one.rates), max(two.rates), min(one.cpu), min(two.cpu)
    with tempfile.TemporaryDirectory() as folder:
        turns = [
            (routed(1, seconds / 2, Path(folder)), routed(4, seconds / 2, Path(folder)))
            for _ in range(2)
        ]
    return {
        "events a second, one process": rate,
        "events a second, two processes": rate_of_two,
        "... ratio (at least 1.8)": rate_of_two / rate,
        "CPU ms an event, one process": cpu,
        "CPU ms an event, two processes": cpu_of_two,
        "... ratio (at most 1.1)": cpu_of_two / cpu,
        "memory of one process, MB": megabytes,
        "memory a process of two, MB": megabytes_of_two,
        "router's CPU us a small request, one process": statistics.mean(a for a, _ in turns),
        "router's CPU us a small request, four": statistics.mean(b for _, b in turns),
        "... ratio (at most 1.25)": statistics.mean(b / a for a, b in turns),
    }


if __name__ == "__main__":
    for name, value in rows(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0).items():
        print(f"{name:50} {value:10.2f}")
