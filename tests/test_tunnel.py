"""WebSockets through the router: a handshake, then the backend's own bytes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import websockets.sync.client
import websockets.sync.server
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from pulse_railway.local.supervisor import free_port
from tests.conftest import Process, Redis
from tests.net import Backend, Connection, ask, eventually, header, ok, read_answer

Run = Callable[..., Process]

HANDSHAKE = (
    b"GET %b HTTP/1.1\r\nHost: app.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nX-Own: 1\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


class Echo:
    """A real WebSocket server that echoes, and says what it was asked."""

    def __init__(self) -> None:
        self.closes: list[int | None] = []
        self.paths: list[str] = []

        def handle(connection: websockets.sync.server.ServerConnection) -> None:
            assert connection.request is not None
            self.paths.append(connection.request.path)
            try:
                for message in connection:
                    if message == "close":
                        connection.close(4001, "as asked")
                    else:
                        connection.send(message)
            except ConnectionClosed:
                pass
            finally:
                self.closes.append(connection.close_code)

        def prefer_two(_: object, offered: Sequence[Subprotocol]) -> Subprotocol | None:
            return Subprotocol("two") if "two" in offered else None

        self.server = websockets.sync.server.serve(
            handle, "127.0.0.1", 0, select_subprotocol=prefer_two, max_size=32 << 20
        )
        self.port = self.server.socket.getsockname()[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def echo(redis_server: Redis, run_router: Run) -> Iterator[tuple[Echo, Process]]:
    server = Echo()
    redis_server.deployment("a", f"http://127.0.0.1:{server.port}")
    router = run_router(redis_server)
    eventually(lambda: ask(router.port, "/healthz").status == 200)
    yield server, router
    server.server.shutdown()


@pytest.fixture
def raw(redis_server: Redis, run_router: Run) -> Iterator[Callable[..., tuple[Backend, Process]]]:
    """`raw(handle)`: a hand-written backend behind a router."""
    backends: list[Backend] = []

    def make(handle: Callable[[Connection], None]) -> tuple[Backend, Process]:
        backend = Backend(handle=handle)
        backends.append(backend)
        redis_server.deployment("a", backend.address)
        router = run_router(redis_server)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        return backend, router

    yield make
    for backend in backends:
        backend.stop()


def client(port: int, path: str = "/", **options: Any) -> websockets.sync.client.ClientConnection:
    made: websockets.sync.client.ClientConnection = websockets.sync.client.connect(
        f"ws://127.0.0.1:{port}{path}", max_size=32 << 20, proxy=None, **options
    )
    return made


def test_messages_of_every_size(echo: tuple[Echo, Process]) -> None:
    with client(echo[1].port, "/chat?x=%2F&pulse_deployment=a") as ws:
        for size in (0, 1, 125, 126, 65535, 65536, 1 << 20, 16 << 20):
            ws.send(bytes(size))
            assert ws.recv(20) == bytes(size)
        ws.send("text ü")
        assert ws.recv(5) == "text ü"
        assert ws.ping().wait(5)
    assert echo[0].paths == ["/chat?x=%2F&pulse_deployment=a"]


def test_subprotocols_and_compression_are_the_backends(echo: tuple[Echo, Process]) -> None:
    with client(echo[1].port, subprotocols=["one", "two"]) as ws:
        assert ws.subprotocol == "two"
        assert ws.response is not None
        assert "permessage-deflate" in ws.response.headers["sec-websocket-extensions"]
        assert ws.response.headers["x-pulse-selected-deployment"] == "a"
    with client(echo[1].port, compression=None) as ws:
        ws.send("plain")
        assert ws.recv(5) == "plain"


def test_close_codes_pass_both_ways(echo: tuple[Echo, Process]) -> None:
    with client(echo[1].port) as ws:
        ws.send("close")
        with pytest.raises(ConnectionClosed):
            ws.recv(5)
        assert (ws.close_code, ws.close_reason) == (4001, "as asked")
    with client(echo[1].port) as ws:
        ws.close(4002)
    eventually(lambda: 4002 in echo[0].closes)


def test_who_gets_a_handshake(echo: tuple[Echo, Process]) -> None:
    port = echo[1].port
    for path, status in (
        ("/?pulse_deployment=gone", 409),
        ("/_pulse/internal/x", 404),
        ("/%5fpulse/internal/x", 404),
    ):
        with pytest.raises(InvalidStatus) as refused:
            client(port, path)
        assert refused.value.response.status_code == status
    with client(port, "/?pulse_deployment=gone&pulse_reload_on_stale_affinity=1") as ws:
        ws.send("reload me")
        assert ws.recv(5) == "reload me"
    with client(port, additional_headers={"x-pulse-deployment": "a"}) as ws:
        ws.send("x")
        assert ws.recv(5) == "x"


def test_the_handshake_has_its_own_headers(raw: Callable[..., tuple[Backend, Process]]) -> None:
    heads: list[bytes] = []

    def handle(connection: Connection) -> None:
        heads.append(connection.head())
        connection.send(SWITCH + b"first bytes")
        connection.send(connection.read(5).upper())
        time.sleep(0.2)

    _, router = raw(handle)
    with Connection.to(router.port) as c:
        c.send(HANDSHAKE % b"/a%2Fb?c=d" + b"early")
        head = c.head()
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert header(head, "x-pulse-selected-deployment") == "a"
        assert c.read(16) == b"first bytesEARLY"
    assert heads[0].startswith(b"GET /a%2Fb?c=d HTTP/1.1\r\n")
    for name, value in (
        ("host", "app.example"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("x-own", "1"),
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("x-forwarded-for", "127.0.0.1"),
    ):
        assert header(heads[0], name) == value


def test_a_refused_upgrade_reaches_the_client_and_ends_there(
    raw: Callable[..., tuple[Backend, Process]],
) -> None:
    backend, router = raw(
        lambda c: (c.head(), c.send(ok(b"not here", status="403 Forbidden")), c.head())
    )
    with Connection.to(router.port) as c:
        smuggled = b"GET /_pulse/internal/x HTTP/1.1\r\nhost: x\r\n\r\n"
        c.send(HANDSHAKE % b"/" + smuggled)
        answer = read_answer(c)
        assert (answer.status, answer.body) == (403, b"not here")
        assert c.rest() == b""
    assert backend.connections == 1


def test_an_upgrade_that_is_no_handshake_is_the_plain_request_it_also_is(
    raw: Callable[..., tuple[Backend, Process]],
) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def handle(connection: Connection) -> None:
        while head := connection.head():
            seen.append((head, connection.read(int(header(head, "content-length") or 0))))
            connection.send(ok())

    _, router = raw(handle)
    with Connection.to(router.port) as c:
        for upgrade, method in (("h2c", "POST"), ("websocket", "POST"), ("h2c", "GET")):
            body = b"body" if method == "POST" else b""
            c.send(
                f"{method} /x HTTP/1.1\r\nHost: x\r\nX-Own: 1\r\nUpgrade: {upgrade}\r\n"
                f"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            assert read_answer(c).status == 200  # on one connection: it stays HTTP
            head, sent = seen.pop()
            assert head.startswith(f"{method} /x HTTP/1.1\r\nHost: x\r\nX-Own: 1\r\n".encode())
            assert sent == body
            assert header(head, "upgrade") is header(head, "http2-settings") is None


def test_a_handshake_behind_another_request_is_refused(
    raw: Callable[..., tuple[Backend, Process]],
) -> None:
    backend, router = raw(lambda c: (c.head(), time.sleep(0.3), c.send(ok()), c.head()) and None)
    with Connection.to(router.port) as c:
        c.send(b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n" + HANDSHAKE % b"/second")
        assert read_answer(c).status == 200
        assert c.rest() == b""
    assert backend.connections == 1


def test_clients_that_leave_during_the_handshake_leave_nothing_behind(
    raw: Callable[..., tuple[Backend, Process]],
) -> None:
    ended: list[bool] = []

    def handle(connection: Connection) -> None:
        if connection.head():
            connection.send(SWITCH)
            connection.rest()
        ended.append(True)

    backend, router = raw(handle)
    for i in range(300):
        c = Connection.to(router.port)
        c.send(HANDSHAKE % b"/")
        time.sleep(i % 30 * 0.0001)  # before, while and after the backend answers
        c.reset() if i % 2 else c.close()
    eventually(lambda: len(ended) == backend.connections)
    assert ask(router.port, "/healthz").status == 200
    assert "Traceback" not in router.output()


def test_a_backend_that_switches_unasked(raw: Callable[..., tuple[Backend, Process]]) -> None:
    _, router = raw(lambda c: (c.head(), c.send(SWITCH), c.head()) and None)
    assert ask(router.port).status == 502


def test_backends_that_fail_the_handshake(raw: Callable[..., tuple[Backend, Process]]) -> None:
    backend, router = raw(lambda c: (c.head(), c.reset()) and None)
    with Connection.to(router.port) as c:
        c.send(HANDSHAKE % b"/")
        assert read_answer(c).status == 502
    backend.stop()
    with Connection.to(router.port) as c:
        c.send(HANDSHAKE % b"/")
        assert read_answer(c).status == 502


def test_ends_reach_the_other_side(raw: Callable[..., tuple[Backend, Process]]) -> None:
    ends: list[bytes] = []

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(SWITCH)
        word = connection.read(4)
        if word == b"half":  # the client has shut its half down; this one still talks
            ends.append(connection.rest())
            connection.send(b"still here")
        elif word == b"quit":
            connection.close()
        elif word == b"bang":
            connection.reset()
        else:
            try:
                ends.append(connection.sock.recv(1))
            except ConnectionResetError:
                ends.append(b"reset")

    _, router = raw(handle)

    def tunnel(word: bytes) -> Connection:
        c = Connection.to(router.port)
        c.send(HANDSHAKE % b"/")
        c.head()
        c.send(word)
        return c

    import socket

    with tunnel(b"half") as c:
        c.sock.shutdown(socket.SHUT_WR)
        assert c.rest() == b"still here"
    assert ends == [b""]
    with tunnel(b"quit") as c:
        assert c.closed_by_peer
    with tunnel(b"bang") as c, pytest.raises(ConnectionResetError):
        c.sock.recv(1)
    c = tunnel(b"wait")
    time.sleep(0.2)
    c.reset()
    eventually(lambda: ends == [b"", b"reset"])


def test_a_slow_reader_does_not_make_memory_grow(
    raw: Callable[..., tuple[Backend, Process]],
) -> None:
    sent = 0

    def handle(connection: Connection) -> None:
        nonlocal sent
        connection.head()
        connection.send(SWITCH)
        for _ in range(512):
            connection.send(bytes(1 << 18))
            sent += 1 << 18

    _, router = raw(handle)
    before = router.rss
    with Connection.to(router.port) as c:
        c.send(HANDSHAKE % b"/")
        c.head()
        time.sleep(1.5)
        assert sent < 32 << 20
        assert router.rss - before < 8 << 20
        left = 128 << 20
        while left:
            left -= len(c.read(min(left, 1 << 20)))


def test_a_socket_costs_little_memory(echo: tuple[Echo, Process]) -> None:
    """At most 8 KB each; see the benchmark for the figure."""

    async def hold(count: int) -> int:
        import websockets

        async def one() -> object:
            return await websockets.connect(f"ws://127.0.0.1:{echo[1].port}", proxy=None)

        warm = await asyncio.gather(*(one() for _ in range(50)))
        before = echo[1].rss
        held = [await one() for _ in range(count)]
        after = echo[1].rss
        for ws in [*warm, *held]:
            await ws.close()  # type: ignore[attr-defined]
        return (after - before) // count

    assert asyncio.run(hold(250)) <= 8192


def descriptors(router: Process) -> int:
    return len(list(Path(f"/proc/{router.popen.pid}/fd").iterdir()))


def test_a_socket_that_closed_in_order_gives_its_descriptors_back(
    echo: tuple[Echo, Process],
) -> None:
    """40 closing handshakes left 80 descriptors: each half had ended, and nobody closed."""
    _, router = echo
    before = descriptors(router)
    for closed_by_server in (False, True) * 20:
        with client(router.port) as ws:
            if closed_by_server:
                ws.send("close")
                with pytest.raises(ConnectionClosed):
                    ws.recv(5)
    eventually(lambda: descriptors(router) <= before, 5)


def test_a_half_closed_socket_that_falls_silent_ends(redis_server: Redis, run_router: Run) -> None:
    """A backend that never reacts to the end of its client's half."""

    def deaf(connection: Connection) -> None:
        if connection.head():
            connection.send(SWITCH)
            time.sleep(15)

    with Backend(handle=deaf) as backend:
        redis_server.deployment("a", backend.address)
        router = run_router(redis_server, PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS="1")
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        before = descriptors(router)
        with Connection.to(router.port) as c:
            c.send(HANDSHAKE % b"/")
            c.head()
            c.sock.shutdown(socket.SHUT_WR)
            assert c.closed_by_peer
        eventually(lambda: descriptors(router) <= before, 5)


def test_sigterm_closes_tunnels_last(echo: tuple[Echo, Process]) -> None:
    _, router = echo
    with client(router.port) as ws:
        ws.send("x")
        assert ws.recv(5) == "x"
        router.popen.terminate()
        with pytest.raises(ConnectionClosed):
            ws.recv(10)
    assert router.popen.wait(10) in (0, -15)


SOCKETIO_APP = """
import sys, socketio, uvicorn
sio = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*", ping_interval=1)
@sio.event
async def message(sid, data):
    await sio.emit("message", data, to=sid)
uvicorn.run(socketio.ASGIApp(sio), port=int(sys.argv[1]), log_level="warning")
"""


@pytest.mark.parametrize("transports", [["websocket"], ["polling"], ["polling", "websocket"]])
def test_a_real_socketio_client(
    redis_server: Redis, run_router: Run, start: Callable[..., Process], transports: list[str]
) -> None:
    import socketio

    port = free_port()
    start([sys.executable, "-c", SOCKETIO_APP, str(port)], port)
    redis_server.deployment("a", f"http://127.0.0.1:{port}")
    router = run_router(redis_server)
    eventually(lambda: ask(router.port, "/healthz").status == 200)

    async def talk() -> list[object]:
        got: asyncio.Queue[object] = asyncio.Queue()
        sio = socketio.AsyncClient(reconnection=False)
        sio.on("message", got.put)
        url = f"http://127.0.0.1:{router.port}/?pulse_deployment=a"
        await sio.connect(url, transports=transports)
        for i in range(12):
            await sio.emit("message", {"i": i, "blob": base64.b64encode(bytes(500)).decode()})
        seen = [await asyncio.wait_for(got.get(), 10) for _ in range(12)]
        await sio.disconnect()
        return seen

    assert [item["i"] for item in asyncio.run(talk())] == list(range(12))  # type: ignore[index]


def test_sockets_are_closed_one_by_one_when_the_router_ends(
    redis_server: Redis, run_router: Run
) -> None:
    """All tabs of a router that `ensure` replaces have once connected again at the same moment."""
    server = Echo()
    redis_server.deployment("a", f"http://127.0.0.1:{server.port}")
    router = run_router(redis_server, {"tunnel_drain_seconds": 4.0, "quiet_seconds": 0.5})
    eventually(lambda: ask(router.port, "/healthz").status == 200)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(client(router.port)) for _ in range(24)]
        busy, closed = sockets[0], dict[int, float]()

        def wait_for_end(number: int) -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    sockets[number].recv()
            closed[number] = time.monotonic()

        threads = [threading.Thread(target=wait_for_end, args=(n,)) for n in range(24)]
        for thread in threads:
            thread.start()
        router.popen.terminate()
        began = time.monotonic()
        last = 0.0
        with contextlib.suppress(ConnectionClosed):
            while time.monotonic() < began + 3:
                busy.send("an event")
                last = time.monotonic()
                time.sleep(0.1)
        for thread in threads:
            thread.join(20)
        assert router.popen.wait(10) in (0, -signal.SIGTERM)
    times = sorted(when - began for when in closed.values())
    assert len(times) == 24
    assert times[-1] < 8
    assert times[12] - times[0] > 1  # not all at once: they are spread over four seconds
    assert closed[0] - last > 0.4  # it was in use, and closed when it was not any more
    assert last - began > 2.5
    server.server.shutdown()
