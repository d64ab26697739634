#!/usr/bin/env python3
"""Whose a service is. A Railway environment can hold several stacks, each with a router of its own,
and it can be a copy of another one, made with all of its variables.

Every service of a stack carries its owner as a literal variable, PULSE_RAILWAY_STACK: a reference
would render anew in a copy. It answers for the verbs, the janitor and the router alike, so it
imports nothing but the standard library.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

STACK = "PULSE_RAILWAY_STACK"  # <environment id>/<router service id>
DEPLOYMENT_ID = "PULSE_DEPLOYMENT_ID"
ROUTER_SERVICE = "PULSE_RAILWAY_SERVICE"  # on a janitor, as the next two: what they are called
JANITOR_SERVICE = "PULSE_RAILWAY_JANITOR_SERVICE"
REDIS_SERVICE = "PULSE_RAILWAY_REDIS_SERVICE"
REDIS_URL = "REDIS_URL"
REDIS_PREFIX = "PULSE_RAILWAY_REDIS_PREFIX"
ENVIRONMENT_ID, SERVICE_ID = "RAILWAY_ENVIRONMENT_ID", "RAILWAY_SERVICE_ID"  # Railway's own

REFERENCE = re.compile(r"\$\{\{\s*([^.}]+?)\.([A-Za-z0-9_]+)\s*\}\}")
_STAMP = re.compile(r"([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,64})")


@dataclass(frozen=True)
class Stamp:
    """An owner: a router in an environment."""

    environment_id: str
    router_id: str

    def __str__(self) -> str:
        return f"{self.environment_id}/{self.router_id}"


def parse(text: str | None) -> Stamp | None:
    """A stamp, or None for what is none: unset, a reference, junk."""
    found = _STAMP.fullmatch(text or "")
    return Stamp(found[1], found[2]) if found else None


@dataclass(frozen=True)
class Service:
    """A service of an environment, with its variables as they are written down."""

    id: str
    name: str
    variables: Mapping[str, str]

    @property
    def stamp(self) -> Stamp | None:
        return parse(self.variables.get(STACK))

    @property
    def is_backend(self) -> bool:
        return bool(self.variables.get(DEPLOYMENT_ID))

    def refers_to(self) -> set[str]:
        """The names of the services that its variables refer to."""
        values = self.variables.values()
        return {found[1] for value in values for found in REFERENCE.finditer(value)}


@dataclass(frozen=True)
class Names:
    """What the services of one stack are called; None: there is none that this is known of."""

    router: str
    janitor: str | None
    redis: str | None
    env: str | None


@dataclass(frozen=True)
class Owner:
    """Whose a service is: a stack's of this environment (`router_id`), or

    `copy`: of another environment, of which this one is a copy; `gone`: of a router that is no
    longer in this environment; `nobody`: it says nothing, and nothing says it.
    """

    kind: str  # stack, copy, gone, nobody
    router_id: str | None = None


NOBODY = Owner("nobody")


def is_janitor(service: Service) -> bool:
    """It names itself, and its router."""
    return service.variables.get(JANITOR_SERVICE) == service.name and not service.is_backend


def routers(services: Sequence[Service]) -> list[Service]:
    """The routers of an environment: those that are their own owner, and, of those without a
    stamp, what a janitor names or what has the routing state's variables."""
    named = {s.variables.get(ROUTER_SERVICE) for s in services if is_janitor(s)}
    found = []
    for service in services:
        if service.is_backend or is_janitor(service):
            continue
        if stamp := service.stamp:
            is_router = stamp.router_id == service.id
        else:
            has_state = REDIS_PREFIX in service.variables and REDIS_URL in service.variables
            is_router = service.name in named or has_state
        if is_router:
            found.append(service)
    return found


def names_of(router: Service, services: Sequence[Service]) -> Names:
    """What the services of a router's stack are called: those that carry its stamp, else what
    router, janitor and backends refer to, and 0.3.x's rule that the env service is named after the
    router."""
    stamped = [s for s in services if s.stamp and s.stamp == router.stamp and not s.is_backend]
    janitor = next(
        (
            s
            for s in [*stamped, *services]
            if is_janitor(s) and s.variables.get(ROUTER_SERVICE) == router.name
        ),
        None,
    )
    there = {s.name for s in services}
    redis = (janitor.variables.get(REDIS_SERVICE) if janitor else None) or next(
        (found[1] for found in REFERENCE.finditer(router.variables.get(REDIS_URL, ""))), None
    )
    taken = {router.name, redis, janitor.name if janitor else None}
    backends = (s.refers_to() for s in services if s.is_backend)
    referred = {name for names in backends if router.name in names for name in names}
    candidates = [
        *(s.name for s in stamped),
        *sorted(referred & there),
        *({f"{router.name.removesuffix('-router')}-env"} & there),
    ]
    env = next((name for name in candidates if name not in taken), None)
    return Names(router.name, janitor.name if janitor else None, redis, env)


def owners(
    environment_id: str,
    services: Sequence[Service],
    named: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Owner]:
    """Whose each service is, by its id.

    Args:
        services: all of the environment, with their variables.
        named: for a router's id, the ids of the services that its routing state names.
    """
    names = {router.id: names_of(router, services) for router in routers(services)}
    return {s.id: _owner(environment_id, s, names, named or {}) for s in services}


def _owner(
    environment_id: str,
    service: Service,
    names: Mapping[str, Names],
    named: Mapping[str, Collection[str]],
) -> Owner:
    """`names`: of each router's stack, by the router's id."""
    if stamp := service.stamp:
        if stamp.environment_id != environment_id:
            return Owner("copy", stamp.router_id)
        return Owner("stack" if stamp.router_id in names else "gone", stamp.router_id)
    if service.id in names:
        return Owner("stack", service.id)
    said = service.variables.get(STACK)
    reference = REFERENCE.fullmatch(said or "")  # 0.3.x's deploy refers to all that pulse-env has
    if said and not (reference and reference[2] == STACK):  # not understood
        return NOBODY
    for router_id, ids in named.items():
        if service.id in ids:
            return Owner("stack", router_id)
    if not service.is_backend:
        of = [router_id for router_id, own in names.items() if service.name in vars(own).values()]
    elif len(names) == 1:  # else nobody's, and only 0.3.x's says nothing of its stack
        of = list(names)
    else:
        refers = service.refers_to()
        of = [r for r, own in names.items() if refers & {own.router, own.env}]
    return Owner("stack", of[0]) if len(of) == 1 else NOBODY


def identity(env: Mapping[str, str]) -> Stamp | None:
    """The owner that a router's or janitor's container works for; None outside Railway, and in the
    janitor of a stack that was never stamped."""
    environment_id = env.get(ENVIRONMENT_ID)
    if not environment_id:
        return None
    stamp = parse(env.get(STACK))
    if stamp and stamp.environment_id == environment_id:
        return stamp
    service_id = env.get(SERVICE_ID)
    if service_id and env.get(JANITOR_SERVICE) is None:
        return Stamp(environment_id, service_id)
    return None


def copied_from(env: Mapping[str, str]) -> str | None:
    """The environment that this container's variables were made for, where it is another one."""
    stamp, here = parse(env.get(STACK)), env.get(ENVIRONMENT_ID)
    return stamp.environment_id if stamp and here and stamp.environment_id != here else None


def name(env: Mapping[str, str]) -> str | None:
    """A container's identity as it stands in the routing state."""
    found = identity(env)
    return str(found) if found else None


def copy_refusal(env: Mapping[str, str]) -> str | None:
    """What is said in place of everything else in a copy; None elsewhere."""
    found = copied_from(env)
    return copy_words(found) if found else None


def copy_words(environment_id: str) -> str:
    return (
        f"this environment is a copy of {environment_id}: nothing is served, changed or deleted in"
        " it until `pulse-railway ensure` takes possession"
    )


def foreign_words(owner: str) -> str:
    """What is said where the routing state has another owner."""
    return (
        f"the routing state belongs to another stack ({owner}, as environment and router):"
        " nothing is changed. `pulse-railway ensure` says what to do"
    )


def is_managed(redis_url: str) -> bool:
    """Does this router variable, as it is written down, name a Redis of the same environment?"""
    if any(found[1] != "shared" for found in REFERENCE.finditer(redis_url)):
        return True
    try:
        host = urllib.parse.urlsplit(redis_url).hostname
    except ValueError:
        return False
    return (host or "").endswith(".railway.internal")
