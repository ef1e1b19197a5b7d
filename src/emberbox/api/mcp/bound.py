"""Sandboxes that end with the MCP session that made them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog
from mcp.server.connection import Connection

from emberbox.control.errors import ControlError, NotFound
from emberbox.control.service import ControlPlane
from emberbox.store.records import TeamRecord

log = structlog.get_logger()

KILL_SECONDS = 30.0
_STATE = "emberbox.sandboxes"

_made: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "e2b-create-sandbox": lambda answer: [answer["sandboxID"]],
    "e2b-fork-sandbox": lambda answer: [
        fork["sandbox"]["sandboxID"] for fork in answer["forks"] if fork.get("sandbox") is not None
    ],
}


class BoundSandboxes:
    """Kills what the tools of a session made when the session ends: by its client, when idle, or with the api.

    Sandboxes of an api process that was killed end at their timeouts. A client without a session (the protocol's newer
    generation has none) binds nothing.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._kills: set[asyncio.Task[None]] = set()

    def note(self, connection: Connection, team: TeamRecord, tool: str, answer: dict[str, Any]) -> None:
        """Look at a successful call of a session."""
        if connection.session_id is None or tool not in _made:
            return
        bound: set[str] | None = connection.state.get(_STATE)
        if bound is None:
            bound = connection.state[_STATE] = set()
            connection.exit_stack.callback(self._end, team, bound)
        bound.update(_made[tool](answer))

    def _end(self, team: TeamRecord, sandbox_ids: set[str]) -> None:
        for sandbox_id in sandbox_ids:
            task = asyncio.create_task(self._kill(team, sandbox_id), name=f"end of bound sandbox {sandbox_id}")
            self._kills.add(task)
            task.add_done_callback(self._kills.discard)

    async def _kill(self, team: TeamRecord, sandbox_id: str) -> None:
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await self._plane.lifecycle.kill(team, sandbox_id)
            log.info("sandbox.ended_with_session", sandbox_id=sandbox_id)
        except NotFound:
            pass
        except (ControlError, TimeoutError) as error:
            log.warning("sandbox.outlives_session", sandbox_id=sandbox_id, reason=str(error))

    async def close(self) -> None:
        """Wait for the kills that are under way."""
        while self._kills:
            await asyncio.wait(set(self._kills))
