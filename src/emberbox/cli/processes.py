"""Processes known by pid and start time, so that a reused pid is never taken for the one we started."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessRef:
    """One process, for ever.

    `started` is field 22 of `/proc/PID/stat` (clock ticks since boot, proc(5)); `boot` the kernel's boot ID.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessRef:
        """Raises ProcessLookupError when there is no such process."""
        started = _start_time(pid)
        if started is None:
            raise ProcessLookupError(pid)
        return cls(pid, started, boot_id())

    @property
    def alive(self) -> bool:
        return self.boot == boot_id() and _start_time(self.pid) == self.started

    def signal(self, number: int) -> bool:
        """Send a signal; false when the process is gone."""
        if not self.alive:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def stop(self, *, grace: float) -> None:
        """SIGTERM, wait up to `grace` seconds, SIGKILL. Returns when the process is gone."""
        self.signal(signal.SIGTERM)
        if not self.wait(grace):
            self.signal(signal.SIGKILL)
            self.wait(10)

    def wait(self, seconds: float) -> bool:
        """Wait for the end; false when it is still there after `seconds`."""
        end = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True


def boot_id() -> str:
    """The kernel's ID of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command, in parentheses, may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
