"""The story of the README: two deploys of a real Pulse app, and nobody notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import demo


@pytest.mark.story
def test_two_deploys_of_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By ssh; `invoke demo --job` plays it by the janitor's way."""
    root = tmp_path.resolve()
    demo.story(root)
    seen = capsys.readouterr().out
    assert "DID NOT SEE" not in seen
    assert seen.count("saw:") == 21
    assert demo.processes_of(root) == []
