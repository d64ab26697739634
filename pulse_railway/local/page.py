"""The local Railway's page: the services, as on Railway's canvas, and the routing state.

/               the page (page.html), which requests the next address once a second
/local/picture  the services, their status, and the routing state with sessions and requests
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

PICTURE_TIMEOUT = 0.5  # seconds that a picture waits for a slow Redis or backend
TAIL = 64 * 1024  # bytes at the end of a log that are read


class Page:
    """The page, with its `routes`.

    It reads the routing state and asks the backends as the router does, on their loopback ports.
    `fault_settings` returns the faults that are set, for the page.
    """

    def __init__(
        self, state: State, supervisor: Supervisor, fault_settings: Callable[[], dict[str, Any]]
    ) -> None:
        self.state, self.supervisor, self.fault_settings = state, supervisor, fault_settings
        # by environment id and router name: the task that reads the status, and the last status
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
        """Answer with the services of one environment and the routing state of one stack.

        `?project=<id>`, `?environment=<id>` and `?stack=<id of its router>` select them. The
        default is the first, also in place of an environment or stack that does not exist; a
        project that does not exist is a 404.
        """
        state = self.state
        project_id = request.query_params.get("project")
        project = state.project(project_id) if project_id else state.projects[0]
        if project is None:
            return JSONResponse({"message": "no such project"}, 404)
        environment_id = request.query_params.get("environment")
        environments = project.environments
        environment = next((e for e in environments if e.id == environment_id), environments[0])
        instances = list(state.instances(environment.id))
        owned = [ownership.ServiceVariables(s.id, s.name, i.variables) for s, i in instances]
        stacks = {router.id: router.name for router in ownership.routers(owned)}
        stack = request.query_params.get("stack")
        if stack not in stacks:
            stack = next(iter(stacks), None)
        owners = ownership.owners(environment.id, owned)
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
        """Return the last lines of a deployment's log, or of its build's log if it has none yet."""
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
        """Return the answer of this router's `control status`, or the last one if it is slow."""
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
        instances = state.instances(environment.id)
        service = next(((s, i) for s, i in instances if s.name == router), None)
        variables = render_variables(state, *service) if service else {}
        file = self.supervisor.hosts_file(environment.id)
        hosts = json.loads(file.read_text()) if file.exists() else {}
        url = loopback_url(variables.get(contract.REDIS_URL, ""), hosts)
        if not url:
            return {"problem": "there is no baseline yet"}
        prefix = variables.get(contract.REDIS_PREFIX) or contract.DEFAULT_REDIS_PREFIX
        token = variables.get(contract.INTERNAL_TOKEN, "")
        try:
            return await asyncio.to_thread(read_status, load("router"), url, prefix, token, hosts)
        except Exception as error:  # whatever a Redis answers, the page must go on
            return {"problem": f"Redis does not answer ({type(error).__name__})"}


def describe_owner(owner: Any, stacks: dict[str, str]) -> str:
    """Return whose a service is, for the page: an `ownership.Owner`, and router names by id."""
    if owner.kind == "stack":
        return f"stack of {stacks[owner.router_id]}"
    texts = {"copy": "copied from another environment", "gone": "of a router that is gone"}
    return texts.get(owner.kind, "of no stack")


def read_status(
    router: ModuleType, url: str, prefix: str, token: str, hosts: dict[str, Any]
) -> dict[str, Any]:
    """Return `control status` of a routing state; private addresses are read as loopback ones."""
    store = router.RedisStore(url, prefix)
    try:
        routing = store.read()
        records = (
            replace(record, address=loopback_url(record.url or "", hosts) or record.address)
            for record in routing.records.values()
        )
        routing = load("control").with_records(routing, *records)
        store.read = lambda: routing
        return dict(load("control").status_answer(store, token, None))
    finally:
        store.client.close()


def loopback_url(url: str, hosts: dict[str, Any]) -> str | None:
    """Return a private address as a loopback address. None if no process runs there."""
    parts = urlsplit(url)
    ports = hosts.get(parts.hostname or "")
    if not parts.hostname or not parts.hostname.endswith(".railway.internal"):
        return url or None
    if not isinstance(ports, dict):
        return None
    login = parts.netloc.rpartition("@")[0]
    address = f"127.0.0.1:{next(iter(ports.values()))}"
    return urlunsplit(parts._replace(netloc=f"{login}@{address}" if login else address))
