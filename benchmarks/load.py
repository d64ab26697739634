"""Load for where wrk is not installed, and for WebSockets, which wrk does not speak.

    python -m benchmarks.load http PORT PATH CONNECTIONS SECONDS
    python -m benchmarks.load ws   PORT PATH CONNECTIONS SECONDS

Prints how many round trips there were.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

FRAME = bytes((0x81, 0x80 | 5, 0, 0, 0, 0)) + b"hello"  # masked with zeros


class Client(asyncio.Protocol):
    """Sends, waits for the whole answer, sends again."""

    total = 0
    until = 0.0

    def __init__(self, request: bytes, *, websocket: bool) -> None:
        self.request, self.websocket = request, websocket
        self.left = -1  # body bytes still to come; -1: the head is
        self.buffer = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.left == -2:  # an open WebSocket
            self.buffer += data
            while len(self.buffer) >= 7:
                self.buffer = self.buffer[7:]
                self.again(FRAME)
            return
        if self.left == -1:
            self.buffer += data
            head, mark, body = self.buffer.partition(b"\r\n\r\n")
            if not mark:
                return
            self.buffer = b""
            if self.websocket:
                if not head.startswith(b"HTTP/1.1 101"):
                    raise SystemExit(head.decode())
                self.left = -2
                self.again(FRAME)
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(head.decode())
            at = head.lower().index(b"content-length:")
            self.left = int(head[at + 15 :].split(b"\r\n")[0]) - len(body)
        else:
            self.left -= len(data)
        if self.left <= 0:
            self.left = -1
            self.again(self.request)

    def again(self, data: bytes) -> None:
        Client.total += 1
        if time.monotonic() < Client.until:
            self.transport.write(data)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def main(kind: str, port: int, path: str, connections: int, seconds: float) -> None:
    upgrade = (
        "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    head = f"GET {path} HTTP/1.1\r\nhost: bench\r\n{upgrade if kind == 'ws' else ''}\r\n".encode()
    loop = asyncio.get_running_loop()
    Client.until = time.monotonic() + seconds
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: Client(head, websocket=kind == "ws"), "127.0.0.1", port
        )
        clients.append(client)
    await asyncio.wait([c.done for c in clients], timeout=seconds + 10)
    print(Client.total)


if __name__ == "__main__":
    _, kind, port, path, connections, seconds = sys.argv
    uvloop.run(main(kind, int(port), path, int(connections), float(seconds)))
