"""`pulse-railway serve`: the first process of an app's container.

`pulse run` starts uvicorn and React's server as children, each on a pty of its own. It does not
react to SIGTERM, which is all that a container's first process is told before everything is killed;
it leaves a lock behind when it is killed, and then never starts again in the same file system; and
as the first process it would have to reap what its children leave. This does all three:

- a lock of a run before is removed: nobody else can be alive in a container that just starts;
- on SIGTERM, uvicorn is told to finish (its requests, then the app's shutdown hooks), React's
  server once uvicorn has ended, and what is left within the draining seconds is killed;
- every child that ends is waited for.

uvicorn and React's server are children of this process, not of a `pulse run` that has the app in
memory too: `pulse_run` asks Pulse what they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pulse_railway import contract

LOCK = Path(".pulse") / "lock"  # in the web root
DRAINING_VARIABLE = "RAILWAY_DEPLOYMENT_DRAINING_SECONDS"
DRAINING_SECONDS = 10.0  # what `deploy` sets on a backend
LONGEST_DRAINING = 86_400.0
POLL = 0.1  # seconds
MARGIN = 1.0  # seconds before Railway's own SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
NOT_STARTED = 127  # the exit status of a shell for a command that it does not find


def command() -> list[str]:
    """`pulse run` as a backend needs it: on IPv4 and IPv6 both, which the empty address is."""
    app = os.environ.get(contract.APP_FILE)
    if not app:
        raise SystemExit(f"error: {contract.APP_FILE} is not set: which app?")
    port = os.environ.get(contract.PORT) or str(contract.DEFAULT_PORT)
    return ["pulse", "run", app, "--prod", "--address", "", "--port", port, "--no-find-port"]


def remove_lock() -> None:
    """Wherever the web root is: where the variable says, else beside the app, as in Pulse."""
    app = Path((os.environ.get(contract.APP_FILE) or ".").partition(":")[0])
    roots = [Path(os.environ.get(contract.WEB_ROOT) or "web"), app.parent / "web"]
    for root in roots:
        with contextlib.suppress(OSError):
            path = root / LOCK
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def adopt_orphans() -> None:
    """What our children leave becomes ours to reap, as it is for the first process anyway."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> dict[int, str]:
    """Every process below `root`, with its command line."""
    children: dict[int, list[int]] = {}
    lines: dict[int, str] = {}
    for home in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(home.name)
            parent = int((home / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
            lines[pid] = (home / "cmdline").read_bytes().replace(b"\0", b" ").decode("latin-1")
    found: dict[int, str] = {}
    todo = list(children.get(root, []))
    while todo:
        pid = todo.pop()
        if pid not in found:
            found[pid] = lines.get(pid, "")
            todo += children.get(pid, [])
    return found


def tell(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap() -> dict[int, int]:
    """The children that have ended, with their status."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def patience() -> float:
    """Seconds from SIGTERM until we kill what is left ourselves."""
    try:
        given = float(os.environ.get(DRAINING_VARIABLE) or DRAINING_SECONDS)
    except ValueError:
        given = math.nan
    if not 0 <= given <= LONGEST_DRAINING:
        message = f"{DRAINING_VARIABLE} is no number of seconds: {DRAINING_SECONDS:g} is taken"
        print(message, file=sys.stderr)
        given = DRAINING_SECONDS
    return max(given - MARGIN, 0.5)


def children_of_pulse_run(words: list[str]) -> list[dict[str, Any]]:
    """What `pulse run` would start, as pulse_run.py has it; that command itself where it does not
    say so (its own error is what shows then), or where another `pulse` is on PATH."""
    itself = [{"args": words}]
    beside = Path(sys.executable).with_name(words[0])
    if shutil.which(words[0]) != str(beside):
        return itself
    asked = [sys.executable, "-m", "pulse_railway.app.pulse_run", *words[2:]]
    answer = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return (json.loads(answer.stdout) if answer.returncode == 0 else []) or itself


def start(command: dict[str, Any]) -> int:
    """Start a child in a process group of its own; its process id. Raises OSError."""
    return subprocess.Popen(
        command["args"], cwd=command.get("cwd"), env=command.get("env"), process_group=0
    ).pid


def run_app(argv: list[str] | None = None) -> int:
    """Run a command, by default the app's, until it or a part of it ends, or until SIGTERM. Its
    exit status, 0 after an orderly end; 127 where it cannot be started."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # before anything else: it may come at once
        signal.signal(number, lambda n, _: asked.append(n))
    adopt_orphans()
    remove_lock()
    commands = [{"args": argv}] if argv else children_of_pulse_run(command())
    children = set()
    for child in commands:
        if asked:
            break
        try:
            children.add(start(child))
        except OSError as error:
            print(f"error: {child['args'][0]}: {error.strerror}", file=sys.stderr)
            tell(list(descendants(os.getpid())), signal.SIGKILL)
            return NOT_STARTED
    while not asked:
        time.sleep(POLL)
        for status in [status for pid, status in reap().items() if pid in children]:
            tell(list(descendants(os.getpid())), signal.SIGKILL)
            return status if status >= 0 else 128 - status
    return stop(time.monotonic() + patience())


def stop(deadline: float) -> int:
    """uvicorn first, so that no page is half rendered; then whatever is left."""
    told: set[int] = set()
    while time.monotonic() < deadline:
        reap()
        alive = descendants(os.getpid())
        if not alive:
            return 0
        servers = [pid for pid, line in alive.items() if "uvicorn" in line]
        due = servers or list(alive)
        tell([pid for pid in due if pid not in told], signal.SIGTERM)
        told.update(due)
        time.sleep(POLL)
    tell(list(descendants(os.getpid())), signal.SIGKILL)
    reap()
    return 128 + signal.SIGKILL


def main(argv: list[str]) -> int:
    """`serve` runs the app as a backend needs it, `serve -- COMMAND ...` another command."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{main.__doc__}\n\n{__doc__}")
        return 0
    if argv and (argv[0] != "--" or len(argv) == 1):
        print("error: serve takes no arguments, or -- COMMAND ...", file=sys.stderr)
        return 1
    return run_app(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
