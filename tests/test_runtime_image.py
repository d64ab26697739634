"""What the runtime image holds, installed from its own lock; no Docker here could build it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks import environment
from pulse_railway import runtime_image
from pulse_railway.local.supervisor import free_port
from tests.conftest import ROOT, Process, Redis
from tests.net import ask

DOCKERFILE = ROOT / "Dockerfile.router"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The environment that Dockerfile.router makes, and its /app, which cannot be written."""
    python = environment.runtime()
    app = tmp_path_factory.mktemp("app")
    for name in runtime_image.SCRIPTS:
        shutil.copy(ROOT / name, app)
    subprocess.run([str(python), "-m", "compileall", "-q", str(app)], check=True)
    return python, app


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `pulse-railway` of the image, as Dockerfile.router writes it."""
    found = re.search(r"(printf '.*') > /venv/bin/pulse-railway", DOCKERFILE.read_text())
    assert found
    path = tmp_path_factory.mktemp("bin") / "pulse-railway"
    path.write_bytes(subprocess.run(["sh", "-c", found[1]], capture_output=True, check=True).stdout)
    path.chmod(0o755)
    return path


def test_the_version_covers_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> str:
        runtime_image.runtime_version.cache_clear()
        return runtime_image.runtime_version()

    before = version()
    assert runtime_image.load("router").runtime_version() == before  # what a router says it runs
    for name in runtime_image.FILES:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(runtime_image, "sources", lambda: tmp_path)
    assert version() == before
    with (tmp_path / "runtime.lock").open("a") as file:
        file.write("# another\n")
    assert version() != before
    runtime_image.runtime_version.cache_clear()


def test_the_licences_of_what_ships_are_listed(image: tuple[Path, Path]) -> None:
    ask = (
        "import importlib.metadata as m, json; print(json.dumps({d.name: "
        "d.metadata.get('License-Expression') or d.metadata.get('License')"
        " for d in m.distributions()}))"
    )
    said = subprocess.run([image[0], "-c", ask], capture_output=True, text=True, check=True)
    metadata = {k.lower().replace("_", "-"): v for k, v in json.loads(said.stdout).items()}
    text = (ROOT / "docs/what-ships.md").read_text().split("## Licences")[1]
    listed = dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", text, re.M))
    shipped = re.findall(r"^([a-z0-9-]+)==", (ROOT / "runtime.lock").read_text(), re.M)
    assert listed == {name: metadata[name] for name in shipped}


def test_the_router_starts_on_it(image: tuple[Path, Path], redis_server: Redis) -> None:
    python, app = image
    redis_server.deployment("a", "http://127.0.0.1:9")
    port = free_port()
    env = {"REDIS_URL": redis_server.url, "PORT": str(port), "HOST": "127.0.0.1"}
    env |= {"PYTHONPATH": str(app), "PYTHONDONTWRITEBYTECODE": "1"}
    began = time.monotonic()
    router = Process([str(python), "-m", "router"], port, env).wait()
    try:
        while ask(port, "/healthz").status != 200:
            time.sleep(0.01)
        assert time.monotonic() - began < 3  # the machine is shared
        command = [str(python), "-m", "control", "active", "--nonce", "n"]
        began = time.monotonic()
        done = subprocess.run(
            command,
            env={**os.environ, **env, "RAILWAY_SERVICE_ID": "x"},
            capture_output=True,
            text=True,
        )
        assert time.monotonic() - began < 3
        assert json.loads(done.stdout)["deployment_id"] == "a"
    finally:
        router.stop()


def test_the_janitor_starts_on_it(image: tuple[Path, Path]) -> None:
    python, app = image
    env = {"PYTHONPATH": str(app), "PATH": "/usr/bin:/bin"}
    command = [str(python), "-m", "janitor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, "inside the janitor service" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["control", "active"], "run this inside the router service"),
        (["janitor", "run"], "run this inside the janitor service"),
        ([], "set REDIS_URL, or PULSE_KV_KIND=sqlite"),
    ],
)
def test_its_pulse_railway_runs_the_three(
    image: tuple[Path, Path], wrapper: Path, words: list[str], says: str
) -> None:
    """What `railway ssh` and the start commands call."""
    python, app = image
    env = {"PYTHONPATH": str(app), "PATH": f"{python.parent}:/usr/bin:/bin"}
    done = subprocess.run([wrapper, *words], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(says)
