"""Pausing and resuming: with memory in place (frozen), with memory on the disk (saved), or with the files alone.

Each is in an order that a crash of the node process at any point leaves either the running or the paused sandbox. What
can be undone comes first and may be cancelled; the record and what follows from it (`_settle_...`) run to their end.
`Machines` calls these inside the sandbox's turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from emberbox.linux import sparse
from emberbox.node import identity
from emberbox.node.errors import AgentFailure, DiskFull
from emberbox.node.files import remove_file, remove_tree
from emberbox.node.hosting import Hosted
from emberbox.node.model import Network, State, Status, TimeoutAction, now_ms
from emberbox.node.records import SandboxRecord, SavedFacts
from emberbox.node.sandbox import Sandbox
from emberbox.node.tasks import finish
from emberbox.runtime.base import Saved
from emberbox.runtime.errors import RuntimeFailure
from emberbox.threads import to_thread_whole

if TYPE_CHECKING:
    from emberbox.node.machines import Machines

log = structlog.get_logger("emberbox.node")


class Pausing:
    """The ways to pause and resume a sandbox of `machines`."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._hosting = machines.hosting

    async def pause(self, sandbox: Sandbox, *, memory: bool) -> Status:
        record, hosted = sandbox.require(State.RUNNING), sandbox.hosted
        assert hosted is not None
        paused = replace(record, state=State.PAUSED, deadline_ms=0, memory_kept=memory, changed_ms=now_ms())
        if memory and self._hosting.runtime.capabilities.memory_snapshots:
            await self._pause_saving(sandbox, hosted, paused)
        else:
            await self._collect_log(sandbox, hosted)
            await (self._pause_frozen if memory else self._pause_files)(sandbox, hosted, paused)
        self._machines.deadlines.clear(sandbox.sandbox_id)
        log.info("sandbox.paused", sandbox_id=sandbox.sandbox_id, memory=memory)
        return sandbox.status()

    async def _collect_log(self, sandbox: Sandbox, hosted: Hosted) -> None:
        await self._machines.logs.collect(sandbox.sandbox_id, hosted.agent)

    async def _pause_frozen(self, sandbox: Sandbox, hosted: Hosted, paused: SandboxRecord) -> None:
        """Keep the machine as it is, with its clock stopped."""
        try:
            await hosted.machine.pause()
        except BaseException:
            await finish(self._thaw(hosted))
            raise
        await finish(self._settle_frozen(sandbox, hosted, paused))

    async def _settle_frozen(self, sandbox: Sandbox, hosted: Hosted, paused: SandboxRecord) -> None:
        try:
            await self._machines.store(sandbox, paused)
        except BaseException:
            await self._thaw(hosted)
            raise

    async def _pause_saving(self, sandbox: Sandbox, hosted: Hosted, paused: SandboxRecord) -> None:
        """Put memory and disk into a directory of their own; the machine is ended behind the answer."""
        directory = self._machines.saved_dir / f"{sandbox.sandbox_id}-{secrets.token_hex(4)}"
        try:
            await to_thread_whole(directory.mkdir, mode=0o700, parents=True)
            await asyncio.gather(self._collect_log(sandbox, hosted), hosted.freeze_programs())
            await hosted.machine.pause()
            saved = await hosted.machine.save(directory, memory=True, final=True)
        except BaseException:
            await finish(self._undo_saving(hosted, directory))
            raise
        facts = SavedFacts.of(saved, hosted.secret)
        settled = replace(paused, machine=None, upper="", saved_directory=directory.name, saved=facts)
        await finish(self._settle_saved(sandbox, hosted, settled, directory))

    async def _settle_saved(self, sandbox: Sandbox, hosted: Hosted, paused: SandboxRecord, directory: Path) -> None:
        try:
            await self._machines.store(sandbox, paused)
        except BaseException:
            await self._undo_saving(hosted, directory)
            raise
        sandbox.unwatch()
        sandbox.hosted = None
        ending = self._hosting.end(hosted)
        sandbox.leaving = self._machines.tasks.start(ending, name=f"leave {hosted.spec.machine_id}")

    async def _undo_saving(self, hosted: Hosted, directory: Path) -> None:
        await self._thaw(hosted)
        await hosted.thaw_programs()
        await remove_tree(directory)

    async def _pause_files(self, sandbox: Sandbox, hosted: Hosted, paused: SandboxRecord) -> None:
        """End the machine and keep its disk."""
        await finish(self._keep_files(sandbox, hosted, paused))

    async def _keep_files(self, sandbox: Sandbox, hosted: Hosted, paused: SandboxRecord) -> None:
        with contextlib.suppress(AgentFailure, RuntimeFailure):
            await hosted.freeze_files()
        try:
            await self._machines.store(sandbox, replace(paused, machine=None, saved=self._files_of(hosted)))
        except BaseException:
            with contextlib.suppress(AgentFailure, RuntimeFailure):
                await hosted.thaw_files()
            raise
        await self._leave_machine(sandbox, hosted, keep_upper=True)
        try:
            await to_thread_whole(sparse.flush, hosted.spec.upper)
        except OSError as error:  # it is paused, and its files are there until the host's power goes
            log.error("sandbox.not_flushed", sandbox_id=sandbox.sandbox_id, error=str(error))

    def _files_of(self, hosted: Hosted) -> SavedFacts:
        return SavedFacts(
            runtime=self._hosting.runtime.name,
            upper=hosted.spec.upper.name,
            memory=False,
            details=hosted.machine.record(),
        )

    async def _leave_machine(self, sandbox: Sandbox, hosted: Hosted, *, keep_upper: bool) -> None:
        sandbox.unwatch()
        sandbox.hosted = None
        await self._hosting.end(hosted, keep_upper=keep_upper)

    async def _thaw(self, hosted: Hosted) -> None:
        try:
            await hosted.machine.resume()
        except RuntimeFailure as error:
            log.warning("machine.thaw_failed", machine_id=hosted.spec.machine_id, error=str(error))

    async def resume(
        self, sandbox: Sandbox, deadline_ms: int, on_timeout: TimeoutAction | None, discard_memory: bool
    ) -> Status:
        record = sandbox.require(State.PAUSED)
        began = time.monotonic()
        running = replace(
            record,
            state=State.RUNNING,
            deadline_ms=deadline_ms,
            on_timeout=on_timeout or record.on_timeout,
            started_ms=now_ms(),
            changed_ms=now_ms(),
        )
        kept = "none"
        if sandbox.hosted is not None and not discard_memory and await self._resume_frozen(sandbox, running):
            kept = "frozen"
        elif record.saved is not None and record.saved.memory:
            await self._resume_saved(sandbox, running, discard_memory=discard_memory)
            kept = "none" if discard_memory else "saved"
        else:
            await self._resume_files(sandbox, running)
        ms = round((time.monotonic() - began) * 1000, 1)
        log.info("sandbox.resumed", sandbox_id=sandbox.sandbox_id, memory=kept, ms=ms)
        return sandbox.status()

    async def _resume_frozen(self, sandbox: Sandbox, running: SandboxRecord) -> bool:
        """Let the frozen machine go on; False when it has ended, and the files must do."""
        hosted = sandbox.hosted
        assert hosted is not None
        try:
            await self._hosting.wake(hosted, identity.again(running))
        except (RuntimeFailure, AgentFailure) as error:
            if await hosted.machine.alive():
                await finish(self._freeze_again(hosted))
                raise
            log.warning("sandbox.frozen_lost", sandbox_id=sandbox.sandbox_id, error=str(error))
            return False
        except BaseException:
            await finish(self._freeze_again(hosted))
            raise
        await finish(self._settle_thawed(sandbox, hosted, running))
        return True

    async def _settle_thawed(self, sandbox: Sandbox, hosted: Hosted, running: SandboxRecord) -> None:
        try:
            await self._machines.run_on(sandbox, hosted, running)
        except BaseException:
            await self._freeze_again(hosted)
            raise

    async def _freeze_again(self, hosted: Hosted) -> None:
        try:
            await hosted.machine.pause()
        except RuntimeFailure as error:
            log.warning("machine.freeze_failed", machine_id=hosted.spec.machine_id, error=str(error))

    async def _resume_saved(self, sandbox: Sandbox, running: SandboxRecord, *, discard_memory: bool) -> None:
        assert running.saved is not None
        directory = self._machines.saved_dir / running.saved_directory
        saved = running.saved.within(directory)
        await sandbox.left()  # merged memory need not be copied once the last machine, which has it mapped, has ended
        if discard_memory:
            hosted = await self._start_without_memory(running, replace(saved, memory=False))
        else:
            hosted = await self._start_again(running, saved, secret=running.saved.secret)
        await finish(self._settle_running(sandbox, hosted, running, used_up=lambda: remove_tree(directory)))

    async def _start_without_memory(self, running: SandboxRecord, saved: Saved) -> Hosted:
        upper = await self.flushed(running)
        if upper is None:
            return await self._start_again(running, saved)
        return await self._start_on_copy(running, saved, upper)

    async def _start_on_copy(self, running: SandboxRecord, saved: Saved, upper: Path) -> Hosted:
        """Start cold on `upper`, a copy of a disk, which goes again when that fails."""
        try:
            return await self._start_again(running, replace(saved, upper=upper), upper=upper)
        except BaseException:
            await finish(remove_file(upper))
            raise

    async def flushed(self, record: SandboxRecord) -> Path | None:
        """Return a copy of the disk of a sandbox paused with its memory, with what the guest's kernel still held.

        The machine goes on for that, reaching nobody, until its files are flushed. The copy is the caller's. None
        when the memory cannot be restored any more: then the disk as it is must do.
        """
        assert record.saved is not None
        saved = record.saved.within(self._machines.saved_dir / record.saved_directory)
        closed = replace(record, network=Network(allow_internet=False))
        try:
            hosted = await self._start_again(closed, saved, secret=record.saved.secret)
        except (RuntimeFailure, AgentFailure) as error:
            log.warning("sandbox.memory_not_flushed", sandbox_id=record.sandbox_id, error=str(error))
            return None
        kept = False
        try:
            await hosted.freeze_files()
            kept = True
        except (RuntimeFailure, AgentFailure) as error:
            log.warning("sandbox.memory_not_flushed", sandbox_id=record.sandbox_id, error=str(error))
        finally:
            await finish(self._hosting.end(hosted, keep_upper=kept))
        return hosted.spec.upper if kept else None

    async def _resume_files(self, sandbox: Sandbox, running: SandboxRecord) -> None:
        """Start cold on the upper that the last machine left: on a copy, so that it stays whole until the machine runs.

        In place where a copy takes long or does not fit.
        """
        if sandbox.hosted is not None:
            await finish(self.discard_frozen(sandbox))
            assert sandbox.record is not None
            running = replace(running, saved=sandbox.record.saved)
        left = self._hosting.uppers_dir / running.upper
        self._hosting.check_unused(left)
        assert running.saved is not None
        saved = running.saved.within(self._hosting.uppers_dir)
        copy = self._hosting.uppers_dir / f"{sandbox.sandbox_id}-{secrets.token_hex(4)}.ext4"
        if await self._copied(left, copy):
            hosted = await self._start_on_copy(running, saved, copy)
            await finish(self._settle_running(sandbox, hosted, running, used_up=lambda: remove_file(left)))
        else:
            hosted = await self._start_again(running, saved, upper=left)
            await finish(self._settle_running(sandbox, hosted, running, used_up=None))

    async def _copied(self, disk: Path, copy: Path) -> bool:
        try:
            return await self._hosting.disks.clone_cheaply(disk, copy)
        except DiskFull as error:
            log.warning("sandbox.resumed_in_place", disk=disk.name, reason=str(error))
            return False

    async def _start_again(
        self, running: SandboxRecord, saved: Saved, *, secret: str = "", upper: Path | None = None
    ) -> Hosted:
        return await self._machines.with_room(
            lambda: self._machines.preparing.machine(
                running.image,
                running.limits,
                identity.again(running),
                saved=saved,
                saved_secret=secret,
                upper=upper,
                network=running.network,
            )
        )

    async def _settle_running(
        self,
        sandbox: Sandbox,
        hosted: Hosted,
        running: SandboxRecord,
        *,
        used_up: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """Go on in a new machine.

        Args:
            used_up: removes what it started from a copy of; None when its upper is the sandbox's own.
        """
        try:
            await self._machines.run_on(sandbox, hosted, running)
        except BaseException:
            await self._hosting.end(hosted, keep_upper=used_up is None)
            raise
        if used_up is not None:
            await used_up()

    async def discard_frozen(self, sandbox: Sandbox) -> None:
        """Turn a sandbox paused in memory into one paused with its files only."""
        hosted, record = sandbox.hosted, sandbox.record
        assert hosted is not None
        assert record is not None
        files = self._files_of(hosted)
        await self._machines.store(sandbox, replace(record, memory_kept=False, machine=None, saved=files))
        await self._leave_machine(sandbox, hosted, keep_upper=True)
