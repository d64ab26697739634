"""Failures of each step of `deploy`, `ensure` and `delete`.

The failures are 429, 502, a GraphQL error, a lost answer, a lost connection and a timeout. After
each the active deployment is unchanged, and no service is left over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pulse_railway import config, contract, options, router_commands, runtime_image, waiting
from pulse_railway.errors import Failure, Interrupted, Refused
from pulse_railway.flows import baseline, cleanup, deploy, reachability, remove, watch
from pulse_railway.output import Output
from pulse_railway.railway import api as api_module
from pulse_railway.railway import tokens
from pulse_railway.railway.api import Api
from pulse_railway.railway.ssh import Outcome
from pulse_railway.stack import Stack, inspect
from tests.conftest import BASE, TINY, Project, Redis

control: Any = runtime_image.load("control")

DEPLOY_CALLS = [
    "projectToken",
    "environment",
    "variables",
    "serviceCreate",
    "serviceInstanceUpdate",
    "up",
    "deployment",
    "variablesForServiceDeployment",
    "ssh",
]
KINDS: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "retry_after": 0.2},
    "502": {"status": 502},
    "502 always": {"status": 502, "times": 1000},
    "refused": {"error": "Something went wrong"},
    "lost": {"status": 502, "after": True},
    "cut off": {"drop": True},
    "timeout": {"delay": 1.5},  # longer than this process's TIMEOUT
}


# All queries, and serviceInstanceUpdate, are repeated by one function: the failures that they
# recover from are tested with `deployment` only, the others with each call.
FATAL = ("502 always", "refused")
FAILING = {
    "serviceCreate": KINDS,
    "serviceInstanceUpdate": (*FATAL, "lost"),
    "up": KINDS,
    "deployment": KINDS,
    "ssh": KINDS,
}


class InProcess:
    """Runs flows as a verb does, in this process, which saves the start of a subprocess."""

    def __init__(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in project.env.items():
            if name.startswith(("RAILWAY_", "PULSE_", "SSL_")) or name == "PATH":
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(api_module, "FIRST_PAUSE", 0.02)
        monkeypatch.setattr(api_module, "TIMEOUT", httpx.Timeout(1.0))
        monkeypatch.setattr(time, "sleep", _quicker(time.sleep))
        self.project, self.monkeypatch = project, monkeypatch
        route = config.ControlRoute("ssh", Path(project.env["PULSE_RAILWAY_SSH_KEY"]))
        self.target = config.Target(project.id, project.environment, route)
        self.names = config.Names()

    def without_ssh(self) -> None:
        """Run control commands in this process, on the project's Redis.

        `railway ssh` takes three processes a command, which only costs time if ssh does not fail.
        """
        redis = self.project.redis.connection_pool.connection_kwargs
        env = {"REDIS_URL": f"redis://:{redis['password']}@127.0.0.1:{redis['port']}"}

        def carry_out(_: Api, __: Stack, words: list[str]) -> Outcome:
            return Outcome(json.dumps(control.carry_out(words, env)), "", False)

        self.monkeypatch.setattr(router_commands, "by_ssh", carry_out)

    def api(self) -> Api:
        return Api(tokens.find_token(None))

    def deploy(self, deployment_id: str, **flags: Any) -> dict[str, Any]:
        output = Output(as_json=True)
        flags = {"app": "main.py", "context": TINY, "deployment_id": deployment_id, **flags}
        plan = deploy.prepare(options.parse_deploy(flags, output), output)
        return deploy.deploy(self.api(), self.target, plan, output)

    def ensure(self, **flags: Any) -> list[str]:
        parsed = options.parse_baseline({"app": "main.py", "context": TINY, **flags}, Output())
        return baseline.ensure(self.api(), self.target, parsed, Output())[1]

    def delete(self, deployment_id: str) -> None:
        api = self.api()
        stack = inspect(api, self.target, self.names)
        remove.delete(api, stack, deployment_id, Output())


def _quicker(sleep: Callable[[float], None]) -> Callable[[float], None]:
    return lambda seconds: sleep(min(seconds, 0.3))


@pytest.fixture
def here(base: Project, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    base.faults()
    return InProcess(base, monkeypatch)


@pytest.mark.parametrize(
    ("call", "kind"), [(call, kind) for call in DEPLOY_CALLS for kind in FAILING.get(call, FATAL)]
)
def test_a_deploy_that_fails_leaves_nothing(
    here: InProcess,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    kind: str,
) -> None:
    project = here.project
    if call != "ssh":
        here.without_ssh()
    name = f"d-{DEPLOY_CALLS.index(call)}-{list(KINDS).index(kind)}"
    if kind == "502 always":  # which is waited out for as long as a build may take
        monkeypatch.setattr(waiting, "BUILD_TIMEOUT", 2.0)
        monkeypatch.setattr(reachability, "RAILWAY_TIMEOUT", 1.0)
    # the first query of a kind belongs to the inspection, the first ssh to `lock`
    project.faults({"match": call, **KINDS[kind], "nth": 2 if call == "ssh" else 1})
    try:
        here.deploy(name, no_promote=True)
        failed = None
    except Failure as failure:
        failed = failure
    project.faults()
    assert project.active == "first"
    # a rate limit is repeated, and so is one 502 to a call that may be repeated; while a build
    # runs every failure is
    recovers = kind == "429" or (kind == "502" and call != "serviceCreate")
    if recovers or (call == "deployment" and kind != "502 always"):
        assert failed is None
    if failed is None:  # it recovered
        assert name in project.services
        assert project.records[name]["state"] == "pending"
        here.delete(name)
    else:
        printed = capsys.readouterr().err
        assert "failed at: " in printed or "projectToken" in call or "environment" in call, printed
        if (call, kind) == ("ssh", "502 always"):  # the router could not confirm the retirement
            assert f"{name} stays" in printed
            assert name in project.services
            here.delete(name)
    assert project.services == BASE | {"first"}
    assert set(project.records) == {"first"}


def test_a_build_that_fails(here: InProcess, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("BUILDING", "DEPLOYING"):
        here.project.faults(crash_at=stage)
        with pytest.raises(Failure, match="ended as FAILED"):
            here.deploy("broken")
        said = capsys.readouterr().err
        assert "failed at: build and start" in said
        assert f"failed at {stage}: crash_at of /local/faults" in said
        assert here.project.services == BASE | {"first"}
    here.project.faults(crash_at="BUILDING")
    with pytest.raises(Failure):
        here.deploy("kept", keep_failed=True)
    assert "kept" in here.project.services
    here.project.faults()
    here.delete("kept")


@pytest.mark.parametrize("kind", ["502 always", "refused"])
def test_nothing_is_created_without_an_answer_of_the_router(here: InProcess, kind: str) -> None:
    here.project.faults({"match": "ssh", **KINDS[kind], "times": 1000})
    with pytest.raises(Failure, match="not known whether the router carried out `lock`"):
        here.deploy("no-way")
    here.project.faults()
    assert here.project.services == BASE | {"first"}


def test_a_promotion_whose_answer_is_lost(here: InProcess) -> None:
    """The command is repeated with its nonce, and returns the first outcome."""
    project = here.project
    project.faults({"match": "ssh", "nth": 3, "status": 502, "after": True})
    assert here.deploy("lost")["active"] is True
    project.faults()
    assert project.active == "lost"
    assert project.records["first"]["state"] == "draining"
    project.ok("promote", "--deployment-id", "first")
    here.delete("lost")


def test_a_later_promotion_of_another_run_is_reported(here: InProcess) -> None:
    """Both were promoted, and this run's deployment is not active any more."""
    here.without_ssh()
    api, output = here.api(), Output()
    stack = inspect(api, here.target, here.names)
    with pytest.raises(Failure, match="first was promoted after other, which drains now: another"):
        reachability.wait_until_active(api, stack, "other", output)
    here.monkeypatch.setattr(reachability, "ROUTED_TIMEOUT", 1.0)
    with pytest.raises(Failure, match=r"took longer than 1 s; https://.*/meta gave status 409"):
        reachability.wait_until_reachable(
            api, stack, "other", output, by_affinity=True, timeout=1.0
        )
    stack.router.domains[:] = ["nowhere.invalid"]  # type: ignore[union-attr]
    said = r"https://nowhere.invalid/_pulse/meta gave ConnectError; first is unreachable inside"
    with pytest.raises(Failure, match=said):
        reachability.wait_until_reachable(
            api, stack, "first", output, by_affinity=True, timeout=1.0
        )


def test_a_failure_to_store_the_last_promotion_is_a_warning(
    here: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = inspect(here.api(), here.target, here.names)
    here.project.faults({"match": "variableCollectionUpsert", **KINDS["refused"]})
    reachability.store_last_promoted(here.api(), stack, "first", None, Output())
    here.project.faults()
    said = capsys.readouterr().err
    assert "PULSE_RAILWAY_ACTIVE could not be written: Railway: Something went wrong" in said
    assert "the janitor will" in said


def test_a_failure_after_the_promotion_removes_nothing(
    here: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any) -> None:
        raise Failure("nobody answers")

    here.without_ssh()
    with here.monkeypatch.context() as patch:
        patch.setattr(deploy, "wait_until_active", unreachable)
        with pytest.raises(Failure, match="nobody answers"):
            here.deploy("stays")
    assert "stays was promoted and stays; `pulse-railway status` shows" in capsys.readouterr().err
    assert here.project.active == "stays"
    here.project.ok("promote", "--deployment-id", "first")
    here.delete("stays")


@pytest.mark.parametrize(
    ("error", "creating", "said"),
    [
        (Refused("x is active", "active"), True, "x was promoted and stays"),
        (Failure("away"), False, "prod-x is removed; its record is left to the janitor"),
        (Failure("away"), True, "prod-x stays, since it is not certain that it may go: away."),
        (Interrupted(15), True, "it is not certain that it may go: interrupted again."),
    ],
)
def test_messages_of_a_clean_up_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    creating: bool,
    said: str,
) -> None:
    def undo(_: Any, __: Any, attempt: cleanup.Attempt) -> None:
        attempt.creating = creating
        raise error

    monkeypatch.setattr(cleanup, "undo", undo)
    parsed = options.parse_deploy({"app": "main.py", "context": TINY}, Output())
    attempt = cleanup.Attempt("x", "prod-x", step="build", service_id="s", creating=True)
    api: Any = None
    cause = Failure("the build failed")
    cleanup.clean_up(api, config.Target("p", "e"), parsed, attempt, Output(), cause)
    printed = capsys.readouterr().err
    assert said in printed
    assert attempt.promoted == (said == "x was promoted and stays")
    if "not certain" in said:
        assert "run `pulse-railway delete --deployment-id x`" in printed
        attempt = replace(attempt, registered=True, creating=True)
        cleanup.clean_up(api, config.Target("p", "e"), parsed, attempt, Output(), cause)
        printed = capsys.readouterr().err  # it is built and runs: a delete would waste that
        assert "`pulse-railway promote --deployment-id x` makes it active" in printed
        assert "delete" not in printed


def test_a_generated_name_that_is_taken_gets_a_later_time(here: InProcess) -> None:
    flags = {"app": "main.py", "context": TINY}
    plan = deploy.prepare(options.parse_deploy(flags, Output()), Output())
    stack = inspect(here.api(), here.target, here.names)
    assert stack.router
    stack.taken |= {plan.service_name: "id"}
    free = deploy.untaken(plan, stack)
    assert free.service_name not in stack.taken
    assert free.deployment_id.rsplit("-", 2)[0] == plan.deployment_id.rsplit("-", 2)[0] == "prod"
    given = deploy.prepare(
        options.parse_deploy({**flags, "deployment_id": "first"}, Output()), Output()
    )
    with pytest.raises(Failure, match="deployment first exists already: choose another"):
        deploy.untaken(given, stack)
    named = replace(given, deployment_id="pulse-redis")
    with pytest.raises(Failure, match="a service pulse-redis of this project, which is no depl"):
        deploy.untaken(named, stack)


def test_a_watch_goes_on_without_railways_api(here: InProcess) -> None:
    here.without_ssh()
    here.monkeypatch.setattr(watch, "INSPECT_INTERVAL", 0.0)
    stack = inspect(here.api(), here.target, here.names)
    here.project.faults({"match": "environment", "error": "Something went wrong", "times": 1000})
    polls = watch.watch(here.api(), stack, 0.0)
    result, _ = next(polls)
    assert result["problems"][0] == "Railway does not answer: Railway: Something went wrong"
    assert [row["deployment_id"] for row in result["deployments"]] == ["first"]
    here.project.faults()
    result, _ = next(polls)
    assert not any("Railway does not answer" in problem for problem in result["problems"])


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        *(("environment", kind) for kind in FATAL),
        *((call, kind) for call in ("ssh", "serviceDelete") for kind in (*FATAL, "lost")),
    ],
)
def test_a_delete_that_fails_can_be_run_again(here: InProcess, call: str, kind: str) -> None:
    if call != "ssh":
        here.without_ssh()
    name = f"x-{list(KINDS).index(kind)}-{call.lower()[:8]}"
    here.deploy(name, no_promote=True)
    here.project.faults({"match": call, **KINDS[kind]})
    try:
        here.delete(name)
    except Failure:
        here.project.faults()
        here.delete(name)
    here.project.faults()
    assert here.project.services == BASE | {"first"}
    assert set(here.project.records) == {"first"}
    assert here.project.active == "first"


ENSURE_CALLS = [
    "environment",
    "template",
    "templateDeployV2",
    "serviceCreate",
    "variableCollectionUpsert",
    "serviceDomainCreate",
    "up",
    "variableDelete",
]


@pytest.mark.parametrize("kind", ["429", "502 always", "refused", "lost"])
def test_the_next_ensure_completes_one_that_has_failed(
    new_project: Callable[[], Project], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    project = new_project()
    flows = InProcess(project, monkeypatch)
    for call in ENSURE_CALLS:
        project.faults({"match": call, **KINDS[kind]})
        try:
            flows.ensure()
        except Failure:
            project.faults()
            if "pulse-router" in project.services and "pulse-env" in project.services:
                continue  # the next call to fail comes later
    project.faults()
    flows.ensure()
    assert project.services == BASE
    assert flows.ensure() == []
    assert "PULSE_RAILWAY_SETUP" not in project.variables("pulse-env")


def test_an_unfinished_ensure_can_change_to_another_redis(
    new_project: Callable[[], Project], monkeypatch: pytest.MonkeyPatch, redis_server: Redis
) -> None:
    """The template's Redis is deleted, since nothing has used it (requirements: --redis-url)."""
    project = new_project()
    flows = InProcess(project, monkeypatch)
    project.faults({"match": "serviceCreate", **KINDS["refused"]})
    with pytest.raises(Failure, match="Something went wrong"):
        flows.ensure()
    project.faults()
    assert project.services == BASE - {"pulse-env"}
    flows.ensure(redis_url=redis_server.url)
    assert project.services == BASE - {"pulse-redis"}
    assert flows.ensure(redis_url=redis_server.url) == []


def test_a_partial_baseline_is_refused(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.ok("ensure", "main.py")
    service = project.stage.services()["pulse-redis"]["serviceId"]
    project.railway.graphql("mutation D($i: String!) { serviceDelete(id: $i) }", i=service)
    before = project.services
    for verb in (["ensure", "main.py"], ["deploy", "main.py"]):
        failed = project.run(*verb)
        assert failed.code == 1
        assert "pulse-redis of this stack is missing" in failed.error
        assert "`pulse-railway ensure --repair --app main.py` creates it again" in failed.error
    again = project.run("scaffold", "main.py").error
    assert "exists already" in again
    assert "pulse-redis of this stack is missing" in again
    document = "mutation V($i: VariableDeleteInput!) { variableDelete(input: $i) }"
    of_env = {
        "projectId": project.id,
        "environmentId": project.environment,
        "serviceId": project.stage.services()["pulse-env"]["serviceId"],
        "name": contract.STACK,
    }
    project.railway.graphql(document, i=of_env)
    for name in ("ensure", "scaffold"):
        said = project.run(name, "main.py").error
        assert "Nothing says whose pulse-env is" in said
        assert "delete pulse-janitor, pulse-router on Railway" in said
    assert project.services == before


DELETE = "mutation D($i: String!) { serviceDelete(id: $i) }"


def test_a_message_lists_what_is_lost_with_a_baseline(new_project: Callable[[], Project]) -> None:
    """A deployment of the deleted baseline is restored in the new one. Nothing shows whose Redis
    was, so that it is not created again."""
    project = new_project()
    project.ok("ensure", "main.py")
    project.deploy("survivor")
    project.stage.set_variables("pulse-env", {"SECRET_KEY": "x", "OTHER": "y"})
    address = project.ok("status")["address"]
    ids = {name: at["serviceId"] for name, at in project.stage.services().items()}
    project.railway.graphql(DELETE, i=ids["pulse-redis"])
    project.stage.set_variables("pulse-router", {contract.STACK: ""})
    for verb in (["ensure", "main.py"], ["scaffold", "main.py"], ["status"]):
        run = project.run(*verb)
        said = run.out if verb == ["status"] else run.error
        assert "With them go: 2 variables of pulse-env" in said
        assert "delete pulse-env, pulse-janitor, pulse-router on Railway" in said
        assert "Not in a project with other environments" in said
        assert f"the address {address}" in said

    for name in ("pulse-router", "pulse-janitor", "pulse-env"):
        project.railway.graphql(DELETE, i=ids[name])
    planned = project.run("ensure", "main.py", "--plan")
    assert "survivor ran under a baseline that is gone" in planned.err
    again = project.run("ensure", "main.py")
    assert again.code == 0, again.err
    assert "survivor ran under a baseline that is gone" in again.err
    assert project.ok("restore", "--deployment-id", "survivor")["active"] == "survivor"
    assert project.get("/_pulse/meta")["deployment_id"] == "survivor"
    # it has the internal token of the old baseline until it is redeployed
    assert project.ok("status")["deployments"][0]["sessions"] is None
    project.ok("redeploy")
    assert project.ok("status")["deployments"][0]["sessions"] == 0
