"""What the router exports and logs: read by Prometheus' own parser and OTLP's own messages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import promql_parser
import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from prometheus_client.parser import text_string_to_metric_families

import control
import telemetry
from pulse_railway.local.supervisor import free_port
from router import RedisStore
from tests.conftest import ROOT, Process, Redis
from tests.net import Backend, Collector, Connection, ask, eventually, header, listens, ok

Run = Callable[..., Process]
DURATION = "http_server_request_duration_seconds"


class Scrape:
    """The samples of one scrape, checked as they are read."""

    def __init__(self, port: int) -> None:
        answer = ask(port, "/metrics")
        assert answer.status == 200, answer.head
        assert answer.header("content-type") == "text/plain; version=0.0.4; charset=utf-8"
        families = list(text_string_to_metric_families(answer.body.decode()))
        assert len({f.name for f in families}) == len(families)
        self.types = {f.name: f.type for f in families}
        self.samples = [s for f in families for s in f.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels."""
        return sum(
            s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()
        )


def session_answers(connection: Connection) -> None:
    """A backend with three render sessions, a missing page, a download that never ends, and a
    page that breaks off."""
    while head := connection.head():
        path = head.split(b" ")[1]
        connection.read(int(header(head, "content-length") or 0))
        if path == b"/_pulse/internal/railway/sessions":
            assert header(head, "x-pulse-railway-internal-token") == "let-me-in"
            body = b'{"render_session_count": 3}'
            connection.send(ok(body))
        elif path.startswith(b"/missing"):
            connection.send(ok(b"no", status="404 Not Found"))
        elif path.startswith(b"/broken"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nten bytes.")
            return
        elif path.startswith(b"/mute"):
            return
        elif path.startswith(b"/endless"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nten bytes.")
            connection.rest()
            return
        elif b"upgrade: websocket" in head.lower():
            connection.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n")
            connection.send(b"upgrade: websocket\r\n\r\n")
            connection.rest()
            return
        else:
            if path.startswith(b"/slow"):
                time.sleep(0.06)
            connection.send(ok(b"a"))


@pytest.fixture
def stage(redis_server: Redis, run_router: Run) -> Iterator[Callable[..., tuple[Process, int]]]:
    """`stage(NAME=value)`: a router with a metrics port in front of `a` (active), `gone` (which
    refuses connections) and `old` (draining)."""
    with Backend(handle=session_answers) as a, Backend(handle=session_answers) as old:
        redis_server.deployment("old", old.address, "draining")
        redis_server.deployment("gone", f"http://127.0.0.1:{free_port()}", "draining")
        redis_server.deployment("a", a.address)

        def begin(**env: str) -> tuple[Process, int]:
            port = free_port()
            given = {"PULSE_RAILWAY_METRICS_PORT": str(port), **env}
            given["PULSE_RAILWAY_INTERNAL_TOKEN"] = "let-me-in"
            router = run_router(redis_server, **given)
            eventually(lambda: ask(router.port, "/healthz").status == 200)
            return router, port

        yield begin


def test_every_number_is_there(stage: Callable[..., tuple[Process, int]]) -> None:
    router, port = stage()
    for target in ("/", "/", "/slow", "/missing", "/?pulse_deployment=old"):
        ask(router.port, target)
    ask(router.port, "/", method="POST", body=b"x")
    ask(router.port, "/", method="PROPFIND")  # none of those that are counted apart
    assert ask(router.port, "/?pulse_deployment=never").status == 409
    assert ask(router.port, "/?pulse_deployment=gone").status == 502
    assert ask(router.port, "/mute").status == 502
    ask(router.port, "/broken")
    with Connection.to(router.port) as tab:
        tab.send(
            b"GET /socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
        )
        assert b" 101 " in tab.head()
        seen = Scrape(port)
    count, a = f"{DURATION}_count", {"deployment": "a"}
    assert seen.value(count, **a, http_request_method="GET", status_class="2xx") == 4  # one broke
    assert seen.value(count, **a, http_request_method="GET", status_class="4xx") == 1
    assert seen.value(count, **a, http_request_method="GET", status_class="5xx") == 1  # /mute
    assert seen.value(count, **a, http_request_method="POST", status_class="2xx") == 1
    assert seen.value(count, **a, http_request_method="_OTHER", status_class="2xx") == 1
    assert seen.value(count, deployment="old") == 1
    assert seen.value(count, deployment="gone", status_class="5xx") == 1
    assert seen.value(count, deployment="-", status_class="4xx") == 1
    errors = "pulse_router_upstream_errors_total"
    assert seen.value(errors, deployment="gone", error_type="refused") == 1
    assert seen.value(errors, **a, error_type="lost") == 1
    assert seen.value(errors, **a, error_type="broken_off") == 1
    assert seen.value(errors) == 3
    assert seen.value("pulse_router_stale_total") == 1
    assert seen.value("pulse_router_websockets", **a) == 1
    assert seen.value("pulse_router_websockets_opened_total", **a) == 1
    assert seen.value("pulse_router_deployments", state="draining") == 2
    assert seen.value("pulse_router_deployments", state="active") == 1
    assert seen.value("pulse_router_sessions", deployment="a") == 3
    assert seen.value("pulse_router_sessions", deployment="old") == 3
    assert 0 <= seen.value("pulse_router_table_age_seconds") < 10
    assert 1e7 < seen.value("process_memory_usage_bytes") < 3e8
    assert seen.value("process_open_file_descriptor_count") > 5
    # one took more than 50 ms, and the buckets are cumulative
    slow = {**a, "http_request_method": "GET", "status_class": "2xx"}
    assert seen.value(f"{DURATION}_bucket", **slow, le="0.05") <= 3
    assert seen.value(f"{DURATION}_bucket", **slow, le="+Inf") == 4
    assert 0.06 <= seen.value(f"{DURATION}_sum", **slow) < 2
    assert seen.value("pulse_router_first_byte_duration_seconds_count", **a) == 7
    eventually(lambda: Scrape(port).value("pulse_router_websockets", **a) == 0)


def test_a_removed_deployment_has_no_numbers(
    stage: Callable[..., tuple[Process, int]], redis_server: Redis
) -> None:
    router, port = stage()
    ask(router.port, "/?pulse_deployment=old")
    assert Scrape(port).value(f"{DURATION}_count", deployment="old") == 1
    store = RedisStore(redis_server.url, "pulse:railway")
    store.apply(lambda routing: control.delete_record(routing, "old"))
    eventually(lambda: not any(s.labels.get("deployment") == "old" for s in Scrape(port).samples))


def test_only_the_private_network_gets_them(stage: Callable[..., tuple[Process, int]]) -> None:
    """Railway's edge marks what it passes on; on the public port the path is the app's."""
    router, port = stage()
    assert ask(port, "/metrics", "X-Railway-Request-Id: abc").status == 404
    assert ask(port, "/").status == 404
    assert ask(port, "/metrics", method="POST", body=b"x").status == 405
    assert ask(port, "/metrics", method="HEAD").status == 200
    assert ask(router.port, "/metrics").body == b"a"
    with Connection.to(port) as connection:  # what the other port refuses, this one does
        connection.send(b"GET /metrics HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n")
        assert b" 400 " in connection.head()


def test_they_are_off_by_default(redis_server: Redis, run_router: Run) -> None:
    router = run_router(redis_server)
    eventually(lambda: ask(router.port, "/healthz").status in (200, 404, 503))
    listed = subprocess.run(["ss", "-ltnHp"], capture_output=True, text=True).stdout
    assert len([x for x in listed.splitlines() if f"pid={router.popen.pid}," in x]) == 1


PUSHED_TO = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"PULSE_RAILWAY_METRICS_PORT": "no"}, "PULSE_RAILWAY_METRICS_PORT takes a whole number"),
        ({"PULSE_RAILWAY_METRICS_PORT": "99999"}, "port 99999 cannot be listened on"),
        ({"PULSE_RAILWAY_METRICS_PORT": "PORT"}, "must be two ports"),
        ({PUSHED_TO: "collector:4318"}, "with http:// or https://"),
        (
            {PUSHED_TO: "http://127.0.0.1:9", "OTEL_METRIC_EXPORT_INTERVAL": "often"},
            "metrics are pushed every 60 s: OTEL_METRIC_EXPORT_INTERVAL takes a number",
        ),
    ],
)
def test_a_bad_setting_is_one_line_and_the_router_serves(
    redis_server: Redis, run_router: Run, env: dict[str, str], says: str
) -> None:
    port = str(free_port())
    env = {name: port if value == "PORT" else value for name, value in env.items()}
    with Backend(ok(b"a")) as a:
        redis_server.deployment("a", a.address)
        router = run_router(redis_server, PORT=port, **env)
        eventually(lambda: ask(router.port).body == b"a")
        said = router.output()
        assert (said.count("\n"), says in said) == (1, True), said


@pytest.mark.parametrize(
    "env",
    [
        {PUSHED_TO: "http://[no-address"},
        {PUSHED_TO: "http://collector:many"},
        {PUSHED_TO: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_HEADERS": "a b=c%0ad,%00=x"},
        {PUSHED_TO: "http://127.0.0.1:9", "OTEL_RESOURCE_ATTRIBUTES": "a=%ff,b,=c"},
    ],
)
def test_what_cannot_be_pushed_is_one_line_and_the_router_serves(
    redis_server: Redis, run_router: Run, env: dict[str, str]
) -> None:
    """Found out only when the metrics are sent; each second, and said once."""
    with Backend(ok(b"a")) as a:
        redis_server.deployment("a", a.address)
        router = run_router(redis_server, OTEL_METRIC_EXPORT_INTERVAL="500", **env)
        eventually(lambda: "metrics cannot be pushed" in router.output())
        time.sleep(3.5)
        assert ask(router.port).body == b"a"
        assert router.output().count("\n") == 1, router.output()


@pytest.mark.parametrize(
    ("env", "target"),
    [
        ({}, None),
        # Railway's tracing gives this to every service, and takes traces only
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, None),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/", "OTEL_METRICS_EXPORTER": "otlp"},
            "http://c:4318/v1/metrics",
        ),
        ({PUSHED_TO: "http://c:4318/mine"}, "http://c:4318/mine"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://traces", PUSHED_TO: "https://c/m"},
            "https://c/m",
        ),
        ({PUSHED_TO: "http://c/m", "OTEL_METRICS_EXPORTER": "none"}, None),
        ({PUSHED_TO: "http://c/m", "OTEL_SDK_DISABLED": "True"}, None),
    ],
)
def test_metrics_are_pushed_where_that_is_asked_for(env: dict[str, str], target: Any) -> None:
    found = telemetry.otlp_receiver("metrics", env)
    assert (found and found.endpoint) == target


def test_a_scrape_does_not_wait_for_dead_deployments(redis_server: Redis, run_router: Run) -> None:
    with Backend(handle=lambda c: time.sleep(20)) as mute, Backend(handle=session_answers) as a:
        redis_server.deployment("mute", mute.address, "draining")
        redis_server.deployment("a", a.address)
        port = free_port()
        env = {"PULSE_RAILWAY_METRICS_PORT": str(port)}
        router = run_router(redis_server, PULSE_RAILWAY_INTERNAL_TOKEN="let-me-in", **env)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        began = time.monotonic()
        first = Scrape(port)
        assert time.monotonic() - began < 3.5
        assert first.value("pulse_router_deployments") == 2
        eventually(lambda: Scrape(port).value("pulse_router_sessions", deployment="a") == 3)


def test_scraping_leaves_nothing_behind(stage: Callable[..., tuple[Process, int]]) -> None:
    router, port = stage()
    Scrape(port)
    folder = f"/proc/{router.popen.pid}/fd"
    before = len(os.listdir(folder))
    for _ in range(300):
        Scrape(port)
    eventually(lambda: len(os.listdir(folder)) <= before)


# -- OTLP --------------------------------------------------------------------------------------


class MetricsCollector(Collector):
    def metrics(self) -> dict[str, Any]:
        """The last push, read strictly as an ExportMetricsServiceRequest."""
        message = ExportMetricsServiceRequest()
        json_format.Parse(self.taken[-1][2], message)
        (resource,) = message.resource_metrics
        self.about = {a.key: a.value.string_value for a in resource.resource.attributes}
        (scope,) = resource.scope_metrics
        return {metric.name: metric for metric in scope.metrics}


def test_the_same_is_pushed(stage: Callable[..., tuple[Process, int]]) -> None:
    collector = MetricsCollector()
    router, port = stage(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_METRICS_EXPORTER="otlp",
        OTEL_EXPORTER_OTLP_HEADERS="x-api-key=a%20key,other=1",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment=production",
        OTEL_METRIC_EXPORT_INTERVAL="1000",
    )
    for _ in range(10):
        ask(router.port)

    def duration() -> Any:
        return collector.metrics().get("http.server.request.duration") if collector.taken else None

    def pushed() -> int:
        if not (metric := duration()):
            return 0
        assert metric.histogram.aggregation_temporality == 2
        points = metric.histogram.data_points
        for point in points:
            assert sum(point.bucket_counts) == point.count
            assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
            assert 0 < point.start_time_unix_nano <= point.time_unix_nano
        of_a = {a.key: a.value.string_value for p in points for a in p.attributes if p.count > 5}
        assert not of_a or of_a["http.request.method"] == "GET"
        return sum(p.count for p in points if p.attributes[0].value.string_value == "a")

    eventually(lambda: pushed() == 10)
    path, sent, _ = collector.taken[-1]
    assert path == "/v1/metrics"
    assert (sent["content-type"], sent["x-api-key"]) == ("application/json", "a key")
    assert collector.about["service.name"] == "pulse-router"
    assert collector.about["deployment.environment"] == "production"
    # what Prometheus gets under its names is here under OpenTelemetry's
    scraped = {s.name for s in Scrape(port).samples}
    for name in collector.metrics():
        title = router_names()[name]
        assert title in scraped or f"{title}_count" in scraped, name
    # a receiver that fails is said once, and gets what it missed with the next push
    collector.status = 503
    ask(router.port)
    eventually(lambda: "metrics cannot be pushed (503)" in router.output())
    collector.status = 200
    eventually(lambda: pushed() == 11)
    assert router.output().count("cannot be pushed") == 1
    assert "a key" not in router.output()


def test_what_was_not_pushed_yet_is_at_the_end(stage: Callable[..., tuple[Process, int]]) -> None:
    collector = MetricsCollector()
    router, _ = stage(OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=f"{collector.url}/v1/metrics")
    eventually(lambda: bool(collector.taken))  # the next one is a minute away
    for _ in range(7):
        ask(router.port, "/missing")
    assert router.stop() == 0
    points = collector.metrics()["http.server.request.duration"].histogram.data_points
    assert 7 in [p.count for p in points if "4xx" in {a.value.string_value for a in p.attributes}]


def test_nobody_who_is_mute_holds_up_the_end(redis_server: Redis, run_router: Run) -> None:
    """A receiver and a deployment that take a connection and say nothing."""
    asked = []

    def mute(connection: Connection) -> None:
        asked.append(connection.head())
        connection.rest()

    with Backend(handle=mute) as receiver, Backend(handle=mute) as frozen:
        redis_server.deployment("a", frozen.address)
        router = run_router(
            redis_server,
            OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=f"{receiver.address}/v1/metrics",
            OTEL_METRIC_EXPORT_INTERVAL="1000",
        )
        eventually(lambda: any(b"/v1/metrics" in head for head in asked), 10)
        assert any(b"/railway/sessions" in head for head in asked)
        began = time.monotonic()
        assert router.stop() == 0
        assert time.monotonic() - began < 3


def router_names() -> dict[str, str]:
    return {name: family.prometheus(name) for name, family in telemetry.FAMILIES.items()}


def test_the_dashboard_asks_for_what_there_is() -> None:
    """Every metric and label in docs/grafana.json exists, and every metric is on it."""
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    asked = {t["expr"] for p in dashboard["panels"] for t in p.get("targets", ())}
    for question in asked:  # raises for what Prometheus would not take
        promql_parser.parse(question.replace("$__rate_interval", "5m"))
    text = "\n".join(sorted(asked))
    names = router_names()
    there = set(names.values())
    for name, family in telemetry.FAMILIES.items():
        if family.kind == "histogram":
            there |= {f"{names[name]}_{end}" for end in ("bucket", "sum", "count")}
    words = set(re.findall(r"\b(?:http|pulse|process)_\w+", text)) - {"http_request_method"}
    assert words <= there, words - there
    for name, title in names.items():
        assert title in text, f"{name} is on no panel"
    labels = set(re.findall(r"by \(([^)]*)\)", text)) | set(re.findall(r"{(\w+)", text))
    known = {"deployment", "status_class", "http_request_method", "error_type", "state", "le"}
    assert {x.strip() for many in labels for x in many.split(",")} <= known
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(p["datasource"]["uid"] == "${datasource}" for p in dashboard["panels"])


# -- the access log ----------------------------------------------------------------------------


def lines(router: Process) -> list[dict[str, Any]]:
    return [json.loads(x) for x in router.output().splitlines() if x.startswith("{")]


def test_a_line_is_what_railway_reads(stage: Callable[..., tuple[Process, int]]) -> None:
    router, _ = stage(PULSE_RAILWAY_ACCESS_LOG="1")
    ask(router.port, "/page?token=secret", "X-Railway-Request-Id: id-1")
    ask(router.port, "/missing")
    ask(router.port, "/mute")
    ask(router.port, "/?pulse_deployment=gone")
    eventually(lambda: len(lines(router)) >= 5)
    page, missing, mute, gone = lines(router)[-4:]
    assert re.fullmatch(r"GET /page 200 \d+\.\d ms", page["message"])
    assert (page["level"], page["requestId"], page["bytes"]) == ("info", "id-1", 1)
    assert (page["deployment"], page["status"], page["method"]) == ("a", 200, "GET")
    assert (missing["level"], missing["status"], missing["requestId"]) == ("warn", 404, None)
    assert (mute["level"], mute["status"], mute["deployment"]) == ("error", 502, "a")
    assert (gone["level"], gone["status"], gone["deployment"]) == ("error", 502, "gone")
    assert "secret" not in router.output()


def test_refused_heads_and_partial_answers_have_lines(
    stage: Callable[..., tuple[Process, int]],
) -> None:
    router, _ = stage(PULSE_RAILWAY_ACCESS_LOG="1")
    with Connection.to(router.port) as connection:
        connection.send(b"GET / HTTP/1.1\r\nhost: a\r\nhost: secret\r\n\r\n")
        assert b" 400 " in connection.head()
    with Connection.to(router.port) as connection:
        connection.send(b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: %b\r\n" % (b"y" * 70_000))
        assert b" 431 " in connection.head()
    with Connection.to(router.port) as connection:  # a bad body: its head is known
        connection.send(b"POST /up HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")
        assert b" 400 " in connection.head()
    ask(router.port, "/broken")
    with Connection.to(router.port) as connection:
        connection.send(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
        connection.head()
    ask(router.port, "/", method="HEAD")
    ask(router.port, "/?pulse_deployment=never", method="HEAD")
    eventually(lambda: len(lines(router)) >= 8)
    twice, large, body, broken, left, head, stale = lines(router)[-7:]
    assert (twice["message"], large["message"]) == ("refused 400", "refused 431")
    assert (twice["level"], twice["ended"], twice["seconds"] < 5) == ("warn", "refused", True)
    assert (body["path"], body["status"], body["deployment"]) == ("/up", 400, None)
    assert re.fullmatch(r"GET /broken 200 \d+\.\d ms, broken off", broken["message"])
    assert (broken["level"], broken["ended"], broken["bytes"]) == ("error", "broken_off", 10)
    assert re.fullmatch(r"GET /endless 200 \d+\.\d ms, client gone", left["message"])
    assert (left["level"], left["ended"]) == ("info", "client_gone")
    assert (head["method"], head["bytes"], head["ended"]) == ("HEAD", 0, "complete")
    assert (stale["status"], stale["bytes"]) == (409, 0)  # the router's own answer
    assert "secret" not in router.output()


def test_what_has_not_been_written_is_at_the_end(
    stage: Callable[..., tuple[Process, int]],
) -> None:
    router, _ = stage(PULSE_RAILWAY_ACCESS_LOG="1")
    ask(router.port, "/last")
    router.popen.terminate()
    router.popen.wait(10)
    assert lines(router)[-1]["path"] == "/last"


def test_a_flood_is_sampled_and_errors_are_not() -> None:
    log = telemetry.AccessLog(rate=400)

    def add(line: dict[str, Any], error: bool = False) -> None:
        if log.admits(error):
            log.add(line, error)

    for second in range(4):
        for n in range(2000):
            add({"status": 200, "n": n})
        for _ in range(30):
            add({"status": 502}, error=True)
        written = [json.loads(x) for x in log.lines]
        log.lines.clear()
        good = [x for x in written if x["status"] == 200]
        assert len([x for x in written if x["status"] == 502]) == 30
        assert len(good) <= 400
        if second:  # now it is known how many there are
            weight = sum(x["sample"] for x in good)
            assert weight == pytest.approx(2000, rel=0.05)
            assert good[-1]["n"] > 1900, "only the beginning of the second is seen"
        log.second()
    log.second()
    add({"status": 200})
    assert "sample" not in json.loads(log.lines[0])


def test_a_reader_that_does_not_read_holds_nothing_up(
    redis_server: Redis, router_python: Path
) -> None:
    """Its pipe is full: requests go on, what waits is bounded, and the end is not held up."""
    with Backend(ok(b"a")) as a:
        redis_server.deployment("a", a.address)
        port, read_end = free_port(), os.pipe()
        env = {"REDIS_URL": redis_server.url, "PORT": str(port), "HOST": "127.0.0.1"}
        env |= {"PULSE_RAILWAY_ACCESS_LOG": "1", "PATH": os.environ["PATH"]}
        process = subprocess.Popen([router_python, ROOT / "router.py"], env=env, stdout=read_end[1])
        try:
            eventually(lambda: listens(port) and ask(port, "/healthz").status == 200)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                for n in range(1500):
                    began = time.monotonic()
                    assert client.get(f"/{'long' * 100}?{n}").text == "a"
                    assert time.monotonic() - began < 2
            process.terminate()
            assert process.wait(10) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
            os.close(read_end[0])
            os.close(read_end[1])


def test_a_log_that_nobody_reads_is_bounded_in_size() -> None:
    """It was bounded in lines, of up to 124 KB each."""
    log = telemetry.AccessLog(10_000_000)
    request: Any = SimpleNamespace(
        path=b"/" + b"%ff" * 10_000,
        method=b"GET",
        fields=[(b"", telemetry.REQUEST_ID, b"x" * 9999)],
    )
    for _ in range(3000):
        log.answered(request, 200, "a", 5, 0.1)
    assert sum(map(len, log.lines)) == log.size < telemetry.LOG_AHEAD + 20_000
    assert log.dropped > 1000
    line = json.loads(log.lines[0])
    assert (len(line["path"]) < 1100, line["path"][-1], len(line["requestId"])) == (True, "…", 100)


@pytest.mark.parametrize("connects", [True, False])
def test_an_invalid_body_is_one_answer_in_log_and_metrics(
    redis_server: Redis, run_router: Run, connects: bool
) -> None:
    """It was in no metric; while the router was connecting it was two, the second a 5xx."""
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(0 if connects else 3):  # its queue is full: SYNs are dropped
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(hole.getsockname())
        redis_server.deployment("a", f"http://127.0.0.1:{hole.getsockname()[1]}")
        started = run_router(redis_server, {"connect_seconds": 0.6}, PULSE_RAILWAY_ACCESS_LOG="1")
        eventually(lambda: ask(started.port, "/healthz").status == 200)
        with Connection.to(started.port) as c:
            c.send(b"POST /up HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            if not connects:
                time.sleep(0.2)
            c.send(b"no chunk\r\n")
            assert b" 400 " in c.head()
        time.sleep(1.2)
        lines = [json.loads(line) for line in started.output().splitlines() if "/up" in line]
        assert [(line["status"], line["ended"]) for line in lines] == [(400, "complete")]


def test_a_client_that_leaves_before_the_connection_to_a_backend_has_a_line(
    redis_server: Redis, run_router: Run
) -> None:
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        waiting = [stack.enter_context(socket.socket()) for _ in range(3)]
        for sock in waiting:  # its queue is full: SYNs are dropped
            sock.setblocking(False)
            sock.connect_ex(slow.getsockname())
        redis_server.deployment("a", f"http://127.0.0.1:{slow.getsockname()[1]}")
        router = run_router(redis_server, {"connect_seconds": 20.0}, PULSE_RAILWAY_ACCESS_LOG="1")
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        with Connection.to(router.port) as connection:
            connection.send(b"GET /left HTTP/1.1\r\nhost: a\r\n\r\n")
            time.sleep(0.2)
        slow.settimeout(0.5)

        def found() -> list[list[Any]]:  # there is room, so that the router's next SYN is answered
            with contextlib.suppress(TimeoutError):
                stack.enter_context(slow.accept()[0])
            keys = ("status", "deployment", "ended")
            return [[x[key] for key in keys] for x in lines(router) if x["path"] == "/left"]

        eventually(lambda: found() != [], 20)
        assert found() == [[0, "a", "client_gone"]]
