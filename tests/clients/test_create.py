"""Creating a sandbox: what is asked for is what it has."""

from __future__ import annotations

import datetime
import uuid

import httpx
import pytest
from e2b import AsyncSandbox, Sandbox, SandboxException
from packaging.version import Version

from tests.clients.support.timing import seconds, whole_seconds


def test_a_sandbox_runs_a_command(make_sandbox):
    sandbox = make_sandbox()

    result = sandbox.commands.run("echo hello")

    assert result.stdout == "hello\n"
    assert result.stderr == ""
    assert result.exit_code == 0


async def test_an_async_sandbox_runs_a_command(make_async_sandbox):
    sandbox = await make_async_sandbox()

    result = await sandbox.commands.run("echo hello")

    assert (result.stdout, result.exit_code) == ("hello\n", 0)


def test_info_shows_what_was_asked(make_sandbox):
    metadata = {"user": "42", "näme with space": "v=1&w=2 é"}

    sandbox = make_sandbox(metadata=metadata, timeout=whole_seconds(300))

    info = sandbox.get_info()
    assert info.sandbox_id == sandbox.sandbox_id
    assert info.metadata == metadata
    assert info.name == "base"
    assert info.state == "running"
    assert info.cpu_count >= 1
    assert info.memory_mb >= 128
    assert Version(info.envd_version) >= Version("0.6.4")
    assert info.end_at - info.started_at == pytest.approx(
        datetime.timedelta(seconds=whole_seconds(300)), abs=datetime.timedelta(seconds=60)
    )


def test_timeout_defaults_to_five_minutes(emberbox, api):
    created = api.post("/v2/sandboxes", json={"templateID": "base"}).json()

    info = Sandbox.get_info(created["sandboxID"])
    Sandbox.kill(created["sandboxID"])

    assert (info.end_at - info.started_at).total_seconds() == pytest.approx(300, abs=60)


def test_timeout_of_the_first_api_defaults_to_fifteen_seconds(emberbox, api):
    created = api.post("/sandboxes", json={"templateID": "base"}).json()

    info = Sandbox.get_info(created["sandboxID"])
    Sandbox.kill(created["sandboxID"])

    assert (info.end_at - info.started_at).total_seconds() == pytest.approx(15, abs=seconds(10))


def test_environment_reaches_every_command(make_sandbox):
    sandbox = make_sandbox(envs={"GREETING": "hello world", "QUOTED": "a'b\"c$d"})

    result = sandbox.commands.run('printf "%s|%s" "$GREETING" "$QUOTED"')

    assert result.stdout == "hello world|a'b\"c$d"


def test_environment_of_a_command_wins_over_the_sandbox(make_sandbox):
    sandbox = make_sandbox(envs={"LEVEL": "sandbox", "OTHER": "kept"})

    result = sandbox.commands.run('echo "$LEVEL $OTHER"', envs={"LEVEL": "command"})

    assert result.stdout == "command kept\n"


def test_environment_reaches_root_and_background_commands(make_sandbox):
    sandbox = make_sandbox(envs={"GREETING": "hi"})

    as_root = sandbox.commands.run("echo $GREETING; id -u", user="root")
    in_background = sandbox.commands.run("echo $GREETING", background=True).wait()

    assert as_root.stdout == "hi\n0\n"
    assert in_background.stdout == "hi\n"


def test_the_sandbox_knows_its_home_and_user(sandbox):
    result = sandbox.commands.run('echo "$HOME $USER $LOGNAME $(pwd) $(id -un) $(id -u)"')

    assert result.stdout == "/home/user user user /home/user user 1000\n"


def test_sudo_works_without_a_password(sandbox):
    result = sandbox.commands.run("sudo -n id -u")

    assert result.stdout == "0\n"


def test_the_base_template_has_the_tools_agents_use(sandbox):
    tools = "bash curl wget git python3 pip3 node npm gcc make sudo ps"

    missing = sandbox.commands.run(f"for tool in {tools}; do command -v $tool >/dev/null || echo $tool; done")
    writable = sandbox.commands.run("touch /code/file && echo yes")

    assert missing.stdout == ""
    assert writable.stdout == "yes\n"


def test_the_template_may_carry_a_tag(make_sandbox):
    sandbox = make_sandbox("base:default")

    assert sandbox.get_info().name == "base"


def test_a_sandbox_by_template_id(make_sandbox):
    by_name = make_sandbox("base").get_info().template_id

    by_id = make_sandbox(by_name).get_info()

    assert by_id.template_id == by_name


def test_the_same_idempotency_key_gives_the_same_sandbox(make_sandbox):
    key = str(uuid.uuid4())

    first = make_sandbox(idempotency_key=key)
    second = Sandbox.create(idempotency_key=key, timeout=whole_seconds(600))

    assert second.sandbox_id == first.sandbox_id
    assert second.commands.run("echo ok").stdout == "ok\n"


def test_an_idempotency_key_with_another_body_is_refused(make_sandbox):
    key = str(uuid.uuid4())
    make_sandbox(idempotency_key=key)

    with pytest.raises(SandboxException) as refused:
        Sandbox.create(idempotency_key=key, metadata={"other": "body"}, timeout=whole_seconds(120))

    assert refused.value.status_code == 422


async def test_many_creates_at_once_give_different_sandboxes(make_async_sandbox):
    import asyncio

    sandboxes = await asyncio.gather(*(make_async_sandbox() for _ in range(8)))

    outputs = await asyncio.gather(*(each.commands.run("hostname; echo ok") for each in sandboxes))
    assert len({each.sandbox_id for each in sandboxes}) == 8
    assert all(output.stdout.endswith("ok\n") for output in outputs)


def test_sandboxes_do_not_see_each_other(make_sandbox):
    one, two = make_sandbox(), make_sandbox()

    one.files.write("/tmp/secret", "one")
    sleeper = one.commands.run("sleep 77777", background=True)

    assert not two.files.exists("/tmp/secret")
    assert "77777" not in two.commands.run("ps ax -o args").stdout
    sleeper.kill()


def test_kill_says_whether_there_was_something(make_sandbox):
    sandbox = make_sandbox()

    assert sandbox.is_running() is True
    assert sandbox.kill() is True
    assert sandbox.kill() is False
    assert sandbox.is_running() is False


async def test_async_kill_says_whether_there_was_something(make_async_sandbox):
    sandbox = await make_async_sandbox()

    assert await sandbox.is_running() is True
    assert await AsyncSandbox.kill(sandbox.sandbox_id) is True
    assert await sandbox.kill() is False
    assert await sandbox.is_running() is False


def test_the_context_manager_kills(emberbox):
    with Sandbox.create(timeout=whole_seconds(300)) as sandbox:
        sandbox_id = sandbox.sandbox_id

    assert Sandbox.kill(sandbox_id) is False


def test_a_secured_sandbox_refuses_calls_without_its_token(make_sandbox, agent_of):
    sandbox = make_sandbox()
    stranger = agent_of(sandbox, token=False)

    answers = [
        stranger.rpc("process.Process/List"),
        stranger.rpc("filesystem.Filesystem/Stat", {"path": "/"}),
        stranger.get("/files", params={"path": "/etc/hostname"}),
        stranger.get("/metrics"),
        stranger.get("/envs"),
    ]

    assert [answer.status_code for answer in answers] == [401] * 5
    assert stranger.get("/health").status_code == 204


def test_a_wrong_token_is_refused(make_sandbox, agent_of):
    sandbox = make_sandbox()
    stranger = agent_of(sandbox, token=False)

    answer = stranger.rpc("process.Process/List", headers={"X-Access-Token": "0" * 64})

    assert answer.status_code == 401


def test_an_unsecured_sandbox_needs_no_token(api, agent_of, emberbox):
    created = api.post("/sandboxes", json={"templateID": "base", "timeout": whole_seconds(300)}).json()
    sandbox = Sandbox.connect(created["sandboxID"])
    stranger = agent_of(sandbox, token=False)

    answer = stranger.rpc("process.Process/List")
    sandbox.kill()

    assert "envdAccessToken" not in created or not created["envdAccessToken"]
    assert answer.status_code == 200


def test_the_first_api_can_secure_too(api, agent_of):
    created = api.post("/sandboxes", json={"templateID": "base", "timeout": whole_seconds(300), "secure": True}).json()
    sandbox = Sandbox.connect(created["sandboxID"])
    stranger = agent_of(sandbox, token=False)

    answer = stranger.rpc("process.Process/List")
    works = sandbox.commands.run("echo ok").stdout
    sandbox.kill()

    assert created["envdAccessToken"]
    assert answer.status_code == 401
    assert works == "ok\n"


def test_control_routes_of_the_agent_do_not_pass_the_edge(make_sandbox, agent_of):
    sandbox = make_sandbox()
    agent = agent_of(sandbox)

    answers = [agent.post("/init", json={"envVars": {"A": "b"}}), agent.post("/init/"), agent.post("//init")]

    assert [answer.status_code for answer in answers] == [404] * 3
    assert sandbox.commands.run("echo ok").stdout == "ok\n"


def test_unknown_fields_of_newer_clients_are_no_error(api):
    body = {"templateID": "base", "timeout": whole_seconds(300), "somethingNew": {"a": 1}}

    answer = api.post("/v2/sandboxes", json=body)
    Sandbox.kill(answer.json()["sandboxID"])

    assert answer.status_code == 201


def test_answers_carry_what_every_client_reads(api):
    answer = api.post("/v2/sandboxes", json={"templateID": "base", "timeout": whole_seconds(300)})
    created = answer.json()
    detail = api.get(f"/sandboxes/{created['sandboxID']}").json()
    api.delete(f"/sandboxes/{created['sandboxID']}")

    assert isinstance(answer, httpx.Response)
    assert answer.status_code == 201
    assert {"templateID", "sandboxID", "clientID", "envdVersion", "envdAccessToken", "domain"} <= created.keys()
    assert {
        "templateID", "sandboxID", "clientID", "startedAt", "endAt", "cpuCount", "memoryMB", "diskSizeMB", "state",
        "envdVersion", "metadata",
    } <= detail.keys()  # fmt: skip
