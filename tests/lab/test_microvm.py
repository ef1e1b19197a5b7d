"""Sandboxes in real microVMs: what only a guest kernel of its own, and memory that survives, can show."""

from __future__ import annotations

import time

import pytest
from e2b import Sandbox

from tests.lab.support import (
    PATIENCE,
    KvmHost,
    NewSandbox,
    assert_clock_is_right,
    clock_behind,
    connect,
    run,
    until,
)


def test_a_sandbox_has_a_kernel_of_its_own(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = new_sandbox()

    boot_id = run(sandbox, "cat /proc/sys/kernel/random/boot_id")

    assert boot_id != host.run("cat /proc/sys/kernel/random/boot_id").strip()
    assert "Firecracker" in run(sandbox, "cat /sys/class/dmi/id/sys_vendor /proc/cmdline 2>/dev/null; true") or (
        "emberd.mode=vm" in run(sandbox, "cat /proc/cmdline")
    )


def test_every_machine_is_jailed_with_a_user_of_its_own(new_sandbox: NewSandbox, host: KvmHost) -> None:
    host.needs_control_groups_2()
    new_sandbox(), new_sandbox()

    processes = host.run(
        # A spare has no guest yet, and Firecracker closes the last of its system calls when it gets one.
        f"for p in {' '.join(map(str, host.firecrackers()))}; do grep -q fc_vcpu /proc/$p/task/*/comm || continue;"
        " grep -E '^(Uid|CapEff|Seccomp|NoNewPrivs):' /proc/$p/status | tr -s '\\t\\n' ' ';"
        " readlink /proc/$p/ns/net /proc/$p/ns/mnt | tr '\\n' ' '; cat /proc/$p/cgroup; done"
    ).splitlines()

    users = [line.split()[1] for line in processes]
    assert len(processes) >= 2
    assert len(set(users)) == len(users)
    assert "0" not in users
    for line in processes:
        assert "CapEff: 0000000000000000" in line
        assert "Seccomp: 2" in line
        assert "NoNewPrivs: 1" in line
    outside = host.run("readlink /proc/self/ns/net").strip()
    assert all(outside not in line for line in processes)
    assert len({line.split("0::")[1] for line in processes}) == len(processes)


def test_two_clones_of_one_memory_share_no_randomness_and_no_identity(new_sandbox: NewSandbox) -> None:
    facts = "head -c 16 /dev/urandom | od -An -tx1; python3 -c 'import uuid; print(uuid.uuid4())'; cat /etc/machine-id"

    one, two = (run(new_sandbox(), facts).splitlines() for _ in range(2))

    assert all(a != b for a, b in zip(one, two, strict=True))


def test_programs_that_go_on_in_forks_make_random_numbers_of_their_own_from_the_first_on(
    new_sandbox: NewSandbox,
) -> None:
    source = new_sandbox()
    mint = "import time, uuid\nwhile True:\n    print(uuid.uuid4(), time.time(), flush=True)\n    time.sleep(0.005)\n"
    source.files.write("/tmp/mint.py", mint, request_timeout=PATIENCE)
    source.commands.run("python3 /tmp/mint.py > /tmp/minted", background=True, timeout=0, request_timeout=PATIENCE)
    until("it mints", lambda: int(run(source, "wc -l < /tmp/minted")) > 20)

    forks = source.fork(count=2, timeout=1800, request_timeout=PATIENCE)
    try:
        minted = [run(each, "cat /tmp/minted").splitlines() for each in (source, *forks)]
    finally:
        for fork in forks:
            fork.kill(request_timeout=PATIENCE)

    assert all(len(lines) > 40 for lines in minted)
    twice = [
        lines
        for lines in zip(*minted, strict=False)
        if len({line.split()[0] for line in lines}) < len(lines) and len(set(lines)) > 1
    ]
    # The number that was made, and not written yet, when the memory was saved is everybody's.
    assert len(twice) <= 1, twice


def test_the_clock_of_a_restored_machine_is_right(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = new_sandbox()

    assert_clock_is_right(sandbox, host)

    sandbox.pause(request_timeout=PATIENCE)
    assert_clock_is_right(connect(sandbox), host)


@pytest.mark.slow
def test_a_clock_that_drifts_is_corrected_and_one_that_was_set_is_left_alone(new_sandbox: NewSandbox) -> None:
    drifting, elsewhere = new_sandbox(), new_sandbox()
    put_back = "python3 -c 'import time; time.clock_settime(time.CLOCK_REALTIME, time.time() - {})'"
    run(drifting, put_back.format(0.02), user="root")
    run(elsewhere, put_back.format(3600), user="root")
    was_set = time.monotonic()
    assert clock_behind(drifting) > 0.01

    until("the drift is made up for", lambda: abs(clock_behind(drifting)) < 0.002)

    time.sleep(max(0.0, was_set + 65 - time.monotonic()))  # each agent looks at its clock once a minute
    assert abs(clock_behind(elsewhere) - 3600) < 1


def test_a_pause_that_keeps_no_memory_boots_again_from_the_files(new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    boot_id = run(sandbox, "echo kept > ~/kept; sync; cat /proc/sys/kernel/random/boot_id")

    sandbox.pause(mode="filesystem", request_timeout=PATIENCE)
    again = Sandbox.connect(sandbox.sandbox_id, timeout=1800, request_timeout=PATIENCE)

    assert run(again, "cat ~/kept") == "kept"
    assert run(again, "cat /proc/sys/kernel/random/boot_id") != boot_id


def test_the_guest_cannot_reach_the_host_or_another_sandbox(new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    probe = "timeout 20 bash -c 'exec 3<>/dev/tcp/{}/{}' 2>/dev/null && echo open || echo closed"

    assert run(sandbox, probe.format("10.0.2.2", 22)) == "closed"
    assert run(sandbox, probe.format("198.18.0.1", 3000)) == "closed"
    assert run(sandbox, probe.format("169.254.0.22", 22)) == "closed"


def test_memory_that_is_given_up_takes_no_file_with_it(new_sandbox: NewSandbox) -> None:
    """A guest's kernel holds back what was just written."""
    sandbox = new_sandbox()
    run(sandbox, "seq 100000 > ~/numbers; md5sum < ~/numbers > ~/sum")
    sandbox.commands.run("sleep 1000", background=True, timeout=0, request_timeout=PATIENCE)
    sandbox.pause(request_timeout=PATIENCE)

    sandbox.connect(timeout=3600, on_resume="reboot", request_timeout=PATIENCE)

    assert run(sandbox, "md5sum < ~/numbers | diff - ~/sum && echo same") == "same"
    assert run(sandbox, "pgrep -x sleep || echo none") == "none"


@pytest.mark.slow
def test_forks_of_a_running_sandbox_go_on_from_the_same_instant(new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    run(sandbox, "echo before > ~/state")

    forks = sandbox.fork(count=2, timeout=1800, request_timeout=PATIENCE)

    try:
        run(sandbox, "echo after > ~/state")
        assert [run(fork, "cat ~/state") for fork in forks] == ["before", "before"]
    finally:
        for fork in forks:
            fork.kill(request_timeout=PATIENCE)
