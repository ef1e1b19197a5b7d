"""Whose turn it is: builds wait here until there is room, and the tasks of those that run belong to this queue."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from emberbox.control.errors import TooMany

log = structlog.get_logger()

Work = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Job:
    build_id: str
    team_id: str
    work: Work


class BuildQueue:
    """Runs builds in the order in which they came, `at_once` in all and `per_team` of one team.

    A team whose builds all run does not hold up the others. The limits are this process's.
    """

    def __init__(self, *, at_once: int, per_team: int, waiting_per_team: int) -> None:
        self._at_once = at_once
        self._per_team = per_team
        self._waiting_per_team = waiting_per_team
        self._waiting: list[_Job] = []
        self._running: dict[str, tuple[_Job, asyncio.Task[None]]] = {}
        self._closed = False

    def check_room(self, team_id: str) -> None:
        """
        Raises:
            TooMany: as many builds of the team wait as may.
        """
        if sum(job.team_id == team_id for job in self._waiting) >= self._waiting_per_team:
            raise TooMany(
                f"{self._waiting_per_team} builds of the team are waiting already, as many as may; "
                "start this one when some have finished",
                retry_after=10,
                should_retry=False,
            )

    def add(self, build_id: str, team_id: str, work: Work, *, now: bool = False) -> None:
        """Have `work` done when it is its turn, or at once with `now` (one that was running already)."""
        job = _Job(build_id, team_id, work)
        if now:
            self._start(job)
            return
        self._waiting.append(job)
        self._fill()

    def running(self, build_id: str) -> asyncio.Task[None] | None:
        """The task of a build that runs."""
        entry = self._running.get(build_id)
        return entry[1] if entry else None

    @property
    def load(self) -> tuple[int, int]:
        """How many wait, and how many run."""
        return len(self._waiting), len(self._running)

    def build_ids(self) -> set[str]:
        """Builds that wait or run."""
        return {job.build_id for job in self._waiting} | set(self._running)

    async def remove(self, build_id: str) -> None:
        """Forget one that waits, end the task of one that runs."""
        self._waiting = [job for job in self._waiting if job.build_id != build_id]
        task = self.running(build_id)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """End every task; what their nodes do goes on there."""
        self._closed = True
        self._waiting = []
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _fill(self) -> None:
        busy = Counter(job.team_id for job, _ in self._running.values())
        still: list[_Job] = []
        for job in self._waiting:
            if self._closed or len(self._running) >= self._at_once or busy[job.team_id] >= self._per_team:
                still.append(job)
                continue
            busy[job.team_id] += 1
            self._start(job)
        self._waiting = still

    def _start(self, job: _Job) -> None:
        task = asyncio.ensure_future(job.work())
        self._running[job.build_id] = (job, task)
        task.add_done_callback(lambda done: self._ended(job, done))

    def _ended(self, job: _Job, task: asyncio.Task[None]) -> None:
        self._running.pop(job.build_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("build.task_ended", build_id=job.build_id, exc_info=error)
        self._fill()
