"""The names that the runtime's scripts hold a copy of are contract.py's."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from pulse_railway import contract, runtime_image

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")
ownership: Any = runtime_image.load("ownership")


def test_router_shares_the_contract() -> None:
    for name in (
        "AFFINITY_QUERY AFFINITY_HEADER SELECTED_HEADER CLIENT_LOADER_HEADER"
        " CLIENT_LOADER_LOCATION_HEADER RELOAD_QUERY STALE_HEADER INTERNAL_PREFIX SESSIONS_PATH"
        " RELOAD_PATH INTERNAL_TOKEN_HEADER ROUTER_HEALTH_PATH MOVE_PATH DEFAULT_PORT"
        " DEFAULT_REDIS_PREFIX"
    ).split():
        ours = getattr(router, name, None) or getattr(control, name)
        assert ours == getattr(contract, name), name
    assert router.DEPLOYMENT_ID.pattern == contract.DEPLOYMENT_ID_PATTERN.pattern
    assert janitor.API_URL == contract.API_URL
    assert router.STAMP.pattern == re.sub(r"[()]", "", ownership._STAMP.pattern)
    assert (ownership.STACK, ownership.REMOVED) == (contract.STACK, contract.REMOVED)


def test_variables_are_read_by_their_names() -> None:
    """Every PULSE_* and REDIS_URL that the runtime reads is the contract's, or its own option."""
    known = {v for k, v in vars(contract).items() if k.isupper() and isinstance(v, str)}
    own = {
        "PULSE_RAILWAY_ROUTER_RESPONSE_TIMEOUT",
        "PULSE_RAILWAY_ROUTER_CONNECTION_LIMIT",
        "PULSE_RAILWAY_ROUTER_FALLBACK",
        "PULSE_RAILWAY_ROUTER_HALF_CLOSED_SECONDS",
        "PULSE_RAILWAY_ROUTER_SHUTDOWN_SECONDS",
        "PULSE_RAILWAY_ROUTER_WORKERS",
        "PULSE_RAILWAY_ACCESS_LOG",
        "PULSE_RAILWAY_METRICS_PORT",
        "PULSE_RAILWAY_ASSET_PREFIXES",
        "PULSE_KV_KIND",
        "PULSE_KV_URL",
        "PULSE_KV_PATH",
    }
    for script in runtime_image.SCRIPTS:
        text = (runtime_image.sources() / script).read_text()
        for name in set(re.findall(r'"(PULSE_[A-Z_]+|REDIS_URL)"', text)):
            assert name in known | own, f"{script} reads {name}"


def test_the_runtime_imports_nothing_of_the_package() -> None:
    for script in runtime_image.SCRIPTS:
        text = (runtime_image.sources() / script).read_text()
        assert not re.search(r"^\s*(from|import) pulse", text, re.M), script
    router_py = (runtime_image.sources() / "router.py").read_text()
    assert not re.search(r"^\s*(from|import) (control|janitor)\b", router_py, re.M)


def test_the_lock_of_the_image_fits_what_its_scripts_ask_for() -> None:
    root = Path(runtime_image.sources())
    text = (root / "runtime.lock").read_text()
    shipped = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", text, re.M))
    for script in ("router.py", "control.py", "janitor.py", "tracing.py"):
        wanted = re.findall(r'^#   "(.+)",$', (root / script).read_text(), re.M)
        assert wanted, script
        for requirement in map(Requirement, wanted):
            assert requirement.specifier.contains(shipped[requirement.name]), requirement
    assert "--hash=sha256:" in text
    assert "://" not in text  # of no registry: pip's own is asked


def test_the_lock_of_the_image_is_not_held_back_by_pulse() -> None:
    """Pulse pins a Starlette that has known vulnerabilities; the image has no Pulse."""
    root = Path(runtime_image.sources())
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (root / "runtime.lock").read_text(), re.M))
    assert "pulse-framework" not in pinned
    assert Version(pinned["starlette"]).major >= 1


def test_the_lock_names_the_extras_that_packages_ask_for() -> None:
    """pip 23 takes `coverage[toml]` for unpinned beside `coverage==...`, from the day on which
    there is a newer coverage."""
    text = (Path(runtime_image.sources()) / "requirements.lock").read_text()
    with_extras = set(re.findall(r"^([a-z0-9-]+)\[", text, re.M))
    asked = {
        needed.name
        for installed in distributions()
        for needed in map(Requirement, installed.requires or [])
        if needed.extras and (not needed.marker or needed.marker.evaluate({"extra": ""}))
    }
    assert asked == with_extras == {"coverage"}
