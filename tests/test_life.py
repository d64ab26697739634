"""Canary, bake, deploy lock, maintenance and notifications, by verbs on a local Railway."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples import demo
from pulse_railway import runtime_image
from tests.conftest import ROOT, TINY, Project, play
from tests.net import eventually


def record(project: Project, name: str) -> dict[str, Any]:
    return project.records[name]


def address(project: Project) -> str:
    return str(project.ok("status")["address"])


def visits(project: Project, url: str, count: int = 40) -> list[str]:
    """Return the deployment that answers each of `count` new visitors."""
    trust = demo.tls_context(project.stage.bundle)
    answered = []
    with httpx.Client(verify=trust, trust_env=False) as client:
        for n in range(count):
            agent = {"user-agent": f"visitor {n}"}
            answer = client.get(f"{url}/_pulse/meta", headers=agent).json()
            answered.append(answer["deployment_id"])
            client.cookies.clear()
    return answered


@contextlib.contextmanager
def traffic(project: Project, url: str, path: str = "/work") -> Iterator[None]:
    """Send requests all the time, as visitors do, from six addresses."""
    done = threading.Event()
    trust = demo.tls_context(project.stage.bundle)

    def visit() -> None:
        with contextlib.ExitStack() as stack:
            clients = []
            for n in range(2, 8):
                transport = httpx.HTTPTransport(verify=trust, local_address=f"127.0.0.{n}")
                client = httpx.Client(transport=transport, trust_env=False)
                clients.append(stack.enter_context(client))
            for client in itertools.cycle(clients):
                if done.wait(0.03):
                    return
                with contextlib.suppress(httpx.HTTPError):
                    client.get(url + path)

    thread = threading.Thread(target=visit)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.timeout(900)
def test_canary_bake_lock_and_maintenance(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def step_01_a_canary_gets_a_share_and_is_ended(base: Project) -> None:
    done = base.ok("deploy", "main.py", "--deployment-id", "second", "--canary", "40")
    assert (done["active"], done["canary"], base.active) == (False, 40, "first")
    url = done["address"]
    eventually(lambda: set(visits(base, url)) == {"first", "second"})
    before = visits(base, url)
    status = base.ok("status")
    assert (status["canary"]["deployment_id"], status["canary"]["weight"]) == ("second", 40)
    assert "second gets 40 % of the new visitors" in base.run("status").out
    refused = base.run("deploy", "main.py", "--deployment-id", "third", "--canary", "5")
    assert "second is the canary already, with 40 %" in refused.error
    assert "third" not in base.services
    base.ok("promote", "--deployment-id", "second", "--weight", "75")
    eventually(lambda: visits(base, url).count("second") > before.count("second"))
    after = visits(base, url)
    assert all(new == "second" for old, new in zip(before, after, strict=True) if old == "second")
    ended = base.ok("rollback", "--message", "not today")
    assert (ended["deployment_id"], ended["ended"]) == ("first", "second")
    eventually(lambda: set(visits(base, url)) == {"first"})
    assert record(base, "second")["state"] == "draining"
    refused = base.run("rollback")
    assert "no earlier deployment" in refused.error  # not to the rolled back version
    assert base.run("promote", "--deployment-id", "first", "--weight", "5").code == 1


def step_02_a_canary_is_promoted(base: Project) -> None:
    base.ok("promote", "--deployment-id", "second", "--weight", "10")
    assert record(base, "second")["state"] == "pending"
    done = base.ok("promote", "--deployment-id", "second")
    assert (done["active"], base.active) == (True, "second")
    assert "weight" not in record(base, "second")
    assert base.ok("rollback")["deployment_id"] == "first"
    assert "second" not in visits(base, done["address"])


def step_03_another_promotion_ends_a_canary(base: Project) -> None:
    base.ok("promote", "--deployment-id", "second", "--weight", "100")
    base.deploy("hotfix")
    assert base.active == "hotfix"
    former = record(base, "second")
    assert (former["state"], former["held"], "weight" in former) == ("pending", True, False)
    assert base.ok("status")["canary"] is None
    base.ok("delete", "--deployment-id", "second", "--yes")
    base.ok("rollback")


def step_04_a_first_deployment_cannot_be_a_canary(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.ok("ensure", "main.py")
    verb = project.run("deploy", "main.py", "--canary", "10")
    assert "none is active" in verb.error
    assert project.services == {"pulse-router", "pulse-env", "pulse-redis", "pulse-janitor"}
    assert project.ok("status")["lock"] is None
    assert (
        "excludes --canary"
        in project.run("deploy", "main.py", "--canary", "5", "--no-promote").error
    )
    assert "from 0 to 100" in project.run("deploy", "main.py", "--canary", "101").error


def step_05_a_bake_rolls_back(base: Project) -> None:
    assert base.active == "first"
    url = address(base)
    with traffic(base, url):
        time.sleep(3)  # requests to compare with
        verb = base.run(
            "deploy", "main.py", "--deployment-id", "bad", "--bake", "60", "--env", "TINY_BROKEN=1"
        )
    assert verb.code == 1
    assert "bad did worse, and first is active again" in verb.error
    assert base.active == "first"
    assert base.services >= {"bad"}  # it still has tabs
    rejected = record(base, "bad")
    assert rejected["state"] == "draining"
    assert rejected["rejected_at"]
    assert "bake" not in rejected
    assert base.ok("status")["lock"] is None
    last = base.ok("history")["history"][-1]
    assert (last["what"], last["deployment_id"], last["active"]) == ("rollback", "first", "bad")
    assert last["why"].startswith("bake: ")
    assert re.search(r"of \d visitors, \d+\.\d% failed \(\d+ answered 5xx\)", last["why"])
    assert base.variables("pulse-router")["PULSE_RAILWAY_ACTIVE"] == "first"


def step_06_a_bake_of_a_canary_ends_it(base: Project) -> None:
    url = address(base)
    with traffic(base, url):
        verb = base.run("promote", "--deployment-id", "bad", "--weight", "100", "--bake", "60")
    assert "bad did worse and is no canary any more" in verb.error
    assert (base.active, record(base, "bad")["state"]) == ("first", "draining")


def step_07_a_bake_that_goes_well_and_one_that_is_killed(base: Project) -> None:
    url = address(base)
    with traffic(base, url):
        done = base.ok("deploy", "main.py", "--deployment-id", "good", "--bake", "12")
    assert done["bake"]["verdict"] == "well"
    assert done["bake"]["good"]["failed"] == 0
    assert done["bake"]["good"]["visitors"] >= 5
    assert "bake" not in record(base, "good")
    assert base.ok("status")["problems"] == []
    command = ["promote", "--deployment-id", "first", "--bake", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pulse_railway", *command], cwd=TINY, env=base.env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    eventually(lambda: base.active == "first", 60)
    process.kill()
    process.wait()
    assert base.active == "first"
    raw = record(base, "first")
    raw["bake"]["until"] = time.time() - 100
    base.redis.set("pulse:railway:deployment:first", json.dumps(raw))
    assert "the bake of first was cut off" in base.ok("status")["problem"]
    base.ok("promote", "--deployment-id", "first")
    assert base.ok("status")["problems"] == []


def step_07b_a_bake_that_another_promotion_overtakes_says_so(base: Project) -> None:
    command = ["promote", "--deployment-id", "good", "--bake", "60", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pulse_railway", *command], cwd=TINY, env=base.env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    eventually(lambda: base.active == "good", 60)
    base.ok("promote", "--deployment-id", "first")
    stdout, stderr = process.communicate(timeout=60)
    result = json.loads(stdout)
    assert process.returncode == 0, stderr
    assert (result["active"], result["bake"]["verdict"]) == (False, "over: first took its place")


def step_08_one_deploy_at_a_time(base: Project) -> None:
    key = "pulse:railway:deploy:lock"
    now = time.time()
    lock = {"holder": "x", "by": "eve@laptop", "since": now - 60, "until": now + 600}
    base.redis.set(key, json.dumps(lock))
    assert "eve@laptop has been deploying for 1 m" in base.run("status").out
    waited = base.run("deploy", "main.py", "--deployment-id", "late", "--lock-wait", "1")
    assert "eve@laptop deploys since" in waited.error
    assert "pulse-railway unlock" in waited.error
    assert "late" not in base.services
    racing = base.run("deploy", "main.py", "--deployment-id", "racing")
    assert racing.code == 0
    assert "warning: eve@laptop deploys since" in racing.err
    assert json.loads(base.redis.get(key) or "") == lock
    waiting: list[Any] = []
    thread = threading.Thread(
        target=lambda: waiting.append(
            base.run("deploy", "main.py", "--deployment-id", "waits", "--lock-wait", "120")
        )
    )
    thread.start()
    time.sleep(4)
    assert base.ok("unlock", "--yes")["lock"]["by"] == "eve@laptop"
    thread.join()
    assert waiting[0].code == 0, waiting[0].err
    assert "eve@laptop deploys since" in waiting[0].err
    assert base.redis.get(key) is None  # released
    expired = lock | {"until": now - 1}
    base.redis.set(key, json.dumps(expired))
    base.deploy("after", "--lock-wait", "0")
    assert base.redis.get(key) is None
    failed = base.run(
        "deploy",
        "main.py",
        "--deployment-id",
        "broken",
        "--env",
        "TINY_FAILS=x",
        "--lock-wait",
        "5",
    )
    assert failed.code == 1
    assert base.redis.get(key) is None


def step_09_maintenance(base: Project, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<h1>Tea — back at five</h1> \"quoted\" 'too' $HOME `x`\n")
    done = base.ok("maintenance", "on", "--page", str(page), "--message", "moving house")
    url = done["address"]
    trust = demo.tls_context(base.stage.bundle)
    with httpx.Client(verify=trust, trust_env=False) as client:
        eventually(lambda: client.get(url).status_code == 503)
        answer = client.get(url, headers={"accept": "text/html"})
        assert answer.text == page.read_text()
        assert answer.headers["retry-after"] == "30"
        assert client.get(f"{url}/_pulse/health").status_code == 200
        assert "maintenance for" in base.run("status").out
        assert base.ok("status")["maintenance"]["by"]
        base.deploy("in-maintenance")  # maintenance allows a deploy
        assert base.active == "in-maintenance"
        assert client.get(url).status_code == 503
        base.ok("maintenance", "off")
        eventually(lambda: client.get(url).status_code == 200)
    whats = [entry["what"] for entry in base.ok("history")["history"]]
    assert whats[-3:] == ["maintenance on", "promote", "maintenance off"]
    assert "on, or maintenance off?" in base.run("maintenance", "maybe").error
    page.write_text("x" * 30_000)
    assert "larger than 24 KB" in base.run("maintenance", "on", "--page", str(page)).error


class Listener:
    """A server that records notifications."""

    def __init__(self, status: int = 200) -> None:
        received = self.received = []  # type: ignore[var-annotated]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks/T0SECRET"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def step_10_notifications(base: Project) -> None:
    listener, failing = Listener(), Listener(500)
    base.deploy("told", "--notify", listener.url)
    assert listener.received[-1]["ok"] is True
    assert listener.received[-1]["text"].startswith("told is active at https://")
    env = {"PULSE_RAILWAY_NOTIFY_URL": listener.url}
    base.run("deploy", "main.py", "--deployment-id", "no", "--env", "TINY_FAILS=x", **env)
    assert listener.received[-1]["text"].startswith("deploy failed: the build or start ended")
    assert (listener.received[-1]["ok"], listener.received[-1]["deployment_id"]) == (False, "no")
    base.ok("rollback", **env)
    assert (listener.received[-1]["event"], listener.received[-1]["ok"]) == ("rollback", True)
    verb = base.run("promote", "--deployment-id", "told", "--notify", failing.url)
    assert verb.code == 0
    assert "warning: the notification was not sent: 500" in verb.err
    assert "T0SECRET" not in verb.err + verb.out
    assert "take an http(s) address" in base.run("rollback", "--notify", "slack").error
    planned = base.ok("ensure", "main.py", "--plan", "--notify", listener.url)["planned"]
    assert "pulse-janitor: set PULSE_RAILWAY_NOTIFY_URL (secret)" in planned


def step_11_the_pre_deploy_command(base: Project, tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(TINY, app)
    main = app / "main.py"
    text = main.read_text()
    note = tmp_path / "migrated"
    main.write_text(
        text.replace(
            "RailwayPlugin(",
            f'RailwayPlugin(pre_deploy="echo migrated $PULSE_DEPLOYMENT_ID > {note}; touch x",',
        )
    )
    done = base.run("deploy", "main.py", "--deployment-id", "migrates", cwd=app)
    assert done.code == 0, done.err
    assert note.read_text() == "migrated migrates\n"
    assert not list(base.railway.root.glob("containers/*/x"))  # it runs in a container of its own
    main.write_text(
        text.replace(
            "RailwayPlugin(", 'RailwayPlugin(\n    pre_deploy="echo no such table; exit 3",'
        )
    )
    failed = base.run("deploy", "main.py", "--deployment-id", "fails", cwd=app)
    assert failed.code == 1
    assert "the pre-deploy command ended with 3" in failed.err
    assert "no such table" in failed.err
    assert "fails" not in base.services
    assert base.active == "migrates"


def step_12_message_author_and_commit(base: Project) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    base.deploy("about", "--message", "Fix the cart, fast\nand more", GITHUB_ACTIONS="true",
                GITHUB_ACTOR="octo", GITHUB_RUN_ID="7", GITHUB_REPOSITORY="o/r",
                GITHUB_SERVER_URL="https://hub.example")  # fmt: skip
    row = base.ok("status")["deployments"][0]["about"]
    assert row["message"] == "Fix the cart, fast"
    assert row["by"] == "octo (GitHub Actions)"
    assert row["url"] == "https://hub.example/o/r/actions/runs/7"
    assert row["commit"] == commit
    assert "Fix the cart" in base.run("status").out
    last = base.ok("history", "--lines", "1")["history"]
    assert [entry["by"] for entry in last] == ["octo (GitHub Actions)"]
    shown = base.run("history").out
    assert "octo (GitHub" in shown


def step_13_somebody_stops_the_active_deployment(base: Project) -> None:
    """On Railway, by hand: new visitors get the version before, which stays as long."""
    before = base.active
    base.deploy("stopped")
    url = address(base)
    gone = base.latest("stopped")["id"]
    base.railway.graphql("mutation ($d: String!) { deploymentRemove(id: $d) }", d=gone)
    trust = demo.tls_context(base.stage.bundle)
    with httpx.Client(verify=trust, trust_env=False) as client:

        def selected() -> str:
            return str(client.get(f"{url}/work").headers.get("x-pulse-selected-deployment"))

        eventually(lambda: selected() == before)
        said = f"stopped cannot be connected to: new visitors get {before}"
        eventually(lambda: said in base.ok("status")["problems"], 30)
        assert said in base.run("status").out
        base.janitor()
        refused = base.run("delete", "--deployment-id", str(before), "--yes")
        assert f"{said}. --force removes it all the same" in refused.error
        assert before in base.records
        base.ok("redeploy")
        eventually(lambda: selected() == "stopped", 30)
        eventually(lambda: said not in base.ok("status")["problems"], 30)
    assert base.ok("delete", "--deployment-id", str(before), "--yes")["deleted"]


def test_the_history_is_bounded() -> None:
    router, control = runtime_image.load("router"), runtime_image.load("control")
    routing = router.Routing(now=1.0, active="a")
    for n in range(250):
        changed = control.with_history(
            lambda r: router.replace(r, epoch=r.epoch + 1), "promote", f"d{n}", by="x" * 500
        )
        routing = changed(routing)
    text = router.changes(router.Routing(), routing)[":history"]
    assert len(routing.history) == 100
    assert routing.history[-1]["deployment_id"] == "d249"
    assert len(text) < 50_000
    assert router.parse({":history": "garbage"}, 1.0).history == ()
