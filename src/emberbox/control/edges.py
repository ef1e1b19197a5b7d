"""The seam to the edge: which sandbox is where.

The edge is told, not asked, and may be away: a route that it does not have it asks for (`POST /edge/wake`), so a create
never waits for an edge that is down.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from emberbox.control.tokens import SandboxTokens
from emberbox.store.records import SandboxRecord
from emberbox.wire import edge_pb2 as pb
from emberbox.wire import edge_pb2_grpc

log = structlog.get_logger()

_SECONDS = 3.0
_REPLACE_SECONDS = 15.0
_RETRY_SECONDS = 1.0
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class Edge:
    """The routes of one edge."""

    def __init__(
        self,
        target: str,
        *,
        routes: Callable[[], Awaitable[list[pb.Route]]],
        time_scale: float = 1.0,
    ) -> None:
        """`routes` reads every route there should be; it is asked on each (re)connection."""
        self.target = target
        self._routes = routes
        self._scale = time_scale
        self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._stub: Any = edge_pb2_grpc.EdgeStub(self._channel)
        self._up = False
        self._stale = asyncio.Event()
        """A drop did not arrive: the edge has a route too many until the next replacement."""
        # A replacement is read from the store and sent as one step: a drop in between would be undone by it.
        self._replacing = asyncio.Lock()

    async def set_route(self, route: pb.Route) -> None:
        """Tell a route. Never fails: an edge that is away asks later."""
        if not self._up:
            return
        if self._replacing.locked():
            async with self._replacing:
                pass
        await self._tell("SetRoute", route, route.sandbox_id)

    async def drop_route(self, sandbox_id: str) -> None:
        """Take a route away, ending the sandbox's open connections. Never fails: what did not arrive is made good."""
        if not self._up:
            return
        if self._replacing.locked():
            async with self._replacing:
                pass
        if not await self._tell("DropRoute", pb.DropRouteRequest(sandbox_id=sandbox_id), sandbox_id):
            # Its address may soon be another sandbox's.
            self._stale.set()

    async def keep_connected(self) -> None:
        """Follow the connection and send every route when it comes (back). Ends only by cancellation."""
        while True:
            state = self._channel.get_state(try_to_connect=True)
            while state is not grpc.ChannelConnectivity.READY:
                await self._channel.wait_for_state_change(state)
                state = self._channel.get_state(try_to_connect=True)
            self._stale.clear()
            if not await self._replace():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if await self._gone_or_stale():
                log.warning("edge.away", target=self.target)
                self._up = False

    async def _gone_or_stale(self) -> bool:
        """Wait until the connection is lost (True) or the routes must be sent again (False)."""
        gone = asyncio.ensure_future(self._channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        stale = asyncio.ensure_future(self._stale.wait())
        try:
            await asyncio.wait([gone, stale], return_when=asyncio.FIRST_COMPLETED)
            return gone.done()
        finally:
            gone.cancel()
            stale.cancel()

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def _replace(self) -> bool:
        async with self._replacing:
            # From here on changes wait for the lock, so none can fall between the reading and the sending.
            self._up = True
            try:
                routes = await self._routes()
                await self._stub.ReplaceRoutes(
                    pb.ReplaceRoutesRequest(routes=routes), timeout=_REPLACE_SECONDS * self._scale
                )
            except grpc.aio.AioRpcError as error:
                self._up = False
                log.warning("edge.replace_failed", code=error.code().name, details=error.details())
                return False
            except BaseException:
                self._up = False
                raise
        log.info("edge.connected", target=self.target, routes=len(routes))
        return True

    async def _tell(self, method: str, request: Any, sandbox_id: str) -> bool:
        try:
            await getattr(self._stub, method)(request, timeout=_SECONDS * self._scale)
            return True
        except grpc.aio.AioRpcError as error:
            log.warning(
                "edge.call_failed",
                method=method,
                sandbox_id=sandbox_id,
                code=error.code().name,
                details=error.details(),
            )
            return False


def route_of(record: SandboxRecord, tokens: SandboxTokens) -> pb.Route:
    """The route of a running sandbox."""
    network = record.network
    private = network.get("allowPublicTraffic") is False
    return pb.Route(
        sandbox_id=record.id,
        address=record.address,
        traffic_token_sha256=hashlib.sha256(tokens.traffic(record.id).encode()).hexdigest() if private else "",
        mask_request_host=network.get("maskRequestHost") or "",
        https_ports=network.get("httpsPorts") or [],
    )
