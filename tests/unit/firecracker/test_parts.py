"""Programs and guest files: right or refused, whole or not there."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from emberbox.runtime.base import MIB, Limits, MachineSpec, Rates, Slot
from emberbox.runtime.firecracker import binaries, guest, jail, kernel, setup, trial
from emberbox.runtime.firecracker.api import RateLimit
from emberbox.runtime.firecracker.errors import FirecrackerError, GuestFilesError
from emberbox.runtime.firecracker.kernel import KernelTree
from emberbox.runtime.firecracker.machine import buckets
from emberbox.settings import Settings


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pair of programs that counts as the pinned release."""
    folder = tmp_path / "release"
    folder.mkdir()
    for name in ("firecracker", "jailer"):
        (folder / name).write_text(f"program {name}")
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(binaries.DIGESTS, name, digest)
    return folder


def test_the_pinned_pair_is_installed_executable_and_found_again(release: Path, tmp_path: Path) -> None:
    installed = binaries.install(tmp_path / "node", release)

    assert binaries.find(tmp_path / "node") == installed
    assert installed.firecracker.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in (tmp_path / "node").iterdir()) == ["firecracker", "jailer"]


def archive(release: Path, tmp_path: Path, names: tuple[str, ...]) -> Path:
    """A release as it is downloaded, with these programs of it."""
    path = tmp_path / "release.tgz"
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            file.add(release / name, binaries._MEMBER.format(version=binaries.VERSION, name=name))
    return path


def test_the_pinned_pair_is_taken_out_of_the_release_that_is_downloaded(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "_URL", archive(release, tmp_path, ("firecracker", "jailer")).as_uri())

    installed = binaries.install(tmp_path / "node")

    assert binaries.find(tmp_path / "node") == installed
    assert installed.jailer.read_text() == "program jailer"


@pytest.mark.parametrize("flaw", ["missing", "cut off", "no archive", "lacks one"])
def test_a_download_that_is_no_release_is_told_and_nothing_is_installed(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flaw: str
) -> None:
    path = archive(release, tmp_path, ("firecracker",) if flaw == "lacks one" else ("firecracker", "jailer"))
    match flaw:
        case "missing":
            path.unlink()
        case "cut off":
            path.write_bytes(path.read_bytes()[:60])
        case "no archive":
            path.write_text("<html>a login page of the network</html>")
    monkeypatch.setattr(binaries, "_URL", path.as_uri())

    with pytest.raises(FirecrackerError, match=r"could not be installed: .*--from FOLDER"):
        binaries.install(tmp_path / "node")

    assert list((tmp_path / "node").iterdir()) == []


def test_another_program_is_refused_and_nothing_is_installed(release: Path, tmp_path: Path) -> None:
    (release / "jailer").write_text("something else")

    with pytest.raises(FirecrackerError, match=r"jailer is not jailer .* SHA-256"):
        binaries.install(tmp_path / "node", release)

    assert list((tmp_path / "node").iterdir()) == []


def test_a_program_that_was_changed_later_is_refused(release: Path, tmp_path: Path) -> None:
    binaries.install(tmp_path / "node", release)
    (tmp_path / "node" / "firecracker").write_text("changed")

    with pytest.raises(FirecrackerError, match="remove it and run 'emberbox setup' again"):
        binaries.install(tmp_path / "node", release)


def test_one_program_of_the_users_own_is_not_enough(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, firecracker=tmp_path / "firecracker")

    with pytest.raises(FirecrackerError, match="set both or none"):
        setup.install(settings)


def test_a_missing_agent_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(GuestFilesError, match="make agent"):
        guest.make_guest_files(tmp_path / "guest", tmp_path / "emberd")


def test_a_kernel_of_the_users_own_must_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "emberd").touch()
    (tmp_path / "vmlinuz").write_bytes(b"MZ")

    with pytest.raises(GuestFilesError, match="not an ELF kernel"):
        guest.make_guest_files(tmp_path / "guest", tmp_path / "emberd", tmp_path / "vmlinuz")


def test_guest_files_are_made_once_for_each_agent(tmp_path: Path) -> None:
    (tmp_path / "emberd").write_text("one")
    (tmp_path / "vmlinux").write_bytes(b"\x7fELF")
    make = (tmp_path / "guest", tmp_path / "emberd", tmp_path / "vmlinux")

    first = guest.make_guest_files(*make)
    again = guest.make_guest_files(*make)
    (tmp_path / "emberd").write_text("two")
    other = guest.make_guest_files(*make)

    assert again == first
    assert other.kernel == first.kernel
    assert other.initramfs != first.initramfs
    assert b"two" in other.initramfs.read_bytes()
    assert first.initramfs.stat().st_mode & 0o777 == 0o444


def test_the_guest_kernel_is_renewed_and_stays_when_no_newer_can_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newest = {"release": "6.1.0-1", "image": b"one"}
    updated: list[bool] = []

    def fetch(into: Path, *, update: bool = False) -> list[Path]:
        updated.append(update)
        if not newest:
            raise GuestFilesError("no network")
        return []

    def unpack(_: object, into: Path) -> KernelTree:
        (into / "boot").mkdir()
        (into / "boot" / f"vmlinuz-{newest['release']}").write_bytes(newest["image"])  # type: ignore[arg-type]
        (into / "lib" / "modules" / str(newest["release"])).mkdir(parents=True)
        return kernel.open_tree(into)

    monkeypatch.setattr(kernel, "fetch_packages", fetch)
    monkeypatch.setattr(kernel, "unpack_packages", unpack)
    assert guest.renew_kernel(tmp_path) == "6.1.0-1"
    made = tmp_path / "vmlinux-6.1.0-1"
    made.touch()

    guest.renew_kernel(tmp_path)
    assert made.exists(), "it is the same"

    newest["image"] = b"one, built again"
    guest.renew_kernel(tmp_path)
    assert not made.exists()

    newest |= {"release": "6.1.0-2", "image": b"two"}
    assert guest.renew_kernel(tmp_path) == "6.1.0-2"
    newest.clear()
    with pytest.raises(GuestFilesError, match="no network"):
        guest.renew_kernel(tmp_path)

    assert kernel.open_tree(tmp_path / "package").release == "6.1.0-2"
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert all(updated)


@pytest.fixture
def spec(tmp_path: Path) -> MachineSpec:
    return MachineSpec(
        machine_id="m1",
        directory=tmp_path,
        layers=(tmp_path / "a", tmp_path / "b"),
        upper=tmp_path / "upper",
        slot=Slot(7, "eb-7", IPv4Address("198.18.0.29"), IPv4Address("198.18.0.30"), tap="tap0"),
        limits=Limits(cpu_count=2, memory_mb=512, disk_size_mb=1024),
        hostname="sandbox",
        control_hash="ab" * 32,
        dns_servers=(IPv4Address("198.18.0.29"),),
    )


def test_the_command_line_is_the_same_in_every_slot(spec: MachineSpec) -> None:
    other = replace(
        spec,
        slot=Slot(8, "eb-8", IPv4Address("198.18.0.33"), IPv4Address("198.18.0.34"), tap="tap0"),
        dns_servers=(IPv4Address("198.18.0.33"),),
    )

    words = guest.command_line(spec).split()

    assert guest.command_line(other).split() == words
    assert {
        "emberd.mode=vm",
        "emberd.layers=2",
        "emberd.hostname=sandbox",
        "emberd.address=169.254.0.21/30",
        "emberd.gateway=169.254.0.22",
        "emberd.dns=169.254.0.22",
        f"emberd.control_hash={'ab' * 32}",
    } <= set(words)
    assert len(guest.command_line(spec)) < 2048  # the kernel's own limit on x86


def test_limits_are_written_in_each_hierarchys_words() -> None:
    limits = Limits(cpu_count=2, memory_mb=512, disk_size_mb=1024)

    assert list(jail.cgroup_settings(2, limits)) == [f"memory.max={640 * 1024 * 1024}", "cpu.max=200000 100000"]
    assert list(jail.cgroup_settings(1, limits)) == [
        f"memory.limit_in_bytes={640 * 1024 * 1024}",
        "cpu.cfs_period_us=100000",
        "cpu.cfs_quota_us=200000",
    ]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("echo '[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs'", None),
        ("echo 'KVM internal error'; exit 3", r"exit code 3.*KVM internal error"),
        ("exec sleep 60", "did not boot within"),
    ],
    ids=["boots", "dies", "hangs"],
)
async def test_a_trial_boot_tells_kvm_that_works_from_kvm_that_does_not(
    tmp_path: Path, program: str, words: str | None
) -> None:
    firecracker = tmp_path / "firecracker"
    firecracker.write_text(f"#!/bin/sh\n{program}\n")
    firecracker.chmod(0o755)

    if words is None:
        await trial.boot(firecracker, tmp_path / "vmlinux")
    else:
        with pytest.raises(trial.KvmUnusable, match=words):
            await trial.boot(firecracker, tmp_path / "vmlinux", time_scale=0.1 if "sleep" in program else 1.0)


def test_a_tree_with_two_kernels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    for release in ("1", "2"):
        (tmp_path / "boot" / f"vmlinuz-{release}").touch()

    with pytest.raises(GuestFilesError, match="found 2"):
        kernel.open_tree(tmp_path)


def test_rates_are_a_seconds_worth_and_none_is_no_bucket() -> None:
    assert buckets(Rates()) == (None, None)
    assert buckets(Rates(disk_mb_per_second=5, network_mbit_per_second=8)) == (RateLimit(5 * MIB, 1000), None)
    assert buckets(Rates(disk_operations_per_second=100)) == (None, RateLimit(100, 1000))
