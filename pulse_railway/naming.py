"""The names of services and deployments."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from pulse_railway import contract


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.strip().lower()).strip("-")


def service_name(name: str) -> str:
    """Return a service name that Railway accepts. Raises ValueError if it is empty or too long."""
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
    """Return a service prefix with its dash, or "". Raises ValueError if it is too long."""
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
    """Return a stable service's name: `pulse-router`, or with a prefix `<prefix>router`."""
    return service_name(prefix + (name.removeprefix("pulse-") if prefix else name))


def deployment_id(text: str) -> str:
    """Return a deployment id in lower case. Raises ValueError if it does not match the pattern."""
    candidate = text.strip().lower()
    if not contract.DEPLOYMENT_ID_PATTERN.fullmatch(candidate):
        raise ValueError(
            f"deployment id {text!r} must be 1 to 24 of a-z, 0-9 and -, not starting with -"
        )
    return candidate


STAMP = "%y%m%d-%H%M%S"  # UTC
SLUG_LIMIT = 24 - len("yymmdd-HHMMSS") - 1


def deployment_slug(name: str) -> str:
    """Return the part of an id that comes from a name. Raises ValueError if that is empty."""
    slug = _slug(name)
    if not slug:
        raise ValueError(f"deployment name {name!r} has no letter or digit (a-z, 0-9)")
    return slug[:SLUG_LIMIT].rstrip("-")


def generate_deployment_id(name: str, now: datetime | None = None) -> str:
    """Return `<slug>-<yymmdd-HHMMSS>`, in UTC; the slug is cut so that 24 characters suffice.

    Raises ValueError as `deployment_slug` does.
    """
    return f"{deployment_slug(name)}-{(now or datetime.now(UTC)).strftime(STAMP)}"


def is_made_from(deployment: str, name: str) -> bool:
    """Can this id have been generated from that name?"""
    return re.fullmatch(re.escape(deployment_slug(name)) + r"-\d{6}-\d{6}", deployment) is not None


def backend_name(prefix: str, deployment: str) -> str:
    """Return the service name of a deployment. Raises ValueError if it is too long."""
    return service_name(prefix + deployment_id(deployment))
