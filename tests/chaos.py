"""The chaos run: 200 clients browse, upload, stream and hold sockets through three routers, while
deployments change, and routers, Redis and backends fail.

    invoke chaos --minutes 10 [--seed N]      by hand; the tests have a short run

Routers, Redis, janitor, control commands and the Pulse apps are real, each a process of its own.
Light backends beside the Pulse apps allow more load. This file replaces Railway: it starts, stops
and restarts backends, and has the list of services for the janitor. It also replaces Railway's
edge, which sends no new connection to a router that is about to be stopped.

Every answer is counted and judged (chaos_clients.py). Only requests, sockets and tabs of a backend
that was killed or ended on purpose may fail.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import types
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pulse_railway import runtime_image
from pulse_railway.local.supervisor import free_port
from tests.chaos_clients import Client, ClientConnection, Tab
from tests.conftest import ROOT, Process, Redis, router_command

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
APPS = ROOT / "tests" / "apps" / "chaos"
TOKEN = "chaos-internal-token"
DRAIN_TTL = 60.0
GIVEN_BACK = 12.0  # seconds after which new visitors get a deployment again that was down
SEEN_WITHIN = 1.0  # seconds until every router must serve a promotion
SEEN_WITHIN_AFTER_REDIS = 8.0  # the same, after Redis was not available
MAX_DEPLOYMENTS = 6  # at once
QUICK = {"refresh_seconds": 3.0}


@dataclass
class BackendProcess:
    """One deployment's processes, on ports one behind another."""

    name: str
    port: int
    pulse: bool
    processes: list[Process]


@dataclass
class Sample:
    """A router's resources in use, without clients."""

    descriptors: int
    memory: int  # bytes


@dataclass
class World:
    seed: int
    folder: Path
    redis: Redis
    pulse_share: float
    rng: random.Random = field(init=False)
    began: float = field(default_factory=time.monotonic)
    over: bool = False
    ports: list[int] = field(default_factory=list)  # of the routers that get new connections
    routers: list[Process] = field(default_factory=list)
    retired: set[int] = field(default_factory=set)  # ports of routers that were stopped
    running: dict[str, BackendProcess] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    down: list[tuple[str, float, float]] = field(default_factory=list)  # on purpose: from, until
    expected: list[tuple[float, set[str]]] = field(default_factory=list)  # who may answer newcomers
    last_promoted: str | None = None  # `<deployment id>@<time>` of the last promotion
    redis_back: float = 0.0
    count: collections.Counter[str] = field(default_factory=collections.Counter)
    events: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    seen_after: list[float] = field(default_factory=list)  # seconds, per promotion
    # when sockets were closed by a router that was replaced, by its port; monotonic
    closed: dict[int, list[float]] = field(default_factory=dict)
    back_after: list[float] = field(default_factory=list)  # seconds until such a socket was back

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}-events")

    # -- judging -------------------------------------------------------------------------------

    def fail(self, kind: str, message: str) -> None:
        self.count[f"FAILED {kind}"] += 1
        at = time.monotonic() - self.began
        self.failures.append(f"{at:6.1f} s {kind}: {message}")

    def may_answer(self, name: str, since: float) -> bool:
        """May `name` answer a request without affinity that was sent at `since` (monotonic)?"""
        late = SEEN_WITHIN_AFTER_REDIS if since < self.redis_back + 8 else SEEN_WITHIN
        allowed: set[str] = set()
        for at, names in self.expected:
            if at <= since - late:
                allowed = set(names)
            else:
                allowed |= names
        return name in allowed or any(self.was_down(other, since - GIVEN_BACK) for other in allowed)

    def has_fallback(self, name: str) -> bool:
        """Can another deployment answer new visitors in place of `name`?"""
        numbers = range(1, len(self.running[name].processes) + 1) if name in self.running else ()
        if len(numbers) > 1 and not all(self.was_down(f"{name}.{n}", 0) for n in numbers):
            return True  # another process
        routing = self.store.read()
        fallback = routing.fallback.deployment_id if routing.fallback else ""
        return (
            routing.active == name and fallback in self.running and not self.was_down(fallback, 0)
        )

    def was_down(self, name: str, since: float) -> bool:
        """Was a process (`<deployment>.<k>`), or any of a deployment, down on purpose at `since` or
        later?"""
        now, deployment = time.monotonic(), name.partition(".")[0]
        names = {name, deployment} if "." in name else {name}
        return any(
            (n in names or n.partition(".")[0] == name) and a <= now and b >= since
            for n, a, b in self.down
        )

    # -- processes -----------------------------------------------------------------------------

    @property
    def env(self) -> dict[str, str]:
        return {
            "REDIS_URL": self.redis.url,
            "PULSE_RAILWAY_INTERNAL_TOKEN": TOKEN,
            "RAILWAY_SERVICE_ID": "here",
        }

    async def start_router(self) -> Process:
        port = free_port()
        env = self.env | {"PORT": str(port), "HOST": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        env |= {"PULSE_RAILWAY_ACTIVE": ""}
        process = Process(router_command(limits=QUICK), port, env)
        await asyncio.to_thread(process.wait, 60)
        await self.until_status(port, "/healthz", 200)
        return process

    def spawn(self, name: str, port: int, pulse: bool, number: int, count: int) -> Process:
        """Start a process of a deployment, whose first one has the port."""
        port += number - 1
        several = {
            "PULSE_RAILWAY_INSTANCE": str(number),
            "PULSE_RAILWAY_INSTANCES": str(count),
            "PULSE_DISABLE_CODEGEN": "1" if number > 1 else "",
        }
        env = {
            **(several if count > 1 else {}),
            "PULSE_DEPLOYMENT_ID": name,
            "PULSE_RAILWAY_INTERNAL_TOKEN": TOKEN,
            "PULSE_RAILWAY_REDIS_URL": self.redis.url,
            "PULSE_REACT_SERVER_ADDRESS": "http://127.0.0.1:9",
            "PULSE_ENV": "dev",
            "PORT": str(port),
        }
        if not pulse:
            return Process([sys.executable, str(APPS / "light.py")], port, env)
        home = self.folder / name
        home.mkdir(exist_ok=True)
        (home / "main.py").write_text((APPS / "main.py").read_text())
        command = [sys.executable, "-m", "uvicorn", "main:app.asgi_factory", "--factory"]
        command += ["--port", str(port), "--ws", "websockets", "--no-access-log"]
        return Process(command, port, env | {"PYTHONPATH": str(ROOT)}, home)

    async def start_backend(self, pulse: bool) -> BackendProcess:
        count = self.rng.choice((1, 2))
        name, port = f"d{len(self.ended) + len(self.running)}", free_port(count)
        processes = [self.spawn(name, port, pulse, k, count) for k in range(1, count + 1)]
        backend = BackendProcess(name, port, pulse, processes)
        for number, process in enumerate(processes):
            await asyncio.to_thread(process.wait, 90)
            await self.until_status(port + number, "/_pulse/health", 200)
        self.running[name] = backend
        return backend

    async def end_backend(self, name: str) -> None:
        """End a backend, as Railway deletes a service."""
        backend = self.running.pop(name, None)
        if backend:
            self.ended.add(name)
            self.down.append((name, time.monotonic(), float("inf")))
            for process in backend.processes:
                await asyncio.to_thread(process.stop)

    async def until_status(self, port: int, path: str, status: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                if (await self.look(port, path)).status == status:
                    return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{path} on {port} did not become {status}")

    async def look(self, port: int, path: str) -> Any:
        """Send a request that is not judged, and return its answer."""
        connection = ClientConnection(port)
        try:
            async with asyncio.timeout(10):
                await connection.open()
                head = f"GET {path} HTTP/1.1\r\nhost: a\r\nuser-agent: chaos\r\n"
                return await connection.ask(f"{head}connection: close\r\n\r\n".encode())
        finally:
            if hasattr(connection, "writer"):
                connection.close()

    # -- control -------------------------------------------------------------------------------

    async def control(self, *words: str) -> dict[str, Any]:
        """Carry out a control command, as in a router's container."""
        nonce = f"{self.rng.getrandbits(64):x}"
        command = [*words, "--nonce", nonce, "--by", "chaos"]
        command += ["--intent", self.last_promoted] if self.last_promoted else []
        for _ in range(6):
            answer = await asyncio.to_thread(control.carry_out, command, {**os.environ, **self.env})
            if answer["ok"] or answer["reason"] != "store":
                return dict(answer)
            await asyncio.sleep(1)
        raise AssertionError(f"{words}: {answer}")

    async def state(self) -> Any:
        """Return the routing state, when lost data are restored."""
        for _ in range(100):
            with contextlib.suppress(Exception):
                routing = await asyncio.to_thread(self.store.read)
                if routing.active:
                    return routing
            await asyncio.sleep(0.1)
        raise AssertionError("the routing state did not come back")

    @property
    def store(self) -> Any:
        return router.RedisStore(self.redis.url, "pulse:railway")

    async def choose(
        self, *words: str, result: Callable[[], set[str] | None]
    ) -> dict[str, Any] | None:
        """Run a command that changes which deployments may answer new visitors.

        Returns its answer, or None if the router has refused it.

        Args:
            result: returns the deployments that may answer after the command.
        """
        before = self.expected[-1][1] if self.expected else set()
        after = result()
        self.expected.append((time.monotonic(), before | (after or set())))
        answer = await self.control(*words)
        self.expected.append((time.monotonic(), (after or before) if answer["ok"] else before))
        return answer if answer["ok"] else None

    async def promote(self, name: str, *more: str) -> bool:
        words = ["promote", "--active-deployment-id", name, "--active-service-name", name]
        began = time.monotonic()
        answer = await self.choose(*words, *more, result=lambda: {name})
        if answer:
            self.last_promoted = "{deployment_id}@{at!r}".format(**answer["promoted"])
            await self.until_seen(name, began)
        return answer is not None

    async def until_seen(self, name: str, began: float) -> None:
        """Wait until every router serves `name` to new visitors."""
        for port in list(self.ports):
            while time.monotonic() < began + 30:
                with contextlib.suppress(OSError, EOFError, TimeoutError):
                    if (await self.look(port, "/work")).deployment == name:
                        break
                await asyncio.sleep(0.005)
            else:
                self.fail("promotion", f"{name} was not seen by the router on {port} in 30 s")
        self.seen_after.append(time.monotonic() - began)

    def others(self, state: Any, *states: str) -> list[str]:
        return [
            name
            for name, record in state.records.items()
            if record.state in states and not record.retiring_at and name in self.running
        ]

    # -- what happens --------------------------------------------------------------------------

    async def bring_up(self) -> str | None:
        """Start and register a pending deployment; None if there are MAX_DEPLOYMENTS already."""
        if len(self.running) >= MAX_DEPLOYMENTS:
            await self.janitor_runs()
            return None
        backend = await self.start_backend(self.rng.random() < self.pulse_share)
        words = ["--deployment-id", backend.name, "--service-name", backend.name]
        words += ["--address", f"http://127.0.0.1:{backend.port}", "--service-id", backend.name]
        words += ["--instances", str(len(backend.processes))]
        answer = await self.control("register", *words, "--hold")
        assert answer["ok"], answer
        return backend.name

    async def deploy(self) -> None:
        if name := await self.bring_up():
            await self.promote(name)

    async def failed_deploy(self) -> None:
        """Register a deployment and remove it, as after a failed check."""
        if name := await self.bring_up():
            await self.delete(name)

    async def canary(self) -> None:
        """Run a canary with two weights; then promote it, abort it, deploy another, or crash it."""
        state = await self.state()
        if state.canary or not (name := await self.bring_up()):
            return
        active = state.active
        words = ["promote", "--active-deployment-id", name, "--active-service-name", name]
        for weight in sorted(self.rng.sample(range(1, 100), 2)):
            if not await self.choose(
                *words, "--weight", str(weight), result=lambda: {active, name}
            ):
                return
            await asyncio.sleep(self.rng.uniform(1, 3))
        match self.rng.choice(("promote", "withdraw", "overtake", "crash")):
            case "promote":
                await self.promote(name)
            case "withdraw":
                await self.choose("withdraw", "--deployment-id", name, result=lambda: {active})
            case "overtake":
                await self.deploy()
                await self.delete(name)
            case _:
                await self.crash(name)
                await asyncio.sleep(1)
                await self.choose("withdraw", "--deployment-id", name, result=lambda: {active})

    async def rollback(self) -> None:
        state = await self.state()
        candidates = [
            r
            for r in state.records.values()
            if r.state == "draining"
            and not (r.retiring_at or r.rejected_at)
            and r.deployment_id in self.running
        ]
        if candidates and not state.canary:
            candidates.sort(key=lambda r: -(r.drain_started_at or 0.0))
            name = candidates[0].deployment_id
            await self.promote(name, "--instead-of", state.active, "--rolls-back")

    async def delete_one(self) -> None:
        state = await self.state()
        if names := self.others(state, "draining", "pending"):
            names = [name for name in names if not state.records[name].is_canary]
            if names:
                await self.delete(self.rng.choice(names))

    async def delete(self, name: str) -> None:
        self.down.append((name, time.monotonic(), float("inf")))  # its tabs are told to reload
        answer = await self.control("retire", "--deployment-id", name, "--service-id", name)
        if not answer["ok"]:
            self.down.pop()
            return
        if answer["behind"]:  # a router may still route to it: the janitor removes it
            return
        await self.end_backend(name)
        await self.control("delete", "--deployment-id", name)

    async def janitor_runs(self, killed: bool = False) -> None:
        """Run the janitor in a process of its own; files replace Railway's services."""
        services = self.folder / "services.json"
        services.write_text(json.dumps({n: b.port for n, b in self.running.items()}))
        gone = self.folder / "gone"
        gone.write_text("")
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "tests.chaos",
                str(services),
                str(gone),
                self.last_promoted or "",
            ),
            cwd=ROOT,
            env={**os.environ, **self.env},
            stderr=asyncio.subprocess.DEVNULL,
        )
        ends = time.monotonic() + (self.rng.uniform(0.3, 1.5) if killed else 60)
        while process.returncode is None:
            for name in gone.read_text().split():
                if name in self.running:
                    await self.end_backend(name)
            if time.monotonic() > ends:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            await asyncio.sleep(0.02)
        if process.returncode not in (0, -signal.SIGKILL):
            self.fail("janitor", f"it has ended with {process.returncode}")
        for name in gone.read_text().split():
            await self.end_backend(name)

    async def router_restarts(self) -> None:
        """Replace a router: start a new one, send new connections there, stop the old one."""
        at = self.rng.randrange(1, len(self.routers))  # the first one runs all the time
        new = await self.start_router()
        old, self.routers[at] = self.routers[at], new
        self.ports[at] = new.port
        await asyncio.sleep(0.5)
        self.retired.add(old.port)
        self.closed[old.port] = []
        os.kill(old.popen.pid, signal.SIGTERM)
        await asyncio.to_thread(old.popen.wait, 60)

    async def redis_restarts(self) -> None:
        await asyncio.to_thread(self.redis.stop)
        await asyncio.sleep(self.rng.uniform(0, 3))
        await asyncio.to_thread(self.redis.start)
        self.redis_back = time.monotonic()

    async def redis_stalls(self) -> None:
        self.redis.signal(signal.SIGSTOP)
        await asyncio.sleep(self.rng.uniform(0.5, 4))
        self.redis.signal(signal.SIGCONT)
        self.redis_back = time.monotonic()

    async def redis_loses_the_routing_state(self) -> None:
        client = self.redis.client
        await asyncio.sleep(3.5)  # until every router has read the state
        keys = [k for k in client.scan_iter("pulse:railway:*") if ":router:" not in k]
        client.delete(*keys)
        self.redis_back = time.monotonic()
        await self.state()

    async def backend_crashes(self) -> None:
        await self.crash(self.rng.choice(list(self.running)))

    async def crash(self, name: str) -> None:
        """Kill a process of a backend and start it again, as Railway and `serve` do."""
        backend = self.running[name]
        count = len(backend.processes)
        at = self.rng.randrange(count)
        port, named = backend.port + at, f"{name}.{at + 1}" if count > 1 else name
        began = time.monotonic()
        self.down.append((named, began, float("inf")))
        await asyncio.to_thread(backend.processes[at].stop, signal.SIGKILL)
        await asyncio.sleep(self.rng.uniform(0, 1))
        backend.processes[at] = self.spawn(name, backend.port, backend.pulse, at + 1, count)
        await asyncio.to_thread(backend.processes[at].wait, 90)
        await self.until_status(port, "/_pulse/health", 200)
        place = self.down.index((named, began, float("inf")))
        self.down[place] = (named, began, time.monotonic() + 0.5)

    async def backend_stalls(self) -> None:
        """Freeze a backend for a while: it is slow, but no request may fail."""
        process = self.rng.choice(self.rng.choice(list(self.running.values())).processes)
        os.killpg(process.popen.pid, signal.SIGSTOP)
        await asyncio.sleep(self.rng.uniform(0.5, 3))
        os.killpg(process.popen.pid, signal.SIGCONT)

    # -- the run -------------------------------------------------------------------------------

    async def begin(self) -> None:
        for _ in range(3):
            self.routers.append(await self.start_router())
            self.ports.append(self.routers[-1].port)
        name = await self.bring_up()
        assert name
        await self.promote(name)

    async def play(self, clients: int, tabs: int, seconds: float, events: bool) -> None:
        """Run clients for `seconds`; with `events`, something happens all the time."""
        self.over = False
        users = [asyncio.create_task(Client(self, n).run()) for n in range(clients)]
        users += [asyncio.create_task(Tab(self, n).run()) for n in range(tabs)]
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                await asyncio.sleep(self.rng.uniform(0.2, 2.0))
                for task in users:
                    if task.done() and task.exception():
                        raise task.exception() or AssertionError
                if events and time.monotonic() > deadline - seconds / 2 and not self.closed:
                    await self.event(self.router_restarts)  # sockets are open by now
                elif events:
                    await self.happen()
        finally:
            self.over = True
            await asyncio.wait(users, timeout=END_TIMEOUT)
            for task in users:
                task.cancel()
            await asyncio.gather(*users, return_exceptions=True)

    async def happen(self) -> None:
        kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.deploy: 4,
            self.failed_deploy: 1,
            self.canary: 3,
            self.rollback: 2,
            self.delete_one: 2,
            self.janitor_runs: 2,
            self.janitor_is_killed: 1,
            self.router_restarts: 2,
            self.redis_restarts: 1,
            self.redis_stalls: 1,
            self.redis_loses_the_routing_state: 1,
            self.backend_crashes: 1,
            self.backend_stalls: 2,
        }
        await self.event(self.rng.choices(list(kinds), list(kinds.values()))[0])

    async def event(self, event: Callable[[], Awaitable[None]]) -> None:
        name = event.__name__.replace("_", " ")
        if os.environ.get("CHAOS_SAYS"):
            print(f"{time.monotonic() - self.began:6.1f} s {name}", file=sys.stderr)
        await event()
        self.events[name] += 1

    async def janitor_is_killed(self) -> None:
        await self.janitor_runs(killed=True)

    async def sample_at_rest(self, process: Process) -> Sample:
        """Return a router's resources when clients and pooled connections are closed."""
        await asyncio.sleep(6)
        fds = len(list(Path(f"/proc/{process.popen.pid}/fd").iterdir()))
        return Sample(fds, process.rss)

    def stop(self) -> None:
        backends = [process for b in self.running.values() for process in b.processes]
        for process in [*self.routers, *backends]:
            process.stop(signal.SIGKILL)
        self.redis.stop()


END_TIMEOUT = 60.0


@dataclass
class Result:
    world: World
    before: Sample
    after: Sample

    def problems(self) -> list[str]:
        problems = list(self.world.failures)
        before, after = self.before, self.after
        if after.descriptors > before.descriptors:
            problems.append(f"descriptors: {before.descriptors}, then {after.descriptors}")
        if after.memory > before.memory * 1.25 + (4 << 20):
            problems.append(f"memory: {before.memory}, then {after.memory}")
        return problems

    def upgrades(self) -> list[str]:
        """Return what became of the sockets of routers that were replaced."""
        back = sorted(self.world.back_after)
        lines = []
        for at, times in enumerate(self.world.closed.values(), 1):
            over = max(times) - min(times) if times else 0.0
            most = max((sum(t <= u < t + 1 for u in times) for t in times), default=0)
            lines.append(
                f"  {len(times):8} sockets closed over {over:.1f} s by router {at}, replaced,"
                f" at most {most} in a second"
            )
        if back:
            lines.append(f"  {back[len(back) // 2]:8.3f} s until such a socket was back (median)")
            lines.append(f"  {back[-1]:8.3f} s ... the slowest of {len(back)}")
        return lines

    def table(self) -> str:
        world, seen = self.world, sorted(self.world.seen_after)
        lines = [f"seed {world.seed}"]
        lines += [f"  {n:8} {name}" for name, n in sorted(world.events.items())]
        lines += [f"  {n:8} {name}" for name, n in sorted(world.count.items())]
        for kind in ("request", "wrong version", "session", "socket", "tab"):
            if not world.count[f"FAILED {kind}"]:
                lines.append(f"  {0:8} failed: {kind}")
        if seen:
            middle, last = seen[len(seen) // 2], seen[-1]
            lines.append(f"  {middle:8.3f} s until every router had seen a promotion (median)")
            lines.append(f"  {last:8.3f} s ... the slowest of {len(seen)}")
        lines += self.upgrades()
        b, a = self.before, self.after
        lines.append(f"  {b.descriptors:4} -> {a.descriptors:<4} descriptors of the first router")
        lines.append(f"  {b.memory >> 20:4} -> {a.memory >> 20:<4} MB of it")
        lines += [f"  FAILED {line}" for line in world.failures[:20]]
        return "\n".join(lines)


async def chaos(
    seconds: float, seed: int, clients: int, tabs: int, pulse_share: float, folder: Path
) -> Result:
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell may have it ignored
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    (folder / "redis").mkdir()
    world = World(seed, folder, Redis(folder=folder / "redis"), pulse_share)
    try:
        await world.begin()
        await world.play(clients, tabs, min(8.0, seconds / 3), events=False)
        before = await world.sample_at_rest(world.routers[0])
        await world.play(clients, tabs, seconds, events=True)
        after = await world.sample_at_rest(world.routers[0])
        return Result(world, before, after)
    finally:
        world.stop()


def run(
    seconds: float, seed: int, clients: int = 200, tabs: int = 8, pulse_share: float = 0.3
) -> Result:
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return asyncio.run(chaos(seconds, seed, clients, tabs, pulse_share, Path(folder)))


def main(minutes: float, seed: int) -> int:
    result = run(minutes * 60, seed)
    print(result.table())
    if problems := result.problems():
        print(f"repeat it: invoke chaos --minutes {minutes:g} --seed {seed}")
    return 1 if problems else 0


def janitor(services: str, gone: str, last_promoted: str) -> None:
    """Run janitor.py once on a Railway that consists of two files.

    Args:
        services: the file with the names of the services.
        gone: the file to which the names of deleted services are added.
        last_promoted: `<deployment id>@<time>`, or "".
    """
    script: Any = runtime_image.load("janitor")
    names = json.loads(Path(services).read_text())
    name, _, at = last_promoted.partition("@")
    promoted = script.Promotion(name, float(at)) if last_promoted else None
    backends = [script.Backend(n, n, n, 1e6, "SUCCESS", ours=True) for n in names]
    inventory = script.Inventory(backends, "router", promoted)

    def delete(service: Any) -> None:
        with open(gone, "a") as file:
            file.write(f"{service.deployment}\n")
        time.sleep(0.1)

    railway = types.SimpleNamespace(delete=delete, remember=lambda *_: None)
    store = router.store_from_env(dict(os.environ))
    with script.run_lock(store) as locked:
        if locked:
            limits = script.Retention(DRAIN_TTL, 10.0, 0)
            with contextlib.suppress(script.Contradiction):
                script.clean_up(store, railway, store.read(), inventory, TOKEN, limits)


if __name__ == "__main__":
    janitor(*sys.argv[1:])
