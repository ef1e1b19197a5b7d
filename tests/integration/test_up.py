"""`emberbox up` with the real roles: it starts, is found by the other commands, survives crashes, and stops clean."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from emberbox.linux import processes
from tests.clients.support.instance import claim_slot_network, has_custom_ca, run_emberbox
from tests.support.ports import free_ports

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="`emberbox up` needs root"),
    pytest.mark.timeout(2400),
    # One instance serves the whole module.
    pytest.mark.xdist_group("up"),
]

ROLES = ("node", "edge", "api")


TEMPLATES = Path(__file__).resolve().parent.parent / "clients" / "shipped"


@dataclass(frozen=True)
class Instance:
    """An Emberbox of these tests' own, below a directory that only root can enter."""

    data: Path
    ports: tuple[int, int]
    environment: dict[str, str]

    def emberbox(self, *words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return run_emberbox(*words, "--data", str(self.data), env=self.environment, timeout=timeout)

    def up(self) -> subprocess.CompletedProcess[str]:
        api, edge = self.ports
        return self.emberbox("up", "--detach", "--port", str(api), "--edge-port", str(edge), timeout=2000)

    def status(self) -> dict[str, Any]:
        done = self.emberbox("status", "--json")
        assert done.returncode in (0, 3), done.stderr
        return dict(json.loads(done.stdout))

    def pids(self) -> dict[str, int]:
        return {one["name"]: one["pid"] for one in self.status()["processes"]}

    def variables(self) -> dict[str, str]:
        done = self.emberbox("env", "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def api(self) -> httpx.Client:
        variables = self.variables()
        headers = {"X-API-KEY": variables["E2B_API_KEY"]}
        return httpx.Client(base_url=variables["E2B_API_URL"], headers=headers, timeout=120, trust_env=False)

    def create(self) -> str:
        with self.api() as api:
            made = api.post("/v2/sandboxes", json={"templateID": "base", "timeout": 600})
        assert made.status_code == 201, made.text
        return str(made.json()["sandboxID"])

    def answers(self) -> bool:
        """Whether both doors take connections: a process that was just started does not yet."""
        variables = self.variables()
        try:
            for name in ("E2B_API_URL", "E2B_SANDBOX_URL"):
                httpx.get(f"{variables[name]}/health", timeout=30, trust_env=False)
        except httpx.TransportError:
            return False
        return True

    def health_of(self, sandbox_id: str) -> int:
        """The answer of the agent, through the edge; 0 when that takes no connection."""
        headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": "49983"}
        url = self.variables()["E2B_SANDBOX_URL"]
        try:
            return httpx.get(f"{url}/health", headers=headers, timeout=30, trust_env=False).status_code
        except httpx.TransportError:
            return 0


@pytest.fixture(scope="module")
def stopped() -> Iterator[Instance]:
    """An instance that has not been started."""
    base = Path(tempfile.mkdtemp(prefix="emberbox-up-"))
    api_port, edge_port = free_ports(2)
    environment = {"EMBERBOX_SLOT_NETWORK": claim_slot_network(str(base)), "EMBERBOX_RUNTIME": "container"}
    if has_custom_ca():
        environment["EMBERBOX_INHERIT_HOST_NETWORK"] = "true"
    # As a checkout below /root has it: the api's user cannot enter what lies above.
    shutil.copytree(TEMPLATES, base / "templates")
    environment["EMBERBOX_TEMPLATES_DIR"] = str(base / "templates")
    instance = Instance(base / "data", (api_port, edge_port), environment)
    yield instance
    instance.emberbox("down")
    shutil.rmtree(base)


@pytest.fixture
def running(stopped: Instance) -> Instance:
    done = stopped.up()
    assert done.returncode == 0, done.stderr
    return stopped


def until(condition: Callable[[], bool], *, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def test_up_prints_the_three_variables_and_they_work(running: Instance) -> None:
    again = running.up()

    names = re.findall(r"^export (\w+)=", again.stdout, re.MULTILINE)
    assert names == ["E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY"]
    with running.api() as api:
        assert api.get("/v2/sandboxes").status_code == 200


def test_only_the_node_is_root(running: Instance) -> None:
    account = pwd.getpwnam("emberbox")

    pids = running.pids()

    assert set(ROLES) <= set(pids)
    for role in ROLES:
        status = Path(f"/proc/{pids[role]}/status").read_text()
        uids = re.search(r"^Uid:\s+(.*)$", status, re.MULTILINE)
        assert uids is not None
        assert set(uids[1].split()) == {"0" if role == "node" else str(account.pw_uid)}


def test_the_api_sees_nothing_of_the_closed_directory_but_its_own(running: Instance) -> None:
    root = Path(f"/proc/{running.pids()['api']}/root")

    assert sorted(p.name for p in (root / running.data.relative_to("/")).iterdir()) == ["api", "run"]


def test_what_must_be_secret_is_readable_by_root_only(running: Instance) -> None:
    supervisor = running.data / "run" / "supervisor"

    assert supervisor.stat().st_mode & 0o777 == 0o700
    assert (supervisor / "key.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_role_comes_back_and_the_sandbox_was_running_all_the_time(running: Instance, role: str) -> None:
    sandbox_id = running.create()
    before = running.pids()[role]

    os.kill(before, signal.SIGKILL)
    until(lambda: running.pids().get(role, before) != before)
    until(lambda: running.status()["sandboxes"] is not None)
    until(running.answers)

    until(lambda: running.health_of(sandbox_id) == 204)
    with running.api() as api:
        until(lambda: api.get(f"/sandboxes/{sandbox_id}").json()["state"] == "running")
        assert api.delete(f"/sandboxes/{sandbox_id}").status_code == 204


def test_a_second_up_in_the_foreground_says_that_one_runs(running: Instance) -> None:
    pid = running.pids()["supervisor"]

    second = running.emberbox("up")

    assert second.returncode == 1
    assert "already runs on this data directory" in second.stderr
    assert str(pid) in second.stderr
    assert running.pids()["supervisor"] == pid


def test_roles_of_a_killed_supervisor_are_found_and_replaced_and_the_sandbox_goes_on(running: Instance) -> None:
    sandbox_id = running.create()
    before = running.pids()
    os.kill(before["supervisor"], signal.SIGKILL)
    until(lambda: "supervisor" not in running.pids())
    assert running.status()["phase"] == "unsupervised"

    again = running.up()

    assert again.returncode == 0, again.stderr
    assert "stopping them now" in again.stderr
    after = running.pids()
    assert all(processes.identify(before[role]) is None for role in ROLES)
    assert set(after) == set(before)
    until(lambda: running.health_of(sandbox_id) == 204)


def test_templates_below_a_closed_directory_are_shipped(running: Instance) -> None:
    with running.api() as api:
        assert api.get("/shipped-templates").json() == ["hello"]


def test_keys_are_made_listed_and_deleted(running: Instance) -> None:
    made = running.emberbox("key", "create", "for a test", "--json")
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)

    listed = json.loads(running.emberbox("key", "list", "--json").stdout)
    assert key["id"] in {one["id"] for one in listed}
    assert key["key"] not in json.dumps(listed)

    assert running.emberbox("key", "delete", key["id"]).returncode == 0
    assert key["id"] not in {one["id"] for one in json.loads(running.emberbox("key", "list", "--json").stdout)}


def test_sandboxes_are_listed_and_killed(running: Instance) -> None:
    sandbox_id = running.create()

    assert sandbox_id in running.emberbox("sandbox", "list").stdout
    assert running.emberbox("sandbox", "kill", sandbox_id).returncode == 0
    assert sandbox_id not in running.emberbox("sandbox", "list").stdout


def test_killing_an_unknown_sandbox_says_so(running: Instance) -> None:
    done = running.emberbox("sandbox", "kill", "i" + "0" * 19)

    assert done.returncode == 1
    assert "not found" in done.stderr


def test_a_shell_runs_on_a_terminal_and_its_exit_code_comes_back(running: Instance) -> None:
    sandbox_id = running.create()
    arguments = [sys.executable, "-m", "emberbox", "sandbox", "shell", sandbox_id, "--data", str(running.data)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, arguments)

    os.write(terminal, b"echo $((40 + 2))-$(whoami)\n")
    seen = read_until(terminal, b"42-user")
    os.write(terminal, b"exit 7\n")
    read_until(terminal, None)

    assert b"42-user" in seen
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def read_until(terminal: int, word: bytes | None) -> bytes:
    """Read until `word` has come, or, without one, until the terminal is closed."""
    seen = b""
    end = time.monotonic() + 240
    while word is None or word not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # EIO: nobody holds the other end any more
                break
            seen += data
    return seen


def test_down_with_keep_leaves_sandboxes_for_the_next_up(running: Instance) -> None:
    sandbox_id = running.create()

    down = running.emberbox("down", "--keep")
    assert down.returncode == 0, down.stderr
    assert "leaving" in down.stderr
    assert running.status()["running"] is False
    running.up()

    until(lambda: running.health_of(sandbox_id) == 204)


def test_down_ends_the_sandboxes_and_says_how_many(running: Instance) -> None:
    with running.api() as api:
        for one in api.get("/v2/sandboxes").json():
            api.delete(f"/sandboxes/{one['sandboxID']}")
    sandbox_id = running.create()
    pids = running.pids()

    down = running.emberbox("down")

    assert down.returncode == 0, down.stderr
    assert "ending 1 sandbox running" in down.stderr
    assert running.status()["running"] is False
    # A zombie has ended: the host's first process collects it when it comes to it.
    assert not [name for name, pid in pids.items() if processes.identify(pid) is not None]
    running.up()
    with running.api() as api:
        assert api.get(f"/sandboxes/{sandbox_id}").status_code == 404


def test_down_twice_is_no_error(running: Instance) -> None:
    running.emberbox("down")

    again = running.emberbox("down")

    assert again.returncode == 0
    assert "does not run" in again.stderr


@pytest.mark.parametrize(("index", "option"), [(0, "--port"), (1, "--edge-port")])
def test_a_taken_port_is_named_with_its_option_and_nothing_is_left(stopped: Instance, index: int, option: str) -> None:
    stopped.emberbox("down")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", stopped.ports[index]))
        taken.listen()

        refused = stopped.up()

    assert refused.returncode == 1
    assert f"port {stopped.ports[index]} on 127.0.0.1 is taken" in refused.stderr
    assert f"choose another with {option}" in refused.stderr
    assert stopped.status()["running"] is False


@pytest.fixture
def fresh(tmp_path: Path) -> Instance:
    """One whose start is going to fail."""
    api_port, edge_port = free_ports(2)
    network = claim_slot_network(str(tmp_path))
    return Instance(
        tmp_path / "data",
        (api_port, edge_port),
        {"EMBERBOX_SLOT_NETWORK": network, "EMBERBOX_RUNTIME": "container"},
    )


def test_a_store_that_cannot_be_used_is_told_and_nothing_is_left(fresh: Instance) -> None:
    fresh.environment["EMBERBOX_DATABASE_URL"] = "nonsense"

    done = fresh.up()

    assert done.returncode == 1
    assert "database" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in _command_lines() if str(fresh.data) in line] == []


def test_a_background_process_hides_a_password_and_needs_no_standard_input(fresh: Instance) -> None:
    """The database cannot be reached; while that is tried, the processes can be looked at."""
    url = "postgresql://me:s3cret-word@127.0.0.1:1/none"
    api, edge = fresh.ports
    words = f"up --detach --data {fresh.data} --port {api} --edge-port {edge} --database-url {url}"
    program = f"exec {sys.executable} -m emberbox {words} <&- 2> {fresh.data.parent}/said"
    with subprocess.Popen(["sh", "-c", program], env={**os.environ, **fresh.environment}) as process:
        log = fresh.data / "logs" / "supervisor.log"
        until(lambda: log.exists() and "role.started" in log.read_text())
        shown = [line for line in _command_lines() if " up --detach " in line and str(fresh.data) in line]
        process.wait(240)

    assert process.returncode == 1
    assert len(shown) == 2  # the one that was called, and the one that serves
    assert sum("s3cret-word" in line for line in shown) == 1


def _command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_status_of_what_has_never_run(tmp_path: Path) -> None:
    done = run_emberbox("status", "--data", str(tmp_path / "nothing"))

    assert done.returncode == 3
    assert "does not run" in done.stdout


def test_env_before_the_first_up_says_what_makes_the_key(tmp_path: Path) -> None:
    done = run_emberbox("env", "--data", str(tmp_path / "nothing"))

    assert done.returncode == 1
    assert "emberbox up" in done.stderr
