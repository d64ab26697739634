"""Virtual environments beside the project's own: for a peer, for other versions of libraries."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(name: str, *requirements: str) -> Path:
    """The Python of the environment `name`, which the first caller installs."""
    home = ROOT / ".benchmarks" / name
    found, ready = home / "bin" / "python", home / "ready"
    home.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may ask at once
        wanted = "\n".join(requirements)
        if not ready.exists() or ready.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            subprocess.run(
                [str(found), "-m", "pip", "install", "-q", *requirements],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            ready.write_text(wanted)
    return found
