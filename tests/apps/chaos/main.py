"""A real Pulse app that answers what the chaos run's clients ask, as light.py does, and has tabs:
a counter on the server and another in the session."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator

import pulse as ps
from fastapi import Request, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse

from pulse_railway import RailwayPlugin, RailwaySessionStore

NAME = os.environ.get("PULSE_DEPLOYMENT_ID", "none")
INSTANCE = os.environ.get("PULSE_RAILWAY_INSTANCE", "1")
PROCESS = NAME if INSTANCE == "1" else f"{NAME}.{INSTANCE}"


class Counter(ps.State):
    count: int = 0

    def increment(self) -> None:
        self.count += 1
        session = ps.session()
        session["count"] = session.get("count", 0) + 1


@ps.component
def home():
    with ps.init():
        counter = Counter()
    return ps.div()[
        ps.h1()[f"Deployment {NAME}"],
        ps.p()[f"This tab has counted to {counter.count}."],
        ps.p()[f"This session has counted to {ps.session().get('count', 0)}."],
        ps.p()[""],
        ps.button(onClick=counter.increment)["Count"],
    ]


app = ps.App(
    routes=[ps.Route("/", render=home)],
    plugins=[RailwayPlugin()],
    session_store=RailwaySessionStore(),
    cookie=ps.Cookie("pulse.sid", secure=False),
    session_timeout=5.0,
)


@app.fastapi.get("/page")
def page() -> HTMLResponse:
    return HTMLResponse(f"<p>page of {NAME}")


@app.fastapi.get("/assets/{name}")
def asset(name: str) -> PlainTextResponse:
    there = name == f"{NAME}.js"
    return PlainTextResponse(f"// {NAME}" if there else "not here", 200 if there else 404)


@app.fastapi.get("/work")
def work() -> dict[str, str]:
    return {"deployment_id": NAME, "process": PROCESS}


@app.fastapi.post("/upload")
async def upload(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{NAME} {hashlib.sha256(await request.body()).hexdigest()}")


@app.fastapi.get("/stream")
async def stream() -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        for number in range(20):
            yield f"{NAME} {number}\n"
            await asyncio.sleep(0.1)

    return StreamingResponse(parts())


@app.fastapi.websocket("/ws")
async def talk(socket: WebSocket) -> None:
    await socket.accept()
    try:
        while True:
            await socket.send_text(f"{PROCESS} {await socket.receive_text()}")
    except WebSocketDisconnect:
        pass
