"""Bringing one machine up and taking it down, with everything it needs: slot, disks, runtime, agent.

Here is no sandbox: a hosted machine may be claimed by one (`machines.py`), wait in the pool (`pool.py`) or be a step
of a build. Whatever a start made is undone, last made first, when it fails or is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import structlog

from emberbox.node.agent import ANSWER_SECONDS, Agent
from emberbox.node.errors import AgentFailure, AgentTooSlow, NodeError, WrongState
from emberbox.node.files import remove_file, remove_tree
from emberbox.node.identity import Introduction
from emberbox.node.model import OPEN_NETWORK, Image, Network
from emberbox.node.tasks import finish
from emberbox.runtime.base import Limits, Machine, MachineSpec, Rates, Runtime, Saved, Slot, new_machine_id
from emberbox.runtime.errors import RuntimeFailure
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.node")

_START_SECONDS = 30.0
_WAKE_SECONDS = 20.0
"""For a resume and the answer after it."""
_READ_MIB_PER_SECOND = 32
"""A disk at least as fast as this gives a restore its time: the first one after a reboot reads all that was saved."""
_THAW_TRIES, _THAW_PAUSE = 5, 0.5
_DESTROY_SECONDS = 30.0
_READY_FIRST_POLL, _READY_LAST_POLL = 0.02, 0.5
_REHEARSAL_SECONDS = 10.0
# What a login shell reads, without running it: a profile may do what must happen once for each sandbox.
_REHEARSAL = "cat /etc/profile /etc/profile.d/*.sh ~/.profile ~/.bashrc ~/.bash_profile >/dev/null 2>&1"


class SlotSource(Protocol):
    """What the node needs of `slots.Slots`."""

    async def take(self) -> Slot: ...
    async def give_back(self, slot: Slot) -> None: ...
    async def adopt(self, index: int) -> Slot: ...
    async def apply(self, slot: Slot, policy: Network) -> None: ...
    async def shape(self, slot: Slot, mbit_per_second: int) -> None: ...


class DiskSource(Protocol):
    """What the node needs of `disks.Disks`."""

    def layer(self, digest: str) -> Path: ...
    async def new_upper(self, path: Path, size_mb: int) -> None: ...
    async def clone(self, source: Path, target: Path) -> None: ...
    async def clone_cheaply(self, source: Path, target: Path) -> bool: ...
    async def used_bytes(self, path: Path) -> int: ...


@dataclass(frozen=True, slots=True)
class Hosted:
    """A machine together with what the node owns for it."""

    machine: Machine
    spec: MachineSpec
    secret: str
    agent: Agent

    async def freeze_programs(self) -> None:
        """Stop what clients and the template started, before the memory is saved. Never fails: see the log.

        More than one machine may be restored from it, with the same random state and the clock of then. `/init` puts
        both right and lets the programs go on.
        """
        try:
            await self.agent.freeze_programs()
        except AgentFailure as error:
            log.warning("machine.programs_not_frozen", machine_id=self.spec.machine_id, error=str(error))

    async def thaw_programs(self) -> bool:
        """Undo `freeze_programs` in the machine that was saved and goes on, and try hard. Never fails: see the log.

        Returns False when they may still stand still.
        """
        for _ in range(_THAW_TRIES):
            try:
                await self.agent.thaw_programs()
                return True
            except AgentFailure as error:
                log.error("machine.programs_not_thawed", machine_id=self.spec.machine_id, error=str(error))
            if not await self.machine.alive():
                return True
            await asyncio.sleep(_THAW_PAUSE)
        return False

    async def freeze_files(self) -> None:
        """Flush the files to the disk and hold writes, until the machine ends or `thaw_files`.

        The disk is as fast as it can be meanwhile: at its rate a flush may take longer than anybody waits, and what is
        not flushed is lost.

        Raises:
            AgentFailure, RuntimeFailure: it was not flushed; the machine goes on as before.
        """
        limited = self.spec.limits.rates.limit_disk
        try:
            if limited:
                await finish(self.machine.set_rates(Rates()))  # to its end: it must not come after what undoes it
            await self.agent.freeze_files()
        except BaseException:
            if limited:
                await finish(self.machine.set_rates(self.spec.limits.rates))
            raise

    async def thaw_files(self) -> None:
        """Undo `freeze_files`.

        Raises:
            AgentFailure, RuntimeFailure
        """
        try:
            await self.agent.thaw_files()
        finally:
            if self.spec.limits.rates.limit_disk:
                await self.machine.set_rates(self.spec.limits.rates)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a machine starts from.

    `upper`: that disk as it is, used in place and never removed by a failed start. `saved`: what `Machine.save` wrote,
    its disk cloned unless `upper` is given too. Neither: a blank disk.
    """

    layers: tuple[str, ...]
    saved: Saved | None = None
    saved_secret: str = ""
    upper: Path | None = None


@dataclass(slots=True)
class _Laps:
    """Milliseconds of the parts of one start, for the log."""

    taken: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.taken[f"{name}_ms"] = round((now - self._last) * 1000, 1)
        self._last = now


class Hosting:
    """Starts and ends machines in `directory` (`machines/` and `uppers/` below it)."""

    def __init__(
        self,
        runtime: Runtime,
        slots: SlotSource,
        disks: DiskSource,
        directory: Path,
        *,
        time_scale: float = 1.0,
        ready_seconds: float = 120.0,
    ) -> None:
        self.runtime = runtime
        self.slots = slots
        self.disks = disks
        self.machines_dir = directory / "machines"
        self.uppers_dir = directory / "uppers"
        self.time_scale = time_scale
        self._ready_seconds = ready_seconds
        self._remembers = runtime.capabilities.memory_snapshots
        self._stuck: dict[str, tuple[Hosted, bool]] = {}
        self._starting = 0

    @property
    def starting(self) -> int:
        """Machines whose start is under way."""
        return self._starting

    def create_directories(self) -> None:
        for directory in (self.machines_dir, self.uppers_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def start(
        self,
        origin: Origin,
        limits: Limits,
        *,
        hostname: str,
        introduction: Introduction,
        network: Network = OPEN_NETWORK,
        background: bool = False,
    ) -> Hosted:
        """Start a machine and return when its agent has been told what it is.

        Args:
            introduction: the first request to the agent: what follows a restore costs memory that is not there yet,
                and a question before it would cost again.
            background: see `MachineSpec`.

        Raises:
            NodeFull, DiskFull, LayerMissing: see there.
            AgentFailure: the machine ended or its agent did not answer in time.
            RuntimeFailure: the runtime could not start it.
        """
        undo = contextlib.AsyncExitStack()
        began = time.monotonic()
        self._starting += 1
        try:
            return await self._start(origin, limits, hostname, introduction, network, background, undo)
        except BaseException as error:
            ms = round((time.monotonic() - began) * 1000)
            log.info("machine.start_undone", hostname=hostname, error=str(error) or type(error).__name__, ms=ms)
            await finish(undo.aclose())
            raise
        finally:
            self._starting -= 1

    async def _start(
        self,
        origin: Origin,
        limits: Limits,
        hostname: str,
        introduction: Introduction,
        network: Network,
        background: bool,
        undo: contextlib.AsyncExitStack,
    ) -> Hosted:
        laps = _Laps()
        layers = tuple(self.disks.layer(digest) for digest in origin.layers)
        slot = await finish(self._take_slot(undo))
        machine_id = slot.spare or new_machine_id()
        if network != OPEN_NETWORK:
            await self.slots.apply(slot, network)
        if limits.rates.network_mbit_per_second:
            await self.slots.shape(slot, limits.rates.network_mbit_per_second)
        laps.lap("slot")
        directory = self.machines_dir / machine_id
        undo.push_async_callback(remove_tree, directory)
        await to_thread_whole(directory.mkdir, mode=0o700, exist_ok=bool(slot.spare))
        upper = origin.upper
        if upper is None:
            upper = self.uppers_dir / f"{machine_id}.ext4"
            undo.push_async_callback(remove_file, upper)
            if origin.saved is not None:
                await self.disks.clone(origin.saved.upper, upper)
            else:
                await self.disks.new_upper(upper, limits.disk_size_mb)
        laps.lap("disk")
        secret = origin.saved_secret or secrets.token_hex(32)
        spec = MachineSpec(
            machine_id=machine_id,
            directory=directory,
            layers=layers,
            upper=upper,
            slot=slot,
            limits=limits,
            hostname=hostname,
            control_hash=hashlib.sha256(secret.encode()).hexdigest(),
            dns_servers=(slot.host_address,),
            background=background,
        )
        saved = origin.saved if origin.saved is not None and (origin.saved.memory or not self._remembers) else None
        reads = limits.memory_mb / _READ_MIB_PER_SECOND if saved is not None and saved.memory else 0.0
        limit = (_START_SECONDS + reads) * self.time_scale
        try:
            async with asyncio.timeout(limit):
                machine = await (self.runtime.start(spec) if saved is None else self.runtime.restore(spec, saved))
        except TimeoutError:
            raise RuntimeFailure(f"the machine did not start within {limit:g} s") from None
        undo.push_async_callback(machine.destroy)
        laps.lap("runtime")
        hosted = Hosted(machine, spec, secret, self.agent(machine, machine_id, secret))
        hosted = await self._introduce_first(hosted, introduction)
        laps.lap("agent")
        log.debug("machine.started", machine_id=machine_id, **laps.taken)
        undo.pop_all()
        return hosted

    async def _take_slot(self, undo: contextlib.AsyncExitStack) -> Slot:
        slot = await self.slots.take()
        undo.push_async_callback(self.slots.give_back, slot)
        return slot

    def agent(self, machine: Machine, machine_id: str, secret: str) -> Agent:
        """The client of a machine's agent."""
        return Agent(machine.address, secret, label=machine_id, time_scale=self.time_scale)

    async def introduce(
        self,
        hosted: Hosted,
        introduction: Introduction,
        *,
        within: float | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> Hosted:
        """Tell a machine what it is; returns it with its new secret when it got one.

        Args:
            within, seconds: see `Agent.init`.

        Raises:
            AgentFailure
        """
        if not introduction.new_secret:
            await hosted.agent.init(introduction.make_body, within=within, seconds=seconds)
            return hosted
        secret = secrets.token_hex(32)
        control = {"controlHash": hashlib.sha256(secret.encode()).hexdigest()}
        await hosted.agent.init(lambda: {**introduction.make_body(), **control}, within=within, seconds=seconds)
        return replace(hosted, secret=secret, agent=self.agent(hosted.machine, hosted.spec.machine_id, secret))

    async def wake(self, hosted: Hosted, introduction: Introduction) -> Hosted:
        """Let a machine that stands still go on and tell it what it is; returns it as `introduce` does.

        A connection is asked for before it goes on: what then happens in it need not wait for the runtime's answer
        here.

        Raises:
            AgentFailure, RuntimeFailure
        """
        limit = ANSWER_SECONDS * self.time_scale
        introduced = asyncio.ensure_future(self.introduce(hosted, introduction, seconds=_WAKE_SECONDS))
        try:
            await hosted.machine.resume()
            try:
                async with asyncio.timeout(limit):
                    return await introduced
            except TimeoutError:
                raise AgentTooSlow(f"the agent did not answer /init within {limit:g} s of the resume") from None
        finally:
            introduced.cancel()
            await asyncio.gather(introduced, return_exceptions=True)

    async def _introduce_first(self, hosted: Hosted, introduction: Introduction) -> Hosted:
        limit = _START_SECONDS * self.time_scale
        ended = asyncio.ensure_future(hosted.machine.wait())
        introduced = asyncio.ensure_future(self.introduce(hosted, introduction, within=limit))
        try:
            await asyncio.wait((ended, introduced), return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not introduced.done():
                raise AgentFailure(f"the machine ended while it started: {ended.result()}")
            return await introduced
        finally:
            for task in (ended, introduced):
                task.cancel()
            await asyncio.gather(ended, introduced, return_exceptions=True)

    async def run_template_commands(self, hosted: Hosted, image: Image, token: str = "") -> None:
        """Run the template's start command and return when its ready command succeeds.

        Raises:
            AgentFailure: a command could not be run, or ready did not come in time.
        """
        user, workdir = image.default_user or "user", image.default_workdir
        if image.start_command:
            await hosted.agent.start_command(image.start_command, user=user, workdir=workdir, token=token, tag="start")
        if not image.ready_command:
            return
        limit = self._ready_seconds * self.time_scale
        pause = _READY_FIRST_POLL
        try:
            async with asyncio.timeout(limit):
                while await hosted.agent.run_command(
                    image.ready_command, user=user, workdir=workdir, token=token, timeout=limit
                ):
                    await asyncio.sleep(pause)
                    pause = min(pause * 1.5, _READY_LAST_POLL)
        except TimeoutError:
            raise AgentFailure(
                f"the template's ready command did not succeed within {limit:g} s: {image.ready_command!r}"
            ) from None

    async def rehearse(self, hosted: Hosted, image: Image) -> None:
        """Start a shell as a first command does, so that memory holds what that needs. Failing costs time alone."""
        limit = _REHEARSAL_SECONDS * self.time_scale
        words = ("/bin/bash", "-c", _REHEARSAL)
        try:
            async with asyncio.timeout(limit):
                async for _ in hosted.agent.stream(words, user=image.default_user or "user", timeout=limit):
                    pass
        except (AgentFailure, TimeoutError) as error:
            log.warning("machine.not_rehearsed", machine_id=hosted.spec.machine_id, error=str(error))

    async def end(self, hosted: Hosted, *, keep_upper: bool = False) -> bool:
        """Take a machine down: processes, slot, directory and, unless `keep_upper`, its disk.

        Returns False when the runtime could not end it; `retry_stuck` tries again.
        """
        return await finish(self._end(hosted, keep_upper))

    async def _end(self, hosted: Hosted, keep_upper: bool) -> bool:
        machine_id = hosted.spec.machine_id
        try:
            async with asyncio.timeout(_DESTROY_SECONDS * self.time_scale):
                await hosted.machine.destroy()
        except (RuntimeFailure, OSError, TimeoutError) as error:
            log.error("machine.destroy_failed", machine_id=machine_id, error=str(error) or type(error).__name__)
            self._stuck[machine_id] = (hosted, keep_upper)
            return False
        self._stuck.pop(machine_id, None)
        try:
            await self.slots.give_back(hosted.spec.slot)
        except NodeError as error:
            log.error("slot.give_back_failed", slot=hosted.spec.slot.index, error=str(error))
        await remove_tree(hosted.spec.directory)
        if not keep_upper:
            await remove_file(hosted.spec.upper)
        return True

    async def retry_stuck(self) -> None:
        """Try again to end the machines that could not be ended."""
        for hosted, keep_upper in list(self._stuck.values()):
            await self.end(hosted, keep_upper=keep_upper)

    @property
    def stuck(self) -> frozenset[str]:
        """IDs of machines that could not be ended yet."""
        return frozenset(self._stuck)

    def check_unused(self, upper: Path) -> None:
        """Raise `WrongState` while a machine that could not be ended still has this disk."""
        if any(hosted.spec.upper == upper for hosted, _ in self._stuck.values()):
            raise WrongState("the sandbox's last machine is still being ended; try again in a minute")
