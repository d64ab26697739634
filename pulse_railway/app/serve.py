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

A Pulse app is one process: one core. With PULSE_RAILWAY_INSTANCES=N there are N of both, the first
on PORT, the second on PORT + 1 and so on. The first begins to listen when the others answer, so
that Railway's health check, which asks PORT, passes when all are up. One that ends later starts
again, after pauses that grow; when all of a kind are down at once, the container ends.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
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
FIRST_PAUSE = 1.0  # seconds until a process that has ended starts again; doubled each time
LONGEST_PAUSE = 30.0
STABLE_SECONDS = 60.0  # that a process lives until its pauses begin anew
HEALTH_TIMEOUT = 5.0  # seconds
SSR_SCRIPT = Path(__file__).with_name("ssr.cjs")
NO_CODEGEN = "PULSE_DISABLE_CODEGEN"  # Pulse's: the first process alone writes the routes
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


def instance_count() -> int:
    """Return how many processes of the app are to run. Raises SystemExit."""
    text = os.environ.get(contract.INSTANCES) or "1"
    try:
        return contract.parse_instances(text)
    except ValueError as error:
        raise SystemExit(f"error: {contract.INSTANCES} takes {error}") from None


def commands_of_instance(
    commands: list[dict[str, Any]], number: int, count: int, web_port: int
) -> list[dict[str, Any]]:
    """Return the commands of one process and of React's server beside it.

    Args:
        commands: those of the first process, as `pulse run` starts it.
        number: of the process, from 1.
        count: how many processes there are.
        web_port: where React's server beside it listens.
    """
    first_port = own_port()
    port, first_web = str(first_port + number - 1), first_web_port(commands)
    moved = {
        str(first_port): port,
        str(first_web): str(web_port),
        f"http://localhost:{first_web}": f"http://localhost:{web_port}",
    }
    made = []
    for command in commands:
        args, env = list(command["args"]), dict(command.get("env") or os.environ)
        if "--port" in args:
            args[args.index("--port") + 1] = port
        for name in (contract.PORT, "PULSE_PORT", "PULSE_REACT_SERVER_ADDRESS"):
            if env.get(name) in moved:
                env[name] = moved[env[name]]
        env |= {contract.INSTANCE: str(number), contract.INSTANCES: str(count)}
        env[contract.SSR_BACKEND] = f"http://127.0.0.1:{port}"
        if number > 1:
            env[NO_CODEGEN] = "1"
            # the address that a page is rendered by is a constant of the build: the first one's
            preload = f'--require "{SSR_SCRIPT}"'
            env["NODE_OPTIONS"] = f"{env.get('NODE_OPTIONS', '')} {preload}".strip()
        made.append({**command, "args": args, "env": env})
    return made


def own_port() -> int:
    """Return where the first process listens."""
    return int(os.environ.get(contract.PORT) or contract.DEFAULT_PORT)


def first_web_port(commands: list[dict[str, Any]]) -> int:
    """Return where `pulse run` has React's server listen."""
    addresses = ((c.get("env") or {}).get("PULSE_REACT_SERVER_ADDRESS") for c in commands)
    return next(int(str(a).rpartition(":")[2]) for a in addresses if a)


def web_ports(first: int, count: int) -> list[int]:
    """Return ports for `count` React servers, the first of which is given."""
    own = own_port()
    found, port = [first], first
    while len(found) < count:
        port += 1
        with contextlib.suppress(OSError), socket.socket() as probe:
            if not own <= port < own + count:
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


@dataclass
class Child:
    """A process that `serve` keeps alive: uvicorn, or React's server beside it."""

    command: dict[str, Any]
    kind: int  # its place among the commands of an instance
    number: int  # of the instance
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0  # monotonic, as the others
    due: float | None = None  # when it starts again; None: it runs, or was not started yet
    pause: float = FIRST_PAUSE
    status: int = 0  # its last exit status

    def start(self) -> None:
        """Start it in its own process group. Raises OSError."""
        command = self.command
        self.process = subprocess.Popen(
            command["args"], cwd=command.get("cwd"), env=command.get("env"), process_group=0
        )
        self.started_at, self.due = time.monotonic(), None

    def ended(self, status: int) -> None:
        """Note its end, and when it starts again."""
        now = time.monotonic()
        if now - self.started_at > STABLE_SECONDS:
            self.pause = FIRST_PAUSE
        self.status, self.process, self.due = status, None, now + self.pause
        self.pause = min(self.pause * 2, LONGEST_PAUSE)

    def tell(self) -> None:
        name = Path(self.command["args"][0]).name
        wait = max((self.due or 0.0) - time.monotonic(), 0.0)
        message = (
            f"{name} of instance {self.number} has ended with status {self.status}: it starts again"
            f" in {wait:.0f} s"
        )
        print(message, file=sys.stderr, flush=True)

    @property
    def exit_status(self) -> int:
        return self.status if self.status >= 0 else 128 - self.status


def is_healthy(number: int) -> bool:
    """Does a process answer its health check?"""
    port = own_port() + number - 1
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HEALTH_TIMEOUT)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", contract.HEALTH_PATH)
        return connection.getresponse().status == 200
    return False


def children_of(argv: list[str] | None) -> list[Child]:
    """Return the processes to start: uvicorn and React's server of each instance."""
    count = 1 if argv else instance_count()
    commands = [{"args": argv}] if argv else children_of_pulse_run(command())
    if count == 1 or len(commands) == 1:  # `pulse run` itself says why it does not start
        return [Child(found, kind, 1) for kind, found in enumerate(commands)]
    ports = web_ports(first_web_port(commands), count)
    return [
        Child(found, kind, number)
        for number in range(1, count + 1)
        for kind, found in enumerate(
            commands_of_instance(commands, number, count, ports[number - 1])
        )
    ]


def run_app(argv: list[str] | None = None) -> int:
    """Run a command, by default the app's, until all of its processes of one kind have ended, or
    until SIGTERM or SIGINT; return the exit status.

    The status is the last process's own, after a signal 0 if all processes have ended in time, and
    127 if one cannot be started.
    """
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # first, since a signal may come at once
        signal.signal(number, lambda n, _: received.append(n))
    become_subreaper()
    remove_lock()
    children = children_of(argv)
    first = [child for child in children if child.number == 1]
    further = [child for child in children if child.number > 1]
    stages = [further, first] if further else [first]
    begun: list[Child] = []
    waiting: set[int] = set()  # instances that have not answered yet
    try:
        while not received:
            if stages and not waiting:
                for child in stages.pop(0):
                    begun.append(child)
                    child.start()
                    waiting |= {child.number} if further else set()
            if status := end_of_all(begun, all_up=not (stages or waiting)):
                send_signal(list(descendants(os.getpid())), signal.SIGKILL)
                return status[0]
            for child in begun:
                if child.due is not None and child.due <= time.monotonic():
                    child.start()
            waiting = {number for number in waiting if not is_healthy(number)}
            time.sleep(POLL)
    except OSError as error:
        print(f"error: {begun[-1].command['args'][0]}: {error.strerror}", file=sys.stderr)
        send_signal(list(descendants(os.getpid())), signal.SIGKILL)
        return NOT_STARTED
    return stop(time.monotonic() + stop_timeout())


def end_of_all(begun: list[Child], all_up: bool) -> list[int]:
    """Note the processes that have ended; return the container's exit status, if it ends.

    It ends when all processes of a kind are down. While it starts, one is enough: a version that
    does not come up fails its deploy.
    """
    ended = reap()
    gone = [child for child in begun if child.process and child.process.pid in ended]
    for child in gone:
        assert child.process
        child.ended(ended[child.process.pid])
    for child in gone:
        alike = [other for other in begun if other.kind == child.kind]
        if not all_up or not any(other.process for other in alike):
            return [child.exit_status]
        child.tell()
    return []


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
