"""What is told to the client instead of a result."""

from __future__ import annotations


class InterpreterError(Exception):
    """Has an HTTP status."""

    status = 500


class Invalid(InterpreterError):
    """The request asks for what cannot be."""

    status = 400


class NoSuchContext(InterpreterError):
    status = 404

    def __init__(self, context_id: str) -> None:
        super().__init__(f"context {context_id!r} not found")


class KernelFailed(InterpreterError):
    """A kernel did not start."""
