"""The gRPC service through which the control plane tells routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import structlog

from emberbox.edge.door import Door
from emberbox.edge.errors import BadRoute, EdgeError
from emberbox.edge.routes import Route
from emberbox.wire import edge_pb2 as pb
from emberbox.wire import edge_pb2_grpc

log = structlog.get_logger()


class EdgeService(edge_pb2_grpc.EdgeServicer):
    """`proto/edge/edge.proto`, on a door."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def SetRoute(self, request: pb.Route, context: Any) -> pb.SetRouteResponse:
        async with _answered(context, "SetRoute"):
            await self._door.set_route(_route(request))
        return pb.SetRouteResponse()

    async def DropRoute(self, request: pb.DropRouteRequest, context: Any) -> pb.DropRouteResponse:
        async with _answered(context, "DropRoute"):
            await self._door.drop_route(request.sandbox_id)
        return pb.DropRouteResponse()

    async def ReplaceRoutes(self, request: pb.ReplaceRoutesRequest, context: Any) -> pb.ReplaceRoutesResponse:
        async with _answered(context, "ReplaceRoutes"):
            await self._door.replace_routes([_route(route) for route in request.routes])
        return pb.ReplaceRoutesResponse()


def _route(message: pb.Route) -> Route:
    return Route.parse(
        message.sandbox_id,
        message.address,
        message.traffic_token_sha256,
        message.mask_request_host,
        message.https_ports,
    )


@asynccontextmanager
async def _answered(context: Any, method: str) -> AsyncIterator[None]:
    """Turn the edge's errors into statuses."""
    try:
        yield
    except BadRoute as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (EdgeError, OSError) as error:
        log.error("edge.change_failed", method=method, error=str(error))
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
