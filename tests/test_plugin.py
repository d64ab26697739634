"""The plugin's endpoints in a real Pulse app."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import httpx
import pulse as ps
import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from pulse_railway import RailwayPlugin, RailwayPluginError, RailwaySessionStore, contract

TOKEN = {contract.INTERNAL_TOKEN_HEADER: "secret-token"}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(contract.DEPLOYMENT_ID, "prod-1")
    monkeypatch.setenv(contract.INTERNAL_TOKEN, "secret-token")
    plugin = RailwayPlugin()
    app = ps.App(routes=[], plugins=[plugin], session_store=ps.InMemorySessionStore())
    plugin.on_startup(app)

    class Closed(APIRoute):
        """What a later Pulse's `PulseMiddleware.api` can make of every FastAPI route."""

        def get_route_handler(self) -> Any:
            async def refuse(request: Any) -> Any:
                return httpx.Response(401)

            return refuse

    app.fastapi.router.route_class = Closed
    plugin.on_setup(app)
    return TestClient(app.fastapi)


def test_they_stand_outside_what_an_app_puts_around_its_routes(client: Any) -> None:
    meta = client.get(contract.META_PATH)
    assert (meta.status_code, meta.json()["deployment_id"]) == (200, "prod-1")
    found = client.get(contract.SESSIONS_PATH, headers=TOKEN).json()
    assert (found["render_session_count"], found["drainable"]) == (0, True)
    assert client.post(contract.RELOAD_PATH, headers=TOKEN).json()["reloaded_socket_count"] == 0


@pytest.mark.parametrize("given", [{}, {contract.INTERNAL_TOKEN_HEADER: "wrong"}])
def test_strangers_are_told_nothing(client: Any, given: dict[str, str]) -> None:
    assert client.get(contract.SESSIONS_PATH, headers=given).status_code == 403
    assert client.post(contract.RELOAD_PATH, headers=given).status_code == 403
    assert client.post(contract.META_PATH).status_code == 405


def test_a_pulse_that_lacks_what_it_needs_is_named() -> None:
    class Later:
        fastapi = None

    later: Any = Later()
    with pytest.raises(RailwayPluginError, match="no render_sessions, reload_connected_clients"):
        RailwayPlugin().on_setup(later)


def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str, **more: Any) -> str:
    """The layout that Pulse writes for React's build."""
    monkeypatch.setenv("PULSE_ENV", env)
    config = ps.CodegenConfig(web_dir=str(tmp_path), base_dir=tmp_path)
    app = ps.App(routes=[], codegen=config, **{"plugins": [RailwayPlugin()], **more})
    app.run_codegen("https://public.example")
    return next(tmp_path.rglob("_layout.tsx")).read_text()


def test_a_page_is_rendered_by_the_process_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, an app that passed no address, such as Pulse's own example, had its pages rendered by
    whichever version was active."""
    here = 'internalServerAddress = "http://127.0.0.1:8000"'
    assert here in generated(tmp_path, monkeypatch, "ci")
    assert here not in generated(tmp_path, monkeypatch, "dev")
    assert here not in generated(tmp_path, monkeypatch, "ci", plugins=[])
    chosen = generated(tmp_path, monkeypatch, "ci", internal_server_address="http://own:1")
    assert 'internalServerAddress = "http://own:1"' in chosen


def test_a_browser_is_told_by_query_and_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.DEPLOYMENT_ID, "prod-1")
    plugin = RailwayPlugin()
    app = ps.App(routes=[], plugins=[plugin], session_store=ps.InMemorySessionStore())
    plugin.on_startup(app)
    (middleware,) = plugin.middleware()
    directives: Any = {"headers": {}, "query": {}, "socketio": {"headers": {}, "query": {}}}

    async def rendered() -> Any:
        return ps.Ok({"views": {}, "directives": directives})

    given: Any = {"payload": {}, "request": None, "session": {}}
    with ps.PulseContext(app=app):
        asyncio.run(middleware.prerender(**given, next=rendered))
    assert directives["query"] == {"pulse_deployment": "prod-1"}
    assert directives["headers"] == {"x-pulse-deployment": "prod-1"}
    expected = {"pulse_deployment": "prod-1", "pulse_reload_on_stale_affinity": "1"}
    assert directives["socketio"]["query"] == expected


def test_the_script_for_the_browser_is_served(client: Any) -> None:
    answer = client.get(contract.SCRIPT_PATH)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/javascript")
    assert contract.AFFINITY_HEADER in answer.text
    assert contract.AFFINITY_QUERY in answer.text
    assert contract.STALE_HEADER in answer.text
    assert contract.MOVE_PATH in answer.text


def test_an_idle_tab_stays_where_no_router_moves_it(client: Any) -> None:
    answer = client.get(f"{contract.MOVE_PATH}?idle=9999")
    assert (answer.json(), answer.headers["cache-control"]) == ({"move": False}, "no-store")


@pytest.mark.parametrize(
    ("module", "name", "is_as"),
    [
        ("plugin", "RailwayPlugin", RailwayPlugin),
        ("session", "RailwayRedisSessionStore", RailwaySessionStore),
        ("constants", "PULSE_DEPLOYMENT_ID", "PULSE_DEPLOYMENT_ID"),
        ("constants", "PULSE_RAILWAY_REDIS_URL", "PULSE_RAILWAY_REDIS_URL"),
        ("constants", "AFFINITY_QUERY_PARAM", "pulse_deployment"),
        ("constants", "INTERNAL_TOKEN_HEADER", "x-pulse-railway-internal-token"),
    ],
)
def test_what_an_app_imports_is_where_0_3_x_has_it(module: str, name: str, is_as: Any) -> None:
    """Pulse's own example reads `pulse_railway.constants`."""
    assert getattr(importlib.import_module(f"pulse_railway.{module}"), name) == is_as
