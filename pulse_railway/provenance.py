"""The commit that is deployed, and who deploys it: from git, else from the variables of a CI."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

TEXT_LIMIT = 200  # characters of a message

# The variables of CI services; `mark` is set in every run, `url` is the run's page.
CI = {
    "GitHub Actions": {
        "mark": "GITHUB_ACTIONS",
        "commit": "GITHUB_SHA",
        "branch": "GITHUB_REF_NAME",
        "user": "GITHUB_ACTOR",
    },
    "GitLab CI": {
        "mark": "GITLAB_CI",
        "commit": "CI_COMMIT_SHA",
        "branch": "CI_COMMIT_REF_NAME",
        "author": "CI_COMMIT_AUTHOR",
        "message": "CI_COMMIT_TITLE",
        "user": "GITLAB_USER_LOGIN",
        "url": "CI_JOB_URL",
    },
    "CircleCI": {
        "mark": "CIRCLECI",
        "commit": "CIRCLE_SHA1",
        "branch": "CIRCLE_BRANCH",
        "user": "CIRCLE_USERNAME",
        "url": "CIRCLE_BUILD_URL",
    },
}


def about(context: Path, message: str | None) -> dict[str, str]:
    """Return what is deployed, and by whom.

    The keys are `commit`, `branch`, `author`, `message`, `by` and `url`, if they are known, and
    `dirty` if files differ from the commit.
    """
    facts = {**from_ci(os.environ), **from_git(context), "by": by()}
    if message:
        facts["message"] = message
    facts["message"] = (facts.get("message") or "").strip().split("\n")[0][:TEXT_LIMIT]
    return {name: value for name, value in facts.items() if value}


def by() -> str:
    """Return the user of this run, as in `ada@laptop` or `ada (GitHub Actions)`."""
    for service, names in CI.items():
        if os.environ.get(names["mark"]):
            return f"{os.environ.get(names['user']) or 'somebody'} ({service})"
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # in a container the user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def from_ci(env: Mapping[str, str]) -> dict[str, str]:
    for names in CI.values():
        if env.get(names["mark"]):
            facts = {k: env.get(v, "") for k, v in names.items() if k not in ("mark", "user")}
            if env.get("GITHUB_RUN_ID"):
                parts = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
                server, repository, run = (env.get(name, "") for name in parts)
                facts["url"] = f"{server}/{repository}/actions/runs/{run}"
            return facts
    return {}


def from_git(context: Path) -> dict[str, str]:
    """Return the facts of the commit in the context; {} if the context is no work tree."""
    log = _git(context, "log", "-1", "--format=%H%x00%an%x00%s")
    if log is None or log.count("\0") != 2:
        return {}
    commit, author, message = log.strip("\n").split("\0")
    facts = {"commit": commit, "author": author, "message": message}
    branch = (_git(context, "rev-parse", "--abbrev-ref", "HEAD") or "").strip()
    if branch and branch != "HEAD":
        facts["branch"] = branch
    if _git(context, "status", "--porcelain", "--", "."):
        facts["dirty"] = "yes"
    return facts


def origin(context: Path) -> tuple[str | None, str]:
    """Return the URL of git's `origin`, and the context's path in the repository.

    The path is "", or ends with a slash.
    """
    folder = (_git(context, "rev-parse", "--show-prefix") or "").strip()
    return (_git(context, "remote", "get-url", "origin") or "").strip() or None, folder


def _git(context: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(context), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
