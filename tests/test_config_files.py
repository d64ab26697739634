"""Railway's own configuration files beside an app."""

from __future__ import annotations

import os
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
        ("railway.py", 'PARTIAL: str = "api"\n', None),
        ("railway.py", "partial = 'api'\n", None),  # the CLI takes it too
        ("railway.py", 'PARTIAL = ""\n', 'PARTIAL = "site"'),  # which the CLI takes for none
        ("railway.py", "PARTIAL = None\n", 'PARTIAL = "site"'),
        ("railway.ts", 'export const partial = " "\n', 'export const partial = "site"'),
        ("railway.ts", "export const PARTIAL: string = `x`\n", None),
        ("railway.go", "package main\n", 'const Partial = "site"'),
        ("railway.go", "// no partial\n", 'const Partial = "site"'),
        ("railway.go", 'const Partial = "api"\n', None),
        ("railway.go", 'const (\n\tPartial = "api"\n)\n', None),
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


def test_a_folder_that_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    """Not a deploy that is done, above all."""
    (tmp_path / ".railway").mkdir(mode=0)
    as_root = os.geteuid() == 0
    if as_root:  # who may read everything
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        assert config_files.would_delete(tmp_path) is None
    finally:
        if as_root:
            os.seteuid(0)
