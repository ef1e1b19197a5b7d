"""Restarts and breaks: what was going on is finished or undone by comparing with the node."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from emberbox.control import nodes
from emberbox.control.bootstrap import bootstrap
from emberbox.store.engine import Store
from emberbox.store.tables import sandboxes, template_builds
from emberbox.wire import node_pb2 as pb
from tests.support.control import World, eventually, made_world
from tests.support.fake_node import Refuse


@pytest.fixture
async def restarted() -> AsyncIterator[World]:
    """A world whose api has run once (so `base` is there) and is stopped."""
    async with made_world() as world:
        async with world.serving():
            await world.ready()
        yield world


async def left_as(world: World, sandbox_id: str, state: str, **columns: Any) -> None:
    """Put a row in the state in which a process that was killed leaves it."""
    store = Store(world.settings.store_url)
    async with store.write() as connection:
        await connection.execute(
            update(sandboxes)
            .where(sandboxes.c.id == sandbox_id)
            .values(state=state, worker=str(uuid.uuid4()), **columns)
        )
    await store.close()


async def created(world: World, **body: Any) -> str:
    async with world.serving():
        await world.ready()
        sandbox_id: str = (await world.create(**body))["sandboxID"]
    return sandbox_id


async def settles(world: World, sandbox_id: str, state: str) -> None:
    async def is_it() -> bool:
        return await world.state_of(sandbox_id) == state

    await eventually(is_it)


async def test_a_running_sandbox_survives_a_restart_of_the_api(restarted: World) -> None:
    sandbox_id = await created(restarted)
    restarted.edge.routes.clear()

    async with restarted.serving():
        await eventually(lambda: sandbox_id in restarted.edge.routes)
        await restarted.ready()
        answer = await restarted.client.get(f"/sandboxes/{sandbox_id}")

    assert answer.json()["state"] == "running"
    assert len(restarted.node.builds) == 1


async def test_an_interrupted_create_is_undone_and_its_key_is_free(restarted: World) -> None:
    async with restarted.serving():
        await restarted.ready()
        answer = await restarted.client.post(
            "/v2/sandboxes", json={"templateID": "base"}, headers={"Idempotency-Key": "one"}
        )
        sandbox_id = answer.json()["sandboxID"]
    await left_as(restarted, sandbox_id, "creating")

    async with restarted.serving():
        await settles(restarted, sandbox_id, "ended")
        again = await restarted.client.post(
            "/v2/sandboxes", json={"templateID": "base"}, headers={"Idempotency-Key": "one"}
        )

    assert sandbox_id not in restarted.node.machines
    assert again.status_code == 201
    assert again.json()["sandboxID"] != sandbox_id


@pytest.mark.parametrize("state", ["pausing", "resuming"])
@pytest.mark.parametrize("machine", ["running", "paused", "gone"])
async def test_an_interrupted_transition_ends_where_the_node_says(restarted: World, state: str, machine: str) -> None:
    sandbox_id = await created(restarted)
    if machine == "paused":
        restarted.node.machines[sandbox_id].status.state = pb.MACHINE_STATE_PAUSED
    elif machine == "gone":
        del restarted.node.machines[sandbox_id]
    await left_as(restarted, sandbox_id, state)

    async with restarted.serving():
        await settles(restarted, sandbox_id, {"gone": "ended"}.get(machine, machine))
        await eventually(lambda: (sandbox_id in restarted.edge.routes) == (machine == "running"))


async def test_an_interrupted_kill_is_finished(restarted: World) -> None:
    sandbox_id = await created(restarted)
    await left_as(restarted, sandbox_id, "killing")

    async with restarted.serving():
        await settles(restarted, sandbox_id, "ended")

    assert restarted.node.machines == {}


async def test_what_the_node_did_meanwhile_is_recorded(restarted: World) -> None:
    ended, paused, lost = [await created(restarted, autoPause=True) for _ in range(3)]
    await restarted.node.end(ended, pb.END_REASON_DIED, "out of memory")
    await restarted.node.time_out(paused)
    del restarted.node.machines[lost]

    async with restarted.serving():
        await settles(restarted, ended, "ended")
        await settles(restarted, paused, "paused")
        await settles(restarted, lost, "ended")
        await eventually(lambda: not restarted.node.ended)


async def test_a_machine_that_nobody_knows_is_ended(restarted: World) -> None:
    restarted.node._start(pb.CreateRequest(sandbox_id="iorphan"))

    async with restarted.serving():
        await eventually(lambda: "iorphan" not in restarted.node.machines)


async def test_a_machine_whose_sandbox_has_ended_is_ended(restarted: World) -> None:
    sandbox_id = await created(restarted)
    await left_as(restarted, sandbox_id, "ended", ended_at=1)

    async with restarted.serving():
        await eventually(lambda: not restarted.node.machines)


async def test_a_kill_that_the_node_did_not_hear_is_done_when_it_is_back(restarted: World) -> None:
    sandbox_id = await created(restarted)
    async with restarted.serving():
        await restarted.ready()
        await restarted.node.stop()
        killed = await restarted.client.delete(f"/sandboxes/{sandbox_id}")
        gone = await restarted.client.get(f"/sandboxes/{sandbox_id}")
        await restarted.node.start(restarted.settings.node_target)
        await settles(restarted, sandbox_id, "ended")

    assert killed.status_code == 204
    assert gone.status_code == 404
    assert restarted.node.machines == {}


async def test_a_create_whose_answer_was_lost_leaves_nothing(restarted: World) -> None:
    node = restarted.node

    async def lose(_request: object) -> None:
        await node.stop()
        raise RuntimeError("the node went away")

    async with restarted.serving():
        await restarted.ready()
        node.before["Create"] = lose
        answer = await restarted.client.post("/v2/sandboxes", json={"templateID": "base"})
        node.before.clear()
        sandbox_id = next(request.sandbox_id for name, request in node.calls if name == "Create")
        # The machine was started all the same.
        node._start(pb.CreateRequest(sandbox_id=sandbox_id, deadline_unix_ms=2**50))
        await node.start(restarted.settings.node_target)
        await eventually(lambda: not node.machines)
        await settles(restarted, sandbox_id, "ended")

    assert answer.status_code == 503


async def test_a_pause_whose_answer_was_lost_is_looked_up(restarted: World) -> None:
    sandbox_id = await created(restarted)
    node = restarted.node

    async def lose(_request: object) -> None:
        node._set_paused(node.machines[sandbox_id], memory=True)
        await node.stop()

    async with restarted.serving():
        await restarted.ready()
        node.before["Pause"] = lose
        answer = await restarted.client.post(f"/sandboxes/{sandbox_id}/pause")
        await node.start(restarted.settings.node_target)
        await settles(restarted, sandbox_id, "paused")

    assert answer.status_code == 503


async def test_a_pause_asked_again_after_its_node_was_lost_is_carried_out(restarted: World) -> None:
    """To clients 409 means paused: they must not hear it of a sandbox that runs."""
    sandbox_id = await created(restarted)
    node = restarted.node

    async def lose(_request: object) -> None:
        node.before.clear()
        await node.stop()

    async with restarted.serving():
        await restarted.ready()
        node.before["Pause"] = lose
        first = await restarted.client.post(f"/sandboxes/{sandbox_id}/pause")
        again = asyncio.create_task(restarted.client.post(f"/sandboxes/{sandbox_id}/pause"))
        await asyncio.sleep(0.2)
        waits = not again.done()
        await node.start(restarted.settings.node_target)
        second = await again
        third = await restarted.client.post(f"/sandboxes/{sandbox_id}/pause")

    assert (first.status_code, waits, second.status_code, third.status_code) == (503, True, 204, 409)
    assert node.machines[sandbox_id].status.state == pb.MACHINE_STATE_PAUSED


async def test_a_pause_at_the_deadline_that_overtakes_the_create_is_not_lost(restarted: World) -> None:
    async with restarted.serving():
        await restarted.ready()
        made = await asyncio.gather(*(restarted.create(timeout=0, autoPause=True) for _ in range(10)))

        for one in made:
            await settles(restarted, one["sandboxID"], "paused")
        await eventually(lambda: not restarted.edge.routes)


async def test_the_edge_gets_every_route_when_it_comes_back(restarted: World) -> None:
    async with restarted.serving():
        await restarted.ready()
        await eventually(lambda: bool(restarted.edge.calls))
        kept, killed = [(await restarted.create())["sandboxID"] for _ in range(2)]
        await restarted.edge.stop()
        restarted.edge.routes.clear()
        await restarted.client.delete(f"/sandboxes/{killed}")
        later = (await restarted.create())["sandboxID"]
        await restarted.edge.start(restarted.settings.edge_target)

        await eventually(lambda: set(restarted.edge.routes) == {kept, later})


async def test_base_is_built_again_when_the_node_has_lost_its_layers(restarted: World) -> None:
    restarted.node.layers = []

    async with restarted.serving():
        await eventually(lambda: restarted.control.shipped.base.startup.status == "ready")
        templates = (await restarted.client.get("/v2/templates")).json()

    assert len(restarted.node.builds) == 2
    assert [template["buildCount"] for template in templates] == [2]


async def test_base_stays_when_nothing_that_goes_into_it_has_changed(restarted: World) -> None:
    async with restarted.serving():
        await restarted.ready()

    assert len(restarted.node.builds) == 1


async def test_base_is_built_again_when_what_goes_into_it_has_changed(restarted: World) -> None:
    restarted.node.base_key = "base-2"
    restarted.node.build_hold = asyncio.Event()

    async with restarted.serving():
        await eventually(lambda: len(restarted.node.builds) == 2)
        meanwhile = (await restarted.client.get("/startup")).json()["base"]["status"]
        created_meanwhile = await restarted.create()
        restarted.node.build_hold.set()
        await restarted.ready()
        created_then = await restarted.create()
    async with restarted.serving():
        await restarted.ready()

    assert meanwhile == "building"
    assert len(restarted.node.builds) == 2
    started_from = [
        restarted.node.machines[made["sandboxID"]].request.image.build_id for made in (created_meanwhile, created_then)
    ]
    assert started_from == [build.build_id for build in restarted.node.builds]


async def test_base_is_built_again_with_its_rates_when_default_sizes_have_changed(restarted: World) -> None:
    async with restarted.serving():
        await restarted.ready()
        made = await restarted.client.post("/shipped-templates/base/builds?networkMbitPerSecond=8&force=true")
        await eventually(lambda: len(restarted.node.builds) == 2)
        await eventually(lambda: restarted.control.builds.load == (0, 0))
    restarted.settings = restarted.settings.model_copy(update={"default_memory_mb": 2048})

    async with restarted.serving():
        await restarted.ready()
        created = await restarted.create()

    forced, renewed = restarted.node.builds[1:]
    assert made.status_code == 202
    assert (forced.recipe, forced.force, renewed.force) == ("base", True, False)
    assert forced.rates.network_mbit_per_second == renewed.rates.network_mbit_per_second == 8
    assert restarted.node.machines[created["sandboxID"]].request.memory_mb == 2048


async def test_the_base_of_before_stays_in_use_when_it_cannot_be_built_again(restarted: World) -> None:
    restarted.node.base_key = "base-2"
    restarted.node.build_events = [pb.BuildEvent(failed=pb.BuildFailed(message="no space left", step="base"))]

    async with restarted.serving():
        await restarted.ready()
        told = (await restarted.client.get("/startup")).json()["base"]
        created = await restarted.create()

    assert "could not be built again: no space left" in told["message"]
    used = restarted.node.machines[created["sandboxID"]].request.image.build_id
    assert used == restarted.node.builds[0].build_id


async def test_base_waits_for_the_first_team_that_another_process_makes() -> None:
    async with made_world() as world:
        shutil.rmtree(world.settings.api_dir)
        async with world.serving():
            await eventually(lambda: any(node.connected.is_set() for node in world.control.plane.nodes))
            await asyncio.sleep(0.3)
            before = world.control.shipped.base.startup.status
            await bootstrap(world.settings)
            await eventually(lambda: world.control.shipped.base.startup.status == "ready")

    assert before == "waiting"


async def test_a_failed_base_build_is_told(restarted: World) -> None:
    restarted.node.layers = []
    restarted.node.build_events = [pb.BuildEvent(failed=pb.BuildFailed(message="no space left", step="base"))]

    async with restarted.serving():
        await eventually(lambda: restarted.control.shipped.base.startup.status == "error")
        told = (await restarted.client.get("/startup")).json()

    assert told["base"]["status"] == "error"
    assert told["base"]["message"] == "no space left"


async def test_what_was_deleted_while_its_node_was_away_is_removed_when_it_is_back() -> None:
    async with made_world() as world, world.serving():
        await world.ready()
        registered = (await world.client.post("/v3/templates", json={"name": "mine"})).json()
        path = f"/v2/templates/{registered['templateID']}/builds/{registered['buildID']}"
        world.node.build_events[-1].done.image.layers[:] = ["cd" * 32]
        assert (await world.client.post(path, json={"fromTemplate": "base"})).status_code == 202
        await eventually(lambda: world.control.builds.load == (0, 0))
        sandbox_id = (await world.create())["sandboxID"]
        snapshot = (await world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={})).json()["snapshotID"]

        async def away(request: Any) -> None:
            raise Refuse(grpc.StatusCode.UNAVAILABLE, "away")

        world.node.before |= {"DeleteBuild": away, "DeleteSnapshot": away}
        deleted = [await world.client.delete(f"/templates/{name}") for name in ("mine", snapshot)]
        left = (list(world.node.deleted_builds), list(world.node.snapshots))
        await world.control.upkeep()
        world.node.before.clear()
        await world.control.upkeep()
        await world.control.upkeep()

    assert [answer.status_code for answer in deleted] == [204, 204]
    assert (left[0], len(left[1])) == ([], 1)
    assert not world.node.snapshots
    assert [(each.build_id, list(each.layers)) for each in world.node.deleted_builds] == [
        (registered["buildID"], ["cd" * 32])
    ]


async def test_an_interrupted_snapshot_is_undone(restarted: World) -> None:
    sandbox_id = await created(restarted)
    async with restarted.serving():
        await restarted.ready()
        await restarted.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={"name": "mine"})
    store = Store(restarted.settings.store_url)
    await store.write_one(
        update(template_builds)
        .where(template_builds.c.snapshot_id.is_not(None))
        .values(status="building", worker=str(uuid.uuid4()))
    )
    await store.close()

    async with restarted.serving():
        await eventually(lambda: not restarted.node.snapshots)

        async def name_is_free() -> bool:
            return (await restarted.client.get("/templates/mine")).status_code == 404

        await eventually(name_is_free)


async def test_a_drop_that_the_edge_did_not_take_is_made_good(restarted: World) -> None:
    async with restarted.serving():
        await restarted.ready()
        await eventually(lambda: bool(restarted.edge.calls))
        sandbox_id = (await restarted.create())["sandboxID"]
        restarted.edge.refuses.add("DropRoute")
        answer = await restarted.client.delete(f"/sandboxes/{sandbox_id}")

        await eventually(lambda: sandbox_id not in restarted.edge.routes)

    assert answer.status_code == 204


async def test_an_edge_that_is_stuck_with_one_sandbox_does_not_hold_up_the_end_of_another(restarted: World) -> None:
    async with restarted.serving():
        await restarted.ready()
        await eventually(lambda: bool(restarted.edge.calls))
        held, other = [(await restarted.create())["sandboxID"] for _ in range(2)]
        restarted.edge.stuck.add(held)

        await restarted.node.end(held, pb.END_REASON_DIED)
        await restarted.node.end(other, pb.END_REASON_DIED)

        await eventually(lambda: other not in restarted.node.ended)
        assert held in restarted.node.ended, "its address could be another sandbox's while its route is still there"
        await settles(restarted, held, "ended")
        await eventually(lambda: held not in restarted.node.ended)


async def test_a_repeated_create_after_a_kill_makes_no_other_sandbox(restarted: World) -> None:
    send = {"json": {"templateID": "base"}, "headers": {"Idempotency-Key": "one"}}
    async with restarted.serving():
        await restarted.ready()
        first = await restarted.client.post("/v2/sandboxes", **send)
        await restarted.client.delete(f"/sandboxes/{first.json()['sandboxID']}")
        again = await restarted.client.post("/v2/sandboxes", **send)

    assert again.json() == first.json()
    assert restarted.node.machines == {}


async def test_a_silent_node_is_asked_and_left_when_it_does_not_answer(
    restarted: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = restarted.node

    def asked(method: str) -> int:
        return sum(name == method for name, _ in node.calls)

    async def fail(_request: object) -> None:
        raise RuntimeError("cannot tell")

    monkeypatch.setattr(nodes, "_SILENCE_SECONDS", 0.05)
    async with restarted.serving():
        await restarted.ready()
        streams, descriptions = asked("Watch"), asked("Describe")
        await eventually(lambda: asked("Describe") > descriptions + 2)
        assert asked("Watch") == streams

        node.before["Describe"] = fail
        await eventually(lambda: asked("Watch") > streams)
        node.before.clear()
        await eventually(lambda: all(one.connected.is_set() for one in restarted.control.plane.nodes))


@contextmanager
def store_fails(world: World) -> Iterator[None]:
    """Every transaction fails, as on a full disk; reading goes on."""
    sqlite = world.control.store._sqlite

    async def fail(_function: object) -> None:
        raise OperationalError("COMMIT", {}, Exception("database or disk is full"))

    real, sqlite.writing = sqlite.writing, fail  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        sqlite.writing = real  # type: ignore[method-assign]


@pytest.mark.parametrize("during", ["Create", "Pause", "Resume", "Kill"])
async def test_a_database_that_is_full_for_a_while_leaves_nothing_half_made(restarted: World, during: str) -> None:
    async with restarted.serving():
        await restarted.ready()
        node, client = restarted.node, restarted.client
        sandbox_id = (await restarted.create())["sandboxID"] if during != "Create" else ""
        if during == "Resume":
            await client.post(f"/sandboxes/{sandbox_id}/pause")
        failing = ExitStack()

        async def fill(_request: object) -> None:
            node.before.clear()
            failing.enter_context(store_fails(restarted))

        node.before[during] = fill
        if during == "Create":
            answer = await client.post("/v2/sandboxes", json={"templateID": "base"})
        elif during == "Kill":
            answer = await client.delete(f"/sandboxes/{sandbox_id}")
        else:
            answer = await client.post(f"/sandboxes/{sandbox_id}/{during.lower()}")
        failing.close()
        sandbox_id = sandbox_id or next(request.sandbox_id for name, request in node.calls if name == "Create")

        await settles(restarted, sandbox_id, {"Pause": "paused", "Resume": "running"}.get(during, "ended"))

        assert answer.status_code == 503
        assert answer.headers["should-retry"] == "true"
        assert set(node.machines) == (set() if during in ("Create", "Kill") else {sandbox_id})
        await eventually(lambda: set(restarted.edge.routes) == ({sandbox_id} if during == "Resume" else set()))
        await eventually(lambda: not restarted.control.plane.carried)
