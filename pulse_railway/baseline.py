"""The stable services: router, env, Redis, janitor. What they should be, and how to get there.

The desired state is data (`desired`), the present one is read (`stack.inspect`), and the
difference (`plan`) is both what `ensure --plan` prints and what `ensure` carries out.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pulse_railway import config, contract, runtime_image
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.output import Output
from pulse_railway.railway import cli, documents
from pulse_railway.railway.api import Api
from pulse_railway.stack import (
    FAILED_STATES,
    SECRET_NAMES,
    Service,
    Stack,
    inspect,
    joined,
    poll,
    read_services,
    read_variables,
    wait_for_services,
)

# On a service whose creation has not ended: a run that was cut off is taken up by the next.
UNFINISHED = "PULSE_RAILWAY_SETUP"
LOGIN_IS_NOT_DURABLE = (
    "a Railway CLI login is not written into the router and the janitor, since it expires: set"
    " RAILWAY_TOKEN (project token) or RAILWAY_API_TOKEN and run this again"
)


@dataclass(frozen=True)
class Options:
    """What a user may choose about the baseline."""

    redis_url: str | None = None
    redis_prefix: str = contract.DEFAULT_REDIS_PREFIX
    cron: str = contract.DEFAULT_CRON
    drain_ttl: int = contract.DEFAULT_DRAIN_TTL_SECONDS
    router_replicas: int = 1
    runtime_image: str | None = None


@dataclass(frozen=True)
class Desired:
    """How one service should be."""

    name: str
    variables: dict[str, str]
    settings: dict[str, Any]


@dataclass
class Change:
    """What is to be done to one service."""

    service: Service
    variables: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    group_id: str | None = None
    disconnect: bool = False
    domain: bool = False
    deploy: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.variables
            or self.settings
            or self.group_id
            or self.disconnect
            or self.domain
            or self.deploy
        )

    def lines(self) -> list[str]:
        """For people; secrets are not shown."""
        name = self.service.name
        lines = []
        for key, value in sorted(self.variables.items()):
            before = self.service.variables.get(key)
            if key in SECRET_NAMES:
                lines.append(f"{name}: set {key} (secret)")
            else:
                lines.append(f"{name}: {key} {before or 'unset'} -> {value}")
        for key, value in sorted(self.settings.items()):
            before = self.service.image if key == "source" else self.service.settings.get(key)
            shown = value.get("image") if key == "source" else value
            lines.append(f"{name}: {key} {'unset' if before is None else before} -> {shown}")
        if self.disconnect:
            lines.append(
                f"{name}: image {self.service.image} -> built from pulse-railway's sources"
            )
        if self.group_id:
            lines.append(f"{name}: move into the router's group")
        if self.domain:
            lines.append(f"{name}: create a public address")
        if self.deploy:
            lines.append(f"{name}: deploy")
        return lines


def options(flags: Mapping[str, Any], plugin: Any) -> Options:
    """Raises Failure for a number that is none, or a cron schedule Railway would not run."""
    cron = flags.get("janitor_cron_schedule") or contract.DEFAULT_CRON
    check_cron(cron)
    redis_url = flags.get("redis_url")
    keep_secret(redis_url)
    if redis_url and not redis_url.startswith(("redis://", "rediss://")):
        raise Failure("--redis-url must start with redis:// or rediss://")
    return Options(
        redis_url=redis_url,
        redis_prefix=flags.get("redis_prefix") or contract.DEFAULT_REDIS_PREFIX,
        cron=cron,
        drain_ttl=config.number(flags, "drain_ttl_seconds", contract.DEFAULT_DRAIN_TTL_SECONDS, 0),
        router_replicas=config.number(flags, "router_replicas", 1),
        runtime_image=flags.get("runtime_image") or plugin.runtime_image,
    )


def check_cron(schedule: str) -> None:
    """Five fields, and not more often than Railway's every five minutes."""
    fields = schedule.split()
    if len(fields) != 5:
        raise Failure(f"cron schedule {schedule!r} needs five fields, like {contract.DEFAULT_CRON}")
    minute = fields[0]
    step = minute.removeprefix("*/")
    if minute == "*" or (step != minute and step.isdigit() and int(step) < 5):
        raise Failure(f"cron schedule {schedule!r}: Railway runs nothing more often than */5")


def shell(command: str) -> str:
    """A start command in a shell: Railway runs it without one where there is a Dockerfile."""
    if command.startswith(("sh -c ", "/bin/sh -c ")):
        return command
    return f"sh -c {shlex.quote(command)}"


def desired(
    stack: Stack, wanted: Options, runtime_token: str, internal_token: str
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
        contract.REDIS_PREFIX: wanted.redis_prefix,
        contract.RUNTIME_VERSION: wanted.runtime_image or runtime_image.version(),
    }
    if names.prefix:
        shared[contract.SERVICE_PREFIX] = names.prefix
    if not wanted.runtime_image:
        shared[contract.DOCKERFILE_PATH] = "Dockerfile.router"
    router = Desired(
        names.router,
        {**shared, contract.PORT: str(contract.DEFAULT_PORT)},
        {
            "numReplicas": wanted.router_replicas,
            "healthcheckPath": contract.ROUTER_HEALTH_PATH,
            "healthcheckTimeout": 120,
            "overlapSeconds": 30,
            "drainingSeconds": 30,
            "startCommand": "python router.py",
            "restartPolicyType": "ALWAYS",
        },
    )
    janitor_variables = {
        **shared,
        contract.DRAIN_TTL: str(wanted.drain_ttl),
        contract.ROUTER_SERVICE: names.router,
        contract.JANITOR_SERVICE: names.janitor,
    }
    if not wanted.redis_url and stack.redis:
        janitor_variables[contract.REDIS_SERVICE] = names.redis
    janitor = Desired(
        names.janitor,
        janitor_variables,
        {
            "numReplicas": 1,
            "startCommand": "python janitor.py",
            "cronSchedule": wanted.cron,
            "restartPolicyType": "NEVER",
        },
    )
    return [router, janitor]


def plan(stack: Stack, wanted: Options, runtime_token: str, internal_token: str) -> list[Change]:
    """The difference between the present and the desired state. Empty: nothing to do."""
    router = stack.router
    assert router is not None
    changes = []
    for goal in desired(stack, wanted, runtime_token, internal_token):
        service = stack.services[goal.name]
        change = Change(service)
        change.variables = {
            k: v for k, v in goal.variables.items() if service.variables.get(k) != v
        }
        change.settings = {k: v for k, v in goal.settings.items() if service.settings.get(k) != v}
        if wanted.runtime_image and service.image != wanted.runtime_image:
            change.settings["source"] = {"image": wanted.runtime_image}
        elif not wanted.runtime_image and service.image:
            change.disconnect = True
        change.deploy = bool(change) or service.status != "SUCCESS"
        change.domain = goal.name == stack.names.router and not service.domains
        changes.append(change)
    if router.group_id:
        for service in [*stack.baseline, *stack.backends]:
            if service.group_id != router.group_id:
                for change in changes:
                    if change.service is service:
                        change.group_id = router.group_id
                        break
                else:
                    changes.append(Change(service, group_id=router.group_id))
    return [change for change in changes if change]


def apply(
    api: Api,
    stack: Stack,
    changes: list[Change],
    wanted: Options,
    output: Output,
    started: dict[str, str | None] | None = None,
) -> None:
    """Carry a plan out. Killed anywhere, the next run's plan holds what is left: the version
    variable is written last.

    Args:
        started: services that are starting already, by id, with the deployment to wait for.
    """
    target = stack.target
    waiting = dict(started or {})
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


def finish(api: Api, stack: Stack, changes: list[Change], wanted: Options) -> None:
    """Note the version that runs now, and take the mark of an unfinished creation off."""
    target = stack.target
    value = {contract.RUNTIME_VERSION: wanted.runtime_image or runtime_image.version()}
    versions = [c.service for c in changes if contract.RUNTIME_VERSION in c.variables]
    marked = [s for s in stack.baseline if UNFINISHED in s.variables]
    inputs = {f"v{i}": variable_input(target, s.id, value) for i, s in enumerate(versions)}
    for i, service in enumerate(marked):
        inputs[f"x{i}"] = {
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "serviceId": service.id,
            "name": UNFINISHED,
        }
    if inputs:
        document = documents.configure(variables=len(versions), deletions=len(marked))
        api.call(document, repeatable=True, **inputs)


def write(api: Api, target: Target, changes: list[Change]) -> None:
    """Everything but deployments, in one document. All of it may be repeated."""
    values: dict[str, Any] = {"environment": target.environment_id}
    counts = {"variables": 0, "settings": 0, "disconnect": 0}
    groups: dict[str, Any] = {}
    for change in changes:
        variables = {k: v for k, v in change.variables.items() if k != contract.RUNTIME_VERSION}
        if change.disconnect:
            values[f"d{counts['disconnect']}"] = change.service.id
            counts["disconnect"] += 1
        if variables:
            values[f"v{counts['variables']}"] = variable_input(target, change.service.id, variables)
            counts["variables"] += 1
        if change.settings:
            values[f"s{counts['settings']}"] = change.service.id
            values[f"i{counts['settings']}"] = change.settings
            counts["settings"] += 1
        if change.group_id:
            groups[change.service.id] = {"groupId": change.group_id}
    if groups:
        values["patch"] = {"services": groups}
    if not counts["settings"] and not groups:
        del values["environment"]
    if any(counts.values()) or groups:
        document = documents.configure(patch=bool(groups), **counts)
        api.call(document, repeatable=True, **values)


def variable_input(target: Target, service_id: str, variables: dict[str, str]) -> dict[str, Any]:
    return {
        "projectId": target.project_id,
        "environmentId": target.environment_id,
        "serviceId": service_id,
        "variables": variables,
        "skipDeploys": True,
    }


def create_domain(api: Api, target: Target, service_id: str) -> str:
    data = api.call(
        documents.DOMAIN_CREATE,
        input={
            "environmentId": target.environment_id,
            "serviceId": service_id,
            "targetPort": contract.DEFAULT_PORT,
        },
    )
    return str(data["serviceDomainCreate"]["domain"])


def deploy_service(api: Api, target: Target, service_id: str) -> str:
    """Deploy what a service's source is; returns the deployment's id. A second one supersedes."""
    data = api.call(
        documents.SERVICE_DEPLOY,
        service=service_id,
        environment=target.environment_id,
        repeatable=True,
    )
    return str(data["serviceInstanceDeployV2"])


def start_runtime(
    api: Api, target: Target, service: Service, wanted: Options, output: Output
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
        return cli.up(
            api,
            project=target.project_id,
            environment=target.environment_id,
            service=service.name,
            context=Path(folder),
        )


# -- scaffold and ensure -----------------------------------------------------------------------


def scaffold(api: Api, target: Target, names: Names, wanted: Options, output: Output) -> Stack:
    """Create the baseline in an environment that has none of it.

    Raises Failure where any of it exists.
    """
    with output.step("inspect the project"):
        stack = inspect(api, target, names)
    if stack.baseline and not unfinished(stack):
        raise Failure(
            f"a baseline exists already: {joined(s.name for s in stack.baseline)}. `scaffold` only"
            " creates a fresh one: use `pulse-railway ensure`, or delete those services first"
        )
    return create(api, stack, wanted, output)


def ensure(
    api: Api,
    target: Target,
    names: Names,
    wanted: Options,
    output: Output,
    *,
    plan_only: bool = False,
) -> tuple[Stack, list[str]]:
    """Create the baseline in an empty environment, or reconcile a complete one.

    Returns the stack and what was (or, with `plan_only`, would be) done; nothing on the second
    run. Raises Failure for a partial baseline, or one with another Redis than `--redis-url`.
    """
    with output.step("inspect the project"):
        stack = inspect(api, target, names)
    if not stack.baseline or unfinished(stack):
        if plan_only:
            return stack, ["create router, env, janitor" + ("" if wanted.redis_url else ", Redis")]
        return create(api, stack, wanted, output), ["created the baseline"]
    if stack.missing:
        raise Failure(
            f"the baseline is partial: {', '.join(stack.missing)} missing. Delete"
            f" {joined(s.name for s in stack.baseline)} on Railway and run"
            " `pulse-railway scaffold`"
        )
    check_redis_mode(stack, wanted)
    assert stack.router is not None
    changes = plan(stack, wanted, runtime_token(api, stack), internal_token(stack))
    lines = [line for change in changes for line in change.lines()]
    if not plan_only:
        if any(change.deploy for change in changes) and not wanted.runtime_image:
            cli.need("railway")
        apply(api, stack, changes, wanted, output)
    return stack, lines


def unfinished(stack: Stack) -> bool:
    """Is what there is of a baseline what a run of ours left when it was cut off?"""
    return any(UNFINISHED in s.variables for s in stack.baseline)


def check_redis_mode(stack: Stack, wanted: Options) -> None:
    assert stack.router is not None
    present = stack.router.variables.get(contract.REDIS_URL)
    if wanted.redis_url and (stack.redis or wanted.redis_url != present):
        raise Failure(
            "this stack uses another Redis, and its sessions and state would be lost: delete the"
            " baseline and run `pulse-railway scaffold --redis-url ...`, or leave --redis-url out"
        )


def runtime_token(api: Api, stack: Stack) -> str:
    """The token that router and janitor get. Raises Failure for a login where they have none."""
    if api.token.durable:
        return api.token.value
    present = stack.router and stack.router.variables.get(contract.RAILWAY_TOKEN)
    if not present:
        raise Failure(LOGIN_IS_NOT_DURABLE)
    return present


def internal_token(stack: Stack) -> str:
    """The secret that router, janitor and backends share; backends hold it, so it stays."""
    present = stack.router and stack.router.variables.get(contract.INTERNAL_TOKEN)
    token = present or secrets.token_urlsafe(32)
    keep_secret(token)
    return token


def create(api: Api, stack: Stack, wanted: Options, output: Output) -> Stack:
    """Template first: router, janitor and Redis land on the canvas as it lays them out."""
    target, names = stack.target, stack.names
    token = runtime_token(api, stack)
    if not wanted.runtime_image:
        cli.need("railway")
    expected = [names.router, names.janitor] + ([] if wanted.redis_url else [names.redis])
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
            delete_service(api, target, stack.redis.id)
            del stack.services[names.redis]
    starting: dict[str, str | None] = {}
    if stack.redis:  # the router is healthy once it has read its state
        failed = stack.redis.status in FAILED_STATES
        starting[stack.redis.id] = deploy_service(api, target, stack.redis.id) if failed else None
    changes = plan(stack, wanted, token, internal_token(stack))
    apply(api, stack, changes, wanted, output, starting)
    return stack


def _await_services(api: Api, stack: Stack, expected: list[str], output: Output) -> Stack:
    def ask() -> Stack | None:
        found = read_services(api, stack.target, stack.names)
        return found if all(name in found.services for name in expected) else None

    with output.step(f"wait for {joined(expected)} to appear"):
        found: Stack = poll(180.0, ask, "the template")
        read_variables(api, found)
    return found


def deploy_template(api: Api, target: Target, names: Names, wanted: Options) -> None:
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


def create_service(
    api: Api,
    target: Target,
    name: str,
    variables: dict[str, str],
    *,
    group_id: str | None,
    settings: dict[str, Any] | None = None,
    image: str | None = None,
    created: Callable[[str], None] = lambda _: None,
) -> str:
    """Create a service with its variables, settings and place on the canvas; two calls.

    Returns its id, and tells it to `created` as soon as there is one. Raises Uncertain where
    Railway's answer was lost.
    """
    answer = api.call(
        documents.SERVICE_CREATE,
        input={
            "projectId": target.project_id,
            "environmentId": target.environment_id,
            "name": name,
            "variables": variables,
        },
    )
    service_id = str(answer["serviceCreate"]["id"])
    created(service_id)
    configure_service(api, target, service_id, settings or {}, group_id, image)
    return service_id


def configure_service(
    api: Api,
    target: Target,
    service_id: str,
    settings: dict[str, Any],
    group_id: str | None,
    image: str | None = None,
) -> None:
    service = Service(service_id, "", "", "", None, {}, [], None, None)
    if image:
        settings = {**settings, "source": {"image": image}}
    write(api, target, [Change(service, settings=settings, group_id=group_id)])


def delete_service(api: Api, target: Target, service_id: str) -> None:
    """Delete a service; one that is gone already is what was wanted."""
    try:
        api.call(
            documents.SERVICE_DELETE,
            service=service_id,
            environment=target.environment_id,
            repeatable=True,
        )
    except Failure as failure:
        if "not found" not in str(failure).lower():
            raise
