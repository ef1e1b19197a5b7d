"""Sandbox rows: inserted once, moved from state to state by compare-and-set, listed by page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    type_coerce,
    update,
)
from sqlalchemy import column as sql_column
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.dml import ReturningUpdate

from emberbox.store.engine import Store
from emberbox.store.errors import KeyLimitReached, SandboxLimitReached
from emberbox.store.records import SandboxRecord, fields, values
from emberbox.store.tables import sandboxes, teams, templates

_COUNTED = ("creating", "running", "pausing", "resuming")
"""States that count against the team's limit of concurrent sandboxes."""


@dataclass(frozen=True, slots=True)
class SandboxFilter:
    """Which sandboxes a list shows. `states` are states of the table, not of the API."""

    team_id: str
    states: tuple[str, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    template_ids: tuple[str, ...] | None = None
    started_after: int | None = None


class IdempotencyKeyUsed(Exception):
    """Another sandbox of the team carries this idempotency key."""


_count_live = (
    select(func.count())
    .select_from(sandboxes)
    .where(sandboxes.c.team_id == bindparam("team"), sandboxes.c.state.in_(_COUNTED))
)
_count_of_key = (
    select(func.count())
    .select_from(sandboxes)
    .where(sandboxes.c.api_key_id == bindparam("key"), sandboxes.c.state.in_((*_COUNTED, "paused")))
)
_lock_team = select(teams.c.id).where(teams.c.id == bindparam("team")).with_for_update()
_insert = insert(sandboxes)
_spawned = (
    update(templates)
    .where(templates.c.id == bindparam("template"))
    .values(spawn_count=templates.c.spawn_count + bindparam("many"), last_spawned_at=bindparam("at"))
)
_by_id = select(sandboxes).where(sandboxes.c.id == bindparam("sandbox_id"))


async def add(store: Store, records: Sequence[SandboxRecord], *, limit: int, key_limit: int | None = None) -> None:
    """Insert sandboxes of one team, template and key, all or none.

    Raises:
        SandboxLimitReached: the team would have more than `limit` sandboxes that run.
        KeyLimitReached: the key would have more than `key_limit` sandboxes that run or are paused.
        IdempotencyKeyUsed: the team has used the key before.
    """
    first = records[0]
    async with store.write() as connection:
        if not store.is_sqlite:
            # Counting and inserting must not interleave with another create of the same team.
            await connection.execute(_lock_team, {"team": first.team_id})
        # Before counting: a create that is repeated is no further sandbox, whatever the limits say.
        try:
            await connection.execute(_insert, [values(record) for record in records])
        except IntegrityError as error:
            if first.idempotency_key is not None:
                raise IdempotencyKeyUsed from error
            raise
        if (await connection.execute(_count_live, {"team": first.team_id})).scalar_one() > limit:
            raise SandboxLimitReached(limit)
        if (
            key_limit is not None
            and (await connection.execute(_count_of_key, {"key": first.api_key_id})).scalar_one() > key_limit
        ):
            raise KeyLimitReached(key_limit)
        await connection.execute(
            _spawned, {"template": first.template_id, "many": len(records), "at": first.started_at}
        )


async def get(store: Store, sandbox_id: str) -> SandboxRecord | None:
    async with store.read() as connection:
        row = (await connection.execute(_by_id, {"sandbox_id": sandbox_id})).first()
    return SandboxRecord(**fields(row)) if row else None


async def by_idempotency_key(store: Store, team_id: str, key: str) -> SandboxRecord | None:
    query = select(sandboxes).where(sandboxes.c.team_id == team_id, sandboxes.c.idempotency_key == key)
    async with store.read() as connection:
        row = (await connection.execute(query)).first()
    return SandboxRecord(**fields(row)) if row else None


async def move(
    store: Store,
    sandbox_id: str,
    *,
    transitions: Mapping[str, str],
    team_id: str | None = None,
    changes: Mapping[str, Any],
) -> SandboxRecord | None:
    """Move a sandbox from the state it has to the one that `transitions` names for it, in one transaction.

    Args:
        transitions: state -> next state; the same one for all.
        team_id: only when the sandbox belongs to this team.
        changes: further columns to set.

    Returns:
        The sandbox after the move, or None when there is none in one of the states.
    """
    statement, parameters = _moving(sandbox_id, transitions, team_id, changes)
    row = (await store.write_one(statement, parameters)).first()
    return SandboxRecord(**fields(row)) if row else None


def _moving(
    sandbox_id: str, transitions: Mapping[str, str], team_id: str | None, changes: Mapping[str, Any]
) -> tuple[ReturningUpdate[Any], dict[str, Any]]:
    (next_state,) = set(transitions.values())
    statement = _update(tuple(transitions), next_state, tuple(changes), team_id is not None)
    parameters = {f"new_{name}": value for name, value in changes.items()}
    return statement, {"of_sandbox": sandbox_id, "of_team": team_id, **parameters}


@lru_cache(maxsize=256)
def _update(
    states: tuple[str, ...], next_state: str | None, columns: tuple[str, ...], of_team: bool
) -> ReturningUpdate[Any]:
    """Setting columns of a sandbox in one of `states`: there are few of these, and each is made once."""
    conditions = [sandboxes.c.id == bindparam("of_sandbox"), sandboxes.c.state.in_(states)]
    if of_team:
        conditions.append(sandboxes.c.team_id == bindparam("of_team"))
    values = {name: bindparam(f"new_{name}", type_=sandboxes.c[name].type) for name in columns}
    if next_state is not None:
        values["state"] = bindparam("new_state", next_state)
    return update(sandboxes).where(*conditions).values(values).returning(*sandboxes.c)


async def move_counted(
    store: Store,
    sandbox_id: str,
    *,
    team_id: str,
    limit: int,
    transitions: Mapping[str, str],
    changes: Mapping[str, Any],
) -> SandboxRecord | None:
    """`move` into a state that counts against the team's limit.

    Raises:
        SandboxLimitReached: the team would have more than `limit` sandboxes that run.
    """
    async with store.write() as connection:
        if not store.is_sqlite:
            await connection.execute(_lock_team, {"team": team_id})
        statement, parameters = _moving(sandbox_id, transitions, team_id, changes)
        moved = (await connection.execute(statement, parameters)).first()
        if moved is not None and (await connection.execute(_count_live, {"team": team_id})).scalar_one() > limit:
            raise SandboxLimitReached(limit)
    return SandboxRecord(**fields(moved)) if moved else None


async def change(
    store: Store, sandbox_id: str, *, states: Iterable[str], changes: Mapping[str, Any]
) -> SandboxRecord | None:
    """Set columns of a sandbox that is in one of `states`, leaving its state alone."""
    parameters = {f"new_{name}": value for name, value in changes.items()}
    statement = _update(tuple(states), None, tuple(changes), False)
    row = (await store.write_one(statement, {"of_sandbox": sandbox_id, **parameters})).first()
    return SandboxRecord(**fields(row)) if row else None


async def page(
    store: Store,
    wanted: SandboxFilter,
    *,
    limit: int,
    descending: bool,
    after: tuple[int, str] | None,
) -> list[SandboxRecord]:
    """Sandboxes by start time (then ID), at most `limit`, those after the position `after`."""
    order = (sandboxes.c.started_at, sandboxes.c.id)
    query = select(sandboxes).where(*_conditions(store, wanted))
    if after is not None:
        at, last_id = after
        beyond = sandboxes.c.started_at < at if descending else sandboxes.c.started_at > at
        beyond_id = sandboxes.c.id < last_id if descending else sandboxes.c.id > last_id
        query = query.where(or_(beyond, and_(sandboxes.c.started_at == at, beyond_id)))
    query = query.order_by(*(c.desc() if descending else c.asc() for c in order)).limit(limit)
    return await _records(store, query)


async def count(store: Store, wanted: SandboxFilter) -> int:
    query = select(func.count()).select_from(sandboxes).where(*_conditions(store, wanted))
    async with store.read() as connection:
        return int((await connection.execute(query)).scalar_one())


async def live(store: Store, *, node_id: str | None = None, team_id: str | None = None) -> list[SandboxRecord]:
    """Every sandbox that has not ended."""
    query = select(sandboxes).where(sandboxes.c.state != "ended")
    if node_id is not None:
        query = query.where(sandboxes.c.node_id == node_id)
    if team_id is not None:
        query = query.where(sandboxes.c.team_id == team_id)
    return await _records(store, query)


async def by_state(store: Store, states: Iterable[str], *, node_id: str | None = None) -> list[SandboxRecord]:
    query = select(sandboxes).where(sandboxes.c.state.in_(list(states)))
    if node_id is not None:
        query = query.where(sandboxes.c.node_id == node_id)
    return await _records(store, query)


async def owned(store: Store, team_id: str, ids: Iterable[str]) -> set[str]:
    """Those of `ids` that are sandboxes of the team, ended or not."""
    query = select(sandboxes.c.id).where(sandboxes.c.team_id == team_id, sandboxes.c.id.in_(list(ids)))
    async with store.read() as connection:
        return set((await connection.execute(query)).scalars())


async def counts_by_state(store: Store) -> dict[str, int]:
    query = select(sandboxes.c.state, func.count()).where(sandboxes.c.state != "ended").group_by(sandboxes.c.state)
    async with store.read() as connection:
        return {row[0]: row[1] for row in await connection.execute(query)}


async def running_by_team(store: Store) -> dict[str, int]:
    query = (
        select(sandboxes.c.team_id, func.count()).where(sandboxes.c.state == "running").group_by(sandboxes.c.team_id)
    )
    async with store.read() as connection:
        return {row[0]: row[1] for row in await connection.execute(query)}


async def forget_ended(store: Store, before_ms: int) -> int:
    """Remove sandboxes that ended before `before_ms`; returns how many."""
    result = await store.write_one(
        delete(sandboxes).where(sandboxes.c.state == "ended", sandboxes.c.ended_at < before_ms)
    )
    return result.rowcount


async def _records(store: Store, query: Select[Any]) -> list[SandboxRecord]:
    async with store.read() as connection:
        return [SandboxRecord(**fields(row)) for row in await connection.execute(query)]


def _conditions(store: Store, wanted: SandboxFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [
        sandboxes.c.team_id == wanted.team_id,
        sandboxes.c.state.in_(wanted.states),
    ]
    if wanted.template_ids is not None:
        conditions.append(sandboxes.c.template_id.in_(wanted.template_ids))
    if wanted.started_after is not None:
        conditions.append(sandboxes.c.started_at >= wanted.started_after)
    if wanted.metadata:
        conditions.append(_metadata_has(store, wanted.metadata))
    return conditions


def _metadata_has(store: Store, pairs: tuple[tuple[str, str], ...]) -> ColumnElement[bool]:
    if not store.is_sqlite:
        from sqlalchemy.dialects.postgresql import JSONB

        return type_coerce(sandboxes.c.metadata, JSONB).contains(dict(pairs))
    matches: list[ColumnElement[bool]] = []
    for number, (key, value) in enumerate(pairs):
        entry = func.json_each(sandboxes.c.metadata).table_valued(
            sql_column("key"), sql_column("value"), name=f"entry_{number}"
        )
        matches.append(
            exists(select(literal_column("1")).select_from(entry).where(entry.c.key == key, entry.c.value == value))
        )
    return and_(*matches)
