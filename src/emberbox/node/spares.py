"""Spares: machines' processes that wait, jailed and in a slot, before it is known what they will run.

Much of a start does not depend on what is started: the jail, its user and control group, the process and its API. Where
the runtime can (`KeepsSpares`), a few are made ahead, off the request's path. What starts next takes the slot of one,
and with it the machine that waits there; without a spare a slot is empty, and the runtime does everything then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from emberbox.node.errors import NodeError
from emberbox.node.files import remove_tree
from emberbox.node.hosting import SlotSource
from emberbox.node.model import Network
from emberbox.node.tasks import Tasks, finish
from emberbox.runtime.base import KeepsSpares, Slot, new_machine_id
from emberbox.runtime.errors import RuntimeFailure

log = structlog.get_logger("emberbox.node")

_RETRY_SECONDS = 5.0
_QUIET_SECONDS = 0.05
_LONGEST_WAITS = 100
"""A spare waits for starts under way, at most this many times `_QUIET_SECONDS`."""


class Spares:
    """A `SlotSource` that hands out slots with spares in them first. Nothing is made before `start`."""

    def __init__(
        self,
        slots: SlotSource,
        runtime: KeepsSpares,
        machines_dir: Path,
        *,
        count: int,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            machines_dir: where each machine has its directory.
            count: spares kept.
            busy: true while machines start, whose processor time a new spare would take.
        """
        self._slots = slots
        self._runtime = runtime
        self._machines_dir = machines_dir
        self._count = count
        self._busy = busy
        self._ready: deque[Slot] = deque()
        self._wanted = asyncio.Event()
        self._tasks = Tasks()

    @property
    def machine_ids(self) -> frozenset[str]:
        return frozenset(slot.spare for slot in self._ready)

    def start(self) -> None:
        """Begin to keep spares. After the sweep of what an earlier process left."""
        self._wanted.set()
        self._tasks.start(self._refill(), name="spares.refill")

    async def close(self) -> None:
        """End every spare and give its slot back."""
        await self._tasks.close()
        while self._ready:
            await self._discard(self._ready.popleft())

    # ---- a source of slots

    async def take(self) -> Slot:
        """A slot, with a spare in it where one waits. See `Slots.take`."""
        slot = self._ready.popleft() if self._ready else await self._slots.take()
        self._wanted.set()
        return slot

    async def give_back(self, slot: Slot) -> None:
        """Take a slot apart, and its spare if nothing was started with it."""
        if slot.spare:
            await self._runtime.end_spare(slot.spare)
        await self._slots.give_back(slot)

    async def adopt(self, index: int) -> Slot:
        return await self._slots.adopt(index)

    async def apply(self, slot: Slot, policy: Network) -> None:
        await self._slots.apply(slot, policy)

    async def shape(self, slot: Slot, mbit_per_second: int) -> None:
        await self._slots.shape(slot, mbit_per_second)

    # ---- making

    async def _refill(self) -> None:
        told = ""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while len(self._ready) < self._count:
                await self._quiet()
                try:
                    await finish(self._add())
                    told = ""
                except (NodeError, RuntimeFailure, OSError) as error:
                    if str(error) != told:  # a node whose slots are all in use is not in trouble
                        log.warning("spares.not_refilled", error=str(error))
                    told = str(error)
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _quiet(self) -> None:
        for _ in range(_LONGEST_WAITS):
            await asyncio.sleep(_QUIET_SECONDS)
            if not self._busy():
                return

    async def _add(self) -> None:
        slot = replace(await self._slots.take(), spare=new_machine_id())
        directory = self._machines_dir / slot.spare
        try:
            await asyncio.to_thread(directory.mkdir, mode=0o700)
            await self._runtime.make_spare(slot.spare, directory, slot)
        except BaseException:
            await self._discard(slot)
            raise
        self._ready.append(slot)

    async def _discard(self, slot: Slot) -> None:
        try:
            await self.give_back(slot)
        except (NodeError, RuntimeFailure) as error:
            log.error("spare.not_discarded", machine_id=slot.spare, error=str(error))
        await remove_tree(self._machines_dir / slot.spare)
