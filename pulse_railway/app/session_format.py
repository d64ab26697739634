"""The form in which a session is stored: the wire format of Pulse 0.1.111, frozen.

Deployments that are live at once can run different versions of Pulse, and pulse-railway 0.3.x
stores what its Pulse's serializer writes. So this format does not follow Pulse: it is written for
as long as a version that reads it may run beside this one.

A value is `[[refs, dates, sets, maps], payload]`: JSON, and the numbers of the nodes that are more
than their JSON says. Nodes are numbered in the order in which they are visited, a container before
what it holds. A ref stands for the node whose number it is, a date is an ISO 8601 string, a set is
a list; maps are dicts, which Python does not mark.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import types
from typing import Any

DAY = "YYYY-MM-DD"


def dump(value: Any) -> list[Any]:
    """A value for json.dumps. Raises TypeError for what has no form (functions, keys that are no
    text), ValueError for an infinite number."""
    refs: list[int] = []
    dates: list[int] = []
    sets: list[int] = []
    numbers: dict[int, int] = {}  # id of a container that was visited -> its number
    count = 0

    def visit(node: Any) -> Any:
        nonlocal count
        number, count = count, count + 1
        if isinstance(node, float) and math.isinf(node):
            raise ValueError("an infinite number cannot be stored in a session")
        if isinstance(node, float) and math.isnan(node):
            return None
        if node is None or isinstance(node, bool | int | str | float):
            return node
        if id(node) in numbers:
            refs.append(number)
            return numbers[id(node)]
        numbers[id(node)] = number
        if isinstance(node, datetime.date):
            dates.append(number)
            return date_text(node)
        if isinstance(node, set):
            sets.append(number)
        if isinstance(node, list | tuple | set):
            return [visit(entry) for entry in node]
        return {name: visit(entry) for name, entry in entries(node)}

    payload = visit(value)
    return [[refs, dates, sets, []], payload]


def entries(node: Any) -> list[tuple[str, Any]]:
    """The fields of a dict, a dataclass, or an object with public attributes."""
    if isinstance(node, dict):
        if odd := [name for name in node if not isinstance(name, str)]:
            raise TypeError(f"a key of a dict in a session has to be text, not {odd[0]!r}")
        return list(node.items())
    if dataclasses.is_dataclass(node):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    if callable(node) or isinstance(node, types.ModuleType) or not hasattr(node, "__dict__"):
        raise TypeError(f"a session cannot hold a {type(node).__name__}")
    return [(name, entry) for name, entry in vars(node).items() if not name.startswith("_")]


def decode(found: Any) -> Any:
    """The value of what json.loads has read. Raises ValueError for another format."""
    match found:
        case [[list(refs), list(dates), list(sets), list(_)], payload]:
            numbers = [*refs, *dates, *sets]
        case _:
            raise ValueError("not of the format of Pulse 0.1.111")
    if not all(type(number) is int for number in numbers):
        raise ValueError("not of the format of Pulse 0.1.111")
    are_refs, are_dates, are_sets = set(refs), set(dates), set(sets)
    nodes: dict[int, Any] = {}
    count = 0

    def visit(node: Any) -> Any:
        nonlocal count
        number, count = count, count + 1
        made: Any
        if number in are_refs:
            if node not in nodes:
                raise ValueError("a reference to a node that is not there")
            return nodes[node]
        if number in are_dates:
            nodes[number] = date_of(node)
            return nodes[number]
        match node:
            case list() if number in are_sets:
                made = nodes[number] = set()
                made.update(visit(entry) for entry in node)
            case list():
                made = nodes[number] = []
                made.extend(visit(entry) for entry in node)
            case dict():
                made = nodes[number] = {}
                made.update((name, visit(entry)) for name, entry in node.items())
            case _:
                made = node
        return made

    try:
        return visit(payload)
    except TypeError as error:  # an entry of a set that has no hash, a date that is no text
        raise ValueError(str(error)) from None


def date_text(value: datetime.date) -> str:
    """A day, or a moment in UTC to the millisecond; one without a time zone is taken for UTC."""
    if not isinstance(value, datetime.datetime):
        return value.isoformat()
    utc = datetime.UTC
    value = value.astimezone(utc) if value.tzinfo else value.replace(tzinfo=utc)
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def date_of(text: str) -> datetime.date:
    if len(text) == len(DAY):
        return datetime.date.fromisoformat(text)
    found = datetime.datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
