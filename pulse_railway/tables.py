"""`status` as a table."""

from __future__ import annotations

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


def show_status(result: dict[str, Any]) -> None:
    """Print what deployment.status returned, on stdout."""
    console = Console(highlight=False)
    console.print(Text.assemble("address  ", (result["address"] or "none yet", "bold")))
    for row in result["baseline"]:
        good = row["railway"] in ("SUCCESS", None)
        mark = Text("● ", "green" if good else "red")
        version = f"  {row['version']}" if row["version"] else ""
        console.print(mark + Text(row["service"]) + Text(version, "dim"))
    for name in result["missing"]:
        console.print(Text.assemble(("○ ", "red"), name, (" missing", "red")))
    for problem in result["problems"]:
        console.print(Text(f"problem: {problem}", "red"), soft_wrap=True)
    if result["deployments"]:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("deployment", "state", "railway", "age"):
            table.add_column(title)
        table.add_column("sessions", justify="right")
        for row in result["deployments"]:
            sessions = row["sessions"]
            table.add_row(
                row["deployment_id"],
                Text(row["state"], STATE_STYLES.get(row["state"], "red")),
                row["railway"] or "",
                age(row["age_seconds"]),
                "?" if sessions is None else str(sessions),
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
