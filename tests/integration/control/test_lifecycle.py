"""Pause, resume, connect, deadlines, and what traffic may wake."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Any

import grpc
import pytest

from emberbox.wire import node_pb2 as pb
from tests.support.control import EDGE_SECRET, World, eventually, set_limits
from tests.support.fake_node import Refuse


def seconds_left(detail: dict[str, Any]) -> float:
    end = datetime.fromisoformat(detail["endAt"])
    return (end - datetime.now(end.tzinfo)).total_seconds()


async def detail(world: World, sandbox_id: str) -> dict[str, Any]:
    answer = await world.client.get(f"/sandboxes/{sandbox_id}")
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def wake(world: World, sandbox_id: str, secret: str = EDGE_SECRET) -> Any:
    async with world.client_with(X_Edge_Secret=secret) as edge:
        return await edge.post("/edge/wake", json={"sandboxID": sandbox_id, "port": 49983})


async def test_a_paused_sandbox_has_no_machine_to_reach_and_comes_back(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]

    paused = await world.client.post(f"/sandboxes/{sandbox_id}/pause", json={"memory": True})
    while_paused = await detail(world, sandbox_id)
    again = await world.client.post(f"/sandboxes/{sandbox_id}/pause")
    resumed = await world.client.post(f"/sandboxes/{sandbox_id}/resume")
    running = await detail(world, sandbox_id)
    twice = await world.client.post(f"/sandboxes/{sandbox_id}/resume", json={})

    assert (paused.status_code, again.status_code) == (204, 409)
    assert while_paused["state"] == "paused"
    assert while_paused["pauseMode"] == "full"
    assert resumed.status_code == 201
    assert running["state"] == "running"
    assert twice.status_code == 409
    assert world.edge.routes[sandbox_id].address == world.node.machines[sandbox_id].status.address


async def test_paused_time_does_not_consume_the_timeout(world: World) -> None:
    began = time.monotonic()
    sandbox_id = (await world.create(timeout=1000))["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")
    await asyncio.sleep(2.1)

    await world.client.post(f"/sandboxes/{sandbox_id}/resume")

    left = seconds_left(await detail(world, sandbox_id))
    took = time.monotonic() - began
    # It may be a second less: what was left is kept in whole seconds.
    assert 1000 - took + 1 < left <= 1000
    assert world.node.machines[sandbox_id].status.deadline_unix_ms > 0


async def test_a_resume_without_a_timeout_keeps_to_what_the_team_may_have_by_now(world: World) -> None:
    sandbox_id = (await world.create(timeout=1000))["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")
    await set_limits(world, world.team_id, max_timeout_seconds=500)

    resumed = await world.client.post(f"/sandboxes/{sandbox_id}/resume")

    assert resumed.status_code == 201
    assert 400 < seconds_left(await detail(world, sandbox_id)) <= 500


async def test_a_resume_takes_a_timeout_and_an_auto_pause(world: World) -> None:
    sandbox_id = (await world.create(timeout=1000))["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause", json={})

    await world.client.post(f"/sandboxes/{sandbox_id}/resume", json={"timeout": 500, "autoPause": True})

    shown = await detail(world, sandbox_id)
    assert 400 < seconds_left(shown) <= 500
    assert shown["lifecycle"] == {"autoResume": False, "onTimeout": "pause"}
    assert world.node.machines[sandbox_id].request.on_timeout == pb.TIMEOUT_ACTION_PAUSE


@pytest.mark.parametrize("version", ["", "/v2"])
async def test_connect_extends_a_running_sandbox_and_never_shortens(world: World, version: str) -> None:
    created = await world.create(timeout=100)
    sandbox_id = created["sandboxID"]

    longer = await world.client.post(f"{version}/sandboxes/{sandbox_id}/connect", json={"timeout": 200})
    shorter = await world.client.post(f"{version}/sandboxes/{sandbox_id}/connect", json={"timeout": 10})

    assert (longer.status_code, shorter.status_code) == (200, 200)
    assert longer.json() == created
    assert 150 < seconds_left(await detail(world, sandbox_id)) <= 200


async def test_connect_resumes_a_paused_sandbox_and_keeps_its_auto_pause(world: World) -> None:
    created = await world.create(autoPause=True, autoResume={"enabled": True})
    sandbox_id = created["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    answer = await world.client.post(f"/v2/sandboxes/{sandbox_id}/connect", json={"timeout": 60})

    assert answer.status_code == 201
    assert answer.json() == created
    assert (await detail(world, sandbox_id))["lifecycle"] == {"autoResume": True, "onTimeout": "pause"}
    assert world.node.machines[sandbox_id].request.on_timeout == pb.TIMEOUT_ACTION_PAUSE


async def test_connects_at_once_resume_once(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    answers = await asyncio.gather(
        *(world.client.post(f"/v2/sandboxes/{sandbox_id}/connect", json={}) for _ in range(8))
    )

    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert sum(name == "Resume" for name, _ in world.node.calls) == 1


async def test_connect_without_memory_asks_the_node_to_discard_it(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    await world.client.post(f"/v2/sandboxes/{sandbox_id}/connect", json={"memory": False})

    asked = [request for name, request in world.node.calls if name == "Resume"]
    assert asked[0].discard_memory


async def test_a_timeout_is_from_now_and_a_refresh_only_extends(world: World) -> None:
    sandbox_id = (await world.create(timeout=1000))["sandboxID"]

    set_shorter = await world.client.post(f"/sandboxes/{sandbox_id}/timeout", json={"timeout": 100})
    after_set = seconds_left(await detail(world, sandbox_id))
    await world.client.post(f"/sandboxes/{sandbox_id}/refreshes", json={"duration": 10})
    after_short = seconds_left(await detail(world, sandbox_id))
    await world.client.post(f"/sandboxes/{sandbox_id}/refreshes", json={"duration": 500})
    after_long = seconds_left(await detail(world, sandbox_id))
    empty = await world.client.post(f"/sandboxes/{sandbox_id}/refreshes")

    assert set_shorter.status_code == 204
    assert 50 < after_set <= 100
    assert 50 < after_short <= 100
    assert 400 < after_long <= 500
    assert empty.status_code == 204


async def test_at_its_deadline_a_sandbox_ends_and_the_node_may_forget_it(world: World) -> None:
    sandbox_id = (await world.create(timeout=0))["sandboxID"]

    async def gone() -> bool:
        return (await world.client.get(f"/sandboxes/{sandbox_id}")).status_code == 404

    await eventually(gone)
    await eventually(lambda: not world.node.ended)
    assert sandbox_id not in world.edge.routes


async def test_at_its_deadline_a_sandbox_with_auto_pause_is_paused(world: World) -> None:
    sandbox_id = (await world.create(timeout=0, autoPause=True, autoPauseMemory=False))["sandboxID"]

    async def paused() -> bool:
        return (await detail(world, sandbox_id))["state"] == "paused"

    await eventually(paused)
    await eventually(lambda: sandbox_id not in world.edge.routes)
    assert (await detail(world, sandbox_id))["pauseMode"] == "filesystem"
    assert not world.node.machines[sandbox_id].status.memory_kept


async def test_a_paused_sandbox_has_no_timeout_and_no_network_to_set(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    timeout = await world.client.post(f"/sandboxes/{sandbox_id}/timeout", json={"timeout": 5})
    network = await world.client.put(f"/sandboxes/{sandbox_id}/network", json={"denyOut": ["10.0.0.0/8"]})

    assert timeout.status_code == 404
    assert "paused" in timeout.json()["message"]
    assert network.status_code == 409


async def test_the_network_of_a_running_sandbox_is_replaced(world: World) -> None:
    sandbox_id = (
        await world.create(
            network={"maskRequestHost": "localhost:${PORT}", "denyOut": ["0.0.0.0/0"], "allowOut": ["example.com"]},
            allow_internet_access=True,
        )
    )["sandboxID"]

    answer = await world.client.put(
        f"/sandboxes/{sandbox_id}/network",
        json={
            "denyOut": ["192.0.2.0/24"],
            "egressProxy": {"address": "proxy.example.com:1080", "username": "u", "password": "hidden"},
        },
    )

    shown = await detail(world, sandbox_id)
    network = world.node.machines[sandbox_id].request.network
    assert answer.status_code == 204
    assert list(network.deny_out) == ["192.0.2.0/24"]
    assert list(network.allow_out) == []
    assert network.egress_proxy.password == "hidden"
    assert shown["network"] == {
        "maskRequestHost": "localhost:${PORT}",
        "denyOut": ["192.0.2.0/24"],
        "egressProxy": {"address": "proxy.example.com:1080", "username": "u"},
    }
    assert shown["allowInternetAccess"] is None


async def test_a_failed_pause_leaves_the_sandbox_running_and_reachable(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]

    async def fail(_request: object) -> None:
        raise RuntimeError("no disk")

    world.node.before["Pause"] = fail
    answer = await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    assert answer.status_code == 500
    assert (await detail(world, sandbox_id))["state"] == "running"
    assert sandbox_id in world.edge.routes


async def test_a_failed_resume_leaves_the_sandbox_paused(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    async def fail(_request: object) -> None:
        raise RuntimeError("no memory")

    world.node.before["Resume"] = fail
    failed = await world.client.post(f"/sandboxes/{sandbox_id}/resume")
    world.node.before.clear()
    resumed = await world.client.post(f"/sandboxes/{sandbox_id}/resume")

    assert (failed.status_code, resumed.status_code) == (500, 201)


@pytest.mark.parametrize("during", ["Create", "Pause", "Resume"])
async def test_a_sandbox_is_killed_in_the_middle_of_anything(world: World, during: str) -> None:
    inside, go = asyncio.Event(), asyncio.Event()

    async def hold(_request: object) -> None:
        inside.set()
        await go.wait()

    sandbox_id = ""
    if during != "Create":
        sandbox_id = (await world.create())["sandboxID"]
        if during == "Resume":
            await world.client.post(f"/sandboxes/{sandbox_id}/pause")
    world.node.before[during] = hold
    if during == "Create":
        going = asyncio.create_task(world.client.post("/v2/sandboxes", json={"templateID": "base"}))
    else:
        going = asyncio.create_task(world.client.post(f"/sandboxes/{sandbox_id}/{during.lower()}"))
    await inside.wait()
    if during == "Create":
        sandbox_id = next(request.sandbox_id for name, request in world.node.calls if name == "Create")

    killed = await world.client.delete(f"/sandboxes/{sandbox_id}")
    go.set()
    other = await going

    assert killed.status_code == 204
    assert other.status_code in (404, 409)
    assert await world.state_of(sandbox_id) == "ended"
    assert world.node.machines == {}
    assert world.edge.routes == {}


async def test_traffic_wakes_a_sandbox_that_may_be_woken(world: World) -> None:
    sandbox_id = (await world.create(autoPause=True, autoResume={"enabled": True}, timeout=100))["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    answers = await asyncio.gather(*(wake(world, sandbox_id) for _ in range(5)))

    address = world.node.machines[sandbox_id].status.address
    assert [answer.status_code for answer in answers] == [200] * 5
    assert {answer.json()["address"] for answer in answers} == {address}
    assert answers[0].json() == {
        "sandboxId": sandbox_id,
        "address": address,
        "trafficTokenSha256": "",
        "maskRequestHost": "",
        "httpsPorts": [],
    }
    assert world.edge.routes[sandbox_id].address == address
    assert 200 < seconds_left(await detail(world, sandbox_id)) <= 300


async def test_what_traffic_may_not_wake(world: World) -> None:
    asleep = (await world.create())["sandboxID"]
    files_only = (await world.create(autoPause=True, autoResume={"enabled": True}))["sandboxID"]
    running = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{asleep}/pause")
    await world.client.post(f"/sandboxes/{files_only}/pause", json={"memory": False})
    world.edge.routes.clear()

    answers = {name: await wake(world, name) for name in (asleep, files_only, running, "inothing")}

    assert answers[asleep].status_code == 502
    assert "was not found" in answers[asleep].json()["message"]
    assert answers[files_only].status_code == 403
    assert answers[running].status_code == 200
    assert running in world.edge.routes
    assert answers["inothing"].status_code == 502
    assert set(answers["inothing"].json()) == {"sandboxId", "message", "code"}
    assert "was not found" in answers["inothing"].json()["message"]


async def test_a_wake_respects_the_limit_of_sandboxes(world: World) -> None:
    sandbox_id = (await world.create(autoPause=True, autoResume={"enabled": True}))["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/pause")
    await set_limits(world, world.team_id, max_sandboxes=0)

    assert (await wake(world, sandbox_id)).status_code == 429


async def test_without_the_secret_there_is_no_wake(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]

    wrong = await wake(world, sandbox_id, secret="guess")
    keyed = await world.client.post("/edge/wake", json={"sandboxID": sandbox_id})

    assert (wrong.status_code, keyed.status_code) == (404, 404)


@pytest.mark.parametrize("machine", ["running", "paused"])
async def test_a_pause_that_the_node_refuses_ends_where_the_node_says(world: World, machine: str) -> None:
    sandbox_id = (await world.create())["sandboxID"]

    async def refuse(_request: object) -> None:
        if machine == "paused":
            world.node._set_paused(world.node.machines[sandbox_id], memory=True)
        raise Refuse(grpc.StatusCode.FAILED_PRECONDITION, "not now")

    world.node.before["Pause"] = refuse
    answer = await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    async def settled() -> bool:
        return await world.state_of(sandbox_id) == machine

    assert answer.status_code == 409
    await eventually(settled)
    await eventually(lambda: (sandbox_id in world.edge.routes) == (machine == "running"))


async def test_a_pause_whose_machine_dies_meanwhile_is_not_told_as_one(world: World) -> None:
    """To clients 409 says that it is paused."""
    sandbox_id = (await world.create())["sandboxID"]

    async def dies(_request: object) -> None:
        await world.node.end(sandbox_id, pb.END_REASON_DIED, "killed")
        raise Refuse(grpc.StatusCode.ABORTED, "its machine ended")

    world.node.before["Pause"] = dies
    answer = await world.client.post(f"/sandboxes/{sandbox_id}/pause")

    assert answer.status_code == 503
    assert "was not paused: its machine ended" in answer.json()["message"]

    async def ended() -> bool:
        return await world.state_of(sandbox_id) == "ended"

    await eventually(ended)


async def test_what_the_node_has_no_room_for_may_be_tried_again(world: World) -> None:
    async def refuse(_request: object) -> None:
        raise Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory left on the node")

    world.node.before["Create"] = refuse
    answer = await world.client.post("/v2/sandboxes", json={"templateID": "base"})

    assert answer.status_code == 503
    assert answer.json() == {
        "code": 503,
        "message": "no memory left on the node",
        "error_code": "sandbox_capacity_unavailable",
    }
    assert answer.headers["should-retry"] == "true"
