"""Every verb through an `ssh` that does at each call what the real one has been seen to do.

The flows, the control commands and the routing state are the real ones; what stands in, for speed,
is Railway's API (a dict of services), the public address, and `railway ssh` itself, which runs
control.py's `control` in this process and then loses, replaces or delays what it says.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shlex
import subprocess
import time
import types
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from pulse_railway import config, contract, control_job, router_commands, runtime_image
from pulse_railway.config import AppConfig, ControlRoute, Names, Target, Where
from pulse_railway.errors import Failure, Interrupted
from pulse_railway.flows import (
    cleanup,
    deploy,
    promote,
    reachability,
    redeploy,
    remove,
    restore,
    status,
)
from pulse_railway.options import DeployOptions, PromoteOptions
from pulse_railway.output import Output
from pulse_railway.railway import documents, program, ssh
from pulse_railway.railway.api import ApiError, GraphqlError
from pulse_railway.stack import Stack, inspect

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")
sqlite_store: Any = runtime_image.load("sqlite_store")
ownership: Any = runtime_image.load("ownership")

BAD_DAY = [
    "Connection timed out",
    "Connection to ssh.railway.com closed by remote host.",
    "client_loop: send disconnect: Broken pipe",
    "No target found for 'a1b2'",
    "Host key verification failed.",
    "ssh: Could not resolve hostname ssh.railway.com",
    "ssh: connect to host ssh.railway.com port 22: Network is unreachable",
    "Using SSH key from file /root/.ssh/id_ed25519",  # and not a word more
]
FOREIGN = [
    '{"status": "pending", "message": "waiting for a route"}',
    '{"ok": true}',
    '{"ok": true, "command": "promote", "nonce": "0123456789abcdef"}',
    '{"ok": true, "command": "retire", "nonce": null}',
    '{"deployment_id": null}',
    "[]",
    "null",
    '{"ok": true',
    "�",
]
WORKS = ("works", "", 0)
FAULTS = st.one_of(
    st.just(WORKS),
    st.just(WORKS),
    st.tuples(st.sampled_from(["before", "after", "late"]), st.sampled_from(BAD_DAY), st.just(255)),
    st.tuples(st.sampled_from(["before", "after"]), st.sampled_from(["", *FOREIGN]), st.just(0)),
    st.tuples(st.sampled_from(["before", "after", "late"]), st.just("hangs"), st.just(1)),
    st.tuples(st.sampled_from(["before", "after"]), st.just("signal"), st.just(0)),
)
IDS = ["first", "second", "third", "fourth"]
STEPS = st.one_of(
    st.tuples(
        st.sampled_from(
            [
                *("deploy", "deploy --no-promote", "deploy --canary", "deploy --lock-wait"),
                *("promote", "promote --weight", "delete", "restore"),
            ]
        ),
        st.sampled_from(IDS),
    ),
    st.tuples(st.sampled_from(["rollback", "status", "redeploy", "restore"]), st.just("")),
    st.tuples(st.sampled_from(["redis is emptied", "a router heals"]), st.just("")),
)


ONE_PAGE = {"pageInfo": {"hasNextPage": False}}


class World:
    """A Railway, the router's store, and the rude ssh between us and them."""

    def __init__(self, way: str) -> None:
        self.way: Any = way
        self.services: dict[str, dict[str, Any]] = {}
        self.store = sqlite_store.SqliteStore(":memory:", "pulse:railway")
        self.faults: list[tuple[str, str, int]] = []
        self.late: list[list[str]] = []
        self.known = router.Routing()  # what a router has in memory
        self.said: list[str] = []
        self.count = 0
        self.api: Any = types.SimpleNamespace(call=self.call, calls=0, is_project_token=False)
        for name in ("pulse-router", "pulse-env", "pulse-janitor", "pulse-redis"):
            secrets = (contract.RAILWAY_TOKEN, contract.REDIS_URL, contract.INTERNAL_TOKEN)
            self.create(name, {**dict.fromkeys(secrets, "${{x}}"), contract.RUNTIME_VERSION: "1"})

    def begin(self) -> None:
        for name in ("first", "second"):
            assert self.run("deploy", name) is None, self.said
        assert self.active == "second"
        self.remember()

    # -- Railway ---------------------------------------------------------------------------------

    def create(self, name: str, variables: dict[str, str]) -> str:
        self.count += 1
        self.services[name] = {"id": f"s{self.count}", "variables": dict(variables)}
        return f"s{self.count}"

    def call(self, document: str, repeatable: bool | None = None, **values: Any) -> Any:
        if document == documents.STACK:
            names = [{"node": {"name": name}} for name in self.services]
            return {"project": {"services": {"edges": names}}, "environment": self.environment()}
        if document.startswith("query Variables"):
            by_id = {s["id"]: s["variables"] for s in self.services.values()}
            return {f"v{k[1:]}": dict(by_id[v]) for k, v in values.items() if k[0] == "s"}
        if document == documents.SERVICE_CREATE:
            given = values["input"]
            return {"serviceCreate": {"id": self.create(given["name"], given["variables"])}}
        if document == ownership.REACH:
            seen = {"id": "e", "canAccess": True, "serviceInstances": {**ONE_PAGE, "edges": []}}
            return {"project": {"environments": {**ONE_PAGE, "edges": [{"node": seen}]}}}
        if document == ownership.HERE:
            return {"environment": self.environment()}
        if document == ownership.SERVICE_DELETE:
            return self.delete(values["service"])
        if document == documents.SERVICE_DEPLOY:
            return {"serviceInstanceDeployV2": "d"}
        if document == documents.EXECUTE:
            return self.run_janitor()
        if document == documents.RENDERED:
            return {"variablesForServiceDeployment": {"RAILWAY_PRIVATE_DOMAIN": "x.internal"}}
        if document == documents.DEPLOYMENT:
            return {"deployment": {"status": "SUCCESS"}, "buildLogs": []}
        assert document.startswith("mutation Configure"), document
        for key, value in values.items():
            if key[0] == "v":
                for service in self.services.values():
                    if service["id"] == value["serviceId"]:
                        service["variables"].update(value["variables"])
        return {}

    def environment(self) -> dict[str, Any]:
        empty = dict.fromkeys(
            "source latestDeployment numReplicas healthcheckPath healthcheckTimeout overlapSeconds"
            " drainingSeconds startCommand cronSchedule restartPolicyType".split()
        )
        nodes = [
            {
                **empty,
                "id": f"i-{service['id']}",
                "serviceId": service["id"],
                "serviceName": name,
                "createdAt": datetime.now(UTC).isoformat(),
                "domains": {"serviceDomains": [{"domain": "site.example"}], "customDomains": []},
            }
            for name, service in self.services.items()
        ]
        return {"config": {}, "serviceInstances": {"edges": [{"node": node} for node in nodes]}}

    def delete(self, service_id: str) -> Any:
        name = next((n for n, s in self.services.items() if s["id"] == service_id), None)
        if name is None:
            raise GraphqlError("Railway: Service not found")
        state = self.state
        known = name in state.records
        assert name != state.active, f"{name} is active and was deleted"
        assert not known or name in state.tombstones, f"{name} was not retired"
        if control.is_lost(state, self.last_promoted):
            assert not known
            assert name != self.last_promoted.deployment_id, f"{name} may be active and was deleted"
        del self.services[name]
        return {"serviceDelete": True}

    # -- the router ------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        return self.store.read()

    @property
    def active(self) -> str | None:
        return self.state.active  # type: ignore[no-any-return]

    @property
    def last_promoted(self) -> Any:
        """What was promoted last, as Railway says."""
        return router.promotion_from_env(self.services["pulse-router"]["variables"])

    def remember(self) -> None:
        """A router reads the state, as it does every few seconds."""
        if self.active:
            self.known = self.state

    def control(self, words: list[str]) -> tuple[str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            control.control(words)
        self.remember()
        return out.getvalue(), err.getvalue()

    def ssh(self, command: list[str], *_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        words = shlex.split(command[-1])[2:]
        for late in self.late:
            self.control(late)
        self.late.clear()
        when, what, code = self.faults.pop(0) if self.faults else WORKS
        event(f"{when}: {what or 'nothing'}")
        if when == "late":  # we lose it, the remote side goes on
            self.late.append(words)
        out, err = self.control(words) if when in ("works", "after") else ("", "")
        if what == "signal":
            raise Interrupted(15)
        if when == "works":
            return subprocess.CompletedProcess(command, 1 if '"ok": false' in out else 0, out, err)
        if what == "hangs":
            return subprocess.CompletedProcess(command, 1, "", "timed out after 60 s")
        if code:
            return subprocess.CompletedProcess(command, code, "", what)
        return subprocess.CompletedProcess(command, 0, what, "Using SSH key from agent x")

    def run_janitor(self) -> Any:
        """Railway's "run now": carries the command out that was left, or does what it likes."""
        variables = self.services["pulse-janitor"]["variables"]
        order = variables.get(contract.CONTROL, "")
        when, what, code = self.faults.pop(0) if self.faults else WORKS
        event(f"job {when}: {what or 'nothing'}")
        if what == "signal":
            raise Interrupted(15)
        if when == "late" and order:
            given = json.loads(order)
            self.late.append([*given["words"], "--nonce", given["nonce"]])
        if when in ("works", "after"):
            given = variables.get(contract.CONTROL_ANSWER, "")
            found = janitor.Inventory([], request=order, answer=given)
            answer = janitor.carry_out_request(found, {})
            self.remember()
            if answer and (when == "works" or code == 255):
                variables[contract.CONTROL_ANSWER] = json.dumps(answer)
        if code == 255:
            raise Failure(what) if "timed" in what else ApiError(f"Railway: {what}")
        if when != "works" and what not in ("", "hangs"):
            variables[contract.CONTROL_ANSWER] = what
        return {"deploymentInstanceExecutionCreate": True}

    # -- the public address ----------------------------------------------------------------------

    def routed(
        self, _: Any, __: Any, name: str, ___: Any, *, by_affinity: bool, timeout: float = 0
    ) -> None:
        state = self.known if control.is_lost(self.state, self.last_promoted) else self.state
        there = name in state.records and name in self.services
        if not there or (not by_affinity and state.active != name):
            raise Failure("reaching the deployment through the router took longer than 4 s")

    # -- verbs -----------------------------------------------------------------------------------

    def run(self, verb: str, name: str) -> Exception | BaseException | None:
        """Run a verb; what it raised, if that is what a user may see."""
        self.said = []
        output: Any = Recorder(self.said)
        target = Target("p", "e", ControlRoute(self.way, checked=True))
        try:
            if verb.startswith("deploy"):
                wanted = DeployOptions(
                    Where(),
                    APP,
                    deployment_id=name,
                    promote="--no" not in verb,
                    canary=20.0 if "--canary" in verb else None,
                    lock_wait=0 if "--lock-wait" in verb else None,
                )
                plan = deploy.Plan(wanted, name, Path("Dockerfile"), Path("web"), "run")
                deploy.deploy(self.api, target, plan, output)
                return None
            stack = inspect(self.api, target, Names())
            match verb:
                case "promote" | "promote --weight":
                    weight = 40.0 if "--weight" in verb else None
                    asked = PromoteOptions(Where(), Names(), deployment_id=name, weight=weight)
                    promote.promote(self.api, stack, asked, output)
                case "rollback":
                    promote.rollback(self.api, stack, output)
                case "delete":
                    remove.delete(self.api, stack, name, output)
                case "restore":
                    restore.restore(self.api, stack, name or None, output)
                case "redeploy":
                    redeploy.redeploy(self.api, stack, None, output)
                case "status":
                    status.status(self.api, stack)
                case "redis is emptied":
                    self.store.db.execute("DELETE FROM pulse_kv")
                case "a router heals":
                    self.store.apply(lambda state: router.repaired(state, self.known, "id"))
        except (Failure, Interrupted) as failure:
            return failure
        return None

    def check(self) -> None:
        state = self.state
        active = state.active or (self.last_promoted.deployment_id if self.known.active else None)
        if active:
            assert active in self.services, f"the active deployment {active} has no service"
        assert len([r for r in state.records.values() if r.state == "active"]) <= 1
        record = state.records.get(state.active)
        if record:
            assert record.state == "active"
            assert not record.retiring_at


class Recorder(Output):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.lines = said

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        yield

    def say(self, line: str) -> None:
        self.lines.append(line)

    log = warn = say

    def waiting(self, why: str) -> None:
        self.say(why)


class _Plugin:
    name = None
    dockerfile = "Dockerfile"
    check_path = "/"
    pre_deploy = None


plugin: Any = _Plugin()
APP = AppConfig("main.py", Path(), Names(), None, True, Path("web"), "", False, False, plugin)


@pytest.fixture
def rude(monkeypatch: pytest.MonkeyPatch) -> None:
    """World's seams: all calls go to the newest world."""
    quiet = types.SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 0.0)
    monkeypatch.setenv("RAILWAY_SERVICE_ID", "here")
    monkeypatch.delenv("PULSE_RAILWAY_ACTIVE", raising=False)
    monkeypatch.setattr(control, "HEAL_WAIT", 0.0)
    for module in (router_commands, cleanup, reachability):
        monkeypatch.setattr(module, "time", quiet, raising=False)
    ticks = itertools.count(0, 9)
    passes = types.SimpleNamespace(
        sleep=lambda _: None, monotonic=lambda: float(next(ticks)), time=time.time
    )
    monkeypatch.setattr(control_job, "time", passes)
    monkeypatch.setattr(janitor, "router", router)
    monkeypatch.setattr(program, "need_railway", lambda _: None)


EXAMPLES = int(os.environ.get("PULSE_EXAMPLES") or 100)


@given(
    way=st.sampled_from(["ssh", "job"]),
    plan=st.lists(st.tuples(STEPS, st.lists(FAULTS, max_size=8)), min_size=1, max_size=5),
)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# found by a run in CI: a signal while a deploy that had ended gave its lock back
@example(
    way="ssh",
    plan=[(("deploy --no-promote", "third"), [WORKS, WORKS, ("before", "signal", 0)])],
)
@pytest.mark.usefixtures("rude")
def test_nothing_that_serves_is_lost(way: str, plan: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        holder: list[World] = []
        patch.setattr(router, "store_from_env", lambda _: holder[0].store)
        patch.setattr(ssh, "run_railway", lambda *a, **k: holder[0].ssh(*a, **k))
        patch.setattr(deploy, "up", lambda *_, **__: "d")
        patch.setattr(deploy, "wait_until_rendered", lambda *_: None)
        for module in (deploy, promote, redeploy, restore, reachability):
            patch.setattr(module, "wait_until_routed", lambda *a, **k: holder[0].routed(*a, **k))
        world = World(way)
        holder.append(world)
        world.begin()
        for (verb, name), faults in plan:
            world.faults = list(faults)
            there = name in world.services
            before = world.active
            failed = world.run(verb, name)
            event(f"{verb}: {type(failed).__name__}")
            world.check()
            if verb.startswith("deploy") and failed and not there:
                stays = any(" stays" in line for line in world.said)
                assert stays == (name in world.services), world.said
            if verb == "delete" and failed is None:
                assert name not in world.services
            if failed is None and verb in ("deploy", "promote"):
                assert world.active == name
            if failed is None and verb.endswith(("--canary", "--weight")):
                assert world.active == before
                assert world.state.canary.deployment_id == name
            if verb in ("status", "redeploy") and before:
                assert world.active == before or world.late or failed
        for late in world.late:  # whatever is still under way
            world.control(late)
        world.check()


def test_the_stand_in_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that the test above replaces are there: it would pass without them."""
    for module, name in ((ssh, "run_railway"), (deploy, "up"), (deploy, "wait_until_routed")):
        assert callable(getattr(module, name))
    assert config.Names().router == "pulse-router"
    assert isinstance(Stack(Target("p", "e"), Names(), {}).missing, list)
