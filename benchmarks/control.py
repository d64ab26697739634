"""`invoke bench --control`: counts the API calls of verbs, and measures their time.

Each call takes 150 ms more. The published 0.3.13 is measured on the same local Railway.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import environment, peer
from examples import demo

LATENCY = 0.15  # seconds added to every call
TINY = environment.ROOT / "tests" / "apps" / "tiny"
STEPS = {
    "ensure, empty project": ("ensure", "main.py"),
    "ensure, complete baseline": ("ensure", "main.py"),
    "deploy": ("deploy", "main.py", "--deployment-id", "one"),
    "deploy, the second": ("deploy", "main.py", "--deployment-id", "two"),
}


def main() -> int:
    tools = {
        "0.4": [sys.executable, "-m", "pulse_railway"],
        peer.VERSION: peer.command(),
    }
    console = Console()
    calls: dict[str, dict[str, int]] = {}
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        app = peer.write_app(TINY, root / "app")
        with demo.stage(root / "railway") as stage:
            peer.provide_images(stage.root)
            for name, command in tools.items():
                console.print(f"measuring {name}", style="dim")
                calls[name], seconds[name] = measure(stage, command, app)
    table = Table(title=f"API calls, and seconds with {LATENCY * 1000:.0f} ms added to each")
    table.add_column("")
    for name in tools:
        table.add_column(f"{name} calls", justify="right")
        table.add_column(f"{name} s", justify="right")
    table.add_column("calls, ratio", justify="right")
    table.add_column("seconds, ratio", justify="right")
    ours, theirs = tools
    for step in STEPS:
        cells = []
        for name in tools:
            cells += [str(calls[name][step]), f"{seconds[name][step]:.1f}"]
        table.add_row(
            step,
            *cells,
            f"{calls[ours][step] / calls[theirs][step]:.2f}",
            f"{seconds[ours][step] / seconds[theirs][step]:.2f}",
        )
    Console(width=120, file=console.file).print(table)
    return 0


def measure(
    stage: demo.Stage, command: list[str], app: Path
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the calls and the seconds of each step, in a project of its own."""
    project = stage.graphql(
        "mutation C($n: String!) { projectCreate(input: { name: $n })"
        " { id environments { edges { node { id } } } } }",
        n=f"bench-{time.monotonic_ns()}",
    )["projectCreate"]
    target = ["--project-id", project["id"]]
    target += ["--environment-id", project["environments"]["edges"][0]["node"]["id"]]
    stage.local("faults", {"faults": [], "latency": LATENCY})
    calls, seconds = {}, {}
    for step, arguments in STEPS.items():
        before, began = stage.local("stats")["documents"], time.monotonic()
        subprocess.run(
            [*command, *arguments, *target],
            cwd=app,
            env={**stage.env, "HOME": peer.home_with_key(stage.root)},
            check=True,
            capture_output=True,
            timeout=300,
        )
        seconds[step] = time.monotonic() - began
        calls[step] = stage.local("stats")["documents"] - before
    stage.local("faults", {})
    stage.graphql("mutation D($i: String!) { projectDelete(id: $i) }", i=project["id"])
    return calls, seconds


if __name__ == "__main__":
    raise SystemExit(main())
