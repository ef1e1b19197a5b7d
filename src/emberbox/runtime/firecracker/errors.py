"""What can go wrong in the Firecracker runtime, one class for each thing a caller can act on."""

from __future__ import annotations


class FirecrackerError(Exception):
    """Base of every error of this room."""


class GuestFilesError(FirecrackerError):
    """The guest kernel or initramfs could not be made."""
