"""The fuzz job: mutated requests, and mutated answers of a backend, through a router.

    invoke fuzz --minutes 10 [--seed N]     by hand; the tests have a short run

Behind the router are uvicorn with h11 and with httptools, Node where it is installed, and a backend
whose answers are mutated, all on pooled connections. Well-formed requests run beside the mutated
ones. Every request has a token that its answer repeats. So no client may receive a token that it
did not send, and no backend a request without the router's own `x-forwarded-proto`.
"""

from __future__ import annotations

import collections
import json
import random
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

from pulse_railway.local.supervisor import free_port
from tests.conftest import Process, Redis, router_command
from tests.net import Backend, Connection, ask, eventually, header, ok, read_answer

APPS = Path(__file__).parent / "apps"
TOKEN = re.compile(rb"t-[0-9a-f]{12}")
WELL_FORMED, MUTATED = 2, 3  # threads
LIMITS = {"linger_seconds": 0.5, "head_seconds": 1.0, "response_seconds": 1.0}
PIECES = (
    *(b"\r\n", b"\r", b"\n", b"\0", b" ", b"\t", b": ", b":", b"%", b"\xff", b";", b",", b"0"),
    *(b"chunked", b"\r\nTransfer-Encoding: chunked", b"\r\nTransfer-Encoding : chunked"),
    *(b"\r\nTransfer-Encoding:\x0bchunked", b"\r\nTransfer-Encoding: x, chunked"),
    *(b"\r\nContent-Length: 7", b"\r\nContent-Length: +7", b"\r\nContent-Length: 0", b"\r\n "),
    *(
        b"\r\nConnection: content-length, host",
        b"\r\nConnection: close",
        b"\r\nExpect: 100-continue",
    ),
    *(
        b"\r\nUpgrade: websocket\r\nConnection: upgrade",
        b"\r\nHost: other",
        b"0\r\n\r\n",
        b"1;a=b\r\n",
    ),
    *(b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"HEAD ", b"OPTIONS * ", b"http://h/", b"\r\n\r\n"),
    b"GET /smuggled HTTP/1.1\r\nhost: app.example\r\nx-token: t-000000000000\r\n\r\n",
)


def mutated(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    """Return data with up to `most` changes: bytes replaced, removed, inserted or repeated."""
    changed = bytearray(data)
    for _ in range(rng.randint(0, most)):
        at = rng.randrange(len(changed) or 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at : at + rng.randint(1, 8)]
            case 2:
                changed[at:at] = rng.choice(PIECES)
            case 3:
                changed[at:at] = changed[rng.randrange(len(changed) or 1) :][: rng.randint(1, 20)]
    return bytes(changed)


def request(deployment: str, token: bytes, rng: random.Random) -> bytes:
    """Return a well-formed request, with a body of one kind or another."""
    head = f"{{}} /x?pulse_deployment={deployment} HTTP/1.1\r\nhost: app.example\r\n"
    start = head.format("POST").encode() + b"x-token: " + token + b"\r\n"
    body = rng.choice([b"", b"x" * rng.randint(1, 3000), PIECES[-1]])
    match rng.randrange(3):
        case 0:
            return head.format("GET").encode() + b"x-token: " + token + b"\r\n\r\n"
        case 1:
            return start + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        case _:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            return start + b"transfer-encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"


class Fuzz:
    """A router, its backends, and what was found."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.sent: collections.Counter[str] = collections.Counter()
        self.statuses: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.tokens: set[bytes] = set()
        self.redis = Redis()
        self.odd = Backend(handle=self.answer_oddly)
        self.apps: dict[str, Process] = {}
        for kind in ("h11", "httptools"):
            port = free_port()
            command = [sys.executable, str(APPS / "fuzz_app.py"), str(port), kind]
            self.apps[kind] = Process(command, port)
        if node := shutil.which("node"):
            port = free_port()
            self.apps["node"] = Process([node, str(APPS / "fuzz_app.js"), str(port)], port)
        for name, app in self.apps.items():
            self.redis.deployment(name, f"http://127.0.0.1:{app.wait().port}", "draining")
        self.redis.deployment("odd", self.odd.address, "draining")
        port = free_port()
        env = {"PORT": str(port), "HOST": "127.0.0.1", "REDIS_URL": self.redis.url}
        command = router_command(Path(sys.executable), LIMITS)
        self.router = Process(command, port, env, forked=True).wait()
        eventually(lambda: ask(port, "/healthz").status == 200)

    def answer_oddly(self, c: Connection) -> None:
        rng = random.Random(self.rng.random())
        while head := c.head():
            c.read(int(header(head, "content-length") or 0))
            token = (header(head, "x-token") or "").encode()
            body = token * rng.randint(0, 3)
            plain = ok(body)
            chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
            answer = rng.choice([plain, chunked % (len(body), body) if body else plain])
            c.send(mutated(answer, rng))

    def token(self) -> bytes:
        token = b"t-" + secrets.token_hex(6).encode()
        self.tokens.add(token)
        return token

    def play(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        work = [self.well_formed] * WELL_FORMED + [self.mutated] * MUTATED
        workers = [
            threading.Thread(target=target, args=[random.Random(f"{self.seed}-{n}"), deadline])
            for n, target in enumerate(work)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.look_at_the_end()

    def well_formed(self, rng: random.Random, deadline: float) -> None:
        """Requests whose answers are known, on connections that stay open."""
        while time.monotonic() < deadline:
            with Connection.to(self.router.port) as c:
                for _ in range(rng.randint(1, 20)):
                    token = self.token()
                    c.send(request(rng.choice(list(self.apps)), token, rng))
                    answer = read_answer(c)
                    self.sent["well-formed"] += 1
                    if answer.status != 200 or token not in answer.body:
                        self.failures.append(f"{token!r} got {answer.head!r} {answer.body[:200]!r}")
                        return

    def mutated(self, rng: random.Random, deadline: float) -> None:
        """Requests and answers that are not; several on a connection, one after the other."""
        while time.monotonic() < deadline:
            tokens = {self.token() for _ in range(rng.randint(1, 3))}
            names = [*self.apps, "odd"]
            data = b"".join(mutated(request(rng.choice(names), t, rng), rng) for t in tokens)
            received = b""
            try:
                with socket.create_connection(("127.0.0.1", self.router.port), 5) as sock:
                    sock.settimeout(5)
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    while piece := sock.recv(65536):
                        received += piece
            except ConnectionError:
                pass
            except TimeoutError:
                self.failures.append(f"no end in 5 s: {data!r}")
            self.sent["mutated"] += len(tokens)
            self.statuses[received[9:12].decode(errors="replace")] += 1
            found = set(TOKEN.findall(received)) & self.tokens  # an answer may have a mutated one
            if others := [token for token in found if token not in data]:
                self.failures.append(f"{others} received: {data!r} {received!r}")
            status = received[9:12]
            answered = status[:1] in (b"", b"2", b"4") or status == b"505"
            # a failure of the router's own, or of a backend that answers all that is well-formed
            if status == b"500" or not (answered or b"odd" in data):
                self.failures.append(f"{status!r}: {data!r}")

    def look_at_the_end(self) -> None:
        for name, app in self.apps.items():
            unmeant = json.loads(ask(app.port, "/unmeant", "x-forwarded-proto: http").body)
            self.failures += [f"{name} has received {head}" for head in unmeant]
            if app.popen.poll() is not None:
                self.failures.append(f"{name} has ended")
        if self.router.popen.poll() is not None or "Traceback" in self.router.output():
            self.failures.append(self.router.output()[-2000:])

    def stop(self) -> None:
        self.router.stop()
        for app in self.apps.values():
            app.stop()
        self.odd.stop()
        self.redis.stop()


def run(seconds: float, seed: int) -> Fuzz:
    fuzz = Fuzz(seed)
    try:
        fuzz.play(seconds)
    finally:
        fuzz.stop()
    return fuzz


def main(minutes: float, seed: int) -> int:
    fuzz = run(minutes * 60, seed)
    print(f"seed {seed}: {dict(fuzz.sent)}, to {', '.join(fuzz.apps)}; {dict(fuzz.statuses)}")
    for failure in fuzz.failures:
        print(f"  FAILED {failure[:1000]}")
    return 1 if fuzz.failures else 0
