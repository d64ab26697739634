"""Every verb, in the order a team would use them, on one project with real processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, Project, play
from tests.net import eventually


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("baseline")
def test_a_team_goes_through_the_verbs(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


@pytest.fixture(scope="module")
def baseline(project: Project) -> None:
    done = project.ok("scaffold", "main.py")
    assert done["changed"] == ["created the baseline"]
    assert project.services == {"pulse-router", "pulse-env", "pulse-redis", "pulse-janitor"}


def step_01_scaffold_refuses_a_second_time(project: Project) -> None:
    verb = project.run("scaffold", "main.py")
    assert verb.code == 1
    assert "exists already" in verb.error
    assert "ensure" in verb.error


def step_02_ensure_changes_nothing_then_only_what_differs(project: Project) -> None:
    again = project.ok("ensure", "main.py")
    assert again["changed"] == []
    assert again["api_calls"] == 3
    planned = project.ok("ensure", "main.py", "--plan", "--drain-ttl-seconds", "120")["planned"]
    assert "pulse-janitor: PULSE_RAILWAY_DRAIN_TTL_SECONDS 86400 -> 120" in planned
    assert project.variables("pulse-janitor")["PULSE_RAILWAY_DRAIN_TTL_SECONDS"] == "86400"
    assert project.ok("ensure", "main.py", "--drain-ttl-seconds", "120")["changed"] == planned
    assert project.ok("ensure", "main.py", "--drain-ttl-seconds", "120")["changed"] == []


def step_03_deploy_with_variables(project: Project) -> None:
    project.stage.set_variables(
        "pulse-env", {"SECRET_KEY": "from-env", "PORT": "1", "RAILWAY_X": "no", "SHARED": "env"}
    )
    done = project.ok(
        "deploy", "main.py", "--deployment-id", "one", "--env", "SHARED=flag", "--env", "A=b=c"
    )
    assert (done["deployment_id"], done["active"]) == ("one", True)
    seen = project.get("/environment")
    assert seen["SECRET_KEY"] == "from-env"
    assert (seen["SHARED"], seen["A"]) == ("flag", "b=c")
    assert seen["PULSE_APP_FILE"] == "main.py"
    assert seen["PULSE_SERVER_ADDRESS"] == done["address"]
    raw = project.variables("one")
    assert raw["SECRET_KEY"] == "${{pulse-env.SECRET_KEY}}"
    assert raw["PORT"] == "8000"
    assert "RAILWAY_X" not in raw
    assert "PULSE_RAILWAY_REDIS_URL" not in raw  # the tiny app keeps no sessions in Redis
    record = project.records["one"]
    assert record["address"] == "http://one.railway.internal:8000"
    assert (record["state"], record["service_name"]) == ("active", "one")


def step_04_the_same_id_is_refused(project: Project) -> None:
    verb = project.run("deploy", "main.py", "--deployment-id", "one")
    assert verb.code == 1
    assert "exists already" in verb.error
    assert project.active == "one"


def step_05_a_pending_deployment_and_promote(project: Project) -> None:
    done = project.ok("deploy", "main.py", "--deployment-id", "two", "--no-promote")
    assert done["active"] is False
    assert (project.active, project.records["two"]["state"]) == ("one", "pending")
    assert project.get("/_pulse/meta", pulse_deployment="two")["deployment_id"] == "two"
    three = project.deploy("three")
    assert project.active == three
    # a promotion drains only the one that was active
    states = {k: v["state"] for k, v in project.records.items()}
    assert states == {"one": "draining", "two": "pending", "three": "active"}
    assert project.ok("promote", "--deployment-id", "two")["active"] is True
    assert project.get("/_pulse/meta")["deployment_id"] == "two"
    assert project.run("promote", "--deployment-id", "nope").error.endswith(
        "there are: one, three, two"
    )


def step_06_rollback_goes_to_the_one_before(project: Project) -> None:
    assert project.ok("rollback")["deployment_id"] == "three"
    assert project.active == "three"
    assert project.records["two"]["state"] == "draining"


def step_07_status(project: Project) -> None:
    found = project.ok("status")
    assert found["active"] == "three"
    rows = {row["deployment_id"]: row for row in found["deployments"]}
    assert {k: r["state"] for k, r in rows.items()} == {
        "one": "draining",
        "two": "draining",
        "three": "active",
    }
    assert all(row["sessions"] == 0 and row["railway"] == "SUCCESS" for row in rows.values())
    assert found["routers"][0]["requests"] >= 1
    shown = project.run("status")
    assert "three" in shown.out
    assert "draining" in shown.out
    assert "\x1b" not in shown.out


def step_08_redeploy(project: Project) -> None:
    assert project.ok("redeploy")["deployment_id"] == "three"
    assert project.ok("redeploy", "--deployment-id", "one")["deployment_id"] == "one"
    assert project.active == "three"


def step_09_delete_and_remove(project: Project) -> None:
    verb = project.run("delete", "--deployment-id", "three", "--service", "pulse-router")
    assert (verb.code, "is active" in verb.error) == (1, True)
    assert project.ok("delete", "--deployment-id", "one", "--yes")["deleted"] is True
    assert "one" not in project.services | set(project.records)
    project.deploy("prod-261124-000001", "--no-promote")
    project.deploy("prod-261124-000002", "--no-promote")
    verb = project.run("remove", "--deployment-name", "prod")
    assert "prod-261124-000001, prod-261124-000002" in verb.error
    assert project.ok("remove", "--deployment-name", "two")["deployment_id"] == "two"
    project.ok("delete", "--deployment-id", "prod-261124-000002")
    assert project.ok("remove", "--deployment-name", "PROD")["deployment_id"] == (
        "prod-261124-000001"
    )
    assert set(project.records) == {"three"}


def step_10_logs(project: Project) -> None:
    built = project.ok("logs", "--build")
    assert any("FROM python" in line["message"] for line in built["lines"])
    assert project.run("logs", "--service", "pulse-redis").out
    assert "no service is named x" in project.run("logs", "--service", "x").error


def step_11_state_that_redis_lost_comes_back(project: Project) -> None:
    project.deploy("four")
    assert project.variables("pulse-router")["PULSE_RAILWAY_ACTIVE"] == "four"
    before = project.records
    project.redis.flushall()
    eventually(lambda: project.records == before, 20)  # a router writes back what it knows
    assert project.active == "four"
    assert project.get("/_pulse/meta")["deployment_id"] == "four"
    assert "four is active" in project.run("restore").error
    project.redis.flushall()
    project.deploy("next", "--no-promote")  # waits for that
    assert (project.active, project.records["three"]["state"]) == ("four", "draining")
    project.ok("delete", "--deployment-id", "next")


def step_12_the_janitor_keeps_what_is_used_and_forces_what_is_old(project: Project) -> None:
    container = next(
        p
        for p in (project.railway.root / "containers").iterdir()
        if json.loads((project.railway.root / "state.json").read_text())
        and any(
            d["id"] == p.name and d["service_id"] == project.stage.services()["three"]["serviceId"]
            for d in json.loads((project.railway.root / "state.json").read_text())["deployments"]
        )
    )
    (container / "sessions").write_text("2")
    project.stage.run_janitor()
    time.sleep(2.5)
    assert "three" in project.services
    record = project.records["three"] | {"drain_started_at": time.time() - 500}
    project.redis.set("pulse:railway:deployment:three", json.dumps(record))  # TTL is 120 s
    project.stage.run_janitor()
    eventually(lambda: "three" not in project.services | set(project.records), 15)
    assert project.active == "four"


def step_13_the_janitor_removes_dead_deploys_and_refuses_contradictions(project: Project) -> None:
    project.deploy("dead", "--no-promote")
    assert project.records["dead"]["held"]  # on purpose; now as if its deploy had died
    record = project.records["dead"] | {"registered_at": time.time() - 4000, "held": False}
    project.redis.set("pulse:railway:deployment:dead", json.dumps(record))
    project.stage.run_janitor()
    time.sleep(2.5)
    assert "dead" in project.records  # it runs: that is for somebody to decide
    assert any("dead has been pending for" in p for p in project.ok("status")["problems"])
    latest = project.stage.graphql(
        "query L($p: String!, $e: String!, $s: String!) { deployments(first: 1, input:"
        " { projectId: $p, environmentId: $e, serviceId: $s }) { edges { node { id } } } }",
        p=project.id,
        e=project.environment,
        s=project.stage.services()["dead"]["serviceId"],
    )["deployments"]["edges"][0]["node"]["id"]
    project.stage.graphql("mutation R($d: String!) { deploymentRemove(id: $d) }", d=latest)
    project.stage.run_janitor()
    eventually(lambda: "dead" not in project.services | set(project.records), 15)
    project.deploy("five")
    project.redis.delete("pulse:railway:active")
    before = project.services
    project.stage.run_janitor()
    eventually(lambda: project.active == "five", 15)
    assert project.services == before


def step_14_a_second_janitor_run_waits_its_turn(project: Project) -> None:
    project.redis.set("pulse:railway:janitor:lock", "somebody", ex=60)
    project.stage.run_janitor()
    time.sleep(2.5)
    assert "four" in project.services  # drained, but not this run's to delete
    project.redis.delete("pulse:railway:janitor:lock")
    project.stage.run_janitor()
    eventually(lambda: "four" not in project.services, 15)


def step_15_control_and_janitor_fail_outside_railway(project: Project) -> None:
    for words in (["control", "active"], ["janitor", "run"]):
        verb = project.run(*words)
        assert verb.code == 1
        assert "inside the" in verb.err


def step_16_another_command_line_of_0_3(project: Project) -> None:
    """The README of 0.3.x, flag by flag."""
    name = project.railway.graphql(
        "query P($i: String!) { project(id: $i) { name } }", i=project.id
    )["project"]["name"]
    clean = {
        k: v
        for k, v in project.env.items()
        if k not in ("RAILWAY_PROJECT_ID", "RAILWAY_ENVIRONMENT_ID", "RAILWAY_API_TOKEN")
    }
    project.env, kept = clean, project.env
    try:
        target = [
            "--workspace",
            "local",
            "--project",
            name,
            "--environment",
            "production",
            "--token",
            kept["RAILWAY_API_TOKEN"],
        ]
        assert project.run("ensure", "main.py", "--drain-ttl-seconds", "120", *target).code == 0
        verb = project.run(
            "deploy",
            "--deployment-name",
            "My App!",
            "main.py",
            "--context",
            ".",
            *target,
            "--backend-replicas",
            "1",
            "--web-root",
            "web",
        )
        assert verb.code == 0, verb.err
        assert project.run("redeploy", *target).code == 0
        verb = project.run(
            "remove",
            "--service",
            "pulse-router",
            "--deployment-name",
            "five",
            *target,
            "--redis-prefix",
            "pulse:railway",
        )
        assert verb.code == 0, verb.err
    finally:
        project.env = kept
    assert project.active is not None
    assert project.active.startswith("my-app-")


def step_16_an_app_outside_of_the_section(project: Project, tmp_path: Path) -> None:
    """It was once ignored, and the message advised to write it."""
    (tmp_path / "invoke.yaml").write_text("app: main.py\n")
    for verb in ("status", "ensure"):
        refused = project.run(verb, cwd=tmp_path)
        assert "`app: main.py` in invoke.yaml is read in the section pulse_railway" in refused.error
    (tmp_path / "invoke.yaml").write_text("app: shop\n")  # of somebody's own tasks
    assert project.run("status", cwd=tmp_path).code == 0


def step_17_invoke_with_a_configuration_file(project: Project, tmp_path: Path) -> None:
    import shutil
    import subprocess
    import sys

    shutil.copytree(TINY, tmp_path / "p")
    (tmp_path / "p" / "tasks.py").write_text(
        "from invoke import Collection\nfrom pulse_railway import tasks as railway\n"
        "ns = Collection.from_module(railway)\n"
    )
    (tmp_path / "p" / "invoke.yaml").write_text(
        "pulse_railway:\n  app: main.py\n  drain-ttl-seconds: 120\n  rollback_window_seconds: 0\n"
    )
    token = project.env["RAILWAY_API_TOKEN"]
    (tmp_path / "p" / ".env").write_text(f"RAILWAY_API_TOKEN={token}\n")
    env = {k: v for k, v in project.env.items() if k != "RAILWAY_API_TOKEN"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "ensure"],
        cwd=tmp_path / "p",
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing to change" in done.stderr
    assert os.environ.get("RAILWAY_API_TOKEN") != token
