"""Laying a saved machine's changes over its base, in the memory of a Firecracker that is loading it.

Firecracker maps one file as the guest's memory. With the template's own file there, the page cache has it once for
all machines, and no pause or fork needs a copy of it; what the machine had changed is written into its private mapping.
The moment for that is when the mapping is there and nothing has been read through it: Firecracker opens the disks when
it has made the memory, and only then looks at the guest's queues. So it is held when it opens its upper, a file that
nobody else has.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from emberbox.linux import sparse
from emberbox.linux.opengate import OpenGate
from emberbox.runtime.errors import RuntimeFailure
from emberbox.runtime.firecracker.working_set import mappings
from emberbox.threads import to_thread_whole

MOST_BYTES = 32 * 1024 * 1024
"""Written within a restore; more is merged into a file of its own, off every request's path."""
_MOST_PARTS = 1024  # IOV_MAX
_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; Python names it since 3.13

_libc = ctypes.CDLL(None, use_errno=True)


_libc.process_vm_writev.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_libc.process_vm_writev.restype = ctypes.c_ssize_t

_Part = tuple[int, int, int]
"""(address here, address there, length)"""


class NotWritten(RuntimeFailure):
    """A machine's changes did not get into its memory. It must be ended, and may be loaded from one file instead."""


def why_not_held(folder: Path) -> str:
    """Return why this kernel has not the gate that it takes, tried on a file in `folder`; empty when it has."""
    path = folder / "gate"
    try:
        path.touch()
        try:
            OpenGate(path).close()
        finally:
            path.unlink()
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "the kernel was built without CONFIG_FANOTIFY_ACCESS_PERMISSIONS"
        return str(error)
    return ""


def size(changes: Sequence[Path]) -> int:
    """Bytes that the pieces of memory take."""
    return sum(map(sparse.allocated, changes))


@contextlib.asynccontextmanager
async def written(gate_at: Path, pid: int, base: Path, changes: Sequence[Path]) -> AsyncIterator[None]:
    """While the block makes process `pid` load `base`, write `changes`, oldest first, over its mapping.

    With no changes nothing is done.

    Args:
        gate_at: the file that it opens after it mapped its memory and before it looks at it.

    Raises:
        NotWritten: they could not be written, and its load fails; or it went on without having been held.
    """
    if not changes:
        yield
        return
    try:
        gate = OpenGate(gate_at)
    except OSError as error:
        raise NotWritten(f"Firecracker cannot be held at its disk: {error.strerror}") from error
    loop = asyncio.get_running_loop()
    work: asyncio.Task[None] | None = None

    def opened() -> None:
        nonlocal work
        while work is None and (someone := gate.who()) is not None:
            waiting, who = someone
            if who == pid:
                loop.remove_reader(gate.fileno())
                work = loop.create_task(_write_held(gate, waiting, pid, base, changes))
            else:
                gate.allow(waiting)

    loop.add_reader(gate.fileno(), opened)
    try:
        yield
        if work is None:
            raise NotWritten("Firecracker loaded memory without opening its disk: its changes are not in it")
    except asyncio.CancelledError:
        if work is not None:
            await asyncio.wait((work,))
            work.cancelled() or work.exception()  # looked at: nobody else will
        raise
    except BaseException:
        if work is not None:
            await work  # when it failed, that is why the block did
        raise
    else:
        await work
    finally:
        if work is None:
            loop.remove_reader(gate.fileno())
            await to_thread_whole(gate.close)


async def _write_held(gate: OpenGate, waiting: int, pid: int, base: Path, changes: Sequence[Path]) -> None:
    """Write, let it go on or not, and close the gate, which takes the kernel some milliseconds."""
    try:
        await to_thread_whole(_write_all, pid, base, changes)
    except BaseException as error:
        gate.deny(waiting)
        if isinstance(error, OSError):
            raise NotWritten(f"the machine's changes could not be written to its memory: {error}") from error
        raise
    else:
        gate.allow(waiting)
    finally:
        await to_thread_whole(gate.close)


def _write_all(pid: int, base: Path, changes: Sequence[Path]) -> None:
    facts = base.stat()
    places = list(mappings(pid, facts))
    if sum(end - start for start, end, _ in places) != facts.st_size:
        raise NotWritten(f"Firecracker has not mapped {base.name}, or not all of it")
    for piece in changes:
        write(pid, places, piece)


def write(pid: int, places: Sequence[tuple[int, int, int]], piece: Path) -> None:
    """Write every data range of a piece of memory into a process.

    Args:
        places: (start, end, offset in the file) of its mappings of the memory.

    Raises:
        OSError: it is gone, or has no memory there.
    """
    # Writable, because only of that ctypes gives the address; nothing is written to it, nor kept free for it.
    flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    with piece.open("rb") as reader, mmap.mmap(reader.fileno(), 0, flags=flags, prot=access) as content:
        here = ctypes.addressof(ctypes.c_char.from_buffer(content))
        parts = _placed(sparse.data_ranges(piece), places, here)
        for first in range(0, len(parts), _MOST_PARTS):
            _write_parts(pid, parts[first : first + _MOST_PARTS])


def _placed(ranges: Iterable[tuple[int, int]], places: Sequence[tuple[int, int, int]], here: int) -> list[_Part]:
    """Return the parts that ranges of a file, which begins `here`, are cut into by the mappings."""
    parts = []
    for begin, length in ranges:
        for start, stop, offset in places:
            low, high = max(begin, offset), min(begin + length, offset + stop - start)
            if low < high:
                parts.append((here + low, start + low - offset, high - low))
    return parts


def _write_parts(pid: int, parts: Sequence[_Part]) -> None:
    # Each is struct iovec, an address and a length, one after the other.
    local = array.array("Q", [word for here, _, length in parts for word in (here, length)])
    remote = array.array("Q", [word for _, there, length in parts for word in (there, length)])
    expected = sum(length for _, _, length in parts)
    count = len(parts)
    done = _libc.process_vm_writev(pid, local.buffer_info()[0], count, remote.buffer_info()[0], count, 0)
    if done != expected:
        error = ctypes.get_errno() if done < 0 else errno.EFAULT  # it stops where memory ends
        raise OSError(error, f"{max(done, 0)} of {expected} bytes of memory written: {os.strerror(error)}")
