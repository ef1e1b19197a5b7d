"""What was deleted and is still to be removed from its node."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import delete, select

from emberbox.store.connection import Connection
from emberbox.store.engine import Store
from emberbox.store.records import BuildRecord, Leftover, fields, values
from emberbox.store.tables import leftovers


async def note(store: Store, connection: Connection, builds: Iterable[BuildRecord]) -> list[Leftover]:
    """Write down those of `builds` that are on a node, within a transaction, and return them. One that is there already
    stays as it is."""
    noted = [
        Leftover(build.id, build.node_id, build.snapshot_id, list(build.layers)) for build in builds if build.node_id
    ]
    if noted:
        rows = [values(left) for left in noted]
        await connection.execute(store.insert(leftovers).values(rows).on_conflict_do_nothing())
    return noted


async def add(store: Store, build: BuildRecord) -> list[Leftover]:
    """Write down one of a build whose row stays, or is gone already; returns as `note`."""
    async with store.write() as connection:
        return await note(store, connection, [build])


async def of_node(store: Store, node_id: str) -> list[Leftover]:
    async with store.read() as connection:
        rows = await connection.execute(select(leftovers).where(leftovers.c.node_id == node_id))
        return [Leftover(**fields(row)) for row in rows]


async def removed(store: Store, build_id: str) -> None:
    """Forget one that its node has removed. Idempotent."""
    await store.write_one(delete(leftovers).where(leftovers.c.build_id == build_id))
