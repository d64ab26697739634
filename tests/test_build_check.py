"""What is checked of a build before there is one: its import of the app, and the lock files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pulse_railway import options
from pulse_railway.errors import Failure
from pulse_railway.flows import deploy, doctor
from pulse_railway.flows.build_check import check_import, lock_problems
from pulse_railway.options import DeployOptions
from pulse_railway.railway import docker
from tests import projects

APP = """\
import os
import dotenv
import pulse as ps
from pulse_railway import RailwayPlugin

dotenv.load_dotenv()
KEY = {read}
app = ps.App(plugins=[RailwayPlugin(dockerfile="Dockerfile")])
"""
DOCKERFILE = "FROM a\nCOPY . .\nRUN pulse generate main.py --ci\n"


def parse(folder: Path, **flags: object) -> DeployOptions:
    flags = {"app": "main.py", "context": str(folder), **flags}
    return options.parse_deploy(flags, doctor.Warnings())


def app(folder: Path, read: str, dockerfile: str = DOCKERFILE) -> Path:
    (folder / "web").mkdir()
    (folder / "main.py").write_text(APP.format(read=read))
    (folder / "Dockerfile").write_text(dockerfile)
    return folder / "Dockerfile"


def test_a_variable_that_the_build_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in .env here, which the app reads by itself."""
    app(tmp_path, 'os.environ["STRIPE_KEY"]')
    (tmp_path / ".env").write_text("STRIPE_KEY=sk_1\n")
    (tmp_path / ".railwayignore").write_text(".env\n")
    monkeypatch.setenv("STRIPE_KEY", "")  # put back after the test, since the app sets it
    monkeypatch.delenv("STRIPE_KEY")
    parsed = parse(tmp_path)
    assert "STRIPE_KEY" in parsed.app.variables
    with pytest.raises(Failure) as failed:
        deploy.check(parsed, doctor.Warnings())
    said = str(failed.value)
    assert "KeyError: 'STRIPE_KEY' (main.py, line 7). Read STRIPE_KEY when it is used" in said
    assert "name it in an ARG of Dockerfile and pass --build-arg NAME=..." in said
    assert "sk_1" not in said


@pytest.mark.parametrize(
    ("read", "dockerfile"),
    [
        ('os.environ["STRIPE_KEY"]', "FROM a\nCOPY . .\n"),  # it does not import the app
        ('os.environ["STRIPE_KEY"]', f"FROM a\nARG STRIPE_KEY\n{DOCKERFILE}"),
        ('os.environ["STRIPE_KEY"]', f"FROM a\nENV STRIPE_KEY=x\n{DOCKERFILE}"),
        ('os.environ["STRIPE_KEY"]', DOCKERFILE.replace("pulse gen", "STRIPE_KEY=x pulse gen")),
        ('os.environ["PATH"]', DOCKERFILE),
    ],
)
def test_without_a_second_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str, dockerfile: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was imported again")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setenv("STRIPE_KEY", "sk_1")
    path = app(tmp_path, read, dockerfile)
    check_import(parse(tmp_path), path, {})


def test_a_variable_that_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPE_KEY", "sk_1")
    dockerfile = app(tmp_path, 'os.environ.get("STRIPE_KEY")')
    parsed = parse(tmp_path)
    assert "STRIPE_KEY" in parsed.app.variables
    check_import(parsed, dockerfile, {})


def test_an_app_that_cannot_be_loaded_names_the_line(tmp_path: Path) -> None:
    app(tmp_path, 'os.environ["NOT_SET_ANYWHERE"]')
    with pytest.raises(Failure, match=r"loaded: KeyError: 'NOT_SET_ANYWHERE' \(main.py, line 7\)"):
        parse(tmp_path)


@pytest.mark.parametrize("name", projects.LAYOUTS)
def test_locks_that_fit_and_locks_that_do_not(name: str, tmp_path: Path) -> None:
    start = projects.write(name, tmp_path)
    layout = projects.make(name, tmp_path)
    parsed = parse(tmp_path, app=layout.app)
    assert lock_problems(parsed, layout.web_root) == []
    package = layout.web_root / "package.json"
    package.write_text(package.read_text().replace("^19.2.3", "^19.3.0"))
    project = start / "pyproject.toml"
    if project.exists():
        project.write_text(project.read_text().replace('"pulse-railway"]', '"Some_Lib[x]>=1"]'))
    problems = lock_problems(parsed, layout.web_root)
    assert "differs from package.json in react" in problems[-1]
    assert problems[-1].endswith(f"`{layout.node.tool} install` in {layout.node.folder}")
    if project.exists():
        assert problems[0] == f"{tmp_path / 'uv.lock'} lacks some-lib: `uv lock`"
    (layout.node.folder / str(layout.node.lock)).write_text("{}")
    assert "does not have" in lock_problems(parsed, layout.web_root)[-1]
    (layout.node.folder / str(layout.node.lock)).unlink()
    assert "has no lock file: `" in lock_problems(parsed, layout.web_root)[-1]


@pytest.mark.parametrize("status", [0, 1])
def test_docker_without_buildx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    script = tmp_path / "docker"
    script.write_text(f"#!/bin/sh\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if status:
        with pytest.raises(Failure, match="docker is here without buildx"):
            docker.need_buildx()
    else:
        docker.need_buildx()
