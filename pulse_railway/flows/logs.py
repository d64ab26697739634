"""`logs`: what a service says."""

from __future__ import annotations

import time
from typing import Any

from pulse_railway.config import Target
from pulse_railway.errors import Failure
from pulse_railway.options import LogsOptions
from pulse_railway.output import Output
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import read_active
from pulse_railway.stack import (
    Service,
    check_redis,
    find_backend,
    inspect,
    joined,
    read_services,
    read_variables,
)
from pulse_railway.waiting import latest


def logs(
    api: Api, target: Target, service: Service, wanted: LogsOptions, output: Output
) -> dict[str, Any]:
    """The log of a service's latest deployment; with `follow`, until it is interrupted."""
    found = latest(api, target).get(service.id)
    if found is None:
        raise Failure(f"{service.name} has no deployment yet")
    document = documents.BUILD_LOGS if wanted.build else documents.RUNTIME_LOGS
    key = "buildLogs" if wanted.build else "deploymentLogs"
    lines: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    since: str | None = None
    while True:
        data = api.call(document, deployment=found["id"], since=since, limit=wanted.lines)
        for line in data[key]:
            mark = (line["timestamp"], line["message"])
            if mark not in seen:
                seen.add(mark)
                since = line["timestamp"]
                lines.append(line)
                if not output.as_json:
                    print(line["message"], flush=True)
        if not wanted.follow:
            if not lines:
                output.say(f"{service.name} has said nothing yet")
            return {"service": service.name, "deployment": found["id"], "lines": lines}
        time.sleep(2.0)


def find(api: Api, target: Target, wanted: LogsOptions) -> Service:
    """Find the service whose log is read: the one that is named, whichever stack of the environment
    has it, since to read a log changes nothing; else the active deployment's, of one stack.

    Raises Failure that says which there are.
    """
    if not wanted.service and not wanted.deployment_id:
        stack = inspect(api, target, wanted.names)
        check_redis(stack, wanted.redis_service, wanted.redis_url, wanted.redis_prefix)
        chosen = read_active(api, stack)
        if not chosen:
            raise Failure("no deployment is active: pass --deployment-id or --service")
        return find_backend(stack, chosen)
    read = read_services(api, target, wanted.names)
    if wanted.deployment_id:
        read_variables(api, read)
        return find_backend(read, wanted.deployment_id)
    if wanted.service not in read.services:
        raise Failure(
            f"no service is named {wanted.service}; there are: {joined(read.services) or 'none'}"
        )
    return read.services[wanted.service]
