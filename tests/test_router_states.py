"""The tables of router_states.py: every event in every state, and the picture in the docs."""

from __future__ import annotations

from typing import Any

import pytest

from pulse_railway import runtime_image
from tests.conftest import ROOT

states: Any = runtime_image.load("router_states")
MACHINES = [
    (states.ClientState, states.ClientEvent, states.CLIENT),
    (states.ExchangeState, states.ExchangeEvent, states.EXCHANGE),
]


@pytest.mark.parametrize(("state", "event", "table"), MACHINES)
def test_every_event_in_every_state_leads_where_the_table_says_or_is_a_fault(
    state: Any, event: Any, table: Any
) -> None:
    reached = {next(iter(state))}
    for before in state:
        for what in event:
            after = table.get(before, {}).get(what)
            if after is None:
                with pytest.raises(KeyError):
                    before.after[what]
            else:
                assert before.after[what] is after
                reached.add(after)
    assert reached == set(state), "each state can be reached"
    assert {what for row in table.values() for what in row} == set(event), "each event can happen"


def test_an_exchange_that_has_ended_stays_as_it_ended() -> None:
    for state in states.ExchangeState:
        assert state.finished == (not state.after)


def test_what_a_client_s_connection_allows() -> None:
    may = {s.name: (s.parses, s.may_answer, s.may_read) for s in states.ClientState}
    assert may == {
        "HEAD": (True, True, True),
        "BODY": (True, True, True),
        "HANDSHAKE": (False, True, False),  # what comes is kept for the tunnel
        "REFUSED": (False, True, False),
        "LINGERING": (True, False, True),
        "DROPPING": (False, False, True),
        "TUNNEL": (False, False, False),
        "CLOSED": (False, False, False),
    }
    for state in states.ClientState:  # what is answered, or gone, is never answered again
        if not state.may_answer:
            assert not any(after.may_answer for after in state.after.values())


def picture(state: Any, event: Any) -> str:
    """The table as docs/architecture.md shows it: paste it there where it has changed."""
    lines = ["| state | what it is | what may happen |", "| --- | --- | --- |"]
    for s in state:
        arrows = ", ".join(f"{what.name} → `{after.name}`" for what, after in s.after.items())
        lines.append(f"| `{s.name}` | {s.value} | {arrows or 'nothing'} |")
    lines += ["", "| event | what it is |", "| --- | --- |"]
    lines += [f"| {what.name} | {what.value} |" for what in event]
    return "\n".join(lines)


@pytest.mark.parametrize(("state", "event", "table"), MACHINES)
def test_the_docs_show_the_table(state: Any, event: Any, table: Any) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split(f"### {state.__name__.removesuffix('State')}\n")[1].split("\n### ")[0]
    assert picture(state, event) in section
