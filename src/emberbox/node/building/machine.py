"""The machine that a build's steps run in. It starts from the base's layers and a copy of the disk that the step
before left, and is gone when the build ends, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emberbox.node import identity
from emberbox.node.agent import ProcessEnd
from emberbox.node.building.journal import LineCutter
from emberbox.node.building.model import StepFailed
from emberbox.node.errors import AgentFailure
from emberbox.node.hosting import Hosted, Hosting, Origin
from emberbox.node.model import Image
from emberbox.node.tasks import finish
from emberbox.runtime.base import Limits, Saved
from emberbox.runtime.errors import RuntimeFailure

_UPLOAD_SECONDS = 1800.0
_SHORT_SECONDS = 120.0
_FLUSH_SECONDS = 600.0
_LINES_AT_ONCE = 256
"""Of a command's output, before others have a turn."""


@dataclass(frozen=True, slots=True)
class OutputLine:
    error: bool
    """True for what came on standard error."""
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    exit_code: int
    """-1 when a signal ended the command."""
    status: str


class BuildMachine:
    """A machine that a build has for itself."""

    def __init__(self, hosting: Hosting, hosted: Hosted) -> None:
        self._hosting = hosting
        self._hosted = hosted

    @property
    def memory_mb(self) -> int:
        return self._hosted.spec.limits.memory_mb

    async def ran_out_of_memory(self) -> bool:
        """Whether the kernel has ended a process for want of memory."""
        try:
            return (await self._hosted.machine.stats()).oom_kills > 0
        except RuntimeFailure:
            return False

    async def run(
        self,
        command: str,
        *,
        user: str,
        workdir: str = "",
        env: Mapping[str, str] | None = None,
        seconds: float,
        tag: str = "",
    ) -> AsyncIterator[OutputLine | Finished]:
        """Run a command in a login shell, as clients' commands run, and hand on its lines as they come.

        Raises:
            StepFailed: it could not be started, or ran longer than `seconds`.
        """
        argv = ("/bin/bash", "-l", "-c", command)
        async for event in self.execute(argv, user=user, workdir=workdir, env=env, seconds=seconds, tag=tag):
            yield event

    async def execute(
        self,
        argv: Sequence[str],
        *,
        user: str,
        workdir: str = "",
        env: Mapping[str, str] | None = None,
        seconds: float,
        tag: str = "",
    ) -> AsyncIterator[OutputLine | Finished]:
        """Like `run`, for a program and its arguments."""
        cutters = {"stdout": LineCutter(), "stderr": LineCutter()}
        events = self._hosted.agent.stream(
            argv, user=user, workdir=workdir, env=dict(env or {}), timeout=seconds, tag=tag
        )
        try:
            async with asyncio.timeout(seconds + 5), contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, ProcessEnd):
                        for name, cutter in cutters.items():
                            for text in cutter.rest():
                                yield OutputLine(name == "stderr", text)
                        yield Finished(event.exit_code if event.exited else -1, event.status)
                        return
                    for number, text in enumerate(cutters[event.stream].feed(event.data)):
                        yield OutputLine(event.stream == "stderr", text)
                        if number % _LINES_AT_ONCE == _LINES_AT_ONCE - 1:
                            await asyncio.sleep(0)
        except TimeoutError:
            raise StepFailed(f"it ran longer than {seconds:g} s and was given up") from None
        except AgentFailure as error:
            raise StepFailed(await self._why(error)) from error
        raise StepFailed(await self._why(AgentFailure("the agent did not tell how the command ended")))

    async def do(self, script: str, *words: str, shell: str = "/bin/bash", seconds: float = _SHORT_SECONDS) -> None:
        """Run one of our own scripts as root.

        Raises:
            StepFailed: it ended with an error; the message is what it said.
        """
        said: list[str] = []
        async for event in self.execute((shell, "-c", script, "emberbox", *words), user="root", seconds=seconds):
            if isinstance(event, OutputLine):
                said.append(event.text)
            elif event.exit_code != 0:
                raise StepFailed("\n".join(said[-5:]) or f"it ended with exit code {event.exit_code}")

    async def upload(self, source: int, size: int, path: str) -> None:
        """Stream an open file of this host into the machine, as root's.

        Raises:
            StepFailed: the machine's disk is full, or it does not answer.
        """
        try:
            async with asyncio.timeout(_UPLOAD_SECONDS * self._hosting.time_scale):
                await self._hosted.agent.upload(source, size, path)
        except TimeoutError:
            raise StepFailed("the files could not be brought into the machine in time") from None
        except AgentFailure as error:
            raise StepFailed(await self._why(error)) from error

    async def save(self, into: Path) -> None:
        """Copy the machine's disk into an empty folder, as `upper.ext4`, with everything written so far."""
        remembers = self._hosting.runtime.capabilities.memory_snapshots
        if remembers:  # a guest kernel holds what was written until it is told to let go
            await self._hosted.agent.freeze_files(seconds=_FLUSH_SECONDS)
        try:
            saved = await self._hosted.machine.save(into, memory=False)
        except BaseException:
            if remembers:
                with contextlib.suppress(AgentFailure):  # of the first there is more to tell
                    await finish(self._hosted.agent.thaw_files())
            raise
        if remembers:
            await finish(self._hosted.agent.thaw_files())
        if saved.upper.name != "upper.ext4":
            await asyncio.to_thread(saved.upper.rename, into / "upper.ext4")

    async def _why(self, error: AgentFailure) -> str:
        """An agent that breaks off has often gone with its machine; that reason is the better one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                return f"the machine ended: {await self._hosted.machine.wait()}"
        return str(error)


@contextlib.asynccontextmanager
async def build_machine(
    hosting: Hosting, image: Image, limits: Limits, upper: Path | None
) -> AsyncIterator[BuildMachine]:
    """Start a machine on the image's layers and a copy of `upper` (None: a blank disk); it ends with the block.

    Raises:
        NodeFull, DiskFull, LayerMissing, AgentFailure, RuntimeFailure: see there.
    """
    saved = None
    if upper is not None:
        saved = Saved(runtime=hosting.runtime.name, directory=upper.parent, upper=upper, memory=False)
    introduction = identity.unclaimed(image, limits)
    hosted = await hosting.start(Origin(image.layers, saved), limits, hostname="sandbox", introduction=introduction)
    try:
        yield BuildMachine(hosting, hosted)
    finally:
        await hosting.end(hosted)
