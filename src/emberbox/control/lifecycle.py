"""What happens to a sandbox after its creation: kill, pause, resume, connect, deadlines, network.

Every function is the same walk: one transaction moves the row, one call asks the node, one transaction records the
outcome. The second transaction checks the state again, since a kill may have come in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from emberbox.control.clock import now_ms
from emberbox.control.edges import route_of
from emberbox.control.errors import (
    Conflict,
    ControlError,
    Forbidden,
    Interrupted,
    NodeTooSlow,
    NodeUnavailable,
    NotFound,
)
from emberbox.control.limits import check_timeout, sandbox_limit
from emberbox.control.network import check_network, node_network, without_secrets
from emberbox.control.plane import Plane
from emberbox.control.sandboxes import Sandboxes, is_sandbox_id, sandbox_not_found, timeout_action
from emberbox.control.states import SHOWN, Event, State, moves
from emberbox.store import sandboxes as rows
from emberbox.store import teams as team_rows
from emberbox.store.errors import SandboxLimitReached
from emberbox.store.records import SandboxRecord, TeamRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()

_SETTLE_SECONDS = 30.0
_SETTLE_STEP = 0.02
_RESUME_SECONDS = 15
"""E2B's default time-out of a resume that names none."""
_WAKE_SECONDS = 300
"""What traffic that wakes a sandbox gives it at least."""
_REFRESH_SECONDS = 15


@dataclass(frozen=True, slots=True)
class Connected:
    sandbox: SandboxRecord
    resumed: bool


class Lifecycle:
    def __init__(self, plane: Plane, sandboxes: Sandboxes) -> None:
        self._plane = plane
        self._sandboxes = sandboxes

    # ---- kill

    async def kill(self, team: TeamRecord | None, sandbox_id: str) -> None:
        """End a sandbox in whatever state it is. `team=None` is the administrator.

        Raises:
            NotFound: it has ended already, never was, or is another team's.

        A node that is away is no error: nobody reaches the sandbox any more, the kill is recorded, and it is done as
        soon as the node is back. (A client that was told to try again would find nothing, and report that.)
        """
        record = await self._move(
            sandbox_id,
            Event.KILL,
            {"worker": self._plane.worker},
            team_id=team.id if team else None,
        )
        if record is None:
            raise sandbox_not_found(sandbox_id)
        try:
            with self._plane.carrying(record.node_id, record.id):
                await self.finish_kill(record)
        except (NodeUnavailable, NodeTooSlow) as error:
            log.warning("sandbox.kill_recorded", sandbox_id=sandbox_id, reason=error.message)

    async def finish_kill(self, record: SandboxRecord) -> None:
        """Carry out the kill that the row says."""
        await self._plane.edge.drop_route(record.id)
        try:
            await self._plane.nodes.get(record.node_id).kill(record.id)
        except ControlError:
            await self._abandon(record.id, State.KILLING)
            raise
        await self._ended(record.id, "killed")
        log.info("sandbox.killed", sandbox_id=record.id, team_id=record.team_id)

    async def kill_all(self, team_id: str) -> tuple[int, int]:
        """End every sandbox of a team. Returns how many were killed and how many could not be."""
        killed = failed = 0
        for record in await rows.live(self._plane.store, team_id=team_id):
            try:
                await self.kill(None, record.id)
                killed += 1
            except NotFound:
                continue
            except ControlError as error:
                failed += 1
                log.warning("sandbox.kill_failed", sandbox_id=record.id, reason=error.message)
        return killed, failed

    # ---- pause

    async def pause(self, team: TeamRecord, sandbox_id: str, *, memory: bool) -> None:
        """Stop a sandbox's clock. Its deadline does not count while it is paused.

        Raises:
            NotFound: no such sandbox.
            Conflict: it is paused already.
            ControlError: the node could not pause it, and it runs on; or it is changing its state for long.
        """
        record = await self._begin_pause(team, sandbox_id, memory=memory)
        with self._plane.carrying(record.node_id, sandbox_id):
            await self._pause(record, memory=memory)

    async def _begin_pause(self, team: TeamRecord, sandbox_id: str, *, memory: bool) -> SandboxRecord:
        """Make the pause this worker's to carry out.

        A change that is under way, maybe one whose node was lost, is waited for: to clients 409 means that the
        sandbox is paused.
        """
        changes = {"worker": self._plane.worker, "pause_memory": memory}
        record = await self._move(sandbox_id, Event.PAUSE, changes, team_id=team.id)
        if record is not None:
            return record
        async for settled in self._until_settled(team, sandbox_id):
            if settled.state == State.PAUSED:
                raise Conflict(f"sandbox {sandbox_id!r} is paused already")
            record = await self._move(sandbox_id, Event.PAUSE, changes, team_id=team.id)
            if record is not None:
                return record
        raise NodeUnavailable(f"sandbox {sandbox_id!r} is changing its state; try again in a moment")

    async def _pause(self, record: SandboxRecord, *, memory: bool) -> None:
        sandbox_id = record.id
        await self._plane.edge.drop_route(sandbox_id)
        try:
            await self._plane.nodes.get(record.node_id).pause(sandbox_id, memory=memory)
        except Conflict as error:
            # Most likely it reached its deadline in this very moment and paused by itself; the node will say.
            await self._not_done(record, Event.PAUSE_FAILED, error)
            raise Conflict(f"sandbox {sandbox_id!r} is paused already, or changing its state") from error
        except NotFound as error:
            await self._ended(sandbox_id, "lost")
            raise sandbox_not_found(sandbox_id) from error
        except Interrupted as error:
            # Not a conflict, which clients take for a pause that was there already.
            await asyncio.shield(self._not_done(record, Event.PAUSE_FAILED, error))
            raise NodeUnavailable(f"sandbox {sandbox_id!r} was not paused: {error.message}") from error
        except BaseException as error:
            await asyncio.shield(self._not_done(record, Event.PAUSE_FAILED, error))
            raise
        if await self._paused(sandbox_id) is None:
            raise sandbox_not_found(sandbox_id)
        log.info("sandbox.paused", sandbox_id=sandbox_id, memory=memory)

    async def _paused(self, sandbox_id: str) -> SandboxRecord | None:
        return await self._move(sandbox_id, Event.PAUSE_DONE, {"worker": None, "paused_at": now_ms(), "address": ""})

    # ---- resume

    async def resume(
        self,
        team: TeamRecord,
        sandbox_id: str,
        *,
        timeout: int | None,
        auto_pause: bool | None = None,
        memory: bool = True,
        current: SandboxRecord | None = None,
    ) -> SandboxRecord:
        """Let a paused sandbox run again.

        Args:
            timeout: seconds from now; None gives what was left when it was paused, at least 15 s, as far as the team
                may have it.
            auto_pause: a new setting for the deadline; None keeps the one it has.
            memory: False starts it from its files alone.
            current: the sandbox, when it was just looked up.

        Raises:
            NotFound: no such sandbox.
            Conflict: it runs, or is on its way from or to a pause.
            TooMany: the team has all the sandboxes it may have.
            ControlError: the node could not resume it; it stays paused.
        """
        current = current or await self._sandboxes.get(team, sandbox_id)
        if timeout is None:
            left = max(0, current.end_at - (current.paused_at or current.end_at)) // 1000
            timeout = min(max(_RESUME_SECONDS, left), team.max_timeout_seconds)
        check_timeout(team, timeout)
        changes: dict[str, Any] = {"worker": self._plane.worker, "timeout_seconds": timeout}
        if auto_pause is not None:
            changes["auto_pause"] = auto_pause
        record = await self._begin_resume(team, sandbox_id, changes)
        if record is None:
            raise Conflict(f"sandbox {sandbox_id!r} is {SHOWN[State(current.state)]}, not paused; use connect")
        with self._plane.carrying(record.node_id, sandbox_id):
            return await self._finish_resume(record, timeout, discard_memory=not memory, auto_pause=auto_pause)

    async def _begin_resume(
        self, team: TeamRecord, sandbox_id: str, changes: Mapping[str, Any]
    ) -> SandboxRecord | None:
        try:
            return await rows.move_counted(
                self._plane.store,
                sandbox_id,
                team_id=team.id,
                limit=team.max_sandboxes,
                transitions=moves(Event.RESUME),
                changes={"state_changed_at": now_ms(), **changes},
            )
        except SandboxLimitReached as error:
            raise sandbox_limit(error) from error

    async def _finish_resume(
        self, record: SandboxRecord, timeout: int, *, discard_memory: bool, auto_pause: bool | None
    ) -> SandboxRecord:
        request = pb.ResumeRequest(
            sandbox_id=record.id,
            deadline_unix_ms=now_ms() + timeout * 1000,
            discard_memory=discard_memory,
        )
        if auto_pause is not None:
            request.on_timeout = timeout_action(auto_pause, record.auto_pause_memory)
        node = self._plane.nodes.get(record.node_id)
        try:
            machine = await node.resume(request)
        except NotFound as error:
            await self._ended(record.id, "lost")
            raise sandbox_not_found(record.id) from error
        except BaseException as error:
            await asyncio.shield(self._not_done(record, Event.RESUME_FAILED, error))
            raise
        running = await self._move(
            record.id,
            Event.RESUME_DONE,
            {
                "worker": None,
                "address": machine.address,
                "end_at": machine.deadline_unix_ms or request.deadline_unix_ms,
                "paused_at": None,
            },
        )
        if running is None:
            raise sandbox_not_found(record.id)
        await self._plane.edge.set_route(route_of(running, self._plane.tokens))
        self._plane.written_down(record.id, record.node_id)
        log.info("sandbox.resumed", sandbox_id=record.id)
        return running

    async def connect(self, team: TeamRecord, sandbox_id: str, *, timeout: int, memory: bool = True) -> Connected:
        """A running sandbox, whatever it takes: its deadline is extended, or it is resumed.

        The auto-pause setting stays as it is.

        Raises:
            NotFound: no such sandbox.
            Conflict: it does not settle in a state to connect to.
            ControlError: as `resume`.
        """
        check_timeout(team, timeout)
        async for record in self._until_settled(team, sandbox_id):
            if record.state == State.RUNNING:
                try:
                    return Connected(await self._set_deadline(record, timeout, only_extend=True), resumed=False)
                except Conflict:
                    continue
            try:
                resumed = await self.resume(team, sandbox_id, timeout=timeout, memory=memory, current=record)
            except Conflict:
                # Somebody was faster; look again what came of it.
                continue
            return Connected(resumed, resumed=True)
        raise Conflict(f"sandbox {sandbox_id!r} is changing its state; try again in a moment")

    async def wake(self, sandbox_id: str) -> SandboxRecord:
        """A sandbox that traffic has arrived for: running, or resumed when it may be.

        Raises:
            NotFound: no such sandbox, or it is paused and traffic does not wake it.
            Forbidden: it was paused without its memory, which only an explicit request may resume.
            Conflict: it does not settle.
            TooMany: the team has all the sandboxes it may have.
        """
        record = await rows.get(self._plane.store, sandbox_id) if is_sandbox_id(sandbox_id) else None
        team = await team_rows.get_team(self._plane.store, record.team_id) if record else None
        if team is None:
            raise sandbox_not_found(sandbox_id)
        async for settled in self._until_settled(team, sandbox_id):
            if settled.state == State.RUNNING:
                # The edge asks because it does not know the route.
                await self._plane.edge.set_route(route_of(settled, self._plane.tokens))
                return settled
            if not settled.auto_resume:
                # The words that clients know: to them, a sandbox that does not run is not there.
                raise NotFound(f"The sandbox {sandbox_id} was not found: it is paused")
            if settled.pause_memory is False:
                raise Forbidden(f"sandbox {sandbox_id!r} was paused without its memory; resume it explicitly")
            timeout = min(max(_WAKE_SECONDS, settled.timeout_seconds), team.max_timeout_seconds)
            try:
                return await self.resume(team, sandbox_id, timeout=timeout, current=settled)
            except Conflict:
                continue
        raise Conflict(f"sandbox {sandbox_id!r} is changing its state; try again in a moment")

    # ---- deadlines and network

    async def set_timeout(self, team: TeamRecord, sandbox_id: str, timeout: int) -> None:
        """Let a running sandbox end `timeout` seconds from now.

        Raises:
            Invalid: longer than the team may ask for.
            NotFound: no such sandbox, or it is paused and has no deadline.
        """
        check_timeout(team, timeout)
        record = await self._running(team, sandbox_id)
        await self._set_deadline(record, timeout, only_extend=False)

    async def refresh(self, team: TeamRecord, sandbox_id: str, duration: int | None) -> None:
        """Keep a running sandbox for at least `duration` seconds from now; never shortens."""
        record = await self._running(team, sandbox_id)
        seconds = min(_REFRESH_SECONDS if duration is None else duration, team.max_timeout_seconds)
        await self._set_deadline(record, seconds, only_extend=True)

    async def set_network(
        self, team: TeamRecord, sandbox_id: str, *, egress: Mapping[str, Any], allow_internet: bool | None
    ) -> None:
        """Replace the egress settings of a running sandbox; what is left out is cleared.

        Raises:
            Invalid: a value that cannot be used.
            NotFound: no such sandbox.
            Conflict: it is paused.
        """
        check_network(egress)
        record = await self._sandboxes.get(team, sandbox_id)
        if record.state != State.RUNNING:
            raise Conflict(f"sandbox {sandbox_id!r} is paused; resume it first")
        node = self._plane.nodes.get(record.node_id)
        await node.set_network(sandbox_id, node_network(egress, allow_internet=allow_internet))
        ingress = ("allowPublicTraffic", "maskRequestHost", "httpsPorts")
        network = {key: record.network[key] for key in ingress if key in record.network}
        await rows.change(
            self._plane.store,
            sandbox_id,
            states=[state.value for state in SHOWN],
            changes={"network": {**network, **without_secrets(egress)}, "allow_internet": allow_internet},
        )

    async def _running(self, team: TeamRecord, sandbox_id: str) -> SandboxRecord:
        record = await self._sandboxes.get(team, sandbox_id)
        if record.state != State.RUNNING:
            raise NotFound(f"sandbox {sandbox_id!r} is paused and has no deadline; resume it first")
        return record

    async def _set_deadline(self, record: SandboxRecord, timeout: int, *, only_extend: bool) -> SandboxRecord:
        node = self._plane.nodes.get(record.node_id)
        try:
            machine = await node.set_deadline(record.id, now_ms() + timeout * 1000, only_extend=only_extend)
        except NotFound as error:
            raise sandbox_not_found(record.id) from error
        changes: dict[str, Any] = {"end_at": machine.deadline_unix_ms}
        if not only_extend or machine.deadline_unix_ms > record.end_at:
            changes["timeout_seconds"] = timeout
        changed = await rows.change(self._plane.store, record.id, states=[State.RUNNING.value], changes=changes)
        if changed is None:
            raise Conflict(f"sandbox {record.id!r} is changing its state; try again in a moment")
        return changed

    # ---- shared steps

    async def _until_settled(self, team: TeamRecord, sandbox_id: str) -> AsyncIterator[SandboxRecord]:
        """Yield the sandbox each time it is found running or paused, until the patience is over."""
        until = time.monotonic() + _SETTLE_SECONDS * self._plane.settings.time_scale
        while time.monotonic() < until:
            record = await self._sandboxes.get(team, sandbox_id)
            if record.state in (State.RUNNING, State.PAUSED):
                yield record
            await asyncio.sleep(_SETTLE_STEP)

    async def _not_done(self, record: SandboxRecord, event: Event, error: BaseException) -> None:
        """Take a transition back; or leave it to the next look at the node when its outcome is not known."""
        if not isinstance(error, ControlError) or isinstance(
            error, NodeUnavailable | NodeTooSlow | Interrupted | Conflict
        ):
            log.warning("sandbox.outcome_unknown", sandbox_id=record.id, state=record.state, reason=str(error))
            await self._abandon(record.id, State(record.state))
            self._plane.nodes.look_again(record.node_id)
            return
        log.warning("sandbox.transition_failed", sandbox_id=record.id, state=record.state, reason=error.message)
        back = await self._move(record.id, event, {"worker": None})
        if back is not None and back.state == State.RUNNING:
            await self._plane.edge.set_route(route_of(back, self._plane.tokens))

    async def _abandon(self, sandbox_id: str, state: State) -> None:
        await rows.change(self._plane.store, sandbox_id, states=[state.value], changes={"worker": None})

    async def _ended(self, sandbox_id: str, reason: str) -> None:
        await self._move(
            sandbox_id, Event.ENDED, {"worker": None, "ended_at": now_ms(), "end_reason": reason, "address": ""}
        )

    async def _move(
        self, sandbox_id: str, event: Event, changes: Mapping[str, Any], *, team_id: str | None = None
    ) -> SandboxRecord | None:
        if not is_sandbox_id(sandbox_id):
            return None
        return await rows.move(
            self._plane.store,
            sandbox_id,
            transitions=moves(event),
            team_id=team_id,
            changes={"state_changed_at": now_ms(), **changes},
        )
