"""The short form of `invoke chaos`."""

from __future__ import annotations

import random

import pytest

from tests import chaos


@pytest.mark.timeout(400)
def test_nobody_notices() -> None:
    result = chaos.run(45, random.randrange(1 << 32), clients=60, tabs=4)
    assert result.problems() == [], result.table()
    assert result.world.count["requests"] > 500
    assert result.world.count["sockets"] > 20
