"""The warm pool."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from emberbox.node.model import Image
from emberbox.node.pool import PoolKey
from emberbox.runtime.base import Limits, Rates
from tests.unit.node.conftest import FakeRuntime, until

IMAGE = Image(build_id="build1", layers=("aa",), env_vars={"FROM": "template"})
LIMITS = Limits(cpu_count=1, memory_mb=128, disk_size_mb=512)


async def test_the_first_create_is_cold_and_the_next_takes_a_waiting_machine(make_world: Any) -> None:
    world = await make_world(warm_max=4)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids

    await world.create("s2", access_token="second")

    machine = world.runtime.of(world.node, "s2")
    assert machine.spec.machine_id == waiting
    assert machine.agent.inits[-1]["accessToken"] == "second"


async def test_paused_machines_are_woken(make_world: Any) -> None:
    world = await make_world(memory=True, warm_max=4)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids
    was_frozen = world.runtime.machines[waiting].frozen

    await world.create("s2")

    machine = world.runtime.of(world.node, "s2")
    assert machine.spec.machine_id == waiting
    assert was_frozen
    assert not machine.frozen


async def test_it_grows_with_demand_up_to_its_bound(make_world: Any) -> None:
    world = await make_world(warm_max=3)

    for number in range(6):
        await world.create(f"s{number}")

    await until(lambda: world.node.pool.size == 3)
    await asyncio.sleep(0.05)
    assert world.node.pool.size == 3


async def test_it_shrinks_when_nobody_asks(make_world: Any) -> None:
    world = await make_world(warm_max=3)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)

    world.node.pool._idle_seconds = 0.0
    await asyncio.sleep(0.01)
    await world.node.pool.tend()

    assert world.node.pool.size == 0
    assert len(world.runtime.machines) == 1


async def test_other_sizes_and_builds_have_their_own(make_world: Any) -> None:
    world = await make_world(warm_max=2)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids

    await world.create("s2", image=Image("other", ("aa",)))

    assert world.runtime.of(world.node, "s2").spec.machine_id != waiting


async def test_a_waiting_machine_that_dies_is_replaced(make_world: Any) -> None:
    world = await make_world(warm_max=1)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids
    machine = world.runtime.machines[waiting]

    machine.die("killed")
    await until(lambda: machine.destroyed)
    await world.node.pool.tend()

    await until(lambda: world.node.pool.size == 1)
    assert waiting not in world.node.pool.machine_ids


async def test_a_waiting_machine_that_fails_its_claim_is_not_the_users_problem(make_world: Any) -> None:
    world = await make_world(warm_max=1)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids
    broken = world.runtime.machines[waiting]
    broken.agent.refuse_init = True

    status = await world.create("s2")

    assert status.address
    assert broken.destroyed


async def test_waiting_machines_give_way_on_a_full_node(make_world: Any) -> None:
    world = await make_world(warm_max=1)
    world.slots.size = 2
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)

    status = await world.create("s2", image=Image("other", ("aa",)))

    assert status.address


async def test_stopping_the_node_ends_waiting_machines_only(make_world: Any) -> None:
    world = await make_world(warm_max=2)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)

    await world.node.close()

    assert len(world.runtime.machines) == 1
    await world.start()
    assert world.node.machines.find("s1").status().address


async def test_a_killed_create_returns_nothing_to_the_pool(make_world: Any) -> None:
    world = await make_world(warm_max=1)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids
    machine = world.runtime.machines[waiting]
    machine.agent.stall_init.clear()
    machine.agent.init_reached.clear()
    create = asyncio.create_task(world.create("s2"))
    await machine.agent.init_reached.wait()

    await world.node.machines.kill("s2")

    await asyncio.gather(create, return_exceptions=True)
    assert machine.destroyed


async def test_a_template_that_was_just_built_has_its_first_machine_ready(make_world: Any) -> None:
    world = await make_world(warm_max=2)

    world.node.pool.expect(IMAGE, LIMITS)

    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids
    await world.create("s1")
    assert world.runtime.of(world.node, "s1").spec.machine_id == waiting


async def test_machines_of_other_rates_wait_apart(make_world: Any) -> None:
    world = await make_world(memory=True, warm_max=4)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    waiting = world.node.pool.machine_ids
    slower = replace(LIMITS, rates=Rates(disk_mb_per_second=5))

    await world.create("s2", limits=slower)

    machine = world.runtime.of(world.node, "s2")
    assert machine.spec.machine_id not in waiting
    assert machine.spec.limits.rates == Rates(disk_mb_per_second=5)


def test_saved_memory_of_each_rate_has_its_folder_and_the_old_one_its_name() -> None:
    keys = [
        str(PoolKey.of(IMAGE, replace(LIMITS, rates=rates)))
        for rates in (Rates(), Rates(disk_mb_per_second=5), Rates(5, 100, 8), Rates(network_mbit_per_second=5))
    ]

    assert keys == ["build1-1-128-512", "build1-1-128-512-5-0-0", "build1-1-128-512-5-100-8", "build1-1-128-512-0-0-5"]


async def test_paused_machines_have_rehearsed_a_claim_and_a_command(make_world: Any) -> None:
    world = await make_world(memory=True, warm_max=4)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = world.node.pool.machine_ids

    agent = world.runtime.machines[waiting].agent

    assert [body["accessToken"] for body in agent.inits] == [""]
    assert len(agent.commands) == 1


async def test_a_rehearsal_that_fails_costs_no_machine(make_world: Any) -> None:
    runtime = FakeRuntime(memory=True)
    runtime.refuse_commands = True
    world = await make_world(runtime=runtime, warm_max=4)

    await world.create("s1")

    await until(lambda: world.node.pool.size == 1)
