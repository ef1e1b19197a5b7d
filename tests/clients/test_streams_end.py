"""A stream to a machine that goes away ends with an error at once.

Clients without a read time-out would otherwise hang for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import e2b
import pytest
import websockets.exceptions
from e2b import PtySize, Sandbox

from tests.clients.support import servers
from tests.clients.support.raw import websocket
from tests.clients.support.timing import seconds, whole_seconds

# A stream that is cut ends at once, one that is not hangs; a busy machine stands between. Of the call that ends the
# machine nothing is counted: how long a machine takes to stop is not the stream's matter.
LIMIT = 60.0


class Reader:
    """Runs a blocking read beside the test and remembers how it ended and when."""

    def __init__(self, read: Callable[[], object]) -> None:
        self._read = read
        self.error: BaseException | None = None
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self.error = error
        self.ended_at = time.monotonic()

    def ended_after(self, moment: float) -> float:
        self._thread.join(seconds(120))
        assert not self._thread.is_alive(), "the stream did not end within 120 s"
        return self.ended_at - moment


def _command(sandbox: Sandbox) -> Reader:
    handle = sandbox.commands.run("while true; do echo tick; sleep 0.2; done", background=True, timeout=0)
    return Reader(handle.wait)


def _silent_command(sandbox: Sandbox) -> Reader:
    handle = sandbox.commands.run("sleep 100000", background=True, timeout=0)
    return Reader(handle.wait)


def _terminal(sandbox: Sandbox) -> Reader:
    handle = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=0)
    return Reader(handle.wait)


def _download(sandbox: Sandbox) -> Reader:
    # A pipe that nobody writes to gives nothing; a huge sparse file is a download that lasts.
    sandbox.commands.run("truncate -s 8G ~/huge")
    stream = sandbox.files.read("huge", format="stream")

    def read() -> None:
        for _ in stream:
            time.sleep(0.01)

    return Reader(read)


STREAMS = {
    "command": _command, "silent-command": _silent_command, "terminal": _terminal, "download": _download,
}  # fmt: skip


def _killed(sandbox: Sandbox) -> None:
    sandbox.kill()


def _timed_out(sandbox: Sandbox) -> None:
    sandbox.set_timeout(0)


def _files_paused(sandbox: Sandbox) -> None:
    sandbox.pause(mode="filesystem")


@pytest.mark.parametrize("end", [_killed, _timed_out, _files_paused], ids=["killed", "timed-out", "paused-files"])
@pytest.mark.parametrize("start", STREAMS.values(), ids=STREAMS.keys())
def test_a_stream_ends_with_an_error_when_its_machine_goes(make_sandbox, start, end):
    sandbox = make_sandbox()
    reader = start(sandbox)
    time.sleep(0.5)

    end(sandbox)
    moment = time.monotonic()

    assert reader.ended_after(moment) < seconds(LIMIT)
    assert isinstance(reader.error, Exception), "the stream ended as if nothing had happened"


def test_the_error_of_a_killed_command_says_that_the_sandbox_is_gone(make_sandbox):
    sandbox = make_sandbox()
    reader = _silent_command(sandbox)
    time.sleep(0.5)

    moment = time.monotonic()
    sandbox.kill()
    reader.ended_after(moment)

    assert isinstance(reader.error, e2b.SandboxNotRunningException), repr(reader.error)


def test_a_watch_ends_when_its_machine_goes(make_sandbox):
    sandbox = make_sandbox()
    watcher = sandbox.files.watch_dir("/home/user")

    sandbox.kill()

    with pytest.raises(e2b.SandboxNotRunningException):
        watcher.get_new_events()


async def test_an_async_watch_calls_on_exit_when_its_machine_goes(make_async_sandbox):
    import asyncio

    sandbox = await make_async_sandbox()
    ended: asyncio.Future = asyncio.get_running_loop().create_future()
    await sandbox.files.watch_dir("/home/user", on_event=lambda _: None, on_exit=ended.set_result, timeout=0)

    await sandbox.kill()

    error = await asyncio.wait_for(ended, seconds(LIMIT))
    assert isinstance(error, Exception)


def test_an_upload_to_a_killed_sandbox_fails(make_sandbox):
    sandbox = make_sandbox()
    started = threading.Event()

    def endless():
        while True:
            started.set()
            yield b"x" * 65536
            time.sleep(0.01)

    reader = Reader(lambda: sandbox.files.write("endless", endless()))
    started.wait(seconds(10))
    time.sleep(0.5)

    sandbox.kill()
    moment = time.monotonic()

    assert reader.ended_after(moment) < seconds(LIMIT)
    assert isinstance(reader.error, Exception)


def test_a_websocket_to_a_killed_sandbox_closes(make_sandbox, emberbox):
    sandbox = make_sandbox()
    servers.serve(sandbox, 8002, script=servers.WEBSOCKET_ECHO)

    with websocket(emberbox, f"ws://{sandbox.get_host(8002)}/") as socket:
        reader = Reader(socket.recv)
        time.sleep(0.5)
        sandbox.kill()
        moment = time.monotonic()
        took = reader.ended_after(moment)

    assert took < seconds(LIMIT)
    assert isinstance(reader.error, websockets.exceptions.ConnectionClosed)


def test_a_command_of_a_frozen_sandbox_goes_on_after_resume(make_sandbox):
    sandbox = make_sandbox()
    sandbox.commands.run("sleep 3; echo done > ~/done.txt", background=True)

    sandbox.pause()
    again = sandbox.connect()
    deadline = time.monotonic() + seconds(90)
    while not again.files.exists("done.txt"):
        assert time.monotonic() < deadline, "the command did not go on"
        time.sleep(0.2)

    assert again.files.read("done.txt") == "done\n"


def test_a_command_that_the_timeout_ends_says_that_the_sandbox_does_not_run(
    make_sandbox: Callable[..., Sandbox],
) -> None:
    """Not that it runs and something does not listen."""
    sandboxes = [make_sandbox(timeout=whole_seconds(4)) for _ in range(4)]
    readers = [Reader(lambda sandbox=sandbox: sandbox.commands.run("sleep 100000", timeout=0)) for sandbox in sandboxes]

    for reader in readers:
        reader.ended_after(time.monotonic())

    assert [type(reader.error) for reader in readers] == [e2b.exceptions.SandboxNotRunningException] * 4
