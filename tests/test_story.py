"""The story of the README: two deploys of a real Pulse app, and nobody notices."""

from __future__ import annotations

import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples import demo
from tests.conftest import ROOT, forking_stage, pulse_railway


@pytest.mark.story
def test_two_deploys_of_the_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ssh; `invoke demo --job` plays it by the janitor's way. Verbs and control commands that
    are started as they are for a user are in test_first_deploy."""
    monkeypatch.setattr(demo, "stage", forking_stage)
    monkeypatch.setattr(demo.Stage, "run", run)
    root = tmp_path.resolve()
    demo.story(root)
    seen = capsys.readouterr().out
    assert "DID NOT SEE" not in seen
    assert seen.count("saw:") == 21
    assert demo.processes_of(root) == []


STAY = """
import sys
from pathlib import Path
from examples import demo
from tests.conftest import forking_stage
from tests.test_story import run
demo.stage, demo.Stage.run = forking_stage, run
demo.stay(Path(sys.argv[1]))
"""


def run(stage: demo.Stage, *arguments: str) -> Any:
    """As demo.Stage.run, by a forked process."""
    verb = pulse_railway(*arguments, "--json", env=stage.env)
    assert verb.code == 0, verb.err
    return verb.json


@pytest.mark.story
def test_the_addresses_that_the_demo_prints_work(tmp_path: Path) -> None:
    """Also when it is started again: before, the app's was a 502 until it had come up."""
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", STAY, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout
        try:
            said = ""
            while "Ctrl-C ends it" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            file, app = re.findall(r"(?:file|https?)://[\w./:-]+", said)[:2]
            (page,) = set(
                re.findall(r"http://[\w.:]+", Path(file.removeprefix("file://")).read_text())
            )
            assert "Local Railway" in httpx.get(page).text
            trust = ssl.create_default_context(cafile=tmp_path / "ca-bundle.pem")
            with httpx.Client(verify=trust, trust_env=False) as client:
                assert client.get(app).status_code == 200
                assert client.get(f"{app}/probe").status_code == 200
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        assert not demo.processes_of(tmp_path.resolve())
