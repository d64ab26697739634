"""Every sentence that was asked for has a test that exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
from pathlib import Path

import pytest

from pulse_railway import options
from pulse_railway.errors import Failure
from pulse_railway.flows.backend_settings import Hosting
from pulse_railway.output import Output
from tests.conftest import ROOT, TINY
from tests.requirements import SENTENCES

TEXT = Path(os.environ.get("REQUIREMENTS") or ROOT.parent / "shared" / "requirements.md")


def numbers(said: str) -> list[int]:
    """`1-3 9` is 1, 2, 3, 9."""
    found: list[int] = []
    for part in said.split():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def sentences(text: str) -> dict[str, int]:
    """How many each section has: items and sentences, without the blocks of commands."""
    section, found = "", {}
    for paragraph in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.S)):
        if paragraph.strip().startswith("#"):
            section = paragraph.strip("# \n")
            found[section] = 0
            continue
        for item in re.split(r"\n(?=- )", paragraph.strip()):
            parts = re.split(r"(?<=[.:])\s+(?=[A-Z`])", " ".join(item.lstrip("- ").split()))
            found[section] += len([part for part in parts if part])
    return found


def test_each_names_tests_that_exist() -> None:
    known: dict[str, set[str]] = {}
    for rows in SENTENCES.values():
        for _, says, tests in rows:
            assert tests, says
            for test in tests:
                file, _, name = test.partition("::")
                if file not in known:
                    tree = ast.parse((ROOT / "tests" / file).read_text())
                    known[file] = {getattr(node, "name", "") for node in tree.body}
                assert name in known[file], test


@pytest.mark.skipif(not TEXT.exists(), reason="the text is not at hand")
def test_none_is_left_out() -> None:
    there = sentences(TEXT.read_text())
    assert sum(there.values()) > 90
    for section, count in there.items():
        covered = [n for said, _, _ in SENTENCES[section] for n in numbers(said)]
        assert sorted(covered) == list(range(1, count + 1)), section


def flags(**given: object) -> dict[str, object]:
    return {"app": "main.py", "context": str(TINY), "ssh_key": None, **given}


def test_where_a_name_comes_from(tmp_path: Path) -> None:
    """--deployment-name, then the plugin's, then prod."""
    text = (TINY / "main.py").read_text()
    named = text.replace("RailwayPlugin(\n", "RailwayPlugin(\n    deployment_name='shop',\n")
    (tmp_path / "main.py").write_text(text)
    (tmp_path / "named.py").write_text(named)
    shutil.copy(TINY / "Dockerfile", tmp_path)
    (tmp_path / "web").mkdir()

    def name(app: str, **given: object) -> str:
        wanted = flags(app=app, context=str(tmp_path), **given)
        return options.parse_deploy(wanted, Output()).deployment_name

    assert name("main.py") == "prod"
    assert name("named.py") == "shop"
    assert name("named.py", deployment_name="flag") == "flag"


def test_one_backend_replica() -> None:
    assert Hosting().settings()["numReplicas"] == 1
    with pytest.raises(Failure, match="--instances 3 runs as many processes in one container"):
        options.parse_deploy(flags(backend_replicas="3"), Output())
