"""What a build tells: its log, how far it is, how it ended. Kept so that it can be followed from any position."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from emberbox.node.building.model import BASE_STEP, BuildEvent, LogLine, LogLines, Outcome, Progress
from emberbox.node.errors import NodeBusy
from emberbox.node.model import now_ms

_KEPT_BYTES = 16 * 1024 * 1024
_LINE_BYTES = 200
"""What a line costs besides its message."""
_LINE_CHARACTERS = 8192
_BATCH, _BATCH_CHARACTERS = 500, 200_000
_FAR_LINES = 10_000
_WAIT_SECONDS, _LONGEST_WAITS = 0.02, 500


class Journal:
    """The events of one build. The oldest log lines go first when it becomes too large."""

    def __init__(self, *, kept_bytes: int = _KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._bytes = 0
        self._lines: list[LogLine] = []
        self._progress: Progress | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self._followers: dict[object, int] = {}
        """Positions of those who listen."""
        self.outcome: Outcome | None = None
        self.step = BASE_STEP
        """Where the build is."""
        self.next = 0
        """Position of the next log line."""

    def log(self, message: str, level: str = "info") -> None:
        """Add a line of the step that the build is at; a very long one is cut."""
        if len(message) > _LINE_CHARACTERS:
            message = message[:_LINE_CHARACTERS] + "..."
        self._lines.append(LogLine(self.next, now_ms(), level, message, self.step))
        self.next += 1
        self._bytes += len(message) + _LINE_BYTES
        if self._bytes > self._kept_bytes:
            self._drop_oldest()
        self._wake()

    def progress(self, stage: str, fraction: float) -> None:
        self._progress = Progress(stage, fraction)
        self._wake()

    def end(self, outcome: Outcome) -> None:
        """Say how the build ended. The first word counts."""
        if self.outcome is None:
            self.outcome = outcome
            self._wake()

    def close(self) -> None:
        """The node stops: followers are told to come again."""
        self._closed = True
        self._wake()

    async def settle(self) -> None:
        """Wait, but not for ever, until those who follow have come near: a command may write faster than they read."""
        for _ in range(_LONGEST_WAITS):
            if not self._far():
                return
            await asyncio.sleep(_WAIT_SECONDS)
        for follower in self._far():  # not waited for again until it has moved
            self._followers[follower] = self.next

    def _far(self) -> list[object]:
        return [one for one, position in self._followers.items() if self.next - position > _FAR_LINES]

    async def follow(self, position: int = 0) -> AsyncIterator[BuildEvent]:
        """Yield log lines from `position` on and the progress as it changes; the last event is the outcome.

        Raises:
            NodeBusy: the node stops before the build has ended.
        """
        follower = object()
        self._followers[follower] = position
        try:
            async for event in self._follow(follower, position):
                yield event
        finally:
            del self._followers[follower]

    async def _follow(self, follower: object, position: int) -> AsyncIterator[BuildEvent]:
        told: Progress | None = None
        while True:
            changed = self._changed
            while batch := self._after(position):
                position = self._followers[follower] = batch[-1].position + 1
                yield LogLines(batch)
            if self._progress is not None and self._progress is not told:
                told = self._progress
                yield told
            if self.outcome is not None and position >= self.next:
                yield self.outcome
                return
            if self._closed:
                raise NodeBusy("the node stops; follow the build again in a moment")
            if changed is self._changed:
                await changed.wait()

    def _after(self, position: int) -> tuple[LogLine, ...]:
        """The next lines from there on, not more than go into one message."""
        if not self._lines or position >= self.next:
            return ()
        start = max(0, position - self._lines[0].position)
        end, size = start, 0
        while end < min(start + _BATCH, len(self._lines)) and size < _BATCH_CHARACTERS:
            size += len(self._lines[end].message)
            end += 1
        return tuple(self._lines[start:end])

    def _drop_oldest(self) -> None:
        """Make room for a while: dropping from the front of a list costs as much for one as for many."""
        gone = 0
        while self._bytes > self._kept_bytes * 0.9 and gone < len(self._lines) - 1:
            self._bytes -= len(self._lines[gone].message) + _LINE_BYTES
            gone += 1
        del self._lines[:gone]

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class LineCutter:
    """Cuts a command's output into lines: at line feeds, and at the carriage returns of progress bars."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that are whole now."""
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if len(self._rest) > _LINE_CHARACTERS:
            lines.append(self._rest)
            self._rest = b""
        return [text for line in lines if (text := line.decode(errors="replace").rstrip())]

    def rest(self) -> list[str]:
        """What came after the last line feed."""
        text, self._rest = self._rest.decode(errors="replace").rstrip(), b""
        return [text] if text else []
