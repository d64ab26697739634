"""What Railway's own CLI asks, the local Railway answers: its verbs' documents, written anew from
the schema with the fields that CLI 5.43 and 5.71 ask for. And what Railway refuses, it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.conftest import Project
from tests.net import eventually

PROJECT = """
id name createdAt updatedAt deletedAt
environments { edges { node { id name canAccess } } }
services { edges { node { id name } } }
"""
DEPLOYMENT = "id status createdAt meta deploymentStopped instances { id status }"
PAGE = "pageInfo { hasNextPage endCursor }"
DOCUMENTS = {
    "whoami": "query { me { id name email } }",
    "list": f"""query {{
        externalWorkspaces {{ id name teamId projects {{ {PROJECT} }} }}
        me {{ workspaces {{ id name team {{ id }}
          projects(first: 500) {{ edges {{ node {{ {PROJECT} }} }} }} }} }}
    }}""",
    "link": """query ($project: String!) { project(id: $project) {
        id name workspaceId deletedAt workspace { name }
        buckets { edges { node { id name } } }
        environments { edges { node { id name canAccess deletedAt unmergedChangesCount } } }
        services { edges { node { id name } } }
    } }""",
    "status": f"""query ($project: String!, $environment: String!) {{
        environment(id: $environment, projectId: $project) {{ id name
          serviceInstances(first: 100) {{ edges {{ node {{
            id serviceId serviceName environmentId numReplicas cronSchedule nextCronRunAt
            startCommand source {{ repo image }}
            latestDeployment {{ canRedeploy {DEPLOYMENT} }} activeDeployments {{ {DEPLOYMENT} }}
            domains {{ serviceDomains {{ id domain targetPort }}
                       customDomains {{ id domain targetPort }} }}
          }} }} {PAGE} }}
          volumeInstances(first: 100) {{ edges {{ node {{
            id serviceId mountPath environmentId currentSizeMB sizeMB state deletedAt
            isPendingDeletion volume {{ id name }}
          }} }} {PAGE} }}
        }}
    }}""",
    "environment": f"""query ($project: String!, $environment: String!) {{
        environments(projectId: $project, isEphemeral: false, first: 50) {{ edges {{ node {{
          id name isEphemeral createdAt updatedAt canAccess unmergedChangesCount
          sourceEnvironment {{ id name }} meta {{ prNumber prTitle prRepo branch baseBranch }}
        }} }} {PAGE} }}
        environment(id: $environment) {{ id name config(decryptVariables: true) }}
        environmentStagedChanges(environmentId: $environment) {{ id status patch }}
        regions(projectId: $project) {{ name region country location workspaceId
          deploymentConstraints {{ deprecationInfo {{ isDeprecated replacementRegion }} }} }}
        twoFactorInfo {{ isVerified hasRecoveryCodes }}
    }}""",
    # from here on what CLI 5.71 asks for beyond 5.43
    "link, 5.71": f"""query ($project: String!) {{ project(id: $project) {{
        id name workspaceId volumes {{ edges {{ node {{ id name }} }} {PAGE} }}
        environments {{ edges {{ node {{ id name canAccess configEtag canvasGroupRefs }} }} }}
        services {{ edges {{ node {{ id name icon templateServiceId tracingEnabled
          serviceInstances {{ edges {{ node {{ id tracingEnabled autoInstrumentationEnabled
            }} }} }} }} }} }}
    }} }}""",
    "status, 5.71": """query ($environment: String!) {
        environment(id: $environment) { id name configEtag canvasGroupRefs
          serviceInstances { edges { node { id serviceId serviceName tracingEnabled
            autoInstrumentationEnabled latestDeployment { id status snapshotId } } } }
          volumeInstances { edges { node { id volumeId region createdAt externalId
            service { id name } environment { id name } volume { id name } } } } }
    }""",
    "volume list, 5.71": """query ($project: String!) { project(id: $project) {
        volumes { edges { node { id name createdAt projectId project { id } volumeInstances {
          edges { node { id serviceId environmentId mountPath sizeMB currentSizeMB state
            region } } } } } } } }""",
    "config pull, 5.71": """query ($project: String!, $environment: String!, $service: String!) {
        project(id: $project) { id name services { edges { node {
          id name icon templateServiceId } } } volumes { edges { node { id name } } } }
        environment(id: $environment) { id name configEtag canvasGroupRefs
          config(decryptVariables: false)
          variables { edges { node { name serviceId isSealed references } } } }
        egressGateways(environmentId: $environment, serviceId: $service) { ipv4 region }
        serviceInstanceLimitOverride(environmentId: $environment, serviceId: $service)
    }""",
    "variables": """query ($project: String!, $environment: String!, $service: String!) {
        variablesForServiceDeployment(
          projectId: $project, environmentId: $environment, serviceId: $service)
    }""",
    "logs": """query ($input: DeploymentListInput!, $deployment: String!) {
        deployments(input: $input, first: 1) { edges { node { id createdAt status meta } } }
        deploymentLogs(deploymentId: $deployment, limit: 5) {
          timestamp message attributes { key value } }
        buildLogs(deploymentId: $deployment, limit: 5) {
          timestamp message attributes { key value } }
    }""",
    "domain": """query ($project: String!, $environment: String!, $service: String!) {
        domains(projectId: $project, environmentId: $environment, serviceId: $service) {
          serviceDomains { id domain suffix environmentId serviceId targetPort syncStatus
            createdAt updatedAt }
          customDomains { id domain environmentId projectId serviceId targetPort syncStatus
            createdAt updatedAt
            status { dnsRecords { hostlabel fqdn recordType requiredValue currentValue status
                zone purpose }
              cdnProvider certificateStatus certificateStatusDetailed certificateErrorMessage
              certificateErrorType certificateRetryable
              certificates { issuedAt expiresAt domainNames fingerprintSha256 keyType }
              verificationToken verificationDnsHost verified } }
        }
    }""",
    "up": "query ($deployment: String!) { deployment(id: $deployment) { status } }",
    "ssh": """query ($environment: String!, $service: String!) {
        serviceInstance(environmentId: $environment, serviceId: $service) { id }
        sshPublicKeys(first: 100) { edges { node {
          id name publicKey fingerprint userId workspaceId } } }
    }""",
    "deploy --template": """query { template(code: "pulse-baseline") {
        id code name description image category readme demoProjectId status workspaceId
        serializedConfig } }""",
}
CHANGES = {
    "redeploy": "mutation ($id: String!) { deploymentRedeploy(id: $id) { id } }",
    "restart": "mutation ($id: String!) { deploymentRestart(id: $id) }",
    "down": "mutation ($id: String!) { deploymentRemove(id: $id) }",
}
COMMIT = """mutation ($environment: String!, $patch: EnvironmentConfig) {
  environmentPatchCommit(environmentId: $environment, patch: $patch) }"""
UPDATE = """mutation ($service: String!, $input: ServiceInstanceUpdateInput!) {
  serviceInstanceUpdate(serviceId: $service, input: $input) }"""
STAGE = """mutation ($environment: String!, $input: EnvironmentConfig!) {
  environmentStageChanges(environmentId: $environment, input: $input, merge: true) {
    id status patch } }"""
COMMIT_STAGED = """mutation ($environment: String!) {
  environmentPatchCommitStaged(environmentId: $environment, skipDeploys: true) }"""


@pytest.fixture(scope="module")
def stack(project: Project) -> Project:
    project.ok("ensure", "main.py")
    return project


def ids(stack: Project) -> dict[str, Any]:
    service = stack.stage.services()["pulse-router"]["serviceId"]
    where = {"projectId": stack.id, "environmentId": stack.environment, "serviceId": service}
    found = stack.railway.graphql(
        "query ($i: DeploymentListInput!) { deployments(input: $i) { edges { node { id } } } }",
        i=where,
    )["deployments"]["edges"][0]["node"]["id"]
    return {
        "project": stack.id,
        "environment": stack.environment,
        "service": service,
        "deployment": found,
        "input": where,
        "id": found,
    }


def ask(stack: Project, document: str, **more: Any) -> Any:
    values = {**ids(stack), **more}
    return stack.railway.graphql(
        document, **{k: v for k, v in values.items() if f"${k}:" in document}
    )


@pytest.mark.parametrize("verb", DOCUMENTS)
def test_a_document_of_the_real_cli(stack: Project, verb: str) -> None:
    answer = ask(stack, DOCUMENTS[verb])
    answer.pop("serviceInstanceLimitOverride", None)
    assert all(value is not None for value in answer.values())


def test_an_etag_changes_with_the_config(stack: Project) -> None:
    """`railway config apply` compares it with that of its plan."""

    def etag() -> str:
        return str(ask(stack, DOCUMENTS["status, 5.71"])["environment"]["configEtag"])

    before = etag()
    assert etag() == before
    service = stack.stage.services()["pulse-env"]["serviceId"]
    for value in ({"value": "1"}, None):
        ask(stack, COMMIT, patch={"services": {service: {"variables": {"ETAG": value}}}})
        assert (etag() == before) == (value is None)


def test_a_projects_volumes(stack: Project) -> None:
    found = ask(stack, DOCUMENTS["volume list, 5.71"])["project"]["volumes"]["edges"]
    assert [edge["node"]["name"] for edge in found] == ["pulse-redis-volume"]
    [instance] = [e["node"] for e in found[0]["node"]["volumeInstances"]["edges"]]
    assert (instance["environmentId"], instance["mountPath"]) == (stack.environment, "/data")


LOGS = """query ($environment: String!, $filter: String, $beforeLimit: Int, $anchor: String) {
  environmentLogs(environmentId: $environment, filter: $filter, beforeLimit: $beforeLimit,
    anchorDate: $anchor) { timestamp message severity
      tags { serviceId } attributes { key value } } }"""


def test_the_logs_of_an_environment(stack: Project) -> None:
    """CLI 5.71 asks for a build's by its snapshot; without one no build's are in them."""
    deployment = ids(stack)["deployment"]

    def messages(filter: str, count: int = 1000, anchor: str | None = None) -> list[str]:
        more = {"filter": filter, "beforeLimit": count, "anchor": anchor}
        return [line["message"] for line in ask(stack, LOGS, **more)["environmentLogs"]]

    build = messages(f"@snapshot:{deployment}")
    assert build[0] == "scheduling build"
    assert messages(f"@snapshot:{deployment} scheduling") == ["scheduling build"]
    assert messages(f"@snapshot:{deployment}", 1) == build[-1:]
    assert messages(f"@snapshot:{deployment}", anchor="2020-01-01T00:00:00Z") == []
    assert "scheduling build" not in messages("")
    assert messages("@deployment:unknown") == []
    with pytest.raises(RuntimeError, match="does not know @colour"):
        messages("@colour:red")


def test_staged_networking_is_committed(new_project: Callable[[], Project]) -> None:
    """`railway environment new --duplicate` of CLI 5.71 stages a service with its networking."""
    project = new_project()
    made = project.railway.graphql(
        "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }",
        i={"projectId": project.id, "environmentId": project.environment, "name": "web"},
    )["serviceCreate"]["id"]
    other = project.railway.graphql(
        "mutation ($i: EnvironmentCreateInput!) { environmentCreate(input: $i) { id } }",
        i={"projectId": project.id, "name": "staging"},
    )["environmentCreate"]["id"]
    networking = {"serviceDomains": {"localhost:1": {"port": 80}}, "customDomains": {}}
    networking["tcpProxies"], service = {}, {"isCreated": True, "networking": networking}
    within = project.within(other)
    where = {"environment": other}
    project.railway.graphql(STAGE, **where, input={"services": {made: service}})
    project.railway.graphql(COMMIT_STAGED, **where)
    assert within.services == {"web"}
    found = project.railway.graphql(
        "query ($e: String!, $s: String!) { serviceInstance(environmentId: $e, serviceId: $s) {"
        " domains { serviceDomains { targetPort } } } }",
        e=other,
        s=made,
    )
    assert found["serviceInstance"]["domains"]["serviceDomains"] == [{"targetPort": 80}]


def test_a_domain_of_ones_own_is_shown(stack: Project) -> None:
    create = """mutation ($input: CustomDomainCreateInput!) { customDomainCreate(input: $input) {
      id domain status { verified dnsRecords { requiredValue } } } }"""
    where = ids(stack)["input"]
    made = ask(stack, create, input={**where, "domain": "app.example"})["customDomainCreate"]
    assert not made["status"]["verified"]
    found = ask(stack, DOCUMENTS["domain"])["domains"]["customDomains"]
    assert [domain["domain"] for domain in found] == ["app.example"]
    delete = "mutation ($id: String!) { customDomainDelete(id: $id) }"
    assert ask(stack, delete, id=made["id"])["customDomainDelete"]
    assert ask(stack, DOCUMENTS["domain"])["domains"]["customDomains"] == []


def test_a_patch_is_carried_out_whole_or_not_at_all(stack: Project) -> None:
    service = stack.stage.services()["pulse-env"]["serviceId"]
    change = {
        "variables": {"A": {"value": "1"}},
        "deploy": {"healthcheckPath": "/up", "multiRegionConfig": {"us-west2": {"numReplicas": 2}}},
    }
    ask(
        stack,
        COMMIT,
        patch={"services": {service: change}, "sharedVariables": {"S": {"value": "2"}}},
    )
    config = ask(stack, DOCUMENTS["environment"])["environment"]["config"]
    mine = config["services"][service]
    assert mine["variables"]["A"] == {"value": "1"}
    assert mine["deploy"]["healthcheckPath"] == "/up"
    assert mine["deploy"]["numReplicas"] == 2
    assert config["sharedVariables"] == {"S": {"value": "2"}}
    for wrong in (
        {**change, "variables": {"B": {"value": "1"}}, "nonsense": {}},
        {"variables": {"B": {"value": "1"}}, "deploy": {"cronSchedule": "* * * * *"}},
    ):
        with pytest.raises(RuntimeError):
            ask(stack, COMMIT, patch={"services": {service: wrong}})
    ask(stack, COMMIT, patch={"services": {service: {"variables": {"A": None}}}})
    assert "A" not in stack.variables("pulse-env")
    assert "B" not in stack.variables("pulse-env")


def test_an_environment_is_duplicated_as_the_real_cli_does(
    new_project: Callable[[], Project],
) -> None:
    """`railway environment new <name> --duplicate <other>`: an empty environment, then a patch of
    the other's config with `isCreated`. No upload is in a config."""
    project = new_project()
    ask = project.railway.graphql
    made = ask(
        "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }",
        i={
            "projectId": project.id,
            "environmentId": project.environment,
            "name": "cache",
            "source": {"image": "redis:7"},
            "variables": {"SECRET": "a literal", "ADDRESS": "${{RAILWAY_ENVIRONMENT_NAME}}"},
        },
    )["serviceCreate"]["id"]
    where = {"serviceId": made, "environmentId": project.environment}
    ask(
        "mutation ($i: ServiceDomainCreateInput!) { serviceDomainCreate(input: $i) { domain } }",
        i=where,
    )
    new = ask(
        """mutation EnvironmentCreate($projectId: String!, $name: String!, $sourceId: String,
             $applyChangesInBackground: Boolean) {
          environmentCreate(input: {projectId: $projectId, name: $name,
            sourceEnvironmentId: $sourceId, applyChangesInBackground: $applyChangesInBackground})
          { name, id } }""",
        projectId=project.id,
        name="staging",
        sourceId=None,
        applyChangesInBackground=None,
    )["environmentCreate"]
    config = ask(
        "query ($id: String!) { environment(id: $id) { id name config(decryptVariables: true) } }",
        id=project.environment,
    )["environment"]["config"]
    patch = {k: v for k, v in config.items() if k in ("services", "sharedVariables", "volumes")}
    patch["services"][made].update(isCreated=True, source={"image": "redis:8"})
    ask(COMMIT, environment=new["id"], patch=patch)
    other = project.within(new["id"])
    assert other.variables("cache") == project.variables("cache")
    domains = [
        ask(DOCUMENTS["domain"], project=p.id, environment=p.environment, service=made)["domains"]
        for p in (project, other)
    ]
    names = [[d["domain"] for d in found["serviceDomains"]] for found in domains]
    assert [len(found) for found in names] == [1, 1]
    assert names[0] != names[1]
    eventually(lambda: other.latest("cache")["status"] == "SUCCESS", 20)
    assert ask("mutation ($id: String!) { environmentDelete(id: $id) }", id=new["id"])
    assert project.services == {"cache"}


def test_staged_changes_wait_for_their_commit(stack: Project) -> None:
    service = stack.stage.services()["pulse-env"]["serviceId"]
    for name in ("X", "Y"):
        ask(stack, STAGE, input={"services": {service: {"variables": {name: {"value": "1"}}}}})
    staged = ask(stack, DOCUMENTS["environment"])["environmentStagedChanges"]
    assert set(staged["patch"]["services"][service]["variables"]) == {"X", "Y"}
    assert "X" not in stack.variables("pulse-env")
    ask(stack, COMMIT_STAGED)
    assert {"X", "Y"} <= set(stack.variables("pulse-env"))
    assert ask(stack, DOCUMENTS["environment"])["environmentStagedChanges"]["patch"] == {}


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("cronSchedule", "* * * * *", "5 minutes"),
        ("cronSchedule", "*/3 * * * *", "5 minutes"),
        ("cronSchedule", "61 * * * *", "Invalid cron"),
        ("cronSchedule", "never", "Invalid cron"),
        ("region", "mars-north1", "not found"),
        ("multiRegionConfig", {"mars-north1": {"numReplicas": 1}}, "not found"),
        ("healthcheckPath", "healthz", "start with a /"),
        ("healthcheckTimeout", -1, "Invalid"),
        ("drainingSeconds", -1, "Invalid"),
        ("numReplicas", 0, "Invalid"),
    ],
)
def test_a_setting_that_railway_refuses(
    stack: Project, setting: str, value: object, said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        ask(stack, UPDATE, input={setting: value})


def test_replicas_are_those_of_the_regions(stack: Project) -> None:
    shown = "query ($e: String!, $s: String!) { serviceInstance(environmentId: $e, serviceId: $s)"
    for given, expected in (
        ({"multiRegionConfig": {"us-west2": {"numReplicas": 2}}}, 2),
        ({"numReplicas": 1}, 1),
    ):
        ask(stack, UPDATE, input=given)
        where = {"e": stack.environment, "s": ids(stack)["service"]}
        found = stack.railway.graphql(shown + " { numReplicas } }", **where)
        assert found["serviceInstance"]["numReplicas"] == expected


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_of_the_real_cli(stack: Project, verb: str) -> None:
    assert all(ask(stack, CHANGES[verb]).values())


def test_no_project_token_gets_near_keys(
    stack: Project, new_project: Callable[[], Project]
) -> None:
    made = new_project()
    create = """mutation ($i: ProjectTokenCreateInput!) { projectTokenCreate(input: $i) }"""
    where = {"projectId": made.id, "environmentId": made.environment, "name": "ci"}
    token = made.railway.graphql(create, i=where)["projectTokenCreate"]
    answer = httpx.post(
        made.railway.api,
        json={"query": "query { sshPublicKeys { edges { node { id } } } }"},
        headers={"Project-Access-Token": token},
    ).json()
    assert answer["errors"][0]["message"] == "Not Authorized"
