"""The api role's process."""

from __future__ import annotations

import uvicorn

from emberbox.api.app import create_app
from emberbox.logs import configure_logging
from emberbox.settings import Settings, get_settings


def serve(settings: Settings) -> None:
    """Serve the API in the foreground until SIGTERM or SIGINT; then finish what is going on and return."""
    configure_logging("api", settings)
    uvicorn.run(
        create_app(settings),
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


if __name__ == "__main__":
    serve(get_settings())
