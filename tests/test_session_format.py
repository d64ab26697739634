"""The form of a stored session, held against Pulse's own serializer of the version that it is."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
from dataclasses import dataclass
from typing import Any

import pulse.serializer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_railway.app import session_format

PULSE = importlib.metadata.version("pulse-framework")
frozen = pytest.mark.skipif(PULSE != "0.1.111", reason=f"Pulse {PULSE} may have another format")

UTC = datetime.UTC
MOMENTS = st.datetimes(
    datetime.datetime(1, 1, 2),
    datetime.datetime(9999, 12, 30),
    timezones=st.sampled_from([UTC, None, datetime.timezone(datetime.timedelta(hours=5.5))]),
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_infinity=False) | st.text()
LEAVES = PLAIN | st.dates() | MOMENTS | st.sets(st.integers() | st.text(), max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.tuples(inner, inner)
        | inner.map(lambda value: [value, value])  # shared
    ),
    max_leaves=12,
)


@frozen
@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_it_is_what_pulse_writes_and_reads(value: Any) -> None:
    ours = json.dumps(session_format.dump(value))
    theirs = json.dumps(pulse.serializer.serialize(value))
    assert ours == theirs
    again, expected = json.loads(ours), pulse.serializer.deserialize(json.loads(theirs))
    assert session_format.decode(again) == expected


@dataclass
class Point:
    x: int
    y: datetime.date


class Plain:
    def __init__(self) -> None:
        self.shown, self._hidden = {1}, 2


def test_a_fixed_example() -> None:
    """It does not change with Pulse, nor with us: this is what is in people's Redis."""
    shared = ["a"]
    loop: dict[str, Any] = {}
    loop["self"] = loop
    value = {
        "n": [1, 2.5, True, None, math.nan],
        "day": datetime.date(2026, 11, 27),
        "at": datetime.datetime(2026, 11, 27, 12, 0, 0, 5999, UTC),
        "set": {7},
        "one": shared,
        "two": shared,
        "point": Point(1, datetime.date(2026, 1, 2)),
        "plain": Plain(),
        "loop": loop,
    }
    payload = {
        "n": [1, 2.5, True, None, None],
        "day": "2026-11-27",
        "at": "2026-11-27T12:00:00.005Z",
        "set": [7],
        "one": ["a"],
        "two": 11,
        "point": {"x": 1, "y": "2026-01-02"},
        "plain": {"shown": [1]},
        "loop": {"self": 20},
    }
    stored = [[[13, 21], [7, 8, 16], [9, 18], []], payload]
    assert session_format.dump(value) == stored
    again = session_format.decode(json.loads(json.dumps(stored)))
    assert again["two"] is again["one"] == ["a"]
    assert again["loop"]["self"] is again["loop"]
    assert (again["day"], again["set"]) == (value["day"], {7})
    assert again["at"] == datetime.datetime(2026, 11, 27, 12, 0, 0, 5000, UTC)


@pytest.mark.parametrize("value", [math.inf, {1: 2}, [print], {"a": json}, object(), b"raw", 1j])
def test_what_has_no_form(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        session_format.dump({"value": value})


@pytest.mark.parametrize(
    "stored",
    [
        None,
        {},
        [],
        ["v9", {"a": 1}],
        [[[], [], []], {}],
        [[[0], [], [], []], "text"],  # a reference to nothing
        [[[0], [], [], []], {}],
        [[[], [0], [], []], 5],
        [[[], [0], [], []], "soon"],
        [[["0"], [], [], []], 0],
        [[[], [], [0], []], [[1]]],
    ],
)
def test_what_is_another_format(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        session_format.decode(stored)
