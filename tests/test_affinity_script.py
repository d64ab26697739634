"""affinity.js in a real browser, behind a real router with two deployments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from pulse_railway.app import plugin
from pulse_railway.local.supervisor import free_port
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


def backend(name: str) -> Any:
    def handle(connection: Connection) -> None:
        while head := connection.head():
            body = connection.read(int(header(head, "content-length") or 0))
            path = head.split()[1]
            if path.endswith(b".js"):
                connection.send(
                    ok(plugin.AFFINITY_SCRIPT.read_bytes(), "content-type: text/javascript")
                )
            elif path.startswith(b"/thrown.data"):
                connection.send(
                    b"HTTP/1.1 503 Thrown\r\nx-remix-response: yes\r\ncontent-length: 0\r\n\r\n"
                )
            elif path.startswith((b"/data", b"/old.data")):
                told = header(head, "x-pulse-deployment")
                answer = {"from": name, "told": told, "body": body.decode()}
                answers.append((path, answer))
                if b"text/event-stream" in head:
                    event = f"data: {json.dumps(answer)}\n\n".encode()
                    connection.send(ok(event, "content-type: text/event-stream"))
                else:
                    text = json.dumps(answer).encode()
                    connection.send(ok(text, "content-type: application/json"))
            elif path.startswith(b"/slow"):
                connection.read(1)  # no answer
            elif path.startswith(b"/plain"):  # outside of Pulse's layout
                script = b'<script src="/_pulse/railway/affinity.js"></script>'
                connection.send(ok(script, "content-type: text/html"))
            else:
                page = PAGE.replace(b"NAME", name.encode())
                connection.send(ok(page, "content-type: text/html"))

    found: Any = Backend(handle=handle)
    answers: list[tuple[bytes, dict[str, Any]]] = []
    found.answers = answers
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        keeps_pages = ["--disable-back-forward-cache"]  # Playwright's own default
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS, ignore_default_args=keeps_pages
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context() as context:
        yield context.new_page()


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


XHR = """(told) => new Promise((done) => {
  const request = new XMLHttpRequest();
  request.open("POST", "/data");
  if (told) request.setRequestHeader("X-Pulse-Deployment", told);
  request.onload = () => done(JSON.parse(request.responseText));
  request.send("z");
})"""
EVENTS = """(address) => new Promise((done) => {
  const source = new EventSource(address);
  source.onmessage = ({ data }) => { source.close(); done(JSON.parse(data)); };
})"""
FORM = """({ method, attributes, submit, prevent }) => {
  document.body.innerHTML = `<form method="${method}" action="/data"><input name="action" value="1">
    <button ${attributes}>send</button></form>`;
  const form = document.forms[0];
  if (prevent) {
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  if (submit) HTMLFormElement.prototype.submit.call(form);
  else form.querySelector("button").click();
}"""


@pytest.fixture
def two(
    redis_server: Redis, run_router: Callable[..., Process], page: Page
) -> Iterator[tuple[str, Any, Any]]:
    """A page of `a`, with `b` active since."""
    with backend("a") as a, backend("b") as b:
        redis_server.deployment("a", a.address, "active", registered_at=1)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 200)
        home = f"http://127.0.0.1:{port}"
        page.goto(f"{home}/")
        redis_server.deployment("a", a.address, "draining", registered_at=1)
        redis_server.deployment("b", b.address, "active", registered_at=2)
        eventually(lambda: b"b" in ask(port, "/data").body.split(b'"')[3:4])
        yield home, a, b


def test_other_requests_of_an_old_page_reach_its_deployment(
    two: tuple[str, Any, Any], page: Page
) -> None:
    _, a, _ = two
    assert page.evaluate(XHR, "")["from"] == "a"
    assert page.evaluate(XHR, "b") == {"from": "b", "told": "b", "body": "z"}
    assert page.evaluate(EVENTS, "/data")["from"] == "a"
    assert page.evaluate(EVENTS, "/data?pulse_deployment=b")["from"] == "b"
    a.answers.clear()
    page.evaluate("fetch('/data/1', { mode: 'no-cors' })")
    page.evaluate("fetch(new Request('/data/2', { method: 'POST', body: 'x', mode: 'no-cors' }))")
    assert a.answers == [
        (b"/data/1?pulse_deployment=a", {"from": "a", "told": None, "body": ""}),
        (b"/data/2?pulse_deployment=a", {"from": "a", "told": None, "body": "x"}),
    ]
    with pytest.raises(Exception, match="valid URL"):
        page.evaluate("new XMLHttpRequest().open('GET', 'http://')")


@pytest.mark.parametrize(
    ("attributes", "submit", "path"),
    [
        ("", False, b"/data?pulse_deployment=a"),
        ("", True, b"/data?pulse_deployment=a"),
        ("formaction='/data/other?q=1'", False, b"/data/other?q=1&pulse_deployment=a"),
        ("formaction='/data?pulse_deployment=b'", False, b"/data?pulse_deployment=b"),
    ],
)
def test_a_form_that_is_posted_reaches_the_deployment_of_its_page(
    two: tuple[str, Any, Any], page: Page, attributes: str, submit: bool, path: bytes
) -> None:
    """Before, Pulse's own example of a form lost its input after a promotion: 410."""
    _, a, b = two
    given = {"method": "post", "attributes": attributes, "submit": submit, "prevent": False}
    with page.expect_navigation():
        page.evaluate(FORM, given)
    named, other = (a, b) if b"=a" in path else (b, a)
    assert [given["body"] for p, given in named.answers if p == path] == ["action=1"]
    assert path not in [p for p, _ in other.answers]


def test_forms_that_are_left_alone(two: tuple[str, Any, Any], page: Page) -> None:
    """An address that is shared would keep strangers on an old version."""
    home, _, b = two
    given = {"method": "post", "attributes": "", "submit": False, "prevent": True}
    page.evaluate(FORM, given)
    assert page.evaluate("document.forms[0].getAttribute('action')") == "/data"
    for more in ({"attributes": ""}, {"attributes": "formmethod='get'", "method": "post"}):
        page.goto(f"{home}/?pulse_deployment=a")
        with page.expect_navigation():
            page.evaluate(FORM, given | {"method": "get", "prevent": False} | more)
        assert b.answers[-1][0] == b"/data?action=1"


def test_a_page_knows_its_version_from_its_document(two: tuple[str, Any, Any], page: Page) -> None:
    """Before, a page outside of Pulse's layout knew of none, and the active one answered it."""
    home, _, _ = two
    page.goto(f"{home}/plain?pulse_deployment=a")
    assert page.evaluate("fetch('/data').then((answer) => answer.json())")["from"] == "a"
    script = f"sessionStorage.setItem('__PULSE_DIRECTIVES', '{DIRECTIVES}')"
    page.evaluate(script)  # what another page of this tab was told
    assert page.evaluate("fetch('/data').then((answer) => answer.json())")["from"] == "a"


def test_a_page_that_comes_back_is_of_the_version_that_it_was(
    two: tuple[str, Any, Any], page: Page
) -> None:
    """After Back the next click went to the other version, and its state was lost."""
    home, _, _ = two
    page.evaluate("window.kept = 1")
    page.goto(f"{home}/next")
    assert "b" in page.evaluate("sessionStorage.getItem('__PULSE_DIRECTIVES')")
    page.go_back(wait_until="commit")  # a page that was kept is not loaded again
    assert page.evaluate("window.kept") == 1
    assert page.evaluate("JSON.parse(sessionStorage.getItem('__PULSE_DIRECTIVES')).query") == {
        "pulse_deployment": "a"
    }
    assert page.evaluate("ask('/data')")["from"] == "a"


def old_page(redis_server: Redis, page: Page, home: str, name: str, address: str) -> None:
    """Open a page of a deployment that is removed then."""
    port = int(home.rpartition(":")[2])
    redis_server.deployment(name, address, "draining", registered_at=1)
    eventually(lambda: ask(port, f"/data?pulse_deployment={name}").status == 200)
    page.goto(f"{home}/?pulse_deployment={name}")
    redis_server.deployment(name, address, "draining", registered_at=1, retiring_at=2)
    eventually(lambda: ask(port, f"/data?pulse_deployment={name}").status == 409)


def test_what_is_loaded_in_the_background_takes_no_page_away(
    redis_server: Redis, two: tuple[str, Any, Any], page: Page
) -> None:
    """Ten stale fetches gave ten `location.assign`."""
    home, a, _ = two
    old_page(redis_server, page, home, "gone", a.address)
    page.evaluate("window.here = 1")
    navigation = {"state": "idle"}
    script = "(n) => window.__reactRouterDataRouter = { state: { navigation: n } }"
    page.evaluate(script, navigation)
    asked = "Promise.all(Array.from({ length: 10 }, () => fetch('/old.data?_routes=x')))"
    assert page.evaluate(f"{asked}.then((all) => all.map((a) => a.status))") == [409] * 10
    assert page.evaluate("window.here") == 1
    target = {"state": "loading", "location": {"pathname": "/old"}}
    page.evaluate("(n) => { window.__reactRouterDataRouter.state.navigation = n }", target)
    navigations: list[str] = []

    def note(request: Request) -> None:
        if request.is_navigation_request():
            navigations.append(request.url)

    page.on("request", note)
    page.evaluate(f"void {asked}")
    page.wait_for_url(f"{home}/old")
    assert navigations == [f"{home}/old"]


def test_a_loader_whose_deployment_is_gone_takes_the_page_there_anew(
    redis_server: Redis, two: tuple[str, Any, Any], page: Page
) -> None:
    home, a, _ = two
    old_page(redis_server, page, home, "gone", a.address)
    assert page.evaluate("ask('/data')") == {"status": 409}  # an app's own call: the app's word
    for name, path, comes_to in (
        ("gone-1", "/old.data?_routes=x&q=1", "/old?q=1"),
        ("gone-2", "/_root.data", "/"),
        ("gone-3", "/deep/er.data", "/deep/er"),
        ("gone-5", "/deep/_.data?q=1", "/deep/?q=1"),  # React Router 8's, with a slash at the end
    ):
        old_page(redis_server, page, home, name, a.address)
        page.evaluate(f"void fetch('{path}')")
        page.wait_for_url(f"{home}{comes_to}")
        assert page.inner_text("body") == "b"
    old_page(redis_server, page, home, "gone-4", a.address)
    page.evaluate("window.here = 1; void fetch('/deep/er.data', { method: 'POST', body: 'x' })")
    page.wait_for_function("window.here === undefined")


STATE = "(state) => { window.__reactRouterDataRouter = { state } }"  # React Router's


def test_a_page_that_was_left_can_be_left_again_after_back(
    redis_server: Redis, two: tuple[str, Any, Any], page: Page
) -> None:
    """Every click on such a page waited for good."""
    home, a, _ = two
    old_page(redis_server, page, home, "gone", a.address)
    page.evaluate("window.kept = 1; void fetch('/old.data')")
    page.wait_for_url(f"{home}/old")
    page.go_back(wait_until="commit")
    assert page.evaluate("window.kept") == 1
    page.evaluate("void fetch('/old.data?q=1')")
    page.wait_for_url(f"{home}/old?q=1")


def loader(home: str) -> int:
    return ask(int(home.rpartition(":")[2]), "/old.data?pulse_deployment=a").status


@pytest.mark.parametrize(
    "pending",
    [
        "revalidation: 'loading', fetchers: new Map()",
        "fetchers: new Map([['1', { state: 'loading' }]])",
    ],
)
def test_a_fetcher_whose_deployment_is_gone_takes_the_page_to_the_active_one(
    redis_server: Redis, two: tuple[str, Any, Any], page: Page, pending: str
) -> None:
    """React Router put "409 Conflict" in place of the whole page."""
    home, a, _ = two
    redis_server.deployment("a", a.address, "draining", registered_at=1, retiring_at=2)
    eventually(lambda: loader(home) == 409)
    page.evaluate(f"({STATE})({{ navigation: {{ state: 'idle' }}, {pending} }})")
    page.evaluate("void Promise.all([1, 2, 3].map(() => fetch('/old.data?_routes=x')))")
    page.wait_for_function("window.__reactRouterDataRouter === undefined")
    assert page.url == f"{home}/"
    assert page.inner_text("body") == "b"


LOADER = "{ headers: { 'x-pulse-client-loader-location': location.origin + '/old?q=1' } }"
NAVIGATION = "{ navigation: { state: 'loading', location: { pathname: '/old', hash: '#there' } } }"
NAVIGATIONS = [f"({STATE})({NAVIGATION}), fetch('/old.data?q=1')", f"fetch('/data', {LOADER})"]


@pytest.mark.parametrize("navigation", NAVIGATIONS)
def test_a_navigation_waits_for_a_deployment_that_is_away_for_a_moment(
    redis_server: Redis, two: tuple[str, Any, Any], page: Page, navigation: str
) -> None:
    """One click in the second of a restart ended in React Router's error page."""
    home, a, _ = two
    dead = f"http://127.0.0.1:{free_port()}"
    redis_server.deployment("a", dead, "draining", registered_at=1)
    eventually(lambda: loader(home) == 502)
    script = "fetch('/old.data').then(({ status }) => status)"
    assert page.evaluate(script) == 502  # not a page of React Router's
    page.evaluate(f"void (window.asked = ({navigation}).then((answer) => answer.json()))")
    assert page.evaluate("fetch('/data').then(({ status }) => status)") == 502  # the app's own
    redis_server.deployment("a", a.address, "draining", registered_at=1)
    assert page.evaluate("asked")["from"] == "a"
    assert page.evaluate("ask('/thrown.data')") == {"status": 503}  # the app's own


@pytest.mark.parametrize("navigation", NAVIGATIONS)
def test_a_navigation_that_is_refused_loads_the_page(
    redis_server: Redis, two: tuple[str, Any, Any], page: Page, navigation: str
) -> None:
    """In maintenance, a click in an open tab ended in React Router's error page for good."""
    home, _, _ = two
    closed = json.dumps({"since": 1.0, "retry_after": 1})
    redis_server.client.set("pulse:railway:maintenance", closed)
    redis_server.client.publish("pulse:railway:events", "maintenance")
    eventually(lambda: loader(home) == 503)
    page.evaluate(f"void ({navigation})")
    page.wait_for_url(f"{home}/old?q=1{'#there' * ('hash' in navigation)}")
    assert "Back soon" in page.inner_text("body")


def test_an_apps_own_socket_reaches_the_deployment_of_its_page(
    two: tuple[str, Any, Any], page: Page
) -> None:
    _, a, b = two
    a.answers.clear()
    for script in ("'/data/ws'", "'ws://' + location.host + '/data/ws'", "'/data/ws', 'chat'"):
        page.evaluate(f"new WebSocket({script})")
        eventually(lambda: a.answers[-1:])
        path, _ = a.answers.pop()
        assert path == b"/data/ws?pulse_deployment=a&pulse_reload_on_stale_affinity=1"
    page.evaluate("new WebSocket('/data/ws?pulse_deployment=b')")
    eventually(lambda: b.answers[-1:] and b.answers[-1][0] == b"/data/ws?pulse_deployment=b")


DIRECTIVES = json.dumps({"query": {"pulse_deployment": "gone"}})


# -- tabs that nobody uses move over (`--move-idle`) -----------------------------------------------

EDITOR = """customElements.define("x-field", class extends HTMLElement {
    constructor() { super().attachShadow({ mode: "closed" }).innerHTML = "<input>"; }
  });
  document.body.innerHTML = `<input id=text value=old><input id=box type=checkbox>
  <textarea id=area></textarea><select id=list><option>1<option>2</select>
  <div id=rich contenteditable>old</div>
  <x-field></x-field>
  <iframe id=frame srcdoc="<input>"></iframe>`; window.here = 1"""


class IdleTab:
    """A page of `a`, whose idle tabs move to `b`, in a browser whose time the test makes pass."""

    def __init__(self, page: Page, home: str) -> None:
        self.page = page
        self.asked: list[str] = []
        page.on(
            "requestfinished",
            lambda r: self.asked.append(r.url) if "/railway/move" in r.url else None,
        )
        page.clock.install()
        page.goto(f"{home}/")
        page.evaluate(EDITOR)

    @property
    def is_here(self) -> bool:
        try:
            return bool(self.page.evaluate("window.here") == 1)
        except PlaywrightError:  # it is being loaded
            return True

    def idles(self, seconds: int = 130) -> None:
        """Let time pass, in all tabs."""
        self.page.clock.run_for(seconds * 1000)

    def asks(self) -> None:
        """Wait until it has asked and was answered."""
        eventually(lambda: self.page.wait_for_timeout(30) or self.asked)
        self.page.wait_for_timeout(30)

    def moves(self) -> None:
        self.idles()
        eventually(lambda: not self.is_here)
        assert self.page.inner_text("body") == "b"


@pytest.fixture
def idle_tabs(
    redis_server: Redis, run_router: Callable[..., Process], browser: Browser
) -> Iterator[Callable[[int], list[IdleTab]]]:
    """`idle_tabs(3)`: so many tabs of a version whose idle tabs move."""
    with backend("a") as a, backend("b") as b, browser.new_context() as context:
        redis_server.deployment("a", a.address, "active", registered_at=1)
        port = run_router(redis_server).port
        eventually(lambda: ask(port, "/").status == 200)

        def open_tabs(count: int) -> list[IdleTab]:
            home = f"http://127.0.0.1:{port}"
            tabs = [IdleTab(context.new_page(), home) for _ in range(count)]
            more = {"registered_at": 1, "moving_at": 5, "move_idle": 60}
            redis_server.deployment("a", a.address, "draining", **more)
            redis_server.deployment("b", b.address, "active", registered_at=2)
            eventually(lambda: b'"from": "b' in ask(port, "/data").body)
            return tabs

        yield open_tabs


def stay(*tabs: IdleTab) -> None:
    """Raise AssertionError if one of these tabs asks, or moves over, within a question's time."""
    tabs[0].idles(130)
    tabs[0].page.wait_for_timeout(100)
    assert [len(tab.asked) for tab in tabs] == [0] * len(tabs)
    assert all(tab.is_here for tab in tabs)


def test_a_tab_that_nobody_uses_moves_over(idle_tabs: Callable[[int], list[IdleTab]]) -> None:
    (tab,) = idle_tabs(1)
    page = tab.page
    page.evaluate("window.s = new WebSocket('/data/ws')")
    uses: list[Callable[[], Any]] = [
        lambda: page.keyboard.press("a"),
        lambda: page.mouse.move(5, 5),
        lambda: page.evaluate("fetch('/data').then(() => 1)"),
        lambda: page.evaluate(XHR, ""),
        lambda: page.evaluate("try { s.send('42[]') } catch {}"),
    ]
    for use in uses:
        tab.idles(90)
        use()
        tab.asked.clear()
        tab.idles(35)  # at the next question it is idle for half a minute
        tab.asks()
        assert int(tab.asked[0].partition("idle=")[2]) < 60
        assert page.evaluate("window.here") == 1
    tab.moves()


def test_a_tab_in_which_something_is_typed_never_moves(
    idle_tabs: Callable[[int], list[IdleTab]],
) -> None:
    changes: list[tuple[Callable[[Page], Any], Callable[[Page], Any]]] = [
        (lambda p: p.fill("#text", "new"), lambda p: p.fill("#text", "old")),
        (lambda p: p.check("#box"), lambda p: p.uncheck("#box")),
        (lambda p: p.locator("#list").press("2"), lambda p: p.keyboard.press("ArrowUp")),
        (lambda p: p.locator("#area").type("x"), lambda p: p.keyboard.press("Backspace")),
        (lambda p: p.locator("#rich").type("x"), lambda p: p.keyboard.press("Backspace")),
    ]
    tabs = idle_tabs(len(changes))
    for (change, _), tab in zip(changes, tabs, strict=True):
        change(tab.page)
    stay(*tabs)
    for (_, undo), tab in zip(changes, tabs, strict=True):
        undo(tab.page)

    def all_have_moved() -> bool:
        tabs[0].idles()  # not all at once
        return not any(tab.is_here for tab in tabs)

    eventually(all_have_moved)


def test_what_was_typed_in_an_element_that_is_gone_keeps_the_page(
    idle_tabs: Callable[[int], list[IdleTab]],
) -> None:
    """As in a form of several steps, whose state the app has."""
    (tab,) = idle_tabs(1)
    tab.page.fill("#text", "new")
    tab.page.evaluate("document.querySelector('#text').remove()")
    stay(tab)
    tab.page.evaluate("history.pushState({}, '', '/other')")
    tab.moves()


def test_what_is_typed_where_nobody_can_see_it_keeps_the_page(
    idle_tabs: Callable[[int], list[IdleTab]],
) -> None:
    (tab,) = idle_tabs(1)
    tab.page.locator("x-field").click()
    tab.page.keyboard.type("x")
    stay(tab)


def test_a_tab_whose_embedded_page_was_used_does_not_move(
    idle_tabs: Callable[[int], list[IdleTab]],
) -> None:
    (tab,) = idle_tabs(1)
    tab.page.frame_locator("#frame").locator("input").click()
    tab.page.keyboard.type("4711")
    stay(tab)
    tab.page.evaluate("document.querySelector('#text').focus()")
    stay(tab)


PLAYS = "const v = document.createElement('video'); Object.defineProperty(v, 'paused', "
PLAYS += "{ value: false }); document.body.append(v)"
HIDDEN = "Object.defineProperty(document, 'visibilityState', { value: 'hidden' })"


IN_USE = [
    PLAYS,
    HIDDEN,
    "history.replaceState({}, '', '/?pulse_deployment=a')",
    "void fetch('/slow')",
]


def test_a_tab_in_use_does_not_move(idle_tabs: Callable[[int], list[IdleTab]]) -> None:
    tabs = idle_tabs(len(IN_USE))
    for script, tab in zip(IN_USE, tabs, strict=True):
        tab.page.evaluate(f"(() => {{ {script} }})()")
    stay(*tabs)


@pytest.mark.parametrize("handles", ["returnValue = 'unsaved'", None])
def test_a_page_that_would_ask_whether_to_leave_it_stays(
    idle_tabs: Callable[[int], list[IdleTab]], handles: str | None
) -> None:
    (tab,) = idle_tabs(1)
    script = f"addEventListener('beforeunload', (event) => event.{handles})"
    tab.page.evaluate(script if handles else "window.onbeforeunload = () => 'unsaved'")
    tab.idles()
    tab.asks()
    tab.asked.clear()
    stay(tab)  # it does not ask again
    tab.page.keyboard.press("a")
    tab.idles()
    tab.asks()


def test_a_tab_whose_version_moves_nobody_stays(two: tuple[str, Any, Any], page: Page) -> None:
    """Its version answers the question, here with a page."""
    tab = IdleTab(page, two[0])
    tab.idles()
    tab.asks()
    page.wait_for_timeout(100)
    assert tab.is_here
