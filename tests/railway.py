"""The local Railway with forked control commands and janitors (see zygote.py).

python -m tests.railway ROOT BIN    BIN: the folder of the containers' `pulse-railway`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pulse_railway.local import server, supervisor


class Supervisor(supervisor.Supervisor):
    def environment(self, *arguments: Any) -> dict[str, str]:
        env = super().environment(*arguments)
        ours = str(supervisor.HERE / "bin")  # an image's own folders stay before it
        return {**env, "PATH": env["PATH"].replace(ours, f"{sys.argv[2]}{os.pathsep}{ours}", 1)}


if __name__ == "__main__":
    server.Supervisor = Supervisor  # type: ignore[attr-defined]
    server.serve(server.LocalRailway(Path(sys.argv[1]).resolve()))
