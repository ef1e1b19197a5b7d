"""What a hostile user inside the machine tries against the agent, and what only the node may do."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2b import CommandExitException, Sandbox
from e2b.exceptions import SandboxException

from tests.support.agent import CONTROL, AgentMachine

CONTROL_ROUTES = [
    ("POST", "/init"),
    ("GET", "/logs"),
    ("POST", "/freeze"),
    ("POST", "/unfreeze"),
    ("POST", "/collapse"),
    ("POST", "/fsfreeze"),
    ("POST", "/fsthaw"),
]


@pytest.mark.parametrize(("method", "path"), CONTROL_ROUTES)
def test_a_control_route_is_not_there_without_the_secret(machine: AgentMachine, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None

    assert machine.call(method, path, body)[0] == 404
    assert machine.call(method, path, body, {"X-Ember-Control": "wrong"})[0] == 404


def test_root_inside_cannot_call_a_control_route(sandbox: Sandbox) -> None:
    script = "curl -s -o /dev/null -w '%{http_code}' -X POST -d '{}' http://127.0.0.1:49983/init"
    assert sandbox.commands.run(script, user="root").stdout == "404"


def test_no_signal_from_inside_ends_the_agent(fresh_machine: AgentMachine, connect: Callable[..., Sandbox]) -> None:
    sandbox = connect(fresh_machine)

    sandbox.commands.run("for s in $(seq 1 64); do kill -$s 1 2>/dev/null; done; true", user="root")

    assert sandbox.is_running()
    assert sandbox.commands.run("echo alive").stdout == "alive\n"


def test_root_inside_cannot_see_the_agents_memory_or_environment(machine: AgentMachine, sandbox: Sandbox) -> None:
    for path in ("mem", "fd/0", "root/etc/passwd", "cwd/etc/passwd", "exe"):
        with pytest.raises(CommandExitException):
            sandbox.commands.run(f"head -c 10 /proc/1/{path}", user="root")
    # This machine's root has CAP_SYS_ADMIN, which opens environ on new kernels: it was wiped.
    assert sandbox.commands.run("tr -d '\\0' < /proc/1/environ", user="root").stdout == ""


def test_root_inside_cannot_limit_the_agent(sandbox: Sandbox) -> None:
    with pytest.raises(CommandExitException):
        sandbox.commands.run("prlimit --pid 1 --cpu=1:1", user="root")
    with pytest.raises(CommandExitException):
        sandbox.commands.run("prlimit --pid 1 --nofile=3:3", user="root")


def test_kernel_files_cannot_be_moved_out(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxException):
        sandbox.files.rename("/proc/self/maps", "/tmp/maps", user="root")
    assert not sandbox.files.exists("/tmp/maps")


@pytest.mark.parametrize(
    "path",
    [
        *("/proc/self/mem", "/proc/self/environ", "/proc/thread-self/mem", "/proc/1/environ", "/proc/1/maps"),
        *("/proc/self/fd/1", "/proc/self/root/etc/passwd", "/proc/1/task/1/environ", "/proc/self/cwd/etc/passwd"),
    ],
)
@pytest.mark.parametrize("user", ["root", "user"])
def test_the_file_routes_do_not_show_the_agent_itself(sandbox: Sandbox, path: str, user: str) -> None:
    with pytest.raises(SandboxException):
        sandbox.files.read(path, user=user)
    with pytest.raises(SandboxException):
        sandbox.files.write(path, "x", user=user)


def test_a_link_in_a_users_folder_does_not_lend_the_agents_rights(sandbox: Sandbox) -> None:
    sandbox.files.write("/root/secret", "root's", user="root")
    sandbox.commands.run("ln -sfn /root evil; ln -sfn /root/secret evil-file; ln -sfn /etc etc")

    for attempt in (
        lambda: sandbox.files.read("evil-file"),
        lambda: sandbox.files.read("evil/secret"),
        lambda: sandbox.files.write("evil-file", "mine"),
        lambda: sandbox.files.write("etc/new-file", "mine"),
        lambda: sandbox.files.make_dir("etc/new-dir"),
        lambda: sandbox.files.rename("etc/passwd", "stolen"),
        lambda: sandbox.files.remove("etc/passwd"),
        lambda: sandbox.files.list("evil"),
        lambda: sandbox.files.get_info("evil/secret"),
        lambda: sandbox.files.watch_dir("evil"),
    ):
        with pytest.raises(SandboxException):
            attempt()
    assert sandbox.files.read("/root/secret", user="root") == "root's"


def test_a_link_swapped_during_writes_never_reaches_roots_files(sandbox: Sandbox) -> None:
    sandbox.files.write("/root/target", "untouched", user="root")
    script = "mkdir -p race; while :; do rm -rf race/d; mkdir race/d; rm -rf race/d; ln -s /root race/d; done"
    racer = sandbox.commands.run(script, background=True, timeout=60)

    for _ in range(300):
        try:
            sandbox.files.write("race/d/target", "pwned")
        except SandboxException:
            continue

    racer.kill()
    assert sandbox.files.read("/root/target", user="root") == "untouched"
    assert sandbox.files.get_info("/root/target", user="root").owner == "root"


def test_nothing_of_roots_is_replaced_or_reached_by_a_detour(sandbox: Sandbox) -> None:
    sandbox.commands.run(
        "mkdir -p -m 755 /srv/held/dir && echo old > /srv/held/file && mkdir -m 700 /srv/held/private"
        " && ln -s dir /srv/held/link && ln -s /srv/held/dangling /srv/held/nowhere"
        " && mkdir -p /tmp/held /dev/shm/held /run/e2b",
        user="root",
    )
    sandbox.commands.run("ln -sfn /etc /tmp/l; ln -sfn /etc ~/l; ln -sfn /srv/held/dangling ~/nowhere")
    before = sandbox.commands.run("find /srv/held -printf '%p %U:%G %m %s\n'", user="root").stdout

    links = ["/tmp/l/new", "/home/user/l/new", "/home/user/l/new/deep", "/srv/held/link/new"]
    taken = ["/srv/held/file", "/srv/held/nowhere", "/home/user/nowhere", "/srv/held/file/below"]
    private = ["/srv/held/private/new", "/root/new", "/home/other/new"]
    mounts = ["/tmp/held/new", "/dev/new", "/dev/shm/held/new", "/run/e2b/new", "/proc/new"]
    for path in (*links, *taken, *private, *mounts):
        with pytest.raises(SandboxException):
            sandbox.files.write(path, "mine")
        with contextlib.suppress(SandboxException):
            assert sandbox.files.make_dir(path) is False

    assert sandbox.commands.run("find /srv/held -printf '%p %U:%G %m %s\n'", user="root").stdout == before
    assert not any(sandbox.files.exists(p, user="root") for p in ("/etc/new", "/root/new", "/tmp/held/new", "/dev/new"))
    assert not any(sandbox.files.exists(p, user="root") for p in ("/home/other/new", "/run/e2b/new"))


def test_a_link_swapped_while_missing_files_are_made_is_not_followed(sandbox: Sandbox) -> None:
    # A folder of root's inside the user's: refused to the user, who may exchange it for a link.
    sandbox.commands.run(
        "mkdir -p swap /srv/target && mkdir swap/d && chown user swap && ln -s /srv/target swap/link",
        user="root",
        cwd="/home/user",
    )
    script = (
        "while :; do mv -T swap/d swap/t; mv -T swap/link swap/d; mv -T swap/d swap/link; mv -T swap/t swap/d; done"
    )
    racer = sandbox.commands.run(script, background=True, timeout=120)

    made = 0
    for n in range(400):
        try:
            sandbox.files.write(f"swap/d/{n}/new", "x")
            made += 1
        except SandboxException:
            continue

    racer.kill()
    assert made > 0
    assert sandbox.files.list("/srv/target") == []


def test_another_users_files_are_out_of_reach(sandbox: Sandbox) -> None:
    sandbox.files.write("/home/other/mine", "x", user="other")

    with pytest.raises(SandboxException, match="permission denied"):
        sandbox.files.read("/home/other/mine")
    assert sandbox.files.get_info("/home/other/mine", user="other").owner == "other"


def test_orphans_are_reaped(sandbox: Sandbox) -> None:
    sandbox.commands.run("for i in 1 2 3 4 5; do (setsid sleep 0.1 &) ; done", user="root")

    script = 'cat /proc/[0-9]*/stat 2>/dev/null | awk \'$2 == "(sleep)" || $3 == "Z"\''
    deadline = time.monotonic() + 60
    while left := sandbox.commands.run(script, user="root").stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_processes_start_without_capabilities_and_with_default_signals(sandbox: Sandbox) -> None:
    status = sandbox.commands.run(
        "grep -E 'CapEff|CapPrm|SigIgn|Umask' /proc/self/status; ls /proc/self/fd | wc -l"
    ).stdout
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)

    assert int(fields["CapEff"], 16) == 0
    assert int(fields["CapPrm"], 16) == 0
    assert int(fields["SigIgn"], 16) == 0
    assert fields["Umask"] == "0022"


def test_init_may_come_again_and_again(fresh_machine: AgentMachine, connect: Callable[..., Sandbox]) -> None:
    machine = fresh_machine
    body = {
        "envVars": {"A": "1"},
        "accessToken": "token",
        "timestamp": "2030-01-01T00:00:00Z",  # not allowed to set the clock: not an error
        "defaultUser": "other",
        "defaultWorkdir": "/tmp",
        "hostname": "renamed",
        "machineId": "0123456789abcdef0123456789abcdef",
        "entropy": "AAECAwQFBgcICQoLDA0ODw==",
        "sandboxID": "sbx1",
        "templateID": "tpl1",
        "hyperloopIP": "192.0.2.1",
        "lifecycleID": "life",
        "limits": {"cpuCount": 3, "memoryBytes": 1 << 30, "diskBytes": 1 << 31},
    }
    for _ in range(2):
        assert machine.control("POST", "/init", json.dumps(body).encode()) == (204, b"")

    assert machine.call("GET", "/envs")[0] == 401
    sandbox = connect(machine, "token")
    script = """
        id -un; pwd; hostname; cat /etc/machine-id /run/e2b/.E2B_SANDBOX_ID; echo
        echo $A $E2B_SANDBOX_ID $E2B_TEMPLATE_ID $E2B_EVENTS_ADDRESS
        getent hosts events.e2b.local; grep -c renamed /etc/hosts
    """
    out = sandbox.commands.run(script).stdout
    assert out.splitlines() == [
        "other", "/tmp", "renamed", "0123456789abcdef0123456789abcdef", "sbx1",
        "1 sbx1 tpl1 http://192.0.2.1", "192.0.2.1       events.e2b.local", "1",
    ]  # fmt: skip
    metrics = json.loads(machine.call("GET", "/metrics", None, {"X-Access-Token": "token"})[1])
    assert (metrics["cpu_count"], metrics["mem_total"], metrics["disk_total"]) == (3, 1 << 30, 1 << 31)

    # What is absent stays; an empty token opens the sandbox.
    assert machine.control("POST", "/init", b'{"accessToken": ""}')[0] == 204
    assert json.loads(machine.call("GET", "/envs")[1]) == {"A": "1"}


def test_a_bad_init_is_refused_with_a_reason(machine: AgentMachine) -> None:
    for body in (
        *(b"{", b'{"hostname": "a b"}', b'{"machineId": "x"}', b'{"entropy": "%"}', b'{"hyperloopIP": "x"}'),
        *(b'{"caBundle": "x"}', b'{"controlHash": "x"}', b'{"defaultWorkdir": "x"}'),
        b'{"volumeMounts": [{"path": "x"}]}',
    ):
        status, answer = machine.control("POST", "/init", body)
        assert status == 400, body
        assert json.loads(answer)["message"]


def test_a_ca_is_trusted_after_init(
    fresh_machine: AgentMachine, connect: Callable[..., Sandbox], tmp_path: Path
) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test-ca", "-days", "2"),
            *("-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "ca.pem")),
        ],
        check=True,
        capture_output=True,
    )
    body = json.dumps({"caBundle": (tmp_path / "ca.pem").read_text()}).encode()

    assert fresh_machine.control("POST", "/init", body)[0] == 204
    assert fresh_machine.control("POST", "/init", body)[0] == 204

    sandbox = connect(fresh_machine)
    sandbox.files.write("/tmp/ca.pem", (tmp_path / "ca.pem").read_text())
    verify = "openssl verify -CAfile /etc/ssl/certs/ca-certificates.crt /tmp/ca.pem"
    assert "OK" in sandbox.commands.run(verify).stdout


def test_the_node_may_freeze_and_collapse(machine: AgentMachine) -> None:
    assert machine.control("POST", "/freeze") == (204, b"")
    assert json.loads(machine.control("POST", "/freeze?maxWaitMs=100")[1])["failed"] == 0
    assert machine.control("POST", "/unfreeze") == (204, b"")
    status, answer = machine.control("POST", "/collapse")
    assert (status, "collapsed" in json.loads(answer)) == (200, True)
    # Only a microVM has a disk of its own to freeze; a container's overlay cannot.
    assert machine.control("POST", "/fsfreeze")[0] == 500
    assert machine.control("POST", "/freeze?maxWaitMs=x")[0] == 400


def test_the_agent_outlives_the_reader_of_its_log() -> None:
    with AgentMachine(log_reader_leaves=True) as machine:
        for _ in range(50):
            assert machine.control("POST", "/init", b"{}")[0] == 204


def test_the_control_secret_can_be_replaced(fresh_machine: AgentMachine) -> None:
    import hashlib

    new = hashlib.sha256(b"new secret").hexdigest()

    assert fresh_machine.control("POST", "/init", json.dumps({"controlHash": new}).encode())[0] == 204

    assert fresh_machine.control("POST", "/init", b"{}")[0] == 404
    assert fresh_machine.call("POST", "/init", b"{}", {"X-Ember-Control": "new secret"})[0] == 204


def test_logs_page_exactly_and_tell_no_secret(fresh_machine: AgentMachine, connect: Callable[..., Sandbox]) -> None:
    machine = fresh_machine
    machine.control("POST", "/init", json.dumps({"accessToken": "TOKEN-X", "envVars": {"S": "SECRET-ENV"}}).encode())
    sandbox = connect(machine, "TOKEN-X")
    for i in range(5):
        sandbox.commands.run(f"echo line {i}", envs={"T": "SECRET-REQ"})

    seen: list[dict] = []
    cursor = 0
    while True:
        page = json.loads(machine.control("GET", f"/logs?cursor={cursor}&limit=3")[1])
        if not page["entries"]:
            break
        seen += page["entries"]
        cursor = page["cursor"]

    assert [e["seq"] for e in seen] == list(range(1, len(seen) + 1))
    assert {"seq", "timestamp", "level", "logger", "message"} <= set(seen[0])
    outputs = [e["fields"]["data"] for e in seen if e["message"] == "output"]
    assert outputs == [f"line {i}\n" for i in range(5)]
    for secret in ("TOKEN-X", "SECRET-ENV", "SECRET-REQ", CONTROL):
        assert secret not in json.dumps(seen) + machine.log()


def _answers(machine: AgentMachine, port: int) -> bytes:
    try:
        with socket.create_connection((machine.ip, port), timeout=10) as conn:
            conn.sendall(b"ping")
            conn.shutdown(socket.SHUT_WR)
            got = b""
            while piece := conn.recv(100):
                got += piece
            return got
    except OSError:
        return b""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_on_loopback_alone_is_reachable_soon(machine: AgentMachine, sandbox: Sandbox, address: str) -> None:
    family = "AF_INET6" if ":" in address else "AF_INET"
    port = 8123 if ":" in address else 8124
    server = f"""
import socket
s = socket.socket(socket.{family}); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("{address}", {port})); s.listen(); print("up", flush=True)
while True:
    c, _ = s.accept(); c.sendall(c.recv(100) + b" pong"); c.close()
"""
    sandbox.files.write("/tmp/server.py", server)
    command = sandbox.commands.run("/usr/bin/env python3 /tmp/server.py", background=True, timeout=60)
    for out, _, _ in command:
        if out and "up" in out:
            break
    deadline = time.monotonic() + 20  # it is looked for every 400 ms, and this machine may be busy

    while not (answer := _answers(machine, port)) and time.monotonic() < deadline:
        time.sleep(0.02)

    command.kill()
    assert answer == b"ping pong"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection((machine.ip, port), timeout=10).close()
        except ConnectionRefusedError:
            return
        except TimeoutError:
            continue
        time.sleep(0.05)
    pytest.fail("the port stayed open after its program ended")


def test_any_origin_may_call(machine: AgentMachine) -> None:
    import urllib.request

    request = urllib.request.Request(
        f"{machine.url}/process.Process/List",
        method="OPTIONS",
        headers={
            "Origin": "https://example.test",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-access-token,connect-timeout-ms,e2b-sandbox-id,authorization",
        },
    )

    with urllib.request.urlopen(request, timeout=60) as answer:
        headers = answer.headers

    assert headers["Access-Control-Allow-Origin"] == "*"
    assert "authorization" in headers["Access-Control-Allow-Headers"]
