"""A deploy from the wrong folder does not replace a site unseen."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pulse_railway import app_identity, contract
from pulse_railway.app.plugin import RailwayPlugin
from pulse_railway.app_identity import AppIdentity
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from pulse_railway.stack import Service, Stack
from tests.conftest import TINY, Project


@pytest.mark.parametrize(
    ("remote", "known_as"),
    [
        ("https://github.com/org/shop.git", "github.com/org/shop"),
        ("https://ada:ghp_secret@github.com/org/shop", "github.com/org/shop"),
        ("git@github.com:org/shop.git", "github.com/org/shop"),
        ("ssh://git@github.com:2222/org/shop.git/", "github.com/org/shop"),
        ("/srv/git/shop.git", "/srv/git/shop"),
        (None, None),
    ],
)
def test_a_repository_has_one_name_and_no_credentials(
    remote: str | None, known_as: str | None
) -> None:
    assert app_identity.repository(remote) == known_as


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


def test_an_app_in_a_repository(tmp_path: Path) -> None:
    (tmp_path / "services/shop").mkdir(parents=True)
    app: Any = SimpleNamespace(
        context=tmp_path / "services", file="shop/main.py", plugin=RailwayPlugin(name="shop")
    )
    assert app_identity.of_app(app) == AppIdentity("shop", None, "shop/main.py")
    git(tmp_path, "init", "-q")
    git(tmp_path, "remote", "add", "origin", "https://x:y@example.org/org/mono.git")
    app.context = tmp_path / "services"
    found = AppIdentity("shop", "example.org/org/mono", "services/shop/main.py")
    assert app_identity.of_app(app) == found


def stack_that_serves(text: str | None) -> Stack:
    variables = {} if text is None else {contract.APP: text}
    router = Service("r", "", "pulse-router", "", None, {}, [], None, None, variables)
    return Stack(Target("p", "e"), Names(), {"pulse-router": router})


SHOP = AppIdentity("shop", "example.org/org/mono", "shop/main.py")


@pytest.mark.parametrize(
    ("served", "deployed", "said"),
    [
        (SHOP, SHOP, ""),
        (SHOP, AppIdentity("blog", None, None), "refused"),
        (SHOP, AppIdentity("shop", "elsewhere.org/a/b", "main.py"), ""),  # by its user's own word
        (SHOP, AppIdentity(None, "example.org/org/mono", "shop/main.py"), ""),
        (SHOP, AppIdentity(None, "elsewhere.org/a/b", "shop/main.py"), "elsewhere.org/a/b"),
        (SHOP, AppIdentity(None, None, "blog/main.py"), "blog/main.py"),
        (AppIdentity(), SHOP, ""),
        (SHOP, AppIdentity(), ""),
    ],
)
def test_two_names_are_refused_and_another_place_is_a_warning(
    served: AppIdentity, deployed: AppIdentity, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = stack_that_serves(app_identity.to_json(served))
    assert app_identity.stored_identity(stack) == served
    output = Output()
    if said == "refused":
        with pytest.raises(Failure, match="serves the app 'shop', and this one is 'blog'"):
            app_identity.check_same_app(stack, deployed, False, output)
        app_identity.check_same_app(stack, deployed, True, output)
    else:
        app_identity.check_same_app(stack, deployed, False, output)
    warned = capsys.readouterr().err
    assert (said in warned) if said and said != "refused" else warned == ""


def test_backends_name_the_app_of_a_router_that_was_created_again() -> None:
    """Another app's `ensure --repair` and deploy were accepted, and the rightful app refused."""

    def service(name: str, created: str, **variables: str) -> Service:
        made = Service(name, "", name, created, None, {}, [], None, None)
        made.variables = variables
        return made

    def app(name: str) -> dict[str, str]:
        return {contract.APP: json.dumps({"name": name})}

    old = service("v1", "2026-01-01", PULSE_DEPLOYMENT_ID="v1", **app("blog"))
    new = service("v2", "2026-02-01", PULSE_DEPLOYMENT_ID="v2", **app("shop"))
    router = service("pulse-router", "2026-03-01")
    services = {s.name: s for s in (router, old, new)}
    stack = Stack(Target("p", "e"), Names(), services)
    assert app_identity.stored_identity(stack).name == "shop"
    router.variables = app("blog")  # after `deploy --replace-app`
    assert app_identity.stored_identity(stack).name == "blog"


@pytest.mark.parametrize(
    "text", [None, "", "no JSON", "[]", "null", '{"name": 3}', '{"name": ""}', "[" * 99_999]
)
def test_what_is_not_understood_says_nothing(text: str | None) -> None:
    assert app_identity.stored_identity(stack_that_serves(text)) == AppIdentity()


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "\x1b[2J"])
def test_a_name_is_printable(name: str) -> None:
    with pytest.raises(ValueError, match="name takes 1 to 64 printable characters"):
        RailwayPlugin(name=name)


def named(folder: Path, name: str) -> Path:
    shutil.copytree(TINY, folder)
    main = folder / "main.py"
    main.write_text(main.read_text().replace("RailwayPlugin(\n", f"RailwayPlugin(name={name!r},\n"))
    return folder


def test_another_app_does_not_take_its_place(base: Project, tmp_path: Path) -> None:
    """Before, `cd other-app; pulse-railway deploy` with the same token replaced the site."""
    shop, blog = named(tmp_path / "shop", "shop"), named(tmp_path / "blog", "blog")
    router = base.latest("pulse-router")["id"]
    assert base.run("ensure", "main.py", cwd=shop).code == 0
    assert base.latest("pulse-router")["id"] == router  # it is noted, and nothing is deployed
    before = json.loads(base.variables("pulse-router")[contract.APP])
    assert before["name"] == "shop"
    # an app without a name takes nobody's
    done = base.run("deploy", "main.py", "--no-promote", "--deployment-id", "unnamed")
    assert done.code == 0, done.err
    assert json.loads(base.variables("pulse-router")[contract.APP])["name"] == "shop"
    refusal = "pulse-router serves the app 'shop', and this one is 'blog'"
    assert refusal in base.run("doctor", "main.py", cwd=blog).out
    for verb in ("deploy", "ensure"):
        refused = base.run(verb, "main.py", cwd=blog)
        assert refused.code == 1
        assert "pulse-router serves the app 'shop', and this one is 'blog'" in refused.err
    state = base.state
    for words in (
        *(["maintenance", "on"], ["redeploy"], ["rollback"], ["restore"], ["unlock"]),
        ["promote", "--deployment-id", "unnamed"],
        ["delete", "--deployment-id", "unnamed"],
        ["remove", "--deployment-name", "unnamed"],
    ):
        refused = base.run(*words, "--app", "main.py", cwd=blog)
        assert refused.code == 1, words
        assert "serves the app 'shop', and --app is 'blog'" in refused.error
        assert "--replace-app" not in refused.error
    assert base.state == state
    for words in (["status"], ["history"], ["logs"]):
        assert base.run(*words, "--app", "main.py", cwd=blog).code == 0, words
    assert base.run("unlock", "--app", "main.py", cwd=shop).code == 0
    refused = base.run("scaffold", "main.py", cwd=blog)
    assert "this one is that of pulse-router, which serves the app 'shop'" in refused.error
    assert "delete" not in refused.error
    done = base.run("deploy", "main.py", "--replace-app", "--deployment-id", "posts", cwd=blog)
    assert done.code == 0, done.err
    noted = json.loads(base.variables("pulse-router")[contract.APP])
    assert (noted["name"], noted["file"]) == ("blog", "main.py")
    assert json.loads(base.variables("posts")[contract.APP])["name"] == "blog"
    assert base.run("deploy", "main.py", "--no-promote", cwd=shop).code == 1
