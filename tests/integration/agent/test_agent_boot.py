"""emberd boots a virtual machine as its first program and serves in it."""

from __future__ import annotations

import http.client
import json
import shutil
import struct
import time
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support.agent_vm import NEEDED, AgentVM

_missing = [tool for tool in NEEDED if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_missing), reason=f"needs {', '.join(_missing)}"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def vm() -> Iterator[AgentVM]:
    with AgentVM() as vm:
        yield vm


def _sh(vm: AgentVM, script: str, user: str = "user") -> str:
    """Run a script in the machine and return its output; BusyBox has no bash, so the official client cannot."""
    body = json.dumps({"process": {"cmd": "/bin/sh", "args": ["-c", script]}, "stdin": False}).encode()
    import base64

    request = urllib.request.Request(
        f"{vm.url}/process.Process/Start",
        data=struct.pack(">BI", 0, len(body)) + body,
        headers={
            "Content-Type": "application/connect+json",
            "Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode(),
        },
    )
    out = b""
    with urllib.request.urlopen(request, timeout=120) as answer:
        while head := answer.read(5):
            event = json.loads(answer.read(struct.unpack(">BI", head)[1])).get("event", {})
            for kind in ("stdout", "stderr"):
                out += base64.b64decode(event.get("data", {}).get(kind, ""))
    return out.decode()


def test_the_layers_and_the_upper_are_joined(vm: AgentVM) -> None:
    assert _sh(vm, "cat /etc/which") == "second"
    assert _sh(vm, "touch /etc/new /home/user/mine; ls /etc/new; id -un", "root") == "/etc/new\nroot\n"
    assert "overlay on / type overlay (rw" in _sh(vm, "mount")


def test_a_program_finds_what_it_expects(vm: AgentVM) -> None:
    mounts = _sh(vm, "mount")
    for at in ("/proc", "/sys", "/sys/fs/cgroup", "/dev", "/dev/pts", "/dev/shm", "/run"):
        assert f" on {at} type " in mounts
    assert _sh(vm, "hostname; cat /etc/hostname") == "booted\nbooted\n"
    assert _sh(vm, "cat /etc/resolv.conf") == "nameserver 10.0.2.3\nnameserver 192.0.2.53\n"
    network = _sh(vm, "ip addr; ip route")
    assert "inet 10.0.2.15/24" in network
    assert "inet 127.0.0.1/8" in network
    assert "default via 10.0.2.2" in network
    assert _sh(vm, "echo x > /dev/shm/x && cat /dev/shm/x; ls /modules /newroot 2>&1 | grep -c 'No such'") == "x\n2\n"
    assert _sh(vm, "ulimit -n; cat /proc/self/oom_score_adj; cat /proc/1/oom_score_adj") == "1048576\n200\n-1000\n"


def test_the_clock_and_the_names_are_set_by_init(vm: AgentVM) -> None:
    body = {
        "timestamp": "2031-02-03T04:05:06Z",
        "hostname": "restored",
        "machineId": "f" * 32,
        "entropy": "q" * 44,
        "lifecycleID": "second",
    }

    assert vm.control("POST", "/init", json.dumps(body).encode()) == (204, b"")

    assert _sh(vm, "date +%Y-%m-%d 2>/dev/null || /bin/busybox date +%Y-%m-%d").startswith("2031-02-03")
    assert _sh(vm, "hostname; cat /etc/machine-id") == "restored\n" + "f" * 32 + "\n"


def test_what_runs_is_frozen_and_goes_on(vm: AgentVM) -> None:
    _sh(vm, "(i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.05; done) > /dev/null 2>&1 &")
    _sh(vm, "until [ -s /dev/shm/count ]; do sleep 0.05; done")

    status, answer = vm.control("POST", "/freeze?maxWaitMs=30000")
    frozen = json.loads(answer)
    try:
        before, again = _count(vm), _count(vm)
    finally:
        thawed = vm.control("POST", "/unfreeze")

    # The loop, and its `sleep` when it is not between two of them.
    assert (status, frozen["frozen"], frozen["notFrozen"]) == (200, frozen["requested"], 0)
    assert frozen["requested"] in (1, 2)
    assert before == again
    assert thawed == (204, b"")
    deadline = time.monotonic() + 120
    while _count(vm) <= before:
        assert time.monotonic() < deadline


def _count(vm: AgentVM) -> int:
    time.sleep(0.5)
    with urllib.request.urlopen(f"{vm.url}/files?path=/dev/shm/count&username=root", timeout=60) as answer:
        try:
            return int(answer.read() or 0)
        except http.client.IncompleteRead:  # the shell had just emptied it, to write the next number
            return 0


def test_the_disk_is_frozen_and_thawed_again_and_again(vm: AgentVM) -> None:
    for route in ("/fsfreeze", "/fsfreeze", "/fsthaw", "/fsthaw"):
        assert vm.control("POST", route) == (204, b"")

    assert _sh(vm, "echo after > /home/user/after; cat /home/user/after") == "after\n"


def test_the_machine_measures_itself(vm: AgentVM) -> None:
    with urllib.request.urlopen(f"{vm.url}/metrics", timeout=60) as answer:
        metrics = json.loads(answer.read())

    assert metrics["cpu_count"] == 2
    assert 300 << 20 < metrics["mem_total"] < 512 << 20
    assert 0 < metrics["mem_used"] < 200 << 20
    assert 40 << 20 < metrics["disk_total"] < 64 << 20
