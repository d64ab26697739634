"""The `railway` command of the local Railway: `up` and `ssh`, with Railway's own flags.

It follows the source of Railway's CLI 5.43. The local Railway's address is in
PULSE_RAILWAY_API_URL, that of its SSH relay in its folder, which is the first argument. The token
is RAILWAY_TOKEN (a project token), or RAILWAY_API_TOKEN (any other) where the first is not set.
With `--json` an error is one object on stdout.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

VERSION = "railway 5.43.1 (local)"

PROJECT = """
query Project($id: String!) {
  project(id: $id) {
    environments { edges { node { id name } } }
    services { edges { node { id name } } }
  }
}
"""
INSTANCE = """
query Instance($environment: String!, $service: String!) {
  serviceInstance(environmentId: $environment, serviceId: $service) { id }
}
"""
KEYS = """
query Keys { sshPublicKeys { edges { node { id name publicKey fingerprint } } } }
"""
STATUS = """
query Status($deployment: String!, $since: DateTime) {
  deployment(id: $deployment) { status }
  buildLogs(deploymentId: $deployment, startDate: $since, limit: 500) { timestamp message }
}
"""

UNAUTHORIZED = "Unauthorized. Please login with `railway login`"
NO_LOCAL_KEY = (
    "No SSH keys found in your SSH agent or ~/.ssh/\n\nGenerate one with:\n"
    "  ssh-keygen -t ed25519\n\nThen run this command again."
)
NO_REGISTERED_KEY = (
    "No registered SSH keys found. Register one with:\n  railway ssh keys add\n\n"
    "Or import from GitHub:\n  railway ssh keys github"
)


def script(root: Path) -> str:
    """Return the text of the `railway` executable of the local Railway in `root`.

    It is this version's, whatever version's verb calls it: `-I` ignores PYTHONPATH.
    """
    return (
        f'#!/bin/sh\n[ "$*" = --version ] && exec echo "{VERSION}"\n'
        f"exec {shlex.quote(sys.executable)} -I -m pulse_railway.local.cli {shlex.quote(str(root))}"
        ' "$@"\n'
    )


class CliFailure(Exception):
    """An error message of the CLI, with the `code` and `hint` that `--json` adds."""

    def __init__(self, message: str, code: str = "UNKNOWN_ERROR", hint: str | None = None) -> None:
        super().__init__(message)
        self.code, self.hint = code, hint


class LocalApi:
    """Calls the local Railway with the token of this run."""

    def __init__(self) -> None:
        project = os.environ.get("RAILWAY_TOKEN")
        account = os.environ.get("RAILWAY_API_TOKEN")
        if not project and not account:
            raise CliFailure(UNAUTHORIZED, "UNAUTHORIZED", "Run `railway login`")
        url = os.environ.get("PULSE_RAILWAY_API_URL")
        if not url:
            raise CliFailure("PULSE_RAILWAY_API_URL is not set: this is the local `railway`")
        self.headers = (
            {"Project-Access-Token": project} if project else {"Authorization": f"Bearer {account}"}
        )
        self.host = urlsplit(url).netloc

    def post(
        self, path: str, body: bytes, content_type: str, timeout: float = 30
    ) -> tuple[int, bytes]:
        """Return the status and body of the answer. `timeout` is in seconds. Raises CliFailure."""
        connection = http.client.HTTPConnection(self.host, timeout=timeout)
        headers = {**self.headers, "content-type": content_type}
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise CliFailure(f"error sending request for url (http://{self.host}{path})") from error
        finally:
            connection.close()

    def call(self, document: str, **variables: Any) -> Any:
        """Return the `data` of a GraphQL answer. Raises CliFailure."""
        body = json.dumps({"query": document, "variables": variables}).encode()
        status, answer = self.post("/graphql/v2", body, "application/json")
        if status == 429:
            raise CliFailure(
                "You are being ratelimited. Try again in 1 seconds", "RATE_LIMITED", "Wait a moment"
            )
        if status != 200:
            raise CliFailure(f"Failed to fetch: status code {status}")
        result = json.loads(answer)
        if result.get("errors"):
            message = result["errors"][0]["message"]
            if message == "Not Authorized":
                raise CliFailure(UNAUTHORIZED, "UNAUTHORIZED", "Run `railway login`")
            raise CliFailure(message)
        return result["data"]

    def resolve(self, args: argparse.Namespace) -> tuple[str, str]:
        """Return the ids of the environment and the service, each given as id or name."""
        project = self.call(PROJECT, id=args.project)["project"]
        return (
            _id_of(project["environments"], args.environment, "Environment"),
            _id_of(project["services"], args.service, "Service"),
        )


def _id_of(connection: Any, id_or_name: str, kind: str) -> str:
    for edge in connection["edges"]:
        node = edge["node"]
        if id_or_name == node["id"] or id_or_name.lower() == node["name"].lower():
            return str(node["id"])
    raise CliFailure(f"{kind} '{id_or_name}' not found", f"{kind.upper()}_NOT_FOUND")


# -- up ----------------------------------------------------------------------------------------


def archive(folder: Path, root: Path, *, gitignore: bool) -> bytes:
    """Return the gzipped tar that the CLI sends, with names relative to `root`.

    Symbolic links are followed. Raises CliFailure for a link without a target.
    """
    from pulse_railway.railway.upload import left_out

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, dereference=True) as tar:
        for parent, folders, files in os.walk(folder, followlinks=True):
            for name in sorted([*folders, *files]):
                path = Path(parent) / name
                if left_out(folder, path.relative_to(folder), gitignore=gitignore):
                    if name in folders:
                        folders.remove(name)
                    continue
                try:
                    tar.add(path, arcname=f"./{path.relative_to(root)}", recursive=False)
                except OSError as error:
                    raise CliFailure(f"{path}: {error.strerror} (os error {error.errno})") from None
    return buffer.getvalue()


def up(args: argparse.Namespace) -> int:
    folder = Path(args.path).resolve()
    if not folder.is_dir():
        raise CliFailure(f"{folder} is not a folder")
    railway = LocalApi()
    environment, service = railway.resolve(args)
    root = folder if args.path_as_root else Path.cwd()
    query = urlencode({"serviceId": service, **({"message": args.message} if args.message else {})})
    timeout = float(os.environ.get("RAILWAY_HTTP_TIMEOUT") or 90)
    status, answer = railway.post(
        f"/project/{args.project}/environment/{environment}/up?{query}",
        archive(folder, root, gitignore=not args.no_gitignore),
        "application/gzip",
        timeout,
    )
    if status == 413:
        raise CliFailure(
            f"Failed to upload code. File too large: {answer.decode()}", "FAILED_TO_UPLOAD"
        )
    if status == 400:
        raise CliFailure(json.loads(answer)["message"], "FAILED_TO_UPLOAD")
    if status != 200:
        raise CliFailure(f"Failed to upload code with status code {status}", "FAILED_TO_UPLOAD")
    body = json.loads(answer)
    if args.json:
        print(json.dumps({k: body[k] for k in ("deploymentId", "logsUrl")}))
    else:
        print(f"  Build Logs: {body['logsUrl']}")
    return 0 if args.detach else follow(railway, body["deploymentId"])


def follow(railway: LocalApi, deployment: str) -> int:
    seen = 0
    while True:
        data = railway.call(STATUS, deployment=deployment, since=None)
        for line in data["buildLogs"][seen:]:
            print(line["message"])
        seen = len(data["buildLogs"])
        status = data["deployment"]["status"]
        if status in ("SUCCESS", "FAILED", "CRASHED", "REMOVED", "SKIPPED"):
            return 0 if status == "SUCCESS" else 1
        time.sleep(0.5)


# -- ssh ---------------------------------------------------------------------------------------


def ssh(args: argparse.Namespace) -> int:
    railway = LocalApi()
    identity = args.identity_file or registered_key(railway)
    environment, service = railway.resolve(args)
    instance = railway.call(INSTANCE, environment=environment, service=service)["serviceInstance"]
    port = json.loads((args.root / "state.json").read_text())["ssh_port"]
    # Railway's CLI has neither option: here they keep ~/.ssh unread and unwritten
    command = [
        "ssh",
        "-F",
        "/dev/null",
        "-o",
        f"UserKnownHostsFile={args.root / 'ssh' / 'known_hosts'}",
    ]
    command += ["-o", "GlobalKnownHostsFile=/dev/null", "-p", str(port)]
    if identity:
        command += ["-i", str(identity), "-o", "IdentitiesOnly=yes"]
    if args.command:
        command.append("-t" if sys.stdin.isatty() and sys.stdout.isatty() else "-T")
    command.append(f"{instance['id']}@127.0.0.1")
    # as Railway's CLI: a single argument is a shell command, several are quoted one by one
    command += args.command if len(args.command) == 1 else map(shlex.quote, args.command)
    return subprocess.run(command).returncode


def registered_key(railway: LocalApi) -> Path | None:
    """Return the file of the first key that is registered with Railway, None for an agent's key.

    The agent's keys come first, then ~/.ssh/*.pub. Raises CliFailure if none is registered.
    """
    local: list[tuple[Path | None, str]] = [(None, line) for line in _agent_keys()]
    local += [(path, path.read_text()) for path in sorted((Path.home() / ".ssh").glob("*.pub"))]
    if not local:
        raise CliFailure(NO_LOCAL_KEY)
    registered = {
        edge["node"]["publicKey"].split()[1]: edge["node"]["name"]
        for edge in railway.call(KEYS)["sshPublicKeys"]["edges"]
    }
    for path, text in local:
        words = text.split()
        if len(words) > 1 and words[1] in registered:
            name = words[2] if len(words) > 2 else path.stem if path else words[1][:12]
            source = f"file {path}" if path else "agent"
            print(f"Using SSH key from {source}: {name}", file=sys.stderr)
            return path.with_suffix("") if path else None
    raise CliFailure(NO_REGISTERED_KEY)


def _agent_keys() -> list[str]:
    if not os.environ.get("SSH_AUTH_SOCK"):
        return []
    try:
        done = subprocess.run(["ssh-add", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def main(root: Path, argv: list[str]) -> int:
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
    verb.set_defaults(run=ssh, json=False)
    args = parser.parse_args(argv, argparse.Namespace(root=root))
    try:
        return int(args.run(args))
    except CliFailure as failure:
        if args.json:
            error = {"error": str(failure), "code": failure.code, "hint": failure.hint}
            print(json.dumps(error))
        else:
            print(failure, file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
