# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "opentelemetry-proto>=1.37",
# ]
# ///
"""Traces: the router's part of a request that is traced.

telemetry.py loads this file if a variable of OpenTelemetry names a receiver of traces, as Railway's
tracing does. A request whose `traceparent` (https://www.w3.org/TR/trace-context/) is sampled gets a
server span, and the backend gets that span as its parent; other requests are not touched. The spans
are sent as OTLP in its binary encoding (`http/protobuf`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import http.client
import logging
import re
import secrets
import time
import urllib.error
from collections.abc import Mapping

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan

import router
from router import Request
from telemetry import LAST_PUSH, Receiver, resource_attributes

TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED, KNOWN_FLAGS = 0x01, 0x03  # Trace Context Level 2: sampled, random trace id
PUSH_EVERY = 2.0  # seconds
SPANS = 1000  # in each WINDOW; Railway's receiver takes no more of a replica
WINDOW = 10.0  # seconds
KEPT = 2 * SPANS  # spans that wait for the receiver
LONGEST = 1000  # bytes of a value: a path or a host can have 64 KB
RETRYABLE = (429, 502, 503, 504)  # OTLP/HTTP, section "Retryable Response Codes"

log = logging.getLogger("pulse.router")


class Span:
    """A request's span, from its head until its answer is complete, or a tunnel begins."""

    def __init__(self, tracer: Tracer, request: Request, parent: re.Match[bytes]) -> None:
        self.tracer, self.request = tracer, request
        self.trace_id, self.parent_id = bytes.fromhex(parent[2].decode()), parent[3]
        self.span_id = secrets.token_hex(8).encode()
        self.flags = int(parent[4], 16) & KNOWN_FLAGS
        self.began = time.time_ns()
        self.chosen_by: dict[str, str] = {}  # by deployment
        self.header = b"traceparent: 00-%b-%b-%02x\r\n" % (parent[2], self.span_id, self.flags)

    def replace_parent(self, lines: list[bytes], deployment: str) -> list[bytes]:
        """Return a backend's request head with this span in the header `traceparent`. Notes by what
        the backend was chosen, since roles can change until the answer."""
        self.chosen_by[deployment] = chosen_by(self.request, deployment)
        return [self.header if line[:12].lower() == b"traceparent:" else line for line in lines]

    def end(self, status: int, deployment: str | None) -> None:
        """End the span with the status of the answer; 0 if the client closed the connection."""
        request = self.request
        request.span = None
        method = request.method.decode()
        attributes: dict[str, str | int] = {
            "http.request.method": method if request.method in router.METHODS else "_OTHER",
            "url.path": request.path.decode("latin-1"),
            "url.scheme": (request.values(b"x-forwarded-proto") or [b"http"])[0].decode("latin-1"),
            "server.address": (request.values(b"host") or [b""])[0].decode("latin-1"),
        }
        if status:
            attributes["http.response.status_code"] = status
        if status >= 500:
            attributes["error.type"] = str(status)
        if deployment:
            attributes["pulse.deployment"] = deployment
            by = self.chosen_by.get(deployment) or chosen_by(request, deployment)
            attributes["pulse.chosen_by"] = by
        trace_state = b",".join(request.values(b"tracestate"))
        span = OtlpSpan(
            trace_id=self.trace_id,
            span_id=bytes.fromhex(self.span_id.decode()),
            parent_span_id=bytes.fromhex(self.parent_id.decode()),
            trace_state=trace_state.decode("latin-1") if len(trace_state) <= LONGEST else "",
            flags=self.flags,
            name=str(attributes["http.request.method"]).replace("_OTHER", "HTTP"),
            kind=OtlpSpan.SPAN_KIND_SERVER,
            start_time_unix_nano=self.began,
            end_time_unix_nano=time.time_ns(),
            attributes=encode_attributes(attributes),
            status=Status(code=Status.STATUS_CODE_ERROR) if status >= 500 else None,
        )
        self.tracer.add(span)


def chosen_by(request: Request, deployment: str) -> str:
    """Return what has chosen the deployment of a request: a key (`preview`), its affinity (`query`
    or `header`), `fallback`, the visitor's `cookie`, a draw for the `canary`, `active`, or
    `asset`."""
    table = router.TABLE
    if deployment.encode() in table.previews:
        return "preview"
    if request.affinity_id:
        by_query = router.query_field(router.AFFINITY_PARAMETER, request.query)
        return "query" if by_query else "header"
    if (fallback := table.fallback_in_use) and fallback.id == deployment:
        return "fallback"
    main = {d.id for d in (table.active, table.canary) if d}
    if deployment not in main:
        return "asset"  # the active deployment lacked it
    if request.by_visitor:
        cookies = request.values(b"cookie")
        if any(router.VISITOR.search(value) for value in cookies):
            return "cookie"
    return "canary" if table.canary and table.canary.id == deployment else "active"


def encode_attributes(attributes: Mapping[str, str | int]) -> list[KeyValue]:
    """Return OTLP's attributes, each text cut at LONGEST bytes."""

    def encode(value: str | int) -> AnyValue:
        if isinstance(value, str):
            return AnyValue(string_value=value.encode()[:LONGEST].decode(errors="ignore"))
        return AnyValue(int_value=value)

    return [KeyValue(key=key, value=encode(value)) for key, value in attributes.items()]


class Tracer:
    """Makes the spans, and sends them in batches."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.ended: collections.deque[OtlpSpan] = collections.deque()
        self.room = SPANS  # in this window
        self.dropped = 0  # since the last line in the log

    def begin(self, request: Request) -> None:
        """Give a sampled request its span."""
        parents = request.values(b"traceparent")
        if len(parents) != 1 or not (parent := TRACEPARENT.fullmatch(parents[0])):
            return
        version, trace_id, parent_id, flags, more = parent.groups()
        valid = version != b"ff" and trace_id.strip(b"0") and parent_id.strip(b"0")
        if valid and int(flags, 16) & SAMPLED and not (version == b"00" and more):
            request.span = Span(self, request, parent)

    def add(self, span: OtlpSpan) -> None:
        """Keep an ended span until it is sent. Those beyond the receiver's rate are dropped."""
        if self.room and len(self.ended) < KEPT:
            self.room -= 1
            self.ended.append(span)
        else:
            self.dropped += 1

    async def run(self) -> None:
        """Send the spans until cancelled; then send what is left, for at most LAST_PUSH seconds."""
        window = time.monotonic() + WINDOW
        try:
            while True:
                await asyncio.sleep(PUSH_EVERY)
                await self.push()
                if time.monotonic() >= window:
                    window, self.room = time.monotonic() + WINDOW, SPANS
                    if self.dropped:
                        log.warning("%s spans were dropped: %s in 10 s", self.dropped, SPANS)
                        self.dropped = 0
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.push(), LAST_PUSH)

    async def push(self) -> None:
        """Send the spans that have ended. They stay if the receiver may take them later."""
        if not self.ended:
            return
        batch = list(self.ended)
        scope = ScopeSpans(scope=InstrumentationScope(name="pulse-railway"), spans=batch)
        resource = Resource(attributes=encode_attributes(resource_attributes()))
        spans = ResourceSpans(resource=resource, scope_spans=[scope])
        body = ExportTraceServiceRequest(resource_spans=[spans]).SerializeToString()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self.receiver.send, body, "application/x-protobuf")
        except urllib.error.HTTPError as error:
            if error.code in RETRYABLE:
                return
        except (OSError, http.client.HTTPException):
            return
        for _ in batch:
            self.ended.popleft()
