"""Firecracker's API, typed: what Emberbox uses of it (version 1.12 and later).

Source of names and rules: Firecracker's `firecracker.yaml` specification. Paths are those that Firecracker itself
sees, inside its jail. Every method raises `ApiError` when Firecracker refuses and `ApiUnreachable` when it does not
answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emberbox.runtime.firecracker.transport import Transport

SnapshotKind = Literal["Full", "Diff"]
VmState = Literal["Not started", "Running", "Paused"]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that requests may take."""

    request: float = 10.0
    snapshot: float = 120.0
    """Writing memory takes as long as the disk needs."""
    ready: float = 10.0
    """From the process's start to its API socket."""

    def scaled(self, factor: float) -> Deadlines:
        return Deadlines(self.request * factor, self.snapshot * factor, self.ready * factor)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A token bucket: `size` bytes or operations are refilled evenly every `refill_ms`."""

    size: int
    refill_ms: int

    def body(self) -> dict[str, int]:
        return {"size": self.size, "refill_time": self.refill_ms}


@dataclass(frozen=True, slots=True)
class Drive:
    drive_id: str
    path: str
    read_only: bool
    bandwidth: RateLimit | None = None
    operations: RateLimit | None = None

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "drive_id": self.drive_id,
            "path_on_host": self.path,
            "is_root_device": False,
            "is_read_only": self.read_only,
        }
        limiter: dict[str, Any] = {}
        if self.bandwidth:
            limiter["bandwidth"] = self.bandwidth.body()
        if self.operations:
            limiter["ops"] = self.operations.body()
        return {**body, "rate_limiter": limiter} if limiter else body


@dataclass(frozen=True, slots=True)
class NetworkInterface:
    interface_id: str
    tap: str
    guest_mac: str

    def body(self) -> dict[str, Any]:
        return {
            "iface_id": self.interface_id,
            "host_dev_name": self.tap,
            "guest_mac": self.guest_mac,
        }


class Firecracker:
    """One Firecracker process, reached by its API socket `name` in the folder `folder`."""

    def __init__(self, folder: Path, name: str, deadlines: Deadlines) -> None:
        self._transport = Transport(folder, name)
        self._deadlines = deadlines

    async def wait_until_ready(self) -> None:
        await self._transport.wait_until_ready(self._deadlines.ready)

    async def state(self) -> VmState:
        """Also of one that is saving its memory, for the last node."""
        answer = await self._request("GET", "/", deadline_seconds=self._deadlines.snapshot)
        state: VmState = answer["state"]
        return state

    async def version(self) -> str:
        return str((await self._request("GET", "/version"))["firecracker_version"])

    # ---- before the start ----

    async def set_machine(self, *, cpu_count: int, memory_mb: int) -> None:
        """Set the size. Dirty pages are tracked, so that a pause can save only those."""
        await self._request(
            "PUT",
            "/machine-config",
            {"vcpu_count": cpu_count, "mem_size_mib": memory_mb, "smt": False, "track_dirty_pages": True},
        )

    async def set_boot(self, *, kernel: str, initramfs: str, command_line: str) -> None:
        await self._request(
            "PUT",
            "/boot-source",
            {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": command_line},
        )

    async def add_drive(self, drive: Drive) -> None:
        await self._request("PUT", f"/drives/{drive.drive_id}", drive.body())

    async def add_network(self, interface: NetworkInterface) -> None:
        await self._request("PUT", f"/network-interfaces/{interface.interface_id}", interface.body())

    async def add_entropy(self) -> None:
        """Give the guest a virtio random number generator fed by the host."""
        await self._request("PUT", "/entropy", {})

    async def add_balloon(self, *, statistics_seconds: int) -> None:
        """Give the guest a balloon, empty, that it may take back when it runs out of memory.

        Args:
            statistics_seconds: how often the guest says how much of its memory is free.
        """
        body = {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": statistics_seconds}
        await self._request("PUT", "/balloon", body)

    async def start(self) -> None:
        await self._request("PUT", "/actions", {"action_type": "InstanceStart"})

    # ---- while it runs ----

    async def pause(self) -> None:
        """Stop the guest's processors. Pausing a paused machine is not an error."""
        await self._request("PATCH", "/vm", {"state": "Paused"})

    async def resume(self, *, after_save: bool = False) -> None:
        """Let the guest's processors go on. Resuming a machine that runs is not an error.

        Args:
            after_save: a save that nobody waits for any more may still be under way, and comes first.
        """
        seconds = self._deadlines.snapshot if after_save else None
        await self._request("PATCH", "/vm", {"state": "Resumed"}, deadline_seconds=seconds)

    async def limit_drive(self, drive_id: str, bandwidth: RateLimit | None, operations: RateLimit | None) -> None:
        """Replace a drive's buckets; None takes one away."""
        none = RateLimit(0, 0)
        limiter = {"bandwidth": (bandwidth or none).body(), "ops": (operations or none).body()}
        await self._request("PATCH", f"/drives/{drive_id}", {"drive_id": drive_id, "rate_limiter": limiter})

    async def set_balloon(self, *, amount_mb: int) -> None:
        """Ask the guest to give up so much of its memory; it does so as fast as it can."""
        await self._request("PATCH", "/balloon", {"amount_mib": amount_mb})

    async def free_memory(self) -> int | None:
        """Bytes that the guest's kernel has free, when it last said; None before it did."""
        free = (await self._request("GET", "/balloon/statistics")).get("free_memory")
        return None if free is None else int(free)

    # ---- snapshots ----

    async def create_snapshot(self, kind: SnapshotKind, *, state: str, memory: str) -> None:
        """Write the paused machine's devices into `state` and its memory into `memory`.

        `Diff` writes only the pages dirtied since the machine started, was loaded, or was last saved, as a sparse file.
        """
        await self._request(
            "PUT",
            "/snapshot/create",
            {"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory},
            deadline_seconds=self._deadlines.snapshot,
        )

    async def load_snapshot(self, *, state: str, memory: str, resume: bool) -> None:
        """Load a machine into this fresh process. Memory is mapped copy-on-write; the file must stay while it lives."""
        await self._request(
            "PUT",
            "/snapshot/load",
            {
                "snapshot_path": state,
                "mem_backend": {"backend_type": "File", "backend_path": memory},
                "enable_diff_snapshots": True,
                "resume_vm": resume,
            },
            deadline_seconds=self._deadlines.snapshot,
        )

    async def _request(self, method: str, path: str, body: Any = None, deadline_seconds: float | None = None) -> Any:
        return await self._transport.request(
            method, path, body, deadline_seconds=deadline_seconds or self._deadlines.request
        )
