"""Running Railway's CLI and docker. Secrets go to them by environment, never as arguments."""

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

# What the network, not the command, does to `railway up`.
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


# `up --project`; without a terminal and with exit statuses of the command, `ssh` too
OLDEST_CLI = (4, 17)
# `up` with a project token fails in these
BROKEN_WITH_PROJECT_TOKEN = ((5, 3, 0), (5, 4, 0))


def need(program: str) -> None:
    """Raises Failure where a program that will be needed is not installed."""
    if shutil.which(program) is None:
        how = {
            "railway": "install it: https://docs.railway.com/guides/cli",
            "docker": "install Docker with buildx, or leave the image repository out",
            "ssh": "`railway ssh` uses it; install OpenSSH's client, or pass --control job",
        }
        raise Failure(f"`{program}` is not on PATH: {how.get(program, 'install it')}")


def program_version(program: str) -> tuple[int, ...]:
    """What `<program> --version` says, as numbers; empty where it says nothing like one."""
    return _version(shutil.which(program) or program)


@functools.cache
def _version(path: str) -> tuple[int, ...]:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"\d+(?:\.\d+)+", done.stdout)
    return tuple(map(int, found[0].split("."))) if found else ()


def need_railway(api: Api) -> None:
    """Raises Failure where Railway's CLI is missing, or is one that cannot do what we need."""
    need("railway")
    found = program_version("railway")
    shown = ".".join(map(str, found))
    if found and found < OLDEST_CLI:
        oldest = ".".join(map(str, OLDEST_CLI))
        raise Failure(
            f"`railway` is {shown}, and {oldest} is the oldest that works: run `railway upgrade`"
        )
    first, last = BROKEN_WITH_PROJECT_TOKEN
    if first <= found <= last and api.is_project_token:
        raise Failure(
            f"`railway` {shown} cannot upload with a project token: run `railway upgrade`"
        )


def cli_environment(api: Api) -> dict[str, str]:
    """The process's, with the token in the one variable that the CLI expects for its kind."""
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
    """The Railway CLI to its end; one that hangs ends with a status of 1 and says so.

    It runs in a session of its own: what it has started (`ssh`) ends with it, also on a signal,
    and would otherwise hold our pipes open.
    """
    process = subprocess.Popen(
        command,
        env={**(more or {}), **cli_environment(api)},
        stdin=subprocess.DEVNULL,  # a question could not be seen
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
