"""Attacks on the local Railway: another user of the machine, another website, a hostile upload."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Route
from starlette.testclient import TestClient

from examples import demo
from pulse_railway import errors
from pulse_railway.local import guard, uploads
from pulse_railway.local.server import LocalRailway
from tests.conftest import Project, pulse_railway
from tests.net import eventually

EVERY = ["relay", "login", "faults", "stats", "cron/x", "picture", "logs/x", "made-up"]


@pytest.fixture
def local(tmp_path: Path) -> LocalRailway:
    return LocalRailway(tmp_path / "root")


@pytest.fixture
def client(local: LocalRailway) -> TestClient:
    """A client of its server, without the services; it sends no key."""
    return TestClient(local.app(), base_url=local.url)


def key(local: LocalRailway) -> dict[str, str]:
    return guard.key_header(local.state.root)


@pytest.mark.parametrize("path", EVERY)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_local_paths_need_the_key(
    client: TestClient, local: LocalRailway, method: str, path: str
) -> None:
    """`POST /local/login` once gave an account token to every user of the machine."""
    tokens = list(local.state.tokens)
    for headers in (
        {},
        {guard.KEY_HEADER: ""},
        {guard.KEY_HEADER: "wrong"},
        {"authorization": f"Bearer {tokens[0].value}"},
    ):
        answer = client.request(method, f"/local/{path}", headers=headers, json={"seconds": 60})
        assert answer.status_code == 403, headers
        assert guard.KEY_FILE in answer.json()["message"]
        assert not [t.value for t in local.state.tokens if t.value in answer.text]
    assert local.state.tokens == tokens


def test_every_path_of_the_server_is_tried(client: TestClient) -> None:
    app: Any = client.app
    paths = {
        r.path.partition("/local/")[2]
        for r in app.routes
        if isinstance(r, Route) and "/local/" in r.path
    }
    assert {path.partition("/{")[0] for path in paths} <= {path.partition("/")[0] for path in EVERY}


@pytest.mark.parametrize(
    "path",
    [
        "//local/stats",
        "/x/../local/stats",
        "/local//stats",
        "/%6cocal/stats",
        "/local/../local/stats",
        "/LOCAL/stats",
    ],
)
def test_no_spelling_of_a_local_path_goes_without_the_key(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (403, 404)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "file://"]
)
def test_another_website_cannot_give_orders(
    client: TestClient, local: LocalRailway, origin: str
) -> None:
    """/local/faults and /local/cron once took a foreign `Origin`, with text/plain."""
    headers = {**key(local), "origin": origin}
    for path in ("/local/faults", "/local/cron/x", "/local/login", "/graphql/v2", "/oauth/token"):
        assert (
            client.post(path, headers=headers, json={"latency": 9, "seconds": 9}).status_code == 403
        )
    assert client.get("/local/stats", headers=headers).status_code == 403
    assert local.latency == 0
    own = {**headers, "origin": local.url}
    assert client.post("/local/faults", headers=own, json={"latency": 9}).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/jsonp",
    ],
)
def test_orders_are_json(client: TestClient, local: LocalRailway, content_type: str | None) -> None:
    headers = {**key(local), **({"content-type": content_type} if content_type else {})}
    for path in ("/local/faults", "/local/cron/x", "/local/login"):
        answer = client.post(path, headers=headers, content=b'{"latency": 9, "seconds": 9}')
        assert answer.status_code == 415
    assert local.latency == 0


def test_no_page_may_frame_it(client: TestClient, local: LocalRailway) -> None:
    for path, headers in (("/", {}), ("/local/stats", key(local)), ("/local/stats", {})):
        policy = client.get(path, headers=headers).headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy


def test_the_page_without_the_key_shows_nothing(client: TestClient, local: LocalRailway) -> None:
    shown = client.get("/").text
    assert key(local)[guard.KEY_HEADER] not in shown
    assert str(local.state.root) not in shown


# -- the folder --------------------------------------------------------------------------------


def modes(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mode & 0o777 for p in [root, *root.rglob("*")]}


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_the_folder_is_its_owners_alone(tmp_path: Path, no_umask: None) -> None:
    for root in (tmp_path / "new" / "root", tmp_path / "older"):
        if root.name == "older":
            root.mkdir(mode=0o755)
        local = LocalRailway(root)
        local.environment()
        found = modes(root)
        assert found["."] == 0o700
        assert {
            found[name] for name in ("state.json", "edge.pem", guard.KEY_FILE, guard.PAGE_FILE)
        } == {0o600}


def test_the_folder_is_closed_before_anything_is_written(
    tmp_path: Path, no_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    mkdir, seen = Path.mkdir, []

    def watched(self: Path, *arguments: Any, **options: Any) -> None:
        mkdir(self, *arguments, **options)
        if self == root:
            seen.append(self.stat().st_mode & 0o777)

    monkeypatch.setattr(Path, "mkdir", watched)
    LocalRailway(root)
    assert set(seen) == {0o700}
    seen.clear()
    shutil.rmtree(root)
    with contextlib.suppress(SystemExit), demo.stage(root, "no.such.module"):
        pass
    assert set(seen) == {0o700}


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o777)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for begin in (LocalRailway, lambda root: demo.stage(root).__enter__()):
        with pytest.raises((errors.Failure, SystemExit), match="belongs to another user") as failed:
            begin(root)
        assert "\n" not in str(failed.value)
    assert list(root.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_the_commands_refuse_it_in_one_line(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.chown(root, 12345, 12345)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    assert "belongs to another user" in pulse_railway("local", "--dir", str(root), env=env).error
    assert (
        "belongs to another user"
        in pulse_railway("local", "--env", "--dir", str(root), env=env).error
    )
    done = subprocess.run(
        [sys.executable, "-m", "pulse_railway.local.server", str(root)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert list(root.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(errors.Failure, match="is no folder"):
        LocalRailway(tmp_path / "root")


# -- uploads -----------------------------------------------------------------------------------


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644, size: int = 0
) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode, made.size = kind, link, mode, size
    return made


def archive(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for one in members:
            tar.addfile(one, io.BytesIO(b"x" * one.size))
    return buffer.getvalue()


def unpacked(data: bytes, tmp_path: Path) -> Path:
    packed, folder = tmp_path / "upload.tar.gz", tmp_path / "uploads" / "one"
    packed.write_bytes(data)
    uploads.unpack(packed, folder)
    return folder


HOSTILE = {
    "an absolute link": archive(member("a", tarfile.SYMTYPE, "/etc/passwd")),
    "a link out": archive(member("a", tarfile.SYMTYPE, "../../x")),
    "a link out of a folder": archive(member("d/e/a", tarfile.SYMTYPE, "../../../x")),
    "a link that climbs after a name": archive(member("a", tarfile.SYMTYPE, "b/../../x")),
    "a link through a link": archive(
        member("d/e", tarfile.DIRTYPE, mode=0o755),
        member("d/e/up", tarfile.SYMTYPE, "../.."),
        member("out", tarfile.SYMTYPE, "d/e/up/.."),
    ),
    "a file behind a link": archive(member("a", tarfile.SYMTYPE, "b"), member("a/x")),
    "a hard link out": archive(member("a", tarfile.LNKTYPE, "../../x")),
    "a hard link to a link": archive(
        member("l", tarfile.SYMTYPE, "x"), member("a", tarfile.LNKTYPE, "l")
    ),
    "a hard link to nothing": archive(member("a", tarfile.LNKTYPE, "nothing")),
    "an absolute name": archive(member("/a")),
    "a name that climbs": archive(member("x/../../a")),
    "a device": archive(member("a", tarfile.CHRTYPE)),
    "a block device": archive(member("a", tarfile.BLKTYPE)),
    "a pipe": archive(member("a", tarfile.FIFOTYPE)),
    "a setuid file": archive(member("a", mode=0o4755)),
    "a setgid file": archive(member("a", mode=0o2755)),
    "a name of two lines": archive(member("a\nerror: b", tarfile.CHRTYPE)),
    "no tar": b"hello",
    "half a tar": archive(member("a", size=100_000))[:-60],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_upload_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    with pytest.raises(uploads.BadUpload) as refused:
        unpacked(HOSTILE[what], tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "uploads" / "one").exists()


def test_a_sparse_giant_is_refused(tmp_path: Path) -> None:
    giant, packed = tmp_path / "giant", tmp_path / "giant.tar.gz"
    with giant.open("wb") as file:
        file.truncate(1 << 43)
    for kind in ("gnu", "posix"):
        subprocess.run(
            ["tar", f"--format={kind}", "-cSzf", packed, "-C", tmp_path, "giant"], check=True
        )
        assert packed.stat().st_size < 10_000
        with pytest.raises(uploads.BadUpload, match="more than"):
            unpacked(packed.read_bytes(), tmp_path)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_UNPACKED", 1000)
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    with pytest.raises(uploads.BadUpload, match="more than"):
        unpacked(archive(member("a", size=600), member("b", size=600)), tmp_path)
    with pytest.raises(uploads.BadUpload, match="more than 3"):
        unpacked(archive(*(member(name) for name in "abcd")), tmp_path)


def test_what_a_project_has_is_unpacked(tmp_path: Path) -> None:
    folder = unpacked(
        archive(
            member(".", tarfile.DIRTYPE, mode=0o755),
            member("./run.sh", mode=0o755, size=3),
            member("bin/run", tarfile.SYMTYPE, "../run.sh"),
            member("shared", tarfile.DIRTYPE, mode=0o2775),
            member("again.sh", tarfile.LNKTYPE, "run.sh", 0o755),
        ),
        tmp_path,
    )
    assert (folder / "bin" / "run").read_text() == "xxx"
    assert (folder / "again.sh").read_text() == "xxx"
    assert os.access(folder / "run.sh", os.X_OK)


NAMES = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=4).map("/".join)


@given(
    st.lists(
        st.tuples(
            NAMES,
            st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]),
            NAMES,
        ),
        max_size=6,
    )
)
def test_no_upload_leads_out_of_its_folder(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, bytes, str]]
) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "uploads").mkdir()
    folder = home / "uploads" / "one"
    with contextlib.suppress(uploads.BadUpload):
        unpacked(archive(*(member(n, k, link, 0o755) for n, k, link in entries)), home)
    assert {p.name for p in home.iterdir()} == {"uploads", "upload.tar.gz"}
    for path in folder.rglob("*"):
        assert path.parent.resolve().is_relative_to(folder)
        with contextlib.suppress(RuntimeError, OSError):  # a loop of links
            assert path.resolve().is_relative_to(folder)


def up(local: LocalRailway) -> tuple[str, dict[str, str]]:
    project = local.state.projects[0]
    environment = project.environments[0]
    service = local.state.add_service(project, "web")
    account = next(t for t in local.state.tokens if t.kind == "account")
    path = f"/project/{project.id}/environment/{environment.id}/up?serviceId={service.id}"
    return path, {"authorization": f"Bearer {account.value}"}


def test_uploads_have_a_limit(
    client: TestClient, local: LocalRailway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOAD", 1000)
    path, headers = up(local)

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    for body in (b"x" * 1001, chunks()):
        answer = client.post(path, headers=headers, content=body)
        assert answer.status_code == 413
        assert "1000" in answer.text
    assert not local.state.deployments
    left = [
        p
        for p in local.state.root.rglob("*")
        if p.is_file() and p.stat().st_size > 900 and b"xxx" in p.read_bytes()
    ]
    assert left == []


def test_without_a_token_no_upload_is_kept(client: TestClient, local: LocalRailway) -> None:
    path, _ = up(local)
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = client.post(path, headers=headers, content=archive(member("Dockerfile")))
        assert answer.status_code == 404
    assert not local.state.deployments
    assert list((local.state.root / "uploads").iterdir()) == []


def folders(project: Project) -> set[str]:
    return {p.name for p in (project.railway.root / "uploads").glob("*")}


def test_uploads_of_deleted_services_go(railway: demo.Stage, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:3.12\nCMD sleep 1000\n")
    project = Project(railway, f"uploads-{time.monotonic_ns()}")
    before = folders(project)
    ask = project.railway.graphql
    made: list[str] = []
    for name in ("kept", "deleted", "copied"):
        where = {"projectId": project.id, "environmentId": project.environment, "name": name}
        made.append(
            ask("mutation ($i: ServiceCreateInput!) { serviceCreate(input: $i) { id } }", i=where)[
                "serviceCreate"
            ]["id"]
        )
        done = subprocess.run(
            ["railway", "up", "--detach", "--service", name, "--json"],
            cwd=tmp_path,
            env=project.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
    new = folders(project) - before
    assert len(new) == 3
    other = project.duplicate("staging")
    delete = "mutation ($s: String!, $e: String) { serviceDelete(id: $s, environmentId: $e) }"
    ask(delete, s=made[1], e=project.environment)
    assert folders(project) - before == new, "its copy has the upload"
    ask(delete, s=made[1], e=other.environment)
    eventually(lambda: len(folders(project) - before) == 2, 10)
    other.delete_environment()
    assert len(folders(project) - before) == 2
    project.delete()
    eventually(lambda: folders(project) == before, 10)


def test_no_secret_is_in_a_process_argument(railway: demo.Stage) -> None:
    """Also a browser's: it gets the address of a file that only the owner can read."""
    state = json.loads((railway.root / "state.json").read_text())
    secrets = [t["value"] for t in state["tokens"]] + list(guard.key_header(railway.root).values())
    for home in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (home / "cmdline").read_bytes().decode(errors="replace")
            assert not [s for s in secrets if s in words]
    page = railway.root / guard.PAGE_FILE
    assert page.stat().st_mode & 0o777 == 0o600
    assert guard.key_header(railway.root)[guard.KEY_HEADER] in page.read_text()


def test_the_key_opens_it(railway: demo.Stage) -> None:
    assert "pids" in railway.local("stats")
    assert httpx.get(railway.api.replace("/graphql/v2", "/local/stats")).status_code == 403
