"""Reads what a project is made of: its app, packages, lock files and folders."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulse_railway import config
from pulse_railway.apps import app_name, app_variables, apps_in, listed
from pulse_railway.build_context import holds_secrets, read_text
from pulse_railway.errors import Failure

PYTHON_LOCKS = {"uv.lock": "uv", "requirements.txt": "pip"}
NODE_LOCKS = {
    "bun.lock": "bun",
    "bun.lockb": "bun",
    "pnpm-lock.yaml": "pnpm",
    "package-lock.json": "npm",
    "npm-shrinkwrap.json": "npm",
}
NODE_DEPENDENCIES = ("dependencies", "devDependencies", "optionalDependencies")
PYTHON = (3, 13)  # where the project asks for no other


@dataclass(frozen=True)
class Packages:
    """How one half of a project installs its packages."""

    tool: str  # uv, pip; bun, npm, pnpm
    folder: Path  # of the lock file
    lock: str | None  # the lock file's name; None: there is none yet
    needs_code: bool = False  # the lock names files of the project, or of a workspace


@dataclass(frozen=True)
class Layout:
    """A project as it is. Paths are absolute."""

    folder: Path  # where `init` runs
    context: Path  # what is uploaded
    repository: Path | None  # git's
    app: str  # relative to the context, with its variable unless that is `app`
    web_root: Path
    python: Packages
    node: Packages
    member: str | None  # the package of a uv workspace that has the app
    python_version: str
    loaded: bool  # the app could be imported; if not, `has_plugin` and the others are guesses
    has_plugin: bool
    dockerfile: str | None  # the plugin's
    has_address: bool

    def inside(self, path: Path) -> str:
        """Return a path relative to the context."""
        return Path(os.path.relpath(path, self.context)).as_posix()


def find_app(app: str | None, folder: Path) -> str:
    """Return the app as `file` or `file:variable`, relative to the folder.

    It is `app`, else the only one there.

    Raises Failure if there is none, or several.
    """
    file, _, variable = (app or "").partition(":")
    if app:
        if not (folder / file).is_file():
            raise Failure(f"no app at {folder / file}: pass --app path/to/main.py")
        file = config.inside(folder, file, "the app").as_posix()
        variables = [variable] if variable else app_variables(folder / file)
        return app_name(file, variables[0] if len(variables) == 1 else "app")
    candidates = apps_in(folder)
    if len(candidates) != 1:
        more = "" if candidates else ". `pulse-railway init --new` writes a small one"
        raise Failure(
            "which app? pass --app path/to/main.py, a file that makes a ps.App"
            f"{listed(candidates)}{more}"
        )
    return candidates[0]


def read_layout(app: str, folder: Path, warn: Any) -> Layout:
    """Return the layout of the project of an app in `folder`.

    Args:
        app: as `find_app` returns it.
        warn: is called with a sentence if the app cannot be loaded.
    """
    file = app.partition(":")[0]
    source = read_text(folder / file)
    web_root = (folder / file).parent / "web"
    facts: dict[str, Any] = {
        "loaded": False,
        "has_plugin": "RailwayPlugin(" in source,
        "dockerfile": None,
        "has_address": "PULSE_SERVER_ADDRESS" in source,
    }
    try:
        loaded = config.import_app(app, folder)
    except Failure as failure:
        warn(f"{failure}. Its web root and its plugin are guessed")
    else:
        from pulse_railway.app.plugin import plugins_of

        plugins = plugins_of(loaded)
        facts = {
            "loaded": True,
            "has_plugin": len(plugins) == 1,
            "dockerfile": plugins[0].dockerfile if len(plugins) == 1 else None,
            "has_address": bool(getattr(loaded, "server_address", True)),
        }
        web_root = loaded.codegen.cfg.web_root.resolve()
    repository = repository_of(folder)
    top = repository or folder
    python = python_packages((folder / file).parent, top)
    node = node_packages(web_root, top)
    context = Path(os.path.commonpath([folder, python.folder, node.folder, web_root]))
    if context not in (folder, *folder.parents) or top not in (context, *context.parents):
        context = folder  # a web root that is elsewhere: `deploy` says so
    member = None
    if python.tool == "uv":
        project = _above((folder / file).parent, "pyproject.toml", python.folder)
        if project and project != python.folder:
            member = read_toml(project / "pyproject.toml").get("project", {}).get("name")
    return Layout(
        folder=folder,
        context=context,
        repository=repository,
        app=app_name(
            (folder / file).relative_to(context).as_posix(), app.partition(":")[2] or "app"
        ),
        web_root=web_root,
        python=python,
        node=node,
        member=member,
        python_version=python_version(python.folder),
        **facts,
    )


def repository_of(folder: Path) -> Path | None:
    """Return the root of the git repository that holds a folder."""
    return next((p for p in (folder, *folder.parents) if (p / ".git").exists()), None)


def python_packages(start: Path, top: Path) -> Packages:
    """Return how the packages of a folder are installed; a lock file may be above it, up to `top`.

    A pyproject.toml without a lock file is uv's, as in Pulse's own "Getting started".
    """
    for folder in _folders(start, top):
        for lock, tool in PYTHON_LOCKS.items():
            if (folder / lock).is_file():
                check = _uv_needs_code if tool == "uv" else _pip_needs_code
                return Packages(tool, folder, lock, check(folder / lock))
    if project := _above(start, "pyproject.toml", top):
        return Packages("uv", project, None)
    return Packages("pip", start, None)


def node_packages(web_root: Path, top: Path) -> Packages:
    """Return how React's packages are installed.

    A lock file above the web root is a workspace's.
    """
    package = read_json(web_root / "package.json")
    named = [package.get(kind) for kind in NODE_DEPENDENCIES]
    specs = [str(spec) for found in named if isinstance(found, dict) for spec in found.values()]
    names_files = any(spec.startswith(("file:", "link:", "workspace:")) for spec in specs)
    for folder in _folders(web_root, top):
        for lock, tool in NODE_LOCKS.items():
            if (folder / lock).is_file():
                return Packages(tool, folder, lock, names_files or folder != web_root)
    tool = str(package.get("packageManager", "")).partition("@")[0]
    return Packages(tool if tool in NODE_LOCKS.values() else "bun", web_root, None)


def python_version(folder: Path) -> str:
    """Return the Python that a project asks for, as in `3.13`."""
    pinned = folder / ".python-version"
    if pinned.is_file() and (match := re.match(r"\s*3\.(\d+)", read_text(pinned))):
        return f"3.{match[1]}"
    wanted = str(read_toml(folder / "pyproject.toml").get("project", {}).get("requires-python", ""))
    lowest = [int(minor) for minor in re.findall(r"(?:>=|==|~=)\s*3\.(\d+)", wanted)]
    upper = [int(minor) - 1 for minor in re.findall(r"<\s*3\.(\d+)", wanted)]
    exact = [int(minor) for minor in re.findall(r"==\s*3\.(\d+)", wanted)]
    return f"3.{min([max([PYTHON[1], *lowest]), *upper, *exact])}"


def private_registry(folder: Path) -> list[str] | None:
    """Return the variables that a folder's .npmrc names; None without one, or if it has a token."""
    path = folder / ".npmrc"
    if not path.is_file() or holds_secrets(path):
        return None
    return sorted(set(re.findall(r"\$\{(\w+)\}", read_text(path))))


def names_package(python: Packages, package: str) -> bool:
    """Do the project's Python packages name this one?"""
    paths = [python.folder / (python.lock or ""), python.folder / "pyproject.toml"]
    name = package.replace("-", "[-_.]")
    pattern = re.compile(rf"(?<![\w-]){name}(?![\w-])", re.I)
    texts = (re.sub(r"(?m)#.*$", "", read_text(path)) for path in paths if path.is_file())
    return any(pattern.search(text) for text in texts)


def _uv_needs_code(lock: Path) -> bool:
    """Does a uv.lock name files of the project, which have to be there when it is installed?

    The project itself, and a workspace's members, are installed in a second step.
    """
    found = read_toml(lock)
    members = set(found.get("manifest", {}).get("members", []))
    for package in found.get("package", []):
        source = package.get("source", {})
        own = source.get("editable", source.get("virtual"))
        if "path" in source or "directory" in source:
            return True
        if own not in (None, ".") and package.get("name") not in members:
            return True
    return False


def _pip_needs_code(requirements: Path) -> bool:
    """Does a requirements.txt name other files: `-r`, `-c`, `-e`, `./wheels/x.whl`?"""
    return bool(
        re.search(r"(?m)^\s*(-[rce]|--\w+[ =]\.|\.|/|\S+ @ \.|\S+\.whl)", read_text(requirements))
    )


def _folders(start: Path, top: Path) -> list[Path]:
    """Return a folder and those above it, up to `top`; it alone if it is not below `top`."""
    above = [start, *start.parents]
    return above[: above.index(top) + 1] if top in above else [start]


def _above(start: Path, name: str, top: Path) -> Path | None:
    return next((folder for folder in _folders(start, top) if (folder / name).is_file()), None)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path)) if path.is_file() else {}
    except tomllib.TOMLDecodeError as error:
        raise Failure(f"{path} is no TOML: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path)) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise Failure(f"{path} is no JSON: {error}") from None
    return found if isinstance(found, dict) else {}
