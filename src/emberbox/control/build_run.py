"""One build followed from its start on a node to its end, over restarts of this process and of the node."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import structlog

from emberbox.control.clock import now_ms
from emberbox.control.errors import Conflict, ControlError, Interrupted, NodeTooSlow, NodeUnavailable, NotFound
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.store import templates as rows
from emberbox.store.records import BuildLogRecord, BuildRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()

RESTARTED = "the node restarted during the build; start it again"

_FLUSH_SECONDS = 0.2
_AFTER_FAILURE_SECONDS = 2.0
_HEARTBEAT_SECONDS = 15.0
_AWAY_SECONDS = 300.0
"""How long a node may be away before its builds are given up."""
_PAUSE_SECONDS = 0.5
_SENDS = 3
_LOG_ENTRIES = 100_000
_MESSAGE_CHARACTERS = 16_384

Outcome = pb.BuildDone | pb.BuildFailed
ToldProgress = Callable[[str, float], None]


class BuildRun:
    """Follows one build of one node and writes its log down."""

    def __init__(
        self,
        plane: Plane,
        node: Node,
        build: BuildRecord,
        request: pb.BuildRequest | None,
        *,
        deadline_ms: int,
        progress: ToldProgress = lambda _stage, _fraction: None,
    ) -> None:
        """
        Args:
            request: what to build; None for a build that the node was told of before.
        """
        self._plane = plane
        self._node = node
        self._build = build
        self._request = request
        self._deadline_ms = deadline_ms
        self._progress = progress
        self._journal = Journal(plane, build.id)

    async def outcome(self) -> Outcome:
        """Follow the build to its end. Being cancelled leaves it running on its node.

        Raises:
            ControlError: the node cannot or will not carry it out.
        """
        await self._journal.open()
        upkeep = asyncio.create_task(self._upkeep(), name=f"journal of build {self._build.id}")
        try:
            return await self._follow()
        finally:
            upkeep.cancel()
            await asyncio.gather(upkeep, return_exceptions=True)
            await asyncio.shield(self._journal.flush())

    async def _follow(self) -> Outcome:
        sends = 0
        told = self._request is None
        while now_ms() < self._deadline_ms:
            try:
                if told or self._request is None:
                    events = self._node.follow_build(
                        self._build.id, from_position=self._journal.next, seconds=self._seconds_left()
                    )
                else:
                    sends += 1
                    events = self._node.build(self._request, seconds=self._seconds_left())
                outcome = await self._read(events)
                if outcome is not None:
                    return outcome
                # A build says how it ended; a node that stops may cut its words.
                told = True
                await asyncio.sleep(_PAUSE_SECONDS)
            except Conflict:
                if told:
                    raise
                told = True
            except NotFound as error:
                if not told:
                    raise
                # Nothing of it was seen, so nothing is done twice.
                if self._request is None or self._journal.next or sends >= _SENDS:
                    return pb.BuildFailed(message=RESTARTED)
                log.info("build.sent_again", build_id=self._build.id, reason=error.message)
                told = False
            except NodeTooSlow:
                break
            except (NodeUnavailable, Interrupted) as error:
                log.info("build.node_away", build_id=self._build.id, reason=error.message)
                told = True
                await self._wait_for_node()
        await self._give_up()
        minutes = self._plane.settings.build_seconds / 60
        return pb.BuildFailed(message=f"the build took longer than {minutes:g} minutes and was given up")

    async def _read(self, events: AsyncIterator[pb.BuildEvent]) -> Outcome | None:
        async for event in events:
            match event.WhichOneof("event"):
                case "log":
                    self._journal.add(event.log)
                case "logs":
                    for entry in event.logs.logs:
                        self._journal.add(entry)
                case "progress":
                    self._progress(event.progress.stage, event.progress.fraction)
                case "done":
                    return event.done
                case "failed":
                    return event.failed
        return None

    async def _wait_for_node(self) -> None:
        """
        Raises:
            NodeUnavailable: the node stays away for too long.
        """
        # The event stream notices a moment later that the node is away.
        await asyncio.sleep(_PAUSE_SECONDS)
        try:
            async with asyncio.timeout(_AWAY_SECONDS * self._plane.settings.time_scale):
                await self._node.connected.wait()
        except TimeoutError:
            raise NodeUnavailable("the node went away during the build and did not come back; start it again") from None

    async def _give_up(self) -> None:
        with contextlib.suppress(ControlError):
            await self._node.cancel_build(self._build.id)

    def _seconds_left(self) -> float:
        return max(1.0, (self._deadline_ms - now_ms()) / 1000)

    async def _upkeep(self) -> None:
        """Write down what has come, and that somebody still follows this build."""
        beats = 0.0
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            beats += _FLUSH_SECONDS
            try:
                # Not to be cut off: a batch that is half-told would be written twice.
                await asyncio.shield(self._journal.flush())
                if beats >= _HEARTBEAT_SECONDS:
                    beats = 0.0
                    await rows.change_build(
                        self._plane.store, self._build.id, statuses=["building"], changes={"updated_at": now_ms()}
                    )
            except Exception:
                # The database may be away for a moment; the entries are kept until it is back.
                log.exception("build.journal_failed", build_id=self._build.id)
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)


class Journal:
    """Log entries on their way to the store, in batches: a build may print thousands of lines a second.

    The node counts them, so that following again brings none twice.
    """

    def __init__(self, plane: Plane, build_id: str) -> None:
        self._plane = plane
        self._build_id = build_id
        self._entries: list[BuildLogRecord] = []
        self._writing = asyncio.Lock()
        self._stored = 0
        """Entries written down or about to be. As many as the node counts, unless the node has lost some."""
        self.next = 0
        """The node's position of the entry that is expected next."""

    async def open(self) -> None:
        """Go on after what the store has."""
        self._stored = self.next = await rows.count_logs(self._plane.store, self._build_id)

    def add(self, entry: pb.BuildLog) -> None:
        if entry.position < self.next:
            return
        self.next = entry.position + 1
        if self._stored > _LOG_ENTRIES:
            return
        message = entry.entry.message.replace("\0", "")[:_MESSAGE_CHARACTERS]
        level = entry.entry.level or "info"
        if self._stored == _LOG_ENTRIES:
            message, level = f"the log has more than {_LOG_ENTRIES} entries; the rest is left out", "warn"
        self._entries.append(
            BuildLogRecord(
                build_id=self._build_id,
                position=self._stored,
                timestamp_ms=entry.entry.timestamp_unix_ms or now_ms(),
                level=level,
                message=message,
                step=entry.step[:32],
            )
        )
        self._stored += 1

    async def flush(self) -> None:
        async with self._writing:
            entries, self._entries = self._entries, []
            if not entries:
                return
            try:
                if not await rows.add_logs(self._plane.store, entries):
                    log.info("build.log_dropped", build_id=self._build_id, count=len(entries))
            except Exception:
                self._entries = entries + self._entries
                raise
