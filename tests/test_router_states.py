"""The states of router.py's connections: every event in every state, and the docs' picture."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from pulse_railway import runtime_image
from tests.conftest import ROOT

router: Any = runtime_image.load("router")
MACHINES = [
    (router.ClientState, router.ClientEvent, router.CLIENT),
    (router.ExchangeState, router.ExchangeEvent, router.EXCHANGE),
]
machines = pytest.mark.parametrize(("states", "events", "table"), MACHINES)


@machines
def test_every_event_in_every_state_leads_where_the_table_says_or_is_a_fault(
    states: Any, events: Any, table: Any
) -> None:
    names = get_args(events)
    assert set(names) == table.keys()
    reached = {next(iter(states))}
    for before in states:
        for event in names:
            if after := table[event].get(before):
                assert before.after[event] is after
                reached.add(after)
            else:
                with pytest.raises(KeyError):
                    before.after[event]
    assert reached == set(states), "each state can be reached"


def test_an_exchange_that_has_ended_stays_as_it_ended() -> None:
    going_on = [state.name for state in router.ExchangeState if not state.finished]
    assert going_on == ["WAITING", "ANSWERING"]
    assert all(state.finished == (not state.after) for state in router.ExchangeState)


def test_what_a_client_s_connection_allows() -> None:
    for state in router.ClientState:
        if not state.may_answer:  # what is answered, or gone, is never answered again
            assert not any(after.may_answer for after in state.after.values())
        if not state.may_read:  # nothing can come to be parsed
            assert not state.parses
    may_read = {s.name for s in router.ClientState if s.may_read}
    assert may_read == {"HEAD", "BODY", "LINGERING", "DROPPING"}
    dropped = {s.name for s in router.ClientState if s.may_read and not s.may_answer}
    assert dropped == {"LINGERING", "DROPPING"}


def picture(states: Any, flags: list[str]) -> str:
    """The table as docs/architecture.md shows it: paste it there where it has changed."""
    columns = ["state", "what it is", *(f"`{flag}`" for flag in flags), "what may happen"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for s in states:
        arrows = ", ".join(f"{event} → `{after.name}`" for event, after in s.after.items())
        may = ["yes" if getattr(s, flag) else "" for flag in flags]
        lines.append(
            "| "
            + " | ".join([f"`{s.name}`", getattr(s, "about", s.value), *may, arrows or "nothing"])
            + " |"
        )
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "flags"), [("Client", ["parses", "may_answer", "may_read"]), ("Exchange", [])]
)
def test_the_docs_show_the_table(name: str, flags: list[str]) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split(f"### {name}\n")[1].split("\n### ")[0]
    assert picture(getattr(router, f"{name}State"), flags) in section
