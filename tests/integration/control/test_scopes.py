"""Keys that may do less: scopes over REST and MCP, and a number of sandboxes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.integration.control.test_mcp import connected
from tests.support.control import ADMIN_TOKEN, World, set_limits
from tests.support.live import live_world

SANDBOX = {"templateID": "base"}


@asynccontextmanager
async def limited(
    world: World, *scopes: str, limit: int | None = None, by: httpx.AsyncClient | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key of these scopes."""
    async with world.client_with(X_API_Key=await made(by or world.client, *scopes, limit=limit)) as client:
        yield client


async def made(client: httpx.AsyncClient, *scopes: str, limit: int | None = None) -> str:
    body: dict[str, Any] = {"name": "limited", "sandboxLimit": limit}
    answer = await client.post("/api-keys", json={**body, **({"scopes": list(scopes)} if scopes else {})})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["key"])


def refusal(answer: httpx.Response) -> str:
    """The message of a 403 for a missing scope."""
    assert answer.status_code == 403, answer.text
    assert answer.json()["error_code"] == "missing_scope"
    assert answer.headers["should-retry"] == "false"
    return str(answer.json()["message"])


async def test_a_key_that_may_read_sees_and_changes_nothing(world: World) -> None:
    created = await world.create()
    path = f"/sandboxes/{created['sandboxID']}"

    async with limited(world, "sandboxes:read") as reader:
        listed = await reader.get("/v2/sandboxes")
        detail = await reader.get(path)
        for attempt in (
            reader.post("/v2/sandboxes", json=SANDBOX),
            reader.post("/v1/sandboxes", json=SANDBOX),
            reader.post("/sandboxes", json={**SANDBOX, "secure": True}),
            reader.delete(path),
            reader.post(f"{path}/pause"),
            reader.post(f"{path}/fork"),
            reader.post(f"/v2{path}/connect"),
            reader.put(f"{path}/network", json={}),
        ):
            message = refusal(await attempt)
            assert "'sandboxes:write'" in message
            assert "emberbox key create --scope sandboxes:write" in message
        assert "'templates'" in refusal(await reader.get("/templates"))
        assert "'admin'" in refusal(await reader.get("/api-keys"))
        assert "'admin'" in refusal(await reader.post("/access-tokens", json={"name": "wide"}))

    assert [one["sandboxID"] for one in listed.json()] == [created["sandboxID"]]
    assert "envdAccessToken" not in detail.json()
    assert await world.state_of(created["sandboxID"]) == "running"


async def test_a_key_without_exec_gets_no_tokens_and_makes_nothing_open_to_all(world: World) -> None:
    closed = {**SANDBOX, "network": {"allowPublicTraffic": False}}
    async with limited(world, "sandboxes:read", "sandboxes:write") as writer:
        first = (await writer.post("/v2/sandboxes", json=closed)).json()
        path = f"/sandboxes/{first['sandboxID']}"
        answers = [first, (await writer.get(path)).json(), (await writer.post(f"/v2{path}/connect")).json()]
        answers += [each["sandbox"] for each in (await writer.post(f"{path}/fork")).json()]
        await writer.post(f"{path}/pause")
        answers.append((await writer.post(f"{path}/resume")).json())
        opened = await writer.post("/sandboxes", json=SANDBOX)

        assert len(answers) == 5
        for answer in answers:
            assert answer["sandboxID"]
            assert not {"envdAccessToken", "trafficAccessToken"} & set(answer)
        assert "'sandboxes:exec'" in refusal(opened)

    unsecured = (await world.client.post("/sandboxes", json=SANDBOX)).json()
    async with limited(world, "sandboxes:write") as writer:
        assert "'sandboxes:exec'" in refusal(await writer.post(f"/sandboxes/{unsecured['sandboxID']}/fork"))
    async with limited(world, "sandboxes:write", "sandboxes:exec") as both:
        assert {"envdAccessToken", "trafficAccessToken"} <= set((await both.post("/v2/sandboxes", json=closed)).json())


async def test_a_key_for_templates_also_sees_and_builds_those_that_ship(world: World) -> None:
    async with limited(world, "templates") as builder, limited(world, "sandboxes:read") as reader:
        names = await builder.get("/shipped-templates")
        unknown = await builder.post("/shipped-templates/nothing/builds")

        assert (names.status_code, unknown.status_code) == (200, 404)
        assert "'templates'" in refusal(await reader.get("/shipped-templates"))
        assert "'templates'" in refusal(await reader.post("/shipped-templates/nothing/builds"))


async def test_a_scope_holds_for_every_sandbox_of_the_team_and_for_no_other(world: World) -> None:
    made_by_another_key = (await world.create())["sandboxID"]
    _, strangers_key = await world.other_team()
    async with world.client_with(X_API_Key=strangers_key) as stranger:
        strangers = (await stranger.post("/v2/sandboxes", json=SANDBOX)).json()["sandboxID"]

    async with limited(world, "sandboxes:write") as writer:
        saved = await writer.post(f"/sandboxes/{made_by_another_key}/snapshots", json={})
        opened = await writer.put(f"/sandboxes/{made_by_another_key}/network", json={"allow_internet_access": True})
        killed = await writer.delete(f"/sandboxes/{made_by_another_key}")
        not_there = [
            await writer.post(f"/sandboxes/{strangers}/snapshots", json={}),
            await writer.put(f"/sandboxes/{strangers}/network", json={}),
            await writer.delete(f"/sandboxes/{strangers}"),
        ]

    assert [answer.status_code for answer in (saved, opened, killed)] == [201, 204, 204]
    assert [answer.status_code for answer in not_there] == [404, 404, 404]
    assert await world.state_of(strangers) == "running"


async def test_a_key_for_keys_deletes_wider_ones(world: World) -> None:
    async with limited(world, "admin") as admin:
        (wide, *_) = [key for key in (await admin.get("/api-keys")).json() if "scopes" not in key]
        deleted = await admin.delete(f"/api-keys/{wide['id']}")

    assert deleted.status_code == 204
    assert (await world.client.get("/v2/sandboxes")).status_code == 401


async def test_a_limited_key_makes_no_wider_one(world: World) -> None:
    async with limited(world, "admin", "sandboxes:read") as admin:
        for body in ({"name": "wide"}, {"name": "wide", "scopes": ["admin", "sandboxes:write"]}):
            assert (await admin.post("/api-keys", json=body)).status_code == 403, body
        assert (await admin.post("/access-tokens", json={"name": "wide"})).status_code == 403

        async with limited(world, "sandboxes:read", limit=3, by=admin) as narrow:
            assert (await narrow.get("/v2/sandboxes")).status_code == 200
            assert (await narrow.post("/api-keys", json={"name": "more"})).status_code == 403
    async with limited(world, "admin", limit=3) as counted:
        another = {"name": "as many again", "scopes": ["admin"], "sandboxLimit": 3}
        assert (await counted.post("/api-keys", json=another)).status_code == 403


async def test_keys_say_what_they_may_and_wrong_limits_are_refused(world: World) -> None:
    await made(world.client, "templates", "sandboxes:read", limit=2)

    shown = (await world.client.get("/api-keys")).json()
    wrong = await world.client.post("/api-keys", json={"name": "x", "scopes": ["sandboxes"]})
    none = await world.client.post("/api-keys", json={"name": "x", "scopes": []})
    unknown = await world.client.post("/api-keys", json={"name": "x", "limit": 1})
    zero = await world.client.post("/api-keys", json={"name": "x", "sandboxLimit": 0})

    assert [(key.get("scopes"), key.get("sandboxLimit")) for key in shown] == [
        (None, None),
        (["sandboxes:read", "templates"], 2),
    ]
    assert "scopes" not in shown[0]
    assert [answer.status_code for answer in (wrong, none, zero, unknown)] == [400] * 4
    assert "there are: sandboxes:read" in wrong.json()["message"]


async def test_a_keys_sandboxes_are_counted_running_or_paused(world: World) -> None:
    async with limited(world, "sandboxes:write", "sandboxes:read", limit=2) as client:
        first = (await client.post("/v2/sandboxes", json=SANDBOX)).json()["sandboxID"]
        await client.post("/v2/sandboxes", json=SANDBOX)
        await client.post(f"/sandboxes/{first}/pause")

        third = await client.post("/v2/sandboxes", json=SANDBOX)
        await client.post(f"/v2/sandboxes/{first}/connect")
        fork = await client.post(f"/sandboxes/{first}/fork")
        others = await world.client.post("/v2/sandboxes", json=SANDBOX)
        await client.delete(f"/sandboxes/{first}")
        again = await client.post("/v2/sandboxes", json=SANDBOX)

    for refused in (third, fork):
        assert refused.status_code == 429, refused.text
        assert "2 sandboxes" in refused.json()["message"]
        assert refused.headers["should-retry"] == "false"
    assert (others.status_code, again.status_code) == (201, 201)


async def test_creates_at_once_do_not_pass_the_limit(world: World) -> None:
    async with limited(world, "sandboxes:write", limit=3) as client:
        answers = await asyncio.gather(*(client.post("/v2/sandboxes", json=SANDBOX) for _ in range(12)))

    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [429] * 9


async def test_a_repeated_create_gives_the_earlier_sandbox_also_at_the_limit(world: World) -> None:
    """Limits of the key and of the team: a repeated create makes nothing, so it passes none."""
    again = {"Idempotency-Key": "one"}
    async with limited(world, "sandboxes:write", limit=1) as client:
        first = await client.post("/v2/sandboxes", json=SANDBOX, headers=again)
        await set_limits(world, world.team_id, max_timeout_seconds=1)
        repeated = await client.post("/v2/sandboxes", json=SANDBOX, headers=again)
        another = await client.post("/v2/sandboxes", json={**SANDBOX, "timeout": 1}, headers={"Idempotency-Key": "two"})
        await set_limits(world, world.team_id, max_sandboxes=1)
        of_team = await world.client.post("/v2/sandboxes", json=SANDBOX, headers=again)

    assert [answer.status_code for answer in (first, repeated, another, of_team)] == [201, 201, 429, 201]
    assert repeated.json() == first.json()
    assert of_team.json()["sandboxID"] == first.json()["sandboxID"]
    assert len(world.node.machines) == 1


async def test_a_create_repeated_at_once_is_never_counted_twice(world: World) -> None:
    again = {"Idempotency-Key": "one"}
    async with limited(world, "sandboxes:write", limit=1) as client:
        answers = await asyncio.gather(*(client.post("/v2/sandboxes", json=SANDBOX, headers=again) for _ in range(12)))

    made_or_under_way = {(201, None), (409, "idempotency_in_progress")}
    assert {(answer.status_code, answer.json().get("error_code")) for answer in answers} <= made_or_under_way
    assert len({answer.text for answer in answers if answer.status_code == 201}) == 1
    assert len(world.node.machines) == 1


async def test_a_repeated_create_needs_neither_template_nor_node(world: World) -> None:
    again = {"Idempotency-Key": "one"}
    source = await world.create()
    saved = await world.client.post(f"/sandboxes/{source['sandboxID']}/snapshots", json={"name": "kept"})
    body = {"templateID": saved.json()["snapshotID"]}
    first = await world.client.post("/v2/sandboxes", json=body, headers=again)
    await world.client.delete("/templates/kept")

    deleted = await world.client.post("/v2/sandboxes", json=body, headers=again)
    async with world.client_with(X_Admin_Token=ADMIN_TOKEN) as admin:
        await admin.post(f"/nodes/{world.node.node_id}", json={"status": "draining"})
    drained = await world.client.post("/v2/sandboxes", json=body, headers=again)
    another = await world.client.post("/v2/sandboxes", json=SANDBOX, headers={"Idempotency-Key": "two"})

    assert [answer.status_code for answer in (first, deleted, drained, another)] == [201, 201, 201, 503]
    assert first.json() == deleted.json() == drained.json()


async def test_the_administrator_is_not_limited(world: World) -> None:
    async with world.client_with(X_Admin_Token=ADMIN_TOKEN, X_Team_ID=world.team_id) as client:
        created = await client.post("/v2/sandboxes", json=SANDBOX)

    assert "envdAccessToken" in created.json()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_tools_refuse_as_the_rest_api_does(mode: str) -> None:
    with live_world() as (world, url):
        keyed = {"X-API-Key": world.key}
        async with httpx.AsyncClient(base_url=url, headers=keyed, trust_env=False, timeout=60) as rest:
            it = {"sandboxID": (await rest.post("/v2/sandboxes", json=SANDBOX)).json()["sandboxID"]}
            key = await made(rest, "sandboxes:read", "sandboxes:write", limit=1)
            other = await made(rest, "templates")
        async with connected(url, key, mode) as client:

            async def message(tool: str, **arguments: Any) -> str:
                answer = await client.call_tool(tool, arguments)
                assert answer.is_error, answer.structured_content
                return str(answer.content[0].text)

            for tool, arguments in (
                ("e2b-run-command", {"command": "true"}),
                ("e2b-run-code", {"code": "1"}),
                ("e2b-read-file", {"path": "/etc/passwd"}),
                ("e2b-write-file", {"path": "/tmp/x", "content": "x"}),
                ("e2b-list-files", {}),
                ("e2b-get-url", {"port": 8000}),
            ):
                assert "'sandboxes:exec'" in await message(tool, **it, **arguments)
            assert "'sandboxes:exec'" in await message("e2b-create-sandbox", templateID="base", secure=False)
            made_by_tool = await client.call_tool("e2b-create-sandbox", {"templateID": "base"})
            assert not made_by_tool.is_error
            assert "envdAccessToken" not in made_by_tool.structured_content
            assert "1 sandbox " in await message("e2b-create-sandbox", templateID="base")
            with pytest.raises(Exception, match="templates"):
                await client.read_resource("emberbox://templates")
        async with connected(url, other, mode) as client:
            answer = await client.call_tool("e2b-list-sandboxes", {})
            assert answer.is_error
            assert "'sandboxes:read'" in answer.content[0].text
