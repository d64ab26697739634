"""Virtual environments beside the project's own: for 0.3.13, and for other library versions."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(name: str, *requirements: str) -> Path:
    """Return the Python of the environment `name`; the first call installs it."""
    home = ROOT / ".benchmarks" / name
    executable, ready = home / "bin" / "python", home / "ready"
    home.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may call this at once
        text = "\n".join(requirements)
        if not ready.exists() or ready.read_text() != text:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            subprocess.run(
                [str(executable), "-m", "pip", "install", "-q", *requirements],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            ready.write_text(text)
    return executable


def runtime() -> Path:
    """Return the Python of an environment with the packages of the runtime image."""
    lock = ROOT / "runtime.lock"
    name = f"runtime-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    return python(name, "--no-deps", "--require-hashes", "-r", str(lock))
