"""What a container says when its host cannot do what is asked."""

from __future__ import annotations

import os
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from emberbox.linux import processes
from emberbox.linux.processes import ProcessId
from emberbox.runtime.base import Limits, MachineSpec, Rates, Slot
from emberbox.runtime.container import cgroups
from emberbox.runtime.container.cgroups import Cgroup, CgroupV1, CgroupV2
from emberbox.runtime.container.machine import Container
from emberbox.runtime.container.oci import OciRuntime
from emberbox.runtime.container.root import Root
from emberbox.runtime.errors import MachineGone, RuntimeFailure


@pytest.fixture(params=[CgroupV1, CgroupV2])
def cgroup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cgroup:
    """Of a host whose control groups have no controller for disks."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
    made: Cgroup = request.param("/eb1/m1")
    return made


def container(tmp_path: Path, cgroup: Cgroup, process: ProcessId) -> Container:
    root = Root(tmp_path / "m1")
    root.upper.mkdir(parents=True)
    slot = Slot(3, "eb1-3", IPv4Address("198.18.0.13"), IPv4Address("198.18.0.14"))
    limits = Limits(1, 128, 512, rates=Rates(disk_mb_per_second=5))
    spec = MachineSpec("m1", tmp_path, (), tmp_path / "u", slot, limits, "box", "ab" * 32)
    return Container(spec, process, root, cgroup, OciRuntime("runc", tmp_path, time_scale=1.0))


async def test_a_host_that_cannot_limit_disks_says_so(tmp_path: Path, cgroup: Cgroup) -> None:
    alive = processes.identify(os.getpid())
    assert alive is not None

    with pytest.raises(RuntimeFailure, match="control groups lack the controller"):
        await container(tmp_path, cgroup, alive).set_rates(Rates(disk_mb_per_second=5))


async def test_a_machine_that_is_gone_is_told_apart_from_that(tmp_path: Path, cgroup: Cgroup) -> None:
    ended = ProcessId(os.getpid(), 1)

    with pytest.raises(MachineGone):
        await container(tmp_path, cgroup, ended).set_rates(Rates(disk_mb_per_second=5))
