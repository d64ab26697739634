"""Finds the Railway token of a run, and refreshes the Railway CLI's login.

The order is: the flag, RAILWAY_TOKEN, RAILWAY_API_TOKEN, the CLI's login (docs/ci.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx

from pulse_railway import contract
from pulse_railway.errors import Failure, keep_secret

OAUTH_URL = "https://backboard.railway.com/oauth/token"
# the Railway CLI's own public client id, which its refresh tokens are bound to
OAUTH_CLIENT_ID = "rlwy_oaci_onEklvmksh1hRUiCo7E2zX12"
EXPIRY_MARGIN = 90  # seconds; more than the CLI's 60, so that the CLI need not refresh a login
DEFAULT_LIFETIME = 3600.0  # seconds
LOCK_TIMEOUT = 10.0  # seconds, as in the CLI
REFRESH_ATTEMPTS = 3
REFRESH_PAUSE = 0.25  # seconds
LOGIN_EXPIRED = "the Railway CLI's login has expired: run `railway login` again"

NO_TOKEN = (
    "no Railway token: set RAILWAY_API_TOKEN (account or workspace token) or RAILWAY_TOKEN"
    " (project token), pass --token, or run `railway login`"
)


Source = Literal["flag", "RAILWAY_TOKEN", "RAILWAY_API_TOKEN", "login", "the janitor"]


@dataclass(frozen=True)
class Token:
    """A token and its source. Its value is in no output."""

    value: str
    source: Source
    expires: float | None = None  # of a login: seconds since 1970

    @property
    def is_fresh(self) -> bool:
        """Can the token be used, that is, is it no login that is about to expire?"""
        return self.expires is None or time.time() < self.expires - EXPIRY_MARGIN

    def __repr__(self) -> str:
        return f"Token(from {self.source})"

    @property
    def durable(self) -> bool:
        """Can the janitor use the token for long? A login expires within hours."""
        return self.source != "login"


def find_token(flag: str | None) -> Token:
    """Return the token of this run. Raises Failure if there is none."""
    candidates: list[tuple[str | None, Source]] = [
        (flag, "flag"),
        (os.environ.get(contract.RAILWAY_TOKEN), "RAILWAY_TOKEN"),
        (os.environ.get(contract.RAILWAY_API_TOKEN), "RAILWAY_API_TOKEN"),
    ]
    for value, source in candidates:
        keep_secret(value)
        if value and (text := value.strip()):  # a secret from a file may end in a line break
            if not text.isascii() or not text.isprintable() or " " in text:
                label = "--token" if source == "flag" else source
                raise Failure(f"{label} is no token: it has white space or odd characters in it")
            return Token(text, source)
    if token := login():
        return token
    raise Failure(NO_TOKEN)


def refreshed(token: Token) -> Token:
    """Return the token; a login that is about to expire is refreshed first."""
    return token if token.is_fresh else login() or token


def login_file() -> Path:
    """Return the file of the Railway CLI's login; RAILWAY_ENV selects Railway's own stages."""
    suffix = {"staging": "-staging", "dev": "-dev", "develop": "-dev"}
    name = os.environ.get("RAILWAY_ENV", "").strip().lower()
    return Path.home() / ".railway" / f"config{suffix.get(name, '')}.json"


def read_login(path: Path) -> tuple[dict[str, Any], Token | None]:
    """Return the CLI's configuration and its login, None if there is none."""
    try:
        config = json.loads(path.read_text())
        user = config["user"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None
    if not isinstance(user, dict):
        return {}, None
    access = user.get("accessToken") or user.get("access_token")
    expires = user.get("tokenExpiresAt") or user.get("token_expires_at")
    if not access:
        access, expires = user.get("token"), None  # an older CLI's login does not expire
    if not access:
        return config, None
    keep_secret(str(access), user.get("refreshToken") or user.get("refresh_token"))
    expires_at = float(expires) if isinstance(expires, int | float) else None
    return config, Token(str(access), "login", expires_at)


def login() -> Token | None:
    """Return the CLI login's access token; one that is about to expire is refreshed first.

    A refresh token may be used once: a second use logs the user out. So the refresh holds the CLI's
    own lock, and reads the file again. Raises Failure if Railway refuses the refresh, or is not
    reachable and the token has expired.
    """
    path = login_file()
    _, token = read_login(path)
    if token is None or token.is_fresh:
        return token
    with locked(path.with_suffix(".lock")):
        config, token = read_login(path)
        if token is None or token.is_fresh:
            return token  # another process has refreshed it
        return refresh(path, config, token)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the Railway CLI's lock (an exclusive flock); after LOCK_TIMEOUT go on without it, as
    the CLI does."""
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        yield


def oauth_url() -> str:
    """Return the token endpoint: Railway's, or that of PULSE_RAILWAY_API_URL's server."""
    api = os.environ.get(contract.API_URL_VARIABLE)
    return api.removesuffix("/graphql/v2") + "/oauth/token" if api else OAUTH_URL


def refresh(path: Path, config: dict[str, Any], token: Token) -> Token:
    """Exchange the refresh token for a new login (RFC 6749 section 6), and write it to the file."""
    user = config["user"]
    refresh_token = user.get("refreshToken") or user.get("refresh_token")
    if not isinstance(refresh_token, str) or not refresh_token:
        raise Failure(LOGIN_EXPIRED)
    form = {
        "grant_type": "refresh_token",
        "refresh_token": refresh_token,
        "client_id": os.environ.get("RAILWAY_OAUTH_CLIENT_ID") or OAUTH_CLIENT_ID,
    }
    body, reason = _request_login(form)
    if body is None:
        if token.expires and time.time() < token.expires:
            # use the old token until it has really expired
            return replace(token, expires=token.expires + EXPIRY_MARGIN)
        raise Failure(f"the Railway CLI's login has expired, and refreshing it failed: {reason}")
    access = str(body["access_token"])
    user["accessToken"] = access
    user["refreshToken"] = body.get("refresh_token") or refresh_token
    user["tokenExpiresAt"] = int(time.time() + _lifetime(body.get("expires_in")))
    keep_secret(access, user["refreshToken"])
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w") as file:
        json.dump(config, file, indent=2)
    temporary.replace(path)
    return Token(access, "login", float(user["tokenExpiresAt"]))


def _lifetime(expires_in: Any) -> float:
    """Return the seconds that a login lives; `expires_in` is optional (RFC 6749 section 5.1).

    An invalid value raises nothing: the old refresh token is used up, so the new one must be
    written to the file.
    """
    try:
        seconds = float(expires_in)
    except (TypeError, ValueError):
        return DEFAULT_LIFETIME
    return seconds if 0 < seconds < 1e9 else DEFAULT_LIFETIME


def _request_login(form: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    """Return the token endpoint's answer, or None and the reason after three attempts.

    Only `invalid_grant` is final (RFC 6749 section 5.2), and raises Failure.
    """
    reason = ""
    for attempt in range(REFRESH_ATTEMPTS):
        if attempt:
            time.sleep(REFRESH_PAUSE * attempt)
        try:
            answer = httpx.post(oauth_url(), data=form, timeout=30)
            body = answer.json()
            if answer.status_code == 200 and body.get("access_token"):
                return body, ""
            if body.get("error") == "invalid_grant":
                raise Failure(LOGIN_EXPIRED)
            reason = f"Railway answered {answer.status_code}"
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            reason = type(error).__name__
    return None, reason
