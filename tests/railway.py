"""The local Railway with forked processes in its containers: control commands, and Python's
(see zygote.py).

python -m tests.railway ROOT SOCKET    SOCKET: the zygote's
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pulse_railway.local import server, supervisor
from pulse_railway.local.state import Instance
from tests.zygote import contents, output_file, send

# as in conftest.py: a killed process writes no coverage data
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ


class Process:
    """A forked process, as asyncio.subprocess.Process has it."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection, self.pid = connection, pid
        self.returncode: int | None = None
        self.end = asyncio.create_task(self._end())

    async def _end(self) -> int:
        with self.connection:
            self.connection.setblocking(False)
            told = await asyncio.get_running_loop().sock_recv(self.connection, 4)
        self.returncode = int.from_bytes(told, signed=True)
        return self.returncode

    async def wait(self) -> int:
        return await asyncio.shield(self.end)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


class Command(Process):
    """The same with its output."""

    def __init__(self, words: list[str], env: Mapping[str, str], cwd: Path) -> None:
        self.files = output_file(), output_file()
        out, err = (file.fileno() for file in self.files)
        super().__init__(*send(sys.argv[2], words[0], words[1:], env, cwd, (out, err)))

    async def communicate(self) -> tuple[bytes, bytes]:
        await self.wait()
        out, err = (contents(file).encode() for file in self.files)
        return out, err


class Supervisor(supervisor.Supervisor):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.commands: dict[str, set[int]] = defaultdict(set)  # their ids by the replica's

    async def start_process(
        self, argv: list[str], cwd: Path, env: dict[str, str], output: int
    ) -> Any:
        if argv[:2] == ["sh", "-c"] and shlex.join(words := shlex.split(argv[2])) == argv[2]:
            argv = words  # which the shell would be replaced by
        if argv[0] == "python" and is_ours(argv, env) and not MEASURED:
            return Process(*send(sys.argv[2], "python", argv[1:], env, cwd, (output, output)))
        return await super().start_process(argv, cwd, env, output)

    async def execute(self, instance: Instance, command: str) -> Any:
        running = self.current.get(instance.id)
        words = shlex.split(command)
        plain = shlex.join(words) == command  # without a shell's syntax
        if (
            not running
            or running.process.returncode is not None
            or not plain
            or words[:2] != ["pulse-railway", "control"]
            or not is_ours(words, running.env)
        ):
            return await super().execute(instance, command)
        process = Command(words, running.env, running.cwd)
        ids = self.commands[running.env["RAILWAY_REPLICA_ID"]]
        ids.add(process.pid)
        process.end.add_done_callback(lambda _: ids.discard(process.pid))
        return process

    def _kill(self, running: supervisor.Running) -> None:
        super()._kill(running)
        for pid in self.commands.pop(running.env["RAILWAY_REPLICA_ID"], ()):
            os.killpg(pid, signal.SIGKILL)


def is_ours(words: list[str], env: Mapping[str, str]) -> bool:
    """Is the program the one beside this Python, and not an image's own?"""
    here = str(Path(sys.executable).with_name(words[0]))
    return "/" not in words[0] and shutil.which(words[0], path=env["PATH"]) == here


if __name__ == "__main__":
    server.Supervisor = Supervisor  # type: ignore[assignment,attr-defined]
    server.serve(server.LocalRailway(Path(sys.argv[1]).resolve()))
