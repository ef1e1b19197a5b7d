"""Driving the OCI runtime's command line: start a bundle, take its record away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

from emberbox.commands import CommandFailed, run
from emberbox.linux.mounts import unmount_below
from emberbox.runtime.errors import RuntimeFailure
from emberbox.threads import to_thread_whole

_DELETE_SECONDS = 20.0


class OciRuntime:
    """runc, or what speaks its command line (runsc). Keeps its records in `state`."""

    def __init__(self, program: str, state: Path, *, time_scale: float = 1.0) -> None:
        self.program = program
        self.state = state
        self._scale = time_scale

    async def start(self, machine_id: str, bundle: Path, log: int, *, seconds: float = 20.0) -> int:
        """Create and start the container; returns the host's pid of its first process.

        No process of the OCI runtime stays behind. `log` becomes the standard output of the first process.

        Raises:
            RuntimeFailure: with the runtime's own words.
        """
        pid_file, own_log = bundle / "pid", bundle / "runtime.log"
        self.state.mkdir(mode=0o711, parents=True, exist_ok=True)
        argv: tuple[str | Path, ...] = (
            *(self.program, "--root", self.state, "--log", own_log, "--log-format", "json"),
            *("run", "--detach", "--bundle", bundle, "--pid-file", pid_file, machine_id),
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *(os.fspath(word) for word in argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise RuntimeFailure(f"{self.program} could not be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(seconds * self._scale):
                code = await process.wait()
        except TimeoutError:
            raise RuntimeFailure(f"{self.program} did not start the container within {seconds:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await asyncio.shield(process.wait())
        if code != 0:
            raise RuntimeFailure(f"{self.program} could not start the container: {_last_words(own_log)}")
        return int(pid_file.read_text())

    async def delete(self, machine_id: str) -> None:
        """End whatever of the container is left and forget it. Idempotent."""
        if not (self.state / machine_id).exists():
            return
        await to_thread_whole(self._unmount_own_program, machine_id)
        argv = (self.program, "--root", self.state, "delete", "--force", machine_id)
        try:
            await run(argv, timeout=_DELETE_SECONDS * self._scale)
        except CommandFailed as error:
            if (self.state / machine_id).exists():
                raise RuntimeFailure(f"the container {machine_id} could not be deleted: {error}") from error

    async def forget(self, machine_id: str) -> None:
        """Take the record of a container away whose processes have ended. Idempotent."""
        if Path(self.program).name == "runc":
            # `runc delete` takes 25 ms, and would besides only remove the cgroup, which its owner here does.
            await to_thread_whole(self._unmount_own_program, machine_id)
            await to_thread_whole(shutil.rmtree, self.state / machine_id, ignore_errors=True)
        else:
            await self.delete(machine_id)

    def _unmount_own_program(self, machine_id: str) -> None:
        """runc mounts its own program in its record for a moment; one that was killed then leaves it there."""
        unmount_below(self.state / machine_id)

    def known(self) -> list[str]:
        """IDs of containers that it has a record of."""
        return sorted(path.name for path in self.state.iterdir()) if self.state.is_dir() else []


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            return line
        if entry.get("level") in ("error", "fatal"):
            return str(entry.get("msg", line))
    return "it gave no reason"
