"""Reading recipes, and what an image inherits from its host."""

from __future__ import annotations

from pathlib import Path

import pytest

from emberbox.images.errors import RecipeError
from emberbox.images.host_network import IMAGE_BUNDLE, install_certificates, read_host_network
from emberbox.images.recipes import load_recipe, recipes_folder

GOOD = """
description = "small"
[debian]
suite = "bookworm"
components = ["main"]
mirror = "http://mirror.example/debian"
keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
source_date_epoch = 1686355200
packages = ["bash"]
"""


def _recipe(folder: Path, text: str) -> Path:
    (folder / "small").mkdir()
    (folder / "small/recipe.toml").write_text(text)
    (folder / "small/customize.sh").write_text("#!/bin/sh\n")
    return folder


def test_every_recipe_we_ship_can_be_read() -> None:
    for folder in recipes_folder().iterdir():
        if (folder / "recipe.toml").exists():
            assert load_recipe(folder.name).description


def test_a_recipes_hash_changes_with_any_of_its_files(tmp_path: Path) -> None:
    folder = _recipe(tmp_path, GOOD)
    before = load_recipe("small", folder).content_hash

    (folder / "small/customize.sh").write_text("#!/bin/sh\ntrue\n")

    assert load_recipe("small", folder).content_hash != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not toml =", "not valid TOML"),
        (GOOD.replace('"bash"', '"bash; rm -rf /"'), r"debian\.packages\.0"),
        (GOOD + "surprise = 1\n", "surprise"),
        ('description = "x"', "debian"),
    ],
)
def test_a_wrong_recipe_is_refused_and_says_where(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("small", _recipe(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'nothing'"):
        load_recipe("nothing", tmp_path)


def test_addresses_with_a_password_are_not_inherited() -> None:
    environment = {
        "HTTPS_PROXY": "http://user:secret@proxy.example:3128",
        "HTTP_PROXY": "http://proxy.example:3128",
        "SSL_CERT_FILE": "/nowhere",
    }

    host = read_host_network(environment)

    assert "HTTPS_PROXY" not in host.env
    assert host.env["HTTP_PROXY"] == "http://proxy.example:3128"
    assert "secret" not in repr(host)
    assert host.env["SSL_CERT_FILE"] == IMAGE_BUNDLE


def test_only_certificates_that_the_image_lacks_are_added(tmp_path: Path) -> None:
    pem = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"
    known, new = pem.format("QUFBQQ=="), pem.format("QkJCQg==")
    bundle = tmp_path / IMAGE_BUNDLE.lstrip("/")
    bundle.parent.mkdir(parents=True)
    bundle.write_text(known)

    added = install_certificates(tmp_path, (known, new))

    files = list((tmp_path / "usr/local/share/ca-certificates/host").iterdir())
    assert added == 1
    assert [path.read_text() for path in files] == [new]
