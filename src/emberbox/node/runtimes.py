"""Choosing the runtime: the one place that knows which there are."""

from __future__ import annotations

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
