"""A sandbox's network settings: checked once, kept as the API got them, told to the node in its own words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

from emberbox.control.errors import Invalid
from emberbox.wire import node_pb2 as pb

AGENT_PORT = 49983
_EVERYWHERE = frozenset({"0.0.0.0/0", "::/0"})
_DOMAIN = re.compile(r"(\*\.)?(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?\Z", re.IGNORECASE)
_PROXY = re.compile(r"[^\s:/@]+:\d{1,5}\Z|\[[0-9a-fA-F:.]+\]:\d{1,5}\Z")
_HOST_MASK = re.compile(r"[a-zA-Z0-9_.:${}\[\]-]{1,255}\Z")
_MOST_RULES = 1000
_MOST_HTTPS_PORTS = 100
"""They are in the sandbox's route, and HAProxy reads a route in one command of at most `tune.bufsize` bytes."""


def check_network(network: Mapping[str, Any]) -> None:
    """Refuse settings that a node could not carry out.

    Raises:
        Invalid: says which value is wrong and what would be right.
    """
    allowed: Sequence[str] = network.get("allowOut") or ()
    denied: Sequence[str] = network.get("denyOut") or ()
    for name, entries in (("allowOut", allowed), ("denyOut", denied)):
        if len(entries) > _MOST_RULES:
            raise Invalid(f"network.{name} has {len(entries)} entries; {_MOST_RULES} are allowed")
    for entry in denied:
        if not _is_network(entry):
            raise Invalid(f"network.denyOut entry {entry[:200]!r} is not an IP address or CIDR block")
    domains = [entry for entry in allowed if not _is_network(entry)]
    for entry in domains:
        if not _DOMAIN.match(entry):
            raise Invalid(f"network.allowOut entry {entry[:200]!r} is not an IP address, CIDR block or domain")
    if domains and not _EVERYWHERE.intersection(denied):
        raise Invalid(
            f"network.allowOut has the domain {domains[0]!r}, which needs network.denyOut to contain '0.0.0.0/0'"
        )
    for server in network.get("dnsServers") or ():
        _check_dns_server(server)
    https_ports: Sequence[int] = network.get("httpsPorts") or ()
    if len(https_ports) > _MOST_HTTPS_PORTS:
        raise Invalid(f"network.httpsPorts has {len(https_ports)} entries; {_MOST_HTTPS_PORTS} are allowed")
    for port in https_ports:
        if not 1 <= port <= 65535 or port == AGENT_PORT:
            raise Invalid(f"network.httpsPorts entry {port} is not a port from 1 to 65535 other than {AGENT_PORT}")
    mask = network.get("maskRequestHost")
    if mask and not _HOST_MASK.match(mask):
        raise Invalid(f"network.maskRequestHost {mask[:200]!r} is not a host name; it may contain ${{PORT}}")
    proxy = network.get("egressProxy")
    if proxy and not _PROXY.match(proxy["address"]):
        raise Invalid(f"network.egressProxy.address {proxy['address'][:200]!r} is not host:port")
    for domain in network.get("rules") or {}:
        if not _DOMAIN.match(domain):
            raise Invalid(f"network.rules key {domain[:200]!r} is not a domain")


def without_secrets(network: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they may be stored and shown: without the proxy's password."""
    kept = {key: value for key, value in network.items() if value is not None}
    if proxy := kept.get("egressProxy"):
        kept["egressProxy"] = {key: value for key, value in proxy.items() if key != "password"}
    return kept


def node_network(network: Mapping[str, Any], *, allow_internet: bool | None) -> pb.Network:
    """The settings in the node contract's words. Internet access is on unless it was switched off."""
    proxy = network.get("egressProxy")
    rules = network.get("rules")
    return pb.Network(
        allow_internet=allow_internet is not False,
        allow_out=network.get("allowOut") or [],
        deny_out=network.get("denyOut") or [],
        dns_servers=network.get("dnsServers") or [],
        egress_proxy=pb.EgressProxy(
            address=proxy["address"],
            username=proxy.get("username") or "",
            password=proxy.get("password") or "",
            tls=bool((proxy.get("tls") or {}).get("enabled")),
        )
        if proxy
        else None,
        rules_json=json.dumps(rules) if rules else "",
    )


def _is_network(text: str) -> bool:
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _check_dns_server(text: str) -> None:
    try:
        address = ip_address(text)
    except ValueError:
        address = None
    if not isinstance(address, IPv4Address):
        raise Invalid(f"network.dnsServers entry {text[:200]!r} is not an IPv4 address")
