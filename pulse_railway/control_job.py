"""Sends control commands by the janitor, for a CI that has only a project token.

The command is written to a variable of the janitor's service, the janitor is started, and its
answer is read from another variable. janitor.py carries the command out with the same function of
control.py as an ssh command. Neither variable holds a secret.

We do not know whether Railway lets a project token start a cron service. Where it does not, the
janitor's next scheduled run carries the command out.
"""

from __future__ import annotations

import contextlib
import json
import time

from pulse_railway import contract
from pulse_railway.errors import Failure, Interrupted
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, ApiError
from pulse_railway.railway.ssh import Outcome
from pulse_railway.services import write_variables
from pulse_railway.stack import Service, Stack, read_variables

POLL = 1.0  # seconds between two polls at first
MAX_POLL = 5.0  # seconds between two polls at most
RUN_TIMEOUT = 120.0  # seconds for a run that was started at once
RERUN_INTERVAL = 20.0  # seconds between two starts: Railway skips one while a run is alive
SCHEDULE_TIMEOUT = 420.0  # seconds for a scheduled run: Railway's shortest schedule is 5 minutes


def run_command(api: Api, stack: Stack, words: list[str], nonce: str) -> Outcome:
    """Have the janitor carry out a control command, once for its nonce.

    Returns the same answer as by ssh. If none comes in time, the command is cancelled, so that it
    is not carried out later. Raises Failure without a janitor.
    """
    janitor = stack.janitor
    if janitor is None:
        raise Failure(
            f"{stack.names.janitor} is missing, and the command was not sent: pass --control ssh,"
            " or run `pulse-railway ensure --repair`, which creates it again"
        )
    try:
        answer = _request(api, stack, janitor, words, nonce)
        name = janitor.name
        why = f"{name} gave no answer in time; see `pulse-railway logs --service {name}`"
    except Failure as failure:
        answer, why = "", str(failure)
    except (Interrupted, KeyboardInterrupt):
        _cancel(api, stack, janitor, nonce)
        raise
    if not answer:
        _cancel(api, stack, janitor, nonce)
    return Outcome(answer, why, True)


def _request(api: Api, stack: Stack, janitor: Service, words: list[str], nonce: str) -> str:
    """Write the command, start the janitor, and return its answer; "" if there was none in time."""
    timeout, started, pause = RUN_TIMEOUT, 0.0, POLL
    began = time.monotonic()
    while time.monotonic() < began + timeout:
        variables = _read_variables(api, stack, janitor)
        answer = variables.get(contract.CONTROL_ANSWER, "")
        if _nonce_of(answer) == nonce:
            return answer
        ours = _nonce_of(variables.get(contract.CONTROL, "")) == nonce
        if not ours and not _is_pending(variables):  # another caller's command goes first
            request = {"nonce": nonce, "words": words, "until": time.time() + SCHEDULE_TIMEOUT}
            write_variables(api, stack.target, janitor.id, {contract.CONTROL: json.dumps(request)})
            ours = True
        if ours and time.monotonic() > started + RERUN_INTERVAL:
            started = time.monotonic()
            if not _run_now(api, janitor) and timeout == RUN_TIMEOUT:
                timeout = SCHEDULE_TIMEOUT
                stack.target.control_route.info(
                    "Railway does not run the janitor at once: waiting for its schedule,"
                    f" {janitor.settings.get('cronSchedule')}"
                )
        time.sleep(pause)
        pause = min(pause * 1.3, MAX_POLL)
    return ""


def _read_variables(api: Api, stack: Stack, janitor: Service) -> dict[str, str]:
    read_variables(api, Stack(stack.target, stack.names, {janitor.name: janitor}))
    return janitor.variables


def _nonce_of(text: str) -> str | None:
    try:
        return str(json.loads(text)["nonce"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_pending(variables: dict[str, str]) -> bool:
    """Does a command wait for its answer, and is its time not over?"""
    request = variables.get(contract.CONTROL, "")
    if _nonce_of(request) in (None, _nonce_of(variables.get(contract.CONTROL_ANSWER, ""))):
        return False
    try:
        return time.time() < float(json.loads(request)["until"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _run_now(api: Api, janitor: Service) -> bool:
    """Start the janitor; return whether Railway allows that."""
    try:
        api.call(documents.EXECUTE, instance=janitor.instance_id, repeatable=True)
    except ApiError:
        return False
    return True


def _cancel(api: Api, stack: Stack, janitor: Service, nonce: str) -> None:
    with contextlib.suppress(Failure):
        if _nonce_of(_read_variables(api, stack, janitor).get(contract.CONTROL, "")) == nonce:
            write_variables(api, stack.target, janitor.id, {contract.CONTROL: ""})
