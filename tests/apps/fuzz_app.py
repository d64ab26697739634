"""A backend of the fuzz job: says which requests it has received.

    python tests/apps/fuzz_app.py PORT h11|httptools

A request that the router meant has one `x-forwarded-proto`, which no client of the job sends.
`/unmeant` answers with the heads of all others.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvicorn

UNMEANT: list[str] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    length, more = 0, True
    while more:
        event = await receive()
        length, more = length + len(event.get("body", b"")), event.get("more_body", False)
    names = [name for name, _ in scope["headers"]]
    answer: Any = {"token": "", "length": length}
    for name, value in scope["headers"]:
        if name == b"x-token":
            answer["token"] = value.decode("latin-1")
    if scope["path"] == "/unmeant":
        answer = UNMEANT
    elif names.count(b"x-forwarded-proto") != 1:
        UNMEANT.append(f"{scope['method']} {scope['path']} {scope['headers']}")
    body = json.dumps(answer).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        http=sys.argv[2],
        lifespan="off",
        log_level="critical",
    )
