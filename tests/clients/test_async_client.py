"""The asynchronous Python client, over every module of it."""

from __future__ import annotations

import asyncio
import os

import pytest
from e2b import (
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    NotFoundException,
    PtySize,
    SandboxNotFoundException,
    SandboxQuery,
    TimeoutException,
)

from tests.clients.support.timing import eventually_async, seconds, whole_seconds


async def test_commands_stream_stdin_and_end(make_async_sandbox):
    sandbox = await make_async_sandbox()
    seen: list[str] = []

    handle = await sandbox.commands.run(
        "read line; echo got:$line; exit 7", background=True, stdin=True, on_stdout=seen.append
    )
    listed = [each.pid for each in await sandbox.commands.list()]
    await handle.send_stdin("hello\n")
    with pytest.raises(CommandExitException) as ended:
        await handle.wait()

    assert handle.pid in listed
    assert ended.value.exit_code == 7
    assert "".join(seen) == "got:hello\n"


async def test_commands_connect_kill_and_time_out(make_async_sandbox):
    sandbox = await make_async_sandbox()

    handle = await sandbox.commands.run("sleep 999", background=True)
    again = await sandbox.commands.connect(handle.pid)
    killed = await again.kill()
    with pytest.raises(CommandExitException) as ended:
        await handle.wait()
    with pytest.raises(TimeoutException):
        await sandbox.commands.run("sleep 998", timeout=seconds(1))

    assert killed is True
    assert ended.value.error == "signal: killed"
    assert await sandbox.commands.kill(handle.pid) is False


async def test_a_hundred_commands_at_once(make_async_sandbox):
    sandbox = await make_async_sandbox()

    limits = {"timeout": seconds(60), "request_timeout": seconds(60)}
    results = await asyncio.gather(*(sandbox.commands.run(f"echo {n}", **limits) for n in range(100)))

    assert [result.stdout for result in results] == [f"{n}\n" for n in range(100)]


async def test_files_in_every_format(make_async_sandbox):
    sandbox = await make_async_sandbox()
    content = os.urandom(300_000)

    info = await sandbox.files.write("dir/data.bin", content)
    as_bytes = await sandbox.files.read("dir/data.bin", format="bytes")
    as_stream = b"".join([chunk async for chunk in await sandbox.files.read("dir/data.bin", format="stream")])
    zipped = await sandbox.files.read("dir/data.bin", format="bytes", gzip=True)

    assert info.path == "/home/user/dir/data.bin"
    assert bytes(as_bytes) == as_stream == bytes(zipped) == content


async def test_files_from_an_async_stream(make_async_sandbox):
    sandbox = await make_async_sandbox()

    async def chunks():
        for n in range(50):
            yield f"chunk {n}\n".encode()

    await sandbox.files.write("streamed.txt", chunks())

    assert await sandbox.files.read("streamed.txt") == "".join(f"chunk {n}\n" for n in range(50))


async def test_directories_and_entries(make_async_sandbox):
    sandbox = await make_async_sandbox()

    made = await sandbox.files.make_dir("a/b/c")
    again = await sandbox.files.make_dir("a/b/c")
    await sandbox.files.write("a/b/file.txt", "x")
    renamed = await sandbox.files.rename("a/b/file.txt", "a/b/other.txt")
    entries = await sandbox.files.list("a", depth=3)
    info = await sandbox.files.get_info("a/b/other.txt")
    await sandbox.files.remove("a")

    assert (made, again) == (True, False)
    assert renamed.path == "/home/user/a/b/other.txt"
    assert {entry.path for entry in entries} == {
        "/home/user/a/b", "/home/user/a/b/c", "/home/user/a/b/other.txt",
    }  # fmt: skip
    assert (info.type, info.size, info.owner) == (FileType.FILE, 1, "user")
    assert await sandbox.files.exists("a") is False
    with pytest.raises(FileNotFoundException):
        await sandbox.files.read("a/b/other.txt")


async def test_a_watcher_calls_back(make_async_sandbox):
    sandbox = await make_async_sandbox()
    await sandbox.files.make_dir("watched")
    events: list = []

    handle = await sandbox.files.watch_dir("watched", on_event=events.append, recursive=True, include_entry=True)
    await sandbox.files.write("watched/new.txt", "x")
    await eventually_async(_has(events, "new.txt", FilesystemEventType.WRITE), what="a write event")
    await handle.stop()

    created = next(each for each in events if each.type == FilesystemEventType.CREATE)
    assert created.name == "new.txt"
    assert created.entry is None or created.entry.path == "/home/user/watched/new.txt"


async def test_pty_echoes_and_resizes(make_async_sandbox):
    sandbox = await make_async_sandbox()
    output = bytearray()

    pty = await sandbox.pty.create(PtySize(rows=24, cols=80), on_data=output.extend)
    await sandbox.pty.send_stdin(pty.pid, b"stty size; echo $TERM\n")
    await eventually_async(_contains(output, b"24 80"), what="the size")
    await sandbox.pty.resize(pty.pid, PtySize(rows=50, cols=132))
    await sandbox.pty.send_stdin(pty.pid, b"stty size; exit 0\n")
    result = await pty.wait()

    assert result.exit_code == 0
    assert b"50 132" in output
    assert b"xterm-256color" in output


async def test_life_cycle(make_async_sandbox):
    sandbox = await make_async_sandbox(metadata={"suite": "async-life-cycle"})
    await sandbox.files.write("kept.txt", "kept")

    assert await sandbox.pause() is True
    paused = await AsyncSandbox.get_info(sandbox.sandbox_id)
    assert await sandbox.pause() is False
    again = await AsyncSandbox.connect(sandbox.sandbox_id, timeout=whole_seconds(600))
    await again.set_timeout(whole_seconds(90))

    assert paused.state == "paused"
    assert await again.files.read("kept.txt") == "kept"
    assert await again.is_running()


async def test_lists_page_by_page(make_async_sandbox):
    mark = os.urandom(6).hex()
    made = [await make_async_sandbox(metadata={"mark": mark}) for _ in range(3)]
    paginator = AsyncSandbox.list(query=SandboxQuery(metadata={"mark": mark}), limit=2)

    pages = []
    while paginator.has_next:
        pages.append([each.sandbox_id for each in await paginator.next_items()])

    assert [len(page) for page in pages] == [2, 1]
    assert {each for page in pages for each in page} == {each.sandbox_id for each in made}


async def test_what_is_not_there_is_not_found(make_async_sandbox):
    missing = "i" + "0" * 19

    with pytest.raises(SandboxNotFoundException):
        await AsyncSandbox.connect(missing)
    with pytest.raises(SandboxNotFoundException):
        await AsyncSandbox.get_info(missing)
    with pytest.raises(NotFoundException):
        await AsyncSandbox.set_timeout(missing, 60)
    assert await AsyncSandbox.kill(missing) is False


async def test_metrics_and_signed_urls(make_async_sandbox):
    sandbox = await make_async_sandbox()

    url = sandbox.download_url("/etc/hostname", use_signature_expiration=60)
    await eventually_async(sandbox.get_metrics, within=90, every=0.5, what="a first sample")

    assert "signature=v1_" in url
    assert "signature_expiration=" in url


def _has(events, name, kind):
    async def check():
        return any(each.name == name and each.type == kind for each in events)

    return check


def _contains(output, part):
    async def check():
        return part in output

    return check
