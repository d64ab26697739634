"""SIGINT, SIGTERM and SIGHUP during a verb: it stops where it can clean up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from pulse_railway.errors import Interrupted


@dataclass
class _Shield:
    """The signal that came during a call whose outcome must be known."""

    depth: int = 0
    pending: int | None = None


_shield = _Shield()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Delay a signal until the end of the block, so that what the block creates can be removed."""
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
    """Raise Interrupted for each SIGINT, SIGTERM and SIGHUP, so that a verb can clean up.

    A verb that `nohup` has started goes on after SIGHUP.
    """

    def handler(number: int, _: FrameType | None) -> None:
        if _shield.depth and _shield.pending is None:
            _shield.pending = number
        else:
            raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in handlers.items():
            signal.signal(number, previous)
