"""What can go wrong in a runtime."""

from __future__ import annotations


class RuntimeFailure(Exception):
    """A machine could not be started, saved or ended. The message is a sentence for people."""


class MachineGone(RuntimeFailure):
    """The machine has ended; nothing can be asked of it."""


class SavedDamaged(RuntimeFailure):
    """A saved machine fails its checksum or misses a file; it is refused rather than restored."""


class SavedUnfit(RuntimeFailure):
    """A saved machine is whole, but what is installed here does not load it: it is of another release or processor."""


class NotSupported(RuntimeFailure):
    """This runtime cannot do it."""
