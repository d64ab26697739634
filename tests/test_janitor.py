"""What the janitor decides, deployment by deployment, on a real Redis and a real backend.

Railway alone is stood in for, since its services would have to be an hour old; the verbs' tests run
the janitor on the local Railway.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pulse_railway import control_job, runtime_image
from tests.conftest import ROOT, Redis
from tests.net import Backend, Connection, header, ok

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")


NOWHERE = "http://127.0.0.1:9"  # nobody takes a connection there


class Railway:
    """The calls of janitor.Railway that a run makes."""

    def __init__(
        self,
        *services: Any,
        promoted: Any = None,
        closed: float | None = None,
        opened: float | None = None,
        refuses: str = "",
    ) -> None:
        self.services = list(services)
        self.promoted, self.closed, self.opened = promoted, closed, opened
        self.refuses = refuses
        self.deleted: list[str] = []
        self.variables_set: list[dict[str, str]] = []

    def inspect(self) -> Any:
        return janitor.Inventory(
            self.services, "id-router", self.promoted, self.closed, self.opened
        )

    def set_variables(self, service_id: str, values: dict[str, str]) -> None:
        assert service_id == "id-router"
        self.variables_set.append(values)

    def delete(self, service: Any) -> bool:
        if service.deployment == self.refuses:
            raise RuntimeError("Railway does not delete this")
        self.deleted.append(service.deployment)
        return True


def service(name: str, age: float = 7200, status: str | None = None, **more: Any) -> Any:
    """A service that a deploy of this stack has made."""
    return janitor.Backend(f"id-{name}", name, name, age, status, **{"ours": True, **more})


def clean_up(store: Any, railway: Railway, limits: Any = None) -> Any:
    limits = limits or janitor.Retention(60)
    return janitor.clean_up(store, railway, store.read(), railway.inspect(), "token", limits)


class Room:
    """A Redis with an active deployment, and one backend that answers for all that have its
    address; `here` are those without a record, or without an address in it."""

    def __init__(self, server: Redis, backend: Backend) -> None:
        self.server, self.backend = server, backend
        self.store = router.RedisStore(server.url, "pulse:railway")
        self.here: set[str] = set()
        server.deployment("active", backend.address)

    def sessions(self, count: int) -> None:
        self.backend.answer = ok(json.dumps({"render_session_count": count}).encode())

    def record(self, name: str) -> dict[str, Any] | None:
        raw = self.server.client.get(f"pulse:railway:deployment:{name}")
        return json.loads(str(raw)) if raw else None

    def draining(self, name: str, address: str | None = None, **more: Any) -> None:
        since = {"registered_at": 1, "drain_started_at": time.time() - 1}
        fields = {"state": "draining", **since, **more}
        self.server.deployment(name, address or self.backend.address, **fields)

    def run(
        self,
        *services: Any,
        ttl: float = 86_400,
        window: float = 0,
        keep: int = 0,
        **railway: Any,
    ) -> tuple[Any, list[str]]:
        on_railway = Railway(service("active"), *services, **railway)
        limits = janitor.Retention(ttl, window, keep)
        return clean_up(self.store, on_railway, limits), on_railway.deleted


@pytest.fixture
def room(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    with Backend() as backend:
        found = Room(redis_server, backend)
        by_name = router.Record.url.fget

        def url(record: Any) -> Any:
            return backend.address if record.deployment_id in found.here else by_name(record)

        monkeypatch.setattr(router.Record, "url", property(url))
        monkeypatch.setattr(janitor, "RELOAD_GRACE_SECONDS", 0.0)
        monkeypatch.setattr(control, "HEAL_WAIT", 0.2)
        monkeypatch.setattr(control, "REPORT_WAIT", 0.5)
        yield found


def test_a_deploy_that_died_before_it_was_registered(room: Room) -> None:
    room.sessions(0)
    _, deleted = room.run(service("young", 60), service("old"))
    assert deleted == ["old"]


def test_a_deployment_whose_record_is_lost_is_not_taken_for_one(room: Room) -> None:
    room.here.add("lost")
    room.sessions(2)
    report, deleted = room.run(service("lost"))
    assert deleted == []
    assert report.kept["lost"] == "no record named it: draining from now on"
    record = room.record("lost")
    assert record is not None
    assert (record["state"], record["service_name"]) == ("draining", "lost")
    assert time.time() - record["drain_started_at"] < 5
    assert room.run(service("lost"))[0].kept["lost"] == "2 sessions"
    room.sessions(0)
    assert room.run(service("lost"))[1] == ["lost"]
    assert room.record("lost") is None


def test_what_was_promoted_and_has_lost_its_record_is_adopted_at_once(room: Room) -> None:
    """Its tabs meet 409 meanwhile; a deploy that is on its way was never promoted."""
    room.sessions(2)
    ago = {"young": 100, "again": 900}  # the id was used before
    noted = [
        {"at": time.time() - at, "what": "promote", "deployment_id": name}
        for name, at in ago.items()
    ]
    room.server.client.set("pulse:railway:history", json.dumps(noted))
    report, deleted = room.run(service("young", 300), service("again", 300))
    assert deleted == []
    assert report.kept == {"young": "no record named it: draining from now on"}
    assert (room.record("young") or {})["state"] == "draining"
    assert room.record("again") is None


def test_what_runs_and_does_not_answer_is_not_taken_for_dead(room: Room) -> None:
    """Its record is lost, and for a moment it is silent, or nobody here reaches anything."""
    silent, crashed = service("silent", status="SUCCESS"), service("crashed", status="CRASHED")
    report, deleted = room.run(silent, crashed)
    assert deleted == ["crashed"]
    assert report.kept["silent"] == "no record named it: draining from now on"
    assert (room.record("silent") or {})["state"] == "draining"
    report, deleted = room.run(silent)
    assert (report.kept["silent"], deleted) == ("not answering", [])
    room.here.add("silent")
    room.sessions(0)
    assert room.run(silent)[1] == ["silent"]


def test_a_service_that_no_deploy_of_this_stack_made_is_not_touched(room: Room) -> None:
    """Somebody's own service with PULSE_DEPLOYMENT_ID."""
    report, deleted = room.run(service("own", ours=False), ttl=0)
    assert (deleted, report.failed) == ([], {})
    reason = "no record names its service, and no deploy of this stack created it"
    assert report.kept["own"] == reason
    assert room.record("own") is None


NUMBERS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("0123456789", max_size=3)
)
SAID = st.one_of(
    st.just({"render_session_count": 0}),
    NUMBERS,
    st.lists(NUMBERS, max_size=2),
    st.dictionaries(st.sampled_from(["render_session_count", "count"]), NUMBERS, max_size=2),
)
ODD = [
    b"",
    b"0",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{}",
    b"[" * 99_999,
]


@pytest.mark.parametrize("raw", ODD)
def test_an_answer_that_is_none_is_not_zero(room: Room, raw: bytes) -> None:
    """Before, a backend that answered with what is not HTTP ended every run in a traceback."""

    def handle(c: Connection) -> None:
        c.head()
        c.send(raw if raw.startswith((b"HTTP", b"n")) else ok(raw))

    room.backend.handler = handle
    room.server.deployment("old", room.backend.address, "draining", registered_at=1)
    report, deleted = room.run(service("old"))
    assert (report.kept, deleted) == ({"old": "not answering"}, [])


def test_a_backend_with_another_token_is_told_from_a_silent_one(room: Room) -> None:
    room.sessions(2)
    active = room.store.read().records["active"]
    assert control.sessions_answer(active, "t") == {"sessions": 2}
    room.backend.answer = ok(b"{}", status="403 Forbidden")
    assert control.sessions(active, "t") is None
    (row,) = control.status_answer(room.store, "t", None)["deployments"]
    assert (row["sessions"], row["wrong_token"]) == (None, True)
    room.backend.stop()
    assert control.sessions_answer(active, "t") == {"sessions": None}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(said=SAID)
def test_only_a_zero_is_zero(room: Room, said: object) -> None:
    room.backend.answer = ok(json.dumps(said).encode())
    room.server.deployment("old", room.backend.address, "draining", registered_at=1)
    _, deleted = room.run(service("old"))
    count = said.get("render_session_count") if isinstance(said, dict) else None
    assert deleted == (["old"] if type(count) is int and count == 0 else [])


def test_pending_deployments(room: Room) -> None:
    """One that is an hour old has died where Railway shows that it never ran, nothing answers, and
    it was never promoted."""
    old: dict[str, Any] = {"state": "pending", "registered_at": time.time() - 7200}
    for name, address, more in (
        ("failed", NOWHERE, {}),
        ("never-begun", NOWHERE, {}),
        ("young", NOWHERE, {"registered_at": time.time()}),
        ("held", NOWHERE, {"held": True}),  # as `deploy --no-promote` leaves it
        ("answers", room.backend.address, {}),  # a cut-off deploy whose version runs
        ("runs", NOWHERE, {}),
        ("was-active", NOWHERE, {"promoted_at": time.time() - 3600}),
        ("in-history", NOWHERE, {}),
    ):
        room.server.deployment(name, address, **old | more)
    noted = [{"at": 1, "what": "promote", "deployment_id": "in-history"}]
    room.server.client.set("pulse:railway:history", json.dumps(noted))
    room.sessions(0)
    dead = [service("failed", status="FAILED"), service("never-begun")]
    kept = [
        *(service(name, status="CRASHED") for name in ("young", "held", "answers")),
        service("runs", status="DEPLOYING"),
        service("was-active", status="FAILED"),
        service("in-history", status="REMOVED"),
    ]
    report, deleted = room.run(*dead, *kept)
    assert sorted(deleted) == ["failed", "never-begun"]
    assert room.record("failed") is None
    lasting = "pending, and it runs or was promoted before: promote or delete it"
    assert report.kept == {
        "young": "being deployed",
        "held": "pinned",
        **dict.fromkeys(["answers", "runs", "was-active", "in-history"], lasting),
    }


def test_what_railway_says_was_promoted_is_no_dead_deploy(room: Room) -> None:
    long_ago = time.time() - 7200
    room.server.deployment("pending", NOWHERE, "pending", registered_at=long_ago)
    room.run()  # the promotion of the active one gets its time
    before = router.Promotion("pending", 5.0)
    _, deleted = room.run(service("pending", status="FAILED"), promoted=before)
    assert deleted == []  # what differs was mended, and nothing else is done in that run


def test_draining_deployments(room: Room) -> None:
    room.draining("old", drain_started_at=time.time() - 50)
    room.sessions(3)
    assert room.run(service("old"))[1] == []
    room.backend.answer = ok(b"?", status="500 Internal Server Error")
    report, deleted = room.run(service("old"))
    assert (report.kept, deleted) == ({"old": "not answering"}, [])
    room.backend.answer = ok(json.dumps({"reloaded_socket_count": 1}).encode())
    report, deleted = room.run(service("old"), ttl=40)
    assert (report.expired, deleted) == (["old"], ["old"])
    assert room.backend.heads[-1].startswith(b"POST /_pulse/internal/railway/reload ")
    assert header(room.backend.heads[-1], "x-pulse-railway-internal-token") == "token"


def test_one_replica_does_not_speak_for_the_others(room: Room) -> None:
    """Somebody has scaled it on Railway: which replica answers is not known."""
    room.draining("old")
    room.sessions(0)
    report, deleted = room.run(service("old", replicas=2))
    assert (list(report.kept), deleted) == (["old"], [])
    assert report.kept["old"].startswith("2 replicas")
    assert room.run(service("old", replicas=2), ttl=0)[1] == ["old"]


def test_contradictions_delete_nothing(room: Room) -> None:
    room.sessions(0)
    twice = [service("twin"), janitor.Backend("other", "twin-2", "twin", 7200)]
    railway = Railway(service("active"), *twice)
    with pytest.raises(janitor.Contradiction, match="on two services"):
        clean_up(room.store, railway)
    railway = Railway(service("other"))
    with pytest.raises(janitor.Contradiction, match="has no service"):
        clean_up(room.store, railway)
    assert railway.deleted == []


# -- what was promoted last --------------------------------------------------------------------


def test_lost_state_is_restored_from_railway(room: Room) -> None:
    room.sessions(0)
    room.server.client.flushall()
    services = [service("active"), service("rolled-back", 60)]
    for promoted in (None, router.Promotion("gone", 5.0)):  # what nobody knows is not guessed
        railway = Railway(*services, promoted=promoted)
        with pytest.raises(janitor.Contradiction, match=r"none is active.*--deployment-id"):
            clean_up(room.store, railway)
    railway = Railway(*services, promoted=router.Promotion("active", 5.0), closed=6.0)
    assert clean_up(room.store, railway).restored == "active"
    assert railway.deleted == []
    routing = room.store.read()
    assert routing.promotion == router.Promotion("active", 5.0)
    assert routing.maintenance.since == 6.0
    assert sorted(routing.records) == ["active", "rolled-back"]
    assert routing.records["rolled-back"].state == "draining"


def test_the_active_deployment_is_noted_on_railway(room: Room) -> None:
    """With its time, which a promotion by 0.3.x gets now; one that is noted already is not."""
    railway = Railway(service("active"))
    clean_up(room.store, railway)
    promoted = room.store.read().promoted
    assert abs(promoted.at - time.time()) < 5
    noted = {"PULSE_RAILWAY_ACTIVE": "active", "PULSE_RAILWAY_ACTIVE_AT": repr(promoted.at)}
    assert railway.variables_set == [noted]
    for before, remembered in (
        (router.Promotion("before", 5.0), [noted]),
        (router.Promotion("before", 0.0), [noted]),  # by an earlier version, without the time
        (router.Promotion("active", 0.0), [noted]),
        (promoted, []),
    ):
        railway = Railway(service("active"), service("before"), promoted=before)
        clean_up(room.store, railway)
        assert railway.variables_set == remembered


def test_a_run_that_mends_what_was_promoted_last_deletes_nothing(room: Room) -> None:
    room.sessions(0)
    room.draining("old")
    before = router.Promotion("old", 5.0)
    assert room.run(service("old"), promoted=before)[1] == []
    assert room.run(service("old"), promoted=room.store.read().promoted)[1] == ["old"]


def test_a_store_that_is_older_than_what_railway_says(room: Room) -> None:
    """A snapshot from before the last promotion: the version on which the tabs are is active
    again, and nothing goes."""
    room.run()
    room.sessions(0)
    room.draining("newer")
    last = router.Promotion("newer", room.store.read().promoted.at + 1)
    report, deleted = room.run(service("newer"), promoted=last)
    assert (report.restored, deleted) == ("newer", [])
    routing = room.store.read()
    assert routing.promotion == last
    assert {n: r.state for n, r in routing.records.items()} == {
        "newer": "active",
        "active": "draining",
    }


def test_what_was_promoted_last_has_no_service(room: Room) -> None:
    """The store is older than that promotion, and its deployment was deleted on Railway by hand."""
    room.run()
    room.sessions(0)
    room.draining("old")
    last = router.Promotion("gone", room.store.read().promoted.at + 1)
    report, deleted = room.run(service("old"), promoted=last)
    assert (report.restored, deleted) == (None, [])
    assert room.store.read().active == "active"
    assert any("gone was promoted last and has no service" in p for p in report.problems)
    assert any("restore --deployment-id active` makes that final" in p for p in report.problems)


def test_a_closed_site_stays_closed(room: Room) -> None:
    """The page is lost with Redis; that the site is closed is noted on Railway."""
    room.run()
    railway = Railway(service("active"), promoted=room.store.read().promoted, closed=5.0)
    clean_up(room.store, railway)
    assert room.store.read().maintenance.since == 5.0
    switch = control.control_parser().parse_args(["maintenance", "off"])
    room.store.apply(control.step_of(switch))
    clean_up(room.store, railway)
    assert room.store.read().maintenance is None
    (noted,) = railway.variables_set
    assert noted["PULSE_RAILWAY_MAINTENANCE"] == ""
    assert time.time() - float(noted["PULSE_RAILWAY_MAINTENANCE_OFF"]) < 60
    switch = control.control_parser().parse_args(["maintenance", "on"])
    room.store.apply(control.step_of(switch))
    railway = Railway(service("active"), promoted=room.store.read().promoted)
    clean_up(room.store, railway)
    since = room.store.read().maintenance.since
    noted = {"PULSE_RAILWAY_MAINTENANCE": repr(since), "PULSE_RAILWAY_MAINTENANCE_OFF": ""}
    assert railway.variables_set == [noted]


def test_a_dump_from_while_it_was_closed_closes_nothing(room: Room) -> None:
    """Before, put back after `off`, with no router that remembered, the site stayed closed."""
    room.run()
    promoted = room.store.read().promoted
    room.server.client.set("pulse:railway:maintenance", json.dumps({"since": 1000.0}))
    before = Railway(service("active"), promoted=promoted, opened=999.0)
    clean_up(room.store, before)
    assert room.store.read().maintenance.since == 1000.0, "it was closed after that"
    room.server.client.set("pulse:railway:maintenance", json.dumps({"since": "odd"}))
    clean_up(room.store, Railway(service("active"), promoted=promoted, opened=1001.0))
    assert room.store.read().maintenance, "since when is not known"
    room.server.client.set("pulse:railway:maintenance", json.dumps({"since": 1000.0}))
    after = Railway(service("active"), promoted=promoted, opened=1001.0)
    clean_up(room.store, after)
    assert room.store.read().maintenance is None
    assert after.variables_set == []
    assert room.store.read().history[-1]["what"] == "maintenance off"


# -- what else can happen meanwhile --------------------------------------------------------------


@pytest.mark.parametrize("meanwhile", ["promoted", "drained anew", "forgotten", "emptied"])
def test_what_changed_since_it_was_judged_is_left(
    room: Room, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Before: a deployment that was rolled back to during its tabs' grace was deleted."""
    began = time.time() - 500
    room.server.deployment("old", room.backend.address, "draining", drain_started_at=began)

    def change(_: Any, __: str) -> int:
        client = room.server.client
        if meanwhile == "promoted":
            room.server.deployment("old", room.backend.address, "active")
        elif meanwhile == "drained anew":
            now = time.time()
            room.server.deployment("old", room.backend.address, "draining", drain_started_at=now)
        elif meanwhile == "forgotten":
            client.delete("pulse:railway:deployment:old")
        else:
            client.flushall()
        return 0

    monkeypatch.setattr(control, "sessions", change)
    report, deleted = room.run(service("old"))
    assert deleted == []
    assert "changed meanwhile" in report.kept["old"] or "is active" in report.kept["old"]


def test_the_flags_of_0_3_set_what_ensure_sets() -> None:
    given = janitor.options(
        "run --service r --janitor-service j --project-id p --environment-id e --token t"
        " --service-prefix s --redis-url u --redis-service rs --redis-prefix rp"
        " --drain-ttl-seconds 7".split()
    )
    assert given["RAILWAY_PROJECT_ID"] == "p"
    assert given["REDIS_URL"] == "u"
    assert given["PULSE_RAILWAY_DRAIN_TTL_SECONDS"] == "7"
    assert len(given) == 10
    assert janitor.options([]) == {}


def test_a_deployment_whose_service_is_gone_loses_its_record(room: Room) -> None:
    """Before, its tabs met 502 for a day: somebody had deleted the service on Railway."""
    long_ago = time.time() - 500
    for name, state, more in (
        ("gone", "draining", {"registered_at": long_ago}),
        ("pending", "pending", {"registered_at": long_ago}),
        ("fresh", "pending", {"registered_at": time.time()}),
    ):
        room.server.deployment(name, NOWHERE, state, **more)
    report, deleted = room.run()
    assert deleted == []  # there is nothing on Railway to delete
    assert sorted(report.deleted) == ["gone", "pending"]
    assert room.record("gone") is None
    assert room.record("fresh")


def test_what_railway_leaves_out_of_an_answer_and_still_answers_is_kept(room: Room) -> None:
    room.sessions(0)
    room.draining("old")
    room.server.deployment("pending", room.backend.address, "pending", registered_at=1)
    report, deleted = room.run()
    assert (report.deleted, deleted) == ([], [])
    said = "answers, but Railway does not list it"
    assert report.kept == {"old": said, "pending": said}


def test_what_0_3_x_can_leave_behind_drains(room: Room) -> None:
    """Two records that say active, one of which is; a pending one without a time."""
    room.server.deployment("stray", room.backend.address, "active", registered_at=1)
    room.server.deployment("old", NOWHERE, "pending")
    room.server.client.set("pulse:railway:active", "active")
    room.sessions(0)
    report, deleted = room.run(service("stray"), service("old"))
    assert report.kept["stray"].startswith("was active beside the active deployment")
    assert (room.record("stray") or {})["state"] == "draining"
    assert (report.deleted, deleted) == (["old"], ["old"])
    assert room.run(service("stray"))[1] == ["stray"]


@pytest.mark.parametrize(
    "more",
    [
        {"state": "resting"},
        {"state": 7},
        {"registered_at": "yesterday"},
        {"instances": [1, 2]},
        {"retiring_at": "soon"},
        {"held": "yes", "state": "pending", "registered_at": 1},
    ],
)
def test_what_is_not_understood_is_kept(room: Room, more: dict[str, Any]) -> None:
    room.sessions(0)
    room.draining("odd", NOWHERE, **more)
    report, deleted = room.run(service("odd", status="FAILED"), ttl=60)
    assert (report.deleted, deleted) == ([], [])
    assert report.kept["odd"].startswith("not understood (")
    assert "`pulse-railway delete` removes it" in report.kept["odd"]
    env = {"REDIS_URL": room.server.url, "PULSE_RAILWAY_INTERNAL_TOKEN": "token"}
    for command in ("retire", "delete"):
        assert control.carry_out([command, "--deployment-id", "odd"], env)["ok"]
    assert room.record("odd") is None


def test_a_draining_one_with_an_odd_field_goes_at_its_ttl(room: Room) -> None:
    room.draining("odd", about="me", drain_started_at=time.time() - 50)
    assert room.run(service("odd"), ttl=60)[1] == []
    assert room.run(service("odd"), ttl=40)[1] == ["odd"]


def test_a_download_without_a_tab_is_use(room: Room) -> None:
    room.draining("old")
    room.sessions(0)
    report(room, "r1", in_flight={"old": 1, "active": 7})
    found, deleted = room.run(service("old"))
    assert (found.kept["old"], deleted) == ("1 requests under way", [])
    report(room, "r1", in_flight={})
    assert room.run(service("old"))[1] == ["old"]


def report(room: Room, name: str, lease: int = 120, **more: Any) -> None:
    """What a router says of itself, as of `120 - lease` seconds ago."""
    text = json.dumps({"epoch": 1_000_000, **more})
    room.server.client.set(f"pulse:railway:router:{name}", text, ex=lease)


def test_nothing_is_deleted_while_a_router_may_route_to_it(room: Room) -> None:
    """It is retired, and goes in the run that finds every router behind that."""
    room.sessions(0)
    room.draining("old")
    room.draining("older")
    report(room, "ahead")
    report(room, "behind", epoch=1)
    began = time.monotonic()
    found, deleted = room.run(service("old"), service("older"))
    assert time.monotonic() - began < 2 * control.REPORT_WAIT + 0.5  # it is waited for once
    assert (found.deleted, deleted) == ([], [])
    said = "behind may still route to it"
    assert found.kept == {"old": said, "older": said}
    assert (room.record("old") or {})["retiring_at"]
    report(room, "behind", epoch=1_000_000)
    assert sorted(room.run(service("old"), service("older"))[1]) == ["old", "older"]


def test_a_router_that_is_silent_counts_until_its_lease_ends(room: Room) -> None:
    room.sessions(0)
    room.draining("old")
    report(room, "silent", lease=2, epoch=1)
    found, deleted = room.run(service("old"))
    assert (found.kept["old"], deleted) == ("silent may still route to it", [])
    time.sleep(2)
    assert room.run(service("old"))[1] == ["old"]


def test_a_router_of_another_version_counts_for_30_seconds(room: Room) -> None:
    room.sessions(0)
    room.draining("old")
    report(room, "r1", epoch=None)
    assert room.run(service("old"))[0].kept["old"] == "r1 may still route to it"
    retired = {**(room.record("old") or {}), "retiring_at": time.time() - 31}
    room.server.client.set("pulse:railway:deployment:old", json.dumps(retired))
    assert room.run(service("old"))[1] == ["old"]


def test_one_that_railway_does_not_delete_stops_no_other(room: Room) -> None:
    room.sessions(0)
    for name in ("one", "two", "three"):
        room.draining(name)
    names = [service(name) for name in ("one", "two", "three")]
    found, deleted = room.run(*names, refuses="two")
    assert (sorted(deleted), sorted(found.deleted)) == (["one", "three"], ["one", "three"])
    assert found.failed == {"two": "Railway does not delete this"}
    assert (room.record("two") or {})["retiring_at"]  # the next run goes on from there
    assert room.run(names[1])[1] == ["two"]


def test_the_tabs_are_told_whoever_removes_it(room: Room) -> None:
    """Also where the run finishes what another began, and by `delete`."""
    record = {"registered_at": 1, "retiring_at": time.time()}
    room.server.deployment("old", room.backend.address, "draining", **record)
    room.backend.answer = ok(json.dumps({"reloaded_socket_count": 2}).encode())
    assert room.run(service("old"))[1] == ["old"]
    told = [head for head in room.backend.heads if b"/internal/railway/reload" in head]
    assert len(told) == 1
    room.server.deployment("next", room.backend.address, "draining", registered_at=1)
    env = {"REDIS_URL": room.server.url, "PULSE_RAILWAY_INTERNAL_TOKEN": "token"}
    answer = control.carry_out(["retire", "--deployment-id", "next"], env)
    assert (answer["ok"], answer["reloaded"]) == (True, 2)


def test_there_is_a_way_back_for_a_while(room: Room) -> None:
    """Before, on a quiet app the version before was gone in the next run, and `rollback` had
    nowhere to go."""
    room.sessions(0)
    now = time.time()
    for name, ago in (("oldest", 900), ("older", 500), ("last", 100)):
        room.server.deployment(
            name, room.backend.address, "draining", registered_at=1, drain_started_at=now - ago
        )
    all_of_them = [service(n) for n in ("oldest", "older", "last")]
    report, deleted = room.run(*all_of_them, window=200, keep=2)
    assert deleted == ["oldest"]
    assert report.kept == {"older": "for a rollback", "last": "for a rollback"}
    assert room.run(*all_of_them[1:], window=200)[1] == ["older"]
    assert room.run(all_of_them[2], window=200)[1] == []
    # one whose service is gone is no way back, nor one that is being removed
    room.draining("lost", drain_started_at=now - 10)
    room.draining("retiring", drain_started_at=now - 10, retiring_at=now)
    retiring = service("retiring")
    assert room.run(all_of_them[2], retiring, window=200, keep=1)[1] == ["retiring"]
    assert room.run(all_of_them[2], window=50)[1] == ["last"]
    # the drain TTL goes first
    room.server.deployment(
        "last", room.backend.address, "draining", registered_at=1, drain_started_at=now - 100
    )
    assert room.run(all_of_them[2], ttl=60, window=200, keep=5)[1] == ["last"]


def test_the_fallback_is_kept_while_the_active_deployment_is_down(room: Room) -> None:
    """Without tabs, and after its drain TTL; in use by a router's word, or because the janitor
    cannot connect to the active one either."""
    room.sessions(0)
    gone = "http://127.0.0.1:9"
    room.server.deployment("active", gone, registered_at=3, promoted_at=3)
    room.draining("before", promoted_at=2, registered_at=2, drain_started_at=time.time() - 9)
    room.draining("other", promoted_at=1, registered_at=1)
    both = [service("before"), service("other")]
    for ttl in (86_400, 5):
        found, deleted = room.run(*both, ttl=ttl)
        assert "before" not in deleted
        assert found.fallback == "before"
        assert found.kept["before"] == "active cannot be connected to: new visitors get before"
    assert room.record("other") is None
    # also after a `restore`, when new visitors get nothing: `rollback` leads to it
    room.server.client.set("pulse:railway:history", json.dumps([{"what": "restore", "at": 1}]))
    found, deleted = room.run(both[0], ttl=5)
    assert (found.fallback, deleted) == ("before", [])
    room.server.client.delete("pulse:railway:history")
    room.server.deployment("active", room.backend.address, registered_at=3, promoted_at=3)
    report(room, "router", fallback="before", epoch=1_000_000)
    found, deleted = room.run(both[0])
    assert (found.fallback, deleted) == ("before", [])
    report(room, "router")
    found, deleted = room.run(both[0])
    assert (found.fallback, deleted) == (None, ["before"])


def test_a_fallback_in_use_is_retired_only_by_force(room: Room, monkeypatch: Any) -> None:
    monkeypatch.setenv("REDIS_URL", room.server.url)
    room.server.deployment("active", "http://127.0.0.1:9", registered_at=3, promoted_at=3)
    room.draining("before", promoted_at=2, registered_at=2)
    report(room, "router", fallback="before")
    words = ["retire", "--deployment-id", "before"]
    answer = control.carry_out(words, dict(os.environ))
    assert (answer["ok"], answer["reason"]) == (False, "fallback")
    assert "new visitors get before. --force" in answer["error"]
    room.server.client.delete("pulse:railway:router:router")  # nor before a router has reported it
    assert control.carry_out(words, dict(os.environ))["reason"] == "fallback"
    report(room, "router", fallback="before")
    status = control.carry_out(["status"], dict(os.environ))
    assert (status["fallback"], status["problems"]) == ("before", [])
    assert control.carry_out([*words, "--force"], dict(os.environ))["ok"]


def test_a_long_answer_is_packed_or_cut() -> None:
    """At 128 KB the janitor would not start."""
    few = {"ok": True, "command": "status", "nonce": "n", "version": "v"}
    long = {**few, "deployments": [{"name": f"d-{i}", "why": "ж" * 200} for i in range(100)]}
    text = janitor.answer_text(long, "ada")
    assert len(text.encode()) <= 16 * 1024
    assert json.loads(control_job.unpacked(json.loads(text))) == long
    assert json.loads(janitor.answer_text(long, None)) == long  # an earlier CLI cannot unpack it
    huge = {**few, "deployments": [secrets.token_hex(30_000)] * 3}
    for caller in ("ada", None):
        said = json.loads(janitor.answer_text(huge, caller))
        assert (said["ok"], said["reason"], said["nonce"]) == (False, "long", "n")
        assert "too long for the janitor: pass --control ssh" in said["error"]
    short = {**few, "error": "${{pulse-env.KEY}} ж \ud800"}
    text = janitor.answer_text(short, "ada")
    assert "$" not in text
    assert json.loads(text)["error"] == "${{pulse-env.KEY}} ж ?"


def test_a_control_command_is_carried_out_once_and_in_time(room: Room) -> None:
    env = {"REDIS_URL": room.server.url, "RAILWAY_SERVICE_ID": "x"}

    def answer(request: object, before: str = "") -> Any:
        text = request if isinstance(request, str) else json.dumps(request)
        found = janitor.Inventory([], request=text, answer=before)
        return janitor.carry_out_request(found, env)

    request = {"nonce": "n1", "words": ["active"], "until": time.time() + 60}
    said = answer(request)
    version = router.runtime_version()
    assert said == {
        **{"ok": True, "deployment_id": "active", "command": "active"},
        **{"nonce": "n1", "version": version, "clock": said["clock"]},
    }
    assert abs(said["clock"] - time.time()) < 60
    assert answer(request, json.dumps(said)) is None  # it was answered
    late = answer({**request, "words": ["maintenance", "on"], "until": time.time() - 7200})
    assert (late["ok"], late["reason"]) == (False, "late")  # an earlier CLI's
    assert "was over 7200 s before it was read: is this machine's clock right?" in late["error"]
    of_today = {"nonce": "n0", "words": ["maintenance", "off"], "until": 0, "caller": "ada"}
    said = answer(of_today)
    assert said["ok"]  # this version's callers confirm, whatever their clock says
    for nonsense in ("", "{", "[]", "null", "{}", '{"nonce": 1}', {**request, "words": []}):
        assert answer(nonsense) is None
    unknown = answer({**request, "words": ["explode"]})
    assert (unknown["ok"], unknown["nonce"], unknown["command"]) == (False, "n1", "explode")
    words = ["retire", "--deployment-id", "active"]
    assert answer({**request, "words": words})["reason"] == "active"


# -- a run as a whole, whose answers come from somewhere else -------------------------------------


@pytest.fixture
def on_railway(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """`on_railway(answer, NAME=value)`: a run for which Railway has that answer; how it ended, and
    what it said."""
    redis_server.deployment("active", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with Backend() as railway:

        def run(answer: bytes, **env: str) -> tuple[int, str]:
            railway.answer = answer
            given = {
                "RAILWAY_SERVICE_ID": "j",
                "RAILWAY_PROJECT_ID": "p",
                "RAILWAY_ENVIRONMENT_ID": "e",
                "RAILWAY_TOKEN": "secret-token",
                "REDIS_URL": redis_server.url,
                "PULSE_RAILWAY_API_URL": railway.address,
                **env,
            }
            for name, value in given.items():
                monkeypatch.setenv(name, value)
            code = janitor.main([])
            said = capsys.readouterr()
            assert "secret" not in said.out + said.err
            return code, said.out + said.err

        yield run


NOT_RAILWAY = [
    (ok(b"<html>"), "refused: Railway's answer is not one of its API"),
    (ok(b"[]"), "refused: Railway's answer is not one of its API"),
    (ok(b'{"ok": true}'), "refused: Railway's answer is not one of its API"),
    (ok(b'{"data": {}}'), "refused: Railway's answer is not one of its API"),
    (ok(b'{"errors": true, "data": {"environment": 1}}'), "refused: Railway's answer is not"),
    (ok(b'{"errors": [{"message": "no"}]}'), "refused: no\n"),
    (ok(b'{"errors": [{"message": "Not Authorized"}]}'), "run `pulse-railway ensure`"),
    (ok(b"{}", status="503 Busy"), "gave up: HTTPStatusError; the next run goes on"),
]


@pytest.mark.parametrize(("answer", "says"), NOT_RAILWAY)
def test_an_answer_that_is_not_understood_ends_the_run(
    on_railway: Callable[..., tuple[int, str]], redis_server: Redis, answer: bytes, says: str
) -> None:
    for turn in (1, 2):
        code, said = on_railway(answer)
        assert (code, says in said) == (1, True), said
        assert not redis_server.client.exists("pulse:railway:janitor:lock")
        run = control.janitor_run(router.RedisStore(redis_server.url, "pulse:railway"))
        assert (run["failed"], run["why"] in said, run["age"] < 10) == (turn, True, True)
    redis_server.client.set("pulse:railway:owner", "another/stack")
    left = redis_server.client.get("pulse:railway:janitor:run")
    on_railway(answer)  # whose state it may be is not known
    assert redis_server.client.get("pulse:railway:janitor:run") == left


def test_a_run_that_cannot_begin(
    on_railway: Callable[..., tuple[int, str]], redis_server: Redis
) -> None:
    empty = ok(b'{"data": {"environment": {"config": {}, "serviceInstances": {"edges": []}}}}')
    _, said = on_railway(empty, REDIS_URL="redis://:secret@127.0.0.1:9")
    assert said == "gave up, Redis: it refuses connections; the next run goes on\n"
    code, said = on_railway(empty, RAILWAY_TOKEN="", REDIS_URL="")
    assert (code, said) == (1, "missing RAILWAY_TOKEN, REDIS_URL: run `pulse-railway ensure`\n")
    redis_server.client.set("pulse:railway:janitor:lock", "another", ex=60)
    code, said = on_railway(empty)
    assert (code, json.loads(said)) == (0, {"skipped": "another run holds the lock"})
    assert redis_server.client.get("pulse:railway:janitor:lock") == "another"
    store = router.RedisStore(redis_server.url, "pulse:railway")
    janitor.note_run(store, "not removed: a")
    janitor.note_run(store, None)
    assert control.janitor_run(store) | {"age": 0} == {"age": 0, "failed": 0, "why": None}
    for damage in ("{", "[]", '{"failed": "x", "why": [1]}'):
        redis_server.client.set("pulse:railway:janitor:run", damage, ex=60)
        assert (control.janitor_run(store) or {}).get("failed", 0) == 0
    redis_server.client.set("pulse:railway:janitor:run", "{}")  # without a time
    assert control.janitor_run(store) is None


def test_in_another_service_it_refuses_in_words(
    on_railway: Callable[..., tuple[int, str]],
) -> None:
    """In the router's, the variables that `ensure` has set on the janitor's are missing: what
    `--keep` keeps would go."""
    code, said = on_railway(ok(b"{}"), RAILWAY_SERVICE_NAME="pulse-router")
    assert code == 1
    assert said.startswith("this is pulse-router: the janitor runs in its own service, ")
    assert "its own service, pulse-janitor. Wait for its cron schedule, or use" in said
    for env in (
        {"RAILWAY_SERVICE_NAME": "pulse-janitor"},
        {"RAILWAY_SERVICE_NAME": "tidy", "PULSE_RAILWAY_JANITOR_SERVICE": "tidy"},
    ):
        assert "refused: Railway's answer is not one of its API" in on_railway(ok(b"[]"), **env)[1]


@pytest.mark.parametrize("damage", [lambda c, k: c.set(k, "x"), lambda c, k: c.lpush(k, "x")])
def test_what_never_ends_does_not_keep_a_deployment(room: Room, damage: Any) -> None:
    """Before, nothing was deleted any more, and no run began."""
    room.sessions(0)
    room.draining("old")
    client = room.server.client
    client.set("pulse:railway:router:gone", json.dumps({"epoch": 1, "in_flight": {"old": 7}}))
    damage(client, "pulse:railway:router:odd")
    damage(client, "pulse:railway:janitor:lock")
    with janitor.run_lock(room.store) as held:
        assert held
        assert room.run(service("old"))[1] == ["old"]
        with janitor.run_lock(room.store) as second:
            assert not second
    assert not client.exists("pulse:railway:janitor:lock")


def test_a_lock_whose_answer_was_lost_is_held(room: Room) -> None:
    """The client asks again, and finds its own."""
    assert control.take_lock(room.store, "mine", 5)
    assert control.take_lock(room.store, "mine", 5)
    assert not control.take_lock(room.store, "another's", 5)


@pytest.mark.parametrize("said", [b'{"data": {"serviceDelete": false}}', b'{"data": {"x": 1}}'])
def test_what_railway_does_not_say_it_deleted_keeps_its_record(room: Room, said: bytes) -> None:
    room.sessions(0)
    room.draining("old")
    with Backend(ok(said)) as api:
        env = {"RAILWAY_PROJECT_ID": "p", "RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_TOKEN": "t"}
        railway: Any = Railway(service("active"), service("old"))
        railway.delete = janitor.Railway({**env, "PULSE_RAILWAY_API_URL": api.address}).delete
        found = clean_up(room.store, railway)
    assert found.failed == {"old": "Railway does not say which services there are: try again"}
    record = room.record("old")
    assert record is not None
    assert record["retiring_at"]


def test_the_lock_does_not_expire_on_a_long_run(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor, "LOCK_SECONDS", 1)
    store = router.RedisStore(redis_server.url, "pulse:railway")
    with janitor.run_lock(store) as held:
        assert held
        time.sleep(2.2)
        with janitor.run_lock(store) as second:
            assert not second
    assert not redis_server.client.exists("pulse:railway:janitor:lock")


def run_until_killed(url: str, at: str) -> None:
    """A run in a process of its own, which ends by SIGKILL after it has done that."""

    class Killed(Railway):
        def delete(self, service: Any) -> bool:
            if at != "forgotten":
                os.kill(os.getpid(), signal.SIGKILL)
            return True

    store = router.RedisStore(url, "pulse:railway")
    with janitor.run_lock(store):
        clean_up(store, Killed(service("active"), service("old")))
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("at", ["retired", "deleted", "forgotten"])
def test_a_run_that_is_killed_is_ended_by_the_next(room: Room, at: str) -> None:
    """The next one begins when the lock of the killed one has ended."""
    room.sessions(0)
    room.draining("old")
    lock = "pulse:railway:janitor:lock"
    call = (
        f"from tests.test_janitor import run_until_killed as run; run({room.server.url!r}, {at!r})"
    )
    killed = subprocess.run([sys.executable, "-c", call], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert bool(room.record("old")) == (at != "forgotten")
    with janitor.run_lock(room.store) as held:
        assert not held
    assert 0 < room.server.client.ttl(lock) <= janitor.LOCK_SECONDS
    room.server.client.pexpire(lock, 1)
    time.sleep(0.01)
    left = [service("old")] if at == "retired" else []  # else Railway has deleted it
    with janitor.run_lock(room.store) as held:
        assert held
        _, deleted = room.run(*left)
    assert deleted == (["old"] if left else [])
    assert room.record("old") is None
    assert "old" in room.store.read().tombstones


def test_who_is_told_of_a_forced_removal(caplog: pytest.LogCaptureFixture) -> None:
    report = janitor.Report(expired=["prod-1", "prod-2"])
    with Backend(handle=told) as listener:
        secret = f"{listener.address}/hooks/T0SECRET"
        janitor.notify({"PULSE_RAILWAY_NOTIFY_URL": secret}, report)
        janitor.notify({"PULSE_RAILWAY_NOTIFY_URL": secret}, janitor.Report())  # nothing to tell
        janitor.notify({}, report)
        assert [body["deployments"] for body in TOLD] == [["prod-1", "prod-2"]]
        assert TOLD[0]["text"].startswith("the drain time of prod-1, prod-2 was over")
    TOLD.clear()
    with Backend(handle=told) as listener:
        both = janitor.Report(expired=["prod-1"], fallback="prod-2")
        janitor.notify({"PULSE_RAILWAY_NOTIFY_URL": listener.address}, both)
        assert [body["event"] for body in TOLD] == ["forced removal", "fallback"]
        assert TOLD[1]["text"].endswith("new visitors get prod-2")
    for bad in (secret, "no-address-at-all", "http://[T0SECRET"):
        caplog.clear()
        janitor.notify({"PULSE_RAILWAY_NOTIFY_URL": bad}, report)
        assert "the notification to PULSE_RAILWAY_NOTIFY_URL failed: " in caplog.text
        assert "T0SECRET" not in caplog.text


TOLD: list[dict[str, Any]] = []


def told(connection: Connection) -> None:
    head = connection.head()
    TOLD.append(json.loads(connection.read(int(header(head, "content-length") or 0))))
    connection.send(ok())


def test_an_answer_of_railways_that_does_not_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drip(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while not threading.Event().wait(0.02):
            connection.send(b" ")

    monkeypatch.setattr(janitor, "CALL_SECONDS", 0.2)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    env = {"RAILWAY_PROJECT_ID": "p", "RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_TOKEN": "t"}
    with Backend(handle=drip) as railway:
        found = janitor.Railway({**env, "PULSE_RAILWAY_API_URL": railway.address})
        with pytest.raises(httpx.ReadTimeout, match="does not end"):
            found.inspect()
        assert railway.connections == 3


def test_a_redis_that_refuses_writes_is_noticed_without_a_write(redis_server: Redis) -> None:
    store = router.RedisStore(redis_server.url, "pulse:railway")
    assert control.write_refusal(store) is None
    client = redis_server.client
    try:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        assert control.write_refusal(store).startswith(("OOM", "command not allowed")), (
            control.write_refusal(store)
        )
        client.config_set("maxmemory", "0")
        client.replicaof("127.0.0.1", 9)
        assert "read only replica" in control.write_refusal(store)
    finally:
        client.config_set("maxmemory", "0")
        client.replicaof("NO", "ONE")
    assert control.write_refusal(store) is None
    assert list(client.scan_iter("*none*")) == []
