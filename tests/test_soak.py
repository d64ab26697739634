"""The short form of `invoke soak`."""

from __future__ import annotations

import random

from tests import soak


def test_the_router_gives_back_what_it_took() -> None:
    seed = random.randrange(1 << 32)
    played, before, after = soak.run(15, seed)
    assert not played.failures, f"seed {seed}: {played.failures.most_common(5)}"
    assert set(played.played) >= set(soak.SCENES) - soak.RARE
    assert soak.problems(before, after) == [], f"seed {seed}"
