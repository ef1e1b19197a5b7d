"""The endpoint `/mcp`: checks the caller before anything of MCP is read, and starts the protocol at its first use."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import structlog
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from emberbox.api import auth
from emberbox.api.errors import answer
from emberbox.control.errors import NodeUnavailable, Unauthorized
from emberbox.control.service import ControlPlane

if TYPE_CHECKING:
    from emberbox.api.mcp.protocol import Protocol

log = structlog.get_logger()

PATH = "/mcp"
END_SECONDS = 10.0
"""For killing what is going on; then it is let go."""


class Stopping(NodeUnavailable):
    """The api process is on its way out."""


class McpEndpoint:
    """An ASGI application for one route, owned by the application's lifespan."""

    def __init__(self) -> None:
        self._plane: ControlPlane | None = None
        self._starting: asyncio.Future[Protocol] | None = None
        self._running: asyncio.Task[None] | None = None
        self._end = asyncio.Event()
        self._requests: set[anyio.CancelScope] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def path(self) -> str:
        """The label of its requests in the metrics."""
        return PATH

    @asynccontextmanager
    async def serving(self, plane: ControlPlane) -> AsyncIterator[None]:
        """The endpoint's part of the lifespan."""
        self._plane = plane
        self._end = asyncio.Event()
        try:
            yield
        finally:
            await self.end()

    async def end(self) -> None:
        """End every stream and session; commands that are going on are killed. Later requests answer 503."""
        self._end.set()
        for scope in list(self._requests):
            scope.cancel()
        running, self._running, self._starting = self._running, None, None
        if running is not None:
            await asyncio.wait({running}, timeout=END_SECONDS)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        try:
            who = await auth.principal(Request(scope))
            if self._end.is_set():
                raise Stopping("the API is stopping; try again in a moment")
        except Unauthorized as error:
            refusal = answer(error)
            refusal.headers["WWW-Authenticate"] = 'Bearer realm="emberbox"'
            await refusal(scope, receive, send)
            return
        scope["emberbox.principal"] = who
        answering = False

        async def watched(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        with anyio.CancelScope() as until_the_end:
            self._requests.add(until_the_end)
            self._idle.clear()
            try:
                protocol = await self._protocol()
                await protocol.handle(scope, receive, watched)
            finally:
                self._requests.discard(until_the_end)
                if not self._requests:
                    self._idle.set()
        if until_the_end.cancelled_caught:
            if not answering:
                raise Stopping("the API stopped before the answer was there")
            with suppress(Exception):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _protocol(self) -> Protocol:
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_future()
            self._running = asyncio.create_task(self._run(self._starting), name="mcp")
        return await asyncio.shield(self._starting)

    async def _run(self, started: asyncio.Future[Protocol]) -> None:
        """The task that the library's sessions belong to."""
        try:
            assert self._plane is not None
            # A second of imports must not hold up the API.
            module = await asyncio.to_thread(importlib.import_module, "emberbox.api.mcp.protocol")
            protocol: Protocol = module.Protocol(self._plane)
            async with protocol.running():
                started.set_result(protocol)
                log.info("mcp.started")
                await self._end.wait()
                # Requests use the connections to sandboxes until their commands are killed.
                await self._idle.wait()
        except Exception as error:
            log.error("mcp.failed", exc_info=error)
            if not started.done():
                started.set_exception(error)
        finally:
            # The next request starts anew.
            self._starting = None
            started.cancel()
