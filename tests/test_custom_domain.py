"""Checks through the router's public address: who gets the internal token, and who does not."""

from __future__ import annotations

import types
from typing import Any

import pytest

from pulse_railway import contract
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure
from pulse_railway.flows import reachability
from pulse_railway.stack import Service, Stack
from tests.conftest import Project, play
from tests.net import Backend, header, ok
from tests.users import LiveSite

TOKEN = "the-internal-token"
NAME = contract.INTERNAL_TOKEN_HEADER
MAINTENANCE = ok(b'{"detail": "maintenance"}', status="503 Service Unavailable")
FOR_PEOPLE = ok(b"<h1>Back soon", "content-type: text/html", status="503 Service Unavailable")
STALE = ok(b'{"detail": "stale affinity"}', f"{contract.STALE_HEADER}: 1", status="409 Conflict")
SERVED = ok(b'{"deployment_id": "new"}', f"{contract.SELECTED_HEADER}: new")


class Front(Backend):
    """A server at an address of the router, which keeps the heads of what it is asked."""

    def __init__(self, closed: bytes | None) -> None:
        def handle(connection: Any) -> None:
            while head := connection.head():
                self.heads.append(head)
                if closed is None or header(head, NAME) == TOKEN:
                    connection.send(SERVED)
                elif closed is MAINTENANCE and b"text/html" in head:
                    connection.send(FOR_PEOPLE)
                else:
                    connection.send(closed)

        super().__init__(handle=handle)

    @property
    def tokens(self) -> list[str | None]:
        return [header(head, NAME) for head in self.heads]


def stack_at(custom: Backend, own: Backend | None) -> Any:
    return types.SimpleNamespace(
        address=custom.address,
        railway_address=own.address if own else None,
        router=types.SimpleNamespace(variables={contract.INTERNAL_TOKEN: TOKEN}),
        edge_failed=False,
    )


def check(stack: Any, kind: str, preview: bool) -> list[str]:
    """Do one of a deploy's checks, and return what the user was warned of."""
    warnings: list[str] = []
    output: Any = types.SimpleNamespace(warn=warnings.append)
    api: Any = None
    if kind == "page":
        reachability.wait_until_rendered(api, stack, "new", "/", output, preview)
    else:
        reachability.wait_until_reachable(
            api,
            stack,
            "new",
            output,
            by_affinity=kind == "by affinity",
            preview=preview,
            timeout=reachability.ROUTED_TIMEOUT,
        )
    return warnings


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a control command says of the deployment; it can be changed."""
    answer: dict[str, Any] = {"at": "answers", "active": "new", "status": 200}
    monkeypatch.setattr(reachability, "send_probe", lambda *_: answer)
    return answer


KINDS = pytest.mark.parametrize("kind", ["by affinity", "active", "page"])


@KINDS
@pytest.mark.parametrize(("closed", "preview"), [(MAINTENANCE, False), (STALE, True)])
def test_a_custom_domain_gets_no_internal_token(kind: str, closed: bytes, preview: bool) -> None:
    """It was sent with each request, to whoever answers there."""
    with Front(closed) as custom, Front(closed) as own:
        assert check(stack_at(custom, own), kind, preview) == []
        assert set(custom.tokens) == {None}
        assert set(own.tokens) == {TOKEN}
        paths = {head.split()[1] for head in custom.heads} - {b"/_pulse/meta"}
        assert {head.split()[1] for head in own.heads} <= paths | {b"/_pulse/meta"}


@KINDS
def test_the_token_is_sent_after_a_maintenance_answer_only(kind: str) -> None:
    with Front(None) as own:
        assert check(stack_at(own, own), kind, False) == []
        assert set(own.tokens) == {None}
    with Front(MAINTENANCE) as own:
        assert check(stack_at(own, own), kind, False) == []
        assert own.tokens[0] is None
        assert TOKEN in own.tokens


@KINDS
@pytest.mark.parametrize(
    "answer",
    [STALE, ok(b"maintenance", status="503 No"), ok(b'{"detail": "x"}', status="503 No")],
)
def test_no_other_answer_gets_it(
    kind: str, answer: bytes, monkeypatch: pytest.MonkeyPatch, inside: dict[str, Any]
) -> None:
    for limit in ("ROUTED_TIMEOUT", "PAGE_TIMEOUT", "EDGE_TIMEOUT"):
        monkeypatch.setattr(reachability, limit, 0.2)
    inside |= {"at": "unreachable", "status": 502}
    with Front(answer) as own:
        with pytest.raises(Failure):
            check(stack_at(own, own), kind, False)
        assert set(own.tokens) == {None}


@KINDS
@pytest.mark.parametrize(
    ("closed", "preview", "why"),
    [(MAINTENANCE, False, "the site is in maintenance"), (STALE, True, "it is a preview")],
)
def test_a_custom_domain_alone(
    kind: str, closed: bytes, preview: bool, why: str, inside: dict[str, Any]
) -> None:
    """The check is left out, in one line; what is asked inside has to be right."""
    with Front(closed) as custom:
        (warning,) = check(stack_at(custom, None), kind, preview)
        assert f"was not checked at {custom.address}, since {why}, and the internal" in warning
        assert set(custom.tokens) == {None}


def test_a_custom_domain_alone_and_a_version_that_is_down(
    inside: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reachability, "PAGE_TIMEOUT", 0.2)
    inside["status"] = 502
    with Front(MAINTENANCE) as custom:
        with pytest.raises(Failure, match="gave inside it gave 502"):
            check(stack_at(custom, None), "page", False)
        assert set(custom.tokens) == {None}


def test_which_address_is_railways() -> None:
    router = Service(
        "r", "", "pulse-router", "", None, {}, ["shop.example", "x.up.railway.app"], None, None
    )
    stack = Stack(Target("p", "e"), Names(), {"pulse-router": router})
    assert (stack.address, stack.railway_address) == ("https://shop.example", None)
    router.railway_domains = ["x.up.railway.app"]
    assert stack.railway_address == "https://x.up.railway.app"


# -- on a local Railway ---------------------------------------------------------------------------


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("base")
def test_deploys_while_the_site_is_closed(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def step_01_in_maintenance(base: Project) -> None:
    base.ok("maintenance", "on")
    assert base.ok("deploy", "main.py", "--deployment-id", "closed")["active"] is True
    base.ok("deploy", "main.py", "--deployment-id", "shown", "--preview")
    assert base.ok("promote", "--deployment-id", "shown")["active"] is True
    base.ok("maintenance", "off")
    assert LiveSite(base).visited == "shown"


def step_02_a_preview(base: Project) -> None:
    base.ok("deploy", "main.py", "--deployment-id", "next", "--preview")
    assert base.ok("redeploy", "--deployment-id", "next")["deployment_id"] == "next"
    assert base.ok("promote", "--deployment-id", "next")["active"] is True
