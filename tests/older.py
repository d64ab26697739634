"""Earlier versions: an older commit of this repository, and the published pulse-railway 0.3.13.

The tree has no code of theirs: the commit is read from git, 0.3.13 from the package index.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest

from benchmarks import peer
from tests.conftest import ROOT

OLDER = "52e6667"  # the last commit with an untyped routing state
WITHOUT_PREVIEWS = "fafa346"  # the last commit without previews
MISSING = "this clone lacks a commit: a shallow one gets it by `git fetch --unshallow`"
SITE = ROOT / "pulse_railway" / "local" / "site"  # resolves the private network's names


def unpack(folder: Path, commit: str = OLDER) -> Path:
    """Write an older commit's tree into a folder. Skip the test if the clone lacks it."""
    try:
        done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    except OSError:
        pytest.skip("there is no git, which has the older sources")
    if done.returncode:
        pytest.skip(MISSING)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tree:
        tree.extractall(folder, filter="data")
    return folder


def provide_image(railway: Path, folder: Path) -> str:
    """Define the older commit's runtime image on a local Railway, and return its name.

    Images that are built there have this machine's `pulse-railway`, which is today's.
    """
    name, script = "example.com/older:1", folder / "image" / "pulse-railway"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nexec python -m router "$@"\n')
    script.chmod(0o755)
    images = railway / "images.json"
    known = json.loads(images.read_text()) if images.exists() else {}
    made = {"command": "python -m router", "cwd": str(folder), "path": [str(script.parent)]}
    images.write_text(json.dumps({**known, name: made}))
    return name


def load(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Return the older commit's router.py and janitor.py as modules, beside today's."""
    today = {name: sys.modules.get(name) for name in ("router", "janitor")}
    found = []
    try:
        for name in today:  # the janitor imports the router by its name
            spec = importlib.util.spec_from_file_location(f"older_{name}", folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            found.append(module)
    finally:
        for name, module_ in today.items():
            if module_ is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module_
    return found[0], found[1]


class Lines:
    """A process that reads requests and writes answers as lines of JSON."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.popen = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, said: Any) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(json.dumps(said) + "\n")
        self.popen.stdin.flush()

    def hear(self) -> Any:
        assert self.popen.stdout
        line = self.popen.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.popen.stdin
        assert self.popen.stdout
        with contextlib.suppress(OSError):
            self.popen.stdin.close()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.popen.stdout.close()


# Runs with the older commit's package: its functions, whose control commands go to the test.
OLDER_CLI = """
import json, sys
from types import SimpleNamespace
from pulse_railway import control
from pulse_railway.errors import Refused, Uncertain
from pulse_railway.railway.ssh import Outcome

def hear():
    return json.loads(sys.stdin.readline())

def tell(said):
    sys.__stdout__.write(json.dumps(said) + "\\n")
    sys.__stdout__.flush()

def by_ssh(api, stack, words):
    tell({"words": words})
    return Outcome(**hear())

control.by_ssh, control.settle, control.PAUSES = by_ssh, lambda *_: None, ()
for line in sys.stdin:
    asked = json.loads(line)
    stack = SimpleNamespace(
        intent=asked["intent"], target=SimpleNamespace(way=SimpleNamespace(kind="ssh"))
    )
    try:
        done = getattr(control, asked["call"])(None, stack, *asked["words"], **asked["named"])
        tell({"returned": done})
    except (Refused, Uncertain) as error:
        tell({"raised": type(error).__name__, "said": str(error)})
"""


class OlderCli(Lines):
    """The older commit's `pulse_railway.control`, with which its CLI sends control commands."""

    def __init__(self, folder: Path) -> None:
        super().__init__([sys.executable, "-P", "-c", OLDER_CLI], {"PYTHONPATH": str(folder)})

    def call(
        self,
        router: Callable[[list[str]], dict[str, Any]],
        name: str,
        *words: Any,
        intent: str | None = None,
        **named: Any,
    ) -> Any:
        """Call a function and return its result; `router` carries its control commands out."""
        self.send({"call": name, "words": words, "named": named, "intent": intent})
        while "words" in (said := self.hear()):
            self.send(router(said["words"]))
        return said


# Runs with 0.3.13: its control commands, and its janitor, whose steps on the store are single.
PUBLISHED = """
import asyncio, contextlib, io, json, sys
from types import SimpleNamespace
from pulse_railway import cli, janitor
from pulse_railway.config import RailwayProject
from pulse_railway.kv import RedisStore
from pulse_railway.railway.ops import DeploymentServiceRecord
from pulse_railway.store import DeploymentStore

real_stdout = sys.stdout

def tell(said):
    real_stdout.write(json.dumps(said) + "\\n")
    real_stdout.flush()

def step(*what):
    tell({"step": what})
    return json.loads(sys.stdin.readline())

class Steps(RedisStore):
    async def get(self, key):
        step("get", key)
        return await super().get(key)

    async def set(self, key, value, **more):
        step("set", key)
        return await super().set(key, value, **more)

    async def delete(self, key):
        step("delete", key)
        await super().delete(key)

class Client:
    def __init__(self, **_):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def delete_service(self, *, service_id, environment_id):
        step("delete service", service_id)

async def inspect_stack(**_):
    return SimpleNamespace(internal_token="token", redis_url="")

async def services(client, *, project):
    return [DeploymentServiceRecord(**found) for found in step("services")]

janitor.RailwayGraphQLClient, janitor.inspect_stack = Client, inspect_stack
janitor.list_deployment_service_records = services

async def clean_up(url):
    store = DeploymentStore(store=Steps(url=url))
    project = RailwayProject(project_id="p", environment_id="e", token="t")
    try:
        return await janitor.run_janitor(project=project, store=store)
    finally:
        await store.store.close()

for line in sys.stdin:
    asked = json.loads(line)
    if "janitor" in asked:
        done = asyncio.run(clean_up(asked["janitor"]))
        tell({"deleted": done.deleted_deployments, "kept": done.skipped_deployments})
        continue
    sys.argv = ["pulse-railway", "control", *asked["control"]]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code = repr(error)
    tell({"code": code, "said": said.getvalue()})
"""


class Published(Lines):
    """0.3.13's control commands and janitor, on a Redis."""

    def __init__(self, redis_url: str, hosts: Path) -> None:
        env = {
            "REDIS_URL": redis_url,
            "RAILWAY_SERVICE_ID": "here",
            "RAILWAY_LOCAL_HOSTS": str(hosts),
            "PYTHONPATH": str(SITE),
        }
        self.url = redis_url
        super().__init__([str(peer.python()), "-P", "-c", PUBLISHED], env)

    def control(self, *words: str) -> dict[str, Any]:
        """Run a control command and return its answer. Raises RuntimeError if it fails."""
        self.send({"control": words})
        done = self.hear()
        if done["code"]:
            raise RuntimeError(done["code"])
        return dict(json.loads(done["said"]))

    def janitor(self, services: Callable[[], list[dict[str, Any]]]) -> Iterator[list[str]]:
        """Run its janitor: yield each step before it is carried out, then `done` and the deleted
        services."""
        self.send({"janitor": self.url})
        while "step" in (said := self.hear()):
            yield said["step"]
            self.send(services() if said["step"] == ["services"] else None)
        yield ["done", *said["deleted"]]
