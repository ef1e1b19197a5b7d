"""A control plane with its fakes on a real port, in a thread of its own: for clients that block."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from emberbox.api.app import create_app
from emberbox.api.main import Server
from tests.support.control import World, made_world


@contextmanager
def live_world(**settings: Any) -> Iterator[tuple[World, str]]:
    """The world and the address of its API."""
    listening, stop = threading.Event(), threading.Event()
    found: list[tuple[World, str]] = []
    failed: list[BaseException] = []

    async def serve() -> None:
        async with made_world(**settings) as world:
            app = world.app = create_app(world.settings)
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
                server = Server(config, app)
                server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                while not server.started and not serving.done():
                    await asyncio.sleep(0.01)
                await world.ready()
                found.append((world, f"http://127.0.0.1:{listener.getsockname()[1]}"))
                listening.set()
                await asyncio.to_thread(stop.wait)
                server.should_exit = True
                await serving

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            listening.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    listening.wait()
    if failed:
        raise failed[0]
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
