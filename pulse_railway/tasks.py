"""The verbs, as Invoke tasks: `from pulse_railway import tasks`, `Collection.from_module(tasks)`.

Each takes its flags, calls one flow, and hands out the result. Flows are imported when they are
needed: listing the tasks loads nothing of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.tasks import task

from pulse_railway.verbs import BASELINE, DEPLOY, STACK, Flags, confirm, verb

if TYPE_CHECKING:
    from pulse_railway.baseline import Options
    from pulse_railway.config import AppConfig, Names, Target
    from pulse_railway.output import Output
    from pulse_railway.railway.api import Api
    from pulse_railway.stack import Stack


@verb([*BASELINE])
def scaffold(flags: Flags) -> None:
    """Create router, env, Redis and janitor in an environment that has none of them."""
    from pulse_railway import baseline

    output, api, target, names, wanted = _baseline(flags)
    stack = baseline.scaffold(api, target, names, wanted, output)
    output.result(
        _stack_result(stack, ["created the baseline"], api),
        [f"the baseline is up at {stack.address}", "next: pulse-railway deploy"],
    )


@verb([*BASELINE, "plan"])
def ensure(flags: Flags) -> None:
    """Create the baseline in an empty environment, or reconcile a complete one."""
    from pulse_railway import baseline

    output, api, target, names, wanted = _baseline(flags)
    plan_only = bool(flags.get("plan"))
    stack, done = baseline.ensure(api, target, names, wanted, output, plan_only=plan_only)
    if not done:
        summary = [f"nothing to change; the baseline is up at {stack.address}"]
    elif plan_only:
        summary = ["would change:", *(f"  {line}" for line in done)]
    else:
        summary = [*(f"  {line}" for line in done), f"the baseline is up at {stack.address}"]
        if not stack.backends:
            summary.append("next: pulse-railway deploy")
    output.result(_stack_result(stack, done, api, planned=plan_only), summary)


@verb([*DEPLOY])
def deploy(flags: Flags) -> None:
    """Bring up the app as a new deployment and make it the active one."""
    from pulse_railway import deployment

    output = _output(flags)
    app = _app(flags, output)
    plan = deployment.prepare(app, flags, output)
    api, target = _target(flags, output, app)
    result = deployment.deploy(api, target, plan, output)
    result["api_calls"] = api.calls
    query = "" if result["active"] else f"/?pulse_deployment={result['deployment_id']}"
    where = result["address"] + query
    verdict = "is active" if result["active"] else "is up, and pending"
    output.result(
        result,
        [
            f"{result['deployment_id']} {verdict} at {where}",
            "next: pulse-railway status"
            if result["active"]
            else f"next: pulse-railway promote --deployment-id {result['deployment_id']}",
        ],
    )


@verb([*STACK, "deployment_id"])
def redeploy(flags: Flags) -> None:
    """Build and start the active deployment anew, or the one named."""
    from pulse_railway import deployment

    wanted = _deployment_id(flags, required=False)
    output, api, stack = _stack(flags)
    result = deployment.redeploy(api, stack, wanted, output)
    output.result(result, [f"{result['deployment_id']} runs anew"])


@verb([*STACK, "deployment_id"])
def promote(flags: Flags) -> None:
    """Make a running deployment the active one; the one before it drains."""
    from pulse_railway import deployment

    chosen = _deployment_id(flags)
    output, api, stack = _stack(flags)
    result = deployment.promote(api, stack, chosen, output)
    output.result(result, [f"{result['deployment_id']} is active at {result['address']}"])


@verb([*STACK])
def rollback(flags: Flags) -> None:
    """Promote the deployment that was active before, while it still runs."""
    from pulse_railway import deployment

    output, api, stack = _stack(flags)
    result = deployment.rollback(api, stack, output)
    output.result(result, [f"{result['deployment_id']} is active again at {result['address']}"])


@verb([*STACK, "deployment_id", "redis_url", "redis_prefix", "yes"])
def delete(flags: Flags) -> None:
    """Remove a deployment that is not active, with its tabs' state."""
    from pulse_railway import deployment

    chosen = _deployment_id(flags)
    output, api, stack = _stack(flags)
    confirm(f"delete deployment {chosen}?", flags)
    result = deployment.delete(api, stack, chosen, output)
    output.result(result, [f"{chosen} is gone"])


@verb([*STACK, "deployment_name", "redis_url", "redis_prefix", "yes"])
def remove(flags: Flags) -> None:
    """Remove the one deployment whose id was generated from a name."""
    from pulse_railway import deployment
    from pulse_railway.errors import Failure

    if not flags.get("deployment_name"):
        raise Failure("which deployment? pass --deployment-name")
    output, api, stack = _stack(flags)
    chosen = deployment.by_name(stack, flags["deployment_name"])
    confirm(f"delete deployment {chosen}?", flags)
    result = deployment.delete(api, stack, chosen, output)
    output.result(result, [f"{chosen} is gone"])


@verb([*STACK])
def status(flags: Flags) -> None:
    """Show the baseline, and each deployment with its state, age and sessions."""
    from pulse_railway import deployment, tables

    output, api, stack = _stack(flags, require=False)
    with output.step("ask the router"):
        result = deployment.status(api, stack)
    output.result(result, [])
    if not output.as_json:
        tables.show_status(result)


@verb([*STACK, "deployment_id", "build", "follow", "lines"])
def logs(flags: Flags) -> None:
    """Show a deployment's log (default: the active one's), or with --service a stable service's."""
    from pulse_railway import config, deployment
    from pulse_railway.errors import Failure
    from pulse_railway.stack import active_deployment

    output, api, stack = _stack({**flags, "service": None}, require=False)
    name = flags.get("service")
    if name:
        if name not in stack.services:
            raise Failure(f"no service is named {name}; there are: {', '.join(stack.services)}")
        service = stack.services[name]
    else:
        chosen = flags.get("deployment_id") or active_deployment(api, stack)
        if not chosen:
            raise Failure("no deployment is active: pass --deployment-id or --service")
        service = deployment.find_backend(stack, chosen)
    result = deployment.logs(
        api,
        stack,
        service,
        output,
        build=bool(flags.get("build")),
        limit=config.number(flags, "lines", 100),
        follow=bool(flags.get("follow")),
    )
    output.result(result, [])


@verb([*STACK, "deployment_id"])
def restore(flags: Flags) -> None:
    """Rebuild the routing state from Railway's services, where Redis has lost it."""
    from pulse_railway import deployment

    wanted = _deployment_id(flags, required=False)
    output, api, stack = _stack(flags)
    result = deployment.restore(api, stack, wanted, output)
    output.result(
        result, [f"restored {', '.join(result['restored'])}; {result['active']} is active"]
    )


@verb(["repository", "tag", "json"])
def image(flags: Flags) -> None:
    """Build the runtime image (router and janitor) and push it."""
    from pulse_railway import runtime_image
    from pulse_railway.errors import Failure
    from pulse_railway.railway import cli

    if not flags.get("repository"):
        raise Failure("where to? pass --repository, e.g. registry/org/pulse-railway")
    output = _output(flags)
    cli.need("docker")
    tag = flags.get("tag") or runtime_image.version().replace("+", "-")
    reference = f"{flags['repository']}:{tag}"
    folder = runtime_image.sources()
    with output.step(f"build and push {reference}"):
        cli.docker_build(
            image=reference,
            dockerfile=folder / "Dockerfile.router",
            context=folder,
            build_args={},
            on_line=output.log,
        )
    output.result(
        {"image": reference}, [f"pushed {reference}", f"use it: --runtime-image {reference}"]
    )


@task(help={"arguments": "the command and its flags, as one word"}, name="control")
def control(_: Any, arguments: str = "status") -> None:
    """Read or change the routing state; only inside the router service on Railway."""
    import shlex

    run_runtime("router.py", ["control", *shlex.split(arguments)])


@task(name="run")
def janitor_run(_: Any) -> None:
    """Remove drained deployments; only inside the janitor service on Railway."""
    run_runtime("janitor.py", ["run"])


def run_runtime(script: str, arguments: list[str]) -> None:
    """Become router.py or janitor.py, as the runtime image has them."""
    from pulse_railway import runtime_image

    path = runtime_image.sources() / script
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(path), *arguments])


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

    root = Path(dir).resolve()
    try:
        from pulse_railway.local import server
    except ImportError as error:
        from invoke.exceptions import Exit

        raise Exit(
            f"error: {error.name} is missing: pip install 'pulse-railway[local]'", 1
        ) from None
    if env:
        for name, value in server.LocalRailway(root).environment().items():
            print(f"export {name}={shlex.quote(value)}")
        return
    print(f"a local Railway in {root}; point a shell at it with", file=sys.stderr)
    print(f'  eval "$(invoke local --env --dir {shlex.quote(dir)})"', file=sys.stderr)
    server.serve(root)


# -- what the verbs share ----------------------------------------------------------------------


def _output(flags: Flags) -> Output:
    from pulse_railway.output import Output

    return Output(as_json=bool(flags.get("json")))


def _app(flags: Flags, output: Output) -> AppConfig:
    from dataclasses import replace

    from pulse_railway import config, naming
    from pulse_railway.errors import Failure

    with output.step(f"load {flags.get('app') or 'the app'}"):
        app = config.load_app(flags.get("app"), Path(flags.get("context") or ".").resolve())
    if flags.get("service_prefix"):  # the backends' only, as in 0.3.x
        try:
            prefix = naming.service_prefix(flags["service_prefix"])
        except ValueError as error:
            raise Failure(str(error)) from None
        app = replace(app, names=replace(app.names, prefix=prefix))
    return app


def _target(flags: Flags, output: Output, app: AppConfig | None) -> tuple[Api, Target]:
    from pulse_railway import config

    api = config.connect(flags, output)
    with output.step("find the project"):
        return api, config.find_target(api, flags, app.plugin if app else None)


def _baseline(flags: Flags) -> tuple[Output, Api, Target, Names, Options]:
    from pulse_railway import baseline

    output = _output(flags)
    app = _app(flags, output)
    wanted = baseline.options(flags, app.plugin)
    api, target = _target(flags, output, app)
    return output, api, target, app.names, wanted


def _stack(flags: Flags, *, require: bool = True) -> tuple[Output, Api, Stack]:
    """What the verbs work on that need no app; with --app, its plugin's names are used."""
    from pulse_railway import config
    from pulse_railway.stack import inspect, require_baseline

    output = _output(flags)
    app = _app(flags, output) if flags.get("app") else None
    names = app.names if app else config.names_from_flags(flags)
    api, target = _target(flags, output, app)
    with output.step("inspect the project"):
        stack = inspect(api, target, names)
        if require:
            require_baseline(stack)
    return output, api, stack


def _deployment_id(flags: Flags, *, required: bool = True) -> Any:
    from pulse_railway import naming
    from pulse_railway.errors import Failure

    given = flags.get("deployment_id")
    if not given:
        if required:
            raise Failure("which deployment? pass --deployment-id; `status` lists them")
        return None
    try:
        return naming.deployment_id(given)
    except ValueError as error:
        raise Failure(str(error)) from None


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


ns = Collection(
    scaffold, ensure, deploy, redeploy, promote, rollback, delete, remove, status, logs, restore,
    image, control, local,
)  # fmt: skip
ns.add_collection(Collection("janitor", janitor_run))
