"""The guest's first file system: kernel modules and emberd as `/init`, in one cpio archive.

The contract with emberd (started by the kernel as `/init`):

- `/modules/load` names the modules to insert, one path a line, in the order they load;
- `/dev`, `/proc`, `/sys`, `/run` and `/newroot` exist and are empty, and `/dev/console` is a node;
- everything else comes by the kernel's command line and the disks (see `guest.py`).

The archive is written uncompressed in the `newc` format: a compressed one is smaller on disk, and
costs every cold boot the time to inflate it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

from emberbox.runtime.firecracker.kernel import KernelTree, modules_in_load_order, read_module

# In order of need. What of these a kernel has built in is left out.
GUEST_MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "erofs",
    "overlay",
    "fuse",
    "tun",
    "vmw_vsock_virtio_transport",
)
OPTIONAL_MODULES = ("ptp_kvm",)
"""Not in every kernel. `ptp_kvm` lets the agent read the host's clock; without it the node tells the time."""

_FOLDERS = ("dev", "proc", "sys", "run", "tmp", "newroot", "modules")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, folder or device node of an archive; `mode` includes the file type."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def cpio(entries: Iterable[Entry]) -> bytes:
    """Return a `newc` archive of `entries`, the same bytes for the same entries.

    Every file belongs to root and is dated 1970, so that a build can be repeated.
    """
    out = bytearray()
    for number, entry in enumerate(entries, start=1):
        _append(out, number, entry)
    _append(out, 0, Entry("TRAILER!!!", 0))
    out.extend(b"\0" * (-len(out) % 512))
    return bytes(out)


def guest_initramfs(tree: KernelTree, emberd: bytes, modules: Iterable[str] = GUEST_MODULES) -> bytes:
    """Return the initramfs that boots a guest into `emberd`.

    Raises:
        GuestFilesError: the kernel lacks a module.
    """
    return cpio(
        [
            *base_entries(),
            *module_entries(tree, modules, OPTIONAL_MODULES),
            file("init", emberd, mode=0o755),
        ]
    )


def base_entries() -> list[Entry]:
    """Return the folders and device nodes that any `/init` finds."""
    return [
        *(folder(name) for name in _FOLDERS),
        character_device("dev/console", 5, 1),
        character_device("dev/null", 1, 3, mode=0o666),
    ]


def module_entries(tree: KernelTree, modules: Iterable[str], optional: Iterable[str] = ()) -> list[Entry]:
    """Return the modules' files and the list `/modules/load`, dependencies first."""
    entries = []
    names = []
    for path in modules_in_load_order(tree, modules, optional):
        name = f"modules/{path.name.split('.ko', 1)[0]}.ko"
        entries.append(file(name, read_module(path)))
        names.append(f"/{name}\n")
    return [*entries, file("modules/load", "".join(names).encode())]


def _append(out: bytearray, number: int, entry: Entry) -> None:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        number,
        entry.mode,
        0,  # uid
        0,  # gid
        links,
        0,  # mtime
        len(entry.data),
        0,  # major and minor of the device the file lies on
        0,
        *entry.device,
        len(name),
        0,  # checksum, unused in this format
    )
    out.extend(b"070701" + b"".join(b"%08X" % field for field in fields))
    out.extend(name)
    out.extend(b"\0" * (-len(out) % 4))
    out.extend(entry.data)
    out.extend(b"\0" * (-len(out) % 4))
