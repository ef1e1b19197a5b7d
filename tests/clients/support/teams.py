"""Another team beside the one whose key the tests have.

`python -m tests.clients.support.teams DATA_DIR` makes one where the database is, and prints it: there is no public
operation for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emberbox.control.accounts import Accounts
from emberbox.settings import Settings
from emberbox.store.engine import Store

if TYPE_CHECKING:
    from tests.clients.support.host import Host


@dataclass(frozen=True)
class OtherTeam:
    slug: str
    key: str


def new_team(host: Host) -> OtherTeam:
    printed = host.module("tests.clients.support.teams", host.data_dir)
    # The log's lines come first.
    return OtherTeam(**json.loads(printed.splitlines()[-1]))


async def _make(data_dir: Path) -> OtherTeam:
    settings = Settings(data_dir=data_dir)
    store = Store(settings.store_url)
    try:
        accounts = Accounts(store, settings)
        slug = f"other-{uuid.uuid4().hex[:8]}"
        team = await accounts.add_team("Other", slug)
        return OtherTeam(slug, (await accounts.add_credential("api_key", team, "test")).value)
    finally:
        await store.close()


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(_make(Path(sys.argv[1]))))))
