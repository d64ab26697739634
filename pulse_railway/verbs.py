"""How a verb becomes an Invoke task: its flags, defaults, errors and exit status.

Flags are data, written once. A verb names those it takes. What was given, else the project's
Invoke configuration (section `pulse_railway`), goes through a parser of options.py, once, and comes
out as the typed value that the verb gets.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from invoke.config import DataProxy
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task, task

from pulse_railway import advice


@dataclass(frozen=True)
class Flag:
    help: str
    default: Any = None  # a bool makes a switch, a tuple a flag that may be repeated
    value: str = "NAME"  # what stands for its value in the help

    @property
    def switch(self) -> bool:
        return self.default is False


FLAGS: dict[str, Flag] = {
    # the app
    "app": Flag(
        "the app's file, path/to/main.py[:variable], relative to the context", value="FILE"
    ),
    "context": Flag("the folder to build and upload (default: this one)", value="FOLDER"),
    # the target
    "workspace": Flag("Railway workspace, by name; narrows --project"),
    "workspace_id": Flag("Railway workspace, by id", value="ID"),
    "project": Flag("Railway project, by name"),
    "project_id": Flag("Railway project, by id", value="ID"),
    "environment": Flag("Railway environment, by name (default: production)"),
    "environment_id": Flag("Railway environment, by id", value="ID"),
    "token": Flag("Railway token; better in RAILWAY_TOKEN or RAILWAY_API_TOKEN", value="TOKEN"),
    # the way to the router
    "control": Flag(
        "how control commands get to the router: ssh, or job, by the janitor", value="WAY"
    ),
    "ssh_key": Flag(
        "private key for `railway ssh` (default: $PULSE_RAILWAY_SSH_KEY)", value="FILE"
    ),
    "service": Flag("the router's service name (default: pulse-router)"),
    "service_prefix": Flag(
        "what every service name starts with; at most 8 characters", value="PREFIX"
    ),
    "redis_service": Flag("the Redis service's name (default: pulse-redis)"),
    # the baseline
    "redis_url": Flag("use this Redis instead of one in the project", value="URL"),
    "redis_prefix": Flag(
        "what the state's Redis keys start with (default: pulse:railway)", value="PREFIX"
    ),
    "janitor_cron_schedule": Flag(
        "when the janitor runs, in UTC (default: */5 * * * *)", value="CRON"
    ),
    "drain_ttl_seconds": Flag(
        "keep a draining deployment at most so long (default: 86400)", value="SECONDS"
    ),
    "rollback_window_seconds": Flag(
        "keep the deployment that was active last for so long, tabs or not (default: 900)",
        value="SECONDS",
    ),
    "keep": Flag(
        "keep the last so many deployments, until the drain TTL (default: 0)", value="NUMBER"
    ),
    "router_replicas": Flag("router replicas (default: 1)", value="NUMBER"),
    "runtime_image": Flag(
        "a published image of router and janitor (default: built on Railway)", value="IMAGE"
    ),
    "owns_state": Flag(
        "a routing state in an external Redis that is nobody's is this stack's", False
    ),
    "plan": Flag("print what would be done, and do nothing", False),
    # a deployment
    "deployment_name": Flag("prefix of the generated deployment id (default: prod)"),
    "deployment_id": Flag("a deployment's id", value="ID"),
    "server_address": Flag(
        "the app's public address (default: the app's, then the router's)", value="URL"
    ),
    "web_root": Flag(
        "the React project, relative to the context (default: the app's)", value="FOLDER"
    ),
    "image_repository": Flag(
        "build here and push to this repository, e.g. registry/org/name", value="REPOSITORY"
    ),
    "build_arg": Flag("build argument KEY=VALUE; may be repeated", (), value="KEY=VALUE"),
    "no_gitignore": Flag("upload what .gitignore names, too", False),
    "env": Flag("variable KEY=VALUE of this deployment; may be repeated", (), value="KEY=VALUE"),
    "backend_replicas": Flag("backend replicas (default: 1, the safe number)", value="NUMBER"),
    "no_promote": Flag("leave the new deployment pending", False),
    "replace_app": Flag("go on where the stack serves an app of another name", False),
    "keep_failed": Flag("do not remove the service when the deploy fails", False),
    # its life
    "canary": Flag(
        "give it this percentage of the new visitors, and promote it later", value="PERCENT"
    ),
    "weight": Flag("only this percentage of the new visitors: it is the canary", value="PERCENT"),
    "bake": Flag(
        "watch it for so many seconds after the switch, and go back if it does worse",
        value="SECONDS",
    ),
    "lock_wait": Flag(
        "wait so many seconds for another deploy (default: does not wait)", value="SECONDS"
    ),
    "message": Flag("what is deployed, or why (default: the commit's)", value="TEXT"),
    "notify": Flag(
        "tell this URL (Slack-compatible JSON); better in PULSE_RAILWAY_NOTIFY_URL", value="URL"
    ),
    "switch": Flag("on or off", "?", value="on|off"),
    "page": Flag("an HTML file to show instead of the router's own page", value="FILE"),
    "retry_after": Flag(
        "seconds after which a browser may try again (default: 30)", value="SECONDS"
    ),
    # the rest
    "repository": Flag(
        "where to push the runtime image, e.g. registry/org/pulse-railway", value="REPOSITORY"
    ),
    "tag": Flag("the image's tag (default: the version)", value="TAG"),
    "build": Flag("the build log instead of the running service's", False),
    "follow": Flag("go on until interrupted", False),
    "watch": Flag("go on until interrupted, with what happened in between", False),
    "every": Flag(
        "seconds between two looks (default: 15; Railway limits API calls)", value="SECONDS"
    ),
    "lines": Flag("how many lines (default: 100)", value="NUMBER"),
    "force": Flag("promote it even where it does not answer", False),
    "yes": Flag("do not ask", False),
    "json": Flag("one JSON object on stdout", False),
}

TARGET = ("workspace workspace_id project project_id environment environment_id token").split()
WAY = ["control", "ssh_key"]
STACK = ["app", "context", *TARGET, *WAY, "service", "service_prefix", "redis_service", "json"]
BASELINE = [
    "app",
    "context",
    *TARGET,
    *WAY,
    *"service_prefix redis_url redis_prefix janitor_cron_schedule drain_ttl_seconds".split(),
    *"rollback_window_seconds keep router_replicas runtime_image notify json".split(),
]
DEPLOY = [
    "app",
    "context",
    *TARGET,
    *WAY,
    *"deployment_name deployment_id service_prefix server_address web_root".split(),
    *"image_repository build_arg no_gitignore env backend_replicas no_promote".split(),
    *"replace_app keep_failed canary bake lock_wait message notify json".split(),
]


def verb(flags: list[str], parser: str) -> Callable[[Callable[..., None]], Task[Any]]:
    """Make a task of a function that takes a typed value and an Output.

    Args:
        flags: those it takes, from FLAGS.
        parser: the function of options.py that makes the value of them.
    """

    def decorate(function: Callable[..., None]) -> Task[Any]:
        @functools.wraps(function)
        def body(*args: Any, **given: Any) -> dict[str, Any]:
            bound = signature.bind(*args, **given)  # TypeError for what it does not take
            bound.apply_defaults()
            context = bound.arguments.pop("c")
            advice.remember(function.__name__, bound.arguments)
            return run(function, parser, with_defaults(context, bound.arguments))

        parameter = inspect.Parameter
        kind = parameter.POSITIONAL_OR_KEYWORD
        parameters = [parameter("c", kind)]
        for name in flags:
            default = FLAGS[name].default
            default = {(): [], "?": parameter.empty}.get(default, default)
            parameters.append(parameter(name, kind, default=default))
        signature = inspect.Signature(parameters)
        body.__signature__ = signature  # type: ignore[attr-defined]
        body.flags = flags  # type: ignore[attr-defined]  # for the help
        made = task(
            body,
            help={name: FLAGS[name].help for name in flags},
            iterable=[name for name in flags if FLAGS[name].default == ()],
            auto_shortflags=False,
        )
        return cast(Task[Any], made)

    return decorate


def with_defaults(context: Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that were not given, from the project's Invoke configuration."""
    configured = context.config.get("pulse_railway") or {}
    if not isinstance(configured, Mapping | DataProxy):
        raise Exit(
            "error: the section pulse_railway of invoke.yaml has to be `flag: value` lines", 1
        )
    known = {key.replace("-", "_"): value for key, value in dict(configured).items()}
    return {
        name: known.get(name, value) if value is None or value is False or value == [] else value
        for name, value in given.items()
    }


def run(function: Callable[..., None], parser: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Call a verb; returns its result, what it says with --json. Whatever a user can do something
    about becomes one line and a status of 1; with --json, one object on stdout too."""
    import httpx

    from pulse_railway import options
    from pulse_railway.advice import pasteable
    from pulse_railway.errors import Failure, Interrupted, redact
    from pulse_railway.output import Output, reader_has_gone

    load_dotenv()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log line may hold what has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    output = Output(as_json=bool(flags.get("json")))

    def end(why: str, code: int) -> Exit:
        why = pasteable(why)
        output.failure(why)
        return Exit(f"error: {why}" if code == 1 else why, code)

    try:
        function(getattr(options, parser)(flags, output), output)
    except Failure as failure:
        raise end(redact(str(failure)), 1) from None
    except KeyboardInterrupt:
        raise end("interrupted", 128 + signal.SIGINT) from None
    except Interrupted as interrupted:
        raise end("interrupted", 128 + interrupted.number) from None
    except BrokenPipeError:
        raise Exit("", reader_has_gone()) from None
    except (OSError, httpx.HTTPError) as error:
        raise end(redact(str(error) or type(error).__name__), 1) from None
    except Exception as error:  # what we did not think of: its traceback may hold a secret
        sys.stderr.write(redact(traceback.format_exc()))
        raise end(
            f"{type(error).__name__}, which is a fault of pulse-railway: nothing is known"
            " to be lost, `pulse-railway status` tells what stands",
            1,
        ) from None
    return output.value


def load_dotenv() -> None:
    """Read `.env` in this folder; the environment wins over it."""
    if Path(".env").is_file():
        import dotenv

        dotenv.load_dotenv(".env", override=False)


def confirm(question: str, yes: bool) -> None:
    """Ask before something is destroyed, if there is a terminal. Raises Failure for a no."""
    from pulse_railway.errors import Failure

    if not yes and ask(question) is False:  # scripts that worked with 0.3.x go on working
        raise Failure("not done")


def ask(question: str) -> bool | None:
    """What the person at the terminal says; None where there is none."""
    if os.environ.get("CI") or not sys.stdin.isatty():
        return None
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
