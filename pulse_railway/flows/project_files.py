"""The files that `init` writes, as texts for one project's layout."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pulse_railway.build_context import (
    EXAMPLE_FILES,
    PRIVATE_FOLDERS,
    SECRET_FILES,
    SKIPPED_FOLDERS,
)
from pulse_railway.flows.project_layout import Layout, private_registry

APP = """\
import os

import pulse as ps
from pulse_railway import RailwayPlugin, RailwaySessionStore


@ps.component
def home():
    return ps.div()["Hello"]


app = ps.App(
    routes=[ps.Route("/", render=home)],
    plugins=[RailwayPlugin(dockerfile="Dockerfile")],
    session_store=RailwaySessionStore(),  # sessions outlive a deployment
    server_address=os.environ.get("PULSE_SERVER_ADDRESS"),  # `deploy` sets it
)
"""

CONFIGURATION = """\
# What every run has in common: any flag of any verb (`pulse-railway deploy --help`).
pulse_railway:
  app: {app}{context}
  # project: shop             # a project token says it by itself
  # lock_wait: 600            # seconds to wait for another deploy
  # bake: 300                 # seconds to watch a new version; it goes back where it does worse
  # bake_latency_ms: 800      # or where clearly fewer than 99 % of its answers begin in this time
"""

ENVIRONMENT = """\
# Copy it to .env, which is neither committed nor uploaded. One of the two tokens.
RAILWAY_TOKEN=            # a project token: Railway, project settings, Tokens
# RAILWAY_API_TOKEN=      # an account's or a workspace's; then set `project` in invoke.yaml
# PULSE_RAILWAY_NOTIFY_URL=
"""

TASKS = '''\
"""`invoke deploy`, `invoke status`: pulse-railway's verbs, and tasks of your own beside them."""

from invoke import Collection
from pulse_railway import tasks as railway

ns = Collection.from_module(railway)
'''

# -- what is left out --------------------------------------------------------------------------

NOT_COMMITTED = (".env", ".env.*", "!.env.example", ".local-railway", *SKIPPED_FOLDERS, ".venv")
REACT_CACHES = (".react-router", ".pulse")


def kept_npmrc(layout: Layout) -> str | None:
    """Return the path of an .npmrc that the build needs: it has no token."""
    folder = layout.node.folder
    return None if private_registry(folder) is None else layout.inside(folder / ".npmrc")


def dockerignore(layout: Layout) -> str:
    """Return the ignore file of the image's build. Docker roots a pattern without `**/`."""
    lines = ["# Not for an image: secrets, history, and what is this machine's own."]
    names = (*SECRET_FILES, *PRIVATE_FOLDERS, *SKIPPED_FOLDERS, *REACT_CACHES, ".github")
    lines += [f"**/{name}" for name in names]
    lines += [f"!**/{name}" for name in EXAMPLE_FILES]
    if npmrc := kept_npmrc(layout):
        lines.append(f"!{npmrc}")
    return "\n".join(lines) + "\n"


def railwayignore(layout: Layout) -> str:
    """Return the ignore file of the upload, in .gitignore's syntax."""
    lines = ["# Not uploaded: secrets, and what is this machine's own."]
    lines += [*SECRET_FILES, *(f"!{name}" for name in EXAMPLE_FILES)]
    lines += [*PRIVATE_FOLDERS, *SKIPPED_FOLDERS, *REACT_CACHES]
    if npmrc := kept_npmrc(layout):
        lines.append(f"!/{npmrc}")
    return "\n".join(lines) + "\n"


# -- the image ---------------------------------------------------------------------------------

INSTALL_NODE = {
    "npm": "npm ci --no-audit --no-fund",
    "bun": "bun install --frozen-lockfile",
    "pnpm": "pnpm install --frozen-lockfile",
}
# without the packages that only the build needs
PRUNE_NODE = {
    "npm": "npm prune --omit=dev --no-audit --no-fund",
    "bun": "rm -rf node_modules && bun install --frozen-lockfile --production",
    "pnpm": "pnpm prune --prod",
}
DEFAULT_LOCK = {"npm": "package-lock.json", "bun": "bun.lock", "pnpm": "pnpm-lock.yaml"}


def dockerfile(layout: Layout, requirements: str | None = None) -> str:
    """Return the Dockerfile: both halves of the app in one image.

    Args:
        requirements: where it finds pip's requirements, if not where the layout has them.
    """
    web = "${PULSE_WEB_ROOT}"
    registry = private_registry(layout.node.folder)
    code_first = layout.python.needs_code or layout.node.needs_code
    lines = [
        "# A Pulse app for Railway: the Python server, and beside it React Router's for its pages.",
        "# `deploy` passes these three. A build has no variables of pulse-env: pass those it needs",
        "# with `deploy --build-arg NAME=value`, and name them in an ARG.",
        f"ARG PULSE_APP_FILE={_word(layout.app)}",
        f"ARG PULSE_WEB_ROOT={_word(layout.inside(layout.web_root))}",
        "ARG PULSE_SERVER_ADDRESS",
        "",
        "FROM node:22-slim AS node",
        "",
        f"FROM python:{layout.python_version}-slim AS build",
        "COPY --from=node /usr/local/ /usr/local/",
        *(
            ["COPY --from=oven/bun:1-slim /usr/local/bin/bun /usr/local/bin/bun"]
            if layout.node.tool == "bun"
            else []
        ),
        "WORKDIR /app",
        "ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1",
        *_tools(layout),
        "ARG PULSE_WEB_ROOT",
        *(f"ARG {name}" for name in registry or []),
    ]
    first, then = _python(layout, requirements)
    if not code_first:
        lines.append(
            "# Packages are installed before the code is copied, so that a change of code installs"
            " nothing."
        )
        lines += first
    at, install = _node(layout)
    if not code_first:
        names = ["package.json", layout.node.lock or DEFAULT_LOCK[layout.node.tool]]
        names += [".npmrc"] if registry is not None else []
        lines.append(f"COPY {' '.join(f'{web}/{name}' for name in names)} {web}/")
        lines += [install, "COPY . ."]
    else:
        lines += ["COPY . .", install]
        then = then or first[-1:]
    lines += then
    clean = ["node_modules/typescript", "node_modules/.bin/ts[cs]*"]
    if layout.node.tool != "npm":  # their stores keep it for a package that can do without
        clean.append(f"node_modules/.{layout.node.tool}/typescript@*")
    clean += [".npmrc"] if registry is not None else []
    lines += [
        "ARG PULSE_APP_FILE",
        "ARG PULSE_SERVER_ADDRESS",
        "ENV PULSE_ENV=ci",
        "# Pulse writes the routes, then React Router builds them with the browser's address.",
        'RUN pulse generate "$PULSE_APP_FILE" --ci \\',
        f' && (cd "$PULSE_WEB_ROOT" && {layout.node.tool} run build) \\',
        f" && cd {at} && {PRUNE_NODE[layout.node.tool]} \\",
        f" && rm -rf {' '.join(clean)} && cd /app \\",
        *_hoisted(layout),
        " # each start writes the routes again, and a lock",
        ' && mkdir -p "$PULSE_WEB_ROOT/.pulse" \\',
        " && chmod -R a+rX . \\",
        ' && chmod -R a+rwX "$PULSE_WEB_ROOT/.pulse" "$PULSE_WEB_ROOT/app"',
        "",
        f"FROM python:{layout.python_version}-slim",
        "RUN python -m pip uninstall --yes --root-user-action=ignore pip",
        "COPY --from=node /usr/local/bin/node /usr/local/bin/node",
        "COPY --from=build /venv /venv",
        "COPY --from=build /app /app",
        "WORKDIR /app",
        "ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1",
        "USER 10001:10001",
        "# SIGTERM reaches uvicorn, and the app's shutdown hooks run",
        'CMD ["pulse-railway", "serve"]',
    ]
    return "\n".join(lines) + "\n"


def _word(text: str) -> str:
    """Return a value of an ARG, or a word of a command, in quotes where it needs them."""
    return text if re.fullmatch(r"[\w./:@+-]+", text) else f'"{text}"'


def _copy(*words: str) -> str:
    """Return a COPY; of paths with spaces, as a JSON list."""
    if any(" " in word for word in words):
        return f"COPY {json.dumps(words, ensure_ascii=False)}"
    return f"COPY {' '.join(words)}"


def _tools(layout: Layout) -> list[str]:
    lines = []
    if layout.python.tool == "uv":
        lines += [
            "ENV UV_PROJECT_ENVIRONMENT=/venv UV_PYTHON=/usr/local/bin/python3 \\",
            "    UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1",
            "RUN pip install --no-cache-dir uv",
        ]
    else:
        lines.append("RUN python -m venv --without-pip /venv")
    if layout.node.tool == "pnpm":
        lines += ["ENV CI=true", "RUN npm install --global --no-fund pnpm@10"]
    return lines


def _python(layout: Layout, requirements: str | None) -> tuple[list[str], list[str]]:
    """Return the lines before the code is copied, and after it."""
    at = layout.inside(layout.python.folder)
    here = "" if at == "." else f"{at}/"
    if layout.python.tool == "pip":
        source = requirements or f"{here}requirements.txt"
        target = "./" if requirements or not here else here
        name = "requirements.txt" if target == "./" else source
        # in the folder of the file, since a path in it is relative
        pip = "pip --python /venv/bin/python install --no-cache-dir -r"
        if layout.python.needs_code and here:
            return [f"RUN cd {_word(at)} && {pip} requirements.txt"], []
        return [_copy(source, target), f"RUN {pip} {_word(name)}"], []
    sync = "uv sync --no-dev" + (f" --project {_word(at)}" if here else "")
    sync += f" --package {layout.member}" if layout.member else ""
    last = [f"RUN {sync} --locked --no-editable"]
    if layout.python.needs_code:
        return [], last
    # of a workspace, the members' own files are not there yet
    only = "--frozen --no-install-workspace" if layout.member else "--locked --no-install-project"
    copy = _copy(f"{here}pyproject.toml", f"{here}uv.lock", here or "./")
    return [copy, f"RUN {sync} {only}"], last


def _node(layout: Layout) -> tuple[str, str]:
    """Return where React's packages are installed, in the shell's words, and the line that does."""
    is_workspace = layout.node.folder != layout.web_root
    folder = f"/app/{layout.inside(layout.node.folder)}".removesuffix("/.")
    at = _word(folder) if is_workspace else '"/app/$PULSE_WEB_ROOT"'
    return at, f"RUN cd {at} && {INSTALL_NODE[layout.node.tool]}"


def _hoisted(layout: Layout) -> list[str]:
    """Return the lines that let Pulse find React's server, which it looks for in the web root: a
    workspace's tool can have it in the folder of the lock file."""
    if layout.node.folder == layout.web_root:
        return []
    folder = f"/app/{layout.inside(layout.node.folder)}".removesuffix("/.")
    server = "node_modules/@react-router/serve"
    at = f'"$PULSE_WEB_ROOT/{server}"'
    found = _word(f"{folder}/{server}")
    return [
        f' && (test -e {at} || (mkdir -p "$PULSE_WEB_ROOT/node_modules/@react-router" \\',
        f"   && ln -s {found} {at})) \\",
    ]


# -- CI ----------------------------------------------------------------------------------------

SSH_KEY = """\
          # Faster, without --control job: a key that Railway knows, as the secret RAILWAY_SSH_KEY,
          # and before it `mkdir -p ~/.ssh && ssh-keyscan ssh.railway.com >> ~/.ssh/known_hosts`.
          # PULSE_RAILWAY_SSH_KEY: ${{ secrets.RAILWAY_SSH_KEY }}
"""


# Actions by commit: a tag can be moved to other code, which would have the secrets.
CHECKOUT = "actions/checkout@d23441a48e516b6c34aea4fa41551a30e30af803 # v6.1.0"
SETUP_NODE = "actions/setup-node@249970729cb0ef3589644e2896645e5dc5ba9c38 # v6.5.0"
SETUP_PYTHON = "actions/setup-python@ece7cb06caefa5fff74198d8649806c4678c61a1 # v6.3.0"
SETUP_UV = "astral-sh/setup-uv@37802adc94f370d6bfd71619e3f0bf239e1f3b78 # v7.6.0"
RAILWAY_CLI = "@railway/cli@5.63.1"


def workflow(layout: Layout) -> str:
    """Return the GitHub workflow that deploys what is pushed."""
    top = layout.repository or layout.context
    at = Path(os.path.relpath(layout.folder, top)).as_posix()
    folder = f"    defaults:\n      run:\n        working-directory: {at}\n" if at != "." else ""
    if layout.python.tool == "uv":
        member = f" --package {layout.member}" if layout.member else ""
        setup = f"      - uses: {SETUP_UV}\n"
        install, run = f"uv sync --locked{member}", "uv run --no-sync pulse-railway"
    else:
        source = Path(os.path.relpath(layout.python.folder, layout.folder)) / "requirements.txt"
        version = f'        with:\n          python-version: "{layout.python_version}"\n'
        setup = f"      - uses: {SETUP_PYTHON}\n{version}"
        install, run = f"pip install -r {source.as_posix()}", "pulse-railway"
    return f"""\
# Deploys what is pushed. The secret RAILWAY_TOKEN, a project token, is in the environment
# `production` of this repository; docs/ci.md of pulse-railway says what other ways there are.
name: deploy{"" if at == "." else f" {at}"}
on:
  push:
    branches: [main, master]
concurrency:
  group: deploy{"" if at == "." else f"-{at.replace('/', '-')}"}
permissions:
  contents: read
jobs:
  deploy:
    runs-on: ubuntu-latest
    environment: production
{folder}    steps:
      - uses: {CHECKOUT}
        with:
          persist-credentials: false
{setup}      - uses: {SETUP_NODE}
        with:
          node-version: "22"
      - run: npm install -g {RAILWAY_CLI}
      - run: {install}
      - run: {run} deploy --control job
        env:
          RAILWAY_TOKEN: ${{{{ secrets.RAILWAY_TOKEN }}}}
{SSH_KEY}"""


def workflow_path(layout: Layout) -> Path:
    """Return where the workflow goes: GitHub reads it at the repository's root."""
    top = layout.repository or layout.context
    at = os.path.relpath(layout.folder, top)
    name = "deploy" if at == "." else f"deploy-{at.replace(os.sep, '-')}"
    return top / ".github" / "workflows" / f"{name}.yml"


def configuration(layout: Layout) -> str:
    """Return the section of invoke.yaml."""
    context = os.path.relpath(layout.context, layout.folder)
    more = "" if context == "." else f"\n  context: {Path(context).as_posix()}"
    return CONFIGURATION.format(app=layout.app, context=more)
