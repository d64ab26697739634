"""Commands by the janitor whose caller has gone, and answers that are too long: on a local Railway.

`PULSE_KILLS=100` kills that many callers at random moments; the gate kills a few.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from typing import Any

import pytest

from pulse_railway import contract
from tests.conftest import Project, play
from tests.net import eventually
from tests.test_signals import Running

REFUSED = {"match": "deploymentInstanceExecutionCreate", "error": "Not Authorized", "times": 99}
KILLS = int(os.environ.get("PULSE_KILLS") or 1)
JOB = ("--control", "job")


def test_commands_by_the_janitor(two: Project, request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def command(project: Project) -> dict[str, Any]:
    """Return the command that waits in the janitor's variable."""
    return dict(json.loads(project.variables("pulse-janitor").get(contract.CONTROL) or "{}"))


def waiting(project: Project, *words: str) -> Running:
    """Start a verb, and return it when its command waits for the janitor, which does not run."""
    project.faults(REFUSED)
    before = command(project)
    verb = Running(project, *words, *JOB)
    eventually(lambda: command(project) not in ({}, before), 30)
    return verb


def state(project: Project) -> tuple[str | None, str | None, str | None]:
    return project.active, project.state.get("maintenance"), project.state.get("deploy:lock")


def step_01_a_signal_withdraws_the_command(two: Project) -> None:
    """SIGTERM left it in the variable, and a later run of the janitor carried it out."""
    before = state(two)
    for words, number in (
        (("promote", "--deployment-id", "first", "--force"), signal.SIGTERM),
        (("rollback",), signal.SIGINT),
        (("maintenance", "on"), signal.SIGHUP),
    ):
        verb = waiting(two, *words)
        verb.send_signal(number)
        code, said = verb.end()
        assert code == 128 + number, said
        assert command(two) == {}
        two.janitor()
        assert state(two) == before


def step_02_a_killed_callers_command_is_not_carried_out(two: Project) -> None:
    """It stayed for seven minutes, was carried out on top of another operator's, and the next
    caller waited for it and said nothing."""
    verb = waiting(two, "promote", "--deployment-id", "first", "--force")
    verb.send_signal(signal.SIGKILL)
    verb.end()
    assert command(two)["words"][0] == "promote"
    two.faults()
    began = time.monotonic()
    done = two.run("maintenance", "off", *JOB)
    assert done.code == 0, done.err
    assert "waits for the command `promote` of" in done.err
    assert time.monotonic() - began < 60
    assert two.active == "second"


def step_03_kills_at_random_moments(two: Project) -> None:
    """No command is carried out after its caller has gone."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments, late = random.Random(seed), []
    for i in range(KILLS):
        switch = ("on", "off")[i % 2]
        verb = Running(two, "maintenance", switch, *JOB)
        time.sleep(moments.uniform(0.2, 6.0))
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            verb.send_signal(signal.SIGKILL)
        verb.end()
        time.sleep(1.5)  # what was on its way to Redis when the caller was killed
        after = state(two)
        two.janitor()
        if state(two) != after:
            late.append((i, switch, after, state(two)))
    assert late == []
    two.ok("maintenance", "off")


def step_04_an_answer_is_bounded(two: Project) -> None:
    """75 long messages in Cyrillic became a variable with which the janitor could not start."""
    entries = [
        {"at": time.time() - 75 + i, "what": "promote", "deployment_id": "first", "why": "ж" * 300}
        for i in range(75)
    ]
    two.redis.set("pulse:railway:history", json.dumps(entries))
    longest = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            value = two.variables("pulse-janitor").get(contract.CONTROL_ANSWER, "")
            longest[0] = max(longest[0], len(value.encode()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    verb = two.run("history", "--lines", "200", "--json", *JOB)
    done.set()
    watcher.join()
    assert verb.code == 0, verb.err
    assert 0 < longest[0] <= 16 * 1024
    shown = verb.json["history"]
    assert 10 < len(shown) < 75
    assert shown == entries[-len(shown) :]
    assert f"the oldest {75 - len(shown)} of 75 entries are left out" in verb.err
    assert two.variables("pulse-janitor").get(contract.CONTROL_ANSWER, "") == ""  # it was read


def step_05_a_variable_that_is_too_long_is_named_and_mended(two: Project) -> None:
    """The janitor could not start, status said (no problem), and ensure had nothing to change."""
    long = json.dumps({"nonce": "n", "command": "history", "history": "ж" * 30_000})
    two.stage.set_variables("pulse-janitor", {contract.CONTROL_ANSWER: long})
    (problem,) = two.ok("status")["problems"]
    assert "pulse-janitor cannot start with PULSE_RAILWAY_CONTROL_ANSWER, which has 175 KB" in (
        problem
    )
    assert "`pulse-railway ensure` empties it" in problem
    changed = two.ok("ensure", "main.py", "--rollback-window-seconds", "900")["changed"]
    assert "PULSE_RAILWAY_CONTROL_ANSWER" in changed[0]
    assert len(changed[0]) < 300
    assert changed[1:] == ["pulse-janitor: deploy"]
    assert two.ok("status")["problems"] == []
    assert two.ok("ensure", "main.py", "--rollback-window-seconds", "900")["changed"] == []
