"""Nodes as the administrator sees them."""

from __future__ import annotations

from dataclasses import dataclass

from emberbox.control.clock import now_ms
from emberbox.control.errors import ControlError, Invalid, NotFound
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.store import nodes as rows
from emberbox.store import sandboxes as sandbox_rows
from emberbox.store.records import NodeRecord
from emberbox.wire import node_pb2 as pb

SETTABLE = ("ready", "draining", "standby")


@dataclass(frozen=True, slots=True)
class NodeView:
    record: NodeRecord
    status: str
    description: pb.NodeDescription
    sandboxes: int
    allocated_cpus: int
    allocated_memory_mb: int


class Fleet:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    async def nodes(self) -> list[NodeView]:
        return [await self._view(record) for record in await rows.listed(self._plane.store)]

    async def node(self, node_id: str) -> NodeView:
        """
        Raises:
            NotFound: no such node has ever connected.
        """
        record = await rows.get(self._plane.store, node_id) if "\0" not in node_id else None
        if record is None:
            raise NotFound(f"node {node_id[:128]!r} was not found")
        return await self._view(record)

    async def set_status(self, node_id: str, status: str) -> None:
        """Let a node take new sandboxes (`ready`), or not (`draining`, `standby`).

        Other api processes on the same database notice it within half a minute.

        Raises:
            NotFound: no such node.
            Invalid: a status that is observed, not set.
        """
        if status not in SETTABLE:
            raise Invalid(f"status {status!r} cannot be set; use {', '.join(SETTABLE)}")
        view = await self.node(node_id)
        await rows.set_status(self._plane.store, view.record.id, status, now_ms())
        self._plane.nodes.note_status(view.record.id, status)

    async def follow(self) -> None:
        """Note which status nodes were given by other api processes."""
        for record in await rows.listed(self._plane.store):
            self._plane.nodes.note_status(record.id, record.status)

    async def _view(self, record: NodeRecord) -> NodeView:
        node = next((node for node in self._plane.nodes if node.node_id == record.id), None)
        running = await sandbox_rows.by_state(
            self._plane.store, ["creating", "running", "pausing", "resuming"], node_id=record.id
        )
        return NodeView(
            record=record,
            status=_status(node, record),
            description=await _description(node),
            sandboxes=len(running),
            allocated_cpus=sum(sandbox.cpu_count for sandbox in running),
            allocated_memory_mb=sum(sandbox.memory_mb for sandbox in running),
        )


def _status(node: Node | None, record: NodeRecord) -> str:
    if node is None:
        return "unhealthy"
    return record.status if node.connected.is_set() else "connecting"


async def _description(node: Node | None) -> pb.NodeDescription:
    """The node's numbers of now, or as last seen."""
    if node is None:
        return pb.NodeDescription()
    try:
        return await node.describe()
    except ControlError:
        return node.sighting.description if node.sighting else pb.NodeDescription()
