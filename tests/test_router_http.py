"""What the backend receives and what the client receives, byte for byte."""

from __future__ import annotations

import contextlib
import gzip
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import router
from tests.conftest import Process, Redis
from tests.net import (
    Answer,
    Backend,
    Connection,
    ask,
    eventually,
    header,
    headers,
    ok,
    read_answer,
)

Run = Callable[..., Process]


class Routed:
    """A backend behind a router."""

    def __init__(self, backend: Backend, router: Process) -> None:
        self.backend, self.router = backend, router
        self.port = router.port

    def open(self) -> Connection:
        return Connection.to(self.port)


@pytest.fixture
def routed(redis_server: Redis, run_router: Run) -> Iterator[Callable[..., Routed]]:
    """`routed(handle=..., answer=...)`: that backend, active behind a router."""
    backends: list[Backend] = []

    def make(
        answer: bytes = ok(), handle: Callable[[Connection], None] | None = None, **env: Any
    ) -> Routed:
        backend = Backend(answer, handle)
        backends.append(backend)
        redis_server.deployment("a", backend.address)
        router = run_router(redis_server, **env)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        return Routed(backend, router)

    yield make
    for backend in backends:
        backend.stop()


def once(
    data: bytes, then: Callable[[Connection], None] = Connection.close
) -> Callable[[Connection], None]:
    """A backend that reads one head, sends `data` and then does `then`."""

    def handle(connection: Connection) -> None:
        if connection.head():
            connection.send(data)
            then(connection)

    return handle


# -- the request -------------------------------------------------------------------------------


def test_request_lines_arrive_as_they_were_sent(routed: Callable[..., Routed]) -> None:
    r = routed()
    target = "/a%2Fb//c/./d%20e;x=y?q=%2f&&=&pulse=1?"
    sent = [
        "Accept-Encoding: gzip, br",
        "X-Twice: one",
        "Cookie: a=b; c=d",
        "x-twice:  two",
        "X-Empty:",
        'User-Agent: "odd" (\xe9)',
    ]
    assert ask(r.port, target, *sent).status == 200
    received = r.backend.heads[-1].decode("latin-1").split("\r\n")
    assert received[0] == f"GET {target} HTTP/1.1"
    kept = [line for line in received[1:] if line]
    assert kept == [
        "host: app.example",
        "Accept-Encoding: gzip, br",
        "X-Twice: one",
        "Cookie: a=b; c=d",
        "x-twice: two",
        "X-Empty: ",
        'User-Agent: "odd" (\xe9)',
        "x-forwarded-host: app.example",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
    ]


def test_a_lone_question_mark_is_kept(routed: Callable[..., Routed]) -> None:
    r = routed()
    ask(r.port, "/x?")
    assert r.backend.heads[-1].startswith(b"GET /x? HTTP/1.1\r\n")


def test_forwarding_headers_of_the_edge_are_kept(routed: Callable[..., Routed]) -> None:
    r = routed()
    ask(
        r.port,
        "/",
        "x-forwarded-for: 203.0.113.9",
        "x-forwarded-proto: https",
        "x-forwarded-host: public.example",
    )
    head = r.backend.heads[-1]
    assert headers(head, "x-forwarded-for") == ["203.0.113.9"]
    assert headers(head, "x-forwarded-proto") == ["https"]
    assert headers(head, "x-forwarded-host") == ["public.example"]
    assert headers(head, "host") == ["app.example"]


def test_a_clients_x_forwarded_for_is_never_alone(routed: Callable[..., Routed]) -> None:
    """The edge says in X-Real-IP who the client is; an app may trust the last address."""
    r, real = routed(), "x-real-ip: 198.51.100.7"
    for sent, received in (
        ([real], "198.51.100.7"),
        (["x-forwarded-for: 6.6.6.6", real], "6.6.6.6, 198.51.100.7"),
        (
            [real, "X-Forwarded-For: 6.6.6.6", "x-forwarded-for: 7.7.7.7"],
            "6.6.6.6, 7.7.7.7, 198.51.100.7",
        ),
        (["x-forwarded-for: 6.6.6.6, 198.51.100.7", real], "6.6.6.6, 198.51.100.7"),
    ):
        ask(r.port, "/", *sent)
        assert headers(r.backend.heads[-1], "x-forwarded-for") == [received]


@given(st.from_regex(r"[0-9a-f:.]{2,20}", fullmatch=True))
@example("::ffff:1.2.3.4")
@example("1::2:3:4:5:6:7:8")
def test_a_literal_host_is_an_ipv6_address(text: str) -> None:
    try:
        valid = bool(ipaddress.IPv6Address(text))
    except ValueError:
        valid = False
    assert router.is_host(f"[{text}]:80".encode()) == valid


def test_the_internal_token_goes_no_further(routed: Callable[..., Routed]) -> None:
    r = routed()
    ask(r.port, "/", "X-Pulse-Railway-Internal-Token: secret", "connection: close")
    assert b"secret" not in r.backend.heads[-1]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("app.example:8080", 200),
        ("[::1]:80", 200),
        ("[v1.fe80:a]", 200),
        ("[::ffff:1.2.3.4]", 200),
        ("[::::::]", 400),
        ("[.]", 400),
        ("[a]", 400),
        ("[1:2:3:4:5:6:7:8:9]", 400),
        ("[]", 400),
        ("xn--bcher-kva.example", 200),
        ("", 200),
        ("app.example/abc?bar=", 400),  # CVE-2026-48710
        ("[::1", 400),
        ("app.example:a", 400),
        ("a b", 400),
        ("user@app.example", 400),
        ("a\\b", 400),
    ],
)
def test_a_host_is_one(routed: Callable[..., Routed], host: str, status: int) -> None:
    r = routed()
    with r.open() as c:
        for _ in range(2 if status == 200 else 1):  # the second one like the first
            c.send(f"GET / HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            assert read_answer(c).status == status
    assert ask(r.port, "/", f"x-forwarded-host: {host}").status == status
    assert ask(r.port, "/", f"x-forwarded-host: good.example, {host}").status == status


def test_options_for_the_whole_server(routed: Callable[..., Routed]) -> None:
    """RFC 9112 section 3.2.4."""
    r = routed()
    for target, received in (
        ("*", "*"),
        ("http://app.example", "*"),
        ("http://app.example/", "/"),
        ("http://app.example?x", "/?x"),
    ):
        ask(r.port, target, method="OPTIONS")
        assert r.backend.heads[-1].startswith(f"OPTIONS {received} HTTP/1.1\r\n".encode())


def test_a_transfer_coding_stays_with_its_body(routed: Callable[..., Routed]) -> None:
    """RFC 9112 section 6.1: a body coded with gzip is no plain one."""
    r = routed()
    packed = gzip.compress(b"hello" * 100)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed)
    r.backend.answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: GZIP, chunked\r\n\r\n" + chunks
    for _ in range(2):
        answer = ask(r.port)
        assert answer.header("transfer-encoding") == "gzip, chunked"
        assert gzip.decompress(answer.body) == b"hello" * 100
    assert r.backend.connections == 1
    with r.open() as c:  # which has no transfer codings
        c.send(b"GET / HTTP/1.0\r\n\r\n")
        assert read_answer(c).status == 502


def test_a_body_without_a_length_that_is_reset_is_not_complete(
    routed: Callable[..., Routed],
) -> None:
    r = routed(handle=once(b"HTTP/1.1 200 OK\r\n\r\nhalf", Connection.reset))
    with r.open() as c:
        c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        whole = c.rest()
    assert b"half" in whole
    assert not whole.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("pause", [0, 0.05])
def test_an_early_refusal_of_an_upload_arrives(routed: Callable[..., Routed], pause: float) -> None:
    """The backend resets the connection behind it: up to 70 % were lost (RFC 9112 section 9.6)."""

    def refuse(connection: Connection) -> None:
        if (head := connection.head()).startswith(b"POST"):
            connection.send(b"HTTP/1.1 413 No\r\nconnection: close\r\ncontent-length: 3\r\n\r\n")
            time.sleep(pause)
            connection.send(b"big")
        elif head:
            connection.send(ok())

    def upload(connection: Connection) -> None:
        with contextlib.suppress(OSError):
            for _ in range(50):
                connection.send(b"x" * 65536)

    r = routed(handle=refuse)
    for _ in range(20):
        with r.open() as c:
            c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n")
            sender = threading.Thread(target=upload, args=[c])
            sender.start()
            answer = read_answer(c)
            sender.join()
        assert (answer.status, answer.body) == (413, b"big")


def test_an_answer_that_is_not_http_is_named(routed: Callable[..., Routed]) -> None:
    r = routed(handle=once(b"SSH-2.0-OpenSSH_9.2\r\n"))
    answer = ask(r.port, method="POST")
    assert (answer.status, answer.body) == (502, b'{"detail":"the backend\'s answer is not HTTP"}')


def test_connections_of_a_deployment_that_left_the_table_are_closed(
    redis_server: Redis, routed: Callable[..., Routed]
) -> None:
    """They were pooled for a deployment that nobody asks any more, and stayed open for good."""
    release, ended = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        if connection.head().startswith(b"GET /slow"):
            release.wait(10)
            connection.send(ok(b"late"))
            assert connection.rest() == b""
            ended.set()
        else:
            connection.send(ok(b"here", "connection: close"))

    r = routed(handle=slow)
    with Backend(ok(b"moved")) as other, r.open() as c:
        c.send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        eventually(lambda: r.backend.connections == 1)
        redis_server.deployment("a", other.address)
        eventually(lambda: ask(r.port).body == b"moved")
        release.set()
        assert read_answer(c).body == b"late"
        assert ended.wait(2)


def test_people_get_a_page_while_a_backend_is_down(routed: Callable[..., Routed]) -> None:
    r = routed()
    r.backend.stop()
    page = ask(r.port, "/", "accept: text/html,*/*", "sec-fetch-mode: navigate")
    assert (page.status, page.header("retry-after")) == (502, "5")
    assert b"http-equiv=refresh content=5" in page.body
    for lines in (["accept: text/html", "sec-fetch-mode: cors"], ["accept: */*"]):
        assert ask(r.port, "/", *lines).header("content-type") == "application/json"


def test_hop_by_hop_headers_go_no_further(routed: Callable[..., Routed]) -> None:
    r = routed(
        ok(
            b"x",
            "connection: x-private, keep-alive",
            "keep-alive: timeout=5",
            "x-private: backend",
            "proxy-authenticate: Basic",
            "x-kept: 1",
        )
    )
    answer = ask(
        r.port,
        "/",
        "connection: keep-alive, x-secret",
        "x-secret: 1",
        "te: trailers",
        "keep-alive: 300",
        "proxy-authorization: Basic x",
        "proxy-connection: keep-alive",
        "x-open: 1",
    )
    head = r.backend.heads[-1].lower()
    for gone in (b"x-secret", b"te:", b"keep-alive", b"proxy-", b"connection:"):
        assert gone not in head
    assert header(r.backend.heads[-1], "x-open") == "1"
    for gone in (b"x-private", b"keep-alive", b"proxy-auth", b"connection"):
        assert gone not in answer.head.lower()
    assert answer.header("x-kept") == "1"


def test_connection_cannot_name_away_what_matters(routed: Callable[..., Routed]) -> None:
    r = routed()
    ask(r.port, "/", "connection: host, content-length", method="POST", body=b"abc")
    head = r.backend.heads[-1]
    assert header(head, "content-length") == "3"
    assert header(head, "host") == "app.example"
    r.backend.answer = ok(b"xyz", "connection: content-length")
    assert ask(r.port).header("content-length") == "3"


def test_connection_cannot_name_away_what_the_edge_or_the_app_relies_on(
    routed: Callable[..., Routed],
) -> None:
    """CVE-2024-45410's kind: an app would take the visitor for one without an address."""
    r = routed()
    kept = ["X-Forwarded-For: 1.2.3.4", "x-forwarded-proto: https", "x-real-ip: 1.2.3.4"]
    kept += ["cookie: a=b", "authorization: x", "x-railway-edge: e", "x-request-start: 1"]
    kept += ["traceparent: 00-1", "tracestate: a", "forwarded: for=1.2.3.4", "x-pulse-a: b"]
    names = ",".join(line.partition(":")[0] for line in kept)
    ask(r.port, "/", f"connection: {names}, x-private", "x-private: 1", *kept)
    head = r.backend.heads[-1]
    assert [line for line in kept if line.encode() not in head] == []
    assert b"x-private" not in head.lower()


def test_no_cache_keeps_an_answer_of_the_router(routed: Callable[..., Routed]) -> None:
    r = routed()
    for path in ("/_pulse/internal/x", "/?pulse_deployment=gone"):
        assert header(ask(r.port, path).head, "cache-control") == "no-store"
    r.backend.stop()
    answer = ask(r.port, "/")
    assert (answer.status, header(answer.head, "cache-control")) == (502, "no-store")


def test_bodies_of_every_framing(routed: Callable[..., Routed]) -> None:
    def echo(connection: Connection) -> None:
        while head := connection.head():
            if header(head, "transfer-encoding"):
                body = b""
                while size := int(connection.until(b"\r\n"), 16):
                    body += connection.read(size)
                    connection.read(2)
                connection.until(b"\r\n")
            else:
                body = connection.read(int(header(head, "content-length") or 0))
            connection.send(ok(body))

    r = routed(handle=echo)
    assert ask(r.port, "/", method="POST", body=b"length").body == b"length"
    assert ask(r.port, "/", "content-length: 0", method="POST").body == b""
    with r.open() as c:
        for _ in range(2):  # and the connection stays good
            c.send(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            c.send(b"3\r\none\r\n3;ext=1\r\ntwo\r\n0\r\ntrailer: dropped\r\n\r\n")
            assert read_answer(c).body == b"onetwo"
        c.send(b"PUT / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
        assert read_answer(c).body == b""
        big = bytes(range(256)) * 8000
        c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(big))
        threading.Thread(target=c.send, args=(big,)).start()
        assert read_answer(c).body == big


def test_methods_are_passed_on(routed: Callable[..., Routed]) -> None:
    r = routed()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "TRACE"):
        assert ask(r.port, "/", method=method).status == 200
        assert r.backend.heads[-1].startswith(method.encode() + b" / ")


# -- the answer --------------------------------------------------------------------------------


def test_answer_lines_arrive_as_they_were_sent(routed: Callable[..., Routed]) -> None:
    raw = (
        b"HTTP/1.1 203 Rather Odd\r\nSet-Cookie: a=1\r\nX-Case: Kept\r\nSet-Cookie: b=2; Path=/\r\n"
        b"Content-Encoding: gzip\r\nServer: theirs\r\nDate: today\r\n"
        b"x-pulse-selected-deployment: lie\r\ncontent-length: 3\r\n\r\nabc"
    )
    r = routed(raw)
    answer = ask(r.port)
    assert answer.head == (
        b"HTTP/1.1 203 Rather Odd\r\nSet-Cookie: a=1\r\nX-Case: Kept\r\nSet-Cookie: b=2; Path=/\r\n"
        b"Content-Encoding: gzip\r\nServer: theirs\r\nDate: today\r\ncontent-length: 3\r\n"
        b"x-pulse-selected-deployment: a\r\nvary: x-pulse-deployment\r\n\r\n"
    )
    assert answer.body == b"abc"


def test_encoded_bodies_are_not_touched(routed: Callable[..., Routed]) -> None:
    packed = gzip.compress(b"hello" * 100)
    answer = ask(routed(ok(packed, "content-encoding: gzip")).port)
    assert gzip.decompress(answer.body) == b"hello" * 100


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 204 No Content\r\nx: 1\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\netag: x\r\ncontent-length: 99\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nt: 1\r\n\r\n",
        b"HTTP/1.1 500 \r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_answers_of_every_framing_on_one_connection(
    routed: Callable[..., Routed], raw: bytes
) -> None:
    r = routed(raw)
    with r.open() as c:
        for _ in range(3):
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = read_answer(c)
            assert answer.status == int(raw[9:12])
            if answer.status == 200:
                assert answer.body == b"abc"
    assert r.backend.connections == 1  # pooled


def test_head_has_the_headers_and_no_body(routed: Callable[..., Routed]) -> None:
    def handle(connection: Connection) -> None:
        while head := connection.head():
            answer = ok(b"12345")
            connection.send(answer[:-5] if head.startswith(b"HEAD") else answer)

    r = routed(handle=handle)
    with r.open() as c:
        for _ in range(3):
            c.send(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = read_answer(c, head_only=True)
            assert answer.header("content-length") == "5"
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(c).body == b"12345"
    assert r.backend.connections == 1


def test_head_of_a_body_without_a_length(routed: Callable[..., Routed]) -> None:
    """RFC 9112 section 6.1: Transfer-Encoding in an answer to HEAD is what GET would have."""
    r = routed(ok(b"", "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b""))
    with r.open() as c:
        for _ in range(3):
            c.send(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = read_answer(c, head_only=True)
            assert (answer.status, answer.header("transfer-encoding")) == (200, "chunked")
    assert r.backend.connections == 1


def test_a_body_that_ends_with_the_connection(routed: Callable[..., Routed]) -> None:
    r = routed(handle=once(b"HTTP/1.1 200 OK\r\nx: 1\r\n\r\nuntil the end"))
    assert ask(r.port).body == b"until the end"
    with r.open() as c:
        c.send(b"GET / HTTP/1.0\r\n\r\n")
        assert c.rest().endswith(b"\r\n\r\nuntil the end")


def test_interim_answers_reach_the_client(routed: Callable[..., Routed]) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"
    r = routed(handle=once(early + early + ok(b"late")))
    with r.open() as c:
        c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert c.head() == early
        assert c.head() == early
        assert read_answer(c).body == b"late"
    with r.open() as c:  # HTTP/1.0 knows none
        c.send(b"GET / HTTP/1.0\r\n\r\n")
        assert c.rest().startswith(b"HTTP/1.1 200")


def test_http_1_0_clients(routed: Callable[..., Routed]) -> None:
    r = routed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    with r.open() as c:
        c.send(b"GET /x HTTP/1.0\r\n\r\n")
        whole = c.rest()
    assert whole.endswith(b"\r\n\r\nabc")
    assert b"chunked" not in whole
    assert b"connection: close" in whole
    assert r.backend.heads[-1].startswith(b"GET /x HTTP/1.1\r\n")
    assert header(r.backend.heads[-1], "host")


def test_pipelined_requests_are_answered_in_order(routed: Callable[..., Routed]) -> None:
    def handle(connection: Connection) -> None:
        while head := connection.head():
            if b"/slow" in head:
                time.sleep(0.2)
            connection.send(ok(head.split(b" ")[1]))

    r = routed(handle=handle)
    with r.open() as c:
        paths = [b"/slow", b"/b", b"/healthz", b"/c?pulse_deployment=gone", b"/d"]
        c.send(b"".join(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % p for p in paths))
        got = [read_answer(c) for _ in paths]
    assert [a.status for a in got] == [200, 200, 200, 409, 200]
    assert [got[0].body, got[1].body, got[4].body] == [b"/slow", b"/b", b"/d"]


def test_connection_close_is_honoured(routed: Callable[..., Routed]) -> None:
    r = routed()
    with r.open() as c:
        c.send(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert header(c.head(), "connection") == "close"
        assert c.rest() == b"ok"
    r.backend.answer = ok(b"ok", "connection: close")
    with r.open() as c:  # the backend's `close` is between it and the router
        for _ in range(2):
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(c).body == b"ok"


# -- streaming ---------------------------------------------------------------------------------


def test_the_first_byte_goes_out_when_it_comes_in(routed: Callable[..., Routed]) -> None:
    go = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n"
        )
        go.wait(10)
        connection.send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    r = routed(handle=handle)
    with r.open() as c:
        c.send(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
        c.head()
        assert c.until(b"data: 1\n\n\r\n")
        go.set()
        assert c.until(b"0\r\n\r\n") == b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"


def test_uploads_stream(routed: Callable[..., Routed]) -> None:
    seen = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        connection.read(4)
        seen.set()
        connection.read(4)
        connection.send(ok(b"all"))

    r = routed(handle=handle)
    with r.open() as c:
        c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\nhalf")
        assert seen.wait(5)
        c.send(b"full")
        assert read_answer(c).body == b"all"


def test_a_long_poll_is_left_alone(routed: Callable[..., Routed]) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        time.sleep(2.5)
        connection.send(ok(b"at last"))

    short = ("connect", "backend", "resolved", "upstream_idle", "linger_pause", "linger")
    limits = {f"{name}_seconds": 0.5 for name in short}  # none of them is of this
    assert ask(routed(handle=handle, limits=limits).port).body == b"at last"


@pytest.mark.parametrize("way", ["down", "up"])
def test_memory_does_not_grow_with_the_body(routed: Callable[..., Routed], way: str) -> None:
    size, block = 192 << 20, bytes(1 << 18)

    def handle(connection: Connection) -> None:
        connection.head()
        if way == "down":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(size // len(block)):
                connection.send(block)
        else:
            left = size
            while left:
                left -= len(connection.read(min(left, 1 << 20)))
                if left > size // 2:
                    time.sleep(0.001)  # slower than the client
            connection.send(ok(b"got it"))

    r = routed(handle=handle)
    before = r.router.rss
    peak = 0
    with r.open() as c:
        if way == "down":
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            c.head()
            left = size
            while left:
                left -= len(c.read(min(left, 1 << 20)))
                peak = max(peak, r.router.rss)
        else:
            c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(size // len(block)):
                c.send(block)
                peak = max(peak, r.router.rss)
            assert read_answer(c).body == b"got it"
    assert peak - before < 16 << 20


def test_a_slow_reader_holds_the_backend_back(routed: Callable[..., Routed]) -> None:
    sent = 0

    def handle(connection: Connection) -> None:
        nonlocal sent
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (256 << 20))
        for _ in range(1024):
            connection.send(bytes(1 << 18))
            sent += 1 << 18

    r = routed(handle=handle)
    with r.open() as c:
        c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        c.head()
        time.sleep(1.5)
        assert sent < 32 << 20


# -- Expect, early answers, departures ---------------------------------------------------------


def test_expect_100_continue(routed: Callable[..., Routed]) -> None:
    def handle(connection: Connection) -> None:
        while head := connection.head():
            assert header(head, "expect") == "100-continue"
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.send(ok(connection.read(4)))

    r = routed(handle=handle)
    with r.open() as c:
        for _ in range(2):
            c.send(
                b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n"
            )
            assert c.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
            c.send(b"body")
            assert read_answer(c).body == b"body"


def test_expect_that_the_backend_refuses(routed: Callable[..., Routed]) -> None:
    r = routed(handle=once(ok(b"no", status="417 Expectation Failed")))
    with r.open() as c:
        c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n")
        head = c.head()
        assert head.startswith(b"HTTP/1.1 417")


def test_expect_that_the_backend_does_not_know(routed: Callable[..., Routed]) -> None:
    def handle(connection: Connection) -> None:
        connection.head()
        connection.send(ok(connection.read(4)))

    r = routed(handle=handle)
    with r.open() as c:
        c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n")
        assert c.head().startswith(b"HTTP/1.1 100")
        c.send(b"body")
        assert read_answer(c).body == b"body"


def test_an_early_answer_to_a_large_upload_arrives(routed: Callable[..., Routed]) -> None:
    refusal = ok(b"too large", "connection: close", status="413 Content Too Large")
    r = routed(handle=once(refusal, lambda c: time.sleep(1)))
    for _ in range(5):
        with r.open() as c:
            c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 50000000\r\n\r\n")
            sent = 0
            try:
                while sent < 3_000_000:
                    c.send(bytes(100_000))
                    sent += 100_000
            except OSError:
                pytest.fail("the router reset the connection before its answer was read")
            answer = read_answer(c)
            assert (answer.status, answer.body) == (413, b"too large")


def test_the_routers_own_answer_to_an_upload_arrives(routed: Callable[..., Routed]) -> None:
    r = routed()
    with r.open() as c:
        c.send(
            b"POST /?pulse_deployment=gone HTTP/1.1\r\nhost: x\r\ncontent-length: 5000000\r\n\r\n"
        )
        for _ in range(20):
            c.send(bytes(100_000))
        assert read_answer(c).status == 409


def test_a_client_that_leaves_ends_the_upstream_request(routed: Callable[..., Routed]) -> None:
    left = threading.Event()

    def handle(connection: Connection) -> None:
        connection.head()
        if connection.closed_by_peer:
            left.set()

    r = routed(handle=handle)
    c = r.open()
    c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    time.sleep(0.3)
    c.close()
    assert left.wait(2)
    left.clear()
    c = r.open()
    c.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf")
    time.sleep(0.3)
    c.reset()
    eventually(lambda: left.is_set() or r.backend.connections >= 2, 3)


def test_a_backend_that_breaks_off_breaks_the_answer_off(routed: Callable[..., Routed]) -> None:
    for raw in (
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nonly this\r\n",
    ):
        for end in (Connection.close, Connection.reset):
            r = routed(handle=once(raw, end))
            with r.open() as c:
                c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                c.head()
                rest = c.rest()
            assert b"only this" in rest or end is Connection.reset
            assert not rest.endswith(b"0\r\n\r\n")
            with r.open() as c:  # HTTP/1.0 has no other sign than a reset
                c.send(b"GET / HTTP/1.0\r\n\r\n")
                if b"chunked" in raw:
                    with pytest.raises(ConnectionResetError):
                        while c.sock.recv(65536):
                            pass


# -- faults ------------------------------------------------------------------------------------


def test_a_backend_that_is_down_is_502(routed: Callable[..., Routed]) -> None:
    r = routed()
    r.backend.stop()
    answer = ask(r.port)
    assert (answer.status, answer.header("x-pulse-selected-deployment")) == (502, "a")
    assert "detail" in answer.json  # type: ignore[operator]


def test_a_backend_that_says_nothing_is_502_or_504(routed: Callable[..., Routed]) -> None:
    assert ask(routed(handle=once(b"")).port).status == 502
    assert ask(routed(handle=once(b"SSH-2.0-x\r\n")).port).status == 502
    endless = b"HTTP/1.1 200 OK\r\n" + b"x: %b\r\n" % (b"y" * 8000) * 40
    assert ask(routed(handle=once(endless, lambda c: time.sleep(3))).port).status == 502
    slow = routed(
        handle=once(b"", lambda c: time.sleep(8)), PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT="1"
    )
    began = time.monotonic()
    assert ask(slow.port).status == 504
    assert time.monotonic() - began < 5


def test_a_dead_pooled_connection_costs_nothing(routed: Callable[..., Routed]) -> None:
    """The backend closes its idle connection just as the next request goes out on it."""
    served = 0

    def handle(connection: Connection) -> None:
        nonlocal served
        connection.head()
        connection.send(ok(b"first"))
        served += 1
        if served % 2 == 1:
            connection.head()  # take the next request and hang up on it
            connection.reset()

    r = routed(handle=handle)
    with r.open() as c:
        for _ in range(6):
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(c).status == 200


@pytest.mark.parametrize(
    "poison",
    [
        ok(b"poison"),
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"junk",
        b"HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ],
)
def test_what_a_backend_sends_unasked_reaches_nobody(
    routed: Callable[..., Routed], poison: bytes
) -> None:
    """Behind one answer, in the same segment: it must not become the head of the next."""

    def handle(connection: Connection) -> None:
        while connection.head():
            connection.send(ok(b"good") + poison)

    r = routed(handle=handle)
    with r.open() as c:
        for _ in range(4):
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = read_answer(c)
            assert (answer.status, answer.body) == (200, b"good")
    assert r.backend.connections == 4  # none was used again


@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_a_request_with_a_body_is_not_repeated(
    routed: Callable[..., Routed], method: bytes
) -> None:
    """Nor is a GET: what it had of a body is gone."""
    bodies = 0

    def handle(connection: Connection) -> None:
        nonlocal bodies
        while head := connection.head():
            if b"content-length" in head:
                bodies += 1
                connection.reset()
                return
            connection.send(ok())

    r = routed(handle=handle)
    with r.open() as c:
        c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        read_answer(c)
        c.send(method + b" / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx")
        assert read_answer(c).status == 502
    assert bodies == 1


def test_idle_connections_closed_by_the_backend_under_load(
    routed: Callable[..., Routed],
) -> None:
    """A backend that closes each connection 10 ms after its last answer loses no request."""

    def handle(connection: Connection) -> None:
        connection.sock.settimeout(0.01)
        try:
            while connection.head():
                connection.sock.settimeout(20)
                connection.send(ok())
                connection.sock.settimeout(0.01)
        except TimeoutError:
            connection.close()

    r = routed(handle=handle)
    statuses: list[int] = []

    def client(pause: float) -> None:
        with r.open() as c:
            for _ in range(60):
                c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                statuses.append(read_answer(c).status)
                time.sleep(pause)

    threads = [threading.Thread(target=client, args=(p,)) for p in (0.009, 0.0101, 0.011, 0.012)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 240
    assert set(statuses) == {200}


RESOLVER = """\
import socket
system = socket.getaddrinfo
def getaddrinfo(host, port, *args, **kwargs):
    if host != "both.internal":
        return system(host, port, *args, **kwargs)
    return [found for a in ("FIRST", "SECOND") for found in system(a, port, *args, **kwargs)]
socket.getaddrinfo = getaddrinfo
"""


@pytest.mark.parametrize(("first", "second"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_name_with_both_addresses_of_which_one_answers(
    redis_server: Redis, run_router: Run, tmp_path: Path, first: str, second: str, family: int
) -> None:
    """The resolver alone stands in: what a machine's `localhost` has is the machine's affair."""
    (tmp_path / "sitecustomize.py").write_text(
        RESOLVER.replace("FIRST", first).replace("SECOND", second)
    )
    with Backend(ok(b"here"), family=socket.AddressFamily(family)) as backend:
        redis_server.deployment("both", f"http://both.internal:{backend.port}")
        port = run_router(redis_server, PYTHONPATH=str(tmp_path)).port
        eventually(lambda: ask(port).body == b"here")


def test_ipv6_backends(redis_server: Redis, run_router: Run) -> None:
    with Backend(ok(b"six"), family=socket.AF_INET6) as six:
        redis_server.deployment("six", f"http://[::1]:{six.port}")
        port = run_router(redis_server).port
        eventually(lambda: ask(port).body == b"six")


def test_the_router_listens_on_both_families(redis_server: Redis, run_router: Run) -> None:
    with Backend() as a:
        redis_server.deployment("a", a.address)
        port = run_router(redis_server, HOST="").port
        eventually(lambda: ask(port).status == 200)
        with Connection.to(port, "::1") as c:
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(c).status == 200


def test_answers_are_the_same_as_without_a_router(routed: Callable[..., Routed]) -> None:
    """Direct and routed, an answer differs in the one header that the router adds."""
    raw = ok(b"same", "x-a: 1", "vary: b", "vary: c")
    r = routed(raw)

    def direct() -> Answer:
        with Connection.to(r.backend.port) as c:
            c.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            return read_answer(c)

    one, other = direct(), ask(r.port)
    assert other.body == one.body
    added = b"x-pulse-selected-deployment: a\r\nvary: x-pulse-deployment\r\n\r\n"
    assert other.head == one.head[:-2] + added
