"""The deploy lock: runs that were cancelled or killed, two runs in the same second, clocks."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pulse_railway import contract, control_job, router_commands, runtime_image
from pulse_railway.config import Names, Target
from pulse_railway.flows import deploy_lock
from pulse_railway.flows.cleanup import Attempt
from pulse_railway.railway import ssh
from pulse_railway.router_commands import Lock
from pulse_railway.stack import Service, Stack
from tests.conftest import BASE, Project, Redis, play
from tests.net import eventually
from tests.test_signals import Running

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")

NOW = 1_800_000_000.0


def state(**fields: Any) -> Any:
    return router.Routing(now=NOW, **fields)


# -- the steps ---------------------------------------------------------------------------------


def test_a_run_that_has_ended_does_not_take_the_lock() -> None:
    """The command that takes it arrived after the one that gives it back, and it stayed."""
    released = control.release_deploy_lock(state(), "a")
    with pytest.raises(control.StateError, match="has ended") as refused:
        control.deploy_lock(released, "a", "ada", 60)
    assert refused.value.reason == "ended"
    assert control.deploy_lock(released, "b", "bob", 60).lock.holder == "b"
    taken = control.deploy_lock(state(), "a", "ada", 60)
    for holder in ("a", None):  # its own, or `unlock` by a person
        released = control.release_deploy_lock(taken, holder)
        assert released.lock is None
        assert control.ended_runs(released) == ["a"]
    late = replace(taken, now=NOW + 61)
    assert control.ended_runs(control.deploy_lock(late, "b", "bob", 60)) == ["a"]
    assert control.release_deploy_lock(state(), None) == state()


def test_a_refusal_names_the_holder() -> None:
    taken = control.deploy_lock(state(), "a", "ada", 60)
    with pytest.raises(control.StateError, match="ada deploys since") as refused:
        control.deploy_lock(replace(taken, now=NOW + 10), "b", "bob", 60)
    lock = {"holder": "a", "by": "ada", "since": NOW, "until": NOW + 60}
    assert refused.value.facts == {"lock": lock, "now": NOW + 10}


def test_a_deploys_commands_renew_its_lock() -> None:
    taken = control.deploy_lock(state(), "a", "ada", 60)
    words = ["register", "--deployment-id", "x", "--service-name", "x", "--renew=a@900"]
    args = control.control_parser().parse_args(words)
    assert args.renew == ("a", 900.0)
    renewed = control.renewing(lambda routing: routing, *args.renew)(taken)
    assert renewed.lock == replace(taken.lock, until=NOW + 900)
    assert control.renewing(lambda routing: routing, "b", 900.0)(taken) == taken


def test_a_run_that_has_lost_its_lock_changes_nothing() -> None:
    """It went on, and replaced what the run that took its lock had promoted since."""
    taken = control.deploy_lock(state(), "a", "ada", 60)
    late = replace(taken, now=NOW + 61)
    for lost in (
        control.release_deploy_lock(taken, None),
        control.deploy_lock(late, "b", "bob", 60),
    ):
        for step in (
            control.renewing(lambda routing: routing, "a", 900.0),
            control.with_unlock(lambda routing: routing, "a"),
        ):
            with pytest.raises(control.StateError, match="lock of this run was taken") as refused:
                step(lost)
            assert refused.value.reason == "ended"
    # an expired lock that nobody has taken is still its own
    assert control.renewing(lambda routing: routing, "a", 900.0)(late).lock.until == NOW + 961


def test_a_command_that_comes_too_late() -> None:
    step = control.in_time(lambda routing: routing, NOW)
    assert step(state()) == state()
    with pytest.raises(control.StateError, match="came too late"):
        step(replace(state(), now=NOW + 1))


def test_the_locks_clock_is_the_stores(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = router.RedisStore(redis_server.url, "pulse:railway")
    store.apply(lambda routing: control.deploy_lock(routing, "a", "ada", 60))
    real = time.time
    for skew in (-5400, 5400):
        monkeypatch.setattr(time, "time", lambda skew=skew: real() + skew)
        with pytest.raises(control.StateError, match="ada deploys since"):
            store.apply(lambda routing: control.deploy_lock(routing, "b", "bob", 60))


# -- is a run dead? ----------------------------------------------------------------------------


def seen(run: str | None, status: str | None = None, ago: float | None = None) -> Stack:
    service = Service("s", "", "x", "", None, {}, [], None, status)
    service.variables = {contract.RUN: run, contract.DEPLOYMENT_ID: "x"} if run else {}
    service.status_at = None if ago is None else NOW - ago
    return Stack(Target("p", "e"), Names(), {"x": service})


@pytest.mark.parametrize(
    ("stack", "run", "age", "before", "registered", "dead"),
    [
        (seen("r", "SUCCESS", 240), "r", 300, False, False, True),
        (seen("r", "FAILED", 240), "r", 300, False, False, True),
        (seen("r", "SUCCESS", 240), "r", 300, False, True, False),  # it goes on
        (seen("r", "SUCCESS", 230), "r", 300, False, False, False),  # it may be registering it
        (seen("r-job", "SUCCESS", 470), "r-job", 600, False, False, False),  # by the janitor
        (seen("r-job", "SUCCESS", 490), "r-job", 600, False, False, True),
        (seen("r", "BUILDING", 1000), "r", 3000, False, False, False),
        (seen("r", "SUCCESS", None), "r", 3000, False, False, False),  # Railway does not say
        (seen("r"), "r", 3000, False, False, False),  # it uploads
        (seen(None), "r", 100, False, False, False),  # it has created nothing yet
        (seen(None), "r", 360, False, False, True),
        (seen(None), "r-job", 830, False, False, False),
        (seen(None), "r-job", 850, False, False, True),
        (seen(None), "r-image-job", 2000, False, False, False),
        (seen(None), "r", 100, True, False, True),  # what it has created is gone
        (seen(None), "r-image", 2000, False, False, False),  # it builds an image first
        (seen(None), "r-image", 2000, True, False, True),
    ],
)
def test_which_run_is_dead(
    monkeypatch: pytest.MonkeyPatch,
    stack: Stack,
    run: str,
    age: float,
    before: bool,
    registered: bool,
    dead: bool,
) -> None:
    answer = {"deployments": [{"deployment_id": "x"}] if registered else []}
    monkeypatch.setattr(router_commands, "read_state", lambda *_: answer)
    lock = Lock(run, "ada", NOW - age, NOW)
    api: Any = None
    assert deploy_lock.is_dead(api, stack, lock, before) is dead
    if not before:
        held = {"holder": run, "since": lock.since, "until": NOW + 60}
        present = {**answer, "lock": held, "now": NOW}
        assert deploy_lock.appears_dead(stack, present) is dead


def test_no_command_takes_longer_than_a_live_run_is_given() -> None:
    """A command by the janitor took up to seven minutes, and the run was dead after three."""
    tries = router_commands.RETRY_TIMEOUT + max(router_commands.PAUSES) + ssh.TIMEOUT
    assert deploy_lock.longest_command("r") >= tries
    assert deploy_lock.longest_command("r-job") >= control_job.SCHEDULE_TIMEOUT


def test_a_run_whose_key_railway_refuses_is_named_for_the_janitors_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its `lock` is sent again with the name by which others know how long its commands take."""
    sent: list[str] = []

    def send_lock(api: Any, stack: Stack, holder: str, lease: int) -> Lock:
        sent.append(holder)
        if stack.target.control_route.kind is None:
            stack.target.control_route.kind = "job"
            raise router_commands.RouteChanged("no key")
        return Lock(holder, None, NOW, NOW)

    monkeypatch.setattr(router_commands, "choose_route", lambda *_: None)
    monkeypatch.setattr(router_commands, "send_lock", send_lock)
    attempt = Attempt("x", "x")
    options: Any = SimpleNamespace(lock_wait=None, bake=0, canary=None)
    api, output = cast(Any, None), cast(Any, None)
    deploy_lock.take_lock(api, seen(None), options, attempt, output)
    assert sent == [sent[0], f"{sent[0]}-job"]
    assert attempt.run == sent[1]


# -- a command that comes late -----------------------------------------------------------------


class LateRouter:
    """Carries out `maintenance on` in place of ssh, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.routing, self.now, self.argv = state(), NOW, [""]
        monkeypatch.setattr(router_commands, "by_ssh", self.by_ssh)
        monkeypatch.setattr(router_commands, "choose_route", lambda *_: None)
        monkeypatch.setattr(time, "sleep", lambda _: None)

    def by_ssh(self, api: Any, stack: Any, argv: list[str]) -> ssh.Outcome:
        self.argv = argv
        args = control.control_parser().parse_args(argv)
        step = control.step_of(args)
        step = step if args.until is None else control.in_time(step, args.until)
        answer = {"command": args.command, "nonce": args.nonce}
        try:
            self.routing = step(replace(self.routing, now=self.now))
            answer |= {"ok": True, "clock": self.now}
        except control.StateError as error:
            answer |= {"ok": False, "error": str(error), "reason": error.reason, **error.facts}
        return ssh.Outcome(json.dumps(answer), "", False)


@pytest.mark.parametrize("skew", [0.0, 5400.0, -5400.0])
def test_no_ssh_command_is_carried_out_after_its_caller_has_gone(
    monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """A `railway ssh` that hung reached the router late. Railway's clock may be another one."""
    late = LateRouter(monkeypatch)
    stack = seen(None)
    stack.services["pulse-router"] = Service("r", "", "pulse-router", "", None, {}, [], None, None)
    stack.services["pulse-router"].variables = {
        contract.RUNTIME_VERSION: runtime_image.runtime_version()
    }
    api: Any = SimpleNamespace(clock=NOW + skew - time.monotonic())
    for _ in range(2):  # the second by the store's clock, which the first has told
        router_commands.send_maintenance(api, stack, True, None, 60, None)
        assert late.routing.maintenance is not None
    late.routing, late.now = state(), NOW + ssh.TIMEOUT + 5
    answer = json.loads(late.by_ssh(None, None, late.argv).stdout)
    assert (answer["reason"], answer["clock"]) == ("late", late.now)
    assert late.routing.maintenance is None


def test_an_older_router_gets_no_flag_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = LateRouter(monkeypatch)
    api: Any = SimpleNamespace(clock=NOW - time.monotonic())
    router_commands.send_maintenance(api, seen(None), True, None, 60, None)
    assert not [word for word in late.argv if word.startswith("--until")]


# -- on the local Railway ----------------------------------------------------------------------


def test_locks_on_a_railway(base: Project, request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def lock(project: Project) -> str | None:
    return project.state.get("deploy:lock")


def step_01_a_deploy_that_is_cancelled_while_it_asks(base: Project) -> None:
    """It kept the lock for an hour, three times of three."""
    for delayed in ({"delay": 2.0}, {"delay": 2.0, "after": True}):
        base.faults({"match": "ssh", **delayed})
        verb = Running(base, "deploy", "main.py")
        for line in verb.said:
            if line.strip().startswith("ask the router"):
                break
        time.sleep(0.7)
        verb.send_signal(signal.SIGINT)
        code, said = verb.end()
        assert code == 130, said
        time.sleep(2.5)  # what was delayed arrives
        base.faults()
        assert lock(base) is None


def killed_at(project: Project, step: str, *words: str, fault: dict[str, Any]) -> None:
    project.faults(fault)
    verb = Running(project, "deploy", "main.py", *words)
    for line in verb.said:
        if line.strip().startswith(step):
            break
    time.sleep(0.7)
    verb.send_signal(signal.SIGKILL)
    verb.end()
    project.faults()


def step_02_a_killed_deploy_can_be_run_again(base: Project) -> None:
    """`--deployment-id X` existed already, and the lock stayed for an hour."""
    words = ("--deployment-id", "again")
    killed_at(base, "build and start", *words, fault={"match": "deployment", "delay": 3.0})
    eventually(lambda: base.latest("again")["status"] == "SUCCESS")
    refused = base.run("deploy", "main.py", *words)
    assert "deployment again exists already, and the run of" in refused.error
    assert "If that run is dead, `pulse-railway unlock" in refused.error
    unlocked = base.ok("unlock", "--yes")
    assert unlocked["lock"]["deployment_id"] == "again"
    done = base.run("deploy", "main.py", *words, "--no-promote")
    assert done.code == 0, done.err
    assert "remove again, which a run that has ended left" in done.err
    assert base.services == BASE | {"first", "again"}
    assert "exists already" in base.run("deploy", "main.py", *words).error  # which is pending
    assert lock(base) is None
    base.ok("delete", "--deployment-id", "again")


def step_03_a_dead_runs_lock_is_taken_over(base: Project) -> None:
    """Whoever waited for it waited for an hour."""
    words = ("--deployment-id", "dead")
    killed_at(base, "build and start", *words, fault={"match": "deployment", "delay": 3.0})
    service = base.stage.services()["dead"]["serviceId"]
    base.railway.graphql("mutation ($i: String!) { serviceDelete(id: $i) }", i=service)
    waits = base.run("deploy", "main.py", "--no-promote", "--lock-wait", "1")
    assert "still after 1 s" in waits.error  # the run may not have created its service yet
    held = json.loads(str(lock(base)))
    base.redis.set("pulse:railway:deploy:lock", json.dumps({**held, "since": held["since"] - 400}))
    done = base.run("deploy", "main.py", *words, "--no-promote", "--lock-wait", "1")
    assert done.code == 0, done.err
    assert "is dead: its lock is taken over" in done.err
    assert lock(base) is None
    assert base.services == BASE | {"first", "dead"}
    base.ok("delete", "--deployment-id", "dead")


def step_04_a_dead_runs_lock_is_released_by_a_deploy_beside_it(base: Project) -> None:
    words = ("--deployment-id", "dead")
    killed_at(base, "build and start", *words, fault={"match": "deployment", "delay": 3.0})
    verb = Running(base, "deploy", "main.py", "--deployment-id", "beside", "--no-promote")
    for line in verb.said:
        if line.strip().startswith("build and start"):
            break
    service = base.stage.services()["dead"]["serviceId"]
    base.railway.graphql("mutation ($i: String!) { serviceDelete(id: $i) }", i=service)
    code, said = verb.end()
    assert code == 0, said
    assert lock(base) is None
    base.ok("delete", "--deployment-id", "beside")


def step_05_two_runs_in_the_same_second(base: Project) -> None:
    """The second one's name was taken, and it said that it removed the first one's service."""
    for words in ((), ("--deployment-id", "same")):
        base.faults({"match": "serviceCreate", "delay": 2.0})
        verb = Running(base, "deploy", "main.py", "--no-promote", *words)
        name = ""
        for line in verb.said:
            name = line.split()[1] if line.strip().startswith("deployment ") else name
            if line.strip().startswith("create the service"):
                break
        time.sleep(0.5)
        values = {"projectId": base.id, "environmentId": base.environment, "name": name}
        document = "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }"
        other = base.railway.graphql(document, i=values)["serviceCreate"]["id"]
        code, said = verb.end()
        made = base.services - BASE - {"first", name}
        if words:
            assert (code, made) == (1, set())
            assert "exists already" in said
            assert "remove" not in said
        else:
            assert (code, len(made)) == (0, 1), said
            assert "another run took that name: deployment prod-" in said
            base.ok("delete", "--deployment-id", made.pop())
        base.railway.graphql("mutation ($i: String!) { serviceDelete(id: $i) }", i=other)
        assert lock(base) is None


def step_06_a_run_that_was_unlocked_goes_on(base: Project) -> None:
    """It was promoted after the run that had taken its lock, and ended with status 0."""
    base.faults(build_seconds=3.0)
    verb = Running(base, "deploy", "main.py", "--deployment-id", "older", "--lock-wait", "60")
    for line in verb.said:
        if line.strip().startswith("build and start"):
            break
    time.sleep(0.5)
    base.ok("unlock", "--yes")
    base.faults()
    base.deploy("newer", "--lock-wait", "1")
    code, said = verb.end()
    assert code == 1, said
    assert "the deploy lock of this run was taken over, or released" in said
    assert base.active == "newer"
    assert base.services == BASE | {"first", "newer"}
    assert set(base.records) == {"first", "newer"}
    base.ok("promote", "--deployment-id", "first")
    base.ok("delete", "--deployment-id", "newer")


def step_07_two_redeploys(base: Project) -> None:
    """One ended with "REMOVED"."""
    base.faults(build_seconds=1.5)
    runs = [Running(base, "redeploy", "--deployment-id", "first") for _ in range(2)]
    ended = [run.end() for run in runs]
    base.faults()
    assert [code for code, _ in ended] == [0, 0], ended
    assert sum("another run has deployed it since" in said for _, said in ended) == 1, ended


def step_08_a_service_that_goes_between_two_reads(base: Project) -> None:
    """`logs` ended with "Railway: Service not found"."""
    for words in (["logs", "--deployment-id", "first"], ["status"]):
        base.faults({"match": "variables", "error": "Service not found", "times": 2})
        done = base.run(*words)
        base.faults()
        assert done.code == 0, done.err
    base.faults({"match": "deploymentLogs", "error": "Deployment not found"})
    assert "first was removed meanwhile" in base.run("logs", "--deployment-id", "first").error
    base.faults()
