"""Each container's first process, which is that of a PID namespace here: `pulse-railway serve`, the
router, the janitor."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from pulse_railway import contract
from pulse_railway.app import serve
from pulse_railway.local.supervisor import free_port
from tests.conftest import ROOT, Redis
from tests.net import Backend, Connection, eventually

PYTHON = str(Path(sys.executable))
APP = """
import os, pty, signal, sys, time
# as `pulse run`: children on ptys of their own, deaf to SIGTERM
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for name in ("uvicorn", "react"):
    pid, _ = pty.fork()
    if pid == 0:
        code = '''
import signal, sys, time, pathlib
def end(*_):
    time.sleep(float(sys.argv[2]))
    with open("order", "a") as file:
        file.write(sys.argv[1] + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1] + ".ready").touch()
time.sleep(600)
'''
        os.execv(sys.executable, [sys.executable, "-c", code, name, sys.argv[1]])
if os.fork() == 0:  # an orphan, for whoever is first to reap
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.2)
    os._exit(0)
while True:
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        sys.exit(3)
"""
unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
namespaces = subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
pytestmark = pytest.mark.skipif(not namespaces, reason="this machine allows no PID namespace")


def container(folder: Path, *command: str, **env: str) -> subprocess.Popen[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        [*unshare, PYTHON, "-m", "pulse_railway", "serve", *command],
        cwd=folder,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def answers(url: str, body: str = "") -> bool:
    try:
        answer = httpx.get(url)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and body in answer.text


def first_process(container: subprocess.Popen[str]) -> int:
    """`unshare`'s only child, to which a runtime sends its signal."""
    path = Path(f"/proc/{container.pid}/task/{container.pid}/children")
    eventually(lambda: path.read_text().split())
    return int(path.read_text().split()[0])


@pytest.mark.parametrize(
    ("takes", "order", "code"), [("0.3", "uvicorn react ", 0), ("60", "", 137)]
)
def test_sigterm_lets_the_app_finish(tmp_path: Path, takes: str, order: str, code: int) -> None:
    """uvicorn first, with its shutdown hooks; killed where it does not end in time."""
    (tmp_path / "app.py").write_text(APP)
    env = {"RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "4"}
    running = container(tmp_path, "--", PYTHON, "app.py", takes, **env)
    eventually(lambda: all((tmp_path / f"{n}.ready").exists() for n in ("uvicorn", "react")))
    os.kill(first_process(running), signal.SIGTERM)
    began = time.monotonic()
    assert running.wait(20) == code
    assert time.monotonic() - began < 6
    written = tmp_path / "order"
    assert (written.read_text() if written.exists() else "") == order


def test_sigterm_at_once(tmp_path: Path) -> None:
    for pause in (0.0, 0.05, 0.1, 0.2):
        running = container(tmp_path, "--", "sleep", "600")
        pid = first_process(running)
        time.sleep(pause)
        for _ in range(50):  # a first process without a handler does not even notice
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.1)
            if running.poll() is not None:
                break
        assert running.wait(5) in (0, 137, 143)


def test_nothing_is_left_unreaped(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    running = container(tmp_path, "--", PYTHON, "app.py", "0")
    eventually(lambda: (tmp_path / "react.ready").exists())
    time.sleep(1)
    first = first_process(running)
    below = serve.descendants(first)
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in below]
    os.kill(first, signal.SIGTERM)
    assert running.wait(20) == 0
    assert "Z" not in states


def test_an_app_that_ends_ends_the_container(tmp_path: Path) -> None:
    for command, code in (("exit 3", 3), ("kill -9 $$", 137), ("exit 0", 0)):
        running = container(tmp_path, "--", "sh", "-c", f"sleep 300 & {command}")
        assert running.wait(10) == code


def test_a_lock_of_a_run_before_is_removed(tmp_path: Path) -> None:
    """Killed, `pulse run` leaves it behind, and the next start in the same files never came up."""
    lock = tmp_path / "site" / ".pulse" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("{}")
    assert container(tmp_path, "--", "true", PULSE_WEB_ROOT="site").wait(10) == 0
    assert not lock.exists()


def test_a_real_pulse_app_closes_in_order(tmp_path: Path) -> None:
    """Its container is told to stop, and its plugins' shutdown hooks run."""
    (tmp_path / "main.py").write_text(
        "import os, pulse as ps\n"
        "class Note(ps.Plugin):\n"
        "    def on_shutdown(self, app):\n"
        "        open('closed', 'w').close()\n"
        "app = ps.App(routes=[], plugins=[Note()], session_store=ps.InMemorySessionStore(),\n"
        "             server_address='https://x.example')\n"
    )
    (tmp_path / "web" / ".pulse").mkdir(parents=True)
    (tmp_path / "web" / ".pulse" / "lock").write_text("{}")
    port = free_port()
    command = [*shlex.split("pulse run main.py --prod --server-only --no-find-port --address ''")]
    command += ["--port", str(port), "--react-server-address", "http://127.0.0.1:9"]
    env = {"PULSE_SECRET": "x", "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    running = container(tmp_path, "--", *command, **env)

    eventually(lambda: answers(f"http://127.0.0.1:{port}/_pulse/health"), 40)
    os.kill(first_process(running), signal.SIGTERM)
    code = running.wait(20)
    assert (tmp_path / "closed").exists(), running.communicate()[0]
    assert code == 0


SITE = {
    "main.py": "import pulse as ps\n"
    "app = ps.App(routes=[], session_store=ps.InMemorySessionStore(),\n"
    "             server_address='https://x.example')\n",
    "web/build/server/index.js": "",
    "web/node_modules/@react-router/serve/dist/cli.js": "const answer = (_, to) => to.end('page');"
    "require('http').createServer(answer).listen(Number(process.env.PORT), '127.0.0.1')",
}


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_serve_starts_what_pulse_run_starts(tmp_path: Path) -> None:
    """The same programs, in the same folders, with the same variables, whatever Pulse's version;
    and no `pulse run` beside them, which holds the whole app once more."""
    for name, text in SITE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    port = free_port()
    env = {"PULSE_SECRET": "x", "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    env |= {"PULSE_APP_FILE": "main.py", "PORT": str(port)}
    itself = shlex.split(f"pulse run main.py --prod --address '' --port {port} --no-find-port")
    started = []
    for command in ([], ["--", *itself]):
        running = container(tmp_path, *command, **env)
        try:
            eventually(lambda: answers(f"http://127.0.0.1:{port}/", "page"), 40)
            programs = {}
            pulse_run = 0
            for pid, line in serve.descendants(first_process(running)).items():
                home = Path(f"/proc/{pid}")
                if "uvicorn" in line or line.startswith("node"):
                    variables = (home / "environ").read_bytes().split(b"\0")
                    programs[line] = os.readlink(home / "cwd"), sorted(variables)
                pulse_run += "pulse run" in line.replace("bin/pulse", "pulse")
            started.append((programs, pulse_run))
        finally:
            os.kill(first_process(running), signal.SIGTERM)
            assert running.wait(20) == 0, running.communicate()[0]
    (ours, none), (theirs, one) = started
    assert len(ours) == 2
    assert ours == theirs
    assert (none, one) == (0, 1)


def test_an_app_that_cannot_be_imported_says_so(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import nothing_of_this_name\n")
    env = {"PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}", "PULSE_APP_FILE": "main.py"}
    running = container(tmp_path, **env)
    assert running.wait(30) == 1
    assert "No module named 'nothing_of_this_name'" in running.communicate()[0]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--"], 1, "error: serve takes no arguments, or -- COMMAND ..."),
        (["--", ""], 1, "error: serve takes no arguments, or -- COMMAND ..."),
        (["pulse", "run"], 1, "error: serve takes no arguments, or -- COMMAND ..."),
        (["--", "no-such-program"], 127, "error: no-such-program: No such file or directory"),
        (["--", "/dev/null"], 127, "error: /dev/null: Permission denied"),
    ],
)
def test_what_cannot_be_started_is_one_line(
    tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    running = container(tmp_path, *words)
    assert (running.wait(10), running.communicate()[0]) == (code, f"{says}\n")


@pytest.mark.parametrize("given", ["soon", "-5", "nan", "inf", "1e9"])
def test_odd_draining_seconds_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    monkeypatch.setenv("RAILWAY_DEPLOYMENT_DRAINING_SECONDS", given)
    assert serve.stop_timeout() == 9.0
    expected = "RAILWAY_DEPLOYMENT_DRAINING_SECONDS is no number of seconds: 10 is taken\n"
    assert capsys.readouterr().err == expected


def test_pulse_is_found_beside_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container that runs `/venv/bin/pulse-railway` need not have that folder on PATH."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    beside, words = Path(PYTHON).with_name("pulse"), ["pulse", "run", "nothing.py"]
    monkeypatch.chdir(tmp_path)
    assert serve.children_of_pulse_run(words) == [{"args": [str(beside), *words[1:]]}]


def test_the_start_command_falls_back_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULSE_APP_FILE", "a/main.py")
    monkeypatch.delenv("PORT", raising=False)
    fallback = contract.START_COMMAND.partition("; exec ")[2]
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {fallback}"], capture_output=True, text=True
    ).stdout
    assert shown.splitlines() == serve.command()


# -- router and janitor ------------------------------------------------------------------------


def runtime(script: str, **env: str) -> subprocess.Popen[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}  # has a handler
    return subprocess.Popen(
        [*unshare, PYTHON, str(ROOT / script)],
        env={**plain, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("pause", [0.0, 0.05, 0.1, 0.2, 0.4, 1.5])
def test_a_router_ends_at_any_moment(redis_server: Redis, pause: float) -> None:
    """From its first lines on: a first process does not even notice what it has no handler for."""
    redis_server.deployment("a", "http://127.0.0.1:9")
    env = {"REDIS_URL": redis_server.url, "PORT": str(free_port()), "HOST": "127.0.0.1"}
    running = runtime("router.py", **env)
    first = first_process(running)
    eventually(lambda: listens_to(first, signal.SIGTERM))
    with pytest.raises(OSError, match="refused"):  # that is before it serves
        socket.create_connection(("127.0.0.1", int(env["PORT"])), 2).close()
    time.sleep(pause)
    os.kill(first, signal.SIGTERM)
    assert running.wait(8) in (0, 143)


def listens_to(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def test_a_janitor_that_is_stopped_gives_its_lock_back(redis_server: Redis) -> None:
    def railway(c: Connection) -> None:
        c.head()
        time.sleep(30)

    with Backend(handle=railway) as api:
        ids = dict.fromkeys(("PROJECT_ID", "ENVIRONMENT_ID", "TOKEN", "SERVICE_ID"), "x")
        env = {f"RAILWAY_{name}": value for name, value in ids.items()}
        env |= {"PULSE_RAILWAY_API_URL": api.address, "REDIS_URL": redis_server.url}
        running = runtime("janitor.py", **env)
        eventually(lambda: redis_server.client.get("pulse:railway:janitor:lock"))
        os.kill(first_process(running), signal.SIGTERM)
        assert running.wait(5) == 143
    assert redis_server.client.get("pulse:railway:janitor:lock") is None
