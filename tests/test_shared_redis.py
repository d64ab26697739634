"""A Redis outside of the project: the owner of its routing state, and a copy of the environment.

The steps share one local Railway, each in the state that the one before has left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import peer
from pulse_railway import contract
from pulse_railway.config import Names, Target
from pulse_railway.flows import owner
from pulse_railway.flows.deploy import backend_variables
from pulse_railway.output import Output
from pulse_railway.stack import Service, Stack
from tests.conftest import TINY, Project, Redis, Verb, play
from tests.net import eventually
from tests.test_interop import published
from tests.test_local_environments import create, delete, has_settled, pids

OWNER = "pulse:railway:owner"
NOBODYS = "a routing state without an owner (prefix pulse:railway, first is active)"


class Shared:
    """The project, its copy, and their Redis."""

    def __init__(self, project: Project, redis: Redis) -> None:
        self.project, self.url, self.client = project, redis.url, redis.client
        self.copy = project

    @property
    def stamp(self) -> str:
        service = self.project.stage.services()["pulse-router"]["serviceId"]
        return f"{self.project.environment}/{service}"

    def ensure(self, *flags: str) -> Verb:
        verb = self.project.run("ensure", "main.py", *flags)
        assert verb.code == 0, verb.err
        return verb

    def state(self, of_copy: bool = False) -> dict[str, Any]:
        """Return the original's keys, or the copy's, without the routers' reports."""
        prefix = f"pulse:railway:{self.copy.environment}:"
        keys = (key for key in self.client.scan_iter("*") if ":router:" not in key)
        return {k: self.client.get(k) for k in sorted(keys) if k.startswith(prefix) == of_copy}


@pytest.fixture(scope="module")
def shared(project: Project) -> Iterator[Shared]:
    server = Redis()
    yield Shared(project, server)
    server.stop()


def test_an_external_redis(shared: Shared, request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def step_01_a_state_without_an_owner_is_not_claimed(shared: Shared) -> None:
    record = {"deployment_id": "first", "state": "active", "address": "http://127.0.0.1:9"}
    shared.client.set("pulse:railway:deployment:first", json.dumps(record))
    shared.client.set("pulse:railway:active", "first")
    said = shared.ensure("--redis-url", shared.url, "--json")
    assert NOBODYS in said.err
    assert any(NOBODYS in warning for warning in said.json["warnings"])
    assert "go by the janitor" not in said.err, "though there is a key for ssh"
    assert "`pulse-railway ensure --owns-state" in said.err
    assert "uses it too" not in said.err
    other = shared.project.duplicate("staging", skipInitialDeploys=True)
    assert f"{NOBODYS}, and staging of this project uses it too" in shared.ensure().err
    other.delete_environment()
    assert "has no service" in shared.project.janitor()["refused"]
    assert not shared.client.exists(OWNER)


def step_02_owns_state_claims_it(shared: Shared) -> None:
    said = shared.ensure("--owns-state")
    assert "PULSE_RAILWAY_OWNS_STATE unset -> 1" in said.err
    assert "pulse-router: deploy" not in said.err
    assert shared.client.get(OWNER) == shared.stamp
    assert "nothing to change; the baseline is up" in shared.ensure().err
    warnings = shared.ensure("--json").json["warnings"]
    assert [w for w in warnings if "the janitor's Railway token" not in w] == []


def step_03_other_owners(shared: Shared) -> None:
    gone = f"{shared.project.environment}/gone"
    shared.client.set(OWNER, gone)
    said = shared.ensure("--owns-state").err
    assert f"was of a router that is gone ({gone}), and is this stack's now" in said
    assert shared.client.get(OWNER) == shared.stamp
    shared.client.set(OWNER, "elsewhere/router")
    said = shared.ensure("--owns-state").err
    assert "belongs to another stack (elsewhere/router," in said
    assert shared.client.get(OWNER) == "elsewhere/router"
    shared.client.set(OWNER, shared.stamp)


def step_04_another_versions_deploy_in_a_copy(shared: Shared, tmp_path: Any) -> None:
    """Both this version and 0.3.13 refuse before the copy's `ensure`."""
    shared.project.deploy("one")
    before = shared.state()
    shared.copy = copy = shared.project.duplicate("staging")
    eventually(lambda: has_settled(copy), 60)
    assert f"a copy of {shared.project.environment}" in copy.run("deploy", "main.py").err
    app = peer.write_app(TINY, tmp_path / "app")
    where = ("--project-id", copy.id, "--environment-id", copy.environment)
    words = ("deploy", "main.py", "--deployment-id", "old-1", *where)
    redis = create(copy, "pulse-redis")  # without which 0.3.13 deploys nothing
    done = published(copy, *words, cwd=app)
    assert done.returncode != 0
    assert "is a copy of" in done.stdout + done.stderr
    delete(copy, redis)
    for left in copy.services - shared.project.services:  # as 0.3.13 leaves it
        delete(copy, copy.stage.services()[left]["serviceId"])
    assert copy.janitor()["exit"] == 1
    assert shared.state() == before
    assert shared.project.get("/_pulse/meta")["deployment_id"] == "one"


def step_05_a_copy_beside_the_original(shared: Shared) -> None:
    """Neither changes the other's keys in a deploy, a drain or a TTL's renewal."""
    project, copy = shared.project, shared.copy
    before, processes = shared.state(), pids(project)
    copy.ok("ensure", "main.py")
    router = copy.variables("pulse-router")
    assert router[contract.REDIS_PREFIX] == f"pulse:railway:{copy.environment}"
    assert router[contract.KEY_TTL] == "86400"
    assert not router[contract.OWNS_STATE]
    copy.janitor()
    assert shared.client.get(f"{router[contract.REDIS_PREFIX]}:owner") == router[contract.STACK]
    for name in ("copied-1", "copied-2"):
        copy.deploy(name)
    eventually(lambda: "copied-1" in copy.janitor()["deleted"], 20)
    assert copy.get("/_pulse/meta")["deployment_id"] == "copied-2"
    assert shared.state() == before
    assert pids(project) == processes
    of_copy = shared.state(of_copy=True)
    assert f"pulse:railway:{copy.environment}:active" in of_copy
    assert all(0 < shared.client.ttl(key) <= 86_400 for key in of_copy)
    for key in of_copy:
        shared.client.expire(key, 100)
    assert copy.janitor()["exit"] == 0  # the copy's router renews them
    assert all(86_000 < shared.client.ttl(key) <= 86_400 for key in of_copy)

    project.deploy("two")
    eventually(lambda: "one" in project.janitor()["deleted"], 20)
    assert project.get("/_pulse/meta")["deployment_id"] == "two"
    assert {shared.client.ttl(key) for key in shared.state()} == {-1}
    assert copy.get("/_pulse/meta")["deployment_id"] == "copied-2"
    assert copy.ok("ensure", "main.py")["changed"] == []


def step_06_the_keys_of_a_deleted_copy_expire(shared: Shared) -> None:
    before = shared.state()
    shared.copy.delete_environment()
    assert shared.project.janitor()["exit"] == 0
    left = shared.state(of_copy=True)
    assert all(0 < shared.client.ttl(key) <= 86_400 for key in left)
    for key in left:
        shared.client.pexpire(key, 1)
    eventually(lambda: not shared.state(of_copy=True))
    its_run = {"pulse:railway:janitor:run": shared.state()["pulse:railway:janitor:run"]}
    assert shared.state() == before | its_run
    assert shared.project.get("/_pulse/meta")["deployment_id"] == "two"


# -- without a Railway -----------------------------------------------------------------------------


def a_stack(**of_router: str) -> Stack:
    router = Service("r", "", "pulse-router", "", None, {}, ["site.example"], None, None, of_router)
    env = Service("v", "", "pulse-env", "", None, {}, [], None, None)
    return Stack(Target("p", "e-copy"), Names(), {"pulse-router": router, "pulse-env": env})


def test_a_deploy_in_a_copy_has_its_own_session_scope() -> None:
    app = SimpleNamespace(file="main.py", uses_session_store=True)
    options = SimpleNamespace(
        server_address=None,
        deployment_id="x",
        build_args={},
        env={},
        deployment_name="x",
        instances=1,
    )
    plan: Any = SimpleNamespace(app=app, options=options, deployment_id="x", is_source=False)
    variables = backend_variables(plan, a_stack(**{contract.KEY_TTL: "86400"}))
    assert variables[contract.SESSION_SCOPE] == "e-copy"
    assert variables[contract.KEY_TTL] == f"${{{{pulse-router.{contract.KEY_TTL}}}}}"
    variables = backend_variables(plan, a_stack())
    assert not {contract.SESSION_SCOPE, contract.KEY_TTL} & variables.keys()
    app.uses_session_store = False
    variables = backend_variables(plan, a_stack(**{contract.KEY_TTL: "86400"}))
    assert not {contract.SESSION_SCOPE, contract.KEY_TTL} & variables.keys()


@pytest.mark.parametrize(
    ("answer", "sharing", "ours"),
    [
        (True, [], True),
        (True, ["staging"], True),
        (False, [], False),
        (None, [], False),
        (True, None, False),  # the token does not show the other environments
    ],
)
def test_the_user_is_asked_for_the_owner_of_a_state(
    monkeypatch: pytest.MonkeyPatch, answer: bool | None, sharing: list[str] | None, ours: bool
) -> None:
    monkeypatch.setattr(owner, "environments_with_same_state", lambda *_: sharing)
    asked: list[str] = []

    def ask(question: str) -> bool | None:
        asked.append(question)
        return answer

    api: Any = None
    assert owner.ask_user(api, a_stack(), "first", Output(), ask) is ours
    assert asked[:1] == ([] if sharing is None else asked)
    assert all(question.endswith(". Is it this stack's?") for question in asked)
    assert all(("staging" in question) == bool(sharing) for question in asked)


def test_a_project_token_does_not_show_other_environments() -> None:
    api: Any = SimpleNamespace(is_project_token=True)
    assert owner.environments_with_same_state(api, a_stack()) is None
