"""The node's client of the agent, against a server that says exactly what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address
from typing import Any

import pytest

from emberbox.node.agent import Agent
from emberbox.node.errors import AgentFailure

Answers = Callable[..., Any]


@pytest.fixture
async def answers() -> AsyncIterator[Answers]:
    """Start a server that sends the given bytes to whoever asks; gives an agent client and the requests it got."""
    servers: list[asyncio.Server] = []

    async def start(*parts: bytes, scale: float = 1.0) -> tuple[Agent, list[bytes]]:
        requests: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            requests.append(head + await reader.readexactly(length))
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.005)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        port = server.sockets[0].getsockname()[1]
        return Agent(IPv4Address("127.0.0.1"), "secret", time_scale=scale, port=port), requests

    yield start
    for server in servers:
        server.close()


def frame(message: Any, flags: int = 0) -> bytes:
    data = json.dumps(message).encode()
    return bytes([flags]) + len(data).to_bytes(4, "big") + data


def chunked(*parts: bytes) -> list[bytes]:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(part), part) for part in parts), b"0\r\n\r\n"]


async def run(agent: Agent) -> int:
    return await agent.run_command("true", user="user", workdir="", token="t", timeout=60)


async def test_init_carries_the_secret_and_the_body(answers: Answers) -> None:
    agent, requests = await answers(b"HTTP/1.1 204 No Content\r\n\r\n")

    await agent.init(lambda: {"sandboxID": "s1"})

    assert b"X-Ember-Control: secret\r\n" in requests[0]
    assert requests[0].endswith(b'{"sandboxID": "s1"}')


async def test_a_refusal_is_told_with_its_words(answers: Answers) -> None:
    agent, _ = await answers(b"HTTP/1.1 400 Bad\r\nContent-Length: 11\r\n\r\nbad user id")

    with pytest.raises(AgentFailure, match="answered 400 to /init: bad user id"):
        await agent.init(dict)


async def test_an_answer_that_breaks_off_is_a_failure(answers: Answers) -> None:
    agent, _ = await answers(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")

    with pytest.raises(AgentFailure, match="closed before the whole answer"):
        await agent.logs(0, 10)


async def test_garbage_is_a_failure(answers: Answers) -> None:
    agent, _ = await answers(b"\x00\x01 not HTTP at all\r\n\r\n")

    with pytest.raises(AgentFailure, match="/init failed"):
        await agent.init(dict)


async def test_an_agent_that_says_nothing_is_given_up(answers: Answers) -> None:
    agent, _ = await answers(*[b""] * 4000, scale=0.01)

    with pytest.raises(AgentFailure, match="did not answer /init within"):
        await agent.init(dict)


async def test_nobody_listening_is_waited_for_and_given_up() -> None:
    agent = Agent(IPv4Address("127.0.0.1"), "secret", port=1)

    with pytest.raises(AgentFailure, match=r"did not answer /init within 0\.1 s"):
        await agent.init(dict, within=0.1)


async def test_what_it_is_told_is_made_when_it_listens() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))  # taken, and refused until it listens
    agent = Agent(IPv4Address("127.0.0.1"), "secret", port=listener.getsockname()[1])
    made: list[bool] = []
    up = False

    def body() -> dict[str, Any]:
        made.append(up)
        return {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    telling = asyncio.create_task(agent.init(body, within=30))
    await asyncio.sleep(0.05)
    up = True
    async with await asyncio.start_server(serve, sock=listener):
        await telling

    assert made == [True]


async def test_a_log_in_chunks_is_read_whole(answers: Answers) -> None:
    entry = {"seq": 3, "timestamp": "2026-01-01T00:00:00.5Z", "level": "info", "logger": "x", "message": "m"}
    body = json.dumps({"entries": [entry], "cursor": 3}).encode()
    agent, requests = await answers(*chunked(body[:7], body[7:]))

    (found,) = await agent.logs(2, 10)

    assert (found.seq, found.timestamp_ms, found.message) == (3, 1767225600500, "m")
    assert b"GET /logs?cursor=2&limit=10 " in requests[0]


@pytest.mark.parametrize(
    "body",
    [
        b'{"entries": [{"seq": "x"}]}',
        b'["x"]',
        b"7",
        b"[" * 100_000,
        b'[{"seq": 1e999, "timestamp": 1}]',
        b'[{"seq": 99999999999999999999, "timestamp": 1}]',
        b'[{"seq": 1, "timestamp": -5}]',
        b'[{"seq": 1, "timestamp": 1, "fields": ["a"]}]',
    ],
)
async def test_a_damaged_log_is_a_failure(answers: Answers, body: bytes) -> None:
    agent, _ = await answers(*chunked(body))

    with pytest.raises(AgentFailure, match="could not be read"):
        await agent.logs(0, 10)


async def test_a_log_entry_is_cut_to_a_sane_size(answers: Answers) -> None:
    entry = {"seq": 3, "timestamp": 1, "message": "m" * 100_000, "fields": {"a" * 100: "x" * 5000}}
    agent, _ = await answers(*chunked(json.dumps([entry]).encode()))

    (found,) = await agent.logs(2, 10)

    assert len(found.message) == 4096
    assert [(len(key), len(value)) for key, value in found.fields.items()] == [(64, 4096)]


@pytest.mark.parametrize(
    "message",
    [
        [],
        {"event": [1]},
        {"event": {"end": [1]}},
        {"event": {"end": {"exitCode": "x", "exited": True}}},
        {"event": {"end": {"exitCode": 1e300, "exited": True}}},
        {"event": {"data": [1]}},
        {"event": {"data": {"stdout": 7}}},
        {"event": {"data": {"stdout": "a"}}},
    ],
)
async def test_an_event_that_is_none_is_a_failure(answers: Answers, message: Any) -> None:
    agent, _ = await answers(*chunked(frame(message)))

    with pytest.raises(AgentFailure):
        async for _event in agent.stream(["true"], user="user", timeout=60):
            pass


async def test_a_commands_end_is_found_in_frames_cut_anywhere(answers: Answers) -> None:
    stream = (
        frame({"event": {"start": {"pid": 1}}})
        + frame({"event": {"data": {"stdout": "aGk="}}})
        + frame({"event": {"end": {"exitCode": 3, "exited": True, "status": "exit status 3"}}})
        + frame({}, flags=2)
    )
    agent, _ = await answers(*chunked(*(stream[i : i + 7] for i in range(0, len(stream), 7))))

    assert await run(agent) == 3


async def test_success_has_no_code_in_json(answers: Answers) -> None:
    agent, _ = await answers(*chunked(frame({"event": {"end": {"exited": True, "status": "exit status 0"}}})))

    assert await run(agent) == 0


async def test_a_command_ended_by_a_signal_is_not_a_success(answers: Answers) -> None:
    agent, _ = await answers(*chunked(frame({"event": {"end": {"status": "signal: killed"}}})))

    assert await run(agent) != 0


async def test_a_command_that_cannot_start_says_why(answers: Answers) -> None:
    error = {"error": {"code": "invalid_argument", "message": "cwd '/x' does not exist"}}
    agent, _ = await answers(*chunked(frame(error, flags=2)))

    with pytest.raises(AgentFailure, match="cwd '/x' does not exist"):
        await agent.start_command("serve", user="user", workdir="/x", token="", tag="start")


@pytest.fixture
async def flood() -> AsyncIterator[Callable[[bytes, bytes], Any]]:
    """Start a server that sends `head` and then `part` again and again, until the client goes away."""
    servers: list[asyncio.Server] = []

    async def start(head: bytes, part: bytes) -> Agent:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            with contextlib.suppress(OSError):
                while True:
                    writer.write(part)
                    await writer.drain()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        return Agent(IPv4Address("127.0.0.1"), "secret", port=server.sockets[0].getsockname()[1])

    yield start
    for server in servers:
        server.close()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MUCH = b"x" * 65536


@pytest.mark.parametrize(
    ("head", "part"),
    [
        pytest.param(CHUNKED, b"10000\r\n" + MUCH + b"\r\n", id="body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: ", MUCH, id="one header"),
        pytest.param(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 9000, id="many headers"),
        pytest.param(CHUNKED + b"1;", MUCH, id="chunk extension"),
    ],
)
async def test_an_answer_without_an_end_is_broken_off(flood: Any, head: bytes, part: bytes) -> None:
    """Root in the machine can answer in the agent's place."""
    agent = await flood(head, part)

    with pytest.raises(AgentFailure, match=r"longer than|failed"):
        await agent.logs(0, 1000)


async def test_a_command_whose_output_claims_to_be_endless_is_broken_off(flood: Any) -> None:
    agent = await flood(CHUNKED, b"10000\r\n" + b"\0\xff\xff\xff\xff" + b"x" * 65531 + b"\r\n")

    with pytest.raises(AgentFailure, match="longer than"):
        await run(agent)


async def test_others_have_their_turn_while_an_answer_comes(flood: Any) -> None:
    agent = await flood(CHUNKED, b"10000\r\n" + MUCH + b"\r\n")
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(take_turns())
    with pytest.raises(AgentFailure):
        await agent.logs(0, 1000)
    other.cancel()

    assert turns >= 4  # one for each part that came


async def test_a_thaw_waits_for_the_freeze_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberbox.node.agent._THAW_PAUSE", 0.01)
    answers = [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"] * 3 + [b"HTTP/1.1 204 No Content\r\n\r\n"]
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[asked])
        asked += 1
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        agent = Agent(IPv4Address("127.0.0.1"), "secret", port=server.sockets[0].getsockname()[1])
        await agent.thaw_files()

    assert asked == 4
