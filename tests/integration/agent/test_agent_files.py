"""Files over REST and RPC, by the official Python client and by hand."""

from __future__ import annotations

import gzip
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest
from e2b import FileNotFoundException, FileType, Sandbox
from e2b.exceptions import AuthenticationException, InvalidArgumentException, NotEnoughSpaceException, SandboxException
from e2b.sandbox.filesystem.watch_handle import FilesystemEventType
from e2b.sandbox.signature import get_signature

from tests.support.agent import AgentMachine

ALL_BYTES = bytes(range(256)) * 400


@pytest.fixture
def folder(sandbox: Sandbox) -> str:
    name = f"test-{time.monotonic_ns()}"
    sandbox.files.make_dir(name)
    return name


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("octet_stream", [False, True])
def test_what_is_written_is_read_back(sandbox: Sandbox, folder: str, gzipped: bool, octet_stream: bool) -> None:
    if gzipped and not octet_stream:
        octet_stream = True
    info = sandbox.files.write(f"{folder}/new/sub/b", ALL_BYTES, gzip=gzipped, use_octet_stream=octet_stream)

    assert info.path == f"/home/user/{folder}/new/sub/b"
    assert bytes(sandbox.files.read(f"{folder}/new/sub/b", format="bytes", gzip=gzipped)) == ALL_BYTES
    assert b"".join(sandbox.files.read(f"{folder}/new/sub/b", format="stream", gzip=gzipped)) == ALL_BYTES
    entry = sandbox.files.get_info(f"{folder}/new/sub")
    assert (entry.owner, entry.group, entry.permissions) == ("user", "user", "drwxr-xr-x")


def test_a_streamed_upload_is_whole(sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/s", io.BytesIO(ALL_BYTES * 30))

    assert bytes(sandbox.files.read(f"{folder}/s", format="bytes")) == ALL_BYTES * 30


def test_several_files_go_in_one_upload(sandbox: Sandbox, folder: str) -> None:
    infos = sandbox.files.write_files([{"path": f"{folder}/d{i}/ü {i}.txt", "data": f"data {i}"} for i in range(3)])

    assert [i.path for i in infos] == [f"/home/user/{folder}/d{i}/ü {i}.txt" for i in range(3)]
    assert sandbox.files.read(f"{folder}/d2/ü 2.txt") == "data 2"


def test_a_shorter_write_leaves_nothing_of_the_longer(sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/f", "a long text")
    sandbox.commands.run(f"chmod 600 {folder}/f && ln {folder}/f {folder}/hard")

    sandbox.files.write(f"{folder}/f", "short")

    assert sandbox.files.read(f"{folder}/hard") == "short"
    assert sandbox.files.get_info(f"{folder}/f").mode == 0o600


def test_metadata_is_stored_shown_and_replaced(sandbox: Sandbox, folder: str) -> None:
    written = sandbox.files.write(f"{folder}/m", "x", metadata={"Author": "me", "k": "v w"})
    assert written.metadata == {"author": "me", "k": "v w"}
    assert sandbox.files.get_info(f"{folder}/m").metadata == {"author": "me", "k": "v w"}

    sandbox.files.write(f"{folder}/m", "x", metadata={"k": "2"})
    assert sandbox.files.list(folder)[0].metadata == {"k": "2"}
    assert sandbox.files.rename(f"{folder}/m", f"{folder}/n").metadata == {"k": "2"}

    sandbox.files.write(f"{folder}/n", "x")
    assert sandbox.files.get_info(f"{folder}/n").metadata is None


def test_metadata_that_does_not_fit_is_refused(machine: AgentMachine, sandbox: Sandbox, folder: str) -> None:
    for headers in ({"X-Metadata-k": "v" * 4096}, {"X-Metadata-" + "k" * 247: "v"}, {"X-Metadata-k": "\xe9"}):
        status, answer = machine.call(
            "POST", f"/files?path={folder}/big", b"x", {"Content-Type": "application/octet-stream", **headers}
        )
        assert (status, json.loads(answer)["code"]) == (400, 400)
    assert not sandbox.files.exists(f"{folder}/big")


def test_a_range_is_served(machine: AgentMachine, sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/r", ALL_BYTES)

    status, part = machine.call("GET", f"/files?path={folder}/r", None, {"Range": "bytes=250-299"})

    assert (status, part) == (206, ALL_BYTES[250:300])
    assert machine.call("GET", f"/files?path={folder}/r", None, {"Range": "bytes=999999999-"})[0] == 416


def test_gzip_is_sent_to_who_asks_for_it_alone(machine: AgentMachine, sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/z", "z" * 1000)
    path = f"/files?path={folder}/z"

    assert gzip.decompress(machine.call("GET", path, None, {"Accept-Encoding": "gzip"})[1]) == b"z" * 1000
    assert machine.call("GET", path, None, {"Accept-Encoding": "gzip, deflate, br"})[1] == b"z" * 1000
    assert machine.call("GET", path, None, {"Accept-Encoding": "identity;q=0, br"})[0] == 406


def test_errors_have_their_status_and_class(machine: AgentMachine, sandbox: Sandbox, folder: str) -> None:
    with pytest.raises(FileNotFoundException, match="does not exist"):
        sandbox.files.read(f"{folder}/none")
    with pytest.raises(InvalidArgumentException, match="is a directory"):
        sandbox.files.read(folder)
    with pytest.raises(InvalidArgumentException, match="is a directory"):
        sandbox.files.write(folder, "x")
    with pytest.raises(AuthenticationException, match="unknown user nobody-here"):
        sandbox.files.read("x", user="nobody-here")
    with pytest.raises(FileNotFoundException):
        sandbox.files.list(f"{folder}/none")
    with pytest.raises(FileNotFoundException):
        sandbox.files.rename(f"{folder}/none", f"{folder}/other")
    with pytest.raises(FileNotFoundException):
        sandbox.files.watch_dir(f"{folder}/none")
    sandbox.files.write(f"{folder}/f", "x")
    with pytest.raises(InvalidArgumentException, match="not a directory"):
        sandbox.files.list(f"{folder}/f")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.make_dir(f"{folder}/f")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.watch_dir(f"{folder}/f")
    with pytest.raises(InvalidArgumentException, match="NUL"):
        sandbox.files.get_info("a\0b")
    assert machine.call("GET", "/files?path=a%00b")[0] == 400
    assert machine.call("POST", "/files?path=x", b"x", {"Content-Type": "text/plain"})[0] == 400
    bad_gzip = {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}
    assert machine.call("POST", f"/files?path={folder}/g", b"not gzip", bad_gzip)[0] == 400
    cut_gzip = gzip.compress(ALL_BYTES)[:-10]
    assert machine.call("POST", f"/files?path={folder}/g", cut_gzip, bad_gzip)[0] == 400


def test_a_full_disk_is_507_and_keeps_the_old_content(machine: AgentMachine, sandbox: Sandbox) -> None:
    sandbox.commands.run("mkdir -p /mnt/small && mount -t tmpfs -o size=1m,mode=777 tmpfs /mnt/small", user="root")
    sandbox.files.write("/mnt/small/f", "old")

    with pytest.raises(NotEnoughSpaceException):
        sandbox.files.write("/mnt/small/f", b"x" * 40_000_000, use_octet_stream=True)
    with pytest.raises(NotEnoughSpaceException):
        sandbox.files.write("/mnt/small/g", b"x" * 40_000_000)

    assert sandbox.files.read("/mnt/small/f") == "old"
    sandbox.commands.run("umount /mnt/small", user="root")


def test_a_listing_goes_as_deep_as_asked(sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/a/b/c/d", "x")
    root = f"/home/user/{folder}"
    sandbox.commands.run(f"ln -s {root}/a {root}/link; ln -s /nowhere {root}/dangling; mkfifo {root}/pipe")

    depths = {d: [e.path.removeprefix(root + "/") for e in sandbox.files.list(folder, depth=d)] for d in (1, 2, 9)}
    entries = {e.name: e for e in sandbox.files.list(folder)}

    assert depths[1] == ["a", "dangling", "link", "pipe"]
    assert depths[2] == ["a", "a/b", "dangling", "link", "pipe"]
    assert depths[9] == ["a", "a/b", "a/b/c", "a/b/c/d", "dangling", "link", "pipe"]
    assert (entries["link"].type, entries["link"].symlink_target) == (FileType.SYMLINK, f"{root}/a")
    assert (entries["dangling"].type, entries["dangling"].symlink_target) == (FileType.SYMLINK, "/nowhere")
    assert [e.name for e in sandbox.files.list(f"{folder}/link")] == ["b"]


def test_a_name_in_another_encoding_does_not_hide_its_folder(sandbox: Sandbox, folder: str) -> None:
    sandbox.commands.run(f"cd {folder} && touch good $'bad\\xff'")

    assert [e.name for e in sandbox.files.list(folder)] == ["bad�", "good"]


def test_remove_is_recursive_and_idempotent(sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/a/b", "x")

    sandbox.files.remove(folder)
    sandbox.files.remove(folder)

    assert not sandbox.files.exists(folder)


def test_move_crosses_file_systems(sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/t/x", "x", metadata={"k": "v"})
    sandbox.commands.run(f"chmod 640 {folder}/t/x; ln -s x {folder}/t/l")

    sandbox.files.rename(f"{folder}/t", f"/tmp/{folder}/deep/t")

    assert sandbox.files.read(f"/tmp/{folder}/deep/t/l") == "x"
    assert sandbox.files.get_info(f"/tmp/{folder}/deep/t/x").mode == 0o640
    assert not sandbox.files.exists(f"{folder}/t")


def test_a_folder_of_the_image_can_be_moved(sandbox: Sandbox) -> None:
    before = sandbox.commands.run("ls /usr/share/doc | head -1", user="root").stdout.strip()

    moved = sandbox.files.rename(f"/usr/share/doc/{before}", f"/usr/share/{before}-moved", user="root")

    assert moved.type == FileType.DIR
    assert not sandbox.files.exists(f"/usr/share/doc/{before}")


def test_home_is_expanded(sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"~/{folder}/h", "home")

    assert sandbox.files.read(f"/home/user/{folder}/h") == "home"
    assert sandbox.files.get_info("").path == "/home/user"
    assert sandbox.files.get_info("~", user="root").path == "/root"


def test_a_signature_opens_one_file_for_one_operation(
    fresh_machine: AgentMachine, connect: Callable[..., Sandbox]
) -> None:
    machine, token = fresh_machine, "secret-token"
    machine.control("POST", "/init", json.dumps({"accessToken": token}).encode())
    sandbox = connect(machine, token)
    sandbox.files.write("/home/user/signed.txt", "content")

    def get(path: str, operation: str, expires: int | None = None, **extra: str) -> int:
        s = get_signature("/home/user/signed.txt", operation, None, token, expires)  # type: ignore[arg-type]
        query = {"path": path, "signature": s["signature"], **extra}
        if s["expiration"] is not None:
            query["signature_expiration"] = str(s["expiration"])
        return machine.call("GET", "/files?" + urlencode(query))[0]

    assert get("/home/user/signed.txt", "read") == 200
    assert get("/home/user/signed.txt", "read", 60) == 200
    assert get("/home/user/signed.txt", "read", -60) == 401
    assert get("/home/user/signed.txt", "write") == 401
    assert get("/home/user/other.txt", "read") == 401
    assert get("/home/user/signed.txt", "read", username="root") == 401
    assert machine.call("GET", "/files?path=/home/user/signed.txt")[0] == 401
    with pytest.raises(AuthenticationException):
        connect(machine, "wrong").files.read("/home/user/signed.txt")
    with pytest.raises(AuthenticationException):
        connect(machine, "wrong").files.write("/home/user/big", b"x" * 20_000_000)
    with pytest.raises(AuthenticationException):
        connect(machine, "wrong").commands.run("true")
    assert sandbox.commands.run("echo in").stdout == "in\n"


def test_a_signature_for_no_path_makes_nothing_in_roots_folders(
    fresh_machine: AgentMachine, connect: Callable[..., Sandbox]
) -> None:
    machine, token = fresh_machine, "secret-token"
    machine.control("POST", "/init", json.dumps({"accessToken": token}).encode())
    query = urlencode({"signature": get_signature("", "write", None, token)["signature"]})

    def upload(path: str) -> int:
        body = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{path}"\r\n\r\nx\r\n--b--\r\n'
        return machine.call(
            "POST", f"/files?{query}", body.encode(), {"Content-Type": "multipart/form-data; boundary=b"}
        )[0]

    assert upload("/home/user/mine") == 200
    assert upload("/app/file") == 500
    assert not connect(machine, token).files.exists("/app")


@pytest.mark.parametrize("octet_stream", [False, True], ids=["multipart", "octet-stream"])
@pytest.mark.parametrize("path", ["/app{}/x.py", "/srv/deep{}/er/file", "/srv/file{}"])
def test_what_is_missing_in_roots_folders_is_made_for_the_user(sandbox: Sandbox, path: str, octet_stream: bool) -> None:
    path = path.format(time.monotonic_ns())

    sandbox.files.write(path, "first, and long", use_octet_stream=octet_stream, metadata={"k": "v"})
    sandbox.files.write(path, "second", use_octet_stream=octet_stream)

    made = [path] if path.startswith("/srv/file") else [path, path.rsplit("/", 1)[0]]
    owners = sandbox.commands.run(f"stat -c %U:%G:%a {' '.join(made)}; stat -c %U:%G:%a /srv").stdout.split()
    assert sandbox.files.read(path) == "second"
    assert owners == [*["user:user:644", "user:user:755"][: len(made)], "root:root:755"]


def test_a_folder_in_roots_is_made_for_the_user_once(sandbox: Sandbox) -> None:
    path = f"/app{time.monotonic_ns()}"

    assert sandbox.files.make_dir(f"{path}/deep") is True
    assert sandbox.files.make_dir(path) is False
    sandbox.files.write("moved", "x")
    sandbox.files.rename("moved", f"{path}2/moved")

    assert [sandbox.files.get_info(p).owner for p in (path, f"{path}/deep", f"{path}2/moved")] == ["user"] * 3


def test_an_upload_that_ends_early_leaves_nothing_in_roots_folders(machine: AgentMachine, sandbox: Sandbox) -> None:
    headers = {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}

    status, _ = machine.call("POST", "/files?path=/srv/cut", gzip.compress(ALL_BYTES)[:-10], headers)

    assert status == 400
    assert not sandbox.files.exists("/srv/cut")


def _names(watcher: object, kind: FilesystemEventType, name: str, seconds: float = 90) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        events = watcher.get_new_events()  # type: ignore[attr-defined]
        if any(e.type == kind and e.name == name for e in events):
            return True
        time.sleep(0.02)
    return False


def test_a_watcher_tells_every_kind_of_change(sandbox: Sandbox, folder: str) -> None:
    watcher = sandbox.files.watch_dir(folder)

    sandbox.files.write(f"{folder}/f", "x")
    assert _names(watcher, FilesystemEventType.WRITE, "f")
    sandbox.commands.run(f"chmod 600 {folder}/f")
    assert _names(watcher, FilesystemEventType.CHMOD, "f")
    sandbox.files.rename(f"{folder}/f", f"{folder}/g")
    assert _names(watcher, FilesystemEventType.RENAME, "f")
    sandbox.files.remove(f"{folder}/g")
    assert _names(watcher, FilesystemEventType.REMOVE, "g")
    sandbox.files.make_dir(f"{folder}/sub")
    assert _names(watcher, FilesystemEventType.CREATE, "sub")

    watcher.stop()
    with pytest.raises(SandboxException):
        watcher.get_new_events()


def test_a_recursive_watcher_follows_new_folders(sandbox: Sandbox, folder: str) -> None:
    watcher = sandbox.files.watch_dir(folder, recursive=True, include_entry=True)

    sandbox.commands.run(f"mkdir -p {folder}/x/y/z && echo hi > {folder}/x/y/z/f")
    assert _names(watcher, FilesystemEventType.CREATE, "x/y/z/f")
    sandbox.commands.run(f"mv {folder}/x {folder}/w")
    assert _names(watcher, FilesystemEventType.CREATE, "w")
    sandbox.commands.run(f"echo more >> {folder}/w/y/z/f")

    deadline = time.monotonic() + 90
    events: list = []
    while not any(e.name == "w/y/z/f" and e.type == FilesystemEventType.WRITE for e in events):
        assert time.monotonic() < deadline, events
        events += watcher.get_new_events()
    entry = next(e.entry for e in events if e.name == "w/y/z/f")
    assert entry is not None
    assert entry.path == f"/home/user/{folder}/w/y/z/f"
    watcher.stop()


def test_parts_are_composed_and_removed(machine: AgentMachine, sandbox: Sandbox, folder: str) -> None:
    for i in range(3):
        sandbox.files.write(f"{folder}/p{i}", f"part {i};")
    body = {"source_paths": [f"{folder}/p{i}" for i in range(3)], "destination": f"{folder}/out/whole"}

    status, answer = machine.call("POST", "/files/compose", json.dumps(body).encode())

    assert status == 200
    assert json.loads(answer) == {"name": "whole", "type": "file", "path": f"/home/user/{folder}/out/whole"}
    assert sandbox.files.read(f"{folder}/out/whole") == "part 0;part 1;part 2;"
    assert [e.name for e in sandbox.files.list(folder)] == ["out"]


def test_a_missing_part_composes_nothing(machine: AgentMachine, sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/p0", "x")
    body = {"source_paths": [f"{folder}/p0", f"{folder}/p1"], "destination": f"{folder}/whole"}

    status, _ = machine.call("POST", "/files/compose", json.dumps(body).encode())

    assert status == 404
    assert [e.name for e in sandbox.files.list(folder)] == ["p0"]


def test_files_without_a_size_are_read(sandbox: Sandbox) -> None:
    assert "MemTotal" in sandbox.files.read("/proc/meminfo")


def test_a_pipe_does_not_hang_a_transfer(sandbox: Sandbox, folder: str) -> None:
    sandbox.commands.run(f"mkfifo {folder}/pipe")

    with pytest.raises(InvalidArgumentException, match="not a regular file"):
        sandbox.files.read(f"{folder}/pipe")
    with pytest.raises(InvalidArgumentException, match="not a regular file"):
        sandbox.files.write(f"{folder}/pipe", "x")


def test_the_binary_is_small_and_static(machine: AgentMachine) -> None:
    from tests.support.agent import build

    binary = Path(build())
    assert binary.stat().st_size <= 15 * 1024 * 1024
    assert b"/lib64/ld-linux" not in binary.read_bytes()[:4096]
