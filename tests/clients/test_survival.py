"""Parts of Emberbox that are killed come back, and sandboxes do not notice."""

from __future__ import annotations

import datetime
import signal

import httpx
import pytest
from e2b import Sandbox, SandboxNotFoundException, SandboxState, ServiceBusyException

from tests.clients.support import servers
from tests.clients.support.host import Host
from tests.clients.support.instance import Emberbox
from tests.clients.support.raw import host_request
from tests.clients.support.timing import eventually, seconds, whole_seconds

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("survival")]


def _kill_and_wait(host: Host, name: str) -> None:
    before = host.pids()[name]
    host.kill(before)
    eventually(
        lambda: (after := host.pids().get(name)) and after != before and after, within=90, every=0.2,
        what=f"{name} is started again",
    )  # fmt: skip
    eventually(lambda: _healthy(host.emberbox), within=90, every=0.2, what="the API answers")


def _healthy(emberbox: Emberbox) -> bool:
    try:
        return httpx.get(f"{emberbox.api_url}/health", timeout=10, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_sandboxes_survive_the_death_of_every_part(breakable):
    running = Sandbox.create(timeout=3600, metadata={"kept": "yes"}, envs={"KEPT": "yes"})
    servers.serve(running, 8000)
    counting = running.commands.run(
        "n=0; while true; do n=$((n+1)); echo $n > ~/count; sleep 0.1; done", background=True, timeout=0
    )
    paused = Sandbox.create(timeout=3600)
    paused.files.write("kept.txt", "kept")
    paused.pause()
    deadline = running.get_info().end_at

    for name in ("api", "node", "edge"):
        _kill_and_wait(breakable, name)

        eventually(lambda: _answers(running), within=90, what=f"the sandbox answers after {name} died")
        assert running.commands.run("echo $KEPT").stdout == "yes\n", name
        assert counting.pid in [each.pid for each in running.commands.list()], name
        assert host_request(breakable.emberbox, running.get_host(8000)).status_code == 200, name
        info = running.get_info()
        assert info.state == SandboxState.RUNNING, name
        assert info.metadata == {"kept": "yes"}, name
        assert abs(info.end_at - deadline) < datetime.timedelta(seconds=2), name
        assert paused.get_info().state == SandboxState.PAUSED, name
        fresh = eventually(_created, within=90, every=0.3, what=f"there are new sandboxes after {name} died")
        assert fresh.commands.run("echo new").stdout == "new\n", name
        fresh.kill()

    assert paused.connect().files.read("kept.txt") == "kept"
    assert running.kill() is True
    assert paused.kill() is True


def test_the_kernel_of_the_edge_haproxy_dies_and_routes_come_back(breakable):
    sandbox = Sandbox.create(timeout=3600)
    servers.serve(sandbox, 8000)
    proxies = breakable.proxies()
    assert proxies, "no haproxy of this instance found"

    breakable.run(f"kill -9 {' '.join(map(str, proxies))} || true")  # the worker may end by its master's death

    eventually(lambda: _status(breakable.emberbox, sandbox) == 200, within=90, every=0.2, what="the route is back")
    assert sandbox.commands.run("echo ok").stdout == "ok\n"
    sandbox.kill()


def test_a_deadline_passes_while_the_api_is_dead(breakable):
    supervisor_would_restart = breakable.pids()["api"]
    sandbox = Sandbox.create(timeout=whole_seconds(6))

    # Stopped, not killed: the supervisor sees a living process and leaves it.
    breakable.kill(supervisor_would_restart, signal.SIGSTOP)
    try:
        eventually(lambda: not _answers(sandbox), within=90, every=0.3, what="the node ends it by itself")
    finally:
        breakable.kill(supervisor_would_restart, signal.SIGCONT)

    def gone() -> bool:
        try:
            Sandbox.get_info(sandbox.sandbox_id)
        except SandboxNotFoundException:
            return True
        return False

    eventually(gone, within=90, every=0.2, what="the API learns of it")


def test_a_restart_of_everything_keeps_sandboxes_and_deadlines(breakable):
    sandbox = Sandbox.create(timeout=3600)
    sandbox.files.write("kept.txt", "kept")
    before = sandbox.get_info().end_at

    pids = breakable.pids()
    for name in ("api", "node", "edge"):
        breakable.kill(pids[name])
    eventually(lambda: _healthy(breakable.emberbox), within=180, every=0.3, what="the API is back")
    eventually(lambda: _answers(sandbox), within=90, every=0.3, what="the sandbox answers")

    assert sandbox.files.read("kept.txt") == "kept"
    assert abs(sandbox.get_info().end_at - before) < datetime.timedelta(seconds=2)
    assert sandbox.kill() is True


def _created() -> Sandbox | None:
    """A new sandbox; None while the node that was started again is not found yet."""
    try:
        return Sandbox.create(timeout=600)
    except ServiceBusyException:
        return None


def _answers(sandbox: Sandbox) -> bool:
    try:
        return sandbox.is_running(request_timeout=10)
    except Exception:
        return False


def _status(emberbox: Emberbox, sandbox: Sandbox) -> int:
    try:
        return host_request(emberbox, sandbox.get_host(8000)).status_code
    except httpx.HTTPError:
        return 0
