"""The endpoint `/mcp`: checks the caller before anything of MCP is read, and starts the protocol at its first use."""

from __future__ import annotations

import asyncio
import importlib
from types import TracebackType
from typing import TYPE_CHECKING

import structlog
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from emberbox.api import auth
from emberbox.api.errors import answer
from emberbox.control.errors import Unauthorized
from emberbox.control.service import ControlPlane

if TYPE_CHECKING:
    from emberbox.api.mcp.protocol import Protocol

log = structlog.get_logger()

PATH = "/mcp"


class McpEndpoint:
    """An ASGI application for one route, owned by the application's lifespan."""

    def __init__(self) -> None:
        self._plane: ControlPlane | None = None
        self._starting: asyncio.Future[Protocol] | None = None
        self._running: asyncio.Task[None] | None = None
        self._end = asyncio.Event()

    def serving(self, plane: ControlPlane) -> McpEndpoint:
        """The context manager of the lifespan."""
        self._plane = plane
        self._end = asyncio.Event()
        return self

    async def __aenter__(self) -> McpEndpoint:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """End every session; commands that are going on are killed."""
        self._end.set()
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=10)
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._starting = self._running = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The label of the request's metrics.
        scope["route"] = self
        try:
            who = await auth.principal(Request(scope))
        except Unauthorized as error:
            refusal = answer(error)
            refusal.headers["WWW-Authenticate"] = 'Bearer realm="emberbox"'
            await refusal(scope, receive, send)
            return
        scope["emberbox.principal"] = who
        protocol = await self._protocol()
        await protocol.handle(scope, receive, send)

    @property
    def path(self) -> str:
        return PATH

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
        except BaseException as error:
            if not started.done():
                started.set_exception(error if isinstance(error, Exception) else RuntimeError("MCP is ending"))
                self._starting = None
            else:
                log.error("mcp.failed", exc_info=error)
                self._starting = None
            raise
