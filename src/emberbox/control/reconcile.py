"""Keeping the store and the nodes at one.

A node's event stream begins with the state of every machine. Comparing it with the rows finishes or undoes what an
api process was doing when it died, and records what happened while nobody listened. After that the stream tells what
machines do by themselves: pause or end at a deadline, die.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import structlog

from emberbox.control.clock import now_ms
from emberbox.control.edges import route_of
from emberbox.control.errors import ControlError
from emberbox.control.lifecycle import Lifecycle
from emberbox.control.metrics import Metrics
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.control.states import IN_TRANSITION, Event, State, moves
from emberbox.control.turns import Turns
from emberbox.store import nodes as node_rows
from emberbox.store import sandboxes as rows
from emberbox.store.records import NodeRecord, SandboxRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()

_ABANDONED_MS = 10 * 60 * 1000
"""A transition of another api process is taken for interrupted after this: longer than any deadline of a call."""
_AT_ONCE = 16
"""Sandboxes whose changes are handled at the same time. Each may tell an edge, which does one thing after another."""

_REASONS = {
    pb.END_REASON_KILLED: "killed",
    pb.END_REASON_TIMED_OUT: "timed_out",
    pb.END_REASON_DIED: "died",
    pb.END_REASON_LOST: "lost",
}


class Reconciler:
    """Applies the events of nodes to the store."""

    def __init__(self, plane: Plane, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._plane = plane
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._turns = Turns(_AT_ONCE)

    async def handle(self, node: Node, event: pb.NodeEvent, opened_ms: int) -> None:
        """Apply one event of a stream that was opened at `opened_ms`."""
        match event.WhichOneof("event"):
            case "state":
                await self._turns.settled()
                await self._node_seen(node)
                await self._compare(node, event.state, opened_ms)
            case "changed":
                # An edge or a node that answers late holds up one sandbox, not all of the node.
                self._turns.add(event.changed.sandbox_id, lambda: self._try_changed(node, event.changed))
            case "samples":
                await self._metrics.record(event.samples)

    async def close(self) -> None:
        await self._turns.close()

    # ---- the first event: everything there is

    async def _node_seen(self, node: Node) -> None:
        assert node.sighting is not None, "the node is described before its events are handled"
        seen = node.sighting.description
        now = now_ms()
        record = await node_rows.seen(
            self._plane.store,
            NodeRecord(
                id=seen.node_id,
                target=node.target,
                status="ready",
                status_changed_at=now,
                service_instance_id=seen.service_instance_id,
                runtime=seen.runtime,
                memory_snapshots=seen.memory_snapshots,
                version=seen.version,
                last_seen_at=now,
            ),
        )
        self._plane.nodes.note_status(record.id, record.status)

    async def _compare(self, node: Node, state: pb.State, opened_ms: int) -> None:
        machines = {machine.sandbox_id: machine for machine in state.machines}
        known: set[str] = set()
        # What ended is kept in mind too, so that a machine that outlived its row's end is found out below.
        for record in await rows.live(self._plane.store, node_id=node.node_id):
            known.add(record.id)
            machine = machines.get(record.id)
            if machine is not None and machine.state == pb.MACHINE_STATE_ENDED:
                await self._end(record, machine)
            elif self._goes_on_elsewhere(record) or record.state_changed_at > opened_ms:
                # The row is newer than what the node says, or about to be.
                if machine is not None and machine.state == pb.MACHINE_STATE_PAUSED:
                    await self._overtaken(record)
            else:
                await self._repair(record, machine)
        for machine in state.machines:
            if machine.sandbox_id not in known:
                await self._settle_unknown(node, machine)

    def _goes_on_elsewhere(self, record: SandboxRecord) -> bool:
        """A transition that some process, this one included, is carrying out."""
        if State(record.state) not in IN_TRANSITION or record.worker is None:
            return False
        if record.worker == self._plane.worker:
            return record.id in self._plane.carried
        # SQLite has one api process: a transition of another one was interrupted by its end.
        return not self._plane.store.is_sqlite and now_ms() - record.state_changed_at < _ABANDONED_MS

    async def _repair(self, record: SandboxRecord, machine: pb.MachineStatus | None) -> None:
        found = machine.state if machine is not None else pb.MACHINE_STATE_ENDED
        state = State(record.state)
        if state is State.KILLING or state is State.CREATING:
            # Nobody was told of a create that was interrupted, so it is undone; a kill is finished.
            await self._kill(record, machine)
        elif found == pb.MACHINE_STATE_ENDED:
            await self._end(record, machine)
        elif found == pb.MACHINE_STATE_RUNNING:
            assert machine is not None
            if (
                state is not State.RUNNING
                or record.address != machine.address
                or self._deadline_differs(record, machine)
            ):
                await self._found_running(record, machine)
        elif found == pb.MACHINE_STATE_PAUSED and state is not State.PAUSED:
            assert machine is not None
            await self._found_paused(record, machine)

    @staticmethod
    def _deadline_differs(record: SandboxRecord, machine: pb.MachineStatus) -> bool:
        return bool(machine.deadline_unix_ms) and machine.deadline_unix_ms != record.end_at

    async def _settle_unknown(self, node: Node, machine: pb.MachineStatus) -> None:
        """A machine whose row has ended, or that has none: end it, and let the node forget it."""
        if machine.state != pb.MACHINE_STATE_ENDED:
            record = await rows.get(self._plane.store, machine.sandbox_id)
            if record is not None and record.state != State.ENDED:
                return  # It was created after the rows were read.
            log.warning("machine.orphan_killed", sandbox_id=machine.sandbox_id, node_id=node.node_id)
            await node.kill(machine.sandbox_id)
        await node.acknowledge([machine.sandbox_id])

    # ---- what happens by itself

    async def _try_changed(self, node: Node, machine: pb.MachineStatus) -> None:
        """Apply what happened; what cannot be applied now is compared with the node again."""
        try:
            await self._changed(node, machine)
        except Exception as error:
            expected = isinstance(error, ControlError)
            log.warning("machine.change_failed", sandbox_id=machine.sandbox_id, error=str(error), exc_info=not expected)
            node.look_again()

    async def _changed(self, node: Node, machine: pb.MachineStatus) -> None:
        record = await rows.get(self._plane.store, machine.sandbox_id)
        if machine.state == pb.MACHINE_STATE_ENDED:
            if record is not None and record.state != State.ENDED:
                await self._end(record, machine)
            else:
                await node.acknowledge([machine.sandbox_id])
        elif machine.state == pb.MACHINE_STATE_PAUSED and record is not None:
            # An event that is older than the row may be of a pause that has been resumed from since.
            current = record.state == State.RUNNING and machine.changed_unix_ms >= record.state_changed_at
            if not (current and await self._found_paused(record, machine)):
                await self._overtaken(record)

    async def _overtaken(self, record: SandboxRecord) -> None:
        """A machine is paused while its row is on its way to `running`: have it looked at once the row is there."""
        self._plane.overtaken.add(record.id)
        # It may have got there between the reading and the marking.
        now = await rows.get(self._plane.store, record.id)
        if now is None or now.state in (State.PAUSED, State.KILLING, State.ENDED):
            self._plane.overtaken.discard(record.id)
        elif now.state == State.RUNNING:
            self._plane.written_down(record.id, record.node_id)

    # ---- the outcomes

    async def _kill(self, record: SandboxRecord, machine: pb.MachineStatus | None) -> None:
        log.warning("sandbox.repaired", sandbox_id=record.id, was=record.state, now="ended")
        if record.state == State.CREATING:
            moved = await self._move(record, Event.KILL, {"idempotency_key": None, "worker": self._plane.worker})
            if moved is None:
                return
            record = moved
        if machine is not None and machine.state == pb.MACHINE_STATE_ENDED:
            await self._end(record, machine)
            return
        try:
            await self._lifecycle.finish_kill(record)
        except ControlError as error:
            log.warning("sandbox.kill_failed", sandbox_id=record.id, reason=error.message)

    async def _end(self, record: SandboxRecord, machine: pb.MachineStatus | None) -> None:
        reason = _REASONS.get(machine.end_reason, "lost") if machine is not None else "lost"
        changes = {
            "state_changed_at": now_ms(),
            "worker": None,
            "address": "",
            "ended_at": (machine.changed_unix_ms if machine is not None else 0) or now_ms(),
            "end_reason": reason,
        }
        # An end that the node reports is final whatever the row says by now. That it does not know a machine is so
        # only as long as the row is as it was read.
        transitions = moves(Event.ENDED) if machine is not None else {record.state: State.ENDED.value}
        ended = await rows.move(self._plane.store, record.id, transitions=transitions, changes=changes)
        await self._plane.edge.drop_route(record.id)
        if machine is not None:
            await self._plane.nodes.get(record.node_id).acknowledge([record.id])
        if ended is not None:
            level = log.info if reason in ("killed", "timed_out") else log.warning
            level(
                "sandbox.ended",
                sandbox_id=record.id,
                team_id=record.team_id,
                reason=reason,
                was=record.state,
                message=machine.message if machine is not None else "the node does not know it",
            )

    async def _found_running(self, record: SandboxRecord, machine: pb.MachineStatus) -> None:
        running = await self._move(
            record,
            Event.FOUND_RUNNING,
            {
                "worker": None,
                "address": machine.address,
                "end_at": machine.deadline_unix_ms or record.end_at,
                "paused_at": None,
            },
        )
        if running is not None:
            log.warning("sandbox.repaired", sandbox_id=record.id, was=record.state, now="running")
            await self._plane.edge.set_route(route_of(running, self._plane.tokens))

    async def _found_paused(self, record: SandboxRecord, machine: pb.MachineStatus) -> bool:
        by_itself = record.state == State.RUNNING
        changes: dict[str, Any] = {
            "worker": None,
            "address": "",
            "paused_at": machine.changed_unix_ms or now_ms(),
        }
        if by_itself:
            changes["pause_memory"] = record.auto_pause_memory
        paused = await self._move(record, Event.FOUND_PAUSED, changes)
        if paused is not None:
            await self._plane.edge.drop_route(record.id)
            event = "sandbox.auto_paused" if by_itself else "sandbox.repaired"
            log.info(event, sandbox_id=record.id, was=record.state, now="paused")
        return paused is not None

    async def _move(self, record: SandboxRecord, event: Event, changes: Mapping[str, Any]) -> SandboxRecord | None:
        """Move a row that is still as it was read; somebody else's newer decision stands."""
        target = moves(event).get(record.state)
        if target is None:
            return None
        return await rows.move(
            self._plane.store,
            record.id,
            transitions={record.state: target},
            changes={"state_changed_at": now_ms(), **changes},
        )


async def watch(plane: Plane, reconciler: Reconciler) -> None:
    """Follow every node until cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            for node in plane.nodes:
                group.create_task(_watch_one(node, reconciler), name=f"watch {node.target}")
    finally:
        await reconciler.close()


async def _watch_one(node: Node, reconciler: Reconciler) -> None:
    await node.watch(lambda event, opened_ms: reconciler.handle(node, event, opened_ms))
