"""Gives memory back to the host that a guest has used once and needs no more.

A page that a guest touched stays the host's loss after the guest has freed it: only its kernel knows. The balloon, a
driver in the guest, takes free pages, Firecracker drops what is behind them, and the balloon lets go again, so that
the guest has all of its memory and the host has what lies idle. That is done for a running machine when it holds much
more than its guest says it uses, at most once a minute, and less often where it brought little.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import structlog

from emberbox.runtime.base import MIB
from emberbox.runtime.firecracker.api import Firecracker
from emberbox.runtime.firecracker.errors import ApiError, ApiUnreachable

log = structlog.get_logger(__name__)

STATISTICS_SECONDS = 30
"""How often a guest says what it has free. Each time wakes it for some microseconds."""
_WORTH = 48 * MIB
_LEFT = 24 * MIB
"""Of the free pages that the guest last told of, so many are left alone; what it needs beyond, it takes back."""
_PAUSE_SECONDS, _LONG_PAUSE_SECONDS = 60.0, 600.0
_LOOKS, _LOOK_SECONDS = 20, 0.25


class Balloon:
    """The balloon of one machine; at most one task squeezes at a time."""

    def __init__(self, api: Firecracker, machine_id: str, resident: Callable[[], int]) -> None:
        """
        Args:
            resident: bytes of the host's memory that the machine's process holds now.
        """
        self._api = api
        self._machine_id = machine_id
        self._resident = resident
        self._not_before = time.monotonic() + _PAUSE_SECONDS
        self._held = False
        self._task: asyncio.Task[None] | None = None
        self._emptying: asyncio.Task[None] | None = None

    def consider(self, resident: int, total: int) -> None:
        """Look, in the background, whether it is worth it. Cheap; called with each reading of the machine."""
        if self._held or self._task is not None or resident < _WORTH or time.monotonic() < self._not_before:
            return
        self._not_before = time.monotonic() + _PAUSE_SECONDS
        self._task = asyncio.create_task(self._squeeze(total), name=f"balloon {self._machine_id}")
        self._task.add_done_callback(self._done)

    async def hold(self) -> None:
        """End what is under way and begin nothing more: the machine is about to be paused or ended.

        Returns when the balloon has been told to be empty. A caller that is cancelled meanwhile cancels only its wait.
        """
        self._held = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._emptying is not None:
            await asyncio.wait({self._emptying})

    def release(self) -> None:
        """The machine runs again."""
        self._held = False

    async def empty(self) -> None:
        """Tell the guest that it may have all of its memory, whoever squeezed it; a failure is only logged."""
        try:
            await self._api.set_balloon(amount_mb=0)
        except (ApiError, ApiUnreachable) as error:
            log.debug("microvm.balloon_failed", machine_id=self._machine_id, reason=str(error))

    async def _squeeze(self, total: int) -> None:
        try:
            free = await self._api.free_memory()
            before = self._resident()
            if free is None or before - (total - free) < _WORTH:
                return
            try:
                await self._api.set_balloon(amount_mb=max(0, free - _LEFT) // MIB)
                await self._until_it_rests()
            finally:
                # A task of its own: whoever cancels this one must not cancel that.
                self._emptying = asyncio.create_task(self.empty(), name=f"empty balloon {self._machine_id}")
                await asyncio.shield(self._emptying)
        except (ApiError, ApiUnreachable) as error:  # the guest's driver is not up, or was not there at the save
            self._not_before = time.monotonic() + _LONG_PAUSE_SECONDS
            log.debug("microvm.balloon_failed", machine_id=self._machine_id, reason=str(error))
            return
        given = before - self._resident()
        if given < _WORTH // 2:
            self._not_before = time.monotonic() + _LONG_PAUSE_SECONDS
        log.info("microvm.memory_given_back", machine_id=self._machine_id, mib=round(given / MIB, 1))

    async def _until_it_rests(self) -> None:
        """Return when the process holds no less than a moment ago, or after some seconds."""
        last = math.inf
        for _ in range(_LOOKS):
            await asyncio.sleep(_LOOK_SECONDS)
            now = self._resident()
            if now >= last:
                return
            last = now

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("microvm.balloon_failed", machine_id=self._machine_id, exc_info=error)
