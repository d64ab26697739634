"""The private network's names, for Python processes on the local Railway.

On Railway `<service>.railway.internal` resolves at run time and each service has a port space of
its own. Here all share one machine: a name and the port it declares resolve to the loopback port
that the service really listens on. RAILWAY_LOCAL_HOSTS names the file that says which.
"""

import contextlib
import json
import os
import socket

_system_getaddrinfo = socket.getaddrinfo


def _real(host, port):  # type: ignore[no-untyped-def]
    """Where a name of the private network is; any other host and port as they are."""
    name = host.decode() if isinstance(host, bytes) else host
    if not isinstance(name, str) or not name.endswith(".railway.internal"):
        return host, port
    with open(os.environ["RAILWAY_LOCAL_HOSTS"]) as file:
        hosts = json.load(file)
    ports = hosts.get(name)
    if ports is None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    address = "::1" if hosts.get("ipv6") else "127.0.0.1"
    return address, ports.get(str(port), 9)  # nobody listens on a port nobody declared


def _getaddrinfo(host, port, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _system_getaddrinfo(*_real(host, port), *args, **kwargs)


def _patch_uvloop():  # type: ignore[no-untyped-def]
    """uvloop resolves names by itself."""
    import uvloop

    system = uvloop.Loop.create_connection

    def create_connection(self, factory, host=None, port=None, **kwargs):  # type: ignore[no-untyped-def]
        return system(self, factory, *_real(host, port), **kwargs)

    uvloop.Loop.create_connection = create_connection


if "RAILWAY_LOCAL_HOSTS" in os.environ:
    socket.getaddrinfo = _getaddrinfo
    with contextlib.suppress(ImportError):
        _patch_uvloop()
