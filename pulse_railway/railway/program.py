"""Running Railway's CLI and docker. Secrets go to them by environment, never as arguments."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
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
    "502",
    "503",
    "504",
)


def need(program: str) -> None:
    """Raises Failure where a program that will be needed is not installed."""
    if shutil.which(program) is None:
        how = {
            "railway": "install it: https://docs.railway.com/guides/cli",
            "docker": "install Docker with buildx, or leave the image repository out",
        }
        raise Failure(f"`{program}` is not on PATH: {how.get(program, 'install it')}")


def environment(api: Api) -> dict[str, str]:
    """The process's, with the token in the one variable that the CLI expects for its kind."""
    env = dict(os.environ)
    env.pop(contract.RAILWAY_TOKEN, None)
    env.pop(contract.RAILWAY_API_TOKEN, None)
    name = contract.RAILWAY_TOKEN if api.is_project_token else contract.RAILWAY_API_TOKEN
    env[name] = api.token.value
    return env


def run(
    command: list[str], api: Api, timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The Railway CLI to its end; one that hangs ends with a status of 1 and says so.

    It runs in a session of its own: what it has started (`ssh`) ends with it, also on a signal,
    and would otherwise hold our pipes open.
    """
    process = subprocess.Popen(
        command,
        env=environment(api),
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
