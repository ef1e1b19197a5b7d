"""Logs and metrics of sandboxes."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from emberbox.node.errors import NoSuchSandbox


def entry(seq: int, message: str, level: str = "info") -> dict[str, Any]:
    stamp = f"2026-01-01T00:00:{seq:02d}.123456789Z"
    return {"seq": seq, "timestamp": stamp, "level": level, "logger": "process", "message": message, "fields": {"a": 1}}


async def read(world: Any, **changes: Any) -> list[str]:
    query = {"cursor_ms": 0, "limit": 100, "backward": False, "level": "", "search": ""} | changes
    return [found.message for found in await world.node.logs.read("s1", **query)]


async def test_logs_are_collected_filtered_and_paged(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    agent = world.runtime.of(world.node, "s1").agent
    agent.entries = [entry(1, "one"), entry(2, "two", "error"), entry(3, "three")]
    await world.node.collect_logs("s1")
    agent.entries.append(entry(4, "four"))
    await world.node.collect_logs("s1")
    await world.node.collect_logs("s1")

    (second,) = await world.node.logs.read("s1", cursor_ms=0, limit=1, backward=False, level="error", search="")

    assert await read(world) == ["one", "two", "three", "four"]
    assert await read(world, backward=True, limit=2) == ["four", "three"]
    assert await read(world, cursor_ms=second.timestamp_ms) == ["two", "three", "four"]
    assert await read(world, cursor_ms=second.timestamp_ms, backward=True) == ["two", "one"]
    assert await read(world, search="t") == ["two", "three"]
    assert second.fields == {"logger": "process", "a": "1"}


async def test_a_restarted_node_goes_on_where_it_stopped(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    agent = world.runtime.of(world.node, "s1").agent
    agent.entries = [entry(1, "one")]
    await world.node.collect_logs("s1")
    await world.kill_process()
    await world.start()
    agent.entries.append(entry(2, "two"))

    await world.node.collect_logs("s1")

    assert await read(world) == ["one", "two"]


async def test_logs_stay_after_the_end_for_their_time(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    world.runtime.of(world.node, "s1").agent.entries = [entry(1, "last words")]
    await world.node.machines.kill("s1")
    kept = await read(world)
    file = world.node.directory / "logs" / "s1.jsonl"
    long_ago = time.time() - 25 * 3600
    os.utime(file, (long_ago, long_ago))

    await world.node.logs.remove_old(frozenset())

    assert kept == ["last words"]
    with pytest.raises(NoSuchSandbox):
        await read(world)


async def test_a_log_keeps_its_newest_entries_within_its_bound(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    world.node.logs._bound = 20_000

    for number in range(1000):
        await world.node.logs.note("s1", "info", f"entry {number:04d}")

    files = list((world.node.directory / "logs").iterdir())
    messages = await read(world, limit=10_000)
    assert sum(file.stat().st_size for file in files) <= 41_000
    assert messages[-1] == "entry 0999"
    assert len(messages) >= 100


async def test_a_torn_line_is_passed_over(make_world: Any) -> None:
    world = await make_world()
    await world.node.logs.note("s1", "info", "whole")
    with (world.node.directory / "logs" / "s1.jsonl").open("a") as file:
        file.write('{"timestamp": 1, "mess')

    assert await read(world) == ["whole"]


async def test_every_running_machine_is_sampled(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.create("s2")
    await world.node.machines.pause("s2", memory=True)
    with world.node.events.subscribe() as subscription:
        await world.node.metrics.sample()
        await world.node.metrics.sample()

        samples = await subscription.next()

    assert [sample.sandbox_id for sample in samples] == ["s1"]
    assert (samples[0].memory_used, samples[0].memory_total, samples[0].disk_total) == (10, 20, 2)
