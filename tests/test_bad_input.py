"""Bad input: one clear line on stderr, status 1, nothing created, no traceback."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import demo
from pulse_railway import options, provenance, router_commands, runtime_image
from pulse_railway.config import ControlRoute, Names, Target
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.railway import ssh
from pulse_railway.stack import Stack
from tests.conftest import ROOT, Project, pulse_railway

control: Any = runtime_image.load("control")
TINY = ROOT / "tests" / "apps" / "tiny"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A copy of the tiny app, to be broken."""
    folder = tmp_path / "app"
    shutil.copytree(TINY, folder)
    return folder


def fails(stage: demo.Stage, *arguments: str, cwd: Path, **env: str) -> str:
    """Run a verb that must fail; its one line, after seeing that nothing was created."""
    before = set(stage.services())
    verb = pulse_railway(*arguments, env={**stage.env, **env}, cwd=cwd)
    assert verb.code == 1, verb.err
    assert verb.out == ""
    assert set(stage.services()) == before
    return verb.error


def test_no_token(railway: demo.Stage, app: Path) -> None:
    env = {k: v for k, v in railway.env.items() if k != "RAILWAY_API_TOKEN"} | {"HOME": str(app)}
    verb = pulse_railway("ensure", "main.py", env=env, cwd=app)
    assert verb.code == 1
    assert "RAILWAY_API_TOKEN" in verb.error
    assert "railway login" in verb.error


def test_a_token_that_is_not_accepted(railway: demo.Stage, app: Path) -> None:
    line = fails(railway, "ensure", "main.py", cwd=app, RAILWAY_API_TOKEN="nonsense-token")
    assert "Not Authorized" in line or "not found" in line
    assert "nonsense-token" not in line


def test_unknown_names(railway: demo.Stage, app: Path) -> None:
    line = fails(railway, "ensure", "main.py", "--project", "pulse-locl", cwd=app)
    assert "no project is named pulse-locl" in line
    assert "did you mean pulse-local?" in line
    project = railway.env["RAILWAY_PROJECT_ID"]
    line = fails(
        railway, "ensure", "main.py", "--project-id", project, "--environment", "staging", cwd=app
    )
    assert "no environment is named staging; there are: production" in line
    line = fails(
        railway, "ensure", "main.py", "--project", "pulse-local", "--environment-id", "0", cwd=app
    )
    assert "the project has no environment with id 0" in line
    line = fails(railway, "ensure", "main.py", "--project-id", "0", cwd=app)
    assert "not found" in line.lower()
    line = fails(railway, "ensure", "main.py", "--project", "x", "--workspace", "nope", cwd=app)
    assert "no workspace is named nope" in line


def test_names_and_ids_are_not_mixed(railway: demo.Stage, app: Path) -> None:
    line = fails(railway, "ensure", "main.py", "--project", "a", "--project-id", "b", cwd=app)
    assert "not both" in line


def test_apps_that_cannot_be_deployed(railway: demo.Stage, app: Path) -> None:
    source = (app / "main.py").read_text()
    cases = {
        "no RailwayPlugin": source.replace("plugins=[plugin]", "plugins=[]"),
        "2 RailwayPlugins": source.replace("plugins=[plugin]", "plugins=[plugin, RailwayPlugin()]"),
        "which Dockerfile": source.replace('dockerfile="Dockerfile",', ""),
        "no Dockerfile at": source.replace('"Dockerfile"', '"Missing"'),
        "outside the deploy context": source.replace('"Dockerfile"', '"../../Dockerfile"'),
        "no web root at": source.replace(
            "app = ps.App(", "app = ps.App(codegen=ps.CodegenConfig(web_dir='nowhere'),"
        ),
        "cannot be loaded": "import nonsense_that_is_not_installed\n",
        "service prefix 'much-too-long-'": source.replace(
            "RailwayPlugin(", "RailwayPlugin(service_prefix='much-too-long',"
        ),
    }
    for expected, text in cases.items():
        assert text != source, expected
        (app / "main.py").write_text(text)
        line = fails(railway, "deploy", "main.py", cwd=app)
        assert expected in line, (expected, line)
    (app / "main.py").write_text(source)
    assert "no app at" in fails(railway, "deploy", "elsewhere.py", cwd=app)
    line = fails(railway, "deploy", cwd=app)
    assert line.startswith("error: which app? pass --app path/to/main.py")
    assert line.endswith("there are: main.py")
    assert "must be relative" in fails(railway, "deploy", str(app / "main.py"), cwd=app)
    # outside the context, by its path or by a link
    other = app.parent / "other"
    other.mkdir()
    (other / "main.py").write_text(source)
    (app / "link.py").symlink_to(other / "main.py")
    for outside in ("../other/main.py", "link.py"):
        for verb in ("deploy", "ensure", "init"):
            said = fails(railway, verb, "--app", outside, cwd=app)
            assert "main.py is outside the deploy context" in said


def test_values_that_do_not_fit(railway: demo.Stage, app: Path) -> None:
    for arguments, expected in (
        (["deploy", "main.py", "--deployment-id", "Not_An_Id"], "deployment id"),
        (["deploy", "main.py", "--deployment-id", "a" * 25], "1 to 24"),
        (["deploy", "main.py", "--env", "NOVALUE"], "--env takes KEY=VALUE"),
        (["deploy", "main.py", "--env", "PORT=1"], "pulse-railway manages it"),
        (["deploy", "main.py", "--build-arg", "PORT=1"], "pulse-railway manages it"),
        (["deploy", "main.py", "--backend-replicas", "none"], "whole number"),
        (["deploy", "main.py", "--no-gitignore", "--image-repository", "r/x"], "source deploys"),
        (["ensure", "main.py", "--drain-ttl-seconds", "-1"], "whole number"),
        (["ensure", "main.py", "--janitor-cron-schedule", "* * * * *"], "*/5"),
        (["ensure", "main.py", "--janitor-cron-schedule", "often"], "five fields"),
        (["ensure", "main.py", "--redis-url", "http://x"], "redis://"),
        (["deploy", "main.py", "--service-prefix", "far-too-long"], "8 characters"),
        (["deploy", "main.py", "--service-prefix", "---"], "no letter or digit"),
        (["deploy", "main.py", "--deployment-name", "///"], "no letter or digit"),
        (["deploy", "main.py", "--context", "nowhere"], "is not a folder: pass --context"),
        (["deploy", "main.py", "--web-root", "/web"], "must be relative to the deploy context"),
        (["deploy", "main.py", "--canary", "much"], "--canary takes a number from 0 to 100"),
        (["deploy", "main.py", "--canary", "nan"], "--canary takes a number from 0 to 100"),
        (["status", "--control", "telnet"], "--control takes ssh or job, not 'telnet'"),
        (["status", "--token", "two words"], "--token is no token"),
        (["maintenance", "on", "--page", "none.html"], "--page takes an HTML file"),
        (["remove", "--deployment-name", "a" * 60 + "/"], "no baseline"),
        (["redeploy", "--service", "n" * 33], "32"),
    ):
        assert expected in fails(railway, *arguments, cwd=app), arguments


def test_no_baseline(railway: demo.Stage, app: Path) -> None:
    assert "ensure" in fails(railway, "deploy", "main.py", cwd=app)
    for verb in ("redeploy", "rollback"):
        assert "no baseline" in fails(railway, verb, cwd=app)


def test_programs_that_are_missing(railway: demo.Stage, app: Path) -> None:
    line = fails(railway, "deploy", "main.py", cwd=app, PATH="/usr/bin:/bin")
    assert "`railway` is not on PATH" in line
    path = f"{railway.root / 'bin'}{os.pathsep}{app}"
    line = fails(railway, "deploy", "main.py", "--image-repository", "r/x", cwd=app, PATH=path)
    assert "`docker` is not on PATH" in line


def test_a_baseline_without_deployments(new_project: Callable[[], Project]) -> None:
    """What there is nothing to be done with says so, and what to run."""
    project = new_project()
    project.ok("ensure", "main.py")
    for words, said in (
        (["logs"], "no deployment is active: pass --deployment-id or --service"),
        (["logs", "--service", "nope"], "no service is named nope; there are: "),
        (["logs", "--service", "pulse-env"], "pulse-env has no deployment yet"),
        (["restore"], "there are no deployments to restore: run `pulse-railway deploy`"),
        (["rollback"], "no earlier deployment to go back to runs any more"),
        (["redeploy"], "no deployment is active"),
        (["promote", "--deployment-id", "x"], "x"),
        (["delete", "--deployment-id", "x"], "x"),
        (["remove", "--deployment-name", "prod"], "prod"),
    ):
        verb = project.run(*words)
        assert (verb.code, said in verb.error) == (1, True), (words, verb.error)
    status = project.run("status")
    assert status.code == 0
    assert "no deployments: run `pulse-railway deploy`" in status.out


@pytest.mark.parametrize(("typed", "code"), [("n\n", 1), ("\n", 1), ("yes\n", 0)])
def test_a_terminal_is_asked_before_something_goes(
    typed: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pulse_railway.errors import Failure
    from pulse_railway.verbs import confirm

    there, here = pty.openpty()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stdin", os.fdopen(here, "r"))
    os.write(there, typed.encode())
    if code:
        with pytest.raises(Failure, match="not done"):
            confirm("delete deployment x?", yes=False)
    else:
        confirm("delete deployment x?", yes=False)
    confirm("delete deployment x?", yes=True)
    sys.stdin.close()
    os.close(there)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (b"", "is empty: leave --page out for the router's own page"),
        (b" \n", "is empty"),
        ("<p>später</p>".encode("utf-16"), "is no UTF-8 text: save it as UTF-8"),
        ("<p>later</p>".encode("utf-16-le"), "is no UTF-8 text"),
        ("<p>später</p>".encode("latin-1"), "is no UTF-8 text"),
        (b"<p>\0</p>", "is no UTF-8 text"),
        (b"x" * 25_000, "is larger than 24 KB"),
    ],
)
def test_a_maintenance_page_that_cannot_be_sent(tmp_path: Path, page: bytes, said: str) -> None:
    """It was sent, and it was not known whether the command ran; or visitors got other letters."""
    path = tmp_path / "page.html"
    path.write_bytes(page)
    with pytest.raises(Failure, match=said):
        options.parse_maintenance({"switch": "on", "page": str(path)}, Output())
    path.write_bytes("\ufeff- später".encode())
    assert options.parse_maintenance({"switch": "on", "page": str(path)}, Output()).page == (
        "- später"
    )


def test_values_that_begin_with_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--message=-fix` was read as a flag by the router: "it is not known whether"."""
    sent: list[Any] = []

    def by_ssh(_: Any, __: Any, words: list[str]) -> ssh.Outcome:
        sent.append(control.control_parser().parse_args(words))
        answer = {"ok": True, "command": words[0], "nonce": sent[-1].nonce}
        return ssh.Outcome(json.dumps(answer), "", False)

    monkeypatch.setattr(router_commands, "by_ssh", by_ssh)
    monkeypatch.setattr(provenance, "by", lambda: "-u@host")
    api: Any = None
    stack = Stack(Target("p", "e", ControlRoute("ssh", checked=True)), Names(), {})
    why, page = "-fix", "--page of ours"
    router_commands.send_promote(api, stack, "a", "a", why=why, unlock="-u", renew="-r@9")
    router_commands.send_abort_canary(api, stack, "a", why)
    router_commands.send_maintenance(api, stack, True, page, 30, why)
    router_commands.send_lock(api, stack, "-holder", 60)
    assert [args.why for args in sent] == [why, why, why, None]
    assert {args.by for args in sent} == {"-u@host"}
    assert (sent[0].unlock, sent[0].renew, sent[2].page) == ("-u", ("-r", 9.0), page)
    assert sent[3].holder == "-holder"
    router_commands.send_abort_canary(api, stack, "a", "a\0b" + "x" * 200_000)
    assert sent[-1].why == "a b" + "x" * 297


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (
            b"pulse_railway:\n  yes: true\n",
            1,
            "reads a key there as true: put it in quotes",
        ),
        (b"pulse_railway:\n  1: x\n", 1, "reads a key there as 1: put it in quotes"),
        (b"yes\n", 1, "invoke.yaml has to be `name: value` lines"),
        (b"a: [\n", 1, "invoke.yaml is no YAML: line 2, column 1"),
        ("a: b\n".encode("utf-16"), 1, "invoke.yaml is no UTF-8 text: save it as UTF-8"),
        (
            b"pulse_railway:\n  lock_wiat: 1\n",
            0,
            "has no setting 'lock_wiat'; did you mean lock_wait?",
        ),
        (b"pulse_railway:\n  zzz: 1\n  'yes': true\n", 0, "has no setting 'zzz'\n"),
        (b"\xef\xbb\xbfpulse_railway:\r\n  app: main.py\r\n", 0, ""),
        (b"", 0, ""),
    ],
)
def test_an_invoke_yaml_that_does_not_fit(app: Path, text: bytes, code: int, says: str) -> None:
    (app / "invoke.yaml").write_bytes(text)
    verb = pulse_railway("init", "main.py", env=dict(os.environ), cwd=app)
    assert verb.code == code, verb.err
    assert says in verb.err
    assert "Traceback" not in verb.err
    assert verb.err.count("warning: invoke.yaml") == (code == 0 and bool(says))


def test_a_dotenv_that_is_no_text(app: Path) -> None:
    (app / ".env").write_bytes("A=1\n".encode("utf-16"))
    verb = pulse_railway("init", "main.py", env=dict(os.environ), cwd=app)
    assert (verb.code, verb.error) == (1, "error: .env is no UTF-8 text: save it as UTF-8")
