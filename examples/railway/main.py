"""A Pulse app behind pulse-railway: a counter on the server, another in the session.

`/` is Pulse's own page, and needs a build of React (see README.md). `/probe` is served by Python
alone, and implements Pulse's protocol itself: it shows which deployment serves the tab.
"""

from __future__ import annotations

import os
from pathlib import Path

import pulse as ps
from fastapi.responses import HTMLResponse

from pulse_railway import RailwayPlugin, RailwaySessionStore, internal_server_address


class Counter(ps.State):
    """The tab's state: it is on the server, in this deployment, while the tab is open."""

    count: int = 0

    def increment(self) -> None:
        self.count += 1
        session = ps.session()  # stored in Redis, for all deployments
        session["count"] = session.get("count", 0) + 1


@ps.component
def home():
    with ps.init():
        counter = Counter()
    return ps.div()[
        ps.h1()[f"Deployment {os.environ.get('PULSE_DEPLOYMENT_ID', 'none')}"],
        ps.p()[f"This tab has counted to {counter.count}."],
        ps.p()[f"This session has counted to {ps.session().get('count', 0)}."],
        ps.p()[os.environ.get("GREETING", "Set GREETING on pulse-env to greet.")],
        ps.button(onClick=counter.increment)["Count"],
    ]


app = ps.App(
    routes=[ps.Route("/", render=home)],
    plugins=[RailwayPlugin(dockerfile="examples/railway/Dockerfile")],
    session_store=RailwaySessionStore(),
    server_address=os.environ.get("PULSE_SERVER_ADDRESS"),
    internal_server_address=internal_server_address(),
    session_timeout=float(os.environ.get("SESSION_TIMEOUT", "60")),
)


@app.fastapi.get("/probe", include_in_schema=False)
def probe() -> HTMLResponse:
    return HTMLResponse(Path(__file__).with_name("probe.html").read_text())


@app.fastapi.get("/greeting", include_in_schema=False)
def greeting() -> dict[str, str | None]:
    return {"greeting": os.environ.get("GREETING")}
