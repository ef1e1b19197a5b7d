"""E2B's own command line, unmodified."""

from __future__ import annotations

import json
import re

import pytest
from e2b import Sandbox

from tests.clients.support import node
from tests.clients.support.timing import eventually


@pytest.fixture(scope="module")
def cli(emberbox, tmp_path_factory):
    """`cli("sandbox", "list")` runs the installed `e2b` with a home of its own."""
    node.install()
    env = node.environment(emberbox, tmp_path_factory.mktemp("home"))

    def run(*arguments, **options):
        return node.run_cli(*arguments, env=env, **options)

    run.env = env
    return run


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _created(done) -> str:
    assert done.returncode == 0, done.stderr
    return _plain(done.stdout).split()[-1]


def test_create_detached_prints_an_id_that_works(cli):
    sandbox_id = _created(cli("sandbox", "create", "--detach", "base"))
    sandbox = Sandbox.connect(sandbox_id)

    output = sandbox.commands.run("echo hello").stdout
    sandbox.kill()

    assert output == "hello\n"


def test_create_takes_timeout_and_life_cycle(cli):
    sandbox_id = _created(
        cli("sandbox", "create", "-d", "--timeout", "300", "--lifecycle.ontimeout", "pause", "--lifecycle.autoresume")
    )

    info = Sandbox.get_info(sandbox_id)
    Sandbox.kill(sandbox_id)

    assert (info.end_at - info.started_at).total_seconds() == pytest.approx(300, abs=60)
    assert info.lifecycle == {"on_timeout": "pause", "auto_resume": True}


def test_create_of_an_unknown_template_fails_and_says_why(cli):
    done = cli("sandbox", "create", "--detach", "no-such-template")

    assert done.returncode == 1
    assert "no-such-template" in done.stderr


def test_a_wrong_key_fails_and_says_why(cli):
    done = node.run_cli("sandbox", "list", env={**cli.env, "E2B_API_KEY": "e2b_" + "0" * 40})

    assert done.returncode == 1
    assert "Unauthorized" in done.stderr


def test_list_shows_sandboxes_as_table_and_json(cli, make_sandbox):
    sandbox = make_sandbox(metadata={"suite": "cli", "one": sandbox_mark()})
    mark = sandbox.get_info().metadata["one"]

    table = cli("sandbox", "list", "--metadata", f"one={mark}")
    as_json = cli("sandbox", "list", "--format", "json", "--metadata", f"one={mark}")
    none = cli("sandbox", "list", "--metadata", "one=nothing-like-it")

    assert sandbox.sandbox_id in table.stdout
    assert [each["sandboxId"] for each in json.loads(as_json.stdout)] == [sandbox.sandbox_id]
    assert json.loads(as_json.stdout)[0]["metadata"]["one"] == mark
    assert "No sandboxes found" in none.stdout


def test_list_filters_by_state(cli, make_sandbox):
    mark = sandbox_mark()
    paused, running = make_sandbox(metadata={"m": mark}), make_sandbox(metadata={"m": mark})
    paused.pause()

    def listed(state):
        done = cli("sandbox", "list", "--format", "json", "--metadata", f"m={mark}", "--state", state)
        return sorted(each["sandboxId"] for each in json.loads(done.stdout))

    assert listed("paused") == [paused.sandbox_id]
    assert listed("running") == [running.sandbox_id]
    assert listed("running,paused") == sorted([paused.sandbox_id, running.sandbox_id])


def test_info_shows_a_sandbox(cli, sandbox):
    pretty = cli("sandbox", "info", sandbox.sandbox_id)
    as_json = cli("sandbox", "info", "--format", "json", sandbox.sandbox_id)
    missing = cli("sandbox", "info", "i" + "0" * 19)

    assert sandbox.sandbox_id in pretty.stdout
    assert json.loads(as_json.stdout)["sandboxId"] == sandbox.sandbox_id
    assert missing.returncode == 1
    assert "wasn't found" in missing.stderr


def test_exec_gives_output_and_exit_code(cli, sandbox):
    done = cli("sandbox", "exec", sandbox.sandbox_id, "echo out; echo err >&2; exit 7")

    assert done.returncode == 7
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr


def test_exec_takes_user_cwd_and_environment(cli, sandbox):
    done = cli(
        "sandbox",
        "exec",
        "-u",
        "root",
        "-c",
        "/tmp",
        "-e",
        "COLOUR=blue",
        sandbox.sandbox_id,
        "echo $(id -un) $PWD $COLOUR",
    )

    assert done.stdout == "root /tmp blue\n"
    assert done.returncode == 0


def test_exec_passes_arguments_as_they_are(cli, sandbox):
    done = cli("sandbox", "exec", sandbox.sandbox_id, "printf", "[%s]", "two words", "it's", "$HOME")

    assert done.stdout == "[two words][it's][$HOME]"


def test_exec_pipes_standard_input(cli, sandbox):
    data = bytes(range(1, 128)) * 2000

    done = cli("sandbox", "exec", sandbox.sandbox_id, "wc -c", stdin=data)

    assert done.stdout.strip() == str(len(data))
    assert done.returncode == 0


def test_exec_in_the_background_prints_a_pid(cli, sandbox):
    done = cli("sandbox", "exec", "--background", sandbox.sandbox_id, "sleep 6543")

    pid = int(done.stderr.split()[-1])
    assert done.returncode == 0
    assert pid in [each.pid for each in sandbox.commands.list()]
    sandbox.commands.kill(pid)


def test_exec_in_a_missing_sandbox_fails(cli):
    done = cli("sandbox", "exec", "i" + "0" * 19, "true")

    assert done.returncode == 1
    assert "not found" in done.stderr


def test_connect_opens_a_terminal(cli, make_sandbox):
    sandbox = make_sandbox()
    terminal = node.Terminal(str(node.CLI), "sandbox", "connect", sandbox.sandbox_id, env={**cli.env, "TERM": "xterm"})
    try:
        terminal.wait_for("$")
        terminal.type("echo answer=$((6*7)); id -un\r")
        terminal.wait_for("answer=42")
        terminal.type("exit\r")
        code = terminal.wait()
    finally:
        terminal.close()

    assert code == 0
    assert b"Closing terminal connection" in terminal.output


def test_create_with_a_terminal_ends_the_sandbox_afterwards(cli, emberbox):
    terminal = node.Terminal(str(node.CLI), "sandbox", "create", "base", env={**cli.env, "TERM": "xterm"})
    try:
        terminal.wait_for("$ ")
        terminal.type("echo answer=$((6*7))\r")
        terminal.wait_for("answer=42")
        terminal.type("exit\r")
        code = terminal.wait()
    finally:
        terminal.close()
    sandbox_id = re.search(rb"sandbox ID (?:\x1b\[[0-9;]*m)*([a-z0-9]+)", terminal.output)
    assert sandbox_id, terminal.output

    eventually(lambda: not _exists(sandbox_id[1].decode()), within=90, what="the sandbox of the terminal ends")
    assert code == 0


def test_pause_and_resume(cli, make_sandbox):
    sandbox = make_sandbox()

    paused = cli("sandbox", "pause", sandbox.sandbox_id)
    state = Sandbox.get_info(sandbox.sandbox_id).state
    again = cli("sandbox", "pause", sandbox.sandbox_id)
    resumed = cli("sandbox", "resume", sandbox.sandbox_id)

    assert paused.returncode == again.returncode == resumed.returncode == 0, paused.stderr + resumed.stderr
    assert state == "paused"
    assert "already paused" in again.stdout
    assert sandbox.commands.run("echo ok").stdout == "ok\n"


def test_logs_are_printed(cli, sandbox):
    sandbox.commands.run("echo for the log")

    def logs():
        done = cli("sandbox", "logs", "--level", "DEBUG", "--format", "json", sandbox.sandbox_id)
        assert done.returncode == 0, done.stderr
        return [line for line in _plain(done.stdout).splitlines() if line.strip()]

    lines = eventually(logs, within=90, every=0.5, what="a log line")
    pretty = cli("sandbox", "logs", sandbox.sandbox_id)

    assert all("timestamp" in json.loads(line) for line in lines)
    assert pretty.returncode == 0, pretty.stderr
    assert "Logs for sandbox" in pretty.stdout


def test_metrics_are_printed(cli, sandbox):
    eventually(sandbox.get_metrics, within=90, every=0.5, what="a first sample")

    pretty = cli("sandbox", "metrics", sandbox.sandbox_id)
    as_json = cli("sandbox", "metrics", "--format", "json", sandbox.sandbox_id)

    assert "Memory" in _plain(pretty.stdout)
    assert all(json.loads(line)["memTotal"] > 0 for line in as_json.stdout.splitlines() if line.strip())


def test_snapshots_are_made_listed_and_deleted(cli, make_sandbox):
    sandbox = make_sandbox()

    made = cli("sandbox", "snapshot", "create", sandbox.sandbox_id)
    listed = cli("sandbox", "snapshot", "list", "--format", "json", sandbox.sandbox_id)
    ids = [each["snapshotId"] for each in json.loads(listed.stdout)]
    deleted = cli("sandbox", "snapshot", "delete", *ids)

    assert made.returncode == 0, made.stderr
    assert len(ids) == 1
    assert ids[0] in _plain(made.stdout)
    assert deleted.returncode == 0, deleted.stderr


def test_kill_ends_one_several_and_all(cli, make_sandbox):
    mark = sandbox_mark()
    one, two, three = (make_sandbox(metadata={"m": mark}) for _ in range(3))

    first = cli("sandbox", "kill", one.sandbox_id)
    rest = cli("sandbox", "kill", "--all", "--metadata", f"m={mark}")
    missing = cli("sandbox", "kill", one.sandbox_id)

    assert "has been killed" in first.stdout
    assert "Killed 2 running sandboxes" in rest.stdout
    assert "wasn't found" in missing.stderr
    assert not any(_exists(each.sandbox_id) for each in (one, two, three))


def test_templates_are_listed(cli):
    done = cli("template", "list", "--format", "json")

    assert done.returncode == 0, done.stderr
    assert any("base" in (each.get("aliases") or each.get("names") or []) for each in json.loads(done.stdout))


def sandbox_mark() -> str:
    import uuid

    return uuid.uuid4().hex[:12]


def _exists(sandbox_id: str) -> bool:
    try:
        Sandbox.get_info(sandbox_id)
    except Exception:
        return False
    return True
