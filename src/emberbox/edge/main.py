"""The edge role: `emberbox edge`."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import structlog

from emberbox.edge import proxy
from emberbox.edge.config import Paths
from emberbox.edge.door import Door
from emberbox.edge.errors import BadConfiguration, EdgeError
from emberbox.edge.service import EdgeService
from emberbox.settings import Settings
from emberbox.wire import edge_pb2_grpc

log = structlog.get_logger()

_GRACE_SECONDS = 1.0
_LOOPBACK = ("127.", "localhost:", "[::1]:")


def serve(settings: Settings) -> None:
    """Run the edge until SIGTERM or SIGINT; HAProxy ends with it. SIGHUP takes up changed files.

    A killed edge leaves HAProxy running; the next one takes it over. An edge that cannot serve ends it, says why in the
    log and exits with 1.
    """
    try:
        asyncio.run(_serve(settings))
    except (EdgeError, OSError) as error:
        log.error("edge.cannot_serve", error=str(error))
        raise SystemExit(1) from None


def end_leftover(settings: Settings) -> bool:
    """End the HAProxy of a killed edge, for `emberbox down`; not that of an edge that runs. True when there was one."""
    try:
        with _alone(Paths(settings.edge_dir).lock):
            return proxy.end_leftover(Paths(settings.edge_dir))
    except (BadConfiguration, OSError):
        return False


async def _serve(settings: Settings) -> None:
    settings.edge_dir.mkdir(parents=True, exist_ok=True)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # From the beginning: who is ended between starting HAProxy and noting which it is would leave it.
        loop.add_signal_handler(number, stop.set)
    with _alone(Paths(settings.edge_dir).lock):
        door = Door(settings)
        try:
            await door.open()
        except BaseException:
            # Nobody would take routes from the last edge's HAProxy, and addresses are given to other sandboxes.
            await asyncio.to_thread(proxy.end_leftover, Paths(settings.edge_dir))
            raise
        server: grpc.aio.Server | None = None
        try:
            server = await _listen(settings, EdgeService(door))
            await _until_stopped(door, stop)
        finally:
            if server is not None:
                await server.stop(_GRACE_SECONDS)
            await door.close()
    log.info("edge.stopped")


async def _until_stopped(door: Door, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()

    def on_hangup() -> None:
        task = loop.create_task(_reload(door))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    keeping = loop.create_task(door.keep())
    stopping = loop.create_task(stop.wait())
    try:
        await asyncio.wait((keeping, stopping), return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()  # it ends only by failing
    finally:
        for task in (keeping, stopping, *reloads):
            task.cancel()
        await asyncio.gather(keeping, stopping, *reloads, return_exceptions=True)
        loop.remove_signal_handler(signal.SIGHUP)


async def _reload(door: Door) -> None:
    try:
        await door.reload()
    except EdgeError as error:
        log.error("edge.reload_failed", error=str(error))


async def _listen(settings: Settings, service: EdgeService) -> grpc.aio.Server:
    target = settings.edge_target
    # The control plane pings every 20 s; gRPC's default hangs up on pings more often than every 5 minutes.
    server = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 5_000)])
    edge_pb2_grpc.add_EdgeServicer_to_server(service, server)
    if target.startswith("unix:"):
        path = Path(target.removeprefix("unix://" if target.startswith("unix:///") else "unix:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with _umask(0o117):
            _bind(server, target)
            await server.start()
        _give_to_group(path, settings.api_user)
    elif target.startswith(_LOOPBACK):
        _bind(server, target)
        await server.start()
    else:
        raise BadConfiguration(f"edge_address {target!r} must be a unix socket or a loopback address")
    return server


def _bind(server: grpc.aio.Server, target: str) -> None:
    try:
        server.add_insecure_port(target)
    except RuntimeError as error:
        raise BadConfiguration(f"the edge cannot listen on {target}: {error}") from None


def _give_to_group(path: Path, group: str) -> None:
    """Root's own socket must be open to the control plane, which runs as another user."""
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            os.chown(path, -1, grp.getgrnam(group).gr_gid)


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the edge's directory: two edges on one would undo each other's changes."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadConfiguration(f"another edge runs on {path.parent}; stop it first (emberbox down)") from None
        yield
