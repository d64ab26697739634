"""What stands on Railway: the services of an environment, read in two documents."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Iterable
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
    contract.NOTIFY_URL,
)


@dataclass
class Service:
    """A service in our environment, as Railway has it."""

    id: str
    instance_id: str
    name: str
    created_at: str
    image: str | None
    settings: dict[str, Any]  # in the words of ServiceInstanceUpdateInput
    domains: list[str]
    group_id: str | None
    status: str | None  # of the latest deployment
    variables: dict[str, str] = field(default_factory=dict)  # references not resolved
    stopped: bool = False  # of the latest deployment, which may have been up before
    regions: dict[str, int] = field(default_factory=dict)  # replicas in each, where Railway says

    @property
    def deployment_id(self) -> str | None:
        return self.variables.get(contract.DEPLOYMENT_ID)

    @property
    def age(self) -> float:
        return datetime.now(UTC).timestamp() - datetime.fromisoformat(self.created_at).timestamp()


@dataclass
class Stack:
    """A router and what belongs to it, of all that an environment holds."""

    target: Target
    names: Names
    services: dict[str, Service]  # its own
    others: list[Service] = field(default_factory=list)  # the environment's other services
    unowned: dict[str, Any] = field(default_factory=dict)  # of those, by name: ownership.Unowned
    empty: list[Service] = field(default_factory=list)  # its own that could not be deleted
    taken: frozenset[str] = frozenset()  # what services of the project are called
    no_such_router: str | None = None  # that was asked for by its name: what there is instead
    copied_from: str | None = None  # the environment that this one is a copy of, not yet our own
    doubt: str | None = None  # why Railway's answer is not believed
    edge_failed: bool = False  # it answered in place of the router, in this run

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
        """Is the Redis one that is not in the project?"""
        router = self.router
        if self.redis is not None or router is None:
            return False
        url = router.variables.get(contract.REDIS_URL, "")
        return bool(url) and f"{self.names.redis}." not in url

    @property
    def missing(self) -> list[str]:
        names = [self.names.router, self.names.env, self.names.janitor]
        if not self.external_redis:
            names.append(self.names.redis)
        return [name for name in names if name not in self.services]

    @property
    def stamp(self) -> str | None:
        """What says of a service that it belongs to this stack."""
        if self.router is None:
            return None
        return str(ownership.Stamp(self.target.environment_id, self.router.id))

    @property
    def backends(self) -> list[Service]:
        """Deployments, newest first."""
        found = [s for s in self.services.values() if s.deployment_id]
        return sorted(found, key=lambda s: s.created_at, reverse=True)

    def unowned_backend(self, deployment_id: str) -> Service | None:
        """One that belongs to no stack, and that a verb of this one may take over or delete."""
        named = {
            u.name for u in self.unowned.values() if u.related and u.deployment_id == deployment_id
        }
        return next((s for s in self.others if s.name in named), None)

    def backend(self, deployment_id: str) -> Service | None:
        return next((s for s in self.backends if s.deployment_id == deployment_id), None)

    @property
    def last_promoted(self) -> str | None:
        """The deployment that was promoted last, where Redis cannot lose it."""
        return (self.router.variables.get(contract.LAST_PROMOTED) or None) if self.router else None

    @property
    def intent(self) -> str | None:
        """The same with its time, as a control command takes it: `ID@SECONDS`."""
        at = self.router.variables.get(contract.LAST_PROMOTED_AT) if self.router else None
        return f"{self.last_promoted}@{at}" if self.last_promoted and at else self.last_promoted

    @property
    def redis_prefix(self) -> str:
        """What the keys of the routing state begin with."""
        of_router = self.router.variables if self.router else {}
        return of_router.get(contract.REDIS_PREFIX) or contract.DEFAULT_REDIS_PREFIX

    @property
    def address(self) -> str:
        """The router's public address. Raises Failure where it has none."""
        if self.router is None or not self.router.domains:
            raise Failure(f"{self.names.router} has no public address: run `pulse-railway ensure`")
        return f"https://{self.router.domains[0]}"


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


READ_AGAIN = 1.0  # seconds


def inspect(api: Api, target: Target, names: Names) -> Stack:
    """Read the environment, services and settings in one document, variables in another, and find
    the stack in it.

    Variables that cannot be all there are, are read once more; `stack.doubt` says so then.
    """
    read = read_services(api, target, names)
    try:
        read_variables(api, read)
    except GraphqlError as error:
        if "not found" not in str(error).lower():
            raise
        read = read_services(api, target, names)  # a janitor deleted one between the two
        read_variables(api, read)
    stack = own_stack(read)
    if doubt(stack):
        time.sleep(READ_AGAIN)
        read_variables(api, read)
        stack = own_stack(read)
        stack.doubt = doubt(stack)
    return stack


def own_stack(read: Stack) -> Stack:
    """The stack that a verb works on, of all services that were read.

    It is found by its router: the one that was asked for by its name, else the one that is called
    as usual, else the only one. Raises Failure where several could be meant. Where there is none,
    the stack has what is called as wanted and belongs to no other, and the deployments that no
    router of this environment owns.
    """
    names, services = read.names, read.services
    every = [ownership.Service(s.id, s.name, s.variables) for s in services.values()]
    there = {router.name: router for router in ownership.routers(every)}
    router = there.get(names.router)
    if router is None and not names.asked:
        router = there.get(contract.DEFAULT_ROUTER)
    if router is None and there and not names.asked:
        if len(there) > 1:
            raise Failure(
                f"there are several routers, {joined(there)}: pass --service with one of them"
            )
        (router,) = there.values()
    owners = ownership.owners(read.target.environment_id, every)
    if router is None:
        if not there:
            names = names_of_lost(names, every, owners)
        usual = {names.router, names.env, names.redis, names.janitor}
        own = [
            service
            for name, service in services.items()
            if owners[service.id].kind in ("gone", "nobody")
            and (name in usual or service.deployment_id)
            and not (there and service.deployment_id)
        ]
        instead = joined(there) if there and names.asked else None
        own_services = {s.name: s for s in own}
        found = replace(read, names=names, services=own_services, no_such_router=instead)
    else:
        found = stack_of(read, router, every, owners)
    found.others = [s for s in services.values() if s.name not in found.services]
    found.empty = [s for s in found.services.values() if s.variables.get(contract.REMOVED)]
    for service in found.empty:
        del found.services[service.name]
    return found


def names_of_lost(names: Names, every: list[Any], owners: dict[str, Any]) -> Names:
    """The names of a stack whose router is gone, as its janitor has them; else those wanted."""
    gone = [s for s in every if ownership.is_janitor(s) and owners[s.id].kind == "gone"]
    router = gone[0].variables.get(contract.ROUTER_SERVICE) if gone else None
    if not router or (names.asked and router != names.router):
        return names
    janitor = gone[0]
    said = ownership.names_of(
        ownership.Service(janitor.stamp.router_id, router, janitor.variables), every
    )
    return replace(
        names,
        router=router,
        env=said.env or named_after(router, names, "env"),
        redis=said.redis or named_after(router, names, "redis"),
        janitor=janitor.name,
        prefix=janitor.variables.get(contract.SERVICE_PREFIX) or "",
    )


def check_prefix(flag: str, given: str | None, stored: str | None) -> None:
    """What a stack was set up with stays: its keys and its services are called by it. Raises
    Failure for another one, with which another stack may be meant."""
    if given and given.rstrip(":-") != (stored or "").rstrip(":-"):
        was = f"with {flag} {stored}" if stored else f"without {flag}"
        raise Failure(f"this stack was set up {was}, and keeps its names: leave the flag out")


def check_redis_prefix(stack: Stack, given: str | None) -> None:
    """A copy's own prefix follows the original's, which invoke.yaml may hold."""
    of_router = stack.router.variables if stack.router else {}
    stored = of_router.get(contract.REDIS_PREFIX) or ""
    check_prefix("--redis-prefix", given, stored.removesuffix(f":{stack.target.environment_id}"))


ANOTHER = "leave the flag out, or name the router of the stack that is meant (--service)"


def check_redis(stack: Stack, service: str | None, url: str | None, prefix: str | None) -> None:
    """A stack's Redis is found by its router. Raises Failure for flags that name another one, with
    which another stack may be meant."""
    if stack.router is None:
        return
    check_redis_prefix(stack, prefix)
    if service and (stack.external_redis or service != stack.names.redis):
        is_at = "outside of the project" if stack.external_redis else f"{stack.names.redis}"
        raise Failure(f"this stack's Redis is {is_at}, not --redis-service {service}: {ANOTHER}")
    if url and not may_be_redis(stack, url):
        raise Failure(f"--redis-url is not the address of this stack's Redis: {ANOTHER}")


def may_be_redis(stack: Stack, url: str) -> bool:
    """Can this be the address of the stack's Redis? One in the project has a private and a public
    one, with the same password."""
    assert stack.router is not None
    present = stack.router.variables.get(contract.REDIS_URL, "")
    if "${{" not in present:
        return url.rstrip("/") == present.rstrip("/")
    password = stack.redis.variables.get("REDIS_PASSWORD") if stack.redis else None
    if not password or "${{" in password:
        return True
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).password or "") == password
    except ValueError:
        return False


def stack_of(read: Stack, router: Any, every: list[Any], owners: dict[str, Any]) -> Stack:
    """The stack of a router, with the names that its services have."""
    names, environment = read.names, read.target.environment_id
    said = ownership.names_of(router, every)
    free = {s.name for s in every if owners[s.id].kind == "nobody" and not s.is_backend}
    of_copy = router.stamp is not None and router.stamp.environment_id != environment
    check_prefix("--service-prefix", names.prefix, router.variables.get(contract.SERVICE_PREFIX))
    names = replace(
        names,
        router=router.name,
        env=said.env or named_after(router.name, names, "env", absent_env(router, every)),
        redis=said.redis or named_after(router.name, names, "redis"),
        janitor=said.janitor or named_after(router.name, names, "janitor"),
        prefix=router.variables.get(contract.SERVICE_PREFIX) or "",
    )
    baseline = {names.env, names.redis, names.janitor} & free
    mine = ownership.Owner("copy" if of_copy else "stack", router.id)
    own = {
        s.name: read.services[s.name]
        for s in every
        if owners[s.id] == mine or s.name == router.name or s.name in baseline
    }
    called = ownership.Names(names.router, names.janitor, names.redis, names.env)
    unowned = {
        s.name: found
        for s in every
        if s.name not in own and (found := ownership.unowned(s, owners[s.id], called, router.id))
    }
    copied = router.stamp.environment_id if of_copy else None
    return replace(read, names=names, services=own, unowned=unowned, copied_from=copied)


def absent_env(router: Any, every: list[Any]) -> str | None:
    """What the env service was called that the router's deployments refer to, and that is gone."""
    backends = [s for s in every if s.is_backend and router.name in s.refers_to()]
    gone = {name for s in backends for name in s.refers_to()} - {s.name for s in every}
    return gone.pop() if len(gone) == 1 else None


def named_after(router: str, wanted: Names, role: str, was: str | None = None) -> str:
    """The name of a service that is not there: the one that the app gives it, else what it was
    called, else after the router, as `scaffold` names them with a prefix."""
    given, usual = str(getattr(wanted, role)), f"pulse-{role}"
    if given != naming.baseline_name(wanted.prefix, usual):
        return given
    if was or not router.endswith("-router"):
        return was or given
    return f"{router.removesuffix('-router')}-{role}"


def doubt(stack: Stack) -> str | None:
    """Why the variables that Railway shows are not to be believed: what follows from them would
    replace secrets that backends hold, or leave out what the app needs."""
    # a backend is known by its variables, too: where these read empty it may be any other service
    beside = len(stack.services) + len(stack.others) > len(stack.baseline)
    if stack.router and beside and not _own(stack.router):
        return f"Railway shows no variables of {stack.router.name}"
    if not stack.backends:
        return None
    version = stack.backend(stack.last_promoted or "") or stack.backends[0]
    named = references(version, stack.names.env)
    shown = stack.env.variables.keys() if stack.env else named
    if named and stack.env and contract.STACK not in shown and not named & shown:
        there = joined(sorted(named)[:3])
        return f"{version.name} refers to {there} of {stack.env.name}, and Railway shows none of it"
    return None


def references(service: Service, to: str) -> set[str]:
    """The variables of another service that this one's refer to."""
    values = service.variables.values()
    found = (match for value in values for match in ownership.REFERENCE.finditer(value))
    return {match[2] for match in found if match[1] == to}


def _own(service: Service) -> dict[str, str]:
    """A service's variables without those that Railway gives to each."""
    return {k: v for k, v in service.variables.items() if not k.startswith("RAILWAY_")}


def require_believable(stack: Stack) -> None:
    """Raises Failure where Railway's answer cannot be all there is: nothing is written on it."""
    if stack.doubt:
        raise Failure(
            f"{stack.doubt}: its answer is not believed, and nothing was changed; run this again,"
            " and look at the service's variables on Railway if that does not help"
        )


def read_services(api: Api, target: Target, names: Names) -> Stack:
    """The environment's services with their settings, their variables not yet read."""
    where: dict[str, Any] = {"project": target.project_id, "environment": target.environment_id}
    answer = api.call(documents.STACK, **where)
    data = answer["environment"]
    config = data["config"].get("services") or {}
    services = {}
    for edge in data["serviceInstances"]["edges"]:
        node = edge["node"]
        domains = node["domains"]
        latest = node["latestDeployment"]
        of_config = config.get(node["serviceId"]) or {}
        settings = {name: node[name] for name in _SETTINGS}
        counts = ownership.replicas(data["config"], node["serviceId"])
        regions = {region: count for region, count in counts.items() if count}
        if counts and None not in counts.values():  # they decide
            settings["numReplicas"] = sum(regions.values())
        services[node["serviceName"]] = Service(
            id=node["serviceId"],
            instance_id=node["id"],
            name=node["serviceName"],
            created_at=node["createdAt"],
            image=(node["source"] or {}).get("image"),
            settings=settings,
            domains=[d["domain"] for d in (*domains["customDomains"], *domains["serviceDomains"])],
            group_id=of_config.get("groupId"),
            status=latest["status"] if latest else None,
            stopped=bool(latest and latest["deploymentStopped"]),
            regions=regions,
        )
    taken = {edge["node"]["name"] for edge in answer["project"]["services"]["edges"]}
    return Stack(target, names, services, taken=frozenset(taken | services.keys()))


def read_variables(api: Api, stack: Stack) -> None:
    """Fill in the variables of every service, their references not resolved."""
    listed = list(stack.services.values())
    if not listed:
        return
    ids: dict[str, Any] = {f"s{i}": service.id for i, service in enumerate(listed)}
    values = api.call(
        documents.variables_of(len(listed)),
        project=stack.target.project_id,
        environment=stack.target.environment_id,
        **ids,
    )
    for i, service in enumerate(listed):
        service.variables = values[f"v{i}"]
        given = (service.variables.get(name, "") for name in SECRET_NAMES)
        keep_secret(*(value for value in given if "${{" not in value))


def can_be_made(stack: Stack) -> bool:
    """May `ensure` create what is missing? Where the router, and a Redis in the project, are there
    and say that they are this stack's, and no service says so of which nothing is known: one that
    was renamed."""
    if stack.router is None or not stack.missing or stack.copied_from:
        return False
    known = {s.id for s in (*of_router(stack), *stack.backends)}
    return (
        stack.router.variables.get(contract.STACK) == stack.stamp
        and set(stack.missing) <= {stack.names.env, stack.names.janitor}
        and all(s.id in known for s in stack.services.values())
    )


def lost_with_env(stack: Stack) -> str:
    """What is said of the variables of an env service that is gone; empty where it is there."""
    if stack.env:
        return ""
    named = {name for s in stack.backends for name in references(s, stack.names.env)}
    known = f"; deployments refer to {joined(named)}" if named else ", and nothing says which"
    return (
        f"the variables of {stack.names.env} are lost{known}. Set them again before the next"
        " deploy; what runs keeps their values until it is deployed anew"
    )


def partial(stack: Stack) -> str:
    """What to do about a baseline of which a part is missing, and what goes with the rest. To
    delete is said of those services alone of which Railway shows that they are this stack's, or
    that their router is gone."""
    found, missing = joined(s.name for s in stack.baseline), joined(stack.missing)
    if can_be_made(stack):
        are, it = ("are", "them") if len(stack.missing) > 1 else ("is", "it")
        lost = f"; {said}" if (said := lost_with_env(stack)) else ""
        return (
            f"{missing} of this stack {are} missing: `pulse-railway ensure --repair` makes {it}"
            f" anew{lost}"
        )
    if stack.router is None:
        there = f" (there is: {stack.no_such_router})" if stack.no_such_router else ""
        said = (
            f"no router is called {stack.names.router}{there}: {found} found, {missing} missing. If"
            " the router has another name, pass --service with it"
        )
        sure, why = of_lost_router(stack), "belonged to a router that is gone: "
    else:
        said = (
            f"the baseline is partial: {found} found, {missing} missing. If what is missing has"
            " another name, pass --app or the flag for it"
        )
        sure = of_router(stack)
        why = f"{'are' if len(sure) > 1 else 'is'} this stack's. If the rest was deleted, "
    unknown = joined(s.name for s in stack.baseline if s not in sure)
    if unknown:
        said += (
            f". Nothing says whose {unknown} is, so that is not for deletion: --service-prefix"
            " gives a new stack names of its own"
        )
    if sure:
        names = joined(s.name for s in sure)
        prefix = (
            f" --service-prefix {named.removesuffix('-')}" if (named := stack.names.prefix) else ""
        )
        said += f". {names} {why}delete {names} on Railway and run `pulse-railway scaffold{prefix}`"
        said += goes_with(replace(stack, services={s.name: s for s in sure}))
    return said


def of_router(stack: Stack) -> list[Service]:
    """Of the baseline, the router and what its stamp, its variables, its janitor's or its
    deployments' say is its own; a name alone says nothing."""
    router = stack.router
    assert router is not None
    stamps = {stack.stamp, router.variables.get(contract.STACK)} - {None}  # a copy's are older
    named: set[str | None] = {router.name}
    for service in stack.services.values():
        of = ownership.Service(service.id, service.name, service.variables)
        if service is router or of.is_backend:
            named |= of.refers_to()
        elif (
            ownership.is_janitor(of)
            and service.variables.get(contract.ROUTER_SERVICE) == router.name
        ):
            named |= {service.name, service.variables.get(contract.REDIS_SERVICE)}
    return [
        s for s in stack.baseline if s.name in named or s.variables.get(contract.STACK) in stamps
    ]


def of_lost_router(stack: Stack) -> list[Service]:
    """Of the baseline, what carries the stamp of a router of which this environment has no service
    any more."""
    there = {s.id for s in (*stack.services.values(), *stack.others, *stack.empty)}
    found = []
    for service in stack.baseline:
        stamp = ownership.parse(service.variables.get(contract.STACK))
        here = stamp and stamp.environment_id == stack.target.environment_id
        if here and stamp.router_id not in there:
            found.append(service)
    return found


def goes_with(stack: Stack) -> str:
    """What is lost with the baseline's services, for whoever is about to delete them."""
    lost = []
    if stack.redis:
        lost.append("all sessions and the routing state")
    if stack.env:
        own = [name for name in stack.env.variables if not name.startswith(("RAILWAY_", "PULSE_"))]
        if own:
            lost.append(f"{len(own)} variables of {stack.env.name} (note them first)")
    if stack.router and stack.router.domains:
        lost.append(f"the address {stack.address}")
    return f". With them go: {'; '.join(lost)}" if lost else ""


def require_baseline(stack: Stack) -> None:
    """Raises Failure where a deploy could not work; repairs nothing."""
    require_believable(stack)
    if stack.no_such_router:
        raise Failure(f"no router is called {stack.names.router}; there is: {stack.no_such_router}")
    if stack.copied_from:
        raise Failure(
            f"this environment is a copy of {stack.copied_from}, with its tokens and its routing"
            " state: run `pulse-railway ensure`, which makes a stack of its own of it"
        )
    if not stack.baseline:
        raise Failure("there is no baseline in this environment: run `pulse-railway ensure` first")
    if stack.missing:
        raise Failure(partial(stack))
    router, janitor = stack.router, stack.janitor
    assert router is not None
    assert janitor is not None
    for service in (router, janitor):
        needed = (contract.RAILWAY_TOKEN, contract.REDIS_URL, contract.INTERNAL_TOKEN)
        absent = [name for name in needed if not service.variables.get(name)]
        if absent:
            raise Failure(f"{service.name} lacks {', '.join(absent)}: run `pulse-railway ensure`")
    if not router.variables.get(contract.RUNTIME_VERSION):
        raise Failure(
            f"{router.name} runs an older pulse-railway: run `pulse-railway ensure`, which takes it"
            " over"
        )
    _ = stack.address


def find_backend(stack: Stack, deployment_id: str) -> Service:
    """The service of a deployment. Raises Failure that says which deployments there are."""
    found = stack.backend(deployment_id)
    if found is None:
        for unowned in stack.unowned.values():
            if unowned.deployment_id == deployment_id:
                raise Failure(unowned.words())
        there = joined(str(s.deployment_id) for s in stack.backends) or "none"
        raise Failure(f"there is no deployment {deployment_id}; there are: {there}")
    return found


def joined(items: Iterable[str]) -> str:
    return ", ".join(sorted(items))
