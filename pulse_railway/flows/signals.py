"""Ctrl-C and SIGTERM during a flow: it stops where it can clean up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from pulse_railway.errors import Interrupted


@dataclass
class _Shield:
    """Signals that came while a call was under way whose outcome must be known."""

    depth: int = 0
    pending: int | None = None


_shield = _Shield()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A signal waits for the end of this block: what it makes can then be removed."""
    _shield.depth += 1
    try:
        yield
    finally:
        _shield.depth -= 1
        number, _shield.pending = _shield.pending, None
        if number is not None and not _shield.depth:
            raise Interrupted(number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, so that a verb can clean up; a second one too."""

    def handler(number: int, _: FrameType | None) -> None:
        if _shield.depth and _shield.pending is None:
            _shield.pending = number
        else:
            raise Interrupted(number)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
