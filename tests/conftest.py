"""Fixtures: a Redis, a router process, a local Railway. All are real, and end with the test."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.backoff
import redis.retry
from hypothesis import settings

from examples import demo
from pulse_railway.local.supervisor import free_port, redis_executable
from tests.net import eventually
from tests.zygote import Forked, Zygote, fork_local_cli

# Let processes store compiled modules, as `invoke test` does: each would compile them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOT = Path(__file__).parent.parent
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ  # a killed process writes no coverage data

# The gate tests the same cases each time; `--hypothesis-profile search` generates others.
settings.register_profile("gate", derandomize=True)
settings.register_profile("search", derandomize=False, print_blob=True)
settings.load_profile("gate")

STAGE = demo.stage  # the original: a test may replace `demo.stage` by `forking_stage`
SLOW = {"test_story", "test_interop", "test_browser", "test_local", "test_runtime_image"}


# The longest files, by duration: they start first, so that none runs alone at the end.
LONGEST = """
test_first_deploy test_failures test_interop test_life test_story test_chaos test_memories
test_lost_records test_ways test_lost_state test_signals test_versions test_verbs test_answers
test_baseline test_stacks test_killed test_soak test_unreliable_ssh test_reports test_pages
test_local test_tunnel test_state_machine test_races
""".split()


def pytest_configure(config: pytest.Config) -> None:
    """Start the zygotes that the workers of this run share: each would take 110 MB and 2 s."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        zygote("verbs")
        zygote("routers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, then those on a local Railway, then the quick ones."""
    order = {name: place for place, name in enumerate(LONGEST)}

    def priority(item: pytest.Item) -> tuple[int, bool]:
        return order.get(item.path.stem, len(order)), not on_a_railway(item.path)

    items.sort(key=priority)


def play(module: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Run a module's `step_01_...`, `step_02_...` as one test, with the fixtures that they name.

    Each step continues from the one before it, so that no test depends on another.
    """
    for name in sorted(name for name in module if name.startswith("step_")):
        print(name)  # pytest shows it if the step fails
        step = module[name]
        step(**{n: request.getfixturevalue(n) for n in inspect.signature(step).parameters})


@functools.cache
def on_a_railway(path: Path) -> bool:
    return path.stem in SLOW or "Project" in path.read_text()


class Process:
    """A server under test. It is ended by its process id."""

    def __init__(
        self,
        command: list[str],
        port: int,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        forked: bool = False,
    ) -> None:
        """Args:
        forked: it is a router, `-m router` or `-c ...`, of this Python: see zygote.py."""
        self.port = port
        self.log = tempfile.TemporaryFile()
        env = {**os.environ, **(env or {})}
        self.popen: subprocess.Popen[bytes] | Forked
        if forked and not MEASURED:
            fd = self.log.fileno()
            folder = cwd or os.getcwd()
            self.popen = zygote("routers").start("python", command[1:], env, folder, (fd, fd))
            return
        self.popen = subprocess.Popen(
            command, env=env, cwd=cwd, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait(self, seconds: float = 20) -> Process:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.popen.poll() is None, self.output()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"nothing listens on {self.port}: {self.output()}")

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.popen.poll() is None:
            try:
                os.killpg(self.popen.pid, number)
                self.popen.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()
        return self.popen.wait()

    @property
    def rss(self) -> int:
        """Return the resident memory in bytes."""
        pages = Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu(self) -> float:
        """Return the CPU seconds used so far."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Redis:
    """A redis-server that a test may stop and start again on the same port.

    With a folder it keeps all its data over that. Else it keeps none, and has a folder of its own:
    it would load the `dump.rdb` of a shared one.
    """

    def __init__(self, port: int | None = None, folder: Path | None = None) -> None:
        self.port = port or free_port()
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: Process | None = None
        self.start()

    def start(self) -> None:
        self.own = tempfile.TemporaryDirectory()
        command = [redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--dir", str(self.folder or self.own.name)]
        if self.folder:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = Process(command, self.port).wait()
        pid = self.client.info("server")["process_id"]
        assert pid == self.process.popen.pid, f"port {self.port} is another Redis's"

    def stop(self) -> None:
        if self.process:
            self.process.stop(signal.SIGKILL)
            self.process = None
            self.own.cleanup()

    def signal(self, number: int) -> None:
        """Send a signal: SIGSTOP freezes the server, SIGCONT continues it."""
        assert self.process
        os.killpg(self.process.popen.pid, number)

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, decode_responses=True)

    def deployment(
        self, name: str, address: str | None, state: str = "active", **more: Any
    ) -> None:
        """Write a record as 0.3.x does, and announce it."""
        record = {
            "deployment_id": name,
            "state": state,
            "service_name": name,
            "drain_started_at": None,
            **more,
        }
        if address:
            record["address"] = address
        client = self.client
        client.set(f"pulse:railway:deployment:{name}", json.dumps(record))
        if state == "active":
            client.set("pulse:railway:active", name)
        client.publish("pulse:railway:events", name)


@pytest.fixture
def redis_server() -> Iterator[Redis]:
    server = Redis()
    yield server
    server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """`start(command, port, env)` starts a process, which ends with the test."""
    processes: list[Process] = []

    def begin(
        command: list[str], port: int, env: dict[str, str] | None = None, forked: bool = False
    ) -> Process:
        process = Process(command, port, env, forked=forked)
        processes.append(process)
        return process.wait()

    yield begin
    for process in processes:
        process.stop(signal.SIGTERM if MEASURED else signal.SIGKILL)


@pytest.fixture
def router_python() -> Path:
    """The Python that runs router.py: with the locked dependencies, or as a module overrides it."""
    return Path(sys.executable)


def router_command(
    python: Path | str = sys.executable, limits: Mapping[str, float] | None = None
) -> list[str]:
    """Return the command for a router; `limits` are fields of its router.Limits."""
    if not limits:
        return [str(python), "-m", "router"]
    script = f"""if True:
        import dataclasses, os, router
        limits = dataclasses.replace(router.Limits.from_env(os.environ), **{dict(limits)!r})
        raise SystemExit(router.main([], limits))
    """
    return [str(python), "-c", script]


@pytest.fixture
def run_router(start: Callable[..., Process], router_python: Path) -> Callable[..., Process]:
    """`run_router(redis, NAME=value, ...)` runs router.py with REDIS_URL and PORT, as in its image.

    `limits` are fields of its router.Limits.
    """

    def begin(
        server: Redis | None, limits: Mapping[str, float] | None = None, **env: str
    ) -> Process:
        port = int(env.get("PORT") or free_port())
        variables = {"PORT": str(port), "HOST": "127.0.0.1", "PYTHONPATH": str(ROOT), **env}
        if server:
            variables["REDIS_URL"] = server.url
        ours = str(router_python) == sys.executable
        return start(router_command(router_python, limits), port, variables, forked=ours)

    return begin


@pytest.fixture
def site(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tests.scene.Site, whose control commands wait for routers only briefly."""
    from tests import scene
    from tests.net import Backend, ok

    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.setenv("RAILWAY_SERVICE_ID", "here")
    monkeypatch.delenv("PULSE_RAILWAY_ACTIVE", raising=False)
    monkeypatch.setattr(scene.control, "HEAL_WAIT", 0.5)
    monkeypatch.setattr(scene.control, "REPORT_WAIT", 1.5)
    with Backend(ok(b"new")) as new, Backend(ok(b"old")) as old:
        yield scene.Site(redis_server, new, old)


def set_faults(stage: demo.Stage, **body: Any) -> None:
    """Set the faults of a local Railway (FaultSettings); those not in `body` end.

    The cron does not run, since the janitor would change what a test checks.
    """
    stage.local("faults", {"clock": False, **body})


@contextlib.contextmanager
def forking_stage(root: Path) -> Iterator[demo.Stage]:
    """Run demo.stage with forked processes in its containers (see zygote.py)."""
    with STAGE(root, "tests.railway", zygote().path) as stage:
        last = Path(stage.bundle).read_text().rpartition("-----BEGIN ")
        own = root / "ca.pem"  # without the public roots, which take a verb 20 ms to read
        own.write_text("".join(last[1:]))
        stage.env["SSL_CERT_FILE"] = stage.bundle = str(own)
        yield stage


@pytest.fixture(scope="session")
def railway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[demo.Stage]:
    """A local Railway. Tests leave its first project empty."""
    root = tmp_path_factory.mktemp("railway").resolve()
    fork_local_cli(zygote().path)  # for flows that a test runs in its own process
    with forking_stage(root) as stage:
        set_faults(stage)
        yield stage
    assert not demo.processes_of(root), "the local Railway left processes behind"


class Verb:
    """A finished command line."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Return the `error: ...` line. Asserts that there is one, and no traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        return lines[0]


def pulse_railway(
    *arguments: str, env: dict[str, str], cwd: Path | str = ROOT, timeout: float = 240
) -> Verb:
    """Run `pulse-railway <arguments>` in a process of its own (see zygote.py)."""
    return Verb(zygote().run("pulse-railway", list(arguments), env, cwd, timeout))


def zygote(what: str = "verbs") -> Zygote:
    """Return the zygote of this process and of the workers that it starts."""
    variable = f"ZYGOTE_{what.upper()}"
    if variable not in os.environ:
        os.environ[variable] = Zygote.begin(what).path
    return Zygote(os.environ[variable])


def redis_of(stage: demo.Stage) -> redis.Redis:
    """Return a client of `pulse-redis` in the project of a stage's environment."""
    project, environment = (stage.env[f"RAILWAY_{x}_ID"] for x in ("PROJECT", "ENVIRONMENT"))
    raw = json.loads((stage.root / "state.json").read_text())
    instance = next(
        i
        for s in raw["services"]
        if s["project_id"] == project and s["name"] == "pulse-redis"
        for i in s["instances"]
        if i["environment_id"] == environment
    )
    hosts = json.loads((stage.root / f"hosts-{environment}.json").read_text())
    port = hosts["pulse-redis.railway.internal"]["6379"]
    password = instance["variables"]["REDIS_PASSWORD"]
    # without redis-py's own retries, which take seconds: a test may ask whether Redis runs
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    return redis.Redis(port=port, password=password, decode_responses=True, retry=retry)


TINY = ROOT / "tests" / "apps" / "tiny"


def _dump(client: redis.Redis) -> Path:
    return Path(str(client.config_get("dir")["dir"]), "dump.rdb")


def _no_background_save(client: redis.Redis) -> None:
    eventually(lambda: not client.info("persistence")["rdb_bgsave_in_progress"])


class Project:
    """A project on the session's local Railway, and the tiny app to deploy to it."""

    def __init__(self, railway: demo.Stage, name: str) -> None:
        created = railway.graphql(
            "mutation C($n: String!) { projectCreate(input: { name: $n })"
            " { id environments { edges { node { id } } } } }",
            n=name,
        )["projectCreate"]
        self.railway = railway
        self.id = created["id"]
        self._work_in(created["environments"]["edges"][0]["node"]["id"])

    def _work_in(self, environment: str) -> None:
        self.environment = environment
        self.env = {
            **self.railway.env,
            "RAILWAY_PROJECT_ID": self.id,
            "RAILWAY_ENVIRONMENT_ID": environment,
        }
        self.stage = demo.Stage(self.railway.root, self.railway.process, self.env)

    def within(self, environment: str) -> Project:
        """Return the same project in another environment (an id)."""
        other = copy.copy(self)
        other._work_in(environment)
        return other

    def duplicate(self, name: str, **more: Any) -> Project:
        """Duplicate the environment, as Railway's dashboard does.

        `more`: further fields of EnvironmentCreateInput.
        """
        fields = {"projectId": self.id, "sourceEnvironmentId": self.environment, "name": name}
        created = self.railway.graphql(
            "mutation C($i: EnvironmentCreateInput!) { environmentCreate(input: $i) { id } }",
            i={**fields, **more},
        )
        return self.within(created["environmentCreate"]["id"])

    def delete_environment(self) -> None:
        self.railway.graphql(
            "mutation D($i: String!) { environmentDelete(id: $i) }", i=self.environment
        )

    def run(self, *arguments: str, cwd: Path | str = TINY, **env: str) -> Verb:
        window = "--rollback-window-seconds"
        if arguments[0] in ("ensure", "scaffold") and window not in arguments:
            arguments = (*arguments, window, "0")  # the janitor removes drained versions at once
        return pulse_railway(*arguments, env={**self.env, **env}, cwd=cwd)

    def ok(self, *arguments: str, **env: str) -> Any:
        """Run a verb that must succeed, and return its result."""
        verb = self.run(*arguments, "--json", **env)
        assert verb.code == 0, verb.err
        return verb.json

    def deploy(self, name: str, *arguments: str, **env: str) -> str:
        return str(
            self.ok("deploy", "main.py", "--deployment-id", name, *arguments, **env)[
                "deployment_id"
            ]
        )

    @property
    def services(self) -> set[str]:
        return set(self.stage.services())

    @property
    def state(self) -> dict[str, Any]:
        """Return the values in Redis by key without its prefix; routers' reports are left out."""
        data = self.redis.mget(keys := list(self.redis.scan_iter("pulse:railway:*")))
        return {
            k.removeprefix("pulse:railway:"): v
            for k, v in zip(keys, data, strict=True)
            if v is not None and ":router:" not in k
        }

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        return {
            k.removeprefix("deployment:"): json.loads(v)
            for k, v in self.state.items()
            if k.startswith("deployment:")
        }

    @property
    def active(self) -> str | None:
        return self.state.get("active")

    @property
    def redis(self) -> redis.Redis:
        return redis_of(self.stage)

    def redis_process(self) -> int | None:
        """Return the id of Redis's process; None while Redis does not answer."""
        try:
            return int(self.redis.info("server")["process_id"])
        except (redis.RedisError, KeyError):  # Redis does not run, or has no private name yet
            return None

    def snapshot(self) -> Path:
        """Have Redis write a snapshot, and return a copy of its file."""
        client = self.redis
        _no_background_save(client)
        client.save()
        copy = self.railway.root / f"snapshot-{time.monotonic_ns()}.rdb"
        return Path(shutil.copy(_dump(client), copy))

    def restore_snapshot(self, snapshot: Path) -> None:
        """Kill Redis, which restarts with an older snapshot: all later changes are lost.

        Railway counts this as a crash, and does not restart a deployment after ten crashes.
        """
        client, process = self.redis, self.redis_process()
        assert process
        client.config_set("save", "")  # so that Redis does not overwrite the snapshot
        _no_background_save(client)
        shutil.copy(snapshot, _dump(client))
        os.kill(process, signal.SIGKILL)
        eventually(lambda: self.redis_process() not in (None, process))

    def latest(self, service: str) -> dict[str, str]:
        """Return the id and the status of a service's latest deployment."""
        data = self.railway.graphql(
            "query ($s: String!, $e: String!) { serviceInstance(serviceId: $s, environmentId: $e)"
            " { latestDeployment { id status } } }",
            s=self.stage.services()[service]["serviceId"],
            e=self.environment,
        )
        return dict(data["serviceInstance"]["latestDeployment"])

    def restart(self, service: str) -> None:
        """Restart a service's process as "Restart" on Railway: with the deployment's variables."""
        restart = "mutation ($d: String!) { deploymentRestart(id: $d) }"
        self.railway.graphql(restart, d=self.latest(service)["id"])

    def janitor(self, service: str = "pulse-janitor") -> dict[str, Any]:
        """Run the janitor to its end, and return its report.

        `exit` is its exit status; `refused` its last line, if it has made no report.
        """
        target = {"project": self.id, "environment": self.environment}
        answers: list[Any] = []

        def ran() -> bool:  # false while the run of a control command has not ended
            answers.append(self.railway.local(f"cron/{service}", {}, **target))
            return answers[-1]["exit"] is not None

        eventually(ran, 60)
        answer = answers[-1]
        last_line = answer["log"][-1]
        report = json.loads(last_line) if last_line.startswith("{") else {"refused": last_line}
        return {**report, "exit": answer["exit"]}

    def row(self, deployment_id: str) -> dict[str, Any]:
        """Return what `status` says of a deployment."""
        rows = self.ok("status")["deployments"]
        return next(row for row in rows if row["deployment_id"] == deployment_id)

    def variables(self, service: str) -> dict[str, str]:
        """Return a service's variables, with unrendered references."""
        raw = json.loads((self.railway.root / "state.json").read_text())
        for s in raw["services"]:
            if s["project_id"] == self.id and s["name"] == service:
                return next(
                    dict(i["variables"])
                    for i in s["instances"]
                    if i["environment_id"] == self.environment
                )
        raise AssertionError(f"no service {service}")

    def faults(self, *faults: dict[str, Any], **more: Any) -> None:
        set_faults(self.railway, faults=list(faults), **more)

    def get(self, path: str, **params: str) -> Any:
        address = self.ok("status")["address"]
        return self.stage.get(f"{address}{path}", **params).json()

    def delete(self) -> None:
        self.faults()
        self.railway.graphql("mutation D($i: String!) { projectDelete(id: $i) }", i=self.id)


@pytest.fixture(scope="module")
def project(railway: demo.Stage, request: pytest.FixtureRequest) -> Iterator[Project]:
    """An empty project for the tests of one module."""
    created = Project(railway, f"{request.module.__name__}-{time.monotonic_ns()}")
    yield created
    created.delete()


@pytest.fixture(scope="module")
def two(project: Project) -> Project:
    """A baseline with two deployments, of which `second` is active."""
    project.ok("ensure", "main.py", "--rollback-window-seconds", "900")
    project.deploy("first")
    project.deploy("second")
    return project


BASE = {"pulse-router", "pulse-env", "pulse-redis", "pulse-janitor"}


@pytest.fixture(scope="module")
def base(project: Project) -> Project:
    """A baseline with one active deployment, `first`."""
    project.ok("ensure", "main.py")
    project.deploy("first")
    return project


@pytest.fixture
def new_project(railway: demo.Stage) -> Iterator[Callable[[], Project]]:
    """`new_project()` creates an empty project, which is deleted after the test."""
    projects: list[Project] = []

    def create() -> Project:
        projects.append(Project(railway, f"project-{time.monotonic_ns()}"))
        return projects[-1]

    yield create
    for created in projects:
        created.delete()
