"""Sends the router's control commands and parses their answers.

A command runs inside the router's container by `railway ssh`, or the janitor carries it out
(control_job.py). `railway ssh` loses answers, returns other programs' JSON, and may end with status
0 without having run the command. So an answer has the command's name and our nonce, and no other
answer counts. A nonce is carried out once, so that a command can be repeated safely.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pulse_railway import contract, control_job, provenance
from pulse_railway.errors import Failure, Interrupted, Refused, Uncertain
from pulse_railway.railway import ssh
from pulse_railway.railway.api import Api
from pulse_railway.runtime_image import runtime_version
from pulse_railway.stack import Stack

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before each retry
WHY_LIMIT = 300  # characters of a reason, as in the history
READ_ONLY = ("active", "status", "history", "probe")
RETRY_TIMEOUT = 100.0  # seconds after which a command is not retried
# seconds from a command's first try to its answer, at most
LONGEST = {
    "ssh": RETRY_TIMEOUT + max(PAUSES) + ssh.TIMEOUT,
    "job": control_job.SCHEDULE_TIMEOUT,
}

Answer = dict[str, Any]
Warn = Callable[[str], None]  # shows a warning to the user


def send_command(
    api: Api, stack: Stack, command: str, *arguments: str, pauses: tuple[float, ...] = PAUSES
) -> Answer:
    """Have the router carry out one control command, and return its answer.

    Args:
        pauses: seconds before each retry.

    Raises:
        Refused: the router has refused; nothing was changed.
        Uncertain: there was no valid answer; it is not known whether the command ran.
        Failure: no command was sent, since there is no way to the router.
    """
    nonce = secrets.token_hex(8)
    # a value that begins with a dash would be read as a flag in a word of its own
    words = [command, *arguments, f"--by={provenance.by()}"]
    if stack.last_promotion:
        words += ["--intent", stack.last_promotion]
    choose_route(api, stack)
    deadline = time.monotonic() + RETRY_TIMEOUT
    for pause in (*pauses, None):
        if stack.target.control_route.kind == "job":
            outcome = control_job.run_command(api, stack, words, nonce)
        else:
            limit = time_limit(api, stack, command)
            outcome = by_ssh(api, stack, [*words, "--nonce", nonce, *limit])
            if outcome.no_key and stack.target.control_route.kind is None:
                fall_back_to_job(stack, outcome.message)
                if command == "lock":  # its holder's name says the route
                    raise RouteChanged(outcome.message)
                outcome = control_job.run_command(api, stack, words, nonce)
        why = outcome.message
        answer = parse_answer(outcome.stdout, command, nonce)
        if answer is not None:
            learn_clock(stack, answer)
            if answer.get("ok") is True:
                if answer.get("cut"):
                    stack.target.control_route.info(str(answer["cut"]))
                return answer
            why = str(answer.get("error"))
            late = answer.get("reason") == "late" and stack.target.control_route.clock is not None
            if late and pause is not None:  # by another clock than this command was given
                continue
            if answer.get("reason") != "store":  # after a lost connection Redis may have changed
                raise Refused(why, str(answer.get("reason")), answer)
            if pause == pauses[0] and len(pauses) > 1:
                stack.target.control_route.info(f"{why}: asking again for {sum(pauses):.0f} s")
            logs = f"`pulse-railway logs --service {stack.names.redis}`"
            why += f": see {logs}, and run this again when it is back"
        if outcome.permanent or pause is None or time.monotonic() > deadline:
            break
        time.sleep(pause)
    raise Uncertain(
        f"it is not known whether the router carried out `{command}`: {why or 'no answer'}"
    )


class RouteChanged(Failure):
    """The command was not sent: from here on commands go by the janitor."""


def learn_clock(stack: Stack, answer: Answer) -> None:
    """Keep the store's time. A router of an earlier version does not say it."""
    clock = answer.get("clock")
    if isinstance(clock, int | float):
        stack.target.control_route.clock = clock - time.monotonic()


def time_limit(api: Api, stack: Stack, command: str) -> list[str]:
    """Return the flag after whose time the router refuses a command, since its caller has gone.

    The time is by the store's clock, which an earlier answer has told. For the first command of a
    run it is by Railway's, if the router is of this version: an earlier one may not know the flag.
    """
    offset = stack.target.control_route.clock
    if offset is None and stack.router:
        version = stack.router.variables.get(contract.RUNTIME_VERSION)
        offset = api.clock if version == runtime_version() else None
    if offset is None or command in READ_ONLY:
        return []
    return [f"--until={offset + time.monotonic() + ssh.TIMEOUT:.3f}"]


def choose_route(api: Api, stack: Stack) -> None:
    """Choose ssh or the janitor, once a run. Raises Failure if --control ssh is not possible."""
    route = stack.target.control_route
    if route.checked or route.kind == "job":
        return
    try:
        route.key = ssh.need_ssh(api, route.key)
        route.checked = True
    except ssh.NoKey as failure:
        if route.kind == "ssh":
            raise
        fall_back_to_job(stack, str(failure))


def fall_back_to_job(stack: Stack, why: str) -> None:
    """Use the janitor from here on, and tell the user why."""
    route = stack.target.control_route
    route.kind = "job"
    route.info(f"control commands go by the janitor, which takes longer: {why}")


def by_ssh(api: Api, stack: Stack, words: list[str]) -> ssh.Outcome:
    try:
        return ssh.ssh(
            api,
            project=stack.target.project_id,
            environment=stack.target.environment_id,
            service=stack.names.router,
            words=["pulse-railway", "control", *words],
            key=stack.target.control_route.key,
        )
    except Interrupted as interrupted:
        if words[0] not in READ_ONLY:
            interrupted.under_way = words[0]
        raise


def parse_answer(stdout: str, command: str, nonce: str) -> Answer | None:
    """Return the answer with this command and nonce in `stdout`, or None."""
    for line in reversed(stdout.splitlines()):
        try:
            answer = printable(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if not isinstance(answer, dict):
            continue
        if (answer.get("command"), answer.get("nonce")) == (command, nonce):
            return answer
    return None


def printable(value: Any) -> Any:
    """Return JSON with printable texts, since anybody may have written the texts in Redis."""
    match value:
        case str() if not value.isprintable():  # half a surrogate pair, a terminal's escape
            return "".join(
                c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in value
            )
        case list():
            return [printable(inner) for inner in value]
        case dict():
            return {printable(name): printable(inner) for name, inner in value.items()}
        case _:
            return value


# -- the commands ------------------------------------------------------------------------------


def read_active(api: Api, stack: Stack) -> str | None:
    active = send_command(api, stack, "active").get("deployment_id")
    return str(active) if active else None


def read_state(api: Api, stack: Stack, *, pauses: tuple[float, ...] = PAUSES) -> Answer:
    """Return `active`, `canary`, `maintenance`, `lock`, `lost`, `deployments` with their sessions,
    and `routers`."""
    return send_command(api, stack, "status", pauses=pauses)


def send_register(
    api: Api,
    stack: Stack,
    *,
    deployment_id: str,
    service_name: str,
    service_id: str,
    address: str,
    held: bool,
    about: dict[str, str],
    preview: str | None = None,
    instances: int = 1,
    renew: str | None = None,
    warn: Warn = lambda _: None,
) -> None:
    """Add a pending deployment.

    Args:
        preview: the hash of a preview's key.
        instances: the number of its processes.
        renew: as in `send_promote`.
    """
    words = ["--deployment-id", deployment_id, "--service-name", service_name]
    words += ["--service-id", service_id, "--address", address]
    words += ["--about", json.dumps(about, separators=(",", ":"))]
    words += [f"--renew={renew}"] if renew else []
    words += [f"--preview={preview}"] if preview else []
    words += [f"--instances={instances}"] if instances > 1 else []
    answer = send_command(api, stack, "register", *words, *(["--hold"] if held else []))
    warn_of_late_routers(answer, warn)


@dataclass(frozen=True)
class Moves:
    """When the tabs of a version that begins to drain move over: from `after` seconds on, each when
    its user goes to another page, or was not there for `idle` seconds."""

    after: int
    idle: int | None = None


def send_promote(
    api: Api,
    stack: Stack,
    deployment_id: str,
    service_name: str,
    *,
    weight: float | None = None,
    instead_of: str | None = None,
    rolls_back: bool = False,
    bake: int = 0,
    bake_latency_ms: int | None = None,
    steps: Answer | None = None,
    moves: Moves | None = None,
    why: str | None = None,
    unlock: str | None = None,
    renew: str | None = None,
    warn: Warn = lambda _: None,
) -> Promotion | None:
    """Make a deployment the active one; with a weight, the canary.

    If the deployment's record is lost, it is created again, since its service exists.

    Args:
        weight: the percentage of new visitors that the canary gets.
        instead_of: the deployment that must be active, else Refused with the reason `changed`.
        rolls_back: the present active deployment is no target of a rollback from now on.
        bake: seconds for which the caller watches the deployment.
        bake_latency_ms: milliseconds after which a request counts as slow in it.
        steps: of the canary, as its record has them.
        moves: when the tabs of the version that drains move over; None: they stay.
        unlock: the holder of the deploy lock, which the command releases.
        renew: HOLDER@SECONDS: that holder's lock ends so many seconds later.

    Returns:
        The last promotion that the router has stored; None from a router of an earlier version.
    """
    words = ["--active-deployment-id", deployment_id, "--active-service-name", service_name]
    words += [] if weight is None else ["--weight", f"{weight:g}"]
    words += ["--instead-of", instead_of] if instead_of else []
    words += ["--rolls-back"] if rolls_back else []
    words += ["--bake", str(bake)] if bake else []
    words += ["--bake-latency-ms", str(bake_latency_ms)] if bake and bake_latency_ms else []
    words += [f"--steps={json.dumps(steps)}"] if steps else []
    words += _move_arguments(moves)
    words += [f"--unlock={unlock}"] if unlock else []
    words += [f"--renew={renew}"] if renew else []
    words += _why_arguments(why)
    service = stack.backend(deployment_id)
    try:
        answer = send_command(api, stack, "promote", *words)
    except Refused as refused:
        if refused.reason != "unknown" or service is None:
            raise
        answer = send_command(api, stack, "promote", *words, "--service-id", service.id)
    warn_of_late_routers(answer, warn)
    return promotion(answer)


@dataclass(frozen=True)
class Promotion:
    deployment_id: str
    at: float  # seconds since 1970 by Redis' clock
    # the deployment that drains since then: its `deployment_id` and `sessions`, None if not known
    drains: Answer | None = None


def promotion(answer: Answer) -> Promotion | None:
    """Return the last promotion in an answer, or None."""
    promoted = answer.get("promoted")
    if not isinstance(promoted, dict) or type(promoted.get("at")) not in (int, float):
        return None
    drains = answer.get("drains")
    return Promotion(
        str(promoted.get("deployment_id")),
        float(promoted["at"]),
        drains if isinstance(drains, dict) else None,
    )


def drains_words(drains: Answer | None) -> list[str]:
    """Return a line about the deployment that was active until now, if there was one."""
    if not drains:
        return []
    count = drains.get("sessions")
    tabs = {None: "how many sessions it has is not known", 1: "1 session"}.get(
        count, f"{count} sessions"
    )
    return [f"{drains.get('deployment_id')} drains, {tabs}"]


def warn_of_late_routers(answer: Answer, warn: Warn) -> None:
    """Warn of routers that do not serve a change yet: new visitors may get the old version."""
    if behind := answer.get("behind"):
        warn(
            f"{', '.join(map(str, behind))} has not reported yet that it serves this: see"
            " `pulse-railway status`"
        )


def send_abort_canary(
    api: Api,
    stack: Stack,
    deployment_id: str,
    why: str | None = None,
    warn: Warn = lambda _: None,
    moves: Moves | None = None,
) -> None:
    """End a canary, which then drains. `moves` is as in `send_promote`."""
    words = ["--deployment-id", deployment_id, *_move_arguments(moves), *_why_arguments(why)]
    answer = send_command(api, stack, "withdraw", *words)
    warn_of_late_routers(answer, warn)


def send_finish_bake(api: Api, stack: Stack, deployment_id: str) -> None:
    send_command(api, stack, "baked", "--deployment-id", deployment_id)


def _move_arguments(moves: Moves | None) -> list[str]:
    if moves is None:
        return []
    words = ["--move-after", str(moves.after)]
    return [*words, "--move-idle", str(moves.idle)] if moves.idle else words


def _why_arguments(why: str | None) -> list[str]:
    return ["--why=" + why.replace("\0", " ")[:WHY_LIMIT]] if why else []


@dataclass(frozen=True)
class Lock:
    """The deploy lock. Its times are the store's, in seconds since 1970."""

    holder: str
    by: str | None
    since: float
    now: float  # when the router was asked
    active: str | None = None  # the active deployment
    lost: bool = False  # the routing state is lost
    ended: frozenset[str] = frozenset()  # the runs that have given it back or lost it
    renews: bool = False  # the router renews it with other commands


def send_lock(api: Api, stack: Stack, holder: str, lease: int) -> Lock:
    """Take or renew the deploy lock for `lease` seconds.

    Raises Refused with the reason `locked` if another holder has the lock (see `held_lock`).
    """
    words = [f"--holder={holder}", "--lease", str(lease)]
    answer = send_command(api, stack, "lock", *words)
    active, ended, now = (answer.get(name) for name in ("active", "ended", "now"))
    at = float(now) if isinstance(now, int | float) else 0.0
    return Lock(
        holder,
        None,
        at,
        at,
        active=str(active) if active else None,
        lost=answer.get("lost") is True,
        ended=frozenset(map(str, ended)) if isinstance(ended, list) else frozenset(),
        renews=isinstance(ended, list),
    )


def held_lock(refused: Refused) -> Lock | None:
    """Return another run's lock, from a refusal; None from a router of an earlier version."""
    return lock_in(refused.answer)


def lock_in(answer: Answer) -> Lock | None:
    """Return the deploy lock in an answer; None without one that names its holder and the time."""
    lock, now = answer.get("lock"), answer.get("now")
    if not isinstance(lock, dict) or not lock.get("holder") or not isinstance(now, int | float):
        return None
    by = lock.get("by")
    return Lock(str(lock["holder"]), str(by) if by else None, float(lock["since"]), float(now))


def send_unlock(
    api: Api, stack: Stack, holder: str | None, *, pauses: tuple[float, ...] = PAUSES
) -> None:
    """Release the deploy lock; without a holder, that of any holder."""
    words = [f"--holder={holder}"] if holder else []
    send_command(api, stack, "unlock", *words, pauses=pauses)


def send_maintenance(
    api: Api,
    stack: Stack,
    on: bool,
    page: str | None,
    retry_after: int,
    why: str | None,
    warn: Warn = lambda _: None,
) -> tuple[float | None, float | None]:
    """Close or open the site.

    Returns the times since when the site is closed, or since when it is open: one is set, neither
    by a router of an earlier version.
    """
    words = ["on" if on else "off", "--retry-after", str(retry_after), *_why_arguments(why)]
    answer = send_command(api, stack, "maintenance", *words, *([f"--page={page}"] if page else []))
    warn_of_late_routers(answer, warn)
    since, at = (
        float(value) if isinstance(value := answer.get(name), int | float) else None
        for name in ("since", "at")
    )
    return (since, None) if since else (None, at)


def send_probe(api: Api, stack: Stack, deployment_id: str, path: str | None = None) -> Answer:
    """Ask the router for a deployment's answer in the private network.

    Returns `at` (answers, other, silent, unreachable), `active`, `behind`, and with a path
    `status`.
    """
    words = ["--deployment-id", deployment_id, *(["--path", path] if path else [])]
    return send_command(api, stack, "probe", *words, pauses=(1.0,))


def read_history(api: Api, stack: Stack) -> list[dict[str, Any]]:
    """Return the history's entries, the oldest first."""
    return list(send_command(api, stack, "history")["history"])


def send_retire(
    api: Api, stack: Stack, deployment_id: str, service_id: str | None, force: bool = False
) -> None:
    """Retire a deployment: it can no longer be registered or promoted, its service may be deleted.

    Raises Refused with the reason `behind` while a router may still route to it, and, without
    `force`, `fallback` while new visitors get it in place of the active one.
    """
    words = ["--deployment-id", deployment_id]
    words += ["--service-id", service_id] if service_id else []
    words += ["--force"] if force else []
    if behind := send_command(api, stack, "retire", *words).get("behind"):
        raise Refused(
            f"{deployment_id} is retired, and its service stays for now: the router"
            f" {', '.join(map(str, behind))} has not reported that it serves that. The janitor"
            f" removes it, or `pulse-railway delete --deployment-id {deployment_id}` in a minute",
            "behind",
        )


def send_forget(api: Api, stack: Stack, deployment_id: str, why: str | None = None) -> None:
    """Delete the record of a retired deployment."""
    send_command(api, stack, "delete", "--deployment-id", deployment_id, *_why_arguments(why))


def send_claim(api: Api, stack: Stack, instead_of: str | None = None) -> None:
    """Make this stack the owner of the routing state, in place of `instead_of` if given."""
    words = ["--owner", str(stack.stamp), *(["--instead-of", instead_of] if instead_of else [])]
    send_command(api, stack, "claim", *words)


def send_restore(
    api: Api, stack: Stack, active: str, records: list[dict[str, Any]], *, chosen: bool
) -> Promotion | None:
    """Rebuild the routing state from records.

    Args:
        chosen: the user has chosen `active`, so it becomes active whatever the store has.
    """
    text = json.dumps(records, separators=(",", ":"))
    words = ["--active-deployment-id", active, "--records-json", text]
    words += ["--chosen"] if chosen else []
    closed_since = stack.router.variables.get(contract.MAINTENANCE) if stack.router else None
    words += ["--maintenance-since", closed_since] if closed_since else []
    return promotion(send_command(api, stack, "restore", *words))
