"""Samples of every running machine, in one pass every five seconds, and of the host.

Every third pass also collects logs, so that an agent's bounded ring is emptied before it overflows.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from emberbox.node.events import Events, Sample
from emberbox.node.hosting import Hosted
from emberbox.node.logs import SandboxLogs
from emberbox.node.machines import Machines
from emberbox.node.model import now_ms
from emberbox.node.sandbox import Sandbox
from emberbox.runtime.base import MIB
from emberbox.runtime.errors import RuntimeFailure

log = structlog.get_logger("emberbox.node")

INTERVAL_SECONDS = 5.0
_LOGS_EVERY = 3
_STATS_SECONDS = 2.0
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class HostUse:
    """What the host is and has in use now."""

    cpu_count: int
    cpu_used_percent: float
    memory_bytes: int
    memory_used_bytes: int
    cpu_model: str
    cpu_architecture: str


@dataclass(slots=True)
class _Last:
    machine_id: str
    at: float
    cpu_seconds: float
    oom_kills: int


class Metrics:
    """Samples machines until its `run` is cancelled."""

    def __init__(self, machines: Machines, events: Events, logs: SandboxLogs) -> None:
        self._machines = machines
        self._events = events
        self._logs = logs
        self._last: dict[str, _Last] = {}
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._passes = 0
        self._cpu_model = _cpu_model()
        self._cpu_ticks = _cpu_ticks()
        self._cpu_percent = 0.0

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + INTERVAL_SECONDS, loop.time() + INTERVAL_SECONDS / 2)
            await asyncio.sleep(due - loop.time())
            try:
                await self.sample()
            except Exception:  # of one pass; the next one comes
                log.exception("metrics.failed")

    async def sample(self) -> None:
        """Take one sample of everything and publish it."""
        ticks = _cpu_ticks()
        busy, total = ticks[0] - self._cpu_ticks[0], ticks[1] - self._cpu_ticks[1]
        if total > 0:
            self._cpu_percent, self._cpu_ticks = round(100 * busy / total, 1), ticks
        self._passes += 1
        running = self._machines.running()
        samples = await asyncio.gather(*(self._sample(sandbox, sandbox.hosted) for sandbox in running))
        self._last = {sandbox.sandbox_id: last for sandbox in running if (last := self._last.get(sandbox.sandbox_id))}
        found = tuple(sample for sample in samples if sample is not None)
        if found:
            self._events.publish(found)

    async def _sample(self, sandbox: Sandbox, hosted: Hosted | None) -> Sample | None:
        if hosted is None:
            return None
        async with self._turn:
            try:
                async with asyncio.timeout(_STATS_SECONDS):
                    stats = await hosted.machine.stats()
            except (RuntimeFailure, OSError, TimeoutError) as error:
                log.debug("metrics.not_sampled", sandbox_id=sandbox.sandbox_id, error=str(error))
                return None
            if self._passes % _LOGS_EVERY == 0 and not sandbox.lock.locked():
                await self._logs.collect(sandbox.sandbox_id, hosted.agent)
        now = time.monotonic()
        last = self._last.get(sandbox.sandbox_id)
        if last is None or last.machine_id != hosted.spec.machine_id:
            last = None
        used = 0.0
        if last is not None and now > last.at:
            used = max(0.0, 100 * (stats.cpu_seconds - last.cpu_seconds) / (now - last.at))
        kills = stats.oom_kills - (last.oom_kills if last is not None else 0)
        if kills > 0:
            await self._logs.note(
                sandbox.sandbox_id,
                "warn",
                f"out of memory: the kernel ended {kills} process{'es' if kills > 1 else ''}; "
                f"the sandbox may use {hosted.spec.limits.memory_mb} MiB",
            )
        self._last[sandbox.sandbox_id] = _Last(hosted.spec.machine_id, now, stats.cpu_seconds, stats.oom_kills)
        limits = hosted.spec.limits
        return Sample(
            sandbox_id=sandbox.sandbox_id,
            timestamp_ms=now_ms(),
            cpu_count=limits.cpu_count,
            cpu_used_percent=round(used, 2),
            memory_used=stats.memory_used,
            memory_total=stats.memory_total or limits.memory_mb * MIB,
            memory_cache=stats.memory_cache,
            disk_used=stats.disk_used,
            disk_total=stats.disk_total or limits.disk_size_mb * MIB,
        )

    def host(self) -> HostUse:
        """The host's use; processors over the last interval."""
        memory = _meminfo()
        return HostUse(
            cpu_count=os.cpu_count() or 1,
            cpu_used_percent=self._cpu_percent,
            memory_bytes=memory.get("MemTotal", 0),
            memory_used_bytes=memory.get("MemTotal", 0) - memory.get("MemAvailable", 0),
            cpu_model=self._cpu_model,
            cpu_architecture=platform.machine(),
        )


def _cpu_ticks() -> tuple[int, int]:
    """Busy and all clock ticks of all processors since boot (proc(5), /proc/stat)."""
    with Path("/proc/stat").open() as file:
        values = [int(value) for value in file.readline().split()[1:9]]
    idle = values[3] + values[4]
    return sum(values) - idle, sum(values)


def _meminfo() -> dict[str, int]:
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""
