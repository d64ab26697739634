"""Railway's edge on this machine: TLS in front of a service's process, one port a domain.

The edge is the router's own proxy with one deployment in its table, so it has the router's
streaming, WebSockets and back-pressure. It adds the headers that Railway's edge sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import trustme
import uvicorn
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse

from pulse_railway import runtime_image

MAX_KNOWN = 8  # replicas, and those of the deployment before
router: Any = runtime_image.load("router")


def certificates(root: Path) -> tuple[Path, Path]:
    """Return the file of the edge's key and certificates, and a CA bundle to trust it with.

    Both are made on first use, in a folder that is there. The bundle has the public roots too, so
    that a shell which uses it still reaches other sites.
    """
    key, bundle = root / "edge.pem", root / "ca-bundle.pem"
    if not key.exists() or not bundle.exists():
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost", "127.0.0.1", "::1")
        key.touch(0o600)
        certificate.private_key_and_cert_chain_pem.write_to_path(str(key))
        import certifi

        bundle.write_bytes(Path(certifi.where()).read_bytes() + authority.cert_pem.bytes())
    return key, bundle


class EdgeClient(router.Client):  # type: ignore[misc]
    """A client's connection to the edge. Every request gets the edge's headers."""

    fields: list[tuple[bytes, bytes, bytes]]

    def __init__(self, edge: Edge, **options: Any) -> None:
        super().__init__(**options)
        self.edge = edge

    def on_headers_complete(self) -> None:
        added = {
            b"x-real-ip": self.peer or b"127.0.0.1",
            b"x-forwarded-proto": b"https",
            b"x-forwarded-host": next((v for _, n, v in self.fields if n == b"host"), b""),
            b"x-request-start": b"t=%d" % (time.time() * 1000),
        }
        kept = [field for field in self.fields if field[1] not in added]
        self.fields[:] = kept + [(name, name, value) for name, value in added.items()]
        super().on_headers_complete()

    def route(self, request: Any) -> None:
        self.spawn(self.serve(request))

    async def serve(self, request: Any) -> None:
        if page := self.edge.page():
            response = HTMLResponse(FAILED, 502) if page == "html" else failed_response()
            self.answer(request, response)
            return
        deployment = self.edge.deployment()
        if deployment is None:
            body = {"status": "error", "message": "Application not found"}
            self.answer(request, JSONResponse(body, 404))
            return
        try:
            await router.forward(request, deployment, hedge=False)
        except router.UpstreamError:
            self.answer(request, failed_response())


FAILED = "<!doctype html><title>502</title><h1>Application failed to respond</h1>"


def failed_response() -> JSONResponse:
    body = {"status": "error", "code": 502, "message": "Application failed to respond"}
    return JSONResponse(body, 502)


class EdgeServer(router.Server):  # type: ignore[misc]
    """One of several servers in a process, so it does not handle signals."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Edge:
    """One public address.

    Args:
        port: the port on the loopback, for IPv4 and IPv6.
        key: the file of the key and certificates.
        target: returns the port of the process that gets the requests now, or None.
        page: returns `html` or `json` if every answer is a 502 of the edge itself, else "".
    """

    def __init__(
        self,
        port: int,
        key: Path,
        target: Callable[[], int | None],
        page: Callable[[], str] = lambda: "",
    ) -> None:
        self.port, self.key, self.target, self.page = port, key, target, page
        self._known: dict[int, Any] = {}  # the deployments, with their connections, by port
        self.server: Any = None
        self.task: asyncio.Task[None] | None = None

    def deployment(self) -> Any:
        port = self.target()
        if port is None:
            return None
        if port not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[port] = router.Deployment("", "active", "127.0.0.1", port, b"")
        return self._known[port]

    async def start(self) -> None:
        config = uvicorn.Config(
            Starlette(),
            http=cast(Any, functools.partial(EdgeClient, self)),
            ws="none",
            loop="asyncio",
            interface="asgi3",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            ssl_keyfile=str(self.key),
            ssl_certfile=str(self.key),
            timeout_graceful_shutdown=1,
        )
        sockets = [socket.create_server(("127.0.0.1", self.port), backlog=512)]
        with contextlib.suppress(OSError):  # a machine without IPv6
            sockets.append(
                socket.create_server(("::1", self.port), family=socket.AF_INET6, backlog=512)
            )
        self.server = EdgeServer(config)
        self.task = asyncio.create_task(self.server.serve(sockets))
        while not self.server.started and not self.task.done():
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        if self.server and self.task:
            self.server.should_exit = True
            self.server.force_exit = True
            await asyncio.wait([self.task], timeout=3)
