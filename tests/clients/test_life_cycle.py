"""Deadlines, pause and resume, snapshots and forks."""

from __future__ import annotations

import datetime
import time

import pytest
from e2b import (
    CommandExitException,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxState,
)

from tests.clients.support.timing import eventually, whole_seconds


def _left(sandbox_id: str) -> float:
    info = Sandbox.get_info(sandbox_id)
    return (info.end_at - datetime.datetime.now(datetime.UTC)).total_seconds()


def _gone(sandbox_id: str) -> bool:
    try:
        Sandbox.get_info(sandbox_id)
    except SandboxNotFoundException:
        return True
    return False


def _runs(sandbox: Sandbox) -> bool:
    try:
        return sandbox.is_running()
    except Exception:  # cut off
        return True


# ---- deadlines


def test_set_timeout_counts_from_now_and_may_shorten(make_sandbox):
    sandbox = make_sandbox(timeout=whole_seconds(60))

    sandbox.set_timeout(500)
    extended = _left(sandbox.sandbox_id)
    sandbox.set_timeout(100)
    shortened = _left(sandbox.sandbox_id)

    assert extended == pytest.approx(500, abs=60)
    assert shortened == pytest.approx(100, abs=60)


def test_refreshes_extend_and_never_shorten(make_sandbox, api):
    sandbox = make_sandbox(timeout=300)

    shorter = api.post(f"/sandboxes/{sandbox.sandbox_id}/refreshes", json={"duration": 10})
    kept = _left(sandbox.sandbox_id)
    longer = api.post(f"/sandboxes/{sandbox.sandbox_id}/refreshes", json={"duration": 600})
    extended = _left(sandbox.sandbox_id)

    assert (shorter.status_code, longer.status_code) == (204, 204)
    assert kept == pytest.approx(300, abs=60)
    assert extended == pytest.approx(600, abs=60)


def test_an_expired_sandbox_is_gone(make_sandbox):
    sandbox = make_sandbox(timeout=whole_seconds(8))

    eventually(lambda: _gone(sandbox.sandbox_id), within=90, what="the sandbox expires")

    # The edge may be cutting its connections in this moment.
    eventually(lambda: not _runs(sandbox), within=30, what="it does not run")
    assert sandbox.kill() is False
    with pytest.raises(SandboxNotFoundException):
        Sandbox.connect(sandbox.sandbox_id)


def test_timeout_zero_ends_it_at_once(make_sandbox):
    sandbox = make_sandbox()

    sandbox.set_timeout(0)

    eventually(lambda: _gone(sandbox.sandbox_id), within=90, what="the sandbox expires")


def test_connecting_to_a_running_one_only_extends(make_sandbox):
    sandbox = make_sandbox(timeout=300)

    Sandbox.connect(sandbox.sandbox_id, timeout=30)
    kept = _left(sandbox.sandbox_id)
    Sandbox.connect(sandbox.sandbox_id, timeout=900)
    extended = _left(sandbox.sandbox_id)

    assert kept == pytest.approx(300, abs=60)
    assert extended == pytest.approx(900, abs=60)


def test_connect_answers_200_when_running_and_201_when_it_resumed(make_sandbox, api):
    sandbox = make_sandbox()
    for version in ("", "/v2"):
        running = api.post(f"{version}/sandboxes/{sandbox.sandbox_id}/connect", json={"timeout": 100})
        sandbox.pause()
        resumed = api.post(f"{version}/sandboxes/{sandbox.sandbox_id}/connect", json={"timeout": 100})

        assert (running.status_code, resumed.status_code) == (200, 201)
        assert resumed.json()["envdAccessToken"] == running.json()["envdAccessToken"]


# ---- pause and resume


def test_pause_keeps_files_and_says_when_it_was_paused_already(make_sandbox):
    sandbox = make_sandbox()
    sandbox.files.write("kept.txt", "kept")

    first, second = sandbox.pause(), sandbox.pause()
    state = Sandbox.get_info(sandbox.sandbox_id).state
    again = sandbox.connect()

    assert (first, second) == (True, False)
    assert state == SandboxState.PAUSED
    assert again.files.read("kept.txt") == "kept"
    assert Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.RUNNING


def test_a_paused_sandbox_is_not_running_for_its_clients(make_sandbox):
    sandbox = make_sandbox()

    sandbox.pause()

    assert sandbox.is_running() is False


def test_a_background_command_survives_pause_and_resume(make_sandbox):
    sandbox = make_sandbox()
    handle = sandbox.commands.run(
        "n=0; while true; do n=$((n+1)); echo $n > ~/new; mv ~/new ~/count; sleep 0.1; done", background=True
    )
    eventually(lambda: sandbox.files.exists("count"), what="the loop runs")

    sandbox.pause()
    time.sleep(1)
    again = sandbox.connect()
    before = int(again.files.read("count"))
    listed = [each.pid for each in again.commands.list()]
    connected = again.commands.connect(handle.pid)
    eventually(lambda: int(again.files.read("count")) > before, what="the loop goes on")
    killed = connected.kill()

    assert handle.pid in listed
    assert killed is True
    with pytest.raises(CommandExitException):
        connected.wait()


def test_paused_time_does_not_consume_the_timeout(make_sandbox):
    sandbox = make_sandbox()

    sandbox.set_timeout(20)
    sandbox.pause()
    time.sleep(22)
    state = Sandbox.get_info(sandbox.sandbox_id).state
    again = sandbox.connect(timeout=whole_seconds(300))

    assert state == SandboxState.PAUSED
    assert again.commands.run("echo alive").stdout == "alive\n"
    assert _left(sandbox.sandbox_id) == pytest.approx(whole_seconds(300), abs=60)


def test_resume_with_an_empty_body_works(make_sandbox, api):
    sandbox = make_sandbox()
    sandbox.pause()

    without_body = api.post(f"/sandboxes/{sandbox.sandbox_id}/resume")
    sandbox.pause()
    with_braces = api.post(f"/sandboxes/{sandbox.sandbox_id}/resume", json={})
    running = api.post(f"/sandboxes/{sandbox.sandbox_id}/resume", json={})

    assert (without_body.status_code, with_braces.status_code, running.status_code) == (201, 201, 409)
    assert sandbox.commands.run("echo alive").stdout == "alive\n"


def test_pause_without_a_body_works(make_sandbox, api):
    sandbox = make_sandbox()

    answers = [api.post(f"/sandboxes/{sandbox.sandbox_id}/pause") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [204, 409]


def test_the_clock_is_right_after_a_pause(make_sandbox):
    sandbox = make_sandbox()

    sandbox.pause()
    time.sleep(2)
    again = sandbox.connect()
    before = time.time()
    inside = float(again.commands.run("date +%s.%N").stdout)
    after = time.time()

    assert before - 1.5 < inside < after + 1.5


def test_a_timeout_may_pause_instead_of_kill(make_sandbox):
    sandbox = make_sandbox(lifecycle={"on_timeout": "pause"})
    sandbox.files.write("kept.txt", "kept")
    sandbox.set_timeout(whole_seconds(1))

    eventually(lambda: Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.PAUSED, within=90, what="auto-pause")
    again = sandbox.connect(timeout=whole_seconds(300))

    assert again.files.read("kept.txt") == "kept"
    assert Sandbox.get_info(sandbox.sandbox_id).lifecycle["on_timeout"] == "pause"


def test_connect_keeps_the_auto_pause_setting(make_sandbox):
    sandbox = make_sandbox(lifecycle={"on_timeout": "pause"})

    sandbox.pause()
    again = sandbox.connect(timeout=whole_seconds(300))
    again.set_timeout(whole_seconds(2))

    eventually(
        lambda: Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.PAUSED, within=90, what="paused again"
    )
    assert Sandbox.get_info(sandbox.sandbox_id).lifecycle["on_timeout"] == "pause"


def test_a_pause_of_files_only_stops_the_processes(make_sandbox):
    sandbox = make_sandbox(lifecycle={"on_timeout": {"action": "pause", "mode": "filesystem"}})
    handle = sandbox.commands.run("echo started > ~/started; sleep 100000", background=True, timeout=0)
    eventually(lambda: sandbox.files.exists("started"), what="the command runs")
    sandbox.set_timeout(whole_seconds(1))

    eventually(lambda: Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.PAUSED, within=90, what="auto-pause")
    again = sandbox.connect(timeout=whole_seconds(300))

    assert again.files.read("started") == "started\n"
    assert handle.pid not in [each.pid for each in again.commands.list()]
    assert "100000" not in again.commands.run("ps ax -o args").stdout


def test_an_explicit_pause_of_files_only_stops_the_processes(make_sandbox):
    sandbox = make_sandbox(envs={"KEPT": "yes"})
    sandbox.files.write("kept.txt", "kept")
    sandbox.commands.run("sleep 100001", background=True, timeout=0)

    sandbox.pause(mode="filesystem")
    again = sandbox.connect()

    assert again.files.read("kept.txt") == "kept"
    assert "100001" not in again.commands.run("ps ax -o args").stdout
    assert again.commands.run("echo $KEPT").stdout == "yes\n"


def test_connecting_with_reboot_starts_afresh_from_the_disk(make_sandbox):
    sandbox = make_sandbox()
    sandbox.commands.run("echo kept > ~/kept.txt; sync")
    sandbox.commands.run("sleep 100002", background=True, timeout=0)

    sandbox.pause()
    again = sandbox.connect(on_resume="reboot")

    assert again.files.read("kept.txt") == "kept\n"
    assert "100002" not in again.commands.run("ps ax -o args").stdout


def test_traffic_wakes_a_paused_sandbox_that_may_resume(make_sandbox, agent_of):
    sandbox = make_sandbox(lifecycle={"on_timeout": "pause", "auto_resume": True})
    sandbox.files.write("kept.txt", "kept")
    sandbox.pause()

    content = sandbox.files.read("kept.txt")

    assert content == "kept"
    assert Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.RUNNING


def test_traffic_does_not_wake_a_paused_sandbox_that_may_not_resume(make_sandbox):
    sandbox = make_sandbox(lifecycle={"on_timeout": "pause", "auto_resume": False})
    sandbox.pause()

    with pytest.raises(Exception, match=r"(?i)paused|not found|not permitted|resume"):
        sandbox.files.read("/etc/hostname")

    assert Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.PAUSED


@pytest.mark.parametrize("state", ["running", "paused", "paused-files", "resumed"])
def test_a_sandbox_in_any_state_can_be_killed(make_sandbox, state):
    sandbox = make_sandbox()
    if state in ("paused", "resumed"):
        sandbox.pause()
    if state == "paused-files":
        sandbox.pause(mode="filesystem")
    if state == "resumed":
        sandbox.connect()

    assert sandbox.kill() is True
    assert _gone(sandbox.sandbox_id)
    assert sandbox.kill() is False


def test_killing_while_it_pauses_leaves_nothing(make_sandbox):
    from concurrent.futures import ThreadPoolExecutor

    sandbox = make_sandbox()
    with ThreadPoolExecutor() as pool:
        pausing = pool.submit(sandbox.pause)
        killed = pool.submit(sandbox.kill)
        killed.result()
        pausing.exception()

    sandbox.kill()
    assert _gone(sandbox.sandbox_id)


def test_pausing_from_two_clients_pauses_once(make_sandbox):
    from concurrent.futures import ThreadPoolExecutor

    sandbox = make_sandbox()

    with ThreadPoolExecutor() as pool:
        results = sorted(pool.map(lambda _: sandbox.pause(), range(4)))

    assert results == [False, False, False, True]


def test_resuming_from_many_clients_gives_one_machine(make_sandbox):
    from concurrent.futures import ThreadPoolExecutor

    sandbox = make_sandbox()
    sandbox.pause()

    with ThreadPoolExecutor() as pool:
        again = list(pool.map(lambda _: Sandbox.connect(sandbox.sandbox_id), range(6)))

    assert {each.commands.run("echo ok").stdout for each in again} == {"ok\n"}
    assert {each.sandbox_id for each in again} == {sandbox.sandbox_id}


# ---- snapshots and forks


def test_a_snapshot_starts_new_sandboxes_and_the_old_one_goes_on(make_sandbox):
    sandbox = make_sandbox()
    sandbox.files.write("before.txt", "before")

    snapshot = sandbox.create_snapshot()
    sandbox.files.write("before.txt", "changed later")
    copies = [make_sandbox(snapshot.snapshot_id) for _ in range(2)]
    copies[0].files.write("mine.txt", "only here")
    deleted = Sandbox.delete_snapshot(snapshot.snapshot_id)

    assert [copy.files.read("before.txt") for copy in copies] == ["before", "before"]
    assert not copies[1].files.exists("mine.txt")
    assert sandbox.files.read("before.txt") == "changed later"
    assert {copy.sandbox_id for copy in copies}.isdisjoint({sandbox.sandbox_id})
    assert deleted is True


def test_snapshots_outlive_their_sandbox_and_are_listed(make_sandbox):
    sandbox = make_sandbox()
    sandbox.files.write("file.txt", "x")

    snapshot = sandbox.create_snapshot()
    of_sandbox = [each.snapshot_id for each in Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id).next_items()]
    sandbox.kill()
    copy = make_sandbox(snapshot.snapshot_id)
    content = copy.files.read("file.txt")
    deleted = [Sandbox.delete_snapshot(snapshot.snapshot_id) for _ in range(2)]

    assert of_sandbox == [snapshot.snapshot_id]
    assert content == "x"
    assert deleted == [True, False]
    with pytest.raises(SandboxException):
        Sandbox.create(snapshot.snapshot_id)


def test_a_named_snapshot_is_found_by_its_name(make_sandbox):
    sandbox = make_sandbox()
    name = f"snap-{sandbox.sandbox_id[:10].lower()}"
    sandbox.files.write("file.txt", "named")

    snapshot = sandbox.create_snapshot(name=name)
    found = Sandbox.list_snapshots(name=name).next_items()
    copy = make_sandbox(name)
    content = copy.files.read("file.txt")
    Sandbox.delete_snapshot(snapshot.snapshot_id)

    assert any(name in each for each in snapshot.names)
    assert [each.snapshot_id for each in found] == [snapshot.snapshot_id]
    assert content == "named"


def test_a_fork_copies_the_files_and_leaves_the_original(make_sandbox):
    sandbox = make_sandbox(envs={"KEPT": "yes"})
    sandbox.files.write("file.txt", "forked")

    forks = sandbox.fork(count=2, timeout=whole_seconds(300))
    contents = [fork.files.read("file.txt") for fork in forks]
    environment = [fork.commands.run("echo $KEPT").stdout for fork in forks]
    forks[0].files.write("file.txt", "mine")
    others = [forks[1].files.read("file.txt"), sandbox.files.read("file.txt")]
    for fork in forks:
        fork.kill()

    assert contents == ["forked", "forked"]
    assert environment == ["yes\n", "yes\n"]
    assert others == ["forked", "forked"]
    assert len({sandbox.sandbox_id, *(fork.sandbox_id for fork in forks)}) == 3


def test_forking_what_is_not_there_is_not_found(emberbox):
    with pytest.raises(SandboxNotFoundException):
        Sandbox.fork("i" + "0" * 19)
