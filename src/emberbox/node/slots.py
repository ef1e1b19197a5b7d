"""Slots: network namespaces with their addresses and firewall, prepared ahead of need.

A slot has four addresses of `settings.slot_network`: the network, the host's end of the veth pair, the machine, the
broadcast. Its number is all that is needed to find every part of it again. The namespace belongs to the host's user
namespace: root inside a container cannot change anything in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from ipaddress import IPv4Interface
from pathlib import Path

import structlog

from emberbox.linux import netns, taps
from emberbox.linux.netlink import Netlink
from emberbox.linux.nft import NftError
from emberbox.node.dns import Forwarder
from emberbox.node.errors import NetworkFailure, NodeFull
from emberbox.node.firewall import (
    CONNECTIONS_PER_SLOT,
    OPEN_RULES,
    Firewall,
    NetworkPolicy,
    Rules,
    host_address,
    interface_name,
    machine_address,
    parse_policy,
)
from emberbox.node.host_filter import HostFilter
from emberbox.node.tasks import Tasks, finish
from emberbox.runtime.base import Slot
from emberbox.settings import Settings
from emberbox.threads import to_thread_whole

__all__ = ["NetworkPolicy", "Slots"]

log = structlog.get_logger("emberbox.node")

_INSIDE = "eth0"
_BYTES_PER_MBIT = 125_000
_REUSE_AFTER_SECONDS = 10.0
"""An address rests after its machine: late packets and clients of the old one must not meet the new one."""
_CHECK_SECONDS = 30.0
_RETRY_SECONDS = 5.0

# In the namespace. It belongs to the host's user namespace, so that low ports and ping need to be given to everybody.
_INSIDE_SYSCTLS = {
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv4/ping_group_range": "0 2147483647",
    "net/ipv6/conf/default/disable_ipv6": "1",
}


class Slots:
    """The node's slots: a pool of prepared ones, and those in use."""

    def __init__(self, settings: Settings, *, taps: bool = False) -> None:
        """`taps`: give every slot a tap for a microVM."""
        self._settings = settings
        self._network = settings.slot_network
        self._taps = taps
        self._firewall = Firewall(settings)
        self._host_filter = HostFilter(settings.instance)
        self._forwarder = Forwarder(self._network, settings.dns_upstreams, self._firewall.allow_names)
        self._ready: deque[Slot] = deque()
        self._in_use: dict[int, Slot] = {}
        self._policies: dict[int, Rules] = {}
        self._left_over: set[int] = set()
        self._resting: deque[tuple[float, int]] = deque()
        self._given: set[int] = set()
        """Numbers that were given out once, or found at the start: `_next` never comes to them, they come back by
        resting."""
        self._unclean: set[int] = set()
        """Numbers of slots that could not be removed whole."""
        self._next = 0
        self._wanted = asyncio.Event()
        self._tasks = Tasks()

    # ---- life

    async def start(self) -> None:
        """Set up the host's side and fill the pool.

        Raises:
            NetworkFailure: a part of the host's network cannot be set up; says which.
        """
        self._left_over = set(await asyncio.to_thread(self._found))
        self._given = set(self._left_over)
        await asyncio.to_thread(_enable_forwarding)
        await self._forwarder.start()
        try:
            await self._firewall.start(self._forwarder.port)
            await self._host_filter.open()
            for _ in range(self._settings.slots_ready):
                self._ready.append(await self._make())
        except BaseException:
            await self.close()
            raise
        self._tasks.start(self._refill(), name="slots.refill")
        self._tasks.start(self._watch_firewall(), name="slots.watch_firewall")

    async def close(self) -> None:
        """End the forwarder and the unused slots. Slots in use stay, with their rules."""
        await self._tasks.close()
        await self._forwarder.close()
        unused = [slot.index for slot in self._ready]
        self._ready.clear()
        for index in unused:
            await to_thread_whole(self._unmake, index)
        with contextlib.suppress(NetworkFailure):
            if self._in_use or self._left_over:
                await self._firewall.remove(unused)
            else:
                await self._firewall.clear()
                await self._host_filter.close()

    # ---- for the node

    async def take(self) -> Slot:
        """A slot with the open policy, from the pool or made now.

        Raises:
            NodeFull: every address of the slot network is in use.
            NetworkFailure: it could not be made.
        """
        slot = self._ready.popleft() if self._ready else await self._make()
        self._in_use[slot.index] = slot
        self._wanted.set()
        return slot

    async def give_back(self, slot: Slot) -> None:
        """Take a slot apart. Idempotent.

        Raises:
            NetworkFailure: a part of it could not be removed.
        """
        if self._in_use.pop(slot.index, None) is None:
            return
        await finish(self._remove(slot.index))

    async def adopt(self, index: int) -> Slot:
        """Take over the slot of a machine that outlived the node's last process.

        Raises:
            NetworkFailure: its namespace is gone.
        """
        slot = self._slot(index)
        if not await asyncio.to_thread((netns.DIRECTORY / slot.netns).exists):
            raise NetworkFailure(f"the network namespace {slot.netns} is gone")
        self._firewall.adopt(index)
        await self._firewall.admit(index)
        self._left_over.discard(index)  # a sweep takes what could not be adopted
        self._in_use[index] = slot
        return slot

    async def apply(self, slot: Slot, policy: NetworkPolicy) -> None:
        """Replace a slot's policy in one step; connections that it forbids end.

        Raises:
            BadValue: the policy has an entry that cannot be used.
            NetworkFailure: the rules were refused; the old policy stays.
        """
        rules = parse_policy(policy)
        self._firewall.check(rules)
        await finish(self._apply(slot, rules))

    async def _apply(self, slot: Slot, rules: Rules) -> None:
        """The forwarder is told first: by the old rules it would put addresses into the new policy's set of names."""
        async with self._forwarder.turn(slot.index):
            if slot.index not in self._in_use:
                raise NetworkFailure(f"slot {slot.netns} is not in use any more")
            before = self._policies.get(slot.index)
            self._remember(slot.index, rules)
            try:
                await self._firewall.apply(slot, rules)
            except BaseException:
                if before is None:
                    self._forget(slot.index)
                else:
                    self._remember(slot.index, before)
                raise

    async def shape(self, slot: Slot, mbit_per_second: int) -> None:
        """Let the machine send, and receive, no faster than this; what the host itself sends to it counts.

        Each end of the pair shapes what it sends. That holds for as long as the slot: a slot is taken apart when it is
        given back, so the next machine starts without.

        Raises:
            NetworkFailure: the kernel cannot.
        """
        try:
            await asyncio.to_thread(_shape, slot.netns, mbit_per_second * _BYTES_PER_MBIT)
        except OSError as error:
            raise NetworkFailure(f"the network of slot {slot.netns} could not be limited: {error}") from error

    async def sweep(self, keep: frozenset[int]) -> list[str]:
        """Remove slots that an earlier process left and that are neither in `keep` nor in use here.

        One that cannot be removed is logged, and removed before its address is used again.
        """
        mine = {slot.index for slot in self._ready} | self._in_use.keys() | {index for _, index in self._resting}
        doomed = sorted(set(await asyncio.to_thread(self._found)) - mine - keep)
        doomed = [index for index in doomed if index in self._left_over]
        removed = []
        for index in doomed:
            self._left_over.discard(index)
            self._firewall.adopt(index)
            try:
                await self._remove(index)
            except NetworkFailure as error:
                log.error("slot.not_removed", slot=index, error=str(error))
            else:
                removed.append(f"slot {interface_name(self._settings.instance, index)}")
        return removed

    # ---- making and removing

    def _slot(self, index: int) -> Slot:
        return Slot(
            index=index,
            netns=interface_name(self._settings.instance, index),
            host_address=host_address(self._network, index),
            address=machine_address(self._network, index),
            tap=taps.NAME if self._taps else None,
        )

    async def _make(self) -> Slot:
        slot = self._slot(self._free_index())
        try:
            if slot.index in self._unclean:
                await self._take_apart(slot.index)
            await to_thread_whole(self._build, slot)
            await self._firewall.admit(slot.index)
        except BaseException as error:
            try:
                await finish(self._remove(slot.index))
            except NetworkFailure as failure:
                log.error("slot.not_removed", slot=slot.index, error=str(failure))
            if isinstance(error, OSError | NftError):
                raise NetworkFailure(f"slot {slot.netns} could not be made: {error}") from error
            raise
        self._remember(slot.index, OPEN_RULES)
        return slot

    def _free_index(self) -> int:
        """A number that was never used, or else the one that has rested longest.

        The later an address comes back, the less is left of what knew its last machine: an edge or a control plane
        that was away may still have a route to it.
        """
        count = self._network.num_addresses // 4
        while self._next in self._given:
            self._next += 1
        if self._next < count:
            self._given.add(self._next)
            return self._next
        if self._resting and self._resting[0][0] <= time.monotonic():
            return self._resting.popleft()[1]
        raise NodeFull(f"all {count} slots of {self._network} are in use; give the node a larger EMBERBOX_SLOT_NETWORK")

    def _build(self, slot: Slot) -> None:
        """In a thread: the namespace, the veth pair, addresses, routes."""
        name = slot.netns

        def inside() -> None:
            for key, value in _INSIDE_SYSCTLS.items():
                _write_sysctl(key, value)
            with Netlink() as netlink:
                netlink.set_up("lo")

        def connect() -> None:
            with Netlink() as netlink:
                netlink.add_address(_INSIDE, IPv4Interface(f"{slot.address}/30"))
                netlink.set_up(_INSIDE)
                netlink.add_default_route(slot.host_address)
            if slot.tap is not None:
                taps.add(slot.address, slot.host_address, connections=CONNECTIONS_PER_SLOT)

        netns.create(name, inside)
        with netns.opened(name) as namespace, Netlink() as netlink:
            netlink.add_veth(name, _INSIDE, namespace)
            _write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
            netlink.add_address(name, IPv4Interface(f"{slot.host_address}/30"))
            netlink.set_up(name)
        netns.run_in(name, connect)

    async def _remove(self, index: int) -> None:
        """The number rests in any case: what could not be removed is removed before it is used again.

        Raises:
            NetworkFailure: a part of the slot could not be removed.
        """
        try:
            async with self._forwarder.turn(index):
                self._forget(index)
            await self._take_apart(index)
        except OSError as error:
            name = interface_name(self._settings.instance, index)
            raise NetworkFailure(f"slot {name} could not be removed: {error}") from error
        finally:
            self._resting.append((time.monotonic() + _REUSE_AFTER_SECONDS, index))

    async def _take_apart(self, index: int) -> None:
        self._unclean.add(index)
        await to_thread_whole(self._unmake, index)
        await self._firewall.remove([index])
        self._unclean.discard(index)

    def _unmake(self, index: int) -> None:
        """In a thread. The link goes first, and at once: with the namespace alone it would go some time later."""
        name = interface_name(self._settings.instance, index)
        with Netlink() as netlink:
            netlink.delete(name)
        netns.delete(name)

    def _remember(self, index: int, rules: Rules) -> None:
        self._policies[index] = rules
        self._forwarder.configure(
            index, domains=rules.domains, listed_only=not rules.reaches_anywhere, upstreams=rules.dns_servers
        )

    def _forget(self, index: int) -> None:
        self._policies.pop(index, None)
        self._forwarder.forget(index)

    def _found(self) -> list[int]:
        """Numbers of this instance's slots on the host, whoever made them."""
        prefix = f"{self._settings.instance}-"
        found = set(netns.names(prefix))
        found.update(path.name for path in Path("/sys/class/net").glob(f"{prefix}*"))
        return sorted(int(name.removeprefix(prefix)) for name in found if name.removeprefix(prefix).isdigit())

    # ---- in the background

    async def _refill(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while len(self._ready) < self._settings.slots_ready:
                try:
                    self._ready.append(await self._make())
                except (NodeFull, NetworkFailure) as error:
                    log.warning("slots.not_refilled", error=str(error))
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _watch_firewall(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self._host_filter.open()  # Docker, started later, changes the host's policy
            if await self._firewall.is_there():
                continue
            try:
                await self._restore_firewall()
            except NetworkFailure as error:
                log.error("firewall.not_restored", error=str(error))

    async def _restore_firewall(self) -> None:
        """Put the rules back when somebody flushed the host's: without them slots reach private networks."""
        log.error("firewall.flushed", table=self._settings.instance)
        await self._firewall.start(self._forwarder.port)
        for slot in (*self._ready, *self._in_use.values()):
            await self._firewall.admit(slot.index)
            async with self._forwarder.turn(slot.index):
                if (rules := self._policies.get(slot.index)) is not None:
                    self._remember(slot.index, rules)  # the addresses of its names went with the rules
                    await self._firewall.apply(slot, rules)


def _shape(name: str, bytes_per_second: int) -> None:
    def inside() -> None:
        with Netlink() as netlink:
            netlink.shape(_INSIDE, bytes_per_second)

    with Netlink() as netlink:
        netlink.shape(name, bytes_per_second)
    netns.run_in(name, inside)


def _enable_forwarding() -> None:
    try:
        _write_sysctl("net/ipv4/ip_forward", "1")
    except OSError as error:
        raise NetworkFailure(f"net.ipv4.ip_forward cannot be set: {error}") from error


def _write_sysctl(key: str, value: str) -> None:
    path = Path("/proc/sys") / key
    if path.exists():  # a kernel without IPv6 has none of its settings
        path.write_text(value)
