"""`deploy --preview` and `--evict`, by verbs on a local Railway."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from examples import demo
from tests.conftest import BASE, Project, Verb, play
from tests.net import eventually
from tests.test_life import Listener
from tests.users import PREFIX, LiveSite

ONCE: dict[str, Any] = {}  # what a step leaves for the later ones


@pytest.fixture(scope="module")
def site(base: Project) -> LiveSite:
    return LiveSite(base)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("site")
def test_previews_and_evictions(request: pytest.FixtureRequest) -> None:
    play(globals(), request)


def reviewer(site: LiveSite) -> httpx.Client:
    """A browser: it keeps cookies, and follows redirects."""
    trust = demo.tls_context(site.project.stage.bundle)
    return httpx.Client(verify=trust, trust_env=False, follow_redirects=True)


def answering(client: httpx.Client, url: str) -> str | None:
    found: str | None = client.get(url).headers.get("x-pulse-selected-deployment")
    return found


def step_01_a_preview_is_deployed(site: LiveSite) -> None:
    project, listener = site.project, Listener()
    verb: Verb = project.run(
        *"deploy main.py --preview --deployment-id pr-12 --notify".split(), listener.url
    )
    assert verb.code == 0, verb.err
    lines = [line for line in verb.err.splitlines() if "pulse_preview=" in line]
    assert len(lines) == 1
    assert lines[0].startswith("only this link opens it: https://")
    link = lines[0].split()[-1]
    ticket = str(urlsplit(link).query).removeprefix("pulse_preview=")
    key = ticket.partition(".")[2]
    assert link.startswith(f"{site.address}/?pulse_preview=pr-12.")
    ONCE.update(link=link, ticket=ticket, key=key)
    assert "pulse-railway promote --deployment-id pr-12" in verb.err
    assert verb.err.count(key) == 1
    assert key not in json.dumps(listener.received)
    assert listener.received[-1]["text"].startswith(f"pr-12 is up, a preview at {site.address} (")
    # the key is nowhere on Railway, nor in Redis, nor in a log; its hash is in both
    for path in site.project.railway.root.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".log", ".jsonl", ".txt"):
            assert key not in path.read_text(errors="replace"), path
    record = json.loads(project.state["preview:pr-12"])
    assert project.variables("pr-12")["PULSE_RAILWAY_PREVIEW"] == record["preview"]
    assert not project.variables("pr-12")["PULSE_RAILWAY_DEPLOY_RUN"]  # see docs/upgrading.md
    assert key not in json.dumps(project.state)
    assert project.active == "first"


def step_02_who_reaches_it(site: LiveSite) -> None:
    with reviewer(site) as browser, reviewer(site) as stranger:
        meta = f"{site.address}/_pulse/meta"
        by_affinity = f"{meta}?pulse_deployment=pr-12"
        assert answering(stranger, meta) == "first"
        assert stranger.get(by_affinity).status_code == 409
        assert answering(stranger, f"{meta}?pulse_preview=pr-12.{'a' * 43}") is None
        landed = browser.get(ONCE["link"])
        assert landed.headers["x-pulse-selected-deployment"] == "pr-12"
        assert str(landed.url) == f"{site.address}/"  # without the key
        assert answering(browser, meta) == "pr-12"
        assert answering(browser, by_affinity) == "pr-12"
        stranger.headers["x-pulse-preview"] = ONCE["ticket"]
        assert answering(stranger, meta) == "pr-12"
        browser.get(f"{site.address}/?pulse_preview=")
        assert answering(browser, meta) == "first"


def step_03_the_verbs_know_it(site: LiveSite) -> None:
    project = site.project
    assert (project.row("pr-12")["state"], project.ok("status")["problems"]) == ("preview", [])
    assert "preview" in project.run("status").out
    assert "preview" in project.run("history").out
    doctor = project.run("doctor", "main.py", "--json")
    assert [c for c in doctor.json["checks"] if "pr-12" in str(c) and c["verdict"] == "bad"] == []
    report = project.janitor()
    assert (report["deleted"], report["kept"].get("pr-12")) == ([], "a preview")
    assert "no earlier deployment" in project.run("rollback").error
    refused = project.run("deploy", "main.py", "--deployment-id", "pr-12", "--preview")
    assert "exists already" in refused.error


def step_04_a_lost_record_stays_closed(site: LiveSite) -> None:
    project = site.project
    with reviewer(site) as browser:
        site.lose_everything()
        meta = f"{site.address}/_pulse/meta"
        assert project.ok("restore")["active"] == "first"
        assert "deployment:pr-12" not in project.state
        assert json.loads(project.state["preview:pr-12"])["preview"]
        assert browser.get(f"{meta}?pulse_deployment=pr-12").status_code == 409
        browser.get(ONCE["link"])
        assert answering(browser, meta) == "pr-12"
    assert project.ok("status")["problems"] == []


def step_05_a_promotion_opens_it(site: LiveSite) -> None:
    project = site.project
    assert project.ok("promote", "--deployment-id", "pr-12")["active"] is True
    assert site.visited == "pr-12"
    assert "preview:pr-12" not in project.state
    assert project.records["pr-12"]["state"] == "active"
    assert not project.variables("pr-12")["PULSE_RAILWAY_PREVIEW"]
    assert project.variables("pr-12")["PULSE_RAILWAY_DEPLOY_RUN"]
    assert site.get(pulse_deployment="first").json()["deployment_id"] == "first"


def step_06_delete_removes_a_preview(site: LiveSite) -> None:
    project = site.project
    done = project.ok("deploy", "main.py", "--preview", "--deployment-name", "pr-13")
    name = done["deployment_id"]
    assert (done["active"], done["preview"].count("pulse_preview=")) == (False, 1)
    assert project.ok("remove", "--deployment-name", "pr-13", "--yes")["deployment_id"] == name
    assert name not in project.services
    assert f"preview:{name}" not in project.state
    with reviewer(site) as browser:
        browser.get(done["preview"])
        assert answering(browser, f"{site.address}/_pulse/meta") == "pr-12"


def step_07_a_failed_preview_leaves_nothing(site: LiveSite) -> None:
    before = site.project.state
    verb = site.project.run(
        *"deploy main.py --preview --deployment-id no --env TINY_FAILS=x".split()
    )
    assert verb.code == 1
    assert "pulse_preview" not in verb.err
    assert "no" not in site.project.services
    assert {k for k in site.project.state if "preview" in k} == {
        k for k in before if "preview" in k
    }


def step_08_a_router_of_an_earlier_version_is_refused(
    site: LiveSite,
) -> None:
    from pulse_railway.errors import Failure
    from pulse_railway.flows import preview

    stack: Any = type("Stack", (), {"names": type("Names", (), {"router": "pulse-router"})})
    with pytest.raises(Failure, match="pulse-router is of an earlier version, without previews"):
        preview.require_previews(stack, {"deployments": []})


def step_09_flags_that_exclude_each_other(site: LiveSite) -> None:
    def refused(*words: str) -> str:
        return site.project.run(*words).error

    deploy = ("deploy", "main.py")
    assert "--preview excludes --canary and --bake" in refused(*deploy, "--preview", "--bake", "9")
    for words, named in (
        (("--canary", "5"), "--canary"),
        (("--bake", "9"), "--bake"),
        (("--no-promote",), "--no-promote"),
        (("--preview",), "--preview"),
    ):
        assert f"--evict excludes {named}" in refused(*deploy, "--evict", *words)
    promote = ("promote", "--deployment-id", "first", "--evict")
    assert "--evict excludes --weight" in refused(*promote, "--weight", "0")


def step_10_deploy_evicts_the_old_versions(site: LiveSite) -> None:
    """All but the preview: what drains, is held or was rolled back from; their tabs are told."""
    project = site.project
    site.deploy("held", "--no-promote", tabs=0)
    ONCE["kept"] = project.ok(*"deploy main.py --preview --deployment-id pr-14".split())
    site.deploy("second", tabs=2)
    project.ok("rollback")  # `second` is rolled back from, and has tabs
    done = project.ok(*"deploy main.py --deployment-id fixed --evict".split())
    assert (done["active"], set(done["evicted"])) == (True, {"first", "held", "pr-12", "second"})
    assert done["drains"] is None  # it is gone
    assert project.services == BASE | {"fixed", "pr-14"}
    assert set(project.records) == {"fixed"}
    assert site.visited == "fixed"
    assert {path.stem for path in site.tabs.glob("*.told")} == {"held", "second"}
    for name in done["evicted"]:
        assert site.get(pulse_deployment=name).status_code == 409, name
    entries = [e for e in project.ok("history")["history"] if e["what"] == "remove"][-4:]
    assert {e["deployment_id"] for e in entries} == set(done["evicted"])
    assert {e["why"] for e in entries} == {"fixed evicts it"}
    assert "no earlier deployment" in project.run("rollback").error
    assert project.ok("status")["lock"] is None


def step_11_promote_evicts_too(site: LiveSite) -> None:
    project = site.project
    verb = project.ok(*"promote --deployment-id pr-14 --evict".split())
    assert (verb["active"], verb["evicted"]) == (True, ["fixed"])
    assert project.services == BASE | {"pr-14"}
    eventually(lambda: site.visited == "pr-14")
    again = project.ok(*"promote --deployment-id pr-14 --evict".split())
    assert again["evicted"] == []


def step_12_what_a_router_may_still_route_to_stays(site: LiveSite) -> None:
    project = site.project
    site.deploy("last", tabs=0)
    ghost = f"{PREFIX}:router:ghost"  # it has not reported for a while, and may run
    project.redis.set(ghost, json.dumps({"epoch": 1, "version": "x"}), ex=50)
    verb = project.run(*"promote --deployment-id last --evict".split())
    assert "pr-14 is retired, and its service stays for now: the router ghost" in verb.error
    assert "pr-14" in project.services
    assert site.get(pulse_deployment="pr-14").status_code == 409
    project.redis.delete(ghost)
    again = project.ok(*"promote --deployment-id last --evict".split())
    assert again["evicted"] == ["pr-14"]
    assert project.services == BASE | {"last"}
