"""`python -m pulse_railway` and the console script.

The commands that run inside containers are handled first, since they must start quickly: `serve` is
a container's first process, and callers wait for the answer of `control`. The verbs are in cli.py.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C and a closed stdout end the process without a traceback, even
    while modules are being loaded."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # `>&-` has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        try:
            dispatch()
        finally:
            sys.stdout.flush()  # so that a BrokenPipeError is raised here, not at the exit
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        from pulse_railway.output import silence_stdout

        raise SystemExit(silence_stdout()) from None
    except OSError as error:  # a full disk, say
        from pulse_railway.output import silence_stdout

        silence_stdout()
        raise SystemExit(f"error: {error}") from None


def dispatch() -> None:
    """Run a command of a container in place of this process, or a verb."""
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
