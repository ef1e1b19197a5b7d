"""The whole node: its parts, how they start, and what tends them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from emberbox.linux import processes
from emberbox.linux.writing import write_file
from emberbox.node.adoption import Adopted, adopt_all, sweep_files
from emberbox.node.builds import Builds
from emberbox.node.disks import Disks
from emberbox.node.errors import NodeBusy, NodeError, NoSuchSandbox
from emberbox.node.events import Events
from emberbox.node.hosting import Hosting
from emberbox.node.logs import SandboxLogs
from emberbox.node.machines import Machines
from emberbox.node.metrics import Metrics
from emberbox.node.pool import Pool
from emberbox.node.preparing import Preparing
from emberbox.node.records import Records
from emberbox.node.slots import Slots
from emberbox.node.snapshots import Snapshots
from emberbox.node.spares import Spares
from emberbox.node.tasks import Tasks
from emberbox.runtime.base import KeepsSpares, Runtime
from emberbox.settings import Settings

log = structlog.get_logger("emberbox.node")

_TEND_SECONDS = 5.0
_EVERY_TENDS = 12
"""Slow upkeep happens every so many rounds."""


class Node:
    """One host's machines. `start` adopts what an earlier process left; `close` leaves running machines alone."""

    def __init__(self, settings: Settings, runtime: Runtime, slots: Slots, disks: Disks, *, boot_id: str = "") -> None:
        self.settings = settings
        self.directory = settings.node_dir
        self.runtime = runtime
        self.slots = slots
        self.node_id = ""
        self._ready = False
        self._lock: NodeLock | None = None
        self._tasks = Tasks()
        self.events = Events()
        self.logs = SandboxLogs(
            self.directory / "logs", keep_seconds=settings.logs_keep_seconds, time_scale=settings.time_scale
        )
        self.spares = (
            Spares(
                slots,
                runtime,
                self.directory / "machines",
                count=settings.spares,
                busy=lambda: self.hosting.starting > 0 or self.machines.counts.starting > 0,
            )
            if isinstance(runtime, KeepsSpares)
            else None
        )
        self.hosting = Hosting(
            runtime,
            self.spares or slots,
            disks,
            self.directory,
            time_scale=settings.time_scale,
            ready_seconds=settings.ready_seconds,
        )
        self.preparing = Preparing(
            self.hosting, self.directory / "memories", starts_at_once=max(4, 2 * (os.cpu_count() or 1))
        )
        self.pool = Pool(
            self.hosting,
            self.preparing.warm,
            minimum=settings.warm_min,
            maximum=settings.warm_max,
            idle_seconds=settings.warm_idle_seconds,
            may_grow=self._may_grow,
            busy=lambda: self.machines.counts.starting > 0,
        )
        self.machines = Machines(
            self.hosting,
            self.preparing,
            Records(self.directory / "records"),
            self.pool,
            self.events,
            self.logs,
            saved_dir=self.directory / "saved",
            boot_id=boot_id or processes.boot_id(),
            max_machines=settings.max_machines,
        )
        self.snapshots = Snapshots(self.machines, self.directory / "snapshots")
        self.metrics = Metrics(self.machines, self.events, self.logs)
        self.builds = Builds(
            settings,
            self.hosting,
            self.preparing,
            self._layers_used,
            ready=self.pool.expect,
            removed=runtime.forget_layers,
        )

    async def start(self) -> None:
        """Adopt, sweep, and begin to work.

        Raises:
            NodeBusy: another node process works in this directory.
        """
        began = time.monotonic()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = NodeLock(self.directory / "lock")
        self.node_id = await asyncio.to_thread(_node_id, self.directory / "node-id")
        self.hosting.create_directories()
        self.logs.create_directory()
        await self.slots.start()
        adopted = await adopt_all(self.machines)
        removed = await self._sweep(adopted)
        self._tasks.start(self.machines.deadlines.run(), name="deadlines")
        self._tasks.start(self.metrics.run(), name="metrics")
        self._tasks.start(self._tend(), name="tend")
        if self.spares is not None:
            self.spares.start()
        self._ready = True
        ms = round((time.monotonic() - began) * 1000)
        log.info("node.started", adopted=len(adopted.machines), swept=removed, runtime=self.runtime.name, ms=ms)

    async def _sweep(self, adopted: Adopted) -> list[str]:
        removed = await self.runtime.sweep(frozenset(adopted.machines))
        removed += await self.slots.sweep(frozenset(adopted.slots))
        removed += await sweep_files(self.machines, adopted)
        removed += await asyncio.to_thread(self.snapshots.sweep)
        removed += await asyncio.to_thread(self.builds.sweep)
        removed += await asyncio.to_thread(lambda: self.preparing.sweep(self.builds.known()))
        return removed

    def require_ready(self) -> None:
        """Raise `NodeBusy` while the node starts or stops."""
        if not self._ready:
            raise NodeBusy("the node is starting or stopping; try again in a moment")

    async def collect_logs(self, sandbox_id: str) -> None:
        """Bring a running sandbox's log up to date."""
        try:
            sandbox = self.machines.find(sandbox_id)
        except NoSuchSandbox:
            return
        if sandbox in self.machines.running() and sandbox.hosted is not None and not sandbox.lock.locked():
            await self.logs.collect(sandbox_id, sandbox.hosted.agent)

    def _may_grow(self) -> bool:
        living = sum(1 for sandbox in self.machines.sandboxes.values() if sandbox.hosted is not None)
        return living + self.machines.counts.starting + self.pool.size < self.settings.max_machines

    async def _layers_used(self) -> AsyncIterator[str]:
        for sandbox in list(self.machines.sandboxes.values()):
            for digest in sandbox.layers:
                yield digest
        for digest in await self.snapshots.layers_used():
            yield digest

    async def _tend(self) -> None:
        round_number = 0
        while True:
            await asyncio.sleep(_TEND_SECONDS)
            round_number += 1
            try:
                await self.pool.tend()
                await self.hosting.retry_stuck()
                if round_number % _EVERY_TENDS == 0:
                    await self.builds.tend()
                    await self.logs.remove_old(frozenset(self.machines.sandboxes))
            except (NodeError, OSError) as error:
                log.error("node.tend_failed", exc_info=error)

    async def close(self) -> None:
        """Stop serving. Running and paused machines stay as they are, for the next process."""
        self._ready = False
        self.events.close()
        await self._tasks.close()
        await self.builds.close()
        await self.machines.close()
        await self.preparing.close()
        await self.pool.close()
        if self.spares is not None:
            await self.spares.close()
        await self.slots.close()
        await self.runtime.close()
        if self._lock is not None:
            self._lock.release()
        log.info("node.stopped", machines=len(self.machines.sandboxes))


class NodeLock:
    """Keeps a second node process out of the directory; the kernel lets go of it when the process ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise NodeBusy(f"another node process already works in {path.parent}; stop it first") from None

    def release(self) -> None:
        os.close(self._descriptor)


def _node_id(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        write_file(path, uuid.uuid4().hex.encode(), flush=True)
        return path.read_text().strip()
