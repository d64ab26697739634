"""Images: those that exist, private ones, and those of deployments that are gone."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pulse_railway import contract, naming
from pulse_railway.flows import deploy, images
from pulse_railway.options import DeployOptions, RegistryCredentials
from pulse_railway.output import Output
from pulse_railway.railway import docker
from tests.conftest import ROOT, TINY, Project
from tests.net import Backend, Connection, header, ok

DIGEST = "sha256:" + "ab" * 32
APP = "registry.example/team/app"


@pytest.mark.parametrize(
    "text",
    ["app", "team/app", "registry.example/team/app", "localhost:5000/a/b", "r.io/a_b/c-d/e.f"],
)
def test_repositories(text: str) -> None:
    assert naming.image_repository(text) == text
    assert naming.image_reference(f"{text}:1.0-x") == f"{text}:1.0-x"
    assert naming.image_reference(f"{text}@{DIGEST}") == f"{text}@{DIGEST}"
    assert naming.image_reference(f"{text}:1@{DIGEST}") == f"{text}:1@{DIGEST}"


@pytest.mark.parametrize(
    "text",
    [
        *("https://registry.example/team/app", "-x", "--push", "Team/App", "a/b:tag", "a//b"),
        *("a/b@" + DIGEST, "a b", "", "a/", "/a", "a/b\n", "a/" + "b" * 300, "é/x", "$(id)/x"),
    ],
)
def test_what_is_no_repository(text: str) -> None:
    """docker has once been given all of them."""
    with pytest.raises(ValueError, match="is no repository"):
        naming.image_repository(text)


@pytest.mark.parametrize(
    "text",
    ["app", "a/b", "a/b:", "a/b:-x", "a/b@sha256:12", "a/b@", "h:1/a", "A/b:1", "a/b:1\n", "-a:1"],
)
def test_what_is_no_image(text: str) -> None:
    with pytest.raises(ValueError, match="is no image"):
        naming.image_reference(text)


def test_a_digest_takes_the_place_of_a_tag() -> None:
    assert images.pinned("r.io/a:1", DIGEST) == f"r.io/a@{DIGEST}"
    assert images.pinned("h:1/a", DIGEST) == f"h:1/a@{DIGEST}"
    assert images.pinned("h:1/a:2", DIGEST) == f"h:1/a@{DIGEST}"
    assert images.pinned(f"a@{DIGEST}", DIGEST) == f"a@{DIGEST}"
    assert images.pinned("a:1", None) == "a:1"


def test_a_builds_digest(tmp_path: Path) -> None:
    file = tmp_path / "metadata.json"
    assert docker.digest_of(file) is None
    for text, digest in (("{", None), ("[]", None), ('{"containerimage.digest": "d"}', "d")):
        file.write_text(text)
        assert docker.digest_of(file) == digest


def test_the_pages_start_command(tmp_path: Path) -> None:
    """It puts the address into a build that was made with a placeholder."""
    page = (ROOT / "docs" / "images.md").read_text()
    found = re.search(r"start_command=(.*?),\n  \)", page, re.S)
    assert found
    build = tmp_path / "web" / "build" / "client" / "assets"
    build.mkdir(parents=True)
    for name in ("a.js", "b c.js"):
        (build / name).write_text('x={serverAddress:"https://address.invalid"}')
    program = tmp_path / "pulse-railway"
    program.write_text('#!/bin/sh\necho "started $*"\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PULSE_SERVER_ADDRESS": "https://shop.example"}
    done = subprocess.run(
        ["sh", "-c", ast.literal_eval(f"({found[1]})")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "started serve\n"
    texts = {file.read_text() for file in build.iterdir()}
    assert texts == {'x={serverAddress:"https://shop.example"}'}


# -- a registry --------------------------------------------------------------------------------


class Lines(Output):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


class Registry:
    """A registry that gives the digest of its images to who has a token."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.address = ""

    def __call__(self, connection: Connection) -> None:
        while head := connection.head():
            text = head.decode()
            self.seen.append(text)
            if text.startswith("GET /token?"):
                connection.send(ok(b'{"token": "t"}'))
            elif b"Bearer t" in head:
                digest = (
                    b"HTTP/1.1 200 OK\r\ndocker-content-digest: %s\r\ncontent-length: 0\r\n\r\n"
                )
                connection.send(digest % DIGEST.encode())
            else:
                assert header(head, "accept")
                challenge = (
                    f'HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer realm="http://'
                    f'{self.address}/token",service="r",scope="repository:team/app:pull"\r\n'
                    "content-length: 0\r\n\r\n"
                )
                connection.send(challenge.encode())


def test_a_registry_says_the_digest() -> None:
    registry, lines = Registry(), Lines()
    with Backend(handle=registry) as backend:
        registry.address = f"127.0.0.1:{backend.port}"
        credentials = RegistryCredentials("very-secret-token")
        image = f"{registry.address}/team/app:1"
        assert images.find_digest(image, credentials, lines) == DIGEST
    assert lines.warned == []
    first, token, last = registry.seen
    assert first.startswith("HEAD /v2/team/app/manifests/1 ")
    assert "Authorization: Basic" in token
    assert "scope=repository" in token
    assert last.startswith("HEAD /v2/team/app/manifests/1 ")


@pytest.mark.parametrize("answer", [ok(b"{}"), ok(b"x", status="500 Oh no"), b"nonsense\r\n\r\n"])
def test_a_registry_that_does_not_say_it(answer: bytes) -> None:
    lines = Lines()
    with Backend(answer) as backend:
        image = f"127.0.0.1:{backend.port}/team/app:1"
        assert images.find_digest(image, None, lines) is None
    assert f"the registry does not say the digest of {image}" in lines.warned[0]


def test_an_image_without_a_registry() -> None:
    lines = Lines()
    assert images.find_digest("team/app:1", None, lines) is None
    assert "it names no registry" in lines.warned[0]
    assert images.find_digest(f"team/app@{DIGEST}", None, lines) == DIGEST


@pytest.mark.parametrize(
    ("running", "facts", "keep", "count"),
    [
        (None, {"instances": "3"}, True, 3),
        (None, {"instances": "3"}, False, 5),
        (None, {"instances": "x"}, True, 1),
        (None, {}, True, 5),  # deployed by an earlier version, and gone
        ({contract.INSTANCES: "2"}, {"instances": "3"}, True, 2),
        ({}, {}, True, 1),
    ],
)
def test_from_takes_the_processes_of_the_version_unless_a_number_is_given(
    monkeypatch: pytest.MonkeyPatch, running: Any, facts: dict[str, str], keep: bool, count: int
) -> None:
    monkeypatch.setattr(images, "facts_of", lambda *_: {"a": {"image": f"{APP}:1"} | facts})
    service = None if running is None else SimpleNamespace(variables=running)
    stack: Any = SimpleNamespace(backend=lambda _: service)
    nothing: Any = None
    options = DeployOptions(nothing, nothing, from_="a", instances=5, keep_instances=keep)
    found = deploy.with_image(nothing, stack, options)
    assert (found.image, found.instances) == (f"{APP}:1", count)


# -- on the local Railway ----------------------------------------------------------------------


def offer(project: Project, **definitions: Any) -> None:
    """Define images of the local Railway: by tag or digest of APP."""
    images_file = project.railway.root / "images.json"
    known = {f"{APP}{name}": {"cwd": str(TINY), **more} for name, more in definitions.items()}
    images_file.write_text(json.dumps(known))


def test_an_image_that_exists_and_one_that_is_gone(base: Project) -> None:
    offer(base, **{":1": {}, f"@{DIGEST}": {}})
    image = f"{APP}@{DIGEST}"
    given = ("--image", image, "--instances", "2")
    done = base.run("deploy", "main.py", *given, "--deployment-id", "two", "--json")
    assert done.code == 0, done.err
    assert (done.json["image"], done.json["digest"]) == (image, DIGEST)
    row = next(r for r in base.ok("status")["deployments"] if r["deployment_id"] == "two")
    assert (row["about"]["image"], row["about"]["digest"]) == (image, DIGEST)
    assert DIGEST[7:19] in base.run("status").out
    base.deploy("three")
    assert base.run("delete", "--deployment-id", "two", "--yes").code == 0
    gone = base.run("promote", "--deployment-id", "two")
    assert "two is gone: `pulse-railway deploy --from two" in gone.error
    assert base.run("delete", "--deployment-id", "first", "--yes").code == 0
    back = base.run("rollback")
    assert "first was the last one: check out" in back.error or "two was the last" in back.error
    again = base.run("deploy", "main.py", "--from", "two", "--deployment-id", "two-b", "--json")
    assert again.code == 0, again.err
    assert (again.json["image"], again.json["instances"]) == (image, 2)
    assert base.active == "two-b"
    for name, words in (
        ("three", "three was built from source: "),
        ("never", "there is no never in the history"),
    ):
        refused = base.run("deploy", "main.py", "--from", name, "--deployment-id", "x")
        assert words in refused.error, name
    entry = [e for e in base.ok("history")["history"] if e["deployment_id"] == "two"]
    assert {e.get("digest") for e in entry} == {DIGEST}


def test_a_private_image(base: Project, tmp_path: Path) -> None:
    """Railway was once never given the credentials to pull it."""
    offer(base, **{":1": {"private": "very-secret"}})
    words = ("deploy", "main.py", "--image", f"{APP}:1", "--deployment-id", "private")
    refused = base.run(*words)
    assert refused.code == 1
    assert "unauthorized" in refused.err
    assert "a private registry needs PULSE_RAILWAY_REGISTRY_USERNAME and" in refused.error
    assert "private" not in base.services
    wrong = base.run(*words, PULSE_RAILWAY_REGISTRY_PASSWORD="not-that-secret")
    assert "the registry does not accept" in wrong.error
    assert "not-that-secret" not in wrong.err
    file = tmp_path / "token"
    file.write_text("very-secret\n")
    done = base.run(*words, "--registry-password-file", str(file), "--registry-username", "ada")
    assert done.code == 0, done.err
    assert base.active == "private"
    assert "very-secret" not in done.err + done.out
    read = "query ($e: String!) { environment(id: $e) { config(decryptVariables: true) } }"
    assert "very-secret" not in str(base.railway.graphql(read, e=base.environment))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "https://r/x"], "--image: 'https://r/x' is no image"),
        (["--image-repository", "r/x:1"], "--image-repository: 'r/x:1' is no repository"),
        (["--image", "r/x:1", "--from", "a"], "which image? pass one of"),
        (["--image", "r/x:1", "--no-gitignore"], "leave it out, or --image"),
        (["--registry-username", "ada"], "there is no password for the registry"),
        (["--registry-password-file", "/nonexistent"], "cannot be read"),
        (["--registry-password-file", "/dev/null"], "is empty"),
    ],
)
def test_flags_that_are_refused(base: Project, flags: list[str], message: str) -> None:
    refused = base.run("deploy", "main.py", *flags)
    assert refused.code == 1
    assert message in refused.error
