"""`init` in projects of several kinds. tests/test_first_deploy.py follows the docs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from invoke.vendor import yaml

from pulse_railway import __version__
from pulse_railway.apps import app_variables
from pulse_railway.build_context import ignored, missing_sources, secrets_in_image
from pulse_railway.errors import Failure
from pulse_railway.flows import init, project_files, project_layout
from pulse_railway.flows.project_layout import find_app, read_layout
from pulse_railway.output import Output
from pulse_railway.railway import upload
from tests import projects
from tests.conftest import TINY, Project
from tests.projects import LAYOUTS, make


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


# -- what is read ------------------------------------------------------------------------------


def test_uv_and_bun_of_pulses_getting_started(tmp_path: Path) -> None:
    layout = make("uv-bun", tmp_path)
    assert (layout.python.tool, layout.node.tool, layout.python_version) == ("uv", "bun", "3.12")
    assert (layout.app, layout.has_plugin, layout.dockerfile) == ("app.py", True, "Dockerfile")
    lines = lines_of(project_files.dockerfile(layout))
    in_order = [
        "COPY pyproject.toml uv.lock ./",
        "RUN uv sync --no-dev --locked --no-install-project",
        "COPY ${PULSE_WEB_ROOT}/package.json ${PULSE_WEB_ROOT}/bun.lock ${PULSE_WEB_ROOT}/",
        'RUN cd "/app/$PULSE_WEB_ROOT" && bun install --frozen-lockfile',
        "COPY . .",
        "RUN uv sync --no-dev --locked --no-editable",
        ' && (cd "$PULSE_WEB_ROOT" && bun run build) \\',
        "FROM python:3.12-slim",
    ]
    assert [line for line in lines if line in in_order] == in_order
    assert "bun install --frozen-lockfile --production" in "".join(lines)


def test_pip_and_npm(tmp_path: Path) -> None:
    layout = make("pip-npm", tmp_path)
    lines = lines_of(project_files.dockerfile(layout))
    at = {line: place for place, line in enumerate(lines)}
    pip = "RUN pip --python /venv/bin/python install --no-cache-dir -r requirements.txt"
    npm = 'RUN cd "/app/$PULSE_WEB_ROOT" && npm ci --no-audit --no-fund'
    assert at["COPY requirements.txt ./"] < at[pip] < at[npm] < at["COPY . ."]
    written = [f.path.name for f in init.files(layout)]
    assert "requirements.txt" not in written, "the app's packages are its own"


def test_requirements_and_a_registry_of_ones_own(tmp_path: Path) -> None:
    """`-e ./lib` needs the code; an .npmrc without a token is there for the install alone."""
    layout = make("pip-pnpm", tmp_path)
    text = project_files.dockerfile(layout)
    lines = lines_of(text)
    pip = "RUN pip --python /venv/bin/python install --no-cache-dir -r requirements.txt"
    assert lines.index("COPY . .") < lines.index(pip)
    assert "ARG NPM_TOKEN" in lines
    assert "pnpm install --frozen-lockfile" in text
    assert "node_modules/.pnpm/typescript@* .npmrc && cd /app" in text
    for name, content in (
        (".dockerignore", project_files.dockerignore(layout)),
        (".railwayignore", project_files.railwayignore(layout)),
    ):
        (tmp_path / name).write_text(content)
    assert not ignored(tmp_path, tmp_path / "Dockerfile")("web/.npmrc")
    assert upload.left_out(tmp_path, Path("web/.npmrc")) is None
    assert any("--build-arg NPM_TOKEN=..." in step for step in init.todo(layout))
    (tmp_path / "web/.npmrc").write_text("//npm.example/:_authToken=npm_x\n")
    assert "web/.npmrc has a token, and is left out" in "".join(init.todo(layout))
    assert "npmrc &&" not in project_files.dockerfile(layout)
    assert "!web/.npmrc" not in project_files.dockerignore(layout)


def test_a_monorepo(tmp_path: Path) -> None:
    layout = make("monorepo", tmp_path)
    assert layout.context == tmp_path
    assert (layout.app, layout.member) == ("apps/shop/app.py", "shop")
    lines = lines_of(project_files.dockerfile(layout))
    assert "ARG PULSE_WEB_ROOT=apps/shop/web" in lines
    uv = "RUN uv sync --no-dev --package shop --locked --no-editable"
    bun = "RUN cd /app && bun install --frozen-lockfile"
    assert lines.index("COPY . .") < lines.index(bun) < lines.index(uv)
    assert any("ln -s /app/node_modules/@react-router/serve" in line for line in lines)
    result = init.init(None, layout.folder, Output())
    assert sorted(result["written"]) == sorted(
        (
            *("../../.railwayignore", "../../.github/workflows/deploy-apps-shop.yml"),
            *("Dockerfile", "Dockerfile.dockerignore", ".env.example", ".gitignore"),
            *("invoke.yaml", "tasks.py"),
        )
    )
    configured = yaml.safe_load((layout.folder / "invoke.yaml").read_text())["pulse_railway"]
    assert configured == {"app": "apps/shop/app.py", "context": "../.."}
    path = tmp_path / ".github/workflows/deploy-apps-shop.yml"
    job = yaml.safe_load(path.read_text())["jobs"]["deploy"]
    assert job["defaults"]["run"]["working-directory"] == "apps/shop"
    assert {"run": "uv sync --locked --package shop"} in job["steps"]


@pytest.mark.parametrize(
    ("lock", "needs_code"),
    [
        (projects.UV_LOCK, False),
        (projects.MEMBER, False),
        (projects.UV_LOCK + '[[package]]\nname = "x"\nsource = { path = "x.whl" }\n', True),
        (projects.UV_LOCK + '[[package]]\nname = "x"\nsource = { directory = "x" }\n', True),
        (projects.UV_LOCK + '[[package]]\nname = "x"\nsource = { editable = "x" }\n', True),
    ],
)
def test_a_uv_lock_that_names_files(tmp_path: Path, lock: str, needs_code: bool) -> None:
    write(tmp_path, {"uv.lock": lock})
    assert project_layout.python_packages(tmp_path, tmp_path).needs_code == needs_code


@pytest.mark.parametrize(
    ("line", "needs_code"),
    [
        ("httpx", False),
        ("httpx @ https://host/x.tar.gz", False),
        ("--index-url https://host/", False),
        ("-r more.txt", True),
        ("-e .", True),
        ("./wheels/x.whl", True),
        ("wheels/x.whl", True),
    ],
)
def test_requirements_that_name_files(tmp_path: Path, line: str, needs_code: bool) -> None:
    write(tmp_path, {"requirements.txt": f"a\r\n{line}\r\n"})
    assert project_layout.python_packages(tmp_path, tmp_path).needs_code == needs_code


@pytest.mark.parametrize("spec", ["file:./x.tgz", "link:../x", "workspace:*", "^1.0.0"])
def test_a_package_json_that_names_files(tmp_path: Path, spec: str) -> None:
    package = json.dumps({"dependencies": {"x": spec}})
    write(tmp_path, {"package.json": package, "bun.lock": ""})
    needs_code = project_layout.node_packages(tmp_path, tmp_path).needs_code
    assert needs_code == (not spec.startswith("^"))


@pytest.mark.parametrize(
    ("pinned", "wanted", "version"),
    [
        ("3.14.1", "", "3.14"),
        ("", ">=3.12", "3.13"),
        ("", ">=3.14", "3.14"),
        ("", ">=3.11,<3.13", "3.12"),
        ("", "==3.12.*", "3.12"),
        ("", "", "3.13"),
        ("shop-env", "~=3.12.0", "3.13"),
    ],
)
def test_which_python(tmp_path: Path, pinned: str, wanted: str, version: str) -> None:
    write(tmp_path, {"pyproject.toml": f'[project]\nrequires-python = "{wanted}"\n'})
    if pinned:
        write(tmp_path, {".python-version": pinned})
    assert project_layout.python_version(tmp_path) == version


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        ("import pulse as ps\napp = ps.App()", ["app"]),
        ("import pulse\nshop: pulse.App = pulse.App()", ["shop"]),
        ("from pulse import App as A\na = A()\nb = A()", ["a", "b"]),
        ("import flask as ps\napp = ps.App()", []),
        ("import pulse as ps\n# app = ps.App()\n", []),
        ("app = (", []),
        ("\ufeffimport pulse as ps\r\napp = ps.App()\r\n", ["app"]),
    ],
)
def test_the_variable_of_an_app(tmp_path: Path, source: str, variables: list[str]) -> None:
    (tmp_path / "main.py").write_bytes(source.encode())
    assert app_variables(tmp_path / "main.py") == variables


@pytest.mark.parametrize("files", [{}, {"a.py": "", "b/c.py": ""}])
def test_which_app(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(files, "import pulse as ps\nweb = ps.App()\n"))
    write(tmp_path, {"tests/d.py": "import pulse as ps\nweb = ps.App()\n", "b/__init__.py": ""})
    says = "there are: a.py:web, b/c.py:web" if files else "`pulse-railway init --new` writes"
    with pytest.raises(Failure, match=f"which app.*{says}"):
        find_app(None, tmp_path)
    with pytest.raises(Failure, match="no app at"):
        find_app("e.py", tmp_path)
    if files:
        assert find_app("b/c.py", tmp_path) == "b/c.py:web"
        assert find_app("b/c.py:app", tmp_path) == "b/c.py"


def test_the_plugin_in_another_module_and_another_web_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "shop_railway.py": "from pulse_railway import RailwayPlugin\n"
            'plugin = RailwayPlugin(dockerfile="deploy/Dockerfile")\n',
            "main.py": "import pulse as ps\nfrom shop_railway import plugin\nshop = ps.App("
            "plugins=[plugin], codegen=ps.CodegenConfig(web_dir='ui', pulse_dir='generated'))\n",
            "ui/package.json": '{"packageManager": "pnpm@10.1.0"}',
        },
    )
    layout = read_layout(find_app(None, tmp_path), tmp_path, print)
    assert (layout.app, layout.has_plugin) == ("main.py:shop", True)
    assert (layout.inside(layout.web_root), layout.node.tool) == ("ui", "pnpm")
    paths = [layout.inside(f.path) for f in init.files(layout)]
    assert {"deploy/Dockerfile", "deploy/Dockerfile.dockerignore"} < set(paths)
    text = project_files.dockerfile(layout)
    assert "ARG PULSE_APP_FILE=main.py:shop" in text
    assert 'chmod -R a+rwX "$PULSE_WEB_ROOT/.pulse" "$PULSE_WEB_ROOT/app"' in text  # any pulse_dir
    assert "write ui/pnpm-lock.yaml: `pnpm install` in ui" in init.todo(layout)


def test_an_app_that_cannot_be_loaded_here(tmp_path: Path) -> None:
    write(tmp_path, {"main.py": "import not_installed\nimport pulse as ps\napp = ps.App()\n"})
    warned: list[str] = []
    layout = read_layout("main.py", tmp_path, warned.append)
    assert not layout.loaded
    assert "No module named 'not_installed'" in warned[0]
    assert layout.inside(layout.web_root) == "web"


# -- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_written_fits_and_lets_no_secret_through(name: str, tmp_path: Path) -> None:
    """Each file that a Dockerfile copies is there, and neither the image nor the upload has
    secrets, git's history or this machine's packages, at any depth."""
    layout = make(name, tmp_path)
    init.init(None, layout.folder, Output())
    dockerfile = layout.context / str(layout.dockerfile)
    assert missing_sources(layout.context, dockerfile, {}) == []
    private = [".env", "id_ecdsa", "a.key", "b.p12", "c.pem", ".local-railway/state.json"]
    private += ["node_modules/x/index.js", "__pycache__/x.pyc", ".venv/bin/python", ".npmrc"]
    web = layout.inside(layout.web_root)
    private += [f"{web}/{path}" for path in private if path != ".npmrc"]
    write(layout.context, dict.fromkeys(private, "BEGIN PRIVATE KEY\n_authToken=x"))
    ignore = ignored(layout.context, dockerfile)
    assert [path for path in private if not ignore(path)] == []
    assert secrets_in_image(layout.context, dockerfile) == []
    assert ignore(".github/workflows/deploy.yml")
    shutil.rmtree(tmp_path / ".git")  # without it no .gitignore counts
    assert [p for p in private if not upload.left_out(layout.context, Path(p))] == []
    assert upload.secrets_in_upload(layout.context) == []


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    """An invoke.yaml and a .gitignore get what they lack, with the line ends that they have."""
    there = {"main.py": projects.WITH_PLUGIN, "Dockerfile": "FROM mine\n", "tasks.py": "mine\n"}
    write(tmp_path, there)
    (tmp_path / "invoke.yaml").write_bytes(b"run:\r\n  echo: true")
    (tmp_path / ".gitignore").write_bytes(b"*.pyc\r\n.env\r\n!\r\n")
    first = init.init(None, tmp_path, Output())
    assert {"Dockerfile", "tasks.py"} == set(first["there"])
    assert {"invoke.yaml", ".gitignore"} < set(first["written"])
    for name, text in there.items():
        assert (tmp_path / name).read_text() == text
    assert (tmp_path / ".gitignore").read_bytes() == b"*.pyc\r\n.env\r\n!\r\n.local-railway\r\n"
    configured = yaml.safe_load((tmp_path / "invoke.yaml").read_text())
    assert configured == {"run": {"echo": True}, "pulse_railway": {"app": "main.py"}}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert init.init(None, tmp_path, Output())["written"] == []
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("text", ["{run: {echo: true}}\n", "[", "pulse_railway: {app: x.py}\n"])
def test_an_invoke_yaml_that_cannot_be_appended_to_stays(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"main.py": projects.WITH_PLUGIN, "invoke.yaml": text})
    assert "invoke.yaml" in init.init(None, tmp_path, Output())["there"]
    assert (tmp_path / "invoke.yaml").read_text() == text


def test_names_alone_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"main.py": projects.WITH_PLUGIN})
    init.init(None, tmp_path, Output())
    shown = capsys.readouterr().err
    assert "+ Dockerfile: Python's server (pip) and React's (bun) in one image" in shown
    assert "FROM" not in shown
    (tmp_path / "Dockerfile").unlink()
    init.init(None, tmp_path, Output(), show=True)
    assert "FROM python:3.13-slim" in capsys.readouterr().err


def test_before_there_is_an_app(tmp_path: Path) -> None:
    result = init.init(None, tmp_path, Output(), new=True)
    assert result["written"][0] == "main.py"
    layout = read_layout("main.py", tmp_path, print)
    assert (layout.loaded, layout.has_plugin, layout.has_address) == (True, True, True)
    assert "goes into web/" in "".join(result["todo"])
    with pytest.raises(Failure, match="is there: `init` without --new writes what it lacks"):
        init.init(None, tmp_path, Output(), new=True)


def test_only_a_version_that_is_on_the_index_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    for source, line in (
        (None, f"pulse-railway=={__version__}"),
        ("git+https://host/x@abc", "pulse-railway @ git+https://host/x@abc"),
        ("/home/me/clone", "# pulse-railway: this one, from /home/me/clone, is not on the index"),
    ):
        monkeypatch.setattr(init, "package_source", lambda source=source: source)
        assert init.requirements().splitlines()[1] == line


def test_what_is_left_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "package_source", lambda: None)
    page, tag = "web/app/root.tsx", '<script src="/_pulse/railway/affinity.js" />'
    root = write(tmp_path, {"app.py": projects.GETTING_STARTED, page: "<head />"}) / page
    write(tmp_path, {"web/package.json": "{}", "pyproject.toml": "[project]\nname = 'x'\n"})

    def steps() -> list[str]:
        return init.todo(read_layout("app.py", tmp_path, print))

    assert [step.partition("\n")[0] for step in steps()][:5] == [
        "give the app in app.py the plugin:",
        "`uv add pulse-framework pulse-railway`",
        "write uv.lock: `uv lock`",
        "write web/bun.lock: `bun install` in web",
        f"put {tag} first into the <head> of web/app/root.tsx",
    ]
    root.with_name("document.tsx").write_text(tag)
    (tmp_path / "app.py").write_text(projects.WITH_PLUGIN.replace('dockerfile="Dockerfile",', ""))
    assert [step.partition("\n")[0] for step in steps()][:2] == [
        'pass server_address=os.environ.get("PULSE_SERVER_ADDRESS") to ps.App in app.py',
        'pass dockerfile="Dockerfile" to RailwayPlugin',
    ]
    write(tmp_path, {"uv.lock": projects.UV_LOCK, "web/bun.lock": ""})
    assert steps()[2].startswith("put a Railway token")


# -- folders that are odd ----------------------------------------------------------------------


def test_a_folder_with_spaces_and_umlauts_and_without_git(tmp_path: Path) -> None:
    folder = tmp_path / "Läden und mehr"
    files = {"my app.py": projects.WITH_PLUGIN, "web/package.json": "{}", "web/bun.lock": ""}
    write(folder, files)
    result = init.init(None, folder, Output())
    assert result["app"] == "my app.py"
    assert 'ARG PULSE_APP_FILE="my app.py"' in (folder / "Dockerfile").read_text()
    assert missing_sources(folder, folder / "Dockerfile", {}) == []
    (tmp_path / ".git").mkdir()  # the lock is above it, the context too
    write(tmp_path, {"bun.lock": ""})
    (folder / "Dockerfile").unlink()
    write(folder, {"pyproject.toml": "[project]\nname = 'x'\n", "uv.lock": ""})
    (folder / "web/bun.lock").unlink()
    layout = read_layout("my app.py", folder, print)
    assert layout.context == tmp_path
    text = project_files.dockerfile(layout)
    assert 'uv sync --no-dev --project "Läden und mehr" --locked' in text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, {"main.py": projects.WITH_PLUGIN, ".github": "a file"})
    with pytest.raises(Failure, match=r"deploy.yml cannot be written \(.*\): run `init` where you"):
        init.init(None, tmp_path, Output())


def test_nothing_is_written_outside_the_context(tmp_path: Path) -> None:
    text = projects.WITH_PLUGIN.replace('"Dockerfile"', '"../Dockerfile"')
    folder = write(tmp_path / "shop", {"main.py": text})
    with pytest.raises(Failure, match=r"the Dockerfile .* is outside the deploy context"):
        init.init(None, folder, Output())
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


@pytest.mark.parametrize("name", ["main.py", "requirements.txt", "web/package.json", ".gitignore"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"main.py": projects.WITH_PLUGIN, "web/package.json": "{}"})
    (tmp_path / name).write_bytes("x = 1\n".encode("utf-16"))
    with pytest.raises(Failure, match=f"{name} is no UTF-8 text"):
        init.init("main.py", tmp_path, Output())


def test_locks_that_cannot_be_parsed_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"main.py": projects.WITH_PLUGIN, "uv.lock": "<<<<<<< HEAD\n"})
    with pytest.raises(Failure, match=r"uv.lock is no TOML"):
        init.init("main.py", tmp_path, Output())
    write(tmp_path, {"uv.lock": "", "web/package.json": "<<<<<<< HEAD\n"})
    with pytest.raises(Failure, match=r"package.json is no JSON"):
        init.init("main.py", tmp_path, Output())


# -- to a deploy -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uv-bun", "pip-npm", "monorepo"])
def test_from_init_to_a_deploy(base: Project, tmp_path: Path, name: str) -> None:
    folder = projects.write(name, tmp_path)
    shutil.copy(TINY / "backend.py", folder)
    written = base.run("init", "--json", cwd=folder)
    assert written.code == 0, written.err
    examined = base.run("doctor", "--json", cwd=folder)
    assert examined.code == 0, examined.err
    checks = {check["name"]: check["verdict"] for check in examined.json["checks"]}
    assert checks["its files and settings"] == checks["the lock files"] == "good"
    deployed = base.run("deploy", "--json", cwd=folder)
    assert deployed.code == 0, deployed.err
    assert base.active == deployed.json["deployment_id"]
