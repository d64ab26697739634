"""The client of Railway's GraphQL API: retries calls that may be repeated, and no others."""

from __future__ import annotations

import functools
import os
import random
import ssl
import time
from collections.abc import Callable
from typing import Any

import httpx

from pulse_railway import contract
from pulse_railway.errors import Failure, Uncertain, redact
from pulse_railway.railway import documents, tokens
from pulse_railway.railway.tokens import Token

ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds; doubled before each retry, with jitter
MAX_PAUSE = 60.0  # seconds
TIMEOUT = httpx.Timeout(60.0, connect=15.0)


def trust() -> ssl.SSLContext:
    """Return httpx's own TLS context, cached, since it takes 20 ms to make."""
    return _trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.cache
def _trust(*_: str | None) -> ssl.SSLContext:
    return httpx.create_ssl_context()


class ApiError(Failure):
    """Railway has refused a call. The message is Railway's."""


class GraphqlError(ApiError):
    """Railway's API has answered a document with errors."""


class Api:
    """Railway's API with one token.

    Args:
        token: its kind is read from Railway once, by the first call that depends on it.
        on_wait: called with the reason when a call waits for a retry.
    """

    def __init__(self, token: Token, on_wait: Callable[[str], None] = lambda _: None) -> None:
        self._token = token
        self.calls = 0
        self._on_wait = on_wait
        self._scope: dict[str, Any] | None = None
        self._scope_is_read = False
        self.url = os.environ.get(contract.API_URL_VARIABLE) or contract.API_URL
        self._client = httpx.Client(timeout=TIMEOUT, verify=trust())

    def close(self) -> None:
        self._client.close()

    # -- the token -----------------------------------------------------------------------------

    @property
    def token(self) -> Token:
        """Return the token; a login that is about to expire is refreshed first."""
        self._token = tokens.refreshed(self._token)
        return self._token

    def check_token(self) -> None:
        """Raise ApiError if Railway accepts the token for no call."""
        if self.is_project_token:
            return
        try:
            self.call(documents.MY_PROJECTS)
        except ApiError:
            self.call(documents.API_TOKEN)  # a workspace token has no `me`

    def scope(self) -> dict[str, Any] | None:
        """Return a project token's project and environment; None for any other token."""
        if not self._scope_is_read:
            self._scope_is_read = True
            if self.token.source != "login":
                try:
                    headers = {"Project-Access-Token": self.token.value}
                    data = self._call(documents.PROJECT_TOKEN, {}, headers, repeatable=True)
                    self._scope = data["projectToken"]
                except ApiError:
                    self._scope = None
        return self._scope

    def environment_of(self, project_token: str) -> str | None:
        """The id of the environment that another token opens; None where Railway knows no such
        project token. Raises Failure where it does not say."""
        headers = {"Project-Access-Token": project_token}
        try:
            data = self._call(documents.PROJECT_TOKEN, {}, headers, repeatable=True)
        except GraphqlError:
            return None
        return str(data["projectToken"]["environmentId"])

    @property
    def is_project_token(self) -> bool:
        return self.scope() is not None

    def _headers(self) -> dict[str, str]:
        if self.is_project_token:
            return {"Project-Access-Token": self.token.value}
        return {"Authorization": f"Bearer {self.token.value}"}

    # -- calls ---------------------------------------------------------------------------------

    def call(self, document: str, *, repeatable: bool | None = None, **variables: Any) -> Any:
        """Send a document and return its data.

        A query is retried when Railway is busy or unreachable. A mutation is retried if Railway has
        not carried it out (429), or it was not sent.

        Args:
            repeatable: a mutation that is retried like a query, since repeating it is harmless.

        Raises:
            ApiError: Railway has refused; the message is Railway's.
            Uncertain: a mutation was sent, and its answer was lost.
            Failure: Railway is not reachable.
        """
        if repeatable is None:
            repeatable = not document.lstrip().startswith("mutation")
        return self._call(document, variables, self._headers(), repeatable)

    def public(self, document: str, **variables: Any) -> Any:
        """Send a query that needs no token, and return its data."""
        return self._call(document, variables, {}, repeatable=True)

    def _call(
        self, document: str, variables: dict[str, Any], headers: dict[str, str], repeatable: bool
    ) -> Any:
        body = {"query": document, "variables": variables}
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            self.calls += 1
            if "Authorization" in headers:  # a login may have expired during the wait
                headers = {"Authorization": f"Bearer {self.token.value}"}
            try:
                answer = self._client.post(self.url, json=body, headers=headers)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                # the request was not sent, so a mutation may be retried too
                if last:
                    raise Failure(f"Railway's API is not reachable: {_reason(error)}") from None
                self._wait(attempt, "Railway is not reachable")
                continue
            except httpx.HTTPError as error:
                if not repeatable:
                    raise Uncertain(f"Railway's answer was lost: {_reason(error)}") from None
                if last:
                    raise Failure(f"Railway's API does not answer: {_reason(error)}") from None
                self._wait(attempt, "Railway does not answer")
                continue
            if answer.status_code == 429:
                after = _retry_after(answer)
                if last or after > MAX_PAUSE * 5:
                    raise Failure(
                        "Railway's rate limit is used up; it asks to wait"
                        f" {after or MAX_PAUSE:.0f} s: try again then"
                    )
                self._wait(attempt, "Railway's rate limit", after)
                continue
            if answer.status_code >= 500:
                if not repeatable:
                    raise Uncertain(f"Railway answered {answer.status_code}")
                if last:
                    raise Failure(f"Railway answers {answer.status_code}: try again later")
                self._wait(attempt, f"Railway answered {answer.status_code}")
                continue
            return self._data(answer)
        raise AssertionError("unreachable")

    def _data(self, answer: httpx.Response) -> Any:
        if answer.status_code in (401, 403):
            raise ApiError("Railway does not accept the token: check it, or make a new one")
        unexpected = ApiError(
            f"Railway answered {answer.status_code}, which is no answer of its API: is"
            f" {contract.API_URL_VARIABLE} right?"
        )
        try:
            body = answer.json()
        except (ValueError, RecursionError):
            raise unexpected from None
        if not isinstance(body, dict):
            raise unexpected
        if errors := body.get("errors"):
            if not isinstance(errors, list):
                raise unexpected
            message = "; ".join(str(e.get("message") if isinstance(e, dict) else e) for e in errors)
            if "not authorized" in message.lower():
                message += (
                    f" (token from {self.token.source}: it must be valid and see the project)"
                )
            raise GraphqlError(f"Railway: {redact(message)}")
        data = body.get("data")
        if answer.status_code >= 400 or not data or not isinstance(data, dict):
            raise unexpected
        return data

    def _wait(self, attempt: int, reason: str, at_least: float = 0.0) -> None:
        pause = min(FIRST_PAUSE * 2**attempt, MAX_PAUSE) * random.uniform(0.75, 1.25)
        pause = max(pause, at_least)
        self._on_wait(f"{reason}; trying again in {pause:.1f} s")
        time.sleep(pause)


def _retry_after(answer: httpx.Response) -> float:
    """Return the seconds of Retry-After (RFC 9110 section 10.2.3; Railway sends a number)."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _reason(error: httpx.HTTPError) -> str:
    return redact(str(error) or type(error).__name__)
