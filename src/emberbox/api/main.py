"""The api role's process."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from emberbox.api.app import create_app
from emberbox.logs import configure_logging
from emberbox.settings import Settings, get_settings

STARTUP_FAILURE = 3
"""Exit code, as uvicorn's own command has it."""


class Server(uvicorn.Server):
    """Ends the streams of MCP first when it is told to stop: they would hold it up until its deadline."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._app.state.mcp.end()
        await super().shutdown(sockets)


def serve(settings: Settings) -> None:
    """Serve the API in the foreground until SIGTERM or SIGINT; then finish what is going on and return."""
    configure_logging("api", settings)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=20,
        backlog=4096,
    )
    server = Server(config, app)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)


if __name__ == "__main__":
    serve(get_settings())
