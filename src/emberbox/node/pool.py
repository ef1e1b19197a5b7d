"""The warm pool: started, unclaimed machines, a few for each template in use.

A shelf holds the machines of one build with the same limits. It grows when creates come faster than it refills, is
refilled off the request's path, and shrinks when nobody asks. Entries wait restored and paused where the runtime has
memory snapshots, started elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import astuple, dataclass, field

import structlog

from emberbox.node.errors import NodeError
from emberbox.node.hosting import Hosted, Hosting
from emberbox.node.model import Image
from emberbox.node.tasks import Tasks
from emberbox.runtime.base import Limits, Rates
from emberbox.runtime.errors import RuntimeFailure

log = structlog.get_logger("emberbox.node")

_REFILLS_AT_ONCE = 2
_DEMAND_SECONDS = 30.0
"""A shelf aims at what was claimed in this time, within its bounds."""
_FAILURE_PAUSE_SECONDS = 5.0
_QUIET_SECONDS = 0.02
"""A refill waits for this long a time without a create, so that it does not take the create's processor time."""
_LONGEST_WAITS = 100


@dataclass(frozen=True, slots=True)
class PoolKey:
    build_id: str
    cpu_count: int
    memory_mb: int
    disk_size_mb: int
    rates: Rates

    @classmethod
    def of(cls, image: Image, limits: Limits) -> PoolKey:
        return cls(image.build_id, limits.cpu_count, limits.memory_mb, limits.disk_size_mb, limits.rates)

    def __str__(self) -> str:
        """A folder's name. Without rates it is what it was before there were any, and what lies there is found."""
        name = f"{self.build_id}-{self.cpu_count}-{self.memory_mb}-{self.disk_size_mb}"
        return name if self.rates == Rates() else "-".join((name, *map(str, astuple(self.rates))))


@dataclass(slots=True)
class Entry:
    hosted: Hosted
    watch: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Shelf:
    image: Image
    limits: Limits
    ready: deque[Entry] = field(default_factory=deque)
    refilling: int = 0
    claims: deque[float] = field(default_factory=deque)
    last_claim: float = 0.0
    rest_until: float = 0.0


class Pool:
    """Warm machines, by `PoolKey`."""

    def __init__(
        self,
        hosting: Hosting,
        prepare: Callable[[Image, Limits], Awaitable[Hosted]],
        *,
        minimum: int,
        maximum: int,
        idle_seconds: float,
        may_grow: Callable[[], bool] = lambda: True,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            prepare: brings up one machine of an image, ready for a claim.
            minimum, maximum: machines kept for each template in use.
            idle_seconds: a template is in use until this long after its last create.
            may_grow: false while the node has no room for unclaimed machines.
            busy: true while creates are under way.
        """
        self._hosting = hosting
        self._prepare = prepare
        self._minimum = min(minimum, maximum)
        self._maximum = maximum
        self._idle_seconds = idle_seconds
        self._may_grow = may_grow
        self._busy = busy
        self._shelves: dict[PoolKey, Shelf] = {}
        self._tasks = Tasks()
        self._turn = asyncio.Semaphore(_REFILLS_AT_ONCE)
        self._last_create = 0.0
        self._closed = False

    @property
    def size(self) -> int:
        """Machines that wait, of all templates."""
        return sum(len(shelf.ready) for shelf in self._shelves.values())

    @property
    def machine_ids(self) -> frozenset[str]:
        return frozenset(entry.hosted.spec.machine_id for shelf in self._shelves.values() for entry in shelf.ready)

    def take(self, image: Image, limits: Limits) -> Hosted | None:
        """Hand out a warm machine, or None when none waits. Notes the demand either way."""
        if self._maximum == 0 or self._closed:
            return None
        key = PoolKey.of(image, limits)
        shelf = self._shelves.setdefault(key, Shelf(image, limits))
        now = time.monotonic()
        shelf.last_claim = self._last_create = now
        shelf.claims.append(now)
        while len(shelf.claims) > self._maximum:
            shelf.claims.popleft()
        entry = shelf.ready.popleft() if shelf.ready else None
        self._refill(key, shelf)
        if entry is None:
            return None
        if entry.watch is not None:
            entry.watch.cancel()
        return entry.hosted

    def expect(self, image: Image, limits: Limits) -> None:
        """A template was just built and is about to be used: have its first machine ready."""
        if self._maximum and not self._closed:
            shelf = self._shelves.setdefault(PoolKey.of(image, limits), Shelf(image, limits))
            shelf.last_claim = time.monotonic()
            self._refill(PoolKey.of(image, limits), shelf)

    def _target(self, shelf: Shelf, now: float) -> int:
        if now - shelf.last_claim > self._idle_seconds:
            return 0
        recent = sum(1 for claim in shelf.claims if now - claim <= _DEMAND_SECONDS)
        return max(self._minimum, min(recent, self._maximum))

    def _refill(self, key: PoolKey, shelf: Shelf) -> None:
        now = time.monotonic()
        if self._closed or now < shelf.rest_until or not self._may_grow():
            return
        for _ in range(self._target(shelf, now) - len(shelf.ready) - shelf.refilling):
            shelf.refilling += 1
            self._tasks.start(self._add(key, shelf), name=f"pool.refill {key}")

    async def _add(self, key: PoolKey, shelf: Shelf) -> None:
        try:
            async with self._turn:
                await self._quiet()
                if self._target(shelf, time.monotonic()) <= len(shelf.ready) or not self._may_grow():
                    return
                started = time.monotonic()
                hosted = await self._prepare(shelf.image, shelf.limits)
        except (NodeError, RuntimeFailure, OSError) as error:
            shelf.rest_until = time.monotonic() + _FAILURE_PAUSE_SECONDS
            log.warning("pool.refill_failed", build_id=key.build_id, error=str(error))
            return
        finally:
            shelf.refilling -= 1
        log.debug("pool.added", build_id=key.build_id, ms=round((time.monotonic() - started) * 1000))
        if self._closed or self._shelves.get(key) is not shelf:
            await self._hosting.end(hosted)
            return
        entry = Entry(hosted)
        entry.watch = self._tasks.start(self._watch(shelf, entry), name="pool.watch")
        shelf.ready.append(entry)

    async def _quiet(self) -> None:
        """Let creates under way go first, for a short time."""
        for _ in range(_LONGEST_WAITS):
            rest = self._last_create + _QUIET_SECONDS - time.monotonic()
            if rest <= 0 and not self._busy():
                return
            await asyncio.sleep(max(rest, _QUIET_SECONDS))

    async def _watch(self, shelf: Shelf, entry: Entry) -> None:
        """Take a machine that died out of the pool."""
        reason = await entry.hosted.machine.wait()
        if entry in shelf.ready:
            shelf.ready.remove(entry)
            log.warning("pool.machine_died", machine_id=entry.hosted.spec.machine_id, reason=reason)
            await self._hosting.end(entry.hosted)

    async def tend(self) -> None:
        """Shrink what nobody asks for and refill what is short; called every few seconds."""
        now = time.monotonic()
        for key, shelf in list(self._shelves.items()):
            target = self._target(shelf, now)
            while len(shelf.ready) > target:
                await self._drop(shelf)
            if target == 0 and not shelf.refilling:
                self._shelves.pop(key, None)
            else:
                self._refill(key, shelf)

    async def make_room(self) -> bool:
        """End one waiting machine, of the template asked for least recently; False when none waits."""
        shelves = [shelf for shelf in self._shelves.values() if shelf.ready]
        if not shelves:
            return False
        await self._drop(min(shelves, key=lambda shelf: shelf.last_claim))
        return True

    async def forget(self, build_id: str) -> None:
        """End every waiting machine of a build that is deleted."""
        for key in [key for key in self._shelves if key.build_id == build_id]:
            shelf = self._shelves.pop(key)
            while shelf.ready:
                await self._drop(shelf)

    async def _drop(self, shelf: Shelf) -> None:
        entry = shelf.ready.popleft()
        if entry.watch is not None:
            entry.watch.cancel()
        await self._hosting.end(entry.hosted)

    async def close(self) -> None:
        """End every waiting machine."""
        self._closed = True
        await self._tasks.close()
        for shelf in self._shelves.values():
            while shelf.ready:
                await self._drop(shelf)
        self._shelves.clear()
