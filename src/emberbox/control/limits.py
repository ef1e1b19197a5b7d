"""What a team may use: request rate, sandboxes at once, time-outs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from emberbox.control.errors import Invalid, TooMany
from emberbox.store.errors import KeyLimitReached, SandboxLimitReached
from emberbox.store.records import TeamRecord


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class RateLimits:
    """A token bucket a team: `rate_per_second` requests, `rate_burst` of them at once. In this process only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def forget(self) -> None:
        """Fill every bucket."""
        self._buckets.clear()

    def take(self, team: TeamRecord) -> None:
        """Count one request.

        Raises:
            TooMany: the bucket is empty; `retry_after` says when there is a token again.
        """
        if team.rate_per_second <= 0:
            return
        now = self._clock()
        bucket = self._buckets.get(team.id)
        if bucket is None:
            bucket = self._buckets[team.id] = _Bucket(float(team.rate_burst), now)
        elapsed = max(0.0, now - bucket.filled_at)
        bucket.tokens = min(float(team.rate_burst), bucket.tokens + elapsed * team.rate_per_second)
        bucket.filled_at = now
        if bucket.tokens < 1:
            wait = math.ceil((1 - bucket.tokens) / team.rate_per_second)
            raise TooMany(
                f"more than {team.rate_per_second} requests a second; try again in {wait} s", retry_after=wait
            )
        bucket.tokens -= 1


def check_timeout(team: TeamRecord, seconds: int) -> None:
    """
    Raises:
        Invalid: the time-out is longer than the team may ask for.
    """
    if seconds > team.max_timeout_seconds:
        raise Invalid(
            f"timeout of {seconds} s is longer than the {team.max_timeout_seconds} s that the team may ask for"
        )


def sandbox_limit(error: SandboxLimitReached) -> TooMany:
    """The answer to a team that has all the sandboxes it may have. Waiting a moment rarely helps: not retried."""
    return TooMany(
        f"the team runs {error.limit} sandboxes, as many as it may; kill or pause one first",
        retry_after=5,
        should_retry=False,
    )


def key_limit(error: KeyLimitReached) -> TooMany:
    """The answer to a key that has made all the sandboxes it may have."""
    many = "1 sandbox" if error.limit == 1 else f"{error.limit} sandboxes"
    return TooMany(
        f"this API key may have {many} at once, running or paused; kill one first, or use another key",
        retry_after=5,
        should_retry=False,
    )
