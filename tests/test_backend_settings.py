"""What a person has set on the active version's service, and what a new one gets of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import TINY, Project

LIMITS = (
    "mutation ($i: ServiceInstanceLimitsUpdateInput!) { serviceInstanceLimitsUpdate(input: $i) }"
)
ADDRESSES = (
    "mutation ($i: EgressGatewayCreateInput!)"
    " { egressGatewayAssociationCreate(input: $i) { ipv4 } }"
)
SETTINGS = (
    "mutation ($s: String!, $e: String!, $i: ServiceInstanceUpdateInput!)"
    " { serviceInstanceUpdate(serviceId: $s, environmentId: $e, input: $i) }"
)
READ = """
query ($s: String!, $e: String!) {
  service(id: $s) { tracingEnabled }
  serviceInstance(serviceId: $s, environmentId: $e) {
    numReplicas startCommand healthcheckPath autoInstrumentationEnabled ipv6EgressEnabled
  }
  serviceInstanceLimitOverride(serviceId: $s, environmentId: $e)
  egressGateways(serviceId: $s, environmentId: $e) { region }
}
"""
EAST, ASIA = "us-east4-eqdc4a", "asia-southeast1-eqsg3a"


def region(project: Project, service: str) -> dict[str, int]:
    document = "query ($e: String!) { environment(id: $e) { config(decryptVariables: false) } }"
    answer: Any = project.railway.graphql(document, e=project.environment)
    config = answer["environment"]["config"]
    deploy = config["services"][project.stage.services()[service]["serviceId"]]["deploy"]
    regions: dict[str, Any] = deploy["multiRegionConfig"]
    return {name: at["numReplicas"] for name, at in regions.items() if at}


def read(project: Project, service: str) -> dict[str, Any]:
    where = {"s": project.stage.services()[service]["serviceId"], "e": project.environment}
    answer: dict[str, Any] = project.railway.graphql(READ, **where)
    return answer


def set_on(project: Project, service: str, **settings: Any) -> None:
    where = {"s": project.stage.services()[service]["serviceId"], "e": project.environment}
    project.railway.graphql(SETTINGS, **where, i=settings)


def allot(project: Project, service: str, document: str, **values: Any) -> None:
    service_id = project.stage.services()[service]["serviceId"]
    where = {"environmentId": project.environment, "serviceId": service_id}
    project.railway.graphql(document, i={**where, **values})


def test_a_new_version_gets_what_was_set_on_the_active_one(base: Project) -> None:
    """A database that lets one address in has once refused the next version."""
    set_on(base, "pulse-router", multiRegionConfig={ASIA: {"numReplicas": 1}})
    moved = base.run("deploy", "main.py", "--deployment-id", "second")
    assert moved.code == 0, moved.err
    assert region(base, "second") == region(base, "first")
    by_hand = {"multiRegionConfig": {EAST: {"numReplicas": 2}}, "startCommand": "true"}
    set_on(base, "second", **by_hand, autoInstrumentationEnabled=True, tracingEnabled=True)
    set_on(base, "second", healthcheckPath="/other", ipv6EgressEnabled=True)
    allot(base, "second", LIMITS, memoryGB=4.5, vCPUs=2)
    allot(base, "second", ADDRESSES, region=EAST)
    third = base.run("deploy", "main.py", "--deployment-id", "third")
    assert third.code == 0, third.err
    assert (
        f"as second has it: {EAST}, 4.5 GB of memory, 2 vCPU, static outbound addresses, outbound"
        " IPv6, tracing on, automatic instrumentation"
    ) in " ".join(third.err.split())
    assert region(base, "third") == {EAST: 1}
    found = read(base, "third")
    assert found["serviceInstanceLimitOverride"] == {
        "containers": {"cpu": 2, "memoryBytes": 4_500_000_000}
    }
    assert [gateway["region"] for gateway in found["egressGateways"]] == [EAST]
    assert found["service"] == {"tracingEnabled": True}
    instance = found["serviceInstance"]
    assert instance["numReplicas"] == 1
    assert (instance["startCommand"], instance["healthcheckPath"]) != ("true", "/other")
    assert instance["autoInstrumentationEnabled"]
    assert instance["ipv6EgressEnabled"]
    status = base.run("status", "--json").json
    regions = {row["deployment_id"]: row["region"] for row in status["deployments"]}
    assert regions["third"] == EAST
    assert {row["service"]: row["region"] for row in status["baseline"]}["pulse-router"] == ASIA
    assert EAST in base.run("status").out


def test_flags_come_before_what_was_set_by_hand(base: Project) -> None:
    flags = ("--region", ASIA, "--memory-gb", "2", "--vcpus", "1.5")
    done = base.run("deploy", "main.py", "--deployment-id", "fourth", *flags)
    assert done.code == 0, done.err
    assert region(base, "fourth") == {ASIA: 1}
    found = read(base, "fourth")
    assert found["serviceInstanceLimitOverride"] == {
        "containers": {"cpu": 1.5, "memoryBytes": 2_000_000_000}
    }
    assert [gateway["region"] for gateway in found["egressGateways"]] == [ASIA]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--region", "mars"], f"--region mars: Railway has {ASIA}, "),
        (["--memory-gb", "0"], "--memory-gb takes a number from 0.1 to 1024, not '0'"),
        (["--vcpus", "x"], "--vcpus takes a number from 0.1 to 64, not 'x'"),
        (["--vcpus", "nan"], "--vcpus takes a number from 0.1 to 64, not 'nan'"),
        (["--memory-gb", "999"], "memoryBytes is over the limit of your plan"),
    ],
)
def test_a_setting_that_railway_has_not(base: Project, flags: list[str], message: str) -> None:
    before = base.services
    refused = base.run("deploy", "main.py", "--deployment-id", "bad", *flags, cwd=TINY)
    assert refused.code != 0
    assert message in refused.error
    assert base.services == before
    assert base.active == "fourth"


def test_a_setting_that_railway_does_not_tell(base: Project) -> None:
    """It is not the reason to deploy nothing, and not left unsaid."""
    base.faults({"match": "egressGateways", "error": "Not Authorized"})
    done = base.run("deploy", "main.py", "--deployment-id", "fifth")
    assert done.code == 0, done.err
    assert "static outbound addresses and tracing of fourth are not known" in " ".join(
        done.err.split()
    )
    assert region(base, "fifth") == {ASIA: 1}
