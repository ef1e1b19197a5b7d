"""One kernel process and the messages to and from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager

from interpreter.errors import KernelFailed
from interpreter.languages import Language
from interpreter.results import result_event

Event = dict[str, Any]

_START_SECONDS = 180.0
"""R takes several times as long as Python, and a busy host stretches both. A kernel that died is told at once."""
_OTHER_END_SECONDS = 2.0
_ALIVE_EVERY = 0.2


class KernelDied(Exception):
    """The process ended while it ran code."""


class Kernel:
    """Runs one piece of code after the other; its owner sees to that."""

    def __init__(
        self, language: Language, manager: AsyncKernelManager, client: AsyncKernelClient, folder: Path
    ) -> None:
        self._language = language
        self._manager = manager
        self._folder = folder
        self._client = client
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        readers = (self._read(client.get_iopub_msg), self._read(client.get_shell_msg), self._watch())
        self._pumps = [asyncio.create_task(reader) for reader in readers]
        self.dead = False

    @classmethod
    async def start(cls, language: Language, cwd: str) -> Kernel:
        """Start a kernel and wait until it answers.

        Raises:
            KernelFailed: it did not.
        """
        context = zmq.asyncio.Context()
        # Without a high-water mark: a loop that prints faster than a client reads loses nothing.
        context.setsockopt(zmq.RCVHWM, 0)
        folder = Path(tempfile.mkdtemp(prefix="kernel-"))
        manager = AsyncKernelManager(
            kernel_name=language.kernel, connection_file=str(folder / "connection.json"), context=context
        )
        if language.transport == "ipc":
            manager.transport, manager.ip = "ipc", str(folder / "socket")
        try:
            await manager.start_kernel(cwd=cwd, env=dict(os.environ))
            client = manager.client()
            client.start_channels(stdin=False)
            await client.wait_for_ready(timeout=_START_SECONDS)
        except BaseException as error:  # also a cancel: whoever waited has gone, and nobody else knows the process
            with contextlib.suppress(Exception):
                await manager.shutdown_kernel(now=True)
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise KernelFailed(f"the {language.name} kernel did not start: {error}") from error
        return cls(language, manager, client, folder)

    async def execute(self, code: str, *, silent: bool = False) -> AsyncIterator[Event]:
        """Run code and yield the client's events as they come. With `silent` nothing is counted or remembered.

        Raises:
            KernelDied: the process ended.
        """
        message_id = self._client.execute(
            code, silent=silent, store_history=not silent, allow_stdin=False, stop_on_error=False
        )
        told_error = False
        reply: Mapping[str, Any] | None = None
        idle = False
        while True:
            match idle, reply is not None:
                case True, True:
                    patience: float | None = 0.0 if silent else self._language.late_seconds
                case False, False:
                    patience = None
                case _:  # one of the two may be lost, with a kernel that is no longer itself
                    patience = _OTHER_END_SECONDS
            try:
                message = await self._next_message(patience)
            except TimeoutError:
                break
            if message is None:
                raise KernelDied
            if message["parent_header"].get("msg_id") != message_id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "execute_reply":
                reply = content
            elif kind == "status":
                idle |= content["execution_state"] == "idle"
            elif event := self._event(kind, content):
                told_error |= kind == "error"
                yield event
        # Some kernels tell of an error in their reply alone.
        if reply is not None and reply.get("status") == "error" and not told_error:
            yield _error_event(reply)

    async def _next_message(self, patience: float | None) -> dict[str, Any] | None:
        """
        Raises:
            TimeoutError: none came within `patience` seconds.
        """
        if patience == 0.0:
            try:
                return self._messages.get_nowait()
            except asyncio.QueueEmpty:
                raise TimeoutError from None
        async with asyncio.timeout(patience):
            return await self._messages.get()

    async def run_silently(self, code: str) -> None:
        async for _ in self.execute(code, silent=True):
            pass

    async def interrupt(self) -> None:
        """Ask the code that runs to stop; it need not obey."""
        await self._manager.interrupt_kernel()

    async def stop(self) -> None:
        """End the process. Whoever waits for its code gets `KernelDied`."""
        self._end()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self._client.stop_channels()
        with contextlib.suppress(Exception):
            await self._manager.shutdown_kernel(now=True)
        self._manager.context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- what the kernel sends

    def _event(self, kind: str, content: Mapping[str, Any]) -> Event | None:
        match kind:
            case "stream":
                return {"type": content["name"], "text": content["text"], "timestamp": time.time_ns()}
            case "execute_result":
                return result_event(content["data"], main=True)
            case "display_data":
                picture = any(mime.startswith("image/") for mime in content["data"])
                return result_event(content["data"], main=self._language.displays_values and not picture)
            case "execute_input":
                return {"type": "number_of_executions", "execution_count": content["execution_count"]}
            case "error":
                return _error_event(content)
        return None

    async def _read(self, channel: Callable[..., Awaitable[dict[str, Any]]]) -> None:
        while True:
            self._messages.put_nowait(await channel(timeout=None))

    async def _watch(self) -> None:
        while await self._manager.is_alive():  # noqa: ASYNC110 - the library tells of an end in no other way
            await asyncio.sleep(_ALIVE_EVERY)
        self._end()

    def _end(self) -> None:
        self.dead = True
        self._messages.put_nowait(None)


def _error_event(content: Mapping[str, Any]) -> Event:
    return {
        "type": "error",
        "name": content.get("ename") or "Error",
        "value": content.get("evalue") or "",
        "traceback": "\n".join(content.get("traceback") or ()),
    }
