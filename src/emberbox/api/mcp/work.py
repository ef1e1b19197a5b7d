"""Tools beyond the published ones: commands and files in a sandbox, the address of a port, forks."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Annotated, Any, Literal

import anyio
from pydantic import BaseModel, Field

from emberbox.api import snapshots
from emberbox.api.agent_client import AGENT_PORT, AgentError, Target
from emberbox.api.fields import StringMap, Text
from emberbox.api.mcp.clipped import Clipped
from emberbox.api.mcp.tool import Call, Tool
from emberbox.api.mcp.tools import OneSandbox
from emberbox.api.sandbox_models import ForkRequest, ForkResult, TimeoutSeconds
from emberbox.control.errors import Conflict, Invalid
from emberbox.control.states import State
from emberbox.store.records import SandboxRecord

SHOWN_OUTPUT = 32 * 1024
"""Bytes of each of a command's two streams that an answer holds: what a model can take in."""
SHOWN_FILE = 64 * 1024
SHOWN_ENTRIES = 1000
PROGRESS_SECONDS = 3
KILL_SECONDS = 5.0

Path = Annotated[Text, Field(min_length=1, max_length=4096)]
User = Annotated[str | None, Field(max_length=64, description="User in the sandbox; the template's if left out")]


class RunCommand(OneSandbox):
    command: Annotated[Text, Field(min_length=1, description="Run by bash, as a login shell")]
    cwd: Annotated[Path | None, Field(description="Working directory; the user's home if left out")] = None
    envVars: Annotated[StringMap | None, Field(description="Further environment variables")] = None
    user: User = None
    timeout: Annotated[float, Field(gt=0, le=86400, description="Seconds until the command is killed")] = 60
    background: Annotated[
        bool, Field(description="Return at once and let the command go on; its output is not kept")
    ] = False


class CommandResult(BaseModel):
    pid: int
    exitCode: int | None = None
    """None: killed at its timeout, or it goes on in the background."""
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    timedOut: bool = False
    truncated: bool = False
    note: str | None = None


class ReadFile(OneSandbox):
    path: Path
    user: User = None
    offset: Annotated[int, Field(ge=0, description="Byte to start from")] = 0
    length: Annotated[int, Field(ge=1, le=1024 * 1024, description="At most this many bytes")] = SHOWN_FILE


class FileContent(BaseModel):
    path: str
    encoding: Literal["utf-8", "base64"]
    """base64 when these bytes are not text."""
    content: str
    size: int | None = None
    """Bytes of the whole file, where it is known."""
    nextOffset: int | None = None
    note: str | None = None


class WriteFile(OneSandbox):
    path: Path
    content: Text
    encoding: Annotated[Literal["utf-8", "base64"], Field(description="base64 for bytes that are not text")] = "utf-8"
    user: User = None


class FileWritten(BaseModel):
    path: str
    size: int


class ListFiles(OneSandbox):
    path: Path = "."
    depth: Annotated[int, Field(ge=1, le=20, description="1: the directory's own entries")] = 1
    user: User = None


class FileEntry(BaseModel):
    name: str
    path: str
    type: Literal["file", "directory", "symlink", "other"]
    size: int
    permissions: str
    owner: str
    modifiedTime: str | None = None
    symlinkTarget: str | None = None


class FileList(BaseModel):
    entries: list[FileEntry]
    note: str | None = None


class GetUrl(OneSandbox):
    port: Annotated[int, Field(ge=1, le=65535, description="Where a server listens in the sandbox")]


class PortUrl(BaseModel):
    url: str
    host: str
    headers: dict[str, str]
    """To send with each request; empty when the port is open to everybody."""


class ForkSandbox(OneSandbox, ForkRequest):
    # As in `CreateSandbox`.
    timeout: TimeoutSeconds = 300


class Forks(BaseModel):
    forks: list[ForkResult]


async def _run_command(call: Call, asked: RunCommand) -> CommandResult:
    target = await target_of(call, asked.sandboxID, asked.user)
    tag = f"mcp-{uuid.uuid4()}"
    process: dict[str, Any] = {"cmd": "/bin/bash", "args": ["-l", "-c", asked.command], "envs": asked.envVars or {}}
    if asked.cwd is not None:
        process["cwd"] = asked.cwd
    running = _Running(call)
    ended = False
    try:
        with anyio.move_on_after(asked.timeout) as limit:
            async with call.agent.start(target, process, tag=tag, keepalive_seconds=PROGRESS_SECONDS) as events:
                async for event in events:
                    await running.take(event)
                    if asked.background and running.pid:
                        ended = True
                        return CommandResult(pid=running.pid, note="the command goes on; kill it by this pid")
                    if running.end is not None:
                        ended = True
                        break
                else:
                    raise AgentError("the connection ended before the command did")
    finally:
        if not ended:
            with anyio.move_on_after(KILL_SECONDS, shield=True):
                await call.agent.kill(target, tag)
    return running.result(asked.timeout if limit.cancelled_caught else None)


class _Running:
    """What has been heard of a command."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._began = self._told = time.monotonic()
        self._streams = {"stdout": Clipped(SHOWN_OUTPUT), "stderr": Clipped(SHOWN_OUTPUT)}
        self.pid = 0
        self.end: dict[str, Any] | None = None

    async def take(self, event: dict[str, Any]) -> None:
        if "start" in event:
            self.pid = int(event["start"]["pid"])
        elif "data" in event:
            for name, encoded in event["data"].items():
                if name in self._streams:
                    self._streams[name].add(base64.b64decode(encoded))
        elif "end" in event:
            self.end = event["end"]
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            seconds = now - self._began
            heard = sum(stream.total for stream in self._streams.values())
            await self._call.progress(round(seconds, 1), f"running for {seconds:.0f} s; {heard} bytes of output")

    def result(self, timed_out_after: float | None) -> CommandResult:
        told: dict[str, Any] = {"pid": self.pid}
        notes: list[str] = []
        if timed_out_after is not None:
            told["timedOut"] = True
            notes.append(f"killed after {timed_out_after:g} s; a longer timeout, or background, lets it go on")
        elif self.end is not None:
            # A zero is left out of JSON by the agent.
            told["exitCode"] = int(self.end.get("exitCode", 0))
            if error := self.end.get("error"):
                told["error"] = str(error)
        told |= {name: stream.text() for name, stream in self._streams.items()}
        cut = {name: stream.left_out for name, stream in self._streams.items() if stream.left_out}
        if cut:
            told["truncated"] = True
            sizes = " and ".join(f"{count} bytes of {name}" for name, count in cut.items())
            notes.append(
                f"{sizes} are left out in the middle; to get the rest, run the command again with `> FILE 2>&1` "
                "and read the file in parts with e2b-read-file (offset, length)"
            )
        if notes:
            told["note"] = "; ".join(notes)
        return CommandResult(**told)


async def _read_file(call: Call, asked: ReadFile) -> FileContent:
    target = await target_of(call, asked.sandboxID, asked.user)
    part = await call.agent.read(target, asked.path, offset=asked.offset, length=asked.length)
    data, encoding, content = _as_text(part.data)
    told: dict[str, Any] = {"path": asked.path, "encoding": encoding, "content": content}
    after = asked.offset + len(data)
    if part.size is not None:
        told["size"] = part.size
    more = after < part.size if part.size is not None else len(part.data) == asked.length
    if more:
        told["nextOffset"] = after
        size = f" of {part.size}" if part.size is not None else ""
        told["note"] = f"bytes {asked.offset} to {after}{size}; read on with offset {after}"
    return FileContent(**told)


def _as_text(data: bytes) -> tuple[bytes, str, str]:
    """The bytes that are shown, how, and what they look like. A character cut in two at the end waits for its rest."""
    try:
        return data, "utf-8", data.decode()
    except UnicodeDecodeError as error:
        if 0 < error.start >= len(data) - 3 and error.reason == "unexpected end of data":
            return data[: error.start], "utf-8", data[: error.start].decode()
        return data, "base64", base64.b64encode(data).decode()


async def _write_file(call: Call, asked: WriteFile) -> FileWritten:
    if asked.encoding == "base64":
        try:
            data = base64.b64decode(asked.content, validate=True)
        except ValueError as error:
            raise Invalid(f"content is not base64: {error}") from None
    else:
        data = asked.content.encode()
    target = await target_of(call, asked.sandboxID, asked.user)
    await call.agent.write(target, asked.path, data)
    return FileWritten(path=asked.path, size=len(data))


_TYPES = {"FILE_TYPE_FILE": "file", "FILE_TYPE_DIRECTORY": "directory", "FILE_TYPE_SYMLINK": "symlink"}


async def _list_files(call: Call, asked: ListFiles) -> FileList:
    target = await target_of(call, asked.sandboxID, asked.user)
    found = await call.agent.list_directory(target, asked.path, depth=asked.depth)
    entries = [_entry(each) for each in found[:SHOWN_ENTRIES]]
    if len(found) <= SHOWN_ENTRIES:
        return FileList(entries=entries)
    return FileList(
        entries=entries,
        note=f"{len(found) - SHOWN_ENTRIES} of {len(found)} entries are left out; "
        "list a directory below, or use `find` with e2b-run-command",
    )


def _entry(found: dict[str, Any]) -> FileEntry:
    told: dict[str, Any] = {
        "name": found.get("name", ""),
        "path": found.get("path", ""),
        "type": _TYPES.get(found.get("type", ""), "other"),
        "size": int(found.get("size", 0)),
        "permissions": found.get("permissions", ""),
        "owner": found.get("owner", ""),
    }
    told |= {name: found[name] for name in ("modifiedTime", "symlinkTarget") if name in found}
    return FileEntry(**told)


async def _get_url(call: Call, asked: GetUrl) -> PortUrl:
    record = await call.plane.sandboxes.get(call.team, asked.sandboxID)
    settings = call.plane.settings
    host = f"{asked.port}-{record.id}.{settings.sandbox_domain}"
    scheme = "https" if settings.tls_cert is not None else "http"
    token = _traffic_token(call, record)
    return PortUrl(
        url=f"{scheme}://{host}", host=host, headers={"e2b-traffic-access-token": token} if token is not None else {}
    )


async def _fork_sandbox(call: Call, asked: ForkSandbox) -> Forks:
    return Forks(forks=await snapshots.fork(asked.sandboxID, call.plane, call.who, asked))


async def target_of(call: Call, sandbox_id: str, user: str | None) -> Target:
    """
    Raises:
        NotFound: the team has no such sandbox.
        Conflict: it is paused, and does not wake by itself.
    """
    record = await call.plane.sandboxes.get(call.team, sandbox_id)
    if record.state != State.RUNNING and not record.auto_resume:
        raise Conflict(f"sandbox {sandbox_id} is paused; let it run with e2b-connect-sandbox first")
    return Target(
        record.id,
        access_token=call.plane.plane.tokens.agent(record.id) if record.secure else None,
        traffic_token=_traffic_token(call, record),
        user=user,
    )


def _traffic_token(call: Call, record: SandboxRecord) -> str | None:
    return call.plane.plane.tokens.traffic(record.id) if record.network.get("allowPublicTraffic") is False else None


WORK = (
    Tool(
        "e2b-run-command",
        "Run a command",
        "Run a shell command in a sandbox and wait for its exit code and output.",
        RunCommand,
        CommandResult,
        _run_command,
        read_only=False,
        destructive=True,
        idempotent=False,
        scope="sandboxes:exec",
    ),
    Tool(
        "e2b-read-file",
        "Read a file",
        "Read a file of a sandbox, or a part of it.",
        ReadFile,
        FileContent,
        _read_file,
        read_only=True,
        destructive=False,
        idempotent=True,
        scope="sandboxes:exec",
    ),
    Tool(
        "e2b-write-file",
        "Write a file",
        "Create or replace a file in a sandbox; missing directories are made.",
        WriteFile,
        FileWritten,
        _write_file,
        read_only=False,
        destructive=True,
        idempotent=True,
        scope="sandboxes:exec",
    ),
    Tool(
        "e2b-list-files",
        "List files",
        "List a directory of a sandbox.",
        ListFiles,
        FileList,
        _list_files,
        read_only=True,
        destructive=False,
        idempotent=True,
        scope="sandboxes:exec",
    ),
    Tool(
        "e2b-get-url",
        "Get the address of a port",
        f"The address at which a server that listens on a port of a sandbox is reached. Port {AGENT_PORT} is taken.",
        GetUrl,
        PortUrl,
        _get_url,
        read_only=True,
        destructive=False,
        idempotent=True,
        scope="sandboxes:exec",
    ),
    Tool(
        "e2b-fork-sandbox",
        "Fork a sandbox",
        "Start copies of a running sandbox, each with its files and, where the runtime can, its processes.",
        ForkSandbox,
        Forks,
        _fork_sandbox,
        read_only=False,
        destructive=False,
        idempotent=False,
        scope="sandboxes:write",
    ),
)
