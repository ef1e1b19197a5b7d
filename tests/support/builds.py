"""Asking a node for builds, and looking at what they tell."""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emberbox.wire import node_pb2 as wire
from tests.support.node import NodeProcess, Output, run


def step(kind: str, *args: str, files_hash: str = "", force: bool = False) -> wire.BuildStep:
    return wire.BuildStep(type=kind, args=args, files_hash=files_hash, force=force)


@dataclass
class Told:
    """Everything that a build told."""

    build_id: str
    logs: list[wire.BuildLog] = field(default_factory=list)
    done: wire.BuildDone | None = None
    failed: wire.BuildFailed | None = None

    @property
    def image(self) -> wire.Image:
        assert self.done is not None, self.failed
        return self.done.image

    @property
    def text(self) -> str:
        return "\n".join(entry.entry.message for entry in self.logs)

    @property
    def cached(self) -> list[str]:
        """Names of the steps that were not done again."""
        return [entry.step for entry in self.logs if entry.entry.message.startswith("CACHED")]

    def why(self, step_name: str) -> str:
        """The message of a build that failed at this step."""
        assert self.failed is not None, self.done
        assert self.failed.step == step_name, self.failed
        return self.failed.message


def logs_of(event: wire.BuildEvent) -> list[wire.BuildLog]:
    """The log entries of an event: none, one or several."""
    match event.WhichOneof("event"):
        case "log":
            return [event.log]
        case "logs":
            return list(event.logs.logs)
    return []


async def read_until(stream: Any, begin: str) -> list[wire.BuildLog]:
    """Read from a stream until a line begins so; returns what was told until then."""
    seen: list[wire.BuildLog] = []
    while not any(entry.entry.message.startswith(begin) for entry in seen):
        event = await stream.read()
        assert isinstance(event, wire.BuildEvent), "the stream ended"
        assert event.WhichOneof("event") not in ("done", "failed"), event
        seen += logs_of(event)
    return seen


async def follow(events: Any, build_id: str) -> Told:
    told = Told(build_id)
    async for event in events:
        told.logs += logs_of(event)
        match event.WhichOneof("event"):
            case "done":
                told.done = event.done
            case "failed":
                told.failed = event.failed
    return told


def request(**changes: Any) -> wire.BuildRequest:
    values: dict[str, Any] = {
        "build_id": "b" + secrets.token_hex(8),
        "template_id": "t",
        "team_id": "team",
        "cpu_count": 1,
        "memory_mb": 512,
        "disk_size_mb": 2048,
    }
    if not {"recipe", "from_image", "from_build"} & set(changes):
        values["recipe"] = "base"
    return wire.BuildRequest(**(values | changes))


async def build(node: NodeProcess, *steps: wire.BuildStep, **changes: Any) -> Told:
    asked = request(steps=steps, **changes)
    return await follow(node.stub.Build(asked, timeout=1800), asked.build_id)


async def look(node: NodeProcess, image: wire.Image, command: str, *, user: str = "user") -> Output:
    """What a command says in a new sandbox of a build."""
    machine = await node.create(image=image)
    try:
        return await run(machine.address, command, user=user)
    finally:
        await node.stub.Kill(wire.KillRequest(sandbox_id=machine.sandbox_id), timeout=300)


def archive(folder: Path, files: Sequence[tuple[str, bytes, int]], *, links: Sequence[tuple[str, str]] = ()) -> str:
    """Pack files (name, content, mode) as clients do; a name that ends with / is a folder. Returns the hash."""
    files_hash = secrets.token_hex(32)
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{files_hash}.tar.gz", "w:gz") as tar:
        for name, content, mode in files:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.mode, info.size, info.uid, info.gid = mode, len(content), 501, 20
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(info)
    return files_hash
