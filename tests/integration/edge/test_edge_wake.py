"""A miss: the edge asks the control plane, and the same request goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.support.edge import EDGE_PORT, ControlPlane, Exchange, headers_for, raw_request


async def test_a_request_goes_on_to_the_sandbox_that_it_woke(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(8080)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        await world.routes.set(sandbox_id, machine.address)
        return "200 OK", {"address": machine.address}

    world.control.answer = wake

    answer = await world.client.post("/work?x=1", content=b"the body", headers=headers_for(sandbox_id))

    assert answer.status_code == 200
    assert answer.json()["target"] == "/work?x=1"
    assert answer.json()["body"] == "the body"
    assert world.control.questions == [{"sandboxID": sandbox_id, "port": 8080}]
    assert world.control.secrets == ["the-secret"]


async def test_the_answers_own_route_is_enough(world: Any) -> None:
    """An edge whose control plane cannot reach it learns the route by asking."""
    sandbox_id, machine = world.new_id(), await world.machine(8080)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        return "200 OK", {
            "address": machine.address,
            "trafficTokenSha256": None,
            "maskRequestHost": "h.test:${PORT}",
            "httpsPorts": [1, 2],
        }

    world.control.answer = wake

    answer = await world.client.get("/", headers=headers_for(sandbox_id))

    assert answer.json()["machine"] == machine.address
    assert answer.json()["headers"]["host"] == "h.test:8080"


async def test_the_traffic_token_is_asked_of_a_woken_sandbox_too(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(8080)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        return "200 OK", {"address": machine.address, "trafficTokenSha256": "0" * 64}

    world.control.answer = wake

    answer = await world.client.get("/", headers=headers_for(sandbox_id))

    assert answer.status_code == 403
    assert machine.seen == []


async def test_a_long_wake_is_waited_for(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(8080)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        await asyncio.sleep(6)
        return "200 OK", {"address": machine.address}

    world.control.answer = wake

    answer = await world.client.get("/", headers=headers_for(sandbox_id))

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("status", "code"),
    [("403 Forbidden", 403), ("409 Conflict", 409), ("429 Too Many Requests", 429), ("404 Not Found", 404)],
)
async def test_a_refusal_of_the_control_plane_is_passed_on(world: Any, status: str, code: int) -> None:
    sandbox_id = world.new_id()

    async def refuse(_question: dict[str, object]) -> tuple[str, object]:
        return status, {"sandboxId": sandbox_id, "message": 'no "quotes" & ünïcode \U0001f525\n', "code": code}

    world.control.answer = refuse

    answer = await world.client.get("/", headers=headers_for(sandbox_id))

    assert answer.status_code == code
    assert answer.json() == {"sandboxId": sandbox_id, "message": 'no "quotes" & ünïcode \U0001f525\n', "code": code}
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_a_refusal_is_a_page_for_a_browser_and_safe_in_it(world: Any) -> None:
    sandbox_id = world.new_id()

    async def refuse(_question: dict[str, object]) -> tuple[str, object]:
        return "403 Forbidden", {"message": "<script>alert(1)</script>"}

    world.control.answer = refuse

    answer = await world.client.get("/", headers=headers_for(sandbox_id, Accept="text/html"))

    assert answer.status_code == 403
    assert "<script>" not in answer.text
    assert "&#60;script&#62;" in answer.text


@pytest.mark.parametrize(
    ("status", "body"),
    [
        ("200 OK", b"not json"),
        ("200 OK", b"{}"),
        ("200 OK", b'{"address": "10.0.0.1|x"}'),
        ("200 OK", b"[" * 100_000),
        ("200 OK", b'{"address": "127.0.0.1", "maskRequestHost": "a b"}'),
        ("500 Oops", b"not json"),
        ("401 Unauthorized", b'{"detail": 1}'),
        ("200 OK", b'{"address": 5}'),
        ("200 OK", b'{"address": "127.0.0.1", "httpsPorts": 5}'),
        ("200 OK", b'{"address": "127.0.0.1", "httpsPorts": ["x"]}'),
        ("200 OK", b'{"address": "127.0.0.1", "trafficTokenSha256": {}}'),
    ],
)
async def test_an_answer_that_makes_no_sense_is_an_error_and_not_a_route(world: Any, status: str, body: bytes) -> None:
    async def confuse(_question: dict[str, object]) -> tuple[str, object]:
        return status, body

    world.control.answer = confuse

    answer = await world.client.get("/", headers=headers_for(world.new_id()))

    assert answer.status_code == 503
    assert "control plane" in answer.json()["message"]


async def test_many_requests_for_one_sandbox_are_few_questions(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(8080)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        await asyncio.sleep(0.5)
        return "200 OK", {"address": machine.address}

    world.control.answer = wake

    answers = await asyncio.gather(*(world.client.get("/", headers=headers_for(sandbox_id)) for _ in range(50)))

    assert {answer.status_code for answer in answers} == {200}
    assert len(world.control.questions) <= (threads := 64)
    assert len(world.control.questions) < 50, f"more than one question for each of at most {threads} threads"


async def test_a_client_that_goes_away_leaves_no_question_behind(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(8080)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        await asyncio.sleep(1)
        return "200 OK", {"address": machine.address}

    world.control.answer = wake
    hasty = [asyncio.create_task(world.client.get("/", headers=headers_for(world.new_id()))) for _ in range(40)]
    await asyncio.sleep(0.3)
    for task in hasty:
        task.cancel()
    await asyncio.gather(*hasty, return_exceptions=True)

    answer = await world.client.get("/", headers=headers_for(sandbox_id))

    assert answer.status_code == 200


async def test_an_unknown_sandbox_is_asked_for_about_once_a_second(world: Any) -> None:
    sandbox_id = world.new_id()

    answers = [await world.client.get("/", headers=headers_for(sandbox_id)) for _ in range(100)]

    assert {answer.status_code for answer in answers} == {502}
    assert 1 <= len(world.control.questions) < 50


async def test_a_route_counts_at_once_after_a_miss(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(8080)
    missed = await world.client.get("/", headers=headers_for(sandbox_id))

    await world.routes.set(sandbox_id, machine.address)

    answer = await world.client.get("/", headers=headers_for(sandbox_id))
    assert (missed.status_code, answer.status_code) == (502, 200)


async def test_a_sandbox_can_be_woken_a_second_after_it_was_missing(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(8080)
    missed = await world.client.get("/", headers=headers_for(sandbox_id))

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        return "200 OK", {"address": machine.address}

    world.control.answer = wake
    await asyncio.sleep(2.1)

    answer = await world.client.get("/", headers=headers_for(sandbox_id))
    assert (missed.status_code, answer.status_code) == (502, 200)


async def test_a_flood_of_unknown_sandboxes_is_held_off_and_others_are_served(own_world: Any) -> None:
    world = own_world
    sandbox_id, _ = await world.sandbox(8080)
    texts = [
        f"GET / HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: {world.new_id()}\r\nE2b-Sandbox-Port: 80\r\n\r\n"
        for _ in range(2000)
    ]

    answers = await asyncio.gather(*(raw_request(world.edge.address, EDGE_PORT, text) for text in texts))

    held_off = [answer for answer in answers if b" 429 " in answer.splitlines()[0]]
    not_found = [answer for answer in answers if b"was not found" in answer]
    assert len(held_off) + len(not_found) == len(answers)
    assert b"do not exist" in held_off[0]
    assert len(world.control.questions) < len(answers) * 0.9
    served = await world.client.get("/", headers=headers_for(sandbox_id))
    assert served.status_code == 200


async def test_a_control_plane_that_is_away_is_said_so(own_world: Any) -> None:
    await own_world.control.close()

    answer = await own_world.client.get("/", headers=headers_for(own_world.new_id()))

    assert answer.status_code == 503
    assert "control plane" in answer.json()["message"]


async def test_the_api_being_away_is_said_so(own_world: Any) -> None:
    await own_world.control.close()

    answer = await own_world.client.get("/sandboxes", headers={"Host": "api.sandboxes.test"})

    assert answer.status_code == 503
    assert answer.json() == {"code": 503, "message": "The API does not answer"}


async def test_the_secret_is_in_no_file_of_the_edge(own_world: Any) -> None:
    files = [path for path in own_world.edge.settings.edge_dir.rglob("*") if path.is_file()]

    holding = [path for path in files if b"the-secret" in path.read_bytes()]

    assert files
    assert holding == []


async def test_a_stream_of_the_request_that_woke_its_sandbox_ends_with_it(world: Any) -> None:
    async def tell_then_wait(exchange: Exchange) -> None:
        await exchange.begin_chunks()
        await exchange.chunk(b"first")
        await exchange.reader.read(1)

    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, tell_then_wait)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        await world.routes.set(sandbox_id, machine.address)
        return "200 OK", {"address": machine.address}

    world.control.answer = wake

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        await world.routes.drop(sandbox_id)
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(anext(parts), 60)


async def test_a_restart_of_the_control_plane_is_ridden_out(own_world: Any) -> None:
    world = own_world
    sandbox_id, machine = world.new_id(), await world.machine(8080)
    await world.control.close()
    asked = asyncio.create_task(world.client.get("/", headers=headers_for(sandbox_id)))
    await asyncio.sleep(0.5)
    back = ControlPlane(world.edge.api_address)
    world.machines.append(back)

    async def wake(_question: dict[str, object]) -> tuple[str, object]:
        return "200 OK", {"address": machine.address}

    back.answer = wake
    await back.start()

    answer = await asked
    assert answer.status_code == 200
