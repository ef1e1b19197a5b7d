"""What is installed is pinned and hashed, names no place to fetch it from, and has one version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import emberbox

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("requirements*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(file: str) -> dict[str, str]:
    lines = re.findall(r"^([a-z0-9.-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
    return dict(lines)


def test_there_is_a_file_for_each_purpose() -> None:
    assert {path.name for path in FILES} >= {
        "requirements.txt",
        "requirements-build.txt",
        "requirements-dev.txt",
        "requirements-go.txt",
        "requirements-node.txt",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_requirement_has_hashes_and_no_address(path: Path) -> None:
    text = path.read_text()

    requirements = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert requirements
    assert all("--hash=sha256:" in one for one in requirements)
    assert "://" not in text
    assert "index-url" not in text


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"]),
        ("requirements-dev.txt", PROJECT["dependency-groups"]["dev"]),
        ("requirements-build.txt", PROJECT["dependency-groups"]["build"]),
        ("requirements-go.txt", PROJECT["dependency-groups"]["go"]),
        ("requirements-node.txt", PROJECT["dependency-groups"]["node"]),
    ],
)
def test_the_pins_satisfy_the_project(file: str, wanted: list[str]) -> None:
    pins = pinned(file)

    for line in wanted:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in {file}: run `make lock`"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} in {file}: run `make lock`"


def test_what_runs_and_what_tests_use_the_same_versions() -> None:
    runtime, dev = pinned("requirements.txt"), pinned("requirements-dev.txt")

    assert {name: dev.get(name) for name in runtime} == runtime


def test_the_version_has_one_source() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", emberbox.__version__)
