"""`pulse-railway serve`: the first process of an app's container.

`pulse run` starts uvicorn and React's server as children, each on a pty of its own. As the first
process of a container it lacks three things: it ignores SIGTERM, the only signal before everything
is killed; it does not start where a killed run has left its lock; and it does not reap orphans.
`serve` does all three:

- It removes the lock of a previous run, since no other process is alive in a new container.
- On SIGTERM it ends uvicorn (which finishes its requests and runs the app's shutdown hooks), then
  React's server. What is left when the draining seconds are nearly over is killed.
- It waits for every child that ends.

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
    """Return `pulse run` for a backend; the empty address listens on IPv4 and IPv6."""
    app = os.environ.get(contract.APP_FILE)
    if not app:
        raise SystemExit(f"error: {contract.APP_FILE} is not set: which app?")
    port = os.environ.get(contract.PORT) or str(contract.DEFAULT_PORT)
    return ["pulse", "run", app, "--prod", "--address", "", "--port", port, "--no-find-port"]


def remove_lock() -> None:
    """Remove Pulse's lock in the web root: the variable's, and the app's default as in Pulse."""
    app = Path((os.environ.get(contract.APP_FILE) or ".").partition(":")[0])
    roots = [Path(os.environ.get(contract.WEB_ROOT) or "web"), app.parent / "web"]
    for root in roots:
        with contextlib.suppress(OSError):
            path = root / LOCK
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def become_subreaper() -> None:
    """Become the parent of orphaned descendants, also where this is not the first process."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> dict[int, str]:
    """Return the command lines of all processes below `root`, by process id."""
    children: dict[int, list[int]] = {}
    lines: dict[int, str] = {}
    for home in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(home.name)
            parent = int((home / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
            lines[pid] = (home / "cmdline").read_bytes().replace(b"\0", b" ").decode("latin-1")
    below: dict[int, str] = {}
    todo = list(children.get(root, []))
    while todo:
        pid = todo.pop()
        if pid not in below:
            below[pid] = lines.get(pid, "")
            todo += children.get(pid, [])
    return below


def send_signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap() -> dict[int, int]:
    """Reap the children that have ended; return their exit statuses by process id."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def stop_timeout() -> float:
    """Return the seconds from SIGTERM to our own SIGKILL, which comes before Railway's."""
    try:
        seconds = float(os.environ.get(DRAINING_VARIABLE) or DRAINING_SECONDS)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_DRAINING:
        message = f"{DRAINING_VARIABLE} is no number of seconds: {DRAINING_SECONDS:g} is taken"
        print(message, file=sys.stderr)
        seconds = DRAINING_SECONDS
    return max(seconds - MARGIN, 0.5)


def children_of_pulse_run(words: list[str]) -> list[dict[str, Any]]:
    """Return the commands that `pulse run` would start, from pulse_run.py. Where that fails, return
    `pulse run` itself, whose own error is shown then; also where another `pulse` is on PATH."""
    beside = Path(sys.executable).with_name(words[0])
    found = shutil.which(words[0]) or shutil.which(beside)  # whose folder may not be on PATH
    itself = [{"args": [found or words[0], *words[1:]]}]
    if found != str(beside):
        return itself
    planner = [sys.executable, "-m", "pulse_railway.app.pulse_run", *words[2:]]
    answer = subprocess.run(planner, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return (json.loads(answer.stdout) if answer.returncode == 0 else []) or itself


def start(command: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start a child in its own process group. Raises OSError."""
    return subprocess.Popen(
        command["args"], cwd=command.get("cwd"), env=command.get("env"), process_group=0
    )


def run_app(argv: list[str] | None = None) -> int:
    """Run a command, by default the app's, until one of its processes ends, or until SIGTERM or
    SIGINT; return the exit status.

    The status is the process's own, after a signal 0 if all processes have ended in time, and 127
    if it cannot be started.
    """
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # first, since a signal may come at once
        signal.signal(number, lambda n, _: received.append(n))
    become_subreaper()
    remove_lock()
    commands = [{"args": argv}] if argv else children_of_pulse_run(command())
    children = {}  # kept, since a Popen that is collected waits for its process by itself
    for child in commands:
        if received:
            break
        try:
            process = start(child)
            children[process.pid] = process
        except OSError as error:
            print(f"error: {child['args'][0]}: {error.strerror}", file=sys.stderr)
            send_signal(list(descendants(os.getpid())), signal.SIGKILL)
            return NOT_STARTED
    while not received:
        time.sleep(POLL)
        for status in [status for pid, status in reap().items() if pid in children]:
            send_signal(list(descendants(os.getpid())), signal.SIGKILL)
            return status if status >= 0 else 128 - status
    return stop(time.monotonic() + stop_timeout())


def stop(deadline: float) -> int:
    """End uvicorn, then all other processes; kill them at `deadline` (monotonic).

    uvicorn is the first, since it needs React's server for the pages under way. Returns the exit
    status.
    """
    signaled: set[int] = set()
    while time.monotonic() < deadline:
        reap()
        alive = descendants(os.getpid())
        if not alive:
            return 0
        servers = [pid for pid, line in alive.items() if "uvicorn" in line]
        due = servers or list(alive)
        send_signal([pid for pid in due if pid not in signaled], signal.SIGTERM)
        signaled.update(due)
        time.sleep(POLL)
    send_signal(list(descendants(os.getpid())), signal.SIGKILL)
    reap()
    return 128 + signal.SIGKILL


def main(argv: list[str]) -> int:
    """`serve` runs the app as a backend needs it, `serve -- COMMAND ...` another command."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{main.__doc__}\n\n{__doc__}")
        return 0
    if argv and (argv[0] != "--" or not argv[1:] or not argv[1]):
        print("error: serve takes no arguments, or -- COMMAND ...", file=sys.stderr)
        return 1
    return run_app(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
