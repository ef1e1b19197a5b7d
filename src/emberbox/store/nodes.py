"""Nodes as they were last seen."""

from __future__ import annotations

from sqlalchemy import select, update

from emberbox.store.engine import Store
from emberbox.store.records import NodeRecord, fields, values
from emberbox.store.tables import nodes


async def seen(store: Store, record: NodeRecord) -> NodeRecord:
    """Record a node that has connected. A status that an administrator set stays."""
    fresh = values(record)
    kept = {key: value for key, value in fresh.items() if key not in ("id", "status", "status_changed_at")}
    async with store.write() as connection:
        # A node that was installed anew at the same address takes the place of the old one.
        await connection.execute(
            update(nodes)
            .where(nodes.c.target == record.target, nodes.c.id != record.id)
            .values(target=nodes.c.target + "#" + nodes.c.id)
        )
        statement = store.insert(nodes).values(fresh)
        statement = statement.on_conflict_do_update(index_elements=["id"], set_=kept)
        row = (await connection.execute(statement.returning(*nodes.c))).one()
    return NodeRecord(**fields(row))


async def get(store: Store, node_id: str) -> NodeRecord | None:
    async with store.read() as connection:
        row = (await connection.execute(select(nodes).where(nodes.c.id == node_id))).first()
    return NodeRecord(**fields(row)) if row else None


async def listed(store: Store) -> list[NodeRecord]:
    async with store.read() as connection:
        return [NodeRecord(**fields(row)) for row in await connection.execute(select(nodes).order_by(nodes.c.id))]


async def set_status(store: Store, node_id: str, status: str, now_ms: int) -> bool:
    async with store.write() as connection:
        result = await connection.execute(
            update(nodes).where(nodes.c.id == node_id).values(status=status, status_changed_at=now_ms)
        )
    return result.rowcount > 0
