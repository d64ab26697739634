"""Moves by verbs on a local Railway: tabs of a draining version go over with their next page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from examples import demo
from pulse_railway.errors import Failure
from pulse_railway.flows import status
from pulse_railway.flows.rollout import moves_of, require_moves
from pulse_railway.options import parse_rollback
from pulse_railway.output import Output
from pulse_railway.router_commands import Moves
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


def is_idle(site: LiveSite, name: str, seconds: int) -> Any:
    """Ask as affinity.js does in a tab of a deployment that nobody uses."""
    trust = demo.tls_context(site.project.stage.bundle)
    with httpx.Client(verify=trust, trust_env=False) as client:
        url = f"{site.address}/_pulse/railway/move?idle={seconds}"
        return client.get(url, headers={"x-pulse-deployment": name}).json().get("move")


def step_01_by_default_a_tab_stays(site: LiveSite) -> None:
    site.deploy("two")
    assert site.project.row("first")["moving_at"] is None
    answer = next_page(site, "first")
    assert (answer.status_code, answer.json()["deployment_id"]) == (200, "first")


def step_02_a_rollback_moves_the_tabs_of_what_was_active(site: LiveSite) -> None:
    site.project.ok("rollback", "--move-idle", "60")
    answer = next_page(site, "two")
    assert (answer.status_code, answer.headers["location"]) == (302, f"{site.address}/b")
    assert next_page(site, "two", "/b").json()["deployment_id"] == "two"
    assert next_page(site, "first").json()["deployment_id"] == "first"
    eventually(lambda: site.project.row("two")["moved"] == 1, 30)
    assert (is_idle(site, "two", 59), is_idle(site, "two", 60)) == (False, True)
    assert is_idle(site, "first", 60) is None  # its process is asked
    eventually(lambda: site.project.row("two")["moved_idle"] == 1, 30)
    assert "1 moved at a page, 1 when idle" in site.project.run("status").out


def step_03_a_promotion_ends_the_move(site: LiveSite) -> None:
    site.project.ok("promote", "--deployment-id", "two", "--move-after", "3600")
    assert not {"moving_at", "move_idle"} & set(site.project.records["two"])
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
    assert "move_idle" not in site.project.records["three"]
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
        *[
            (
                ["rollback", "--move-idle", given],
                "--move-idle takes a whole number from 60 to 86400",
            )
            for given in ("59", "86401", "soon")
        ],
    ],
)
def test_moves_that_are_refused(base: Project, words: list[str], message: str) -> None:
    assert message in base.run(*words).error


def test_an_earlier_router_moves_nobody() -> None:
    stack: Any = SimpleNamespace(names=SimpleNamespace(router="pulse-router"))
    with pytest.raises(Failure, match="of an earlier version, which moves no tabs over"):
        require_moves(stack, {"active": "a"}, Moves(0))
    require_moves(stack, {"active": "a"}, None)
    for known in (True, ["page"], "idle"):
        require_moves(stack, {"moves": known}, Moves(0))
        with pytest.raises(Failure, match="which moves no idle tabs over"):
            require_moves(stack, {"moves": known}, Moves(0, 60))
    require_moves(stack, {"moves": ["page", "idle"]}, Moves(0, 60))


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        ({}, None),
        ({"move": True}, Moves(0)),
        ({"move_idle": 600}, Moves(0, 600)),
        ({"move_after": 60, "move_idle": 600}, Moves(60, 600)),
        ({"move": True, "move_after": 60}, Moves(0)),
    ],
)
def test_a_rule_for_idle_tabs_is_one_for_those_in_use(flags: dict[str, Any], moves: Any) -> None:
    assert moves_of(parse_rollback(flags, Output())) == moves


@pytest.mark.parametrize("at", ["soon", True, -1, float("nan"), float("inf"), None, [5]])
def test_a_time_that_an_earlier_router_has_not_checked_is_none(at: Any) -> None:
    assert status.moving_at({"state": "draining", "moving_at": at}) is None
    assert status.moved_by({"moved": at}, "a") == status.moved_by({"moved": {"a": at}}, "a") == 0


def test_only_a_draining_version_is_shown_as_moving() -> None:
    assert status.moving_at({"state": "active", "moving_at": 5}) is None
    assert status.moving_at({"state": "draining", "moving_at": 5}) == 5
