"""The local Railway itself: it outlives a restart, and what it started ends with it."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest

from examples import demo
from pulse_railway.local.supervisor import cron_matches
from tests.conftest import TINY, pulse_railway
from tests.net import eventually


def deployed(stage: demo.Stage) -> str:
    """A baseline and a deployment `one`; the address they have."""
    for arguments in (["ensure", "main.py"], ["deploy", "main.py", "--deployment-id", "one"]):
        verb = pulse_railway(*arguments, "--json", env=stage.env, cwd=TINY)
        assert verb.code == 0, verb.err
    return str(verb.json["address"])


def serves(stage: demo.Stage, address: str) -> bool:
    answer = stage.get(f"{address}/_pulse/meta")
    return bool(answer.status_code == 200 and answer.json()["deployment_id"] == "one")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_deployed_is_there_after_a_restart(tmp_path: Path, end: signal.Signals) -> None:
    root = tmp_path.resolve()
    with demo.stage(root) as stage:
        address = deployed(stage)
        services = stage.services()
        os.kill(stage.process.pid, end)
        stage.process.wait(30)
        if end == signal.SIGTERM:
            assert demo.processes_of(root) == []
    with demo.stage(root) as stage:
        assert stage.services() == services
        eventually(lambda: serves(stage, address), 30)
    assert demo.processes_of(root) == []


def test_a_cron_run_ends_with_it(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    with demo.stage(root) as stage:
        deployed(stage)
        before = set(demo.processes_of(root))
        stage.run_janitor()
        eventually(lambda: set(demo.processes_of(root)) - before)
    assert demo.processes_of(root) == []


@pytest.mark.parametrize(
    ("schedule", "matches"),
    [
        ("*/5 * * * *", True),
        ("10 8 * * *", True),
        ("0-20/10 8 24 11 2", True),
        ("7,10 6-9 * * 1-5", True),
        ("*/7 * * * *", False),
        ("10 9 * * *", False),
        ("10 8 * * 0", False),
        ("10 8 * *", False),
    ],
)
def test_cron_schedules(schedule: str, matches: bool) -> None:
    tuesday = datetime(2026, 11, 24, 8, 10, tzinfo=UTC)
    assert cron_matches(schedule, tuesday) is matches
