"""Projects of users, as their tools make them: the files of each, and where `init` is run."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

from pulse_railway.flows.project_layout import Layout, find_app, read_layout

PULSE = version("pulse-framework")

# Pulse's own "Getting started", but for the names
GETTING_STARTED = """\
from pathlib import Path
import pulse as ps

@ps.component
def home():
    return ps.div("Hello Pulse")

app = ps.App(
    routes=[ps.Route("/", home)],
    codegen=ps.CodegenConfig(web_dir=Path(__file__).parent / "web"),
)
"""
# with what `init` asks for, and what starts at once in place of Pulse
WITH_PLUGIN = GETTING_STARTED.replace(
    "app = ps.App(",
    "from pulse_railway import RailwayPlugin\n\napp = ps.App(\n"
    '    plugins=[RailwayPlugin(dockerfile="Dockerfile", start_command="python backend.py")],\n'
    "    session_store=ps.InMemorySessionStore(),",
)
PYPROJECT = """\
[project]
name = "shop"
version = "0.1.0"
requires-python = ">=3.12"
dependencies = ["pulse-framework", "pulse-railway"]
"""
UV_LOCK = """\
version = 1
requires-python = ">=3.12"

[[package]]
name = "shop"
version = "0.1.0"
source = { virtual = "." }
dependencies = [{ name = "pulse-framework" }, { name = "pulse-railway" }]

[package.metadata]
requires-dist = [{ name = "pulse-framework" }, { name = "pulse-railway" }]
"""
NEEDS = {"pulse-ui-client": PULSE, "react": "^19.2.3"}
PACKAGE = json.dumps({"name": "web", "dependencies": NEEDS})
BUN_LOCK = json.dumps(
    {"lockfileVersion": 1, "workspaces": {"": {"name": "web", "dependencies": NEEDS}}}
)
NPM_LOCK = json.dumps({"lockfileVersion": 3, "packages": {"": {"dependencies": NEEDS}}})
PNPM_LOCK = f"""\
lockfileVersion: '9.0'
importers:
  .:
    dependencies:
      pulse-ui-client:
        specifier: {PULSE}
        version: {PULSE}
      react:
        specifier: ^19.2.3
        version: 19.2.3
"""
REQUIREMENTS = f"pulse-framework=={PULSE}\npulse-railway\nhttpx  # the app's own\n"
MEMBER = UV_LOCK.replace('virtual = "."', 'editable = "apps/shop"').replace(
    "[[package]]", '[manifest]\nmembers = ["shop", "billing"]\n\n[[package]]'
)

# name: the folder where `init` is run, and the files
LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "uv-bun": (
        ".",
        {
            "app.py": WITH_PLUGIN,
            "pyproject.toml": PYPROJECT,
            "uv.lock": UV_LOCK,
            ".python-version": "3.12\n",
            "web/package.json": PACKAGE,
            "web/bun.lock": BUN_LOCK,
        },
    ),
    "pip-npm": (
        ".",
        {
            "main.py": WITH_PLUGIN,
            "requirements.txt": REQUIREMENTS,
            "web/package.json": PACKAGE,
            "web/package-lock.json": NPM_LOCK,
        },
    ),
    "pip-pnpm": (
        ".",
        {
            "main.py": WITH_PLUGIN,
            "requirements.txt": "-e ./lib\n",
            "web/package.json": PACKAGE,
            "web/pnpm-lock.yaml": PNPM_LOCK,
            "web/.npmrc": "//npm.example/:_authToken=${NPM_TOKEN}\n",
        },
    ),
    "monorepo": (
        "apps/shop",
        {
            "pyproject.toml": '[tool.uv.workspace]\nmembers = ["apps/*"]\n',
            "uv.lock": MEMBER,
            "package.json": json.dumps({"name": "all", "workspaces": ["apps/*/web"]}),
            "bun.lock": json.dumps(
                {"workspaces": {"": {}, "apps/shop/web": {"name": "web", "dependencies": NEEDS}}}
            ),
            "apps/shop/pyproject.toml": PYPROJECT,
            "apps/shop/app.py": WITH_PLUGIN.replace(
                '"Dockerfile"', '"apps/shop/Dockerfile"'
            ).replace("python backend.py", "python apps/shop/backend.py"),
            "apps/shop/web/package.json": PACKAGE,
        },
    ),
}


def write(name: str, folder: Path) -> Path:
    """Write a layout's files into a git repository, and return the folder where `init` is run."""
    at, files = LAYOUTS[name]
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder / at


def make(name: str, folder: Path) -> Layout:
    """Write a layout's files, and return what `init` reads of them."""
    start = write(name, folder)
    return read_layout(find_app(None, start), start, print)
