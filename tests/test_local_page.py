"""The local Railway's page, in a real browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from examples import demo
from pulse_railway.local import guard
from tests.conftest import Project, set_faults
from tests.test_browser import CHROMIUM, FLAGS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture
def page(railway: demo.Stage) -> Iterator[Page]:
    """A page whose every error, the script's or the console's, fails the test. Its buttons let the
    cron run again, which is to stand still for the tests that come after."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        made = browser.new_context(viewport={"width": 1100, "height": 1000}).new_page()
        errors: list[str] = []
        made.on("pageerror", lambda error: errors.append(str(error)))
        made.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        yield made
        browser.close()
        set_faults(railway)
        assert errors == []


def with_key(project: Project) -> str:
    """Return the address of the page for a project, as `page.html` opens it."""
    address = project.railway.api.removesuffix("/graphql/v2")
    key = guard.key_header(project.railway.root)[guard.KEY_HEADER]
    return f"{address}/?project={project.id}#{key}"


def test_the_file_in_the_folder_opens_the_page(railway: demo.Stage, page: Page) -> None:
    page.goto((railway.root / guard.PAGE_FILE).as_uri())
    expect(page.locator("#problem")).to_have_text("there is no baseline yet")
    assert page.url == railway.api.removesuffix("graphql/v2")
    page.reload()
    expect(page.locator("#problem")).to_have_text("there is no baseline yet")


def test_without_the_key_the_page_says_what_to_open(railway: demo.Stage) -> None:
    """Not by `page`, which takes the browser's line about a 403 for a fault."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(railway.api.removesuffix("graphql/v2"))
        expect(page.locator("#problem")).to_contain_text("open page.html")
        browser.close()


def test_what_one_sees_and_can_order(base: Project, page: Page) -> None:
    page.goto(with_key(base))
    assert "#" not in page.url
    services, deployments = page.locator("#services"), page.locator("#deployments")
    for name in ("pulse-router", "pulse-redis"):
        expect(services.locator(".card", has_text=name)).to_contain_text("runs", timeout=15_000)
    expect(services.locator(".card", has_text="pulse-env")).to_contain_text("holds variables")
    expect(services.locator(".card", has_text="pulse-janitor")).to_contain_text("waits for */5")
    first = deployments.locator(".card", has_text="first")
    expect(first.locator(".state")).to_have_text("active")
    expect(first).to_contain_text(re.compile(r"sessions: \d"))
    link = page.locator("#address")
    app = str(link.get_attribute("href"))
    expect(page.locator("#probe")).to_have_attribute("href", f"{app}/probe")
    assert base.stage.get(f"{app}/_pulse/meta").json()["deployment_id"] == "first"

    # its share of the requests moves
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for _ in range(20):
            base.stage.get(f"{app}/_pulse/meta")
        if "0.0 requests/s" not in str(first.text_content()):
            break
    expect(first).to_contain_text(re.compile(r"[1-9]\d*\.\d requests/s"))
    width = first.locator(".share i").evaluate("bar => bar.style.width")
    assert width == "100%"

    # a fault by its button: it is ordered, shown, does what it says, and is taken back
    button = page.get_by_role("button", name="next build fails")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#orders")).to_contain_text('"crash_at":"BUILDING"')
    failed = base.run("deploy", "main.py", "--deployment-id", "broken")
    assert "FAILED" in failed.error
    page.get_by_role("button", name="a good day again").click()
    expect(page.locator("#orders")).to_have_text("")
    expect(button).to_have_attribute("aria-pressed", "false")

    # a second deployment appears while it is being built, and takes over
    page.get_by_role("button", name="builds take 20 s").click()
    expect(page.locator("#orders")).to_contain_text("build_seconds")
    page.get_by_role("button", name="a good day again").click()
    base.deploy("second")
    second = deployments.locator(".card", has_text="second")
    expect(second.locator(".state")).to_have_text("active", timeout=15_000)
    expect(first.locator(".state")).to_have_text("draining")

    # a log, the janitor by hand, and what it removed is gone from the page
    services.locator(".card", has_text="pulse-router").click()
    expect(page.locator("#of")).to_have_text("pulse-router")
    services.get_by_text("run it now").click()
    expect(deployments.locator(".card", has_text="first")).to_have_count(0, timeout=30_000)
    services.locator(".card", has_text="pulse-janitor").click()
    expect(page.locator("#log")).to_contain_text('"deleted": ["first"]', timeout=15_000)

    base.ok("maintenance", "on")
    expect(page.locator("#problem")).to_contain_text("maintenance", timeout=15_000)
    base.ok("maintenance", "off")
    expect(page.locator("#problem")).to_have_text("", timeout=15_000)


def test_one_chooses_an_environment(new_project: Callable[[], Project], page: Page) -> None:
    project = new_project()
    project.railway.graphql(
        "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }",
        i={"projectId": project.id, "environmentId": project.environment, "name": "web"},
    )
    page.goto(with_key(project))
    services, choice = page.locator("#services .card"), page.locator("#environments")
    expect(services).to_contain_text("web")
    expect(choice).to_be_hidden()
    other = project.duplicate("staging")
    expect(choice).to_be_visible()
    create = "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }"
    where = {"projectId": project.id, "environmentId": other.environment, "name": "only-here"}
    project.railway.graphql(create, i=where)
    choice.select_option(label="staging")
    expect(services).to_have_count(2)
    other.delete_environment()
    expect(choice).to_be_hidden()
    expect(services).to_have_count(1)


def test_an_empty_project_says_what_to_run(new_project: Callable[[], Project], page: Page) -> None:
    project = new_project()
    page.goto(with_key(project))
    expect(page.locator("#problem")).to_have_text("there is no baseline yet")
    expect(page.locator("#address")).to_have_text("none yet: invoke ensure")
    expect(page.locator("#deployments")).to_contain_text("none yet: invoke deploy")


def test_it_is_for_this_machine(base: Project) -> None:
    """A name that is made to lead here (DNS rebinding) gets nothing, and no secret is shown."""
    address = base.railway.api.removesuffix("/graphql/v2")
    key = guard.key_header(base.railway.root)
    there = {**key, "host": "evil.example"}
    assert httpx.get(f"{address}/local/picture", headers=there).status_code == 400
    wrong = httpx.get(f"{address}/local/picture", params={"project": "x"}, headers=key)
    assert wrong.status_code == 404
    assert httpx.get(f"{address}/local/logs/x", headers=key).status_code == 404
    shown = json.dumps(base.railway.local("picture", project=base.id))
    secrets = [
        value
        for service in ("pulse-router", "pulse-redis")
        for name, value in base.variables(service).items()
        if re.search("TOKEN|PASSWORD|SECRET", name) and "${{" not in value
    ]
    assert len(secrets) > 1
    assert not [value for value in secrets if value in shown]
