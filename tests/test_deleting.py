"""Verbs and janitor delete a service in its environment, and in no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from pulse_railway import contract, runtime_image
from pulse_railway.config import Target
from pulse_railway.errors import Failure
from pulse_railway.railway.api import Api
from pulse_railway.railway.tokens import Token
from pulse_railway.services import delete_service
from tests.conftest import BASE, Project
from tests.net import eventually
from tests.test_local_environments import Bearer, has_settled, in_environment, pids
from tests.test_local_restart import WEB, Service, gone
from tests.test_stacks import unstamp

ownership: Any = runtime_image.load("ownership")
janitor: Any = runtime_image.load("janitor")


# -- serviceDelete or an environment patch ---------------------------------------------------------


class RailwayError(Exception):
    """An error in Railway's answer."""


def page(nodes: list[dict[str, Any]], more: bool = False) -> dict[str, Any]:
    return {"pageInfo": {"hasNextPage": more}, "edges": [{"node": node} for node in nodes]}


def environment(
    name: str, latest: Any = None, has: bool = True, access: Any = True, more: bool = False
) -> dict[str, Any]:
    own = [{"serviceId": "s", "latestDeployment": latest}] if has else []
    others = [{"serviceId": "router", "latestDeployment": {"id": "d"}}]
    return {"id": name, "canAccess": access, "serviceInstances": page([*own, *others], more)}


class Railway:
    """An API with prepared answers, by the document's name: data, or an error to raise."""

    def __init__(self, *environments: dict[str, Any], more: bool = False, **answers: Any) -> None:
        self.calls: list[str] = []
        self.answers = {
            "Reach": {"project": {"environments": page(list(environments), more)}},
            "Stamps": {"e0": {"RAILWAY_PROJECT_ID": "p"}},
            "ServiceDelete": {"serviceDelete": True},
            "TakeOut": {"environmentPatchCommit": "id"},
            "Here": here("router"),
            "Running": {"serviceInstance": {"latestDeployment": None, "activeDeployments": []}},
            "DeploymentRemove": {"deploymentRemove": True},
            "SetVariables": {"variableCollectionUpsert": True},
            **answers,
        }

    def call(self, document: str, **_: Any) -> Any:
        name = document.split("(")[0].split()[1]
        self.calls.append(name)
        answer = self.answers[name]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def delete(self, project_token: bool = False, timeout: float = 60.0) -> Any:
        token = lambda: project_token  # noqa: E731
        return ownership.Deletion(self.call, RailwayError, "p", "e", token, timeout).delete("s")


def here(*services: str) -> dict[str, Any]:
    edges = [{"node": {"serviceId": name}} for name in services]
    return {"environment": {"serviceInstances": {"edges": edges}}}


ALONE, RAN = environment("e", {"id": "d"}), {"id": "d"}
STAMPED = {"e0": {"RAILWAY_PROJECT_ID": "p", ownership.STACK: "o/r"}}


@pytest.mark.parametrize(
    ("railway", "by_delete"),
    [
        (Railway(ALONE), True),
        (Railway(ALONE, environment("o", has=False)), True),
        (Railway(ALONE, environment("o")), True),  # an empty instance, which Railway may create
        (Railway(ALONE, environment("o", RAN)), False),
        (Railway(ALONE, environment("o"), Stamps=STAMPED), False),
        (Railway(ALONE, environment("o"), Stamps={"e0": {}}), False),
        (Railway(ALONE, environment("o"), Stamps=RailwayError("no")), False),
        (Railway(ALONE, environment("o", has=False, access=False)), False),
        (Railway(ALONE, environment("o", has=False, access=None)), False),
        (Railway(ALONE, environment("o", has=False, more=True)), False),
        (Railway(ALONE, more=True), False),
        (Railway(environment("o", has=False)), False),  # not the service's own environment
        (Railway(), False),
        (Railway(ALONE, Reach=RailwayError("Not Authorized")), False),
        (Railway(ALONE, Reach={"project": None}), False),
        (Railway(ALONE, Reach={"x": 1}), False),
    ],
)
def test_the_service_is_deleted_only_if_no_other_environment_has_it(
    railway: Railway, by_delete: bool
) -> None:
    assert railway.delete() is True
    assert ("ServiceDelete" in railway.calls, "TakeOut" in railway.calls) == (
        by_delete,
        not by_delete,
    )


def test_a_project_token_never_deletes_the_service() -> None:
    railway = Railway(ALONE)
    assert railway.delete(project_token=True) is True
    assert railway.calls == ["TakeOut", "Here"]


def test_a_deletion_is_confirmed_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(time, "sleep", slept.append)
    railway = Railway(Here=[here("router", "s")] * 4 + [here("router")])
    assert railway.delete(project_token=True) is True
    assert slept == [1, 2, 4, 8]
    railway = Railway(Here=here("router", "s"))
    deletion = ownership.Deletion(railway.call, RailwayError, "p", "e", lambda: True)
    slept.clear()
    assert deletion.delete("s") is False
    assert 45 < sum(slept) <= 60
    slept.clear()
    assert deletion.delete("s") is False  # a second deletion without effect waits less
    assert 1 <= sum(slept) <= 20


@pytest.mark.parametrize(
    ("answers", "removed", "error"),
    [
        ({}, 0, None),
        ({"Running": (RAN | {"status": "SUCCESS"}, [RAN])}, 1, None),
        ({"Running": (RAN | {"status": "BUILDING"}, [{"id": "before"}])}, 2, None),
        ({"Running": (RAN | {"status": "FAILED"}, [{"id": "before"}])}, 1, None),
        ({"Running": (RAN | {"status": "REMOVED"}, [])}, 0, None),
        (
            {"Running": (RAN | {"status": "CRASHED"}, []), "DeploymentRemove": {"x": 1}},
            1,
            "does not say that it stopped",
        ),
        ({"Here": {"environment": {"serviceInstances": {"edges": []}}}}, 0, "which services"),
        ({"Here": {}}, 0, "which services"),
        ({"Running": (None, None)}, 0, "what runs"),
    ],
)
def test_a_service_that_cannot_be_deleted_is_stopped_and_marked(
    answers: dict[str, Any], removed: int, error: str | None
) -> None:
    if running := answers.get("Running"):
        latest, active = running
        instance = {"latestDeployment": latest, "activeDeployments": active}
        answers = {**answers, "Running": {"serviceInstance": instance}}
    railway = Railway(**{"TakeOut": RailwayError("no"), "Here": here("router", "s"), **answers})
    if error:
        with pytest.raises(ownership.NotUnderstood, match=error):
            railway.delete(project_token=True)
    else:
        assert railway.delete(project_token=True) is False
    assert railway.calls.count("DeploymentRemove") == removed
    assert ("SetVariables" in railway.calls) == (error is None)


def test_a_service_that_does_not_exist_counts_as_deleted() -> None:
    error = RailwayError("ServiceInstance not found")
    without, with_service = here("router"), here("router", "s")
    assert Railway(TakeOut=error, Here=without).delete(project_token=True) is True
    assert Railway(ALONE, ServiceDelete=error, Here=without).delete() is True
    with pytest.raises(RailwayError):
        Railway(ALONE, ServiceDelete=error, Here=with_service).delete()
    with pytest.raises(ownership.NotUnderstood, match="does not say that it deleted"):
        Railway(ALONE, ServiceDelete={"serviceDelete": False}).delete()


# -- on the local Railway, whose serviceDelete acts on one environment or on all -------------------


@pytest.fixture
def web(new_project: Callable[[], Project], monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(ownership, "READ_BACK_SECONDS", 1.0)
    monkeypatch.setattr(ownership, "LEAST_SECONDS", 1.0)
    project = new_project()
    monkeypatch.setenv(contract.API_URL_VARIABLE, project.railway.api)
    project.railway.graphql(
        "mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }",
        i={"projectId": project.id, "environmentId": project.environment, "name": "router"},
    )
    return Service(project, "web", WEB)


def by_verb(service: Service, token: str) -> bool:
    api, project = Api(Token(token, "RAILWAY_TOKEN")), service.project
    return delete_service(api, Target(project.id, project.environment), service.where["s"])


def by_janitor(service: Service, token: str) -> bool:
    env = {
        "RAILWAY_PROJECT_ID": service.project.id,
        "RAILWAY_ENVIRONMENT_ID": service.project.environment,
        "RAILWAY_TOKEN": token,
        "PULSE_RAILWAY_API_URL": service.project.railway.api,
    }
    railway = janitor.Railway(env)
    railway.inspect()  # the first step of a run
    return bool(railway.delete(janitor.Backend(service.where["s"], "web", "web", 0.0)))


def token_of(service: Service, kind: str) -> str:
    if kind == "project":
        return Bearer(service.project).value
    return str(service.project.env["RAILWAY_API_TOKEN"])


@pytest.mark.parametrize("delete", [by_verb, by_janitor])
@pytest.mark.parametrize("kind", ["account", "project"])
def test_a_copys_deletion_leaves_the_original(
    web: Service, delete: Callable[[Service, str], bool], kind: str
) -> None:
    """Railway's schema lets serviceDelete delete the service in all environments."""
    copy = in_environment(web, web.project.duplicate("staging"))
    eventually(copy.get, 20)
    before, variables = web.get(), web.project.variables("web")
    web.project.faults(every_environment=True)
    assert delete(copy, token_of(copy, kind)) is True
    eventually(lambda: gone(copy.get() or before) or not copy.get(), 20)
    assert (copy.project.services, web.project.services) == ({"router"}, {"router", "web"})
    assert web.get() == before
    assert web.project.variables("web") == variables
    # now only the original has it
    web.project.faults()
    assert delete(web, token_of(web, "account")) is True
    assert web.project.services == {"router"}


@pytest.mark.parametrize("order", ["refuse", "ignore"])
@pytest.mark.parametrize("delete", [by_verb, by_janitor])
def test_a_service_that_railway_does_not_delete_is_left_empty(
    web: Service, delete: Callable[[Service, str], bool], order: str
) -> None:
    copy = in_environment(web, web.project.duplicate("staging"))
    eventually(copy.get, 20)
    original, copied = web.get(), copy.get()
    web.project.faults(every_environment=True, deletion_patch=order)
    assert delete(copy, token_of(copy, "project")) is False
    eventually(lambda: gone(copied), 20)
    assert copy.status == "REMOVED"
    assert copy.project.variables("web")[contract.REMOVED]
    assert contract.REMOVED not in web.project.variables("web")
    assert web.get() == original


def test_an_environment_hidden_from_the_token_may_have_the_service(web: Service) -> None:
    copy = in_environment(web, web.project.duplicate("staging", skipInitialDeploys=True))
    web.project.faults(every_environment=True, restricted=copy.project.environment)
    assert by_verb(web, token_of(web, "account")) is True
    web.project.faults()
    assert (web.project.services, copy.project.services) == ({"router"}, {"router", "web"})


def test_an_empty_instance_in_another_environment_is_deleted_too(web: Service) -> None:
    """`serviceCreate` may create instances in all environments."""
    copy = in_environment(web, web.project.duplicate("staging", skipInitialDeploys=True))
    web.project.faults(every_environment=True)
    assert by_verb(web, token_of(web, "account")) is True
    assert copy.project.services == web.project.services == {"router"}


def test_a_stamped_instance_in_another_environment_stays(web: Service) -> None:
    web.project.stage.set_variables("web", {contract.STACK: "e/r"})
    copy = in_environment(web, web.project.duplicate("staging", skipInitialDeploys=True))
    web.project.faults(every_environment=True)
    assert by_janitor(web, token_of(web, "account")) is True
    assert (web.project.services, copy.project.services) == ({"router"}, {"router", "web"})


@pytest.mark.parametrize("delete", [by_verb, by_janitor])
def test_an_unknown_error_is_not_taken_for_a_deletion(
    web: Service, delete: Callable[[Service, str], bool]
) -> None:
    before, token = web.get(), token_of(web, "project")
    web.project.faults(
        {"match": "deploymentRemove", "error": "Something went wrong"}, deletion_patch="refuse"
    )
    with pytest.raises((Failure, RuntimeError), match="Something went wrong"):
        delete(web, token)
    assert contract.REMOVED not in web.project.variables("web")
    assert web.get() == before
    web.project.faults()
    assert delete(web, token) is True
    assert web.project.services == {"router"}


# -- a stack ---------------------------------------------------------------------------------------


def everything(project: Project) -> Any:
    """Return a stack's routing state, variables, processes and services."""
    state = {k: v for k, v in project.state.items() if not k.startswith("router:")}
    variables = {name: project.variables(name) for name in project.services}
    return state, variables, pids(project), project.services


def test_a_failed_deploy_whose_service_cannot_be_deleted(base: Project) -> None:
    token = {"RAILWAY_TOKEN": Bearer(base, "undo").value}
    base.faults({"match": "serviceInstanceUpdate", "error": "No"}, deletion_patch="refuse")
    verb = base.run("deploy", "main.py", "--deployment-id", "third", **token)
    assert verb.code == 1
    assert "third is empty, and Railway did not let it be deleted" in verb.err
    assert base.variables("third")[contract.REMOVED]
    base.faults()
    refused = base.run("deploy", "main.py", "--deployment-id", "third")
    assert "third exists already" in refused.error
    base.ok("delete", "--deployment-id", "third")
    assert base.services == BASE | {"first"}


def test_a_copy_deletes_its_copied_deployments(base: Project) -> None:
    """Deployments without a stamp, as 0.3.x creates them, belong to the copy."""
    base.deploy("second")
    unstamp(base, "first", "second")
    before = everything(base)
    copy = base.duplicate("staging")
    eventually(lambda: has_settled(copy), 60)
    copy.ok("ensure", "main.py")
    for name in ("second", "first"):
        copy.ok("promote", "--deployment-id", name, "--force")  # no router has their records
    both = {"every_environment": True}
    cut = {"match": "deploymentRemove", "error": "Something went wrong"}
    base.faults(cut, **both, deletion_patch="refuse")
    assert "Something went wrong" in copy.run("delete", "--deployment-id", "second").error
    base.faults(**both, deletion_patch="refuse")
    report = copy.janitor()  # with its project's token
    assert (report["deleted"], report["left_empty"]) == (["second"], ["second"])
    assert "second" not in pids(copy)
    assert copy.variables("second")[contract.REMOVED]
    report = copy.janitor()
    assert (report["deleted"], report["left_empty"], report["kept"]) == ([], [], {})
    status = copy.ok("status")
    assert [row["deployment_id"] for row in status["deployments"]] == ["first"]
    (problem,) = (p for p in status["problems"] if p.startswith("second is empty"))
    assert "`pulse-railway delete --deployment-id second`" in problem
    verb = copy.run("delete", "--deployment-id", "second")
    assert verb.code == 0
    assert "second is empty" in verb.err

    base.faults(**both)
    copy.ok("delete", "--deployment-id", "second")
    assert copy.services == BASE | {"first"}
    assert everything(base) == before
