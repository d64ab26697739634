"""Two deployments in a Redis, for routers that a test starts; control commands change the state."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

from pulse_railway import runtime_image
from tests.conftest import Process, Redis
from tests.net import Backend, ask, eventually

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
PREFIX = "pulse:railway"
QUICK = {"refresh_seconds": 1.0, "missing_seconds": 1.0}


def redis_limited(seconds: float) -> Any:
    """router.store_from_env, whose stores wait so long for Redis."""
    return functools.partial(router.store_from_env, limits=router.Limits(redis_seconds=seconds))


class Site:
    """Two backends that answer with their names; `new` is active, `old` is draining."""

    def __init__(self, server: Redis, new: Backend, old: Backend) -> None:
        self.server, self.new, self.old = server, new, old
        self.store = router.RedisStore(server.url, PREFIX)
        self.control("register", "--deployment-id", "old", "--service-id", "s-old", backend=old)
        self.promote("old")
        self.control("register", "--deployment-id", "new", "--service-id", "s-new", backend=new)
        self.promote("new")

    def control(self, command: str, *words: str, backend: Backend | None = None) -> int:
        if backend:
            words = (*words, "--service-name", words[1], "--address", backend.address)
        return int(control.control([command, *words]))

    def promote(self, name: str, *words: str) -> int:
        service = ["--active-service-name", name]
        return self.control("promote", "--active-deployment-id", name, *service, *words)

    @property
    def state(self) -> dict[str, str]:
        """Return the values in Redis by key without its prefix; routers' reports are left out."""
        client = self.server.client
        keys = sorted(key for key in client.scan_iter(f"{PREFIX}:*") if ":router:" not in key)
        pairs = zip(keys, client.mget(keys) if keys else [], strict=True)
        return {key.removeprefix(PREFIX): str(value) for key, value in pairs if value is not None}

    @property
    def routing(self) -> Any:
        """Return the state without the fields that differ at each write."""
        return replace(self.store.read(), store_id=None, epoch=0, processed={})

    def record(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.state.get(f":deployment:{name}", "{}")))


def page(process: Process, affinity: str = "") -> tuple[int, bytes]:
    answer = ask(process.port, f"/?pulse_deployment={affinity}" if affinity else "/")
    return answer.status, answer.body


def up(process: Process) -> Process:
    eventually(lambda: ask(process.port, "/healthz").status == 200)
    return process
