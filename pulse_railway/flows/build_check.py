"""What `deploy` and `doctor` check of a build before there is one.

No secrets are in it, the files that it copies are there, and its import of the app works.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from invoke.vendor import yaml

from pulse_railway import contract
from pulse_railway.build_context import (
    assignments,
    file_sources,
    instructions,
    missing_sources,
    read_text,
    secrets_in_image,
)
from pulse_railway.errors import Failure
from pulse_railway.flows import project_layout
from pulse_railway.flows.project_layout import Packages
from pulse_railway.options import DeployOptions
from pulse_railway.railway import upload


def build_arguments(options: DeployOptions, web_root: Path, address: str) -> dict[str, str]:
    """Return the arguments of the image's build."""
    return {
        contract.APP_FILE: options.app.file,
        contract.WEB_ROOT: web_root.as_posix(),
        contract.SERVER_ADDRESS: address,
        **options.build_args,
    }


def check_build(options: DeployOptions, dockerfile: Path, web_root: Path) -> None:
    """Raise Failure if the image would hold secrets, or the build lacks a file.

    Args:
        dockerfile, web_root: relative to the context.
    """
    context = options.app.context
    variables = build_arguments(options, web_root, options.server_address or "https://x.invalid")
    if options.image_repository:
        if secret_files := secrets_in_image(context, context / dockerfile):
            raise Failure(
                f"the image would hold {', '.join(secret_files)}: name them in"
                f" {context / '.dockerignore'}, or copy less in {dockerfile}"
            )
    else:
        check_upload(options, dockerfile, web_root)
    if missing := missing_sources(context, context / dockerfile, variables):
        raise Failure(
            f"the build would fail: {dockerfile} copies {', '.join(missing)}, and"
            f" {context} has no such file, or .dockerignore leaves it out"
        )
    check_import(options, context / dockerfile, variables)
    if options.image_repository:
        return
    for path in file_sources(context / dockerfile, variables):
        if reason := upload.left_out(context, Path(path), gitignore=not options.no_gitignore):
            raise Failure(
                f"the build would fail: {dockerfile} copies {path}, which would not be uploaded:"
                f" {reason}"
            )


def check_upload(options: DeployOptions, dockerfile: Path, web_root: Path) -> None:
    """Raise Failure if the upload lacks what the build needs, or holds secrets."""
    context, gitignore = options.app.context, not options.no_gitignore
    app = Path(options.app.file.partition(":")[0])
    for label, path in (("Dockerfile", dockerfile), ("app", app), ("web root", web_root)):
        if reason := upload.left_out(context, path, gitignore=gitignore):
            raise Failure(f"the {label} {path} would not be uploaded: {reason}")
    if files := upload.secrets_in_upload(context, gitignore=gitignore):
        raise Failure(
            f"the upload would hold {', '.join(files[:5])}{' and more' if len(files) > 5 else ''}:"
            f" name them in {context / '.railwayignore'}"
        )


# -- the build's own import of the app ---------------------------------------------------------

HARMLESS = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
# what the child of `check_import` runs; a .env is no part of an image
IMPORT = """
import sys
from pathlib import Path
import dotenv.main
dotenv.main.DotEnv.parse = lambda self: iter(())
from pulse_railway import config, errors
try:
    config.import_app(sys.argv[1], Path(sys.argv[2]))
except errors.Failure as failure:
    print(failure)
"""
IMPORT_TIMEOUT = 120  # seconds


def check_import(options: DeployOptions, dockerfile: Path, variables: Mapping[str, str]) -> None:
    """Raise Failure if the app's import needs a variable that is set here, and not in the build.

    The app is imported a second time only if the Dockerfile imports it (`pulse generate`), and the
    first import has read such a variable.
    """
    there = {name: os.environ[name] for name in HARMLESS if name in os.environ}
    runs_pulse = False
    for instruction in instructions(dockerfile):
        if instruction.name == "RUN" and re.search(r"\bpulse (generate|check)\b", instruction.rest):
            runs_pulse = True
            there |= dict(re.findall(r"\b([A-Za-z_]\w*)=(\S*)", instruction.rest))
        for name, value in assignments(instruction):
            # in source mode Railway gives an ARG the service's variable
            default = os.environ.get(name) if not options.image_repository else None
            if (found := variables.get(name, value if value is not None else default)) is not None:
                there[name] = found
    if "PATH" in os.environ:  # an image's own has other folders
        there["PATH"] = os.environ["PATH"]
    absent = {n for n in options.app.variables - there.keys() if not n.startswith(("PULSE_", "_"))}
    if not runs_pulse or not absent:
        return
    command = [sys.executable, "-c", IMPORT, options.app.file, str(options.app.context)]
    try:
        done = subprocess.run(
            command,
            env=there,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return  # it may only be slow
    if problem := done.stdout.strip():
        named = [n for n in sorted(absent) if re.search(rf"\b{n}\b", problem)] or sorted(absent)
        raise Failure(
            "the build imports the app without the variables of pulse-env and .env, and would"
            f" fail: {problem}. Read {' and '.join(named)} when it is used, or with a"
            f" default (os.environ.get), or name it in an ARG of {dockerfile.name} and pass"
            " --build-arg NAME=..."
        )


# -- lock files --------------------------------------------------------------------------------


def lock_problems(options: DeployOptions, web_root: Path) -> list[str]:
    """Return which lock files do not fit, with which an install that is locked fails."""
    app = options.app
    folder = (app.context / app.file.partition(":")[0]).parent
    top = project_layout.repository_of(folder) or app.context
    found = [
        uv_problem(project_layout.python_packages(folder, top), folder),
        node_problem(project_layout.node_packages(web_root, top), web_root),
    ]
    return [problem for problem in found if problem]


def uv_problem(python: Packages, folder: Path) -> str | None:
    """Return what differs between a pyproject.toml and its uv.lock."""
    if python.tool != "uv":
        return None
    if python.lock is None:
        return f"{python.folder} has no uv.lock: `uv lock`"
    project = next((p for p in (folder, *folder.parents) if (p / "pyproject.toml").is_file()), None)
    if project is None:
        return None
    wanted = project_layout.read_toml(project / "pyproject.toml").get("project", {})
    lock = project_layout.read_toml(python.folder / python.lock)
    name = _normal(str(wanted.get("name", "")))
    locked = next((p for p in lock.get("package", []) if _normal(p.get("name", "")) == name), None)
    if locked is None:
        return f"{python.folder / python.lock} does not name {name}: `uv lock`"
    names = {
        _normal(re.split(r"[^\w.-]", text.strip())[0]) for text in wanted.get("dependencies", [])
    }
    there = {_normal(entry["name"]) for entry in locked.get("dependencies", [])}
    if missing := sorted(names - there):
        return f"{python.folder / python.lock} lacks {', '.join(missing)}: `uv lock`"
    return None


def node_problem(node: Packages, web_root: Path) -> str | None:
    """Return what differs between a package.json and its lock file."""
    remedy = f"`{node.tool} install` in {node.folder}"
    if node.lock is None:
        return f"{web_root} has no lock file: {remedy}"
    package = project_layout.read_json(web_root / "package.json")
    text = read_text(node.folder / node.lock) if node.lock != "bun.lockb" else ""
    wanted = {
        name: spec
        for kind in ("dependencies", "devDependencies")
        for name, spec in dict(package.get(kind) or {}).items()
    }
    at = web_root.relative_to(node.folder).as_posix()
    try:
        if node.tool == "npm":
            locked = json.loads(text)["packages"]["" if at == "." else at]
        elif node.lock == "bun.lock":  # JSON with trailing commas
            locked = json.loads(re.sub(r",(?=\s*[}\]])", "", text))["workspaces"]
            locked = locked["" if at == "." else at]
        elif node.tool == "pnpm":
            loaded = yaml.safe_load(text)  # type: ignore[no-untyped-call]
            locked = loaded["importers"][at]
        else:
            return None
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        return f"{node.folder / node.lock} does not have {at or 'it'}: {remedy}"
    there = {**(locked.get("dependencies") or {}), **(locked.get("devDependencies") or {})}
    if node.tool == "pnpm":
        there = {name: entry["specifier"] for name, entry in there.items()}
    if differ := sorted(name for name in wanted if there.get(name) != wanted[name]):
        return (
            f"{node.folder / node.lock} differs from package.json in {', '.join(differ)}: {remedy}"
        )
    return None


def _normal(name: str) -> str:
    """Return a package's name as PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()
