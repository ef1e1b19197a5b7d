"""What can go wrong on a node, one class for each thing a caller can act on.

The message is a sentence for the user. `server.py` maps the classes to gRPC status codes, and nothing else does.
"""

from __future__ import annotations


class NodeError(Exception):
    """Base of the node's errors. Without a class of its own a failure is INTERNAL."""


class NoSuchSandbox(NodeError):
    """No sandbox with this ID is on this node. NOT_FOUND."""

    def __init__(self, sandbox_id: str) -> None:
        super().__init__(f"sandbox '{sandbox_id}' is not on this node")
        self.sandbox_id = sandbox_id


class NoSuchSnapshot(NodeError):
    """No snapshot with this ID is on this node. NOT_FOUND."""

    def __init__(self, snapshot_id: str) -> None:
        super().__init__(f"snapshot '{snapshot_id}' is not on this node")
        self.snapshot_id = snapshot_id


class NoSuchBuild(NodeError):
    """No build with this ID is on this node. NOT_FOUND."""


class LayerMissing(NodeError):
    """A layer of the template is not on this node. NOT_FOUND."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"layer {digest[:12]} is not on this node; build the template again")
        self.digest = digest


class AlreadyHere(NodeError):
    """A sandbox, snapshot or build with this ID exists already. ALREADY_EXISTS."""


class WrongState(NodeError):
    """The sandbox is in another state than the call needs. FAILED_PRECONDITION."""


class Interrupted(NodeError):
    """Another call, a kill for example, ended the operation under way. ABORTED."""


class NodeFull(NodeError):
    """No slot, memory or machine place is left. RESOURCE_EXHAUSTED."""


class DiskFull(NodeError):
    """The node's disk has no room for what was asked. RESOURCE_EXHAUSTED."""


class BadValue(NodeError):
    """A value that the node cannot use. INVALID_ARGUMENT."""


class Unsupported(NodeError):
    """This node's runtime cannot do it. UNIMPLEMENTED."""


class NodeBusy(NodeError):
    """The node is starting or shutting down; the same call succeeds later. UNAVAILABLE."""


class AgentFailure(NodeError):
    """The agent inside a machine did not answer, or refused. INTERNAL."""


class AgentBusy(AgentFailure):
    """It does what must be done first. INTERNAL."""


class AgentTooLong(AgentFailure):
    """The agent's answer is longer than it may be."""


class AgentTooSlow(AgentFailure):
    """It did not answer in time: what was asked for may still be done. INTERNAL."""


class NetworkFailure(NodeError):
    """A slot, its firewall or the name forwarder could not be set up. INTERNAL."""


class DiskFailure(NodeError):
    """A disk image could not be made, copied or measured. INTERNAL."""
