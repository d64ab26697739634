"""The files of the deploy context that must not get into an image."""

from __future__ import annotations

import json
import os
import posixpath
import re
import shlex
from collections.abc import Mapping
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
    return [
        source.removeprefix("./").strip("/") or "."
        for name, rest in instructions(dockerfile)
        for source in _sources(name, rest)
    ]


def _sources(name: str, rest: str) -> list[str]:
    """Return the sources that one instruction copies out of the context, as they are written."""
    if name not in ("COPY", "ADD") or re.search(r"(^|\s)--from=", rest):
        return []
    rest = re.sub(r"^(--\S+\s+)+", "", rest)
    words = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
    return [str(word) for word in words[:-1]]


def missing_sources(context: Path, dockerfile: Path, variables: Mapping[str, str]) -> list[str]:
    """Return the sources of COPY and ADD that the context lacks, or its .dockerignore leaves out.

    A wildcard need not match (BuildKit's AllowEmptyWildcard). Addresses and here-documents are no
    files. `variables` are the build's: an ARG gets its value from them, or its default.
    """
    values: dict[str, str] = {}
    ignore = ignored(context, dockerfile)
    missing = []
    for name, rest in instructions(dockerfile):
        for key, default in _assignments(name, rest):
            given = variables.get(key) if name == "ARG" else None
            value = values.get(key, "") if default is None else _expanded(default, values)
            values[key] = value if given is None else given
        for source in (_expanded(source, values) for source in _sources(name, rest)):
            path = posixpath.normpath(f"/{source}").strip("/")
            is_file = not re.search(r"[*?\[]|://|^git@|^<<", source)
            if is_file and path and (ignore(path) or not (context / path).exists()):
                missing.append(path)
    return missing


def _assignments(name: str, rest: str) -> list[tuple[str, str | None]]:
    """Return what an ARG or ENV sets, None for an ARG without a default."""
    if name not in ("ARG", "ENV"):
        return []
    words = shlex.split(rest)
    if name == "ENV" and words and "=" not in words[0]:
        return [(words[0], " ".join(words[1:]))]
    pairs = [word.partition("=") for word in words]
    return [(key, value if equals else None) for key, equals, value in pairs]


def _expanded(text: str, values: Mapping[str, str]) -> str:
    """Return a text with `$NAME`, `${NAME}` and `${NAME:-default}` replaced."""
    return re.sub(
        r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})",
        lambda m: values.get(m[1] or m[2]) or m[3] or "",
        text,
    )


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
