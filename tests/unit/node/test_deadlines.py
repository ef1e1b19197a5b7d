"""Deadlines: each fires once, at its time, wherever it was moved."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberbox.node import deadlines as module
from emberbox.node.deadlines import Deadlines
from emberbox.node.model import now_ms

Names = st.sampled_from("abc")
Steps = st.lists(st.one_of(st.tuples(st.just("set"), Names, st.integers(0, 9)), st.tuples(st.just("clear"), Names)))


@given(steps=Steps)
def test_what_fires_is_what_was_set_last(steps: list[tuple[str, ...]]) -> None:
    fired: list[str] = []
    deadlines, wanted = Deadlines(fired.append), {}
    for step in steps:
        if step[0] == "set":
            deadlines.set(step[1], int(step[2]))
            wanted[step[1]] = int(step[2])
        else:
            deadlines.clear(step[1])
            wanted.pop(step[1], None)

    deadlines._fire()
    deadlines._fire()

    assert sorted(fired) == sorted(wanted)
    assert [wanted[name] for name in fired] == sorted(wanted.values())


@pytest.fixture
async def fired() -> AsyncIterator[tuple[Deadlines, asyncio.Queue[str]]]:
    queue: asyncio.Queue[str] = asyncio.Queue()
    deadlines = Deadlines(queue.put_nowait)
    task = asyncio.create_task(deadlines.run())
    yield deadlines, queue
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_an_earlier_one_is_not_held_up_by_a_later_one(fired: tuple[Deadlines, asyncio.Queue[str]]) -> None:
    deadlines, queue = fired
    deadlines.set("late", now_ms() + 3_600_000)
    await asyncio.sleep(0.01)

    deadlines.set("soon", now_ms() + 20)

    assert await asyncio.wait_for(queue.get(), 60) == "soon"
    assert queue.empty()


async def test_a_clock_that_jumps_ahead_is_noticed(
    fired: tuple[Deadlines, asyncio.Queue[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, queue = fired
    deadlines.set("far", now_ms() + 3_600_000)
    await asyncio.sleep(0.01)

    monkeypatch.setattr(module, "now_ms", lambda: now_ms() + 7_200_000)

    assert await asyncio.wait_for(queue.get(), 60) == "far"


async def test_many_moves_do_not_pile_up() -> None:
    deadlines = Deadlines(lambda _name: None)

    for number in range(10_000):
        deadlines.set("one", now_ms() + 1_000_000 + number)

    assert len(deadlines._heap) < 200
