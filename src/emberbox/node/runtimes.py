"""Choosing the runtime: the one place that knows which there are."""

from __future__ import annotations

import os
from dataclasses import dataclass

import structlog

from emberbox.node.errors import NodeError, Unsupported
from emberbox.runtime.base import Runtime
from emberbox.settings import Settings

log = structlog.get_logger("emberbox.node")


@dataclass(frozen=True, slots=True)
class Chosen:
    runtime: Runtime
    why: str
    """For people, after "because"."""


async def choose_runtime(settings: Settings) -> Chosen:
    """Return the runtime that `settings.runtime` names; `auto` takes firecracker where it really works.

    Raises:
        Unsupported: the named runtime does not work here; the message says why and what to do.
    """
    if settings.runtime == "container":
        return Chosen(await _container(settings), "it is set")
    if settings.runtime == "firecracker":
        return Chosen(await _firecracker(settings), "it is set")
    try:
        chosen = Chosen(await _firecracker(settings), "a guest kernel boots on this host's KVM")
    except NodeError as error:
        chosen = Chosen(await _container(settings), str(error))
    log.info("runtime.chosen", runtime=chosen.runtime.name, why=chosen.why)
    return chosen


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
