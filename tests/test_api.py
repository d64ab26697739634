"""The GraphQL client against a server that answers what it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pulse_railway import config, contract, services
from pulse_railway.errors import Failure, Uncertain
from pulse_railway.local.supervisor import free_port
from pulse_railway.railway import api as api_module
from pulse_railway.railway.api import Api, ApiError
from pulse_railway.railway.tokens import Token
from tests.net import Backend, Connection, header, ok

QUERY, MUTATION = "query Q { me { name } }", "mutation M { serviceDelete(id: 1) }"
Make = Callable[[str], Api]


@pytest.fixture
def waits() -> list[str]:
    return []


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, waits: list[str]) -> Make:
    monkeypatch.setattr(api_module, "FIRST_PAUSE", 0.001)

    def make(url: str) -> Api:
        monkeypatch.setenv(contract.API_URL_VARIABLE, url)
        made = Api(Token("token-value", "flag"), on_wait=waits.append)
        made._scope_is_read = True  # an account's
        return made

    return make


@pytest.fixture
def railway() -> Iterator[Backend]:
    with Backend(ok(b'{"data": {"me": 1}}')) as backend:
        yield backend


def says(status: str, body: bytes = b"{}", *lines: str) -> bytes:
    return ok(body, *lines, status=status)


def test_nobody_listens(client: Make, waits: list[str]) -> None:
    api = client(f"http://127.0.0.1:{free_port()}")
    for document in (QUERY, MUTATION):  # nothing was sent, so that both are tried again
        waits.clear()
        with pytest.raises(Failure, match="Railway's API is not reachable: ") as failed:
            api.call(document)
        assert not isinstance(failed.value, Uncertain)
        assert len(waits) == api_module.ATTEMPTS - 1
        assert waits[0].startswith("Railway is not reachable; trying again in")


def test_an_answer_that_does_not_come(client: Make) -> None:
    sent = []

    def cut(c: Connection) -> None:
        head = c.head()
        c.read(int(header(head, "content-length") or 0))
        sent.append(head)

    with Backend(handle=cut) as railway:
        api = client(railway.address)
        with pytest.raises(Failure, match="Railway's API does not answer: "):
            api.call(QUERY)
        assert len(sent) == api_module.ATTEMPTS
        with pytest.raises(Uncertain, match="Railway's answer was lost: "):
            api.call(MUTATION)
        assert len(sent) == api_module.ATTEMPTS + 1  # it may have been carried out


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (says("401 Unauthorized"), "does not accept the token"),
        (says("403 Forbidden", b"<html>"), "does not accept the token"),
        (
            says("404 Not Found"),
            "Railway answered 404, which is no answer of its API: is PULSE_RAILWAY",
        ),
        (
            ok(b"<html>Welcome to the hotel's network</html>"),
            "answered 200, which is no answer of its API",
        ),
        (ok(b"[" * 100_000), "answered 200, which is no answer of its API"),
        (ok(b"{}"), "answered 200, which is no answer of its API"),
        (ok(b'{"data": null}'), "answered 200, which is no answer of its API"),
        (ok(b'{"data": {}}'), "answered 200, which is no answer of its API"),
        (ok(b'{"ok": true}'), "answered 200, which is no answer of its API"),
        (ok(b'{"errors": [{"message": "no such thing"}]}'), "^Railway: no such thing$"),
        (ok(b'{"errors": ["odd"], "data": {"me": 1}}'), "^Railway: odd$"),
        (ok(b'{"errors": [{"message": "Not Authorized"}]}'), "token from flag"),
        (says("429 Too Many Requests", b"{}", "retry-after: 4000"), "asks to wait 4000 s"),
    ],
)
def test_what_railway_may_answer(client: Make, railway: Backend, answer: bytes, said: str) -> None:
    railway.answer = answer
    for document in (QUERY, MUTATION):
        with pytest.raises(Failure, match=said):
            client(railway.address).call(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "errors", "message", "me", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=JSON, status=st.sampled_from(["200 OK", "400 Bad Request", "404 Not Found"]))
def test_no_json_is_a_surprise(client: Make, railway: Backend, body: object, status: str) -> None:
    """It is data, which is an object with something in it, or one line that says what is wrong."""
    railway.answer = says(status, json.dumps(body).encode())
    try:
        data = client(railway.address).call(QUERY)
    except ApiError:
        return
    assert isinstance(body, dict)
    assert data
    assert data == body["data"]
    assert not body.get("errors")
    assert status == "200 OK"


def test_a_rate_limit_with_a_date(client: Make, railway: Backend, waits: list[str]) -> None:
    """RFC 9110 section 10.2.3 has two forms; the one that Railway does not send is no surprise."""
    railway.answer = says("429 Slow down", b"{}", "retry-after: Wed, 21 Oct 2026 07:28:00 GMT")
    with pytest.raises(Failure, match="rate limit is used up; it asks to wait"):
        client(railway.address).call(MUTATION)
    assert len(waits) == api_module.ATTEMPTS - 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"errors": [{"message": "Something went wrong"}]}', "Something went wrong"),
        (b'{"data": {"serviceDelete": true}}', "does not say which services there are"),
        (b'{"data": {"environment": {}}}', "does not say which services there are"),
        (b'{"ok": true}', "which is no answer of its API"),
    ],
)
def test_deleted_is_what_railway_says_is(
    client: Make, railway: Backend, answer: bytes, said: str
) -> None:
    railway.answer = ok(answer)
    api, target = client(railway.address), config.Target("p", "e")
    with pytest.raises(Failure, match=said):
        services.delete_service(api, target, "s")
