"""What the store can refuse."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import IntegrityError

_SQLITE_CODES = frozenset(
    (sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE)
)
_POSTGRESQL_STATES = frozenset(("23503", "23505"))
"""foreign_key_violation and unique_violation: https://www.postgresql.org/docs/current/errcodes-appendix.html."""


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


def rows_collide(error: IntegrityError) -> bool:
    """Whether a row was refused for what other rows are (a foreign or a unique key), and not for what it is itself."""
    refusal = error.orig
    if isinstance(refusal, sqlite3.Error):
        return refusal.sqlite_errorcode in _SQLITE_CODES
    return getattr(refusal, "sqlstate", None) in _POSTGRESQL_STATES
