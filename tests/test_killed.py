"""`ensure` killed after each of its writes, in a copy and beside another stack on the same Redis.

The existing stack goes on unchanged, and the next run completes the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pulse_railway import contract
from tests.conftest import Project, Redis, play
from tests.net import eventually
from tests.test_by_hand import killed
from tests.test_local_environments import has_settled
from tests.test_several_stacks import Reader

WINDOW = ("--rollback-window-seconds", "0")


class Site:
    """A stack on an external Redis."""

    def __init__(self, project: Project, redis: Redis) -> None:
        self.project, self.redis = project, redis

    def everything(self) -> dict[str, Any]:
        """Return the state, variables and deployments that another stack must not change."""
        client = self.redis.client
        keys = sorted(k for k in client.scan_iter("*") if ":router:" not in k)
        services = self.project.services - {"pulse-env"}
        return {
            "state": {key: client.get(key) for key in keys},
            "variables": {name: self.project.variables(name) for name in self.project.services},
            "running": {name: self.project.latest(name)["id"] for name in services},
            "serves": self.project.get("/_pulse/meta")["deployment_id"],
        }

    def tokens(self, environment: str) -> list[str]:
        """Return the names of an environment's project tokens."""
        edges = self.project.railway.graphql(
            "query ($p: String!) { projectTokens(projectId: $p)"
            " { edges { node { name environmentId } } } }",
            p=self.project.id,
        )["projectTokens"]["edges"]
        return [e["node"]["name"] for e in edges if e["node"]["environmentId"] == environment]


@pytest.fixture(scope="module")
def site(project: Project) -> Iterator[Site]:
    server = Redis()
    project.ok("ensure", "main.py", "--redis-url", server.url)
    project.deploy("one")
    yield Site(project, server)
    server.stop()


def test_an_ensure_that_is_killed(site: Site, request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def runs_until_done(project: Project, *words: str, later: int = 0) -> int:
    """Kill each run after its first write, or `later` writes later than the one before.

    Returns the number of killed runs.
    """
    runs = 0
    while killed(project, "ensure", "main.py", *WINDOW, *words, after=1 + runs * later):
        runs += 1
        assert runs < 15
    return runs


def step_01_in_a_copy(site: Site) -> None:
    """Each killed run once left an unused project token."""
    before = site.everything()
    copy = site.project.duplicate("copy")
    eventually(lambda: has_settled(copy), 60)
    assert runs_until_done(copy, later=1) >= 3  # each run begins with its token
    assert copy.ok("ensure", "main.py")["changed"] == []
    assert site.tokens(copy.environment) == ["pulse-railway pulse-router"]
    copy.deploy("of-copy")
    assert copy.get("/_pulse/meta")["deployment_id"] == "of-copy"
    assert copy.janitor()["exit"] == 0
    prefix = f"pulse:railway:{copy.environment}:"
    now = site.everything()
    now["state"] = {k: v for k, v in now["state"].items() if not k.startswith(prefix)}
    assert now == before


def step_02_a_deleted_token_is_replaced(site: Site) -> None:
    """`ensure` once kept it, and the janitor could not work."""
    copy = site.project.within(
        next(e for e in environments(site.project) if e != site.project.environment)
    )
    edges = site.project.railway.graphql(
        "query ($p: String!) { projectTokens(projectId: $p)"
        " { edges { node { id environmentId } } } }",
        p=copy.id,
    )["projectTokens"]["edges"]
    for node in (edge["node"] for edge in edges):
        if node["environmentId"] == copy.environment:
            document = "mutation ($i: String!) { projectTokenDelete(id: $i) }"
            site.project.railway.graphql(document, i=node["id"])
    check_token_of_another_environment(site.project, copy)
    refused = copy.janitor()["refused"]
    assert "RAILWAY_TOKEN does not open this environment: run `pulse-railway ensure`" in refused
    assert copy.ok("ensure", "main.py")["changed"]
    assert copy.janitor()["exit"] == 0
    assert sorted(site.tokens(copy.environment)) == ["ci", "pulse-railway pulse-router"]
    copy.delete_environment()


def check_token_of_another_environment(project: Project, copy: Project) -> None:
    """Check that verbs refuse a token of another environment than the one asked for."""
    values = {"projectId": project.id, "environmentId": copy.environment, "name": "ci"}
    document = "mutation ($i: ProjectTokenCreateInput!) { projectTokenCreate(input: $i) }"
    token = project.railway.graphql(document, i=values)["projectTokenCreate"]
    for verb in (["ensure", "main.py"], ["deploy", "main.py"], ["status"], ["rollback"]):
        refused = project.run(*verb, "--environment", "production", RAILWAY_TOKEN=token)
        message = "error: the project token is for environment copy, not production"
        assert (refused.code, refused.error) == (1, message)
    # RAILWAY_ENVIRONMENT_ID, which Railway sets in a container, is only a warning
    warned = project.run("status", RAILWAY_TOKEN=token)
    assert "for environment copy, which is worked on; RAILWAY_ENVIRONMENT_ID" in warned.err


def environments(project: Project) -> list[str]:
    edges = project.railway.graphql(
        "query ($p: String!) { project(id: $p) { environments { edges { node { id } } } } }",
        p=project.id,
    )["project"]["environments"]["edges"]
    return [edge["node"]["id"] for edge in edges]


def step_03_beside_another_owner(site: Site) -> None:
    """Both stacks have the same Redis and prefix."""
    before = site.everything()
    other = Reader(site.project, site.redis).make("other")
    words = ("--service-prefix", "b", "--redis-url", site.redis.url)
    assert runs_until_done(other, *words) > 3
    run = other.run("ensure", "main.py")
    assert "the routing state belongs to another stack" in run.err
    assert "belongs to another stack" in str(other.ok("status")["problems"])
    assert (
        site.redis.client.get("pulse:railway:owner") == before["variables"]["one"][contract.STACK]
    )
    assert site.everything() == before
