"""The exceptions that users see as messages, and the secrets that no output may show."""

from __future__ import annotations

import base64
import json
import re
import shlex
import urllib.parse
from typing import Any

_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+@")
_secrets: set[str] = set()


class Failure(Exception):
    """An error that the user can correct: it is shown as one line, with an exit status of 1."""


class UsageError(Failure):
    """A word on the command line that does not fit, or that is missing: exit status 2."""


class Uncertain(Failure):
    """A write whose answer was lost: it may or may not have been carried out."""


class Refused(Failure):
    """The router has answered that it refuses a command. `reason`: active, removed, unknown, ...

    `answer` is the whole answer.
    """

    def __init__(self, message: str, reason: str, answer: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.answer = answer or {}


class Interrupted(BaseException):
    """A signal ended the run. It is a BaseException, so that no code retries it as a failure."""

    under_way: str | None = None  # the command that the router may still carry out

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        if self.under_way is None:
            return "interrupted"
        return (
            f"interrupted: the router may still carry out `{self.under_way}`; `pulse-railway"
            " status` shows whether it did"
        )


def keep_secret(*values: str | None) -> None:
    """Register values that `redact` removes from all output, in every form that they may have."""
    for value in values:
        lines = (value or "").splitlines()  # a message may show one line of several
        for text in {value or "", (value or "").strip(), *(line.strip() for line in lines)}:
            if len(text) >= 6:
                _secrets.update(_forms(text))


def _forms(secret: str) -> set[str]:
    """Return a secret as it is, escaped, quoted, URL-encoded, and in base64."""
    forms = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        repr(secret.encode())[2:-1],
        shlex.quote(secret),
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
    }
    # base64 of a longer text that contains the secret: at each of three offsets, without the
    # characters that depend on the text beside it
    raw = secret.encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for offset in range(3):
            text = encode(b"\0" * offset + raw).decode().rstrip("=")
            whole = (offset + len(raw)) * 8 // 6
            forms.add(text[-(-offset * 8 // 6) : whole])
    return {form for form in forms if len(form) >= 6}


def redact(text: str) -> str:
    """Return `text` with *** in place of the registered secrets and of passwords in URLs."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _URL_PASSWORD.sub(r"\1***@", text)
