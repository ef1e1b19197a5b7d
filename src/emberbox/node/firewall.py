"""The host's packet filter for slots: one nftables table an instance, one chain a slot that has a policy of its own.

What every slot has, whatever its policy: it sends with its own address only, no IPv6, nothing to the host except
name queries, nothing to another slot, and nothing to private, link-local, multicast or reserved networks. What is
left is the internet, and there the slot's policy decides. The rules have no memory (no `established`) on the way
out, so that a stricter policy also ends what is already connected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, collapse_addresses, ip_address, ip_network

import structlog

from emberbox.linux.nft import Nft, NftError
from emberbox.node.errors import BadValue, NetworkFailure
from emberbox.node.model import OPEN_NETWORK, Network
from emberbox.runtime.base import Slot
from emberbox.settings import Settings
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.node")

NetworkPolicy = Network

# RFC 6890 and its successors: never on the internet. The documentation networks are left out; they do no harm and
# some test networks use them.
NEVER_ALLOWED = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_ADMITTED_AT_ONCE = 256
CONNECTIONS_PER_SLOT = 8192
_NAMES_PER_SLOT = 4096
"""Addresses that allowed domains may resolve to at one time."""


@dataclass(frozen=True, slots=True)
class Rules:
    """A policy, parsed."""

    allow_internet: bool
    allow: tuple[IPv4Network, ...]
    deny: tuple[IPv4Network, ...]
    domains: tuple[str, ...]
    """Lower case; `*.example.com` is every name below, `example.com` that name alone."""
    dns_servers: tuple[str, ...]

    @property
    def reaches_anywhere(self) -> bool:
        """False when only what is listed can be reached."""
        return self.allow_internet and IPv4Network("0.0.0.0/0") not in self.deny


def parse_policy(policy: Network) -> Rules:
    """Check a policy.

    Raises:
        BadValue: an entry is neither an address, a network nor (in `allow_out`) a domain, or is one that no sandbox
            may use.
    """
    allow, domains = [], []
    for entry in policy.allow_out:
        network = _network(entry)
        if network is not None:
            allow.append(network)
        elif _is_domain(entry):
            domains.append(entry.lower().rstrip("."))
        else:
            raise BadValue(f"allowOut entry '{entry}' is not an IPv4 address, a CIDR or a domain")
    deny = []
    for entry in policy.deny_out:
        network = _network(entry)
        if network is None:
            raise BadValue(f"denyOut entry '{entry}' is not an IPv4 address or a CIDR (domains go into allowOut only)")
        deny.append(network)
    if domains and policy.allow_internet and IPv4Network("0.0.0.0/0") not in deny:
        raise BadValue("allowOut with domains needs denyOut to contain '0.0.0.0/0'; without it everything is allowed")
    return Rules(
        policy.allow_internet,
        tuple(collapse_addresses(allow)),
        tuple(collapse_addresses(deny)),
        tuple(domains),
        tuple(_resolver(entry) for entry in policy.dns_servers),
    )


def _network(entry: str) -> IPv4Network | None:
    try:
        network = ip_network(entry.strip(), strict=False)
    except ValueError:
        return None
    if not isinstance(network, IPv4Network):
        raise BadValue(f"'{entry}' is IPv6; sandboxes have IPv4 only")
    return network


def _resolver(entry: str) -> str:
    try:
        address = ip_address(entry)
    except ValueError:
        raise BadValue(f"dnsServers entry '{entry}' is not an IP address") from None
    if not isinstance(address, IPv4Address) or any(address in network for network in NEVER_ALLOWED):
        # The node asks on the sandbox's behalf: a private resolver would be a way into the host's network.
        raise BadValue(f"dnsServers entry '{entry}' is not a public IPv4 address")
    return str(address)


def _is_domain(entry: str) -> bool:
    labels = entry.rstrip(".").removeprefix("*.").split(".")
    return (
        len(entry) <= 253
        and len(labels) >= 2
        and all(
            0 < len(label) <= 63
            and not label.startswith("-")
            and not label.endswith("-")
            and label.replace("-", "").replace("_", "").isalnum()
            and label.isascii()
            for label in labels
        )
    )


OPEN_RULES = parse_policy(OPEN_NETWORK)
"""The internet, and nothing of the host's networks."""


class Firewall:
    """The table `settings.instance`. Every change is one transaction in a thread; the next one waits for its end."""

    def __init__(self, settings: Settings) -> None:
        self._table = settings.instance
        self._interfaces = f"{settings.instance}-*"
        extra = [_configured(text) for text in settings.deny_networks]
        self._never = tuple(collapse_addresses((*NEVER_ALLOWED, settings.slot_network, *extra)))
        self._network = settings.slot_network
        self._nft: Nft | None = None
        self._turn = asyncio.Lock()
        self._admitted = 0
        self._own_chains: set[int] = set()

    async def start(self, dns_port: int) -> None:
        """Put the rules of all slots into the kernel, keeping the chains of slots that are there.

        Args:
            dns_port: where the forwarder listens; the slots' port 53 leads there.

        Raises:
            NetworkFailure: nftables is missing or refused the rules.
        """
        try:
            self._nft = await asyncio.to_thread(Nft)
        except NftError as error:
            raise NetworkFailure(str(error)) from error
        # Slots are let in by their number, many at once: a transaction for each would cost more than the slot.
        self._admitted = min(_ADMITTED_AT_ONCE, self._slot_count)
        rules = self._common(dns_port) + self._sources(range(self._admitted))
        try:
            await self._run(rules)
        except NetworkFailure as error:
            # A table of another release, with the same names for other things. Slots in use have the open policy
            # until their policies are applied again, which follows their adoption.
            log.warning("firewall.replaced", table=self._table, why=str(error))
            await self.clear()
            await self._run(rules)

    async def admit(self, index: int) -> None:
        """Let a new slot in, with the open policy."""
        if index >= self._admitted:
            more = range(self._admitted, min(index + _ADMITTED_AT_ONCE, self._slot_count))
            await self._run(self._sources(more))
            self._admitted = more.stop

    def adopt(self, index: int) -> None:
        """A slot that an earlier process used: it may have a chain."""
        self._own_chains.add(index)

    def check(self, rules: Rules) -> None:
        """Refuse what a policy may not say on this host.

        Raises:
            BadValue: a resolver is in a network that is closed to slots. The node would ask it on a sandbox's behalf.
        """
        for entry in rules.dns_servers:
            if any(IPv4Address(entry) in network for network in self._never):
                raise BadValue(f"dnsServers entry '{entry}' is in a network that no sandbox may reach")

    async def apply(self, slot: Slot, rules: Rules) -> None:
        """Replace a slot's policy at once."""
        if rules == OPEN_RULES:
            await self.remove([slot.index])
            return
        self._own_chains.add(slot.index)
        await self._run(self._chain(slot.index, rules))

    async def allow_names(self, slot_index: int, addresses: Iterable[tuple[str, int]]) -> None:
        """Let a slot reach what an allowed domain resolved to: pairs of address and seconds."""
        pairs = dict(addresses)
        elements = ", ".join(f"{address} timeout {seconds}s" for address, seconds in pairs.items())
        plain = ", ".join(pairs)
        # Deleted and added again: `add` alone does not extend the time of an element that is there.
        name = f"inet {self._table} names-{slot_index}"
        await self._run(
            f"add element {name} {{ {plain} }}\n"
            f"delete element {name} {{ {plain} }}\n"
            f"add element {name} {{ {elements} }}\n"
        )

    async def remove(self, indexes: Iterable[int]) -> None:
        """Forget the policies of slots; they are open then."""
        doomed = self._own_chains.intersection(indexes)
        if doomed:
            await self._run("".join(self._without(index) for index in sorted(doomed)))
            self._own_chains -= doomed

    async def clear(self) -> None:
        """Take the whole table away."""
        await self._run(f"add table inet {self._table}\ndelete table inet {self._table}\n")

    async def is_there(self) -> bool:
        """False when somebody flushed the host's rules."""
        try:
            await self._run(f"list chain inet {self._table} from-slot")
        except NetworkFailure:
            return False
        return True

    async def _run(self, commands: str) -> None:
        if self._nft is None:
            raise NetworkFailure("the firewall has not been started")
        try:
            async with self._turn:  # here and not in the thread: the node's other work needs the threads
                await to_thread_whole(self._nft.run, commands)
        except NftError as error:
            raise NetworkFailure(f"nftables refused the rules: {error}") from error

    def _common(self, dns_port: int) -> str:
        never = ", ".join(str(network) for network in self._never)
        slots = f'"{self._interfaces}"'
        chains = {
            # Wrong sender addresses and IPv6 go first, before connection tracking sees them.
            "source": (
                "type filter hook prerouting priority raw; policy accept;",
                f"iifname {slots} meta nfproto ipv6 drop",
                f"iifname {slots} iifname . ip saddr != @sources drop",
            ),
            # Name queries to any gateway address reach the forwarder, also from a machine restored in another slot.
            "names": (
                "type nat hook prerouting priority dstnat - 5; policy accept;",
                f"iifname {slots} ip daddr {self._network} meta l4proto {{ tcp, udp }} th dport 53 "
                f"redirect to :{dns_port}",
            ),
            "to-host": (
                "type filter hook input priority filter - 5; policy accept;",
                f"iifname != {slots} accept",
                "ct state established,related accept",
                f"meta l4proto {{ tcp, udp }} th dport {dns_port} ct status dnat accept",
                "jump refuse",
            ),
            "through": (
                "type filter hook forward priority filter - 5; policy accept;",
                f"iifname {slots} jump from-slot",
                f"oifname {slots} ct state established,related accept",
                f"oifname {slots} drop",
            ),
            "leaving": (
                "type nat hook postrouting priority srcnat - 5; policy accept;",
                f"ip saddr {self._network} oifname != {slots} iifname {slots} masquerade",
            ),
            "from-slot": (
                "",
                f"oifname {slots} jump refuse",
                f"ip daddr {{ {never} }} jump refuse",
                # The host's connection table is shared: one slot must not fill it.
                f"ct state new add @connections {{ iifname ct count over {CONNECTIONS_PER_SLOT} }} jump refuse",
                "iifname vmap @slots",
            ),
            "refuse": ("", "meta l4proto tcp reject with tcp reset", "reject with icmpx type admin-prohibited"),
        }
        table = f"inet {self._table}"
        lines = [
            f"add table {table}",
            f"add map {table} slots {{ type ifname : verdict; }}",
            f"add set {table} sources {{ type ifname . ipv4_addr; }}",
            f"add set {table} connections {{ type ifname; size 65535; flags dynamic; }}",
        ]
        for name, (hook, *_) in chains.items():
            lines.append(f"add chain {table} {name}" + (f" {{ {hook} }}" if hook else ""))
        for name, (_, *rules) in chains.items():
            lines.append(f"flush chain {table} {name}")
            lines.extend(f"add rule {table} {name} {rule}" for rule in rules)
        return "\n".join(lines) + "\n"

    @property
    def _slot_count(self) -> int:
        return self._network.num_addresses // 4

    def _sources(self, indexes: range) -> str:
        pairs = (f'"{interface_name(self._table, n)}" . {machine_address(self._network, n)}' for n in indexes)
        return f"add element inet {self._table} sources {{ {', '.join(pairs)} }}\n"

    def _chain(self, index: int, rules: Rules) -> str:
        table, chain, names = f"inet {self._table}", f"slot-{index}", f"names-{index}"
        lines = [f"add chain {table} {chain}", f"flush chain {table} {chain}"]
        # The set of names is emptied by each new policy: what it held may not be allowed any more.
        new_set = f"add set {table} {names} {{ type ipv4_addr; flags timeout; size {_NAMES_PER_SLOT}; }}"
        lines += [new_set, f"delete set {table} {names}"]
        rule = f"add rule {table} {chain}"
        if rules.allow:
            lines.append(f"{rule} ip daddr {{ {_list(rules.allow)} }} accept")
        if rules.domains:
            lines += [new_set, f"{rule} ip daddr @{names} accept"]
        if not rules.allow_internet:
            lines.append(f"{rule} jump refuse")
        elif rules.deny:
            lines.append(f"{rule} ip daddr {{ {_list(rules.deny)} }} jump refuse")
        lines.append(f'add element {table} slots {{ "{interface_name(self._table, index)}" : jump {chain} }}')
        return "\n".join(lines) + "\n"

    def _without(self, index: int) -> str:
        table, chain, names = f"inet {self._table}", f"slot-{index}", f"names-{index}"
        interface = f'"{interface_name(self._table, index)}"'
        # Each thing is added before it is deleted, so that a missing one is not an error.
        return (
            f"add chain {table} {chain}\n"
            f"add element {table} slots {{ {interface} : jump {chain} }}\n"
            f"delete element {table} slots {{ {interface} }}\n"
            f"flush chain {table} {chain}\n"
            f"delete chain {table} {chain}\n"
            f"add set {table} {names} {{ type ipv4_addr; flags timeout; size {_NAMES_PER_SLOT}; }}\n"
            f"delete set {table} {names}\n"
        )


def interface_name(instance: str, index: int) -> str:
    """The host's end of a slot's veth pair, and the name of its namespace."""
    return f"{instance}-{index}"


def host_address(network: IPv4Network, index: int) -> IPv4Address:
    return network.network_address + 4 * index + 1


def machine_address(network: IPv4Network, index: int) -> IPv4Address:
    return network.network_address + 4 * index + 2


def _configured(text: str) -> IPv4Network:
    try:
        return IPv4Network(text, strict=False)
    except ValueError as error:
        raise BadValue(f"EMBERBOX_DENY_NETWORKS: '{text}' is not an IPv4 network") from error


def _list(networks: Iterable[IPv4Network]) -> str:
    return ", ".join(str(network) for network in networks)
