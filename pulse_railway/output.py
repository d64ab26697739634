"""The output of a verb: steps with their durations on stderr, results on stdout.

On a terminal a step has a spinner; elsewhere it is a plain line. With `--json` stdout has one JSON
object. NO_COLOR is respected. Text from outside (a log, a commit's message, an error of Railway's)
can do nothing to the terminal: see `printable`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pulse_railway.advice import pasteable
from pulse_railway.errors import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

COLORS = re.compile(r"\x1b\[[0-9;:]*m")  # of a program that was asked for them
# C0 and C1 but newline and tab, and what changes the direction of text
_CONTROLS = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F)]
UNPRINTABLE = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*_CONTROLS, *range(0x2066, 0x206A))
}


def printable(text: str) -> str:
    """Return `text` without colors, and with control characters shown instead of sent."""
    return COLORS.sub("", text).replace("\r\n", "\n").translate(UNPRINTABLE)


def console(**options: Any) -> Console:
    """Return a console of rich's for texts as they are: no markup is read in them, and `printable`
    is applied to all of them."""
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        def render(self, *args: Any, **more: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **more):
                is_own = segment.control  # rich's sequences
                yield segment if is_own else Segment(printable(segment.text), segment.style)

    if os.environ.get("NO_COLOR"):  # rich leaves bold, and the spinner's sequences
        options["force_terminal"] = False
    return PlainConsole(highlight=False, markup=False, emoji=False, **options)


def silence_stdout() -> int:
    """Discard all further output, since stdout's reader is gone (as `head` leaves a pipe).

    Returns the exit status for that. Without this the interpreter would complain at its end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


class Output:
    """Prints a verb's steps, messages and result; secrets are redacted."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.value: dict[str, Any] = {}  # the verb's result
        self.warnings: list[str] = []
        self._console: Console | None = None
        self._status: Status | None = None
        self._title = ""
        self._began = 0.0

    @property
    def console(self) -> Console:
        if self._console is None:
            self._console = console(stderr=True)
        return self._console

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step of a verb, and print at its end whether it succeeded, and its time."""
        began = time.monotonic()
        self._title = title
        try:
            if self.console.is_terminal:
                from rich.text import Text

                with self.console.status(Text(redact(title))) as self._status:
                    yield
            else:
                self.console.print(f"  {redact(title)} ...", soft_wrap=True)
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
        """Show what the current step waits for."""
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(redact(f"{self._title}: {why}")))
        else:
            self.console.print(f"    {redact(why)}", soft_wrap=True)

    def log(self, line: str) -> None:
        """Print a line of other output: a build's, a service's."""
        self.console.print(f"    {redact(line)}", style="dim", soft_wrap=True)

    def info(self, line: str) -> None:
        self.console.print(pasteable(redact(line)), soft_wrap=True)

    def warn(self, line: str) -> None:
        self.warnings.append(pasteable(redact(line)))
        self.console.print(f"warning: {self.warnings[-1]}", style="yellow", soft_wrap=True)

    def result(self, value: dict[str, Any], summary: list[str]) -> None:
        """Print a verb's result: with --json `value` on stdout, else the summary on stderr."""
        if self.warnings:
            value = {**value, "warnings": self.warnings}
        self.value = value
        if self.as_json:
            self._json(value)
        else:
            for line in summary:
                self.info(line)

    def failure(self, why: str) -> None:
        """With --json, print one object on stdout: the result so far, and the `error`."""
        if self.as_json:
            warned = {"warnings": self.warnings} if self.warnings else {}
            self._json({**self.value, **warned, "error": why})

    def _json(self, value: dict[str, Any]) -> None:
        sys.stdout.write(redact(json.dumps(value, indent=2, sort_keys=True)) + "\n")
        sys.stdout.flush()
