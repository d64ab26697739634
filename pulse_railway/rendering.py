"""Tables and lines for people: of `status`, `history` and `doctor`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pulse_railway.advice import pasteable
from pulse_railway.flows.rollout import parse_steps
from pulse_railway.output import console

if TYPE_CHECKING:
    from pulse_railway.flows.watch import History

NARROW = 100  # columns, below which a table would cut ids: each row is a few lines then
STATE_STYLES = {"active": "bold green", "draining": "yellow", "pending": "cyan"}


def age(seconds: float | None) -> str:
    """Return a duration with its two largest units, as in `3 d 4 h` or `7 m 8 s`."""
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
    moving = ""
    if row["moving_at"] is not None:
        since = time.time() - row["moving_at"]
        moved = f"{row['moved']} moved at a page, {row['moved_idle']} when idle"
        when = f"for {age(since)}, {moved}" if since >= 0 else f"in {age(-since)}"
        moving = f", moves {when}"
    processes = f", {row['instances']} processes" if row["instances"] > 1 else ""
    return str(row["state"]) + (", rolled back" if row["rolled_back"] else "") + moving + processes


def describe(about: dict[str, Any]) -> str:
    """Return what was deployed, as in `1a2b3c4 Fix the cart (Ada; ada@laptop)`."""
    facts = {name: str(value) for name, value in about.items() if value}
    commit = facts.get("commit", "")[:7] + ("+" if "dirty" in facts else "")
    people = "; ".join(dict.fromkeys(facts[k] for k in ("author", "by") if k in facts))
    digest = facts.get("digest", "").removeprefix("sha256:")[:12]
    parts = [
        commit,
        facts.get("message", ""),
        f"image {digest}" if digest else "",
        f"({people})" if people else "",
    ]
    return " ".join(part for part in parts if part)


def activity(result: dict[str, Any]) -> list[str]:
    """Return a line each for a maintenance, a deploy and a canary that are under way."""
    lines = []
    now = time.time()
    if down := result["maintenance"]:
        duration, who = age(now - down["since"]), down.get("by") or "somebody"
        lines.append(
            f"maintenance for {duration}, by {who}: nobody gets the app. `pulse-railway"
            " maintenance off` ends it"
        )
    if lock := result["lock"]:
        who = lock.get("by") or "somebody"
        line = f"{who} has been deploying for {age(now - lock['since'])}"
        if name := lock.get("deployment_id"):
            line += f", {name} ({lock['railway'] or 'not built'} on Railway)"
        if not lock.get("dead"):  # else it is a problem
            left = age(lock["lease_seconds"])
            line += f": its lock ends in {left}, or with `pulse-railway unlock` if it was killed"
        lines.append(line)
    if canary := result["canary"]:
        name = canary["deployment_id"]
        lines.append(
            f"{name} gets {canary['weight']:g} % of the new visitors: `pulse-railway promote"
            f" --deployment-id {name}` finishes, `pulse-railway rollback` ends it"
        )
        if steps := parse_steps(canary.get("steps")):
            at = len(steps.weights) - len(steps.from_weight(canary["weight"])) + 1
            since = age(now - canary["since"]) if canary.get("since") else "?"
            lines.append(
                f"that is step {at} of {len(steps.weights)}, for {since}: if its run was cut off,"
                " `pulse-railway promote --continue` takes it up"
            )
    return [*map(pasteable, lines), *result["copied"]]


def stdout() -> Console:
    """Return a console for stdout: in a pipe each row is one line."""
    return console(width=None if sys.stdout.isatty() else 250)


def details(titles: Iterable[str], cells: Iterable[str]) -> Table:
    """Return a row's other cells as indented lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for title, cell in zip(titles, cells, strict=True):
        if cell:
            table.add_row(f"    {title}", cell)
    return table


def show_history(entries: list[dict[str, Any]]) -> None:
    """Print the entries of `history` on stdout, the newest last."""
    out = stdout()
    titles = ("when (UTC)", "what", "deployment", "before", "of", "by", "why")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title in ("deployment", "before"))
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry["at"]))
        weight = f" {entry['weight']}" if entry.get("weight") else ""
        before = entry.get("active") if entry["what"] != "remove" else None
        row = [f"{entry['what']}{weight}", entry.get("deployment_id"), before]
        digest = str(entry.get("digest") or "").removeprefix("sha256:")[:12]
        row += [digest or str(entry.get("commit") or "")[:7], entry.get("by"), entry.get("why")]
        cells = [when, *(str(cell or "") for cell in row)]
        if out.width < NARROW:
            out.print(Text("  ".join(cells[:3])), soft_wrap=True)
            out.print(details(titles[3:], cells[3:]))
        table.add_row(*cells)
    if not entries or out.width >= NARROW:
        out.print(table if entries else "nothing yet")


MARKS = {"good": ("✓", "green"), "warning": ("!", "yellow"), "bad": ("✗", "red")}


def show_checks(checks: list[dict[str, str]]) -> None:
    """Print the checks of `doctor` on stdout."""
    out = stdout()
    for check in checks:
        mark = MARKS.get(check["verdict"], ("-", "dim"))
        message = f": {check['said']}" if check["said"] else ""
        line = Text.assemble(mark, " ", (check["name"], "bold"), message)
        out.print(line, soft_wrap=True)


def show_status(result: dict[str, Any]) -> None:
    """Print the result of flows.status on stdout."""
    out = stdout()
    for part in status_parts(result):
        out.print(part, soft_wrap=isinstance(part, Text))


def show_watch(looks: Iterable[tuple[dict[str, Any], History]]) -> None:
    """Print each look; on a terminal it replaces the previous one, in a pipe it follows it."""
    out = stdout()
    if not out.is_terminal:
        for result, history in looks:
            out.print(Text(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())))
            for part in status_parts(result, history):
                out.print(part, soft_wrap=isinstance(part, Text))
            out.print()
            sys.stdout.flush()
        return
    with Live(console=out, auto_refresh=False, vertical_overflow="visible") as live:
        for result, history in looks:
            at = Text(f"at {time.strftime('%H:%M:%S')}; Ctrl-C ends it", "dim")
            live.update(Group(*status_parts(result, history), at), refresh=True)


def status_parts(result: dict[str, Any], history: History | None = None) -> list[Text | Table]:
    """Return the lines and tables of `status`. No information is in a colour alone."""
    parts: list[Text | Table] = [
        Text.assemble("address  ", (result["address"] or "none yet", "bold"))
    ]
    if result.get("session_redis"):
        parts.append(Text(f"sessions in {result['session_redis']}"))
    for row in result["baseline"]:
        good = row["railway"] in ("SUCCESS", None)
        parts.append(
            Text.assemble(
                ("● ", "green" if good else "red"),
                row["service"],
                # the env service has only variables, no deployment
                "" if row["railway"] is None else ("  up" if good else f"  {row['railway']}"),
                (f"  {row['version']}" if row["version"] else "", "dim"),
                (f"  {row['region']}" if row.get("region") else "", "dim"),
            )
        )
    parts += [Text.assemble(("○ ", "red"), n, (" missing", "red")) for n in result["missing"]]
    parts += [Text(line, "yellow") for line in activity(result)]
    parts += [Text(f"problem: {problem}", "red") for problem in result["problems"]]
    if not result["deployments"] and not result["problems"]:
        parts.append(Text(pasteable("no deployments: run `pulse-railway deploy`")))
    elif result["deployments"]:
        parts += [Text(), *deployments(result["deployments"], history)]
    parts += [
        Text(
            f"router {router['router']}: {router['requests']} requests, {router['errors']}"
            f" errors, {router['tunnels_open']} sockets, up {age(router['uptime_seconds'])}",
            "dim",
        )
        for router in result["routers"]
    ]
    if not result["problems"] and result["active"] and not result["maintenance"]:
        parts.append(Text(f"{result['active']} is active, and nothing is wrong", "green"))
    return parts


def deployments(rows: list[dict[str, Any]], history: History | None) -> list[Text | Table]:
    """Return the deployments as a table, or on a narrow terminal as lines, with whole ids."""
    narrow = stdout().width < NARROW
    rates = ["requests/s", "errors/s"] if history else []
    titles = ["deployment", "state", "railway", "region", "age", "sessions", *rates, "what"]
    parts: list[Text | Table] = []
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        right = title == "sessions" and not history
        table.add_column(
            title,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=title == "deployment",
        )
    for row in rows:
        sessions = row["sessions"]
        cells = ["?" if sessions is None else str(sessions)]
        if history:
            series = history.series[row["deployment_id"]]
            cells = [sparkline(s) for s in (series.sessions, series.requests, series.errors)]
        state = Text(state_of(row), STATE_STYLES.get(row["state"], "red"))
        others = [
            row["railway"] or "",
            row.get("region") or "",
            age(row["age_seconds"]),
            *cells,
            describe(row["about"]),
        ]
        if narrow:
            parts.append(Text.assemble(row["deployment_id"], "  ", state))
            parts.append(details(titles[2:], others))
        table.add_row(row["deployment_id"], state, *others)
    return parts if narrow else [table]


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float | None]) -> str:
    """Return a sparkline from 0 to the maximum, and the last value, as in `▁▃█ 12`.

    None, a look without an answer, is a gap.
    """
    series = list(values)
    maximum = max((v for v in series if v is not None), default=0) or 1
    line = "".join(
        " " if v is None else BARS[round(v / maximum * (len(BARS) - 1))] for v in series
    ).strip()
    last = series[-1] if series else None
    return f"{line} {'?' if last is None else f'{last:.3g}'}".strip()
