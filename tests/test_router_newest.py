"""router.py as its image has it: with the libraries of runtime.lock.

The other tests run it with those of requirements.lock, where pulse-framework holds Starlette back.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import environment
from tests.conftest import ROOT
from tests.test_router_http import (  # noqa: F401
    routed,
    test_answers_are_the_same_as_without_a_router,
    test_bodies_of_every_framing,
    test_expect_100_continue,
    test_interim_answers_reach_the_client,
)
from tests.test_router_table import (  # noqa: F401
    test_health_is_503_until_the_first_load,
    test_known_affinity_gets_that_deployment_whatever_its_state,
    test_no_affinity_gets_the_active_deployment,
    test_unknown_affinity_is_stale,
    two,
)
from tests.test_tunnel import echo, test_messages_of_every_size  # noqa: F401


@pytest.fixture
def router_python() -> Path:
    return environment.runtime()


def test_the_router_here_runs_on_the_starlette_of_the_image(router_python: Path) -> None:
    ask = "import importlib.metadata as m; print(m.version('starlette'))"
    said = subprocess.run([router_python, "-c", ask], capture_output=True, text=True, check=True)
    assert f"starlette=={said.stdout.strip()} " in (ROOT / "runtime.lock").read_text()
