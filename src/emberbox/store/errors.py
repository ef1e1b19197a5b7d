"""What the store can refuse."""

from __future__ import annotations


class StoreError(Exception):
    """The store refused."""


class StoreMisconfigured(StoreError):
    """The database URL or the database itself cannot be used."""


class SandboxLimitReached(StoreError):
    """The team already has as many sandboxes as it may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"limit of {limit} sandboxes reached")
        self.limit = limit


class KeyLimitReached(StoreError):
    """The key already has as many sandboxes as it may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"limit of {limit} sandboxes of this key reached")
        self.limit = limit


class DuplicateName(StoreError):
    """The name is taken."""
