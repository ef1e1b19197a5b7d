"""A real Firecracker in a real jail, with a namespace and a tap of the test's own.

These tests ask nothing of the guest, which has a kernel and a program that sleeps: where the host's KVM is an emulated
one, even the kernel does not come far. What needs a living guest is in `tests/lab`.
"""

from __future__ import annotations

import os
import struct
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from emberbox.runtime.base import Limits, MachineSpec, Rates, Slot
from emberbox.runtime.firecracker import guest, jail
from emberbox.runtime.firecracker.guest import GuestFiles
from emberbox.runtime.firecracker.jail import JailerSettings
from emberbox.runtime.firecracker.runtime import FirecrackerRuntime, FirecrackerSettings
from tests.support import firecracker as parts

MIB = 1024 * 1024


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.timeout(600))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "needs root: the jailer changes its root folder and user"
    if not os.access("/dev/kvm", os.W_OK):
        return "needs /dev/kvm"
    return None


def sleeper() -> bytes:
    """The smallest static program that never ends: an ELF header, one segment, and `pause` in a loop."""
    code = bytes.fromhex("b8220000000f05ebf7")  # mov eax, 34 (pause); syscall; jmp to the start
    base, header_bytes, segment_bytes = 0x400000, 64, 56
    entry = header_bytes + segment_bytes
    size = entry + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, base + entry, header_bytes, 0, 0, header_bytes, segment_bytes, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + segment + code


@pytest.fixture(scope="session")
def guest_files(tmp_path_factory: pytest.TempPathFactory) -> GuestFiles:
    """The real kernel, from a cache shared by runs, and an initramfs whose `/init` does nothing for ever."""
    folder = parts.cache_dir() / "guest"
    agent = tmp_path_factory.mktemp("agent") / "emberd"
    agent.write_bytes(sleeper())
    with parts.one_at_a_time("guest"):
        return guest.make_guest_files(folder, agent)


@pytest.fixture
def instance() -> Iterator[str]:
    """A tag for everything global that the test makes."""
    tag = f"ebt{uuid.uuid4().hex[:6]}"
    yield tag
    left = jail.cgroup_parents(tag)
    jail.remove_cgroup_parent(tag)
    assert not left, "the runtime left its control group"


@pytest.fixture
async def runtime(guest_files: GuestFiles, instance: str, tmp_path: Path) -> AsyncIterator[FirecrackerRuntime]:
    before = os.umask(0o077)  # as the node has it
    pair = parts.pair()
    machines = tmp_path / "machines"
    machines.mkdir()
    made = await FirecrackerRuntime.open(
        FirecrackerSettings(
            binaries=JailerSettings(pair.firecracker, pair.jailer, cgroup_parent=instance),
            guest=guest_files,
            machines_dir=machines,
            first_user=1_900_000_000,
        )
    )
    yield made
    await made.sweep(frozenset())
    await made.close()
    os.umask(before)


@pytest.fixture
def new_spec(instance: str, tmp_path: Path) -> Iterator[Callable[..., MachineSpec]]:
    """Makes specs, each with a namespace, a tap, a layer and a blank upper of its own."""
    namespaces: list[str] = []

    def make(name: str = "m1", *, memory_mb: int = 128, cpu_count: int = 1, rates: Rates | None = None) -> MachineSpec:
        number = len(namespaces)
        netns = f"{instance}-{number}"
        _ip("netns", "add", netns)
        namespaces.append(netns)
        _ip("-n", netns, "tuntap", "add", "tap0", "mode", "tap")
        _ip("-n", netns, "addr", "add", "169.254.0.22/30", "dev", "tap0")
        _ip("-n", netns, "link", "set", "tap0", "up")
        machine_id = f"{name}-{instance}"  # tests run side by side, and look for theirs among all processes
        directory = tmp_path / "machines" / machine_id
        directory.mkdir()
        layer = tmp_path / "layer.erofs"
        if not layer.exists():
            layer.write_bytes(b"layer" * 4096)
        upper = directory / "upper"
        with upper.open("wb") as out:
            out.truncate(16 * MIB)
        return MachineSpec(
            machine_id=machine_id,
            directory=directory,
            layers=(layer,),
            upper=upper,
            slot=Slot(number, netns, IPv4Address("198.18.0.1"), IPv4Address("198.18.0.2"), tap="tap0"),
            limits=Limits(cpu_count=cpu_count, memory_mb=memory_mb, disk_size_mb=16, rates=rates or Rates()),
            hostname="sandbox",
            control_hash="00" * 32,
        )

    yield make
    for netns in namespaces:
        subprocess.run(["ip", "netns", "del", netns], check=False, timeout=30)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30, capture_output=True)
