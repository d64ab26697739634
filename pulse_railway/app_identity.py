"""Which app a stack serves. The router's service remembers it, so that another app does not take
its place by a deploy from the wrong folder."""

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

TEXT_LIMIT = 500  # characters of a field


@dataclass(frozen=True)
class AppIdentity:
    """What is known of an app; None: not said, and compared with nothing."""

    name: str | None = None  # RailwayPlugin(name=...)
    repository: str | None = None  # host and path of git's `origin`
    file: str | None = None  # in that repository, or in the context

    @property
    def place(self) -> str:
        return " ".join(filter(None, (self.repository, self.file)))


def of_app(app: AppConfig) -> AppIdentity:
    remote, folder = provenance.origin(app.context)
    return AppIdentity(app.plugin.name, repository(remote), folder + app.file)


def repository(remote: str | None) -> str | None:
    """A remote's host and path: one name for its https and ssh addresses, and no credentials."""
    if not remote:
        return None
    found = re.fullmatch(r"(?:\w+://)?(?:[^@/]*@)?([^/:@]+)(?::\d+)?[:/]+(.+)", remote)
    host_and_path = f"{found[1]}/{found[2]}" if found else remote
    return host_and_path.rstrip("/").removesuffix(".git")[:TEXT_LIMIT]


def stored_identity(stack: Stack) -> AppIdentity:
    """What the router's service says. What is not understood says nothing."""
    text = stack.router.variables.get(contract.APP) if stack.router else None
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return AppIdentity()
    if not isinstance(found, dict):
        return AppIdentity()
    usable = {k: v for k, v in found.items() if isinstance(v, str) and 0 < len(v) <= TEXT_LIMIT}
    return AppIdentity(*(usable.get(name) for name in ("name", "repository", "file")))


def to_json(app: AppIdentity) -> str:
    return json.dumps({k: v for k, v in asdict(app).items() if v})


def check_same_app(stack: Stack, app: AppIdentity, replace: bool, output: Output) -> None:
    """Warn where another repository or file was deployed to this stack last.

    Raises Failure where the stack serves an app of another name, unless it is to be replaced."""
    known = stored_identity(stack)
    if replace or (known.name and known.name == app.name):
        return
    router = stack.names.router
    if known.name and app.name:
        raise Failure(
            f"{router} serves the app {known.name!r}, and this one is {app.name!r}: name its own"
            " router (`RailwayPlugin(router_service=...)`, then `pulse-railway ensure`), or pass"
            " --replace-app"
        )
    for was, is_now in ((known.repository, app.repository), (known.file, app.file)):
        if was and is_now and was != is_now:
            output.warn(
                f"{router} serves {known.place}, and this is {app.place}: if that is another app,"
                " give both a name (`RailwayPlugin(name=...)`) and this one a router of its own"
            )
            return


def merge_stored(stack: Stack, app: AppIdentity, replace: bool) -> AppIdentity:
    """`app`, and what it does not say as the stack knows it: a deploy of an app without a name does
    not take the stack's. With `replace`, nothing is left of the app before."""
    known = AppIdentity() if replace else stored_identity(stack)
    return AppIdentity(*(new or old for new, old in zip(astuple(app), astuple(known), strict=True)))


def store_identity(api: Api, stack: Stack, app: AppIdentity, replace: bool, output: Output) -> None:
    """Note it, as `merge_stored` has it, where it is new. A failure is no reason to fail."""
    assert stack.router is not None
    app = merge_stored(stack, app, replace)
    if stack.router.variables.get(contract.APP) == to_json(app):
        return
    try:
        write_variables(api, stack.target, stack.router.id, {contract.APP: to_json(app)})
    except Failure as failure:
        output.warn(f"{contract.APP} could not be written: {failure}; the next deploy will")
