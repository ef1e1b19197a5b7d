"""Who may ask, how often, how much; and the shape of every refusal."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from emberbox.control import bootstrap
from emberbox.control.errors import NotFound
from tests.support.control import ADMIN_TOKEN, World, eventually, set_limits


async def test_without_or_with_a_wrong_key_the_answer_is_401_in_the_error_shape(world: World) -> None:
    for headers in ({}, {"X_API_Key": "e2b_" + "0" * 40}, {"Authorization": "Bearer sk_e2b_nothing"}):
        async with world.client_with(**headers) as client:
            answer = await client.get("/v2/sandboxes")
        assert answer.status_code == 401
        assert answer.json()["code"] == 401
        assert answer.headers["should-retry"] == "false"


async def test_the_keys_header_has_no_case_and_bearer_works_too(world: World) -> None:
    made = (await world.client.post("/access-tokens", json={"name": "cli"})).json()
    ways = [
        {"x-api-key": world.key},
        {"X-API-KEY": world.key},
        {"Authorization": f"Bearer {world.key}"},
        {"authorization": f"bearer {made['token']}"},
    ]

    for headers in ways:
        async with world.client_with(**headers) as client:
            assert (await client.get("/teams")).json()[0]["teamID"] == world.team_id
    assert made["token"].startswith("sk_e2b_")


async def test_a_key_is_shown_once_masked_afterwards_and_gone_when_deleted(world: World) -> None:
    made = (await world.client.post("/api-keys", json={"name": "ci"})).json()
    async with world.client_with(X_API_Key=made["key"]) as client:
        before = await client.get("/v2/sandboxes")
        listed = (await world.client.get("/api-keys")).json()
        renamed = await world.client.patch(f"/api-keys/{made['id']}", json={"name": "new"})
        names = [key["name"] for key in (await world.client.get("/api-keys")).json()]
        deleted = await world.client.delete(f"/api-keys/{made['id']}")
        after = await client.get("/v2/sandboxes")

    body = made["key"].removeprefix("e2b_")
    assert made["mask"] == {
        "prefix": "e2b_",
        "valueLength": 40,
        "maskedValuePrefix": body[:4],
        "maskedValueSuffix": body[-4:],
    }
    assert len(body) == 40
    assert set(body) <= set("0123456789abcdef")
    assert made["key"] not in json.dumps(listed)
    assert renamed.status_code == 200
    assert "new" in names
    assert (before.status_code, deleted.status_code, after.status_code) == (200, 204, 401)


async def test_keys_of_another_team_are_not_found(world: World) -> None:
    _, stranger_key = await world.other_team()
    own = (await world.client.get("/api-keys")).json()[0]["id"]

    async with world.client_with(X_API_Key=stranger_key) as stranger:
        deleted = await stranger.delete(f"/api-keys/{own}")
        named = await stranger.get("/v2/sandboxes", headers={"X-Team-ID": world.team_id})
        metrics = await stranger.get(f"/teams/{world.team_id}/metrics")

    assert (deleted.status_code, named.status_code, metrics.status_code) == (404, 403, 403)


async def test_use_of_a_key_is_recorded(world: World) -> None:
    await world.client.get("/teams")

    await world.control.accounts.record_use()

    assert (await world.client.get("/api-keys")).json()[0]["lastUsed"] is not None


async def test_too_many_requests_are_429_with_when_to_come_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await set_limits(world, world.team_id, rate_per_second=1, rate_burst=3)
    monkeypatch.setattr(world.control.rates, "_clock", lambda: 1000.0)  # five requests may take a second
    world.control.rates.forget()

    answers = [await world.client.get("/teams") for _ in range(5)]

    assert [answer.status_code for answer in answers[:3]] == [200] * 3
    last = answers[-1]
    assert last.status_code == 429
    assert (last.headers["retry-after"], last.headers["should-retry"]) == ("1", "true")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b'{"templateID": "base", "timeout": }', "not JSON"),
        (b"[]", "JSON object"),
        (b"\xff\xfe", ""),
        (b'{"templateID": "base", "metadata": {"a": "\xed\xa0\x80"}}', ""),
        (b'{"templateID": "base", "metadata": {"a": "\\ud800"}}', ""),
        (b"[" * 100_000, ""),
    ],
)
async def test_a_body_that_is_not_what_it_should_be_is_400(world: World, content: bytes, words: str) -> None:
    answer = await world.client.post("/v2/sandboxes", content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"code", "message"}
    assert words in answer.json()["message"]


async def test_a_megabyte_of_metadata_is_413_whether_its_size_is_declared_or_not(world: World) -> None:
    body = json.dumps({"templateID": "base", "metadata": {"a": "x" * 1024 * 1024}}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    declared = await world.client.post("/v2/sandboxes", content=body)
    streamed = await world.client.post("/v2/sandboxes", content=pieces())

    for answer in (declared, streamed):
        assert answer.status_code == 413
        assert "larger than 1048576 bytes" in answer.json()["message"]
    assert world.node.machines == {}


async def test_what_is_not_there_is_404_in_the_error_shape(world: World) -> None:
    path = await world.client.get("/nothing/here")
    method = await world.client.put("/v2/sandboxes")
    sandbox = await world.client.get("/sandboxes/%00%ff")

    assert (path.status_code, method.status_code, sandbox.status_code) == (404, 405, 404)
    for answer in (path, method, sandbox):
        assert set(answer.json()) == {"code", "message"}
        assert answer.headers["should-retry"] == "false"


async def test_a_browser_may_call_from_any_origin(world: World) -> None:
    preflight = await world.client.options(
        "/v2/sandboxes",
        headers={
            "Origin": "https://app.example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-api-key,content-type",
        },
    )
    answer = await world.client.get("/teams", headers={"Origin": "https://app.example.com"})

    assert preflight.status_code == 200
    assert "x-api-key" in preflight.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_admin_routes_need_the_admin_token(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    keyed = await world.client.get("/nodes")

    async with world.client_with(X_Admin_Token=ADMIN_TOKEN) as admin:
        nodes = (await admin.get("/nodes")).json()
        node = (await admin.get(f"/nodes/{nodes[0]['id']}")).json()
        counts = (await admin.get("/admin/sandboxes/running-counts")).json()
        made = await admin.post(f"/admin/teams/{world.team_id}/api-keys", json={"name": "made"})
        deleted = await admin.delete(f"/admin/teams/{world.team_id}/api-keys/{made.json()['id']}")
        as_team = await admin.get("/v2/sandboxes", headers={"X-Team-ID": world.team_id})
        unknown = await admin.post("/admin/teams/00000000-0000-4000-8000-000000000000/sandboxes/kill")
        killed = (await admin.post(f"/admin/teams/{world.team_id}/sandboxes/kill")).json()

    assert keyed.status_code == 401
    assert (nodes[0]["id"], nodes[0]["status"], nodes[0]["sandboxCount"]) == ("fake-node", "ready", 1)
    assert node["machineInfo"]["cpuModel"] == "Fake"
    assert counts == {world.team_id: 1}
    assert (made.status_code, deleted.status_code) == (201, 204)
    assert [one["sandboxID"] for one in as_team.json()] == [sandbox_id]
    assert unknown.status_code == 404
    assert killed == {"killedCount": 1, "failedCount": 0}


async def test_a_draining_node_takes_no_new_sandboxes(world: World) -> None:
    async with world.client_with(X_Admin_Token=ADMIN_TOKEN) as admin:
        changed = await admin.post("/nodes/fake-node", json={"status": "draining"})
        refused = await world.client.post("/v2/sandboxes", json={"templateID": "base"})
        impossible = await admin.post("/nodes/fake-node", json={"status": "unhealthy"})
        await admin.post("/nodes/fake-node", json={"status": "ready"})
        taken = await world.client.post("/v2/sandboxes", json={"templateID": "base"})

    assert (changed.status_code, impossible.status_code) == (204, 400)
    assert (refused.status_code, taken.status_code) == (503, 201)


async def test_the_processs_numbers_are_for_anyone(world: World) -> None:
    await world.create()
    async with world.client_with() as client:
        text = (await client.get("/metrics")).text
        health = await client.get("/health")

    assert 'emberbox_sandboxes{state="running"} 1.0' in text
    assert 'route="/v2/sandboxes",status="201"' in text
    assert "emberbox_nodes_connected 1.0" in text
    assert health.status_code == 204


async def test_keys_from_the_command_line_work_beside_a_running_api(world: World) -> None:
    made = await bootstrap.create_key(world.settings, "from the command line")
    async with world.client_with(X_API_Key=made.value) as client:
        assert (await client.get("/teams")).status_code == 200
        listed = await bootstrap.list_keys(world.settings, team="default")
        await bootstrap.delete_key(world.settings, made.record.id)

        async def refused() -> bool:
            return (await client.get("/teams")).status_code == 401

        await eventually(refused)

    assert made.record.id in {record.id for record in listed}
    with pytest.raises(NotFound):
        await bootstrap.delete_key(world.settings, made.record.id)


async def test_a_second_first_run_changes_nothing(world: World) -> None:
    again = await bootstrap.bootstrap(world.settings)

    assert again == bootstrap.Bootstrapped(team_id=world.team_id, api_key=None, migrated=False)
