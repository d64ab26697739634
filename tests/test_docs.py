"""The docs: built without a warning, and held to the code."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from docs import reference
from pulse_railway import help
from pulse_railway import tasks as railway
from pulse_railway.flags import FLAGS
from pulse_railway.runtime_image import SCRIPTS
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```(?:sh|make|yaml|text)?\n.*?^```$|^    \S.*?$|`[^`\n]+`", re.S | re.M)
COMMAND = re.compile(r"(?:^|[`\s(/])(pulse-railway|invoke) ([a-z][a-z-]*)([^`\n#|]*)", re.M)
SOURCES = [
    *sorted((ROOT / "pulse_railway").glob("*.py")),
    *sorted((ROOT / "pulse_railway" / "flows").glob("*.py")),
    *sorted((ROOT / "pulse_railway" / "railway").glob("*.py")),
    *(ROOT / name for name in SCRIPTS),
]
# read by somebody else, or no variable at all
NOT_OURS = {
    "PULSE_ENV",  # Pulse's, while the app is loaded
    "PULSE_APP_DIR",
    "RAILWAY_RUNTIME",  # a constant's name
    "RAILWAY_REPLICA_ID",  # Railway's own, which say where we are
    "RAILWAY_PRIVATE_DOMAIN",
    "RAILWAY_SERVICE_ID",
    "RAILWAY_SERVICE_NAME",
    "PULSE_RAILWAY_DEPLOYMENT_STATE",  # 0.3.x's, which nobody may set
    "PULSE_RAILWAY_DRAIN_STARTED_AT",
}


def test_the_reference_is_the_code_s() -> None:
    assert (ROOT / "docs/reference.md").read_text() == reference.page(), "run `invoke docs`"


def test_every_variable_is_in_the_reference() -> None:
    known = {
        name.strip()
        for table in reference.VARIABLES.values()
        for names in table
        for name in names.split(",")
    }
    pattern = re.compile(
        r"[\"'](PULSE_[A-Z_]*[A-Z]|OTEL_[A-Z_]+|RAILWAY_[A-Z_]+|REDIS_URL|HOST|PORT)[\"']"
    )
    read = {name for path in SOURCES for name in pattern.findall(path.read_text())}
    assert len(read) > 40
    assert read - known - NOT_OURS == set()


def test_every_verb_of_a_project_takes_the_way_to_its_router() -> None:
    """`ensure` asks it too, and without the flags it did so by the janitor."""
    project, key = FLAGS["project"], FLAGS["ssh_key"]
    verbs = [verb for verb in railway.ns.tasks if project in help.flags(verb)]
    assert len(verbs) > 10
    assert [verb for verb in verbs if key not in help.flags(verb)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    """Verbs and flags, wherever a page names them. What the pages' `sh` blocks say is run by
    tests/test_first_deploy.py."""
    code = "\n".join(CODE.findall(page.read_text()))
    for program, verb, rest in COMMAND.findall(code):
        if verb in ("serve", "janitor", "control", "help", "tasks"):
            continue
        if page.name == "messages.md" and verb not in tasks.ns.tasks:
            continue  # a sentence: `... which pulse-railway needs`
        if program == "pulse-railway":
            assert verb in railway.ns.tasks, f"{page.name}: {program} {verb}"
        else:
            assert verb in tasks.ns.tasks, f"{page.name}: {program} {verb}"
        said = rest.replace("…", "x").replace("...", "x").split("&&")[0].split("|")[0]
        try:
            words = shlex.split(said.split(";")[0].rstrip(").,:"))
        except ValueError:  # the end of a sentence
            continue
        ours = verb in railway.ns.tasks
        taken = {flag.option for flag in help.flags(verb)} if ours else set()
        for word in words:
            flag = word.split("=")[0].rstrip(".,)]")
            if flag.startswith("--") and taken and flag != "--help":
                assert flag in taken, f"{page.name}: {program} {verb} {flag}"


def test_every_flag_is_taken_by_a_verb() -> None:
    taken = {flag.name for verb in railway.ns.tasks for flag in help.flags(verb)}
    assert taken == set(FLAGS)


def defined(path: Path) -> set[str]:
    """What a file defines: constants, functions, classes, and methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name, body=body):
                names |= {name, *(f"{name}.{m}" for n in body if (m := getattr(n, "name", None)))}
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def test_what_contributing_points_to_exists() -> None:
    """Each place is `file` and the names behind it: `router.py` `affinity`."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    map_of_it = text[text.index("## Where is it?") :]
    questions = re.findall(r"^\| [A-Z].*\? \| (.*) \|$", map_of_it, re.M)
    assert len(questions) >= 20
    for place in questions:
        assert re.fullmatch(r"(`[\w/]+\.py`( `[\w.]+`)+(; )?)+", place), place
    for file, names in re.findall(r"`([\w/]+\.py)`((?:\s`[\w.]+`)*)", map_of_it):
        wanted = set(re.findall(r"`([\w.]+)`", names))
        assert wanted - defined(ROOT / file) == set(), file


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} <= pages
    for page in (tmp_path / "site").glob("*.html"):
        assert "<code>```" not in page.read_text()
        assert "<p>```" not in page.read_text(), f"{page.name} has a block that is none"


def test_links_of_what_is_outside_the_site() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_the_readme_s_table_names_every_module() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Working on it") :]
    modules = {p.stem for p in [*ROOT.glob("*.py"), *ROOT.glob("pulse_railway/**/*.py")]}
    unnamed = modules - {"__init__", "__main__", "sitecustomize"}
    assert {name for name in unnamed if not re.search(rf"`[^`]*\b{name}\b[^`]*`", table)} == set()
