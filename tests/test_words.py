"""What the console script makes of the words on its command line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from invoke.config import Config
from invoke.context import Context
from invoke.exceptions import Exit
from rich.text import Text

from pulse_railway import cli, rendering, router_commands, tasks, verbs
from pulse_railway.config import Names, Target
from pulse_railway.flows.watch import History
from pulse_railway.output import Output, console
from pulse_railway.stack import Service, Stack

WRONG = [
    (["depoy", "main.py"], "no verb depoy; did you mean deploy?"),
    (["help", "deplot"], "no verb deplot; did you mean deploy?"),
    (["--verison"], "no flag --verison; did you mean --version?"),
    (["-z"], "no flag -z"),
    (
        ["deploy", "--enviroment", "x"],
        "no flag --enviroment of deploy; did you mean --environment?",
    ),
    (["deploy", "--enviroment=x"], "no flag --enviroment of deploy; did you mean --environment?"),
    (["status", "--canary", "5"], "no flag --canary of status"),
    (["status", "-x"], "no flag -x of status"),
    (["deploy", "--canary"], "--canary takes a value: --canary PERCENT[,PERCENT]"),
    (["deploy", "--canary", "--bake", "5"], "--canary takes a value: --canary PERCENT[,PERCENT]"),
    (["local", "--dir"], "--dir takes a value"),
    (["status", "--watch=yes"], "--watch takes no value"),
    (["status", "a.py", "b.py"], "status takes one FILE: what is b.py?"),
    (["image", "x"], "image takes flags only: what is x?"),
    (["maintenance", "on", "off"], "maintenance takes one on|off: what is off?"),
    (["maintenance"], "which? `pulse-railway maintenance on|off`"),
    (["remove"], "which deployment? pass --deployment-name"),
    (["delete"], "which deployment? pass its id; `status` lists them"),
    (["promote"], "which deployment? pass its id; `status` lists them"),
    (["image"], "which repository? pass --repository"),
    (["janitor"], "no command of janitor: `pulse-railway janitor run`"),
    (["promote", "Prod_1"], "Prod_1 is no deployment's id and no app's file"),
    (["promote", "a", "b"], "promote takes one ID: what is b?"),
    (["promote", "a", "--deployment-id", "b"], "promote takes one ID: what is b?"),
    (["rollback", "prod-1"], "rollback takes no ID: `pulse-railway promote prod-1`"),
    (["-e", "deploy", "main.py"], "the command line is not understood"),
]


Refused = Callable[[list[str]], tuple[str, str]]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """`refused(words)` checks that they end with status 2; returns what is on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def check(words: list[str]) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        return out, err

    return check


@pytest.mark.parametrize(("words", "said"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_wrong_words_are_one_line_and_status_2(
    words: list[str], said: str, refused: Refused
) -> None:
    out, err = refused(words)
    assert out == ""
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["depoy"], ["status", "--wach"], ["delete"]])
def test_with_json_wrong_words_are_an_object(words: list[str], refused: Refused) -> None:
    out, err = refused([*words, "--json"])
    assert err == f"error: {json.loads(out)['error']}\n"


@pytest.mark.parametrize("verb", ["promote", "delete", "redeploy", "logs", "restore"])
def test_a_bare_id_is_the_deployment_and_a_path_is_the_app(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app").touch()
    for app in ("main.py", "main.py:site", "web/main", "app"):
        assert cli.rewrite([verb, app, "prod-261101-120000"]) == [
            *(verb, "--app", app, "--deployment-id", "prod-261101-120000")
        ]
        assert cli.rewrite([verb, "prod-1", app]) == [
            *(verb, "--deployment-id", "prod-1", "--app", app)
        ]


def test_a_bare_word_of_other_verbs_is_the_app() -> None:
    assert cli.rewrite(["deploy", "main"]) == ["deploy", "--app", "main"]
    assert cli.rewrite(["status", "--message=-x", "main.py"][::2]) == ["status", "--app", "main.py"]
    assert cli.rewrite(["deploy", "--message", "-fix"]) == ["deploy", "--message=-fix"]


class Spinner(Output):
    """Output that knows whether a step, which has a spinner on a terminal, is under way."""

    steps = 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        Spinner.steps += 1
        try:
            yield
        finally:
            Spinner.steps -= 1


def test_delete_asks_after_it_has_looked_and_outside_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    there = Service("i", "", "a", "2026-01-01T00:00:00Z", None, {}, [], None, None, {})
    there.variables.update({"PULSE_DEPLOYMENT_ID": "there"})
    stack = Stack(Target("p", "e"), Names(), {"a": there})

    def ask(question: str) -> bool:
        assert not Spinner.steps
        asked.append(question)
        return False

    def read_state(*_: Any, **__: Any) -> dict[str, Any]:
        assert Spinner.steps
        return {"deployments": [{"deployment_id": "record"}]}

    monkeypatch.setattr("pulse_railway.output.Output", Spinner)
    monkeypatch.setattr(verbs, "ask", ask)
    monkeypatch.setattr(tasks, "_stack", lambda *_, **__: (None, stack))
    monkeypatch.setattr(router_commands, "read_state", read_state)
    for name in ("there", "record"):
        with pytest.raises(Exit, match="not done"):
            tasks.delete(Context(Config()), deployment_id=name)
    assert asked == ["delete deployment there?", "delete deployment record?"]
    with pytest.raises(Exit, match="gone"):
        tasks.delete(Context(Config()), deployment_id="gone")
    assert len(asked) == 2


@pytest.mark.parametrize("width", [60, 80, 120])
def test_ids_are_whole_on_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendering, "stdout", lambda: console(width=width))
    first, second = "prod-feature-1-261128-11", "prod-feature-2-261128-12"
    row: dict[str, Any] = {"state": "draining", "weight": None, "moving_at": None, "instances": 4}
    row |= {"railway": "SUCCESS", "region": "us-west2", "rolled_back": True, "sessions": 12}
    row |= {"age_seconds": 90_000, "about": {"message": "Fix the cart of all users", "by": "ada"}}
    rows = [row | {"deployment_id": name} for name in (first, second)]
    rates = History()
    rates.add({"deployments": rows, "routers": []}, 1.0)
    for history in (None, rates):
        for part in rendering.deployments(rows, history):
            console(width=width).print(part, soft_wrap=isinstance(part, Text))
    entry = {"at": 5, "what": "promote", "deployment_id": first, "active": second, "by": "ada@x"}
    rendering.show_history([entry | {"why": "Fix the cart of all users, again", "commit": "1" * 9}])
    printed = capsys.readouterr().out
    assert (printed.count(first), printed.count(second)) == (3, 3)
    assert max(map(len, printed.splitlines())) <= width


def test_no_color_leaves_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich's own NO_COLOR leaves bold, and a spinner hides the cursor."""
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    printed = []
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm")
        parent, child = pty.openpty()
        with os.fdopen(child, "w") as terminal:
            monkeypatch.setattr("sys.stderr", terminal)
            output = Output()
            with output.step("look"):
                output.waiting("a moment")
            output.console.print("x", style="bold red")
        printed.append(os.read(parent, 10_000))
        os.close(parent)
    assert b"\x1b" in printed[0]
    assert b"\x1b" not in printed[1]


def test_help_marks_older_names_and_needed_flags(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "An older name: use `delete`." in printed
    assert "An older name: use `ensure`." in printed
    cli.main(["remove", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--deployment-name NAME prefix of the generated deployment id (needed)" in printed
    cli.main(["promote", "--help"])
    assert capsys.readouterr().out.startswith("Usage: pulse-railway promote [ID] [FILE] [flags]\n")
