"""The archive is read back with a small reader of the format, written from the format's description."""

from __future__ import annotations

import stat

from hypothesis import given, settings
from hypothesis import strategies as st

from emberbox.runtime.firecracker import initramfs
from emberbox.runtime.firecracker.initramfs import Entry


def read_archive(data: bytes) -> list[Entry]:
    entries = []
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        _, mode, uid, gid, _, _, size, _, _, major, minor, name_size, _ = fields
        assert (uid, gid) == (0, 0)
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        start = -(-(at + 110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return entries
        entries.append(Entry(name, mode, data[start : start + size], (major, minor)))
        at = -(-(start + size) // 4) * 4


def test_files_folders_links_and_devices_come_back_as_they_were() -> None:
    entries = [
        initramfs.folder("dev"),
        initramfs.character_device("dev/console", 5, 1),
        initramfs.file("init", b"#!/bin/x", mode=0o755),
        initramfs.symlink("bin", "usr/bin"),
    ]

    assert read_archive(initramfs.cpio(entries)) == entries


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("abc/.-", min_size=1, max_size=40), st.binary(max_size=99)), max_size=6))
def test_any_names_and_contents_keep_the_archive_aligned(files: list[tuple[str, bytes]]) -> None:
    entries = [initramfs.file(name, data) for name, data in files]

    archive = initramfs.cpio(entries)

    assert read_archive(archive) == entries
    assert len(archive) % 512 == 0


def test_every_init_finds_the_folders_and_nodes_it_mounts_on() -> None:
    entries = {entry.name: entry for entry in initramfs.base_entries()}

    assert {"dev", "proc", "sys", "run", "newroot"} <= entries.keys()
    assert stat.S_ISCHR(entries["dev/console"].mode)
    assert entries["dev/console"].device == (5, 1)
