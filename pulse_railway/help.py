"""The text of `pulse-railway --help` and `pulse-railway <verb> --help`."""

from __future__ import annotations

import inspect
import shutil
import textwrap

from pulse_railway import tasks
from pulse_railway.flags import FLAGS, Flag

OTHER_COMMANDS = {
    "serve": "Run the app as its container's first process.",
    "janitor": "`janitor run`: remove drained deployments.",
}
ID_VERBS = ("promote", "redeploy", "delete", "logs", "restore")  # an id by itself is theirs
OLDER = {"remove": "delete", "scaffold": "ensure"}  # 0.3.x's names, and today's
NEEDED = [("remove", "deployment_name"), ("image", "repository")]
GROUPS = {group: [task.name for task in verbs] for group, verbs in tasks.GROUPS.items()}
GROUPS["inside the containers"] += OTHER_COMMANDS


def summary(verb: str) -> str:
    """Return a verb's description: the first line of its docstring."""
    if verb in OTHER_COMMANDS:
        return OTHER_COMMANDS[verb]
    first = (inspect.getdoc(tasks.ns[verb]) or "").splitlines()[0]
    return f"{first} An older name: use `{OLDER[verb]}`." if verb in OLDER else first


def flags(verb: str) -> list[Flag]:
    """Return the flags that a verb takes."""
    if verb in OTHER_COMMANDS:
        return []
    return [FLAGS[name] for name in getattr(tasks.ns[verb].body, "flags", ())]


def usage(verb: str) -> str:
    """Return a verb's command line, as in `pulse-railway deploy [FILE] [flags]`."""
    verb_flags = flags(verb)
    positional = [flag.value for flag in verb_flags if flag.positional]
    if not positional and FLAGS["app"] in verb_flags:
        positional = ["[ID]", "[FILE]"] if verb in ID_VERBS else ["[FILE]"]
    return " ".join(["pulse-railway", verb, *positional, "[flags]"])


def overview() -> str:
    lines = ["Deploys Pulse apps on Railway so that no user notices.", ""]
    lines += ["Usage: pulse-railway <verb> [flags]", ""]
    for group, verbs in GROUPS.items():
        lines.append(f"{group}:")
        lines += [_entry(verb, summary(verb), 16) for verb in verbs]
        lines.append("")
    lines += [
        "`pulse-railway <verb> --help` lists a verb's flags; --version prints the version.",
        "A flag's default is in invoke.yaml, section pulse_railway, where that sets it.",
    ]
    return "\n".join(lines)


def verb_help(verb: str) -> str:
    described = [summary(verb), *(inspect.getdoc(tasks.ns[verb]) or "").splitlines()[1:]]
    lines = [f"Usage: {usage(verb)}", "", *described, ""]
    if verb in ID_VERBS:
        lines.append("ID by itself is --deployment-id; FILE is a path, and is --app.")
    elif "[FILE]" in usage(verb):
        lines.append("FILE by itself is --app.")
    for flag in flags(verb):
        if not flag.positional:
            needed = (verb, flag.name) in NEEDED
            lines.append(_entry(flag.usage, f"{flag.help} (needed)" if needed else flag.text, 34))
    return "\n".join(lines)


def _entry(name: str, text: str, indent: int) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    first = f"  {name}".ljust(indent)
    if len(first) > indent:
        first += "\n" + " " * indent
    blank = " " * indent
    return (
        first + textwrap.fill(text, width, initial_indent=blank, subsequent_indent=blank)[indent:]
    )
