"""What a sandbox must be, and what the host must have, before one is started."""

from __future__ import annotations

from emberbox.node.errors import BadValue
from emberbox.node.model import NewSandbox


def check_new(new: NewSandbox) -> None:
    """Refuse values that no machine can be made of.

    Raises:
        BadValue
    """
    if not new.sandbox_id.isalnum() or len(new.sandbox_id) > 64:
        raise BadValue(f"sandbox ID {new.sandbox_id!r} must be 1 to 64 letters and digits")
    if (new.image is None) == (not new.snapshot_id):
        raise BadValue("a sandbox starts from an image or from a snapshot; give one of them")
    if new.deadline_ms <= 0:
        raise BadValue("a sandbox needs a deadline")
    if new.image is not None and not new.image.layers:
        raise BadValue(f"build '{new.image.build_id}' has no layers")


def available_memory() -> int:
    """Bytes that can be given out without swapping (proc(5), MemAvailable)."""
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62
