"""Sessions in Redis, shared by the deployments that are live at once.

Two versions of an app hold the same session in memory and save it whole. Written as it comes, a
login on the new one would be undone by an old tab on the other. So what is written is what this
process has changed since it read: each save is a difference, applied to what Redis holds in one
atomic step. When a page is opened, what the other one has written since is taken over (`refresh`).

A delete leaves a tombstone beside the session's key, whose value is new each time. Whoever read the
session before that writes nothing to it any more. A key that is missing without one was lost by
Redis, and is written back.

Pulse cancels a save that is under way when the next one begins, and Redis may carry it out all the
same. So a save is a task of its own, one at a time for a session, which Pulse does not cancel.

Redis may be away. Sessions that this process knows are then served from memory, new ones live
there, and all that was not written is written when Redis is back, again as differences. A request
waits for Redis for at most a second, and where only Redis knows the session for a few seconds.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import secrets
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, override

import pulse as ps
import redis
import redis.asyncio
from pulse.reactive_extensions import ReactiveDict
from pulse.serializer import deserialize
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pulse_railway import contract
from pulse_railway.app import session_format

DEFAULT_PREFIX = "pulse:session"
TIMEOUT = 1.0  # seconds, for one answer of Redis
PAUSE = 1.0  # seconds, between one attempt to reach it and the next
UNKNOWN_TIMEOUT = 6.0  # seconds from when Redis went away that a session only it has is waited for
REMEMBERED = 20_000  # sessions in memory that no tab needs; the least recently used goes first
REMEMBERED_BYTES = 64 << 20  # the same, of their stored text
TOMBSTONE_TTL = 3600  # seconds, where a session's own life is not known

log = logging.getLogger("pulse.railway")


Fields = dict[str, str]  # a session: field to its value, as session_format has it


@dataclass(frozen=True, slots=True)
class Stored:
    """What Redis holds of a session, as far as this process knows."""

    fields: Fields | None = None  # None: nothing
    tombstone: str | None = None  # of the last delete


class Shared(ReactiveDict[str, Any]):
    """A session's data, which Pulse holds as it is given, and what it was read as.

    Pulse makes a session object for each of two requests that come at once, as when a browser
    reloads its tabs; without the same data in both, a page that was rendered with one would never
    show what is written to the other.
    """

    __slots__ = ("__weakref__", "base")

    def __init__(self, session: dict[str, Any], base: Stored) -> None:
        super().__init__(session)
        self.base = base


class Remembered[V: Fields | Stored | None](OrderedDict[str, V]):
    """By session id, within REMEMBERED and REMEMBERED_BYTES: the oldest goes first."""

    size = 0  # bytes

    @override
    def __setitem__(self, sid: str, value: V) -> None:
        self.pop(sid, None)
        super().__setitem__(sid, value)
        self.size += size_of(value)

    @override
    def __delitem__(self, sid: str) -> None:
        self.size -= size_of(self[sid])
        super().__delitem__(sid)

    @override
    def pop(self, sid: str, default: Any = None) -> Any:
        if sid not in self:
            return default
        value = self[sid]
        del self[sid]
        return value

    def shrink(self) -> bool:
        """Drop what is too much, but never the newest. Says whether there was anything."""
        before = len(self)
        while len(self) > 1 and (len(self) > REMEMBERED or self.size > REMEMBERED_BYTES):
            del self[next(iter(self))]
        return len(self) < before


def size_of(value: Fields | Stored | None) -> int:
    fields = value.fields if isinstance(value, Stored) else value
    return sum(len(name) + len(text) for name, text in (fields or {}).items())


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
        self._known: Remembered[Stored] = Remembered()  # served while Redis is away
        self._held: weakref.WeakValueDictionary[str, Shared] = weakref.WeakValueDictionary()
        self._unwritten: Remembered[Fields | None] = Remembered()  # None: to be deleted
        self._writing: dict[str, asyncio.Task[None]] = {}
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
            try:
                self._client = redis.asyncio.Redis.from_url(
                    url,
                    decode_responses=True,
                    socket_timeout=TIMEOUT,
                    socket_connect_timeout=TIMEOUT,
                    # a connection that a restart of Redis has closed is made anew, once
                    retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
                )
            except ValueError:  # whose message has a part of the password
                raise RuntimeError(
                    "RailwaySessionStore's Redis address is wrong: it must be"
                    " redis://[user:password@]host[:port][/number], and special characters of the"
                    " password percent-encoded"
                ) from None
        return self._client

    @property
    def _ends(self) -> int | None:
        """In how many seconds a key ends."""
        return min(filter(None, (self.ttl, self.longest)), default=None)

    def _keys(self, sid: str) -> tuple[str, str]:
        """Of a session, and of its tombstone."""
        return f"{self.prefix}:{sid}", f"{self.prefix}:{sid}:deleted"

    # -- Pulse's side --------------------------------------------------------------------------

    @override
    async def init(self) -> None:
        _ = self.client  # a missing URL shows at start

    @override
    async def close(self) -> None:
        await asyncio.gather(*self._writing.values())
        self._away_until = 0.0
        await self._write_all()
        if self._writer:
            self._writer.cancel()
        if self._client is not None and self._owns_client:
            client, self._client = self._client, None
            await client.aclose()

    @override
    async def get(self, sid: str) -> dict[str, Any] | None:
        held = self._held.get(sid)
        if held is not None:
            await self.refresh(sid, held)
            return held or None
        if sid in self._unwritten:
            fields = self._unwritten[sid]
            return None if fields is None else self._share(sid, fields)
        found = await self._ask(lambda: self._read(sid))
        if found is None and sid not in self._known:
            found = await self._wait_for(sid)
        if found is None:
            found = self._known.get(sid, Stored())
        else:
            self._remember(sid, found)
        return None if found.fields is None else self._share(sid, found.fields)

    def _share(self, sid: str, fields: Fields) -> Shared:
        """What is held of this session already, or else this one from now on."""
        held = self._held.get(sid)
        if held is None:
            base = self._known.get(sid, Stored())
            self._held[sid] = held = Shared(session_of(fields), base)
        return held

    async def _wait_for(self, sid: str) -> Stored | None:
        """Somebody's session that this process has never held, while Redis is away: an empty one
        in its place would log them out, and be written over theirs later."""
        while time.monotonic() < self._away_since + UNKNOWN_TIMEOUT:
            await asyncio.sleep(PAUSE / 4)
            if found := await self._ask(lambda: self._read(sid)):
                return found
        return None

    async def refresh(self, sid: str, session: MutableMapping[str, Any]) -> None:
        """Take over what others have changed in a session that this process holds in memory.

        Pulse holds it for as long as a tab is open and a minute longer, and reads it once. Who
        comes back within that minute, after a rollback for example, would see it as it was, and
        set the others' values back. What was changed here and is not written yet stays. A session
        that was deleted since is empty.
        """
        found = None if sid in self._unwritten else await self._ask(lambda: self._read(sid))
        if found is None or sid in self._writing:  # or saved meanwhile
            return
        base = self._base(sid)
        was_deleted = found.tombstone not in (None, base.tombstone)
        if found.fields is None and found.tombstone is None:  # Redis has lost it
            return
        before, mine = base.fields or {}, fields_of(ps.unwrap(session))
        theirs = found.fields or {}
        for name in before.keys() | theirs.keys() | (mine.keys() if was_deleted else set()):
            changed_here = mine.get(name) != before.get(name) and not was_deleted
            if theirs.get(name) == mine.get(name) or changed_here:
                continue
            if name in theirs:
                session[name] = value_of(theirs[name])
            else:
                session.pop(name, None)
        self._remember(sid, found)

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
            self._known[sid] = held.base
        if session or self._unwritten.get(sid, {}) is not None:  # else the delete comes first
            self._unwritten[sid] = fields_of(session)
        await self._write_out(sid)

    @override
    async def delete(self, sid: str) -> None:
        self._unwritten[sid] = None
        await self._write_out(sid)

    # -- Redis's side --------------------------------------------------------------------------

    async def _ask[T](self, question: Callable[[], Awaitable[T]]) -> T | None:
        """What Redis says; None where it was not reached. One that was away a moment ago is not
        asked: a page is not to wait for it."""
        if time.monotonic() < self._away_until:
            return None
        try:
            answer = await question()
            if self._away_until:
                self._away_until = 0.0
                log.warning("sessions: Redis is back")
            return answer
        except (redis.RedisError, OSError, TimeoutError) as error:
            if not self._away_until:
                self._away_since = time.monotonic()
                # The class only: the message of a Redis error can carry its URL.
                log.warning(
                    "sessions: Redis is away (%s); they are kept in memory", type(error).__name__
                )
            self._away_until = time.monotonic() + PAUSE
            return None

    async def _read(self, sid: str) -> Stored:
        key, tombstone = self._keys(sid)
        async with self.client.pipeline(transaction=False) as pipe:
            pipe.mget(key, tombstone)
            if self._ends:  # Pulse renews the cookie whenever it loads a session
                pipe.expire(key, self._ends)
            (payload, deleted), *_ = await pipe.execute()
        return Stored(decode(payload, sid), deleted)

    def _base(self, sid: str) -> Stored:
        """What a session was read as, or written as last."""
        held = self._held.get(sid)
        return held.base if held is not None else self._known.get(sid, Stored())

    async def _write(self, sid: str, fields: Fields | None) -> bool:
        """Apply what has changed since `sid` was read to what Redis holds, or delete it (None)."""
        base, (key, grave) = self._base(sid), self._keys(sid)
        before = base.fields or {}
        async with self.client.pipeline() as pipe:
            while True:
                await pipe.watch(key, grave)
                payload, deleted = await pipe.mget(key, grave)
                there = decode(None if payload is None else str(payload), sid)
                pipe.multi()  # type: ignore[no-untyped-call]
                if fields is None:
                    found = Stored(None, secrets.token_hex(8))
                    pipe.delete(key)
                    pipe.set(grave, str(found.tombstone), ex=self._ends or TOMBSTONE_TTL)
                elif deleted not in (None, base.tombstone):
                    self._known.pop(sid)
                    return True  # deleted since it was read, by another process
                else:
                    lost = there is None and deleted is None
                    found = Stored(fields if lost else merged(before, fields, there or {}), deleted)
                    if found.fields != (there or {}):  # an empty one need not be there: bots
                        pipe.set(key, encode(found.fields or {}), ex=self._ends)
                    elif self._ends:
                        pipe.expire(key, self._ends)
                try:
                    await pipe.execute()
                    break
                except redis.WatchError:
                    continue  # another process has saved it in between
        if fields is None and (held := self._held.get(sid)) is not None:
            fields = fields_of(ps.unwrap(held))  # Pulse may go on with it: that is no change
        self._remember(sid, Stored(fields, found.tombstone))
        return True

    def _remember(self, sid: str, found: Stored) -> None:
        if (held := self._held.get(sid)) is not None:
            held.base = found
        self._known[sid] = found
        self._known.shrink()

    # -- writing, now or when Redis is back ----------------------------------------------------

    async def _write_out(self, sid: str) -> None:
        """Write what is not written of a session; where Redis is away, when it is back."""
        task = self._writing.get(sid)
        if task is None:
            task = self._writing[sid] = asyncio.create_task(self._write_newest(sid))
            task.add_done_callback(lambda _: self._writing.pop(sid))
        await asyncio.shield(task)

    async def _write_newest(self, sid: str) -> None:
        while sid in self._unwritten:
            fields = self._unwritten[sid]
            if not await self._ask(functools.partial(self._write, sid, fields)):
                self._keep_for_later()
                return
            if sid in self._unwritten and self._unwritten[sid] is fields:  # not saved meanwhile
                del self._unwritten[sid]

    def _keep_for_later(self) -> None:
        if self._unwritten.shrink():
            log.warning("sessions: Redis is away for too long, the oldest one was not written")
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._keep_writing())

    async def _keep_writing(self) -> None:
        while self._unwritten:
            await asyncio.sleep(PAUSE)
            await self._write_all()

    async def _write_all(self) -> None:
        for sid in list(self._unwritten):
            if time.monotonic() >= self._away_until:
                await self._write_out(sid)


RailwayRedisSessionStore = RailwaySessionStore  # its older name


def merged(before: Fields, mine: Fields, theirs: Fields) -> Fields:
    """`theirs` with what was changed from `before` to `mine`."""
    changed = {name: value for name, value in mine.items() if before.get(name) != value}
    gone = before.keys() - mine.keys()
    return {name: value for name, value in {**theirs, **changed}.items() if name not in gone}


def fields_of(session: Mapping[str, Any]) -> Fields:
    """A session field by field, so that two of them can be compared."""
    return {
        str(name): json.dumps(session_format.dump(value), separators=(",", ":"))
        for name, value in dict(session).items()
    }


def value_of(text: str) -> Any:
    return session_format.decode(json.loads(text))


def session_of(fields: Fields) -> dict[str, Any]:
    return {name: value_of(text) for name, text in fields.items()}


def encode(fields: Fields) -> str:
    """A session as Redis holds it."""
    return json.dumps(session_format.dump(session_of(fields)), separators=(",", ":"))


def decode(payload: str | None, sid: str) -> Fields | None:
    """What Redis holds of a session: in our format, or in that of this process's Pulse, which
    pulse-railway 0.3.x writes. One that neither can read is a new one, and a line in the log."""
    if payload is None:
        return None
    try:
        found = json.loads(payload)
        try:
            session = session_format.decode(found)
        except ValueError:
            session = deserialize(found)
        if not isinstance(session, dict):
            raise TypeError(type(session).__name__)
        return fields_of(session)
    except Exception as error:  # whatever Pulse's deserializer makes of it
        log.warning("sessions: %s… cannot be read (%s): a new one", sid[:8], type(error).__name__)
        return None
