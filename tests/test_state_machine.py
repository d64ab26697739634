"""The routing state under everything that changes it, in any order, cut off anywhere.

Ours (deploy, promote, canary, rollback, delete, lock, restore, janitor runs, routers that heal) and
0.3.x's writers, which write keys one by one. The steps are control.py's and janitor.py's own, on a
store of router.py's; the clock, Railway's services and how many sessions a backend has are the
model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import types
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pulse_railway import runtime_image

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")
sqlite_store: Any = runtime_image.load("sqlite_store")

PARSER = control.control_parser()
DAY = 86_400.0
KILL = st.sampled_from([False, False, False, True])
EXAMPLES = int(os.environ.get("PULSE_EXAMPLES", "150"))


class Killed(BaseException):
    """The process has ended here."""


class Clock:
    """In place of `time` in the three scripts."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        self.now += 0.001  # no two moments are the same
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __getattr__(self, name: str) -> Any:
        import time

        return getattr(time, name)


class Store(sqlite_store.SqliteStore):  # type: ignore[misc]
    """A store whose writers can be killed before their next step."""

    def __init__(self) -> None:
        super().__init__(":memory:", "p")
        self.steps_left: int | None = None

    def apply(self, step: Any) -> Any:
        self.count()
        return super().apply(step)

    def count(self) -> None:
        if self.steps_left is not None:
            if self.steps_left == 0:
                raise Killed
            self.steps_left -= 1

    def put(self, key: str, value: str | None) -> None:
        """A foreign writer's: one key, no transaction, no mark."""
        if value is None:
            self.db.execute("DELETE FROM pulse_kv WHERE key = ?", (f"p{key}",))
        else:
            self.db.execute(
                "INSERT OR REPLACE INTO pulse_kv (key, value) VALUES (?, ?)", (f"p{key}", value)
            )

    @property
    def rows(self) -> list[Any]:
        found: list[Any] = self.db.execute("SELECT key, value FROM pulse_kv").fetchall()
        return found

    @rows.setter
    def rows(self, rows: list[Any]) -> None:
        self.db.execute("DELETE FROM pulse_kv")
        self.db.executemany("INSERT INTO pulse_kv (key, value) VALUES (?, ?)", rows)

    @contextlib.contextmanager
    def killed_after(self, steps: int | None) -> Iterator[None]:
        self.steps_left = steps
        try:
            with contextlib.suppress(Killed):
                yield
        finally:
            self.steps_left = None


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        self.store = Store()
        self.services: dict[str, str] = {}  # deployment -> Railway's id of its service
        self.created: dict[str, float] = {}
        self.tabs: dict[str, int | None] = {}  # None: it does not answer
        self.last_promoted: Any = None  # what was promoted last, as Railway says
        self.known = router.Routing()  # what a router holds
        self.snapshot: list[Any] | None = None
        self.drains: dict[str, float] = {}
        self.foreign: set[str] = set()  # whose record has a field that is not ours
        self.number = 0
        self.holder: tuple[str, float] | None = None
        for module in (router, control, janitor, sqlite_store):
            self.patch.setattr(module, "time", self.clock)
        self.patch.setattr(control, "HEAL_WAIT", 0.0)
        self.patch.setattr(control, "sessions", lambda record, _: self.tabs[record.deployment_id])
        self.patch.setattr(control, "reload_tabs", lambda *_: 0)
        self.patch.setattr(
            router,
            "look",
            lambda record: "answers" if self.answers(record.deployment_id) else "unreachable",
        )

    def teardown(self) -> None:
        try:
            self.everything_ends()
        finally:
            self.patch.undo()

    # -- what is there -------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        return self.store.read()

    @property
    def active(self) -> str | None:
        return self.state.active  # type: ignore[no-any-return]

    def records(self) -> dict[str, Any]:
        return dict(self.state.records)

    def answers(self, name: str) -> bool:
        return name in self.services and self.tabs.get(name) is not None

    def some(self, pick: int) -> str:
        """One of the deployments, or one that was never there."""
        names = sorted({*self.services, *self.records(), "never"})
        return names[pick % len(names)]

    def control(self, *words: str, kill: bool = False) -> bool:
        """A control command, as control.py runs it, retried with its nonce; True: it was done."""
        nonce = f"n{self.number}"
        self.number += 1
        arguments = [*words, "--nonce", nonce, "--by", "test"]
        args = PARSER.parse_args(arguments)
        args.promoted = self.last_promoted
        done = False
        for _ in range(2):  # the first answer was lost
            with self.store.killed_after(0 if kill else None):
                try:
                    control.change_state(self.store, args)
                    done = True
                except control.StateError:
                    done = False
            if kill:
                return False
        return done

    # -- ours ----------------------------------------------------------------------------------

    @initialize()
    def first(self) -> None:
        self.deploy(held=False)
        self.promote(pick=0, kill=False)

    @rule(held=st.booleans())
    def deploy(self, held: bool) -> None:
        """As far as the registration; a foreign tool adds a field of its own."""
        name = f"d{len(self.created)}"
        self.services[name], self.created[name] = f"s-{name}", self.clock.time()
        self.tabs[name] = 0
        words = ["--deployment-id", name, "--service-name", name, "--service-id", f"s-{name}"]
        if self.control("register", *words, *(["--hold"] if held else [])):
            record = self.records()[name].json() | {"x-foreign": name}
            self.store.put(f":deployment:{name}", json.dumps(record))
            self.foreign.add(name)

    @rule(pick=st.integers(0, 50), kill=KILL, move=st.sampled_from([None, 0, 3600]))
    def promote(self, pick: int, kill: bool, move: int | None = None) -> None:
        name, before, active = self.some(pick), self.records(), self.active
        if name in before and name not in self.services:
            return  # the verb asks Railway for its service first
        words = ["--active-deployment-id", name, "--active-service-name", name]
        words += [] if move is None else ["--move-after", str(move), "--move-idle", "600"]
        if self.control("promote", *words, kill=kill):
            assert self.active == name
            if active not in (None, name):
                former = self.records()[str(active)]
                after = None if move is None else former.drain_started_at + move
                assert former.moving_at == after
                assert former.move_idle == (None if move is None else 600)
            self.last_promoted = self.state.promoted
            self.pending_ones_stay(before, name, active)

    def pending_ones_stay(self, before: Any, promoted: str, active: str | None) -> None:
        for name, record in self.records().items():
            if name not in (promoted, active) and name in before:
                assert record.state == before[name].state
                assert record.weight is None

    @rule(pick=st.integers(0, 50), weight=st.integers(0, 100), kill=KILL)
    def set_canary_weight(self, pick: int, weight: int, kill: bool) -> None:
        active = self.active
        names = sorted(self.services.keys() - {active}) or ["never"]
        name = names[pick % len(names)]
        words = ["--active-deployment-id", name, "--active-service-name", name]
        if self.control("promote", *words, "--weight", str(weight), "--bake", "60", kill=kill):
            assert self.state.canary.deployment_id == name
        assert self.active == active

    @rule(kill=KILL)
    def rollback(self, kill: bool) -> None:
        """As the verb does: it ends the canary, or chooses what drained last."""
        state = self.state
        if state.canary:
            name = state.canary.deployment_id
            if self.control("withdraw", "--deployment-id", name, kill=kill):
                assert self.records()[name].state == "draining"
            return
        found = [
            r
            for r in state.records.values()
            if r.state == "draining"
            and not (r.retiring_at or r.rejected_at)
            and r.deployment_id in self.services
        ]
        if not found or not self.active:
            return
        found.sort(key=lambda r: -(r.drain_started_at or 0.0))
        name, left = found[0].deployment_id, self.active
        words = ["--active-deployment-id", name, "--active-service-name", name]
        if self.control("promote", *words, "--instead-of", left, "--rolls-back", kill=kill):
            self.last_promoted = self.state.promoted
            assert left == name or self.records()[left].rejected_at

    @rule(pick=st.integers(0, 50))
    def the_wrong_one_is_active(self, pick: int) -> None:
        name = self.some(pick)
        if name != self.active:
            words = ["--active-deployment-id", name, "--active-service-name", name]
            assert not self.control("promote", *words, "--instead-of", "other")

    @rule(pick=st.integers(0, 50), steps=st.integers(0, 3))
    def delete(self, pick: int, steps: int) -> None:
        """`delete`, killed after so many of its three steps."""
        name = self.some(pick)
        given = ["--deployment-id", name]
        service = ["--service-id", self.services[name]] if name in self.services else []
        active = self.active
        if steps < 1 or not self.control("retire", *given, *service):
            return
        assert name != active
        if steps > 1:
            self.services.pop(name, None)
        if steps > 2:
            assert self.control("delete", *given)

    @rule(who=st.sampled_from("ab"), lease=st.integers(1, 400))
    def lock(self, who: str, lease: int) -> None:
        held = self.holder if self.holder and self.holder[1] > self.clock.now else None
        ended = who in control.ended_runs(self.state)
        done = self.control("lock", "--holder", who, "--lease", str(lease))
        assert done == (not ended and (held is None or held[0] == who))
        if done:
            self.holder = who, self.clock.now + lease

    @rule(who=st.sampled_from("ab"))
    def unlock(self, who: str) -> None:
        self.control("unlock", "--holder", who)
        assert who in control.ended_runs(self.state)
        if self.holder and self.holder[0] == who:
            self.holder = None

    # -- Railway, tabs, time -------------------------------------------------------------------

    @rule(pick=st.integers(0, 50), count=st.sampled_from([0, 0, 1, 7, None]))
    def tabs_come_and_go(self, pick: int, count: int | None) -> None:
        self.tabs[self.some(pick)] = count

    @rule(seconds=st.sampled_from([1.0, 61.0, 901.0, 3700.0, DAY]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(steps=st.none() | st.integers(0, 6), keep=st.integers(0, 2))
    def janitor_runs(self, steps: int | None, keep: int) -> None:
        self.run_janitor(steps, keep)

    def run_janitor(self, steps: int | None = None, keep: int = 0) -> Any:
        state, before = self.state, self.active
        found = [
            janitor.Backend(
                *(sid, name, name, self.clock.now - self.created[name]),
                status="SUCCESS" if self.answers(name) else None,
                ours=True,
            )
            for name, sid in self.services.items()
        ]
        inventory = janitor.Inventory(found, "router", self.last_promoted)
        mended = state.promotion != self.last_promoted
        report = None

        def delete(service: Any) -> None:
            self.store.count()
            record = self.records().get(service.deployment)
            assert service.deployment != self.active, "the active one's service"
            assert record is None or record.retiring_at, "not retired"
            assert not mended or self.last_promoted.deployment_id == before, (
                "what was active is mended"
            )
            del self.services[service.deployment]

        def set_variables(_: str, values: dict[str, str]) -> None:
            self.last_promoted = router.promotion_from_env(values)

        railway = types.SimpleNamespace(delete=delete, set_variables=set_variables)
        limits = janitor.Retention(DAY, 900.0, keep)
        with self.store.killed_after(steps), contextlib.suppress(janitor.Contradiction):
            report = janitor.clean_up(self.store, railway, state, inventory, "", limits)
        assert report is None or not report.failed
        assert before is None or self.active == before
        return report

    # -- loss ----------------------------------------------------------------------------------

    @rule()
    def a_router_looks(self) -> None:
        """As router.py does: what is lost is written back first."""
        active, known = self.active, self.known
        if known.active and active not in (None, known.active) and not self.answers(known.active):
            known = dataclasses.replace(known, active=None, promoted=None)
        self.store.apply(lambda state: router.repaired(state, known, "id", ()))
        self.known = self.state
        self.lock_is_lost_or_found()

    def lock_is_lost_or_found(self) -> None:
        lock = self.state.lock
        self.holder = (lock.holder, lock.until) if lock else None

    def known_is_right(self) -> bool:
        return bool(
            self.known.active and self.known == self.state and self.answers(self.known.active)
        )

    @rule()
    def a_snapshot_is_taken(self) -> None:
        self.snapshot = self.store.rows

    @precondition(lambda self: self.snapshot is not None and self.known_is_right())
    @rule()
    def an_older_snapshot_comes_back(self) -> None:
        """Under a router that has seen what came after it."""
        before = self.records()
        self.store.rows = self.snapshot or []
        self.a_router_looks()
        assert self.state.promotion == self.known.promotion
        assert self.active == self.known.active
        back = {name for name, r in self.records().items() if not r.retiring_at} - set(before)
        assert back <= set(self.services), "what was removed is back"

    @precondition(lambda self: self.known_is_right())
    @rule(by_router=st.booleans())
    def redis_forgets(self, by_router: bool) -> None:
        """All is lost, and comes back from a router, or from what Railway says."""
        active = self.active
        self.store.rows = []
        assert not self.control("delete", "--deployment-id", "never") or not self.last_promoted
        if by_router:
            self.a_router_looks()
            assert self.active == active
        else:
            self.run_janitor()
            self.foreign.clear()
            if self.last_promoted.deployment_id in self.services:
                assert self.active == self.last_promoted.deployment_id
        self.drains.clear()
        self.lock_is_lost_or_found()

    # -- 0.3.x ---------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 50), writes=st.integers(1, 3))
    def an_old_writer_promotes(self, pick: int, writes: int) -> None:
        """Key by key, and cut off after some; fields that it does not know are gone."""
        name, before = self.some(pick), self.records()
        record = before.get(name)
        if name not in self.services or record is None or record.retiring_at:
            return
        old = self.active

        def plain(which: str, state: str, since: float | None) -> str:
            there = which in before and "x-foreign" in before[which].raw
            kept = {"x-foreign": which} if there else {}
            fields = {"state": state, "service_name": which, "drain_started_at": since}
            return json.dumps({**kept, "deployment_id": which, **fields})

        steps: list[tuple[str, str]] = [(f":deployment:{name}", plain(name, "active", None))]
        if old and old != name:
            since = self.clock.time()
            steps.append((f":deployment:{old}", plain(old, "draining", since)))
        steps.insert(0, (":active", name))
        for key, value in steps[:writes]:
            self.store.put(key, value)
        self.drains.clear()

    # -- what has to hold ----------------------------------------------------------------------

    @invariant()
    def only_what_drains_moves(self) -> None:
        for record in self.records().values():
            assert record.moving_at is None or record.state == "draining"
            assert record.move_idle is None or record.moving_at is not None

    @invariant()
    def the_active_one_runs(self) -> None:
        if active := self.active:
            assert active in self.services
            record = self.records().get(active)
            assert record is None or not record.retiring_at

    @invariant()
    def nothing_is_left_to_change(self) -> None:
        """What was read and is written back as it is changes nothing."""
        state = self.state
        assert router.changes(state, state) == {}
        assert state.problems == ()

    @invariant()
    def one_canary_at_most(self) -> None:
        canaries = [name for name, r in self.records().items() if r.is_canary]
        assert len([name for name in canaries if name != self.active]) <= 1

    @invariant()
    def a_drain_keeps_its_beginning(self) -> None:
        now = {
            name: r.drain_started_at
            for name, r in self.records().items()
            if r.state == "draining" and r.drain_started_at and name != self.active
        }
        for name, since in now.items():
            assert self.drains.get(name, since) == since, name
        self.drains = now

    @invariant()
    def unknown_fields_are_kept(self) -> None:
        for name, record in self.records().items():
            assert name not in self.foreign or record.raw["x-foreign"] == name

    @invariant()
    def the_history_is_readable(self) -> None:
        for entry in self.state.history:
            assert entry["what"]
            assert entry["at"] <= self.clock.now

    def everything_ends(self) -> None:
        """Two days later, everybody gone: the janitor has removed all but what is to stay, and
        nothing is left that no run would come to."""
        for name in {*self.services, *self.records()}:
            self.tabs[name] = 0
        for name, record in self.records().items():
            if record.state == "pending" and name != self.active:
                self.tabs[name] = None  # its process has ended
        for _ in range(4):
            self.clock.now += 2 * DAY
            self.run_janitor()
        state, records = self.state, self.records()
        strays = {n for n, r in records.items() if r.state == "active"} - {self.active}
        assert not strays
        promoted = {e["deployment_id"] for e in state.history if e["what"] != "remove"}
        for name in self.services:
            record = records.get(name)
            stays = record and (record.pinned or record.promoted_at or name in promoted)
            assert name == self.active or stays or not self.active, (name, record)
        if self.active:
            assert set(records) == set(self.services)


Life.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase
