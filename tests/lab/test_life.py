"""The life of microVMs when things go wrong, and when they go on for long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from e2b import Sandbox, SandboxException, SandboxState
from e2b.exceptions import ServiceBusyException

from tests.lab.support import (
    PATIENCE,
    KvmHost,
    NewSandbox,
    answers,
    assert_clock_is_right,
    connect,
    counting,
    machine_of,
    node_killed_during,
    remains,
    resident_mib,
    run,
    state,
    until,
    use_up_the_pool,
)


def test_many_clones_of_one_memory_are_all_different(new_sandbox: NewSandbox) -> None:
    facts = (
        "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; cat /proc/sys/kernel/random/uuid;"
        " python3 -c 'import uuid, ssl; print(uuid.uuid4()); print(ssl.RAND_bytes(16).hex())';"
        " cat /proc/sys/kernel/random/boot_id /etc/machine-id"
    )
    names = ("/dev/urandom", "kernel uuid", "uuid4", "OpenSSL", "boot id", "machine id")

    with ThreadPoolExecutor(4) as pool:
        sandboxes = list(pool.map(lambda _: new_sandbox(), range(4)))
    found = [run(sandbox, facts).splitlines() for sandbox in sandboxes]

    for name, values in zip(names, zip(*found, strict=True), strict=True):
        assert len(set(values)) == len(values), f"{name} is shared: {values}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_clones_of_one_memory_at_once_all_answer_and_share_it(new_sandbox: NewSandbox, host: KvmHost) -> None:
    with ThreadPoolExecutor(20) as pool:
        sandboxes = list(pool.map(lambda _: new_sandbox(), range(20)))
    # One after the other: QEMU's forwarding resets connections that come at once.
    said = [run(sandbox, "cat /proc/sys/kernel/random/uuid") for sandbox in sandboxes]

    assert len(set(said)) == 20
    pids = [machine_of(host, sandbox)[1] for sandbox in sandboxes]
    files = host.run(f"for p in {' '.join(map(str, pids))}; do stat -Lc %i /proc/$p/root/memory; done").split()
    assert len(files) == 20
    assert len(set(files)) == 1
    sums = "awk '/^Private/ {n += $2} END {print n}'"
    private = host.run(f"for p in {' '.join(map(str, pids))}; do {sums} /proc/$p/smaps_rollup; done")
    total = int(run(sandboxes[0], "awk '/MemTotal/ {print $2}' /proc/meminfo"))
    assert all(int(kib) < total / 4 for kib in private.split())


def test_memory_and_processor_limits_hold_around_firecracker(new_sandbox: NewSandbox, host: KvmHost) -> None:
    host.needs_control_groups_2()
    sandbox = new_sandbox()
    machine, pid = machine_of(host, sandbox)

    group = host.run(f"cut -d: -f3 /proc/{pid}/cgroup").strip()

    assert group.endswith(f"/{machine}")
    memory, quota = host.run(f"cat /sys/fs/cgroup{group}/memory.max /sys/fs/cgroup{group}/cpu.max").splitlines()
    inside = int(run(sandbox, "awk '/MemTotal/ {print $2}' /proc/meminfo")) * 1024
    assert inside < int(memory) <= inside + 256 * 1024 * 1024
    assert quota == f"{int(run(sandbox, 'nproc')) * 100_000} 100000"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_resumes_lose_no_process_no_connection_and_no_file(new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    counter = sandbox.commands.run(counting("~"), background=True, timeout=0, request_timeout=PATIENCE)
    # One TCP connection inside the guest, over which a line goes each time that ~/ask appears.
    program = (
        "import os, socket, time\n"
        "a, b = socket.create_server(('127.0.0.1', 0)), None\n"
        "c = socket.create_connection(a.getsockname()); b, _ = a.accept(); n = 0\n"
        "held = open('/home/user/held', 'w+')\n"
        "while True:\n"
        "    if os.path.exists('/home/user/ask'):\n"
        "        n += 1; c.sendall(b'x'); got = b.recv(1); held.write('y'); held.flush()\n"
        "        open('/home/user/said', 'w').write(f'{n} {got}'); os.rename('/home/user/ask', '/home/user/asked')\n"
        "    time.sleep(0.1)\n"
    )
    sandbox.files.write("/home/user/talk.py", program, request_timeout=PATIENCE)
    talker = sandbox.commands.run("python3 ~/talk.py", background=True, timeout=0, request_timeout=PATIENCE)
    boot_id = run(sandbox, "cat /proc/sys/kernel/random/boot_id; echo 0 > ~/file0")
    last = 0

    for turn in range(1, 21):
        sandbox.pause(request_timeout=PATIENCE)
        sandbox = connect(sandbox)

        listed = [each.pid for each in sandbox.commands.list(request_timeout=PATIENCE)]
        assert {counter.pid, talker.pid} <= set(listed), turn
        ask = "touch ~/ask; while [ -e ~/ask ]; do sleep 0.1; done; cat ~/said; echo; cat ~/held; echo; cat ~/count"
        said, held, count = run(sandbox, ask).splitlines()
        assert said == f"{turn} b'x'", turn
        assert held == "y" * turn, turn
        assert int(count) > last, f"the counter stands still after resume {turn}"
        last = int(count)
        files = run(
            sandbox, f"echo {turn} > ~/file{turn}; cat $(ls -v ~/file*) /proc/sys/kernel/random/boot_id"
        ).split()
        assert files == [*map(str, range(turn + 1)), boot_id], turn


@pytest.mark.slow
def test_memory_that_the_guest_has_freed_goes_back_to_the_host(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = new_sandbox()
    _, pid = machine_of(host, sandbox)
    fill = "python3 -c 'print(len(b\"x\" * 120_000_000))'"

    assert run(sandbox, fill) == "120000000"

    grown = resident_mib(host, pid)
    until("the host has it back", lambda: resident_mib(host, pid) < grown - 70)
    assert run(sandbox, fill) == "120000000"


@pytest.mark.parametrize(
    ("last", "little"), [pytest.param(1_000_000, True, id="little"), pytest.param(8_000_000, False, id="much")]
)
def test_changes_are_written_over_the_templates_memory_or_merged_with_it(
    new_sandbox: NewSandbox, host: KvmHost, last: int, little: bool
) -> None:
    """7 MB or 62 MB: a restore writes no more than 32 MiB itself."""
    sandbox = new_sandbox()
    look = "md5sum < /dev/shm/numbers"
    said = run(sandbox, f"seq {last} > /dev/shm/numbers; {look}")

    for _ in range(2):
        sandbox.pause(request_timeout=PATIENCE)
        sandbox = connect(sandbox)

        assert run(sandbox, look) == said
        machine, pid = machine_of(host, sandbox)
        loaded = host.run(f"stat -Lc %i /proc/{pid}/root/memory").strip()
        templates = host.run(f"stat -c %i {host.node}/memories/*/memory.0").split()
        assert (loaded in templates) == little
        folder = f"{host.node}/machines/{machine}"
        assert (f"{folder}/memory/whole" in host.run(f"find {folder}")) != little


@pytest.mark.slow
def test_the_clock_is_right_after_an_hour_on_the_disk(new_sandbox: NewSandbox, host: KvmHost) -> None:
    host.needs_lab("sets its host's clock")
    sandbox = new_sandbox()
    # Writes how long each of its naps of half a second really took, by the clock that nobody sets.
    program = (
        "import time\n"
        "while True:\n"
        "    began = time.monotonic(); time.sleep(0.5)\n"
        "    print(time.monotonic() - began, flush=True)\n"
    )
    sandbox.files.write("/home/user/naps.py", program, request_timeout=PATIENCE)
    sandbox.commands.run("python3 ~/naps.py > ~/naps", background=True, timeout=0, request_timeout=PATIENCE)
    run(sandbox, "until [ -s ~/naps ]; do sleep 0.2; done")
    sandbox.pause(request_timeout=PATIENCE)
    host.run("date -s @$(($(date +%s) + 3600))")
    try:
        sandbox = connect(sandbox)
        assert_clock_is_right(sandbox, host)
        naps = [float(nap) for nap in run(sandbox, "sleep 2; cat ~/naps").split()]
    finally:
        host.run("date -s @$(($(date +%s) - 3600))")

    # Firecracker 1.12 lets the guest's own clock go on by the hour: what came due meanwhile comes once, not in a burst.
    assert sum(nap > 60 for nap in naps) <= 1, naps
    assert all(nap >= 0.5 for nap in naps), naps


def test_a_firecracker_that_is_killed_ends_its_sandbox_and_leaves_nothing(
    new_sandbox: NewSandbox, host: KvmHost
) -> None:
    sandbox = new_sandbox()
    machine, pid = machine_of(host, sandbox)

    host.run(f"kill -9 {pid}")

    until("the sandbox ended", lambda: not answers(sandbox), 60)
    until("nothing is left", lambda: remains(host, machine) == [], 60)
    with pytest.raises(SandboxException):
        connect(sandbox)


def test_a_machine_outlives_its_node_and_is_found_again(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = new_sandbox()
    sandbox.commands.run(counting("~"), background=True, timeout=0, request_timeout=PATIENCE)
    found = machine_of(host, sandbox)

    with node_killed_during(host, 0):
        pass

    assert machine_of(host, sandbox) == found
    before = int(run(sandbox, "cat ~/count"))
    sandbox.pause(request_timeout=PATIENCE)
    sandbox = connect(sandbox)
    assert int(run(sandbox, "sleep 1; cat ~/count")) > before


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("after", [0.3, 0.8, 1.5])
def test_a_node_killed_while_it_pauses_or_resumes_loses_no_sandbox(
    new_sandbox: NewSandbox, host: KvmHost, after: float
) -> None:
    sandbox = new_sandbox()
    sandbox.commands.run(counting("~"), background=True, timeout=0, request_timeout=PATIENCE)
    run(sandbox, "echo kept > ~/kept; head -c 5000000 /dev/urandom > ~/noise; sha256sum ~/noise > ~/sum")

    for step in ("pause", "resume"):
        if step == "resume":
            sandbox.pause(request_timeout=PATIENCE)
        with node_killed_during(host, host.moment(after)):
            sandbox.pause(request_timeout=PATIENCE) if step == "pause" else connect(sandbox)

        until("its state is known", lambda: state(sandbox) in (SandboxState.RUNNING, SandboxState.PAUSED))
        again = connect(sandbox)
        assert run(again, "cat ~/kept; sha256sum -c ~/sum").splitlines() == ["kept", "/home/user/noise: OK"], step
        before = int(run(again, "cat ~/count"))
        until("the counter goes on", lambda again=again, before=before: int(run(again, "cat ~/count")) > before, 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_killed_while_it_creates_leaves_nothing(new_sandbox: NewSandbox, host: KvmHost) -> None:
    new_sandbox().kill(request_timeout=PATIENCE)  # the template's memory is there, so a create is a restore

    with node_killed_during(host, host.moment(0.5)):
        Sandbox.create(timeout=60, request_timeout=PATIENCE).kill(request_timeout=PATIENCE)

    until(
        "each machine has an owner",
        lambda: host.machines() == len(host.firecrackers()),
    )
    sandbox = new_sandbox()
    assert run(sandbox, "echo works") == "works"


def test_a_full_disk_is_a_clear_error_and_costs_no_sandbox(new_sandbox: NewSandbox, host: KvmHost) -> None:
    host.needs_lab("fills its host's disk")
    sandbox = new_sandbox()
    run(sandbox, "echo kept > ~/kept")
    host.run(f"fallocate -l $(($(df --output=avail -B1 {host.node} | tail -1) - 300000000)) {host.node}/filler")
    try:
        with pytest.raises(ServiceBusyException, match="disk"):
            use_up_the_pool(new_sandbox)
        assert run(sandbox, "cat ~/kept") == "kept"
    finally:
        host.run(f"rm -f {host.node}/filler")

    assert run(new_sandbox(), "echo works") == "works"


def test_saved_memory_that_is_damaged_is_refused(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = new_sandbox()
    sandbox.pause(request_timeout=PATIENCE)
    # The last piece is this sandbox's own; the first is its template's, and everybody's.
    host.run(
        f'python3 -c \'import glob, os; f = max(glob.glob("{host.node}/saved/{sandbox.sandbox_id}-*/memory.*"));'
        ' d = os.open(f, os.O_RDWR); os.pwrite(d, b"damaged", os.lseek(d, 0, os.SEEK_DATA))\''
    )

    with pytest.raises(SandboxException, match="damaged"):
        connect(sandbox)
    assert state(sandbox) == SandboxState.PAUSED


def test_nothing_is_left_of_a_sandbox_that_was_paused_resumed_and_copied(
    new_sandbox: NewSandbox, host: KvmHost
) -> None:
    sandbox = new_sandbox()
    machines = [machine_of(host, sandbox)[0]]
    sandbox.pause(request_timeout=PATIENCE)
    sandbox = connect(sandbox)
    machines.append(machine_of(host, sandbox)[0])
    snapshot = sandbox.create_snapshot(request_timeout=PATIENCE)
    (fork,) = sandbox.fork(count=1, timeout=1800, request_timeout=PATIENCE)
    machines.append(machine_of(host, fork)[0])

    for each in (fork, sandbox):
        each.kill(request_timeout=PATIENCE)
    Sandbox.delete_snapshot(snapshot.snapshot_id, request_timeout=PATIENCE)

    for machine in machines:
        until(f"nothing is left of {machine}", lambda machine=machine: remains(host, machine) == [], 60)
    assert host.run(f"ls {host.node}/snapshots; find {host.node}/saved -name '{sandbox.sandbox_id}*'").split() == []
