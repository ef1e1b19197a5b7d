"""Files and directories with the synchronous Python client."""

from __future__ import annotations

import io
import os
import time

import pytest
from e2b import (
    FileNotFoundException,
    FileType,
    InvalidArgumentException,
    NotEnoughSpaceException,
    SandboxException,
)

from tests.clients.support.timing import seconds


def test_write_says_what_was_written_and_read_gives_it_back(sandbox, folder):
    info = sandbox.files.write(f"{folder}/hello.txt", "hello wörld\n")

    assert (info.name, info.type, info.path) == ("hello.txt", FileType.FILE, f"{folder}/hello.txt")
    assert info.metadata is None
    assert sandbox.files.read(f"{folder}/hello.txt") == "hello wörld\n"


@pytest.mark.parametrize("octet_stream", [False, True], ids=["multipart", "octet-stream"])
@pytest.mark.parametrize(
    "data",
    ["text ü", b"\x00\x01bytes\xff", io.StringIO("a text file ü"), io.BytesIO(b"a binary file\x00")],
    ids=["str", "bytes", "text-file", "binary-file"],
)
def test_every_kind_of_data_can_be_written(sandbox, folder, data, octet_stream):
    expected = data if isinstance(data, (str, bytes)) else data.getvalue()
    expected = expected.encode() if isinstance(expected, str) else expected
    if not isinstance(data, (str, bytes)):
        data.seek(0)

    sandbox.files.write(f"{folder}/data", data, use_octet_stream=octet_stream)

    assert bytes(sandbox.files.read(f"{folder}/data", format="bytes")) == expected


def test_an_iterable_is_streamed_up(sandbox, folder):
    sandbox.files.write(f"{folder}/streamed", (bytes([n]) * 10_000 for n in range(100)))

    assert bytes(sandbox.files.read(f"{folder}/streamed", format="bytes")) == b"".join(
        bytes([n]) * 10_000 for n in range(100)
    )


def test_a_compressed_upload_is_stored_uncompressed(sandbox, folder):
    sandbox.files.write(f"{folder}/zipped", "compress me " * 10_000, gzip=True)

    assert sandbox.files.get_info(f"{folder}/zipped").size == 12 * 10_000
    assert sandbox.files.read(f"{folder}/zipped") == "compress me " * 10_000


def test_several_files_in_one_request_keep_their_directories(sandbox, folder):
    names = ["one.txt", "deep/er/two.txt", "with space and 'quotes'.txt", "ünï/cödé.txt"]

    infos = sandbox.files.write_files([{"path": f"{folder}/{name}", "data": name} for name in names])

    assert [info.path for info in infos] == [f"{folder}/{name}" for name in names]
    assert [sandbox.files.read(f"{folder}/{name}") for name in names] == names


def test_no_files_are_no_request(sandbox):
    assert sandbox.files.write_files([]) == []


def test_an_empty_file(sandbox, folder):
    sandbox.files.write(f"{folder}/empty", "")

    assert sandbox.files.read(f"{folder}/empty") == ""
    assert sandbox.files.read(f"{folder}/empty", format="bytes") == bytearray()
    assert b"".join(sandbox.files.read(f"{folder}/empty", format="stream")) == b""
    assert sandbox.files.read(f"{folder}/empty", gzip=True) == ""
    assert sandbox.files.get_info(f"{folder}/empty").size == 0


def test_overwriting_replaces_and_shortens(sandbox, folder):
    sandbox.files.write(f"{folder}/file", "a long first content")

    sandbox.files.write(f"{folder}/file", "short")

    assert sandbox.files.read(f"{folder}/file") == "short"


def test_parents_are_made_and_belong_to_the_user(sandbox, folder):
    sandbox.files.write(f"{folder}/made/on/the/way.txt", "x")

    owners = sandbox.commands.run(f"stat -c %U {folder}/made {folder}/made/on/the {folder}/made/on/the/way.txt").stdout

    assert owners.split() == ["user"] * 3


def test_relative_and_tilde_paths_start_at_home(sandbox):
    sandbox.files.write("relative-path.txt", "r")
    sandbox.files.write("~/tilde-path.txt", "t")

    assert sandbox.files.read("/home/user/relative-path.txt") == "r"
    assert sandbox.files.read("/home/user/tilde-path.txt") == "t"
    assert sandbox.files.get_info("~").path == "/home/user"
    sandbox.files.write("for-root.txt", "x", user="root")
    assert sandbox.files.get_info("/root/for-root.txt", user="root").owner == "root"


def test_the_asked_user_owns_what_is_written(sandbox, folder):
    sandbox.files.write(f"{folder}/by-root", "x", user="root")
    sandbox.files.write(f"{folder}/by-user", "x", user="user")

    assert sandbox.files.get_info(f"{folder}/by-root").owner == "root"
    assert sandbox.files.get_info(f"{folder}/by-user").group == "user"


def test_what_is_missing_outside_home_is_made_for_the_default_user(sandbox):
    assert sandbox.files.make_dir("/app") is True
    sandbox.files.write("/app/x.py", "print('x')")
    sandbox.files.write("/srv/deep/er/file", "x")

    owners = sandbox.commands.run("stat -c %U /app /app/x.py /srv/deep /srv/deep/er /srv/deep/er/file /srv").stdout
    assert owners.split() == ["user"] * 5 + ["root"]
    assert sandbox.commands.run("python3 x.py", cwd="/app").stdout == "x\n"


def test_the_user_may_not_write_what_only_root_may(sandbox):
    before = sandbox.files.read("/etc/passwd")

    for path in ("/etc/passwd", "/root/not-mine"):
        with pytest.raises(Exception, match=r"(?i)permission denied"):
            sandbox.files.write(path, "x")

    assert sandbox.files.read("/etc/passwd") == before
    assert not sandbox.files.exists("/root/not-mine", user="root")


def test_the_user_may_not_read_what_only_root_may(sandbox):
    sandbox.commands.run("install -m 600 /dev/null /root/private && echo secret > /root/private", user="root")

    with pytest.raises(Exception, match=r"(?i)permission denied") as refused:
        sandbox.files.read("/root/private")

    assert "secret" not in str(refused.value)
    assert sandbox.files.read("/root/private", user="root") == "secret\n"


def test_a_symlink_of_the_user_does_not_reach_roots_files(sandbox, folder):
    sandbox.commands.run(f"ln -s /etc/shadow {folder}/link")

    with pytest.raises(Exception, match=r"(?i)permission denied"):
        sandbox.files.read(f"{folder}/link")
    with pytest.raises(Exception, match=r"(?i)permission denied"):
        sandbox.files.write(f"{folder}/link", "x")


def test_missing_files_are_not_found(sandbox, folder):
    with pytest.raises(FileNotFoundException):
        sandbox.files.read(f"{folder}/missing")
    with pytest.raises(FileNotFoundException):
        sandbox.files.read(f"{folder}/missing", format="stream")
    with pytest.raises(FileNotFoundException):
        sandbox.files.get_info(f"{folder}/missing")
    with pytest.raises(FileNotFoundException):
        sandbox.files.list(f"{folder}/missing")
    with pytest.raises(FileNotFoundException):
        sandbox.files.rename(f"{folder}/missing", f"{folder}/other")
    with pytest.raises(FileNotFoundException):
        sandbox.files.watch_dir(f"{folder}/missing")
    assert sandbox.files.exists(f"{folder}/missing") is False
    assert sandbox.files.exists(folder) is True


def test_the_wrong_kind_of_entry_is_an_invalid_argument(sandbox, folder):
    sandbox.files.write(f"{folder}/file", "x")

    with pytest.raises(InvalidArgumentException):
        sandbox.files.read(folder)
    with pytest.raises(InvalidArgumentException):
        sandbox.files.write(folder, "x")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.list(f"{folder}/file")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.watch_dir(f"{folder}/file")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.make_dir(f"{folder}/file")


def test_directories_are_made_once(sandbox, folder):
    assert sandbox.files.make_dir(f"{folder}/a/b/c") is True
    assert sandbox.files.make_dir(f"{folder}/a/b/c") is False
    assert sandbox.files.get_info(f"{folder}/a/b").type == FileType.DIR


def test_listing_goes_as_deep_as_asked(sandbox, folder):
    sandbox.files.write(f"{folder}/top.txt", "x")
    sandbox.files.write(f"{folder}/a/b/deep.txt", "x")

    def paths(depth):
        return sorted(entry.path.removeprefix(f"{folder}/") for entry in sandbox.files.list(folder, depth=depth))

    assert paths(1) == ["a", "top.txt"]
    assert paths(2) == ["a", "a/b", "top.txt"]
    assert paths(3) == ["a", "a/b", "a/b/deep.txt", "top.txt"]
    assert sandbox.files.list(f"{folder}/a/b/../../a")[0].name == "b"


def test_an_empty_directory_lists_nothing(sandbox, folder):
    assert sandbox.files.list(folder) == []


def test_a_thousand_entries_are_listed(sandbox, folder):
    sandbox.commands.run(f"cd {folder} && seq 1 1000 | xargs touch")

    assert {entry.name for entry in sandbox.files.list(folder)} == {str(n) for n in range(1, 1001)}


def test_info_tells_size_owner_mode_and_time(sandbox, folder):
    sandbox.files.write(f"{folder}/file", "12345")
    sandbox.commands.run(f"chmod 640 {folder}/file")

    info = sandbox.files.get_info(f"{folder}/file")

    assert (info.name, info.type, info.size, info.owner, info.group) == ("file", FileType.FILE, 5, "user", "user")
    assert info.mode & 0o777 == 0o640
    assert info.permissions.endswith("rw-r-----")
    assert abs(info.modified_time.timestamp() - time.time()) < 60
    assert info.symlink_target is None


def test_symlinks_are_shown_as_links(sandbox, folder):
    sandbox.files.write(f"{folder}/target", "x")
    sandbox.commands.run(f"cd {folder} && ln -s target link && ln -s nowhere broken && mkdir d && ln -s d dirlink")

    entries = {entry.name: entry for entry in sandbox.files.list(folder)}

    assert entries["link"].type == FileType.SYMLINK
    assert entries["link"].symlink_target in (f"{folder}/target", "target")
    assert entries["target"].type == FileType.FILE
    assert entries["target"].symlink_target is None
    assert {"broken", "dirlink", "d"} <= entries.keys()


def test_rename_moves_files_and_directories(sandbox, folder):
    sandbox.files.write(f"{folder}/d/file", "x")

    moved = sandbox.files.rename(f"{folder}/d", f"{folder}/e")
    file = sandbox.files.rename(f"{folder}/e/file", f"{folder}/new/place")

    assert (moved.name, moved.type, moved.path) == ("e", FileType.DIR, f"{folder}/e")
    assert file.path == f"{folder}/new/place"
    assert not sandbox.files.exists(f"{folder}/d")
    assert sandbox.files.read(f"{folder}/new/place") == "x"


def test_remove_takes_files_trees_and_nothing(sandbox, folder):
    sandbox.files.write(f"{folder}/tree/a/b", "x")
    sandbox.files.write(f"{folder}/file", "x")

    sandbox.files.remove(f"{folder}/tree")
    sandbox.files.remove(f"{folder}/file")
    sandbox.files.remove(f"{folder}/file")

    assert sandbox.files.list(folder) == []


def test_removing_a_link_keeps_its_target(sandbox, folder):
    sandbox.files.write(f"{folder}/kept/file", "x")
    sandbox.commands.run(f"ln -s {folder}/kept {folder}/link")

    sandbox.files.remove(f"{folder}/link")

    assert sandbox.files.read(f"{folder}/kept/file") == "x"
    assert not sandbox.files.exists(f"{folder}/link")


def test_metadata_is_kept_with_the_file(sandbox, folder):
    written = sandbox.files.write(f"{folder}/file", "x", metadata={"author": "Ada", "purpose": "a test"})

    info = sandbox.files.get_info(f"{folder}/file")
    listed = sandbox.files.list(folder)[0]
    moved = sandbox.files.rename(f"{folder}/file", f"{folder}/file2")

    assert written.metadata == info.metadata == listed.metadata == moved.metadata
    assert info.metadata == {"author": "Ada", "purpose": "a test"}


def test_each_upload_replaces_the_metadata(sandbox, folder):
    sandbox.files.write(f"{folder}/file", "x", metadata={"a": "1", "b": "2"})

    sandbox.files.write(f"{folder}/file", "y", metadata={"b": "3"})
    second = sandbox.files.get_info(f"{folder}/file").metadata
    sandbox.files.write(f"{folder}/file", "z")
    third = sandbox.files.get_info(f"{folder}/file").metadata

    assert second == {"b": "3"}
    assert third is None


def test_watching_reports_what_happens(sandbox, folder):
    watcher = sandbox.files.watch_dir(folder)

    sandbox.files.write(f"{folder}/new", "x")
    sandbox.commands.run(f"chmod 600 {folder}/new && mv {folder}/new {folder}/moved && rm {folder}/moved")
    events = _events_until(watcher, lambda seen: ("moved", "remove") in seen)
    watcher.stop()

    assert {("new", "create"), ("new", "write"), ("new", "chmod"), ("new", "rename"), ("moved", "remove")} <= events


def test_watching_recursively_sees_new_directories_too(sandbox, folder):
    sandbox.files.make_dir(f"{folder}/old")
    watcher = sandbox.files.watch_dir(folder, recursive=True)

    sandbox.files.write(f"{folder}/old/a", "x")
    sandbox.files.make_dir(f"{folder}/fresh")
    _events_until(watcher, lambda seen: ("fresh", "create") in seen and ("old/a", "write") in seen)
    sandbox.files.write(f"{folder}/fresh/b", "x")
    events = _events_until(watcher, lambda seen: ("fresh/b", "write") in seen)
    watcher.stop()

    assert ("fresh/b", "write") in events


def test_watching_gives_the_entry_when_asked(sandbox, folder):
    watcher = sandbox.files.watch_dir(folder, include_entry=True)

    sandbox.files.write(f"{folder}/file", "12345")
    entries = _entries_until(watcher, lambda entry: entry.size == 5)
    watcher.stop()

    assert entries[-1].path == f"{folder}/file"


def test_a_stopped_watcher_is_gone(sandbox, folder):
    watcher = sandbox.files.watch_dir(folder)

    watcher.stop()

    with pytest.raises(SandboxException):
        watcher.get_new_events()


def test_a_full_disk_is_not_enough_space(make_sandbox, api, emberbox):
    sandbox = make_sandbox()
    free = int(sandbox.commands.run("df --output=avail -B1 /home/user | tail -1").stdout)
    # All but 8 MiB are allocated without being written.
    sandbox.commands.run(f"fallocate -l {free - 8 * 1024 * 1024} /home/user/ballast || true", timeout=seconds(60))

    with pytest.raises(NotEnoughSpaceException):
        sandbox.files.write("/home/user/too-much", os.urandom(1024) * 32 * 1024)

    sandbox.commands.run("rm -f /home/user/ballast /home/user/too-much")
    sandbox.files.write("/home/user/fits", "x")
    assert sandbox.files.read("/home/user/fits") == "x"


def test_odd_names_survive(sandbox, folder):
    names = [
        "space name",
        "ünïcode-日本",
        "#hash",
        "per%cent",
        "plus+plus",
        "semi;colon",
        "a&b=c",
        "quo'te",
        'dou"ble',
        "tab\tname",
    ]

    for name in names:
        sandbox.files.write(f"{folder}/{name}", name)

    assert {entry.name for entry in sandbox.files.list(folder)} == set(names)
    for name in names:
        assert sandbox.files.read(f"{folder}/{name}") == name


def _events_until(watcher, enough, within=90):
    seen: set[tuple[str, str]] = set()
    deadline = time.monotonic() + seconds(within)
    while not enough(seen):
        assert time.monotonic() < deadline, f"events so far: {seen}"
        seen |= {(event.name, event.type.value) for event in watcher.get_new_events()}
        time.sleep(0.05)
    return seen


def _entries_until(watcher, enough, within=90):
    entries = []
    deadline = time.monotonic() + seconds(within)
    while not any(enough(entry) for entry in entries):
        assert time.monotonic() < deadline, f"entries so far: {entries}"
        entries += [event.entry for event in watcher.get_new_events() if event.entry]
        time.sleep(0.05)
    return [entry for entry in entries if enough(entry)]
