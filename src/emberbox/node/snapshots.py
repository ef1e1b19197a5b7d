"""Snapshots of sandboxes, new sandboxes from them, and forks.

A snapshot is a directory below `snapshots/`: what `Machine.save` wrote, and `meta.json`, written last. A directory
without it is half-made, never used, and swept at the next start.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from emberbox.linux import sparse
from emberbox.linux.writing import write_file
from emberbox.node.errors import AgentFailure, AlreadyHere, BadValue, NodeError, NoSuchSandbox, NoSuchSnapshot
from emberbox.node.files import remove_file, remove_tree
from emberbox.node.hosting import Hosted
from emberbox.node.machines import Machines, Seed
from emberbox.node.model import Image, NewSandbox, State, Status
from emberbox.node.records import SandboxRecord, SavedFacts
from emberbox.node.sandbox import Sandbox
from emberbox.node.tasks import finish
from emberbox.runtime.base import Limits, Saved
from emberbox.runtime.errors import RuntimeFailure
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.node")

_META = "meta.json"
_LINK_TRIES = 5
_FORK = "fork-"
"""Begins the names of snapshots that only a fork uses."""


@dataclass(frozen=True, slots=True)
class SnapshotMeta:
    """What a snapshot is made of, beside its files."""

    snapshot_id: str
    image: Image
    limits: Limits
    env_vars: dict[str, str]
    saved: SavedFacts
    size_bytes: int


_ADAPTER = TypeAdapter(SnapshotMeta)


class Snapshots:
    """The snapshots of one node, in one directory."""

    def __init__(self, machines: Machines, directory: Path) -> None:
        self._machines = machines
        self._directory = directory
        self._making: set[str] = set()
        self._users: Counter[str] = Counter()
        self._deleted: set[str] = set()
        """Deleted, but still used by a create."""

    # ---- make

    async def take(self, sandbox_id: str, snapshot_id: str, *, memory: bool, fork: bool = False) -> SnapshotMeta:
        """Save a running or paused sandbox under a new ID. The sandbox goes on in the state it had.

        Args:
            fork: it is used now, and need not outlive a power cut.

        Raises:
            NoSuchSandbox, AlreadyHere, BadValue, DiskFull, RuntimeFailure: see there; nothing is left.
        """
        check_snapshot_id(snapshot_id)
        directory = self._directory / snapshot_id
        sandbox = self._machines.find(sandbox_id)
        if snapshot_id in self._making:
            raise _already_here(snapshot_id)
        self._making.add(snapshot_id)
        try:
            if await asyncio.to_thread(directory.exists):
                raise _already_here(snapshot_id)
            return await sandbox.operate(lambda: self._take(sandbox, snapshot_id, directory, memory, fork))
        finally:
            self._making.discard(snapshot_id)

    async def _take(
        self, sandbox: Sandbox, snapshot_id: str, directory: Path, memory: bool, fork: bool
    ) -> SnapshotMeta:
        record = sandbox.record
        if record is None:  # its create failed while this waited for its turn
            raise NoSuchSandbox(sandbox.sandbox_id)
        try:
            await to_thread_whole(directory.mkdir, mode=0o700, parents=True)
            if sandbox.hosted is not None:
                facts = await self._save_machine(sandbox.hosted, record, directory, memory=memory, fork=fork)
            else:
                facts = await self._copy_saved(record, directory, memory=memory)
            if not fork:  # which ends with this process
                await to_thread_whole(sparse.flush, directory / facts.upper)
            meta = SnapshotMeta(
                snapshot_id=snapshot_id,
                image=record.image,
                limits=record.limits,
                env_vars=record.env_vars,
                saved=facts,
                size_bytes=await asyncio.to_thread(_allocated, directory),
            )
            await to_thread_whole(write_file, directory / _META, _ADAPTER.dump_json(meta), flush=not fork)
        except BaseException:
            await finish(remove_tree(directory))
            raise
        log.info("snapshot.taken", snapshot_id=snapshot_id, sandbox_id=record.sandbox_id, memory=facts.memory)
        return meta

    async def _save_machine(
        self, hosted: Hosted, record: SandboxRecord, directory: Path, *, memory: bool, fork: bool
    ) -> SavedFacts:
        """Save a machine that is there. The runtime stops its clock for as short as it can."""
        if record.state is State.RUNNING:
            # What is left then is flushed while it stands still, before its disk is copied.
            await to_thread_whole(sparse.flush, hosted.spec.upper)
        remembers = self._machines.hosting.runtime.capabilities.memory_snapshots
        if memory and remembers:
            return SavedFacts.of(await _save_memory(hosted, directory, lasting=not fork), hosted.secret)
        # A guest kernel holds what was written until it is told to let go; a container's is the host's own.
        flush = remembers and record.state is State.RUNNING
        frozen = flush and await _freeze_files(hosted)
        try:
            saved = await hosted.machine.save(directory, memory=False)
        finally:
            if frozen:
                await finish(thaw_files(hosted))
        return SavedFacts.of(saved, hosted.secret)

    async def _copy_saved(self, record: SandboxRecord, directory: Path, *, memory: bool) -> SavedFacts:
        """Copy what a paused sandbox without a machine consists of."""
        hosting = self._machines.hosting
        assert record.saved is not None
        if record.saved_directory:
            source = self._machines.saved_dir / record.saved_directory
            flushed = None
            if memory:
                await to_thread_whole(_link_tree, source, directory, record.saved.upper)
            elif record.saved.memory:
                flushed = await self._machines.pausing.flushed(record)
            try:
                await hosting.disks.clone(flushed or source / record.saved.upper, directory / record.saved.upper)
            finally:
                if flushed is not None:
                    await finish(remove_file(flushed))
            return record.saved if memory else replace(record.saved, memory=False, secret="")
        await hosting.disks.clone(hosting.uppers_dir / record.upper, directory / "upper.ext4")
        return replace(record.saved, upper="upper.ext4")

    # ---- use

    @asynccontextmanager
    async def used(self, snapshot_id: str, limits: Limits) -> AsyncIterator[Seed]:
        """What a sandbox created from this snapshot starts from; a snapshot deleted meanwhile stays until the end.

        Raises:
            NoSuchSnapshot
        """
        check_snapshot_id(snapshot_id)
        self._users[snapshot_id] += 1
        try:
            yield await self._seed(snapshot_id, limits)
        finally:
            self._users[snapshot_id] -= 1
            if not self._users[snapshot_id]:
                del self._users[snapshot_id]
                if snapshot_id in self._deleted:
                    await finish(self._remove(snapshot_id))

    async def _seed(self, snapshot_id: str, limits: Limits) -> Seed:
        """The disk's size is the snapshot's, and so are processors and memory when its memory goes on."""
        meta = await asyncio.to_thread(self._read, snapshot_id)
        saved = meta.saved.within(self._directory / snapshot_id)
        fixed = meta.limits if saved.memory else replace(limits, disk_size_mb=meta.limits.disk_size_mb)
        return Seed(meta.image, fixed, meta.env_vars, saved, meta.saved.secret)

    async def fork(self, sandbox_id: str, news: Sequence[NewSandbox]) -> list[Status | Exception]:
        """Start copies of a running sandbox, all of the same instant. One result each, in order: it, or why not.

        Raises:
            NoSuchSandbox, WrongState, RuntimeFailure: the source could not be saved.
        """
        self._machines.find(sandbox_id).require(State.RUNNING)
        began = time.monotonic()
        snapshot_id = f"{_FORK}{secrets.token_hex(8)}"
        meta = await self.take(sandbox_id, snapshot_id, memory=True, fork=True)
        try:
            took = round((time.monotonic() - began) * 1000)  # not taken from the copies' time
            later = [replace(new, deadline_ms=new.deadline_ms + took) for new in news]
            return await asyncio.gather(*(self._fork_one(meta, new) for new in later))
        finally:
            await finish(remove_tree(self._directory / snapshot_id))

    async def _fork_one(self, meta: SnapshotMeta, new: NewSandbox) -> Status | Exception:
        try:
            seed = await self._seed(meta.snapshot_id, new.limits)
            return await self._machines.create(new, replace(seed, limits=meta.limits))
        except Exception as error:  # of one; the others go on
            return error

    # ---- end

    async def delete(self, snapshot_id: str) -> None:
        """Remove a snapshot. Sandboxes started from it go on.

        Raises:
            NoSuchSnapshot
        """
        check_snapshot_id(snapshot_id)
        await asyncio.to_thread(self._read, snapshot_id)
        await asyncio.to_thread((self._directory / snapshot_id / _META).unlink, missing_ok=True)
        self._deleted.add(snapshot_id)
        if snapshot_id not in self._users:
            await finish(self._remove(snapshot_id))

    async def _remove(self, snapshot_id: str) -> None:
        await remove_tree(self._directory / snapshot_id)
        self._deleted.discard(snapshot_id)

    async def layers_used(self) -> set[str]:
        """Digests of the layers that a snapshot stands on."""
        return await asyncio.to_thread(lambda: {digest for meta in self._all() for digest in meta.image.layers})

    def sweep(self) -> list[str]:
        """Remove half-made snapshots and left-over forks of an earlier process; blocks. Returns their names."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        removed = []
        for path in self._directory.iterdir():
            if path.name.startswith(_FORK) or not (path / _META).exists():
                removed.append(path.name)
                shutil.rmtree(path, ignore_errors=True)
        return removed

    def _all(self) -> list[SnapshotMeta]:
        found = []
        for path in self._directory.iterdir():
            try:
                found.append(self._read(path.name))
            except (NodeError, OSError):
                continue  # being made or removed right now
        return found

    def _read(self, snapshot_id: str) -> SnapshotMeta:
        try:
            return _ADAPTER.validate_json((self._directory / snapshot_id / _META).read_bytes())
        except FileNotFoundError:
            raise NoSuchSnapshot(snapshot_id) from None
        except ValidationError as error:
            log.error("snapshot.damaged", snapshot_id=snapshot_id, error=str(error))
            raise NodeError(f"snapshot '{snapshot_id}' is damaged and cannot be used; delete it") from error


async def _save_memory(hosted: Hosted, directory: Path, *, lasting: bool) -> Saved:
    """Save a running machine. Its programs go on as soon as its clock does, while the rest of the work is done.

    A connection for that is asked for before the clock goes on, so that nothing need wait for the runtime's answer.
    """
    going_on: asyncio.Task[bool] | None = None

    def go_on() -> None:
        nonlocal going_on
        going_on = asyncio.create_task(hosted.thaw_programs(), name=f"thaw {hosted.spec.machine_id}")

    async def gone_on() -> None:
        early = going_on is None or going_on.done()  # it began before the clock did, which may have taken long
        if going_on is None or (not await going_on and early):
            await hosted.thaw_programs()

    try:
        await hosted.freeze_programs()
        return await hosted.machine.save(directory, memory=True, lasting=lasting, resuming=go_on)
    finally:
        await finish(gone_on())


async def _freeze_files(hosted: Hosted) -> bool:
    try:
        await hosted.freeze_files()
    except (AgentFailure, RuntimeFailure) as error:
        log.warning("snapshot.not_flushed", machine_id=hosted.spec.machine_id, error=str(error))
        return False
    return True


async def thaw_files(hosted: Hosted) -> None:
    """Let a machine's writers go on; that it failed is logged."""
    try:
        await hosted.thaw_files()
    except (AgentFailure, RuntimeFailure) as error:
        log.error("snapshot.not_thawed", machine_id=hosted.spec.machine_id, error=str(error))


def _already_here(snapshot_id: str) -> AlreadyHere:
    return AlreadyHere(f"snapshot '{snapshot_id}' is already on this node")


def check_snapshot_id(snapshot_id: str) -> None:
    """Raises `BadValue` unless it is a plain name."""
    if not snapshot_id.replace("-", "").replace("_", "").isalnum() or len(snapshot_id) > 64:
        raise BadValue(f"snapshot ID {snapshot_id!r} must be 1 to 64 letters, digits, '-' and '_'")


def _link_tree(source: Path, target: Path, skip: str) -> None:
    """Hard-link every file but `skip`: pieces of saved memory never change once written.

    A runtime may merge the pieces at the same time. Then the list of names changes, and linking begins again.
    """
    for _ in range(_LINK_TRIES):
        names = _tree(source)
        try:
            for name in names:
                if (source / name).is_dir():
                    (target / name).mkdir(exist_ok=True)
                elif str(name) != skip:
                    (target / name).hardlink_to(source / name)
        except FileNotFoundError:
            pass
        else:
            if _tree(source) == names:
                return
        for name in reversed(_tree(target)):
            (target / name).rmdir() if (target / name).is_dir() else (target / name).unlink()
    raise OSError(errno.EBUSY, f"the files in {source} kept changing")


def _tree(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def _allocated(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
