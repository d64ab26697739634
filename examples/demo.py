"""The demonstration: deploys the example app twice on a local Railway, with real processes.

`make demo` runs until Ctrl-C; `make demo-once` runs the checks of `story` and ends.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from examples.visitor import Visitor

ROOT = Path(__file__).parent.parent
APP = "examples/railway/main.py"

SET_VARIABLES = """
mutation Set($input: VariableCollectionUpsertInput!) { variableCollectionUpsert(input: $input) }
"""
RUN_CRON = """
mutation Run($id: String!) {
  deploymentInstanceExecutionCreate(input: { serviceInstanceId: $id })
}
"""
SERVICES = """
query Services($environment: String!) {
  environment(id: $environment) {
    serviceInstances { edges { node { id serviceId serviceName } } }
  }
}
"""


class Stage:
    """A running local Railway, and the commands of a user's shell."""

    def __init__(self, root: Path, process: subprocess.Popen[bytes], env: dict[str, str]) -> None:
        self.root, self.process, self.env = root, process, env
        self.verb_env: dict[str, str] = {}  # variables of verbs alone; they replace those of `env`
        self.api = env["PULSE_RAILWAY_API_URL"]
        self.bundle = env["SSL_CERT_FILE"]

    def run(self, *arguments: str, check: bool = True, **env: str) -> dict[str, Any]:
        """Run a verb with --json as a process of its own, and return its result.

        Its progress is on our stderr. With `check`, raises SystemExit if the verb fails.
        """
        command = [sys.executable, "-m", "pulse_railway", *arguments, "--json"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self.env, **self.verb_env, **env},
            stdout=subprocess.PIPE,
            timeout=300,
        )
        if check and done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed with status {done.returncode}")
        return json.loads(done.stdout or b"{}")  # type: ignore[no-any-return]

    def graphql(self, document: str, **variables: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.env['RAILWAY_API_TOKEN']}"}
        body = {"query": document, "variables": variables}
        answer = post(self.api, json=body, headers=headers, timeout=30).json()
        if answer.get("errors"):
            raise RuntimeError(answer["errors"])
        return answer["data"]

    def local(self, path: str, body: Any = None, **params: str) -> Any:
        """Return what the local Railway's own `/local/<path>` answers; with a `body` by POST.

        Raises httpx.HTTPStatusError if it refuses.
        """
        from pulse_railway.local.guard import key_header

        url = self.api.replace("/graphql/v2", f"/local/{path}")
        method = "GET" if body is None else "POST"
        headers = key_header(self.root)
        answer = request(method, url, json=body, params=params, headers=headers, timeout=60)
        return answer.raise_for_status().json()

    def services(self) -> dict[str, dict[str, str]]:
        """Return the ids of the services, by service name."""
        data = self.graphql(SERVICES, environment=self.env["RAILWAY_ENVIRONMENT_ID"])
        nodes = [e["node"] for e in data["environment"]["serviceInstances"]["edges"]]
        return {node["serviceName"]: node for node in nodes}

    def set_variables(self, service: str, variables: dict[str, str]) -> None:
        self.graphql(
            SET_VARIABLES,
            input={
                "projectId": self.env["RAILWAY_PROJECT_ID"],
                "environmentId": self.env["RAILWAY_ENVIRONMENT_ID"],
                "serviceId": self.services()[service]["serviceId"],
                "variables": variables,
                "skipDeploys": True,
            },
        )

    def run_janitor(self) -> None:
        """Start the janitor, as "Run now" on Railway's dashboard."""
        self.graphql(RUN_CRON, id=self.services()["pulse-janitor"]["id"])

    def get(self, url: str, **params: str) -> httpx.Response:
        """Send a GET without a cookie, and without an affinity unless `params` has one."""
        with httpx.Client(verify=tls_context(self.bundle), trust_env=False) as client:
            return client.get(url, params=params)


# for the local Railway itself, which has no TLS: `verify` would cost 20 ms, to read CA files
post = functools.partial(httpx.post, verify=False)
request = functools.partial(httpx.request, verify=False)


@functools.cache
def tls_context(bundle: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=bundle)


@contextmanager
def stage(
    root: Path, module: str = "pulse_railway.local.server", *arguments: str
) -> Iterator[Stage]:
    """Run a local Railway in `root` during a block; then end it with all its processes.

    Args:
        module: the Python module to run, with `root` and `arguments`.
    """
    from pulse_railway.errors import Failure
    from pulse_railway.local.guard import make_private
    from pulse_railway.local.server import LocalRailway

    try:
        make_private(root)
    except Failure as failure:
        raise SystemExit(f"error: {failure}") from None
    with (root / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(root), *arguments],
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only us, and we end the process
        )
    try:
        _wait_until_up(root, process)
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("RAILWAY_", "PULSE_")) or k == "PULSE_DEMO"
        }
        yield Stage(root, process, {**inherited, **LocalRailway(root).environment()})
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(root: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the local Railway did not start; see {root / 'server.log'}")
        try:
            port = json.loads((root / "state.json").read_text())["api_port"]
            httpx.get(f"http://127.0.0.1:{port}/", timeout=1)
            return
        except (OSError, ValueError, KeyError, httpx.HTTPError, httpx.InvalidURL):
            time.sleep(0.1)
    raise SystemExit("the local Railway took longer than 60 s to start")


def processes_of(root: Path) -> list[int]:
    """Return the running processes that the local Railway in `root` has started."""
    from pulse_railway.local.supervisor import is_local_process

    return [
        int(p.name) for p in Path("/proc").glob("[0-9]*") if is_local_process(int(p.name), root)
    ]


# -- the story ---------------------------------------------------------------------------------


def check(expectation: str, ok: bool) -> None:
    """Print whether an expectation is met. Raises SystemExit if it is not."""
    print(("  saw: " if ok else "  DID NOT SEE: ") + expectation, flush=True)
    if not ok:
        raise SystemExit(1)


def ci_environment(s: Stage) -> dict[str, str]:
    """Return the variables of a CI with only a project token: no SSH key, no login."""
    tokens = json.loads((s.root / "state.json").read_text())["tokens"]
    token = next(t["value"] for t in tokens if t["kind"] == "project")
    absent = "RAILWAY_API_TOKEN RAILWAY_PROJECT_ID RAILWAY_ENVIRONMENT_ID PULSE_RAILWAY_SSH_KEY"
    return {**dict.fromkeys(absent.split(), ""), "RAILWAY_TOKEN": token, "HOME": str(s.root)}


def story(root: Path, *, job: bool = False) -> None:
    """Check, on an empty project: two deploys with an old and a new tab, the janitor's removal, a
    redeploy, and a canary.

    Args:
        job: use a project token and no SSH key, so that the janitor carries control commands out.

    Raises SystemExit if an expectation is not met.
    """
    with stage(root) as s:
        s.verb_env = ci_environment(s) if job else {}
        # a deployment without tabs is removed at once
        no_window = ("--rollback-window-seconds", "0")
        done = s.run("ensure", APP, *no_window)
        check(
            "ensure creates router, env, Redis and janitor",
            {"pulse-router", "pulse-env", "pulse-redis", "pulse-janitor"} == set(s.services()),
        )
        address = done["server_address"]
        s.set_variables("pulse-env", {"GREETING": "hello", "SESSION_TIMEOUT": "1"})
        a = s.run("deploy", APP, "--deployment-name", "a")["deployment_id"]
        check(
            f"deploy brings up {a}, which is active",
            s.get(f"{address}/_pulse/meta").json()["deployment_id"] == a,
        )
        check(
            "it has the variable of pulse-env",
            s.get(f"{address}/greeting").json() == {"greeting": "hello"},
        )
        asyncio.run(_tabs(s, address, a, no_window))


async def _tabs(s: Stage, address: str, a: str, no_window: tuple[str, ...]) -> None:
    async with Visitor(address, s.bundle) as old:
        await old.open()
        check(
            f"a page is prerendered by {a}, with a cookie and the affinity",
            old.affinity == a and old.cookie is not None,
        )
        await old.connect()
        await old.count()
        await old.count()
        check("its tab counts to 2 over the open socket", (old.tab, old.session) == (2, 2))

        deployed = await asyncio.to_thread(s.run, "deploy", APP, "--deployment-name", "b")
        b = deployed["deployment_id"]
        check(f"the old tab's requests still reach {a}", await old.meta() == a)
        await old.count()
        check("its socket never closed, and counts to 3", old.connected and old.tab == 3)

        async with Visitor(address, s.bundle) as new:
            await new.open()
            check(f"a new tab gets {b}", new.affinity == b and await new.meta() == b)
        async with Visitor(address, s.bundle, cookie=old.cookie) as returning:
            await returning.open()
            check(
                f"on {b} the session has counted to 3, from Redis",
                (returning.affinity, returning.session) == (b, 3),
            )
        check(
            "/_pulse/meta names the right one each way",
            s.get(f"{address}/_pulse/meta", pulse_deployment=a).json()["deployment_id"] == a
            and s.get(f"{address}/_pulse/meta").json()["deployment_id"] == b,
        )
        await asyncio.to_thread(s.run_janitor)
        await asyncio.sleep(3)
        check(f"the janitor keeps {a} while its tab is open", a in s.services())

    deadline = time.monotonic() + 60
    while a in s.services() and time.monotonic() < deadline:
        await asyncio.sleep(2)
        await asyncio.to_thread(s.run_janitor)
    check(f"once the tab has gone, the janitor removes {a}", a not in s.services())
    check(f"{b} serves on", s.get(f"{address}/_pulse/meta").json()["deployment_id"] == b)
    check(
        "an affinity that is gone is answered 409",
        s.get(f"{address}/_pulse/meta", pulse_deployment=a).status_code == 409,
    )
    again = await asyncio.to_thread(s.run, "redeploy")
    check(
        f"redeploy starts {b} again",
        again["deployment_id"] == b
        and s.get(f"{address}/_pulse/meta").json()["deployment_id"] == b,
    )
    await _canary(s, address, b)
    last = await asyncio.to_thread(s.run, "ensure", APP, *no_window)
    check("a second ensure changes nothing", last["changed"] == [])


async def _canary(s: Stage, address: str, b: str) -> None:
    flags = ("--deployment-name", "c", "--canary", "100", "--bake", "11")
    c = (await asyncio.to_thread(s.run, "deploy", APP, *flags))["deployment_id"]
    async with Visitor(address, s.bundle) as canary_tab:
        await canary_tab.open()
        await canary_tab.connect()
        await canary_tab.count()
        check(f"a new tab goes to the canary {c}", canary_tab.affinity == c and canary_tab.tab == 1)
        ended = await asyncio.to_thread(s.run, "rollback", "--message", "not yet")
        check(
            f"rollback ends it, {b} is active", (ended["ended"], ended["deployment_id"]) == (c, b)
        )
        async with Visitor(address, s.bundle) as new:
            await new.open()
            check(f"a new tab gets {b}", new.affinity == b)
        await canary_tab.count()
        check("the canary's tab counts on", canary_tab.connected and canary_tab.tab == 2)
    entries = (await asyncio.to_thread(s.run, "history"))["history"]
    actions = [entry["what"] for entry in entries]
    check(
        "history has who did what",
        actions[-2:] == ["canary", "rollback"] and bool(entries[-1]["by"]),
    )


# -- commands ----------------------------------------------------------------------------------


def play_once(*, job: bool = False) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pulse-railway-demo-") as folder:
        root = Path(folder).resolve()
        story(root, job=job)
        left = processes_of(root)
        check("no process is left behind", not left)
    print(f"all of it was seen, in {time.monotonic() - began:.0f} s")
    return 0


def stay(root: Path) -> int:
    from pulse_railway.local.guard import PAGE_FILE

    try:
        with stage(root) as s:
            page = (root / PAGE_FILE).as_uri()  # its own address would need the key
            print(f"watch it at {page}", flush=True)
            if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
                webbrowser.open(page)
            address = s.run("ensure", APP)["server_address"]
            active = s.run("status")["active"] or s.run("deploy", APP)["deployment_id"]
            while s.get(address).status_code >= 500:  # deployments of the last run start again
                time.sleep(0.5)
            print(
                f"""
{active} is active at {address}

  watch    {page}   the services, and buttons that make things fail
  open     {address}/probe   (a certificate of its own: accept it, or trust {s.bundle})
  shell    eval "$(.venv/bin/invoke local --env)"
  again    .venv/bin/invoke deploy --app {APP}
           the open tab stays on its deployment, a new tab gets the new one
  look     .venv/bin/invoke status

Ctrl-C ends it. The next `make demo` starts the same deployments again, from {root.name}/.""",
                flush=True,
            )
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            while s.process.poll() is None:
                time.sleep(0.5)
            return 1
    except KeyboardInterrupt:
        print("\nending")
        return 0


def main(*, once: bool = False, job: bool = False) -> int:
    return play_once(job=job) if once or job else stay((ROOT / ".local-railway").resolve())
