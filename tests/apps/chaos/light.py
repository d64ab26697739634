"""A backend that starts in no time and answers what the chaos run's clients ask (tests/chaos.py).

PULSE_DEPLOYMENT_ID=a PORT=8000 python light.py

With PULSE_RAILWAY_INSTANCE it is one of several processes, of which the first counts all sockets.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal

NAME = os.environ["PULSE_DEPLOYMENT_ID"]
INSTANCE = int(os.environ.get("PULSE_RAILWAY_INSTANCE", "1"))
INSTANCES = int(os.environ.get("PULSE_RAILWAY_INSTANCES", "1"))
PORT = int(os.environ["PORT"])
PROCESS = NAME if INSTANCE == 1 else f"{NAME}.{INSTANCE}"
sockets = 0


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b" ", 2)
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
            path = target.split(b"?")[0].decode()
            if path == "/ws":
                await talk(reader, writer)
                return
            if path == "/stream":
                await stream(writer)
            else:
                if path.startswith("/_pulse/internal/railway/"):
                    status, kind, answer = await count_sockets(head)
                else:
                    status, kind, answer = respond(method.decode(), path, body)
                lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}"]
                lines += [f"content-length: {len(answer)}", "", ""]
                writer.write("\r\n".join(lines).encode() + answer)
            await writer.drain()
    writer.close()


def respond(method: str, path: str, body: bytes) -> tuple[int, str, bytes]:
    if path == "/page":
        return 200, "text/html", f"<p>page of {NAME}".encode()
    if path == f"/assets/{NAME}.js":
        return 200, "text/javascript", f"// {NAME}".encode()
    if path == "/upload":
        return 200, "text/plain", f"{NAME} {hashlib.sha256(body).hexdigest()}".encode()
    if path in ("/work", "/_pulse/meta", "/_pulse/health"):
        found = {"deployment_id": NAME, "process": PROCESS}
        return 200, "application/json", json.dumps(found).encode()
    return 404, "text/plain", b"not here"


async def count_sockets(head: bytes) -> tuple[int, str, bytes]:
    found, kind = sockets, "application/json"
    for number in range(2, INSTANCES + 1) if INSTANCE == 1 else ():
        try:
            async with asyncio.timeout(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", PORT + number - 1)
                writer.write(head)
                answer = await reader.readuntil(b"\r\n\r\n")
                length = answer.lower().partition(b"content-length: ")[2].split()[0]
                found += json.loads(await reader.readexactly(int(length)))["render_session_count"]
                writer.close()
        except (OSError, EOFError, TimeoutError):
            return 503, kind, b"{}"
    counts = {"render_session_count": found, "reloaded_socket_count": found}
    return 200, kind, json.dumps(counts).encode()


async def stream(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for number in range(20):
        part = f"{NAME} {number}\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(part), part))
        await writer.drain()
        await asyncio.sleep(0.1)
    writer.write(b"0\r\n\r\n")


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A WebSocket that gives back each short frame (RFC 6455 section 5.2), after its name."""
    global sockets
    sockets += 1
    try:
        writer.write(b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n")
        while True:
            first, length = await reader.readexactly(2)
            mask = await reader.readexactly(4)
            data = await reader.readexactly(length & 127)
            if first & 15 != 1:
                return
            text = PROCESS.encode() + b" " + bytes(b ^ mask[i % 4] for i, b in enumerate(data))
            writer.write(bytes((0x81, len(text))) + text)
            await writer.drain()
    finally:
        sockets -= 1


async def main() -> None:
    server = await asyncio.start_server(handle, "127.0.0.1", PORT, backlog=512)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 0)
    async with server:
        await server.serve_forever()


asyncio.run(main())
