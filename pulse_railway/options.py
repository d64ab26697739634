"""The verbs' options, and their parsers: flags become one typed, checked value.

The flags have the defaults of Invoke's configuration (verbs.py); they come before the plugin's
values, and these before the environment's. A flow sees the typed value alone. A field with the name
of a flag in flags.py has that flag's value, kind and default.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pulse_railway import config, contract, naming, runtime_image
from pulse_railway.config import AppConfig, Names, Where
from pulse_railway.errors import Failure, UsageError, keep_secret
from pulse_railway.flags import EMPTY, FLAGS, UNSET, Flags, value
from pulse_railway.output import Output
from pulse_railway.railway.ssh import private_key_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from pulse_railway.app.plugin import RailwayPlugin

PAGE_LIMIT = 24 * 1024  # bytes: the page is one argument of a control command


@dataclass(frozen=True)
class StackOptions:
    """The options of verbs that act on a stack, or read it, and need no app."""

    where: Where
    names: Names
    app: AppConfig | None = None  # if one is given
    redis_service: str | None = None
    redis_url: str | None = field(default=None, repr=False)
    redis_prefix: str | None = None
    deployment_id: str | None = None
    deployment_name: str = FLAGS["deployment_name"].default
    yes: bool = False
    force: bool = False  # promote: also what does not answer; delete: also the fallback in use
    notify: str | None = field(default=None, repr=False)
    message: str | None = None


@dataclass(frozen=True)
class RollbackOptions(StackOptions):
    move_after: int | None = None  # seconds until the tabs of what drains move over; None: never
    move_idle: int | None = None  # seconds without use after which one does by itself


@dataclass(frozen=True)
class PromoteOptions(RollbackOptions):
    weight: float | None = None  # percent of new visitors; None: it becomes the active deployment
    bake: int = FLAGS["bake"].default  # seconds
    bake_latency_ms: int | None = None
    evict: bool = False  # delete all other versions then
    continue_: bool = False  # take up the canary's steps


@dataclass(frozen=True)
class MaintenanceOptions(StackOptions):
    on: bool = True
    page: str | None = None  # HTML
    retry_after: int = FLAGS["retry_after"].default  # seconds


@dataclass(frozen=True)
class StatusOptions(StackOptions):
    watch: bool = False
    every: int = FLAGS["every"].default  # seconds


@dataclass(frozen=True)
class HistoryOptions(StackOptions):
    lines: int = FLAGS["lines"].default


@dataclass(frozen=True)
class LogsOptions(StackOptions):
    service: str | None = None  # a stable service; None: a deployment's
    build: bool = False
    follow: bool = False
    lines: int = FLAGS["lines"].default


@dataclass(frozen=True)
class RegistryCredentials:
    """What Railway pulls private images with (its RegistryCredentialsInput)."""

    password: str = field(repr=False)
    username: str | None = None  # None: the image's owner

    def setting(self, image: str) -> dict[str, Any]:
        """Return the fields of ServiceInstanceUpdateInput for a service with that image.

        For a token of GitHub's registry the user's name does not count (docs.railway.com, "Private
        registries"), but Railway's schema needs one.
        """
        parts = image.split("/")
        owner = parts[-2] if len(parts) > 1 else "x"
        credentials = {"username": self.username or owner, "password": self.password}
        return {"registryCredentials": credentials}


@dataclass(frozen=True)
class BaselineOptions:
    """The options of the baseline."""

    where: Where
    names: Names
    redis_url: str | None = None
    redis_prefix: str | None = None  # None: the stack's, or the default in a new stack
    # None: the stack's value, or the default in a new stack
    session_redis_url: str | None = field(default=None, repr=False)
    cron: str | None = None
    drain_ttl: int | None = None  # seconds
    rollback_window: int | None = None  # seconds; 0: none
    keep: int | None = None  # deployments
    router_replicas: int | None = None
    runtime_image: str | None = None
    registry: RegistryCredentials | None = None
    app: AppConfig | None = None
    replace_app: bool = False
    notify: str | None = field(default=None, repr=False)
    owns_state: bool = False
    repair: bool = False
    rotate: bool = False  # replace the internal token
    plan_only: bool = False


@dataclass(frozen=True)
class DeployOptions:
    where: Where
    app: AppConfig
    deployment_id: str | None = None
    deployment_name: str = FLAGS["deployment_name"].default
    server_address: str | None = None
    web_root: str | None = None
    image_repository: str | None = None
    image: str | None = None  # that exists
    from_: str | None = None  # the deployment that had it
    registry: RegistryCredentials | None = None
    build_args: Mapping[str, str] = EMPTY
    env: Mapping[str, str] = EMPTY
    no_gitignore: bool = False
    instances: int = FLAGS["instances"].default  # processes
    keep_instances: bool = False  # or those of the deployment of `from_`
    region: str | None = None
    memory_gb: float | None = None  # 10^9 bytes
    vcpus: float | None = None
    promote: bool = True
    preview: bool = False  # pending, and reachable with a key only
    evict: bool = False  # delete all other versions then
    replace_app: bool = False
    keep_failed: bool = False
    canary: float | None = None  # percent of new visitors, instead of a promotion
    steps: tuple[float, ...] = ()  # or percents that follow each other, before the promotion
    bake: int = FLAGS["bake"].default  # seconds
    bake_latency_ms: int | None = None
    move_after: int | None = None  # as in RollbackOptions
    move_idle: int | None = None
    lock_wait: int | None = None  # seconds; None: fail at once if another deploy runs
    message: str | None = None
    notify: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ImageOptions:
    repository: str
    tag: str | None = None


def from_flags[T: DataclassInstance](
    kind: type[T], flags: Flags, plugin: RailwayPlugin | None = None, **known: Any
) -> T:
    """Return options of `kind` with the fields `known`; the others have the values of their flags.

    Raises Failure for a flag with an invalid value.
    """
    from_flag = {f.name for f in fields(kind)} & FLAGS.keys() - known.keys()
    return kind(**known, **{name: value(flags, name, plugin) for name in sorted(from_flag)})


# -- the verbs' parsers: each raises Failure for invalid flags ---------------------------------


def stack_options[T: StackOptions](kind: type[T], flags: Flags, output: Output, **known: Any) -> T:
    """Return options of `kind`, with the names and the target of the app if one is given."""
    app = app_from_flags(flags, output) if flags.get("app") else None
    keep_secret(flags.get("redis_url"))
    known = {
        "where": where(flags, app.plugin if app else None),
        "names": with_router(flags, app.names) if app else names(flags),
        "app": app,
        "deployment_id": parse_deployment_id(flags),
        "notify": notify_url(flags),
        **known,
    }
    return from_flags(kind, flags, **known)


def parse_stack(flags: Flags, output: Output) -> StackOptions:
    return stack_options(StackOptions, flags, output)


def parse_promote(flags: Flags, output: Output) -> PromoteOptions:
    if flags.get("continue_"):
        if given := [FLAGS[name].option for name in CONTINUED if flags.get(name)]:
            raise Failure(f"--continue excludes {' and '.join(given)}: the record has the steps")
    else:
        need_deployment_id(flags)
    check_bake(flags)
    check_evict(flags, "weight", "bake")
    check_move(flags, "weight", "evict")
    return stack_options(PromoteOptions, flags, output, move_after=move_after(flags))


def parse_rollback(flags: Flags, output: Output) -> RollbackOptions:
    return stack_options(RollbackOptions, flags, output, move_after=move_after(flags))


def move_after(flags: Flags) -> int | None:
    """Return the seconds until tabs move over; None if they stay."""
    if value(flags, "move"):
        return 0
    after: int | None = value(flags, "move_after")
    return 0 if after is None and value(flags, "move_idle") else after


def check_move(flags: Flags, *others: str) -> None:
    """Raise Failure for --move with one of these flags, with which no version drains. A setting
    of --move-after in invoke.yaml does not count."""
    if value(flags, "move") and (given := given_of(flags, *others)):
        raise Failure(f"--move excludes {' and '.join(given)}: no version drains")


CONTINUED = ("weight", "bake", "bake_latency_ms", "evict", "force")  # what --continue excludes


def canary_steps(flags: Flags) -> tuple[float, ...]:
    """Return the percentages of --canary. Raises Failure for steps that are none."""
    weights: tuple[float, ...] = value(flags, "canary") or ()
    if len(weights) > 1:
        if not value(flags, "bake"):
            raise Failure("--canary with several steps needs --bake, which judges each")
        if any(later <= earlier for earlier, later in itertools.pairwise(weights)):
            raise Failure("--canary takes steps that grow, as in 10,25,50")
    return weights


def check_bake(flags: Flags) -> None:
    """Raise Failure for a latency without a bake that could judge it."""
    if value(flags, "bake_latency_ms") is not None and flags.get("bake") is None:
        raise Failure("--bake-latency-ms needs --bake: nothing is judged without it")


def given_of(flags: Flags, *names: str) -> list[str]:
    """Return which of these options are given."""
    found = [FLAGS[name] for name in names]  # a weight of 0 makes a canary, too
    return [f.option for f in found if value(flags, f.name) not in (f.default, f.unset)]


def check_evict(flags: Flags, *others: str) -> None:
    """Raise Failure for --evict with one of these flags, by which an old version is needed."""
    if value(flags, "evict") and (given := given_of(flags, *others)):
        raise Failure(f"--evict excludes {' and '.join(given)}: no other version stays")


def parse_maintenance(flags: Flags, output: Output) -> MaintenanceOptions:
    if flags.get("switch") not in ("on", "off"):
        raise UsageError("maintenance on, or maintenance off?")
    on = flags["switch"] == "on"
    page = None
    if on and flags.get("page"):
        path = Path(flags["page"])
        if not path.is_file():
            raise Failure(f"no page at {path}: --page takes an HTML file")
        page = read_page(path)
    return stack_options(MaintenanceOptions, flags, output, on=on, page=page)


def read_page(path: Path) -> str:
    """Return the text of a maintenance page. Raises Failure if it cannot be sent as it is."""
    raw = path.read_bytes()
    if len(raw) > PAGE_LIMIT:
        raise Failure(f"{path} is larger than {PAGE_LIMIT // 1024} KB: link what it shows")
    try:
        page = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        page = "\0"
    if "\0" in page:
        raise Failure(f"{path} is no UTF-8 text: save it as UTF-8")
    if not page.strip():
        raise Failure(f"{path} is empty: leave --page out for the router's own page")
    return page


def parse_one_deployment(flags: Flags, output: Output) -> StackOptions:
    """As `parse_stack`; a deployment id is required."""
    need_deployment_id(flags)
    return parse_stack(flags, output)


def parse_one_name(flags: Flags, output: Output) -> StackOptions:
    if not flags.get("deployment_name"):
        raise UsageError("which deployment? pass --deployment-name")
    try:
        naming.deployment_slug(flags["deployment_name"])
    except ValueError as error:
        raise Failure(str(error)) from None
    return parse_stack(flags, output)


def parse_status(flags: Flags, output: Output) -> StatusOptions:
    if flags.get("watch") and flags.get("json"):
        raise Failure("--watch is for people: in a program, call `status --json` repeatedly")
    return stack_options(StatusOptions, flags, output)


def parse_logs(flags: Flags, output: Output) -> LogsOptions:
    if flags.get("service") and flags.get("deployment_id"):
        raise Failure("pass --service or --deployment-id, not both: whose log?")
    # --service is the service whose log is read, not the router's name
    other_flags = {**flags, "service": None}
    return stack_options(LogsOptions, other_flags, output, service=value(flags, "service"))


def parse_history(flags: Flags, output: Output) -> HistoryOptions:
    return stack_options(HistoryOptions, flags, output)


def parse_baseline(flags: Flags, output: Output) -> BaselineOptions:
    app = app_from_flags(flags, output)
    if cron := value(flags, "janitor_cron_schedule"):
        check_cron(cron)
    redis_url, session_url = flags.get("redis_url"), flags.get("session_redis_url")
    keep_secret(redis_url, session_url)
    if redis_url and (problem := runtime_image.load("router").redis_problem(redis_url)):
        raise Failure(f"--redis-url is wrong: {problem}")
    if session_url and (problem := session_redis_problem(session_url)):
        raise Failure(f"--session-redis-url is wrong: {problem}")
    return from_flags(
        BaselineOptions,
        flags,
        app.plugin,
        runtime_image=image_of(flags, "runtime_image", naming.image_reference, app.plugin),
        registry=registry_credentials(flags),
        where=where(flags, app.plugin),
        names=app.names,
        app=app,
        cron=cron,
        drain_ttl=value(flags, "drain_ttl_seconds"),
        rollback_window=value(flags, "rollback_window_seconds"),
        notify=notify_url(flags),
        plan_only=value(flags, "plan"),
    )


def session_redis_problem(url: str) -> str | None:
    """Return what is wrong with an address of the sessions' Redis; a reference may stand there."""
    if runtime_image.load("ownership").REFERENCE.fullmatch(url):
        return None
    problem: str | None = runtime_image.load("router").redis_problem(url)
    return problem


def parse_deploy(flags: Flags, output: Output) -> DeployOptions:
    app = app_from_flags(flags, output)
    existing = [FLAGS[name].option for name in ("image", "from_") if flags.get(name)]
    repository = None
    if not existing or flags.get("image_repository"):
        repository = image_of(flags, "image_repository", naming.image_repository, app.plugin)
    if len(existing) > 1 or (existing and repository):
        raise Failure("which image? pass one of --image, --from and --image-repository")
    if (repository or existing) and flags.get("no_gitignore"):
        raise Failure(
            "--no-gitignore is for source deploys: leave it out, or"
            f" {existing[0] if existing else '--image-repository'}"
        )
    build_args, env = value(flags, "build_arg"), value(flags, "env")
    for flag, pairs in (("--env", env), ("--build-arg", {} if repository else build_args)):
        if reserved := sorted(contract.RESERVED & pairs.keys()):
            raise Failure(f"{flag} cannot set {', '.join(reserved)}: pulse-railway manages it")
    keep_secret(*env.values(), *build_args.values())
    watched = value(flags, "canary") is not None or value(flags, "bake")
    for name in ("no_promote", "preview"):
        if flags.get(name) and watched:
            option = FLAGS[name].option
            raise Failure(f"{option} excludes --canary and --bake: nobody uses a pending version")
    if (replicas := value(flags, "backend_replicas")) > 1:
        raise Failure(
            f"--backend-replicas {replicas}: Railway does not send a tab to the same replica again;"
            f" --instances {min(replicas, contract.INSTANCES_AT_MOST)} runs as many processes in"
            " one container, and a tab stays on its own"
        )
    check_bake(flags)
    check_evict(flags, "canary", "bake", "no_promote", "preview")
    weights = canary_steps(flags)
    check_move(flags, "no_promote", "preview", "evict", *(["canary"] if len(weights) == 1 else []))
    return from_flags(
        DeployOptions,
        flags,
        app.plugin,
        where=where(flags, app.plugin),
        app=app,
        deployment_id=parse_deployment_id(flags),
        server_address=value(flags, "server_address") or app.server_address,
        image_repository=repository,
        image=image_of(flags, "image", naming.image_reference),
        from_=parse_deployment_id({"deployment_id": flags.get("from_")}),
        keep_instances=flags.get("instances") in UNSET,
        registry=registry_credentials(flags),
        build_args=build_args,
        canary=weights[0] if weights else None,
        steps=weights if len(weights) > 1 else (),
        move_after=move_after(flags),
        promote=not (flags.get("no_promote") or flags.get("preview")),
        notify=notify_url(flags),
    )


def raw_flags(flags: Flags, output: Output) -> Flags:
    """Return the flags as they are, for a verb that reports on each of them."""
    return flags


def parse_image(flags: Flags, output: Output) -> ImageOptions:
    repository = image_of(flags, "repository", naming.image_repository)
    if not repository:
        raise UsageError("which repository? pass --repository, e.g. registry/org/pulse-railway")
    return from_flags(ImageOptions, flags, repository=repository)


# -- what the parsers share --------------------------------------------------------------------


def app_from_flags(flags: Flags, output: Output) -> AppConfig:
    """Return the app of --app, with --service-prefix in the names. Raises Failure."""
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


def prefixed(app_names: Names, prefix: str) -> Names:
    """Return an app's names with another prefix, for a stack that is to be created.

    An existing stack is found by its router, and keeps its names. Raises ValueError for a name that
    Railway would not accept.
    """
    renamed: dict[str, Any] = {}
    for role in ("router", "env", "redis", "janitor"):
        bare = getattr(app_names, role).removeprefix(app_names.prefix)
        renamed[role] = naming.baseline_name(prefix, bare)
    return replace(app_names, prefix=prefix, **renamed)


def where(flags: Flags, plugin: RailwayPlugin | None = None) -> Where:
    """Return the project, environment and token that flags or plugin give.

    Raises Failure if a name and an id are given for the same thing, or the ssh key is unusable.
    """
    for kind in ("workspace", "project", "environment"):
        if flags.get(kind) and flags.get(f"{kind}_id"):
            raise Failure(f"pass --{kind} or --{kind}-id, not both")
    route, key = value(flags, "control"), value(flags, "ssh_key")
    if route not in (None, "ssh", "job"):
        raise Failure(f"--control takes ssh or job, not {route!r}")
    return from_flags(
        Where,
        flags,
        project=value(flags, "project", None if flags.get("project_id") else plugin),
        environment=value(flags, "environment", None if flags.get("environment_id") else plugin),
        ssh_key=private_key_file(key) if key and route != "job" else None,
    )


def names(flags: Flags) -> Names:
    """Return the names for a verb without an app. Raises Failure for one that Railway refuses."""
    router, redis = flags.get("service"), flags.get("redis_service")
    try:
        defaults = prefixed(Names(), naming.service_prefix(flags.get("service_prefix")))
        return replace(
            defaults,
            router=naming.service_name(router) if router else defaults.router,
            redis=naming.service_name(redis) if redis else defaults.redis,
            asked=bool(router),
        )
    except ValueError as error:
        raise Failure(str(error)) from None


def with_router(flags: Flags, app_names: Names) -> Names:
    """Return an app's names with the router of --service.

    Raises Failure if the app names another router.
    """
    if not flags.get("service"):
        return app_names
    router = names(flags).router
    if app_names.asked and router != app_names.router:
        raise Failure(
            f"--service {router} is not the router of this app, {app_names.router}: leave"
            " --service out, or --app (and `app` in invoke.yaml)"
        )
    return replace(app_names, router=router, asked=True)


def need_deployment_id(flags: Flags) -> None:
    if not flags.get("deployment_id"):
        raise UsageError("which deployment? pass its id; `status` lists them")


def image_of(
    flags: Flags, name: str, check: Callable[[str], str], plugin: RailwayPlugin | None = None
) -> str | None:
    """Return the image or repository of a flag. Raises Failure if docker would not take it."""
    text = value(flags, name, plugin)
    try:
        return check(text) if text else None
    except ValueError as error:
        raise Failure(f"{FLAGS[name].option}: {error}") from None


def registry_credentials(flags: Flags) -> RegistryCredentials | None:
    """Return what Railway pulls private images with; None if there is no password.

    The password is read from the file of the flag, else from the environment. Raises Failure for a
    file that cannot be read, and for a user without a password.
    """
    file, password = value(flags, "registry_password_file"), None
    if file:
        try:
            password = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"--registry-password-file {file} cannot be read: {error}") from None
        if not password:
            raise Failure(f"--registry-password-file {file} is empty")
    password = password or os.environ.get(contract.REGISTRY_PASSWORD)
    keep_secret(password)
    username = value(flags, "registry_username")
    if username and not password:
        raise Failure(
            f"there is no password for the registry: set {contract.REGISTRY_PASSWORD}, or pass"
            " --registry-password-file"
        )
    return RegistryCredentials(password, username) if password else None


def parse_deployment_id(flags: Flags) -> str | None:
    text = flags.get("deployment_id")
    try:
        return naming.deployment_id(text) if text else None
    except ValueError as error:
        raise Failure(str(error)) from None


def check_cron(schedule: str) -> None:
    """Raise Failure unless the schedule has five fields and at least five minutes between runs.

    Railway runs no cron service more often (docs.railway.com/reference/cron-jobs).
    """
    fields = schedule.split()
    if len(fields) != 5:
        raise Failure(f"cron schedule {schedule!r} needs five fields, like {contract.DEFAULT_CRON}")
    minute = fields[0]
    step = minute.removeprefix("*/")
    if minute == "*" or (step != minute and step.isdigit() and int(step) < 5):
        raise Failure(f"cron schedule {schedule!r}: Railway runs nothing more often than */5")


def notify_url(flags: Flags) -> str | None:
    """Return the URL of notifications, a secret. Raises Failure if it is no http(s) URL."""
    url = value(flags, "notify")
    keep_secret(url)
    if url and not str(url).startswith(("https://", "http://")):
        raise Failure(f"--notify and {contract.NOTIFY_URL} take an http(s) address")
    return str(url) if url else None
