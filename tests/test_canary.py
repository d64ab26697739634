"""A canary's share of new visitors: which visitors are in it, and failures of its backend."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pulse_railway import runtime_image
from tests.conftest import Process, Redis
from tests.net import Answer, Backend, Connection, ask, eventually, headers, ok

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
Run = Callable[..., Process]
CHROME, HTML = "user-agent: Mozilla/5.0", "accept: text/html"
PAGE = "content-type: text/html; charset=utf-8"


def visitor(n: int) -> bytes:
    return hashlib.blake2b(b"%d" % n, digest_size=8).hexdigest().encode()


@pytest.mark.parametrize("weight", [0, 1, 5, 10, 25, 50, 90, 100])
def test_the_share_is_within_a_point(weight: float) -> None:
    inside = sum(router.in_canary_bucket(visitor(n), "prod-1", weight) for n in range(10_000))
    assert abs(inside / 100 - weight) <= (1 if 0 < weight < 100 else 0)


@given(
    st.binary(max_size=40), st.from_regex(r"[a-z0-9][a-z0-9-]{0,23}", fullmatch=True),
    st.floats(0, 100), st.floats(0, 100),
)  # fmt: skip
def test_no_visitor_leaves_a_share_that_grows(
    visitor_id: bytes, name: str, weight: float, other: float
) -> None:
    low, high = sorted((weight, other))
    in_bucket = router.in_canary_bucket
    assert in_bucket(visitor_id, name, low) <= in_bucket(visitor_id, name, high)
    assert not in_bucket(visitor_id, name, 0)
    assert in_bucket(visitor_id, name, 100)


def test_two_canaries_have_different_visitors() -> None:
    both = sum(
        router.in_canary_bucket(visitor(n), "a", 10)
        and router.in_canary_bucket(visitor(n), "b", 10)
        for n in range(10_000)
    )
    assert 50 < both < 150


# -- in the router -----------------------------------------------------------------------------


@dataclass
class Canary:
    """`a` is active, `b` the canary."""

    redis: Redis
    a: Backend
    b: Backend
    ports: list[int]

    def set_weight(self, weight: float) -> None:
        fields = {"registered_at": 2, "weight": weight, "held": True}
        self.redis.deployment("b", self.b.address, "pending", **fields)

    def page(self, n: int, *lines: str, port: int = 0, path: str = "/") -> Answer:
        """Return the answer to visitor number `n`."""
        address = f"x-real-ip: 10.0.{n // 250}.{n % 250}"
        return ask(port or self.ports[0], path, address, CHROME, HTML, *lines)

    def sides(self, visitors: int = 60, port: int = 0) -> list[bytes]:
        """Return for each visitor which deployment answers: b"a" or b"b"."""
        return [self.page(n, port=port).body for n in range(visitors)]


@pytest.fixture
def canary(redis_server: Redis, run_router: Run) -> Iterator[Canary]:
    with Backend(ok(b"a", PAGE)) as a, Backend(ok(b"b", PAGE)) as b:
        redis_server.deployment("a", a.address, "active", registered_at=1)
        canary = Canary(redis_server, a, b, [])
        canary.set_weight(50)
        limits = {"report_seconds": 0.5}
        canary.ports = [run_router(redis_server, limits).port for _ in range(2)]
        both = {b"a", b"b"}
        eventually(lambda: all(set(canary.sides(port=port)) == both for port in canary.ports))
        yield canary


def cookie_of(answer: Answer) -> str:
    return (answer.header("set-cookie") or "").partition(";")[0]


def test_every_router_agrees(canary: Canary) -> None:
    expected = canary.sides()
    assert canary.sides() == expected
    assert canary.sides(port=canary.ports[1]) == expected


def test_a_page_its_assets_its_fetch_calls_and_its_socket_agree(canary: Canary) -> None:
    """The app's own cookie makes no difference, nor a new address or browser with the cookie."""
    for n in range(20):
        page = canary.page(n)
        cookie = cookie_of(page)
        assert cookie.startswith("pulse_railway_visitor=")
        for lines in (
            [],  # a request before the page's cookie arrives
            ["cookie: session=1"],
            [f"cookie: session=1; {cookie}"],
            [f"cookie: {cookie}; session=1", "x-real-ip: 192.0.2.1", "user-agent: Other"],
        ):
            if any(line.startswith("x-real-ip") for line in lines):
                answer = ask(canary.ports[0], "/assets/x.js", *lines)
            else:
                answer = canary.page(n, *lines, path="/assets/x.js")
            assert answer.body == page.body
        with Connection.to(canary.ports[1]) as c:
            c.send(
                b"GET /socket HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
                b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
                b"cookie: " + cookie.encode() + b"\r\n\r\n"
            )
            assert b"x-pulse-selected-deployment: " + page.body in c.head()


def test_the_cookie_comes_once_and_with_pages_only(canary: Canary) -> None:
    first = canary.page(1, "x-forwarded-proto: https")
    cookie = first.header("set-cookie") or ""
    assert cookie.endswith("; Path=/; Max-Age=2592000; HttpOnly; SameSite=Lax; Secure")
    assert "Secure" not in (canary.page(1).header("set-cookie") or "")
    assert canary.page(1, f"cookie: {cookie_of(first)}").header("set-cookie") is None
    assert canary.page(1, "cookie: pulse_railway_visitor=nonsense").header("set-cookie")
    assert canary.page(1, path="/?pulse_deployment=b").header("set-cookie") is None
    port, address = canary.ports[0], "x-real-ip: 10.0.0.1"  # no navigation: no cookie
    for lines in ([], [HTML, "sec-fetch-mode: cors"]):
        assert ask(port, "/", address, CHROME, *lines).header("set-cookie") is None
    posted = ask(port, "/", address, CHROME, HTML, "sec-fetch-mode: navigate", method="POST")
    assert posted.header("set-cookie") is None  # another site's: it comes without the cookie
    canary.a.answer = canary.b.answer = ok(b"x", "content-type: text/css")
    assert canary.page(2).header("set-cookie") is None


def test_no_shared_cache_keeps_what_a_visitor_got(canary: Canary) -> None:
    """Nor an answer that the header chose, or could have chosen, for another header."""
    page, asset = canary.page(1), canary.page(1, path="/assets/x.css")
    assert (page.header("cache-control"), page.header("vary")) == ("private", "x-pulse-deployment")
    before = canary.a.answer, canary.b.answer
    for sent, kept in (
        ("public, max-age=3600", "private, max-age=3600"),
        ("Public, s-maxage=9", "private"),
        ("no-store", "private, no-store"),
        ("max-age=1\r\nCACHE-CONTROL: public", "private, max-age=1"),
        ('private="set-cookie, public", max-age=1', "private, max-age=1"),
        ('no-cache="a, public", s-maxage="9"', 'private, no-cache="a, public"'),
        ("public; max-age=3600", "private"),
        ("publicity, , max-age=1", "private, publicity, max-age=1"),
    ):
        page_answer = ok(b"x", "content-type: text/html", f"cache-control: {sent}")
        canary.a.answer = canary.b.answer = page_answer
        assert headers(canary.page(1).head, "cache-control") == [kept]
    canary.a.answer, canary.b.answer = before
    named = canary.page(1, path="/?pulse_deployment=b")
    assert (named.header("cache-control"), named.header("vary")) == (None, "x-pulse-deployment")
    canary.a.answer = canary.b.answer = ok(b"x", "content-type: text/css")
    asset = canary.page(1, path="/assets/x.css")
    assert (asset.header("cache-control"), asset.header("vary")) == (None, None)


NAMES = "public Public private S-MaxAge s-maxage max-age no-cache no-store x-public".split()
SHARED = ("public", "private", "s-maxage")


def quoted(text: str) -> str:
    return '="' + re.sub(r'(["\\])', r"\\\1", text) + '"'


VALUE = st.one_of(st.just(""), st.just("=9"), st.text('a,=; "\\', max_size=6).map(quoted))
DIRECTIVES = st.lists(st.tuples(st.sampled_from(NAMES), VALUE).map("".join), max_size=6)


@given(st.lists(DIRECTIVES, max_size=3))
@example([['no-cache="a, public'], ["public"]])
def test_directives_of_an_answer_are_one_line(sent: list[list[str]]) -> None:
    lines = [f"Cache-Control: {', '.join(line)}\r\n".encode() for line in sent]
    lines.insert(len(lines) // 2, b"x: y\r\n")
    kept = [d for line in sent for d in line if d.partition("=")[0].lower() not in SHARED]
    expected = [b"x: y\r\n", f"cache-control: {', '.join(['private', *kept])}\r\n".encode()]
    assert router.with_cache_control(lines, b"private", router.FOR_SHARED) == expected


def test_a_share_grows_and_ends(canary: Canary) -> None:
    half = canary.sides()
    canary.set_weight(80)
    eventually(lambda: canary.sides().count(b"b") > half.count(b"b"))
    more = canary.sides()
    assert all(after == b"b" for before, after in zip(half, more, strict=True) if before == b"b")
    canary.set_weight(100)
    eventually(lambda: set(canary.sides()) == {b"b"})
    canary.set_weight(0)
    eventually(lambda: set(canary.sides()) == {b"a"})
    assert canary.page(0, path="/?pulse_deployment=b").body == b"b"
    store = router.RedisStore(canary.redis.url, "pulse:railway")
    store.apply(lambda routing: control.abort_canary(routing, "b"))
    eventually(lambda: canary.page(0).header("set-cookie") is None)


def test_visitors_of_a_canary_that_is_down_get_the_active_version(canary: Canary) -> None:
    expected = canary.sides(20)
    canary.set_weight(100)
    eventually(lambda: set(canary.sides(20)) == {b"b"})
    canary.b.stop()
    assert canary.sides(20) == [b"a"] * 20
    upload = ask(canary.ports[0], "/", "x-real-ip: 10.0.0.1", CHROME, method="POST", body=b"x" * 9)
    assert (upload.status, upload.body) == (200, b"a")
    assert b"x" * 9 not in canary.b.heads
    assert canary.page(0, path="/?pulse_deployment=b").status == 502  # a tab of the canary
    assert expected
    canary.a.stop()
    answer = canary.page(0)
    assert (answer.status, answer.header("x-pulse-selected-deployment")) == (502, "a")


def test_new_visitors_of_a_silent_canary_get_the_active_deployment(
    redis_server: Redis, run_router: Run
) -> None:
    """After a while, if the request may be repeated; a tab of the canary waits for its version."""

    def silent(c: Connection) -> None:
        while head := c.head():
            if b" /first " in head:  # the connection is pooled then
                c.send(ok(b"b"))
                continue
            c.rest()

    with Backend(ok(b"a")) as a, Backend(handle=silent) as b:
        redis_server.deployment("a", a.address)
        redis_server.deployment("b", b.address, "pending", weight=100)
        limits = {"canary_seconds": 0.3, "response_seconds": 2.0}
        port = run_router(redis_server, limits).port
        eventually(lambda: ask(port, "/healthz").status == 200)
        for _ in range(2):  # on a new connection, and on a pooled one
            began = time.monotonic()
            assert ask(port).body == b"a"
            assert time.monotonic() - began < 1.9
            assert ask(port, "/first").body == b"b"
        began = time.monotonic()
        assert ask(port, "/?pulse_deployment=b").status == 504
        assert time.monotonic() - began > 1.9
        assert ask(port, "/", method="POST", body=b"x").status == 504


def test_the_share_outlives_redis_and_a_restarted_router(canary: Canary, run_router: Run) -> None:
    expected = canary.sides()
    fresh = run_router(canary.redis).port
    assert canary.sides(port=fresh) == expected
    canary.redis.stop()
    assert canary.sides() == expected
    late = run_router(canary.redis).port
    assert canary.page(0, port=late).status == 503
    canary.redis.start()  # it has lost its data, which the routers restore
    eventually(lambda: canary.page(0, port=late).status == 200, 20)
    assert canary.sides(port=late) == expected


def test_each_deployments_requests_are_counted_by_outcome(canary: Canary) -> None:
    canary.set_weight(0)
    eventually(lambda: set(canary.sides(20)) == {b"a"})

    def tally(name: str) -> Any:
        """[answers by class, failures, durations], summed over the routers."""
        keys = list(canary.redis.client.scan_iter("pulse:railway:router:*"))
        reports = [json.loads(str(v))["tallies"] for v in canary.redis.client.mget(keys) if v]
        tallies = [report[name] for report in reports if name in report]
        return [
            [sum(t[0][i] for t in tallies) for i in range(10)],
            sum(t[1] for t in tallies),
            sum(sum(t[2]) for t in tallies),
        ]

    eventually(lambda: tally("a")[0][2] == tally("a")[2])
    before = tally("b")
    canary.b.answer = ok(b"no", status="500 Internal Server Error")
    for _ in range(3):
        canary.page(0, path="/?pulse_deployment=b")
    canary.b.answer = ok(b"no", status="404 Not Found")
    canary.page(0, path="/?pulse_deployment=b")
    canary.b.stop()
    time.sleep(0.1)
    assert canary.page(0, path="/?pulse_deployment=b").status == 502
    # the router's own 502 is counted as an answer, not as a failure too
    eventually(lambda: tally("b")[0][5] == before[0][5] + 4)
    assert tally("b")[1] == before[1]
    assert tally("b")[0][4] == before[0][4] + 1


# -- maintenance -------------------------------------------------------------------------------


def test_maintenance_answers_all_but_health_checks_and_the_token(
    redis_server: Redis, run_router: Run
) -> None:
    with Backend(ok(b"app")) as a:
        redis_server.deployment("a", a.address)
        port = run_router(redis_server, PULSE_RAILWAY_INTERNAL_TOKEN="secret").port
        store = router.RedisStore(redis_server.url, "pulse:railway")

        def switch(**changes: Any) -> None:
            settings = {"page": None, "retry_after": 7, "by": "ada", **changes}
            store.apply(lambda state: control.set_maintenance(state, **settings))

        eventually(lambda: ask(port).body == b"app")
        switch()
        eventually(lambda: ask(port).status == 503)
        page = ask(port, "/any", "accept: text/html,*/*")
        assert b"<h1>Back soon</h1>" in page.body
        assert b"<meta http-equiv=refresh content=7>" in page.body
        assert page.header("retry-after") == "7"
        assert ask(port, "/api").json == {"detail": "maintenance"}
        assert ask(port, "/?pulse_deployment=a").status == 503
        assert ask(port, "/x", method="POST", body=b"x" * 100).status == 503
        assert ask(port, "/healthz").status == 200
        assert ask(port, "/_pulse/health").body == b"app"
        assert ask(port, "/", "x-pulse-railway-internal-token: secret").body == b"app"
        assert ask(port, "/", "x-pulse-railway-internal-token: guessed").status == 503
        assert (
            ask(port, "/_pulse/internal/x", "x-pulse-railway-internal-token: secret").status == 404
        )
        switch(page="<p>our own")
        eventually(lambda: ask(port, "/", "accept: text/html").body == b"<p>our own")
        switch(off=True)
        eventually(lambda: ask(port).body == b"app")


def test_open_sockets_stay_in_maintenance(redis_server: Redis, run_router: Run) -> None:
    def serve(c: Connection) -> None:
        c.head()
        c.send(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n"
        )
        while word := c.read(1):
            c.send(word)

    with Backend(handle=serve) as a:
        redis_server.deployment("a", a.address)
        port = run_router(redis_server).port
        handshake = (
            b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
        )
        with Connection.to(port) as c:
            c.send(handshake)
            assert b" 101 " in c.head()
            store = router.RedisStore(redis_server.url, "pulse:railway")
            store.apply(lambda state: control.set_maintenance(state, None, 7, None))

            def refused() -> bool:
                with Connection.to(port) as other:
                    other.send(handshake)
                    return b" 503 " in other.head()

            eventually(refused)
            c.send(b"x")
            assert c.read(1) == b"x"
