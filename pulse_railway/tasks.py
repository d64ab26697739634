"""The verbs, as Invoke tasks: `from pulse_railway import tasks`, `Collection.from_module(tasks)`.

Each verb gets its options as a typed value (options.py), calls one flow, and outputs the result.
Flows are imported when a verb runs, so that listing the tasks is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.tasks import task

from pulse_railway.flags import BASELINE, DEPLOY, MOVE, STACK
from pulse_railway.verbs import ask, confirm, verb

if TYPE_CHECKING:
    from pulse_railway import options
    from pulse_railway.flags import Flags
    from pulse_railway.output import Output
    from pulse_railway.railway.api import Api
    from pulse_railway.stack import Stack


@verb(["app", "new", "show", "json"], parser="raw_flags")
def init(flags: Flags, output: Output) -> None:
    """Write what an app of your own needs to be deployed, as far as it is missing."""
    from pulse_railway.flows import init as flow

    result = flow.init(
        flags["app"], Path.cwd(), output, new=bool(flags.get("new")), show=bool(flags.get("show"))
    )
    output.result(
        result, ["", "now:", *(f"{n}. {line}" for n, line in enumerate(result["todo"], 1))]
    )


@verb([*DEPLOY], parser="raw_flags")
def doctor(flags: Flags, output: Output) -> None:
    """Look at everything that a deploy and a running stack need, and say what to do."""
    from pulse_railway import rendering
    from pulse_railway.errors import Failure
    from pulse_railway.flows import doctor as flow

    result = output.value = flow.doctor(dict(flags), output)
    if not output.as_json:
        rendering.show_checks(result["checks"])
    bad = [check["name"] for check in result["checks"] if check["verdict"] == "bad"]
    if bad:
        raise Failure(f"not in order: {', '.join(dict.fromkeys(bad))}")
    output.result(result, [])


@verb([*BASELINE], parser="parse_baseline")
def scaffold(options: options.BaselineOptions, output: Output) -> None:
    """Create router, env, Redis and janitor in an environment without them."""
    from pulse_railway import config
    from pulse_railway.flows import baseline
    from pulse_railway.flows.owner import claim_state

    api, target = config.resolve_target(options.where, output)
    stack = baseline.scaffold(api, target, options, output)
    claim_state(api, stack, output, ask, False, created=True)
    output.result(
        _stack_result(stack, ["created the baseline"], api),
        [f"the baseline is up at {stack.address}", "next: pulse-railway deploy"],
    )


@verb([*BASELINE, "repair", "owns_state", "rotate", "replace_app", "plan"], parser="parse_baseline")
def ensure(options: options.BaselineOptions, output: Output) -> None:
    """Create the baseline in an empty environment, or reconcile a complete one."""
    from pulse_railway import config
    from pulse_railway.flows import baseline
    from pulse_railway.flows.owner import claim_state

    api, target = config.resolve_target(options.where, output)
    stack, done = baseline.ensure(api, target, options, output)
    in_order = options.plan_only or claim_state(
        api, stack, output, ask, options.owns_state, created=done == ["created the baseline"]
    )
    lines = [f"  {line}" for line in done]
    if options.plan_only:
        # what the router says of its state is not asked for
        summary = ["would change:", *lines] if done else ["no service needs a change"]
    elif not in_order:
        summary = [*lines, "the services are set up; what is not in order is in the warning above"]
    elif not done:
        summary = [f"nothing to change; the baseline is up at {stack.address}"]
    else:
        summary = [*lines, f"the baseline is up at {stack.address}"]
        if not stack.backends:
            summary.append("next: pulse-railway deploy")
    output.result(_stack_result(stack, done, api, planned=options.plan_only), summary)


@verb([*DEPLOY], parser="parse_deploy")
def deploy(options: options.DeployOptions, output: Output) -> None:
    """Bring up the app as a new deployment and make it the active one."""
    from pulse_railway import config
    from pulse_railway.flows import deploy as flow
    from pulse_railway.flows.bake import is_over, summary
    from pulse_railway.notify import notifying
    from pulse_railway.router_commands import drains_words

    plan = flow.prepare(options, output)
    with notifying(options.notify, "deploy", output) as notification:
        notification.facts["deployment_id"] = plan.deployment_id
        api, target = config.resolve_target(options.where, output)
        result = flow.deploy(api, target, plan, output)
        result["api_calls"] = api.calls
        name = notification.facts["deployment_id"] = result["deployment_id"]
        if result["active"]:
            notification.text = f"{name} is active at {result['address']}"
            next_command = "pulse-railway status"
        else:
            share = result["canary"]
            role = "pending" if share is None else f"the canary, for {share:g} % of new visitors"
            notification.text = (
                f"{name} is up, {role}, at {result['address']}/?pulse_deployment={name}"
            )
            if result["preview"]:  # its link is a secret
                notification.text = f"{name} is up, a preview at {result['address']}"
            next_command = f"pulse-railway promote --deployment-id {name}"
        if is_over(result["bake"]):
            next_command = "pulse-railway status"
        notification.text = summary(notification.text, name, result["bake"])
    link = [f"only this link opens it: {result['preview']}"] if result["preview"] else []
    lines = [notification.text, *drains_words(result["drains"]), *link, f"next: {next_command}"]
    output.result(result, lines)


@verb([*STACK, "deployment_id"], parser="parse_stack")
def redeploy(options: options.StackOptions, output: Output) -> None:
    """Build and start the active deployment again, or the one given."""
    from pulse_railway.flows import redeploy as flow

    api, stack = _stack(options, output)
    result = flow.redeploy(api, stack, options.deployment_id, output)
    output.result(result, [f"{result['deployment_id']} is redeployed"])


@verb(
    [
        *STACK,
        *"deployment_id weight continue_ bake bake_latency_ms evict force".split(),
        *MOVE,
        "message",
        "notify",
    ],
    parser="parse_promote",
)
def promote(options: options.PromoteOptions, output: Output) -> None:
    """Make a running deployment the active one, or with --weight the canary."""
    from pulse_railway.flows import promote as flow
    from pulse_railway.flows.bake import summary
    from pulse_railway.notify import notifying
    from pulse_railway.router_commands import drains_words

    with notifying(options.notify, "promote", output) as notification:
        name = notification.facts["deployment_id"] = str(options.deployment_id)
        api, stack = _stack(options, output)
        result = flow.promote(api, stack, options, output)
        name = notification.facts["deployment_id"] = result["deployment_id"]
        if result["active"]:
            notification.text = f"{name} is active at {result['address']}"
        else:
            notification.text = f"{name} gets {result['weight'] or 0:g} % of the new visitors"
        notification.text = summary(notification.text, name, result.get("bake"))
    output.result(result, [notification.text, *drains_words(result["drains"])])


@verb([*STACK, *MOVE, "message", "notify"], parser="parse_rollback")
def rollback(options: options.RollbackOptions, output: Output) -> None:
    """End the canary; without one, promote the deployment that was active before."""
    from pulse_railway.flows import promote as flow
    from pulse_railway.flows.rollout import moves_of
    from pulse_railway.notify import notifying
    from pulse_railway.router_commands import drains_words

    with notifying(options.notify, "rollback", output) as notification:
        api, stack = _stack(options, output)
        result = flow.rollback(api, stack, output, options.message, moves_of(options))
        name = notification.facts["deployment_id"] = result["deployment_id"]
        if result.get("ended"):
            notification.text = f"{result['ended']} is no canary any more; {name} is active"
        else:
            notification.text = f"{name} is active again at {result['address']}"
    output.result(result, [notification.text, *drains_words(result.get("drains"))])


@verb(["switch", *STACK, "page", "retry_after", "message"], parser="parse_maintenance")
def maintenance(options: options.MaintenanceOptions, output: Output) -> None:
    """Answer everybody with a page (on), or with the app again (off); open sockets stay."""
    from pulse_railway.flows import maintenance as flow

    api, stack = _stack(options, output)
    word = "on" if options.on else "off"
    result = flow.maintenance(api, stack, options, output)
    output.result(result, [f"maintenance is {word} at {stack.address}"])


@verb([*STACK, "lines"], parser="parse_history")
def history(options: options.HistoryOptions, output: Output) -> None:
    """Show what was promoted, rolled back and removed, when, by whom and why."""
    from pulse_railway import rendering, router_commands

    api, stack = _stack(options, output, acts=False)
    with output.step("ask the router"):
        entries = router_commands.read_history(api, stack)[-options.lines :]
    output.result({"history": entries}, [])
    if not output.as_json:
        rendering.show_history(entries)


@verb([*STACK, "yes"], parser="parse_stack")
def unlock(options: options.StackOptions, output: Output) -> None:
    """Take the deploy lock from a run that is dead."""
    from pulse_railway import router_commands
    from pulse_railway.flows import deploy_lock as flow

    api, stack = _stack(options, output)
    with output.step("ask the router who deploys"):
        lock = flow.read_lock(api, stack)
    if lock is None:
        output.result({"lock": None}, ["nobody deploys"])
        return
    confirm(f"take the lock from {flow.holder_words(lock)}?", options.yes)
    router_commands.send_unlock(api, stack, lock.get("holder"))  # not one that was taken since
    output.result(
        {"lock": lock}, [f"the deploy lock is free; it was that of {flow.holder_words(lock)}"]
    )


@verb(
    [*STACK, *"deployment_id redis_url redis_prefix force yes".split()],
    parser="parse_one_deployment",
)
def delete(options: options.StackOptions, output: Output) -> None:
    """Remove a deployment that is not active, with its tabs' state."""
    from pulse_railway.flows import remove as flow

    chosen = str(options.deployment_id)
    api, stack = _stack(options, output)
    service = flow.find(api, stack, chosen, output)  # nothing is asked if there is none
    confirm(f"delete deployment {chosen}?", options.yes)
    result = flow.delete_found(api, stack, chosen, service, output, force=options.force)
    output.result(result, [f"{chosen} is gone"])


@verb(
    [*STACK, *"deployment_name redis_url redis_prefix force yes".split()], parser="parse_one_name"
)
def remove(options: options.StackOptions, output: Output) -> None:
    """Remove the one deployment whose id was generated from a name."""
    from pulse_railway.flows import remove as flow

    api, stack = _stack(options, output)
    chosen = flow.find_by_name(stack, str(options.deployment_name))
    confirm(f"delete deployment {chosen}?", options.yes)
    result = flow.delete(api, stack, chosen, output, force=options.force)
    output.result(result, [f"{chosen} is gone"])


@verb([*STACK, "watch", "every"], parser="parse_status")
def status(options: options.StatusOptions, output: Output) -> None:
    """Show the baseline, and each deployment with its state, age and sessions."""
    from pulse_railway import rendering
    from pulse_railway.flows import status as flow
    from pulse_railway.flows import watch

    api, stack = _stack(options, output, require=False, acts=False)
    if options.watch:
        rendering.show_watch(watch.watch(api, stack, options.every))
        return
    with output.step("ask the router"):
        result = flow.status(api, stack)
    output.result(result, [])
    if not output.as_json:
        rendering.show_status(result)


@verb([*STACK, "deployment_id", "build", "follow", "lines"], parser="parse_logs")
def logs(options: options.LogsOptions, output: Output) -> None:
    """Show a deployment's log (default: the active one's), or with --service a stable service's."""
    from pulse_railway import config
    from pulse_railway.flows import logs as flow

    api, target = config.resolve_target(options.where, output)
    with output.step("find the service"):
        service = flow.find_source(api, target, options)
    output.result(flow.logs(api, target, service, options, output), [])


@verb([*STACK, "deployment_id"], parser="parse_stack")
def restore(options: options.StackOptions, output: Output) -> None:
    """Rebuild the routing state from Railway's services, where Redis has lost it."""
    from pulse_railway.flows import restore as flow

    api, stack = _stack(options, output)
    result = flow.restore(api, stack, options.deployment_id, output)
    restored = ", ".join(result["restored"]) or "by the routers"
    output.result(result, [f"restored {restored}; {result['active']} is active"])


@verb(["repository", "tag", "json"], parser="parse_image")
def image(options: options.ImageOptions, output: Output) -> None:
    """Build the runtime image (router and janitor) and push it."""
    from pulse_railway.flows import image as flow

    reference = flow.image(options, output)
    output.result(
        {"image": reference}, [f"pushed {reference}", f"use it: --runtime-image {reference}"]
    )


@task(help={"arguments": "the command and its flags, as one word"}, name="control")
def control(_: Any, arguments: str = "status") -> None:
    """Read or change the routing state; only inside the router service on Railway."""
    import shlex

    from pulse_railway import runtime_image

    runtime_image.become("control", shlex.split(arguments))


@task(name="run")
def janitor_run(_: Any) -> None:
    """Remove drained deployments; only inside the janitor service on Railway."""
    from pulse_railway import runtime_image

    runtime_image.become("janitor", ["run"])


@task(
    help={
        "dir": "where its state is kept (default: .local-railway)",
        "env": "print the `export` lines that point a shell at it, and end",
    },
    auto_shortflags=False,
)
def local(_: Any, dir: str = ".local-railway", env: bool = False) -> None:
    """Run a Railway on this machine until Ctrl-C, to rehearse deploys without an account."""
    import shlex

    from invoke.exceptions import Exit

    from pulse_railway.errors import Failure

    root = Path(dir).resolve()
    try:
        from pulse_railway.local import guard, server
    except ImportError as error:
        raise Exit(
            f"error: {error.name} is missing: pip install 'pulse-railway[local]'", 1
        ) from None
    try:
        railway = server.LocalRailway(root)
        if not env:
            railway.claim()
    except Failure as failure:
        raise Exit(f"error: {failure}", 1) from None
    if env:
        for name, value in railway.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        return
    print(f"a local Railway at {railway.url}, kept in {root}", file=sys.stderr)
    print(f"open its page with {(root / guard.PAGE_FILE).as_uri()}", file=sys.stderr)
    print("point a shell at it with", file=sys.stderr)
    print(f'  eval "$(pulse-railway local --env --dir {shlex.quote(dir)})"', file=sys.stderr)
    server.serve(railway)


# -- what the verbs share ----------------------------------------------------------------------


def _stack(
    options: options.StackOptions, output: Output, *, require: bool = True, acts: bool = True
) -> tuple[Api, Stack]:
    """Return the API and the stack of a run.

    Args:
        require: the router has to be there.
        acts: the verb changes something, so that the stack has to be that of the app given.
    """
    from pulse_railway import app_identity, config
    from pulse_railway.stack import check_redis, inspect, partial, require_router

    api, target = config.resolve_target(options.where, output)
    with output.step("inspect the project"):
        stack = inspect(api, target, options.names)
        if require or stack.no_such_router:
            require_router(stack)
            if stack.missing:  # these verbs work without, which matters in an outage
                output.warn(partial(stack))
        check_redis(stack, options.redis_service, options.redis_url, options.redis_prefix)
        if acts and options.app:
            app_identity.require_same_app(stack, options.app)
    return api, stack


def _stack_result(
    stack: Stack, done: list[str], api: Api, *, planned: bool = False
) -> dict[str, Any]:
    return {
        "planned" if planned else "changed": done,
        "server_address": stack.address if stack.router and stack.router.domains else None,
        "services": {
            service.name: {"id": service.id, "image": service.image} for service in stack.baseline
        },
        "api_calls": api.calls,
    }


# the verbs, as `pulse-railway --help` groups them
GROUPS = {
    "begin": (init, doctor, local),
    "the baseline": (ensure, scaffold, image),
    "deploy": (deploy, redeploy, promote, rollback, delete, remove),
    "look": (status, history, logs),
    "when something is wrong": (maintenance, unlock, restore),
    "inside the containers": (control,),
}
ns = Collection(*(task for group in GROUPS.values() for task in group))
ns.add_collection(Collection("janitor", janitor_run))
