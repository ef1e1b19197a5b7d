"""Spares: slots with a process in them, handed out first and replaced behind the caller's back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from emberbox.node.errors import NodeFull
from emberbox.node.spares import Spares
from emberbox.runtime.base import KeepsSpares, Slot
from emberbox.runtime.errors import RuntimeFailure
from tests.unit.node.conftest import FakeRuntime, FakeSlots, until


class SparingRuntime(FakeRuntime):
    """Also keeps spares, which are names in a set."""

    def __init__(self) -> None:
        super().__init__(memory=True)
        self.spares: set[str] = set()
        self.fail_spares = ""

    async def make_spare(self, machine_id: str, directory: Path, slot: Slot) -> None:
        assert directory.is_dir()
        await self.passes("spare")
        if self.fail_spares:
            raise RuntimeFailure(self.fail_spares)
        self.spares.add(machine_id)

    async def end_spare(self, machine_id: str) -> None:
        self.spares.discard(machine_id)


@pytest.fixture
def runtime() -> SparingRuntime:
    made = SparingRuntime()
    assert isinstance(made, KeepsSpares)
    return made


@pytest.fixture
def slots() -> FakeSlots:
    return FakeSlots(size=4)


async def test_a_slot_with_a_spare_is_taken_first_and_replaced(
    runtime: SparingRuntime, slots: FakeSlots, tmp_path: Path
) -> None:
    spares = Spares(slots, runtime, tmp_path, count=2)
    spares.start()
    await until(lambda: len(spares.machine_ids) == 2)
    waiting = spares.machine_ids

    slot = await spares.take()

    assert slot.spare in waiting
    assert (tmp_path / slot.spare).is_dir()
    await until(lambda: len(spares.machine_ids) == 2)
    assert slot.spare not in spares.machine_ids
    assert slots.used == {0, 1, 2}
    await spares.close()
    assert slots.used == {slot.index}
    assert runtime.spares == {slot.spare}


async def test_an_unused_spare_goes_with_its_slot(runtime: SparingRuntime, slots: FakeSlots, tmp_path: Path) -> None:
    spares = Spares(slots, runtime, tmp_path, count=1)
    spares.start()
    await until(lambda: spares.machine_ids)
    slot = await spares.take()
    await spares.close()

    await spares.give_back(slot)

    assert (runtime.spares, slots.used) == (set(), set())


async def test_none_is_made_while_machines_start(runtime: SparingRuntime, slots: FakeSlots, tmp_path: Path) -> None:
    busy = True
    spares = Spares(slots, runtime, tmp_path, count=1, busy=lambda: busy)
    spares.start()
    await asyncio.sleep(0.2)

    early = spares.machine_ids
    busy = False

    await until(lambda: spares.machine_ids)
    assert early == frozenset()
    await spares.close()


async def test_a_spare_that_cannot_be_made_leaves_nothing_and_slots_go_on(
    runtime: SparingRuntime, slots: FakeSlots, tmp_path: Path
) -> None:
    runtime.fail_spares = "no room"
    reached = runtime.hold("spare")
    spares = Spares(slots, runtime, tmp_path, count=1)
    spares.start()
    await reached.wait()
    runtime.gates["spare"].set()

    await until(lambda: slots.used == set() and not list(tmp_path.iterdir()))

    assert (await spares.take()).spare == ""
    await spares.close()


async def test_closing_waits_for_a_spare_in_the_making_and_ends_it(
    runtime: SparingRuntime, slots: FakeSlots, tmp_path: Path
) -> None:
    reached = runtime.hold("spare")
    spares = Spares(slots, runtime, tmp_path, count=1)
    spares.start()
    await reached.wait()

    closing = asyncio.create_task(spares.close())
    await asyncio.sleep(0.05)
    runtime.gates["spare"].set()
    await closing

    assert (runtime.spares, slots.used, list(tmp_path.iterdir())) == (set(), set(), [])


async def test_spares_take_no_slot_that_a_machine_needs(
    runtime: SparingRuntime, slots: FakeSlots, tmp_path: Path
) -> None:
    slots.size = 1
    spares = Spares(slots, runtime, tmp_path, count=2)
    spares.start()
    await until(lambda: spares.machine_ids)

    slot = await spares.take()

    assert slot.spare
    with pytest.raises(NodeFull):
        await spares.take()
    await spares.close()


async def test_a_create_runs_in_the_spare_and_a_failed_one_ends_it(make_world: Any) -> None:
    runtime = SparingRuntime()
    world = await make_world(runtime=runtime, memory=True, warm_max=0, spares=1)
    await until(lambda: world.node.spares.machine_ids)
    (waiting,) = world.node.spares.machine_ids
    await world.create("s1")
    used = runtime.of(world.node, "s1").spec
    await until(lambda: world.node.spares.machine_ids)
    (next_one,) = world.node.spares.machine_ids
    runtime.fail_start = "it does not want to"

    with pytest.raises(RuntimeFailure):
        await world.create("s2")

    assert used.machine_id == waiting
    assert next_one not in runtime.spares
    assert not (world.node.hosting.machines_dir / next_one).exists()
    runtime.fail_start = ""
    await world.node.machines.kill("s1")
