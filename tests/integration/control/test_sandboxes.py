"""Creating, reading, listing and ending sandboxes through the API."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from emberbox.api.paging import encode
from emberbox.wire import node_pb2 as pb
from tests.support.control import World, eventually, set_limits


async def test_a_create_answers_when_the_machine_runs_and_its_route_is_set(world: World) -> None:
    created = await world.create(metadata={"who": "me"}, envVars={"A": "b"}, timeout=60)

    machine = world.node.machines[created["sandboxID"]]
    assert machine.request.env_vars == {"A": "b"}
    assert machine.request.access_token == created["envdAccessToken"]
    assert list(machine.request.image.layers) == world.node.layers
    route = world.edge.routes[created["sandboxID"]]
    assert route.address == machine.status.address
    assert route.traffic_token_sha256 == ""
    assert created["domain"] == world.settings.sandbox_domain
    assert created["envdVersion"] == "0.6.4"
    assert created["alias"] == "base"
    assert "-" not in created["sandboxID"]


async def test_the_first_version_creates_unsecured_sandboxes_unless_asked(world: World) -> None:
    plain = (await world.client.post("/sandboxes", json={"templateID": "base"})).json()
    secured = (await world.client.post("/sandboxes", json={"templateID": "base", "secure": True})).json()

    assert "envdAccessToken" not in plain
    assert world.node.machines[plain["sandboxID"]].request.access_token == ""
    assert world.node.machines[secured["sandboxID"]].request.access_token == secured["envdAccessToken"]


async def test_private_traffic_gives_a_token_that_the_edge_knows_by_its_hash(world: World) -> None:
    created = await world.create(network={"allowPublicTraffic": False, "httpsPorts": [8443]})

    token = created["trafficAccessToken"]
    route = world.edge.routes[created["sandboxID"]]
    assert route.traffic_token_sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert list(route.https_ports) == [8443]


async def test_tokens_are_told_again_and_lie_nowhere_in_the_database(world: World) -> None:
    created = await world.create()

    detail = (await world.client.get(f"/sandboxes/{created['sandboxID']}")).json()

    assert detail["envdAccessToken"] == created["envdAccessToken"]
    stored = b"".join(path.read_bytes() for path in world.settings.api_dir.glob("emberbox.db*"))
    assert created["sandboxID"].encode() in stored
    assert created["envdAccessToken"].encode() not in stored
    assert world.key.encode() not in stored


async def test_an_unknown_template_is_404_with_a_suggestion(world: World) -> None:
    answer = await world.client.post("/v2/sandboxes", json={"templateID": "bse"})

    assert answer.status_code == 404
    assert answer.json() == {"code": 404, "message": "template 'bse' not found; did you mean 'base'?"}
    assert answer.headers["should-retry"] == "false"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"timeout": 86401}, "longer than the 86400 s"),
        ({"timeout": -1}, "greater than or equal to 0"),
        ({"autoResume": {"enabled": True}}, "needs autoPause"),
        ({"autoPause": True, "autoPauseMemory": False, "autoResume": {"enabled": True}}, "autoPauseMemory"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "NUL"),
        ({"network": {"denyOut": ["example.com"]}}, "denyOut"),
        ({"network": {"allowOut": ["example.com"]}}, "0.0.0.0/0"),
        ({"network": {"httpsPorts": [49983]}}, "httpsPorts"),
        ({"network": {"httpsPorts": list(range(1, 102))}}, "101 entries; 100 are allowed"),
        ({"network": {"egressProxy": {"address": "nowhere"}}}, "host:port"),
        ({"templateID": "Not A Name!"}, "not a template name"),
    ],
)
async def test_what_cannot_be_used_is_400_and_leaves_nothing(world: World, body: dict[str, object], words: str) -> None:
    answer = await world.client.post("/v2/sandboxes", json={"templateID": "base", **body})

    assert answer.status_code == 400
    assert words in answer.json()["message"]
    assert world.node.machines == {}
    assert (await world.client.get("/v2/sandboxes")).json() == []


async def test_the_same_idempotency_key_and_body_give_the_same_sandbox(world: World) -> None:
    send = {"templateID": "base", "metadata": {"a": "1"}}
    headers = {"Idempotency-Key": "one"}

    answers = [await world.client.post("/v2/sandboxes", json=send, headers=headers) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [201, 201, 201]
    assert len({answer.text for answer in answers}) == 1
    assert len(world.node.machines) == 1


async def test_the_same_idempotency_key_with_another_body_is_422(world: World) -> None:
    headers = {"Idempotency-Key": "one"}
    await world.client.post("/v2/sandboxes", json={"templateID": "base"}, headers=headers)

    answer = await world.client.post("/v2/sandboxes", json={"templateID": "base", "timeout": 5}, headers=headers)

    assert answer.status_code == 422
    assert answer.json()["error_code"] == "idempotency_request_mismatch"


async def test_an_idempotency_key_in_use_is_409_and_a_failed_one_is_free_again(world: World) -> None:
    waiting, go = asyncio.Event(), asyncio.Event()

    async def wait_and_fail(_request: object) -> None:
        waiting.set()
        await go.wait()
        raise RuntimeError("the machine did not start")

    world.node.before["Create"] = wait_and_fail
    headers = {"Idempotency-Key": "one"}
    first = asyncio.create_task(world.client.post("/v2/sandboxes", json={"templateID": "base"}, headers=headers))
    await waiting.wait()

    second = await world.client.post("/v2/sandboxes", json={"templateID": "base"}, headers=headers)
    go.set()
    failed = await first
    world.node.before.clear()
    third = await world.client.post("/v2/sandboxes", json={"templateID": "base"}, headers=headers)

    assert (second.status_code, second.json()["error_code"]) == (409, "idempotency_in_progress")
    assert failed.status_code == 500
    assert third.status_code == 201


async def test_a_create_that_fails_leaves_nothing_behind(world: World) -> None:
    async def fail(_request: object) -> None:
        raise RuntimeError("no disk")

    world.node.before["Create"] = fail
    answer = await world.client.post("/v2/sandboxes", json={"templateID": "base"})

    assert answer.status_code == 500
    assert (await world.client.get("/v2/sandboxes")).json() == []
    assert world.edge.routes == {}
    assert world.node.machines == {}


async def test_a_kill_ends_the_machine_and_its_route_and_twice_is_404(world: World) -> None:
    created = await world.create()

    first = await world.client.delete(f"/sandboxes/{created['sandboxID']}")
    second = await world.client.delete(f"/sandboxes/{created['sandboxID']}")

    assert (first.status_code, second.status_code) == (204, 404)
    assert world.node.machines == {}
    assert world.edge.routes == {}
    calls = [name for name, _ in world.edge.calls]
    assert calls.index("DropRoute") > calls.index("SetRoute")


async def test_the_route_goes_before_the_machine(world: World) -> None:
    created = await world.create()
    routes_at_kill: list[bool] = []

    async def look(_request: object) -> None:
        routes_at_kill.append(created["sandboxID"] in world.edge.routes)

    world.node.before["Kill"] = world.node.before["Pause"] = look
    await world.client.post(f"/sandboxes/{created['sandboxID']}/pause")
    await world.client.delete(f"/sandboxes/{created['sandboxID']}")

    assert routes_at_kill == [False, False]


async def test_creates_succeed_while_the_edge_is_away(world: World) -> None:
    await world.edge.stop()

    created = await world.create()

    assert created["sandboxID"] in world.node.machines


async def test_a_node_that_is_away_is_503_and_says_that_a_retry_may_help(world: World) -> None:
    await world.node.stop()

    answer = await world.client.post("/v2/sandboxes", json={"templateID": "base"})

    assert answer.status_code == 503
    assert answer.headers["should-retry"] == "true"


async def test_the_limit_of_sandboxes_is_429_and_a_paused_one_does_not_count(world: World) -> None:
    await set_limits(world, world.team_id, max_sandboxes=2)
    first = await world.create()
    await world.create()

    refused = await world.client.post("/v2/sandboxes", json={"templateID": "base"})
    await world.client.post(f"/sandboxes/{first['sandboxID']}/pause")
    third = await world.client.post("/v2/sandboxes", json={"templateID": "base"})
    resumed = await world.client.post(f"/sandboxes/{first['sandboxID']}/resume", json={})

    assert refused.status_code == 429
    assert refused.headers["retry-after"].isdigit()
    assert third.status_code == 201
    assert resumed.status_code == 429
    assert await world.state_of(first["sandboxID"]) == "paused"


async def test_a_hundred_creates_at_once_respect_the_limit(world: World) -> None:
    await set_limits(world, world.team_id, max_sandboxes=60)

    answers = await asyncio.gather(
        *(world.client.post("/v2/sandboxes", json={"templateID": "base"}) for _ in range(100))
    )

    statuses = [answer.status_code for answer in answers]
    assert statuses.count(201) == 60
    assert statuses.count(429) == 40
    assert len(world.node.machines) == 60


async def test_another_team_sees_none_of_it(world: World) -> None:
    created = await world.create()
    sandbox_id = created["sandboxID"]
    _, key = await world.other_team()

    async with world.client_with(X_API_Key=key) as stranger:
        statuses = {
            "get": (await stranger.get(f"/sandboxes/{sandbox_id}")).status_code,
            "kill": (await stranger.delete(f"/sandboxes/{sandbox_id}")).status_code,
            "pause": (await stranger.post(f"/sandboxes/{sandbox_id}/pause")).status_code,
            "connect": (await stranger.post(f"/v2/sandboxes/{sandbox_id}/connect", json={})).status_code,
            "timeout": (await stranger.post(f"/sandboxes/{sandbox_id}/timeout", json={"timeout": 1})).status_code,
            "logs": (await stranger.get(f"/v2/sandboxes/{sandbox_id}/logs")).status_code,
            "metrics": (await stranger.get(f"/sandboxes/{sandbox_id}/metrics")).status_code,
            "snapshot": (await stranger.post(f"/sandboxes/{sandbox_id}/snapshots", json={})).status_code,
        }
        listed = (await stranger.get("/v2/sandboxes")).json()
        batch = (await stranger.get(f"/sandboxes/metrics?sandbox_ids={sandbox_id}")).json()

    assert set(statuses.values()) == {404}, statuses
    assert listed == []
    assert batch == {"sandboxes": {}}
    assert await world.state_of(sandbox_id) == "running"


async def test_lists_filter_order_and_page(world: World) -> None:
    made = [(await world.create(metadata={"n": str(number), "all": "x y&z=%"}))["sandboxID"] for number in range(7)]
    await world.client.post(f"/sandboxes/{made[3]}/pause")

    pages: list[list[str]] = []
    token: str | None = None
    while True:
        params = {"limit": "3", "order": "asc", **({"nextToken": token} if token else {})}
        answer = await world.client.get("/v2/sandboxes", params=params)
        pages.append([entry["sandboxID"] for entry in answer.json()])
        assert answer.headers["x-total-running"] == "6"
        token = answer.headers.get("x-next-token")
        if token is None:
            break
    newest_first = [entry["sandboxID"] for entry in (await world.client.get("/v2/sandboxes")).json()]
    paused = (await world.client.get("/v2/sandboxes?state=paused")).json()
    running = (await world.client.get("/sandboxes")).json()
    # Clients encode each key and value before they encode the whole.
    one = (await world.client.get("/v2/sandboxes", params={"metadata": "n=5&all=x%2520y%2526z%253D%2525"})).json()
    none = (await world.client.get("/v2/sandboxes", params={"metadata": "n=5&all=other"})).json()
    by_template = (await world.client.get("/v2/sandboxes", params={"template": "base"})).json()
    by_unknown = (await world.client.get("/v2/sandboxes", params={"template": "nothing"})).json()

    assert [sandbox_id for page in pages for sandbox_id in page] == made
    assert [len(page) for page in pages] == [3, 3, 1]
    assert newest_first == made[::-1]
    assert [entry["sandboxID"] for entry in paused] == [made[3]]
    assert len(running) == 6
    assert [entry["sandboxID"] for entry in one] == [made[5]]
    assert none == []
    assert len(by_template) == 7
    assert by_unknown == []


async def test_started_after_leaves_older_ones_out(world: World) -> None:
    await world.create()
    await asyncio.sleep(0.01)
    second = await world.create()
    started = (await world.client.get(f"/sandboxes/{second['sandboxID']}")).json()["startedAt"]

    answer = await world.client.get("/v2/sandboxes", params={"startedAfter": started})

    assert [entry["sandboxID"] for entry in answer.json()] == [second["sandboxID"]]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "nextToken=nonsense",
        f"nextToken={encode((1, chr(0xD800)))}",
        f"nextToken={encode((1, chr(0)))}",
        f"nextToken={encode((2**53, 'i'))}",
        "order=up",
        "state=dead",
        "metadata=nothing",
        "startedAfter=x",
    ],
)
async def test_list_parameters_that_cannot_be_used_are_400(world: World, query: str) -> None:
    answer = await world.client.get(f"/v2/sandboxes?{query}")

    assert answer.status_code == 400
    assert set(answer.json()) == {"code", "message"}


async def test_metrics_are_kept_from_the_nodes_samples(world: World) -> None:
    created = await world.create()
    sandbox_id = created["sandboxID"]
    for second in (1_700_000_000, 1_700_000_005):
        await world.node.sample(
            pb.MachineSample(
                sandbox_id=sandbox_id,
                timestamp_unix_ms=second * 1000,
                cpu_count=2,
                cpu_used_percent=12.5,
                memory_used_bytes=second,
                memory_total_bytes=2,
                memory_cache_bytes=3,
                disk_used_bytes=4,
                disk_total_bytes=5,
            )
        )

    async def both_are_there() -> bool:
        return len((await world.client.get(f"/sandboxes/{sandbox_id}/metrics?start=1699999999")).json()) == 2

    await eventually(both_are_there)
    part = (await world.client.get(f"/sandboxes/{sandbox_id}/metrics?start=1700000003&end=1700000006")).json()
    batch = (await world.client.get(f"/sandboxes/metrics?sandbox_ids={sandbox_id},other")).json()
    team = (await world.client.get(f"/teams/{world.team_id}/metrics")).json()
    most = (await world.client.get(f"/teams/{world.team_id}/metrics/max?metric=concurrent_sandboxes")).json()

    assert [(entry["timestampUnix"], entry["memUsed"]) for entry in part] == [(1_700_000_005, 1_700_000_005)]
    assert batch["sandboxes"][sandbox_id]["timestampUnix"] == 1_700_000_005
    assert team[-1]["concurrentSandboxes"] == 1
    assert most["value"] == 1


async def test_logs_come_from_the_node_in_both_shapes(world: World) -> None:
    created = await world.create()

    old = (await world.client.get(f"/sandboxes/{created['sandboxID']}/logs")).json()
    new = (await world.client.get(f"/v2/sandboxes/{created['sandboxID']}/logs?limit=5&direction=backward")).json()

    assert old["logEntries"] == new["logs"]
    assert new["logs"][0]["message"] == "machine started"
    assert "machine started" in old["logs"][0]["line"]
