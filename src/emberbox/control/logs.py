"""Logs of sandboxes. The nodes keep them, of ended sandboxes too for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emberbox.control.errors import NotFound
from emberbox.control.plane import Plane
from emberbox.control.sandboxes import is_sandbox_id, sandbox_not_found
from emberbox.store import sandboxes as rows
from emberbox.store.records import TeamRecord
from emberbox.wire import node_pb2 as pb


@dataclass(frozen=True, slots=True)
class LogLine:
    timestamp_ms: int
    level: str
    message: str
    fields: Mapping[str, str]


class Logs:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    async def read(
        self,
        team: TeamRecord,
        sandbox_id: str,
        *,
        cursor_ms: int | None,
        limit: int,
        backward: bool = False,
        level: str = "",
        search: str = "",
    ) -> list[LogLine]:
        """Entries from a cursor on (or from it back), at most `limit`; none when the node keeps them no more.

        Raises:
            NotFound: the team never had the sandbox, or not for longer than logs are kept.
            NodeUnavailable: the node is away.
        """
        record = await rows.get(self._plane.store, sandbox_id) if is_sandbox_id(sandbox_id) else None
        if record is None or record.team_id != team.id:
            raise sandbox_not_found(sandbox_id)
        if limit == 0:
            return []
        request = pb.LogsRequest(
            sandbox_id=sandbox_id,
            cursor_unix_ms=cursor_ms or 0,
            limit=limit,
            backward=backward,
            level=level,
            search=search,
        )
        try:
            entries = await self._plane.nodes.get(record.node_id).logs(request)
        except NotFound:
            return []
        return [LogLine(entry.timestamp_unix_ms, entry.level, entry.message, dict(entry.fields)) for entry in entries]
