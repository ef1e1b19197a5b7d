"""Reading and writing cgroup files, both versions, on files that a test made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emberbox.runtime.base import MIB, Limits, Rates
from emberbox.runtime.container import cgroups
from emberbox.runtime.container.cgroups import CgroupV1, CgroupV2
from emberbox.runtime.errors import RuntimeFailure

LIMITS = Limits(cpu_count=2, memory_mb=256, disk_size_mb=1024, pids=99)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def v2(root: Path) -> Path:
    folder = root / "eb1/m1"
    folder.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory pids")
    (folder / "memory.current").write_text(f"{100 * MIB}\n")
    (folder / "memory.max").write_text(f"{256 * MIB}\n")
    (folder / "memory.stat").write_text(f"anon {60 * MIB}\nfile {40 * MIB}\ninactive_file {30 * MIB}\n")
    (folder / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (folder / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (folder / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    return folder


@pytest.fixture
def v1(root: Path) -> Path:
    for controller in ("cpu", "cpuacct", "memory", "pids", "freezer", "blkio", "unified"):
        (root / controller / "eb1/m1").mkdir(parents=True)
    memory = root / "memory/eb1/m1"
    (root / "memory/memory.memsw.limit_in_bytes").write_text("9223372036854771712\n")
    (memory / "memory.limit_in_bytes").write_text(f"{128 * MIB}\n")
    (memory / "memory.usage_in_bytes").write_text(f"{100 * MIB}\n")
    (memory / "memory.stat").write_text(f"total_cache {40 * MIB}\ntotal_inactive_file {30 * MIB}\n")
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (root / "cpuacct/eb1/m1/cpuacct.usage").write_text("2500000000\n")
    (root / "freezer/eb1/m1/freezer.state").write_text("THAWED\n")
    return root


def test_version_2_is_told_by_its_controllers_file(v2: Path) -> None:
    assert isinstance(cgroups.cgroup("/eb1/m1"), CgroupV2)


def test_the_hybrid_layout_counts_as_version_1(v1: Path) -> None:
    assert isinstance(cgroups.cgroup("/eb1/m1"), CgroupV1)


def test_readings_mean_the_same_in_both_versions(v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = CgroupV2("/eb1/m1").read()

    assert reading.cpu_seconds == 2.5
    assert reading.memory_used == 70 * MIB
    assert reading.memory_cache == 40 * MIB
    assert reading.memory_total == 256 * MIB
    assert reading.oom_kills == 2


def test_version_1_is_read_like_version_2(v1: Path) -> None:
    reading = CgroupV1("/eb1/m1").read()

    assert reading.cpu_seconds == 2.5
    assert reading.memory_used == 70 * MIB
    assert reading.memory_cache == 40 * MIB
    assert reading.memory_total == 128 * MIB
    assert reading.oom_kills == 2


def test_limits_of_version_2(v2: Path) -> None:
    CgroupV2("/eb1/m1").set_limits(LIMITS)

    assert (v2 / "cpu.max").read_text() == "200000 100000"
    assert (v2 / "memory.max").read_text() == str(256 * MIB)
    assert (v2 / "pids.max").read_text() == "99"


def test_limits_of_version_1_grow_from_the_sum_down(v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = Path.write_text

    def spy(path: Path, text: str) -> int:
        written.append(path.name)
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", spy)

    CgroupV1("/eb1/m1").set_limits(LIMITS)

    assert written[-2:] == ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]
    assert (v1 / "cpu/eb1/m1/cpu.cfs_quota_us").read_text() == "200000"


def test_limits_of_version_1_shrink_from_memory_up(v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (v1 / "memory/eb1/m1/memory.limit_in_bytes").write_text(str(512 * MIB))
    written: list[str] = []
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: (written.append(path.name), write(path, text))[1])

    CgroupV1("/eb1/m1").set_limits(LIMITS)

    assert written[-2:] == ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]


async def test_freezing_waits_until_the_kernel_says_so(v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup = CgroupV2("/eb1/m1")
    asked: list[bool] = []
    request = cgroup.request_freeze

    def freeze(frozen: bool) -> None:
        request(frozen)
        asked.append(frozen)
        if len(asked) == 3:
            (v2 / "cgroup.events").write_text("populated 1\nfrozen 1\n")

    monkeypatch.setattr(cgroup, "request_freeze", freeze)

    await cgroup.freeze()

    assert asked == [True, True, True]
    assert (v2 / "cgroup.freeze").read_text() == "1"


async def test_what_cannot_be_frozen_goes_on(v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_FREEZE_SECONDS", 0.05)
    cgroup = CgroupV1("/eb1/m1")
    monkeypatch.setattr(cgroup, "is_frozen", lambda: False)

    with pytest.raises(RuntimeFailure, match="did not stop"):
        await cgroup.freeze()

    assert (v1 / "freezer/eb1/m1/freezer.state").read_text() == "THAWED"


def test_removing_takes_every_hierarchy(v1: Path) -> None:
    for folder in v1.glob("*/eb1/m1"):
        for file in folder.iterdir():
            file.unlink()

    CgroupV1("/eb1/m1").remove()
    CgroupV1("/eb1/m1").remove()

    assert cgroups.children("/eb1") == []


RATES = Rates(disk_mb_per_second=5, disk_operations_per_second=100)
DISK = os.makedev(7, 3)


def test_rates_of_version_2_are_one_line_a_device(v2: Path) -> None:
    CgroupV2("/eb1/m1").set_rates(RATES, DISK)
    limited = (v2 / "io.max").read_text()
    CgroupV2("/eb1/m1").lift_rates()

    assert limited == f"7:3 rbps={5 * MIB} wbps={5 * MIB} riops=100 wiops=100"
    assert (v2 / "io.max").read_text() == "7:3 rbps=max wbps=max riops=max wiops=max"


def test_rates_of_version_1_are_a_file_each(v1: Path) -> None:
    folder = v1 / "blkio/eb1/m1"
    CgroupV1("/eb1/m1").set_rates(RATES, DISK)
    limited = {path.name: path.read_text() for path in folder.iterdir()}
    CgroupV1("/eb1/m1").lift_rates()

    assert limited == {
        "blkio.throttle.read_bps_device": f"7:3 {5 * MIB}",
        "blkio.throttle.write_bps_device": f"7:3 {5 * MIB}",
        "blkio.throttle.read_iops_device": "7:3 100",
        "blkio.throttle.write_iops_device": "7:3 100",
    }
    assert {path.read_text() for path in folder.iterdir()} == {"7:3 0"}
