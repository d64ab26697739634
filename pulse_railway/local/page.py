"""The local Railway's page: what its canvas would show, and what pulse-railway makes of it.

/               the page (page.html), which asks once a second for
/local/picture  services, what they do now, and the routing state with sessions and requests
/local/logs/... the end of a service's log
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from pulse_railway import contract
from pulse_railway.local.state import Environment, Instance, Service, State, render_variables
from pulse_railway.local.supervisor import Supervisor
from pulse_railway.runtime_image import load

ownership: Any = load("ownership")

PICTURE_TIMEOUT = 0.5  # seconds that a picture waits for a Redis or a backend that is slow
TAIL = 64 * 1024  # bytes of a log


class Page:
    """`routes` are the page's. It asks the same routing state and the same backends that the
    router does, on their loopback ports. `fault_settings` says what is to go wrong."""

    def __init__(
        self, state: State, supervisor: Supervisor, fault_settings: Callable[[], dict[str, Any]]
    ) -> None:
        self.state, self.supervisor, self.fault_settings = state, supervisor, fault_settings
        # an environment's id and a router's name -> the task that asks, and what it said last
        self.pending: dict[tuple[str, str | None], asyncio.Task[Any]] = {}
        self.last_answers: dict[tuple[str, str | None], Any] = {}
        self.routes = [
            Route("/", self.show),
            Route("/local/picture", self.picture),
            Route("/local/logs/{instance}", self.logs),
        ]

    async def show(self, request: Request) -> Response:
        return FileResponse(Path(__file__).parent / "page.html")

    async def picture(self, request: Request) -> Response:
        """Of one project, the first or `?project=<id>`, in one environment: its first, where
        `?environment=<id>` names none that is there; the routing state of one of its stacks,
        `?stack=<id of its router>` in the same way."""
        state = self.state
        wanted = request.query_params.get("project")
        project = state.project(wanted) if wanted else state.projects[0]
        if project is None:
            return JSONResponse({"message": "no such project"}, 404)
        named = request.query_params.get("environment")
        here = project.environments
        environment = next((e for e in here if e.id == named), here[0])
        instances = list(state.instances(environment.id))
        every = [ownership.Service(s.id, s.name, i.variables) for s, i in instances]
        stacks = {router.id: router.name for router in ownership.routers(every)}
        named = request.query_params.get("stack")
        stack = named if named in stacks else next(iter(stacks), None)
        owners = ownership.owners(environment.id, every)
        services = [
            self.service(s, i)
            | {
                "owner": describe_owner(owners[s.id], stacks),
                "own": owners[s.id].router_id == stack,
            }
            for s, i in instances
        ]
        routing_status = await self.routing_status(environment, stacks.get(stack or ""))
        return JSONResponse(
            {
                "projects": [{"id": p.id, "name": p.name} for p in state.projects],
                "project": project.id,
                "environments": [{"id": e.id, "name": e.name} for e in project.environments],
                "environment": environment.id,
                "stacks": [{"id": router, "name": name} for router, name in stacks.items()],
                "stack": stack,
                "services": services,
                "routing": routing_status,
                "orders": self.fault_settings(),
            }
        )

    def service(self, service: Service, instance: Instance) -> dict[str, Any]:
        supervisor = self.supervisor
        deployments = self.state.deployments_of(service.id, instance.environment_id)
        running = supervisor.current.get(instance.id)
        newest = deployments[0] if deployments else None
        return {
            "instance": instance.id,
            "name": service.name,
            "deployment_id": instance.variables.get(contract.DEPLOYMENT_ID),
            "status": newest.status if newest else None,
            "since": newest.updated_at if newest else service.created_at,
            "cron": instance.settings.get("cronSchedule"),
            "runs": running is not None or instance.id in supervisor.cron_running,
            "restarts": running.restarts if running else 0,
            "addresses": [f"https://{domain.domain}" for domain in instance.domains],
            "says": self.tail(newest.id if newest else None)[-1:],
        }

    def tail(self, deployment_id: str | None) -> list[str]:
        """The last lines of a deployment's log; its build's while it has none of its own."""
        for kind in ("deploy", "build"):
            path = self.supervisor.logs / f"{deployment_id}.{kind}.jsonl"
            if path.exists():
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - TAIL))
                    lines = file.read().decode(errors="replace").splitlines()
                return [json.loads(line)["message"] for line in lines if line.startswith("{")]
        return []

    async def logs(self, request: Request) -> Response:
        state = self.state
        instance = state.instance_by_id(request.path_params["instance"])
        if instance is None:
            return JSONResponse({"message": "no such service"}, 404)
        deployments = state.deployments_of(instance.service_id, instance.environment_id)
        return JSONResponse({"lines": self.tail(deployments[0].id if deployments else None)[-200:]})

    # -- the routing state -------------------------------------------------------------------

    async def routing_status(self, environment: Environment, router: str | None) -> Any:
        """What this router's `control status` would say, or what it last said."""
        key = (environment.id, router)
        if key not in self.pending:
            self.pending[key] = asyncio.create_task(self.ask_status(environment, router))
        task = self.pending[key]
        await asyncio.wait({task}, timeout=PICTURE_TIMEOUT)
        if task.done():
            del self.pending[key]
            self.last_answers[key] = {**task.result(), "at": time.time()}
        return self.last_answers.get(key)

    async def ask_status(self, environment: Environment, router: str | None) -> dict[str, Any]:
        state = self.state
        found = {s.name: render_variables(state, s, i) for s, i in state.instances(environment.id)}
        variables = found.get(router or "", {})
        file = self.supervisor.hosts_file(environment.id)
        hosts = json.loads(file.read_text()) if file.exists() else {}
        url = loopback_url(variables.get(contract.REDIS_URL, ""), hosts)
        if not url:
            return {"problem": "there is no baseline yet"}
        prefix = variables.get(contract.REDIS_PREFIX) or contract.DEFAULT_REDIS_PREFIX
        token = variables.get(contract.INTERNAL_TOKEN, "")
        try:
            return await asyncio.to_thread(read_status, load("router"), url, prefix, token, hosts)
        except Exception as error:  # a Redis that is away, or speaks nonsense: the page lives on
            return {"problem": f"Redis does not answer ({type(error).__name__})"}


def describe_owner(owner: Any, stacks: dict[str, str]) -> str:
    """Whose a service is, for a reader: `ownership.Owner`, and the routers' names by their ids."""
    if owner.kind == "stack":
        return f"stack of {stacks[owner.router_id]}"
    of_others = {"copy": "copied from another environment", "gone": "of a router that is gone"}
    return of_others.get(owner.kind, "of no stack")


def read_status(
    router: ModuleType, url: str, prefix: str, token: str, hosts: dict[str, Any]
) -> dict[str, Any]:
    store = router.RedisStore(url, prefix)
    try:
        routing = store.read()
        here = (
            replace(record, address=loopback_url(record.url or "", hosts) or record.address)
            for record in routing.records.values()
        )
        routing = load("control").with_records(routing, *here)
        store.read = lambda: routing
        return dict(load("control").status_answer(store, token, None))
    finally:
        store.client.close()


def loopback_url(url: str, hosts: dict[str, Any]) -> str | None:
    """A private address as this process reaches it, on loopback. None where nothing runs there."""
    parts = urlsplit(url)
    ports = hosts.get(parts.hostname or "")
    if not parts.hostname or not parts.hostname.endswith(".railway.internal"):
        return url or None
    if not isinstance(ports, dict):
        return None
    login = parts.netloc.rpartition("@")[0]
    there = f"127.0.0.1:{next(iter(ports.values()))}"
    return urlunsplit(parts._replace(netloc=f"{login}@{there}" if login else there))
