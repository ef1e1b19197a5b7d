"""Room on the disk of the data directory: what must stay free of it, and sizes in words."""

from __future__ import annotations

RESERVE_BYTES = 512 * 1024 * 1024
"""Kept free: machines still grow, and the database and the node's records are written."""


def mib(size: int) -> str:
    """`12 MiB`, rounded up."""
    return f"{-(-size // 1024**2)} MiB"
