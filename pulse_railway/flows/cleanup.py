"""What becomes of a deploy that does not get to its end.

Before the promotion, what the run made is removed, in this order: the router says, in an answer
that counts, that the deployment is retired; its service is deleted; its record is forgotten. Where
the router cannot be asked, nothing is deleted: the deployment could be the active one.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

from pulse_railway import contract, router_commands
from pulse_railway.config import Target
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows.bake import WentBack
from pulse_railway.flows.signals import shielded
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import delete_service, left_empty
from pulse_railway.stack import Stack, inspect

LATE_PAUSES = (0.0, 3.0, 7.0)  # seconds


@dataclass
class Attempt:
    """What a deploy has made so far, for cleaning up and for the result."""

    deployment_id: str
    service_name: str
    run: str = field(default_factory=lambda: secrets.token_hex(8))  # marks the service as ours
    step: str = ""
    service_id: str | None = None
    creating: bool = False  # a service may exist that we have no id of
    registered: bool = False  # the router may know of it
    promoted: bool = False  # or the canary: it has visitors
    locked: bool = False  # the deploy lock is held, by `run`
    previous: str | None = None  # what was active when it began
    railway_deployment: str | None = None
    stack: Stack | None = None  # as it was inspected


@contextlib.contextmanager
def undone_on_failure(
    api: Api, target: Target, wanted: DeployOptions, attempt: Attempt, output: Output
) -> Iterator[None]:
    """What the block has made goes, whatever ends it, but for what a bake has gone back from."""
    try:
        yield
    except WentBack:
        raise
    except BaseException as error:
        clean_up(api, target, wanted, attempt, output, error)
        raise


def clean_up(
    api: Api,
    target: Target,
    wanted: DeployOptions,
    attempt: Attempt,
    output: Output,
    error: BaseException,
) -> None:
    """Say where a deploy ended, and remove what it made, if it was not promoted yet."""
    what = "interrupted" if isinstance(error, Interrupted) else "failed"
    output.say(f"{what} at: {attempt.step}")
    began = attempt.creating  # `undo` takes it back once the service is gone
    if not began:
        return
    name = attempt.deployment_id
    if attempt.promoted:
        _stays(name, output)
        return
    if wanted.keep_failed:
        output.say(
            "kept as asked, for an hour; then the janitor removes it. Sooner: `pulse-railway delete"
            f" --deployment-id {name}`"
        )
        return
    try:
        with output.step(f"remove {attempt.service_name}"):
            stack = attempt.stack or Stack(target, wanted.app.names, {})
            if not undo(api, stack, attempt):
                output.warn(left_empty(attempt.service_name, name))
    except (Exception, Interrupted) as why:
        if isinstance(why, Refused) and why.reason == "active":  # it ran, its answer was lost
            attempt.promoted = True
            _stays(name, output)
        elif not attempt.creating:
            output.say(f"{attempt.service_name} is removed; its record is left to the janitor")
        else:
            known = isinstance(why, Failure | httpx.HTTPError)
            reason = str(why) if known else f"{type(why).__name__}: {why}"
            reason = "interrupted again" if isinstance(why, Interrupted) else reason
            output.say(
                f"{attempt.service_name} stays, since it is not certain that it may go: {reason}."
                f" `pulse-railway status` tells whether {name} is active; if not, run"
                f" `pulse-railway delete --deployment-id {name}`. Else the janitor removes it after"
                " an hour"
            )


def _stays(name: str, output: Output) -> None:
    output.say(
        f"{name} was promoted and stays; `pulse-railway status` shows what is active,"
        " `pulse-railway rollback` goes back"
    )


def release(api: Api, attempt: Attempt) -> None:
    """Give the deploy lock back, if it can be done: it ends by itself, too. All is done by then, so
    a signal that comes meanwhile does not make a deploy that has ended one that was interrupted."""
    if attempt.locked and attempt.stack:
        attempt.locked = False
        with contextlib.suppress(Failure, Interrupted), shielded():
            router_commands.send_unlock(api, attempt.stack, attempt.run, pauses=(1.0,))


def undo(api: Api, stack: Stack, attempt: Attempt) -> bool:
    """Remove what a run made; False where its service is left empty. Raises Refused where it is
    active, Failure where that is not known.

    What was never named to the router cannot be known to it, and goes without asking.
    """
    if attempt.registered:
        router_commands.send_retire(api, stack, attempt.deployment_id, attempt.service_id)
    service_id = attempt.service_id or created_after_all(api, stack, attempt)
    deleted = not service_id or delete_service(api, stack.target, service_id)
    attempt.creating = False
    if attempt.registered:
        router_commands.send_forget(api, stack, attempt.deployment_id)
    return deleted


def created_after_all(api: Api, stack: Stack, attempt: Attempt) -> str | None:
    """The service whose creation had no answer: Railway may be at it still, so look repeatedly.
    One of that name which another run made is not ours to delete."""
    for pause in LATE_PAUSES:
        time.sleep(pause)
        found = inspect(api, stack.target, stack.names).services.get(attempt.service_name)
        if found and found.variables.get(contract.RUN) == attempt.run:
            return found.id
    return None
