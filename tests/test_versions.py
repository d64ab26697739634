"""Versions side by side, on one store: this one, the one before, and 0.3.13.

`older` is this repository before the routing state had types (see older.py). It neither writes who
was promoted last and when nor raises the epoch; 0.3.13 announces nothing either, and its janitor
writes the active record anew, with four fields, in each run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import peer
from pulse_railway import control_job, router_commands, runtime_image
from pulse_railway.config import ControlRoute
from pulse_railway.errors import Refused, Uncertain
from pulse_railway.local.supervisor import free_port
from pulse_railway.railway import ssh
from tests import older
from tests.conftest import ROOT, Process, Redis, router_command
from tests.net import Backend, ask, eventually, ok

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")

PREFIX = "pulse:railway"
NAMES = ("a", "b", "c", "d")
ABOUT = {"commit": "1234567", "by": "test"}
ANSWER = {"render_session_count": 0, "reloaded_socket_count": 0}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return older.unpack(tmp_path_factory.mktemp("older"))


@pytest.fixture(scope="session")
def before(sources: Path) -> SimpleNamespace:
    """The older router.py and janitor.py."""
    of_router, of_janitor = older.load(sources)
    return SimpleNamespace(router=of_router, janitor=of_janitor)


class Site:
    """A Redis, and a backend for each of NAMES, which has the private name of its service."""

    def __init__(self, server: Redis, folder: Path) -> None:
        self.server = server
        self.backends = {name: Backend() for name in NAMES}
        self.hosts = folder / "hosts.json"
        ports = {f"{n}.railway.internal": {"8000": b.port} for n, b in self.backends.items()}
        self.hosts.write_text(json.dumps(ports))
        self.store = router.RedisStore(server.url, PREFIX)
        self.env = {"REDIS_URL": server.url, "RAILWAY_SERVICE_ID": "here"}
        for name in NAMES:
            self.tabs(name, 1)

    def tabs(self, name: str, count: int) -> None:
        said = {"deployment_id": name, **ANSWER, "render_session_count": count}
        answer = ok(json.dumps(said).encode(), "content-type: application/json")
        self.backends[name].answer = answer

    def control(self, *words: str) -> dict[str, Any]:
        """Today's control command."""
        return dict(control.carry_out(list(words), self.env))

    def register(self, name: str, run: Callable[..., Any] | None = None) -> Any:
        words = ["register", "--deployment-id", name, "--service-name", name]
        words += ["--service-id", f"s-{name}", "--address", self.backends[name].address]
        return (run or self.control)(*words, "--about", json.dumps(ABOUT))

    def promote(self, name: str, *words: str, run: Callable[..., Any] | None = None) -> Any:
        given = ["--active-deployment-id", name, "--active-service-name", name]
        return (run or self.control)("promote", *given, *words)

    def deploy(self, *names: str) -> None:
        for name in names:
            assert self.register(name)["ok"]
            assert self.promote(name)["ok"]

    @property
    def state(self) -> Any:
        return self.store.read()

    def record(self, name: str) -> dict[str, Any]:
        raw = self.server.client.get(f"{PREFIX}:deployment:{name}")
        return dict(json.loads(str(raw))) if raw else {}

    def mark(self, name: str) -> None:
        """A field of another tool's in a record."""
        key = f"{PREFIX}:deployment:{name}"
        self.server.client.set(key, json.dumps({**self.record(name), "x-foreign": name}))

    def keys(self) -> dict[str, str]:
        """All that the store has."""
        keys = [str(key) for key in self.server.client.scan_iter()]
        return dict(zip(keys, map(str, self.server.client.mget(keys)), strict=True))

    def reset(self, keys: dict[str, str]) -> None:
        """Have the store hold these and nothing else."""
        with self.server.client.pipeline() as pipe:
            pipe.flushall()
            pipe.mset(keys)
            pipe.execute()

    def stop(self) -> None:
        for backend in self.backends.values():
            backend.stop()


@pytest.fixture
def site(redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(redis_server, tmp_path)
    known = {f"{name}.railway.internal": backend.port for name, backend in made.backends.items()}
    resolve = socket.getaddrinfo

    def resolved(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if host in known:
            host, port = "127.0.0.1", known[host]
        return resolve(host, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.delenv("PULSE_RAILWAY_ACTIVE", raising=False)
    yield made
    made.stop()


Start = Callable[..., Process]


@pytest.fixture
def run(site: Site, start: Start, sources: Path) -> Callable[[str], Process]:
    """`run("today" | "older" | "0.3.13")`: a router of that version on the site's store, which
    looks there more often than usual."""
    limits = {"refresh_seconds": 1.0, "report_seconds": 1.0, "missing_seconds": 1.5}
    today = router_command(limits=limits)[-1]
    before = "import router; router.REFRESH_EVERY = 1.0; router.main([])"
    first = """if True:
        import os, uvicorn
        from pulse_railway.railway.client import RailwayResolver
        RailwayResolver.__init__.__kwdefaults__["cache_ttl_seconds"] = 0.5
        app, port = "pulse_railway.router:build_app_from_env", int(os.environ["PORT"])
        uvicorn.run(app, factory=True, host="127.0.0.1", port=port)
    """
    versions = {
        "today": (sys.executable, today, [older.SITE, ROOT]),
        "older": (sys.executable, before, [older.SITE, sources]),
        "0.3.13": (str(peer.python()), first, [older.SITE]),
    }

    def begin(version: str) -> Process:
        port = free_port()
        python, source, path = versions[version]
        env = {**site.env, "PORT": str(port), "HOST": "127.0.0.1"}
        env |= {"RAILWAY_LOCAL_HOSTS": str(site.hosts), "PYTHONPATH": ":".join(map(str, path))}
        ours = python == sys.executable
        command = [python, "-c", source] if ours else [python, "-P", "-c", source]
        process = start(command, port, env, forked=ours)
        eventually(lambda: ask(port, "/healthz").status == 200)
        return process

    return begin


@pytest.fixture
def published(site: Site) -> Iterator[older.Published]:
    with older.Published(site.server.url, site.hosts) as process:
        yield process


def served(process: Process, affinity: str = "") -> tuple[int, str | None]:
    """Who answers a request."""
    answer = ask(process.port, f"/?pulse_deployment={affinity}" if affinity else "/")
    return answer.status, answer.header("x-pulse-selected-deployment")


def serves(process: Process, affinity: str = "", within: float = 16.0) -> None:
    """It is the active deployment, or the one that was asked for."""
    name = affinity or None
    eventually(lambda: served(process, affinity) == (200, name), within)


# -- routers side by side ----------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["today", "older", "0.3.13"])
def test_routers_of_two_versions_serve_what_any_writes(
    site: Site,
    run: Callable[[str], Process],
    before: SimpleNamespace,
    published: older.Published,
    writer: str,
) -> None:
    """Each promotes, registers, rolls back, deletes; no field of ours or of another's is lost."""
    site.deploy("a")
    site.mark("a")
    routers = [run("today"), run("older")]

    def write(*words: str) -> None:
        if writer == "0.3.13":  # as its own CLI asks for them
            flags = ("--service-id", "--address", "--about", "--rolls-back")
            cut = min([words.index(flag) for flag in flags if flag in words] or [len(words)])
            assert published.control(*words[:cut])["ok"]
        else:
            carry_out = control.carry_out if writer == "today" else before.router.carry_out
            assert carry_out(list(words), site.env)["ok"]

    def all_serve(active: str, *others: str) -> None:
        for process in routers:
            eventually(lambda p=process: served(p) == (200, active), 16)  # type: ignore[misc]
            for name in (active, *others):
                serves(process, name)

    all_serve("a")
    site.register("b", write)
    all_serve("a", "b")
    kept = site.record("a")
    site.promote("b", run=write)
    all_serve("b", "a")
    eventually(lambda: site.state.promoted.deployment_id == "b")
    given = {"service_id": "s-a", "address": site.backends["a"].address, "about": ABOUT}
    given |= {name: kept[name] for name in ("registered_at", "promoted_at")}
    eventually(lambda: given.items() <= site.record("a").items())
    if writer != "0.3.13":  # which itself drops what it does not know
        assert site.record("a")["x-foreign"] == "a"
    promoted = site.state.promoted.at
    assert abs(promoted - time.time()) < 20

    site.promote("a", "--rolls-back", run=write)
    all_serve("a", "b")
    eventually(lambda: site.state.promoted.deployment_id == "a")
    assert site.state.promoted.at > promoted
    assert site.record("b")["state"] == "draining"
    assert bool(site.record("b").get("rejected_at")) == (writer != "0.3.13")

    site.backends["b"].stop()  # as its service is deleted with it
    write("delete", "--deployment-id", "b")
    for process in routers:
        eventually(lambda p=process: served(p, "b")[0] == 409, 16)  # type: ignore[misc]
    time.sleep(1.5)  # another read
    assert site.record("b") == {}
    all_serve("a")


def test_a_command_names_an_older_router_and_does_not_wait_for_it(
    site: Site, run: Callable[[str], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "OTHER_VERSION_SECONDS", 2.0)
    site.deploy("a", "b")
    today, old = run("today"), run("older")
    eventually(lambda: len(site.control("status")["routers"]) == 2)
    began = time.monotonic()
    answer = site.promote("a")
    assert time.monotonic() - began < 2
    versions = {r["version"]: r["router"] for r in answer["routers"]}
    assert versions.keys() == {None, router.runtime_version()}
    assert answer["behind"] == [versions[None]]  # nobody knows, and it is said
    assert [r["epoch"] for r in answer["routers"] if r["version"]] == [site.state.epoch]
    for process in (today, old):
        serves(process, "a", 5)

    def reports() -> dict[Any, Any]:
        return {r.get("version"): r for r in site.control("status")["routers"]}

    eventually(lambda: all("a" in r["tallies"] for r in reports().values()), 16)
    of_today, of_older = reports()[router.runtime_version()], reports()[None]
    assert of_older.keys() <= of_today.keys()  # a bake reads either
    old_tally, new_tally = of_older["tallies"]["a"], of_today["tallies"]["a"]
    assert differences(old_tally, new_tally) == ""

    began = time.monotonic()
    assert site.control("retire", "--deployment-id", "b")["behind"] == [versions[None]]
    assert time.monotonic() - began < 2
    for process in (today, old):
        eventually(lambda p=process: served(p, "b")[0] == 409, 16)  # type: ignore[misc]
    time.sleep(max(0.0, 2.1 - (time.monotonic() - began)))
    assert site.control("retire", "--deployment-id", "b")["behind"] == []
    # of one without a record, too
    assert site.control("retire", "--deployment-id", "c", "--service-id", "s-c")["behind"]
    time.sleep(2.1)
    assert not site.control("retire", "--deployment-id", "c", "--service-id", "s-c")["behind"]


def test_an_emptied_store_is_mended_by_routers_of_both_versions(
    site: Site, run: Callable[[str], Process]
) -> None:
    site.deploy("a", "b")
    assert site.promote("a", "--rolls-back", "--instead-of", "b")["ok"]
    routers = [run("older"), run("today")]
    wanted = site.state
    for version in ("older", "today"):
        if version == "older":  # which looks first
            site.server.client.flushall()
            site.store.announce()
        else:
            site.server.client.delete(f"{PREFIX}:active", f"{PREFIX}:promoted", f"{PREFIX}:store")
        eventually(lambda: site.state.promoted == wanted.promoted, 16)
        time.sleep(1.5)  # each has read it again
        found = site.state
        assert (found.active, found.promoted) == ("a", wanted.promoted)
        assert found.records == wanted.records
        for process in routers:
            serves(process, "b")
            assert served(process) == (200, "a")


# -- a rollback beside an older janitor ----------------------------------------------------------


class Rails:
    """What stands on Railway while a janitor runs, and what is done at which of its steps."""

    def __init__(self, site: Site, promotion: Any) -> None:
        self.site = site
        self.services = {name: f"s-{name}" for name in "abc"}
        self.variables = {"PULSE_RAILWAY_ACTIVE": promotion.deployment_id}
        self.variables["PULSE_RAILWAY_ACTIVE_AT"] = repr(promotion.at)
        self.step = 0
        self.at: list[int] = []  # the steps before which the commands come
        self.refused: str | None = None

    def gate(self) -> None:
        """Before each step of the janitor's."""
        while self.at and self.at[0] <= self.step:
            self.go_on()
        self.step += 1

    def go_on(self) -> None:
        """The next command of a rollback from b to a: the promotion, then what Railway is told."""
        del self.at[:1]
        promoted = self.site.state.promoted
        if len(self.at) == 1:
            promotion = "@".join(self.variables.values())
            words = ["--instead-of", "b", "--rolls-back", "--intent", promotion]
            answer = self.site.promote("a", *words)
            self.refused = answer.get("error")
        elif not self.refused and promoted.deployment_id == "a":
            values = ("a", repr(promoted.at))
            self.variables = dict(zip(self.variables, values, strict=True))

    def inspect(self, of: Any) -> Any:
        """An inventory, as that janitor has it."""
        kind: Any = getattr(of, "Backend", None) or of.Service  # an older janitor's name
        found = [kind(s, name, name, 7200.0, "SUCCESS") for name, s in self.services.items()]
        last = self.variables["PULSE_RAILWAY_ACTIVE"]
        if of is janitor:
            return of.Inventory(found, "router", router.promotion_from_env(self.variables))
        return of.Seen(found, "router", last)

    def remember(self, _: str, *values: Any) -> None:
        self.gate()
        self.variables |= values[0] if len(values) == 1 else {values[0]: values[1]}

    set_variables = remember  # its name today

    def delete(self, service: Any) -> None:
        self.gate()
        assert self.site.state.active != service.deployment, "the active one's service"
        del self.services[service.deployment]

    def todays_janitor(self) -> Any:
        """A run after it; nothing live is deleted by it."""
        limits = janitor.Retention(86_400.0, 900.0, 0)
        found = self.inspect(janitor)
        return janitor.clean_up(self.site.store, self, self.site.state, found, "t", limits)


def rolled_back(site: Site, rails: Rails, known: Any) -> None:
    """What has to hold after a rollback from b to a that was carried out.

    Args:
        known: what a router of today knows since then.
    """
    for _ in range(2):
        state = site.state
        assert (state.active, state.promoted.deployment_id) == ("a", "a")
        assert {"a", "c"} <= rails.services.keys()
        assert state.records["c"].state == "draining"
        mended = router.repaired(state, known, "new")
        b = mended.records.get("b")
        assert b is None or b.state == "draining" or b.retiring_at
        assert b is None or b.rejected_at
        for name in mended.records:
            assert mended.records[name].service_id == f"s-{name}"
        report = rails.todays_janitor()
        assert (report.deleted, report.failed, report.restored) == ([], {}, None)
    assert rails.variables["PULSE_RAILWAY_ACTIVE"] == "a"
    assert rails.variables["PULSE_RAILWAY_ACTIVE_AT"] == repr(site.state.promoted.at)


def stepping(
    site: Site, before: SimpleNamespace, rails: Rails, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A store for the older janitor, whose every step, and each question to a backend, is gated."""

    class Steps(before.router.RedisStore):  # type: ignore[misc, name-defined]
        def read(self) -> Any:
            rails.gate()
            return super().read()

        def routers(self) -> Any:
            rails.gate()
            return super().routers()

        def apply(self, step: Any) -> Any:
            def inner(state: Any) -> Any:
                rails.gate()  # it is watched by now
                return step(state)

            rails.gate()
            return super().apply(inner)

    sessions = before.router.sessions

    def asked(*words: Any) -> Any:
        rails.gate()
        return sessions(*words)

    monkeypatch.setattr(before.router, "sessions", asked)
    return Steps(site.server.url, PREFIX)


@pytest.mark.parametrize("window", [0.0, 900.0])
@pytest.mark.parametrize("last", ["b", "c"])
def test_a_rollback_at_every_step_of_an_older_janitor(
    site: Site, before: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, window: float, last: str
) -> None:
    """`last`: what Railway was told to be promoted last; not b, where 0.3.13 has promoted that."""
    monkeypatch.setattr(control, "HEAL_WAIT", 0.0)
    site.deploy("c")
    promoted = {"c": site.state.promoted}
    site.deploy("a", "b")
    promoted["b"] = site.state.promoted
    site.tabs("a", 0)
    kept = site.keys()
    rails = Rails(site, promoted[last])
    limits = before.janitor.Limits(86_400.0, window, 0)

    store = stepping(site, before, rails, monkeypatch)
    steps, refused = 1, 0
    for at in itertools.combinations_with_replacement(range(20), 2):
        if at[1] > steps:
            continue
        site.reset(kept)
        rails.__init__(site, promoted[last])  # type: ignore[misc]
        rails.at = list(at)
        state = store.read()
        rails.gate()
        seen = rails.inspect(before.janitor)
        before.janitor.sweep(store, rails, state, seen, "t", limits)
        steps = max(steps, rails.step)
        while rails.at:
            rails.go_on()
        if rails.refused:  # the janitor came first
            assert "being removed" in rails.refused or "removed meanwhile" in rails.refused
            assert (window, site.state.active) == (0.0, "b")
            refused += 1
        else:
            rolled_back(site, rails, site.state)
    assert 5 < steps < 20
    assert bool(refused) == (window == 0.0)


def test_a_canary_is_ended_at_every_step_of_an_older_janitor(
    site: Site, before: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.deploy("c", "a")
    assert site.register("b")["ok"]
    assert site.promote("b", "--weight", "10", "--bake", "60")["ok"]
    kept, promoted = site.keys(), site.state.promoted
    rails = Rails(site, promoted)

    def withdraw() -> None:
        rails.at = []
        assert site.control("withdraw", "--deployment-id", "b")["ok"]

    monkeypatch.setattr(rails, "go_on", withdraw)
    store = stepping(site, before, rails, monkeypatch)
    position = steps = 0
    while position <= steps:
        site.reset(kept)
        rails.__init__(site, promoted)  # type: ignore[misc]
        rails.at = [position]
        state = store.read()
        rails.gate()
        limits, seen = before.janitor.Limits(86_400.0, 0.0, 0), rails.inspect(before.janitor)
        before.janitor.sweep(store, rails, state, seen, "t", limits)
        steps = max(steps, rails.step)
        if rails.at:
            rails.go_on()
        found = site.state
        assert (found.active, found.promoted, found.canary) == ("a", promoted, None)
        assert rails.services.keys() == {"a", "b", "c"}
        b = found.records["b"]
        assert (b.state, b.pinned, b.weight, b.bake) == ("draining", False, None, None)
        assert b.rejected_at
        report = rails.todays_janitor()
        assert (report.deleted, report.failed) == ([], {})
        position += 1
    assert steps > 4


class Router:
    """A router of today, as far as it heals the store: when it looks is said."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.known = router.Routing()

    def look(self) -> None:
        """It reads the store, and writes back what that has lost."""
        found = self.site.state
        if router.changes(found, router.repaired(found, self.known, "new")):
            found = self.site.store.apply(lambda state: router.repaired(state, self.known, "new"))
        self.known = found


@pytest.mark.parametrize("tabs", [0, 1])
@pytest.mark.parametrize("announced", [True, False])
def test_a_rollback_at_every_step_of_the_janitor_of_0_3_13(
    site: Site,
    published: older.Published,
    monkeypatch: pytest.MonkeyPatch,
    tabs: int,
    announced: bool,
) -> None:
    """Its real code: it writes the active record anew, key by key, and deletes in three steps. So
    the rollback waits until it has ended.

    Args:
        tabs: of the one that is rolled back to: without any, that janitor deletes it.
        announced: the router has read the rollback at once, not only afterwards.
    """
    monkeypatch.setattr(control, "HEAL_WAIT", 0.0)
    site.deploy("c", "a", "b")
    promoted = site.state.promoted
    site.tabs("a", tabs)
    kept = site.keys()
    names = ("service_id", "service_name", "deployment_id")
    steps, position, refused = 1, 0, 0
    while position <= steps:
        site.reset(kept)
        rails, watcher = Rails(site, promoted), Router(site)
        watcher.look()
        rails.at = [0, 0]

        def roll_back(rails: Rails = rails, watcher: Router = watcher) -> None:
            rails.go_on()
            if announced:
                watcher.look()
            rails.go_on()

        def services(rails: Rails = rails) -> list[dict[str, str]]:
            return [dict(zip(names, (s, n, n), strict=True)) for n, s in rails.services.items()]

        command = threading.Thread(target=roll_back)
        for number, step in enumerate(published.janitor(services)):
            if number == position:
                command.start()
                waits = step[0] != "done" and number > 0
                command.join(0.1 if waits else 20)
                assert command.is_alive() == waits
            if step[0] == "delete service":
                del rails.services[step[1].removeprefix("s-")]
            steps = max(steps, number)
        command.join()
        watcher.look()
        if rails.refused:  # the janitor came first
            assert "not registered" in rails.refused
            assert (tabs, site.state.active) == (0, "b")
            refused += 1
        else:
            rolled_back(site, rails, watcher.known)
        position += 1
    assert steps > 8
    assert bool(refused) == (tabs == 0)


def test_who_is_waited_for_before_a_promotion(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older janitor, for a while; one of ours, whose steps are transactions, is not."""
    site.deploy("a", "b")
    lock = f"{PREFIX}:janitor:lock"
    client = site.server.client
    assert not client.exists(lock)
    with janitor.run_lock(site.store) as held:
        assert held
        began = time.monotonic()
        assert site.promote("a")["ok"]
        assert time.monotonic() - began < 1
        assert client.exists(lock)
    monkeypatch.setattr(control, "JANITOR_WAIT", 0.5)
    client.set(lock, "0123456789abcdef", ex=60)  # of one that was killed
    began = time.monotonic()
    assert site.promote("b")["ok"]
    assert 0.5 < time.monotonic() - began < 2
    assert client.get(lock) == "0123456789abcdef"


# -- a CLI and a router's control commands -------------------------------------------------------


def parsed(carry_out: Callable[..., Any], words: list[str], env: dict[str, str]) -> Any:
    """What a control command of that version comes to, as a finished process."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            answer = carry_out(words, env)
        except SystemExit as end:
            return subprocess.CompletedProcess(words, int(str(end.code)), "", err.getvalue())
    return subprocess.CompletedProcess(words, 0 if answer["ok"] else 1, json.dumps(answer), "")


# today's functions of router_commands that are not called send_...
TODAYS = {
    "active_deployment": "read_active",
    "state": "read_state",
    "history": "read_history",
    "baked": "send_finish_bake",
    "withdraw": "send_abort_canary",
}


class Cli:
    """Today's router_commands, called by their names before; they reach a router of another version
    by ssh."""

    def __init__(
        self, site: Site, carry_out: Callable[..., Any], patch: pytest.MonkeyPatch
    ) -> None:
        self.site = site
        self.asked: list[list[str]] = []
        way = ControlRoute("ssh", checked=True)
        self.stack: Any = SimpleNamespace(
            last_promotion=None,
            target=SimpleNamespace(project_id="p", environment_id="e", control_route=way),
            names=SimpleNamespace(router="pulse-router"),
            router=SimpleNamespace(variables={}),
            backend=lambda name: SimpleNamespace(id=f"s-{name}"),
        )

        def run(command: list[str], *_: Any) -> Any:
            program, name, *words = shlex.split(command[-1])
            assert (program, name) == ("pulse-railway", "control")
            self.asked.append(words)
            return parsed(carry_out, words, site.env)

        patch.setattr(ssh, "run_railway", run)
        patch.setattr(router_commands, "PAUSES", ())

    def __call__(self, name: str, *words: Any, **named: Any) -> Any:
        state = self.site.state
        if state.active:  # as it is noted after each promotion
            at = state.promoted.at if state.promoted else time.time()
            self.stack.last_promotion = f"{state.active}@{at!r}"
        function = getattr(router_commands, TODAYS.get(name, f"send_{name}"))
        return function(None, self.stack, *words, **named)


def life(call: Callable[..., Any], site: Site, warned: dict[str, Any]) -> None:
    """What a CLI asks of a router, command by command, with every flag that both versions know.

    Args:
        warned: what is passed to who tells of late routers.
    """

    def register(name: str, held: bool) -> None:
        more = {"address": site.backends[name].address, "about": ABOUT, "held": held}
        named = {"deployment_id": name, "service_name": name, "service_id": f"s-{name}"}
        call("register", **named, **more)

    call("lock", "me", 60)
    register("a", held=False)
    call("promote", "a", "a", unlock="me", **warned)
    assert site.state.active == "a"
    assert site.state.lock is None
    assert call("active_deployment") == "a"
    register("b", held=True)
    assert site.state.records["b"].pinned
    call("promote", "b", "b", weight=10.0, bake=60, instead_of="a", why="a try", **warned)
    assert site.state.canary.weight == 10
    assert call("state")["canary"].items() >= {"deployment_id": "b", "weight": 10.0}.items()
    call("baked", "b")
    assert site.state.records["b"].bake is None
    call("withdraw", "b", why="it was nothing", **warned)
    assert site.state.canary is None
    call("promote", "b", "b", bake=60, **warned)
    assert (site.state.active, site.state.records["a"].state) == ("b", "draining")
    call("promote", "a", "a", instead_of="b", rolls_back=True, why="it was bad", **warned)
    assert site.state.records["b"].rejected_at
    call("maintenance", True, "<p>closed</p>", 60, "a move", **warned)
    assert site.state.maintenance.page == "<p>closed</p>"
    call("maintenance", False, None, 30, None, **warned)
    assert site.state.maintenance is None
    call("lock", "me again", 60)
    call("unlock", "me again")
    assert site.state.lock is None
    call("retire", "b", "s-b")
    assert site.state.records["b"].retiring_at
    call("forget", "b")
    assert site.state.records.keys() == {"a"}
    assert site.state.tombstones["b"].service_id == "s-b"
    done = [entry["what"] for entry in call("history")]
    assert done == [
        *("promote", "canary", "rollback", "promote", "rollback"),
        *("maintenance on", "maintenance off", "remove"),
    ]
    (a,) = call("state")["deployments"]
    assert (a["deployment_id"], a["state"], a["sessions"], a["about"]) == ("a", "active", 1, ABOUT)


RECORD = {"deployment_id": "a", "service_name": "a", "service_id": "s-a", "registered_at": 1.0}


def test_todays_cli_beside_an_older_router(
    site: Site, before: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before.router, "HEAL_WAIT", 0.0)
    call = Cli(site, before.router.carry_out, monkeypatch)
    life(call, site, {"warn": lambda said: pytest.fail(said)})
    assert all("--intent" in words for words in call.asked[3:])
    active = site.state.active
    site.server.client.flushall()
    call.stack.last_promotion = f"{active}@{time.time()!r}"
    assert call("state")["lost"] is True
    with pytest.raises(Refused, match="run `pulse-railway restore`"):
        call("forget", "a")
    assert call("restore", "a", [RECORD], chosen=False) is None  # it tells no time
    assert site.state.active == "a"


def test_what_an_older_router_does_not_know_ends_in_one_line(
    site: Site, before: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Cli(site, before.router.carry_out, monkeypatch)
    site.deploy("a")
    closed = {"PULSE_RAILWAY_MAINTENANCE": "1000.0"}
    for command, words, more in (
        ("probe", ("a", "/"), {}),
        ("restore", ("a", [RECORD]), {"chosen": True}),
        ("promote", ("b", "b"), {}),  # whose record is lost: made anew by a flag
    ):
        state = site.state
        with pytest.raises(Uncertain) as raised:
            call(command, *words, **more)
        assert re.fullmatch(
            f"it is not known whether the router carried out `{command}`: the router runs another"
            r" version of pulse-railway, which refuses the command \(.*\): run"
            " `pulse-railway ensure`",
            str(raised.value),
        )
        assert site.state == state
    call.stack.router.variables = closed
    with pytest.raises(Uncertain, match=r"run `pulse-railway ensure`$"):
        call("restore", "a", [RECORD], chosen=False)


def test_an_older_cli_beside_todays_router(
    site: Site, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "HEAL_WAIT", 0.0)

    def asked(words: list[str]) -> dict[str, Any]:
        done = parsed(control.carry_out, words, site.env)
        return {"stdout": done.stdout, "said": done.stderr, "hopeless": bool(done.stderr)}

    with older.OlderCli(sources) as cli:

        def call(name: str, *words: Any, **named: Any) -> Any:
            done = cli.call(asked, name, *words, intent=site.state.active, **named)
            assert "raised" not in done, done
            return done["returned"]

        life(call, site, {})
        # its notes have no time, and say nothing against a store that has one
        for intent in ("a", None):
            assert cli.call(asked, "state", intent=intent)["returned"]["lost"] is False
        site.server.client.flushall()
        said = cli.call(asked, "forget", "a", intent="a")
        assert said["raised"] == "Refused"
        assert "run `pulse-railway restore`" in said["said"]
        cli.call(asked, "restore", "a", [RECORD], intent="a")
        assert site.state.active == "a"


def test_todays_answers_have_what_older_ones_had(site: Site, before: SimpleNamespace) -> None:
    site.deploy("c", "a")
    site.register("b")
    for words in (
        ["promote", "--active-deployment-id", "b", "--active-service-name", "b", "--weight", "5"],
        ["lock", "--holder", "me", "--lease", "60", "--by", "me"],
        ["maintenance", "on", "--by", "me", "--page", "closed"],
    ):
        assert site.control(*words)["ok"]
    for words in (["active"], ["status"], ["history"], ["lock", "--holder", "me", "--lease", "9"]):
        old, new = before.router.carry_out(words, site.env), site.control(*words)
        assert differences(old, new) == ""


def differences(old: Any, new: Any, where: str = "") -> str:
    """Where an answer of today lacks what an older one has, or has it with another type."""
    if isinstance(old, dict) and isinstance(new, dict):
        gone = [f"{where} lacks {name}" for name in old.keys() - new.keys()]
        found = [differences(old[n], new[n], f"{where}.{n}") for n in old.keys() & new.keys()]
        return "\n".join(filter(None, gone + found))
    if isinstance(old, list) and isinstance(new, list):
        pairs = zip(old, new, strict=True)
        return "\n".join(filter(None, (differences(a, b, where) for a, b in pairs)))
    return "" if type(old) is type(new) else f"{where} is {type(new)}, was {type(old)}"


def test_a_command_that_is_left_for_a_janitor_of_the_other_version(
    site: Site, before: SimpleNamespace
) -> None:
    site.deploy("a")
    for order in (["active"], ["lock", "--holder", "me", "--lease", "60"], ["probe"]):
        words = [*order, "--by", "me", "--intent", f"a@{site.state.promoted.at!r}"]
        left = json.dumps({"nonce": "n", "words": words, "until": time.time() + 60})
        by_today: Any = SimpleNamespace(nonce="n", words=words, confirmed=None)
        with_caller = control_job.Job.text(by_today, 60.0)
        seen = before.janitor.Seen([], order=with_caller)
        assert before.janitor.answer_to(seen, site.env)["nonce"] == "n"
        of_older = before.janitor.answer_to(before.janitor.Seen([], order=left), site.env)
        of_today = janitor.carry_out_request(janitor.Inventory([], request=left), site.env)
        assert (of_older["command"], of_older["nonce"]) == (order[0], "n")
        assert (of_today["command"], of_today["nonce"]) == (order[0], "n")
        if order == ["probe"]:  # it takes an argument, which today's janitor misses
            assert of_older["reason"] == of_today["reason"] == "version"
            assert of_older["error"].endswith("run `pulse-railway ensure`")
        else:
            assert of_older["ok"] is of_today["ok"] is True


# -- down to the version before, and up again ----------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("version", ["older", "0.3.13"])
def test_down_and_up_again(
    site: Site,
    run: Callable[[str], Process],
    before: SimpleNamespace,
    published: older.Published,
    version: str,
    beside: bool,
) -> None:
    """The version before takes the state as it is, deploys, and cleans up; today's goes on from
    there. Nothing live is deleted.

    Args:
        beside: a router of today lives through it, and remembers what the other drops.
    """
    site.deploy("a", "b")
    assert site.register("c")["ok"]
    assert site.promote("c", "--weight", "10")["ok"]
    rails = Rails(site, site.state.promoted)
    rails.services["d"] = "s-d"
    live = [run("today")] if beside else []
    known = site.state

    def old_janitor() -> list[str]:
        if version == "0.3.13":
            names = ("service_id", "service_name", "deployment_id")
            found = [dict(zip(names, (s, n, n), strict=True)) for n, s in rails.services.items()]
            return list(published.janitor(lambda: found))[-1][1:]
        store = before.router.RedisStore(site.server.url, PREFIX)
        limits = before.janitor.Limits(86_400.0, 0.0, 0)
        seen = rails.inspect(before.janitor)
        report = before.janitor.sweep(store, rails, store.read(), seen, "t", limits)
        return list(report.deleted)

    def old_control(*words: str) -> dict[str, Any]:
        if version == "0.3.13":
            return published.control(*words)
        return dict(before.router.carry_out(list(words), site.env))

    old = run(version)
    serves(old, "a")
    serves(old, "c")
    if version == "0.3.13":  # it knows no canary
        assert served(old) == (200, "b")
    assert old_control("active")["deployment_id"] == "b"
    assert old_janitor() == []
    assert site.state.active == "b"
    assert site.record("b").get("address") in (site.backends["b"].address, None)

    # a deploy, as its CLI asks for it: all others drain
    others = [{"deployment_id": n, "service_name": n} for n in ("a", "b", "c")]
    assert old_control("register", "--deployment-id", "d", "--service-name", "d")["ok"]
    site.promote("d", "--draining-json", json.dumps(others), run=old_control)
    eventually(lambda: served(old) == (200, "d"), 16)
    for name in ("a", "b", "c"):
        serves(old, name)
    for process in live:
        serves(process, "d")
        eventually(lambda p=process: served(p) == (200, "d"))  # type: ignore[misc]
        eventually(lambda: site.state.promoted.deployment_id == "d")
        eventually(lambda: site.record("b").get("address"))
    assert old_janitor() == []

    process = run("today")
    eventually(lambda: served(process) == (200, "d"))
    for name in NAMES:
        serves(process, name)
    for _ in range(2):
        report = rails.todays_janitor()
        assert (report.deleted, report.failed, report.restored) == ([], {}, None)
    state = site.state
    assert (state.active, state.promoted.deployment_id) == ("d", "d")
    assert known.promoted.at < state.promoted.at <= state.now
    assert rails.variables["PULSE_RAILWAY_ACTIVE"] == "d"
    assert rails.variables["PULSE_RAILWAY_ACTIVE_AT"] == repr(state.promoted.at)
    assert [state.records[name].state for name in "abd"] == ["draining", "draining", "active"]
    if beside:
        for name, record in known.records.items():
            now = state.records[name]
            for field in ("address", "service_id", "registered_at", "promoted_at", "about"):
                assert getattr(now, field) == getattr(record, field), (name, field)
    assert site.promote("b", "--instead-of", "d", "--rolls-back")["ok"]
    for one in (process, *live):
        eventually(lambda p=one: served(p) == (200, "b"))  # type: ignore[misc]


def test_a_note_of_an_older_cli_is_believed_where_the_store_goes_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It notes what it has promoted beside the time of the promotion before."""
    monkeypatch.setattr(control, "HEAL_WAIT", 0.0)
    site.deploy("a", "b")
    snapshot, rails = site.keys(), Rails(site, site.state.promoted)
    site.deploy("c")
    rails.variables["PULSE_RAILWAY_ACTIVE"] = "c"
    assert rails.todays_janitor().restored is None
    assert rails.variables["PULSE_RAILWAY_ACTIVE_AT"] == repr(site.state.promoted.at)
    rails = Rails(
        site,
        router.Promotion(
            "c", router.parse_record("b", snapshot[f"{PREFIX}:deployment:b"]).promoted_at
        ),
    )
    site.reset(snapshot)
    assert site.state.active == "b"
    assert rails.todays_janitor().restored == "c"
    assert site.state.active == "c"


def test_what_an_older_control_takes_away_stays_away(
    site: Site, run: Callable[[str], Process], before: SimpleNamespace
) -> None:
    """It raises no epoch; but it is no loss."""
    nonces = iter("123456789")

    def write(*words: str) -> None:
        answer = before.router.carry_out([*words, "--nonce", next(nonces)], site.env)
        assert answer["ok"], answer
        for _ in range(2):  # a router reads it, and once more
            time.sleep(0.2)
            site.store.announce()
        time.sleep(0.2)

    site.deploy("a")
    process = run("today")
    site.register("b")
    assert site.promote("b", "--weight", "10", "--bake", "600")["ok"]
    serves(process, "b")
    write("baked", "--deployment-id", "b")
    assert "bake" not in site.record("b")
    assert site.promote("b", "--weight", "20", "--bake", "600")["ok"]
    write("withdraw", "--deployment-id", "b")
    record = site.record("b")
    assert not any(record.get(name) for name in ("weight", "bake", "held"))
    assert record["rejected_at"]
    site.promote("b", run=write)
    assert "rejected_at" not in site.record("b")
    assert site.record("b")["state"] == "active"
    for words in (["maintenance", "on"], ["lock", "--holder", "me", "--lease", "60"]):
        assert site.control(*words)["ok"]
    eventually(lambda: served(process)[0] == 503)
    write("maintenance", "off")
    write("unlock", "--holder", "me")
    assert (site.state.maintenance, site.state.lock) == (None, None)
    assert served(process) == (200, "b")


def test_what_0_3_13_promotes_is_served_whatever_it_was_before(
    site: Site, run: Callable[[str], Process], published: older.Published
) -> None:
    """One that is being removed, or was rolled back from: it knows neither."""
    site.deploy("a", "b")
    assert site.promote("a", "--rolls-back")["ok"]
    assert site.control("retire", "--deployment-id", "b")["ok"]
    process = run("today")
    assert served(process, "b")[0] == 409
    site.promote("b", run=published.control)
    eventually(lambda: served(process) == (200, "b"), 16)
    eventually(lambda: site.state.promoted.deployment_id == "b")
    time.sleep(2.5)  # two more reads
    assert served(process) == (200, "b")
    record = site.state.records["b"]
    assert (record.state, record.retiring_at, record.rejected_at) == ("active", None, None)
    assert record.address == site.backends["b"].address


# -- previews, which earlier versions do not know ------------------------------------------------

KEY = "k" * 43


def preview(site: Site, name: str) -> dict[str, str]:
    """Register a preview, as `deploy --preview` does; return what the store has then."""
    words = ["register", "--deployment-id", name, "--service-name", name, "--service-id"]
    words += [f"s-{name}", "--address", site.backends[name].address]
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    assert site.control(*words, "--preview", digest)["ok"]
    site.tabs(name, 0)
    return site.keys()


def reviewed(process: Process, name: str) -> tuple[int, str | None]:
    target = f"/?pulse_deployment={name}"
    answer = ask(process.port, target, f"cookie: __Host-pulse_preview={name}.{KEY}")
    return answer.status, answer.header("x-pulse-selected-deployment")


def records(keys: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in keys.items() if ":deployment:" in k or ":preview:" in k}


@pytest.mark.parametrize("version", ["older", "0.3.13"])
def test_an_older_router_shows_a_preview_to_nobody(
    site: Site, run: Callable[[str], Process], version: str
) -> None:
    site.deploy("a")
    old, today = run(version), run("today")
    before = records(preview(site, "d"))
    eventually(lambda: reviewed(today, "d") == (200, "d"))
    assert reviewed(old, "d") == served(old, "d") == (409, None)
    assert served(today, "d") == (409, None)
    assert served(old) == (200, "a")
    site.server.client.publish(f"{PREFIX}:events", "[]")
    time.sleep(1.2)  # each has read the state again
    assert records(site.keys()) == before
    assert site.promote("d")["ok"]
    serves(old, "d")
    eventually(lambda: served(old) == (200, "d"))


def test_the_janitor_of_0_3_13_leaves_a_preview(site: Site, published: older.Published) -> None:
    site.deploy("a", "b")
    before = records(preview(site, "d"))
    names = ("service_id", "service_name", "deployment_id")
    found = [dict(zip(names, (f"s-{n}", n, n), strict=True)) for n in "abd"]
    assert list(published.janitor(lambda: found))[-1][1:] == []
    after = records(site.keys())
    assert after.keys() == before.keys()
    assert after[f"{PREFIX}:preview:d"] == before[f"{PREFIX}:preview:d"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_the_janitor_of_0_3_13_leaves_a_version_that_refuses_its_token(
    site: Site, published: older.Published, status: int
) -> None:
    """After `ensure --rotate` and a downgrade: 0.3.13 knows of no former token."""
    site.deploy("a", "b")  # `a` drains
    site.backends["a"].answer = ok(b"{}", status=f"{status} No")
    names = ("service_id", "service_name", "deployment_id")
    found = [dict(zip(names, (f"s-{n}", n, n), strict=True)) for n in "ab"]
    assert list(published.janitor(lambda: found))[-1][1:] == []
    assert "a" in site.state.records
    site.tabs("a", 0)
    assert list(published.janitor(lambda: found))[-1][1:] == ["a"]


NEXT_PAGE = (
    "x-pulse-client-loader: 1",
    "x-pulse-client-loader-location: http://app.example/b",
    "referer: http://app.example/a",
)


def goes_to_the_next_page(process: Process, name: str) -> tuple[int, str | None]:
    """Return the answer to a tab's client loader, and the deployment that gave it."""
    url = f"/_pulse/prerender?pulse_deployment={name}"
    answer = ask(process.port, url, *NEXT_PAGE, method="POST")
    return answer.status, answer.header("x-pulse-selected-deployment")


@pytest.mark.parametrize("version", ["older", "0.3.13"])
def test_an_older_router_moves_nobody(
    site: Site, run: Callable[[str], Process], version: str
) -> None:
    site.deploy("a")
    old, today = run(version), run("today")
    assert site.register("b")["ok"]
    assert site.promote("b", "--move-after", "0")["ok"]
    eventually(lambda: goes_to_the_next_page(today, "a") == (302, None))
    eventually(lambda: served(old) == (200, "b"))
    assert goes_to_the_next_page(old, "a") == (200, "a")
    assert served(old, "a") == served(today, "a") == (200, "a")


def test_the_janitor_of_0_3_13_removes_a_moving_version_when_nobody_is_left(
    site: Site, published: older.Published
) -> None:
    site.deploy("a")
    assert site.register("b")["ok"]
    assert site.promote("b", "--move-after", "0")["ok"]
    moving_at = site.record("a")["moving_at"]
    names = ("service_id", "service_name", "deployment_id")
    found = [dict(zip(names, (f"s-{n}", n, n), strict=True)) for n in "ab"]
    assert list(published.janitor(lambda: found))[-1][1:] == []
    assert site.record("a").get("moving_at") in (None, moving_at)
    site.tabs("a", 0)
    assert list(published.janitor(lambda: found))[-1][1:] == ["a"]
    assert (site.state.active, site.state.problems) == ("b", ())


RUN_OF_THE_JANITOR_BEFORE = """if True:
    import json, os, sys
    import control, janitor, router

    class Railway:
        def set_variables(self, *_): pass
        def delete(self, service): print("deleted", service.deployment); return True

    assert not hasattr(router, "PREVIEW")
    store = router.RedisStore(os.environ["REDIS_URL"], "pulse:railway")
    services = [
        janitor.Backend(f"s-{n}", n, n, 7200.0, "SUCCESS", ours=bool(run))
        for n, run in json.loads(sys.argv[1]).items()
    ]
    inventory = janitor.Inventory(services, "router")
    limits = janitor.Retention(86_400.0, 0.0, 0)
    for _ in range(2):
        report = janitor.clean_up(store, Railway(), store.read(), inventory, "t", limits)
    print(json.dumps(report.kept))
"""


def test_the_janitor_before_previews_leaves_one(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Since its service has no mark of a run; with one it is made reachable, and deleted then."""
    folder = older.unpack(tmp_path_factory.mktemp("before"), older.WITHOUT_PREVIEWS)
    site.deploy("a")

    def run_of(mark: str) -> list[str]:
        marks = json.dumps({"a": "run", "d": mark})
        command = [sys.executable, "-P", "-c", RUN_OF_THE_JANITOR_BEFORE, marks]
        env = {**os.environ, **site.env, "PYTHONPATH": str(folder)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    before = records(preview(site, "d"))
    kept = "no record names its service, and no deploy of this stack created it"
    assert run_of("") == [json.dumps({"d": kept})]
    assert records(site.keys()) == before
    run_of("run")
    assert site.record("d")["state"] == "draining"  # what the empty mark prevents


def test_an_older_control_promotes_a_preview(site: Site, before: SimpleNamespace) -> None:
    """It writes an ordinary record beside the preview's, and that counts."""
    site.deploy("a")
    preview(site, "d")

    def old_control(*words: str) -> dict[str, Any]:
        return dict(before.router.carry_out(list(words), site.env))

    assert site.register("d", run=old_control)["ok"]
    assert site.promote("d", run=old_control)["ok"]
    state = site.state
    assert (state.active, state.records["d"].is_preview) == ("d", False)
