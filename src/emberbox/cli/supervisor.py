"""Keeps the roles running: starts them, restarts what crashes with a growing delay, stops them in order.

Machines are not children of any role in this sense: they outlive a crash or a restart of all of them.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from emberbox.cli.errors import CliError
from emberbox.cli.processes import ProcessRef
from emberbox.cli.roles import Role
from emberbox.cli.state import RoleProcess

log = structlog.get_logger()

BACK_OFF = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before the first, second, ... restart in a row."""

STEADY_SECONDS = 60.0
"""A role that has run this long has recovered; its next crash counts as the first."""

GIVE_UP_STARTING = 3
"""Crashes before a role was ever ready, after which `up` fails instead of trying on."""

LOG_BYTES = 16 * 1024 * 1024
"""A log is moved to `NAME.log.1` when it has grown past this."""


class RoleFailed(CliError):
    """A role ended again and again before it was ready, or did not get ready in time."""


@dataclass
class _Supervised:
    role: Role
    process: asyncio.subprocess.Process | None = None
    ref: ProcessRef | None = None
    restarts: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Supervisor:
    """Runs roles until told to stop.

    `changed` is called with the running processes whenever one starts or ends.
    """

    def __init__(
        self, roles: Sequence[Role], *, changed: Callable[[list[RoleProcess]], None], stop_grace: float = 15.0
    ) -> None:
        self._supervised = [_Supervised(role) for role in roles]
        self._changed = changed
        self._stop_grace = stop_grace
        self._failure: asyncio.Future[object] | None = None
        self._stopping = False
        self._rotation: asyncio.Task[None] | None = None

    @property
    def processes(self) -> list[RoleProcess]:
        return [RoleProcess(s.role.name, s.ref, s.restarts) for s in self._supervised if s.ref is not None]

    def begin(self) -> None:
        """Start every role and keep it running from now on; `ready` says how it went."""
        self._failure = asyncio.get_running_loop().create_future()
        for one in self._supervised:
            one.task = asyncio.create_task(self._keep_running(one), name=f"role-{one.role.name}")
        self._rotation = asyncio.create_task(self._rotate_logs(), name="log-rotation")

    async def ready(self, *, deadline: float) -> None:
        """Wait until every role answers, after `begin`.

        Args:
            deadline: seconds.

        Raises:
            RoleFailed: one does not get ready; all are stopped again.
        """
        assert self._failure is not None
        everyone: asyncio.Future[object] = asyncio.ensure_future(self._all_ready())
        try:
            done, _ = await asyncio.wait(
                {everyone, self._failure}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if self._failure in done:
                self._failure.result()
            if everyone not in done:
                late = next(one for one in self._supervised if not one.ready.is_set())
                raise RoleFailed(f"the {late.role.name} did not answer within {deadline:.0f} s; {tail(late.role.log)}")
            everyone.result()
        except BaseException:
            everyone.cancel()
            with suppress(asyncio.CancelledError):
                await everyone
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the roles, last started first. Idempotent."""
        self._stopping = True
        for one in reversed(self._supervised):
            await self._stop_one(one)
        if self._rotation is not None:
            self._rotation.cancel()
        self._changed(self.processes)

    async def stop_role(self, name: str) -> None:
        """Stop one role ahead of the others, for good."""
        self._stopping = True
        for one in self._supervised:
            if one.role.name == name:
                await self._stop_one(one)
        self._changed(self.processes)

    async def _stop_one(self, one: _Supervised) -> None:
        process = one.process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._stop_grace)
            except TimeoutError:
                log.warning("role.killed", name=one.role.name, grace_s=self._stop_grace)
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if one.task is not None:
            one.task.cancel()
            with suppress(asyncio.CancelledError):
                await one.task
        one.ref = None

    async def _keep_running(self, one: _Supervised) -> None:
        in_a_row = 0
        while True:
            started = time.monotonic()
            try:
                process = await self._spawn(one)
            except OSError as error:
                self._fail(f"the {one.role.name} cannot be started: {error}")
                return
            code = await process.wait()
            one.ref = None
            if self._stopping:
                return
            ran = time.monotonic() - started
            in_a_row = 1 if ran >= STEADY_SECONDS else in_a_row + 1
            log.error("role.ended", name=one.role.name, code=code, ran_s=round(ran, 1), in_a_row=in_a_row)
            self._changed(self.processes)
            if not one.ready.is_set() and in_a_row >= GIVE_UP_STARTING:
                self._fail(f"the {one.role.name} does not start (exit code {code}); {tail(one.role.log)}")
                return
            await asyncio.sleep(BACK_OFF[min(in_a_row, len(BACK_OFF)) - 1])
            one.restarts += 1

    async def _spawn(self, one: _Supervised) -> asyncio.subprocess.Process:
        role = one.role
        # A file, not a pipe: the role goes on when the supervisor is killed, and appending survives rotation.
        with role.log.open("ab") as output:
            process = one.process = await asyncio.create_subprocess_exec(
                *role.argv,
                env=role.environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with suppress(ProcessLookupError):
            one.ref = ProcessRef.of(process.pid)
        log.info("role.started", name=role.name, pid=process.pid)
        self._changed(self.processes)
        return process

    async def _all_ready(self) -> None:
        await asyncio.gather(*(self._wait_ready(one) for one in self._supervised))

    async def _wait_ready(self, one: _Supervised) -> None:
        # Asking is the only way to know: another process has to answer.
        while not await asyncio.to_thread(one.role.ready):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        one.ready.set()

    def _fail(self, message: str) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(RoleFailed(message))

    async def _rotate_logs(self) -> None:
        while True:
            await asyncio.sleep(30)
            for one in self._supervised:
                await asyncio.to_thread(rotate, one.role.log)


def rotate(path: Path, *, limit: int = LOG_BYTES) -> None:
    """Keep one older copy of a log that has grown past `limit` bytes.

    The role keeps its file open, so the content is copied and the file emptied.
    """
    with suppress(FileNotFoundError):
        if path.stat().st_size > limit:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            with path.open("r+b") as handle:
                handle.truncate(0)


def tail(path: Path, *, lines: int = 12) -> str:
    """The end of a log, for an error message."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - 8192))
            last = handle.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        last = []
    if not last:
        return f"its log {path} is empty"
    return f"the end of its log {path}:\n" + "\n".join(f"  {line}" for line in last)
