"""Which deployment a request gets: the README's table, row by row."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis.asyncio as aioredis

from pulse_railway import runtime_image
from tests.conftest import Process, Redis
from tests.net import Backend, Connection, ask, eventually, headers, ok

router: Any = runtime_image.load("router")

Run = Callable[..., Process]


@pytest.fixture
def two(redis_server: Redis, run_router: Run) -> Iterator[int]:
    """A draining deployment `a` and an active one `b` behind a router."""
    with Backend(ok(b"from a")) as a, Backend(ok(b"from b")) as b:
        redis_server.deployment("a", a.address, "draining", registered_at=1)
        redis_server.deployment("b", b.address, "active", registered_at=2)
        router = run_router(redis_server)
        eventually(lambda: ask(router.port).body == b"from b")
        yield router.port


def test_no_affinity_gets_the_active_deployment(two: int) -> None:
    answer = ask(two)
    assert (answer.body, answer.header("x-pulse-selected-deployment")) == (b"from b", "b")


def test_known_affinity_gets_that_deployment_whatever_its_state(two: int) -> None:
    assert ask(two, "/?pulse_deployment=a").body == b"from a"
    assert ask(two, "/?x=1&pulse_deployment=a&y=2").body == b"from a"
    assert ask(two, "/", "x-pulse-deployment: a").body == b"from a"


def test_a_document_says_which_deployment_made_it(redis_server: Redis, run_router: Run) -> None:
    """sessionStorage is the tab's, not the page's."""
    page = ok(b"<p>", "Content-Type: Text/HTML", "server-timing: db;dur=5")
    with Backend(page) as html, Backend(ok(b"{}", "content-type: application/json")) as other:
        redis_server.deployment("a", html.address, "active", registered_at=1)
        redis_server.deployment("b", other.address, "draining", registered_at=2)
        port = run_router(redis_server).port
        eventually(lambda: ask(port).body == b"<p>")
        lines = [line for line in ask(port).head.split(b"\r\n") if b"timing" in line]
        assert lines == [b"server-timing: db;dur=5", b'server-timing: pulse;desc="a"']
        assert b"timing" not in ask(port, "/?pulse_deployment=b").head


def test_query_wins_over_header(two: int) -> None:
    assert ask(two, "/?pulse_deployment=a", "x-pulse-deployment: b").body == b"from a"
    assert ask(two, "/?pulse_deployment=", "x-pulse-deployment: a").body == b"from a"
    assert ask(two, "/?not_pulse_deployment=a").body == b"from b"
    assert ask(two, "/?pulse_deployment=%61").body == b"from a"


def test_unknown_affinity_is_stale(two: int) -> None:
    answer = ask(two, "/?pulse_deployment=gone")
    assert (answer.status, answer.json) == (409, {"detail": "stale affinity"})
    assert answer.header("x-pulse-stale-affinity") == "1"
    assert answer.header("access-control-allow-origin") is None


def test_stale_answer_has_cors_headers_for_an_origin(two: int) -> None:
    answer = ask(two, "/?pulse_deployment=gone", "origin: https://app.example")
    assert answer.status == 409
    assert answer.header("access-control-allow-origin") == "https://app.example"
    assert answer.header("access-control-allow-credentials") == "true"
    assert answer.header("access-control-expose-headers") == "x-pulse-stale-affinity"
    assert answer.header("vary") == "Origin, x-pulse-deployment"


def test_only_the_apps_own_origin_gets_credentials(two: int) -> None:
    for origin in ("https://evil.example", "https://app.example.evil", "null", "http://["):
        answer = ask(two, "/?pulse_deployment=gone", f"origin: {origin}")
        assert answer.header("access-control-allow-origin") == origin
        assert answer.header("access-control-allow-credentials") is None


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("/?pulse_deployment=gone", "/"),
        ("/a%2Fb?x=%2f&pulse_deployment=gone&&y", "/a%2Fb?x=%2f&&y"),
        ("/a?pulse_deployment=gone&pulse_deployment=b", "/a"),
        ("//evil.example/?pulse_deployment=gone", None),
        ("/\\evil.example/?pulse_deployment=gone", None),
        ("/a/\\..\\b?pulse_deployment=gone", None),
        ("http://evil.example/?pulse_deployment=gone", None),
    ],
)
def test_an_address_with_a_deployment_that_is_gone(
    two: int, url: str, location: str | None
) -> None:
    """A person who opens it gets the page of the active version; a redirect stays on this host."""
    answer = ask(two, url, "accept: text/html,*/*")
    expected = (302, location) if location else (409, None)
    assert (answer.status, answer.header("location")) == expected
    assert ask(two, url, "accept: text/html", "sec-fetch-mode: cors").status == 409
    form = ask(two, url, "accept: text/html", method="POST")
    assert form.status == 409
    assert b"Go back, copy what you entered" in form.body
    assert ask(two, url).status == 409


def test_stale_preflight_is_granted(two: int) -> None:
    answer = ask(
        two,
        "/?pulse_deployment=gone",
        "origin: https://app.example",
        "access-control-request-method: POST",
        "access-control-request-headers: x-a, x-b",
        method="OPTIONS",
    )
    assert answer.status == 204
    assert answer.header("access-control-allow-methods") == "POST"
    assert answer.header("access-control-allow-headers") == "x-a, x-b"
    plain = ask(two, "/?pulse_deployment=gone", method="OPTIONS")
    assert plain.status == 409


@pytest.mark.parametrize(
    ("location", "followed"),
    [
        ("/page?x=1", True),
        ("http://app.example/page", True),
        ("https://app.example/page", True),
        ("https://evil.example/", False),
        ("//evil.example/", False),
        ("/\\evil.example/", False),
        ("https://app.example@evil.example/", False),
        ("https:evil.example", False),
        ("javascript:alert(1)", False),
        ("https://app.example.evil.example/", False),
        ("\thttps://evil.example/", False),
    ],
)
def test_client_loader_is_redirected_on_this_host_only(
    two: int, location: str, followed: bool
) -> None:
    answer = ask(
        two,
        "/?pulse_deployment=gone",
        "x-pulse-client-loader: 1",
        f"x-pulse-client-loader-location: {location}",
    )
    if followed:
        assert (answer.status, answer.header("location")) == (302, location)
    else:
        assert answer.status in (302, 409)
        assert answer.status == 409 or "evil" not in str(answer.header("location"))


# -- moves: a tab of a draining deployment goes over with its user's next page


def loader(port: int, location: str | None, page: str | None, *more: str) -> Any:
    """Ask as Pulse's client loader does, from the open page `page`, for the page at `location`."""
    fields = ["x-pulse-client-loader: 1"]
    fields += [f"x-pulse-client-loader-location: {location}"] if location else []
    fields += [f"referer: {page}"] if page else []
    url = "/_pulse/prerender?pulse_deployment=a"
    return ask(port, url, *fields, *more, method="POST", body=b"{}")


def moving(
    redis_server: Redis, port: int, at: float, state: str = "draining", idle: float | None = None
) -> None:
    """Let the tabs of `a` move from a time on, and wait until the router knows."""
    stored = json.loads(str(redis_server.client.get("pulse:railway:deployment:a")))
    more = {name: stored[name] for name in ("address", "registered_at")}
    more |= {} if idle is None else {"move_idle": idle}
    redis_server.deployment("a", state=state, moving_at=at, **more)
    redis_server.deployment("z", more["address"], "pending")
    eventually(lambda: ask(port, "/?pulse_deployment=z").body == b"from a")


PAGES = [
    ("http://app.example/b", "http://app.example/a", True),
    ("http://app.example/b?x=1", "http://app.example/a?x=1", True),
    ("/b", "http://app.example/", True),
    # the open page, by a state in its query, and where it is not known
    ("http://app.example/a?x=2", "http://app.example/a?x=1", False),
    ("http://app.example/a/", "http://app.example/a", False),
    ("http://app.example/", "http://app.example", False),
    ("http://app.example/b", None, False),
    # 0.1.111 shows an error for anything but a redirect, and takes none to another host
    ("https://evil.example/b", "http://app.example/a", False),
    ("http://app.example/b", "https://evil.example/a", False),
    ("http://app.example/b", "http://[", False),
]


@pytest.mark.parametrize(("location", "page", "moves"), PAGES)
def test_a_tab_moves_over_when_its_user_goes_to_another_page(
    two: int, redis_server: Redis, location: str, page: str | None, moves: bool
) -> None:
    assert loader(two, location, page).body == b"from a"
    moving(redis_server, two, time.time() - 1)
    answer = loader(two, location, page)
    expected = (302, location) if moves else (200, None)
    assert (answer.status, answer.header("location")) == expected
    assert moves or answer.body == b"from a"


def test_all_else_of_a_moving_tab_stays_on_its_deployment(two: int, redis_server: Redis) -> None:
    moving(redis_server, two, 5)
    assert loader(two, "/b", "http://app.example/a").status == 302
    page = "referer: http://app.example/a"
    assert idle_tab(two, "idle=86400").body == b"from a"
    for fields in ([], ["accept: text/html"], ["x-pulse-client-loader: 0"]):
        for method, path in (("GET", "/b"), ("POST", "/_pulse/prerender"), ("GET", "/assets/x.js")):
            url = f"{path}?pulse_deployment=a"
            assert ask(two, url, page, *fields, method=method).body == b"from a"
    handshake = ["connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13"]
    handshake += ["sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="]
    url = "/socket.io/?pulse_deployment=a&pulse_reload_on_stale_affinity=1"
    assert ask(two, url, page, *handshake).body == b"from a"


def test_a_host_that_is_none_harms_no_moving_tab(two: int, redis_server: Redis) -> None:
    moving(redis_server, two, 5)
    answer = loader(two, "http://[/b", "http://[/a", "x-forwarded-host: [")
    assert answer.status == 400
    assert ask(two).body == b"from b"


def test_without_a_location_a_moving_tab_gets_the_stale_answer(
    two: int, redis_server: Redis
) -> None:
    moving(redis_server, two, 5)
    answer = loader(two, None, "http://app.example/a", "origin: http://app.example")
    assert (answer.status, answer.header("x-pulse-stale-affinity")) == (409, "1")
    assert answer.header("access-control-allow-origin") == "http://app.example"
    assert answer.header("access-control-allow-credentials") == "true"


def test_a_move_to_come_waits_for_its_time(two: int, redis_server: Redis) -> None:
    moving(redis_server, two, time.time() + 1.5)
    assert loader(two, "/b", "http://app.example/a").body == b"from a"
    eventually(lambda: loader(two, "/b", "http://app.example/a").status == 302)


@pytest.mark.parametrize("state", ["active", "pending", "resting"])
def test_only_a_draining_deployments_tabs_move(two: int, redis_server: Redis, state: str) -> None:
    """Whatever an earlier drain has left in the record."""
    moving(redis_server, two, 5, state)
    assert loader(two, "/b", "http://app.example/a").body == b"from a"


def idle_tab(port: int, query: str, name: str = "a") -> Any:
    """Ask as affinity.js does in a tab that nobody uses."""
    return ask(port, f"/_pulse/railway/move?{query}", f"x-pulse-deployment: {name}")


IDLE = [
    ("idle=61", True),
    ("idle=60", True),
    ("x=1&idle=999999999", True),
    ("idle=59", False),
    ("idle=", False),
    ("idle=-1", False),
    ("idle=1e9", False),
    ("idle=9999999999", False),
    ("idle=%36%31", False),
    ("", False),
]


def test_an_idle_tab_moves_over_after_its_time(two: int, redis_server: Redis) -> None:
    moving(redis_server, two, 5, idle=60)
    for query, moves in IDLE:
        answer = idle_tab(two, query)
        assert (answer.status, json.loads(answer.body)) == (200, {"move": moves}), query
        assert answer.header("cache-control") == "no-store"
        time.sleep(0.25 if moves else 0)  # one after the other


def test_idle_tabs_move_over_one_after_the_other(two: int, redis_server: Redis) -> None:
    """All at once would be more pages than the active deployment can render."""
    moving(redis_server, two, 5, idle=60)
    began = time.monotonic()
    answers = [json.loads(idle_tab(two, "idle=60").body)["move"] for _ in range(10)]
    assert answers[0] is True
    assert answers.count(True) <= 1 + (time.monotonic() - began) / 0.2
    eventually(lambda: json.loads(idle_tab(two, "idle=60").body)["move"])


def test_an_idle_tab_is_no_concern_of_a_router_before_its_time(
    two: int, redis_server: Redis
) -> None:
    """Its deployment answers, which says no."""
    assert idle_tab(two, "idle=60").body == b"from a"
    moving(redis_server, two, time.time() + 60, idle=60)
    assert idle_tab(two, "idle=60").body == b"from a"
    assert idle_tab(two, "idle=60", "b").body == b"from b"


def test_a_tab_moves_from_any_process_and_the_report_counts_it(
    redis_server: Redis, run_router: Run
) -> None:
    with Backend(ok(b"from a")) as a, Backend(ok(b"from b")) as b:
        instances = {"2": {"address": a.address}}
        more = {"registered_at": 1, "moving_at": 5, "move_idle": 60, "instances": instances}
        redis_server.deployment("a", a.address, "draining", **more)
        redis_server.deployment("b", b.address, "active", registered_at=2)
        port = run_router(redis_server).port
        eventually(lambda: ask(port).body == b"from b")
        fields = ["x-pulse-client-loader: 1", "x-pulse-client-loader-location: /b"]
        fields += ["referer: http://app.example/a", "x-pulse-deployment: a.2"]
        assert ask(port, "/_pulse/prerender", *fields, method="POST").status == 302
        assert loader(port, "/b", "http://app.example/a").status == 302
        assert json.loads(idle_tab(port, "idle=60", "a.2").body) == {"move": True}
        client = redis_server.client

        def reported() -> Any:
            keys = client.keys("pulse:railway:router:*")
            return [json.loads(str(client.get(key))) for key in keys]

        eventually(lambda: [r.get("moved") for r in reported()] == [{"a": 2}], 15)
        assert (reported()[0]["moved_idle"], reported()[0]["stale"]) == ({"a": 1}, 0)


def test_nobody_moves_while_the_active_deployment_cannot_be_connected_to(
    redis_server: Redis, run_router: Run
) -> None:
    """New visitors get the version before it then, which may be the tab's own."""
    with Backend(ok(b"from a")) as a, Backend(ok(b"from b")) as b:
        times = {"registered_at": 1, "promoted_at": 1, "moving_at": 5, "move_idle": 60}
        redis_server.deployment("a", a.address, "draining", **times)
        redis_server.deployment("b", b.address, "active", registered_at=2, promoted_at=2)
        port = run_router(redis_server).port
        eventually(lambda: ask(port).body == b"from b")
        b.stop()
        eventually(lambda: ask(port).body == b"from a")
        assert loader(port, "/b", "http://app.example/a").body == b"from a"
        assert idle_tab(port, "idle=60").body == b"from a"


def test_redirect_goes_by_the_host_that_the_edge_names(two: int) -> None:
    answer = ask(
        two,
        "/?pulse_deployment=gone",
        "x-forwarded-host: public.example",
        "x-pulse-client-loader: 1",
        "x-pulse-client-loader-location: https://public.example/x",
    )
    assert answer.status == 302


def test_an_empty_store_is_no_404(redis_server: Redis, run_router: Run) -> None:
    """Before the first deploy, or after all was lost: a router whose own deployment is older than
    the first promotion cannot tell. Before, everybody got 404, and tabs would have given up."""
    router = run_router(redis_server)
    eventually(lambda: ask(router.port, "/healthz").status == 200)
    for target in ("/", "/?pulse_deployment=alive"):
        answer = ask(router.port, target)
        assert (answer.status, answer.header("retry-after")) == (503, "1")
        assert answer.json == {"detail": "nothing is deployed, or the routing state is lost"}


def test_nothing_active_is_404(redis_server: Redis, run_router: Run) -> None:
    with Backend(ok(b"from p")) as p:
        redis_server.deployment("p", p.address, "pending")
        router = run_router(redis_server)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        for target in ("/", "/?pulse_deployment=gone"):
            answer = ask(router.port, target)
            assert (answer.status, answer.json) == (404, {"detail": "deployment not found"})
        assert ask(router.port, "/?pulse_deployment=p").body == b"from p"


def test_ids_that_are_not_ids_are_stale(two: int) -> None:
    for value in ("A", "%00", "a%0d%0aset-cookie:x", "../b", "a" * 25, "%C3%A9"):
        answer = ask(two, f"/?pulse_deployment={value}")
        assert answer.status == 409, value
        assert answer.header("set-cookie") is None


def test_health_is_503_until_the_first_load(run_router: Run) -> None:
    server = Redis()
    server.stop()
    router = run_router(server)
    assert ask(router.port, "/healthz").status == 503
    assert ask(router.port, "/").status == 503
    server.start()
    eventually(lambda: ask(router.port, "/healthz").status == 200)
    server.stop()
    time.sleep(0.5)
    assert ask(router.port, "/healthz").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/_pulse/internal",
        "/_pulse/internal/railway/sessions",
        "/_pulse/internal/railway/sessions?pulse_deployment=a",
        "/%5fpulse/internal/x",
        "/_pulse/%69nternal/x",
        "/_pulse%2finternal/x",
        "/_pulse%2Finternal%2Fx",
        "/%255fpulse/internal/x",
        "//_pulse/internal/x",
        "/_pulse//internal/x",
        "/./_pulse/internal/x",
        "/_pulse/./internal/x",
        "/a/../_pulse/internal/x",
        "/a/%2e%2e/_pulse/internal/x",
        "/_pulse/x/../internal/railway",
        "/_pulse\\internal\\x",
        "/_PULSE/Internal/x",
        "/_pulse;a=b/internal/x",
        "http://app.example/_pulse/internal/x",
    ],
)
def test_internal_paths_are_never_forwarded(two: int, path: str) -> None:
    assert ask(two, path).status == 404
    assert b"from" not in ask(two, path).body


def test_paths_that_only_look_internal_are_forwarded(two: int) -> None:
    for path in ("/_pulse/internals", "/_pulse/meta", "/x/_pulse/internal", "/_pulse/", "/%20"):
        assert ask(two, path).body == b"from b", path


# -- assets ------------------------------------------------------------------------------------


def test_an_old_tabs_asset_comes_from_the_newest_deployment_that_has_it(
    redis_server: Redis, run_router: Run
) -> None:
    missing = ok(b"no such asset", status="404 Not Found")
    with (
        Backend(ok(b"chunk of oldest")) as oldest,
        Backend(ok(b"chunk of older")) as older,
        Backend(missing) as active,
    ):
        redis_server.deployment("oldest", oldest.address, "draining", registered_at=1)
        redis_server.deployment("older", older.address, "draining", registered_at=2)
        redis_server.deployment("active", active.address, "active", registered_at=3)
        port = run_router(redis_server).port
        eventually(lambda: ask(port).status == 404)
        answer = ask(port, "/assets/chunk-1a2b.js")
        assert (answer.body, answer.header("x-pulse-selected-deployment")) == (
            b"chunk of older",
            "older",
        )
        assert ask(port, "/assets/x.js", method="HEAD").status == 200
        # not without the prefix, not with affinity, not for other methods
        assert ask(port, "/other.js").status == 404
        assert ask(port, "/assets/x.js?pulse_deployment=active").status == 404
        assert ask(port, "/assets/x.js", method="POST", body=b"x").status == 404
        # none has it: the active deployment's own answer
        older.answer = oldest.answer = missing
        answer = ask(port, "/assets/x.js")
        assert (answer.status, answer.body) == (404, b"no such asset")
        assert answer.header("x-pulse-selected-deployment") == "active"
        # one that is down is passed over
        older.stop()
        oldest.answer = ok(b"chunk of oldest")
        assert ask(port, "/assets/y.js").body == b"chunk of oldest"


def test_a_page_in_place_of_a_file_is_no_file(redis_server: Redis, run_router: Run) -> None:
    """An app with a catch-all route answers a page to everything."""
    page = ok(b"<p>home", "content-type: text/html; charset=utf-8")
    with Backend(ok(b"chunk")) as old, Backend(page) as active:
        redis_server.deployment("old", old.address, "draining", registered_at=1)
        redis_server.deployment("active", active.address, "active", registered_at=2)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").body == b"<p>home")
        assert ask(port, "/assets/x.js").body == b"chunk"
        assert ask(port, "/assets/help.html").body == b"<p>home"
        old.answer = page
        assert ask(port, "/assets/y.js").body == b"<p>home"


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"<p>home", "content-type: text/html", "cache-control: public, max-age=9"),
        ok(b"<p>gone", "content-type: text/html", "Cache-Control: s-maxage=9", status="404 Gone"),
        ok(b"", "cache-control: max-age=9\r\ncache-control: public", status="404 Not Found"),
        ok(b"", status="404 Not Found"),
    ],
    ids=["page", "page with 404", "two lines", "plain"],
)
def test_no_cache_keeps_that_an_asset_is_missing(
    redis_server: Redis, run_router: Run, answer: bytes
) -> None:
    """A version that is down, or not there yet, may have it."""
    with Backend(ok(b"up")) as active:
        redis_server.deployment("active", active.address)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").body == b"up")
        active.answer = answer
        for target in ("/assets/x.js", "/assets/x.js?pulse_deployment=active"):
            for method in ("GET", "HEAD"):
                head = ask(port, target, method=method).head
                assert headers(head, "cache-control") == ["no-store"]
        assert headers(ask(port, "/page").head, "cache-control") == (
            headers(answer, "cache-control")
        )
        assert headers(ask(port, "/assets/help.html").head, "cache-control") == (
            headers(answer, "cache-control") if b"200 OK" in answer else ["no-store"]
        )


def test_route_discovery_finds_its_build(redis_server: Redis, run_router: Run) -> None:
    """React Router asks for its own build's routes, without affinity; another build answers 204
    and a wish for a reload, which would end an old tab's life on its version."""
    reload = b"HTTP/1.1 204 No Content\r\nx-remix-reload-document: true\r\n\r\n"
    with Backend(ok(b"{}")) as old, Backend(reload) as active:
        redis_server.deployment("old", old.address, "draining", registered_at=1)
        redis_server.deployment("active", active.address, "active", registered_at=2)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 204)
        assert ask(port, "/__manifest?paths=%2Fa&version=1f").body == b"{}"
        assert ask(port, "/__manifest?version=1f&pulse_deployment=active").status == 204
        old.answer = reload
        answer = ask(port, "/__manifest?paths=%2Fa&version=2f")
        assert (answer.status, answer.header("x-remix-reload-document")) == (204, "true")


def test_a_frozen_deployment_does_not_hold_what_others_have(
    redis_server: Redis, run_router: Run
) -> None:
    """Before, one frozen draining backend held every missing asset for up to 900 s."""
    with (
        Backend(ok(b"chunk")) as old,
        Backend(handle=lambda c: time.sleep(60)) as frozen,
        Backend(ok(b"", status="404 Not Found")) as active,
    ):
        redis_server.deployment("old", old.address, "draining", registered_at=1)
        redis_server.deployment("frozen", frozen.address, "draining", registered_at=2)
        redis_server.deployment("active", active.address, "active", registered_at=3)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 404)
        took = []
        for name in ("a", "b", "c"):
            began = time.monotonic()
            assert ask(port, f"/assets/{name}.js").body == b"chunk"
            took.append(time.monotonic() - began)
        assert took[0] < 3
        assert max(took[1:]) < 1


def asset_stage(redis: Redis, run_router: Run, active: Backend, **old: Backend) -> int:
    for n, (name, backend) in enumerate(old.items()):
        redis.deployment(name, backend.address, "draining", registered_at=n)
    redis.deployment("active", active.address, "active", registered_at=9)
    port = run_router(redis, {"absent_seconds": 1.0, "readmission_seconds": 0.2}).port
    eventually(lambda: ask(port, "/").header("x-pulse-selected-deployment") == "active")
    return port


MISSING = ok(b"none", status="404 Not Found")


@pytest.mark.parametrize("answer", [ok(b"", status="500 Oops"), b"SSH-2.0\r\n", None])
def test_an_asset_while_the_active_deployment_is_down(
    redis_server: Redis, run_router: Run, answer: bytes | None
) -> None:
    """An old tab's chunk is asked for without affinity: 502, and React Router reloads the tab."""
    with Backend(ok(b"chunk")) as old, Backend(MISSING) as active:
        port = asset_stage(redis_server, run_router, active, old=old)
        if answer is None:
            active.stop()
        else:
            active.answer = answer
        assert ask(port, "/assets/a.js").body == b"chunk"
        assert ask(port, "/__manifest?version=1").body == b"chunk"
        old.answer = ok(b"", status="500 Oops")
        assert ask(port, "/assets/b.js").status in (500, 502)


def test_a_missing_asset_costs_one_request_each(redis_server: Redis, run_router: Run) -> None:
    """Ten deployments and 300 requests were 3,300 requests, each on a new connection."""
    with (
        Backend(MISSING) as a,
        Backend(MISSING) as b,
        Backend(MISSING) as c,
        Backend(MISSING) as active,
    ):
        port = asset_stage(redis_server, run_router, active, a=a, b=b, c=c)
        before = len(active.heads)
        for _ in range(30):
            assert ask(port, "/assets/gone.js").status == 404
        assert [len(old.heads) for old in (a, b, c)] == [1, 1, 1]
        assert len(active.heads) - before == 31
        for n in range(30):
            assert ask(port, f"/assets/{n}.js").status == 404
        assert max(old.connections for old in (a, b, c, active)) <= 2
        # it is known for a short time, and until the table changes
        b.answer = ok(b"chunk")
        eventually(lambda: ask(port, "/assets/gone.js").body == b"chunk", 3)
        b.answer = MISSING
        assert ask(port, "/assets/late.js").status == 404
        b.answer = ok(b"chunk")
        redis_server.deployment("c", c.address, "draining", registered_at=2, drain_started_at=5)
        eventually(lambda: ask(port, "/assets/late.js").body == b"chunk", 0.9)


def test_an_ejected_deployment_is_asked_before_a_404(redis_server: Redis, run_router: Run) -> None:
    """One slow or refused answer cost a deployment's own old tabs their chunks for 30 s."""
    with Backend(ok(b"chunk")) as old, Backend(MISSING) as active:
        port = asset_stage(redis_server, run_router, active, old=old)
        old.stop()
        assert ask(port, "/assets/a.js").status == 404
        old.start()
        eventually(lambda: ask(port, "/assets/a.js").body == b"chunk", 1)
        assert ask(port, "/assets/b.js").body == b"chunk"


def test_the_103_of_a_hedged_request_is_dropped(redis_server: Redis, run_router: Run) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    with Backend(early + MISSING) as a, Backend(ok(b"chunk")) as b, Backend(MISSING) as active:
        port = asset_stage(redis_server, run_router, active, b=b, a=a)
        with Connection.to(port) as client:
            client.send(b"GET /assets/a.js HTTP/1.1\r\nhost: x\r\n\r\n")
            assert client.head().startswith(b"HTTP/1.1 200")


def test_a_hanging_deployment_does_not_take_all_connections(
    redis_server: Redis, run_router: Run
) -> None:
    with (
        contextlib.ExitStack() as stack,
        Backend(handle=lambda c: time.sleep(60)) as hanging,
        Backend(ok(b"well")) as active,
    ):
        redis_server.deployment("old", hanging.address, "draining", registered_at=1)
        redis_server.deployment("active", active.address, "active", registered_at=9)
        port = run_router(redis_server, PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT="40").port
        eventually(lambda: ask(port, "/").body == b"well")
        for _ in range(20):
            c = stack.enter_context(Connection.to(port))
            c.send(b"GET /?pulse_deployment=old HTTP/1.1\r\nhost: x\r\n\r\n")
        eventually(lambda: hanging.connections == 20)
        answer = ask(port, "/?pulse_deployment=old")
        assert answer.json == {"detail": "the deployment has too many requests in progress"}
        assert answer.status == 503
        assert ask(port, "/").body == b"well"


def test_several_slow_deployments_are_asked_side_by_side(
    redis_server: Redis, run_router: Run
) -> None:
    """One after the other, three that are frozen would take 4.5 s."""
    with contextlib.ExitStack() as stack:
        active = stack.enter_context(Backend(ok(b"none", status="404 Not Found")))
        had = stack.enter_context(Backend(ok(b"chunk")))
        redis_server.deployment("had", had.address, "draining", registered_at=1)
        for n in (2, 3, 4):
            frozen = stack.enter_context(Backend(handle=lambda c: time.sleep(60)))
            redis_server.deployment(f"frozen{n}", frozen.address, "draining", registered_at=n)
        redis_server.deployment("active", active.address, "active", registered_at=9)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 404)
        began = time.monotonic()
        assert ask(port, "/assets/a.js").body == b"chunk"
        assert time.monotonic() - began < 1.4


def test_only_the_first_of_two_that_have_an_asset_answers(
    redis_server: Redis, run_router: Run
) -> None:
    """The slower one's answer comes while the other's is on its way, and goes nowhere."""
    body = b"y" * 300_000

    def late(connection: Connection) -> None:
        connection.head()
        time.sleep(0.8)
        connection.send(ok(b"late"))

    def slow(connection: Connection) -> None:
        connection.head()
        time.sleep(0.3)
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 300000\r\n\r\n" + body[:1000])
        time.sleep(0.6)
        connection.send(body[1000:])

    with (
        Backend(ok(b"none", status="404 Not Found")) as active,
        Backend(handle=late) as first,
        Backend(handle=slow) as second,
    ):
        redis_server.deployment("first", first.address, "draining", registered_at=2)
        redis_server.deployment("second", second.address, "draining", registered_at=1)
        redis_server.deployment("active", active.address, "active", registered_at=9)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 404)
        with Connection.to(port) as client:
            for _ in range(2):
                client.send(b"GET /assets/a.js HTTP/1.1\r\nhost: x\r\n\r\n")
                head = client.head()
                assert b"x-pulse-selected-deployment: second" in head
                assert client.read(300_000) == body


def test_who_had_an_asset_is_asked_first(redis_server: Redis, run_router: Run) -> None:
    missing = ok(b"", status="404 Not Found")
    with Backend(ok(b"chunk")) as old, Backend(missing) as newer, Backend(missing) as active:
        redis_server.deployment("old", old.address, "draining", registered_at=1)
        redis_server.deployment("newer", newer.address, "draining", registered_at=2)
        redis_server.deployment("active", active.address, "active", registered_at=3)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 404)
        for _ in range(5):
            assert ask(port, "/assets/a.js").body == b"chunk"
        assert len(newer.heads) == 1


def test_an_asset_of_the_version_that_is_promoted_meanwhile(
    redis_server: Redis, run_router: Run
) -> None:
    """Those other than the one that was asked: not those other than the active one now."""
    with Backend(ok(b"chunk of new")) as new, Backend() as old:

        def slow(c: Connection) -> None:
            while c.head():
                time.sleep(1)
                c.send(ok(b"", status="404 Not Found"))

        old.handler = slow
        redis_server.deployment("new", new.address, "pending", registered_at=2)
        redis_server.deployment("old", old.address, "active", registered_at=1)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 404)
        timer = threading.Timer(0.3, redis_server.deployment, ("new", new.address))
        timer.start()
        assert ask(port, "/assets/new.js").body == b"chunk of new"
        timer.join()


def test_a_deployment_that_is_being_removed_is_stale(two: int, redis_server: Redis) -> None:
    """Its tabs reload at once, and do not meet a 502 when its service has gone."""
    assert ask(two, "/?pulse_deployment=a").body == b"from a"
    redis_server.deployment("a", "http://127.0.0.1:9", "draining", retiring_at=time.time())
    eventually(lambda: ask(two, "/?pulse_deployment=a").status == 409)


def test_what_is_under_way_is_counted(redis_server: Redis, run_router: Run) -> None:
    """For the janitor: a download needs no tab to be in use."""
    go_on = threading.Event()

    def slow(c: Connection) -> None:
        while c.head():
            c.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab")
            go_on.wait(20)
            c.send(b"cd")

    def in_flight() -> dict[str, int]:
        client = redis_server.client
        dumps = [client.get(key) for key in client.scan_iter("pulse:railway:router:*")]
        return json.loads(str(dumps[0]))["in_flight"] if dumps else {}

    with Backend(handle=slow) as old, Backend() as active:
        redis_server.deployment("old", old.address, "draining")
        redis_server.deployment("active", active.address)
        port = run_router(redis_server, {"report_seconds": 0.5}).port
        eventually(lambda: ask(port).status == 200)
        thread = threading.Thread(target=ask, args=(port, "/big?pulse_deployment=old"))
        thread.start()
        eventually(lambda: in_flight() == {"old": 1}, 10)
        go_on.set()
        thread.join()
        eventually(lambda: in_flight() == {}, 10)


# -- names -------------------------------------------------------------------------------------


def test_one_bad_name_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, 40 requests to a name that took 20 s to resolve were a 504 for all."""
    asked: collections.Counter[str] = collections.Counter()

    def resolve(host: str, port: int, **_: Any) -> Any:
        asked[host] += 1
        if host == "bad":
            time.sleep(1)
            raise OSError("no such name")
        return [at("127.0.0.1", port)]

    monkeypatch.setattr(router.socket, "getaddrinfo", resolve)

    async def story() -> None:
        names = router.Resolver()
        bad = [asyncio.create_task(names.addresses("bad", 1)) for _ in range(200)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        for _ in range(50):
            assert (await names.addresses("good", 1))[0][0][4] == ("127.0.0.1", 1)
        assert time.monotonic() - began < 0.5
        answers = await asyncio.gather(*bad, return_exceptions=True)
        assert {type(a) for a in answers} == {OSError}
        assert asked == {"bad": 1, "good": 1}
        names.known.clear()
        await names.addresses("good", 1)
        assert asked["good"] == 2
        assert not names.asking

    asyncio.run(story())


# -- the table follows the state ---------------------------------------------------------------


def test_a_record_that_is_announced_during_a_read_is_in_the_next(redis_server: Redis) -> None:
    store, table = router.RedisStore(redis_server.url, "pulse:railway"), router.Table({})

    async def story() -> set[str]:
        client = aioredis.Redis.from_url(store.url, **store.options)
        follower = router.Follower(store, client, table)

        async def repair(*_: Any) -> bool:
            follower.keys.add("announced")  # as `listen` does
            return False

        table.repair = repair
        async with client:
            await follower.read()
        return set(follower.keys)

    assert asyncio.run(story()) == {"announced"}


def test_a_promotion_is_seen_within_100_ms(redis_server: Redis, run_router: Run) -> None:
    with Backend(ok(b"a")) as a, Backend(ok(b"b")) as b:
        redis_server.deployment("a", a.address)
        routers = [run_router(redis_server) for _ in range(3)]
        eventually(lambda: all(ask(router.port).body == b"a" for router in routers))
        time.sleep(0.3)  # subscribed
        redis_server.deployment("b", b.address, "pending")
        time.sleep(0.2)
        began = time.monotonic()
        redis_server.client.set("pulse:railway:active", "b")
        redis_server.client.publish("pulse:railway:events", "b")
        eventually(lambda: all(ask(router.port).body == b"b" for router in routers))
        assert time.monotonic() - began < 0.1 + 0.05 * len(routers)


def test_an_unannounced_promotion_is_seen_within_the_interval(
    redis_server: Redis, run_router: Run
) -> None:
    with Backend(ok(b"a")) as a, Backend(ok(b"b")) as b:
        redis_server.deployment("a", a.address)
        redis_server.deployment("b", b.address, "pending")
        port = run_router(redis_server, {"refresh_seconds": 1.0}).port
        eventually(lambda: ask(port).body == b"a")
        redis_server.client.set("pulse:railway:active", "b")  # as 0.3.x does
        eventually(lambda: ask(port).body == b"b", seconds=2)


def test_an_unknown_id_triggers_one_refresh_and_a_flood_no_storm(
    redis_server: Redis, run_router: Run
) -> None:
    with Backend(ok(b"a")) as a, Backend(ok(b"new")) as new:
        redis_server.deployment("a", a.address)
        port = run_router(redis_server).port
        eventually(lambda: ask(port).body == b"a")
        time.sleep(1.1)
        record = {
            "deployment_id": "new",
            "state": "pending",
            "service_name": "new",
            "address": new.address,
        }
        redis_server.client.set("pulse:railway:deployment:new", json.dumps(record))
        began = time.monotonic()
        assert ask(port, "/?pulse_deployment=new").body == b"new"
        assert time.monotonic() - began < 1
        before = redis_server.client.info("stats")["total_commands_processed"]
        for i in range(300):
            assert ask(port, f"/?pulse_deployment=flood-{i}").status == 409
        after = redis_server.client.info("stats")["total_commands_processed"]
        assert after - before < 60


async def going_through(server: Redis) -> float:
    """CPU seconds that it takes a client to go through all keys, on this machine now."""
    client = aioredis.Redis.from_url(server.url, decode_responses=True)
    before = time.process_time()
    async for _ in client.scan_iter("pulse:railway:deployment:*", count=1000):
        pass
    used = time.process_time() - before
    await client.aclose()
    return used


def test_many_sessions_in_the_same_redis_cost_little(redis_server: Redis, run_router: Run) -> None:
    """RailwaySessionStore shares the stack's Redis: going through all keys is for now and then."""
    fill = "for i = 1, 50000 do redis.call('SET', 'pulse:session:' .. ARGV[1] .. i, '{}') end"
    for part in range(10):  # a script of half a million takes longer than a client waits
        redis_server.client.eval(fill, 0, part)
    with Backend(ok(b"a")) as a, Backend(ok(b"b")) as b, Backend(ok(b"c")) as c:
        redis_server.deployment("a", a.address)
        router = run_router(redis_server, {"refresh_seconds": 3.0})
        eventually(lambda: ask(router.port).body == b"a")
        time.sleep(1)
        before = router.cpu
        time.sleep(7)  # twice the interval
        used = router.cpu - before
        assert used < 1.5 * asyncio.run(going_through(redis_server))  # each time would be twice
        # what nobody announced is found all the same
        record = {"state": "active", "service_name": "b", "address": b.address}
        redis_server.client.set("pulse:railway:deployment:b", json.dumps(record))
        redis_server.client.set("pulse:railway:active", "b")
        eventually(lambda: ask(router.port).body == b"b", seconds=12)  # 3 s on a quiet machine
        record["address"] = c.address
        redis_server.client.set("pulse:railway:deployment:c", json.dumps(record))
        assert ask(router.port, "/?pulse_deployment=c").body == b"c"


def test_a_record_without_an_address_is_on_the_private_network(
    redis_server: Redis, run_router: Run
) -> None:
    redis_server.deployment("old", None, service_name="old-service")
    port = run_router(redis_server).port
    eventually(lambda: ask(port).status in (502, 504))
    assert ask(port).status == 502  # that name does not resolve here


def test_broken_records_are_passed_over(redis_server: Redis, run_router: Run) -> None:
    with Backend() as a:
        redis_server.client.set("pulse:railway:deployment:junk", "{not json")
        redis_server.client.set("pulse:railway:deployment:list", "[1]")
        redis_server.client.set(
            "pulse:railway:deployment:bad", json.dumps({"address": "http://:x"})
        )
        redis_server.deployment("a", a.address)
        port = run_router(redis_server).port
        eventually(lambda: ask(port).status == 200)
        assert ask(port, "/?pulse_deployment=bad").status == 409


@contextlib.contextmanager
def deaf(port: int = 0) -> Iterator[tuple[str, int]]:
    """An address that takes no connection and refuses none: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.3", port), backlog=0))
        address: tuple[str, int] = listener.getsockname()
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        yield address


def at(host: str, port: int) -> tuple[Any, ...]:
    """As getaddrinfo says it."""
    return socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)


def connected(
    monkeypatch: pytest.MonkeyPatch, port: int, hosts: list[str], known: Any = None
) -> str:
    """Where `connect` ends, for a name that has these addresses, or had them a moment ago."""

    def resolve(_: str, port: int, **__: Any) -> Any:
        return [at(host, port) for host in hosts]

    monkeypatch.setattr(router.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(router, "RESOLVER", router.Resolver())
    if known:
        router.RESOLVER.known["name", port] = time.monotonic() + 60, known
    deployment = SimpleNamespace(host="name", port=port, idle=[])

    async def story() -> str:
        try:
            upstream = await router.connect(deployment, 0.6)
        except router.UpstreamError as error:
            return str(error.kind)
        peer = upstream.transport.get_extra_info("peername")[0]
        upstream.transport.abort()
        return str(peer)

    return asyncio.run(story())


def test_where_a_name_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    with Backend() as backend:
        port = backend.port
        go = partial(connected, monkeypatch, port)
        assert go(["127.0.0.1"]) == "127.0.0.1"
        assert go(["127.0.0.2", "127.0.0.1"]) == "127.0.0.1"  # one of them refuses
        assert go(["127.0.0.2"]) == "refused"
        # it has moved since it was asked for, as a service does that starts anew
        assert go(["127.0.0.1"], known=[at("127.0.0.2", port)]) == "127.0.0.1"
        assert go(["127.0.0.2"], known=[at("127.0.0.2", port)]) == "refused"
        with deaf(port) as (host, _):
            assert go([host]) == "connect_timeout"
            assert go([host, "127.0.0.1"]) == "127.0.0.1"  # after 250 ms (RFC 8305)
            assert go([host, "127.0.0.2"]) == "connect_timeout"


def test_the_state_can_live_in_sqlite(run_router: Run, tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "state.db"
    with Backend(ok(b"a")) as a:
        router = run_router(None, PULSE_KV_KIND="sqlite", PULSE_KV_PATH=str(path))
        assert ask(router.port).status in (404, 503)
        db = sqlite3.connect(path)
        record = {"deployment_id": "a", "state": "active", "address": a.address}
        rows = [("pulse:railway:active", "a"), ("pulse:railway:deployment:a", json.dumps(record))]
        db.executemany("INSERT INTO pulse_kv (key, value) VALUES (?, ?)", rows)
        db.commit()
        eventually(lambda: ask(router.port).body == b"a")


def test_a_repair_does_not_wait_for_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, 120 silent deployments whose records were gone delayed it by 98 s: all of them were
    looked at in the threads that it needs."""
    over, looked_at = threading.Event(), []
    monkeypatch.setattr(router, "look", lambda record, _: looked_at.append(record) or over.wait(10))
    table = router.Table({})
    table.missing = {f"d{n}": router.Missing(0.0) for n in range(120)}

    async def play() -> None:
        looks = asyncio.create_task(table.look_at([router.Record(name) for name in table.missing]))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)  # as `repair` does
        assert time.monotonic() - began < 1
        over.set()
        await looks

    asyncio.run(play())
    assert len(looked_at) == 120
