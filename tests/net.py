"""Raw sockets on both sides of the router: clients and backends."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Self


class Connection:
    """One connection, whose bytes the test reads and writes itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        sock.settimeout(20)

    @classmethod
    def to(cls, port: int, host: str = "127.0.0.1") -> Self:
        return cls(socket.create_connection((host, port), 20))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self, count: int) -> bytes:
        while len(self.buffer) < count:
            piece = self.sock.recv(1 << 18)
            if not piece:
                break
            self.buffer += piece
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            piece = self.sock.recv(1 << 18)
            if not piece:
                data, self.buffer = self.buffer, b""
                return data
            self.buffer += piece
        end = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:end], self.buffer[end:]
        return data

    def head(self) -> bytes:
        return self.until(b"\r\n\r\n")

    def rest(self) -> bytes:
        """Return all bytes until the other side closes the connection."""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.sock.recv(1 << 18):
                self.buffer += piece
        data, self.buffer = self.buffer, b""
        return data

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    @property
    def closed_by_peer(self) -> bool:
        """Has the other side closed the connection, or does it within 5 s?"""
        self.sock.settimeout(5)
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


def ok(body: bytes = b"ok", *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Backend:
    """A server that calls `handle` with each connection, in a thread of its own.

    Without `handle` it records each request's head, and sends `answer`.
    """

    def __init__(
        self,
        answer: bytes = ok(),
        handle: Callable[[Connection], object] | None = None,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> None:
        self.answer, self.handler = answer, handle
        self.heads: list[bytes] = []
        self.connections = 0
        self.open: set[Connection] = set()
        self.family, self.port = family, 0
        self.start()
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after `stop`, on the same port."""
        host = "127.0.0.1" if self.family == socket.AF_INET else "::1"
        self.sock = socket.create_server((host, self.port), family=self.family, backlog=256)
        self.port = self.sock.getsockname()[1]
        threading.Thread(target=self._accept, args=[self.sock], daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            self.connections += 1
            connection = Connection(sock)
            self.open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            if self.handler:
                self.handler(connection)
                return
            while head := connection.head():
                self.heads.append(head)
                length = header(head, "content-length")
                connection.read(int(length or 0))
                connection.send(self.answer)
        except OSError:  # the other side has closed the connection
            pass
        finally:
            connection.close()
            self.open.discard(connection)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.sock.close()
        for connection in list(self.open):
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def header(head: bytes, name: str) -> str | None:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return None


def headers(head: bytes, name: str) -> list[str]:
    values = []
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            values.append(value.strip())
    return values


class Answer:
    def __init__(self, head: bytes, body: bytes) -> None:
        self.head, self.body = head, body
        self.status = int(head.split(b" ", 2)[1]) if head else 0

    def header(self, name: str) -> str | None:
        return header(self.head, name)

    @property
    def json(self) -> object:
        return json.loads(self.body)


def read_answer(connection: Connection, *, head_only: bool = False) -> Answer:
    """Read one answer from a connection that stays open; 1xx answers but 101 are skipped."""
    head = connection.head()
    while head[9:10] == b"1" and head[9:12] != b"101":
        head = connection.head()
    status = int(head.split(b" ", 2)[1]) if head else 0
    if head_only or status in (204, 304) or not head:
        return Answer(head, b"")
    if (length := header(head, "content-length")) is not None:
        return Answer(head, connection.read(int(length)))
    if (header(head, "transfer-encoding") or "").endswith("chunked"):
        body = b""
        while size := int(connection.until(b"\r\n").split(b";")[0], 16):
            body += connection.read(size)
            connection.read(2)
        connection.until(b"\r\n")
        return Answer(head, body)
    return Answer(head, connection.rest())


def ask(
    port: int, target: str = "/", *lines: str, method: str = "GET", body: bytes = b""
) -> Answer:
    """Send one request on a connection of its own, and return the answer."""
    head = [f"{method} {target} HTTP/1.1", "host: app.example", *lines]
    if body:
        head.append(f"content-length: {len(body)}")
    with Connection.to(port) as connection:
        connection.send("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
        return read_answer(connection, head_only=method == "HEAD")


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def eventually(check: Callable[[], object], seconds: float = 30) -> None:
    """Wait until `check()` is true, at most `seconds`: on a busy machine all takes its time."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.02)


class Collector:
    """Takes what is pushed to it as OTLP, and answers as it is told to."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, dict[str, str], bytes]] = []
        self.status, self.location = 200, ""
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                sent = {name.lower(): value for name, value in self.headers.items()}
                collector.taken.append((self.path, sent, body))
                self.send_response(collector.status)
                if collector.location:
                    self.send_header("location", collector.location)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
