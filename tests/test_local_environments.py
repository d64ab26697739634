"""The local Railway keeps environments apart: copies, deletions, tokens, and a restart."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples import demo
from pulse_railway.local.state import State
from tests.conftest import BASE, Project, Redis
from tests.net import eventually
from tests.test_local_restart import WEB, Service, gone, shell

LATEST = """query ($e: String!) { environment(id: $e) { serviceInstances { edges { node {
  serviceName latestDeployment { id status } domains { serviceDomains { domain } } } } } } }"""


def services(project: Project) -> dict[str, dict[str, Any]]:
    """By name: the latest deployment and the domains of each service of an environment."""
    found = project.railway.graphql(LATEST, e=project.environment)["environment"]
    return {e["node"]["serviceName"]: e["node"] for e in found["serviceInstances"]["edges"]}


def statuses(project: Project) -> dict[str, str | None]:
    return {n: (s["latestDeployment"] or {}).get("status") for n, s in services(project).items()}


def has_settled(project: Project) -> bool:
    return set(statuses(project).values()) <= {"SUCCESS", None}


def address(project: Project, name: str = "pulse-router") -> str:
    [domain] = services(project)[name]["domains"]["serviceDomains"]
    return f"https://{domain['domain']}"


def rendered(project: Project, name: str) -> dict[str, str]:
    found = project.railway.graphql(
        "query ($p: String!, $e: String!, $s: String!) { variablesForServiceDeployment("
        "projectId: $p, environmentId: $e, serviceId: $s) }",
        p=project.id,
        e=project.environment,
        s=project.stage.services()[name]["serviceId"],
    )
    return dict(found["variablesForServiceDeployment"])


def pids(project: Project) -> dict[str, int]:
    return dict(project.railway.local("stats", environment=project.environment)["pids"])


def runs(project: Project, names: set[str]) -> bool:
    return set(pids(project)) == names


def in_environment(service: Service, project: Project) -> Service:
    """The instance of a service in another environment."""
    other = copy.copy(service)
    other.project, other.where = project, {**service.where, "e": project.environment}
    other.address = address(project, service.name)
    return other


@pytest.fixture
def web(new_project: Callable[[], Project]) -> Service:
    return Service(new_project(), "web", WEB)


@pytest.fixture
def second(web: Service) -> Service:
    """`web` in a copy of its environment, where it runs."""
    other = in_environment(web, web.project.duplicate("staging"))
    eventually(lambda: other.status == "SUCCESS", 20)
    eventually(other.get, 20)
    return other


# -- copies ------------------------------------------------------------------------------------


def test_a_copy_of_a_stack_runs_beside_the_original(base: Project) -> None:
    base.railway.graphql(
        "mutation ($i: VariableCollectionUpsertInput!) { variableCollectionUpsert(input: $i) }",
        i={
            "projectId": base.id,
            "environmentId": base.environment,
            "variables": {"SHARED": "a secret"},
        },
    )
    base.redis.set("whose", "the original's")
    other = base.duplicate("staging")
    assert other.services == base.services == BASE | {"first"}
    eventually(lambda: has_settled(other), 60)
    assert statuses(other) == statuses(base)

    assert (
        other.stage.services()["first"]["serviceId"]
        == (base.stage.services()["first"]["serviceId"])
    )
    assert other.stage.services()["first"]["id"] != base.stage.services()["first"]["id"]
    assert set(pids(other)) == set(pids(base)) == {"pulse-router", "pulse-redis", "first"}
    assert not set(pids(other).values()) & set(pids(base).values())

    for name in base.services:
        assert other.variables(name) == base.variables(name)  # literal values, secrets too
    here, there = rendered(base, "pulse-router"), rendered(other, "pulse-router")
    assert there["RAILWAY_ENVIRONMENT_ID"] == other.environment != here["RAILWAY_ENVIRONMENT_ID"]
    assert there["RAILWAY_ENVIRONMENT_NAME"] == "staging"
    assert there["RAILWAY_PUBLIC_DOMAIN"] != here["RAILWAY_PUBLIC_DOMAIN"]
    assert there["REDIS_URL"] == here["REDIS_URL"]  # a private name: another Redis in each
    assert other.redis.get("whose") is None
    assert base.redis.get("whose") == "the original's"

    assert address(other) != address(base)
    assert base.stage.get(f"{address(base)}/_pulse/meta").json()["deployment_id"] == "first"
    assert other.stage.get(f"{address(other)}/healthz").status_code == 200
    for named in (other.environment, "staging", "STAGING"):
        words = ["railway", "ssh", "-i", base.env["PULSE_RAILWAY_SSH_KEY"], "-s", "first"]
        words += ["-e", named, "--", "echo $RAILWAY_ENVIRONMENT_NAME"]
        assert subprocess.check_output(words, env=base.env, text=True) == "staging\n"
    unknown = shell(other.within("no-such").stage, "first", "true")
    assert "Environment 'no-such' not found" in unknown.stderr

    running, volume = pids(other), Path(str(other.redis.config_get("dir")["dir"]))
    other.delete_environment()
    assert not any(Path(f"/proc/{pid}").exists() for pid in running.values())
    assert not volume.exists()
    assert other.environment not in (base.railway.root / "state.json").read_text()
    assert base.stage.get(f"{address(base)}/_pulse/meta").json()["deployment_id"] == "first"
    assert base.services == BASE | {"first"}
    assert base.redis.get("whose") == "the original's"


def test_a_copy_may_be_staged(web: Service) -> None:
    project = web.project
    other = project.duplicate("staging", stageInitialChanges=True)
    assert services(other) == {}
    staged = project.railway.graphql(
        "query ($e: String!) { environmentStagedChanges(environmentId: $e) { status patch }"
        " environment(id: $e) { unmergedChangesCount } }",
        e=other.environment,
    )
    patch = staged["environmentStagedChanges"]["patch"]["services"][web.where["s"]]
    assert patch["isCreated"] is True
    assert patch["variables"]["PROBE"] == {"value": "of its deployment"}
    assert staged["environment"]["unmergedChangesCount"] == 1
    commit = "mutation ($e: String!) { environmentPatchCommitStaged(environmentId: $e) }"
    project.railway.graphql(commit, e=other.environment)
    second = in_environment(web, other)
    eventually(second.get, 20)
    assert second.get()["probe"] == "of its deployment"
    assert second.get()["pid"] != web.get()["pid"]


def test_a_copy_may_wait_for_its_deployments(web: Service) -> None:
    other = web.project.duplicate("staging", skipInitialDeploys=True)
    assert statuses(other) == {"web": None}
    second = in_environment(web, other)
    assert web.project.stage.get(second.address).status_code == 404
    second.deploy()
    eventually(lambda: second.get(), 20)


def test_what_was_uploaded_stays_behind_by_order(web: Service) -> None:
    web.project.faults(copy_uploads=False)
    assert statuses(web.project.duplicate("staging")) == {"web": None}


def test_an_empty_environment_has_no_services(web: Service) -> None:
    made = web.project.railway.graphql(
        "mutation ($p: String!) { environmentCreate("
        ' input: { projectId: $p, name: "empty", ephemeral: true }) { id isEphemeral } }',
        p=web.project.id,
    )["environmentCreate"]
    assert made["isEphemeral"] is True
    assert services(web.project.within(made["id"])) == {}
    with pytest.raises(RuntimeError, match="already exists"):
        web.project.duplicate("empty")
    with pytest.raises(RuntimeError, match="Environment not found"):
        web.project.within("0").duplicate("another")


def test_variables_and_settings_are_of_one_environment(web: Service, second: Service) -> None:
    second.set_probe("of the copy")
    second.deploy()
    eventually(lambda: second.get().get("probe") == "of the copy", 20)
    assert web.project.variables("web")["PROBE"] == "of its deployment"
    ask = web.ask
    update = (
        "mutation ($s: String!, $e: String!) { serviceInstanceUpdate("
        ' serviceId: $s, environmentId: $e, input: { healthcheckPath: "/up" }) }'
    )
    ask(update, **second.where)
    path = (
        "query ($s: String!, $e: String!)"
        " { serviceInstance(serviceId: $s, environmentId: $e) { healthcheckPath } }"
    )
    found = [ask(path, **s.where)["serviceInstance"]["healthcheckPath"] for s in (web, second)]
    assert found == [None, "/up"]


def test_two_environments_may_share_a_redis_of_ones_own(web: Service, redis_server: Redis) -> None:
    """One outside of the local Railway, whose address is a literal variable."""
    web.project.stage.set_variables("web", {"REDIS_URL": redis_server.url})
    second = in_environment(web, web.project.duplicate("staging"))
    eventually(lambda: second.status == "SUCCESS", 20)
    web.deploy()
    eventually(lambda: web.status == "SUCCESS", 20)
    add = 'python -c \'import os, redis; print(redis.from_url(os.environ["REDIS_URL"]).incr("n"))\''
    assert [shell(s.project.stage, "web", add).stdout for s in (web, second)] == ["1\n", "2\n"]


# -- services ----------------------------------------------------------------------------------


def create(project: Project, name: str) -> str:
    made = project.railway.graphql(
        "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }",
        i={"projectId": project.id, "environmentId": project.environment, "name": name},
    )
    return str(made["serviceCreate"]["id"])


def delete(project: Project, service: str) -> None:
    document = "mutation ($s: String!, $e: String!) { serviceDelete(id: $s, environmentId: $e) }"
    project.railway.graphql(document, s=service, e=project.environment)


def project_services(project: Project) -> set[str]:
    """Of all environments together."""
    document = "query ($p: String!) { project(id: $p) { services { edges { node { name } } } } }"
    found = project.railway.graphql(document, p=project.id)["project"]["services"]["edges"]
    return {edge["node"]["name"] for edge in found}


def test_a_service_is_made_and_deleted_in_one_environment(web: Service, second: Service) -> None:
    one, two, before = web.project, second.project, second.get()
    made = create(two, "other")
    assert (one.services, two.services) == ({"web"}, {"web", "other"})
    with pytest.raises(RuntimeError, match="already exists in this project"):
        create(one, "other")
    with pytest.raises(RuntimeError, match="not found"):
        delete(one, made)
    delete(two, web.where["s"])
    eventually(lambda: gone(before), 20)
    assert (one.services, two.services) == ({"web"}, {"other"})
    assert web.get()["pid"]
    delete(two, made)
    assert project_services(one) == {"web"}


def test_by_order_a_change_reaches_every_environment_that_is_no_fork(web: Service) -> None:
    """As Railway's schema says. A pull request's environment is a fork."""
    one = web.project
    two, fork = one.duplicate("staging"), one.duplicate("pr-1", ephemeral=True)
    environments = (one, two, fork)
    one.faults(every_environment=True)
    made = create(one, "other")
    assert [e.services for e in environments] == [{"web", "other"}, {"web", "other"}, {"web"}]
    create(fork, "third")
    assert [("third" in e.services) for e in environments] == [False, False, True]
    one.railway.graphql(
        "mutation ($s: String!, $e: String!) { serviceInstanceUpdate("
        ' serviceId: $s, environmentId: $e, input: { startCommand: "true" }) }',
        s=web.where["s"],
        e=two.environment,
    )
    command = "query ($e: String!) { environment(id: $e) { config } }"
    found = [
        one.railway.graphql(command, e=e.environment)["environment"]["config"]["services"][
            web.where["s"]
        ].get("deploy")
        for e in environments
    ]
    assert found == [{"startCommand": "true"}, {"startCommand": "true"}, None]
    delete(two, made)
    delete(fork, web.where["s"])
    assert [e.services for e in environments] == [{"web"}, {"web"}, {"third"}]
    one.faults()
    delete(one, web.where["s"])
    assert two.services == {"web"}


def patch_away(project: Project, service: str) -> None:
    project.railway.graphql(
        "mutation ($e: String!, $p: EnvironmentConfig)"
        " { environmentPatchCommit(environmentId: $e, patch: $p) }",
        e=project.environment,
        p={"services": {service: {"isDeleted": True}}},
    )


def test_a_patch_deletes_a_service_in_its_environment(web: Service, second: Service) -> None:
    one, two, before = web.project, second.project, second.get()
    one.faults(deletion_patch="refuse")
    with pytest.raises(RuntimeError, match="Not Authorized"):
        patch_away(two, web.where["s"])
    one.faults(deletion_patch="ignore")
    patch_away(two, web.where["s"])
    assert second.get() == before
    one.faults(every_environment=True)  # which does not concern patches
    patch_away(two, web.where["s"])
    eventually(lambda: gone(before), 20)
    assert (one.services, two.services) == ({"web"}, set())
    assert web.get()["pid"]
    patch_away(one, web.where["s"])
    assert project_services(one) == set()


def test_a_deployment_is_removed_in_one_environment(web: Service, second: Service) -> None:
    before = second.get()
    remove = "mutation ($i: String!) { deploymentRemove(id: $i) }"
    web.ask(remove, i=second.deployment["id"])
    eventually(lambda: gone(before))
    assert second.status == "REMOVED"
    assert web.project.stage.get(second.address).status_code == 404
    assert "No target found for" in shell(second.project.stage, "web", "true").stderr
    assert second.project.services == {"web"}
    assert web.get()["pid"]


def test_a_deployment_that_comes_up_is_removed(web: Service) -> None:
    web.project.stage.set_variables("web", {"PROBE": "slow"})
    web.ask(
        "mutation ($s: String!, $e: String!) { serviceInstanceUpdate("
        ' serviceId: $s, environmentId: $e, input: { healthcheckPath: "/never",'
        ' preDeployCommand: ["sleep 1"], startCommand: "sleep 99" }) }',
        **web.where,
    )
    before = web.get()
    web.deploy()
    eventually(lambda: web.status == "DEPLOYING")
    web.ask("mutation ($i: String!) { deploymentRemove(id: $i) }", i=web.deployment["id"])
    assert web.get() == before
    environment = web.where["e"]
    with pytest.raises(RuntimeError, match="last environment"):
        web.project.delete_environment()
    web.deploy()
    eventually(lambda: web.status == "DEPLOYING")
    web.project.duplicate("staging", skipInitialDeploys=True)
    web.project.delete_environment()
    assert not [
        pid
        for pid in demo.processes_of(web.project.railway.root)
        if environment.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    ]


# -- tokens ------------------------------------------------------------------------------------


class Bearer:
    """A project token, and what the API answers to it."""

    def __init__(self, project: Project, name: str = "ci") -> None:
        self.project = project
        create = "mutation ($i: ProjectTokenCreateInput!) { projectTokenCreate(input: $i) }"
        where = {"projectId": project.id, "environmentId": project.environment, "name": name}
        self.value = str(project.railway.graphql(create, i=where)["projectTokenCreate"])

    def ask(self, document: str, **variables: Any) -> Any:
        answer = httpx.post(
            self.project.railway.api,
            json={"query": document, "variables": variables},
            headers={"Project-Access-Token": self.value},
        ).json()
        if answer.get("errors"):
            raise RuntimeError(answer["errors"][0]["message"])
        return answer["data"]


ENVIRONMENTS = """query ($p: String!) {
  environments(projectId: $p) { edges { node { id } } }
  project(id: $p) { environments { edges { node { id } } } services { edges { node { id
    serviceInstances { edges { node { environmentId } } }
    deployments { edges { node { environment { id } } } } } } } }
  deployments(input: { projectId: $p }) { edges { node { environmentId } } }
}"""


def test_a_project_token_is_for_one_environment(web: Service, second: Service) -> None:
    token, ask = Bearer(second.project), web.ask
    own, foreign = second.where["e"], web.where["e"]
    found = token.ask("query { projectToken { environmentId projectId name displayToken } }")
    assert found["projectToken"]["environmentId"] == own
    assert token.value not in found["projectToken"]["displayToken"]

    for seen, expected in ((ask, {own, foreign}), (token.ask, {own})):
        answer = seen(ENVIRONMENTS, p=web.project.id)
        text = json.dumps(answer)
        assert {e for e in (own, foreign) if e in text} == expected
        assert len(answer["project"]["environments"]["edges"]) == len(expected)

    for document in (
        "query ($e: String!, $s: String!) { environment(id: $e) { id } service(id: $s) { id } }",
        "query ($e: String!, $s: String!) { serviceInstance(environmentId: $e, serviceId: $s)"
        " { id } }",
        "query ($e: String!, $s: String!) { deployments("
        " input: { environmentId: $e, serviceId: $s }) { edges { node { id } } } }",
        "query ($e: String!, $s: String!, $p: String!) { variables("
        " environmentId: $e, serviceId: $s, projectId: $p) }",
        "mutation ($e: String!, $s: String!) { serviceInstanceDeployV2("
        " environmentId: $e, serviceId: $s) }",
        "mutation ($e: String!, $s: String!) { serviceInstanceUpdate("
        " environmentId: $e, serviceId: $s, input: { overlapSeconds: 1 }) }",
        "mutation ($e: String!) { environmentPatchCommit(environmentId: $e, patch: {}) }",
        "mutation ($e: String!, $s: String!) { serviceDelete(id: $s, environmentId: $e) }",
    ):
        names = {"e": foreign, "s": web.where["s"], "p": web.project.id}
        given = {k: v for k, v in names.items() if f"${k}:" in document}
        with pytest.raises(RuntimeError, match="Not Authorized"):
            token.ask(document, **given)
        token.ask(document, **{**given, "e": own})

    for document in (
        "mutation ($p: String!, $e: String!) { environmentCreate("
        ' input: { projectId: $p, name: "x", sourceEnvironmentId: $e }) { id } }',
        "mutation ($e: String!, $p: String!) { projectTokenCreate("
        ' input: { projectId: $p, environmentId: $e, name: "more" }) }',
        "query ($p: String!) { projectTokens(projectId: $p) { edges { node { id } } } }",
        "mutation ($p: String!) { projectDelete(id: $p) }",
    ):
        given = {"p": web.project.id, "e": own}
        with pytest.raises(RuntimeError, match="Not Authorized"):
            token.ask(document, **{k: v for k, v in given.items() if f"${k}:" in document})
    with pytest.raises(RuntimeError, match="Not Authorized"):  # nor without naming an environment
        token.ask(
            "mutation ($s: String!) { serviceInstanceUpdate("
            " serviceId: $s, input: { overlapSeconds: 1 }) }",
            s=web.where["s"],
        )
    assert web.get()["pid"]


def test_project_tokens_are_listed_and_deleted(web: Service, second: Service) -> None:
    kept, lost, copied = Bearer(web.project, "a"), Bearer(web.project, "b"), Bearer(second.project)
    listed = """query ($p: String!) { projectTokens(projectId: $p) { edges { node {
      id name environmentId displayToken createdAt project { id } environment { name } } } } }"""

    def tokens() -> dict[str, str]:
        found = web.ask(listed, p=web.project.id)["projectTokens"]["edges"]
        assert not {kept.value, lost.value} & {e["node"]["displayToken"] for e in found}
        return {e["node"]["name"]: e["node"]["id"] for e in found}

    assert set(tokens()) == {"a", "b", "ci"}
    drop = "mutation ($i: String!) { projectTokenDelete(id: $i) }"
    with pytest.raises(RuntimeError, match="Not Authorized"):
        kept.ask(drop, i=tokens()["b"])
    assert web.ask(drop, i=tokens()["b"])["projectTokenDelete"] is True
    with pytest.raises(RuntimeError, match="Project Token not found"):
        lost.ask("query { projectToken { name } }")
    second.project.delete_environment()
    assert set(tokens()) == {"a"}
    with pytest.raises(RuntimeError, match="Project Token not found"):
        copied.ask("query { projectToken { name } }")
    assert kept.ask("query { projectToken { name } }")["projectToken"]["name"] == "a"


# -- the local Railway's own state and page ----------------------------------------------------


def test_both_environments_are_there_after_a_restart(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    with demo.stage(root) as stage:
        web = Service(Project(stage, "site"), "web", WEB)
        cache = create(web.project, "cache")
        stage.graphql(
            "mutation ($s: String!, $e: String!) { serviceInstanceUpdate(serviceId: $s,"
            '  environmentId: $e, input: { source: { image: "redis:7" } })'
            " serviceInstanceDeployV2(serviceId: $s, environmentId: $e) }",
            s=cache,
            e=web.where["e"],
        )
        second = in_environment(web, web.project.duplicate("pr-1", ephemeral=True))
        for project in (web.project, second.project):
            eventually(partial(has_settled, project), 20)
        second.set_probe("of the copy")
    assert demo.processes_of(root) == []
    # as an older local Railway had it: one volume a service
    volumes = root / "volumes"
    shutil.move(volumes / web.where["e"] / cache, volumes / cache)
    with demo.stage(root) as stage:
        one = copy.copy(web.project)
        one.railway = stage
        one = one.within(web.where["e"])
        two = one.within(second.where["e"])
        web, second = in_environment(web, one), in_environment(second, two)
        eventually(lambda: web.get() and second.get(), 30)
        assert web.get()["pid"] != second.get()["pid"]
        for project in (one, two):
            eventually(partial(runs, project, {"web", "cache"}))
        assert os.readlink(f"/proc/{pids(one)['cache']}/cwd") == str(
            volumes / web.where["e"] / cache
        )
        assert os.readlink(f"/proc/{pids(two)['cache']}/cwd") == str(
            volumes / second.where["e"] / cache
        )
        assert (one.variables("web")["PROBE"], two.variables("web")["PROBE"]) == (
            "of its deployment",
            "of the copy",
        )
        source = "query ($e: String!) { environment(id: $e) { sourceEnvironment { id } } }"
        found = stage.graphql(source, e=two.environment)["environment"]
        assert found["sourceEnvironment"] == {"id": one.environment}


def test_a_state_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.add_service(state.projects[0], "web")
    state.save()
    data = json.loads(state.path.read_text())
    for environment in data["projects"][0]["environments"]:
        del environment["ephemeral"], environment["copy_of"]
    for token in data["tokens"]:
        del token["id"], token["created_at"]
    state.path.write_text(json.dumps(data))
    older = State(tmp_path)
    assert not older.projects[0].environments[0].is_fork
    assert len({token.id for token in older.tokens}) == 3


def test_the_page_shows_one_environment_at_a_time(web: Service, second: Service) -> None:
    def picture(**params: str) -> dict[str, Any]:
        return dict(web.project.railway.local("picture", project=web.project.id, **params))

    first, other = picture(), picture(environment=second.where["e"])
    assert [e["name"] for e in first["environments"]] == ["production", "staging"]
    assert (first["environment"], other["environment"]) == (web.where["e"], second.where["e"])
    assert first["services"][0]["addresses"] == [web.address]
    assert other["services"][0]["addresses"] == [second.address]
    assert picture(environment="deleted")["environment"] == web.where["e"]
