"""The parts that depend on the database, on PostgreSQL: the same tests with another `world`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import update

from emberbox.api.app import create_app
from emberbox.store.engine import Store
from emberbox.store.migrate import HEAD, migrate, revision
from emberbox.store.tables import template_builds
from tests.integration.control.test_accounts import (  # noqa: F401
    test_a_body_that_is_not_what_it_should_be_is_400,
    test_a_key_is_shown_once_masked_afterwards_and_gone_when_deleted,
    test_use_of_a_key_is_recorded,
    test_what_is_not_there_is_404_in_the_error_shape,
)
from tests.integration.control.test_builds import (  # noqa: F401
    ended,
    register,
    start,
    test_a_build_ends_also_when_what_it_says_cannot_be_stored,
    test_a_build_is_started_once,
    test_a_failed_build_says_where_and_leaves_the_ready_one_in_use,
    test_deleting_a_template_ends_its_builds_and_leaves_its_sandboxes,
    test_one_name_registered_many_times_at_once_is_one_template,
    test_the_log_pages_exactly,
)
from tests.integration.control.test_lifecycle import (  # noqa: F401
    test_a_sandbox_is_killed_in_the_middle_of_anything,
    test_connects_at_once_resume_once,
)
from tests.integration.control.test_sandboxes import (  # noqa: F401
    test_a_hundred_creates_at_once_respect_the_limit,
    test_an_idempotency_key_in_use_is_409_and_a_failed_one_is_free_again,
    test_lists_filter_order_and_page,
    test_metrics_are_kept_from_the_nodes_samples,
    test_the_same_idempotency_key_and_body_give_the_same_sandbox,
)
from tests.integration.control.test_scopes import (  # noqa: F401
    test_a_create_repeated_at_once_is_never_counted_twice,
    test_a_repeated_create_gives_the_earlier_sandbox_also_at_the_limit,
    test_creates_at_once_do_not_pass_the_limit,
)
from tests.integration.control.test_templates import (  # noqa: F401
    test_a_row_that_can_never_be_stored_is_a_fault_and_not_to_be_tried_again,
    test_a_row_that_is_there_already_may_be_tried_again,
    test_named_snapshots_are_found_paged_and_deleted_one_by_one,
    test_tags_mean_the_build_they_were_assigned_to_last,
    test_what_is_deleted_while_something_is_added_to_it_may_be_tried_again,
)
from tests.integration.control.test_upgrade import (  # noqa: F401
    test_a_database_of_the_first_version_is_upgraded_and_goes_on,
    test_a_snapshot_from_before_there_were_rates_has_none_and_a_template_has_the_installations,
)
from tests.support.control import ADMIN_TOKEN, World, eventually, made_world, serving_world
from tests.support.postgres import Cluster, cluster, missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture
def database_url(postgresql: Cluster) -> str:
    return postgresql.new_database()


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with serving_world(database_url=database_url) as made:
        yield made


async def test_two_processes_may_migrate_at_once(postgresql: Cluster) -> None:
    url = postgresql.new_database()
    stores = [Store(url) for _ in range(3)]
    try:
        await asyncio.gather(*(migrate(store) for store in stores))
        assert await revision(stores[0]) == HEAD
    finally:
        for store in stores:
            await store.close()


async def test_a_node_that_is_drained_by_one_process_gets_no_sandbox_from_another(world: World) -> None:
    other = create_app(world.settings)
    async with world.client_with(X_Admin_Token=ADMIN_TOKEN) as admin, other.router.lifespan_context(other):
        await eventually(lambda: other.state.control.shipped.base.startup.status == "ready")
        codes = []
        for status in ("draining", "ready"):
            await admin.post(f"/nodes/{world.node.node_id}", json={"status": status})
            await other.state.control.upkeep()
            world.app = other
            async with world.client_with(X_API_Key=world.key) as client:
                codes.append((await client.post("/v2/sandboxes", json={"templateID": "base"})).status_code)

    assert codes == [503, 201]


async def test_a_build_is_taken_over_when_its_process_has_been_silent(postgresql: Cluster) -> None:
    async with made_world(database_url=postgresql.new_database()) as world:
        async with world.serving():
            await world.ready()
            world.node.build_hold = asyncio.Event()
            made = await register(world)
            await start(world, made)
            await eventually(lambda: made["buildID"] in world.node.journals)
        async with world.serving():
            await world.ready()
            await world.control.builds.tend()
            while_fresh = [name for name, _ in world.node.calls if name == "FollowBuild"]
            async with world.control.store.write() as connection:
                await connection.execute(update(template_builds).values(updated_at=0))
            await world.control.builds.tend()
            world.node.build_hold.set()
            told = await ended(world, made)

        assert while_fresh == []
        assert told["status"] == "ready"
