"""A signal at each step: after SIGINT and SIGTERM the run cleans up, after SIGKILL the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.conftest import BASE, TINY, Project
from tests.net import eventually

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
    process = subprocess.Popen(
        [sys.executable, "-m", "pulse_railway", "deploy", "main.py", "--deployment-id", name],
        cwd=TINY,
        env=base.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip().startswith(step):
            break
    time.sleep(0.4)
    os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
    rest = process.communicate(timeout=60)[1]
    base.faults()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, rest
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
        process = subprocess.Popen(
            [sys.executable, "-m", "pulse_railway", "ensure", "main.py"],
            cwd=TINY,
            env=project.env,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip().startswith(step):
                os.killpg(process.pid, number)
                break
        process.communicate(timeout=60)
    done = project.ok("ensure", "main.py")
    assert project.services == BASE
    assert done["server_address"]
    assert project.ok("ensure", "main.py")["changed"] == []
    project.deploy("works")
