"""The local Railway as it is, but that control commands and janitors are forked (see zygote.py).

python -m tests.railway ROOT BIN    BIN: the folder of the `pulse-railway` that containers get
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pulse_railway.local import server, supervisor


class Supervisor(supervisor.Supervisor):
    def environment(self, *given: Any) -> dict[str, str]:
        env = super().environment(*given)
        ours = str(supervisor.HERE / "bin")  # what an image brings comes before it
        return {**env, "PATH": env["PATH"].replace(ours, f"{sys.argv[2]}{os.pathsep}{ours}", 1)}


if __name__ == "__main__":
    server.Supervisor = Supervisor  # type: ignore[attr-defined]
    server.serve(server.LocalRailway(Path(sys.argv[1]).resolve()))
