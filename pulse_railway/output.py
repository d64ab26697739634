"""What people see: steps with their time on stderr, results on stdout.

On a terminal a step spins while it lasts; elsewhere each is a plain line. `--json` leaves stdout
to one JSON object. NO_COLOR is respected.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pulse_railway.errors import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


def silence_stdout() -> int:
    """Who read our stdout has gone, as `head` does: nothing is said any more, not even when the
    interpreter ends. Returns the exit status that says so."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


class Output:
    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.value: dict[str, Any] = {}  # the verb's result
        self._console: Console | None = None
        self._status: Status | None = None
        self._title = ""
        self._began = 0.0

    @property
    def console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
        return self._console

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step of a verb: announced, timed, and marked with how it ended."""
        began = time.monotonic()
        self._title = title
        console = self.console
        try:
            if console.is_terminal:
                with console.status(redact(title)) as self._status:
                    yield
            else:
                console.print(f"  {redact(title)} ...", soft_wrap=True, markup=False)
                yield
        except BaseException:
            self._mark("✗", "red", title, began)
            raise
        finally:
            self._status = None
        self._mark("✓", "green", title, began)

    def _mark(self, mark: str, color: str, title: str, began: float) -> None:
        from rich.text import Text

        seconds = time.monotonic() - began
        line = Text.assemble((mark, color), f" {redact(title)} ", (f"{seconds:.1f} s", "dim"))
        self.console.print(line, soft_wrap=True)

    def waiting(self, why: str) -> None:
        """What the current step waits for."""
        if self._status is not None:
            self._status.update(redact(f"{self._title}: {why}"))
        else:
            self.console.print(f"    {redact(why)}", soft_wrap=True, markup=False)

    def log(self, line: str) -> None:
        """A line of somebody else's output: a build's, a service's."""
        self.console.print(f"    {redact(line)}", style="dim", soft_wrap=True, markup=False)

    def say(self, line: str) -> None:
        self.console.print(redact(line), soft_wrap=True, markup=False)

    def warn(self, line: str) -> None:
        self.console.print(f"warning: {redact(line)}", style="yellow", soft_wrap=True, markup=False)

    def result(self, value: dict[str, Any], summary: list[str]) -> None:
        """The end of a verb: the whole of it as JSON on stdout, or a summary for people."""
        self.value = value
        if self.as_json:
            self._json(value)
        else:
            for line in summary:
                self.say(line)

    def failure(self, why: str) -> None:
        """With --json, a failure is one object on stdout, too: what there was of a result, and why
        there is no more of it."""
        if self.as_json:
            self._json({**self.value, "error": why})

    def _json(self, value: dict[str, Any]) -> None:
        sys.stdout.write(redact(json.dumps(value, indent=2, sort_keys=True)) + "\n")
        sys.stdout.flush()
