"""The two programs we run: Railway's CLI (`up`, `ssh`) and docker.

Secrets go to them by environment, never as arguments.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from pulse_railway import contract
from pulse_railway.errors import Failure, Uncertain, redact
from pulse_railway.railway.api import Api

SSH_ATTEMPTS = 4
SSH_TIMEOUT = 90.0  # seconds
UP_ATTEMPTS = 3
UP_TIMEOUT = 1800.0
# What the network, not the command, does to `railway ssh` and `railway up`.
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
    "no running instance",
    "502",
    "503",
    "504",
)
SSH_KEY_WORDS = ("ssh key", "ssh-key", "permission denied (publickey", "no keys found")
SSH_KEY_HELP = (
    "`railway ssh` needs an SSH key that Railway knows: run `railway ssh keys add` once; in CI,"
    " put that private key in ~/.ssh before the deploy"
)


def need(program: str) -> None:
    """Raises Failure where a program that will be needed is not installed."""
    if shutil.which(program) is None:
        how = {
            "railway": "install it: https://docs.railway.com/guides/cli",
            "docker": "install Docker with buildx, or leave the image repository out",
        }
        raise Failure(f"`{program}` is not on PATH: {how.get(program, 'install it')}")


def _environment(api: Api) -> dict[str, str]:
    """The process's, with the token in the one variable that the CLI expects for its kind."""
    env = dict(os.environ)
    env.pop(contract.RAILWAY_TOKEN, None)
    env.pop(contract.RAILWAY_API_TOKEN, None)
    name = contract.RAILWAY_TOKEN if api.is_project_token else contract.RAILWAY_API_TOKEN
    env[name] = api.token.value
    return env


def _run(
    command: list[str], api: Api, timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The Railway CLI to its end; one that hangs ends with a status of 1 and says so."""
    try:
        return subprocess.run(
            command,
            env=_environment(api),
            stdin=subprocess.DEVNULL,  # a question could not be seen
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"timed out after {timeout:.0f} s")


def _transient(text: str) -> bool:
    lower = text.lower()
    return any(pattern in lower for pattern in TRANSIENT)


def up(
    api: Api,
    *,
    project: str,
    environment: str,
    service: str,
    context: Path,
    no_gitignore: bool = False,
) -> str | None:
    """Upload a folder and have Railway build it.

    Returns the deployment's id, or None from a CLI that is too old to name it.
    Raises Failure with the CLI's own words. An upload is repeated: a second one supersedes the
    first.
    """
    command = ["railway", "up", str(context), "--project", project, "--environment", environment]
    command += ["--service", service, "--detach", "--json", "--path-as-root"]
    if no_gitignore:
        command.append("--no-gitignore")
    for attempt in range(UP_ATTEMPTS):
        done = _run(command, api, UP_TIMEOUT, context)
        if done.returncode == 0:
            return _deployment_id(done.stdout)
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        if "--json" in said and "--json" in command:
            command.remove("--json")
            continue
        if not _transient(said):
            break
        time.sleep(1.0 + attempt)
    raise Failure(f"`railway up` failed: {redact(said)}")


def _deployment_id(stdout: str) -> str | None:
    for line in reversed(stdout.splitlines()):
        try:
            found = json.loads(line).get("deploymentId")
        except (ValueError, AttributeError):
            continue
        return str(found) if found else None
    return None


def control(
    api: Api, *, project: str, environment: str, router: str, arguments: Sequence[str]
) -> dict[str, Any]:
    """Run `pulse-railway control ...` inside the router service and return what it says.

    Every control command can be repeated, so a lost connection is tried again.

    Raises:
        Failure: the command refused, or ssh cannot be used.
        Uncertain: the connection was lost each time; the command may have run.
    """
    # One shell-quoted word: every version of the CLI passes that on alike.
    remote = shlex.join(["pulse-railway", "control", *arguments])
    command = ["railway", "ssh", "--project", project, "--environment", environment]
    command += ["--service", router, "--", remote]
    for attempt in range(SSH_ATTEMPTS):
        done = _run(command, api, SSH_TIMEOUT)
        answer = _last_json(done.stdout)
        if done.returncode == 0 and answer is not None:
            return answer
        if answer is not None and answer.get("error"):
            raise Failure(str(answer["error"]))
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        if any(words in said.lower() for words in SSH_KEY_WORDS):
            raise Failure(f"{SSH_KEY_HELP} ({redact(said.splitlines()[-1])})")
        if not _transient(said):
            raise Failure(f"`pulse-railway control {arguments[0]}` failed: {redact(said)}")
        time.sleep(1.0 + attempt)
    raise Uncertain(f"`railway ssh` to {router} failed: {redact(said)}")


def _last_json(stdout: str) -> dict[str, Any] | None:
    lines = [line for line in stdout.splitlines() if line.strip()]
    try:
        answer = json.loads(lines[-1])
    except (ValueError, IndexError):
        return None
    return cast(dict[str, Any], answer) if isinstance(answer, dict) else None


def docker_build(
    *,
    image: str,
    dockerfile: Path,
    context: Path,
    build_args: dict[str, str],
    on_line: Callable[[str], None],
) -> None:
    """`docker buildx build --push`. Raises Failure with the end of its output.

    Build arguments are passed by name, their values by environment.
    """
    command = ["docker", "buildx", "build", "--push", "--platform", "linux/amd64"]
    command += ["--progress", "plain", "-t", image, "-f", str(dockerfile)]
    for name in sorted(build_args):
        command += ["--build-arg", name]
    command.append(str(context))
    env = {**os.environ, **build_args}
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(redact(line.rstrip()))
            on_line(lines[-1])
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        tail = "\n".join(lines[-20:])
        raise Failure(f"`docker buildx build` failed with status {code}:\n{tail}")
