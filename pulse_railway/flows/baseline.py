"""`scaffold` and `ensure`: create and update the stable services: router, env, Redis and janitor.

The desired state is data (`desired`), and `stack.inspect` reads the present one. `ensure --plan`
prints their difference (`plan`); `ensure` applies it.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulse_railway import app_identity, contract, runtime_image
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.flags import FLAGS
from pulse_railway.options import BaselineOptions, check_cron
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
    empty_service_message,
    variable_input,
    write,
    write_variables,
)
from pulse_railway.stack import (
    WRONG_ADDRESS,
    Service,
    Stack,
    address_without_secrets,
    can_create_missing,
    check_redis_prefix,
    find_stack,
    inspect,
    is_withdrawable,
    joined,
    lost_with_baseline,
    lost_with_missing,
    of_router,
    ownership,
    partial,
    read_environment,
    read_services,
    read_variables,
    references,
    require_complete_answer,
    require_router_of_names,
)
from pulse_railway.waiting import FAILED_STATES, poll, wait_for_services

LOGIN_IS_NOT_DURABLE = (
    "a Railway CLI login is not written into the janitor, since it expires: set"
    " RAILWAY_TOKEN (project token) or RAILWAY_API_TOKEN and run this again"
)
NO_PROJECT_TOKEN = (
    "the janitor's Railway token is no project token of this environment, so it may open more:"
    " create one (Railway, project settings, Tokens), and run `pulse-railway ensure` with it as"
    " RAILWAY_TOKEN"
)


def scaffold(api: Api, target: Target, options: BaselineOptions, output: Output) -> Stack:
    """Create the baseline, and return the stack. Raises Failure if a part of one exists."""
    warn_of_config_file(options, output)
    with output.step("inspect the project"):
        stack = inspect(api, target, options.names)
    require_complete_answer(stack)
    exists = f"a baseline exists already: {joined(s.name for s in stack.baseline)}. `scaffold`"
    if owner := other_owner(stack, options):
        raise Failure(
            f"{exists} only creates a fresh one, and this one is {owner}: leave it as it is."
            " Give this app's stack names of its own (`RailwayPlugin(router_service=...,"
            " env_service=..., redis_service=..., janitor_service=...)`) and run this again; if"
            " this is its stack, `pulse-railway ensure` updates it"
        )
    if stack.baseline and not unfinished(stack):
        if stack.missing:
            raise Failure(f"{exists} only creates a fresh one; {partial(stack)}")
        if len(of_router(stack)) < len(stack.baseline):  # the owner of the others is not known
            raise Failure(f"{exists} only creates a fresh one: use `pulse-railway ensure`")
        raise Failure(
            f"{exists} only creates a fresh one: use `pulse-railway ensure`, or delete those"
            " services first" + lost_with_baseline(stack)
        )
    require_named(stack)
    warn_of_orphans(stack, output)
    return create(api, stack, options, output)


def other_owner(stack: Stack, options: BaselineOptions) -> str:
    """Return whose stack this is if it may be another one than the app's; else ""."""
    app = app_identity.stored_identity(stack).name
    other_app = bool(app and options.app and options.app.plugin.name not in (None, app))
    if not (stack.guessed or other_app):
        return ""
    return f"that of {stack.names.router}" + (f", which serves the app {app!r}" if app else "")


def require_named(stack: Stack) -> None:
    """Raise Failure for a new stack beside another one if the app does not name its router.

    The existing stack may be meant.
    """
    if not (stack.names.asked or stack.names.prefix or unfinished(stack)):
        require_router_of_names(stack)


def warn_of_config_file(options: BaselineOptions, output: Output) -> None:
    if options.app and (danger := config_files.would_delete(options.app.context)):
        output.warn(danger)


def warn_of_orphans(stack: Stack, output: Output) -> None:
    """Warn of deployments whose baseline was deleted: a new baseline has no record of them."""
    if stack.backends and not stack.baseline:
        output.warn(
            f"{joined(str(s.deployment_id) for s in stack.backends)} ran under a baseline that is"
            f" gone, with its sessions and what {stack.names.env} held: set those variables again,"
            " then `pulse-railway restore --deployment-id ...` routes to them, or deploy again"
        )


def ensure(
    api: Api, target: Target, options: BaselineOptions, output: Output
) -> tuple[Stack, list[str]]:
    """Create the baseline in an empty environment, or update an existing one.

    With `options.repair`, deleted services are created again if the others show their owner; in a
    copied environment also without, since it has no state yet.
    Returns the stack and the changes, one a line, that were made (with `options.plan_only`: would
    be made); none on a second run. Raises Failure for any other partial baseline, or if the stack
    has another Redis than `--redis-url`.
    """
    warn_of_config_file(options, output)
    with output.step("inspect the project"):
        stack = inspect(api, target, options.names)
    if not options.plan_only:
        stack = withdraw_doubles(api, stack, output)
    require_complete_answer(stack)
    if not stack.baseline or unfinished(stack):
        require_named(stack)
        warn_of_orphans(stack, output)
        if options.plan_only:
            return stack, ["create router, env, janitor" + ("" if options.redis_url else ", Redis")]
        return create(api, stack, options, output), ["created the baseline"]
    if options.app:
        app = app_identity.of_app(options.app)
        app_identity.check_same_app(stack, app, options.replace_app, output)
    repair = options.repair or bool(stack.copied_from)
    if stack.missing and not (repair and can_create_missing(stack)):
        raise Failure(partial(stack))
    check_redis_mode(stack, options)
    check_redis_prefix(stack, options.redis_prefix)
    if stack.copied_from:
        warn_of_copy(stack, output)
        token = own_project_token(api, stack, options.plan_only, output)
        shared = secrets.token_urlsafe(32)
        keep_secret(token, shared)
    else:
        token = runtime_token(api, stack, options.plan_only, output)
        shared = internal_token(stack)
        if options.rotate:
            shared = secrets.token_urlsafe(32)
            keep_secret(shared)
    token_made = bool(stack.copied_from) and not api.scope()
    missing = create_missing(api, stack, options.plan_only, output)
    changes = plan(stack, options, token, shared, token_made)
    lines = [f"{name}: create" for name in missing]
    lines += [line for change in changes for line in change.lines()]
    if not options.plan_only:
        if any(change.deploy for change in changes) and not options.runtime_image:
            program.need("railway")
        apply(api, stack, changes, options, output)
        if options.rotate and stack.backends and not stack.copied_from:
            output.info(
                f"{joined(str(s.deployment_id) for s in stack.backends)} keep the former internal"
                " token, and go on with it: see docs/rotation.md"
            )
        if not api.scope() and any(contract.RAILWAY_TOKEN in c.variables for c in changes):
            check_written_token(api, stack)
    return stack, lines


def check_written_token(api: Api, stack: Stack) -> None:
    """Raise Failure if the janitor's token is not valid.

    Another run at the same time has deleted it as one that was not used, or has written its own.
    """
    janitor = stack.janitor
    assert janitor is not None
    read_variables(api, Stack(stack.target, stack.names, {janitor.name: janitor}))
    written = janitor.variables.get(contract.RAILWAY_TOKEN, "")
    if janitor.variables.get(contract.TOKEN_MADE) and (
        api.environment_of(written) != stack.target.environment_id
    ):
        raise Failure(
            "another `ensure` ran at the same time, and the tokens of the two got mixed up: run"
            " `pulse-railway ensure` again"
        )


def create_missing(api: Api, stack: Stack, plan_only: bool, output: Output) -> list[str]:
    """Create the missing services, and return their names.

    Each is created with the variables that identify it, so that the run after an interrupted one
    finds it and writes the others.
    """
    missing = stack.missing
    names = stack.names
    if stack.env:  # also in the run after one that was interrupted
        warn_of_lost_variables(stack, stack.backends, output)
    for lost in lost_with_missing(stack):
        output.warn(lost)
    if names.redis in missing:
        create_redis(api, stack, plan_only, output)
    for name in (names.router, names.env, names.janitor):  # the router's id is in the stamp
        if name in missing:
            identity = identity_of(stack, name)
            service_id = "new"
            if not plan_only:
                with output.step(f"create {name}"):
                    service_id = create_here(api, stack, name, identity)
            group = group_of(stack)
            service = Service(service_id, "", name, "", None, {}, [], group, None, identity)
            stack.services[name] = service
    return missing


def identity_of(stack: Stack, name: str) -> dict[str, str]:
    """Return the variables that identify a missing service, from its creation on."""
    names = stack.names
    if name == names.router:
        assert stack.janitor is not None
        stamp = stack.janitor.variables[contract.STACK]
        if ownership.parse_stamp(stamp).router_id == stack.taken.get(name):
            return {contract.STACK: stamp}  # the same service, in this environment again
        return {contract.STACK: stamp, contract.REPLACES: stamp}
    assert stack.router is not None
    # a copy is taken over with its other stamps, which are the original's until then
    stamp = stack.router.variables.get(contract.STACK) or str(stack.stamp)
    if name == names.env:
        return {contract.STACK: stamp}
    return {
        contract.STACK: stamp,
        contract.ROUTER_SERVICE: names.router,
        contract.JANITOR_SERVICE: name,
    }


def group_of(stack: Stack) -> str | None:
    """Return the group of the baseline on Railway's canvas: the router's, if there is one."""
    services = [stack.router] if stack.router else stack.baseline
    return next((s.group_id for s in services if s.group_id), None)


def create_here(api: Api, stack: Stack, name: str, variables: dict[str, str]) -> str:
    """Create a service in this environment, and return its id.

    Railway takes each name once in a project. If another environment has the service, it is added
    to this one by a patch, and read back. Raises Failure if Railway does not do it.
    """
    group, target = group_of(stack), stack.target
    service_id = stack.taken.get(name)
    if service_id is None:
        return create_service(api, target, name, variables, group_id=group)
    values = {key: {"value": value} for key, value in variables.items()}
    service = {"isCreated": True, "variables": values, **({"groupId": group} if group else {})}
    patch = {"services": {service_id: service}}

    def ask() -> bool | None:
        return name in read_services(api, target, stack.names).services or None

    try:
        document = documents.configure(patch=True)
        api.call(document, repeatable=True, environment=target.environment_id, patch=patch)
        poll(60.0, ask, f"{name} in this environment")
    except Failure as error:
        raise Failure(
            f"other environments of this project have {name}, and Railway did not add it to this"
            f" one ({error}): import it there (Sync) without its variables, or name another one"
            " (RailwayPlugin), and run `pulse-railway ensure --repair` again"
        ) from None
    return service_id


def create_redis(api: Api, stack: Stack, plan_only: bool, output: Output) -> None:
    """Create the Redis service again, by the template.

    Its password is new, so that router and janitor are deployed again.
    """
    target, name = stack.target, stack.names.redis
    runtime = [s for s in (stack.router, stack.janitor) if s]
    for service in runtime:
        service.variables[contract.UNDEPLOYED] = "1"
    if plan_only:
        stack.services[name] = Service("new", "", name, "", None, {}, [], group_of(stack), None)
        return
    for service in runtime:
        write_variables(api, target, service.id, {contract.UNDEPLOYED: "1"})
    with output.step(f"create {name}"):
        stamp = runtime[0].variables[contract.STACK]
        deploy_template(api, target, stack.names, {name: {contract.STACK: stamp}})
        created = _await_services(api, stack, [name], output).services[name]
        stack.services[name] = created
        wait_for_services(api, target, {created.id: name}, {created.id: None}, output)


def warn_of_lost_variables(stack: Stack, deployments: Iterable[Service], output: Output) -> None:
    """Warn of variables to which deployments refer, and that the env service does not have."""
    env = stack.env
    assert env is not None
    for service in deployments:
        if lost := references(service, env.name) - env.variables.keys():
            output.warn(
                f"{env.name} has no {joined(lost)}, which {service.deployment_id} refers to: set it"
                " there if the app needs it"
            )


def unfinished(stack: Stack) -> bool:
    """Return whether the existing services are those of an interrupted `scaffold`."""
    return any(contract.UNFINISHED in s.variables for s in stack.baseline)


def check_redis_mode(stack: Stack, options: BaselineOptions) -> None:
    """Raise Failure if `--redis-url` is another Redis than the stack's; its password may be new."""
    present = stack.stored(contract.REDIS_URL) or ""
    same = not stack.redis and options.redis_url and is_same_redis(options.redis_url, present)
    if options.redis_url and not same:
        raise Failure(
            "this stack uses another Redis, and its sessions and state would be lost: delete the"
            " baseline and run `pulse-railway scaffold --redis-url ...`, or leave --redis-url out"
            + lost_with_baseline(stack)
        )


def is_same_redis(url: str, other: str) -> bool:
    """Are these the addresses of one Redis, whatever their users and passwords?"""
    if url == other:
        return True
    places = {address_without_secrets(url), address_without_secrets(other)}
    return len(places) == 1 and places != {WRONG_ADDRESS}


def warn_of_copy(stack: Stack, output: Output) -> None:
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
    """Return a project token of this environment for the janitor, created if need be.

    A copied environment's variables hold the original's token, which must not be used.
    """
    target = stack.target
    if api.scope():
        return api.token.value
    if plan_only:
        return "made by ensure"
    name = f"pulse-railway {stack.names.router}"
    delete_unused_tokens(api, target, name, output)
    created = api.call(
        documents.PROJECT_TOKEN_CREATE,
        input={
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "name": name,
        },
    )
    return str(created["projectTokenCreate"])


def delete_unused_tokens(api: Api, target: Target, name: str, output: Output) -> None:
    """Delete the project tokens of this name and environment.

    An interrupted run has created them, and has not written them to the janitor: the caller has
    found no token there that opens the environment.
    """
    try:
        tokens = api.call(documents.PROJECT_TOKENS, project=target.project_id)["projectTokens"]
        for token in (edge["node"] for edge in tokens["edges"]):
            if (token["name"], token["environmentId"]) == (name, target.environment_id):
                api.call(documents.PROJECT_TOKEN_DELETE, id=token["id"])
    except GraphqlError as error:
        output.warn(
            f"Railway does not show or delete this project's tokens ({error}): if an `ensure` was"
            f" cut off here, older ones named {name} are not needed"
        )


def desired_redis_prefix(stack: Stack, options: BaselineOptions) -> str:
    """Return the prefix of the routing state's keys.

    A copy that shares its Redis with the original has the environment's id in its prefix.
    """
    if stack.copied_from and not stack.redis:
        return f"{stack.redis_prefix}:{stack.target.environment_id}"
    return (
        stack.stored(contract.REDIS_PREFIX) or options.redis_prefix or contract.DEFAULT_REDIS_PREFIX
    )


# The variables of a copy that describe the original's state, and are deleted.
STATE_OF_ORIGINAL = (
    contract.LAST_PROMOTED,
    contract.LAST_PROMOTED_AT,
    contract.MAINTENANCE,
    contract.MAINTENANCE_OFF,
    contract.CONTROL,
    contract.CONTROL_ANSWER,
    contract.OWNS_STATE,
)


def runtime_token(api: Api, stack: Stack, plan_only: bool, output: Output) -> str:
    """Return the janitor's token: this run's project token, else the present one if it is a
    project's, else this run's token.

    A token that `ensure` has created is replaced if it no longer opens this environment. Raises
    Failure if there is none and the user has a Railway CLI login, which expires.
    """
    if api.scope():
        return api.token.value
    present = stack.runtime_token
    known = present == api.token.value  # as no project's
    if present and not known and api.environment_of(present) == stack.target.environment_id:
        return present
    if stack.stored(contract.TOKEN_MADE):
        return own_project_token(api, stack, plan_only, output)
    token = api.token.value if api.token.durable else present
    if not token:
        raise Failure(LOGIN_IS_NOT_DURABLE)
    output.warn(NO_PROJECT_TOKEN)
    return token


def internal_token(stack: Stack) -> str:
    """Return the secret that router, janitor and backends share.

    Only `--rotate` replaces it, since running backends hold it. Raises Failure if there are
    backends and no service shows it.
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
    """Return the secret as a service shows it (backends of 0.3.x hold its value), or None."""
    holders = (stack.router, stack.janitor, *stack.backends)
    values = (service.variables.get(contract.INTERNAL_TOKEN) for service in holders if service)
    return next((value for value in values if value and "${{" not in value), None)


HELD_AT_LEAST = 3600.0  # seconds: a deploy may be under way, and clocks differ


def former_tokens(stack: Stack, internal_token: str) -> dict[str, float]:
    """Return the former internal tokens that a live version may hold, and until when each was the
    present one.

    A version holds the token of its start until it is started again.

    Args:
        internal_token: the one that router and janitor get.
    """
    former, present, now = stack.former_tokens, known_internal_token(stack), time.time()
    if stack.copied_from:  # no router routes to the versions that hold one
        return {}
    if present not in (None, internal_token):
        former[str(present)] = now
    oldest = min([now, *(now - service.age for service in stack.backends)])
    return {
        token: until
        for token, until in former.items()
        if token != internal_token and oldest < until + HELD_AT_LEAST
    }


# Router and janitor do not work without these settings: `ensure` restores them.
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
class Configured:
    """What a stack was set up with: the flags' values, else the stack's, else the defaults."""

    cron: str
    drain_ttl: int  # seconds
    rollback_window: int  # seconds
    keep: int  # deployments
    router_replicas: int

    @property
    def records(self) -> dict[str, str]:
        """The variables of router and janitor by which a later `ensure` knows these values.

        Either service can be deleted, and settings be changed on Railway by hand.
        """
        return {
            contract.CRON: self.cron,
            contract.ROLLBACK_WINDOW: str(self.rollback_window),
            contract.KEEP: str(self.keep),
            contract.ROUTER_REPLICAS: str(self.router_replicas),
        }


def configured(stack: Stack, options: BaselineOptions) -> Configured:
    """Return the values of the flags that a stack keeps.

    An earlier version has not recorded schedule and replicas: then Railway's settings count.
    """
    cron = stack.janitor.settings.get("cronSchedule") if stack.janitor else None
    replicas = stack.router.settings.get("numReplicas") if stack.router else None

    def choose(flag: str, given: Any, name: str, setting: Any = None) -> Any:
        for value in (given, *stack.values(name), setting):
            if value in (None, ""):
                continue
            try:
                if flag == "janitor_cron_schedule":
                    check_cron(str(value))
                return FLAGS[flag].parse(value)
            except Failure:  # somebody has changed it by hand
                continue
        return FLAGS[flag].default

    return Configured(
        choose("janitor_cron_schedule", options.cron, contract.CRON, cron),
        choose("drain_ttl_seconds", options.drain_ttl, contract.DRAIN_TTL),
        choose("rollback_window_seconds", options.rollback_window, contract.ROLLBACK_WINDOW),
        choose("keep", options.keep, contract.KEEP),
        choose("router_replicas", options.router_replicas, contract.ROUTER_REPLICAS, replicas),
    )


@dataclass(frozen=True)
class Desired:
    """The desired state of one service."""

    name: str
    variables: dict[str, str]
    settings: dict[str, Any]
    records: dict[str, str]  # variables that the running service does not read


def desired(
    stack: Stack,
    options: BaselineOptions,
    runtime_token: str,
    internal_token: str,
    token_made: bool = False,
) -> list[Desired]:
    """Return the desired router and janitor. Env and Redis are configured by the user.

    Args:
        token_made: `runtime_token` was created by `ensure`.
    """
    names, flags = stack.names, configured(stack, options)
    if options.redis_url:
        redis_url = options.redis_url
    elif stack.redis:
        redis_url = f"${{{{{names.redis}.REDIS_URL}}}}"  # the password stays on Railway
    else:
        redis_url = str(stack.stored(contract.REDIS_URL))
    shared = {
        contract.INTERNAL_TOKEN: internal_token,
        contract.REDIS_URL: redis_url,
        contract.REDIS_PREFIX: desired_redis_prefix(stack, options),
        contract.DRAIN_TTL: str(flags.drain_ttl),
        contract.RUNTIME_VERSION: options.runtime_image or runtime_image.runtime_version(),
    }
    if shared[contract.REDIS_PREFIX].endswith(f":{stack.target.environment_id}"):  # a copy's own
        shared[contract.KEY_TTL] = str(max(flags.drain_ttl, contract.MIN_KEY_TTL_SECONDS))
    if names.prefix:
        shared[contract.SERVICE_PREFIX] = names.prefix
    if not options.runtime_image:
        shared[contract.DOCKERFILE_PATH] = "Dockerfile.router"
    former = former_tokens(stack, internal_token)
    records = dict(flags.records)
    if former or stack.stored(contract.FORMER_TOKENS):
        records[contract.FORMER_TOKENS] = json.dumps(former) if former else ""
    if token_made or (not stack.copied_from and stack.stored(contract.TOKEN_MADE)):
        shared[contract.TOKEN_MADE] = "1"
    router = Desired(
        names.router,
        {
            **shared,
            contract.RAILWAY_TOKEN: contract.NO_TOKEN,
            contract.PORT: str(contract.DEFAULT_PORT),
        },
        {
            **ROUTER_SETTINGS,
            "numReplicas": flags.router_replicas,
            "healthcheckTimeout": 120,
            "overlapSeconds": 30,
            "drainingSeconds": 30,
        },
        records,
    )
    janitor_variables = {
        **shared,
        contract.RAILWAY_TOKEN: runtime_token,
        contract.ROLLBACK_WINDOW: str(flags.rollback_window),
        contract.KEEP: str(flags.keep),
        contract.ROUTER_SERVICE: names.router,
        contract.JANITOR_SERVICE: names.janitor,
    }
    if options.notify:
        janitor_variables[contract.NOTIFY_URL] = options.notify
    if not options.redis_url and stack.redis:
        janitor_variables[contract.REDIS_SERVICE] = names.redis
    janitor = Desired(
        names.janitor,
        janitor_variables,
        {**JANITOR_SETTINGS, "cronSchedule": flags.cron},
        records,
    )
    return [router, janitor]


def session_variables(stack: Stack, options: BaselineOptions) -> dict[str, str]:
    """Return the env service's variables about the Redis of apps' sessions.

    A copy may share that Redis with its original, so its keys get its id, and end by themselves.
    """
    url = options.session_redis_url or stack.session_redis_url
    if url is None:
        return {}
    variables = {contract.SESSION_REDIS_URL: url}
    if stack.copied_from:
        ttl = max(configured(stack, options).drain_ttl, contract.MIN_KEY_TTL_SECONDS)
        variables[contract.SESSION_SCOPE] = stack.target.environment_id
        variables[contract.KEY_TTL] = str(ttl)
    return variables


def plan(
    stack: Stack,
    options: BaselineOptions,
    runtime_token: str,
    internal_token: str,
    token_made: bool = False,
) -> list[Change]:
    """Return the changes that lead from the present to the desired state."""
    router = stack.router
    assert router is not None
    own = [*stack.baseline, *([] if stack.copied_from else stack.backends)]
    if router.variables.get(contract.REPLACES):  # by its own stamp it is found without the others
        own = [*(s for s in own if s is not router), router]
    changes = {s.name: Change(s) for s in own}
    for desired_state in desired(stack, options, runtime_token, internal_token, token_made):
        service, change = stack.services[desired_state.name], changes[desired_state.name]
        change.variables = {
            k: v for k, v in desired_state.variables.items() if service.variables.get(k) != v
        }
        if stack.copied_from:
            change.variables |= {
                name: "" for name in STATE_OF_ORIGINAL if service.variables.get(name)
            }
        # with a variable of 128 KB the janitor would not start
        change.variables |= {
            name: ""
            for name in (contract.CONTROL, contract.CONTROL_ANSWER)
            if service.is_too_long(name)
        }
        change.settings = {
            k: v for k, v in desired_state.settings.items() if service.settings.get(k) != v
        }
        if options.runtime_image and service.image != options.runtime_image:
            change.settings["source"] = {"image": options.runtime_image}
        elif not options.runtime_image and service.image:
            change.disconnect = True
        # the janitor's deployment is stopped after each cron run
        stopped = service.stopped and desired_state.name == stack.names.router
        undeployed = bool(service.variables.get(contract.UNDEPLOYED))
        change.deploy = bool(change) or service.status != "SUCCESS" or stopped or undeployed
        change.variables |= {
            k: v for k, v in desired_state.records.items() if service.variables.get(k) != v
        }
        change.domain = desired_state.name == stack.names.router and not service.domains
    name = options.app.plugin.name if options.app else None
    if name and app_identity.stored_identity(stack).name != name:
        app = app_identity.AppIdentity(name)
        app = app_identity.merge_stored(stack, app, options.replace_app)
        changes[stack.names.router].variables[contract.APP] = app_identity.to_json(app)
    change = changes[stack.names.env]
    change.variables = {
        k: v
        for k, v in session_variables(stack, options).items()
        if change.service.variables.get(k) != v
    }
    for change in changes.values():  # the changes from here on need no deployment
        if router.group_id and change.service.group_id != router.group_id:
            change.group_id = router.group_id
        if change.service.variables.get(contract.STACK) != stack.stamp:
            change.variables[contract.STACK] = str(stack.stamp)
    if options.owns_state and router.variables.get(contract.OWNS_STATE) != "1":
        changes[router.name].variables[contract.OWNS_STATE] = "1"
    return [change for change in changes.values() if change]


def apply(
    api: Api,
    stack: Stack,
    changes: list[Change],
    options: BaselineOptions,
    output: Output,
    started: dict[str, str | None] | None = None,
) -> None:
    """Apply a plan.

    After an interruption the next run's plan has the remaining changes: a service that is written
    and not deployed has the variable UNDEPLOYED, and the version variable is written last.

    Args:
        started: services that are starting already: id -> the deployment to wait for, if known.
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
                    created = create_domain(api, target, change.service.id)
                    change.service.domains = change.service.railway_domains = [created]
    for change in changes:
        if change.deploy:
            service = change.service
            waiting[service.id] = start_runtime(api, target, service, options, output)
    if waiting:
        names = {s.id: s.name for s in stack.services.values() if s.id in waiting}
        with output.step(f"wait for {joined(names.values())}"):
            wait_for_services(api, target, names, waiting, output)
    finish(api, stack, changes, options)


def finish(api: Api, stack: Stack, changes: list[Change], options: BaselineOptions) -> None:
    """Write the deployed version, and delete UNDEPLOYED and UNFINISHED."""
    target = stack.target
    version = {contract.RUNTIME_VERSION: options.runtime_image or runtime_image.runtime_version()}
    deployed = [change for change in changes if change.deploy]
    marked = [s for s in stack.baseline if contract.UNFINISHED in s.variables]
    inputs: dict[str, Any] = {}
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
            "name": contract.UNFINISHED,
        }
    if inputs:
        document = documents.configure(variables=len(deployed), deletions=len(marked))
        api.call(document, repeatable=True, **inputs)


def start_runtime(
    api: Api, target: Target, service: Service, options: BaselineOptions, output: Output
) -> str | None:
    """Deploy the published image, or the uploaded sources, on a service of the runtime.

    Returns the deployment's id, or None if the CLI does not show it.
    """
    if options.runtime_image:
        with output.step(f"deploy {options.runtime_image} on {service.name}"):
            if options.registry:  # Railway does not show whether it has them
                settings = options.registry.setting(options.runtime_image)
                write(api, target, [Change(service, settings=settings)])
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


def create(api: Api, stack: Stack, options: BaselineOptions, output: Output) -> Stack:
    """Create the baseline from the template, which places router, janitor and Redis on the canvas.

    Completes an interrupted creation. Returns the stack.
    """
    target, names = stack.target, stack.names
    expected = [names.router, names.janitor] + ([] if options.redis_url else [names.redis])
    check_names(stack, {*expected, names.env})
    token = runtime_token(api, stack, False, output)
    if not options.runtime_image:
        program.need("railway")
    if not all(name in stack.services for name in expected):
        if not stack.baseline:  # else an interrupted run has deployed it: its services appear
            with output.step(f"deploy the template {contract.TEMPLATE_CODE}"):
                run = secrets.token_hex(8)
                marked = {name: {contract.UNFINISHED: run} for name in expected}
                deploy_template(api, target, names, marked, options.runtime_image)
            stack = _await_services(api, stack, expected, output, run)
            stack = withdraw_doubles(api, stack, output, renamed(stack, run, expected))
        else:
            stack = _await_services(api, stack, expected, output)
    if names.env not in stack.services:
        with output.step(f"create {names.env}"):
            stack.services[names.env] = create_env(api, stack)
    if options.redis_url and stack.redis:
        with output.step(f"delete {names.redis}"):
            if not delete_service(api, target, stack.redis.id):
                output.warn(empty_service_message(names.redis, None))
            del stack.services[names.redis]
    starting: dict[str, str | None] = {}
    if stack.redis:  # the router's health check passes when Redis answers
        failed = stack.redis.status in FAILED_STATES
        starting[stack.redis.id] = deploy_service(api, target, stack.redis.id) if failed else None
    # deployments of a deleted baseline hold a token, which is kept
    shared = known_internal_token(stack) or secrets.token_urlsafe(32)
    keep_secret(shared)
    changes = plan(stack, options, token, shared)
    apply(api, stack, changes, options, output, starting)
    return stack


def create_env(api: Api, stack: Stack) -> Service:
    """Create the service that holds the app's variables, unless another run has just done it."""
    name, mark = stack.names.env, {contract.UNFINISHED: "1"}
    try:
        env_id = create_service(api, stack.target, name, mark, group_id=None)
    except GraphqlError:
        if present := read_environment(api, stack.target, stack.names).services.get(name):
            return present
        raise
    return Service(env_id, "", name, "", None, {}, [], None, None, mark)


def renamed(stack: Stack, run: str, expected: list[str]) -> list[Service]:
    """Return the services of this run's template to which Railway gave other names, since those
    were taken."""
    services = (*stack.services.values(), *stack.others)
    marked = (s for s in services if s.variables.get(contract.UNFINISHED) == run)
    return [s for s in marked if s.name not in expected]


def withdraw_doubles(
    api: Api, stack: Stack, output: Output, renamed: Iterable[Service] = ()
) -> Stack:
    """Delete what the later one of two runs of `ensure` has made beside the services of the other.

    Only services that their run has not finished are deleted, so nothing uses them. Returns the
    stack; its services are completed by both runs.
    """
    present = {s.name: s for s in (*stack.others, *stack.services.values())}
    withdrawn = [s for s in stack.doubles if is_withdrawable(present[s.name], s)]
    withdrawn += renamed
    if not withdrawn:
        return stack
    names = joined({service.name for service in withdrawn})
    with output.step(f"withdraw {names}, which another `ensure` has created, too"):
        for service in withdrawn:
            if not delete_service(api, stack.target, service.id):
                output.warn(empty_service_message(service.name, None))
        return inspect(api, stack.target, stack.names)


def check_names(stack: Stack, needed: set[str]) -> None:
    """Raise Failure if another environment of the project has services of these names.

    Railway accepts each name once in a project, and would refuse in the middle of the creation.
    """
    here = stack.services.keys() | {service.name for service in stack.others}
    if taken := needed & stack.taken.keys() - here:
        raise Failure(
            f"{joined(taken)}: other environments of this project have services of these names."
            " Duplicate one of them on Railway and run `pulse-railway ensure` there, or give this"
            " stack names of its own (--service-prefix)"
        )


def _await_services(
    api: Api, stack: Stack, expected: list[str], output: Output, run: str | None = None
) -> Stack:
    """Wait until the services of these names exist; with `run`, those that this run creates."""

    def ask() -> Stack | None:
        environment = read_environment(api, stack.target, stack.names)
        if not environment.services.keys() >= set(expected):
            return None
        services = (*environment.services.values(), *environment.doubles)
        own = [s for s in services if s.variables.get(contract.UNFINISHED) == run]
        return environment if run is None or len(own) >= len(expected) else None

    with output.step(f"wait for {joined(expected)} to appear"):
        return find_stack(poll(180.0, ask, "the template"))


def deploy_template(
    api: Api,
    target: Target,
    names: Names,
    services: dict[str, dict[str, str]],
    image: str | None = None,
) -> None:
    """Deploy services of the published template with our names.

    Args:
        services: name of each service to create -> further variables.
        image: of router and janitor.
    """
    template = api.public(documents.TEMPLATE, code=contract.TEMPLATE_CODE)["template"]
    serialized = template["serializedConfig"]
    new_names = {
        contract.DEFAULT_ROUTER: names.router,
        contract.DEFAULT_JANITOR: names.janitor,
        contract.DEFAULT_REDIS: names.redis,
    }
    for key, service in list(serialized["services"].items()):
        published = service.get("name")
        name = new_names.get(published)
        if name and name not in services:
            del serialized["services"][key]
        elif name:
            service["name"] = name
            further = {
                variable: {"defaultValue": value, "isOptional": True}
                for variable, value in services[name].items()
            }
            service["variables"] = {**(service.get("variables") or {}), **further}
        if published in (contract.DEFAULT_ROUTER, contract.DEFAULT_JANITOR):
            # `apply` deploys the runtime after the configuration
            service["source"] = {"image": image} if image else {}
    api.call(
        documents.TEMPLATE_DEPLOY,
        input={
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "templateId": template["id"],
            "serializedConfig": serialized,
        },
    )
