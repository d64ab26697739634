"""`doctor`: what a deploy and a running stack need, and what to do where it is not so."""

from __future__ import annotations

import contextlib
import email.utils
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import httpx

from pulse_railway import app_identity, config, contract, options, router_commands, runtime_image
from pulse_railway.advice import pasteable
from pulse_railway.errors import Failure
from pulse_railway.flows import deploy, status
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway import config_files, program, tokens
from pulse_railway.railway.api import Api
from pulse_railway.stack import Stack, inspect, require_baseline

CLOCK_MAY_DIFFER = 60.0  # seconds


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what to do about it."""

    name: str
    verdict: Literal["good", "warning", "bad", "skipped"]
    said: str = ""


@dataclass
class Checkup:
    checks: list[Check] = field(default_factory=list)

    def note(self, name: str, verdict: Literal["good", "warning", "bad"], said: str = "") -> None:
        self.checks.append(Check(name, verdict, said))

    def tried(self, name: str, look: Callable[[], str | None]) -> bool:
        """Look, and note what was found; a Failure is what is wrong."""
        try:
            self.note(name, "good", look() or "")
            return True
        except Failure as failure:
            self.note(name, "bad", str(failure))
        except (httpx.HTTPError, OSError) as error:
            self.note(name, "bad", str(error) or type(error).__name__)
        return False

    def skip(self, *names: str, because: str) -> None:
        self.checks += [Check(name, "skipped", f"after {because}") for name in names]


class Warnings(Output):
    """What a flow would say; only its warnings are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        yield

    def warn(self, line: str) -> None:
        self.kept.append(line)


def doctor(flags: dict[str, Any], output: Output) -> dict[str, Any]:
    """Look at everything, also behind what is wrong. Returns `checks` and `ok`; ok is False where
    any of it would make a first deploy or a running stack fail."""
    found = Checkup()
    plan = check_app(found, flags)
    api = check_token(found, flags, output)
    if api is None:
        found.skip(
            "Railway's CLI", "the project", "the baseline", "the router", because="the token"
        )
    else:
        has_cli = check_programs(found, plan, api)
        check_stack(found, flags, plan, api, has_cli)
    checks = [replace(check, said=pasteable(check.said)) for check in found.checks]
    bad = any(check.verdict == "bad" for check in checks)
    return {"ok": not bad, "checks": [asdict(check) for check in checks]}


def check_app(found: Checkup, flags: dict[str, Any]) -> deploy.Plan | None:
    """The app, its files, and what `deploy` would warn of before it begins."""
    quiet = Warnings()
    made: list[DeployOptions] = []

    def load() -> str:
        made.append(options.parse_deploy(flags, quiet))
        return f"{made[0].app.file}, with its RailwayPlugin"

    if not found.tried("the app", load):
        found.skip("its files and settings", "React's packages", because="the app")
        return None
    plans: list[deploy.Plan] = []
    found.tried("its files and settings", lambda: plans.append(deploy.check(made[0], quiet)))
    for line in quiet.kept:
        found.note("its files and settings", "warning", line)
    for said in (
        config_files.without_effect(made[0].app.context),
        config_files.would_delete(made[0].app.context),
    ):
        if said:
            found.note("Railway's configuration files", "warning", said)
    check_react(found, made[0])
    return plans[0] if plans else None


def check_react(found: Checkup, wanted: DeployOptions) -> None:
    """React's side of Pulse has to be of Python's version."""
    path = wanted.app.context / (wanted.web_root or wanted.app.web_root) / "package.json"
    try:
        client = json.loads(path.read_text())["dependencies"]["pulse-ui-client"]
        framework = version("pulse-framework")
    except (OSError, ValueError, KeyError, TypeError, PackageNotFoundError):
        found.note("React's packages", "warning", f"{path} names no pulse-ui-client")
        return
    if str(client).lstrip("^~=v") != framework:
        said = f"pulse-ui-client is {client} and pulse-framework {framework}: give both one version"
        found.note("React's packages", "bad", said)
    else:
        found.note("React's packages", "good", f"pulse-ui-client {client}")


def check_programs(found: Checkup, plan: deploy.Plan | None, api: Api) -> bool:
    """The programs that will be needed. Returns whether Railway's CLI can be used."""
    if plan and plan.image:
        found.tried("docker", lambda: program.need("docker"))
        if plan.wanted.where.control == "job":
            return False

    def look() -> str:
        program.need_railway(api)
        return ".".join(map(str, program.program_version("railway")))

    return found.tried("Railway's CLI", look)


def check_token(found: Checkup, flags: dict[str, Any], output: Output) -> Api | None:
    made: list[Api] = []

    def look() -> str:
        api = Api(tokens.find(flags.get("token")), on_wait=output.waiting)
        made.append(api)
        lasting = "" if api.token.durable else ", which `ensure` cannot give to the janitor"
        api.check_token()
        return f"from {api.token.source}{lasting}"

    if not found.tried("the token", look):
        return None
    found.tried("the clock", lambda: check_clock(made[0].url))
    return made[0]


def check_clock(url: str) -> str:
    """A clock that is wrong makes certificates and sessions look expired. Raises Failure."""
    answer = httpx.get(url, timeout=10)
    try:
        moment = email.utils.parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except ValueError:  # a server need not say it (RFC 9110 section 6.6.1)
        return ""
    if abs(time.time() - moment) > CLOCK_MAY_DIFFER:
        raise Failure(f"this machine's clock is {time.time() - moment:.0f} s off: set it")
    return ""


def check_identity(found: Checkup, plan: deploy.Plan, stack: Stack) -> None:
    said = Warnings()

    def look() -> str:
        app = app_identity.of_app(plan.app)
        app_identity.check_same_app(stack, app, plan.wanted.replace_app, said)
        return app.name or app.place

    if found.tried("which app the stack serves", look):
        for line in said.kept:
            found.note("which app the stack serves", "warning", line)


def check_stack(
    found: Checkup,
    flags: dict[str, Any],
    plan: deploy.Plan | None,
    api: Api,
    has_cli: bool,
) -> None:
    where = plan.wanted.where if plan else options.where(flags)
    seen: list[Stack] = []

    def project() -> str:
        target = config.find_target(api, where)
        target = replace(target, control_route=config.ControlRoute(where.control, where.ssh_key))
        names = plan.app.names if plan else options.names(flags)
        seen.append(inspect(api, target, names))
        return f"{len(seen[0].services)} services"

    if not found.tried("the project", project):
        found.skip("the baseline", "the router", because="the project")
        return
    stack = seen[0]
    if not found.tried("the baseline", lambda: require_baseline(stack)):
        found.skip("the router", because="the baseline")
        return
    check_versions(found, stack)
    if plan:
        found.tried("PULSE_SECRET", lambda: deploy.check_secret(plan, stack))
        check_identity(found, plan, stack)

    def tell(state: dict[str, Any] | None) -> None:
        for problem in [*status.problems(stack, state, None), *status.of_regions(api, stack)]:
            found.note("the deployments" if state else "on Railway", "bad", problem)

    if not has_cli and where.control != "job":
        tell(None)
        found.skip("the router", because="Railway's CLI")
        return

    def ask() -> str:
        try:
            state = router_commands.read_state(api, stack, pauses=(1.0,))
        except Failure:
            tell(None)  # which may be why
            raise
        tell(state)
        by = stack.target.control_route.kind or "ssh"
        return f"answers, by {by}; {state['active'] or 'none'} is active"

    found.tried("the router", ask)
    if stack.target.control_route.kind != "job":
        check_relay(found)


def check_versions(found: Checkup, stack: Stack) -> None:
    for service in (stack.router, stack.janitor):
        assert service is not None
        runs = service.variables.get(contract.RUNTIME_VERSION)
        here = runtime_image.runtime_version()
        if runs == here or (service.image and runs == service.image):
            found.note(service.name, "good", str(runs))
        else:
            said = f"runs {runs}, and this is {here}: run `pulse-railway ensure`"
            found.note(service.name, "warning", said)


def check_relay(found: Checkup) -> None:
    """ssh has to know the relay's key: in a CI nobody can be asked."""
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        return
    known = subprocess.run([keygen, "-F", "ssh.railway.com"], capture_output=True, timeout=10)
    if known.returncode:
        said = (
            "ssh does not know ssh.railway.com yet: `ssh-keyscan ssh.railway.com`, see docs/ci.md"
        )
        found.note("known hosts", "warning", said)
    else:
        found.note("known hosts", "good")
