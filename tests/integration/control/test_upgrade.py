"""A database that an earlier version has filled, brought to the current schema and served."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection

from emberbox.store import sandboxes, templates
from emberbox.store.engine import Store
from emberbox.store.migrate import HEAD, revision
from emberbox.wire import node_pb2 as pb
from tests.support.control import made_world
from tests.unit.control.test_rates import NONE

KEY = "e2b_4db107b74bb0c25036dbfc0f8dda123435d4fe4e"
TEMPLATE, SANDBOX = "xmtiv6uz2p5g9qmzf8td", "izviqqndiwyewfrdm4un"
BUILD, SNAPSHOT_BUILD = "3f3db5d6-0ce3-4995-8ffb-f0ee6ab656df", "b7a0fd0a-8a57-4d0c-8f53-3f5f6b1fb1d4"
SNAPSHOT, SAVED = "q3w8z1rk6y0d4n7tb2mc", "h5n2wqk0c7t9x3v8m1ba"
END_AT = 4_102_444_800_000

FIRST = f"""
INSERT INTO teams VALUES ('905a7074-a95f-468c-9275-d2d2a8d8c671', 'Default', 'default', TRUE, 200, 86400, 100, 300,
    1795701761767);
INSERT INTO api_keys VALUES ('bf383776-264b-4b42-a65c-c5a18a1112c7', '905a7074-a95f-468c-9275-d2d2a8d8c671',
    'first key', '56d6f21e5d69d2d4c2e79419641d891dd0663b4befc459ff760afe5e704f4e89', 'e2b_', 40, '4db1', 'fe4e',
    'null', 1795701761787, 1795701762064);
INSERT INTO nodes VALUES ('fake-node', 'unix:/var/lib/emberbox/run/node.sock', 'ready', 1795701761896,
    '1c623ce3-e0b7-4a33-b25f-c84010f59042', 'container', FALSE, '0.0.0', 1795701761896);
INSERT INTO templates VALUES ('{TEMPLATE}', '905a7074-a95f-468c-9275-d2d2a8d8c671', 'template', TRUE, TRUE, NULL,
    1795701761908, 1795701761908, 1795701762084, 1);
INSERT INTO template_aliases VALUES ('default', 'base', '{TEMPLATE}');
INSERT INTO template_builds VALUES ('{BUILD}', '{TEMPLATE}', 'ready', 2, 1024, 10240,
    '["{"ab" * 32}"]', '{{}}', '', '', '', '', NULL, NULL, 'fake-node', NULL, 4096, '0.1',
    '{{"recipe": "base", "tags": ["default"], "team_id": "905a7074-a95f-468c-9275-d2d2a8d8c671"}}', 'null', NULL,
    1795701761907, 1795701761933, 1795701761933);
INSERT INTO template_tags VALUES ('905eebba-3885-48f4-9dce-db79f5dbb684', '{TEMPLATE}', 'default',
    '{BUILD}', 1795701761933);
INSERT INTO build_logs VALUES ('{BUILD}', 0, 1795701761932, 'info', 'one', 'base');
INSERT INTO sandboxes VALUES ('{SANDBOX}', '905a7074-a95f-468c-9275-d2d2a8d8c671', '{TEMPLATE}',
    '{BUILD}', 'base', 'running', 1795701762096, NULL, 'fake-node', '198.18.0.3', 2, 1024,
    10240, '0.1', '{{"user": "abc"}}', TRUE, NULL, '{{}}', '[]', FALSE, TRUE, FALSE, 600, 1795701762084, {END_AT},
    NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO templates VALUES ('{SNAPSHOT}', '905a7074-a95f-468c-9275-d2d2a8d8c671', 'snapshot', FALSE, FALSE, NULL,
    1795701763000, 1795701763000, NULL, 0);
INSERT INTO template_builds VALUES ('{SNAPSHOT_BUILD}', '{SNAPSHOT}', 'ready', 2, 1024, 10240, '[]', '{{}}', '', '',
    '', '', '{SAVED}', TRUE, 'fake-node', '{SANDBOX}', 4096, '0.1',
    '{{"snapshot_of": "{SANDBOX}", "memory": true}}', 'null', NULL, 1795701763000, 1795701763001, 1795701763001);
INSERT INTO template_tags VALUES ('0c1d6c0e-57f0-4f0e-9d5b-6f8d41f6a3c2', '{SNAPSHOT}', 'default', '{SNAPSHOT_BUILD}',
    1795701763001);
"""
"""Rows as the first version has written them: a first run, a sandbox created from `base` in it, and its snapshot."""


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/emberbox.db"


async def filled(url: str, at: str, rows: str) -> None:
    """Make a database of the revision `at` with these rows."""

    def fill(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "emberbox.store:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, at)
        for statement in rows.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)

    store = Store(url)
    try:
        async with store.write() as connection:
            await connection.run_sync(fill)
        assert await revision(store) == at
    finally:
        await store.close()


async def test_a_database_of_the_first_version_is_upgraded_and_goes_on(database_url: str) -> None:
    await filled(database_url, "0001", FIRST)
    machine = pb.CreateRequest(sandbox_id=SANDBOX, template_id=TEMPLATE, deadline_unix_ms=END_AT)

    async with made_world(database_url=database_url) as world:
        world.node._start(machine)
        async with world.serving():
            await world.ready()
            assert await revision(world.control.store) == HEAD
            record = await sandboxes.get(world.control.store, SANDBOX)
            async with world.client_with(X_API_Key=KEY) as old:
                keys = {key["name"]: key for key in (await old.get("/api-keys")).json()}
                listed = (await old.get("/v2/sandboxes")).json()
                detail = (await old.get(f"/sandboxes/{SANDBOX}")).json()
                made = [await old.post("/v2/sandboxes", json={"templateID": name}) for name in ("base", TEMPLATE)]
                builds = (await old.get("/templates/base")).json()["builds"]
                limited = await old.post("/api-keys", json={"name": "new", "scopes": ["templates"], "sandboxLimit": 1})
                killed = await old.delete(f"/sandboxes/{SANDBOX}")

    assert record is not None
    assert record.api_key_id is None
    assert not {"scopes", "sandboxLimit"} & set(keys["first key"])
    assert [(one["sandboxID"], one["state"], one["metadata"]) for one in listed] == [
        (SANDBOX, "running", {"user": "abc"})
    ]
    assert detail["envdAccessToken"]
    assert detail["templateID"] == TEMPLATE
    assert [answer.status_code for answer in made] == [201, 201]
    # Of which recipe the old one was made is not known.
    assert [build["status"] for build in builds] == ["ready", "ready"]
    assert [build.recipe for build in world.node.builds] == ["base"]
    assert limited.json()["scopes"] == ["templates"]
    assert killed.status_code == 204
    assert SANDBOX not in world.node.machines


async def test_a_snapshot_from_before_there_were_rates_has_none_and_a_template_has_the_installations(
    database_url: str,
) -> None:
    await filled(database_url, "0001", FIRST)

    async with made_world(database_url=database_url, default_disk_mb_per_second=50) as world, world.serving():
        world.node.snapshots[SAVED] = pb.SnapshotStatus(snapshot_id=SAVED, memory_kept=True)
        await world.ready()
        builds = [await templates.get_build(world.control.store, build_id) for build_id in (BUILD, SNAPSHOT_BUILD)]
        async with world.client_with(X_API_Key=KEY) as client:
            made = [await client.post("/v2/sandboxes", json={"templateID": name}) for name in (TEMPLATE, SNAPSHOT)]
        asked = [world.node.machines[one.json()["sandboxID"]].request.rates.disk_mb_per_second for one in made]

    assert [build.rates for build in builds if build] == [{}, NONE]
    assert asked == [50, 0]


def test_two_processes_may_open_and_migrate_a_new_file_at_once(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from emberbox.store.engine import Store\n"
        "from emberbox.store.migrate import migrate, revision\n"
        "async def main():\n"
        "    sys.stdin.readline()\n"
        "    store = Store(sys.argv[1])\n"
        "    await migrate(store)\n"
        "    print(await revision(store))\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
    )
    argv = [sys.executable, "-c", program, f"sqlite:///{tmp_path}/new.db"]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(4)
        ]
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [process.communicate(timeout=120)[0].split() for process in started]

    assert [words[-1:] for words in found] == [[HEAD]] * 4
