"""First run and upkeep from the command line: the schema, the first team and key, keys, shipped templates.

Every function opens the store for itself and may run beside a live api process. Run them as the api user, or its
files end up belonging to somebody else. `python -m emberbox.control.bootstrap` does the first run and prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from emberbox.control.accounts import Accounts, NewCredential
from emberbox.control.errors import NotFound
from emberbox.control.tokens import SandboxTokens
from emberbox.logs import configure_logging
from emberbox.settings import Settings, get_settings
from emberbox.store.engine import Store
from emberbox.store.migrate import migrate
from emberbox.store.records import CredentialRecord, TeamRecord
from emberbox.store.teams import default_team

log = structlog.get_logger()

DEFAULT_TEAM = "default"


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    team_id: str
    api_key: str | None
    """The first API key, told once; None when there was a key already."""
    migrated: bool


async def bootstrap(settings: Settings) -> Bootstrapped:
    """Make the installation ready: directory, sandbox token key, schema, first team, first API key.

    Doing it again changes nothing.
    """
    settings.api_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    SandboxTokens.load(settings.api_dir / "secret.key")
    store = Store(settings.store_url)
    try:
        migrated = await migrate(store)
        accounts = Accounts(store, settings)
        team = await default_team(store) or await accounts.add_team("Default", DEFAULT_TEAM, is_default=True)
        first: NewCredential | None = None
        if not await accounts.credentials("api_key", None):
            first = await accounts.add_credential("api_key", team, "first key")
    finally:
        await store.close()
    _protect(settings)
    if migrated:
        log.info("store.migrated")
    return Bootstrapped(team.id, first.value if first else None, migrated)


async def create_key(settings: Settings, name: str, *, team: str = DEFAULT_TEAM) -> NewCredential:
    """A new API key. `value` is told this once.

    Args:
        team: a team's slug or ID.

    Raises:
        NotFound: no such team.
        Invalid: the name cannot be used.
    """
    async with _accounts(settings) as accounts:
        return await accounts.add_credential("api_key", await _team(accounts, team), name)


async def list_keys(settings: Settings, *, team: str | None = None) -> list[CredentialRecord]:
    """The API keys of a team, or of all.

    Raises:
        NotFound: no such team.
    """
    async with _accounts(settings) as accounts:
        return await accounts.credentials("api_key", await _team(accounts, team) if team else None)


async def delete_key(settings: Settings, key_id: str) -> None:
    """Delete an API key by its ID. A running api process notices within two seconds.

    Raises:
        NotFound: no such key.
    """
    async with _accounts(settings) as accounts:
        await accounts.delete("api_key", None, key_id)


async def create_access_token(settings: Settings, name: str, *, team: str = DEFAULT_TEAM) -> NewCredential:
    """A new access token (`Authorization: Bearer`), as older command lines use them. `value` is told this once."""
    async with _accounts(settings) as accounts:
        return await accounts.add_credential("access_token", await _team(accounts, team), name)


@asynccontextmanager
async def _accounts(settings: Settings) -> AsyncIterator[Accounts]:
    store = Store(settings.store_url)
    try:
        yield Accounts(store, settings)
    finally:
        await store.close()


async def _team(accounts: Accounts, wanted: str) -> TeamRecord:
    for team in await accounts.teams():
        if wanted in (team.slug, team.id):
            return team
    raise NotFound(f"team {wanted!r} was not found")


def _protect(settings: Settings) -> None:
    for path in settings.api_dir.glob("emberbox.db*"):
        with suppress(FileNotFoundError):  # a log that another process has just folded in
            os.chmod(path, 0o600)


def main() -> None:
    """First run; with `--new-key NAME` one more API key of the first team. Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m emberbox.control.bootstrap", description=main.__doc__)
    parser.add_argument("--new-key", metavar="NAME", help="make another API key of this name")
    name = parser.parse_args().new_key
    settings = get_settings()
    configure_logging("bootstrap", settings)
    print(json.dumps(asyncio.run(_run(settings, name))))


async def _run(settings: Settings, new_key: str | None) -> dict[str, Any]:
    made = asdict(await bootstrap(settings))
    if new_key is not None:
        made["api_key"] = (await create_key(settings, new_key)).value
    return made


if __name__ == "__main__":
    main()
