"""The tap of a slot: where a microVM's network card ends, and its way out of the namespace.

Every guest has the same address, so that a memory snapshot can be restored in any slot; what goes in and out is
translated in the slot's namespace. Both ends have the same hardware address in every slot, and this end knows the
other's: a machine that was just restored need not answer an ARP request first, and what it remembers holds. Every
function here runs inside that namespace.
"""

from __future__ import annotations

import fcntl
import os
import struct
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from emberbox.linux.netlink import Netlink
from emberbox.linux.nft import Nft

NAME = "tap0"
GATEWAY = IPv4Interface("169.254.0.22/30")
GATEWAY_MAC = "06:00:a9:fe:00:16"
GUEST = IPv4Interface("169.254.0.21/30")
GUEST_MAC = "06:00:a9:fe:00:15"

_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def add(address: IPv4Address, gateway: IPv4Address, *, connections: int) -> None:
    """Make the tap and translate: the slot's `address` to the guest, the guest's name queries to `gateway`.

    Args:
        connections: that the guest may have at one time. The kernel remembers each one to translate it.

    Raises:
        OSError: the kernel's reason.
        NftError: the rules were refused.
    """
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", NAME.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(device, _TUNSETIFF, request)
        fcntl.ioctl(device, _TUNSETPERSIST, 1)
    finally:
        os.close(device)
    with Netlink() as netlink:
        netlink.set_mac(NAME, GATEWAY_MAC)
        netlink.add_address(NAME, GATEWAY)
        netlink.set_up(NAME)
        netlink.add_neighbour(NAME, GUEST.ip, GUEST_MAC)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Nft().run(
        "add table ip slot\n"
        "add chain ip slot in { type nat hook prerouting priority dstnat; policy accept; }\n"
        "add chain ip slot out { type nat hook postrouting priority srcnat; policy accept; }\n"
        "add chain ip slot from-guest { type filter hook prerouting priority raw; policy accept; }\n"
        f'add rule ip slot from-guest iifname "{NAME}" ip saddr != {GUEST.ip} drop\n'
        # Before routing, so that what goes no further than the gateway counts as well.
        "add chain ip slot connections { type filter hook prerouting priority mangle; policy accept; }\n"
        f'add rule ip slot connections iifname "{NAME}" ct state new ct count over {connections} drop\n'
        f'add rule ip slot in iifname "eth0" ip daddr {address} dnat to {GUEST.ip}\n'
        f'add rule ip slot in iifname "{NAME}" ip daddr {GATEWAY.ip} meta l4proto {{ tcp, udp }} th dport 53 '
        f"dnat to {gateway}\n"
        f'add rule ip slot out oifname "eth0" snat to {address}\n'
    )
