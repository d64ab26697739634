"""Runs commands inside a service by `railway ssh`, and finds the key for it.

Since 4.43 Railway's CLI runs the system's `ssh`. The CLI reads the keys of the agent and of
~/.ssh/*.pub, and asks Railway which of them are registered. A project token may not ask that; `-i`
skips the question. Older versions have a relay of their own, and take no key.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pulse_railway import contract
from pulse_railway.errors import Failure, keep_secret, redact
from pulse_railway.railway.api import Api
from pulse_railway.railway.program import need, need_railway, program_version, run_railway

TIMEOUT = 60.0  # seconds
USES_KEYS = (4, 43)  # the first version of the CLI that uses SSH keys
NO_KEY = (
    "`railway ssh` needs an SSH key that Railway knows: `ssh-keygen -t ed25519` if there is none,"
    " then `railway ssh keys add`, once; in CI give the private key as --ssh-key or"
    f" {contract.SSH_KEY}, or pass --control job"
)
UNKNOWN_KEY = (
    "Railway does not know the SSH key: register it once, with `railway ssh keys add` as the"
    " account or in the workspace that the project is in (docs/ci.md), or pass --control job"
)
UNKNOWN_HOST = (
    "ssh does not know Railway's relay yet: run `ssh-keyscan ssh.railway.com >> ~/.ssh/known_hosts`"
    " once, in CI as a step before the deploy"
)
OLD_CLI = "this `railway` takes no key (-i): run `railway upgrade`, or pass --control job"
OTHER_VERSION = "the router runs another version of pulse-railway{}: run `pulse-railway ensure`"
# no verdict on its version: a container that is starting, or another service's, has none either
NOT_FOUND = (
    "the container has no `pulse-railway` command: if this stays so, `pulse-railway ensure` deploys"
    " the router again"
)

# Failures that a retry does not help: a pattern of OpenSSH's or the CLI's messages (neither is
# translated), our message, and whether a key is missing. All other failures are retried.
CAUSES = (
    (re.compile(r"Permission denied \(publickey"), UNKNOWN_KEY, True),
    (re.compile(r"No registered SSH keys? found"), NO_KEY, True),
    (re.compile(r"No SSH keys? found"), NO_KEY, True),
    (re.compile(r"Host key verification failed"), UNKNOWN_HOST, False),
    (re.compile(r"unexpected argument '-(i|-identity-file)'"), OLD_CLI, False),
    (re.compile(r"usage: pulse-railway control"), OTHER_VERSION, False),
    (re.compile(r"(?i)\bunauthorized|not authorized|both RAILWAY_TOKEN and"), "", False),
)


REFUSED_ARGUMENTS = re.compile(r"^pulse-railway control[ \w]*: error: (.*)", re.MULTILINE)
NO_COMMAND = re.compile(r"pulse-railway: (?:command )?not found")


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    It has no exit status, since a relay that cannot reach the service ends with 0 too.
    """

    stdout: str
    message: str  # for the user, if `stdout` has no answer
    permanent: bool  # a retry would not help
    no_key: bool = False  # there is no key that Railway accepts


class NoKey(Failure):
    """There is no key for `railway ssh`."""


def ssh(
    api: Api,
    *,
    project: str,
    environment: str,
    service: str,
    words: Sequence[str],
    key: Path | None = None,
) -> Outcome:
    """Run a command once inside a service."""
    # all versions of the CLI pass a single, shell-quoted word on in the same way
    command = ["railway", "ssh", "--project", project, "--environment", environment]
    command += ["--service", service, *(["-i", str(key)] if key else []), "--", shlex.join(words)]
    done = run_railway(command, api, TIMEOUT)
    # CLI 5 prints the key that it uses on every run
    lines = [x for x in done.stderr.splitlines() if not x.strip().startswith("Using SSH key")]
    message = redact("\n".join(lines).strip() or done.stdout.strip())[-2000:]
    for pattern, meaning, no_key in CAUSES:
        if pattern.search(message) and done.returncode:
            refused = REFUSED_ARGUMENTS.search(message)
            reason = f", which refuses the command ({refused[1]})" if refused else ""
            return Outcome(done.stdout, meaning.format(reason) or message, True, no_key)
    if NO_COMMAND.search(message):
        message = NOT_FOUND
    if "Traceback (most recent call last)" in message:  # the command's, in the router
        message = f"the router's command failed: {message.splitlines()[-1]}"
    message = message or f"`railway ssh` ended with {done.returncode} and said nothing"
    return Outcome(done.stdout, message, False)


# -- the key -----------------------------------------------------------------------------------


def need_ssh(api: Api, key: Path | None) -> Path | None:
    """Check that `railway ssh` can run, and return the key for `-i`; None: the CLI chooses.

    Raises NoKey if there is none, and Failure if a program is missing or too old.
    """
    need_railway(api)
    version = program_version("railway")
    if version and version < USES_KEYS:
        return None
    need("ssh")
    if key:
        return key
    folder = Path.home() / ".ssh"
    if api.is_project_token:  # the CLI cannot ask which keys are registered, and needs `-i`
        for name in ("id_ed25519", "id_ecdsa", "id_rsa"):
            if (folder / name).is_file():
                return folder / name
        raise NoKey(NO_KEY)
    if any(folder.glob("*.pub")) or _agent_has_keys():
        return None
    raise NoKey(NO_KEY)


def _agent_has_keys() -> bool:
    if not os.environ.get("SSH_AUTH_SOCK") or not shutil.which("ssh-add"):
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(["ssh-add", "-l"], capture_output=True, timeout=10).returncode == 0
    return False


def private_key_file(key_or_path: str) -> Path:
    """Return the file of a private key, given as its path, or as the key itself (a CI's secret).

    A key itself is written to a file that only this user can read, and that is deleted at the end
    of this process. Raises Failure for a key that `ssh` cannot use without a question.
    """
    if "PRIVATE KEY-----" in key_or_path:
        keep_secret(key_or_path)
        return _check_key(_write_key(key_or_path), "the private key in " + contract.SSH_KEY)
    path = Path(key_or_path).expanduser()
    if not path.is_file():
        raise Failure(
            f"there is no SSH key at {path}: --ssh-key and {contract.SSH_KEY} take the path of a"
            " private key, or the private key itself"
        )
    if path.suffix == ".pub":
        raise Failure(f"{path} is the public half: pass the private key, {path.with_suffix('')}")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise Failure(f"ssh refuses a key that others can read: chmod 600 {path}")
    return _check_key(path, str(path))


def _write_key(key: str) -> Path:
    if "\n" not in key.strip():
        key = key.replace("\\n", "\n")  # some secret stores escape line breaks
    fd, name = tempfile.mkstemp(prefix="pulse-railway-key-")  # with mode 600
    atexit.register(Path(name).unlink, missing_ok=True)
    with open(fd, "w") as file:
        file.write("\n".join(line.strip() for line in key.strip().splitlines()) + "\n")
    return Path(name)


def _check_key(path: Path, label: str) -> Path:
    """Return `path`. Raises Failure, with the label, if it has a passphrase or is no key."""
    if not (ssh_keygen := shutil.which("ssh-keygen")):
        return path  # `need_ssh` reports a missing OpenSSH
    done = subprocess.run(
        [ssh_keygen, "-y", "-P", "", "-f", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=30,
    )
    if done.returncode == 0:
        return path
    if "passphrase" in done.stderr:
        raise Failure(
            f"{label} has a passphrase, and ssh cannot ask for it here: use a key without one, or"
            " `ssh-add` it to an agent and leave --ssh-key out"
        )
    raise Failure(f"{label} is no SSH private key that ssh can read")
