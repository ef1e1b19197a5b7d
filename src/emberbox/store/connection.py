"""What a connection can do, whichever database is behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import Executable
from sqlalchemy.engine import Connection as SyncConnection

T = TypeVar("T")

Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


class Rows(Protocol):
    """A statement's result, complete: reading it does not go to the database."""

    @property
    def rowcount(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def first(self) -> Any: ...
    def one(self) -> Any: ...
    def scalar(self) -> Any: ...
    def scalar_one(self) -> Any: ...
    def scalars(self) -> Any: ...


class Connection(Protocol):
    async def execute(self, statement: Executable, parameters: Any = None) -> Rows: ...

    async def run_sync(self, function: Callable[[SyncConnection], T]) -> T:
        """Call a function that uses SQLAlchemy's synchronous connection, off the event loop."""
        ...
