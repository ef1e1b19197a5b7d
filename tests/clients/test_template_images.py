"""Templates built from images of a registry on loopback."""

from __future__ import annotations

import traceback
import uuid

import pytest
from e2b import Sandbox, SandboxException, Template
from e2b.exceptions import BuildException

from tests.clients.support.raw import Api
from tests.clients.support.timing import seconds, whole_seconds
from tests.support.registry import File, folder, layer, tiny_files

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("builds")]

CONFIG = {"Env": ["PATH=/usr/bin:/bin", "FROM_IMAGE=yes"], "WorkingDir": "/srv", "User": "root"}


@pytest.fixture(scope="module")
def image(registries):
    """A small image with a file of its own; (registry's name, without its tag)."""
    if not registries:
        pytest.skip("needs a registry")
    own = [folder("srv"), File("srv/hello.txt", b"hello from the image\n")]
    return registries[0].push("tests/tiny", [layer(tiny_files()), layer(own)], config=CONFIG)


@pytest.fixture
def name(builder):
    chosen = f"i-{uuid.uuid4().hex[:12]}"
    yield chosen
    with Api(builder) as api:
        api.delete(f"/templates/{chosen}")


def run(name, command):
    sandbox = Sandbox.create(name, timeout=whole_seconds(600))
    try:
        return sandbox.commands.run(command).stdout
    finally:
        sandbox.kill()


def test_a_template_starts_from_an_image_of_a_registry(local_registries, image, name):
    template = Template().from_image(image).run_cmd("cat /srv/hello.txt > ~/copy; echo $FROM_IMAGE >> ~/copy")

    Template.build(template, name)

    assert run(name, "cat ~/copy; id -un; echo $HOME") == "hello from the image\nyes\nuser\n/home/user\n"


def test_an_image_that_has_changed_is_built_anew_and_the_same_is_not(local_registries, name):
    open_registry, _ = local_registries
    template = Template().from_image(open_registry.name("tests/changes"))

    def build(content):
        files = [layer(tiny_files()), layer([File("version", content)])]
        open_registry.push("tests/changes", files)
        Template.build(template, name)
        return run(name, "cat /version")

    assert [build(b"1\n"), build(b"1\n"), build(b"2\n")] == ["1\n", "1\n", "2\n"]


def test_credentials_open_a_private_registry_and_wrong_ones_do_not(local_registries, name):
    _, private = local_registries
    image = private.push("tests/private", [layer(tiny_files()), layer([File("secret", b"inside\n")])])

    with pytest.raises(BuildException) as without:
        Template.build(Template().from_image(image), name)
    with pytest.raises(BuildException) as wrong:
        Template.build(Template().from_image(image, username="me", password="wr0ng-word"), name)  # the image
    Template.build(Template().from_image(image, username="me", password="s3cret"), name)

    assert run(name, "cat /secret") == "inside\n"
    for refused in (without, wrong):
        assert any(word in str(refused.value).lower() for word in ("credential", "unauthorized", "authentication"))
    assert "wr0ng-word" not in str(wrong.value)
    shown = [frame.line or "" for frame in traceback.extract_tb(wrong.value.__traceback__)]
    assert any("the image" in text for text in shown), shown


def test_credentials_are_nowhere_in_the_data_directory(local_registries, builder_host, name):
    _, private = local_registries
    image = private.push("tests/kept", [layer(tiny_files())])
    word = f"word-{uuid.uuid4().hex}"

    with pytest.raises(BuildException):
        Template.build(Template().from_image(image, username="me", password=word), name)

    def files_with(text):
        found = f"find {builder_host.data_dir} -type f -size -100M -exec grep -lF {text} {{}} +"
        return builder_host.run(f"{found} || true", timeout=300).split()

    assert files_with(name)
    assert files_with(word) == []


@pytest.mark.parametrize("missing", ["tests/nothing:here", "tests/tiny:no-such-tag"])
def test_an_image_that_is_not_there_is_named(local_registries, image, name, missing):
    open_registry, _ = local_registries

    with pytest.raises(BuildException) as raised:
        Template.build(Template().from_image(f"{open_registry.host}/{missing}"), name)

    assert missing.split(":")[0] in str(raised.value)
    with pytest.raises(SandboxException, match="no ready build"):
        Sandbox.create(name)


def test_a_registry_that_does_not_answer_is_named(builder_host, name):
    with pytest.raises(BuildException, match=r"127\.0\.0\.1:1"):
        Template.build(Template().from_image("127.0.0.1:1/some/image"), name)
