"""Replicas on the local Railway, and the private names of what runs."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.conftest import Project
from tests.net import eventually
from tests.test_local_restart import BY_ITS_PRIVATE_NAME, WEB, Service

UPDATE = """mutation ($s: String!, $e: String!, $i: ServiceInstanceUpdateInput!) {
  serviceInstanceUpdate(serviceId: $s, environmentId: $e, input: $i) }"""
ONE_EACH = {name: {"numReplicas": 1} for name in ("us-west2", "europe-west4-drams3a")}
TWO = {"multiRegionConfig": ONE_EACH}
TELLS_WHICH = "PROBE=$RAILWAY_REPLICA_ID/$RAILWAY_REPLICA_REGION exec python app.py"


def replicas(web: Service, count: int) -> dict[int, tuple[str, ...]]:
    """Return the id and region of each replica that answers by the public address, by process."""
    found: dict[int, tuple[str, ...]] = {}

    def all_answer() -> bool:
        found.clear()
        for _ in range(2 * count + 2):
            if said := web.get():
                found[said["pid"]] = tuple(said["probe"].split("/"))
        return len(found) == count

    eventually(all_answer, 20)
    return found


def none_runs(pids: Iterable[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def hosts(project: Project) -> dict[str, dict[str, int]]:
    path = project.railway.root / f"hosts-{project.environment}.json"
    return dict(json.loads(path.read_text()))


def test_replicas_are_processes_of_their_own(new_project: Callable[[], Project]) -> None:
    web = Service(new_project(), "web", TELLS_WHICH, **TWO)
    two = replicas(web, 2)
    assert len({id for id, _ in two.values()}) == 2
    assert {region for _, region in two.values()} == {"us-west2", "europe-west4-drams3a"}
    assert {web.inside(BY_ITS_PRIVATE_NAME) for _ in range(3)} == {"200"}

    # a crash restarts one alone, with another id in its region
    crashed, kept = two
    os.kill(crashed, signal.SIGKILL)
    eventually(lambda: crashed not in replicas(web, 2), 20)
    after = replicas(web, 2)
    assert after[kept] == two[kept]
    assert {region for _, region in after.values()} == {region for _, region in two.values()}

    # another number starts and ends those that it adds and takes, and deploys nothing
    deployment = web.deployment["id"]
    for count in (3, 1):
        web.ask(UPDATE, **web.where, i={"multiRegionConfig": {"us-west2": {"numReplicas": count}}})
        now = replicas(web, count)
        assert web.deployment["id"] == deployment
        assert count == 1 or set(after) < set(now)
    eventually(functools.partial(none_runs, set(after) - set(now)), 20)

    # a new deployment and a restart have as many
    web.ask(UPDATE, **web.where, i=TWO)
    before = replicas(web, 2)
    for again in (web.deploy, web.restart):
        again()
        eventually(functools.partial(none_runs, before), 20)
        before = replicas(web, 2)
    web.ask("mutation ($s: String!) { serviceDelete(id: $s) }", s=web.where["s"])
    eventually(lambda: none_runs(before), 20)


def test_a_router_with_two_replicas(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.ok("ensure", "main.py", "--router-replicas", "2")
    project.deploy("first")
    eventually(lambda: len(list(project.redis.scan_iter("pulse:railway:router:*"))) == 2, 20)
    for _ in range(4):
        assert project.get("/_pulse/meta")["deployment_id"] == "first"
    project.deploy("second")  # its promotion waits for both
    assert project.get("/_pulse/meta")["deployment_id"] == "second"
    assert project.ok("status")["problems"] == []


def test_a_private_name_goes_when_its_service_does(new_project: Callable[[], Project]) -> None:
    project = new_project()
    web = Service(project, "web", WEB, restartPolicyType="NEVER")
    name = "{}.railway.internal".format
    assert name("web") in hosts(project)
    rename = 'mutation ($s: String!) { serviceUpdate(id: $s, input: { name: "shop" }) { id } }'
    web.ask(rename, s=web.where["s"])
    assert {name("web"), name("shop")} & set(hosts(project)) == {name("shop")}
    os.kill(web.get()["pid"], signal.SIGKILL)
    eventually(lambda: web.status == "CRASHED", 20)
    assert name("shop") not in hosts(project)
    web.restart()
    eventually(lambda: name("shop") in hosts(project), 20)
    web.ask("mutation ($s: String!) { serviceDelete(id: $s) }", s=web.where["s"])
    assert name("shop") not in hosts(project)
