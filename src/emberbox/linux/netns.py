"""Named network namespaces, the same kind that `ip netns` makes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from emberbox.linux import mounts

DIRECTORY = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


def create(name: str, prepare: Callable[[], None]) -> None:
    """Make a namespace and run `prepare` inside it. Nothing is left when either fails.

    Raises:
        FileExistsError: there is one of this name.
        OSError: the kernel's reason.
    """
    path = DIRECTORY / name
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400))

    def inside() -> None:
        if _libc.unshare(_CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"a network namespace cannot be made: {os.strerror(error)}")
        mounts.bind(Path(f"/proc/self/task/{threading.get_native_id()}/ns/net"), path)
        prepare()

    try:
        _in_own_thread(inside)
    except BaseException:
        delete(name)
        raise


def delete(name: str) -> bool:
    """Take the name away; the namespace ends with the last process in it. False when there is none."""
    path = DIRECTORY / name
    existed = mounts.unmount(path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        existed = True
    return existed


def run_in(name: str, function: Callable[[], _T]) -> _T:
    """Run `function` in a namespace, on a thread of its own."""

    def inside() -> _T:
        with _entered(name):
            return function()

    return _in_own_thread(inside)


def names(prefix: str) -> list[str]:
    """Namespaces whose name begins with `prefix`."""
    if not DIRECTORY.is_dir():
        return []
    return sorted(path.name for path in DIRECTORY.iterdir() if path.name.startswith(prefix))


@contextlib.contextmanager
def opened(name: str) -> Iterator[int]:
    """A descriptor of a namespace."""
    descriptor = os.open(DIRECTORY / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _entered(name: str) -> Iterator[None]:
    with opened(name) as descriptor:
        if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"network namespace {name} cannot be entered: {os.strerror(error)}")
        yield


def _in_own_thread(function: Callable[[], _T]) -> _T:
    """A thread that changed its namespace must not be used again; this one ends."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
