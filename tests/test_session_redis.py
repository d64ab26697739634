"""`ensure --session-redis-url`: apps' sessions in another Redis than the routing state."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import redis

from pulse_railway import RailwaySessionStore, contract, options
from pulse_railway.config import Names, Target, Where
from pulse_railway.errors import Failure
from pulse_railway.flows.baseline import session_variables
from pulse_railway.flows.deploy import backend_variables
from pulse_railway.options import session_redis_problem
from pulse_railway.output import Output
from pulse_railway.stack import Service, Stack, address_without_secrets
from tests.conftest import ROOT, TINY, Project, Redis, play
from tests.test_session import use

VARIABLE = contract.SESSION_REDIS_URL
PAGE = ROOT / "docs" / "session-redis.md"
URL = "redis://app:s3cret-app-pass@sessions.example:6380/2"
WRONG = ["host", "redis://", "redis://u:p#x@h", "http://u:s3cret-app-pass@h", '"redis://h"']


# -- an app that may write sessions alone ----------------------------------------------------------


@pytest.fixture
def app_url(redis_server: Redis) -> Iterator[str]:
    """The address of a Redis for a user with the ACL of the docs."""
    line = re.search(r"`(ACL SETUSER .*?)`", PAGE.read_text())
    assert line
    redis_server.client.execute_command(*line[1].replace("PASSWORD", "app-pass").split())
    yield redis_server.url.replace("redis://", "redis://sessions:app-pass@")
    redis_server.client.acl_deluser("sessions")


def test_the_acl_in_the_docs_suffices_for_sessions(app_url: str, redis_server: Redis) -> None:
    def used(*steps: Any) -> list[Any]:
        store = RailwaySessionStore(app_url, ttl=1000)  # with an empty memory
        return asyncio.run(use(store, *steps))

    used(lambda s: s.create("sid"), lambda s: s.save("sid", {"count": 3}))
    assert redis_server.client.get("pulse:session:sid")
    assert 900 < int(str(redis_server.client.ttl("pulse:session:sid"))) <= 1000
    assert used(lambda s: s.get("sid")) == [{"count": 3}]
    used(lambda s: s.get("sid"), lambda s: s.save("sid", {"count": 4}))
    assert used(lambda s: s.get("sid")) == [{"count": 4}]
    used(lambda s: s.get("sid"), lambda s: s.delete("sid"))
    assert redis_server.client.get("pulse:session:sid") is None
    assert redis_server.client.get("pulse:session:sid:deleted")


@pytest.mark.parametrize(
    "command",
    [
        "SET pulse:railway:active evil",
        "SET pulse:railway:deployment:x {}",
        "GET pulse:railway:active",
        "DEL pulse:railway:active",
        "PUBLISH pulse:railway:events []",
        "SUBSCRIBE pulse:railway:events",
        "SCAN 0",
        "KEYS *",
        "FLUSHALL",
        "CONFIG GET *",
        "ACL LIST",
        "EVAL return(1) 0",
        "RENAME pulse:session:a pulse:railway:active",
        "COPY pulse:session:a pulse:railway:active",
        "MOVE pulse:session:a 1",
        "CLIENT KILL ID 1",
        "MONITOR",
        "SHUTDOWN NOSAVE",
    ],
)
def test_the_acl_in_the_docs_keeps_an_app_from_the_routing_state(
    app_url: str, redis_server: Redis, command: str
) -> None:
    redis_server.deployment("a", None)
    before = redis_server.client.get("pulse:railway:active")
    client = redis.Redis.from_url(app_url)
    client.set("pulse:session:a", "x")
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())
    assert redis_server.client.get("pulse:railway:active") == before


# -- the flag --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_address_is_refused_before_anything_is_made(url: str) -> None:
    flags = {"app": "examples/railway/main.py", "session_redis_url": url}
    with pytest.raises(Failure, match="--session-redis-url is wrong: ") as refused:
        options.parse_baseline(flags, Output())
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "redis://sessions.example:6380/2"),
        ("rediss://:pw@h/", "rediss://h:6379"),
        ("redis://[::1]:1?ssl_cert_reqs=none", "redis://[::1]:1"),
        ("${{sessions.REDIS_URL}}", "${{sessions.REDIS_URL}}"),
        ("redis://u:s3cr#t@h", "an address that is wrong"),
    ],
)
def test_an_address_is_shown_without_secrets(url: str, shown: str) -> None:
    assert address_without_secrets(url) == shown


def test_a_copys_sessions_have_keys_of_their_own() -> None:
    """Its env service has the original's address."""
    env = Service("e", "", "pulse-env", "", None, {}, [], None, None, {VARIABLE: URL})
    stack = Stack(Target("p", "e-copy"), Names(), {"pulse-env": env}, copied_from="e")
    given = options.BaselineOptions(Where(), Names())
    assert session_variables(stack, given) == {
        VARIABLE: URL,
        contract.SESSION_SCOPE: "e-copy",
        contract.KEY_TTL: "86400",
    }
    assert session_variables(Stack(stack.target, Names(), {"pulse-env": env}), given) == {
        VARIABLE: URL
    }
    assert session_variables(Stack(stack.target, Names(), {}), given) == {}
    env.variables |= {contract.SESSION_SCOPE: "e-copy", contract.KEY_TTL: "86400"}
    plan = Mock(is_source=False)
    plan.options = Mock(
        build_args={}, env={}, server_address="https://x", deployment_id="a", instances=1
    )
    of_backend = backend_variables(plan, stack)
    assert of_backend[VARIABLE] == f"${{{{pulse-env.{VARIABLE}}}}}"
    assert of_backend[contract.SESSION_SCOPE] == "e-copy"
    assert of_backend[contract.KEY_TTL] == f"${{{{pulse-env.{contract.KEY_TTL}}}}}"


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("base", "shop")
def test_on_a_stack(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny app with sessions in Redis."""
    folder = tmp_path_factory.mktemp("shop") / "app"
    shutil.copytree(TINY, folder)
    text = (folder / "main.py").read_text()
    text = text.replace("ps.InMemorySessionStore()", "RailwaySessionStore()")
    text = text.replace("import RailwayPlugin,", "import RailwayPlugin, RailwaySessionStore,")
    (folder / "main.py").write_text(text)
    return folder


def deployed(project: Project, folder: Path, name: str) -> str:
    verb = project.run("deploy", "main.py", "--deployment-id", name, cwd=folder)
    assert verb.code == 0, verb.err
    return project.variables(name)[VARIABLE]


def step_01_the_routers_without_it(base: Project, shop: Path) -> None:
    assert deployed(base, shop, "one") == "${{pulse-router.REDIS_URL}}"
    assert base.ok("status")["session_redis"] is None


def step_02_a_wrong_one_changes_nothing(base: Project) -> None:
    before = base.variables("pulse-env")
    for wrong in WRONG:
        refused = base.run("ensure", "main.py", "--session-redis-url", wrong)
        assert "--session-redis-url is wrong" in refused.error
        assert "s3cret" not in refused.err
    assert base.variables("pulse-env") == before


def step_03_it_is_kept(base: Project, shop: Path) -> None:
    verb = base.run("ensure", "main.py", "--session-redis-url", URL, "--json")
    assert verb.json["changed"] == [f"pulse-env: set {VARIABLE} (secret)"]
    assert base.ok("ensure", "main.py")["changed"] == []
    assert deployed(base, shop, "two") == f"${{{{pulse-env.{VARIABLE}}}}}"
    assert VARIABLE not in base.variables("first")
    router = base.variables("pulse-router") | base.variables("pulse-janitor")
    assert "s3cret-app-pass" not in str(router)


def step_04_it_is_named_without_secrets(base: Project, shop: Path) -> None:
    shown = "redis://sessions.example:6380/2"
    assert base.ok("status")["session_redis"] == shown
    status = base.run("status")
    assert f"sessions in {shown}" in status.out
    doctor = base.run("doctor", "main.py", "--json", cwd=shop)
    checks = {c["name"]: (c["verdict"], c["said"]) for c in doctor.json["checks"]}
    assert checks["the Redis of the sessions"] == ("good", shown)
    for verb in (status, doctor, base.run("ensure", "main.py")):
        assert "s3cret-app-pass" not in verb.out + verb.err


def step_05_a_reference(base: Project, shop: Path) -> None:
    reference = "${{pulse-redis.REDIS_URL}}"
    base.ok("ensure", "main.py", "--session-redis-url", reference)
    assert deployed(base, shop, "three") == f"${{{{pulse-env.{VARIABLE}}}}}"
    rendered = base.railway.graphql(
        "query ($p: String!, $e: String!, $s: String!)"
        " { variables(projectId: $p, environmentId: $e, serviceId: $s) }",
        p=base.id,
        e=base.environment,
        s=base.stage.services()["three"]["serviceId"],
    )["variables"]
    assert rendered[VARIABLE].startswith("redis://")
    assert base.ok("status")["session_redis"] == reference


def step_06_somebody_changes_it(base: Project, shop: Path) -> None:
    base.stage.set_variables("pulse-env", {VARIABLE: "redis://u:s3cr#t@h"})
    doctor = base.run("doctor", "main.py", "--json", cwd=shop)
    assert "its address is wrong: a character of its password" in str(doctor.json)
    assert "s3cr" not in doctor.out
    assert session_redis_problem("${{sessions.REDIS_URL}}") is None
