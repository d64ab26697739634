"""What services and deployments are called."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from pulse_railway import contract


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.strip().lower()).strip("-")


def service_name(name: str) -> str:
    """A service name as Railway takes it. Raises ValueError for one that is empty or too long."""
    slug = _slug(name)
    if not slug:
        raise ValueError(f"service name {name!r} has no letter or digit")
    if len(slug) > contract.SERVICE_NAME_LIMIT:
        raise ValueError(
            f"service name {slug!r} has {len(slug)} characters;"
            f" Railway takes {contract.SERVICE_NAME_LIMIT}: choose a shorter one"
        )
    return slug


def service_prefix(prefix: str | None) -> str:
    """A service prefix with its dash, or nothing. Raises ValueError for one that is too long."""
    if not prefix or not prefix.strip():
        return ""
    slug = _slug(prefix)
    if not slug:
        raise ValueError(f"service prefix {prefix!r} has no letter or digit")
    if len(slug) + 1 > contract.SERVICE_PREFIX_LIMIT:
        raise ValueError(
            f"service prefix {slug + '-'!r} is longer than"
            f" {contract.SERVICE_PREFIX_LIMIT} characters: choose a shorter one"
        )
    return slug + "-"


def baseline_name(prefix: str, name: str) -> str:
    """The name of a stable service: `pulse-router`, with a prefix `<prefix>router`."""
    return service_name(prefix + (name.removeprefix("pulse-") if prefix else name))


def deployment_id(text: str) -> str:
    """A deployment id. Raises ValueError for one that does not match the pattern."""
    candidate = text.strip().lower()
    if not contract.DEPLOYMENT_ID_PATTERN.fullmatch(candidate):
        raise ValueError(
            f"deployment id {text!r} must be 1 to 24 of a-z, 0-9 and -, not starting with -"
        )
    return candidate


STAMP = "%y%m%d-%H%M%S"  # UTC
SLUG_LIMIT = 24 - len("yymmdd-HHMMSS") - 1


def deployment_slug(name: str) -> str:
    """What of a name is in the ids made from it. Raises ValueError where that is nothing."""
    slug = _slug(name)
    if not slug:
        raise ValueError(f"deployment name {name!r} has no letter or digit (a-z, 0-9)")
    return slug[:SLUG_LIMIT].rstrip("-")


def generate_deployment_id(name: str, now: datetime | None = None) -> str:
    """`<name slug>-<yymmdd-HHMMSS>`, in UTC; the slug is cut to what fits into 24 characters.
    Raises ValueError as deployment_slug."""
    return f"{deployment_slug(name)}-{(now or datetime.now(UTC)).strftime(STAMP)}"


def is_made_from(deployment: str, name: str) -> bool:
    """Can this id have been generated from that name?"""
    return re.fullmatch(re.escape(deployment_slug(name)) + r"-\d{6}-\d{6}", deployment) is not None


def backend_name(prefix: str, deployment: str) -> str:
    """The service name of a deployment. Raises ValueError where the two are too long together."""
    return service_name(prefix + deployment_id(deployment))
