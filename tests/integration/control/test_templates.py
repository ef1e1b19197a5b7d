"""Templates, their builds and tags; snapshots and forks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from emberbox.store import templates as rows
from emberbox.store.engine import Store
from emberbox.store.records import BuildRecord
from emberbox.wire import node_pb2 as pb
from tests.support.control import World


async def snapshot(world: World, sandbox_id: str, **body: Any) -> dict[str, Any]:
    answer = await world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_base_is_listed_with_its_build(world: World) -> None:
    listed = (await world.client.get("/templates")).json()
    paged = (await world.client.get("/v2/templates")).json()
    defaults = (await world.client.get("/default-templates")).json()
    alias = (await world.client.get("/templates/aliases/base")).json()
    one = (await world.client.get("/templates/base")).json()
    build_id = one["builds"][0]["buildID"]
    status = (await world.client.get(f"/templates/base/builds/{build_id}/status")).json()
    logs = (await world.client.get(f"/templates/base/builds/{build_id}/logs?direction=backward")).json()

    assert listed == paged == defaults
    assert listed[0]["names"] == ["default/base"]
    assert listed[0]["aliases"] == ["base"]
    assert (listed[0]["buildStatus"], listed[0]["isDefault"]) == ("ready", True)
    assert listed[0]["createdBy"] is None
    assert alias == {"templateID": listed[0]["templateID"], "public": True}
    assert one["builds"][0]["status"] == "ready"
    assert status["status"] == "ready"
    assert [entry["message"] for entry in status["logEntries"]] == ["one"]
    assert status["logEntries"][0]["step"] == "base"
    assert logs["logs"] == status["logEntries"]


async def test_a_template_is_named_in_every_way(world: World) -> None:
    template_id = (await world.client.get("/templates/aliases/base")).json()["templateID"]

    for name in ("base", "default/base", "base:default", template_id, f"{template_id}:default", "BASE"):
        assert (await world.create(templateID=name))["templateID"] == template_id
    encoded = await world.client.get("/templates/default%2Fbase")
    missing_tag = await world.client.post("/v2/sandboxes", json={"templateID": "base:v9"})

    assert encoded.json()["templateID"] == template_id
    assert missing_tag.status_code == 404
    assert "no tag 'v9'" in missing_tag.json()["message"]


async def test_spawns_are_counted(world: World) -> None:
    await world.create()

    listed = (await world.client.get("/templates")).json()

    assert listed[0]["spawnCount"] == 1
    assert listed[0]["lastSpawnedAt"] is not None


async def test_a_default_template_is_there_for_every_team_but_nobodys_to_delete(world: World) -> None:
    _, key = await world.other_team()
    async with world.client_with(X_API_Key=key) as stranger:
        created = await stranger.post("/v2/sandboxes", json={"templateID": "base"})
        own = (await stranger.get("/v2/templates")).json()
        defaults = (await stranger.get("/default-templates")).json()
        deleted = await stranger.delete("/templates/base")
        changed = await stranger.patch("/v2/templates/base", json={"public": False})
    by_owner = await world.client.delete("/templates/base")
    hidden = await world.client.patch("/v2/templates/base", json={"public": False})

    assert hidden.status_code == 403
    assert created.status_code == 201
    assert own == []
    assert (defaults[0]["spawnCount"], defaults[0]["buildCount"]) == (0, 0)
    assert (deleted.status_code, changed.status_code, by_owner.status_code) == (403, 403, 403)


async def test_how_often_a_default_template_is_used_is_for_its_team_alone(world: World) -> None:
    await world.create()
    _, key = await world.other_team()

    async with world.client_with(X_API_Key=key) as stranger:
        by_stranger = (await stranger.get("/templates/base")).json()
    by_owner = (await world.client.get("/templates/base")).json()

    assert (by_stranger["spawnCount"], by_stranger["lastSpawnedAt"]) == (0, None)
    assert by_owner["spawnCount"] == 1
    assert by_owner["lastSpawnedAt"] is not None


@pytest.mark.parametrize("sort", ["latest_desc", "latest_asc", "name_desc", "name_asc"])
async def test_pages_of_tags_go_on_also_where_a_tag_was_deleted(world: World, sort: str) -> None:
    for tag in ("c", "a", "b"):
        await world.client.post("/templates/tags", json={"target": "base", "tags": [tag]})
    path, limits = "/templates/base/tags/groups", {"sort": sort, "tagsLimit": "2"}
    everything = [group["tag"] for group in (await world.client.get(path, params={"sort": sort})).json()["tags"]]
    # `default` cannot be deleted: let the first page end with another tag.
    at = 2 if everything[1] != "default" else 3
    first = (await world.client.get(path, params={**limits, "tagsLimit": str(at)})).json()

    await world.client.request("DELETE", "/templates/tags", json={"name": "base", "tags": [everything[at - 1]]})
    rest = (await world.client.get(path, params={**limits, "tagsCursor": first["nextCursor"]})).json()

    assert len(everything) == 4
    assert [group["tag"] for group in first["tags"]] == everything[:at]
    assert [group["tag"] for group in rest["tags"]] == everything[at:]


async def test_a_snapshot_is_looked_for_by_text_that_can_be_an_id(world: World) -> None:
    answer = await world.client.get("/snapshots?sandboxID=%00")

    assert answer.status_code == 400
    assert "NUL" in answer.json()["message"]


async def test_tags_mean_the_build_they_were_assigned_to_last(world: World) -> None:
    assigned = await world.client.post("/templates/tags", json={"target": "base", "tags": ["v1", "Stable"]})
    listed = (await world.client.get("/templates/base/tags")).json()
    count = (await world.client.get("/templates/base/tags/count")).json()
    exists = (await world.client.get("/templates/base/tags/exists?tag=STABLE")).json()
    groups = (await world.client.get("/templates/base/tags/groups?sort=name_asc&tagsLimit=2")).json()
    rest = (
        await world.client.get(f"/templates/base/tags/groups?sort=name_asc&tagsCursor={groups['nextCursor']}")
    ).json()
    history = (await world.client.get("/templates/base/tags/v1/assignments")).json()
    created = await world.create(templateID="base:v1")
    deleted = await world.client.request("DELETE", "/templates/tags", json={"name": "base", "tags": ["v1"]})
    again = await world.client.request("DELETE", "/templates/tags", json={"name": "base", "tags": ["v1"]})
    default = await world.client.request("DELETE", "/templates/tags", json={"name": "base", "tags": ["default"]})

    assert assigned.status_code == 201
    assert assigned.json()["tags"] == ["v1", "stable"]
    assert {tag["tag"] for tag in listed} == {"default", "v1", "stable"}
    assert count == {"total": 3}
    assert exists == {"exists": True, "normalizedTag": "stable"}
    assert [group["tag"] for group in groups["tags"]] == ["default", "stable"]
    assert [group["tag"] for group in rest["tags"]] == ["v1"]
    assert rest["nextCursor"] is None
    assert len(history["data"]) == 1
    assert created["alias"] == "base"
    assert (deleted.status_code, again.status_code, default.status_code) == (204, 404, 400)


async def test_a_snapshot_starts_sandboxes_and_its_source_runs_on(world: World) -> None:
    source = (await world.create(metadata={"a": "b"}))["sandboxID"]

    made = await snapshot(world, source)
    created = await world.create(templateID=made["snapshotID"])

    machine = world.node.machines[created["sandboxID"]]
    assert machine.request.snapshot_id in world.node.snapshots
    assert made["names"] == []
    assert await world.state_of(source) == "running"
    assert (await world.client.get(f"/sandboxes/{created['sandboxID']}")).json()["metadata"] == {}


async def test_named_snapshots_are_found_paged_and_deleted_one_by_one(world: World) -> None:
    first, second = [(await world.create())["sandboxID"] for _ in range(2)]
    one = await snapshot(world, first, name="mine:v1")
    two = await snapshot(world, second, name="mine:v2")
    unnamed = await snapshot(world, second)

    everything = (await world.client.get("/snapshots")).json()
    page = await world.client.get("/snapshots?limit=2")
    rest = (await world.client.get("/snapshots", params={"nextToken": page.headers["x-next-token"]})).json()
    of_first = (await world.client.get(f"/snapshots?sandboxID={first}")).json()
    by_name = (await world.client.get("/snapshots?name=mine")).json()
    by_tag = (await world.client.get("/snapshots", params={"name": "default/mine:v1"})).json()
    by_id = (await world.client.get("/snapshots", params={"name": unnamed["snapshotID"]})).json()
    nothing = (await world.client.get("/snapshots?name=other")).json()
    before = len(world.node.snapshots)
    deleted = await world.client.delete("/templates/default%2Fmine:v1")
    gone = await world.client.post("/v2/sandboxes", json={"templateID": "mine:v1"})
    kept = await world.client.post("/v2/sandboxes", json={"templateID": "mine:v2"})
    all_of_it = await world.client.delete("/templates/mine")
    twice = await world.client.delete("/templates/mine")

    assert one["snapshotID"] == "default/mine:v1"
    assert one["names"] == ["default/mine:v1"]
    assert [entry["snapshotID"] for entry in everything] == [
        unnamed["snapshotID"],
        two["snapshotID"],
        one["snapshotID"],
    ]
    assert page.json() + rest == everything
    assert of_first == [one]
    assert by_name == [two, one]
    assert by_tag == [one]
    assert by_id == [unnamed]
    assert nothing == []
    assert (deleted.status_code, gone.status_code, kept.status_code) == (204, 404, 201)
    assert (all_of_it.status_code, twice.status_code) == (204, 404)
    assert (before, len(world.node.snapshots)) == (3, 1)
    assert (await world.client.get("/v2/templates")).json()[0]["aliases"] == ["base"]


@pytest.mark.parametrize("name", ["base", "other-team/mine", "Not A Name"])
async def test_a_snapshot_cannot_take_every_name(world: World, name: str) -> None:
    sandbox_id = (await world.create())["sandboxID"]

    answer = await world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={"name": name})

    assert answer.status_code == 400
    assert world.node.snapshots == {}


async def test_a_snapshot_that_is_deleted_while_it_is_made_leaves_nothing(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    saving, go = asyncio.Event(), asyncio.Event()

    async def wait(_request: object) -> None:
        saving.set()
        await go.wait()

    world.node.before["Snapshot"] = wait
    making = asyncio.create_task(world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={"name": "mine"}))
    await saving.wait()
    deleted = await world.client.delete("/templates/mine")
    go.set()
    made = await making

    assert (deleted.status_code, made.status_code) == (204, 409)
    assert world.node.snapshots == {}


async def test_what_is_deleted_while_something_is_added_to_it_may_be_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    await snapshot(world, sandbox_id, name="saved")
    await world.client.post("/v3/templates", json={"name": "built"})
    add_build = rows.add_build

    async def too_late(store: Store, build: BuildRecord) -> None:
        await world.client.delete(f"/templates/{build.template_id}")
        await add_build(store, build)

    monkeypatch.setattr(rows, "add_build", too_late)
    answers = [
        await world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={"name": "saved"}),
        await world.client.post("/v3/templates", json={"name": "built"}),
    ]
    monkeypatch.undo()
    again = await world.client.post("/v3/templates", json={"name": "built"})

    assert [answer.status_code for answer in answers] == [409, 409]
    assert {answer.headers["should-retry"] for answer in answers} == {"true"}
    assert again.status_code == 202
    assert world.node.snapshots == {}


async def test_a_row_that_is_there_already_may_be_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.client.post("/v3/templates", json={"name": "built"})
    add_build = rows.add_build

    async def add_twice(store: Store, build: BuildRecord) -> None:
        await add_build(store, build)
        await add_build(store, build)

    monkeypatch.setattr(rows, "add_build", add_twice)
    answer = await world.client.post("/v3/templates", json={"name": "built"})

    assert (answer.status_code, answer.headers["should-retry"]) == (409, "true")


async def test_a_row_that_can_never_be_stored_is_a_fault_and_not_to_be_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.client.post("/v3/templates", json={"name": "built"})
    add_build = rows.add_build

    async def add_nonsense(store: Store, build: BuildRecord) -> None:
        await add_build(store, replace(build, cpu_count=cast(int, None)))

    monkeypatch.setattr(rows, "add_build", add_nonsense)
    answer = await world.client.post("/v3/templates", json={"name": "built"})

    assert (answer.status_code, answer.headers["should-retry"]) == (500, "false")
    assert answer.json()["error_code"] == "internal_server_error"


async def test_a_failed_snapshot_leaves_nothing(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]

    async def fail(_request: object) -> None:
        raise RuntimeError("no disk")

    world.node.before["Snapshot"] = fail
    answer = await world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={"name": "mine"})
    world.node.before.clear()

    assert answer.status_code == 500
    assert (await world.client.get("/snapshots")).json() == []
    assert (await snapshot(world, sandbox_id, name="mine"))["names"] == ["default/mine:default"]


async def test_forks_are_sandboxes_of_their_own(world: World) -> None:
    source = (await world.create(metadata={"a": "b"}, autoPause=True))["sandboxID"]

    results = (await world.client.post(f"/sandboxes/{source}/fork", json={"count": 3, "timeout": 60})).json()

    ids = [result["sandbox"]["sandboxID"] for result in results]
    assert len({*ids, source}) == 4
    assert set(world.edge.routes) == {*ids, source}
    shown = (await world.client.get(f"/sandboxes/{ids[0]}")).json()
    assert shown["metadata"] == {"a": "b"}
    assert shown["lifecycle"]["onTimeout"] == "pause"
    tokens = {world.node.machines[sandbox_id].request.access_token for sandbox_id in ids}
    assert len(tokens) == 3


async def test_each_fork_fails_by_itself(world: World) -> None:
    source = (await world.create())["sandboxID"]
    real = world.node.Fork

    async def second_fails(request: pb.ForkRequest, context: Any) -> pb.ForkResponse:
        answer = await real(request, context)
        del world.node.machines[request.creates[1].sandbox_id]
        answer.results[1].CopyFrom(pb.ForkResult(error="no memory left", error_code=8))  # RESOURCE_EXHAUSTED
        return answer

    world.node.Fork = second_fails  # type: ignore[method-assign]
    await world.node.stop()
    await world.node.start(world.settings.node_target)
    await asyncio.sleep(0)
    answer = await world.client.post(f"/sandboxes/{source}/fork", json={"count": 2})
    while answer.status_code == 503:
        await asyncio.sleep(0.05)
        answer = await world.client.post(f"/sandboxes/{source}/fork", json={"count": 2})

    results = answer.json()
    assert set(results[0]) == {"sandbox"}
    assert set(results[1]) == {"error"}
    assert (results[1]["error"]["code"], results[1]["error"]["message"]) == (503, "no memory left")
    assert len((await world.client.get("/v2/sandboxes")).json()) == 2


async def test_a_fork_of_a_paused_sandbox_is_409(world: World) -> None:
    source = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{source}/pause")

    assert (await world.client.post(f"/sandboxes/{source}/fork")).status_code == 409


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/volumes", None),
        ("POST", "/secrets", {"name": "a", "value": "b"}),
    ],
)
async def test_what_is_not_built_yet_says_so(world: World, method: str, path: str, body: dict[str, str] | None) -> None:
    answer = await world.client.request(method, path, json=body)

    assert answer.status_code == 501
    assert "not built yet" in answer.json()["message"]
    assert answer.headers["should-retry"] == "false"
