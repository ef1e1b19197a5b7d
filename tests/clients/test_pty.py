"""Terminals with the synchronous Python client."""

from __future__ import annotations

import pytest
from e2b import CommandExitException, NotFoundException, PtySize

from tests.clients.support.timing import eventually, seconds


def _run(sandbox, typed: bytes, **options) -> tuple[str, int]:
    pty = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=seconds(120), **options)
    sandbox.pty.send_stdin(pty.pid, typed)
    output = bytearray()
    try:
        code = pty.wait(on_pty=output.extend).exit_code
    except CommandExitException as ended:
        code = ended.exit_code
    return output.decode(errors="replace"), code


def test_a_terminal_is_a_login_shell_of_the_user(sandbox):
    output, code = _run(sandbox, b"echo user=$USER home=$PWD term=$TERM lang=$LANG; tty; exit\n")

    assert "user=user home=/home/user term=xterm-256color lang=C.UTF-8" in output
    assert "/dev/pts/" in output
    assert code == 0


def test_a_terminal_has_the_asked_user_cwd_and_environment(sandbox):
    output, _ = _run(sandbox, b"echo $(id -un) $PWD $COLOUR; exit\n", user="root", cwd="/tmp", envs={"COLOUR": "blue"})

    assert "root /tmp blue" in output


def test_the_exit_code_of_the_shell_comes_back(sandbox):
    _, code = _run(sandbox, b"exit 9\n")

    assert code == 9


def test_size_and_resize_reach_the_terminal(sandbox):
    pty = sandbox.pty.create(PtySize(rows=11, cols=22), timeout=seconds(120))
    sandbox.pty.send_stdin(pty.pid, b"stty size\n")
    sandbox.pty.resize(pty.pid, PtySize(rows=33, cols=44))
    sandbox.pty.send_stdin(pty.pid, b"sleep 0.3; stty size; exit\n")
    output = bytearray()

    pty.wait(on_pty=output.extend)

    assert b"33 44" in output


def test_control_c_interrupts_the_foreground_command(sandbox):
    pty = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=seconds(120))
    output = bytearray()
    events = iter(pty)

    sandbox.pty.send_stdin(pty.pid, b"echo rea''dy; sleep 1234; echo status=$?\n")
    while b"ready" not in output:
        output.extend(next(events)[2] or b"")
    # Before the command has the terminal, the signal is the shell's.
    eventually(lambda: sandbox.commands.run("pgrep -f -x 'sleep 1234' || true").stdout, what="the command runs")
    sandbox.pty.send_stdin(pty.pid, b"\x03")
    sandbox.pty.send_stdin(pty.pid, b"echo still here; exit\n")
    for _, _, chunk in events:
        output.extend(chunk or b"")

    assert b"still here" in output


def test_a_terminal_is_connected_again_after_a_disconnect(sandbox):
    pty = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=seconds(120))
    pty.disconnect()

    again = sandbox.pty.connect(pty.pid, timeout=seconds(120))
    sandbox.pty.send_stdin(pty.pid, b"echo back; exit 4\n")
    output = bytearray()
    with pytest.raises(CommandExitException) as ended:
        again.wait(on_pty=output.extend)

    assert b"back" in output
    assert ended.value.exit_code == 4


def test_a_killed_terminal_is_gone(sandbox):
    pty = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=seconds(120))

    assert sandbox.pty.kill(pty.pid) is True
    with pytest.raises(CommandExitException) as ended:
        pty.wait()
    assert ended.value.error == "signal: killed"
    assert sandbox.pty.kill(pty.pid) is False
    with pytest.raises(NotFoundException):
        sandbox.pty.send_stdin(pty.pid, b"x")


def test_unicode_and_large_pastes_pass_a_terminal(sandbox, folder):
    pty = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=seconds(400))
    lines = "".join(f"{n} äöü日本🔥\n" for n in range(3000))

    output = bytearray()
    events = iter(pty)

    # What is typed before `cat` reads may be taken for the shell's.
    sandbox.pty.send_stdin(pty.pid, f"stty -echo; echo rea''dy; cat > {folder}/pasted\n".encode())
    while b"ready" not in output:
        output.extend(next(events)[2] or b"")
    for start in range(0, len(lines), 500):
        sandbox.pty.send_stdin(pty.pid, lines[start : start + 500].encode())
    sandbox.pty.send_stdin(pty.pid, b"\x04exit\n")
    for _ in events:
        pass

    assert sandbox.files.read(f"{folder}/pasted") == lines
