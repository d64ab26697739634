"""`init` and `doctor` for a new app. tests/test_first_deploy.py follows the docs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from invoke.vendor import yaml

from pulse_railway.flows import init
from tests.conftest import Project

APP = """
import pulse as ps
{imports}

@ps.component
def home():
    return ps.div()["Hello"]


app = ps.App(routes=[ps.Route("/", render=home)]{more})
"""
WITH_PLUGIN = {
    "imports": "import os\nfrom pulse_railway import RailwayPlugin, RailwaySessionStore,"
    " internal_server_address",
    "more": ', plugins=[RailwayPlugin(dockerfile="Dockerfile")],'
    " session_store=RailwaySessionStore(),"
    ' server_address=os.environ.get("PULSE_SERVER_ADDRESS"),'
    " internal_server_address=internal_server_address()",
}


def test_from_an_empty_folder_to_a_second_deploy(
    new_project: Callable[[], Project], tmp_path: Path
) -> None:
    project, folder = new_project(), tmp_path / "shop"
    folder.mkdir()
    (folder / "main.py").write_text(APP.format(imports="", more=""))

    railway_file = tmp_path / ".railway" / "railway.ts"  # in the app's parent folder
    railway_file.parent.mkdir()
    railway_file.write_text("")
    first = project.run("init", "--json", cwd=folder)
    assert first.code == 0, first.err
    assert "the next `railway config apply` deletes" in " ".join(first.err.split())
    railway_file.unlink()
    assert first.json["app"] == "main.py"
    assert sorted(first.json["written"]) == sorted(
        (
            *("Dockerfile", "requirements.txt", ".dockerignore", ".railwayignore", "invoke.yaml"),
            *(".env.example", ".github/workflows/deploy.yml", "tasks.py"),
        )
    )
    assert "give the app in main.py the plugin" in first.json["todo"][0]
    assert "pulse-railway's own repository" not in (folder / "Dockerfile").read_text()
    yaml.safe_load((folder / ".github/workflows/deploy.yml").read_text())

    (folder / "main.py").write_text(APP.format(**WITH_PLUGIN))
    web = folder / "web"
    web.mkdir()
    framework = (folder / "requirements.txt").read_text().split("==")[1].split()[0]
    package = {"dependencies": {"pulse-ui-client": framework}}
    (web / "package.json").write_text(json.dumps(package))
    (web / "package-lock.json").write_text("{}")

    examined = project.run("doctor", "--json", cwd=folder)
    assert examined.code == 1
    checks = {check["name"]: check for check in examined.json["checks"]}
    assert checks["the baseline"]["verdict"] == "bad"
    assert "run `pulse-railway ensure` first" in checks["the baseline"]["said"]
    assert checks["the router"]["verdict"] == "skipped"
    assert checks["React's packages"]["verdict"] == "good"
    assert "not in order: the baseline" in examined.json["error"]

    with_address = (folder / "main.py").read_text()
    (folder / "main.py").write_text(
        with_address.replace(' server_address=os.environ.get("PULSE_SERVER_ADDRESS"),', "")
    )
    without = project.run("deploy", cwd=folder)
    assert "the app has no server_address" in without.error
    (folder / "main.py").write_text(with_address)

    ensured = project.run("ensure", cwd=folder)  # the app is in invoke.yaml now
    assert ensured.code == 0, ensured.err
    healthy = project.run("doctor", cwd=folder)
    assert healthy.code == 0, healthy.out + healthy.err
    assert "✓ the router: answers" in healthy.out
    for _ in range(2):
        deployed = project.run("deploy", "--json", cwd=folder)
        assert deployed.code == 0, deployed.err
        assert project.active == deployed.json["deployment_id"]
    assert len(project.records) == 2

    again = project.run("init", "--json", cwd=folder)
    assert again.json["written"] == []
    assert again.json["todo"][0].startswith("put a Railway token")
    package["dependencies"]["pulse-ui-client"] = "0.0.1"
    (web / "package.json").write_text(json.dumps(package))
    (folder / ".env").write_text("X=1\n")
    (folder / ".railwayignore").unlink()
    faulty = project.run("doctor", cwd=folder)
    assert faulty.code == 1
    assert "pulse-ui-client is 0.0.1" in faulty.out
    assert "! its files and settings: the upload holds .env" in faulty.out


def test_what_is_left_to_do_names_the_script_of_the_pages(tmp_path: Path) -> None:
    root = tmp_path / "web" / "app" / "root.tsx"
    root.parent.mkdir(parents=True)
    (tmp_path / "web" / "package.json").write_text("{}")
    root.write_text("<head />")
    tag = '<script src="/_pulse/railway/affinity.js" />'
    step = f"put {tag} first into the <head> of web/app/root.tsx"
    assert step in init.todo("main.py", "", tmp_path)
    root.with_name("document.tsx").write_text(f"<head>{tag}</head>")
    assert step not in init.todo("main.py", "", tmp_path)


@pytest.mark.parametrize("files", [{}, {"a.py": "ps.App()", "b.py": "app = ps.App()"}])
def test_which_app(files: dict[str, str], tmp_path: Path) -> None:
    from pulse_railway.errors import Failure
    from pulse_railway.flows.init import find_app

    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(Failure, match="which app"):
        find_app(None, tmp_path)
    with pytest.raises(Failure, match="no app at"):
        find_app("c.py", tmp_path)
