"""What Docker would be given passes a linter; there is no daemon here to build it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pulse_railway.flows import project_files, project_layout
from tests import projects
from tests.conftest import ROOT

# dockerfile-utils, a linter that knows every instruction and flag of BuildKit's Dockerfiles
LINTER = ROOT / ".venv" / "node_modules" / ".bin" / "dockerfile-utils"
DOCKERFILES = ["Dockerfile.router", "examples/railway/Dockerfile"]


@pytest.mark.skipif(not LINTER.exists() or not shutil.which("node"), reason="npm is not installed")
def test_dockerfiles_pass_a_linter(tmp_path: Path) -> None:
    paths = [ROOT / name for name in DOCKERFILES]
    for name in projects.LAYOUTS:
        layout = projects.make(name, tmp_path / name)
        paths.append(tmp_path / name / "Dockerfile")
        paths[-1].write_text(project_files.dockerfile(layout))
    for path in paths:
        done = subprocess.run([LINTER, "lint", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM scratch\nCPY a b\n")
    done = subprocess.run([LINTER, "lint", bad], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CPY" in done.stdout


def test_the_example_is_what_init_writes() -> None:
    """But for two lines for this repository, whose root is its second context."""
    folder = ROOT / "examples" / "railway"
    layout = project_layout.read_layout("main.py", folder, print)
    text = (folder / "Dockerfile").read_text()
    shared = re.sub(r"# Only in pulse-railway's own repository.*\nRUN .*\n", "", text)
    assert shared != text
    assert shared == project_files.dockerfile(layout, "${PULSE_WEB_ROOT}/../requirements.txt")
    ignore = (folder / "Dockerfile.dockerignore").read_text()
    assert ignore == project_files.dockerignore(layout)


def test_the_examples_locks_are_its_packages() -> None:
    folder = ROOT / "examples" / "railway"
    package = json.loads((folder / "web/package.json").read_text())
    lock = json.loads((folder / "web/package-lock.json").read_text())["packages"]
    for kind in ("dependencies", "devDependencies"):
        assert package[kind] == lock[""][kind]
        for name, version in package[kind].items():
            assert lock[f"node_modules/{name}"]["version"] == version
    pinned = (folder / "requirements.txt").read_text()
    assert f"pulse-framework=={package['dependencies']['pulse-ui-client']}" in pinned


@pytest.mark.skipif(not shutil.which("buildah"), reason="buildah is not installed")
def test_what_the_image_is_not_given(tmp_path: Path) -> None:
    """A real builder on the example's ignore file, with no base image, which cannot be had here."""
    context = tmp_path / "context"
    kept = ["main.py", "web/package.json", "web/app/root.tsx"]
    left = [".env", ".env.production", "deploy.pem", ".git/config", ".venv/bin/python"]
    left += ["web/node_modules/x/index.js", "web/.env", "web/__pycache__/x.pyc"]
    for name in (*kept, *left):
        path = context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    ignore = ROOT / "examples/railway/Dockerfile.dockerignore"
    (context / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (context / "Dockerfile.dockerignore").write_text(ignore.read_text())
    store = ["--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run")]
    store += ["--storage-driver", "vfs"]
    build = ["bud", "--isolation", "chroot", "-q", "-f", str(context / "Dockerfile")]

    def buildah(*args: str) -> str:
        command = ["buildah", *store, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    image = buildah(*build, str(context))
    root = Path(buildah("mount", buildah("from", image)))
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert set(kept) <= found
    assert not found & set(left)
