"""Logs and metrics of sandboxes."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from emberbox.node.errors import NoSuchSandbox
from emberbox.node.model import EndReason, State
from tests.unit.node.conftest import until


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


async def test_a_page_that_is_too_long_is_asked_for_in_smaller_ones(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    agent = world.runtime.of(world.node, "s1").agent
    agent.entries = [entry(number, f"{number}") for number in range(1, 51)]
    agent.longest_page = 20

    await world.node.collect_logs("s1")

    assert await read(world) == [f"{number}" for number in range(1, 51)]


async def test_an_agent_whose_log_never_ends_is_left_alone_after_a_while(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    agent = world.runtime.of(world.node, "s1").agent
    agent.entries = [entry(1, "again")] * 100
    agent.repeats = True

    await world.node.collect_logs("s1")

    assert len(await read(world, limit=1000)) == 200


async def test_the_oldest_logs_of_ended_sandboxes_go_when_there_are_too_many(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberbox.node.logs._MOST_ENDED_BYTES", 2500)
    world = await make_world()
    folder = world.node.directory / "logs"
    for number in range(4):
        (folder / f"s{number}.jsonl").write_text("x" * 1000)
        stamp = time.time() - 100 + number
        os.utime(folder / f"s{number}.jsonl", (stamp, stamp))

    await world.node.logs.remove_old(frozenset({"s0"}))

    assert sorted(path.name for path in folder.iterdir()) == ["s0.jsonl", "s2.jsonl", "s3.jsonl"]


@pytest.mark.parametrize("broken", ["log", "record"])
async def test_a_disk_that_cannot_be_written_does_not_keep_a_machine(
    make_world: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    world = await make_world()
    await world.create("s1")
    await world.create("s2")
    for name in ("s1", "s2"):
        world.runtime.of(world.node, name).agent.entries = [entry(1, "x")]

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    if broken == "log":
        monkeypatch.setattr(type(world.node.logs), "_append", full)
        await world.node.machines.kill("s1")
    else:
        monkeypatch.setattr("emberbox.node.records.write_file", full)
        monkeypatch.setattr("pathlib.Path.unlink", full)
        with pytest.raises(OSError, match="No space"):
            await world.node.machines.kill("s1")
        monkeypatch.undo()
        monkeypatch.setattr("emberbox.node.records.write_file", full)
        await world.node.machines.kill("s1")
    of_others = {world.runtime.of(world.node, "s2").spec.machine_id}
    await until(lambda: "s1" not in world.node.machines.sandboxes)
    await world.node.machines._end(world.node.machines.sandboxes["s2"], EndReason.TIMED_OUT)
    await world.node.metrics.sample()

    assert not of_others & set(world.runtime.machines)
    assert world.node.machines.sandboxes["s2"].status().state is State.ENDED


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
