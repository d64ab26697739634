"""The local Railway itself: it outlives a restart, and what it started ends with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from examples import demo
from pulse_railway.local import guard
from pulse_railway.local.supervisor import cron_matches
from tests.conftest import TINY, Project, Redis, pulse_railway, redis_of, set_faults
from tests.net import eventually
from tests.test_local_restart import shell


def deployed(stage: demo.Stage) -> str:
    """A baseline and a deployment `one`; the address they have."""
    for arguments in (["ensure", "main.py"], ["deploy", "main.py", "--deployment-id", "one"]):
        verb = pulse_railway(*arguments, "--json", env=stage.env, cwd=TINY)
        assert verb.code == 0, verb.err
    return str(verb.json["address"])


def serves(stage: demo.Stage, address: str) -> bool:
    answer = stage.get(f"{address}/_pulse/meta")
    return bool(answer.status_code == 200 and answer.json()["deployment_id"] == "one")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_deployed_is_there_after_a_restart(tmp_path: Path, end: signal.Signals) -> None:
    root = tmp_path.resolve()
    with demo.stage(root) as stage:
        address = deployed(stage)
        services = stage.services()
        stage.set_variables("one", {"GREETING": "of the next deployment"})
        if end == signal.SIGKILL:
            redis_of(stage).save()  # which it does at SIGTERM by itself
        os.kill(stage.process.pid, end)
        stage.process.wait(30)
        if end == signal.SIGTERM:
            assert demo.processes_of(root) == []
    with demo.stage(root) as stage:
        assert stage.services() == services
        eventually(lambda: serves(stage, address), 30)
        assert shell(stage, "one", 'ls Dockerfile; echo "$GREETING."').stdout == "Dockerfile\n.\n"
    assert demo.processes_of(root) == []


def test_a_cron_run_ends_with_it(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    with demo.stage(root) as stage:
        deployed(stage)
        before = set(demo.processes_of(root))
        stage.run_janitor()
        eventually(lambda: set(demo.processes_of(root)) - before)
    assert demo.processes_of(root) == []


def test_a_container_ends_with_all_it_started(new_project: Callable[[], Project]) -> None:
    """`pulse run` starts uvicorn on a pty of its own, outside of its process group."""
    project = new_project()
    project.ok("ensure", "main.py")
    project.deploy("one")
    running = demo.processes_of(project.railway.root)
    service = project.stage.services()["one"]["serviceId"]
    project.railway.graphql(
        "mutation ($s: String!, $c: String!) {"
        " serviceInstanceUpdate(serviceId: $s, input: { startCommand: $c }) }",
        s=service,
        c="sh -c 'setsid sleep 321 & setsid nohup sleep 321 & exec python backend.py'",
    )
    project.ok("redeploy", "--deployment-id", "one")
    project.deploy("two")
    found = set(demo.processes_of(project.railway.root)) - set(running)
    sleeping = [pid for pid in found if b"321" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(sleeping) == 2
    assert project.run("delete", "--deployment-id", "one").code == 0
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in sleeping), 15)


def test_a_newer_deployment_is_not_replaced_by_a_slow_older_one(
    new_project: Callable[[], Project],
) -> None:
    """Nor does the older one count as failed: what came up is what was asked for last."""
    project = new_project()
    ask = project.railway.graphql
    service = ask(
        "mutation ($p: String!, $e: String) {"
        ' serviceCreate(input: { projectId: $p, environmentId: $e, name: "cache" }) { id } }',
        p=project.id,
        e=project.environment,
    )["serviceCreate"]["id"]

    def deploy(*before: str) -> str:
        return str(
            ask(
                "mutation ($s: String!, $e: String!, $c: [String!]) {"
                " serviceInstanceUpdate(serviceId: $s, environmentId: $e,"
                '  input: { source: { image: "redis:7" }, preDeployCommand: $c })'
                " serviceInstanceDeployV2(serviceId: $s, environmentId: $e) }",
                **{"s": service, "e": project.environment, "c": list(before)},
            )["serviceInstanceDeployV2"]
        )

    def status(deployment: str) -> str:
        found = ask("query ($d: String!) { deployment(id: $d) { status } }", d=deployment)
        return str(found["deployment"]["status"])

    slow = deploy("sleep 2")
    logs = "query ($d: String!) { deploymentLogs(deploymentId: $d) { message } }"
    eventually(lambda: ask(logs, d=slow)["deploymentLogs"])
    quick = deploy()
    eventually(lambda: status(quick) == "SUCCESS")
    assert status(slow) == "REMOVED"
    time.sleep(3)
    assert (status(slow), status(quick)) == ("REMOVED", "SUCCESS")
    running = demo.processes_of(project.railway.root)
    assert len([pid for pid in running if os.readlink(f"/proc/{pid}/cwd").endswith(service)]) == 1


def test_what_others_do_beside_our_verbs(new_project: Callable[[], Project]) -> None:
    """Railway's page, its CLI, another tool: environments, names, sources, variables, domains."""
    project = new_project()
    ask, scope = project.railway.graphql, {"p": project.id, "e": project.environment}
    service = ask(
        'mutation ($p: String!) { serviceCreate(input: { projectId: $p, name: "web" }) { id } }',
        p=project.id,
    )["serviceCreate"]["id"]
    own = {**scope, "s": service}
    variables = (
        "query ($p: String!, $e: String!, $s: String)"
        " { variables(projectId: $p, environmentId: $e, serviceId: $s, unrendered: true) }"
    )

    def upsert(replace: bool, values: dict[str, str], **where: str) -> dict[str, str]:
        ask(
            "mutation ($i: VariableCollectionUpsertInput!) { variableCollectionUpsert(input: $i) }",
            i={
                "projectId": project.id,
                "environmentId": project.environment,
                "variables": values,
                "replace": replace,
                **where,
            },
        )
        found = ask(variables, **(own if where else scope))["variables"]
        return {k: v for k, v in found.items() if not k.startswith("RAILWAY_")}

    assert upsert(False, {"A": "1", "B": "2"}, serviceId=service) == {"A": "1", "B": "2"}
    assert upsert(True, {"C": "3"}, serviceId=service) == {"C": "3"}
    upsert(False, {"SHARED": "1"})
    assert upsert(True, {"OTHER": "2"}) == {"OTHER": "2"}
    ask(
        "mutation ($p: String!, $e: String!) { variableDelete(input:"
        ' { projectId: $p, environmentId: $e, name: "OTHER" }) }',
        **scope,
    )
    assert ask(variables, **scope)["variables"] == {}

    renamed = ask(
        'mutation ($s: String!) { serviceUpdate(id: $s, input: { name: "front" }) { name }'
        ' serviceConnect(id: $s, input: { repo: "team/app" }) { id } }',
        s=service,
    )
    assert renamed["serviceUpdate"]["name"] == "front"
    assert project.services == {"front"}

    domain = ask(
        "mutation ($s: String!, $e: String!) { serviceDomainCreate(input:"
        " { serviceId: $s, environmentId: $e, targetPort: 80 }) { id domain } }",
        s=service,
        e=project.environment,
    )["serviceDomainCreate"]
    update = "mutation ($i: ServiceDomainUpdateInput!) { serviceDomainUpdate(input: $i) }"
    given = {"serviceId": service, "environmentId": project.environment}
    given |= {"serviceDomainId": domain["id"], "domain": domain["domain"]}
    assert ask(update, i={**given, "targetPort": 8000})["serviceDomainUpdate"] is True
    for wrong, said in (
        ({"domain": "other.example"}, "cannot rename"),
        ({"serviceDomainId": "0"}, "not found"),
    ):
        with pytest.raises(RuntimeError, match=said):
            ask(update, i={**given, **wrong})
    remove = "mutation ($d: String!) { serviceDomainDelete(id: $d) }"
    assert ask(remove, d=domain["id"])["serviceDomainDelete"] is True
    with pytest.raises(RuntimeError, match="not found"):
        ask(remove, d=domain["id"])

    other = ask(
        'mutation ($p: String!) { environmentCreate(input: { projectId: $p, name: "staging" })'
        " { id name } }",
        p=project.id,
    )["environmentCreate"]
    assert other["name"] == "staging"
    verb = project.run("status", "--environment", "staging")
    assert "problem: there is no baseline in this environment" in verb.out
    delete = "mutation ($e: String!) { environmentDelete(id: $e) }"
    assert ask(delete, e=other["id"])["environmentDelete"] is True
    with pytest.raises(RuntimeError, match="the last environment"):
        ask(delete, e=project.environment)


def test_orders_that_are_not_understood(railway: demo.Stage) -> None:
    url = railway.api.replace("/graphql/v2", "/local/faults")
    for wrong in (
        b"{",
        b"[]",
        b'{"fault": []}',
        b'{"faults": [{"mach": "ssh"}]}',
        b'{"faults": 1}',
        b'{"edge": "pdf"}',
    ):
        headers = {**guard.key_header(railway.root), "content-type": "application/json"}
        answer = httpx.post(url, content=wrong, headers=headers)
        assert answer.status_code == 400, wrong
        assert answer.json()["message"].startswith("not a fault that is known")


def test_a_build_fails_where_a_source_is_missing(project: Project, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:3.12\nCOPY requirements.txt .\nCMD sleep 9\n")
    where = {"projectId": project.id, "environmentId": project.environment, "name": "lacking"}
    create = "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }"
    project.railway.graphql(create, i=where)
    command = ["railway", "up", "--service", "lacking"]
    done = subprocess.run(command, cwd=tmp_path, env=project.env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "'requirements.txt': not found in the upload" in done.stdout


def test_a_redis_of_the_tests_loads_no_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump.rdb in the temporary folder was loaded by every Redis, and failed ten tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = Redis()
    try:
        server.client.set("key", "value")
        server.client.save()
        made = Path(str(server.client.config_get("dir")["dir"]), "dump.rdb")
        shutil.copy(made, tmp_path)
        server.stop()
        server.start()
        assert server.client.dbsize() == 0
    finally:
        server.stop()
    assert [p.name for p in tmp_path.iterdir()] == ["dump.rdb"]


def test_a_rate_limit(railway: demo.Stage) -> None:
    set_faults(railway, rate_limit=2)
    try:
        headers = {"Authorization": f"Bearer {railway.env['RAILWAY_API_TOKEN']}"}
        body = {"query": "query { me { id } }"}
        said = [httpx.post(railway.api, json=body, headers=headers) for _ in range(3)]
        assert [answer.status_code for answer in said] == [200, 200, 429]
        assert int(said[2].headers["retry-after"]) <= 61
    finally:
        set_faults(railway)


@pytest.mark.parametrize(
    ("schedule", "matches"),
    [
        ("*/5 * * * *", True),
        ("10 8 * * *", True),
        ("0-20/10 8 24 11 2", True),
        ("7,10 6-9 * * 1-5", True),
        ("*/7 * * * *", False),
        ("10 9 * * *", False),
        ("10 8 * * 0", False),
        ("10 8 * *", False),
    ],
)
def test_cron_schedules(schedule: str, matches: bool) -> None:
    tuesday = datetime(2026, 11, 24, 8, 10, tzinfo=UTC)
    assert cron_matches(schedule, tuesday) is matches
