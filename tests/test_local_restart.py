"""Restarts on the local Railway: what a container finds, what it loses, and who reaches it."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples import demo
from pulse_railway.errors import Failure
from pulse_railway.local.guard import PAGE_FILE
from pulse_railway.local.server import LocalRailway
from pulse_railway.local.state import Deployment, Domain, State
from pulse_railway.local.supervisor import free_port
from tests.conftest import Project
from tests.net import eventually

APP = """
import json, os, subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer

children = [
    subprocess.Popen(["sleep", "321"], start_new_session=True),
    subprocess.Popen(["sleep", "321"], env={}),
]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        seen = {"pid": os.getpid(), "probe": os.environ.get("PROBE")}
        body = json.dumps({**seen, "children": [child.pid for child in children]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
BY_ITS_PRIVATE_NAME = (
    "python -c 'import urllib.request as r;"
    ' print(r.urlopen("http://web.railway.internal:8000").status)\''
)


def shell(stage: demo.Stage, service: str, command: str) -> subprocess.CompletedProcess[str]:
    """`railway ssh --service <service> -- <command>`."""
    words = ["railway", "ssh", "-i", stage.env["PULSE_RAILWAY_SSH_KEY"], "-s", service]
    return subprocess.run(
        [*words, "--", command], env=stage.env, capture_output=True, text=True, timeout=60
    )


class Service:
    """A service `name` that runs an upload with this `CMD`, its PROBE set before, and a domain."""

    def __init__(self, project: Project, name: str, cmd: str, **settings: Any) -> None:
        self.project, self.name, self.ask = project, name, project.railway.graphql
        self.where = {"s": self.make(), "e": project.environment}
        self.set_probe("of its deployment")
        if settings:
            self.ask(
                "mutation ($s: String!, $e: String!, $i: ServiceInstanceUpdateInput!)"
                " { serviceInstanceUpdate(serviceId: $s, environmentId: $e, input: $i) }",
                **self.where,
                i=settings,
            )
        domain = self.ask(
            "mutation ($s: String!, $e: String!) { serviceDomainCreate(input:"
            " { serviceId: $s, environmentId: $e }) { domain } }",
            **self.where,
        )["serviceDomainCreate"]["domain"]
        self.address = f"https://{domain}"
        self.upload({"Dockerfile": f"FROM python\nCMD {cmd}\n", "app.py": APP})
        eventually(lambda: self.status == "SUCCESS", 20)
        if cmd == WEB:  # without a health check, it has not to answer yet
            eventually(self.get, 20)

    def make(self) -> str:
        created = self.ask(
            "mutation ($p: String!, $n: String!)"
            " { serviceCreate(input: { projectId: $p, name: $n }) { id } }",
            p=self.project.id,
            n=self.name,
        )
        return str(created["serviceCreate"]["id"])

    def upload(self, files: dict[str, str]) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, text in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text.encode()))
        railway, where = self.project.railway, f"{self.project.id}/environment/{self.where['e']}"
        httpx.post(
            railway.api.replace("/graphql/v2", f"/project/{where}/up"),
            params={"serviceId": self.where["s"]},
            content=buffer.getvalue(),
            headers={"Authorization": f"Bearer {railway.env['RAILWAY_API_TOKEN']}"},
        ).raise_for_status()

    def set_probe(self, value: str) -> None:
        self.project.stage.set_variables(self.name, {"PROBE": value, "PORT": "8000"})

    @property
    def deployment(self) -> dict[str, Any]:
        found = self.ask(
            "query ($s: String!, $e: String!) { serviceInstance(serviceId: $s, environmentId: $e)"
            " { latestDeployment { id status deploymentStopped } } }",
            **self.where,
        )
        return dict(found["serviceInstance"]["latestDeployment"])

    @property
    def status(self) -> str:
        return str(self.deployment["status"])

    def restart(self) -> None:
        self.ask("mutation ($i: String!) { deploymentRestart(id: $i) }", i=self.deployment["id"])

    def deploy(self) -> None:
        self.ask(
            "mutation ($s: String!, $e: String!)"
            " { serviceInstanceDeployV2(serviceId: $s, environmentId: $e) }",
            **self.where,
        )

    def get(self) -> dict[str, Any]:
        """What its process says by its public address; nothing where none answers."""
        answer = self.project.stage.get(self.address)
        return dict(answer.json()) if answer.status_code == 200 else {}

    def another_than(self, before: dict[str, Any]) -> dict[str, Any]:
        """What the next process says, once it answers."""
        eventually(lambda: self.get().get("pid", before["pid"]) != before["pid"], 20)
        return self.get()

    def inside(self, command: str) -> str:
        done = shell(self.project.stage, self.name, command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


WEB = '["python", "app.py"]'


def gone(before: dict[str, Any]) -> bool:
    """Have a process and its children ended?"""
    return not any(Path(f"/proc/{pid}").exists() for pid in (before["pid"], *before["children"]))


@pytest.mark.parametrize("way", ["deploymentRestart", "a crash"])
def test_a_restart_has_the_variables_of_its_deployment(
    new_project: Callable[[], Project], way: str
) -> None:
    web = Service(new_project(), "web", WEB)
    before = web.get()
    assert before["probe"] == "of its deployment"
    web.set_probe("newer")  # with skipDeploys
    if way == "a crash":
        os.kill(before["pid"], signal.SIGKILL)
    else:
        web.restart()
    restarted = web.another_than(before)
    assert restarted["probe"] == "of its deployment"
    assert web.inside("echo $PROBE") == "of its deployment"
    web.deploy()
    assert web.another_than(restarted)["probe"] == "newer"
    assert web.inside("echo $PROBE") == "newer"
    assert (web.project.railway.root / "state.json").stat().st_mode & 0o777 == 0o600


def test_a_cron_run_has_the_variables_of_its_deployment(
    new_project: Callable[[], Project],
) -> None:
    name = f"cron-{time.monotonic_ns()}"
    cron = Service(new_project(), name, 'echo "it is $PROBE"', cronSchedule="0 0 1 1 *")
    cron.set_probe("newer")
    assert cron.project.railway.local(f"cron/{name}", {}) == {
        "exit": 0,
        "log": ["it is of its deployment"],
    }
    cron.deploy()
    eventually(lambda: cron.status == "SUCCESS")
    assert cron.project.railway.local(f"cron/{name}", {}) == {"exit": 0, "log": ["it is newer"]}


def test_a_restarted_service_is_reached_by_every_way(new_project: Callable[[], Project]) -> None:
    web = Service(new_project(), "web", WEB)
    before, deployment = web.get(), web.deployment
    web.restart()
    assert web.status == "DEPLOYING"
    said, answered = shell(web.project.stage, "web", "true").stderr, web.get()
    # meanwhile, but for a machine that is so slow that it is up again
    assert "No target found for" in said or web.status == "SUCCESS"
    assert answered == {} or web.status == "SUCCESS"
    web.another_than(before)
    assert web.deployment == deployment
    eventually(lambda: gone(before))
    time.sleep(1)  # what ended the older one has ended
    assert web.inside("ls") == "Dockerfile\napp.py"
    assert web.inside(BY_ITS_PRIVATE_NAME) == "200"
    again = web.get()
    web.restart()
    web.another_than(again)
    assert web.inside("ls") == "Dockerfile\napp.py"


def test_a_deployment_that_crashed_is_reached_after_its_restart_alone(
    new_project: Callable[[], Project],
) -> None:
    web = Service(new_project(), "web", WEB, restartPolicyType="NEVER")
    before = web.get()
    os.kill(before["pid"], signal.SIGKILL)
    eventually(lambda: web.status == "CRASHED")
    assert "No target found for" in shell(web.project.stage, "web", "true").stderr
    assert web.get() == {}
    web.restart()
    web.another_than(before)
    assert web.status == "SUCCESS"
    assert web.inside("ls") == "Dockerfile\napp.py"


def test_children_of_a_killed_process_end_with_it(new_project: Callable[[], Project]) -> None:
    """Also one in a session of its own, and one without the environment that marks it."""
    web = Service(new_project(), "web", WEB)
    before = web.get()
    os.kill(before["pid"], signal.SIGKILL)
    after = web.another_than(before)
    eventually(lambda: gone(before))
    assert web.inside("ls") == "Dockerfile\napp.py"
    assert web.inside(BY_ITS_PRIVATE_NAME) == "200"
    web.deploy()
    last = web.another_than(after)
    eventually(lambda: gone(after))
    web.project.railway.graphql(
        "mutation ($s: String!) { serviceDelete(id: $s) }", s=web.where["s"]
    )
    eventually(lambda: gone(last))


def test_redis_has_what_its_last_snapshot_has(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.ok("ensure", "main.py")
    process = project.redis_process()

    def restarted() -> bool:
        return project.redis_process() not in (None, process)

    project.redis.set("key", "older")
    snapshot = project.snapshot()
    project.redis.set("key", "newer")
    ask, where = project.railway.graphql, project.stage.services()["pulse-redis"]
    latest = ask(
        "query ($s: String!, $e: String!) { serviceInstance(serviceId: $s, environmentId: $e)"
        " { latestDeployment { id } } }",
        s=where["serviceId"],
        e=project.environment,
    )["serviceInstance"]["latestDeployment"]["id"]
    ask("mutation ($i: String!) { deploymentRestart(id: $i) }", i=latest)  # with SIGTERM
    eventually(restarted)
    assert project.redis.get("key") == "newer"

    project.redis.set("key", "lost")
    process = project.redis_process()
    assert process
    os.kill(process, signal.SIGKILL)
    eventually(restarted)
    assert project.redis.get("key") == "newer"

    project.restore_snapshot(snapshot)
    assert project.redis.get("key") == "older"


def test_ports_that_others_have_by_now_are_replaced(tmp_path: Path) -> None:
    """State of older versions has ephemeral ports: the local Railway did not start again."""
    local = LocalRailway(tmp_path)
    service = local.state.add_service(local.state.projects[0], "web")
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
        socket.create_server(("127.0.0.1", 0)) as three,
    ):
        taken = {sock.getsockname()[1] for sock in (one, two, three)}
        local.state.api_port, local.state.ssh_port, port = taken
        kept = free_port()
        for number in (port, kept):
            domain = Domain(str(number), f"localhost:{number}", number, None)
            service.instances[0].domains.append(domain)
        local.state.save()
        again = LocalRailway(tmp_path)
        again.claim()
    state = State(tmp_path)
    found = [d.port for d in state.services[0].instances[0].domains]
    assert found[1] == kept
    assert taken.isdisjoint({state.api_port, state.ssh_port, *found})
    assert state.services[0].instances[0].domains[0].domain == f"localhost:{found[0]}"
    assert again.url in again.supervisor.api_url
    assert again.url in (tmp_path / PAGE_FILE).read_text()


def test_one_local_railway_runs_in_a_folder(railway: demo.Stage) -> None:
    """A second one ended the processes of the first."""
    second = LocalRailway(railway.root)
    with pytest.raises(Failure, match="another local Railway runs in"):
        second.claim()
    command = [sys.executable, "-m", "pulse_railway.local.server", str(railway.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert railway.local("stats")


def test_a_state_file_of_an_older_version_gets_what_deployments_lack(tmp_path: Path) -> None:
    state = State(tmp_path)
    project = state.projects[0]
    service = state.add_service(project, "web")
    instance = service.instances[0]
    instance.variables["PROBE"] = "set"
    where = (project.id, instance.environment_id, service.id)
    for name, status in (("live", "SUCCESS"), ("gone", "REMOVED")):
        state.deployments.append(Deployment(name, *where, status, variables={"PROBE": "own"}))
    state.save()
    kept = State(tmp_path)
    assert [d.variables for d in kept.deployments] == [{"PROBE": "own"}, {}]
    data = json.loads(state.path.read_text())
    for deployment in data["deployments"]:
        del deployment["variables"]
    state.path.write_text(json.dumps(data))
    older = State(tmp_path).deployment("live")
    assert older
    assert older.variables["PROBE"] == "set"
