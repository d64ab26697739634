"""Whose a service is: the rules of ownership.py as a table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_railway import runtime_image

ownership: Any = runtime_image.load("ownership")
STACK, ID = ownership.STACK, ownership.DEPLOYMENT_ID


def service(name: str, **variables: str) -> Any:
    return ownership.ServiceVariables(f"id-{name}", name, variables)


def stamp(router: str, environment: str = "e") -> dict[str, str]:
    return {STACK: f"{environment}/id-{router}"}


def router(name: str, **more: str) -> Any:
    state = {"REDIS_URL": "redis://x", "PULSE_RAILWAY_REDIS_PREFIX": "p"}
    return service(name, **(state | more))


def backend(name: str, **more: str) -> Any:
    return service(name, **{ID: name, **more})


def token(of: str) -> dict[str, str]:
    return {"PULSE_RAILWAY_INTERNAL_TOKEN": f"${{{{{of}.PULSE_RAILWAY_INTERNAL_TOKEN}}}}"}


def literal(text: str) -> dict[str, str]:
    return {"PULSE_RAILWAY_INTERNAL_TOKEN": text}


def redis_of(name: str) -> dict[str, str]:
    return {"REDIS_URL": f"${{{{{name}.REDIS_URL}}}}"}


ONE, TWO = router("one-router"), router("two-router")
OF_ONE, GONE = ("stack", "id-one-router"), ("gone", "id-gone")
COPY, NOBODY = ("copy", "id-one-router"), ("nobody", None)


@pytest.mark.parametrize(
    ("found", "routers", "named", "expected"),
    [
        (backend("b"), [ONE], {}, OF_ONE),  # 0.3.x, one router
        (backend("b", **token("gone-router")), [ONE], {}, NOBODY),  # of another stack
        (backend("b", **token("gone-env")), [ONE, service("one-env")], {}, NOBODY),
        (backend("b", **token("gone-router")), [ONE], {"id-one-router": {"id-b"}}, OF_ONE),
        (
            backend("b", **redis_of("shared")),
            [router("one-router", **redis_of("shared"))],
            {},
            OF_ONE,
        ),
        # 0.3.x's, without a variable in the env service: the router's token as a literal
        (backend("b", **literal("a")), [router("one-router", **literal("a"))], {}, OF_ONE),
        (backend("b", **literal("b")), [router("one-router", **literal("a"))], {}, NOBODY),
        (backend("b", **literal("a")), [router("one-router", **literal("a")), TWO], {}, OF_ONE),
        (backend("b", **literal("a")), [router("one-router", **token("x"))], {}, OF_ONE),
        (backend("b"), [ONE, TWO], {}, NOBODY),
        (backend("b"), [], {}, NOBODY),
        (backend("b"), [ONE, TWO], {"id-one-router": {"id-b"}}, OF_ONE),
        (backend("b", **token("one-router")), [ONE, TWO], {}, OF_ONE),
        (backend("b", **token("one-env")), [ONE, TWO, service("one-env")], {}, OF_ONE),
        (service("one-env"), [ONE, TWO], {}, OF_ONE),  # edge-router -> edge-env
        (backend("b", **stamp("gone")), [ONE], {}, GONE),
        (backend("b", **stamp("gone")), [ONE], {"id-one-router": {"id-b"}}, GONE),
        (backend("b", **stamp("one-router", "other")), [ONE], {}, COPY),
        (ONE, [ONE, TWO], {}, OF_ONE),
        *[
            (backend("b", **{STACK: junk}), [ONE], {"id-one-router": {"id-b"}}, NOBODY)
            for junk in ("junk", "e/", "/r", "e/r/x", "e/r\n", "${{one-env.OTHER}}")
        ],
        # as 0.3.x's deploy leaves it, which refers to all that the env service has
        (
            backend("b", **{STACK: f"${{{{one-env.{STACK}}}}}"}),
            [ONE, TWO, service("one-env")],
            {},
            OF_ONE,
        ),
    ],
)
def test_whose_a_service_is(
    found: Any, routers: list[Any], named: dict[str, set[str]], expected: tuple[str, str | None]
) -> None:
    services = [*routers, *([] if found in routers else [found])]
    assert ownership.owners("e", services, named)[found.id] == ownership.Owner(*expected)


def test_nothing_is_advised_that_a_missing_router_refuses() -> None:
    """The janitor has once advised `restore` and `delete`, or to delete another's service."""
    names = ownership.StackNames("one-router", None, None, "one-env")
    found = backend("b", **stamp("gone"), **token("one-router"))
    gone = ownership.Owner(*GONE)
    own = ownership.unowned(found, gone, service("gone"), names, ()).words()
    assert "`pulse-railway ensure --repair`" in own
    assert "restore" not in own
    assert "delete --" not in own
    former = ownership.unowned(found, gone, service("new"), names, ()).words()
    assert "`pulse-railway restore --deployment-id b`" in former
    others = backend("b", **stamp("gone"))
    assert "delete --" not in ownership.unowned(others, gone, ONE, names, ()).words()


@pytest.mark.parametrize("variables", [{}, {STACK: "x"}, {STACK: "${{two-env.OTHER}}"}])
def test_a_backend_with_another_stacks_variables_is_not_offered(variables: dict[str, str]) -> None:
    """`status` has once offered `restore` and `delete` for it, where its stamp was invalid."""
    names = ownership.StackNames("one-router", None, None, "one-env")
    found = backend("b", **token("two-router"), **variables)
    existing = [ONE, TWO]
    entry = ownership.unowned(found, ownership.NOBODY, ONE, names, existing)
    assert not entry.related
    assert not entry.can_be_restored
    assert "restore" not in entry.words()
    assert "delete --" not in entry.words()
    own = backend("b", **token("one-env"), **{STACK: "x"})
    assert ownership.unowned(own, ownership.NOBODY, ONE, names, existing).can_be_restored
    # its stack has been deleted
    former = ownership.unowned(found, ownership.NOBODY, ONE, names, [ONE])
    assert former.can_be_restored
    of_two = {"PULSE_RAILWAY_JANITOR_SERVICE": "two-janitor", "PULSE_RAILWAY_SERVICE": "two-router"}
    left = [ONE, service("two-janitor", **of_two)]  # its router is to be created again
    assert not ownership.unowned(found, ownership.NOBODY, ONE, names, left).related
    left = [ONE, service("two-env", **stamp("two-router"))]  # which it does not refer to
    assert not ownership.unowned(found, ownership.NOBODY, ONE, names, left).related


def test_a_stamp_counts_for_more_than_what_a_state_names() -> None:
    routers = [router(n, **stamp(n)) for n in ("one-router", "two-router")]
    found = backend("b", **stamp("one-router"))
    whose = ownership.owners("e", [*routers, found], {"id-two-router": {"id-b"}})
    assert whose[found.id] == ownership.Owner(*OF_ONE)


@pytest.mark.parametrize(
    ("env", "identity", "copy"),
    [
        ({}, None, None),
        ({"RAILWAY_SERVICE_ID": "r"}, None, None),
        ({STACK: "e/r"}, None, None),
        ({"RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_SERVICE_ID": "r"}, "e/r", None),
        ({"RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_SERVICE_ID": "j", STACK: "e/r"}, "e/r", None),
        ({"RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_SERVICE_ID": "r", STACK: "o/r"}, "e/r", "o"),
        ({"RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_SERVICE_ID": "r", STACK: "?"}, "e/r", None),
        (
            {
                "RAILWAY_ENVIRONMENT_ID": "e",
                "RAILWAY_SERVICE_ID": "j",
                "PULSE_RAILWAY_JANITOR_SERVICE": "j",
            },
            None,
            None,
        ),
    ],
)
def test_who_a_container_is(env: dict[str, str], identity: str | None, copy: str | None) -> None:
    assert (ownership.name(env), ownership.copied_from(env)) == (identity, copy)
    assert ("`pulse-railway ensure`" in (ownership.copy_refusal(env) or "")) == bool(copy)


@pytest.mark.parametrize(
    ("url", "managed"),
    [
        ("${{pulse-redis.REDIS_URL}}", True),
        ("redis://default:x@pulse-redis.railway.internal:6379", True),
        ("${{shared.REDIS_URL}}", False),
        ("redis://redis.example.com:6379", False),
        ("redis://[", False),
        ("", False),
    ],
)
def test_whether_a_redis_is_of_this_environment(url: str, managed: bool) -> None:
    assert ownership.is_managed(url) == managed


def a_stack(name: str, stamped: bool = True) -> list[Any]:
    """Return the services of a stack with one deployment, as `ensure` and `deploy` make them."""
    own = stamp(f"{name}-router") if stamped else {}
    url = redis_of(f"{name}-redis")
    secret = literal(f"secret-{name}")
    names = {
        "PULSE_RAILWAY_JANITOR_SERVICE": f"{name}-janitor",
        "PULSE_RAILWAY_SERVICE": f"{name}-router",
        "PULSE_RAILWAY_REDIS_SERVICE": f"{name}-redis",
    }
    return [
        router(f"{name}-router", **own, **url, **secret),
        service(f"{name}-redis", **own, REDIS_URL="redis://x", REDIS_PASSWORD="p"),
        service(f"{name}-env", **own, KEY="k"),
        router(f"{name}-janitor", **own, **url, **secret, **names),
        backend(f"{name}-1", **own, **token(f"{name}-router"), KEY=f"${{{{{name}-env.KEY}}}}"),
    ]


def renamed(services: list[Any], old: str, new: str, follows: bool) -> list[Any]:
    """Return the services after one was renamed on Railway.

    Args:
        follows: references to it have the new name.
    """
    changed = []
    for found in services:
        variables = {
            k: v.replace("${{" + old + ".", "${{" + new + ".") if follows else v
            for k, v in found.variables.items()
        }
        name = new if found.name == old else found.name
        changed.append(ownership.ServiceVariables(found.id, name, variables))
    return changed


ROLES = ("router", "janitor", "redis", "env")


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("role", ROLES)
def test_a_renamed_service_is_found_by_its_stamp(role: str, follows: bool) -> None:
    """A renamed Redis was taken for the env service, and a renamed janitor was missing."""
    services = renamed([*a_stack("two"), *a_stack("one")], f"one-{role}", "a-new", follows)
    found = next(s for s in ownership.routers(services) if s.id == "id-one-router")
    expected = {r: "a-new" if r == role else f"one-{r}" for r in ROLES}
    assert vars(ownership.names_of(found, services)) == expected
    assert len(ownership.routers(services)) == 2


@pytest.mark.parametrize("role", ROLES)
def test_a_duplicated_service_is_no_other_one(role: str) -> None:
    """Railway copies a service with its variables, so also with its stamp."""
    stack = a_stack("one")
    original = next(s for s in stack if s.name == f"one-{role}")
    double = ownership.ServiceVariables("id-double", "a-copy", original.variables)
    for services in ([double, *stack], [*stack, double]):
        (found,) = ownership.routers(services)
        names = vars(ownership.names_of(found, services))
        if role == "env":  # which of two is meant is not known
            names["env"] = "one-env"
        assert names == {r: f"one-{r}" for r in ROLES}
        left = [s for s in services if s.name != "one-env"]
        if role != "env":
            assert ownership.names_of(found, left).env is None


def test_a_database_is_no_env_service() -> None:
    """`ensure` would have stamped it, and `deploy` have passed its variables on to the app."""
    url = {"DATABASE_URL": "${{Postgres.DATABASE_URL}}"}
    database = service("Postgres", DATABASE_URL="x")
    for without in ((), ("one-env",)):
        for unstamped in ((), ("one-router",), ("one-env",)):
            services = [database]
            for found in a_stack("one"):
                more = url if found.is_backend else {}
                variables = {**found.variables, **more}
                if found.name in unstamped:
                    del variables[STACK]
                if found.name not in without:
                    services.append(ownership.ServiceVariables(found.id, found.name, variables))
            (found,) = ownership.routers(services)
            assert ownership.names_of(found, services).env == (None if without else "one-env")
            assert ownership.owners("e", services)[database.id] == ownership.NOBODY


@settings(max_examples=400)
@given(st.data())
def test_no_change_by_hand_gives_a_service_to_another_stack(data: st.DataObject) -> None:
    """Whatever is deleted, renamed, duplicated or unstamped: a service is its own stack's, or
    nobody's, and no other stack offers to delete it."""
    kinds = st.tuples(st.booleans(), st.booleans())
    one, two = data.draw(kinds)
    services = [*a_stack("one", one), *a_stack("two", two)]
    truth = {s.id: s.id.split("-")[1] for s in services}
    for _ in range(data.draw(st.integers(1, 4))):
        if not services:
            break
        place = data.draw(st.integers(0, len(services) - 1))
        found = services[place]
        match data.draw(st.sampled_from(["delete", "rename", "duplicate", "unstamp", "junk"])):
            case "delete":
                services.pop(place)
            case "rename":
                services = renamed(services, found.name, f"a-{found.name}", True)
            case "duplicate":
                double = ownership.ServiceVariables(
                    f"{found.id}-copy", f"{found.name}-copy", found.variables
                )
                if double.id not in truth:
                    services.insert(data.draw(st.integers(0, len(services))), double)
                    truth[double.id] = truth[found.id]
            case change:
                variables = {k: v for k, v in found.variables.items() if k != STACK}
                variables |= {STACK: "junk"} if change == "junk" else {}
                services[place] = ownership.ServiceVariables(found.id, found.name, variables)
    whose = ownership.owners("e", services)
    for found in services:
        owner = whose[found.id]
        if owner.kind == "stack":
            assert truth[owner.router_id] == truth[found.id], found
        for asking in ownership.routers(services):
            names = ownership.names_of(asking, services)
            entry = ownership.unowned(found, owner, asking, names, services)
            left = any(truth[s.id] == truth[found.id] for s in services if not s.is_backend)
            if entry and entry.related and left:
                assert truth[asking.id] == truth[found.id], found
