"""router.py as its image has it: with the newest libraries that its script metadata allows.

The other tests run it with the locked ones, where pulse-framework holds Starlette back.
"""

from __future__ import annotations

import re
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

WANTED = re.findall(r'^#   "(.+)",$', (ROOT / "router.py").read_text(), re.M)


@pytest.fixture
def router_python() -> Path:
    return environment.python("newest", *WANTED)


def test_starlette_is_newer_than_the_one_pulse_pins(router_python: Path) -> None:
    ask = "import importlib.metadata as m; print(m.version('starlette'))"
    said = subprocess.run([router_python, "-c", ask], capture_output=True, text=True, check=True)
    assert int(said.stdout.split(".")[0]) >= 1
