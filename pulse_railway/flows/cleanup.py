"""Clean up after a deploy that fails or is interrupted.

Before the promotion all that the run has created is removed, in this order: the router confirms
that the deployment is retired; its service is deleted; its record is deleted. If the router does
not answer, nothing is deleted, since the deployment could be the active one.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from pulse_railway import contract, router_commands
from pulse_railway.config import Target
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows.bake import RolledBack
from pulse_railway.flows.signals import shielded
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import Lock
from pulse_railway.services import delete_service, empty_service_message
from pulse_railway.stack import Stack, inspect

LATE_PAUSES = (0.0, 3.0, 7.0)  # seconds before each search for a service created without an answer


@dataclass
class Attempt:
    """What a deploy has created so far, for its clean-up and its result."""

    deployment_id: str
    service_name: str
    run: str = field(default_factory=lambda: secrets.token_hex(8))  # a variable of the service
    step: str = ""
    service_id: str | None = None
    creating: bool = False  # the service may exist, even if its id is not known
    registered: bool = False  # the router may have a record of the deployment
    promoted: bool = False  # the deployment is active, or the canary
    locked: bool = False  # this run may hold the deploy lock
    lock: Lock | None = None  # the lock, once this run has it
    rival: Lock | None = None  # the lock of another run, which this one did not wait for
    rival_seen: bool = False  # the other run's service was there
    previous: str | None = None  # the active deployment at the start
    drains: dict[str, Any] | None = None  # the one that drains since the promotion
    railway_deployment: str | None = None
    stack: Stack | None = None  # after the inspection

    def renewal(self, lease: int) -> str | None:
        """Return the flag's value that renews this run's lock; None if it has none, or cannot."""
        renews = self.locked and self.lock and self.lock.renews
        return f"{self.run}@{lease}" if renews else None


@contextlib.contextmanager
def undo_on_failure(
    api: Api, target: Target, options: DeployOptions, attempt: Attempt, output: Output
) -> Iterator[None]:
    """Remove what the block has created if it raises; a rolled back deployment stays."""
    try:
        yield
    except RolledBack:
        raise
    except BaseException as error:
        clean_up(api, target, options, attempt, output, error)
        if isinstance(error, Interrupted):
            error.under_way = None  # the clean-up has said what became of it
        raise


def clean_up(
    api: Api,
    target: Target,
    options: DeployOptions,
    attempt: Attempt,
    output: Output,
    error: BaseException,
) -> None:
    """Print the step at which a deploy ended; before the promotion, remove what it has created."""
    outcome = "interrupted" if isinstance(error, Interrupted) else "failed"
    output.info(f"{outcome} at: {attempt.step}")
    began = attempt.creating  # `undo` resets it when the service is deleted
    if not began:
        return
    name = attempt.deployment_id
    if attempt.promoted:
        _stays(name, output)
        return
    if not find_created(api, target, options, attempt, output):
        return
    if options.keep_failed:
        output.info(
            "kept as asked, for an hour; then the janitor removes it. Sooner: `pulse-railway delete"
            f" --deployment-id {name}`"
        )
        return
    try:
        with output.step(f"remove {attempt.service_name}"):
            stack = stack_of(attempt, target, options)
            if not undo(api, stack, attempt):
                output.warn(empty_service_message(attempt.service_name, name))
    except (Exception, Interrupted) as undo_error:
        if isinstance(undo_error, Refused) and undo_error.reason == "active":
            attempt.promoted = True  # the promotion was carried out, and its answer was lost
            _stays(name, output)
        elif not attempt.creating:  # `undo` has deleted the service
            output.info(f"{attempt.service_name} is removed; its record is left to the janitor")
        else:
            known = isinstance(undo_error, Failure | httpx.HTTPError)
            reason = str(undo_error) if known else f"{type(undo_error).__name__}: {undo_error}"
            reason = "interrupted again" if isinstance(undo_error, Interrupted) else reason
            what_next = f"`pulse-railway status` shows whether {name} is active; if not,"
            if attempt.registered:  # it is built, and runs
                what_next += f" `pulse-railway promote --deployment-id {name}` makes it active"
            else:
                what_next += (
                    f" run `pulse-railway delete --deployment-id {name}`. Else the janitor removes"
                    " it after an hour"
                )
            output.info(
                f"{attempt.service_name} stays, since it is not certain that it may go: {reason}."
                f" {what_next}"
            )


def stack_of(attempt: Attempt, target: Target, options: DeployOptions) -> Stack:
    return attempt.stack or Stack(target, options.app.names, {})


def find_created(
    api: Api, target: Target, options: DeployOptions, attempt: Attempt, output: Output
) -> bool:
    """Return whether this run has created a service; its id is in `attempt.service_id` then.

    Not if that is not known: the message says what to do.
    """
    if attempt.service_id:
        return True
    try:
        with output.step(f"see whether {attempt.service_name} was created"):
            stack = stack_of(attempt, target, options)
            attempt.service_id = find_late_service(api, stack, attempt)
    except (Failure, httpx.HTTPError, Interrupted) as error:
        reason = "interrupted again" if isinstance(error, Interrupted) else str(error)
        output.info(
            f"it is not known whether {attempt.service_name} was created: {reason}. If it was, the"
            f" janitor removes it after an hour, `pulse-railway delete --deployment-id"
            f" {attempt.deployment_id}` sooner"
        )
        return False
    attempt.creating = attempt.service_id is not None
    return attempt.creating


def _stays(name: str, output: Output) -> None:
    output.info(
        f"{name} was promoted and stays; `pulse-railway status` shows what is active,"
        " `pulse-railway rollback` goes back"
    )


def release_lock(api: Api, attempt: Attempt) -> None:
    """Release the deploy lock, once; if that fails, its lease ends it.

    The deploy has ended by then: a signal during the release does not count as an interruption.
    """
    if attempt.locked and attempt.stack:
        attempt.locked = False
        with contextlib.suppress(Failure, Interrupted), shielded():
            router_commands.send_unlock(api, attempt.stack, attempt.run, pauses=(1.0,))


def undo(api: Api, stack: Stack, attempt: Attempt) -> bool:
    """Remove what a run has created. Returns False if its service is left empty.

    A deployment that was never sent to the router is deleted without a question to the router.
    Raises Refused if the deployment is active, Failure if that is not known.
    """
    if attempt.registered:
        router_commands.send_retire(api, stack, attempt.deployment_id, attempt.service_id)
    assert attempt.service_id
    deleted = delete_service(api, stack.target, attempt.service_id)
    attempt.creating = False
    if attempt.registered:
        router_commands.send_forget(api, stack, attempt.deployment_id)
    return deleted


def find_late_service(api: Api, stack: Stack, attempt: Attempt) -> str | None:
    """Return the id of a service whose creation had no answer: Railway may create it late.

    A service of that name with another run's RUN variable is not this run's to delete.
    """
    for pause in LATE_PAUSES:
        time.sleep(pause)
        service = inspect(api, stack.target, stack.names).services.get(attempt.service_name)
        if service and service.variables.get(contract.RUN) == attempt.run:
            return service.id
    return None
