"""The routing state under everything that changes it, in any order, cut off anywhere.

Ours (deploy, promote, canary, rollback, delete, lock, restore, janitor runs) and 0.3.x's writers,
which write keys one by one. The steps are control.py's and janitor.py's own, on a store of
router.py's; the clock, Railway's services and how many sessions a backend has are the model's.
"""

from __future__ import annotations

import contextlib
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


class Store(router.LocalStore):  # type: ignore[misc]
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
        self.tabs: dict[str, int | None] = {}
        self.intent: str | None = None
        self.known: dict[str, str] = {}  # what a router holds
        self.drains: dict[str, float] = {}
        self.foreign: set[str] = set()  # whose record has a field that is not ours
        self.number = 0
        self.holder: tuple[str, float] | None = None
        for module in (router, control, janitor):
            self.patch.setattr(module, "time", self.clock)
        self.patch.setattr(router, "HEAL_WAIT", 0.0)
        self.patch.setattr(router, "sessions", lambda record, _: self.tabs[record["deployment_id"]])
        self.patch.setattr(control, "reload_tabs", lambda *_: 0)

    def teardown(self) -> None:
        try:
            self.everything_ends()
        finally:
            self.patch.undo()

    # -- what is there -------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, str]:
        return self.store.read()  # type: ignore[no-any-return]

    @property
    def active(self) -> str | None:
        return self.state.get(":active")

    def records(self) -> dict[str, dict[str, Any]]:
        return {r["deployment_id"]: r for r in router.records(self.state)}

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
        args.intent = self.intent
        done = False
        for _ in range(2):  # the first answer was lost
            with self.store.killed_after(0 if kill else None):
                try:
                    control.change_state(self.store, args)
                    done = True
                except router.StateError:
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
            record = json.loads(self.state[f":deployment:{name}"]) | {"x-foreign": name}
            self.store.put(f":deployment:{name}", json.dumps(record))
            self.foreign.add(name)

    @rule(pick=st.integers(0, 50), kill=KILL)
    def promote(self, pick: int, kill: bool) -> None:
        name, before, active = self.some(pick), self.records(), self.active
        if name in before and name not in self.services:
            return  # the verb asks Railway for its service first
        words = ["--active-deployment-id", name, "--active-service-name", name]
        if self.control("promote", *words, kill=kill):
            assert self.active == name
            self.intent = name
            self.pending_ones_stay(before, name, active)

    def pending_ones_stay(self, before: Any, promoted: str, active: str | None) -> None:
        for name, record in self.records().items():
            if name not in (promoted, active) and name in before:
                assert record["state"] == before[name]["state"]
                assert "weight" not in record

    @rule(pick=st.integers(0, 50), weight=st.integers(0, 100), kill=KILL)
    def weigh(self, pick: int, weight: int, kill: bool) -> None:
        active = self.active
        names = sorted(self.services.keys() - {active}) or ["never"]
        name = names[pick % len(names)]
        words = ["--active-deployment-id", name, "--active-service-name", name]
        if self.control("promote", *words, "--weight", str(weight), "--bake", "60", kill=kill):
            assert router.canary(self.state)["deployment_id"] == name
        assert self.active == active

    @rule(kill=KILL)
    def rollback(self, kill: bool) -> None:
        """As the verb does: it ends the canary, or chooses what drained last."""
        state = self.state
        if canary := router.canary(state):
            name = canary["deployment_id"]
            if self.control("withdraw", "--deployment-id", name, kill=kill):
                assert self.records()[name]["state"] == "draining"
            return
        found = [
            r
            for r in router.records(state)
            if r.get("state") == "draining"
            and not (r.get("retiring_at") or r.get("rejected_at"))
            and r["deployment_id"] in self.services
        ]
        if not found or not self.active:
            return
        found.sort(key=lambda r: -float(r.get("drain_started_at") or 0))
        name, left = found[0]["deployment_id"], self.active
        words = ["--active-deployment-id", name, "--active-service-name", name]
        if self.control("promote", *words, "--instead-of", left, "--rolls-back", kill=kill):
            self.intent = name
            assert left == name or self.records()[left]["rejected_at"]

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
        done = self.control("lock", "--holder", who, "--lease", str(lease))
        assert done == (held is None or held[0] == who)
        if done:
            self.holder = who, self.clock.now + lease

    @rule(who=st.sampled_from("ab"))
    def unlock(self, who: str) -> None:
        self.control("unlock", "--holder", who)
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
            janitor.Service(sid, name, name, self.clock.now - self.created[name])
            for name, sid in self.services.items()
        ]
        seen = janitor.Seen(found, "router", self.intent)
        report = None

        def delete(service: Any) -> None:
            self.store.count()
            record = self.records().get(service.deployment)
            assert service.deployment != self.active, "the active one's service"
            assert record is None or record.get("retiring_at"), "not claimed"
            del self.services[service.deployment]

        def remember(_: str, __: str, value: str) -> None:
            self.intent = value

        railway = types.SimpleNamespace(delete=delete, remember=remember)
        limits = janitor.Limits(DAY, 900.0, keep)
        with self.store.killed_after(steps), contextlib.suppress(janitor.Refused):
            report = janitor.sweep(self.store, railway, state, seen, "", limits)
        assert before is None or self.active == before
        return report

    # -- loss ----------------------------------------------------------------------------------

    @rule()
    def a_router_looks(self) -> None:
        if self.active:
            self.known = self.state

    @precondition(lambda self: self.known.get(":active") == self.active)
    @rule(by_router=st.booleans())
    def redis_forgets(self, by_router: bool) -> None:
        """All is lost, and comes back from a router, or from what Railway says."""
        active = self.active
        held = self.state.get(router.LOCK)
        self.store.db.execute("DELETE FROM pulse_kv")
        assert not self.control("delete", "--deployment-id", "never") or not self.intent
        if by_router:
            self.store.apply(lambda state: router.heal(state, self.known))
            self.drains.clear()
            self.foreign &= set(self.records())
        else:
            self.run_janitor()
            self.drains.clear()
            self.foreign.clear()
        if self.services and self.intent in self.services:
            assert self.active == (active if by_router else self.intent)
        if held != self.state.get(router.LOCK):
            self.holder = None
            self.store.put(router.LOCK, None)

    # -- 0.3.x ---------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 50), writes=st.integers(1, 3))
    def an_old_writer_promotes(self, pick: int, writes: int) -> None:
        """Key by key, and cut off after some; fields that it does not know are gone."""
        name, before = self.some(pick), self.records()
        record = before.get(name)
        if name not in self.services or record is None or record.get("retiring_at"):
            return
        old = self.active

        def plain(which: str, state: str, since: float | None) -> str:
            kept = {"x-foreign": which} if "x-foreign" in before.get(which, {}) else {}
            fields = {"state": state, "service_name": which, "drain_started_at": since}
            return json.dumps({**kept, "deployment_id": which, **fields})

        steps: list[tuple[str, str]] = [(f":deployment:{name}", plain(name, "active", None))]
        if old and old != name:
            since = self.clock.time()
            steps.append((f":deployment:{old}", plain(old, "draining", since)))
        steps.insert(0, (":active", name))
        for key, value in steps[:writes]:
            self.store.put(key, value)
        self.intent = name
        self.drains.clear()

    # -- what has to hold ----------------------------------------------------------------------

    @invariant()
    def the_active_one_runs(self) -> None:
        if active := self.active:
            assert active in self.services
            assert not self.records().get(active, {}).get("retiring_at")

    @invariant()
    def one_canary_at_most(self) -> None:
        weighed = [
            r
            for r in self.records().values()
            if "weight" in r and r["state"] == "pending" and not r.get("retiring_at")
        ]
        assert len(weighed) <= 1

    @invariant()
    def a_drain_keeps_its_beginning(self) -> None:
        now = {
            name: r["drain_started_at"]
            for name, r in self.records().items()
            if r["state"] == "draining" and r.get("drain_started_at") and name != self.active
        }
        for name, since in now.items():
            assert self.drains.get(name, since) == since, name
        self.drains = now

    @invariant()
    def unknown_fields_are_kept(self) -> None:
        for name, record in self.records().items():
            assert name not in self.foreign or record["x-foreign"] == name

    @invariant()
    def the_history_is_readable(self) -> None:
        for entry in router.history(self.state):
            assert entry["what"]
            assert entry["at"] <= self.clock.now

    def everything_ends(self) -> None:
        """Two days later, everybody gone: the janitor has removed all but what is to stay, and
        nothing is left that no run would come to."""
        for name in {*self.services, *self.records()}:
            self.tabs[name] = 0
        for _ in range(4):
            self.clock.now += 2 * DAY
            self.run_janitor()
        records = self.records()
        strays = {n for n, r in records.items() if r["state"] == "active"} - {self.active}
        assert not strays
        for name in self.services:
            stays = name == self.active or records[name].get("held")
            assert stays or not self.active, (name, records.get(name))
        if self.active:
            assert set(records) == set(self.services)


Life.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase
