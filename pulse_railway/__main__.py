"""`python -m pulse_railway` and the console script.

What runs inside containers is sorted out first, since it has to be quick: `serve` as a container's
first process, `control` for everybody who waits for its answer. The verbs are in cli.py.
"""

from __future__ import annotations

import sys


def main() -> None:
    match sys.argv[1:]:
        case ["serve", *rest]:
            from pulse_railway import serve

            raise SystemExit(serve.main(rest))
        case ["control", *rest] if rest[:1] not in ([], ["--help"], ["-h"]):
            from pulse_railway import runtime_image

            runtime_image.become("router", ["control", *rest])
        case ["janitor", "run", *rest]:
            from pulse_railway import runtime_image

            runtime_image.become("janitor", ["run", *rest])
    from pulse_railway import cli

    cli.main()


if __name__ == "__main__":
    main()
