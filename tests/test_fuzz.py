"""The short form of `invoke fuzz`."""

from __future__ import annotations

import random

from tests import fuzz


def test_no_client_gets_anothers_answer() -> None:
    seed = random.randrange(1 << 32)
    played = fuzz.run(5, seed)
    assert not played.failures, f"seed {seed}: {played.failures[:3]}"
    assert min(played.sent["well-formed"], played.sent["mutated"]) > 50
    assert {"200", "400"} <= played.statuses.keys()
