"""Following a build: from any position, while it runs and after its end."""

from __future__ import annotations

import asyncio

import pytest

from emberbox.node.building.journal import Journal, LineCutter
from emberbox.node.building.model import BuildEvent, Failed, LogLines, Progress
from emberbox.node.errors import NodeBusy

END = Failed("it failed", "1")


async def events(journal: Journal, position: int = 0) -> list[BuildEvent]:
    return [event async for event in journal.follow(position)]


def messages(found: list[BuildEvent]) -> list[tuple[int, str]]:
    lines = (line for event in found if isinstance(event, LogLines) for line in event.lines)
    return [(line.position, line.message) for line in lines]


async def test_a_follower_sees_what_was_and_what_comes_until_the_end() -> None:
    journal = Journal()
    journal.log("one")
    following = asyncio.create_task(events(journal))
    await asyncio.sleep(0)

    journal.step = "1"
    journal.log("two", "warn")
    journal.progress("half", 0.5)
    await asyncio.sleep(0)
    journal.log("three")
    journal.end(END)

    found = await following
    assert messages(found) == [(0, "one"), (1, "two"), (2, "three")]
    assert Progress("half", 0.5) in found
    assert found[-1] == END


@pytest.mark.parametrize("position", [0, 1, 700, 1499, 1500, 9999])
async def test_following_again_repeats_nothing_and_leaves_nothing_out(position: int) -> None:
    journal = Journal()
    for number in range(1500):
        journal.log(str(number))
    journal.end(END)

    found = await events(journal, position)

    assert [message for message, _ in messages(found)] == list(range(position, 1500))
    assert found[-1] == END


async def test_long_lines_come_a_few_at_a_time() -> None:
    journal = Journal()
    for _ in range(200):
        journal.log("x" * 8000)
    journal.end(END)

    sizes = [len(event.lines) for event in await events(journal) if isinstance(event, LogLines)]

    assert sum(sizes) == 200
    assert max(sizes) == 25


async def test_positions_count_on_when_old_lines_were_dropped() -> None:
    journal = Journal(kept_bytes=2200)
    for number in range(50):
        journal.log(f"line {number:04}")
    journal.end(END)

    found = messages(await events(journal))

    assert found[-1] == (49, "line 0049")
    assert found[0][0] == 50 - len(found)
    assert 9 <= len(found) <= 10


async def test_one_that_writes_fast_waits_for_those_who_follow() -> None:
    journal = Journal(kept_bytes=12_000 * 210)
    following = asyncio.create_task(events(journal))
    await asyncio.sleep(0)

    for number in range(40_000):
        journal.log(str(number))
        if number % 500 == 0:
            await journal.settle()
    journal.end(END)

    assert [message for message, _ in messages(await following)] == list(range(40_000))


async def test_one_that_writes_fast_does_not_wait_when_nobody_follows() -> None:
    journal = Journal()
    for number in range(20_000):
        journal.log(str(number))

    await asyncio.wait_for(journal.settle(), timeout=60)


async def test_only_the_first_end_counts() -> None:
    journal = Journal()
    journal.end(END)
    journal.end(Failed("another", "2"))

    assert await events(journal) == [END]


async def test_followers_are_told_when_the_node_stops() -> None:
    journal = Journal()
    following = asyncio.create_task(events(journal))
    await asyncio.sleep(0)

    journal.close()

    with pytest.raises(NodeBusy):
        await following


def test_output_is_cut_into_lines_wherever_it_is_split() -> None:
    cutter = LineCutter()

    lines = cutter.feed(b"one\ntw") + cutter.feed(b"o\r\n 10%\r 20%\r\n\xff\n") + cutter.feed("ü".encode()[:1])

    assert lines == ["one", "two", " 10%", " 20%", "\ufffd"]
    assert cutter.feed("ü".encode()[1:]) + cutter.rest() == ["ü"]
    assert cutter.rest() == []


def test_a_line_without_end_is_cut() -> None:
    cutter = LineCutter()

    assert [len(line) for line in cutter.feed(b"x" * 10_000)] == [10_000]
    assert cutter.rest() == []
