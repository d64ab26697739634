"""The app that a stack serves.

Its identity is stored in a variable of the router's service and of each backend, so that a deploy
from a wrong folder does not replace the app by another.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, astuple, dataclass

from pulse_railway import contract, provenance
from pulse_railway.config import AppConfig
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import write_variables
from pulse_railway.stack import Stack

TEXT_LIMIT = 500  # characters in a field


@dataclass(frozen=True)
class AppIdentity:
    """The known facts of an app. A field that is None is not compared."""

    name: str | None = None  # RailwayPlugin(name=...)
    repository: str | None = None  # host and path of git's `origin`
    file: str | None = None  # in that repository, or in the context

    @property
    def place(self) -> str:
        return " ".join(filter(None, (self.repository, self.file)))


def of_app(app: AppConfig) -> AppIdentity:
    """Return the identity of an app in this machine's files."""
    remote, folder = provenance.origin(app.context)
    return AppIdentity(app.plugin.name, repository(remote), folder + app.file)


def repository(remote: str | None) -> str | None:
    """Return the host and path of a git remote, the same for its https and ssh addresses.

    Credentials are left out.
    """
    if not remote:
        return None
    parts = re.fullmatch(r"(?:\w+://)?(?:[^@/]*@)?([^/:@]+)(?::\d+)?[:/]+(.+)", remote)
    host_and_path = f"{parts[1]}/{parts[2]}" if parts else remote
    return host_and_path.rstrip("/").removesuffix(".git")[:TEXT_LIMIT]


def stored_identity(stack: Stack) -> AppIdentity:
    """Return the identity in the router's variables, else in those of the newest backend: a router
    that was deleted and created again has none. Fields that are not valid are None."""
    services = [*([stack.router] if stack.router else []), *stack.backends]  # newest first
    text = next((s.variables[contract.APP] for s in services if contract.APP in s.variables), None)
    try:
        stored = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return AppIdentity()
    if not isinstance(stored, dict):
        return AppIdentity()
    valid = {k: v for k, v in stored.items() if isinstance(v, str) and 0 < len(v) <= TEXT_LIMIT}
    return AppIdentity(*(valid.get(name) for name in ("name", "repository", "file")))


def to_json(app: AppIdentity) -> str:
    return json.dumps({k: v for k, v in asdict(app).items() if v})


def require_same_app(stack: Stack, app: AppConfig) -> None:
    """Raise Failure if the stack serves an app of another name than the one that was given."""
    stored, name = stored_identity(stack).name, app.plugin.name
    if stored and name and stored != name:
        raise Failure(
            f"{stack.names.router} serves the app {stored!r}, and --app is {name!r}: name that"
            " app's router (--service, or `RailwayPlugin(router_service=...)`), or leave --app out"
            " (`app` in invoke.yaml, too) to act on this stack"
        )


def check_same_app(stack: Stack, app: AppIdentity, replace: bool, output: Output) -> None:
    """Warn if the last deploy to this stack was from another repository or file.

    Args:
        replace: the stack's app may be replaced by this one; nothing is checked.

    Raises Failure if the stack serves an app of another name.
    """
    stored = stored_identity(stack)
    if replace or (stored.name and stored.name == app.name):
        return
    router = stack.names.router
    if stored.name and app.name:
        raise Failure(
            f"{router} serves the app {stored.name!r}, and this one is {app.name!r}: name its own"
            " router (`RailwayPlugin(router_service=...)`, then `pulse-railway ensure`), or pass"
            " --replace-app"
        )
    for old, new in ((stored.repository, app.repository), (stored.file, app.file)):
        if old and new and old != new:
            output.warn(
                f"{router} serves {stored.place}, and this is {app.place}: if that is another app,"
                " give both a name (`RailwayPlugin(name=...)`) and this one a router of its own"
            )
            return


def merge_stored(stack: Stack, app: AppIdentity, replace: bool) -> AppIdentity:
    """Return `app`, with the stack's values for the fields that are None.

    So a deploy of an app without a name keeps the stack's. With `replace` the result is `app`.
    """
    stored = AppIdentity() if replace else stored_identity(stack)
    pairs = zip(astuple(app), astuple(stored), strict=True)
    return AppIdentity(*(new or old for new, old in pairs))


def store_identity(api: Api, stack: Stack, app: AppIdentity, replace: bool, output: Output) -> None:
    """Store the identity by `merge_stored` if it is new. A failure is a warning."""
    assert stack.router is not None
    app = merge_stored(stack, app, replace)
    if stack.router.variables.get(contract.APP) == to_json(app):
        return
    try:
        write_variables(api, stack.target, stack.router.id, {contract.APP: to_json(app)})
    except Failure as failure:
        output.warn(f"{contract.APP} could not be written: {failure}; the next deploy will")
