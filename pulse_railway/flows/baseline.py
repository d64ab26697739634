"""`scaffold` and `ensure`: the stable services, router, env, Redis and janitor.

The desired state is data (`desired`), the present one is read (`stack.inspect`), and the
difference (`plan`) is both what `ensure --plan` prints and what `ensure` carries out.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulse_railway import app_identity, contract, runtime_image
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.options import BaselineOptions
from pulse_railway.output import Output
from pulse_railway.railway import config_files, documents, program
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.railway.up import up
from pulse_railway.services import (
    Change,
    create_domain,
    create_service,
    delete_service,
    deploy_service,
    left_empty,
    variable_input,
    write,
)
from pulse_railway.stack import (
    Service,
    Stack,
    can_be_made,
    check_redis_prefix,
    goes_with,
    inspect,
    joined,
    lost_with_env,
    of_router,
    own_stack,
    partial,
    read_services,
    read_variables,
    require_believable,
)
from pulse_railway.waiting import FAILED_STATES, poll, wait_for_services

# On a service whose creation has not ended: a run that was cut off is taken up by the next.
UNFINISHED = "PULSE_RAILWAY_SETUP"
LOGIN_IS_NOT_DURABLE = (
    "a Railway CLI login is not written into the router and the janitor, since it expires: set"
    " RAILWAY_TOKEN (project token) or RAILWAY_API_TOKEN and run this again"
)


def scaffold(api: Api, target: Target, wanted: BaselineOptions, output: Output) -> Stack:
    """Create the baseline in an environment that has none of it.

    Raises Failure where any of it exists.
    """
    tell_of_danger(wanted, output)
    with output.step("inspect the project"):
        stack = inspect(api, target, wanted.names)
    if stack.baseline and not unfinished(stack):
        exists = f"a baseline exists already: {joined(s.name for s in stack.baseline)}. `scaffold`"
        if stack.missing:
            raise Failure(f"{exists} only creates a fresh one; {partial(stack)}")
        if len(of_router(stack)) < len(stack.baseline):  # nothing says whose the rest is
            raise Failure(f"{exists} only creates a fresh one: use `pulse-railway ensure`")
        raise Failure(
            f"{exists} only creates a fresh one: use `pulse-railway ensure`, or delete those"
            " services first" + goes_with(stack)
        )
    tell_of_orphans(stack, output)
    return create(api, stack, wanted, output)


def tell_of_danger(wanted: BaselineOptions, output: Output) -> None:
    if wanted.app and (danger := config_files.would_delete(wanted.app.context)):
        output.warn(danger)


def tell_of_orphans(stack: Stack, output: Output) -> None:
    """Deployments outlive the baseline that they ran under, and a new one knows nothing of them."""
    if stack.backends and not stack.baseline:
        output.warn(
            f"{joined(str(s.deployment_id) for s in stack.backends)} ran under a baseline that is"
            f" gone, with its sessions and what {stack.names.env} held: set those variables again,"
            " then `pulse-railway restore --deployment-id ...` routes to them, or deploy anew"
        )


def ensure(
    api: Api, target: Target, wanted: BaselineOptions, output: Output
) -> tuple[Stack, list[str]]:
    """Create the baseline in an empty environment, or reconcile a complete one.

    An env service or a janitor that was deleted is made anew, where the rest says whose it is.
    Returns the stack and what was (or, with `wanted.plan_only`, would be) done; nothing on the
    second run. Raises Failure for another partial baseline, or one with another Redis than
    `--redis-url`.
    """
    tell_of_danger(wanted, output)
    with output.step("inspect the project"):
        stack = inspect(api, target, wanted.names)
    if not stack.baseline or unfinished(stack):
        tell_of_orphans(stack, output)
        if wanted.plan_only:
            return stack, ["create router, env, janitor" + ("" if wanted.redis_url else ", Redis")]
        return create(api, stack, wanted, output), ["created the baseline"]
    require_believable(stack)
    if stack.missing and not (wanted.repair and can_be_made(stack)):
        raise Failure(partial(stack))
    check_redis_mode(stack, wanted)
    check_redis_prefix(stack, wanted.redis_prefix)
    if wanted.app:
        app = app_identity.of_app(wanted.app)
        app_identity.check_same_app(stack, app, wanted.replace_app, output)
    assert stack.router is not None
    if stack.copied_from:
        tell_of_copy(stack, output)
        token = own_project_token(api, stack, wanted.plan_only, output)
        shared = secrets.token_urlsafe(32)
        keep_secret(token, shared)
    else:
        token = runtime_token(api, stack, wanted.plan_only, output)
        shared = internal_token(stack)
    made = bool(stack.copied_from) and not api.scope()
    missing = make_missing(api, stack, wanted.plan_only, output)
    changes = plan(stack, wanted, token, shared, made)
    lines = [f"{name}: create" for name in missing]
    lines += [line for change in changes for line in change.lines()]
    if not wanted.plan_only:
        if any(change.deploy for change in changes) and not wanted.runtime_image:
            program.need("railway")
        apply(api, stack, changes, wanted, output)
    return stack, lines


def make_missing(api: Api, stack: Stack, plan_only: bool, output: Output) -> list[str]:
    """Create the env service and the janitor where they are missing; returns their names. Each
    carries from its first moment what it is known by: a run that is cut off is taken up by the
    next, which writes the rest."""
    missing = stack.missing
    if not missing:
        return []
    assert stack.router is not None
    check_names(stack, set(missing))
    if lost := lost_with_env(stack):
        output.warn(lost)
    for name in missing:
        known_by = {contract.STACK: str(stack.stamp)}
        if name == stack.names.janitor:
            known_by |= {
                contract.ROUTER_SERVICE: stack.names.router,
                contract.JANITOR_SERVICE: name,
            }
        group, service_id = stack.router.group_id, ""
        if not plan_only:
            with output.step(f"create {name}"):
                service_id = create_service(api, stack.target, name, known_by, group_id=group)
        made = Service(service_id, "", name, "", None, {}, [], group, None, known_by)
        stack.services[name] = made
    return missing


def unfinished(stack: Stack) -> bool:
    """Is what there is of a baseline what a run of ours left when it was cut off?"""
    return any(UNFINISHED in s.variables for s in stack.baseline)


def check_redis_mode(stack: Stack, wanted: BaselineOptions) -> None:
    assert stack.router is not None
    present = stack.router.variables.get(contract.REDIS_URL)
    if wanted.redis_url and (stack.redis or wanted.redis_url != present):
        raise Failure(
            "this stack uses another Redis, and its sessions and state would be lost: delete the"
            " baseline and run `pulse-railway scaffold --redis-url ...`, or leave --redis-url out"
            + goes_with(stack)
        )


def tell_of_copy(stack: Stack, output: Output) -> None:
    output.warn(
        f"this environment is a copy of {stack.copied_from}: its stack gets tokens of its own,"
        " and knows nothing of what was promoted there"
    )
    if not stack.redis:
        output.warn(
            "its Redis may be the original's: keys of the routing state and sessions of deployments"
            f" get {stack.target.environment_id} into their prefix, and end by themselves when it"
            " is gone"
        )
    if copied := joined(str(s.deployment_id) for s in stack.backends):
        output.warn(
            f"the deployments that were copied ({copied}) stay as they are, and nothing routes to"
            " them: deploy here, then remove each from this environment with `pulse-railway delete"
            " --deployment-id ...`"
        )


def own_project_token(api: Api, stack: Stack, plan_only: bool, output: Output) -> str:
    """The token of a copy's router and janitor: never the one that came with the copy."""
    target = stack.target
    if api.scope():
        return api.token.value
    if plan_only:
        return "made by ensure"
    name = f"pulse-railway {stack.names.router}"
    delete_unused_tokens(api, target, name, output)
    made = api.call(
        documents.PROJECT_TOKEN_CREATE,
        input={
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "name": name,
        },
    )
    return str(made["projectTokenCreate"])


def delete_unused_tokens(api: Api, target: Target, name: str, output: Output) -> None:
    """Delete the project tokens of this name and environment. None is in use while the router
    has none that opens it: a run has made them that was cut off before it wrote its token."""
    try:
        found = api.call(documents.PROJECT_TOKENS, project=target.project_id)["projectTokens"]
        for token in (edge["node"] for edge in found["edges"]):
            if (token["name"], token["environmentId"]) == (name, target.environment_id):
                api.call(documents.PROJECT_TOKEN_DELETE, id=token["id"])
    except GraphqlError as error:
        output.warn(
            f"Railway does not show or delete this project's tokens ({error}): if an `ensure` was"
            f" cut off here, older ones named {name} are not needed"
        )


def wanted_redis_prefix(stack: Stack, wanted: BaselineOptions) -> str:
    """What the routing state's keys are to begin with. In a copy that shares its Redis with the
    original, they are kept apart by the environment's id."""
    if stack.copied_from and not stack.redis:
        return f"{stack.redis_prefix}:{stack.target.environment_id}"
    stored = stack.router.variables.get(contract.REDIS_PREFIX) if stack.router else None
    return stored or wanted.redis_prefix or contract.DEFAULT_REDIS_PREFIX


# Where what was promoted last and what is to be carried out stand: not a copy's.
ORIGINALS = (
    contract.LAST_PROMOTED,
    contract.LAST_PROMOTED_AT,
    contract.MAINTENANCE,
    contract.MAINTENANCE_OFF,
    contract.CONTROL,
    contract.CONTROL_ANSWER,
    contract.OWNS_STATE,
)


def runtime_token(api: Api, stack: Stack, plan_only: bool, output: Output) -> str:
    """The token that router and janitor get; one that was made for them is made anew where it opens
    this environment no more. Raises Failure for a login where they have none."""
    of_router = stack.router.variables if stack.router else {}
    present = of_router.get(contract.RAILWAY_TOKEN)
    if present and of_router.get(contract.TOKEN_MADE) and not api.scope():
        if api.environment_of(present) == stack.target.environment_id:
            return present
        return own_project_token(api, stack, plan_only, output)
    if api.token.durable:
        return api.token.value
    if not present:
        raise Failure(LOGIN_IS_NOT_DURABLE)
    return present


def internal_token(stack: Stack) -> str:
    """The secret that router, janitor and backends share. Backends hold it, so it stays: a new one
    would be known to none of them.

    Raises Failure where there are backends and nobody shows it.
    """
    present = known_internal_token(stack)
    if present is None and stack.backends:
        raise Failure(
            f"{stack.names.router} has no {contract.INTERNAL_TOKEN}, and the deployments hold the"
            " one that it had: read it in a deployment's variables on Railway, set it on"
            f" {stack.names.router}, and run this again"
        )
    token = present or secrets.token_urlsafe(32)
    keep_secret(token)
    return token


def known_internal_token(stack: Stack) -> str | None:
    """The secret as any service shows it: backends of 0.3.x hold it literally."""
    holders = (stack.router, stack.janitor, *stack.backends)
    values = (service.variables.get(contract.INTERNAL_TOKEN) for service in holders if service)
    return next((value for value in values if value and "${{" not in value), None)


# What router and janitor cannot work without, whoever has changed it.
ROUTER_SETTINGS: dict[str, Any] = {
    "healthcheckPath": contract.ROUTER_HEALTH_PATH,
    "startCommand": "python -m router",
    "restartPolicyType": "ALWAYS",
}
JANITOR_SETTINGS: dict[str, Any] = {
    "numReplicas": 1,
    "startCommand": "python -m janitor",
    "restartPolicyType": "NEVER",
}


@dataclass(frozen=True)
class Desired:
    """How one service should be."""

    name: str
    variables: dict[str, str]
    settings: dict[str, Any]


def desired(
    stack: Stack,
    wanted: BaselineOptions,
    runtime_token: str,
    internal_token: str,
    token_made: bool = False,
) -> list[Desired]:
    """The router and the janitor as they should be; env and Redis are the user's to configure."""
    names = stack.names
    if wanted.redis_url:
        redis_url = wanted.redis_url
    elif stack.redis:
        redis_url = f"${{{{{names.redis}.REDIS_URL}}}}"  # the password stays on Railway
    else:
        assert stack.router is not None
        redis_url = stack.router.variables[contract.REDIS_URL]
    shared = {
        contract.RAILWAY_TOKEN: runtime_token,
        contract.INTERNAL_TOKEN: internal_token,
        contract.REDIS_URL: redis_url,
        contract.REDIS_PREFIX: wanted_redis_prefix(stack, wanted),
        contract.DRAIN_TTL: str(wanted.drain_ttl),
        contract.RUNTIME_VERSION: wanted.runtime_image or runtime_image.runtime_version(),
    }
    if shared[contract.REDIS_PREFIX].endswith(f":{stack.target.environment_id}"):  # a copy's own
        shared[contract.KEY_TTL] = str(max(wanted.drain_ttl, contract.MIN_KEY_TTL_SECONDS))
    if names.prefix:
        shared[contract.SERVICE_PREFIX] = names.prefix
    if not wanted.runtime_image:
        shared[contract.DOCKERFILE_PATH] = "Dockerfile.router"
    made = {contract.TOKEN_MADE: "1"} if token_made else {}
    router = Desired(
        names.router,
        {**shared, **made, contract.PORT: str(contract.DEFAULT_PORT)},
        {
            **ROUTER_SETTINGS,
            "numReplicas": wanted.router_replicas,
            "healthcheckTimeout": 120,
            "overlapSeconds": 30,
            "drainingSeconds": 30,
        },
    )
    janitor_variables = {
        **shared,
        contract.ROLLBACK_WINDOW: str(wanted.rollback_window),
        contract.KEEP: str(wanted.keep),
        contract.ROUTER_SERVICE: names.router,
        contract.JANITOR_SERVICE: names.janitor,
    }
    if wanted.notify:
        janitor_variables[contract.NOTIFY_URL] = wanted.notify
    if not wanted.redis_url and stack.redis:
        janitor_variables[contract.REDIS_SERVICE] = names.redis
    janitor = Desired(
        names.janitor,
        janitor_variables,
        {**JANITOR_SETTINGS, "cronSchedule": wanted.cron},
    )
    return [router, janitor]


def plan(
    stack: Stack,
    wanted: BaselineOptions,
    runtime_token: str,
    internal_token: str,
    token_made: bool = False,
) -> list[Change]:
    """The difference between the present and the desired state. Empty: nothing to do."""
    router = stack.router
    assert router is not None
    own = [*stack.baseline, *([] if stack.copied_from else stack.backends)]
    changes = {s.name: Change(s) for s in own}
    for goal in desired(stack, wanted, runtime_token, internal_token, token_made):
        service, change = stack.services[goal.name], changes[goal.name]
        change.variables = {
            k: v for k, v in goal.variables.items() if service.variables.get(k) != v
        }
        if stack.copied_from:
            change.variables |= {name: "" for name in ORIGINALS if service.variables.get(name)}
        change.settings = {k: v for k, v in goal.settings.items() if service.settings.get(k) != v}
        if wanted.runtime_image and service.image != wanted.runtime_image:
            change.settings["source"] = {"image": wanted.runtime_image}
        elif not wanted.runtime_image and service.image:
            change.disconnect = True
        stopped = service.stopped and goal.name == stack.names.router  # a cron run's end is one
        waits = stopped or bool(service.variables.get(contract.UNDEPLOYED))
        change.deploy = bool(change) or service.status != "SUCCESS" or waits
        change.domain = goal.name == stack.names.router and not service.domains
    name = wanted.app.plugin.name if wanted.app else None
    if name and app_identity.stored_identity(stack).name != name:
        app = app_identity.AppIdentity(name)
        app = app_identity.merge_stored(stack, app, wanted.replace_app)
        changes[stack.names.router].variables[contract.APP] = app_identity.to_json(app)
    for change in changes.values():  # none of these deploys anything
        if router.group_id and change.service.group_id != router.group_id:
            change.group_id = router.group_id
        if change.service.variables.get(contract.STACK) != stack.stamp:
            change.variables[contract.STACK] = str(stack.stamp)
    if wanted.owns_state and router.variables.get(contract.OWNS_STATE) != "1":
        changes[router.name].variables[contract.OWNS_STATE] = "1"
    return [change for change in changes.values() if change]


def apply(
    api: Api,
    stack: Stack,
    changes: list[Change],
    wanted: BaselineOptions,
    output: Output,
    started: dict[str, str | None] | None = None,
) -> None:
    """Carry a plan out. Killed anywhere, the next run's plan holds what is left: what is written
    and not deployed yet is marked, and the version variable is written last.

    Args:
        started: services that are starting already, by id, with the deployment to wait for.
    """
    target = stack.target
    waiting = dict(started or {})
    for change in changes:
        if change.deploy and not change.service.variables.get(contract.UNDEPLOYED):
            change.variables[contract.UNDEPLOYED] = "1"
    if changes:
        with output.step("write variables and settings"):
            write(api, target, changes)
            for change in changes:
                if change.domain:
                    change.service.domains = [create_domain(api, target, change.service.id)]
    for change in changes:
        if change.deploy:
            service = change.service
            waiting[service.id] = start_runtime(api, target, service, wanted, output)
    if waiting:
        names = {s.id: s.name for s in stack.services.values() if s.id in waiting}
        with output.step(f"wait for {joined(names.values())}"):
            wait_for_services(api, target, names, waiting, output)
    finish(api, stack, changes, wanted)


def finish(api: Api, stack: Stack, changes: list[Change], wanted: BaselineOptions) -> None:
    """Note the version that runs now, and that all is deployed; take the mark of an unfinished
    creation off."""
    target = stack.target
    version = {contract.RUNTIME_VERSION: wanted.runtime_image or runtime_image.runtime_version()}
    deployed = [change for change in changes if change.deploy]
    marked = [s for s in stack.baseline if UNFINISHED in s.variables]
    inputs = {}
    for i, change in enumerate(deployed):
        values = {contract.UNDEPLOYED: ""}
        if contract.RUNTIME_VERSION in change.variables:
            values |= version
        inputs[f"v{i}"] = variable_input(target, change.service.id, values)
    for i, service in enumerate(marked):
        inputs[f"x{i}"] = {
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "serviceId": service.id,
            "name": UNFINISHED,
        }
    if inputs:
        document = documents.configure(variables=len(deployed), deletions=len(marked))
        api.call(document, repeatable=True, **inputs)


def start_runtime(
    api: Api, target: Target, service: Service, wanted: BaselineOptions, output: Output
) -> str | None:
    """Deploy the runtime on a service: the published image, or our sources uploaded.

    Returns the deployment's id, where it is known.
    """
    if wanted.runtime_image:
        with output.step(f"deploy {wanted.runtime_image} on {service.name}"):
            return deploy_service(api, target, service.id)
    with (
        output.step(f"upload the runtime to {service.name}"),
        tempfile.TemporaryDirectory(prefix="pulse-railway-") as folder,
    ):
        for name in runtime_image.FILES:
            shutil.copy(runtime_image.sources() / name, folder)
        return up(
            api,
            project=target.project_id,
            environment=target.environment_id,
            service=service.name,
            context=Path(folder),
        )


def create(api: Api, stack: Stack, wanted: BaselineOptions, output: Output) -> Stack:
    """Template first: router, janitor and Redis land on the canvas as it lays them out."""
    target, names = stack.target, stack.names
    expected = [names.router, names.janitor] + ([] if wanted.redis_url else [names.redis])
    check_names(stack, {*expected, names.env})
    token = runtime_token(api, stack, False, output)
    if not wanted.runtime_image:
        program.need("railway")
    if not all(name in stack.services for name in expected):
        if not stack.baseline:  # else a cut-off run's template: the rest of its services come
            with output.step(f"deploy the template {contract.TEMPLATE_CODE}"):
                deploy_template(api, target, names, wanted)
        stack = _await_services(api, stack, expected, output)
    if names.env not in stack.services:
        with output.step(f"create {names.env}"):
            mark = {UNFINISHED: "1"}
            env_id = create_service(api, target, names.env, mark, group_id=None)
            env = Service(env_id, "", names.env, "", None, {}, [], None, None, mark)
            stack.services[names.env] = env
    if wanted.redis_url and stack.redis:
        with output.step(f"delete {names.redis}"):
            if not delete_service(api, target, stack.redis.id):
                output.warn(left_empty(names.redis, None))
            del stack.services[names.redis]
    starting: dict[str, str | None] = {}
    if stack.redis:  # the router is healthy once it has read its state
        failed = stack.redis.status in FAILED_STATES
        starting[stack.redis.id] = deploy_service(api, target, stack.redis.id) if failed else None
    shared = known_internal_token(stack) or secrets.token_urlsafe(32)  # beside orphans, too
    keep_secret(shared)
    changes = plan(stack, wanted, token, shared)
    apply(api, stack, changes, wanted, output, starting)
    return stack


def check_names(stack: Stack, needed: set[str]) -> None:
    """Raises Failure where another environment of the project has services of these names: Railway
    takes each name once, and would say so in the middle."""
    here = stack.services.keys() | {service.name for service in stack.others}
    elsewhere = needed & stack.taken - here
    if elsewhere and stack.router:  # which keeps its prefix
        raise Failure(
            f"{joined(elsewhere)}: other environments of this project have services of these names,"
            " and Railway takes each once. Name others, RailwayPlugin(env_service=...) and"
            " janitor_service, and run `pulse-railway ensure` again"
        )
    if elsewhere:
        raise Failure(
            f"{joined(elsewhere)}: other environments of this project have services of these names."
            " Duplicate one of them on Railway and run `pulse-railway ensure` there, or give this"
            " stack names of its own (--service-prefix)"
        )


def _await_services(api: Api, stack: Stack, expected: list[str], output: Output) -> Stack:
    def ask() -> Stack | None:
        found = read_services(api, stack.target, stack.names)
        return found if all(name in found.services for name in expected) else None

    with output.step(f"wait for {joined(expected)} to appear"):
        found: Stack = poll(180.0, ask, "the template")
        read_variables(api, found)
    return own_stack(found)


def deploy_template(api: Api, target: Target, names: Names, wanted: BaselineOptions) -> None:
    """Deploy the published template with our names, and without what this stack does not use."""
    template = api.public(documents.TEMPLATE, code=contract.TEMPLATE_CODE)["template"]
    serialized = template["serializedConfig"]
    ours = {
        contract.DEFAULT_ROUTER: names.router,
        contract.DEFAULT_JANITOR: names.janitor,
        contract.DEFAULT_REDIS: names.redis,
    }
    for key, service in list(serialized["services"].items()):
        published = service.get("name")
        if published == contract.DEFAULT_REDIS and wanted.redis_url:
            del serialized["services"][key]
            continue
        if published in ours:
            service["name"] = ours[published]
            mark = {"defaultValue": "1", "isOptional": True}
            service["variables"] = {**(service.get("variables") or {}), UNFINISHED: mark}
        if published in (contract.DEFAULT_ROUTER, contract.DEFAULT_JANITOR):
            # what runs on them is deployed once they are configured
            service["source"] = {"image": wanted.runtime_image} if wanted.runtime_image else {}
    api.call(
        documents.TEMPLATE_DEPLOY,
        input={
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "templateId": template["id"],
            "serializedConfig": serialized,
        },
    )
