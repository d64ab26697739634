"""What the router bounds: times, sizes, counts. They are a value that is passed in, so that a test
has others than production. This imports nothing but the standard library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


def number_from_env(variable: str, default: Any, kind: type = float, env: Any = os.environ) -> Any:
    """A variable that holds seconds, or for int a whole number from 1. Raises SystemExit."""
    text = env.get(variable)
    if text and kind is int and not re.fullmatch(r"0*[1-9]\d{0,8}", text, re.ASCII):
        raise SystemExit(f"{variable} takes a whole number from 1, not {text!r}")
    if text and kind is float and not re.fullmatch(r"\d{1,9}(\.\d*)?", text, re.ASCII):
        raise SystemExit(f"{variable} takes a number of seconds, not {text!r}")
    return kind(text) if text else default


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the router waits, and how much it takes: passed to what heeds them. Railway's edge
    has its own: a head of 32 KB, 15 minutes for a request, 60 s for an idle connection."""

    # a client's connection
    connections: int = 1 << 30  # clients and tunnels; `serve` bounds them by the descriptors
    descriptors_kept: int = 64  # for the store, the listening socket, files
    head_bytes: int = 64 * 1024
    header_count: int = 512
    head_seconds: float = 30.0  # until a request's head is in
    framing_bytes: int = 16 * 1024  # chunk extensions and trailers, beyond 16 bytes a chunk
    pipelined_requests: int = 64  # that wait for the answers before theirs
    body_ahead_bytes: int = 64 * 1024  # read before the backend has taken what came earlier
    body_stall_seconds: float = 60.0  # until the next piece of a body
    write_stall_seconds: float = 300.0  # until the client takes the next piece of its answer
    keep_alive_seconds: float = 75.0  # of an idle connection: the edge closes first
    idle_close_grace_seconds: float = 0.5  # at shutdown: a request may be on its way
    linger_pause_seconds: float = 5.0  # of an upload that is dropped, after an early answer
    linger_seconds: float = 30.0  # all of it
    # a backend's connection
    connect_seconds: float = 5.0
    resolved_seconds: float = 5.0  # that an address is remembered
    resolver_threads: int = 64  # names looked up at once; a bad one may take many seconds
    response_seconds: float = 900.0  # until an answer begins, and between two pieces of it
    handshake_seconds: float = 30.0  # until a WebSocket handshake is answered
    answer_head_bytes: int = 256 * 1024
    continue_seconds: float = 1.0  # a backend that ignores `Expect` gets the body after this
    upstream_idle_seconds: float = 4.0  # uvicorn closes idle connections after 5 s
    unsafe_idle_seconds: float = 1.0  # the same, for a request that may not be repeated
    idle_upstreams: int = 256  # idle connections of a deployment
    backend_seconds: float = 5.0  # until a question of the router's own is answered
    # a tunnel
    half_closed_seconds: float = 60.0  # of silence
    flush_seconds: float = 30.0  # to write what is left when the other end has gone
    # assets that one deployment lacks and another has
    hedge_delay_seconds: float = 0.2  # until the next deployment is asked too
    hedge_timeout_seconds: float = 1.5  # until a hedged request is answered
    ejection_seconds: float = 30.0  # that a deployment which gave no answer is not asked
    asset_location_seconds: float = 300.0  # that the deployment which had one is remembered
    asset_locations: int = 2000
    asset_location_path_bytes: int = 512  # a longer path is not remembered
    # the routing state
    start_seconds: float = 2.0  # for the first load; 503 is answered after that
    redis_seconds: float = 3.0
    refresh_seconds: float = 15.0  # between two reads: 0.3.x writers announce nothing
    lookup_seconds: float = 1.0  # between two reads for unknown ids
    missing_seconds: float = 90.0  # that a deployment without record has to answer, or to fail
    parallel_looks: int = 3  # at those deployments; the loop has five threads or more
    provisional_seconds: float = 1.0  # between two tries while there is no state
    scan_share: float = 0.02  # of the time, for looking for records that nobody announced
    scan_step_seconds: float = 90.0
    report_seconds: float = 10.0  # between two reports while counters change
    report_idle_seconds: float = 45.0
    # the process
    restarts: int = 3  # of a background task in `restart_seconds`; then the process ends
    restart_seconds: float = 60.0
    shutdown_seconds: float = 25.0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Limits:
        """The limits, with those that the environment sets. Raises SystemExit."""
        variables = {
            "half_closed_seconds": "PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS",
            "response_seconds": "PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT",
            "shutdown_seconds": "PULSE_RAILWAY_ROUTER_SHUTDOWN_SECONDS",
        }
        other, default = {}, cls()
        for name, variable in variables.items():
            other[name] = number_from_env(variable, getattr(default, name), env=env)
        return replace(default, **other)


DEFAULT_LIMITS = Limits()
