"""`status` as a table."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

STATE_STYLES = {"active": "bold green", "draining": "yellow", "pending": "cyan"}


def age(seconds: float | None) -> str:
    """3 d 4 h, 5 h 6 m, 7 m 8 s."""
    if seconds is None:
        return ""
    left = int(max(seconds, 0))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def state_of(row: dict[str, Any]) -> str:
    if row["weight"] is not None:
        return f"canary {row['weight']:g} %"
    return str(row["state"]) + (", rolled back" if row["rolled_back"] else "")


def what(about: dict[str, str]) -> str:
    """`1a2b3c4 Fix the cart (Ada; ada@laptop)`."""
    commit = (about.get("commit") or "")[:7] + ("+" if about.get("dirty") else "")
    people = "; ".join(dict.fromkeys(about[k] for k in ("author", "by") if about.get(k)))
    parts = [commit, about.get("message") or "", f"({people})" if people else ""]
    return " ".join(part for part in parts if part)


def doings(result: dict[str, Any]) -> list[str]:
    """What is under way."""
    found = []
    now = time.time()
    if down := result["maintenance"]:
        since = age(now - down["since"])
        found.append(
            f"maintenance since {since}, by {down.get('by')}: nobody gets the app. `pulse-railway"
            " maintenance off` ends it"
        )
    if lock := result["lock"]:
        found.append(f"{lock.get('by')} deploys since {age(now - lock['since'])}")
    if canary := result["canary"]:
        name = canary["deployment_id"]
        found.append(
            f"{name} gets {canary['weight']:g} % of the new visitors: `pulse-railway promote"
            f" --deployment-id {name}` finishes, `pulse-railway rollback` ends it"
        )
    return found


def stdout() -> Console:
    """In a pipe a row is a line, whatever its length."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 250)


def show_history(entries: list[dict[str, Any]]) -> None:
    """Print what `history` says, the newest last, on stdout."""
    console = stdout()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("when (UTC)", "what", "deployment", "before", "by", "why"):
        table.add_column(title, overflow="fold")
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry["at"]))
        weight = f" {entry['weight']}" if entry.get("weight") else ""
        before = entry.get("active") if entry["what"] != "remove" else None
        row = [f"{entry['what']}{weight}", entry["deployment_id"], before]
        row += [entry.get("by"), entry.get("why")]
        table.add_row(when, *(str(cell or "") for cell in row))
    console.print(table if entries else "nothing yet")


MARKS = {"good": ("✓", "green"), "warning": ("!", "yellow"), "bad": ("✗", "red")}


def show_checks(checks: list[dict[str, str]]) -> None:
    """Print what `doctor` found, on stdout."""
    console = stdout()
    for check in checks:
        mark = MARKS.get(check["verdict"], ("-", "dim"))
        said = f": {check['said']}" if check["said"] else ""
        line = Text.assemble(mark, " ", (check["name"], "bold"), said)
        console.print(line, soft_wrap=True)


def show_status(result: dict[str, Any]) -> None:
    """Print what deployment.status returned, on stdout."""
    console = stdout()
    console.print(Text.assemble("address  ", (result["address"] or "none yet", "bold")))
    for row in result["baseline"]:
        good = row["railway"] in ("SUCCESS", None)
        mark = Text("● ", "green" if good else "red")
        version = f"  {row['version']}" if row["version"] else ""
        console.print(mark + Text(row["service"]) + Text(version, "dim"))
    for name in result["missing"]:
        console.print(Text.assemble(("○ ", "red"), name, (" missing", "red")))
    for line in doings(result):
        console.print(Text(line, "yellow"), soft_wrap=True)
    for problem in result["problems"]:
        console.print(Text(f"problem: {problem}", "red"), soft_wrap=True)
    if result["deployments"]:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("deployment", "state", "railway", "age"):
            table.add_column(title)
        table.add_column("sessions", justify="right")
        table.add_column("what", overflow="fold")
        for row in result["deployments"]:
            sessions = row["sessions"]
            table.add_row(
                row["deployment_id"],
                Text(state_of(row), STATE_STYLES.get(row["state"], "red")),
                row["railway"] or "",
                age(row["age_seconds"]),
                "?" if sessions is None else str(sessions),
                what(row["about"]),
            )
        console.print()
        console.print(table)
    else:
        console.print("no deployments: run pulse-railway deploy")
    for router in result["routers"]:
        console.print(
            Text(
                f"router {router['router']}: {router['requests']} requests, {router['errors']}"
                f" errors, {router['tunnels_open']} sockets, up {age(router['uptime_seconds'])}",
                "dim",
            )
        )
