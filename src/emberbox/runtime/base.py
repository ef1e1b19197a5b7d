"""The runtime protocol: how a node starts, saves and ends machines.

A runtime knows one way to isolate (`container`, `firecracker`). It is handed a slot and the disks, and gives back a
`Machine`. Deadlines, pools, events and the control plane are the node's business, not the runtime's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast one machine may be. 0: as fast as it can."""

    disk_mb_per_second: int = 0
    """MiB a second, of reading and of writing each at the most."""
    disk_operations_per_second: int = 0
    """Likewise."""
    network_mbit_per_second: int = 0
    """Million bits a second, of sending and of receiving each. The slot's business, not the runtime's."""

    @property
    def limit_disk(self) -> bool:
        return bool(self.disk_mb_per_second or self.disk_operations_per_second)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one machine may use."""

    cpu_count: int
    memory_mb: int
    disk_size_mb: int
    pids: int = 4096
    rates: Rates = Rates()


@dataclass(frozen=True, slots=True)
class Slot:
    """A prepared network namespace with its addresses and firewall, waiting for a machine."""

    index: int
    netns: str
    """Name below /var/run/netns."""
    host_address: IPv4Address
    """The host's end of the veth pair; the machine's default gateway and resolver."""
    address: IPv4Address
    """Where the agent and the user's ports answer, seen from the host."""
    tap: str | None = None
    """Name of the tap inside the namespace, for microVMs."""
    spare: str = ""
    """ID of the machine whose process waits in this slot already; empty when none does."""


def new_machine_id() -> str:
    """An ID that no machine of the node has, of 17 characters."""
    return f"m{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """Everything a runtime needs to start a machine."""

    machine_id: str
    """Unique on the node, at most 32 characters of [a-z0-9]. Not the sandbox ID: a pooled machine has none yet."""
    directory: Path
    """Owned by the machine, on the node's disk; removed by the node after `destroy`."""
    layers: tuple[Path, ...]
    """Read-only images, lowest first."""
    upper: Path
    """The writable ext4 image, already of the asked size."""
    slot: Slot
    limits: Limits
    hostname: str
    control_hash: str
    """Hex SHA-256 of the secret that opens the agent's control routes."""
    dns_servers: tuple[IPv4Address, ...] = ()
    background: bool = False
    """Nobody waits for it: until it is resumed, others that want the processor go first."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A machine on disk: its upper and, where the runtime can, its memory. Lives in one directory."""

    runtime: str
    directory: Path
    upper: Path
    memory: bool
    """True when processes go on after a restore."""
    details: dict[str, Any] = field(default_factory=dict)
    """The runtime's own facts (id range of a container's files, snapshot chain of a microVM)."""


@dataclass(frozen=True, slots=True)
class Stats:
    """One reading. Bytes and CPU seconds since the machine started."""

    cpu_seconds: float
    memory_used: int
    memory_total: int
    memory_cache: int
    disk_used: int
    disk_total: int
    oom_kills: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    memory_snapshots: bool
    """Memory survives the end of the machine's processes (pause frees memory, snapshot and fork keep processes)."""
    live_limits: bool
    """cpu and memory limits can be changed on a running machine."""
    isolation: str
    """One line for people, e.g. `hardware-virtualised guest kernel`."""


@runtime_checkable
class Machine(Protocol):
    """One isolated Linux. Methods raise `RuntimeFailure` (runtime/errors.py) with a sentence for people."""

    spec: MachineSpec
    address: IPv4Address

    def record(self) -> dict[str, Any]:
        """JSON-able facts with which `Runtime.adopt` finds this machine again."""
        ...

    async def alive(self) -> bool: ...

    async def wait(self) -> str:
        """Return when the machine ended by itself, with the reason. Must work for adopted machines too."""
        ...

    def answered(self) -> None:
        """Tell a machine restored from a template's memory that its agent has answered.

        What it touched until now is what every start from that memory needs.
        """
        ...

    async def set_limits(self, limits: Limits) -> None: ...

    async def set_rates(self, rates: Rates) -> None:
        """Change the rates of the disk. Without them what was written can go to the disk before a save or an end."""
        ...

    async def pause(self) -> None:
        """Stop the clock, keep everything in memory."""
        ...

    async def resume(self) -> None: ...

    async def save(
        self,
        into: Path,
        *,
        memory: bool,
        final: bool = False,
        lasting: bool = True,
        resuming: Callable[[], None] = lambda: None,
    ) -> Saved:
        """Write the machine's state into an existing empty directory. The machine stays as it is, paused or running.

        Args:
            final: the machine is paused, and ends before its disk is written again or `into` is used; its disk may
                be moved there by a link.
            lasting: with `memory`, all that is written is on the disk when this returns. Files alone never are: the
                caller flushes them.
            resuming: with `memory`, called when a running machine, which stood still for this, is about to run again.
                Should it not, this raises.
        """
        ...

    async def stats(self) -> Stats: ...

    async def destroy(self) -> None:
        """End every process and release mounts, cgroup, jail. Idempotent. Slot and directory stay the node's."""
        ...


@runtime_checkable
class Runtime(Protocol):
    name: str
    capabilities: Capabilities
    parts: str
    """Names the programs and files that go into a memory saved now. What is kept for speed alone is made again when
    they have changed; what belongs to a user is restored as long as it can be."""

    async def start(self, spec: MachineSpec) -> Machine:
        """Cold start; returns when the machine's first process runs. The node waits for the agent.

        A start or restore that fails or is cancelled leaves nothing of its own behind.
        """
        ...

    async def restore(self, spec: MachineSpec, saved: Saved) -> Machine:
        """Start from what `save` wrote. `spec.upper` is already a clone of `saved.upper`."""
        ...

    async def adopt(self, spec: MachineSpec, record: dict[str, Any]) -> Machine | None:
        """Find a machine again after a restart of the node; None when it is gone (what it left is removed)."""
        ...

    async def sweep(self, keep: frozenset[str]) -> list[str]:
        """Remove what machines other than `keep` (machine IDs) left behind after a crash; returns what was removed.

        What cannot be removed is logged, and tried again by the next sweep: the node starts without.
        """
        ...

    async def forget_layers(self) -> None:
        """Let go of layers whose image file was removed, so that their space becomes free. Machines keep theirs."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class KeepsSpares(Protocol):
    """A runtime whose machines each have a process that can be started before it is known what it will run."""

    async def make_spare(self, machine_id: str, directory: Path, slot: Slot) -> None:
        """Start the process of a machine. `start` or `restore` of a spec with this ID, directory and slot uses it.

        Raises:
            RuntimeFailure: it could not be started; nothing of it is left.
        """
        ...

    async def end_spare(self, machine_id: str) -> None:
        """End a process that no machine was started with. Does nothing for any other ID.

        Raises:
            RuntimeFailure: something of it cannot be removed.
        """
        ...
