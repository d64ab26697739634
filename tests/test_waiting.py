"""Waiting for Railway's deployments, with a server that returns prepared states."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pulse_railway import config, contract, waiting
from pulse_railway.errors import Failure
from pulse_railway.railway.api import Api
from pulse_railway.railway.tokens import Token
from tests.net import Backend, Connection, header, ok
from tests.test_unreliable_ssh import Recorder

MakeApi = Callable[..., Api]


@pytest.fixture
def railway(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeApi]:
    """A function: `railway(data, ...)` returns an API with these answers, and repeats the last."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answers: list[dict[str, Any]] = []

    def handle(c: Connection) -> None:
        while head := c.head():
            c.read(int(header(head, "content-length") or 0))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            c.send(ok(json.dumps(answer).encode()))

    with Backend(handle=handle) as backend:
        monkeypatch.setenv(contract.API_URL_VARIABLE, backend.address)

        def make(*bodies: dict[str, Any]) -> Api:
            answers[:] = [body if "errors" in body else {"data": body} for body in bodies]
            api = Api(Token("t", "flag"))
            api._scope_is_read = True
            return api

        yield make


TARGET = config.Target("p", "e")


def latest(**deployments: tuple[str, str]) -> dict[str, Any]:
    nodes = [
        {"serviceId": name, "latestDeployment": {"id": deployment_id, "status": status}}
        for name, (deployment_id, status) in deployments.items()
    ]
    return {"environment": {"serviceInstances": {"edges": [{"node": node} for node in nodes]}}}


def one(status: str, *log: str) -> dict[str, Any]:
    lines = [{"timestamp": f"t{n}", "message": text} for n, text in enumerate(log)]
    return {"deployment": {"status": status}, "buildLogs": lines}


def runtime(*log: str) -> dict[str, Any]:
    return {"deploymentLogs": [{"timestamp": "t", "message": text} for text in log]}


def test_an_older_deployments_status_is_ignored(railway: MakeApi) -> None:
    """Railway's latest deployment can be the previous one for a moment."""
    lines: list[str] = []
    api = railway(
        latest(r=("old", "SUCCESS")),
        latest(r=("old", "REMOVED")),
        latest(r=("new", "BUILDING")),
        latest(r=("new", "SUCCESS")),
    )
    waiting.wait_for_services(api, TARGET, {"r": "router"}, {"r": "new"}, Recorder(lines))
    assert lines == ["router queued", "router building"]


def test_a_deployment_that_another_run_has_replaced(railway: MakeApi) -> None:
    """The loser of two `ensure` waited for it for half an hour."""
    lines: list[str] = []
    newer = [latest(r=("newer", "BUILDING"))] * 5
    api = railway(*newer, one("REMOVED"), latest(r=("newer", "SUCCESS")))
    waiting.wait_for_services(api, TARGET, {"r": "router"}, {"r": "ours"}, Recorder(lines))
    assert "another run has deployed router since: waiting for that" in lines


def test_one_of_several_that_fails_is_named(railway: MakeApi) -> None:
    api = railway(
        latest(r=("1", "SUCCESS"), j=("2", "BUILDING")),
        latest(r=("1", "SUCCESS"), j=("2", "FAILED")),
        one("FAILED", "step 1", "no space left"),
    )
    names = {"r": "router", "j": "janitor", "x": "missing"}
    with pytest.raises(Failure, match=r"of janitor ended as FAILED\n.*step 1\n.*no space left$"):
        waiting.wait_for_services(api, TARGET, names, {}, Recorder([]))


def test_a_builds_log_and_outcome_are_printed(railway: MakeApi) -> None:
    lines: list[str] = []
    api = railway(one("BUILDING", "a"), one("BUILDING", "a", "b"), one("SUCCESS", "a", "b", "c"))
    waiting.wait_for_build(api, "d", Recorder(lines))
    assert lines == ["a", "building", "b", "c"]
    api = railway(one("CRASHED", "built"), runtime("Traceback", "KeyError: 'X'"))
    with pytest.raises(
        Failure, match=r"ended as CRASHED.*\n    built\nits runtime log ended with\n.*\n.*'X'"
    ):
        waiting.wait_for_build(api, "d", Recorder([]))
    api = railway(one("CRASHED"), {"errors": [{"message": "logs are away"}]})
    with pytest.raises(Failure, match="its runtime log could not be read: Railway: logs are away"):
        waiting.wait_for_build(api, "d", Recorder([]))
    with pytest.raises(Failure, match="waits for an approval on Railway: approve it there"):
        waiting.wait_for_build(railway(one("NEEDS_APPROVAL")), "d", Recorder([]))


def test_a_wait_times_out(railway: MakeApi) -> None:
    with pytest.raises(Failure, match=r"the deployment of router took longer than 0 s"):
        waiting.wait_for_services(
            railway(latest()), TARGET, {"r": "router"}, {}, Recorder([]), timeout=0
        )
