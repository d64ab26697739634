"""The soak: requests and sockets that end in every way, while deployments are promoted and Redis
restarts. At the end the router must have no more descriptors, tasks or memory than before.

    invoke soak --minutes 10 [--seed N]     by hand; the tests have a short run

A router, a Redis and two backends are real. Each worker plays random scenes, one after the other. A
scene is named for its ending.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pulse_railway.local.supervisor import free_port
from tests.conftest import ROOT, Process, Redis, router_command
from tests.net import Backend, Connection, eventually, ok, read_answer

WORKERS = 12
HANDSHAKE = (
    "GET {} HTTP/1.1\r\nhost: app.example\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n"
QUICK = {"refresh_seconds": 3.0, "report_seconds": 1.0}
ENV = {
    "PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS": "1.5",
    "PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT": "2",
}


def serve(c: Connection) -> object:
    """The backend: the last part of a request's path selects its behaviour."""
    while (head := c.head()).endswith(b"\r\n\r\n"):
        target = head.split(b" ", 2)[1].split(b"?")[0]
        match target.rsplit(b"/", 1)[-1]:
            case b"resets":
                return c.reset()
            case b"breaks-off":
                c.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
                return c.reset()
            case b"silent":
                c.sock.settimeout(6)
                c.rest()
                return None
            case b"falls-silent":
                c.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
                c.sock.settimeout(6)
                c.rest()
                return None
            case b"until-close":
                c.send(b"HTTP/1.1 200 OK\r\n\r\nto the end")
                return None
            case b"chunked":
                c.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
            case b"large":
                c.send(ok(bytes(300_000)))
            case b"early":  # an answer before the end of the upload
                c.send(ok(b"early", "connection: close"))
                return None
            case b"socket":
                c.send(SWITCH)
                return talk(c)
            case _:
                c.send(ok(b"ok"))
    return None


def talk(c: Connection) -> object:
    """The backend's end of a tunnel: one byte selects how it ends."""
    while word := c.read(1):
        match word:
            case b"c":
                c.send(b"c")
                return None
            case b"r":
                return c.reset()
            case b"h":
                c.sock.shutdown(socket.SHUT_WR)
                c.sock.settimeout(6)
                c.rest()
                return None
            case b"s":
                c.sock.settimeout(6)
                while c.sock.recv(1024):
                    pass
                time.sleep(4)
                return None
            case _:
                c.send(word)
    return c.send(b"last words")  # the client's half has ended, this half still sends


# -- scenes ------------------------------------------------------------------------------------


def get(c: Connection, path: str, method: str = "GET", body: bytes = b"", more: str = "") -> int:
    length = f"content-length: {len(body)}\r\n" if body else ""
    c.send(f"{method} {path} HTTP/1.1\r\nhost: app.example\r\n{length}{more}\r\n".encode() + body)
    return read_answer(c).status


def expect(status: int, path: str, **more: str) -> Callable[[Connection], None]:
    def scene(c: Connection) -> None:
        answered = get(c, path, **more)  # type: ignore[arg-type]
        assert answered == status, f"{path}: {answered} instead of {status}"

    return scene


def several(c: Connection) -> None:
    for path in ("/a", "/chunked", "/large", "/b"):
        assert get(c, path) == 200


def tunnel(path: str = "/socket") -> Callable[[Connection], None]:
    def begin(c: Connection) -> None:
        c.send(HANDSHAKE.format(path).encode())
        assert b" 101 " in c.head()
        c.send(b"x")
        assert c.read(1) == b"x"

    return begin


def socket_scene(word: bytes, then: Callable[[Connection], object]) -> Callable[[Connection], None]:
    def scene(c: Connection) -> None:
        tunnel()(c)
        if word:
            c.send(word)
        then(c)

    return scene


def half_close(c: Connection) -> None:
    c.sock.shutdown(socket.SHUT_WR)
    assert c.rest() == b"last words"


def half_close_and_wait(c: Connection) -> None:
    c.sock.shutdown(socket.SHUT_WR)
    c.rest()


def handshake_and_leave(c: Connection) -> None:
    c.send(HANDSHAKE.format("/socket").encode())
    c.reset()


def refused_handshake(c: Connection) -> None:
    c.send(HANDSHAKE.format("/ok").encode())
    assert b" 200 " in c.head()


def upload_and_leave(c: Connection) -> None:
    c.send(b"POST /up HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n" + bytes(70_000))
    c.reset()


def upload_answered_early(c: Connection) -> None:
    c.send(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n" + bytes(1000))
    assert read_answer(c).status in (200, 502)


def bad_chunk(c: Connection) -> None:
    c.send(b"POST /up HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\nzz\r\n")
    with contextlib.suppress(ConnectionResetError):
        c.rest()


def download_and_leave(c: Connection) -> None:
    c.send(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
    c.read(1000)
    c.reset()


def ask_and_half_close(c: Connection) -> None:
    c.send(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n")
    c.sock.shutdown(socket.SHUT_WR)
    c.rest()


def half_a_head(c: Connection) -> None:
    c.send(b"GET /a HTTP/1.1\r\nhost")


def nonsense(c: Connection) -> None:
    c.send(b"\x16\x03\x01 no HTTP\r\n\r\n")
    c.rest()


def pipelined(c: Connection) -> None:
    c.send(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n" * 5)
    for _ in range(5):
        assert read_answer(c).status == 200


def leave_while_it_is_silent(c: Connection) -> None:
    c.send(b"GET /silent HTTP/1.1\r\nhost: a\r\n\r\n")
    time.sleep(0.05)
    c.reset()


def broken(path: str) -> Callable[[Connection], None]:
    def scene(c: Connection) -> None:
        c.send(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
        c.rest()

    return scene


SCENES: dict[str, Callable[[Connection], None]] = {
    "request": expect(200, "/a"),
    "several on a connection": several,
    "pipelined": pipelined,
    "the backend closes to end": expect(200, "/until-close"),
    "the backend resets": expect(502, "/resets"),
    "the backend breaks off": broken("/breaks-off"),
    "the backend falls silent": broken("/falls-silent"),
    "no answer in time": expect(504, "/silent"),
    "refused": expect(502, "/a?pulse_deployment=dead"),
    "stale": expect(409, "/a?pulse_deployment=gone"),
    "nothing to read": ask_and_half_close,
    "the client leaves its upload": upload_and_leave,
    "the upload is answered early": upload_answered_early,
    "a bad chunk": bad_chunk,
    "the client leaves its download": download_and_leave,
    "the client leaves before the answer": leave_while_it_is_silent,
    "half a head": half_a_head,
    "no HTTP": nonsense,
    "socket: closed in order by the backend": socket_scene(b"c", lambda c: c.rest()),
    "socket: closed by the client": socket_scene(b"", lambda c: c.close()),
    "socket: reset by the client": socket_scene(b"", lambda c: c.reset()),
    "socket: reset by the backend": socket_scene(b"r", lambda c: c.rest()),
    "socket: half-closed by the client": socket_scene(b"", half_close),
    "socket: half-closed by the backend": socket_scene(b"h", lambda c: c.rest()),
    "socket: half-closed and silent": socket_scene(b"s", half_close_and_wait),
    "socket: the client leaves at once": handshake_and_leave,
    "socket: not a socket": refused_handshake,
    "socket: refused": expect(502, "/a?pulse_deployment=dead"),
}
RARE = {"no answer in time", "the backend falls silent", "socket: half-closed and silent"}


# -- the run -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Sample:
    """The router's resources in use."""

    descriptors: int
    memory: int  # bytes
    tasks: int
    clients: int
    sockets: int
    pooled: int


class Soak:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.played: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()
        self.redis = Redis()
        self.backends = [Backend(handle=serve) for _ in range(2)]
        for name, backend in zip("ab", self.backends, strict=True):
            state = "active" if name == "a" else "draining"
            self.redis.deployment(name, backend.address, state)
        self.redis.deployment("dead", f"http://127.0.0.1:{free_port()}", "draining")
        port = free_port()
        env = {"PORT": str(port), "HOST": "127.0.0.1", "REDIS_URL": self.redis.url, **ENV}
        env["PYTHONPATH"] = str(ROOT)
        self.router = Process(router_command(limits=QUICK), port, env).wait()

    def sample(self) -> Sample:
        """Return the resources in the router's report, and those that the kernel counts."""
        reports: list[dict[str, int]] = []

        def ask() -> bool:
            with contextlib.suppress(Exception):
                keys = list(self.redis.client.scan_iter("pulse:railway:router:*"))
                reports[:] = [json.loads(str(v)) for v in self.redis.client.mget(keys) if v]
            return bool(reports)

        eventually(ask, 20)
        fds = len(list(Path(f"/proc/{self.router.popen.pid}/fd").iterdir()))
        report = reports[0]
        return Sample(
            fds,
            self.router.rss,
            report["tasks"],
            report["clients"],
            report["tunnels_open"],
            report["pooled"],
        )

    def sample_at_rest(self, limit: int) -> Sample:
        """Sample when at most `limit` descriptors are open and the pool is empty, or after 20 s."""

        def ended() -> bool:
            now = self.sample()
            return now.descriptors <= limit and not now.pooled + now.clients + now.sockets

        with contextlib.suppress(AssertionError):
            eventually(ended, 20)
        return self.sample()

    def play(self, seconds: float, events: bool = True) -> None:
        deadline = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._worker, args=(n, deadline), daemon=True)
            for n in range(WORKERS)
        ]
        for thread in threads:
            thread.start()
        rng = random.Random(f"{self.seed}-events")
        active = "a"
        while events and time.monotonic() < deadline - 2:
            time.sleep(rng.uniform(0.5, 2))
            if rng.random() < 0.3:  # restart Redis without its data
                self.redis.stop()
                time.sleep(rng.uniform(0, 1))
                self.redis.start()
            else:
                active = "b" if active == "a" else "a"
                self.redis.deployment(active, self.backends[active == "b"].address)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a scene hangs"

    def _worker(self, number: int, deadline: float) -> None:
        rng = random.Random(f"{self.seed}-{number}")
        names = [name for name in SCENES for _ in range(1 if name in RARE else 30)]
        while time.monotonic() < deadline:
            name = rng.choice(names)
            try:
                with Connection.to(self.router.port) as c:
                    SCENES[name](c)
            except (AssertionError, OSError, ValueError, IndexError) as error:
                self.failures[f"{name}: {error or type(error).__name__}"] += 1
            self.played[name] += 1

    def stop(self) -> None:
        self.router.stop()
        for backend in self.backends:
            backend.stop()
        self.redis.stop()


def run(seconds: float, seed: int) -> tuple[Soak, Sample, Sample]:
    """Play for `seconds`. Returns the router's resources before and after, too."""
    soak = Soak(seed)
    try:
        soak.play(min(4.0, seconds / 3), events=False)  # to fill caches and arenas
        before = soak.sample_at_rest(1 << 20)
        soak.play(seconds)
        return soak, before, soak.sample_at_rest(before.descriptors)
    finally:
        soak.stop()


def main(minutes: float, seed: int) -> int:
    soak, before, after = run(minutes * 60, seed)
    print(f"seed {seed}: {sum(soak.played.values())} scenes")
    for name, count in soak.played.most_common():
        print(f"  {count:8} {name}")
    for name, count in soak.failures.most_common():
        print(f"  {count:8} FAILED {name}")
    for field in dataclasses.fields(Sample):
        print(
            f"  {field.name:12} {getattr(before, field.name):>12} {getattr(after, field.name):>12}"
        )
    return 1 if soak.failures or problems(before, after) else 0


def problems(before: Sample, after: Sample) -> list[str]:
    """Return the resources that have grown. Memory may grow by a tenth and 2 MB."""
    grown = [
        f"{field}: {getattr(before, field)} before, {getattr(after, field)} after"
        for field in ("descriptors", "tasks", "clients", "sockets", "pooled")
        if getattr(after, field) > getattr(before, field)
    ]
    if after.memory > before.memory * 1.1 + (2 << 20):
        grown.append(f"memory: {before.memory} before, {after.memory} after")
    return grown
