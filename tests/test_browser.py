"""A real browser on the example, through the local Railway's TLS edge."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from tests.conftest import ROOT, Project
from tests.net import eventually

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
APP = "examples/railway/main.py"
# no lookups and downloads of its own; a test machine has no sandbox for root
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def person() -> Iterator[Callable[[], BrowserContext]]:
    """`person()`: somebody with a browser of their own, that is, with no cookies of others."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        # the edge's certificate is the local Railway's own
        yield lambda: browser.new_context(ignore_https_errors=True)
        browser.close()


def shows(page: Page, deployment: str, tab: int, session: int) -> None:
    expect(page.locator("#state")).to_have_text("connected", timeout=15_000)
    expect(page.locator("#deployment")).to_have_text(deployment, timeout=15_000)
    expect(page.locator("#tab")).to_have_text(str(tab))
    expect(page.locator("#session")).to_have_text(str(session))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_tab_lives_through_a_deploy(
    new_project: Callable[[], Project], person: Callable[[], BrowserContext]
) -> None:
    project = new_project()
    address = project.run("ensure", APP, "--json", cwd=ROOT).json["server_address"]

    def deploy(name: str) -> None:
        verb = project.run("deploy", APP, "--deployment-id", name, cwd=ROOT)
        assert verb.code == 0, verb.err

    deploy("a")
    somebody = person()
    old = somebody.new_page()
    old.goto(f"{address}/probe")
    shows(old, "a", 0, 0)
    for count in (1, 2):
        old.click("#count")
        expect(old.locator("#tab")).to_have_text(str(count))
        expect(old.locator("#session")).to_have_text(str(count))

    deploy("b")
    shows(old, "a", 2, 2)  # its socket is open, its state is there
    old.click("#count")
    shows(old, "a", 3, 3)
    old.reload()  # a tab remembers its deployment
    shows(old, "a", 0, 3)
    new = somebody.new_page()
    new.goto(f"{address}/probe")
    shows(new, "b", 0, 3)  # the session is in Redis
    other = person().new_page()
    other.goto(f"{address}/probe")
    shows(other, "b", 0, 0)

    # the drain is over: the tab is told to reload, and goes on with the active deployment
    verb = project.run("ensure", APP, "--drain-ttl-seconds", "1", cwd=ROOT)
    assert verb.code == 0, verb.err
    project.stage.run_janitor()
    shows(old, "b", 0, 3)
    eventually(lambda: "a" not in project.services)


# what Pulse's client loader does when its user goes to another page
GO = """async ([deployment, location]) => {
    const headers = {
        "x-pulse-client-loader": "1",
        "x-pulse-client-loader-location": location,
        "x-pulse-deployment": deployment,
    };
    const url = "/_pulse/prerender";
    const answer = await fetch(url, {method: "POST", headers, redirect: "manual", body: "{}"});
    return answer.type;
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_tab_moves_over_with_the_next_page_only(
    new_project: Callable[[], Project], person: Callable[[], BrowserContext]
) -> None:
    project = new_project()
    address = project.run("ensure", APP, "--json", cwd=ROOT).json["server_address"]
    for name, more in (("a", []), ("b", ["--move"])):
        verb = project.run("deploy", APP, "--deployment-id", name, *more, cwd=ROOT)
        assert verb.code == 0, verb.err
        if name == "a":
            tab = person().new_page()
            tab.goto(f"{address}/probe")
            shows(tab, "a", 0, 0)
            tab.click("#count")
            shows(tab, "a", 1, 1)
    shows(tab, "a", 1, 1)
    tab.click("#count")
    shows(tab, "a", 2, 2)
    # a state in the query of the open page, and the address after the page has changed it itself
    assert tab.evaluate(GO, ["a", f"{address}/probe?q=x"]) != "opaqueredirect"
    tab.evaluate("history.pushState({}, '', '/other?q=x')")
    assert tab.evaluate(GO, ["a", f"{address}/other?q=y"]) != "opaqueredirect"
    shows(tab, "a", 2, 2)
    assert tab.evaluate(GO, ["a", f"{address}/probe"]) == "opaqueredirect"
    tab.evaluate("sessionStorage.clear()")  # Pulse's pages bring the affinity with them
    tab.goto(f"{address}/probe")  # as the client does then
    shows(tab, "b", 0, 2)
