"""Runs Railway's CLI. Secrets are passed by environment, never as arguments."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pulse_railway import contract
from pulse_railway.errors import Failure
from pulse_railway.railway.api import Api

# Parts of messages of `railway up` about failures of the network, after which it is retried.
TRANSIENT = (
    "timed out",
    "timeout",
    "connection reset",
    "connection closed",
    "connection refused",
    "temporary failure",
    "not reachable",
    "(429)",
    "status code 5",
    "status code 429",
    "answered 429",
    "ratelimited",
    "rate limit",
    "error sending request",
    "502",
    "503",
    "504",
)


# the first version with `up --project`, and with `ssh` without a terminal, with exit statuses
OLDEST_CLI = (4, 17)
# from and to these versions `up` fails with a project token
BROKEN_WITH_PROJECT_TOKEN = ((5, 3, 0), (5, 4, 0))


def need(program: str) -> None:
    """Raise Failure if a program is not installed."""
    if shutil.which(program) is None:
        remedies = {
            "railway": "install it: https://docs.railway.com/guides/cli",
            "docker": "install Docker with buildx, or leave the image repository out",
            "ssh": "`railway ssh` uses it; install OpenSSH's client, or pass --control job",
        }
        raise Failure(f"`{program}` is not on PATH: {remedies.get(program, 'install it')}")


def program_version(program: str) -> tuple[int, ...]:
    """Return the version of `<program> --version` as numbers; empty if it prints none."""
    return _version(shutil.which(program) or program)


@functools.cache
def _version(path: str) -> tuple[int, ...]:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\d+(?:\.\d+)+", done.stdout)
    return tuple(map(int, match[0].split("."))) if match else ()


def need_railway(api: Api) -> None:
    """Raise Failure if Railway's CLI is missing, or has a version that does not work."""
    need("railway")
    version = program_version("railway")
    text = ".".join(map(str, version))
    if version and version < OLDEST_CLI:
        oldest = ".".join(map(str, OLDEST_CLI))
        raise Failure(
            f"`railway` is {text}, and {oldest} is the oldest that works: run `railway upgrade`"
        )
    first, last = BROKEN_WITH_PROJECT_TOKEN
    if first <= version <= last and api.is_project_token:
        raise Failure(f"`railway` {text} cannot upload with a project token: run `railway upgrade`")


def cli_environment(api: Api) -> dict[str, str]:
    """Return this process's environment, with the token in the CLI's variable for its kind."""
    env = dict(os.environ)
    env.pop(contract.RAILWAY_TOKEN, None)
    env.pop(contract.RAILWAY_API_TOKEN, None)
    name = contract.RAILWAY_TOKEN if api.is_project_token else contract.RAILWAY_API_TOKEN
    env[name] = api.token.value
    return env


def run_railway(
    command: list[str],
    api: Api,
    timeout: float,
    cwd: Path | None = None,
    more: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the Railway CLI to its end.

    After `timeout` seconds it is killed, and the result has status 1 and a message. The CLI runs in
    a session of its own, so that its children (`ssh`), which hold our pipes open, are killed with
    it.

    Args:
        more: more variables of its environment.
    """
    process = subprocess.Popen(
        command,
        env={**(more or {}), **cli_environment(api)},
        stdin=subprocess.DEVNULL,  # the user would not see a question
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=cwd,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, out, err)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"timed out after {timeout:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


def transient(text: str) -> bool:
    lower = text.lower()
    return any(pattern in lower for pattern in TRANSIENT)
