"""Writes docs/reference.md from the code. `invoke docs` runs it; a test compares the page."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from pulse_railway import help
from pulse_railway.app.plugin import RailwayPlugin
from pulse_railway.flags import FLAGS
from pulse_railway.runtime_image import load

PAGE = Path(__file__).with_suffix(".md")

# by reader: names and meanings; a test checks that each variable of the code is here
VARIABLES = {
    "Here, and in a CI": {
        "RAILWAY_TOKEN": "a project token",
        "RAILWAY_API_TOKEN": "an account's or a workspace's token",
        "RAILWAY_PROJECT_ID, RAILWAY_ENVIRONMENT_ID": "project and environment, if neither flags"
        " nor the plugin nor a project token name them",
        **{
            flag.variable: f"`{flag.option}`: {flag.help}"
            for flag in FLAGS.values()
            if flag.variable
        },
        "PULSE_RAILWAY_REGISTRY_PASSWORD": "the password or token with which Railway pulls private"
        " images, a secret; `--registry-password-file` comes before it",
        "PULSE_RAILWAY_API_URL": "another address of Railway's API: the local Railway's",
        "RAILWAY_HTTP_TIMEOUT": "Railway's CLI reads it; the default for uploads is 1800 (seconds)",
        "RAILWAY_ENV, RAILWAY_OAUTH_CLIENT_ID": "as in Railway's CLI, for its login",
        "NO_COLOR": "no colours",
    },
    "In a backend": {
        "PULSE_APP_FILE": "the app's file; set by `deploy`",
        "PULSE_DEPLOYMENT_ID": "the deployment's id; set by `deploy`",
        "PULSE_SERVER_ADDRESS": "the public address; set by `deploy`",
        "PULSE_PUBLIC_ORIGIN": "the same, for Pulse's next versions; set by `deploy`",
        "PULSE_RAILWAY_INTERNAL_TOKEN": "the token of the router and the janitor for its internal"
        " endpoints; set by `deploy`",
        "PULSE_RAILWAY_REDIS_URL": "the Redis of the sessions, a reference; only with"
        " `RailwaySessionStore`. On the env service: another one than the router's, by"
        " `ensure --session-redis-url`",
        "PULSE_RAILWAY_SESSION_SCOPE": "in a copy of an environment, on a shared Redis: its id,"
        " which follows the prefix of session keys",
        "PULSE_RAILWAY_DEPLOYMENT_NAME": "the name from which its id was generated",
        "PULSE_RAILWAY_ABOUT": "commit, author and message, as JSON: `restore` and the janitor"
        " write them again where Redis has lost them",
        "PULSE_RAILWAY_DEPLOY_RUN": "the run of `deploy` that created it; empty on a preview",
        "PULSE_RAILWAY_PREVIEW": "on a preview: the SHA-256 of its key, from which a lost record is"
        " restored",
        "PULSE_RAILWAY_INSTANCES": "how many processes `serve` runs; set by `deploy --instances`",
        "PULSE_RAILWAY_INSTANCE": "which process this is, from 1; `serve` sets it on each of"
        " several",
        "PULSE_SSR_BACKEND_URL": "its own address, by which React's server beside it renders pages;"
        " `serve` sets it on each of several",
        "PORT": "8000; of the second process 8001, and so on",
        "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "seconds from SIGTERM to SIGKILL: 10, as a setting"
        " of the service too",
        "PULSE_SECRET": "Pulse's own, for sessions in cookies: set it on `pulse-env`",
    },
    "In its build": {
        "PULSE_WEB_ROOT": "the React project's folder",
        "RAILWAY_DOCKERFILE_PATH": "the Dockerfile",
    },
    "On the router": {
        "REDIS_URL": "the routing state",
        "PULSE_RAILWAY_REDIS_PREFIX": "the prefix of its keys: `pulse:railway`",
        "PULSE_KV_KIND, PULSE_KV_URL, PULSE_KV_PATH": "for runs elsewhere: `redis` and its URL, or"
        " `sqlite` and its file",
        "HOST, PORT": "the addresses that it listens on: IPv4 and IPv6, 8000",
        "PULSE_RAILWAY_ROUTER_WORKERS": "no effect: a router is one process; its service has"
        " replicas (`ensure --router-replicas`)",
        "PULSE_RAILWAY_METRICS_PORT": "the port for Prometheus: none",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "the endpoint to which metrics are pushed: none",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "the endpoint to which traces are pushed: none",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "an endpoint for both; metrics go there only with"
        " `OTEL_METRICS_EXPORTER=otlp`",
        "OTEL_METRICS_EXPORTER, OTEL_TRACES_EXPORTER": "`otlp`, or `none`: never pushed",
        "OTEL_SDK_DISABLED": "`true`: nothing is ever pushed",
        "OTEL_EXPORTER_OTLP_PROTOCOL, OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "anything but"
        " `http/protobuf`: no traces",
        "OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_METRICS_HEADERS,"
        " OTEL_EXPORTER_OTLP_TRACES_HEADERS, OTEL_METRIC_EXPORT_INTERVAL, OTEL_SERVICE_NAME,"
        " OTEL_RESOURCE_ATTRIBUTES": "as in OpenTelemetry's specification",
        "PULSE_RAILWAY_ACCESS_LOG": "`1`: a line for each answer",
        "PULSE_RAILWAY_ASSET_PREFIXES": "path prefixes of a build's files, comma-separated:"
        " `/assets/`",
        "PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT": "seconds without a byte of the backend: 900",
        "PULSE_RAILWAY_ROUTER_SHUTDOWN_SECONDS": "seconds for requests to finish after SIGTERM: 25",
        "PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS": "seconds that a half-closed socket may be"
        " silent: 60",
        "PULSE_RAILWAY_ROUTER_FALLBACK": "`off`: while the active version cannot be connected to,"
        " new visitors get 502 instead of the version before it",
        "PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT": "the most clients at once; more are answered 503:"
        " half of the descriptors",
        "PULSE_RAILWAY_ACTIVE, PULSE_RAILWAY_ACTIVE_AT": "the deployment that was promoted last,"
        " and the time, in case Redis loses them",
        "PULSE_RAILWAY_STACK": "on every service of a stack: its owner, as `<environment id>/<id"
        " of the router service>`",
        "PULSE_RAILWAY_APP": "the app that it serves: name, repository and file, as JSON",
        "PULSE_RAILWAY_CRON, PULSE_RAILWAY_ROUTER_REPLICAS": "as on the janitor: the values of"
        " `ensure`'s flags, which a later `ensure` without them keeps. So are"
        " `PULSE_RAILWAY_KEEP` and `PULSE_RAILWAY_ROLLBACK_WINDOW_SECONDS`",
        "PULSE_RAILWAY_REPLACES": "on a router that `ensure --repair` has created: the owner whose"
        " routing state it takes over",
        "PULSE_RAILWAY_REMOVED": "on a service that could not be deleted on Railway: the time"
        " since when it is empty",
        "PULSE_RAILWAY_KEY_TTL_SECONDS": "in a copy of an environment, on a shared Redis: its keys'"
        " time to live. On the janitor and the backends, too",
        "PULSE_RAILWAY_FORMER_TOKENS": "as on the janitor: JSON, the internal tokens before the"
        " present one that live versions hold, and until when; by `ensure --rotate`",
        "PULSE_RAILWAY_TOKEN_MADE": "`ensure` has made its token, in a copied environment",
        "PULSE_RAILWAY_OWNS_STATE": "`1`: the janitor claims a routing state that has no owner for"
        " this stack, even one with deployments",
        "PULSE_RAILWAY_MAINTENANCE": "the time since when the site is in maintenance, or empty",
        "PULSE_RAILWAY_MAINTENANCE_OFF": "the time since when the site is open again, or empty",
        "PULSE_RAILWAY_DRAIN_TTL_SECONDS": "as on the janitor: a removed deployment's id is stored"
        " for as long, and at least seven days",
        "PULSE_RAILWAY_SETUP": "set while `scaffold` or `ensure` is not finished",
        "PULSE_RAILWAY_UNDEPLOYED": "`1` until the variables that `ensure` wrote are deployed;"
        " on the janitor, too",
        "PULSE_RAILWAY_RUNTIME_VERSION": "the version of its runtime; on the janitor, too",
    },
    "On the janitor": {
        "PULSE_RAILWAY_DRAIN_TTL_SECONDS": "`--drain-ttl-seconds`",
        "PULSE_RAILWAY_ROLLBACK_WINDOW_SECONDS": "`--rollback-window-seconds`",
        "PULSE_RAILWAY_KEEP": "`--keep`",
        "PULSE_RAILWAY_SERVICE_PREFIX": "the prefix of the backends' names",
        "PULSE_RAILWAY_SERVICE, PULSE_RAILWAY_JANITOR_SERVICE, PULSE_RAILWAY_REDIS_SERVICE": "the"
        " names of the stable services",
        "PULSE_RAILWAY_CONTROL, PULSE_RAILWAY_CONTROL_ANSWER": "`--control job`: a command, and its"
        " answer",
    },
}


def verbs() -> list[str]:
    lines = ["## Verbs", "", "| verb | does |", "| --- | --- |"]
    for group in help.GROUPS.values():
        lines += [f"| [`{verb}`](#{verb}) | {help.summary(verb)} |" for verb in group]
    for verb in (verb for group in help.GROUPS.values() for verb in group):
        verb_flags = help.flags(verb)
        lines += ["", f"### {verb}", "", help.summary(verb)]
        if verb_flags:
            usages = ", ".join(f"`{flag.usage}`" for flag in verb_flags if not flag.positional)
            lines += ["", f"`{help.usage(verb)}`", "", usages]
    return lines


def flags() -> list[str]:
    lines = ["## Flags", "", "Each of them can be set in `invoke.yaml`.", ""]
    lines += ["| flag | |", "| --- | --- |"]
    named = [flag for flag in FLAGS.values() if not flag.positional]
    lines += [f"| `{flag.usage}` | {flag.text} |" for flag in named]
    return lines


def plugin() -> list[str]:
    """Return the section of the plugin's arguments, from its docstring and its signature."""
    text = inspect.getdoc(RailwayPlugin) or ""
    arguments = text.split("Args:\n")[1].split("\n\nRaises")[0]
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", arguments, re.S | re.M)
    parameters = inspect.signature(RailwayPlugin.__init__).parameters
    lines = ["## RailwayPlugin", "", "| argument | default | |", "| --- | --- | --- |"]
    for names, description in entries:
        values = dict.fromkeys(repr(parameters[n].default).strip("'") for n in names.split(", "))
        defaults = ", ".join(f"`{value}`" for value in values if value != "None")
        lines.append(f"| `{names}` | {defaults} | {' '.join(description.split())} |")
    return lines


def variables() -> list[str]:
    lines = ["## Environment variables"]
    for reader, meanings in VARIABLES.items():
        lines += ["", f"### {reader}", "", "| variable | |", "| --- | --- |"]
        for names, meaning in meanings.items():
            codes = ", ".join(f"`{name}`" for name in names.split(", "))
            lines.append(f"| {codes} | {meaning} |")
    return lines


def metrics() -> list[str]:
    lines = [
        "## Metrics",
        "",
        "| Prometheus | OpenTelemetry | kind | |",
        "| --- | --- | --- | --- |",
    ]
    for name, family in load("telemetry").FAMILIES.items():
        title, description = family.prometheus(name), family.description
        lines.append(f"| `{title}` | `{name}` | {family.kind} | {description} |")
    return lines


def page() -> str:
    head = "# Reference\n\nWritten from the code by `invoke docs` (`docs/reference.py`).\n"
    parts = [verbs(), flags(), plugin(), variables(), metrics()]
    return head + "".join("\n" + "\n".join(part) + "\n" for part in parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
