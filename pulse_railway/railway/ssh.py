"""`railway ssh`: a command inside the router service."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pulse_railway.errors import redact
from pulse_railway.railway.api import Api
from pulse_railway.railway.program import run

TIMEOUT = 60.0  # seconds
SSH_KEY_WORDS = ("ssh key", "ssh-key", "permission denied (publickey", "no keys found")
SSH_KEY_HELP = (
    "`railway ssh` needs an SSH key that Railway knows: run `railway ssh keys add` once; in CI,"
    " put that private key in ~/.ssh before the deploy"
)
NOT_TO_BE_HAD = ("unauthorized", "not authorized", "both railway_token")
OTHER_VERSION = "the router runs another version of pulse-railway: run `pulse-railway ensure`"


@dataclass(frozen=True)
class Outcome:
    """What came back of one run. Its exit status says nothing: a relay that cannot reach the
    service ends with 0 as well."""

    stdout: str
    said: str  # why there was no answer, for people
    hopeless: bool  # asking again would not help


def ssh(api: Api, *, project: str, environment: str, service: str, words: Sequence[str]) -> Outcome:
    """Run a command once inside a service."""
    # One shell-quoted word: every version of the CLI passes that on alike.
    command = ["railway", "ssh", "--project", project, "--environment", environment]
    command += ["--service", service, "--", shlex.join(words)]
    done = run(command, api, TIMEOUT)
    # CLI 5 says on every run which key it uses
    lines = [x for x in done.stderr.splitlines() if not x.strip().startswith("Using SSH key")]
    said = redact("\n".join(lines).strip() or done.stdout.strip())[-2000:]
    lower = said.lower()
    if any(words in lower for words in SSH_KEY_WORDS):
        return Outcome(done.stdout, f"{SSH_KEY_HELP} ({said.splitlines()[-1]})", True)
    if "usage: pulse-railway control" in lower:
        return Outcome(done.stdout, OTHER_VERSION, True)
    hopeless = any(words in lower for words in NOT_TO_BE_HAD)
    said = said or f"`railway ssh` ended with {done.returncode} and said nothing"
    return Outcome(done.stdout, said, hopeless)
