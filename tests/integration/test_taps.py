"""A tap and its namespace, as a slot for microVMs has them."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from emberbox.linux import netns, taps
from tests.support.container import needs_root

pytestmark = [
    needs_root,
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="needs /dev/net/tun"),
]


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"ebt{secrets.token_hex(3)}"
    netns.create(name, lambda: None)
    try:
        yield name
    finally:
        netns.delete(name)


def shown(namespace: str, *words: str) -> Any:
    command = ["ip", "-n", namespace, "-json", *words, "dev", taps.NAME]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_guest_is_known_for_good_and_every_tap_looks_the_same_to_it(namespace: str) -> None:
    netns.run_in(namespace, lambda: taps.add(IPv4Address("198.18.0.6"), IPv4Address("198.18.0.5")))

    (link,) = shown(namespace, "link", "show")
    (guest,) = shown(namespace, "neighbour", "show")
    assert link["address"] == taps.GATEWAY_MAC
    assert (guest["dst"], guest["lladdr"], guest["state"]) == (str(taps.GUEST.ip), taps.GUEST_MAC, ["PERMANENT"])
