"""The app that is deployed, and the project and environment that a verb acts on."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pulse_railway import contract
from pulse_railway.apps import apps_in, listed
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway import documents, tokens
from pulse_railway.railway.api import Api, ApiError

if TYPE_CHECKING:
    import pulse as ps

    from pulse_railway.app.plugin import RailwayPlugin


@dataclass(frozen=True)
class Names:
    """The names of a stack's services."""

    router: str = contract.DEFAULT_ROUTER
    env: str = contract.DEFAULT_ENV
    redis: str = contract.DEFAULT_REDIS
    janitor: str = contract.DEFAULT_JANITOR
    prefix: str = ""
    asked: bool = False  # the user named the router: no other router counts


@dataclass(frozen=True)
class Where:
    """The project, environment and token that a user has given for a verb; None: not given."""

    token: str | None = field(default=None, repr=False)
    workspace: str | None = None
    workspace_id: str | None = None
    project: str | None = None
    project_id: str | None = None
    environment: str | None = None
    environment_id: str | None = None
    control: Literal["ssh", "job"] | None = None
    ssh_key: Path | None = None


@dataclass
class ControlRoute:
    """The way of control commands to the router: by `railway ssh`, or by the janitor (`job`).

    With None the first command chooses: ssh if there is a key that Railway accepts, else the
    janitor.
    """

    kind: Literal["ssh", "job"] | None = None
    key: Path | None = None  # the private key that the user has given, or that was found
    info: Callable[[str], None] = lambda _: None  # prints a line for the user
    checked: bool = False  # ssh is possible
    clock: float | None = None  # what the store's clock is ahead of time.monotonic()


@dataclass(frozen=True)
class Target:
    """The project and environment that a verb acts on."""

    project_id: str
    environment_id: str
    control_route: ControlRoute = field(default_factory=ControlRoute, compare=False)


@dataclass(frozen=True)
class AppConfig:
    """An app's own configuration, from its file and its RailwayPlugin."""

    file: str  # relative to the context
    context: Path
    names: Names
    server_address: str | None  # the app's own; None: it has the one that `deploy` sets, or none
    has_address: bool  # without an address Pulse does not start in production
    web_root: Path
    internal_address: str
    uses_session_store: bool
    needs_secret: bool  # sessions are stored in cookies, which PULSE_SECRET signs
    plugin: RailwayPlugin
    variables: frozenset[str] = frozenset()  # of the environment, which its import has read


# -- the app -----------------------------------------------------------------------------------


def inside(context: Path, path: str | Path, label: str) -> Path:
    """Return `path` relative to the context. Raises Failure, with the label, if it is outside."""
    full = (context / path).resolve()
    try:
        return full.relative_to(context.resolve())
    except ValueError:
        raise Failure(
            f"{label} {full} is outside the deploy context {context}: pass --context "
            "with a folder that holds it"
        ) from None


def import_app(app: str | None, context: Path, variables: set[str] | None = None) -> ps.App:
    """Import an app's file, as `pulse` does in a build.

    Args:
        app: `path/to/main.py` or `path/to/main.py:variable`, relative to `context`.
        variables: gets the names of those that the import reads from the environment.

    Raises Failure if there is no such file, or its import fails.
    """
    if not app:
        raise Failure(
            "which app? pass --app path/to/main.py, or set `app` in invoke.yaml"
            f"{listed(apps_in(context))}"
        )
    if not context.is_dir():
        raise Failure(f"the context {context} is not a folder: pass --context")
    file, _, variable = app.partition(":")
    if Path(file).is_absolute():
        raise Failure(f"--app {file} must be relative to the deploy context {context}")
    path = (context / file).resolve()
    if not path.is_file():
        raise Failure(f"no app at {path}: pass --app path/to/main.py")
    inside(context, path, "the app")
    noted: set[str] = set() if variables is None else variables
    with _build_environment(context, path), noting_variables(noted):
        loaded = _import(path, variable or "app", context)
    if loaded.codegen.cfg.base_dir is None:
        loaded.codegen.cfg.base_dir = path.parent
    return loaded


def load_app(app: str | None, context: Path) -> AppConfig:
    """Import an app's file, and read its RailwayPlugin.

    Args:
        app: `path/to/main.py` or `path/to/main.py:variable`, relative to `context`.

    Raises Failure if there is no such file, its import fails, or it does not have exactly one
    RailwayPlugin.
    """
    variables: set[str] = set()
    loaded = import_app(app, context, variables)
    assert app
    file, _, variable = app.partition(":")
    relative = inside(context, file, "the app")
    from pulse_railway.app.plugin import plugin_of, web_root
    from pulse_railway.app.session import RailwaySessionStore

    try:
        plugin = plugin_of(loaded)
    except ValueError as error:
        raise Failure(f"{file}: {error}") from None
    # a later Pulse has no `server_address`, nor `internal_server_address` below
    address = getattr(loaded, "server_address", _PLACEHOLDER_ADDRESS)
    return AppConfig(
        file=str(relative) + (f":{variable}" if variable else ""),
        context=context.resolve(),
        names=Names(
            plugin.router_service,
            plugin.env_service,
            plugin.redis_service,
            plugin.janitor_service,
            plugin.service_prefix,
            asked=plugin.router_is_named,
        ),
        server_address=None if address == _PLACEHOLDER_ADDRESS else address,
        has_address=bool(address),
        web_root=web_root(loaded),
        # RailwayPlugin sets it where the app does not
        internal_address=getattr(loaded, "internal_server_address", None)
        or DEFAULT_INTERNAL_ADDRESS,
        uses_session_store=isinstance(loaded.session_store, RailwaySessionStore),
        needs_secret=getattr(loaded.session_store, "secret", None) == _PLACEHOLDER_SECRET.encode(),
        plugin=plugin,
        variables=frozenset(variables),
    )


DEFAULT_INTERNAL_ADDRESS = "http://127.0.0.1"  # of a Pulse that has no setting for it
_PLACEHOLDER_ADDRESS = "https://set-by-deploy.invalid"
_PLACEHOLDER_SECRET = "none, while the app is being looked at"


@contextlib.contextmanager
def _build_environment(context: Path, app: Path) -> Iterator[None]:
    """Set the environment and folder of Pulse's build, while the app is imported."""
    environment, folder = dict(os.environ), Path.cwd()
    os.environ.update(
        PULSE_ENV="ci",
        PULSE_APP_FILE=str(app),
        PULSE_APP_DIR=str(app.parent),
        PULSE_SECRET=_PLACEHOLDER_SECRET,
    )
    for name in (contract.SERVER_ADDRESS, contract.PUBLIC_ORIGIN):
        os.environ.setdefault(name, _PLACEHOLDER_ADDRESS)
    os.chdir(context)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)


def _import(path: Path, variable: str, context: Path) -> ps.App:
    from pulse.cli.helpers import load_app_from_target

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return load_app_from_target(f"{path}:{variable}").app
    except (Exception, SystemExit) as error:
        cause = error.__context__  # Pulse prints it and raises another
        lines = [line.strip() for line in printed.getvalue().splitlines() if line.strip()]
        reason = lines[-1] if lines else str(error) or type(error).__name__
        if cause is not None:
            said = " ".join(str(cause).split())[:300]
            reason = f"{type(cause).__name__}: {said}{_place(cause, context)}"
        raise Failure(f"{path} cannot be loaded: {reason}") from None


def _place(error: BaseException, context: Path) -> str:
    """Return the last line of the project that an error passed through, for a message."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(context.resolve()) + os.sep
    own = [f for f in frames if f.filename.startswith(root) and "site-packages" not in f.filename]
    return f" ({own[-1].filename.removeprefix(root)}, line {own[-1].lineno})" if own else ""


@contextlib.contextmanager
def noting_variables(names: set[str]) -> Iterator[None]:
    """Add the environment variables that are read meanwhile, and that are set."""
    environ: Any = type(os.environ)
    read, iterate = environ.__getitem__, environ.__iter__

    def note(self: Any, name: str) -> str:
        value: str = read(self, name)
        names.add(name)
        return value

    def note_all(self: Any) -> Iterator[str]:
        for name in iterate(self):
            names.add(name)
            yield name

    environ.__getitem__, environ.__iter__ = note, note_all
    try:
        yield
    finally:
        environ.__getitem__, environ.__iter__ = read, iterate


# -- the target --------------------------------------------------------------------------------


def find_target(api: Api, where: Where) -> Target:
    """Return the project and environment of a run: by flags, token, or Railway's variables.

    Raises Failure if a name matches none or several (the message lists them), or no project is
    given.
    """
    project_id, environment_id = where.project_id, where.environment_id
    project = None if project_id else where.project
    environment = None if environment_id else where.environment
    if scope := api.scope():
        _check_workspace(api, where, scope["projectId"])
        return _scoped(scope, project, project_id, environment, environment_id)
    if not project and not project_id:
        project_id = os.environ.get("RAILWAY_PROJECT_ID")
        if not environment and not environment_id:
            environment_id = os.environ.get("RAILWAY_ENVIRONMENT_ID")
    if not project and not project_id:
        api.check_token()  # an invalid token is the first thing to report
        raise Failure(
            "which project? pass --project (or --project-id), set it on RailwayPlugin, or use a"
            " project token"
        )
    if project_id:
        _check_workspace(api, where, project_id)
    if project_id and environment_id:
        return Target(project_id, environment_id)
    if project_id:
        data = api.call(documents.ENVIRONMENTS, project=project_id)
        environments = _nodes(data["environments"])
    else:
        assert project is not None
        by_name = _project_by_name(api, project, where)
        project_id, environments = by_name["id"], _nodes(by_name["environments"])
    if environment_id:
        if environment_id not in [e["id"] for e in environments]:
            raise Failure(f"the project has no environment with id {environment_id}")
        return Target(project_id, environment_id)
    name = environment or contract.DEFAULT_ENVIRONMENT
    return Target(project_id, _one_named("environment", name, environments)["id"])


def _check_workspace(api: Api, where: Where, project_id: str) -> None:
    """Raise Failure unless the project is in the workspace that was given, if one was."""
    if not where.workspace and not where.workspace_id:
        return
    data = api.call(documents.WORKSPACE_OF, project=project_id)["project"]
    its_name = (data["workspace"] or {}).get("name")
    if where.workspace_id not in (None, data["workspaceId"]) or where.workspace not in (
        None,
        its_name,
    ):
        raise Failure(
            f"the project is in workspace {its_name}, not in"
            f" {where.workspace or where.workspace_id}"
        )


def _scoped(
    scope: dict[str, Any],
    project: str | None,
    project_id: str | None,
    environment: str | None,
    environment_id: str | None,
) -> Target:
    """Return a project token's environment. Raises Failure if another one was given."""
    its_project, its_environment = scope["project"]["name"], scope["environment"]["name"]
    if project not in (None, its_project) or project_id not in (None, scope["projectId"]):
        raise Failure(
            f"the project token is for project {its_project}, not {project or project_id}"
        )
    if environment not in (None, its_environment) or environment_id not in (
        None,
        scope["environmentId"],
    ):
        raise Failure(
            f"the project token is for environment {its_environment},"
            f" not {environment or environment_id}"
        )
    return Target(scope["projectId"], scope["environmentId"])


def _nodes(connection: dict[str, Any]) -> list[dict[str, Any]]:
    return [edge["node"] for edge in connection["edges"]]


def _project_by_name(api: Api, name: str, where: Where) -> dict[str, Any]:
    workspace, workspace_id = where.workspace, where.workspace_id
    try:
        data = api.call(documents.MY_PROJECTS)
    except ApiError:  # a workspace token has no `me`
        spaces = api.call(documents.API_TOKEN)["apiToken"]["workspaces"]
        if workspace:
            workspace_id = _one_named("workspace", workspace, spaces)["id"]
        data = api.call(documents.PROJECTS, workspace=workspace_id)
        return _one_named("project", name, _nodes(data["projects"]))
    spaces = [
        {**space, "projects": _nodes(space["projects"])} for space in data["me"]["workspaces"]
    ] + data["externalWorkspaces"]
    if workspace:
        spaces = [_one_named("workspace", workspace, spaces)]
    if workspace_id:
        spaces = [space for space in spaces if space["id"] == workspace_id]
        if not spaces:
            raise Failure(f"the token sees no workspace with id {workspace_id}")
    projects = {p["id"]: p for space in spaces for p in space["projects"]}
    return _one_named("project", name, list(projects.values()))


def _one_named(kind: str, name: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    matches = [item for item in items if item["name"] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(item["id"] for item in matches)
        more = " or narrow it with --workspace" if kind == "project" else ""
        raise Failure(f"several {kind}s are named {name}: pass --{kind}-id ({ids}){more}")
    names = sorted(item["name"] for item in items)
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise Failure(f"no {kind} is named {name}; there are: {', '.join(names) or 'none'}{hint}")


def resolve_target(where: Where, output: Output) -> tuple[Api, Target]:
    """Return the API with this run's token, and the target of the run. Raises Failure."""
    api = Api(tokens.find_token(where.token), on_wait=output.waiting)
    with output.step("find the project"):
        target = find_target(api, where)
    said = os.environ.get("RAILWAY_ENVIRONMENT_ID")  # Railway sets it in its containers, too
    if (scope := api.scope()) and said and said != target.environment_id:
        output.warn(
            f"the project token is for environment {scope['environment']['name']}, which is worked"
            " on; RAILWAY_ENVIRONMENT_ID names another"
        )
    return api, replace(
        target, control_route=ControlRoute(where.control, where.ssh_key, output.info)
    )
