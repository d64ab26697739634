"""Deploy Pulse apps on Railway so that no user notices.

An app imports `RailwayPlugin`, `RailwaySessionStore` and `internal_server_address` from here, a
project's task file imports `pulse_railway.tasks`. These names are loaded on first use, so that a
command line which only lists the verbs does not load Pulse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pulse_railway.app.plugin import RailwayPlugin, RailwayPluginError, internal_server_address
    from pulse_railway.app.session import RailwayRedisSessionStore, RailwaySessionStore

__version__ = "0.4.0"
__all__ = [
    "RailwayPlugin",
    "RailwayPluginError",
    "RailwayRedisSessionStore",
    "RailwaySessionStore",
    "__version__",
    "internal_server_address",
]


def __getattr__(name: str) -> Any:
    if name in ("RailwayPlugin", "RailwayPluginError", "internal_server_address"):
        from pulse_railway.app import plugin

        return getattr(plugin, name)
    if name in ("RailwaySessionStore", "RailwayRedisSessionStore"):
        from pulse_railway.app import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
