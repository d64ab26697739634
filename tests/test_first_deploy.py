"""From an empty folder and the wheel to a second deploy, by the commands of the docs alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from examples import demo
from tests.conftest import ROOT, Project
from tests.net import eventually

# its first line may say, as a comment, which file it is or where it is typed
BLOCK = re.compile(r"^```(\w+)\n(?:# ([\w. ]+)\n)?(.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    kind: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / "docs" / page).read_text()
    return [Block(kind, title, body) for kind, title, body in BLOCK.findall(text)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel of this repository. Its dependencies are those of
    the environment that runs the tests, by a path: what `pip install` would bring."""
    folder = tmp_path_factory.mktemp("installed")
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], **quiet)  # type: ignore[call-overload]
    (wheel,) = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], **quiet)  # type: ignore[call-overload]
    python = venv / "bin" / "python"
    given = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *given], **quiet)  # type: ignore[call-overload]
    (site,) = venv.glob("lib/python*/site-packages")
    # a path that is added by a .pth file has its own .pth files, the editable one, ignored
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for name in ("invoke", "pulse"):
        script = venv / "bin" / name
        script.write_text(
            f"#!{python}\nimport re, sys\nfrom importlib.metadata import entry_points\n"
            f"(found,) = entry_points(group='console_scripts', name='{name}')\n"
            "sys.exit(found.load()())\n"
        )
        script.chmod(0o755)
    return venv / "bin"


@pytest.fixture
def newcomer(installed: Path, tmp_path: Path) -> Iterator[Newcomer]:
    one = Newcomer(installed, tmp_path / "shop")
    yield one
    one.end()


class Newcomer:
    """Somebody at a shell, in a folder with an app and its React project and nothing else."""

    def __init__(self, bin_folder: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "web").mkdir(parents=True)
        self.env = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "HOME": str(folder.parent),
            "LANG": "C.UTF-8",
        }
        self.shell = subprocess.Popen(
            ["bash", "-e"],
            cwd=folder,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.second: list[subprocess.Popen[bytes]] = []

    def follow(self, block: Block) -> str:
        """Do what a block says; returns what was seen."""
        if block.kind in ("python", "yaml", "make") and block.title:
            (self.folder / block.title).write_text(block.text)
        elif block.title == "in a second terminal":
            log = (self.folder.parent / "second").open("wb")
            command = ["bash", "-c", f"exec {block.text}"]
            self.second.append(
                subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log)
            )
            state = self.folder / ".local-railway" / "state.json"
            eventually(lambda: state.exists() and listens(state), 60)
        elif block.kind == "sh" and not block.text.startswith("pip install"):
            return self.run(block.text)
        return ""

    def run(self, text: str) -> str:
        assert self.shell.stdin
        assert self.shell.stdout
        block = self.folder.parent / "block.sh"  # which reads nothing of what comes after it
        block.write_text(text)
        self.shell.stdin.write(f". {block} </dev/null\necho; echo --done--\n")
        self.shell.stdin.flush()
        said = ""
        for line in self.shell.stdout:
            if line == "--done--\n":
                return said
            said += line
        raise AssertionError(f"this did not end well:\n{text}\n{said}")

    def end(self) -> None:
        assert self.shell.stdin
        assert self.shell.stdout
        self.shell.stdin.close()
        self.shell.wait(60)
        self.shell.stdout.close()
        for process in self.second:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        eventually(lambda: not demo.processes_of((self.folder / ".local-railway").resolve()), 20)


def listens(state: Path) -> bool:
    try:
        port = json.loads(state.read_text())["api_port"]
        return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    except (OSError, ValueError, KeyError, httpx.HTTPError, httpx.InvalidURL):
        return False


@pytest.mark.timeout(600)  # it has a whole project deployed five times
def test_what_the_pages_say(newcomer: Newcomer) -> None:
    (newcomer.folder / "main.py").write_text(
        "import pulse as ps\n\napp = ps.App(routes=[])\n"  # as it was before
    )
    pulse = subprocess.run(
        ["python", "-c", "import importlib.metadata as m; print(m.version('pulse-framework'))"],
        env=newcomer.env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    package = {"dependencies": {"pulse-ui-client": pulse}}
    (newcomer.folder / "web" / "package.json").write_text(json.dumps(package))
    lock = {"packages": {"": package}}
    (newcomer.folder / "web" / "package-lock.json").write_text(json.dumps(lock))

    where = newcomer.run("python -c 'import pulse_railway; print(pulse_railway.__file__)'")
    assert str(ROOT) not in where, "the wheel is not what runs"
    seen = "".join(newcomer.follow(block) for block in blocks("first-deploy.md"))
    assert "give the app in main.py the plugin" in seen
    assert "not in order: the baseline" in seen
    assert "✓ the router: answers" in seen
    assert re.search(r"^\S+ drains, \d+ sessions?$", seen, re.M)
    assert seen.count("is active at https://localhost:") == 2
    assert "the first" in seen
    deployed = re.findall(r"^(\S+) is active at", seen, re.M)
    status = json.loads(newcomer.run("pulse-railway status --json 2>/dev/null"))
    assert status["active"] == deployed[0], "rollback went back to the first"
    assert {row["deployment_id"] for row in status["deployments"]} == set(deployed)

    seen = "".join(newcomer.follow(block) for block in blocks("operating.md"))
    assert "cart-2 is up, the canary, for 10 % of new visitors" in seen
    assert f"{deployed[0]} is active" in seen
    if shutil.which("curl"):
        newcomer.follow(blocks("local-railway.md")[-1])

    seen = "".join(newcomer.follow(block) for block in blocks("tasks.md"))
    assert "testing" in seen
    released = re.findall(r"^released (\S+)$", seen, re.M)
    assert len(released) == 1
    assert '"planned": []' in seen or "no service needs a change" in seen
    made = json.loads((newcomer.folder / "deployment.json").read_text())
    assert made["active"] is True
    assert made["deployment_id"] not in (*deployed, *released)


def test_ensure_in_this_repository_needs_no_flag(new_project: Callable[[], Project]) -> None:
    """As the design card writes it: `invoke ensure`, with the app of invoke.yaml."""
    project = new_project()
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "ensure"],
        cwd=ROOT,
        env=project.env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "examples/railway/main.py" in done.stderr
    assert project.services >= {"pulse-router", "pulse-env", "pulse-redis", "pulse-janitor"}
