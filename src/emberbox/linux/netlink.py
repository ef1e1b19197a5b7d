"""Links, addresses, routes and shaping over rtnetlink: the few requests that slots need.

A general netlink library costs 24 MiB of memory and a third of a second at start; this is all of it that is used.
Layouts are from `linux/rtnetlink.h`, `linux/if_link.h`, `linux/neighbour.h`, `linux/veth.h` and `linux/pkt_sched.h`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from ipaddress import IPv4Address, IPv4Interface

_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_NEWNEIGH, _RTM_NEWQDISC = 16, 17, 20, 24, 28, 36
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE, _NLM_F_EXCL, _NLM_F_CREATE = 1, 4, 0x100, 0x200, 0x400
_NLMSG_ERROR = 2
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_GATEWAY = 5
_RT_TABLE_MAIN, _RTPROT_BOOT, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 3, 0, 1
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_TCA_KIND, _TCA_OPTIONS, _TCA_TBF_PARMS, _TCA_TBF_BURST = 1, 2, 1, 6
_TC_H_ROOT, _TC_LINKLAYER_ETHERNET = 0xFFFFFFFF, 1
_SMALLEST_BURST = 32 * 1024
_IFF_UP = 1
_TIMEOUT_SECONDS = 10.0


class Netlink:
    """A socket in the network namespace of the thread that opens it. Calls raise `OSError` with the kernel's reason."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def add_veth(self, name: str, peer: str, peer_namespace: int) -> None:
        """Make a pair of linked interfaces: `name` here, `peer` in the namespace of that descriptor. Both are down."""
        peer_part = _interface(0) + _text(_IFLA_IFNAME, peer) + _attribute(_IFLA_NET_NS_FD, _u32(peer_namespace))
        data = _attribute(_VETH_INFO_PEER, peer_part)
        info = _text(_IFLA_INFO_KIND, "veth") + _attribute(_IFLA_INFO_DATA, data)
        body = _interface(0) + _text(_IFLA_IFNAME, name) + _attribute(_IFLA_LINKINFO, info)
        self._ask(_RTM_NEWLINK, body, _NLM_F_CREATE | _NLM_F_EXCL, f"adding the link {name}")

    def set_up(self, name: str) -> None:
        body = _interface(socket.if_nametoindex(name), flags=_IFF_UP, change=_IFF_UP)
        self._ask(_RTM_NEWLINK, body, 0, f"setting {name} up")

    def set_mac(self, name: str, mac: str) -> None:
        body = _interface(socket.if_nametoindex(name)) + _attribute(_IFLA_ADDRESS, _mac(mac))
        self._ask(_RTM_NEWLINK, body, 0, f"giving {name} the address {mac}")

    def add_neighbour(self, name: str, address: IPv4Address, mac: str) -> None:
        """Say for good where an address on the link is, so that nobody has to be asked."""
        head = struct.pack("=BxxxiHBB", socket.AF_INET, socket.if_nametoindex(name), _NUD_PERMANENT, 0, 0)
        body = head + _attribute(_NDA_DST, address.packed) + _attribute(_NDA_LLADDR, _mac(mac))
        self._ask(_RTM_NEWNEIGH, body, _NLM_F_CREATE | _NLM_F_REPLACE, f"naming {address} on {name}")

    def delete(self, name: str) -> bool:
        """Delete a link; False when there is none of this name."""
        body = _interface(0) + _text(_IFLA_IFNAME, name)
        try:
            self._ask(_RTM_DELLINK, body, 0, f"deleting the link {name}")
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return True

    def add_address(self, name: str, address: IPv4Interface) -> None:
        head = struct.pack(
            "=BBBBi", socket.AF_INET, address.network.prefixlen, 0, _RT_SCOPE_UNIVERSE, socket.if_nametoindex(name)
        )
        packed = address.ip.packed
        body = head + _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
        self._ask(_RTM_NEWADDR, body, _NLM_F_CREATE | _NLM_F_EXCL, f"adding {address} to {name}")

    def add_default_route(self, gateway: IPv4Address) -> None:
        head = struct.pack(
            "=BBBBBBBBI", socket.AF_INET, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, _RT_SCOPE_UNIVERSE, _RTN_UNICAST, 0
        )
        body = head + _attribute(_RTA_GATEWAY, gateway.packed)
        self._ask(_RTM_NEWROUTE, body, _NLM_F_CREATE | _NLM_F_EXCL, f"adding the route by {gateway}")

    def shape(self, name: str, bytes_per_second: int) -> None:
        """Let a link send no faster than this (tc-tbf(8)); below 4 GiB a second. What it receives is not touched.

        20 ms' worth may go at once, and 200 ms' worth waits its turn; beyond that packets are dropped, and TCP slows
        down.
        """
        burst = max(bytes_per_second // 50, _SMALLEST_BURST)
        rate = struct.pack("=BBHhHI", 0, _TC_LINKLAYER_ETHERNET, 0, 0, 0, bytes_per_second)
        no_peak = bytes(len(rate))
        parameters = rate + no_peak + struct.pack("=III", burst + bytes_per_second // 5, 0, 0)
        options = _attribute(_TCA_TBF_PARMS, parameters) + _attribute(_TCA_TBF_BURST, _u32(burst))
        head = struct.pack("=BxxxiIII", socket.AF_UNSPEC, socket.if_nametoindex(name), 0, _TC_H_ROOT, 0)
        body = head + _text(_TCA_KIND, "tbf") + _attribute(_TCA_OPTIONS, options)
        self._ask(_RTM_NEWQDISC, body, _NLM_F_CREATE | _NLM_F_REPLACE, f"shaping {name} (needs sch_tbf in the kernel)")

    def _ask(self, kind: int, body: bytes, flags: int, what: str) -> None:
        self._sequence += 1
        head = struct.pack("=IHHII", 16 + len(body), kind, flags | _NLM_F_REQUEST | _NLM_F_ACK, self._sequence, 0)
        self._socket.send(head + body)
        while True:
            answer = self._socket.recv(65536)
            _, answered, _, sequence, _ = struct.unpack_from("=IHHII", answer)
            if sequence == self._sequence and answered == _NLMSG_ERROR:
                (result,) = struct.unpack_from("=i", answer, 16)
                if result:
                    raise OSError(-result, f"{what}: {os.strerror(-result)}")
                return


def _interface(index: int, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BBHiII", socket.AF_UNSPEC, 0, 0, index, flags, change)


def _attribute(kind: int, payload: bytes) -> bytes:
    size = 4 + len(payload)
    return struct.pack("=HH", size, kind) + payload + b"\0" * (-size % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)
