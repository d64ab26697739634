"""A visitor of the example app: one browser tab, which behaves as Pulse's own client."""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import Any, Self, cast

import aiohttp
import socketio
from pulse.serializer import deserialize, serialize

ROUTE = {
    "pathname": "/",
    "hash": "",
    "query": "",
    "queryParams": {},
    "pathParams": {},
    "catchall": [],
}


class Visitor:
    """`async with Visitor(address, bundle) as tab: await tab.open(); await tab.connect()`.

    Args:
        address: the router's public address.
        bundle: certificates to trust.
        cookie: the session cookie of an earlier visit.
        transports: Socket.IO transports to use, in order.
    """

    def __init__(
        self,
        address: str,
        bundle: str,
        *,
        cookie: str | None = None,
        transports: tuple[str, ...] = ("websocket",),
    ) -> None:
        self.address = address
        self.cookie = cookie
        self.transports = list(transports)
        self.directives: dict[str, Any] = {}
        self.tab = self.session = 0  # the counts that the page shows
        self.greeting = ""
        self.reloads = 0
        self._context = ssl.create_default_context(cafile=bundle)
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        def session(jar: aiohttp.abc.AbstractCookieJar) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(ssl=self._context)
            return aiohttp.ClientSession(connector=connector, cookie_jar=jar)

        self._http = session(aiohttp.DummyCookieJar())
        # python-engineio moves the cookie from its headers into the jar
        self._socket_http = session(aiohttp.CookieJar(unsafe=True))
        self._socket = socketio.AsyncClient(http_session=self._socket_http, reconnection=False)
        self._socket.on("message", self._on_message)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()
        await self._http.close()
        await self._socket_http.close()

    @property
    def affinity(self) -> str | None:
        return self.directives.get("query", {}).get("pulse_deployment")

    @property
    def connected(self) -> bool:
        return bool(self._socket.connected)

    def _headers(self) -> dict[str, str]:
        return {"cookie": f"pulse.sid={self.cookie}"} if self.cookie else {}

    async def open(self) -> None:
        """Prerender the page, and store its cookie, directives and counts."""
        async with self._http.post(
            f"{self.address}/_pulse/prerender",
            json={"paths": ["/"], "routeInfo": ROUTE},
            headers=self._headers() | self.directives.get("headers", {}),
            params=self.directives.get("query", {}),
        ) as answer:
            answer.raise_for_status()
            if "pulse.sid" in answer.cookies:
                self.cookie = answer.cookies["pulse.sid"].value
            page = cast(dict[str, Any], deserialize(await answer.json()))
        self.directives = page["directives"]
        self._read(str(page["views"]["/"]["vdom"]))

    async def connect(self) -> None:
        """Open the Socket.IO connection, with the directives' query and auth."""
        options = self.directives["socketio"]
        query = "&".join(f"{k}={v}" for k, v in options["query"].items())
        await self._socket.connect(
            f"{self.address}/?{query}",
            auth={**options["auth"], "__pulse_page_instance_id": "one"},
            headers=self._headers(),
            transports=self.transports,
            wait_timeout=20,
        )
        await self._emit({"type": "attach", "path": "/", "routeInfo": ROUTE})

    async def count(self) -> None:
        """Press the button, and wait until the page shows the next count."""
        before = self.tab
        await self._emit({"type": "callback", "path": "/", "callback": "4.onClick", "args": []})
        async with asyncio.timeout(10):
            while self.tab == before:
                self._changed.clear()
                await self._changed.wait()

    async def meta(self) -> str | None:
        """Return the deployment that answers this tab's requests."""
        async with self._http.get(
            f"{self.address}/_pulse/meta",
            params=self.directives.get("query", {}),
            headers=self._headers(),
        ) as answer:
            return cast(str | None, (await answer.json()).get("deployment_id"))

    async def leave(self) -> None:
        if self._socket.connected:
            await self._socket.disconnect()

    async def _emit(self, message: dict[str, Any]) -> None:
        await self._socket.emit("message", list(serialize(message)))

    def _on_message(self, data: Any) -> None:
        message = cast(dict[str, Any], deserialize(data))
        if message["type"] == "reload":
            self.reloads += 1
        self._read(str(message))
        self._changed.set()

    def _read(self, text: str) -> None:
        if match := re.search(r"tab has counted to (\d+)", text):
            self.tab = int(match[1])
        if match := re.search(r"session has counted to (\d+)", text):
            self.session = int(match[1])
