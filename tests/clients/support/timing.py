"""Time in tests, stretched by one setting on hosts that are slow (the lab)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

SCALE = float(os.environ.get("EMBERBOX_TEST_SCALE", "1"))


def seconds(n: float) -> float:
    """`n` seconds on an ordinary machine, as seconds on this one."""
    return n * SCALE


def whole_seconds(n: int) -> int:
    """Like `seconds`, for options that take whole seconds (a sandbox's timeout)."""
    return max(1, round(n * SCALE))


def eventually(check: Callable[[], T], *, within: float = 60, every: float = 0.05, what: str = "") -> T:
    """The first true value of `check`, asked again until `within` (unscaled seconds) has passed."""
    deadline = time.monotonic() + seconds(within)
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(
                f"did not happen within {seconds(within):g} s: {what or check!r}; last value {value!r}"
            )
        time.sleep(every)


async def eventually_async(
    check: Callable[[], Awaitable[T]], *, within: float = 60, every: float = 0.05, what: str = ""
) -> T:
    deadline = time.monotonic() + seconds(within)
    while True:
        value = await check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(
                f"did not happen within {seconds(within):g} s: {what or check!r}; last value {value!r}"
            )
        await asyncio.sleep(every)
