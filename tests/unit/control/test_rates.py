"""Rates that templates ask for and sandboxes have, and rows from before there were any."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, insert

from emberbox.control.rates import given_rates, kept_rates
from emberbox.settings import Settings
from emberbox.store import sandboxes as rows
from emberbox.store.engine import Store
from emberbox.store.migrate import migrate, revision
from emberbox.store.records import TeamRecord, values
from emberbox.store.tables import sandboxes
from emberbox.store.teams import add_team
from tests.unit.control.test_states import sandbox

NONE = {"disk_mb_per_second": 0, "disk_operations_per_second": 0, "network_mbit_per_second": 0}


def test_a_template_that_says_nothing_gets_what_the_installation_gives() -> None:
    settings = Settings(default_disk_mb_per_second=50, default_network_mbit_per_second=100)

    assert given_rates({}, Settings()) == NONE
    assert given_rates({}, settings) == {**NONE, "disk_mb_per_second": 50, "network_mbit_per_second": 100}
    assert given_rates({"disk_mb_per_second": 5, "network_mbit_per_second": 0}, settings) == {
        **NONE,
        "disk_mb_per_second": 5,
    }


def test_nothing_gets_more_than_the_ceilings() -> None:
    settings = Settings(default_disk_mb_per_second=50, max_disk_mb_per_second=20, max_network_mbit_per_second=100)

    assert given_rates({}, settings) == {**NONE, "disk_mb_per_second": 20, "network_mbit_per_second": 100}
    assert given_rates({"disk_mb_per_second": 0, "network_mbit_per_second": 500}, settings) == {
        **NONE,
        "disk_mb_per_second": 20,
        "network_mbit_per_second": 100,
    }
    assert given_rates({"disk_mb_per_second": 5, "disk_operations_per_second": 7}, settings) == {
        "disk_mb_per_second": 5,
        "disk_operations_per_second": 7,
        "network_mbit_per_second": 100,
    }


def test_a_snapshot_keeps_what_its_sandbox_had_whatever_the_installation_gives_by_then() -> None:
    later = Settings(default_disk_mb_per_second=1, default_network_mbit_per_second=1)
    had = given_rates({"disk_mb_per_second": 5}, Settings())

    assert given_rates(kept_rates(had), later) == had
    assert given_rates(kept_rates({}), later) == NONE


async def test_rows_from_before_there_were_rates_are_kept(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/a.db")
    old = {name: value for name, value in values(sandbox("i1", "team")).items() if name != "rates"}
    try:
        async with store.write() as connection:
            await connection.run_sync(_up_to_0002)
        await add_team(store, TeamRecord("team", "Team", "team", True, 9, 9, 9, 9, 0))
        async with store.write() as connection:
            await connection.execute(insert(sandboxes).values(**old))
        before = await revision(store)

        await migrate(store)

        found = await rows.get(store, "i1")
    finally:
        await store.close()
    assert before == "0002"
    assert found == sandbox("i1", "team")
    assert found.rates == {}


def _up_to_0002(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "emberbox.store:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "0002")
