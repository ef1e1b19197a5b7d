"""The node's client of emberd, the agent inside a machine.

A lean HTTP/1.1 client: one connection a request, because making one over the slot's own link costs less than keeping
a thousand idle. Here live the control routes (`/init`, `/logs`, `/fsfreeze`) and what a node uses of the
rest: a template's start and ready commands, and the commands and files of a build.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
import socket
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address
from typing import Any
from urllib.parse import urlencode

import httptools

from emberbox.node.errors import AgentBusy, AgentFailure, AgentTooLong, AgentTooSlow
from emberbox.node.tasks import finish

AGENT_PORT = 49983
CONTROL_HEADER = "X-Ember-Control"

ANSWER_SECONDS = 5.0
"""What an agent that runs has for its answer, unless said otherwise."""
_FLUSH_SECONDS = 60.0
_FREEZE_SECONDS = 2.0
_THAW_PAUSE = 0.5
_CONNECT_SECONDS = 0.1
"""For one attempt while waiting for the agent: the kernel repeats a SYN that was dropped after a whole second."""
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.001, 0.02
_READ_BYTES = 64 * 1024
_UPLOAD_BYTES = 1024 * 1024
_END_OF_STREAM = 0x02
_MOST_ANSWER_BYTES = 256 * 1024
_MOST_FRAME_BYTES = 256 * 1024
_MOST_SILENT_BYTES = 256 * 1024
"""The machine's root may answer in the agent's place, without end, and with what takes long to read: a MiB of JSON may
take a quarter of a second, in which nobody else has a turn. The last is for a head, or between parts of a body."""
_BUSY = 503
_MOST_FIELDS, _MOST_TEXT, _MOST_WORD = 32, 4096, 64
"""Of a log entry; the agent keeps itself to less."""
_MOST_NUMBER = 2**53


@dataclass(frozen=True, slots=True)
class AgentLog:
    """One entry of the agent's own log. `seq` grows by one; times in Unix milliseconds."""

    seq: int
    timestamp_ms: int
    level: str
    message: str
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class ProcessOutput:
    """Bytes that a command wrote; `stream` is stdout or stderr."""

    stream: str
    data: bytes


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How a command ended. `exit_code` counts when it `exited` by itself."""

    exit_code: int
    exited: bool
    status: str


@dataclass(slots=True)
class _Response:
    status: int
    body: bytes


class Agent:
    """The agent of one machine.

    Every method raises `AgentFailure` when the agent does not answer in time or refuses.
    """

    def __init__(
        self, address: IPv4Address, secret: str, *, label: str = "", time_scale: float = 1.0, port: int = AGENT_PORT
    ) -> None:
        self.label = label
        """The machine's ID."""
        self._address = str(address)
        self._secret = secret
        self._scale = time_scale
        self._port = port

    async def init(
        self,
        make_body: Callable[[], dict[str, Any]],
        *,
        within: float | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Hand over what the machine is: environment, token, user, name, time.

        Args:
            make_body: called when the agent has been reached, for the time in it is then.
            within: seconds that a machine which has just been started has until it answers.
            seconds: what any other has, before it is scaled.
        """
        await self._control("POST", "/init", make_body=make_body, expect=(200, 204), within=within, seconds=seconds)

    async def freeze_files(self, *, seconds: float = _FLUSH_SECONDS) -> None:
        """Flush the guest's file systems to the disk and hold writes until the machine ends or `thaw_files`.

        One that fails or is cancelled is undone, for it may still be done.

        Args:
            seconds: what it may take; a guest holds back a fifth of its memory.
        """
        try:
            await self._control("POST", "/fsfreeze", expect=(204,), seconds=seconds)
        except BaseException as error:
            refused = isinstance(error, AgentFailure) and not isinstance(error, AgentBusy | AgentTooSlow)
            if not refused:
                with suppress(AgentFailure):
                    await finish(self.thaw_files())
            raise

    async def thaw_files(self) -> None:
        """Undo `freeze_files`, also one that is still under way: then it comes first. Nothing happens when none was."""
        await self._undo("/fsthaw", _FLUSH_SECONDS)

    async def freeze_programs(self) -> None:
        """Stop what clients and the template started, until `/init` or `thaw_programs`. The agent itself goes on."""
        await self._control("POST", "/freeze", expect=(204,), seconds=_FREEZE_SECONDS)

    async def thaw_programs(self) -> None:
        """Undo `freeze_programs`. Nothing happens when nothing was stopped."""
        await self._undo("/unfreeze", _FREEZE_SECONDS)

    async def _undo(self, route: str, seconds: float) -> None:
        """Ask for a thaw; a freeze that is still under way comes first, and may take `seconds`."""
        end = time.monotonic() + seconds * self._scale
        while True:
            try:
                await self._control("POST", route, expect=(204,))
                return
            except AgentBusy:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(_THAW_PAUSE)

    async def logs(self, after: int, limit: int) -> list[AgentLog]:
        """Return up to `limit` log entries whose `seq` is greater than `after`, oldest first.

        Raises:
            AgentTooLong: fewer must be asked for. Ten are never too long.
            AgentFailure: the agent does not answer, or not with a log.
        """
        target = f"/logs?{urlencode({'cursor': after, 'limit': limit})}"
        answer = await self._control("GET", target, expect=(200,))
        try:
            found = json.loads(answer.body)
            entries = found["entries"] if isinstance(found, dict) else found
            return [_log_entry(entry) for entry in entries or ()]
        except Exception as error:  # what a guest may think of has no end
            raise AgentFailure(f"the agent's log could not be read: {error or type(error).__name__}") from error

    async def start_command(self, command: str, *, user: str, workdir: str, token: str, tag: str) -> None:
        """Start a shell command that goes on after this call, as a login shell of `user`."""
        async with asyncio.timeout(10 * self._scale):
            async for event in self._start(command, user=user, workdir=workdir, token=token, tag=tag):
                if "start" in event:
                    return
        raise AgentFailure(f"the agent did not start the command {command!r}")

    async def run_command(self, command: str, *, user: str, workdir: str, token: str, timeout: float) -> int:
        """Run a shell command to its end and return its exit code; the agent kills it after `timeout` seconds."""
        limit = {"Connect-Timeout-Ms": str(max(1, int(timeout * 1000)))}
        try:
            async with asyncio.timeout(timeout + 2 * self._scale):
                async for event in self._start(command, user=user, workdir=workdir, token=token, headers=limit):
                    if "end" in event:
                        end = _process_end(event)
                        return end.exit_code if end.exited else -1
        except TimeoutError:
            return -1
        raise AgentFailure(f"the agent did not tell how the command {command!r} ended")

    async def stream(
        self,
        argv: Sequence[str],
        *,
        user: str,
        workdir: str = "",
        env: dict[str, str] | None = None,
        timeout: float,
        tag: str = "",
    ) -> AsyncGenerator[ProcessOutput | ProcessEnd, None]:
        """Run a program to its end and yield what it writes as it comes; the last is its end.

        The agent kills it after `timeout` seconds.
        """
        limit = {"Connect-Timeout-Ms": str(max(1, int(timeout * 1000)))}
        events = self._start_program(argv, user=user, workdir=workdir, env=env, token="", tag=tag, headers=limit)
        async with aclosing(events):
            async for event in events:
                for name in ("stdout", "stderr"):
                    if encoded := _part(event, "data").get(name):
                        yield ProcessOutput(name, _decoded(encoded))
                if "end" in event:
                    yield _process_end(event)
                    return

    async def upload(self, source: int, size: int, path: str) -> None:
        """Write a file of root's inside, from the open file `source` of this host; the caller bounds the time."""
        target = f"/files?{urlencode({'path': path, 'username': 'root'})}"
        headers = {
            CONTROL_HEADER: self._secret,
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size),
        }
        reader = _Reader()
        said = bytearray()
        try:
            connection = await self._connect(2 * self._scale)
            try:
                await self._send_head(connection, "POST", target, headers)
                with suppress(BrokenPipeError, ConnectionResetError):  # it refused early; its answer says why
                    await self._send_file(connection, source, size)
                async for part in self._parts(connection, reader):
                    said += part
                    _refuse_more_than(_MOST_ANSWER_BYTES, len(said))
            finally:
                connection.close()
        except (OSError, TimeoutError, httptools.HttpParserError) as error:
            raise AgentFailure(f"the agent broke off an upload: {error or 'no connection'}") from error
        if reader.status != 200:
            text = said.decode(errors="replace").strip()[:300]
            raise AgentFailure(f"the agent answered {reader.status} to an upload: {text}")

    @staticmethod
    async def _send_file(connection: socket.socket, source: int, size: int) -> None:
        loop = asyncio.get_running_loop()
        sent = 0
        while sent < size:
            data = await asyncio.to_thread(os.pread, source, _UPLOAD_BYTES, sent)
            if not data:
                raise OSError(errno.EIO, "the file became shorter while it was sent")
            data = data[: size - sent]
            await loop.sock_sendall(connection, data)
            sent += len(data)

    # ---- HTTP

    async def _control(
        self,
        method: str,
        target: str,
        *,
        make_body: Callable[[], dict[str, Any]] | None = None,
        expect: tuple[int, ...],
        seconds: float = ANSWER_SECONDS,
        within: float | None = None,
    ) -> _Response:
        route = target.partition("?")[0]
        limit = seconds * self._scale if within is None else within
        headers = {CONTROL_HEADER: self._secret, "Content-Type": "application/json"}
        try:
            async with asyncio.timeout(limit):
                connection = await (self._connect(None) if within is None else self._connect_when_up())
                body = None if make_body is None else json.dumps(make_body()).encode()
                answer = await self._exchange(connection, method, target, body=body, headers=headers)
        except TimeoutError:
            raise AgentTooSlow(f"the agent did not answer {route} within {limit:g} s") from None
        except (OSError, httptools.HttpParserError) as error:
            raise AgentFailure(f"the agent's {route} failed: {error}") from error
        if answer.status not in expect:
            said = answer.body.decode(errors="replace").strip()[:300]
            kind = AgentBusy if answer.status == _BUSY else AgentFailure
            raise kind(f"the agent answered {answer.status} to {route}" + (f": {said}" if said else ""))
        return answer

    async def _exchange(
        self, connection: socket.socket, method: str, target: str, *, body: bytes | None, headers: dict[str, str]
    ) -> _Response:
        collected = bytearray()
        reader = _Reader()
        try:
            await self._send(connection, method, target, body, headers)
            async for part in self._parts(connection, reader):
                collected += part
                _refuse_more_than(_MOST_ANSWER_BYTES, len(collected))
        finally:
            connection.close()
        return _Response(reader.status, bytes(collected))

    async def _start(
        self,
        command: str,
        *,
        user: str,
        workdir: str,
        token: str,
        tag: str = "",
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Run a shell command as a login shell does."""
        argv = ("/bin/bash", "-l", "-c", command)
        events = self._start_program(argv, user=user, workdir=workdir, token=token, tag=tag, headers=headers)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _start_program(
        self,
        argv: Sequence[str],
        *,
        user: str,
        workdir: str,
        token: str,
        env: dict[str, str] | None = None,
        tag: str = "",
        headers: dict[str, str] | None = None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Call process.Process/Start (Connect protocol, JSON) and yield its events."""
        command = argv[-1]
        request: dict[str, Any] = {
            "process": {"cmd": argv[0], "args": list(argv[1:]), "envs": env or {}},
            "stdin": False,
        }
        if workdir:
            request["process"]["cwd"] = workdir
        if tag:
            request["tag"] = tag
        message = json.dumps(request).encode()
        sent = {
            "Content-Type": "application/connect+json",
            "Connect-Protocol-Version": "1",
            "Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode(),
            CONTROL_HEADER: self._secret,
            **({"X-Access-Token": token} if token else {}),
            **(headers or {}),
        }
        reader = _Reader()
        try:
            connection = await self._connect(2 * self._scale)
        except (OSError, TimeoutError) as error:
            raise AgentFailure(f"the agent does not answer: {error or 'no connection'}") from error
        try:
            envelope = struct.pack(">BI", 0, len(message)) + message
            await self._send(connection, "POST", "/process.Process/Start", envelope, sent)
            buffer = bytearray()
            async for part in self._parts(connection, reader):
                buffer += part
                if reader.status != 200:
                    _refuse_more_than(_MOST_ANSWER_BYTES, len(buffer))
                    continue
                while len(buffer) >= 5:
                    flags, length = struct.unpack_from(">BI", buffer)
                    _refuse_more_than(_MOST_FRAME_BYTES, length)
                    if len(buffer) < 5 + length:
                        break
                    event = _parsed(bytes(buffer[5 : 5 + length]))
                    del buffer[: 5 + length]
                    if flags & _END_OF_STREAM:
                        if refusal := _part(event, "error"):
                            raise AgentFailure(f"the agent could not run {command!r}: {refusal.get('message')}")
                    else:
                        yield _part(event, "event")
                    await asyncio.sleep(0)
            if reader.status != 200:
                said = buffer.decode(errors="replace")[:300]
                raise AgentFailure(f"the agent answered {reader.status} to a command: {said}")
        except (OSError, httptools.HttpParserError, ValueError) as error:
            raise AgentFailure(f"the agent broke off a command: {error}") from error
        finally:
            connection.close()

    async def _connect_when_up(self) -> socket.socket:
        """Connect as soon as the agent listens; tries often at first, for a machine takes some ten milliseconds."""
        pause = _FIRST_POLL_SECONDS
        while True:
            with suppress(OSError, TimeoutError):
                return await self._connect(_CONNECT_SECONDS * self._scale)
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, _LAST_POLL_SECONDS)

    async def _connect(self, timeout: float | None) -> socket.socket:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(connection, (self._address, self._port))
        except BaseException:
            connection.close()
            raise
        return connection

    async def _send(
        self, connection: socket.socket, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> None:
        if body is not None or method == "POST":
            headers = {**headers, "Content-Length": str(len(body or b""))}
        await self._send_head(connection, method, target, headers, body or b"")

    async def _send_head(
        self, connection: socket.socket, method: str, target: str, headers: dict[str, str], body: bytes = b""
    ) -> None:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._address}:{self._port}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        await asyncio.get_running_loop().sock_sendall(connection, head + body)

    async def _parts(self, connection: socket.socket, reader: _Reader) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        parser = httptools.HttpResponseParser(reader)
        reader.parser = parser
        silent = 0
        while not reader.complete:
            data = await loop.sock_recv(connection, _READ_BYTES)
            # It returns at once while there is data: others have their turn, and deadlines come.
            await asyncio.sleep(0)
            if not data:
                if reader.status and reader.ends_with_connection:
                    break
                raise ConnectionResetError("the connection was closed before the whole answer arrived")
            parser.feed_data(data)
            if reader.parts:
                yield b"".join(reader.parts)
                reader.parts.clear()
                silent = 0
            else:
                silent += len(data)
                _refuse_more_than(_MOST_SILENT_BYTES, silent)


def _parsed(data: bytes) -> dict[str, Any]:
    """A frame's JSON object; the guest may have sent anything."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise AgentFailure(f"the agent sent what is no event: {error}") from error
    if not isinstance(found, dict):
        raise AgentFailure("the agent sent what is no event")
    return found


def _part(event: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within an event; empty when there is none."""
    found = event.get(name) or {}
    if not isinstance(found, dict):
        raise AgentFailure(f"the agent sent an event whose {name!r} is no object")
    return found


def _decoded(encoded: Any) -> bytes:
    try:
        return base64.b64decode(encoded)
    except (ValueError, TypeError) as error:
        raise AgentFailure(f"the agent sent output that is not base64: {error}") from error


def _process_end(event: dict[str, Any]) -> ProcessEnd:
    end = _part(event, "end")
    code = end.get("exitCode", 0)
    if not isinstance(code, int) or not -_MOST_NUMBER < code < _MOST_NUMBER:
        raise AgentFailure("the agent sent an exit code that is no number")
    return ProcessEnd(code, bool(end.get("exited")), str(end.get("status", ""))[:_MOST_TEXT])


def _refuse_more_than(most: int, size: int) -> None:
    if size > most:
        raise AgentTooLong(f"the agent's answer is longer than {most} bytes")


class _Reader:
    """Callbacks of the HTTP parser."""

    def __init__(self) -> None:
        self.parser: Any = None
        self.status = 0
        self.parts: list[bytes] = []
        self.complete = False
        self.ends_with_connection = True

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self.ends_with_connection = False

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        self.complete = True


def _log_entry(entry: dict[str, Any]) -> AgentLog:
    fields = dict(list((entry.get("fields") or {}).items())[:_MOST_FIELDS])
    if logger := entry.get("logger"):
        fields = {"logger": logger, **fields}
    seq, timestamp_ms = int(entry["seq"]), _milliseconds(entry["timestamp"])
    if not 0 <= seq < _MOST_NUMBER or not 0 <= timestamp_ms < _MOST_NUMBER:
        raise ValueError("a number is out of range")
    return AgentLog(
        seq=seq,
        timestamp_ms=timestamp_ms,
        level=str(entry.get("level", "info"))[:_MOST_WORD],
        message=str(entry.get("message", ""))[:_MOST_TEXT],
        fields={
            str(key)[:_MOST_WORD]: (value if isinstance(value, str) else json.dumps(value))[:_MOST_TEXT]
            for key, value in fields.items()
        },
    )


def _milliseconds(value: Any) -> int:
    if isinstance(value, (int, float)):
        return int(value)
    return int(datetime.fromisoformat(str(value)).timestamp() * 1000)
