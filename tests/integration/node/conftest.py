"""One node process a module, without a warm pool unless a test wants one: what is left over can then be counted."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from emberbox.wire import node_pb2 as wire
from tests.support.node import NodeProcess


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node() -> AsyncIterator[NodeProcess]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces, mounts and cgroups")
    async with NodeProcess(warm_min=0, warm_max=0) as entered:
        yield entered


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_of_a_failed_test_stays(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """End the sandboxes that a failed test left on the module's node: the tests after it count what is left."""
    yield
    if "node" in request.fixturenames:
        node: NodeProcess = request.getfixturevalue("node")
        print("\n".join(node.log.read_text().splitlines()[-100:]))  # seen when the test failed
        for machine in await node.state():
            if machine.state == wire.MACHINE_STATE_ENDED:
                await node.stub.Acknowledge(wire.AcknowledgeRequest(sandbox_ids=[machine.sandbox_id]), timeout=300)
            else:
                await node.stub.Kill(wire.KillRequest(sandbox_id=machine.sandbox_id), timeout=300)
