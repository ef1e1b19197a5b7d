"""What was deleted and is still to be removed from its node."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import delete, select

from emberbox.store.connection import Connection
from emberbox.store.engine import Store
from emberbox.store.records import BuildRecord, Leftover, fields, values
from emberbox.store.tables import leftovers


async def note(store: Store, connection: Connection, builds: Iterable[BuildRecord]) -> None:
    """Write down those of `builds` that are on a node, within a transaction. One that is there already stays."""
    rows = [
        values(Leftover(build.id, build.node_id, build.snapshot_id, list(build.layers)))
        for build in builds
        if build.node_id
    ]
    if rows:
        await connection.execute(store.insert(leftovers).values(rows).on_conflict_do_nothing())


async def add(store: Store, build: BuildRecord) -> None:
    """Write down one of a build whose row stays, or is gone already."""
    async with store.write() as connection:
        await note(store, connection, [build])


async def of_node(store: Store, node_id: str) -> list[Leftover]:
    async with store.read() as connection:
        rows = await connection.execute(select(leftovers).where(leftovers.c.node_id == node_id))
        return [Leftover(**fields(row)) for row in rows]


async def removed(store: Store, build_id: str) -> None:
    """Forget one that its node has removed. Idempotent."""
    await store.write_one(delete(leftovers).where(leftovers.c.build_id == build_id))
