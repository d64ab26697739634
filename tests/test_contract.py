"""The names that the runtime's scripts hold a copy of are contract.py's."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

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


def test_what_ships_is_what_is_tested() -> None:
    """runtime.lock, of which the image is made: what the scripts need, in the tests' versions."""
    root = Path(runtime_image.sources())
    tested, shipped = (
        dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (root / name).read_text(), re.M))
        for name in ("requirements.lock", "runtime.lock")
    )
    assert {name: tested.get(name) for name in shipped} == shipped
    for script in ("router.py", "control.py", "janitor.py"):  # the others are imported by these
        header = (root / script).read_text().split("# ///")[1]
        names = re.findall(r'"([a-z0-9-]+)[><=]', header)
        assert names
        assert set(names) <= set(shipped)
    assert "--hash=sha256:" in (root / "runtime.lock").read_text()


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
