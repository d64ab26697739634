"""The router's control commands: how they are asked, and what counts as an answer.

A command runs inside the router's container, by `railway ssh`, which loses answers, brings other
programs' JSON, and ends with 0 without having run anything; or the janitor carries it out
(control_job.py).
So the answer carries the command's name and a nonce of ours, and nothing else counts. A nonce is
carried out once, which makes asking again harmless.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pulse_railway import contract, control_job, provenance
from pulse_railway.errors import Refused, Uncertain
from pulse_railway.railway import ssh
from pulse_railway.railway.api import Api
from pulse_railway.stack import Stack

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds, between one time and the next
RETRY_TIMEOUT = 150.0  # seconds, after which it is not asked again

Answer = dict[str, Any]
Warn = Callable[[str], None]  # is told what the user should hear, though nothing failed


def send_command(
    api: Api, stack: Stack, command: str, *arguments: str, pauses: tuple[float, ...] = PAUSES
) -> Answer:
    """Have the router carry out one control command, and return its answer.

    Raises:
        Refused: the router said no; nothing was changed.
        Uncertain: no answer counted; it is not known whether the command ran.
        Failure: it was not asked, for want of a way to it.
    """
    nonce = secrets.token_hex(8)
    words = [command, *arguments, "--by", provenance.by()]
    if stack.intent:
        words += ["--intent", stack.intent]
    choose_route(api, stack)
    deadline = time.monotonic() + RETRY_TIMEOUT
    for pause in (*pauses, None):
        if stack.target.control_route.kind == "job":
            outcome = control_job.run_command(api, stack, words, nonce)
        else:
            outcome = by_ssh(api, stack, [*words, "--nonce", nonce])
            if outcome.no_key and stack.target.control_route.kind is None:
                fall_back_to_job(stack, outcome.message)
                outcome = control_job.run_command(api, stack, words, nonce)
        why = outcome.message
        answer = parse_answer(outcome.stdout, command, nonce)
        if answer is not None:
            if answer.get("ok") is True:
                return answer
            why = str(answer.get("error"))
            if answer.get("reason") != "store":  # whose Redis may have carried it out
                raise Refused(why, str(answer.get("reason")))
            if pause == pauses[0] and len(pauses) > 1:
                stack.target.control_route.say(f"{why}: asking again for {sum(pauses):.0f} s")
            logs = f"`pulse-railway logs --service {stack.names.redis}`"
            why += f": {logs} tells why; run this again when it is back"
        if outcome.permanent or pause is None or time.monotonic() > deadline:
            break
        time.sleep(pause)
    raise Uncertain(
        f"it is not known whether the router carried out `{command}`: {why or 'no answer'}"
    )


def choose_route(api: Api, stack: Stack) -> None:
    """Choose the way, once. Raises Failure where ssh was asked for and cannot be had."""
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
    route = stack.target.control_route
    route.kind = "job"
    route.say(f"control commands go by the janitor, which takes longer: {why}")


def by_ssh(api: Api, stack: Stack, words: list[str]) -> ssh.Outcome:
    return ssh.ssh(
        api,
        project=stack.target.project_id,
        environment=stack.target.environment_id,
        service=stack.names.router,
        words=["pulse-railway", "control", *words],
        key=stack.target.control_route.key,
    )


def parse_answer(stdout: str, command: str, nonce: str) -> Answer | None:
    """The answer to this very command in what came back, or None."""
    for line in reversed(stdout.splitlines()):
        try:
            found = printable(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and (found.get("command"), found.get("nonce")) == (
            command,
            nonce,
        ):
            return found
    return None


def printable(value: Any) -> Any:
    """JSON whose texts can be printed: in Redis is what anybody has written."""
    match value:
        case str() if not value.isprintable():  # half a surrogate pair, a terminal's escape
            kept = (c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in value)
            return "".join(kept)
        case list():
            return [printable(inner) for inner in value]
        case dict():
            return {printable(name): printable(inner) for name, inner in value.items()}
        case _:
            return value


# -- the commands ------------------------------------------------------------------------------


def read_active(api: Api, stack: Stack) -> str | None:
    found = send_command(api, stack, "active").get("deployment_id")
    return str(found) if found else None


def read_state(api: Api, stack: Stack, *, pauses: tuple[float, ...] = PAUSES) -> Answer:
    """`active`, `canary`, `maintenance`, `lock`, `lost`, `deployments` with their sessions,
    `routers`."""
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
) -> None:
    words = ["--deployment-id", deployment_id, "--service-name", service_name]
    words += ["--service-id", service_id, "--address", address]
    words += ["--about", json.dumps(about, separators=(",", ":"))]
    send_command(api, stack, "register", *words, *(["--hold"] if held else []))


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
    why: str | None = None,
    unlock: str | None = None,
    warn: Warn = lambda _: None,
) -> Promotion | None:
    """Make it the active one; with a weight, the canary for that percentage of new visitors.

    Returns what the router notes as the last promotion, None from one of an earlier version.
    Where its record is lost, it is made anew, since its service is there.

    Args:
        instead_of: only where that one is active; else Refused, with the reason `changed`.
        rolls_back: the one that was active is no way back from then on.
        bake: seconds for which somebody watches it.
        unlock: the holder of the deploy lock, which is given back with it.
    """
    words = ["--active-deployment-id", deployment_id, "--active-service-name", service_name]
    words += [] if weight is None else ["--weight", f"{weight:g}"]
    words += ["--instead-of", instead_of] if instead_of else []
    words += ["--rolls-back"] if rolls_back else []
    words += ["--bake", str(bake)] if bake else []
    words += ["--unlock", unlock] if unlock else []
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


def promotion(answer: Answer) -> Promotion | None:
    """The last promotion, as an answer has it."""
    found = answer.get("promoted")
    if not isinstance(found, dict) or type(found.get("at")) not in (int, float):
        return None
    return Promotion(str(found.get("deployment_id")), float(found["at"]))


def warn_of_late_routers(answer: Answer, warn: Warn) -> None:
    """A router that does not serve a change yet: newcomers may get the version before from it."""
    if behind := answer.get("behind"):
        warn(
            f"{', '.join(map(str, behind))} has not said yet that it serves this: see"
            " `pulse-railway status`"
        )


def send_abort_canary(
    api: Api,
    stack: Stack,
    deployment_id: str,
    why: str | None = None,
    warn: Warn = lambda _: None,
) -> None:
    """End a canary: it drains."""
    answer = send_command(
        api, stack, "withdraw", "--deployment-id", deployment_id, *_why_arguments(why)
    )
    warn_of_late_routers(answer, warn)


def send_finish_bake(api: Api, stack: Stack, deployment_id: str) -> None:
    send_command(api, stack, "baked", "--deployment-id", deployment_id)


def _why_arguments(why: str | None) -> list[str]:
    return ["--why", why] if why else []


def send_lock(api: Api, stack: Stack, holder: str, lease: int) -> tuple[str | None, bool]:
    """Hold the deploy lock for `lease` seconds; returns the active deployment, and whether the
    routing state is lost. Raises Refused, with the reason `locked`, where somebody else has it."""
    words = ["--holder", holder, "--lease", str(lease)]
    answer = send_command(api, stack, "lock", *words)
    found = answer.get("active")
    return str(found) if found else None, answer.get("lost") is True


def send_unlock(
    api: Api, stack: Stack, holder: str | None, *, pauses: tuple[float, ...] = PAUSES
) -> None:
    """Give the deploy lock back; without a holder, take it from whoever has it."""
    words = ["--holder", holder] if holder else []
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
    """Returns since when the site is closed, or since when it is open; None where the router is of
    an earlier version."""
    words = ["on" if on else "off", "--retry-after", str(retry_after), *_why_arguments(why)]
    answer = send_command(api, stack, "maintenance", *words, *(["--page", page] if page else []))
    warn_of_late_routers(answer, warn)
    since, at = (
        float(value) if isinstance(value := answer.get(name), int | float) else None
        for name in ("since", "at")
    )
    return (since, None) if since else (None, at)


def send_probe(api: Api, stack: Stack, deployment_id: str, path: str | None = None) -> Answer:
    """What a deployment answers from inside the private network: `at` (answers, other, silent,
    unreachable), `active`, `behind`, and with a path `status`."""
    words = ["--deployment-id", deployment_id, *(["--path", path] if path else [])]
    return send_command(api, stack, "probe", *words, pauses=(1.0,))


def read_history(api: Api, stack: Stack) -> list[dict[str, Any]]:
    """What was done, the oldest first."""
    return list(send_command(api, stack, "history")["history"])


def send_retire(api: Api, stack: Stack, deployment_id: str, service_id: str | None) -> None:
    """From here on it can be neither registered nor promoted: its service may be deleted. Raises
    Refused, with the reason `behind`, while a router may still route to it."""
    words = ["--deployment-id", deployment_id]
    words += ["--service-id", service_id] if service_id else []
    if behind := send_command(api, stack, "retire", *words).get("behind"):
        raise Refused(
            f"{deployment_id} is retired, and its service stays for now: the router"
            f" {', '.join(map(str, behind))} has not said that it serves that. The janitor removes"
            f" it, or `pulse-railway delete --deployment-id {deployment_id}` in a minute",
            "behind",
        )


def send_forget(api: Api, stack: Stack, deployment_id: str) -> None:
    send_command(api, stack, "delete", "--deployment-id", deployment_id)


def send_claim(api: Api, stack: Stack, instead_of: str | None = None) -> None:
    """Make the routing state this stack's; where another owner has it, instead of that one."""
    words = ["--owner", str(stack.stamp), *(["--instead-of", instead_of] if instead_of else [])]
    send_command(api, stack, "claim", *words)


def send_restore(
    api: Api, stack: Stack, active: str, records: list[dict[str, Any]], *, chosen: bool
) -> Promotion | None:
    """Rebuild the state. `chosen`: `active` is active then, whatever the store says."""
    text = json.dumps(records, separators=(",", ":"))
    words = ["--active-deployment-id", active, "--records-json", text]
    words += ["--chosen"] if chosen else []
    closed = stack.router.variables.get(contract.MAINTENANCE) if stack.router else None
    words += ["--maintenance-since", closed] if closed else []
    return promotion(send_command(api, stack, "restore", *words))
