"""Whether this host's KVM really runs a guest kernel: boots one and sees it come to the end of its own start.

A `/dev/kvm` that exists is no proof: a nested or software implementation may offer one on which an ordinary kernel
dies in its first instructions. The trial guest has no root file system and no program, so a kernel that works ends
with its panic about just that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from pathlib import Path

import structlog

from emberbox.commands import CommandFailed, CommandTimedOut, CompletedRun, run
from emberbox.runtime.firecracker import initramfs
from emberbox.runtime.firecracker.errors import FirecrackerError

_PANIC = "Kernel panic - not syncing: VFS"
_MEMORY_MB = 128
_SECONDS = (10.0, 30.0)
"""How long each attempt may take. A broken KVM mostly ends at once; what is slow on a busy host gets a second one."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_OWN_LINES = ("anonymous-instance", "Running Firecracker")


log = structlog.get_logger("emberbox.runtime")


class KvmUnusable(FirecrackerError):
    """This host's KVM does not run a guest; the message says how it failed."""


async def boot_unless_passed(firecracker: Path, kernel: Path, mark: Path, *, time_scale: float = 1.0) -> None:
    """Do as `boot`, unless the file `mark` says that these very files passed since this host was started.

    Raises:
        KvmUnusable: see `boot`.
    """
    facts = await asyncio.to_thread(_facts, firecracker, kernel)
    if await asyncio.to_thread(_read, mark) == facts:
        return
    await boot(firecracker, kernel, time_scale=time_scale)
    await asyncio.to_thread(mark.write_text, facts)


async def boot(firecracker: Path, kernel: Path, *, time_scale: float = 1.0) -> None:
    """Boot `kernel` and return when it has run to its end.

    Raises:
        KvmUnusable: it did not.
    """
    with tempfile.TemporaryDirectory(prefix="emberbox-trial-") as folder:
        config = await asyncio.to_thread(_write_config, Path(folder), kernel)
        command = (firecracker, "--no-api", "--config-file", config, "--level", "Error")
        done = await _run(command, [seconds * time_scale for seconds in _SECONDS])
    if _PANIC not in done.text:
        lines = [line for line in (done.text + done.error_text).splitlines() if line.strip()]
        words = [line for line in lines if not any(own in line for own in _OWN_LINES)] or lines
        last = f"; it said: {words[-1].strip()[:300]}" if words else ""
        raise KvmUnusable(f"a guest kernel died before it had booted (exit code {done.returncode}){last}")


async def _run(command: tuple[str | Path, ...], limits: list[float]) -> CompletedRun:
    for attempt, limit in enumerate(limits, 1):
        try:
            return await run(command, timeout=limit, check=False)
        except CommandTimedOut:
            log.info("trial.slow", attempt=attempt, seconds=limit)
        except CommandFailed as error:
            raise KvmUnusable(str(error)) from error
    raise KvmUnusable(f"a guest kernel did not boot within {limits[-1]:g} s")


def _facts(*files: Path) -> str:
    """This start of the host, and which files they are."""
    facts = [_BOOT_ID.read_text()]
    for file in files:
        state = file.stat()
        facts.append(f"{file} {state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _read(mark: Path) -> str:
    try:
        return mark.read_text()
    except OSError:
        return ""


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
                    # Quiet: each character on the console costs an exit from the guest. A panic is printed anyway.
                    "boot_args": "console=ttyS0 quiet reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd",
                },
                "drives": [],
                "machine-config": {"vcpu_count": 1, "mem_size_mib": _MEMORY_MB},
            }
        )
    )
    return config
