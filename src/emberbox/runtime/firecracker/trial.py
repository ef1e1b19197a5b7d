"""Whether this host's KVM really runs a guest kernel: boots one and sees it come to the end of its own start.

A `/dev/kvm` that exists is no proof: a nested or software implementation may offer one on which an ordinary kernel
dies in its first instructions. The trial guest has no root file system and no program, so a kernel that works ends
with its panic about just that.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

from emberbox.commands import CommandFailed, CommandTimedOut, run
from emberbox.runtime.firecracker import initramfs
from emberbox.runtime.firecracker.errors import FirecrackerError

_PANIC = "Kernel panic - not syncing: VFS"
_MEMORY_MB = 128
_SECONDS = 10.0
_OWN_LINES = ("anonymous-instance", "Running Firecracker")


class KvmUnusable(FirecrackerError):
    """This host's KVM does not run a guest; the message says how it failed."""


async def boot(firecracker: Path, kernel: Path, *, time_scale: float = 1.0) -> None:
    """Boot `kernel` once and return when it has run to its end.

    Raises:
        KvmUnusable: it did not.
    """
    with tempfile.TemporaryDirectory(prefix="emberbox-trial-") as folder:
        config = await asyncio.to_thread(_write_config, Path(folder), kernel)
        command = (firecracker, "--no-api", "--config-file", config, "--level", "Error")
        try:
            done = await run(command, timeout=_SECONDS * time_scale, check=False)
        except CommandTimedOut:
            raise KvmUnusable(f"a guest kernel did not boot within {_SECONDS * time_scale:g} s") from None
        except CommandFailed as error:
            raise KvmUnusable(str(error)) from error
    if _PANIC not in done.text:
        lines = [line for line in (done.text + done.error_text).splitlines() if line.strip()]
        words = [line for line in lines if not any(own in line for own in _OWN_LINES)] or lines
        last = f"; it said: {words[-1].strip()[:300]}" if words else ""
        raise KvmUnusable(f"a guest kernel died before it had booted (exit code {done.returncode}){last}")


def _write_config(folder: Path, kernel: Path) -> Path:
    archive = folder / "initramfs.cpio"
    archive.write_bytes(initramfs.cpio([initramfs.folder("dev"), initramfs.character_device("dev/console", 5, 1)]))
    config = folder / "config.json"
    config.write_text(
        json.dumps(
            {
                "boot-source": {
                    "kernel_image_path": str(kernel),
                    "initrd_path": str(archive),
                    "boot_args": "console=ttyS0 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd",
                },
                "drives": [],
                "machine-config": {"vcpu_count": 1, "mem_size_mib": _MEMORY_MB},
            }
        )
    )
    return config
