"""affinity.js in a real browser, behind a real router with two deployments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

from pulse_railway.app import plugin
from tests.conftest import Process, Redis
from tests.net import Backend, Connection, ask, eventually, header, ok
from tests.test_browser import CHROMIUM, FLAGS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

PAGE = b"""<!doctype html><script src="/_pulse/railway/affinity.js"></script>
<script>
  const before = sessionStorage.getItem("__PULSE_DIRECTIVES");
  // what Pulse's client does once its layout is drawn
  const query = { pulse_deployment: "NAME" };
  sessionStorage.setItem("__PULSE_DIRECTIVES", JSON.stringify({ query }));
  const ask = async (input, init) => {
    const answer = await fetch(input, init);
    return answer.ok ? answer.json() : { status: answer.status };
  };
</script>NAME"""


def backend(name: str) -> Backend:
    def handle(connection: Connection) -> None:
        while head := connection.head():
            body = connection.read(int(header(head, "content-length") or 0))
            path = head.split()[1]
            if path.endswith(b".js"):
                connection.send(
                    ok(plugin.AFFINITY_SCRIPT.read_bytes(), "content-type: text/javascript")
                )
            elif path.startswith((b"/data", b"/old.data")):
                told = header(head, "x-pulse-deployment")
                said = {"from": name, "told": told, "body": body.decode()}
                connection.send(ok(json.dumps(said).encode(), "content-type: application/json"))
            else:
                page = PAGE.replace(b"NAME", name.encode())
                connection.send(ok(page, "content-type: text/html"))

    return Backend(handle=handle)


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page()
        browser.close()


def test_an_old_tabs_own_calls_reach_its_deployment(
    redis_server: Redis, run_router: Callable[..., Process], page: Page
) -> None:
    def call(script: str) -> Any:
        return page.evaluate(f"ask({script})")

    with backend("a") as a, backend("b") as b, backend("other") as other:
        redis_server.deployment("a", a.address, "active", registered_at=1)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 200)
        page.goto(f"http://127.0.0.1:{port}/")

        redis_server.deployment("a", a.address, "draining", registered_at=1)
        redis_server.deployment("b", b.address, "active", registered_at=2)
        eventually(lambda: b"b" in ask(port, "/data").body.split(b'"')[3:4])
        assert call("'/data'")["from"] == "a"
        posted = call("new Request('/data', { method: 'POST', body: 'x' })")
        assert posted == {"from": "a", "told": "a", "body": "x"}
        assert call("'/data', { method: 'POST', body: 'y', headers: { accept: '*/*' } }") == {
            "from": "a",
            "told": "a",
            "body": "y",
        }
        # whoever names a deployment means it, and strangers are not told
        assert call("'/data?pulse_deployment=b'") == {"from": "b", "told": None, "body": ""}
        assert call("'/data', { headers: { 'x-pulse-deployment': 'b' } }")["from"] == "b"
        elsewhere = f"'http://127.0.0.1:{other.port}/data', {{ mode: 'no-cors' }}"
        page.evaluate(f"fetch({elsewhere})")
        eventually(lambda: other.connections)
        with pytest.raises(Exception, match="Failed to parse URL"):
            call("'http://'")

        # the page of another deployment does not go on with what the one before was told
        page.goto(f"http://127.0.0.1:{port}/next")
        assert page.evaluate("before") is None
        assert call("'/data'")["from"] == "b"


def test_a_loader_whose_deployment_is_gone_takes_the_page_there_anew(
    redis_server: Redis, run_router: Callable[..., Process], page: Page
) -> None:
    with backend("a") as a, backend("b") as b:
        redis_server.deployment("a", a.address, "active", registered_at=1)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 200)
        home = f"http://127.0.0.1:{port}"
        page.goto(f"{home}/")
        redis_server.deployment("b", b.address, "active", registered_at=2)
        redis_server.deployment("a", a.address, "draining", registered_at=1, retiring_at=2)
        eventually(lambda: ask(port, "/data?pulse_deployment=a").status == 409)
        assert page.evaluate("ask('/data')") == {"status": 409}  # an app's own call: the app's word
        page.evaluate("void fetch('/old.data?_routes=x&q=1')")
        page.wait_for_url(f"{home}/old?q=1")
        assert page.inner_text("body") == "b"
        for path, comes_to in (("/_root.data", "/"), ("/deep/er.data", "/deep/er")):
            script = f"sessionStorage.setItem('__PULSE_DIRECTIVES', '{DIRECTIVES}')"
            page.evaluate(f"{script}; void fetch('{path}')")
            page.wait_for_url(f"{home}{comes_to}")
        page.evaluate(
            f"sessionStorage.setItem('__PULSE_DIRECTIVES', '{DIRECTIVES}'); window.here = 1"
        )
        page.evaluate("void fetch('/deep/er.data', { method: 'POST', body: 'x' })")
        page.wait_for_function("window.here === undefined")


DIRECTIVES = json.dumps({"query": {"pulse_deployment": "gone"}})
