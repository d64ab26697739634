"""docs/messages.md lists every message a user can get."""

from __future__ import annotations

import ast
from pathlib import Path

from pulse_railway.runtime_image import SCRIPTS
from tests.conftest import ROOT

SAYING = {
    *("Failure", "Uncertain", "ApiError", "StateError", "Refused", "ValueError", "UpstreamError"),
    *("RailwayPluginError", "NotUnderstood", "SystemExit", "Exit", "warn", "warning", "error"),
}
FILES = [
    *sorted((ROOT / "pulse_railway").glob("*.py")),
    *sorted((ROOT / "pulse_railway" / "flows").glob("*.py")),
    *sorted((ROOT / "pulse_railway" / "railway").glob("*.py")),
    *(ROOT / name for name in SCRIPTS),
]
ELSEWHERE = {"error: …", "…: …", "…: …; trying again", "%s: %s", "%s is missing"}


def skeleton(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """A message with `…` where a value goes."""
    match node:
        case ast.Constant(value=str(text)):
            return text.replace("%s", "…").replace("%r", "…")
        case ast.JoinedStr(values=values):
            return "".join(skeleton(value, constants) for value in values)
        case ast.FormattedValue(value=ast.Name(id=name)) if name.isupper() and name in constants:
            return skeleton(constants[name], constants)
        case ast.Name(id=name) if name in constants:
            return skeleton(constants[name], constants)
        case _:
            return "…"


def messages(path: Path) -> list[str]:
    """What a file says to a user: the text of its failures, warnings and log lines."""
    tree = ast.parse(path.read_text())
    constants: dict[str, ast.expr] = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant | ast.JoinedStr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            if name in SAYING:
                text = skeleton(node.args[name == "UpstreamError"], constants)
                text = " ".join(text.split("\n")[0].split())
                if len(text.replace("…", "").strip()) > 5 and text not in ELSEWHERE:
                    found.append(text)
    return found


def test_every_message_is_listed() -> None:
    listed = (ROOT / "docs" / "messages.md").read_text()
    raised = [message for path in FILES for message in messages(path)]
    assert len(raised) > 80
    assert [message for message in raised if message not in listed] == []


if __name__ == "__main__":
    for path in FILES:
        for message in messages(path):
            print(f"{path.name}: {message}")
