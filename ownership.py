#!/usr/bin/env python3
"""The owner of a service. A Railway environment can hold several stacks, each with a router of its
own, and it can be a copy of another environment, with all of that one's variables.

Every service of a stack has its owner in the variable PULSE_RAILWAY_STACK, its stamp. The value is
a literal, since Railway would render a reference with the ids of the copy. The verbs, the janitor
and the router use this file, so it imports nothing but the standard library.
"""

from __future__ import annotations

import re
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

STACK = "PULSE_RAILWAY_STACK"  # <environment id>/<router service id>
DEPLOYMENT_ID = "PULSE_DEPLOYMENT_ID"
INTERNAL_TOKEN = "PULSE_RAILWAY_INTERNAL_TOKEN"
ROUTER_SERVICE = "PULSE_RAILWAY_SERVICE"  # on a janitor, as the next two: the service's name
JANITOR_SERVICE = "PULSE_RAILWAY_JANITOR_SERVICE"
REDIS_SERVICE = "PULSE_RAILWAY_REDIS_SERVICE"
REDIS_URL = "REDIS_URL"
REDIS_PREFIX = "PULSE_RAILWAY_REDIS_PREFIX"
REMOVED = "PULSE_RAILWAY_REMOVED"  # on an empty service that Railway did not delete: since when
ENVIRONMENT_ID, SERVICE_ID = "RAILWAY_ENVIRONMENT_ID", "RAILWAY_SERVICE_ID"  # set by Railway

REFERENCE = re.compile(r"\$\{\{\s*([^.}]+?)\.([A-Za-z0-9_]+)\s*\}\}")
_STAMP = re.compile(r"([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,64})")


@dataclass(frozen=True)
class Stamp:
    """A stamp: it names an owner, which is a router in an environment."""

    environment_id: str
    router_id: str

    def __str__(self) -> str:
        return f"{self.environment_id}/{self.router_id}"


def parse_stamp(text: str | None) -> Stamp | None:
    """Return the stamp in a variable's value; None if it is unset, a reference or invalid."""
    match = _STAMP.fullmatch(text or "")
    return Stamp(match[1], match[2]) if match else None


@dataclass(frozen=True)
class ServiceVariables:
    """A service of an environment, with its variables before references are rendered."""

    id: str
    name: str
    variables: Mapping[str, str]

    @property
    def stamp(self) -> Stamp | None:
        return parse_stamp(self.variables.get(STACK))

    @property
    def is_backend(self) -> bool:
        return bool(self.variables.get(DEPLOYMENT_ID))

    @property
    def is_empty(self) -> bool:
        """Was this service to be deleted, and Railway did not delete it, so that it is empty?"""
        return bool(self.variables.get(REMOVED))

    def refers_to(self) -> set[str]:
        """Return the names of the services that its variables refer to."""
        values = self.variables.values()
        return {match[1] for value in values for match in REFERENCE.finditer(value)}


@dataclass(frozen=True)
class StackNames:
    """The names of one stack's services; None for a service that is not known."""

    router: str
    janitor: str | None
    redis: str | None
    env: str | None


@dataclass(frozen=True)
class Owner:
    """The owner of a service, by kind.

    `stack`: the stack of router `router_id` in this environment. `copy`: a stack of another
    environment, of which this one is a copy. `gone`: a router that is no longer in this
    environment. `nobody`: neither its stamp nor anything else names an owner.
    """

    kind: str  # stack, copy, gone, nobody
    router_id: str | None = None


NOBODY = Owner("nobody")


def is_janitor(service: ServiceVariables) -> bool:
    """Is this a janitor: does it have its own name in JANITOR_SERVICE?"""
    return service.variables.get(JANITOR_SERVICE) == service.name and not service.is_backend


def routers(services: Sequence[ServiceVariables]) -> list[ServiceVariables]:
    """Return the routers of an environment.

    A service is a router if its stamp names itself. Without a stamp it is one if a janitor names
    it, or if it has the variables of the routing state.
    """
    named = {s.variables.get(ROUTER_SERVICE) for s in services if is_janitor(s)}
    found_routers = []
    for service in services:
        if service.is_backend or JANITOR_SERVICE in service.variables:
            continue
        if stamp := service.stamp:
            is_router = stamp.router_id == service.id
        else:
            has_state = REDIS_PREFIX in service.variables and REDIS_URL in service.variables
            is_router = service.name in named or has_state
        if is_router:
            found_routers.append(service)
    return found_routers


def names_of(router: ServiceVariables, services: Sequence[ServiceVariables]) -> StackNames:
    """Return the names of the services in a router's stack.

    They are the services with the router's stamp, whatever their names, else those that router,
    janitor and backends refer to. 0.3.x names the env service after the router.
    """
    existing = {s.name for s in services}
    stamped = [s for s in services if is_stamped_for(router, s) and not s.is_backend]
    janitors = [
        *(s for s in services if is_janitor(s) and s.variables.get(ROUTER_SERVICE) == router.name),
        *(s for s in stamped if JANITOR_SERVICE in s.variables),  # it or the router was renamed
    ]
    janitor = next(iter(sorted(janitors, key=lambda s: s not in stamped)), None)
    redis_names = [
        *([janitor.variables.get(REDIS_SERVICE)] if janitor else []),
        *(match[1] for match in REFERENCE.finditer(router.variables.get(REDIS_URL, ""))),
    ]
    named = [name for name in redis_names if name]
    renamed = [s.name for s in stamped if named and is_redis(s)]
    redis = next((n for n in [*named, *renamed] if n in existing), named[0] if named else None)
    taken = {router.name, redis, janitor.name if janitor else None}
    backends = (s.refers_to() for s in services if s.is_backend)
    referred = {name for names in backends if router.name in names for name in names}
    usual = usual_env(router.name)
    unnamed = [  # a copy of another service is no env service
        s for s in stamped if JANITOR_SERVICE not in s.variables and REDIS_PREFIX not in s.variables
    ]
    candidates = [
        *(s.name for s in unnamed if not is_redis(s)),
        *({usual} & existing),
        *(s.name for s in unnamed if s.name in referred),
        *(() if stamped else sorted(referred & existing)),  # a guess: it may be a database
    ]
    env = next((name for name in candidates if name not in taken), None)
    return StackNames(router.name, janitor.name if janitor else None, redis, env)


def is_stamped_for(router: ServiceVariables, service: ServiceVariables) -> bool:
    """Has a service this router's stamp? If the router lacks it, its id decides."""
    if service.stamp is None:
        return False
    return service.stamp == router.stamp or (
        router.stamp is None and service.stamp.router_id == router.id
    )


def is_redis(service: ServiceVariables) -> bool:
    """Has a service the variables of Railway's Redis?"""
    return {REDIS_URL, "REDIS_PASSWORD"} <= service.variables.keys()


def owners(
    environment_id: str,
    services: Sequence[ServiceVariables],
    named: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Owner]:
    """Return the owner of each service, by the service's id.

    Args:
        services: all of the environment, with their variables.
        named: by a router's id, the ids of the services that its routing state names.
    """
    stacks = [(router, names_of(router, services)) for router in routers(services)]
    return {s.id: _owner(environment_id, s, stacks, named or {}) for s in services}


def _owner(
    environment_id: str,
    service: ServiceVariables,
    stacks: Sequence[tuple[ServiceVariables, StackNames]],
    named: Mapping[str, Collection[str]],
) -> Owner:
    """Return the owner of a service. `stacks` has each router, and the names in its stack."""
    ids = {router.id for router, _ in stacks}
    if stamp := service.stamp:
        if stamp.environment_id != environment_id:
            return Owner("copy", stamp.router_id)
        return Owner("stack" if stamp.router_id in ids else "gone", stamp.router_id)
    if service.id in ids:
        return Owner("stack", service.id)
    stack = service.variables.get(STACK)
    # 0.3.x's `deploy` writes a reference to each variable of pulse-env; other values are invalid
    reference = REFERENCE.fullmatch(stack or "")
    if stack and not (reference and reference[2] == STACK):
        return NOBODY
    for router_id, backends in named.items():
        if service.id in backends:
            return Owner("stack", router_id)
    if service.is_backend:
        ties = {router.id: ties_to(service, router, names) for router, names in stacks}
        candidates = [router_id for router_id, tied in ties.items() if tied]
        if list(ties.values()) == [None]:  # a backend of 0.3.x, which makes one stack
            candidates = list(ties)
    else:
        candidates = [r.id for r, names in stacks if service.name in vars(names).values()]
    return Owner("stack", candidates[0]) if len(candidates) == 1 else NOBODY


def ties_to(backend: ServiceVariables, router: ServiceVariables, names: StackNames) -> bool | None:
    """Do a backend's variables tie it to a router's stack (True), to another one (False), or to
    none (None)?

    A backend refers to variables of its router and its env service. 0.3.x writes the router's
    internal token into it, and no reference if the env service has no variables.

    Args:
        names: of the services in the router's stack.
    """
    refers = backend.refers_to() - {names.redis}  # stacks can share a Redis
    if refers & {names.router, names.env}:
        return True
    tokens = {s.variables.get(INTERNAL_TOKEN, "${{") for s in (backend, router)}
    are_known = not any("${{" in token for token in tokens)
    if are_known and len(tokens) == 1:
        return True
    return False if refers or are_known else None


@dataclass(frozen=True)
class Unowned:
    """A backend without an owner in this environment, from the view of one of its stacks."""

    name: str
    deployment_id: str
    kind: str  # of Owner: copy, gone, nobody
    # copied with this stack, of its former router, or without ties to another stack; so this stack
    # may handle it
    related: bool
    own_router_gone: bool = False  # it is of the stack that asks, whose router was deleted

    @property
    def can_be_restored(self) -> bool:
        """A copied backend cannot: it has the original's address, and may have its sessions."""
        return self.related and self.kind != "copy"

    def words(self) -> str:
        """Return why the backend is left alone, and the commands that restore or delete it."""
        name = self.deployment_id
        delete = f"`pulse-railway delete --deployment-id {name}` removes it"
        restore = (
            f"`pulse-railway restore --deployment-id {name}` makes it this stack's, and active"
        )
        if self.own_router_gone:
            return (
                f"{name} is of this stack, whose router was deleted: `pulse-railway ensure"
                " --repair` creates that again, and nothing is removed until then"
            )
        # the other stack may be in use, or share the service with production
        if not self.related and self.kind == "copy":
            return (
                f"{name} was copied with another router, which is not set up here: `ensure` with"
                " the app of that stack sets it up, and then lists it"
            )
        if not self.related and self.kind == "nobody":
            return (
                f"{name} has no owner, and its variables are another stack's: `status` with the app"
                " of that stack says what to do; this stack changes nothing of it"
            )
        if not self.related:
            return (
                f"{name} ran under another router, which was deleted: `ensure --repair` with the"
                " app of that stack creates it again, or says why not; this stack changes nothing"
                " of it"
            )
        if self.kind == "copy":
            return (
                f"{name} was copied from another environment, with that one's address: nothing"
                f" routes to it. Deploy again; {delete} from this environment alone"
            )
        if self.kind == "gone":
            return f"{name} ran under a router that is gone: {restore}; {delete}"
        return (
            f"{name} has no owner, and no routing state of this stack names it: {restore}; {delete}"
        )


def unowned(
    service: ServiceVariables,
    owner: Owner,
    router: ServiceVariables,
    names: StackNames,
    services: Sequence[ServiceVariables],
) -> Unowned | None:
    """Return a service as an unowned backend; None if a stack owns it or it is no backend.

    Args:
        owner: of the service.
        router: of the stack that asks.
        names: of the services of that stack.
        services: all of the environment.
    """
    if owner.kind == "stack" or not service.is_backend or service.is_empty:
        return None
    match owner.kind:
        case "copy":
            related = owner.router_id == router.id
        case "gone":
            related = ties_to(service, router, names) is True
        case _:
            refers = service.refers_to()
            # it refers to deleted services, and nothing is left of a stack that may be its own
            ids = {router.id, *(s.id for s in services)}
            nothing_left = all(s.stamp.router_id in ids for s in services if s.stamp)
            is_former = bool(refers) and refers.isdisjoint(s.name for s in services)
            is_former &= nothing_left
            related = is_former or ties_to(service, router, names) is not False
            others = [*routers(services), *former_routers(services)]
            others = [r for r in others if r.name != router.name and r.id != router.id]
            related &= not any(ties_to(service, r, _all_names(r, services)) for r in others)
    own_router_gone = owner == Owner("gone", router.id)
    deployment_id = service.variables[DEPLOYMENT_ID]
    return Unowned(service.name, deployment_id, owner.kind, related, own_router_gone)


def former_routers(services: Sequence[ServiceVariables]) -> list[ServiceVariables]:
    """Return the routers that janitors name and that do not exist, with what is known of them: they
    were deleted, or renamed."""
    existing = {s.name for s in services}
    return [
        ServiceVariables(s.stamp.router_id if s.stamp else "", name, s.variables)
        for s in services
        if JANITOR_SERVICE in s.variables and not s.is_backend
        if (name := s.variables.get(ROUTER_SERVICE)) and name not in existing
    ]


def _all_names(router: ServiceVariables, services: Sequence[ServiceVariables]) -> StackNames:
    """Return the names in a router's stack, with the usual one of a deleted env service."""
    names = names_of(router, services)
    return names if names.env else replace(names, env=usual_env(router.name))


def usual_env(router: str) -> str:
    """Return the env service's name as 0.3.x makes it from the router's."""
    return f"{router.removesuffix('-router')}-env"


def identity(env: Mapping[str, str]) -> Stamp | None:
    """Return the owner that the container of a router or janitor works for.

    None outside Railway, and in the janitor of a stack without stamps.
    """
    environment_id = env.get(ENVIRONMENT_ID)
    if not environment_id:
        return None
    stamp = parse_stamp(env.get(STACK))
    if stamp and stamp.environment_id == environment_id:
        return stamp
    service_id = env.get(SERVICE_ID)
    if service_id and env.get(JANITOR_SERVICE) is None:
        return Stamp(environment_id, service_id)
    return None


def copied_from(env: Mapping[str, str]) -> str | None:
    """Return the environment that a container was copied from; None if it was not copied."""
    stamp, here = parse_stamp(env.get(STACK)), env.get(ENVIRONMENT_ID)
    return stamp.environment_id if stamp and here and stamp.environment_id != here else None


def name(env: Mapping[str, str]) -> str | None:
    """Return a container's identity as the routing state has it (`:owner`), or None."""
    stamp = identity(env)
    return str(stamp) if stamp else None


def copy_refusal(env: Mapping[str, str]) -> str | None:
    """Return the error message for a container in a copied environment; None elsewhere."""
    original = copied_from(env)
    return copy_words(original) if original else None


def copy_words(environment_id: str) -> str:
    """Return the error message for a copy of that environment."""
    return (
        f"this environment is a copy of {environment_id}: nothing is served, changed or deleted in"
        " it until `pulse-railway ensure` takes possession"
    )


def foreign_words(owner: str) -> str:
    """Return the error message for a routing state of another owner."""
    return (
        f"the routing state belongs to another stack ({owner}, as environment and router):"
        " nothing is changed. `pulse-railway ensure` says what to do"
    )


def replicas(config: Any, service_id: str) -> dict[str, int | None]:
    """Return a service's number of replicas by region; None for a region without a number.

    Railway's `multiRegionConfig` decides; its `numReplicas` follows.

    Args:
        config: of the environment, in the shape of EnvironmentConfig in Railway's schema.
    """
    of_service = ((config or {}).get("services") or {}).get(service_id) or {}
    regions = (of_service.get("deploy") or {}).get("multiRegionConfig") or {}
    return {region: r.get("numReplicas") if r else 0 for region, r in regions.items()}


def is_managed(redis_url: str) -> bool:
    """Does REDIS_URL, before rendering, name a Redis service of the same environment?"""
    if any(match[1] != "shared" for match in REFERENCE.finditer(redis_url)):
        return True
    try:
        host = urllib.parse.urlsplit(redis_url).hostname
    except ValueError:
        return False
    return (host or "").endswith(".railway.internal")


# -- deleting a service in one environment only ----------------------------------------------------

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

READ_BACK_SECONDS = 60.0  # until all deletions by patch must show
LEAST_SECONDS = 5.0  # at least so long for each, even if earlier ones had no effect
LONGEST_PAUSE = 15.0  # seconds between two reads
STOPPED = ("FAILED", "REMOVED", "REMOVING", "SKIPPED")  # statuses of Railway deployments


class NotUnderstood(RuntimeError):
    """Railway's answer does not confirm that a change was made."""


@dataclass
class Deletion:
    """Deletes services in one environment.

    By Railway's schema `serviceDelete` acts on all environments that are no forks, by its CLI on
    one. So it is called only if no other environment uses the service, and if the token sees all
    environments (`canAccess` of each that is listed; a project token lists only its own). Otherwise
    a patch deletes the service in this environment. If the patch has no effect, the service's
    deployments here are stopped, and the empty service gets the variable REMOVED.

    Args:
        call: sends a GraphQL document with its variables and returns the data; it may retry.
        refused: the exception of `call` if Railway refuses a document.
        for_one_environment: is the token a project token?
        timeout: seconds until patches must show, for all deletions together.
    """

    call: Callable[..., Any]
    refused: type[Exception]
    project_id: str
    environment_id: str
    for_one_environment: Callable[[], bool]
    timeout: float = field(default_factory=lambda: READ_BACK_SECONDS)

    def delete(self, service_id: str) -> bool:
        """Delete a service. False: Railway did not delete it; it is empty and has REMOVED.

        Raises NotUnderstood and the exceptions of `call`; then it can be called again.
        """
        if not self.for_one_environment() and self._is_nowhere_else(service_id):
            return self._delete(service_id)
        if self._take_out(service_id):
            return True
        self._empty(service_id)
        return False

    def _is_nowhere_else(self, service_id: str) -> bool:
        """Is it certain that no other environment has a deployment or a stamp of the service?"""
        try:
            environments = self.call(REACH, project=self.project_id)["project"]["environments"]
            nodes = [edge["node"] for edge in environments["edges"]]
            pages = [environments, *(node["serviceInstances"] for node in nodes)]
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
            return not others or self._has_no_stamp(service_id, others)
        except (self.refused, KeyError, TypeError):
            return False

    def _has_no_stamp(self, service_id: str, environments: list[str]) -> bool:
        """Is the service without a stamp in these environments?

        Railway sets variables on each service, so an answer without any is no proof.
        """
        ids = {f"e{i}": environment for i, environment in enumerate(environments)}
        parameters = ", ".join(f"${name}: String!" for name in ids)
        fields = "\n".join(
            f"  {name}: variables(projectId: $project, environmentId: ${name},"
            " serviceId: $service, unrendered: true)"
            for name in ids
        )
        head = f"query Stamps($project: String!, $service: String!, {parameters})"
        variables = self.call(
            f"{head} {{\n{fields}\n}}", project=self.project_id, service=service_id, **ids
        )
        return all(variables[name] and not variables[name].get(STACK) for name in ids)

    def _delete(self, service_id: str) -> bool:
        """Delete by `serviceDelete`. Raises NotUnderstood if Railway does not confirm it."""
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
        """Delete by a patch of this environment. False: Railway still lists the service."""
        patch = {"services": {service_id: {"isDeleted": True}}}
        began = time.monotonic()
        deadline, pause = began + max(self.timeout, LEAST_SECONDS), 1.0
        try:
            self.call(TAKE_OUT, environment=self.environment_id, patch=patch)
        except self.refused:
            deadline = began  # the service may be gone already, so it is looked up once
        while self._is_here(service_id):
            if time.monotonic() + pause > deadline:
                self.timeout = max(0.0, self.timeout - (time.monotonic() - began))
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return True

    def _is_here(self, service_id: str) -> bool:
        """Does Railway list the service in this environment?

        The router at least is listed, so an answer without services raises NotUnderstood.
        """
        data = self.call(HERE, project=self.project_id, environment=self.environment_id)
        try:
            edges = data["environment"]["serviceInstances"]["edges"]
            listed = {edge["node"]["serviceId"] for edge in edges}
        except (KeyError, TypeError):
            listed = set()
        if not listed:
            raise NotUnderstood("Railway does not say which services there are: try again")
        return service_id in listed

    def _empty(self, service_id: str) -> None:
        """Stop all deployments of a service here, and set REMOVED on it."""
        where = {"service": service_id, "environment": self.environment_id}
        try:
            instance = self.call(RUNNING, **where)["serviceInstance"]
            latest = instance["latestDeployment"]
            starting = [latest] if latest and latest["status"] not in STOPPED else []
            running = {d["id"] for d in [*instance["activeDeployments"], *starting]}
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
