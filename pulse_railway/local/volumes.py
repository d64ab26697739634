"""The volumes: a folder for each service in each environment."""

from __future__ import annotations

import shutil
from pathlib import Path

from pulse_railway.local.state import State


def volume_folder(root: Path, environment_id: str, service_id: str) -> Path:
    return root / "volumes" / environment_id / service_id


def delete_volumes(root: Path, environment_id: str) -> None:
    shutil.rmtree(root / "volumes" / environment_id, ignore_errors=True)


def move_old_volumes(state: State) -> None:
    """Move the volumes of an older local Railway, which had one folder a service.

    Where several environments shared a volume, the oldest of them gets it.
    """
    for service in state.services:
        old = state.root / "volumes" / service.id
        if old.is_dir() and service.instances:
            new = volume_folder(state.root, service.instances[0].environment_id, service.id)
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)
