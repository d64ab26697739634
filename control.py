#!/usr/bin/env python3
# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "httptools>=0.6.4",
#   "redis>=6.4",
#   "starlette>=0.50",
#   "uvicorn>=0.35,<1",
#   "uvloop>=0.21; sys_platform != 'win32'",
# ]
# ///
"""The control plane's half of the routing state: the steps that change it, and the commands.

    python control.py <command>    active, status, register, promote, ...

A command runs inside the router's container (`railway ssh --service <router> -- "pulse-railway
control ..."`), or is carried out by the janitor. Each is one transaction on the store.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any

import redis

import router

# -- the steps ----------------------------------------------------------------------------------


def _not_active(state: router.State, deployment_id: str) -> None:
    if state.get(":active") == deployment_id:
        raise router.StateError(
            f"{deployment_id} is active: promote or deploy another one first", "active"
        )


def register(
    state: router.State,
    deployment_id: str,
    service_name: str,
    address: str | None = None,
    held: bool = False,
    service_id: str | None = None,
    about: router.Record | None = None,
) -> router.Change:
    """A deployment that runs but is not yet chosen: reachable by affinity only. `held`: it is
    meant to stay so, and the janitor does not take it for a deploy that died. `about`: its commit,
    author and message, and who deployed it.

    A command that comes late, when the deployment has been removed already, is refused: it is
    known by its Railway service. The id on a new service starts clean.
    """
    if state.get(":active") == deployment_id:
        raise router.StateError(
            f"{deployment_id} is the active deployment and cannot be registered anew", "active"
        )
    record = router._record(state, deployment_id)
    removed = router._object(state, router.REMOVED)
    gone = removed.get(deployment_id) or (record if record.get("retiring_at") else None)
    if gone:
        if service_id is None or service_id == gone.get("service_id"):
            raise router.StateError(
                f"{deployment_id} was removed and cannot be registered", "removed"
            )
        record = {}
    record |= {
        "deployment_id": deployment_id,
        "state": "pending",
        "service_name": service_name,
        "drain_started_at": None,
        "registered_at": time.time(),
        "held": held,
    }
    if service_id:
        record["service_id"] = service_id
    if address:
        record["address"] = address.rstrip("/")
    if about:
        record["about"] = about
    change: router.Change = {router.record_key(deployment_id): router._save(record)}
    if deployment_id in removed:
        del removed[deployment_id]
        change[router.REMOVED] = router._save(removed)
    return change


def _still_active(state: router.State, wanted: str | None) -> None:
    active = state.get(":active")
    if wanted and active != wanted:
        raise router.StateError(f"{active or 'none'} is active by now, not {wanted}", "changed")


def _promotable(state: router.State, deployment_id: str) -> router.Record:
    """Its record. Raises StateError for one that is unknown or being removed."""
    record = router._record(state, deployment_id)
    if not record:
        raise router.StateError(
            f"{deployment_id} is not registered with the router, or was removed meanwhile: deploy"
            " it again",
            "unknown",
        )
    if record.get("retiring_at"):
        raise router.StateError(
            f"{deployment_id} is being removed and cannot be promoted", "removed"
        )
    return record


def promote(
    state: router.State,
    deployment_id: str,
    service_name: str,
    draining: list[router.Record],
    address: str | None = None,
    instead_of: str | None = None,
    rolls_back: bool = False,
    bake: float | None = None,
) -> router.Change:
    """Make a deployment active. Only the one that was active drains; pending ones stay pending,
    and a canary that is another one gets no more visitors.

    Args:
        draining: what 0.3.x clients send: it names every other service, so it only tells the
            service name and drain time of the deployment that was active.
        instead_of: the deployment that has to be active; where another one is, nothing is done.
        rolls_back: the one that was active is no way back from here on.
        bake: watched for so many seconds; kept with the record until `baked`.
    """
    hints = {item["deployment_id"]: item for item in draining}
    if deployment_id in hints:
        raise router.StateError(f"{deployment_id} cannot be active and draining")
    _still_active(state, instead_of)
    previous = state.get(":active")
    record = _promotable(state, deployment_id)
    if address:
        record["address"] = address.rstrip("/")
    change: router.Change = {":active": deployment_id}
    change[router.record_key(deployment_id)] = router._save(
        _without(record, "weight", "rejected_at", "bake")
        | {
            "deployment_id": deployment_id,
            "state": "active",
            "service_name": service_name,
            "drain_started_at": None,
            "promoted_at": time.time(),
        }
        | _baking(bake)
    )
    for other in router.records(state):
        name = other["deployment_id"]
        if "weight" in other and name not in (deployment_id, previous):
            change[router.record_key(name)] = router._save(_without(other, "weight", "bake"))
    if previous and previous != deployment_id:
        old = router._record(state, previous)
        hint = hints.get(previous, {})
        change[router.record_key(previous)] = router._save(
            _without(old, "weight", "bake")
            | {
                "deployment_id": previous,
                "state": "draining",
                "service_name": old.get("service_name") or hint.get("service_name") or previous,
                "drain_started_at": hint.get("drain_started_at") or time.time(),
            }
            | ({"rejected_at": time.time()} if rolls_back else {})
        )
    return change


def _without(record: router.Record, *names: str) -> router.Record:
    return {key: value for key, value in record.items() if key not in names}


def _baking(seconds: float | None) -> router.Record:
    return {"bake": {"until": time.time() + seconds}} if seconds else {}


def weigh(
    state: router.State,
    deployment_id: str,
    service_name: str,
    weight: float,
    instead_of: str | None = None,
    bake: float | None = None,
) -> router.Change:
    """Give a deployment that share of the new visitors, in percent: it is the canary, of which
    there is one. It stays until it is promoted or withdrawn."""
    active = state.get(":active")
    if not active:
        raise router.StateError("no deployment is active: promote it without a weight", "inactive")
    _still_active(state, instead_of)
    _not_active(state, deployment_id)
    other = router.canary(state)
    if other and other["deployment_id"] != deployment_id:
        raise router.StateError(
            f"{other['deployment_id']} is the canary already, with {other['weight']:g} %: promote"
            " it, or `pulse-railway rollback`",
            "canary",
        )
    record = _without(_promotable(state, deployment_id), "rejected_at")
    if float((record.get("bake") or {}).get("until", 0)) < time.time():
        record.pop("bake", None)  # it was cut off, and somebody has decided
    record |= {
        "deployment_id": deployment_id,
        "state": "pending",
        "service_name": service_name,
        "drain_started_at": None,
        "held": True,
        "weight": weight,
    }
    return {router.record_key(deployment_id): router._save(record | _baking(bake))}


def withdraw(state: router.State, deployment_id: str) -> router.Change:
    """End a canary: nobody new gets it, and it drains."""
    record = router._record(state, deployment_id)
    if not router._is_canary(record):
        raise router.StateError(f"{deployment_id} is no canary (any more)", "changed")
    now = time.time()
    record = _without(record, "weight", "bake", "held")
    record |= {"state": "draining", "drain_started_at": now, "rejected_at": now}
    return {router.record_key(deployment_id): router._save(record)}


def baked(state: router.State, deployment_id: str) -> router.Change:
    """The bake of a deployment is over, and it stays."""
    record = router._record(state, deployment_id)
    return (
        {router.record_key(deployment_id): router._save(_without(record, "bake"))} if record else {}
    )


def maintain(
    state: router.State, page: str | None, retry_after: int, by: str | None, off: bool = False
) -> router.Change:
    """Everybody gets a page that says so, or the app again."""
    if off:
        return {router.MAINTENANCE: None} if router.MAINTENANCE in state else {}
    since = router._object(state, router.MAINTENANCE).get("since") or time.time()
    return {
        router.MAINTENANCE: router._save(
            {"since": since, "page": page, "retry_after": retry_after, "by": by}
        )
    }


def lock(state: router.State, holder: str, by: str | None, lease: float) -> router.Change:
    """Hold the deploy lock for `lease` seconds from now; who holds it already holds it for longer.
    Raises StateError where somebody else does."""
    held, now = router._object(state, router.LOCK), time.time()
    mine = held.get("holder") == holder
    if held and not mine and float(held.get("until") or 0) > now:
        since = time.strftime("%H:%M:%S UTC", time.gmtime(float(held.get("since") or now)))
        raise router.StateError(f"{held.get('by') or 'somebody'} deploys since {since}", "locked")
    facts = {"holder": holder, "by": by, "since": held.get("since", now) if mine else now}
    return {router.LOCK: router._save({**facts, "until": now + lease})}


def unlock(state: router.State, holder: str | None) -> router.Change:
    """Give the deploy lock back; without a holder, take it from whoever has it."""
    held = router._object(state, router.LOCK)
    if router.LOCK not in state or (holder and held.get("holder") != holder):
        return {}
    return {router.LOCK: None}


def delete(state: router.State, deployment_id: str) -> router.Change:
    """Forget a deployment that is not active. Forgetting an unknown one changes nothing."""
    _not_active(state, deployment_id)
    record = router._record(state, deployment_id)
    if not record:
        return {}
    gone = router._remember(
        state, router.REMOVED, deployment_id, service_id=record.get("service_id")
    )
    return {router.record_key(deployment_id): None, router.REMOVED: gone}


def retire(state: router.State, deployment_id: str, service_id: str | None = None) -> router.Change:
    """Claim a deployment for removal: from here on it can be neither registered nor promoted."""
    _not_active(state, deployment_id)
    record = router._record(state, deployment_id)
    service_id = service_id or record.get("service_id")
    change: router.Change = {
        router.REMOVED: router._remember(
            state, router.REMOVED, deployment_id, service_id=service_id
        )
    }
    if record:
        record.setdefault("retiring_at", time.time())
        change[router.record_key(deployment_id)] = router._save(record)
    return change


def claim(
    state: router.State, deployment_id: str, judged: router.Record, service_id: str | None
) -> router.Change:
    """Retire a deployment, if its record still is what was judged ({}: there was none)."""
    if router._record(state, deployment_id) != judged:
        raise router.StateError(f"{deployment_id} has changed meanwhile", "changed")
    return retire(state, deployment_id, service_id)


def drain(state: router.State, deployment_id: str, judged: router.Record) -> router.Change:
    """A record that says active and is not the active one drains from now on."""
    if router._record(state, deployment_id) != judged or state.get(":active") == deployment_id:
        return {}
    record = {**judged, "state": "draining", "drain_started_at": time.time()}
    return {router.record_key(deployment_id): router._save(record)}


def adopt(state: router.State, record: router.Record) -> router.Change:
    """A running deployment that has no record drains from now on."""
    name = record["deployment_id"]
    if router.record_key(name) in state or state.get(":active") == name:
        return {}
    drains = {"state": "draining", "drain_started_at": time.time()}
    return {router.record_key(name): router._save(record | drains)}


def restore(state: router.State, wanted: list[router.Record], active: str) -> router.Change:
    """Rebuild lost state from a list of records. What is already known is left as it is."""
    if state.get(":active"):
        raise router.StateError(
            f"{state[':active']} is active: there is nothing to restore", "active"
        )
    if active in router._object(state, router.REMOVED) or router._record(state, active).get(
        "retiring_at"
    ):
        raise router.StateError(f"{active} is being removed: restore another one", "removed")
    change: router.Change = {":active": active}
    for record in wanted:
        name = record["deployment_id"]
        known = {k: v for k, v in router._record(state, name).items() if v is not None}
        merged = {**record, **known}
        if name == active:
            merged = {**_without(merged, "weight"), "state": "active", "drain_started_at": None}
        elif merged.get("state") != "pending":
            merged["state"] = "draining"
            merged["drain_started_at"] = known.get("drain_started_at") or time.time()
        change[router.record_key(name)] = router._save(merged)
    return change


def guarded(step: router.Step, intent: str | None) -> router.Step:
    """`step`, refused where the store has lost its data: it would take what is left for all."""

    def inner(state: router.State) -> router.Change:
        if router.lost(state, intent):
            raise router.StateError(
                f"the routing state is lost ({intent} was active): run `pulse-railway restore`",
                "lost",
            )
        return step(state)

    return inner


def once(step: router.Step, nonce: str) -> router.Step:
    """`step`, carried out once for its nonce: who lost the answer asks again."""

    def inner(state: router.State) -> router.Change:
        if nonce in router._object(state, router.ANSWERS):
            return {}
        return {**step(state), router.ANSWERS: router._remember(state, router.ANSWERS, nonce)}

    return inner


def logged(step: router.Step, what: str, deployment_id: str, **facts: Any) -> router.Step:
    """`step`, noted in the history where it changes anything."""

    def inner(state: router.State) -> router.Change:
        change = step(state)
        if not change:
            return {}
        entry = {"at": time.time(), "what": what, "deployment_id": deployment_id}
        entry["active"] = state.get(":active")  # until then
        entry |= {key: str(value)[:300] for key, value in facts.items() if value}
        entries = [*router.history(state), entry][-router.HISTORY_AT_MOST :]
        return {**change, router.HISTORY: json.dumps(entries, separators=(",", ":"))}

    return inner


# -- the commands -------------------------------------------------------------------------------


def status(store: router.Store, token: str, intent: str | None) -> router.Record:
    state = store.read()
    found = router.records(state)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # some may not answer
        counts = list(pool.map(lambda record: router.sessions(record, token), found))
    drawn_to = router.canary(state)
    return {
        "active": state.get(":active"),
        "canary": drawn_to and {k: drawn_to[k] for k in ("deployment_id", "weight")},
        "maintenance": _without(router._object(state, router.MAINTENANCE), "page") or None,
        "lock": _without(router._object(state, router.LOCK), "holder") or None,
        "lost": router.lost(state, intent),
        "deployments": [{**r, "sessions": n} for r, n in zip(found, counts, strict=True)],
        "routers": store.routers(),
    }


def valid_id(value: str) -> str:
    if not router.DEPLOYMENT_ID.fullmatch(value):
        raise argparse.ArgumentTypeError("a deployment id is [a-z0-9][a-z0-9-]{0,23}")
    return value


def json_object(value: str) -> router.Record:
    found = json.loads(value)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return found


def percent(value: str) -> float:
    found = float(value)
    if not 0 <= found <= 100:
        raise argparse.ArgumentTypeError("expected a number from 0 to 100")
    return found


def draining_list(value: str) -> list[router.Record]:
    items = json.loads(value)
    if not isinstance(items, list) or not all(
        isinstance(i, dict) and isinstance(i.get("deployment_id"), str) for i in items
    ):
        raise argparse.ArgumentTypeError("expected a JSON list of objects with a deployment_id")
    return items


def control_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pulse-railway control", description=control.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--nonce", help="comes back in the answer; carried out once")
    common.add_argument("--intent", help="the deployment that Railway says is active")
    common.add_argument("--by", help="who asks, for the history")
    common.add_argument("--why", help="for the history")
    common.add_argument("--unlock", metavar="HOLDER", help="give the deploy lock back, too")

    def command(name: str, says: str) -> Callable[..., Any]:
        return commands.add_parser(name, help=says, parents=[common]).add_argument

    command("active", "the active deployment")
    command("status", "everything in the routing state, with session counts")
    command("history", "what was done, by whom and why")
    add = command("register", "add a pending deployment")
    add("--deployment-id", type=valid_id, required=True)
    add("--service-name", required=True)
    add("--service-id", help="Railway's id of the service")
    add("--address", help="the backend's base URL")
    add("--hold", action="store_true", help="leave it pending until it is promoted")
    add("--about", type=json_object, help="its commit, author, message, as JSON")
    add = command("promote", "make a deployment active, drain the one before")
    add("--active-deployment-id", type=valid_id, required=True)
    add("--active-service-name", required=True)
    add("--draining-json", type=draining_list, default=[])
    add("--address", help="the backend's base URL")
    add("--weight", type=percent, help="as the canary, for this percentage of new visitors")
    add("--instead-of", type=valid_id, help="only where this one is active")
    add("--rolls-back", action="store_true", help="the one before is no way back from then on")
    add("--bake", type=float, metavar="SECONDS", help="it is watched for so long")
    add = command("withdraw", "end a canary: it drains")
    add("--deployment-id", type=valid_id, required=True)
    add = command("baked", "a deployment's bake is over, and it stays")
    add("--deployment-id", type=valid_id, required=True)
    add = command("maintenance", "answer everybody with a page, or with the app again")
    add("switch", choices=["on", "off"])
    add("--page", help="HTML")
    add("--retry-after", type=int, default=30, metavar="SECONDS")
    add = command("lock", "hold the deploy lock")
    add("--holder", required=True)
    add("--lease", type=float, required=True, metavar="SECONDS")
    add = command("unlock", "give the deploy lock back, or take it from whoever has it")
    add("--holder")
    add = command("retire", "claim a deployment for removal")
    add("--deployment-id", type=valid_id, required=True)
    add("--service-id", help="Railway's id of the service")
    add = command("delete", "forget a deployment that is not active")
    add("--deployment-id", type=valid_id, required=True)
    add = command("restore", "rebuild lost state")
    add("--active-deployment-id", type=valid_id, required=True)
    add("--records-json", type=draining_list, required=True)
    return parser


def control_step(args: argparse.Namespace) -> router.Step:
    """The change that a control command makes, with its entry in the history."""
    name: str = getattr(args, "deployment_id", "")
    noted = {"by": args.by, "why": args.why}
    match args.command:
        case "register":
            return functools.partial(
                register,
                deployment_id=name,
                service_name=args.service_name,
                address=args.address,
                held=args.hold,
                service_id=args.service_id,
                about=args.about,
            )
        case "promote":
            name = args.active_deployment_id
            common = {
                "deployment_id": name,
                "service_name": args.active_service_name,
                "instead_of": args.instead_of,
                "bake": args.bake,
            }
            if args.weight is not None:
                step = functools.partial(weigh, weight=args.weight, **common)
                return logged(step, "canary", name, weight=f"{args.weight:g} %", **noted)
            step = functools.partial(
                promote,
                draining=args.draining_json,
                address=args.address,
                rolls_back=args.rolls_back,
                **common,
            )
            return logged(step, "rollback" if args.rolls_back else "promote", name, **noted)
        case "withdraw":
            step = functools.partial(withdraw, deployment_id=name)
            return logged(step, "rollback", name, **noted)
        case "baked":
            return functools.partial(baked, deployment_id=name)
        case "retire":
            return functools.partial(retire, deployment_id=name, service_id=args.service_id)
        case "delete":
            return logged(functools.partial(delete, deployment_id=name), "remove", name, **noted)
        case "maintenance":
            step = functools.partial(
                maintain,
                page=args.page,
                retry_after=args.retry_after,
                by=args.by,
                off=args.switch == "off",
            )
            return logged(step, f"maintenance {args.switch}", "", **noted)
        case "lock":
            return functools.partial(lock, holder=args.holder, by=args.by, lease=args.lease)
        case "unlock":
            return functools.partial(unlock, holder=args.holder)
        case _:
            name = args.active_deployment_id
            step = functools.partial(restore, wanted=args.records_json, active=name)
            return logged(step, "restore", name, **noted)


def unlocking(step: router.Step, holder: str) -> router.Step:
    """`step`, and the deploy lock given back, at once."""
    return lambda state: {**unlock(state, holder), **step(state)}


def change_state(store: router.Store, args: argparse.Namespace) -> None:
    """Carry a writing command out, once for its nonce. Where the store has lost its data, the
    routers are given time to write it back. Raises StateError."""
    step = control_step(args)
    if args.unlock:
        step = unlocking(step, args.unlock)
    if args.command not in ("restore", "lock", "unlock", "maintenance"):
        step = guarded(step, args.intent)
    if args.nonce:
        step = once(step, args.nonce)
    deadline = time.monotonic() + router.HEAL_WAIT
    while True:
        try:
            store.apply(step)
            return
        except router.StateError as error:
            if error.reason != "lost" or time.monotonic() > deadline:
                raise
        time.sleep(0.25)


def reload_tabs(record: router.Record, token: str) -> int:
    """Tell the tabs of a deployment that is about to be deleted to reload: how many were told."""
    with contextlib.suppress(OSError, ValueError):
        count = router.ask_backend(record, router.RELOAD_PATH, token, method="POST").get(
            "reloaded_socket_count"
        )
        return count if type(count) is int else 0
    return 0


def carry_out(argv: list[str], env: dict[str, str]) -> router.Record:
    """One control command's answer: it has the command's name and the nonce that was given.
    `reason` says why it is not ok: `store` where the store did not answer, so that it is not known
    whether the command ran. Raises SystemExit for arguments that it does not know."""
    args = control_parser().parse_args(argv)
    args.intent = args.intent or env.get(router.INTENT_VARIABLE)
    token = env.get("PULSE_RAILWAY_INTERNAL_TOKEN", "")
    answer: router.Record = {}
    try:
        store = router.store_from_env(env)
        if args.command == "active":
            answer = {"ok": True, "deployment_id": store.read().get(":active")}
        elif args.command == "status":
            answer = {"ok": True, **status(store, token, args.intent)}
        elif args.command == "history":
            answer = {"ok": True, "history": router.history(store.read())}
        else:
            change_state(store, args)
            answer = {"ok": True}
            if args.command == "lock":
                answer["active"] = store.read().get(":active")
            if args.command == "retire" and (
                record := router._record(store.read(), args.deployment_id)
            ):
                answer["reloaded"] = reload_tabs(record, token)
    except router.StateError as error:
        answer = {"ok": False, "error": str(error), "reason": error.reason}
    except (redis.RedisError, sqlite3.Error, OSError) as error:
        # The class only: the message of a Redis error can carry its URL.
        said = f"the router's Redis does not answer ({type(error).__name__})"
        answer = {"ok": False, "error": said, "reason": "store"}
    return {**answer, "command": args.command, "nonce": args.nonce}


def control(argv: list[str]) -> int:
    """Run one control command inside the router service. The last line on stdout is its answer, a
    JSON object."""
    control_parser().parse_args(argv)  # help, and what is wrong with it, anywhere
    if not any(os.environ.get(name) for name in router.RAILWAY_RUNTIME):
        print("run this inside the router service, with `railway ssh`", file=sys.stderr)
        return 1
    answer = carry_out(argv, dict(os.environ))
    if not answer["ok"]:
        print(answer["error"], file=sys.stderr)
    print(json.dumps(answer))
    return 0 if answer["ok"] else 1


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    return control(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
