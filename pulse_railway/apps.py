"""Finds the apps in a folder, without importing them."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from pulse_railway.build_context import PRIVATE_FOLDERS, SKIPPED_FOLDERS


def apps_in(folder: Path) -> list[str]:
    """Return the apps that files of a folder make, as `file` or `file:variable`."""
    return [
        app_name(path.relative_to(folder).as_posix(), variable)
        for path in _python_files(folder)
        for variable in app_variables(path)
    ]


def listed(apps: list[str]) -> str:
    """Return the end of a message that asks which app is meant."""
    return f"; there are: {', '.join(apps)}" if apps else ""


def app_name(file: str, variable: str) -> str:
    return file if variable == "app" else f"{file}:{variable}"


def _python_files(folder: Path) -> Iterator[Path]:
    """Yield the Python files of a project, down to three folders below it, tests left out."""
    for parent, folders, files in os.walk(folder):
        depth = len(Path(parent).relative_to(folder).parts)
        skipped = (*PRIVATE_FOLDERS, *SKIPPED_FOLDERS, "tests", "site-packages")
        folders[:] = sorted(
            name for name in folders if depth < 3 and name[0] != "." and name not in skipped
        )
        yield from (Path(parent) / name for name in sorted(files) if name.endswith(".py"))


def app_variables(path: Path) -> list[str]:
    """Return the variables that a module sets to a `pulse.App(...)`, without importing it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError):
        return []
    modules: set[str] = set()
    classes: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name for a in node.names if a.name == "pulse"}
        elif isinstance(node, ast.ImportFrom) and node.module == "pulse":
            classes |= {a.asname or a.name for a in node.names if a.name == "App"}
    found = []
    for statement in tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        call = statement.value
        if not isinstance(call, ast.Call):
            continue
        made = call.func
        is_app = (isinstance(made, ast.Name) and made.id in classes) or (
            isinstance(made, ast.Attribute)
            and made.attr == "App"
            and isinstance(made.value, ast.Name)
            and made.value.id in modules
        )
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        found += [t.id for t in targets if is_app and isinstance(t, ast.Name)]
    return found
