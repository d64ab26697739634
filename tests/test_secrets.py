"""No output holds a secret, in any form in which it could get there."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse_railway import build_context, errors
from tests.conftest import ROOT, TINY, pulse_railway, zygote

TOKEN = "p4ss/w+rd=\"x&y'z\\q"
ODD = {
    "a line break behind it": "s3cret-token-value\n",
    "line breaks around it": "\r\n  s3cret-token-value \r\n",
    "a line break in it": "s3cret-token\n-value-more",
    "quotes": TOKEN,
    "no ASCII": "s3cret-tökén-value",
    "a null": "s3cret-token\x7f-value",
}


def forms(secret: str) -> set[str]:
    """Written anew, not errors._forms: the test would agree with whatever that leaves out."""
    lines = [x for x in (secret, *map(str.strip, secret.splitlines())) if len(x) >= 6]
    found = set()
    for text in lines:
        found |= {text, repr(text)[1:-1], json.dumps(text)[1:-1], urllib.parse.quote(text, safe="")}
        encoded = base64.b64encode(text.encode()).decode()  # the last letter can hold more
        found.add(encoded.rstrip("=")[:-1] if encoded.endswith("=") else encoded)
    return {text for text in found if len(text.strip()) >= 6}


@pytest.mark.parametrize("variable", ["RAILWAY_API_TOKEN", "RAILWAY_TOKEN", "--token"])
@pytest.mark.parametrize("odd", ODD)
def test_no_verb_shows_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, odd: str
) -> None:
    token = ODD[odd]
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PULSE_RAILWAY_API_URL": "http://127.0.0.1:9/graphql/v2",
    }
    monkeypatch.setattr(sys, "argv", ["x"])
    flag = []
    if variable == "--token":
        flag = [f"--token={token}"]
    else:
        env[variable] = token
    for verb in (["status"], ["logs"], ["delete", "--deployment-id", "x"]):
        quick = ["-c", QUICK, *verb, "--project", "p", *flag]
        done = zygote().run("python", quick, env, TINY, 60)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error: ") == 1
        for form in forms(token):
            assert form not in done.stdout + done.stderr, form


# a Railway that is not there is asked five times, with pauses: not here
QUICK = """
import sys
from pulse_railway.railway import api
api.FIRST_PAUSE = 0
from pulse_railway.cli import main
main(sys.argv[1:])
"""


@given(st.text(min_size=8).filter(lambda t: len(t.strip()) >= 8 and "*" not in t), st.data())
def test_every_form_is_redacted(secret: str, data: st.DataObject) -> None:
    if any(0xD800 <= ord(c) < 0xE000 for c in secret):
        return
    errors._secrets.clear()
    try:
        errors.keep_secret(secret)
        form = data.draw(st.sampled_from(sorted(forms(secret.strip()))))
        if form in (secret, secret.strip()) or len(form) >= 8:
            around = f"before {form} after"
            assert form not in errors.redact(around)
    finally:
        errors._secrets.clear()


def test_a_secret_inside_base64_is_found() -> None:
    errors.keep_secret("s3cret-token-value")
    for before in ("", "x", "xy", "user:"):
        encoded = base64.b64encode(f"{before}s3cret-token-value:more".encode()).decode()
        shown = errors.redact(encoded)
        left = shown.split("***")
        assert len(left) == 2
        for part in left:  # what is left of it decodes to at most the secret's first or last letter
            for skip in range(4):
                text = base64.b64decode(part[skip:][: len(part[skip:]) // 4 * 4] + "====")
                assert b"s3c" not in text
                assert b"value" not in text


def test_an_unexpected_failure_shows_no_secret(tmp_path: Path) -> None:
    program = (
        "from pulse_railway import errors, verbs\n"
        "errors.keep_secret('s3cret-token-value')\n"
        "def fails(*_): raise RuntimeError('with s3cret-token-value')\n"
        "verbs.run_verb(fails, 'parse_image', {'repository': 'r'})\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "s3cret" not in done.stdout + done.stderr
    assert "***" in done.stderr


# -- images ------------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> Path:
    root = tmp_path / "app"
    shutil.copytree(TINY, root)
    (root / ".env").write_text("RAILWAY_TOKEN=x")
    (root / ".env.example").write_text("RAILWAY_TOKEN=")
    (root / ".git").mkdir()
    (root / ".venv").mkdir()
    (root / "keys").mkdir()
    (root / "keys" / "id_rsa").write_text("x")
    return root


def exposed(root: Path, dockerfile: str, ignore: str | None = None) -> list[str]:
    (root / "Dockerfile").write_text(dockerfile)
    if ignore is not None:
        (root / ".dockerignore").write_text(ignore)
    return build_context.secrets_in_image(root, root / "Dockerfile")


def test_what_a_dockerfile_would_take_in(app: Path) -> None:
    everything = [".env", ".git", ".venv", "keys/id_rsa"]
    assert exposed(app, "FROM a\nCOPY . .\n") == everything
    assert exposed(app, 'FROM a\nADD --chown=1:1 ["./", "/app/"]\n') == everything
    assert exposed(app, "FROM a\nCOPY main.py web ./\n") == []
    assert exposed(app, "FROM a\nCOPY keys /keys\n") == ["keys/id_rsa"]
    assert exposed(app, "FROM a\nCOPY --from=b . .\n") == []
    assert exposed(app, "FROM a\nCOPY . .\n", ".env\n.git\n.venv\n**/id_rsa\n") == []
    assert exposed(app, "FROM a\nCOPY . .\n", "*\n!main.py\n!.env\n") == [".env"]
    (app / "Dockerfile.dockerignore").write_text("**\n")
    assert exposed(app, "FROM a\nCOPY . .\n") == []


def test_image_mode_refuses_such_a_context(app: Path, tmp_path: Path) -> None:
    for name in ("railway", "docker"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    verb = pulse_railway("deploy", "main.py", "--image-repository", "r/i", env=env, cwd=app)
    assert verb.code == 1
    assert "would hold .env, .git, .venv, keys/id_rsa" in verb.error
    assert ".dockerignore" in verb.error


def test_the_example_leaves_them_out(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "examples", root / "examples", ignore=shutil.ignore_patterns("node_m*"))
    (root / ".env").write_text("RAILWAY_TOKEN=x")
    (root / ".git").mkdir()
    (root / ".venv").mkdir()
    (root / "examples" / "railway" / ".env").write_text("x")
    assert build_context.secrets_in_image(root, root / "examples" / "railway" / "Dockerfile") == []
