"""Connections and transactions: `Store.read()` for queries, `Store.write()` for one transaction.

SQLite has one writer at a time, so writers wait for their turn in one place (a pool of one connection, `BEGIN
IMMEDIATE`) and never meet SQLITE_BUSY halfway. Readers see the last commit and never wait (WAL).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from emberbox.store.errors import StoreMisconfigured

_SQLITE_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    # With WAL a crash of the process loses nothing; a power cut may lose the last commits but never corrupts.
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=10000",
    "PRAGMA cache_size=-4000",
    "PRAGMA temp_store=MEMORY",
)


class Store:
    """The database. Open it with the store URL, close it with `close()`."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            StoreMisconfigured: the URL is neither SQLite nor PostgreSQL.
        """
        backend = make_url(url).get_backend_name()
        self.is_sqlite = backend == "sqlite"
        if self.is_sqlite:
            self._writer = _sqlite_engine(url, connections=1, begin="BEGIN IMMEDIATE")
            self._reader = _sqlite_engine(url, connections=3, begin=None)
        elif backend == "postgresql":
            self._writer = create_async_engine(url, pool_size=8, max_overflow=8, pool_pre_ping=True, pool_timeout=10)
            self._reader = self._writer.execution_options(isolation_level="AUTOCOMMIT")
        else:
            raise StoreMisconfigured(
                f"database URL starts with {backend!r}; use sqlite+aiosqlite:///path or postgresql+asyncpg://..."
            )

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for queries, each of which sees the last commit."""
        async with self._reader.connect() as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed at the end, rolled back by an exception."""
        async with self._writer.begin() as connection:
            yield connection

    @property
    def engine(self) -> AsyncEngine:
        """The writing engine, for migrations."""
        return self._writer

    async def close(self) -> None:
        await self._writer.dispose()
        if self.is_sqlite:
            await self._reader.dispose()


def _sqlite_engine(url: str, *, connections: int, begin: str | None) -> AsyncEngine:
    options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"} if begin is None else {}
    engine = create_async_engine(url, pool_size=connections, max_overflow=0, pool_timeout=30, **options)

    @event.listens_for(engine.sync_engine, "connect")
    def _on_connect(dbapi_connection: Any, _record: Any) -> None:
        # The driver's own idea of when to BEGIN is switched off; `_on_begin` says it.
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        for pragma in _SQLITE_PRAGMAS:
            cursor.execute(pragma)
        cursor.close()

    if begin is not None:

        @event.listens_for(engine.sync_engine, "begin")
        def _on_begin(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

    return engine
