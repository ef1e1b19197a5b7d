"""Long-lived traffic: it flows both ways as it comes, stays while it is quiet, and ends with its sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import ssl
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.edge import DOMAIN, EDGE_PORT, Exchange, headers_for, make_certificate
from tests.support.networks import SMALL, Claim


async def _tell_then_wait(exchange: Exchange) -> None:
    await exchange.begin_chunks()
    await exchange.chunk(b"first")
    await exchange.reader.read(1)


@contextlib.asynccontextmanager
async def echoing_websockets(address: str, port: int) -> AsyncIterator[None]:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve_websockets(echo, address, port, max_size=None):
        yield


async def test_each_part_of_an_answer_arrives_before_the_next_is_sent(world: Any) -> None:
    go_on = asyncio.Event()

    async def in_two_parts(exchange: Exchange) -> None:
        await exchange.begin_chunks()
        await exchange.chunk(b"1")
        await go_on.wait()
        await exchange.chunk(b"2")
        await exchange.chunk(b"")

    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, in_two_parts)
    await world.routes.set(sandbox_id, machine.address)
    parts = []

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as answer:
        async for part in answer.aiter_raw():
            parts.append(part)
            go_on.set()

    assert parts == [b"1", b"2"]


async def test_a_request_body_arrives_as_it_is_sent(world: Any) -> None:
    arrived: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(exchange: Exchange) -> None:
        async for part in exchange.chunks():
            await arrived.put(part)
        await exchange.answer(b"done")

    async def send() -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"part %d" % number
            assert await asyncio.wait_for(arrived.get(), 60) == b"part %d" % number

    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, take)
    await world.routes.set(sandbox_id, machine.address)

    answer = await world.client.post("/", content=send(), headers=headers_for(sandbox_id))

    assert answer.text == "done"


async def test_a_big_body_goes_through_whole_in_both_directions(world: Any) -> None:
    block = os.urandom(1 << 20)
    blocks = 64

    async def give_back(exchange: Exchange) -> None:
        digest, size = hashlib.sha256(), int(exchange.headers["content-length"])
        while size:
            part = await exchange.reader.read(min(size, 1 << 20))
            digest.update(part)
            size -= len(part)
        head = f"HTTP/1.1 200 OK\r\nx-digest: {digest.hexdigest()}\r\ncontent-length: {len(block) * blocks}\r\n\r\n"
        exchange.writer.write(head.encode())
        for _ in range(blocks):
            exchange.writer.write(block)
            await exchange.writer.drain()

    async def send() -> AsyncIterator[bytes]:
        for _ in range(blocks):
            yield block

    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, give_back)
    await world.routes.set(sandbox_id, machine.address)
    headers = headers_for(sandbox_id, **{"Content-Length": str(len(block) * blocks)})

    answer = await world.client.post("/", content=send(), headers=headers)

    whole = hashlib.sha256(block * blocks).hexdigest()
    assert answer.headers["x-digest"] == whole
    assert hashlib.sha256(answer.content).hexdigest() == whole


async def test_a_websocket_goes_through_text_and_bytes(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await world.routes.set(sandbox_id, machine.address)
    uri = f"ws://8080-{sandbox_id}.{DOMAIN}:{EDGE_PORT}/chat"

    async with (
        echoing_websockets(machine.address, 8080),
        connect(uri, open_timeout=60, host=world.edge.address, port=EDGE_PORT, max_size=None) as socket,
    ):
        await socket.send("hällo")
        text = await socket.recv()
        await socket.send(bytes(range(256)) * 5000)
        data = await socket.recv()

    assert text == "hällo"
    assert data == bytes(range(256)) * 5000


async def test_a_websocket_to_a_closed_port_is_refused_in_words(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080)
    uri = f"ws://8081-{sandbox_id}.{DOMAIN}:{EDGE_PORT}/"

    with pytest.raises(InvalidStatus) as caught:
        await connect(uri, open_timeout=60, host=world.edge.address, port=EDGE_PORT)

    assert caught.value.response.status_code == 502
    assert b"port is not open" in caught.value.response.body


async def test_dropping_a_route_ends_an_open_answer(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, _tell_then_wait)
    await world.routes.set(sandbox_id, machine.address)

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as answer:
        parts = answer.aiter_raw()
        first = await anext(parts)
        await world.routes.drop(sandbox_id)
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(anext(parts), 60)

    assert first == b"first"


async def test_dropping_a_route_ends_an_open_websocket(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await world.routes.set(sandbox_id, machine.address)
    uri = f"ws://8080-{sandbox_id}.{DOMAIN}:{EDGE_PORT}/"

    async with (
        echoing_websockets(machine.address, 8080),
        connect(uri, open_timeout=60, host=world.edge.address, port=EDGE_PORT) as socket,
    ):
        await socket.send("x")
        await socket.recv()
        await world.routes.drop(sandbox_id)
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), 60)


async def test_dropping_a_route_ends_an_open_tls_stream(world: Any, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "whatever.test")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8443, _tell_then_wait, ssl=context)
    await world.routes.set(sandbox_id, machine.address, https_ports=[8443])

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id, 8443)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        await world.routes.drop(sandbox_id)
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(anext(parts), 60)


async def test_dropping_a_route_leaves_other_sandboxes_alone(world: Any) -> None:
    kept_id, kept = world.new_id(), await world.machine(9)
    await kept.listen(8080, _tell_then_wait)
    await world.routes.set(kept_id, kept.address)
    others = [await world.sandbox(8080) for _ in range(40)]

    async with world.client.stream("GET", "/", headers=headers_for(kept_id)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        for sandbox_id, _ in others:
            await world.routes.drop(sandbox_id)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(parts), 1)


async def test_a_route_that_moves_ends_what_runs_on_the_old_address(world: Any) -> None:
    sandbox_id, old = world.new_id(), await world.machine(9)
    await old.listen(8080, _tell_then_wait)
    new = await world.machine(8080)
    await world.routes.set(sandbox_id, old.address)

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        await world.routes.set(sandbox_id, new.address)
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(anext(parts), 60)

    moved = await world.client.get("/", headers=headers_for(sandbox_id))
    assert moved.json()["machine"] == new.address


async def test_a_program_that_hangs_up_without_an_answer_is_told(world: Any) -> None:
    async def hang_up(exchange: Exchange) -> None:
        exchange.writer.close()

    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, hang_up)
    await world.routes.set(sandbox_id, machine.address)

    answer = await world.client.post("/", headers=headers_for(sandbox_id))

    assert answer.status_code == 502
    assert "closed the connection" in answer.json()["message"]
    assert machine.seen == ["POST /"]


async def test_a_client_that_goes_away_is_noticed_by_the_program(world: Any) -> None:
    gone = asyncio.Event()

    async def wait_for_the_end(exchange: Exchange) -> None:
        try:
            await _tell_then_wait(exchange)
        finally:
            gone.set()

    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, wait_for_the_end)
    await world.routes.set(sandbox_id, machine.address)

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as answer:
        await anext(answer.aiter_raw())

    await asyncio.wait_for(gone.wait(), 60)


async def test_too_many_connections_to_one_sandbox_are_refused(new_world: Any) -> None:
    world = await new_world(connections_per_sandbox=3)
    full_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, _tell_then_wait)
    await world.routes.set(full_id, machine.address)
    other_id, _ = await world.sandbox(8080)

    async with contextlib.AsyncExitStack() as open_streams:
        for _ in range(3):
            await open_streams.enter_async_context(world.client.stream("GET", "/", headers=headers_for(full_id)))
        refused = await world.client.get("/", headers=headers_for(full_id))
        other = await world.client.get("/", headers=headers_for(other_id))
    # The edge has yet to see that they are closed.
    later = 429
    for _ in range(600):
        async with world.client.stream("GET", "/", headers=headers_for(full_id)) as answer:
            later = answer.status_code
        if later != 429:
            break
        await asyncio.sleep(0.05)

    assert refused.status_code == 429
    assert "too many connections" in refused.json()["message"]
    assert refused.headers["retry-after"] == "1"
    assert (other.status_code, later) == (200, 200)


async def test_http2_is_spoken_where_tls_is(new_world: Any, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, f"*.{DOMAIN}")
    world = await new_world(tls_cert=cert, tls_key=key)
    sandbox_id, _ = await world.sandbox(8080)
    context = ssl.create_default_context(cafile=str(cert))
    host = f"8080-{sandbox_id}.{DOMAIN}"

    tls = {"base_url": world.edge.tls_url, "http2": True, "verify": context, "trust_env": False, "timeout": 60}

    async with httpx.AsyncClient(**tls) as client:
        named = {"headers": {"Host": host}, "extensions": {"sni_hostname": host}}
        answers = await asyncio.gather(*(client.get(f"/{n}", **named) for n in range(50)))

    assert {answer.http_version for answer in answers} == {"HTTP/2"}
    assert {answer.json()["headers"]["x-forwarded-proto"] for answer in answers} == {"https"}
    assert {answer.json()["target"] for answer in answers} == {f"/{n}" for n in range(50)}


async def test_the_api_is_reached_by_name_over_tls(new_world: Any, tmp_path: Path) -> None:
    """With a domain and a wildcard certificate, clients need the domain and a key and nothing else."""
    cert, key = make_certificate(tmp_path, f"*.{DOMAIN}")
    world = await new_world(tls_cert=cert, tls_key=key)
    context = ssl.create_default_context(cafile=str(cert))
    host = f"api.{DOMAIN}"

    tls = {"base_url": world.edge.tls_url, "http2": True, "verify": context, "trust_env": False, "timeout": 60}

    async with httpx.AsyncClient(**tls) as client:
        answer = await client.post("/v2/sandboxes", headers={"Host": host}, extensions={"sni_hostname": host})

    assert answer.json()["target"] == "/v2/sandboxes"
    assert answer.json()["headers"]["x-forwarded-proto"] == "https"


async def test_http2_with_prior_knowledge_is_spoken_without_tls(world: Any) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    async with httpx.AsyncClient(http1=False, http2=True, timeout=60, trust_env=False) as client:
        answer = await client.get(world.edge.url, headers=headers_for(sandbox_id))

    assert answer.http_version == "HTTP/2"
    assert answer.json()["machine"] == machine.address


async def test_dropping_a_route_ends_its_http2_streams_and_keeps_the_connection(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, _tell_then_wait)
    await world.routes.set(sandbox_id, machine.address)
    other_id, other = await world.sandbox(8080)

    async with httpx.AsyncClient(http1=False, http2=True, timeout=60, trust_env=False) as client:
        async with client.stream("GET", world.edge.url, headers=headers_for(sandbox_id)) as answer:
            parts = answer.aiter_raw()
            await anext(parts)
            await world.routes.drop(sandbox_id)
            # HAProxy before 3.0 ends a cut HTTP/2 stream of unknown length as if it were whole; newer ones reset it.
            with pytest.raises((httpx.RemoteProtocolError, StopAsyncIteration)):
                await asyncio.wait_for(anext(parts), 60)
        after = await client.get(world.edge.url, headers=headers_for(other_id))

    assert after.json()["machine"] == other.address


@pytest.fixture
def far_machine() -> Iterator[tuple[str, Callable[[], None]]]:
    """An HTTP server in a network namespace of its own, and a way to make it vanish without a word."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace needs root")
    tag = uuid.uuid4().hex[:6]
    space, outside, inside = f"ebt-{tag}", f"ebt{tag}o", f"ebt{tag}i"
    claim = Claim(SMALL)
    host, machine = claim.network[1], claim.network[2]
    server = """
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline().strip(): pass
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n5\\r\\nfirst\\r\\n")
        self.rfile.read()
socketserver.ThreadingTCPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", space)
    process = None
    try:
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
        ip("addr", "add", f"{host}/30", "dev", outside)
        ip("link", "set", outside, "up")
        ip("-n", space, "addr", "add", f"{machine}/30", "dev", inside)
        ip("-n", space, "link", "set", inside, "up")
        process = subprocess.Popen(["ip", "netns", "exec", space, "python3", "-c", server])
        # The outer end stays up, so the host sends on and nobody answers.
        yield str(machine), lambda: ip("-n", space, "link", "set", inside, "down")
    finally:
        if process is not None:
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "del", outside], check=False, capture_output=True)
        ip("netns", "del", space)
        claim.release()


@pytest.mark.root
async def test_a_quiet_stream_to_a_machine_that_vanished_ends(
    world: Any, far_machine: tuple[str, Callable[[], None]]
) -> None:
    address, vanish = far_machine
    sandbox_id = world.new_id()
    await world.routes.set(sandbox_id, address)
    parts = None
    for _ in range(600):  # the server is starting
        answer = await world.client.send(
            world.client.build_request("GET", "/", headers=headers_for(sandbox_id)), stream=True
        )
        if answer.status_code == 200:
            parts = answer.aiter_raw()
            break
        await answer.aclose()
        await asyncio.sleep(0.1)
    assert parts is not None
    await anext(parts)
    with pytest.raises(TimeoutError):  # quiet, and alive
        await asyncio.wait_for(asyncio.shield(waiting := asyncio.ensure_future(anext(parts))), 3)
    begin = asyncio.get_running_loop().time()

    vanish()

    with pytest.raises(httpx.RemoteProtocolError):
        await asyncio.wait_for(waiting, 60)
    print(f"the stream ended {asyncio.get_running_loop().time() - begin:.1f} s after the machine vanished")
    await answer.aclose()
