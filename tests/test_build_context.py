"""What a build copies out of its context."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_railway.build_context import ignored, missing_sources, secrets_in_image
from pulse_railway.errors import Failure
from pulse_railway.railway import upload
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
        ("COPY bin/${TARGETARCH}/x $FROM_THE_BASE_IMAGE/y ./", []),
        ("COPY\tnothing.txt\t./", ["nothing.txt"]),
        ("copy main.py \\\n  # a comment\n\n  nothing.txt ./", ["nothing.txt"]),
        ("COPY <<EOF /x\nCOPY nothing.txt ./\nEOF\nCOPY gone ./", ["gone"]),
        ("RUN <<-'EOF' cat\nCOPY nothing.txt ./\n\tEOF\nCOPY gone ./", ["gone"]),
        ("COPY it's.txt ./", ["it's.txt"]),
        ('COPY ["main.py", "gone" ./', ["gone"]),
        ("RUN --mount=type=bind,source=gone,target=/x --mount=type=cache,target=/y a", ["gone"]),
        ("RUN --mount=source=main.py,target=/x --mount=from=a,source=gone,target=/y a", []),
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


def test_a_file_that_was_made_on_windows(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("")
    (tmp_path / "b c").write_text("")
    path = tmp_path / "Dockerfile"
    text = "# escape=`\nFROM a\nCOPY `\n  main.py b` c gone.txt ./\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / ".dockerignore").write_bytes(b"\xef\xbb\xbfmain.py\r\n")
    assert missing_sources(tmp_path, path, {}) == ["main.py", "gone.txt"]


@pytest.mark.parametrize(
    ("dockerignore", "says"),
    [
        (b"a\n!\n", "line 2 of .*ignore is a lone !, which Docker refuses: delete it"),
        (b"x[z-a]\n", "line 1 of .*ignore has a pattern that Docker refuses: x"),
        ("a\n".encode("utf-16"), "ignore is no UTF-8 text: save it as UTF-8"),
    ],
)
def test_an_ignore_file_that_docker_refuses(tmp_path: Path, dockerignore: bytes, says: str) -> None:
    (tmp_path / "Dockerfile").write_text("FROM a\nCOPY . .\n")
    (tmp_path / ".dockerignore").write_bytes(dockerignore)
    with pytest.raises(Failure, match=says):
        missing_sources(tmp_path, tmp_path / "Dockerfile", {})


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("node_modules", ["node_modules/x"]),
        ("**/node_modules", ["node_modules/x", "web/node_modules/x"]),
        ("/web/../a[bc].txt", ["ab.txt"]),
        ("a\\*b", ["a*b"]),
        ("web/", ["web/node_modules/x"]),
    ],
)
def test_patterns_of_dockerignore(tmp_path: Path, pattern: str, left_out: list[str]) -> None:
    (tmp_path / ".dockerignore").write_text(f"{pattern}\n")
    ignore = ignored(tmp_path, tmp_path / "Dockerfile")
    paths = ["node_modules/x", "web/node_modules/x", "ab.txt", "a*b", "axb"]
    assert [path for path in paths if ignore(path)] == left_out


def test_the_dockerfiles_here_lack_nothing() -> None:
    assert missing_sources(EXAMPLE, EXAMPLE / "Dockerfile", {}) == []
    web = {"PULSE_WEB_ROOT": "examples/railway/web"}
    assert missing_sources(ROOT, EXAMPLE / "Dockerfile", web) == []
    assert missing_sources(ROOT, ROOT / "Dockerfile.router", {}) == []
    assert missing_sources(TINY, TINY / "Dockerfile", {}) == []


TOKENS = (
    *("FROM a", "COPY", "ADD", "RUN", "ARG", "ENV", "--from=x", "--mount=type=bind,source=m,x"),
    *(
        " ",
        "\t",
        "\n",
        "\r\n",
        "\\\n",
        "`",
        "# escape=`\n",
        "#",
        "<<EOF",
        "<<-'E F'",
        "EOF",
        "\ufeff",
    ),
    *(
        '"',
        "'",
        "[",
        "]",
        "[z-a]",
        "{",
        "}",
        "$",
        "${A:-b",
        "*",
        "**",
        "?",
        "!",
        "..",
        "/",
        "é",
        "=",
    ),
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(TOKENS), max_size=14).map("".join),
    st.lists(st.sampled_from(TOKENS), max_size=6).map("".join),
)
def test_any_text_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, dockerfile: str, ignore: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-text"
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_bytes(dockerfile.encode())
    (folder / ".dockerignore").write_bytes(ignore.encode())
    (folder / ".gitignore").write_bytes(ignore.encode())
    upload._patterns.cache_clear()
    upload.left_out(folder, Path("a/b"))
    with contextlib.suppress(Failure):
        missing_sources(folder, folder / "Dockerfile", {"A": "x"})
        secrets_in_image(folder, folder / "Dockerfile")
