"""A router's access log and metrics.

router.py loads this file if PULSE_RAILWAY_ACCESS_LOG, PULSE_RAILWAY_METRICS_PORT or a variable of
OpenTelemetry is set, and calls `start`. An invalid variable is logged in one line; no error in this
file keeps a router from serving.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import http.client
import itertools
import json
import logging
import os
import re
import resource
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from starlette.responses import Response

import control
import router
from router import BUCKETS, METRICS, Client, Histogram, Json, Request

if TYPE_CHECKING:
    from tracing import Tracer

REQUEST_ID = b"x-railway-request-id"  # set by Railway's edge
LOG_RATE = 400  # lines of the access log per second; Railway keeps 500 per replica
LOG_FLUSH = 0.2  # seconds between two writes
LOG_AHEAD = 4_000_000  # characters kept in memory while stdout is not read
LOGGED_PATH = 1000  # characters of a path
TABS_EVERY = 10.0  # seconds at least between two questions for the deployments' sessions
DESCRIPTORS_EVERY = 10.0  # seconds at least between two counts of descriptors
TABS_TIMEOUT = 2.0  # seconds that a scrape waits for the sessions
LAST_PUSH = 1.0  # seconds for the push at shutdown

log = logging.getLogger("pulse.router")

Tasks = dict[str, Callable[[], Coroutine[Any, Any, None]]]


def start(env: Mapping[str, str]) -> tuple[AccessLog | None, Tracer | None, Tasks]:
    """Return the access log and what makes spans, if they are on, and the background tasks."""
    tasks: Tasks = {}
    access_log = None
    if env.get("PULSE_RAILWAY_ACCESS_LOG", "") not in ("", "0", "false"):
        access_log = AccessLog(LOG_RATE)
        tasks["access log"] = access_log.run
    port, receiver = metrics_port(env), otlp_receiver("metrics", env)
    if port or receiver:
        tasks["metrics"] = Exporter(port, receiver, export_interval(env), access_log).run
    tracer = None
    if traces := otlp_receiver("traces", env):
        tracer = start_tracer(traces, env)
    if tracer:
        tasks["traces"] = tracer.run
    return access_log, tracer, tasks


def start_tracer(receiver: Receiver, env: Mapping[str, str]) -> Tracer | None:
    """Return what makes the spans; None if the receiver or the program cannot have them."""
    protocol = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if protocol not in (None, "", "http/protobuf"):
        log.error(
            "no traces are pushed: OTLP's protocol is %s, and must be http/protobuf", protocol
        )
        return None
    try:
        import tracing
    except ImportError as error:
        log.error("no traces are pushed: %s is not installed", error.name)
        return None
    return tracing.Tracer(receiver)


def metrics_port(env: Mapping[str, str]) -> socket.socket | None:
    """Return the listening socket of the metrics; None if there is to be none, or it failed."""
    text = env.get("PULSE_RAILWAY_METRICS_PORT")
    if not text:
        return None
    try:
        port = router.number_from_env("PULSE_RAILWAY_METRICS_PORT", None, int)
        if port == router.number_from_env("PORT", router.DEFAULT_PORT, int):
            raise SystemExit("PULSE_RAILWAY_METRICS_PORT and PORT must be two ports")
        return router.listen(env.get("HOST"), cast(int, port))
    except SystemExit as problem:
        log.error("no metrics can be scraped: %s", problem)
        return None


def export_interval(env: Mapping[str, str]) -> float:
    """Return the seconds between two pushes."""
    try:
        return (
            float(router.number_from_env("OTEL_METRIC_EXPORT_INTERVAL", 60_000.0, env=env)) / 1000
        )
    except SystemExit as problem:
        log.error("metrics are pushed every 60 s: %s", problem)
        return 60.0


# -- the access log: JSON lines on stdout, as Railway reads them ---------------------------------


class AccessLog:
    """Writes one JSON line per answer to stdout.

    Lines are written by a thread every LOG_FLUSH seconds, so that a slow reader delays no request.
    Above `rate` lines per second only every n-th is written, with n as its `sample`; Railway drops
    what exceeds 500 per replica. Lines about errors are always written.
    """

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.lines: list[str] = []
        self.size = 0  # characters of `lines`
        self.seen = self.kept = self.dropped = 0  # in this second, except `dropped`
        self.sample = 1
        self.idle = threading.Event()  # set while no thread writes
        self.idle.set()

    def admits(self, error: bool) -> bool:
        """Is the next line to be written? Called before the line is made, which costs time."""
        self.seen += 1
        too_many = not error and (self.seen % self.sample or self.kept >= self.rate)
        if too_many or self.size >= LOG_AHEAD:
            self.dropped += 1
            return False
        return True

    def add(self, line: Json, error: bool) -> None:
        """Add a line that was admitted."""
        self.kept += 1
        if self.sample > 1 and not error:
            line["sample"] = self.sample
        text = json.dumps(line) + "\n"
        self.lines.append(text)
        self.size += len(text)

    def answered(
        self,
        request: Request,
        status: int,
        deployment: str | None,
        size: int,
        took: float,
        ended: str = "complete",
    ) -> None:
        """Log an answer. The query is left out, since it can have a secret.

        Args:
            status: 0 if the client closed the connection before an answer.
            size: bytes of the body.
            took: seconds.
            ended: `complete`; `broken_off` by the deployment; `client_gone`, by the client.
        """
        error = status >= 500 or ended == "broken_off"
        if not self.admits(error):
            return
        path = urllib.parse.unquote(request.path[:LOGGED_PATH].decode("latin-1"))
        if len(request.path) > LOGGED_PATH:
            path += "…"
        method = request.method.decode()
        request_id = next((v for _, lower, v in request.fields if lower == REQUEST_ID), b"")
        self.add(
            {
                "message": f"{method} {path} {status or 'gone'} {took * 1000:.1f} ms"
                + (f", {ended.replace('_', ' ')}" if status and ended != "complete" else ""),
                "level": "error" if error else "warn" if status >= 400 else "info",
                "requestId": request_id[:100].decode("latin-1") or None,
                "time": round(time.time(), 3),
                "method": method,
                "path": path,
                "status": status,
                "deployment": deployment,
                "bytes": size,
                "seconds": round(took, 6),
                "ended": ended,
            },
            error=error,
        )

    def refused(self, status: int, took: float) -> None:
        """Log a request head that was refused: what it asked for is not known for sure.

        Args:
            took: seconds since its first byte.
        """
        if self.admits(False):
            line = {
                "message": f"refused {status}",
                "level": "warn",
                "time": round(time.time(), 3),
                "status": status,
                "seconds": round(took, 6),
                "ended": "refused",
            }
            self.add(line, error=False)

    def second(self) -> None:
        """Begin the next second, with a sample rate by the number of lines in the last one."""
        self.sample = -(-self.seen // self.rate) or 1
        self.seen = self.kept = 0

    def flush(self) -> None:
        """Start a thread that writes all lines, unless one is still writing."""
        if self.lines and self.idle.is_set():
            self.idle.clear()
            text, self.lines, self.size = "".join(self.lines), [], 0
            # a daemon, so that the process can end although nobody reads stdout
            threading.Thread(target=self.write, args=(text.encode(),), daemon=True).start()

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # stdout was closed by its reader
            while data:
                data = data[os.write(1, data) :]
        self.idle.set()

    async def run(self) -> None:
        """Write lines until cancelled; then write what is left, for at most 1.5 seconds."""
        try:
            for turn in itertools.count(1):
                await asyncio.sleep(LOG_FLUSH)
                self.flush()
                if turn % round(1 / LOG_FLUSH) == 0:
                    self.second()
        finally:
            for _ in range(2):  # for the lines being written, and those added meanwhile
                self.idle.wait(0.5)
                self.flush()
            self.idle.wait(0.5)


# -- the metrics: Prometheus text on a port of their own, and the same pushed as OTLP ------------
# The names are OpenTelemetry's semantic conventions if there is one for a metric, rendered for
# Prometheus by https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/.

Labels = tuple[tuple[str, str], ...]
Value = float | list[float]  # a histogram has its counts by bucket, then the sum
Metrics = dict[tuple[str, Labels], Value]


@dataclass(frozen=True)
class Family:
    """A metric without its data points."""

    kind: str  # counter, gauge, histogram
    unit: str
    description: str

    def prometheus(self, name: str) -> str:
        """Return the metric's name in Prometheus."""
        suffix = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        return name.replace(".", "_") + suffix + ("_total" if self.kind == "counter" else "")


FAMILIES = {
    "http.server.request.duration": Family(
        "histogram", "s", "From a request to the end of its answer"
    ),
    "http.server.active_requests": Family("gauge", "{request}", "Requests in progress"),
    "pulse.router.first_byte.duration": Family(
        "histogram", "s", "From a request to the start of its answer"
    ),
    "pulse.router.upstream.errors": Family("counter", "{error}", "Failures of deployments by kind"),
    "pulse.router.websockets": Family("gauge", "{connection}", "Open WebSockets"),
    "pulse.router.websockets.opened": Family("counter", "{connection}", "WebSockets opened"),
    "pulse.router.stale": Family(
        "counter", "{request}", "Requests of tabs of a removed deployment"
    ),
    "pulse.router.connections": Family(
        "gauge", "{connection}", "Connected clients without WebSockets"
    ),
    "pulse.router.connections.refused": Family(
        "counter", "{connection}", "Clients rejected at the connection limit"
    ),
    "pulse.router.log.dropped": Family("counter", "{line}", "Lines not written to the access log"),
    "pulse.router.table.age": Family("gauge", "s", "Time since the routing state was last read"),
    "pulse.router.fallback": Family(
        "gauge", "{state}", "1 while new visitors get the version before the active one"
    ),
    "pulse.router.deployments": Family("gauge", "{deployment}", "Deployments by state"),
    "pulse.router.sessions": Family("gauge", "{session}", "Render sessions of a deployment"),
    "process.cpu.time": Family("counter", "s", "CPU time of the router's process"),
    "process.memory.usage": Family("gauge", "By", "Resident memory of the router's process"),
    "process.open_file_descriptor.count": Family("gauge", "{count}", "Open descriptors"),
}


DOTTED = {
    "http_request_method": "http.request.method",
    "error_type": "error.type",
}  # as OpenTelemetry spells them


def collect_metrics(tab_counts: Mapping[str, int], log_dropped: int = 0) -> Metrics:
    """Return all metrics of this process.

    Args:
        tab_counts: render sessions by deployment.
        log_dropped: lines not written to the access log.
    """
    metrics: Metrics = {}

    def put(family: str, value: Value, **labels: str) -> None:
        metrics[family, tuple(labels.items())] = value

    def histogram(family: str, values: Histogram, **labels: str) -> None:
        put(family, [*values.counts, round(values.total, 6)], **labels)

    # the deployment "-" stands for the router's own answers
    for name, tally in [("-", METRICS.own), *METRICS.tallies.items()]:
        for (method, status), values in tally.answers.items():
            labels = {"http_request_method": method.decode(), "status_class": f"{status}xx"}
            histogram("http.server.request.duration", values, deployment=name, **labels)
        if any(tally.first_byte.counts):
            histogram("pulse.router.first_byte.duration", tally.first_byte, deployment=name)
        for kind, count in tally.errors.items():
            put("pulse.router.upstream.errors", count, deployment=name, error_type=kind)
    under_way = collections.Counter(router.requests_under_way())
    tunnels = collections.Counter(end.deployment for end in router.TunnelEnd.open)
    for name, tally in METRICS.tallies.items():
        put("http.server.active_requests", under_way[name], deployment=name)
        entry = router.TABLE.processes.get(name.encode())
        if entry and entry.processes:
            for number, process in enumerate(entry.processes, 1):
                put(
                    "pulse.router.websockets",
                    process.sockets,
                    deployment=name,
                    instance=str(number),
                )
        else:
            put("pulse.router.websockets", tunnels[name], deployment=name)
        put("pulse.router.websockets.opened", tally.tunnels, deployment=name)
    put("pulse.router.stale", METRICS.stale)
    put("pulse.router.connections", len(Client.instances))
    put("pulse.router.connections.refused", METRICS.rejected)
    put("pulse.router.log.dropped", log_dropped)
    put("pulse.router.table.age", round(time.monotonic() - router.TABLE.loaded_at, 3))
    put("pulse.router.fallback", int(router.TABLE.fallback_in_use is not None))
    states = collections.Counter(entry.state for entry in router.TABLE.deployments.values())
    for state in ("pending", "active", "draining"):
        put("pulse.router.deployments", states[state], state=state)
    for name, count in tab_counts.items():
        put("pulse.router.sessions", count, deployment=name)
    put("process.cpu.time", round(time.process_time(), 3))
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
        put("process.memory.usage", int(statm.read().split()[1]) * resource.getpagesize())
        put("process.open_file_descriptor.count", open_descriptors())
    return metrics


def _per_interval(seconds: float, work: Callable[[], int]) -> Callable[[], int]:
    """Return `work`, with its result kept for `seconds`: counting many descriptors is slow."""
    last, until = 0, 0.0

    def inner() -> int:
        nonlocal last, until
        if time.monotonic() > until:
            last, until = work(), time.monotonic() + seconds
        return last

    return inner


open_descriptors = _per_interval(DESCRIPTORS_EVERY, lambda: len(os.listdir("/proc/self/fd")))


def render_prometheus(metrics: Metrics) -> str:
    """Return the metrics in Prometheus' text format."""
    lines = []
    for name, family in FAMILIES.items():
        title = family.prometheus(name)
        points = [(labels, v) for (other, labels), v in metrics.items() if other == name]
        if points:
            lines += [f"# HELP {title} {family.description}", f"# TYPE {title} {family.kind}"]
        for labels, value in points:
            pairs = [f'{label}="{text}"' for label, text in labels]
            braces = "{" + ",".join(pairs) + "}" if pairs else ""
            if not isinstance(value, list):
                lines.append(f"{title}{braces} {value}")
                continue
            *counts, total = value
            for bound, count in zip((*BUCKETS, "+Inf"), itertools.accumulate(counts), strict=True):
                bucket = ",".join([*pairs, f'le="{bound}"'])
                lines.append(f"{title}_bucket{{{bucket}}} {count}")
            lines += [f"{title}_sum{braces} {total}", f"{title}_count{braces} {sum(counts)}"]
    return "\n".join(lines) + "\n"


def encode_otlp(metrics: Metrics, resource_attributes: Mapping[str, str]) -> Json:
    """Return an ExportMetricsServiceRequest in OTLP's JSON encoding.

    64-bit integers are strings there, by the JSON mapping of Protocol Buffers.
    """
    now = str(time.time_ns())
    began = str(int(METRICS.started_at * 1e9))

    def attributes(labels: Iterable[tuple[str, str]]) -> list[Json]:
        return [{"key": key, "value": {"stringValue": value}} for key, value in labels]

    def point(labels: Labels, value: Value) -> Json:
        dotted = ((DOTTED.get(key, key), text) for key, text in labels)
        at = {"attributes": attributes(dotted), "startTimeUnixNano": began, "timeUnixNano": now}
        if isinstance(value, list):
            *counts, total = value
            histogram = {"count": str(sum(counts)), "sum": total, "explicitBounds": list(BUCKETS)}
            return {**at, **histogram, "bucketCounts": [str(count) for count in counts]}
        return {**at, **({"asDouble": value} if value % 1 else {"asInt": str(int(value))})}

    encoded: list[Json] = []
    for name, family in FAMILIES.items():
        points = [point(labels, v) for (other, labels), v in metrics.items() if other == name]
        about: Json = {"aggregationTemporality": 2, "dataPoints": points}  # cumulative
        if family.kind == "counter":
            data = {"sum": {**about, "isMonotonic": True}}
        elif family.kind == "histogram":
            data = {"histogram": about}
        else:
            data = {"gauge": {"dataPoints": points}}
        if points:
            encoded.append(
                {"name": name, "unit": family.unit, "description": family.description, **data}
            )
    return {
        "resourceMetrics": [
            {
                "resource": {"attributes": attributes(resource_attributes.items())},
                "scopeMetrics": [{"scope": {"name": "pulse-railway"}, "metrics": encoded}],
            }
        ]
    }


def otlp_receiver(signal: str, env: Mapping[str, str]) -> Receiver | None:
    """Return what takes `metrics` or `traces`; None if they are not sent.

    OpenTelemetry's variables name an endpoint for one signal, or one for all. Metrics are sent to
    the latter only if OTEL_METRICS_EXPORTER is otlp, since Railway's tracing sets it on every
    service and takes traces only.
    """
    upper = signal.upper()
    by_default = "otlp" if signal == "traces" else ""
    names = env.get(f"OTEL_{upper}_EXPORTER") or by_default
    exporters = {name.strip().lower() for name in names.split(",")}
    if "none" in exporters or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    endpoint = env.get(f"OTEL_EXPORTER_OTLP_{upper}_ENDPOINT") or ""
    base = env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint and base and "otlp" in exporters:
        endpoint = f"{base.rstrip('/')}/v1/{signal}"
    if not endpoint:
        return None
    if not re.match(r"https?://[^/]", endpoint):
        log.error(
            f"no {signal} are pushed: OTLP's endpoint takes an address with http:// or https://"
        )
        return None
    own = env.get(f"OTEL_EXPORTER_OTLP_{upper}_HEADERS")
    pairs = (own or env.get("OTEL_EXPORTER_OTLP_HEADERS") or "").split(",")
    headers = {
        name.strip(): urllib.parse.unquote(value.strip())
        for name, equals, value in (pair.partition("=") for pair in pairs)
        if equals
    }
    return Receiver(signal, endpoint, headers)


class Unredirected(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an HTTPError: the headers of a push can have a secret."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Receiver:
    """What takes a signal as OTLP over HTTP."""

    signal: str
    endpoint: str
    headers: dict[str, str]
    reports_failure: bool = True  # False once a failed push was logged

    def send(self, body: bytes, content_type: str) -> None:
        """Send a push, within 10 seconds or so; a failure is logged once until a push succeeds.

        Runs in a thread. Raises OSError, of which an HTTP error is one, or HTTPException.
        """
        headers = {"content-type": content_type, **self.headers}
        try:
            request = urllib.request.Request(self.endpoint, body, headers)
            with urllib.request.build_opener(Unredirected).open(request, timeout=10):
                self.reports_failure = True
        except (OSError, ValueError, http.client.HTTPException) as error:
            if self.reports_failure:  # the class only: the message can have the URL, a secret
                reason = getattr(error, "code", type(error).__name__)
                log.error("%s cannot be pushed (%s)", self.signal, reason)
            self.reports_failure = False
            if isinstance(error, ValueError):
                raise OSError from None
            raise


def resource_attributes(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the attributes of OTLP's resource: this router."""
    pairs = (pair.partition("=") for pair in (env.get("OTEL_RESOURCE_ATTRIBUTES") or "").split(","))
    configured = {
        name.strip(): urllib.parse.unquote(value) for name, equals, value in pairs if equals
    }
    name = env.get("OTEL_SERVICE_NAME") or env.get("RAILWAY_SERVICE_NAME") or "pulse-router"
    return {"service.name": name, "service.instance.id": METRICS.name, **configured}


class Exporter:
    """Exports the metrics: `port` is scraped, and `receiver` gets them every `every` seconds."""

    def __init__(
        self,
        port: socket.socket | None,
        receiver: Receiver | None,
        every: float,
        access_log: AccessLog | None,
    ) -> None:
        self.port, self.receiver, self.every, self.access_log = port, receiver, every, access_log
        self.tab_counts: dict[str, int] = {}
        self.tabs_asked_at = 0.0  # monotonic
        self.asking: asyncio.Task[None] | None = None

    def collect(self) -> Metrics:
        return collect_metrics(self.tab_counts, self.access_log.dropped if self.access_log else 0)

    async def count_tabs(self) -> None:
        """Ask the deployments for their sessions if the last time is TABS_EVERY seconds ago.

        Waits for at most TABS_TIMEOUT seconds; later answers count for the next scrape.
        """
        now = time.monotonic()
        if now - self.tabs_asked_at > TABS_EVERY and (self.asking is None or self.asking.done()):
            self.tabs_asked_at = now
            self.asking = asyncio.get_running_loop().create_task(self.ask_tabs())
        if self.asking:
            await asyncio.wait({self.asking}, timeout=TABS_TIMEOUT)

    async def ask_tabs(self) -> None:
        """Ask all deployments for their sessions."""
        loop, records = asyncio.get_running_loop(), list(router.TABLE.routing.records.values())
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            token = router.INTERNAL_TOKEN.decode("latin-1")
            counts = [loop.run_in_executor(pool, control.sessions, r, token) for r in records]
            answers = zip(records, await asyncio.gather(*counts), strict=True)
        self.tab_counts = {r.deployment_id: count for r, count in answers if count is not None}

    async def run(self) -> None:
        """Serve scrapes and push until cancelled; then push once more."""
        loop = asyncio.get_running_loop()
        server, next_push = None, time.monotonic() + min(self.every, 5.0)
        if self.port:
            state = (
                uvicorn.server.ServerState()
            )  # its own, so that a scrape does not delay the router's shutdown
            server = await loop.create_server(
                functools.partial(MetricsConnection, server_state=state, exporter=self),
                sock=self.port,
            )
        try:
            while True:
                if self.receiver and time.monotonic() >= next_push:
                    next_push = time.monotonic() + self.every
                    await self.count_tabs()
                    await self.push()
                await asyncio.sleep(1.0)
        finally:
            if self.receiver:  # the counts since the last push
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.push(), LAST_PUSH)
            if server:
                server.close()

    async def push(self) -> None:
        """Push the metrics once. A lost push needs no retry, since the counts are cumulative."""
        body = json.dumps(encode_otlp(self.collect(), resource_attributes())).encode()
        assert self.receiver
        send, loop = self.receiver.send, asyncio.get_running_loop()
        with contextlib.suppress(OSError, http.client.HTTPException):
            await loop.run_in_executor(None, send, body, "application/json")


class MetricsConnection(Client):
    """A connection to the port of the metrics. Its limits are those of other clients."""

    def __init__(self, *, exporter: Exporter, **options: Any) -> None:
        super().__init__(**options)
        self.exporter = exporter

    def route(self, request: Request) -> None:
        self.spawn(self.scrape(request))

    async def scrape(self, request: Request) -> None:
        """Answer a request for the metrics. Only the private network gets them."""
        # Railway's edge adds REQUEST_ID to each request from outside
        from_outside = any(lower == REQUEST_ID for _, lower, _ in request.fields)
        if from_outside or request.path != b"/metrics":
            response = router.error_response(404)
        elif request.method not in (b"GET", b"HEAD"):
            response = router.error_response(405)
        else:
            await self.exporter.count_tabs()
            text = render_prometheus(self.exporter.collect())
            response = Response(text, media_type="text/plain; version=0.0.4")
        self.send_response(response, request)
        self.finish(request)
