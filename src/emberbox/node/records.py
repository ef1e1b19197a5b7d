"""Durable records: one JSON file a sandbox, written atomically.

A sandbox exists on the node when its record does. What has no record is swept at the next start, so an operation
that was interrupted half-way leaves nothing behind. A record that says `paused` or `ended` is flushed to the disk;
one that says `running` only has to survive the node process, because a running machine does not survive the host.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog
from pydantic import TypeAdapter, ValidationError

from emberbox.linux.writing import write_file
from emberbox.node.model import EndReason, Image, Network, State, TimeoutAction
from emberbox.runtime.base import Limits, Saved
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.node")


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """The machine of a running or frozen sandbox, as `Runtime.adopt` needs it."""

    machine_id: str
    slot_index: int
    secret: str
    """Opens the agent's control routes; the machine knows only its hash."""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SavedFacts:
    """A `Saved` whose paths are names below its own directory, so that it can be read back."""

    runtime: str
    upper: str
    memory: bool
    details: dict[str, Any] = field(default_factory=dict)
    secret: str = ""
    """The control secret that the saved memory expects; empty without memory."""

    @classmethod
    def of(cls, saved: Saved, secret: str) -> SavedFacts:
        return cls(
            runtime=saved.runtime,
            upper=os.path.relpath(saved.upper, saved.directory),
            memory=saved.memory,
            details=saved.details,
            secret=secret if saved.memory else "",
        )

    def within(self, directory: Path) -> Saved:
        return Saved(
            runtime=self.runtime,
            directory=directory,
            upper=Path(os.path.normpath(directory / self.upper)),
            memory=self.memory,
            details=self.details,
        )


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """Everything the node knows of a sandbox."""

    sandbox_id: str
    template_id: str
    team_id: str
    image: Image
    limits: Limits
    env_vars: dict[str, str]
    access_token: str
    network: Network
    on_timeout: TimeoutAction
    deadline_ms: int
    state: State
    started_ms: int
    changed_ms: int
    boot_id: str
    """The host's boot in which the record was written."""
    upper: str = ""
    """File name below `uppers/`; empty once the sandbox ended or while its memory and upper are in `saved`."""
    machine: MachineFacts | None = None
    memory_kept: bool = False
    saved_directory: str = ""
    """Name below `saved/`, for a pause that put memory on the disk."""
    saved: SavedFacts | None = None
    end_reason: EndReason | None = None
    message: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


_ADAPTER = TypeAdapter(SandboxRecord)


class Records:
    """The records of one node, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Deadlines are moved beside operations, so one record may be written twice at once: the last asked wins.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def write(self, record: SandboxRecord) -> None:
        """Replace the record on disk. Durable against a crash of the host unless the sandbox runs."""
        data = _ADAPTER.dump_json(record)
        flush = record.state is not State.RUNNING
        async with self._turn(record.sandbox_id):
            await to_thread_whole(write_file, self._directory / f"{record.sandbox_id}.json", data, flush=flush)

    async def remove(self, sandbox_id: str) -> None:
        """Forget a sandbox. Idempotent."""
        async with self._turn(sandbox_id):
            await to_thread_whole((self._directory / f"{sandbox_id}.json").unlink, missing_ok=True)

    def _turn(self, sandbox_id: str) -> asyncio.Lock:
        return self._turns.setdefault(sandbox_id, asyncio.Lock())

    async def load(self) -> list[SandboxRecord]:
        """Read every record. A damaged one is set aside as `<name>.damaged` and logged."""
        return await asyncio.to_thread(lambda: list(self._read_all()))

    def _read_all(self) -> Iterable[SandboxRecord]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._directory.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        for path in sorted(self._directory.glob("*.json")):
            try:
                yield _ADAPTER.validate_json(path.read_bytes())
            except (ValidationError, OSError) as error:
                log.error("record.damaged", path=str(path), error=str(error))
                path.replace(path.with_suffix(".damaged"))
