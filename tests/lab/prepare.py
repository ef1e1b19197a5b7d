"""Runs in a chroot of the lab's image, natively: makes what Emberbox would make at its first start, 15 times faster.

The base template's layer, Firecracker and the guest's files, all where `emberbox up` looks for them.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

from emberbox.images.base import build_base
from emberbox.runtime.firecracker import initramfs, kernel, setup
from emberbox.settings import Settings

IMAGES = Path("/mnt/images")
"""The lab's cache of built layers, shared by all its images."""
PROGRAMS = Path("/mnt/firecracker")
"""The pinned Firecracker and jailer."""


def main() -> None:
    settings = Settings()
    settings.node_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    asyncio.run(base_layer(settings))
    parts = setup.install(settings, PROGRAMS)
    boot_by_shell(setup.parts_dir(settings) / "guest", parts.guest.initramfs)


async def base_layer(settings: Settings) -> None:
    """Put the base template's layer into the node's store and its description into the image cache."""
    cached = settings.model_copy(update={"image_cache_dir": IMAGES})
    built = await build_base(settings.node_dir / "layers", cached, lambda what, _: print(what, flush=True))
    settings.image_cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy2(IMAGES / f"{built.key}.json", settings.image_cache_dir)


def boot_by_shell(folder: Path, archive: Path) -> None:
    """Put `guest-init.sh` before emberd in the guest's initramfs, until emberd boots a microVM by itself."""
    tree = kernel.open_tree(folder / "package")
    agent = setup.agent_path(Settings()).read_bytes()
    if b"emberd.mode" in agent:
        return
    here = Path(__file__).resolve().parent
    entries = [
        *initramfs.base_entries(),
        initramfs.folder("bin"),
        initramfs.file("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
        *initramfs.module_entries(tree, initramfs.GUEST_MODULES),
        initramfs.file("init", (here / "guest-init.sh").read_bytes(), mode=0o755),
        initramfs.file("emberd", agent, mode=0o755),
    ]
    archive.chmod(0o644)
    archive.write_bytes(initramfs.cpio(entries))
    archive.chmod(0o444)


if __name__ == "__main__":
    sys.exit(main())
