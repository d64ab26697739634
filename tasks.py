"""The tasks of this repository: Railway's verbs, and what develops pulse-railway itself."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from pulse_railway import tasks as railway

# the tools of the environment that runs this, also where it is not on PATH
WITH_TOOLS = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


@task(
    help={
        "once": "do not stay: two deploys, check the story, end",
        "job": "the same with a project token and no SSH key",
    }
)
def demo(_: Any, once: bool = False, job: bool = False) -> None:
    """Deploy the example on a local Railway and stay until Ctrl-C."""
    from examples import demo as script

    raise SystemExit(script.main(once=once, job=job))


@task(help={"args": "more arguments for pytest"})
def test(c: Context, args: str = "") -> None:
    """Run the tests, five files at a time: most of them wait."""
    pytest = f"{sys.executable} -m pytest -n 5 --dist loadfile --no-loadscope-reorder {args}"
    # bytecode is kept whatever the shell says: six workers would compile pytest's plugins anew
    c.run(pytest, pty=False, env={"PYTHONDONTWRITEBYTECODE": ""})


@task
def lint(c: Context) -> None:
    """Ruff and mypy, strict; zizmor on the workflows, which asks no network."""
    zizmor = "zizmor --offline --quiet --no-progress --min-severity medium .github"
    c.run(f"ruff check . && ruff format --check . && mypy && {zizmor}", env=WITH_TOOLS)


@task
def docs(c: Context) -> None:
    """Write the reference anew and build the site, strictly, into site/."""
    c.run(f"{sys.executable} docs/reference.py && mkdocs build --strict", env=WITH_TOOLS)


@task
def coverage(c: Context) -> None:
    """Run the tests and say how much of the package they run through, processes included."""
    shutil.rmtree(".coverage-data", ignore_errors=True)
    c.run(
        f"{sys.executable} -m pytest -n 3 --dist loadfile --no-loadscope-reorder --cov"
        " --cov-report=term",
        pty=False,
    )


@task(
    help={
        "version": "the new version, as 0.4.1",
        "tests": "--no-tests leaves them out, where a CI has passed them at this commit",
    }
)
def release(c: Context, version: str, tests: bool = True) -> None:
    """Check, set the version, date the changelog, commit, tag and build. Pushes nothing."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise Exit(f"error: a version is three numbers, as 0.4.1, not {version}", 1)
    if c.run("git status --porcelain", hide=True).stdout:
        raise Exit("error: there are changes that are not committed", 1)
    if c.run(f"git tag --list v{version}", hide=True).stdout:
        raise Exit(f"error: v{version} is tagged already: versions are not given twice", 1)
    package, changes = Path("pulse_railway/__init__.py"), Path("CHANGELOG.md")
    news = re.search(r"## \[Unreleased\]\n(.*?)(?=\n## \[|\Z)", changes.read_text(), re.S)
    if not news or not news[1].strip():
        raise Exit("error: CHANGELOG.md has nothing under [Unreleased]", 1)
    lint(c)
    docs(c)
    if tests:
        test(c)
    for path, name in ((package, "__version__"), (Path("router.py"), "VERSION")):
        said = re.compile(rf'^{name} = ".*?"', re.M)
        path.write_text(said.sub(f'{name} = "{version}"', path.read_text()))
    today = time.strftime("%Y-%m-%d", time.gmtime())
    dated = f"## [Unreleased]\n\n## [{version}] - {today}\n"
    changes.write_text(changes.read_text().replace("## [Unreleased]\n", dated, 1))
    shutil.rmtree("dist", ignore_errors=True)
    c.run(f"{sys.executable} -m build -q", env=WITH_TOOLS)
    c.run(f"git commit -q -a -m 'Release {version}' && git tag -a v{version} -m {version}")
    built = ", ".join(path.name for path in sorted(Path("dist").iterdir()))
    print(f"dist/: {built}\nnext: git push --follow-tags, which has the workflow publish them")


@task(
    help={
        "control": "the API calls of ensure and deploy instead",
        "instances": "an app of one process and of two instead",
        "quick": "fewer and shorter rounds",
    }
)
def bench(c: Context, control: bool = False, instances: bool = False, quick: bool = False) -> None:
    """Measure the router beside pulse-railway 0.3.13's, and others where installed."""
    what = f"router {'--quick' if quick else ''}"
    what = "control" if control else "instances" if instances else what
    c.run(f"{sys.executable} -m benchmarks.{what}", pty=False)


@task
def image_check(c: Context) -> None:
    """Lint the Dockerfiles (hadolint) and build them (buildah, as an ordinary user may)."""
    for name in ("Dockerfile.router", "examples/railway/Dockerfile"):
        for tool, command in (
            ("hadolint", f"hadolint {name}"),
            ("buildah", f"buildah build --isolation chroot --storage-driver vfs -f {name} ."),
        ):
            if shutil.which(tool):
                c.run(command, echo=True, pty=False)
            else:
                print(f"{tool} is not installed: {name} was not tried with it")


@task(help={"minutes": "how long to play", "seed": "repeats a run"})
def soak(_: Any, minutes: float = 5.0, seed: int = 0) -> None:
    """Play every kind of ending against a router, and see that it gives back what it took."""
    from tests import soak as script

    raise SystemExit(script.main(minutes, seed or time.time_ns() % (1 << 32)))


@task(help={"minutes": "how long to play", "seed": "repeats a run"})
def chaos(_: Any, minutes: float = 10.0, seed: int = 0) -> None:
    """Deploys, canaries, crashes and losses under 200 clients, of which none may notice."""
    from tests import chaos as script

    raise SystemExit(script.main(minutes, seed or time.time_ns() % (1 << 32)))


@task(help={"minutes": "how long to play", "seed": "repeats a run"})
def fuzz(_: Any, minutes: float = 5.0, seed: int = 0) -> None:
    """Mutated requests and answers: no client may get another's, no backend a hidden request."""
    from tests import fuzz as script

    raise SystemExit(script.main(minutes, seed or time.time_ns() % (1 << 32)))


ns = Collection.from_module(railway)
for own in (demo, test, lint, docs, coverage, bench, soak, chaos, fuzz, image_check, release):
    ns.add_task(own)  # type: ignore[arg-type]  # the decorator hides that it is a Task
