"""The local Railway as one process.

/graphql/v2                                    Railway's API
/project/<id>/environment/<id>/up              uploads, as the railway CLI sends them
a loopback port of its own                     `railway ssh`: a command in a service (relay.py)
/                                              a page of what runs (page.py)
/oauth/token                                   refreshes a CLI login
/local/faults, /local/stats, /local/cron/...,
/local/login                                   for tests: sets faults, counts calls, runs a cron
                                               service, makes a login of the CLI. /local/* needs
                                               the folder's key (guard.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs

import uvicorn
from graphql import FieldNode, GraphQLError, OperationDefinitionNode
from graphql.error import GraphQLSyntaxError
from graphql.utilities import value_from_ast_untyped
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pulse_railway import contract
from pulse_railway.errors import Failure
from pulse_railway.local import api, cli, edge, guard, uploads
from pulse_railway.local.faults import Fault, FaultSettings
from pulse_railway.local.page import Page
from pulse_railway.local.relay import Relay
from pulse_railway.local.ssh_keys import fingerprint, key_file
from pulse_railway.local.state import (
    Deployment,
    Domain,
    Instance,
    Service,
    SshKey,
    State,
    Token,
    new_id,
)
from pulse_railway.local.supervisor import Supervisor, free_port, is_free


class LocalRailway:
    """A local Railway in a folder, which it creates on first use."""

    def __init__(self, root: Path) -> None:
        self.state = State(root)
        self.key, self.bundle = edge.certificates(root)
        if self.state.api_port is None:
            self.state.api_port = free_port()
            self.state.save()
        guard.write_page(root, self.url)
        self.supervisor = Supervisor(self.state, f"{self.url}/graphql/v2")
        self.schema = api.schema()
        self.relay = Relay(self.state, self.supervisor, self.relay_fault)
        self.edges: dict[str, edge.Edge] = {}
        self.faults: list[Fault] = []
        self.fault_settings: dict[str, Any] = {}  # only fields that differ from their defaults
        self.latency = 0.0
        self.edge_page = ""
        self.rules = api.Rules()
        self.lock: IO[str] | None = None  # held while it runs
        self.rate_limit: int | None = None
        self.rate_window = (0.0, 0)  # its beginning (monotonic), and the API calls in it
        self.calls: Counter[str] = Counter()
        self.documents = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.state.api_port}"

    def claim(self) -> None:
        """Take the folder for this process, and replace the ports that others have by now.

        Older versions kept ephemeral ports, which any connection of the machine may get. Raises
        Failure if another local Railway runs in this folder.
        """
        if self.lock:
            return
        state = self.state
        lock = (state.root / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise Failure(f"another local Railway runs in {state.root}") from None
        self.lock = lock
        if not is_free(state.api_port or 0):
            state.api_port = free_port()
            self.supervisor.api_url = f"{self.url}/graphql/v2"
            guard.write_page(state.root, self.url)
        if not is_free(state.ssh_port or 0):
            state.ssh_port = None  # the relay chooses one
        for service in state.services:
            for instance in service.instances:
                for domain in instance.domains:
                    if not is_free(domain.port):
                        domain.port = free_port()
                        taken, domain.domain = domain.domain, f"localhost:{domain.port}"
                        print(
                            f"another process has {taken}: {service.name} is at {domain.domain}"
                            " from now on; `pulse-railway ensure` says what else that changes",
                            file=sys.stderr,
                        )
        state.save()

    # -- shell -------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """Return the variables with which a shell's clients of Railway use this one."""
        project = self.state.projects[0]
        account = next(t for t in self.state.tokens if t.kind == "account")
        return {
            contract.API_URL_VARIABLE: f"{self.url}/graphql/v2",
            contract.RAILWAY_API_TOKEN: account.value,
            "RAILWAY_PROJECT": project.name,
            "RAILWAY_PROJECT_ID": project.id,
            "RAILWAY_ENVIRONMENT": project.environments[0].name,
            "RAILWAY_ENVIRONMENT_ID": project.environments[0].id,
            "PULSE_RAILWAY_SSH_KEY": str(self.ssh_key()),
            "SSL_CERT_FILE": str(self.bundle),
            "NODE_EXTRA_CA_CERTS": str(self.bundle),
            "PATH": f"{self.state.root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def ssh_key(self) -> Path:
        """Return the file of a key that is registered with the account; made on first use.

        With it `railway ssh` works without a key of the user's own.
        """
        path = key_file(self.state.root / "ssh" / "id_ed25519")
        public = path.with_suffix(".pub").read_text().strip()
        key_id = fingerprint(public)
        if all(key.fingerprint != key_id for key in self.state.ssh_keys):
            self.state.ssh_keys.append(SshKey(new_id(), "local", public, key_id))
            self.state.save()
        return path

    def write_cli(self) -> None:
        """Write the `railway` executable, in the folder that `environment` puts on PATH."""
        folder = self.state.root / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "railway"
        script.write_text(cli.script(self.state.root))
        script.chmod(0o755)

    # -- life --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run everything but the HTTP server: edges, services, cron, ssh."""
        self.write_cli()
        self.ssh_key()
        for service in self.state.services:
            for instance in service.instances:
                for domain in instance.domains:
                    await self._open_edge(service, instance, domain)
        await self.supervisor.start()
        await self.relay.start()
        self.state.save()
        try:
            yield
        finally:
            await self.relay.stop()
            await asyncio.gather(*(e.stop() for e in self.edges.values()))
            await self.supervisor.stop()

    async def open_domain(
        self, service: Service, instance: Instance, target_port: int | None
    ) -> Domain:
        port = free_port()
        domain = Domain(new_id(), f"localhost:{port}", port, target_port)
        instance.domains.append(domain)
        await self._open_edge(service, instance, domain)
        return domain

    async def _open_edge(self, service: Service, instance: Instance, domain: Domain) -> None:
        turns = itertools.count()

        def target() -> int | None:
            running = self.supervisor.targets(instance) if domain in instance.domains else []
            return running[next(turns) % len(running)].port if running else None

        self.edges[domain.id] = edge.Edge(domain.port, self.key, target, lambda: self.edge_page)
        await self.edges[domain.id].start()

    # -- requests ----------------------------------------------------------------------------

    def token_of(self, request: Request) -> Token | None:
        """Return the request's token. Only a project token may be in Project-Access-Token."""
        header = request.headers.get("authorization", "")
        bearer = header.removeprefix("Bearer ") if header.startswith("Bearer ") else None
        project = request.headers.get("project-access-token")
        if project is not None:
            token = self.state.token(project)
            return token if token and token.kind == "project" else None
        if bearer is not None:
            token = self.state.token(bearer)
            return token if token and token.kind != "project" and not token.expired else None
        return None

    def caller(self, request: Request) -> api.Caller:
        return api.Caller(self.token_of(request), self.supervisor, self.open_domain, self.rules)

    async def _fault_answer(self, fields: list[str], *, after: bool = False) -> Response | None:
        """Return the answer of a fault that applies to these fields, None if none does.

        With `after` only the faults count that fail after the call was carried out. Raises
        ConnectionAbortedError where a fault drops the connection.
        """
        for fault in self.faults:
            if fault.after != after or fault.gives is not ... or not fault.is_due(fields):
                continue
            if fault.delay:
                await asyncio.sleep(fault.delay)
            if fault.drop:
                raise ConnectionAbortedError("dropped by a fault of /local/faults")
            if fault.error:
                return JSONResponse({"data": None, "errors": [{"message": fault.error}]})
            if fault.body:
                return HTMLResponse(fault.body, fault.status or 200)
            if fault.status:
                headers = {}
                if fault.retry_after is not None:
                    headers["retry-after"] = f"{fault.retry_after:g}"
                return JSONResponse({"message": "fault of /local/faults"}, fault.status, headers)
        return None

    async def graphql(self, request: Request) -> Response:
        try:
            body = await request.json()
            document, values = body["query"], body.get("variables")
            fields = top_fields(document)
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"errors": [{"message": "Problem processing request"}]}, 400)
        except GraphQLSyntaxError as error:
            return JSONResponse({"errors": [{"message": error.message}]}, 400)
        self.documents += 1
        self.calls.update(fields)
        if limited := self._rate_limit_answer():
            return limited
        answer = await self._answer(request, document, values, fields)
        answer.headers.update(self._rate_limit_headers())
        return answer

    async def _answer(
        self, request: Request, document: str, values: dict[str, Any] | None, fields: list[str]
    ) -> Response:
        if self.latency:
            await asyncio.sleep(self.latency)
        if faulty := await self._fault_answer(fields):
            return faulty
        answer = await api.execute(self.schema, self.caller(request), document, values)
        if answer["data"]:
            self._replace_fields(document, values or {}, answer["data"])
        if faulty := await self._fault_answer(fields, after=True):
            return faulty
        # documents that do not validate are refused, as Railway's server does
        return JSONResponse(
            answer, 400 if answer["data"] is None and not is_resolver_error(answer) else 200
        )

    def _replace_fields(self, document: str, values: dict[str, Any], data: dict[str, Any]) -> None:
        """Replace the values of fields by those of faults (`gives`), in `data`."""
        for fault in self.faults:
            if fault.gives is ...:
                continue
            keys = [
                field.alias.value if field.alias else field.name.value
                for field in top_nodes(document)
                if field.name.value == fault.match
                and fault.service in (None, self._service_named_in(field, values))
            ]
            if keys and fault.is_due([fault.match]):
                data.update(dict.fromkeys(keys, fault.gives))

    def _service_named_in(self, field: FieldNode, values: dict[str, Any]) -> str | None:
        """Return the name of the service in a field's `serviceId` argument, or None."""
        for argument in field.arguments or ():
            if argument.name.value == "serviceId":
                service = self.state.service(value_from_ast_untyped(argument.value, values))
                return service.name if service else None
        return None

    def _rate_limit_answer(self) -> Response | None:
        """Count an API call; return a 429 if it is over the limit.

        Railway's limit is per hour (docs.railway.com, "Rate limits"); here it is per minute.
        """
        start, count = self.rate_window
        now = time.monotonic()
        if now > start + 60:
            start, count = now, 0
        self.rate_window = start, count + 1
        if self.rate_limit is None or count < self.rate_limit:
            return None
        headers = {"retry-after": str(int(start + 60 - now) + 1), **self._rate_limit_headers()}
        return JSONResponse({"message": "Too many requests"}, 429, headers)

    def _rate_limit_headers(self) -> dict[str, str]:
        """Return Railway's headers about its rate limit (docs.railway.com, "Rate limits")."""
        if self.rate_limit is None:
            return {}
        start, count = self.rate_window
        reset = datetime.fromtimestamp(time.time() + start + 60 - time.monotonic(), UTC)
        return {
            "x-ratelimit-limit": str(self.rate_limit),
            "x-ratelimit-remaining": str(max(self.rate_limit - count, 0)),
            "x-ratelimit-reset": reset.isoformat(),
        }

    async def up(self, request: Request) -> Response:
        caller = self.caller(request)
        service_id = request.query_params.get("serviceId", "")
        environment_id = request.path_params["environment"]
        self.calls.update(["up"])
        if faulty := await self._fault_answer(["up"]):
            return faulty
        try:
            instance = api.need_instance(caller, service_id, environment_id)
            service = api.need_service(caller, service_id)
        except GraphQLError as error:
            return JSONResponse({"message": error.message}, 404)
        with tempfile.NamedTemporaryFile(dir=self.state.root) as file:
            async for chunk in request.stream():
                file.write(chunk)
                if file.tell() > uploads.MAX_UPLOAD:
                    return PlainTextResponse(f"the limit is {uploads.MAX_UPLOAD} bytes", 413)
            file.flush()
            try:
                upload = self.supervisor.unpack(Path(file.name))
            except uploads.BadUpload as error:
                return JSONResponse({"message": str(error)}, 400)
        deployment = self.supervisor.deploy(service, instance, upload=upload)
        if faulty := await self._fault_answer(["up"], after=True):
            return faulty
        return JSONResponse(
            {
                "deploymentId": deployment.id,
                "url": f"{self.url}/project/{service.project_id}/service/{service.id}",
                "logsUrl": f"{self.url}/project/{service.project_id}/service/{service.id}"
                f"?id={deployment.id}",
                "deploymentDomain": instance.domains[0].domain if instance.domains else "",
            }
        )

    def relay_fault(self) -> Fault | None:
        """Count a command by ssh; return the fault that applies to it, or None."""
        self.calls.update(["ssh"])
        return next((fault for fault in self.faults if fault.is_due(["ssh"])), None)

    async def oauth(self, request: Request) -> Response:
        form = parse_qs((await request.body()).decode())
        self.calls.update(["oauth"])
        if faulty := await self._fault_answer(["oauth"]):
            return faulty
        refresh = (form.get("refresh_token") or [""])[0]
        old = next((t for t in self.state.tokens if t.refresh and t.refresh == refresh), None)
        if form.get("grant_type") != ["refresh_token"] or old is None or not form.get("client_id"):
            return JSONResponse({"error": "invalid_grant"}, 400)
        self.state.tokens.remove(old)
        token = self.state.new_oauth_token()
        self.state.tokens.append(token)
        self.state.save()
        return JSONResponse(
            {
                "access_token": token.value,
                "refresh_token": token.refresh,
                "token_type": "Bearer",
                "expires_in": 3600,
            }
        )

    async def login(self, request: Request) -> Response:
        """Answer with the tokens that `railway login` writes to ~/.railway/config.json."""
        token = self.state.new_oauth_token((await request.json())["seconds"])
        self.state.tokens.append(token)
        return JSONResponse({"access_token": token.value, "refresh_token": token.refresh})

    # -- faults -------------------------------------------------------------------------------

    async def set_faults(self, request: Request) -> Response:
        """Replace all faults; answer 400 with a message for a body that is no `FaultSettings`."""
        try:
            fault_settings = FaultSettings(**await request.json())
            self.faults = [Fault(**fault) for fault in fault_settings.faults]
            if fault_settings.edge not in ("", "html", "json"):
                raise ValueError(f"edge is html or json, not {fault_settings.edge}")
            if fault_settings.deletion_patch not in ("", "refuse", "ignore"):
                raise ValueError(
                    f"deletion_patch is refuse or ignore, not {fault_settings.deletion_patch}"
                )
            self.latency = float(fault_settings.latency)
            self.supervisor.build_seconds = float(fault_settings.build_seconds)
        except (ValueError, TypeError) as error:
            return JSONResponse({"message": f"not a fault that is known: {error}"}, 400)
        # the page need not show a cron that runs
        defaults = asdict(FaultSettings(clock=fault_settings.clock or None))
        self.fault_settings = {
            name: value for name, value in asdict(fault_settings).items() if value != defaults[name]
        }
        self.edge_page = fault_settings.edge
        self.rules = api.Rules(
            fault_settings.every_environment,
            fault_settings.deletion_patch,
            fault_settings.copy_uploads,
            fault_settings.restricted,
        )
        self.rate_limit, self.rate_window = fault_settings.rate_limit, (0.0, 0)
        self.supervisor.react_delay = str(fault_settings.react_delay)
        for name in "crash_at ipv6_only name_delay old_gets_requests keep_files".split():
            setattr(self.supervisor, name, getattr(fault_settings, name))
        if fault_settings.clock is not None:
            self.supervisor.clock = fault_settings.clock
        for project in self.state.projects:
            for environment in project.environments:
                self.supervisor.write_hosts(environment.id)
        return JSONResponse({"ok": True})

    async def stats(self, request: Request) -> Response:
        """Answer with the calls so far, and the processes.

        `?environment=<id>` leaves out the processes of other environments; `?reset=1` sets the
        counts of calls to zero.
        """
        names = {s.id: s.name for s in self.state.services}
        environment = request.query_params.get("environment")
        current = [
            (service.name, self.supervisor.current[instance.id])
            for service in self.state.services
            for instance in service.instances
            if instance.id in self.supervisor.current
            and environment in (None, instance.environment_id)
        ]
        answer = {
            "documents": self.documents,
            "fields": dict(self.calls),
            "starts": {names.get(k, k): n for k, n in self.supervisor.started.items()},
            "ports": {name: running.port for name, running in current},
            "pids": {name: running.process.pid for name, running in current},
        }
        if request.query_params.get("reset"):
            self.documents = 0
            self.calls.clear()
        return JSONResponse(answer)

    async def run_cron(self, request: Request) -> Response:
        """Run a cron service now; answer with its exit status and the end of its log.

        `?project=<id>` and `?environment=<id>` select it where several have its name.
        """
        name = request.path_params["service"]
        project = request.query_params.get("project")
        environment = request.query_params.get("environment")
        for service in self.state.services:
            if service.name != name or project not in (None, service.project_id):
                continue
            for instance in service.instances:
                if environment in (None, instance.environment_id):
                    code = await self.supervisor.run_cron(service, instance)
                    history = self.state.deployments_of(service.id, instance.environment_id)
                    return JSONResponse({"exit": code, "log": self._tail(history)})
        return JSONResponse({"message": "no such service"}, 404)

    def _tail(self, deployments: list[Deployment]) -> list[str]:
        latest = next((d for d in deployments if d.status == "SUCCESS"), None)
        if latest is None:
            return []
        lines = self.supervisor.read_logs(latest.id, "deploy", 20, None, None)
        return [line["message"] for line in lines]

    def app(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with self.running():
                yield

        post = ["POST"]
        return Starlette(
            routes=[
                *Page(self.state, self.supervisor, lambda: self.fault_settings).routes,
                Route("/graphql/v2", self.graphql, methods=post),
                Route("/graphql/v2/", self.graphql, methods=post),  # as some clients join it
                Route("/project/{project}/environment/{environment}/up", self.up, methods=post),
                Route("/oauth/token", self.oauth, methods=post),
                Route("/local/login", self.login, methods=post),
                Route("/local/faults", self.set_faults, methods=post),
                Route("/local/stats", self.stats),
                Route("/local/cron/{service}", self.run_cron, methods=post),
            ],
            # DNS rebinding: a page of another site must not read logs by a name that resolves here
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
                Middleware(guard.Guard, root=self.state.root),
            ],
            lifespan=lifespan,
        )


def top_fields(document: str) -> list[str]:
    """Return the names of a document's top-level fields, which tell what a call does."""
    return [field.name.value for field in top_nodes(document)]


def top_nodes(document: str) -> list[FieldNode]:
    return [
        selection
        for definition in api.parsed(document).definitions
        if isinstance(definition, OperationDefinitionNode)
        for selection in definition.selection_set.selections
        if isinstance(selection, FieldNode)
    ]


def is_resolver_error(answer: dict[str, Any]) -> bool:
    """Did a resolver fail, rather than the document's validation? Railway's status is then 200."""
    return any(error.get("path") for error in answer.get("errors", []))


def serve(local: LocalRailway) -> None:
    """Run until SIGINT or SIGTERM, then end every process of the services."""
    local.claim()
    config = uvicorn.Config(
        local.app(),
        host="127.0.0.1",
        port=local.state.api_port or 0,
        loop="asyncio",
        ws="none",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run()


if __name__ == "__main__":
    try:
        serve(LocalRailway(Path(sys.argv[1]).resolve()))
    except Failure as failure:
        raise SystemExit(f"error: {failure}") from None
