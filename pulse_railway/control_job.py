"""Sends control commands by the janitor, for a CI that has only a project token.

The command is written to a variable of the janitor's service, the janitor is started, and its
answer is read from another variable. janitor.py carries the command out with the same function of
control.py as an ssh command. Neither variable holds a secret.

A caller that was killed cannot withdraw its command. So the janitor carries out a command that
changes something only after its caller has confirmed, to that very run, that it still waits.

We do not know whether Railway lets a project token start a cron service. Where it does not, the
janitor's next scheduled run carries the command out.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pulse_railway import contract, provenance
from pulse_railway.errors import Failure, Interrupted
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, ApiError
from pulse_railway.railway.clock import clock_difference
from pulse_railway.railway.ssh import Outcome
from pulse_railway.services import write_variables
from pulse_railway.stack import Service, Stack, read_variables

POLL = 1.0  # seconds between two polls at first
MAX_POLL = 5.0  # seconds between two polls at most
RUN_TIMEOUT = 120.0  # seconds for a run that was started at once
RERUN_INTERVAL = 20.0  # seconds between two starts: Railway skips one while a run is alive
SCHEDULE_TIMEOUT = 420.0  # seconds for a scheduled run: Railway's shortest schedule is 5 minutes
OTHERS_TIMEOUT = 60.0  # seconds for another caller's command before this one takes its place
REQUEST_BYTES = 100 * 1024  # with a variable of 128 KB Linux starts no process


def run_command(api: Api, stack: Stack, words: list[str], nonce: str) -> Outcome:
    """Have the janitor carry out a control command, once for its nonce.

    Returns the same answer as by ssh. If none comes in time, the command is withdrawn, so that it
    is not carried out later. Raises Failure without a janitor, and for a command that is too long.
    """
    janitor = stack.janitor
    if janitor is None:
        raise Failure(
            f"{stack.names.janitor} is missing, and the command was not sent: pass --control ssh,"
            " or run `pulse-railway ensure --repair`, which creates it again"
        )
    job = Job(api, stack, janitor, words, nonce)
    if len(job.text(SCHEDULE_TIMEOUT).encode()) > REQUEST_BYTES:
        raise Failure(f"`{words[0]}` is too long for the janitor: pass --control ssh")
    try:
        answer = job.run()
        why = "" if answer else job.why_silent()
    except Failure as failure:
        answer, why = "", str(failure)
    except (Interrupted, KeyboardInterrupt):
        job.withdraw()
        raise
    if not answer:
        job.withdraw()
    return Outcome(answer, why, True)


@dataclass
class Job:
    """One command, from its writing to its answer."""

    api: Api
    stack: Stack
    janitor: Service
    words: list[str]
    nonce: str
    confirmed: str | None = None  # the janitor's run that may carry the command out
    # another caller's command that was there first, and when this one has seen it
    other: str = field(default="", init=False)
    other_seen: float = field(default=0.0, init=False)

    def run(self) -> str:
        """Write the command, start the janitor, and return its answer; "" without one in time."""
        timeout, pause, written = RUN_TIMEOUT, POLL, False
        began, next_start = time.monotonic(), 0.0
        while (now := time.monotonic()) < began + timeout:
            variables = self.variables()
            answer, present = answer_in(variables), command_in(variables.get(contract.CONTROL))
            if answer.get("nonce") == self.nonce:
                if answer.get("reason") != "gone":
                    self.clear(present)
                    return unpacked(answer)
                written = False  # a run of the janitor did not hear from this process in time
            is_ours = written and present.get("nonce") == self.nonce
            if is_ours and answer.get("ready") == self.nonce:
                if self.confirmed != answer.get("run"):
                    self.confirmed = str(answer.get("run"))
                    self.write(timeout)
                    pause = POLL
            elif not is_ours and not self.is_others_turn(variables, present, now):
                # another answer stays: its caller may not have read it yet
                size = len(variables.get(contract.CONTROL_ANSWER, "").encode())
                clears = answer.get("nonce") == self.nonce or size > contract.ANSWER_BYTES
                self.write(timeout, {contract.CONTROL_ANSWER: ""} if clears else {})
                written, next_start = True, 0.0
            if now > next_start:  # also for another caller's command, which comes first
                next_start = now + RERUN_INTERVAL
                if not self.start_janitor() and timeout == RUN_TIMEOUT:
                    timeout, written = SCHEDULE_TIMEOUT, False
                    self.info(
                        "Railway does not run the janitor at once: waiting for its schedule,"
                        f" {self.janitor.settings.get('cronSchedule')}"
                    )
            time.sleep(pause)
            pause = min(pause * 1.3, MAX_POLL)
        return ""

    def info(self, line: str) -> None:
        self.stack.target.control_route.info(line)

    def variables(self) -> dict[str, str]:
        target, names, janitor = self.stack.target, self.stack.names, self.janitor
        read_variables(self.api, Stack(target, names, {janitor.name: janitor}))
        return janitor.variables

    def text(self, timeout: float) -> str:
        """Return the command as the variable's value. Only an earlier janitor reads `until`."""
        request = {
            "nonce": self.nonce,
            "words": self.words,
            "until": time.time() + timeout,
            "caller": provenance.by(),
            "confirmed": self.confirmed,
        }
        text = json.dumps(request, ensure_ascii=False, separators=(",", ":"))
        # a `$` in a message could begin a reference
        return text.encode(errors="replace").decode().replace("$", "\\u0024")

    def write(self, timeout: float, more: Mapping[str, str] = MappingProxyType({})) -> None:
        values = {contract.CONTROL: self.text(timeout), **more}
        write_variables(self.api, self.stack.target, self.janitor.id, values)

    def is_others_turn(
        self, variables: Mapping[str, str], present: Mapping[str, Any], now: float
    ) -> bool:
        """Return whether another caller's command waits for its answer.

        Whether that caller still waits is not known: its turn ends after OTHERS_TIMEOUT.
        """
        nonce = present.get("nonce")
        if nonce in (None, self.nonce, answer_in(variables).get("nonce")):
            return False
        if self.other != nonce:
            self.other, self.other_seen = str(nonce), now
            words = present.get("words") or ["?"]
            self.info(
                f"waits for the command `{words[0]}` of {present.get('caller') or 'somebody'},"
                " which came first"
            )
        return now < self.other_seen + OTHERS_TIMEOUT

    def start_janitor(self) -> bool:
        """Start the janitor; return whether Railway allows that."""
        try:
            self.api.call(documents.EXECUTE, instance=self.janitor.instance_id, repeatable=True)
        except ApiError:
            return False
        return True

    def why_silent(self) -> str:
        name = self.janitor.name
        why = f"{name} gave no answer in time; see `pulse-railway logs --service {name}`"
        if difference := clock_difference(self.api.url):
            why += (
                f". This machine's clock is {difference:.0f} s off, and a janitor of an earlier"
                " version judges a command by it: set the clock, or run `pulse-railway ensure`"
            )
        return why

    def clear(self, present: Mapping[str, Any]) -> None:
        """Empty the variables after the answer was read."""
        values = {contract.CONTROL_ANSWER: ""}
        if present.get("nonce") == self.nonce:
            values[contract.CONTROL] = ""
        with contextlib.suppress(Failure):
            write_variables(self.api, self.stack.target, self.janitor.id, values)

    def withdraw(self) -> None:
        with contextlib.suppress(Failure):
            self.clear_if_ours()

    def clear_if_ours(self) -> None:
        if command_in(self.variables().get(contract.CONTROL)).get("nonce") == self.nonce:
            values = {contract.CONTROL: ""}
            write_variables(self.api, self.stack.target, self.janitor.id, values)


def command_in(text: str | None) -> dict[str, Any]:
    """Return the JSON object in a variable; {} without one."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def answer_in(variables: Mapping[str, str]) -> dict[str, Any]:
    return command_in(variables.get(contract.CONTROL_ANSWER))


def unpacked(answer: Mapping[str, Any]) -> str:
    """Return an answer as one line of JSON; the janitor has packed a long one."""
    if packed := answer.get("packed"):
        with contextlib.suppress(ValueError, zlib.error):
            return zlib.decompress(base64.b64decode(packed)).decode()
    return json.dumps(answer)
