"""What people expect of a command line and of Invoke tasks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invoke.config import Config
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task

from pulse_railway import cli, contract, help, naming, options, tasks
from pulse_railway.config import Names, Target
from pulse_railway.errors import Failure
from pulse_railway.flags import FLAGS, value
from pulse_railway.flows import remove
from pulse_railway.stack import Service, Stack
from tests.conftest import ROOT, Project
from tests.net import eventually

COMMAND = [sys.executable, "-m", "pulse_railway"]


def service(deployment_id: str, name: str | None) -> Service:
    variables = {contract.DEPLOYMENT_ID: deployment_id} | ({contract.NAME: name} if name else {})
    at = "2026-01-01T00:00:00Z"
    return Service(deployment_id, "", deployment_id, at, None, {}, [], None, None, variables)


def stack(*services: Service) -> Stack:
    return Stack(Target("p", "e"), Names(), {s.name: s for s in services})


STAMP = "260101-000000"
EMPTIES: list[Any] = [0, False, "", []]


def test_a_name_is_compared_whole() -> None:
    """`remove --deployment-name prod` has once removed prod-featu-..., which has another name."""
    feature = service(f"prod-featu-{STAMP}", "prod-feature-x")
    assert remove.find_by_name(stack(feature), "prod-feature-x") == feature.deployment_id
    for name in ("prod", "prod-feature", "prod-featu"):
        with pytest.raises(Failure, match=f"no deployment is named {name}"):
            remove.find_by_name(stack(feature), name)
    prod = service(f"prod-{STAMP}", "Prod")
    assert remove.find_by_name(stack(feature, prod), "prod") == prod.deployment_id
    with pytest.raises(Failure, match="several deployments are named prod"):
        remove.find_by_name(stack(prod, service("prod-260101-000001", "prod")), "prod")
    assert remove.find_by_name(stack(prod), f"prod-{STAMP}") == prod.deployment_id


def test_deployments_of_0_3_x_are_found_by_their_ids_form() -> None:
    old = service(f"prod-{STAMP}", None), service(f"prod-eu-{STAMP}", None)
    assert remove.find_by_name(stack(*old), "prod") == f"prod-{STAMP}"
    assert remove.find_by_name(stack(*old), "prod eu") == f"prod-eu-{STAMP}"
    cut = service(f"{naming.deployment_slug('prod-feature-x')}-{STAMP}", None)
    assert remove.find_by_name(stack(cut), "prod-feature-x") == cut.deployment_id


def test_a_name_without_letters_is_refused() -> None:
    with pytest.raises(ValueError, match="no letter or digit"):
        naming.generate_deployment_id("日本")


def test_a_name_is_kept_with_its_service(base: Project) -> None:
    name = "prod-feature-login"
    deployment_id = base.ok("deploy", "main.py", "--deployment-name", name)["deployment_id"]
    assert base.variables(deployment_id)[contract.NAME] == name
    assert base.ok("rollback")["drains"]["deployment_id"] == deployment_id
    assert "no deployment is named prod" in base.run("remove", "--deployment-name", "prod").error
    assert base.ok("remove", "--deployment-name", name)["deployment_id"] == deployment_id


@pytest.mark.parametrize("item", ["A B=c", "=x", "1A=x", "NOVALUE", "A-B=c"])
def test_a_variable_has_a_name(item: str) -> None:
    with pytest.raises(Failure, match="--env takes KEY=VALUE"):
        FLAGS["env"].parse([item])
    assert FLAGS["env"].parse(["A_1=b=c d"]) == {"A_1": "b=c d"}


def test_the_console_script_reads_invoke_yaml(tmp_path: Path) -> None:
    (tmp_path / "invoke.yaml").write_text("pulse_railway:\n  app: from-the-file.py\n")

    def error_of(*words: str) -> str:
        return subprocess.run(
            [*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True
        ).stderr

    assert "no app at" in error_of("deploy")
    assert "from-the-file.py" in error_of("deploy")
    assert "given.py" in error_of("deploy", "given.py")
    (tmp_path / "invoke.yaml").write_text("pulse_railway:\n")
    assert "which app?" in error_of("deploy")
    (tmp_path / "invoke.yaml").write_text("pulse_railway: [x]\n")
    assert error_of("deploy").startswith("error: the section pulse_railway of invoke.yaml")
    (tmp_path / "invoke.yaml").write_text("pulse_railway: {a: ]\n")
    assert error_of("deploy").startswith("error: invoke.yaml is no YAML: line 1, column 20")


def configured(**flags: Any) -> Context:
    return Context(Config(overrides={"pulse_railway": flags}))


def test_a_verb_called_from_another_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the configuration's defaults, refuses unknown keywords, and returns its result."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exit, match=r"configured\.py"):
        tasks.deploy(configured(app="configured.py"))
    with pytest.raises(TypeError, match="enviroment"):
        tasks.deploy(configured(), enviroment="x")
    with pytest.raises(Exit, match=r"given\.py"):
        tasks.deploy(configured(app="configured.py"), app="given.py")

    def image(_: Any, output: Any) -> None:
        output.result({"image": "r/x:1"}, ["pushed"])

    from pulse_railway import verbs

    task = verbs.verb(["repository", "json"], parser="parse_image")(image)
    assert task(configured(repository="r/x")) == {"image": "r/x:1"}
    assert "pushed" in capsys.readouterr().err


def test_a_failure_is_one_object_with_json(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "deploy", "no.py", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert list(json.loads(done.stdout)) == ["error"]
    assert done.stderr.splitlines()[-1] == f"error: {json.loads(done.stdout)['error']}"


def test_output_to_a_closed_pipe() -> None:
    for words in (["--list"], ["deploy", "--help"]):
        process = subprocess.Popen(
            [*COMMAND, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.wait(30) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_ctrl_c_while_the_app_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import time\nopen('loading', 'w')\ntime.sleep(20)\n")
    process = subprocess.Popen(
        [*COMMAND, "deploy", "main.py"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job's is ignored
    )
    eventually((tmp_path / "loading").exists)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in printed


def test_the_janitors_help_lists_its_flags() -> None:
    done = subprocess.run([*COMMAND, "janitor", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--redis-prefix" in done.stdout


def test_help_is_about_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    """The help leaves out Invoke's own options; each flag with a value has a word for the value."""
    cli.main(["--help"])
    printed = capsys.readouterr().out
    listed = {word for verbs in help.GROUPS.values() for word in verbs}
    assert listed == {*tasks.ns.tasks, "serve", "janitor"}
    for verb in listed:
        assert f"\n  {verb} " in printed
    for verb in tasks.ns.tasks:
        if not help.flags(verb):
            continue
        cli.main([verb, "--help"])
        printed = capsys.readouterr().out
        assert printed.startswith(f"Usage: pulse-railway {verb}")
        assert "core-opts" not in printed
        assert max(map(len, printed.splitlines())) <= 100
        for flag in help.flags(verb):
            assert (flag.value if flag.positional else f"  {flag.option}") in printed
    cli.main(["help", "maintenance"])
    assert "pulse-railway maintenance on|off [flags]" in capsys.readouterr().out


def test_a_zero_overrides_the_configuration() -> None:
    """0 == False, so `keep=0` in a task file was once taken for a missing value."""
    from pulse_railway import verbs

    context = Context(Config(overrides={"pulse_railway": {"keep": 5, "json": True}}))
    flags = {"keep": 0, "json": False, "build_arg": []}
    assert verbs.with_defaults(context, flags) == {"keep": 0, "json": True, "build_arg": []}


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.sampled_from(["keep", "json", "env", "message"]), st.sampled_from(EMPTIES))
)
def test_a_callers_empty_value_overrides_the_configuration(values: dict[str, Any]) -> None:
    """Invoke passes all flags, so there False and [] are flags that were not given."""
    from pulse_railway import verbs

    seen: list[Any] = []

    def look(flags: Any, _: Any) -> None:
        seen.append(dict(flags))

    names = ["keep", "json", "env", "message", "yes"]
    task = verbs.verb(names, parser="raw_flags")(look)
    section = {"keep": 5, "json": True, "env": ["A=b"], "message": "m", "yes": True}
    task(configured(**section), **values)
    assert seen[-1] == section | values
    unset = {name: FLAGS[name].unset for name in names}
    task(configured(**section), **unset)
    assert seen[-1] == section


def test_an_options_type_and_default_are_its_flags() -> None:
    """The types are written twice, since mypy needs them in the options' classes."""
    compared = set()
    for kind in vars(options).values():
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == options.__name__:
            types = get_type_hints(kind)
            for option in fields(kind):
                if (
                    flag := FLAGS.get(option.name)
                ) and flag.name != "app":  # the app is loaded from the flag
                    accepted = get_args(types[flag.name]) or (types[flag.name],)
                    assert flag.kind in accepted or (flag.kind is dict and str in accepted)
                    assert option.default in (value({}, flag.name), MISSING)
                    compared.add(flag.name)
    assert len(compared) > 20


def test_every_task_is_a_verb_of_the_help() -> None:
    defined = {name for name, value in vars(tasks).items() if isinstance(value, Task)}
    assert defined - {"janitor_run"} == set(tasks.ns.tasks)
