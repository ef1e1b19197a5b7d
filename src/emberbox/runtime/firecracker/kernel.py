"""The guest kernel: the distribution's kernel for virtual machines, unpacked.

Here live: fetching its packages through apt (which verifies its signature), taking the ELF
`vmlinux` that Firecracker wants out of the packed `vmlinuz`, and finding which modules a guest
needs and in which order they load. Building the initramfs out of that is `initramfs.py`.

Everything here blocks and is meant for `emberbox setup`; callers on an event loop use a thread.
Only the standard library is imported, so that the lab can use it before anything is installed.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from emberbox.runtime.firecracker.errors import GuestFilesError

META_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")
"""Debian's and Ubuntu's, which depend on the newest kernel's package."""

# Boot protocol, Documentation/arch/x86/boot.rst: the offsets of the header's fields.
_SETUP_SECTS = 0x1F1
_HEADER_MAGIC = 0x202
_PAYLOAD_OFFSET = 0x248
_PAYLOAD_LENGTH = 0x24C

_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_ELF_MAGIC = b"\x7fELF"

_TOOL_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class KernelTree:
    """An unpacked kernel.

    Attributes:
        root: the folder that holds its `boot`, and `lib/modules` or, since Debian 13, `usr/lib/modules`.
        release: the kernel's release as `uname -r` prints it, e.g. `6.1.0-40-cloud-amd64`.
    """

    root: Path
    release: str

    @property
    def vmlinuz(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        places = [self.root / above / "modules" / self.release for above in ("lib", "usr/lib")]
        return next((place for place in places if place.is_dir()), places[0])


def fetch_packages(into: Path, *, update: bool = False) -> list[Path]:
    """Download the newest kernel for virtual machines through apt into the folder `into`: one package or several.

    apt checks them against the distribution's signed index.

    Args:
        update: ask the distribution first what is newest; otherwise this host's lists say, where it has them.

    Raises:
        GuestFilesError: apt is missing, or it could not find or fetch a package.
    """
    names = [] if update else _packages(into)
    if not names:  # a fresh machine has no lists of packages yet
        _run(["apt-get", "update", "-q"], cwd=into)
        names = _packages(into)
    if not names:
        raise GuestFilesError(
            f"apt knows neither package {' nor '.join(META_PACKAGES)}: add the distribution's main repository, or "
            "name a kernel of your own with EMBERBOX_GUEST_KERNEL"
        )
    _run(["apt-get", "download", "-q", *names], cwd=into)
    found = []
    for name in names:
        packages = sorted(into.glob(f"{name}_*.deb"))
        if not packages:
            raise GuestFilesError(f"apt reported success but left no {name} package in {into}")
        found.append(packages[-1])
    return found


def _packages(folder: Path) -> list[str]:
    """Return the newest kernel's package and, where they have one of their own, its modules'; none when apt does not
    know any."""
    for meta in META_PACKAGES:
        images = _dependencies(meta, "linux-image-", folder)
        if images:
            return [images[0], *_dependencies(images[0], "linux-modules-", folder)]
    return []


def _dependencies(package: str, prefix: str, folder: Path) -> list[str]:
    """Return what a package depends on and has that prefix; none when apt does not know it."""
    try:
        depends = _run(["apt-cache", "depends", "--important", package], cwd=folder)
    except GuestFilesError:
        return []
    names = (line.split()[-1] for line in depends.splitlines() if line.strip().startswith("Depends:"))
    return [name for name in names if name.startswith(prefix)]


def unpack_packages(packages: Iterable[Path], into: Path) -> KernelTree:
    """Unpack a kernel's packages into the empty folder `into`.

    Raises:
        GuestFilesError: they are not a kernel's, or dpkg is missing.
    """
    for package in packages:
        _run(["dpkg-deb", "-x", str(package), str(into)])
    return open_tree(into)


def open_tree(root: Path) -> KernelTree:
    """Return the kernel tree under `root`.

    Raises:
        GuestFilesError: there is no kernel, or more than one.
    """
    releases = sorted(path.name.removeprefix("vmlinuz-") for path in root.glob("boot/vmlinuz-*"))
    if len(releases) != 1:
        raise GuestFilesError(f"expected one kernel under {root}/boot, found {len(releases)}")
    tree = KernelTree(root=root, release=releases[0])
    if not tree.modules.is_dir():
        raise GuestFilesError(f"the kernel {tree.release} has no modules under {tree.modules}")
    return tree


def extract_vmlinux(vmlinuz: bytes) -> bytes:
    """Return the ELF kernel packed inside a `vmlinuz` (bzImage) file.

    Raises:
        GuestFilesError: not a bzImage, a packing that is not known, or no ELF inside.
    """
    if len(vmlinuz) < _PAYLOAD_LENGTH + 4 or vmlinuz[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        raise GuestFilesError("not a Linux boot image: the header's magic is missing")
    # The protocol says: a setup_sects of 0 means 4.
    setup_sects = vmlinuz[_SETUP_SECTS] or 4
    offset, length = struct.unpack_from("<II", vmlinuz, _PAYLOAD_OFFSET)
    start = (setup_sects + 1) * 512 + offset
    payload = vmlinuz[start : start + length]
    if not payload or len(payload) != length:
        raise GuestFilesError("the Linux boot image is cut short")
    elf = _inflate(payload)
    if not elf.startswith(_ELF_MAGIC):
        raise GuestFilesError("the boot image's payload is not an ELF kernel")
    return elf


def _inflate(payload: bytes) -> bytes:
    if payload.startswith(_ELF_MAGIC):
        return payload
    if payload.startswith(_LZ4_LEGACY_MAGIC):
        return _pipe(["lz4", "-dc"], _without_size_trailer(payload))
    if payload.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload[:-4])
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _pipe(["zstd", "-dc"], payload[:-4])
    raise GuestFilesError(f"the kernel is packed in an unknown way (magic {payload[:4].hex()})")


def _without_size_trailer(payload: bytes) -> bytes:
    """Cut the inflated size that the kernel's build appends, which is no part of the LZ4 frame."""
    position = len(_LZ4_LEGACY_MAGIC)
    while position + 4 <= len(payload):
        (size,) = struct.unpack_from("<I", payload, position)
        if position + 4 + size > len(payload):
            break
        position += 4 + size
    return payload[:position]


def modules_in_load_order(tree: KernelTree, wanted: Iterable[str], optional: Iterable[str] = ()) -> list[Path]:
    """Return the files of the modules `wanted` and of all they depend on, dependencies first.

    A name may use `-` or `_`. A name that the kernel has built in is left out, and so is one of `optional` that it
    does not have.

    Raises:
        GuestFilesError: the kernel has no such module.
    """
    files = {_module_name(path): path for path in tree.modules.rglob("*.ko*")}
    builtin_list = tree.modules / "modules.builtin"
    builtin = (
        {_module_name(Path(line)) for line in builtin_list.read_text().split()} if builtin_list.exists() else set()
    )
    ordered: dict[str, Path] = {}

    def visit(name: str, needed_by: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in files:
            raise GuestFilesError(f"the kernel {tree.release} has no module '{name}', needed by {needed_by}")
        for dependency in module_dependencies(read_module(files[name])):
            visit(dependency, needed_by=f"module '{name}'")
        ordered[name] = files[name]

    for name in wanted:
        visit(name.replace("-", "_"), needed_by="the guest")
    for name in optional:
        with contextlib.suppress(GuestFilesError):
            visit(name.replace("-", "_"), needed_by="the guest")
    return list(ordered.values())


def read_module(path: Path) -> bytes:
    """Return a module's ELF, inflated when the distribution packed it (`.ko.xz`).

    Raises:
        GuestFilesError: a packing that is not known.
    """
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return _pipe(["zstd", "-dc"], data)
    raise GuestFilesError(f"module {path.name} is packed in an unknown way")


def module_dependencies(module: bytes) -> list[str]:
    """Return the names that the module's own `depends=` line (section `.modinfo`) lists.

    The package does not carry `modules.dep`; its installation script would make it.
    """
    marker = b"\0depends="
    at = module.find(marker)
    if at < 0:
        return []
    end = module.index(b"\0", at + len(marker))
    names = module[at + len(marker) : end].decode("ascii")
    return [name.replace("-", "_") for name in names.split(",") if name]


def _module_name(path: Path) -> str:
    return path.name.split(".ko", 1)[0].replace("-", "_")


def _run(command: list[str], cwd: Path | None = None) -> str:
    return _pipe(command, b"", cwd=cwd).decode("utf-8", "replace")


def _pipe(command: list[str], data: bytes, cwd: Path | None = None) -> bytes:
    if shutil.which(command[0]) is None:
        raise GuestFilesError(f"the program '{command[0]}' is missing; install it and try again")
    done = subprocess.run(
        command,
        input=data,
        capture_output=True,
        cwd=cwd,
        timeout=_TOOL_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise GuestFilesError(f"'{' '.join(command)}' failed ({done.returncode}): {words}")
    return done.stdout
