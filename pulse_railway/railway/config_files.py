"""Checks Railway's own configuration files beside an app, which may affect a stack."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_AS_CODE = ("railway.toml", "railway.json")
# By file, the pattern of a partial, and a line that makes it one. A partial changes only what it
# declares; one with an empty name is none.
_NAME, _VALUE = "(?:partial|PARTIAL|Partial)", r"""\s*=\s*["'`]\s*[\w.-]"""
PARTIAL = {
    "railway.ts": (
        rf"^export\s+(?:const|let|var)\s+{_NAME}(?:\s*:[^=]*)?{_VALUE}",
        'export const partial = "site"',
    ),
    "railway.py": (rf"^{_NAME}(?:\s*:[^=]*)?{_VALUE}", 'PARTIAL = "site"'),
    "railway.go": (
        rf"^\s*(?:(?:const|var)\s+)?Partial(?:\s+string)?{_VALUE}",
        'const Partial = "site"',
    ),
}


def without_effect(context: Path) -> str | None:
    """Return a warning about a "config as code" file, None if there is none.

    Railway reads it only for services that have used one before, and each of ours is new.
    """
    name = next((name for name in CONFIG_AS_CODE if (context / name).is_file()), None)
    if name is None:
        return None
    return (
        f"{name} has no effect on these services: its settings go into RailwayPlugin"
        " (dockerfile, start_command, pre_deploy, check_path) and the flags of `deploy`"
    )


def would_delete(context: Path) -> str | None:
    """Return a warning about an "infrastructure as code" file that declares the whole project.

    Returns None if there is none, or it is a partial. The CLI uses the nearest file, in this folder
    or above.
    """
    for folder in (context.resolve(), *context.resolve().parents):
        for name, (pattern, line) in PARTIAL.items():
            path = folder / ".railway" / name
            try:
                if not path.is_file():
                    continue
                text = path.read_text(errors="replace")
            except OSError:  # the CLI cannot read the file either
                continue
            if re.search(pattern, text, re.MULTILINE):
                return None
            return (
                f"{path} lists the whole project: the next `railway config apply` deletes every"
                " service that it does not list, the deployments among them. Add this to it first:"
                f" {line}"
            )
    return None
