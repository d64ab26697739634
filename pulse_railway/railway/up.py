"""`railway up`: upload a folder and have Railway build it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from pulse_railway.errors import Failure, redact
from pulse_railway.railway.api import Api
from pulse_railway.railway.program import run_railway, transient

PAUSES = (1.0, 5.0, 15.0)  # seconds, between one attempt and the next
TIMEOUT = 1800.0  # seconds
HTTP_TIMEOUT = "RAILWAY_HTTP_TIMEOUT"  # the CLI's for one request, 90 s by default, uploads too
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

    Returns the deployment's id, or None from a CLI that is too old to name it.
    Raises Failure with the CLI's own words. An upload is repeated: a second one supersedes the
    first.
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
            command.remove("--json")  # a CLI before 4.24
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
    """Why it failed, in the CLI's words: with `--json` an error is one object on stdout, with a
    hint, and stderr has warnings."""
    for line in reversed(stdout.splitlines()):
        try:
            found = json.loads(line)
            message = found["error"]
        except (ValueError, KeyError, TypeError):
            continue
        hint = found.get("hint")
        return f"{message} ({hint})" if hint else str(message)
    return (stderr.strip() or stdout.strip() or "it said nothing")[-2000:]


def _deployment_id(stdout: str) -> str | None:
    for line in reversed(stdout.splitlines()):
        try:
            found = json.loads(line).get("deploymentId")
        except (ValueError, AttributeError):
            continue
        return str(found) if found else None
    return None
