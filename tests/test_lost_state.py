"""A store that has lost its data, and commands that meet what others have just done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import config, runtime_image
from pulse_railway.errors import Failure
from pulse_railway.flows.restore import known_active
from pulse_railway.stack import Service, Stack
from tests.conftest import ROOT, Process, Redis
from tests.net import Backend, ask, eventually, ok

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
Run = Callable[..., Process]
PREFIX = "pulse:railway"
QUICK = {"REFRESH_SECONDS": 1.0, "MISSING_SECONDS": 1.0}
# The private network's names, as the local Railway resolves them.
SITE = ROOT / "pulse_railway" / "local" / "site"


class Site:
    """Two backends, each of which names itself, and a store with `new` active, `old` draining."""

    def __init__(self, server: Redis, new: Backend, old: Backend) -> None:
        self.server, self.new, self.old = server, new, old
        self.store = router.RedisStore(server.url, PREFIX)
        self.control("register", "--deployment-id", "old", "--service-id", "s-old", backend=old)
        self.promote("old")
        self.control("register", "--deployment-id", "new", "--service-id", "s-new", backend=new)
        self.promote("new")

    def control(self, command: str, *words: str, backend: Backend | None = None) -> int:
        if backend:
            words = (*words, "--service-name", words[1], "--address", backend.address)
        return int(control.control([command, *words]))

    def promote(self, name: str, *words: str) -> int:
        service = ["--active-service-name", name]
        return self.control("promote", "--active-deployment-id", name, *service, *words)

    @property
    def state(self) -> dict[str, str]:
        """What Redis holds, but for what routers say of themselves."""
        client = self.server.client
        keys = sorted(key for key in client.scan_iter(f"{PREFIX}:*") if ":router:" not in key)
        pairs = zip(keys, client.mget(keys) if keys else [], strict=True)
        return {key.removeprefix(PREFIX): str(value) for key, value in pairs if value is not None}

    @property
    def routing(self) -> Any:
        """The state without what differs each time that it is written."""
        return replace(self.store.read(), store_id=None, epoch=0, processed={})

    def record(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.state.get(f":deployment:{name}", "{}")))


@pytest.fixture
def site(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.setenv("RAILWAY_SERVICE_ID", "here")
    monkeypatch.delenv("PULSE_RAILWAY_ACTIVE", raising=False)
    monkeypatch.setattr(control, "HEAL_WAIT", 0.5)
    with Backend(ok(b"new")) as new, Backend(ok(b"old")) as old:
        yield Site(redis_server, new, old)


def page(process: Process, affinity: str = "") -> tuple[int, bytes]:
    answer = ask(process.port, f"/?pulse_deployment={affinity}" if affinity else "/")
    return answer.status, answer.body


def up(process: Process) -> Process:
    eventually(lambda: ask(process.port, "/healthz").status == 200)
    return process


# -- emptied -----------------------------------------------------------------------------------


def test_an_emptied_store_is_filled_by_a_router(site: Site, run_router: Run) -> None:
    routers = [up(run_router(site.server, QUICK)) for _ in range(2)]
    before, epoch = site.routing, site.store.read().epoch
    site.server.client.flushall()
    eventually(lambda: site.routing == before)
    found = site.store.read()
    assert found.store_id
    assert found.epoch > epoch
    time.sleep(2 * QUICK["REFRESH_SECONDS"])  # the other has seen the new id, and left it
    assert site.store.read() == found
    for process in routers:
        assert page(process) == (200, b"new")
        assert page(process, "old") == (200, b"old")


def test_a_registration_on_an_emptied_store_is_not_the_whole_state(
    site: Site, run_router: Run
) -> None:
    """Before: every visitor got 404, and the promotion that followed turned old tabs to 409."""
    process = up(run_router(site.server, QUICK))
    site.server.client.flushall()
    words = ["--deployment-id", "third", "--service-id", "s-third"]
    assert site.control("register", *words, backend=site.old) == 0
    eventually(lambda: site.state.get(":active") == "new")
    assert page(process) == (200, b"new")
    assert page(process, "old") == (200, b"old")
    assert site.record("third")["state"] == "pending"
    assert site.promote("third") == 0
    eventually(lambda: page(process) == (200, b"old"))
    assert site.record("new")["state"] == "draining"


def test_a_promotion_on_an_emptied_store_drains_what_was_active(
    site: Site, run_router: Run
) -> None:
    process = up(run_router(site.server, QUICK))
    client = site.server.client
    client.flushall()
    # as 0.3.x writes it, all in one
    record: dict[str, Any] = {"deployment_id": "x", "state": "active", "service_name": "x"}
    record |= {"address": site.old.address, "drain_started_at": None}
    client.mset({"pulse:railway:deployment:x": json.dumps(record), "pulse:railway:active": "x"})
    eventually(lambda: site.record("new").get("state") == "draining")
    assert site.state[":active"] == "x"
    assert time.time() - site.record("new")["drain_started_at"] < 5
    eventually(lambda: page(process, "new") == (200, b"new"))
    assert page(process) == (200, b"old")


def test_a_store_of_0_3_that_is_emptied_and_written_to_at_once(
    redis_server: Redis, run_router: Run
) -> None:
    """It had no mark; the soak found its draining deployments gone."""
    with Backend(ok(b"new")) as new, Backend(ok(b"old")) as old:
        redis_server.deployment("old", old.address, "draining")
        redis_server.deployment("new", new.address)
        process = up(run_router(redis_server, QUICK))
        redis_server.stop()
        redis_server.start()
        redis_server.deployment("new", new.address)
        time.sleep(QUICK["REFRESH_SECONDS"] + 1)
        assert page(process, "old") == (200, b"old")


def test_what_was_removed_does_not_come_back(site: Site, run_router: Run) -> None:
    up(run_router(site.server, QUICK))
    assert site.control("delete", "--deployment-id", "old") == 0
    time.sleep(0.3)
    site.server.client.flushall()
    eventually(lambda: site.state.get(":active") == "new")
    assert "old" in json.loads(site.state[":removed"])
    assert site.record("old") == {}


def on_private_network(folder: Path, **ports: int) -> dict[str, str]:
    """Variables for a process that finds these services on the private network."""
    hosts = {f"{name}.railway.internal": {"8000": port} for name, port in ports.items()}
    (folder / "hosts.json").write_text(json.dumps(hosts))
    path = os.pathsep.join([str(SITE), str(ROOT)])
    return {"RAILWAY_LOCAL_HOSTS": str(folder / "hosts.json"), "PYTHONPATH": path}


def test_a_router_that_starts_on_an_emptied_store(
    site: Site, run_router: Run, tmp_path: Path
) -> None:
    """It serves what Railway says was active, until the state is there."""
    site.server.client.flushall()
    network = on_private_network(tmp_path, new=site.new.port)
    process = up(run_router(site.server, PULSE_RAILWAY_ACTIVE="new", **network))
    assert page(process) == (200, b"new")
    assert ask(process.port, "/healthz").json == {"ok": True, "without_state": True}
    assert page(process, "old")[0] in (409, 503)
    assert "no routing state: serving new, as Railway says" in process.output()
    records = [{"deployment_id": "new", "service_name": "new", "address": site.old.address}]
    words = ["--records-json", json.dumps(records)]
    assert site.control("restore", "--active-deployment-id", "new", *words) == 0
    eventually(lambda: page(process) == (200, b"old"))
    assert ask(process.port, "/healthz").json == {"ok": True}


def test_a_router_that_starts_while_redis_is_away(
    redis_server: Redis, run_router: Run, tmp_path: Path
) -> None:
    redis_server.stop()
    with Backend(ok(b"new")) as new:
        network = on_private_network(tmp_path, new=new.port)
        process = up(run_router(redis_server, PULSE_RAILWAY_ACTIVE="new", **network))
        assert page(process) == (200, b"new")
        redis_server.start()
        redis_server.deployment("other", new.address)
        eventually(lambda: ask(process.port, "/healthz").json == {"ok": True})
        assert ask(process.port).header("x-pulse-selected-deployment") == "other"


@pytest.mark.parametrize("active", ["new", None])
def test_a_router_that_starts_and_reaches_nothing(
    site: Site, run_router: Run, active: str | None
) -> None:
    """What Railway names does not answer, or it names nothing and Redis is away: no 404."""
    if active:
        site.server.client.flushall()
    else:
        site.server.stop()
    process = run_router(site.server, **({"PULSE_RAILWAY_ACTIVE": active} if active else {}))
    time.sleep(1)
    health, answer = ask(process.port, "/healthz"), ask(process.port, "/")
    assert (health.status, answer.status) == (503, 503)
    assert answer.header("retry-after") == "1"
    if not active:
        site.server.start()
        site.server.deployment("new", site.new.address)
    else:
        records = [{"deployment_id": "new", "service_name": "new", "address": site.new.address}]
        words = ["--records-json", json.dumps(records)]
        assert site.control("restore", "--active-deployment-id", "new", *words) == 0
    eventually(lambda: page(process) == (200, b"new"))
    assert ask(process.port, "/healthz").status == 200


@pytest.mark.parametrize("command", ["register", "promote", "retire", "delete"])
def test_commands_wait_for_lost_state_and_then_refuse(
    site: Site, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    site.server.client.flushall()
    capsys.readouterr()
    words = {
        "register": ["--deployment-id", "x", "--service-name", "x"],
        "promote": ["--active-deployment-id", "new", "--active-service-name", "new"],
    }.get(command, ["--deployment-id", "new"])
    assert site.control(command, *words, "--intent", "new", "--nonce", "n") == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["command"], answer["nonce"], answer["reason"]) == (command, "n", "lost")
    assert "run `pulse-railway restore`" in answer["error"]
    assert site.state == {}


def test_the_state_survives_a_redis_that_restarts_empty(site: Site, run_router: Run) -> None:
    process = up(run_router(site.server, QUICK))
    site.server.stop()
    time.sleep(0.5)
    assert page(process) == (200, b"new")
    site.server.start()
    eventually(lambda: site.state.get(":active") == "new", 20)
    assert page(process, "old") == (200, b"old")


# -- answers that count ------------------------------------------------------------------------


def test_a_nonce_is_carried_out_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.promote("old", "--nonce", "one") == 0
    assert site.promote("new", "--nonce", "two") == 0
    capsys.readouterr()
    assert site.promote("old", "--nonce", "one") == 0  # asked again: its answer was lost
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["command"], answer["nonce"]) == (True, "promote", "one")
    assert answer["promoted"]["deployment_id"] == "new"
    assert answer["version"] == router.runtime_version()
    assert site.state[":active"] == "new"


def test_a_redis_that_does_not_answer(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.server.process
    os.kill(site.server.process.popen.pid, 19)  # SIGSTOP
    try:
        monkeypatch.setattr(router, "REDIS_TIMEOUT", 0.3)
        began = time.monotonic()
        assert site.control("status", "--nonce", "n") == 1
        assert time.monotonic() - began < 3
    finally:
        os.kill(site.server.process.popen.pid, 18)
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["reason"] == "store"
    assert "Traceback" not in said.err


# -- what others have just done ----------------------------------------------------------------


def test_only_what_is_registered_is_promoted(site: Site) -> None:
    assert site.promote("nowhere") == 1
    assert site.control("retire", "--deployment-id", "old") == 0
    assert site.promote("old") == 1  # a `delete` goes on
    assert site.control("delete", "--deployment-id", "old") == 0
    assert site.promote("old") == 1  # ... and has ended
    assert site.state[":active"] == "new"
    assert site.record("new")["state"] == "active"


def test_a_late_registration_is_refused_and_a_new_service_starts_clean(site: Site) -> None:
    words = ["--deployment-id", "late", "--service-id", "s-1"]
    assert site.control("retire", *words) == 0  # it was undone before its command came through
    assert site.control("register", *words, backend=site.old) == 1
    assert site.record("late") == {}
    assert site.control("register", *words[:3], "s-2", backend=site.old) == 0
    assert site.control("retire", *words[:3], "s-2") == 0  # a delete that is cut off here
    assert site.promote("late") == 1
    assert site.control("register", *words[:3], "s-2", backend=site.old) == 1
    assert site.control("register", *words[:3], "s-3", backend=site.old) == 0
    assert "retiring_at" not in site.record("late")
    assert site.promote("late") == 0


def test_the_active_one_is_neither_retired_nor_forgotten(site: Site) -> None:
    for command in ("retire", "delete"):
        assert site.control(command, "--deployment-id", "new") == 1
    assert "retiring_at" not in site.record("new")
    assert "new" not in json.loads(site.state.get(":removed", "{}"))


def test_each_refusal_changes_nothing_and_says_why(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = (
        ["--active-deployment-id", name, "--active-service-name", name] for name in ("new", "old")
    )
    restore = ["--active-deployment-id", "new", "--records-json", '[{"deployment_id": "new"}]']
    draining = '[{"deployment_id": "new"}]'
    before = site.store.read()
    for command, words, said in (
        ("register", ["--deployment-id", "new", "--service-name", "s"], "new is the active deploy"),
        ("promote", [*new, "--weight", "10"], "new is active"),
        ("withdraw", ["--deployment-id", "old"], "old is no canary (any more)"),
        ("promote", [*new, "--draining-json", draining], "new cannot be active and draining"),
        ("restore", restore, "there is nothing to restore"),
    ):
        capsys.readouterr()
        assert site.control(command, *words) == 1, command
        assert said in capsys.readouterr().err
        assert site.store.read() == before, command
    for words, said in (
        (["retire", "--deployment-id", "No_Id"], "a deployment id is [a-z0-9][a-z0-9-]{0,23}"),
        (["promote", *old, "--weight", "nan"], "expected a number from 0 to 100"),
        (["register", "--deployment-id", "x", "--about", "[]"], "expected a JSON object"),
        (["restore", *restore[:3], '["x"]'], "expected a JSON list of objects with a deployment_i"),
    ):
        with pytest.raises(SystemExit):
            control.control(words)
        assert said in capsys.readouterr().err
    assert site.store.read() == before
    site.server.client.delete("pulse:railway:active")
    assert site.control("promote", *old, "--weight", "10") == 1
    assert "no deployment is active: promote it without a weight" in capsys.readouterr().err


def test_who_knows_what_was_active() -> None:
    """What was noted on Railway, else the router that is up longest; nobody guesses, and what does
    not run is not chosen."""
    blank: Any = ["", None, {}, [], None, None]
    services = {
        f"prod-{name}": Service("i", "i", f"prod-{name}", *blank, {"PULSE_DEPLOYMENT_ID": name})
        for name in ("right", "wrong", "noted")
    }
    services["pulse-router"] = Service("r", "r", "pulse-router", *blank, {})
    stack = Stack(config.Target("p", "e"), config.Names(), services)
    young, empty = {"active": "wrong", "uptime_seconds": 3}, {"active": None, "uptime_seconds": 900}
    old, gone = {"active": "right", "uptime_seconds": 90}, {"active": "gone", "uptime_seconds": 99}
    assert known_active(stack, {"routers": [young, empty, gone, old]}) == "right"
    with pytest.raises(Failure, match=r"nobody knows .*: pass --deployment-id with one of "):
        known_active(stack, {"routers": [empty]})
    noted = services["pulse-router"].variables
    noted["PULSE_RAILWAY_ACTIVE"] = "noted"
    assert known_active(stack, {"routers": [old]}) == "noted"
    noted["PULSE_RAILWAY_ACTIVE"] = "gone"
    assert known_active(stack, {"routers": [old]}) == "right"
    with pytest.raises(Failure, match="gone was promoted last, and does not run any more"):
        known_active(stack, {"routers": [empty]})
