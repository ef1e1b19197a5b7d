"""`emberbox sandbox shell`: a terminal in a sandbox, through the edge and the agent, as E2B's clients do it."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import os
import signal
import struct
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from emberbox.api.agent_client import StreamError, Target, envelope, error_text, messages
from emberbox.cli.api_client import Api
from emberbox.cli.errors import CliError
from emberbox.settings import Settings

KEEPALIVE_SECONDS = 30
READ_BYTES = 4096


def shell(settings: Settings, sandbox_id: str, *, user: str) -> int:
    """Connect this terminal to a login shell in the sandbox until it ends. Returns its exit code.

    Raises:
        CliError: no terminal, no such sandbox, or the connection broke.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CliError("a shell needs a terminal on standard input and output")
    with Api(settings) as api:
        sandbox = api.call("GET", f"/sandboxes/{sandbox_id}")
        if sandbox["state"] != "running":
            raise CliError(f"sandbox {sandbox_id} is {sandbox['state']}: connect to it with a client to wake it first")
        url = api.sandbox_url
    target = Target(sandbox_id, access_token=sandbox.get("envdAccessToken"), user=user)
    with _raw_terminal():
        return asyncio.run(_Shell(url, target.headers()).run())


class _Shell:
    def __init__(self, url: str, headers: dict[str, str]) -> None:
        # The stream has no read time-out of its own: keepalives come every `KEEPALIVE_SECONDS`.
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=httpx.Timeout(10, read=KEEPALIVE_SECONDS * 2), trust_env=False
        )
        self._pid = 0
        self._changes: asyncio.Queue[dict[str, Any]] = asyncio.Queue(maxsize=256)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        sender = asyncio.create_task(self._send_changes())
        try:
            async for event in self._start():
                if "start" in event:
                    self._pid = event["start"]["pid"]
                    loop.add_signal_handler(signal.SIGWINCH, self._resized)
                    loop.add_reader(sys.stdin.fileno(), self._typed)
                elif "data" in event:
                    await asyncio.to_thread(_write, base64.b64decode(event["data"].get("pty", "")))
                elif "end" in event:
                    return int(event["end"].get("exitCode", 0))
            raise CliError("the connection ended before the shell did")
        except httpx.TransportError as error:
            raise CliError(f"the connection to the sandbox broke: {error or type(error).__name__}") from None
        except StreamError as error:
            raise CliError(f"the shell ended: {error}") from None
        finally:
            loop.remove_reader(sys.stdin.fileno())
            loop.remove_signal_handler(signal.SIGWINCH)
            sender.cancel()
            with suppress(asyncio.CancelledError):
                await sender
            await self._http.aclose()

    async def _start(self) -> AsyncIterator[dict[str, Any]]:
        request = {
            "process": {
                "cmd": "/bin/bash",
                "args": ["-i", "-l"],
                "envs": {
                    "TERM": os.environ.get("TERM", "xterm-256color"),
                    "LANG": "C.UTF-8",
                    "LC_ALL": "C.UTF-8",
                },
            },
            "pty": {"size": _size()},
        }
        async with self._http.stream(
            "POST",
            "/process.Process/Start",
            content=envelope(request),
            headers={
                "Content-Type": "application/connect+json",
                "Keepalive-Ping-Interval": str(KEEPALIVE_SECONDS),
            },
        ) as response:
            if response.status_code != 200:
                await response.aread()
                raise CliError(error_text(response))
            async for message in messages(response.aiter_bytes()):
                yield message.get("event", {})

    def _typed(self) -> None:
        try:
            data = os.read(sys.stdin.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        if data:
            self._offer({"input": {"pty": base64.b64encode(data).decode()}})

    def _resized(self) -> None:
        self._offer({"pty": {"size": _size()}})

    def _offer(self, change: dict[str, Any]) -> None:
        # Full: the sandbox has not taken the last 256 keystrokes or pastes; losing more is better than growing.
        with suppress(asyncio.QueueFull):
            self._changes.put_nowait(change)

    async def _send_changes(self) -> None:
        """In order, one after the other: what was typed must not overtake itself."""
        while True:
            change = await self._changes.get()
            method = "SendInput" if "input" in change else "Update"
            body = {"process": {"pid": self._pid}, **change}
            with suppress(httpx.TransportError):
                await self._http.post(f"/process.Process/{method}", json=body, timeout=10)


def _size() -> dict[str, int]:
    rows, columns = struct.unpack("HHHH", fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8))[:2]
    return {"rows": rows or 24, "cols": columns or 80}


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


@contextmanager
def _raw_terminal() -> Iterator[None]:
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    # Draining, not flushing: what was typed while the shell was on its way is meant for it.
    tty.setraw(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
