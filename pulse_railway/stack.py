"""A stack on Railway: an environment's services, read in two queries, and which of them belong to
the stack."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pulse_railway import contract, naming, runtime_image
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, GraphqlError

ownership: Any = runtime_image.load("ownership")

SECRET_NAMES = (
    contract.RAILWAY_TOKEN,
    contract.REDIS_URL,
    contract.INTERNAL_TOKEN,
    contract.FORMER_TOKENS,
    contract.SESSION_REDIS_URL,
    contract.NOTIFY_URL,
)

LONGEST_VARIABLE = 128 * 1024  # bytes, with its name and the byte that ends it (Linux)


@dataclass
class Service:
    """A service of the environment, as Railway returns it."""

    id: str
    instance_id: str
    name: str
    created_at: str
    image: str | None
    settings: dict[str, Any]  # by the field names of ServiceInstanceUpdateInput
    domains: list[str]
    group_id: str | None
    status: str | None  # of the latest deployment
    variables: dict[str, str] = field(default_factory=dict)  # references not resolved
    stopped: bool = False  # the latest deployment was stopped
    regions: dict[str, int] = field(default_factory=dict)  # region -> replicas; empty: not known
    limits: dict[str, float] = field(default_factory=dict)  # memory_gb, vcpus; empty: the plan's
    status_at: float | None = None  # since when it has that status, in seconds since 1970
    railway_domains: list[str] = field(default_factory=list)  # those of `domains` by Railway

    @property
    def deployment_id(self) -> str | None:
        return self.variables.get(contract.DEPLOYMENT_ID)

    def is_too_long(self, name: str) -> bool:
        """Return whether Linux starts no process with this variable."""
        text = f"{name}={self.variables.get(name, '')}"
        return len(text.encode(errors="replace")) + 1 > LONGEST_VARIABLE

    @property
    def age(self) -> float:
        """Seconds since its creation."""
        return datetime.now(UTC).timestamp() - datetime.fromisoformat(self.created_at).timestamp()


@dataclass
class Stack:
    """A router and the services that belong to it, and the environment's other services."""

    target: Target
    names: Names
    services: dict[str, Service]  # its own
    others: list[Service] = field(default_factory=list)  # the environment's other services
    unowned: dict[str, Any] = field(default_factory=dict)  # of `others`: name -> ownership.Unowned
    empty: list[Service] = field(default_factory=list)  # its own, left empty by a deletion
    taken: dict[str, str] = field(default_factory=dict)  # all services of the project: name -> id
    no_such_router: str | None = None  # the existing routers, if the one given by name is not there
    guessed: bool = False  # nobody named its router, which is the only one, and has another name
    copied_from: str | None = None  # the original environment's id, until `ensure` has run
    incomplete: str | None = None  # the reason why Railway's answer cannot be complete
    doubles: list[Service] = field(default_factory=list)  # with the name of another one
    edge_failed: bool = False  # Railway's edge has answered in place of the router, in this run

    @property
    def router(self) -> Service | None:
        return self.services.get(self.names.router)

    @property
    def env(self) -> Service | None:
        return self.services.get(self.names.env)

    @property
    def redis(self) -> Service | None:
        return self.services.get(self.names.redis)

    @property
    def janitor(self) -> Service | None:
        return self.services.get(self.names.janitor)

    @property
    def baseline(self) -> list[Service]:
        return [s for s in (self.router, self.env, self.redis, self.janitor) if s]

    @property
    def external_redis(self) -> bool:
        """Whether the router's Redis is not a service of the environment."""
        url = self.stored(contract.REDIS_URL)
        return self.redis is None and bool(url) and f"{self.names.redis}." not in str(url)

    def stored(self, name: str) -> str | None:
        """Return a variable that router and janitor have, of the first that has it, or None."""
        return next(iter(self.values(name)), None)

    def values(self, name: str) -> list[str]:
        """Return the values of a variable on router and janitor, as far as it is set."""
        values = (s.variables.get(name) for s in (self.router, self.janitor) if s)
        return [value for value in values if value]

    @property
    def runtime_token(self) -> str | None:
        """The janitor's Railway token, or None. In a stack of an earlier version the router has it,
        too."""
        found = (s.variables.get(contract.RAILWAY_TOKEN) for s in (self.janitor, self.router) if s)
        return next((token for token in found if token and token != contract.NO_TOKEN), None)

    @property
    def session_redis_url(self) -> str | None:
        """The Redis of apps' sessions by `ensure --session-redis-url`; None: the router's."""
        return (self.env.variables.get(contract.SESSION_REDIS_URL) or None) if self.env else None

    @property
    def session_redis_reference(self) -> str:
        """The value by which a deployment gets the Redis of its sessions."""
        if self.session_redis_url:
            return f"${{{{{self.names.env}.{contract.SESSION_REDIS_URL}}}}}"
        return f"${{{{{self.names.router}.{contract.REDIS_URL}}}}}"

    @property
    def former_tokens(self) -> dict[str, float]:
        """Former internal tokens, and the time until which each was the present one."""
        found: dict[str, float] = {}
        for text in self.values(contract.FORMER_TOKENS):
            found |= tokens_and_times(text)
        return found

    @property
    def missing(self) -> list[str]:
        """The names of the baseline's services that do not exist."""
        names = [self.names.router, self.names.env, self.names.janitor]
        if not self.external_redis:
            names.append(self.names.redis)
        return [name for name in names if name not in self.services]

    @property
    def stamp(self) -> str | None:
        """The value of the variable that marks a service as this stack's."""
        if self.router is None:
            return None
        return str(ownership.Stamp(self.target.environment_id, self.router.id))

    @property
    def backends(self) -> list[Service]:
        """The deployments' services, newest first."""
        services = [s for s in self.services.values() if s.deployment_id]
        return sorted(services, key=lambda s: s.created_at, reverse=True)

    def unowned_backend(self, deployment_id: str) -> Service | None:
        """Return the service of a deployment without a stack, which this stack may delete."""
        names = {
            u.name for u in self.unowned.values() if u.related and u.deployment_id == deployment_id
        }
        return next((s for s in self.others if s.name in names), None)

    def backend(self, deployment_id: str) -> Service | None:
        return next((s for s in self.backends if s.deployment_id == deployment_id), None)

    @property
    def last_promoted(self) -> str | None:
        """The last promoted deployment, by the router's variable, which outlives Redis's data."""
        return (self.router.variables.get(contract.LAST_PROMOTED) or None) if self.router else None

    @property
    def last_promotion(self) -> str | None:
        """`last_promoted` and its time for a control command: `ID@SECONDS` since 1970."""
        at = self.router.variables.get(contract.LAST_PROMOTED_AT) if self.router else None
        return f"{self.last_promoted}@{at}" if self.last_promoted and at else self.last_promoted

    @property
    def redis_prefix(self) -> str:
        """The prefix of the routing state's keys."""
        return self.stored(contract.REDIS_PREFIX) or contract.DEFAULT_REDIS_PREFIX

    @property
    def address(self) -> str:
        """The router's public URL. Raises Failure if the router has no domain."""
        if self.router is None or not self.router.domains:
            raise Failure(f"{self.names.router} has no public address: run `pulse-railway ensure`")
        return f"https://{self.router.domains[0]}"

    @property
    def railway_address(self) -> str | None:
        """The router's public URL that Railway has given, at which nobody else answers; None if it
        has custom domains alone."""
        domains = self.router.railway_domains if self.router else []
        return f"https://{domains[0]}" if domains else None


WRONG_ADDRESS = "an address that is wrong"


def address_without_secrets(url: str) -> str:
    """Return scheme, host, port and number of a Redis address; a reference as it is."""
    if ownership.REFERENCE.fullmatch(url):
        return url
    if runtime_image.load("router").redis_problem(url):
        return WRONG_ADDRESS
    parts = urllib.parse.urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or 6379}{parts.path.rstrip('/')}"


def tokens_and_times(text: str) -> dict[str, float]:
    """Parse the variable FORMER_TOKENS; what is not of its form is left out."""
    try:
        entries = json.loads(text or "{}").items()
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {token: float(at) for token, at in entries if isinstance(at, int | float)}


_SETTINGS = (
    "numReplicas",
    "healthcheckPath",
    "healthcheckTimeout",
    "overlapSeconds",
    "drainingSeconds",
    "startCommand",
    "cronSchedule",
    "restartPolicyType",
)


def seconds_of(time_text: str | None) -> float | None:
    """Parse a time of Railway's API; None without one."""
    return datetime.fromisoformat(time_text).timestamp() if time_text else None


READS = 4  # of an environment in which services go at the same time
RETRY_DELAY = 1.0  # seconds before variables are read again


def inspect(api: Api, target: Target, names: Names) -> Stack:
    """Read the environment, in two queries, and return the stack in it.

    Variables that cannot be complete are read again; if the second answer is not complete either,
    `stack.incomplete` has the reason.
    """
    environment = read_environment(api, target, names)
    stack = find_stack(environment)
    if why_incomplete(stack):
        time.sleep(RETRY_DELAY)
        read_variables(api, environment)
        stack = find_stack(environment)
        stack.incomplete = why_incomplete(stack)
    return stack


def read_environment(api: Api, target: Target, names: Names) -> Stack:
    """Return the environment's services with their variables.

    They are read again if a janitor or another run has deleted one between the two queries.
    """
    for _ in range(READS - 1):
        environment = read_services(api, target, names)
        try:
            read_variables(api, environment)
            return with_finished(environment)
        except GraphqlError as error:
            if not is_gone(error):
                raise
    environment = read_services(api, target, names)
    read_variables(api, environment)
    return with_finished(environment)


def with_finished(environment: Stack) -> Stack:
    """Return the environment with the one of two services of a name that is in use, or the older;
    the other one is among the doubles."""
    if not environment.doubles:
        return environment

    def order(service: Service) -> tuple[bool, str, str]:
        return contract.UNFINISHED in service.variables, service.created_at, service.id

    services: dict[str, Service] = {}
    doubles: list[Service] = []
    every = [*environment.services.values(), *environment.doubles]
    for service in sorted(every, key=order):
        if service.name in services:
            doubles.append(service)
        services.setdefault(service.name, service)
    return replace(environment, services=services, doubles=doubles)


def double_words(stack: Stack, double: Service) -> str:
    """Return the message about two services of one name."""
    first = next(s for s in (*stack.services.values(), *stack.others) if s.name == double.name)
    remedy = "Rename or delete the one that nothing uses, on Railway"
    if is_withdrawable(first, double):
        remedy = "`pulse-railway ensure` removes the second one, which an `ensure` did not finish"
    return f"Railway has two services named {double.name} ({first.id} and {double.id}): {remedy}"


def is_withdrawable(first: Service, double: Service) -> bool:
    """Return whether an unfinished `ensure` has made `double` beside `first`, so that nothing uses
    it."""
    marks = [s.variables.get(contract.UNFINISHED) for s in (first, double)]
    return marks[1] not in (None, "", "1", marks[0])  # 1: an earlier version's, of any run


def is_gone(error: GraphqlError) -> bool:
    """Return whether Railway says that what was asked for does not exist (any more)."""
    return "not found" in str(error).lower()


def find_stack(environment: Stack) -> Stack:
    """Return the stack that a verb acts on.

    Its router is the one that the user has named, else the one with the default name, else the only
    one, unless services of another stack, whose router was deleted, are left: that one may be
    meant. A deleted router counts if a janitor still names it: its stack has the services with the
    janitor's stamp. Without any, the stack has the services with its names that belong to no other
    stack, and the deployments without a router in this environment. Raises Failure if there are
    several routers to choose from.

    Args:
        environment: all services, with the names that the app or the user has given.
    """
    names, services = environment.names, environment.services
    every = [ownership.ServiceVariables(s.id, s.name, s.variables) for s in services.values()]
    routers = {router.name: router for router in ownership.routers(every)}
    owners = ownership.owners(environment.target.environment_id, every)
    router = routers.get(names.router)
    lost = None if router else janitor_of_lost(environment, every, owners, routers)
    if router is None and lost is None and not names.asked:
        router = routers.get(contract.DEFAULT_ROUTER)
    if router is None and lost is None and routers and not names.asked:
        if len(routers) > 1:
            raise Failure(
                f"there are several routers, {joined(routers)}: pass --service with one of them"
            )
        if not of_deleted_stack(every, owners):
            (router,) = routers.values()
    if router is not None:
        stack = stack_of(environment, router, every, owners)
        stack.guessed = router.name != names.router
    elif lost is not None:
        stack = stack_without_router(environment, lost, every, owners)
    else:
        baseline = stack_names(names)
        deleted = ownership.ServiceVariables("", names.router, {})
        own = {
            s.name: services[s.name]
            for s in every
            if owners[s.id].kind in ("gone", "nobody")
            if (
                not routers and ownership.ties_to(s, deleted, baseline) is not False
                if s.is_backend
                else s.name in vars(baseline).values()
            )
        }
        instead = joined(routers) or None
        stack = replace(environment, names=names, services=own, no_such_router=instead)
    stack.others = [s for s in services.values() if s.name not in stack.services]
    stack.empty = [s for s in stack.services.values() if s.variables.get(contract.REMOVED)]
    for service in stack.empty:
        del stack.services[service.name]
    return stack


def stack_names(names: Names) -> Any:
    """Return names as ownership.StackNames."""
    return ownership.StackNames(names.router, names.janitor, names.redis, names.env)


def of_deleted_stack(every: list[Any], owners: dict[str, Any]) -> list[str]:
    """Return the names of services that are left of a stack whose router was deleted.

    Those that an existing router's stack can take over, since it has their names, are not counted.

    Args:
        every: all services of the environment, as ownership.ServiceVariables.
        owners: service id -> ownership.Owner.
    """
    routers = ownership.routers(every)
    ids = {router.id for router in routers}
    taken_over = {
        name for router in routers for name in vars(ownership.names_of(router, every)).values()
    }
    return [
        s.name
        for s in every
        if owners[s.id].kind in ("gone", "copy")
        and owners[s.id].router_id not in ids
        and not s.is_empty
        and not ({s.name} | s.refers_to()) & taken_over
    ]


def janitor_of_lost(
    environment: Stack, every: list[Any], owners: dict[str, Any], routers: Collection[str]
) -> Any | None:
    """Return the janitor of a deleted router, which the user means; None if there is none.

    Args:
        every: all services of the environment, as ownership.ServiceVariables.
        owners: service id -> ownership.Owner.
        routers: the names of the environment's routers.
    """
    names, existing = environment.names, {s.id: s.name for s in every}
    janitors = {
        name: s
        for s in every
        if ownership.is_janitor(s) and (name := s.variables.get(contract.ROUTER_SERVICE))
        if owners[s.id].kind in ("gone", "copy")
        and name not in routers
        # a renamed router keeps its id; an unfinished one is being created again
        and existing.get(s.stamp.router_id, name) == name
    }
    if names.router in janitors or names.asked or routers or len(janitors) != 1:
        return janitors.get(names.router)
    return next(iter(janitors.values()))


def stack_without_router(
    environment: Stack, janitor: Any, every: list[Any], owners: dict[str, Any]
) -> Stack:
    """Return the stack of a deleted router, with the names and the stamp that its janitor has.

    An interrupted `ensure --repair` leaves a new router that has not written its stamp yet.
    """
    names, router = environment.names, str(janitor.variables[contract.ROUTER_SERVICE])
    deleted = ownership.ServiceVariables(janitor.stamp.router_id, router, janitor.variables)
    stored = ownership.names_of(deleted, every)
    names = replace(
        names,
        router=router,
        env=stored.env or missing_name(router, names, "env"),
        redis=stored.redis or missing_name(router, names, "redis"),
        janitor=janitor.name,
        prefix=janitor.variables.get(contract.SERVICE_PREFIX) or "",
    )
    own_names = stack_names(names)
    unfinished = environment.services.get(router)
    stamps = {janitor.variables[contract.STACK]}
    if unfinished and (replaced := unfinished.variables.get(contract.REPLACES)):
        stamps.add(replaced)
    own = {
        s.name: environment.services[s.name]
        for s in every
        if s.variables.get(contract.STACK) in stamps
        or (s.name in (names.env, names.redis) and owners[s.id].kind == "nobody")
        or (
            s.is_backend
            and owners[s.id].kind == "nobody"
            and not ownership.routers(every)
            and ownership.ties_to(s, deleted, own_names) is not False
        )
    }
    original = janitor.stamp.environment_id
    copied = original if original != environment.target.environment_id else None
    return replace(environment, names=names, services=own, copied_from=copied)


def check_prefix(flag: str, prefix: str | None, stored: str | None) -> None:
    """Raise Failure if a flag has another prefix than the stack's keys or services.

    The user may mean another stack.
    """
    if prefix and prefix.rstrip(":-") != (stored or "").rstrip(":-"):
        setup = f"with {flag} {stored}" if stored else f"without {flag}"
        raise Failure(f"this stack was set up {setup}, and keeps its names: leave the flag out")


def check_redis_prefix(stack: Stack, prefix: str | None) -> None:
    """Raise Failure for another --redis-prefix than the stack's.

    A copy's prefix is the original's, which invoke.yaml may have, and the environment's id.
    """
    stored = stack.stored(contract.REDIS_PREFIX) or ""
    if prefix != stored:
        stored = stored.removesuffix(f":{stack.target.environment_id}")
    check_prefix("--redis-prefix", prefix, stored)


ANOTHER = "leave the flag out, or name the router of the stack that is meant (--service)"


def check_redis(stack: Stack, service: str | None, url: str | None, prefix: str | None) -> None:
    """Raise Failure if flags describe another Redis than the router's: the user may mean another
    stack."""
    if stack.router is None:
        return
    check_redis_prefix(stack, prefix)
    if service and (stack.external_redis or service != stack.names.redis):
        own = "outside of the project" if stack.external_redis else stack.names.redis
        raise Failure(f"this stack's Redis is {own}, not --redis-service {service}: {ANOTHER}")
    if url and not may_be_redis(stack, url):
        raise Failure(f"--redis-url is not the address of this stack's Redis: {ANOTHER}")


def may_be_redis(stack: Stack, url: str) -> bool:
    """Return whether this can be the address of the stack's Redis.

    A Redis in the project has a private and a public address, with the same password.
    """
    assert stack.router is not None
    stored = stack.router.variables.get(contract.REDIS_URL, "")
    if "${{" not in stored:
        return url.rstrip("/") == stored.rstrip("/")
    password = stack.redis.variables.get("REDIS_PASSWORD") if stack.redis else None
    if not password or "${{" in password:
        return True
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).password or "") == password
    except ValueError:
        return False


def stack_of(environment: Stack, router: Any, every: list[Any], owners: dict[str, Any]) -> Stack:
    """Return a router's stack, with the names that its services have.

    Args:
        every: all services of the environment, as ownership.ServiceVariables.
        owners: service id -> ownership.Owner.
    """
    names, environment_id = environment.names, environment.target.environment_id
    stored = ownership.names_of(router, every)
    free = {s.name for s in every if owners[s.id].kind == "nobody" and not s.is_backend}
    of_copy = router.stamp is not None and router.stamp.environment_id != environment_id
    check_prefix("--service-prefix", names.prefix, router.variables.get(contract.SERVICE_PREFIX))
    names = replace(
        names,
        router=router.name,
        env=stored.env or missing_name(router.name, names, "env", deleted_env(router, every)),
        redis=stored.redis or missing_name(router.name, names, "redis"),
        janitor=stored.janitor or missing_name(router.name, names, "janitor"),
        prefix=router.variables.get(contract.SERVICE_PREFIX) or "",
    )
    baseline = {names.env, names.redis, names.janitor} & free
    owner = ownership.Owner("copy" if of_copy else "stack", router.id)
    own = {
        s.name: environment.services[s.name]
        for s in every
        if owners[s.id] == owner or s.name == router.name or s.name in baseline
    }
    own_names = stack_names(names)
    unowned = {
        s.name: entry
        for s in every
        if s.name not in own
        if (entry := ownership.unowned(s, owners[s.id], router, own_names, every))
    }
    copied = router.stamp.environment_id if of_copy else None
    return replace(environment, names=names, services=own, unowned=unowned, copied_from=copied)


def deleted_env(router: Any, every: list[Any]) -> str | None:
    """Return the name of a deleted env service, to which the router's deployments still refer."""
    backends = [s for s in every if s.is_backend and router.name in s.refers_to()]
    deleted = {name for s in backends for name in s.refers_to()} - {s.name for s in every}
    return deleted.pop() if len(deleted) == 1 else None


def missing_name(router: str, names: Names, role: str, former: str | None = None) -> str:
    """Return the name of a missing service: the app's, else the former one, else one like the
    router's, as `scaffold` gives it with a prefix."""
    name, default = str(getattr(names, role)), f"pulse-{role}"
    if name != naming.baseline_name(names.prefix, default):
        return name
    if former or not router.endswith("-router"):
        return former or name
    return f"{router.removesuffix('-router')}-{role}"


def why_incomplete(stack: Stack) -> str | None:
    """Return the reason why Railway's answer cannot have all variables, or None.

    An incomplete answer would lead to new secrets, which running backends do not accept, or to a
    version without the app's variables.
    """
    # without its variables a backend is not recognized, so any other service may be one
    beside = len(stack.services) + len(stack.others) > len(stack.baseline)
    if stack.router and beside and not _own(stack.router):
        return f"Railway shows no variables of {stack.router.name}"
    if not stack.backends:
        return None
    version = stack.backend(stack.last_promoted or "") or stack.backends[0]
    referenced = references(version, stack.names.env)
    shown = stack.env.variables.keys() if stack.env else referenced
    if referenced and stack.env and contract.STACK not in shown and not referenced & shown:
        names = joined(sorted(referenced)[:3])
        return f"{version.name} refers to {names} of {stack.env.name}, and Railway shows none of it"
    return None


def references(service: Service, to: str) -> set[str]:
    """Return the names of the variables of service `to` to which this service's variables refer."""
    values = service.variables.values()
    matches = (match for value in values for match in ownership.REFERENCE.finditer(value))
    return {match[2] for match in matches if match[1] == to}


def mended_references(stack: Stack, service: Service) -> dict[str, str]:
    """Return the variables of a deployment that refer to services of a former stack, with
    references to this one's. The deployment uses them when it is deployed again."""
    assert stack.router is not None
    router, env = stack.names.router, stack.env
    existing = {"shared", *(s.name for s in (*stack.services.values(), *stack.others))}

    def of_env(match: re.Match[str]) -> str:
        known = match[1] in existing or env is None or match[2] not in env.variables
        return match[0] if known else f"${{{{{stack.names.env}.{match[2]}}}}}"

    mended = {}
    for name, value in service.variables.items():
        match = ownership.REFERENCE.fullmatch(value)
        if name == contract.INTERNAL_TOKEN:
            new = f"${{{{{router}.{name}}}}}"
            same = value == stack.router.variables.get(name) or (match and match[1] == router)
        elif name in (contract.SESSION_REDIS_URL, contract.KEY_TTL):
            new = f"${{{{{router}.{name}}}}}"
            new = stack.session_redis_reference if name == contract.SESSION_REDIS_URL else new
            same = not match or match[1] in stack.services
        else:
            new, same = ownership.REFERENCE.sub(of_env, value), False
        if new != value and not same:
            mended[name] = new
    return mended


def unset_references(stack: Stack, service: Service) -> set[str]:
    """Return the variables, as `service.NAME`, to which a deployment refers and that nothing sets:
    those of the env service, also in the place of a service that does not exist."""
    services = {s.name: s for s in (*stack.services.values(), *stack.others)}
    return {
        f"{stack.names.env}.{match[2]}"
        for value in service.variables.values()
        for match in ownership.REFERENCE.finditer(value)
        if match[1] != "shared" and not match[2].startswith("RAILWAY_")
        if match[1] not in services
        or (match[1] == stack.names.env and match[2] not in services[match[1]].variables)
    }


def _own(service: Service) -> dict[str, str]:
    """Return a service's variables without those that Railway sets on every service."""
    return {k: v for k, v in service.variables.items() if not k.startswith("RAILWAY_")}


def require_complete_answer(stack: Stack) -> None:
    """Raise Failure if Railway's answer cannot be complete: then nothing may be written."""
    if stack.incomplete:
        raise Failure(
            f"{stack.incomplete}: its answer is not used, and nothing was changed; run this"
            " again, and look at the service's variables on Railway if that does not help"
        )
    if stack.doubles:
        raise Failure(f"{double_words(stack, stack.doubles[0])}. Nothing was changed")


def read_services(api: Api, target: Target, names: Names) -> Stack:
    """Return the environment's services with their settings, without variables."""
    answer = api.call(documents.STACK, project=target.project_id, environment=target.environment_id)
    data = answer["environment"]
    config = data["config"].get("services") or {}
    services: dict[str, Service] = {}
    doubles: list[Service] = []
    for edge in data["serviceInstances"]["edges"]:
        node = edge["node"]
        domains = node["domains"]
        latest = node["latestDeployment"]
        of_config = config.get(node["serviceId"]) or {}
        settings = {name: node[name] for name in _SETTINGS}
        counts = ownership.replicas(data["config"], node["serviceId"])
        regions = {region: count for region, count in counts.items() if count}
        if counts and None not in counts.values():  # Railway then ignores `numReplicas`
            settings["numReplicas"] = sum(regions.values())
        service = Service(
            id=node["serviceId"],
            instance_id=node["id"],
            name=node["serviceName"],
            created_at=node["createdAt"],
            image=(node["source"] or {}).get("image"),
            settings=settings,
            domains=[d["domain"] for d in (*domains["customDomains"], *domains["serviceDomains"])],
            group_id=of_config.get("groupId"),
            status=latest["status"] if latest else None,
            status_at=seconds_of(latest.get("statusUpdatedAt")) if latest else None,
            stopped=bool(latest and latest["deploymentStopped"]),
            regions=regions,
            railway_domains=[d["domain"] for d in domains["serviceDomains"]],
            limits=limits_of(of_config),
        )
        if service.name in services:  # a template was deployed twice
            doubles.append(service)
        services.setdefault(service.name, service)
    taken = {
        edge["node"]["name"]: edge["node"]["id"] for edge in answer["project"]["services"]["edges"]
    }
    taken |= {s.name: s.id for s in services.values()}
    return Stack(target, names, services, taken=taken, doubles=doubles)


def limits_of(config: dict[str, Any]) -> dict[str, float]:
    """Return the limits that a service's config has: memory_gb (10^9 bytes) and vcpus.

    Its shape is that of `limitOverride` in Railway's CLI (src/controllers/config/environment.rs).
    """
    override = (config.get("deploy") or {}).get("limitOverride") or {}
    containers = override.get("containers") or {}
    limits = {}
    if cpu := containers.get("cpu"):
        limits["vcpus"] = float(cpu)
    if memory := containers.get("memoryBytes"):
        limits["memory_gb"] = memory / 10**9
    return limits


def read_variables(api: Api, stack: Stack) -> None:
    """Set the variables of each service, with references not resolved; register the secrets."""
    services = [*stack.services.values(), *stack.doubles]
    if not services:
        return
    ids: dict[str, Any] = {f"s{i}": service.id for i, service in enumerate(services)}
    values = api.call(
        documents.variables_of(len(services)),
        project=stack.target.project_id,
        environment=stack.target.environment_id,
        **ids,
    )
    for i, service in enumerate(services):
        service.variables = values[f"v{i}"]
        secrets = (service.variables.get(name, "") for name in SECRET_NAMES)
        keep_secret(*(v for v in secrets if "${{" not in v and v != contract.NO_TOKEN))
        keep_secret(*tokens_and_times(service.variables.get(contract.FORMER_TOKENS, "")))


def can_create_missing(stack: Stack) -> bool:
    """Return whether `ensure --repair` may create the missing services.

    The router, or without it the janitor, has the stack's stamp and the settings that the missing
    ones need. No other service may have the stamp, since it could be the missing one with a new
    name.
    """
    router, janitor, missing = stack.router, stack.janitor, set(stack.missing)
    here = stack.copied_from or stack.target.environment_id
    if not missing or not (router or janitor):
        return False
    if router:
        stamps = (f"{here}/{router.id}", router.variables.get(contract.REPLACES))
        recognised = router.variables.get(contract.STACK) in stamps
        recognised &= bool(router.variables.get(contract.STACK))
        known = of_router(stack)
    else:
        needed = (contract.REDIS_URL, contract.REDIS_PREFIX)
        recognised = janitor in of_lost_router(stack) and all(map(stack.stored, needed))
        recognised &= stack.runtime_token is not None
        recognised &= "${{" not in (stack.stored(contract.INTERNAL_TOKEN) or "${{")
        if stack.copied_from and janitor:  # the original's router is added to the copy
            stamp = f"{here}/{stack.taken.get(stack.names.router)}"
            recognised &= janitor.variables.get(contract.STACK) == stamp
        known = of_lost_router(stack)
    if stack.names.redis in missing:  # Railway copies no service's contents from an environment
        reference = f"${{{{{stack.names.redis}.REDIS_URL}}}}"
        recognised &= stack.stored(contract.REDIS_URL) == reference
        recognised &= stack.names.redis not in stack.taken
    ids = {s.id for s in (*known, *stack.backends)}
    return recognised and all(s.id in ids for s in stack.services.values())


def lost_with_missing(stack: Stack) -> list[str]:
    """Return a warning for each missing service: what was lost with it, and what to do then."""
    names, warnings = stack.names, []
    if not stack.env:
        referenced = {name for s in stack.backends for name in references(s, names.env)}
        known = (
            f"; deployments refer to {joined(referenced)}"
            if referenced
            else ", and nothing says which"
        )
        warnings.append(
            f"the variables of {names.env} are lost{known}. Set them again before the next deploy;"
            " running deployments keep the values until they are deployed again"
        )
    if not stack.router:
        warnings.append(
            f"the public address of {names.router}, its own domains and variables set by hand are"
            " lost: it gets a new address. Add the domains again on Railway. An app that was"
            " reached by Railway's address needs a new deploy, since its pages name the old one"
        )
    if names.redis in stack.missing and not stack.router and stack.backends:
        running = joined(str(s.deployment_id) for s in stack.backends)
        warnings.append(
            f"the routing state in {names.redis} is lost, and with {names.router} what was promoted"
            " last: `pulse-railway restore --deployment-id ...` makes one of these active:"
            f" {running}"
        )
    elif names.redis in stack.missing:
        warnings.append(
            f"the sessions and the routing state in {names.redis} are lost. The janitor restores"
            " the state from Railway within five minutes, `pulse-railway restore` at once;"
            " deployments with sessions in Redis use the new one after `pulse-railway redeploy`"
        )
    return warnings


def partial(stack: Stack) -> str:
    """Return a message for a baseline with missing services: what to do, and what would be lost.

    It advises to delete only services that Railway shows to be this stack's, or whose router is
    gone.
    """
    found, missing = joined(s.name for s in stack.baseline), joined(stack.missing)
    if can_create_missing(stack):
        are, it = ("are", "them") if len(stack.missing) > 1 else ("is", "it")
        return "; ".join(
            [
                f"{missing} of this stack {are} missing: `pulse-railway ensure --repair` creates"
                f" {it} again",
                *lost_with_missing(stack),
            ]
        )
    certain = of_router(stack) if stack.router else of_lost_router(stack)
    redis = stack.names.redis
    if certain and redis in stack.missing and redis in stack.taken:
        return (
            f"{redis} is missing here, and other environments of the project have it: import it"
            f" from one of them on Railway (Sync), then `railway redeploy --service"
            f" {stack.names.router}`, and `pulse-railway ensure`. Delete nothing: copied"
            " environments share their services"
        )
    if stack.router is None:
        existing = f" (there is: {stack.no_such_router})" if stack.no_such_router else ""
        message = (
            f"no router is called {stack.names.router}{existing}: {found} found, {missing} missing."
            " If the router has another name, pass --service with it"
        )
        reason = "belonged to a router that is gone: "
    else:
        message = (
            f"the baseline is partial: {found} found, {missing} missing. If what is missing has"
            " another name, pass --app or the flag for it"
        )
        reason = f"{'are' if len(certain) > 1 else 'is'} this stack's. If the rest was deleted, "
        if stack.guessed:
            return (
                f"{message}. Nobody named {stack.names.router}, and it may be another stack's: name"
                " the router that is meant (--service, or RailwayPlugin(router_service=...))"
            )
    unknown = joined(s.name for s in stack.baseline if s not in certain)
    if unknown:
        message += (
            f". Nothing says whose {unknown} is, so that is not for deletion: --service-prefix"
            " gives a new stack names of its own"
        )
    if certain:
        names, prefix = joined(s.name for s in certain), stack.names.prefix.removesuffix("-")
        flag = f" --service-prefix {prefix}" if prefix else ""
        message += (
            f". {names} {reason}delete {names} on Railway and run `pulse-railway scaffold{flag}`"
        )
        message += lost_with_baseline(replace(stack, services={s.name: s for s in certain}))
    return message


def of_router(stack: Stack) -> list[Service]:
    """Return the services of the baseline that certainly belong to the router, and the router.

    A service has its stamp, or the variables of the router, its janitor or its deployments refer to
    the service. A default name alone does not show the owner.
    """
    router = stack.router
    assert router is not None
    # a copy's services have the original's stamp
    stamps = {stack.stamp, router.variables.get(contract.STACK)} - {None}
    names: set[str | None] = {router.name}
    for service in stack.services.values():
        parsed = ownership.ServiceVariables(service.id, service.name, service.variables)
        if service is router or parsed.is_backend:
            names |= parsed.refers_to()
        elif (
            ownership.is_janitor(parsed)
            and service.variables.get(contract.ROUTER_SERVICE) == router.name
        ):
            names |= {service.name, service.variables.get(contract.REDIS_SERVICE)}
    return [
        s for s in stack.baseline if s.name in names or s.variables.get(contract.STACK) in stamps
    ]


def of_lost_router(stack: Stack) -> list[Service]:
    """Return the baseline's services with the stamp of a router that this environment, or the one
    that it is a copy of, had."""
    existing = {s.id for s in (*stack.services.values(), *stack.others, *stack.empty)}
    services = []
    for service in stack.baseline:
        stamp = ownership.parse_stamp(service.variables.get(contract.STACK))
        in_environment = stamp and stamp.environment_id == (
            stack.copied_from or stack.target.environment_id
        )
        if in_environment and stamp.router_id not in existing:
            services.append(service)
    return services


# ends each advice to delete a baseline
SHARED_SERVICES = (
    ". Not in a project with other environments: those that were copied share these services, and"
    " `scaffold` takes no name that another environment has. There name a stack's services anew"
    " (RailwayPlugin(router_service=...)) and delete nothing"
)


def lost_with_baseline(stack: Stack) -> str:
    """Return the part of a message that lists what is lost if the baseline is deleted."""
    lost = []
    if stack.redis:
        lost.append("all sessions and the routing state")
    if stack.env:
        own = [name for name in stack.env.variables if not name.startswith(("RAILWAY_", "PULSE_"))]
        if own:
            lost.append(f"{len(own)} variables of {stack.env.name} (note them first)")
    if stack.router and stack.router.domains:
        lost.append(f"the address {stack.address}")
    going = f". With them go: {'; '.join(lost)}" if lost else ""
    return going + SHARED_SERVICES


def require_router_of_names(stack: Stack) -> None:
    """Raise Failure if there are routers, and none can be the one that is meant."""
    if not stack.no_such_router:
        return
    message = f"no router is called {stack.names.router}; there is: {stack.no_such_router}"
    if not stack.names.asked:
        message += (
            ". Another stack's router was deleted, and what is left of it may be meant: name the"
            " router (--service, or RailwayPlugin(router_service=...))"
        )
    raise Failure(message)


def require_router(stack: Stack) -> None:
    """Raise Failure if there is no router, or no Redis, for a control command; change nothing."""
    require_complete_answer(stack)
    require_router_of_names(stack)
    if stack.copied_from:
        raise Failure(
            f"this environment is a copy of {stack.copied_from}, with its tokens and its routing"
            " state: run `pulse-railway ensure`, which makes a stack of its own of it"
        )
    if not stack.baseline:
        raise Failure("there is no baseline in this environment: run `pulse-railway ensure` first")
    router = stack.router
    if router is None or stack.names.redis in stack.missing:
        raise Failure(partial(stack))
    require_variables(router, contract.REDIS_URL, contract.INTERNAL_TOKEN)
    if not router.variables.get(contract.RUNTIME_VERSION):
        raise Failure(
            f"{router.name} runs an older pulse-railway: run `pulse-railway ensure`, which takes it"
            " over"
        )
    _ = stack.address


def require_baseline(stack: Stack) -> None:
    """Raise Failure if the baseline is not complete enough for a deploy; change nothing."""
    require_router(stack)
    if stack.missing:
        raise Failure(partial(stack))
    assert stack.janitor is not None
    needed = (contract.RAILWAY_TOKEN, contract.REDIS_URL, contract.INTERNAL_TOKEN)
    require_variables(stack.janitor, *needed)


def require_variables(service: Service, *needed: str) -> None:
    """Raise Failure if one of these variables, without which a service does not work, is not
    set."""
    absent = [
        name for name in needed if service.variables.get(name) in (None, "", contract.NO_TOKEN)
    ]
    if absent:
        raise Failure(f"{service.name} lacks {', '.join(absent)}: run `pulse-railway ensure`")


def find_backend(stack: Stack, deployment_id: str) -> Service:
    """Return a deployment's service. Raises Failure, with a list of all, if there is none."""
    service = stack.backend(deployment_id)
    if service is None:
        for unowned in stack.unowned.values():
            if unowned.deployment_id == deployment_id:
                raise Failure(unowned.words())
        existing = joined(str(s.deployment_id) for s in stack.backends) or "none"
        raise Failure(f"there is no deployment {deployment_id}; there are: {existing}")
    return service


def joined(items: Iterable[str]) -> str:
    return ", ".join(sorted(items))
