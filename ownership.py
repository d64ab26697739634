#!/usr/bin/env python3
"""Whose a service is. A Railway environment can hold several stacks, each with a router of its own,
and it can be a copy of another one, made with all of its variables.

Every service of a stack carries its owner as a literal variable, PULSE_RAILWAY_STACK: a reference
would render anew in a copy. It answers for the verbs, the janitor and the router alike, so it
imports nothing but the standard library.
"""

from __future__ import annotations

import re
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STACK = "PULSE_RAILWAY_STACK"  # <environment id>/<router service id>
DEPLOYMENT_ID = "PULSE_DEPLOYMENT_ID"
ROUTER_SERVICE = "PULSE_RAILWAY_SERVICE"  # on a janitor, as the next two: what they are called
JANITOR_SERVICE = "PULSE_RAILWAY_JANITOR_SERVICE"
REDIS_SERVICE = "PULSE_RAILWAY_REDIS_SERVICE"
REDIS_URL = "REDIS_URL"
REDIS_PREFIX = "PULSE_RAILWAY_REDIS_PREFIX"
REMOVED = "PULSE_RAILWAY_REMOVED"  # on a service that could not be deleted: since when it is empty
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

    @property
    def is_empty(self) -> bool:
        """It was to be deleted, Railway did not let that happen, and nothing of it runs."""
        return bool(self.variables.get(REMOVED))

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
        *(s.name for s in stamped if JANITOR_SERVICE not in s.variables),
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
    stack = service.variables.get(STACK)
    reference = REFERENCE.fullmatch(stack or "")  # 0.3.x's deploy refers to all that pulse-env has
    if stack and not (reference and reference[2] == STACK):  # not understood
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


@dataclass(frozen=True)
class Unowned:
    """A backend that no stack of this environment owns, as one of its stacks sees it."""

    name: str
    deployment_id: str
    kind: str  # of Owner: copy, gone, nobody
    related: bool  # it came with this stack's copy, was its former router's, or is nobody's

    @property
    def can_be_restored(self) -> bool:
        """A copied one has the original's address, and with an external Redis its sessions."""
        return self.related and self.kind != "copy"

    def words(self) -> str:
        """Why it is left alone, and what can be done with it."""
        name = self.deployment_id
        delete = f"`pulse-railway delete --deployment-id {name}` removes it"
        restore = (
            f"`pulse-railway restore --deployment-id {name}` makes it this stack's, and active"
        )
        if not self.related:
            which = "was copied with" if self.kind == "copy" else "ran under"
            return (
                f"{name} {which} another router, which is not set up here: `pulse-railway ensure`"
                " with its app sets it up. If nobody needs it, delete its service"
                f" {self.name} on Railway"
            )
        if self.kind == "copy":
            return (
                f"{name} was copied from another environment, with that one's address: nothing"
                f" routes to it. Deploy anew; {delete} from this environment alone"
            )
        if self.kind == "gone":
            return f"{name} ran under a router that is gone: {restore}; {delete}"
        return (
            f"{name} does not say whose it is, and no routing state of this stack names it:"
            f" {restore}; {delete}"
        )


def unowned(service: Service, owner: Owner, names: Names, router_id: str) -> Unowned | None:
    """A backend as a stack sees it that does not own it; None where another stack does.

    Args:
        names: of the stack's services, as router_id is its router's.
    """
    if owner.kind == "stack" or not service.is_backend or service.is_empty:
        return None
    match owner.kind:
        case "copy":
            related = owner.router_id == router_id
        case "gone":
            related = bool(service.refers_to() & {names.router, names.env})
        case _:
            related = True
    return Unowned(service.name, service.variables[DEPLOYMENT_ID], owner.kind, related)


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


def replicas(config: Any, service_id: str) -> dict[str, int | None]:
    """How many replicas of a service an environment's `config` gives each region, None where it
    names the region alone. They decide: `numReplicas` follows them."""
    of_service = ((config or {}).get("services") or {}).get(service_id) or {}
    given = (of_service.get("deploy") or {}).get("multiRegionConfig") or {}
    return {region: r.get("numReplicas") if r else 0 for region, r in given.items()}


def is_managed(redis_url: str) -> bool:
    """Does this router variable, as it is written down, name a Redis of the same environment?"""
    if any(found[1] != "shared" for found in REFERENCE.finditer(redis_url)):
        return True
    try:
        host = urllib.parse.urlsplit(redis_url).hostname
    except ValueError:
        return False
    return (host or "").endswith(".railway.internal")


# -- how a service leaves its environment, and no other --------------------------------------------

REACH = """
query Reach($project: String!) {
  project(id: $project) {
    environments {
      pageInfo { hasNextPage }
      edges {
        node {
          id
          name
          canAccess
          serviceInstances {
            pageInfo { hasNextPage }
            edges { node { serviceId latestDeployment { id } } }
          }
        }
      }
    }
  }
}
"""

SERVICE_DELETE = """
mutation ServiceDelete($service: String!, $environment: String!) {
  serviceDelete(id: $service, environmentId: $environment)
}
"""

TAKE_OUT = """
mutation TakeOut($environment: String!, $patch: EnvironmentConfig) {
  environmentPatchCommit(
    environmentId: $environment, patch: $patch, commitMessage: "Delete a deployment"
  )
}
"""

HERE = """
query Here($project: String!, $environment: String!) {
  environment(id: $environment, projectId: $project) {
    serviceInstances { edges { node { serviceId } } }
  }
}
"""

RUNNING = """
query Running($service: String!, $environment: String!) {
  serviceInstance(serviceId: $service, environmentId: $environment) {
    latestDeployment { id status }
    activeDeployments { id status }
  }
}
"""

DEPLOYMENT_REMOVE = """
mutation DeploymentRemove($deployment: String!) {
  deploymentRemove(id: $deployment)
}
"""

SET_VARIABLES = """
mutation SetVariables($input: VariableCollectionUpsertInput!) {
  variableCollectionUpsert(input: $input)
}
"""

READ_BACK_SECONDS = 60.0  # in which a deletion by patch is to show
LEAST_SECONDS = 5.0  # ... of each, where others before it had no effect
LONGEST_PAUSE = 15.0
STOPPED = ("FAILED", "REMOVED", "REMOVING", "SKIPPED")  # of deployments


class NotUnderstood(RuntimeError):
    """Railway's answer does not say that something was done."""


@dataclass
class Deletion:
    """How a service is deleted in one environment.

    Railway's schema says that `serviceDelete` acts on all environments that are no forks, its CLI
    that it acts on one. So it is called only where no other environment has anything of the
    service, and the token sees all of them: `canAccess` of each that is listed. (A project's token
    lists its own alone.) Else a patch takes the service out of this environment. Where that has no
    effect, what runs of the service here is stopped, and the empty service marked with REMOVED.

    Args:
        call: sends a document with its variables, which may be repeated, and returns its data.
        refused: what `call` raises where Railway says no.
        for_one_environment: is the token a project's?
        timeout: seconds in which patches are to show, for all deletions together.
    """

    call: Callable[..., Any]
    refused: type[Exception]
    project_id: str
    environment_id: str
    for_one_environment: Callable[[], bool]
    timeout: float = field(default_factory=lambda: READ_BACK_SECONDS)

    def delete(self, service_id: str) -> bool:
        """True: the service is not in this environment any more. False: it is empty, and marked.

        Raises NotUnderstood, and what `call` raises. It can be called again then.
        """
        if not self.for_one_environment() and self._is_nowhere_else(service_id):
            return self._delete(service_id)
        if self._take_out(service_id):
            return True
        self._empty(service_id)
        return False

    def _is_nowhere_else(self, service_id: str) -> bool:
        """Do all environments show that none but this one has a deployment of the service, or says
        whose it is there?"""
        try:
            found = self.call(REACH, project=self.project_id)["project"]["environments"]
            nodes = [edge["node"] for edge in found["edges"]]
            pages = [found, *(node["serviceInstances"] for node in nodes)]
            if any(page["pageInfo"]["hasNextPage"] for page in pages):
                return False
            if not all(node["canAccess"] is True for node in nodes):
                return False
            if self.environment_id not in {node["id"] for node in nodes}:
                return False
            others = []
            for node in nodes:
                for edge in node["serviceInstances"]["edges"]:
                    if edge["node"]["serviceId"] != service_id:
                        continue
                    if node["id"] == self.environment_id:
                        continue
                    if edge["node"]["latestDeployment"]:
                        return False
                    others.append(node["id"])
            return not others or self._says_nothing(service_id, others)
        except (self.refused, KeyError, TypeError):
            return False

    def _says_nothing(self, service_id: str, environments: list[str]) -> bool:
        """Is there no stamp on the service in these environments? One of which no variables show
        is not believed: Railway itself sets some on each."""
        ids = {f"e{i}": environment for i, environment in enumerate(environments)}
        parameters = ", ".join(f"${name}: String!" for name in ids)
        fields = "\n".join(
            f"  {name}: variables(projectId: $project, environmentId: ${name},"
            " serviceId: $service, unrendered: true)"
            for name in ids
        )
        head = f"query Stamps($project: String!, $service: String!, {parameters})"
        found = self.call(
            f"{head} {{\n{fields}\n}}", project=self.project_id, service=service_id, **ids
        )
        return all(found[name] and not found[name].get(STACK) for name in ids)

    def _delete(self, service_id: str) -> bool:
        try:
            answer = self.call(SERVICE_DELETE, service=service_id, environment=self.environment_id)
        except self.refused as error:
            if "not found" in str(error).lower() and not self._is_here(service_id):
                return True
            raise
        if answer.get("serviceDelete") is not True:
            raise NotUnderstood(
                "Railway does not say that it deleted the service: look at its page"
            )
        return True

    def _take_out(self, service_id: str) -> bool:
        """Delete by a patch of this environment, and look whether it had an effect."""
        patch = {"services": {service_id: {"isDeleted": True}}}
        began = time.monotonic()
        deadline, pause = began + max(self.timeout, LEAST_SECONDS), 1.0
        try:
            self.call(TAKE_OUT, environment=self.environment_id, patch=patch)
        except self.refused:
            deadline = began  # it may be gone already
        while self._is_here(service_id):
            if time.monotonic() + pause > deadline:
                self.timeout = max(0.0, self.timeout - (time.monotonic() - began))
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return True

    def _is_here(self, service_id: str) -> bool:
        """Is the service in this environment? An answer without any service is not believed: the
        router is there."""
        found = self.call(HERE, project=self.project_id, environment=self.environment_id)
        try:
            edges = found["environment"]["serviceInstances"]["edges"]
            there = {edge["node"]["serviceId"] for edge in edges}
        except (KeyError, TypeError):
            there = set()
        if not there:
            raise NotUnderstood("Railway does not say which services there are: try again")
        return service_id in there

    def _empty(self, service_id: str) -> None:
        """Stop what runs of a service here, or comes up, and mark it."""
        where = {"service": service_id, "environment": self.environment_id}
        try:
            found = self.call(RUNNING, **where)["serviceInstance"]
            latest = found["latestDeployment"]
            coming = [latest] if latest and latest["status"] not in STOPPED else []
            running = {d["id"] for d in [*found["activeDeployments"], *coming]}
        except (KeyError, TypeError):
            raise NotUnderstood(
                "Railway does not say what runs of the service: try again"
            ) from None
        for deployment in running:
            answer = self.call(DEPLOYMENT_REMOVE, deployment=deployment)
            if answer.get("deploymentRemove") is not True:
                raise NotUnderstood("Railway does not say that it stopped the service: try again")
        self.call(
            SET_VARIABLES,
            input={
                "projectId": self.project_id,
                "environmentId": self.environment_id,
                "serviceId": service_id,
                "variables": {REMOVED: f"{time.time():.0f}"},
                "skipDeploys": True,
            },
        )
