"""Commands that a message advises, as they can be pasted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

# by which a run finds its project, its stack and its way there; a token is in no message
KEPT = (
    *("app", "context", "workspace", "workspace_id", "project", "project_id", "environment"),
    *("environment_id", "control", "ssh_key", "service"),
)
COMMAND = re.compile(
    r"(?<=`)pulse-railway ([a-z]+)[^`\n]*(?=`)|(?<=^next: )pulse-railway ([a-z]+).*"
)
_given: dict[str, str] = {}


def remember(verb: str, flags: Mapping[str, Any]) -> None:
    """What the person who runs this verb has given on its command line; what is in a file or in the
    environment holds for the next command, too."""
    _given.clear()
    if verb == "init":  # which writes its app into a file
        return
    _given.update({name: str(flags[name]) for name in KEPT if flags.get(name)})
    if verb == "logs":  # whose --service is what to read
        _given.pop("service", None)


def pasteable(text: str) -> str:
    """`text`, whose commands have the flags that were given, as far as their verbs take them."""
    return COMMAND.sub(_complete, text) if _given else text


def _complete(found: re.Match[str]) -> str:
    from pulse_railway import help, tasks

    command, verb = found[0], found[1] or found[2]
    for flag in help.flags(verb) if verb in tasks.ns.tasks else []:
        value = _given.get(flag.name)
        if value is None or (flag.name == "service" and verb == "logs"):
            continue
        if flag.option not in command.split() and f" {value} " not in f"{command} ":
            command += f" {flag.option} {shlex.quote(value)}"
    return command
