"""What Docker would be given passes a linter; there is no daemon here to build it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

# dockerfile-utils, a linter that knows every instruction and flag of BuildKit's Dockerfiles
LINTER = ROOT / ".venv" / "node_modules" / ".bin" / "dockerfile-utils"
DOCKERFILES = ["Dockerfile.router", "examples/railway/Dockerfile"]


@pytest.mark.skipif(not LINTER.exists() or not shutil.which("node"), reason="npm is not installed")
def test_dockerfiles_pass_a_linter(tmp_path: Path) -> None:
    for name in DOCKERFILES:
        done = subprocess.run([LINTER, "lint", ROOT / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM scratch\nCPY a b\n")
    done = subprocess.run([LINTER, "lint", bad], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CPY" in done.stdout
