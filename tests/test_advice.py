"""A command that a message advises can be pasted: it is one, and works on the same stack."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pulse_railway import advice, help, tasks
from tests.conftest import TINY, Project, pulse_railway
from tests.test_messages import FILES, skeleton


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    yield
    advice.remember("init", {})


@pytest.mark.parametrize(
    ("verb", "flags", "text", "expected"),
    [
        ("status", {}, "run `pulse-railway deploy`", "run `pulse-railway deploy`"),
        (
            "status",
            {"environment": "my copy", "service": "edge"},
            "`pulse-railway rollback` goes back, `pulse-railway deploy` a better one",
            "`pulse-railway rollback --environment 'my copy' --service edge` goes back,"
            " `pulse-railway deploy --environment 'my copy'` a better one",
        ),
        (
            "status",
            {"service": "edge", "app": "main.py"},
            "`pulse-railway logs --service edge-redis` shows why",
            "`pulse-railway logs --service edge-redis --app main.py` shows why",
        ),
        (
            "promote",
            {"app": "main.py", "project_id": "p", "token": "secret", "yes": True},
            "next: pulse-railway promote --deployment-id a",
            "next: pulse-railway promote --deployment-id a --app main.py --project-id p",
        ),
        ("ensure", {"app": "a.py"}, "`pulse-railway ensure a.py`", "`pulse-railway ensure a.py`"),
        ("logs", {"service": "redis"}, "`pulse-railway status`", "`pulse-railway status`"),
        ("init", {"app": "main.py"}, "`pulse-railway deploy`", "`pulse-railway deploy`"),
        (
            "status",
            {"app": "main.py"},
            "`railway redeploy`, `pulse-railway janitor run`, pulse-railway manages it",
            "`railway redeploy`, `pulse-railway janitor run`, pulse-railway manages it",
        ),
    ],
)
def test_an_advised_command_has_the_users_flags(
    verb: str, flags: dict[str, object], text: str, expected: str
) -> None:
    advice.remember(verb, flags)
    assert advice.pasteable(text) == expected


def test_verbs_print_commands_with_the_users_flags(project: Project) -> None:
    """In the error, on stdout with --json, and in `status`."""
    env = {**project.env, "RAILWAY_PROJECT_ID": "", "RAILWAY_ENVIRONMENT_ID": ""}
    where = ("--project-id", project.id, "--environment", "production")
    command = f"`pulse-railway ensure --project-id {project.id} --environment production`"
    refused = pulse_railway("rollback", *where, "--json", env=env, cwd=TINY)
    assert command in refused.error
    assert command in refused.json["error"]
    problems = pulse_railway("status", *where, "--json", env=env, cwd=TINY).json["problems"]
    assert command in str(problems)
    checks = pulse_railway("doctor", "main.py", *where, "--json", env=env, cwd=TINY).json["checks"]
    assert command.replace("ensure", "ensure --app main.py") in str(checks)


def texts(path: Path) -> list[str]:
    """Return a file's strings, with `…` for values in f-strings."""
    return [
        skeleton(node, {})
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and node.value)
    ]


def test_every_advised_command_exists() -> None:
    advised = {c for path in FILES for text in texts(path) for c in commands(text)}
    assert len(advised) > 25
    for command in advised:
        verb, *words = command.replace("…", " … ").split()
        taken = ["--help", *(flag.option for flag in help.flags(verb))]
        assert verb in [*tasks.ns.tasks, *help.OTHER_COMMANDS], command
        if verb not in help.OTHER_COMMANDS and verb not in ("control", "local"):
            assert [w for w in words if w.startswith("--") and w not in taken] == [], command


def commands(text: str) -> list[str]:
    """Return the advised commands of a text that end in it."""
    return re.findall(r"`pulse-railway ([a-z][^`]*)`", text)
