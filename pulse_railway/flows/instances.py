"""Deployments of several processes: what is checked, and what is said about them."""

from __future__ import annotations

from typing import Any

from pulse_railway import contract, runtime_image
from pulse_railway.errors import Failure
from pulse_railway.stack import Stack

PROCESS_MB = 150  # of Python and of React's server beside it, measured with the example
# https://docs.railway.com/reference/pricing/plans: of a replica, vCPU and GB alike
PLANS = {"Hobby": 8, "Pro": 24}
ALIKE = (
    "each process has its own memory: module-level state, caches and locks are not shared, what is"
    " started at import or at startup (a scheduler, a background task) runs in each of them, and"
    f" {contract.INSTANCE} says which one it is, for what only one may do"
)


def require_instances(stack: Stack, state: dict[str, Any]) -> None:
    """Raise Failure for a router whose version knows one process only."""
    if not state.get("instances"):
        raise Failure(
            f"{stack.names.router} is of an earlier version, without instances: run"
            " `pulse-railway ensure`"
        )


def size_warning(
    count: int, vcpus: float | None = None, memory_gb: float | None = None
) -> str | None:
    """Return a warning of more processes than there are cores or memory for, by the limits of the
    service, or else by Railway's plans; None if they fit."""
    needed = count * PROCESS_MB / 1000
    if vcpus or memory_gb:
        is_small = count > (vcpus or count) or needed > (memory_gb or needed)
        limits = [f"{vcpus:g} vCPU"] if vcpus else []
        limits += [f"{memory_gb:g} GB"] if memory_gb else []
        given = f"the service is limited to {' and '.join(limits)}"
    else:
        small = [
            f"{plan} {size} vCPU and {size} GB" for plan, size in PLANS.items() if count > size
        ]
        is_small, given = bool(small), f"Railway's plans give one service: {', '.join(small)}"
    if not is_small or count == 1:
        return None
    return (
        f"{count} instances keep {count} cores busy and take about {needed:.1f} GB without users;"
        f" {given}"
    )


def as_recorded(address: str, count: int) -> dict[str, Any]:
    """Return the fields of a record about further processes; none for one process."""
    if count == 1:
        return {}
    return {"instances": runtime_image.load("router").instances_at(address, count)}
