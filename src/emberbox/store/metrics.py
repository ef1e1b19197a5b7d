"""Samples of sandboxes and teams over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from sqlalchemy import and_, delete, func, select

from emberbox.store.engine import Store
from emberbox.store.records import MetricRecord, TeamMetricRecord, fields, values
from emberbox.store.tables import metrics, sandboxes, team_metrics

TeamMetricName = Literal["concurrent_sandboxes", "sandbox_start_rate"]


async def add(store: Store, samples: Sequence[MetricRecord], team_samples: Sequence[TeamMetricRecord]) -> None:
    """Insert samples, in one transaction. A sample that is there already (a node told it twice) is left alone."""
    async with store.write() as connection:
        if samples:
            statement = store.insert(metrics).on_conflict_do_nothing()
            await connection.execute(statement, [values(sample) for sample in samples])
        if team_samples:
            statement = store.insert(team_metrics).on_conflict_do_nothing()
            await connection.execute(statement, [values(sample) for sample in team_samples])


async def of_sandbox(store: Store, sandbox_id: str, *, start_ms: int, end_ms: int, limit: int) -> list[MetricRecord]:
    """Samples of an interval, oldest first; the newest `limit` of them."""
    query = (
        select(metrics)
        .where(metrics.c.sandbox_id == sandbox_id, metrics.c.timestamp_ms.between(start_ms, end_ms))
        .order_by(metrics.c.timestamp_ms.desc())
        .limit(limit)
    )
    async with store.read() as connection:
        return [MetricRecord(**fields(row)) for row in await connection.execute(query)][::-1]


async def newest(store: Store, sandbox_ids: Iterable[str]) -> list[MetricRecord]:
    """The newest sample of each sandbox that has one."""
    last = (
        select(metrics.c.sandbox_id, func.max(metrics.c.timestamp_ms).label("at"))
        .where(metrics.c.sandbox_id.in_(list(sandbox_ids)))
        .group_by(metrics.c.sandbox_id)
        .subquery()
    )
    query = select(metrics).join(
        last, and_(metrics.c.sandbox_id == last.c.sandbox_id, metrics.c.timestamp_ms == last.c.at)
    )
    async with store.read() as connection:
        return [MetricRecord(**fields(row)) for row in await connection.execute(query)]


async def started_since(store: Store, since_ms: int) -> dict[str, int]:
    """Team ID -> how many of its sandboxes were started after `since_ms`."""
    query = (
        select(sandboxes.c.team_id, func.count()).where(sandboxes.c.started_at > since_ms).group_by(sandboxes.c.team_id)
    )
    async with store.read() as connection:
        return {row[0]: row[1] for row in await connection.execute(query)}


async def of_team(store: Store, team_id: str, *, start_ms: int, end_ms: int, limit: int) -> list[TeamMetricRecord]:
    """Samples of an interval, oldest first; the newest `limit` of them."""
    query = (
        select(team_metrics)
        .where(team_metrics.c.team_id == team_id, team_metrics.c.timestamp_ms.between(start_ms, end_ms))
        .order_by(team_metrics.c.timestamp_ms.desc())
        .limit(limit)
    )
    async with store.read() as connection:
        return [TeamMetricRecord(**fields(row)) for row in await connection.execute(query)][::-1]


async def team_maximum(
    store: Store, team_id: str, name: TeamMetricName, *, start_ms: int, end_ms: int
) -> TeamMetricRecord | None:
    """The sample of an interval in which the metric was greatest; the latest of equals."""
    query = (
        select(team_metrics)
        .where(team_metrics.c.team_id == team_id, team_metrics.c.timestamp_ms.between(start_ms, end_ms))
        .order_by(team_metrics.c[name].desc(), team_metrics.c.timestamp_ms.desc())
        .limit(1)
    )
    async with store.read() as connection:
        row = (await connection.execute(query)).first()
    return TeamMetricRecord(**fields(row)) if row else None


async def forget(store: Store, before_ms: int) -> int:
    """Remove samples older than `before_ms`; returns how many."""
    async with store.write() as connection:
        removed = (await connection.execute(delete(metrics).where(metrics.c.timestamp_ms < before_ms))).rowcount
        removed += (
            await connection.execute(delete(team_metrics).where(team_metrics.c.timestamp_ms < before_ms))
        ).rowcount
    return removed
