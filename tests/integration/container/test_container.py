"""The container runtime with its real parts: runc, overlayfs, cgroups, namespaces, the agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emberbox.images.layers import LayerStore
from emberbox.linux.mounts import bind
from emberbox.runtime.base import Limits, MachineSpec, Rates
from emberbox.runtime.container.machine import end_container
from emberbox.runtime.container.root import opened_upper
from emberbox.runtime.container.runtime import ContainerRuntime
from emberbox.runtime.errors import MachineGone, NotSupported, RuntimeFailure
from tests.support.container import Guest, World, needs_root

pytestmark = [needs_root, pytest.mark.asyncio(loop_scope="module")]


async def test_a_command_runs_as_the_user_with_a_home_and_sudo(guest: Guest) -> None:
    output = await guest.run("id -un; pwd; echo $HOME; sudo id -u; stat -c %U /code; hostname", user="user")

    assert output.text.split() == ["user", "/home/user", "/home/user", "0", "user", "sandbox"]


async def test_pip_npm_and_apt_work_inside(world: World) -> None:
    guest = await world.machine(memory_mb=1024, disk_mb=2048)

    pip = await guest.run("pip install --quiet six && python -c 'import six; print(six.__name__)'", user="user")
    npm = await guest.run("cd /tmp && npm install --silent is-odd && node -p 'require(\"is-odd\")(3)'", user="user")
    apt = await guest.run("sudo apt-get -qq update && sudo apt-get -qq install -y tree && tree --version", user="user")

    assert pip.text.splitlines()[-1:] == ["six"], pip
    assert npm.text.splitlines()[-1:] == ["true"], npm
    assert apt.code == 0, apt


async def test_what_one_machine_writes_another_does_not_see(world: World, guest: Guest) -> None:
    other = await world.machine()

    await other.run("echo mine > /etc/mine; rm /etc/debian_version")
    output = await guest.run("ls /etc/mine; cat /etc/debian_version")

    assert "No such file" in output.text
    assert output.text.splitlines()[-1].startswith("12.")


async def test_a_full_disk_is_an_error_inside_and_nowhere_else(world: World) -> None:
    guest = await world.machine(disk_mb=512)

    output = await guest.run("dd if=/dev/zero of=/big bs=1M count=600; echo code $?; rm /big; echo fine")

    assert "No space left on device" in output.text
    assert output.text.endswith("fine")
    stats = await guest.machine.stats()
    assert 400 << 20 < stats.disk_total <= 512 << 20


async def test_too_much_memory_kills_inside_and_is_counted(world: World) -> None:
    guest = await world.machine(memory_mb=128)

    output = await guest.run("python3 -c 'x = bytearray(300 << 20)'; echo code $?")

    # What the shell says of it may come on either side.
    assert "code 137" in output.text.splitlines()
    assert (await guest.machine.stats()).oom_kills >= 1
    assert await guest.machine.alive()


async def test_a_fork_bomb_meets_the_pids_limit(world: World) -> None:
    guest = await world.machine()

    output = await guest.run("for i in $(seq 300); do sleep 30 & done 2>&1 | tail -30; pkill sleep; true")

    assert "Resource temporarily unavailable" in output.text or "Cannot fork" in output.text, output
    assert (await guest.run("echo alive")).text == "alive"


async def test_limits_change_while_it_runs(world: World) -> None:
    guest = await world.machine(memory_mb=256)

    await guest.machine.set_limits(Limits(cpu_count=2, memory_mb=512, disk_size_mb=1024, pids=300))
    bigger = await guest.run("python3 -c 'x = bytearray(300 << 20)'; echo code $?")
    await guest.machine.set_limits(Limits(cpu_count=1, memory_mb=128, disk_size_mb=1024, pids=300))

    assert bigger.text == "code 0"
    assert (await guest.machine.stats()).memory_total == 128 << 20


async def test_a_limited_disk_is_read_and_written_no_faster(world: World) -> None:
    guest = await world.machine(rates=Rates(disk_mb_per_second=5))

    written, _ = await _timed(guest, "dd if=/dev/zero of=/x bs=1M count=15 oflag=direct")
    read, _ = await _timed(guest, "dd if=/x of=/dev/null bs=1M iflag=direct")
    # Through the page cache, which is emptied of the file before.
    forget = "import os; os.posix_fadvise(os.open('/x', os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)"
    read_again, output = await _timed(guest, f'python3 -c "{forget}"; cat /x | wc -c')

    assert output == str(15 << 20)
    # Three seconds' worth, and nothing at once.
    assert all(1.5 < seconds < 60 for seconds in (written, read, read_again)), (written, read, read_again)


async def test_operations_of_a_limited_disk_are_counted(world: World) -> None:
    guest = await world.machine(rates=Rates(disk_operations_per_second=100))

    seconds, _ = await _timed(guest, "dd if=/dev/zero of=/x bs=4k count=300 oflag=direct")

    assert 1.5 < seconds < 60


async def test_what_waits_for_a_limited_disk_keeps_nobody_from_pausing_saving_and_ending(
    world: World, tmp_path: Path
) -> None:
    guest = await world.machine(rates=Rates(disk_mb_per_second=1))
    begin = "(dd if=/dev/zero of=/x bs=100M count=1 oflag=direct > /dev/null 2>&1) > /dev/null 2>&1 &"
    began = time.monotonic()

    # At its rate each would wait for 100 s, and a machine that does not stop within 10 s is an error.
    await guest.run(begin)
    await asyncio.sleep(0.5)
    await guest.machine.pause()
    await guest.machine.resume()
    await guest.run(begin)
    await asyncio.sleep(0.5)
    await guest.machine.save(tmp_path, memory=False)
    still_limited, _ = await _timed(guest, "pkill dd; dd if=/dev/zero of=/y bs=1M count=3 oflag=direct")
    await guest.run(begin)
    await asyncio.sleep(0.5)
    await world.end(guest)

    assert time.monotonic() - began < 90
    assert still_limited > 1.5


async def _timed(guest: Guest, command: str) -> tuple[float, str]:
    began = time.monotonic()
    output = await guest.run(command)
    return time.monotonic() - began, output.text


async def test_a_paused_machine_stands_still_and_goes_on(world: World) -> None:
    guest = await world.machine()
    await guest.run("(while :; do echo >> /tmp/ticks; sleep 0.01; done) > /dev/null 2>&1 &")
    ticks = guest.machine._root.upper / "u/tmp/ticks"
    await _until_longer(ticks, 0)

    await guest.machine.pause()
    before = ticks.stat().st_size
    await asyncio.sleep(0.5)
    during = ticks.stat().st_size
    await guest.machine.resume()

    assert before == during
    await _until_longer(ticks, during)


async def _until_longer(path: Path, size: int) -> None:
    async with asyncio.timeout(60):
        while not path.exists() or path.stat().st_size <= size:
            await asyncio.sleep(0.05)


async def test_a_paused_machine_can_be_ended(world: World) -> None:
    guest = await world.machine()

    await guest.machine.pause()
    await world.end(guest)

    assert not await guest.machine.alive()


async def test_saved_files_start_in_another_machine_with_their_owners(world: World, tmp_path: Path) -> None:
    guest = await world.machine()
    await guest.run("echo kept > note && sudo sh -c 'echo root > /srv/r; rm /etc/issue; mv /opt /opt2'", user="user")

    saved = await guest.machine.save(tmp_path, memory=False)
    await guest.run("echo later > /home/user/note")
    other = await world.machine(upper=saved.upper)
    output = await other.run("cat note; stat -c '%U %n' note /srv/r; ls -d /etc/issue /opt2", user="user")

    assert other.pid != guest.pid
    assert other.slot.index != guest.slot.index
    assert output.text.splitlines()[:3] == ["kept", "user note", "root /srv/r"]
    assert "cannot access '/etc/issue'" in output.text
    assert "/opt2" in output.text.splitlines()
    assert (await guest.run("cat /home/user/note")).text == "later"


async def test_a_disk_is_used_again_after_its_machine_ended(world: World, tmp_path: Path) -> None:
    guest = await world.machine(disk_mb=1024)
    await guest.run(
        "dd if=/dev/urandom of=/data bs=1M count=100 2>/dev/null; sha256sum /data > /sum; echo x >> /etc/hosts"
    )
    kept = tmp_path / "kept.ext4"
    guest.spec.upper.rename(kept)

    await world.end(guest)
    other = await world.machine(upper=kept, hostname="renamed")
    output = await other.run("sha256sum -c /sum; tail -1 /etc/hosts; grep -c localhost /etc/hosts; sudo hostname")

    assert output.text.splitlines() == ["/data: OK", "127.0.1.1\trenamed", "1", "renamed"]


async def test_a_save_in_a_paused_machine_leaves_it_paused(world: World, tmp_path: Path) -> None:
    guest = await world.machine()
    await guest.machine.pause()

    await guest.machine.save(tmp_path, memory=False)

    assert guest.machine._cgroup.is_frozen()
    await guest.machine.resume()
    assert (await guest.run("echo on")).text == "on"


async def test_memory_cannot_be_saved_and_says_so(guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="save the files only"):
        await guest.machine.save(tmp_path, memory=True)


async def test_wait_returns_when_the_first_process_is_killed(world: World) -> None:
    guest = await world.machine()
    waiting = asyncio.create_task(guest.machine.wait())
    await asyncio.sleep(0)

    os.kill(guest.pid, signal.SIGKILL)

    assert "first process ended" in await asyncio.wait_for(waiting, 60)
    with pytest.raises(MachineGone):
        await guest.machine.save(guest.directory, memory=False)


async def test_an_open_stream_ends_when_the_machine_does(world: World) -> None:
    guest = await world.machine()
    await guest.run(
        "nohup python3 -m http.server 8000 > /dev/null 2>&1 &"
        "for i in $(seq 1000); do (echo > /dev/tcp/127.0.0.1/8000) 2>/dev/null && break; sleep 0.1; done"
    )
    reader, writer = await asyncio.open_connection(str(guest.slot.address), 8000)

    await world.end(guest)

    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(1), 60) == b""
    writer.close()


async def test_another_process_of_the_node_adopts_a_machine(world: World) -> None:
    guest = await world.machine()
    await guest.run("echo before > /tmp/x")

    again = await ContainerRuntime(world.settings).adopt(guest.spec, guest.machine.record())

    assert again is not None
    guest.machine = again
    assert (await guest.run("cat /tmp/x")).text == "before"
    assert (await again.stats()).memory_used > 0
    ended = asyncio.create_task(again.wait())
    await world.end(guest)
    await asyncio.wait_for(ended, 60)


async def test_an_adopted_machine_has_its_rates(world: World) -> None:
    guest = await world.machine(rates=Rates(disk_mb_per_second=5))
    await guest.machine.set_rates(Rates())  # as in a pause in which the node ends

    await ContainerRuntime(world.settings).adopt(guest.spec, guest.machine.record())
    seconds, _ = await _timed(guest, "dd if=/dev/zero of=/x bs=1M count=15 oflag=direct")

    assert 1.5 < seconds < 60


async def test_a_machine_that_is_gone_is_not_adopted_and_its_traces_go(world: World) -> None:
    guest = await world.machine()
    record = guest.machine.record()
    os.kill(guest.pid, signal.SIGKILL)
    await guest.machine.wait()

    assert await world.runtime.adopt(guest.spec, record) is None
    assert not [trace for trace in world.traces() if guest.spec.machine_id in trace]


def _ids(world: World) -> frozenset[str]:
    return frozenset(guest.spec.machine_id for guest in world.guests)


async def test_a_sweep_ends_what_no_one_keeps(world: World) -> None:
    lost, kept = await world.machine(), await world.machine()

    removed = await ContainerRuntime(world.settings).sweep(_ids(world) - {lost.spec.machine_id})

    assert removed == [f"container {lost.spec.machine_id}"]
    assert not await lost.machine.alive()
    assert (await kept.run("echo here")).text == "here"


async def test_a_sweep_ends_a_machine_that_is_frozen(world: World) -> None:
    lost = await world.machine()
    await lost.machine.pause()

    removed = await ContainerRuntime(world.settings).sweep(_ids(world) - {lost.spec.machine_id})

    assert removed == [f"container {lost.spec.machine_id}"]
    assert not await lost.machine.alive()


async def test_a_machine_that_cannot_be_removed_does_not_keep_a_sweep_from_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, lost = await world.machine(), await world.machine()
    keep = _ids(world) - {stuck.spec.machine_id, lost.spec.machine_id}

    async def ends_all_but_one(machine_id: str, *parts: Any) -> None:
        if machine_id == stuck.spec.machine_id:
            raise RuntimeFailure("the machine's processes did not end within 10 s")
        await end_container(machine_id, *parts)

    with monkeypatch.context() as patched:
        patched.setattr("emberbox.runtime.container.runtime.end_container", ends_all_but_one)
        first = await ContainerRuntime(world.settings).sweep(keep)
    second = await ContainerRuntime(world.settings).sweep(keep)

    assert (first, second) == ([f"container {lost.spec.machine_id}"], [f"container {stuck.spec.machine_id}"])
    assert not await stuck.machine.alive()


async def test_a_sweep_removes_what_a_killed_runc_had_mounted(world: World) -> None:
    machine_id = f"m{secrets.token_hex(6)}"
    record = Path(f"/run/{world.settings.instance}/oci/{machine_id}")
    own_program = record / "runc.left"
    record.mkdir(parents=True)
    own_program.touch()
    bind(Path("/bin/true"), own_program)

    removed = await world.runtime.sweep(_ids(world))

    assert f"container {machine_id}" in removed
    assert not record.exists()


async def test_a_layer_that_is_no_image_is_refused_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    broken = tmp_path / ("0" * 64 + ".erofs")
    broken.write_bytes(b"not an image" * 1000)
    slot = await world.slots.take()
    before = world.traces()
    directory = tmp_path / "machine"
    directory.mkdir()
    upper = directory / "upper.ext4"
    await world.disks.new_upper(upper, 512)
    good = await world.machine()
    spec = good.spec
    await world.end(good)

    with pytest.raises(RuntimeFailure, match="could not be prepared"):
        await world.runtime.start(
            replace(spec, machine_id="broken", directory=directory, layers=(broken,), upper=upper, slot=slot)
        )
    await world.slots.give_back(slot)

    assert not [trace for trace in world.traces() if "broken" in trace]
    assert before


async def test_destroy_twice_is_the_same_as_once(world: World) -> None:
    guest = await world.machine()

    await guest.machine.destroy()
    await guest.machine.destroy()

    assert not [trace for trace in world.traces() if guest.spec.machine_id in trace]


async def test_nothing_is_left_after_the_last_machine() -> None:
    world = World()
    async with world:
        guest = await world.machine()
        await guest.run("echo x > /tmp/x")
        assert world.traces()

    assert world.traces() == []


async def test_what_a_machine_wrote_becomes_a_layer_of_others(world: World, tmp_path: Path) -> None:
    guest = await world.machine()
    await guest.run(
        "echo new > /code/made; chown user /code/made; rm /etc/issue; rm -rf /usr/share/perl5; mkdir /usr/share/perl5;"
        "echo replaced > /usr/share/perl5/only; mv /usr/share/bash-completion /usr/share/moved; chmod 4755 /code/made;"
        "setcap cap_net_bind_service=ep /code/made 2>/dev/null; true"
    )
    saved = await guest.machine.save(tmp_path, memory=False)
    mounted = tmp_path / "mounted"
    mounted.mkdir()

    store = LayerStore(world.settings.node_dir / "layers")
    with opened_upper(saved.upper, mounted) as folder:
        layer = await store.pack(folder)
    other = await world.machine(layers=(*world.layers, layer.digest))
    output = await other.run(
        "stat -c '%U %a' /code/made; cat /code/made; ls /etc/issue; ls /usr/share/perl5;"
        "ls -d /usr/share/moved/completions;"
        "ls -d /usr/share/bash-completion; touch /usr/share/moved/x && echo writable"
    )

    assert output.text.splitlines() == [
        "user 4755",
        "new",
        "ls: cannot access '/etc/issue': No such file or directory",
        "only",
        "/usr/share/moved/completions",
        "ls: cannot access '/usr/share/bash-completion': No such file or directory",
        "writable",
    ]
    assert list(mounted.iterdir()) == []


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.02, 0.05, 0.1, 0.2])
async def test_a_start_that_is_cancelled_leaves_nothing(world: World, seconds: float, tmp_path: Path) -> None:
    slot = await world.slots.take()
    upper = tmp_path / "upper.ext4"
    await world.disks.new_upper(upper, 512)
    layers = tuple(world.disks.layer(digest) for digest in world.layers)
    limits = Limits(cpu_count=1, memory_mb=256, disk_size_mb=512)
    machine_id = f"cancelled{int(seconds * 1000)}"
    spec = MachineSpec(machine_id, tmp_path, layers, upper, slot, limits, "box", "ab" * 32)

    starting = asyncio.create_task(world.runtime.start(spec))
    await asyncio.sleep(seconds)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await (await starting).destroy()
    await world.slots.give_back(slot)

    assert not [trace for trace in world.traces() if machine_id in trace]
    assert not list(Path("/proc").glob(f"[0-9]*/root/run/{world.settings.instance}/machines/{machine_id}"))
