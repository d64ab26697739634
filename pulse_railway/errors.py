"""What a user is told, and what is never told to anyone."""

from __future__ import annotations

import re

_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+@")
_secrets: set[str] = set()


class Failure(Exception):
    """Something a user can do something about: one clear line, and an exit status of 1."""


class Uncertain(Failure):
    """A write whose answer was lost: it may or may not have been carried out."""


class Interrupted(BaseException):
    """A signal ended the run. BaseException, so that nothing takes it for a failure to retry."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def keep_secret(*values: str | None) -> None:
    """Remember values that no output may hold."""
    _secrets.update(value for value in values if value and len(value) >= 6)


def redact(text: str) -> str:
    """`text` without tokens and passwords."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _URL_PASSWORD.sub(r"\1***@", text)
