"""The states of router.py's connections: every event in every state, and the docs' picture.
Then what they mean on the wire, where it shows only at an edge."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest

from pulse_railway import runtime_image
from tests.conftest import ROOT, Process, Redis
from tests.net import Backend, Connection, ask, eventually, ok, read_answer
from tests.test_tunnel import HANDSHAKE, SWITCH

Run = Callable[..., Process]

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


# -- on the wire -------------------------------------------------------------------------------

GET = b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n"


def up(run_router: Run, server: Redis, backend: Backend, **limits: float) -> Process:
    server.deployment("a", backend.address)
    router = run_router(server, limits)
    eventually(lambda: ask(router.port, "/healthz").status == 200)
    return router


def test_a_request_behind_an_upload_that_was_answered_early_is_not_begun(
    redis_server: Redis, run_router: Run
) -> None:
    """RFC 9112 section 9.6: who answers early closes, and the client may send it again."""
    seen: list[bytes] = []

    def answer_early(connection: Connection) -> None:
        seen.append(connection.head().split()[1])
        connection.send(ok(b"early"))
        connection.rest()

    with Backend(handle=answer_early) as backend:
        router = up(run_router, redis_server, backend)
        with Connection.to(router.port) as c:
            c.send(b"POST /upload HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhello")
            assert read_answer(c).body == b"early"
            c.send(b"world" + GET % b"/behind")
            assert c.rest() == b""
        assert ask(router.port, "/after").body == b"early"
        assert backend.connections == 2
    assert seen == [b"/upload", b"/after"]


def test_nothing_is_answered_once_the_rest_is_dropped(redis_server: Redis, run_router: Run) -> None:
    """The body turns out to be bad while its deployment is looked up, which ends later."""
    with Backend() as backend:
        router = up(run_router, redis_server, backend)
        assert redis_server.process is not None
        os.kill(redis_server.process.popen.pid, signal.SIGSTOP)
        try:
            with Connection.to(router.port) as c:
                c.send(b"POST /?pulse_deployment=gone HTTP/1.1\r\nhost: x\r\n")
                c.send(b"transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n")
                time.sleep(0.1)
                c.send(b"not a size\r\n")
                assert c.rest().startswith(b"HTTP/1.1 400 ")
                time.sleep(1.2)  # the lookup's second
        finally:
            os.kill(redis_server.process.popen.pid, signal.SIGCONT)
        assert ask(router.port).status == 200
        assert "failed in the router itself" not in router.output()


def test_nothing_is_read_while_a_whole_request_waits(redis_server: Redis, run_router: Run) -> None:
    """What waits in the socket is not among the requests that a connection may have waiting."""
    release = threading.Event()

    def wait(connection: Connection) -> None:
        while head := connection.head():
            if b"/slow" in head:
                release.wait(20)
            connection.send(ok(head.split()[1]))

    paths = [b"/slow", b"/next", b"/a", b"/b", b"/c"]
    with Backend(handle=wait) as backend:
        router = up(run_router, redis_server, backend, pipelined_requests=3)
        with Connection.to(router.port) as c:
            c.send(GET % paths[0] + GET % paths[1])
            time.sleep(0.1)
            c.send(b"".join(GET % path for path in paths[2:]))
            time.sleep(0.1)
            release.set()
            assert [read_answer(c).body for _ in paths] == paths


def test_a_tunnel_that_opens_while_the_router_ends_is_left_alone(
    redis_server: Redis, run_router: Run
) -> None:
    """Its connection was idle when the end began, and would be closed as such a moment later."""

    def serve(connection: Connection) -> None:
        if b"/slow" in connection.head():
            time.sleep(1.5)
            connection.send(ok(b"slow"))
            return
        connection.send(SWITCH)
        connection.send(connection.read(4))
        connection.rest()

    with Backend(handle=serve) as backend:
        router = up(run_router, redis_server, backend)
        with Connection.to(router.port) as slow, Connection.to(router.port) as c:
            c.send(GET % b"/healthz")
            assert read_answer(c).status == 200
            slow.send(GET % b"/slow")
            time.sleep(0.1)
            router.popen.terminate()
            time.sleep(0.3)  # uvicorn notices within 0.1 s
            c.send(HANDSHAKE % b"/")
            assert c.head().startswith(b"HTTP/1.1 101 ")
            time.sleep(0.7)
            c.send(b"ping")
            assert c.read(4) == b"ping"
            assert read_answer(slow).body == b"slow"
        assert "Traceback" not in router.output()
