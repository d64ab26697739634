"""`doctor`: check what a deploy and a running stack need, and print how to correct it."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import httpx

from pulse_railway import app_identity, config, contract, options, router_commands
from pulse_railway.advice import pasteable
from pulse_railway.build_context import read_text
from pulse_railway.errors import Failure
from pulse_railway.flows import build_check, deploy, instances, status
from pulse_railway.flows.baseline import NO_PROJECT_TOKEN
from pulse_railway.flows.init import page_without_script
from pulse_railway.flows.project_layout import read_json
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway import config_files, docker, documents, program, tokens
from pulse_railway.railway.api import Api, ApiError
from pulse_railway.railway.clock import clock_difference
from pulse_railway.railway.tokens import Token
from pulse_railway.stack import Stack, address_without_secrets, inspect, require_baseline


@dataclass(frozen=True)
class Check:
    """The result of one check, as the verb's JSON has it."""

    name: str
    verdict: Literal["good", "warning", "bad", "skipped"]
    said: str = ""  # details, or what to do


@dataclass
class Checkup:
    """The results of all checks so far."""

    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, verdict: Literal["good", "warning", "bad"], details: str = "") -> None:
        self.checks.append(Check(name, verdict, details))

    def run(self, name: str, check: Callable[[], str | None]) -> bool:
        """Run a check, and add its result. Returns False if it raises a Failure or a network error.

        Args:
            check: returns details.
        """
        try:
            self.add(name, "good", check() or "")
            return True
        except Failure as failure:
            self.add(name, "bad", str(failure))
        except (httpx.HTTPError, OSError) as error:
            self.add(name, "bad", str(error) or type(error).__name__)
        return False

    def skip(self, *names: str, because: str) -> None:
        """Add checks that are not possible because another one has failed."""
        self.checks += [Check(name, "skipped", f"after {because}") for name in names]


class Warnings(Output):
    """An output that collects a flow's warnings, and prints nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        yield

    def warn(self, line: str) -> None:
        self.lines.append(line)


def doctor(flags: dict[str, Any], output: Output) -> dict[str, Any]:
    """Run all checks, also after a failed one. Returns `checks` and `ok`.

    `ok` is False if a check has found what makes a first deploy or a running stack fail.
    """
    checkup = Checkup()
    plan = check_app(checkup, flags)
    api = check_token(checkup, flags, output)
    if api is None:
        checkup.skip(
            "Railway's CLI", "the project", "the baseline", "the router", because="the token"
        )
    else:
        has_cli = check_programs(checkup, plan, api)
        check_stack(checkup, flags, plan, api, has_cli)
    checks = [replace(check, said=pasteable(check.said)) for check in checkup.checks]
    bad = any(check.verdict == "bad" for check in checks)
    return {"ok": not bad, "checks": [asdict(check) for check in checks]}


def check_app(checkup: Checkup, flags: dict[str, Any]) -> deploy.Plan | None:
    """Check the app and its files as `deploy` does. Returns the plan, or None."""
    warnings = Warnings()
    parsed: list[DeployOptions] = []

    def load() -> str:
        parsed.append(options.parse_deploy(flags, warnings))
        return f"{parsed[0].app.file}, with its RailwayPlugin"

    if not checkup.run("the app", load):
        checkup.skip("its files and settings", "React's packages", because="the app")
        return None
    plans: list[deploy.Plan] = []
    checkup.run("its files and settings", lambda: plans.append(deploy.check(parsed[0], warnings)))
    for line in warnings.lines:
        checkup.add("its files and settings", "warning", line)
    for warning in (
        config_files.without_effect(parsed[0].app.context),
        config_files.would_delete(parsed[0].app.context),
    ):
        if warning:
            checkup.add("Railway's configuration files", "warning", warning)
    if (count := parsed[0].instances) > 1:
        size = instances.size_warning(count, parsed[0].vcpus, parsed[0].memory_gb)
        said = f"{count} instances: {instances.ALIKE}" + (f". {size}" if size else "")
        checkup.add("its processes", "warning", said)
    check_react(checkup, parsed[0])
    if plans:
        check_locks(checkup, plans[0])
    return plans[0] if plans else None


def check_react(checkup: Checkup, deploy_options: DeployOptions) -> None:
    """Check that Pulse's npm package and its Python package have the same version, and that the
    pages load affinity.js."""
    app = deploy_options.app
    web = app.context / (deploy_options.web_root or app.web_root)
    if page := page_without_script(web):
        said = f"{page} does not load {contract.SCRIPT_PATH}: see docs/first-deploy.md"
        checkup.add("the affinity script", "warning", said)
    path = web / "package.json"
    try:
        client = str(read_json(path)["dependencies"]["pulse-ui-client"])
        framework = version("pulse-framework")
    except (Failure, OSError, KeyError, TypeError, PackageNotFoundError):
        checkup.add("React's packages", "warning", f"{path} names no pulse-ui-client")
        return
    differ = f"pulse-ui-client is {client} and pulse-framework {framework}: give both one version"
    if not client.lstrip("^~=v")[:1].isdigit():  # a workspace's, a file
        checkup.add("React's packages", "warning", differ)
    elif client.lstrip("^~=v") != framework:
        checkup.add("React's packages", "bad", differ)
    else:
        checkup.add("React's packages", "good", f"pulse-ui-client {client}")


def check_locks(checkup: Checkup, plan: deploy.Plan) -> None:
    """Check that the lock files fit, and that they name pulse-railway.

    Where the Dockerfile installs without a lock, one that does not fit is a warning.
    """
    app, name = plan.app, "the lock files"
    text = read_text(app.context / plan.dockerfile) if plan.is_source or plan.image else ""
    strict = re.search(r"uv sync .*--locked|--frozen-lockfile|\bnpm\b.* ci\b", text)
    try:
        problems = build_check.lock_problems(plan.options, app.context / plan.web_root)
    except Failure as failure:
        problems = [str(failure)]
    for problem in problems:
        checkup.add(name, "bad" if strict else "warning", problem)
    if not problems:
        checkup.add(name, "good")


def check_programs(checkup: Checkup, plan: deploy.Plan | None, api: Api) -> bool:
    """Check the programs that `deploy` runs. Returns whether Railway's CLI can be used."""
    if plan and plan.options.image_repository:
        checkup.run("docker", docker.need_buildx)
        if plan.options.where.control == "job":
            return False

    def railway_version() -> str:
        program.need_railway(api)
        return ".".join(map(str, program.program_version("railway")))

    return checkup.run("Railway's CLI", railway_version)


def check_token(checkup: Checkup, flags: dict[str, Any], output: Output) -> Api | None:
    """Check the token, and this machine's clock. Returns the API, or None without a valid token."""
    apis: list[Api] = []

    def token_source() -> str:
        api = Api(tokens.find_token(flags.get("token")), on_wait=output.waiting)
        apis.append(api)
        expires = "" if api.token.durable else ", which `ensure` cannot give to the janitor"
        api.check_token()
        return f"from {api.token.source}{expires}"

    if not checkup.run("the token", token_source):
        return None
    checkup.run("the clock", lambda: check_clock(apis[0].url))
    return apis[0]


def check_clock(url: str) -> None:
    """Compare this machine's clock with the server's `Date`.

    With a wrong clock certificates and sessions look expired. Raises Failure.
    """
    if difference := clock_difference(url):
        raise Failure(f"this machine's clock is {difference:.0f} s off: set it")


def check_identity(checkup: Checkup, plan: deploy.Plan, stack: Stack) -> None:
    """Check that the stack serves this app, as `deploy` does."""
    warnings = Warnings()

    def same_app() -> str:
        app = app_identity.of_app(plan.app)
        app_identity.check_same_app(stack, app, plan.options.replace_app, warnings)
        return app.name or app.place

    if checkup.run("which app the stack serves", same_app):
        for line in warnings.lines:
            checkup.add("which app the stack serves", "warning", line)


def check_stack(
    checkup: Checkup,
    flags: dict[str, Any],
    plan: deploy.Plan | None,
    api: Api,
    has_cli: bool,
) -> None:
    """Check the project, the baseline, the deployments and the router, as far as possible."""
    where = plan.options.where if plan else options.where(flags)
    stacks: list[Stack] = []

    def read_project() -> str:
        target = config.find_target(api, where)
        target = replace(target, control_route=config.ControlRoute(where.control, where.ssh_key))
        names = plan.app.names if plan else options.names(flags)
        stacks.append(inspect(api, target, names))
        return f"{len(stacks[0].services)} services"

    if not checkup.run("the project", read_project):
        checkup.skip("the baseline", "the router", because="the project")
        return
    stack = stacks[0]
    if not checkup.run("the baseline", lambda: require_baseline(stack)):
        checkup.skip("the router", because="the baseline")
        return
    check_versions(checkup, stack)
    check_janitor_token(checkup, api, stack)
    if url := stack.session_redis_url:
        checkup.run("the Redis of the sessions", lambda: check_session_redis(url))
    if plan:
        checkup.run("PULSE_SECRET", lambda: deploy.check_secret(plan, stack))
        check_identity(checkup, plan, stack)

    def add_problems(state: dict[str, Any] | None) -> None:
        for problem in [*status.problems(stack, state, None), *status.region_problems(api, stack)]:
            checkup.add("the deployments" if state else "on Railway", "bad", problem)

    if not has_cli and where.control != "job":
        add_problems(None)
        checkup.skip("the router", because="Railway's CLI")
        return

    def ask() -> str:
        try:
            state = router_commands.read_state(api, stack, pauses=(1.0,))
        except Failure:
            add_problems(None)  # one of them may be the cause
            raise
        add_problems(state)
        if down := state["maintenance"]:
            since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(down["since"]))
            said = f"on since {since}: nobody gets the app; `pulse-railway maintenance off` ends it"
            checkup.add("maintenance", "warning", said)
        for warning in redis_warnings(state.get("redis") or {}):
            checkup.add("the router's Redis", "warning", warning)
        by = stack.target.control_route.kind or "ssh"
        return f"answers, by {by}; {state['active'] or 'none'} is active"

    checkup.run("the router", ask)
    if stack.target.control_route.kind != "job":
        check_relay(checkup)


FULL = 0.9  # of maxmemory
WRONG_TOKEN = (
    "the janitor's Railway token does not open this environment: run `pulse-railway ensure` with a"
    " project token of it as RAILWAY_TOKEN"
)


def redis_warnings(facts: Mapping[str, Any]) -> list[str]:
    """Return what can lose the routing state or the sessions, by what Redis says of itself."""
    warnings = []
    policy, limit = facts.get("maxmemory_policy"), int(facts.get("maxmemory") or 0)
    if limit and str(policy).startswith("allkeys"):
        warnings.append(
            f"maxmemory-policy is {policy}: it can evict the routing state; set noeviction, or a"
            " volatile- policy, which evicts sessions alone"
        )
    used = int(facts.get("used_memory") or 0)
    if limit and used > FULL * limit:
        warnings.append(
            f"{used * 100 // limit} % of maxmemory are used ({limit // 2**20} MB): give it more"
        )
    if facts.get("save") == "" and not facts.get("aof_enabled"):
        warnings.append(
            "its data do not outlive a restart, with which all sessions end: set `save` or"
            " `appendonly yes`, and give it a volume"
        )
    return warnings


def check_versions(checkup: Checkup, stack: Stack) -> None:
    """Check that router and janitor run this version of pulse-railway, or the image they have."""
    for service in (stack.router, stack.janitor):
        assert service is not None
        if problem := status.version_problem(service):
            checkup.add(service.name, "warning", problem)
        else:
            checkup.add(service.name, "good", str(service.variables[contract.RUNTIME_VERSION]))


def check_janitor_token(checkup: Checkup, api: Api, stack: Stack) -> None:
    """Check, by a call with it, that the janitor's token opens this environment, and no other."""
    name, token = "the janitor's token", str(stack.runtime_token)
    environment = stack.target.environment_id

    def opened() -> str:
        if (of_project := api.environment_of(token)) is not None:
            if of_project != environment:
                raise Failure(WRONG_TOKEN)
            return "a project token of this environment"
        try:
            janitors = Api(Token(token, "the janitor"))
            project = janitors.call(documents.ENVIRONMENTS, project=stack.target.project_id)
        except ApiError:
            raise Failure(WRONG_TOKEN) from None
        edges = project["environments"]["edges"]
        if environment not in {edge["node"]["id"] for edge in edges}:
            raise Failure(WRONG_TOKEN)
        checkup.add(name, "warning", NO_PROJECT_TOKEN)
        return "opens this environment"

    checkup.run(name, opened)
    assert stack.router is not None
    if stack.router.variables.get(contract.RAILWAY_TOKEN) not in (None, "", contract.NO_TOKEN):
        said = f"{stack.names.router} has {contract.RAILWAY_TOKEN}, which it does not need"
        checkup.add(name, "warning", f"{said}: `pulse-railway ensure` takes it away")


def check_session_redis(url: str) -> str:
    """Return the address of the apps' sessions without secrets. Raises Failure for a wrong one."""
    if problem := options.session_redis_problem(url):
        raise Failure(
            f"its address is wrong: {problem}. `pulse-railway ensure --session-redis-url` writes"
            " another"
        )
    return address_without_secrets(url)


def check_relay(checkup: Checkup) -> None:
    """Check that ssh knows the relay's host key: a CI run cannot confirm it."""
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        return
    known = subprocess.run([keygen, "-F", "ssh.railway.com"], capture_output=True, timeout=10)
    if known.returncode:
        unknown = "ssh does not know ssh.railway.com yet"
        checkup.add(
            "known hosts", "warning", f"{unknown}: `ssh-keyscan ssh.railway.com`, see docs/ci.md"
        )
    else:
        checkup.add("known hosts", "good")
