"""`init`: write the files that an app needs for its deployment and does not have."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from invoke.vendor import yaml
from pathspec import GitIgnoreSpec

from pulse_railway import __version__, config, contract
from pulse_railway.build_context import read_text
from pulse_railway.errors import Failure
from pulse_railway.flows import project_files
from pulse_railway.flows.project_layout import (
    Layout,
    find_app,
    names_package,
    private_registry,
    read_layout,
)
from pulse_railway.output import Output
from pulse_railway.railway import config_files

PLUGIN = """\
import os

from pulse_railway import RailwayPlugin, RailwaySessionStore

app = ps.App(
    ...,
    plugins=[RailwayPlugin(dockerfile="{dockerfile}")],
    session_store=RailwaySessionStore(),
    server_address=os.environ.get("PULSE_SERVER_ADDRESS"),
)
"""


@dataclass(frozen=True)
class File:
    path: Path
    purpose: str
    content: str
    appended: bool = False  # to a file that is there


def init(
    app: str | None, folder: Path, output: Output, *, new: bool = False, show: bool = False
) -> dict[str, Any]:
    """Write the missing files.

    Of files that are there, .gitignore and invoke.yaml get the lines that they lack, at their end.

    Args:
        app: the app's file, relative to the folder.
        new: write a small app, where there is none.
        show: print the files' text.

    Returns the files `written`, those that were `there`, and `todo`, what the author has to do.
    Raises Failure if there is no app, or a file cannot be written.
    """
    folder = folder.resolve()
    written: list[str] = []
    if new:
        written.append(write_app(app, folder, output))
        app = app or written[0]
    layout = read_layout(find_app(app, folder), folder, output.warn)
    existing = []
    for file in files(layout):
        name = Path(os.path.relpath(file.path, folder)).as_posix()
        if file.path.exists() and not file.appended:
            existing.append(name)
            output.info(f"  {name} is there, and stays as it is")
            continue
        write(file)
        written.append(name)
        output.info(f"{'~' if file.appended else '+'} {name}: {file.purpose}")
        if show:
            for line in file.content.splitlines():
                output.log(line)
    if danger := config_files.would_delete(layout.context):
        output.warn(danger)
    return {"app": layout.app, "written": written, "there": existing, "todo": todo(layout)}


def write_app(app: str | None, folder: Path, output: Output) -> str:
    """Write the smallest app, and return its name. Raises Failure if that file is there."""
    path = folder / (app or "main.py")
    if path.exists():
        raise Failure(f"{path} is there: `init` without --new writes what it lacks")
    write(File(path, "", project_files.APP))
    output.info(f"+ {path.name}: a small app")
    return path.relative_to(folder).as_posix()


def write(file: File) -> None:
    """Write a file, or append to it, with the line ends that it has. Raises Failure."""
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        before = file.path.read_bytes() if file.appended else b""
        text = file.content.encode()
        if b"\r\n" in before:
            text = text.replace(b"\n", b"\r\n")
        if before and not before.endswith(b"\n"):
            text = b"\n" + text
        file.path.write_bytes(before + text)
    except OSError as error:
        raise Failure(
            f"{file.path} cannot be written ({error.strerror}): run `init` where you may write"
        ) from None


def files(layout: Layout) -> list[File]:
    """Return all files that `init` writes, and what it appends."""
    folder, context = layout.folder, layout.context
    dockerfile = folder / "Dockerfile"
    if layout.dockerfile:
        dockerfile = context / config.inside(context, layout.dockerfile, "the Dockerfile")
    ignore = context / ".dockerignore"
    if dockerfile.parent != context:  # Docker reads the one beside it first
        ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore")
    found = [
        File(
            dockerfile,
            f"Python's server ({layout.python.tool}) and React's ({layout.node.tool}) in one image",
            project_files.dockerfile(layout),
        ),
        File(ignore, "what no image may hold", project_files.dockerignore(layout)),
        File(
            context / ".railwayignore", "what is not uploaded", project_files.railwayignore(layout)
        ),
        File(folder / ".env.example", "the variables to copy to .env", project_files.ENVIRONMENT),
        File(
            project_files.workflow_path(layout),
            "a deploy for every push to main",
            project_files.workflow(layout),
        ),
        File(folder / "tasks.py", "the verbs for `invoke`", project_files.TASKS),
    ]
    if layout.python.tool == "pip" and layout.python.lock is None:
        path = layout.python.folder / "requirements.txt"
        found.append(File(path, "what the app runs on; add its own packages", requirements()))
    return [*found, *_configuration(layout), *_gitignore(layout)]


def _configuration(layout: Layout) -> list[File]:
    """Return what invoke.yaml lacks: a section of another tool's file is not changed."""
    path, text = layout.folder / "invoke.yaml", project_files.configuration(layout)
    if not path.exists():
        return [File(path, "flags that every run has", text)]
    try:
        found = _yaml(read_text(path)) or {}
        has_none = isinstance(found, dict) and "pulse_railway" not in found
        if has_none and _yaml(f"{read_text(path)}\n{text}") == {**found, **_yaml(text)}:
            return [File(path, "flags that every run has", f"\n{text}", appended=True)]
    except yaml.YAMLError:
        pass
    return [File(path, "", text)]  # stays as it is


def _yaml(text: str) -> Any:
    return yaml.safe_load(text)  # type: ignore[no-untyped-call]


def _gitignore(layout: Layout) -> list[File]:
    """Return the lines that keep secrets out of git, where no .gitignore has them yet."""
    top = layout.repository or layout.folder
    lines = []
    for folder in (layout.folder, *layout.folder.parents):
        if (folder / ".gitignore").is_file():
            for line in read_text(folder / ".gitignore").split("\n"):
                try:
                    lines.append(GitIgnoreSpec.from_lines([line.rstrip("\r")]))
                except ValueError:
                    continue
        if folder == top:
            break
    path = layout.folder / ".gitignore"
    if not path.exists() and not lines:
        text = "\n".join(project_files.NOT_COMMITTED) + "\n"
        return [File(path, "what is not committed", text)]
    wanted = {".env": ".env", ".local-railway": ".local-railway/state.json"}
    missing = [n for n, at in wanted.items() if not any(spec.match_file(at) for spec in lines)]
    if not missing:
        return []
    text = "\n".join(missing) + "\n"
    return [File(path, f"{' and '.join(missing)}, not committed", text, appended=path.exists())]


def requirements() -> str:
    """Return requirements.txt for a project that has none."""
    own = package_source()
    line = f"pulse-railway @ {own}" if own else f"pulse-railway=={__version__}"
    if is_local(own):
        line = f"# pulse-railway: this one, from {own}, is not on the index"
    return f"pulse-framework=={_installed('pulse-framework')}\n{line}\n"


def package_source() -> str | None:
    """Return where this pulse-railway was installed from; None: from the index.

    A version that is not on the index must not be pinned. See PEP 610.
    """
    try:
        found = distribution("pulse-railway").read_text("direct_url.json")
    except PackageNotFoundError:
        return str(Path(__file__).parents[2])
    if found is None:
        return None
    direct = json.loads(found)
    if version_control := direct.get("vcs_info"):
        return f"{version_control['vcs']}+{direct['url']}@{version_control['commit_id']}"
    return str(direct["url"]).removeprefix("file://")


def is_local(source: str | None) -> bool:
    """Is a package that was installed from there out of a build's reach?"""
    return source is not None and not source.startswith(("git+", "https:"))


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "0"


def page_without_script(web: Path) -> Path | None:
    """Return the root of the React project in `web` if no file beside it names affinity.js."""
    root = web / "app" / "root.tsx"
    if not root.is_file():
        return None
    sources = root.parent.glob("*.[jt]sx")
    loads = any(contract.SCRIPT_PATH in path.read_text(errors="replace") for path in sources)
    return None if loads else root


def todo(layout: Layout) -> list[str]:
    """Return what the app's author has to do, in this order."""
    dockerfile = layout.inside(layout.folder / "Dockerfile")
    web, node = layout.inside(layout.web_root), layout.node
    app = layout.app
    steps = []
    if not layout.has_plugin:
        steps.append(f"give the app in {app} the plugin:\n\n{PLUGIN.format(dockerfile=dockerfile)}")
    elif not layout.has_address:
        steps.append(
            f'pass server_address=os.environ.get("PULSE_SERVER_ADDRESS") to ps.App in {app}'
        )
    if layout.has_plugin and layout.loaded and not layout.dockerfile:
        steps.append(f'pass dockerfile="{dockerfile}" to RailwayPlugin')
    steps += _packages_to_add(layout)
    if not (layout.web_root / "package.json").exists():
        steps.append(
            f"the React Router project that Pulse renders with goes into {web}/, with package.json"
            ' and a lock file: Pulse\'s "Getting started" says how, and examples/railway/web of'
            " pulse-railway's repository is one"
        )
    elif node.lock is None:
        install = f"{node.tool} install"
        steps.append(f"write {web}/{project_files.DEFAULT_LOCK[node.tool]}: `{install}` in {web}")
    if (node.folder / ".npmrc").exists():
        registry = private_registry(node.folder)
        if registry is None:
            path = layout.inside(node.folder / ".npmrc")
            steps.append(
                f"{path} has a token, and is left out: write ${{NPM_TOKEN}} in its place, delete"
                " the Dockerfile and the ignore files, and run `init` again"
            )
        elif registry:
            flags = " ".join(f"--build-arg {name}=..." for name in registry)
            steps.append(f"pass what .npmrc names: `pulse-railway deploy {flags}`")
    if page := page_without_script(layout.web_root):
        tag = f'<script src="{contract.SCRIPT_PATH}" />'
        steps.append(f"put {tag} first into the <head> of {layout.inside(page)}")
    steps.append("put a Railway token into .env, as .env.example has it")
    steps.append("`pulse-railway doctor` checks that nothing is missing")
    steps.append("`pulse-railway ensure`, once; then `pulse-railway deploy`")
    return steps


def _packages_to_add(layout: Layout) -> list[str]:
    """Return what the project's Python packages lack."""
    python, steps = layout.python, []
    missing = [
        name for name in ("pulse-framework", "pulse-railway") if not names_package(python, name)
    ]
    own = package_source()
    if "pulse-railway" in missing and is_local(own):
        missing.remove("pulse-railway")
        name = f"pulse_railway-{__version__}-py3-none-any.whl"
        add = f"`uv add ./{name}`" if python.tool == "uv" else f"`./{name}` in requirements.txt"
        steps.append(
            f"this pulse-railway, from {own}, is not on the index, and a build cannot install it:"
            f" put its wheel into the project, and name it: {add}; then run `init` again without"
            " the Dockerfile"
        )
    if missing and python.tool == "uv":
        steps.insert(0, f"`uv add {' '.join(missing)}`")
    elif missing and python.lock:
        path = layout.inside(python.folder / python.lock)
        steps.insert(0, f"add {' and '.join(missing)} to {path}")
    if python.tool == "uv" and python.lock is None:
        steps.append("write uv.lock: `uv lock`")
    return steps
