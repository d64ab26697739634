"""What a client cannot do: grow the router, or say in a trailer what a head may not."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import control
from pulse_railway.local.supervisor import free_port
from router import RedisStore
from tests.conftest import ROOT, Process, Redis
from tests.net import Backend, Connection, ask, eventually, header, headers, read_answer

Run = Callable[..., Process]
POST = b"POST / HTTP/1.1\r\nhost: app.example\r\ntransfer-encoding: chunked\r\n\r\n"
MB = 1 << 20


class Bodies(Backend):
    """A backend that reads chunked bodies, and keeps what it was sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        super().__init__(handle=self.read)

    def read(self, connection: Connection) -> None:
        while head := connection.head():
            self.heads.append(head)
            body = b""
            if header(head, "transfer-encoding"):
                while size := int(connection.until(b"\r\n").split(b";")[0] or b"0", 16):
                    body += connection.read(size)
                    connection.read(2)
                self.sent.append(connection.until(b"\r\n"))
            self.sent.append(body)
            connection.send(self.answer)


@pytest.fixture
def site(redis_server: Redis, run_router: Run) -> Iterator[tuple[Bodies, Process]]:
    with Bodies() as backend:
        redis_server.deployment("a", backend.address)
        router = run_router(redis_server)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        yield backend, router


def test_a_trailer_never_becomes_a_header(site: tuple[Bodies, Process]) -> None:
    """Head, body and trailers in one segment: before, they were one list of headers."""
    backend, router = site
    trailers = (
        b"host: evil.example\r\nx-forwarded-for: 6.6.6.6\r\nx-pulse-deployment: nowhere\r\n"
        b"cookie: session=stolen\r\nX-Pulse-Client-Loader: 1\r\n"
    )
    for parts in ([POST + b"2\r\nhi\r\n0\r\n" + trailers + b"\r\n"],
                  [POST, b"2\r\nhi\r\n0\r\n", trailers, b"\r\n"]):  # fmt: skip
        with Connection.to(router.port) as c:
            for part in parts:
                c.send(part)
                time.sleep(0.05)
            assert read_answer(c).status == 200
        head = backend.heads[-1]
        assert headers(head, "host") == ["app.example"]
        assert headers(head, "x-forwarded-for") == ["127.0.0.1"]
        for name in ("cookie", "x-pulse-deployment", "x-pulse-client-loader"):
            assert header(head, name) is None
        assert backend.sent[-2:] == [b"\r\n", b"hi"]


@pytest.mark.parametrize(
    "piece",
    [b"x-trailer: " + b"a" * 1000 + b"\r\n", b"a" * 1000],
    ids=["many trailers", "one endless trailer"],
)
def test_trailers_are_bounded(site: tuple[Bodies, Process], piece: bytes) -> None:
    _refused(site[1], POST + b"2\r\nhi\r\n0\r\n", piece)


@pytest.mark.parametrize(
    "piece", [b"a" * 1000, b"1;" + b"x" * 5000 + b"\r\na\r\n"], ids=["one", "many"]
)
def test_chunk_extensions_are_bounded(site: tuple[Bodies, Process], piece: bytes) -> None:
    _refused(site[1], POST + (b"2;" if piece[:1] == b"a" else b""), piece)


def _refused(router: Process, start: bytes, piece: bytes) -> None:
    """60 MB of it cost 173 MB before, and were answered 200."""
    before = router.rss
    with Connection.to(router.port) as c:
        c.send(start)
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 60 * MB:
                c.send(piece * 64)
                sent += len(piece) * 64
        with contextlib.suppress(ConnectionResetError):
            assert read_answer(c).status in (0, 431)
    assert router.rss - before < 6 * MB
    assert ask(router.port).status == 200


def test_small_chunks_are_no_attack(site: tuple[Bodies, Process]) -> None:
    backend, router = site
    with Connection.to(router.port) as c:
        c.send(POST)
        for _ in range(40):
            c.send(b"1;a=b\r\nx\r\n" * 1000)
        c.send(b"0\r\n\r\n")
        assert read_answer(c).status == 200
    assert backend.sent[-1] == b"x" * 40_000


def test_headers_are_counted(site: tuple[Bodies, Process]) -> None:
    assert ask(site[1].port, "/", *(f"x-{i}: 1" for i in range(400))).status == 200
    assert ask(site[1].port, "/", *(f"x-{i}: 1" for i in range(600))).status == 431


def test_requests_wait_for_a_client_that_does_not_read(
    redis_server: Redis, run_router: Run
) -> None:
    """Sent one after the other, they were all answered into memory: 900 MB in 25 s."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1_000_000
    with Backend(answer) as backend:
        redis_server.deployment("a", backend.address)
        router = run_router(redis_server)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sock.connect(("127.0.0.1", router.port))
            for _ in range(100):
                sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                time.sleep(0.01)
            seen = len(backend.heads)
            assert seen < 20  # what the kernel's buffers hold
            received = 0
            while received < 30_000_000:  # and they go on when it reads
                received += len(sock.recv(MB))
        eventually(lambda: len(backend.heads) > seen)


def test_a_path_of_escapes_costs_little(site: tuple[Bodies, Process]) -> None:
    _, router = site
    assert ask(router.port, "/" + "%25" * 10_000).status == 404
    assert ask(router.port, "/" + "%e3%81%82" * 300).status == 200  # 300 letters of Japanese


@pytest.mark.parametrize(
    ("target", "line", "status"),
    [
        ("/" + "/" * 31_000, "x: y", 404),
        ("/" + "\\/" * 30_000, "x: y", 404),
        ("/", "connection: " + ",".join(["a"] * 30_000), 431),
        ("/", "x-forwarded-host: " + ",".join(["a"] * 30_000), 431),
        ("/", "\r\n".join(500 * ["connection: " + "a" * 90]), 431),
        ("/", "\r\n".join(500 * ["connection: a"]), 431),
        ("/", "\r\n".join(500 * ["x-forwarded-host: " + "a, " * 20 + "a"]), 431),
        ("/", "\r\n".join(500 * ["x-forwarded-host: " + "[::1], " * 10 + "[::1]"]), 431),
        ("/", "\r\n".join(500 * ["x-forwarded-for: " + "a" * 90]), 200),
        ("/", "connection: " + ",".join(["a"] * 900), 200),  # what a proxy could send
        ("/", "x-forwarded-host: " + ",".join(["a"] * 900), 200),
        ("/?pulse_deployment=" + "%41" * 20_000, "x: y", 409),
        ("/?pulse_deployment=x" + "&" * 30_000, "accept: text/html", 302),
        ("/?" + "pulse_deployment=x&" * 3_000, "accept: text/html", 302),
        ("/?" + "x&" * 30_000, "x: y", 200),
    ],
)
def test_what_is_long_costs_little(
    site: tuple[Bodies, Process], target: str, line: str, status: int
) -> None:
    _, router = site
    ask(router.port)
    fields = Path(f"/proc/{router.popen.pid}/stat").read_text().rpartition(")")[2].split()
    before = int(fields[11]) + int(fields[12])
    for _ in range(40):
        assert ask(router.port, target, line).status == status
    fields = Path(f"/proc/{router.popen.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12]) - before
    assert ticks / os.sysconf("SC_CLK_TCK") / 40 < 0.003  # seconds a request; before, up to 0.008


HANDSHAKE = (
    b"GET /socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)


@pytest.mark.parametrize("leave", [Connection.close, Connection.reset])
@pytest.mark.parametrize(
    "sent",
    [2 * b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", HANDSHAKE, HANDSHAKE + b"early"],
    ids=["pipelined", "handshake", "early"],
)
def test_a_client_that_leaves_while_it_is_not_read_is_noticed(
    redis_server: Redis, run_router: Run, sent: bytes, leave: Callable[[Connection], None]
) -> None:
    """Its connection is not read while a request waits: for 15 minutes nothing saw its end. Nor is
    it during a handshake."""
    began, ended = [], []

    def hang(connection: Connection) -> None:
        connection.head()
        began.append(1)
        connection.rest()
        ended.append(1)

    with Backend(handle=hang) as backend:
        redis_server.deployment("a", backend.address)
        router = run_router(redis_server)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        c = Connection.to(router.port)
        c.send(sent)
        eventually(lambda: began == [1])
        leave(c)
        eventually(lambda: ended == [1])


def unread(connection: Connection) -> int:
    """Return how many bytes wait for the other side to read them."""
    mine, theirs = (f"0100007F:{name[1]:04X}" for name in (
        connection.sock.getsockname(), connection.sock.getpeername()
    ))  # fmt: skip
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    queues = [row[4] for row in rows if row[1:3] == [theirs, mine]]
    return int(queues[0].partition(":")[2], 16)


@pytest.mark.parametrize("leave", [Connection.close, Connection.reset])
def test_a_client_that_leaves_in_a_paused_upload_is_noticed(
    redis_server: Redis, run_router: Run, leave: Callable[[Connection], None]
) -> None:
    """A backend that does not read pauses the upload, and the client's end was not seen."""
    accepted = []

    def read_no_body(connection: Connection) -> None:
        accepted.append(connection)
        connection.head()
        time.sleep(30)

    def busy() -> object:
        (report,) = control.reports(RedisStore(redis_server.url, "pulse:railway"))
        return report["in_flight"]

    with Backend(handle=read_no_body) as backend:
        redis_server.deployment("a", backend.address)
        router = run_router(redis_server, {"report_seconds": 0.1})
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        c = Connection.to(router.port)
        c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")

        def is_paused() -> bool:
            if not unread(c):
                c.send(b"x" * 131072)
                return False
            time.sleep(0.2)
            return unread(c) > 0

        eventually(is_paused, 60)
        eventually(lambda: busy() == {"a": 1})
        leave(c)
        eventually(lambda: busy() == {})


def test_a_body_that_turns_bad_after_the_answer_is_not_logged(
    site: tuple[Bodies, Process],
) -> None:
    _, router = site
    for _ in range(5):
        with Connection.to(router.port) as c:
            c.send(POST.replace(b"POST /", b"POST /_pulse/internal/x"))
            assert read_answer(c).status == 404
            with contextlib.suppress(OSError):
                for _ in range(20):
                    c.send(b"not a chunk\r\n")
                    time.sleep(0.002)
    assert router.output() == ""


def test_pipelined_requests_are_bounded(site: tuple[Bodies, Process]) -> None:
    """They are answered up to the limit, then the connection ends (RFC 9112 section 9.3.2)."""
    _, router = site
    before = router.rss
    one = b"GET / HTTP/1.1\r\nhost: app.example\r\n\r\n"
    for count, answered in ((30, 30), (20_000, None)):
        with Connection.to(router.port) as c:
            try:
                c.send(one * count)
            except (BrokenPipeError, ConnectionResetError):
                assert answered is None
            got = 0
            try:
                while got < count and read_answer(c).status == 200:
                    got += 1
            except ConnectionResetError:
                assert answered is None
            assert got == answered or (answered is None and got < 200)
    assert router.rss - before < 8 * MB


@pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/0.9", "HTTP/3.0", "HTTP/1.2"])
def test_other_versions_are_refused(site: tuple[Bodies, Process], version: str) -> None:
    backend, router = site
    with Connection.to(router.port) as c:
        c.send(f"GET / {version}\r\nhost: app.example\r\n\r\n".encode())
        assert read_answer(c).status in (400, 505)
    assert not backend.heads


# -- descriptors -------------------------------------------------------------------------------


def limited(start: Run, server: Redis, limits: str, **env: str) -> Process:
    port = free_port()
    given = {"PORT": str(port), "HOST": "127.0.0.1", "REDIS_URL": server.url, **env}
    command = ["sh", "-c", f"ulimit {limits}; exec {sys.executable} {ROOT / 'router.py'}"]
    router = start(command, port, given)
    eventually(lambda: ask(router.port, "/healthz").status == 200)
    return router


def test_the_soft_descriptor_limit_is_raised(redis_server: Redis, start: Run) -> None:
    router = limited(start, redis_server, "-S -n 100; ulimit -H -n 500")
    limits = Path(f"/proc/{router.popen.pid}/limits").read_text()
    line = next(x for x in limits.splitlines() if x.startswith("Max open files"))
    assert line.split()[3:5] == ["500", "500"]


@pytest.mark.parametrize("how", ["descriptors", "variable"])
def test_newcomers_are_turned_away_near_the_limit(
    redis_server: Redis, start: Run, how: str
) -> None:
    env = {"PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT": "68"} if how == "variable" else {}
    with Backend() as backend:
        redis_server.deployment("a", backend.address)
        router = limited(
            start, redis_server, "-n 200" if how == "descriptors" else "-n 1000", **env
        )
        held = [Connection.to(router.port) for _ in range(67)]
        request = b"GET / HTTP/1.1\r\nhost: app.example\r\n\r\n"
        for c in held:
            c.send(request)
            assert read_answer(c).status == 200
        turned = ask(router.port)
        while turned.status == 200:  # the health check's own connection may have gone
            extra = Connection.to(router.port)
            held.append(extra)
            extra.send(request)
            turned = read_answer(extra)
        assert turned.status == 503
        assert turned.json == {"detail": "too many connections"}
        for c in held[:67]:  # those who are there go on, each with a backend of its own
            c.send(request)
        assert [read_answer(c).status for c in held[:67]] == [200] * 67
        for c in held:
            c.close()
        eventually(lambda: ask(router.port).status == 200)


SECONDS = ["RESPONSE_TIMEOUT", "SHUTDOWN_SECONDS", "HALF_CLOSED_SECONDS"]


def complains(script: str, **env: str) -> str:
    """The one line with which it does not start."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    return done.stderr.strip()


@pytest.mark.parametrize("variable", ["PORT", "PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT"])
def test_a_number_that_is_none(redis_server: Redis, variable: str) -> None:
    said = complains("router.py", REDIS_URL=redis_server.url, **{variable: "abc"})
    assert said == f"{variable} takes a whole number from 1, not 'abc'"


@pytest.mark.parametrize("text", ["abc", "-1", "inf", "nan"])
def test_seconds_that_are_none(redis_server: Redis, text: str) -> None:
    for variable in (f"PULSE_RAILWAY_ROUTER_{name}" for name in SECONDS):
        said = complains("router.py", REDIS_URL=redis_server.url, **{variable: text})
        assert said == f"{variable} takes a number of seconds, not {text!r}"
    railway = dict.fromkeys(("PROJECT_ID", "ENVIRONMENT_ID", "TOKEN", "SERVICE_ID"), "x")
    env = {f"RAILWAY_{name}": value for name, value in railway.items()}
    said = complains(
        "janitor.py", REDIS_URL=redis_server.url, PULSE_RAILWAY_DRAIN_TTL_SECONDS=text, **env
    )
    assert said.endswith(f"takes a number of seconds, not {text!r}")


def test_what_a_router_does_not_start_with_stops_no_control_command() -> None:
    """Which is mostly what mends it."""
    env = {f"PULSE_RAILWAY_ROUTER_{name}": "abc" for name in SECONDS}
    command = [sys.executable, str(ROOT / "control.py"), "--help"]
    subprocess.run(command, env={**os.environ, **env}, check=True, timeout=20)


@pytest.mark.parametrize("kind", ["memory", "redis", ""])
def test_a_store_that_is_none(kind: str) -> None:
    said = complains("router.py", PULSE_KV_KIND=kind, PULSE_KV_URL="", REDIS_URL="")
    assert said == "set REDIS_URL, or PULSE_KV_KIND=sqlite and PULSE_KV_PATH"


def test_a_port_that_is_taken(redis_server: Redis) -> None:
    port = str(redis_server.port)
    said = complains("router.py", REDIS_URL=redis_server.url, HOST="127.0.0.1", PORT=port)
    assert said == f"port {port} cannot be listened on: Address already in use"
