"""When a guest's idle memory is taken back, and that its balloon never stays full."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from emberbox.runtime.base import MIB
from emberbox.runtime.firecracker import balloon
from emberbox.runtime.firecracker.api import Firecracker
from emberbox.runtime.firecracker.balloon import Balloon
from emberbox.runtime.firecracker.errors import ApiError, ApiUnreachable

TOTAL = 1024 * MIB


class Guest:
    """A Firecracker whose process holds 800 MiB, of which the guest uses what `free` leaves of 1 GiB."""

    def __init__(self, free: int | None) -> None:
        self.free = free
        self.resident = 800 * MIB
        self.asked: list[int] = []
        self.fails: Exception | None = None
        self.slow: asyncio.Event | None = None
        self.emptied = 0

    async def free_memory(self) -> int | None:
        if self.fails is not None:
            raise self.fails
        return self.free

    async def set_balloon(self, *, amount_mb: int) -> None:
        self.asked.append(amount_mb)
        if not amount_mb:
            if self.slow is not None:
                await self.slow.wait()
            self.emptied += 1
        else:
            self.resident = min(self.resident, TOTAL - amount_mb * MIB)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(balloon, "_PAUSE_SECONDS", 0.0)


def balloon_of(guest: Guest) -> Balloon:
    return Balloon(cast(Firecracker, guest), "m1", lambda: guest.resident)


async def considered(tested: Balloon, guest: Guest) -> None:
    """Consider it once, and wait for what that started."""
    tested.consider(guest.resident, TOTAL)
    if tested._task is not None:
        await asyncio.wait({tested._task})


async def test_memory_that_the_guest_has_freed_is_given_back_and_the_balloon_is_empty_again() -> None:
    guest = Guest(free=900 * MIB)

    await considered(balloon_of(guest), guest)

    assert guest.asked == [876, 0]
    assert guest.resident == 148 * MIB


@pytest.mark.parametrize("free", [None, 200 * MIB, 240 * MIB])
def test_a_guest_that_uses_its_memory_or_says_nothing_is_left_alone(free: int | None) -> None:
    guest = Guest(free)

    asyncio.run(considered(balloon_of(guest), guest))

    assert guest.asked == []


async def test_a_machine_that_is_paused_meanwhile_is_not_saved_with_a_full_balloon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(balloon, "_LOOK_SECONDS", 60.0)
    guest = Guest(free=900 * MIB)
    tested = balloon_of(guest)
    tested.consider(guest.resident, TOTAL)
    while not guest.asked:
        await asyncio.sleep(0)

    await tested.hold()

    assert guest.asked == [876, 0]
    tested.consider(guest.resident, TOTAL)
    assert tested._task is None
    guest.resident = 800 * MIB
    monkeypatch.setattr(balloon, "_LOOK_SECONDS", 0.01)
    tested.release()
    await considered(tested, guest)
    assert guest.asked == [876, 0, 876, 0]


async def test_nobody_who_is_cancelled_leaves_the_balloon_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon, "_LOOK_SECONDS", 60.0)
    guest = Guest(free=900 * MIB)
    guest.slow = asyncio.Event()
    tested = balloon_of(guest)
    tested.consider(guest.resident, TOTAL)
    while not guest.asked:
        await asyncio.sleep(0)
    first = asyncio.create_task(tested.hold())
    while guest.asked != [876, 0]:  # then it is being emptied, slowly
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(tested.hold())
    await asyncio.sleep(0.01)
    assert not second.done()

    guest.slow.set()
    await second

    assert guest.emptied == 1


@pytest.mark.parametrize("error", [ApiError("GET", "/balloon/statistics", 400, "no device"), ApiUnreachable("busy")])
async def test_a_balloon_that_cannot_be_asked_is_not_asked_again_soon(error: Exception) -> None:
    guest = Guest(free=900 * MIB)
    guest.fails = error
    tested = balloon_of(guest)
    await considered(tested, guest)
    guest.fails = None

    await considered(tested, guest)

    assert guest.asked == []


async def test_little_memory_is_not_looked_at() -> None:
    guest = Guest(free=900 * MIB)
    guest.resident = 40 * MIB

    await considered(balloon_of(guest), guest)

    assert guest.asked == []
