"""Logs of sandboxes: collected from the agents, one JSON-lines file a sandbox, bounded, kept a while after the end.

A file that grows past its bound becomes `<id>.jsonl.1` and a new one begins, so a sandbox keeps between one and two
bounds of its newest entries.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from emberbox.node.agent import Agent, AgentLog
from emberbox.node.errors import AgentFailure, AgentTooLong, NoSuchSandbox
from emberbox.node.model import now_ms

log = structlog.get_logger("emberbox.node")

LEVELS = ("debug", "info", "warn", "error")

_BOUND_BYTES = 2 * 1024 * 1024
_BATCH, _SMALL_BATCH = 100, 10
_MOST_BATCHES = 600
"""In one go: more than an honest agent keeps."""
_MOST_ENDED_BYTES = 1024 * 1024 * 1024
"""For the logs of sandboxes that have ended: a team that makes many which log much must not fill the disk."""
_COLLECT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LogEntry:
    timestamp_ms: int
    level: str
    message: str
    fields: dict[str, str]


@dataclass(slots=True)
class _Cursor:
    agent: Agent
    seq: int
    last_ms: int = 0
    """Timestamp of the newest entry, to know again what a restored agent logged before its pause."""


class SandboxLogs:
    """Log files in `directory`."""

    def __init__(
        self, directory: Path, *, keep_seconds: float, bound_bytes: int = _BOUND_BYTES, time_scale: float = 1.0
    ) -> None:
        self._directory = directory
        self._collect_seconds = _COLLECT_SECONDS * time_scale
        self._keep_seconds = keep_seconds
        self._bound = bound_bytes
        self._cursors: dict[str, _Cursor] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def create_directory(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def collect(self, sandbox_id: str, agent: Agent) -> None:
        """Append what the agent logged since the last time. An agent that does not answer is let be."""
        async with self._locks.setdefault(sandbox_id, asyncio.Lock()):
            cursor, known_ms = self._cursors.get(sandbox_id), 0
            try:
                if cursor is None:
                    seq = await asyncio.to_thread(self._last_seq, sandbox_id, agent)
                    cursor = self._cursors[sandbox_id] = _Cursor(agent, seq)
                elif cursor.agent is not agent:  # another machine, whose log begins anew
                    cursor = self._cursors[sandbox_id] = _Cursor(agent, 0, cursor.last_ms)
                    known_ms = cursor.last_ms
                async with asyncio.timeout(self._collect_seconds):
                    for _ in range(_MOST_BATCHES):
                        if not await self._collect_batch(sandbox_id, agent, cursor, known_ms):
                            break
            except (AgentFailure, TimeoutError, OSError) as error:
                log.debug("logs.not_collected", sandbox_id=sandbox_id, error=str(error))

    async def _collect_batch(self, sandbox_id: str, agent: Agent, cursor: _Cursor, known_ms: int) -> bool:
        """Append the next entries; returns whether there may be more."""
        asked = _BATCH
        try:
            entries = await agent.logs(cursor.seq, asked)
        except AgentTooLong:
            asked = _SMALL_BATCH
            entries = await agent.logs(cursor.seq, asked)
        if not entries:
            return False
        lines = [_line(entry, agent) for entry in entries if entry.timestamp_ms > known_ms]
        if lines:
            await asyncio.to_thread(self._append, sandbox_id, lines)
        went_on = entries[-1].seq > cursor.seq
        cursor.seq, cursor.last_ms = entries[-1].seq, entries[-1].timestamp_ms
        return went_on and len(entries) == asked

    async def note(self, sandbox_id: str, level: str, message: str) -> None:
        """Append an entry of the node's own, unless the disk is full."""
        line = {"timestamp": now_ms(), "level": level, "message": message, "fields": {"logger": "node"}}
        async with self._locks.setdefault(sandbox_id, asyncio.Lock()):
            try:
                await asyncio.to_thread(self._append, sandbox_id, [json.dumps(line)])
            except OSError as error:
                log.error("logs.not_noted", sandbox_id=sandbox_id, message=message, error=str(error))

    def ended(self, sandbox_id: str) -> None:
        """The sandbox is gone; its file stays for `keep_seconds`."""
        self._cursors.pop(sandbox_id, None)
        self._locks.pop(sandbox_id, None)

    async def read(
        self, sandbox_id: str, *, cursor_ms: int, limit: int, backward: bool, level: str, search: str
    ) -> list[LogEntry]:
        """Return up to `limit` entries: from `cursor_ms` on, oldest first; or `backward` from it, newest first.

        Raises:
            NoSuchSandbox: there is no log of it.
        """
        return await asyncio.to_thread(self._read, sandbox_id, cursor_ms, limit, backward, level, search)

    async def remove_old(self, keep: frozenset[str]) -> None:
        """Remove the files of sandboxes other than `keep` that were last written `keep_seconds` ago, and the oldest of
        them where all together are too many."""
        await asyncio.to_thread(self._remove_old, keep)

    # ---- files; these block

    def _path(self, sandbox_id: str) -> Path:
        return self._directory / f"{sandbox_id}.jsonl"

    def _append(self, sandbox_id: str, lines: list[str]) -> None:
        path = self._path(sandbox_id)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))
            size = file.tell()
        if size > self._bound:
            path.replace(path.with_name(f"{path.name}.1"))

    def _lines(self, sandbox_id: str) -> Iterator[dict[str, Any]]:
        path = self._path(sandbox_id)
        for part in (path.with_name(f"{path.name}.1"), path):
            try:
                with part.open(encoding="utf-8", errors="replace") as file:
                    for line in file:
                        try:
                            entry = json.loads(line)
                        except ValueError:
                            continue  # the node was killed in the middle of a line
                        if isinstance(entry, dict):
                            yield entry
            except FileNotFoundError:
                continue

    def _last_seq(self, sandbox_id: str, agent: Agent) -> int:
        """Where an earlier node process stopped reading from this same machine."""
        seq = 0
        for entry in self._lines(sandbox_id):
            if entry.get("machine") == agent.label:
                seq = max(seq, int(entry.get("seq", 0)))
        return seq

    def _read(
        self, sandbox_id: str, cursor_ms: int, limit: int, backward: bool, level: str, search: str
    ) -> list[LogEntry]:
        path = self._path(sandbox_id)
        if not path.exists() and not path.with_name(f"{path.name}.1").exists():
            raise NoSuchSandbox(sandbox_id)
        wanted = LEVELS[LEVELS.index(level) :] if level in LEVELS else LEVELS
        found = []
        for line in self._lines(sandbox_id):
            entry = LogEntry(
                timestamp_ms=int(line.get("timestamp", 0)),
                level=str(line.get("level", "info")),
                message=str(line.get("message", "")),
                fields=line.get("fields") or {},
            )
            if entry.level not in wanted or search not in entry.message:
                continue
            if cursor_ms and (entry.timestamp_ms > cursor_ms if backward else entry.timestamp_ms < cursor_ms):
                continue
            found.append(entry)
        found.sort(key=lambda entry: entry.timestamp_ms, reverse=backward)
        return found[:limit]

    def _remove_old(self, keep: frozenset[str]) -> None:
        oldest = time.time() - self._keep_seconds
        ended = [
            (path.stat().st_mtime, path.stat().st_size, path)
            for path in self._directory.iterdir()
            if path.name.partition(".")[0] not in keep
        ]
        size = 0
        for written, bytes_, path in sorted(ended, reverse=True):
            size += bytes_
            if written < oldest or size > _MOST_ENDED_BYTES:
                path.unlink(missing_ok=True)


def _line(entry: AgentLog, agent: Agent) -> str:
    return json.dumps(
        {
            "seq": entry.seq,
            "machine": agent.label,
            "timestamp": entry.timestamp_ms,
            "level": entry.level,
            "message": entry.message,
            "fields": entry.fields,
        }
    )
