"""The life of a microVM, as far as its Firecracker alone shows it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from emberbox.linux import processes
from emberbox.runtime.base import KeepsSpares, Machine, MachineSpec, Rates, Runtime, Saved
from emberbox.runtime.errors import MachineGone, RuntimeFailure, SavedDamaged
from emberbox.runtime.firecracker import jail, snapshots
from emberbox.runtime.firecracker import machine as firecracker_machine
from emberbox.runtime.firecracker.errors import ApiError
from emberbox.runtime.firecracker.jail import Jail, JailerSettings, cgroup_version
from emberbox.runtime.firecracker.machine import MicroVM
from emberbox.runtime.firecracker.runtime import FirecrackerRuntime

NewSpec = Callable[..., MachineSpec]


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def left_over(spec: MachineSpec, instance: str) -> list[str]:
    """What a machine of the instance still holds: mounts, processes, control groups, jail."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(spec.directory) in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"{instance}/*/")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{instance}/*/")]
    found += [str(path) for path in (spec.directory / "jail",) if path.exists()]
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"--id={spec.machine_id}".encode() in cmdline.read_bytes() and not_a_zombie(cmdline.parent):
                found.append(str(cmdline))
        except OSError:
            continue
    return found


def firecrackers(instance: str) -> list[int]:
    """Pids in the control groups of the instance's machines, without the threads that KVM adds for a guest."""
    groups = (*Path("/sys/fs/cgroup").glob(f"{instance}/*/"), *Path("/sys/fs/cgroup/cpu").glob(f"{instance}/*/"))
    pids = [int(line) for group in groups for line in (group / "cgroup.procs").read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes()]


def memory_limit(group: str) -> int:
    """Bytes that a control group may have."""
    if cgroup_version() == 2:
        return int(Path("/sys/fs/cgroup", group, "memory.max").read_text())
    return int(Path("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes").read_text())


def processor_share(group: str) -> int:
    """What a control group gets of the processor, against others."""
    if cgroup_version() == 2:
        return int(Path("/sys/fs/cgroup", group, "cpu.weight").read_text())
    return int(Path("/sys/fs/cgroup/cpu", group, "cpu.shares").read_text())


def call(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


def not_a_zombie(process: Path) -> bool:
    return "State:\tZ" not in (process / "status").read_text()


def in_jail(spec: MachineSpec, name: str) -> os.stat_result:
    return (spec.directory / "jail" / "firecracker" / spec.machine_id / "root" / name).stat()


async def saved_machine(runtime: FirecrackerRuntime, spec: MachineSpec, into: Path) -> Saved:
    """Start a machine, save it with its memory, end it."""
    machine = await runtime.start(spec)
    await machine.pause()
    into.mkdir()
    saved = await machine.save(into, memory=True)
    await machine.destroy()
    return saved


def test_it_is_what_the_protocol_asks(runtime: FirecrackerRuntime) -> None:
    assert isinstance(runtime, Runtime)
    assert isinstance(runtime, KeepsSpares)
    assert runtime.capabilities.memory_snapshots


async def test_a_started_machine_runs_jailed(runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str) -> None:
    spec = new_spec(memory_mb=128)

    machine = await runtime.start(spec)

    pid = machine.record()["pid"]
    status = status_of(pid)
    assert isinstance(machine, Machine)
    assert set(status["Uid"].split()) == {"1900000000"}
    assert set(status["Gid"].split()) == {"1900000000"}
    assert status["CapEff"] == "0000000000000000"
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/var/run/netns/{spec.slot.netns}").st_ino
    assert os.stat(f"/proc/{pid}/ns/mnt").st_ino != os.stat("/proc/self/ns/mnt").st_ino
    assert f"/{instance}/{spec.machine_id}" in Path(f"/proc/{pid}/cgroup").read_text()
    await machine.destroy()


async def test_the_control_group_bounds_memory_and_cpu(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    spec = new_spec(memory_mb=256, cpu_count=2)

    machine = await runtime.start(spec)

    group = f"{instance}/{spec.machine_id}"
    if cgroup_version() == 2:
        assert Path("/sys/fs/cgroup", group, "cpu.max").read_text() == "200000 100000\n"
    else:
        assert Path("/sys/fs/cgroup/cpu", group, "cpu.cfs_quota_us").read_text() == "200000\n"
    assert memory_limit(group) == (256 + 128) * 1024 * 1024
    await machine.destroy()


async def test_a_spare_becomes_the_machine_with_its_limits(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str, tmp_path: Path
) -> None:
    saved = await saved_machine(runtime, new_spec("first", memory_mb=192, cpu_count=2), tmp_path / "saved")
    spec = new_spec("m2", memory_mb=192, cpu_count=2)
    await runtime.make_spare(spec.machine_id, spec.directory, spec.slot)
    (waiting,) = firecrackers(instance)

    machine = await runtime.restore(spec, saved)

    pid = machine.record()["pid"]
    status = status_of(pid)
    assert pid == waiting
    assert (set(status["Uid"].split()), status["CapEff"], status["Seccomp"]) == (
        {str(1_900_000_000 + spec.slot.index)},
        "0000000000000000",
        "2",
    )
    assert memory_limit(f"{instance}/{spec.machine_id}") == (192 + 128) * 1024 * 1024
    await machine.pause()
    await machine.resume()
    await runtime.end_spare(spec.machine_id)  # what has become a machine is not a spare any more
    assert await machine.alive()
    await machine.destroy()
    assert left_over(spec, instance) == []


async def test_a_machine_in_the_background_gives_way_until_it_is_resumed(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    one, other = replace(new_spec("m1"), background=True), new_spec("m2")
    for spec in (one, other):
        await runtime.make_spare(spec.machine_id, spec.directory, spec.slot)
    spares = [processor_share(f"{instance}/{spec.machine_id}") for spec in (one, other)]

    waiting, used = await runtime.start(one), await runtime.start(other)

    shares = [processor_share(f"{instance}/{spec.machine_id}") for spec in (one, other)]
    await waiting.pause()
    await waiting.resume()
    assert spares[0] == spares[1] == shares[0]
    assert shares[1] > 4 * shares[0]
    assert processor_share(f"{instance}/{one.machine_id}") == shares[1]
    for machine in (waiting, used):
        await machine.destroy()


async def test_a_spare_that_died_is_replaced_by_a_fresh_firecracker(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    spec = new_spec()
    await runtime.make_spare(spec.machine_id, spec.directory, spec.slot)
    (waiting,) = firecrackers(instance)
    identity = processes.identify(waiting)
    assert identity is not None
    processes.end_and_wait(identity, 30)

    machine = await runtime.start(spec)

    assert machine.record()["pid"] != waiting
    assert await machine.alive()
    await machine.destroy()
    assert left_over(spec, instance) == []


async def test_files_that_a_spare_cannot_have_get_a_fresh_firecracker(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str, tmp_path: Path
) -> None:
    spec = new_spec()
    await runtime.make_spare(spec.machine_id, spec.directory, spec.slot)
    (waiting,) = firecrackers(instance)
    other = tmp_path / "other"
    other.mkdir()
    await asyncio.to_thread(call, "mount", "-t", "tmpfs", "none", str(other))
    try:
        layer = other / "layer.erofs"
        layer.write_bytes(spec.layers[0].read_bytes())

        machine = await runtime.start(replace(spec, layers=(layer,)))

        assert machine.record()["pid"] != waiting
        assert firecrackers(instance) == [machine.record()["pid"]]
        await machine.destroy()
    finally:
        await asyncio.to_thread(call, "umount", str(other))
    assert left_over(spec, instance) == []


async def test_a_spare_that_nobody_took_is_ended_or_swept(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    ended, swept = new_spec("ended"), new_spec("swept")
    for spec in (ended, swept):
        await runtime.make_spare(spec.machine_id, spec.directory, spec.slot)

    await runtime.end_spare(ended.machine_id)
    left = [one for one in left_over(ended, instance) if not one.endswith(f"/{swept.machine_id}")]
    found = await runtime.sweep(frozenset())

    assert left == []
    assert f"microVM {swept.machine_id}" in found
    assert (left_over(swept, instance), firecrackers(instance)) == ([], [])


async def test_a_spare_in_a_slot_that_is_gone_fails_and_leaves_nothing(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    spec = new_spec()

    with pytest.raises(RuntimeFailure, match="jailer"):
        await runtime.make_spare(spec.machine_id, spec.directory, replace(spec.slot, netns="nowhere"))

    assert left_over(spec, instance) == []


async def test_destroy_leaves_nothing_and_may_be_repeated(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    spec = new_spec()
    machine = await runtime.start(spec)

    await machine.destroy()
    await machine.destroy()

    assert left_over(spec, instance) == []
    assert not await machine.alive()


async def test_a_machine_that_dies_is_noticed(runtime: FirecrackerRuntime, new_spec: NewSpec) -> None:
    spec = new_spec()
    machine = await runtime.start(spec)
    with (spec.directory / "jail" / "console.log").open("ab") as console:
        console.write(b"Kernel panic: the cause\n" + b"a line of the trace\n" * 100)

    with capture_logs() as logged:
        watcher = asyncio.create_task(machine.wait())
        await asyncio.sleep(0)
        os.kill(machine.record()["pid"], signal.SIGKILL)
        async with asyncio.timeout(60):
            told = await watcher

    assert "ended" in told
    assert len(told) < 500
    (ended,) = [entry for entry in logged if entry["event"] == "microvm.ended"]
    assert "the cause" in ended["console"], "the node's log has more of the console than a sentence holds"
    with pytest.raises(MachineGone):
        await machine.pause()
    await machine.destroy()


async def test_a_saved_machine_is_restored_and_saves_only_changes_from_then_on(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    first = new_spec("m1")
    saved = await saved_machine(runtime, first, tmp_path / "saved")
    second = new_spec("m2")

    machine = await runtime.restore(second, saved)

    assert await machine.alive()
    again = tmp_path / "again"
    again.mkdir()
    resaved = await machine.save(again, memory=True)
    assert resaved.memory
    whole, changes = snapshots.read_manifest(tmp_path / "saved").pieces[0], again / "memory.1"
    assert (again / whole.name).stat().st_ino == (tmp_path / "saved" / whole.name).stat().st_ino
    assert changes.stat().st_blocks * 512 < 32 * 1024 * 1024
    await machine.destroy()


async def test_what_is_saved_after_a_save_that_failed_is_the_machines_own_memory(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    template = await saved_machine(runtime, new_spec("m1"), tmp_path / "template")
    machine = await runtime.restore(new_spec("m2"), template)
    machine._chain.mark_unsure()  # as a save leaves it that failed
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    await machine.save(tmp_path / "one", memory=True)
    last = await machine.save(tmp_path / "two", memory=True)
    await machine.destroy()

    manifest = snapshots.read_manifest(last.directory)
    snapshots.verify(last.directory, manifest, snapshots.Trusted("another boot"))
    base = [(folder / "memory.0").stat().st_ino for folder in (tmp_path / "one", last.directory, template.directory)]
    assert base[0] == base[1] != base[2]
    restored = await runtime.restore(new_spec("m3"), last)
    assert await restored.alive()
    await restored.destroy()


async def test_what_a_save_left_that_nobody_waited_for_gets_into_no_later_one(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    """Firecracker merges a diff into the file that is there."""
    spec = new_spec()
    machine = await runtime.start(spec)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    await machine.save(tmp_path / "one", memory=True)
    size = (tmp_path / "one" / "memory.0").stat().st_size
    left = machine._jail.out / "memory.1"
    with left.open("wb") as out:
        out.write(b"old" * 1000)
        out.truncate(size)
    os.chown(left, machine._jail.user, machine._jail.user)

    saved = await machine.save(tmp_path / "two", memory=True)

    assert b"oldold" not in (saved.directory / "memory.1").read_bytes()
    await machine.destroy()


async def test_a_machine_that_ends_leaves_its_disk_instead_of_a_copy(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    spec = new_spec()
    machine = await runtime.start(spec)
    await machine.pause()
    (tmp_path / "copied").mkdir()
    (tmp_path / "left").mkdir()

    copied = await machine.save(tmp_path / "copied", memory=True)
    left = await machine.save(tmp_path / "left", memory=True, final=True)
    await machine.destroy()

    assert copied.upper.stat().st_ino != spec.upper.stat().st_ino
    assert left.upper.stat().st_ino == spec.upper.stat().st_ino
    assert left.upper.stat().st_uid == 0
    restored = await runtime.restore(new_spec("m2"), left)
    assert await restored.alive()
    await restored.destroy()


@pytest.mark.parametrize("written", [True, False], ids=["written", "merged"])
async def test_a_machine_saved_twice_is_restored_from_all_its_memory(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    if not written:
        monkeypatch.setattr(runtime, "_most_written", 0)
    saved = await saved_machine(runtime, new_spec("m1"), tmp_path / "one")
    machine = await runtime.restore(new_spec("m2"), saved)
    (tmp_path / "two").mkdir()
    resaved = await machine.save(tmp_path / "two", memory=True)
    await machine.destroy()

    last = await runtime.restore(new_spec("m3"), resaved)

    assert await last.alive()
    assert [piece.name for piece in snapshots.read_manifest(tmp_path / "two").pieces] == ["memory.0", "memory.1"]
    assert (tmp_path / "two" / snapshots.WHOLE).exists() is not written
    await last.destroy()


async def test_a_machine_saved_many_times_keeps_a_short_chain(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firecracker_machine, "_SHORTEN_AFTER_SECONDS", 0.05)
    machine = await runtime.start(new_spec("m1"))
    for number in range(9):
        (tmp_path / str(number)).mkdir()
        last = await machine.save(tmp_path / str(number), memory=True)
        await asyncio.sleep(0.1)

    pieces = snapshots.read_manifest(last.directory).pieces

    assert len(pieces) <= 7
    restored = await runtime.restore(new_spec("m2"), last)
    assert await restored.alive()
    await restored.destroy()
    await machine.destroy()


async def test_a_machine_that_is_paused_and_resumed_quickly_keeps_a_bounded_chain(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firecracker_machine, "_MOST_PIECES", 4)
    last = await saved_machine(runtime, new_spec("m0"), tmp_path / "saved")
    lengths = []
    for number in range(8):
        machine = await runtime.restore(new_spec(f"m{number + 1}"), last)
        folder = tmp_path / str(number)
        folder.mkdir()
        await machine.pause()
        last = await machine.save(folder, memory=True, final=True)
        await machine.destroy()
        manifest = snapshots.read_manifest(folder)
        lengths.append(len(manifest.pieces))
        snapshots.verify(folder, manifest, snapshots.Trusted("another boot"))
        assert {path.name for path in folder.glob("memory.*")} == {piece.name for piece in manifest.pieces}

    assert max(lengths) == 4
    assert 2 in lengths
    restored = await runtime.restore(new_spec("last"), last)
    assert await restored.alive()
    await restored.destroy()


async def test_a_console_that_the_guest_floods_is_cut(runtime: FirecrackerRuntime, new_spec: NewSpec) -> None:
    spec = new_spec()
    machine = await runtime.start(spec)
    console = spec.directory / "jail" / "console.log"
    with console.open("ab") as file:
        file.write(b"x" * (2 << 20))

    async with asyncio.timeout(60):
        while console.stat().st_size > 1 << 20:
            await asyncio.sleep(0.2)

    await machine.destroy()


async def test_clones_share_one_memory_file_and_run_at_once(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    saved = await saved_machine(runtime, new_spec("m0"), tmp_path / "saved")
    specs = [new_spec(f"c{number}") for number in range(6)]

    machines = await asyncio.gather(*(runtime.restore(spec, saved) for spec in specs))

    users = {status_of(machine.record()["pid"])["Uid"].split()[0] for machine in machines}
    assert len(users) == 6
    memory = (tmp_path / "saved" / "memory.0").stat().st_ino
    assert {in_jail(spec, "memory").st_ino for spec in specs} == {memory}
    await asyncio.gather(*(machine.destroy() for machine in machines))


async def test_a_paused_machine_is_adopted_as_paused(runtime: FirecrackerRuntime, new_spec: NewSpec) -> None:
    spec = new_spec()
    machine = await runtime.start(spec)
    await machine.pause()

    adopted = await runtime.adopt(spec, machine.record())

    assert adopted is not None
    assert await adopted.alive()
    await adopted.resume()
    await adopted.destroy()
    assert not await machine.alive()


async def test_a_machine_that_is_gone_is_not_adopted_and_its_jail_goes(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    spec = new_spec()
    machine = await runtime.start(spec)
    os.kill(machine.record()["pid"], signal.SIGKILL)
    async with asyncio.timeout(60):
        await machine.wait()

    assert await runtime.adopt(spec, machine.record()) is None

    assert left_over(spec, instance) == []


async def test_sweep_ends_what_nobody_keeps(runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str) -> None:
    kept, lost = new_spec("kept"), new_spec("lost")
    keeping, losing = await runtime.start(kept), await runtime.start(lost)

    removed = await runtime.sweep(frozenset({kept.machine_id}))

    assert any("lost" in line for line in removed)
    assert not any("kept" in line for line in removed)
    assert not await losing.alive()
    assert await keeping.alive()
    assert (lost.directory / "jail").exists() is False
    await keeping.destroy()


async def test_a_machine_that_cannot_be_removed_does_not_keep_a_sweep_from_the_others(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, lost = new_spec("astuck"), new_spec("lost")
    sticking, losing = await runtime.start(stuck), await runtime.start(lost)
    end_cgroup = jail.end_cgroup

    def ends_all_but_one(parent: str, machine_id: str) -> None:
        if machine_id == stuck.machine_id:
            raise OSError(errno.EBUSY, "Device or resource busy")
        end_cgroup(parent, machine_id)

    with monkeypatch.context() as patched:
        patched.setattr(jail, "end_cgroup", ends_all_but_one)
        await runtime.sweep(frozenset())
    alive = await sticking.alive(), await losing.alive()
    await runtime.sweep(frozenset())

    assert alive == (True, False)
    assert left_over(stuck, instance) == []


async def test_a_missing_layer_fails_with_a_sentence_and_leaves_nothing(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str, tmp_path: Path
) -> None:
    spec = replace(new_spec(), layers=(tmp_path / "gone.erofs",))

    with pytest.raises(RuntimeFailure, match=r"gone\.erofs"):
        await runtime.start(spec)

    assert left_over(spec, instance) == []


async def test_a_missing_namespace_fails_with_the_jailers_words(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    spec = new_spec()
    spec = replace(spec, slot=replace(spec.slot, netns="no-such-namespace"))

    with pytest.raises(RuntimeFailure, match="no-such-namespace"):
        await runtime.start(spec)

    assert left_over(spec, instance) == []


async def test_a_size_that_firecracker_refuses_fails_with_its_words(
    runtime: FirecrackerRuntime, new_spec: NewSpec, instance: str
) -> None:
    spec = new_spec(cpu_count=64)

    with pytest.raises(RuntimeFailure, match="vCPU"):
        await runtime.start(spec)

    assert left_over(spec, instance) == []


async def test_a_damaged_memory_is_refused(runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path) -> None:
    saved = await saved_machine(runtime, new_spec("m1"), tmp_path / "saved")
    memory = tmp_path / "saved" / "memory.0"
    with memory.open("r+b") as handle:
        handle.seek(1024 * 1024)
        handle.write(b"damage")

    with pytest.raises(SavedDamaged, match=r"memory\.0"):
        await runtime.restore(new_spec("m2"), saved)


async def test_a_half_made_save_is_refused(runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path) -> None:
    saved = await saved_machine(runtime, new_spec("m1"), tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").unlink()

    with pytest.raises(SavedDamaged, match="no manifest"):
        await runtime.restore(new_spec("m2"), saved)


async def test_another_size_than_was_saved_is_refused(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    saved = await saved_machine(runtime, new_spec("m1", memory_mb=128), tmp_path / "saved")

    with pytest.raises(RuntimeFailure, match="128 MiB"):
        await runtime.restore(new_spec("m2", memory_mb=256), saved)


async def test_a_disk_only_save_copies_the_disk(runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path) -> None:
    spec = new_spec()
    spec.upper.write_bytes(b"disk" * 4096)
    machine = await runtime.start(spec)
    (tmp_path / "saved").mkdir()

    saved = await machine.save(tmp_path / "saved", memory=False)

    assert saved.upper.read_bytes() == b"disk" * 4096
    assert not saved.memory
    await machine.destroy()


async def test_stats_are_read_from_the_machine(runtime: FirecrackerRuntime, new_spec: NewSpec) -> None:
    machine = await runtime.start(new_spec(memory_mb=128))

    stats = await machine.stats()

    assert 0 < stats.memory_used <= stats.memory_total == 128 * 1024 * 1024
    assert stats.disk_total == 16 * 1024 * 1024
    assert stats.oom_kills == 0
    await machine.destroy()


async def test_a_jailer_that_is_missing_is_said_at_once(runtime: FirecrackerRuntime, tmp_path: Path) -> None:
    settings = replace(
        runtime.settings, binaries=JailerSettings(tmp_path / "firecracker", tmp_path / "jailer", cgroup_parent="x")
    )

    with pytest.raises(RuntimeFailure, match="emberbox setup"):
        await FirecrackerRuntime.open(settings)


async def test_a_link_in_the_place_of_a_saved_file_is_refused_and_not_followed(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    """What a Firecracker that was taken over by its guest could try against the root that collects its files."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    secret.chmod(0o600)
    machine = await runtime.start(new_spec())
    cell = Jail(machine.spec.machine_id, machine.spec.directory / "jail", user=1_900_000_000, cgroup_parent="unused")
    (cell.out / "state").symlink_to(secret)

    with pytest.raises(RuntimeFailure, match="did not write 'state' itself"):
        cell.take_out("state", tmp_path)

    assert secret.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "state").exists()
    await machine.destroy()


async def test_a_link_in_the_place_of_the_api_socket_is_not_followed(
    runtime: FirecrackerRuntime, new_spec: NewSpec
) -> None:
    one, other = await runtime.start(new_spec("m1")), await runtime.start(new_spec("m2"))
    sockets = [
        machine.spec.directory / "jail" / "firecracker" / machine.spec.machine_id / "root" / "api.sock"
        for machine in (one, other)
    ]
    sockets[0].unlink()
    sockets[0].symlink_to(sockets[1])

    with pytest.raises(RuntimeFailure):
        await one.pause()

    assert await other.alive()
    adopted = await runtime.adopt(other.spec, other.record())
    assert adopted is not None
    assert not adopted.paused
    await one.destroy()
    await other.destroy()


async def limiters(machine: MicroVM) -> dict[str, Any]:
    """What Firecracker itself says of its drives, by their names; without a limiter None."""
    config = await machine._api._request("GET", "/vm/config")
    return {drive["drive_id"]: drive["rate_limiter"] for drive in config["drives"]}


async def test_rates_are_buckets_of_every_drive(runtime: FirecrackerRuntime, new_spec: NewSpec) -> None:
    limited = await runtime.start(new_spec("m1", rates=Rates(disk_mb_per_second=5, disk_operations_per_second=100)))
    free = await runtime.start(new_spec("m2"))
    before = await limiters(limited)
    await limited.set_rates(Rates())
    lifted = await limiters(limited)
    await limited.set_rates(limited.spec.limits.rates)

    assert await limiters(free) == {"layer0": None, "upper": None}
    bucket = {"one_time_burst": None, "refill_time": 1000}
    buckets = {"bandwidth": {"size": 5 << 20, **bucket}, "ops": {"size": 100, **bucket}}
    assert before == {"layer0": buckets, "upper": buckets}
    assert lifted == {"layer0": buckets, "upper": None}
    assert await limiters(limited) == before
    await limited.destroy()
    await free.destroy()


async def test_a_restored_machine_has_the_rates_that_were_saved(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    rates = Rates(disk_mb_per_second=5)
    saved = await saved_machine(runtime, new_spec("m1", rates=rates), tmp_path / "saved")

    machine = await runtime.restore(new_spec("m2", rates=rates), saved)

    assert (await limiters(machine))["upper"]["bandwidth"]["size"] == 5 << 20
    await machine.destroy()


@pytest.mark.parametrize("paused", [False, True])
async def test_a_machine_that_is_found_again_has_its_rates(
    runtime: FirecrackerRuntime, new_spec: NewSpec, paused: bool
) -> None:
    spec = new_spec("m1", rates=Rates(disk_mb_per_second=5))
    machine = await runtime.start(spec)
    await machine.set_rates(Rates())  # as in a flush in which the node ends
    if paused:
        await machine.pause()

    found = await runtime.adopt(spec, machine.record())

    assert found is not None
    assert (await limiters(found))["upper"]["bandwidth"]["size"] == 5 << 20
    await found.destroy()


async def test_a_machine_has_an_empty_balloon_also_after_a_restore(
    runtime: FirecrackerRuntime, new_spec: NewSpec, tmp_path: Path
) -> None:
    saved = await saved_machine(runtime, new_spec("m1"), tmp_path / "saved")

    restored = await runtime.restore(new_spec("m2"), saved)

    config = (await restored._api._request("GET", "/vm/config"))["balloon"]
    assert (config["amount_mib"], config["deflate_on_oom"]) == (0, True)
    with pytest.raises(ApiError, match="not activated"):  # no guest lives here whose driver would
        await restored._api.set_balloon(amount_mb=8)
    await restored.destroy()
