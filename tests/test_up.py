"""`railway up`: what it takes along, how it fails, what is checked before it."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import tarfile
import types
from pathlib import Path
from typing import Any

import pytest

from pulse_railway import errors, options
from pulse_railway.flows import deploy as deploying
from pulse_railway.flows import doctor
from pulse_railway.local import cli as local_cli
from pulse_railway.local import guard
from pulse_railway.railway import up as uploading
from pulse_railway.railway import upload
from tests.conftest import TINY, Project
from tests.test_ways import Cli, api, cli  # noqa: F401  # a fixture, and the CLI's stand-in

# -- how it fails ------------------------------------------------------------------------------


def up(context: Path) -> str | None:
    return uploading.up(api("account"), project="p", environment="e", service="s", context=context)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(uploading, "time", types.SimpleNamespace(sleep=slept.append))
    return slept


def test_an_error_is_read_from_its_json(
    cli: Cli,  # noqa: F811
    tmp_path: Path,
    pauses: list[float],
) -> None:
    said = {"error": "Project not found", "code": "NOT_FOUND", "hint": "Run `railway link`"}
    cli.says(json.dumps(said), "warning: a new version is available\n", 1)
    with pytest.raises(errors.Failure, match=r"Project not found \(Run `railway link`\)$"):
        up(tmp_path)
    cli.says(json.dumps({**said, "hint": None}), "", 1)
    with pytest.raises(errors.Failure, match=r"Project not found$"):
        up(tmp_path)
    cli.says("", "something else\n", 1)
    with pytest.raises(errors.Failure, match="something else"):
        up(tmp_path)
    assert pauses == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("error sending request for url (https://x)", [1, 5, 15]),
        ("You are being ratelimited. Try again in 7 seconds", [7, 7, 15]),
        ("You are being ratelimited. Try again in about 2 minutes", [120, 120, 120]),
        ("You are being ratelimited. Try again in about 60 minutes", []),
        ("Failed to upload code with status code 502", [1, 5, 15]),
        ("Failed to upload code. File too large (1 bytes)", []),
    ],
)
def test_what_may_pass_is_tried_again(
    cli: Cli,  # noqa: F811
    tmp_path: Path,
    pauses: list[float],
    error: str,
    expected: list[float],
) -> None:
    cli.says(json.dumps({"error": error, "code": "X", "hint": None}), "", 1)
    with pytest.raises(errors.Failure, match="failed"):
        up(tmp_path)
    assert pauses == expected


def test_what_an_old_cli_or_a_new_one_says(
    cli: Cli,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The deployment's id, from the last line that has one; before 4.24 there was no --json."""
    for said, expected in (
        ('{"deploymentId": "d-1"}', "d-1"),
        ('warning\n[]\n"x"\n{"deploymentId": "d-2"}\nnull\n', "d-2"),
        ('{"logsUrl": "https://x"}', None),
        ("", None),
    ):
        cli.says(said, "", 0)
        assert up(tmp_path) == expected
    script = cli.folder / "railway"
    first, version, *rest = script.read_text().splitlines()
    refuse = "echo \"error: unexpected argument '--json' found\" >&2; exit 2"
    old = f'case "$*" in *--json*) {refuse};; esac; echo "$@" >> {cli.folder}/old'
    script.write_text("\n".join([first, version, old, *rest, ""]))
    cli.says("uploaded\n", "", 0)
    assert up(tmp_path) is None
    assert "--json" not in (cli.folder / "old").read_text()


def test_a_large_upload_gets_its_time(
    cli: Cli,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = cli.folder / "railway"
    script.write_text('#!/bin/sh\necho "{\\"deploymentId\\": \\"$RAILWAY_HTTP_TIMEOUT\\"}"\n')
    assert up(tmp_path) == "1800"
    monkeypatch.setenv("RAILWAY_HTTP_TIMEOUT", "7")  # who has set it knows why
    assert up(tmp_path) == "7"


# -- what is taken along -----------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def left(root: Path, *names: str, **more: bool) -> list[str]:
    return [name for name in names if upload.left_out(root, Path(name), **more)]


def test_what_the_cli_leaves_out(tmp_path: Path) -> None:
    """By its source: `.gitignore` counts in a repository only, `.railwayignore` wins."""
    context = tree(
        tmp_path / "outer" / "context",
        {
            ".gitignore": ".env\nbuild/\n",
            ".railwayignore": "!build/keep\nsecret.txt\n",
            ".ignore": "*.log\n",
            ".env": "",
            "secret.txt": "",
            "a.log": "",
            "build/x": "",
            "web/.railwayignore": "!important.log\n*.map\n",
            "web/important.log": "",
            "web/x.map": "",
            "node_modules/x/y": "",
            "deep/node_modules/y": "",
            ".git-not": "",
        },
    )
    names = ".env secret.txt a.log build/x web/important.log web/x.map node_modules/x/y".split()
    names += ["deep/node_modules/y", ".git-not", "Dockerfile"]
    everywhere = ["secret.txt", "a.log", "web/x.map", "node_modules/x/y", "deep/node_modules/y"]
    assert left(context, *names) == everywhere
    subprocess.run(["git", "init", "-q", str(context)], check=True)
    assert left(context, *names) == [".env", *everywhere[:2], "build/x", *everywhere[2:]]
    assert left(context, *names, gitignore=False) == everywhere
    upload._patterns.cache_clear()
    (tmp_path / "outer" / ".ignore").write_text("Dockerfile\n")  # of a folder above
    (tmp_path / "outer" / ".gitignore").write_text("web\n")  # outside of the repository
    assert left(context, "Dockerfile", "web/x") == ["Dockerfile"]


def test_gits_rules_are_gits(tmp_path: Path) -> None:
    """Against `git check-ignore`, on many odd ignore files."""
    rng = random.Random(7)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    parts = ["a", "b", "a.txt", "b.log", "x y", "[c]", "éé", "A"]
    patterns = [
        *("a", "/a", "a/", "*.txt", "**/b", "a/**", "!a.txt", "!/b", "# x", "\\[c\\]", "?", "x y"),
        *("*", "!*/", "a/b", "b/*.log", "**/a/b", "éé", "[ab]", "[!a]", "a ", "/**/b.log", ""),
        *("!a/b", "!a/a.txt", "/a/**", "a/**/", "**", "!", "**/b/**", "!b/*", "a/**/b", "a/*/**"),
    ]
    names = {"/".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(60)}
    files = [n for n in sorted(names) if not any(o.startswith(n + "/") for o in names)]
    tree(tmp_path, dict.fromkeys(files, ""))
    for _ in range(40):
        lines = rng.choices(patterns, k=rng.randint(1, 5))
        (tmp_path / ".gitignore").write_text("\n".join(lines) + "\n")
        upload._patterns.cache_clear()
        done = subprocess.run(
            ["git", "-C", str(tmp_path), "check-ignore", "-z", "--no-index", "--stdin"],
            input="\0".join(files),
            capture_output=True,
            text=True,
        )
        assert left(tmp_path, *files) == done.stdout.split("\0")[:-1], lines


def test_a_file_that_git_takes_back_in_is_uploaded(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    ignore = b"\xef\xbb\xbfdeploy/**\r\n!deploy/Dockerfile\r\n!\r\n"
    tree(tmp_path, {"deploy/Dockerfile": "", "deploy/x": ""})
    (tmp_path / ".gitignore").write_bytes(ignore)
    assert left(tmp_path, "deploy", "deploy/Dockerfile", "deploy/x") == ["deploy/x"]


def test_the_local_cli_follows_links_and_names_what_fails(tmp_path: Path) -> None:
    root = tree(tmp_path / "c", {"a b/é\n.txt": "x", "d/real": "y"})
    (root / "link").symlink_to(root / "d")  # absolute, and to a folder
    (root / "empty").mkdir()
    packed = io.BytesIO(local_cli.archive(root, root, gitignore=True))
    with tarfile.open(fileobj=packed) as tar:
        found = {member.name: member for member in tar}
    assert {"./a b/é\n.txt", "./link/real", "./empty"} <= set(found)
    assert not any(member.issym() for member in found.values())
    (root / "dangling").symlink_to("nowhere")
    with pytest.raises(local_cli.CliFailure, match="dangling: No such file"):
        local_cli.archive(root, root, gitignore=True)


def test_an_upload_that_cannot_be_unpacked(project: Project) -> None:
    import httpx

    project.ok("ensure", "main.py")
    service = project.stage.services()["pulse-env"]["serviceId"]
    path = f"/project/{project.id}/environment/{project.environment}/up?serviceId={service}"
    answer = httpx.post(
        project.railway.api.replace("/graphql/v2", path),
        content=b"no archive",
        headers={"Authorization": f"Bearer {project.env['RAILWAY_API_TOKEN']}"},
    )
    assert answer.status_code == 400
    assert "cannot be unpacked" in answer.json()["message"]


# -- what is checked before it -----------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "app"))


def deploy(project: Project, app: Path, *arguments: str) -> Any:
    return project.run("deploy", "main.py", *arguments, cwd=app)


def test_nothing_is_made_of_a_context_that_lacks_its_parts(base: Project, app: Path) -> None:
    services = base.services
    for ignored, said in (
        ("Dockerfile", "the Dockerfile Dockerfile would not be uploaded"),
        ("web/", "the web root web would not be uploaded"),
        ("*.py", "the app main.py would not be uploaded"),
    ):
        (app / ".railwayignore").write_text(f"{ignored}\n")
        verb = deploy(base, app)
        assert said in verb.error
        assert ".railwayignore leaves it out" in verb.error
    (app / ".railwayignore").unlink()
    for text, said in (
        ("ps.InMemorySessionStore()", "needs PULSE_SECRET: set it once on pulse-env"),
        (None, "must be https in production"),
    ):
        source = (TINY / "main.py").read_text()
        arguments = [] if text else ["--server-address", "http://shop.example"]
        (app / "main.py").write_text(source.replace(text or "-", "None" if text else "-"))
        verb = deploy(base, app, *arguments)
        assert verb.code == 1
        assert said in verb.error
    assert base.services == services


def test_secrets_are_not_uploaded(base: Project, app: Path) -> None:
    files = [".env", "keys/id_rsa", "keys/id_ecdsa", "a.key", "b.p12", "ca.pem", "key.pem"]
    tree(app, dict.fromkeys([*files, ".env.example"], "TOKEN=x"))
    tree(app, {"key.pem": "BEGIN PRIVATE KEY", "web/.npmrc": "//h/:_authToken=npm_x"})
    tree(app, {".npmrc": "//h/:_authToken=${NPM_TOKEN}", ".local-railway/state.json": "{}"})
    secrets = {*files, "web/.npmrc", ".local-railway"} - {"ca.pem"}
    assert upload.secrets_in_upload(app) == sorted(secrets)
    services = base.services
    verb = deploy(base, app)
    assert (verb.code, base.services) == (1, services)
    assert "the upload would hold .env, .local-railway, a.key, b.p12, key.pem and more" in verb.err
    assert f"name them in {app.resolve() / '.railwayignore'}" in verb.err


def test_the_folder_of_a_local_railway_is_never_uploaded(tmp_path: Path) -> None:
    guard.make_private(tmp_path / ".local-railway")
    tree(tmp_path, {".local-railway/state.json": "{}", "main.py": ""})
    packed = io.BytesIO(local_cli.archive(tmp_path, tmp_path, gitignore=True))
    with tarfile.open(fileobj=packed) as tar:
        assert "./main.py" in tar.getnames()
        assert not any("state.json" in name for name in tar.getnames())
    assert upload.secrets_in_upload(tmp_path) == []


@pytest.mark.parametrize(
    ("dockerfile", "ignored", "says"),
    [
        ("COPY gone.txt ./", "", "Dockerfile copies gone.txt, and .* has no such file"),
        (
            "COPY web/x ./",
            "web/x",
            "Dockerfile copies web/x, which would not be uploaded: .*ignore",
        ),
    ],
)
def test_a_build_that_lacks_a_file_is_refused(
    app: Path, dockerfile: str, ignored: str, says: str
) -> None:
    tree(app, {"Dockerfile": f"FROM a\n{dockerfile}\n", ".railwayignore": ignored, "web/x": ""})
    parsed = options.parse_deploy({"app": "main.py", "context": str(app)}, doctor.Warnings())
    with pytest.raises(errors.Failure, match=f"the build would fail: {says}"):
        deploying.check(parsed, doctor.Warnings())


def test_what_is_warned_about(base: Project, app: Path) -> None:
    tree(app, {".railway/railway.py": "import railway_sdk"})
    verb = deploy(base, app, "--deployment-id", "warned")
    assert verb.code == 0, verb.err
    said = " ".join(verb.err.split())
    assert "deletes every service that it does not list" in said
    assert 'Add this to it first: PARTIAL = "site"' in said
