"""Previews: deployments that are reachable with a key only, until they are promoted.

The key is known to nobody but who ran `deploy --preview`: the routing state, and a variable of the
service, from which a lost record is restored, have its hash.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Any

from pulse_railway import contract
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import write_variables
from pulse_railway.stack import Service, Stack


def new_key() -> str:
    """Return a key of 256 random bits, for an address and a cookie."""
    return secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def is_preview(service: Service) -> bool:
    """Was this service deployed as a preview, and not promoted since?"""
    return bool(service.variables.get(contract.PREVIEW))


def has_hash(service: Service) -> bool:
    """Is a preview's variable the hash of a key?"""
    return bool(re.fullmatch("[0-9a-f]{64}", service.variables.get(contract.PREVIEW) or ""))


def link(stack: Stack, deployment_id: str, key: str) -> str:
    return f"{stack.address}/?{contract.PREVIEW_QUERY}={deployment_id}.{key}"


def require_previews(stack: Stack, state: dict[str, Any]) -> None:
    """Raise Failure for a router whose version would show a preview to everybody."""
    if not state.get("previews"):
        raise Failure(
            f"{stack.names.router} is of an earlier version, without previews: run"
            " `pulse-railway ensure`"
        )


def hide_from_earlier_janitors(api: Api, stack: Stack, service_id: str) -> None:
    """Remove the mark of the run that created a preview's service.

    A janitor of an earlier version does not see the preview's record. It takes a service with that
    mark for an orphan after an hour, makes it reachable, and deletes it; without, it leaves it.
    """
    write_variables(api, stack.target, service_id, {contract.RUN: ""})


def release(api: Api, stack: Stack, service: Service, output: Output) -> None:
    """Remove the hash from the service of a promoted preview: a record that is lost from now on is
    restored as any other. A failure is only a warning, since the promotion is done."""
    if not is_preview(service):
        return
    values = {contract.PREVIEW: "", contract.RUN: secrets.token_hex(8)}
    try:
        write_variables(api, stack.target, service.id, values)
    except Failure as failure:
        output.warn(f"{contract.PREVIEW} of {service.name} could not be removed: {failure}")
