#!/usr/bin/env python3
"""The routing state in a SQLite file, for runs without Redis (PULSE_KV_KIND=sqlite).

The router loads this module only for such a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time

import router


class SqliteStore:
    """Has the methods of router.RedisStore, on the file at `path`."""

    def __init__(self, path: str, prefix: str) -> None:
        self.prefix = prefix
        # other threads use the connection too: a router repairs the state in one
        self.db = sqlite3.connect(path, isolation_level=None, timeout=5, check_same_thread=False)
        # 0.3.x's table, so that either version reads the other's file
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS pulse_kv"
            " (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires_at REAL)"
        )

    def read(self) -> router.Routing:
        """Return the state."""
        rows = self.db.execute(
            "SELECT key, value FROM pulse_kv"
            " WHERE substr(key, 1, ?) = ? AND (expires_at IS NULL OR expires_at > ?)",
            (len(self.prefix) + 1, self.prefix + ":", time.time()),
        )
        state = {key.removeprefix(self.prefix): value for key, value in rows}
        return router.parse(state, time.time())

    def apply(self, step: router.Step) -> router.Routing:
        """Carry out a step in a transaction, as RedisStore does, and return the new state."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            before = self.read()
            after = step(before)
            change = router.changes(before, after)
            for key, value in change.items():
                self.db.execute("DELETE FROM pulse_kv WHERE key = ?", (self.prefix + key,))
                if value is not None:
                    row = self.prefix + key, value
                    self.db.execute("INSERT INTO pulse_kv (key, value) VALUES (?, ?)", row)
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")
        return router.written(after, change)

    def announce(self) -> None:
        """Do nothing, since `follow` polls."""

    def disconnect(self) -> None:
        """Do nothing, since a file has no connection pool."""

    async def follow(self, table: router.Table) -> None:
        """Keep the table up to date by reading the file every 50 ms. Raises OSError."""
        while True:
            table.refresh_event.clear()
            try:
                routing = self.read()
                if await table.repair(self, routing):
                    routing = self.read()
            except sqlite3.Error as error:
                raise OSError(str(error)) from None
            table.load(routing)
            table.pending_lookups.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(table.refresh_event.wait(), 0.05)
