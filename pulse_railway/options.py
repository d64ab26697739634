"""The parsers: what a verb was asked for, settled once and checked here.

In come flags (with the defaults of Invoke's configuration, see verbs.py); over the plugin, over
the environment, they become a typed value, which is all that a flow sees of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pulse_railway import config, contract, naming
from pulse_railway.config import AppConfig, Names, Where
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.output import Output
from pulse_railway.railway.ssh import KEY_VARIABLE, identity

if TYPE_CHECKING:
    from pulse_railway.app.plugin import RailwayPlugin

Flags = Mapping[str, Any]

VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MOST = 10**9  # of a flag's whole number
PAGE_LIMIT = 24 * 1024  # bytes: it goes as one word of a control command


@dataclass(frozen=True)
class StackOptions:
    """For the verbs that work on what stands, and need no app."""

    where: Where
    names: Names
    redis_service: str | None = None
    redis_url: str | None = field(default=None, repr=False)
    redis_prefix: str | None = None
    deployment_id: str | None = None
    deployment_name: str | None = None
    yes: bool = False
    notify: str | None = field(default=None, repr=False)
    message: str | None = None


@dataclass(frozen=True)
class PromoteOptions(StackOptions):
    weight: float | None = None  # percent of new visitors; None: all, it becomes the active one
    bake: int = 0  # seconds
    force: bool = False  # also where it does not answer now


@dataclass(frozen=True)
class MaintenanceOptions(StackOptions):
    on: bool = True
    page: str | None = None  # HTML
    retry_after: int = 30  # seconds


@dataclass(frozen=True)
class StatusOptions(StackOptions):
    watch: bool = False
    every: int = 15  # seconds


@dataclass(frozen=True)
class HistoryOptions(StackOptions):
    lines: int = 100


@dataclass(frozen=True)
class LogsOptions(StackOptions):
    service: str | None = None  # a stable service; else a deployment's
    build: bool = False
    follow: bool = False
    lines: int = 100


@dataclass(frozen=True)
class BaselineOptions:
    """What a user may choose about the baseline."""

    where: Where
    names: Names
    redis_url: str | None = None
    redis_prefix: str | None = None  # None: the stack's, else the usual one
    cron: str = contract.DEFAULT_CRON
    drain_ttl: int = contract.DEFAULT_DRAIN_TTL_SECONDS  # seconds
    rollback_window: int = contract.DEFAULT_ROLLBACK_WINDOW_SECONDS  # seconds; 0: none
    keep: int = 0  # deployments
    router_replicas: int = 1
    runtime_image: str | None = None
    app: AppConfig | None = None
    replace_app: bool = False
    notify: str | None = field(default=None, repr=False)
    owns_state: bool = False
    plan_only: bool = False


@dataclass(frozen=True)
class DeployOptions:
    where: Where
    app: AppConfig
    deployment_id: str | None = None
    deployment_name: str = contract.DEFAULT_DEPLOYMENT_NAME
    server_address: str | None = None
    web_root: str | None = None
    image_repository: str | None = None
    build_args: Mapping[str, str] = config.NOTHING
    env: Mapping[str, str] = config.NOTHING
    no_gitignore: bool = False
    replicas: int = 1
    promote: bool = True
    replace_app: bool = False
    keep_failed: bool = False
    canary: float | None = None  # percent of new visitors, instead of a promotion
    bake: int = 0  # seconds
    lock_wait: int | None = None  # seconds; None: does not wait for another deploy
    message: str | None = None
    notify: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ImageOptions:
    repository: str
    tag: str | None = None


# -- a verb's flags to its value: one function a kind ------------------------------------------


def stack(flags: Flags, output: Output) -> StackOptions:
    app = load_app(flags, output) if flags.get("app") else None
    keep_secret(flags.get("redis_url"))
    return StackOptions(
        where=where(flags, app.plugin if app else None),
        names=router_named(flags, app.names) if app else names(flags),
        redis_service=flags.get("redis_service"),
        redis_url=flags.get("redis_url"),
        redis_prefix=flags.get("redis_prefix"),
        deployment_id=deployment_id(flags),
        deployment_name=flags.get("deployment_name"),
        yes=bool(flags.get("yes")),
        notify=notify(flags),
        message=flags.get("message"),
    )


def promote(flags: Flags, output: Output) -> PromoteOptions:
    common = one_deployment(flags, output)
    weight = percent(flags, "weight")
    bake, force = number(flags, "bake", 0, 0), bool(flags.get("force"))
    return PromoteOptions(**vars(common), weight=weight, bake=bake, force=force)


def maintenance(flags: Flags, output: Output) -> MaintenanceOptions:
    if flags.get("switch") not in ("on", "off"):
        raise Failure("maintenance on, or maintenance off?")
    on = flags["switch"] == "on"
    page = None
    if on and flags.get("page"):
        path = Path(flags["page"])
        if not path.is_file():
            raise Failure(f"no page at {path}: --page takes an HTML file")
        page = path.read_text(errors="replace")
        if len(page.encode()) > PAGE_LIMIT:
            raise Failure(f"{path} is larger than {PAGE_LIMIT // 1024} KB: link what it shows")
    common = stack(flags, output)
    after = number(flags, "retry_after", 30)
    return MaintenanceOptions(**vars(common), on=on, page=page, retry_after=after)


def one_deployment(flags: Flags, output: Output) -> StackOptions:
    """As `stack`, with the deployment that it is about."""
    if not flags.get("deployment_id"):
        raise Failure("which deployment? pass --deployment-id; `status` lists them")
    return stack(flags, output)


def one_name(flags: Flags, output: Output) -> StackOptions:
    if not flags.get("deployment_name"):
        raise Failure("which deployment? pass --deployment-name")
    try:
        naming.deployment_slug(flags["deployment_name"])
    except ValueError as error:
        raise Failure(str(error)) from None
    return stack(flags, output)


def status(flags: Flags, output: Output) -> StatusOptions:
    if flags.get("watch") and flags.get("json"):
        raise Failure("--watch is for people: for a program, call status --json again and again")
    common = stack(flags, output)
    every = number(flags, "every", 15)
    return StatusOptions(**vars(common), watch=bool(flags.get("watch")), every=every)


def logs(flags: Flags, output: Output) -> LogsOptions:
    if flags.get("service") and flags.get("deployment_id"):
        raise Failure("pass --service or --deployment-id, not both: whose log?")
    # here --service is what to read, not the router's name
    common = stack({**flags, "service": None}, output)
    return LogsOptions(
        **vars(common),
        service=flags.get("service"),
        build=bool(flags.get("build")),
        follow=bool(flags.get("follow")),
        lines=number(flags, "lines", 100),
    )


def history(flags: Flags, output: Output) -> HistoryOptions:
    return HistoryOptions(**vars(stack(flags, output)), lines=number(flags, "lines", 100))


def baseline(flags: Flags, output: Output) -> BaselineOptions:
    app = load_app(flags, output)
    cron = flags.get("janitor_cron_schedule") or contract.DEFAULT_CRON
    check_cron(cron)
    redis_url = flags.get("redis_url")
    keep_secret(redis_url)
    if redis_url and not redis_url.startswith(("redis://", "rediss://")):
        raise Failure("--redis-url must start with redis:// or rediss://")
    return BaselineOptions(
        where=where(flags, app.plugin),
        names=app.names,
        redis_url=redis_url,
        redis_prefix=flags.get("redis_prefix"),
        cron=cron,
        drain_ttl=number(flags, "drain_ttl_seconds", contract.DEFAULT_DRAIN_TTL_SECONDS, 0),
        rollback_window=number(
            flags, "rollback_window_seconds", contract.DEFAULT_ROLLBACK_WINDOW_SECONDS, 0
        ),
        keep=number(flags, "keep", 0, 0),
        router_replicas=number(flags, "router_replicas", 1),
        runtime_image=flags.get("runtime_image") or app.plugin.runtime_image,
        app=app,
        replace_app=bool(flags.get("replace_app")),
        notify=notify(flags),
        owns_state=bool(flags.get("owns_state")),
        plan_only=bool(flags.get("plan")),
    )


def deploy(flags: Flags, output: Output) -> DeployOptions:
    app = load_app(flags, output)
    repository = flags.get("image_repository") or app.plugin.image_repository
    if repository and flags.get("no_gitignore"):
        raise Failure("--no-gitignore is for source deploys: leave it or --image-repository out")
    build_args = pairs(flags.get("build_arg"), "--build-arg")
    env = pairs(flags.get("env"), "--env")
    for flag, given in (("--env", env), ("--build-arg", {} if repository else build_args)):
        if taken := sorted(contract.RESERVED & given.keys()):
            raise Failure(f"{flag} cannot set {', '.join(taken)}: pulse-railway manages it")
    keep_secret(*env.values(), *build_args.values())
    canary, bake = percent(flags, "canary"), number(flags, "bake", 0, 0)
    if flags.get("no_promote") and (canary is not None or bake):
        raise Failure("--no-promote leaves nobody to watch: leave it or --canary and --bake out")
    name = flags.get("deployment_name") or app.plugin.deployment_name
    return DeployOptions(
        where=where(flags, app.plugin),
        app=app,
        deployment_id=deployment_id(flags),
        deployment_name=name or contract.DEFAULT_DEPLOYMENT_NAME,
        server_address=flags.get("server_address") or app.server_address,
        web_root=flags.get("web_root"),
        image_repository=repository,
        build_args=build_args,
        env=env,
        no_gitignore=bool(flags.get("no_gitignore")),
        replicas=number(flags, "backend_replicas", 1),
        promote=not flags.get("no_promote"),
        replace_app=bool(flags.get("replace_app")),
        keep_failed=bool(flags.get("keep_failed")),
        canary=canary,
        bake=bake,
        lock_wait=number(flags, "lock_wait", 0, 0) if flags.get("lock_wait") is not None else None,
        message=flags.get("message"),
        notify=notify(flags),
    )


def as_given(flags: Flags, output: Output) -> Flags:
    """For a verb that looks at each of them by itself."""
    return flags


def image(flags: Flags, output: Output) -> ImageOptions:
    if not flags.get("repository"):
        raise Failure("where to? pass --repository, e.g. registry/org/pulse-railway")
    return ImageOptions(flags["repository"], flags.get("tag"))


# -- what they share ---------------------------------------------------------------------------


def load_app(flags: Flags, output: Output) -> AppConfig:
    with output.step(f"load {flags.get('app') or 'the app'}"):
        app = config.load_app(flags.get("app"), Path(flags.get("context") or ".").resolve())
    if not flags.get("service_prefix"):
        return app
    try:
        return replace(
            app, names=prefixed(app.names, naming.service_prefix(flags["service_prefix"]))
        )
    except ValueError as error:
        raise Failure(str(error)) from None


def prefixed(of_app: Names, prefix: str) -> Names:
    """An app's names, or the usual ones, with another prefix. They are for a stack that is set up:
    one that is there is found by its router, and keeps its own. Raises ValueError for a name that
    Railway would not take."""
    named: dict[str, Any] = {}
    for role in ("router", "env", "redis", "janitor"):
        bare = getattr(of_app, role).removeprefix(of_app.prefix)
        named[role] = naming.baseline_name(prefix, bare)
    return replace(of_app, prefix=prefix, **named)


def where(flags: Flags, plugin: RailwayPlugin | None = None) -> Where:
    """Which project and environment, by flags over the plugin.

    Raises Failure where one is named and given by id at once.
    """
    for what in ("workspace", "project", "environment"):
        if flags.get(what) and flags.get(f"{what}_id"):
            raise Failure(f"pass --{what} or --{what}-id, not both")
    way = flags.get("control")
    if way not in (None, "ssh", "job"):
        raise Failure(f"--control takes ssh or job, not {way!r}")
    key = flags["ssh_key"] or os.environ.get(KEY_VARIABLE) if "ssh_key" in flags else None
    project, environment = flags.get("project"), flags.get("environment")
    if plugin and not flags.get("project_id"):
        project = project or plugin.project
    if plugin and not flags.get("environment_id"):
        environment = environment or plugin.environment
    return Where(
        token=flags.get("token"),
        workspace=flags.get("workspace"),
        workspace_id=flags.get("workspace_id"),
        project=project,
        project_id=flags.get("project_id"),
        environment=environment,
        environment_id=flags.get("environment_id"),
        control=way,
        ssh_key=identity(key) if key and way != "job" else None,
    )


def names(flags: Flags) -> Names:
    """For verbs that load no app. Raises Failure for a name that Railway would not take."""
    router, redis = flags.get("service"), flags.get("redis_service")
    try:
        usual = prefixed(Names(), naming.service_prefix(flags.get("service_prefix")))
        return replace(
            usual,
            router=naming.service_name(router) if router else usual.router,
            redis=naming.service_name(redis) if redis else usual.redis,
            asked=bool(router),
        )
    except ValueError as error:
        raise Failure(str(error)) from None


def router_named(flags: Flags, of_app: Names) -> Names:
    """An app's names, with the router that --service names. Raises Failure where the app names
    another one."""
    if not flags.get("service"):
        return of_app
    asked = names(flags)
    if of_app.asked and asked.router != of_app.router:
        raise Failure(
            f"--service {asked.router} is not the router of this app, {of_app.router}: leave"
            " --service out, or --app (and `app` in invoke.yaml)"
        )
    return replace(of_app, router=asked.router, asked=True)


def deployment_id(flags: Flags) -> str | None:
    given = flags.get("deployment_id")
    try:
        return naming.deployment_id(given) if given else None
    except ValueError as error:
        raise Failure(str(error)) from None


def check_cron(schedule: str) -> None:
    """Five fields, and not more often than Railway's every five minutes."""
    fields = schedule.split()
    if len(fields) != 5:
        raise Failure(f"cron schedule {schedule!r} needs five fields, like {contract.DEFAULT_CRON}")
    minute = fields[0]
    step = minute.removeprefix("*/")
    if minute == "*" or (step != minute and step.isdigit() and int(step) < 5):
        raise Failure(f"cron schedule {schedule!r}: Railway runs nothing more often than */5")


def pairs(items: list[str] | None, flag: str) -> dict[str, str]:
    """`KEY=VALUE` items as a dict. Raises Failure for one that is not."""
    found = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not VARIABLE_NAME.fullmatch(key):
            raise Failure(f"{flag} takes KEY=VALUE, not {key!r}: a name has letters, digits, _")
        found[key] = value
    return found


def notify(flags: Flags) -> str | None:
    """The address to tell, a secret. Raises Failure for what is none."""
    url = flags.get("notify") or os.environ.get(contract.NOTIFY_URL)
    keep_secret(url)
    if url and not str(url).startswith(("https://", "http://")):
        raise Failure(f"--notify and {contract.NOTIFY_URL} take an http(s) address")
    return str(url) if url else None


def percent(flags: Flags, name: str) -> float | None:
    """A flag that holds a percentage. Raises Failure for anything else."""
    value = flags.get(name)
    if value in (None, ""):
        return None
    try:
        found = float(str(value).removesuffix("%"))
    except ValueError:
        found = -1.0
    if not 0 <= found <= 100:
        raise Failure(f"--{name} takes a number from 0 to 100, not {value!r}")
    return found


def number(flags: Flags, name: str, default: int, least: int = 1) -> int:
    """A flag that holds a whole number. Raises Failure for anything else."""
    value = flags.get(name)
    if value in (None, ""):
        return default
    try:
        found = int(str(value))
    except ValueError:
        found = least - 1
    if not least <= found <= MOST:
        flag = f"--{name.replace('_', '-')}"
        raise Failure(f"{flag} takes a whole number from {least} to {MOST}, not {value!r}")
    return found
