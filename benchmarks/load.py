"""A load generator, for WebSockets, steady rates, and machines without wrk.

    python -m benchmarks.load http PORT PATH CONNECTIONS SECONDS
    python -m benchmarks.load ws   PORT PATH CONNECTIONS SECONDS
    python -m benchmarks.load open PORT PATH RATE        SECONDS

Prints the number of round trips. `open` sends RATE requests a second, independent of the answers,
and prints percentiles of the milliseconds from each request's due time to its answer.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time
from typing import ClassVar

import uvloop

FRAME = bytes((0x81, 0x80 | 5, 0, 0, 0, 0)) + b"hello"  # masked with zeros


class Client(asyncio.Protocol):
    """A connection that sends the next request when the whole answer is there."""

    total = 0
    until = 0.0

    def __init__(self, request: bytes, *, websocket: bool) -> None:
        self.request, self.websocket = request, websocket
        self.remaining = -1  # bytes of the body to come; -1: the head is to come
        self.buffer = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.remaining == -2:  # an open WebSocket
            self.buffer += data
            while len(self.buffer) >= 7:
                self.buffer = self.buffer[7:]
                self.next_round(FRAME)
            return
        if self.remaining == -1:
            self.buffer += data
            head, mark, body = self.buffer.partition(b"\r\n\r\n")
            if not mark:
                return
            self.buffer = b""
            if self.websocket:
                if not head.startswith(b"HTTP/1.1 101"):
                    raise SystemExit(head.decode())
                self.remaining = -2
                self.next_round(FRAME)
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(head.decode())
            at = head.lower().index(b"content-length:")
            self.remaining = int(head[at + 15 :].split(b"\r\n")[0]) - len(body)
        else:
            self.remaining -= len(data)
        if self.remaining <= 0:
            self.remaining = -1
            self.next_round(self.request)

    def next_round(self, data: bytes) -> None:
        Client.total += 1
        if time.monotonic() < Client.until:
            self.transport.write(data)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


class SteadyClient(asyncio.Protocol):
    """One of many connections, which sends one due request at a time."""

    free: ClassVar[list[SteadyClient]] = []
    queue: ClassVar[collections.deque[float]] = collections.deque()  # due times of waiting requests
    latencies: ClassVar[list[float]] = []

    def __init__(self, request: bytes) -> None:
        self.request, self.due, self.buffer = request, 0.0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        SteadyClient.free.append(self)

    def send(self, due: float) -> None:
        self.due = due
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.buffer.endswith(b"\r\n\r\nok"):
            return
        self.buffer = b""
        SteadyClient.latencies.append(time.monotonic() - self.due)
        if SteadyClient.queue:
            self.send(SteadyClient.queue.popleft())
        else:
            SteadyClient.free.append(self)


async def send_at_rate(port: int, path: str, rate: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n".encode()
    for _ in range(64):
        await loop.create_connection(lambda: SteadyClient(request), "127.0.0.1", port)
    began, sent = time.monotonic(), 0
    while (now := time.monotonic()) < began + seconds:
        while (due := began + sent / rate) <= now:
            sent += 1
            if SteadyClient.free:
                SteadyClient.free.pop().send(due)
            else:
                SteadyClient.queue.append(due)
        await asyncio.sleep(0.0005)
    await asyncio.sleep(1)
    latencies = sorted(
        SteadyClient.latencies[len(SteadyClient.latencies) // 10 :]
    )  # the first tenth warms up
    at = {"50": 0.5, "99": 0.99, "99.9": 0.999}
    print(json.dumps({name: latencies[int(len(latencies) * q)] * 1000 for name, q in at.items()}))


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
    if kind == "open":
        uvloop.run(send_at_rate(int(port), path, int(connections), float(seconds)))
        raise SystemExit
    uvloop.run(main(kind, int(port), path, int(connections), float(seconds)))
