"""The private network's names, for Python processes on the local Railway.

On Railway `<service>.railway.internal` resolves at run time and each service has a port space of
its own. Here all share one machine: a name and the port it declares resolve to the loopback port
that the service really listens on. RAILWAY_LOCAL_HOSTS names the file that says which.
"""

import json
import os
import socket

_system_getaddrinfo = socket.getaddrinfo


def _getaddrinfo(host, port, *args, **kwargs):  # type: ignore[no-untyped-def]
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name.endswith(".railway.internal"):
        with open(os.environ["RAILWAY_LOCAL_HOSTS"]) as file:
            ports = json.load(file).get(name)
        if ports is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        # A port that nobody declared is one that nobody listens on.
        host, port = "127.0.0.1", ports.get(str(port), 9)
    return _system_getaddrinfo(host, port, *args, **kwargs)


if "RAILWAY_LOCAL_HOSTS" in os.environ:
    socket.getaddrinfo = _getaddrinfo
