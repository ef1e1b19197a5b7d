"""Names of images, the settings of registries, and credentials."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from emberbox.images.credentials import Credentials, auth_file
from emberbox.images.ecr import sign
from emberbox.images.errors import ImageError
from emberbox.images.layers import LayerStore
from emberbox.images.oci import Images
from emberbox.images.references import parse
from emberbox.images.registry import folder_bytes, registries_conf
from emberbox.settings import Settings

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("oven/bun:1", "docker.io/oven/bun:1"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
        ("ghcr.io/me/app/sub:v1.2", "ghcr.io/me/app/sub:v1.2"),
        ("localhost/x", "localhost/x:latest"),
        ("127.0.0.1:5000/x:y", "127.0.0.1:5000/x:y"),
        (f"127.0.0.1:5000/x:y@{DIGEST}", f"127.0.0.1:5000/x@{DIGEST}"),
        ("123.dkr.ecr.us-west-2.amazonaws.com/a_b.c-d:1", "123.dkr.ecr.us-west-2.amazonaws.com/a_b.c-d:1"),
        ("docker://debian:12", "docker.io/library/debian:12"),
    ],
)
def test_a_name_is_completed_as_docker_does(text: str, whole: str) -> None:
    assert str(parse(text)) == whole


@pytest.mark.parametrize(
    "text",
    ["", " ", "Debian", "a b", "-x", "x:", "x@sha256:12", "x:y:z/", "/x", "x//y", "--authfile=/x", "ghcr.io/", "x;y"],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="not the name of an image"):
        parse(text)


def test_registries_have_their_mirror_and_only_named_ones_are_insecure() -> None:
    settings = tomllib.loads(registries_conf("docker.io", {"docker.io": "mirror:5000/hub"}, ("mirror:5000",)))

    (entry,) = settings["registry"]
    assert (entry["location"], entry["insecure"]) == ("docker.io", False)
    assert entry["mirror"] == [{"location": "mirror:5000/hub", "insecure": True}]


async def test_only_allowed_registries_are_asked(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, allowed_registries=("docker.io", "ghcr.io"))
    images = Images(settings, LayerStore(tmp_path / "layers"), tmp_path / "index", tmp_path / "work")

    with pytest.raises(ImageError, match=r"do not come from '127.0.0.1:5000' here, only from docker.io, ghcr.io"):
        await images.pull("127.0.0.1:5000/x", None, print, print, print)

    assert list(tmp_path.iterdir()) == []


def test_an_auth_file_is_its_owners_alone_and_goes(tmp_path: Path) -> None:
    with auth_file(tmp_path, "ghcr.io", "me", "secret") as path:
        mode = path.stat().st_mode & 0o777
        found = json.loads(path.read_text())

    assert mode == 0o600
    assert base64.b64decode(found["auths"]["ghcr.io"]["auth"]) == b"me:secret"
    assert list(tmp_path.iterdir()) == []


def test_credentials_do_not_print_their_secrets() -> None:
    credentials = Credentials(
        "aws", "me", "geheim1", aws_access_key_id="geheim2", aws_secret_access_key="geheim3", aws_region="x",
        gcp_service_account_json="geheim4",
    )  # fmt: skip

    assert "geheim" not in repr(credentials)


def test_a_call_to_aws_is_signed_as_they_document_it() -> None:
    # The worked example of their General Reference, with its signature.
    headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8", "host": "iam.amazonaws.com"}

    signed = sign(
        "GET",
        "/",
        headers,
        b"",
        key_id="AKIDEXAMPLE",
        secret="wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
        region="us-east-1",
        service="iam",
        now=datetime(2015, 8, 30, 12, 36, 0, tzinfo=UTC),
        query="Action=ListUsers&Version=2010-05-08",
    )

    assert signed["x-amz-date"] == "20150830T123600Z"
    assert signed["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request, "
        "SignedHeaders=content-type;host;x-amz-date, "
        "Signature=5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"
    )


def test_a_file_that_is_renamed_while_a_folder_is_counted_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "draft").write_bytes(b"x" * 1000)
    (tmp_path / "other").write_bytes(b"y" * 10)
    (tmp_path / "blobs").mkdir()
    before = folder_bytes(tmp_path)

    def found(folder: Path, _: str) -> Iterator[Path]:
        yield folder / "blobs"
        yield folder / "draft"
        (folder / "draft").rename(folder / "blobs" / "layer")
        yield folder / "blobs" / "layer"
        yield folder / "other"

    monkeypatch.setattr(Path, "rglob", found)

    assert folder_bytes(tmp_path) == before
