"""Several stacks in one environment of Railway, and an environment that is a copy of another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pulse_railway import contract
from pulse_railway import stack as stack_module
from pulse_railway.config import Names, Target, Where
from pulse_railway.errors import Failure
from pulse_railway.flows import baseline
from pulse_railway.flows.baseline import desired_redis_prefix
from pulse_railway.flows.status import region_problems
from pulse_railway.options import BaselineOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.railway.tokens import Token
from pulse_railway.services import replicas_by_region
from pulse_railway.stack import Service, Stack, check_redis, check_redis_prefix, find_stack, partial
from tests.conftest import TINY, Project
from tests.net import eventually
from tests.test_local_environments import create

DELETE_VARIABLE = "mutation ($i: VariableDeleteInput!) { variableDelete(input: $i) }"


def app_with_names(folder: Path, router: str, env: str, redis: str, janitor: str) -> Path:
    """Write a copy of the tiny app with these names of its stack."""
    shutil.copytree(TINY, folder)
    main = folder / "main.py"
    names = {"router": router, "env": env, "redis": redis, "janitor": janitor}
    own = "".join(f"    {role}_service='{name}',\n" for role, name in names.items())
    main.write_text(main.read_text().replace("RailwayPlugin(\n", f"RailwayPlugin(\n{own}"))
    return folder


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A second app, with a stack of its own."""
    names = ("shop-router", "shop-env", "shop-redis", "shop-janitor")
    return app_with_names(tmp_path / "shop", *names)


def json_of(project: Project, *words: str, cwd: Path = TINY) -> Any:
    verb = project.run(*words, "--json", cwd=cwd)
    assert verb.code == 0, verb.err
    return verb.json


def deployment_ids(project: Project) -> dict[str, str]:
    return {
        name: project.latest(name)["id"] for name in project.services if not name.endswith("env")
    }


def unstamp(project: Project, *names: str) -> None:
    """Delete the stamp of these services, or of all, as an earlier version leaves them."""
    for service in map(project.stage.services().__getitem__, names or project.services):
        project.railway.graphql(
            DELETE_VARIABLE,
            i={
                "projectId": project.id,
                "environmentId": project.environment,
                "serviceId": service["serviceId"],
                "name": contract.STACK,
            },
        )


def test_ensure_stamps_existing_services_without_a_deploy(base: Project) -> None:
    router = base.stage.services()["pulse-router"]["serviceId"]
    stamp = f"{base.environment}/{router}"
    assert {base.variables(name)[contract.STACK] for name in base.services} == {stamp}
    unstamp(base)
    before = deployment_ids(base)
    assert base.ok("ensure", "main.py")["changed"]
    assert {base.variables(name)[contract.STACK] for name in base.services} == {stamp}
    assert deployment_ids(base) == before
    assert base.ok("ensure", "main.py")["changed"] == []


def test_two_stacks_in_one_environment(base: Project, shop: Path) -> None:
    """Each janitor has once adopted the other stack's active deployment as an orphan, and `status`,
    `delete` and `deploy` have listed and changed the other stack's."""
    done = json_of(base, "ensure", "main.py", cwd=shop)
    assert done["changed"] == ["created the baseline"]
    refused = base.run("deploy", "main.py", "--deployment-id", "first", cwd=shop)
    assert refused.code == 1
    assert "first exists already" in refused.err
    json_of(base, "deploy", "main.py", "--deployment-id", "sold", cwd=shop)
    check_separation(base, shop)
    # without an app: the stack with the default names
    assert json_of(base, "status")["active"] == "first"
    assert json_of(base, "status", "--service", "shop-router")["active"] == "sold"
    # a log of either stack
    for service in ("pulse-router", "shop-router"):
        read = base.run("logs", "--service", service, "--json")
        assert read.code == 0, read.err
    assert json_of(base, "logs", "--deployment-id", "sold")["service"] == "sold"
    # stacks of an earlier version
    unstamp(base)
    check_separation(base, shop)
    for cwd in (TINY, shop):
        changed = json_of(base, "ensure", "main.py", cwd=cwd)["changed"]
        assert len(changed) == 5
        assert all(contract.STACK in line for line in changed)
        assert json_of(base, "ensure", "main.py", cwd=cwd)["changed"] == []
    check_separation(base, shop)


def check_separation(project: Project, shop: Path) -> None:
    """Check that neither stack's verbs, routers and page show or change the other's deployment."""
    tiny_stack, shop_stack = (TINY, "first", "pulse-router"), (shop, "sold", "shop-router")
    for stack, other_stack in ((tiny_stack, shop_stack), (shop_stack, tiny_stack)):
        (cwd, own, router), (_, other, other_router) = stack, other_stack
        status = json_of(project, "status", "--app", "main.py", cwd=cwd)
        assert [row["deployment_id"] for row in status["deployments"]] == [own]
        assert status["active"] == own
        assert status["problems"] == []
        meta = project.stage.get(f"{status['address']}/_pulse/meta").json()
        assert meta["deployment_id"] == own
        for verb in ("delete", "promote", "redeploy"):
            refused = project.run(verb, "--app", "main.py", "--deployment-id", other, cwd=cwd)
            assert refused.code == 1
            assert f"there is no deployment {other}" in refused.err
        history = project.run("history", "--service", router).out  # not the default router's
        assert own in history
        assert other not in history
        page = local_page(project, router)
        assert [row["deployment_id"] for row in page["routing"]["deployments"]] == [own]
        owners = {s["deployment_id"]: (s["own"], s["owner"]) for s in page["services"]}
        assert owners[own][0]
        assert owners[other] == (False, f"stack of {other_router}")


def local_page(project: Project, router: str) -> dict[str, Any]:
    """Return the data of the local Railway's page for the stack with this router."""
    where = {"project": project.id, "environment": project.environment}
    stacks = {s["name"]: s["id"] for s in project.railway.local("picture", **where)["stacks"]}
    assert len(stacks) == 2

    def settled() -> bool:
        pages.append(project.railway.local("picture", **where, stack=stacks[router]))
        return "deployments" in (pages[-1]["routing"] or {})

    pages: list[dict[str, Any]] = []
    eventually(settled, 20)
    return pages[-1]


def test_a_router_name_that_does_not_exist_is_refused(base: Project) -> None:
    """The message has once advised to delete pulse-env, pulse-janitor and pulse-redis."""
    for verb in (["redeploy"], ["status"], ["delete", "--deployment-id", "first"]):
        run = base.run(*verb, "--service", "pulse-routr")
        printed = run.error
        assert "no router is called pulse-routr; there is: pulse-router" in printed
        assert "Delete" not in printed
    assert base.active == "first"


def test_a_flag_that_contradicts_the_app_is_refused(base: Project, shop: Path) -> None:
    """`--service` was once ignored if invoke.yaml had an app."""
    words = ("status", "--app", "main.py", "--service")
    refused = base.run(*words, "pulse-router", cwd=shop)
    assert refused.code == 1
    assert "--service pulse-router is not the router of this app, shop-router" in refused.err
    assert "no router is called nonsense" in base.run(*words, "nonsense").error


def test_a_stacks_prefixes_and_redis_cannot_be_changed(base: Project) -> None:
    for flag, value, was in (
        ("--redis-prefix", "other", "with --redis-prefix pulse:railway"),
        ("--service-prefix", "x", "without --service-prefix"),
    ):
        verbs = (
            ["ensure"] if flag == "--redis-prefix" else ["ensure", "deploy", "status", "rollback"]
        )
        for verb in verbs:  # a deploy has once replaced the existing stack's app
            app = ["main.py"] if verb in ("ensure", "deploy") else []
            refused = base.run(verb, *app, flag, value)
            assert refused.code == 1, verb
            assert f"this stack was set up {was}" in refused.err
    delete = ("delete", "--deployment-id", "first", "--yes")
    url = "redis://u:of-another@h:1"
    for flag, value, message in (
        ("--redis-service", "other", "this stack's Redis is pulse-redis, not --redis-service oth"),
        ("--redis-url", url, "--redis-url is not the address of this stack's Redis"),
        ("--redis-prefix", "other", "this stack was set up with --redis-prefix pulse:railway"),
    ):
        refused = base.run(*delete, flag, value)
        assert message in refused.error
        assert "of-another" not in refused.err
    assert base.active == "first"


@pytest.mark.parametrize(
    ("stored", "flags", "message"),
    [
        ("${{pulse-redis.REDIS_URL}}", {"service": "pulse-redis"}, None),
        ("${{pulse-redis.REDIS_URL}}", {"service": "x"}, "is pulse-redis, not --redis-service x"),
        ("${{pulse-redis.REDIS_URL}}", {"url": "redis://u:p%2F@proxy:1/0"}, None),
        ("${{pulse-redis.REDIS_URL}}", {"url": "redis://u:q@proxy:1"}, "is not the address"),
        ("${{pulse-redis.REDIS_URL}}", {"url": "redis://[u"}, "is not the address"),
        ("redis://h:1", {"url": "redis://h:1/"}, None),
        ("redis://h:1", {"url": "redis://h:2"}, "is not the address"),
        ("redis://h:1", {"service": "pulse-redis"}, "is outside of the project"),
    ],
)
def test_flags_for_another_redis_are_refused(
    stored: str, flags: dict[str, str], message: str | None
) -> None:
    redis = Service("m", "", "pulse-redis", "", None, {}, [], None, None, {"REDIS_PASSWORD": "p/"})
    router = Service("r", "", "pulse-router", "", None, {}, [], None, None, {"REDIS_URL": stored})
    services = [router, redis] if "$" in stored else [router]
    stack = Stack(Target("p", "e"), Names(), {s.name: s for s in services})
    all_flags = {"service": None, "url": None, "prefix": None, **flags}
    if message is None:
        check_redis(stack, **all_flags)
    else:
        with pytest.raises(Failure, match=message):
            check_redis(stack, **all_flags)


def test_a_configured_prefix_is_valid_for_a_copy() -> None:
    options = BaselineOptions(Where(), Names(), redis_prefix="shop")
    of_router = {contract.REDIS_PREFIX: "shop:e-copy"}
    router = Service("r", "", "pulse-router", "", None, {}, [], None, None, of_router)
    own = Stack(Target("p", "e-copy"), Names(), {"pulse-router": router})
    check_redis_prefix(own, options.redis_prefix)
    assert desired_redis_prefix(own, options) == "shop:e-copy"
    with pytest.raises(Failure, match="set up with --redis-prefix shop:e-copy"):
        other = Stack(Target("p", "other"), Names(), {"pulse-router": router})
        check_redis_prefix(other, options.redis_prefix)


def test_a_copied_environment(base: Project) -> None:
    """Its tokens and its last promotion were once the original's, which its verbs changed."""
    original = {name: base.variables(name) for name in base.services}
    before = deployment_ids(base)
    copy = base.duplicate("staging")
    for verb in (
        ["deploy", "main.py"],
        ["promote", "--deployment-id", "first"],
        ["delete", "--deployment-id", "first"],
        ["maintenance", "on"],
        ["rollback"],
        ["restore"],
    ):
        refused = copy.run(*verb)
        assert refused.code == 1
        assert f"a copy of {base.environment}" in refused.err
        assert "pulse-railway ensure" in refused.err
    assert any(
        f"a copy of {base.environment}" in problem for problem in copy.ok("status")["problems"]
    )
    plan = copy.run("ensure", "main.py", "--plan")
    assert f"a copy of {base.environment}" in plan.err
    copy.ok("ensure", "main.py")
    router = copy.variables("pulse-router")
    assert router[contract.STACK].startswith(f"{copy.environment}/")
    assert not router.get(contract.LAST_PROMOTED)
    janitor = copy.variables("pulse-janitor")
    for name in (contract.RAILWAY_TOKEN, contract.INTERNAL_TOKEN):
        assert janitor[name] != original["pulse-janitor"][name]
    assert router[contract.RAILWAY_TOKEN] == contract.NO_TOKEN
    assert copy.ok("ensure", "main.py")["changed"] == []
    restored = copy.run("restore", "--deployment-id", "first").error
    assert "first was copied from another environment" in restored
    copy.deploy("fresh")
    assert copy.ok("status")["active"] == "fresh"
    assert copy.get("/_pulse/meta")["deployment_id"] == "fresh"
    check_that_copied_deployments_can_be_deleted(copy)
    # the original is unchanged
    assert {name: base.variables(name) for name in original} == original
    assert deployment_ids(base) == before
    assert base.get("/_pulse/meta")["deployment_id"] == "first"
    copy.delete_environment()
    assert base.get("/_pulse/meta")["deployment_id"] == "first"


def check_that_copied_deployments_can_be_deleted(copy: Project) -> None:
    """A copied deployment was once in no list, and the verb that the janitor advised failed."""
    message = "first was copied from another environment"
    status = copy.ok("status")
    states = {row["deployment_id"]: row["state"] for row in status["deployments"]}
    assert states == {"first": "copied", "fresh": "active"}
    assert status["problems"] == []
    assert message in copy.run("status").out
    kept = copy.janitor()["kept"]["first"]
    assert message in kept
    assert "restore" not in kept
    for verb in ("promote", "restore", "redeploy"):
        assert message in copy.run(verb, "--deployment-id", "first").error
    assert "`pulse-railway delete --deployment-id first`" in kept
    copy.ok("delete", "--deployment-id", "first", "--yes")
    assert "first" not in copy.services
    assert [row["deployment_id"] for row in copy.ok("status")["deployments"]] == ["fresh"]


def test_a_stack_with_other_names_is_found_without_an_app(
    new_project: Callable[[], Project], tmp_path: Path
) -> None:
    """The message has once advised to delete edge-router, memory and sweeper."""
    app = app_with_names(tmp_path / "app", "edge-router", "edge-env", "memory", "sweeper")
    project = new_project()
    json_of(project, "ensure", "main.py", cwd=app)
    unstamp(project)
    json_of(project, "deploy", "main.py", "--deployment-id", "one", cwd=app)
    assert json_of(project, "status")["active"] == "one"
    assert json_of(project, "status")["missing"] == []
    assert json_of(project, "redeploy", "--service", "edge-router")["deployment_id"] == "one"


def test_deployments_of_a_deleted_router_are_taken_over(base: Project, shop: Path) -> None:
    """Beside another stack, they could once not be assigned to a new router."""
    json_of(base, "ensure", "main.py", cwd=shop)
    json_of(base, "deploy", "main.py", "--deployment-id", "late", cwd=shop)
    ids = {name: at["serviceId"] for name, at in base.stage.services().items()}
    for role in ("router", "env", "redis", "janitor"):
        document = "mutation ($i: String!) { serviceDelete(id: $i) }"
        base.railway.graphql(document, i=ids[f"shop-{role}"])
    json_of(base, "ensure", "main.py", cwd=shop)
    status = json_of(base, "status", "--app", "main.py", cwd=shop)
    assert status["deployments"] == []
    (problem,) = (line for line in status["problems"] if "late" in line)
    assert "`pulse-railway restore --deployment-id late --app main.py`" in problem
    status = json_of(base, "status", "--service", "pulse-router")
    assert "late" not in str([status[name] for name in ("problems", "copied")])
    assert [d["deployment_id"] for d in status["deployments"]] == ["first"]
    restored = json_of(base, "restore", "--app", "main.py", "--deployment-id", "late", cwd=shop)
    assert restored["active"] == "late"
    assert json_of(base, "status", "--app", "main.py", cwd=shop)["active"] == "late"
    assert base.active == "first"
    check_that_unowned_deployments_can_be_taken_over_or_deleted(base, shop)


def check_that_unowned_deployments_can_be_taken_over_or_deleted(base: Project, shop: Path) -> None:
    """The commands in the messages once did not find these deployments."""
    create(base, "stray")
    base.stage.set_variables("stray", {contract.DEPLOYMENT_ID: "stray"})
    words = ("--service", "pulse-router")
    problems = str(json_of(base, "status", *words)["problems"])
    delete = "`pulse-railway delete --deployment-id stray --service pulse-router` removes it"
    assert delete in problems
    assert json_of(base, "delete", "--deployment-id", "stray", "--yes", *words)["deleted"]
    assert "stray" not in base.services
    base.stage.set_variables("late", {contract.STACK: "junk"})
    problems = str(json_of(base, "status", "--app", "main.py", cwd=shop)["problems"])
    assert "`pulse-railway restore --deployment-id late --app main.py` makes it" in problems
    json_of(base, "restore", "--app", "main.py", "--deployment-id", "late", cwd=shop)
    router = base.stage.services()["shop-router"]["serviceId"]
    assert base.variables("late")[contract.STACK] == f"{base.environment}/{router}"
    check_that_references_to_a_former_stack_are_mended(base, shop)


def check_that_references_to_a_former_stack_are_mended(base: Project, shop: Path) -> None:
    """After `restore` they were once dangling, and a `redeploy` started without token and Redis."""
    gone = {
        contract.INTERNAL_TOKEN: f"${{{{gone-router.{contract.INTERNAL_TOKEN}}}}}",
        contract.SESSION_REDIS_URL: "${{gone-router.REDIS_URL}}",
        "API_KEY": "${{gone-env.API_KEY}}",
        "URL": "https://${{gone-env.HOST}}/x",
    }
    base.stage.set_variables("late", {contract.STACK: "", **gone})
    base.stage.set_variables("shop-env", {"HOST": "h"})
    late = ("--app", "main.py", "--deployment-id", "late")
    restored = base.run("restore", *late, cwd=shop)
    assert restored.code == 0, restored.err
    assert "URL of late referred to services of a former stack" in restored.err
    assert "set shop-env.API_KEY, to which it refers, then `pulse-railway redeploy" in restored.err
    mended = {
        contract.INTERNAL_TOKEN: f"${{{{shop-router.{contract.INTERNAL_TOKEN}}}}}",
        contract.SESSION_REDIS_URL: "${{shop-router.REDIS_URL}}",
        "API_KEY": "${{gone-env.API_KEY}}",
        "URL": "https://${{shop-env.HOST}}/x",
    }
    assert base.variables("late").items() >= mended.items()
    refused = base.run("redeploy", *late, cwd=shop)
    assert "late refers to shop-env.API_KEY, which is not set" in refused.error
    base.stage.set_variables("shop-env", {"API_KEY": "k"})
    json_of(base, "redeploy", *late, cwd=shop)
    assert base.variables("late")["API_KEY"] == "${{shop-env.API_KEY}}"
    rows = json_of(base, "status", "--app", "main.py", cwd=shop)["deployments"]
    assert ("late", 0) in [(row["deployment_id"], row["sessions"]) for row in rows]
    check_nothing_is_taken_over(base)


def check_nothing_is_taken_over(base: Project) -> None:
    """Check that a stack leaves the deployment of another one alone, whose router was deleted.

    The only router that is left was once taken for its owner.
    """
    unstamp(base)
    document = "mutation ($i: String!) { serviceDelete(id: $i) }"
    base.railway.graphql(document, i=base.stage.services()["shop-router"]["serviceId"])
    for stamp in ("", "x"):
        base.stage.set_variables("late", {contract.STACK: stamp})
        status = json_of(base, "status", "--app", "main.py")
        assert [row["deployment_id"] for row in status["deployments"]] == ["first"]
        assert "late" not in str(status["problems"])
        for verb in ("restore", "delete", "promote", "redeploy"):
            words = [verb, "--app", "main.py", "--deployment-id", "late"]
            refused = base.run(*words, *(["--yes"] if verb == "delete" else []))
            assert refused.code == 1, verb
            assert "restore --deployment-id" not in refused.err
            assert "delete --deployment-id" not in refused.err
        ran = base.janitor()
        assert (ran["exit"], ran["deleted"]) == (0, [])
        assert "another stack's" in str(ran)
    assert "late" in base.services
    assert base.active == "first"
    json_of(base, "ensure", "main.py")
    assert json_of(base, "status", "--service", "pulse-router")["problems"] == []


def test_changes_made_on_railway_are_reported_and_reverted(base: Project) -> None:
    """`railway scale` on a backend breaks affinity, which `status` once did not report."""
    ids = {name: at["serviceId"] for name, at in base.stage.services().items()}
    two = {"us-west2": {"numReplicas": 2}}  # what `railway scale us-west2=2` commits
    apart = {"europe-west4-drams3a": {"numReplicas": 2}, "us-west2": {"numReplicas": 1}}
    patch = {
        ids["first"]: {"deploy": {"multiRegionConfig": two}},
        ids["pulse-janitor"]: {"deploy": {"startCommand": "sleep 1", "multiRegionConfig": apart}},
    }
    document = (
        "mutation ($e: String!, $p: EnvironmentConfig)"
        " { environmentPatchCommit(environmentId: $e, patch: $p) }"
    )
    before = base.latest("first")["id"]
    base.railway.graphql(document, e=base.environment, p={"services": patch})
    assert base.latest("first")["id"] == before, "Railway redeploys nothing for it"
    problems = json_of(base, "status", "--service", "pulse-router")["problems"]
    assert "first has 2 replicas, and a tab's state is in one of them" in str(problems)
    assert "`railway scale us-west2=1 --service first` leaves one" in str(problems)
    assert (
        "numReplicas, startCommand of pulse-janitor was changed on Railway: `pulse-railway ensure`"
        in str(problems)
    )
    no_router = base.run("doctor", "main.py", "--json", cwd=TINY, PATH="/usr/bin:/bin")
    bad = [check["said"] for check in no_router.json["checks"] if check["verdict"] == "bad"]
    assert "startCommand of pulse-janitor" in str(bad), "also if the router cannot be reached"
    json_of(base, "ensure", "main.py")
    assert json_of(base, "ensure", "main.py")["changed"] == []
    read = "query ($e: String!) { environment(id: $e) { config(decryptVariables: false) } }"
    config = base.railway.graphql(read, e=base.environment)["environment"]["config"]
    janitor = config["services"][ids["pulse-janitor"]]["deploy"]["multiRegionConfig"]
    assert {region: at for region, at in janitor.items() if at} == {
        "europe-west4-drams3a": {"numReplicas": 1}
    }, "the janitor stays in its region"
    one = {ids["first"]: {"deploy": {"multiRegionConfig": {"us-west2": {"numReplicas": 1}}}}}
    base.railway.graphql(document, e=base.environment, p={"services": one})
    eventually(lambda: json_of(base, "status", "--service", "pulse-router")["problems"] == [], 60)


RENAME = (
    "mutation ($s: String!, $i: ServiceUpdateInput!) { serviceUpdate(id: $s, input: $i) { id } }"
)


def test_a_renamed_service_is_still_the_stacks(base: Project) -> None:
    """A renamed Redis was taken for the env service, with the advice to delete it."""
    ids = {name: at["serviceId"] for name, at in base.stage.services().items()}
    json_of(base, "ensure", "main.py")
    for role in ("redis", "janitor", "router"):
        name = f"pulse-{role}"
        base.railway.graphql(RENAME, s=ids[name], i={"name": f"a-{role}"})
        status = json_of(base, "status")
        assert status["missing"] == []
        assert "elete" not in str(status["problems"])
    changed = json_of(base, "ensure", "main.py")["changed"]
    assert {line.partition(":")[0] for line in changed} >= {"a-router", "a-janitor"}
    assert json_of(base, "ensure", "main.py")["changed"] == []
    assert base.janitor("a-janitor")["exit"] == 0
    for role in ("redis", "janitor", "router"):
        base.railway.graphql(RENAME, s=ids[f"pulse-{role}"], i={"name": f"pulse-{role}"})
    json_of(base, "ensure", "main.py")
    assert json_of(base, "status")["problems"] == []
    assert base.active == "first"


def test_services_without_a_replica(base: Project) -> None:
    """`status` once did not report them."""
    ids = {name: at["serviceId"] for name, at in base.stage.services().items()}
    none = {"deploy": {"multiRegionConfig": {"us-west2": {"numReplicas": 0}}}}
    patch = {ids["pulse-router"]: none, ids["pulse-redis"]: none}
    document = (
        "mutation ($e: String!, $p: EnvironmentConfig)"
        " { environmentPatchCommit(environmentId: $e, patch: $p) }"
    )
    base.railway.graphql(document, e=base.environment, p={"services": patch})
    words = ("--service", "pulse-router")
    problems = str(json_of(base, "status", *words)["problems"])
    assert "numReplicas of pulse-router was changed on Railway: `pulse-railway ensure`" in problems
    assert "`railway scale REGION=1 --service pulse-redis` gives it one" in problems
    json_of(base, "ensure", "main.py")
    one = {ids["pulse-redis"]: {"deploy": {"multiRegionConfig": {"us-west2": {"numReplicas": 1}}}}}
    base.railway.graphql(document, e=base.environment, p={"services": one})
    assert json_of(base, "ensure", "main.py")["changed"] == []
    eventually(lambda: json_of(base, "status", *words)["problems"] == [], 60)


def test_a_region_that_does_not_exist(base: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Railway is asked for its regions only if a region is not in our list."""
    monkeypatch.setenv(contract.API_URL_VARIABLE, base.railway.api)
    api = Api(Token(base.env["RAILWAY_API_TOKEN"], "RAILWAY_API_TOKEN"))
    router = Service("r", "", "pulse-router", "", None, {}, [], None, None)
    stack = Stack(Target(base.id, base.environment), Names(), {"pulse-router": router})
    for regions, advice in (
        ({"us-west2": 2}, ""),
        ({"moon": 2}, "`railway scale moon=0 us-west2=2 --service pulse-router`"),
        ({"moon": 1, "us-west2": 1}, "`railway scale moon=0 us-west2=2 --service pulse-router`"),
    ):
        router.regions = dict(regions)
        problems = region_problems(api, stack)
        assert advice in str(problems) if advice else not problems
        assert bool(api.calls) == bool(advice)


@pytest.mark.parametrize(
    ("regions", "replicas", "expected"),
    [
        ({"a": 2}, 1, {"a": 1}),
        ({"a": 1, "b": 1}, 1, {"a": 1, "b": 0}),
        ({"a": 1, "b": 2}, 1, {"a": 0, "b": 1}),
        ({"a": 1, "b": 1}, 3, {"a": 2, "b": 1}),
        ({"a": 3, "b": 1}, 3, {"a": 2, "b": 1}),
    ],
)
def test_replicas_stay_in_their_regions(
    regions: dict[str, int], replicas: int, expected: dict[str, int]
) -> None:
    assert replicas_by_region(regions, replicas) == expected


def test_two_services_of_one_name_are_refused() -> None:
    """A template was deployed again before its services appeared; `ensure` waited for good."""
    keys = [*stack_module._SETTINGS, "source", "latestDeployment"]
    empty: dict[str, Any] = dict.fromkeys(keys)
    empty |= {"domains": {"customDomains": [], "serviceDomains": []}, "createdAt": ""}
    nodes = [
        {"node": {**empty, "id": "i", "serviceId": of, "serviceName": "pulse-router"}}
        for of in ("s1", "s2")
    ]

    class Prepared:
        def call(self, document: str, **variables: str) -> Any:
            environment = {"config": {}, "serviceInstances": {"edges": nodes}}
            return {"environment": environment, "project": {"services": {"edges": []}}}

    stack = stack_module.read_services(cast(Any, Prepared()), Target("p", "e"), Names())
    with pytest.raises(Failure, match="two services named pulse-router \\(s1 and s2\\)"):
        stack_module.require_complete_answer(stack)


def test_a_service_that_is_deleted_while_the_stack_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A janitor can delete a service between the two queries: then both are sent again."""
    answers = iter([GraphqlError("Service not found"), None])

    def variables(*_: Any) -> None:
        if error := next(answers):
            raise error

    monkeypatch.setattr(stack_module, "read_services", lambda _, to, n: Stack(to, n, {}))
    monkeypatch.setattr(stack_module, "read_variables", variables)
    assert stack_module.inspect(cast(Any, None), Target("p", "e"), Names()).services == {}
    assert next(answers, "both were read") == "both were read"


BASELINE = ("pulse-env", "pulse-redis", "pulse-janitor")


def part_of(*names: str, stamp: str = "", others: str = "", **variables: str) -> Stack:
    """Return a stack with these services, and another service of the environment."""
    variables |= {contract.STACK: stamp} if stamp else {}
    own = {n: Service(n, "", n, "", None, {}, [], None, None, dict(variables)) for n in names}
    other = [Service(others, "", others, "", None, {}, [], None, None)] if others else []
    return Stack(Target("p", "e"), Names(), own, other)


def test_no_deletion_is_advised_if_the_router_may_have_another_name() -> None:
    message = partial(part_of(*BASELINE))
    assert "pulse-env, pulse-janitor, pulse-redis found, pulse-router missing" in message
    assert "pass --service" in message
    assert "Nothing says whose pulse-env, pulse-janitor, pulse-redis is" in message
    assert "scaffold" not in message
    message = partial(replace(part_of(*BASELINE), no_such_router="edge"))
    assert "no router is called pulse-router (there is: edge)" in message


def test_deletion_of_a_deleted_routers_services_is_advised() -> None:
    message = partial(part_of(*BASELINE, stamp="e/lost"))
    assert "delete pulse-env, pulse-janitor, pulse-redis on Railway and run" in message
    assert "all sessions and the routing state" in message
    # the router's service exists, whatever its variables show
    assert "scaffold" not in partial(part_of(*BASELINE, stamp="e/lost", others="lost"))
    assert "scaffold" not in partial(part_of(*BASELINE, stamp="elsewhere/lost"))


def test_a_default_name_does_not_show_the_owner() -> None:
    """The message has once advised to delete all services with default names."""
    stack = part_of("pulse-router", "pulse-env", "pulse-redis")
    message = partial(stack)
    assert "Nothing says whose pulse-env, pulse-redis is" in message
    assert "delete pulse-router on Railway" in message
    assert "all sessions" not in message
    stack.services["pulse-router"].variables["REDIS_URL"] = "${{pulse-redis.REDIS_URL}}"
    stack.services["pulse-env"].variables[contract.STACK] = "e/pulse-router"
    message = partial(stack)
    assert "Nothing says" not in message
    assert "delete pulse-env, pulse-redis, pulse-router on Railway" in message


def test_another_stack_is_not_for_deletion(monkeypatch: pytest.MonkeyPatch) -> None:
    """`scaffold` of an app with default names advised to delete the only stack there."""
    names = ("blog-router", "blog-env", "blog-redis", "blog-janitor")
    environment = part_of(*names, stamp="e/blog-router")
    router = environment.services["blog-router"]
    router.variables |= {"REDIS_URL": "${{blog-redis.REDIS_URL}}", contract.RUNTIME_VERSION: "1"}

    def inspect(_: Api, __: Target, names: Names) -> Stack:
        return find_stack(replace(environment, names=names))

    monkeypatch.setattr(baseline, "inspect", inspect)
    target, options = environment.target, BaselineOptions(Where(), Names())

    def refusal() -> str:
        with pytest.raises(Failure) as refused:
            baseline.scaffold(cast(Api, None), target, options, Output())
        return str(refused.value)

    message = refusal()
    assert "this one is that of blog-router: leave it as it is" in message
    assert "RailwayPlugin(router_service=..." in message
    assert "delete" not in message
    router.variables[contract.APP] = '{"name": "blog"}'
    assert "that of blog-router, which serves the app 'blog'" in refusal()
    options = BaselineOptions(Where(), Names(*names, asked=True))
    assert "use `pulse-railway ensure`, or delete those services first" in refusal()
    del environment.services["blog-janitor"]
    environment.services["blog-env"].variables.clear()
    message = partial(find_stack(environment))  # a run with the default names
    assert "Nobody named blog-router, and it may be another stack's" in message
    assert "delete" not in message
    message = partial(inspect(cast(Api, None), target, options.names))
    assert "delete blog-redis, blog-router on Railway" in message


def test_a_copy_has_its_own_prefix_in_a_shared_redis() -> None:
    options = BaselineOptions(Where(), Names())
    of_router = {contract.REDIS_PREFIX: "shop"}
    router = Service("r", "", "pulse-router", "", None, {}, [], None, None, of_router)
    stack = Stack(Target("p", "e-copy"), Names(), {"pulse-router": router})
    assert desired_redis_prefix(stack, options) == "shop"
    stack.copied_from = "e"
    assert desired_redis_prefix(stack, options) == "shop:e-copy"
    stack.services["pulse-redis"] = replace(router, name="pulse-redis")  # its own
    assert desired_redis_prefix(stack, options) == "shop"
