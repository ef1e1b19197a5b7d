"""A process that outlives its parent: found again by pid and start time, watched and ended by a descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    pid: int
    started: int
    """Clock ticks after boot. A pid may be another process's by now; the two together are not."""


def boot_id() -> str:
    """The kernel's random ID of this boot (proc(5))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> ProcessId | None:
    """The identity of the living process `pid`; None when there is none, or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return ProcessId(pid, int(fields[19]))


def is_alive(process: ProcessId) -> bool:
    return identify(process.pid) == process


def kill(process: ProcessId) -> None:
    """Send SIGKILL to this process and to no other; nothing happens when it is gone."""
    with _descriptor(process) as descriptor:
        if descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)


async def wait_for_end(process: ProcessId) -> None:
    """Return when the process has ended. Works for children and for others."""
    with _descriptor(process) as descriptor:
        if descriptor is None:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
    reap(process.pid)


def end_and_wait(process: ProcessId, seconds: float) -> bool:
    """Kill the process and block until it is gone; False when it is still there after `seconds`."""
    with _descriptor(process) as descriptor:
        if descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poller = select.poll()  # unlike select(), without a limit of 1024 descriptors
            poller.register(descriptor, select.POLLIN)
            if not poller.poll(seconds * 1000):
                return False
    reap(process.pid)
    return True


def reap(pid: int) -> None:
    """Collect the exit status if `pid` is a child of ours that has ended."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


class _descriptor:
    """A pidfd of a living process; None when it is gone."""

    def __init__(self, process: ProcessId) -> None:
        self._process = process
        self._fd: int | None = None

    def __enter__(self) -> int | None:
        try:
            self._fd = os.pidfd_open(self._process.pid)
        except ProcessLookupError:
            return None
        # Looked at after opening: from here on the descriptor means this process, whatever the number is used for.
        return self._fd if is_alive(self._process) else None

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
