"""Resolves the private network's names in Python processes on the local Railway.

On Railway `<service>.railway.internal` resolves at run time, and each service has a port space of
its own. Here all services share one machine: a service's name and declared port resolve to the
loopback port that it listens on. The file RAILWAY_LOCAL_HOSTS maps one to the other.
"""

import contextlib
import json
import os
import random
import socket

_system_getaddrinfo = socket.getaddrinfo


def _local_address(host, port):  # type: ignore[no-untyped-def]
    """Return the host and port for a name of the private network; others are unchanged."""
    name = host.decode() if isinstance(host, bytes) else host
    if not isinstance(name, str) or not name.endswith(".railway.internal"):
        return host, port
    with open(os.environ["RAILWAY_LOCAL_HOSTS"]) as file:
        hosts = json.load(file)
    ports = hosts.get(name)
    if ports is None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    address = "::1" if hosts.get("ipv6") else "127.0.0.1"
    if str(port) not in ports:
        return address, 9  # discard: nothing listens on an undeclared port
    first = min(ports.values())  # of a container's ports, which are one behind another
    replica = random.choice(hosts.get("replicas", {}).get(name) or [first])
    return address, replica + ports[str(port)] - first


def _getaddrinfo(host, port, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _system_getaddrinfo(*_local_address(host, port), *args, **kwargs)


def _patch_uvloop():  # type: ignore[no-untyped-def]
    """Patch uvloop too: it resolves names without `socket`."""
    import uvloop

    system = uvloop.Loop.create_connection

    def create_connection(self, factory, host=None, port=None, **kwargs):  # type: ignore[no-untyped-def]
        return system(self, factory, *_local_address(host, port), **kwargs)

    uvloop.Loop.create_connection = create_connection


if "RAILWAY_LOCAL_HOSTS" in os.environ:
    socket.getaddrinfo = _getaddrinfo
    with contextlib.suppress(ImportError):
        _patch_uvloop()
