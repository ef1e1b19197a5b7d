"""Connections and transactions: `Store.read()` for queries, `Store.write()` for one transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Executable, Table
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import make_url

from emberbox.store.connection import Connection, Rows
from emberbox.store.errors import StoreMisconfigured
from emberbox.store.sqlite import Sqlite

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


class Store:
    """The database. Open it with the store URL, close it with `close()`."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            StoreMisconfigured: the URL is neither SQLite nor PostgreSQL.
        """
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        self.is_sqlite = backend == "sqlite"
        self._postgresql: AsyncEngine | None = None
        if self.is_sqlite:
            self._sqlite = Sqlite(parsed)
        elif backend == "postgresql":
            # Several megabytes that an installation on SQLite does without.
            from sqlalchemy.ext.asyncio import create_async_engine

            self._postgresql = create_async_engine(
                parsed.set(drivername="postgresql+asyncpg"),
                pool_size=8,
                max_overflow=8,
                pool_pre_ping=True,
                pool_timeout=10,
            )
            self._reading = self._postgresql.execution_options(isolation_level="AUTOCOMMIT")
        else:
            raise StoreMisconfigured(
                f"database URL starts with {backend!r}; use sqlite:///path or postgresql://user@host/name"
            )

    def read(self) -> AbstractAsyncContextManager[Connection]:
        """A connection for queries, each of which sees the last commit."""
        if self._postgresql is None:
            return self._sqlite.reader()
        return self._read_postgresql()

    def write(self) -> AbstractAsyncContextManager[Connection]:
        """One transaction: committed at the end, rolled back by an exception."""
        if self._postgresql is None:
            return self._sqlite.transaction()
        return self._write_postgresql()

    async def write_one(self, statement: Executable, parameters: Any = None) -> Rows:
        """A transaction of one statement."""
        if self._postgresql is None:
            return await self._sqlite.write_one(statement, parameters)
        async with self._write_postgresql() as connection:
            return await connection.execute(statement, parameters)

    def insert(self, table: Table) -> Any:
        """An insert that knows ON CONFLICT, which SQLAlchemy has for each database apart."""
        if self.is_sqlite:
            return sqlite.insert(table)
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)

    async def close(self) -> None:
        if self._postgresql is None:
            await self._sqlite.close()
        else:
            await self._postgresql.dispose()

    @asynccontextmanager
    async def _read_postgresql(self) -> AsyncIterator[Connection]:
        async with self._reading.connect() as connection:
            yield cast(Connection, connection)

    @asynccontextmanager
    async def _write_postgresql(self) -> AsyncIterator[Connection]:
        assert self._postgresql is not None
        async with self._postgresql.begin() as connection:
            yield cast(Connection, connection)
