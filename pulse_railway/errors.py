"""What a user is told, and what is never told to anyone."""

from __future__ import annotations

import base64
import json
import re
import shlex
import urllib.parse

_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+@")
_secrets: set[str] = set()


class Failure(Exception):
    """Something a user can do something about: one clear line, and an exit status of 1."""


class Uncertain(Failure):
    """A write whose answer was lost: it may or may not have been carried out."""


class Refused(Failure):
    """The router has answered that it did not do it. `reason`: active, removed, unknown, lost."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Interrupted(BaseException):
    """A signal ended the run. BaseException, so that nothing takes it for a failure to retry."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def keep_secret(*values: str | None) -> None:
    """Remember values that no output may hold, in any form in which they could get into one."""
    for value in values:
        lines = (value or "").splitlines()  # a message may show but one
        for text in {value or "", (value or "").strip(), *(line.strip() for line in lines)}:
            if len(text) >= 6:
                _secrets.update(_forms(text))


def _forms(secret: str) -> set[str]:
    """A secret as it is, escaped, quoted, URL-encoded, in base64."""
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
    # base64 of a longer text that holds the secret: at each of three offsets, less the characters
    # that depend on what stands beside it
    raw = secret.encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for offset in range(3):
            text = encode(b"\0" * offset + raw).decode().rstrip("=")
            whole = (offset + len(raw)) * 8 // 6
            forms.add(text[-(-offset * 8 // 6) : whole])
    return {form for form in forms if len(form) >= 6}


def redact(text: str) -> str:
    """`text` without tokens and passwords."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _URL_PASSWORD.sub(r"\1***@", text)
