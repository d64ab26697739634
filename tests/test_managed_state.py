"""A Redis of the project whose routing state names another owner, or that does not answer: what
`ensure` and `restore` do.

The steps share one local Railway, each in the state that the one before has left.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pulse_railway import contract, router_commands
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure
from pulse_railway.flows import owner
from pulse_railway.stack import Service, Stack, check_redis_prefix
from tests.conftest import Project, play
from tests.net import eventually
from tests.test_by_hand import remove

OWNER = "pulse:railway:owner"
ROUTER_GONE = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(scope="module")
def own(project: Project) -> Project:
    project.ok("ensure", "main.py")
    project.deploy("one")
    return project


def test_a_managed_redis(own: Project, request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def stamp(project: Project) -> str:
    return f"{project.environment}/{project.stage.services()['pulse-router']['serviceId']}"


def set_owner(project: Project, text: str) -> None:
    project.redis.set(OWNER, text)
    project.redis.publish("pulse:railway:events", "[]")


def step_01_an_older_snapshot_has_the_deleted_routers_state(own: Project) -> None:
    """`ensure` said that there was nothing to change, and `status` advised `ensure`."""
    own.janitor()
    deleted, snapshot = stamp(own), own.snapshot()
    assert own.redis.get(OWNER) == deleted
    remove(own, "pulse-router")
    assert own.run("ensure", "main.py", "--repair").code == 0
    assert own.redis.get(OWNER) == stamp(own) != deleted
    own.restore_snapshot(snapshot)
    eventually(lambda: own.redis.get(OWNER) == deleted)
    assert "belongs to another stack" in own.run("maintenance", "on").error
    done = own.run("ensure", "main.py")
    assert f"was of a router that is gone ({deleted}), and is this stack's now" in done.err
    assert "It holds one" in done.err
    assert own.redis.get(OWNER) == stamp(own)
    assert own.janitor()["exit"] == 0
    assert "nothing to change; the baseline is up" in own.run("ensure", "main.py").err


def step_02_other_owners(own: Project) -> None:
    for text, said in (
        (f"another-environment/{ROUTER_GONE}", "was of another stack (another-environment/"),
        ("not a stamp", "was of an owner that is not valid"),
    ):
        set_owner(own, text)
        assert f"{said}" in own.run("ensure", "main.py").err
        assert own.redis.get(OWNER) == stamp(own)


def step_03_restore(own: Project) -> None:
    set_owner(own, f"{own.environment}/{ROUTER_GONE}")
    done = own.run("restore")
    assert done.code == 0, done.err
    assert "was of a router that is gone" in done.err
    assert own.redis.get(OWNER) == stamp(own)
    eventually(lambda: own.ok("status")["problems"] == [], 20)


def step_04_a_changed_password(own: Project) -> None:
    own.redis.config_set("requirepass", "rotated")
    said = own.run("ensure", "main.py").err
    assert "pulse-redis refuses the password that pulse-router was started with" in said
    assert "`railway redeploy --service pulse-router`" in said
    assert "the baseline is up" not in said


def step_05_a_stopped_redis(own: Project) -> None:
    stop = "mutation ($d: String!) { deploymentRemove(id: $d) }"
    own.railway.graphql(stop, d=own.latest("pulse-redis")["id"])
    said = own.run("ensure", "main.py").err
    assert "`railway redeploy --service pulse-redis` starts it" in said
    assert "the baseline is up" not in said


# -- without a Railway -----------------------------------------------------------------------------

REFERENCE = "${{pulse-redis.REDIS_URL}}"


def a_stack(other_url: str, managed: bool = True, prefix: str = "p") -> Stack:
    """A stack, and another one's router with this REDIS_URL."""
    url = {contract.REDIS_URL: REFERENCE if managed else "redis://h", contract.REDIS_PREFIX: "p"}
    services = {
        name: Service(name, "", name, "", None, {}, [], None, None, dict(url))
        for name in ["pulse-router", *(["pulse-redis"] if managed else [])]
    }
    theirs = {contract.STACK: "e/other", contract.REDIS_URL: other_url}
    theirs[contract.REDIS_PREFIX] = prefix
    other = Service("other", "", "shop-router", "", None, {}, [], None, None, theirs)
    return Stack(Target("p", "e"), Names(), services, others=[other])


@pytest.mark.parametrize(
    ("stack", "of", "flag", "claimed"),
    [
        (a_stack(REFERENCE), "e/other", True, False),  # it exists, and uses the state
        (a_stack("redis://x@pulse-redis.railway.internal:6379"), "e/other", True, False),
        (a_stack("${{shop-redis.REDIS_URL}}"), "e/other", False, True),
        (a_stack(REFERENCE, prefix="q"), "e/other", False, True),
        (a_stack("${{shop-redis.REDIS_URL}}"), "e/gone", False, True),
        (a_stack("${{shop-redis.REDIS_URL}}"), "production/r", False, True),
        (a_stack("${{shop-redis.REDIS_URL}}"), None, False, True),
        (a_stack(REFERENCE), "e/gone", False, False),  # another router uses it too
        (a_stack(REFERENCE), "e/gone", True, True),
        (a_stack(REFERENCE), "production/r", False, False),
        (a_stack(REFERENCE), None, False, False),
        (a_stack("redis://i", managed=False), "production/r", True, False),
        (a_stack("redis://i", managed=False), "e/other", True, False),
        (a_stack("redis://i", managed=False), "e/gone", False, True),
        (a_stack("redis://h", managed=False), "e/gone", False, False),
    ],
)
def test_whose_state_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, stack: Stack, of: str | None, flag: bool, claimed: bool
) -> None:
    claims: list[str | None] = []

    def claim(_: Any, __: Stack, instead_of: str | None = None) -> None:
        claims.append(instead_of)

    monkeypatch.setattr(router_commands, "send_claim", claim)
    warned: list[str] = []
    output: Any = SimpleNamespace(warn=warned.append)
    api: Any = None
    state = {"owner": of, "deployments": [{"deployment_id": "one"}]}
    assert owner.take_over_state(api, stack, state, output, flag) is claimed
    assert claims == ([of] if claimed else [])
    assert len(warned) == 1
    assert ("is this stack's now. It holds one" in warned[0]) == claimed


def test_a_copys_stored_prefix_is_no_contradiction() -> None:
    stack = a_stack("")
    assert stack.router
    stack.router.variables[contract.REDIS_PREFIX] = "pulse:railway:e"
    for prefix in ("pulse:railway:e", "pulse:railway", None):
        check_redis_prefix(stack, prefix)
    with pytest.raises(Failure, match="set up with --redis-prefix pulse:railway"):
        check_redis_prefix(stack, "else")
