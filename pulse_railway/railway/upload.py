"""What `railway up` takes along and what it leaves out, to see what is missing before a build.

The rules are those of the CLI's walk (src/controllers/upload.rs, the Rust crate `ignore`): never
`.git` and `node_modules`; `.railwayignore` over `.ignore` over `.gitignore`, each of the folder
itself and of every one above it, a deeper file's word first; `.gitignore` inside a git repository
only, and only up to its root. What is in a folder that is left out is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec

from pulse_railway.build_context import PRIVATE_FOLDERS, SKIPPED_FOLDERS, holds_secrets

NEVER = (".git", "node_modules")
IGNORE_FILES = (".railwayignore", ".ignore")
GITIGNORE = ".gitignore"


def left_out(context: Path, path: Path, *, gitignore: bool = True) -> str | None:
    """Why the upload of `context` would not hold `path` (relative to it); None where it would."""
    for part in [*reversed(path.parents), path]:
        if part == Path():
            continue
        if part.name in NEVER:
            return f"the Railway CLI never uploads {part.name}"
        if by := _ignoring_file(context / part, gitignore):
            return f"{by} leaves it out"
    return None


def secrets_in_upload(context: Path, *, gitignore: bool = True) -> list[str]:
    """Files that can hold secrets and that the upload would hold; relative to `context`."""
    found = []
    for folder, folders, files in os.walk(context):
        here = Path(folder).relative_to(context)
        folders[:] = [
            name
            for name in folders
            if name not in (*PRIVATE_FOLDERS, *SKIPPED_FOLDERS)
            and not left_out(context, here / name, gitignore=gitignore)
        ]
        found += [
            (here / name).as_posix()
            for name in files
            if holds_secrets(name) and not left_out(context, here / name, gitignore=gitignore)
        ]
    return sorted(found)


def _ignoring_file(path: Path, gitignore: bool) -> Path | None:
    """The file that says so: the first kind that says anything about `path` decides."""
    for name in IGNORE_FILES:
        for folder in path.parents:
            verdict = _verdict(folder / name, path)
            if verdict is not None:
                return folder / name if verdict else None
    for folder in _folders_in_repository(path) if gitignore else ():
        verdict = _verdict(folder / GITIGNORE, path)
        if verdict is not None:
            return folder / GITIGNORE if verdict else None
    return None


def _folders_in_repository(path: Path) -> Iterator[Path]:
    """The folders from that of `path` to the root of its git repository; none outside of one."""
    for i, folder in enumerate(path.parents):
        if (folder / ".git").exists():
            yield from path.parents[: i + 1]
            return


def _verdict(file: Path, path: Path) -> bool | None:
    """What one ignore file says of a path: leave it out, keep it, or nothing. The last pattern that
    matches the path itself decides; those of the folders above it have had their say."""
    relative = path.relative_to(file.parent).as_posix() + ("/" if path.is_dir() else "")
    for include, regex in reversed(_patterns(file)):
        # pathspec lets a pattern match all that is below, where git stops at the name
        if any(
            found.groupdict().get("ps_d") is None or found.end("ps_d") == len(relative)
            for found in regex.finditer(relative)
        ):
            return include
    return None


@lru_cache(maxsize=4096)
def _patterns(file: Path) -> tuple[tuple[bool, re.Pattern[str]], ...]:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    patterns: list[Any] = list(GitIgnoreSpec.from_lines(lines).patterns)
    return tuple((p.include, p.regex) for p in patterns if p.include is not None)
