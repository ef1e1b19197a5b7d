"""The Firecracker runtime: starts, restores, finds again and sweeps up microVMs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog

from emberbox.linux import processes, taps
from emberbox.runtime.base import Capabilities, Limits, MachineSpec, Saved, Slot
from emberbox.runtime.errors import RuntimeFailure, SavedDamaged, SavedUnfit
from emberbox.runtime.firecracker import balloon, changes, guest, jail, snapshots, working_set
from emberbox.runtime.firecracker.api import Deadlines, Drive, Firecracker, NetworkInterface
from emberbox.runtime.firecracker.chain import Chain
from emberbox.runtime.firecracker.errors import ApiError, ApiUnreachable, FirecrackerError, JailerError
from emberbox.runtime.firecracker.jail import SOCKET, Jail, JailerSettings
from emberbox.runtime.firecracker.machine import NAME, UPPER, MicroVM, buckets
from emberbox.threads import to_thread_whole

log = structlog.get_logger(__name__)

_PR_SET_THP_DISABLE = 41
_END_SECONDS = 10.0
_CONSOLE_SECONDS = 5.0
_MERGE_AFTER_SECONDS = 2.0
"""A machine that is resumed at once, or ended at once, is spared the work."""
_SPARE_LIMITS = Limits(cpu_count=1, memory_mb=0, disk_size_mb=0)
"""Of a Firecracker that has no guest yet."""
_KERNEL, _INITRAMFS, _UPPER, _STATE, _MEMORY = "kernel", "initramfs", "upper", "state", "memory"


@dataclass(frozen=True, slots=True)
class FirecrackerSettings:
    """What a node tells this runtime once."""

    binaries: JailerSettings
    guest: guest.GuestFiles
    machines_dir: Path
    """The folder that holds every machine's directory."""
    first_user: int
    """Host user ids from here on belong to machines, one a slot."""
    time_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class _File:
    """A file that a machine has in its jail."""

    source: Path
    name: str
    writable: bool = False


@dataclass(slots=True)
class _Held:
    """A jail with the Firecracker in it, once there is one."""

    cell: Jail
    api: Firecracker
    identity: processes.ProcessId | None = None

    def require(self) -> processes.ProcessId:
        assert self.identity is not None
        return self.identity


class FirecrackerRuntime:
    """Implements `runtime.base.Runtime` and `KeepsSpares`. Needs root, /dev/kvm and /dev/net/tun."""

    name = NAME
    capabilities = Capabilities(
        memory_snapshots=True, live_limits=False, isolation="hardware-virtualised, a guest kernel for each sandbox"
    )

    def __init__(self, settings: FirecrackerSettings, version: str) -> None:
        self.settings = settings
        self.parts = f"{version} {guest.fingerprint(settings.guest)}"
        self._version = version
        self._deadlines = Deadlines().scaled(settings.time_scale)
        self._trusted = snapshots.Trusted()
        self._spares: dict[str, _Held] = {}
        self._folders: WeakValueDictionary[tuple[int, int], asyncio.Lock] = WeakValueDictionary()
        self._background: set[asyncio.Task[None]] = set()
        self._one_merge = asyncio.Semaphore(1)
        self._most_written = changes.MOST_BYTES
        if reason := changes.why_not_held(settings.machines_dir.parent):
            log.warning("microvm.changes_merged", reason=reason)
            self._most_written = 0
        _disable_huge_pages()

    @classmethod
    async def open(cls, settings: FirecrackerSettings) -> FirecrackerRuntime:
        """Check that the parts are there and ask Firecracker for its version.

        Raises:
            FirecrackerError: a part is missing; says which and what to do.
        """
        _refuse_missing_parts(settings.binaries)
        runtime = cls(settings, await _version(settings.binaries.firecracker))
        runtime._in_background(runtime._tend_consoles(), name="consoles")
        return runtime

    # ---- the protocol ----

    async def start(self, spec: MachineSpec) -> MicroVM:
        async with self._jailed(spec) as held:
            api = held.api
            await api.set_machine(cpu_count=spec.limits.cpu_count, memory_mb=spec.limits.memory_mb)
            await api.set_boot(kernel=f"/{_KERNEL}", initramfs=f"/{_INITRAMFS}", command_line=guest.command_line(spec))
            # Each drive has buckets of its own; a restore brings them as they were when the machine was saved.
            bandwidth, operations = buckets(spec.limits.rates)
            for number in range(len(spec.layers)):
                await api.add_drive(Drive(f"layer{number}", f"/layer{number}", True, bandwidth, operations))
            await api.add_drive(Drive(UPPER, f"/{_UPPER}", False, bandwidth, operations))
            await api.add_network(NetworkInterface("eth0", _tap(spec), taps.GUEST_MAC))
            await api.add_entropy()
            await api.add_balloon(statistics_seconds=balloon.STATISTICS_SECONDS)
            chain = self._chain(spec)
            await asyncio.to_thread(chain.begin)
            await api.start()
        return self._machine(spec, held, paused=False)

    async def restore(self, spec: MachineSpec, saved: Saved) -> MicroVM:
        """Load a saved machine. It runs when this returns, with the clock and identity of the moment it was saved."""
        if saved.runtime != NAME or not saved.memory:
            raise SavedDamaged(f"a machine saved by '{saved.runtime}' without memory cannot be restored, only started")
        began = time.perf_counter()
        chain = self._chain(spec)
        async with self._folder_lock(saved.directory):
            manifest, memory, over = await to_thread_whole(self._prepare, saved.directory, chain)
        _refuse_other_size(spec, manifest)
        await asyncio.to_thread(working_set.read_ahead, memory, saved.directory)
        links = {_STATE: saved.directory / snapshots.STATE, _MEMORY: memory}
        prepared = time.perf_counter()
        async with self._jailed(spec, links) as held:
            jailed = time.perf_counter()
            try:
                # Not before all is written: who is held goes on when the node ends.
                async with changes.written(spec.upper, held.require().pid, memory, over):
                    await held.api.load_snapshot(state=f"/{_STATE}", memory=f"/{_MEMORY}", resume=not over)
                if over:
                    await held.api.resume()
            except changes.NotWritten as error:
                if processes.is_alive(held.require()):
                    log.warning("microvm.changes_merged_from_now_on", reason=str(error))
                    self._most_written = 0
                raise
            except ApiError as error:
                raise SavedUnfit(
                    f"the machine saved by Firecracker {manifest.firecracker} cannot be restored by "
                    f"{self._version}: {error.fault}"
                ) from error
        log.debug(
            "microvm.restored",
            machine_id=spec.machine_id,
            prepare_ms=round((prepared - began) * 1000, 1),
            jail_ms=round((jailed - prepared) * 1000, 1),
            load_ms=round((time.perf_counter() - jailed) * 1000, 1),
        )
        alone = len(manifest.pieces) == 1  # else it is not restored often enough
        note_into = saved.directory if alone and not working_set.is_known(saved.directory) else None
        machine = self._machine(spec, held, paused=False, note_into=note_into)
        machine.shorten_soon()
        return machine

    async def adopt(self, spec: MachineSpec, record: dict[str, Any]) -> MicroVM | None:
        held = self._held(spec.machine_id, spec.directory, spec.slot)
        held.identity = processes.ProcessId(int(record["pid"]), int(record["started"]))
        if not processes.is_alive(held.identity):
            await asyncio.to_thread(held.cell.remove)
            return None
        try:
            state = await held.api.state()
        except (ApiError, ApiUnreachable) as error:
            log.warning("microvm.not_adopted", machine_id=spec.machine_id, reason=str(error))
            await asyncio.to_thread(_end, held)
            return None
        machine = self._machine(spec, held, paused=state == "Paused")
        await machine.settle()
        if spec.limits.rates.limit_disk:  # the last node may have ended in a flush, for which they are lifted
            try:
                await machine.set_rates(spec.limits.rates)
            except RuntimeFailure as error:
                log.error("microvm.rates_not_set", machine_id=spec.machine_id, reason=str(error))
        return machine

    async def sweep(self, keep: frozenset[str]) -> list[str]:
        return await asyncio.to_thread(self._sweep, keep)

    async def forget_layers(self) -> None:
        """Nothing is kept of layers: they are in each machine's own jail."""

    async def close(self) -> None:
        """End background work. Machines run on; where there are none, nothing of this runtime is left."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.to_thread(jail.remove_cgroup_parent, self.settings.binaries.cgroup_parent)

    # ---- spares ----

    async def make_spare(self, machine_id: str, directory: Path, slot: Slot) -> None:
        async with _undone_on_failure(self._held(machine_id, directory, slot)) as held:
            await to_thread_whole(self._lock_in, held, slot, _SPARE_LIMITS, (), background=True)
            await _wait_until_ready(held)
        self._spares[machine_id] = held

    async def end_spare(self, machine_id: str) -> None:
        held = self._spares.pop(machine_id, None)
        if held is not None:
            await to_thread_whole(_end, held)

    # ---- consoles ----

    async def _tend_consoles(self) -> None:
        """Cut what has grown too long, of spares and machines that build as well: root in a guest writes there."""
        while True:
            await asyncio.sleep(_CONSOLE_SECONDS)
            await asyncio.to_thread(self._cut_consoles)

    def _cut_consoles(self) -> None:
        for base in self.settings.machines_dir.glob("*/jail"):
            Jail(base.parent.name, base, user=0, cgroup_parent=self.settings.binaries.cgroup_parent).cut_console()

    # ---- saved machines ----

    def _after_save(self, saved: Saved) -> None:
        folder = saved.directory
        self._in_background(self._merge(folder), name=f"merge {folder.name}")

    async def _merge(self, folder: Path) -> None:
        """Make the one file that a restore loads, when it will need one, before it is asked for."""
        await asyncio.sleep(_MERGE_AFTER_SECONDS)
        try:
            async with self._one_merge, self._folder_lock(folder):
                await to_thread_whole(lambda: self._load_from(folder, snapshots.read_manifest(folder)))
        except (OSError, RuntimeFailure) as error:
            if await asyncio.to_thread(folder.exists):  # else it was resumed or deleted meanwhile
                # Not lost: the pieces are there, and the restore makes it itself.
                log.warning("microvm.merge_failed", folder=str(folder), reason=str(error))

    def _in_background(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _prepare(self, folder: Path, chain: Chain) -> tuple[snapshots.Manifest, Path, list[Path]]:
        """Check what was saved and link its memory to the machine's chain.

        Returns:
            the manifest; the file to load; the changes to write over it.
        """
        manifest = snapshots.read_manifest(folder)
        snapshots.verify(folder, manifest, self._trusted)
        memory, over = self._load_from(folder, manifest)
        chain.begin(manifest.pieces, folder)
        return manifest, chain.folder / memory, [chain.folder / name for name in over]

    def _load_from(self, folder: Path, manifest: snapshots.Manifest) -> tuple[str, list[str]]:
        """Return the name of the file that a restore loads, made when it is not there, and of the changes to write."""
        base, *later = (piece.name for piece in manifest.pieces)
        if changes.size([folder / name for name in later]) <= self._most_written:
            (folder / snapshots.WHOLE).unlink(missing_ok=True)
            return base, later
        return snapshots.make_whole(folder, manifest.pieces, self._trusted).name, []

    @contextlib.asynccontextmanager
    async def _folder_lock(self, folder: Path) -> AsyncIterator[None]:
        """One at a time reads or merges a saved machine; the folder is known by its inode, as it may be renamed."""
        lock = self._folders.setdefault(_inode(folder), asyncio.Lock())
        async with lock:
            yield

    # ---- machines ----

    @contextlib.asynccontextmanager
    async def _jailed(self, spec: MachineSpec, links: dict[str, Path] | None = None) -> AsyncIterator[_Held]:
        """A fresh Firecracker in its jail with the machine's files; undone when the block fails.

        Args:
            links: what it reads besides the disks, by name in the jail; the boot files when None.
        """
        files = [_File(source, name) for name, source in (links or self._boot_links()).items()]
        files += [_File(layer, f"layer{number}") for number, layer in enumerate(spec.layers)]
        files.append(_File(spec.upper, _UPPER, writable=True))
        spare = self._spares.pop(spec.machine_id, None)
        async with _undone_on_failure(spare or self._held(spec.machine_id, spec.directory, spec.slot)) as held:
            if spare is None or not await self._use(spare, files, spec):
                await to_thread_whole(self._lock_in, held, spec.slot, spec.limits, files, background=spec.background)
                await _wait_until_ready(held)
            yield held

    async def _use(self, spare: _Held, files: list[_File], spec: MachineSpec) -> bool:
        """Give the files to the spare; false, and nothing is left of it, when it has died or cannot have them."""
        if processes.is_alive(spare.require()):
            try:
                await to_thread_whole(_furnish, spare, files, spec)
                return True
            except OSError as error:
                if error.errno not in jail.NOT_LINKED:
                    raise
        await to_thread_whole(_end, spare)
        spare.identity = None
        return False

    def _lock_in(self, held: _Held, slot: Slot, limits: Limits, files: Iterable[_File], *, background: bool) -> None:
        held.cell.create()
        for file in files:
            held.cell.provide(file.source, file.name, writable=file.writable)
        held.identity = held.cell.spawn(self.settings.binaries, slot.netns, limits, background=background)

    def _boot_links(self) -> dict[str, Path]:
        return {_KERNEL: self.settings.guest.kernel, _INITRAMFS: self.settings.guest.initramfs}

    def _held(self, machine_id: str, directory: Path, slot: Slot) -> _Held:
        cell = Jail(
            machine_id=machine_id,
            base=directory / "jail",
            user=self.settings.first_user + slot.index,
            cgroup_parent=self.settings.binaries.cgroup_parent,
        )
        return _Held(cell, Firecracker(cell.root, SOCKET, self._deadlines))

    def _chain(self, spec: MachineSpec) -> Chain:
        return Chain(spec.directory / "memory")

    def _machine(self, spec: MachineSpec, held: _Held, *, paused: bool, note_into: Path | None = None) -> MicroVM:
        return MicroVM(
            spec,
            held.cell,
            held.require(),
            held.api,
            self._chain(spec),
            firecracker_version=self._version,
            trusted=self._trusted,
            paused=paused,
            after_save=self._after_save,
            note_into=note_into,
        )

    # ---- sweeping ----

    def _sweep(self, keep: frozenset[str]) -> list[str]:
        removed = []
        parent = self.settings.binaries.cgroup_parent
        for machine_id in sorted(jail.machines_with_cgroups(parent) - keep):
            with _logged(machine_id):
                jail.end_cgroup(parent, machine_id)
                removed.append(f"microVM {machine_id}")
        for machine in sorted(self.settings.machines_dir.glob("*/jail/firecracker/*")):
            if machine.name not in keep:
                base = machine.parent.parent
                with _logged(machine.name):
                    Jail(machine.name, base, user=0, cgroup_parent=parent).remove()
                    removed.append(f"jail {machine.name}")
        return removed


@contextlib.contextmanager
def _logged(machine_id: str) -> Iterator[None]:
    """Log what a machine's removal ran into, and go on: the others work without it."""
    try:
        yield
    except (RuntimeFailure, OSError) as error:
        log.error("microvm.not_removed", machine_id=machine_id, reason=str(error))


@contextlib.asynccontextmanager
async def _undone_on_failure(held: _Held) -> AsyncIterator[_Held]:
    """End what is held when the block fails, and say it with Firecracker's last words."""
    try:
        yield held
    except BaseException as error:
        words = held.cell.last_words(600)
        await asyncio.shield(asyncio.to_thread(_end, held))
        if isinstance(error, FirecrackerError):
            raise RuntimeFailure(f"the microVM did not start: {error}; its console: {words}") from error
        if isinstance(error, OSError):
            raise RuntimeFailure(f"the microVM's files could not be laid out: {error}") from error
        raise


async def _wait_until_ready(held: _Held) -> None:
    """Return when the API answers; a jailer that gives up is noticed at once, with its words."""
    ready = asyncio.create_task(held.api.wait_until_ready())
    ended = asyncio.create_task(processes.wait_for_end(held.require()))
    try:
        await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not ready.done():
            raise JailerError(f"the jailer gave up: {held.cell.last_words(600)}")
        await ready
    finally:
        for task in (ready, ended):
            task.cancel()
        await asyncio.gather(ready, ended, return_exceptions=True)


def _furnish(held: _Held, files: Iterable[_File], spec: MachineSpec) -> None:
    """Put files into a jail in which Firecracker runs already, and set what it may use."""
    for file in files:
        held.cell.provide(file.source, file.name, writable=file.writable, link_only=True)
    held.cell.set_limits(spec.limits)
    if not spec.background:
        held.cell.come_forward()


def _end(held: _Held) -> None:
    identity = held.identity
    if identity is not None and not processes.end_and_wait(identity, _END_SECONDS):
        log.error("microvm.does_not_end", machine_id=held.cell.machine_id, pid=identity.pid)
        return
    held.cell.remove()


def _tap(spec: MachineSpec) -> str:
    if spec.slot.tap is None:
        raise RuntimeFailure(f"slot {spec.slot.index} has no tap; the node made it for another runtime")
    return spec.slot.tap


def _refuse_other_size(spec: MachineSpec, manifest: snapshots.Manifest) -> None:
    asked = (spec.limits.cpu_count, spec.limits.memory_mb, len(spec.layers))
    has = (manifest.cpu_count, manifest.memory_mb, manifest.layers)
    if asked != has:
        raise RuntimeFailure(
            f"the saved machine has {has[0]} CPUs, {has[1]} MiB and {has[2]} layers; "
            f"it cannot be restored with {asked[0]}, {asked[1]} and {asked[2]}"
        )


def _disable_huge_pages() -> None:
    """Turn transparent huge pages off for machines started from here (inherited over exec).

    A private mapping of a memory file gains nothing from them, and a restored, idle machine needs 2.6 MB with them
    off and 6.7 MB with them on (Debian's default).
    """
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def _refuse_missing_parts(binaries: JailerSettings) -> None:
    for path in (binaries.firecracker, binaries.jailer):
        if not os.access(path, os.X_OK):
            raise FirecrackerError(f"{path} is missing or cannot be run; 'emberbox setup' fetches it")
    for device in ("/dev/kvm", "/dev/net/tun"):
        if not os.path.exists(device):
            raise FirecrackerError(f"{device} is missing: this host cannot run microVMs")


def _inode(folder: Path) -> tuple[int, int]:
    try:
        facts = folder.stat()
    except FileNotFoundError:
        raise SavedDamaged(f"the saved machine {folder.name} does not exist") from None
    return (facts.st_dev, facts.st_ino)


async def _version(firecracker: Path) -> str:
    child = await asyncio.create_subprocess_exec(
        str(firecracker), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(30):
            out, _ = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        raise FirecrackerError(f"'{firecracker} --version' does not answer") from None
    words = out.decode("utf-8", "replace").split()
    if len(words) < 2 or words[0] != "Firecracker":
        raise FirecrackerError(f"'{firecracker} --version' does not look like Firecracker: {' '.join(words)[:200]}")
    return words[1].removeprefix("v")
