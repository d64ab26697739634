"""Writes docs/reference.md from the code: `invoke docs` runs it, a test holds the page to it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from pulse_railway import help
from pulse_railway.plugin import RailwayPlugin
from pulse_railway.runtime_image import load
from pulse_railway.verbs import FLAGS

PAGE = Path(__file__).with_suffix(".md")

# who reads it, what it is; a test finds each name that the code reads here
VARIABLES = {
    "Here, and in a CI": {
        "RAILWAY_TOKEN": "a project token",
        "RAILWAY_API_TOKEN": "an account's or a workspace's token",
        "RAILWAY_PROJECT_ID, RAILWAY_ENVIRONMENT_ID": "which ones, where neither flags nor the"
        " plugin nor a project token say so",
        "PULSE_RAILWAY_SSH_KEY": "a private key, or a path to one, for `railway ssh`",
        "PULSE_RAILWAY_NOTIFY_URL": "who is told, as by `--notify`",
        "PULSE_RAILWAY_API_URL": "another address of Railway's API: the local Railway's",
        "RAILWAY_HTTP_TIMEOUT": "of Railway's CLI: for its uploads it is set to 1800 (seconds)",
        "RAILWAY_ENV, RAILWAY_OAUTH_CLIENT_ID": "as Railway's CLI has them, for its login",
        "NO_COLOR": "no colours",
    },
    "In a backend": {
        "PULSE_APP_FILE": "the app's file; set by `deploy`",
        "PULSE_DEPLOYMENT_ID": "which deployment this is; set by `deploy`",
        "PULSE_SERVER_ADDRESS": "the public address; set by `deploy`",
        "PULSE_PUBLIC_ORIGIN": "the same, for Pulse's next versions; set by `deploy`",
        "PULSE_RAILWAY_INTERNAL_TOKEN": "what the router and the janitor say to its internal"
        " endpoints; set by `deploy`",
        "PULSE_RAILWAY_REDIS_URL": "where sessions are, a reference; only with"
        " `RailwaySessionStore`",
        "PULSE_RAILWAY_SESSION_SCOPE": "in a copy of an environment, on a shared Redis: its id,"
        " which follows the prefix of session keys",
        "PULSE_RAILWAY_DEPLOYMENT_NAME": "the name that its id was made from",
        "PULSE_RAILWAY_DEPLOY_RUN": "which run of `deploy` created it",
        "PORT": "8000",
        "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "how long it may take to end: 10, on the service"
        " and as this variable",
        "PULSE_SECRET": "Pulse's own, for sessions in cookies: set it on `pulse-env`",
    },
    "In its build": {
        "PULSE_WEB_ROOT": "the React project's folder",
        "RAILWAY_DOCKERFILE_PATH": "the Dockerfile",
    },
    "On the router": {
        "REDIS_URL": "the routing state",
        "PULSE_RAILWAY_REDIS_PREFIX": "what its keys start with: `pulse:railway`",
        "PULSE_KV_KIND, PULSE_KV_URL, PULSE_KV_PATH": "for runs elsewhere: `redis` and its URL, or"
        " `sqlite` and its file",
        "HOST, PORT": "where it listens: IPv4 and IPv6, 8000",
        "PULSE_RAILWAY_ROUTER_WORKERS": "no effect: a router is one process, and more of them are"
        " replicas (`ensure --router-replicas`)",
        "PULSE_RAILWAY_METRICS_PORT": "where Prometheus reads: off",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "where metrics are pushed to: nowhere",
        "OTEL_METRICS_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT": "`otlp`: they are pushed there;"
        " `none`: never",
        "OTEL_SDK_DISABLED": "`true`: never",
        "OTEL_EXPORTER_OTLP_HEADERS, OTEL_METRIC_EXPORT_INTERVAL, OTEL_SERVICE_NAME,"
        " OTEL_RESOURCE_ATTRIBUTES": "as OpenTelemetry has them",
        "PULSE_RAILWAY_ACCESS_LOG": "`1`: a line for each answer",
        "PULSE_RAILWAY_ASSET_PREFIXES": "where a build's files are, comma-separated: `/assets/`",
        "PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT": "seconds without a byte of the backend: 900",
        "PULSE_RAILWAY_ROUTER_SHUTDOWN_SECONDS": "for requests to finish after SIGTERM: 25",
        "PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS": "that a half-closed socket may be silent: 60",
        "PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT": "clients at once, more are answered 503: half of"
        " the descriptors",
        "PULSE_RAILWAY_ACTIVE, PULSE_RAILWAY_ACTIVE_AT": "which deployment was promoted last, and"
        " when, where Redis cannot lose it",
        "PULSE_RAILWAY_STACK": "on every service of a stack: whose it is, as `<environment id>/<id"
        " of the router service>`",
        "PULSE_RAILWAY_APP": "which app it serves: name, repository and file, as JSON",
        "PULSE_RAILWAY_REMOVED": "on a service that Railway did not let be deleted: since when it"
        " is empty",
        "PULSE_RAILWAY_KEY_TTL_SECONDS": "in a copy of an environment, on a shared Redis: how"
        " long its keys outlive it. On the janitor and the backends, too",
        "PULSE_RAILWAY_TOKEN_MADE": "its token is one that `ensure` made for it, in a copied"
        " environment",
        "PULSE_RAILWAY_OWNS_STATE": "`1`: the janitor makes a routing state that has no owner this"
        " stack's, whatever it holds",
        "PULSE_RAILWAY_MAINTENANCE": "since when the site is in maintenance; empty where it is not",
        "PULSE_RAILWAY_MAINTENANCE_OFF": "when it was opened last; empty while it is closed",
        "PULSE_RAILWAY_DRAIN_TTL_SECONDS": "as on the janitor: what was removed is remembered for"
        " as long, and at least seven days",
        "PULSE_RAILWAY_SETUP": "while `scaffold` or `ensure` has not come to its end",
        "PULSE_RAILWAY_RUNTIME_VERSION": "which runtime it runs; on the janitor, too",
    },
    "On the janitor": {
        "PULSE_RAILWAY_DRAIN_TTL_SECONDS": "`--drain-ttl-seconds`",
        "PULSE_RAILWAY_ROLLBACK_WINDOW_SECONDS": "`--rollback-window-seconds`",
        "PULSE_RAILWAY_KEEP": "`--keep`",
        "PULSE_RAILWAY_SERVICE_PREFIX": "what the backends' names start with",
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
        taken = help.flags(verb)
        lines += ["", f"### {verb}", "", help.summary(verb)]
        if taken:
            flags = ", ".join(f"`{help.spelled(name)}`" for name in taken)
            lines += ["", f"`{help.usage(verb)}`", "", flags.replace("`--switch on|off`, ", "")]
    return lines


def flags() -> list[str]:
    lines = ["## Flags", "", "Every one of them may stand in `invoke.yaml`.", ""]
    lines += ["| flag | |", "| --- | --- |"]
    for name in FLAGS:
        if FLAGS[name].default != "?":
            lines.append(f"| `{help.spelled(name)}` | {FLAGS[name].help} |")
    return lines


def plugin() -> list[str]:
    """The plugin's arguments, from its docstring and its signature."""
    text = inspect.getdoc(RailwayPlugin) or ""
    said = text.split("Args:\n")[1].split("\n\nRaises")[0]
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", said, re.S | re.M)
    defaults = inspect.signature(RailwayPlugin.__init__).parameters
    lines = ["## RailwayPlugin", "", "| argument | default | |", "| --- | --- | --- |"]
    for names, says in entries:
        known = dict.fromkeys(repr(defaults[n].default).strip("'") for n in names.split(", "))
        shown = ", ".join(f"`{value}`" for value in known if value != "None")
        lines.append(f"| `{names}` | {shown} | {' '.join(says.split())} |")
    return lines


def variables() -> list[str]:
    lines = ["## Environment variables"]
    for where, known in VARIABLES.items():
        lines += ["", f"### {where}", "", "| variable | |", "| --- | --- |"]
        for names, says in known.items():
            shown = ", ".join(f"`{name}`" for name in names.split(", "))
            lines.append(f"| {shown} | {says} |")
    return lines


def metrics() -> list[str]:
    lines = [
        "## Metrics",
        "",
        "| Prometheus | OpenTelemetry | kind | |",
        "| --- | --- | --- | --- |",
    ]
    for name, family in load("telemetry").FAMILIES.items():
        title, says = family.prometheus(name), family.description
        lines.append(f"| `{title}` | `{name}` | {family.kind} | {says} |")
    return lines


def page() -> str:
    head = "# Reference\n\nWritten by `docs/reference.py` from the code; `invoke docs` renews it.\n"
    parts = [verbs(), flags(), plugin(), variables(), metrics()]
    return head + "".join("\n" + "\n".join(part) + "\n" for part in parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
