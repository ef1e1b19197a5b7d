"""Rules in a host's iptables, tried in a namespace that stands for the host."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from emberbox.linux import netns
from emberbox.node.host_filter import HostFilter
from tests.support.container import needs_root

pytestmark = [
    needs_root,
    pytest.mark.skipif(shutil.which("iptables") is None, reason="needs iptables"),
]


@pytest.fixture
def host() -> Iterator[str]:
    name = "ebh" + secrets.token_hex(3)
    netns.create(name, lambda: None)
    yield name
    netns.delete(name)


def _iptables(host: str, *words: str) -> str:
    command = ["ip", "netns", "exec", host, "iptables", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _filter(host: str) -> HostFilter:
    return HostFilter("eb1", command=("ip", "netns", "exec", host, "iptables"))


async def test_a_host_that_accepts_is_left_alone(host: str) -> None:
    await _filter(host).open()

    assert "eb1" not in _iptables(host, "-S")


async def test_chains_that_drop_let_the_slots_through_once(host: str) -> None:
    _iptables(host, "-P", "FORWARD", "DROP")
    _iptables(host, "-A", "FORWARD", "-j", "DROP")

    await _filter(host).open()
    await _filter(host).open()

    rules = _iptables(host, "-S").splitlines()
    assert [rule for rule in rules if "eb1" in rule] == [
        "-A FORWARD -o eb1-+ -j ACCEPT",
        "-A FORWARD -i eb1-+ -j ACCEPT",
    ]
    assert rules[-1] == "-A FORWARD -j DROP"


async def test_the_rules_go_and_the_hosts_own_stay(host: str) -> None:
    for chain in ("INPUT", "FORWARD"):
        _iptables(host, "-P", chain, "DROP")
    before = _iptables(host, "-S")
    rules = _filter(host)
    await rules.open()
    assert _iptables(host, "-S") != before

    await rules.close()
    await rules.close()

    assert _iptables(host, "-S") == before


async def test_a_host_without_iptables_is_no_error() -> None:
    rules = HostFilter("eb1", command=("/nonexistent/iptables",))

    await rules.open()
    await rules.close()
