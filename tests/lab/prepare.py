"""Runs in a chroot of the lab's image, natively: makes what Emberbox would make at its first start, 15 times faster.

The base template's layer, Firecracker and the guest's files, all where `emberbox up` looks for them.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

from emberbox.images.base import build_base
from emberbox.runtime.firecracker import setup
from emberbox.settings import Settings

IMAGES = Path("/mnt/images")
"""The lab's cache of built layers, shared by all its images."""
PROGRAMS = Path("/mnt/firecracker")
"""The pinned Firecracker and jailer."""


def main() -> None:
    settings = Settings()
    settings.node_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    asyncio.run(base_layer(settings))
    setup.install(settings, PROGRAMS)


async def base_layer(settings: Settings) -> None:
    """Put the base template's layer into the node's store and its description into the image cache."""
    cached = settings.model_copy(update={"image_cache_dir": IMAGES})
    built = await build_base(settings.node_dir / "layers", cached, lambda what, _: print(what, flush=True))
    settings.image_cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy2(IMAGES / f"{built.key}.json", settings.image_cache_dir)


if __name__ == "__main__":
    sys.exit(main())
