"""The figures that may not slip: CPU a request beside 0.3.13's, and memory. The rest is in
`make bench`."""

from __future__ import annotations

from pathlib import Path

from benchmarks import servers
from benchmarks.router import AFFINITY, http, websocket


def test_a_small_request_costs_a_third_of_what_it_did(tmp_path: Path) -> None:
    """Measured alternately in one run, since the machine is shared and noisy."""
    with servers.backend() as backend, servers.state(backend.port, tmp_path) as env:
        with servers.ours(env) as ours, servers.peer(env) as peer:
            for server in (ours, peer):
                http(server, "/", 1)
            ratios = []
            for path in ("/", AFFINITY):
                mine, _ = http(ours, path, 2)
                theirs, _ = http(peer, path, 2)
                ratios.append(mine / theirs)
            sockets = websocket(ours, 32, 2) / websocket(peer, 32, 2)
    assert max(ratios) < 1 / 3
    assert sockets < 3 / 4
