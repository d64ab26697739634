"""The SSH relay, in place of ssh.railway.com: runs commands in the services' containers.

The user's name is a service instance's id, the key a registered one. `railway ssh` (cli.py)
connects with the system's `ssh`, so that the messages about a lost connection are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

import asyncssh

from pulse_railway.local.faults import Fault
from pulse_railway.local.ssh_keys import key_file
from pulse_railway.local.state import State
from pulse_railway.local.supervisor import Supervisor, free_port

COMMAND_SECONDS = 120.0


class Relay:
    """The SSH server, on the loopback. Its host key is in `<root>/ssh/known_hosts`.

    `next_fault` is called once a command, and returns the fault that applies to it.
    """

    def __init__(
        self, state: State, supervisor: Supervisor, next_fault: Callable[[], Fault | None]
    ) -> None:
        self.state, self.supervisor, self.next_fault = state, supervisor, next_fault
        self.folder = state.root / "ssh"
        self.server: asyncssh.SSHAcceptor | None = None
        self.port = 0

    async def start(self) -> None:
        host_key = key_file(self.folder / "host")
        self.server = await asyncssh.create_server(
            lambda: SshLogin(self.state),
            "127.0.0.1",
            self.state.ssh_port or free_port(),
            server_host_keys=[str(host_key)],
            process_factory=self._run_command,
            encoding=None,
            line_editor=False,
        )
        self.port = self.server.get_port()
        self.state.ssh_port = self.port
        public = host_key.with_suffix(".pub").read_text().split()[:2]
        known_host = f"[127.0.0.1]:{self.port} {' '.join(public)}\n"
        (self.folder / "known_hosts").write_text(known_host)

    async def stop(self) -> None:
        if self.server:
            self.server.close()
            await self.server.wait_closed()

    async def _run_command(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        """Run one command. Railway starts a shell if there is none; the local Railway refuses."""
        instance_id = process.get_extra_info("username")
        if not process.command:
            process.stderr.write(b"the local Railway runs commands only: railway ssh ... -- ls\n")
            process.exit(1)
            return
        fault = self.next_fault()
        if fault and fault.delay:
            await asyncio.sleep(fault.delay)
        out, err, code = b"", b"", 0
        if not fault or fault.after or not fault.replaces_answer:
            instance = self.state.instance_by_id(instance_id)
            child = await self.supervisor.execute(instance, process.command) if instance else None
            if child is None:
                process.stderr.write(f"No target found for '{instance_id}'\n".encode())
                process.channel.get_connection().abort()
                return
            out, err, code = await output_of(child)
        if fault and fault.drop:
            process.channel.get_connection().abort()
            return
        if fault and fault.replaces_answer:
            text = fault.says or fault.error or (f"status {fault.status}" if fault.status else "")
            out, err = fault.prints.encode(), f"{text}\n".encode() if text else b""
            code = fault.exit if fault.exit is not None else 255 if text else 0
        process.stdout.write(out)
        process.stderr.write(err)
        process.exit(code)


class SshLogin(asyncssh.SSHServer):
    """Checks a login: the key must be registered. That the instance exists is checked later."""

    def __init__(self, state: State) -> None:
        self.state = state

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        fingerprint = key.get_fingerprint()
        return any(k.fingerprint == fingerprint for k in self.state.ssh_keys)


async def output_of(child: asyncio.subprocess.Process) -> tuple[bytes, bytes, int]:
    """Return a child's stdout, stderr and exit status.

    The child and all in its session are killed when the command takes too long or is cancelled.
    """
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            out, err = await child.communicate()
        return out, err, child.returncode or 0
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
