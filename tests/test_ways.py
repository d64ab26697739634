"""The ways to the router: `railway ssh` with its keys and its bad days, and the janitor.

The relay is a real SSH server, the client the system's ssh. A stand-in for `railway` itself is
used where only its words matter, and is named so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import contract, errors
from pulse_railway.config import ControlRoute, Names, Target
from pulse_railway.railway import program, ssh
from pulse_railway.railway.api import Api
from pulse_railway.railway.tokens import Token
from pulse_railway.router_commands import choose_route
from pulse_railway.stack import Stack
from tests.conftest import BASE, TINY, Project, set_faults
from tests.test_unreliable_ssh import FOREIGN, SSH_ERRORS

# -- what the key must be ----------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path / "key")


def new_key(path: Path, passphrase: str = "") -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True)
    return path


def test_a_key_is_a_path_or_the_key_itself(key: Path) -> None:
    assert ssh.private_key_file(str(key)) == key
    text = key.read_text()
    for given in (
        text,
        text.strip(),
        text.replace("\n", "\r\n"),
        text.strip().replace("\n", "\\n"),
    ):
        path = ssh.private_key_file(given)
        assert path.read_text() == text
        assert path.stat().st_mode & 0o777 == 0o600
        assert given not in errors.redact(f"it was {given}")


def test_a_key_that_was_written_goes_with_the_process(key: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pulse_railway.railway.ssh import private_key_file\n"
        "print(private_key_file(sys.stdin.read()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=key.read_text(), capture_output=True, text=True
    )
    assert done.stdout.strip()
    assert not Path(done.stdout.strip()).exists()


def test_a_key_that_cannot_be_used(key: Path, tmp_path: Path) -> None:
    locked = new_key(tmp_path / "locked", "a passphrase")
    for given, said in (
        (str(tmp_path / "none"), "there is no SSH key at"),
        (f"{key}.pub", "public half: pass the private key"),
        (str(locked), "has a passphrase"),
        (locked.read_text(), "has a passphrase"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n", "no SSH private key"),
    ):
        with pytest.raises(errors.Failure, match=said):
            ssh.private_key_file(given)
    key.chmod(0o644)
    with pytest.raises(errors.Failure, match="chmod 600"):
        ssh.private_key_file(str(key))


# -- which way, and what it needs --------------------------------------------------------------


class Cli:
    """Stands in for Railway's CLI: says what it is told to, and notes its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says("", "", 0)
        script = folder / "railway"
        script.write_text(
            "#!/bin/sh\n"
            f'[ "$*" = --version ] && exec cat {folder}/version\n'
            f'echo "$@" >> {folder}/calls\n'
            f"cat {folder}/out; cat {folder}/err >&2; exit $(cat {folder}/code)\n"
        )
        script.chmod(0o755)
        self.version("5.43.1")

    def version(self, text: str) -> None:
        (self.folder / "version").write_text(f"railway {text}\n")
        program._version.cache_clear()

    def says(self, out: str, err: str, code: int) -> None:
        for name, text in (("out", out), ("err", err), ("code", str(code))):
            (self.folder / name).write_text(text)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    folder = tmp_path / "bin"
    folder.mkdir()
    made = Cli(folder)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    yield made
    program._version.cache_clear()


def api(kind: str) -> Api:
    made = Api(Token("token-value", "flag"))
    made._scope_is_read, made._scope = True, {"projectId": "p"} if kind == "project" else None
    return made


def run(kind: str = "account", key: Path | None = None) -> ssh.Outcome:
    return ssh.ssh(
        api(kind), project="p", environment="e", service="s", words=["a", "b c"], key=key
    )


@pytest.mark.parametrize(
    ("err", "code", "said", "no_key"),
    [
        ("git@x: Permission denied (publickey).", 255, "Railway does not know the SSH key", True),
        ("No SSH keys found in your SSH agent or ~/.ssh/", 1, "needs an SSH key", True),
        ("No registered SSH keys found. Register one with:", 1, "needs an SSH key", True),
        ("Host key verification failed.", 255, "ssh-keyscan ssh.railway.com", False),
        ("error: unexpected argument '-i' found", 2, "run `railway upgrade`", False),
        ("usage: pulse-railway control [-h]", 2, "run `pulse-railway ensure`", False),
        ("Unauthorized. Please login with `railway login`", 1, "Unauthorized", False),
    ],
)
def test_each_cause_has_its_sentence(
    cli: Cli, err: str, code: int, said: str, no_key: bool
) -> None:
    cli.says("", f"Using SSH key from file /x/id_ed25519: me\n{err}\n", code)
    outcome = run()
    assert said in outcome.message
    assert (outcome.permanent, outcome.no_key) == (True, no_key)
    assert "Using SSH key" not in outcome.message


@pytest.mark.parametrize("line", [x for x in SSH_ERRORS if "Host key" not in x])
def test_a_bad_day_is_no_missing_key(cli: Cli, line: str) -> None:
    """CLI 5 prints "Using SSH key" on every run; every failure was told as a missing key."""
    cli.says("", f"Using SSH key from file /x/id_ed25519: me\n{line}\n", 255)
    outcome = run()
    assert not outcome.permanent
    assert "key" not in outcome.message.lower() or "SSH key" in line


def test_a_router_of_another_version_is_told_with_what_it_refuses(cli: Cli) -> None:
    usage = "usage: pulse-railway control lock [-h]\n    [--nonce NONCE]\n"
    cli.says("", f"{usage}pulse-railway control lock: error: argument --x: no\n", 2)
    said = "another version of pulse-railway, which refuses the command (argument --x: no): run"
    assert said in run().message


def test_a_container_without_the_command_is_asked_again(cli: Cli) -> None:
    """It may be starting: that was told as "the router runs another version", at once."""
    cli.says("", "sh: 1: pulse-railway: not found\n", 127)
    outcome = run()
    assert not outcome.permanent
    assert "the container has no `pulse-railway` command" in outcome.message


def test_a_traceback_of_the_command_is_told_as_that(cli: Cli) -> None:
    cli.says("", "Traceback (most recent call last):\n  File x\nKeyError: 'x'\n", 1)
    assert run().message == "the router's command failed: KeyError: 'x'"


def test_a_key_is_passed_on(cli: Cli, key: Path) -> None:
    run(key=key)
    assert (cli.folder / "calls").read_text() == (
        f"ssh --project p --environment e --service s -i {key} -- a 'b c'\n"
    )


@pytest.mark.parametrize(
    ("version", "kind", "said"),
    [
        ("4.16.0", "account", "4.16.0, and 4.17 is the oldest"),
        ("5.3.0", "project", "cannot upload with a project token"),
        ("5.4.0", "project", "cannot upload with a project token"),
        ("5.3.0", "account", None),
        ("5.4.1", "project", None),
        ("of the future", "project", None),
    ],
)
def test_a_cli_that_is_too_old(cli: Cli, version: str, kind: str, said: str | None) -> None:
    cli.version(version)
    if said is None:
        program.need_railway(api(kind))
        return
    with pytest.raises(errors.Failure, match=said):
        program.need_railway(api(kind))


def test_the_way_is_settled_by_what_there_is(
    cli: Cli, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is created. A project token may not ask which keys Railway knows."""

    def settled(kind: str, asked: Any = None, given: Path | None = None) -> ControlRoute:
        way = ControlRoute(asked, given, said.append)
        choose_route(api(kind), Stack(Target("p", "e", way), Names(), {}))
        return way

    said: list[str] = []
    assert settled("account").kind == "job"
    assert "go by the janitor" in said.pop()
    for kind in ("account", "project"):
        with pytest.raises(errors.Failure, match="railway ssh keys add"):
            settled(kind, "ssh")
        assert settled(kind, None, key).key == key
        assert settled(kind, "job").kind == "job"
    (tmp_path / ".ssh").mkdir()
    new_key(tmp_path / ".ssh" / "id_ed25519")
    assert settled("account") == ControlRoute(None, None, said.append, True)  # the CLI finds it
    assert settled("project").key == tmp_path / ".ssh" / "id_ed25519"
    cli.version("4.40.0")  # with a relay of its own, and no keys
    shutil.rmtree(tmp_path / ".ssh")
    assert settled("account", "ssh").key is None
    cli.version("5.43.1")
    monkeypatch.setenv("PATH", str(cli.folder))
    with pytest.raises(errors.Failure, match="`ssh` is not on PATH"):
        settled("account", "ssh", key)


# -- on the local Railway ----------------------------------------------------------------------


@pytest.fixture(name="two")
def two_as_they_were(two: Project) -> Project:
    """As conftest.py's, for each test."""
    set_faults(two.railway)
    if two.active != "second":
        two.ok("promote", "--deployment-id", "second", "--control", "ssh")
    return two


def test_who_has_no_key_is_turned_away(two: Project, tmp_path: Path) -> None:
    strange = str(new_key(tmp_path / "strange"))
    for given, said in ((strange, "does not know the SSH key"), ("", "needs an SSH key")):
        env = {"PULSE_RAILWAY_SSH_KEY": given, "HOME": str(tmp_path), "SSH_AUTH_SOCK": ""}
        verb = two.run("promote", "--deployment-id", "first", "--control", "ssh", **env)
        assert (verb.code, said in verb.error) == (1, True)
        assert two.active == "second"
        status = two.run("status", "--json", **env)  # by the janitor
        assert status.json["active"] == "second"
        assert "go by the janitor" in status.err


def test_a_registered_key_of_ones_own_is_found(two: Project, tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    path = new_key(tmp_path / ".ssh" / "id_ed25519")
    env = {"PULSE_RAILWAY_SSH_KEY": "", "HOME": str(tmp_path), "SSH_AUTH_SOCK": ""}
    assert "does not know" not in two.run("status", "--control", "ssh", **env).err
    two.railway.graphql(
        "mutation ($i: SshPublicKeyCreateInput!) { sshPublicKeyCreate(input: $i) { id } }",
        i={"name": "mine", "publicKey": path.with_suffix(".pub").read_text()},
    )
    assert two.run("status", "--control", "ssh", "--json", **env).json["active"] == "second"
    assert two.run("status", "--json", PULSE_RAILWAY_SSH_KEY=path.read_text()).json["active"]


def test_a_stranger_does_not_know_the_relay(two: Project) -> None:
    known = two.railway.root / "ssh" / "known_hosts"
    text = known.read_text()
    try:
        known.write_text("")
        verb = two.run("promote", "--deployment-id", "first")
        assert "ssh-keyscan ssh.railway.com" in verb.error
    finally:
        known.write_text(text)
    assert two.active == "second"


LOST = [
    *({"says": line, "exit": 255} for line in SSH_ERRORS if "Host key" not in line),
    {"drop": True},
    {"prints": "", "exit": 0},
    *({"prints": text, "exit": 0} for text in FOREIGN[:3]),
]


# every other one before the command ran; test_unreliable_ssh.py has all of them, in all verbs
@pytest.mark.parametrize(
    ("answer", "after"), [(answer, bool(i % 2)) for i, answer in enumerate(LOST)], ids=str
)
def test_an_answer_that_is_lost_once(two: Project, answer: dict[str, Any], after: bool) -> None:
    """Each line of a bad day, before and after the command ran: it is asked again, and known."""
    wanted = "first" if two.active == "second" else "second"
    two.faults({"match": "ssh", "after": after, **answer})
    verb = two.run("promote", "--deployment-id", wanted)
    two.faults()
    assert verb.code == 0, verb.err
    assert two.active == wanted


@pytest.fixture
def ci(two: Project, tmp_path: Path) -> dict[str, str]:
    """A CI's environment: a project token, no key, and no ssh that could be used."""
    token = two.railway.graphql(
        "mutation ($i: ProjectTokenCreateInput!) { projectTokenCreate(input: $i) }",
        i={"projectId": two.id, "environmentId": two.environment, "name": "ci"},
    )["projectTokenCreate"]
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 'no ssh here' >&2; exit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    return {
        "RAILWAY_TOKEN": token,
        "RAILWAY_API_TOKEN": "",
        "RAILWAY_PROJECT_ID": "",
        "RAILWAY_ENVIRONMENT_ID": "",
        "PULSE_RAILWAY_SSH_KEY": "",
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}:{two.env['PATH']}",
    }


def test_a_project_token_and_nothing_else_deploys(two: Project, ci: dict[str, str]) -> None:
    active = two.active
    done = two.run("deploy", "main.py", "--deployment-id", "third", "--json", **ci)
    assert done.code == 0, done.err
    assert "go by the janitor" in done.err
    assert two.active == "third"
    assert two.ok("rollback", **ci)["deployment_id"] == active
    assert two.ok("status", **ci)["active"] == active
    assert two.run("delete", "--deployment-id", "third", **ci).code == 0
    assert two.services == BASE | {"first", "second"}
    refused = two.run("delete", "--deployment-id", str(active), **ci)
    assert "is active" in refused.error


def test_where_railway_does_not_run_the_janitor_at_once(two: Project, ci: dict[str, str]) -> None:
    """Its next run by the clock does it."""
    refusal = {"match": "deploymentInstanceExecutionCreate", "error": "Not Authorized", "times": 9}
    set_faults(two.railway, faults=[refusal])
    wanted = "first" if two.active == "second" else "second"
    clock = threading.Timer(6.0, lambda: two.railway.local("cron/pulse-janitor", {}))
    clock.start()
    done = two.run("promote", "--deployment-id", wanted, **ci)
    clock.join()
    set_faults(two.railway)
    assert done.code == 0, done.err
    assert "waiting for its schedule, */5" in done.err
    assert two.active == wanted


def test_two_by_the_janitor_at_once(two: Project, ci: dict[str, str]) -> None:
    """One variable for all: each gets its own answer."""
    runs: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda name=name: runs.append(two.run("promote", "--deployment-id", name, **ci))
        )
        for name in ("first", "second", "first")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for done in runs:
        assert done.code == 0 or "another deploy ran" in done.error, done.err
    assert two.active in ("first", "second")


def test_a_deploy_that_is_interrupted_cleans_up_by_the_janitor(
    two: Project, ci: dict[str, str]
) -> None:
    """It knew of no janitor then, and left its service."""
    before = two.active
    slow = {"match": "deploymentInstanceExecutionCreate", "nth": 3, "delay": 3}
    set_faults(two.railway, faults=[slow])
    process = subprocess.Popen(
        [sys.executable, "-m", "pulse_railway", "deploy", "main.py", "--deployment-id", "cut"],
        cwd=TINY,
        env={**two.env, **ci},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if line.strip().startswith("promote it"):
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            break
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 130, said
    set_faults(two.railway)
    assert two.services == BASE | {"first", "second"}
    assert two.active == before


def test_a_command_that_nobody_waits_for_is_withdrawn(two: Project, ci: dict[str, str]) -> None:
    """A deploy that was interrupted must not promote five minutes later."""
    refusal = {"match": "deploymentInstanceExecutionCreate", "error": "Not Authorized", "times": 9}
    set_faults(two.railway, faults=[refusal])
    before, left = two.active, two.variables("pulse-janitor").get(contract.CONTROL)
    wanted = "first" if before == "second" else "second"
    process = subprocess.Popen(
        [sys.executable, "-m", "pulse_railway", "promote", "--deployment-id", wanted],
        env={**two.env, **ci},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job's is ignored
    )
    deadline = time.monotonic() + 30
    while two.variables("pulse-janitor").get(contract.CONTROL) == left:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    set_faults(two.railway)
    assert two.variables("pulse-janitor")[contract.CONTROL] == ""
    assert json.dumps(two.railway.local("cron/pulse-janitor", {}))
    assert two.active == before
