"""The console script `pulse-railway`: the same verbs, with 0.3.x's command lines.

It differs from Invoke's own parsing: the app may be given without its flag (`deploy
examples/main.py`), `janitor run` and `control ...` are two words, and each verb has `--help`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from invoke.collection import Collection
from invoke.config import Config
from invoke.exceptions import ParseError
from invoke.parser.context import translate_underscores
from invoke.program import Program
from invoke.vendor import yaml

from pulse_railway import __version__, contract, help, tasks
from pulse_railway.errors import UsageError
from pulse_railway.flags import FLAGS


class ProjectConfig(Config):
    """Invoke's configuration: this folder's invoke.yaml, ~/.invoke.yaml, INVOKE_*.

    Invoke itself looks beside the task file, and the console script has none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_project_location(os.getcwd())
        self.load_project()


class Verbs(Program):
    """Invoke's program, whose own messages about wrong words do not show."""

    def parse_tasks(self) -> None:
        try:
            super().parse_tasks()
        except ParseError:
            raise UsageError(
                "the command line is not understood: `pulse-railway --help` lists the verbs,"
                " `pulse-railway <verb> --help` a verb's flags"
            ) from None


def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        run(arguments)
    except UsageError as error:
        from pulse_railway.output import Output, printable

        Output(as_json="--json" in arguments).failure(str(error))
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def run(arguments: list[str]) -> None:
    """Print the help that is asked for, or run the verb. Raises UsageError for wrong words."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise SystemExit("error: this folder was deleted: change to another one") from None
    if text := help_text(arguments):
        print(text)
        return
    check_configuration(Path("invoke.yaml"))
    words = rewrite(arguments)
    # Invoke copies all verbs several times: with one it is 7 ms faster
    verb = tasks.ns.tasks.get(words[0]) if words else None
    program = Verbs(
        name="pulse-railway",
        binary="pulse-railway",
        namespace=Collection(verb) if verb else tasks.ns,
        version=__version__,
        config_class=ProjectConfig,
    )
    try:
        program.run(["pulse-railway", *words])
    except yaml.YAMLError as error:
        where = str(getattr(error, "problem_mark", "")).strip()
        raise SystemExit(f"error: the Invoke configuration is no YAML: {where}") from None


def check_configuration(path: Path) -> None:
    """Raise SystemExit for an invoke.yaml with which Invoke ends in a traceback."""
    from pulse_railway.build_context import read_text
    from pulse_railway.errors import Failure

    def refuse_keys(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise SystemExit(
                        f"error: {path}: YAML reads a key there as {json.dumps(key, default=str)}:"
                        ' put it in quotes, as in `"yes": true`'
                    )
                refuse_keys(inner)

    try:
        text = read_text(path) if path.is_file() else ""
        found = yaml.safe_load(text)  # type: ignore[no-untyped-call]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else error
        raise SystemExit(f"error: {path} is no YAML: {where}") from None
    except (Failure, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if found is not None and not isinstance(found, dict):
        raise SystemExit(f"error: {path} has to be `name: value` lines")
    refuse_keys(found)


def help_text(arguments: list[str]) -> str | None:
    """Return the help that the arguments ask for, None for other arguments.

    It replaces Invoke's help, which describes Invoke's options.
    """
    has_flag = {"--help", "-h"} & set(arguments)
    if arguments in ([], ["help"], ["--help"], ["-h"]):
        return help.overview()
    verb = next((word for word in arguments if not word.startswith("-") and word != "help"), None)
    if not (has_flag or arguments[0] == "help") or verb is None:
        return None
    if verb not in tasks.ns.tasks:
        _unknown(verb, "verb", list(tasks.ns.tasks))
    return help.verb_help(verb) if help.flags(verb) else None


def rewrite(arguments: list[str]) -> list[str]:
    """Return 0.3.x's command line as Invoke's: a bare word after the verb is the app, or the id.

    Raises UsageError for a word that does not fit.
    """
    if not arguments:
        return arguments
    if arguments[0].startswith("-"):
        core = [_option(name) for argument in Program().core_args() for name in argument.names]
        option = arguments[0].partition("=")[0]
        several = len(option) > 2 and option[1] != "-"  # as in -de
        if option not in core and not several:
            _unknown(option, "flag", core)
        return arguments
    verb, *rest = arguments
    if verb == "janitor":
        raise UsageError("no command of janitor: `pulse-railway janitor run` is all it has")
    if verb not in tasks.ns.tasks:
        _unknown(verb, "verb", list(tasks.ns.tasks))
    if "--help" in rest or "-h" in rest:
        return ["--help", verb]
    positional = tasks.ns[verb].positional  # with one, a bare word is that and not the app
    takes_value = {
        _option(name): argument.takes_value
        for argument in tasks.ns[verb].get_arguments()
        for name in argument.names
    }
    rewritten, bare, i = [verb], set[str](), 0
    while i < len(rest):
        word = rest[i]
        option, equals, _ = word.partition("=")
        if not word.startswith("-"):
            place = FLAGS[positional[0]].value if positional else _place(verb, word)
            given = {word.partition("=")[0] for word in rewritten}
            if place in bare or (place == "ID" and "--deployment-id" in given):
                raise UsageError(f"{verb} takes one {place}: what is {word}?")
            bare.add(place)
            rewritten += [*{"FILE": ["--app"], "ID": ["--deployment-id"]}.get(place, []), word]
        elif option not in takes_value:
            _unknown(option, "flag", list(takes_value), f" of {verb}")
        elif not takes_value[option]:
            if equals:
                raise UsageError(f"{option} takes no value")
            rewritten.append(word)
        else:
            if not equals:
                i += 1
                # a value may start with a dash, but a flag of this verb is none
                if i == len(rest) or rest[i].partition("=")[0] in takes_value:
                    usage = next((f": {f.usage}" for f in help.flags(verb) if f.option == word), "")
                    raise UsageError(f"{option} takes a value{usage}")
                word = f"{word}={rest[i]}"
            if option == "--deployment-id" and "ID" in bare:
                raise UsageError(f"{verb} takes one ID: what is {word.partition('=')[2]}?")
            rewritten.append(word)
        i += 1
    if positional and not bare:
        raise UsageError(f"which? `pulse-railway {verb} {FLAGS[positional[0]].value}`")
    return rewritten


def _place(verb: str, word: str) -> str:
    """Return what a bare word is: FILE or ID."""
    path = word.partition(":")[0]
    is_path = path.endswith(".py") or "/" in word or Path(path).is_file()
    flags = [flag.name for flag in help.flags(verb)]
    if verb == "rollback" and not is_path:
        raise UsageError(f"rollback takes no ID: `pulse-railway promote {word}` makes it active")
    if verb in help.ID_VERBS and not is_path:
        if not contract.DEPLOYMENT_ID_PATTERN.fullmatch(word):
            raise UsageError(f"{word} is no deployment's id and no app's file")
        return "ID"
    if "app" not in flags:
        raise UsageError(f"{verb} takes flags only: what is {word}?")
    return "FILE"


def _option(name: str) -> str:
    """Return a flag's option, as in `--bake` and `-a`."""
    return f"-{name}" if len(name) == 1 else f"--{translate_underscores(name)}"


def _unknown(word: str, kind: str, candidates: list[str], of: str = "") -> NoReturn:
    close = difflib.get_close_matches(word.split("=")[0], candidates, 1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"no {kind} {word}{of}{hint}")
