"""A process that outlives its parent: found again by pid and start time, watched and ended by a descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    pid: int
    started: int
    """Clock ticks after boot. A pid may be another process's by now; the two together are not."""


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
    """Return when the process has ended. Works for processes that are no children of ours."""
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
