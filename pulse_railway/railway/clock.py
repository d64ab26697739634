"""Compares this machine's clock with a server's."""

from __future__ import annotations

import email.utils
import time

import httpx

MAX_DIFFERENCE = 60.0  # seconds


def clock_is_off(url: str) -> str | None:
    """Return a sentence if this machine's clock differs from the server's `Date`, else None.

    None also without an answer, or for a server without a clock (RFC 9110 section 6.6.1).
    """
    try:
        date = httpx.get(url, timeout=10).headers.get("date", "")
        difference = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (httpx.HTTPError, ValueError):
        return None
    if abs(difference) <= MAX_DIFFERENCE:
        return None
    return f"this machine's clock is {difference:.0f} s off"
