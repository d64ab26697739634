"""Two real Pulse apps of one product, behind a real router, with one Redis for everything."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from pulse_railway.local.supervisor import free_port
from tests.conftest import Process, Redis
from tests.net import eventually

APP = """
import pulse as ps
from pulse_railway import RailwayPlugin, RailwaySessionStore

app = ps.App(
    routes=[],
    plugins=[RailwayPlugin()],
    session_store=RailwaySessionStore(),
    cookie=ps.Cookie("session", secure=False),
)

@app.fastapi.get("/put")
async def put(name: str, value: str):
    ps.session()[name] = value
    return dict(ps.session())

@app.fastapi.get("/session")
async def session():
    return dict(ps.session())
"""


@pytest.fixture
def redis_that_lasts(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(folder=tmp_path)
    yield server
    server.stop()


@pytest.fixture
def address(
    redis_that_lasts: Redis, run_router: Callable[..., Process], tmp_path: Path
) -> Iterator[str]:
    """Of the router; `a` is draining and `b` is active."""
    (tmp_path / "main.py").write_text(APP)
    with contextlib.ExitStack() as stack:
        for at, name in enumerate(("a", "b")):
            port = free_port()
            command = [sys.executable, "-m", "uvicorn", "main:app.asgi_factory", "--factory"]
            command += ["--port", str(port)]
            env = {
                "PULSE_DEPLOYMENT_ID": name,
                "PULSE_RAILWAY_INTERNAL_TOKEN": "secret",
                "PULSE_RAILWAY_REDIS_URL": redis_that_lasts.url,
                "PULSE_REACT_SERVER_ADDRESS": "http://127.0.0.1:9",
                "PULSE_ENV": "dev",
            }
            process = Process(command, port, env, tmp_path).wait(60)  # it writes routes there
            stack.callback(process.stop)
            state = "active" if name == "b" else "draining"
            address = f"http://127.0.0.1:{port}"
            redis_that_lasts.deployment(name, address, state, registered_at=at)
        router = f"http://127.0.0.1:{run_router(redis_that_lasts).port}"
        metas = [f"{router}/_pulse/meta?pulse_deployment={name}" for name in ("a", "b")]
        eventually(lambda: all(httpx.get(meta).status_code == 200 for meta in metas), 60)
        yield router


def test_a_login_on_the_new_version_is_not_undone_by_an_old_tab(
    address: str, redis_that_lasts: Redis
) -> None:
    with httpx.Client(base_url=address) as browser:

        def on(deployment: str, path: str) -> dict[str, str]:
            answer = browser.get(path, headers={"x-pulse-deployment": deployment})
            assert answer.headers["x-pulse-selected-deployment"] == deployment
            return dict(answer.json())

        assert on("a", "/put?name=theme&value=dark") == {"theme": "dark"}
        assert on("b", "/put?name=user&value=ada") == {"theme": "dark", "user": "ada"}
        # a holds the session in memory since before the login, and saves it whole
        assert on("a", "/put?name=theme&value=light")["theme"] == "light"
        assert on("b", "/session")["user"] == "ada"
    key = next(redis_that_lasts.client.scan_iter("pulse:session:*"))
    stored = str(redis_that_lasts.client.get(key))
    assert "ada" in stored
    assert "light" in stored


def test_a_redis_restart_under_load_costs_nobody_an_error(
    address: str, redis_that_lasts: Redis
) -> None:
    seen: Counter[int] = Counter()
    lost: list[str] = []
    slowest = [0.0]
    over = threading.Event()

    def somebody(deployment: str, stays: bool) -> None:
        browser = httpx.Client(base_url=address, timeout=10)
        kept: dict[str, str] = {}
        turn = 0
        while not over.is_set():
            turn += 1
            if not stays:
                browser.cookies.clear()
                kept = {}
            began = time.monotonic()
            answer = browser.get(
                f"/put?name=n&value={turn}", headers={"x-pulse-deployment": deployment}
            )
            slowest[0] = max(slowest[0], time.monotonic() - began)
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                kept["n"] = str(turn)
                if answer.json() != kept:
                    lost.append(f"{deployment} {answer.json()}, not {kept}")
            time.sleep(0.02)
        browser.close()

    people = [
        threading.Thread(target=somebody, args=(deployment, stays))
        for deployment in ("a", "b")
        for stays in (True, True, False)
    ]
    for person in people:
        person.start()
    try:
        for away in (0.0, 3.0):
            time.sleep(1)
            redis_that_lasts.stop()
            time.sleep(away)
            redis_that_lasts.start()
        time.sleep(2)
    finally:
        over.set()
        for person in people:
            person.join()
    assert set(seen) == {200}, seen
    assert not lost
    assert sum(seen.values()) > 200
    assert slowest[0] < 4, slowest
