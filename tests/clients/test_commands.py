"""Commands with the synchronous Python client."""

from __future__ import annotations

import time

import pytest
from e2b import CommandExitException, InvalidArgumentException, NotFoundException, TimeoutException

from tests.clients.support.timing import eventually, seconds


def test_exit_codes_and_both_streams_come_back(sandbox):
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo out; echo err >&2; exit 42")

    assert failed.value.exit_code == 42
    assert failed.value.stdout == "out\n"
    assert failed.value.stderr == "err\n"


def test_an_unknown_command_exits_127(sandbox):
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("no-such-command-here")

    assert failed.value.exit_code == 127
    assert "not found" in failed.value.stderr


def test_a_command_that_kills_itself_says_so(sandbox):
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("kill -9 $$")

    assert failed.value.exit_code == -1
    assert failed.value.error == "signal: killed"


def test_callbacks_see_output_while_the_command_runs(sandbox):
    seen: list[str] = []

    def note(text):
        seen.extend(text.split())
        if "first" in text:
            sandbox.files.write("heard", "")

    # It ends only when somebody has heard its first line.
    sandbox.commands.run(
        "echo first; until [ -e heard ]; do sleep 0.05; done; echo second; echo problem >&2",
        on_stdout=note,
        on_stderr=note,
    )

    assert seen[0] == "first"
    assert sorted(seen) == ["first", "problem", "second"]


def test_cwd_is_where_the_command_runs(sandbox, folder):
    assert sandbox.commands.run("pwd", cwd=folder).stdout == f"{folder}\n"
    assert sandbox.commands.run("pwd", cwd="/").stdout == "/\n"


def test_a_missing_cwd_is_an_invalid_argument(sandbox):
    with pytest.raises(InvalidArgumentException, match="/no/such/place"):
        sandbox.commands.run("pwd", cwd="/no/such/place")


def test_an_unknown_user_is_refused(sandbox):
    with pytest.raises(Exception, match="nobody-such"):
        sandbox.commands.run("id", user="nobody-such")


def test_commands_run_as_the_asked_user(sandbox):
    assert sandbox.commands.run("id -un; echo $HOME", user="root").stdout == "root\n/root\n"
    assert sandbox.commands.run("id -un; echo $HOME", user="user").stdout == "user\n/home/user\n"


def test_the_default_user_cannot_touch_roots_files(sandbox):
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("touch /root/x")

    assert "Permission denied" in failed.value.stderr


def test_a_login_shell_knows_who_it_is_without_asking_a_program(sandbox):
    spy = "id() { echo asked >&2; command id \"$@\"; }; export -f id; bash -l -c 'echo $PATH'"

    as_root, as_user = (sandbox.commands.run(spy, user=user) for user in ("root", "user"))

    assert (as_root.stderr, as_user.stderr) == ("", "")
    assert "/usr/local/sbin" in as_root.stdout
    assert "/usr/local/sbin" not in as_user.stdout


def test_login_shell_reads_the_profile(sandbox):
    sandbox.files.write("/etc/profile.d/emberbox-test.sh", "export FROM_PROFILE=yes\n", user="root")

    assert sandbox.commands.run("echo $FROM_PROFILE").stdout == "yes\n"


def test_a_background_command_is_listed_connected_and_killed(sandbox):
    handle = sandbox.commands.run("sleep 3456", background=True)

    listed = {each.pid: each for each in sandbox.commands.list()}
    again = sandbox.commands.connect(handle.pid)

    assert listed[handle.pid].cmd == "/bin/bash"
    assert listed[handle.pid].args == ["-l", "-c", "sleep 3456"]
    assert listed[handle.pid].tag is None
    assert again.pid == handle.pid
    assert again.kill() is True
    with pytest.raises(CommandExitException) as ended:
        handle.wait()
    assert ended.value.exit_code == -1
    assert ended.value.error == "signal: killed"
    assert handle.kill() is False


def test_killing_a_command_ends_its_children(sandbox):
    handle = sandbox.commands.run("sleep 4567 & sleep 4567 & wait", background=True)
    count = "pgrep -fc '^sleep 4567' || true"
    eventually(lambda: sandbox.commands.run(count).stdout == "2\n", what="children started")

    handle.kill()

    eventually(lambda: sandbox.commands.run(count).stdout == "0\n", what="children")


def test_a_killed_unknown_process_is_not_found(sandbox):
    assert sandbox.commands.kill(999_999) is False
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(999_999)
    with pytest.raises(NotFoundException):
        sandbox.commands.send_stdin(999_999, "x")


def test_stdin_reaches_the_command(sandbox):
    handle = sandbox.commands.run("read line; echo got:$line", background=True, stdin=True)

    handle.send_stdin("hello\n")

    assert handle.wait().stdout == "got:hello\n"


def test_closing_stdin_is_end_of_file(sandbox):
    handle = sandbox.commands.run("cat; echo done", background=True, stdin=True)

    handle.send_stdin("one\n")
    handle.send_stdin(b"two\n")
    handle.close_stdin()

    assert handle.wait().stdout == "one\ntwo\ndone\n"


def test_streamed_stdin_arrives_in_order(sandbox):
    handle = sandbox.commands.run("cat", background=True, stdin=True)

    sandbox.commands.stream_input(handle.pid, (f"line {n}\n" for n in range(200)))
    handle.close_stdin()

    assert handle.wait().stdout == "".join(f"line {n}\n" for n in range(200))


def test_without_stdin_the_command_reads_end_of_file(sandbox):
    assert sandbox.commands.run("cat; echo end", timeout=seconds(60)).stdout == "end\n"


def test_a_timed_out_command_is_killed_and_the_client_told(sandbox):
    started = time.monotonic()

    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 5678", timeout=seconds(1))

    assert time.monotonic() - started < seconds(60)
    eventually(lambda: "5678" not in sandbox.commands.run("ps ax -o args").stdout, what="the command is killed")


def test_a_command_goes_on_when_its_client_leaves(sandbox, folder):
    handle = sandbox.commands.run(f"sleep 1.5; touch {folder}/finished", background=True)

    handle.disconnect()

    eventually(lambda: sandbox.files.exists(f"{folder}/finished"), what="the command finished without its client")


def test_iterating_a_handle_gives_output_as_it_comes(sandbox):
    handle = sandbox.commands.run("for n in 1 2 3; do echo $n; sleep 0.1; done", background=True)

    text = "".join(out for out, _, _ in handle if out)

    assert text == "1\n2\n3\n"


def test_two_clients_of_one_command_see_the_same_end(sandbox):
    handle = sandbox.commands.run("read line; echo $line; exit 3", background=True, stdin=True)
    second = sandbox.commands.connect(handle.pid)

    handle.send_stdin("shared\n")

    for each in (handle, second):
        with pytest.raises(CommandExitException) as ended:
            each.wait()
        assert (ended.value.exit_code, ended.value.stdout) == (3, "shared\n")


def test_connecting_just_after_the_end_still_gives_the_result(sandbox):
    handle = sandbox.commands.run("exit 5", background=True)
    with pytest.raises(CommandExitException):
        handle.wait()

    with pytest.raises((CommandExitException, NotFoundException)) as ended:
        sandbox.commands.connect(handle.pid).wait()

    assert getattr(ended.value, "exit_code", 5) == 5


def test_large_output_is_complete_and_in_order(sandbox):
    result = sandbox.commands.run("seq 1 200000", timeout=seconds(60))

    assert result.stdout == "".join(f"{n}\n" for n in range(1, 200_001))


def test_output_cut_inside_a_character_is_put_together(sandbox):
    result = sandbox.commands.run(r"printf '\xe2\x82'; sleep 0.3; printf '\xac'")

    assert result.stdout == "€"


def test_output_that_is_not_utf8_does_not_break_the_stream(sandbox):
    result = sandbox.commands.run(r"printf 'a\xff\xfeb'")

    assert result.stdout == "a��b"


def test_a_command_of_a_megabyte_is_taken(sandbox):
    # One argument of a Linux exec is limited to 128 KiB; the client's single string must fail clearly, not hang.
    with pytest.raises(Exception, match=r"(?i)argument list too long|too long|too large"):
        sandbox.commands.run("true " + "x" * 1_000_000)

    assert sandbox.commands.run("true " + "x" * 100_000).exit_code == 0


def test_many_commands_at_once(sandbox):
    handles = [sandbox.commands.run(f"sleep 0.2; echo {n}", background=True) for n in range(30)]

    assert [handle.wait().stdout for handle in handles] == [f"{n}\n" for n in range(30)]


def test_output_need_not_be_kept(sandbox):
    seen: list[str] = []

    result = sandbox.commands.run("echo hello", retain_output=False, on_stdout=seen.append)

    assert result.stdout is None
    assert "".join(seen) == "hello\n"
