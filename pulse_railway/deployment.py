"""Deployments: bringing one up, choosing among them, taking one down.

`deploy` reads as its steps do in the README. Before the promotion a failure or a signal removes
what the run made; after it nothing is removed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from pulse_railway import config, contract, naming
from pulse_railway.baseline import create_service, delete_service, deploy_service, shell
from pulse_railway.config import AppConfig, Target
from pulse_railway.errors import Failure, Interrupted, Uncertain, keep_secret
from pulse_railway.output import Output
from pulse_railway.railway import cli, documents
from pulse_railway.railway.api import Api
from pulse_railway.stack import (
    Service,
    Stack,
    active_deployment,
    control,
    inspect,
    joined,
    latest,
    poll,
    require_baseline,
    wait_for_build,
)

ROUTED_TIMEOUT = 180.0
LATE_PAUSES = (0.0, 3.0, 7.0)  # seconds


@dataclass
class _Shield:
    """Signals that came while a call was under way whose outcome must be known."""

    depth: int = 0
    pending: int | None = None


_shield = _Shield()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A signal waits for the end of this block: what it makes can then be removed."""
    _shield.depth += 1
    try:
        yield
    finally:
        _shield.depth -= 1
        number, _shield.pending = _shield.pending, None
        if number is not None and not _shield.depth:
            raise Interrupted(number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, so that a verb can clean up; a second one too."""

    def handler(number: int, _: FrameType | None) -> None:
        if _shield.depth and _shield.pending is None:
            _shield.pending = number
        else:
            raise Interrupted(number)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@dataclass(frozen=True)
class Plan:
    """All that a deploy has decided before it creates anything."""

    app: AppConfig
    deployment_id: str
    generated: bool
    dockerfile: Path  # relative to the context, as web_root
    web_root: Path
    image_repository: str | None
    build_args: dict[str, str]
    env: dict[str, str]
    replicas: int
    server_address: str | None
    start_command: str
    no_gitignore: bool
    promote: bool
    keep_failed: bool

    @property
    def service_name(self) -> str:
        return naming.backend_name(self.app.names.prefix, self.deployment_id)

    @property
    def image(self) -> str | None:
        return f"{self.image_repository}:{self.deployment_id}" if self.image_repository else None


@dataclass
class Progress:
    """What a deploy has made so far, for cleaning up and for the result."""

    step: str = ""
    service_id: str | None = None
    creating: bool = False  # a service may exist that we have no id of
    registered: bool = False
    promoted: bool = False
    railway_deployment: str | None = None
    notes: list[str] = field(default_factory=list)


# -- deciding ----------------------------------------------------------------------------------


def prepare(app: AppConfig, flags: Mapping[str, Any], output: Output) -> Plan:
    """Check all that can be checked on this machine. Raises Failure."""
    plugin, context = app.plugin, app.context
    if not plugin.dockerfile:
        raise Failure("which Dockerfile? set RailwayPlugin(dockerfile=...)")
    dockerfile = inside(context, plugin.dockerfile, "the Dockerfile")
    if not (context / dockerfile).is_file():
        raise Failure(f"no Dockerfile at {context / dockerfile}: set RailwayPlugin(dockerfile=...)")
    root = flags.get("web_root")
    if root and Path(root).is_absolute():
        raise Failure(f"--web-root {root} must be relative to the deploy context")
    web_root = inside(context, root or app.web_root, "the web root")
    if not (context / web_root).is_dir():
        raise Failure(f"no web root at {context / web_root}: pass --web-root")
    repository = flags.get("image_repository") or plugin.image_repository
    if repository and flags.get("no_gitignore"):
        raise Failure("--no-gitignore is for source deploys: leave it or --image-repository out")
    build_args = config.pairs(flags.get("build_arg"), "--build-arg")
    env = config.pairs(flags.get("env"), "--env")
    for flag, given in (("--env", env), ("--build-arg", {} if repository else build_args)):
        if taken := sorted(contract.RESERVED & given.keys()):
            raise Failure(f"{flag} cannot set {', '.join(taken)}: pulse-railway manages it")
    keep_secret(*env.values(), *build_args.values())
    given_id = flags.get("deployment_id")
    name = flags.get("deployment_name") or plugin.deployment_name
    try:
        chosen = (
            naming.deployment_id(given_id)
            if given_id
            else naming.generate_deployment_id(name or contract.DEFAULT_DEPLOYMENT_NAME)
        )
        naming.backend_name(app.names.prefix, chosen)
    except ValueError as error:
        raise Failure(str(error)) from None
    cli.need("railway")
    if repository:
        cli.need("docker")
    replicas = config.number(flags, "backend_replicas", 1)
    if replicas > 1:
        output.warn("with several replicas a tab can reach one that does not know it: use 1")
    if app.internal_address is None or "127.0.0.1" not in app.internal_address:
        output.warn(
            "the app renders its pages through its public address, so a page of one deployment"
            " can be rendered by another: pass internal_server_address=internal_server_address()"
            " to ps.App (from pulse_railway)"
        )
    return Plan(
        app=app,
        deployment_id=chosen,
        generated=not given_id,
        dockerfile=dockerfile,
        web_root=web_root,
        image_repository=repository,
        build_args=build_args,
        env=env,
        replicas=replicas,
        server_address=flags.get("server_address") or app.server_address,
        start_command=shell(plugin.start_command or contract.START_COMMAND),
        no_gitignore=bool(flags.get("no_gitignore")),
        promote=not flags.get("no_promote"),
        keep_failed=bool(flags.get("keep_failed")),
    )


def inside(context: Path, path: str | Path, what: str) -> Path:
    """`path` relative to the context. Raises Failure where it is outside of it."""
    full = (context / path).resolve()
    try:
        return full.relative_to(context.resolve())
    except ValueError:
        raise Failure(
            f"{what} {full} is outside the deploy context {context}: pass --context "
            "with a folder that holds it"
        ) from None


def free_name(plan: Plan, stack: Stack) -> Plan:
    """A plan whose service name is free. Generated ids step on a second; given ones are refused."""
    moment = datetime.now(UTC)
    while plan.service_name in stack.services or stack.backend(plan.deployment_id):
        if not plan.generated:
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
        contract.INTERNAL_TOKEN: f"${{{{{names.router}.{contract.INTERNAL_TOKEN}}}}}",
        contract.APP_FILE: plan.app.file,
        contract.SERVER_ADDRESS: plan.server_address or stack.address,
        contract.PORT: str(contract.DEFAULT_PORT),
    }
    if plan.app.uses_session_store:
        managed[contract.SESSION_REDIS_URL] = f"${{{{{names.router}.{contract.REDIS_URL}}}}}"
    build = {**plan.build_args}
    if not plan.image:
        build.setdefault(contract.WEB_ROOT, plan.web_root.as_posix())
        if plan.dockerfile.as_posix() != "Dockerfile":
            build[contract.DOCKERFILE_PATH] = plan.dockerfile.as_posix()
    return {**build, **references, **plan.env, **managed}


BACKEND_SETTINGS: dict[str, Any] = {
    "healthcheckPath": contract.HEALTH_PATH,
    "healthcheckTimeout": 300,
    "overlapSeconds": 30,
    "drainingSeconds": 10,
}


# -- deploying ---------------------------------------------------------------------------------


def deploy(api: Api, target: Target, plan: Plan, output: Output) -> dict[str, Any]:
    """Bring a new deployment up and make it the active one.

    Raises Failure where a step fails, saying which; before the promotion the service and the
    record that this run made are removed (unless `plan.keep_failed`).
    """
    progress = Progress()
    began = time.monotonic()
    with interruptible():
        try:
            with step(output, progress, "inspect the baseline"):
                stack = inspect(api, target, plan.app.names)
                require_baseline(stack)
                plan = free_name(plan, stack)
            output.say(f"deployment {plan.deployment_id}")
            if plan.image:
                with step(output, progress, f"build and push {plan.image}"):
                    build_image(plan, stack, output)
            with step(output, progress, f"create the service {plan.service_name}"):
                create_backend(api, stack, plan, progress)
            with step(output, progress, "build and start"):
                start_backend(api, stack, plan, progress, output)
            with step(output, progress, "register with the router"):
                register(api, stack, plan, progress)
            with step(output, progress, "reach it through the router"):
                wait_until_routed(stack.address, plan.deployment_id, by_affinity=True)
            if plan.promote:
                with step(output, progress, "promote it"):
                    promote_new(api, stack, plan, progress)
                with step(output, progress, "reach it without affinity"):
                    wait_until_active(api, stack, plan.deployment_id)
        except (Failure, Interrupted, httpx.HTTPError, OSError) as error:
            explain(api, target, plan, progress, output, error)
            raise
    return {
        "deployment_id": plan.deployment_id,
        "service_id": progress.service_id,
        "service_name": plan.service_name,
        "railway_deployment_id": progress.railway_deployment,
        "image": plan.image,
        "active": progress.promoted,
        "address": stack.address,
        "server_address": plan.server_address or stack.address,
        "seconds": round(time.monotonic() - began, 1),
        # 0.3.x's names for the same
        "backend_service_id": progress.service_id,
        "backend_service_name": plan.service_name,
        "backend_image": plan.image,
        "backend_deployment_id": progress.railway_deployment,
        "backend_status": "SUCCESS",
    }


@contextlib.contextmanager
def step(output: Output, progress: Progress, title: str) -> Iterator[None]:
    progress.step = title
    with output.step(title):
        yield


def build_image(plan: Plan, stack: Stack, output: Output) -> None:
    assert plan.image
    arguments = {
        contract.APP_FILE: plan.app.file,
        contract.WEB_ROOT: plan.web_root.as_posix(),
        contract.SERVER_ADDRESS: plan.server_address or stack.address,
        **plan.build_args,
    }
    cli.docker_build(
        image=plan.image,
        dockerfile=plan.app.context / plan.dockerfile,
        context=plan.app.context,
        build_args=arguments,
        on_line=output.log,
    )


def create_backend(api: Api, stack: Stack, plan: Plan, progress: Progress) -> None:
    assert stack.router is not None
    progress.creating = True
    with shielded():
        create_service(
            api,
            stack.target,
            plan.service_name,
            backend_variables(plan, stack),
            group_id=stack.router.group_id,
            settings={
                **BACKEND_SETTINGS,
                "numReplicas": plan.replicas,
                "startCommand": plan.start_command,
            },
            image=plan.image,
            created=lambda service_id: setattr(progress, "service_id", service_id),
        )


def start_backend(api: Api, stack: Stack, plan: Plan, progress: Progress, output: Output) -> None:
    """Source mode: upload and build on Railway. Image mode: deploy the image that was pushed."""
    assert progress.service_id
    target = stack.target
    deployment: str | None
    if plan.image:
        deployment = deploy_service(api, target, progress.service_id)
    else:
        output.waiting(f"uploading {plan.app.context}")
        deployment = cli.up(
            api,
            project=target.project_id,
            environment=target.environment_id,
            service=plan.service_name,
            context=plan.app.context,
            no_gitignore=plan.no_gitignore,
        )
    if deployment is None:  # a CLI that does not say

        def ask() -> str | None:
            found = latest(api, target).get(str(progress.service_id))
            return found["id"] if found else None

        deployment = poll(60.0, ask, "Railway's answer to the upload")
    progress.railway_deployment = deployment
    wait_for_build(api, str(deployment), output)


def backend_address(api: Api, target: Target, service_id: str) -> str:
    """Where a backend is on the private network: its domain and port, as Railway resolves them."""
    rendered = api.call(
        documents.RENDERED,
        project=target.project_id,
        environment=target.environment_id,
        service=service_id,
    )["variablesForServiceDeployment"]
    keep_secret(rendered.get(contract.INTERNAL_TOKEN), rendered.get(contract.SESSION_REDIS_URL))
    domain = rendered.get("RAILWAY_PRIVATE_DOMAIN")
    if not domain:
        raise Failure("the service has no private domain: is private networking off?")
    return f"http://{domain}:{rendered.get(contract.PORT) or contract.DEFAULT_PORT}"


def register(api: Api, stack: Stack, plan: Plan, progress: Progress) -> None:
    assert progress.service_id
    address = backend_address(api, stack.target, progress.service_id)
    progress.registered = True  # it may have been, from here on
    control(
        api,
        stack,
        "register",
        "--deployment-id",
        plan.deployment_id,
        "--service-name",
        plan.service_name,
        "--address",
        address,
        *([] if plan.promote else ["--hold"]),
    )


def promote_new(api: Api, stack: Stack, plan: Plan, progress: Progress) -> None:
    """Promote, and where the answer is lost find out whether it happened."""
    try:
        promote_record(api, stack, plan.deployment_id, plan.service_name)
    except Uncertain:
        if active_deployment(api, stack) != plan.deployment_id:
            raise
    except Interrupted:
        progress.promoted = _is_active(api, stack, plan.deployment_id)
        raise
    progress.promoted = True


def _is_active(api: Api, stack: Stack, deployment_id: str) -> bool:
    """Where it cannot be found out, yes: then nothing is removed."""
    try:
        return active_deployment(api, stack) == deployment_id
    except Failure:
        return True


def promote_record(api: Api, stack: Stack, deployment_id: str, service_name: str) -> None:
    control(
        api,
        stack,
        "promote",
        "--active-deployment-id",
        deployment_id,
        "--active-service-name",
        service_name,
    )


def wait_until_routed(
    address: str, deployment_id: str, *, by_affinity: bool, timeout: float = ROUTED_TIMEOUT
) -> None:
    """Ask `/_pulse/meta` through the public address until this deployment answers."""
    query = {contract.AFFINITY_QUERY: deployment_id} if by_affinity else {}
    last = "no answer"

    def ask() -> bool | None:
        nonlocal last
        try:
            answer = client.get(f"{address}{contract.META_PATH}", params=query)
            last = f"status {answer.status_code}"
            named = answer.json().get("deployment_id") if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            last = type(error).__name__
            return None
        if named is not None:
            last = f"deployment {named}"
        return True if named == deployment_id else None

    with httpx.Client(timeout=10) as client:
        try:
            poll(timeout, ask, "reaching the deployment through the router")
        except Failure as failure:
            raise Failure(f"{failure}; {address}{contract.META_PATH} gave {last}") from None


def wait_until_active(api: Api, stack: Stack, deployment_id: str) -> None:
    """Wait until the public address answers from this deployment.

    Raises Failure where another run has promoted another deployment meanwhile.
    """
    try:
        wait_until_routed(stack.address, deployment_id, by_affinity=False, timeout=4.0)
    except Failure:
        active = active_deployment(api, stack)
        if active != deployment_id:
            raise Failure(
                f"{active} was promoted after {deployment_id}, which drains now: another deploy"
                " ran at the same time"
            ) from None
        wait_until_routed(stack.address, deployment_id, by_affinity=False)


def explain(
    api: Api,
    target: Target,
    plan: Plan,
    progress: Progress,
    output: Output,
    error: BaseException,
) -> None:
    """Say where it ended, and remove what the run made, if it was not promoted yet."""
    what = "interrupted" if isinstance(error, Interrupted) else "failed"
    output.say(f"{what} at: {progress.step}")
    if not (progress.creating or progress.registered):
        return
    if progress.promoted:
        output.say(
            f"{plan.deployment_id} was promoted and stays; `pulse-railway status` shows what is"
            " active, `pulse-railway rollback` goes back"
        )
        return
    if isinstance(error, Uncertain) and progress.step == "promote it":
        output.say(
            f"it is not known whether {plan.deployment_id} was promoted, so nothing is removed:"
            " `pulse-railway status` tells; then promote it or delete it"
        )
        return
    if plan.keep_failed:
        output.say(
            "kept as asked, for an hour; then the janitor removes it. Sooner: `pulse-railway delete"
            f" --deployment-id {plan.deployment_id}`"
        )
        return
    try:
        with output.step(f"remove {plan.service_name}"):
            undo(api, target, plan, progress)
    except Failure as failure:
        output.say(
            f"could not remove {plan.service_name}: {failure}. Run `pulse-railway delete"
            f" --deployment-id {plan.deployment_id}`; the janitor removes it after an hour"
        )


def undo(api: Api, target: Target, plan: Plan, progress: Progress) -> None:
    service_id = progress.service_id or created_after_all(api, target, plan)
    if service_id:
        delete_service(api, target, service_id)
    if progress.registered:
        stack = Stack(target, plan.app.names, {})
        control(api, stack, "delete", "--deployment-id", plan.deployment_id)


def created_after_all(api: Api, target: Target, plan: Plan) -> str | None:
    """The service whose creation had no answer: Railway may be at it still, so look repeatedly."""
    for pause in LATE_PAUSES:
        time.sleep(pause)
        if found := inspect(api, target, plan.app.names).services.get(plan.service_name):
            return found.id
    return None


# -- the other verbs ---------------------------------------------------------------------------


def find_backend(stack: Stack, deployment_id: str) -> Service:
    """The service of a deployment. Raises Failure that says which deployments there are."""
    found = stack.backend(deployment_id)
    if found is None:
        there = joined(str(s.deployment_id) for s in stack.backends) or "none"
        raise Failure(f"there is no deployment {deployment_id}; there are: {there}")
    return found


def by_name(stack: Stack, name: str) -> str:
    """The one deployment id that `name` means: itself, or the id generated from that name."""
    ids = [str(s.deployment_id) for s in stack.backends]
    wanted = name.strip().lower()
    if wanted in ids:
        return wanted
    prefix = naming.deployment_slug(wanted) + "-"
    matches = [i for i in ids if i.startswith(prefix)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise Failure(f"no deployment is named {name}; there are: {joined(ids) or 'none'}")
    raise Failure(
        f"several deployments are named {name}: {joined(matches)}. Pass one of them to"
        " `pulse-railway delete --deployment-id`"
    )


def redeploy(api: Api, stack: Stack, deployment_id: str | None, output: Output) -> dict[str, Any]:
    """Build and start a deployment's service anew, by default the active one's."""
    if deployment_id is None:
        with output.step("ask the router which deployment is active"):
            deployment_id = active_deployment(api, stack)
        if deployment_id is None:
            raise Failure("no deployment is active: run `pulse-railway deploy`")
    service = find_backend(stack, deployment_id)
    with output.step(f"redeploy {service.name}"):
        railway_deployment = deploy_service(api, stack.target, service.id)
        wait_for_build(api, railway_deployment, output)
    with output.step("reach it through the router"):
        wait_until_routed(stack.address, deployment_id, by_affinity=True)
    return {
        "deployment_id": deployment_id,
        "backend_service_id": service.id,
        "backend_service_name": service.name,
        "backend_deployment_id": railway_deployment,
        "backend_status": "SUCCESS",
    }


def promote(api: Api, stack: Stack, deployment_id: str, output: Output) -> dict[str, Any]:
    """Make a running deployment the active one."""
    service = find_backend(stack, deployment_id)
    with output.step(f"reach {deployment_id} through the router"):
        wait_until_routed(stack.address, deployment_id, by_affinity=True, timeout=20.0)
    with output.step(f"promote {deployment_id}"):
        promote_record(api, stack, deployment_id, service.name)
    with output.step("reach it without affinity"):
        wait_until_active(api, stack, deployment_id)
    return {"deployment_id": deployment_id, "active": True, "address": stack.address}


def rollback(api: Api, stack: Stack, output: Output) -> dict[str, Any]:
    """Promote the deployment that was active before, while it still runs."""
    with output.step("ask the router which deployment was active before"):
        state = control(api, stack, "status")
    previous = [
        record
        for record in state["deployments"]
        if record.get("state") == "draining"
        and not record.get("retiring_at")
        and stack.backend(record["deployment_id"])
    ]
    if not previous:
        raise Failure("no earlier deployment runs any more: deploy the earlier version again")
    previous.sort(key=lambda r: float(r.get("drain_started_at") or 0), reverse=True)
    return promote(api, stack, previous[0]["deployment_id"], output)


def delete(api: Api, stack: Stack, deployment_id: str, output: Output) -> dict[str, Any]:
    """Remove a deployment that is not active: claim it, delete its service, forget its record.

    Cut off anywhere, it can be run again; the janitor finishes it too.
    """
    service = stack.backend(deployment_id)
    with output.step(f"claim {deployment_id}"):
        active = active_deployment(api, stack)
        if active == deployment_id:
            raise Failure(f"{deployment_id} is active: deploy or promote another one first")
        if service is None and not any(
            r["deployment_id"] == deployment_id
            for r in control(api, stack, "status")["deployments"]
        ):
            find_backend(stack, deployment_id)  # says which there are
        control(api, stack, "retire", "--deployment-id", deployment_id)
    if service:
        with output.step(f"delete the service {service.name}"):
            delete_service(api, stack.target, service.id)
    with output.step("forget it"):
        control(api, stack, "delete", "--deployment-id", deployment_id)
    return {"deployment_id": deployment_id, "deleted": True}


def status(api: Api, stack: Stack) -> dict[str, Any]:
    """The baseline, and each deployment with its state, age and sessions."""
    problem = None
    try:
        state = control(api, stack, "status")
    except Failure as failure:
        state, problem = {"active": None, "deployments": [], "routers": []}, str(failure)
    known = {r["deployment_id"]: r for r in state["deployments"]}
    ids = {str(s.deployment_id): s for s in stack.backends}
    rows = []
    for name in sorted(
        {*known, *ids}, key=lambda n: ids[n].created_at if n in ids else "", reverse=True
    ):
        record, service = known.get(name, {}), ids.get(name)
        rows.append(
            {
                "deployment_id": name,
                "state": record.get("state") or "unregistered",
                "service": service.name if service else None,
                "railway": service.status if service else "GONE",
                "age_seconds": round(service.age) if service else None,
                "drain_started_at": record.get("drain_started_at"),
                "sessions": record.get("sessions"),
            }
        )
    return {
        "address": f"https://{stack.router.domains[0]}"
        if stack.router and stack.router.domains
        else None,
        "active": state["active"],
        "baseline": [
            {
                "service": s.name,
                "railway": s.status,
                "version": s.variables.get(contract.RUNTIME_VERSION),
            }
            for s in stack.baseline
        ],
        "missing": stack.missing,
        "deployments": rows,
        "routers": state["routers"],
        "problem": problem,
    }


def restore(api: Api, stack: Stack, active: str | None, output: Output) -> dict[str, Any]:
    """Rebuild lost routing state from Railway's services; the newest becomes active unless said."""
    if not stack.backends:
        raise Failure("there are no deployments to restore: run `pulse-railway deploy`")
    chosen = active or str(stack.backends[0].deployment_id)
    find_backend(stack, chosen)
    with output.step("find the deployments' addresses"):
        records = [
            {
                "deployment_id": service.deployment_id,
                "service_name": service.name,
                "address": backend_address(api, stack.target, service.id),
                "registered_at": datetime.fromisoformat(service.created_at).timestamp(),
                "drain_started_at": None,
            }
            for service in stack.backends
        ]
    with output.step("restore the routing state"):
        control(
            api,
            stack,
            "restore",
            "--active-deployment-id",
            chosen,
            "--records-json",
            json.dumps(records, separators=(",", ":")),
        )
    with output.step("reach the active deployment"):
        wait_until_routed(stack.address, chosen, by_affinity=False)
    return {"active": chosen, "restored": [r["deployment_id"] for r in records]}


def logs(
    api: Api,
    stack: Stack,
    service: Service,
    output: Output,
    *,
    build: bool,
    limit: int,
    follow: bool,
) -> dict[str, Any]:
    """The log of a service's latest deployment; with `follow`, until it is interrupted."""
    found = latest(api, stack.target).get(service.id)
    if found is None:
        raise Failure(f"{service.name} has no deployment yet")
    document = documents.BUILD_LOGS if build else documents.RUNTIME_LOGS
    key = "buildLogs" if build else "deploymentLogs"
    lines: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    since: str | None = None
    while True:
        data = api.call(document, deployment=found["id"], since=since, limit=limit)
        for line in data[key]:
            mark = (line["timestamp"], line["message"])
            if mark not in seen:
                seen.add(mark)
                since = line["timestamp"]
                lines.append(line)
                if not output.as_json:
                    print(line["message"], flush=True)
        if not follow:
            return {"service": service.name, "deployment": found["id"], "lines": lines}
        time.sleep(2.0)
