"""The smallest app that can be deployed. What runs is backend.py, since it starts at once."""

import pulse as ps

from pulse_railway import RailwayPlugin, internal_server_address


@ps.component
def home():
    return ps.div()["tiny"]


plugin = RailwayPlugin(
    dockerfile="Dockerfile",
    start_command="python backend.py",
)

app = ps.App(
    routes=[ps.Route("/", render=home)],
    plugins=[plugin],
    session_store=ps.InMemorySessionStore(),
    internal_server_address=internal_server_address(),
)
