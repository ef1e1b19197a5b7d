"""What the decisions share: the store, the seams, the settings. One a process, owned by `control.service`."""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from emberbox.control.edges import Edge
from emberbox.control.errors import ControlError, NotFound
from emberbox.control.nodes import Nodes
from emberbox.control.tokens import SandboxTokens
from emberbox.settings import Settings
from emberbox.store import leftovers
from emberbox.store import templates as template_rows
from emberbox.store.engine import Store
from emberbox.store.records import BuildRecord, Leftover

log = structlog.get_logger()

ENVD_VERSION = "0.6.4"
"""The version of E2B's agent whose behaviour our agent has; clients decide by it which features they use."""


@dataclass(frozen=True, slots=True)
class Plane:
    settings: Settings
    store: Store
    nodes: Nodes
    edge: Edge
    tokens: SandboxTokens
    worker: str = field(default_factory=lambda: str(uuid.uuid4()))
    """This process, in the rows whose transition it carries out."""
    carried: Counter[str] = field(default_factory=Counter)
    """Sandboxes whose transition this process is carrying out right now."""
    overtaken: set[str] = field(default_factory=set)
    """Sandboxes that a node reported as paused while their create or resume was still being written down."""

    @contextmanager
    def carrying(self, node_id: str, *sandbox_ids: str) -> Iterator[None]:
        """Mark transitions as going on. One that breaks (a full disk, a lost database) is looked at again."""
        self.carried.update(sandbox_ids)
        broken = True
        try:
            yield
            broken = False
        except ControlError:
            broken = False
            raise
        finally:
            self.carried.subtract(sandbox_ids)
            for sandbox_id in sandbox_ids:
                if self.carried[sandbox_id] <= 0:
                    del self.carried[sandbox_id]
            if broken:
                self.nodes.look_again(node_id)

    async def delete_on_node(self, build: BuildRecord) -> None:
        """Have the node that holds a build or a snapshot remove it; if it cannot now, when it is seen again.

        Layers that other builds stand on stay.
        """
        for left in await leftovers.add(self.store, build):
            await self.remove_leftover(left)

    async def remove_leftovers(self) -> None:
        """Remove what could not be removed when it was deleted, of the nodes that are there."""
        unfinished = {build.node_id for build in await template_rows.builds_in(self.store, ["building"])}
        for node in self.nodes:
            # Which layers a build has is not known here before it has ended.
            if node.connected.is_set() and node.node_id not in unfinished:
                for left in await leftovers.of_node(self.store, node.node_id):
                    if left.snapshot_id is None:
                        with contextlib.suppress(ControlError):  # it may go on there since before it was deleted
                            await node.cancel_build(left.build_id)
                    await self.remove_leftover(left)

    async def remove_leftover(self, left: Leftover) -> None:
        """Have a node remove what was deleted here; if it cannot now, when it is seen again."""
        try:
            node = self.nodes.get(left.node_id)
            if left.snapshot_id is not None:
                await node.delete_snapshot(left.snapshot_id)
            else:
                unused = await template_rows.unused_layers(self.store, left.layers, but_by=left.build_id)
                await node.delete_build(left.build_id, sorted(unused))
        except NotFound:
            pass
        except ControlError as error:
            log.warning("build.left_on_node", build_id=left.build_id, node_id=left.node_id, reason=error.message)
            return
        await leftovers.removed(self.store, left.build_id)

    def written_down(self, sandbox_id: str, node_id: str) -> None:
        """A create or resume is in the store; look at the node again if it has gone on meanwhile."""
        if sandbox_id in self.overtaken:
            self.overtaken.discard(sandbox_id)
            self.nodes.look_again(node_id)


def envd_version(_agent_version: str) -> str:
    """What clients are told for a build's agent. Every release of our agent so far implements `ENVD_VERSION`."""
    return ENVD_VERSION
