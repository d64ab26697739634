"""A routing state with an owner: a real Redis, routers, control commands and the janitor's run."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from pulse_railway import runtime_image
from tests.conftest import Process
from tests.net import ask, eventually
from tests.scene import PREFIX, QUICK, Site, page, up

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")
Run = Callable[..., Process]

FAST = {**QUICK, "refresh_seconds": 0.3}


def on_railway(name: str, **more: str) -> dict[str, str]:
    return {"RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_SERVICE_ID": name, **more}


def command(site: Site, env: dict[str, str], *words: str) -> Any:
    return control.carry_out(list(words), {"REDIS_URL": site.server.url, **env})


def everything(site: Site) -> dict[str, str]:
    client = site.server.client
    return {key: str(client.get(key)) for key in sorted(client.scan_iter("*"))}


STEPS = [
    ("register", "--deployment-id", "x", "--service-name", "x"),
    ("promote", "--active-deployment-id", "old", "--active-service-name", "old"),
    ("retire", "--deployment-id", "old"),
    ("delete", "--deployment-id", "old"),
    ("maintenance", "on"),
    ("lock", "--holder", "h", "--by", "me", "--lease", "60"),
    ("unlock",),
    ("restore", "--active-deployment-id", "new", "--records-json", "[]"),
    ("claim", "--owner", "e/two"),
]


@pytest.mark.parametrize("words", STEPS, ids=lambda words: words[0])
def test_a_step_on_another_owners_state_is_refused(site: Site, words: tuple[str, ...]) -> None:
    assert command(site, on_railway("one"), "claim", "--owner", "e/one")["ok"]
    before = everything(site)
    answer = command(site, on_railway("two"), *words)
    assert (answer["ok"], answer["reason"]) == (False, "owner")
    assert everything(site) == before
    found = command(site, on_railway("two"), "status")
    assert (found["owner"], found["identity"]) == ("e/one", "e/two")
    assert any("another stack (e/one" in problem for problem in found["problems"])


@pytest.mark.parametrize("words", STEPS, ids=lambda words: words[0])
def test_a_step_in_a_copy_is_refused(site: Site, words: tuple[str, ...]) -> None:
    before, env = everything(site), on_railway("one", PULSE_RAILWAY_STACK="production/one")
    answer = command(site, env, *words)
    assert (answer["ok"], answer["reason"], answer["copy_of"]) == (False, "copy", "production")
    assert "`pulse-railway ensure`" in answer["error"]
    assert everything(site) == before
    assert command(site, env, "status")["copy_of"] == "production"


def test_a_state_is_claimed_by_one_of_many(site: Site) -> None:
    names = [f"r{i}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda n: command(site, on_railway(n), "claim", "--owner", f"e/{n}"), names)
        )
    (winner,) = [a["owner"] for a in answers if a["ok"]]
    me = winner.removeprefix("e/")
    before = everything(site)
    assert command(site, on_railway(me), "claim", "--owner", winner)["ok"]  # once more
    assert everything(site) == before
    answer = command(site, on_railway("z"), "claim", "--owner", "e/z", "--instead-of", winner)
    assert (answer["owner"], site.state[":owner"]) == ("e/z", "e/z")
    assert not command(site, on_railway("y"), "claim", "--owner", "e/y", "--instead-of", winner)[
        "ok"
    ]


def test_a_deploys_lock_claims_a_state_that_holds_nothing(site: Site) -> None:
    """Where `ensure` did not reach it. Before, two first deploys met in it."""
    lock = ("lock", "--holder", "h", "--by", "me", "--lease", "60")
    assert command(site, on_railway("one"), *lock)["ok"]
    assert ":owner" not in site.state, "what it holds may be another stack's"
    site.server.client.flushall()
    assert command(site, {}, *lock)["ok"]
    assert ":owner" not in site.state, "outside Railway there is none"
    assert command(site, on_railway("one"), *lock)["ok"]
    assert site.state[":owner"] == "e/one"
    assert command(site, on_railway("two"), *lock)["reason"] == "owner"


def test_a_router_in_a_copy_says_so_and_asks_no_store(site: Site, run_router: Run) -> None:
    before = everything(site)
    process = run_router(site.server, FAST, **on_railway("one", PULSE_RAILWAY_STACK="other/one"))
    eventually(lambda: ask(process.port, "/healthz").status == 200)
    answer = ask(process.port, "/")
    assert answer.status == 503
    assert "`pulse-railway ensure`" in json.loads(answer.body)["detail"]
    assert ask(process.port, "/_pulse/internal/railway/sessions").status == 503
    time.sleep(1)
    assert everything(site) == before
    assert site.server.client.pubsub_numsub(f"{PREFIX}:events")[0][1] == 0


def test_a_foreign_state_is_served_and_not_written_to(site: Site, run_router: Run) -> None:
    """Whatever it loses, and when the router ends; then it becomes the router's, and it follows."""
    site.control("claim", "--owner", "e/one")
    process = up(run_router(site.server, FAST, **on_railway("two")))
    assert page(process) == (200, b"new")
    client = site.server.client
    for key in (":deployment:old", ":promoted", ":owner", ":store"):
        client.delete(f"{PREFIX}{key}")
    site.store.announce()
    before = everything(site)
    time.sleep(1.5)
    assert everything(site) == before
    assert page(process) == (200, b"new")
    assert process.output().count("another stack's routing state: of e/one") == 1
    assert command(site, on_railway("two"), "claim", "--owner", "e/two")["ok"]
    eventually(lambda: any(":router:" in key for key in everything(site)))
    assert "another stack's routing state: no longer so" in process.output()


def test_a_router_whose_state_becomes_anothers_takes_its_report_back(
    site: Site, run_router: Run
) -> None:
    """Before, `status` showed it there, and who deletes a deployment waited for it, for 120 s."""
    for name in ("one", "two"):  # on a state that is nobody's
        up(run_router(site.server, FAST, **on_railway(name)))

    def reporting() -> list[str]:
        found = command(site, on_railway("one"), "status")["routers"]
        return sorted(router["identity"] for router in found)

    eventually(lambda: reporting() == ["e/one", "e/two"])
    site.control("claim", "--owner", "e/one")
    eventually(lambda: reporting() == ["e/one"], 5)
    assert command(site, on_railway("two"), "claim", "--owner", "e/two", "--instead-of", "e/one")[
        "ok"
    ]
    eventually(lambda: reporting() == ["e/two"], 5)


def test_a_lost_owner_comes_back(site: Site, run_router: Run) -> None:
    site.control("claim", "--owner", "e/one")
    up(run_router(site.server, FAST, **on_railway("one")))
    eventually(lambda: any(":router:" in key for key in everything(site)))
    site.server.client.flushall()
    eventually(lambda: site.state.get(":owner") == "e/one" and site.state.get(":active") == "new")


def test_two_routers_on_one_state_while_the_owner_restarts(site: Site, run_router: Run) -> None:
    """The owner is killed and the state is lost: what is not the owner's writes nothing."""
    site.control("claim", "--owner", "e/one")
    first = up(run_router(site.server, FAST, **on_railway("one")))
    other = up(run_router(site.server, FAST, **on_railway("two")))
    first.stop(signal.SIGKILL)
    again = up(run_router(site.server, FAST, **on_railway("one")))
    assert command(site, on_railway("two"), "claim", "--owner", "e/two", "--instead-of", "e/one")[
        "ok"
    ]
    again.stop(signal.SIGKILL)
    third = up(run_router(site.server, FAST, **on_railway("one")))  # it is foreign by now
    site.server.client.flushall()
    eventually(lambda: site.state.get(":owner") == "e/two" and site.state.get(":active") == "new")
    other.stop(signal.SIGKILL)
    time.sleep(0.5)
    site.server.client.flushall()
    time.sleep(1.5)
    assert site.state == {}
    assert page(third) == (200, b"new")


def test_an_owner_whose_state_another_has_replaced_goes_on(site: Site, run_router: Run) -> None:
    """Emptied, claimed by another stack and filled with its deployments: users of the first one
    are not sent there. When that is over, the first one's state is back."""
    site.control("claim", "--owner", "e/one")
    process = up(run_router(site.server, FAST, **on_railway("one")))
    client = site.server.client
    record = {"deployment_id": "x", "state": "active", "address": site.old.address}
    with client.pipeline() as pipe:
        pipe.flushall()
        theirs = {":owner": "e/two", ":store": "2", ":active": "x"}
        theirs[":deployment:x"] = json.dumps(record)
        pipe.mset({f"{PREFIX}{key}": value for key, value in theirs.items()})
        pipe.publish(f"{PREFIX}:events", "[]")
        pipe.execute()
    eventually(lambda: "another stack's routing state: of e/two" in process.output())
    time.sleep(1)
    assert page(process) == (200, b"new")
    assert page(process, "old") == (200, b"old")
    assert site.state == theirs
    client.flushall()
    claim = ["claim", "--owner", "e/one"]
    assert command(site, on_railway("one"), *claim)["ok"]
    eventually(lambda: site.state.get(":active") == "new")
    assert page(process) == (200, b"new")


# -- the janitor -----------------------------------------------------------------------------------


class Rails(janitor.Railway):  # type: ignore[misc]
    """A Railway of these services: name -> variables."""

    def __init__(self, services: dict[str, dict[str, str]], env: dict[str, str]) -> None:
        super().__init__(env)
        self.services, self.written = services, []  # type: ignore[var-annotated]

    def call(self, document: str, **variables: Any) -> Any:
        if "serviceInstances" in document:
            made: dict[str, Any] = {"createdAt": "2020-01-01T00:00:00Z", "latestDeployment": None}
            made["numReplicas"] = 1
            nodes = [{"serviceId": f"s-{n}", "serviceName": n, **made} for n in self.services]
            edges = [{"node": node} for node in nodes]
            return {"environment": {"config": {}, "serviceInstances": {"edges": edges}}}
        if "query Variables" in document:
            return {f"s{i}": v for i, v in enumerate(self.services.values())}
        self.written.append((document.split()[1].split("(")[0], variables))
        if "input" in variables:
            name = variables["input"]["serviceId"].removeprefix("s-")
            self.services[name] |= variables["input"]["variables"]
            assert variables["input"]["skipDeploys"]
        return {"serviceDelete": True}


def stack(stamped: str = "e/s-pulse-router", **more: str) -> dict[str, dict[str, str]]:
    of = {"PULSE_RAILWAY_STACK": stamped} if stamped else {}
    redis = {"REDIS_URL": "redis://example.com", "PULSE_RAILWAY_REDIS_PREFIX": PREFIX}
    return {
        "pulse-router": {**redis, **of, **more},
        "new": {"PULSE_DEPLOYMENT_ID": "new"},
        "old": {"PULSE_DEPLOYMENT_ID": "old"},
    }


def run_janitor(
    site: Site, monkeypatch: pytest.MonkeyPatch, services: dict[str, dict[str, str]], **more: str
) -> tuple[int, Any]:
    env = {"RAILWAY_PROJECT_ID": "p", "RAILWAY_ENVIRONMENT_ID": "e", "RAILWAY_TOKEN": "t"}
    env |= {
        "RAILWAY_SERVICE_NAME": "pulse-janitor",
        "PULSE_RAILWAY_JANITOR_SERVICE": "pulse-janitor",
    }
    for name, value in {**env, **more}.items():
        monkeypatch.setenv(name, value)
    rails = Rails(services, {**env, **more})
    monkeypatch.setattr(janitor, "Railway", lambda _: rails)
    return janitor.main([]), rails


@pytest.mark.parametrize(
    ("stamped", "variables", "claims"),
    [
        ("e/s-pulse-router", {}, False),  # an external Redis that holds a state
        ("e/s-pulse-router", {"PULSE_RAILWAY_OWNS_STATE": "1"}, True),
        ("e/s-pulse-router", {"REDIS_URL": "${{pulse-redis.REDIS_URL}}"}, True),
        ("", {"PULSE_RAILWAY_OWNS_STATE": "1"}, False),
    ],
)
def test_the_janitor_claims_what_is_its_own(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    stamped: str,
    variables: dict[str, str],
    claims: bool,
) -> None:
    services = stack(stamped, **variables)
    code, _ = run_janitor(site, monkeypatch, services)
    assert code == 0
    assert site.state.get(":owner") == ("e/s-pulse-router" if claims else None)
    assert services["new"].get("PULSE_RAILWAY_STACK") == ("e/s-pulse-router" if claims else None)


def test_the_janitor_claims_an_empty_store(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.server.client.flushall()
    services = {"pulse-router": stack()["pulse-router"]}
    assert run_janitor(site, monkeypatch, services)[0] == 0
    assert site.state.get(":owner") == "e/s-pulse-router"


@pytest.mark.parametrize("why", ["owner", "copied container", "copied router"])
def test_the_janitor_takes_no_step(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    site.control("claim", "--owner", "e/other")
    if why != "owner":
        site.store.apply(lambda routing: replace(routing, owner=None))
    services = stack("production/s-pulse-router" if why == "copied router" else "e/s-pulse-router")
    more = {"PULSE_RAILWAY_STACK": "production/x"} if why == "copied container" else {}
    before = everything(site)
    # one that is given back again is a write, too
    monkeypatch.setattr(janitor, "run_lock", lambda _: pytest.fail("it took its lock"))
    code, rails = run_janitor(site, monkeypatch, services, **more)
    assert (code, rails.written) == (1, [])
    assert everything(site) == before
    said = "belongs to another stack" if why == "owner" else "is a copy of production"
    assert said in capsys.readouterr().err


def test_services_of_others_are_not_touched(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    services = stack(PULSE_RAILWAY_OWNS_STATE="1")
    run = {"PULSE_RAILWAY_DEPLOY_RUN": "r"}
    stamps = {"theirs": "e/s-two-router", "copied": "o/s-x", "left": "e/s-gone", "junk": "${{a.b}}"}
    services["two-router"] = stack("e/s-two-router")["pulse-router"]
    for name, of in stamps.items():
        services[name] = {"PULSE_DEPLOYMENT_ID": name, "PULSE_RAILWAY_STACK": of, **run}
    services["unnamed"] = {"PULSE_DEPLOYMENT_ID": "unnamed", **run}
    services["emptied"] = {**services["theirs"], "PULSE_DEPLOYMENT_ID": "emptied"}
    services["emptied"] |= {"PULSE_RAILWAY_STACK": "e/s-pulse-router", "PULSE_RAILWAY_REMOVED": "1"}
    capsys.readouterr()
    code, rails = run_janitor(site, monkeypatch, services)
    assert code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = report["kept"]
    assert kept.keys() & {*stamps, "unnamed", "emptied"} == {"copied", "left", "junk", "unnamed"}
    assert "copied was copied with another router" in kept["copied"]
    assert "left ran under another router" in kept["left"]
    assert "`ensure` with the app of that stack" in kept["copied"]
    assert "`ensure --repair` with the app of that stack" in kept["left"]
    for name in ("copied", "left"):  # the other stack may be in use
        assert not {"restore", "delete"} & set(kept[name].replace("`", " ").split())
    assert "has no owner" in kept["unnamed"]
    assert "`pulse-railway restore --deployment-id unnamed`" in kept["unnamed"]
    assert report["deleted"] == []
    touched = [v["input"]["serviceId"] for _, v in rails.written if "input" in v]
    assert {"s-new", "s-old"} <= set(touched) <= {"s-new", "s-old", "s-pulse-router"}
    assert not site.store.read().records.keys() & {*stamps, "unnamed"}


def test_a_janitor_that_was_never_stamped_asks_railway_who_it_is(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ensure` stamps services without deploying them anew: its container does not know yet."""
    site.control("claim", "--owner", "e/s-pulse-router")
    capsys.readouterr()
    assert run_janitor(site, monkeypatch, stack())[0] == 0
    assert json.loads(capsys.readouterr().out)["kept"].keys() >= {"old"}


def test_a_command_for_the_janitor_meets_another_owner(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller gets the refusal, and does not wait for an answer in vain."""
    site.control("claim", "--owner", "e/other")
    services = stack()
    words = ["maintenance", "on"]
    left = {"nonce": "n", "words": words, "until": time.time() + 60}
    services["pulse-janitor"] = {"PULSE_RAILWAY_CONTROL": json.dumps(left)}
    services["pulse-janitor"]["PULSE_RAILWAY_STACK"] = "e/s-pulse-router"
    before = everything(site)
    assert run_janitor(site, monkeypatch, services)[0] == 0
    answer = json.loads(services["pulse-janitor"]["PULSE_RAILWAY_CONTROL_ANSWER"])
    assert (answer["nonce"], answer["ok"], answer["reason"]) == ("n", False, "owner")
    assert everything(site) == before


def test_nothing_is_deleted_while_another_stack_has_the_active_ones_name(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its service was deleted by hand, and another stack deployed that id: the janitor then deleted
    the version to go back to."""
    for stamp in ("e/s-two-router", "e/s-gone"):
        services = stack(PULSE_RAILWAY_OWNS_STATE="1")
        services["two-router"] = stack("e/s-two-router")["pulse-router"]
        services["new"] = {"PULSE_DEPLOYMENT_ID": "new", "PULSE_RAILWAY_STACK": stamp}
        code, _ = run_janitor(site, monkeypatch, services)
        assert code == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("refused: the active deployment new has no service: promote"), said
        assert "old" in site.store.read().records
