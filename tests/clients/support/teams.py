"""Another team beside the one whose key the tests have, and what that one may ask for.

`python -m tests.clients.support.teams DATA_DIR` makes a team where the database is, and prints it; with two numbers it
sets the first team's requests a second and their burst, and prints what they were. There is no public operation for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import update

from emberbox.control.accounts import Accounts
from emberbox.settings import Settings
from emberbox.store.engine import Store
from emberbox.store.tables import teams
from emberbox.store.teams import default_team

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


def set_request_rate(host: Host, per_second: int, burst: int) -> tuple[int, int]:
    """Limit the first team's requests; returns what it had. A restart with other settings does not change a team."""
    printed = host.module("tests.clients.support.teams", host.data_dir, str(per_second), str(burst))
    before = json.loads(printed.splitlines()[-1])
    return before["per_second"], before["burst"]


async def _set_rate(data_dir: Path, per_second: int, burst: int) -> dict[str, int]:
    store = Store(Settings(data_dir=data_dir).store_url)
    try:
        first = await default_team(store)
        assert first is not None
        changed = update(teams).where(teams.c.id == first.id).values(rate_per_second=per_second, rate_burst=burst)
        async with store.write() as connection:
            await connection.execute(changed)
        return {"per_second": first.rate_per_second, "burst": first.rate_burst}
    finally:
        await store.close()


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
    place, *rate = sys.argv[1:]
    if rate:
        print(json.dumps(asyncio.run(_set_rate(Path(place), *map(int, rate)))))
    else:
        print(json.dumps(asdict(asyncio.run(_make(Path(place))))))
