"""An edge that keeps its routes in a dictionary."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from emberbox.wire import edge_pb2 as pb
from emberbox.wire import edge_pb2_grpc


class FakeEdge(edge_pb2_grpc.EdgeServicer):
    def __init__(self) -> None:
        self.routes: dict[str, pb.Route] = {}
        self.calls: list[tuple[str, Any]] = []
        self.refuses: set[str] = set()
        self.stuck: set[str] = set()
        """Sandboxes whose routes it never gets around to drop."""
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str) -> None:
        self._server = grpc.aio.server()
        edge_pb2_grpc.add_EdgeServicer_to_server(self, self._server)
        self._server.add_insecure_port(address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def SetRoute(self, request: pb.Route, context: Any) -> pb.SetRouteResponse:
        self.calls.append(("SetRoute", request))
        self.routes[request.sandbox_id] = request
        return pb.SetRouteResponse()

    async def DropRoute(self, request: pb.DropRouteRequest, context: Any) -> pb.DropRouteResponse:
        self.calls.append(("DropRoute", request))
        if "DropRoute" in self.refuses:
            await context.abort(grpc.StatusCode.INTERNAL, "the edge could not")
        if request.sandbox_id in self.stuck:
            await asyncio.Event().wait()
        self.routes.pop(request.sandbox_id, None)
        return pb.DropRouteResponse()

    async def ReplaceRoutes(self, request: pb.ReplaceRoutesRequest, context: Any) -> pb.ReplaceRoutesResponse:
        self.calls.append(("ReplaceRoutes", request))
        self.routes = {route.sandbox_id: route for route in request.routes}
        return pb.ReplaceRoutesResponse()
