"""Metrics over time: recorded from the nodes' samples, read for sandboxes and teams."""

from __future__ import annotations

from emberbox.control.clock import now_ms
from emberbox.control.errors import Invalid
from emberbox.control.plane import Plane
from emberbox.control.sandboxes import is_sandbox_id, sandbox_not_found
from emberbox.store import metrics as rows
from emberbox.store import sandboxes as sandbox_rows
from emberbox.store.records import MetricRecord, TeamMetricRecord, TeamRecord
from emberbox.wire import node_pb2 as pb

_MOST_SAMPLES = 20_000
"""More than 24 h of samples every 5 s."""


class Metrics:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._last_ms = now_ms()
        self._teams_before: set[str] = set()

    async def record(self, samples: pb.Samples) -> None:
        """Store one event of a node, and where its teams stand, in one transaction."""
        now, since = now_ms(), self._last_ms
        self._last_ms = now
        store = self._plane.store
        running = await sandbox_rows.running_by_team(store)
        started = await rows.started_since(store, since)
        # A team that has nothing any more gets one last sample of zero.
        teams = running.keys() | started.keys() | self._teams_before
        self._teams_before = set(running.keys() | started.keys())
        seconds = max((now - since) / 1000, 0.001)
        await rows.add(
            store,
            [
                MetricRecord(
                    sandbox_id=sample.sandbox_id,
                    timestamp_ms=sample.timestamp_unix_ms,
                    cpu_count=sample.cpu_count,
                    cpu_used_percent=sample.cpu_used_percent,
                    memory_used=sample.memory_used_bytes,
                    memory_total=sample.memory_total_bytes,
                    memory_cache=sample.memory_cache_bytes,
                    disk_used=sample.disk_used_bytes,
                    disk_total=sample.disk_total_bytes,
                )
                for sample in samples.samples
            ],
            [
                TeamMetricRecord(
                    team_id=team,
                    timestamp_ms=now,
                    concurrent_sandboxes=running.get(team, 0),
                    sandbox_start_rate=started.get(team, 0) / seconds,
                )
                for team in teams
            ],
        )

    async def of_sandbox(
        self, team: TeamRecord, sandbox_id: str, *, start: int | None, end: int | None
    ) -> list[MetricRecord]:
        """Samples of a sandbox, ended ones too while their row is kept. Times are unix seconds.

        Raises:
            NotFound: no such sandbox.
            Invalid: the interval ends before it starts.
        """
        if not is_sandbox_id(sandbox_id) or not await sandbox_rows.owned(self._plane.store, team.id, [sandbox_id]):
            raise sandbox_not_found(sandbox_id)
        start_ms, end_ms = self._interval(start, end)
        return await rows.of_sandbox(
            self._plane.store, sandbox_id, start_ms=start_ms, end_ms=end_ms, limit=_MOST_SAMPLES
        )

    async def newest(self, team: TeamRecord, sandbox_ids: list[str]) -> list[MetricRecord]:
        """The newest sample of each of the team's sandboxes among `sandbox_ids`."""
        ids = [sandbox_id for sandbox_id in sandbox_ids if is_sandbox_id(sandbox_id)]
        owned = await sandbox_rows.owned(self._plane.store, team.id, ids)
        return await rows.newest(self._plane.store, owned)

    async def of_team(self, team: TeamRecord, *, start: int | None, end: int | None) -> list[TeamMetricRecord]:
        start_ms, end_ms = self._interval(start, end)
        return await rows.of_team(self._plane.store, team.id, start_ms=start_ms, end_ms=end_ms, limit=_MOST_SAMPLES)

    async def team_maximum(
        self, team: TeamRecord, name: rows.TeamMetricName, *, start: int | None, end: int | None
    ) -> tuple[int, float]:
        """When (ms) the metric was greatest, and its value; the interval's end and 0 without samples."""
        start_ms, end_ms = self._interval(start, end)
        best = await rows.team_maximum(self._plane.store, team.id, name, start_ms=start_ms, end_ms=end_ms)
        if best is None:
            return end_ms, 0.0
        return best.timestamp_ms, float(getattr(best, name))

    async def running_by_team(self) -> dict[str, int]:
        """Team ID -> how many of its sandboxes run."""
        return await sandbox_rows.running_by_team(self._plane.store)

    def _interval(self, start: int | None, end: int | None) -> tuple[int, int]:
        now = now_ms()
        if start is not None and end is not None and start > end:
            raise Invalid(f"start {start} is after end {end}")
        end_ms = now if end is None else (end + 1) * 1000 - 1
        start_ms = now - self._plane.settings.metrics_keep_seconds * 1000 if start is None else start * 1000
        return start_ms, end_ms
