"""The app's side of pulse-railway: `RailwayPlugin`, given to `ps.App(plugins=[...])`."""

from __future__ import annotations

import asyncio
import functools
import hmac
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, override

import pulse as ps
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse

from pulse_railway import contract, naming
from pulse_railway.app.session import RailwaySessionStore

NAME_LIMIT = 64  # characters of the app's name
SIBLING_TIMEOUT = 3.0  # seconds: router and janitor wait for 5
AFFINITY_SCRIPT = Path(__file__).with_name("affinity.js")


class RailwayPluginError(ValueError):
    """What the plugin was given does not fit."""


class RailwayPlugin(ps.Plugin):
    """Ties every tab to the deployment that served it, and says how the app is deployed.

    At run time (where `PULSE_DEPLOYMENT_ID` is set) it puts the affinity into Pulse's directives,
    answers `/_pulse/meta`, and serves the two internal endpoints the janitor uses, and the script
    that gives `fetch` in the browser its affinity (affinity.js). Everywhere else it only carries
    configuration for `pulse-railway`, whose flags win over it.

    Args:
        name: the app's. A stack that serves an app of another name refuses its deploy.
        dockerfile: the app's Dockerfile, relative to the deploy context.
        project, environment: Railway names. What is not set must follow from flags or the token.
        deployment_name: prefix of generated deployment ids; `prod` where not set.
        image_repository: push images here instead of building on Railway.
        runtime_image: a published image with router.py and janitor.py; where not set, they are
            built on Railway.
        start_command: how a backend starts, instead of `contract.START_COMMAND`.
        pre_deploy: a command that Railway runs in the new image before it starts, such as a
            migration; where it fails, so does the deploy (Railway's preDeployCommand). The old
            version serves meanwhile and after it, so it has to stand what the command changes.
        check_path: the page that has to come up before a deployment is promoted.
        instances: how many processes a deployment runs, in its one container.
        region, memory_gb, vcpus: where a backend runs, and what it may use; where not set, as the
            active one, which may have been changed on Railway's page.
        router_service, janitor_service, redis_service, env_service: names of the stable services.
        service_prefix: put before every service's name; at most 8 characters with its dash.

    Raises ValueError for a name that cannot be one, a check_path that is no path, or a number of
    instances out of range.
    """

    priority = 100

    def __init__(
        self,
        *,
        name: str | None = None,
        dockerfile: str | os.PathLike[str] | None = None,
        project: str | None = None,
        environment: str | None = None,
        deployment_name: str | None = None,
        image_repository: str | None = None,
        runtime_image: str | None = None,
        start_command: str | None = None,
        pre_deploy: str | None = None,
        check_path: str = "/",
        instances: int = 1,
        region: str | None = None,
        memory_gb: float | None = None,
        vcpus: float | None = None,
        router_service: str | None = None,
        janitor_service: str = contract.DEFAULT_JANITOR,
        redis_service: str = contract.DEFAULT_REDIS,
        env_service: str = contract.DEFAULT_ENV,
        service_prefix: str | None = None,
    ) -> None:
        if not check_path.startswith("/"):
            raise RailwayPluginError(
                f"check_path must start with a slash, as in {'/' + check_path!r}"
            )
        if name is not None and not (name.isprintable() and 0 < len(name) <= NAME_LIMIT):
            raise RailwayPluginError(f"name takes 1 to {NAME_LIMIT} printable characters")
        try:
            self.instances = contract.parse_instances(instances)
        except ValueError as error:
            raise RailwayPluginError(f"instances takes {error}") from None
        self.name = name
        self.dockerfile = os.fspath(dockerfile) if dockerfile else None
        self.project = project
        self.environment = environment
        self.deployment_name = deployment_name
        self.image_repository = image_repository
        self.runtime_image = runtime_image
        self.start_command = start_command
        self.pre_deploy = pre_deploy
        self.check_path = check_path
        self.region = region
        self.memory_gb = memory_gb
        self.vcpus = vcpus
        self.service_prefix = naming.service_prefix(service_prefix)
        router = router_service or contract.DEFAULT_ROUTER
        self.router_service = naming.baseline_name(self.service_prefix, router)
        # an app that names its router, also by the default name, means no other stack
        self.router_is_named = bool(router_service) or self.router_service != router
        self.janitor_service = naming.baseline_name(self.service_prefix, janitor_service)
        self.redis_service = naming.baseline_name(self.service_prefix, redis_service)
        self.env_service = naming.baseline_name(self.service_prefix, env_service)
        self.deployment_id = ""
        self.instance = self.running_instances = 1
        self._internal_token = ""
        render_pages_here()

    @property
    def enabled(self) -> bool:
        """Does this process run as a deployment behind the router?"""
        return bool(self.deployment_id)

    @override
    def on_startup(self, app: ps.App) -> None:
        """Raises RuntimeError where the session store has no address. Pulse only logs what the
        store's own `init` raises, and every request would be a 500 until somebody acts; this ends
        the process, so that Railway starts it again."""
        store = app.session_store
        if isinstance(store, RailwaySessionStore):
            _ = store.client
            if store.ttl is None:
                store.ttl = app.cookie.max_age_seconds
        self.deployment_id = os.environ.get(contract.DEPLOYMENT_ID, "")
        self._internal_token = os.environ.get(contract.INTERNAL_TOKEN, "")
        if number := os.environ.get(contract.INSTANCE):  # `serve` runs several
            self.instance = contract.parse_instances(number)
            self.running_instances = contract.parse_instances(
                os.environ.get(contract.INSTANCES) or "1"
            )

    @property
    def affinity(self) -> str:
        """What names this process: the deployment's id, behind the first one with its number."""
        number = f".{self.instance}" if self.instance > 1 else ""
        return f"{self.deployment_id}{number}"

    @override
    def middleware(self) -> list[ps.PulseMiddleware]:
        return [_Affinity(self)]

    @override
    def on_setup(self, app: ps.App) -> None:
        """Adds our endpoints, as plain Starlette routes: an app's `PulseMiddleware.api` stands
        around FastAPI's, and one that turns strangers away there would lock out `deploy` and the
        janitor. Raises RailwayPluginError for a Pulse that lacks what they need."""
        needed = ("fastapi", "render_sessions", "reload_connected_clients")
        if absent := [name for name in needed if not hasattr(app, name)]:
            raise RailwayPluginError(
                f"this version of Pulse has no {', '.join(absent)} on ps.App, which pulse-railway"
                " needs: use a newer pulse-railway"
            )

        async def meta(_: Request) -> JSONResponse:
            self._require_enabled()
            found: dict[str, Any] = {"status": "ok", "deployment_id": self.deployment_id}
            found |= {"instance": self.instance, "instances": self.running_instances}
            prefix = getattr(app, "api_prefix", None)  # goes in a later Pulse
            return JSONResponse({**found, "api_prefix": prefix} if prefix else found)

        async def sessions(request: Request) -> JSONResponse:
            self._require_token(request)
            siblings = await self._ask_siblings("GET", contract.SESSIONS_PATH)
            count = len(app.render_sessions) + _sum(siblings, "render_session_count")
            return JSONResponse(
                {
                    "deployment_id": self.deployment_id,
                    "render_session_count": count,
                    "drainable": count == 0,
                    "session_timeout_seconds": getattr(app, "session_timeout", None),
                }
            )

        async def reload(request: Request) -> JSONResponse:
            self._require_token(request)
            connected = sum(render.connected for render in app.render_sessions.values())
            reloaded = await app.reload_connected_clients()
            siblings = await self._ask_siblings("POST", contract.RELOAD_PATH)
            return JSONResponse(
                {
                    "deployment_id": self.deployment_id,
                    "connected_render_count": connected + _sum(siblings, "connected_render_count"),
                    "reloaded_socket_count": reloaded + _sum(siblings, "reloaded_socket_count"),
                }
            )

        async def script(_: Request) -> FileResponse:
            cached = {"cache-control": "public, max-age=300"}
            return FileResponse(AFFINITY_SCRIPT, media_type="text/javascript", headers=cached)

        async def stay(_: Request) -> JSONResponse:
            # a router whose deployment's tabs move answers this itself
            return JSONResponse({"move": False}, headers={"cache-control": "no-store"})

        for path, endpoint, method in (
            (contract.META_PATH, meta, "GET"),
            (contract.SCRIPT_PATH, script, "GET"),
            (contract.MOVE_PATH, stay, "GET"),
            (contract.SESSIONS_PATH, sessions, "GET"),
            (contract.RELOAD_PATH, reload, "POST"),
        ):
            app.fastapi.router.add_route(path, endpoint, [method], include_in_schema=False)

    async def _ask_siblings(self, method: str, path: str) -> list[dict[str, Any]]:
        """Ask the other processes of this deployment, if this is the first, which speaks for all:
        routers and janitors of any version ask one address, and delete a version without tabs.

        Raises HTTPException (503) for one that does not answer: its tabs are not known.
        """
        if self.instance > 1 or self.running_instances == 1:
            return []
        import httpx  # takes memory that most apps need not spend

        first = int(os.environ.get(contract.PORT) or contract.DEFAULT_PORT)
        headers = {contract.INTERNAL_TOKEN_HEADER: self._internal_token}

        async def ask(number: int) -> dict[str, Any]:
            url = f"http://127.0.0.1:{first + number - 1}{path}"
            try:
                answer = await client.request(method, url, headers=headers)
                found = answer.raise_for_status().json()
                if found["deployment_id"] != self.deployment_id:
                    raise ValueError
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                raise HTTPException(503, f"instance {number} does not answer") from None
            return dict(found)

        numbers = range(2, self.running_instances + 1)
        async with httpx.AsyncClient(timeout=SIBLING_TIMEOUT, trust_env=False) as client:
            answers = await asyncio.gather(*map(ask, numbers), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, dict)]

    def _require_enabled(self) -> None:
        if not self.enabled:
            raise HTTPException(503, f"{contract.DEPLOYMENT_ID} is not set")

    def _require_token(self, request: Request) -> None:
        self._require_enabled()
        given = request.headers.get(contract.INTERNAL_TOKEN_HEADER, "")
        expected = self._internal_token
        if not expected or not hmac.compare_digest(given.encode(), expected.encode()):
            raise HTTPException(403, "forbidden")


class _Affinity(ps.PulseMiddleware):
    """Adds the deployment to what the browser is told to send back, and gives a tab that opens or
    connects its session as the other deployments have left it."""

    def __init__(self, plugin: RailwayPlugin) -> None:
        super().__init__()
        self._plugin = plugin

    @override
    async def prerender(
        self,
        *,
        payload: ps.PrerenderPayload,
        request: ps.PulseRequest,
        session: dict[str, Any],
        next: Callable[[], Awaitable[ps.PrerenderResponse]],
    ) -> ps.PrerenderResponse:
        await _as_others_left_it(session)
        response = await next()
        if self._plugin.enabled and isinstance(response, ps.Ok):
            directives = response.payload["directives"]
            deployment = self._plugin.affinity
            directives["query"][contract.AFFINITY_QUERY] = deployment
            # a coming Pulse navigates over its socket, and sends headers alone where it has none
            directives["headers"][contract.AFFINITY_HEADER] = deployment
            socket_query = directives["socketio"]["query"]
            socket_query[contract.AFFINITY_QUERY] = deployment
            socket_query[contract.RELOAD_QUERY] = "1"
        return response

    @override
    async def connect(
        self,
        *,
        request: ps.PulseRequest,
        session: dict[str, Any],
        next: Callable[[], Awaitable[ps.ConnectResponse]],
    ) -> ps.ConnectResponse:
        await _as_others_left_it(session)
        return await next()


def _sum(answers: list[dict[str, Any]], name: str) -> int:
    """Return the sum of a count. Raises HTTPException (503) for an answer without it."""
    counts = [answer.get(name) for answer in answers]
    if not all(type(count) is int for count in counts):
        raise HTTPException(503, f"an instance gave no {name}")
    return sum(count for count in counts if count)


async def _as_others_left_it(session: dict[str, Any]) -> None:
    context = ps.PulseContext.get()
    store = context.app.session_store
    if isinstance(store, RailwaySessionStore) and context.session is not None:
        await store.refresh(context.session.sid, session)


def internal_server_address() -> str:
    """The address of the Python process beside React's server, which a page is rendered by.

    Pulse's default is the public address; then a page of one deployment would be rendered by
    whichever deployment is active.
    """
    return f"http://127.0.0.1:{os.environ.get(contract.PORT) or contract.DEFAULT_PORT}"


def render_pages_here() -> None:
    """Have a build that passes no `internal_server_address` to `ps.App` get ours. Pulse writes the
    address into the generated routes, and has no hook for a plugin before that."""
    generate: Any = getattr(ps.App, "run_codegen", None)
    if generate is None or hasattr(generate, "__wrapped__"):
        return

    @functools.wraps(generate)
    def run_codegen(
        app: ps.App, address: str | None = None, internal_address: str | None = None
    ) -> None:
        has_plugin = any(isinstance(plugin, RailwayPlugin) for plugin in app.plugins)
        if has_plugin and app.env in ("prod", "ci") and not app.internal_server_address:
            internal_address = internal_server_address()
        generate(app, address, internal_address)

    setattr(ps.App, "run_codegen", run_codegen)  # noqa: B010


def plugins_of(app: ps.App) -> list[RailwayPlugin]:
    return [plugin for plugin in app.plugins if isinstance(plugin, RailwayPlugin)]


def plugin_of(app: ps.App) -> RailwayPlugin:
    """The app's one RailwayPlugin.

    Raises RailwayPluginError where it has none or several.
    """
    found = plugins_of(app)
    if len(found) != 1:
        how_many = f"{len(found)} RailwayPlugins" if found else "no RailwayPlugin"
        raise RailwayPluginError(
            f"the app has {how_many}; give it one: ps.App(plugins=[RailwayPlugin(...)])"
        )
    return found[0]


def web_root(app: ps.App) -> Path:
    """The folder of the app's React project."""
    return app.codegen.cfg.web_root
