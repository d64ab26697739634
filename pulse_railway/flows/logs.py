"""`logs`: print a service's log."""

from __future__ import annotations

import time
from typing import Any

from pulse_railway.config import Target
from pulse_railway.errors import Failure
from pulse_railway.options import LogsOptions
from pulse_railway.output import Output, printable
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.router_commands import read_active
from pulse_railway.stack import (
    Service,
    check_redis,
    find_backend,
    inspect,
    is_gone,
    joined,
    read_environment,
    read_services,
)
from pulse_railway.waiting import latest


def logs(
    api: Api, target: Target, service: Service, options: LogsOptions, output: Output
) -> dict[str, Any]:
    """Print and return the log of a service's latest deployment.

    With `follow` new lines are printed until an interruption.
    """
    deployment = latest(api, target).get(service.id)
    if deployment is None:
        raise Failure(f"{service.name} has no deployment yet")
    document = documents.BUILD_LOGS if options.build else documents.RUNTIME_LOGS
    key = "buildLogs" if options.build else "deploymentLogs"
    lines: list[dict[str, Any]] = []
    printed: set[tuple[str, str]] = set()
    since: str | None = None
    while True:
        try:
            data = api.call(document, deployment=deployment["id"], since=since, limit=options.lines)
        except GraphqlError as error:
            if not is_gone(error):
                raise
            raise Failure(f"{service.name} was removed meanwhile, and its log with it") from None
        for line in data[key]:
            key_of_line = (line["timestamp"], line["message"])
            if key_of_line not in printed:
                printed.add(key_of_line)
                since = line["timestamp"]
                lines.append(line)
                if not output.as_json:
                    print(printable(line["message"].rstrip("\r\n")), flush=True)
        if not options.follow:
            if not lines:
                output.info(f"{service.name} has said nothing yet")
            return {"service": service.name, "deployment": deployment["id"], "lines": lines}
        time.sleep(2.0)


def find_source(api: Api, target: Target, options: LogsOptions) -> Service:
    """Return the service whose log is read.

    With `--service` or `--deployment-id` any service of the environment, of any stack, since
    reading a log changes nothing; else the active deployment's. Raises Failure, with a list of what
    exists, if there is none.
    """
    if not options.service and not options.deployment_id:
        stack = inspect(api, target, options.names)
        check_redis(stack, options.redis_service, options.redis_url, options.redis_prefix)
        if stack.router is None:
            raise Failure(
                "there is no router that says which deployment is active: pass --deployment-id, or"
                f" --service with one of these: {joined(stack.services) or 'none'}"
            )
        active = read_active(api, stack)
        if not active:
            raise Failure("no deployment is active: pass --deployment-id or --service")
        return find_backend(stack, active)
    if options.deployment_id:
        return find_backend(read_environment(api, target, options.names), options.deployment_id)
    services = read_services(api, target, options.names).services
    if options.service not in services:
        raise Failure(
            f"no service is named {options.service}; there are: {joined(services) or 'none'}"
        )
    return services[options.service]
