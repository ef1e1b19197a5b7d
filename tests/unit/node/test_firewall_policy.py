"""What a network policy may say, and what it means."""

from __future__ import annotations

import asyncio
import threading
import time
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberbox.node.errors import BadValue
from emberbox.node.firewall import NEVER_ALLOWED, OPEN_RULES, Firewall, NetworkPolicy, parse_policy
from emberbox.settings import Settings


def test_the_default_policy_is_open_and_lists_nothing() -> None:
    assert OPEN_RULES.reaches_anywhere
    assert (OPEN_RULES.allow, OPEN_RULES.deny, OPEN_RULES.domains) == ((), (), ())


def test_addresses_networks_and_domains_are_told_apart() -> None:
    policy = NetworkPolicy(allow_out=("8.8.8.8", "1.1.0.0/16", "*.Example.com."), deny_out=("0.0.0.0/0",))

    rules = parse_policy(policy)

    assert rules.allow == (IPv4Network("1.1.0.0/16"), IPv4Network("8.8.8.8/32"))
    assert rules.domains == ("*.example.com",)
    assert not rules.reaches_anywhere


def test_overlapping_networks_become_one() -> None:
    rules = parse_policy(NetworkPolicy(deny_out=("9.0.0.0/8", "9.1.2.3", "9.0.0.0/9")))

    assert rules.deny == (IPv4Network("9.0.0.0/8"),)


def test_a_host_part_in_a_network_is_taken_as_the_network() -> None:
    assert parse_policy(NetworkPolicy(deny_out=("9.1.2.3/8",))).deny == (IPv4Network("9.0.0.0/8"),)


@pytest.mark.parametrize(
    "entry", ["", "a", "-a.com", "a..com", "a b.com", "*.com/", "http://a.com", "é.com", "a" * 300]
)
def test_what_is_no_domain_is_refused(entry: str) -> None:
    with pytest.raises(BadValue):
        parse_policy(NetworkPolicy(allow_out=(entry,), deny_out=("0.0.0.0/0",)))


@pytest.mark.parametrize("entry", ["127.0.0.1", "10.1.1.1", "169.254.169.254", "192.168.1.1", "::1", "dns.example"])
def test_a_resolver_inside_the_hosts_networks_is_refused(entry: str) -> None:
    with pytest.raises(BadValue, match="dnsServers"):
        parse_policy(NetworkPolicy(dns_servers=(entry,)))


@pytest.mark.parametrize("entry", ["203.0.113.5", "198.51.100.6"])
def test_a_resolver_in_a_network_that_is_closed_on_this_host_is_refused(tmp_path: Path, entry: str) -> None:
    settings = Settings(
        data_dir=tmp_path, deny_networks=("203.0.113.0/24",), slot_network=IPv4Network("198.51.100.0/24")
    )
    rules = parse_policy(NetworkPolicy(dns_servers=("9.9.9.9", entry)))

    with pytest.raises(BadValue, match=f"dnsServers entry '{entry}' is in a network that no sandbox may reach"):
        Firewall(settings).check(rules)


def test_other_resolvers_are_taken(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, deny_networks=("203.0.113.0/24",))

    Firewall(settings).check(parse_policy(NetworkPolicy(dns_servers=("9.9.9.9",))))


class _SlowNft:
    """Counts the threads that are in it."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self._lock = threading.Lock()

    def run(self, _: str) -> str:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.01)
        with self._lock:
            self.inside -= 1
        return ""


async def test_changes_that_wait_for_each_other_take_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firewall = Firewall(Settings(data_dir=tmp_path))
    nft = _SlowNft()
    monkeypatch.setattr(firewall, "_nft", nft)

    await asyncio.gather(*(firewall.allow_names(index, [("1.2.3.4", 60)]) for index in range(8)))

    assert nft.most == 1


@given(st.ip_addresses(v=4))
def test_every_private_address_is_in_the_fixed_list(address) -> None:  # type: ignore[no-untyped-def]
    documentation = any(address in IPv4Network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"))

    listed = any(address in network for network in NEVER_ALLOWED)

    if (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or (address.is_private and not documentation)
    ):
        assert listed


@given(st.text(max_size=40))
def test_any_text_is_a_policy_or_a_clear_refusal(text: str) -> None:
    refusal = ""
    try:
        parse_policy(NetworkPolicy(allow_out=(text,), deny_out=("0.0.0.0/0",)))
    except BadValue as error:
        refusal = str(error)

    assert not refusal or text in refusal
