"""Runs `pulse-railway`, `railway` and what containers run in forked processes, which saves imports:
1.5 s a verb (Pulse), 0.1 to 0.3 s what runs in a container, 0.08 s a `railway`.

    python -m tests.zygote SOCKET verbs|routers|MODULE,...

A process for routers has imported what router.py does and no more: its routers are as large as real
ones. One that is given modules has imported those. The workers of a run share the processes.

Each connection sends one command line: the program, its arguments, environment and folder as JSON,
stdout and stderr as descriptors. The answer is the process id, and after its end the exit status. A
forked process has its own environment, folder, session and signals, as a user's process; only /proc
shows this one's environment. test_first_deploy.py and test_habits.py start real processes. Each
process imports `router.py` and `control.py` again, since they read the environment.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.machinery
import json
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parent.parent


def serve(path: str, what: str) -> None:
    if what in ("verbs", "routers"):
        load_ours(what, path)
    else:
        for name in what.split(","):
            importlib.import_module(name)
    gc.freeze()  # what is here already is not collected in each process anew
    Server(path).run()


def load_ours(what: str, path: str) -> None:
    import uvloop  # noqa: F401

    from pulse_railway import runtime_image

    if what == "verbs":
        import pulse  # noqa: F401

        import pulse_railway.local.cli
        from pulse_railway import app, flows, railway

        for package in (pulse_railway, app, flows, railway):
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                if not module.name.endswith("__main__"):
                    importlib.import_module(module.name)
        for name in "http.server httpcore certifi rich._emoji_codes encodings.idna".split():
            importlib.import_module(name)
        fork_local_cli(path)

    runtime_image.load("control" if what == "verbs" else "router")  # for what it imports
    for name in runtime_image.SCRIPTS:
        sys.modules.pop(name.removesuffix(".py"), None)
    keep_code([runtime_image.sources() / name for name in runtime_image.SCRIPTS])


class Server:
    """Forks the processes, and tells each one's client when it has ended."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def run(self) -> None:
        parent = os.getppid()
        while os.getppid() == parent:  # ends with the tests, even if they are killed
            for key, _ in self.selector.select(1.0):
                key.data()

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        while len(message) < 4 + int.from_bytes(message[:4]):
            if not (more := connection.recv(1 << 20)):  # the client was killed
                connection.close()
                return
            message += more
        request = json.loads(message[4:])
        pid = os.fork()
        if pid == 0:
            become(request, fds)
        for fd in fds:
            os.close(fd)
        ended = os.pidfd_open(pid)
        end = functools.partial(self.end, connection, pid, ended)
        self.selector.register(ended, selectors.EVENT_READ, end)
        with contextlib.suppress(OSError):
            connection.sendall(pid.to_bytes(4))

    def end(self, connection: socket.socket, pid: int, ended: int) -> None:
        self.selector.unregister(ended)
        os.close(ended)
        _, status = os.waitpid(pid, 0)
        with connection, contextlib.suppress(OSError):  # the client may have ended before
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, signed=True))


def keep_code(scripts: list[Path]) -> None:
    """Compile the runtime's scripts once: each container has copies of them, and no bytecode."""
    code = {
        path.read_bytes(): compile(path.read_bytes(), path, "exec", dont_inherit=True)
        for path in scripts
    }
    loader: Any = importlib.machinery.SourceFileLoader
    compile_source = loader.source_to_code

    def source_to_code(self: Any, data: Any, path: Any, **options: Any) -> Any:
        known = code.get(data) if isinstance(data, bytes) else None
        return known or compile_source(self, data, path, **options)

    loader.source_to_code = source_to_code


def become(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Run a request's program in this process."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, *fds)):
            os.dup2(fd, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.path[0] = os.getcwd()
        lines = 1 if "PYTHONUNBUFFERED" in os.environ else -1
        sys.stdout = open(1, "w", buffering=lines, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        programs = {"python": run_python, "railway": run_railway, "pulse-railway": run_verb}
        programs[request["program"]](request["arguments"])
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_verb(arguments: list[str]) -> None:
    """`pulse-railway ARGUMENTS`."""
    from pulse_railway import runtime_image
    from pulse_railway.__main__ import main

    runtime_image.become = run_script
    sys.argv = ["pulse-railway", *arguments]
    main()


def fork_local_cli(path: str) -> None:
    """Have this process's `railway` forked by a zygote where it is the local Railway's."""
    from pulse_railway.railway import program

    def popen(command: list[str], **options: Any) -> Any:
        if is_local_cli(shutil.which(command[0])):
            return Captured(path, command, options["env"], options["cwd"] or os.getcwd())
        return subprocess.Popen(command, **options)

    changed: Any = program
    changed.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": popen})


def is_local_cli(file: str | None) -> bool:
    from pulse_railway.local import cli

    path = Path(str(file))
    return bool(file) and path.read_bytes() == cli.script(path.parent.parent).encode()


def run_railway(arguments: list[str]) -> None:
    from pulse_railway.local import cli

    root = Path(str(shutil.which("railway"))).parent.parent
    raise SystemExit(cli.main(root, arguments))


def run_script(name: str, arguments: list[str]) -> NoReturn:
    """Run a script of the runtime image in this process, in place of runtime_image.become."""
    from pulse_railway import runtime_image

    customize(str(runtime_image.sources()))
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def run_python(arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS`, `python -c CODE ARGUMENTS` or `python FILE ARGUMENTS`."""
    customize()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def customize(*folders: str) -> None:
    """What Python does with PYTHONPATH when it starts; `folders` come before that."""
    given = os.environ.get("PYTHONPATH")
    sys.path[:0] = [*folders, *(given.split(os.pathsep) if given else [])]
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ImportError):  # a container's has the private network's names
        importlib.import_module("sitecustomize")


def send(
    path: str,
    program: str,
    arguments: list[str],
    env: Mapping[str, str],
    cwd: Path | str,
    fds: tuple[int, int],
) -> tuple[socket.socket, int]:
    """Have a zygote start a process that writes to `fds`. Returns its connection and its id."""
    connection = socket.socket(socket.AF_UNIX)
    connect(connection, path)
    request = {"program": program, "arguments": arguments, "env": dict(env), "cwd": str(cwd)}
    body = json.dumps(request).encode()
    message = len(body).to_bytes(4) + body
    connection.sendall(message[socket.send_fds(connection, [message], fds) :])
    return connection, int.from_bytes(connection.recv(4))


def connect(connection: socket.socket, path: str) -> None:
    """Connect to a zygote, which may be starting."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return connection.connect(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class Forked:
    """A process of a zygote, as subprocess.Popen has it."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection, self.pid = connection, pid
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                told = self.connection.recv(4)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("forked", timeout or 0) from None
            self.connection.close()
            self.returncode = int.from_bytes(told, signed=True)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


class Captured(Forked):
    """The same with its output."""

    def __init__(
        self, path: str, command: list[str], env: Mapping[str, str], cwd: Path | str
    ) -> None:
        self.stdout, self.stderr = output_file(), output_file()
        fds = self.stdout.fileno(), self.stderr.fileno()
        super().__init__(*send(path, command[0], command[1:], env, cwd, fds))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what was written until the process ended. Raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        return contents(self.stdout), contents(self.stderr)


def output_file() -> IO[str]:
    return open(os.memfd_create("output"), "r+", errors="replace")


def contents(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


class Zygote:
    """The tests' side: sends commands to the server at a socket."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def begin(cls, what: str, python: str = sys.executable) -> Zygote:
        """Start a server, which ends with this process."""
        folder = tempfile.TemporaryDirectory()
        path = str(Path(folder.name, "zygote"))
        process = subprocess.Popen([python, __file__, path, what], cwd=ROOT)
        atexit.register(folder.cleanup)
        atexit.register(process.wait)
        atexit.register(process.kill)
        return cls(path)

    def start(
        self,
        program: str,
        arguments: list[str],
        env: Mapping[str, str],
        cwd: Path | str,
        fds: tuple[int, int],
    ) -> Forked:
        """Start `<program> <arguments>`, which writes to `fds`."""
        return Forked(*send(self.path, program, arguments, env, cwd, fds))

    def run(
        self,
        program: str,
        arguments: list[str],
        env: Mapping[str, str],
        cwd: Path | str,
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        """Run `<program> <arguments>` as subprocess.run does, with the output captured."""
        process = Captured(self.path, [program, *arguments], env, cwd)
        try:
            out, err = process.communicate(timeout)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(arguments, process.wait(), out, err)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder
    serve(*sys.argv[1:])
