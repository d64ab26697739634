"""A signal at each step: after SIGINT and SIGTERM the run cleans up, after SIGKILL the next one.

The verbs are forked (zygote.py), with signals of their own; test_habits.py has a user's process.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.conftest import BASE, TINY, Project, zygote
from tests.net import eventually


class Running:
    """A verb that runs; `said` are the lines of its output."""

    def __init__(self, project: Project, *words: str) -> None:
        said, write_end = os.pipe()
        fds = (write_end, write_end)
        self.process = zygote().start("pulse-railway", list(words), project.env, TINY, fds)
        os.close(write_end)
        self.said = open(said)

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for its end. Returns its exit status, and the rest of what it says."""
        with self.said:
            return self.process.wait(60), self.said.read()


STEPS = ["inspect the baseline", "create the service", "build and start", "register", "promote it"]


@pytest.mark.parametrize(
    ("step", "number"),
    [
        *((step, number) for step in STEPS for number in (signal.SIGINT, signal.SIGKILL)),
        ("create the service", signal.SIGTERM),  # has the same handler
    ],
)
def test_a_signal_during_deploy(base: Project, step: str, number: signal.Signals) -> None:
    name = f"s-{number.name[3:].lower()}-{step.split()[0]}"
    slow = {
        "inspect the baseline": "environment",
        "create the service": "serviceCreate",
        "build and start": "deployment",
        "register": "ssh",
        "promote it": "ssh",
    }[step]
    nth = {"register": 2, "promote it": 3}.get(step, 1)
    base.redis.delete("pulse:railway:deploy:lock")  # left by a killed deploy
    base.faults({"match": slow, "nth": nth, "delay": 2.0})
    process = Running(base, "deploy", "main.py", "--deployment-id", name)
    for line in process.said:
        if line.strip().startswith(step):
            break
    time.sleep(0.4)
    process.send_signal(number)
    code, rest = process.end()
    base.faults()
    if number != signal.SIGKILL:
        assert code == 128 + number, rest
        assert "Traceback" not in rest
        assert "interrupted at: " in rest
        assert base.services == BASE | {"first"}, rest
        assert set(base.records) == {"first"}
    else:  # another deploy succeeds
        # Railway carries out the delayed call
        time.sleep(2.2 if step == "create the service" else 0.3)
        if step == "promote it":
            eventually(lambda: base.active == name, seconds=15)
            base.ok("promote", "--deployment-id", "first")
        if name in base.services:
            assert (done := base.run("delete", "--deployment-id", name)).code == 0, done.err
        assert base.deploy(f"{name}-2"[:24], "--no-promote")
        assert base.run("delete", "--deployment-id", f"{name}-2"[:24]).code == 0
    if base.active != "first":  # killed after the promotion
        base.ok("promote", "--deployment-id", "first")
        base.run("delete", "--deployment-id", name)
    assert base.services == BASE | {"first"}
    assert base.get("/_pulse/meta")["deployment_id"] == "first"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_next_ensure_completes_one_that_was_killed(
    new_project: Callable[[], Project], number: signal.Signals
) -> None:
    project = new_project()
    for step in (
        "wait for pulse-janitor, pulse-redis, pulse-router to appear",
        "create pulse-env",
        "upload the runtime",
        "wait for pulse-janitor, pulse-redis, pulse-router",
    ):
        process = Running(project, "ensure", "main.py")
        for line in process.said:
            if line.strip().startswith(step):
                process.send_signal(number)
                break
        process.end()
        # the template's services, which appear after the call: an ensure before adds others
        eventually(lambda: project.services >= BASE - {"pulse-env"})
    done = project.ok("ensure", "main.py")
    assert project.services == BASE
    assert done["server_address"]
    assert project.ok("ensure", "main.py")["changed"] == []
    project.deploy("works")


def test_a_command_that_the_router_may_still_carry_out(base: Project) -> None:
    """It said "interrupted", and the promotion came afterwards."""
    base.deploy("sent", "--no-promote")
    base.faults({"match": "ssh", "delay": 3.0})
    verb = Running(base, "promote", "--deployment-id", "sent", "--force")
    for line in verb.said:
        if line.strip().startswith("promote sent"):
            break
    time.sleep(0.7)
    verb.send_signal(signal.SIGINT)
    code, said = verb.end()
    base.faults()
    assert code == 128 + signal.SIGINT
    assert "the router may still carry out `promote`; `pulse-railway status` shows" in said
    eventually(lambda: base.active == "sent", seconds=15)
    base.ok("promote", "--deployment-id", "first")
    base.ok("delete", "--deployment-id", "sent")
