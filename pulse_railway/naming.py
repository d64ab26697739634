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


# the grammar of an image's name (distribution's `reference` package, which docker uses)
_PATH = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
# a first part without a dot or a port is a part of the path
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:(?:localhost|{_LABEL}(?:\.{_LABEL})+)(?::[0-9]+)?|{_LABEL}:[0-9]+)"
_REPOSITORY = re.compile(rf"(?:{_HOST}/)?{_PATH}(?:/{_PATH})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
REPOSITORY_LIMIT = 255  # characters


def image_repository(text: str) -> str:
    """Return an image's repository. Raises ValueError for anything else, such as one with a tag."""
    if not _REPOSITORY.fullmatch(text) or len(text) > REPOSITORY_LIMIT:
        raise ValueError(
            f"{text!r} is no repository: write registry/organisation/name, in lower case, without"
            " scheme and tag"
        )
    return text


def image_reference(text: str) -> str:
    """Return an image's reference: a repository with a tag, a digest or both.

    Raises ValueError for anything else.
    """
    name, at, digest = text.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon is before a port
        repository, tag = name, ""
    if (
        (at and not _DIGEST.fullmatch(digest))
        or (tag and not _TAG.fullmatch(tag))
        or not (at or tag)
        or not _REPOSITORY.fullmatch(repository)
        or len(repository) > REPOSITORY_LIMIT
    ):
        raise ValueError(
            f"{text!r} is no image: write registry/organisation/name:tag, or @sha256: and the"
            " digest's 64 digits, without scheme"
        )
    return text
