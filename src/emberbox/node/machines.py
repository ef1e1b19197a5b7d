"""The life of sandboxes on this node: create, pause, resume, kill, deadlines, and machines that die.

The states and what moves between them:

    (none)   create        -> running
    running  pause         -> paused    memory kept (frozen, or saved to the disk) or files only
    running  deadline      -> paused | ended (timed out), as `on_timeout` says
    running  machine died  -> ended (died)
    paused   resume        -> running
    paused   frozen machine died -> paused, files only
    any      kill          -> (none)
    ended    acknowledge   -> (none)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import structlog

from emberbox.node import identity
from emberbox.node.admission import available_memory
from emberbox.node.deadlines import Deadlines
from emberbox.node.errors import AgentFailure, AlreadyHere, Interrupted, NodeError, NodeFull, NoSuchSandbox, WrongState
from emberbox.node.events import Events
from emberbox.node.files import remove_file, remove_tree
from emberbox.node.hosting import Hosted, Hosting
from emberbox.node.logs import SandboxLogs
from emberbox.node.model import (
    OPEN_NETWORK,
    EndReason,
    Image,
    Network,
    NewSandbox,
    State,
    Status,
    TimeoutAction,
    now_ms,
)
from emberbox.node.pausing import Pausing
from emberbox.node.pool import Pool
from emberbox.node.preparing import Preparing
from emberbox.node.records import MachineFacts, Records, SandboxRecord
from emberbox.node.sandbox import Sandbox
from emberbox.node.tasks import Tasks, finish
from emberbox.runtime.base import MIB, Limits, Saved
from emberbox.runtime.errors import RuntimeFailure

log = structlog.get_logger("emberbox.node")

_CLOSE_SECONDS = 10.0
_ACKNOWLEDGE_SECONDS = 1.0
_PAUSE_SECONDS = 300.0
_MEMORY_RESERVE = 256 * MIB
"""Left to the host: below it the kernel would end processes, its own or a sandbox's."""


@dataclass(frozen=True, slots=True)
class Seed:
    """What a new sandbox starts from, whatever it was: a template, a snapshot, a running sandbox."""

    image: Image
    limits: Limits
    env_vars: dict[str, str] = field(default_factory=dict)
    saved: Saved | None = None
    saved_secret: str = ""


@dataclass(slots=True)
class Counts:
    starting: int = 0
    creates_succeeded: int = 0
    creates_failed: int = 0


class Machines:
    """Every sandbox of the node, by ID."""

    def __init__(
        self,
        hosting: Hosting,
        preparing: Preparing,
        records: Records,
        pool: Pool,
        events: Events,
        logs: SandboxLogs,
        *,
        saved_dir: Path,
        boot_id: str,
        max_machines: int,
    ) -> None:
        self.hosting = hosting
        self.preparing = preparing
        self.records = records
        self.pool = pool
        self.events = events
        self.logs = logs
        self.saved_dir = saved_dir
        self.boot_id = boot_id
        self.max_machines = max_machines
        self.counts = Counts()
        self.tasks = Tasks()
        self.deadlines = Deadlines(self._expired)
        self.sandboxes: dict[str, Sandbox] = {}
        self.pausing = Pausing(self)

    # ---- looking

    def find(self, sandbox_id: str) -> Sandbox:
        """Return a sandbox that has not ended.

        Raises:
            NoSuchSandbox
        """
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None or (sandbox.record is not None and sandbox.record.state is State.ENDED):
            raise NoSuchSandbox(sandbox_id)
        return sandbox

    def statuses(self) -> list[Status]:
        """Every sandbox, and every end not yet acknowledged."""
        return [sandbox.status() for sandbox in self.sandboxes.values() if sandbox.record is not None]

    def running(self) -> list[Sandbox]:
        return [
            sandbox
            for sandbox in self.sandboxes.values()
            if sandbox.record is not None and sandbox.record.state is State.RUNNING and not sandbox.ending
        ]

    # ---- create

    async def create(self, new: NewSandbox, seed: Seed) -> Status:
        """Start a sandbox and return when its agent knows it.

        Raises:
            AlreadyHere, NodeFull, DiskFull, LayerMissing, BadValue, AgentFailure: see there.
            Interrupted: it was killed meanwhile.
        """
        if new.sandbox_id in self.sandboxes:
            raise AlreadyHere(f"sandbox '{new.sandbox_id}' is already on this node")
        sandbox = self.sandboxes[new.sandbox_id] = Sandbox(new.sandbox_id)
        sandbox.starts_on = tuple(seed.image.layers)
        self.counts.starting += 1
        try:
            await self._check_room(before=sandbox)
            if sandbox.ending:  # a kill came while room was looked for
                raise Interrupted(f"sandbox '{new.sandbox_id}': it was killed")
            status = await sandbox.operate(lambda: self._create(sandbox, new, seed))
        except BaseException:
            self.counts.creates_failed += 1
            if sandbox.record is None:
                self._forget(sandbox)
            else:  # it came to be, but nobody waits for the answer any more
                self.tasks.start(self._kill(sandbox), name="create.undo")
            raise
        finally:
            self.counts.starting -= 1
        self.counts.creates_succeeded += 1
        return status

    async def _check_room(self, *, before: Sandbox | None = None) -> None:
        """One machine more than `max_machines`, or than the host has memory for, is refused; waiting ones give way.

        Args:
            before: count only those that were asked for earlier than this one.
        """
        while await asyncio.to_thread(available_memory) < _MEMORY_RESERVE:
            if not await self.pool.make_room() and not await self._one_has_left():
                raise NodeFull("this node has less than 256 MiB of memory available; kill some sandboxes or add a node")
        earlier = takewhile(lambda sandbox: sandbox is not before, self.sandboxes.values())
        living = sum(1 for sandbox in earlier if sandbox.record is None or sandbox.hosted is not None)
        if living >= self.max_machines:
            raise NodeFull(f"this node runs {living} machines and may run {self.max_machines}; kill some or add a node")
        if living + self.pool.size >= self.max_machines:
            await self.pool.make_room()

    async def _create(self, sandbox: Sandbox, new: NewSandbox, seed: Seed) -> Status:
        began = time.monotonic()
        record = SandboxRecord(
            sandbox_id=new.sandbox_id,
            template_id=new.template_id,
            team_id=new.team_id,
            image=seed.image,
            limits=seed.limits,
            env_vars={**seed.env_vars, **new.env_vars},
            access_token=new.access_token,
            network=new.network,
            on_timeout=new.on_timeout,
            deadline_ms=new.deadline_ms,
            state=State.RUNNING,
            started_ms=now_ms(),
            changed_ms=now_ms(),
            boot_id=self.boot_id,
            metadata=new.metadata,
        )
        hosted = await self._claim_warm(record) if seed.saved is None else None
        warm = hosted is not None
        if hosted is None:
            hosted = await self._start_cold(seed, record)
        await finish(self._settle_created(sandbox, hosted, record))
        ms = round((time.monotonic() - began) * 1000, 1)
        log.info("sandbox.created", sandbox_id=new.sandbox_id, warm=warm, ms=ms)
        return sandbox.status()

    async def _settle_created(self, sandbox: Sandbox, hosted: Hosted, record: SandboxRecord) -> None:
        try:
            await self.run_on(sandbox, hosted, record)
        except BaseException:
            await self.hosting.end(hosted)
            raise

    async def _claim_warm(self, record: SandboxRecord) -> Hosted | None:
        """Make a warm machine this sandbox's; None when there is none, or the ones there were had failed."""
        while (hosted := self.pool.take(record.image, record.limits)) is not None:
            try:
                if record.network != OPEN_NETWORK:
                    await self.hosting.slots.apply(hosted.spec.slot, record.network)
                meet = self.hosting.wake if self.preparing.waits_paused else self.hosting.introduce
                return await meet(hosted, self._first_introduction(record))
            except (AgentFailure, RuntimeFailure) as error:
                log.warning("pool.claim_failed", machine_id=hosted.spec.machine_id, error=str(error))
                await self.hosting.end(hosted)
            except BaseException:
                await self.hosting.end(hosted)
                raise
        return None

    async def _start_cold(self, seed: Seed, record: SandboxRecord) -> Hosted:
        return await self.with_room(
            lambda: self.preparing.machine(
                seed.image,
                seed.limits,
                self._first_introduction(record),
                saved=seed.saved,
                saved_secret=seed.saved_secret,
                network=record.network,
            )
        )

    def _first_introduction(self, record: SandboxRecord) -> identity.Introduction:
        return identity.first(record, new_secret=self.hosting.runtime.capabilities.memory_snapshots)

    async def with_room(self, start: Callable[[], Awaitable[Hosted]]) -> Hosted:
        """Start a machine; those that wait in the pool give way when the node is full."""
        while True:
            try:
                return await start()
            except NodeFull:
                if not await self.pool.make_room() and not await self._one_has_left():
                    raise

    async def _one_has_left(self) -> bool:
        """Wait until a machine that a pause left has ended; False when there is none. Each counts once."""
        leaving = {task for sandbox in self.sandboxes.values() if (task := sandbox.leaving) and not task.done()}
        if leaving:
            await asyncio.wait(leaving, return_when=asyncio.FIRST_COMPLETED)
        return bool(leaving)

    async def run_on(self, sandbox: Sandbox, hosted: Hosted, record: SandboxRecord) -> None:
        """Write that the sandbox runs on this machine, and look after it from now on.

        What starting took since the record was made is not taken from its time.
        """
        took = max(0, now_ms() - record.started_ms)
        await self.store(
            sandbox,
            replace(
                record,
                deadline_ms=record.deadline_ms + took,
                state=State.RUNNING,
                boot_id=self.boot_id,
                upper=hosted.spec.upper.name,
                machine=MachineFacts(
                    machine_id=hosted.spec.machine_id,
                    slot_index=hosted.spec.slot.index,
                    secret=hosted.secret,
                    facts=hosted.machine.record(),
                ),
                memory_kept=False,
                saved=None,
                saved_directory="",
            ),
        )
        sandbox.hosted = hosted
        self.look_after(sandbox)

    def look_after(self, sandbox: Sandbox) -> None:
        """Watch the sandbox's machine, and its deadline when it runs."""
        assert sandbox.record is not None
        sandbox.unwatch()
        if sandbox.hosted is not None:
            name = f"watch {sandbox.sandbox_id}"
            sandbox.watch = self.tasks.start(self._watch(sandbox, sandbox.hosted), name=name)
        if sandbox.record.state is State.RUNNING:
            self.deadlines.set(sandbox.sandbox_id, sandbox.record.deadline_ms)
        else:
            self.deadlines.clear(sandbox.sandbox_id)

    # ---- pause and resume

    async def pause(self, sandbox_id: str, *, memory: bool) -> Status:
        """Stop a running sandbox and keep it.

        Args:
            memory: keep its processes too, for as long as the runtime can.

        Raises:
            NoSuchSandbox, WrongState, DiskFull, Interrupted, RuntimeFailure: see there; it goes on running.
        """
        sandbox = self.find(sandbox_id)
        return await sandbox.operate(lambda: self.pausing.pause(sandbox, memory=memory))

    async def resume(
        self, sandbox_id: str, *, deadline_ms: int, on_timeout: TimeoutAction | None, discard_memory: bool
    ) -> Status:
        """Go on with a paused sandbox.

        Args:
            on_timeout: None leaves it as it was.
            discard_memory: start cold from the files, even when memory was kept.

        Raises:
            NoSuchSandbox, WrongState, NodeFull, DiskFull, Interrupted, AgentFailure, RuntimeFailure: see there; it
                stays paused.
        """
        sandbox = self.find(sandbox_id)
        sandbox.require(State.PAUSED)
        if sandbox.hosted is None:
            await self._check_room()
        return await sandbox.operate(lambda: self.pausing.resume(sandbox, deadline_ms, on_timeout, discard_memory))

    # ---- settings of a sandbox that runs

    async def set_deadline(self, sandbox_id: str, deadline_ms: int, *, only_extend: bool) -> Status:
        """Move the deadline of a running sandbox. Does not wait for operations under way."""
        sandbox = self.find(sandbox_id)
        record = sandbox.require(State.RUNNING)
        if sandbox.ending:
            raise NoSuchSandbox(sandbox_id)
        if not only_extend or deadline_ms > record.deadline_ms:
            # Memory first: an operation that ends meanwhile must carry the new deadline on.
            sandbox.record = replace(record, deadline_ms=deadline_ms)
            self.deadlines.set(sandbox_id, deadline_ms)
            await finish(self._write_deadline(sandbox))
        return sandbox.status()

    async def _write_deadline(self, sandbox: Sandbox) -> None:
        async with sandbox.writing:
            if not sandbox.ending and sandbox.record is not None and sandbox.record.state is State.RUNNING:
                await self.records.write(sandbox.record)

    async def set_network(self, sandbox_id: str, network: Network) -> Status:
        """Replace what a sandbox may reach."""
        sandbox = self.find(sandbox_id)

        async def apply() -> Status:
            sandbox.require(State.RUNNING)
            hosted = sandbox.hosted
            assert hosted is not None
            await self.hosting.slots.apply(hosted.spec.slot, network)
            await self.store(sandbox, replace(sandbox.require(State.RUNNING), network=network))
            return sandbox.status()

        return await sandbox.operate(lambda: finish(apply()))

    # ---- ends

    async def kill(self, sandbox_id: str) -> None:
        """End a sandbox in whatever state it is, also in the middle of another operation, and forget it."""
        await finish(self._kill(self.find(sandbox_id)))

    async def _kill(self, sandbox: Sandbox) -> None:
        sandbox.ending = True

        async def end() -> None:
            if self.sandboxes.get(sandbox.sandbox_id) is sandbox:
                await self._end(sandbox, None)

        await sandbox.interrupt(end)

    async def _end(self, sandbox: Sandbox, reason: EndReason | None, message: str = "") -> None:
        """End a sandbox. With a reason its end is kept and reported until it is acknowledged."""
        sandbox.ending = True
        self.deadlines.clear(sandbox.sandbox_id)
        sandbox.unwatch()
        record, hosted, sandbox.hosted = sandbox.record, sandbox.hosted, None
        if record is None:
            self._forget(sandbox)
            return
        try:
            await self._write_end(sandbox, record, hosted, reason, message)
        finally:  # nobody else ends the machine
            await self._remove(sandbox, record, hosted, told=reason is EndReason.TIMED_OUT)

    async def _write_end(
        self, sandbox: Sandbox, record: SandboxRecord, hosted: Hosted | None, reason: EndReason | None, message: str
    ) -> None:
        if hosted is not None and record.state is State.RUNNING and reason is not EndReason.DIED:
            await self.logs.collect(sandbox.sandbox_id, hosted.agent)
        if reason is None:
            async with sandbox.writing:
                await self.records.remove(sandbox.sandbox_id)
            self._forget(sandbox)
        else:
            await self.keep_end(sandbox, record, reason, message)
        log.info("sandbox.ended", sandbox_id=sandbox.sandbox_id, reason=reason or EndReason.KILLED, message=message)

    async def _remove(self, sandbox: Sandbox, record: SandboxRecord, hosted: Hosted | None, *, told: bool) -> None:
        """End the machine and remove what there is of the sandbox.

        Args:
            told: wait first until its end is known.
        """
        await sandbox.left()
        if hosted is not None:
            if told:
                await self._until_acknowledged(sandbox)
            await self.hosting.end(hosted)
        elif record.upper:
            await remove_file(self.hosting.uppers_dir / record.upper)
        if record.saved_directory:
            await remove_tree(self.saved_dir / record.saved_directory)
        self.logs.ended(sandbox.sandbox_id)

    async def _until_acknowledged(self, sandbox: Sandbox) -> None:
        """Wait a moment until its end is known and nothing is routed to it: to who is connected, a machine that goes
        before its route does looks like one that runs and does not listen."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ACKNOWLEDGE_SECONDS * self.hosting.time_scale):
                await sandbox.acknowledged.wait()

    async def keep_end(self, sandbox: Sandbox, record: SandboxRecord, reason: EndReason, message: str) -> None:
        """Write and report that a sandbox ended by itself. A full disk does not keep it: the next node process finds
        that its machine is gone."""
        ended = replace(
            record,
            state=State.ENDED,
            changed_ms=now_ms(),
            end_reason=reason,
            message=message,
            upper="",
            machine=None,
            saved=None,
            saved_directory="",
            memory_kept=False,
            env_vars={},
            access_token="",
        )
        try:
            await self.store(sandbox, ended)
        except OSError as error:
            log.error("sandbox.end_not_written", sandbox_id=sandbox.sandbox_id, error=str(error))
            sandbox.record = ended
        self.events.publish(sandbox.status())

    async def acknowledge(self, sandbox_ids: list[str]) -> None:
        """Forget ends that the control plane has recorded. Others are left alone."""
        for sandbox_id in sandbox_ids:
            sandbox = self.sandboxes.get(sandbox_id)
            if sandbox is not None and sandbox.record is not None and sandbox.record.state is State.ENDED:
                await self.records.remove(sandbox_id)
                self._forget(sandbox)
                sandbox.acknowledged.set()

    async def _watch(self, sandbox: Sandbox, hosted: Hosted) -> None:
        reason = await hosted.machine.wait()
        if sandbox.ending or sandbox.hosted is not hosted:
            return
        sandbox.watch = None
        sandbox.fault = reason
        await finish(sandbox.interrupt(lambda: self._died(sandbox, hosted, reason)))

    async def _died(self, sandbox: Sandbox, hosted: Hosted, reason: str) -> None:
        sandbox.fault = ""
        if sandbox.ending or sandbox.hosted is not hosted or sandbox.record is None:
            return
        log.warning("machine.died", sandbox_id=sandbox.sandbox_id, reason=reason, state=sandbox.record.state)
        # Beside: its log may wait for an answer of the agent that is gone.
        noted = self.logs.note(sandbox.sandbox_id, "error", f"the machine ended by itself: {reason}")
        noting = self.tasks.start(noted, name=f"note {sandbox.sandbox_id}")
        if sandbox.record.state is State.PAUSED:
            await self.pausing.discard_frozen(sandbox)
            self.events.publish(sandbox.status())
        else:
            await self._end(sandbox, EndReason.DIED, f"the machine ended by itself: {reason}")
        await noting

    def _expired(self, sandbox_id: str) -> None:
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is not None:
            self.tasks.start(self._expire(sandbox), name=f"expire {sandbox_id}")

    async def _expire(self, sandbox: Sandbox) -> None:
        """Do what the sandbox's timeout says, unless the deadline moved meanwhile."""
        async with sandbox.lock:
            record = sandbox.record
            if sandbox.ending or record is None or record.state is not State.RUNNING:
                return
            if record.deadline_ms > now_ms():
                self.deadlines.set(sandbox.sandbox_id, record.deadline_ms)
                return
            if record.on_timeout is TimeoutAction.KILL:
                await finish(self._end(sandbox, EndReason.TIMED_OUT, "the sandbox reached its timeout"))
                return
        await self._pause_by_itself(sandbox, memory=record.on_timeout is TimeoutAction.PAUSE)

    async def _pause_by_itself(self, sandbox: Sandbox, *, memory: bool) -> None:
        """Pause at the deadline; what cannot keep its memory keeps its files."""

        async def pause() -> None:
            record = sandbox.require(State.RUNNING)
            if record.deadline_ms > now_ms():
                self.deadlines.set(sandbox.sandbox_id, record.deadline_ms)
                return
            try:
                await self.pausing.pause(sandbox, memory=memory)
            except (NodeError, RuntimeFailure, OSError) as error:
                if not memory:
                    raise
                log.warning("sandbox.memory_not_kept", sandbox_id=sandbox.sandbox_id, error=str(error))
                await self.pausing.pause(sandbox, memory=False)
            self.events.publish(sandbox.status())

        try:
            async with asyncio.timeout(_PAUSE_SECONDS * self.hosting.time_scale):
                await sandbox.operate(pause)
        except (NoSuchSandbox, WrongState, Interrupted):  # it is ended, or its end is under way
            return
        except Exception as error:
            log.error("sandbox.pause_failed", sandbox_id=sandbox.sandbox_id, exc_info=error)
            if not sandbox.ending:
                self.deadlines.set(sandbox.sandbox_id, now_ms() + 5_000)

    # ---- upkeep

    async def store(self, sandbox: Sandbox, record: SandboxRecord) -> None:
        """Write a record and make it the sandbox's, unless writing fails. A deadline moved meanwhile is kept."""
        async with sandbox.writing:
            before = sandbox.record
            await self.records.write(record)
            moved = sandbox.record
            if moved is not before and moved is not None and record.state is State.RUNNING:
                record = replace(record, deadline_ms=moved.deadline_ms)  # its own write waits for this one
            sandbox.record = record

    def _forget(self, sandbox: Sandbox) -> None:
        if self.sandboxes.get(sandbox.sandbox_id) is sandbox:
            del self.sandboxes[sandbox.sandbox_id]

    async def close(self) -> None:
        """Stop looking after machines. They go on; the next node process adopts them."""
        await self.tasks.close()
        for sandbox in list(self.sandboxes.values()):  # what was cancelled undoes itself
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS), sandbox.lock:
                    pass
        await self.tasks.close()  # what those began
