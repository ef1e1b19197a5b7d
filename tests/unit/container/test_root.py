"""The files that a machine's root may write, and the host reads at its next start."""

from __future__ import annotations

import os
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from emberbox.runtime.container import root
from emberbox.runtime.container.root import Root

DEFAULT = "127.0.0.1\tlocalhost\n127.0.1.1\tbox\n"
NAMES = ("hosts", "hostname", "resolv.conf")


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(root, "DISK_ID", os.getuid())
    folder = tmp_path / "upper/etc"
    folder.mkdir(parents=True)
    return folder


def write(etc: Path) -> None:
    Root(etc.parents[1]).write_etc("box", [IPv4Address("10.0.0.1")])


def test_a_machine_knows_its_name_and_its_resolver(etc: Path) -> None:
    write(etc)

    assert [(etc / name).read_text() for name in NAMES] == [DEFAULT, "box\n", "nameserver 10.0.0.1\n"]
    assert {(etc / name).stat().st_mode & 0o777 for name in NAMES} == {0o644}


def test_what_a_machine_wrote_into_its_hosts_is_kept(etc: Path) -> None:
    (etc / "hosts").write_text("10.1.1.1\tother\n")

    write(etc)
    write(etc)

    assert (etc / "hosts").read_text() == "10.1.1.1\tother\n127.0.1.1\tbox\n"


@pytest.mark.parametrize("size", [64 * 1024 + 1, 1 << 40])
def test_hosts_of_any_size_are_not_read(etc: Path, size: int) -> None:
    for name in NAMES:
        (etc / name).touch()
        os.truncate(etc / name, size)

    write(etc)

    assert [(etc / name).read_text() for name in NAMES] == [DEFAULT, "box\n", "nameserver 10.0.0.1\n"]


def test_a_link_leads_nowhere(etc: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret of the host\n")
    for name in NAMES:
        (etc / name).symlink_to(outside)

    write(etc)

    assert outside.read_text() == "secret of the host\n"
    assert [(etc / name).is_symlink() for name in NAMES] == [False] * 3
    assert (etc / "hosts").read_text() == DEFAULT


@pytest.mark.timeout(20)
def test_a_pipe_holds_nobody_up(etc: Path) -> None:
    for name in NAMES:
        os.mkfifo(etc / name)

    write(etc)

    assert [(etc / name).read_text() for name in NAMES] == [DEFAULT, "box\n", "nameserver 10.0.0.1\n"]
