"""Compares this machine's clock with a server's."""

from __future__ import annotations

import email.utils
import time

import httpx

MAX_DIFFERENCE = 60.0  # seconds


def clock_difference(url: str) -> float | None:
    """Return the seconds by which this machine's clock is ahead of the server's `Date`.

    None if they are few, without an answer, and for a server without a clock (RFC 9110 section
    6.6.1).
    """
    try:
        date = httpx.get(url, timeout=10).headers.get("date", "")
        difference = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (httpx.HTTPError, ValueError):
        return None
    return difference if abs(difference) > MAX_DIFFERENCE else None
