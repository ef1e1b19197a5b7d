"""The one way to run an external command: with a deadline, never on the event loop's time.

A command that outlives its deadline, or whose caller is cancelled, is killed with its whole process group and reaped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAIL = 2000


class CommandFailed(Exception):
    """A command could not be started, ended with another exit code than 0, or ran out of time.

    Attributes:
        argv: the command.
        returncode: its exit code; negative for a signal; None when it never started or ran out of time.
        stderr: the end of what it wrote there.
    """

    def __init__(self, argv: Sequence[str], why: str, *, returncode: int | None = None, stderr: str = "") -> None:
        detail = stderr.strip()[-_TAIL:]
        super().__init__(f"{argv[0]} {why}" + (f": {detail}" if detail else ""))
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr = stderr


class CommandTimedOut(CommandFailed):
    """A command ran longer than it may, and was killed."""


@dataclass(frozen=True, slots=True)
class CompletedRun:
    """What a command left behind. `stdout` and `stderr` are whole, in bytes."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """`stdout` as text, undecodable bytes replaced."""
        return self.stdout.decode(errors="replace")

    @property
    def error_text(self) -> str:
        """`stderr` as text, undecodable bytes replaced."""
        return self.stderr.decode(errors="replace")


async def run(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    input: bytes | None = None,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    dies_with_us: bool = False,
) -> CompletedRun:
    """Run `argv` (no shell) to its end.

    Args:
        timeout: seconds until it is killed.
        input: bytes for its standard input; None: `/dev/null`.
        check: raise when the exit code is not 0.
        env: its whole environment; None: ours.
        dies_with_us: the kernel kills it when this process is killed. For what would go on for long.

    Raises:
        CommandFailed: it could not be started, or `check` and the exit code is not 0.
        CommandTimedOut: it ran longer than `timeout`.
    """
    words = tuple(os.fspath(word) for word in argv)
    launched = words
    if dies_with_us:
        if shutil.which(words[0]) is None:
            raise CommandFailed(words, "could not be started (no such program)")
        launched = ("setpriv", "--pdeathsig", "KILL", "--", *words)
    try:
        process = await _start(
            asyncio.create_subprocess_exec(
                *launched,
                stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        )
    except OSError as error:
        raise CommandFailed(words, f"could not be started ({error.strerror or error})") from error
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(input)
    except TimeoutError:
        raise CommandTimedOut(words, f"ran longer than {timeout:g} s and was killed") from None
    finally:
        if process.returncode is None:
            _kill_group(process)
            await asyncio.shield(process.wait())
    code = process.returncode
    assert code is not None
    if check and code != 0:
        text = stderr.decode(errors="replace")
        why = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise CommandFailed(words, why, returncode=code, stderr=text)
    return CompletedRun(words, code, stdout, stderr)


async def _start(starting: Coroutine[Any, Any, Process]) -> Process:
    """Await the start of a process. A cancellation waits for it to be started, and kills it.

    Cancelled in the middle, asyncio waits for ever for the ends of pipes that it never connected.
    """
    task = asyncio.ensure_future(starting)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await asyncio.shield(task)
        if not task.cancelled() and task.exception() is None:
            _kill_group(task.result())
            await asyncio.shield(task.result().wait())
        raise


def _kill_group(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
