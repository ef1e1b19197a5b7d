"""emberd as `/init` of a whole virtual machine, under QEMU's emulation: the microVM's way to boot without KVM.

QEMU stands for Firecracker here: the same kernel, initramfs and kernel command line, virtio disks in the same order;
only the bus (PCI) and the network's addresses differ.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from emberbox.runtime.firecracker import initramfs, kernel
from tests.support.agent import CONTROL, build
from tests.support.firecracker import cache_dir, one_at_a_time
from tests.support.ports import free_ports

NEEDED = ("qemu-system-x86_64", "mkfs.erofs", "mke2fs", "busybox")
# The agent answers some seconds after power-on; a busy two-core host may take far longer.
PATIENCE = 600


def kernel_tree() -> kernel.KernelTree:
    """The guest kernel's package, unpacked, from the tests' cache."""
    folder = cache_dir() / "guest"
    folder.mkdir(exist_ok=True)
    with one_at_a_time("guest"):
        if not (folder / "package").exists():
            work = Path(tempfile.mkdtemp(dir=folder))
            try:
                kernel.unpack_packages(kernel.fetch_packages(work), work / "tree")
                (work / "tree").rename(folder / "package")
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return kernel.open_tree(folder / "package")


class AgentVM:
    """One virtual machine of two layers (erofs, ext4) and an upper; use it as a context manager."""

    def __init__(self) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="agent-vm-"))
        self.console = self._dir / "console.log"
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> AgentVM:
        try:
            self._make_disks()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
        shutil.rmtree(self._dir, ignore_errors=True)

    def _make_disks(self) -> None:
        base, second = self._dir / "base", self._dir / "second"
        for folder in ("bin", "etc", "root", "home", "usr/bin"):
            (base / folder).mkdir(parents=True)
        shutil.copy2(shutil.which("busybox") or "", base / "bin" / "busybox")
        for name in ("sh", "ls", "cat", "id", "sleep", "mount", "ip", "hostname", "touch", "sync", "df", "nproc"):
            (base / "bin" / name).symlink_to("busybox")
        (base / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
        (base / "etc" / "group").write_text("root:x:0:\nuser:x:1000:\n")
        (base / "etc" / "resolv.conf").symlink_to("../run/nowhere")
        (base / "home" / "user").mkdir()
        os.chown(base / "home" / "user", 1000, 1000)
        (base / "etc" / "which").write_text("base")
        (second / "u" / "etc").mkdir(parents=True)  # an ext4 layer is what a build's machine wrote
        (second / "w" / "work").mkdir(parents=True)
        (second / "u" / "etc" / "which").write_text("second")
        run = lambda *a: subprocess.run([str(x) for x in a], check=True, capture_output=True)  # noqa: E731
        run("mkfs.erofs", "-zlz4hc", self._dir / "layer1", base)
        run("mke2fs", "-q", "-t", "ext4", "-d", second, self._dir / "layer2", "16m")
        run("mke2fs", "-q", "-t", "ext4", self._dir / "upper", "64m")

    def _start(self) -> None:
        tree = kernel_tree()
        modules = ("virtio_pci", *initramfs.GUEST_MODULES)
        (self._dir / "initramfs").write_bytes(initramfs.guest_initramfs(tree, build().read_bytes(), modules))
        words = [
            *("console=ttyS0", "quiet", "reboot=t", "panic=-1", "mitigations=off"),
            *("emberd.mode=vm", "emberd.layers=2", "emberd.hostname=booted"),
            *("emberd.address=10.0.2.15/24", "emberd.gateway=10.0.2.2", "emberd.dns=10.0.2.3,192.0.2.53"),
            f"emberd.control_hash={hashlib.sha256(CONTROL.encode()).hexdigest()}",
        ]
        drives = []
        for number, name in enumerate(("layer1", "layer2", "upper")):
            read_only = "off" if name == "upper" else "on"
            drive = f"file={self._dir / name},if=none,id=d{number},format=raw,readonly={read_only}"
            drives += ["-drive", drive, "-device", f"virtio-blk-pci,drive=d{number}"]
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "512"),
                *("-display", "none", "-no-reboot", "-nodefaults", "-no-user-config"),
                *("-serial", f"file:{self.console}"),
                *("-kernel", str(tree.vmlinuz), "-initrd", str(self._dir / "initramfs"), "-append", " ".join(words)),
                *("-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{self._port}-10.0.2.15:49983"),
                *("-device", "virtio-net-pci,netdev=n,romfile="),
                *("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r"),
                *drives,
            ]
        )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"the machine did not boot:\n{self.console.read_text(errors='replace')}")

    def control(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Call a control route with the node's secret."""
        request = urllib.request.Request(
            f"{self.url}{path}", data=body, method=method, headers={"X-Ember-Control": CONTROL}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
