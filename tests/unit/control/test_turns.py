"""Turns by key."""

from __future__ import annotations

import asyncio

from emberbox.control.turns import Turns


class Steps:
    """Work that can be held, and what of it has happened."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.held: dict[str, asyncio.Event] = {}

    async def take(self, name: str) -> None:
        self.seen.append(f"{name} began")
        if name in self.held:
            await self.held[name].wait()
        self.seen.append(f"{name} ended")


async def test_work_of_one_key_waits_for_what_came_before_and_not_for_that_of_others() -> None:
    turns, steps = Turns(8), Steps()
    steps.held["a1"] = asyncio.Event()
    for key, name in (("a", "a1"), ("a", "a2"), ("b", "b1")):
        turns.add(key, lambda name=name: steps.take(name))  # type: ignore[misc]

    async with asyncio.timeout(60):
        while "b1 ended" not in steps.seen:
            await asyncio.sleep(0)
    assert "a2 began" not in steps.seen
    steps.held["a1"].set()
    await turns.settled()

    assert [step for step in steps.seen if step.startswith("a")] == ["a1 began", "a1 ended", "a2 began", "a2 ended"]


async def test_no_more_than_the_bound_is_done_at_once() -> None:
    turns, steps = Turns(2), Steps()
    for name in ("one", "two", "three"):
        steps.held[name] = asyncio.Event()
        turns.add(name, lambda name=name: steps.take(name))  # type: ignore[misc]
    await asyncio.sleep(0.01)
    assert steps.seen == ["one began", "two began"]

    for event in steps.held.values():
        event.set()
    await turns.settled()

    assert len(steps.seen) == 6


async def test_work_that_fails_does_not_keep_the_next_from_its_turn() -> None:
    turns, steps = Turns(1), Steps()

    async def fail() -> None:
        raise ValueError("no")

    turns.add("a", fail)
    turns.add("a", lambda: steps.take("next"))
    await turns.settled()

    assert steps.seen == ["next began", "next ended"]


async def test_closing_ends_what_runs_and_what_waits() -> None:
    turns, steps = Turns(1), Steps()
    steps.held["one"] = asyncio.Event()
    turns.add("a", lambda: steps.take("one"))
    turns.add("a", lambda: steps.take("two"))
    await asyncio.sleep(0)

    async with asyncio.timeout(60):
        await turns.close()
        await turns.settled()

    assert "two began" not in steps.seen
    assert "one ended" not in steps.seen
