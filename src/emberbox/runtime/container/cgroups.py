"""A machine's cgroup: limits, readings, the freezer. Version 2, and version 1 with its one hierarchy a controller."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from emberbox.runtime.base import MIB, Limits, Rates
from emberbox.runtime.container.bundle import CPU_PERIOD_US
from emberbox.runtime.errors import RuntimeFailure
from emberbox.threads import to_thread_whole

ROOT = Path("/sys/fs/cgroup")
_REMOVE_SECONDS = 5.0
_FREEZE_SECONDS = 10.0
_V1_CONTROLLERS = ("cpu", "cpuacct", "memory", "pids", "freezer", "blkio")


@dataclass(frozen=True, slots=True)
class Reading:
    cpu_seconds: float
    memory_used: int
    """Without what the kernel can drop at once (inactive file pages)."""
    memory_cache: int
    memory_total: int
    oom_kills: int


class Cgroup(ABC):
    """One path in every hierarchy. The OCI runtime makes it; `remove` takes it away."""

    swap_accounting: bool

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def folders(self) -> list[Path]:
        """Where it is, in each hierarchy that is mounted."""

    @abstractmethod
    def set_limits(self, limits: Limits) -> None: ...

    @abstractmethod
    def set_rates(self, rates: Rates, disk: int) -> None:
        """Limit requests to the block device with this number (`st_dev`). Version 1 does not count what the kernel
        writes later, out of the page cache."""

    @abstractmethod
    def lift_rates(self) -> None:
        """Take every limit of every device away, at once."""

    @abstractmethod
    def request_freeze(self, frozen: bool) -> None: ...

    @abstractmethod
    def is_frozen(self) -> bool:
        """Every process has stopped."""

    @abstractmethod
    def read(self) -> Reading:
        """Raises `OSError` when the cgroup is gone."""

    async def freeze(self) -> None:
        """Stop every process.

        Raises:
            RuntimeFailure: one of them could not be stopped in time; all go on then.
        """
        await to_thread_whole(self.request_freeze, True)
        deadline = time.monotonic() + _FREEZE_SECONDS
        pause = 0.001
        while not await asyncio.to_thread(self.is_frozen):
            await to_thread_whole(self.request_freeze, True)  # version 1 misses what was started meanwhile
            if time.monotonic() > deadline:
                await asyncio.to_thread(self.request_freeze, False)
                raise RuntimeFailure(f"the machine's processes did not stop within {_FREEZE_SECONDS:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.05)

    async def thaw(self) -> None:
        await asyncio.to_thread(self.request_freeze, False)

    def members(self) -> set[int]:
        """Process ids in it and below it."""
        found: set[int] = set()
        for folder in self.folders():
            with contextlib.suppress(OSError):  # it may be removed meanwhile
                for path in folder.rglob("cgroup.procs"):
                    found.update(int(line) for line in path.read_text().split())
        return found

    def remove(self) -> None:
        """Remove it, waiting a little for its last process to be reaped.

        Raises:
            RuntimeFailure: processes are still in it.
        """
        deadline = time.monotonic() + _REMOVE_SECONDS
        for folder in self.folders():
            while True:
                try:
                    _remove_tree(folder)
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise RuntimeFailure(f"cgroup {folder} could not be removed: {error}") from error
                    time.sleep(0.005)


class CgroupV1(Cgroup):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._of = {name: ROOT / name / path.lstrip("/") for name in _V1_CONTROLLERS}
        self.swap_accounting = (ROOT / "memory/memory.memsw.limit_in_bytes").exists()

    def folders(self) -> list[Path]:
        relative = self.path.lstrip("/")
        roots = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.is_symlink()]
        return [folder / relative for folder in roots]

    def set_limits(self, limits: Limits) -> None:
        (self._of["cpu"] / "cpu.cfs_quota_us").write_text(str(limits.cpu_count * CPU_PERIOD_US))
        (self._of["pids"] / "pids.max").write_text(str(limits.pids))
        names = ["memory.limit_in_bytes"]
        if self.swap_accounting:
            # The sum may never be below memory alone: it goes first when both grow, last when both shrink.
            names.append("memory.memsw.limit_in_bytes")
        size = limits.memory_mb * MIB
        if size > int((self._of["memory"] / "memory.limit_in_bytes").read_text()):
            names.reverse()
        for name in names:
            (self._of["memory"] / name).write_text(str(size))

    def set_rates(self, rates: Rates, disk: int) -> None:
        for unit, rate in (("bps", rates.disk_mb_per_second * MIB), ("iops", rates.disk_operations_per_second)):
            for direction in ("read", "write"):
                file = self._of["blkio"] / f"blkio.throttle.{direction}_{unit}_device"
                file.write_text(f"{_number(disk)} {rate}")  # 0 takes it away

    def lift_rates(self) -> None:
        for file in self._of["blkio"].glob("blkio.throttle.*_device"):
            for number in _numbers_in(file):
                file.write_text(f"{number} 0")

    def request_freeze(self, frozen: bool) -> None:
        (self._of["freezer"] / "freezer.state").write_text("FROZEN" if frozen else "THAWED")

    def is_frozen(self) -> bool:
        return (self._of["freezer"] / "freezer.state").read_text().strip() == "FROZEN"

    def read(self) -> Reading:
        memory = self._of["memory"]
        stat = _numbers(memory / "memory.stat")
        cache = stat.get("total_inactive_file", 0)
        usage = int((memory / "memory.usage_in_bytes").read_text())
        return Reading(
            cpu_seconds=int((self._of["cpuacct"] / "cpuacct.usage").read_text()) / 1e9,
            memory_used=max(usage - cache, 0),
            memory_cache=stat.get("total_cache", 0),
            memory_total=int((memory / "memory.limit_in_bytes").read_text()),
            oom_kills=_numbers(memory / "memory.oom_control").get("oom_kill", 0),
        )


class CgroupV2(Cgroup):
    swap_accounting = True  # without swap in the kernel the OCI runtime leaves it out by itself

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._folder = ROOT / path.lstrip("/")

    def folders(self) -> list[Path]:
        return [self._folder]

    def set_limits(self, limits: Limits) -> None:
        (self._folder / "cpu.max").write_text(f"{limits.cpu_count * CPU_PERIOD_US} {CPU_PERIOD_US}")
        (self._folder / "memory.max").write_text(str(limits.memory_mb * MIB))
        (self._folder / "pids.max").write_text(str(limits.pids))

    def set_rates(self, rates: Rates, disk: int) -> None:
        self._write_io_max(_number(disk), rates)

    def lift_rates(self) -> None:
        for number in _numbers_in(self._folder / "io.max"):
            self._write_io_max(number, Rates())

    def _write_io_max(self, number: str, rates: Rates) -> None:
        size, operations = rates.disk_mb_per_second * MIB or "max", rates.disk_operations_per_second or "max"
        line = f"{number} rbps={size} wbps={size} riops={operations} wiops={operations}"
        (self._folder / "io.max").write_text(line)

    def request_freeze(self, frozen: bool) -> None:
        (self._folder / "cgroup.freeze").write_text("1" if frozen else "0")

    def is_frozen(self) -> bool:
        return _numbers(self._folder / "cgroup.events").get("frozen") == 1

    def read(self) -> Reading:
        stat = _numbers(self._folder / "memory.stat")
        cache = stat.get("inactive_file", 0)
        limit = (self._folder / "memory.max").read_text().strip()
        return Reading(
            cpu_seconds=_numbers(self._folder / "cpu.stat").get("usage_usec", 0) / 1e6,
            memory_used=max(int((self._folder / "memory.current").read_text()) - cache, 0),
            memory_cache=stat.get("file", 0),
            memory_total=0 if limit == "max" else int(limit),
            oom_kills=_numbers(self._folder / "memory.events").get("oom_kill", 0),
        )


def is_version_2() -> bool:
    """True when the host has the unified hierarchy alone."""
    return (ROOT / "cgroup.controllers").is_file()


def children(path: str) -> list[str]:
    """Names of the cgroups directly below `path`, in any hierarchy."""
    parents = [folder for folder in cgroup(path).folders() if folder.is_dir()]
    return sorted({child.name for parent in parents for child in parent.iterdir() if child.is_dir()})


def cgroup(path: str) -> Cgroup:
    """The cgroup at `path` in this host's layout."""
    return CgroupV2(path) if is_version_2() else CgroupV1(path)


def _numbers(path: Path) -> dict[str, int]:
    """A file of `name number` lines."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {parts[0]: int(parts[1]) for parts in pairs if len(parts) == 2}


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _numbers_in(file: Path) -> list[str]:
    """The devices that have a line."""
    return [line.split()[0] for line in file.read_text().splitlines()]


def _remove_tree(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for child in list(folder.iterdir()):
            if child.is_dir():
                _remove_tree(child)
        folder.rmdir()
