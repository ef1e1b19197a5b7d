"""Bringing a database to the current schema. Alembic is imported only when there is something to do."""

from __future__ import annotations

from sqlalchemy import inspect, text
from sqlalchemy.engine import Connection

from emberbox.store.engine import Store

HEAD = "0004"
"""The newest revision in `migrations/versions`; a test holds the two together."""

_LOCK = 0x656D6265
"""Advisory lock: one process migrates a PostgreSQL database at a time."""


async def revision(store: Store) -> str | None:
    """The database's schema revision; None for an empty database."""
    async with store.read() as connection:
        return await connection.run_sync(_revision)


async def migrate(store: Store) -> bool:
    """Bring the database to `HEAD`. Returns whether anything was done; doing it twice is harmless."""
    if await revision(store) == HEAD:
        return False
    # Takes a while, in which another process that migrates need not wait for the lock.
    from alembic.command import upgrade
    from alembic.config import Config

    def to_head(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "emberbox.store:migrations")
        config.attributes["connection"] = connection
        upgrade(config, "head")

    async with store.write() as connection:
        if not store.is_sqlite:
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        await connection.run_sync(to_head)
    return True


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
