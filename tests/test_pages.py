"""A page is seen before the promotion, and what a deployment said is shown where it failed."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from pulse_railway import errors
from pulse_railway.flows import reachability
from tests.conftest import ROOT, Project, pulse_railway
from tests.net import Backend, ok

SELECTED = "x-pulse-selected-deployment"


def page(status: str, deployment: str = "new") -> bytes:
    return f"HTTP/1.1 {status}\r\n{SELECTED}: {deployment}\r\ncontent-length: 0\r\n\r\n".encode()


def at(backend: Backend) -> Any:
    """A stack whose router is that."""
    return types.SimpleNamespace(address=backend.address, router=None, edge_failed=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "PAGE_TIMEOUT", 1.5)


def wait(backend: Backend, path: str = "/") -> list[str]:
    """Wait for a page of `new`; what the user was warned of."""
    said: list[str] = []
    output: Any = types.SimpleNamespace(warn=said.append)
    api: Any = None
    reachability.wait_until_rendered(api, at(backend), "new", path, output)
    return said


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", ["200 OK", "302 Found", "401 No", "404 Not Found"])
def test_any_answer_of_the_apps_own_will_do(status: str) -> None:
    with Backend(page(status)) as backend:
        wait(backend, "/a?b=c")
        assert backend.heads[0].startswith(b"GET /a?b=c&pulse_deployment=new ")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (page("502 Bad Gateway"), "status 502"),
        (page("500 Oops"), "status 500"),
        (page("200 OK", "old"), "status 200"),
        (ok(b"who?"), "status 200"),
    ],
)
def test_a_page_that_does_not_come_up(
    answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reachability, "send_probe", lambda *_: {"at": "answers", "status": 502})
    with Backend(answer) as backend:
        with pytest.raises(errors.Failure, match=rf"the page / took longer .* {said}"):
            wait(backend)


@pytest.mark.usefixtures("quick")
def test_a_page_that_only_the_edge_stands_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error page says nothing of the version: that is asked from inside."""
    monkeypatch.setattr(reachability, "send_probe", lambda *_: {"at": "answers", "status": 200})
    with Backend(ok(b"Application failed to respond", status="502 Bad Gateway")) as backend:
        assert wait(backend)[0].startswith("Railway's edge answers in place of the router at ")


@pytest.mark.usefixtures("quick")
def test_a_page_that_comes_up_late() -> None:
    with Backend(page("502 Bad Gateway")) as backend:
        threading.Timer(0.8, lambda: setattr(backend, "answer", page("200 OK"))).start()
        began = time.monotonic()
        wait(backend)
        assert time.monotonic() - began > 0.5


def test_a_real_app_whose_react_is_late_where_there_is_ipv6_alone(
    new_project: Callable[[], Project],
) -> None:
    """Nobody sees a 502: before, the promotion came first, and React's server seconds later."""
    project = new_project()
    app = "examples/railway/main.py"
    orders = {"react_delay": 14, "ipv6_only": True, "name_delay": 1.5, "clock": False}
    project.faults(**orders)
    env = project.env
    assert pulse_railway("ensure", app, env=env, cwd=ROOT).code == 0
    done = pulse_railway("deploy", app, "--json", env=env, cwd=ROOT)
    assert done.code == 0, done.err
    address = done.json["address"]
    assert project.stage.get(address + "/").status_code == 200
    assert float(done.err.split("✓ see its page / ")[1].split()[0]) > 0.5


def test_why_it_did_not_come_up(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.ok("ensure", "main.py")
    before = project.services
    verb = project.run("deploy", "main.py", "--env", "TINY_FAILS=whatever it was")
    assert verb.code == 1
    assert "its runtime log ended with" in verb.err
    assert "RuntimeError: ***" in verb.err  # a variable's value may be a secret
    assert project.services == before
