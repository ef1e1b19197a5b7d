"""Copies of shared memory made ahead, for the changes that are laid over it.

A machine is loaded from one file, so a template's memory with a sandbox's changes over it needs a file of its own.
Where the file system shares blocks (reflink) that file is there at once. Elsewhere it begins with a copy of all the
template's memory, which takes longer than the rest of a fork: so one is made ahead, off every request's path, and again
when it has been taken.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from emberbox.linux import sparse

_LEAST_FREE = 0.1
"""Of the disk. Copies save time, and are not worth the last of the space."""
_NICE = 19


_Key = tuple[int, int]


class Copies:
    """At most one copy of each memory, in a folder on its file system. Blocking; any thread may call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wanted: set[_Key] = set()
        self._ready: set[_Key] = set()
        self._changing = threading.Lock()
        self._needless = False

    def clear(self) -> None:
        """Remove every copy, also an earlier process's: what that one had not flushed may be gone."""
        with self._changing:
            self._wanted.clear()
            self._ready.clear()
            shutil.rmtree(self._folder, ignore_errors=True)

    def want(self, memory: Path) -> None:
        """Note that this memory is in use, for `make`. Cheap: a link, which also keeps its inode number from others."""
        with self._changing, contextlib.suppress(OSError):  # on a full disk there would be no copy either
            key = _inode(memory)
            if self._needless or key in self._wanted:
                return
            self._folder.mkdir(mode=0o700, exist_ok=True)
            os.link(memory, self._source(key))
            self._wanted.add(key)

    def provide(self, memory: Path, target: Path) -> None:
        """Make the new file `target` a copy of `memory`: the one made ahead, or one made now.

        Raises:
            OSError: there is no space for it.
        """
        key = _inode(memory)
        with self._changing:
            if key in self._ready:
                self._ready.discard(key)
                self._copy(key).rename(target)
                return
        sparse.clone(memory, target, mode=0o444)

    def make(self) -> None:
        """Make the copies that are wanted and not there, one after the other. Slow, and gives way.

        Raises:
            OSError: one could not be made; nothing is left of it.
        """
        self.prune()
        while (key := self._next()) is not None:
            work = self._folder / "copying"
            work.unlink(missing_ok=True)
            with _giving_way():
                shared = sparse.clone(self._source(key), work, mode=0o444)
                # Nothing depends on it, but a save's own flush would have to wait for this one on a journalling disk.
                sparse.flush(work)
            if shared:
                self._needless = True
                self.clear()
                return
            with self._changing:
                if key in self._wanted:
                    work.rename(self._copy(key))
                    self._ready.add(key)
                else:
                    work.unlink(missing_ok=True)

    def prune(self) -> None:
        """Forget memory that not several have: it is not a template's in use."""
        with self._changing:
            for key in list(self._wanted):
                if self._source(key).stat().st_nlink <= 2:
                    self._wanted.discard(key)
                    self._ready.discard(key)
                    self._copy(key).unlink(missing_ok=True)
                    self._source(key).unlink()

    def _next(self) -> _Key | None:
        with self._changing:
            return next((key for key in self._wanted - self._ready if self._fits(self._source(key))), None)

    @staticmethod
    def _fits(memory: Path) -> bool:
        disk = os.statvfs(memory)
        free = disk.f_bavail * disk.f_frsize - sparse.allocated(memory)
        return free > disk.f_blocks * disk.f_frsize * _LEAST_FREE

    def _source(self, key: _Key) -> Path:
        return self._folder / f"{key[0]:x}-{key[1]:x}.source"

    def _copy(self, key: _Key) -> Path:
        return self._folder / f"{key[0]:x}-{key[1]:x}.copy"


@contextlib.contextmanager
def _giving_way() -> Iterator[None]:
    """The thread of this block gets the processor time that nobody else wants."""
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, _NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, thread, before)


def _inode(memory: Path) -> _Key:
    facts = memory.stat()
    return (facts.st_dev, facts.st_ino)
