"""What a build copies out of its context."""

from __future__ import annotations

from pathlib import Path

import pytest

from pulse_railway.build_context import missing_sources
from tests.conftest import ROOT, TINY

EXAMPLE = ROOT / "examples" / "railway"


@pytest.mark.parametrize(
    ("dockerfile", "missing"),
    [
        ("COPY . .", []),
        ("COPY main.py web ./", []),
        ("COPY ./web/ /app/web", []),
        ("COPY main.py nothing.txt ./", ["nothing.txt"]),
        ('COPY ["main.py", "no such file", "./"]', ["no such file"]),
        ("ADD --chown=1:1 nothing.txt ./", ["nothing.txt"]),
        ("ADD https://host/file git@host:repo /x/", []),
        ("COPY --from=web /venv /venv", []),
        ("COPY no*.txt ./", []),
        ("COPY ../main.py /main.py web/../main.py ./", []),
        ("COPY secret.env ./", ["secret.env"]),
        ("ARG WHERE=web\nCOPY $WHERE ${WHERE}/package.json ./", ["web/package.json"]),
        ("ARG WHERE\nCOPY ${WHERE:-web} ./", []),
        ("ARG GIVEN=web\nCOPY ${GIVEN} ./", ["given"]),
        ("ARG GIVEN\nFROM a\nARG GIVEN\nCOPY ${GIVEN} ./", ["given"]),
        ("ARG A=web\nFROM a\nARG A\nENV B=$A/x C=1\nCOPY $B ./", ["web/x"]),
        ("ENV A web\nCOPY $A ./", []),
    ],
)
def test_sources_that_a_build_lacks(tmp_path: Path, dockerfile: str, missing: list[str]) -> None:
    (tmp_path / "web").mkdir()
    for name in ("main.py", "secret.env"):
        (tmp_path / name).write_text("")
    (tmp_path / ".dockerignore").write_text("*.env\n")
    path = tmp_path / "Dockerfile"
    path.write_text(f"FROM python\n{dockerfile}\n")
    assert missing_sources(tmp_path, path, {"GIVEN": "given"}) == missing


def test_the_dockerfiles_here_lack_nothing() -> None:
    assert missing_sources(EXAMPLE, EXAMPLE / "Dockerfile", {}) == []
    web = {"PULSE_WEB_ROOT": "examples/railway/web"}
    assert missing_sources(ROOT, EXAMPLE / "Dockerfile", web) == []
    assert missing_sources(ROOT, ROOT / "Dockerfile.router", {}) == []
    assert missing_sources(TINY, TINY / "Dockerfile", {}) == []
