"""Moves by verbs on a local Railway: tabs of a draining version go over with their next page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from examples import demo
from pulse_railway.errors import Failure
from pulse_railway.flows import status
from pulse_railway.flows.rollout import require_moves
from tests.conftest import Project, play
from tests.net import eventually
from tests.users import LiveSite


@pytest.fixture(scope="module")
def site(base: Project) -> LiveSite:
    return LiveSite(base)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_moves_from_deploy_to_rollback(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def next_page(site: LiveSite, name: str, page: str = "/a") -> Any:
    """Ask as a tab of a deployment does when its user goes from `page` to /b."""
    headers = {
        "x-pulse-client-loader": "1",
        "x-pulse-client-loader-location": f"{site.address}/b",
        "referer": f"{site.address}{page}",
        "x-pulse-deployment": name,
    }
    trust = demo.tls_context(site.project.stage.bundle)
    with httpx.Client(verify=trust, trust_env=False) as client:
        return client.get(f"{site.address}/_pulse/meta", headers=headers)


def step_01_by_default_a_tab_stays(site: LiveSite) -> None:
    site.deploy("two")
    assert site.project.row("first")["moving_at"] is None
    answer = next_page(site, "first")
    assert (answer.status_code, answer.json()["deployment_id"]) == (200, "first")


def step_02_a_rollback_moves_the_tabs_of_what_was_active(site: LiveSite) -> None:
    site.project.ok("rollback", "--move")
    answer = next_page(site, "two")
    assert (answer.status_code, answer.headers["location"]) == (302, f"{site.address}/b")
    assert next_page(site, "two", "/b").json()["deployment_id"] == "two"
    assert next_page(site, "first").json()["deployment_id"] == "first"
    eventually(lambda: site.project.row("two")["moved"] == 1, 30)
    assert "1 moved" in site.project.run("status").out


def step_03_a_promotion_ends_the_move(site: LiveSite) -> None:
    site.project.ok("promote", "--deployment-id", "two", "--move-after", "3600")
    assert "moving_at" not in site.project.records["two"]
    assert next_page(site, "two").json()["deployment_id"] == "two"
    assert next_page(site, "first").json()["deployment_id"] == "first"
    first = site.project.row("first")
    assert first["moving_at"] - first["drain_started_at"] == 3600
    assert "moves in 59 m" in site.project.run("status").out


def step_04_an_aborted_canary_and_a_deploy(site: LiveSite) -> None:
    site.deploy("three", "--canary", "10", "--move-after", "60")
    assert site.project.row("two")["moving_at"] is None
    site.project.ok("rollback", "--move")
    assert next_page(site, "three").status_code == 302
    site.deploy("four", "--move")
    assert next_page(site, "two").status_code == 302


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["promote", "--deployment-id", "a", "--move", "--weight", "0"],
            "--move excludes --weight",
        ),
        (["deploy", "main.py", "--move", "--no-promote"], "--move excludes --no-promote"),
        (["deploy", "main.py", "--move", "--canary", "5"], "--move excludes --canary"),
        (
            ["rollback", "--move-after", "86401"],
            "--move-after takes a whole number from 0 to 86400",
        ),
        (["rollback", "--move-after", "soon"], "--move-after takes a whole number"),
    ],
)
def test_moves_that_are_refused(base: Project, words: list[str], message: str) -> None:
    assert message in base.run(*words).error


def test_an_earlier_router_moves_nobody() -> None:
    stack: Any = SimpleNamespace(names=SimpleNamespace(router="pulse-router"))
    with pytest.raises(Failure, match="of an earlier version, which moves no tabs over"):
        require_moves(stack, {"active": "a"})
    require_moves(stack, {"moves": True})


@pytest.mark.parametrize("at", ["soon", True, -1, float("nan"), float("inf"), None, [5]])
def test_a_time_that_an_earlier_router_has_not_checked_is_none(at: Any) -> None:
    assert status.moving_at({"state": "draining", "moving_at": at}) is None
    assert status.moved_by({"moved": at}, "a") == status.moved_by({"moved": {"a": at}}, "a") == 0


def test_only_a_draining_version_is_shown_as_moving() -> None:
    assert status.moving_at({"state": "active", "moving_at": 5}) is None
    assert status.moving_at({"state": "draining", "moving_at": 5}) == 5
