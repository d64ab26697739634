"""`python -m pulse_railway` and the console script.

What runs inside containers is sorted out first, since it has to be quick: `serve` as a container's
first process, `control` for everybody who waits for its answer. The verbs are in cli.py.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run what the command line says. Ctrl-C and a reader that has gone end it without a word more
    than there is to say, also while modules are still being loaded."""
    try:
        try:
            dispatch()
        finally:
            sys.stdout.flush()  # here, not when the interpreter ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        from pulse_railway.output import silence_stdout

        raise SystemExit(silence_stdout()) from None


def dispatch() -> None:
    match sys.argv[1:]:
        case ["serve", *rest]:
            from pulse_railway.app import serve

            raise SystemExit(serve.main(rest))
        case ["control", *rest] if rest[:1] not in ([], ["--help"], ["-h"]):
            from pulse_railway import runtime_image

            runtime_image.become("control", rest)
        case ["janitor", ("run" | "--help" | "-h"), *_]:
            from pulse_railway import runtime_image

            runtime_image.become("janitor", sys.argv[2:])
    from pulse_railway import cli

    cli.main()


if __name__ == "__main__":
    main()
