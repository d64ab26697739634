"""What `pulse run` starts: its arguments as ours, a JSON list on stdout.

    python -m pulse_railway.app.pulse_run main.py --prod ...

`pulse run` imports the app, starts uvicorn and React's server, and stays, with the app in memory.
Its own code says here what it would start, with its own settings whatever its version, and ends;
`serve` starts that by itself, and each version that runs takes some 60 MB less.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from typing import Any


def main(argv: list[str]) -> int:
    from pulse.cli import cmd

    commands: list[dict[str, Any]] = []

    def note(specs: Iterable[Any], **_: Any) -> int:
        commands.extend({"args": s.args, "cwd": str(s.cwd), "env": s.env} for s in specs)
        return 0

    vars(cmd)["execute_commands"] = note
    with contextlib.redirect_stdout(sys.stderr):
        cmd.cli(["run", *argv], standalone_mode=False)
    print(json.dumps(commands))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
