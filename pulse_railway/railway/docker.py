"""`docker buildx build --push`, for image deploys and the runtime image."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from pulse_railway.errors import Failure, redact


def build(
    *,
    image: str,
    dockerfile: Path,
    context: Path,
    build_args: dict[str, str],
    on_line: Callable[[str], None],
) -> None:
    """Run `docker buildx build --push`.

    Build arguments are passed by name, and their values by environment: values in a command line
    are visible to other users.

    Args:
        on_line: called with each line of the output.

    Raises Failure with the end of the output.
    """
    command = ["docker", "buildx", "build", "--push", "--platform", "linux/amd64"]
    command += ["--progress", "plain", "-t", image, "-f", str(dockerfile)]
    for name in sorted(build_args):
        command += ["--build-arg", name]
    command.append(str(context))
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
