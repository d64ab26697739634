"""The tasks of this repository: Railway's verbs, and what develops pulse-railway itself."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import task

from pulse_railway import tasks as railway


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
    """Run the tests, three files at a time: most of them wait."""
    c.run(
        f"{sys.executable} -m pytest -n 3 --dist loadfile --no-loadscope-reorder {args}", pty=False
    )


@task
def lint(c: Context) -> None:
    """Ruff and mypy, strict."""
    c.run("ruff check . && ruff format --check . && mypy")


@task(
    help={
        "control": "the API calls of ensure and deploy instead",
        "quick": "fewer and shorter rounds",
    }
)
def bench(c: Context, control: bool = False, quick: bool = False) -> None:
    """Measure the router beside pulse-railway 0.3.13's, and others where installed."""
    what = "control" if control else f"router {'--quick' if quick else ''}"
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


ns = Collection.from_module(railway)
for own in (demo, test, lint, bench, soak, chaos, image_check):
    ns.add_task(own)  # type: ignore[arg-type]  # the decorator hides that it is a Task
