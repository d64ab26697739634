"""The routing state as types: what is read, what is written, and which of two memories is right."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pulse_railway import runtime_image

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")

NOW = 1_800_000_000.0
OLD = {"deployment_id": "a", "state": "active", "service_name": "a", "drain_started_at": None}


def parse(state: dict[str, Any], now: float = NOW) -> Any:
    """From keys to values, where what is no string is written as JSON."""
    return router.parse(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in state.items()}, now
    )


def record(**fields: Any) -> Any:
    return router.parse_record("a", json.dumps({"deployment_id": "a", **fields}))


# -- whose it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "owner"),
    [
        ("e/r", "e/r"),
        ("5b1f-0a/7c_2", "5b1f-0a/7c_2"),
        ("", None),
        ("e", None),
        ("e/r/x", None),
        ("e/r\n", None),
        ("e/" + "r" * 65, None),
        ("${{env.STACK}}", None),
        ('{"owner": "e/r"}', None),
    ],
)
def test_an_owner(stored: str, owner: str | None) -> None:
    found = parse({":owner": stored})
    assert found.owner == owner
    assert found.problems == (() if owner else (":owner is not understood",))


def test_an_owner_is_written_and_comes_back() -> None:
    empty = parse({})
    assert router.changes(empty, replace(empty, owner="e/r")) == {":owner": "e/r", ":epoch": "1"}
    state = {":active": "a", ":deployment:a": OLD, ":store": "s", ":epoch": "5"}
    known = parse({**state, ":owner": "e/r"})
    assert router.repaired(parse(state), known, "new").owner == "e/r"
    assert router.repaired(parse({}), known, "new").owner == "e/r"
    for lost in ({}, {":store": "s", ":epoch": "4"}, {":store": "t", ":active": "b"}):
        other = parse({**lost, ":owner": "e/other"})
        found = router.repaired(other, known, "new")
        assert (found.owner, found.active, found.records) == (
            "e/other",
            other.active,
            other.records,
        )


# -- reading a record ----------------------------------------------------------------------------

ADDRESS = "http://a.railway.internal:8000"


@pytest.mark.parametrize(
    ("field", "stored", "value"),
    [
        ("state", "draining", "draining"),
        ("state", "resting", "resting"),
        ("service_name", "prod-a", "prod-a"),
        ("address", ADDRESS, ADDRESS),
        ("address", ADDRESS + "/", ADDRESS),
        ("address", "http://[fd12::1]:8000", "http://[fd12::1]:8000"),
        ("service_id", "5b1f", "5b1f"),
        ("registered_at", 5, 5.0),
        ("promoted_at", 5.5, 5.5),
        ("drain_started_at", 0, 0.0),
        ("rejected_at", NOW, NOW),
        ("retiring_at", NOW, NOW),
        ("moving_at", NOW + 5, NOW + 5),
        ("move_idle", 600, 600.0),
        ("held", True, True),
        ("held", False, False),
        ("weight", 0, 0.0),
        ("weight", 12.5, 12.5),
        ("weight", 100, 100.0),
        ("bake", {"until": NOW, "x": 1}, router.Bake(NOW)),
        (
            "bake",
            {"until": NOW, "since": 5, "old": "b", "latency_ms": 300},
            router.Bake(NOW, 5.0, "b", 300.0),
        ),
        ("about", {"commit": "1a2b"}, {"commit": "1a2b"}),
        ("instances", {"2": {"address": ADDRESS}}, {"2": {"address": ADDRESS}}),
    ],
)
def test_a_field_of_a_record(field: str, stored: object, value: object) -> None:
    found = record(**{field: stored})
    assert (getattr(found, router.FIELDS[field].name), found.ignored) == (value, ())


@pytest.mark.parametrize(
    ("field", "stored"),
    [
        ("state", 7),
        ("state", ""),
        ("state", ["active"]),
        ("service_name", "two\nlines"),
        ("service_name", "x" * 513),
        ("service_id", {}),
        ("address", 8000),
        ("address", "a.railway.internal:8000"),
        ("address", "https://a.railway.internal"),
        ("address", "http://:8000"),
        ("address", "http://a:0"),
        ("address", "http://a:99999"),
        ("address", "http://[::1"),
        ("registered_at", "2026-01-01"),
        ("registered_at", True),
        ("registered_at", -1),
        ("registered_at", math.nan),
        ("registered_at", math.inf),
        ("registered_at", 10**400),
        ("promoted_at", "5"),
        ("drain_started_at", [5]),
        ("rejected_at", 1e12),
        ("retiring_at", "soon"),
        ("moving_at", "soon"),
        ("move_idle", "soon"),
        ("move_idle", -1),
        ("move_idle", 86_401),
        ("held", "yes"),
        ("held", 1),
        ("weight", 101),
        ("weight", -1),
        ("weight", "10"),
        ("bake", 5),
        ("bake", {"until": "later"}),
        ("bake", {}),
        ("bake", {"until": 5, "since": -1}),
        ("bake", {"until": 5, "old": 7}),
        ("bake", {"until": 5, "latency_ms": "300"}),
        ("about", "me"),
        ("instances", [1]),
    ],
)
def test_a_field_that_holds_what_it_may_not(field: str, stored: object) -> None:
    """It is ignored, named, and kept as it is when another is written."""
    found = record(**{field: stored, "x-foreign": 1})
    assert found.ignored == (field,)
    assert getattr(found, router.FIELDS[field].name) == getattr(
        router.Record("a"), router.FIELDS[field].name
    )
    routing = parse({":deployment:a": found.raw})
    assert routing.problems[0] == f"a: {field} not understood"
    (text,) = (
        value
        for key, value in router.changes(
            routing, control.with_records(routing, replace(found, rejected_at=NOW, weight=None))
        ).items()
        if key == ":deployment:a"
    )
    written = json.loads(text)
    if field != "rejected_at":
        assert json.dumps(written[field]) == json.dumps(stored)
    assert (written["x-foreign"], written["rejected_at"]) == (1, NOW)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"a"', "7", "[" * 99_999, "\ud800"])
def test_a_record_that_is_none(text: str) -> None:
    """The active one is on the service that is named after it; another has no address."""
    routing = router.parse({":active": "a", ":deployment:a": text, ":deployment:b": text}, NOW)
    assert set(routing.records) == {"a", "b"}
    expected = ("record",) if text else ()
    assert routing.records["a"].ignored == expected
    assert routing.record_of_active().url == ADDRESS
    assert routing.records["b"].url is None


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"service_name": "prod-a"}, "http://prod-a.railway.internal:8000"),  # 0.3.x
        ({"service_name": "prod-a", "address": "http://10.0.0.1:80"}, "http://10.0.0.1:80"),
        ({"service_name": "prod-a", "address": 7}, "http://prod-a.railway.internal:8000"),
        ({"service_name": "no host"}, None),
        ({"service_name": "a/../b"}, None),
        ({}, None),
    ],
)
def test_where_a_deployment_is(fields: dict[str, Any], url: str | None) -> None:
    assert record(**fields).url == url
    routing = parse({":active": "a", ":deployment:a": {"deployment_id": "a", **fields}})
    assert routing.record_of_active().url == (url or ADDRESS)


# -- reading the other keys ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "stored", "attribute", "value"),
    [
        (":active", "a", "active", "a"),
        (":active", "", "active", None),
        (
            ":promoted",
            {"deployment_id": "a", "at": 5},
            "promoted",
            router.Promotion("a", 5.0),
        ),
        (":epoch", "17", "epoch", 17),
        (":store", "f00", "store_id", "f00"),
        (
            ":removed",
            {"b": {"at": 5, "service_id": "s"}, "c": {"at": 6}, "d": 7, "e": {"at": "x"}},
            "tombstones",
            {"b": router.Tombstone(5.0, "s"), "c": router.Tombstone(6.0)},
        ),
        (":answers", {"n1": {"at": 5}, "n2": {}}, "processed", {"n1": 5.0}),
        (
            ":history",
            [{"at": 5, "what": "promote"}, {"at": "x", "what": "y"}, {"what": "z"}, 7],
            "history",
            ({"at": 5, "what": "promote"},),
        ),
        (
            ":maintenance",
            {"since": 5, "page": "<p>", "retry_after": 7, "by": "ada"},
            "maintenance",
            router.Maintenance(5.0, "<p>", 7, "ada"),
        ),
        (
            ":maintenance",
            {"since": 5, "page": 9, "retry_after": "soon", "by": []},
            "maintenance",
            router.Maintenance(5.0),
        ),
        (":maintenance", {"since": 10**400}, "maintenance", router.Maintenance(0.0)),
        (
            ":deploy:lock",
            {"holder": "h", "by": "ada", "since": 5, "until": 6},
            "lock",
            router.DeployLock("h", "ada", 5.0, 6.0),
        ),
    ],
)
def test_a_key(key: str, stored: Any, attribute: str, value: object) -> None:
    routing = parse({key: stored})
    assert getattr(routing, attribute) == value
    assert routing.problems == ()


@pytest.mark.parametrize(
    ("key", "stored", "attribute", "value"),
    [
        (":active", "No Id", "active", None),
        (":active", "x" * 25, "active", None),
        (":promoted", "junk", "promoted", None),
        (":promoted", {"deployment_id": "a"}, "promoted", None),
        (":promoted", {"deployment_id": 7, "at": 5}, "promoted", None),
        (":promoted", {"deployment_id": "a", "at": "then"}, "promoted", None),
        (":epoch", "junk", "epoch", 0),
        (":epoch", "-1", "epoch", 0),
        (":epoch", "9" * 400, "epoch", 0),
        (":epoch", "\u0661", "epoch", 0),
        (":removed", "[]", "tombstones", {}),
        (":answers", "7", "processed", {}),
        (":history", "{}", "history", ()),
        (":history", "[" * 99_999, "history", ()),
        (":maintenance", "junk", "maintenance", router.Maintenance(NOW)),  # it is closed
        (":deploy:lock", {"holder": "h"}, "lock", None),
    ],
)
def test_a_key_that_holds_what_it_may_not(
    key: str, stored: Any, attribute: str, value: object
) -> None:
    """It is ignored and named, all else is read, and a step leaves it as it is."""
    routing = parse({key: stored, ":deployment:b": OLD | {"deployment_id": "b"}})
    assert getattr(routing, attribute) == value
    assert [problem for problem in routing.problems if problem.startswith(key)]
    assert routing.records["b"].service_name == "a"
    step = control.add_record(routing, "c", "c", service_id="s")
    assert key not in router.changes(routing, step) or key == router.EPOCH


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from([*router.FIELDS, "deployment_id", "at", "since", "holder", "until", "what"])
TEXT = st.text(max_size=20) | st.one_of(
    JSON, st.dictionaries(FIELD, JSON), st.lists(st.dictionaries(FIELD, JSON), max_size=2)
).map(json.dumps)
KEYS = st.sampled_from([*router.FIXED, ":deployment:a", ":deployment:b", ":deployment:", ":x"])


@given(st.dictionaries(KEYS, TEXT))
@settings(max_examples=400, deadline=None)
def test_nothing_that_is_stored_stops_a_router(state: dict[str, str]) -> None:
    routing = router.parse(state, NOW)
    assert router.changes(routing, routing) == {}
    buried = control.add_tombstone(routing, "z", None)
    again = router.parse({**state, **written(routing, buried)}, NOW)
    assert again.tombstones["z"]
    table = router.Table({})
    table.load(routing)
    known = parse({":active": "k", ":store": "s", ":deployment:k": OLD | {"deployment_id": "k"}})
    for one, other in ((routing, known), (known, routing)):
        mended = router.repaired(one, other, "new")
        assert router.changes(mended, router.repaired(mended, other, "new")) == {}


def written(old: Any, new: Any) -> dict[str, str]:
    return {k: v for k, v in router.changes(old, new).items() if v is not None}


# -- writing -------------------------------------------------------------------------------------


def test_the_shape_of_0_3_x() -> None:
    """A record has its four fields, also where they say nothing, and no more than it needs."""
    assert router.Record("a").json() == {
        "deployment_id": "a",
        "state": "pending",
        "service_name": "a",
        "drain_started_at": None,
    }
    assert record(**OLD).json() == OLD
    canary = router.Record(
        "a", "pending", "s", weight=0.0, bake=router.Bake(5.0), pinned=True
    ).json()
    assert (canary["weight"], canary["bake"], canary["held"]) == (0.0, {"until": 5.0}, True)


def test_fields_and_keys_that_we_do_not_know_are_kept() -> None:
    foreign = {"x-list": [1, {"y": None}], "x-text": "\u2028\U0001f600", "x-null": None}
    routing = parse({":active": "a", ":deployment:a": OLD | foreign, ":x": "1"})
    change = router.changes(routing, control.set_maintenance(routing, None, 30, None))
    assert set(change) == {":maintenance", ":store", ":epoch", ":promoted"}
    drained = routing.records["a"].as_draining(NOW)
    text = router.changes(routing, control.with_records(routing, drained))[":deployment:a"]
    expected = OLD | foreign | {"state": "draining", "drain_started_at": NOW}
    assert json.loads(text) == expected


def test_what_is_not_set_any_more_is_not_written() -> None:
    stored = OLD | {"state": "pending", "weight": 10, "bake": {"until": 5}, "held": True}
    found = control.abort_canary(parse({":deployment:a": stored}), "a").records["a"].json()
    assert found == OLD | {"state": "draining", "drain_started_at": NOW, "rejected_at": NOW}


# -- moves ---------------------------------------------------------------------------------------


def test_a_deployment_that_begins_to_drain_moves_when_it_was_asked() -> None:
    state = parse(STATE)
    assert control.set_active(state, "b", "b", []).records["a"].moving_at is None
    assert control.set_active(state, "b", "b", [], move_after=0).records["a"].moving_at == NOW
    moved = control.set_active(state, "b", "b", [], move_after=60)
    assert moved.records["a"].moving_at == NOW + 60
    assert moved.records["b"].moving_at is None
    canary = control.set_canary_weight(state, "c", "c", 10)
    assert control.abort_canary(canary, "c").records["c"].moving_at is None
    assert control.abort_canary(canary, "c", 5).records["c"].moving_at == NOW + 5
    assert control.abort_canary(canary, "c", 5, 600).records["c"].move_idle == 600
    both = control.set_active(state, "b", "b", [], move_after=60, move_idle=600).records["a"]
    assert (both.moving_at, both.move_idle) == (NOW + 60, 600)


def test_a_deployment_that_ends_draining_moves_nobody() -> None:
    drained = control.set_active(parse(STATE), "b", "b", [], move_after=60, move_idle=600)
    running = [router.Record(name, service_name=name) for name in "ab"]
    for after in (
        control.set_active(drained, "a", "a", []),
        control.set_canary_weight(drained, "a", "a", 10),
        control.add_record(drained, "a", "a"),
        control.rebuild_records(drained, running, "a", chosen=True),
        control.set_active(control.set_active(drained, "a", "a", []), "b", "b", []),
    ):
        assert after.records["a"].moving_at is None
        assert not {"moving_at", "move_idle"} & set(after.records["a"].json())


def test_a_move_is_restored_with_its_state_only() -> None:
    """A drain by 0.3.x after ours moves nobody."""
    known = control.set_active(parse(STATE), "b", "b", [], move_after=60)
    lost = control.with_records(known, replace(known.records["a"], moving_at=None))
    assert router.repaired(lost, known, "new").records["a"].moving_at == NOW + 60
    other = replace(lost, records=lost.records | {"a": replace(lost.records["a"], state="resting")})
    assert router.repaired(other, known, "new").records["a"].moving_at is None


@given(st.floats(0, router.CLOCKS_MAY_DIFFER), st.floats(0, 1e5))
def test_a_move_to_come_does_not_make_a_record_newer(after: float, later: float) -> None:
    """Of two copies of a record the one that was changed last is kept."""
    drained = router.Record("a").as_draining(NOW, after)
    assert drained.changed_at == NOW
    assert replace(drained, promoted_at=NOW + later).changed_at == NOW + later
    state = {":deployment:a": json.dumps(drained.json())}
    assert router.parse(state, NOW).problems == ()


STATE = {
    ":active": "a",
    ":promoted": {"deployment_id": "a", "at": 5},
    ":epoch": "3",
    ":store": "f00",
    ":removed": {"z": {"at": NOW - 5, "service_id": "s-z"}},
    ":answers": {"n": {"at": NOW - 5}},
    ":history": [{"at": 5, "what": "promote", "deployment_id": "a"}],
    ":maintenance": {"since": 5},
    ":deploy:lock": {"holder": "h", "since": 5, "until": NOW + 50},
    ":deployment:a": OLD | {"service_id": "s-a", "registered_at": 5},
    ":deployment:b": OLD | {"deployment_id": "b", "state": "draining", "drain_started_at": 5},
    ":deployment:c": OLD | {"deployment_id": "c", "state": "pending"},
}
STEPS: dict[str, Any] = {
    "register": lambda s: control.add_record(s, "d", "d", service_id="s-d"),
    "set_active": lambda s: control.set_active(s, "b", "b", []),
    "set_canary_weight": lambda s: control.set_canary_weight(s, "c", "c", 10.0, bake=60.0),
    "set_maintenance": lambda s: control.set_maintenance(s, None, 30, None, off=True),
    "unlock": lambda s: control.release_deploy_lock(s, None),
    "retire": lambda s: control.retire(s, "b"),
    "delete": lambda s: control.delete_record(s, "b"),
    "processed": lambda s: control.idempotent(lambda routing: routing, "n2")(s),
    "history": lambda s: control.with_history(STEPS["delete"], "remove", "b")(s),
}


@pytest.mark.parametrize("name", STEPS)
def test_each_step_raises_the_epoch_by_one_and_says_what_it_changed(name: str) -> None:
    before = parse(STATE)
    after = STEPS[name](before)
    change = router.changes(before, after)
    assert change[":epoch"] == "4"
    assert len(change) > 1
    stored = {k: v if isinstance(v, str) else json.dumps(v) for k, v in STATE.items()} | change
    read = router.parse({k: v for k, v in stored.items() if v is not None}, NOW)
    # what was announced is all that there is to read, and it is what the step said
    assert replace(read, keys=after.keys) == replace(
        after,
        epoch=4,
        records={n: replace(r, raw=read.records[n].raw) for n, r in after.records.items()},
    )
    assert router.changes(read, read) == {}


@pytest.mark.parametrize("name", ["set_maintenance", "unlock", "retire", "delete", "processed"])
def test_a_step_that_was_taken_changes_nothing_when_it_is_taken_again(name: str) -> None:
    after = STEPS[name](parse(STATE))
    assert router.changes(after, STEPS[name](after)) == {}


def test_what_is_remembered_is_bounded() -> None:
    routing = parse({":store": "s"})
    long_ago, day = NOW - 8 * 86_400, NOW - 86_400
    many = {f"d{n}": router.Tombstone(day + n) for n in range(1500)}
    graves = {"old": router.Tombstone(long_ago), **many}
    kept = json.loads(router.changes(routing, replace(routing, tombstones=graves))[":removed"])
    assert len(kept) == 1000
    assert "old" not in kept
    assert "d1499" in kept
    assert "d0" not in kept
    nonces = {"old": NOW - 3601, "new": NOW}
    change = router.changes(routing, replace(routing, processed=nonces))
    assert json.loads(change[":answers"]) == {"new": {"at": NOW}}
    noted = tuple({"at": n, "what": "x"} for n in range(150))
    change = router.changes(routing, replace(routing, history=noted))
    assert [e["at"] for e in json.loads(change[":history"])] == list(range(50, 150))


# -- which memory is right -----------------------------------------------------------------------


def life(steps: list[Any], start: Any = None) -> list[Any]:
    """The states that a store goes through; a second between one step and the next."""
    states = [start or parse({":store": "f00", ":epoch": "1"})]
    for n, step in enumerate(steps):
        before = replace(states[-1], now=NOW + n)
        try:
            after = step(before)
        except control.StateError:
            continue
        change = router.changes(before, after)
        if change:
            keys = (before.keys | change.keys()) - {k for k, v in change.items() if v is None}
            keys = frozenset(keys & router.FIXED.keys())
            states.append(replace(router.written(after, change), keys=keys))
    return states


NAMES = st.sampled_from(["a", "b", "c", "d"])


def by_0_3_x(name: str) -> Any:
    """A promotion that raises no epoch and notes no time, with records of four fields, and that a
    router sees as it happens."""

    def step(routing: Any) -> Any:
        if name not in routing.records or routing.records[name].retiring_at:
            raise control.StateError("not there")
        new = router.Record(name, "active", name)
        old = routing.records.get(routing.active)
        drained = []
        if old and routing.active != name:
            drained = [router.Record(old.deployment_id, "draining", old.service_name)]
            drained = [replace(drained[0], drain_started_at=routing.now)]
        records = {**routing.records, **{r.deployment_id: r for r in (*drained, new)}}
        after = replace(routing, active=name, records=records, keys=routing.keys | {":active"})
        return router.repaired(after, routing, "new")

    return step


OURS = st.one_of(
    st.builds(
        lambda n, k: lambda s: control.add_record(s, n, n, service_id=f"s-{n}-{k}"),
        NAMES,
        st.integers(0, 1),
    ),
    st.builds(lambda n: lambda s: control.set_active(s, n, n, []), NAMES),
    st.builds(
        lambda n, w: lambda s: control.set_canary_weight(s, n, n, w),
        NAMES,
        st.sampled_from([10.0, 50.0]),
    ),
    st.builds(lambda n: lambda s: control.retire(s, n), NAMES),
    st.builds(lambda n: lambda s: control.delete_record(s, n), NAMES),
    st.builds(by_0_3_x, NAMES),
    st.booleans().map(lambda off: lambda s: control.set_maintenance(s, None, 9, None, off=off)),
)
LIVES = st.lists(OURS, min_size=1, max_size=14).map(life)


def pick(states: list[Any], share: float) -> Any:
    return states[round(share * (len(states) - 1))]


def meaning(routing: Any) -> Any:
    """A state without what two routers would write differently: ids, and the number of writes."""
    records = {n: replace(r, raw={}) for n, r in routing.records.items()}
    return replace(routing, store_id=None, epoch=0, records=records, keys=frozenset(), processed={})


SHARE = st.floats(0, 1)
OF_ALL = st.sampled_from(
    [
        lambda s: parse({}),
        lambda s: replace(s, store_id=None),
        lambda s: replace(s, store_id="another"),
        lambda s: s,
    ]
)
LOSSES = st.one_of(
    OF_ALL,
    st.sampled_from(sorted(router.FIXED)).map(
        lambda key: (
            lambda s: replace(
                s,
                keys=s.keys - {key},
                **{router.FIXED[key]: getattr(router.Routing(), router.FIXED[key])},
            )
        )
    ),
    NAMES.map(
        lambda n: lambda s: replace(s, records={k: r for k, r in s.records.items() if k != n})
    ),
)


def repair(store: Any, known: Any, now: float = NOW + 100) -> Any:
    """As a router does, and what the store holds then."""
    store = replace(store, now=now)
    after = router.repaired(store, known, "new")
    change = router.changes(store, after)
    keys = store.keys | (change.keys() & router.FIXED.keys())
    return replace(router.written(after, change), keys=frozenset(keys))


@given(LIVES, SHARE, SHARE, LOSSES)
@settings(max_examples=400, deadline=None)
def test_what_was_repaired_stays_as_it_is(
    states: list[Any], of_store: float, of_router: float, loss: Any
) -> None:
    store, known = loss(pick(states, of_store)), pick(states, of_router)
    once = repair(store, known)
    assert router.changes(once, router.repaired(once, known, "other")) == {}
    assert router.changes(once, router.repaired(once, once, "other")) == {}


# found by CI: with its id a store got no time for what 0.3.x had promoted
@example(
    life(
        [
            lambda s: control.add_record(s, "a", "a"),
            by_0_3_x("a"),
            lambda s: control.set_active(s, "a", "a", []),
        ]
    ),
    0.5,
    0.0,
    1.0,
    lambda s: replace(s, store_id=None),
)
@given(LIVES, SHARE, SHARE, SHARE, OF_ALL)
@settings(max_examples=400, deadline=None)
def test_it_does_not_matter_which_router_is_first(
    states: list[Any], of_store: float, one: float, other: float, loss: Any
) -> None:
    store = loss(pick(states, of_store))
    first, second = pick(states, one), pick(states, other)
    left = repair(repair(store, first), second)
    right = repair(repair(store, second), first)
    assert left.promotion == right.promotion
    # an id that was on two services may come back as the older of them: the removal names one
    services = {(n, r.service_id) for s in states for n, r in s.records.items()}
    counts = Counter(name for name, _ in services)
    ids = {name for name, count in counts.items() if count == 1}

    def outcome(found: Any) -> Any:
        records = {n: (r.state, r.weight) for n, r in found.records.items() if n in ids}
        return records, found.tombstones.keys() & ids

    assert outcome(left) == outcome(right)


@given(LIVES, SHARE, SHARE)
@settings(max_examples=400, deadline=None)
def test_an_older_snapshot_never_wins(states: list[Any], of_store: float, of_router: float) -> None:
    """Over a router that has seen what came after it; and a newer state wins over the router."""
    of_store, of_router = sorted((of_store, of_router))
    store, known = pick(states, of_store), pick(states, of_router)
    mended = repair(store, known)
    assert (mended.active, mended.promoted) == (known.active, known.promoted)
    for name, found in mended.records.items():
        if name in known.records:
            right = known.records[name]
            assert (found.state, found.weight) == (right.state, right.weight)
        else:  # that it was removed is not known, or that goes on
            grave = known.tombstones.get(name)
            assert found.retiring_at or not (grave and grave.covers(found))
    # the other way round the router learns, and writes nothing that changes who is active
    learned = repair(known, store)
    assert (learned.active, learned.promoted) == (known.active, known.promoted)


@given(LIVES, SHARE, SHARE)
@settings(max_examples=400, deadline=None)
def test_what_was_removed_with_this_service_never_comes_back(
    states: list[Any], of_store: float, of_router: float
) -> None:
    of_store, of_router = sorted((of_store, of_router))
    known = pick(states, of_router)
    for store in (pick(states, of_store), parse({})):
        for name, found in repair(store, known).records.items():
            grave = known.tombstones.get(name)
            gone = grave and grave.covers(found) and name not in known.records
            assert not gone or found.retiring_at, (name, found)


@pytest.mark.parametrize("state", ["pending", "draining"])
def test_the_latest_weight_comes_back(state: str) -> None:
    """Before, after FLUSHALL the first router's was kept, also an older one: a weight had no time,
    and a draining record that became the canary lost its own."""
    canary = {"deployment_id": "b", "service_name": "b", "state": state, "drain_started_at": NOW}
    routing = parse({**STATE, ":deployment:b": canary})
    less = control.set_canary_weight(replace(routing, now=NOW + 1), "b", "b", 10.0)
    more = control.set_canary_weight(replace(less, now=NOW + 2), "b", "b", 50.0)
    ended = control.set_active(replace(more, now=NOW + 3), "c", "c", [])
    for known in ((less, more), (more, less), (less, more, less)):
        found = parse({})
        for memory in known:
            found = repair(found, memory)
        assert found.records["b"].weight == 50.0
    assert repair(repair(parse({}), less), ended).records["b"].weight is None
    assert repair(repair(parse({}), ended), less).records["b"].weight is None
    assert more.records["b"].changed_at > routing.records["b"].changed_at


def test_a_store_of_0_3_x_keeps_its_active_one() -> None:
    store = parse({":active": "a", ":deployment:a": OLD})
    assert store.promotion == router.Promotion("a", math.inf)
    named = repair(store, router.Routing())
    assert (named.active, named.store_id) == ("a", "new")
    assert named.promoted == router.Promotion("a", NOW + 100)  # and so it stays the latest
    change = router.changes(store, control.add_record(store, "b", "b"))
    assert json.loads(change[":promoted"]) == vars(router.Promotion("a", store.now))
    assert named.records == store.records
    assert repair(named, named) == named
    assert control.is_older_than(named, None) is False


@pytest.mark.parametrize("promoted", [None, {"deployment_id": "a", "at": 5}])
def test_a_promotion_by_0_3_x_that_is_seen_gets_its_time(promoted: Any) -> None:
    """Then an older snapshot does not win over it, nor what Railway noted before."""
    state: dict[str, Any] = {":active": "a", ":store": "f00", ":epoch": "3"}
    state |= {":promoted": promoted} if promoted else {}
    for name in "ab":
        state[f":deployment:{name}"] = OLD | {"deployment_id": name, "service_name": name}
    known = parse(state)
    after = parse(state | {":active": "b"})
    mended = repair(after, known)
    assert mended.promoted == router.Promotion("b", NOW + 100)
    assert mended.epoch == 4
    again = repair(known, mended)  # the snapshot from before it comes back
    assert (again.active, again.promoted) == ("b", mended.promoted)
    back = repair(replace(mended, active="a"), mended, NOW + 200)  # 0.3.x goes back to it
    assert back.promoted == router.Promotion("a", NOW + 200)


def test_a_promotion_by_0_3_x_after_one_of_ours_wins() -> None:
    """Also over a router that has seen neither, and on a store that was emptied."""
    ours = {":store": "f00", ":epoch": "9", ":active": "b"}
    ours[":promoted"] = json.dumps({"deployment_id": "a", "at": 5})
    ours[":deployment:b"] = json.dumps(OLD | {"deployment_id": "b"})
    assert parse(ours).promoted_by_other
    known = replace(parse(STATE), promoted=router.Promotion("a", 4.0))
    assert repair(parse(ours), known).active == "b"
    emptied = parse({":active": "b", ":deployment:b": OLD | {"deployment_id": "b"}})
    mended = repair(emptied, parse(STATE))
    assert mended.promoted == router.Promotion("b", NOW + 100)
    assert mended.records["a"].state == "draining"


def test_fields_that_0_3_x_has_dropped_come_back() -> None:
    """Its janitor writes the active record anew, with four fields, in each run. State and drain
    time are the writer's."""
    whole: dict[str, Any] = OLD | {
        "address": "http://10.0.0.1:9000",
        "service_id": "s-a",
        "registered_at": 5.0,
        "promoted_at": 6.0,
        "instances": {"2": {"address": "http://10.0.0.1:9001"}},
        "about": {"commit": "1a2b"},
    }
    known = parse(STATE | {":deployment:a": whole})
    for state, since in (("active", None), ("draining", NOW)):
        stripped: dict[str, Any] = OLD | {"state": state, "drain_started_at": since}
        mended = repair(parse(STATE | {":deployment:a": stripped}), known)
        assert mended.records["a"].json() == whole | {"state": state, "drain_started_at": since}
    canary = OLD | {"deployment_id": "c", "state": "pending", "weight": 10.0, "held": True}
    known = parse(STATE | {":deployment:c": canary})
    stripped = OLD | {"deployment_id": "c", "state": "pending"}
    mended = repair(parse(STATE | {":deployment:c": stripped}), known)
    assert mended.records["c"].is_canary
    # a weight of 0 is one, and who raises the epoch knows our fields
    mended = repair(parse(STATE | {":deployment:c": canary | {"weight": 0}}), known)
    assert mended.records["c"].weight == 0.0
    ours = parse(STATE | {":deployment:c": stripped, ":epoch": "4"})
    assert repair(ours, known).records["c"].weight is None
    # the id on another service is another deployment
    other = OLD | {"service_id": "s-2"}
    assert repair(parse(STATE | {":deployment:a": other}), known).records["a"].about is None


def test_a_key_that_is_missing_comes_back_and_one_that_we_removed_does_not() -> None:
    known = parse(STATE)
    for key, attribute in router.FIXED.items():
        if key in (":store", ":epoch"):
            continue
        less = {k: v for k, v in STATE.items() if k != key}
        mended = repair(parse(less), known)
        assert getattr(mended, attribute) == getattr(known, attribute), key
        if key in (":maintenance", ":deploy:lock"):
            ours = repair(parse(less | {":epoch": "4"}), known)
            assert getattr(ours, attribute) is None


def test_a_missing_record_comes_back_where_it_is_needed() -> None:
    known = parse(STATE)
    less = {k: v for k, v in STATE.items() if not k.startswith(":deployment:")}
    store = parse(less)
    assert set(repair(store, known).records) == {"a"}
    assert set(router.repaired(store, known, "new", {"b"}).records) == {"a", "b"}
    grave = {"b": {"at": NOW, "service_id": None}}
    buried = parse(less | {":removed": grave})
    assert set(router.repaired(buried, known, "new", {"b"}).records) == {"a"}
    assert set(repair(parse({}), known).records) == {"a", "b", "c"}


def test_a_state_is_older_than_railways_last_promotion() -> None:
    """Railway's variables have the last promotion, with its time, as the state does."""
    routing = parse(STATE)
    cases = [
        (None, False),
        (router.Promotion("a", 5.0), False),
        (router.Promotion("b", 4.0), False),
        (router.Promotion("b", 6.0), True),
        (router.Promotion("b", 0.0), False),  # written by an earlier version, without its time
    ]
    for promotion, older in cases:
        assert control.is_older_than(routing, promotion) == older, promotion
    assert control.is_older_than(parse({}), router.Promotion("b", 0.0))
    assert not control.is_older_than(parse({}), None)
    by_other = parse(STATE | {":active": "b"})
    assert not control.is_older_than(by_other, router.Promotion("a", 5.0))
    unnamed = replace(routing, store_id=None)
    assert control.is_lost(unnamed, router.Promotion("a", 5.0))
    assert not control.is_lost(unnamed, None)


# -- what a stranger has put there -------------------------------------------------------------


def test_a_promotion_in_the_far_future_is_none() -> None:
    """Before, later promotions were acknowledged and then undone, and no command healed it."""
    state = {":active": "a", ":promoted": json.dumps({"deployment_id": "w", "at": 1e11})}
    found = router.parse(state, 1_000_000.0)
    assert (found.active, found.promoted) == ("a", None)
    assert found.problems == (":promoted is in the future",)


LATER = NOW + 2 * 86_400


def test_times_to_come_are_none() -> None:
    """Before, a tombstone hid a record that lived after a loss, an entry of the history opened a
    site that was closed, and a record's time won over all that was done to it."""
    living = OLD | {"service_id": "s-a", "registered_at": 5}
    odd = {"deployment_id": "b", "service_name": "b", "registered_at": LATER, "rejected_at": 6}
    state = {
        ":store": "f00",
        ":active": "c",
        ":removed": {"a": {"at": LATER, "service_id": "s-a"}, "z": {"at": 5}},
        ":history": [{"at": LATER, "what": "maintenance off"}, {"at": 5, "what": "promote"}],
        ":deployment:b": odd,
    }
    found = parse(state)
    assert set(found.tombstones) == {"z"}
    assert [entry["what"] for entry in found.history] == ["promote"]
    assert (found.records["b"].ignored, found.records["b"].changed_at) == (("registered_at",), 6.0)
    assert found.problems == ("b: registered_at not understood", ":removed of a is in the future")
    known = parse({":store": "bar", ":maintenance": {"since": 5}, ":deployment:a": living})
    mended = repair(found, known)
    assert mended.records["a"].service_id == "s-a"
    assert mended.maintenance


def test_a_record_of_another_deployment_is_reported() -> None:
    """Before, `{"deployment_id": 5}` came back as a pending one, and a copy of another's record as
    a second deployment on the same service."""
    for stored in (5, "b", None):
        found = parse({":deployment:a": {"deployment_id": stored, "service_name": "a"}})
        expected = {5: ("deployment_id",), "b": ("record",), None: ()}[stored]
        assert found.records["a"].ignored == expected
        assert (found.records["a"].url is None) == (stored == "b")


@pytest.mark.parametrize("text", ["{", json.dumps(OLD | {"deployment_id": "b", "state": "active"})])
def test_a_record_that_cannot_be_read_comes_back_whole(text: str) -> None:
    """Before, the fields of a draining one came back without its state, as a pending one, which no
    janitor removes."""
    draining = OLD | {"state": "draining", "drain_started_at": NOW, "service_id": "s", "x": 1}
    state = {**STATE, ":deployment:a": OLD}
    known = parse({**state, ":deployment:d": draining})
    store = parse({**state, ":deployment:d": text})
    assert store.records["d"].ignored == ("record",)
    mended = repair(store, known)
    assert mended.records["d"] == known.records["d"]
    running = router.Record("d", service_name="d", service_id="s", registered_at=5.0)
    active = router.Record("a", service_name="a", service_id="s-a", registered_at=4.0)
    rebuilt = control.rebuild_records(store, [active, running], "a")  # where no router knows it
    assert rebuilt.records["d"].state == "draining"


def test_a_lock_that_only_the_store_knows_stays_where_the_epoch_is_lost() -> None:
    """Before, the router that had not read it took it for gone, and two deploys went on at once."""
    unlocked = {key: value for key, value in STATE.items() if key != ":deploy:lock"}
    known = parse(unlocked)
    lock = {"holder": "h", "since": NOW, "until": NOW + 60}
    lost = parse({**unlocked, ":epoch": "1", ":deploy:lock": lock})
    assert (known.store_id, known.lock) == (lost.store_id, None)
    assert repair(lost, known).lock == lost.lock
    later = replace(known, lock=router.DeployLock("h", None, NOW, NOW + 90))
    assert repair(lost, later).lock == later.lock


def test_a_bake_that_is_over_does_not_come_back() -> None:
    """After FLUSHALL, whoever writes first: it has a time."""
    new = {"deployment_id": "b", "service_name": "b", "state": "pending", "registered_at": 5}
    routing = parse({**STATE, ":deployment:b": new})
    baked = control.set_active(replace(routing, now=NOW + 1), "b", "b", [], bake=60)
    over = control.finish_bake(replace(baked, now=NOW + 2), "b")
    for known in ((baked, over), (over, baked)):
        found = parse({})
        for memory in known:
            found = repair(found, memory)
        assert found.records["b"].bake is None


def test_the_active_one_is_not_being_removed() -> None:
    """Before, everybody got 404, and `status` said that nothing was wrong."""
    record = {"state": "active", "service_name": "a", "retiring_at": 5}
    state = {":active": "a", ":deployment:a": json.dumps(record)}
    found = router.parse(state, 1_000_000.0)
    assert found.records["a"].retiring_at is None
    assert found.problems == ("a: retiring_at, although it is active",)


def test_a_site_that_was_opened_later_stays_open() -> None:
    """A router that was frozen while the site was closed brings its memory into a lost store."""
    on, off = ({"at": at, "what": f"maintenance {s}"} for at, s in ((1.0, "on"), (2.0, "off")))
    known = router.Routing(
        store_id="x", epoch=3, active="a", history=(on,), maintenance=router.Maintenance(1.0)
    )
    store = router.Routing(store_id="y", epoch=5, active="a", history=(on, off))
    assert router.repaired(store, known, "z").maintenance is None


def test_a_site_that_was_closed_where_the_epoch_is_lost_stays_closed() -> None:
    """The store counts from 1 again, and a router took it for an earlier one: `maintenance on` said
    that it was done, and the site stayed open."""
    on = {"at": 2.0, "what": "maintenance on"}
    known = router.Routing(store_id="x", epoch=3, active="a")
    closed = router.Maintenance(2.0)
    store = replace(known, epoch=1, history=(on,), maintenance=closed)
    assert router.repaired(store, known, "z").maintenance == closed
    earlier = replace(store, history=(), maintenance=None)  # a copy from before it was closed
    knows = replace(known, history=(on,), maintenance=closed)
    assert router.repaired(earlier, knows, "z").maintenance == closed


def test_a_name_that_cannot_be_looked_up_is_no_address() -> None:
    """Before, each request to it was dropped, with a traceback."""
    record = {"state": "pending", "service_name": "b", "address": "http://a..b:80"}
    found = router.parse_record("b", json.dumps(record))
    assert (found.address, found.ignored) == (None, ("address",))


# -- what a command writes -----------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> dict[str, str]:
    """The environment of control commands on a store in a file, with `a` active, `b` pending."""
    env = {"PULSE_KV_KIND": "sqlite", "PULSE_KV_PATH": str(tmp_path / "kv.db")}
    for name in "ab":
        assert carry_out(env, "register", "--deployment-id", name, "--service-name", name)["ok"]
    assert carry_out(env, *PROMOTE, "a")["ok"]
    return env


PROMOTE = ("promote", "--active-deployment-id", "a", "--active-service-name")
REGISTER = ("register", "--deployment-id", "b", "--service-name")


def carry_out(env: dict[str, str], *words: str) -> Any:
    return control.carry_out([*words], env)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*REGISTER, "a b\x01"), "--service-name cannot be 'a b\\x01'"),
        ((*REGISTER, "z z"), "no address follows from the service name 'z z'"),
        ((*REGISTER, "b", "--address", "ftp://x"), "--address cannot be 'ftp://x'"),
        ((*REGISTER, "b", "--service-id", "\n"), "--service-id cannot be"),
        ((*PROMOTE, "z z"), "no address follows from the service name 'z z'"),
        ((*PROMOTE, "z\tz"), "--active-service-name cannot be"),
        ((*PROMOTE, "a", "--bake", "1e300"), "--bake cannot be 1e+300"),
        ((*PROMOTE, "a", "--address", "http://:8"), "--address cannot be"),
        ((*PROMOTE, "a", "--move-after", "86401"), "--move-after cannot be 86401"),
        (("lock", "--holder", "h", "--lease", "1e300"), "--lease cannot be 1e+300"),
        (("lock", "--holder", "", "--lease", "60"), "--holder cannot be ''"),
        (("maintenance", "on", "--retry-after", "-5"), "--retry-after cannot be -5"),
        (("maintenance", "on", "--retry-after", "9" * 40), "--retry-after cannot be 999"),
        ((*PROMOTE, "a", "--bake", "nan"), None),
        ((*PROMOTE, "a", "--weight", "nan"), None),
        ((*PROMOTE, "a", "--weight", "inf"), None),
        ((*PROMOTE, "a", "--move-after", "-1"), None),
        ((*PROMOTE, "a", "--move-idle", "86401"), "--move-idle cannot be 86401"),
        ((*PROMOTE, "a", "--move-idle", "-1"), None),
        ((*PROMOTE, "a", "--draining-json", '[{"deployment_id":"b","service_name":5}]'), None),
        (
            (
                *("restore", "--active-deployment-id", "a", "--records-json"),
                '[{"deployment_id":"b","address":5}]',
            ),
            None,
        ),
    ],
)
def test_what_the_state_cannot_hold_is_not_written(
    kept: dict[str, str], words: tuple[str, ...], says: str | None
) -> None:
    """Before, it was answered with ok, and no router understood it."""
    before = router.store_from_env(kept).read()
    if says is None:
        with pytest.raises(SystemExit):
            carry_out(kept, *words)
    else:
        answer = carry_out(kept, *words)
        assert answer["ok"] is False
        assert says in answer["error"]
    assert replace(router.store_from_env(kept).read(), now=0.0) == replace(before, now=0.0)


TEXTS = st.text(min_size=1, max_size=9) | st.sampled_from(["a", "a b", "http://x:1", "1e300", "7"])
OPTIONS = st.dictionaries(
    st.sampled_from(
        "service-name active-service-name service-id address bake move-after move-idle lease"
        " retry-after holder weight by why page about instead-of hold".split()
    ),
    TEXTS,
    max_size=4,
)
COMMANDS = st.sampled_from(
    [(*REGISTER, "b"), (*PROMOTE, "a"), ("maintenance", "on"), ("lock", "--holder=h", "--lease=9")]
)


@given(st.lists(st.tuples(COMMANDS, OPTIONS), max_size=3))
@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_a_command_writes_is_understood(kept: dict[str, str], commands: Any) -> None:
    for command, flags in commands:
        words = [*command, *(f"--{name}={value}" for name, value in flags.items())]
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            carry_out(kept, *words)
    found = router.store_from_env(kept).read()
    assert found.problems == ()
    if found.maintenance:
        stored = kept_at(kept, ":maintenance")
        assert stored == vars(found.maintenance)
    if found.lock:
        assert kept_at(kept, ":deploy:lock") == vars(found.lock)


def kept_at(env: dict[str, str], key: str) -> Any:
    store = router.store_from_env(env)
    row = store.db.execute("SELECT value FROM pulse_kv WHERE key = ?", (store.prefix + key,))
    return json.loads(row.fetchone()[0])
