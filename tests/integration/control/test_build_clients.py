"""E2B's own builder against a control plane whose node is a fake: what travels between them, on real sockets."""

from __future__ import annotations

import socket
import tarfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from e2b import AsyncTemplate, Template
from e2b.exceptions import BuildException, FileUploadException

from emberbox.wire import node_pb2 as pb
from tests.integration.control.test_builds import archive, done, failed, files_left, line
from tests.support.control import World
from tests.support.live import live_world


@pytest.fixture
def live() -> Iterator[tuple[World, dict[str, Any]]]:
    with live_world() as (world, url):
        world.node.build_events = [line("working"), done()]
        yield world, {"api_url": url, "api_key": world.key}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("print('hello')\n")
    (tmp_path / "src" / "link").symlink_to("main.py")
    (tmp_path / "notes.txt").write_text("notes\n")
    return tmp_path


def test_files_travel_from_the_client_to_where_the_node_looks(live, folder):
    world, options = live
    template = Template(file_context_path=folder).from_image("debian:12").copy("src", "/app").copy("*.txt", "/notes")
    lines: list[str] = []

    info = Template.build(
        template, "mine:v1", tags=["v2"], on_build_logs=lambda entry: lines.append(str(entry)), **options
    )
    Template.build(template, "mine", **options)

    request = world.node.builds[-1]
    names = []
    for step in request.steps:
        with tarfile.open(Path(request.files_dir) / f"{step.files_hash}.tar.gz") as tar:
            names.append(sorted(tar.getnames()))
    assert names == [["src", "src/link", "src/main.py"], ["notes.txt"]]
    assert sorted(info.tags) == ["v1", "v2"]
    assert any("working" in text for text in lines)
    assert Template.exists("mine", **options)
    assert not Template.exists("yours", **options)


def test_uncompressed_files_and_those_that_are_there_already(live, folder):
    world, options = live
    lines: list[str] = []

    def build() -> None:
        template = Template(file_context_path=folder).from_image("debian:12").copy("src", "/app", gzip=False)
        Template.build(template, "mine", on_build_logs=lambda entry: lines.append(str(entry)), **options)

    build()
    build()

    assert sum("Uploaded 'src'" in text for text in lines) == 1
    assert sum("already cached" in text for text in lines) == 1
    assert world.node.builds[-1].steps[0].files_hash == world.node.builds[-2].steps[0].files_hash


async def test_the_asynchronous_builder_works_alike(live, folder):
    world, options = live
    template = AsyncTemplate(file_context_path=folder).from_image("debian:12").copy("src", "/app").run_cmd("make")

    info = await AsyncTemplate.build(template, "mine", **options)

    assert world.node.builds[-1].template_id == info.template_id


@pytest.mark.parametrize(("step", "source"), [("2", "second step"), ("base", "the image"), ("finalize", "the start")])
def test_a_failed_step_points_at_its_line(live, step, source):
    world, options = live
    world.node.build_events = [line("oops", step, "error"), failed("it broke", step)]
    builder = Template().from_image("debian:12")  # the image
    builder.run_cmd("true")
    builder.run_cmd("false")  # second step
    template = builder.set_start_cmd("serve", "true")  # the start

    with pytest.raises(BuildException, match="it broke") as raised:
        Template.build(template, "mine", **options)

    lines = [frame.line or "" for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert any(source in text for text in lines), lines


def test_a_background_build_is_polled(live):
    world, options = live
    world.node.build_events = [line("1"), line("2"), failed("no", "1")]

    info = Template.build_in_background(Template().from_image("debian:12").run_cmd("true"), "mine", **options)
    for _ in range(1200):
        status = Template.get_build_status(info, logs_offset=1, **options)
        if status.status.value == "error":
            break
        time.sleep(0.05)

    assert [entry.message for entry in status.log_entries] == ["2"]
    assert status.reason is not None
    assert (status.reason.message, status.reason.step) == ("no", "1")
    assert [entry.message for entry in status.reason.log_entries] == ["1", "2"]


def test_a_template_without_a_source_is_built_on_base(live):
    world, options = live

    Template.build(Template().from_base_image().run_cmd("true"), "mine", **options)

    assert world.node.builds[-1].WhichOneof("source") == "from_build"


def test_tags_are_assigned_and_removed(live):
    _, options = live
    Template.build(Template().from_image("debian:12").run_cmd("true"), "mine:v1", **options)

    Template.assign_tags("mine:v1", ["production", "stable"], **options)
    Template.remove_tags("mine", "stable", **options)

    assert {tag.tag for tag in Template.get_tags("mine", **options)} == {"v1", "production"}


def test_a_refused_upload_is_the_clients_error(folder):
    with live_world(max_upload_mb=1) as (world, url):
        options: dict[str, Any] = {"api_url": url, "api_key": world.key}
        (folder / "src" / "large").write_bytes(random_bytes(2 * 1024 * 1024))
        template = Template(file_context_path=folder).from_image("debian:12").copy("src", "/app")

        with pytest.raises(FileUploadException, match="413"):
            Template.build(template, "mine", **options)

        assert files_left(world) == []


def random_bytes(count: int) -> bytes:
    return Path("/dev/urandom").open("rb").read(count)


def test_an_upload_that_breaks_off_leaves_nothing(live):
    world, options = live
    headers = {"X-API-Key": world.key}
    with httpx.Client(base_url=options["api_url"], headers=headers, trust_env=False, timeout=60) as api:
        api.post("/v3/templates", json={"name": "mine"})
        url = urlsplit(api.get(f"/templates/mine/files/{'ab' * 32}").json()["url"])

        with socket.create_connection((url.hostname, url.port)) as connection:
            head = f"PUT {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 100000\r\n\r\n"
            connection.sendall(head.encode() + archive())
            wait_for(lambda: bool(files_left(world)))
        wait_for(lambda: not files_left(world))

        assert api.get(f"/templates/mine/files/{'ab' * 32}").json()["present"] is False
        whole = httpx.put(url.geturl(), content=archive(), trust_env=False, timeout=60)
        assert whole.status_code == 200


def wait_for(true: Any) -> None:
    for _ in range(2400):
        if true():
            return
        time.sleep(0.025)
    raise AssertionError("it did not become true")


def test_a_build_of_an_unknown_kind_says_so(live):
    world, options = live
    world.node.build_events = [pb.BuildEvent(failed=pb.BuildFailed(message="no such image", step="base"))]

    with pytest.raises(BuildException, match="no such image"):
        Template.build(Template().from_image("nothing:here"), "mine", **options)
    with pytest.raises(BuildException, match=r"400: .*not a template name"):
        Template.build(Template().from_image("debian:12"), "Odd name!", **options)
    with pytest.raises(BuildException, match="not an image reference"):
        Template.build(Template().from_image("no image"), "mine", **options)
