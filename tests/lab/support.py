"""What tests of the lab share: patient clients, and a look at the machines behind sandboxes."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
from e2b import Sandbox, SandboxException, SandboxState
from e2b.exceptions import ServiceBusyException

from tests.clients.support import leaks
from tests.clients.support.host import Host
from tests.clients.support.timing import SCALE
from tests.lab.lab import TEST_SCALE

NewSandbox = Callable[[], Sandbox]
PATIENCE = 450.0
_COMMAND_SECONDS = 300.0
_LAB_INSTANCE = "eblab"
"""See `environment.sh`."""


_HOST_CLOCK = """
import glob, os, time
names = {open(path + '/clock_name').read().strip(): os.path.basename(path) for path in glob.glob('/sys/class/ptp/*')}
host = (~os.open('/dev/' + names['KVM virtual PTP'], os.O_RDONLY) << 3) | 3
looks = []
for _ in range(5):
    before = time.time()
    there = time.clock_gettime(host)
    after = time.time()
    looks.append((after - before, there - (before + after) / 2))
print(min(looks)[1])
"""
"""Prints by how many seconds the host's clock is ahead of the guest's."""


@dataclass(frozen=True)
class KvmHost:
    """The host that the microVMs are on: the lab, or this machine where its KVM runs guests."""

    place: Host

    @property
    def node(self) -> str:
        """The node's folder there."""
        return f"{self.place.data_dir}/node"

    @property
    def watching(self) -> str:
        """A file that is made there by what waits for something to happen."""
        return f"{self.place.data_dir}/run/watching"

    def moment(self, seconds: float) -> float:
        """Seconds in the lab, as seconds there: where KVM works all is over so much sooner."""
        return seconds if self.place.lab is not None else seconds / float(TEST_SCALE)

    def firecrackers(self) -> list[int]:
        """The processes of this Emberbox's Firecrackers."""
        instance = _LAB_INSTANCE if self.place.lab is not None else leaks.instance_tag(self.place.emberbox)
        each = f"for p in $(pgrep -x firecracker); do grep -q '/{instance}/' /proc/$p/cgroup && echo $p; done"
        return [int(pid) for pid in self.run(f"{each}; true").split()]

    def machines(self) -> int:
        """How many machines have a folder there, spares among them."""
        return len(self.run(f"ls {self.node}/machines").split())

    def run(self, command: str) -> str:
        """Run a command there as root and return what it printed; fails the test when the command fails."""
        return self.place.run(command, timeout=_COMMAND_SECONDS / SCALE)

    def needs_lab(self, reason: str) -> None:
        """Skip the test on a machine that is not only there for tests."""
        if self.place.lab is None:
            pytest.skip(f"it {reason}, which is done in a lab only")

    def needs_control_groups_2(self) -> None:
        if self.run("test -e /sys/fs/cgroup/cgroup.controllers && echo yes || true").strip() != "yes":
            pytest.skip("it reads control groups of version 2, which this host has not")


def counting(folder: str) -> str:
    """A command that counts in the file `count` of a folder inside for ever; a reader finds a whole number there."""
    return f"n=0; while true; do n=$((n+1)); echo $n > {folder}/next; mv {folder}/next {folder}/count; sleep 0.2; done"


def run(sandbox: Sandbox, command: str, user: str = "user") -> str:
    return sandbox.commands.run(command, user=user, timeout=PATIENCE, request_timeout=PATIENCE).stdout.strip()


def connect(sandbox: Sandbox) -> Sandbox:
    return Sandbox.connect(sandbox.sandbox_id, timeout=3600, request_timeout=PATIENCE)


def clock_behind(sandbox: Sandbox) -> float:
    """Seconds by which a guest's clock is behind its host's, as the guest can read that."""
    return float(run(sandbox, f"python3 -c {shlex.quote(_HOST_CLOCK)}", user="root"))


def assert_clock_is_right(sandbox: Sandbox, host: KvmHost) -> None:
    """Within 50 ms of the node's: coarsely seen from outside, exactly from inside."""
    before = float(host.run("date +%s.%N"))
    inside = float(run(sandbox, "date +%s.%N"))
    after = float(host.run("date +%s.%N"))

    assert before - 0.05 <= inside <= after + 0.05
    assert abs(clock_behind(sandbox)) < 0.05


def state(sandbox: Sandbox) -> SandboxState:
    return sandbox.get_info(request_timeout=PATIENCE).state


def answers(sandbox: Sandbox) -> bool:
    try:
        return sandbox.is_running(request_timeout=PATIENCE)
    except httpx.TransportError:  # the connection broke with the machine
        return False


def machine_of(host: KvmHost, sandbox: Sandbox) -> tuple[str, int]:
    """The machine's ID and the pid of its Firecracker."""
    record = json.loads(host.run(f"cat {host.node}/records/{sandbox.sandbox_id}.json"))
    return record["machine"]["machine_id"], record["machine"]["facts"]["pid"]


def remains(host: KvmHost, machine: str) -> list[str]:
    """What is left of a machine in processes, control groups, mounts and files."""
    return host.run(
        f"pgrep -f -- [-]-id.{machine} || true; find /sys/fs/cgroup -name {machine};"
        f" grep {machine} /proc/self/mountinfo || true; find {host.node} -name '{machine}*'"
    ).split()


def resident_mib(host: KvmHost, pid: int) -> float:
    return int(host.run(f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status")) / 1024


def until(what: str, check: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(1)


def node_process(host: KvmHost) -> int:
    return host.place.pids()["node"]


def node_connections(host: KvmHost) -> int:
    """How often a control plane has connected to the node."""
    return int(host.run(f"grep -c node.connected {host.node}/../logs/api.log"))


@contextlib.contextmanager
def node_killed_during(host: KvmHost, after: float) -> Iterator[None]:
    """Kill the node `after` seconds into the block, and wait until the next one works."""
    with node_killed(host, f"touch {host.watching}; sleep {after}"):
        yield


@contextlib.contextmanager
def node_killed(host: KvmHost, wait: str, look: str = "true") -> Iterator[list[str]]:
    """Kill the node when the shell command `wait` has ended, and wait until the next one works.

    The block begins when `wait` has made the file `host.watching`.

    Yields a list that has, after the block, what `look` printed right after the kill.
    """
    before = node_connections(host)
    pid = node_process(host)
    found: list[str] = []
    host.run(f"rm -f {host.watching}")
    with ThreadPoolExecutor(1) as pool:
        # Not longer than the test waits for it: it would kill the node of another one.
        killing = pool.submit(host.run, f"timeout 240 sh -c {shlex.quote(wait)} && kill -9 {pid} && {{ {look}; }}")
        host.run(f"until [ -e {host.watching} ]; do sleep 0.05; done")
        with contextlib.suppress(SandboxException, ServiceBusyException, OSError, httpx.HTTPError):
            yield found
        found.append(killing.result().strip())
    until("the node is back", lambda: node_connections(host) > before)


def appears(host: KvmHost, pattern: str) -> str:
    """A shell command that ends when a file of this name is there. No process is started for a look."""
    return f'touch {host.watching}; while :; do set -- {pattern}; [ -e "$1" ] && break; done'


def grows(host: KvmHost, folder: str) -> str:
    """A shell command that ends when there is one more file in the folder."""
    look = f'look() {{ set -- {folder}/*; [ -e "$1" ] || shift; found=$#; }}'
    return f"{look}; look; n=$found; touch {host.watching}; while :; do look; [ $found -gt $n ] && break; done"


def use_up_the_pool(new_sandbox: NewSandbox) -> None:
    """Create more sandboxes than machines wait: those have their disk already."""
    for _ in range(4):
        new_sandbox()
