"""What a guest boots from: the kernel, the initramfs, and the kernel's command line.

`emberbox setup` makes the two files once for a node; a machine links them into its jail. The command line is the
contract with emberd in the guest: every `emberd.` word below is read by it as `/init`.

    emberd.mode=vm            boot as the machine's first program
    emberd.layers=N           /dev/vda, /dev/vdb, ... are N layers, lowest first; the disk after them is the upper
    emberd.hostname=NAME
    emberd.address=A/P        the network interface eth0
    emberd.gateway=A
    emberd.dns=A[,A]
    emberd.control_hash=HEX   SHA-256 of the secret that opens the agent's control routes
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emberbox.linux import taps
from emberbox.linux.scratch import scratch
from emberbox.runtime.base import MachineSpec
from emberbox.runtime.firecracker import initramfs, kernel
from emberbox.runtime.firecracker.errors import GuestFilesError

_KERNEL_WORDS = (
    "console=ttyS0",
    "quiet",
    "reboot=k",  # a reboot ends the machine
    "panic=-1",  # at once: the machine's end is what the node notices
    "pci=off",  # devices are on MMIO, found through ACPI
    "i8042.noaux i8042.nomux i8042.dumbkbd",  # only the controller's reset line exists
    "random.trust_cpu=on",
    "clocksource=kvm-clock",
)
_PACKAGE = "package"
"""The folder of the unpacked kernel package."""


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """The two files every guest of this node boots from."""

    kernel: Path
    initramfs: Path


def command_line(spec: MachineSpec) -> str:
    """Return the kernel's command line for a machine."""
    words = (
        "emberd.mode=vm",
        f"emberd.layers={len(spec.layers)}",
        f"emberd.hostname={spec.hostname}",
        f"emberd.address={taps.GUEST}",
        f"emberd.gateway={taps.GATEWAY.ip}",
        f"emberd.dns={taps.GATEWAY.ip}",  # translated to the node's forwarder, whichever slot the guest wakes up in
        f"emberd.control_hash={spec.control_hash}",
    )
    return " ".join((*_KERNEL_WORDS, *words))


def make_guest_files(folder: Path, agent: Path, own_kernel: Path | None = None) -> GuestFiles:
    """Return the guest files under `folder`, making them when they are not there or `agent` is another one.

    Blocks for some seconds the first time: it fetches the kernel package through apt.

    Args:
        agent: emberd, a static program.
        own_kernel: an ELF `vmlinux` of the user's instead of the packaged one. The packaged kernel's modules do not
            fit it, so it needs virtio (mmio, blk, net), erofs and overlayfs built in.

    Raises:
        GuestFilesError: the package could not be had, or a file is not what it should be.
    """
    if not agent.is_file():
        raise GuestFilesError(f"the agent {agent} does not exist; build it with 'make agent'")
    folder.mkdir(parents=True, exist_ok=True)
    if own_kernel is not None:
        return _from_own_kernel(folder, agent, own_kernel)
    tree = _kernel_tree(folder)
    modules = json.dumps((initramfs.GUEST_MODULES, initramfs.OPTIONAL_MODULES)).encode()
    name = f"{tree.release}-{_digest(agent.read_bytes(), modules)}"
    files = GuestFiles(folder / f"vmlinux-{tree.release}", folder / f"initramfs-{name}.cpio")
    if not files.kernel.exists():
        _write(files.kernel, kernel.extract_vmlinux(tree.vmlinuz.read_bytes()))
    if not files.initramfs.exists():
        _write(files.initramfs, initramfs.guest_initramfs(tree, agent.read_bytes()))
    return files


def fingerprint(files: GuestFiles) -> str:
    """Return another word when guests boot from other files, or with other words to their kernel."""
    facts = [(path.name, path.stat().st_mtime_ns) for path in (files.kernel, files.initramfs)]
    return _digest(json.dumps([facts, _KERNEL_WORDS]).encode())


def _from_own_kernel(folder: Path, agent: Path, own_kernel: Path) -> GuestFiles:
    image = own_kernel.read_bytes()
    if image[:4] != b"\x7fELF":
        raise GuestFilesError(f"{own_kernel} is not an ELF kernel; Firecracker needs the unpacked vmlinux")
    entries = [*initramfs.base_entries(), initramfs.file("modules/load", b"")]
    archive = initramfs.cpio([*entries, initramfs.file("init", agent.read_bytes(), mode=0o755)])
    files = GuestFiles(folder / f"vmlinux-own-{_digest(image)}", folder / f"initramfs-own-{_digest(archive)}.cpio")
    for path, data in ((files.kernel, image), (files.initramfs, archive)):
        if not path.exists():
            _write(path, data)
    return files


def renew_kernel(folder: Path) -> str:
    """Put the distribution's newest kernel package in place of the one under `folder`, and return its release.

    What boots from the old one goes on. `make_guest_files` makes the new files.

    Raises:
        GuestFilesError: the package could not be had; the old one is still there.
    """
    place = folder / _PACKAGE
    with _fetched(folder, update=True) as tree:
        before = kernel.open_tree(place) if place.exists() else None
        if before is None or before.vmlinuz.read_bytes() != tree.vmlinuz.read_bytes():
            (folder / f"vmlinux-{tree.release}").unlink(missing_ok=True)  # a release may be built again
            if before is not None:
                place.rename(tree.root.with_name("before"))
            tree.root.rename(place)
        return tree.release


def _kernel_tree(folder: Path) -> kernel.KernelTree:
    """Return the unpacked kernel package, fetching one when there is none."""
    place = folder / _PACKAGE
    if not place.exists():
        with _fetched(folder, update=False) as tree:
            tree.root.rename(place)
    return kernel.open_tree(place)


@contextlib.contextmanager
def _fetched(folder: Path, *, update: bool) -> Iterator[kernel.KernelTree]:
    """A kernel package, unpacked in a folder that goes with the block unless it is taken out."""
    with scratch(folder) as work:
        unpacked = work / "tree"
        unpacked.mkdir()
        yield kernel.unpack_packages(kernel.fetch_packages(work, update=update), unpacked)


def _write(path: Path, data: bytes) -> None:
    """Write a whole file or none, readable for every machine's user."""
    with scratch(path.parent) as work:
        made = work / path.name
        with made.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        made.chmod(0o444)
        made.rename(path)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
