"""What a sandbox may reach. The targets are namespaces that these tests made; nothing goes to the internet."""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from e2b import Sandbox

from tests.clients.support.host import Host
from tests.clients.support.timing import eventually, seconds
from tests.support.networks import Claim

# Outside every private and special range that a sandbox is kept from, but never routed beyond this host:
# the namespace's own route is more specific than any other.
TARGET_NETWORKS = [ipaddress.IPv4Network(f"192.88.98.{n}/30") for n in range(0, 256, 4)]


@dataclass(frozen=True)
class Target:
    """A host of its own with a web server on port 80, reachable from this host by one veth pair."""

    address: str
    host_side: str


@pytest.fixture(scope="module")
def target(host: Host) -> Iterator[Target]:
    claim = Claim(TARGET_NETWORKS)
    host_side, address = (str(each) for each in claim.network.hosts())
    name = f"clt{os.getpid()}"
    here, there = f"{name}a", f"{name}b"
    accept = f"import socket\nserver = socket.create_server(({address!r}, 80))\nwhile True: server.accept()[0].close()"
    connect = f"import socket; socket.create_connection(({address!r}, 80), 1)"
    host.run(f"ip netns add {name}")
    try:
        host.run(
            f"ip link add {here} type veth peer name {there} netns {name}"
            f" && ip addr add {host_side}/30 dev {here} && ip link set {here} up"
            f" && ip -n {name} addr add {address}/30 dev {there} && ip -n {name} link set {there} up"
            f" && ip -n {name} link set lo up && ip -n {name} route add default via {host_side}"
        )
        host.run(f"ip netns exec {name} setsid python3 -c {shlex.quote(accept)} >/dev/null 2>&1 </dev/null &")
        eventually(
            lambda: host.run(f"python3 -c {shlex.quote(connect)} 2>/dev/null && echo yes || true"),
            within=90,
            what="the target listens",
        )
        yield Target(address, host_side)
    finally:
        host.run(f"ip netns pids {name} | xargs -r kill; ip netns del {name}")
        claim.release()


def reaches(sandbox: Sandbox, address: str, port: int = 80) -> bool:
    script = f"timeout 15 bash -c 'exec 3<>/dev/tcp/{address}/{port}' 2>/dev/null && echo yes || echo no"
    return sandbox.commands.run(script, timeout=seconds(60)).stdout.strip() == "yes"


def test_the_internet_is_open_by_default(make_sandbox, target):
    assert reaches(make_sandbox(), target.address)


def test_no_internet_access_closes_everything(make_sandbox, target):
    sandbox = make_sandbox(allow_internet_access=False)

    assert not reaches(sandbox, target.address)
    assert sandbox.commands.run("echo still here").stdout == "still here\n"
    assert sandbox.get_info().allow_internet_access is False


def test_a_denied_network_is_closed(make_sandbox, target):
    sandbox = make_sandbox(network={"deny_out": [f"{target.address}/32"]})

    assert not reaches(sandbox, target.address)


def test_other_networks_stay_open(make_sandbox, target):
    sandbox = make_sandbox(network={"deny_out": ["203.0.113.0/24"]})

    assert reaches(sandbox, target.address)


def test_allow_wins_over_deny(make_sandbox, target):
    sandbox = make_sandbox(network={"deny_out": ["0.0.0.0/0"], "allow_out": [target.address]})

    assert reaches(sandbox, target.address)


def test_deny_all_without_allow_closes_everything(make_sandbox, target):
    sandbox = make_sandbox(network={"deny_out": ["0.0.0.0/0"], "allow_out": ["203.0.113.7"]})

    assert not reaches(sandbox, target.address)


def test_rules_of_a_running_sandbox_are_replaced(make_sandbox, target):
    sandbox = make_sandbox()

    before = reaches(sandbox, target.address)
    sandbox.update_network({"deny_out": [target.address]})
    denied = reaches(sandbox, target.address)
    sandbox.update_network({})
    after = reaches(sandbox, target.address)

    assert (before, denied, after) == (True, False, True)


def test_rules_are_kept_over_pause_and_resume(make_sandbox, target):
    sandbox = make_sandbox(network={"deny_out": [target.address]})

    sandbox.pause()
    frozen = reaches(sandbox.connect(), target.address)
    sandbox.pause(mode="filesystem")
    restarted = reaches(sandbox.connect(), target.address)

    assert (frozen, restarted) == (False, False)


def test_info_shows_the_rules(make_sandbox, emberbox):
    sandbox = make_sandbox(network={"deny_out": ["0.0.0.0/0"], "allow_out": ["198.51.100.0/24"]})

    network = sandbox.get_info().network

    assert network["deny_out"] == ["0.0.0.0/0"]
    assert network["allow_out"] == ["198.51.100.0/24"]


def test_the_host_and_its_networks_are_never_reached(make_sandbox, target, host):
    sandbox = make_sandbox(network={"allow_out": ["0.0.0.0/0"]})
    gateway = sandbox.commands.run("ip route 2>/dev/null | awk '/default/ {print $3}' || true").stdout.strip()

    assert not reaches(sandbox, target.host_side, host.api_port)
    assert not reaches(sandbox, "169.254.169.254")
    assert not reaches(sandbox, "127.0.0.1", host.api_port)
    for port in (host.api_port, 22):
        assert not gateway or not reaches(sandbox, gateway, port)


def test_sandboxes_do_not_reach_each_other(make_sandbox, host):
    one, two = make_sandbox(), make_sandbox()
    two.commands.run("exec python3 -m http.server 8000 --bind 0.0.0.0", background=True, timeout=0)
    record = json.loads(host.run(f"cat {host.data_dir}/node/records/{two.sandbox_id}.json"))
    slot = f"-{record['machine']['slot_index']}"
    links = [line.split() for line in host.run("ip -4 -o addr show").splitlines()]
    by_host = [ipaddress.ip_interface(words[3]) + 1 for words in links if words[1].endswith(slot)]
    assert by_host, f"no link of slot {slot} among {links}"
    # What a microVM calls its own address is the same in all of them.
    own, others = (each.commands.run("hostname -I || true").stdout.split() for each in (one, two))
    addresses = {str(each.ip) for each in by_host} | (set(others) - set(own))

    assert not any(reaches(one, address, port) for address in addresses for port in (8000, 49983))


@pytest.mark.parametrize(
    "network",
    [
        {"denyOut": ["not-an-address"]},
        {"denyOut": ["300.1.1.1"]},
        {"denyOut": ["10.0.0.0/33"]},
        {"denyOut": ["example.com"]},
        {"allowOut": ["example.com"]},
        {"allowOut": ["-bad-.example"], "denyOut": ["0.0.0.0/0"]},
        {"allowOut": "1.2.3.4"},
        {"denyOut": [5]},
    ],
    ids=str,
)
def test_rules_that_make_no_sense_are_a_bad_request(api, network):
    answer = api.post("/v2/sandboxes", json={"templateID": "base", "network": network})
    if answer.status_code == 201:
        Sandbox.kill(answer.json()["sandboxID"])

    assert answer.status_code == 400
    assert answer.json()["message"]
