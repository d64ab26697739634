"""`logs`: what a service says."""

from __future__ import annotations

import time
from typing import Any

from pulse_railway.errors import Failure
from pulse_railway.options import LogsOptions
from pulse_railway.output import Output
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api
from pulse_railway.router_commands import read_active
from pulse_railway.stack import Service, Stack, find_backend
from pulse_railway.waiting import latest


def logs(api: Api, stack: Stack, wanted: LogsOptions, output: Output) -> dict[str, Any]:
    """The log of a service's latest deployment; with `follow`, until it is interrupted."""
    service = _service(api, stack, wanted)
    found = latest(api, stack.target).get(service.id)
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


def _service(api: Api, stack: Stack, wanted: LogsOptions) -> Service:
    if wanted.service:
        if wanted.service not in stack.services:
            there = ", ".join(stack.services)
            raise Failure(f"no service is named {wanted.service}; there are: {there}")
        return stack.services[wanted.service]
    chosen = wanted.deployment_id or read_active(api, stack)
    if not chosen:
        raise Failure("no deployment is active: pass --deployment-id or --service")
    return find_backend(stack, chosen)
