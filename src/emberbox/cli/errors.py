"""What the command line says when it cannot do what was asked."""

from __future__ import annotations


class CliError(Exception):
    """Ends the command with one clear sentence on standard error.

    Args:
        message: what is wrong and what to do.
        code: exit code, not 0.
    """

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class NotRunning(CliError):
    """The instance that the command needs does not run."""


class LaunchError(CliError):
    """A role could not be started as the user it must run as."""
