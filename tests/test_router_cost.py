"""The figures that may not slip: CPU a request beside 0.3.13's, and memory. The rest is in
`make bench`."""

from __future__ import annotations

from pathlib import Path

from benchmarks import servers
from benchmarks.router import AFFINITY, http, websocket


def test_a_small_request_costs_a_third_of_what_it_did(tmp_path: Path) -> None:
    """Measured alternately in one run, since the machine is shared and noisy; a second of each is
    enough for bounds that are a multiple of what it costs."""
    with servers.backend() as backend, servers.state(backend.port, tmp_path) as env:
        with servers.ours(env) as ours, servers.peer(env) as peer:
            ratios = []
            for path in ("/", AFFINITY):
                mine, _ = http(ours, path, 1)
                theirs, _ = http(peer, path, 1)
                ratios.append(mine / theirs)
            sockets = websocket(ours, 32, 1) / websocket(peer, 32, 1)
    assert max(ratios) < 1 / 3
    assert sockets < 3 / 4
