"""The files of the deploy context that must not get into an image."""

from __future__ import annotations

import json
import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

SECRET_FILES = (".env", ".env.*", "*.pem", "id_rsa", "id_ed25519", "id_ecdsa", ".netrc", ".pypirc")
EXAMPLE_FILES = (".env.example", ".env.sample", ".env.template")
# git's history can hold secrets; a virtual environment works on this machine only
PRIVATE_FOLDERS = (".git", ".venv", "venv")
SKIPPED_FOLDERS = ("node_modules", "__pycache__")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions: names in upper case, and their arguments.

    Continuation lines are joined.
    """
    joined: list[tuple[str, str]] = []
    pending = ""
    for line in dockerfile.read_text().splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        pending += stripped.removesuffix("\\")
        if not stripped.endswith("\\"):
            name, _, rest = pending.partition(" ")
            joined.append((name.upper(), rest.strip()))
            pending = ""
    return joined


def secrets_in_image(context: Path, dockerfile: Path) -> list[str]:
    """Return the files that can hold secrets, and the private folders, that the Dockerfile copies.

    The paths are relative to `context`, and sorted.
    """
    sources = copy_sources(dockerfile)
    ignore = ignored(context, dockerfile)
    copied = []
    for folder, folders, files in os.walk(context):
        parent = Path(folder).relative_to(context)
        names = [n for n in folders if n in PRIVATE_FOLDERS]
        names += filter(holds_secrets, files)
        folders[:] = [n for n in folders if n not in PRIVATE_FOLDERS and n not in SKIPPED_FOLDERS]
        for name in names:
            path = (parent / name).as_posix()
            if _is_copied(path, sources) and not ignore(path):
                copied.append(path)
    return sorted(copied)


def holds_secrets(name: str) -> bool:
    """Can a file of this name hold secrets?"""
    return _matches_any(name, SECRET_FILES) and not _matches_any(name, EXAMPLE_FILES)


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def copy_sources(dockerfile: Path) -> list[str]:
    """Return the sources of COPY and ADD in the context, not those in other stages or images."""
    sources: list[str] = []
    for name, rest in instructions(dockerfile):
        if name not in ("COPY", "ADD") or re.search(r"(^|\s)--from=", rest):
            continue
        rest = re.sub(r"^(--\S+\s+)+", "", rest)
        words = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
        sources += [str(word).removeprefix("./").strip("/") or "." for word in words[:-1]]
    return sources


def _is_copied(path: str, sources: list[str]) -> bool:
    parts = path.split("/")
    prefixes = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(s == "." or any(fnmatch(p, s) for p in prefixes) for s in sources)


def ignored(context: Path, dockerfile: Path) -> _Ignore:
    """Return whether the build leaves a path out, as a function of the path.

    The rules are in `<Dockerfile>.dockerignore`, else in `.dockerignore`.
    """
    for path in (
        dockerfile.with_name(f"{dockerfile.name}.dockerignore"),
        context / ".dockerignore",
    ):
        if path.is_file():
            return _Ignore(path.read_text().splitlines())
    return _Ignore([])


class _Ignore:
    """Docker's rules (docs.docker.com, "dockerignore"): rooted patterns, the last match wins."""

    def __init__(self, lines: list[str]) -> None:
        self.rules: list[tuple[bool, re.Pattern[str]]] = []
        for line in (x.strip() for x in lines):
            if line and not line.startswith("#"):
                keep = line.startswith("!")
                pattern = line.removeprefix("!").strip().removeprefix("./").strip("/")
                self.rules.append((not keep, _pattern(pattern)))

    def __call__(self, path: str) -> bool:
        parts = path.split("/")
        prefixes = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
        ignored = False
        for ignore, pattern in self.rules:
            if any(pattern.fullmatch(prefix) for prefix in prefixes):
                ignored = ignore
        return ignored


def _pattern(glob: str) -> re.Pattern[str]:
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))
