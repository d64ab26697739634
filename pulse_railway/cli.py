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
from invoke.parser.context import translate_underscores
from invoke.program import Program
from invoke.vendor import yaml

from pulse_railway import __version__, tasks
from pulse_railway.flags import FLAGS


class ProjectConfig(Config):
    """Invoke's configuration: this folder's invoke.yaml, ~/.invoke.yaml, INVOKE_*.

    Invoke itself looks beside the task file, and the console script has none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_project_location(os.getcwd())
        self.load_project()


def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
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
    verb = tasks.ns.tasks.get(words[0])
    program = Program(
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
    from pulse_railway import help

    has_flag = {"--help", "-h"} & set(arguments)
    if arguments in ([], ["help"], ["--help"], ["-h"]):
        return help.overview()
    verb = next((word for word in arguments if not word.startswith("-") and word != "help"), None)
    if not (has_flag or arguments[0] == "help") or verb is None:
        return None
    if verb not in tasks.ns.tasks:
        _unknown(verb, list(tasks.ns.tasks), "verb")
    return help.verb_help(verb) if help.flags(verb) else None


def rewrite(arguments: list[str]) -> list[str]:
    """Return 0.3.x's command line as Invoke's: a bare word after the verb is the app.

    Raises SystemExit for a verb or flag that does not exist, or a positional that is missing.
    """
    if not arguments or arguments[0].startswith("-"):
        return arguments
    verb, *rest = arguments
    if verb not in tasks.ns.tasks:
        _unknown(verb, list(tasks.ns.tasks), "verb")
    if "--help" in rest or "-h" in rest:
        return ["--help", verb]
    positional = tasks.ns[verb].positional  # with one, a bare word is that and not the app
    # flags of all verbs; `verb` is last, so that it decides on a flag that two take differently
    takes_value = {
        translate_underscores(argument.name): argument.takes_value
        for task in [*tasks.ns.tasks, verb]
        for argument in tasks.ns[task].get_arguments()
    }
    rewritten, i = [verb], 0
    while i < len(rest):
        word = rest[i]
        if not word.startswith("--"):
            rewritten += [word] if positional else ["--app", word]
        else:
            name, equals, _ = word[2:].partition("=")
            if name not in takes_value:
                _unknown(word, [f"--{flag}" for flag in takes_value], "flag")
            rewritten.append(word)
            if takes_value[name] and not equals and i + 1 < len(rest):
                i += 1
                rewritten[-1] = f"{word}={rest[i]}"  # a value may start with a dash
        i += 1
    if positional and all(word.startswith("-") for word in rewritten[1:]):
        raise SystemExit(f"error: which? `pulse-railway {verb} {FLAGS[positional[0]].value}`")
    return rewritten


def _unknown(word: str, candidates: list[str], kind: str) -> NoReturn:
    close = difflib.get_close_matches(word.split("=")[0], candidates, 1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise SystemExit(f"error: no {kind} {word}{hint}")
