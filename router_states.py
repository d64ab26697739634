"""The states of an exchange, and what may happen in each.

The table below is all there is: an event that a state's row does not have is a fault of the
router's own. tests/test_router_states.py walks it, and holds docs/architecture.md to it. This
imports nothing but the standard library."""

from __future__ import annotations

from enum import Enum, StrEnum


class ExchangeEvent(StrEnum):
    """What happens to an exchange."""

    HEAD = "the head of the answer"
    END = "the end of the answer"
    SWITCH = "101, the answer to a handshake"
    MISS = "a hedged answer that says: not here"
    CLIENT_LOST = "the client has gone"
    POOL_LOST = "a pooled connection is lost"
    LOST = "the connection is lost, or what comes is no answer"
    TIMEOUT = "no answer in time"


class ExchangeState(Enum):
    """How far an exchange is. The states without a row in EXCHANGE are the outcomes."""

    WAITING = "the request is sent, or being sent"
    ANSWERING = "the answer's head has gone to the client"
    OK = "the answer is whole"
    SWITCHED = "a tunnel now"
    MISSING = "an answer that was held back: not here"
    GONE = "the client left"
    BROKEN = "too late for another answer"
    RESET = "a pooled connection had died"
    LOST = "no answer, nothing sent yet"
    TIMED_OUT = "no answer in time, nothing sent yet"

    after: dict[ExchangeEvent, ExchangeState]  # its row of EXCHANGE
    finished: bool


X, V = ExchangeState, ExchangeEvent

EXCHANGE = {
    X.WAITING: {
        V.HEAD: X.ANSWERING,
        V.SWITCH: X.SWITCHED,
        V.MISS: X.MISSING,
        V.CLIENT_LOST: X.GONE,
        V.POOL_LOST: X.RESET,
        V.LOST: X.LOST,
        V.TIMEOUT: X.TIMED_OUT,
    },
    X.ANSWERING: {
        V.END: X.OK,
        V.CLIENT_LOST: X.GONE,
        V.LOST: X.BROKEN,
    },
}

for _state in X:
    _state.after = EXCHANGE.get(_state, {})
    _state.finished = _state not in EXCHANGE
