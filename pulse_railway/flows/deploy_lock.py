"""The deploy lock, and what a dead run has left.

A run that was killed keeps the lock until its lease ends, and its service. Whoever waits for the
lock takes it over where Railway shows that the run is dead (`is_dead`). The router notes the runs
that have given their lock back or lost it (`ended`); such a run cannot take it again. All times are
those of Redis and Railway, not of this machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pulse_railway import contract, router_commands
from pulse_railway.errors import Failure, Refused
from pulse_railway.flows.cleanup import Attempt
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import Lock, RouteChanged
from pulse_railway.services import delete_service, empty_service_message
from pulse_railway.stack import Service, Stack, inspect
from pulse_railway.waiting import FAILED_STATES, SCARCE_POLL_PAUSE

LEASE = 3600  # seconds, plus the bake: more than all steps of a deploy may take
LATE_LEASE = 900  # seconds, plus the bake: from the registration on, when the build is over
POLL = 10.0  # seconds
LOOK_EVERY = 3  # polls between two looks at Railway for the holder of the lock
IMAGE = "-image"  # in the id of a run that builds an image before it creates its service
JOB = "-job"  # ends the id of a run whose commands go by the janitor


def take_lock(
    api: Api, stack: Stack, options: DeployOptions, attempt: Attempt, output: Output
) -> Stack:
    """Take the deploy lock, which also shows that the router can be reached, before the build.

    Without `--lock-wait` a lock of another run that may be alive is only a warning. Returns the
    stack, read anew after a wait. Raises Failure if the lock is not free in time.
    """
    deadline = time.monotonic() + (options.lock_wait or 0)
    polls = 0
    while True:
        try:
            mark_route(api, stack, attempt)
            attempt.locked = True  # before the command, whose answer may be lost
            try:
                lease = LEASE + options.bake
                attempt.lock = router_commands.send_lock(api, stack, attempt.run, lease)
            except RouteChanged:
                continue
            attempt.previous = attempt.lock.active
            if attempt.lock.lost and (options.bake or options.canary is not None):
                raise Failure(
                    "the routing state is lost, or an older one: there is nothing certain to"
                    " compare with or to go back to; run `pulse-railway restore` first"
                )
            return inspect(api, stack.target, stack.names) if polls else stack
        except Refused as refused:
            attempt.locked = False
            if refused.reason != "locked":
                raise
            rival = attempt.rival = router_commands.held_lock(refused)
            looks = polls % LOOK_EVERY == 0
            polls += 1
            if rival and looks and take_over(api, stack, rival, attempt, output):
                continue
            if options.lock_wait is None:
                output.warn(
                    f"{refused}: both go on, and the one that is promoted last is active;"
                    " --lock-wait SECONDS waits"
                )
                attempt.previous = router_commands.read_active(api, stack)
                return stack
            if time.monotonic() >= deadline:
                raise Failure(
                    f"{refused}, still after {options.lock_wait} s: if that run is dead,"
                    " `pulse-railway unlock`"
                ) from None
            output.waiting(str(refused))
        time.sleep(min(POLL, max(deadline - time.monotonic(), 0.1)))


def mark_route(api: Api, stack: Stack, attempt: Attempt) -> None:
    """Note in the run's id that its commands go by the janitor, where one takes minutes."""
    router_commands.choose_route(api, stack)
    if stack.target.control_route.kind == "job" and not attempt.run.endswith(JOB):
        attempt.run += JOB


def longest_command(run: str) -> float:
    """Return the seconds that one command of this run may take."""
    return router_commands.LONGEST["job" if run.endswith(JOB) else "ssh"]


def take_over(api: Api, stack: Stack, rival: Lock, attempt: Attempt, output: Output) -> bool:
    """Release another run's lock if that run is dead; return whether it was."""
    try:
        stack = inspect(api, stack.target, stack.names)
        attempt.rival_seen |= service_of(stack, rival.holder) is not None
        if not is_dead(api, stack, rival, attempt.rival_seen):
            return False
        router_commands.send_unlock(api, stack, rival.holder)
    except Failure as failure:
        output.warn(f"the deploy lock of {rival.by} was not looked at: {failure}")
        return False
    output.info(f"the run of {rival.by or 'somebody'} is dead: its lock is taken over")
    return True


def check_canary(state: dict[str, Any], attempt: Attempt) -> None:
    """Raise Failure if a canary is not possible."""
    if attempt.previous is None:
        raise Failure("a canary stands beside an active deployment, and none is active: deploy one")
    if other := state["canary"]:
        raise Failure(
            f"{other['deployment_id']} is the canary already, with {other['weight']:g} %: promote"
            " it, or `pulse-railway rollback`"
        )


def read_lock(api: Api, stack: Stack) -> dict[str, Any] | None:
    """Return the deploy lock, with what is known of its holder's service."""
    return with_service(stack, router_commands.read_state(api, stack)["lock"])


def with_service(stack: Stack, lock: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a lock with the `deployment_id` and the status (`railway`) of its holder's service."""
    service = service_of(stack, str(lock["holder"])) if lock and lock.get("holder") else None
    if lock is None or service is None:
        return lock
    return {**lock, "deployment_id": service.deployment_id, "railway": service.status}


def holder_words(lock: dict[str, Any]) -> str:
    """Return who has the lock, since when, and what that run deploys."""
    since = time.strftime("%d %b %H:%M:%S UTC", time.gmtime(lock["since"]))
    words = f"{lock.get('by') or 'somebody'}, since {since}"
    if name := lock.get("deployment_id"):
        words += f", who deploys {name} ({lock['railway'] or 'not built'} on Railway)"
    return words


def service_of(stack: Stack, run: str) -> Service | None:
    """Return the service that a run of `deploy` has created, if it is there."""
    services = (*stack.services.values(), *stack.others, *stack.empty)
    return next((s for s in services if s.variables.get(contract.RUN) == run), None)


def is_dead(api: Api, stack: Stack, lock: Lock, seen: bool = False) -> bool:
    """Return whether Railway shows that the run with this lock is dead.

    See `may_be_dead`; and nobody has registered what it has built.
    """
    if not may_be_dead(stack, lock, seen):
        return False
    service = service_of(stack, lock.holder)
    return service is None or is_unregistered(router_commands.read_state(api, stack), service)


def appears_dead(stack: Stack, state: dict[str, Any]) -> bool:
    """Return the same of the holder of the lock in the router's state."""
    lock = router_commands.lock_in(state)
    if lock is None or not may_be_dead(stack, lock):
        return False
    service = service_of(stack, lock.holder)
    return service is None or is_unregistered(state, service)


def may_be_dead(stack: Stack, lock: Lock, seen: bool = False) -> bool:
    """Return whether a run's service is gone, or never came; or its build has been over for longer
    than the run takes to notice that and to register it.

    Args:
        seen: its service was there before.
    """
    command = longest_command(lock.holder)
    service = service_of(stack, lock.holder)
    if service is None:  # the answer to `lock`, and one command before the service is created
        return seen or (IMAGE not in lock.holder and lock.now - lock.since > 2 * command)
    if service.status not in ("SUCCESS", *FAILED_STATES) or service.status_at is None:
        return False
    return lock.now - service.status_at > SCARCE_POLL_PAUSE + command


def is_unregistered(state: dict[str, Any], service: Service) -> bool:
    return record_of(state, service.deployment_id) is None


def record_of(state: dict[str, Any], deployment_id: str | None) -> dict[str, Any] | None:
    records: Iterable[dict[str, Any]] = state["deployments"]
    return next((r for r in records if r["deployment_id"] == deployment_id), None)


def release_dead(api: Api, stack: Stack, attempt: Attempt, output: Output) -> None:
    """After a deploy that has gone on without the lock: release it if its holder is dead by now."""
    if attempt.rival is None or attempt.lock is not None:
        return
    try:
        state = router_commands.read_state(api, stack)
        present = router_commands.lock_in(state)
    except Failure as failure:
        output.warn(f"the deploy lock of {attempt.rival.by} was not looked at: {failure}")
        return
    if present and present.holder == attempt.rival.holder:
        take_over(api, stack, present, attempt, output)


@dataclass(frozen=True)
class Leftover:
    """What stands in the way of a deployment id, and may be removed: a dead run has left it."""

    service: Service
    registered: bool


def leftover(api: Api, stack: Stack, attempt: Attempt, deployment_id: str) -> Leftover | None:
    """Return the service of this deployment id if a dead run has left it; else None.

    It has the mark of a run that the router knows to have ended, and was never promoted nor left
    pending on purpose.
    """
    service = stack.backend(deployment_id)
    run = service.variables.get(contract.RUN) if service else None
    if service is None or attempt.lock is None or run not in attempt.lock.ended:
        return None
    state = router_commands.read_state(api, stack)
    record = record_of(state, deployment_id)
    if state["active"] == deployment_id or stack.last_promoted == deployment_id or state["lost"]:
        return None
    if record is None:
        return Leftover(service, False)
    used = record.get("state") != "pending" or record.get("held") or record.get("promoted_at")
    return None if used or record.get("ignored") else Leftover(service, True)


def remove_leftover(api: Api, stack: Stack, left: Leftover, output: Output) -> None:
    """Remove what a dead run has left, in the order of every removal."""
    service, name = left.service, str(left.service.deployment_id)
    with output.step(f"remove {service.name}, which a run that has ended left"):
        router_commands.send_retire(api, stack, name, service.id)
        if not delete_service(api, stack.target, service.id):
            raise Failure(empty_service_message(service.name, name))
        if left.registered:
            router_commands.send_forget(api, stack, name)
    del stack.services[service.name]
    stack.taken.pop(service.name, None)
