"""The states of a client's connection and of an exchange, and what may happen in each.

The tables below are all there is: an event that a state's row does not have is a fault of the
router's own. tests/test_router_states.py walks them, and holds docs/architecture.md to them. The
properties of a state say what may be done in it. This imports nothing but the standard library."""

from __future__ import annotations

from enum import Enum, StrEnum


class ClientEvent(StrEnum):
    """What happens to a client's connection."""

    REQUEST = "a head"
    HANDSHAKE = "the head of a WebSocket handshake"
    WHOLE = "the end of a request"
    EARLY = "an answer before the end of its request"
    BAD_HEAD = "a head that is refused, behind a request that is not answered yet"
    BAD_BODY = "a body that is refused, before any answer"
    REJECT = "too many clients"
    SWITCH = "the backend's 101"
    CLOSE = "the end of the connection"


class ClientState(Enum):
    """How far a client's connection is: its reading side, since several requests can wait."""

    HEAD = "between two requests, or in a head"
    BODY = "in the body of a request"
    HANDSHAKE = "a WebSocket handshake has come: what follows is the tunnel's"
    REFUSED = "nothing more is understood; the answers that are due come first"
    LINGERING = "answered; the rest of the upload is read up to its end, and dropped"
    DROPPING = "answered; what comes is not understood, and dropped"
    TUNNEL = "the two ends of a tunnel have the connections"
    CLOSED = "closed, or closing"

    after: dict[ClientEvent, ClientState]  # its row of CLIENT
    parses: bool  # what comes goes to the parser
    may_answer: bool  # a request may be begun, and its answer written
    may_read: bool  # from the socket, where its requests do not hold it up


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


C, E, X, V = ClientState, ClientEvent, ExchangeState, ExchangeEvent

CLIENT = {
    C.HEAD: {
        E.REQUEST: C.BODY,
        E.HANDSHAKE: C.HANDSHAKE,
        E.BAD_HEAD: C.REFUSED,
        E.REJECT: C.DROPPING,
        E.CLOSE: C.CLOSED,
    },
    C.BODY: {
        E.WHOLE: C.HEAD,
        E.EARLY: C.LINGERING,
        E.BAD_BODY: C.DROPPING,
        E.CLOSE: C.CLOSED,
    },
    C.HANDSHAKE: {E.WHOLE: C.HANDSHAKE, E.SWITCH: C.TUNNEL, E.CLOSE: C.CLOSED},
    C.REFUSED: {E.CLOSE: C.CLOSED},
    C.LINGERING: {E.WHOLE: C.CLOSED, E.CLOSE: C.CLOSED},
    C.DROPPING: {E.CLOSE: C.CLOSED},
    C.TUNNEL: {},
    C.CLOSED: {E.CLOSE: C.CLOSED},
}

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

for _state in C:
    _state.after = CLIENT[_state]
    _state.parses = _state in (C.HEAD, C.BODY, C.LINGERING)
    _state.may_answer = _state in (C.HEAD, C.BODY, C.HANDSHAKE, C.REFUSED)
    _state.may_read = _state.parses or _state is C.DROPPING
for _outcome in X:
    _outcome.after = EXCHANGE.get(_outcome, {})
    _outcome.finished = _outcome not in EXCHANGE
