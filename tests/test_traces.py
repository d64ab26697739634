"""The router's part of a trace: read by OTLP's own messages."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan

import control
import router
import telemetry
import tracing
from pulse_railway.local.supervisor import free_port
from tests.conftest import Process, Redis
from tests.net import Answer, Backend, Collector, Connection, ask, eventually, header, ok

Run = Callable[..., Process]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"traceparent: 00-{TRACE}-{PARENT}-01"
RAILWAY = {  # what a traced service gets from Railway
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20s3cret",
    "OTEL_SERVICE_NAME": "pulse-router",
    "OTEL_SERVICE_VERSION": "1",
}


def named(name: str) -> Callable[[Connection], None]:
    """A backend whose body is the `traceparent` that it was sent; `old` alone has assets."""

    def handle(connection: Connection) -> None:
        while head := connection.head():
            if b"upgrade: websocket" in head.lower():
                connection.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n")
                connection.send(b"upgrade: websocket\r\n\r\n")
                connection.rest()
                return
            lacks = b"/assets/" in head and name != "old"
            body = (header(head, "traceparent") or "").encode("latin-1")
            connection.send(ok(body, status="404 Not Found" if lacks else "200 OK"))

    return handle


class Stage:
    def __init__(self, redis: Redis, run_router: Run) -> None:
        self.redis, self.run_router, self.collector = redis, run_router, Collector()
        self.router: Process

    def start(self, **env: str) -> None:
        given = {**RAILWAY, "OTEL_EXPORTER_OTLP_ENDPOINT": self.collector.url, **env}
        self.router = self.run_router(self.redis, **given)
        eventually(lambda: ask(self.router.port).status == 200)

    def ask(self, target: str, *lines: str, **options: Any) -> Answer:
        return ask(self.router.port, target, *lines, **options)

    def spans(self) -> list[Any]:
        """All spans so far."""
        found = []
        for path, sent, body in self.collector.taken:
            assert path == "/v1/traces"
            assert sent["content-type"] == "application/x-protobuf"
            assert sent["authorization"] == "Bearer s3cret"
            (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
            about = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert about["service.name"] == "pulse-router"
            (scope,) = resource.scope_spans
            found += scope.spans
        return found

    def chosen(self) -> list[tuple[str, str, str, int]]:
        """What each span says: path, deployment, what has chosen it, status."""
        found = []
        for span in self.spans():
            values = {a.key: a.value for a in span.attributes}
            texts = [
                values[key].string_value if key in values else ""
                for key in ("url.path", "pulse.deployment", "pulse.chosen_by")
            ]
            status = values["http.response.status_code"].int_value
            found.append((texts[0], texts[1], texts[2], status))
        return found


@pytest.fixture
def stage(redis_server: Redis, run_router: Run) -> Iterator[Stage]:
    with Backend(handle=named("new")) as new, Backend(handle=named("old")) as old:
        redis_server.deployment("old", old.address, "draining", registered_at=1, promoted_at=1.5)
        redis_server.deployment("new", new.address, registered_at=2, promoted_at=2.5)
        redis_server.deployment("gone", f"http://127.0.0.1:{free_port()}", "draining")
        stage = Stage(redis_server, run_router)
        stage.new, stage.old = new, old  # type: ignore[attr-defined]
        yield stage
        stage.collector.server.shutdown()


def test_a_sampled_request_has_a_span_which_is_the_backends_parent(stage: Stage) -> None:
    stage.start()
    answer = stage.ask(
        "/page?key=secret", "TraceParent: " + SAMPLED[13:], "tracestate: a=b", "x: y"
    )
    match = re.fullmatch(rf"00-{TRACE}-([0-9a-f]{{16}})-01", answer.body.decode())
    assert match
    assert match[1] != PARENT
    eventually(lambda: len(stage.spans()) == 1)
    (span,) = stage.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.span_id.hex(), span.trace_state, span.kind) == (match[1], "a=b", 2)
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 5e9
    assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 10
    values = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
    assert values == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "url.path": "/page",
        "url.scheme": "http",
        "server.address": "app.example",
        "pulse.deployment": "new",
        "pulse.chosen_by": "active",
    }
    assert span.name == "GET"


@pytest.mark.parametrize(
    "line",
    [
        "x: no traceparent",
        f"traceparent: 00-{TRACE}-{PARENT}-00",
        f"traceparent: 00-{TRACE}-{PARENT}-01-more",
        f"traceparent: ff-{TRACE}-{PARENT}-01",
        f"traceparent: 00-{'0' * 32}-{PARENT}-01",
        f"traceparent: 00-{TRACE}-{'0' * 16}-01",
        f"traceparent: 00-{TRACE.upper()}-{PARENT}-01",
        "traceparent: é",
        f"{SAMPLED}\r\n{SAMPLED}",
    ],
)
def test_other_requests_go_on_as_they_are(stage: Stage, line: str) -> None:
    stage.start()
    answer = stage.ask("/", line)
    sent = line.partition("\r\n")[0].partition(": ")[2] if "traceparent: " in line else ""
    assert answer.body.decode("latin-1") in (sent, sent.encode().decode("latin-1"))
    stage.ask("/last", f"traceparent: 01-{TRACE}-{PARENT}-09-later")  # a later version's
    eventually(lambda: bool(stage.spans()))
    assert [chosen[0] for chosen in stage.chosen()] == ["/last"]


def test_the_values_of_a_span_are_cut(stage: Stage) -> None:
    """A span waits in memory, with up to 1,999 others, and a head has up to 64 KB."""
    stage.start()
    long = {"host": "h" * 1500, "x-forwarded-proto": "é" * 5000, "tracestate": "a=" + "b" * 5000}
    lines = "".join(f"{name}: {value}\r\n" for name, value in long.items())
    with Connection.to(stage.router.port) as c:
        head = f"GET /{'p' * 5000} HTTP/1.1\r\n{lines}{SAMPLED}\r\n\r\n"
        c.send(head.encode())
        assert b" 200 " in c.head()
    eventually(lambda: len(stage.spans()) == 1)
    (span,) = stage.spans()
    values = {a.key: a.value.string_value.encode() for a in span.attributes}
    assert values["url.path"] == b"/" + b"p" * 999
    assert values["server.address"] == b"h" * 1000
    assert max(map(len, values.values())) == 1000
    assert span.trace_state == ""  # a part of it could say something else
    assert span.ByteSize() < 5000


def test_a_span_says_which_deployment_was_chosen_and_by_what(stage: Stage) -> None:
    stage.start()
    stage.ask("/1?pulse_deployment=old", SAMPLED)
    stage.ask("/2?pulse_deployment=", SAMPLED, "x-pulse-deployment: old")
    stage.ask("/3", SAMPLED)
    stage.ask("/assets/4.js", SAMPLED)
    stage.ask("/5?pulse_deployment=gone", SAMPLED)
    stage.ask("/6?pulse_deployment=unknown", SAMPLED)
    with Connection.to(stage.router.port) as tab:
        tab.send(
            b"GET /7 HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
            + SAMPLED.encode()
            + b"\r\n\r\n"
        )
        assert b" 101 " in tab.head()
    stage.new.stop()  # type: ignore[attr-defined]
    stage.ask("/8", SAMPLED)
    stage.ask("/9", SAMPLED)
    eventually(lambda: len(stage.spans()) == 9)
    assert stage.chosen() == [
        ("/1", "old", "query", 200),
        ("/2", "old", "header", 200),
        ("/3", "new", "active", 200),
        ("/assets/4.js", "old", "asset", 200),
        ("/5", "gone", "query", 502),
        ("/6", "", "", 409),
        ("/7", "new", "active", 101),
        ("/8", "old", "fallback", 200),
        ("/9", "old", "fallback", 200),
    ]
    assert [span.status.code for span in stage.spans()] == [0, 0, 0, 0, 2, 0, 0, 0, 0]


def test_a_canary_is_told_from_a_visitor_who_comes_back(stage: Stage) -> None:
    with Backend(handle=named("canary")) as canary:
        fields = {"weight": 100, "registered_at": 3}
        stage.redis.deployment("canary", canary.address, "pending", **fields)
        stage.redis.client.set("pulse:railway:active", "new")
        stage.start()
        eventually(lambda: stage.ask("/").header("x-pulse-selected-deployment") == "canary")
        stage.ask("/1", SAMPLED)
        stage.ask("/2", SAMPLED, f"cookie: a=b; {router.VISITOR_COOKIE}={'0' * 16}")
        eventually(lambda: len(stage.spans()) == 2)
        assert [c[1:3] for c in stage.chosen()] == [("canary", "canary"), ("canary", "cookie")]


def test_a_receiver_that_fails_gets_the_spans_later(stage: Stage) -> None:
    stage.start()
    stage.collector.status = 503
    stage.ask("/kept", SAMPLED)
    eventually(lambda: "traces cannot be pushed (503)" in stage.router.output())
    stage.collector.taken.clear()
    stage.collector.status = 200
    eventually(lambda: bool(stage.spans()))
    assert [c[0] for c in stage.chosen()] == ["/kept"]
    # a refusal is final, and a redirect is not followed: the headers have a secret
    with_secret = Collector()
    stage.collector.taken.clear()
    stage.collector.status, stage.collector.location = 302, with_secret.url
    stage.ask("/refused", SAMPLED)
    eventually(lambda: "traces cannot be pushed (302)" in stage.router.output())
    stage.collector.status = 200
    stage.collector.taken.clear()
    stage.ask("/next", SAMPLED)
    eventually(lambda: bool(stage.spans()))
    assert [c[0] for c in stage.chosen()] == ["/next"]
    assert not with_secret.taken
    with_secret.server.shutdown()
    assert "s3cret" not in stage.router.output()
    # what is left is pushed at the end
    stage.ask("/last", SAMPLED)
    assert stage.router.stop() == 0
    assert [c[0] for c in stage.chosen()] == ["/next", "/last"]


def test_no_more_is_kept_than_the_receiver_takes() -> None:
    tracer = tracing.Tracer(telemetry.Receiver("traces", "http://127.0.0.1:9", {}))
    for _ in range(tracing.SPANS + 5):
        tracer.add(OtlpSpan())
    assert (len(tracer.ended), tracer.dropped) == (tracing.SPANS, 5)
    for _ in range(3):
        tracer.room = tracing.SPANS
        for _ in range(tracing.SPANS):
            tracer.add(OtlpSpan())
    assert len(tracer.ended) == tracing.KEPT


BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("env", "target"),
    [
        ({}, None),
        ({BASE: "http://c:4318"}, "http://c:4318/v1/traces"),
        ({BASE: "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({BASE: "http://c:4318", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c/m"}, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://c/mine"}, "https://c/mine"),
    ],
)
def test_traces_are_pushed_where_railway_or_a_variable_says(
    env: dict[str, str], target: Any
) -> None:
    found = telemetry.otlp_receiver("traces", env)
    assert (found and found.endpoint) == target


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "must be http/protobuf"),
        ({BASE: "collector:4317"}, "no traces are pushed: OTLP's endpoint takes an address"),
    ],
)
def test_a_bad_setting_is_one_line_and_the_router_serves(
    stage: Stage, env: dict[str, str], says: str
) -> None:
    stage.start(**env)
    said = stage.router.output()
    assert (said.count("\n"), says in said) == (1, True), said
    assert stage.ask("/", SAMPLED).body.decode() == SAMPLED[13:]  # as it came


def test_what_has_chosen_is_noted_when_it_chooses(stage: Stage) -> None:
    """A version that was promoted in the middle of a request was an `asset` then."""

    def slow(connection: Connection) -> None:
        while connection.head():
            time.sleep(0.6)
            connection.send(ok(b"slow"))

    with Backend(handle=slow) as before:
        stage.redis.deployment("before", before.address, registered_at=3, promoted_at=3.5)
        stage.start()
        with Connection.to(stage.router.port) as c:
            c.send(b"GET /1 HTTP/1.1\r\nhost: x\r\n" + SAMPLED.encode() + b"\r\n\r\n")
            time.sleep(0.2)
            store = router.RedisStore(stage.redis.url, "pulse:railway")
            store.apply(lambda routing: control.set_active(routing, "new", "new", []))
            assert b" 200 " in c.head()
        eventually(lambda: bool(stage.spans()))
        assert stage.chosen() == [("/1", "before", "active", 200)]
