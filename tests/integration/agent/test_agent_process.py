"""The process service, by the official Python client and by hand."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
import urllib.request

import pytest
from e2b import CommandExitException, Sandbox
from e2b.exceptions import (
    AuthenticationException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)
from e2b.sandbox_sync.commands.pty import PtySize

from tests.support.agent import AgentMachine


def _until(happens, seconds=60):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not (result := happens()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return result


def _rpc(machine: AgentMachine, method: str, body: dict, headers: dict | None = None) -> tuple[int, dict]:
    status, answer = machine.call(
        "POST",
        f"/process.Process/{method}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )
    return status, json.loads(answer)


def test_a_command_runs_as_the_default_user_in_its_home(sandbox: Sandbox) -> None:
    result = sandbox.commands.run('id -un; id -Gn; pwd; echo "$HOME $USER $LOGNAME"; echo oops >&2')

    assert result.stdout == "user\nuser staff\n/home/user\n/home/user user user\n"
    assert result.stderr == "oops\n"
    assert result.exit_code == 0


def test_a_command_runs_as_the_asked_user_and_directory(sandbox: Sandbox) -> None:
    assert sandbox.commands.run("id -un; pwd", user="root", cwd="/etc").stdout == "root\n/etc\n"


def test_request_variables_win_over_sandbox_variables(machine: AgentMachine, sandbox: Sandbox) -> None:
    machine.control("POST", "/init", json.dumps({"envVars": {"A": "sandbox", "B": "sandbox"}}).encode())

    result = sandbox.commands.run("echo $A $B $E2B_SANDBOX", envs={"B": "request"})

    machine.control("POST", "/init", b'{"envVars": {}}')
    assert result.stdout == "sandbox request true\n"


def test_an_exit_code_comes_with_its_words(sandbox: Sandbox) -> None:
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo partly; exit 7")

    assert (failed.value.exit_code, failed.value.error, failed.value.stdout) == (7, "exit status 7", "partly\n")


def test_a_killed_command_ends_with_minus_one_and_its_signal(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("sleep 60", background=True)

    assert command.kill()

    with pytest.raises(CommandExitException) as failed:
        command.wait()
    assert (failed.value.exit_code, failed.value.error) == (-1, "signal: killed")
    assert not command.kill()


def test_killing_a_command_takes_its_children(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("sleep 4242 & sleep 4242 & wait", background=True)
    _until(lambda: _count(sandbox, "sleep 4242") == 2)

    command.kill()

    _until(lambda: _count(sandbox, "sleep 4242") == 0)


def _count(sandbox: Sandbox, command: str) -> int:
    script = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f 2>/dev/null; echo; done"
    lines = sandbox.commands.run(script, user="root").stdout.splitlines()
    return sum(line.strip() == command for line in lines)


def test_a_timeout_kills_the_command(sandbox: Sandbox) -> None:
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 4343", timeout=0.5)

    _until(lambda: _count(sandbox, "sleep 4343") == 0)


def test_a_timeout_kills_also_after_the_client_left(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("sleep 4444", background=True, timeout=20)

    command.disconnect()

    _until(lambda: _count(sandbox, "sleep 4444") == 1, seconds=19)  # the shell becomes it
    _until(lambda: _count(sandbox, "sleep 4444") == 0)


def test_a_client_that_leaves_does_not_kill_and_may_come_back(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("read line; echo got $line; exit 3", background=True, stdin=True, timeout=0)
    command.disconnect()

    again = sandbox.commands.connect(command.pid, timeout=30)
    sandbox.commands.send_stdin(command.pid, "it\n")

    with pytest.raises(CommandExitException) as failed:
        again.wait()
    assert (failed.value.stdout, failed.value.exit_code) == ("got it\n", 3)


def test_a_late_connect_still_gets_the_end(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("exit 5", background=True)
    with pytest.raises(CommandExitException):
        command.wait()

    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.connect(command.pid).wait()

    assert failed.value.exit_code == 5
    assert command.pid not in [p.pid for p in sandbox.commands.list()]


def test_stdin_is_written_streamed_and_closed(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("cat", background=True, stdin=True)

    command.send_stdin("one ")
    sandbox.commands.stream_input(command.pid, ["two ", b"three"])
    command.close_stdin()

    assert command.wait().stdout == "one two three"


def test_without_stdin_a_reader_sees_the_end_at_once(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("cat; touch ended; until [ -e asked ]; do sleep 0.05; done", background=True)

    with pytest.raises(SandboxException, match="stdin not enabled"):
        command.send_stdin("x")
    _until(lambda: sandbox.files.exists("ended"))
    sandbox.files.write("asked", "")

    assert command.wait().stdout == ""


def test_a_process_that_is_not_there_is_not_found(sandbox: Sandbox) -> None:
    with pytest.raises(NotFoundException):
        sandbox.commands.send_stdin(999_999, "x")
    with pytest.raises(NotFoundException):
        sandbox.commands.stream_input(999_999, ["x"])
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(999_999)
    assert sandbox.commands.kill(999_999) is False


def test_a_missing_cwd_is_an_invalid_argument(sandbox: Sandbox) -> None:
    with pytest.raises(InvalidArgumentException, match="cwd '/no/such' does not exist"):
        sandbox.commands.run("true", cwd="/no/such")


def test_an_unknown_user_is_unauthenticated(sandbox: Sandbox) -> None:
    with pytest.raises(AuthenticationException, match="nobody-here"):
        sandbox.commands.run("true", user="nobody-here")


def test_a_missing_program_is_an_invalid_argument(machine: AgentMachine) -> None:
    events = _stream(machine, "Start", {"process": {"cmd": "no-such-program"}})

    assert events[-1]["error"]["code"] == "invalid_argument"
    assert "no-such-program" in events[-1]["error"]["message"]


def test_list_shows_what_runs_with_its_tag(machine: AgentMachine, sandbox: Sandbox) -> None:
    thread = threading.Thread(
        target=_stream,
        args=(
            machine,
            "Start",
            {"process": {"cmd": "sleep", "args": ["4545"], "envs": {"K": "V"}, "cwd": "/tmp"}, "tag": "tagged"},
        ),
    )
    thread.start()

    found = _until(lambda: [p for p in sandbox.commands.list() if p.tag == "tagged"])[0]
    status, _ = _rpc(machine, "SendSignal", {"process": {"tag": "tagged"}, "signal": "SIGNAL_SIGTERM"})

    thread.join(60)
    assert (found.cmd, found.args, found.envs, found.cwd) == ("sleep", ["4545"], {"K": "V"}, "/tmp")
    assert status == 200


def test_a_silent_stream_is_kept_alive_at_the_asked_interval(machine: AgentMachine) -> None:
    began = time.monotonic()
    events = _stream(
        machine,
        "Start",
        {"process": {"cmd": "sleep", "args": ["10"]}, "stdin": False},
        {"Keepalive-Ping-Interval": "1"},
    )
    took = time.monotonic() - began

    first, *between, last = [next(iter(e["event"])) for e in events if "event" in e]
    assert (first, last) == ("start", "end")
    assert set(between) == {"keepalive"}
    assert 2 <= len(between) <= took
    assert events[-2]["event"]["end"] == {"exited": True, "status": "exit status 0"}


def _stream(machine: AgentMachine, method: str, body: dict, headers: dict | None = None) -> list[dict]:
    """One server stream in Connect + JSON: the messages, then the end-of-stream message."""
    message = json.dumps(body).encode()
    request = urllib.request.Request(
        f"{machine.url}/process.Process/{method}",
        data=struct.pack(">BI", 0, len(message)) + message,
        headers={"Content-Type": "application/connect+json", **(headers or {})},
    )
    got = []
    with urllib.request.urlopen(request, timeout=120) as answer:
        while head := answer.read(5):
            _, size = struct.unpack(">BI", head)
            got.append(json.loads(answer.read(size)))
    return got


def test_output_arrives_whole_byte_for_byte(machine: AgentMachine) -> None:
    script = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 20000)"

    events = _stream(
        machine, "Start", {"process": {"cmd": "/usr/bin/env", "args": ["python3", "-c", script]}, "stdin": False}
    )

    out = b"".join(base64.b64decode(e["event"]["data"]["stdout"]) for e in events if "data" in e.get("event", {}))
    assert out == bytes(range(256)) * 20000


def test_a_background_child_that_holds_the_output_does_not_hold_the_stream(sandbox: Sandbox) -> None:
    began = time.monotonic()

    result = sandbox.commands.run("(while echo tick; do sleep 0.2; done) & echo done", timeout=60)

    assert "done" in result.stdout
    assert time.monotonic() - began < 30
    assert sandbox.commands.run("pgrep -f 'echo tick' >/dev/null; echo $?", user="root").stdout == "0\n"
    sandbox.commands.run("pkill -f 'echo [t]ick' || true", user="root")


def test_a_pty_has_a_size_an_owner_and_job_control(sandbox: Sandbox) -> None:
    output = bytearray()
    pty = sandbox.pty.create(PtySize(rows=30, cols=100), timeout=300)
    sandbox.pty.resize(pty.pid, PtySize(rows=40, cols=120))
    sandbox.pty.send_stdin(pty.pid, b"stty size; stat -c 'owner=%U' $(tty); echo TERM=$TERM; sleep 4646 &\n exit 9\n")

    with pytest.raises(CommandExitException) as failed:
        pty.wait(on_pty=output.extend)

    text = output.decode()
    assert "40 120" in text
    assert "owner=user" in text
    assert "TERM=xterm-256color" in text
    assert failed.value.exit_code == 9


def test_killing_a_pty_takes_its_jobs(sandbox: Sandbox) -> None:
    pty = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=300)
    sandbox.pty.send_stdin(pty.pid, b"set -m; nohup sleep 4747 &\n")
    _until(lambda: _count(sandbox, "sleep 4747") == 1)

    assert sandbox.pty.kill(pty.pid)

    _until(lambda: _count(sandbox, "sleep 4747") == 0)


def test_input_of_the_wrong_kind_is_refused(machine: AgentMachine, sandbox: Sandbox) -> None:
    command = sandbox.commands.run("cat", background=True, stdin=True)

    status, answer = _rpc(machine, "SendInput", {"process": {"pid": command.pid}, "input": {"pty": "eA=="}})
    resized, _ = _rpc(machine, "Update", {"process": {"pid": command.pid}, "pty": {"size": {"cols": 1, "rows": 1}}})

    command.kill()
    assert (status, answer["code"]) == (400, "failed_precondition")
    assert resized == 400


def test_many_commands_at_once_all_answer(sandbox: Sandbox) -> None:
    commands = [sandbox.commands.run(f"echo {i}; exit {i % 2}", background=True) for i in range(60)]

    ends = []
    for command in commands:
        try:
            ends.append((command.wait().stdout, 0))
        except CommandExitException as failed:
            ends.append((failed.stdout, failed.exit_code))

    assert ends == [(f"{i}\n", i % 2) for i in range(60)]


def test_a_reader_that_stops_reading_slows_the_process_and_loses_nothing(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("head -c 8000000 /dev/zero | tr '\\0' x", background=True)
    time.sleep(1)

    assert len(command.wait().stdout) == 8_000_000


def test_garbage_is_an_error_of_the_caller(machine: AgentMachine) -> None:
    for body, kind in ((b"\xff\xfe{", "application/json"), (b"\xff" * 64, "application/proto")):
        status, _ = machine.call("POST", "/process.Process/List", body, {"Content-Type": kind})
        assert status == 400
    status, _ = machine.call("POST", "/process.Process/Nothing", b"{}", {"Content-Type": "application/json"})
    assert status == 404


def test_what_is_started_goes_before_the_agent_when_memory_runs_out(sandbox: Sandbox) -> None:
    # The agent has the score of what it starts for the moment of a start.
    script = "cat /proc/self/oom_score_adj; until [ $(cat /proc/1/oom_score_adj) -lt 200 ]; do sleep 0.05; done"

    assert sandbox.commands.run(script, user="root", timeout=60).stdout == "200\n"
