"""Fixtures: a Redis, a router process, a local Railway. All real, all ended with the test."""

from __future__ import annotations

import atexit
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
from contextlib import AbstractContextManager
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
from tests.zygote import Zygote

# As `invoke test` does it, for a pytest that is started by hand: what each process would compile.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOT = Path(__file__).parent.parent
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ  # what is killed says not what it ran through

# The gate tries the same cases each time; `--hypothesis-profile search` looks for others.
settings.register_profile("gate", derandomize=True)
settings.register_profile("search", derandomize=False, print_blob=True)
settings.load_profile("gate")

STAGE = demo.stage  # also where a test puts `forking_stage` in its place
SLOW = {"test_story", "test_interop", "test_browser", "test_local", "test_runtime_image"}


# The longest, by what they took: begun first, so that none is left alone at the end.
LONGEST = """
test_life test_interop test_chaos test_memories test_signals test_verbs test_failures test_story
test_versions test_lost_records test_answers test_first_deploy test_baseline test_ways test_soak
test_rude_ssh test_reports test_pages test_local test_tunnel test_state_machine test_races
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those on a local Railway: the quick ones fill what is left."""
    order = {name: place for place, name in enumerate(LONGEST)}

    def when(item: pytest.Item) -> tuple[int, bool]:
        return order.get(item.path.stem, len(order)), not on_a_railway(item.path)

    items.sort(key=when)


def play(module: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Do a module's `step_01_...`, `step_02_...`, each of which goes on where the one before ended,
    with the fixtures that they name: one test, so that none depends on another."""
    for name in sorted(name for name in module if name.startswith("step_")):
        print(name)  # shown where it fails
        step = module[name]
        step(**{n: request.getfixturevalue(n) for n in inspect.signature(step).parameters})


@functools.cache
def on_a_railway(path: Path) -> bool:
    return path.stem in SLOW or "Project" in path.read_text()


class Process:
    """A server under test: started, waited for, ended by its process id."""

    def __init__(
        self,
        command: list[str],
        port: int,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.port = port
        self.log = tempfile.TemporaryFile()
        self.popen = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
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
        return self.popen.returncode

    @property
    def rss(self) -> int:
        """Resident memory in bytes."""
        pages = Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu(self) -> float:
        """CPU seconds used so far."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Redis:
    """A redis-server that a test may stop and start again, on the same port. It forgets all, or
    with a folder nothing."""

    def __init__(self, port: int | None = None, folder: Path | None = None) -> None:
        self.port = port or free_port()
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: Process | None = None
        self.start()

    def start(self) -> None:
        command = [redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--dir", str(self.folder or tempfile.gettempdir())]
        if self.folder:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = Process(command, self.port).wait()
        answers = self.client.info("server")["process_id"]
        assert answers == self.process.popen.pid, f"port {self.port} is another Redis's"

    def stop(self) -> None:
        if self.process:
            self.process.stop(signal.SIGKILL)
            self.process = None

    def signal(self, number: int) -> None:
        """SIGSTOP freezes it, SIGCONT lets it go on."""
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
    """`start(command, port, env)`: a process that ends with the test."""
    processes: list[Process] = []

    def begin(command: list[str], port: int, env: dict[str, str] | None = None) -> Process:
        process = Process(command, port, env)
        processes.append(process)
        return process.wait()

    yield begin
    for process in processes:
        process.stop(signal.SIGTERM if MEASURED else signal.SIGKILL)


@pytest.fixture
def router_python() -> Path:
    """The Python that runs router.py: the locked dependencies' unless a module says otherwise."""
    return Path(sys.executable)


def router_command(
    python: Path | str = sys.executable, constants: Mapping[str, float] | None = None
) -> list[str]:
    """What starts a router in whose process these constants of router.py have other values."""
    if not constants:
        return [str(python), "-m", "router"]
    lines = [f"assert hasattr(router, {n!r}); router.{n} = {v!r}" for n, v in constants.items()]
    script = "\n".join(["import router", *lines, "raise SystemExit(router.main([]))"])
    return [str(python), "-c", script]


@pytest.fixture
def run_router(start: Callable[..., Process], router_python: Path) -> Callable[..., Process]:
    """`run_router(redis, NAME=value, ...)`: router.py with REDIS_URL and PORT, as in its image.
    `constants`: of router.py, those that have other values in this process."""

    def begin(
        server: Redis | None, constants: Mapping[str, float] | None = None, **env: str
    ) -> Process:
        port = int(env.get("PORT") or free_port())
        given = {"PORT": str(port), "HOST": "127.0.0.1", "PYTHONPATH": str(ROOT), **env}
        if server:
            given["REDIS_URL"] = server.url
        return start(router_command(router_python, constants), port, given)

    return begin


@pytest.fixture
def site(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tests.scene.Site, whose control commands wait for nobody for long."""
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
    """Tell a local Railway what is to go wrong, and how fast it is to be. A janitor that comes by
    on its cron would take what a test is about to look at: it stands still."""
    url = stage.api.replace("/graphql/v2", "/local/faults")
    demo.post(url, json={"clock": False, **body}).raise_for_status()


def forking_stage(root: Path) -> AbstractContextManager[demo.Stage]:
    """demo.stage, whose containers have their control commands forked (see zygote.py)."""
    return STAGE(root, "tests.railway", str(zygote().bin))


@pytest.fixture(scope="session")
def railway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[demo.Stage]:
    """A local Railway for tests that leave its first project as they found it: empty."""
    root = tmp_path_factory.mktemp("railway").resolve()
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
        """The `error: ...` line, of which there is one and no traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        return lines[0]


def pulse_railway(
    *arguments: str, env: dict[str, str], cwd: Path | str = ROOT, timeout: float = 240
) -> Verb:
    """`pulse-railway <arguments>` as its own process (see zygote.py)."""
    return Verb(zygote().run(list(arguments), env, cwd, timeout))


@functools.cache
def zygote() -> Zygote:
    folder = tempfile.TemporaryDirectory()
    made = Zygote(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(made.stop)
    return made


def redis_of(stage: demo.Stage) -> redis.Redis:
    """The `pulse-redis` of the project that a stage's environment names."""
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
    # without redis-py's own retries, which take seconds: a test asks whether it is there
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    return redis.Redis(port=port, password=password, decode_responses=True, retry=retry)


TINY = ROOT / "tests" / "apps" / "tiny"


def _dump(client: redis.Redis) -> Path:
    return Path(str(client.config_get("dir")["dir"]), "dump.rdb")


def _no_background_save(client: redis.Redis) -> None:
    eventually(lambda: not client.info("persistence")["rdb_bgsave_in_progress"])


class Project:
    """A project of its own on the session's local Railway, and the tiny app to deploy in it."""

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
        """The same project, in another of its environments (by id)."""
        other = copy.copy(self)
        other._work_in(environment)
        return other

    def duplicate(self, name: str, **more: Any) -> Project:
        """Duplicate the environment, as Railway's page does; `more` of EnvironmentCreateInput."""
        given = {"projectId": self.id, "sourceEnvironmentId": self.environment, "name": name}
        made = self.railway.graphql(
            "mutation C($i: EnvironmentCreateInput!) { environmentCreate(input: $i) { id } }",
            i={**given, **more},
        )
        return self.within(made["environmentCreate"]["id"])

    def delete_environment(self) -> None:
        self.railway.graphql(
            "mutation D($i: String!) { environmentDelete(id: $i) }", i=self.environment
        )

    def run(self, *arguments: str, cwd: Path | str = TINY, **env: str) -> Verb:
        window = "--rollback-window-seconds"
        if arguments[0] in ("ensure", "scaffold") and window not in arguments:
            arguments = (*arguments, window, "0")  # what is drained may go at once
        return pulse_railway(*arguments, env={**self.env, **env}, cwd=cwd)

    def ok(self, *arguments: str, **env: str) -> Any:
        """A verb that must succeed; what it says with --json."""
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
        """Redis as it is: key without the prefix to value."""
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
        """The id of Redis's process; None while it does not answer."""
        try:
            return int(self.redis.info("server")["process_id"])
        except (redis.RedisError, KeyError):  # away, or without a name
            return None

    def snapshot(self) -> Path:
        """Have Redis write a snapshot of all it has now; returns a copy of its file."""
        client = self.redis
        _no_background_save(client)
        client.save()
        copy = self.railway.root / f"snapshot-{time.monotonic_ns()}.rdb"
        return Path(shutil.copy(_dump(client), copy))

    def restore_snapshot(self, snapshot: Path) -> None:
        """Kill Redis and let it come up on an older snapshot: what it had since then is lost.

        Railway counts it as a crash: after ten of them it restarts a deployment no more.
        """
        client, process = self.redis, self.redis_process()
        assert process
        client.config_set("save", "")  # until its end it writes no other
        _no_background_save(client)
        shutil.copy(snapshot, _dump(client))
        os.kill(process, signal.SIGKILL)
        eventually(lambda: self.redis_process() not in (None, process))

    def latest(self, service: str) -> dict[str, str]:
        """The id and the status of a service's latest deployment."""
        found = self.railway.graphql(
            "query ($s: String!, $e: String!) { serviceInstance(serviceId: $s, environmentId: $e)"
            " { latestDeployment { id status } } }",
            s=self.stage.services()[service]["serviceId"],
            e=self.environment,
        )
        return dict(found["serviceInstance"]["latestDeployment"])

    def restart(self, service: str) -> None:
        """Railway's "Restart": the deployment's own variables, another process."""
        restart = "mutation ($d: String!) { deploymentRestart(id: $d) }"
        self.railway.graphql(restart, d=self.latest(service)["id"])

    def janitor(self) -> dict[str, Any]:
        """One run of the janitor, to its end: its report. With `exit` and `refused`, what it said
        where it made none."""
        url = self.railway.api.replace("/graphql/v2", "/local/cron/pulse-janitor")
        where = {"project": self.id, "environment": self.environment}
        answers: list[Any] = []

        def ran() -> bool:  # not where a control command's run has not quite ended
            answers.append(demo.post(url, params=where, timeout=60).json())
            return answers[-1]["exit"] is not None

        eventually(ran, 60)
        done = answers[-1]
        last = done["log"][-1]
        report = json.loads(last) if last.startswith("{") else {"refused": last}
        return {**report, "exit": done["exit"]}

    def variables(self, service: str) -> dict[str, str]:
        """A service's variables as they were written."""
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
    made = Project(railway, f"{request.module.__name__}-{time.monotonic_ns()}")
    yield made
    made.delete()


BASE = {"pulse-router", "pulse-env", "pulse-redis", "pulse-janitor"}


@pytest.fixture(scope="module")
def base(project: Project) -> Project:
    """A baseline with one active deployment, `first`."""
    project.ok("ensure", "main.py")
    project.deploy("first")
    return project


@pytest.fixture
def new_project(railway: demo.Stage) -> Iterator[Callable[[], Project]]:
    """`new_project()`: an empty project for one test."""
    made: list[Project] = []

    def make() -> Project:
        made.append(Project(railway, f"project-{time.monotonic_ns()}"))
        return made[-1]

    yield make
    for one in made:
        one.delete()
