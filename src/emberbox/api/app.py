"""The application: routes, middleware, error shape, and the OpenAPI document that it declares."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from emberbox import __version__
from emberbox.api import (
    accounts,
    admin,
    builds,
    edge,
    errors,
    health,
    later,
    lifecycle,
    sandboxes,
    snapshots,
    tags,
    templates,
)
from emberbox.api.capabilities import documents, v1
from emberbox.api.mcp import server as mcp
from emberbox.api.middleware import BodyLimit, EncodedSlashes, Measured
from emberbox.control.service import ControlPlane
from emberbox.settings import Settings

_ROUTERS = (
    health.router,
    sandboxes.router,
    lifecycle.router,
    snapshots.router,
    # Before `templates`: /templates/tags is not a template.
    tags.router,
    templates.router,
    builds.router,
    accounts.router,
    admin.router,
    later.router,
    edge.router,
    v1.router,
    documents.router,
)


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its lifespan owns the control plane."""

    mcp_endpoint = mcp.McpEndpoint()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with ControlPlane(settings) as control, mcp_endpoint.serving(control):
            app.state.control = control
            app.state.mcp = mcp_endpoint
            yield

    app = _Application(
        title="Emberbox",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Clients leave the header out of requests with small or empty bodies.
        strict_content_type=False,
        # Tracing costs time on each request; our own counters say what is needed.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    app.router.routes.append(Route(mcp.PATH, mcp_endpoint, include_in_schema=False))
    app.add_middleware(BodyLimit, exempt=("/files/", mcp.PATH))
    app.add_middleware(EncodedSlashes)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Next-Token", "X-Total-Running", "Should-Retry", "Retry-After", "Mcp-Session-Id"],
        max_age=86400,
    )
    app.add_middleware(Measured)
    return app


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The document, without the 422 that FastAPI declares by itself: invalid requests answer 400 here."""
        if self.openapi_schema is None:
            document = super().openapi()
            for operations in document["paths"].values():
                for operation in operations.values():
                    declared = operation["responses"].get("422")
                    if declared and "HTTPValidationError" in str(declared):
                        del operation["responses"]["422"]
            self.openapi_schema = document
        return self.openapi_schema
