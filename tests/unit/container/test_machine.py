"""What a container says when its host cannot do what is asked."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from ipaddress import IPv4Address
from pathlib import Path
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from emberbox.linux import processes
from emberbox.linux.processes import ProcessId
from emberbox.runtime.base import Limits, MachineSpec, Rates, Slot
from emberbox.runtime.container import cgroups
from emberbox.runtime.container.cgroups import Cgroup, CgroupV1, CgroupV2
from emberbox.runtime.container.machine import Container
from emberbox.runtime.container.oci import OciRuntime
from emberbox.runtime.container.root import Root
from emberbox.runtime.errors import MachineGone, RuntimeFailure

CANNOT = PermissionError(errno.EACCES, "Permission denied", "io.max")
"""What the kernel says to a write into a file that a control group does not have."""


@pytest.fixture(params=[CgroupV1, CgroupV2])
def cgroup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cgroup:
    """Of a host whose control groups have no controller for disks."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
    made: Cgroup = request.param("/eb1/m1")
    return made


class SlowCgroup(CgroupV2):
    """In a folder with the files that matter here. Lifting the rates takes until `may_lift`."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.lifting, self.may_lift = threading.Event(), threading.Event()
        self._folder.mkdir(parents=True)
        (self._folder / "io.max").touch()
        (self._folder / "cgroup.freeze").write_text("0")
        self.events = self._folder / "cgroup.events"
        self.events.write_text("frozen 0\n")

    def set_rates(self, rates: Rates, disk: int) -> None:
        if not rates.limit_disk:
            self.lifting.set()
            assert self.may_lift.wait(60)
        super().set_rates(rates, disk)

    @property
    def is_limited(self) -> bool:
        return f"rbps={5 << 20} " in (self._folder / "io.max").read_text()

    @property
    def is_asked_to_freeze(self) -> bool:
        return (self._folder / "cgroup.freeze").read_text() == "1"


@pytest.fixture
def slow_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowCgroup:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
    return SlowCgroup("/eb1/m1")


def this_process() -> ProcessId:
    found = processes.identify(os.getpid())
    assert found is not None
    return found


def container(tmp_path: Path, cgroup: Cgroup, process: ProcessId) -> Container:
    root = Root(tmp_path / "m1")
    root.upper.mkdir(parents=True)
    slot = Slot(3, "eb1-3", IPv4Address("198.18.0.13"), IPv4Address("198.18.0.14"))
    limits = Limits(1, 128, 512, rates=Rates(disk_mb_per_second=5))
    spec = MachineSpec("m1", tmp_path, (), tmp_path / "u", slot, limits, "box", "ab" * 32)
    return Container(spec, process, root, cgroup, OciRuntime("runc", tmp_path, time_scale=1.0))


async def test_a_host_that_cannot_limit_disks_says_so(tmp_path: Path, cgroup: Cgroup) -> None:
    with pytest.raises(RuntimeFailure, match="control groups lack the controller"):
        await container(tmp_path, cgroup, this_process()).set_rates(Rates(disk_mb_per_second=5))


async def test_a_machine_that_is_gone_is_told_apart_from_that(tmp_path: Path, cgroup: Cgroup) -> None:
    ended = ProcessId(os.getpid(), 1)

    with pytest.raises(MachineGone):
        await container(tmp_path, cgroup, ended).set_rates(Rates(disk_mb_per_second=5))


async def test_a_pause_cancelled_while_the_rates_are_lifted_sets_them_again(
    tmp_path: Path, slow_cgroup: SlowCgroup
) -> None:
    pause = asyncio.create_task(container(tmp_path, slow_cgroup, this_process()).pause())
    assert await asyncio.to_thread(slow_cgroup.lifting.wait, 60)

    pause.cancel()
    await asyncio.sleep(0)
    slow_cgroup.may_lift.set()
    await asyncio.gather(pause, return_exceptions=True)

    assert pause.cancelled()
    assert slow_cgroup.is_limited


async def test_a_pause_cancelled_while_processes_stop_lets_them_go_on(tmp_path: Path, slow_cgroup: SlowCgroup) -> None:
    slow_cgroup.may_lift.set()
    pause = asyncio.create_task(container(tmp_path, slow_cgroup, this_process()).pause())
    async with asyncio.timeout(60):
        while not slow_cgroup.is_asked_to_freeze:
            await asyncio.sleep(0.001)

    pause.cancel()
    await asyncio.gather(pause, return_exceptions=True)

    assert pause.cancelled()
    assert slow_cgroup.is_limited
    assert not slow_cgroup.is_asked_to_freeze


async def test_a_machine_goes_on_where_its_disk_cannot_be_limited_any_more(
    tmp_path: Path, slow_cgroup: SlowCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_cgroup, "set_rates", Mock(side_effect=CANNOT))
    machine = container(tmp_path, slow_cgroup, this_process())
    slow_cgroup.events.write_text("frozen 1\n")

    with capture_logs() as logged:
        await machine.pause()
        paused = slow_cgroup.is_asked_to_freeze
        await machine.resume()
        slow_cgroup.events.write_text("frozen 0\n")
        await machine.recover()

    assert paused
    assert not slow_cgroup.is_asked_to_freeze
    assert [(entry["event"], entry["log_level"]) for entry in logged] == [("container.rates_not_set", "warning")] * 3
    assert "control groups lack the controller" in logged[0]["reason"]


async def test_a_save_that_was_cut_short_is_undone_where_the_disk_cannot_be_limited_any_more(
    tmp_path: Path, slow_cgroup: SlowCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_cgroup, "set_rates", Mock(side_effect=CANNOT))
    slow_cgroup.request_freeze(True)
    (tmp_path / "saving").touch()

    await container(tmp_path, slow_cgroup, this_process()).recover()

    assert not slow_cgroup.is_asked_to_freeze
    assert not (tmp_path / "saving").exists()
