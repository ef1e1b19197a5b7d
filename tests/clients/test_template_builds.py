"""Templates built with E2B's Python SDK, and sandboxes that start from them."""

from __future__ import annotations

import socket
import time
import traceback
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from e2b import AsyncTemplate, Sandbox, SandboxException, Template, wait_for_file
from e2b.exceptions import BuildException, TemplateException

from tests.clients.support.raw import Api
from tests.clients.support.teams import new_team
from tests.clients.support.timing import eventually, seconds, whole_seconds

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("builds")]

UUID = "cat /proc/sys/kernel/random/uuid"


@pytest.fixture
def name(builder):
    """A name for a template, which is deleted afterwards."""
    chosen = f"t-{uuid.uuid4().hex[:12]}"
    yield chosen
    with Api(builder) as api:
        answer = api.delete(f"/templates/{chosen}")
        assert answer.status_code in (204, 404), answer.text


@pytest.fixture
def start(builder):
    """Start sandboxes that are killed when the test ends."""
    made = []

    def create(template, **options):
        made.append(Sandbox.create(template, timeout=whole_seconds(600), **options))
        return made[-1]

    yield create
    for sandbox in made:
        sandbox.kill()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "app" / "inner").mkdir(parents=True)
    (tmp_path / "app" / "main.py").write_text("print('main')\n")
    (tmp_path / "app" / "inner" / "data.txt").write_text("data\n")
    (tmp_path / "app" / "skipped.log").write_text("log\n")
    (tmp_path / "one.txt").write_text("one\n")
    (tmp_path / "two.txt").write_text("two\n")
    (tmp_path / "tool.sh").write_text("#!/bin/sh\necho tool\n")
    return tmp_path


def run(sandbox, command, **options):
    return sandbox.commands.run(command, **options).stdout


def test_every_kind_of_step_leaves_its_mark(builder, name, folder, start):
    template = (
        Template(file_context_path=folder, file_ignore_patterns=["**/*.log"])
        .from_template("base")
        .copy("app", "/opt/app", user="root")
        .copy("*.txt", "/home/user/texts/")
        .copy("tool.sh", "/usr/local/bin/tool", user="root", mode=0o755)
        .set_envs({"COLOUR": "blue", "WITH_SPACE": "a b 'c'"})
        .run_cmd("id -un > /tmp/who; echo $COLOUR > /tmp/colour")
        .run_cmd("id -un > /root-was-here", user="root")
        .make_dir("/home/user/work", mode=0o700)
        .set_workdir("/home/user/work")
        .run_cmd("pwd > /tmp/where")
    )

    Template.build(template, name, cpu_count=1, memory_mb=512)
    sandbox = start(name)

    assert run(sandbox, "cat /opt/app/main.py /opt/app/inner/data.txt; ls /opt/app") == (
        "print('main')\ndata\ninner\nmain.py\n"
    )
    assert run(sandbox, "stat -c %U /opt/app/main.py; stat -c %U /home/user/texts/one.txt") == "root\nuser\n"
    assert run(sandbox, "cat texts/*.txt", cwd="/home/user") == "one\ntwo\n"
    assert run(sandbox, "tool; stat -c %a /usr/local/bin/tool") == "tool\n755\n"
    assert run(sandbox, 'echo "$COLOUR|$WITH_SPACE"') == "blue|a b 'c'\n"
    assert run(sandbox, "cat /tmp/who /tmp/colour /root-was-here /tmp/where") == "user\nblue\nroot\n/home/user/work\n"
    assert run(sandbox, "pwd") == "/home/user/work\n"
    info = sandbox.get_info()
    assert (info.cpu_count, info.memory_mb) == (1, 512)


def test_the_same_build_again_comes_from_the_cache_unless_it_is_forced(builder, name, folder, start):
    def marks(*, content="same", skip_first=False, skip_rest=False):
        (folder / "one.txt").write_text(content)
        template = Template(file_context_path=folder).from_template("base").run_cmd(f"{UUID} > ~/first")
        if skip_rest:
            template.skip_cache()
        template.copy("one.txt", "/home/user/one.txt").run_cmd(f"{UUID} > ~/second")
        Template.build(template, name, skip_cache=skip_first)
        return run(start(name), "cat ~/first ~/second").split()

    first = marks()
    cached = marks()
    changed = marks(content="other")
    forced = marks(skip_first=True)
    partly = marks(skip_rest=True)

    assert cached == first
    assert changed[0] == first[0]
    assert changed[1] != first[1]
    assert forced[0] != first[0]
    assert partly[0] == forced[0]
    assert partly[1] not in (first[1], changed[1], forced[1])


def test_a_step_that_fails_points_at_its_line_and_the_last_good_build_stays(builder, name, start):
    Template.build(Template().from_template("base").run_cmd("echo good > ~/state"), name)
    lines: list[str] = []
    template = (
        Template()
        .from_template("base")
        .run_cmd("echo fine")
        .run_cmd("echo on-stdout; echo on-stderr >&2; exit 3")  # this one
        .run_cmd("echo never")
    )

    with pytest.raises(BuildException, match="3") as raised:
        Template.build(template, name, on_build_logs=lambda entry: lines.append(entry.message))

    shown = [frame.line or "" for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert any("this one" in text for text in shown), shown
    assert any("on-stdout" in text for text in lines)
    assert any("on-stderr" in text for text in lines)
    assert not any(text.strip() == "never" for text in lines)
    assert run(start(name), "cat ~/state") == "good\n"


def test_a_background_build_is_polled_and_its_log_pages_exactly(builder, name):
    template = Template().from_template("base").run_cmd("for n in $(seq 250); do echo line-$n; done")

    info = Template.build_in_background(template, name)
    entries, status = [], None
    while status is None or status.status.value in ("waiting", "building") or status.log_entries:
        status = Template.get_build_status(info, logs_offset=len(entries))
        entries += status.log_entries
        time.sleep(0.05)

    assert status.status.value == "ready"
    printed = [entry.message for entry in entries if entry.message.startswith("line-")]
    assert printed == [f"line-{number}" for number in range(1, 251)]


def test_the_reason_of_a_failure_repeats_the_steps_log(builder, name):
    info = Template.build_in_background(
        Template().from_template("base").run_cmd("echo one").run_cmd("echo two; false"), name
    )

    status = eventually(
        lambda: (found := Template.get_build_status(info)).status.value == "error" and found, within=120, every=0.2
    )

    assert status.reason.step == "2"
    messages = [entry.message for entry in status.reason.log_entries]
    assert "two" in messages
    assert "one" not in messages


async def test_the_asynchronous_builder_works_alike(builder, name, folder):
    template = AsyncTemplate(file_context_path=folder).from_template("base").copy("app", "/opt/app")

    await AsyncTemplate.build(template, name)

    assert await AsyncTemplate.exists(name)


def test_tags_and_names_mean_builds(builder, name, start):
    def build(version, tags=None):
        Template.build(
            Template().from_template("base").run_cmd(f"echo {version} > ~/version"), f"{name}:{version}", tags=tags
        )

    build("v1")
    build("v2", tags=["latest"])
    Template.assign_tags(f"{name}:v1", "stable")

    assert run(start(f"{name}:v1"), "cat ~/version") == "v1\n"
    assert run(start(f"{name}:latest"), "cat ~/version") == "v2\n"
    assert run(start(f"{name}:stable"), "cat ~/version") == "v1\n"
    with pytest.raises(SandboxException, match=r"no build with the tag .default."):
        Sandbox.create(name)
    Template.assign_tags(f"{name}:v2", "stable")
    Template.remove_tags(name, "latest")
    assert run(start(f"{name}:stable"), "cat ~/version") == "v2\n"
    assert {tag.tag for tag in Template.get_tags(name)} == {"v1", "v2", "stable"}


def test_a_template_is_built_on_another_one(builder, name, start):
    Template.build(
        Template().from_template("base").set_envs({"LAYER": "below"}).run_cmd("echo below > ~/below"), f"{name}:below"
    )
    Template.build(
        Template().from_template(f"{name}:below").run_cmd("cat ~/below > ~/above; echo $LAYER >> ~/above"), name
    )

    assert run(start(name), "cat ~/above ~/below; echo $LAYER") == "below\nbelow\nbelow\nbelow\n"


def test_a_dockerfile_is_built(builder, name, folder, start):
    (folder / "Dockerfile").write_text(
        "FROM e2bdev/base\n"
        "ENV GREETING=hello\n"
        "COPY app /app\n"
        "RUN echo $GREETING > /app/greeting\n"
        "WORKDIR /app\n"
        "USER user\n"
    )

    Template.build(Template(file_context_path=folder).from_dockerfile(str(folder / "Dockerfile")), name)

    assert run(start(name), "pwd; cat greeting; id -un; cat main.py") == "/app\nhello\nuser\nprint('main')\n"


def test_the_start_command_runs_in_every_sandbox_that_starts(builder, name, start):
    template = (
        Template()
        .from_template("base")
        .set_start_cmd("sleep 0.5; touch /tmp/started; exec sleep 98765", wait_for_file("/tmp/started"))
    )

    Template.build(template, name)
    sandbox = start(name)

    assert run(sandbox, "ls /tmp/started; pgrep -f 'sleep 9876[5]' | wc -l").split()[0] == "/tmp/started"
    # The file is there from the build; what made it there sleeps a moment here, too.
    eventually(lambda: run(sandbox, "ps -C sleep -o args= || true") == "sleep 98765\n", what="one command runs")


def test_a_ready_command_that_never_succeeds_fails_the_build(builder_host, name):
    template = Template().from_template("base").set_start_cmd("sleep 1000", "false")  # never ready

    with pytest.raises(BuildException, match="ready") as raised:
        Template.build(template, name)

    shown = [frame.line or "" for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert any("never ready" in text for text in shown), shown
    with pytest.raises(SandboxException, match="no ready build"):
        Sandbox.create(name)


def test_a_private_template_is_its_teams_and_a_public_one_everybodys(builder, builder_host, name):
    other = new_team(builder_host)
    Template.build(Template().from_template("base").run_cmd("echo shared > ~/file"), name)
    namespace = _namespace(builder, name)

    with pytest.raises(SandboxException, match="not found"):
        Sandbox.create(f"{namespace}/{name}", api_key=other.key)
    hidden = Template.exists(f"{namespace}/{name}", api_key=other.key)
    with Api(builder) as api:
        api.patch(f"/v2/templates/{name}", json={"public": True}).raise_for_status()
    sandbox = Sandbox.create(f"{namespace}/{name}", api_key=other.key, timeout=whole_seconds(600))
    content = run(sandbox, "cat ~/file")
    sandbox.kill()
    with pytest.raises(SandboxException, match="not found"):
        Sandbox.create(name, api_key=other.key)
    with pytest.raises(BuildException, match="403"):
        Template.build(Template().from_template("base"), f"{namespace}/{name}", api_key=other.key)
    Template.build(Template().from_template(f"{namespace}/{name}").run_cmd("cat ~/file"), "on-top", api_key=other.key)

    assert hidden  # 403: there is one, of somebody else's
    assert content == "shared\n"


def _namespace(emberbox, name) -> str:
    with Api(emberbox) as api:
        listed = api.get("/v2/templates").json()
    return next(one["names"][0].split("/")[0] for one in listed if name in one["aliases"])


def test_a_deleted_template_is_gone_and_its_sandboxes_go_on(builder, name, start):
    Template.build(Template().from_template("base").run_cmd("echo kept > ~/file"), name)
    sandbox = start(name)

    with Api(builder) as api:
        deleted = api.delete(f"/templates/{name}")
        again = api.delete(f"/templates/{name}")

    assert (deleted.status_code, again.status_code) == (204, 404)
    assert not Template.exists(name)
    with pytest.raises(SandboxException, match="not found"):
        Sandbox.create(name)
    assert run(sandbox, "cat ~/file; ls /usr/bin | head -1 | wc -l") == "kept\n1\n"


def test_a_deleted_build_ends(builder, name):
    info = Template.build_in_background(Template().from_template("base").run_cmd("sleep 300"), name)
    eventually(lambda: Template.get_build_status(info).status.value == "building", within=180, every=0.1)

    with Api(builder) as api:
        deleted = api.delete(f"/templates/{name}")
    Template.build(Template().from_template("base").run_cmd("echo next"), name)

    assert deleted.status_code == 204


@pytest.mark.parametrize("wanted", ["Odd Name", "a/b/c", "", "x" * 200, "name:tag:more", "ünïcode"])
def test_odd_names_are_refused(builder, wanted):
    with pytest.raises((BuildException, TemplateException), match=r"not a template name|Name must be provided"):
        Template.build(Template().from_template("base"), wanted)

    with Api(builder) as api:
        assert not [one for one in api.get("/v2/templates").json() if wanted and wanted in one["aliases"]]


def test_an_unknown_step_type_is_refused(builder, name):
    with Api(builder) as api:
        made = api.post("/v3/templates", json={"name": name}).json()
        answer = api.post(
            f"/v2/templates/{made['templateID']}/builds/{made['buildID']}",
            json={"fromTemplate": "base", "steps": [{"type": "DANCE", "args": []}]},
        )

    assert answer.status_code == 400
    assert "unknown type" in answer.json()["message"]


def test_an_upload_that_is_wrong_or_cut_off_is_refused_and_leaves_nothing(builder, name):
    files_hash = "ab" * 32
    with Api(builder) as api:
        made = api.post("/v3/templates", json={"name": name}).json()
        url = api.get(f"/templates/{name}/files/{files_hash}").json()["url"]
        other = httpx.put(url.replace("abab", "cdcd", 1), content=b"x", trust_env=False, timeout=60)
        junk = httpx.put(url, content=b"no archive", trust_env=False, timeout=60)
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            head = f"PUT {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 5000\r\n\r\n"
            connection.sendall(head.encode() + b"only a little")
        again = api.get(f"/templates/{name}/files/{files_hash}").json()
        started = api.post(
            f"/v2/templates/{made['templateID']}/builds/{made['buildID']}",
            json={"fromTemplate": "base", "steps": [{"type": "COPY", "args": ["a", "/b"], "filesHash": files_hash}]},
        )

    assert (other.status_code, junk.status_code) == (403, 400)
    assert again["present"] is False
    assert started.status_code == 400
    assert "not uploaded" in started.json()["message"]
    if builder.data_dir:
        stored = Path(builder.data_dir, "api", "files")
        eventually(lambda: not list(stored.rglob("*.part")), what="the part that arrived is removed")
        assert not list(stored.rglob(f"{files_hash}*"))


def test_nothing_of_a_failed_build_is_left_on_the_host(builder_host, name):
    def lists():
        return builder_host.run(f"ls {builder_host.data_dir}/node/layers").split()

    before = lists()
    with pytest.raises(BuildException):
        Template.build(Template().from_template("base").run_cmd(f"{UUID} > ~/big; false"), name)

    # What an earlier test left may go meanwhile.
    assert set(lists()) <= set(before)
