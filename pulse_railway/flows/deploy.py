"""`deploy`: bring a new version up, verify it through the router, make it active.

It reads as its steps do in the README. Before the promotion a failure or a signal removes what the
run made; after it nothing is removed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pulse_railway import app_identity, contract, naming, provenance, router_commands
from pulse_railway.build_context import secrets_in_image
from pulse_railway.config import AppConfig, Target, inside
from pulse_railway.errors import Failure, Refused
from pulse_railway.flows.bake import bake
from pulse_railway.flows.cleanup import Attempt, release, undone_on_failure
from pulse_railway.flows.reachability import (
    backend_address,
    remember_active,
    wait_until_active,
    wait_until_rendered,
    wait_until_routed,
)
from pulse_railway.flows.signals import interruptible, shielded
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway import config_files, docker, program, upload
from pulse_railway.railway.api import Api
from pulse_railway.railway.up import up
from pulse_railway.services import create_service, deploy_service, shell
from pulse_railway.stack import Stack, inspect, joined, references, require_baseline
from pulse_railway.waiting import latest, poll, runtime_tail, wait_for_build


@dataclass(frozen=True)
class Plan:
    """All that a deploy has decided before it creates anything."""

    wanted: DeployOptions
    deployment_id: str
    dockerfile: Path  # relative to the context, as web_root
    web_root: Path
    start_command: str

    @property
    def app(self) -> AppConfig:
        return self.wanted.app

    @property
    def service_name(self) -> str:
        return naming.backend_name(self.app.names.prefix, self.deployment_id)

    @property
    def image(self) -> str | None:
        repository = self.wanted.image_repository
        return f"{repository}:{self.deployment_id}" if repository else None


def prepare(wanted: DeployOptions, output: Output) -> Plan:
    """Check all that can be checked on this machine. Raises Failure."""
    plan = check(wanted, output)
    program.need("docker" if wanted.image_repository else "railway")
    return plan


def check(wanted: DeployOptions, output: Output) -> Plan:
    """Check the app and its files. Raises Failure."""
    app, context = wanted.app, wanted.app.context
    if not app.plugin.dockerfile:
        raise Failure("which Dockerfile? set RailwayPlugin(dockerfile=...)")
    dockerfile = inside(context, app.plugin.dockerfile, "the Dockerfile")
    if not (context / dockerfile).is_file():
        raise Failure(f"no Dockerfile at {context / dockerfile}: set RailwayPlugin(dockerfile=...)")
    if wanted.web_root and Path(wanted.web_root).is_absolute():
        raise Failure(f"--web-root {wanted.web_root} must be relative to the deploy context")
    web_root = inside(context, wanted.web_root or app.web_root, "the web root")
    if not (context / web_root).is_dir():
        raise Failure(f"no web root at {context / web_root}: pass --web-root")
    try:
        chosen = wanted.deployment_id or naming.generate_deployment_id(wanted.deployment_name)
        naming.backend_name(app.names.prefix, chosen)
    except ValueError as error:
        raise Failure(str(error)) from None
    if wanted.image_repository:
        if bad := secrets_in_image(context, context / dockerfile):
            raise Failure(
                f"the image would hold {', '.join(bad)}: name them in"
                f" {context / '.dockerignore'}, or copy less in {dockerfile}"
            )
    else:
        check_upload(wanted, dockerfile, web_root, output)
    if not app.has_address and not app.plugin.start_command:  # else who knows how it starts
        raise Failure(
            "the app has no server_address, without which Pulse does not start in production: pass"
            ' server_address=os.environ.get("PULSE_SERVER_ADDRESS") to ps.App; `deploy` sets it'
        )
    if wanted.server_address and not wanted.server_address.startswith("https://"):
        raise Failure(
            f"the app's server address is {wanted.server_address}, and must be https in production:"
            " set server_address on ps.App, or pass --server-address https://..."
        )
    if wanted.replicas > 1:
        output.warn("with several replicas a tab can reach one that does not know it: use 1")
    if "127.0.0.1" not in app.internal_address:
        output.warn(
            f"the app renders its pages through {app.internal_address}, so a page of one deployment"
            " can be rendered by another: leave internal_server_address out of ps.App"
        )
    return Plan(
        wanted=wanted,
        deployment_id=chosen,
        dockerfile=dockerfile,
        web_root=web_root,
        start_command=shell(app.plugin.start_command or contract.START_COMMAND),
    )


def check_upload(wanted: DeployOptions, dockerfile: Path, web_root: Path, output: Output) -> None:
    """Raises Failure where `railway up` would leave out what the build needs; warns of what it
    would take along that it should not."""
    context, gitignore = wanted.app.context, not wanted.no_gitignore
    app = Path(wanted.app.file.partition(":")[0])
    for what, path in (("Dockerfile", dockerfile), ("app", app), ("web root", web_root)):
        if why := upload.left_out(context, path, gitignore=gitignore):
            raise Failure(f"the {what} {path} would not be uploaded: {why}")
    if found := upload.secrets_in_upload(context, gitignore=gitignore):
        output.warn(
            f"the upload holds {', '.join(found[:5])}{' and more' if len(found) > 5 else ''}: name"
            f" them in {context / '.railwayignore'}"
        )


def check_secret(plan: Plan, stack: Stack) -> None:
    """Raises Failure where the app would not start for want of PULSE_SECRET."""
    if not plan.app.needs_secret or plan.wanted.env.get(PULSE_SECRET):
        return
    assert stack.env is not None
    in_image = PULSE_SECRET in (plan.app.context / plan.dockerfile).read_text(errors="replace")
    if stack.env.variables.get(PULSE_SECRET) or in_image:
        return
    raise Failure(
        f"the app keeps its sessions in cookies and needs {PULSE_SECRET}: set it once on"
        f" {stack.env.name} (`railway variables --service {stack.env.name} --set"
        f' "{PULSE_SECRET}=$(openssl rand -hex 32)"`), or keep sessions in RailwaySessionStore'
    )


def tell_of_lost_variables(stack: Stack, output: Output) -> None:
    """Warn of variables that the active version has from the env service, and a new one has not."""
    active, env = stack.backend(stack.last_promoted or ""), stack.env
    assert env is not None
    if active and (gone := references(active, env.name) - env.variables.keys()):
        output.warn(
            f"{env.name} has no {joined(gone)}, which {active.deployment_id} refers to: set it"
            " there if the app needs it"
        )


def free_name(plan: Plan, stack: Stack) -> Plan:
    """A plan whose service name is free in the project. Generated ids step on a second; given ones
    are refused."""
    moment = datetime.now(UTC)
    ids = {service.deployment_id for service in [*stack.services.values(), *stack.others]}
    while plan.service_name in stack.taken or plan.deployment_id in ids:
        if plan.wanted.deployment_id:
            raise Failure(
                f"deployment {plan.deployment_id} exists already: choose another --deployment-id"
            )
        moment += timedelta(seconds=1)
        name = plan.deployment_id[: -len("-yymmdd-HHMMSS")]
        plan = replace(plan, deployment_id=naming.generate_deployment_id(name, moment))
    return plan


def backend_variables(plan: Plan, stack: Stack) -> dict[str, str]:
    """The variables of a backend service. Secrets are references: they stay on Railway."""
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
        contract.SERVER_ADDRESS: plan.wanted.server_address or stack.address,
        contract.PUBLIC_ORIGIN: plan.wanted.server_address or stack.address,
        contract.PORT: str(contract.DEFAULT_PORT),
    }
    if not plan.wanted.deployment_id:
        managed[contract.NAME] = plan.wanted.deployment_name.strip()
    if plan.app.uses_session_store:
        managed[contract.SESSION_REDIS_URL] = f"${{{{{names.router}.{contract.REDIS_URL}}}}}"
        if stack.router and stack.router.variables.get(contract.KEY_TTL):
            managed[contract.SESSION_SCOPE] = stack.target.environment_id
            managed[contract.KEY_TTL] = f"${{{{{names.router}.{contract.KEY_TTL}}}}}"
    build = {**plan.wanted.build_args}
    if not plan.image:
        build.setdefault(contract.WEB_ROOT, plan.web_root.as_posix())
        if plan.dockerfile.as_posix() != "Dockerfile":
            build[contract.DOCKERFILE_PATH] = plan.dockerfile.as_posix()
    return {**build, **references, **plan.wanted.env, **managed}


PULSE_SECRET = "PULSE_SECRET"  # Pulse's own: what signs its session cookies
BACKEND_SETTINGS: dict[str, Any] = {
    "healthcheckPath": contract.HEALTH_PATH,
    "healthcheckTimeout": 300,
    "overlapSeconds": 30,
    "drainingSeconds": 10,
}


def deploy(api: Api, target: Target, plan: Plan, output: Output) -> dict[str, Any]:
    """Bring a new deployment up and make it the active one.

    Raises Failure where a step fails, saying which; before the promotion the service and the
    record that this run made are removed (unless `plan.wanted.keep_failed`).
    """
    if not plan.image:
        program.need_railway(api)
    attempt = Attempt(plan.deployment_id, plan.service_name)
    began = time.monotonic()
    baking: dict[str, Any] | None = None
    with interruptible(), contextlib.ExitStack() as at_end:
        at_end.callback(release, api, attempt)
        at_end.enter_context(undone_on_failure(api, target, plan.wanted, attempt, output))
        with step(output, attempt, "inspect the baseline"):
            stack = inspect(api, target, plan.app.names)
            require_baseline(stack)
            attempt.stack = stack
            check_secret(plan, stack)
            tell_of_lost_variables(stack, output)
            identity = app_identity.of_app(plan.app)
            app_identity.check_same_app(stack, identity, plan.wanted.replace_app, output)
            app = replace(plan.app, names=stack.names)  # as they were when it was set up
            plan = free_name(replace(plan, wanted=replace(plan.wanted, app=app)), stack)
            attempt.deployment_id, attempt.service_name = (
                plan.deployment_id,
                plan.service_name,
            )
        with step(output, attempt, "ask the router"):  # the way to it is open, before a build
            ask_router(api, stack, plan, attempt, output)
        output.say(f"deployment {plan.deployment_id}")
        if plan.image:
            with step(output, attempt, f"build and push {plan.image}"):
                build_image(plan, stack, output)
        with step(output, attempt, f"create the service {plan.service_name}"):
            create_backend(api, stack, plan, attempt)
        with step(output, attempt, "build and start"):
            start_backend(api, stack, plan, attempt, output)
        with step(output, attempt, "register with the router"):
            register(api, stack, plan, attempt)
        with step(output, attempt, "reach it through the router"):
            wait_until_routed(api, stack, plan.deployment_id, output, by_affinity=True)
        with step(output, attempt, f"see its page {plan.app.plugin.check_path}"):
            wait_for_page(api, stack, plan, attempt, output)
        if plan.wanted.canary is not None:
            with step(output, attempt, f"give it {plan.wanted.canary:g} % of new visitors"):
                promote_new(api, stack, plan, attempt, output)
        elif plan.wanted.promote:
            with step(output, attempt, "promote it"):
                promote_new(api, stack, plan, attempt, output)
            with step(output, attempt, "reach it without affinity"):
                wait_until_active(api, stack, plan.deployment_id, output)
        if seconds := to_bake(plan, attempt):
            canary = plan.wanted.canary is not None
            attempt.step = f"watch it for {seconds} s"
            old = str(attempt.previous)
            baking = bake(api, stack, attempt.deployment_id, old, seconds, output, canary)
        app_identity.store_identity(api, stack, identity, plan.wanted.replace_app, output)
        if danger := config_files.would_delete(plan.app.context):
            output.warn(danger)
    return {
        "deployment_id": plan.deployment_id,
        "service_id": attempt.service_id,
        "service_name": plan.service_name,
        "railway_deployment_id": attempt.railway_deployment,
        "image": plan.image,
        "active": attempt.promoted and plan.wanted.canary is None,
        "canary": plan.wanted.canary,
        "bake": baking,
        "address": stack.address,
        "server_address": plan.wanted.server_address or stack.address,
        "seconds": round(time.monotonic() - began, 1),
        # 0.3.x's names for the same
        "backend_service_id": attempt.service_id,
        "backend_service_name": plan.service_name,
        "backend_image": plan.image,
        "backend_deployment_id": attempt.railway_deployment,
        "backend_status": "SUCCESS",
    }


@contextlib.contextmanager
def step(output: Output, attempt: Attempt, title: str) -> Iterator[None]:
    attempt.step = title
    with output.step(title):
        yield


LOCK_LEASE = 3600  # seconds, beyond a bake: longer than all steps of a deploy may take
LOCK_POLL = 10.0


def ask_router(api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output) -> None:
    """See that the way to the router is open before anything is built, and take the deploy lock,
    so that others see who deploys. Raises Failure where a canary could not be one."""
    wanted = plan.wanted
    deadline = time.monotonic() + (wanted.lock_wait or 0)
    while True:
        try:
            lease = LOCK_LEASE + wanted.bake
            attempt.locked = True  # it may be, from here on
            attempt.previous, lost = router_commands.send_lock(api, stack, attempt.run, lease)
            if lost and (wanted.bake or wanted.canary is not None):
                raise Failure(
                    "the routing state is lost, or an older one: there is nothing certain to"
                    " compare with or to go back to; run `pulse-railway restore` first"
                )
            break
        except Refused as refused:
            attempt.locked = False
            if refused.reason != "locked":
                raise
            if wanted.lock_wait is None:
                output.warn(
                    f"{refused}: both go on, and the one that is promoted last is active;"
                    " --lock-wait SECONDS waits"
                )
                attempt.previous = router_commands.read_active(api, stack)
                break
            if time.monotonic() >= deadline:
                raise Failure(
                    f"{refused}, after {wanted.lock_wait} s still: if that run is dead,"
                    " `pulse-railway unlock`"
                ) from None
            output.waiting(str(refused))
        time.sleep(min(LOCK_POLL, max(deadline - time.monotonic(), 0.1)))
    if wanted.canary is None:
        return
    if attempt.previous is None:
        raise Failure("a canary stands beside an active deployment, and none is active: deploy one")
    if other := router_commands.read_state(api, stack)["canary"]:
        raise Failure(
            f"{other['deployment_id']} is the canary already, with {other['weight']:g} %: promote"
            " it, or `pulse-railway rollback`"
        )


def to_bake(plan: Plan, attempt: Attempt) -> int:
    """For how many seconds it is watched: there has to be something to go back to."""
    return plan.wanted.bake if attempt.previous else 0


def build_image(plan: Plan, stack: Stack, output: Output) -> None:
    assert plan.image
    arguments = {
        contract.APP_FILE: plan.app.file,
        contract.WEB_ROOT: plan.web_root.as_posix(),
        contract.SERVER_ADDRESS: plan.wanted.server_address or stack.address,
        **plan.wanted.build_args,
    }
    docker.build(
        image=plan.image,
        dockerfile=plan.app.context / plan.dockerfile,
        context=plan.app.context,
        build_args=arguments,
        on_line=output.log,
    )


def create_backend(api: Api, stack: Stack, plan: Plan, attempt: Attempt) -> None:
    assert stack.router is not None
    attempt.creating = True
    before = plan.app.plugin.pre_deploy
    pre_deploy = {"preDeployCommand": [before]} if before else {}
    with shielded():
        create_service(
            api,
            stack.target,
            plan.service_name,
            {**backend_variables(plan, stack), contract.RUN: attempt.run},
            group_id=stack.router.group_id,
            settings={
                **BACKEND_SETTINGS,
                "numReplicas": plan.wanted.replicas,
                "startCommand": plan.start_command,
                **pre_deploy,
            },
            image=plan.image,
            created=lambda service_id: setattr(attempt, "service_id", service_id),
        )


def start_backend(api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output) -> None:
    """Source mode: upload and build on Railway. Image mode: deploy the image that was pushed."""
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
            no_gitignore=plan.wanted.no_gitignore,
        )
    if deployment is None:  # a CLI that does not say

        def ask() -> str | None:
            found = latest(api, target).get(str(attempt.service_id))
            return found["id"] if found else None

        deployment = poll(60.0, ask, "Railway's answer to the upload")
    attempt.railway_deployment = deployment
    wait_for_build(api, str(deployment), output)


def register(api: Api, stack: Stack, plan: Plan, attempt: Attempt) -> None:
    assert attempt.service_id
    address = backend_address(api, stack.target, attempt.service_id)
    attempt.registered = True  # it may have been, from here on
    router_commands.send_register(
        api,
        stack,
        deployment_id=plan.deployment_id,
        service_name=plan.service_name,
        service_id=attempt.service_id,
        address=address,
        held=not plan.wanted.promote or plan.wanted.canary is not None,
        about=provenance.about(plan.app.context, plan.wanted.message),
    )


def wait_for_page(api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output) -> None:
    """Python's health check says nothing of React's server beside it, which renders the pages and
    can come up later, or not at all. Raises Failure with what the deployment said last."""
    try:
        wait_until_rendered(api, stack, plan.deployment_id, plan.app.plugin.check_path, output)
    except Failure as failure:
        said = runtime_tail(api, str(attempt.railway_deployment))
        raise Failure(f"{failure}{said}") from None


def promote_new(api: Api, stack: Stack, plan: Plan, attempt: Attempt, output: Output) -> None:
    """Make it the active one, or the canary. The deploy lock is given back with it, where no bake
    follows."""
    wanted, seconds = plan.wanted, to_bake(plan, attempt)
    unlock = attempt.run if attempt.locked and not seconds else None
    promoted = router_commands.send_promote(
        api,
        stack,
        plan.deployment_id,
        plan.service_name,
        weight=wanted.canary,
        bake=seconds,
        why=wanted.message,
        unlock=unlock,
        warn=output.warn,
    )
    attempt.promoted = True
    attempt.locked = attempt.locked and not unlock
    if wanted.canary is None:
        remember_active(api, stack, plan.deployment_id, promoted, output)
