"""`init`: what an app of one's own needs to be deployed, as far as it is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pulse_railway import __version__, config
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
    what: str
    content: str


def init(given: str | None, folder: Path, output: Output) -> dict[str, Any]:
    """Write what is missing, and say what is left to do; nothing that exists is touched.

    Returns the files `written` and those that were `there`, and `todo`. Raises Failure where there
    is no app.
    """
    app = find_app(given, folder)
    source = (folder / app).read_text(errors="replace")
    written, there = [], []
    for file in files(app):
        path = folder / file.path
        if path.exists():
            there.append(file.path)
            output.say(f"  {file.path} is there, and stays as it is")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.content)
        written.append(file.path)
        output.say(f"+ {file.path}: {file.what}")
        for line in file.content.splitlines():
            output.log(line)
    if danger := config_files.would_delete(folder):
        output.warn(danger)
    return {"app": app, "written": written, "there": there, "todo": todo(app, source, folder)}


def find_app(given: str | None, folder: Path) -> str:
    """The app's file, relative to the folder: the one given, else the only one that makes an app.
    Raises Failure for none and for several."""
    if given:
        if not (folder / given).is_file():
            raise Failure(f"no app at {folder / given}: pass --app path/to/main.py")
        return config.inside(folder, given, "the app").as_posix()
    made = re.compile(r"\b(ps|pulse)\.App\(")
    found = [
        path.relative_to(folder).as_posix()
        for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")])
        if path.name != "tasks.py" and made.search(path.read_text(errors="replace"))
    ]
    if len(found) != 1:
        there = f"; there are: {', '.join(found)}" if found else ""
        raise Failure(f"which app? pass --app path/to/main.py, a file that makes a ps.App{there}")
    return found[0]


def files(app: str) -> list[File]:
    """Everything that a project needs, as it would be written."""
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
    """The example's, less what is for this repository alone."""
    package = Path(__file__).parent.parent
    packaged = package / "templates" / "Dockerfile"
    text = (
        packaged if packaged.exists() else package.parent / "examples" / "railway" / "Dockerfile"
    ).read_text()
    text = re.sub(r"# To use it for an app of your own, .*\n", "", text)
    return re.sub(r"# Only in pulse-railway's own repository.*\nRUN .*\n", "", text)


def requirements() -> str:
    return f"pulse-framework=={_installed('pulse-framework')}\npulse-railway=={__version__}\n"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "0"


def todo(app: str, source: str, folder: Path) -> list[str]:
    """What only the app's author can do, in the order in which it is to be done."""
    left = []
    if "RailwayPlugin(" not in source:
        left.append(f"give the app in {app} the plugin:\n\n{PLUGIN}")
    elif "PULSE_SERVER_ADDRESS" not in source:
        left.append(
            f'pass server_address=os.environ.get("PULSE_SERVER_ADDRESS") to ps.App in {app}'
        )
    web = next((p.parent for p in sorted(folder.glob("*/package.json"))), None)
    if web is None:
        left.append(
            "the React Router project that Pulse renders with goes into web/, with package.json and"
            " package-lock.json; examples/railway/web of pulse-railway's repository is one"
        )
    elif not (web / "package-lock.json").exists():
        left.append(f"write {web.name}/package-lock.json: `npm --prefix {web.name} install`")
    left.append("put a Railway token into .env, as .env.example has it")
    left.append("`pulse-railway doctor` says whether all is there")
    left.append("`pulse-railway ensure`, once; then `pulse-railway deploy`")
    return left
