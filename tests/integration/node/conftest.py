"""One node process a module, without a warm pool unless a test wants one: what is left over can then be counted."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.node import NodeProcess


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node() -> AsyncIterator[NodeProcess]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces, mounts and cgroups")
    async with NodeProcess(warm_min=0, warm_max=0) as entered:
        yield entered
