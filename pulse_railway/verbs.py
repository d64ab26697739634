"""Makes Invoke tasks of the verbs: signature, configuration, errors and exit status.

A verb lists its flags of flags.py. Their values, or those of the project's Invoke configuration
(section `pulse_railway`), become one typed value by a parser of options.py. The verb gets that
value.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, cast

from invoke.config import DataProxy
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task, task

from pulse_railway import advice
from pulse_railway.flags import FLAGS


def verb(flags: list[str], parser: str) -> Callable[[Callable[..., None]], Task[Any]]:
    """Make a task of a function that takes a typed value and an Output.

    Args:
        flags: the names of its flags in FLAGS.
        parser: the name of the function in options.py that makes the value from the flags.
    """

    def decorate(function: Callable[..., None]) -> Task[Any]:
        @functools.wraps(function)
        def body(*args: Any, **kwargs: Any) -> dict[str, Any]:
            bound = signature.bind(*args, **kwargs)  # TypeError for an unknown argument
            given = bound.arguments.keys() - {"c"}
            if given == {*flags}:  # Invoke's parser passes all, whether they were given or not
                given = set()
            bound.apply_defaults()
            context = bound.arguments.pop("c")
            advice.remember(function.__name__, bound.arguments)
            return run_verb(function, parser, with_defaults(context, bound.arguments, given))

        parameter = inspect.Parameter
        kind = parameter.POSITIONAL_OR_KEYWORD
        parameters = [parameter("c", kind)]
        for name in flags:
            default = parameter.empty if FLAGS[name].positional else FLAGS[name].unset
            parameters.append(parameter(name, kind, default=default))
        signature = inspect.Signature(parameters)
        body.__signature__ = signature  # type: ignore[attr-defined]
        body.flags = flags  # type: ignore[attr-defined]  # for the help
        invoke_task = task(
            body,
            help={name: FLAGS[name].text for name in flags},
            iterable=[name for name in flags if FLAGS[name].kind is dict],
            auto_shortflags=False,
        )
        return cast(Task[Any], invoke_task)

    return decorate


def with_defaults(
    context: Context, flags: Mapping[str, Any], given: Set[str] = frozenset()
) -> dict[str, Any]:
    """Return the flags, with those that were not given from the project's Invoke configuration.

    A flag in `given` has its value from a caller in Python, which counts unless it is None.
    Raises Exit if the configuration's section is invalid.
    """
    configured = context.config.get("pulse_railway") or {}
    if not isinstance(configured, Mapping | DataProxy):
        raise Exit(
            "error: the section pulse_railway of invoke.yaml has to be `flag: value` lines", 1
        )
    app = context.config.get("app")
    chosen = flags.get("app") or configured.get("app")
    if "app" in flags and not chosen and str(app).partition(":")[0].endswith(".py"):
        raise Exit(
            f"error: `app: {app}` in invoke.yaml is read in the section pulse_railway only: put it"
            " there, indented below `pulse_railway:`",
            1,
        )
    defaults = {key.replace("-", "_"): value for key, value in dict(configured).items()}
    for name in sorted(defaults.keys() - FLAGS.keys()):
        warn_of_unknown(name)
    return {
        name: defaults.get(name, value)
        if value is None or (name not in given and (value is False or value == []))
        else value
        for name, value in flags.items()
    }


@functools.cache  # once, where a task calls several verbs
def warn_of_unknown(name: str) -> None:
    close = difflib.get_close_matches(name, FLAGS, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    said = f"warning: invoke.yaml: the section pulse_railway has no setting {name!r}{hint}"
    print(said, file=sys.stderr)


def run_verb(verb: Callable[..., None], parser: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Call a verb and return its result, the object that --json prints.

    An error that the user can correct is raised as Exit with one line and status 1, or 2 if
    a flag is missing; with --json an object is printed too.
    """
    import httpx

    from pulse_railway import options
    from pulse_railway.advice import pasteable
    from pulse_railway.errors import Failure, Interrupted, UsageError, redact
    from pulse_railway.flows.signals import interruptible
    from pulse_railway.output import Output, printable, silence_stdout

    if isinstance(sys.stdout, io.TextIOWrapper):  # a log line may have characters without encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    output = Output(as_json=bool(flags.get("json")))

    def end(message: str, code: int) -> Exit:
        message = pasteable(message)
        with contextlib.suppress(OSError):  # stdout may be what has failed
            output.failure(message)
        message = printable(message)
        return Exit(f"error: {message}" if code in (1, 2) else message, code)

    try:
        load_dotenv()
        with interruptible():
            verb(getattr(options, parser)(flags, output), output)
    except Failure as failure:
        code = 2 if isinstance(failure, UsageError) else 1
        raise end(redact(str(failure)), code) from None
    except KeyboardInterrupt:
        raise end("interrupted", 128 + signal.SIGINT) from None
    except Interrupted as interrupted:
        raise end(str(interrupted), 128 + interrupted.number) from None
    except BrokenPipeError:
        raise Exit("", silence_stdout()) from None
    except (OSError, httpx.HTTPError) as error:
        raise end(redact(str(error) or type(error).__name__), 1) from None
    except Exception as error:  # an unforeseen one: its traceback may contain a secret
        sys.stderr.write(printable(redact(traceback.format_exc())))
        raise end(
            f"{type(error).__name__}, which is a fault of pulse-railway: nothing is known"
            " to be lost; see `pulse-railway status`",
            1,
        ) from None
    return output.value


def load_dotenv() -> None:
    """Read `.env` in this folder; variables that are set already keep their values.

    Raises Failure if it is no UTF-8 text.
    """
    if Path(".env").is_file():
        import dotenv

        from pulse_railway.build_context import read_text

        text = io.StringIO(read_text(Path(".env")))
        dotenv.load_dotenv(stream=text, override=False)


def confirm(question: str, yes: bool) -> None:
    """Ask before something is destroyed. Raises Failure for a no.

    Without a terminal nothing is asked, so that scripts for 0.3.x still work.
    """
    from pulse_railway.errors import Failure

    if not yes and ask(question) is False:
        raise Failure("not done")


def ask(question: str) -> bool | None:
    """Ask the person at the terminal, yes or no; return None if there is no terminal, or in CI."""
    if os.environ.get("CI") or not sys.stdin.isatty():
        return None
    from pulse_railway.output import printable

    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
