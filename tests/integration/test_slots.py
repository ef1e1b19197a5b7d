"""Slots with real namespaces, nftables and the name forwarder; the resolver is one that the test serves."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from emberbox.linux import netns
from emberbox.linux.nft import Nft, NftError
from emberbox.node.errors import BadValue, NetworkFailure, NodeFull
from emberbox.node.firewall import NetworkPolicy, Rules
from emberbox.node.slots import Slots
from emberbox.runtime.base import Slot
from emberbox.settings import Settings
from tests.support.container import needs_root
from tests.support.networks import INTERNETS, SMALL, Claim

pytestmark = needs_root

OPEN = NetworkPolicy()


class Internet:
    """A namespace behind a veth pair of the test: servers on addresses of TEST-NET-2 (RFC 5737)."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.name = f"ebi{tag}"
        self._claim = Claim(INTERNETS)
        self.one, self.two, self.resolver = (str(address) for address in list(self._claim.network)[:3])
        self._link = f"ebi{tag}h"
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Internet:
        ip = lambda *a: subprocess.run(["ip", *a], check=True, capture_output=True)  # noqa: E731
        ip("netns", "add", self.name)
        ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("addr", "add", "100.127.255.1/32", "dev", self._link)
        ip("link", "set", self._link, "up")
        ip("-n", self.name, "link", "set", "eth0", "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        for address in (self.one, self.two, self.resolver):
            ip("-n", self.name, "addr", "add", f"{address}/32", "dev", "eth0")
            ip("route", "add", f"{address}/32", "dev", self._link, "src", "100.127.255.1")
        ip("-n", self.name, "route", "add", "100.127.255.1/32", "dev", "eth0")
        ip("-n", self.name, "route", "add", "default", "via", "100.127.255.1", "dev", "eth0")
        self._server = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "python3", "-c", _SERVERS, self.one, self.two, self.resolver],
            stdout=subprocess.PIPE,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait(10)
            assert self._server.stdout is not None
            self._server.stdout.close()
        subprocess.run(["ip", "link", "del", self._link], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], check=True, capture_output=True)
        self._claim.release()


# A TCP server on port 80 that says who asked, and a resolver: one.test, www.one.test -> the first address,
# two.test -> the second.
_SERVERS = r"""
import socket, struct, sys, threading
one, two, resolver = sys.argv[1:]
NAMES = {b"one.test": one, b"www.one.test": one, b"two.test": two}
def name_of(query):
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1:at + 1 + query[at]]); at += 1 + query[at]
    return b".".join(labels).lower(), query[12:at + 5]
def answer(query):
    name, question = name_of(query)
    address = NAMES.get(name)
    head = query[:2] + struct.pack("!HHHHH", 0x8180 if address else 0x8183, 1, 1 if address else 0, 0, 0)
    record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 30, 4) + socket.inet_aton(address) if address else b""
    return head + question + record
def names_udp(s):
    while True:
        query, sender = s.recvfrom(4096); s.sendto(answer(query), sender)
def names_tcp(s):
    while True:
        c, _ = s.accept(); size = struct.unpack("!H", c.recv(2))[0]
        a = answer(c.recv(size)); c.sendall(struct.pack("!H", len(a)) + a); c.close()
def talk(c, who):
    c.sendall(who[0].encode() + b"\n")
    try:
        while data := c.recv(100): c.sendall(data)
    except OSError: pass
def web(s):
    while True:
        c, who = s.accept(); threading.Thread(target=talk, args=(c, who), daemon=True).start()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind((resolver, 53))
t = socket.create_server(("", 53)); w = socket.create_server(("", 80))
for f, s in ((names_udp, u), (names_tcp, t), (web, w)): threading.Thread(target=f, args=(s,), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def internet() -> Iterator[Internet]:
    with Internet() as made:
        yield made


@pytest.fixture
def settings(internet: Internet) -> Iterator[Settings]:
    data = Path(tempfile.mkdtemp(prefix="eb-slots-"))
    claim = Claim(SMALL)
    yield Settings(
        data_dir=data,
        instance_name="ebs" + secrets.token_hex(2),
        slot_network=claim.network,
        slots_ready=1,
        dns_upstreams=(internet.resolver,),
    )
    claim.release()
    shutil.rmtree(data)


@contextlib.asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[Slots]:
    """Slots of which nothing is left at the end."""
    slots = Slots(settings)
    await slots.start()
    yield slots
    for slot in list(slots._in_use.values()):
        await slots.give_back(slot)
    await slots.close()
    assert _traces(settings) == []


@pytest.fixture(autouse=True)
def patient_forwarder() -> Iterator[None]:
    """Not with `monkeypatch`: a fixture that every test has comes first, and so `monkeypatch` would be undone last.
    The end of `slots` then met what a test had patched."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("emberbox.node.dns._ANSWER_SECONDS", 20.0)
        yield


@pytest.fixture
async def slots(settings: Settings) -> AsyncIterator[Slots]:
    async with started(settings) as made:
        yield made


@pytest.fixture
async def unpooled(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slots]:
    """Four slots that are made when they are taken, and need no rest."""
    monkeypatch.setattr("emberbox.node.slots._REUSE_AFTER_SECONDS", 0.0)
    async with started(settings.model_copy(update={"slots_ready": 0})) as made:
        yield made


@pytest.fixture
async def slot(slots: Slots) -> Slot:
    return await slots.take()


def _traces(settings: Settings) -> list[str]:
    tag = settings.instance
    return [
        *netns.names(f"{tag}-"),
        *(path.name for path in Path("/sys/class/net").glob(f"{tag}-*")),
        *(line for line in Nft().run("list tables").splitlines() if tag in line),
    ]


async def _inside(slot: Slot, function, *arguments):  # type: ignore[no-untyped-def]
    return await asyncio.to_thread(netns.run_in, slot.netns, lambda: function(*arguments))


def _connect(address: str, port: int = 80) -> str:
    """What the server says of the sender's address, or the error."""
    try:
        with socket.create_connection((address, port), timeout=30) as connection:
            return connection.recv(100).decode().strip()
    except OSError as error:
        return type(error).__name__


def _lookup(server: str, name: str, over_tcp: bool = False) -> str:
    """The address of a name, or the answer's error code."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = (
        secrets.token_bytes(2) + struct.pack("!HHHHH", 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", 1, 1)
    )
    kind = socket.SOCK_STREAM if over_tcp else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as connection:
        connection.settimeout(30)
        connection.connect((server, 53))
        connection.sendall(struct.pack("!H", len(query)) + query if over_tcp else query)
        answer = connection.recv(4096)[2 if over_tcp else 0 :]
    assert answer[:2] == query[:2]
    code = answer[3] & 15
    return str(IPv4Address(answer[-4:])) if answer[7] else f"code {code}"


_MEGABYTES = 2


async def _seconds_to_send(slot: Slot, *, into: bool) -> float:
    """How long two megabytes take from the host into the slot, or the other way, until the last one has arrived."""
    inside = await _inside(slot, socket.create_server, ("", 0))

    def inner_side() -> None:
        with inside, inside.accept()[0] as connection:
            if into:
                while connection.recv(65536):
                    pass
            else:
                connection.sendall(bytes(_MEGABYTES * 1_000_000))

    def outer_side() -> float:
        other = threading.Thread(target=inner_side, daemon=True)
        other.start()
        with socket.create_connection((str(slot.address), inside.getsockname()[1]), timeout=60) as connection:
            began = time.monotonic()
            if into:
                connection.sendall(bytes(_MEGABYTES * 1_000_000))
                connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
            return time.monotonic() - began

    return await asyncio.to_thread(outer_side)


async def test_the_internet_is_reached_with_the_hosts_address(slot: Slot, internet: Internet) -> None:
    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"


async def test_the_host_reaches_every_port_of_a_slot(slot: Slot) -> None:
    server = await _inside(slot, socket.create_server, ("", 0))
    with server:
        port = server.getsockname()[1]
        _, writer = await asyncio.open_connection(str(slot.address), port)
        writer.close()


async def test_names_are_answered_over_udp_and_tcp(slot: Slot, internet: Internet) -> None:
    gateway = str(slot.host_address)

    assert await _inside(slot, _lookup, gateway, "one.test") == internet.one
    assert await _inside(slot, _lookup, gateway, "two.test", True) == internet.two
    assert await _inside(slot, _lookup, gateway, "none.test") == "code 3"


async def test_a_resolver_of_another_slot_works_as_well(slots: Slots, slot: Slot, internet: Internet) -> None:
    """A machine restored in another slot still has the old address in its memory."""
    other = await slots.take()

    assert await _inside(slot, _lookup, str(other.host_address), "one.test") == internet.one


async def test_without_internet_nothing_is_reached_or_resolved(slots: Slots, slot: Slot, internet: Internet) -> None:
    await slots.apply(slot, NetworkPolicy(allow_internet=False))

    assert await _inside(slot, _connect, internet.one) == "ConnectionRefusedError"
    assert await _inside(slot, _lookup, str(slot.host_address), "one.test") == "code 5"


async def test_allow_wins_over_deny(slots: Slots, slot: Slot, internet: Internet) -> None:
    await slots.apply(slot, NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=(f"{internet.one}/32",)))

    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"
    assert await _inside(slot, _connect, internet.two) == "ConnectionRefusedError"


async def test_denied_networks_are_denied_and_the_rest_is_not(slots: Slots, slot: Slot, internet: Internet) -> None:
    await slots.apply(slot, NetworkPolicy(deny_out=(internet.two,)))

    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"
    assert await _inside(slot, _connect, internet.two) == "ConnectionRefusedError"


async def test_allowed_domains_open_what_they_resolve_to(slots: Slots, slot: Slot, internet: Internet) -> None:
    await slots.apply(slot, NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("*.one.test",)))
    before = await _inside(slot, _connect, internet.one)

    address = await _inside(slot, _lookup, str(slot.host_address), "www.one.test")

    assert before == "ConnectionRefusedError"
    assert address == internet.one
    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"
    assert await _inside(slot, _lookup, str(slot.host_address), "two.test") == "code 5"
    assert await _inside(slot, _connect, internet.two) == "ConnectionRefusedError"


async def test_what_only_the_old_policy_allows_is_not_opened_during_a_change(
    slots: Slots, slot: Slot, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, apply, answers = str(slot.host_address), slots._firewall.apply, []
    await slots.apply(slot, NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("*.one.test",)))

    async def apply_and_ask(slot: Slot, rules: Rules) -> None:
        await apply(slot, rules)
        answers.append(await _inside(slot, _lookup, gateway, "www.one.test"))

    monkeypatch.setattr(slots._firewall, "apply", apply_and_ask)
    await slots.apply(slot, NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("two.test",)))

    assert answers == ["code 5"]
    assert await _inside(slot, _connect, internet.one) == "ConnectionRefusedError"
    assert await _inside(slot, _lookup, gateway, "two.test") == internet.two
    assert await _inside(slot, _connect, internet.two) == "100.127.255.1"


async def test_a_policy_that_the_firewall_refused_changes_nothing(
    slots: Slots, slot: Slot, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = str(slot.host_address)
    await slots.apply(slot, NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("one.test",)))

    with monkeypatch.context() as patched:
        patched.setattr(slots._firewall, "apply", AsyncMock(side_effect=NetworkFailure("refused")))
        with pytest.raises(NetworkFailure, match="refused"):
            await slots.apply(slot, NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("two.test",)))

    assert await _inside(slot, _lookup, gateway, "two.test") == "code 5"
    assert await _inside(slot, _lookup, gateway, "one.test") == internet.one
    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"


async def test_a_slot_that_was_given_back_gets_no_policy(slots: Slots, slot: Slot) -> None:
    await slots.give_back(slot)

    with pytest.raises(NetworkFailure, match="not in use"):
        await slots.apply(slot, NetworkPolicy(allow_internet=False))


async def test_names_are_opened_again_after_a_flush(
    slots: Slots, slot: Slot, settings: Settings, internet: Internet
) -> None:
    await slots.apply(slot, NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("one.test",)))
    await _inside(slot, _lookup, str(slot.host_address), "one.test")
    Nft().run(f"delete table inet {settings.instance}")
    await slots._restore_firewall()

    await _inside(slot, _lookup, str(slot.host_address), "one.test")

    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"


async def test_a_resolver_in_a_denied_network_is_refused(settings: Settings) -> None:
    slots = Slots(settings.model_copy(update={"deny_networks": ("203.0.113.0/24",)}))
    await slots.start()
    slot = await slots.take()

    with pytest.raises(BadValue, match=r"dnsServers entry '203\.0\.113\.5'"):
        await slots.apply(slot, NetworkPolicy(dns_servers=("203.0.113.5",)))

    await slots.give_back(slot)
    await slots.close()


async def test_a_new_policy_ends_what_is_connected(slots: Slots, slot: Slot, internet: Internet) -> None:
    connection = await _inside(slot, socket.create_connection, (internet.one, 80), 30)
    with connection:
        connection.recv(100)
        await slots.apply(slot, NetworkPolicy(allow_internet=False))
        connection.sendall(b"more")
        with pytest.raises((ConnectionResetError, ConnectionRefusedError)):
            await asyncio.to_thread(connection.recv, 100)


async def test_a_policy_is_the_slots_own(slots: Slots, slot: Slot, internet: Internet) -> None:
    other = await slots.take()

    await slots.apply(slot, NetworkPolicy(allow_internet=False))

    assert await _inside(other, _connect, internet.one) == "100.127.255.1"


async def test_private_addresses_stay_closed_whatever_is_allowed(slots: Slots, slot: Slot) -> None:
    other = await slots.take()
    server = await _inside(other, socket.create_server, ("", 0))

    await slots.apply(slot, NetworkPolicy(allow_out=("0.0.0.0/0", str(other.address))))

    with server:
        port = server.getsockname()[1]
        assert await _inside(slot, _connect, str(other.address), port) == "ConnectionRefusedError"
    assert await _inside(slot, _connect, "10.1.2.3") == "ConnectionRefusedError"
    assert await _inside(slot, _connect, "169.254.169.254") == "ConnectionRefusedError"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (NetworkPolicy(allow_out=("not a thing",)), "allowOut entry 'not a thing'"),
        (NetworkPolicy(deny_out=("example.com",)), "domains go into allowOut only"),
        (NetworkPolicy(allow_out=("example.com",)), "needs denyOut to contain"),
        (NetworkPolicy(allow_out=("::1",)), "IPv6"),
        (NetworkPolicy(dns_servers=("10.0.0.1",)), "not a public IPv4 address"),
    ],
)
async def test_a_policy_that_cannot_be_used_is_refused(
    slots: Slots, slot: Slot, internet: Internet, policy: NetworkPolicy, words: str
) -> None:
    with pytest.raises(BadValue, match=words):
        await slots.apply(slot, policy)

    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"


async def test_a_flushed_host_gets_its_rules_back(
    slots: Slots, slot: Slot, settings: Settings, internet: Internet
) -> None:
    await slots.apply(slot, NetworkPolicy(allow_internet=False))
    Nft().run(f"delete table inet {settings.instance}")

    await slots._restore_firewall()

    assert await _inside(slot, _connect, internet.one) == "ConnectionRefusedError"
    await slots.apply(slot, OPEN)
    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"


async def test_a_full_network_says_so(unpooled: Slots) -> None:
    for _ in range(4):
        await unpooled.take()

    with pytest.raises(NodeFull, match="EMBERBOX_SLOT_NETWORK"):
        await unpooled.take()


async def test_an_address_rests_before_it_is_used_again(slots: Slots, slot: Slot) -> None:
    await slots.give_back(slot)

    assert (await slots.take()).address != slot.address


async def test_addresses_come_back_as_late_as_can_be(unpooled: Slots) -> None:
    taken = []
    for _ in range(6):
        slot = await unpooled.take()
        taken.append(slot.index)
        await unpooled.give_back(slot)

    assert taken == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("error", [NftError("refused"), OSError("no such device")])
async def test_a_slot_that_cannot_be_made_is_a_failure_of_the_network(
    unpooled: Slots, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(unpooled, "_build", Mock(side_effect=error))

    with pytest.raises(NetworkFailure, match=f"could not be made: {error}"):
        await unpooled.take()


async def test_the_pool_is_refilled_after_a_failure(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberbox.node.slots._RETRY_SECONDS", 0.01)
    monkeypatch.setattr(slots, "_build", Mock(side_effect=[NftError("refused"), OSError("no"), None]))
    monkeypatch.setattr(slots, "_unmake", Mock(side_effect=[OSError("busy"), None, None]))

    await slots.take()

    async with asyncio.timeout(30):
        while not slots._ready:
            await asyncio.sleep(0.01)


async def test_a_slot_that_could_not_be_removed_is_removed_before_its_address_is_used_again(
    unpooled: Slots, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await unpooled.take()
    await unpooled.apply(first, NetworkPolicy(allow_internet=False))
    with monkeypatch.context() as patched:
        patched.setattr(unpooled, "_unmake", Mock(side_effect=OSError("busy")))
        with pytest.raises(NetworkFailure, match=f"slot {first.netns} could not be removed: busy"):
            await unpooled.give_back(first)

    later = [await unpooled.take() for _ in range(4)]

    assert later[-1] == first
    assert await _inside(later[-1], _connect, internet.one) == "100.127.255.1"


async def test_slots_outlive_the_process_and_are_adopted_or_swept(settings: Settings, internet: Internet) -> None:
    first = Slots(settings)
    await first.start()
    kept, lost = await first.take(), await first.take()
    await first.apply(kept, NetworkPolicy(deny_out=(internet.two,)))
    await first.close()

    second = Slots(settings)
    await second.start()
    adopted = await second.adopt(kept.index)
    swept = await second.sweep(frozenset({kept.index}))

    assert adopted == kept
    assert swept == [f"slot {lost.netns}"]
    assert await _inside(kept, _connect, internet.one) == "100.127.255.1"
    assert await _inside(kept, _connect, internet.two) == "ConnectionRefusedError"
    with pytest.raises(NetworkFailure, match="is gone"):
        await second.adopt(lost.index)
    await second.give_back(adopted)
    await second.close()
    assert _traces(settings) == []


async def test_no_slot_is_given_out_twice_after_a_restart(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the last process that lie beyond the new one's first must not come both by number and by resting."""
    monkeypatch.setattr("emberbox.node.slots._REUSE_AFTER_SECONDS", 20)
    settings = settings.model_copy(update={"slots_ready": 0})
    first = Slots(settings)
    await first.start()
    left = [await first.take() for _ in range(4)]
    for slot in left[:2]:
        await first.give_back(slot)
    await first.close()
    second = Slots(settings)
    await second.start()
    await second.sweep(frozenset())

    taken = [await second.take() for _ in range(2)]
    with pytest.raises(NodeFull):
        await second.take()
    second._resting = deque((0.0, index) for _, index in second._resting)  # they have rested
    taken += [await second.take() for _ in range(2)]
    with pytest.raises(NodeFull):
        await second.take()

    assert sorted(slot.index for slot in taken) == [0, 1, 2, 3]
    for slot in taken:
        assert await _inside(slot, socket.gethostname)
        await second.give_back(slot)
    await second.close()
    assert _traces(settings) == []


async def test_a_slot_that_cannot_be_adopted_is_swept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Slots(settings)
    await first.start()
    slot = await first.take()
    await first.close()
    second = Slots(settings)
    await second.start()

    monkeypatch.setattr(second._firewall, "admit", AsyncMock(side_effect=NetworkFailure("refused")))
    with pytest.raises(NetworkFailure, match="refused"):
        await second.adopt(slot.index)
    swept = await second.sweep(frozenset())

    assert swept == [f"slot {slot.netns}"]
    await second.close()
    assert _traces(settings) == []


async def test_a_slot_that_cannot_be_removed_does_not_keep_a_sweep_from_the_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Slots(settings.model_copy(update={"slots_ready": 0}))
    await first.start()
    one, other = await first.take(), await first.take()
    await first.close()
    second = Slots(settings.model_copy(update={"slots_ready": 0}))
    await second.start()
    unmake = second._unmake

    def fails_for_one(index: int) -> None:
        if index == one.index:
            raise OSError("busy")
        unmake(index)

    monkeypatch.setattr(second, "_unmake", fails_for_one)
    swept = await second.sweep(frozenset())

    assert swept == [f"slot {other.netns}"]
    unmake(one.index)
    await second.close()
    assert _traces(settings) == []


async def test_the_table_of_another_release_is_replaced(settings: Settings, internet: Internet) -> None:
    Nft().run(
        f"add table inet {settings.instance}\n"
        f"add set inet {settings.instance} sources {{ type ipv4_addr; }}\n"
        f"add element inet {settings.instance} sources {{ 192.0.2.1 }}\n"
    )

    slots = Slots(settings)
    await slots.start()
    slot = await slots.take()

    assert await _inside(slot, _connect, internet.one) == "100.127.255.1"
    await slots.give_back(slot)
    await slots.close()
    assert _traces(settings) == []


async def test_a_limited_slot_sends_and_receives_no_faster(slots: Slots, slot: Slot) -> None:
    await slots.shape(slot, 8)

    took = [await _seconds_to_send(slot, into=True), await _seconds_to_send(slot, into=False)]

    # 8 Mbit/s are a megabyte a second; twice as fast would be wrong, and much slower, too.
    assert all(_MEGABYTES / 2 < seconds < _MEGABYTES * 15 for seconds in took), took


async def test_the_next_machine_of_a_slot_is_not_limited(unpooled: Slots) -> None:
    first = await unpooled.take()
    await unpooled.shape(first, 1)
    await unpooled.give_back(first)
    while (again := await unpooled.take()).index != first.index:
        pass

    took = [await _seconds_to_send(again, into=True), await _seconds_to_send(again, into=False)]

    assert max(took) < _MEGABYTES * 4, took  # 16 s at the first one's rate


async def test_a_limit_can_be_changed(slots: Slots, slot: Slot) -> None:
    await slots.shape(slot, 1)
    await slots.shape(slot, 1000)

    assert await _seconds_to_send(slot, into=True) < _MEGABYTES * 4
