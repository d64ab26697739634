"""The client of Railway's GraphQL API: retries calls that may be repeated, and no others."""

from __future__ import annotations

import contextlib
import email.utils
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
# for a call that waits out an outage, in seconds
FIRST_TIMEOUT = 10.0  # of its first try; doubled before each retry, up to TIMEOUT
PATIENT_PAUSE = 15.0  # at most between two tries
FIRST_WORD, NEXT_WORD = 10.0, 60.0  # after which the user is told
REFUSAL_SECONDS = 60.0  # for which an error has to hold to be believed
TIMEOUT = httpx.Timeout(60.0, connect=15.0)


def trust() -> ssl.SSLContext:
    """Return httpx's own TLS context, cached, since it takes 20 ms to make."""
    return _trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.cache
def _trust(*_: str | None) -> ssl.SSLContext:
    return httpx.create_ssl_context()


class ApiError(Failure):
    """Railway has refused a call. The message is Railway's."""


class TokenRefused(ApiError):
    """Railway does not accept the token."""


class NoAnswer(ApiError):
    """A page, or nothing, came with a status of success in place of the API's answer."""


class GraphqlError(ApiError):
    """Railway's API has answered a document with errors."""


class Api:
    """Railway's API with one token.

    Args:
        token: its kind is read from Railway once, by the first call that depends on it.
        on_wait: called with the reason when a call waits for a retry.

    `remaining` and `limit` are the calls that are left, and that Railway allows, in its present
    hour: None and 0 until an answer says it. `clock` is what Railway's clock is ahead of
    time.monotonic(), in seconds, by its last answer.
    """

    def __init__(self, token: Token, on_wait: Callable[[str], None] = lambda _: None) -> None:
        self._token = token
        self.calls = 0
        self.remaining: int | None = None
        self.limit = 0
        self.clock: float | None = None
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
        except (GraphqlError, TokenRefused):
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

    def call(
        self,
        document: str,
        *,
        repeatable: bool | None = None,
        patience: float | None = None,
        **variables: Any,
    ) -> Any:
        """Send a document and return its data.

        A query is retried when Railway is busy or unreachable. A mutation is retried if Railway has
        not carried it out (429), or it was not sent.

        Args:
            repeatable: a mutation that is retried like a query, since repeating it is harmless.
            patience: seconds for which a query waits out an outage or the rate limit.

        Raises:
            ApiError: Railway has refused; the message is Railway's.
            Uncertain: a mutation was sent, and its answer was lost.
            Failure: Railway is not reachable.
        """
        if repeatable is None:
            repeatable = not document.lstrip().startswith("mutation")
        return self._call(document, variables, self._headers(), repeatable, patience)

    def public(self, document: str, **variables: Any) -> Any:
        """Send a query that needs no token, and return its data."""
        return self._call(document, variables, {}, repeatable=True)

    def _call(
        self,
        document: str,
        variables: dict[str, Any],
        headers: dict[str, str],
        repeatable: bool,
        patience: float | None = None,
    ) -> Any:
        body = {"query": document, "variables": variables}
        retries = Retries(patience, self._on_wait)
        while True:
            self.calls += 1
            if "Authorization" in headers:  # a login may have expired during the wait
                headers = {"Authorization": f"Bearer {self.token.value}"}
            try:
                answer = self._client.post(
                    self.url, json=body, headers=headers, timeout=retries.timeout
                )
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                # the request was not sent, so a mutation may be retried too
                failure = Failure(f"Railway's API is not reachable: {_reason(error)}")
                retries.wait("Railway is not reachable", failure)
                continue
            except httpx.HTTPError as error:
                if not repeatable:
                    raise Uncertain(f"Railway's answer was lost: {_reason(error)}") from None
                failure = Failure(f"Railway's API does not answer: {_reason(error)}")
                retries.wait("Railway does not answer", failure)
                continue
            self._read_headers(answer)
            if answer.status_code == 429:
                after = _retry_after(answer)
                failure = Failure(
                    "Railway's rate limit is used up; it asks to wait"
                    f" {after or MAX_PAUSE:.0f} s: try again then"
                )
                retries.wait("Railway's rate limit", failure, after)
            elif answer.status_code >= 500:
                if not repeatable:
                    raise Uncertain(f"Railway answered {answer.status_code}")
                failure = Failure(f"Railway answers {answer.status_code}: try again later")
                retries.wait(f"Railway answered {answer.status_code}", failure)
            else:
                try:
                    return self._data(answer)
                except NoAnswer as error:  # a page of a proxy, where Railway is not to be had
                    if not repeatable:
                        raise Uncertain(str(error)) from None
                    retries.wait(f"Railway answered {answer.status_code} with a page", error)
                except ApiError as error:
                    retries.wait_for_another_answer(error)

    def _read_headers(self, answer: httpx.Response) -> None:
        """Keep what the headers say of Railway's clock and of the rate limit (docs.railway.com,
        "Rate limits")."""
        with contextlib.suppress(ValueError):
            date = email.utils.parsedate_to_datetime(answer.headers.get("date", ""))
            self.clock = date.timestamp() - time.monotonic()
        remaining, limit = (
            answer.headers.get(f"x-ratelimit-{name}", "") for name in ("remaining", "limit")
        )
        if remaining.isdecimal() and limit.isdecimal():
            self.remaining, self.limit = int(remaining), int(limit)

    @property
    def is_nearly_used_up(self) -> bool:
        """Is less than a tenth of the calls left that Railway allows an hour? False: not known."""
        return self.remaining is not None and self.remaining * 10 < self.limit

    def _data(self, answer: httpx.Response) -> Any:
        if answer.status_code in (401, 403):
            raise TokenRefused("Railway does not accept the token: check it, or make a new one")
        own = self.url == contract.API_URL
        advice = "try again later" if own else f"is {contract.API_URL_VARIABLE} right?"
        message = f"Railway answered {answer.status_code}, which is no answer of its API: {advice}"
        unexpected = ApiError(message)
        try:
            body = answer.json()
        except (ValueError, RecursionError):
            raise (NoAnswer(message) if answer.status_code == 200 else unexpected) from None
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


class Retries:
    """Decides whether and when one call is sent again.

    Args:
        patience: seconds for which an outage is waited out; None: there are ATTEMPTS tries.
        on_wait: called with what is waited for: at each wait, with `patience` at those that last.
    """

    def __init__(self, patience: float | None, on_wait: Callable[[str], None]) -> None:
        self._patience, self._on_wait = patience, on_wait
        self._began = time.monotonic()
        self._tries = 0
        self._refused_since: float | None = None
        self._told: float | None = None

    @property
    def timeout(self) -> httpx.Timeout:
        """Of the next try: short at first if it may be repeated for long, to notice an outage."""
        if self._patience is None:
            return TIMEOUT
        seconds = min(float(TIMEOUT.read or 0), FIRST_TIMEOUT * 2**self._tries)
        return httpx.Timeout(seconds, connect=min(seconds, float(TIMEOUT.connect or seconds)))

    def wait(self, reason: str, failure: Failure, at_least: float = 0.0) -> None:
        """Wait before another try. Raises `failure` if there is none.

        Args:
            at_least: seconds that Railway asks to wait.
        """
        pause = min(FIRST_PAUSE * 2**self._tries, MAX_PAUSE) * random.uniform(0.75, 1.25)
        pause = max(pause, at_least)
        self._tries += 1
        if self._patience is None:
            if self._tries >= ATTEMPTS or at_least > MAX_PAUSE * 5:
                raise failure from None
            self._on_wait(f"{reason}; trying again in {pause:.1f} s")
        else:
            passed = time.monotonic() - self._began
            if passed >= self._patience:
                raise failure from None
            pause = min(max(min(pause, PATIENT_PAUSE), at_least), self._patience - passed)
            if passed + pause >= FIRST_WORD and (
                self._told is None or passed + pause >= self._told + NEXT_WORD
            ):
                self._told = passed + pause
                self._on_wait(
                    f"{reason}; trying again for {self._patience - passed:.0f} s, in {pause:.0f} s"
                    " next: what was started on Railway goes on meanwhile"
                )
        time.sleep(pause)

    def wait_for_another_answer(self, refusal: ApiError) -> None:
        """Wait as for an outage, which can look like a refusal. Raises it if it holds for long."""
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
        if self._patience is None or now - self._refused_since >= REFUSAL_SECONDS:
            raise refusal
        self.wait(str(refusal), refusal)


def _retry_after(answer: httpx.Response) -> float:
    """Return the seconds of Retry-After (RFC 9110 section 10.2.3; Railway sends a number)."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _reason(error: httpx.HTTPError) -> str:
    return redact(str(error) or type(error).__name__)
