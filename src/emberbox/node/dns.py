"""The name forwarder: sandboxes ask their gateway, the node asks the host's resolvers.

One UDP and one TCP socket for all slots; the firewall leads the slots' port 53 here, and the sender's address (which
the firewall has checked) tells the slot. Answers are handed on as they are. For a slot with allowed domains the
addresses of those domains are let through the firewall before the answer is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import structlog

from emberbox.node.errors import NetworkFailure

log = structlog.get_logger("emberbox.node")

_PORT = 53
_ANSWER_SECONDS = 2.0
_TCP_IDLE_SECONDS = 10.0
_IN_FLIGHT_PER_SLOT = 128
_TCP_PER_SLOT = 16
_SHORTEST_SECONDS = 60
"""Programs keep an address longer than its time to live says; a connection must still be possible then."""
_LONGEST_SECONDS = 3600
_ADDRESSES_PER_ANSWER = 64
_PARTS_PER_ANSWER = 1024
"""Parts of names that are read of one answer. Whoever serves an allowed name writes it, and reading it holds up every
other sandbox."""
_REMEMBERED_PER_SLOT = 1024
"""Addresses that are known to be let through. One that is not remembered is let through again when it is asked for."""
_TELL_AGAIN_SECONDS = 60.0
_TYPE_A, _CLASS_IN = 1, 1
_SERVFAIL, _REFUSED = 2, 5
_READ_AGAIN_SECONDS = 5.0

AllowNames = Callable[[int, list[tuple[str, int]]], Awaitable[None]]
"""Called with the slot's index and pairs of address and seconds."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a slot may ask; see `Forwarder.configure`."""

    domains: tuple[str, ...]
    listed_only: bool
    upstreams: tuple[str, ...]


_NOTHING = _Rules(domains=(), listed_only=True, upstreams=())


@dataclass(slots=True)
class _Asker:
    """What the forwarder knows of one slot."""

    rules: _Rules = _NOTHING
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    in_flight: int = 0
    connections: int = 0
    allowed: dict[str, float] = field(default_factory=dict)
    """Addresses that the firewall lets through, and until when."""
    tell_again: float = 0.0
    """When a refusal of the firewall may be logged again: a slot can cause one with every question."""


class Forwarder:
    """Answers the slots' name queries. `start` binds, `close` ends every task and socket."""

    def __init__(self, network: IPv4Network, upstreams: tuple[str, ...], allow_names: AllowNames) -> None:
        self._network = network
        self._configured = upstreams
        self._allow_names = allow_names
        self._askers: dict[int, _Asker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._host_resolvers: tuple[str, ...] = ()
        self._read_again = 0.0
        self.port = 0

    async def start(self) -> None:
        """Bind the two sockets to one free port; `port` tells it.

        Raises:
            NetworkFailure: no port is free, or there is no resolver to ask.
        """
        if not self.upstreams():
            raise NetworkFailure("no resolver is known: set EMBERBOX_DNS_UPSTREAMS or write /etc/resolv.conf")
        loop = asyncio.get_running_loop()
        for _ in range(16):
            self._udp, _ = await loop.create_datagram_endpoint(
                lambda: _UdpServer(self._on_datagram), local_addr=("0.0.0.0", 0)
            )
            self.port = self._udp.get_extra_info("sockname")[1]
            try:
                self._tcp = await asyncio.start_server(self._on_connection, "0.0.0.0", self.port, limit=70_000)
            except OSError:  # the port is free for UDP only
                self._udp.close()
                continue
            return
        raise NetworkFailure("the name forwarder found no free port")

    async def close(self) -> None:
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def configure(
        self, index: int, *, domains: tuple[str, ...] = (), listed_only: bool = False, upstreams: tuple[str, ...] = ()
    ) -> None:
        """Set what a slot may ask. Answers to what it asked before are let through the firewall no more.

        Args:
            domains: names whose addresses are let through the firewall.
            listed_only: refuse every other name. A sandbox without internet could send data out in names otherwise.
            upstreams: the slot's own resolvers; empty: the host's.
        """
        asker = self._askers.setdefault(index, _Asker())
        asker.rules = _Rules(domains, listed_only, upstreams)
        asker.allowed.clear()

    def turn(self, index: int) -> asyncio.Lock:
        """The lock of a slot's addresses: while it is held, nothing is let through the firewall for the slot."""
        return self._askers.setdefault(index, _Asker()).turn

    def forget(self, index: int) -> None:
        self._askers.pop(index, None)

    def upstreams(self) -> tuple[str, ...]:
        """The host's resolvers, read anew now and then: a laptop's change with its network."""
        if self._configured:
            return self._configured
        now = time.monotonic()
        if now > self._read_again:
            self._host_resolvers = host_resolvers()
            self._read_again = now + _READ_AGAIN_SECONDS
        return self._host_resolvers

    # ---- from a slot

    def _asker(self, address: str) -> tuple[int, _Asker] | None:
        """Who asks; None for anybody who is not a slot in use."""
        ip = IPv4Address(address)
        if ip not in self._network:
            return None
        index = (int(ip) - int(self._network.network_address)) // 4
        asker = self._askers.get(index)
        return None if asker is None else (index, asker)

    def _on_datagram(self, query: bytes, sender: tuple[str, int]) -> None:
        known = self._asker(sender[0])
        if known is None or len(query) < 12 or known[1].in_flight >= _IN_FLIGHT_PER_SLOT:
            return
        self._own(asyncio.create_task(self._answer_datagram(query, sender, *known)))

    async def _answer_datagram(self, query: bytes, sender: tuple[str, int], index: int, asker: _Asker) -> None:
        asker.in_flight += 1
        try:
            answer = await self._resolve(query, index, asker, over_tcp=False)
        finally:
            asker.in_flight -= 1
        if self._udp is not None and not self._udp.is_closing():
            self._udp.sendto(answer, sender)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = writer.get_extra_info("peername")
        known = self._asker(peer[0]) if peer else None
        try:
            if known is not None and known[1].connections < _TCP_PER_SLOT:
                known[1].connections += 1
                try:
                    await self._answer_stream(reader, writer, *known)
                finally:
                    known[1].connections -= 1
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, index: int, asker: _Asker
    ) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            while True:
                async with asyncio.timeout(_TCP_IDLE_SECONDS):
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                    query = await reader.readexactly(size)
                if len(query) < 12 or self._askers.get(index) is not asker:  # the slot has another machine by now
                    return
                answer = await self._resolve(query, index, asker, over_tcp=True)
                writer.write(struct.pack("!H", len(answer)) + answer)
                async with asyncio.timeout(_TCP_IDLE_SECONDS):
                    await writer.drain()

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- to the resolvers

    async def _resolve(self, query: bytes, index: int, asker: _Asker, *, over_tcp: bool) -> bytes:
        rules = asker.rules
        if rules.listed_only and not _is_listed(query, rules.domains):
            return _failure(query, _REFUSED)
        ask = _ask_tcp if over_tcp else _ask_udp
        for upstream in rules.upstreams or self.upstreams():
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    answer = await ask(query, upstream)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                continue
            if rules.domains:
                await self._let_through(answer, index, asker, rules)
            return answer
        return _failure(query, _SERVFAIL)

    async def _let_through(self, answer: bytes, index: int, asker: _Asker, rules: _Rules) -> None:
        """Open the firewall for an answer, one at a time. What the firewall refuses is tried at the next question."""
        try:
            message = parse_answer(answer)
        except ValueError:
            return
        if not any(matches(message.name, pattern) for pattern in rules.domains):
            return
        async with asker.turn:
            # The slot may have another policy by now, or another machine.
            if self._askers.get(index) is not asker or asker.rules is not rules:
                return
            now = asyncio.get_running_loop().time()
            new = {}
            for address, ttl in message.addresses:
                seconds = min(max(ttl, _SHORTEST_SECONDS), _LONGEST_SECONDS)
                if asker.allowed.get(address, 0.0) < now + seconds / 2:
                    new[address] = seconds
            if not new:
                return
            try:
                await self._allow_names(index, list(new.items()))
            except NetworkFailure as error:
                if now >= asker.tell_again:
                    asker.tell_again = now + _TELL_AGAIN_SECONDS
                    log.warning("dns.names_not_allowed", slot=index, name=message.name, error=str(error))
                return
            _remember(asker, {address: now + seconds for address, seconds in new.items()}, now)


def _remember(asker: _Asker, new: dict[str, float], now: float) -> None:
    kept = {address: until for address, until in asker.allowed.items() if until > now and address not in new}
    asker.allowed = dict([*kept.items(), *new.items()][-_REMEMBERED_PER_SLOT:])


@dataclass(frozen=True, slots=True)
class Answer:
    name: str
    """What was asked, lower case, without the final dot."""
    addresses: tuple[tuple[str, int], ...]
    """IPv4 addresses and their time to live in seconds."""


def parse_answer(message: bytes) -> Answer:
    """Read the question and the first 64 IPv4 addresses of a DNS answer (RFC 1035).

    Raises:
        ValueError: it is not a well-formed answer to one question, or its names have too many parts.
    """
    try:
        _, flags, questions, answers, _, _ = struct.unpack_from("!6H", message)
        if not flags & 0x8000 or questions != 1:
            raise ValueError("not an answer to one question")
        name, position = _read_name(message, 12)
        position += 4
        parts = 0
        addresses: list[tuple[str, int]] = []
        for _ in range(answers):
            if len(addresses) == _ADDRESSES_PER_ANSWER:
                break
            position, passed = _pass_name(message, position)
            parts += passed
            if parts > _PARTS_PER_ANSWER:
                raise ValueError("the names have too many parts")
            kind, klass, ttl, size = struct.unpack_from("!HHIH", message, position)
            position += 10
            if position + size > len(message):
                raise ValueError("a record ends behind the message")
            if (kind, klass, size) == (_TYPE_A, _CLASS_IN, 4):
                addresses.append((str(IPv4Address(message[position : position + 4])), ttl & 0x7FFFFFFF))
            position += size
    except (struct.error, IndexError) as error:
        raise ValueError("the message is cut off") from error
    return Answer(name, tuple(addresses))


def _read_name(message: bytes, position: int) -> tuple[str, int]:
    labels: list[str] = []
    end = 0
    for _ in range(128):
        size = message[position]
        if size >= 0xC0:
            end = end or position + 2
            position = ((size & 0x3F) << 8) | message[position + 1]
        elif size == 0:
            return ".".join(labels).lower(), end or position + 1
        else:
            if position + 1 + size > len(message):
                raise ValueError("a name ends behind the message")
            labels.append(message[position + 1 : position + 1 + size].decode("latin-1"))
            position += 1 + size
    raise ValueError("a name has too many parts")


def _pass_name(message: bytes, position: int) -> tuple[int, int]:
    """Where a name ends, and how many parts it has. A pointer ends it; what it points to is not read."""
    for parts in range(1, 129):
        size = message[position]
        if size >= 0xC0:
            return position + 2, parts
        if size == 0:
            return position + 1, parts
        position += 1 + size
    raise ValueError("a name has too many parts")


def matches(name: str, pattern: str) -> bool:
    """`*.example.com` is every name below `example.com`; another pattern is that name alone."""
    if pattern.startswith("*."):
        return name.endswith(pattern[1:])
    return name == pattern


def _is_listed(query: bytes, domains: tuple[str, ...]) -> bool:
    try:
        name, _ = _read_name(query, 12)
    except (ValueError, IndexError):
        return False
    return struct.unpack_from("!H", query, 4) == (1,) and any(matches(name, pattern) for pattern in domains)


def host_resolvers(path: Path = Path("/etc/resolv.conf")) -> tuple[str, ...]:
    """The `nameserver` lines of a resolv.conf; those of systemd-resolved work as well, the node asks from the host."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ()
    words = (line.split() for line in lines)
    return tuple(parts[1] for parts in words if len(parts) > 1 and parts[0] == "nameserver")


def _failure(query: bytes, code: int) -> bytes:
    ident, flags = struct.unpack_from("!HH", query)
    return struct.pack("!HH", ident, 0x8080 | (flags & 0x7900) | code) + query[4:6] + b"\0\0\0\0\0\0" + query[12:]


class _UdpServer(asyncio.DatagramProtocol):
    def __init__(self, on_datagram: Callable[[bytes, tuple[str, int]], None]) -> None:
        self._on_datagram = on_datagram

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._on_datagram(data, addr)


class _UdpQuestion(asyncio.DatagramProtocol):
    """One query from a port of its own, so that an answer is hard to forge."""

    def __init__(self, query: bytes) -> None:
        self._query = query
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data[:2] == self._query[:2] and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc or ConnectionError("closed"))
            self.answer.exception()  # looked at: nobody may be waiting any more


async def _ask_udp(query: bytes, upstream: str) -> bytes:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: _UdpQuestion(query), remote_addr=(upstream, _PORT)
    )
    try:
        transport.sendto(query)
        return await protocol.answer
    finally:
        transport.close()


async def _ask_tcp(query: bytes, upstream: str) -> bytes:
    reader, writer = await asyncio.open_connection(upstream, _PORT)
    try:
        writer.write(struct.pack("!H", len(query)) + query)
        await writer.drain()
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        return await reader.readexactly(size)
    finally:
        writer.close()
