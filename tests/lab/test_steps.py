"""Each step of a microVM's life: what it carries over, and what is left when it is cut off in the middle."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest
from e2b import Sandbox, SandboxException, SandboxState
from e2b.exceptions import ServiceBusyException

from tests.lab.support import (
    PATIENCE,
    KvmHost,
    NewSandbox,
    answers,
    appears,
    connect,
    counting,
    grows,
    machine_of,
    node_killed,
    remains,
    run,
    state,
    until,
    use_up_the_pool,
)

COUNTER = counting("/dev/shm")


@pytest.fixture
def copies() -> Iterator[list[Sandbox]]:
    """Further sandboxes of a test, to be ended with it."""
    made: list[Sandbox] = []
    yield made
    for each in made:
        each.kill(request_timeout=PATIENCE)


def goes_on(sandbox: Sandbox) -> bool:
    """Whether the counter in its memory counts."""
    before, after = run(sandbox, "cat /dev/shm/count; sleep 2; cat /dev/shm/count").split()
    return int(after) > int(before)


def test_copies_with_memory_go_on_and_copies_of_files_begin_anew(
    new_sandbox: NewSandbox, copies: list[Sandbox]
) -> None:
    sandbox = new_sandbox()
    counter = sandbox.commands.run(COUNTER, background=True, timeout=0, request_timeout=PATIENCE)
    run(sandbox, "echo kept > ~/kept; echo held > /dev/shm/held; sync")

    whole = sandbox.create_snapshot(mode="full", request_timeout=PATIENCE)
    files = sandbox.create_snapshot(mode="filesystem", request_timeout=PATIENCE)
    copies += sandbox.fork(count=1, timeout=1800, request_timeout=PATIENCE)
    for snapshot in (whole, files):
        copies.append(Sandbox.create(snapshot.snapshot_id, timeout=1800, request_timeout=PATIENCE))
    fork, copy, anew = copies

    for each in (sandbox, fork, copy):
        assert goes_on(each)
        assert run(each, "cat ~/kept /dev/shm/held").split() == ["kept", "held"]
        assert counter.pid in [process.pid for process in each.commands.list(request_timeout=PATIENCE)]
    assert run(anew, "cat ~/kept; ls /dev/shm; pgrep -f '[s]hm/next' || true") == "kept"
    # Those with one memory have nothing secret in common.
    facts = "cat /etc/machine-id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '"
    found = [run(each, facts).split() for each in (sandbox, fork, copy, anew)]
    assert all(len(set(values)) == len(values) for values in zip(*found, strict=True)), found
    for snapshot in (whole, files):
        Sandbox.delete_snapshot(snapshot.snapshot_id, request_timeout=PATIENCE)


def test_a_connection_to_outside_fails_cleanly_after_a_resume(new_sandbox: NewSandbox, host: KvmHost) -> None:
    """Its way out is gone: whoever is asked through it says so, and nobody waits for ever."""
    host.needs_lab("adds a network to its host")
    serve = "import socket; s = socket.create_server(('192.88.98.2', 80)); c = [s.accept() for _ in range(9)]"
    sandbox = new_sandbox()
    program = (
        "import os, socket, time\n"
        "c = socket.create_connection(('192.88.98.2', 80), 30)\n"
        "open('/home/user/connected', 'w')\n"
        "while not os.path.exists('/home/user/ask'): time.sleep(0.1)\n"
        "try:\n"
        "    c.sendall(b'x'); said = repr(c.recv(1))\n"
        "except OSError as error:\n"
        "    said = type(error).__name__\n"
        "open('/home/user/said', 'w').write(said)\n"
    )
    host.run(
        "ip netns add outside && ip link add out-a type veth peer name out-b netns outside"
        " && ip addr add 192.88.98.1/30 dev out-a && ip link set out-a up"
        " && ip -n outside addr add 192.88.98.2/30 dev out-b && ip -n outside link set out-b up"
        " && ip -n outside link set lo up && ip -n outside route add default via 192.88.98.1"
        f" && (ip netns exec outside setsid python3 -c {shlex.quote(serve)} >/dev/null 2>&1 </dev/null &)"
        " && sleep 3"
    )
    try:
        sandbox.files.write("/home/user/talk.py", program, request_timeout=PATIENCE)
        talker = sandbox.commands.run("python3 ~/talk.py", background=True, timeout=0, request_timeout=PATIENCE)
        run(sandbox, "until [ -e ~/connected ]; do sleep 0.2; done")

        sandbox.pause(request_timeout=PATIENCE)
        sandbox = connect(sandbox)

        assert talker.pid in [each.pid for each in sandbox.commands.list(request_timeout=PATIENCE)]
        said = run(sandbox, "touch ~/ask; until [ -e ~/said ]; do sleep 0.2; done; sleep 0.2; cat ~/said")
        assert said in ("b''", "ConnectionResetError", "BrokenPipeError", "TimeoutError"), said
    finally:
        host.run("ip netns pids outside | xargs -r kill; ip netns del outside")


def test_a_pause_that_fills_the_disk_is_refused_and_the_sandbox_runs_on(new_sandbox: NewSandbox, host: KvmHost) -> None:
    host.needs_lab("fills its host's disk")
    sandbox = new_sandbox()
    sandbox.commands.run(COUNTER, background=True, timeout=0, request_timeout=PATIENCE)
    run(sandbox, "head -c 100000000 /dev/zero > /dev/shm/much")
    host.run(f"fallocate -l $(($(df --output=avail -B1 {host.node} | tail -1) - 40000000)) {host.node}/filler")
    try:
        with pytest.raises(SandboxException):
            sandbox.pause(request_timeout=PATIENCE)
        left = host.run(f"find {host.node}/saved -name '{sandbox.sandbox_id}*'").split()
    finally:
        host.run(f"rm -f {host.node}/filler")

    assert left == []
    assert state(sandbox) == SandboxState.RUNNING
    assert goes_on(sandbox)
    sandbox.pause(request_timeout=PATIENCE)
    assert goes_on(connect(sandbox))


def of_record(host: KvmHost, sandbox: Sandbox) -> str:
    """A shell command that prints what the node had written down of a sandbox's state."""
    return f'grep -o \'"state":"[a-z]*"\' {host.node}/records/{sandbox.sandbox_id}.json'


def with_work(new_sandbox: NewSandbox) -> Sandbox:
    """A sandbox with a counter in its memory and a file of some size."""
    sandbox = new_sandbox()
    sandbox.commands.run(COUNTER, background=True, timeout=0, request_timeout=PATIENCE)
    run(sandbox, "seq 500000 > ~/numbers; md5sum < ~/numbers > ~/sum")
    return sandbox


def is_whole(sandbox: Sandbox) -> bool:
    """Whether it has the files of `with_work`; it is resumed for that."""
    return run(connect(sandbox), "md5sum < ~/numbers | cmp - ~/sum && echo whole") == "whole"


def test_a_node_killed_in_the_middle_of_a_pause_loses_nothing(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = with_work(new_sandbox)

    with node_killed(
        host, appears(host, f"{host.node}/saved/{sandbox.sandbox_id}-*"), of_record(host, sandbox)
    ) as found:
        sandbox.pause(request_timeout=PATIENCE)

    assert found == ['"state":"running"'], "it was too late"
    until("its state is known", lambda: state(sandbox) in (SandboxState.RUNNING, SandboxState.PAUSED))
    assert is_whole(sandbox)
    assert goes_on(sandbox)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_killed_in_the_middle_of_a_resume_loses_nothing(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = with_work(new_sandbox)
    sandbox.pause(request_timeout=PATIENCE)

    with node_killed(host, grows(host, f"{host.node}/uppers"), of_record(host, sandbox)) as found:
        connect(sandbox)

    assert found == ['"state":"paused"'], "it was too late"
    assert is_whole(sandbox)
    assert goes_on(sandbox)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_killed_in_the_middle_of_a_cold_resume_loses_nothing(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = with_work(new_sandbox)

    for _ in range(2):
        sandbox.pause(mode="filesystem", request_timeout=PATIENCE)
        with node_killed(
            host, grows(host, f"{host.node}/uppers") + f"; sleep {host.moment(2)}", of_record(host, sandbox)
        ) as found:
            connect(sandbox)
        assert found == ['"state":"paused"'], "it was too late"

    assert is_whole(sandbox)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_killed_in_the_middle_of_a_pause_of_files_loses_none(new_sandbox: NewSandbox, host: KvmHost) -> None:
    sandbox = with_work(new_sandbox)
    machine, _ = machine_of(host, sandbox)
    record = f"{host.node}/records/{sandbox.sandbox_id}.json"
    written = f'touch {host.watching}; until grep -q \'"state":"paused"\' {record}; do :; done'

    with node_killed(host, written):
        sandbox.pause(mode="filesystem", request_timeout=PATIENCE)

    until("nothing is left of the machine", lambda: [x for x in remains(host, machine) if "uppers" not in x] == [], 90)
    assert is_whole(sandbox)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("copy", ["snapshot", "fork"])
def test_a_node_killed_in_the_middle_of_a_copy_leaves_the_source_running_and_no_half(
    new_sandbox: NewSandbox, host: KvmHost, copies: list[Sandbox], copy: str
) -> None:
    sandbox = with_work(new_sandbox)

    def make() -> None:
        if copy == "fork":
            copies.extend(sandbox.fork(count=1, timeout=1800, request_timeout=PATIENCE))
        else:
            snapshot = sandbox.create_snapshot(request_timeout=PATIENCE)
            Sandbox.delete_snapshot(snapshot.snapshot_id, request_timeout=PATIENCE)

    others = set(host.run(f"ls {host.node}/snapshots").split())

    with node_killed(host, grows(host, f"{host.node}/snapshots")):
        make()

    assert state(sandbox) == SandboxState.RUNNING
    assert goes_on(sandbox)
    assert is_whole(sandbox)
    until("nothing is left", lambda: set(host.run(f"ls {host.node}/snapshots").split()) == others, 90)
    make()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_killed_while_it_merges_what_lies_behind_a_machine_loses_nothing(
    new_sandbox: NewSandbox, host: KvmHost
) -> None:
    sandbox = with_work(new_sandbox)
    machine, _ = machine_of(host, sandbox)

    with node_killed(host, appears(host, f"{host.node}/machines/{machine}/*/merged/merging")):
        for _ in range(4):  # each leaves another piece behind the machine
            snapshot = sandbox.create_snapshot(request_timeout=PATIENCE)
            Sandbox.delete_snapshot(snapshot.snapshot_id, request_timeout=PATIENCE)

    assert goes_on(sandbox)
    sandbox.pause(request_timeout=PATIENCE)
    assert is_whole(sandbox)
    assert goes_on(sandbox)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_killed_in_the_middle_of_a_create_leaves_no_machine(new_sandbox: NewSandbox, host: KvmHost) -> None:
    use_up_the_pool(new_sandbox)

    with node_killed(host, grows(host, f"{host.node}/uppers")):
        Sandbox.create(timeout=60, request_timeout=PATIENCE).kill(request_timeout=PATIENCE)

    until(
        "each machine has an owner",
        lambda: host.machines() == len(host.firecrackers()),
    )
    assert run(new_sandbox(), "echo works") == "works"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_a_firecracker_that_fails_in_the_middle_of_a_save_is_told(
    new_sandbox: NewSandbox, host: KvmHost, signal: str
) -> None:
    """One that has died takes its sandbox with it; one that only hung for a while does not."""
    sandbox = with_work(new_sandbox)
    machine, pid = machine_of(host, sandbox)
    saving = appears(host, f"{host.node}/saved/{sandbox.sandbox_id}-*")
    watch = f"{saving}; kill -{signal} {pid}; sleep 5; kill -CONT {pid}"
    host.run(f"rm -f {host.watching}; setsid sh -c {shlex.quote(watch)} >/dev/null 2>&1 </dev/null &")
    host.run(f"until [ -e {host.watching} ]; do sleep 0.05; done")

    if signal == "STOP":
        sandbox.pause(request_timeout=PATIENCE)
        assert is_whole(sandbox)
        assert goes_on(sandbox)
        return
    with pytest.raises((SandboxException, ServiceBusyException)):
        sandbox.pause(request_timeout=PATIENCE)
    until("the sandbox ended", lambda: not answers(sandbox), 60)
    until("nothing is left", lambda: remains(host, machine) == [], 60)
    assert host.run(f"find {host.node}/saved -name '{sandbox.sandbox_id}*'").split() == []
