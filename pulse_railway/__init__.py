"""Deploy Pulse apps on Railway so that no user notices.

An app imports `RailwayPlugin`, `RailwaySessionStore` and `internal_server_address` from here; a
project's task file imports `pulse_railway.tasks`. Nothing is loaded before it is asked for: a
command line that only lists its verbs should not pay for Pulse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pulse_railway.plugin import RailwayPlugin, internal_server_address
    from pulse_railway.session import RailwaySessionStore

__version__ = "0.4.0"
__all__ = ["RailwayPlugin", "RailwaySessionStore", "__version__", "internal_server_address"]


def __getattr__(name: str) -> Any:
    if name in ("RailwayPlugin", "internal_server_address"):
        from pulse_railway import plugin

        return getattr(plugin, name)
    if name == "RailwaySessionStore":
        from pulse_railway.session import RailwaySessionStore

        return RailwaySessionStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
