"""Another team beside the one whose key the tests have."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from emberbox.control.accounts import Accounts
from emberbox.settings import Settings
from emberbox.store.engine import Store
from tests.clients.support.instance import Emberbox


@dataclass(frozen=True)
class OtherTeam:
    slug: str
    key: str


async def new_team(emberbox: Emberbox) -> OtherTeam:
    """Teams are made where the database is; there is no public operation for it."""
    settings = Settings(data_dir=Path(emberbox.data_dir or ""))
    store = Store(settings.store_url)
    try:
        accounts = Accounts(store, settings)
        slug = f"other-{uuid.uuid4().hex[:8]}"
        team = await accounts.add_team("Other", slug)
        return OtherTeam(slug, (await accounts.add_credential("api_key", team, "test")).value)
    finally:
        await store.close()
