"""`deploy`: start a new version, verify it through the router, make it active.

The function `deploy` has the steps that the README lists. A failure or a signal before the
promotion removes what the run has created; nothing is removed after the promotion.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pulse_railway import app_identity, contract, naming, provenance, router_commands
from pulse_railway.app_identity import AppIdentity
from pulse_railway.config import AppConfig, Target, inside
from pulse_railway.errors import Failure
from pulse_railway.flows import backend_settings, images, instances, preview
from pulse_railway.flows.backend_settings import Hosting
from pulse_railway.flows.bake import bake, is_over
from pulse_railway.flows.baseline import warn_of_lost_variables
from pulse_railway.flows.build_check import build_arguments, check_build
from pulse_railway.flows.cleanup import Attempt, release_lock, undo_on_failure
from pulse_railway.flows.deploy_lock import (
    IMAGE,
    LATE_LEASE,
    check_canary,
    leftover,
    release_dead,
    remove_leftover,
    service_of,
    take_lock,
)
from pulse_railway.flows.reachability import (
    backend_address,
    store_last_promoted,
    wait_for_instances,
    wait_until_active,
    wait_until_reachable,
    wait_until_rendered,
)
from pulse_railway.flows.remove import evict
from pulse_railway.flows.rollout import Steps, moves_of, require_moves, require_steps, roll_out
from pulse_railway.flows.signals import interruptible, shielded
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway import config_files, docker, program
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.railway.up import up
from pulse_railway.router_commands import Lock
from pulse_railway.services import create_service, deploy_service, shell
from pulse_railway.stack import Stack, inspect, require_baseline
from pulse_railway.waiting import latest, poll, runtime_tail, wait_for_build


@dataclass(frozen=True)
class Plan:
    """What a deploy has decided before it creates anything."""

    options: DeployOptions
    deployment_id: str
    dockerfile: Path  # like web_root, relative to the context
    web_root: Path
    start_command: str
    preview_key: str | None = field(default=None, repr=False)
    hosting: Hosting = field(default_factory=Hosting)

    @property
    def preview_hash(self) -> str | None:
        return preview.hash_of(self.preview_key) if self.preview_key else None

    @property
    def app(self) -> AppConfig:
        return self.options.app

    @property
    def service_name(self) -> str:
        return naming.backend_name(self.app.names.prefix, self.deployment_id)

    @property
    def steps(self) -> Steps | None:
        """The steps of its canary; None for one weight, or none."""
        options = self.options
        if not options.steps:
            return None
        return Steps(options.steps, options.bake, options.bake_latency_ms)

    @property
    def is_source(self) -> bool:
        """Is it built on Railway, from the files here?"""
        options = self.options
        return not (options.image_repository or options.image or options.from_)

    @property
    def image(self) -> str | None:
        """Its image; None for a source deploy, and for `--from` until that is looked up."""
        repository = self.options.image_repository
        return f"{repository}:{self.deployment_id}" if repository else self.options.image


def prepare(options: DeployOptions, output: Output) -> Plan:
    """Check the app, its files and the programs that the deploy needs. Raises Failure."""
    plan = check(options, output)
    if options.image_repository:
        docker.need_buildx()
    elif plan.is_source:
        program.need("railway")
    return plan


def check(options: DeployOptions, output: Output) -> Plan:
    """Check the app and its files, and return the plan. Raises Failure."""
    app = options.app
    exists = bool(options.image or options.from_)
    dockerfile, web_root = (Path("Dockerfile"), Path()) if exists else sources(options)
    try:
        deployment_id = options.deployment_id or naming.generate_deployment_id(
            options.deployment_name
        )
        naming.backend_name(app.names.prefix, deployment_id)
    except ValueError as error:
        raise Failure(str(error)) from None
    if not exists:
        check_build(options, dockerfile, web_root)
    if not app.has_address and not app.plugin.start_command:  # which may not need it
        raise Failure(
            "the app has no server_address, without which Pulse does not start in production: pass"
            ' server_address=os.environ.get("PULSE_SERVER_ADDRESS") to ps.App; `deploy` sets it'
        )
    if options.server_address and not options.server_address.startswith("https://"):
        raise Failure(
            f"the app's server address is {options.server_address}, and must be https in"
            " production: set server_address on ps.App, or pass --server-address https://..."
        )
    if "127.0.0.1" not in app.internal_address:
        output.warn(
            f"the app renders its pages through {app.internal_address}, so a page of one deployment"
            " can be rendered by another: leave internal_server_address out of ps.App"
        )
    return Plan(
        options=options,
        deployment_id=deployment_id,
        dockerfile=dockerfile,
        web_root=web_root,
        start_command=shell(app.plugin.start_command or contract.START_COMMAND),
        preview_key=preview.new_key() if options.preview else None,
    )


def sources(options: DeployOptions) -> tuple[Path, Path]:
    """Return Dockerfile and web root, relative to the context. Raises Failure if one is missing."""
    app, context = options.app, options.app.context
    if not app.plugin.dockerfile:
        raise Failure("which Dockerfile? set RailwayPlugin(dockerfile=...)")
    dockerfile = inside(context, app.plugin.dockerfile, "the Dockerfile")
    if not (context / dockerfile).is_file():
        raise Failure(f"no Dockerfile at {context / dockerfile}: set RailwayPlugin(dockerfile=...)")
    if options.web_root and Path(options.web_root).is_absolute():
        raise Failure(f"--web-root {options.web_root} must be relative to the deploy context")
    web_root = inside(context, options.web_root or app.web_root, "the web root")
    if not (context / web_root).is_dir():
        raise Failure(f"no web root at {context / web_root}: pass --web-root")
    return dockerfile, web_root


def check_secret(plan: Plan, stack: Stack) -> None:
    """Raise Failure if the app needs PULSE_SECRET, and neither env nor Dockerfile has it."""
    if not plan.app.needs_secret or plan.options.env.get(PULSE_SECRET):
        return
    assert stack.env is not None
    dockerfile = plan.app.context / plan.dockerfile
    in_image = dockerfile.is_file() and PULSE_SECRET in dockerfile.read_text(errors="replace")
    if stack.env.variables.get(PULSE_SECRET) or in_image:
        return
    raise Failure(
        f"the app keeps its sessions in cookies and needs {PULSE_SECRET}: set it once on"
        f" {stack.env.name} (`railway variables --service {stack.env.name} --set"
        f' "{PULSE_SECRET}=$(openssl rand -hex 32)"`), or keep sessions in RailwaySessionStore'
    )


def free_name(api: Api, plan: Plan, stack: Stack, attempt: Attempt, output: Output) -> Plan:
    """Return a plan whose service name is not taken in the project; it is noted in `attempt`.

    A generated id is made from the present time, or from a later one. What a dead run has left of
    `--deployment-id` is removed. Raises Failure if it is taken.
    """
    if plan.options.deployment_id and (
        left := leftover(api, stack, attempt, plan.options.deployment_id)
    ):
        remove_leftover(api, stack, left, output)
    plan = untaken(plan, stack, attempt.rival)
    attempt.deployment_id, attempt.service_name = plan.deployment_id, plan.service_name
    return plan


def untaken(plan: Plan, stack: Stack, rival: Lock | None = None) -> Plan:
    """Return a plan with an id that no service has. Raises Failure if `--deployment-id` is taken.

    Args:
        rival: the deploy lock of another run.
    """
    services = [*stack.services.values(), *stack.others, *stack.empty]
    ids = {service.deployment_id for service in services}
    if plan.options.deployment_id:
        if plan.service_name not in stack.taken and plan.deployment_id not in ids:
            return plan
        what = f"deployment {plan.deployment_id}"
        if plan.deployment_id not in ids:
            what = f"a service {plan.service_name} of this project, which is no deployment,"
        service = service_of(stack, rival.holder) if rival else None
        if rival and service and service.deployment_id == plan.deployment_id:
            raise Failure(
                f"{what} exists already, and the run of {rival.by or 'somebody'} deploys it: wait"
                " for it (--lock-wait SECONDS). If that run is dead, `pulse-railway unlock`, then"
                " this again"
            )
        raise Failure(f"{what} exists already: choose another --deployment-id")
    moment = datetime.now(UTC)
    name = plan.deployment_id[: -len("-yymmdd-HHMMSS")]
    while True:
        plan = replace(plan, deployment_id=naming.generate_deployment_id(name, moment))
        if plan.service_name not in stack.taken and plan.deployment_id not in ids:
            return plan
        moment += timedelta(seconds=1)


def backend_variables(plan: Plan, stack: Stack) -> dict[str, str]:
    """Return the variables of a backend service. Secrets are references to other services."""
    names = stack.names
    env = stack.env
    assert env is not None
    references = {
        name: f"${{{{{names.env}.{name}}}}}"
        for name in env.variables
        if name not in contract.NOT_REFERENCED
        and not name.startswith(("RAILWAY_", "PULSE_RAILWAY_"))
    }
    managed = {
        contract.DEPLOYMENT_ID: plan.deployment_id,
        contract.STACK: str(stack.stamp),
        contract.INTERNAL_TOKEN: f"${{{{{names.router}.{contract.INTERNAL_TOKEN}}}}}",
        contract.APP_FILE: plan.app.file,
        contract.SERVER_ADDRESS: plan.options.server_address or stack.address,
        contract.PUBLIC_ORIGIN: plan.options.server_address or stack.address,
        contract.PORT: str(contract.DEFAULT_PORT),
    }
    if plan.options.instances > 1:
        managed[contract.INSTANCES] = str(plan.options.instances)
    if not plan.options.deployment_id:
        managed[contract.NAME] = plan.options.deployment_name.strip()
    if plan.app.uses_session_store:
        managed[contract.SESSION_REDIS_URL] = stack.session_redis_reference
        if stack.router and stack.router.variables.get(contract.KEY_TTL):
            managed[contract.SESSION_SCOPE] = stack.target.environment_id
            managed[contract.KEY_TTL] = f"${{{{{names.router}.{contract.KEY_TTL}}}}}"
        elif stack.session_redis_url and (scope := env.variables.get(contract.SESSION_SCOPE)):
            managed[contract.SESSION_SCOPE] = scope
            managed[contract.KEY_TTL] = f"${{{{{names.env}.{contract.KEY_TTL}}}}}"
    build = {**plan.options.build_args}
    if plan.is_source:
        build.setdefault(contract.WEB_ROOT, plan.web_root.as_posix())
        if plan.dockerfile.as_posix() != "Dockerfile":
            build[contract.DOCKERFILE_PATH] = plan.dockerfile.as_posix()
    return {**build, **references, **plan.options.env, **managed}


PULSE_SECRET = "PULSE_SECRET"  # Pulse signs its session cookies with it


def deploy(api: Api, target: Target, plan: Plan, output: Output) -> dict[str, Any]:
    """Start a new deployment, make it active, or the canary, and return the verb's result.

    Raises Failure if a step fails, after printing the step. Before the promotion the service and
    the record of this run are then removed (unless `plan.options.keep_failed`).
    """
    if plan.is_source:
        program.need_railway(api)
    attempt = Attempt(plan.deployment_id, plan.service_name)
    attempt.run += IMAGE if plan.options.image_repository else ""
    began = time.monotonic()
    baking: dict[str, Any] | None = None
    evicted: list[str] = []
    with interruptible(), contextlib.ExitStack() as exit_stack:
        exit_stack.callback(release_lock, api, attempt)
        exit_stack.enter_context(undo_on_failure(api, target, plan.options, attempt, output))
        with step(output, attempt, "inspect the baseline"):
            stack = inspect(api, target, plan.app.names)
            require_baseline(stack)
            attempt.stack = stack
            check_secret(plan, stack)
            active = stack.backend(stack.last_promoted or "")
            warn_of_lost_variables(stack, [active] if active else [], output)
            identity = app_identity.of_app(plan.app)
            app_identity.check_same_app(stack, identity, plan.options.replace_app, output)
            app = replace(plan.app, names=stack.names)  # the existing services' names
            plan = replace(plan, options=replace(plan.options, app=app))
            warn_of_many(stack, output)
        with step(output, attempt, "ask the router"):  # a failure here saves the build
            stack = attempt.stack = take_lock(api, stack, plan.options, attempt, output)
            require_baseline(stack)
            if plan.options.from_:
                plan = replace(plan, options=with_image(api, stack, plan.options))
            check_router(api, stack, plan, attempt)
            plan = free_name(api, plan, stack, attempt, output)
            hosting = backend_settings.choose_hosting(api, stack, plan.options, output)
            plan = replace(plan, hosting=hosting)
            warning = instances.size_warning(
                plan.options.instances, hosting.vcpus, hosting.memory_gb
            )
            if warning:
                output.warn(warning)
        output.info(f"deployment {plan.deployment_id}")
        digest = None
        if plan.options.image_repository:
            with step(output, attempt, f"build and push {plan.image}"):
                digest = build_image(plan, stack, output)
        elif plan.image:
            with step(output, attempt, f"look up {plan.image}"):
                digest = images.find_digest(plan.image, plan.options.registry, output)
        with step(output, attempt, f"create the service {plan.service_name}"):
            about = provenance.about(plan.app.context, plan.options.message)
            if plan.image:
                about |= {"image": plan.image, **({"digest": digest} if digest else {})}
                about["instances"] = str(plan.options.instances)
            facts = described(stack, plan, about, identity)
            plan = create_named(api, stack, plan, attempt, facts, output)
        with step(output, attempt, "build and start"):
            start_backend(api, stack, plan, attempt, output)
        with step(output, attempt, "register with the router"):
            register(api, stack, plan, attempt, about, output)
        with step(output, attempt, "reach it through the router"):
            name, closed = plan.deployment_id, plan.options.preview
            wait_until_reachable(api, stack, name, output, by_affinity=True, preview=closed)
            if (count := plan.options.instances) > 1:
                wait_for_instances(api, stack, name, count, output, preview=closed)
        with step(output, attempt, f"see its page {plan.app.plugin.check_path}"):
            wait_for_page(api, stack, plan, attempt, output)
        if plan.preview_key:
            with step(output, attempt, "close it to janitors of earlier versions"):
                preview.hide_from_earlier_janitors(api, stack, str(attempt.service_id))
        if plan.steps:
            attempt.step = "roll it out in steps"
            baking = roll_out_new(api, stack, plan, attempt, output)
        elif plan.options.canary is not None:
            with step(output, attempt, f"give it {plan.options.canary:g} % of new visitors"):
                promote_new(api, stack, plan, attempt, output)
        elif plan.options.promote:
            with step(output, attempt, "promote it"):
                promote_new(api, stack, plan, attempt, output)
            with step(output, attempt, "reach it without affinity"):
                wait_until_active(api, stack, plan.deployment_id, output)
        if (seconds := bake_seconds(plan, attempt)) and not plan.steps:
            canary = plan.options.canary is not None
            attempt.step = f"watch it for {seconds} s"
            old = str(attempt.previous)
            slow = plan.options.bake_latency_ms is not None
            baking = bake(api, stack, attempt.deployment_id, old, seconds, output, canary, slow)
        if plan.options.evict:
            attempt.step = "evict the other versions"
            evicted = evict(api, stack, plan.deployment_id, output)
        release_dead(api, stack, attempt, output)
        app_identity.store_identity(api, stack, identity, plan.options.replace_app, output)
        if danger := config_files.would_delete(plan.app.context):
            output.warn(danger)
    as_canary = None if plan.steps else plan.options.canary
    return {
        "deployment_id": plan.deployment_id,
        "service_id": attempt.service_id,
        "service_name": plan.service_name,
        "railway_deployment_id": attempt.railway_deployment,
        "image": plan.image,
        "digest": digest,
        "active": attempt.promoted and as_canary is None and not is_over(baking),
        "canary": as_canary,
        "instances": plan.options.instances,
        "bake": baking,
        "drains": None if plan.options.evict else attempt.drains,
        "preview": plan.preview_key and preview.link(stack, plan.deployment_id, plan.preview_key),
        "evicted": evicted,
        "address": stack.address,
        "server_address": plan.options.server_address or stack.address,
        "seconds": round(time.monotonic() - began, 1),
        # 0.3.x's names of these fields
        "backend_service_id": attempt.service_id,
        "backend_service_name": plan.service_name,
        "backend_image": plan.image,
        "backend_deployment_id": attempt.railway_deployment,
        "backend_status": "SUCCESS",
    }


def with_image(api: Api, stack: Stack, options: DeployOptions) -> DeployOptions:
    """Return options with the image of `--from`, and its processes unless a number is given."""
    image, count = images.find_image(api, stack, str(options.from_))
    instances = count if options.keep_instances and count else options.instances
    return replace(options, image=image, instances=instances)


def check_router(api: Api, stack: Stack, plan: Plan, attempt: Attempt) -> None:
    """Raise Failure if the routing state, or the router's version, does not allow what is asked
    for. The state is read once, and only if something depends on it: Railway counts calls."""
    options = plan.options
    moves = moves_of(options) if options.promote else None
    if options.canary is None and not (moves or plan.preview_key or options.instances > 1):
        return
    state = router_commands.read_state(api, stack)
    if options.canary is not None:
        check_canary(state, attempt)
    if plan.steps:
        require_steps(stack, state)
    require_moves(stack, state, moves)
    if plan.preview_key:
        preview.require_previews(stack, state)
    if options.instances > 1:
        instances.require_instances(stack, state)


@contextlib.contextmanager
def step(output: Output, attempt: Attempt, title: str) -> Iterator[None]:
    attempt.step = title
    with output.step(title):
        yield


def bake_seconds(plan: Plan, attempt: Attempt) -> int:
    """Return the bake's duration in seconds; 0 if there is no version for a rollback."""
    return plan.options.bake if attempt.previous else 0


def build_image(plan: Plan, stack: Stack, output: Output) -> str | None:
    """Build and push the image, and return its digest if docker says it."""
    assert plan.image
    address = plan.options.server_address or stack.address
    return docker.build(
        image=plan.image,
        dockerfile=plan.app.context / plan.dockerfile,
        context=plan.app.context,
        build_args=build_arguments(plan.options, plan.web_root, address),
        on_line=output.log,
    )


MANY_LIVE = 8  # versions


def warn_of_many(stack: Stack, output: Output) -> None:
    """Warn of many live versions, each of which is a service with memory of its own."""
    live = stack.backends  # newest first
    if len(live) >= MANY_LIVE:
        oldest = next(s for s in reversed(live) if s.deployment_id != stack.last_promoted)
        output.warn(
            f"{len(live)} versions are live, each a service of its own, and this is one more:"
            " `pulse-railway status` shows their tabs, `pulse-railway delete --deployment-id"
            f" {oldest.deployment_id}` removes the oldest one, and `pulse-railway ensure"
            " --drain-ttl-seconds` limits how long they drain"
        )


def described(
    stack: Stack, plan: Plan, about: dict[str, str], identity: AppIdentity
) -> dict[str, str]:
    """Return the variables that say what is deployed, and of which app."""
    app = app_identity.merge_stored(stack, identity, plan.options.replace_app)
    return {
        contract.APP: app_identity.to_json(app),
        # a `$` in a commit's message could begin a reference
        contract.ABOUT: json.dumps(about, separators=(",", ":")).replace("$", "\\u0024"),
    }


def create_named(
    api: Api, stack: Stack, plan: Plan, attempt: Attempt, facts: dict[str, str], output: Output
) -> Plan:
    """Create the backend's service, and return the plan.

    If another run has taken the name since the stack was read, a generated id gets a later time.
    """
    while True:
        try:
            create_backend(api, stack, plan, attempt, facts)
            return plan
        except GraphqlError:
            present = inspect(api, stack.target, stack.names)
            if attempt.service_id or service_of(present, attempt.run):
                raise
            stack.taken |= present.taken
            if plan.service_name not in stack.taken:
                raise
            attempt.creating = False  # the service of that name is another run's
            if plan.options.image_repository:  # the image is built, with the id as its tag
                raise
            plan = free_name(api, plan, stack, attempt, output)
            output.info(f"another run took that name: deployment {plan.deployment_id}")


def create_backend(
    api: Api, stack: Stack, plan: Plan, attempt: Attempt, facts: dict[str, str]
) -> None:
    assert stack.router is not None
    attempt.creating = True
    command, registry = plan.app.plugin.pre_deploy, plan.options.registry
    pre_deploy = {"preDeployCommand": [command]} if command else {}
    with shielded():
        create_service(
            api,
            stack.target,
            plan.service_name,
            {
                **backend_variables(plan, stack),
                contract.RUN: attempt.run,
                **facts,
                **({contract.PREVIEW: plan.preview_hash} if plan.preview_hash else {}),
            },
            group_id=stack.router.group_id,
            settings={
                **backend_settings.FIXED,
                **plan.hosting.settings(),
                "startCommand": plan.start_command,
                **pre_deploy,
                **(registry.setting(plan.image) if registry and plan.image else {}),
            },
            image=plan.image,
            created=lambda service_id: setattr(attempt, "service_id", service_id),
        )
        backend_settings.allot(api, stack.target, str(attempt.service_id), plan.hosting)


def start_backend(api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output) -> None:
    """Upload the sources for a build on Railway, or deploy the pushed image; then wait."""
    assert attempt.service_id
    target = stack.target
    deployment: str | None
    if plan.image:
        deployment = deploy_service(api, target, attempt.service_id)
    else:
        output.waiting(f"uploading {plan.app.context}")
        deployment = up(
            api,
            project=target.project_id,
            environment=target.environment_id,
            service=plan.service_name,
            context=plan.app.context,
            no_gitignore=plan.options.no_gitignore,
        )
    if deployment is None:  # some CLIs do not print the deployment's id

        def ask() -> str | None:
            started = latest(api, target).get(str(attempt.service_id))
            return started["id"] if started else None

        deployment = poll(60.0, ask, "Railway's answer to the upload")
    attempt.railway_deployment = deployment
    try:
        wait_for_build(api, str(deployment), output)
    except Failure as failure:
        if plan.image:
            raise Failure(images.why_not_pulled(str(failure), plan.options.registry)) from None
        raise


def register(
    api: Api, stack: Stack, plan: Plan, attempt: Attempt, about: dict[str, str], output: Output
) -> None:
    assert attempt.service_id
    address = backend_address(api, stack.target, attempt.service_id)
    attempt.registered = True  # before the command, whose answer may be lost
    router_commands.send_register(
        api,
        stack,
        deployment_id=plan.deployment_id,
        service_name=plan.service_name,
        service_id=attempt.service_id,
        address=address,
        held=not plan.options.promote or plan.options.canary is not None,
        about=about,
        preview=plan.preview_hash,
        instances=plan.options.instances,
        renew=attempt.renewal(LATE_LEASE + plan.options.bake),
        warn=output.warn,
    )


def wait_for_page(api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output) -> None:
    """Wait until the deployment renders a page.

    The health check reaches Python's server only; React's server, which renders the pages, can
    start later or fail. Raises Failure with the end of the deployment's log.
    """
    try:
        path, closed = plan.app.plugin.check_path, plan.options.preview
        wait_until_rendered(api, stack, plan.deployment_id, path, output, closed)
    except Failure as failure:
        log_tail = runtime_tail(api, str(attempt.railway_deployment))
        raise Failure(f"{failure}{log_tail}") from None


def roll_out_new(
    api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output
) -> dict[str, Any]:
    """Make the new deployment a canary with growing weights, then active; return the last bake."""
    assert plan.steps
    baking, promoted = roll_out(
        api,
        stack,
        plan.deployment_id,
        plan.service_name,
        str(attempt.previous),
        plan.steps,
        output,
        weights=plan.steps.weights,
        began=lambda: setattr(attempt, "promoted", True),
        renew=attempt.renewal(LATE_LEASE + plan.steps.bake),
        why=plan.options.message,
        moves=moves_of(plan.options),
    )
    attempt.drains = promoted.drains if promoted else None
    return baking


def promote_new(api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output) -> None:
    """Make the new deployment active, or the canary.

    If neither a bake nor an eviction follows, the same command releases the deploy lock.
    """
    options, seconds = plan.options, bake_seconds(plan, attempt)
    unlock = attempt.run if attempt.locked and not (seconds or options.evict) else None
    renew = attempt.renewal(LATE_LEASE + seconds) if seconds else None
    promoted = router_commands.send_promote(
        api,
        stack,
        plan.deployment_id,
        plan.service_name,
        weight=options.canary,
        bake=seconds,
        bake_latency_ms=options.bake_latency_ms,
        moves=moves_of(options) if options.canary is None else None,
        why=options.message,
        unlock=unlock,
        renew=renew,
        warn=output.warn,
    )
    attempt.promoted = True
    attempt.drains = promoted.drains if promoted else None
    attempt.locked = attempt.locked and not unlock
    if options.canary is None:
        store_last_promoted(api, stack, plan.deployment_id, promoted, output)
