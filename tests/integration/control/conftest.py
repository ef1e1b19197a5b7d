from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.control import World, serving_world


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with serving_world() as made:
        yield made
