"""Sessions in Redis, shared by the deployments that are live at once.

Two versions of an app hold the same session in memory and save it whole. Written as it comes, a
login on the new one would be undone by an old tab on the other. So what is written is what this
process has changed since it read: each save is a difference, applied to what Redis holds in one
atomic step. When a page is opened, what the other one has written since is taken over (`refresh`).

Redis may be away. Sessions that this process knows are then served from memory, new ones live
there, and all that was not written is written when Redis is back, again as differences. Nothing
waits for it for longer than a moment, but for a visitor whose session Redis alone has: those wait
for a few seconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar, override

import pulse as ps
import redis
import redis.asyncio
from pulse.reactive_extensions import ReactiveDict
from pulse.serializer import deserialize, serialize
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pulse_railway import contract

DEFAULT_PREFIX = "pulse:session"
TIMEOUT = 1.0  # seconds, for one answer of Redis
PAUSE = 1.0  # seconds, between one attempt to reach it and the next
PATIENCE = 6.0  # seconds that a visitor whom only Redis knows waits for it, from when it went away
KNOWN = 20_000  # sessions that a process remembers; the one that was used longest ago goes first

log = logging.getLogger("pulse.railway")


class Shared(ReactiveDict[str, Any]):
    """A session's data, which Pulse holds as it is given.

    Pulse makes a session object for each of two requests that come at once, as when a browser
    reloads its tabs; without the same data in both, a page that was rendered with one would never
    show what is written to the other.
    """

    __slots__ = ("__weakref__",)


Fields = dict[str, str]  # a session: field to its value in Pulse's wire format
T = TypeVar("T")


class RailwaySessionStore(ps.SessionStore):
    """A Pulse session store on the stack's Redis; 0.3.x's keys and values.

    Args:
        url: the Redis to use. Where not given, `PULSE_RAILWAY_REDIS_URL`, which `deploy` sets on
            every backend whose app uses this store.
        env: where to look for that variable; the process's environment by default.
        client: a redis.asyncio.Redis of the app's own, with `decode_responses`; it is closed with
            the store only if `owns_client`.
        prefix: what session keys start with. In a copy of an environment that shares its Redis with
            the original, `deploy` sets PULSE_RAILWAY_SESSION_SCOPE, which follows it.
        ttl: seconds that a session outlives its last use. Where not given, RailwayPlugin sets it
            to the lifetime of the app's session cookie, without which nobody can come back to it.
            In such a copy it is at most PULSE_RAILWAY_KEY_TTL_SECONDS.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        client: redis.asyncio.Redis | None = None,
        owns_client: bool = False,
        prefix: str = DEFAULT_PREFIX,
        ttl: int | None = None,
    ) -> None:
        self._url, self._env = url, env
        self._client, self._owns_client = client, owns_client or client is None
        given = os.environ if env is None else env
        scope, longest = given.get(contract.SESSION_SCOPE), given.get(contract.KEY_TTL) or ""
        self.prefix = prefix.rstrip(":") + (f":{scope}" if scope else "")
        self.longest = int(longest) if scope and longest.isdecimal() else None  # seconds
        self.ttl = ttl
        self._known: OrderedDict[str, Fields] = OrderedDict()  # as Redis has it, or will have
        self._held: weakref.WeakValueDictionary[str, Shared] = weakref.WeakValueDictionary()
        self._unwritten: OrderedDict[str, Fields | None] = OrderedDict()  # None: to be deleted
        self._away_until = self._away_since = 0.0
        self._writer: asyncio.Task[None] | None = None

    @classmethod
    def from_url(cls, url: str, *, prefix: str = DEFAULT_PREFIX) -> RailwaySessionStore:
        return cls(url, prefix=prefix)

    @override
    def __repr__(self) -> str:
        return f"RailwaySessionStore(prefix={self.prefix!r})"  # the URL carries a password

    @property
    def client(self) -> redis.asyncio.Redis:
        """The connection pool, made at first use.

        Raises RuntimeError where no URL is known.
        """
        if self._client is None:
            env = os.environ if self._env is None else self._env
            url = self._url or env.get(contract.SESSION_REDIS_URL)
            if not url:
                raise RuntimeError(
                    f"RailwaySessionStore needs url= or {contract.SESSION_REDIS_URL}"
                )
            self._client = redis.asyncio.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                # a connection that a restart of Redis has closed is made anew, once
                retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
            )
        return self._client

    @property
    def _ends(self) -> int | None:
        """In how many seconds a key ends."""
        return min(filter(None, (self.ttl, self.longest)), default=None)

    def _key(self, sid: str) -> str:
        return f"{self.prefix}:{sid}"

    # -- Pulse's side --------------------------------------------------------------------------

    @override
    async def init(self) -> None:
        _ = self.client  # a missing URL shows at start

    @override
    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer:
            writer.cancel()
        if self._unwritten:
            self._away_until = 0.0
            await self._ask(self._write_all)
        if self._client is not None and self._owns_client:
            client, self._client = self._client, None
            await client.aclose()

    @override
    async def get(self, sid: str) -> dict[str, Any] | None:
        held = self._held.get(sid)
        if held is not None:
            await self.refresh(sid, held)
            return held
        if sid in self._unwritten:
            fields = self._unwritten[sid]
        else:
            reached, fields = await self._ask(lambda: self._read(sid))
            if not reached and sid not in self._known:
                reached, fields = await self._wait_for(sid)
            if not reached:
                fields = self._known.get(sid)
            elif fields is None:
                self._known.pop(sid, None)
            else:
                self._remember(sid, fields)
        return self._share(sid, session_of(fields)) if fields is not None else None

    def _share(self, sid: str, session: dict[str, Any]) -> Shared:
        """What is held of this session already, or else this one from now on."""
        return self._held.setdefault(sid, Shared(session))

    async def _wait_for(self, sid: str) -> tuple[bool, Fields | None]:
        """Somebody's session that this process has never held, while Redis is away: an empty one
        in its place would log them out, and be written over theirs later."""
        while time.monotonic() < self._away_since + PATIENCE:
            await asyncio.sleep(PAUSE / 4)
            reached, fields = await self._ask(lambda: self._read(sid))
            if reached:
                return reached, fields
        return False, None

    async def refresh(self, sid: str, session: MutableMapping[str, Any]) -> None:
        """Take over what others have changed in a session that this process holds in memory.

        Pulse holds it for as long as a tab is open and a minute longer, and reads it once. Who
        comes back within that minute, after a rollback for example, would see it as it was, and
        set the others' values back. What was changed here and is not written yet stays.
        """
        if sid in self._unwritten:
            return
        reached, held = await self._ask(lambda: self._read(sid))
        if not reached or held is None:
            return
        base, mine = self._known.get(sid, {}), fields_of(ps.unwrap(session))
        for name in base.keys() | held.keys():
            theirs = held.get(name)
            if theirs == base.get(name) or mine.get(name) != base.get(name):
                continue
            if theirs is None:
                session.pop(name, None)
            else:
                session[name] = deserialize(json.loads(theirs))
        self._remember(sid, held)

    @override
    async def create(self, sid: str) -> dict[str, Any]:
        """An empty session. One that another process has made meanwhile is left alone."""
        session = self._share(sid, {})
        if not session:
            await self.save(sid, {})
        return session

    @override
    async def save(self, sid: str, session: dict[str, Any]) -> None:
        held = self._held.get(sid)
        if held is not None and ps.unwrap(held) != session:  # it is not what Pulse holds
            del self._held[sid]
        fields = fields_of(session)
        if sid in self._unwritten:  # what it is compared with stays what Redis had
            self._put_aside(sid, fields)
            return
        reached, _ = await self._ask(lambda: self._write(sid, fields))
        if not reached:
            self._put_aside(sid, fields)

    @override
    async def delete(self, sid: str) -> None:
        self._known.pop(sid, None)
        self._held.pop(sid, None)
        self._unwritten.pop(sid, None)
        reached, _ = await self._ask(lambda: self.client.delete(self._key(sid)))
        if not reached:
            self._put_aside(sid, None)

    # -- Redis's side --------------------------------------------------------------------------

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> tuple[bool, T | None]:
        """Whether Redis was reached, and what it said. One that was away a moment ago is not
        asked: a page is not to wait for it."""
        if time.monotonic() < self._away_until:
            return False, None
        try:
            answer = await question()
            if self._away_until:
                self._away_until = 0.0
                log.warning("sessions: Redis is back")
            return True, answer
        except (redis.RedisError, OSError, TimeoutError) as error:
            if not self._away_until:
                self._away_since = time.monotonic()
                # The class only: the message of a Redis error can carry its URL.
                log.warning(
                    "sessions: Redis is away (%s); they are kept in memory", type(error).__name__
                )
            self._away_until = time.monotonic() + PAUSE
            return False, None

    async def _read(self, sid: str) -> Fields | None:
        async with self.client.pipeline(transaction=False) as pipe:
            pipe.get(self._key(sid))
            if self._ends:  # Pulse renews the cookie whenever it loads a session
                pipe.expire(self._key(sid), self._ends)
            payload = (await pipe.execute())[0]
        return decode(payload, sid)

    async def _write(self, sid: str, fields: Fields) -> None:
        """Apply what has changed since `sid` was read to what Redis holds."""
        base = self._known.get(sid, {})
        changed = {name: value for name, value in fields.items() if base.get(name) != value}
        gone = base.keys() - fields.keys()
        key = self._key(sid)
        async with self.client.pipeline() as pipe:
            while True:
                await pipe.watch(key)
                held = await pipe.get(key)
                before = decode(str(held) if held is not None else None, sid)
                after = {**(before or {}), **changed}
                after = {name: value for name, value in after.items() if name not in gone}
                pipe.multi()  # type: ignore[no-untyped-call]
                if after != (before or {}):  # an empty one need not be there: bots leave nothing
                    pipe.set(key, encode(after), ex=self._ends)
                elif self._ends:
                    pipe.expire(key, self._ends)
                try:
                    await pipe.execute()
                    break
                except redis.WatchError:
                    continue  # another process has saved it in between
        self._remember(sid, fields)

    def _remember(self, sid: str, fields: Fields) -> None:
        self._known[sid] = fields
        self._known.move_to_end(sid)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)

    # -- while Redis is away -------------------------------------------------------------------

    def _put_aside(self, sid: str, fields: Fields | None) -> None:
        """Keep what could not be written, within a bound, until Redis is back."""
        self._unwritten[sid] = fields
        self._unwritten.move_to_end(sid)
        if len(self._unwritten) > KNOWN:
            self._unwritten.popitem(last=False)
            log.warning("sessions: Redis is away for too long, the oldest one was not written")
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._keep_writing())

    async def _keep_writing(self) -> None:
        while self._unwritten:
            await asyncio.sleep(PAUSE)
            await self._ask(self._write_all)

    async def _write_all(self) -> None:
        while self._unwritten:
            sid, fields = next(iter(self._unwritten.items()))
            if fields is None:
                await self.client.delete(self._key(sid))
            else:
                await self._write(sid, fields)
            if self._unwritten.get(sid) is fields:  # and was not saved again meanwhile
                del self._unwritten[sid]


RailwayRedisSessionStore = RailwaySessionStore  # its older name


def fields_of(session: Mapping[str, Any]) -> Fields:
    """A session field by field, so that two of them can be compared."""
    return {
        str(name): json.dumps(serialize(value), separators=(",", ":"))
        for name, value in dict(session).items()
    }


def session_of(fields: Fields) -> dict[str, Any]:
    return {name: deserialize(json.loads(value)) for name, value in fields.items()}


def encode(fields: Fields) -> str:
    """A session as Redis holds it, as 0.3.x does."""
    return json.dumps(serialize(session_of(fields)), separators=(",", ":"))


def decode(payload: str | None, sid: str) -> Fields | None:
    """What Redis holds of a session. One that this version of Pulse cannot read is a new one, and
    a line in the log: another wire format beside this one is no error on every request."""
    if payload is None:
        return None
    try:
        session = deserialize(json.loads(payload))
        if not isinstance(session, dict):
            raise TypeError(type(session).__name__)
        return fields_of(session)
    except Exception as error:  # whatever Pulse's deserializer makes of it
        log.warning("sessions: %s… cannot be read (%s): a new one", sid[:8], type(error).__name__)
        return None
