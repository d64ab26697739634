"""`python -m pulse_railway` and the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """A container's first process has to be ready for SIGTERM at once: `serve` waits for nothing
    that only the verbs need."""
    if sys.argv[1:2] == ["serve"]:
        from pulse_railway import serve

        raise SystemExit(serve.main(sys.argv[2:]))
    from pulse_railway import cli

    cli.main()


if __name__ == "__main__":
    main()
