"""The node process: the service on its socket, from start to SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import grp
import os
import pwd
import signal
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its fork handlers stall the commands we start

import grpc
import structlog

from emberbox.node.disks import Disks
from emberbox.node.errors import BadValue
from emberbox.node.node import Node
from emberbox.node.runtimes import choose_runtime
from emberbox.node.server import NodeService
from emberbox.node.slots import Slots
from emberbox.settings import Settings
from emberbox.wire import node_pb2_grpc

log = structlog.get_logger("emberbox.node")

_STOP_SECONDS = 5.0
_M_ARENA_MAX = -8  # malloc.h
_THREADS = 32
"""At most; copies of large disks must not hold up the short writes of others."""
_MESSAGE_BYTES = 64 * 1024 * 1024
"""A `State` with every machine of a large node is bigger than gRPC's usual 4 MiB."""


async def serve(settings: Settings) -> None:
    """Run the node until SIGTERM or SIGINT. Machines go on after it.

    Raises:
        NodeError: it cannot start; the message says why and what to do.
    """
    if os.geteuid() != 0:
        raise BadValue("the node needs root: it makes namespaces, mounts and cgroups")
    _keep_memory_small()
    os.umask(0o022)  # the api passes through `data_dir` to the socket; what is private has its own mode
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="node"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    chosen = await choose_runtime(settings)
    runtime = chosen.runtime
    slots = Slots(settings, taps=runtime.name == "firecracker")
    node = Node(settings, runtime, slots, Disks(settings))
    server = grpc.aio.server(
        options=[
            ("grpc.max_send_message_length", _MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            # The control plane pings every 20 s; gRPC's default hangs up on pings more often than every 5 minutes.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ]
    )
    node_pb2_grpc.add_NodeServicer_to_server(NodeService(node, runtime_why=chosen.why), server)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(node.close)
        await node.start()
        listen(server, settings)
        await server.start()
        stack.push_async_callback(server.stop, _STOP_SECONDS)
        open_socket_to_group(settings)
        gc.collect()
        _trim_memory()
        log.info("node.listening", target=settings.node_target)
        await stopping.wait()
        node.events.close()


def _keep_memory_small() -> None:
    """One heap for two threads: glibc's default of one a thread keeps megabytes that nobody uses."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _trim_memory() -> None:
    """Give back what imports and adoption needed only once."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def listen(server: grpc.aio.Server, settings: Settings) -> None:
    """Bind the service: a unix socket, or TCP with mutual TLS.

    Raises:
        BadValue: a TCP target without certificates, or an address that cannot be bound.
    """
    target = settings.node_target
    if target.startswith("unix:"):
        path = Path(target.removeprefix("unix:").removeprefix("//"))
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.stat().st_mode):  # left by a process that was killed; the node's lock is ours
                path.unlink()
        _bind(lambda: server.add_insecure_port(f"unix:{path}"), target)
        return
    certificate, key, authority = settings.node_tls_cert, settings.node_tls_key, settings.node_tls_ca
    if certificate is None or key is None or authority is None:
        raise BadValue(
            f"node_address {target!r} is a TCP address, where the node answers over mutual TLS only; set "
            "EMBERBOX_NODE_TLS_CERT, EMBERBOX_NODE_TLS_KEY and EMBERBOX_NODE_TLS_CA"
        )
    try:
        credentials = grpc.ssl_server_credentials(
            [(key.read_bytes(), certificate.read_bytes())],
            root_certificates=authority.read_bytes(),
            require_client_auth=True,
        )
    except OSError as error:
        raise BadValue(f"the node's certificate cannot be read: {error}") from error
    _bind(lambda: server.add_secure_port(target, credentials), target)


def _bind(add: Callable[[], int], target: str) -> None:
    try:
        port = add()
    except RuntimeError as error:
        raise BadValue(f"the node cannot listen on {target}: {error}") from error
    if port == 0:
        raise BadValue(f"the node cannot listen on {target}; is the address in use?")


def open_socket_to_group(settings: Settings) -> None:
    """Let the group of `settings.api_user` connect to the unix socket, and nobody else."""
    if not settings.node_target.startswith("unix:"):
        return
    path = Path(settings.node_target.removeprefix("unix:").removeprefix("//"))
    group = _group_of(settings.api_user)
    if group is None:
        log.warning("node.no_api_user", user=settings.api_user, message="only root may connect to the node")
    else:
        os.chown(path, 0, group)
    os.chmod(path, 0o660)


def _group_of(user: str) -> int | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(user).pw_gid
    with contextlib.suppress(KeyError):
        return grp.getgrnam(user).gr_gid
    return None
