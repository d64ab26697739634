"""A real process that answers what pulse-railway asks of a backend, and starts in no time."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SESSIONS = Path(os.environ.get("TINY_SESSIONS", "sessions"))  # how many it claims to hold

if message := os.environ.get("TINY_FAILS"):
    raise RuntimeError(message)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        answer = {"path": path, "deployment_id": os.environ["PULSE_DEPLOYMENT_ID"]}
        status = 200
        if path.startswith("/_pulse/internal/"):
            given = self.headers.get("x-pulse-railway-internal-token")
            if given != os.environ["PULSE_RAILWAY_INTERNAL_TOKEN"]:
                status = 403
            count = int(SESSIONS.read_text()) if SESSIONS.exists() else 0
            answer |= {"render_session_count": count, "reloaded_socket_count": count}
            if self.command == "POST" and SESSIONS.exists():  # its tabs are told to reload
                SESSIONS.with_suffix(".told").touch()
        elif path == "/_pulse/meta" and not os.environ.get("TINY_OLD"):
            number = self.server.server_address[1] - PORT + 1
            answer |= {"instance": number, "instances": INSTANCES}
        elif path == "/environment":
            answer = dict(os.environ)
        elif path == "/work" and os.environ.get("TINY_BROKEN"):
            status = 500
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


PORT, INSTANCES = int(os.environ["PORT"]), int(os.environ.get("PULSE_RAILWAY_INSTANCES", "1"))
for number in range(2, INSTANCES + 1):
    further = ThreadingHTTPServer(("0.0.0.0", PORT + number - 1), Handler)
    threading.Thread(target=further.serve_forever, daemon=True).start()
ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()
