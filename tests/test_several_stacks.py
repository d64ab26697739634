"""docs/several-stacks.md, command by command, on the local Railway."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TINY, Project, Redis, play
from tests.net import eventually
from tests.test_local_environments import has_settled
from tests.test_stacks import app_with_names

PAGE = (ROOT / "docs" / "several-stacks.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


class Reader:
    """Runs the page's commands, with an account token."""

    def __init__(self, project: Project, redis: Redis) -> None:
        self.project, self.redis = project, redis

    def follow(self, title: str, folder: Path = TINY) -> list[str]:
        """Run the commands of a section, each of which has to succeed, and return their output."""
        commands = "".join(re.findall(r"^```sh\n# [^\n]*\n(.*?)^```$", section(title), re.S | re.M))
        env = {"RAILWAY_ENVIRONMENT_ID": ""} if "--environment" in commands else {}
        outputs = []
        for line in commands.splitlines():
            line = line.replace("$SHARED_REDIS_URL", self.redis.url)
            program, *words = shlex.split(line)
            assert program == "pulse-railway"
            verb = self.project.run(*words, cwd=folder, **env)
            assert verb.code == 0, f"{line}\n{verb.err}"
            outputs.append(verb.out + verb.err)
        assert outputs
        return outputs

    def make(self, name: str) -> Project:
        """Create an empty environment."""
        created = self.project.railway.graphql(
            "mutation C($i: EnvironmentCreateInput!) { environmentCreate(input: $i) { id } }",
            i={"projectId": self.project.id, "name": name},
        )
        return self.project.within(created["environmentCreate"]["id"])


@pytest.fixture
def reader(base: Project) -> Iterator[Reader]:
    server = Redis()
    yield Reader(base, server)
    server.stop()


def deployments(project: Project, *words: str) -> list[str]:
    return [row["deployment_id"] for row in project.ok("status", *words)["deployments"]]


def test_the_page(reader: Reader, request: pytest.FixtureRequest) -> None:
    play(globals(), request)
    # the first stack is unchanged
    assert deployments(reader.project, "--service", "pulse-router") == ["first"]
    assert reader.project.active == "first"
    assert reader.project.janitor()["deleted"] == []


def step_01_two_apps_in_one_environment(reader: Reader, tmp_path: Path) -> None:
    title = "Two apps in one environment"
    names = dict(re.findall(r'(\w+)_service="([\w-]+)"', section(title)))
    folder = app_with_names(tmp_path / "blog", **names)
    *_, status = reader.follow(title, folder)
    assert "posts-1" in status
    assert "first" not in status
    assert deployments(reader.project, "--service", "blog-router") == ["posts-1"]


def step_02_two_environments(reader: Reader) -> None:
    staging = reader.make("staging")
    refused = staging.run("ensure", "main.py")
    assert "pulse-env, pulse-janitor, pulse-redis, pulse-router: other environments" in refused.err
    assert staging.services == set()
    *_, status = reader.follow("Two environments of one project")
    assert "try-1" in status
    assert "first" not in status
    assert "stg-try-1" in staging.services


def step_03_a_copy(reader: Reader) -> None:
    copy = reader.project.duplicate("pr-12")
    eventually(lambda: has_settled(copy), 60)
    before: dict[str, Any] = reader.project.state
    reader.follow("A copy for a pull request")
    assert copy.active == "pr-12-1"
    assert reader.project.state == before
    copy.delete_environment()


def step_04_one_redis(reader: Reader) -> None:
    for name in ("team-a", "team-b"):
        reader.make(name)
    *_, status = reader.follow("Several teams on one Redis")
    assert "a-1" not in status
    assert reader.redis.client.get("team-a:active") == "a-1"
    assert reader.redis.client.get("team-b:active") is None
    # each state has an owner before the first deploy, so that another stack is refused
    assert {reader.redis.client.get(f"team-{t}:owner") is not None for t in "ab"} == {True}
