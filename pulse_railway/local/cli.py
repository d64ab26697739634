"""The `railway` command of the local Railway: `up` and `ssh`, with Railway's own flags.

It finds the local Railway by PULSE_RAILWAY_API_URL and presents RAILWAY_TOKEN (a project token)
or RAILWAY_API_TOKEN (any other), never both, as Railway's CLI does.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

VERSION = "railway 5.0.0 (local)"

SERVICES = """
query Services($environment: String!) {
  environment(id: $environment) {
    serviceInstances { edges { node { serviceId serviceName } } }
  }
}
"""

STATUS = """
query Status($deployment: String!, $since: DateTime) {
  deployment(id: $deployment) { status }
  buildLogs(deploymentId: $deployment, startDate: $since, limit: 500) { timestamp message }
}
"""


class Failure(Exception):
    pass


def connection() -> httpx.Client:
    project, account = os.environ.get("RAILWAY_TOKEN"), os.environ.get("RAILWAY_API_TOKEN")
    if project and account:
        raise Failure("both RAILWAY_TOKEN and RAILWAY_API_TOKEN are set")
    if not project and not account:
        raise Failure("Unauthorized. Please login with `railway login`")
    url = os.environ.get("PULSE_RAILWAY_API_URL")
    if not url:
        raise Failure("PULSE_RAILWAY_API_URL is not set: this `railway` is the local one's")
    headers = (
        {"Project-Access-Token": project} if project else {"Authorization": f"Bearer {account}"}
    )
    base = url.removesuffix("/graphql/v2")
    return httpx.Client(base_url=base, headers=headers, timeout=180, trust_env=False)


def call(client: httpx.Client, document: str, **variables: Any) -> Any:
    answer = client.post("/graphql/v2", json={"query": document, "variables": variables})
    if answer.status_code != 200:
        raise Failure(f"API answered {answer.status_code}")
    body = answer.json()
    if body.get("errors"):
        raise Failure(body["errors"][0]["message"])
    return body["data"]


def service_id(client: httpx.Client, environment: str, wanted: str) -> str:
    data = call(client, SERVICES, environment=environment)
    for edge in data["environment"]["serviceInstances"]["edges"]:
        node = edge["node"]
        if wanted in (node["serviceId"], node["serviceName"]):
            return str(node["serviceId"])
    raise Failure(f"Service {wanted!r} not found")


def files_of(folder: Path, *, gitignore: bool) -> list[str]:
    """What an upload holds: without .git and node_modules, and without what is ignored."""
    with tempfile.TemporaryDirectory() as empty:
        git_dir = Path(empty) / "git"
        subprocess.run(["git", "init", "-q", "--bare", str(git_dir)], check=True)
        command = ["git", f"--git-dir={git_dir}", f"--work-tree={folder}", "ls-files", "-z"]
        command += ["--others", "--exclude-per-directory=.railwayignore"]
        command += ["--exclude=.git", "--exclude=node_modules"]
        if gitignore:
            command.append("--exclude-per-directory=.gitignore")
        listed = subprocess.run(command, check=True, capture_output=True, cwd=folder).stdout
    return [name for name in listed.decode().split("\0") if name]


def archive(folder: Path, root: Path, *, gitignore: bool) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name in files_of(folder, gitignore=gitignore):
            tar.add(folder / name, arcname=str((folder / name).relative_to(root)), recursive=False)
    return buffer.getvalue()


def up(args: argparse.Namespace) -> int:
    folder = Path(args.path).resolve()
    if not folder.is_dir():
        raise Failure(f"{folder} is not a folder")
    with connection() as client:
        service = service_id(client, args.environment, args.service)
        root = folder if args.path_as_root else Path.cwd()
        answer = client.post(
            f"/project/{args.project}/environment/{args.environment}/up",
            params={"serviceId": service},
            content=archive(folder, root, gitignore=not args.no_gitignore),
            headers={"content-type": "multipart/form-data"},
        )
        if answer.status_code != 200:
            raise Failure(f"Failed to upload code with status code {answer.status_code}")
        body = answer.json()
        if args.json:
            print(json.dumps({k: body[k] for k in ("deploymentId", "logsUrl")}))
        else:
            print(f"  Build Logs: {body['logsUrl']}")
        return 0 if args.detach else follow(client, body["deploymentId"])


def follow(client: httpx.Client, deployment: str) -> int:
    seen = 0
    while True:
        data = call(client, STATUS, deployment=deployment, since=None)
        for line in data["buildLogs"][seen:]:
            print(line["message"])
        seen = len(data["buildLogs"])
        status = data["deployment"]["status"]
        if status in ("SUCCESS", "FAILED", "CRASHED", "REMOVED", "SKIPPED"):
            return 0 if status == "SUCCESS" else 1
        time.sleep(0.5)


def ssh(args: argparse.Namespace) -> int:
    if not args.command:
        raise Failure("the local railway runs commands only: railway ssh ... -- <command>")
    with connection() as client:
        body = {
            "serviceId": service_id(client, args.environment, args.service),
            "environmentId": args.environment,
            # one word goes to the shell as it is, several are quoted word by word
            "command": args.command[0] if len(args.command) == 1 else _quote(args.command),
        }
        answer = client.post("/ssh", json=body)
        if answer.status_code != 200:
            raise Failure(f"ssh failed ({answer.status_code}): {answer.json().get('message')}")
        code = 255
        for line in answer.text.splitlines():
            part = json.loads(line)
            sys.stdout.write(part.get("out", ""))
            sys.stderr.write(part.get("err", ""))
            code = part.get("exit", code)
        return code


def _quote(words: list[str]) -> str:
    import shlex

    return shlex.join(words)


def main(argv: list[str]) -> int:
    if argv in (["--version"], ["-V"]):
        print(VERSION)
        return 0
    parser = argparse.ArgumentParser(prog="railway", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    target = argparse.ArgumentParser(add_help=False)
    target.add_argument("-p", "--project", default=os.environ.get("RAILWAY_PROJECT_ID"))
    target.add_argument("-e", "--environment", default=os.environ.get("RAILWAY_ENVIRONMENT_ID"))
    target.add_argument("-s", "--service", required=True)
    verb = verbs.add_parser("up", parents=[target])
    verb.add_argument("path", nargs="?", default=".")
    verb.add_argument("-d", "--detach", action="store_true")
    verb.add_argument("-c", "--ci", action="store_true")
    verb.add_argument("--json", action="store_true")
    verb.add_argument("-y", "--yes", action="store_true")
    verb.add_argument("--path-as-root", action="store_true")
    verb.add_argument("--no-gitignore", action="store_true")
    verb.add_argument("-m", "--message")
    verb.set_defaults(run=up)
    verb = verbs.add_parser("ssh", parents=[target])
    verb.add_argument("-i", "--identity-file")
    verb.add_argument("command", nargs="*")
    verb.set_defaults(run=ssh)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except Failure as failure:
        print(failure, file=sys.stderr)
    except httpx.HTTPError as error:
        print(f"the local Railway is not reachable ({type(error).__name__})", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
