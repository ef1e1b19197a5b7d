"""Shows the roles' logs as they grow, for `emberbox up` in the foreground."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

INTERVAL = 0.3


async def follow_logs(paths: Sequence[Path]) -> None:
    """Copy what is appended to these files to standard error, until cancelled."""
    places = {path: _size(path) for path in paths}
    while True:
        await asyncio.sleep(INTERVAL)
        for path in paths:
            size = _size(path)
            # Emptied by rotation: what was written since is at its start.
            place = places[path] if size >= places[path] else 0
            if size > place:
                places[path] = place + await asyncio.to_thread(_copy, path, place)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _copy(path: Path, place: int) -> int:
    """Copy whole lines from `place` on; returns the number of bytes copied."""
    with path.open("rb") as handle:
        handle.seek(place)
        data = handle.read()
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        print(f"{path.stem:>4} │ {line}", file=sys.stderr, flush=True)
    return len(whole)
