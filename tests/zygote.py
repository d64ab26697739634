"""Runs `pulse-railway`, and routers, in forked processes, which saves imports: 1.5 s a verb
(Pulse), 0.25 s a control command, a janitor or a router (Redis and uvicorn).

    python -m tests.zygote SOCKET verbs|routers

A process for routers has imported what router.py does and no more: its routers are as large as real
ones. Each connection sends one command line: arguments, environment and folder as JSON, stdout and
stderr as descriptors. The answer is the process id, and after its end the exit status. A forked
process has its own environment, folder, session and signals, as a user's process. Tests of signals
and of the wheel start real processes nevertheless. Each process imports `router.py` and
`control.py` again, since they read the environment.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.machinery
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

# `pulse-railway` in the containers of the local Railway. It can be killed like the real program,
# and its end ends the forked process. Commands other than `control` run the real program, and so
# does its `python`, but for the janitor.
CLIENT = """#!{python} -SE
import json, os, socket, sys
janitor = sys.argv[1:] == ["-m", "janitor"]
if sys.argv[1:2] != ["control"] and not janitor:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    request = dict(arguments=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd(), python=janitor)
    body = json.dumps(request).encode()
    message = len(body).to_bytes(4) + body
    connection.sendall(message[socket.send_fds(connection, [message], [1, 2]) :])
    connection.recv(4)
    sys.exit(int.from_bytes(connection.recv(4), signed=True))
"""
PYTHON = """#!/bin/sh
[ "$*" = "-m janitor" ] && exec {client} "$@"
exec {python} "$@"
"""


def serve(path: str, what: str) -> None:
    import uvloop  # noqa: F401

    from pulse_railway import runtime_image

    if what == "verbs":
        import pulse  # noqa: F401

        import pulse_railway.app.plugin
        import pulse_railway.cli
        import pulse_railway.flows.baseline
        import pulse_railway.flows.deploy
        import pulse_railway.options  # noqa: F401

    runtime_image.load("control" if what == "verbs" else "router")  # for what it imports
    for name in runtime_image.SCRIPTS:
        sys.modules.pop(name.removesuffix(".py"), None)
    keep_code([runtime_image.sources() / name for name in runtime_image.SCRIPTS])
    gc.freeze()  # what is here already is not collected in each process anew
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # handlers are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        listener.settimeout(1.0)
        while os.getppid() == parent:  # ends with the tests, even if they are killed
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                connection.setblocking(True)
                handle(connection)
                os._exit(0)
            connection.close()


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


def handle(connection: socket.socket) -> None:
    """Run one command: fork its process, send its id, wait for it, send its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    size = int.from_bytes(message[:4])
    while len(message) < 4 + size:
        message += connection.recv(1 << 20)
    request = json.loads(message[4:])
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(request, fds)
    for fd in fds:
        os.close(fd)
    connection.sendall(pid.to_bytes(4))
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection.fileno()], [], [])[0]:  # the client has ended
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, signed=True))


def become(request: dict[str, Any], fds: list[int]) -> None:
    """Run `python -m pulse_railway <arguments>`, or for a router `python <arguments>`, in this
    process. Does not return."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, *fds)):
            os.dup2(fd, number)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.path[0] = os.getcwd()
        if request.get("python"):
            run_python(*request["arguments"])
        sys.argv = ["pulse-railway", *request["arguments"]]
        from pulse_railway import runtime_image
        from pulse_railway.__main__ import main

        runtime_image.become = run_script
        main()
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


def run_script(name: str, arguments: list[str]) -> NoReturn:
    """Run a script of the runtime image in this process, in place of runtime_image.become."""
    from pulse_railway import runtime_image

    customize(str(runtime_image.sources()))
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def run_python(option: str, what: str) -> NoReturn:
    """`python -m MODULE`, or `python -c CODE`, in this process."""
    customize()
    sys.argv = [what if option == "-m" else option]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    raise SystemExit(0)


def customize(*folders: str) -> None:
    """What Python does with PYTHONPATH when it starts; `folders` come before that."""
    given = os.environ.get("PYTHONPATH")
    sys.path[:0] = [*folders, *(given.split(os.pathsep) if given else [])]
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ImportError):  # a container's has the private network's names
        importlib.import_module("sitecustomize")


class Forked:
    """A process of a zygote, as subprocess.Popen has it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pid = int.from_bytes(connection.recv(4))
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


class Zygote:
    """The tests' side: starts the server, and sends commands to it."""

    def __init__(self, folder: Path, what: str = "verbs") -> None:
        self.path = str(folder / "zygote")
        self.bin = folder / "bin"  # for a PATH
        self.bin.mkdir()
        client, real = self.bin / "pulse-railway", Path(sys.executable).with_name("pulse-railway")
        client.write_text(CLIENT.format(python=sys.executable, real=str(real), path=self.path))
        python = self.bin / "python"
        python.write_text(PYTHON.format(python=sys.executable, client=client))
        for script in (client, python):
            script.chmod(0o755)
        self.process = subprocess.Popen([sys.executable, "-m", "tests.zygote", self.path, what])

    def send(self, connection: socket.socket, fds: list[int], **request: Any) -> None:
        self._connect(connection)
        body = json.dumps(request).encode()
        message = len(body).to_bytes(4) + body
        connection.sendall(message[socket.send_fds(connection, [message], fds) :])

    def start(self, arguments: list[str], env: dict[str, str], cwd: Path | str, fd: int) -> Forked:
        """`python <arguments>`, which are `-m MODULE` or `-c CODE`, that writes to `fd`."""
        connection = socket.socket(socket.AF_UNIX)
        self.send(connection, [fd, fd], arguments=arguments, env=env, cwd=str(cwd), python=True)
        return Forked(connection)

    def run(
        self, arguments: list[str], env: dict[str, str], cwd: Path | str, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as subprocess.run does, with the output captured."""
        with (
            socket.socket(socket.AF_UNIX) as connection,
            open(os.memfd_create("out"), "r+") as out,
            open(os.memfd_create("err"), "r+") as err,
        ):
            self.send(
                connection,
                [out.fileno(), err.fileno()],
                arguments=arguments,
                env=env,
                cwd=str(cwd),
            )
            connection.settimeout(timeout)
            pid = int.from_bytes(connection.recv(4))
            try:
                code = int.from_bytes(connection.recv(4), signed=True)
            except TimeoutError:
                os.killpg(pid, signal.SIGKILL)
                raise
            outputs = []
            for file in (out, err):
                file.seek(0)
                outputs.append(file.read())
            return subprocess.CompletedProcess(arguments, code, *outputs)

    def _connect(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                return connection.connect(self.path)
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.05)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    serve(*sys.argv[1:])
