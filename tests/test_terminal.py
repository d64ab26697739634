"""Text from outside, on a real terminal and in pipes that cannot take it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
from invoke.exceptions import Exit

from pulse_railway.errors import Failure
from pulse_railway.flows import logs as flows_logs
from pulse_railway.flows.watch import History
from pulse_railway.notify import Notification, send
from pulse_railway.output import Output, printable
from pulse_railway.rendering import show_checks, show_history, show_status, show_watch
from tests.conftest import ROOT
from tests.net import Collector

HOSTILE = (
    "Fix [/admin] route",  # rich would raise for this tag, which is none
    "[red]x[/red] :smile:",
    "\x1b]52;c;ZXZpbA==\x07",  # writes the clipboard
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b2J",  # the same as one character, C1
    "\x1bc",
    "\x08\x08\x00",
    "\rerror: nothing",
    "\u202egnp.exe",
    "\x1b[35mpurple\x1b[0m",
)
SENT = ("\x1b]", "\x1b[2J", "\x1b[H", "\x1bc", "\x9b", "\x07", "\x08", "\x00", "\u202e", "\rerror")


def in_everything(text: str, value: Any) -> Any:
    """`value`, with each string in it replaced."""
    if isinstance(value, dict):
        return {k: in_everything(text, v) for k, v in value.items()}
    if isinstance(value, list):
        return [in_everything(text, v) for v in value]
    return text if isinstance(value, str) else value


def status_result() -> dict[str, Any]:
    about = dict.fromkeys(("commit", "message", "author", "by"), "x")
    row = {"deployment_id": "x", "state": "x", "railway": "x", "about": about, "sessions": 1}
    row |= {"moving_at": 5.0, "moved": 1, "moved_idle": 0}
    return {
        "address": "x",
        "baseline": [{"service": "x", "railway": "x", "version": "x"}],
        "missing": ["x"],
        "maintenance": {"since": 5.0, "by": "x"},
        "lock": {"since": 5.0, "by": "x", "lease_seconds": 60},
        "canary": {"deployment_id": "x", "weight": 5.0},
        "copied": ["x"],
        "problems": ["x"],
        "active": "x",
        "deployments": [
            row | {"age_seconds": 5, "weight": None, "rolled_back": False, "instances": 1}
        ],
        "routers": [
            {"router": "x", "requests": 1, "errors": 0, "tunnels_open": 0, "uptime_seconds": 5}
        ],
    }


def show_everything(text: str) -> None:
    output = Output()
    with contextlib.suppress(Failure), output.step(text):
        output.waiting(text)
        output.log(text)
        output.info(text)
        output.warn(text)
        time.sleep(0.15)  # a frame of the spinner
        raise Failure(text)
    output.result({}, [text])
    shown = in_everything(text, status_result())
    show_status(shown)
    history = History()
    history.add(shown, 0.0)
    show_watch([(shown, history)])
    show_history([{"at": 5, "what": text, "deployment_id": text, "by": text, "why": text}])
    show_checks([{"name": text, "verdict": "bad", "said": text}])
    api = Mock()
    line = {"timestamp": "1", "message": text + "\r\n"}
    api.call.return_value = {"deploymentLogs": [line]}
    with patch("pulse_railway.flows.logs.latest", lambda *_: {"i": {"id": "d"}}):
        options = Mock(build=False, follow=False, lines=9)
        flows_logs.logs(api, Mock(), Mock(id="i"), options, output)


def on_a_terminal(code: str, **env: str) -> str:
    """Run code with a pty as its terminal, and return what it has sent there."""
    leader, follower = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), **env}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=follower, stderr=follower, env=variables
    )
    os.close(follower)
    sent = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while piece := os.read(leader, 65536):
            sent += piece
    os.close(leader)
    assert process.wait(30) == 0, sent.decode(errors="replace")
    return sent.decode(errors="surrogateescape")


def test_no_text_acts_on_the_terminal() -> None:
    """Each string in each place; rich's own sequences (colors, the spinner's) are let through."""
    code = "from tests.test_terminal import *\nfor text in HOSTILE: show_everything(text)"
    sent = on_a_terminal(code, COLUMNS="300")
    assert [act for act in SENT if act in sent] == []
    for shown in ("[/admin] route", "[red]x[/red] :smile:", r"\x1b]52;c;ZXZ", r"\x9b2J", r"\u202e"):
        assert sent.count(shown) > 20, shown
    assert "\x1b[35m" not in sent


# -- every verb ------------------------------------------------------------------------------------

OBJECT = "an object"
# verb -> what it calls, and what that returns
FLOWS: dict[str, dict[str, Any]] = {
    "init": {"flows.init.init": {"todo": ["x"], "written": ["x"]}},
    "doctor": {
        "flows.doctor.doctor": {"checks": [{"name": "x", "verdict": "good", "said": "x"}]},
    },
    "scaffold": {"flows.baseline.scaffold": OBJECT, "flows.owner.claim_state": True},
    "ensure": {"flows.baseline.ensure": (OBJECT, ["x"]), "flows.owner.claim_state": True},
    "deploy": {
        "flows.deploy.prepare": OBJECT,
        "flows.deploy.deploy": {
            "deployment_id": "x",
            "active": False,
            "address": "x",
            "canary": None,
            "preview": "x",
            "bake": {"verdict": "x"},
            "drains": {"deployment_id": "x", "sessions": 2},
            "evicted": ["x"],
        },
    },
    "redeploy": {"flows.redeploy.redeploy": {"deployment_id": "x"}},
    "promote": {
        "flows.promote.promote": {
            "deployment_id": "x",
            "active": True,
            "address": "x",
            "weight": None,
            "drains": {"deployment_id": "x", "sessions": None},
            "evicted": ["x"],
            "bake": {"verdict": "x"},
        }
    },
    "rollback": {"flows.promote.rollback": {"deployment_id": "x", "address": "x", "ended": "x"}},
    "maintenance": {"flows.maintenance.maintenance": {"maintenance": "x"}},
    "history": {
        "router_commands.read_history": [
            {"at": 5, "what": "x", "deployment_id": "x", "by": "x", "why": "x"}
        ]
    },
    "unlock": {
        "flows.deploy_lock.read_lock": {
            **{"by": "x", "holder": "x", "deployment_id": "x", "railway": "x"},
            "since": 5.0,
        },
        "router_commands.send_unlock": None,
    },
    "delete": {"flows.remove.find": None, "flows.remove.delete_found": {"deleted": ["x"]}},
    "remove": {"flows.remove.find_by_name": "x", "flows.remove.delete": {"deleted": ["x"]}},
    "status": {"flows.status.status": status_result()},
    "logs": {"flows.logs.find_source": None, "flows.logs.logs": {"lines": ["x"]}},
    "restore": {"flows.restore.restore": {"restored": ["x"], "active": "x"}},
    "image": {"flows.image.image": "x"},
}
NO_FOREIGN_TEXT = {"control", "local"}  # the first prints JSON in ASCII, to a verb


def flow(text: str, value: Any, fails: bool) -> Any:
    """Return a stand-in for what a verb calls, which uses each way of output."""

    def called(*arguments: Any, **_: Any) -> Any:
        output = next((a for a in arguments if isinstance(a, Output)), Output())
        with output.step(text):
            output.waiting(text)
            output.log(text)
        output.info(text)
        output.warn(text)
        if fails:
            raise Failure(text)
        if isinstance(value, tuple):
            return Mock(backends=[], address=text), [text]
        return Mock(address=text) if value == OBJECT else in_everything(text, value)

    return called


def use_verb(name: str, text: str, as_json: bool, fails: bool) -> None:
    """Call a verb with a hostile string in all that it gets from outside."""
    from pulse_railway import tasks, verbs

    parsed = Mock(
        **dict.fromkeys(("deployment_id", "deployment_name", "message", "service"), text),
        **dict.fromkeys(("plan_only", "watch", "notify", "redis_url", "yes"), None),
        lines=9,
        on=True,
        owns_state=False,
    )
    stack = Mock(address=text)
    replaced = {
        "options.parse_stack": lambda *_: parsed,
        "options.raw_flags": lambda *_: {"app": text},
        "tasks._stack": lambda *_, **__: (Mock(calls=1), stack),
        "tasks._stack_result": lambda *_, **__: {"x": text},
        "config.resolve_target": lambda *_: (Mock(calls=1), Mock()),
    }
    with contextlib.ExitStack() as patches:
        for path, function in replaced.items():
            patches.enter_context(patch(f"pulse_railway.{path}", function))
        for path, value in FLOWS[name].items():
            patches.enter_context(patch(f"pulse_railway.{path}", flow(text, value, fails)))
        person = Mock(isatty=lambda: True, readline=lambda: "y\n")
        patches.enter_context(patch("sys.stdin", person))
        body = tasks.ns.tasks[name].body.__wrapped__
        try:
            verbs.run_verb(
                body,
                "parse_stack" if name not in ("doctor", "init") else "raw_flags",
                {"json": as_json},
            )
        except Exit as end:  # as Invoke prints it
            print(end.message, file=sys.stderr)


def test_every_verb_is_tried() -> None:
    from pulse_railway import tasks

    assert FLOWS.keys() | NO_FOREIGN_TEXT == tasks.ns.tasks.keys()


def test_no_verb_lets_a_text_act_on_the_terminal() -> None:
    """Its steps, warnings, questions, result and errors, for people and as JSON."""
    code = (
        "import itertools\n"
        "from tests.test_terminal import *\n"
        "for name in FLOWS:\n"
        "    print(f'#### {name}', flush=True)\n"
        "    for text in HOSTILE:\n"
        "        for as_json, fails in itertools.product((False, True), repeat=2):\n"
        "            use_verb(name, text, as_json, fails)\n"
    )
    _, *parts = on_a_terminal(code, COLUMNS="300", CI="").split("#### ")
    assert [part.split()[0] for part in parts] == list(FLOWS)
    for sent in parts:
        name = sent.split()[0]
        assert [act for act in SENT if act in sent] == [], name
        assert "Traceback" not in sent, name
        for shown in ("[/admin] route", "[red]x[/red] :smile:", r"\x1b]52;c;ZXZ", r"\x9b2J"):
            assert sent.count(shown) > 8, (name, shown)
        assert sent.count('"error": ') == len(HOSTILE), name


def test_a_control_command_prints_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """Its answer is parsed by a verb; a person may run it in the container, too."""
    import control

    answer = {"ok": True, "history": [{"why": text} for text in HOSTILE]}
    with patch("control.carry_out", lambda *_: answer):
        control.main(["history"])
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.strip().isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_another_encoding(encoding: str) -> None:
    code = (
        "from tests.test_terminal import *\n"
        "from pulse_railway import verbs\n"
        "verbs.run_verb(lambda *_: show_everything('\u25cf \u65e5\u672c'), 'raw_flags', {})"
    )
    sent = on_a_terminal(code, PYTHONIOENCODING=encoding, COLUMNS="300")
    assert "Traceback" not in sent
    assert r"\u65e5" in sent


def test_printable_keeps_lines_and_tabs() -> None:
    assert printable("a\tb\r\nc\n\x7f é 日本") == "a\tb\nc\n\\x7f é 日本"


def pulse_railway(words: str, cwd: Path, redirect: str) -> subprocess.CompletedProcess[str]:
    command = f"exec {sys.executable} -m pulse_railway {words} {redirect}"
    return subprocess.run(
        ["sh", "-c", command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("words", ["--help", "history --json", "deploy --help"])
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">/dev/full"])
def test_a_stdout_that_takes_nothing(tmp_path: Path, words: str, redirect: str) -> None:
    done = pulse_railway(words, tmp_path, redirect)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if redirect == ">/dev/full":
        assert done.returncode == 1
        assert "error: " in done.stderr


def test_a_folder_that_was_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = f"cd {folder} && rmdir {folder} && exec {sys.executable} -m pulse_railway status"
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: this folder was deleted: change to another one\n",
    )


def test_a_notification_has_one_line_and_no_markup() -> None:
    """A failed deploy's had the last lines of its log, and a secret in them."""
    collector = Collector()
    sent = Notification("deploy", "deploy failed: <!channel> & \x1b[2J", {"error": "x\x07"})
    send(collector.url, sent, Output())
    body = json.loads(collector.taken[0][2])
    collector.server.shutdown()
    assert body["text"].startswith(r"deploy failed: &lt;!channel&gt; &amp; \x1b[2J (")
    assert body["error"] == r"x\x07"
