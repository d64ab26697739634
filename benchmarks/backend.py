"""The benchmark's backend: `python -m benchmarks.backend PORT`.

GET /       two bytes
GET /64k    64 KiB
GET /down   SIZE bytes (1 GB)
POST        two bytes, after the body
WebSocket   echoes frames
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import sys

import uvloop

SIZE = 1 << 30
SMALL = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok"
BIG = b"HTTP/1.1 200 OK\r\ncontent-length: 65536\r\n\r\n" + b"x" * 65536
BLOCK = b"y" * (1 << 18)
MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Backend(asyncio.Protocol):
    def __init__(self) -> None:
        self.buffer = b""
        self.upload = 0
        self.websocket = False
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or True
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        if self.websocket:
            self.echo(data)
            return
        if self.upload:
            self.upload -= len(data)
            if self.upload <= 0:
                self.upload = 0
                self.transport.write(SMALL)
            return
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head, self.buffer = self.buffer[: end + 4], self.buffer[end + 4 :]
            self.request(head)

    def request(self, head: bytes) -> None:
        if head.startswith(b"POST"):
            match = re.search(rb"(?i)content-length: *(\d+)", head)
            length = int(match[1]) if match else 0
            self.upload, self.buffer = length - len(self.buffer), b""
            if self.upload <= 0:
                self.upload = 0
                self.transport.write(SMALL)
        elif key := re.search(rb"(?i)sec-websocket-key: *(\S+)", head):
            accept = base64.b64encode(hashlib.sha1(key[1] + MAGIC).digest())
            self.websocket = True
            self.transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
                b"sec-websocket-accept: " + accept + b"\r\n\r\n"
            )
        elif head.startswith(b"GET /64k"):
            self.transport.write(BIG)
        elif head.startswith(b"GET /down"):
            asyncio.get_running_loop().create_task(self.stream())
        else:
            self.transport.write(SMALL)

    def echo(self, data: bytes) -> None:
        """Send masked text frames of less than 126 bytes back, unmasked."""
        self.buffer += data
        while len(self.buffer) >= 2 and len(self.buffer) >= 6 + (self.buffer[1] & 127):
            size = self.buffer[1] & 127
            mask, payload = self.buffer[2:6], self.buffer[6 : 6 + size]
            self.buffer = self.buffer[6 + size :]
            unmasked = bytes(b ^ mask[i & 3] for i, b in enumerate(payload))
            self.transport.write(bytes((0x81, size)) + unmasked)

    async def stream(self) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % SIZE)
        for _ in range(SIZE // len(BLOCK)):
            self.transport.write(BLOCK)
            await self.writable.wait()


async def main(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Backend, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
