"""Choosing the runtime: the one place that knows which there are."""

from __future__ import annotations

import os

import structlog

from emberbox.node.errors import NodeError, Unsupported
from emberbox.runtime.base import Runtime
from emberbox.settings import Settings

log = structlog.get_logger("emberbox.node")


async def choose_runtime(settings: Settings) -> Runtime:
    """Return the runtime that `settings.runtime` names; `auto` takes firecracker where it really works.

    Raises:
        Unsupported: the named runtime does not work here; the message says why and what to do.
    """
    if settings.runtime == "container":
        return await _container(settings)
    if settings.runtime == "firecracker":
        return await _firecracker(settings)
    try:
        runtime = await _firecracker(settings)
    except NodeError as error:
        log.info("runtime.chosen", runtime="container", why=str(error))
        return await _container(settings)
    log.info("runtime.chosen", runtime="firecracker")
    return runtime


async def _container(settings: Settings) -> Runtime:
    from emberbox.runtime.container.runtime import ContainerRuntime

    return ContainerRuntime(settings)


async def _firecracker(settings: Settings) -> Runtime:
    from emberbox.runtime.firecracker import setup
    from emberbox.runtime.firecracker.errors import FirecrackerError

    if not _kvm_usable():
        raise Unsupported(
            "the firecracker runtime needs /dev/kvm and this host has none that works; "
            "enable virtualization, or use the container runtime"
        )
    if settings.runtime == "auto" and not setup.present(settings):
        raise Unsupported("Firecracker is not installed here; `emberbox setup` installs it")
    try:
        return await setup.open_runtime(settings)
    except FirecrackerError as error:
        raise Unsupported(f"the firecracker runtime does not work here: {error}") from error


def _kvm_usable() -> bool:
    try:
        descriptor = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(descriptor)
    return True
