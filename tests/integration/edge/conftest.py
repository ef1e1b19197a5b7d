"""One edge for all tests of a module that leave it as it was; others start their own."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.support.edge import ControlPlane, EdgeProcess, Machine, Routes

if shutil.which("haproxy") is None:
    raise RuntimeError("these tests need the package haproxy (make install)")


@dataclass
class World:
    """An edge, a control plane, and machines on demand."""

    edge: EdgeProcess
    routes: Routes
    control: ControlPlane
    client: httpx.AsyncClient
    machines: list[Machine]

    def new_id(self) -> str:
        return "i" + uuid.uuid4().hex[:19]

    async def machine(self, *ports: int) -> Machine:
        machine = Machine(self.edge.new_address())
        self.machines.append(machine)
        for port in ports or (8080,):
            await machine.listen(port)
        return machine

    async def sandbox(self, *ports: int, **fields: object) -> tuple[str, Machine]:
        """A routed sandbox with a machine that describes what it is asked."""
        sandbox_id, machine = self.new_id(), await self.machine(*ports)
        await self.routes.set(sandbox_id, machine.address, **fields)
        return sandbox_id, machine


@contextlib.asynccontextmanager
async def world_of(edge: EdgeProcess) -> AsyncIterator[World]:
    control = ControlPlane(edge.api_address)
    await control.start()
    routes = Routes(edge.settings.edge_target)
    async with httpx.AsyncClient(base_url=edge.url, timeout=90, trust_env=False) as client:
        world = World(edge, routes, control, client, [])
        yield world
    if edge.process is not None and edge.process.poll() is None:
        await routes.replace({})
    await routes.close()
    for machine in (control, *world.machines):
        await machine.close()


@pytest.fixture(scope="module")
def shared_edge() -> Iterator[EdgeProcess]:
    edge = EdgeProcess()
    try:
        edge.start()
        yield edge
    finally:
        edge.remove()


@pytest.fixture
async def world(shared_edge: EdgeProcess) -> AsyncIterator[World]:
    """On the edge that the module's tests share."""
    async with world_of(shared_edge) as made:
        yield made


@pytest.fixture
async def new_world() -> AsyncIterator[Callable[..., Awaitable[World]]]:
    """Makes worlds whose edge has settings of its own, or will be killed."""
    async with contextlib.AsyncExitStack() as worlds:

        async def make(**settings: object) -> World:
            edge = EdgeProcess(**settings)
            worlds.callback(edge.remove)
            edge.start()
            return await worlds.enter_async_context(world_of(edge))

        yield make


@pytest.fixture
async def own_world(new_world: Callable[..., Awaitable[World]]) -> World:
    return await new_world()
