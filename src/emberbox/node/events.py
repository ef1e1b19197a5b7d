"""Fan-out of what happens by itself to every `Watch` stream.

A stream that does not keep up is ended rather than buffered without bound: its next one begins with the whole state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from emberbox.node.model import Status

_BUFFERED_EVENTS = 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """One machine's use at one time. Bytes; 100 % is one core."""

    sandbox_id: str
    timestamp_ms: int
    cpu_count: int
    cpu_used_percent: float
    memory_used: int
    memory_total: int
    memory_cache: int
    disk_used: int
    disk_total: int


Event = Status | tuple[Sample, ...]


class Subscription:
    """One stream's queue."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(_BUFFERED_EVENTS + 1)
        self.lagging = False

    def put(self, event: Event) -> None:
        if self.lagging:
            return
        if self._queue.qsize() >= _BUFFERED_EVENTS:
            self.lagging = True
            self._queue.put_nowait(None)
        else:
            self._queue.put_nowait(event)

    def end(self) -> None:
        """End the stream after what is queued."""
        if not self.lagging:
            self.lagging = True
            self._queue.put_nowait(None)

    async def next(self) -> Event | None:
        """The next event; None when the stream ends, because it lagged or the node stops."""
        return await self._queue.get()


class Events:
    """All subscriptions of the node."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    @property
    def watched(self) -> bool:
        return bool(self._subscriptions)

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """A subscription from now on. Take it before reading the state, so that no change falls between."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        if self._closed:
            subscription.end()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def publish(self, event: Event) -> None:
        for subscription in self._subscriptions:
            subscription.put(event)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()
