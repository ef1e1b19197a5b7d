"""What the control plane answers when it cannot do what was asked.

Every class names its HTTP status, whether the same request may succeed later (`should_retry`), and where E2B has one,
its machine-readable `error_code`. The API turns them into answers in one place, `api/errors.py`.
"""

from __future__ import annotations

from typing import ClassVar


class ControlError(Exception):
    """The base: an answer for the caller. `str(error)` is a sentence for people."""

    status: ClassVar[int] = 500
    should_retry: bool = False
    error_code: str | None = None
    retry_after: int | None = None

    def __init__(self, message: str, *, error_code: str | None = None) -> None:
        super().__init__(message)
        if error_code is not None:
            self.error_code = error_code

    @property
    def message(self) -> str:
        return str(self.args[0])


class Invalid(ControlError):
    """A value that cannot be used."""

    status = 400


class Unauthorized(ControlError):
    """No credentials, or wrong ones."""

    status = 401


class Forbidden(ControlError):
    """Known, but not allowed."""

    status = 403


class NotFound(ControlError):
    """No such thing, or it belongs to another team."""

    status = 404


class Conflict(ControlError):
    """The thing is in a state that does not allow the request."""

    status = 409


class Interrupted(ControlError):
    """A kill, or the end of the machine, overtook the operation; what state that left must be looked up."""

    status = 409


class TooLarge(ControlError):
    """The request's body is larger than the limit."""

    status = 413


class Gone(ControlError):
    """An operation that E2B has ended; the message says what to use instead."""

    status = 410


class StorageFull(ControlError):
    """No room on the disk."""

    status = 507


class KeyReused(ControlError):
    """An idempotency key came again with another body."""

    status = 422
    error_code = "idempotency_request_mismatch"


class TooMany(ControlError):
    """A limit of the team is reached. `retry_after` is in seconds."""

    status = 429
    should_retry = True

    def __init__(self, message: str, *, retry_after: int = 1, should_retry: bool = True) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.should_retry = should_retry


class NotBuilt(ControlError):
    """An operation that Emberbox does not have yet."""

    status = 501


class NodeFailed(ControlError):
    """The node tried and failed."""

    status = 500
    error_code = "internal_server_error"


class NodeUnavailable(ControlError):
    """The node cannot be reached, or is starting or shutting down."""

    status = 503
    should_retry = True
    retry_after = 2
    """Clients ask three times more; a node that was killed is back within a few seconds."""


class NodeFull(ControlError):
    """No node has room."""

    status = 503
    should_retry = True
    error_code = "sandbox_capacity_unavailable"


class NodeTooSlow(ControlError):
    """The node did not answer before the deadline."""

    status = 504
    should_retry = True
