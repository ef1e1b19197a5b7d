"""What the command line asks the node directly, over its socket: what runs there, and to end it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from emberbox.cli.errors import CliError
from emberbox.settings import Settings
from emberbox.tls import node_channel_credentials
from emberbox.wire import node_pb2, node_pb2_grpc

KILLS_AT_ONCE = 8
KILL_SECONDS = 60.0


@dataclass(frozen=True)
class NodeView:
    """What a node said about itself and the sandboxes on it."""

    runtime: str
    isolation: str
    why: str
    """Why it is this runtime."""
    running: tuple[str, ...]
    """Sandbox IDs."""
    paused: tuple[str, ...]


def look(settings: Settings, *, timeout: float = 5.0) -> NodeView | None:
    """Ask the node; None when it does not answer within `timeout` seconds."""
    try:
        with _node(settings) as node:
            description = node.Describe(node_pb2.DescribeRequest(), timeout=timeout)
            # The first message of a watch holds every machine; closing the channel ends the watch.
            machines = next(iter(node.Watch(node_pb2.WatchRequest(), timeout=timeout))).state.machines
    except (grpc.RpcError, StopIteration):
        return None

    def in_state(state: node_pb2.MachineState.ValueType) -> tuple[str, ...]:
        return tuple(sorted(m.sandbox_id for m in machines if m.state == state))

    return NodeView(
        runtime=description.runtime,
        isolation=description.isolation,
        why=description.runtime_why,
        running=in_state(node_pb2.MACHINE_STATE_RUNNING),
        paused=in_state(node_pb2.MACHINE_STATE_PAUSED),
    )


def describe(settings: Settings, *, timeout: float) -> bool:
    """Whether the node answers within `timeout` seconds."""
    try:
        with _node(settings) as node:
            node.Describe(node_pb2.DescribeRequest(), timeout=timeout)
    except grpc.RpcError:
        return False
    return True


def kill(settings: Settings, sandbox_ids: tuple[str, ...]) -> None:
    """End these sandboxes. The control plane hears of it from the node, now or when it next runs.

    Raises:
        CliError: at least one is still there.
    """
    with _node(settings) as node, ThreadPoolExecutor(KILLS_AT_ONCE) as pool:
        failures = [text for text in pool.map(lambda one: _kill(node, one), sandbox_ids) if text is not None]
    if failures:
        raise CliError(f"{len(failures)} of {len(sandbox_ids)} sandboxes could not be ended: {failures[0]}")


def _kill(node: node_pb2_grpc.NodeStub, sandbox_id: str) -> str | None:
    try:
        node.Kill(node_pb2.KillRequest(sandbox_id=sandbox_id), timeout=KILL_SECONDS)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            return f"{sandbox_id}: {error.details()}"
    return None


@contextmanager
def _node(settings: Settings) -> Iterator[node_pb2_grpc.NodeStub]:
    target = settings.node_target
    credentials = node_channel_credentials(settings)
    with grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target) as channel:
        yield node_pb2_grpc.NodeStub(channel)
