"""`railway up`: upload a folder and have Railway build it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from pulse_railway.errors import Failure, redact
from pulse_railway.railway.api import Api
from pulse_railway.railway.program import run_railway, transient

PAUSES = (1.0, 5.0, 15.0)  # seconds before each retry
TIMEOUT = 1800.0  # seconds
HTTP_TIMEOUT = (
    "RAILWAY_HTTP_TIMEOUT"  # the CLI's seconds for one request or upload; its default: 90
)
RATE_LIMIT = re.compile(r"[Tt]ry again in (?:about )?(\d+) (second|minute)")
MAX_PAUSE = 300.0  # seconds


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

    A failed upload is retried, since a second one replaces the first. Returns the deployment's id,
    or None if the CLI is too old to print it. Raises Failure with the CLI's message.
    """
    command = ["railway", "up", str(context), "--project", project, "--environment", environment]
    command += ["--service", service, "--detach", "--json", "--path-as-root"]
    if no_gitignore:
        command.append("--no-gitignore")
    for pause in (*PAUSES, None):
        done = run_railway(command, api, TIMEOUT, context, {HTTP_TIMEOUT: f"{TIMEOUT:.0f}"})
        if done.returncode == 0:
            return _deployment_id(done.stdout)
        message = error_text(done.stdout, done.stderr)
        if "unexpected argument '--json'" in done.stderr and "--json" in command:
            command.remove("--json")  # CLIs before 4.24 do not have it
            continue
        if pause is None or not transient(message + done.stderr):
            break
        if again := RATE_LIMIT.search(message):
            pause = max(pause, float(again[1]) * (60 if again[2] == "minute" else 1))
            if pause > MAX_PAUSE:
                break
        time.sleep(pause)
    raise Failure(f"`railway up` failed: {redact(message)}")


def error_text(stdout: str, stderr: str) -> str:
    """Return the CLI's error message.

    With `--json` an error is one object on stdout, with a hint, and stderr has only warnings.
    """
    for line in reversed(stdout.splitlines()):
        try:
            error = json.loads(line)
            message = error["error"]
        except (ValueError, KeyError, TypeError):
            continue
        hint = error.get("hint")
        return f"{message} ({hint})" if hint else str(message)
    return (stderr.strip() or stdout.strip() or "it said nothing")[-2000:]


def _deployment_id(stdout: str) -> str | None:
    for line in reversed(stdout.splitlines()):
        try:
            deployment_id = json.loads(line).get("deploymentId")
        except (ValueError, AttributeError):
            continue
        return str(deployment_id) if deployment_id else None
    return None
