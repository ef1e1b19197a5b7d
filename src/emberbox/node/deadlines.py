"""Deadlines, enforced by the node alone.

One task waits for the earliest. It wakes at least every few seconds, because deadlines are in wall-clock time and the
clock may be set.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from emberbox.node.model import now_ms

_LONGEST_SLEEP_SECONDS = 2.0


class Deadlines:
    """Calls `expired(sandbox_id)` once when a deadline has passed."""

    def __init__(self, expired: Callable[[str], None]) -> None:
        self._expired = expired
        self._heap: list[tuple[int, str]] = []
        self._current: dict[str, int] = {}
        self._changed = asyncio.Event()

    def set(self, sandbox_id: str, deadline_ms: int) -> None:
        """Set or move a sandbox's deadline."""
        if self._current.get(sandbox_id) == deadline_ms:
            return
        self._current[sandbox_id] = deadline_ms
        heapq.heappush(self._heap, (deadline_ms, sandbox_id))
        if self._heap[0] == (deadline_ms, sandbox_id):
            self._changed.set()
        if len(self._heap) > 64 + 4 * len(self._current):
            self._heap = [(when, which) for which, when in self._current.items()]
            heapq.heapify(self._heap)

    def clear(self, sandbox_id: str) -> None:
        """Forget a sandbox's deadline. Idempotent."""
        self._current.pop(sandbox_id, None)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            self._changed.clear()
            delay = self._fire()
            try:
                async with asyncio.timeout(min(delay, _LONGEST_SLEEP_SECONDS)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _fire(self) -> float:
        """Call for every deadline that has passed; returns seconds until the next."""
        now = now_ms()
        while self._heap:
            when, sandbox_id = self._heap[0]
            if self._current.get(sandbox_id) != when:
                heapq.heappop(self._heap)
            elif when > now:
                return (when - now) / 1000
            else:
                heapq.heappop(self._heap)
                del self._current[sandbox_id]
                self._expired(sandbox_id)
        return _LONGEST_SLEEP_SECONDS
