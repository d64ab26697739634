"""The files that `railway up` uploads, so that a missing one is reported before the build.

The rules are those of the CLI (src/controllers/upload.rs, the Rust crate `ignore`):

- `.git` and `node_modules` are never uploaded.
- `.railwayignore` comes before `.ignore`, and that before `.gitignore`. Files of the folder and of
  all folders above it count, the deepest first.
- `.gitignore` counts inside a git repository only, up to its root.
- All that is in a folder which is left out is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec

from pulse_railway.build_context import (
    PRIVATE_FOLDERS,
    SKIPPED_FOLDERS,
    STATE_FOLDER,
    holds_secrets,
)

NEVER = (".git", "node_modules")
IGNORE_FILES = (".railwayignore", ".ignore")
GITIGNORE = ".gitignore"


def left_out(context: Path, path: Path, *, gitignore: bool = True) -> str | None:
    """Return why the upload of `context` leaves the relative `path` out; None if it does not."""
    for part in [*reversed(path.parents), path]:
        if part == Path():
            continue
        if part.name in NEVER:
            return f"the Railway CLI never uploads {part.name}"
        if by := _ignoring_file(context / part, gitignore):
            return f"{by} leaves it out"
    return None


def secrets_in_upload(context: Path, *, gitignore: bool = True) -> list[str]:
    """Return what is in the upload and can hold secrets, relative to `context`: files, and the
    folder of a local Railway."""
    secrets: list[str] = []
    for folder, folders, files in os.walk(context):
        parent = Path(folder).relative_to(context)
        if STATE_FOLDER in folders and not left_out(
            context, parent / STATE_FOLDER / "state.json", gitignore=gitignore
        ):
            secrets.append((parent / STATE_FOLDER).as_posix())
        folders[:] = [
            name
            for name in folders
            if name not in (*PRIVATE_FOLDERS, *SKIPPED_FOLDERS)
            and not left_out(context, parent / name, gitignore=gitignore)
        ]
        secrets += [
            (parent / name).as_posix()
            for name in files
            if holds_secrets(context / parent / name)
            and not left_out(context, parent / name, gitignore=gitignore)
        ]
    return sorted(secrets)


def _ignoring_file(path: Path, gitignore: bool) -> Path | None:
    """Return the ignore file that leaves `path` out, or None. The first verdict decides."""
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
    """Yield the folders from that of `path` to the root of its git repository, if it has one."""
    for i, folder in enumerate(path.parents):
        if (folder / ".git").exists():
            yield from path.parents[: i + 1]
            return


def _verdict(file: Path, path: Path) -> bool | None:
    """Return whether one ignore file leaves a path out; None if no pattern matches the path.

    The last match decides. The folders above the path are checked by the caller.
    """
    relative = path.relative_to(file.parent).as_posix() + ("/" if path.is_dir() else "")
    for include, regex in reversed(_patterns(file)):
        # in pathspec a pattern matches all that is below it, in git the name only; and `a/**`
        # matches the folder `a/` itself, in git what is in it
        name = relative if "ps_d" in regex.groupindex else relative.rstrip("/")
        if any(
            match.groupdict().get("ps_d") is None or match.end("ps_d") == len(relative)
            for match in regex.finditer(name)
        ):
            return include
    return None


@lru_cache(maxsize=4096)
def _patterns(file: Path) -> tuple[tuple[bool, re.Pattern[str]], ...]:
    try:
        lines = file.read_text("utf-8-sig", errors="replace").split("\n")
    except OSError:
        return ()
    patterns: list[Any] = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a lone `!`, which git ignores
            patterns += GitIgnoreSpec.from_lines([line.removesuffix("\r")]).patterns
    return tuple((p.include, p.regex) for p in patterns if p.include is not None)
