"""A tap and its namespace, as a slot for microVMs has them."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import subprocess
import time
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

ADDRESS, HOST = IPv4Address("198.18.0.6"), IPv4Address("198.18.0.5")
CONNECTIONS = 100
_VIRTIO_HEADER = bytes(10)


@pytest.fixture
def host() -> Iterator[str]:
    """A namespace that stands for the host."""
    name = f"ebt{secrets.token_hex(3)}"
    netns.create(name, lambda: None)
    try:
        yield name
    finally:
        netns.delete(name)


@pytest.fixture
def namespace(host: str) -> Iterator[str]:
    """A slot's namespace, with its pair to the host."""
    name = f"ebt{secrets.token_hex(3)}"
    netns.create(name, lambda: None)
    try:
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "slot", "netns", host)
        for where, link, address in ((name, "eth0", ADDRESS), (host, "slot", HOST)):
            ip("-n", where, "addr", "add", f"{address}/30", "dev", link)
            ip("-n", where, "link", "set", link, "up")
        ip("-n", name, "route", "add", "default", "via", str(HOST))
        netns.run_in(name, lambda: taps.add(ADDRESS, HOST, connections=CONNECTIONS))
        yield name
    finally:
        netns.delete(name)


@pytest.fixture
def guest(namespace: str) -> Iterator[int]:
    """The guest's end of the tap, for frames."""

    def attach() -> int:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        flags = taps._IFF_TAP | taps._IFF_NO_PI | taps._IFF_VNET_HDR
        fcntl.ioctl(device, taps._TUNSETIFF, struct.pack("16sH22x", taps.NAME.encode(), flags))
        return device

    device = netns.run_in(namespace, attach)
    try:
        yield device
    finally:
        os.close(device)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def shown(namespace: str, *words: str) -> Any:
    return json.loads(ip("-n", namespace, "-json", *words, "dev", taps.NAME))


def packet(to: IPv4Address, port: int) -> bytes:
    """What a guest's network card sends for an empty UDP packet from `port`."""
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, taps.GUEST.ip.packed, to.packed)
    total = sum(struct.unpack("!10H", head))
    checksum = ~(total + (total >> 16)) & 0xFFFF
    macs = bytes.fromhex((taps.GATEWAY_MAC + taps.GUEST_MAC).replace(":", ""))
    udp = struct.pack("!4H", port, 9, 8, 0)
    return _VIRTIO_HEADER + macs + b"\x08\x00" + head[:10] + struct.pack("!H", checksum) + head[12:] + udp


def tracked(namespace: str) -> int:
    """Connections that the kernel remembers."""
    return netns.run_in(namespace, lambda: int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text()))


def flood(guest: int, to: IPv4Address) -> None:
    for port in range(1024, 1024 + 5 * CONNECTIONS):
        os.write(guest, packet(to, port))


def test_the_guest_is_known_for_good_and_every_tap_looks_the_same_to_it(namespace: str) -> None:
    (link,) = shown(namespace, "link", "show")
    (guest,) = shown(namespace, "neighbour", "show")

    assert link["address"] == taps.GATEWAY_MAC
    assert (guest["dst"], guest["lladdr"], guest["state"]) == (str(taps.GUEST.ip), taps.GUEST_MAC, ["PERMANENT"])


@pytest.mark.parametrize("to", [HOST, taps.GATEWAY.ip, ADDRESS], ids=["beyond", "gateway", "own address"])
def test_a_guest_cannot_fill_the_kernels_table_of_connections(namespace: str, guest: int, to: IPv4Address) -> None:
    before = tracked(namespace)

    flood(guest, to)

    assert CONNECTIONS // 2 < tracked(namespace) - before <= CONNECTIONS + 1


def test_a_guest_at_its_limit_is_still_reached(namespace: str, guest: int, host: str) -> None:
    flood(guest, HOST)

    with netns.run_in(host, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sending:
        sending.sendto(b"hello, guest", (str(ADDRESS), 4321))

    frames: list[bytes] = []
    deadline = time.monotonic() + 20
    while not any(frame.endswith(b"hello, guest") for frame in frames):
        assert time.monotonic() < deadline
        try:
            frames.append(os.read(guest, 65536))
        except BlockingIOError:
            time.sleep(0.01)
