"""The published pulse-railway 0.3.13, in an environment of its own, on the local Railway."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks import environment

VERSION = "0.3.13"

# 0.3.13 has a fixed API address, which this changes in its process; nothing else is changed.
LAUNCHER = """\
import os, sys
import pulse_railway.constants as c
c.RAILWAY_API_ENDPOINT = os.environ["PULSE_RAILWAY_API_URL"]
import pulse_railway.railway.client as client
client.RAILWAY_API_ENDPOINT = c.RAILWAY_API_ENDPOINT
client.RailwayGraphQLClient.__init__.__kwdefaults__["endpoint"] = c.RAILWAY_API_ENDPOINT
from pulse_railway.cli import main
main()
"""


def python() -> Path:
    """Return the Python that has 0.3.13; the first call installs it."""
    return environment.python(f"pulse-railway-{VERSION}", f"pulse-railway=={VERSION}")


def command() -> list[str]:
    """Return 0.3.13's command, to which a verb and flags are added."""
    launcher = python().parent.parent / "launch.py"
    launcher.write_text(LAUNCHER)
    return [str(python()), str(launcher)]


def home_with_key(railway: Path) -> str:
    """Return a home folder with an SSH key that a local Railway knows.

    0.3.13 has no flag for a key: `railway ssh` finds it.
    """
    home = railway / "home"
    if not home.exists():
        (home / ".ssh").mkdir(parents=True)
        for path in (railway / "ssh").glob("id_ed25519*"):
            shutil.copy(path, home / ".ssh")
    return str(home)


def provide_images(railway: Path) -> None:
    """Define the published runtime images for a local Railway, which cannot pull images.

    They run 0.3.13's package, with the start commands that 0.3.13 sets.
    """
    home = str(python().parent)
    names = ("pulse-railway-router", "pulse-railway-janitor")
    (railway / "images.json").write_text(json.dumps({name: {"path": [home]} for name in names}))


def write_app(source: Path, folder: Path) -> Path:
    """Copy the tests' tiny app, changed so that both versions can deploy it.

    The copy is a real Pulse app, since 0.3.13 sets the start command itself.
    """
    shutil.copytree(source, folder)
    text = (folder / "main.py").read_text()
    for old, new in (
        ('    start_command="python backend.py",\n', ""),
        (
            "from pulse_railway import RailwayPlugin, internal_server_address",
            "from pulse_railway.plugin import RailwayPlugin",
        ),
        ("    internal_server_address=internal_server_address(),\n", ""),
        ("    session_store=ps.InMemorySessionStore(),\n", ""),
        (
            "app = ps.App(",
            "import os\n\napp = ps.App(\n"
            "    server_address=os.environ.get('PULSE_SERVER_ADDRESS'),\n"
            "    session_store=ps.CookieSessionStore(secret='x' * 32),",
        ),
    ):
        assert old in text, old
        text = text.replace(old, new)
    (folder / "main.py").write_text(text)
    return folder
