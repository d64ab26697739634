"""`ensure --rotate`: a new internal token, while live versions hold the former one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

import control
import janitor
from pulse_railway import contract
from pulse_railway.config import Names, Target, Where
from pulse_railway.errors import Failure
from pulse_railway.flows.baseline import HELD_AT_LEAST, check_redis_mode, former_tokens
from pulse_railway.options import BaselineOptions
from pulse_railway.stack import Service, Stack
from router import Record, Routing
from tests.conftest import Project, Redis, play
from tests.net import Backend, header, ok
from tests.users import LiveSite

ONCE: dict[str, Any] = {}  # what a step leaves for the later ones
HEADER = contract.INTERNAL_TOKEN_HEADER


@pytest.fixture(scope="module")
def site(two: Project) -> LiveSite:
    return LiveSite(two)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_a_rotation(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def token_of(project: Project, service: str = "pulse-router") -> str:
    return project.variables(service)[contract.INTERNAL_TOKEN]


def status_of(project: Project, name: str, token: str) -> int:
    """Return the status that a version's sessions endpoint answers to a token, inside."""
    hosts = json.loads(Path(project.railway.root / f"hosts-{project.environment}.json").read_text())
    port = hosts[f"{name}.railway.internal"]["8000"]
    url = f"http://127.0.0.1:{port}{contract.SESSIONS_PATH}"
    return httpx.get(url, headers={HEADER: token}).status_code


def through(site: LiveSite, token: str) -> int:
    """Return the status of a visitor with this token during maintenance."""
    from examples import demo

    trust = demo.tls_context(site.project.stage.bundle)
    url = f"{site.address}/_pulse/meta"
    return httpx.get(url, headers={HEADER: token}, verify=trust, trust_env=False).status_code


def sessions(project: Project) -> dict[str, int | None]:
    return {r["deployment_id"]: r["sessions"] for r in project.ok("status")["deployments"]}


def step_01_the_token_is_replaced(site: LiveSite) -> None:
    project = site.project
    site.deploy("third", tabs=2)
    site.deploy("fourth", tabs=1)
    ONCE["old"] = old = token_of(project)
    planned = project.ok("ensure", "main.py", "--rotate", "--plan")["planned"]
    assert "pulse-router: set PULSE_RAILWAY_INTERNAL_TOKEN (secret)" in planned
    assert token_of(project) == old
    verb = project.run("ensure", "main.py", "--rotate")
    assert verb.code == 0, verb.err
    ONCE["new"] = new = token_of(project)
    assert new != old
    assert token_of(project, "pulse-janitor") == new
    assert "fourth, second, third keep the former internal token" in verb.err.replace("first, ", "")
    assert old not in verb.out + verb.err
    assert new not in verb.out + verb.err
    assert project.ok("ensure", "main.py")["changed"] == []


def step_02_the_live_versions_go_on(site: LiveSite) -> None:
    project = site.project
    assert sessions(project)["third"] == 2
    assert sessions(project)["fourth"] == 1
    assert project.ok("status")["problems"] == []
    assert status_of(project, "third", ONCE["old"]) == 200
    report = project.janitor()
    assert report["kept"]["third"] == "2 sessions"
    assert (report["exit"], report["failed"]) == (0, {})
    assert "third" in project.services


def step_03_a_new_version_has_the_new_one(site: LiveSite) -> None:
    project = site.project
    site.deploy("fifth", tabs=1)
    assert status_of(project, "fifth", ONCE["new"]) == 200
    assert status_of(project, "fifth", ONCE["old"]) == 403
    assert sessions(project)["fifth"] == 1
    assert project.janitor()["kept"]["fourth"] == "1 sessions"


def step_04_the_former_one_opens_no_router(site: LiveSite) -> None:
    project = site.project
    project.ok("maintenance", "on")
    assert through(site, ONCE["old"]) == 503
    assert through(site, ONCE["new"]) == 200
    project.ok("maintenance", "off")


def step_05_the_drain_ends_with_the_last_tab(site: LiveSite) -> None:
    project = site.project
    (site.tabs / "third").write_text("0")
    assert project.janitor()["deleted"] == ["third"]
    assert {"fourth", "fifth"} <= project.services


def step_06_a_version_that_expires_is_told_to_reload(site: LiveSite) -> None:
    project = site.project
    site.change_record("fourth", drain_started_at=time.time() - 100_000)
    report = project.janitor()
    assert (report["deleted"], report["expired"]) == (["fourth"], ["fourth"])
    assert (site.tabs / "fourth.told").exists()


def step_07_a_redeployed_version_has_the_new_one(site: LiveSite) -> None:
    project = site.project
    project.ok("ensure", "main.py", "--rotate")
    assert status_of(project, "fifth", ONCE["new"]) == 200
    project.ok("redeploy", "--deployment-id", "fifth")
    assert status_of(project, "fifth", token_of(project)) == 200
    assert sessions(project)["fifth"] == 1


def step_08_an_interrupted_one_is_completed(site: LiveSite) -> None:
    """The router has the new one and the janitor does not yet."""
    project = site.project
    former = contract.FORMER_TOKENS
    kept = project.variables("pulse-janitor")
    router = project.variables("pulse-router")
    old = json.loads(router[former])
    (present,) = [t for t in old if t == ONCE["new"]]
    project.stage.set_variables(
        "pulse-janitor", {contract.INTERNAL_TOKEN: present, former: kept[former]}
    )
    project.ok("ensure", "main.py")
    assert (
        token_of(project, "pulse-janitor") == token_of(project) == router[contract.INTERNAL_TOKEN]
    )
    assert json.loads(project.variables("pulse-janitor")[former]).keys() == old.keys()
    assert project.ok("ensure", "main.py")["changed"] == []


# -- which token is tried, and what an answer means ------------------------------------------------


def asking(backend: Backend, registered_at: float | None = 5.0) -> Record:
    return Record("a", address=backend.address, registered_at=registered_at)


class Version(Backend):
    """A live version that holds one token."""

    def __init__(self, token: str) -> None:
        self.asked: list[str | None] = []

        def handle(connection: Any) -> None:
            while head := connection.head():
                self.asked.append(header(head, HEADER))
                right = self.asked[-1] == token
                body = b'{"render_session_count": 3, "reloaded_socket_count": 3}'
                connection.send(
                    ok(body if right else b"{}", status="200 OK" if right else "403 No")
                )

        super().__init__(handle=handle)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 10), max_size=4),
    st.sampled_from("abcde"),
    st.one_of(st.none(), st.floats(0, 10)),
)
def test_each_token_that_may_be_held_is_tried(
    former: dict[str, float], present: str, since: float | None
) -> None:
    """The one of the time at which the version was registered comes first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(control.FORMER_TOKENS, json.dumps(former))
        tried = control.tokens_of(Record("a", registered_at=since), present)
    assert sorted(tried) == sorted({*former, present})
    later = [token for token, until in former.items() if until > (since or 0.0)]
    if later:
        assert former[tried[0]] == min(former[token] for token in later)
    else:
        assert tried[0] == present


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": "b"}', '{"a": true}', '"a"'])
def test_a_variable_of_another_form_names_no_token(text: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(control.FORMER_TOKENS, text)
    assert control.tokens_of(Record("a"), "t") == ["t"]


def test_a_version_is_asked_with_the_token_that_it_holds(monkeypatch: Any) -> None:
    monkeypatch.setenv(control.FORMER_TOKENS, json.dumps({"old": 10.0}))
    with Version("old") as old, Version("new") as new:
        assert control.sessions(asking(old), "new") == 3
        assert old.asked == ["old"]
        assert control.sessions(asking(new, 11.0), "new") == 3
        assert new.asked == ["new"]
        assert control.reload_tabs(asking(old), "new") == 3
        assert control.sessions(asking(old, 11.0), "new") == 3  # clocks differ
        assert old.asked == ["old", "old", "new", "old"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_version_is_deleted_for_a_refused_token(status: int) -> None:
    """It stays until its drain time is over."""
    with Backend(ok(b"{}", status=f"{status} No")) as backend:
        record = Record(
            "a", address=backend.address, state="draining", drain_started_at=50.0, registered_at=1.0
        )
        routing = Routing(active="b", records={"a": record}, now=100.0)
        run: Any = janitor.Run(
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            routing,
            janitor.Inventory([]),
            "token",
            janitor.Report(),
        )
        service = janitor.Backend("i", "a", "a", age=100.0)
        assert run.judge(record, service, 1000.0) == "keep: not answering"
        assert run.judge(record, service, 40.0) == "expired"
        assert control.sessions_answer(record, "t").get("wrong_token", False) is (status == 403)


# -- a Redis password ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("redis://u:old@h:6379", True),
        ("redis://u:new@h:6379", True),
        ("redis://other:new@h/", True),
        ("redis://u:old@h2:6379", False),
        ("redis://u:old@h:6380", False),
        ("redis://u:old@h:6379/1", False),
        ("rediss://u:old@h:6379", False),
    ],
)
def test_the_password_of_an_external_redis_can_be_replaced(url: str, same: bool) -> None:
    """`ensure` took any other address for another Redis."""
    variables = {contract.REDIS_URL: "redis://u:old@h:6379"}
    router = Service("r", "", "pulse-router", "", None, {}, [], None, None, variables)
    stack = Stack(Target("p", "e"), Names(), {"pulse-router": router})
    options = BaselineOptions(Where(), Names(), redis_url=url)
    if same:
        check_redis_mode(stack, options)
        return
    with pytest.raises(Failure, match="this stack uses another Redis"):
        check_redis_mode(stack, options)


def test_a_redis_password_is_replaced(
    new_project: Callable[[], Project], redis_server: Redis
) -> None:
    """In the order of docs/rotation.md: nobody notices."""
    project = new_project()
    redis_server.client.execute_command("ACL", "SETUSER", "default", ">old-pass")
    place = f"@127.0.0.1:{redis_server.port}/3"
    project.ok("ensure", "main.py", "--redis-url", f"redis://:old-pass{place}")
    project.deploy("one")
    admin = redis.Redis.from_url(f"redis://:old-pass{place}")
    admin.execute_command("ACL", "SETUSER", "default", ">new-pass")
    verb = project.run("ensure", "main.py", "--redis-url", f"redis://:new-pass{place}")
    assert verb.code == 0, verb.err
    assert "-pass" not in verb.err
    admin.execute_command("ACL", "SETUSER", "default", "<old-pass")
    project.deploy("two")
    status = project.ok("status")
    assert (status["active"], status["problems"]) == ("two", [])
    assert project.janitor()["exit"] == 0


# -- how long one is kept --------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e6), max_size=3),
    st.lists(st.floats(0, 1e6), max_size=3),
    st.sampled_from("abcd"),
    st.sampled_from("abcd"),
)
def test_a_token_is_kept_as_long_as_a_version_may_hold_it(
    ages: dict[str, float], backends: list[float], present: str, next_one: str
) -> None:
    """Ages in seconds: of the replacements, and of the versions' services."""
    now = time.time()
    former = {token: now - age for token, age in ages.items()}
    variables = {contract.INTERNAL_TOKEN: present, contract.FORMER_TOKENS: json.dumps(former)}
    services = {}
    for name, values in (("pulse-router", variables), ("pulse-janitor", variables)):
        services[name] = Service(name, "", name, "", None, {}, [], None, None, dict(values))
    for n, age in enumerate(backends):
        created = datetime.fromtimestamp(now - age, UTC).isoformat()
        of_deployment = {contract.DEPLOYMENT_ID: f"d{n}"}
        name = f"d{n}"
        services[name] = Service(
            name, "", name, created, None, {}, [], None, None, dict(of_deployment)
        )
    stack = Stack(Target("p", "e"), Names(), services)
    kept = former_tokens(stack, next_one)
    assert next_one not in kept
    if present != next_one:
        assert abs(kept[present] - now) < 60
    for token in former.keys() - {present, next_one}:
        margin = 60  # of this test
        if any(age + margin > ages[token] - HELD_AT_LEAST + 2 * margin for age in backends):
            assert kept[token] == former[token]
        if all(age < ages[token] - HELD_AT_LEAST - margin for age in [0.0, *backends]):
            assert token not in kept
    assert former_tokens(Stack(stack.target, stack.names, services, copied_from="x"), "n") == {}
