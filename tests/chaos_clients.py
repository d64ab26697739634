"""The clients of the chaos run. They implement HTTP themselves, and judge every answer.

Each plays one life after another: a page, its asset, and then requests, an upload, a stream or a
socket with the page's affinity. `World` has what is allowed: the deployments that may answer, and
those that are down on purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import socketio.exceptions

from examples.visitor import Visitor

if TYPE_CHECKING:
    from tests.chaos import World

ANSWER_TIMEOUT = 40.0  # seconds
# answers to new visitors that are excused only where nothing could have answered in its place
NOT_CONNECTED = (
    '{"detail":"the deployment refuses connections"}',
    '{"detail":"the deployment does not answer"}',
)


class Ended(Exception):
    """A life ends: its deployment is removed, or a request has failed."""


class ClientAnswer:
    def __init__(self, head: bytes, body: bytes) -> None:
        self.status = int(head.split(b" ", 2)[1])
        lines = head.decode("latin-1").split("\r\n")[1:-2]
        self.fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        self.body = body.decode()

    @property
    def deployment(self) -> str:
        return self.fields.get("x-pulse-selected-deployment", "")

    @property
    def process(self) -> str:
        """The affinity of a page, as affinity.js reads it."""
        return self.fields["server-timing"].partition('desc="')[2].partition('"')[0]


def name_of(affinity: str) -> str:
    """Return the deployment of an affinity."""
    return affinity.partition(".")[0]


def exact(affinity: str) -> str:
    """Return the name of a process among those that are down on purpose."""
    return affinity if "." in affinity else f"{affinity}.1"


class ClientConnection:
    """A connection to a router. Its methods raise OSError or EOFError when it breaks."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.used = False
        self.selected = ""  # the deployment in the answer's head, also if its body breaks off

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    def close(self) -> None:
        self.writer.close()

    async def ask(self, head: bytes, body: bytes = b"") -> ClientAnswer:
        """Send a request and return its answer.

        Raises ConnectionResetError if a kept-alive connection was closed before: the request may be
        repeated then.
        """
        self.selected = ""
        try:
            self.writer.write(head + body)
            await self.writer.drain()
            answer_head = await self.reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError) as error:
            if self.used and not getattr(error, "partial", b""):
                raise ConnectionResetError from None
            raise
        self.used = True
        self.selected = ClientAnswer(answer_head, b"").deployment
        if b"\r\ntransfer-encoding: chunked" in answer_head.lower():
            content = b""
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                content += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        else:
            length = ClientAnswer(answer_head, b"").fields.get("content-length", "0")
            content = await self.reader.readexactly(int(length))
        if b"\r\nconnection: close" in answer_head.lower():
            self.close()
            self.used = False
        return ClientAnswer(answer_head, content)

    async def rest(self, seconds: float) -> None:
        """Wait. Raises EOFError if the server closes the connection meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.reader.at_eof():
                raise EOFError
            await asyncio.sleep(0.05)

    async def frame(self) -> bytes:
        """Return the next short frame of a WebSocket; answer pings (RFC 6455 section 5.5)."""
        while True:
            first, length = await self.reader.readexactly(2)
            data = await self.reader.readexactly(length)
            if first & 15 == 8:
                raise EOFError
            if first & 15 != 9:
                return data
            self.writer.write(bytes((0x8A, 0x80 | length, 0, 0, 0, 0)) + data)


class Client:
    """A browser: an address and a user agent of its own, and one cookie."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.rng = random.Random(f"{world.seed}-client-{number}")
        self.life = 0
        self.cookie = ""
        self.connection: ClientConnection | None = None

    async def run(self) -> None:
        while not self.world.over:
            self.life += 1
            self.cookie = ""
            with contextlib.suppress(Ended):
                await self.live()
            if self.connection:
                self.connection.close()
                self.connection = None
            await asyncio.sleep(self.rng.uniform(0, 1.0))

    async def live(self) -> None:
        page = await self.get("/page")
        name, process = page.deployment, page.process
        if page.body != f"<p>page of {name}":
            self.world.fail("wrong version", f"{name} gave {page.body!r}")
        asset = await self.get(f"/assets/{name}.js", of=name)
        if asset.status == 200 and asset.body != f"// {name}":
            self.world.fail("wrong version", f"an asset of {name}: {asset.body!r}")
        kind = self.rng.choices(("browse", "upload", "stream", "socket"), (5, 1, 1, 3))[0]
        for _ in range(self.rng.randint(1, 6)):
            if self.world.over:
                return
            if kind == "socket":
                await self.socket(process)
                return
            if kind == "upload":
                body = os.urandom(self.rng.randint(1_000, 300_000))
                answer = await self.get("/upload", process, body)
                expected = f"{name} {hashlib.sha256(body).hexdigest()}"
            elif kind == "stream":
                answer = await self.get("/stream", process)
                expected = "".join(f"{name} {n}\n" for n in range(20))
            else:
                answer = await self.get("/work", process)
                expected = answer.body if f'"{process}"' in answer.body else process
            if answer.body != expected:
                self.world.fail("wrong version", f"{kind} of {name}: {answer.body[:80]!r}")
            await asyncio.sleep(self.rng.uniform(0.05, 1.0))

    def head(self, path: str, affinity: str, *lines: str, length: int | None = None) -> bytes:
        number = self.number * 1000 + self.life % 1000
        query = f"?pulse_deployment={affinity}" if affinity else ""
        out = [f"{'GET' if length is None else 'POST'} {path}{query} HTTP/1.1", "host: app.example"]
        out += [
            f"user-agent: client {number}",
            f"x-real-ip: 10.{number >> 16}.{number >> 8 & 255}.9",
        ]
        out += [f"cookie: {self.cookie}"] if self.cookie else []
        out += [] if length is None else [f"content-length: {length}"]
        return "\r\n".join([*out, *lines, "", ""]).encode()

    async def get(
        self, path: str, affinity: str = "", body: bytes | None = None, of: str = ""
    ) -> ClientAnswer:
        """Send a request, judge and return its answer. Raises Ended unless its status is 200.

        Args:
            of: the deployment that has the requested asset.
        """
        world, began = self.world, time.monotonic()
        head = self.head(path, affinity, length=None if body is None else len(body))
        answer, broken = None, ""
        for _ in range(3):
            try:
                # an upload gets a new connection, since it cannot be repeated
                if body is not None and self.connection:
                    self.connection.close()
                    self.connection = None
                if self.connection is None or self.connection.writer.is_closing():
                    self.connection = ClientConnection(self.rng.choice(world.ports))
                    await self.connection.open()
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    answer = await self.connection.ask(head, body or b"")
                break
            except (ConnectionResetError, ConnectionRefusedError):
                self.connection = None  # a kept-alive connection was closed: repeat, as browsers do
                broken = "connection lost"
                world.count["repeated"] += 1
            except TimeoutError:
                broken = "no answer in time"
                break
            except (OSError, EOFError) as error:
                broken = f"broken off ({type(error).__name__})"
                break
        world.count["requests"] += 1
        selected = self.connection.selected if self.connection else ""
        name = (answer.deployment if answer else selected) or affinity.partition(".")[0]
        if answer and "set-cookie" in answer.fields and "visitor" in answer.fields["set-cookie"]:
            self.cookie = answer.fields["set-cookie"].partition(";")[0]
        if answer and answer.status == 200:
            if not affinity and not of and not world.may_answer(name, began):
                world.fail("wrong version", f"{name} answered without affinity")
            if affinity and name != affinity.partition(".")[0]:
                world.fail("wrong version", f"{name} answered for {affinity}")
            return answer
        if self.connection:
            self.connection.close()
            self.connection = None
        why = f"{path} {answer.status} {answer.body[:60]}" if answer else f"{path} {broken}"
        gone = of or affinity
        if answer and answer.status == 409 and affinity:
            if name_of(affinity) in world.running and not world.was_down(name_of(affinity), began):
                world.fail("stale answer of a deployment that runs", affinity)
            world.count["told to reload"] += 1
        elif (
            answer
            and answer.status == 404
            and of
            and (of in world.ended or world.was_down(of, began))
        ):
            world.count["asset of a deployment that is gone"] += 1
        elif answer and not gone and answer.body in NOT_CONNECTED and world.has_fallback(name):
            world.fail("request", f"{why}: {name} is down, and there is a fallback")
        elif world.was_down(exact(gone) if affinity else gone or name, began):
            world.count["on a backend that was killed or ended"] += 1
        else:
            world.fail("request", f"{why} ({name})")
        raise Ended

    async def socket(self, name: str, closed_at: float = 0.0) -> None:
        """Open a WebSocket to a process, and send frames from time to time; another one if the
        router is replaced.

        Args:
            closed_at: when the one before was closed, monotonic.
        """
        world, began = self.world, time.monotonic()
        port = self.rng.choice(world.ports)
        connection = ClientConnection(port)
        lines = ["upgrade: websocket", "connection: Upgrade", "sec-websocket-version: 13"]
        lines.append("sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==")
        until = began + self.rng.uniform(2, 45)
        try:
            await connection.open()
            connection.writer.write(self.head("/ws", name, *lines))
            async with asyncio.timeout(ANSWER_TIMEOUT):
                answer = await connection.reader.readuntil(b"\r\n\r\n")
            if b" 101 " not in answer.split(b"\r\n")[0]:
                status = answer.split(b" ", 2)[1].decode()
                gone = name_of(name) not in world.running
                if status == "409" and (gone or world.was_down(name_of(name), began)):
                    world.count["told to reload"] += 1
                elif world.was_down(exact(name), began):
                    world.count["on a backend that was killed or ended"] += 1
                else:
                    world.fail("request", f"a handshake: {status} ({name})")
                raise Ended
            world.count["sockets"] += 1
            if closed_at:
                world.back_after.append(time.monotonic() - closed_at)
            number = 0
            while time.monotonic() < until and not world.over:
                number += 1
                word = f"{self.number} {number}".encode()
                frame = bytes((0x81, 0x80 | len(word), 0, 0, 0, 0)) + word
                connection.writer.write(frame)
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    text = await connection.frame()
                if text != f"{name} ".encode() + word:
                    world.fail("wrong version", f"a socket of {name} said {text!r}")
                await connection.rest(self.rng.uniform(0.3, 2.0))
        except (OSError, EOFError, TimeoutError) as error:
            if port in world.retired:
                world.count["sockets ended with their router"] += 1
                world.closed[port].append(time.monotonic())
                connection.close()
                await self.socket(name, time.monotonic())
            elif world.was_down(exact(name), began) or name_of(name) not in world.running:
                world.count["sockets ended with their backend"] += 1
            else:
                world.fail("socket", f"{type(error).__name__} ({name})")
        finally:
            if hasattr(connection, "writer"):
                connection.close()


class Tab:
    """A user of a Pulse app: one tab after the other, with one session for all of them."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.rng = random.Random(f"{world.seed}-tab-{number}")
        self.cookie: str | None = None
        self.counted = 0  # the count that the session must have

    async def run(self) -> None:
        while not self.world.over:
            began, port = time.monotonic(), self.rng.choice(self.world.ports)
            visitor = Visitor(f"http://127.0.0.1:{port}", None, cookie=self.cookie)  # type: ignore[arg-type]
            name = known = ""
            try:
                async with visitor as tab:
                    await tab.open()
                    name = known = tab.affinity or ""
                    began = time.monotonic()
                    self.cookie = tab.cookie
                    self.check(tab, name, 0)
                    await tab.connect()
                    self.world.count["tabs"] += 1
                    for number in range(1, self.rng.randint(3, 25)):
                        if self.world.over:
                            break  # type: ignore[unreachable]  # another task sets it
                        await asyncio.sleep(self.rng.uniform(0.2, 1.5))
                        await tab.count()
                        self.counted += 1
                        self.world.count["counted in a tab"] += 1
                        self.check(tab, name, number)
            except (
                OSError,
                TimeoutError,
                aiohttp.ClientError,
                socketio.exceptions.SocketIOError,
            ) as e:
                status = getattr(e, "status", 0)
                headers = getattr(e, "headers", None) or {}
                name = name or headers.get("x-pulse-selected-deployment", "")
                if status == 404:  # the active deployment is no Pulse app
                    pass
                elif port in self.world.retired:
                    self.world.count["tabs ended with their router"] += 1
                elif self.world.was_down(exact(name) if known else name, began) or (
                    name and name_of(name) not in self.world.running
                ):
                    self.world.count["tabs ended with their backend"] += 1
                else:
                    self.world.fail("tab", f"{type(e).__name__} {e} ({name or 'opening'})")
                self.counted = -1  # unknown: the last press may have counted
            await asyncio.sleep(self.rng.uniform(0.5, 3))

    def check(self, tab: Any, name: str, number: int) -> None:
        if tab.tab != number:
            self.world.fail("tab", f"{name} shows {tab.tab}, not {number}: its state was lost")
        if self.counted < 0:
            self.counted = tab.session
        if tab.session < self.counted:
            self.world.fail(
                "session", f"{name} shows {tab.session}, and {self.counted} was counted"
            )
        self.counted = max(self.counted, tab.session)
