"""Which token a run uses, and which kind it is.

Order: the flag, RAILWAY_TOKEN, RAILWAY_API_TOKEN, the Railway CLI's login (README, "Tokens").
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from pulse_railway import contract
from pulse_railway.errors import Failure, keep_secret

OAUTH_URL = "https://backboard.railway.com/oauth/token"
# the Railway CLI's own public client id, which its refresh tokens are bound to
OAUTH_CLIENT_ID = "rlwy_oaci_onEklvmksh1hRUiCo7E2zX12"
EXPIRY_MARGIN = 60  # seconds

NO_TOKEN = (
    "no Railway token: set RAILWAY_API_TOKEN (account or workspace token) or RAILWAY_TOKEN"
    " (project token), pass --token, or run `railway login`"
)


Source = Literal["flag", "RAILWAY_TOKEN", "RAILWAY_API_TOKEN", "login"]


@dataclass(frozen=True)
class Token:
    """A token and where it comes from. Never shown."""

    value: str
    source: Source

    def __repr__(self) -> str:
        return f"Token(from {self.source})"

    @property
    def durable(self) -> bool:
        """May it be written into the router and the janitor? A login's expires within hours."""
        return self.source != "login"


def find(flag: str | None) -> Token:
    """The token of this run. Raises Failure where there is none."""
    given: list[tuple[str | None, Source]] = [
        (flag, "flag"),
        (os.environ.get(contract.RAILWAY_TOKEN), "RAILWAY_TOKEN"),
        (os.environ.get(contract.RAILWAY_API_TOKEN), "RAILWAY_API_TOKEN"),
    ]
    for value, source in given:
        keep_secret(value)
        if value and (text := value.strip()):  # a secret read from a file ends in a line break
            if not text.isascii() or not text.isprintable() or " " in text:
                where = "--token" if source == "flag" else source
                raise Failure(f"{where} is no token: it has white space or odd characters in it")
            return Token(text, source)
    if value := login():
        keep_secret(value)
        return Token(value, "login")
    raise Failure(NO_TOKEN)


def login_file() -> Path:
    """Where the Railway CLI keeps its login; RAILWAY_ENV picks among its own deployments."""
    suffix = {"staging": "-staging", "dev": "-dev", "develop": "-dev"}
    name = os.environ.get("RAILWAY_ENV", "").strip().lower()
    return Path.home() / ".railway" / f"config{suffix.get(name, '')}.json"


def login() -> str | None:
    """The CLI login's access token, refreshed where it has expired.

    Raises Failure where the refresh is refused.
    """
    path = login_file()
    try:
        config = json.loads(path.read_text())
        user = config["user"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(user, dict):
        return None
    access = user.get("accessToken") or user.get("access_token")
    if not access:
        legacy = user.get("token")
        return str(legacy) if legacy else None
    keep_secret(access, user.get("refreshToken"))
    expires = user.get("tokenExpiresAt") or user.get("token_expires_at")
    if not isinstance(expires, int | float) or time.time() < expires - EXPIRY_MARGIN:
        return str(access)
    return refresh(path, config, user.get("refreshToken") or user.get("refresh_token"))


def oauth_url() -> str:
    """Railway's, or the local Railway's where PULSE_RAILWAY_API_URL points there."""
    api = os.environ.get(contract.API_URL_VARIABLE)
    return api.removesuffix("/graphql/v2") + "/oauth/token" if api else OAUTH_URL


def refresh(path: Path, config: dict[str, Any], refresh_token: object) -> str:
    """Trade the refresh token for a new login (RFC 6749 section 6) and write it back."""
    again = "the Railway CLI's login has expired: run `railway login` again"
    if not isinstance(refresh_token, str) or not refresh_token:
        raise Failure(again)
    form = {
        "grant_type": "refresh_token",
        "refresh_token": refresh_token,
        "client_id": os.environ.get("RAILWAY_OAUTH_CLIENT_ID") or OAUTH_CLIENT_ID,
    }
    try:
        answer = httpx.post(oauth_url(), data=form, timeout=30)
        answer.raise_for_status()
        body = answer.json()
        access = str(body["access_token"])
    except (httpx.HTTPError, ValueError, KeyError):
        raise Failure(again) from None
    user = config["user"]
    user["accessToken"] = access
    user["refreshToken"] = body.get("refresh_token") or refresh_token
    user["tokenExpiresAt"] = int(time.time() + float(body.get("expires_in") or 3600))
    keep_secret(access, user["refreshToken"])
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w") as file:
        json.dump(config, file, indent=2)
    temporary.replace(path)
    return access
