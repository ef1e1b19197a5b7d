"""A process that outlives its parent: found again by pid and start time, watched by a descriptor.

Machines are such processes. A pid alone may belong to somebody else after a crash; together with the start time in
clock ticks it does not.
"""

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
    """Field 22 of /proc/PID/stat: clock ticks after boot."""


def identify(pid: int) -> ProcessId | None:
    """Return the living process `pid`'s identity; None when there is none, or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return ProcessId(pid, int(fields[19]))


def alive(process: ProcessId) -> bool:
    return identify(process.pid) == process


def kill(process: ProcessId) -> None:
    """Send SIGKILL; nothing happens when it is gone already."""
    if alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


async def wait_for_end(process: ProcessId) -> None:
    """Return when the process has ended. Works for children and for adopted ones."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        if not alive(process):
            return
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)
        reap(process.pid)


def reap(pid: int) -> None:
    """Collect the exit status if `pid` is a child of ours that has ended."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def end_and_wait(process: ProcessId, deadline_seconds: float) -> bool:
    """Kill the process and block until it is gone; False when it is still there after the deadline."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not alive(process):
            reap(process.pid)
            return True
        os.kill(process.pid, signal.SIGKILL)
        poller = select.poll()  # unlike select(), without a limit of 1024 descriptors
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(deadline_seconds * 1000))
    except ProcessLookupError:
        return True
    finally:
        os.close(descriptor)
        reap(process.pid)
