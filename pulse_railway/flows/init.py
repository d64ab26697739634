"""`init`: write the files that an app needs for its deployment and does not have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pulse_railway import __version__, config, contract
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway import config_files

PLUGIN = """\
import os

from pulse_railway import RailwayPlugin, RailwaySessionStore

app = ps.App(
    ...,
    plugins=[RailwayPlugin(dockerfile="Dockerfile")],
    session_store=RailwaySessionStore(),
    server_address=os.environ.get("PULSE_SERVER_ADDRESS"),
)
"""

IGNORED = """\
# Not for an image: secrets, history, and what is this machine's own.
.env
.env.*
!.env.example
*.pem
id_rsa
id_ed25519
.netrc
.pypirc
.git
.venv
venv
node_modules
__pycache__
.local-railway
"""

CONFIGURATION = """\
# What every run has in common: any flag of any verb (`pulse-railway deploy --help`).
pulse_railway:
  app: {app}
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

WORKFLOW = """\
# Deploys what is pushed to main. The secret RAILWAY_TOKEN, a project token, is in the environment
# `production` of this repository; docs/ci.md of pulse-railway says what other ways there are.
name: deploy
on:
  push:
    branches: [main]
concurrency:
  group: deploy
permissions:
  contents: read
jobs:
  deploy:
    runs-on: ubuntu-latest
    environment: production
    steps:
      - uses: actions/checkout@v5
      - uses: actions/setup-python@v6
        with:
          python-version: "3.13"
      - uses: actions/setup-node@v5
        with:
          node-version: "22"
      - run: npm install -g @railway/cli
      - run: pip install -r requirements.txt
      - run: pulse-railway deploy --control job
        env:
          RAILWAY_TOKEN: ${{ secrets.RAILWAY_TOKEN }}
          # Faster, without --control job: a key that Railway knows, as the secret RAILWAY_SSH_KEY,
          # and before it `mkdir -p ~/.ssh && ssh-keyscan ssh.railway.com >> ~/.ssh/known_hosts`.
          # PULSE_RAILWAY_SSH_KEY: ${{ secrets.RAILWAY_SSH_KEY }}
"""

TASKS = '''\
"""`invoke deploy`, `invoke status`: pulse-railway's verbs, and tasks of your own beside them."""

from invoke import Collection
from pulse_railway import tasks as railway

ns = Collection.from_module(railway)
'''


@dataclass(frozen=True)
class File:
    path: str
    purpose: str
    content: str


def init(app: str | None, folder: Path, output: Output) -> dict[str, Any]:
    """Write the missing files; an existing file is not changed.

    Args:
        app: the app's file, relative to the folder.

    Returns the files `written`, those that were `there`, and `todo`, what the author has to do.
    Raises Failure if there is no app.
    """
    app = find_app(app, folder)
    source = (folder / app).read_text(errors="replace")
    written, existing = [], []
    for file in files(app):
        path = folder / file.path
        if path.exists():
            existing.append(file.path)
            output.info(f"  {file.path} is there, and stays as it is")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.content)
        written.append(file.path)
        output.info(f"+ {file.path}: {file.purpose}")
        for line in file.content.splitlines():
            output.log(line)
    if danger := config_files.would_delete(folder):
        output.warn(danger)
    return {"app": app, "written": written, "there": existing, "todo": todo(app, source, folder)}


def find_app(app: str | None, folder: Path) -> str:
    """Return the app's file, relative to the folder: `app`, else the only file with a `ps.App`.

    Raises Failure if there is none, or several.
    """
    if app:
        if not (folder / app).is_file():
            raise Failure(f"no app at {folder / app}: pass --app path/to/main.py")
        return config.inside(folder, app, "the app").as_posix()
    constructor = re.compile(r"\b(ps|pulse)\.App\(")
    candidates = [
        path.relative_to(folder).as_posix()
        for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")])
        if path.name != "tasks.py" and constructor.search(path.read_text(errors="replace"))
    ]
    if len(candidates) != 1:
        listed = f"; there are: {', '.join(candidates)}" if candidates else ""
        raise Failure(f"which app? pass --app path/to/main.py, a file that makes a ps.App{listed}")
    return candidates[0]


def files(app: str) -> list[File]:
    """Return all files that `init` writes."""
    return [
        File("Dockerfile", "Python's server and React's in one image", dockerfile()),
        File("requirements.txt", "what the app runs on; add its own packages", requirements()),
        File(".dockerignore", "what no image may hold", IGNORED),
        File(".railwayignore", "what is not uploaded", IGNORED),
        File("invoke.yaml", "flags that every run has", CONFIGURATION.format(app=app)),
        File(".env.example", "the variables to copy to .env", ENVIRONMENT),
        File(".github/workflows/deploy.yml", "a deploy for every push to main", WORKFLOW),
        File("tasks.py", "the verbs for `invoke`", TASKS),
    ]


def dockerfile() -> str:
    """Return the example's Dockerfile without the lines for this repository only."""
    package = Path(__file__).parent.parent
    packaged = package / "templates" / "Dockerfile"
    example = package.parent / "examples" / "railway" / "Dockerfile"
    text = (packaged if packaged.exists() else example).read_text()
    text = re.sub(r"# To use it for an app of your own, .*\n", "", text)
    return re.sub(r"# Only in pulse-railway's own repository.*\nRUN .*\n", "", text)


def requirements() -> str:
    return f"pulse-framework=={_installed('pulse-framework')}\npulse-railway=={__version__}\n"


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


def todo(app: str, source: str, folder: Path) -> list[str]:
    """Return what the app's author has to do, in this order."""
    steps = []
    if "RailwayPlugin(" not in source:
        steps.append(f"give the app in {app} the plugin:\n\n{PLUGIN}")
    elif "PULSE_SERVER_ADDRESS" not in source:
        steps.append(
            f'pass server_address=os.environ.get("PULSE_SERVER_ADDRESS") to ps.App in {app}'
        )
    web = next((p.parent for p in sorted(folder.glob("*/package.json"))), None)
    if web is None:
        steps.append(
            "the React Router project that Pulse renders with goes into web/, with package.json and"
            " package-lock.json; examples/railway/web of pulse-railway's repository is one"
        )
    elif not (web / "package-lock.json").exists():
        steps.append(f"write {web.name}/package-lock.json: `npm --prefix {web.name} install`")
    if web and (page := page_without_script(web)):
        tag = f'<script src="{contract.SCRIPT_PATH}" />'
        steps.append(f"put {tag} first into the <head> of {page.relative_to(folder)}")
    steps.append("put a Railway token into .env, as .env.example has it")
    steps.append("`pulse-railway doctor` checks that nothing is missing")
    steps.append("`pulse-railway ensure`, once; then `pulse-railway deploy`")
    return steps
