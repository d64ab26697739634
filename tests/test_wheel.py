"""What users install: a wheel, in an environment and a folder of its own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT


def test_the_wheel_carries_all_that_it_needs(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, stderr=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "runtime/router.py",
        "runtime/control.py",
        "runtime/janitor.py",
        "runtime/Dockerfile.router",
        "runtime/runtime.lock",
        "local/schema.graphql",
        "local/bin/pulse",
        "local/page.html",
        "app/affinity.js",
        "app/ssr.cjs",
        "local/site/sitecustomize.py",
        "py.typed",
    ):
        assert f"pulse_railway/{name}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]

    # unpacked in a folder without the repository, with the libraries of this environment
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    env = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    where = run("-c", "import pulse_railway.runtime_image as r; print(r.__file__, r.sources())")
    assert where.stdout.split() == [
        str(site / "pulse_railway" / "runtime_image.py"),
        str(site / "pulse_railway" / "runtime"),
    ]
    listed = run("-m", "pulse_railway", "--list")
    assert listed.returncode == 0, listed.stderr
    assert "deploy" in listed.stdout
    refused = run("-m", "pulse_railway", "control", "active")
    assert "run this inside the router service" in refused.stderr
