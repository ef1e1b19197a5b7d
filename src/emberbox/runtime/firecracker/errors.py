"""What can go wrong in the Firecracker runtime, one class for each thing a caller can act on."""

from __future__ import annotations

from emberbox.runtime.errors import RuntimeFailure


class FirecrackerError(RuntimeFailure):
    """Base of the errors that only this runtime has."""


class GuestFilesError(FirecrackerError):
    """The guest kernel or initramfs could not be made."""


class ApiError(FirecrackerError):
    """Firecracker refused a request.

    Attributes:
        method, path: the request, e.g. `PUT` and `/snapshot/load`.
        status: the HTTP status it answered.
        fault: Firecracker's own words.
    """

    def __init__(self, method: str, path: str, status: int, fault: str) -> None:
        super().__init__(f"Firecracker refused {method} {path} ({status}): {fault}")
        self.method = method
        self.path = path
        self.status = status
        self.fault = fault


class ApiUnreachable(FirecrackerError):
    """Firecracker's API socket does not answer: the process is gone or hangs."""


class JailerError(FirecrackerError):
    """The jailer could not put a machine into its jail."""
