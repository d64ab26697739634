"""Railway's API while a build runs: how often it is asked, and what its bad days do to a build.

The smallest plan has 100 calls an hour.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from pulse_railway import contract, waiting
from pulse_railway.errors import Failure
from pulse_railway.railway import api as api_module
from pulse_railway.railway.api import Api, ApiError
from pulse_railway.railway.tokens import Token
from tests.conftest import Project
from tests.net import Backend, Connection, eventually, header, ok
from tests.test_unreliable_ssh import Recorder
from tests.test_waiting import one, runtime


class Clock:
    """Stands in for `time`: a sleep takes no time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (waiting, api_module):
        monkeypatch.setattr(module, "time", made)
    return made


def test_a_deploy_of_five_minutes_makes_at_most_50_calls(base: Project, clock: Clock) -> None:
    """Before there were 165; the railway CLI's own calls are counted."""

    def calls() -> dict[str, Any]:
        return dict(base.railway.local("stats", reset="1"))

    calls()
    base.deploy("second")
    counts = calls()
    fields = counts["fields"]
    assert fields["ssh"] == 3  # lock, register, promote and unlock
    # each `railway ssh` asks a third time, for the registered keys, if there is no --ssh-key
    total = counts["documents"] + fields["up"] + fields["ssh"]
    began, asked = clock.now, []
    waiting.poll(600, lambda: asked.append(clock.now) or clock.now > began + 300 or None, "it")
    assert max(b - a for a, b in itertools.pairwise(asked)) == 15
    assert total - fields["deployment"] + len(asked) <= 48  # the project by its name: 2 more
    base.janitor()  # it may delete `first`
    calls()
    base.janitor()
    # the janitor finds out by a refused call that this is an account's token
    assert calls()["documents"] == 3
    document = "mutation ($i: ProjectTokenCreateInput!) { projectTokenCreate(input: $i) }"
    where = {"projectId": base.id, "environmentId": base.environment, "name": "janitor"}
    made: Any = base.railway.graphql(document, i=where)
    base.stage.set_variables("pulse-janitor", {"RAILWAY_TOKEN": made["projectTokenCreate"]})
    document = (
        "mutation ($s: String!, $e: String!)"
        " { serviceInstanceDeployV2(serviceId: $s, environmentId: $e) }"
    )
    janitor = base.stage.services()["pulse-janitor"]["serviceId"]
    base.railway.graphql(document, s=janitor, e=base.environment)
    eventually(lambda: base.latest("pulse-janitor")["status"] == "SUCCESS", 30)
    base.janitor()
    calls()
    base.janitor()
    assert calls()["documents"] == 2


HANG = b""
# None: the connection is closed; a function: it gets the query
Answer = bytes | Callable[[str], bytes] | None


class Railway:
    """An API whose answers depend on the clock. `asked` has the times and documents of calls."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = clock
        self.asked: list[tuple[float, str]] = []
        self.answers: list[tuple[float, Answer]] = []  # until then (seconds), this
        self.lines: list[str] = []
        self.backend = Backend(handle=self.handle)
        monkeypatch.setattr(api_module, "TIMEOUT", httpx.Timeout(0.2))
        monkeypatch.setenv(contract.API_URL_VARIABLE, self.backend.address)
        self.began = clock.now
        self.api = Api(Token("t", "flag"), self.say)
        self.api._scope_is_read = True

    def say(self, text: str) -> None:
        self.lines.append(f"{self.passed:.0f}: {text}")

    @property
    def passed(self) -> float:
        return self.clock.now - self.began

    def handle(self, c: Connection) -> None:
        while head := c.head():
            body = json.loads(c.read(int(header(head, "content-length") or 0)))
            self.asked.append((self.passed, body["query"].split("(")[0].split()[-1]))
            answer = next(a for until, a in self.answers if self.passed <= until)
            if answer == HANG:
                time.sleep(0.3)  # longer than TIMEOUT
            if not answer:
                return
            c.send(answer(body["query"]) if callable(answer) else answer)

    def build(self, *answers: tuple[float, Answer]) -> None:
        self.answers = list(answers)
        waiting.wait_for_build(self.api, "d", Recorder(self.lines))


@pytest.fixture
def server(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Railway]:
    made = Railway(clock, monkeypatch)
    with made.backend:
        yield made


def data(body: dict[str, Any], *headers: str) -> bytes:
    return ok(json.dumps({"data": body}).encode(), *headers)


def error(message: str) -> bytes:
    return ok(json.dumps({"errors": [{"message": message}]}).encode())


BUILDING, SUCCESS = data(one("BUILDING", "a")), data(one("SUCCESS", "a", "b"))
OUTAGES = {
    "429": ok(b"{}", "retry-after: 40", status="429 Too Many Requests"),
    "429 for long": ok(b"{}", "retry-after: 900", status="429 Too Many Requests"),
    "502": ok(b"{}", status="502 Bad Gateway"),
    "page": ok(b"<html>We are down"),
    "closed": None,
}


@pytest.mark.parametrize("kind", OUTAGES)
def test_an_outage_does_not_end_a_build(server: Railway, kind: str) -> None:
    """Nine seconds of 502 did, and one page with status 200."""
    server.build((20, BUILDING), (900, OUTAGES[kind]), (9999, SUCCESS))
    assert [line for line in server.lines if ":" not in line] == ["a", "building", "b"]
    told = [line for line in server.lines if "goes on meanwhile" in line]
    assert 20 < int(told[0].partition(":")[0]) <= 20 + 15.5 + 11  # a poll's pause, and ten seconds
    assert 1 <= len(told) <= 16
    assert len(server.asked) < 90


def test_an_api_that_hangs(server: Railway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "FIRST_TIMEOUT", 0.02)
    server.build((10, BUILDING), (100, HANG), (9999, SUCCESS))
    assert any("Railway does not answer; trying again for" in line for line in server.lines)


def test_an_outage_to_the_end(server: Railway) -> None:
    with pytest.raises(Failure, match="Railway answers 502: try again later"):
        server.build((20, BUILDING), (9999, OUTAGES["502"]))
    assert waiting.BUILD_TIMEOUT <= server.passed < waiting.BUILD_TIMEOUT + 16


def test_a_build_that_fails_after_an_outage(server: Railway) -> None:
    failed = one("FAILED", "a", "no space left")
    with pytest.raises(Failure, match="ended as FAILED"):
        server.build(
            (20, BUILDING), (300, OUTAGES["502"]), (9999, data({**failed, **runtime("x")}))
        )


def test_a_refusal_counts_if_it_holds(server: Railway) -> None:
    """An outage of Railway's can look like one; a deployment that is gone stays gone."""
    server.build((20, BUILDING), (60, error("Problem processing request")), (9999, SUCCESS))
    server.began = server.clock.now
    with pytest.raises(ApiError, match="Railway: Deployment not found"):
        server.build((20, BUILDING), (9999, error("Deployment not found")))
    assert server.passed < 200


def test_a_log_that_is_refused(server: Railway) -> None:
    def without_log(query: str) -> bytes:
        return error("logs are away") if "buildLogs" in query else data(one("BUILDING"))

    server.build((200, without_log), (9999, SUCCESS))
    assert "the build log cannot be read: Railway: logs are away" in server.lines


def test_few_calls_that_are_left(server: Railway) -> None:
    """The build is looked at once a minute, without its log, which is read if it fails."""
    left = ("x-ratelimit-limit: 100", "x-ratelimit-remaining: 9")
    few, done = data(one("BUILDING", "a"), *left), data(one("SUCCESS"), *left)
    server.build((600, few), (9999, done))
    assert [name for _, name in server.asked] == ["Deployment"] + ["Status"] * 11
    assert [b - a for (a, _), (b, _) in itertools.pairwise(server.asked)] == ([60] * 11)
    assert any("9 of the 100 API calls are left" in line for line in server.lines)
    server.began = server.clock.now
    failed = {**one("FAILED", "no space left"), **runtime("x")}
    with pytest.raises(Failure, match="no space left"):
        server.build((100, few), (9999, data(failed, *left)))
    for unknown in ({"x-ratelimit-limit": "many"}, {"x-ratelimit-remaining": "-1"}, {}):
        api = Api(Token("t", "flag"))
        api._read_headers(httpx.Response(200, headers=unknown))
        assert not api.is_nearly_used_up


def test_a_build_that_railway_does_not_begin(server: Railway) -> None:
    """Builds are paused now and then: that was told as a build that took too long."""
    queued = data(one("QUEUED"))
    with pytest.raises(Failure, match=r"Railway has not begun the build in 30 minutes \(queued\)"):
        server.build((9999, queued))
    words = [line for line in server.lines if line.startswith("queued for ")]
    assert 25 <= len(words) <= 30
    assert "queued for 1 min: Railway has not begun it; https://status.railway.com" in words[0]
    server.lines.clear()
    with pytest.raises(Failure, match=r"the build took longer than 1800 s"):
        server.build((9999, BUILDING))
    assert "building for 10 min" in server.lines
