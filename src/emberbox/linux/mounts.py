"""Mounts: mount, unmount, bind, and clones that show other owners than the disk has (idmapped mounts).

Numbers are from the kernel's UAPI headers; the system calls of 5.2 and later have the same number on every
architecture.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emberbox.linux.libc import syscall

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME, MS_BIND = 1, 2, 4, 8, 1024, 4096

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_EMPTY_PATH = 0x1000
_AT_FDCWD = -100
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 1, 0x00100000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class IdMap:
    """`size` ids from `on_disk` show as ids from `shown`."""

    on_disk: int
    shown: int
    size: int


def mount(source: str | Path, target: Path, fstype: str, flags: int = 0, options: str = "") -> None:
    """mount(2).

    Raises:
        OSError: the kernel's reason.
    """
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), options.encode() or None
    )
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mount {fstype} {source} on {target} ({options}): {os.strerror(error)}")


def bind(source: Path, target: Path) -> None:
    """Show `source` (a file or a folder) at `target` as well."""
    mount(source, target, "none", MS_BIND)


def unmount(target: Path) -> bool:
    """Take the top mount off `target`, now, also while it is in use. False when nothing was mounted there."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOENT):
        return False
    raise OSError(error, f"unmount {target}: {os.strerror(error)}")


def unmount_below(folder: Path) -> list[str]:
    """Unmount everything at or below `folder`, last mounted first; returns what was unmounted."""
    removed = []
    for point in reversed(mounted_below(folder)):
        if unmount(Path(point)):
            removed.append(point)
    return removed


def mounted_below(folder: Path) -> list[str]:
    """Mount points at or below `folder`, in the order of mounting."""
    prefix = str(folder)
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = _unescape(line.split(" ")[4])
        if point == prefix or point.startswith(prefix.rstrip("/") + "/"):
            found.append(point)
    return found


def mount_idmapped(source: Path, target: Path, namespace: int, *, read_only: bool = False) -> None:
    """Clone the mount at `source` to `target`, with owners shown through the maps of a user namespace.

    Ids outside the maps show as the overflow id and cannot be created. Needs Linux 5.12, and a file system that
    allows it (ext4 since 5.12, EROFS since 5.19).

    Args:
        namespace: a descriptor from `user_namespaces`; it stays the caller's.
    """
    tree = syscall(
        _SYS_OPEN_TREE,
        _AT_FDCWD,
        os.fsencode(source),
        _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC,
        what=f"open_tree {source}",
    )
    try:
        set_flags = _MOUNT_ATTR_IDMAP | (_MOUNT_ATTR_RDONLY if read_only else 0)
        attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", set_flags, 0, 0, namespace), 32)
        syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, 32, what=f"mount_setattr {source} (idmap)")
        syscall(
            _SYS_MOVE_MOUNT,
            tree,
            b"",
            _AT_FDCWD,
            os.fsencode(target),
            _MOVE_MOUNT_F_EMPTY_PATH,
            what=f"move_mount {target}",
        )
    finally:
        os.close(tree)


def user_namespaces(*wanted: Sequence[IdMap]) -> list[int]:
    """Descriptors of new user namespaces with these maps, and nobody inside.

    A namespace begins in a short-lived `unshare`, not in a fork of this process: forking a process with threads (and
    with gRPC) is not safe. They start side by side.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(_namespace_holder()) for _ in wanted]
        try:
            for holder, maps in zip(holders, wanted, strict=True):
                found.append(_adopt_namespace(holder, maps))
        except BaseException:
            for descriptor in found:
                os.close(descriptor)
            raise
    return found


def _namespace_holder() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(["unshare", "--user", "--", "cat"], stdin=pipe, stdout=pipe, stderr=pipe)


def _adopt_namespace(holder: subprocess.Popen[bytes], maps: Sequence[IdMap]) -> int:
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    with contextlib.suppress(BrokenPipeError):
        holder.stdin.write(b".")
        holder.stdin.flush()
    if holder.stdout.read(1) != b".":  # `cat` echoes once it runs, and then the namespace is there
        raise OSError(errno.EPERM, f"a user namespace cannot be made: {holder.stderr.read().decode().strip()}")
    text = "".join(f"{m.on_disk} {m.shown} {m.size}\n" for m in maps)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{holder.pid}/{name}").write_text(text)
    return os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)
