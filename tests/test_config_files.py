"""Railway's own configuration files beside an app."""

from __future__ import annotations

from pathlib import Path

import pytest

from pulse_railway.railway import config_files


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("railway.ts", "export default defineRailway(", 'export const partial = "site"'),
        ("railway.ts", '// export const partial = "x"\n', 'export const partial = "site"'),
        ("railway.ts", 'export const partial = "x"\n', None),
        ("railway.py", "@define_railway\n", 'PARTIAL = "site"'),
        ("railway.py", 'import x\nPARTIAL = "api"\n', None),
        ("railway.go", "package main\n", "a partial's name"),
        ("railway.go", 'const Partial = "api"\n', None),
    ],
)
def test_a_file_that_owns_the_project(
    tmp_path: Path, name: str, text: str, line: str | None
) -> None:
    """Also in a folder above the context, as the CLI finds it."""
    context = tmp_path / "services" / "shop"
    (tmp_path / ".railway").mkdir()
    context.mkdir(parents=True)
    (tmp_path / ".railway" / name).write_text(text)
    said = config_files.would_delete(context)
    assert (said is None) if line is None else (said and said.endswith(line))
    nearer = context / ".railway" / "railway.py"  # the CLI takes the nearest
    nearer.parent.mkdir()
    nearer.write_text('PARTIAL = "site"\n')
    assert config_files.would_delete(context) is None


def test_config_as_code_is_read_for_none_of_these_services(tmp_path: Path) -> None:
    assert config_files.without_effect(tmp_path) is None
    (tmp_path / "railway.json").write_text("{}")
    said = config_files.without_effect(tmp_path)
    assert said
    assert said.startswith("railway.json has no effect")
