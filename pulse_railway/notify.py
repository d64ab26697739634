"""`--notify URL`: posts a JSON object about a verb's result, with Slack's `text`."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from pulse_railway import provenance
from pulse_railway.errors import Failure, Interrupted, redact
from pulse_railway.output import Output, printable

TIMEOUT = 10.0  # seconds


@dataclass
class Notification:
    """A notification, which the verb completes while it runs."""

    event: str
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def notifying(url: str | None, event: str, output: Output) -> Iterator[Notification]:
    """Post a notification to `url` when the block ends or fails. A failed post is a warning."""
    notification = Notification(event)
    try:
        yield notification
    except (Failure, Interrupted, OSError, httpx.HTTPError) as error:
        interrupted = isinstance(error, Interrupted)
        # one line: what follows it is a log, which may hold anything
        why = "interrupted" if interrupted else str(error).partition("\n")[0]
        notification.facts |= {"ok": False, "error": why}
        notification.text = f"{event} failed: {notification.facts['error']}"
        send(url, notification, output)
        raise
    notification.facts |= {"ok": True}
    send(url, notification, output)


def send(url: str | None, notification: Notification, output: Output) -> None:
    if not url:
        return
    who = provenance.by()
    text = html.escape(f"{notification.text} ({who})", quote=False)  # Slack's three characters
    body = {
        "text": text,
        "event": notification.event,
        "by": who,
        **notification.facts,
    }
    clean = {k: printable(redact(v)) if isinstance(v, str) else v for k, v in body.items()}
    try:
        httpx.post(url, json=clean, timeout=TIMEOUT).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:  # its text contains the URL, a secret
        status = getattr(getattr(error, "response", None), "status_code", None)
        output.warn(f"the notification was not sent: {status or type(error).__name__}")
