"""What the decisions share: the store, the seams, the settings. One a process, owned by `control.service`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from emberbox.control.edges import Edge
from emberbox.control.nodes import Nodes
from emberbox.control.tokens import SandboxTokens
from emberbox.settings import Settings
from emberbox.store.engine import Store

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
    overtaken: set[str] = field(default_factory=set)
    """Sandboxes that a node reported as paused while their create or resume was still being written down."""

    def written_down(self, sandbox_id: str, node_id: str) -> None:
        """A create or resume is in the store; look at the node again if it has gone on meanwhile."""
        if sandbox_id in self.overtaken:
            self.overtaken.discard(sandbox_id)
            self.nodes.look_again(node_id)


def envd_version(_agent_version: str) -> str:
    """What clients are told for a build's agent. Every release of our agent so far implements `ENVD_VERSION`."""
    return ENVD_VERSION
