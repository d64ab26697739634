"""The files of the runtime image, and its modules for this package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from pulse_railway import __version__

SCRIPTS = (
    "router.py control.py janitor.py telemetry.py tracing.py sqlite_store.py ownership.py".split()
)
FILES = ("Dockerfile.router", *SCRIPTS, "runtime.lock")


def sources() -> Path:
    """Return the folder of FILES: inside the wheel, or the root of a checkout."""
    package = Path(__file__).parent
    packaged = package / "runtime"
    return packaged if (packaged / "router.py").exists() else package.parent


@cache
def runtime_version() -> str:
    """Return the version that is written to router and janitor: ours, and the files' digest."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((sources() / name).read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def become(name: str, arguments: list[str]) -> NoReturn:
    """Replace this process by one of SCRIPTS, as in the runtime image. Does not return."""
    path = os.pathsep.join(filter(None, [str(sources()), os.environ.get("PYTHONPATH")]))
    sys.stdout.flush()
    command = [sys.executable, "-m", name, *arguments]  # -m uses the compiled module
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def load(name: str) -> ModuleType:
    """Return one of SCRIPTS as a module, after those that it imports."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, sources() / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    for other in {
        "router": ["ownership"],
        "control": ["router"],
        "janitor": ["router", "control"],
        "telemetry": ["router", "control"],
        "tracing": ["router", "telemetry"],
        "sqlite_store": ["router"],
    }.get(name, []):
        load(other)
    spec.loader.exec_module(module)
    return module
