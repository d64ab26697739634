"""Stands in for React's server where an app's React build is missing.

    python placeholder.py pulse run main.py ...

Runs that command with `--server-only`, and a server beside it that answers every page with one
sentence. RAILWAY_LOCAL_REACT_DELAY: seconds until that server listens, since React's may be slow to
start; `never` if it shall not.
"""

import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!doctype html><p>The local Railway does not build React: a page would be here.</p>\n"


class PlaceholderPage(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asset = self.path.startswith("/assets/")
        body = b"" if asset else PAGE
        self.send_response(404 if asset else 200)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def serve_page(sock: socket.socket, parent: int) -> None:
    """Serve until the parent process has ended."""
    delay = os.environ.get("RAILWAY_LOCAL_REACT_DELAY") or "0"
    if delay == "never":
        return
    time.sleep(float(delay))
    sock.listen(64)
    server = ThreadingHTTPServer(sock.getsockname(), PlaceholderPage, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    server.timeout = 1.0
    while os.getppid() == parent:
        server.handle_request()


def main(command: list[str]) -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    parent = os.getpid()
    if os.fork() == 0:
        serve_page(sock, parent)
        os._exit(0)
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    os.execvp(command[0], [*command, "--server-only", "--react-server-address", address])


if __name__ == "__main__":
    main(sys.argv[1:])
