"""`docker buildx build --push`, for image deploys and the runtime image."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from pulse_railway.errors import Failure, redact
from pulse_railway.railway import program


def need_buildx() -> None:
    """Raise Failure if docker, or its plugin buildx, is not installed."""
    program.need("docker")
    done = subprocess.run(
        ["docker", "buildx", "version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    if done.returncode:
        raise Failure(
            "docker is here without buildx, which builds and pushes: install its plugin"
            " (docs.docker.com/go/buildx), or leave the image repository out"
        )


def build(
    *,
    image: str,
    dockerfile: Path,
    context: Path,
    build_args: dict[str, str],
    on_line: Callable[[str], None],
) -> str | None:
    """Run `docker buildx build --push`, and return the image's digest; None if docker has not
    written it.

    Build arguments are passed by name, and their values by environment: values in a command line
    are visible to other users.

    Args:
        on_line: called with each line of the output.

    Raises Failure with the end of the output.
    """
    command = ["docker", "buildx", "build", "--push", "--platform", "linux/amd64"]
    command += ["--progress", "plain"]
    for name in sorted(build_args):
        command += ["--build-arg", name]
    with tempfile.TemporaryDirectory(prefix="pulse-railway-") as folder:
        metadata = Path(folder) / "metadata.json"
        command += ["--metadata-file", str(metadata), "-t", image, "-f", str(dockerfile)]
        run([*command, str(context)], build_args, on_line)
        return digest_of(metadata)


def digest_of(metadata: Path) -> str | None:
    """Return the digest in a file that `docker buildx build --metadata-file` has written."""
    try:
        digest = json.loads(metadata.read_text())["containerimage.digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(digest)


def run(command: list[str], build_args: dict[str, str], on_line: Callable[[str], None]) -> None:
    """Run docker with these variables. Raises Failure with the end of the output."""
    env = {**os.environ, **build_args}
    process = subprocess.Popen(
        command,
        env=env,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(redact(line.rstrip()))
            on_line(lines[-1])
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        tail = "\n".join(lines[-20:])
        raise Failure(f"`docker buildx build` failed with status {code}:\n{tail}")
