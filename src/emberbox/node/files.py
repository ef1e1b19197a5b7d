"""Small file operations that several parts of the node need. None blocks the event loop."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path


async def remove_tree(path: Path) -> None:
    """Remove a directory with all it holds. Idempotent."""
    await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


async def remove_file(path: Path) -> None:
    """Remove a file. Idempotent."""
    await asyncio.to_thread(path.unlink, missing_ok=True)
