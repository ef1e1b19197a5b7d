"""Templates from the command line: E2B's own, and `emberbox template`."""

from __future__ import annotations

import json
import re
import uuid

import pytest
from e2b import Sandbox, Template

from tests.clients.support import node
from tests.clients.support.raw import Api
from tests.clients.support.timing import seconds, whole_seconds

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("builds")]


@pytest.fixture
def cli(builder, tmp_path):
    """`cli("template", "list")` runs the installed `e2b` with a home of its own."""
    node.install()
    env = node.environment(builder, tmp_path)
    return lambda *arguments, **options: node.run_cli(*arguments, env=env, **options)


@pytest.fixture
def name(builder):
    chosen = f"c-{uuid.uuid4().hex[:12]}"
    yield chosen
    with Api(builder) as api:
        api.delete(f"/templates/{chosen}")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "project"
    place.mkdir()
    (place / "hello.txt").write_text("hello\n")
    (place / "e2b.Dockerfile").write_text(
        "FROM e2bdev/base\nCOPY hello.txt /hello.txt\nRUN wc -c < /hello.txt > /count\n"
    )
    return place


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_create_builds_a_dockerfile_with_sizes_and_commands(cli, name, folder):
    done = cli(
        "template", "create", name, "--path", str(folder), "--cpu-count", "1", "--memory-mb", "512",
        "--cmd", "touch /tmp/up; sleep 1111", "--ready-cmd", "test -e /tmp/up", timeout=1200,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    sandbox = Sandbox.create(name, timeout=whole_seconds(600))
    output = sandbox.commands.run("cat /hello.txt /count; ls /tmp/up").stdout
    info = sandbox.get_info()
    sandbox.kill()
    assert output == "hello\n6\n/tmp/up\n"
    assert (info.cpu_count, info.memory_mb) == (1, 512)


def test_a_dockerfile_that_fails_says_why(cli, name, folder):
    (folder / "e2b.Dockerfile").write_text("FROM e2bdev/base\nRUN echo going wrong && exit 4\n")

    done = cli("template", "create", name, "--path", str(folder), timeout=1200)

    assert done.returncode == 1
    assert "going wrong" in plain(done.stdout + done.stderr)
    assert "build failed" in plain(done.stdout + done.stderr)


def test_a_bad_dockerfile_and_a_bad_name_are_refused(cli, name, folder):
    (folder / "e2b.Dockerfile").write_text("RUN true\n")

    no_from = cli("template", "create", name, "--path", str(folder))
    bad_name = cli("template", "create", "not a name", "--path", str(folder))

    assert no_from.returncode == bad_name.returncode == 1
    assert "FROM" in no_from.stdout + no_from.stderr
    assert "not valid" in plain(bad_name.stdout + bad_name.stderr)


def test_list_publish_and_delete(cli, name):
    Template.build(Template().from_template("base").run_cmd("true"), name)

    def access():
        done = cli("template", "list", "--format", "json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout[done.stdout.index("[") :])
        return [one["public"] for one in found if name in one["aliases"]]

    private = access()
    published = cli("template", "publish", "--yes", name)
    public = access()
    unpublished = cli("template", "unpublish", "--yes", name)
    private_again = access()
    table = cli("template", "list")
    deleted = cli("template", "delete", "--yes", name)
    gone = cli("template", "delete", "--yes", name)

    assert (private, public, private_again) == ([False], [True], [False])
    assert published.returncode == unpublished.returncode == deleted.returncode == 0, deleted.stderr
    assert f"/{name}" in plain(published.stdout)
    assert name in plain(table.stdout)
    assert gone.returncode == 1
    assert access() == []


# ---- emberbox template


def ours(host, *arguments, timeout=240):
    return host.command("template", *arguments, timeout=timeout)


def test_emberbox_lists_shows_publishes_and_deletes(builder_host, name):
    Template.build(Template().from_template("base").run_cmd("true"), f"{name}:v1")

    listed = ours(builder_host, "list")
    as_json = ours(builder_host, "list", "--json")
    shown = ours(builder_host, "show", name)
    shown_json = json.loads(ours(builder_host, "show", name, "--json").stdout)
    published = ours(builder_host, "publish", name)
    private = ours(builder_host, "publish", name, "--private")
    deleted = ours(builder_host, "delete", name)
    again = ours(builder_host, "delete", name)

    assert f"/{name}\tready\tprivate" in listed.stdout
    assert "base\tready\tpublic" in listed.stdout
    assert [one for one in json.loads(as_json.stdout) if name in one["aliases"]]
    assert "v1" in shown.stdout
    assert [tag["tag"] for tag in shown_json["tags"]] == ["v1"]
    assert f"/{name}" in published.stderr
    assert "private" in private.stderr
    assert (deleted.returncode, again.returncode) == (0, 1)
    assert "not found" in again.stderr


def test_emberbox_builds_nothing_that_it_does_not_know(builder_host):
    unknown = ours(builder_host, "build", "no-such-template")

    assert unknown.returncode == 1
    assert "--image" in unknown.stderr
    assert "docs/templates.md" in unknown.stderr


def test_emberbox_tells_how_a_build_from_an_image_failed(builder_host, name):
    done = ours(builder_host, "build", name, "--image", "127.0.0.1:1/nothing:here", "--json", timeout=600)

    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert (last["status"], last["reason"]["step"]) == ("error", "base")
    assert "the build failed at step base" in done.stderr


def test_a_shipped_template_is_built_with_its_log_and_then_started(builder_host):
    before = ours(builder_host, "list")
    built = ours(builder_host, "build", "hello", timeout=1200)
    again = ours(builder_host, "build", "hello", "--json", "--network-mbit-per-second", "800", timeout=1200)
    shown = ours(builder_host, "show", "hello")

    entries = [json.loads(line) for line in again.stdout.splitlines()]
    sandbox = Sandbox.create("hello", timeout=whole_seconds(600))
    answer = sandbox.commands.run("curl -s localhost:8000").stdout
    sandbox.kill()
    assert "hello\tbuilt on first use" in before.stdout
    assert built.returncode == 0, built.stderr
    assert "3 | preparing" in built.stderr
    assert "template hello is ready" in built.stdout
    assert entries[-1]["status"] == "ready"
    assert [line for line in shown.stdout.splitlines() if "default" in line and "800 Mbit/s" in line]
    assert all({"timestamp", "level", "message"} <= set(entry) for entry in entries[:-1])
    assert answer == "hello\n"


def test_on_a_terminal_a_build_is_shown_while_it_runs(builder_host):
    command, environment = builder_host.command_in_terminal("template", "build", "hello", "--force")
    terminal = node.Terminal(*command, env=environment)
    try:
        terminal.wait_for("preparing", within=600)
        terminal.wait_for("template hello is ready", within=600)
        code = terminal.wait()
    finally:
        terminal.close()

    assert code == 0


def test_base_is_built_again_when_asked(builder, builder_host):
    with Api(builder) as api:
        before = api.get("/templates/base").json()

    done = ours(builder_host, "build", "base", timeout=seconds(600))

    with Api(builder) as api:
        after = api.get("/templates/base").json()
    sandbox = Sandbox.create(timeout=whole_seconds(300))
    output = sandbox.commands.run("echo $((6 * 7))").stdout
    sandbox.kill()
    assert done.returncode == 0, done.stderr
    assert "Found in the image cache" in done.stderr
    assert len(after["builds"]) == len(before["builds"]) + 1
    assert output == "42\n"
