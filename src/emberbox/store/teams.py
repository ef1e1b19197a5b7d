"""Teams and their credentials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from emberbox.store.engine import Store
from emberbox.store.errors import DuplicateName
from emberbox.store.records import CredentialRecord, TeamRecord, fields, values
from emberbox.store.tables import access_tokens, api_keys, teams

CredentialKind = Literal["api_key", "access_token"]

_TABLES = {"api_key": api_keys, "access_token": access_tokens}
_BY_HASH = {
    kind: select(*(c.label(f"credential_{c.name}") for c in table.c), *(c.label(f"team_{c.name}") for c in teams.c))
    .join(teams, teams.c.id == table.c.team_id)
    .where(table.c.hash == bindparam("hash"))
    for kind, table in _TABLES.items()
}


async def add_team(store: Store, record: TeamRecord) -> None:
    """
    Raises:
        DuplicateName: another team has the slug.
    """
    try:
        async with store.write() as connection:
            await connection.execute(insert(teams).values(values(record)))
    except IntegrityError as error:
        raise DuplicateName(f"a team with the slug {record.slug!r} exists") from error


async def get_team(store: Store, team_id: str) -> TeamRecord | None:
    async with store.read() as connection:
        row = (await connection.execute(select(teams).where(teams.c.id == team_id))).first()
    return TeamRecord(**fields(row)) if row else None


async def list_teams(store: Store) -> list[TeamRecord]:
    async with store.read() as connection:
        rows = await connection.execute(select(teams).order_by(teams.c.created_at, teams.c.id))
        return [TeamRecord(**fields(row)) for row in rows]


async def default_team(store: Store) -> TeamRecord | None:
    """The first team, to which the templates that ship with Emberbox belong; None before it was made."""
    return next((team for team in await list_teams(store) if team.is_default), None)


async def add_credential(store: Store, kind: CredentialKind, record: CredentialRecord) -> None:
    await store.write_one(insert(_TABLES[kind]).values(values(record)))


async def find_credential(
    store: Store, kind: CredentialKind, hashed: str
) -> tuple[CredentialRecord, TeamRecord] | None:
    async with store.read() as connection:
        row = (await connection.execute(_BY_HASH[kind], {"hash": hashed})).first()
    if row is None:
        return None
    found = fields(row)
    return (
        CredentialRecord(**{c.name: found[f"credential_{c.name}"] for c in _TABLES[kind].c}),
        TeamRecord(**{c.name: found[f"team_{c.name}"] for c in teams.c}),
    )


async def list_credentials(store: Store, kind: CredentialKind, team_id: str | None) -> list[CredentialRecord]:
    table = _TABLES[kind]
    query = select(table).order_by(table.c.created_at, table.c.id)
    if team_id is not None:
        query = query.where(table.c.team_id == team_id)
    async with store.read() as connection:
        return [CredentialRecord(**fields(row)) for row in await connection.execute(query)]


async def rename_credential(store: Store, kind: CredentialKind, team_id: str, credential_id: str, name: str) -> bool:
    table = _TABLES[kind]
    async with store.write() as connection:
        result = await connection.execute(
            update(table).where(table.c.id == credential_id, table.c.team_id == team_id).values(name=name)
        )
    return result.rowcount > 0


async def delete_credential(
    store: Store, kind: CredentialKind, team_id: str | None, credential_id: str
) -> CredentialRecord | None:
    """The deleted credential, or None when there is none."""
    table = _TABLES[kind]
    statement = delete(table).where(table.c.id == credential_id).returning(*table.c)
    if team_id is not None:
        statement = statement.where(table.c.team_id == team_id)
    async with store.write() as connection:
        row = (await connection.execute(statement)).first()
    return CredentialRecord(**fields(row)) if row else None


async def touch_credentials(store: Store, kind: CredentialKind, used: Mapping[str, int]) -> None:
    """Record when credentials were last used: ID -> ms."""
    table = _TABLES[kind]
    statement = update(table).where(table.c.id == bindparam("credential")).values(last_used_at=bindparam("at"))
    await store.write_one(statement, [{"credential": key, "at": at} for key, at in used.items()])
