"""The name forwarder with real sockets: slots are loopback addresses, the resolver is the test's."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from emberbox.node.dns import Forwarder
from emberbox.node.errors import NetworkFailure

SLOTS = IPv4Network("127.77.0.0/24")
REFUSED = 5


def _question(name: str) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", 1, 1)


class Resolver(asyncio.DatagramProtocol):
    """Answers every name with `count` addresses, by default new ones each time, as soon as `go` is set."""

    transport: asyncio.DatagramTransport

    def __init__(self) -> None:
        self.count = 1
        self.ttl = 300
        self.same = False
        self.go = asyncio.Event()
        self.go.set()
        self.asked = asyncio.Event()
        self._next = int(IPv4Address("20.0.0.0"))
        self._tasks: set[asyncio.Task[None]] = set()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        task = asyncio.create_task(self._answer(data, addr))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, query: bytes, sender: tuple[str, int]) -> None:
        self.asked.set()
        await self.go.wait()
        self.transport.sendto(self.answer(query), sender)

    async def serve_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        answer = self.answer(await reader.readexactly(size))
        writer.write(struct.pack("!H", len(answer)) + answer)
        await writer.drain()
        writer.close()

    def answer(self, query: bytes) -> bytes:
        first = self._next
        if not self.same:
            self._next += self.count
        records = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIHI", 1, 1, self.ttl, 4, first + number) for number in range(self.count)
        )
        return query[:2] + struct.pack("!5H", 0x8180, 1, self.count, 0, 0) + query[12:] + records


class Opened:
    """Stands for the firewall: what was let through, call by call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[str]]] = []
        self.refuse = False
        self.seconds = 0.0
        self.inside = self.most = 0

    async def __call__(self, index: int, addresses: list[tuple[str, int]]) -> None:
        self.calls.append((index, [address for address, _ in addresses]))
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(self.seconds)
        self.inside -= 1
        if self.refuse:
            raise NetworkFailure("the set is full")


@pytest.fixture
async def resolver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Resolver]:
    loop = asyncio.get_running_loop()
    stream = await asyncio.start_server(lambda r, w: protocol.serve_stream(r, w), "127.77.9.9", 0)
    port = stream.sockets[0].getsockname()[1]
    transport, protocol = await loop.create_datagram_endpoint(Resolver, local_addr=("127.77.9.9", port))
    protocol.transport = transport
    monkeypatch.setattr("emberbox.node.dns._PORT", port)
    yield protocol
    transport.close()
    stream.close()


@pytest.fixture
def opened() -> Opened:
    return Opened()


@pytest.fixture
async def forwarder(resolver: Resolver, opened: Opened) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(SLOTS, ("127.77.9.9",), opened)
    await forwarder.start()
    forwarder.configure(0, domains=("*.one.test",), listed_only=True)
    yield forwarder
    await forwarder.close()


async def ask(forwarder: Forwarder, name: str, *, index: int = 0) -> None:
    """Ask by UDP, and get an answer without an error."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.setblocking(False)
        asking.bind((str(SLOTS.network_address + 4 * index + 2), 0))
        await loop.sock_sendto(asking, _question(name), ("127.0.0.1", forwarder.port))
        async with asyncio.timeout(20):
            answer = await loop.sock_recv(asking, 65536)
    assert answer[3] & 15 == 0


async def test_an_address_is_let_through_once_while_it_holds(
    forwarder: Forwarder, resolver: Resolver, opened: Opened
) -> None:
    resolver.same = True

    await ask(forwarder, "a.one.test")
    await ask(forwarder, "a.one.test")

    assert opened.calls == [(0, ["20.0.0.0"])]


async def test_what_the_firewall_refused_is_tried_at_the_next_question(
    forwarder: Forwarder, resolver: Resolver, opened: Opened
) -> None:
    resolver.same = opened.refuse = True
    await ask(forwarder, "a.one.test")
    opened.refuse = False

    await ask(forwarder, "a.one.test")

    assert opened.calls == [(0, ["20.0.0.0"])] * 2


async def test_a_slots_answers_go_through_the_firewall_one_at_a_time(forwarder: Forwarder, opened: Opened) -> None:
    opened.seconds = 0.01

    await asyncio.gather(*(ask(forwarder, f"{number}.one.test") for number in range(8)))

    assert len(opened.calls) == 8
    assert opened.most == 1


async def test_a_slot_does_not_wait_for_anothers_answers(forwarder: Forwarder, opened: Opened) -> None:
    forwarder.configure(1, domains=("*.one.test",))

    async with forwarder.turn(1):
        await ask(forwarder, "a.one.test")

    assert opened.calls == [(0, ["20.0.0.0"])]


async def test_what_is_remembered_of_a_slot_is_bounded(
    forwarder: Forwarder, resolver: Resolver, opened: Opened
) -> None:
    resolver.count = 64

    for number in range(20):
        await ask(forwarder, f"{number}.one.test")

    assert sum(len(addresses) for _, addresses in opened.calls) == 20 * 64
    assert len(forwarder._askers[0].allowed) == 1024


async def test_addresses_whose_time_is_over_are_forgotten(
    forwarder: Forwarder, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberbox.node.dns._SHORTEST_SECONDS", 0)
    resolver.count, resolver.ttl = 10, 0

    for number in range(3):
        await ask(forwarder, f"{number}.one.test")

    assert len(forwarder._askers[0].allowed) == 10


async def test_nothing_is_remembered_of_what_the_firewall_refused(
    forwarder: Forwarder, resolver: Resolver, opened: Opened
) -> None:
    resolver.count, opened.refuse = 64, True

    await ask(forwarder, "a.one.test")

    assert not forwarder._askers[0].allowed


async def test_what_was_asked_under_other_rules_is_not_let_through(
    forwarder: Forwarder, resolver: Resolver, opened: Opened
) -> None:
    resolver.go.clear()
    asking = asyncio.create_task(ask(forwarder, "a.one.test"))
    await resolver.asked.wait()

    forwarder.configure(0, domains=("*.one.test",))
    resolver.go.set()
    await asking

    assert opened.calls == []


async def test_an_answer_that_waited_for_new_rules_is_not_let_through(forwarder: Forwarder, opened: Opened) -> None:
    async with forwarder.turn(0):
        asking = asyncio.create_task(ask(forwarder, "a.one.test"))
        while not forwarder.turn(0)._waiters:  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)
        forwarder.configure(0, domains=("*.two.test",), listed_only=True)
    await asking

    assert opened.calls == []


async def test_a_connection_made_under_other_rules_asks_under_the_new_ones(forwarder: Forwarder) -> None:
    async def code() -> int:
        writer.write(struct.pack("!H", len(query)) + query)
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        return (await reader.readexactly(size))[3] & 15

    query = _question("a.one.test")
    reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port, local_addr=("127.77.0.2", 0))
    before = await code()

    forwarder.configure(0, listed_only=True)

    assert (before, await code()) == (0, REFUSED)
    writer.close()


async def test_a_connection_ends_with_its_machine(forwarder: Forwarder) -> None:
    query = _question("a.one.test")
    reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port, local_addr=("127.77.0.2", 0))
    writer.write(struct.pack("!H", len(query)) + query)
    await reader.readexactly(2 + len(query))

    forwarder.forget(0)
    forwarder.configure(0)  # the next machine's
    writer.write(struct.pack("!H", len(query)) + query)

    rest = await reader.read()
    assert len(rest) == 16  # the first answer's record, and no second answer
    writer.close()
