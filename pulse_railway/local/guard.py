"""Keeps other users of the machine, and other websites, out of the local Railway.

Its folder is for its owner alone. `/local/*` needs a key that is in this folder: `key.header` is a
line for `curl -H @key.header`, `page.html` opens the page with the key. A browser gets the key in
the fragment of the page's address, which it sends to nobody, and the path of a file in its
arguments, which every user of the machine can read.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pulse_railway.errors import Failure

KEY_HEADER = "x-local-railway-key"
KEY_FILE = "key.header"
PAGE_FILE = "page.html"
REDIRECT = '<!doctype html><title>Local Railway</title><script>location.replace("{}")</script>\n'


def make_private(root: Path) -> None:
    """Make the folder `root`, or take the one that is there, with access for its owner alone.

    Raises Failure if it belongs to another user, who could read and change all that is in it.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Failure(f"{root} is no folder: choose another with --dir") from None
    found = root.stat()
    if found.st_uid != os.geteuid():
        raise Failure(f"{root} belongs to another user: choose a folder of your own with --dir")
    if found.st_mode & 0o077:
        root.chmod(0o700)
    for name in (".gitignore", ".railwayignore"):  # an app's commit and upload leave it out
        if not (root / name).exists():
            (root / name).write_text("*\n")


def key_header(root: Path) -> dict[str, str]:
    """Return the header that `/local/*` needs; its key is made on first use."""
    path = root / KEY_FILE
    if not path.exists():
        write_private(path, f"{KEY_HEADER}: {secrets.token_urlsafe(32)}\n")
    name, _, value = path.read_text().strip().partition(": ")
    return {name: value}


def write_page(root: Path, url: str) -> None:
    """Write the file that opens the page with its key."""
    key = key_header(root)[KEY_HEADER]
    write_private(root / PAGE_FILE, REDIRECT.format(f"{url}/#{key}"))


def write_private(path: Path, text: str) -> None:
    """Write a file for its owner alone, which is there with all its text or not at all."""
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w") as file:
        file.write(text)
    temporary.replace(path)


class Guard:
    """ASGI middleware: refuses what is not its owner's, before anything of it is read.

    A request with an Origin must have this server's own, any path. `/local/*` needs the key, and
    its orders are JSON: no other website can send either without a preflight, which is refused.
    """

    def __init__(self, app: ASGIApp, root: Path) -> None:
        self.app = app
        self.key = key_header(root)[KEY_HEADER].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = "frame-ancestors 'none'"
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, send_unframed)

    def refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers.get('host')}":
            return JSONResponse({"message": "this is another website's request"}, 403)
        if not scope["path"].startswith("/local/"):
            return None
        if not hmac.compare_digest(headers.get(KEY_HEADER, "").encode("latin-1"), self.key):
            message = f"this needs the header that is in {KEY_FILE} of the local Railway's folder"
            return JSONResponse({"message": message}, 403)
        is_json = headers.get("content-type", "").partition(";")[0].strip() == "application/json"
        if scope["method"] == "POST" and not is_json:
            return JSONResponse({"message": "the content type is to be application/json"}, 415)
        return None
