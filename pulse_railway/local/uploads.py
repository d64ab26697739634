"""Unpacks uploads. An archive that could reach out of its folder, or fill the disk, is refused.

tarfile's filter `data` checks most of it; several of its releases could be led out of the folder by
links to links, so that links are checked here, by their names alone.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MAX_UPLOAD = 512 * 1024**2  # bytes of an archive
MAX_UNPACKED = 4 * 1024**3  # bytes of the files in it
MAX_FILES = 200_000


class BadUpload(Exception):
    """The archive is refused, in one line."""


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a gzipped tar into a new folder. Raises BadUpload; the folder is not there then."""
    try:
        folder.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            members = list(_checked(tar))
            tar.extractall(folder, members, filter="data")
    except (tarfile.TarError, OSError, EOFError, ValueError, BadUpload) as error:
        shutil.rmtree(folder, ignore_errors=True)
        problem = " ".join(str(error).split())
        raise BadUpload(f"the upload cannot be unpacked: {problem}") from None


def _checked(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive. Raises BadUpload for one that is refused."""
    files: set[PurePosixPath] = set()
    links: set[PurePosixPath] = set()
    size = 0
    for count, member in enumerate(tar, 1):
        name = PurePosixPath(member.name)
        size += member.size
        if size > MAX_UNPACKED:
            raise BadUpload(f"its files have more than {MAX_UNPACKED} bytes")
        if count > MAX_FILES:
            raise BadUpload(f"it has more than {MAX_FILES} files")
        if name.is_absolute() or ".." in name.parts:
            raise BadUpload(f"{member.name!r} is outside of it")
        if not links.isdisjoint(name.parents):
            raise BadUpload(f"{member.name!r} is behind a link")
        if member.issym():
            if not _stays_inside(name, PurePosixPath(member.linkname)):
                raise BadUpload(f"{member.name!r} links to {member.linkname!r}, outside of it")
            links.add(name)
        elif member.islnk():
            if PurePosixPath(member.linkname) not in files:
                raise BadUpload(f"{member.name!r} is a hard link to no file of it")
        elif not (member.isreg() or member.isdir()):
            raise BadUpload(f"{member.name!r} is neither a file, a folder nor a link")
        elif member.isreg() and member.mode & 0o6000:
            raise BadUpload(f"{member.name!r} is setuid or setgid")
        if member.isreg():
            files.add(name)
        yield member


def _stays_inside(name: PurePosixPath, target: PurePosixPath) -> bool:
    """Does a link's target stay inside, wherever the links lead that it passes?

    It may climb from the link's own folder, which no link leads to, and nowhere else.
    """
    climbs = 0
    while climbs < len(target.parts) and target.parts[climbs] == "..":
        climbs += 1
    return (
        not target.is_absolute() and climbs < len(name.parts) and ".." not in target.parts[climbs:]
    )
