"""The files of the deploy context that must not get into an image."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pulse_railway.errors import Failure

SECRET_FILES = (
    *(".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa", "id_ed25519", "id_ecdsa"),
    *(".netrc", ".pypirc", ".npmrc"),
)
EXAMPLE_FILES = (".env.example", ".env.sample", ".env.template")
# of these the content decides: a certificate is public, and a token's place can hold a variable
SECRET_CONTENT = {
    ".pem": re.compile("PRIVATE KEY"),
    ".npmrc": re.compile(r"(?im)(_auth|_authToken|_password)\s*=\s*(?!\s|\$\{)"),
}
STATE_FOLDER = ".local-railway"  # tokens and keys of a local Railway
# git's history can hold secrets; a virtual environment works on this machine only
PRIVATE_FOLDERS = (".git", ".venv", "venv", STATE_FOLDER)
SKIPPED_FOLDERS = ("node_modules", "__pycache__")


def read_text(path: Path) -> str:
    """Return a file's text, without a byte order mark. Raises Failure if it is no UTF-8."""
    data = path.read_bytes()
    try:
        if b"\0" in data:
            raise ValueError
        return data.decode("utf-8-sig")
    except ValueError:
        raise Failure(f"{path} is no UTF-8 text: save it as UTF-8") from None


@dataclass(frozen=True)
class Instruction:
    """An instruction of a Dockerfile: its name in upper case, and its arguments."""

    name: str
    rest: str
    escape: str = "\\"  # the character that the file's `# escape=` names

    def words(self) -> list[str]:
        """Return the arguments without flags: a JSON list's, or those between white space."""
        rest = re.sub(r"^(--\S+\s+)+", "", self.rest)
        with contextlib.suppress(ValueError):
            if rest.startswith("["):
                return [str(word) for word in json.loads(rest)]
        with contextlib.suppress(ValueError):
            lexer = shlex.shlex(rest, posix=True)
            lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", self.escape
            return list(lexer)
        return rest.split()


HEREDOC = re.compile(r"""<<(-?)(["']?)(\w+)\2""")


def instructions(dockerfile: Path) -> list[Instruction]:
    """Return a Dockerfile's instructions. Continuation lines are joined, here-documents left out.

    See docs.docker.com/reference/dockerfile: the parser directive `escape`, comments and empty
    lines between continuation lines, here-documents of RUN, COPY and ADD. Raises Failure if the
    file is no UTF-8 text.
    """
    lines = iter(read_text(dockerfile).replace("\r\n", "\n").split("\n"))
    found: list[Instruction] = []
    pending, escape, at_top = "", "\\", True
    for line in lines:
        stripped = line.strip()
        if at_top and (directive := re.match(r"#\s*(\w+)\s*=\s*(\S+)", stripped)):
            if directive[1].lower() == "escape" and directive[2] in ("\\", "`"):
                escape = directive[2]
            continue
        at_top = False
        if not stripped or stripped.startswith("#"):
            continue
        pending += stripped.removesuffix(escape)
        if stripped.endswith(escape):
            continue
        name, *rest = pending.split(None, 1)
        found.append(Instruction(name.upper(), "".join(rest).strip(), escape))
        if found[-1].name in ("RUN", "COPY", "ADD"):
            for dash, _, word in HEREDOC.findall(found[-1].rest):
                for text in lines:
                    if (text.lstrip("\t") if dash else text) == word:
                        break
        pending = ""
    return found


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
        names += (name for name in files if holds_secrets(Path(folder) / name))
        folders[:] = [n for n in folders if n not in PRIVATE_FOLDERS and n not in SKIPPED_FOLDERS]
        for name in names:
            path = (parent / name).as_posix()
            if _is_copied(path, sources) and not ignore(path):
                copied.append(path)
    return sorted(copied)


def holds_secrets(path: Path) -> bool:
    """Can this file hold secrets, by its name, and by its content where that can tell?"""
    if not _matches_any(path.name, SECRET_FILES) or _matches_any(path.name, EXAMPLE_FILES):
        return False
    content = SECRET_CONTENT.get(path.suffix or path.name)
    try:
        return content is None or bool(content.search(path.read_text(errors="replace")))
    except OSError:
        return True


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def copy_sources(dockerfile: Path) -> list[str]:
    """Return the sources of COPY and ADD in the context, not those in other stages or images."""
    return [
        source.removeprefix("./").strip("/") or "."
        for instruction in instructions(dockerfile)
        if instruction.name != "RUN"
        for source in _sources(instruction)
    ]


def _sources(instruction: Instruction) -> list[str]:
    """Return what one instruction takes out of the context, as it is written."""
    if instruction.name == "RUN":
        mounts = re.findall(r"(?:^|\s)--mount=(\S+)", instruction.rest)
        options = [dict(part.partition("=")[::2] for part in m.split(",")) for m in mounts]
        return [
            source
            for mount in options
            if mount.get("type", "bind") == "bind" and "from" not in mount
            if (source := mount.get("source") or mount.get("src"))
        ]
    if instruction.name not in ("COPY", "ADD") or re.search(r"(^|\s)--from=", instruction.rest):
        return []
    return instruction.words()[:-1]


def file_sources(dockerfile: Path, variables: Mapping[str, str]) -> list[str]:
    """Return the paths of the context that a build has to find: sources of COPY, ADD and RUN's bind
    mounts.

    A wildcard need not match (BuildKit's AllowEmptyWildcard). Addresses and here-documents are no
    files; what a variable stands for that only the builder knows (TARGETARCH, a base image's) is
    not known. `variables` are the build's: an ARG gets its value from them, or its default.
    """
    values: dict[str, str] = {}
    paths = []
    for instruction in instructions(dockerfile):
        for key, default in assignments(instruction):
            given = variables.get(key) if instruction.name == "ARG" else None
            value = values.get(key, "") if default is None else _expanded(default, values)
            values[key] = value if given is None else given
        for written in _sources(instruction):
            named = re.findall(r"\$(?:(\w+)|\{(\w+)\})", written)
            if any((plain or braced) not in values for plain, braced in named):
                continue
            source = _expanded(written, values)
            path = posixpath.normpath(f"/{source}").strip("/")
            if path and not re.search(r"[*?\[]|://|^git@|^<<", source):
                paths.append(path)
    return paths


def missing_sources(context: Path, dockerfile: Path, variables: Mapping[str, str]) -> list[str]:
    """Return the `file_sources` that the context lacks, or its .dockerignore leaves out."""
    ignore = ignored(context, dockerfile)
    paths = file_sources(dockerfile, variables)
    return [path for path in paths if ignore(path) or not (context / path).exists()]


def assignments(instruction: Instruction) -> list[tuple[str, str | None]]:
    """Return what an ARG or ENV sets, None for an ARG without a default."""
    if instruction.name not in ("ARG", "ENV"):
        return []
    words = instruction.words()
    if instruction.name == "ENV" and words and "=" not in words[0]:
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

    The rules are in `<Dockerfile>.dockerignore`, else in `.dockerignore`. Raises Failure for a file
    that Docker refuses.
    """
    for path in (
        dockerfile.with_name(f"{dockerfile.name}.dockerignore"),
        context / ".dockerignore",
    ):
        if path.is_file():
            return _Ignore(path)
    return _Ignore(None)


class _Ignore:
    """Docker's rules (docs.docker.com, "dockerignore"): rooted patterns, the last match wins."""

    def __init__(self, file: Path | None) -> None:
        self.rules: list[tuple[bool, re.Pattern[str]]] = []
        for number, line in enumerate(read_text(file).split("\n") if file else [], 1):
            if line.startswith("#") or not (text := line.strip()):
                continue
            pattern = posixpath.normpath("/" + text.removeprefix("!").strip()).strip("/")
            if text == "!":
                raise Failure(
                    f"line {number} of {file} is a lone !, which Docker refuses: delete it"
                )
            try:
                rule = _pattern(pattern)
            except re.error:
                raise Failure(
                    f"line {number} of {file} has a pattern that Docker refuses: {text}"
                ) from None
            if pattern:
                self.rules.append((not text.startswith("!"), rule))

    def __call__(self, path: str) -> bool:
        parts = path.split("/")
        prefixes = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
        ignored = False
        for ignore, pattern in self.rules:
            if any(pattern.fullmatch(prefix) for prefix in prefixes):
                ignored = ignore
        return ignored


def _pattern(glob: str) -> re.Pattern[str]:
    """Return a pattern of Go's filepath.Match, and `**`, as a regular expression."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\\.|\[[^\]]+\])", glob)

    def translated(part: str) -> str:
        if part.startswith("[") and part.endswith("]"):
            return part
        return wild.get(part) or re.escape(part.removeprefix("\\") if len(part) == 2 else part)

    return re.compile("".join(map(translated, parts)))
