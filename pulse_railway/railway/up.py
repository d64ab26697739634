"""`railway up`: upload a folder and have Railway build it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pulse_railway.errors import Failure, redact
from pulse_railway.railway.api import Api
from pulse_railway.railway.program import run, transient

UP_ATTEMPTS = 3
UP_TIMEOUT = 1800.0


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
        done = run(command, api, UP_TIMEOUT, context)
        if done.returncode == 0:
            return _deployment_id(done.stdout)
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        if "--json" in said and "--json" in command:
            command.remove("--json")
            continue
        if not transient(said):
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
