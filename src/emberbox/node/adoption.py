"""What a node process does first: find the machines of the one before it, and sweep everything that nobody owns.

A machine that is still there goes on. One that is gone turns its sandbox into an end, or, when it was only frozen,
into one that is paused with its files. A host that was restarted in between has lost what ran.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from emberbox.linux.mounts import mounted_below
from emberbox.node.errors import BadValue, LayerMissing, NodeError
from emberbox.node.hosting import Hosted, Hosting
from emberbox.node.machines import Machines
from emberbox.node.model import EndReason, State
from emberbox.node.records import MachineFacts, SandboxRecord, SavedFacts
from emberbox.node.sandbox import Sandbox
from emberbox.node.snapshots import thaw_files
from emberbox.node.tasks import finish
from emberbox.runtime.base import MachineSpec, Slot
from emberbox.runtime.errors import RuntimeFailure

log = structlog.get_logger("emberbox.node")


@dataclass(slots=True)
class Adopted:
    """What the sweeps must leave alone."""

    slots: set[int] = field(default_factory=set)
    machines: set[str] = field(default_factory=set)
    uppers: set[str] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)


async def adopt_all(machines: Machines) -> Adopted:
    """Take over what the records name. Every sandbox is in `machines` afterwards, watched and with its deadline."""
    adopted = Adopted()
    for record in await machines.records.load():
        sandbox = machines.sandboxes[record.sandbox_id] = Sandbox(record.sandbox_id, record)
        if record.state is State.ENDED:
            sandbox.ending = True
            continue
        if record.machine is not None:
            await _adopt(machines, sandbox, record)
        record = sandbox.record or record
        if sandbox.hosted is not None:
            adopted.slots.add(sandbox.hosted.spec.slot.index)
            adopted.machines.add(sandbox.hosted.spec.machine_id)
        if record.upper:
            adopted.uppers.add(record.upper)
        if record.saved_directory:
            adopted.saved.add(record.saved_directory)
    return adopted


async def _adopt(machines: Machines, sandbox: Sandbox, record: SandboxRecord) -> None:
    hosted: Hosted | None = None
    if record.boot_id == machines.boot_id:
        try:
            hosted = await _take_over(machines.hosting, record)
        except (NodeError, RuntimeFailure, OSError) as error:
            log.error("sandbox.not_adopted", sandbox_id=record.sandbox_id, error=str(error))
    if hosted is not None:
        sandbox.hosted = hosted
        log.info("sandbox.adopted", sandbox_id=record.sandbox_id, state=record.state)
        machines.look_after(sandbox)
        if record.state is State.RUNNING and machines.hosting.runtime.capabilities.memory_snapshots:
            machines.tasks.start(sandbox.operate(lambda: _go_on(hosted)), name=f"thaw {sandbox.sandbox_id}")
        return
    assert record.machine is not None
    if record.state is State.PAUSED:
        facts = SavedFacts(machines.hosting.runtime.name, record.upper, False, record.machine.facts)
        sandbox.record = replace(record, memory_kept=False, machine=None, saved=facts)
        try:
            await machines.records.write(sandbox.record)
        except OSError as error:  # a full disk; the next start finds the same
            log.error("sandbox.not_written", sandbox_id=record.sandbox_id, error=str(error))
        log.warning("sandbox.memory_lost", sandbox_id=record.sandbox_id)
    elif record.boot_id != machines.boot_id:
        await _lose(machines, sandbox, record, EndReason.LOST, "the host was restarted while the sandbox ran")
    else:
        why = "the machine ended while the node process was away"
        await _lose(machines, sandbox, record, EndReason.DIED, why)


async def _go_on(hosted: Hosted) -> None:
    """Let go what a pause or snapshot that was interrupted may have left frozen."""
    await thaw_files(hosted)
    await hosted.thaw_programs()


async def _lose(machines: Machines, sandbox: Sandbox, record: SandboxRecord, reason: EndReason, why: str) -> None:
    log.warning("sandbox.ended", sandbox_id=record.sandbox_id, reason=reason, message=why)
    sandbox.ending = True
    await machines.keep_end(sandbox, record, reason, why)
    await machines.logs.note(record.sandbox_id, "error", why)


async def _take_over(hosting: Hosting, record: SandboxRecord) -> Hosted | None:
    """The machine with its slot. The slot is given back when there is no machine, or it cannot be taken over."""
    facts = record.machine
    assert facts is not None
    slot = await hosting.slots.adopt(facts.slot_index)
    hosted: Hosted | None = None
    try:
        hosted = await _find_machine(hosting, record, facts, slot)
    finally:
        if hosted is None:
            await finish(hosting.slots.give_back(slot))
    return hosted


async def _find_machine(hosting: Hosting, record: SandboxRecord, facts: MachineFacts, slot: Slot) -> Hosted | None:
    spec = MachineSpec(
        machine_id=facts.machine_id,
        directory=hosting.machines_dir / facts.machine_id,
        layers=_layers(hosting, record),
        upper=hosting.uppers_dir / record.upper,
        slot=slot,
        limits=record.limits,
        hostname="sandbox",
        control_hash=hashlib.sha256(facts.secret.encode()).hexdigest(),
        dns_servers=(slot.host_address,),
    )
    machine = await hosting.runtime.adopt(spec, facts.facts)
    if machine is None:
        return None
    if record.state is State.RUNNING:
        # A pause or snapshot that was interrupted may have left it with its clock stopped.
        await machine.resume()
    try:
        await hosting.slots.apply(slot, record.network)  # the forwarder of the last process knew it, ours does not
    except BadValue as error:  # a network was denied meanwhile in which it has resolvers of its own
        log.warning("sandbox.resolvers_not_kept", sandbox_id=record.sandbox_id, reason=str(error))
        await hosting.slots.apply(slot, replace(record.network, dns_servers=()))
    return Hosted(machine, spec, facts.secret, hosting.agent(machine, facts.machine_id, facts.secret))


def _layers(hosting: Hosting, record: SandboxRecord) -> tuple[Path, ...]:
    try:
        return tuple(hosting.disks.layer(digest) for digest in record.image.layers)
    except LayerMissing as error:  # the machine has it open; only a cold resume would miss it
        log.warning("layer.missing", sandbox_id=record.sandbox_id, error=str(error))
        return ()


async def sweep_files(machines: Machines, adopted: Adopted) -> list[str]:
    """Remove machine directories, uppers and saved memory that no record names."""
    return await asyncio.to_thread(
        lambda: [
            *_sweep(machines.hosting.machines_dir, adopted.machines),
            *_sweep(machines.hosting.uppers_dir, adopted.uppers),
            *_sweep(machines.saved_dir, adopted.saved),
        ]
    )


def _sweep(directory: Path, keep: set[str]) -> list[str]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    removed = []
    for path in directory.iterdir():
        if path.name in keep:
            continue
        if mounted_below(path):  # its machine could not be ended; what is mounted there may be the host's
            log.error("sweep.still_mounted", path=str(path))
            continue
        removed.append(f"{directory.name}/{path.name}")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return removed
