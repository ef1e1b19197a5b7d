"""One sandbox on this node, in memory: its record, its machine, and the order of operations on it.

Operations on one sandbox run one after another. Ending it, by a kill or because its machine died, goes first: it
cancels the operation under way, which undoes what it made, and those that wait behind it fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from emberbox.node.errors import Interrupted, NoSuchSandbox, WrongState
from emberbox.node.hosting import Hosted
from emberbox.node.model import State, Status
from emberbox.node.records import SandboxRecord

T = TypeVar("T")


class Sandbox:
    """Mutable; only `Machines` and `Snapshots` change it."""

    def __init__(self, sandbox_id: str, record: SandboxRecord | None = None, hosted: Hosted | None = None) -> None:
        self.sandbox_id = sandbox_id
        self.record = record
        """None until its create succeeded."""
        self.starts_on: tuple[str, ...] = ()
        """Digests of the layers that its create needs."""
        self.hosted = hosted
        """The machine while running, and while paused in memory."""
        self.ending = False
        self.fault = ""
        """Why its machine ended by itself."""
        self.acknowledged = asyncio.Event()
        """The control plane has recorded its end and dropped its route."""
        self.lock = asyncio.Lock()
        self.writing = asyncio.Lock()
        """Held while the record on the disk changes: a deadline is moved without waiting for `lock`."""
        self.watch: asyncio.Task[None] | None = None
        self.leaving: asyncio.Task[bool] | None = None
        """The end of the machine that a pause left."""
        self._operation: asyncio.Task[Any] | None = None

    async def operate(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` alone. Cancelling the caller cancels it.

        Raises:
            NoSuchSandbox: the sandbox is being ended.
            Interrupted: it was ended while `work` ran.
        """
        async with self.lock:
            if self.ending:
                raise NoSuchSandbox(self.sandbox_id)
            operation = asyncio.create_task(work())
            self._operation = operation
            try:
                return await operation
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
                why = f"its machine ended: {self.fault}" if self.fault else "it was killed"
                raise Interrupted(f"sandbox '{self.sandbox_id}': {why}") from None
            finally:
                self._operation = None

    async def interrupt(self, work: Callable[[], Awaitable[None]]) -> None:
        """Cancel the operation under way, and run `work` when it has undone itself."""
        if self._operation is not None:
            self._operation.cancel()
        async with self.lock:
            await work()

    def unwatch(self) -> None:
        """Stop looking for the machine's end, before it is ended on purpose."""
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None

    async def left(self) -> None:
        """Return when the machine that the last pause left has ended."""
        if self.leaving is not None:
            await asyncio.wait({self.leaving})
            self.leaving = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Digests of the layers that it stands on."""
        return self.starts_on if self.record is None else tuple(self.record.image.layers)

    def require(self, state: State) -> SandboxRecord:
        """Return the record; raises `WrongState` when the sandbox is in another state."""
        record = self.record
        if record is None or record.state is State.ENDED:
            raise NoSuchSandbox(self.sandbox_id)
        if record.state is not state:
            raise WrongState(f"sandbox '{self.sandbox_id}' is {record.state.value}, not {state.value}")
        return record

    def status(self) -> Status:
        """Raises `NoSuchSandbox` while it is being created."""
        record = self.record
        if record is None:
            raise NoSuchSandbox(self.sandbox_id)
        running = record.state is State.RUNNING
        return Status(
            sandbox_id=record.sandbox_id,
            state=record.state,
            address=str(self.hosted.machine.address) if running and self.hosted is not None else "",
            deadline_ms=record.deadline_ms if running else 0,
            memory_kept=record.memory_kept,
            end_reason=record.end_reason,
            message=record.message,
            started_ms=record.started_ms,
            changed_ms=record.changed_ms,
        )
