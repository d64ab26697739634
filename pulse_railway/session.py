"""Sessions in Redis, so that they outlive the deployment that made them."""

from __future__ import annotations

import json
import os
from typing import Any, cast, override

import pulse as ps
import redis.asyncio
from pulse.serializer import Serialized, deserialize, serialize

from pulse_railway import contract

DEFAULT_PREFIX = "pulse:session"


class RailwaySessionStore(ps.SessionStore):
    """A Pulse session store on the stack's Redis; 0.3.x's keys and values.

    Args:
        url: the Redis to use. Where not given, `PULSE_RAILWAY_REDIS_URL`, which `deploy` sets on
            every backend whose app uses this store.
        prefix: what session keys start with.
        ttl: seconds that a session outlives its last use. Where not given, RailwayPlugin sets it
            to the lifetime of the app's session cookie, without which nobody can come back to it.
    """

    def __init__(
        self, url: str | None = None, *, prefix: str = DEFAULT_PREFIX, ttl: int | None = None
    ) -> None:
        self._url = url
        self.prefix = prefix.rstrip(":")
        self.ttl = ttl
        self._client: redis.asyncio.Redis | None = None

    @override
    def __repr__(self) -> str:
        return f"RailwaySessionStore(prefix={self.prefix!r})"  # the URL carries a password

    @property
    def client(self) -> redis.asyncio.Redis:
        """The connection pool, made at first use.

        Raises RuntimeError where no URL is known.
        """
        if self._client is None:
            url = self._url or os.environ.get(contract.SESSION_REDIS_URL)
            if not url:
                raise RuntimeError(
                    f"RailwaySessionStore needs url= or {contract.SESSION_REDIS_URL}"
                )
            self._client = redis.asyncio.Redis.from_url(
                url, decode_responses=True, health_check_interval=30
            )
        return self._client

    def _key(self, sid: str) -> str:
        return f"{self.prefix}:{sid}"

    @override
    async def init(self) -> None:
        _ = self.client  # a missing URL shows at start

    @override
    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    @override
    async def get(self, sid: str) -> dict[str, Any] | None:
        async with self.client.pipeline(transaction=False) as pipe:
            pipe.get(self._key(sid))
            if self.ttl:  # Pulse renews the cookie whenever it loads a session
                pipe.expire(self._key(sid), self.ttl)
            payload = (await pipe.execute())[0]
        if payload is None:
            return None
        return cast(dict[str, Any], deserialize(cast(Serialized, json.loads(payload))))

    @override
    async def create(self, sid: str) -> dict[str, Any]:
        await self.save(sid, {})
        return {}

    @override
    async def delete(self, sid: str) -> None:
        await self.client.delete(self._key(sid))

    @override
    async def save(self, sid: str, session: dict[str, Any]) -> None:
        payload = json.dumps(serialize(dict(session)), separators=(",", ":"))
        await self.client.set(self._key(sid), payload, ex=self.ttl)
