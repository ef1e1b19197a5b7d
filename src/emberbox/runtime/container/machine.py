"""A running container: freezer, limits, readings, saving, the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import structlog

from emberbox.linux import processes
from emberbox.linux.processes import ProcessId
from emberbox.linux.sparse import clone
from emberbox.runtime.base import Limits, MachineSpec, Rates, Saved, Stats
from emberbox.runtime.container.cgroups import Cgroup
from emberbox.runtime.container.oci import OciRuntime
from emberbox.runtime.container.root import Root
from emberbox.runtime.errors import MachineGone, NotSupported, RuntimeFailure
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.runtime")

NAME = "container"
_UPPER = "upper.ext4"
_SAVING = "saving"
"""Marks, in the machine's folder, that it was stopped only to be saved."""
_LOG_BYTES = 1024 * 1024
_END_SECONDS = 10.0


class Container:
    """One machine. Found again by the pid and start time of its first process."""

    def __init__(self, spec: MachineSpec, process: ProcessId, root: Root, cgroup: Cgroup, oci: OciRuntime) -> None:
        self.spec = spec
        self.address: IPv4Address = spec.slot.address
        self._process = process
        self._root = root
        self._cgroup = cgroup
        self._oci = oci
        self._limits = spec.limits
        self._one_save = asyncio.Lock()

    def record(self) -> dict[str, Any]:
        return {"pid": self._process.pid, "started": self._process.started}

    async def alive(self) -> bool:
        return processes.is_alive(self._process)

    async def wait(self) -> str:
        await processes.wait_for_end(self._process)
        with contextlib.suppress(OSError):
            if (await asyncio.to_thread(self._cgroup.read)).oom_kills:
                return f"the machine ran out of its {self._limits.memory_mb} MiB of memory"
        return "the machine's first process ended"

    def answered(self) -> None:
        """Nothing to note: a container's pages are the host's own."""

    async def set_limits(self, limits: Limits) -> None:
        """Change cpu, memory and pids at once. The size of the disk cannot change, and rates have `set_rates`."""
        try:
            await asyncio.to_thread(self._cgroup.set_limits, limits)
        except FileNotFoundError:
            raise MachineGone("the machine has ended") from None
        except OSError as error:
            raise RuntimeFailure(f"the limits could not be set: {error}") from error
        self._limits = limits

    async def set_rates(self, rates: Rates) -> None:
        try:
            await to_thread_whole(self._cgroup.set_rates, rates, self._root.disk)
        except (FileNotFoundError, PermissionError):  # the latter says of a folder that is there: no file of this name
            if not await self.alive():
                raise MachineGone("the machine has ended") from None
            raise RuntimeFailure(
                "the disk cannot be limited: this host's control groups lack the controller for it (blkio, or io in "
                "version 2)"
            ) from None
        except OSError as error:
            raise RuntimeFailure(f"the disk's rates could not be set: {error}") from error

    async def pause(self) -> None:
        try:
            await self._freeze()
        except FileNotFoundError:
            raise MachineGone("the machine has ended") from None

    async def resume(self) -> None:
        try:
            await self._thaw()
        except FileNotFoundError:
            raise MachineGone("the machine has ended") from None

    async def _freeze(self) -> None:
        """Stop every process. One that waits for its turn at the disk does not stop, so all get theirs before.

        All go on as before when this fails or is cancelled.
        """
        try:
            await self._try_rates(Rates())
            await self._cgroup.freeze()
        except BaseException:
            with contextlib.suppress(RuntimeFailure, OSError):  # what went wrong first says more
                await asyncio.shield(self._thaw())
            raise

    async def _thaw(self) -> None:
        try:
            await self._try_rates(self.spec.limits.rates)
        finally:
            await self._cgroup.thaw()

    async def _try_rates(self, rates: Rates) -> None:
        """Of a machine that has rates. Where its disk cannot be limited any more, it goes on without.

        Raises:
            MachineGone
        """
        if not self.spec.limits.rates.limit_disk:
            return
        try:
            await self.set_rates(rates)
        except MachineGone:
            raise
        except RuntimeFailure as error:
            log.warning("container.rates_not_set", machine_id=self.spec.machine_id, reason=str(error))

    async def save(
        self,
        into: Path,
        *,
        memory: bool,
        final: bool = False,
        lasting: bool = True,
        resuming: Callable[[], None] = lambda: None,
    ) -> Saved:
        """Copy the upper. The machine stands still for as long as that takes."""
        if memory:
            raise NotSupported("containers cannot save their memory; save the files only")
        async with self._one_save:
            if not await self.alive():
                raise MachineGone("the machine has ended")
            target = into / _UPPER
            marker = self.spec.directory / _SAVING
            try:
                await to_thread_whole(self._root.trim)
                frozen_before = await asyncio.to_thread(self._cgroup.is_frozen)
                if not frozen_before:
                    await asyncio.to_thread(marker.touch)
                    await self._freeze()
                try:
                    await to_thread_whole(self._copy_upper, target)
                finally:
                    if not frozen_before:
                        await self._thaw()
            except BaseException as error:
                await to_thread_whole(target.unlink, missing_ok=True)
                if isinstance(error, OSError):
                    raise RuntimeFailure(f"the machine's disk could not be saved: {error}") from error
                raise
            finally:
                await asyncio.to_thread(marker.unlink, missing_ok=True)
        return Saved(runtime=NAME, directory=into, upper=target, memory=False)

    def _copy_upper(self, target: Path) -> None:
        with self._root.quiet():
            clone(self.spec.upper, target)

    async def recover(self) -> None:
        """After a crash of the node: finish what a pause or a save had begun."""
        await asyncio.to_thread(self._root.wake)
        marker = self.spec.directory / _SAVING
        if marker.exists():
            await self._thaw()
            marker.unlink()
        elif not await asyncio.to_thread(self._cgroup.is_frozen):
            await self._try_rates(self.spec.limits.rates)

    async def stats(self) -> Stats:
        try:
            reading = await asyncio.to_thread(self._cgroup.read)
            disk = await asyncio.to_thread(self._read_disk)
        except OSError:
            raise MachineGone("the machine has ended") from None
        return Stats(
            cpu_seconds=reading.cpu_seconds,
            memory_used=reading.memory_used,
            memory_total=min(reading.memory_total, self._limits.memory_mb * 1024 * 1024),
            memory_cache=reading.memory_cache,
            disk_used=(disk.f_blocks - disk.f_bfree) * disk.f_frsize,
            disk_total=disk.f_blocks * disk.f_frsize,
            oom_kills=reading.oom_kills,
        )

    def _read_disk(self) -> os.statvfs_result:
        agent_log = self._root.upper / "agent.log"
        with contextlib.suppress(FileNotFoundError):
            if agent_log.stat().st_size > _LOG_BYTES:
                os.truncate(agent_log, 0)  # it is written in append mode
        return os.statvfs(self._root.upper)

    async def destroy(self) -> None:
        await end_container(self.spec.machine_id, self._process, self._root, self._cgroup, self._oci)


async def end_container(
    machine_id: str, process: ProcessId | None, root: Root, cgroup: Cgroup, oci: OciRuntime
) -> None:
    """End every process and remove every trace. Idempotent, and right for half-made containers.

    Args:
        process: the machine's first process; None when it is not known. All others end with it.

    Raises:
        RuntimeFailure: a process could not be ended.
    """
    with contextlib.suppress(OSError):
        await asyncio.to_thread(cgroup.lift_rates)  # a process that waits for its turn at the disk cannot die
    if process is not None:
        await _end_process(process, cgroup)
        await oci.forget(machine_id)
    else:
        await to_thread_whole(_kill_members, cgroup)
        await oci.delete(machine_id)
    await to_thread_whole(cgroup.remove)
    await to_thread_whole(root.remove)


async def _end_process(process: ProcessId, cgroup: Cgroup) -> None:
    processes.kill(process)
    with contextlib.suppress(OSError):
        await asyncio.to_thread(cgroup.request_freeze, False)  # a frozen process cannot die
    try:
        async with asyncio.timeout(_END_SECONDS):
            await processes.wait_for_end(process)
    except TimeoutError:
        raise RuntimeFailure(f"the machine's processes did not end within {_END_SECONDS:g} s") from None


def _kill_members(cgroup: Cgroup) -> None:
    for pid in cgroup.members():
        identity = processes.identify(pid)
        if identity is not None:
            processes.kill(identity)
    with contextlib.suppress(OSError):
        cgroup.request_freeze(False)  # a frozen process cannot die
