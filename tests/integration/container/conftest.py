"""One world a module: its machines share slots, layers and runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.support.container import Guest, World


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with World() as entered:
        yield entered


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest(world: World) -> Guest:
    """A machine that several tests look at; none of them changes it for the others."""
    return await world.machine()
