"""The deploy context as a build gets it: what of it must not get into an image."""

from __future__ import annotations

import json
import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

SECRET_FILES = (".env", ".env.*", "*.pem", "id_rsa", "id_ed25519", "id_ecdsa", ".netrc", ".pypirc")
EXAMPLE_FILES = (".env.example", ".env.sample", ".env.template")
PRIVATE_FOLDERS = (
    ".git",
    ".venv",
    "venv",
)  # history can hold secrets; the others are this machine's
SKIPPED_FOLDERS = ("node_modules", "__pycache__")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and what stands behind them, continuation lines joined."""
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
    """Files and folders of `context` that the Dockerfile would copy into an image although they
    can hold secrets, or are this machine's own; relative to `context`."""
    sources = copy_sources(dockerfile)
    ignore = ignored(context, dockerfile)
    found = []
    for folder, folders, files in os.walk(context):
        here = Path(folder).relative_to(context)
        names = [n for n in folders if n in PRIVATE_FOLDERS]
        names += filter(holds_secrets, files)
        folders[:] = [n for n in folders if n not in PRIVATE_FOLDERS and n not in SKIPPED_FOLDERS]
        for name in names:
            path = (here / name).as_posix()
            if _is_copied(path, sources) and not ignore(path):
                found.append(path)
    return sorted(found)


def holds_secrets(name: str) -> bool:
    """Is a file of this name one that can hold secrets?"""
    return _matches_any(name, SECRET_FILES) and not _matches_any(name, EXAMPLE_FILES)


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def copy_sources(dockerfile: Path) -> list[str]:
    """What COPY and ADD take from the context, not from another stage or image."""
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
    """What the build leaves out: by `<Dockerfile>.dockerignore`, else `.dockerignore`."""
    for path in (
        dockerfile.with_name(f"{dockerfile.name}.dockerignore"),
        context / ".dockerignore",
    ):
        if path.is_file():
            return _Ignore(path.read_text().splitlines())
    return _Ignore([])


class _Ignore:
    """Docker's rules (docs.docker.com, "dockerignore"): rooted patterns, the last match counts."""

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
        out = False
        for ignore, pattern in self.rules:
            if any(pattern.fullmatch(prefix) for prefix in prefixes):
                out = ignore
        return out


def _pattern(glob: str) -> re.Pattern[str]:
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))
