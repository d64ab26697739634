"""A store that has lost its data, and commands that meet what others have just done."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import config, runtime_image
from pulse_railway.errors import Failure
from pulse_railway.flows.restore import known_active
from pulse_railway.stack import Service, Stack
from tests.conftest import ROOT, Process, Redis
from tests.net import Backend, Connection, ask, eventually, ok
from tests.scene import PREFIX, QUICK, Site, page, redis_limited, up

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
Run = Callable[..., Process]
# The private network's names, as the local Railway resolves them.
SITE = ROOT / "pulse_railway" / "local" / "site"


# -- emptied -----------------------------------------------------------------------------------


def test_an_emptied_store_is_filled_by_a_router(site: Site, run_router: Run) -> None:
    routers = [up(run_router(site.server, QUICK)) for _ in range(2)]
    before, epoch = site.routing, site.store.read().epoch
    site.server.client.flushall()
    eventually(lambda: site.routing == before)
    found = site.store.read()
    assert found.store_id
    assert found.epoch > epoch
    time.sleep(2 * QUICK["refresh_seconds"])  # the other has seen the new id, and left it
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
        time.sleep(QUICK["refresh_seconds"] + 1)
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
    # a tab of another version waits: to be told to reload would end its state
    assert page(process, "old")[0] == 503
    with Connection.to(process.port) as tab:
        tab.send(
            b"GET /?pulse_deployment=old&pulse_reload_on_stale_affinity=1 HTTP/1.1\r\nhost: a\r\n"
            b"upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 503 " in tab.head()
    assert "no routing state: serving new, as Railway says" in process.output()
    records = [{"deployment_id": "new", "service_name": "new", "address": site.old.address}]
    words = ["--records-json", json.dumps(records)]
    assert site.control("restore", "--active-deployment-id", "new", *words) == 0
    eventually(lambda: page(process) == (200, b"old"))
    assert ask(process.port, "/healthz").json == {"ok": True}


def test_a_router_that_starts_on_a_store_that_only_a_switch_has_written_to(
    site: Site, run_router: Run
) -> None:
    """Before, 404: the store had an id again, and no deployment."""
    site.server.client.flushall()
    assert site.control("maintenance", "off") == 0
    assert site.control("maintenance", "on") == 0
    assert site.control("maintenance", "off") == 0
    assert site.state.get(":store")
    process = up(run_router(site.server))
    assert page(process)[0] == 503


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


# -- single keys and records ---------------------------------------------------------------------


def test_each_key_that_is_deleted_comes_back(site: Site, run_router: Run) -> None:
    """Evicted, or deleted by hand: under the id and the epoch that a router has loaded."""
    site.control("register", "--deployment-id", "x", "--service-id", "s-x", backend=site.old)
    site.control("delete", "--deployment-id", "x", "--nonce", "n")
    site.control("maintenance", "on")
    site.control("lock", "--holder", "h", "--lease", "600")
    site.control("claim", "--owner", "e/r")
    process = up(run_router(site.server, {**QUICK, "refresh_seconds": 0.3}))
    client, before = site.server.client, site.routing
    assert set(router.FIXED) <= site.state.keys()
    for key in [*router.FIXED, ":deployment:new"]:
        store_id, epoch = site.store.read().store_id, site.store.read().epoch
        client.delete(f"{PREFIX}{key}")
        # a look for records takes 2 % of the time at most: on a busy machine it is long in coming
        eventually(lambda key=key: key in site.state, 60)  # type: ignore[misc]
        eventually(lambda: site.routing == before)
        found = site.store.read()
        assert found.epoch > epoch, key
        if key not in (":store", ":epoch"):
            assert found.store_id == store_id, key
    assert site.control("maintenance", "off") == 0
    eventually(lambda: page(process) == (200, b"new"))
    assert page(process, "old") == (200, b"old")


def test_the_record_of_a_draining_one_comes_back_if_it_answers(site: Site, run_router: Run) -> None:
    """Its tabs notice nothing: it may be lost, or 0.3.x has deleted it."""
    process = up(run_router(site.server, QUICK))
    before = site.record("old")
    site.server.client.delete(f"{PREFIX}:deployment:old")
    began = time.monotonic()
    while site.record("old") == {}:
        assert page(process, "old") == (200, b"old")
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    assert time.monotonic() - began > QUICK["missing_seconds"]
    assert site.record("old") == before


def test_one_that_cannot_be_connected_to_leaves_the_table(site: Site, run_router: Run) -> None:
    process = up(run_router(site.server, QUICK))
    site.server.client.delete(f"{PREFIX}:deployment:old")
    site.old.stop()
    eventually(lambda: page(process, "old")[0] == 502)
    eventually(lambda: page(process, "old")[0] == 409)
    time.sleep(2 * QUICK["refresh_seconds"])
    assert site.record("old") == {}


def test_another_deployment_at_its_address_does_not_bring_it_back(
    site: Site, run_router: Run
) -> None:
    up(run_router(site.server, QUICK))
    site.server.client.delete(f"{PREFIX}:deployment:old")
    site.old.answer = ok(b'{"deployment_id": "another"}')
    time.sleep(3 * QUICK["refresh_seconds"] + QUICK["missing_seconds"])
    assert site.record("old") == {}


def test_a_silent_deployment_without_a_record_delays_no_promotion(
    site: Site, run_router: Run
) -> None:
    process = up(run_router(site.server, QUICK))
    with Backend(handle=lambda c: time.sleep(30)) as mute:
        words = ["--deployment-id", "mute", "--service-id", "s-mute"]
        assert site.control("register", *words, backend=mute) == 0
        eventually(lambda: "mute" in str(site.store.read().records))
        time.sleep(0.3)
        site.server.client.delete(f"{PREFIX}:deployment:mute")
        time.sleep(1.5 * QUICK["refresh_seconds"])  # it is being asked
        began = time.monotonic()
        assert site.promote("old") == 0
        eventually(lambda: page(process) == (200, b"old"))
        assert time.monotonic() - began < 1


MALFORMED = [
    (":deployment:old", {"registered_at": "yesterday"}),
    (":deployment:old", {"address": 8000}),
    (":deployment:new", {"promoted_at": [], "weight": "many", "held": "yes"}),
    (":deployment:new", "{junk"),
    (":deployment:third", "[]"),
    (":maintenance", {"since": "then", "retry_after": "soon", "page": 7}),
    (":maintenance", "junk"),
    (":promoted", {"deployment_id": 7}),
    (":epoch", "many"),
    (":removed", "7"),
    (":history", '{"a": 1}'),
    (":answers", "[]"),
    (":deploy:lock", {"holder": 7}),
]


@pytest.mark.parametrize(("key", "value"), MALFORMED)
def test_what_is_malformed_keeps_no_router_from_following(
    site: Site, run_router: Run, key: str, value: Any
) -> None:
    process = up(run_router(site.server, QUICK))
    if isinstance(value, dict) and key.startswith(":deployment"):
        value = {**json.loads(site.state[key]), **value}
    text = value if isinstance(value, str) else json.dumps(value)
    site.server.client.set(f"{PREFIX}{key}", text)
    site.store.announce()
    if key == ":maintenance":  # who closed the site wants it closed
        eventually(lambda: page(process)[0] == 503)
        assert site.control("maintenance", "off") == 0
    time.sleep(1.2 * QUICK["refresh_seconds"])
    if key != ":deployment:new":
        assert page(process) == (200, b"new")
    with Backend(ok(b"next")) as after:
        words = ["--deployment-id", "next", "--service-id", "s-next"]
        assert site.control("register", *words, backend=after) == 0
        assert site.promote("next") == 0
        eventually(lambda: page(process) == (200, b"next"))
        assert "the task" not in process.output()


def test_what_0_3_x_promotes_while_it_is_being_removed_is_served(
    site: Site, run_router: Run
) -> None:
    """It knows nothing of `retiring_at`, and the active one is never taken out of the routing."""
    process = up(run_router(site.server, QUICK))
    assert site.control("retire", "--deployment-id", "old") == 0
    eventually(lambda: page(process, "old")[0] == 409)
    site.server.deployment("old", site.old.address)
    eventually(lambda: page(process) == (200, b"old"))
    time.sleep(2 * QUICK["refresh_seconds"])
    assert page(process) == (200, b"old")


# -- an older copy -------------------------------------------------------------------------------


def put_back(site: Site, state: dict[str, str]) -> None:
    """All keys as they were: a snapshot of Redis is restored."""
    client = site.server.client
    keys = [key for key in client.scan_iter(f"{PREFIX}:*") if ":router:" not in key]
    pipe = client.pipeline()
    pipe.delete(*keys)
    pipe.mset({f"{PREFIX}{key}": value for key, value in state.items()})
    pipe.execute()


@pytest.mark.parametrize("change", ["promotion", "rollback", "removal"])
def test_an_older_copy_of_the_store_does_not_win_over_live_routers(
    site: Site, run_router: Run, change: str
) -> None:
    routers = [up(run_router(site.server, QUICK)) for _ in range(2)]
    with Backend(ok(b"third")) as third:
        words = ["--deployment-id", "third", "--service-id", "s-third"]
        site.control("register", *words, backend=third)
        if change == "rollback":
            site.promote("third")
        older = site.state
        if change == "removal":
            assert site.control("retire", "--deployment-id", "old") == 0
            assert site.control("delete", "--deployment-id", "old") == 0
        elif change == "promotion":
            assert site.promote("third") == 0
        else:
            assert site.promote("new", "--instead-of", "third", "--rolls-back") == 0
        active = site.store.read().active
        assert active == ("third" if change == "promotion" else "new")
        expected = site.routing
        eventually(lambda: all(page(p) == (200, active.encode()) for p in routers))
        put_back(site, older)
        # nobody gets the other one, not even for a moment
        until = time.monotonic() + 3 * QUICK["refresh_seconds"]
        while time.monotonic() < until:
            assert {page(process) for process in routers} == {(200, active.encode())}
        found = site.routing
        assert (found.active, found.promoted) == (expected.active, expected.promoted)
        assert found.records.keys() == expected.records.keys()
        assert {r.state for r in found.records.values()} == {
            r.state for r in expected.records.values()
        }
        assert found.records[active].state == "active"
        assert found.tombstones == expected.tombstones


@pytest.mark.parametrize("first", [0, 1])
def test_whichever_router_mends_it_the_later_promotion_is_active(
    site: Site, run_router: Run, first: int
) -> None:
    """One of them was cut off from Redis when `old` was promoted again."""
    older = site.state
    routers = [up(run_router(site.server, QUICK)) for _ in range(2)]
    stale, fresh = routers
    os.killpg(stale.popen.pid, signal.SIGSTOP)
    assert site.promote("old") == 0
    eventually(lambda: page(fresh) == (200, b"old"))
    os.killpg(fresh.popen.pid, signal.SIGSTOP)
    put_back(site, {**older, ":epoch": "1"})
    os.killpg(routers[first].popen.pid, signal.SIGCONT)
    eventually(lambda: site.store.read().epoch > 1)  # it has written what it knows
    os.killpg(routers[1 - first].popen.pid, signal.SIGCONT)
    eventually(lambda: [page(process) for process in routers] == [(200, b"old")] * 2)
    assert site.store.read().active == "old"
    assert site.record("new")["state"] == "draining"


def test_an_active_id_that_is_no_deployment_is_taken_back(site: Site, run_router: Run) -> None:
    """Before: 502 to everybody until something was promoted, and `:promoted` named it, too."""
    process = up(run_router(site.server, QUICK))
    before = site.routing
    site.server.client.set(f"{PREFIX}:active", "nobody")
    until = time.monotonic() + 2 * QUICK["refresh_seconds"]
    while time.monotonic() < until:
        assert page(process) == (200, b"new")
    eventually(lambda: site.routing == before)
    assert page(process) == (200, b"new")


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
    os.kill(site.server.process.popen.pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(router, "store_from_env", redis_limited(0.3))
        began = time.monotonic()
        assert site.control("status", "--nonce", "n") == 1
        assert time.monotonic() - began < 3
    finally:
        os.kill(site.server.process.popen.pid, signal.SIGCONT)
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
    new: Any = Service
    services = {
        f"prod-{name}": new("i", "i", f"prod-{name}", *blank, {"PULSE_DEPLOYMENT_ID": name})
        for name in ("right", "wrong", "noted")
    }
    services["pulse-router"] = new("r", "r", "pulse-router", *blank, {})
    stack = Stack(config.Target("p", "e"), config.Names(), services)
    young, empty = {"active": "wrong", "uptime_seconds": 3}, {"active": None, "uptime_seconds": 900}
    old, gone = {"active": "right", "uptime_seconds": 90}, {"active": "gone", "uptime_seconds": 99}
    assert known_active(stack, {"routers": [young, empty, gone, old]}) == "right"
    with pytest.raises(Failure, match=r"it is not known .*: pass --deployment-id with one of "):
        known_active(stack, {"routers": [empty]})
    noted = services["pulse-router"].variables
    noted["PULSE_RAILWAY_ACTIVE"] = "noted"
    assert known_active(stack, {"routers": [old]}) == "noted"
    noted["PULSE_RAILWAY_ACTIVE"] = "gone"
    assert known_active(stack, {"routers": [old]}) == "right"
    with pytest.raises(Failure, match="gone was promoted last, and does not run any more"):
        known_active(stack, {"routers": [empty]})


def test_what_is_no_text_is_ignored(site: Site, run_router: Run) -> None:
    """Before, one byte that is no UTF-8 ended every router and every command."""
    process = up(run_router(site.server))
    for key in (":deployment:junk", ":history", ":removed"):
        site.server.client.set(f"pulse:railway{key}", b"\x80\xff")
    site.server.client.publish("pulse:railway:events", b"\xff")
    assert site.promote("old") == 0
    eventually(lambda: page(process) == (200, b"old"))
    assert site.control("status") == 0
