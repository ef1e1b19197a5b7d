"""SQLite without blocking the event loop, and with few thread switches.

A general asynchronous driver crosses threads for every cursor, fetch and close: sixty times for the creation of one
sandbox. Here a statement with all its rows is one crossing, and a transaction's BEGIN rides on its first statement.

There is one writer: a thread with one connection, and a lock for whose transaction it is (SQLite allows no second
one). Readers have threads and connections of their own and see the last commit without waiting (WAL).
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Executable, create_engine, event
from sqlalchemy.engine import URL, CursorResult, Engine
from sqlalchemy.engine import Connection as SyncConnection
from sqlalchemy.pool import NullPool

from emberbox.store.connection import Rows

T = TypeVar("T")

_READERS = 2
_WAL = "PRAGMA journal_mode=WAL"
_WAL_SECONDS = 10.0
_PRAGMAS = (
    # With WAL a crash of the process loses nothing; a power cut may lose the last commits but never corrupts.
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
    # Another process (`emberbox key`) may be writing.
    "PRAGMA busy_timeout=10000",
    "PRAGMA cache_size=-2000",
    "PRAGMA temp_store=MEMORY",
)


class FetchedRows:
    """A result whose rows have been read."""

    __slots__ = ("_rows", "rowcount")

    def __init__(self, result: CursorResult[Any]) -> None:
        # With RETURNING the count is known only after the rows were read.
        self._rows = result.all() if result.returns_rows else []
        self.rowcount: int = result.rowcount

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def first(self) -> Any:
        return self._rows[0] if self._rows else None

    def one(self) -> Any:
        (row,) = self._rows
        return row

    def scalar(self) -> Any:
        return self._rows[0][0] if self._rows else None

    def scalar_one(self) -> Any:
        (row,) = self._rows
        return row[0]

    def scalars(self) -> Iterator[Any]:
        return (row[0] for row in self._rows)


class Sqlite:
    """One database file."""

    def __init__(self, url: URL) -> None:
        self._engine = _engine(url)
        self._local = threading.local()
        self._opened: list[SyncConnection] = []
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._read_threads = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._turn = asyncio.Lock()

    def reader(self) -> SqliteReader:
        return SqliteReader(self)

    def transaction(self) -> SqliteTransaction:
        return SqliteTransaction(self)

    async def write_one(self, statement: Executable, parameters: Any = None) -> Rows:
        """A transaction of one statement, in one crossing."""
        many = isinstance(parameters, list)

        def write(connection: SyncConnection) -> Rows:
            if not many:  # SQLite begins and commits it by itself.
                return FetchedRows(connection.execute(statement, parameters))
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                written = FetchedRows(connection.execute(statement, parameters))
                _commit(connection)
            except BaseException:
                _rollback(connection)
                raise
            return written

        async with self._turn:
            return await self.writing(write)

    async def close(self) -> None:
        async with self._turn:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._write_thread.shutdown()
        self._read_threads.shutdown()
        for connection in self._opened:
            connection.close()
        self._engine.dispose()

    async def take_turn(self) -> None:
        await self._turn.acquire()

    def end_turn(self) -> None:
        self._turn.release()

    async def writing(self, function: Callable[[SyncConnection], T]) -> T:
        return await self._in(self._write_thread, function)

    async def reading(self, function: Callable[[SyncConnection], T]) -> T:
        return await self._in(self._read_threads, function)

    async def _in(self, threads: ThreadPoolExecutor, function: Callable[[SyncConnection], T]) -> T:
        # What has begun in the thread is waited for, also when the caller is cancelled: it must not go on behind the
        # back of the next one.
        work = asyncio.get_running_loop().run_in_executor(threads, self._call, function)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    def _call(self, function: Callable[[SyncConnection], T]) -> T:
        connection: SyncConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._engine.connect()
            self._local.connection = connection
            self._opened.append(connection)
        return function(connection)


class SqliteReader:
    """Queries, each of which sees the last commit."""

    __slots__ = ("_database",)

    def __init__(self, database: Sqlite) -> None:
        self._database = database

    async def __aenter__(self) -> SqliteReader:
        return self

    async def __aexit__(self, *_error: object) -> None:
        return None

    async def execute(self, statement: Executable, parameters: Any = None) -> Rows:
        return await self._database.reading(lambda connection: FetchedRows(connection.execute(statement, parameters)))

    async def run_sync(self, function: Callable[[SyncConnection], T]) -> T:
        return await self._database.reading(function)


class SqliteTransaction:
    """One transaction: committed at the end, rolled back by an exception."""

    __slots__ = ("_begun", "_database")

    def __init__(self, database: Sqlite) -> None:
        self._database = database
        self._begun = False

    async def __aenter__(self) -> SqliteTransaction:
        await self._database.take_turn()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        try:
            if self._begun:
                await self._database.writing(_commit if kind is None else _rollback)
        finally:
            self._database.end_turn()

    async def execute(self, statement: Executable, parameters: Any = None) -> Rows:
        return await self._run(lambda connection: FetchedRows(connection.execute(statement, parameters)))

    async def run_sync(self, function: Callable[[SyncConnection], T]) -> T:
        return await self._run(function)

    async def _run(self, function: Callable[[SyncConnection], T]) -> T:
        if self._begun:
            return await self._database.writing(function)
        self._begun = True

        def begin_and_call(connection: SyncConnection) -> T:
            # At once a writer: a reader that becomes one later could be refused.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            return function(connection)

        return await self._database.writing(begin_and_call)


def _commit(connection: SyncConnection) -> None:
    connection.exec_driver_sql("COMMIT")


def _rollback(connection: SyncConnection) -> None:
    # SQLite has rolled back by itself after some errors; and BEGIN itself may have failed.
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:
        connection.exec_driver_sql("ROLLBACK")


def _engine(url: URL) -> Engine:
    engine = create_engine(
        url.set(drivername="sqlite"),
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        # A connection belongs to its thread while there is work; it is closed after the threads have ended.
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _on_connect(dbapi_connection: Any, _record: Any) -> None:
        # Transactions are begun and ended by our own statements.
        dbapi_connection.isolation_level = None
        _use_wal(dbapi_connection)
        for pragma in _PRAGMAS:
            dbapi_connection.execute(pragma)

    return engine


def _use_wal(dbapi_connection: Any) -> None:
    """Two processes that open a new file at once both switch it, and SQLite lets neither wait for the other then."""
    end = time.monotonic() + _WAL_SECONDS
    while True:
        try:
            dbapi_connection.execute(_WAL)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.01)
