"""Contexts: a kernel each, with a language and a directory.

Code of one context runs in turn, contexts run side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from interpreter.errors import Invalid, KernelFailed, NoSuchContext
from interpreter.kernel import Event, Kernel, KernelDied
from interpreter.languages import Language, find_language

HOME = os.environ.get("HOME", "/home/user")
DEFAULT_LANGUAGE = "python"

_SETTLE_SECONDS = 5.0
"""How long interrupted code may take to stop, before its kernel is ended."""


class Context:
    def __init__(self, language: Language, cwd: str) -> None:
        self.id = str(uuid.uuid4())
        self.language = language
        self.cwd = cwd
        self._kernel: Kernel | None = None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._env: dict[str, str] = {}
        self._closed = False

    def describe(self) -> dict[str, str]:
        return {"id": self.id, "language": self.language.name, "cwd": self.cwd}

    async def start(self) -> None:
        """Start the kernel and see that it runs code.

        Raises:
            KernelFailed: it does not.
        """
        async with self._turn:
            kernel = await self._living_kernel()
            try:
                await kernel.run_silently("")
            except KernelDied:
                raise KernelFailed(f"the {self.language.name} kernel ended at once") from None

    async def run(self, code: str, *, env: Mapping[str, str], call_env: Mapping[str, str]) -> AsyncGenerator[Event]:
        """Run code when it is its turn and yield what happens. Leaving early interrupts it.

        Args:
            env: the sandbox's variables, which stay.
            call_env: variables for this piece of code alone.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        work = asyncio.create_task(self._execute(code, dict(env), dict(call_env), events))
        self._tasks.add(work)
        work.add_done_callback(self._tasks.discard)
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            work.cancel()

    async def restart(self) -> None:
        """End the kernel, whatever it runs, and start a new one; what it remembered is gone."""
        await self._drop_kernel()
        await self.start()

    async def close(self) -> None:
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await self._drop_kernel()

    async def _execute(
        self, code: str, env: dict[str, str], call_env: dict[str, str], events: asyncio.Queue[Event | None]
    ) -> None:
        try:
            async with self._turn:
                await self._execute_in_turn(code, env, call_env, events)
        except asyncio.CancelledError:
            if self._closed:
                events.put_nowait(_REMOVED)
                events.put_nowait({"type": "unexpected_end_of_execution"})
            raise
        except KernelDied:
            events.put_nowait(_REMOVED if self._closed else _DIED)
            events.put_nowait({"type": "unexpected_end_of_execution"})
        except Exception as error:
            events.put_nowait({"type": "error", "name": type(error).__name__, "value": str(error), "traceback": ""})
            events.put_nowait({"type": "unexpected_end_of_execution"})
        finally:
            events.put_nowait(None)

    async def _execute_in_turn(
        self, code: str, env: dict[str, str], call_env: dict[str, str], events: asyncio.Queue[Event | None]
    ) -> None:
        kernel = await self._living_kernel()
        try:
            if env != self._env:
                await kernel.run_silently(self.language.push_env(env))
                self._env = env
            if call_env:
                await kernel.run_silently(self.language.push_env(call_env))
            async for event in kernel.execute(code):
                events.put_nowait(event)
            events.put_nowait({"type": "end_of_execution"})
            if call_env:
                await kernel.run_silently(self.language.pop_env(call_env))
        except asyncio.CancelledError:
            await self._settle(kernel, call_env)
            raise

    async def _settle(self, kernel: Kernel, call_env: dict[str, str]) -> None:
        """Nobody waits for this code any more: stop it, so that the next has its turn with the state kept."""
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                await kernel.interrupt()
                # Runs when the interrupted code has ended: a kernel takes one thing after the other.
                await kernel.run_silently(self.language.pop_env(call_env) if call_env else "")
        except (TimeoutError, KernelDied):
            await self._drop_kernel()
        except RuntimeError:  # the library's, when its kernel is already stopped: the context was removed
            if not self._closed:
                raise

    async def _living_kernel(self) -> Kernel:
        if self._kernel is not None and self._kernel.dead:
            await self._drop_kernel()
        if self._kernel is None:
            self._env = {}
            self._kernel = await Kernel.start(self.language, self.cwd)
        return self._kernel

    async def _drop_kernel(self) -> None:
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            await kernel.stop()


_DIED: Event = {
    "type": "error",
    "name": "KernelDied",
    "value": "the kernel ended while it ran this code: it was killed, ran out of memory, or was restarted. "
    "Its variables are gone; the next code runs in a new one.",
    "traceback": "",
}

_REMOVED: Event = {
    "type": "error",
    "name": "ContextRemoved",
    "value": "the context was removed while this code ran or waited; create another one",
    "traceback": "",
}


class Contexts:
    """All contexts, and the default one of each language, which is made when it is first asked for."""

    def __init__(self) -> None:
        self._all: dict[str, Context] = {}
        self._defaults: dict[str, Context] = {}
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def all(self) -> list[Context]:
        return list(self._all.values())

    def get(self, context_id: str) -> Context:
        """
        Raises:
            NoSuchContext: there is none of this ID.
        """
        try:
            return self._all[context_id]
        except KeyError:
            raise NoSuchContext(context_id) from None

    async def default(self, name: str | None) -> Context:
        """The default context of a language.

        Raises:
            Invalid: the language is not supported.
            KernelFailed: its kernel does not start.
        """
        language = find_language(name or DEFAULT_LANGUAGE)
        # A lock each: one language's kernel may take seconds to start, and the others need not wait.
        async with self._making[language.name]:
            found = self._defaults.get(language.name)
            if found is None:
                found = self._defaults[language.name] = await self.create(language.name, None)
            return found

    async def create(self, name: str | None, cwd: str | None) -> Context:
        """
        Raises:
            Invalid: the language is not supported, or `cwd` is not a directory.
            KernelFailed: its kernel does not start.
        """
        language = find_language(name or DEFAULT_LANGUAGE)
        directory = Path(HOME, cwd or "")
        if not await asyncio.to_thread(directory.is_dir):
            raise Invalid(f"cwd {str(directory)!r} is not a directory")
        context = Context(language, str(directory))
        await context.start()
        self._all[context.id] = context
        return context

    async def remove(self, context_id: str) -> None:
        """
        Raises:
            NoSuchContext: there is none of this ID.
        """
        context = self.get(context_id)
        del self._all[context_id]
        for name, default in list(self._defaults.items()):
            if default is context:
                del self._defaults[name]
        await context.close()

    async def close(self) -> None:
        for context in self.all():
            with contextlib.suppress(NoSuchContext):
                await self.remove(context.id)
