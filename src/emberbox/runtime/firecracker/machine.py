"""One microVM: what `runtime.base.Machine` asks, done with its Firecracker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import structlog

from emberbox.linux import processes, sparse
from emberbox.runtime.base import MIB, Limits, MachineSpec, Rates, Saved, Stats
from emberbox.runtime.errors import MachineGone, NotSupported, RuntimeFailure
from emberbox.runtime.firecracker import snapshots, working_set
from emberbox.runtime.firecracker.api import Firecracker, RateLimit
from emberbox.runtime.firecracker.balloon import Balloon
from emberbox.runtime.firecracker.chain import Chain, link_whole
from emberbox.runtime.firecracker.errors import ApiError, ApiUnreachable
from emberbox.runtime.firecracker.jail import OUT, Jail, cgroup_version
from emberbox.threads import to_thread_whole

log = structlog.get_logger(__name__)

NAME = "firecracker"
UPPER = "upper"
"""The drive that the guest writes."""
_END_SECONDS = 10.0
_LONGEST_CHAIN = 4
"""Pieces of memory behind a running machine; the changes among more are merged, off every request's path."""
_MOST_PIECES = 12
"""A save that makes more merges them itself: of a machine that never runs as long as `shorten_soon` waits."""
_SHORTEN_AFTER_SECONDS = 3.0
"""The request that made the chain long, a fork's above all, still has work to do that merging would slow down."""
_CONSOLE_LOGGED = 8000
"""Bytes of the console that are logged when a machine ended by itself: a panic of the guest's kernel with its trace."""
_CONSOLE_TOLD = 300


class MicroVM:
    """A running or paused microVM. Made by `FirecrackerRuntime`; one task at a time changes its state."""

    def __init__(
        self,
        spec: MachineSpec,
        jail: Jail,
        identity: processes.ProcessId,
        api: Firecracker,
        chain: Chain,
        *,
        firecracker_version: str,
        trusted: snapshots.Trusted,
        paused: bool,
        after_save: Callable[[Saved], None],
        note_into: Path | None = None,
    ) -> None:
        """
        Args:
            note_into: the folder of the saved machine that this one was restored from, when what it touches until it
                answers is not known yet.
        """
        self.spec = spec
        self.address: IPv4Address = spec.slot.address
        self._jail = jail
        self._identity = identity
        self._api = api
        self._chain = chain
        self._version = firecracker_version
        self._trusted = trusted
        self._paused = paused
        self._in_background = spec.background
        self._after_save = after_save
        self._balloon = Balloon(api, spec.machine_id, lambda: _resident(identity.pid))
        self._note_into = note_into
        self._noting: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._shortening: asyncio.Task[None] | None = None

    @property
    def paused(self) -> bool:
        return self._paused

    def record(self) -> dict[str, Any]:
        return {"pid": self._identity.pid, "started": self._identity.started, "user": self._jail.user}

    async def alive(self) -> bool:
        return processes.is_alive(self._identity)

    async def wait(self) -> str:
        await processes.wait_for_end(self._identity)
        console = await asyncio.to_thread(self._jail.last_words, _CONSOLE_LOGGED)
        # The console's file goes with the machine; a panic of the guest's kernel is told nowhere else.
        log.warning("microvm.ended", machine_id=self.spec.machine_id, console=console)
        return f"the microVM ended; the last of its console: {console[-_CONSOLE_TOLD:]}"

    def answered(self) -> None:
        if self._note_into is not None and self._noting is None:
            self._noting = asyncio.create_task(self._note(self._note_into), name=f"note {self.spec.machine_id}")

    async def _note(self, folder: Path) -> None:
        """Write down what this restore touched, for the next one."""
        memory = folder / self._chain.pieces[0].name
        try:
            ranges = await to_thread_whole(working_set.record, self._identity.pid, memory, folder)
        except OSError as error:
            log.warning("microvm.working_set_unknown", machine_id=self.spec.machine_id, reason=str(error))
            return
        size = sum(length for _, length in ranges)
        log.info("microvm.working_set", folder=folder.name, ranges=len(ranges), mib=round(size / MIB, 1))

    async def set_limits(self, limits: Limits) -> None:
        if limits != self.spec.limits:
            raise NotSupported("a microVM's limits are its template's and cannot be changed while it runs")

    async def set_rates(self, rates: Rates) -> None:
        """Of the upper. A memory saved afterwards carries them."""
        async with self._changing:
            await self._ask(self._api.limit_drive(UPPER, *buckets(rates)))

    async def pause(self) -> None:
        async with self._changing:
            await self._pause()

    async def resume(self) -> None:
        async with self._changing:
            await self._resume()

    async def save(
        self,
        into: Path,
        *,
        memory: bool,
        final: bool = False,
        lasting: bool = True,
        resuming: Callable[[], None] = lambda: None,
    ) -> Saved:
        """Write disk and, when `memory`, processes. A running machine stands still only while its state is taken."""
        async with self._changing:
            if not processes.is_alive(self._identity):
                raise MachineGone(f"the microVM {self.spec.machine_id} has ended and cannot be saved")
            if memory:
                return await self._save_with_memory(into, final=final, lasting=lasting, resuming=resuming)
            return await self._save_disk(into)

    async def stats(self) -> Stats:
        stats = await asyncio.to_thread(self._read_stats)
        if not self._paused:
            self._balloon.consider(stats.memory_used, stats.memory_total)
        return stats

    async def destroy(self) -> None:
        await self._balloon.hold()
        for task in (self._shortening, self._noting):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        async with self._changing:
            await asyncio.to_thread(self._end)

    async def settle(self) -> None:
        """Undo what a node process that ended in the middle may have left in a machine that runs."""
        await self._balloon.empty()

    # ---- state ----

    async def _pause(self) -> None:
        try:
            await self._balloon.hold()
            await self._ask(self._api.pause())
        except BaseException:
            self._balloon.release()
            raise
        self._paused = True

    async def _resume(self, *, after_save: bool = False) -> None:
        if self._in_background:
            await asyncio.to_thread(self._jail.come_forward)
            self._in_background = False
        await self._ask(self._api.resume(after_save=after_save))
        self._paused = False
        self._balloon.release()

    async def _ask(self, request: Any) -> None:
        """Await an API request; a machine that has ended is told apart from one that does not answer."""
        try:
            await request
        except ApiUnreachable as error:
            if not processes.is_alive(self._identity):
                words = self._jail.last_words(300)
                raise MachineGone(f"the microVM {self.spec.machine_id} has ended: {words}") from error
            raise

    # ---- saving ----

    async def _save_disk(self, into: Path) -> Saved:
        was_running = not self._paused
        try:
            if was_running:
                await self._pause()
            await asyncio.to_thread(sparse.clone, self.spec.upper, into / snapshots.UPPER)
        finally:
            if was_running:
                await self._resume()
        return Saved(runtime=NAME, directory=into, upper=into / snapshots.UPPER, memory=False)

    async def _save_with_memory(self, into: Path, *, final: bool, lasting: bool, resuming: Callable[[], None]) -> Saved:
        below = self._chain.pieces
        name = snapshots.next_name(below)
        was_running = not self._paused
        began = time.perf_counter()
        try:
            self._chain.mark_unsure()
            # Firecracker would merge a diff into a file that is there, left by a save that nobody waited for.
            await to_thread_whole(self._discard, name)
            stopped = time.perf_counter()
            if was_running:
                await self._pause()
            await self._ask(
                self._api.create_snapshot(
                    "Diff" if below else "Full", state=f"/{OUT}/{snapshots.STATE}", memory=f"/{OUT}/{name}"
                )
            )
            written = time.perf_counter()
            # After it: a write that Firecracker does between the two is one that the saved memory asks for again.
            await to_thread_whole(self._keep_disk, into / snapshots.UPPER, final=final)
        except OSError as error:
            await to_thread_whole(self._discard, name)
            raise RuntimeFailure(f"the machine's disk could not be copied: {error.strerror}") from error
        except ApiError as error:
            await to_thread_whole(self._discard, name)
            raise RuntimeFailure(f"the machine's memory could not be saved: {error.fault}") from error
        except BaseException:
            await to_thread_whole(self._discard, name)
            raise
        finally:
            if was_running and processes.is_alive(self._identity):
                resuming()
                await self._resume(after_save=True)
        still = time.perf_counter() - stopped
        await to_thread_whole(self._finish, into, below, name, final=final, lasting=lasting)
        log.info(
            "microvm.saved",
            machine_id=self.spec.machine_id,
            whole=not below,
            memory_ms=round((written - stopped) * 1000, 1),
            still_ms=round(still * 1000, 1),
            ms=round((time.perf_counter() - began) * 1000, 1),
        )
        saved = Saved(runtime=NAME, directory=into, upper=into / snapshots.UPPER, memory=True)
        self._after_save(saved)
        if was_running:  # one that was paused for this is about to end
            self.shorten_soon()
        return saved

    def _keep_disk(self, target: Path, *, final: bool) -> None:
        """Copy the disk; a machine that ends, and never writes to it again, just leaves it."""
        if final:
            with contextlib.suppress(OSError):  # on another file system
                os.link(self.spec.upper, target)
                os.chown(target, 0, 0)  # Firecracker has it open; nobody of that user opens it again
                return
        sparse.clone(self.spec.upper, target)

    def shorten_soon(self) -> None:
        """Merge what lies behind the machine in the background when it has become long."""
        if len(self._chain.pieces) >= _LONGEST_CHAIN and self._shortening is None:
            self._shortening = asyncio.create_task(self._shorten_chain(), name=f"shorten {self.spec.machine_id}")

    async def _shorten_chain(self) -> None:
        """Merge the changes behind the machine into one, without keeping it from being saved meanwhile."""
        try:
            await asyncio.sleep(_SHORTEN_AFTER_SECONDS)
            before = self._chain.pieces
            merged = await to_thread_whole(self._chain.merge, before[1:])
            async with self._changing:
                after = await to_thread_whole(self._chain.replace_merged, before[1:], merged)
                if after is not None:
                    self._trusted.add(self._chain.path(merged), merged.checksum)
                if after == (before[0], merged):
                    self._trusted.rename_held(before, (before[0], merged), self._chain.folder / snapshots.WHOLE)
        except OSError as error:
            log.warning("microvm.chain_not_shortened", machine_id=self.spec.machine_id, reason=str(error))
        finally:
            self._shortening = None

    def _discard(self, name: str) -> None:
        """Remove what a failed save left; the chain stays marked, so the next save is a whole one."""
        for path in (self._jail.out / snapshots.STATE, self._jail.out / name):
            with contextlib.suppress(OSError):
                path.unlink()

    def _finish(self, into: Path, below: tuple[snapshots.Piece, ...], name: str, *, final: bool, lasting: bool) -> None:
        """Take the files out of the jail, away from the machine's user, and write the manifest over them.

        The chain of a machine that ends is left as it is; should it go on nevertheless, its next save is a whole one.
        """
        for made in (snapshots.STATE, name):
            self._jail.take_out(made, into)
        if not below:
            sparse.dig_holes(into / name)
        for piece in below:
            os.link(self._chain.path(piece), into / piece.name)
        if below:
            link_whole(self._chain.folder, into)
        # First: while ext4 finds places for what is not on the disk yet, Linux before 6.9 may call it a hole.
        # The memory in any case: a later save that must last has this piece, too, and does not flush it again.
        for made in (name, snapshots.STATE, snapshots.UPPER) if lasting else (name,):
            sparse.flush(into / made)
        # A hole in changes says that nothing changed there; in the memory below them it is zeros.
        kind = sparse.LAYOUT if below else sparse.CONTENTS
        pieces = (*below, snapshots.Piece(name, sparse.checksum(into / name, kind)))
        if len(pieces) > _MOST_PIECES:
            pieces = snapshots.merge_changes(into, pieces)
        snapshots.Manifest(
            firecracker=self._version,
            cpu_count=self.spec.limits.cpu_count,
            memory_mb=self.spec.limits.memory_mb,
            layers=len(self.spec.layers),
            pieces=pieces,
            state_checksum=sparse.checksum(into / snapshots.STATE),
        ).write(into, flush=lasting)
        self._trusted.add(into / pieces[-1].name, pieces[-1].checksum)
        if not final:
            self._chain.replace(pieces, into)

    # ---- end and numbers ----

    def _end(self) -> None:
        if not processes.end_and_wait(self._identity, _END_SECONDS):
            raise RuntimeFailure(f"the microVM {self.spec.machine_id} (pid {self._identity.pid}) does not end")
        self._jail.remove()

    def _read_stats(self) -> Stats:
        total = self.spec.limits.memory_mb * MIB
        return Stats(
            cpu_seconds=_cpu_seconds(self._identity.pid),
            memory_used=min(total, _resident(self._identity.pid)),
            memory_total=total,
            memory_cache=0,
            disk_used=sparse.allocated(self.spec.upper),
            disk_total=self.spec.limits.disk_size_mb * MIB,
            oom_kills=_oom_kills(self._jail),
        )


def buckets(rates: Rates) -> tuple[RateLimit | None, RateLimit | None]:
    """A drive's bytes and operations. Reading and writing share them; a second's worth may come at once."""
    size, operations = rates.disk_mb_per_second * MIB, rates.disk_operations_per_second
    return (
        RateLimit(size, refill_ms=1000) if size else None,
        RateLimit(operations, refill_ms=1000) if operations else None,
    )


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _oom_kills(jail: Jail) -> int:
    name = "memory.events" if cgroup_version() == 2 else "memory.oom_control"
    for folder in jail.cgroups():
        try:
            lines = (folder / name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0
